"""The results files of the benchmarks turned into README's tables, one figure, and what a run prints.

    python benchmarks/report.py            rewrites the tables of README.md and benchmarks/results/ladder.png
    python benchmarks/report.py --check    exit status 1 if README.md is not what the results say

In the README everything between `<!-- results:begin NAME -->` and `<!-- results:end NAME -->` is generated; NAME is one
of `TABLES`. Speeds are only compared within one run: a case is shown by its newest run with two implementations, in a
table of something special (a ladder, cold starts, host times) by the newest of these that has it. Of mixtures of
experts there is a table of all arms, alone in their run or not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from records import ROOT, Row, case_of, load_results
from shapes import SHAPES, Case

NAMES = {"stock": "stock", "fast": "fast_unsloth_patch", "liger": "Liger", "unsloth": "Unsloth"}


def console_table(rows: list[Row]) -> str:
    """What `train_step.py` prints last: one line an arm, parity beside speed."""
    head = ("", "step ms", "min-max", "tokens/s", "alloc", "resv GiB", "1st s", "3 steps", "loss diff", "grad diff", "")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        if row["status"] != "ok":
            lines.append((row["label"], f"{row['status']}: {row['reason'].splitlines()[0][:90]}"))
            continue
        ms, found = row["step_ms"], row.get("parity")
        lines.append((
            row["label"], f"{ms['median']:.1f}", f"{ms['min']:.1f}-{ms['max']:.1f}", f"{row['tokens_per_s']:.0f}",
            f"{row['allocated_gib']:.2f}" if "allocated_gib" in row else "-",
            f"{row['reserved_gib']:.2f}" if "reserved_gib" in row else "-",
            f"{row['first_step_s']:.1f}", f"{row['first_three_s']:.1f}",
            f"{found['loss_max']:.1e}" if found else "-", f"{found['grad_norm_max']:.1e}" if found else "-",
            "-" if not found else "ok" if found["ok"] else "OFF",
        ))  # fmt: skip
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in (lines if i == 0 else full)) for i in range(len(head))]
    texts = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def not_fast(row: Row) -> list[str]:
    """What of the patches that an arm asked for did not run, or ran stock, and why.

    Pending ones are of models and libraries that the case does not have.
    """
    reasons = []
    for patch in row["fast"]["rows"]:
        if patch["state"] == "pending":
            continue
        calls = ", ".join(f"{reason} {count}x" for reason, count in patch["fallbacks"].items())
        if patch["state"] != "applied" and patch["reason"] not in ("not in only", "in exclude"):
            reasons.append(f"{patch['id']} {patch['state']}: {patch['reason']}")
        elif calls:
            reasons.append(f"{patch['id']}: {calls}")
    return reasons


def details(row: Row) -> str:
    """What the table has no room for: fall-backs, host times, the profile, the end of a failed worker's output."""
    lines = []
    if "fast" in row:
        lines += [f"not fast: {reason}" for reason in not_fast(row)]
        if choice := row["fast"].get("recompute_choice"):
            settled = "" if row.get("settled", True) else f", not settled after {row['warmup']} steps"
            lines.append(f"recompute {row['arm']['recompute']}: {choice}{settled}")
    lines += _load_lines(row)
    if "host" in row:
        host = row["host"]
        forward, backward = host["forward_us_per_layer"], host["backward_us_per_layer"]
        lines.append(f"host per layer: forward {forward:.0f} us, backward {backward:.0f} us")
    if "profile" in row:
        found = row["profile"]
        lines.append(
            f"profile: busy {found['busy_ms']:.1f} ms, idle {found['idle_ms']:.1f} ms, {found['launches']} launches"
        )
        lines.append("  " + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in found["kinds"].items()))
        lines += [f"  {kernel['ms']:9.3f} ms {kernel['count']:6d}  {kernel['name']}" for kernel in found["top"]]
    if row.get("cuda_at_import"):
        lines.append("its imports made a CUDA context, maybe while another worker measured: use --no-overlap")
    if row.get("import_beside_s"):
        lines.append(f"another worker was importing during {row['import_beside_s']:.1f} s of this measurement")
    if "log_tail" in row:
        lines += row["log_tail"][-1500:].splitlines()
    return "".join(f"    {line}\n" for line in lines)


def _load_lines(row: Row) -> list[str]:
    """The load of a mixture's experts, layer by layer, and whether it is stock's."""
    if "expert_load" not in row:
        return []
    if not row["expert_load"]:
        return ["expert load: unknown, its gates do not tell it"]
    layers = [f"{i}: {_spread(load)}" for i, load in enumerate(row["expert_load"])]
    lines = [
        f"pairs of each layer's experts in the first step, smallest/mean/largest: {', '.join(layers[:8])}",
        *(", ".join(layers[i : i + 8]) for i in range(8, len(layers), 8)),
    ]
    if "load_moved" in row.get("parity", {}):
        lines.append(f"{100 * row['parity']['load_moved']:.2g} % of a layer's pairs at most go elsewhere than in stock")
    return lines


