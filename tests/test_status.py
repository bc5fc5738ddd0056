"""Counters, the table, ``require``, the line after the first fast step, and the report at exit."""

from __future__ import annotations

import copy
import functools
import json
import threading
import timeit
import types

import pytest
import torch
from torch import nn

import fast_unsloth_patch as fup
from fast_unsloth_patch import install, switch
from fast_unsloth_patch.registry import PATCHES
from fast_unsloth_patch.status import _TALLIES, Row, Status, Tally, facts_of, tally


@pytest.fixture
def counts():
    name = "test.counts"
    _TALLIES.pop(name, None)
    yield tally(name)
    del _TALLIES[name]


def test_one_tally_an_id(counts):
    assert tally("test.counts") is counts


def test_counts(counts):
    counts.hit()
    counts.hit(recomputing=True)
    counts.hit_backward()
    counts.fall_back("eval")
    counts.fall_back("eval")
    assert (counts.forward, counts.recomputed, counts.backward, counts.compiled) == (1, 1, 1, 0)
    assert counts.fallbacks == {"eval": 2}


@pytest.mark.parametrize("call", ["hit()", "hit(True)", "hit_backward()", "fall_back('eval')"])
def test_a_call_costs_less_than_2_microseconds(counts, call):
    best = min(timeit.repeat(f"counts.{call}", globals={"counts": counts}, number=20_000, repeat=7)) / 20_000
    assert best < 2e-6


class Counting(nn.Module):
    """Counts in every way that a patched forward and its op do, and reads the run-time switch."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def forward(self, x):
        if switch.stock_only():
            return x
        self.counts.hit()
        self.counts.hit(True)
        self.counts.hit_backward()
        self.counts.fall_back("compiling")
        self.counts.hit_compiled()
        self.counts.fall_back_compiled("traced")
        return x * 2


def test_compiled_forward_counts_once_without_graph_break_or_recompilation(counts):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = Counting(counts)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            assert compiled(torch.ones(2)).sum() == 4
            module(torch.ones(2))  # The eager counter moves between the calls.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # Traced once, run eagerly five times; hit_compiled and fall_back_compiled count whenever they are called.
    assert (counts.forward, counts.recomputed) == (5, 5)
    assert counts.compiled == 2 + 1 + 5
    assert counts.backward == 5 + 1
    assert counts.fallbacks == {"compiling": 6, "traced": 6}


def row(patch_id="llama.mlp", state="applied", reason="", fallbacks=None, modules=None, **numbers):
    counts = Tally(patch_id)
    for name, value in numbers.items():
        setattr(counts, name, value)
    counts.fallbacks = fallbacks or {}
    return Row(patch_id, "LlamaMLP.forward", state, reason, counts, modules)


def snapshot(*rows):
    environment = {"version": "1", "recompute": "full", "backend": "b", "versions": {"torch": "2", "peft": None}}
    return Status(rows, environment)


def test_require():
    fast = row(forward=3, backward=3)
    assert isinstance(snapshot(fast).require("llama.mlp"), Status)
    for slow, says in [
        (row(), "applied, but never called"),
        (row(forward=3), "forward was fast, but no backward ran"),
        (row(forward=3, recomputed=3), "no backward ran"),
        (row(fallbacks={"eval": 2, "dtype": 1}), r"ran stock: eval \(2x\), dtype \(1x\)"),
        (row(compiled=1), "only traced by torch.compile"),
        (row(state="declined", reason="conflict: Liger"), "declined: conflict: Liger"),
        (row(state="pending"), "pending"),
    ]:
        with pytest.raises(fup.NotFastError, match=f"llama.mlp: .*{says}"):
            snapshot(slow).require("llama.mlp")
    with pytest.raises(fup.NotFastError, match=r"llama\.loss: applied, but never called"):
        snapshot(fast, row("llama.loss")).require("llama")
    with pytest.raises(fup.UnknownPatchError, match=r"did you mean 'llama.mlp'"):
        snapshot(fast).require("llama.mpl")
    snapshot(row("llama.checkpointing", forward=2, recomputed=2)).require("llama.checkpointing")


def test_table_and_data():
    now = snapshot(row(forward=12, backward=7, recomputed=5, compiled=1, fallbacks={"eval": 2}), row("llama.loss"))
    text = str(now)
    assert "recompute: full" in text and "peft not found" in text and "12 + 1 compiled" in text and "eval: 2" in text
    assert "calls of a compiled forward are not counted" in text
    lines = text.splitlines()[3:6]
    assert len({line.index(cell) for line, cell in zip(lines, ("state", "applied", "applied"))}) == 1, "columns align"
    data = json.loads(json.dumps(now.to_dict()))
    assert data["rows"][0]["forward"] == 12 and data["rows"][0]["fallbacks"] == {"eval": 2}
    assert now["llama.mlp"].recomputed == 5
    assert now.line() == "fast_unsloth_patch 1: fast: llama.mlp; stock: llama.mlp (eval)"
    with pytest.raises(KeyError):
        now["no such row"]


def test_snapshot_does_not_move(counts):
    before = Row("test.counts", "", "applied", "", counts)
    counts.hit()
    counts.fall_back("eval")
    assert before.forward == 0 and before.fallbacks == {}


class Child(nn.Linear):
    pass


class Overriding(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_facts_of_a_model():
    model = nn.Sequential(nn.Linear(2, 2), Child(2, 2), Overriding(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    own = nn.Linear(2, 2)
    model[3].forward = types.MethodType(nn.Linear.forward, own)
    model[4].forward = functools.partial(other_forward, model[4])
    facts, reached = facts_of(model, [(nn.Linear, "x.linear")])
    assert reached == {"x.linear": 2}, "the plain one and the subclass that inherits"
    text = "\n".join(facts)
    assert "test_status.other_forward), which outranks the class (1x, first: 4)" in text
    assert "subclass whose forward (test_status.Overriding) replaces it (1x, first: 2)" in text
    assert "keep_stock" not in text
    fup.keep_stock(model[0])
    assert facts_of(model, [(nn.Linear, "x.linear")])[0][0] == "keep_stock: 1 of 7 modules keep stock forwards"
    assert "contains no module that a patch reaches" in facts_of(nn.ReLU(), [(nn.Linear, "x.linear")])[0][0]


def other_forward(module, x):
    return x


def test_keep_stock_marks_copies_and_no_state_dict():
    model = nn.Sequential(nn.Linear(2, 2))
    keys = list(model.state_dict())
    assert fup.keep_stock(model) is model
    assert list(model.state_dict()) == keys
    assert copy.deepcopy(model)[0].__dict__[switch.KEEP_STOCK_FLAG] is True


def test_disabled_is_per_thread_nests_and_survives_exceptions():
    seen = []
    with fup.disabled():
        assert switch.stock_only()
        with fup.disabled():
            pass
        assert switch.stock_only()
        thread = threading.Thread(target=lambda: seen.append(switch.stock_only()))
        thread.start()
        thread.join()
    assert seen == [False] and not switch.stock_only()
    with pytest.raises(OSError), fup.disabled():
        raise OSError
    assert not switch.stock_only()


def test_status_works_before_anything(monkeypatch):
    monkeypatch.setattr(install, "_state", install._State())
    now = fup.status()
    assert [r.id for r in now.rows] == [patch.id for patch in PATCHES]
    assert {(r.state, r.reason) for r in now.rows} == {("pending", "apply() has not been called")}


# A stand-in row whose replacement is an autograd Function, so that the line is tested without transformers.
STEP = """
import sys, types, torch
import fast_unsloth_patch as fup
from fast_unsloth_patch import install, registry
from fast_unsloth_patch.status import tally
module, builders = types.ModuleType("fakepack"), types.ModuleType("builders")
sys.modules.update(fakepack=module, builders=builders)
exec("class Norm:\\n    def forward(self, x):\\n        return x * 2\\n", vars(module))
counts = tally("fake.norm")
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, grad):
        counts.hit_backward()
        return grad * 2
