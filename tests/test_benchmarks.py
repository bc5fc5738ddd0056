"""The benchmarks on a CPU: plans end to end, the order of their processes, parity, floors, the README's tables."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# not left on the path: `kernels.py` there would pass for Hugging Face's package `kernels`
sys.path.insert(0, str(BENCHMARKS))
try:
    floor, quantised, records, report, shapes, train_step, training = map(
        importlib.import_module, ("floor", "quantised", "records", "report", "shapes", "train_step", "training")
    )
    batches, checkpoint, setups = map(importlib.import_module, ("batches", "checkpoint", "setups"))
finally:
    sys.path.remove(str(BENCHMARKS))

TINY = {"model": "tiny", "device": "cpu", "dtype": "fp32", "batch": 2, "seq": 32, "steps": 3, "warmup": 1}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One plan of two cases, run once for all tests that look at it."""
    from conftest import run_python

    folder = tmp_path_factory.mktemp("plan")
    only_norms = {"impl": "fast", "label": "norms", "only": ["llama.rms_norm"], "rung": 1}
    stock = {"impl": "stock", "cold": True, "host": True, "profile": True}
    cases = [
        {"checkpointing": True, "impls": ["fast", "unsloth", only_norms, stock]},
        {"mode": "full", "impls": ["stock", "fast"]},
    ]
    (folder / "plan.json").write_text(json.dumps({"defaults": TINY, "cases": cases}))
    arguments = [BENCHMARKS / "train_step.py", "--plan", folder / "plan.json", "--json", folder / "out.json"]
    done = run_python(None, args=[*arguments, "--run", "first"], timeout=300)
    return done, json.loads((folder / "out.json").read_text()), folder


def test_plan_measures_every_arm(outcome):
    done, results, _ = outcome
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(r["label"], r["case"]["mode"], r["status"]) for r in results["rows"]] == [
        ("fast", "lora", "ok"), ("unsloth", "lora", "absent"), ("norms", "lora", "ok"), ("stock", "lora", "ok"),
        ("stock", "full", "ok"), ("fast", "full", "ok"),
    ]  # fmt: skip
    for row in results["rows"]:
        if row["status"] != "ok":
            continue
        assert len(row["losses"]) == len(row["grad_norms"]) == 4 and len(row["step_ms"]["all"]) == 3
        assert row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_ms"]["median"])
        assert row["first_step_s"] <= row["first_three_s"]
        assert {"torch", "transformers", "peft", "python"} <= set(row["versions"])
        assert row["device"] == "CPU" and row["run"] == "first" and row["source"]
        assert {"import", "wait", "build", "data", "steps"} <= set(row["phases"]) and not row["cuda_at_import"]
    looked_at = [row for row in results["rows"] if "host" in row or "profile" in row or row["cold"]]
    assert [(row["label"], row["case"]["mode"]) for row in looked_at] == [("stock", "lora")]
    assert looked_at[0]["host"]["backward_us_per_layer"] > 0
    assert looked_at[0]["profile"]["top"][0]["ms"] > 0 and looked_at[0]["profile"]["launches"] > 100


def test_workers_build_and_measure_one_at_a_time(outcome):
    _, results, _ = outcome
    clocks = [row["clock"] for row in results["rows"] if row["status"] == "ok"]  # the absent one did not wait
    assert len(clocks) == 5
    for before, clock in itertools.pairwise(clocks):
        assert before["end"] <= clock["go"]
        assert all(at >= clock["go"] for name, at in clock.items() if name not in ("start", "import"))


def test_fast_arms_agree_with_stock_and_ran_fast(outcome):
    _, results, _ = outcome
    by_label = {r["label"]: r for r in results["rows"] if r["case"]["mode"] == "lora"}
    for label in ("fast", "norms"):
        row = by_label[label]
        assert row["parity"]["ok"] and row["parity"]["loss_max"] < 1e-5
        hits = {r["id"]: r["forward"] for r in row["fast"]["rows"]}
        # two layers with two norms each and the last one; without the checkpointing patch the recompute counts too
        assert hits["llama.rms_norm"] == 4 * (5 if label == "fast" else 9)
        assert (label == "fast") == any(count for name, count in hits.items() if name != "llama.rms_norm")
    # the loss moves far more than it may differ
    losses = by_label["stock"]["losses"]
    assert max(losses) - min(losses) > 1e-3
    assert by_label["fast"]["trainable"] == by_label["stock"]["trainable"]


def test_absent_peer_has_its_reason(outcome):
    done, results, _ = outcome
    row = next(r for r in results["rows"] if r["label"] == "unsloth")
    assert row["reason"] in ("unsloth is not installed", "unsloth needs a CUDA device")
    assert f"absent: {row['reason']}" in done.stdout


def test_absent_peer_is_found_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    spec = {"case": TINY, "arm": vars(shapes.Arm("liger"))}
    found = train_step._work(spec, Path("unused"))
    assert found == {"status": "absent", "reason": "liger_kernel is not installed"}


def test_what_a_packed_mode_needs_is_named(monkeypatch):
    missing = ("bitsandbytes", "optimum")
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None if name in missing else object())

    def absent(mode, impl):
        return training.absent(shapes.Case(**TINY | {"mode": mode}), shapes.Arm(impl))

    assert absent("qlora", "stock") == "bitsandbytes is not installed"
    assert absent("gptq", "fast") == "optimum is not installed"
    assert absent("gptq", "unsloth") == "unsloth has no fast path for GPTQ"
    assert absent("lora", "fast") is None


