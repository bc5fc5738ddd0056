"""The arrows of the design, read from the source: registry -> install -> patches -> ops -> weights -> device."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from fast_unsloth_patch import compat

PACKAGE = ROOT / "fast_unsloth_patch"
FILES = sorted(PACKAGE.rglob("*.py"))
MECHANISM = {"registry", "install", "compat", "bootstrap", "doctor", "demo", "__main__"}
COMMANDS = {"doctor.py", "demo.py", "_demo_script.py", "__main__.py"}


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, also inside functions."""
    package = ["fast_unsloth_patch", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def storey(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else "top"


def offending(path: Path, packages: set[str], ours: set[str]) -> list[str]:
    bad = []
    for name in imports(path):
        first, *rest = name.split(".")
        if first in packages or (first == "fast_unsloth_patch" and rest and rest[0] in ours):
            bad.append(name)
    return sorted(bad)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_downwards(path):
    where = storey(path)
    if where in ("ops", "weights", "reference", "device"):
        packages = {"transformers", "peft", "wrapt", "accelerate", "trl", "bitsandbytes", "gptqmodel", "liger_kernel"}
        above = {"ops": set(), "weights": {"ops"}, "reference": {"ops", "weights", "device"}}
        ours = MECHANISM | {"patches", "status", "switch"} | above.get(where, {"ops", "weights", "reference"})
        assert offending(path, packages, ours) == []
    elif where == "patches":
        assert offending(path, {"wrapt"}, MECHANISM) == []
    elif path.name not in COMMANDS:
        # The mechanism knows the patches by the strings of the registry alone.
        packages = {"transformers", "peft", "triton", "trl", "accelerate"}
        assert offending(path, packages, {"patches", "ops", "weights", "reference", "device"}) == []
        if path.name != "install.py":
            assert offending(path, {"wrapt"}, set()) == []


def test_wrapt_is_imported_in_one_function():
    source = (PACKAGE / "install.py").read_text()
    assert re.findall(r"^ *(?:from|import) wrapt.*", source, re.M) == [
        "        from wrapt.importer import register_post_import_hook"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_compat_reads_versions(path):
    if path.name == "compat.py":
        return
    assert offending(path, {"packaging", "pkg_resources"}, set()) == []
    assert "importlib.metadata" not in imports(path)
    read = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "__version__"
        and ast.unparse(node.value) != "fast_unsloth_patch"
    ]
    assert read == [], "compat.installed() and compat.versions() give versions"


def test_window_is_the_one_of_the_project_file():
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)\]", text, re.S | re.M).group(1)
    declared = {spec.partition(";")[0] for spec in re.findall(r'"([^"]+)"', dependencies)}
    assert declared == {compat.window(name) for name in compat.WINDOW}


def test_version_is_the_one_of_the_project_file():
    import fast_unsloth_patch

    assert f'\nversion = "{fast_unsloth_patch.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_start_up_files_do_nothing_unless_asked():
    line = (ROOT / "fast_unsloth_patch.pth").read_text()
    assert line == 'import os; os.environ.get("FAST_UNSLOTH") and __import__("fast_unsloth_patch")\n'
    assert (ROOT / "fast_unsloth_patch.start").read_text() == "fast_unsloth_patch.bootstrap:activate\n"
