"""The benchmarks of Mixtral on a CPU: routing and load, adapters on experts, experts of four bits, floors, tables."""

from __future__ import annotations

import collections
import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# not left on the path: see test_benchmarks.py
sys.path.insert(0, str(BENCHMARKS))
try:
    checkpoint, experts, floor, quantised, records, report, setups, shapes, train_step, training = map(
        importlib.import_module,
        (
            "checkpoint", "experts", "floor", "quantised", "records", "report", "setups", "shapes", "train_step",
            "training",
        ),
    )  # fmt: skip
    kernels = importlib.import_module("kernels")
finally:
    sys.path.remove(str(BENCHMARKS))
    # or it would pass for Hugging Face's package of this name
    del sys.modules["kernels"]

TINY = {"model": "tiny-mixtral", "device": "cpu", "dtype": "fp32", "batch": 2, "seq": 32, "steps": 3, "warmup": 1}
TITLE = "Tiny-Mixtral LoRA on attention and experts, 2x32, checkpointing"
# elements of the adapters on a layer's four experts: r 16, hidden 64, intermediate 128
ON_EXPERTS = 4 * 16 * (64 + 2 * 128 + 128 + 64)
ON_ATTENTION = 16 * (2 * (64 + 64) + 2 * (64 + 32))


def _case(**fields):
    return shapes.Case(**TINY | fields)


def _run(folder, run_python, cases, **options):
    (folder / "plan.json").write_text(json.dumps({"defaults": TINY | {"checkpointing": True}, "cases": cases}))
    arguments = [BENCHMARKS / "train_step.py", "--plan", folder / "plan.json", "--json", folder / "out.json"]
    done = run_python(None, args=[*arguments, "--run", "r", "--ahead", "2"], timeout=300, **options)
    return done, json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    from conftest import run_python

    cases = [
        {"impls": ["stock", "unsloth", "fast"]},
        {"expert_lora": False, "impls": ["stock", "liger", "fast"]},
        {"routing": "random", "impls": ["fast", "stock"]},
    ]
    return _run(tmp_path_factory.mktemp("plan"), run_python, cases)


def _by_case(rows):
    return {(r["case"]["expert_lora"], r["case"]["routing"], r["label"]): r for r in rows if r["status"] == "ok"}


def test_every_case_runs_and_agrees_with_stock(outcome):
    done, results = outcome
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _by_case(results["rows"])
    assert {key for key in rows if key[2] in ("stock", "fast")} == {
        (lora, routing, impl)
        for lora, routing in ((True, "text"), (False, "text"), (True, "random"))
        for impl in ("stock", "fast")
    }
    for (lora, _, impl), row in rows.items():
        assert row["trainable"] == {"parameters": 2 * (ON_ATTENTION + lora * ON_EXPERTS), "dtypes": ["float32"]}
        if impl != "fast":
            continue
        assert row["parity"]["ok"] and row["parity"]["loss_max"] < 1e-5 and row["parity"]["grad_norm_max"] < 1e-4
        hits = {r["id"]: (r["forward"], r["fallbacks"]) for r in row["fast"]["rows"]}
        # two layers, four steps; the forward that counts the load is none
        assert hits["mixtral.moe"] == hits["mixtral.attention"] == hits["mixtral.decoder_layer"] == (8, {})
    losses = rows[True, "text", "stock"]["losses"]
    assert max(losses) - min(losses) > 1e-3
    # the adapters on experts are no decoration
    assert rows[False, "text", "stock"]["losses"] != pytest.approx(losses, rel=1e-5)
    absent = [row["label"] for row in results["rows"] if row["status"] == "absent"]
    assert "unsloth" in absent and set(absent) <= {"unsloth", "liger"}


def test_load_is_told_and_the_same_in_every_arm(outcome):
    done, results = outcome
    rows = _by_case(results["rows"])
    for (lora, routing, impl), row in rows.items():
        load = row["expert_load"]
        assert [sum(layer) for layer in load] == [128, 128]  # 64 tokens with two experts each
        assert load == rows[lora, routing, "stock"]["expert_load"]
        if impl == "fast":
            assert row["parity"]["load_moved"] == 0.0
        if routing == "random":
            assert load == [[32] * 4] * 2
        else:
            assert max(load[1]) > 2 * min(load[1])
    assert "smallest/mean/largest: 0: 32/32/32, 1: 32/32/32" in done.stdout
    assert "0 % of a layer's pairs at most go elsewhere than in stock" in done.stdout