def test_failure_is_a_row_with_the_end_of_the_log(outcome, run_python):
    _, _, folder = outcome
    flags = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    arguments = [*flags, "--checkpointing", "--impl", "fast", "--only", "llama.rmsnorm", "--json", folder / "out.json"]
    done = run_python(None, args=[BENCHMARKS / "train_step.py", *arguments])
    assert done.returncode == 1
    row = json.loads((folder / "out.json").read_text())["rows"][-1]
    assert row["status"] == "failed" and "UnknownPatchError" in row["reason"]
    assert "Traceback" in row["log_tail"]
    assert "FAILED Tiny LoRA" in done.stderr


def test_spent_budget_skips_and_fails(capsys):
    options = ["--impl", "stock", "--model", "tiny", "--device", "cpu", "--budget", "1"]
    assert train_step.main(options) == 1
    assert "skipped: no time left" in capsys.readouterr().out


def test_options_of_the_command_go_to_every_arm_of_a_plan(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(train_step, "run_plan", lambda plan, options: seen.append((plan, options.ahead)) or 0)
    (tmp_path / "plan.json").write_text(
        json.dumps({"cases": [{"seq": 8, "impls": ["stock"]}, {"impls": ["fast", {"impl": "liger", "cold": True}]}]})
    )
    arguments = ["--plan", str(tmp_path / "plan.json"), "--host"]
    assert train_step.main([*arguments, "--cases", "2", "--no-overlap"]) == train_step.main(arguments) == 0
    (chosen, not_ahead), (whole, ahead) = seen
    assert chosen == whole[1:] and whole[0][0].seq == 8 and (not_ahead, ahead) == (0, 1)
    assert [(arm.impl, arm.host, arm.cold, arm.profile) for arm in chosen[0][1]] == [
        ("fast", True, False, False), ("liger", True, True, False)
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        train_step.main([*arguments, "--cases", "3"])
    assert "the plan has the cases 1 to 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--impl", "stock,slow"])
    assert "unknown implementation slow; known: stock, fast, liger, unsloth" in capsys.readouterr().err


def _losses(losses, norms, impl="fast", run="r", status="ok", **case):
    return {"impl": impl, "status": status, "run": run, "case": {**vars(shapes.Case(**{**TINY, **case}))}, "arm": {},
            "losses": losses, "grad_norms": norms}  # fmt: skip


def test_parity_needs_every_number_to_agree():
    inf = float("inf")

    def ok(losses, norms, stock=(1.0, 1.0), **case):
        found = records.parity(_losses(losses, norms, **case), _losses([6.0, 5.0], list(stock), "stock", **case))
        assert found["against"] == "r"
        return found["ok"]

    assert ok([6.0, 5.0001], [1.0, 1.001])
    assert not ok([6.0, 5.01], [1.0, 1.0])
    assert not ok([6.0, float("nan")], [1.0, 1.0])
    assert not ok([6.0, 5.0], [1.001, 1.0])  # the first norm is before any update: rounding only
    assert not ok([6.0, 5.0], [1.0, 1.1])
    assert ok([6.0, 5.004], [1.009, 1.0], dtype="bf16")
    assert not ok([6.0, 5.006], [1.0, 1.0], dtype="bf16")
    assert not ok([6.0, 5.0], [1.0, 1.011], dtype="bf16")
    # a step that GradScaler skips has to be skipped in both
    assert ok([6.0, 5.0], [inf, 1.0], stock=(inf, 1.0), dtype="fp16")
    assert not ok([6.0, 5.0], [1.0, 1.0], stock=(inf, 1.0), dtype="fp16")
    assert not ok([6.0, 5.0], [inf, 1.0], dtype="fp16")


def test_parity_is_told_against_stock_of_the_same_run():
    fast = _losses([6.0, 5.0], [1.0, 1.0])
    old = _losses([6.0, 4.0], [1.0, 1.0], "stock", run="old")
    # nothing else is known yet; then stock comes later in the same run
    records.add_parity([fast], [old, fast])
    assert fast["parity"]["against"] == "old" and not fast["parity"]["ok"]
    records.add_parity([fast], [old, fast, _losses([6.0, 5.0], [1.0, 1.0], "stock"), old | {"run": "newer"}])
    assert fast["parity"]["against"] == "r" and fast["parity"]["loss_max"] == 0


def test_where_stock_does_not_fit_its_recompute_is_the_baseline():
    fast, oom = _losses([6.0, 5.0], [1.0, 1.0]), _losses([], [], "stock", status="oom")
    stock = _losses([6.0, 5.0], [1.0, 1.0], "stock", checkpointing=True)
    assert records.baseline([oom, fast], shapes.Case(**TINY), "r") is None
    records.add_parity([oom, fast], [stock, oom, fast])
    assert fast["parity"]["against"] == "r, Tiny LoRA, 2x32, checkpointing, fp32"
    assert train_step._problem(oom | {"reason": "x"}) is None
    assert train_step._problem(oom | {"impl": "fast", "reason": "x"}) == "oom: x"


