"""Mixtral on two ranks (gloo, CPU) under DDP, FSDP2 and FSDP1: the patched training run equals the stock run.

Run as a script, this file is the two ranks, as ``test_distributed.py`` is: every case trains twice from the same
weights, stock under ``disabled()`` and fast. Where PEFT's adapters of experts cannot run in stock code (FSDP1), the
reference is stock without a wrapper, which takes the batches of both ranks. SGD makes the steps: Adam divides by the
size of a gradient, so that elements which are zero but for rounding move weights as far as the others do.

At the end, on one process: the recompute policies "auto" and "offload" give the numbers of "full".
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_distributed as dense
import torch
from mixtral_cases import EXPERTS, EXPERTS_ONLY, HIDDEN, LAYERS, TURNED_ROUND, lora, mixtral
from test_distributed import (
    NON_REENTRANT,
    NONE,
    RANKS,
    REENTRANT,
    STEPS,
    WRAPPER,
    counts,
    gathers_gradients,
    spread,
    unsynchronised,
    whole,
    wrap,
)
from test_recompute import Copier
from tiny_llama import ATTENTION, FP32, HOOKS_OUTSIDE, batch, distance, fallbacks, patched
from torch import distributed as dist
from torch import nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralExperts, MixtralTopKRouter

import fast_unsloth_patch
from fast_unsloth_patch import quantize
from fast_unsloth_patch.patches import budget, checkpointing, offload
from fast_unsloth_patch.status import tally
from fast_unsloth_patch.weights.nf4_experts import Nf4Experts, Packed

VOCABULARY = 96
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
# What is trained, and PEFT's targets for it.
FULL = "full"
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": list(ATTENTION)},
    "experts": EXPERTS_ONLY,
    "both": {**EXPERTS_ONLY, "target_modules": ["q_proj", "v_proj"]},
}
# By rank, what is added to the router's logits: nobody takes the last expert, the second rank does not take the first.
NO = -torch.inf
SHARES = ((0.0, 0.0, 0.0, NO), (NO, 0.0, 0.0, NO))
USED = ([0, 1, 2], [1, 2])


@dataclass(frozen=True)
class Case(dense.Case):
    """One wrapper round one Mixtral.

    Attributes:
        trained: a key of `TARGETS`, or full training.
        experts: transformers' implementation, which the stock arm runs.
        balanced: router logits are recorded, and the loss has the term that balances experts.
        starved: experts without tokens, `SHARES`.
        four_bits: the model is loaded in 4 bits, experts included; FSDP leaves these out.
        alone: the reference is stock without a wrapper.
    """

    family: str = "mixtral"
    trained: str = "attention"
    experts: str | None = "grouped_mm"
    balanced: bool = False
    starved: bool = False
    four_bits: bool = False
    alone: bool = False

    @property
    def layer(self) -> type[nn.Module]:
        return MixtralDecoderLayer

    def __str__(self) -> str:
        flags = [name for name in ("balanced", "starved", "four_bits", "alone") if getattr(self, name)]
        options = [f"{key}={value}" for key, value in self.options.items()]
        return ", ".join([self.wrapper, self.trained, self.checkpoint, str(self.experts), *flags, *options])


def _cases() -> list[Case]:
    found = []
    for wrapper in ("ddp", "fsdp2", "fsdp1"):
        again = REENTRANT if wrapper == "ddp" else WRAPPER
        for trained in ("attention", "both", FULL):
            alone = wrapper == "fsdp1" and trained == "both"
            found += [
                Case(wrapper, trained=trained, balanced=True, starved=True, alone=alone),
                Case(wrapper, NON_REENTRANT, trained=trained, starved=True, alone=alone),
                Case(wrapper, again, trained=trained, balanced=True, micro=1 if alone else 2, alone=alone),
            ]
        found.append(Case(wrapper, trained="experts", starved=True, alone=wrapper == "fsdp1"))
    found += [
        Case("ddp", NON_REENTRANT, trained="both", starved=True, experts=None),
        Case("ddp", REENTRANT, trained="both", starved=True, options={"static_graph": True}),
        Case("fsdp2", trained=FULL, starved=True, experts=None, options={"reshard_after_forward": False}),
        # One requires_grad for all of a flat parameter, says FSDP1: full training only.
        *(
            Case("fsdp1", checkpoint, trained=FULL, starved=True, balanced=True, options={"use_orig_params": False})
            for checkpoint in (NONE, NON_REENTRANT)
        ),
        *(Case("fsdp1", trained="attention", options={"policy": "peft", "use_orig_params": o}) for o in (True, False)),
    ]
    found += [
        Case(wrapper, checkpoint, trained=trained, four_bits=True, balanced=True, starved=True)
        for wrapper, trained, checkpoint in [
            ("ddp", "attention", NON_REENTRANT),
            ("ddp", "both", NONE),
            ("ddp", "both", REENTRANT),
            ("fsdp2", "attention", NONE),
            ("fsdp2", "both", NONE),
            ("fsdp2", "both", NON_REENTRANT),
        ]
    ]
    return found


CASES = {str(case): case for case in _cases()}
BROADCAST = "broadcast of four bits"


# ---- the two ranks

# The rank whose batch is being run: where there is no wrapper, one process takes turns.
_acting = [0]
_used: set[int] = set()
_quantised: list[nn.Module] = []


def _route(module, args, output):
    """A hook that starves experts of a router, if it has ``shares``, and writes down which are used."""
    logits, weights, index = output
    if module.starved:
        logits = logits + torch.tensor(SHARES[_acting[0]])
        top, index = logits.float().softmax(-1).topk(module.top_k, dim=-1)
        weights = top / top.sum(-1, keepdim=True)
    _used.update(index.flatten().tolist())
    return logits, weights, index


def build(case: Case) -> nn.Module:
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if case.balanced else {}
    if case.four_bits:
        model = copy.deepcopy(_quantised[0])
        model.config.update(balanced)
        model.router_aux_loss_coef = 0.5
    else:
        model = mixtral(experts=case.experts, **balanced)
    if case.trained != FULL:
        model = lora(model, **TARGETS[case.trained])
    for module in model.modules():
        if isinstance(module, MixtralTopKRouter):
            module.starved = case.starved
            module.register_forward_hook(_route)
    if case.checkpoint in (NON_REENTRANT, REENTRANT):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpoint == REENTRANT})
    return model


def packed_in(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if isinstance(parameter, Nf4Experts)}


def inputs_of(rank: int, step: int, i: int) -> dict[str, torch.Tensor]:
    return batch(length=12 - 3 * rank, seed=100 * step + 10 * i + rank, vocab=VOCABULARY)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)


def train(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is this rank's own, its losses; and the gradients of each step and the final parameters, of all ranks."""
    _acting[0] = rank = dist.get_rank()
    model = build(case)
    packed = packed_in(model)
    if case.four_bits and case.wrapper == "fsdp2":
        case = replace(case, options={**case.options, "ignored_params": packed})
    wrapped = wrap(case, model)
    optimizer = sgd(wrapped)
    own, shared = {}, {}
    for step in range(STEPS):
        for i in range(case.micro):
            with unsynchronised(wrapped) if i + 1 < case.micro else nullcontext():
                loss = wrapped(**inputs_of(rank, step, i), use_cache=False).loss
                (loss / case.micro).backward()
            own[f"loss {step} {i}"] = loss.detach()
        gradients = {f"{step} {name}": grad for name, grad in whole(case, wrapped, "grad").items()}
        (shared if gathers_gradients(case) else own).update(gradients)
        optimizer.step()
        optimizer.zero_grad()
    assert packed_in(wrapped) == packed and len(packed) == 2 * LAYERS * case.four_bits
    return own, shared | whole(case, wrapped, "parameter")


