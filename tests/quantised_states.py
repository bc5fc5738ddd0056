"""States of PEFT and misfits over NF4 and GPTQ alike; `test_qlora_states` and `gptq_lora_states` give the models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig
from quantised_llama import BF16, IDS, LAYERS, adapted, check, hits, in_float64, outcome, patched, reasons
from tiny_llama import batch, distance, fill_adapters, layers_of, run


def falls_back(model, wanted: dict[str, dict[str, int]], **expected) -> None:
    """One step, correct as stock's, with these reasons by patch."""
    new = {patch_id: reasons(patch_id) for patch_id in wanted}
    check(model, batch(), **expected)
    assert {patch_id: found() for patch_id, found in new.items()} == wanted


def several_adapters_and_disabled(model, patch_id: str) -> None:
    """With adapters on one projection of each MLP."""
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    several = {"several active adapters": LAYERS}
    falls_back(model, {"llama.mlp": several, patch_id: several}, mlp=0)
    model.set_adapter("default")
    new = reasons("llama.mlp")
    with model.disable_adapter(), patched(*IDS):
        model(**batch())
    assert new() == {"adapters disabled": LAYERS}


def does_not_fit(model, spoil: Callable, message: str, patch_id: str, *, stepped: bool) -> None:
    """Stock runs, and raises what it raises; the reason, counted for the MLP and its layer, begins with ``message``.

    ``stepped``: found out after a step that was fast, when there is a plan.
    """
    mlp = layers_of(model)[0].mlp
    x = torch.randn(3, 64, requires_grad=True)
    if stepped:
        with patched(*IDS):
            assert outcome(mlp, x) is None
        with patched(patch_id):
            assert outcome(mlp, x) is None
    spoil(mlp.up_proj.base_layer)
    new, own = reasons("llama.mlp"), reasons(patch_id)
    stock = outcome(mlp, x)
    with patched(*IDS):
        assert outcome(mlp, x) == stock
    for found in (new(), own()):
        assert list(found.values()) == [1] and next(iter(found)).startswith(message), found


# ---- changes between two steps


def changes_of_peft(make: Callable, linear: str) -> None:
    """Adapters added, chosen, disabled; evaluation and training mode: each is seen by the next step."""
    model = adapted(make())
    first, _ = check(model, batch())
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "gate_proj"]))
    fill_adapters(model, 6)
    check(model, batch())
    model.set_adapter("other")
    other, _ = check(model, batch())
    assert distance(other.loss, first.loss) > 1e-3
    model.base_model.set_adapter(["default", "other"])
    # Two adapters on q, k and gate; the other projections take the fast path one by one.
    check(model, batch(), attention=0, mlp=0, linears={linear: 4 * LAYERS})
    model.set_adapter("default")
    model.delete_adapter("other")
    check(model, batch())
    with model.disable_adapter():
        fast, stock, counts = _losses(model)
    assert torch.equal(fast, stock) and counts["llama.attention"] == counts["llama.mlp"] == 0
    check(model, batch())
    model.eval()
    check(model, batch())
    model.train()
    check(model, batch())


def _losses(model):
    before = hits()
    with patched(*IDS):
        fast = model(**batch()).loss
    return fast, model(**batch()).loss, {name: hits()[name] - before[name] for name in before}


def another_input_dtype(make: Callable) -> None:
    """The layers that are called first in float32 and then under autocast, and again without."""
    model = adapted(make())
    exact = run(in_float64(model), batch())
    check(model, batch())
    check(model, batch(), autocast=BF16, exact=exact)
    check(model, batch())