def test_a_fast_row_without_hits_fails():
    patch = {"id": "llama.mlp", "state": "applied", "reason": "", "forward": 0, "fallbacks": {"device": 3}}
    other = patch | {"id": "llama.loss", "state": "declined", "reason": "not in only", "fallbacks": {}}
    row = {"impl": "fast", "status": "ok", "fast": {"rows": [patch, other]}}
    assert train_step._problem(row) == "no patch took its fast path; llama.mlp: device 3x"
    assert train_step._problem(row | {"fast": {"rows": [patch | {"forward": 1}]}}) is None
    assert train_step._problem(row | {"impl": "liger", "status": "oom", "reason": "x"}) is None


def test_weights_depend_on_the_name_only():
    import torch

    plain = shapes.build("tiny", layers=2, dtype=torch.float32, device="cpu")
    adapted = shapes.build("tiny", layers=1, dtype=torch.float32, device="cpu")
    adapted = shapes.add_lora(adapted, dropout=0.0, device="cpu")
    for model in (plain, adapted):
        shapes.fill_weights(model)
    expected = dict(plain.named_parameters())
    shared = 0
    for name, parameter in adapted.named_parameters():
        key = shapes.canonical_name(name)
        if "lora" in key:
            assert parameter.abs().sum() > 0 and parameter.dtype == torch.float32
        else:
            assert torch.equal(parameter, expected[key])
            shared += 1
    assert shared == 12  # seven projections, two norms; embedding, last norm, head