def test_experts_have_a_table_of_their_own(outcome):
    _, results = outcome
    rows = _by_case(results["rows"])
    lines = [[cell.strip() for cell in line.split("|")] for line in report.render("experts", [results]).splitlines()]
    found = {(cells[1], cells[2]): cells for cells in lines if len(cells) > 3}
    cells = found[f"{TITLE}, random routing, fp32", "fast_unsloth_patch"]
    fast, stock = (rows[True, "random", impl] for impl in ("fast", "stock"))
    assert cells[3] == f"{fast['step_ms']['median']:.0f} ms"
    assert cells[5] == f"{fast['step_ms']['median'] / stock['step_ms']['median']:.2f}" and cells[6] == "-"
    assert cells[7] == f"{fast['losses'][0]:.4f}, {fast['losses'][-1]:.4f}" and cells[8] == "32/32/32"
    assert found[f"{TITLE}, fp32", "Unsloth"][3] == "absent"
    # also of a run with nothing to compare with
    alone = {"rows": [fast | {"case": fast["case"] | {"layers": 1}}], "floors": []}
    assert "1 of 2 layers" in report.render("experts", [alone]) and report.TABLES["steps"](alone) == ""
    dense = {"rows": [fast | {"case": fast["case"] | {"model": "tiny", "routing": "text"}}], "floors": []}
    assert report.TABLES["experts"](dense) == ""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    from conftest import run_python

    cases = [
        {"rounded": True, "impls": ["fast"]},
        {"mode": "qlora", "impls": ["fast"]},
        {"rounded": True, "expert_lora": False, "impls": ["stock"]},
        {"mode": "qlora", "expert_lora": False, "impls": ["fast"]},
    ]
    return _run(tmp_path_factory.mktemp("packed"), run_python, cases)


def test_experts_of_four_bits_have_the_losses_of_their_values(packed):
    done, results = packed
    assert done.returncode == 0, done.stdout + done.stderr
    dense, four, _, four_attention = results["rows"]
    assert "parity" not in dense
    assert four["parity"]["against"] == f"r, {TITLE}, weights rounded to NF4, fp32, fast"
    assert four_attention["parity"]["against"].endswith("weights rounded to NF4, fp32")
    for row in (four, four_attention):
        assert row["parity"]["ok"] and row["parity"]["loss_max"] < 1e-5 and row["parity"]["load_moved"] == 0.0
        hits = {r["id"]: (r["forward"], r["fallbacks"]) for r in row["fast"]["rows"]}
        assert hits["mixtral.moe"] == hits["mixtral.attention"] == (8, {})
    table = report.render("experts", [results])
    assert f"| {TITLE.replace('LoRA', 'QLoRA')}, fp32 | fast_unsloth_patch |" in table
    assert f"| {four['losses'][0]:.4f}, {four['losses'][-1]:.4f} |" in table
    assert f"| {dense['losses'][0]:.4f}, {dense['losses'][-1]:.4f} |" in table


def _model(build=True, **fields):
    case = _case(**fields)
    model = setups._build_stock(case, shapes.Arm("stock"), print)
    shapes.fill(model.train(), case)
    return model


def test_packed_experts_are_the_rounded_ones():
    pytest.importorskip("bitsandbytes")
    four, rounded, plain = _model(mode="qlora"), _model(rounded=True), _model()
    assert shapes.build_problem(four, _case(mode="qlora")) is None
    assert shapes.build_problem(rounded, _case(rounded=True)) is None
    assert shapes.build_problem(rounded, _case(mode="qlora")) == "packed weights: expected 12, found 0"
    values, before = dict(shapes.named_parameters(rounded)), dict(shapes.named_parameters(plain))
    stacks = 0
    for name, parameter in shapes.named_parameters(four):
        if quantised.is_stack(parameter):
            assert torch.equal(parameter.dequantize(), values[name])
            difference = (values[name] - before[name]).norm() / before[name].norm()
            assert 0.05 < difference < 0.12
            stacks += 1
        elif hasattr(parameter, "quant_state"):
            assert torch.equal(quantised.nf4_values(before[name]), values[name])
        else:
            assert torch.equal(parameter, values[name]) and torch.equal(parameter, before[name])
    assert stacks == 4


