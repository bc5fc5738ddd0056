"""ops.linear_cross_entropy against its reference in float64: loss, gradients, ignored rows, chunks, dtypes, waiting."""

from __future__ import annotations

import os
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fast_unsloth_patch.ops import kept_labels
from fast_unsloth_patch.ops import linear_cross_entropy as op
from fast_unsloth_patch.ops.linear_cross_entropy import linear_cross_entropy, prepare_labels
from fast_unsloth_patch.reference.linear_cross_entropy import linear_cross_entropy_ref
from fast_unsloth_patch.status import Tally

FP32 = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def operands(tokens, vocab, width, dtype=torch.float32, device="cpu", ignored=0.3, seed=0):
    """Hidden states, a weight and labels of which about ``ignored`` do not count."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 2 / width**0.5
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    hidden, weight = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, labels.to(device)


def gradients(loss, *leaves, **kwargs):
    return torch.autograd.grad(loss, leaves, **kwargs)


def distance(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def check(hidden, weight, labels, tolerance=FP32, **kwargs):
    loss = linear_cross_entropy(hidden, weight, labels, **kwargs)
    dx, dw = gradients(loss, hidden, weight)
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = linear_cross_entropy_ref(h64, w64, labels, **kwargs)
    ex, ew = gradients(expected, h64, w64)
    assert loss.dtype is torch.float32 and loss.shape == expected.shape
    assert (dx.dtype, dw.dtype) == (hidden.dtype, weight.dtype)
    assert distance(loss, expected) < tolerance
    assert distance(dx, ex) < tolerance
    assert distance(dw, ew) < tolerance


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(11), torch.tensor([3])], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 17, 3), (37, 131, 24), (64, 256, 32)], ids=str)
def test_reference(shape, num_items, poisoned_empty):
    check(*operands(*shape, ignored=0.0 if shape[0] == 1 else 0.3), num_items=num_items)


@pytest.mark.parametrize("rows", [1, 256, 300])
def test_chunks(rows, monkeypatch, poisoned_empty):
    """More than one chunk, the last one shorter."""
    monkeypatch.setattr(op, "_CHUNK_BYTES", 4 * 19 * rows)
    assert op._chunk_rows(600, 19, 4) == 256 and op._chunk_rows(200, 19, 4) == 200
    check(*operands(900, 19, 8))


def test_chunk_rows():
    assert op._chunk_rows(8188, 128256, 2) == 2048
    assert op._chunk_rows(8188, 128256, 4) == 1024
    assert op._chunk_rows(511, 128256, 2) == 511
    # Equal chunks rather than a full one and a remainder.
    assert op._chunk_rows(2100, 128256, 2) == 1152
    assert op._chunk_rows(0, 128256, 2) == 1
    assert op._chunk_rows(8188, 128256, 2, lean=True) == 1024


def test_lean_chunks_are_half_as_large(monkeypatch):
    monkeypatch.setattr(op, "_CHUNK_BYTES", 4 * 19 * 512)
    sizes, chunk = [], op.cross_entropy_chunk
    monkeypatch.setattr(op, "cross_entropy_chunk", lambda x, *a, **k: sizes.append(x.shape[0]) or chunk(x, *a, **k))
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(19, 8)
    labels = torch.randint(0, 19, (1024,))
    results = []
    for lean in (False, True):
        loss = op.linear_cross_entropy(hidden, weight, labels, lean=lean)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    assert sizes == [512] * 2 + [256] * 4
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pattern", ["none", "first", "last", "all but one", "odd"])
def test_ignored(pattern):
    hidden, weight, labels = operands(12, 23, 8, ignored=0.0)
    rows = torch.arange(12)
    ignore = {"none": rows < 0, "first": rows == 0, "last": rows == 11, "all but one": rows != 5, "odd": rows % 2 == 1}
    labels[ignore[pattern]] = -100
    check(hidden, weight, labels)
    (dx,) = gradients(linear_cross_entropy(hidden, weight, labels), hidden)
    assert (dx[labels == -100] == 0).all() and (dx[labels != -100] != 0).any(dim=1).all()


def test_other_ignore_index():
    hidden, weight, labels = operands(12, 23, 8, ignored=0.0)
    labels[::3] = 4
    check(hidden, weight, labels, ignore_index=4)


@pytest.mark.parametrize("num_items", [None, 5])
def test_all_ignored(num_items):
    hidden, weight, labels = operands(6, 11, 4)
    labels.fill_(-100)
    loss = linear_cross_entropy(hidden, weight, labels, num_items=num_items)
    expected = linear_cross_entropy_ref(hidden, weight, labels, num_items=num_items)
    assert torch.equal(loss.isnan(), expected.isnan()) and (num_items is None or loss == 0)
    for mine, stock in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight)):
        assert torch.equal(mine, stock) and (mine == 0).all()


def test_dropped_before_the_gemm(monkeypatch):
    """Rows that do not count reach no GEMM."""
    hidden, weight, labels = operands(40, 16, 4)
    rows = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: rows.append(a.shape[0]) or mm(a, b, **kw))
    linear_cross_entropy(hidden, weight, labels)
    assert rows[:2] == [(labels != -100).sum()] * 2


def test_only_what_is_needed(monkeypatch):
    """A frozen weight has no dW, and without gradients there is one GEMM."""
    hidden, weight, labels = operands(20, 16, 4)
    calls = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: calls.append(a.shape) or mm(a, b, **kw))
    full = linear_cross_entropy(hidden, weight, labels)
    assert len(calls) == 3
    frozen = linear_cross_entropy(hidden, weight.detach(), labels)
    assert len(calls) == 5
    head_only = linear_cross_entropy(hidden.detach(), weight, labels)
    assert len(calls) == 7
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels)
    assert len(calls) == 8 and not plain.requires_grad
    assert full == frozen == head_only == plain
    assert torch.equal(gradients(full, hidden)[0], gradients(frozen, hidden)[0])
    (dw,) = gradients(linear_cross_entropy(hidden, weight, labels), weight)
    assert torch.equal(dw, gradients(head_only, weight)[0])


def test_scale_and_retained_graph():
    """The incoming gradient scales; a retained graph gives the same again; the count of backwards follows."""
    hidden, weight, labels = operands(20, 16, 4)
    tally = Tally("test")
    loss = linear_cross_entropy(hidden, weight, labels, tally=tally)
    first = gradients(loss, hidden, weight, retain_graph=True)
    second = gradients(loss * 3, hidden, weight, retain_graph=True)
    third = gradients(loss, hidden, weight)
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, c) and distance(b, 3 * a) < 1e-6
    assert tally.backward == 3
    with pytest.raises(RuntimeError):
        (dx,) = gradients(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
        dx.sum().backward()


def test_saved_through_hooks():
    """What backward needs goes through saved_tensors_hooks, so that it can be offloaded."""
    hidden, weight, labels = operands(20, 16, 4)
    expected = gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        loss = linear_cross_entropy(hidden, weight, labels)
    n = int((labels != -100).sum())
    assert (n, 4) in packed and (16, 4) in packed
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, hidden, weight), expected))


def test_bitwise_reproducible():
    hidden, weight, labels = operands(50, 64, 16)
    runs = [gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_cpu(dtype):
    """No further from float64 than stock is, and dtypes are kept."""
    hidden, weight, labels = operands(64, 128, 32, dtype)
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = gradients(linear_cross_entropy_ref(h64, w64, labels), h64, w64)
    stock = gradients(linear_cross_entropy_ref(hidden, weight, labels), hidden, weight)
    fast = gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    for e, s, f in zip(exact, stock, fast):
        # The CPU path rounds the GEMM's result once more than the CUDA path, which has fp32 outputs.
        assert f.dtype is dtype and distance(f, e) < 1.5 * distance(s, e)


def test_autocast():
    hidden, weight, labels = operands(32, 48, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        expected = linear_cross_entropy_ref(hidden, weight, labels)
    assert distance(loss, expected) < 1e-6
    for mine, stock in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight)):
        assert mine.dtype is torch.float32 and distance(mine, stock) < 2e-2
    # Rounded to bf16 on the way, as stock is: fp32 arithmetic would be nearer.
    assert distance(loss, linear_cross_entropy_ref(hidden, weight, labels)) > 1e-6


def test_float64():
    hidden, weight, labels = operands(16, 24, 8, torch.float64)
    check(hidden, weight, labels)


def some_labels(*shape, ignore_index=-100, ignored=0.3, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, shape, generator=generator)
    return labels.masked_fill_(torch.rand(shape, generator=generator) < ignored, ignore_index).to(device)


LABELS = {
    "rows of odd length": lambda **d: some_labels(3, 5, **d),
    "rows of one": lambda **d: some_labels(7, 1, ignored=0.0, **d),
    "one row": lambda **d: some_labels(37, **d),
    "three dimensions": lambda **d: some_labels(2, 3, 7, **d),
    "all ignored": lambda **d: some_labels(2, 6, ignored=1.0, **d),
    "none ignored": lambda **d: some_labels(2, 6, ignored=0.0, **d),
    "one block": lambda **d: some_labels(2, 2048, **d),
    "just over a block": lambda **d: some_labels(1, 4097, ignored=0.1, **d),
    "rows across blocks": lambda **d: some_labels(13, 701, **d),
    "a block of ignored ones": lambda **d: torch.cat([some_labels(4096, ignored=1.0, **d), some_labels(4500, **d)]),
    "no rows": lambda **d: some_labels(0, 5, **d),
    "empty rows": lambda **d: some_labels(2, 0, **d),
    "transposed": lambda **d: some_labels(5, 4, **d).t(),
    "every other": lambda **d: some_labels(3, 22, **d)[:, 1::2],
    "expanded": lambda **d: some_labels(1, 9, **d).expand(4, 9),
    "part of a tensor": lambda **d: some_labels(5, 9, **d)[1:],
    "int32": lambda **d: some_labels(3, 9, **d).int(),
}


def shifted_by_hand(labels, ignore_index=-100):
    ends = labels.new_full((*labels.shape[:-1], 1), ignore_index)
    return torch.cat([labels, ends], dim=-1)[..., 1:].flatten()


@pytest.fixture
def launches(monkeypatch):
    seen = []
    launch = kept_labels.launch
    monkeypatch.setattr(kept_labels, "launch", lambda kernel, *a, **k: seen.append(kernel) or launch(kernel, *a, **k))
    return seen


def check_kept(kept, target, ignore_index=-100):
    """Against ``nonzero`` on the shifted labels; nothing beyond the count is looked at."""
    n = kept.count()
    rows = (target != ignore_index).nonzero().flatten()
    assert n == len(rows) and kept.total == target.numel()
    assert kept.rows.dtype is kept.labels.dtype is torch.int64 and kept.rows.shape == kept.labels.shape == (kept.total,)
    assert torch.equal(kept.rows[:n].cpu(), rows) and torch.equal(kept.labels[:n].cpu(), target[rows].long())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LABELS)
def test_kept(name, device, launches, poisoned_empty):
    """Labels shifted as stock shifts, or given as shift_labels; the kernel and torch's operators find the same."""
    labels, there = LABELS[name](), LABELS[name](device=device)
    assert there.stride() == labels.stride()
    check_kept(prepare_labels(there, vocab_size=50), shifted_by_hand(labels))
    check_kept(prepare_labels(there, there, vocab_size=50), labels.flatten())
    check_kept(prepare_labels(None, there[None, ..., None], vocab_size=50), labels.flatten())
    assert launches == [kept_labels._kept_labels_kernel] * (3 if INTERPRETED or device == "cuda" else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ignore_index", [4, 0, -1, 49, 2**40])
def test_kept_other_ignore_index(ignore_index, device, poisoned_empty):
    labels = some_labels(3, 41, ignore_index=ignore_index)
    how = {"vocab_size": 50, "ignore_index": ignore_index}
    check_kept(prepare_labels(labels.to(device), **how), shifted_by_hand(labels, ignore_index), ignore_index)
    check_kept(prepare_labels(labels, labels.to(device), **how), labels.flatten(), ignore_index)


@pytest.mark.parametrize("device", DEVICES)
def test_kept_counts_bad_labels(device):
    """All of them in all blocks, but neither an ignored one nor the first of a row, which nothing predicts."""
    labels = some_labels(3, 3001)
    labels[0, 7], labels[1, 3000], labels[2, 1], labels[2, 2999] = 50, -1, 2**40, -(2**33) - 100
    labels[1, 0] = 77
    for bad, shift_labels in ((4, None), (5, labels.to(device))):
        with pytest.raises(IndexError, match=rf"^Target is out of bounds: {bad} labels are outside \[0, 50\)$"):
            prepare_labels(labels.to(device), shift_labels, vocab_size=50).count()
    labels = torch.tensor([[99, 3, 99, 0]], device=device)
    check_kept(prepare_labels(labels, vocab_size=4, ignore_index=99), torch.tensor([3, 99, 0, 99]), 99)


def test_kept_elsewhere(launches, monkeypatch):
    """For hidden states on another device; and more positions than the kernel counts are left to torch."""
    labels = some_labels(3, 5)
    kept = prepare_labels(labels, vocab_size=50, device=torch.device("meta"))
    assert kept.rows.is_meta and kept.labels.is_meta
    assert kept.count() == (labels[:, 1:] != -100).sum()
    before = len(launches)
    monkeypatch.setattr(kept_labels, "_MAX_TOKENS", 14)
    check_kept(prepare_labels(labels, vocab_size=50), shifted_by_hand(labels))
    assert len(launches) == before == int(INTERPRETED)


@pytest.mark.parametrize("device", DEVICES)
def test_kept_is_one_launch(device, monkeypatch):
    """Beside the kernel nothing runs but, on CUDA, the copy of the counts: other operators make tensors or views."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen, launched = [], []
    monkeypatch.setattr(kept_labels, "use_triton", lambda t: True)
    monkeypatch.setattr(kept_labels, "launch", lambda kernel, grid, *a, **k: launched.append(grid))
    labels = some_labels(3, 9).to(device)
    for shift_labels in (None, labels):
        with Recorder():
            prepare_labels(labels, shift_labels, vocab_size=50)
    assert launched == [(1,)] * 2
    assert set(seen) <= {"empty", "new_empty", "view", "detach", "copy_"} and seen.count("copy_") == 2 * (
        device == "cuda"
    )


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
def test_kept_is_compiled_once():
    """Not for each number of tokens, length of rows, vocabulary or ignored label; shifting makes another kernel."""
    pytest.importorskip("triton")
    import kernel_cases

    from fast_unsloth_patch.device.launch import target_limits

    with kernel_cases.recorded(target_limits(90)) as launched:
        for shape, vocab, ignore_index in (((1, 1), 1, -100), ((2, 16), 16, 1), ((3, 7), 50, 16), ((9001,), 128256, 0)):
            labels = torch.empty(shape, dtype=torch.int64, device="meta")
            for shift_labels in (None, labels):
                prepare_labels(labels, shift_labels, vocab_size=vocab, ignore_index=ignore_index)
    cases = [kernel_cases._as_case("", *parts) for parts in launched]
    assert len(cases) == 8 and len(set(cases)) == 2


@pytest.mark.parametrize("bad", [5, -1, -99, 2**40])
def test_label_out_of_range(bad):
    hidden, weight, labels = operands(6, 5, 4, ignored=0.0)
    labels[2] = bad
    with pytest.raises(IndexError, match="1 labels are outside"):
        linear_cross_entropy(hidden, weight, labels)


def test_bad_input():
    hidden, weight, labels = operands(6, 5, 4)
    with pytest.raises(TypeError, match="no autocast"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="5 labels for 6 rows"):
        linear_cross_entropy(hidden, weight, labels[:5])
    with pytest.raises(ValueError, match="expected hidden"):
        linear_cross_entropy(hidden[:, :3], weight, labels)
    with pytest.raises(ValueError, match="labels or kept"):
        linear_cross_entropy(hidden, weight, None)


def test_interpreter(run_python):
    """The kernel itself, in float32 and float16 under Triton's interpreter: ragged sizes, extreme logits, strides."""
    code = """
        import torch
        from fast_unsloth_patch.ops import linear_cross_entropy as op
        from fast_unsloth_patch.device.dispatch import use_triton
        from tests.test_linear_cross_entropy import check, operands

        assert use_triton(torch.zeros(1))
        launched = []
        launch = op.launch
        op.launch = lambda kernel, grid, *a, **k: launched.append(grid) or launch(kernel, grid, *a, **k)
        check(*operands(9, 53, 8))
        assert launched
        op._BLOCK = 32
        for vocab in (1, 31, 32, 33, 100):
            check(*operands(5, vocab, 8, ignored=0.0))
        # -inf, a whole block of it, and logits that overflow exp.
        for scale in (1.0, 300.0):
            x = torch.randn(4, 80) * scale
            x[0, :40] = -float("inf")
            x[1, 3] = -float("inf")
            wide = torch.cat([x, torch.full((4, 16), float("nan"))], dim=1)
            labels = torch.tensor([50, 7, 79, 0])
            losses = torch.empty(4)
            grad = wide.clone()[:, :80]
            op.cross_entropy_chunk(grad, labels, losses, grad=True, scale=2.0)
            leaf = x.double().requires_grad_()
            expected = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
            expected.sum().backward()
            torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad.double(), 2 * leaf.grad, rtol=1e-5, atol=1e-6)
            only = x.clone()
            op.cross_entropy_chunk(only, labels, losses, grad=False, scale=1.0)
            assert torch.equal(only, x)
            torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        h, w, l = operands(9, 53, 8, torch.float16)
        check(h, w, l, tolerance=3e-3)
        print("fine", len(launched))
    """
    result = run_python(textwrap.dedent(code), env={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0 and result.stdout.startswith("fine"), result.stderr[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_kept_in_the_interpreter(run_python):
    """The kernel that finds the rows; and the loss, with poison where it found none."""
    chosen = ("-q", "-x", "-m", "not gpu", "-k", "kept or reference or all_ignored or out_of_range")
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", *chosen, __file__))
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 7, 8), (515, 1003, 72), (300, 32000, 256), (5000, 50257, 128)], ids=str)
def test_gpu(shape, dtype, monkeypatch):
    """Against float64: fp32 within 1e-5, low precision no further than stock is."""
    monkeypatch.setattr(op, "_CHUNK_BYTES", 64 * 2**20)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    ignored = 0.0 if shape[0] == 3 else 0.3
    errors = {"stock": [], "fast": []}
    for seed in range(4):
        hidden, weight, labels = operands(*shape, dtype, "cuda", ignored, seed)
        h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        exact = linear_cross_entropy_ref(h64, w64, labels)
        exact = (exact.detach(), *gradients(exact, h64, w64))
        for kind, function in (("stock", linear_cross_entropy_ref), ("fast", linear_cross_entropy)):
            loss = function(hidden, weight, labels)
            results = (loss.detach(), *gradients(loss, hidden, weight))
            assert results[1].dtype is results[2].dtype is dtype
            errors[kind].append([distance(a, b) for a, b in zip(results, exact)])
    stock, fast = (torch.tensor(errors[k]).square().mean(0).sqrt() for k in ("stock", "fast"))
    limit = torch.full((3,), FP32) if dtype is torch.float32 else 1.1 * stock
    # Four losses are too few to pool: a loss is held to the size of its own rounding.
    limit[0] = max(limit[0].item(), torch.finfo(dtype).eps)
    assert (fast <= limit).all(), (fast, stock)


@pytest.mark.gpu
def test_gpu_fp16_loss_scale():
    """A GradScaler's 65536 in fp16, at a vocabulary whose probabilities are below fp16's normal range."""
    hidden, weight, labels = operands(2048, 128256, 64, torch.float16, "cuda")
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = gradients(linear_cross_entropy_ref(h64, w64, labels) * 65536, h64, w64)
    stock = gradients(linear_cross_entropy_ref(hidden, weight, labels) * 65536, hidden, weight)
    fast = gradients(linear_cross_entropy(hidden, weight, labels) * 65536, hidden, weight)
    for e, s, f in zip(exact, stock, fast):
        assert f.isfinite().all() and distance(f, e) <= 1.1 * distance(s, e)


@pytest.mark.gpu
def test_gpu_never_waits():
    """Nothing synchronises once the labels are prepared, forward or backward."""
    hidden, weight, labels = operands(512, 1000, 64, torch.bfloat16, "cuda")
    gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)  # compiles
    items = torch.tensor(300, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = prepare_labels(labels, labels, vocab_size=1000)
        for n in (None, 300, items):
            gradients(linear_cross_entropy(hidden, weight, None, kept=kept, num_items=n), hidden, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_count_does_not_wait_for_later_work():
    labels = torch.arange(64, device="cuda")
    prepare_labels(labels, labels, vocab_size=64).count()
    torch.cuda.synchronize()
    kept = prepare_labels(labels, labels, vocab_size=64)
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    done.record()
    assert kept.count() == 64
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_bitwise_and_bounds():
    hidden, weight, labels = operands(3000, 5003, 96, torch.bfloat16, "cuda")
    runs = [gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    labels[7] = 5003
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, labels)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_memory():
    """Far below the logits, which are 2 GiB in bf16 and 4 in fp32."""
    hidden, weight, labels = operands(8192, 128256, 256, torch.bfloat16, "cuda", ignored=0.0)
    weight = weight.detach()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(linear_cross_entropy(hidden, weight, labels), hidden)
    assert torch.cuda.max_memory_allocated() - before < 600 * 2**20