def test_hollow_checkpoint_loads(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint.write_hollow_checkpoint("tiny", tmp_path, layers=1)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    shapes.fill_weights(model)
    ids = torch.tensor([shapes.text_tokens(512, 16)])
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert len(AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids) == 3


def _packed_model(mode, dtype="fp32"):
    model = setups._build_stock(shapes.Case(**TINY | {"mode": mode, "dtype": dtype}), shapes.Arm("stock"), print)
    shapes.fill_weights(model.train())
    return model


def _four_bit_parameters(model):
    return {shapes.canonical_name(n): p for n, p in model.named_parameters() if hasattr(p, "quant_state")}


def test_packed_nf4_weights_are_those_of_the_dense_model_quantised():
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch
    from peft.tuners.lora.bnb import Linear4bit

    model, dense = _packed_model("qlora"), _packed_model("lora")
    assert shapes.build_problem(model, shapes.Case(**TINY | {"mode": "qlora"})) is None
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14
    packed = _four_bit_parameters(model)
    values = {shapes.canonical_name(name): p for name, p in dense.named_parameters()}
    others = {shapes.canonical_name(name): p for name, p in model.named_parameters()}
    assert others.keys() == values.keys() and len(packed) == 14
    for name, parameter in others.items():
        if name not in packed:
            assert torch.equal(parameter, values[name]), name
            continue
        state = parameter.quant_state
        assert (state.quant_type, state.blocksize, state.nested, parameter.dtype) == ("nf4", 64, True, torch.uint8)
        found = functional.dequantize_4bit(parameter.data, state)
        again = functional.dequantize_4bit(
            *functional.quantize_4bit(values[name].detach(), blocksize=64, compress_statistics=True, quant_type="nf4")
        )
        assert torch.equal(found, again)
        # four bits of a normal distribution
        assert (found - values[name]).norm() / values[name].norm() < 0.12
        tensors = parameter, state.absmax, state.state2.absmax
        assert quantised.packed_bytes("qlora", *state.shape) == pytest.approx(sum(t.nbytes for t in tensors), abs=4)


def test_packed_weights_do_not_depend_on_who_quantised_the_model(tmp_path):
    """As Unsloth gets its model: from a checkpoint that is a hole, quantised while it is loaded."""
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def loaded(**options):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
        )
        return shapes.add_lora(model, dropout=0.0, device="cpu")

    checkpoint.write_hollow_checkpoint("tiny", tmp_path, layers=None)
    model = loaded(bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    packed = _four_bit_parameters(model)
    before = {name: (p, p.data_ptr(), p.quant_state, p.quant_state.absmax) for name, p in packed.items()}
    shapes.fill_weights(model)
    ours = _packed_model("qlora", "bf16")
    wanted = _four_bit_parameters(ours)
    assert packed.keys() == wanted.keys() and len(packed) == 14
    for name, parameter in packed.items():
        state, other = parameter.quant_state, wanted[name].quant_state
        after = parameter, parameter.data_ptr(), state, state.absmax
        # whoever keeps one of these keeps the weight
        assert all(a is b or a == b for a, b in zip(before[name], after))
        pairs = (parameter, wanted[name]), (state.absmax, other.absmax), (state.offset, other.offset)
        assert all(torch.equal(a, b) for a, b in (*pairs, (state.state2.absmax, other.state2.absmax)))
        # as loading makes it, although our model is built with another default dtype
        codes = state.code, other.code, state.state2.code, other.state2.code
        assert {code.dtype for code in codes} == {torch.float32}
    ids = torch.tensor([shapes.text_tokens(512, 16)])
    assert torch.equal(model.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)

    with pytest.raises(ValueError, match=r"layers\.0\S+weight: double quantisation: expected True, found False"):
        shapes.fill_weights(loaded(bnb_4bit_use_double_quant=False))


GPTQ = """
import sys; sys.path.insert(0, {benchmarks!r})
import setups, shapes
sys.path.pop(0)
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
case = shapes.Case(mode="gptq", model="tiny", device="cpu", dtype="bf16")
models = [setups._build_stock(case, shapes.Arm("stock"), print).train() for _ in range(2)]
for model in models:
    before = [(m, m.qweight, m.scales) for m in model.modules() if hasattr(m, "g_idx")]
    shapes.fill_weights(model)
    assert all(m.qweight is q and m.scales is s for m, q, s in before)
    assert shapes.build_problem(model, case) is None
    assert sum(type(m) is GPTQLoraLinear for m in model.modules()) == len(before) == 14
found = [{{n: m for n, m in model.named_modules() if hasattr(m, "g_idx")}} for model in models]
spread = []
for name, module in found[0].items():
    weight = module.dequantize_weight()
    assert torch.equal(weight, found[1][name].dequantize_weight()), name
    spread.append((weight.mean().item(), weight.float().std().item(), weight.unique().numel()))
# no two weights are alike
assert len({{m.qweight[0, :8].tolist().__repr__() for m in found[0].values()}}) == 14
assert {{p.dtype for p in models[0].parameters() if p.requires_grad}} == {{torch.float32}}
assert all(abs(mean) < 1e-3 and abs(std - 0.02) < 1e-3 and kinds > 100 for mean, std, kinds in spread), spread
"""
needs_gptqmodel = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


@needs_gptqmodel
def test_packed_gptq_weights_are_about_normal_and_the_same(run_python):
    """In a process of its own: gptqmodel replaces functions of other libraries."""
    done = run_python(GPTQ.format(benchmarks=str(BENCHMARKS)), env={"GPTQMODEL_DISABLE_PACK_EXT": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_dense_model_in_a_packed_mode_is_found():
    model = _packed_model("lora")
    case = shapes.Case(**TINY)
    assert shapes.build_problem(model, case) is None
    problem = shapes.build_problem(model, shapes.Case(**TINY | {"mode": "qlora"}))
    assert problem == "packed weights: expected 14, found 0"


@pytest.mark.parametrize("mode", ["qlora", pytest.param("gptq", marks=needs_gptqmodel)])
def test_packed_modes_end_to_end(mode, tmp_path, run_python):
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    (tmp_path / "plan.json").write_text(
        json.dumps({"cases": [TINY | {"mode": mode, "checkpointing": True, "impls": ["stock", "fast", "unsloth"]}]})
    )
    out = tmp_path / "out.json"
    done = run_python(
        None, args=[BENCHMARKS / "train_step.py", "--plan", tmp_path / "plan.json", "--json", out], timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stock, fast, unsloth = json.loads(out.read_text())["rows"]
    assert unsloth["status"] == "absent" and (mode == "qlora" or "no fast path for GPTQ" in unsloth["reason"])
    assert fast["parity"]["ok"] and fast["parity"]["loss_max"] < 1e-5
    assert max(stock["losses"]) - min(stock["losses"]) > 1e-3
    hits = {row["id"]: (row["forward"], row["fallbacks"]) for row in fast["fast"]["rows"]}
    # two layers, four steps
    assert hits["llama.attention"] == hits["llama.mlp"] == (8, {})
    assert fast["trainable"] == stock["trainable"] and fast["trainable"]["dtypes"] == ["float32"]
    titles = {"qlora": "Tiny QLoRA, 2x32", "gptq": "Tiny LoRA on GPTQ, 2x32"}
    assert f"{titles[mode]}, checkpointing, fp32" in done.stdout


def test_dequantisation_kernels_are_measured_once_a_model(tmp_path, run_python):
    out = tmp_path / "out.json"
    arguments = ["--cpu", "--tiny", "--ops", "nf4_qkv,gptq_gate_up,swiglu", "--json", out]
    done = run_python(None, args=[BENCHMARKS / "kernels.py", *arguments])
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(out.read_text())["kernels"] if row["op"] != "swiglu"]
    measured = sorted((row["op"], row["impl"]) for row in rows if row["impl"] != "bnb")
    assert measured == [(op, impl) for op in ("gptq_gate_up", "nf4_qkv") for impl in ("fast", "torch")]
    assert all(row["tokens"] == 0 and row["errors"] == [0.0] and row["ok"] for row in rows)
    gptq = next(row for row in rows if row["op"] == "gptq_gate_up")
    # two weights 128 x 64: half a byte and two bytes a value, one group a column with its scale and its zero point
    assert gptq["rate"] * gptq["ms"] * 1e6 == pytest.approx(2 * (128 * 64 * 2.5 + 128 * 2.5))


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-1b", 1.236), ("llama-8b", 8.030), ("mistral-7b", 7.242), ("mixtral-8x7b", 46.703)]
)
def test_shapes_have_the_published_sizes(name, billions):
    import torch

    model = shapes.build(name, layers=None, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_floor_counts_the_whole_step(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--batch", "1", "--seq", "16", "--device", "cpu", "--mode", "full"]
    assert floor.main([*arguments, "--checkpointing", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["floors"][0]
    calls = {part["name"]: part["calls"] for part in found["parts"]}
    # two layers: forward twice with the recompute, dX and dW once; the head is not recomputed
    assert calls["down forward"] == calls["attention forward"] == 4
    assert calls["down dX"] == calls["down dW"] == calls["attention backward"] == 2
    assert calls["lm_head forward"] == calls["lm_head dW"] == 1
    assert found["total_ms"] == pytest.approx(sum(part["calls"] * part["ms"] for part in found["parts"]))
    assert found["without_last_gemm_ms"] < found["total_ms"]
    down = next(part for part in found["parts"] if part["name"] == "down forward")
    assert down["flops"] == 2 * 16 * 64 * 128
    assert "floor" in capsys.readouterr().out


def test_floor_of_packed_weights_tells_their_dequantisation(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--batch", "1", "--seq", "16", "--device", "cpu", "--mode", "qlora"]
    assert floor.main([*arguments, "--checkpointing", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["floors"][0]
    # a weight is read with half a byte a value and its scales, and written with two
    layer = {n: n * (2.5 + (1 + 4 / 256) / 64) for n in (64 * 64, 32 * 64, 128 * 64)}
    once, last = 2 * layer[64 * 64] + 2 * layer[32 * 64] + 2 * layer[128 * 64], layer[128 * 64]
    moved = 2 * (3 * once + 2 * last)
    assert found["dequantize_ms"] == pytest.approx(moved / found["copy_gb_s"] / 1e6)
    assert "+ dequantisation" in capsys.readouterr().out
    # the GEMMs are those of LoRA
    assert not [part for part in found["parts"] if "dW" in part["name"]]
    case = shapes.Case(**{**TINY, "batch": 1, "seq": 16, "mode": "qlora", "checkpointing": True, "dtype": "bf16"})
    rows = [_result(impl, 1000, case=vars(case)) for impl in ("stock", "fast")]
    table = report.render("steps", [{"rows": rows, "floors": [found | {"total_ms": 563.2, "dequantize_ms": 11.2}]}])
    assert "| 563 ms + 11 dequantisation |" in table


def test_floors_of_a_plan_are_measured_once_each(tmp_path):
    tiny = {key: TINY[key] for key in ("model", "device", "batch", "seq")}
    cases = [{"impls": ["stock"]}, {"dropout": 0.1, "impls": ["fast"]}, {"checkpointing": True, "impls": ["fast"]}]
    (tmp_path / "plan.json").write_text(json.dumps({"defaults": tiny, "cases": cases}))
    out = tmp_path / "out.json"
    assert floor.main(["--plan", str(tmp_path / "plan.json"), "--json", str(out)]) == 0
    titles = [found["title"] for found in json.loads(out.read_text())["floors"]]
    assert titles == ["Tiny LoRA, 2x32, no checkpointing", "Tiny LoRA, 2x32, checkpointing"]


def test_floor_counts_what_is_no_padding_and_inside_documents(tmp_path):
    tiny = {key: TINY[key] for key in ("device", "batch", "seq")}
    cases = [
        {"model": "tiny", "padding": 0.4, "impls": []},
        {"model": "tiny", "packed": 4, "impls": []},
        {"model": "tiny-mistral", "impls": []},
    ]
    (tmp_path / "plan.json").write_text(json.dumps({"defaults": tiny, "cases": cases}))
    out = tmp_path / "out.json"
    assert floor.main(["--plan", str(tmp_path / "plan.json"), "--json", str(out)]) == 0
    padded, packed, windowed = json.loads(out.read_text())["floors"]
    assert padded["title"] == "Tiny LoRA, 2x32, 40 % padding, no checkpointing"
    assert packed["title"] == "Tiny LoRA, 2x32, 4 documents a row, no checkpointing"

    def flops(found, name):
        return next(part["flops"] for part in found["parts"] if part["name"] == name)

    # 64 tokens, 38 of them no padding, in rows of 32 and 6
    assert flops(padded, "down forward") == 2 * 38 * 64 * 128 and flops(packed, "down forward") == 2 * 64 * 64 * 128
    heads = 4 * 16  # and their size
    assert flops(padded, "attention forward") == 4 * heads * (32**2 + 6**2) / 2
    assert flops(packed, "attention forward") == 4 * heads * 8 * 8**2 / 2
    # a window of 12: a triangle, then twelve for each token
    assert flops(windowed, "attention backward") == pytest.approx(2.5 * 4 * heads * 2 * (12 * 32 - 12 * 12 / 2))


def test_attention_of_the_floor_is_what_the_formula_says():
    import torch

    shape = shapes.SHAPES["tiny-mistral"]
    _, (q, k, v), forward = floor._one_by_one(shape, [20, 7], 12)
    q, k, v = (t.detach().double() for t in (q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)))
    at = torch.arange(27)
    same = (at[:, None] < 20) == (at < 20)
    back = at[:, None] - at
    mask = same & (back >= 0) & (back < 12)
    want = torch.softmax((q @ k.mT / 4).masked_fill(~mask, -torch.inf), -1) @ v
    assert (forward() - want).norm() / want.norm() < 1e-2


def _result(impl, ms, run="b", **fields):
    case = shapes.Case(checkpointing=True)
    row = {"impl": impl, "label": impl, "run": run, "status": "ok", "cold": False, "case": case.__dict__, "arm": {}}
    row |= {"step_ms": {"median": ms}, "allocated_gib": ms / 40, "first_three_s": ms / 300}
    row |= {
        "versions": {"torch": "2.11.0"},
        "device": "NVIDIA H200",
        "date": "2026-11-25",
        "commit": "abc",
        "source": "",
    }
    return row | fields


def _parity(ok=True):
    return {"loss_max": 1e-4, "grad_norm_first": 2e-4, "grad_norm_max": 3e-4, "ok": ok}


@pytest.fixture
def written(tmp_path):
    """A README and a results folder: an older run, a newer one with a ladder, a rerun without stock."""
    rows = [
        _result("stock", 2000, run="a"),
        _result("stock", 1026),
        _result("fast", 640, parity=_parity()),
        _result("fast", 700, label="norms", arm={"rung": 1}, parity=_parity()),
        _result("liger", 874, parity=_parity(ok=False)),
        _result("unsloth", 0, status="absent", reason="not installed"),
        _result("fast", 900, cold=True, parity=_parity()),
        _result("fast", 1, run="c"),
    ]
    floors = [{"title": report.floor_title(shapes.Case(checkpointing=True)), "total_ms": 563.2}]
    results = tmp_path / "results"
    records.save_results(results / "h200.json", {"rows": rows, "floors": floors})
    readme = tmp_path / "README.md"
    markers = [f"<!-- results:begin {name} -->\nold\n<!-- results:end {name} -->" for name in report.TABLES]
    readme.write_text("# Title\n" + "\n\ntext\n\n".join(markers) + "\nend\n")
    return readme, results


def test_readme_tables_come_from_the_results(written):
    readme, results = written
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nend\n") and "old" not in text
    # the newest run with a stock row: neither the older one nor the rerun of fast alone
    steps = "| 1026 ms, 25.6 GiB | 640 ms, 16.0 GiB | 874 ms, 21.9 GiB (parity off) | absent | 563 ms |"
    assert steps in text
    assert "| fast_unsloth_patch | 1.0e-04 | 2.0e-04 | 3.0e-04 |" in text
    assert "| - | 3.0 s | - | - |" in text
    assert "NVIDIA H200, 2026-11-25, torch 2.11.0; commit abc" in text
    ladder = text[text.index("begin ladder") :]
    names = [line.split("|")[1].strip() for line in ladder.splitlines() if line.startswith("| ")]
    assert names[1:] == ["stock", "Liger", "norms", "fast_unsloth_patch", "floor"]
    assert (results / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_readme_with_a_wrong_marker_is_an_error():
    with pytest.raises(ValueError, match="known are steps"):
        report.update("<!-- results:begin speed -->\n<!-- results:end speed -->", [])
    with pytest.raises(ValueError, match="without <!-- results:end steps -->"):
        report.update("<!-- results:begin steps -->", [])
    empty = report.update("<!-- results:begin steps -->\n<!-- results:end steps -->", [])
    assert "No results recorded yet." in empty


PLANS = sorted((BENCHMARKS / "plans").glob("issue*.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_can_be_run_and_reported(path, tmp_path):
    from fast_unsloth_patch import registry

    plan = shapes.read_plan(path)
    known = {patch.id for patch in registry.PATCHES}
    rows, floors = [], []
    for case, arms in plan:
        # Of one implementation is what another case of its run is held against, or what nobody else can run.
        impls = [arm.impl for arm in arms]
        assert len(set(impls)) > 1 or (impls == ["fast"] and (case.layers or shapes.SHAPES[case.model].experts))
        assert len({arm.name() for arm in arms}) == len(arms)
        for number, arm in enumerate(arms):
            assert arm.impl in setups.SETUPS and set(arm.only or ()) | set(arm.exclude) <= known
            fields = {"label": arm.name(), "case": vars(case), "arm": vars(arm), "cold": arm.cold, "losses": [6.0, 5.0]}
            if arm.host:
                fields["host"] = {"forward_us_per_layer": 50.0, "backward_us_per_layer": 90.0}
            if arm.impl == "stock" and not case.checkpointing:
                fields |= {"status": "oom", "reason": "x"}
            rows.append(_result(arm.impl, 1000 - number, **fields) | {"parity": _parity()})
        floors.append({"title": report.floor_title(case), "total_ms": 500.0})
    document = {"rows": rows, "floors": floors}
    for name in report.TABLES:
        table = report.render(name, [document])
        shown = [case.title() for case, arms in plan if name in ("steps", "parity") and len(arms) > 1]
        shown += [case.title() for case, _ in plan if name == "experts" and shapes.SHAPES[case.model].experts]
        assert all(f"| {title} |" in table for title in shown)
    refused = any(r["status"] == "oom" for r in rows)
    assert ("| out of memory | " in report.render("steps", [document])) == refused
    arms = {arm.name(): arm for arm in plan[0][1]}
    if not any(arm.rung for arm in arms.values()):
        assert report.ladder_rows(document) is None and not report.draw_ladder(document, tmp_path / "ladder.png")
        return
    title, ladder = report.ladder_rows(document)
    assert title == plan[0][0].title()
    rungs = sorted((arm for arm in arms.values() if arm.rung), key=lambda arm: arm.rung)
    assert [row["label"] for row in ladder] == ["stock", "liger", "unsloth", *(r.label for r in rungs), "fast"]
    assert report.draw_ladder(document, tmp_path / "ladder.png")


def test_rows_of_a_padded_case_vary_and_their_sum_does_not():
    case = shapes.Case(batch=4, seq=2048, padding=0.5)
    first, second = batches.lengths(case, 0), batches.lengths(case, 1)
    assert sorted(first) == sorted(second) == [341, 683, 1024, 2048] and first != second
    assert batches.documents(case, 1) == second
    for share in (0.01, 0.3, 0.7):
        found = batches.lengths(shapes.Case(batch=4, seq=64, padding=share))
        assert sum(found) == round(256 * (1 - share)) and max(found) == 64 and min(found) > 0
    assert batches.lengths(shapes.Case(batch=2, seq=64, padding=0.25)) == [64, 32]
    assert batches.documents(shapes.Case(batch=2, seq=64, packed=4)) == [16] * 8


@pytest.mark.parametrize(
    "fields",
    [{"packed": 5}, {"packed": 4, "padding": 0.5}, {"padding": 0.5, "batch": 1}, {"padding": 0.5}, {"packed": -1}],
)
def test_a_case_that_cannot_be_is_refused(fields, capsys, tmp_path):
    # half of two rows is the whole of one: the longest row has no padding
    with pytest.raises(ValueError, match=r"packed=|padding="):
        shapes.Case(**TINY | fields)
    flags = [word for key, value in (TINY | fields).items() if key != "steps" for word in (f"--{key}", str(value))]
    with pytest.raises(SystemExit):
        train_step.main(flags)
    assert "=" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text(json.dumps({"cases": [{"impls": [{"impl": "fast", "feed": "apart"}]}]}))
    with pytest.raises(ValueError, match="feed 'apart' is none of"):
        shapes.read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("model", ["tiny", "tiny-mistral"])
def test_every_form_of_the_same_tokens_has_stocks_loss(model):
    """Also beyond the sliding window of 12; and what crosses documents would be seen."""
    import torch

    def losses(case, feed):
        trained = shapes.build(model, layers=None, dtype=torch.float32, device="cpu")
        shapes.fill_weights(trained)
        steps = batches.Batches(case, shapes.Arm("stock", feed=feed), 2)
        assert steps.tokens == (case.batch * case.seq if feed == "full" else sum(batches.documents(case)))
        return [trained(**steps[i]).loss.item() for i in range(len(steps))]

    tiny = {**TINY, "model": model, "seq": 48}
    packed, padded = shapes.Case(**tiny, packed=3), shapes.Case(**tiny, padding=0.3)
    plain = losses(shapes.Case(**tiny), "")
    assert losses(packed, "") == pytest.approx(losses(packed, "apart"), rel=1e-6)
    assert losses(padded, "") == pytest.approx(losses(padded, "flat"), rel=1e-6)
    assert losses(padded, "full") == plain
    for case in (packed, padded):
        assert losses(case, "") != pytest.approx(plain, rel=1e-4)


def test_inputs_are_those_of_the_collators():
    import torch
    from transformers import DataCollatorWithFlattening

    case = shapes.Case(**TINY, padding=0.3)
    padded = batches.Batches(case, shapes.Arm("fast"), 2)[1]
    assert set(padded) == {"input_ids", "attention_mask", "labels"}
    assert padded["attention_mask"].sum(1).tolist() == batches.lengths(case, 1)
    assert torch.equal(padded["labels"] == -100, padded["attention_mask"] == 0)
    rows = [
        {"input_ids": ids[mask.bool()].tolist()} for ids, mask in zip(padded["input_ids"], padded["attention_mask"])
    ]
    want = DataCollatorWithFlattening()(rows)
    for impl, more in (("stock", set()), ("unsloth", {"packed_seq_lengths"})):
        flat = batches.Batches(case, shapes.Arm(impl, feed="flat"), 2)[1]
        assert set(flat) == {"input_ids", "position_ids", "labels"} | more
        for name in ("input_ids", "position_ids", "labels"):
            assert torch.equal(flat[name], torch.as_tensor(want[name]))
    assert flat["packed_seq_lengths"].tolist() == batches.lengths(case, 1)
    packed = batches.Batches(shapes.Case(**TINY, packed=4), shapes.Arm("fast"), 1)[0]
    assert set(packed) == {"input_ids", "position_ids", "labels"}
    assert packed["position_ids"].tolist() == [list(range(8)) * 4] * 2
    assert torch.equal(packed["labels"] == -100, packed["position_ids"] == 0)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Packed and padded rows and every policy of recomputing, by both families."""
    from conftest import run_python

    folder = tmp_path_factory.mktemp("forms")
    policies = [{"impl": "fast", "label": policy, "recompute": policy} for policy in ("auto", "offload")]
    apart, flat, full = (
        {"impl": "fast", "label": label, "feed": feed}
        for label, feed in (("rows", "apart"), ("flat", "flat"), ("full rows", "full"))
    )
    cases = [
        {"packed": 2, "checkpointing": True, "impls": ["stock", "fast", apart]},
        {"padding": 0.3, "model": "tiny-mistral", "impls": ["stock", "fast", flat, full]},
        {"model": "tiny-mistral", "checkpointing": True, "impls": ["stock", *policies]},
    ]
    (folder / "plan.json").write_text(json.dumps({"defaults": TINY, "cases": cases}))
    arguments = ["--plan", folder / "plan.json", "--json", folder / "out.json", "--run", "r", "--ahead", "2"]
    done = run_python(None, args=[BENCHMARKS / "train_step.py", *arguments], timeout=300)
    return done, json.loads((folder / "out.json").read_text())


def test_packed_and_padded_rows_end_to_end(forms):
    done, results = forms
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["label"] for row in rows if "parity" not in row and row["impl"] != "stock"] == ["full rows"]
    assert all(row["parity"]["ok"] and row["parity"]["loss_max"] < 1e-5 for row in rows if "parity" in row)
    fast = {(row["case"]["packed"], row["case"]["padding"], row["label"]): row for row in rows if row["impl"] == "fast"}
    packing = {
        key: sum(r["forward"] for r in row["fast"]["rows"] if r["id"].endswith(".packing")) for key, row in fast.items()
    }
    # four steps of variable-length attention where documents or padding ask for it
    assert packing[2, 0.0, "fast"] == packing[0, 0.3, "fast"] == packing[0, 0.3, "flat"] == 4
    assert packing[2, 0.0, "rows"] == packing[0, 0.3, "full rows"] == packing[0, 0.0, "auto"] == 0
    assert fast[0, 0.3, "flat"]["tokens"] == 45 and fast[0, 0.3, "full rows"]["tokens"] == 64
    for title in (
        "Tiny LoRA, 2x32, 2 documents a row, checkpointing, fp32",
        "Tiny-Mistral LoRA, 2x32, 30 % padding, no checkpointing, fp32",
    ):
        assert f"{title}: fast\n" in done.stdout
        assert f"| {title} | fast_unsloth_patch | " in report.render("arms", [results])


def test_policies_of_recomputing_end_to_end(forms):
    done, results = forms
    rows = {
        row["arm"]["recompute"]: row
        for row in results["rows"]
        if row["impl"] == "fast" and row["label"] in ("auto", "offload")
    }
    assert all(row["parity"]["ok"] and row["parity"]["loss_max"] < 1e-5 for row in rows.values())
    for policy, row in rows.items():
        assert row["fast"]["recompute"] == policy and row["fast"]["recompute_choice"]
        assert f"recompute {policy}: {row['fast']['recompute_choice']}" in done.stdout
    # it has to be the same three times before anything is measured
    assert rows["auto"]["warmup"] == 3 and rows["auto"]["settled"] and rows["offload"]["warmup"] == 1


@pytest.mark.parametrize(
    ("choices", "warmup", "settled"),
    [("abcddd", 6, True), ("aaa", 3, True), ("ab" * 20, 1 + train_step.SETTLING, False)],
)
def test_a_policy_that_chooses_is_measured_when_it_has_chosen(monkeypatch, choices, warmup, settled):
    class Trainer:
        losses, grad_norms = (), ()

        def timed(self, inputs):
            given.append(inputs)
            return 1.0 if len(given) <= warmup else 0.5

    given, said = [], iter(choices)
    monkeypatch.setattr(training, "fast_status", lambda: {"recompute_choice": next(said)})
    case, arm = shapes.Case(**TINY), shapes.Arm("fast", recompute="auto")
    steps = batches.Batches(case, arm, 1 + 3 + train_step.SETTLING)
    found = train_step._measure(Trainer(), steps, training.Phases())
    assert (found["warmup"], found["settled"], len(given)) == (warmup, settled, warmup + 3)
    assert found["step_ms"]["all"] == [500.0] * 3 and found["first_step_s"] == 1.0


def test_losses_are_held_against_stock_however_far_it_went():
    fast = _losses([6.0, 5.0, 4.0], [1.0] * 3, steps=2)
    stock = _losses([6.0, 5.0], [1.0] * 2, "stock", run="old", steps=1)
    records.add_parity([fast], [stock, fast])
    assert fast["parity"]["ok"] and fast["parity"]["against"] == "old"
    other = _losses([6.0, 5.0], [1.0] * 2)
    records.add_parity([other], [_losses([6.0, 5.0], [1.0] * 2, "stock", packed=2), other])
    assert "parity" not in other
    full = _losses([3.0], [1.0]) | {"arm": {"feed": "full"}}
    records.add_parity([full], [stock, full])
    assert "parity" not in full


def test_a_newer_run_without_a_ladder_does_not_hide_it():
    ladder = [_result("stock", 1026, run="a"), _result("fast", 700, run="a", label="norms", arm={"rung": 1}, cold=True)]
    cold = _result("fast", 800, run="a", cold=True, first_three_s=9.0)
    newer = [_result("stock", 1000), _result("fast", 500)]
    auto = _result("fast", 400, label="auto", tokens_per_s=8192 / 0.4)
    document = {"rows": [*ladder, cold, *newer, auto], "floors": []}
    assert "| 1000 ms, 25.0 GiB | 500 ms, 12.5 GiB |" in report.render("steps", [document])
    assert "| norms | 700 ms | 17.5 GiB |" in report.render("ladder", [document])
    assert "| 9.0 s |" in report.render("start", [document])
    arms = report.render("arms", [document])
    assert "| auto | 400 ms | 10.0 GiB | 20480 |" in arms and "norms" not in arms
    assert report.TABLES["arms"]({"rows": [*ladder, cold], "floors": []}) == ""
