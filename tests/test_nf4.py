"""bitsandbytes' 4-bit weights: the values to the bit, against an oracle in NumPy and against bitsandbytes itself.

The oracle needs no bitsandbytes, so that the layout and the kernel are tested without it. The file is run a second time
in the Triton interpreter; bfloat16 never goes there.
"""

import itertools
import os
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from fast_unsloth_patch.device import launch as _launch
from fast_unsloth_patch.reference.nf4 import CODES
from fast_unsloth_patch.weights import WeightLayoutError, dequantize_stacked, nf4
from fast_unsloth_patch.weights.dense import DenseWeight
from fast_unsloth_patch.weights.nf4 import Nf4Weight, layout_problem

INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)


def quantised(n, k, blocksize=64, quant_type="nf4", nested=True, stored=FP32, storage=torch.uint8, device="cpu"):
    """Random bytes, and a state with the fields of bitsandbytes' QuantState."""
    size = (n * k + 1) // 2
    size += -size % storage.itemsize
    packed = torch.randint(0, 256, (size,), dtype=torch.uint8)
    blocks = -(-n * k // blocksize)
    absmax, offset, second = 0.1 + torch.rand(blocks), None, None
    if nested:
        absmax, offset = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.tensor(0.37)
        # As many different mantissas as there can be: a fused multiply-add would show.
        second = SimpleNamespace(
            absmax=0.01 + torch.rand(-(-blocks // 256)).to(device),
            code=(torch.rand(256) * 2 - 1).to(device),
            blocksize=256,
            dtype=FP32,
            nested=False,
        )
    state = SimpleNamespace(
        absmax=absmax.to(device),
        shape=torch.Size((n, k)),
        code=torch.tensor(CODES[quant_type], device=device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=stored,
        offset=None if offset is None else offset.to(device),
        state2=second,
        nested=nested,
    )
    return packed.view(storage)[:, None].to(device), state


def oracle(packed, state):
    """Float32 [N, K] from the definition of the layout, an element at a time."""
    raw = packed.reshape(-1).view(torch.uint8).cpu().numpy()
    absmax = state.absmax.cpu().numpy()
    if state.nested:
        code2, absmax2 = state.state2.code.cpu().numpy(), state.state2.absmax.cpu().numpy()
        products = [np.float32(code2[a] * absmax2[i // state.state2.blocksize]) for i, a in enumerate(absmax)]
        absmax = [np.float32(p + np.float32(state.offset.item())) for p in products]
    code = np.array(CODES[state.quant_type], dtype=np.float32)
    n, k = state.shape
    values = np.empty(n * k, dtype=np.float32)
    for i in range(n * k):
        byte = int(raw[i // 2])
        values[i] = code[byte >> 4 if i % 2 == 0 else byte & 15] * absmax[i // state.blocksize]
    return torch.from_numpy(values).view(n, k).to(packed.device)


def same(a, b):
    """Equal to the bit, the sign of zero included."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype is b.dtype and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


# Whole programs and a bit, more than 256 blocks of 32; rows of whole words, of half words; odd numbers of values.
SHAPES = [(67, 136), (3, 88), (7, 12), (5, 7), (1, 1)]
LAYOUTS = [
    (64, True, torch.uint8),
    (64, False, torch.bfloat16),
    (32, True, torch.float32),
    (128, False, torch.uint8),
    (256, True, torch.float16),
    (4096, True, torch.uint8),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("blocksize", "nested", "storage"), LAYOUTS)
def test_values(blocksize, nested, storage, quant_type, device, poisoned_empty):
    for shape, stored in zip(SHAPES, itertools.cycle(DTYPES)):
        packed, state = quantised(*shape, blocksize, quant_type, nested, stored, storage, device)
        weight = Nf4Weight.of(packed, state)
        want = oracle(packed, state)
        assert weight.shape == shape and weight.dtype is stored and weight.device == packed.device
        assert same(weight.dequantize(), want.to(stored)), (shape, stored)
        for dtype in DTYPES:
            assert same(weight.dequantize(dtype=dtype), want.to(stored).to(dtype)), (shape, stored, dtype)
            assert same(weight.dequantize(dtype=dtype, direct=True), want.to(dtype)), (shape, stored, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_byte_by_hand(device):
    """High half first; product and sum of the nested absmax each rounded."""
    packed, state = quantised(1, 4, nested=True, device=device)
    packed.copy_(torch.tensor([[0xF0], [0x7E]], dtype=torch.uint8))
    state.absmax.fill_(2)
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, of which float32 drops the last; the sum with -1 would bring it back if fused.
    state.state2.code[2] = state.state2.absmax[0] = 1 + 2**-12
    state.offset.fill_(-1.0)
    scale = 2.0**-11
    want = torch.tensor([[1.0, -1.0, 0.0, 0.7229568362236023]], device=device) * scale
    assert same(Nf4Weight.of(packed, state).dequantize(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(33, 136), (5, 7), (9, 12), (8, 12), (1, 8)])
def test_rows_of_a_wider_buffer(shape, device):
    """As beside other columns in one operand; what lies between the rows stays."""
    n, k = shape
    packed, state = quantised(n, k, device=device)
    want = oracle(packed, state)
    for extra in (8, 3):
        wide = torch.full((n, k + extra), 7.0, device=device)
        out = wide[:, :k]
        assert Nf4Weight.of(packed, state).dequantize(out) is out
        assert same(out, want) and bool((wide[:, k:] == 7).all())


def launches(call):
    """The result of ``call`` and how many programs each launch had."""
    grids = []
    real = nf4.launch
    with mock.patch.object(nf4, "launch", lambda *args, **how: (grids.append(args[1][0]), real(*args, **how))):
        return call(), grids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(64, 16, 17), (40, 72), (24,), (8, 8, 8, 8, 8)])
def test_stacked(rows, device, poisoned_empty):
    parts = [quantised(n, 136, device=device) for n in rows]
    weights = [Nf4Weight.of(*part) for part in parts]
    stacked, grids = launches(lambda: dequantize_stacked(weights))
    assert same(stacked, torch.cat([oracle(*part) for part in parts]))
    if INTERPRETED or device == "cuda":
        assert len(grids) == -(-len(rows) // 3) and sum(grids) == sum(-(-n * 136 // 4096) for n in rows)
    else:
        assert grids == []
    out = torch.empty(sum(rows), 136, dtype=FP16, device=device)
    assert dequantize_stacked(weights, out) is out and same(out, stacked.to(FP16))


@pytest.mark.parametrize("device", DEVICES)
def test_stacked_of_unlike_weights(device, poisoned_empty):
    """Other block sizes and quantisations take launches of their own; a weight that was not quantised is copied."""
    parts = [
        quantised(8, 128, device=device),
        quantised(3, 128, 128, device=device),
        quantised(4, 128, 128, nested=False, device=device),
        quantised(5, 128, 128, "fp4", False, device=device),
    ]
    dense = torch.randn(6, 128, device=device)
    weights = [*(Nf4Weight.of(*part) for part in parts), DenseWeight.of(dense)]
    stacked, grids = launches(lambda: dequantize_stacked(weights))
    assert same(stacked, torch.cat([*(oracle(*part) for part in parts), dense]))
    assert len(grids) == (4 if INTERPRETED or device == "cuda" else 0)
    with pytest.raises(WeightLayoutError, match=r"one K and one order, found \[8, 128\], \[2, 64\]"):
        dequantize_stacked([weights[0], Nf4Weight.of(*quantised(2, 64, device=device))])
    with pytest.raises(WeightLayoutError, match=r"expected \[26, 128\], found \[25, 128\]"):
        dequantize_stacked(weights, stacked[1:])


def test_no_rows():
    packed, state = quantised(0, 64, nested=False)
    assert Nf4Weight.of(packed, state).dequantize().shape == (0, 64)


def test_dense():
    tensor = torch.nn.Parameter(torch.randn(3, 8))
    weight = DenseWeight.of(tensor)
    assert weight.shape == (3, 8) and weight.dtype is FP32 and weight.device == tensor.device and weight.k_contiguous
    assert weight.dequantize().data_ptr() == tensor.data_ptr() and not weight.dequantize().requires_grad
    out = torch.empty(3, 8, dtype=FP16)
    assert weight.dequantize(out) is out and torch.equal(out, tensor.half())
    assert torch.equal(weight.dequantize(dtype=BF16), tensor.bfloat16())
    assert weight.identity() == DenseWeight.of(tensor).identity() != DenseWeight.of(tensor.detach()).identity()
    with pytest.raises(WeightLayoutError, match=r"found torch.int8 \[2, 2\]"):
        DenseWeight.of(torch.ones(2, 2, dtype=torch.int8))


@pytest.mark.parametrize("nested", [True, False])
def test_description_goes_stale(nested):
    """What `quant_state.to`, loading and ``param.data = ...`` change is seen."""
    packed, state = quantised(8, 128, nested=nested)
    weight = Nf4Weight.of(packed, state)
    assert weight.describes(packed, state) and weight.identity() == Nf4Weight.of(packed, state).identity()
    assert not weight.describes(packed.clone(), state)
    changes = [(state, "absmax", state.absmax.clone()), (state, "dtype", BF16)]
    if nested:
        changes += [(state, "offset", state.offset.clone()), (state, "state2", quantised(8, 128)[1].state2)]
    for holder, name, value in changes:
        before = getattr(holder, name)
        setattr(holder, name, value)
        assert not weight.describes(packed, state), name
        assert weight.identity() != Nf4Weight.of(packed, state).identity()
        setattr(holder, name, before)
    assert weight.describes(packed, state) and not weight.describes(packed, None)
    # The objects stay, what is in them gets another size: the kernel would read past its end.
    for tensor in [packed, state.absmax, *([state.state2.absmax] if nested else [])]:
        whole = tensor.data
        tensor.data = whole[:-1]
        assert not weight.describes(packed, state)
        tensor.data = whole
    assert weight.describes(packed, state)
    before = weight.identity()
    packed.data = packed.clone()
    assert weight.identity() != before


def _change(**changes):
    def change(packed, state):
        for path, value in changes.items():
            *holders, name = path.split("__")
            holder = state
            for key in holders:
                holder = getattr(holder, key)
            setattr(holder, name, value(getattr(holder, name, None)) if callable(value) else value)
        return packed, state

    return change


BAD = [
    (lambda p, s: (p[:-1], s), r"weight: expected 512 contiguous bytes for \[8, 128\], found 511 \(torch.uint8 \[511"),
    (lambda p, s: (p.to(torch.int8), s), r"weight: expected uint8, .* found torch.int8"),
    (lambda p, s: (torch.cat((p, p), 1)[:, :1], s), r"contiguous bytes .* strides \[2, 1\]"),
    (lambda p, s: (p, None), r"quant_state: .* found None"),
    (_change(packing_format_for_cpu=True), r"packed for inference on this CPU"),
    (_change(quant_type="int4"), r"quant_type: expected nf4 or fp4, found 'int4'"),
    (_change(blocksize=48), r"blocksize: expected one of .*, found 48"),
    (_change(dtype=torch.float64), r"quant_state.dtype: .* found torch.float64"),
    (_change(shape=torch.Size((2, 4, 128))), r"shape: expected \[N, K\], found \[2, 4, 128\]"),
    (_change(shape=None), r"shape: expected \[N, K\], found None"),
    (_change(absmax=lambda t: t[:-1]), r"quant_state.absmax: expected 16 contiguous torch.uint8 on cpu, found 15 \("),
    (_change(absmax=lambda t: t.float()), r"quant_state.absmax: .* found 16 \(torch.float32"),
    (_change(nested=False), r"quant_state.absmax: expected 16 contiguous torch.float32 on cpu, found 16 \(torch.uint8"),
    (_change(state2=None), r"quant_state.state2: .* found None"),
    (_change(state2__blocksize=0), r"state2.blocksize: expected a positive number, found 0"),
    (_change(state2__dtype=BF16), r"state2: expected float32 .* found torch.bfloat16"),
    (_change(state2__absmax=lambda t: t.repeat(2)), r"state2.absmax: expected 1 .* found 2"),
    (_change(state2__code=lambda t: t[:16]), r"state2.code: expected 256 .* found 16"),
    (_change(offset=0.5), r"quant_state.offset: expected 1 contiguous torch.float32 on cpu, found float"),
    (_change(absmax=lambda t: t.to("meta")), r"quant_state.absmax: .* on meta\)"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_input_is_named(change, text):
    packed, state = change(*quantised(8, 128))
    with pytest.raises(WeightLayoutError, match=text):
        Nf4Weight.of(packed, state)
    assert re.search(text, layout_problem(packed, state))


@pytest.mark.parametrize(
    "out",
    [torch.empty(8, 127), torch.empty(128, 8).t(), torch.empty(8, 128, dtype=torch.int32), torch.empty(1024)],
)
def test_bad_buffer_is_named(out):
    weight = Nf4Weight.of(*quantised(8, 128))
    with pytest.raises(WeightLayoutError, match=r"out: expected floating \[8, 128\] on cpu .*, found torch"):
        weight.dequantize(out)


# bitsandbytes itself.


def from_bitsandbytes(functional, shape, blocksize, quant_type, nested, storage, stored, device):
    values = torch.randn(shape, device=device).to(stored)
    try:
        packed, state = functional.quantize_4bit(
            values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )
    except RuntimeError as error:  # bytes that do not fill the storage dtype: it cannot make such a weight either
        assert "divisible" in str(error)
        return None
    # On CUDA (0.50.2) the storage is rounded down, and the last values lie outside it.
    return (packed, state) if 2 * packed.nbytes >= values.numel() else None


def theirs(functional, packed, state):
    """What bitsandbytes makes of a weight.

    Its AVX-512 code takes blocks to start with rows where K is a multiple of 16 (0.50.2): where the blocksize does not
    divide K it multiplies by other blocks' absmax than its quantisation, its own PyTorch code and CUDA. There the
    PyTorch code is asked.
    """
    k, blocksize = state.shape[1], state.blocksize
    if packed.is_cuda or k % 16 or k % blocksize == 0:
        return functional.dequantize_4bit(packed, state)
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    raw = packed.view(torch.uint8).reshape(-1)
    return _dequantize_4bit_compute(raw, absmax, state.code, blocksize, state.shape, state.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_same_as_bitsandbytes(blocksize, quant_type, nested, device, poisoned_empty):
    functional = pytest.importorskip("bitsandbytes").functional
    compared, storages = 0, (torch.uint8, BF16) if INTERPRETED else (torch.uint8, *DTYPES)
    # Its PyTorch code is compiled, which takes longer than all of this test.
    with torch.compiler.set_stance("force_eager"):
        for storage, shape, stored in itertools.product(
            storages, ((136, 136), (5, 512), (48, 192), (3, 88), (5, 7)), DTYPES
        ):
            made = from_bitsandbytes(functional, shape, blocksize, quant_type, nested, storage, stored, device)
            if made is None:
                continue
            want = theirs(functional, *made)
            weight = Nf4Weight.of(*made)
            for dtype in DTYPES if storage is torch.uint8 else (stored,):
                assert torch.equal(weight.dequantize(dtype=dtype), want.to(dtype)), (storage, shape, stored, dtype)
                compared += 1
    assert compared >= 50


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    for quant_type, code in CODES.items():
        assert same(torch.tensor(code), functional.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [BF16, FP16])
@pytest.mark.parametrize("rows", [(14336,), (14336, 14336), (4096, 1024, 1024), (4096, 1000, 24)])
def test_model_sizes(rows, stored, poisoned_empty):
    functional = pytest.importorskip("bitsandbytes").functional
    made = [from_bitsandbytes(functional, (n, 4096), 64, "nf4", True, torch.uint8, stored, "cuda") for n in rows]
    stacked, grids = launches(lambda: dequantize_stacked([Nf4Weight.of(*each) for each in made]))
    assert len(grids) == 1
    assert torch.equal(stacked, torch.cat([functional.dequantize_4bit(*each) for each in made]))


# What is compiled.


def recorded(call):
    """The launches of ``call`` on meta tensors, as the cases of kernel_cases."""
    import kernel_cases

    found = []

    def record(kernel, grid, args, consts, *, num_warps, num_stages):
        found.append((kernel, args, consts, {"num_warps": num_warps, "num_stages": num_stages}))

    with (
        mock.patch.object(nf4, "launch", record),
        mock.patch.object(nf4, "use_triton", lambda t: True),
    ):
        call()
        return [kernel_cases._as_case("8B", *launch) for launch in found]


def on_meta(n, k, *args, **kwargs):
    packed, state = quantised(1, k, *args, **kwargs)

    def meta(t, numel):
        return torch.empty(numel, dtype=t.dtype, device="meta")

    blocks = -(-n * k // state.blocksize)
    state.absmax, state.code = meta(state.absmax, blocks), state.code.to("meta")
    if state.nested:
        state.offset, second = state.offset.to("meta"), state.state2
        second.absmax, second.code = meta(second.absmax, -(-blocks // 256)), second.code.to("meta")
    state.shape = torch.Size((n, k))
    return Nf4Weight.of(meta(packed, -(-(n * k // 2) // packed.itemsize) if n * k % 2 == 0 else n * k // 2 + 1), state)


def model_calls():
    """What training an 8B model launches, and the same from other storage."""
    for stored in (BF16, FP16):
        up = on_meta(14336, 4096, stored=stored)
        yield lambda up=up: up.dequantize()
        yield lambda up=up: dequantize_stacked([up, up])
    yield lambda: dequantize_stacked([on_meta(n, 4096, stored=BF16) for n in (4096, 1024, 1024)])
    yield lambda: on_meta(4096, 14336, nested=False, stored=BF16).dequantize()
    yield lambda: on_meta(4096, 14336, 128, "fp4", storage=BF16, stored=BF16).dequantize()
    yield lambda: on_meta(4096, 4096, stored=BF16).dequantize(
        torch.empty(4096, 4160, dtype=BF16, device="meta")[:, :4096]
    )


def other_calls():
    yield lambda: on_meta(4096, 4096, stored=BF16).dequantize(dtype=FP32)
    yield lambda: on_meta(4096, 4096, stored=FP16).dequantize(dtype=BF16)
    yield lambda: on_meta(5, 7, stored=BF16).dequantize()
    yield lambda: on_meta(5, 7, 4096, nested=False).dequantize(torch.empty(5, 9, device="meta")[:, :7])
    yield lambda: on_meta(5, 12, 32).dequantize(torch.empty(5, 16, dtype=FP16, device="meta")[:, :12])


needs_compiler = pytest.mark.skipif(INTERPRETED or not _launch.HAS_TRITON, reason="needs Triton's compiler")


@needs_compiler
@pytest.mark.parametrize("capability", _launch.TARGETS)
def test_what_a_model_launches(capability, tmp_path, monkeypatch):
    """16 bytes a load and a store, no spills, and a nested absmax that is not fused."""
    import kernel_cases

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    calls = list(model_calls())
    for call in calls if capability == 90 else calls[1:3]:
        (case,) = recorded(call)
        count = dict(case.constexprs)["COUNT"]
        compiled = kernel_cases.build(case, capability)
        used = kernel_cases.resources(compiled, tmp_path)
        assert used["STACK"] == 0 and used["REG"] <= 64, (case, used)
        assert compiled.metadata.shared <= 8192
        ptx = compiled.asm["ptx"]
        # A thread has 32 values, whatever is looked up comes from L1.
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == count, case
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 4 * count, case
        assert not re.findall(r"st\.global\.(?!v4)", ptx), case
        sums = re.findall(r"(?:add|fma)(?:\.rn)?\.f32(?:x2)? .*", ptx)
        assert bool(sums) is (dict(case.constexprs)["BLOCKSIZE2"] > 0), case
        # As many sums as there are products that were rounded before.
        assert sum(s.startswith("add") for s in sums) * 2 == len(sums), (case, sums)


@needs_compiler
def test_every_path_compiles(tmp_path, monkeypatch):
    import kernel_cases

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for call in other_calls():
        (case,) = recorded(call)
        compiled = kernel_cases.build(case, 90)
        assert kernel_cases.resources(compiled, tmp_path)["STACK"] == 0, case


@pytest.mark.skipif(INTERPRETED or not _launch.HAS_TRITON, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
