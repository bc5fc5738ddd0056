"""README.md says what the code does: anchors of warnings, reasons, patches, commands, tables."""

from __future__ import annotations

import ast
import importlib
import re
import sys

from conftest import ROOT

from fast_unsloth_patch.registry import PATCHES

README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
SOURCES = {path: path.read_text() for path in sorted((ROOT / "fast_unsloth_patch").rglob("*.py"))}


def anchors() -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", PROSE, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def constants(node: ast.expr, tree: ast.Module) -> set[str]:
    """The strings that an expression can be: a literal, a choice of two, or a name that such a value was given to."""
    if isinstance(node, ast.Constant):
        return {node.value}
    if isinstance(node, ast.IfExp):
        return constants(node.body, tree) | constants(node.orelse, tree)
    assert isinstance(node, ast.Name), ast.unparse(node)
    given = [a.value for a in ast.walk(tree) if isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == node.id]
    return set().union(*(constants(value, tree) for value in given))


def slugs() -> set[str]:
    found: set[str] = set()
    for text in SOURCES.values():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn":
                found |= constants(node.args[0], tree)
    return found


def test_every_slug_of_a_warning_is_a_section():
    assert slugs() >= {"activation", "declined", "conflicts", "logits-after-step"}
    assert slugs() <= anchors()


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert {link[1:] for link in links if link.startswith("#")} <= anchors()
    measured = list((ROOT / "benchmarks" / "results").glob("*.json"))
    for link in links:
        if "://" not in link and not link.startswith("#") and (measured or not link.endswith(".png")):
            assert (ROOT / link).exists(), link


def test_ci_runs_the_two_commands():
    commands = re.findall(r"^python3 -m venv .+$", README, re.M)
    assert [command.rpartition("&& ")[2].split()[-1] for command in commands] == ["demo", "worksteal"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in commands)


def table(title: str) -> list[list[str]]:
    """The cells of the rows under the header that begins with ``title``."""
    lines = README[README.index(f"\n| {title} |") :].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2 : lines.index("")]]


def test_patches_are_those_of_the_registry():
    rows = [(row[0].strip("` "), row[1].strip("`"), row[2].rstrip(" |")) for row in table("patch id")]
    shown = [(patch.id, patch.target, patch.summary) for patch in PATCHES]
    # The class alone is not told apart, so the table has PEFT's modules before it.
    assert [(i, re.sub(r"^peft\.tuners\.lora\.\w+\.", "", what), summary) for i, what, summary in rows] == shown


def test_reasons_are_those_of_the_code():
    rooms = ("patches", "ops", "weights", "device")
    code = "".join(text for path, text in SOURCES.items() if path.parent.name in rooms)
    for reasons, _ in table("reason"):
        for reason in re.findall("`([^`]+)`", reasons):
            # Without what the code's f-strings fill in.
            for part in re.split(r"\.\.\.|\bdora\b|\bDTensor\b| type |: expected", reason):
                assert part.strip() in code, reason


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("report")
    try:
        documents = [report.load_results(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
        assert set(re.findall(r"<!-- results:begin (\w+) -->", README)) == set(report.TABLES)
        assert report.update(README, documents) == README, "run python benchmarks/report.py"
    finally:
        for name in ("report", "shapes"):
            sys.modules.pop(name, None)
