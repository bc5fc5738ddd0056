"""``recompute="auto"`` and ``"offload"``: what is kept, that it fits, that no number changes, where they stand back.

On the CPU memory is simulated: :class:`Memory` counts what a kept or recomputed layer would hold, from its forward to
its backward, and refuses more than there is. Copies to the host are made at once by :class:`Copier`, which writes down
their order.
"""

from __future__ import annotations

import gc
import random
import sys
from functools import partial

import pytest
import torch
from tiny_llama import LAYERS, batch, llama, lora, patched, run
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import fast_unsloth_patch
from fast_unsloth_patch.patches import budget, checkpointing, offload, recompute
from fast_unsloth_patch.patches.layer_end import is_plain_checkpoint
from fast_unsloth_patch.status import tally
from fast_unsloth_patch.switch import disabled, keep_stock

NAME = "_gradient_checkpointing_func"
TALLY = tally("llama.checkpointing")
MANY = 6
# Bytes that a layer holds for a token: far more than the tensors of these models, which are not counted.
TOKEN = 1 << 20


class Memory:
    """A device whose memory is counted: layers hold ``TOKEN`` a token, the loss takes ``head`` a token for a moment."""

    def __init__(self, limit, head=1.0, base=0):
        self.limit = limit
        self.head = head
        self.allocated = self.peak = self.highest = base
        self.pressure = 0
        self.held = {}
        self.inputs = []

    def __call__(self, device):
        return budget.Memory(self.allocated, self.peak, self.limit, self.pressure)

    def take(self, size):
        self.allocated += int(size)
        self.peak = max(self.peak, self.allocated)
        self.highest = max(self.highest, self.allocated)
        if self.allocated > self.limit:
            raise MemoryError(f"{self.allocated / TOKEN:.1f} of {self.limit / TOKEN:.1f}")

    def give(self, size):
        self.allocated -= int(size)


class _Hold(torch.autograd.Function):
    """Stands at the start of an MLP: its layer's activations come into being, and are let go behind it in backward."""

    @staticmethod
    def forward(ctx, x, memory, mlp, size):
        ctx.memory, ctx.mlp = memory, mlp
        if size:
            memory.take(size)
            memory.held.setdefault(mlp, []).append(size)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        ctx.memory.give(ctx.memory.held[ctx.mlp].pop())
        return dy, None, None, None


class Training:
    """A tiny model under gradient checkpointing with counted memory; its optimizer has state from the first step on."""

    def __init__(self, memory, use_reentrant=False, layers=MANY, state=0):
        self.memory = memory
        self.model = llama(num_hidden_layers=layers, hidden_size=16, intermediate_size=24, num_attention_heads=2)
        self.checkpoint(partial(checkpoint, use_reentrant=use_reentrant))
        self.layers = layers
        self.calls = []
        self.kept_layers = []
        training = self

        class Optimizer(torch.optim.SGD):
            def step(self):
                nonlocal state
                memory.take(state)
                state = 0
                super().step()
                assert training.memory is memory

        self.optimizer = Optimizer(self.model.parameters(), lr=0.0)

    def checkpoint(self, function):
        self.model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)

    def forward(self, tokens, rows=1):
        inputs = batch(rows=rows, length=tokens // rows)
        loss = self.model(**inputs, use_cache=False).loss
        self.memory.take(self.memory.head * tokens * TOKEN)
        self.memory.give(self.memory.head * tokens * TOKEN)
        return loss

    def step(self, *micro, together=False):
        """One optimizer step over batches of so many tokens; returns how many layers each forward kept."""
        before = TALLY.recomputed
        self.model.zero_grad(set_to_none=True)
        kept, losses = [], []
        for tokens in micro:
            start = len(self.kept_layers)
            loss = self.forward(tokens)
            kept.append(len(self.kept_layers) - start)
            losses.append(loss)
            if not together:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        self.optimizer.step()
        assert TALLY.recomputed - before == self.layers * len(micro) - sum(kept)
        return kept if len(micro) > 1 else kept[0]

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}


