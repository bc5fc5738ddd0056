"""GPTQ weights: an oracle that packs its own, gptqmodel's kernels and packer; on the CPU and in the interpreter."""

import importlib.util
import json
import re
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from fast_unsloth_patch.device import launch as _launch
from fast_unsloth_patch.reference.gptq import gptq_dequantize_ref, gptq_unpack_ref, v1_to_v2_addend
from fast_unsloth_patch.weights import WeightLayoutError, gptq
from fast_unsloth_patch.weights.gptq import GPTQWeight, layout_problem

HERE = str(Path(__file__).resolve().parent)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# (bits, K, N, group size, order of g_idx); remainders of words in both dimensions, and of groups.
LAYOUTS = [
    (4, 128, 64, 32, "ordered"),
    (4, 256, 40, -1, "ordered"),
    (4, 96, 264, 16, "ordered"),
    (4, 64, 32, 8, "negative"),
    (4, 128, 24, 32, "groups"),
    (4, 128, 24, 32, "rows"),
    (4, 101, 67, 128, "ordered"),
    (4, 77, 33, 24, "rows"),
    (4, 50, 16, 5, "ordered"),
    (8, 128, 64, 32, "ordered"),
    (8, 128, 30, 16, "rows"),
    (8, 70, 6, 4, "ordered"),
    (8, 33, 259, -1, "ordered"),
    (2, 128, 48, 64, "ordered"),
    (2, 67, 31, 16, "rows"),
]


