"""What holds over NF4 and over GPTQ alike; `test_qlora` and `gptq_lora_cases` say for which models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import PeftModel
from quantised_llama import (
    BF16,
    IDS,
    LAYERS,
    PROJECTIONS,
    Variant,
    adapted,
    assert_counts,
    both,
    check,
    hits,
    in_float64,
    packed_layers,
    patched,
    zero,
)
from test_fidelity import GRADIENT_SEEDS, WORST, Errors, inputs_of
from tiny_llama import ALL, assert_same, batch, distance, fill_adapters, layers_of, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface

import fast_unsloth_patch
from fast_unsloth_patch import install
from fast_unsloth_patch.weights.gptq import GPTQWeight
from fast_unsloth_patch.weights.nf4 import Nf4Weight

LOSS_ROWS = 16

# ---- dropout


def _identities(layer) -> None:
    """W = 0, A = B = 1: the output of the layer is its input under its own mask."""
    zero(layer.base_layer)
    n = layer.in_features
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(n))
        layer.lora_B["default"].weight.copy_(torch.eye(n))


def _sigma(q: float, n: int) -> float:
    return 5 * (q * (1 - q) / n) ** 0.5


def masks_of_q_k_and_v_are_independent(make: Callable, p: float = 0.4, n: int = 64) -> None:
    model = adapted(make(num_key_value_heads=4, num_hidden_layers=1), r=n, lora_alpha=n, lora_dropout=p)
    attention = layers_of(model)[0].self_attn
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.extend(t.transpose(1, 2).flatten(2) for t in (query, key, value))
        return query.transpose(1, 2), None

    AttentionInterface.register("fup_quantised_masks", spy)
    attention.config._attn_implementation = "fup_quantised_masks"
    for name in ("q_proj", "k_proj", "v_proj"):
        _identities(getattr(attention, name))
    x = (torch.rand(4, 50, n) + 0.5).requires_grad_()
    before = hits()["llama.attention"]
    with patched(*IDS):
        attention(x, (torch.ones(1, 50, 16), torch.zeros(1, 50, 16)), None)
    assert hits()["llama.attention"] == before + 1
    masks = [t.detach() != 0 for t in seen]
    grads = [torch.randn_like(x) for _ in seen]
    torch.autograd.backward(seen, grads)
    for t, mask in zip(seen, masks):
        torch.testing.assert_close(t.detach(), x.detach() * mask / (1 - p))
    torch.testing.assert_close(x.grad, sum(g * m / (1 - p) for g, m in zip(grads, masks)))
    for i, mask in enumerate(masks):
        assert abs(mask.float().mean() - (1 - p)) < _sigma(p, mask.numel())
        expected = p * p + (1 - p) ** 2
        assert abs((mask == masks[i - 1]).float().mean() - expected) < _sigma(expected, mask.numel())


def masks_of_gate_and_up_are_independent(make: Callable, p: float = 0.4, n: int = 64) -> None:
    model = adapted(make(intermediate_size=n, num_hidden_layers=1), r=n, lora_alpha=n, lora_dropout=p)
    mlp = layers_of(model)[0].mlp
    mlp.down_proj.lora_dropout["default"].p = 0.0
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        _identities(layer)
    before = hits()["llama.mlp"]
    with patched(*IDS):
        y = mlp(torch.full((200, n), 2.0))
    assert hits()["llama.mlp"] == before + 1
    kept, expected = y != 0, (1 - p) ** 2
    assert abs(kept.float().mean() - expected) < _sigma(expected, kept.numel())
    value = torch.tensor(2.0 / (1 - p))
    torch.testing.assert_close(y[kept], (nn.functional.silu(value) * value).expand(int(kept.sum())))


def mask_of_a_linear_and_its_gradients(
    make: Callable, patch_id: str, p: float = 0.3, n: int = 64, device: str = "cpu"
) -> None:
    model = adapted(make(num_hidden_layers=1), r=n, lora_alpha=n, lora_dropout=p)
    layer = layers_of(model)[0].self_attn.q_proj
    _identities(layer)
    x, dy = (torch.rand(200, n, device=device) + 0.5).requires_grad_(), torch.randn(200, n, device=device)
    before = hits()[patch_id]
    with patched(patch_id):
        y = layer(x)
        y.backward(dy)
    assert hits()[patch_id] == before + 1
    mask = y.detach() != 0
    assert abs(mask.float().mean() - (1 - p)) < _sigma(p, mask.numel())
    dropped = x.detach() * mask / (1 - p)
    torch.testing.assert_close(y.detach(), dropped)
    torch.testing.assert_close(x.grad, dy * mask / (1 - p))
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, dy.T @ dropped, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, dy.T @ dropped, rtol=1e-5, atol=1e-4)


def the_recompute_draws_the_same_masks(make: Callable, reentrant: bool) -> None:
    model = adapted(make(), lora_dropout=0.3)
    with patched(*IDS):
        torch.manual_seed(11)
        plain = run(model, batch(), use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        before = hits()["llama.mlp"]
        recomputed = run(model, batch(), use_cache=False)
        assert hits()["llama.mlp"] == before + 2 * LAYERS
        torch.manual_seed(12)
        other = run(model, batch(), use_cache=False)
    assert_same(recomputed, plain, 1e-6)
    assert distance(other.loss, plain.loss) > 1e-4


def dropout_has_the_distribution_of_stock(make: Callable, draws: int = 60) -> None:
    """Means of the loss and of one gradient along its own mean, within 5 standard errors of their difference."""
    model = adapted(make(num_hidden_layers=1), lora_dropout=0.5)
    name = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.default.weight"
    results = {}
    for arm, ids in (("fast", IDS), ("stock", ())):
        with patched(*ids or ("llama.rms_norm",)):
            runs = [run(model, batch(), keep_logits=False) for _ in range(draws)]
        results[arm] = torch.stack([r.loss for r in runs]), torch.stack([r.grads[name].flatten() for r in runs])
    direction = results["stock"][1].mean(0)
    for fast, stock in zip(*((loss, grad @ direction) for loss, grad in results.values())):
        error = ((fast.var() + stock.var()) / draws).sqrt()
        assert stock.std() > 0 and (fast.mean() - stock.mean()).abs() < 5 * error
        assert 0.6 < fast.std() / stock.std() < 1.7


# ---- the fidelity contract


def rms_errors(make: Callable, autocast, length: int = 12, rows: int = 2, **options) -> None:
    """Of the loss and each gradient against float64, pooled over seeds: at most 1.1 times stock's."""
    errors = Errors()
    for seed in range(GRADIENT_SEEDS):
        model = adapted(make(seed=seed), seed=seed, **options)
        exact_model, inputs = in_float64(model), inputs_of(seed, rows, length)
        exact = run(exact_model, inputs, keep_logits=False)
        fast, stock, counts = both(model, inputs, autocast=autocast, keep_logits=False)
        layers = model.config.num_hidden_layers
        assert_counts(counts, attention=layers, mlp=layers)
        assert fast.grads.keys() == stock.grads.keys() == exact.grads.keys()
        for name, expected in exact.grads.items():
            errors.add(name, fast.grads[name], stock.grads[name], expected)
        errors.add("loss", fast.loss, stock.loss, exact.loss)
        # A single number stands still more slowly than a gradient does: as many rows more, each with its own loss.
        more = inputs_of(100 + seed, LOSS_ROWS, length)
        for losses in zip(*_losses_by_row(model, exact_model, more["input_ids"], autocast)):
            errors.add("loss", *losses)
    worse = {name: ratio for name, ratio in errors.ratios().items() if not ratio <= WORST}
    assert not worse, worse