def test_packed_experts_are_overwritten_in_place():
    pytest.importorskip("bitsandbytes")
    model = _model(mode="qlora", layers=1)
    stack = next(p for p in model.parameters() if quantised.is_stack(p))
    packed, old = stack.packed, stack.dequantize()
    shapes.fill_weights(model, seed=1)
    assert stack.packed is packed and not torch.equal(stack.dequantize(), old)


def test_adapters_are_told_apart_by_the_stack_they_are_on():
    def only(*stacks):
        model = shapes.build("tiny-mixtral", layers=1, dtype=torch.float32, device="cpu")
        if stacks:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=16, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{s}" for s in stacks])
            model = get_peft_model(model, lora)
        shapes.fill_weights(model)
        return dict(shapes.named_parameters(model))

    both, down, plain = only("gate_up_proj", "down_proj"), only("down_proj"), only()
    adapters = {name for name in both if ".experts." in name and "lora_" in name}
    assert adapters == {f"model.layers.0.mlp.experts.{stack}.lora_{f}.weight" for stack in experts.STACKS for f in "AB"}
    assert plain.keys() < both.keys() and all(torch.equal(both[name], value) for name, value in plain.items())
    shared = [name for name in down if ".down_proj.lora_" in name]
    # with one stack fewer, another module has them
    assert len(shared) == 2 and all(torch.equal(both[name], down[name]) for name in shared)
    a, b = (both[f"model.layers.0.mlp.experts.{stack}.lora_A.weight"] for stack in experts.STACKS)
    assert not torch.equal(a[:, :64], b[:, :64]) and b.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.1)
    # no two experts are alike
    stack = both["model.layers.0.mlp.experts.down_proj"]
    assert len({tuple(e.flatten()[:4].tolist()) for e in stack}) == 4 and stack.std().item() == pytest.approx(
        0.02, rel=0.05
    )


def test_weights_are_those_of_before_training_again():
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    shapes.fill(model, _case(), trained=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] + (0.0 if parameter.requires_grad else 1.0)), name


def test_missing_adapters_are_a_problem():
    with_experts, attention = _model(), _model(expert_lora=False)
    assert shapes.build_problem(with_experts, _case()) is None
    assert shapes.build_problem(attention, _case(expert_lora=False)) is None
    expected = f"LoRA on experts: expected {2 * ON_EXPERTS:,} trainable elements, found 0 in 0 parameters"
    assert shapes.build_problem(attention, _case()) == expected
    found = f"LoRA on experts: expected 0 trainable elements, found {2 * ON_EXPERTS:,} in 8 parameters"
    assert shapes.build_problem(with_experts, _case(expert_lora=False)) == found
    with_experts.base_model.model.model.layers[0].mlp.experts.lora_B.requires_grad_(False)
    assert "found 61,440 in 7" in shapes.build_problem(with_experts, _case())


def test_a_wrong_guess_of_how_a_peer_is_told_is_a_failed_row(monkeypatch):
    """Whatever a peer makes of the request for LoRA on experts, it is looked at before anything is measured."""
    peer = setups.SETUPS["stock"]._replace(build=lambda *_: _model(expert_lora=False))
    monkeypatch.setitem(setups.SETUPS, "liger", peer)
    with pytest.raises(ValueError, match="LoRA on experts: expected 65,536"):
        training.build(_case(), shapes.Arm("liger"), training.Phases())


def _peer(monkeypatch, name, **functions):
    """A stand-in for a peer's package, and the keywords of all calls."""
    seen = collections.defaultdict(list)

    def recorded(function, result):
        return lambda *args, **keywords: seen[function].append(keywords) or result

    made = {function: recorded(function, result) for function, result in functions.items()}
    package = types.SimpleNamespace(**made, FastLanguageModel=types.SimpleNamespace(**made))
    monkeypatch.setitem(sys.modules, name, package)
    return seen