def train_alone(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same steps without a wrapper: gradients are the mean over the ranks' batches, which this process runs."""
    model = build(case)
    optimizer = sgd(model)
    own, shared = {}, {}
    for step in range(STEPS):
        for rank in range(RANKS):
            _acting[0] = rank
            loss = model(**inputs_of(rank, step, 0), use_cache=False).loss
            (loss / RANKS).backward()
            if rank == dist.get_rank():
                own[f"loss {step} 0"] = loss.detach()
        shared |= {f"{step} grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return own, shared | {f"parameter {name}": p.detach() for name, p in model.named_parameters()}


def comparable(case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference has too. FSDP1 has zeros for the gradients of what is frozen in a flat parameter."""
    if not case.alone:
        return tensors
    return {
        name.replace("_checkpoint_wrapped_module.", ""): t
        for name, t in tensors.items()
        if " grad " not in name or "lora_" in name
    }


def is_of_experts(case: Case, name: str) -> bool:
    """Whether it is a gradient of experts that are trained."""
    return " grad " in name and "experts" in name and (case.trained == FULL or "lora_" in name)


def by_expert(name: str, gradient: torch.Tensor) -> list[float]:
    """The size of the gradient of each expert: of a stack [E, N, K], of PEFT's A [E r, K] or B [N, r E]."""
    if "lora_B" in name:
        gradient = gradient.view(len(gradient), -1, EXPERTS).permute(2, 0, 1)
    return [part.norm().item() for part in gradient.reshape(EXPERTS, -1)]


def compare(case: Case) -> dict[str, Any]:
    start = counts()
    with fast_unsloth_patch.disabled():
        own, shared = (train_alone if case.alone else train)(case)
    between = counts()
    _used.clear()
    fast_own, fast_shared = train(case)
    wanted, got = own | shared, comparable(case, fast_own | fast_shared)
    return {
        "stock": between - start,
        "fast": counts() - between,
        "names": [sorted(wanted), sorted(got)],
        "distances": {name: distance(got[name], wanted[name]) for name in wanted.keys() & got.keys()},
        "spread": spread(fast_shared),
        "used": sorted(_used),
        "experts": {n: by_expert(n, t) for n, t in fast_shared.items() if is_of_experts(case, n)},
    }


def random_stack(seed: int) -> Nf4Experts:
    """A stack [4, 8, 64] with double quantisation."""
    generator = torch.Generator().manual_seed(seed)

    def byte(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def real(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    parts = Packed(byte(4, 256), byte(4, 8), real(4, 1), real(256), real(4, 4), "nf4", 64, 256)
    return Nf4Experts.of(parts, (4, 8, 64), torch.float32).as_parameter()


def broadcast() -> dict[str, Any]:
    """Whether each way to broadcast leaves every rank with the values of the first; what other collectives say."""
    ways = {
        "waits": lambda stack: dist.broadcast(stack, 0),
        "asynchronous": lambda stack: dist.broadcast(stack, 0, async_op=True).wait(),
        "data": lambda stack: dist.broadcast(stack.data, 0),
    }
    found: dict[str, Any] = {}
    for name, send in ways.items():
        stack = random_stack(dist.get_rank())
        send(stack)
        found[name] = torch.equal(stack.dequantize(), random_stack(0).dequantize())
    try:
        dist.all_reduce(random_stack(0))
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def rank_main(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    # A case that fails ends the run: the ranks might no longer be at the same collective.
    with open(Path(folder, f"rank{rank}"), "w", buffering=1) as file:
        for name, case in CASES.items():
            if _runs(case):
                print(json.dumps([name, compare(case)]), file=file)
        print(json.dumps([BROADCAST, broadcast()]), file=file)
    dist.destroy_process_group()


def _runs(case: Case) -> bool:
    # PEFT's older adapters of experts have no fast path.
    return (BITSANDBYTES or not case.four_bits) and not (TURNED_ROUND and case.trained in ("experts", "both"))


def load_in_four_bits(folder: str) -> nn.Module:
    """Packed bytes posing as floats, which FSDP2 can shard, and the experts, which it cannot."""
    from transformers import BitsAndBytesConfig

    quantize.quantize_experts()
    # bitsandbytes' CPU kernels want rows of whole blocks.
    mixtral(hidden_size=64, intermediate_size=128).save_pretrained(f"{folder}/model")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "grouped_mm"}
    model = MixtralForCausalLM.from_pretrained(f"{folder}/model", quantization_config=config, **options)
    return model.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fast_unsloth_patch.apply()
    if BITSANDBYTES:
        _quantised.append(load_in_four_bits(sys.argv[1]))
    torch.multiprocessing.start_processes(rank_main, sys.argv[1:], nprocs=RANKS, start_method="fork")


# ---- the tests


def expected(case: Case) -> dict[str, int]:
    """Every fast call of the fast arm, and every call that ran stock."""
    calls = STEPS * case.micro
    per_adapter = case.options.get("policy") == "peft"
    flat = case.wrapper == "fsdp1" and not per_adapter
    # Backward reaches the first norm if its input or its weight needs a gradient, or a view of the same flat parameter.
    first = case.checkpoint in (NON_REENTRANT, REENTRANT) or case.trained == FULL or flat
    # Without that, and with adapters on the experts alone, nothing before the first experts needs one.
    before = 1 if first or case.trained != "experts" else 0
    found = {"rms_norm forward": 2 * LAYERS + 1, "rms_norm backward": 2 * LAYERS - 1 + first + before}
    found |= {"loss forward": 1, "loss backward": 1}
    found |= {"decoder_layer forward": LAYERS, "decoder_layer backward": LAYERS - 1 + first}
    found |= {"attention forward": LAYERS, "attention backward": LAYERS - 1 + before}
    found |= {"moe forward": LAYERS, "moe backward": LAYERS}
    linear = {}
    if per_adapter:
        reason = "stock: lora_A type FullyShardedDataParallel"
        del found["attention forward"], found["attention backward"]
        found[f"attention {reason}"] = LAYERS
        linear = {f"peft.linear {reason}": calls * LAYERS * len(ATTENTION)}
    again = [name.removesuffix(" forward") for name in found if name.endswith(" forward")]
    again = {name: found[f"{name} forward"] - (name == "rms_norm") for name in again if name != "loss"}
    # FSDP2 has hooks on the layer; so have transformers' recorders, from the first recorded output on.
    hooked = case.wrapper == "fsdp2" or case.balanced
    # In a reentrant region what is recorded has no gradient in stock; nor has it in a layer that is recomputed.
    may_keep = case.trained != FULL and not (case.balanced and case.checkpoint == REENTRANT)
    found |= dense.recomputes(case, found, again, hooked=hooked, may_keep=may_keep)
    return {f"mixtral.{name}": calls * times for name, times in found.items() if times} | linear


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(ranks, name):
    written, stderr = ranks
    case = CASES[name]
    if case.four_bits:
        pytest.importorskip("bitsandbytes")
    if not _runs(case):
        pytest.skip("PEFT before 0.20: experts run stock")
    assert all(name in results for results in written), stderr
    for rank, results in enumerate(written):
        found = results[name]
        stock_names, fast_names = found["names"]
        assert fast_names == stock_names and len(found["distances"]) == len(stock_names) >= STEPS * 12
        assert {n: d for n, d in found["distances"].items() if not d <= FP32} == {}
        assert found["spread"] == 0.0
        assert found["fast"] == expected(case)
        # Stock ran, and nothing else.
        assert found["stock"] and all(what.endswith(" stock: disabled") for what in found["stock"])
        if case.starved:
            assert found["used"] == USED[rank]
            for sizes in found["experts"].values():
                # Half of the first expert's gradient on one rank is all that there is; the last one's is exactly zero.
                assert all(sizes[:3]) and sizes[3] == 0.0
            adapted = case.trained != "attention" and gathers_gradients(case)
            assert len(found["experts"]) == adapted * STEPS * LAYERS * (2 if case.trained == FULL else 4)


def test_broadcast_sends_what_stacks_hold(ranks):
    written, stderr = ranks
    for results in written:
        assert BROADCAST in results, stderr
        error = results[BROADCAST].pop("error")
        assert "allreduce_" in error and "use their dequantize()" in error
        assert results[BROADCAST] == {"waits": True, "asynchronous": True, "data": True}


# ---- 4-bit experts are left whole, or there is an error


@pytest.fixture
def mesh(tmp_path):
    """Of one rank."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def packed_experts() -> MixtralExperts:
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    for parameter in ("gate_up_proj", "down_proj"):
        shape = getattr(experts, parameter).shape
        size = shape[1:].numel()
        generator = torch.Generator().manual_seed(5)
        data = torch.randint(0, 256, (EXPERTS, size // 2), generator=generator, dtype=torch.uint8)
        parts = Packed(data, torch.rand(EXPERTS, size // 64, generator=generator), None, None, None, "nf4", 64, 0)
        setattr(experts, parameter, Nf4Experts.of(parts, shape, torch.float32).as_parameter())
    return experts


def fsdp2(experts, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(experts, mesh=mesh, **options)


def fsdp2_by_columns(experts, mesh):
    from torch.distributed.tensor import Shard

    return fsdp2(experts, mesh, shard_placement_fn=lambda parameter: Shard(1))


def fsdp1(experts, mesh, *, use_orig_params=True, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    return FullyShardedDataParallel(experts, use_orig_params=use_orig_params, device_id=device, **options)


def fsdp1_flat(experts, mesh):
    return fsdp1(experts, mesh, use_orig_params=False)


def distributed_tensor(experts, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(experts.gate_up_proj, mesh, [Shard(0)])


@pytest.mark.parametrize("shard", [fsdp2, fsdp2_by_columns, fsdp1, fsdp1_flat, distributed_tensor])
def test_sharding_four_bits_is_an_error(mesh, shard):
    experts = packed_experts()
    with pytest.raises(
        RuntimeError, match=r"four bits cannot be sharded.*ignored_params=packed.*ignored_states=packed"
    ):
        shard(experts, mesh)
    assert len(packed_in(experts)) == 2


def test_left_out_they_stay_packed(mesh):
    for shard, option in ((fsdp2, "ignored_params"), (fsdp1, "ignored_states")):
        experts = nn.Sequential(packed_experts(), nn.Linear(4, 4))
        packed = packed_in(experts)
        wrapped = shard(experts, mesh, **{option: packed})
        assert packed_in(wrapped) == packed and len(packed) == 2


def test_values_are_still_for_everybody_else(mesh):
    """Splitting gate from up by hand, say."""
    stack = packed_experts().gate_up_proj
    gate, up = stack.chunk(2, dim=1)
    assert torch.equal(torch.cat([gate, up], dim=1), stack.dequantize())
    assert len(stack.split(1)) == EXPERTS and stack.flatten().shape == (stack.numel(),)


# ---- recompute policies, on one process

MANY = 4
ROUNDS = 6


def rounds(trained: str, policy: str, *, use_reentrant: bool, balanced: bool):
    """Losses, gradients and weights of a training run; how often the experts ran."""
    checkpointing.set_policy("stock")
    checkpointing.set_policy(policy)
    model = mixtral(num_hidden_layers=MANY, output_router_logits=balanced, router_aux_loss_coef=0.5)
    model = model if trained == FULL else lora(model, **TARGETS[trained])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    optimizer = sgd(model)
    seen = {}
    before = counts()
    for step in range(ROUNDS):
        loss = model(**batch(vocab=VOCABULARY), use_cache=False).loss
        loss.backward()
        seen |= {f"loss {step}": loss.detach()}
        seen |= {f"{step} grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    ran = counts() - before
    seen |= {name: p.detach().clone() for name, p in model.named_parameters()}
    return seen, {what: ran[f"mixtral.moe {what}"] for what in ("forward", "recomputed", "backward")}


@pytest.fixture
def fast(monkeypatch):
    """The patches, memory for two kept layers, copies to the host made at once."""
    # What is known of a layer where no memory is counted is its input, [2, 12, HIDDEN].
    room = int(3.5 * 2 * 12 * HIDDEN * 4 / 0.95)
    monkeypatch.setattr(budget, "memory_of", lambda device: budget.Memory(0, 0, room, 0))
    copier = Copier()
    monkeypatch.setattr(offload, "copier_of", lambda device: copier)
    monkeypatch.setattr(offload, "_SMALLEST", 0)
    with patched():
        yield copier
        checkpointing.set_policy("full")


def assert_as_full(trained: str, policy: str, recomputed: int, **options: bool) -> None:
    """To the bit, with so many recomputes."""
    calls = ROUNDS * MANY
    wanted, ran = rounds(trained, "full", **options)
    assert ran == {"forward": calls, "recomputed": calls, "backward": calls}
    assert wanted[f"loss {ROUNDS - 1}"] < 0.99 * wanted["loss 0"]
    tally("mixtral.checkpointing").fallbacks.clear()
    got, ran = rounds(trained, policy, **options)
    assert ran == {"forward": calls, "recomputed": recomputed, "backward": calls}
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


# Recorded outputs have no gradient in a reentrant region.
POLICIES = pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True, "balanced": False}, {"use_reentrant": False, "balanced": True}],
    ids=["reentrant", "non-reentrant, balanced"],
)


@pytest.mark.parametrize("trained", ["attention", *([] if TURNED_ROUND else ["both"]), FULL])
class TestPolicies:
    @POLICIES
    def test_auto(self, fast, trained, options):
        # Two steps with nothing kept; the third tries half of the room, the others have all of it.
        assert_as_full(trained, "auto", ROUNDS * MANY - (1 + 2 + 2 + 2), **options)
        assert f"2 of {MANY} layers kept" in checkpointing.describe()
        hooks = 0 if HOOKS_OUTSIDE or not options["balanced"] else ROUNDS * MANY - 7
        assert fallbacks("mixtral.checkpointing") == ({"hooks on the layer": hooks} if hooks else {})

    @POLICIES
    def test_offload(self, fast, trained, options):
        assert_as_full(trained, "offload", ROUNDS * MANY, **options)
        # Out for every layer, back for all but the last.
        assert [what for what, _ in fast.log].count("copy") == ROUNDS * (2 * MANY - 1)
        hooks = 0 if HOOKS_OUTSIDE or not options["balanced"] else ROUNDS * MANY
        assert fallbacks("mixtral.checkpointing") == ({"hooks on the layer": hooks} if hooks else {})

    def test_auto_keeps_nothing_where_it_would_change_a_loss(self, fast, trained):
        """Recorded in a reentrant region, router logits have no gradient; in a kept layer they would have one."""
        assert_as_full(trained, "auto", ROUNDS * MANY, use_reentrant=True, balanced=True)
        reason = "auto: outputs recorded in a reentrant region"
        assert fallbacks("mixtral.checkpointing")[reason] == ROUNDS * MANY