def _spread(load: list[int]) -> str:
    return f"{min(load)}/{sum(load) / len(load):.0f}/{max(load)}"


def _runs(
    document: dict[str, list[Row]], wanted: Callable[[Row], object] | None = None, least: int = 2
) -> dict[str, list[Row]]:
    """Title of a case -> the rows of its newest run of two implementations; the later of two rows of one label counts.

    Stock counts as one also if the memory did not hold it, as long as something else ran. With `wanted`: the newest
    that has a row of which that is true. `least`: so many implementations.
    """
    runs: dict[str, dict[str, dict[tuple[str, bool], Row]]] = {}
    for row in document["rows"]:
        key = row["label"], row.get("cold", False)
        runs.setdefault(case_of(row).title(), {}).setdefault(row["run"], {})[key] = row
    newest = {}
    for title, of_case in runs.items():
        for rows in of_case.values():
            known = {
                r["impl"] for r in rows.values() if r["status"] == "ok" or (r["impl"], r["status"]) == ("stock", "oom")
            }
            if len(known) >= least and (wanted is None or any(map(wanted, rows.values()))):
                newest[title] = list(rows.values())
    return newest


def _is_cold(row: Row) -> bool:
    return bool(row.get("cold")) and row["status"] == "ok" and row["label"] == row["impl"]


def _has_host(row: Row) -> bool:
    return "host" in row


def _has_experts(row: Row) -> bool:
    return bool(SHAPES[row["case"]["model"]].experts)


def _is_rung(row: Row) -> bool:
    return bool(row["arm"].get("rung"))


def _is_variant(row: Row) -> bool:
    """An arm that is neither an implementation as it comes (measured once more: "fast, again") nor a rung."""
    return row["label"].removesuffix(", again") != row["impl"] and not _is_rung(row)


def _warm(rows: list[Row]) -> list[Row]:
    """One row a label: where an arm ran with cold caches too, the warm row."""
    ordered = sorted(rows, key=lambda row: not row.get("cold", False))
    return list({row["label"]: row for row in ordered}.values())


def _floor(document: dict[str, list[Row]], case: Case) -> Row | None:
    same = [f for f in document["floors"] if f["title"] == floor_title(case)]
    return same[-1] if same else None


def floor_title(case: Case) -> str:
    """What a floor belongs to: neither dropout nor the step count changes it, nor where the adapters are."""
    fields = {name: getattr(case, name) for name in ("layers", "packed", "padding", "routing")}
    return Case(case.model, case.mode, case.batch, case.seq, case.checkpointing, **fields).title()


def _floor_numbers(floor: Row) -> str:
    more = f" + {floor['dequantize_ms']:.0f} dequantisation" if "dequantize_ms" in floor else ""
    return f"{floor['total_ms']:.0f} ms{more}"


def _shown(row: Row) -> str:
    """An arm's name for readers."""
    label: str = row["label"]
    return NAMES.get(label, label)


