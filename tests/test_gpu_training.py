"""Training on a GPU, stock and fast: mixed precision, checkpointing, compile, memory, waiting, streams and devices.

``FAST_UNSLOTH_TEST_DEVICE=cpu`` runs the same code in small without a GPU: all but what only a GPU can show.

All tests share one configuration and one number of tokens, since each new specialisation of a kernel costs 0.4 s.
"""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny_llama import assert_as_good, batch, distance, fallbacks, llama, lora, oracle, patched, run
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fast_unsloth_patch.registry import PATCHES
from fast_unsloth_patch.status import tally
from fast_unsloth_patch.switch import disabled

DEVICE = os.environ.get("FAST_UNSLOTH_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="nothing to see without a GPU")

EVERYTHING = tuple(patch.id for patch in PATCHES)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYERS, VOCAB, ROWS, LENGTH = (4, 1000, 4, 64) if ON_GPU else (2, 96, 2, 16)
WIDTH = 256 if ON_GPU else 64
SIZE = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
}


def adapted(base: torch.dtype = BF16, dropout: float = 0.0, checkpoint: bool | None = None, **overrides: Any):
    """LoRA in float32 on every projection of a frozen base; ``checkpoint`` is ``use_reentrant``, None for without."""
    model = lora(llama(base, **{**SIZE, **overrides}), adapter_dtype=FP32, lora_dropout=dropout).to(DEVICE)
    model.enable_input_require_grads()
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    return model


def inputs_of(seed: int = 2, device: str = DEVICE) -> dict[str, torch.Tensor]:
    inputs = batch(rows=ROWS, length=LENGTH, seed=seed, vocab=VOCAB)
    inputs["labels"][0, : LENGTH // 4] = -100
    return {name: t.to(device) for name, t in inputs.items()}


def step(model, seed: int = 7, inputs: dict[str, torch.Tensor] | None = None):
    """Loss and gradients under bf16 autocast, the dropout masks drawn from ``seed``."""
    torch.manual_seed(seed)
    return run(model, inputs or inputs_of(), autocast=BF16, keep_logits=False, use_cache=False)


def counts() -> dict[str, tuple[int, int, int]]:
    """Fast forwards, recomputations and backwards so far, by patch."""
    return {i: (tally(i).forward, tally(i).recomputed, tally(i).backward) for i in EVERYTHING}


def since(before: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, ...]]:
    return {i: tuple(b - a for a, b in zip(before[i], now)) for i, now in counts().items()}


def assert_identical(a, b) -> None:
    assert a.grads.keys() == b.grads.keys() and torch.equal(a.loss, b.loss)
    differ = {n: distance(a.grads[n], b.grads[n]) for n in a.grads if not torch.equal(a.grads[n], b.grads[n])}
    assert not differ, differ


# ---- loss curves


@torch.no_grad()
def shaken(model, dtype: torch.dtype):
    """A copy whose weight matrices were rounded once more: each element moves by at most one unit roundoff."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + torch.finfo(dtype).eps / 2 * noise.to(parameter.device))
    return model


def gap(a: list[float], b: list[float]) -> float:
    """Root mean square over the steps of the relative difference of two loss curves."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return ((a - b) / b).square().mean().sqrt().item()


def assert_on_top(fast: list[float], stock: list[float], twin: list[float]) -> None:
    """The curves of fast and stock are as close as two stock runs that differ by roundings.

    ``twin`` is stock from `shaken` weights: one independent rounding for each of a layer's seven linear layers. Fast
    and stock differ by the roundings that they do not share, at most four for each linear layer (the low-rank products,
    their scaling, the sum) and ten for norms, RoPE, SwiGLU and residuals: at most sqrt(38 / 7) = 2.3 times as far, and
    each gap is a single draw. On a CPU the ratio is 0.5 in fp16 and 0.8 to 1.1 in bf16.
    """
    assert len(fast) == len(stock) == len(twin) and stock[-1] < 0.95 * stock[0]
    spread = gap(twin, stock)
    assert 0 < spread < 0.01, "the training itself amplifies roundings too much to compare anything"
    assert gap(fast, stock) <= 3 * spread, (gap(fast, stock), spread)