@pytest.fixture
def training(monkeypatch):
    """Makes a :class:`Training` under a policy; the patches are off again afterwards."""
    stock = LlamaMLP.forward
    made = []

    def make(memory, policy="auto", **options):
        checkpointing.set_policy("stock")
        checkpointing.set_policy(policy)
        monkeypatch.setattr(budget, "memory_of", memory)
        run = Training(memory, **options)

        def forward(mlp, x):
            region = checkpointing._REGION.get()
            if torch.is_grad_enabled():
                if region is not None and region.keeps:
                    run.kept_layers.append(region.layer.self_attn.layer_idx)
                holds = region is None or region.keeps or region.recompute
                tokens = x.shape[0] * x.shape[1]
                x = _Hold.apply(x, memory, mlp, TOKEN * tokens if holds else 0)
            return stock(mlp, x)

        monkeypatch.setattr(LlamaMLP, "forward", forward)
        made.append(run)
        return run

    setattr(LlamaDecoderLayer, NAME, checkpointing.checkpointing_func(None, TALLY))
    yield make
    delattr(LlamaDecoderLayer, NAME)
    checkpointing.set_policy("full")


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
class TestAuto:
    def test_keeps_the_last_layers_as_far_as_memory_allows(self, training, use_reentrant):
        # Full needs the state and max(head, one layer); 6 tokens' worth of layers fit besides, less the margins.
        memory = Memory(limit=int(80 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant, state=4 * TOKEN)
        kept = [run.step(12) for _ in range(10)]
        assert kept[:2] == [0, 0] and kept[2] == 2 and kept == sorted(kept)
        # 0.95 * 80 - 12 of margin, less 16 at the peak of the full step, is room for 4.
        assert kept[-1] == kept[-2] == 4
        assert run.kept_layers[-4:] == [2, 3, 4, 5]
        assert memory.allocated == 4 * TOKEN
        assert "4 of 6 layers kept on cpu (12 MiB each at 12 tokens" in checkpointing.describe()

    def test_numbers_are_those_of_full(self, training, use_reentrant):
        wanted = training(Memory(1 << 40), "full", use_reentrant=use_reentrant)
        wanted.step(12)
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(7)][-1] == MANY
        assert all(torch.equal(grad, wanted.gradients()[name]) for name, grad in run.gradients().items())

    def test_all_kept_when_all_fit(self, training, use_reentrant, capsys):
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(6)] == [0, 0, 6, 6, 6, 6]
        said = capsys.readouterr().err
        assert said.count("recompute: auto: 6 of 6 layers kept") == 1

    def test_a_larger_shape_is_full_and_measured_again(self, training, use_reentrant):
        memory = Memory(limit=int(120 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(8)][-1] == 6
        assert run.step(20) == 0
        after = [run.step(20) for _ in range(6)]
        # 114 - 20 - 20 is room for 3.
        assert after == sorted(after) and after[-1] == 3
        # The same bytes are more layers of a smaller shape.
        assert run.step(12) == 6
        assert run.step(16) == 4

    def test_same_tokens_in_longer_rows_are_a_larger_shape(self, training, use_reentrant):
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        forward = run.forward
        run.forward = partial(forward, rows=3)
        assert [run.step(12) for _ in range(4)][-1] == MANY
        run.forward = forward
        assert run.step(12) == 0

    def test_gradient_accumulation(self, training, use_reentrant):
        memory = Memory(limit=int(80 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant, state=4 * TOKEN)
        kept = [run.step(12, 12, 8) for _ in range(10)]
        assert kept[-1] == [4, 4, 6]

    def test_two_graphs_at_once_share_the_room(self, training, use_reentrant):
        memory = Memory(limit=int(100 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant)
        kept = [run.step(12, 12, together=True) for _ in range(10)]
        assert kept[-1] == kept[-2] and 3 <= sum(kept[-1]) <= 6

    def test_two_graphs_after_one_was_measured(self, training, use_reentrant):
        memory = Memory(limit=int(100 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(8)][-1] == 5
        kept = run.step(12, 12, together=True)
        assert kept[0] == 5 and kept[1] == 0

    def test_memory_that_others_take(self, training, use_reentrant):
        memory = Memory(limit=int(100 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(8)][-1] == 5
        memory.limit -= 30 * TOKEN
        assert run.step(12) == 3
        memory.limit += 30 * TOKEN
        memory.take(30 * TOKEN)
        assert run.step(12) == 3
        memory.give(30 * TOKEN)
        assert run.step(12) == 5

    def test_a_flushed_cache_ends_the_growth(self, training, use_reentrant):
        memory = Memory(limit=int(100 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(8)][-1] == 5
        loss = run.forward(12)
        memory.pressure += 1
        loss.backward()
        run.optimizer.step()
        assert [run.step(12) for _ in range(5)] == [2] * 5

    @pytest.mark.parametrize("when", ["before the forward", "before the optimizer"])
    def test_scripts_that_reset_the_peak(self, training, use_reentrant, when):
        memory = Memory(limit=int(100 * TOKEN))
        run = training(memory, use_reentrant=use_reentrant)
        kept = []
        for _ in range(8):
            start = len(run.kept_layers)
            if when == "before the forward":
                memory.peak = memory.allocated
            run.forward(12).backward()
            if when == "before the optimizer":
                memory.peak = memory.allocated
            run.optimizer.step()
            kept.append(len(run.kept_layers) - start)
        # A peak that was reset within the step is no measurement.
        assert kept[-1] == (5 if when == "before the forward" else 0)

    def test_another_model(self, training, use_reentrant):
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(4)][-1] == MANY
        other = Training(run.memory, use_reentrant)
        other.kept_layers = run.kept_layers
        assert [other.step(12) for _ in range(4)] == [0, 0, 6, 6]

    def test_what_full_fits_never_runs_out(self, training, use_reentrant):
        """Random lengths, accumulation and memory of others: whatever full recomputation fits, this fits."""
        draw = random.Random(0)
        kept = 0
        for _ in range(12):
            head = draw.choice([0.2, 1.0, 2.5])
            longest, state = draw.randint(8, 40), draw.randint(0, 40) * TOKEN
            full = max(head, 1.0) * longest * TOKEN + state
            run = training(Memory(full, head=head), use_reentrant=use_reentrant, layers=4, state=state)
            run.memory.limit = int(full * draw.uniform(1.0, 4.0))
            other = 0
            for _ in range(12):
                micro = [draw.randint(1, longest) for _ in range(draw.randint(1, 2))]
                kept += sum(run.step(*micro)) if len(micro) > 1 else run.step(*micro)
                room = max(0, run.memory.limit - full)
                run.memory.give(other)
                other = int(draw.choice([0.0, 0.0, 0.3]) * room)
                run.memory.take(other)
            assert run.memory.highest <= run.memory.limit
        assert kept > 100

    def test_no_optimizer_step_no_layer(self, training, use_reentrant):
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        for _ in range(4):
            run.forward(12).backward()
        assert run.kept_layers == []
        assert "all layers recomputed on cpu: first optimizer step" in checkpointing.describe()

    def test_stops_with_the_policy(self, training, use_reentrant):
        hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        assert [run.step(12) for _ in range(3)][-1] == MANY
        before = len(hooks)  # others have hooks too: the lazy logits
        checkpointing.set_policy("full")
        assert run.step(12) == 0 and len(hooks) == before - 1 and checkpointing.describe() == ""

    def test_policy_changed_between_forward_and_backward(self, training, use_reentrant):
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        run.step(12)
        wanted = run.gradients()
        assert [run.step(12) for _ in range(2)] == [0, MANY]
        run.model.zero_grad()
        loss = run.forward(12)
        checkpointing.set_policy("stock")
        loss.backward()
        assert all(torch.equal(grad, wanted[name]) for name, grad in run.gradients().items())


class TestAutoStandsBack:
    """Reasons for full recomputation: counted, and the memory is never asked."""

    def start(self, training, use_reentrant=False, steps=3):
        run = training(Memory(1 << 40), use_reentrant=use_reentrant)
        for _ in range(steps):
            run.step(12)
        run.kept_layers.clear()
        TALLY.fallbacks.clear()
        return run

    def test_no_budget_on_the_cpu(self, training, monkeypatch):
        run = training(Memory(1 << 40))
        monkeypatch.setattr(budget, "memory_of", lambda device: None)
        assert [run.step(12) for _ in range(4)] == [0] * 4
        assert TALLY.fallbacks == {"auto: no memory budget on cpu": 4 * MANY}

    def test_the_real_one_has_none(self):
        assert budget.memory_of(torch.device("cpu")) is None

    def test_disabled_and_keep_stock(self, training):
        run = self.start(training)
        with disabled():
            run.forward(12).backward()
        keep_stock(run.model)
        run.forward(12).backward()
        assert run.kept_layers == [] and TALLY.fallbacks == {"disabled": 2 * MANY}

    def test_other_checkpoint_function(self, training):
        run = self.start(training)

        def other(function, *args):
            return checkpoint(function, *args, use_reentrant=False)

        run.checkpoint(other)
        run.forward(12).backward()
        assert run.kept_layers == [] and TALLY.fallbacks["auto: other checkpoint function"] == MANY

    @pytest.mark.parametrize("outer_reentrant", [True, False])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_inside_a_region_of_the_scripts(self, training, use_reentrant, outer_reentrant):
        """The outer region's recompute must save what its forward has saved."""
        run = self.start(training, use_reentrant)
        wanted = run.gradients()
        run.model.zero_grad()
        base = run.model.model
        stock = type(base).forward
        ids = batch(rows=1, length=12)

        def around(embeds):
            return stock(base, inputs_embeds=embeds, use_cache=False).last_hidden_state

        hidden = checkpoint(around, base.embed_tokens(ids["input_ids"]), use_reentrant=outer_reentrant)
        logits = run.model.lm_head(hidden)
        run.model.loss_function(logits, ids["labels"], vocab_size=128).backward()
        assert run.kept_layers == []
        assert TALLY.fallbacks["auto: inside another region or saved-tensors hooks"] >= MANY
        for name, grad in run.gradients().items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-7)

    def test_saved_tensors_hooks_of_the_script(self, training):
        run = self.start(training)
        with torch.autograd.graph.save_on_cpu():
            run.forward(12).backward()
        assert run.kept_layers == []

    def test_no_gradients(self, training):
        run = self.start(training)
        with torch.no_grad():
            run.forward(12)
        run.model.eval()
        run.forward(12)
        assert run.kept_layers == []

    def test_reentrant_without_an_input_that_needs_a_gradient(self, training):
        """Stock trains nothing below the first such input then, and says so."""
        run = self.start(training, use_reentrant=True)
        run.model.model.embed_tokens.requires_grad_(False)
        run.model.zero_grad()
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
            run.forward(12).backward()
        assert run.kept_layers == []
        assert run.model.model.layers[-1].mlp.up_proj.weight.grad is None
        assert run.model.lm_head.weight.grad is not None

    @pytest.mark.parametrize("what", ["ds_id", "tensor parallelism", "unit", "attention", "mesh", "fsdp2 reentrant"])
    def test_what_communicates(self, monkeypatch, what):
        monkeypatch.setattr(budget, "several_ranks", lambda: True)
        layer = llama().model.layers[0]
        assert recompute.communication(layer, gathers=True) is None
        weight = layer.mlp.down_proj.weight
        mark = type("FSDPModule", (), {})
        if what == "ds_id":
            weight.ds_id, wanted = 1, "ZeRO-3"
        elif what == "tensor parallelism":
            layer.mlp.down_proj._is_hooked, wanted = True, "tensor parallelism"
        elif what == "unit":
            layer.mlp.__class__ = type("FSDPLlamaMLP", (mark, LlamaMLP), {})
            wanted = "units of FSDP inside the layer"
        elif what == "attention":
            layer.self_attn.config._attn_implementation, wanted = "ulysses", "attention ulysses"
        elif what == "mesh":
            weight.device_mesh, wanted = type("Mesh", (), {"ndim": 1}), "tensor parallelism"
        else:
            layer.__class__ = type("FSDPLlamaDecoderLayer", (mark, LlamaDecoderLayer), {})
            weight.device_mesh = type("Mesh", (), {"ndim": 1})
            assert recompute.communication(layer, gathers=False) is None
            wanted = "FSDP2 with reentrant checkpoints"
        assert recompute.communication(layer, gathers=True) == wanted
        monkeypatch.setattr(budget, "several_ranks", lambda: False)
        assert recompute.communication(layer, gathers=True) is None

    @pytest.mark.parametrize("counts", [None, "grows"])
    def test_collectives_in_the_recompute(self, training, monkeypatch, counts):
        calls = iter(range(1 << 20))
        monkeypatch.setattr(budget, "collectives", lambda: None if counts is None else (next(calls),))
        run = training(Memory(1 << 40))
        assert [run.step(12) for _ in range(5)] == [0] * 5
        reason = "collectives cannot be counted" if counts is None else "the recompute communicates"
        assert TALLY.fallbacks[f"auto: {reason}"] > 0 and reason in checkpointing.describe()


def test_status_shows_the_choice():
    try:
        status = fast_unsloth_patch.apply(recompute="auto")
        assert status.environment["recompute"] == "auto"
        assert "recompute: no layer has been checkpointed yet" in str(fast_unsloth_patch.status())
    finally:
        fast_unsloth_patch.apply()
        fast_unsloth_patch.unapply()
    assert fast_unsloth_patch.status().to_dict()["recompute_choice"] == ""


class Copier:
    """Copies at once; its log says what was started and what was waited for."""

    def __init__(self):
        self.log = []
        self.buffers = 0

    def pinned(self, size):
        self.buffers += 1
        return torch.full((size,), 255, dtype=torch.uint8)

    def copy(self, source, target):
        target.copy_(source)
        self.log.append(("copy", len(self.log)))
        return self.log[-1]

    def wait(self, event):
        self.log.append(("wait", event[1]))


@pytest.fixture
def host(monkeypatch):
    """The policy with a :class:`Copier` in place of the GPU's, for inputs of any size."""
    copier = Copier()
    monkeypatch.setattr(offload, "copier_of", lambda device: copier)
    monkeypatch.setattr(offload, "_SMALLEST", 0)
    checkpointing.set_policy("stock")
    checkpointing.set_policy("offload")
    yield copier
    checkpointing.set_policy("full")


def the_host():
    (host,) = checkpointing._runner.hosts.values()
    return host


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
class TestOffload:
    @pytest.fixture
    def model(self, use_reentrant):
        model = lora(llama(num_hidden_layers=MANY))
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model

    @pytest.fixture
    def wanted(self, model):
        with patched():
            return run(model, batch())

    def test_numbers_are_those_of_full(self, model, wanted, host):
        with patched():
            for _ in range(3):
                got = run(model, batch())
                assert torch.equal(got.loss, wanted.loss)
                assert all(torch.equal(grad, wanted.grads[name]) for name, grad in got.grads.items())
        assert the_host().stores == 3 * MANY
        # The last layer's input is still there.
        assert the_host().loads == 3 * (MANY - 1)
        assert host.buffers == MANY, "buffers are used again"
        assert TALLY.recomputed == 4 * MANY
        assert f"{3 * MANY} layer inputs sent from cpu" in checkpointing.describe()

    def test_two_inputs_at_most_are_on_the_device(self, model, wanted, host, monkeypatch):
        handles, most = [], []

        class Watched(offload._Offloaded):
            __slots__ = ()

            def __init__(self, *args):
                super().__init__(*args)
                handles.append(self)

            def unpack(self):
                tensor = super().unpack()
                # What is handed out, and what is on its way.
                most.append(1 + sum(handle.tensor is not None for handle in handles))
                return tensor

        def watch(layer, args):
            most.append(sum(handle.tensor is not None for handle in handles))

        monkeypatch.setattr(offload, "_Offloaded", Watched)
        monkeypatch.setattr(offload, "_unpack", lambda saved: saved.unpack() if type(saved) is Watched else saved)
        for layer in model.get_base_model().model.layers:
            layer.mlp.register_forward_pre_hook(watch)
        with patched():
            run(model, batch())
        assert len(handles) == MANY and max(most) == 2 and most.count(2) >= MANY - 1
        handles.clear()

    def test_memory_is_let_go_after_a_wait_for_its_copy(self, model, wanted, host):
        with patched():
            run(model, batch())
        started = [i for i, (what, _) in enumerate(host.log) if what == "copy"]
        waited = {event: i for i, (what, event) in enumerate(host.log) if what == "wait"}
        assert waited.keys() == set(started), "every copy is waited for"
        # In the forward the wait for a copy out comes before the copy out after the next.
        for first, third in zip(started[: MANY - 2], started[2:MANY]):
            assert waited[first] < third

    def test_second_backward(self, model, wanted, host):
        with patched():
            model.zero_grad()
            loss = model(**batch()).loss
            loss.backward(retain_graph=True)
            loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad / 2, wanted.grads[name], rtol=1e-5, atol=1e-8)

    def test_interleaved_graphs(self, model, wanted, host):
        with patched():
            model.zero_grad()
            for loss in [model(**batch()).loss for _ in range(2)]:
                loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad / 2, wanted.grads[name], rtol=1e-5, atol=1e-8)
        assert host.buffers == 2 * MANY

    def test_graph_that_is_dropped(self, model, wanted, host):
        with patched():
            for _ in range(3):
                output = model(**batch())
                del output
                gc.collect()
            assert host.buffers == MANY and len(the_host()._free) == MANY

    def test_growing_rows_replace_small_buffers(self, model, wanted, host):
        with patched():
            for length in (4, 12, 40, 12, 4):
                run(model, batch(length=length))
        free = the_host()._free
        assert len(free) == MANY and the_host().pinned == sum(buffer.nbytes for buffer in free)
        assert {buffer.nbytes for buffer in free} == {1 << (2 * 40 * 64 * 4 - 1).bit_length()}

    def test_stands_back(self, model, wanted, host, monkeypatch):
        with patched():
            with torch.no_grad():
                model(**batch())
            with torch.autograd.graph.save_on_cpu():
                run(model, batch())
            assert TALLY.fallbacks == {"offload: inside another region or saved-tensors hooks": MANY}
            with disabled():
                run(model, batch())
            keep_stock(model)
            run(model, batch())
        assert host.log == []

    def test_nothing_on_the_cpu(self, model, wanted, monkeypatch):
        monkeypatch.setattr(offload, "_SMALLEST", 0)
        checkpointing.set_policy("offload")
        try:
            with patched():
                got = run(model, batch())
        finally:
            checkpointing.set_policy("full")
        assert all(torch.equal(grad, wanted.grads[name]) for name, grad in got.grads.items())
        assert TALLY.fallbacks == {"offload: nothing to offload from cpu": MANY}


def test_plain_checkpoints():
    assert is_plain_checkpoint(checkpoint) and is_plain_checkpoint(partial(checkpoint, use_reentrant=False))
    assert not is_plain_checkpoint(partial(checkpoint, context_fn=lambda: None))
    assert LAYERS == 2