def _numbers(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return "out of memory" if row["status"] == "oom" else str(row["status"])
    memory = f", {row['allocated_gib']:.1f} GiB" if "allocated_gib" in row else ""
    off = "" if row.get("parity", {"ok": True})["ok"] else " (parity off)"
    return f"{row['step_ms']['median']:.0f} ms{memory}{off}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _steps(document: dict[str, list[Row]]) -> str:
    rows = []
    for title, found in _runs(document).items():
        plain = {r["impl"]: r for r in _warm(found) if r["label"] == r["impl"]}
        cells = [_numbers(plain.get(impl)) for impl in NAMES]
        if document["floors"]:
            floor = _floor(document, case_of(found[0]))
            cells.append(_floor_numbers(floor) if floor else "-")
        rows.append([title, *cells])
    head = ["batch x sequence", *NAMES.values(), *["floor"][: len(document["floors"])]]
    return _markdown(head, rows) if rows else ""


def _parity(document: dict[str, list[Row]]) -> str:
    rows = []
    for title, found in _runs(document).items():
        for row in _warm(found):
            if row["impl"] == "stock" or "parity" not in row or row["label"] != row["impl"]:
                continue
            p = row["parity"]
            shown = [f"{p[key]:.1e}" for key in ("loss_max", "grad_norm_first", "grad_norm_max")]
            rows.append([title, NAMES[row["impl"]], *shown])
    head = ["case", "", "loss, any step", "gradient norm, first step", "gradient norm, any step"]
    return _markdown(head, rows) if rows else ""


def _start(document: dict[str, list[Row]]) -> str:
    rows = []
    for title, found in _runs(document, _is_cold).items():
        cold = {r["impl"]: r for r in found if _is_cold(r)}
        rows.append([title, *(f"{cold[i]['first_three_s']:.1f} s" if i in cold else "-" for i in NAMES)])
    return _markdown(["first three steps, nothing compiled yet", *NAMES.values()], rows) if rows else ""


def _host(document: dict[str, list[Row]]) -> str:
    rows: list[list[str]] = []
    for title, found in _runs(document, _has_host).items():
        for row in _warm(found):
            if _has_host(row):
                cells = [f"{row['host'][f'{way}_us_per_layer']:.0f} us" for way in ("forward", "backward")]
                rows.append([title, _shown(row), *cells])
    return _markdown(["case", "", "forward, a layer", "backward, a layer (with its recompute)"], rows) if rows else ""


def ladder_rows(document: dict[str, list[Row]]) -> tuple[str, list[Row]] | None:
    """Title and rows of the newest ladder: stock, peers, then the rungs from the lowest to the whole library."""
    ladders = list(_runs(document, _is_rung).items())
    if not ladders:
        return None
    title, rows = ladders[-1]
    order = {"stock": 0, "liger": 1, "unsloth": 2, "fast": 1000}
    done = [r for r in _warm(rows) if r["status"] == "ok"]
    return title, sorted(done, key=lambda r: 10 + r["arm"]["rung"] if r["arm"].get("rung") else order[r["impl"]])


def _ladder(document: dict[str, list[Row]]) -> str:
    found = ladder_rows(document)
    if not found:
        return ""
    title, rows = found
    cells = [[_shown(r), *_numbers(r).partition(", ")[::2]] for r in rows]
    floor = _floor(document, case_of(rows[0]))
    if floor:
        cells.append(["floor", _floor_numbers(floor), "-"])
    return _markdown([title, "step", "peak allocated"], cells)


def _arms(document: dict[str, list[Row]]) -> str:
    """All arms of the cases that have more of them than `_steps` has columns for."""
    rows = []
    for title, found in _runs(document, _is_variant).items():
        for row in _warm(found):
            if not _is_rung(row):
                step, _, memory = _numbers(row).partition(", ")
                speed = f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else "-"
                rows.append([title, _shown(row), step, memory or "-", speed])
    return _markdown(["case", "", "step", "peak allocated", "tokens/s"], rows) if rows else ""


def _experts(document: dict[str, list[Row]]) -> str:
    """All arms of mixtures of experts: how each stands to stock and Unsloth, its losses, the load of its experts."""
    rows = []
    for title, found in _runs(document, _has_experts, least=1).items():
        times = {r["label"]: r["step_ms"]["median"] for r in found if r["status"] == "ok"}
        for row in _warm(found):
            step, _, memory = _numbers(row).partition(", ")
            if row["status"] != "ok":
                rows.append([title, _shown(row), step, "-", "-", "-", "-", "-"])
                continue
            shares = [f"{row['step_ms']['median'] / times[i]:.2f}" if i in times else "-" for i in ("stock", "unsloth")]
            losses = [f"{row['losses'][i]:.4f}" for i in (0, -1)]
            load = [n for layer in row.get("expert_load", []) for n in layer]
            rows.append([
                title, _shown(row), step, memory or "-", *shares, f"{losses[0]}, {losses[1]}",
                _spread(load) if load else "-",
            ])  # fmt: skip
    head = [
        "mixture of experts", "", "step", "peak allocated", "of stock's step", "of Unsloth's", "loss, first and last",
        "pairs an expert, smallest/mean/largest",
    ]  # fmt: skip
    return _markdown(head, rows) if rows else ""


def newest_contexts(document: dict[str, list[Row]]) -> list[Row]:
    """The newest search of each arm, model, mode and cap (`max_context.py`), in the order of their first ones."""
    found = {context_title(row) + row["label"]: row for row in document.get("contexts", [])}
    return list(found.values())


def context_title(row: Row) -> str:
    case = case_of(row)
    return f"{case.title().replace(f'{case.batch}x{case.seq}', 'one row')}, under {row['cap_gib']:g} GiB"


def _contexts(document: dict[str, list[Row]]) -> str:
    rows = []
    for row in newest_contexts(document):
        if row["status"] != "ok":
            rows.append([context_title(row), _shown(row), str(row["status"]), "-", "-", "-"])
            continue
        off = "" if row.get("parity", {"ok": True})["ok"] else " (parity off)"
        rows.append([
            context_title(row), _shown(row), f"{row['longest']:,}{off}",
            f"{row['failed_at']:,}" if row["failed_at"] else "-", f"{row['tokens_per_s']:.0f}",
            f"{row['allocated_gib']:.1f} GiB" if "allocated_gib" in row else "-",
        ])  # fmt: skip
    head = ["case, cap", "", "longest row", "does not fit", "tokens/s there", "peak allocated"]
    return _markdown(head, rows) if rows else ""


TABLES: dict[str, Callable[[dict[str, list[Row]]], str]] = {
    "steps": _steps, "arms": _arms, "experts": _experts, "context": _contexts, "parity": _parity, "start": _start,
    "host": _host, "ladder": _ladder,
}  # fmt: skip


def _provenance(name: str, document: dict[str, list[Row]]) -> str:
    """Device, versions, dates and commits of all rows shown: of the searches, or of everything else."""
    if name == "context":
        shown = newest_contexts(document)
    elif name == "experts":
        shown = [r for found in _runs(document, _has_experts, least=1).values() for r in found]
    else:
        special = (_runs(document, wanted) for wanted in (None, _is_cold, _has_host, _is_rung, _is_variant))
        shown = list({id(r): r for runs in special for found in runs.values() for r in found}.values())
    rows = [r for r in shown if r["status"] == "ok"]
    versions: dict[str, str] = {}
    for row in rows:
        versions |= {name: v for name, v in row["versions"].items() if v}
    dates = sorted({r["date"] for r in rows})
    commits = sorted({r["commit"] or r["source"] for r in rows if r["impl"] == "fast"})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    devices = " and ".join(sorted({r["device"] for r in rows}))
    return f"{devices}, {span}, {listed}" + (f"; commit {', '.join(commits)}" if commits else "")


def render(name: str, documents: list[dict[str, list[Row]]]) -> str:
    """The Markdown of one table, a part for each results file that has something to show."""
    parts = []
    for document in documents:
        text = TABLES[name](document)
        if text:
            parts.append(f"{text}\n\n<sub>{_provenance(name, document)}</sub>")
    return "\n\n".join(parts) or "No results recorded yet."


def update(readme: str, documents: list[dict[str, list[Row]]]) -> str:
    """`readme` with every generated part rewritten.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    for name in re.findall(r"<!-- results:begin (\S+) -->", readme):
        if name not in TABLES:
            raise ValueError(f"README asks for results {name!r}; known are {', '.join(TABLES)}")
        begin, end = f"<!-- results:begin {name} -->", f"<!-- results:end {name} -->"
        before, _, rest = readme.partition(begin)
        if end not in rest:
            raise ValueError(f"README has {begin} without {end}")
        after = rest.partition(end)[2]
        readme = f"{before}{begin}\n{render(name, documents)}\n{end}{after}"
    return readme


def draw_ladder(document: dict[str, list[Row]], path: Path) -> bool:
    """The ladder as bars, time and memory side by side; False if there is no ladder in the results."""
    found = ladder_rows(document)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title, rows = found
    colours = {"stock": "#8c8c8c", "liger": "#c9a227", "unsloth": "#b5651d", "fast": "#1f6f8b"}
    bars = [colours[r["impl"]] for r in rows]
    labels = [_shown(r) for r in rows]
    values = {
        "step, ms": [r["step_ms"]["median"] for r in rows],
        "peak allocated, GiB": [r.get("allocated_gib", 0.0) for r in rows],
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.38 * len(rows)), sharey=True, layout="constrained")
    for axis, (unit, numbers) in zip(axes, values.items()):
        drawn = axis.barh(labels, numbers, color=bars)
        axis.bar_label(drawn, fmt="%.0f" if "ms" in unit else "%.1f", padding=3)
        axis.margins(x=0.12)
        axis.set_xlabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
    floor = _floor(document, case_of(rows[0]))
    if floor:
        axes[0].axvline(floor["total_ms"], color="black", linestyle=":", label="floor")
        axes[0].legend(frameon=False)
    axes[0].invert_yaxis()
    figure.suptitle(f"{title} ({rows[0]['device']})")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of *.json")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if README is out of date")
    options = parser.parse_args(argv)
    documents = [load_results(path) for path in sorted(options.results.glob("*.json"))]
    readme = options.readme.read_text()
    wanted = update(readme, documents)
    if options.check:
        if wanted != readme:
            print(f"{options.readme} is out of date: run python benchmarks/report.py", file=sys.stderr)
        return int(wanted != readme)
    options.readme.write_text(wanted)
    for document in documents:
        if draw_ladder(document, options.results / "ladder.png"):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