class Made:
    """A weight made of known integers: the packed tensors, and the values in float64, where the product is exact."""

    def __init__(self, bits, k, n, group_size, order, *, dtype=F16, symmetric=False, device="cpu"):
        group_size = k if group_size == -1 else group_size
        groups = -(-k // group_size)
        g_idx = torch.arange(k, dtype=torch.int32) // group_size
        if order == "rows":
            g_idx = g_idx[torch.randperm(k)]
        elif order == "groups":
            g_idx = torch.randperm(groups, dtype=torch.int32)[g_idx.long()]
        elif order == "negative":
            g_idx = g_idx - groups
        self.bits, self.shape, self.group_size, self.g_idx = bits, (n, k), group_size, g_idx
        self.q = torch.randint(0, 2**bits, (k, n))
        self.zeros = torch.full((groups, n), 2 ** (bits - 1))
        if not symmetric:
            # Of both ends too: 0 is what a v1 checkpoint can only store with a borrow.
            self.zeros = torch.randint(0, 2**bits, (groups, n))
        self.scales = (torch.rand(groups, n) * 0.05 + 1e-4).to(dtype)
        self.qweight, self.qzeros = pack_rows(self.q, bits), pack_rows(self.zeros.T, bits).T.contiguous()
        self.exact = self.scales.double()[g_idx.long()] * (self.q - self.zeros[g_idx.long()])
        for name in ("qweight", "qzeros", "scales", "g_idx", "exact"):
            setattr(self, name, getattr(self, name).to(device))

    def weight(self, qzero_format=2):
        qzeros = self.qzeros if qzero_format == 2 else self.qzeros - v1_to_v2_addend(self.bits)
        tensors = self.qweight, qzeros, self.scales, self.g_idx
        return GPTQWeight(*tensors, bits=self.bits, shape=self.shape, qzero_format=qzero_format)

    def expected(self, dtype, direct=False):
        """[N, K]."""
        exact = self.exact if direct else self.exact.to(self.scales.dtype)
        return exact.to(dtype).T

    def module(self, kernel="TorchLinear", **attributes):
        found = types.new_class(kernel)()
        state = {name: getattr(self, name) for name in ("qweight", "qzeros", "scales", "g_idx", "bits", "group_size")}
        n, k = self.shape
        state |= {"in_features": k, "out_features": n, "pack_dtype": torch.int32, "qzero_format": lambda: 2}
        found.__dict__.update(state | attributes)
        return found


def pack_rows(q, bits):
    """[K, N] -> [ceil(K bits / 32), N] int32, one field after another."""
    per = 32 // bits
    words = torch.zeros(-(-q.shape[0] // per), q.shape[1], dtype=torch.int64)
    for k in range(q.shape[0]):
        words[k // per] |= q[k].long() << (k % per * bits)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def agrees(made, dtype, *, qzero_format=2, direct=False):
    """Bit for bit, in a new tensor and in some rows of a larger one, whose other rows keep what they hold."""
    weight, (n, k) = made.weight(qzero_format), made.shape
    expected = made.expected(dtype, direct)
    values = weight.dequantize(dtype=dtype, direct=direct)
    assert values.dtype is dtype and values.shape == (n, k) and torch.equal(values, expected)
    assert values.stride(0) == 1 or n == 1
    larger = torch.full((k, n + 24), float("nan"), dtype=dtype, device=values.device).t()
    out = larger[8 : n + 8]
    assert weight.dequantize(out=out, direct=direct) is out and torch.equal(out, expected)
    assert larger[:8].isnan().all() and larger[n + 8 :].isnan().all()
    return values


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_values(layout, poisoned_empty):
    for scales in (F16, BF16):
        made = Made(*layout, dtype=scales)
        for dtype in (F16, BF16, F32):
            for direct in (False, True):
                agrees(made, dtype, direct=direct)
        agrees(made, scales, qzero_format=1)
        assert made.weight().dequantize().dtype is scales


def test_the_two_roundings_differ():
    """Or else nothing above would tell them apart."""
    made = Made(4, 128, 64, 32, "ordered", dtype=F16)
    assert not torch.equal(made.expected(BF16), made.expected(BF16, direct=True))


def test_v1_zero_points_borrow():
    """A zero point of 0 stored less one takes from its neighbour; the whole word gives it back."""
    made = Made(4, 32, 8, 32, "ordered")
    made.zeros[:] = torch.tensor([[0, 15, 0, 0, 1, 0, 8, 0]])
    made.qzeros = pack_rows(made.zeros.T, 4).T.contiguous()
    made.exact = made.scales.double()[made.g_idx.long()] * (made.q - made.zeros[made.g_idx.long()])
    agrees(made, F16, qzero_format=1)
    stored = made.weight(1).qzeros
    assert not torch.equal(gptq_unpack_ref(stored, 4, 1), (made.zeros - 1) % 16)  # it did borrow


def test_how_often_scales_are_loaded():
    def how(g_idx, bits=4):
        return gptq._reload(torch.as_tensor(g_idx), bits)

    assert [how(torch.arange(256) // size) for size in (128, 64, 32, 16, 8, 4, 24, 1)] == [0, 0, 0, 1, 1, 2, 1, 2]
    assert [how(torch.arange(256) // size, 8) for size in (32, 16, 8, 4, 2)] == [0, 0, 1, 1, 2]
    assert how(torch.arange(70) // 128) == 0 and how(torch.arange(101) // 32) == 0
    assert how(torch.randperm(8)[torch.arange(256) // 32]) == 0
    assert how((torch.arange(256) // 32)[torch.randperm(256)]) == 2


def test_sides_by_side():
    """gate and up in one buffer, by the function that the ops use."""
    from fast_unsloth_patch.weights import dequantize_stacked

    gate, up = Made(4, 64, 40, 32, "ordered"), Made(4, 64, 24, 32, "rows")
    both = dequantize_stacked([gate.weight(), up.weight()], dtype=BF16)
    assert torch.equal(both, torch.cat((gate.expected(BF16), up.expected(BF16)))) and both.stride() == (1, 64)


def test_products_are_those_of_gptqmodel():
    """``x @ buffer``, not the product with a copy in another order."""
    made = Made(4, 64, 40, 32, "ordered")
    w, x = made.weight().dequantize(), torch.randn(3, 64, dtype=F16)
    assert torch.equal(torch.nn.functional.linear(x, w), x @ w.t()) and w.t().is_contiguous()


INTERPRETED = """
import sys; sys.path.insert(0, {here!r})
import torch
import test_gptq as t
from fast_unsloth_patch.weights import gptq

launches, launch = [], gptq.launch
def counted(*args, **options):
    launches.append(args)
    launch(*args, **options)
gptq.launch = counted
torch.manual_seed(0)
for i, layout in enumerate(t.LAYOUTS):
    made = t.Made(*layout, dtype=t.F16)
    before = len(launches)
    t.agrees(made, (t.F16, t.F32)[i % 2], qzero_format=1 + i // 2 % 2, direct=i % 3 == 0)
    assert len(launches) == before + 2, "one launch a call"
made = t.Made(*t.LAYOUTS[0], dtype=t.F32)
before = len(launches)
t.agrees(made, t.F16)
t.agrees(made, t.F16, direct=True)
assert len(launches) == before + 4
# The interpreter has no bfloat16: the reference runs.
t.agrees(made, t.BF16)
assert len(launches) == before + 4
print("agreed", sorted({{args[3]["RELOAD"] for args in launches}}))
"""


def test_kernel_in_the_interpreter(run_python):
    pytest.importorskip("triton")
    done = run_python(INTERPRETED.format(here=HERE), env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agreed [0, 1, 2]"


def compiled_cases():
    """(name, what is launched): the sizes of Llama-3-8B, and odd ones."""
    kernel_cases = pytest.importorskip("kernel_cases")

    def meta(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def case(k, n, bits, group_size, scales, dtype, *, order="ordered", qzero_format=2):
        g_idx = torch.arange(k, dtype=torch.int32) // group_size
        if order == "rows":
            g_idx = g_idx[torch.randperm(k)]
        tensors = (
            meta((-(-k * bits // 32), n), torch.int32),
            meta((-(-k // group_size), -(-n * bits // 32)), torch.int32),
        )
        weight = GPTQWeight(
            *tensors, meta((-(-k // group_size), n), scales), g_idx, bits=bits, shape=(n, k), qzero_format=qzero_format
        )
        found = []

        def record(kernel, grid, args, consts, *, num_warps=4, num_stages=2):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            name = f"{k}x{n}, {bits} bits, groups of {group_size}, {order}"
            found.append(kernel_cases._as_case(name, kernel, args, consts, options))

        with mock.patch.object(gptq, "launch", record), mock.patch.object(gptq, "use_triton", lambda t: True):
            weight.dequantize(dtype=dtype)
        return found[0]

    yield case(4096, 14336, 4, 128, BF16, BF16)
    yield case(4096, 14336, 4, 128, F16, F16)
    yield case(4096, 14336, 4, 128, F16, BF16)
    yield case(4096, 14336, 4, 128, F16, BF16, order="rows")
    yield case(4096, 14336, 8, 128, F16, BF16)
    yield case(14336, 4096, 8, 32, F16, F16, order="rows")
    yield case(4096, 1024, 4, 16, BF16, BF16)
    yield case(4096, 1024, 2, 64, F16, F16)
    yield case(4096, 4096, 4, 4096, F16, F32, qzero_format=1)


@pytest.mark.parametrize("capability", _launch.TARGETS)
def test_kernel_compiles_without_spills(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    import kernel_cases

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    cases = list(compiled_cases())
    for case in cases if capability == 90 else cases[3:4]:
        compiled = kernel_cases.build(case, capability)
        used = kernel_cases.resources(compiled, tmp_path)
        assert used["STACK"] == 0 and used["REG"] <= 128, f"{case} on sm_{capability}: {used}"
        # Whole lines; in 4 bits never through shared memory, in 8 bits the zero points alone. (Not so in float32, which
        # only a layer with float32 input is asked for.)
        if case.signature[4][1] != "*fp32":
            consts, ptx = dict(case.constexprs), compiled.asm["ptx"]
            stores = gptq._STEPS * 32 // consts["BITS"]
            assert len(re.findall(r"st\.global\S*\.v4", ptx)) == stores == ptx.count("st.global"), case
            assert len(re.findall(r"ld\.global\S*\.v4", ptx)) >= 2 * gptq._STEPS, case
            exchanges = {2: 0, 4: 0, 8: 1 if consts["RELOAD"] == 0 else 31}[consts["BITS"]]
            assert ptx.count("bar.sync") <= exchanges, case


# name of the tensor -> what is wrong with it, and what the message says.
BAD = {
    "qweight": (lambda t: t[:-1], r"qweight: expected contiguous int32 \[16, 40\], found int32 \[15, 40\]"),
    "qzeros": (lambda t: t.to(torch.int64), r"qzeros: expected contiguous int32 \[4, 5\], found int64 \[4, 5\]"),
    "scales": (lambda t: t.double(), r"scales: expected contiguous float16 or bfloat16 or float32 \[4, 40\], found fl"),
    "g_idx": (lambda t: t[:100], r"g_idx: expected contiguous int32 or int64 \[128\], found int32 \[100\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_tensor_that_does_not_fit(name):
    made = Made(4, 128, 40, 32, "ordered")
    spoil, message = BAD[name]
    module = made.module(**{name: spoil(getattr(made, name))})
    with pytest.raises(WeightLayoutError, match=message):
        GPTQWeight.of(module)
    assert layout_problem(module).startswith(f"{name}: expected") and layout_problem(made.module()) is None
    assert layout_problem(made.module(**{name: None})).endswith("found NoneType")


def test_strides_of_a_tensor_that_do_not_fit():
    made = Made(4, 128, 40, 32, "ordered")
    assert layout_problem(made.module(qweight=made.qweight.T.contiguous().T)).endswith("found strides [1, 16]")


def test_group_numbers_out_of_range():
    made = Made(4, 128, 40, 32, "ordered")
    for value in (4, -5):
        made.g_idx[7] = value
        with pytest.raises(WeightLayoutError, match=r"g_idx: expected values in \[-4, 3\], found"):
            made.weight()


def test_buffers_that_do_not_fit():
    weight = Made(4, 128, 40, 32, "ordered").weight()
    for out in (torch.empty(40, 128), torch.empty(40, 128).t(), torch.empty(128, 40, dtype=torch.int32).t()):
        with pytest.raises(
            WeightLayoutError, match=r"out: expected floating \[40, 128\] on cpu with unit stride along"
        ):
            weight.dequantize(out=out)


def test_kernels_that_are_not_covered():
    made = Made(4, 128, 40, 32, "ordered")
    for kernel in ("MarlinLinear", "ExllamaV2Linear", "MacheteLinear"):
        reason = layout_problem(made.module(kernel, SUPPORTS_TRAINING=False))
        assert reason.startswith(f"{kernel} has no backward: load the model with") and "gptq_triton" in reason
    assert "found TorchAtenLinear: load the model" in layout_problem(made.module("TorchAtenLinear"))
    assert layout_problem(made.module(bits=3)) == "bits: expected 2, 4 or 8, found 3"
    assert layout_problem(made.module(pack_dtype=torch.int16)) == "pack_dtype: expected int32, found int16"
    assert "adapter" in layout_problem(made.module(adapter=object()))
    assert "rotates" in layout_problem(made.module(online_full_had=True))
    assert layout_problem(made.module(qzero_format=lambda: 3)) == "qzero format: expected 1 or 2, found 3"


def test_which_zero_points_a_module_means():
    """What the kernel reads, not what the mark says that a loaded v2 checkpoint leaves at 1."""
    made = Made(4, 64, 40, 32, "ordered")
    marked = {"qzero_format": lambda: 1}
    assert GPTQWeight.of(made.module(**marked)).qzero_format == 1
    assert GPTQWeight.of(made.module(REQUIRES_FORMAT_V2=True, **marked)).qzero_format == 2


def test_description_goes_stale():
    made = Made(4, 64, 40, 32, "ordered")
    module = made.module()
    weight = GPTQWeight.of(module)
    assert weight.describes(module) and weight.identity() == GPTQWeight.of(module).identity()
    hash(weight.identity())
    changes = {
        "qweight": made.qweight.clone(),
        "qzeros": made.qzeros.clone(),
        "scales": made.scales.bfloat16(),
        "g_idx": made.g_idx.clone(),
    }
    for name, value in changes.items():
        before = getattr(module, name)
        setattr(module, name, value)
        assert not weight.describes(module) and GPTQWeight.of(module).identity() != weight.identity(), name
        setattr(module, name, before)
    assert weight.describes(module)
    module.scales.data = module.scales.data.bfloat16()  # as module.to(dtype) casts a buffer
    assert not weight.describes(module)
    weight = GPTQWeight.of(module)
    module.g_idx[0] = 1
    assert not weight.describes(module)
    with torch.inference_mode():
        module = Made(4, 64, 40, 32, "ordered").module()
    assert GPTQWeight.of(module).describes(module)


GPTQMODEL = """
import sys; sys.path.insert(0, {here!r})
import json
import torch
import test_gptq as t

torch.manual_seed(0)
print(json.dumps(t.compared_with_gptqmodel()))
"""


def compared_with_gptqmodel():
    """Runs in a process of its own: gptqmodel sets environment variables and prints. Returns counts of comparisons."""
    import contextlib

    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
    from gptqmodel.nn_modules.triton_utils.dequant import dequant
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    counts = dict.fromkeys(("layouts", "training", "evaluation", "linear", "v1", "triton"), 0)
    for i, (bits, k, n, group_size, order) in enumerate(LAYOUTS):
        # What gptqmodel takes: its group sizes, and groups that are numbered from 0 on.
        if group_size not in (-1, 16, 32, 64, 128) or order == "negative":
            continue
        symmetric = i % 2 == 0
        made = Made(bits, k, n, group_size, order, symmetric=symmetric)
        whole = k % 32 == 0 and n % 32 == 0
        kind = TritonV2Linear if whole and i % 3 else TorchLinear
        arguments = {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": order == "rows"}
        module = kind(**arguments, in_features=k, out_features=n, bias=False, pack_dtype=torch.int32)
        linear = torch.nn.Linear(k, n, bias=False)
        scales, zeros = made.scales.float().T.contiguous(), made.zeros.float().T.contiguous()
        linear.weight.data = made.exact.float().T.contiguous()
        pack = module.pack_block if whole else module.pack_original
        pack(linear, scales, zeros.to(torch.int32) if whole else zeros, made.g_idx.clone())
        # The packed words are those of the oracle, so what is compared below is more than two readings of nothing.
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(getattr(module, name), getattr(made, name)), (name, LAYOUTS[i])
        counts["layouts"] += 1
        for dtype in (F16, BF16):
            module.scales = made.scales.to(dtype)
            weight = GPTQWeight.of(module)
            for training in (True, False):
                module.train(training)
                assert torch.equal(weight.dequantize(), module.dequantize_weight().t()), LAYOUTS[i]
                counts["training" if training else "evaluation"] += 1
            module.train()
            for x in (torch.eye(k, dtype=F16), torch.eye(k, dtype=BF16), torch.eye(k)):
                assert torch.equal(weight.dequantize(dtype=x.dtype), module(x).t()), (LAYOUTS[i], x.dtype)
                counts["linear"] += 1
        module.scales = made.scales
        if bits == 4 or n % 4 == 0:
            expected = module.dequantize_weight()
            module.qzeros = module.qzeros.clone()
            convert_gptq_v2_to_v1_format_module(module, mock.Mock(bits=bits, pack_dtype=torch.int32))
            v1 = (module.qweight, module.qzeros.clone(), module.scales, module.g_idx)
            weight = GPTQWeight(*v1, bits=bits, shape=(n, k), qzero_format=1)
            assert torch.equal(weight.dequantize(), expected.t()), LAYOUTS[i]
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            assert torch.equal(GPTQWeight.of(module).dequantize(), expected.t()), LAYOUTS[i]
            counts["v1"] += 1
        if _launch.INTERPRETED and n % (32 // bits) == 0:
            # Their Triton kernel, for TritonV2Linear in evaluation: rounds once. (bf16 needs a GPU.)
            tensors = module.qweight, module.scales, module.qzeros, module.g_idx
            for dtype in (F16, F32):
                with mock.patch.object(torch.cuda, "device", lambda _: contextlib.nullcontext()):
                    theirs = dequant(dtype, *tensors, bits, 32, 2**bits - 1)
                assert torch.equal(GPTQWeight.of(module).dequantize(dtype=dtype, direct=True), theirs.t()), LAYOUTS[i]
                counts["triton"] += 1
    return counts


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
@pytest.mark.parametrize("interpreted", [False, True])
def test_bit_identical_to_gptqmodel(run_python, interpreted):
    if interpreted:
        pytest.importorskip("triton")
    # Without the extension, its packer need not be compiled first.
    env = {"TRITON_INTERPRET": "1" if interpreted else None, "GPTQMODEL_DISABLE_PACK_EXT": "1"}
    done = run_python(GPTQMODEL.format(here=HERE), env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.strip().splitlines()[-1])
    assert counts["layouts"] >= 10 and counts["linear"] == 6 * counts["layouts"] and counts["v1"] >= 8
    assert counts["training"] == counts["evaluation"] == 2 * counts["layouts"]
    assert (counts["triton"] >= 8) is interpreted


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*LAYOUTS, (4, 4096, 1024, 128, "ordered"), (4, 4096, 1024, 128, "rows")])
def test_values_on_a_gpu(layout):
    for scales in (F16, BF16):
        made = Made(*layout, dtype=scales, device="cuda")
        for dtype in (F16, BF16, F32):
            for direct in (False, True):
                agrees(made, dtype, direct=direct, qzero_format=1 if direct else 2)
                on_cpu = gptq_dequantize_ref(
                    *(t.cpu() for t in (made.qweight, made.qzeros, made.scales, made.g_idx)),
                    bits=made.bits,
                    dtype=dtype,
                    direct=direct,
                )
                assert torch.equal(made.weight().dequantize(dtype=dtype, direct=direct).cpu(), on_cpu.t())


@pytest.mark.gpu
def test_group_numbers_on_the_cpu():
    """Where gptqmodel puts g_idx in evaluation."""
    made = Made(4, 128, 64, 32, "rows", device="cuda")
    made.g_idx = made.g_idx.cpu()
    assert torch.equal(made.weight().dequantize(), made.expected(F16))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_bit_identical_to_gptqmodel_on_a_gpu():
    """Their Triton kernel in both dtypes, and what a layer of theirs multiplies by."""
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    for bits, group_size, order in ((4, 128, "ordered"), (4, 32, "rows"), (8, -1, "ordered"), (8, 64, "rows")):
        made = Made(bits, 512, 256, group_size, order, device="cuda")
        arguments = {"bits": bits, "group_size": group_size, "sym": False, "desc_act": order == "rows"}
        module = TritonV2Linear(**arguments, in_features=512, out_features=256, bias=False, pack_dtype=torch.int32)
        for scales in (F16, BF16):
            for name in ("qweight", "qzeros", "g_idx"):
                setattr(module, name, getattr(made, name))
            module.scales = made.scales.to(scales)
            if bits == 4 and order == "ordered" and scales is F16:
                module.post_init()  # which compiles what training dequantises with
            weight = GPTQWeight.of(module)
            for dtype in (F16, BF16):
                x = torch.eye(512, dtype=dtype, device="cuda")
                for training in (True, False):
                    module.train(training)
                    ours = weight.dequantize(dtype=dtype, direct=not training)
                    assert torch.equal(module(x).t(), ours), (bits, group_size, scales, dtype, training)