@pytest.mark.parametrize(("fields", "more"), [({}, experts.UNSLOTH_TARGETS), ({"expert_lora": False}, ())])
def test_unsloth_is_asked_for_adapters_on_experts(monkeypatch, tmp_path, fields, more):
    monkeypatch.chdir(tmp_path)
    seen = _peer(monkeypatch, "unsloth", from_pretrained=(None, None), get_peft_model="model")
    assert setups._build_unsloth(_case(**fields | {"dtype": "bf16"}), shapes.Arm("unsloth"), print) == "model"
    assert seen["get_peft_model"][0]["target_modules"] == [*shapes.ATTENTION_TARGETS, *more]
    assert not seen["from_pretrained"][0]["load_in_4bit"]
    seen["get_peft_model"].clear()
    setups._build_unsloth(_case(model="tiny", dtype="bf16"), shapes.Arm("unsloth"), print)
    assert seen["get_peft_model"][0]["target_modules"] == list(shapes.LORA_TARGETS)


def test_ligers_mixture_is_off_unless_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    names = {f"apply_liger_kernel_to_{family}": None for family in ("mixtral", "llama")}
    seen = _peer(monkeypatch, "liger_kernel.transformers", **names)
    sys.modules["liger_kernel"].transformers = sys.modules["liger_kernel.transformers"]
    for model, arm in (("tiny-mixtral", {}), ("tiny-mixtral", {"liger_moe": True}), ("tiny", {})):
        setups._import_liger(_case(model=model), shapes.Arm("liger", **arm))
    assert seen == {
        "apply_liger_kernel_to_mixtral": [{"swiglu": False}, {"swiglu": True}], "apply_liger_kernel_to_llama": [{}]
    }  # fmt: skip


def test_nobody_else_packs_experts(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: object())
    case = _case(mode="qlora", device="cuda")
    for impl in ("stock", "liger", "unsloth"):
        assert training.absent(case, shapes.Arm(impl)) == f"{impl} leaves experts in 16 bits under load_in_4bit"
    assert training.absent(case, shapes.Arm("fast")) is None
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert training.absent(_case(rounded=True), shapes.Arm("stock")) == "bitsandbytes is not installed"
    assert training.absent(_case(), shapes.Arm("stock")) is None


def test_hollow_checkpoint_of_a_mixture_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint.write_hollow_checkpoint("tiny-mixtral", tmp_path, layers=1)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any(parameter.any() for name, parameter in model.named_parameters() if "norm" not in name)
    shapes.fill_weights(model)
    ids = torch.tensor([shapes.text_tokens(512, 16)])
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model": "tiny", "expert_lora": False}, "tiny has no experts"),
        ({"model": "tiny", "routing": "random"}, "tiny has no experts"),
        ({"routing": "even"}, "routing='even' is none of"),
        ({"dropout": 0.1}, "PEFT has none for LoRA on experts"),
        ({"mode": "gptq"}, "GPTQ's experts"),
        ({"mode": "qlora", "rounded": True}, "not the weights of mode qlora"),
    ],
)
def test_a_case_that_cannot_be_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        _case(**fields)
    assert _case(dropout=0.1, expert_lora=False).dropout == 0.1


def test_options_make_the_case(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train_step, "run_plan", lambda plan, options: seen.extend(plan) or 0)
    options = ["--model", "mixtral-8x7b", "--layers", "4", "--impl", "fast", "--checkpointing"]
    assert train_step.main(options) == 0
    assert train_step.main([*options, "--attention-only", "--routing", "random", "--rounded"]) == 0
    titles = [case.title() for case, _ in seen]
    assert titles == [
        "Mixtral-8x7B LoRA on attention and experts, 4x2048, 4 of 32 layers, checkpointing",
        "Mixtral-8x7B LoRA on attention, 4x2048, 4 of 32 layers, checkpointing, random routing, weights rounded to NF4",
    ]
    assert report.floor_title(seen[0][0]) == titles[0]
    assert report.floor_title(shapes.Case("mixtral-8x7b", layers=4, checkpointing=True, expert_lora=False)) == titles[0]
    with pytest.raises(SystemExit):
        train_step.main(["--model", "llama-8b", "--routing", "random"])
    assert "llama-8b has no experts" in capsys.readouterr().err
    full = shapes.Case("mixtral-8x7b", "full").title()
    assert full == "Mixtral-8x7B full fine-tune, 4x2048, no checkpointing"