@torch.no_grad()
def _losses_by_row(model, exact_model, ids, autocast):
    ids = ids.to(next(model.parameters()).device)

    def losses(logits):
        every = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).double(), ids[:, 1:], reduction="none")
        return every.mean(1)

    with torch.autocast(ids.device.type, dtype=autocast or BF16, enabled=autocast is not None):
        with patched(*IDS):
            fast = model(ids).logits
        stock = model(ids).logits
    return losses(fast), losses(stock), losses(exact_model(ids).logits)


class Apart:
    """Distances of fast from stock, and of stock from float64, pooled over seeds, by quantity.

    One seed is not enough: with biases, what q and k have in common cancels in their gradients, whose errors in low
    precision are a few percent in both arms and differ by a factor of two or three from seed to seed.
    """

    def __init__(self) -> None:
        self.arms: dict[str, float] = {}
        self.errors: dict[str, float] = {}

    def add(self, fast, stock, exact) -> None:
        assert fast.grads.keys() == stock.grads.keys() == exact.grads.keys()
        for what, (f, s, e) in {
            "logits": (fast.logits, stock.logits, exact.logits),
            **{n: (fast.grads[n], stock.grads[n], exact.grads[n]) for n in stock.grads},
        }.items():
            assert f.dtype == s.dtype, what
            self.arms[what] = self.arms.get(what, 0.0) + distance(f, s) ** 2
            self.errors[what] = self.errors.get(what, 0.0) + distance(s, e) ** 2
        # A single number may be lucky: its error is taken from the logits, which it is made of.
        assert distance(fast.loss, stock.loss) <= 2.5 * distance(stock.logits, exact.logits)

    def check(self, factor: float = 2.5) -> None:
        """Two results that each carry independent errors of one size are sqrt(2) of it apart."""
        far = {
            what: (self.arms[what] ** 0.5, self.errors[what] ** 0.5)
            for what in self.arms
            if self.arms[what] > factor**2 * self.errors[what]
        }
        assert not far, far


