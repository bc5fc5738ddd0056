"""The plan of Mixtral's experts: what runs stock and why, every change between two steps, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mixtral_cases import (
    HIDDEN,
    MOE,
    TURNED_ROUND,
    as_good,
    assert_close,
    block,
    both_steps,
    compare,
    config,
    data,
    exact_step,
    fix_routing,
    lora_block,
    step,
)
from tiny_llama import FP32, distance, fallbacks, hits, patched
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import fast_unsloth_patch
from fast_unsloth_patch.patches import plan as plans

# What runs stock.


def _own_forward(part):
    def change(model):
        module = part(model)
        original = module.forward
        module.forward = lambda *args: original(*args) * 2

    return change


def _hook(part):
    def change(model):
        part(model).register_forward_hook(lambda module, args, output: output * 2)

    return change


def _jitter(model):
    model.jitter_noise = 0.1


def _parallel(model):
    model.experts._is_expert_parallel = True


def _activation(model):
    model.experts.act_fn = nn.GELU()


def _meta(model):
    model.experts.down_proj = nn.Parameter(model.experts.down_proj.to("meta"))


def _fewer(model):
    """Of the weights that there are."""
    model.experts.num_experts = 2


class _Sharded(torch.Tensor):
    pass


def _subclass(model):
    weight = model.experts.gate_up_proj.detach().as_subclass(_Sharded)
    del model.experts.gate_up_proj
    model.experts.gate_up_proj = weight


def _share(model):
    """A rank's experts; the router still chooses among all, and nobody has said so."""
    experts = model.experts
    experts.num_experts = 2
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name).data[:2].clone()))


def _narrow(model):
    experts = model.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.data[:, :32].clone())
    experts.down_proj = nn.Parameter(experts.down_proj.data[:, :, :16].clone())


def _narrow_data(model):
    for parameter in (model.experts.gate_up_proj, model.experts.down_proj):
        parameter.requires_grad_(False)
    model.experts.gate_up_proj.data = model.experts.gate_up_proj.data[:, :32].clone()
    model.experts.down_proj.data = model.experts.down_proj.data[:, :, :16].clone()


def _double_down(model):
    model.experts.down_proj.data = model.experts.down_proj.data.double()


def _no_parameter(model):
    del model.experts.down_proj


def _class(model):
    class Doubling(type(model.experts)):
        pass

    model.experts.__class__ = Doubling


def _own_gate(model):
    model.experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]


def _typo(model):
    model.experts.config._experts_implementation = "groupedmm"


def _parametrized(model):
    nn.utils.parametrize.register_parametrization(model.experts, "down_proj", nn.Identity())


def _eval(model):
    model.eval()


STOCK_CHANGES = [
    (_jitter, "router jitter"),
    (_parallel, "expert parallel"),
    (_activation, "activation GELU"),
    (_meta, "meta weight"),
    (_fewer, "expert weights of another shape"),
    (_subclass, "_Sharded weight"),
    (_share, "expert weights of another shape"),
    (_narrow, "expert weights of another shape"),
    (_narrow_data, "expert weights of another shape"),
    (_double_down, "dtype mismatch"),
    (_no_parameter, "down_proj is no parameter"),
    (_class, "experts type Doubling"),
    (_own_gate, "forward of experts replaced"),
    (_typo, "unknown experts implementation"),
    (_parametrized, "experts type ParametrizedMixtralExperts"),
    (_hook(lambda model: model.experts), "hooks on experts"),
    (_hook(lambda model: model.experts.act_fn), "hooks on act_fn"),
    (_own_forward(lambda model: model.experts), "forward of experts replaced"),
    (_own_forward(lambda model: model.experts.act_fn), "forward of act_fn replaced"),
]


def _outcome(model, x):
    """What the model returns or raises."""
    torch.manual_seed(1)
    try:
        return model(x.clone()).detach()
    except Exception as error:
        return type(error), str(error)


def _same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize(("change", "reason"), STOCK_CHANGES)
@pytest.mark.parametrize("warm", [False, True])
def test_falls_back(change, reason, warm):
    """Before the first step or between two, with the reason counted; the result or the error is stock's."""
    model = block(experts="eager" if change in (_share, _fewer) else "grouped_mm")
    x = data()[0]
    with patched(MOE):
        if warm:
            model(x)
        change(model)
        fast = _outcome(model, x)
        assert fallbacks(MOE) == {reason: 1} and hits()[MOE] == int(warm)
        assert plans._KEY not in model.__dict__ or reason == "router jitter"
    assert _same(fast, _outcome(model, x))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("is_transposed", True),
        ("has_bias", True),
        ("has_gate", False),
        ("is_concatenated", False),
        ("has_post_expert_norm", True),
    ],
)
def test_another_layout(attribute, value):
    """What a later MixtralExperts may say of itself."""
    model = block(experts="eager")
    setattr(model.experts, attribute, value)
    compare(model, fast=False)
    assert fallbacks(MOE) == {"experts of another layout": 1}


@pytest.mark.parametrize("name", ["mine", "eager", "grouped_mm"])
def test_registered_implementation_of_another_library(name, monkeypatch):
    """Under its own name or that of one of transformers' own."""
    model = block()
    own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    x = data()[0]
    with patched(MOE):
        model(x)
        monkeypatch.setitem(ExpertsInterface._global_mapping, name, lambda *args: own(*args) * 2)
        model.experts.config._experts_implementation = name
        fast = model(x)
        assert fallbacks(MOE) == {"experts implementation of another library": 1} and hits()[MOE] == 1
    assert torch.equal(fast, model(x))