def test_random_routing_follows_from_the_token_alone():
    model, ids = _model(routing="random").eval(), shapes.text_tokens(512, 8 * 64)
    found = []
    for gate in experts.gates(model).values():
        gate.register_forward_hook(lambda module, args, output: found.append(output))
    tokens = torch.tensor(ids[128:192]).view(2, 32)
    model(input_ids=tokens)
    chosen = [experts.choices(ids, 64, 4, 2, layer) for layer in range(2)]
    assert chosen[0] != chosen[1] and len(found) == 2
    for (logits, weights, index), wanted in zip(found, chosen):
        assert index.sort().values.tolist() == [sorted(wanted[token]) for token in tokens.flatten().tolist()]
        # by far: what rounding or another step's weights change is nothing to it
        second, third = logits.topk(3, -1).values[:, 1:].unbind(-1)
        assert (second - third).min() > 1.0
        assert weights.min() > 0.2


@pytest.mark.parametrize(("tokens", "vocab"), [(8192, 32000), (512, 32000)])
def test_random_routing_is_even_in_the_batches_it_was_made_for(tokens, vocab):
    ids = shapes.text_tokens(vocab, experts.BATCHES * tokens)
    chosen = experts.choices(ids, tokens, 8, 2, layer=3)
    assert all(len(set(pair)) == 2 for pair in chosen.values())
    first = collections.Counter(e for token in ids[:tokens] for e in chosen[token])
    assert max(first.values()) - min(first.values()) <= 0.02 * tokens
    if tokens == 8192:
        loads = [
            collections.Counter(e for token in ids[start : start + tokens] for e in chosen[token])
            for start in range(0, len(ids), tokens)
        ]
        assert all(max(load.values()) < 1.4 * 2048 and min(load.values()) > 0.8 * 2048 for load in loads)


def test_random_routing_needs_room():
    model = shapes.build("tiny-mixtral", layers=17, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="17 gates for 17 layers, code of 68 elements"):
        experts.route_evenly(model, shapes.SHAPES["tiny-mixtral"], [1, 2], 2)


def test_load_is_that_of_the_first_call_of_each_gate():
    model = _model(layers=1).eval()
    ids = torch.tensor([shapes.text_tokens(512, 48)])
    with experts.counted(model) as found:
        model(input_ids=ids[:, :32])
        model(input_ids=ids)
    assert [load.sum().item() for load in found] == [64]
    assert not any(module._forward_hooks for module in model.modules())
    with experts.counted(model) as found:
        pass
    assert found == [] and not any(module._forward_hooks for module in model.modules())
    # a peer's gate may return something else
    gate = next(iter(experts.gates(model).values()))
    forward = gate.forward
    gate.forward = lambda hidden: (*forward(hidden), hidden)
    with experts.counted(model) as found:
        gate(torch.ones(3, 64))
    assert found == []
    assert report._load_lines({"expert_load": found}) == ["expert load: unknown, its gates do not tell it"]
    assert report._load_lines({}) == []


def _row(load, losses=(6.0, 5.0), impl="fast", run="r", label=None, status="ok", **case):
    return {"impl": impl, "label": label or impl, "status": status, "run": run, "case": vars(_case(**case)), "arm": {},
            "losses": list(losses), "grad_norms": [1.0, 1.0], "expert_load": load}  # fmt: skip


def test_another_load_is_no_parity():
    stock = _row([[500, 500], [300, 700]], impl="stock")

    def found(load, **case):
        return records.parity(_row(load, **case), stock | {"case": vars(_case(**case))})

    assert found([[500, 500], [300, 700]]) | {"load_moved": 0.0, "ok": True} == found([[500, 500], [300, 700]])
    assert found([[500, 500], [299, 701]])["ok"]
    # the worst layer counts, not the mean of them
    assert found([[500, 500], [297, 703]])["load_moved"] == pytest.approx(0.003)
    assert not found([[500, 500], [297, 703]])["ok"]
    assert found([[485, 515], [300, 700]], dtype="bf16")["ok"]
    assert not found([[475, 525], [300, 700]], dtype="bf16")["ok"]
    assert not found([[500, 500]])["ok"]
    # unknown: neither parity nor the lack of it
    assert "load_moved" not in found([]) and found([])["ok"]


@pytest.mark.parametrize(("routing", "dtype", "ok"), [
    ("text", "bf16", True), ("random", "bf16", False), ("text", "fp32", False),
])  # fmt: skip
def test_close_decisions_part_losses_of_sixteen_bits_only(routing, dtype, ok):
    stock = _row([], impl="stock", dtype=dtype, routing=routing)
    assert records.parity(_row([], losses=(6.0, 5.01), dtype=dtype, routing=routing), stock)["ok"] is ok
    assert not records.parity(_row([], losses=(6.0, 5.02), dtype=dtype, routing=routing), stock)["ok"]