def train(model, steps: int, *, autocast: torch.dtype | None, lr: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The usual loop; the losses and the parameters after it."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    losses = []
    for i in range(steps):
        with nullcontext() if autocast is None else torch.autocast(DEVICE, dtype=autocast):
            loss = model(**inputs_of(i % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist(), {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_bf16_autocast_lora():
    model, steps = adapted(), 30
    stock, _ = train(copy.deepcopy(model), steps, autocast=BF16, lr=2e-3)
    twin, _ = train(shaken(model, BF16), steps, autocast=BF16, lr=2e-3)
    before = counts()
    with patched(*EVERYTHING):
        fast, parameters = train(copy.deepcopy(model), steps, autocast=BF16, lr=2e-3)
        again, same = train(copy.deepcopy(model), steps, autocast=BF16, lr=2e-3)
    assert since(before)["llama.attention"] == (2 * steps * LAYERS, 0, 2 * steps * LAYERS)
    assert since(before)["llama.loss"] == (2 * steps, 0, 2 * steps)
    assert_on_top(fast, stock, twin)
    assert fast == again and all(torch.equal(parameters[n], same[n]) for n in parameters)


def test_bf16_full_fine_tuning_with_tied_head():
    """Pure bf16: each gradient as good as stock's, above all the one that the head and the embedding both add to."""
    model = llama(BF16, tie_word_embeddings=True, **SIZE).to(DEVICE)
    inputs = inputs_of()
    exact, stock = oracle(model, inputs), run(model, inputs)
    before = counts()
    with patched(*EVERYTHING):
        fast = run(model, inputs)
    assert since(before)["llama.mlp"] == (LAYERS, 0, LAYERS) and since(before)["llama.loss"] == (1, 0, 1)
    assert "lm_head.weight" not in fast.grads
    assert_as_good(fast, stock, exact)

    twin, _ = train(shaken(model, BF16), 10, autocast=None, lr=1e-3)
    slow, _ = train(copy.deepcopy(model), 10, autocast=None, lr=1e-3)
    with patched(*EVERYTHING):
        quick, _ = train(copy.deepcopy(model), 10, autocast=None, lr=1e-3)
    assert_on_top(quick, slow, twin)


# ---- fp16 with a GradScaler


class _Scales(TrainerCallback):
    """The scale after each step, which falls exactly when the step was skipped.

    (accelerate's ``optimizer_step_was_skipped`` is never true with fused optimizers, which skip on the device.)
    """

    def __init__(self, scaler) -> None:
        self.scaler = scaler
        self.seen = [scaler.get_scale()]

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.scaler.get_scale())


def _completions() -> list[dict[str, Any]]:
    """Few labels count, as in fine-tuning on short answers: the gradients of a mean over few tokens are large."""
    rows = []
    for i in range(16 * ROWS):
        inputs = batch(rows=1, length=LENGTH, seed=i, vocab=VOCAB)
        rows.append({"input_ids": inputs["input_ids"][0], "labels": inputs["labels"][0]})
        rows[-1]["labels"][:-2] = -100
    return rows


def train_fp16(model, folder, steps: int) -> tuple[list[float], list[float]]:
    """Losses and scales of a Trainer with ``fp16=True``, whose scaler starts at 2**16."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=ON_GPU,
        use_cpu=not ON_GPU,
        fp16=ON_GPU,
        bf16=not ON_GPU,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise Trainer wraps the model in DataParallel
    trainer = Trainer(model=model, args=arguments, train_dataset=_completions())
    if not ON_GPU:
        # accelerate refuses fp16 on a CPU; torch does not.
        trainer.accelerator.state._shared_state["_mixed_precision"] = "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scales = _Scales(trainer.accelerator.scaler)
    trainer.add_callback(scales)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], scales.seen


def largest_finite_scale(model, seed: int) -> int:
    """The exponent of the largest loss scale that leaves every gradient finite: what a GradScaler looks for."""
    for exponent in range(10, 30):
        with torch.autocast(DEVICE, dtype=FP16):
            loss = model(**inputs_of(seed)).loss
        (loss * 2.0**exponent).backward()
        finite = torch.stack([p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]).all()
        model.zero_grad()
        if not finite:
            return exponent - 1
    raise AssertionError("nothing overflows")


@pytest.mark.parametrize("full", [False, True])
def test_fp16_overflows_where_stock_does(full):
    """A gradient that stock's fp16 cannot hold is not finite here either, although float32 sums could hold it."""
    model = llama(**SIZE).to(DEVICE) if full else adapted(FP32)
    # Batches whose largest gradient is no nearer than 5 % to a power of two times fp16's largest number.
    seeds = (1, 2, 3)
    stock = [largest_finite_scale(model, seed) for seed in seeds]
    before = counts()
    with patched(*EVERYTHING):
        fast = [largest_finite_scale(model, seed) for seed in seeds]
    assert since(before)["llama.attention"][2] == LAYERS * sum(exponent - 8 for exponent in fast)
    assert fast == stock


def test_fp16_trainer_skips_the_steps_that_stock_skips(tmp_path):
    """From 2**16, where the first gradients overflow; no step later on is near enough for roundings to decide."""
    steps = 200 if ON_GPU else 60
    model = adapted(FP32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    stock, stock_scales = train_fp16(copy.deepcopy(model), tmp_path, steps)
    twin, twin_scales = train_fp16(shaken(model, FP16), tmp_path, steps)
    before = counts()
    with patched(*EVERYTHING):
        fast, scales = train_fp16(copy.deepcopy(model), tmp_path, steps)
    assert since(before)["llama.attention"] == (steps * LAYERS, 0, steps * LAYERS)
    assert since(before)["llama.loss"] == (steps, 0, steps)
    skipped = [i for i in range(steps) if stock_scales[i + 1] < stock_scales[i]]
    assert stock_scales[0] == 2.0**16 and skipped and skipped[0] < 3
    assert twin_scales == stock_scales, "no margin: roundings alone decide whether a step overflows"
    assert scales == stock_scales, (skipped, [i for i in range(steps) if scales[i + 1] < scales[i]])
    assert_on_top(fast, stock, twin)


# ---- checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_disabled_round_the_forward_only(reentrant):
    """What the forward decided is repeated in autograd's own thread. Eager attention, which is deterministic."""
    model = adapted(dropout=0.1, checkpoint=reentrant, attn_implementation="eager")
    stock = step(model)
    before, told = counts(), fallbacks("llama.checkpointing").get("disabled", 0)
    with patched(*EVERYTHING):
        torch.manual_seed(7)
        with disabled(), torch.autocast(DEVICE, dtype=BF16):
            output = model(**inputs_of(), use_cache=False)
        output.loss.backward()
    assert not any(map(any, since(before).values()))
    assert fallbacks("llama.checkpointing")["disabled"] == told + 2 * LAYERS
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_identical(stock._replace(loss=output.loss.detach(), grads=grads), stock)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_equals_not_checkpointed(reentrant, dropout):
    model = adapted(dropout=dropout)
    with patched(*EVERYTHING):
        before = counts()
        plain = step(model)
        assert since(before)["llama.mlp"] == (LAYERS, 0, LAYERS)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        before = counts()
        recomputed = step(model)
        got = since(before)
        other = step(model, seed=8)
    assert_identical(recomputed, plain)
    assert torch.equal(other.loss, plain.loss) is (dropout == 0.0)
    # No backward of a norm's own counts where its input asks for no gradient; the loss is outside the regions.
    again = LAYERS - 1  # the loss follows the last
    assert got["llama.attention"] == got["llama.mlp"] == (LAYERS, again, LAYERS)
    assert got["llama.rms_norm"] == (2 * LAYERS + 1, 2 * again, 2 * LAYERS + 1)
    assert got["llama.loss"] == (1, 0, 1) and got["llama.checkpointing"][:2] == (LAYERS, again)


# ---- torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compile(fresh_dynamo):
    """``torch.compile(model)`` traces stock code, so the same graph as without the patches."""
    model = lora(llama(**{**SIZE, "num_hidden_layers": 1})).to(DEVICE)
    options: dict[str, Any] = {} if ON_GPU else {"backend": "aot_eager"}

    def compiled():
        torch._dynamo.reset()
        return run(torch.compile(model, **options), inputs_of(), keep_logits=False)

    stock = compiled()
    before, told = counts(), fallbacks("llama.attention").get("compiling", 0)
    with patched(*EVERYTHING):
        fast = compiled()
    assert not any(map(any, since(before).values()))
    assert fallbacks("llama.attention")["compiling"] == told + 1
    assert stock.grads.keys() == fast.grads.keys()
    # Not bitwise: inductor may time its kernels anew and choose another order of summation.
    assert distance(fast.loss, stock.loss) <= 1e-6
    assert max(distance(fast.grads[n], stock.grads[n]) for n in stock.grads) <= 1e-5


# ---- memory, waiting


def peak(model, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that a step needs at most beside what is there before it."""
    step(model, inputs=inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, inputs=inputs)
    return torch.cuda.max_memory_allocated() - before


@only_on_gpu
@pytest.mark.parametrize("checkpoint", [None, False])
def test_peak_memory(checkpoint):
    """At its peak stock holds logits and their gradient in float32: the fast path saves one of them at least."""
    rows, length, vocab = 4, 512, 32000
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    model = adapted(checkpoint=checkpoint, vocab_size=vocab, max_position_embeddings=length, **size)
    inputs = batch(rows=rows, length=length, vocab=vocab)
    stock = peak(model, inputs)
    before = counts()
    with patched(*EVERYTHING):
        fast = peak(model, inputs)
    assert since(before)["llama.mlp"][0] == 2 * LAYERS and since(before)["llama.loss"] == (2, 0, 2)
    assert fast < stock - 4 * rows * length * vocab, (fast / 2**20, stock / 2**20)


@contextmanager
def waiting_is_an_error():
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dropout", "checkpoint"), [(0.0, None), (0.1, True), (0.1, False)])
def test_never_waits(dropout, checkpoint, monkeypatch):
    """No synchronising call, and one wait for an event: that of the number of labels, recorded before the first layer.

    The mask is a 4-D one: what transformers derives from any other, or from none, waits by itself.
    """
    model, inputs = adapted(dropout=dropout, checkpoint=checkpoint), inputs_of()
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril().expand(ROWS, 1, -1, -1)
    items, waits = torch.tensor(17, device=DEVICE), []
    synchronize = torch.cuda.Event.synchronize

    def loss():
        with torch.autocast(DEVICE, dtype=BF16):
            return model(**inputs, attention_mask=mask, num_items_in_batch=items, use_cache=False).loss

    with patched(*EVERYTHING):
        loss().backward()  # compiles
        monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(event), synchronize(event)))
        before = counts()
        with waiting_is_an_error():
            loss().backward()
    recomputed = 0 if checkpoint is None else LAYERS - 1
    assert since(before)["llama.attention"] == since(before)["llama.mlp"] == (LAYERS, recomputed, LAYERS)
    assert since(before)["llama.loss"] == (1, 0, 1)
    assert len(waits) == (1 if ON_GPU else 0)


# ---- streams, devices


@only_on_gpu
def test_another_stream():
    """The weights become right late, and only on the second stream: a launch on any other would use zeros."""
    model = adapted(dropout=0.1, checkpoint=False)
    weights = [p.detach().clone() for p in model.parameters()]
    inputs = inputs_of()
    with patched(*EVERYTHING):
        expected = step(model, inputs=inputs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            with torch.no_grad():
                for parameter, weight in zip(model.parameters(), weights):
                    parameter.copy_(weight)
            got = step(model, inputs=inputs)
        side.synchronize()
    assert_identical(got, expected)


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device():
    """With device 0 the current one throughout."""
    model = adapted(dropout=0.1, checkpoint=False)
    with patched(*EVERYTHING):
        expected = step(model)
        before = counts()
        got = step(model.to("cuda:1"), inputs=inputs_of(device="cuda:1"))
    assert since(before)["llama.mlp"] == (LAYERS, LAYERS, LAYERS)
    assert got.loss.device.index == 1 and torch.cuda.current_device() == 0
    grads = {n: g.to(DEVICE) for n, g in got.grads.items()}
    assert_identical(got._replace(loss=got.loss.to(DEVICE), grads=grads), expected)