@pytest.mark.parametrize("attribute", ["forward", "_apply_gate"])
def test_replaced_code(attribute, monkeypatch):
    """As some libraries replace it on the class, with the stock one's name and module."""
    model = block()
    x = data()[0]
    kind = type(model.experts)
    stock = getattr(kind, attribute)

    def doubled(self, *args):
        return stock(self, *args) * 2

    doubled.__module__, doubled.__qualname__ = stock.__module__, stock.__qualname__
    with patched(MOE):
        model(x)
        monkeypatch.setattr(kind, attribute, doubled)
        fast = model(x)
        assert fallbacks(MOE) == {"forward of experts replaced": 1}
    assert torch.equal(fast, model(x))


def test_states_of_the_call():
    model = block()
    x = data()[0]
    with patched(MOE):
        with fast_unsloth_patch.disabled():
            model(x)
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        with pytest.raises(ValueError, match="unpack"):
            model(x[0])
        with pytest.raises(RuntimeError, match="view"):
            model(torch.randn(9, 2, 2 * HIDDEN)[..., ::2].transpose(0, 1))
        model(x[:0])
        fast_unsloth_patch.keep_stock(model)
        model(x)
    assert hits()[MOE] == 0
    assert fallbacks(MOE) == {
        "disabled": 1,
        "eval": 1,
        "input not 3-D": 1,
        "input not contiguous": 1,
        "empty input": 1,
        "keep_stock": 1,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits, weights, index: (logits, weights.bfloat16(), index), "routing of another dtype"),
        (lambda logits, weights, index: (logits, weights.as_subclass(_Sharded), index), "routing of another type"),
    ],
)
def test_another_routing(change, reason):
    """The gate has run when this is seen: its hooks run once all the same (`step` counts them)."""
    model = block()
    model.gate.register_forward_hook(lambda module, args, output: change(*output))
    compare(model, fast=False)
    assert fallbacks(MOE) == {reason: 1}


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_factors_turned_round(target):
    """PEFT before 0.20 has A over the other dimension: stock there, fast with every later one."""
    model = lora_block(target_modules=[], target_parameters=[f"mlp.experts.{target}"])
    compare(model, fast=not TURNED_ROUND)
    assert fallbacks(MOE) == ({"factors turned round, as PEFT before 0.20 has them": 1} if TURNED_ROUND else {})


# What changes between two steps and stays fast.


def _frozen(model):
    model.experts.requires_grad_(False)


def _new_parameter(model):
    model.experts.down_proj = nn.Parameter(torch.randn_like(model.experts.down_proj))


def _new_data(model):
    model.experts.gate_up_proj.data = torch.randn_like(model.experts.gate_up_proj)


def _written(model):
    model.experts.gate_up_proj.data.mul_(2)


def _new_gate(model):
    model.gate.weight = nn.Parameter(torch.randn_like(model.gate.weight))


def _new_experts(model):
    model.experts = copy.deepcopy(model.experts)
    model.experts.gate_up_proj.data.mul_(2)


def _eager(model):
    model.experts.config._experts_implementation = "eager"


def _new_config(model):
    """Where the old one stays as it is, for others."""
    model.experts.config = config("eager")


def _plain_tensor(model):
    """Where FSDP1 puts the gathered weights."""
    experts = model.experts
    experts.__dict__["down_proj"] = experts._parameters.pop("down_proj").data * 2


def _to_double(model):
    model.double()


@pytest.mark.parametrize(
    "change",
    [
        _frozen,
        _new_parameter,
        _new_data,
        _written,
        _new_gate,
        _new_experts,
        _eager,
        _new_config,
        _plain_tensor,
        _to_double,
    ],
)
def test_changes_between_steps(change):
    double = change is _to_double
    model = block(experts="eager" if double else "grouped_mm")
    with patched(MOE):
        step(model, *data())
    change(model)
    compare(model, dtype=torch.float64 if double else torch.float32, tolerance=1e-7 if double else FP32)


def test_new_config_under_autocast():
    """It says what is computed in: here float32 before and bfloat16 after."""
    model = block()
    fix_routing(model)
    x, dy = data()
    with patched(MOE):
        before = step(model, x, dy, torch.bfloat16)
    model.experts.config = config("eager")
    new, stock = both_steps(model, x, dy, torch.bfloat16)
    as_good(new, stock, exact_step(model, x, dy))
    assert distance(before["y"], new["y"]) > 1e-4


def test_dtype_follows_the_step():
    """A plan for float32 is none for autocast, and the other way round."""
    model = block(experts="eager")
    fix_routing(model)
    x, dy = data()
    exact = exact_step(model, x, dy)
    for autocast in (None, torch.bfloat16, None):
        new, stock = both_steps(model, x, dy, autocast)
        if autocast is None:
            assert_close(new, stock, FP32)
        else:
            as_good(new, stock, exact)
            assert distance(new["y"], exact["y"]) > 1e-4


def test_plan_is_kept_and_goes_with_no_copy():
    model = block()
    x, dy = data()
    with patched(MOE):
        step(model, x, dy)
        kept = model.__dict__[plans._KEY]
        step(model, x, dy)
        assert model.__dict__[plans._KEY] is kept
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert twin.__dict__[plans._KEY] is None
        twin.experts.down_proj.data.mul_(3)
        compare(twin)
    compare(model)