def build(stock, tally):
    def forward(self, x):
        if not x.requires_grad:
            counts.fall_back("eval")
            return stock(self, x)
        counts.hit()
        return Double.apply(x)
    return forward
builders.build = build
registry.PATCHES = (registry.Patch("fake.norm", "fakepack", "Norm.forward", "builders:build"),)
fup.apply()
def step():
    x = torch.ones(2, requires_grad=True)
    module.Norm().forward(module.Norm().forward(x)).sum().backward()
    assert x.grad.tolist() == [4, 4]
"""

LINE = "fast_unsloth_patch 0.1.0: fast: fake.norm\n"


def test_one_line_after_the_first_fast_step(run_python, tmp_path):
    report = tmp_path / "report.json"
    code = STEP + "step()\nprint('after', file=sys.stderr)\nstep()\nstep()\n"
    done = run_python(code, env={"FAST_UNSLOTH_REPORT": report})
    assert done.returncode == 0 and done.stderr == LINE + "after\n", done.stderr
    data = json.loads(report.read_text())
    (only,) = data["rows"]
    assert (only["forward"], only["backward"], only["state"]) == (6, 6, "applied")


@pytest.mark.parametrize("variables", [{"FAST_UNSLOTH_LOG": "0"}, {"RANK": "1"}, {"LOCAL_RANK": "3"}])
def test_the_line_is_silent_when_told_and_on_other_ranks(run_python, tmp_path, variables):
    report = tmp_path / "report.txt"
    done = run_python(STEP + "step()\n", env={**variables, "FAST_UNSLOTH_REPORT": report})
    assert done.returncode == 0 and done.stderr == ""
    assert report.exists() == ("FAST_UNSLOTH_LOG" in variables), "only rank 0 writes"


def test_line_and_report_at_exit_if_no_backward_was_fast(run_python):
    code = STEP + "module.Norm().forward(torch.ones(2))\ncounts.fall_back('dtype')\n"
    done = run_python(code, env={"FAST_UNSLOTH_REPORT": "-"})
    assert done.stderr == "fast_unsloth_patch 0.1.0: fast: nothing; stock: fake.norm (eval, dtype)\n"
    assert "fake.norm  Norm.forward  applied" in done.stdout and "eval: 1, dtype: 1" in done.stdout


def test_evaluation_alone_says_nothing(run_python):
    done = run_python(STEP + "module.Norm().forward(torch.ones(2))\n")
    assert done.returncode == 0 and done.stderr == done.stdout == ""


def test_backward_called_by_hand_and_closed_stderr(run_python):
    code = STEP + "Double.backward(None, torch.ones(1))\nsys.stderr.close()\nsys.stderr = None\nstep()\nprint('ran')\n"
    done = run_python(code)
    assert done.returncode == 0 and done.stdout == "ran\n" and done.stderr == ""


def test_launchers_do_not_overwrite_the_report(run_python, tmp_path):
    report = tmp_path / "report.json"
    report.write_text("of the child")
    run_python("import fast_unsloth_patch", env={"FAST_UNSLOTH": "1", "FAST_UNSLOTH_REPORT": report})
    run_python("import fast_unsloth_patch as f; f.apply()", env={"FAST_UNSLOTH_REPORT": report})
    assert report.read_text() == "of the child"