def test_four_bits_are_held_against_the_same_values_in_sixteen():
    four = _case(mode="qlora")
    dense, other = _row([], rounded=True), _row([])
    assert records.baseline([other], four, "r") is None
    assert records.baseline([other, dense], four, "r") is dense
    variant = _row([], rounded=True, label="fast, recompute auto")
    assert records.baseline([variant], four, "r") is None
    stock = _row([], impl="stock", run="old", rounded=True)
    assert records.baseline([dense, stock], four, "r") is stock
    # of a case that stock can run, nothing but stock
    assert records.baseline([dense], _case(rounded=True), "r") is None
    fast = _row([], mode="qlora")
    records.add_parity([fast], [dense, fast])
    assert fast["parity"]["against"] == "r, Tiny-Mixtral LoRA on attention and experts, 2x32, no checkpointing, " + (
        "weights rounded to NF4, fp32, fast"
    )


def test_floor_has_the_products_of_the_real_load(tmp_path, capsys):
    loads = [[100, 20, 8, 0], [32, 32, 32, 32], [1, 2, 3, 122]]
    case = {"layers": 3, "checkpointing": True, "dtype": "bf16"}
    out = tmp_path / "out.json"
    older = _row([[128, 0, 0, 0]] * 3, run="older", **case)
    newest = _row(loads, run="newest", expert_lora=False, **case)
    # of another case, and of other tokens
    others = [_row([[8, 0, 0, 0]] * 3, **case | {"batch": 1}), _row([[64] * 4] * 3, run="other", **case)]
    records.save_results(out, {"rows": [older, newest, *others], "floors": []})
    arguments = ["--model", "tiny-mixtral", "--batch", "2", "--seq", "32", "--device", "cpu", "--layers", "3"]
    measured = []
    gemms = floor.Gemms("cpu")
    grouped = gemms.grouped
    gemms.grouped = lambda load, k, n, layout: measured.append((load, k, n, layout)) or grouped(load, k, n, layout)
    floor.record(_case(**case), gemms, str(out))
    assert measured == [
        (load, k, n, layout) for k, n in ((64, 256), (128, 64)) for layout in ("nt", "nn") for load in loads
    ]
    found = json.loads(out.read_text())["floors"][0]
    assert found["title"] == "Tiny-Mixtral LoRA on attention and experts, 2x32, 3 of 2 layers, checkpointing"
    assert found["expert_load"] == "the load of fast in run newest, 3 of 3 layers"
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["gate_up forward"]["flops"] == 2 * 128 * 64 * 256 and parts["down dX"]["flops"] == 2 * 128 * 64 * 128
    assert (parts["gate_up forward"]["calls"], parts["down dX"]["calls"], parts["o dX"]["calls"]) == (6, 3, 3)
    assert "gate_up dW" not in parts and found["without_last_gemm_ms"] < found["total_ms"]
    assert floor.main([*arguments, "--mode", "full", "--routing", "random"]) == 0
    printed = capsys.readouterr().out
    assert "experts: an even load" in printed and "gate_up dW" in printed


def test_floor_of_a_deep_model_measures_a_few_layers():
    loads = [[i, 128 - i, 0, 0] for i in range(32)]
    some, source = floor.expert_loads(_case(layers=32), [_row(loads, layers=32)])
    assert some == [loads[0], loads[8], loads[16], loads[24]] and source.endswith("4 of 32 layers")
    assert floor.expert_loads(_case(seq=33), [])[0] == [[33, 33, 33, 33]]
    assert experts.pairs_even(10, 4) == [3, 3, 2, 2]


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_grouped_products_of_the_floor_are_products(layout, monkeypatch):
    """What is timed computes what it says."""
    calls = []
    monkeypatch.setattr(floor, "time_ms", lambda given, device: [call() for call in given] and 1.0)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append((a.shape, b.shape, out.shape)) or out.copy_(a @ b))
    assert floor.Gemms("cpu").grouped([3, 0, 5], 16, 8, layout) == (1.0, "cpu")
    sizes = {
        "nt": lambda n: ((n, 16), (16, 8), (n, 8)), "nn": lambda n: ((n, 8), (8, 16), (n, 16)),
        "tn": lambda n: ((8, n), (n, 16), (8, 16)),
    }  # fmt: skip
    assert calls == [sizes[layout](n) for n in (3, 0, 5)]