# ---- the mechanism


def under_apply(monkeypatch, patch_id: str, model, inputs, **kwargs):
    """The step under ``apply(only=patch_id)``, the stock step, what ``status`` counted: forward, backward, again."""
    monkeypatch.setattr(install, "_state", install._State())
    fast_unsloth_patch.apply(only=patch_id)
    try:
        before = fast_unsloth_patch.status()[patch_id]
        assert before.state == "applied"
        before = before.forward, before.backward, before.recomputed
        fast = run(model, inputs, use_cache=False, **kwargs)
        row = fast_unsloth_patch.status()[patch_id]
    finally:
        fast_unsloth_patch.unapply()
    after = row.forward, row.backward, row.recomputed
    stock = run(model, inputs, use_cache=False, **kwargs)
    assert fast_unsloth_patch.status()[patch_id].forward == row.forward
    return fast, stock, tuple(new - old for new, old in zip(after, before))


def linears_alone(monkeypatch, patch_id: str, variant: Variant, base) -> None:
    """``apply(only=...)`` without the parents: each layer by itself, and ``status`` counts it."""
    model = adapted(base, checkpoint=variant.checkpoint, **variant.lora)
    precise = variant.autocast is None and "dtype" not in variant.base
    apart = Apart()
    for seed in range(1 if precise else 4):
        fill_adapters(model, seed)
        inputs = batch(seed=seed)
        fast, stock, got = under_apply(monkeypatch, patch_id, model, inputs, autocast=variant.autocast)
        # Without the patch of checkpointing a recompute looks like another forward.
        times = PROJECTIONS * LAYERS
        assert got == (times if variant.checkpoint is None else 2 * times, times, 0)
        if precise:
            assert_same(fast, stock)
        else:
            apart.add(fast, stock, run(in_float64(model), inputs, use_cache=False))
    apart.check()


# ---- memory


def nothing_unpacked_is_kept(model, monkeypatch, device: str = "cpu") -> None:
    """Every buffer that a packed weight was unpacked to is gone when the forward has ended, and after backward."""
    buffers = []

    def nf4_spy(packed_weights, outs, **kwargs):
        buffers.extend(StorageWeakRef(out.untyped_storage()) for out in outs)
        return nf4_unpack(packed_weights, outs, **kwargs)

    def gptq_spy(*args, **kwargs):
        out = gptq_unpack(*args, **kwargs)
        buffers.append(StorageWeakRef(out.untyped_storage()))
        return out

    nf4_unpack, gptq_unpack = Nf4Weight.dequantize_many, GPTQWeight.dequantize
    monkeypatch.setattr(Nf4Weight, "dequantize_many", staticmethod(nf4_spy))
    monkeypatch.setattr(GPTQWeight, "dequantize", gptq_spy)
    inputs = {name: t.to(device) for name, t in batch().items()}
    with patched(*IDS):
        loss = model(**inputs, use_cache=False).loss
        assert len(buffers) >= len(packed_layers(model)) and all(buffer.expired() for buffer in buffers)
        seen = len(buffers)
        loss.backward()
    assert len(buffers) > seen and all(buffer.expired() for buffer in buffers)


# ---- saving


def _bytes_of_base(model) -> dict[str, bytes]:
    """Packed data may pose as floats, NaN among them."""
    state = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.items()}


def saves_what_stock_loads(make: Callable, folder) -> None:
    """After fast steps: the names of stock, and the same outputs in a stock model that loads the adapters."""
    model = adapted(make(), lora_dropout=0.1)
    names, base = list(model.state_dict()), _bytes_of_base(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = hits()["llama.attention"]
    with patched(*IDS):
        for _ in range(3):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert hits()["llama.attention"] == before + 3 * LAYERS
        assert list(model.state_dict()) == names
        model.save_pretrained(folder)
    assert _bytes_of_base(model) == base
    loaded = PeftModel.from_pretrained(make(), folder, is_trainable=True)
    # Without, bitsandbytes takes another path, and packs the weights for inference.
    loaded.enable_input_require_grads()
    assert list(loaded.state_dict()) == names
    assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)
    loaded.train()
    for layer in loaded.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    check(loaded, batch())


def mixed_children(make: Callable, dense: tuple[str, ...] = ("k_proj", "up_proj", "o_proj")) -> None:
    """Dense and packed children side by side, with and without adapters."""
    model = make()
    for name, layer in list(packed_layers(model).items()):
        parent, _, child = name.rpartition(".")
        if child in dense:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
            setattr(model.get_submodule(parent), child, linear)
    for targets in (ALL, ("q_proj", "k_proj", "gate_proj", "up_proj")):
        chosen = adapted(copy.deepcopy(model), target_modules=list(targets))
        exact = run(in_float64(chosen), batch())
        check(chosen, batch())
        check(chosen, batch(), autocast=BF16, exact=exact)