def test_floor_of_packed_experts_moves_all_of_them():
    sizes = {"q": (64, 64), "k": (32, 64), "gate": (128, 64), "down": (64, 128)}
    moved = {name: quantised.packed_bytes("qlora", n, k) + 2 * n * k for name, (n, k) in sizes.items()}
    attention = 2 * moved["q"] + 2 * moved["k"]
    expected = 2 * (3 * (attention + 4 * 2 * moved["gate"]) + 2 * 4 * moved["down"])
    assert floor.dequantised_bytes(_case(mode="qlora", checkpointing=True)) == pytest.approx(expected)


def test_kernels_of_experts_are_measured(tmp_path, run_python):
    out = tmp_path / "out.json"
    names = ("gather", "combine", "gate_up_lora", "low_rank", "outer_b", "swiglu_backward", "block_lora")
    ops = ["swiglu", *(f"experts_{name}" for name in names)]
    arguments = ["--cpu", "--tiny", "--ops", ",".join(ops), "--json", out]
    done = run_python(None, args=[BENCHMARKS / "kernels.py", *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert all(row["ok"] for row in rows)
    models = {row["op"]: row["model"] for row in rows}
    assert models == {op: "tiny" if op == "swiglu" else "tiny-mixtral" for op in ops}
    product = [row for row in rows if row["op"] == "experts_gate_up_lora"]
    assert {row["impl"] for row in product} >= {"fast", "torch"}
    for row in product:
        # 16 tokens with two experts each
        assert row["rate"] * row["ms"] * 1e9 == pytest.approx(2 * 32 * 256 * 64 + 2 * 32 * 16 * 256)
    block = {row["direction"] for row in rows if row["op"] == "experts_block_lora"}
    assert block == {"forward", "backward"}


@pytest.mark.parametrize("op", ["experts_gather", "experts_combine", "experts_down_dx", "experts_swiglu_backward"])
def test_a_wrong_kernel_of_experts_is_found(op, monkeypatch):
    """The rows of two layouts are compared: a swapped row or a factor of 1.05 is seen."""
    torch.manual_seed(0)
    bench = kernels.EXPERT_OPS[op](shapes.SHAPES["tiny-mixtral"], 16, "cpu")
    errors = kernels.parity(bench)
    assert kernels.agrees(bench, errors["fast"], errors["torch"])
    if op == "experts_swiglu_backward":
        benches = sys.modules["benches_experts"]
        right = benches.weighted_swiglu_bwd
        monkeypatch.setattr(benches, "weighted_swiglu_bwd", lambda *operands: right(*operands) * 1.05)
        wrongs = [bench.impls["fast"]]
    else:
        wrongs = [lambda *t: bench.impls["fast"](*t) * 1.05, lambda *t: bench.impls["fast"](*t).flip(0)]
    for wrong in wrongs:
        assert not kernels.agrees(bench, (bench.errors(wrong),), errors["torch"])


def test_kernels_that_no_model_has_are_an_error(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--cpu", "--ops", "experts_gather", "--models", "tiny", "--tokens", "16"])
    assert "none of --ops" in capsys.readouterr().err


def test_noise_of_routing(run_python):
    """Two runs of the same code are equal on a CPU; each arm is as near to fp32 as bf16 is; fast is not stock again."""
    done = run_python(None, args=[BENCHMARKS / "routing_noise.py", "--cpu", "--tiny"])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {name: rest for name, *rest in (line.split(" | ") for line in done.stdout.splitlines() if " | " in line)}
    exact = float(re.search(r"loss in fp32 (\S+)", done.stdout)[1])
    for arm in ("stock", "stock, one by one", "fast"):
        loss, tokens, elsewhere, gradients = rows[arm]
        assert abs(float(loss) - exact) < 1e-3 and 0 < float(tokens) < 0.01 and 0 < float(gradients) < 0.02
        assert len(elsewhere.split(",")) == 2
    assert rows["again against stock"] == ["0.0e+00", "0.0e+00"]
    assert all(0 < float(difference) < 1e-2 for difference in rows["fast against stock"])
