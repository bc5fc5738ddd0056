"""A stack of experts in four bits: values to the bit, what stays packed and what does not, and what it refuses.

The stacks come from test_nf4's random bytes, so that no bitsandbytes is needed; where it is installed it makes
some as well. The file is run a second time in the Triton interpreter; bfloat16 never goes there.
"""

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
from conftest import run_python
from test_nf4 import BF16, DEVICES, FP16, FP32, INTERPRETED, oracle, quantised, same
from torch import nn

from fast_unsloth_patch.errors import FastPatchWarning
from fast_unsloth_patch.weights import WeightLayoutError
from fast_unsloth_patch.weights.nf4_checkpoint import from_dict, register_state_hooks, stored_problem, to_dict
from fast_unsloth_patch.weights.nf4_experts import Nf4Experts, Packed

E, N, K = 5, 6, 64


def made(n=N, k=K, experts=E, **options):
    matrices = [quantised(n, k, **options) for _ in range(experts)]
    for _, state in matrices:
        if state.nested:  # bitsandbytes' is a constant
            state.state2.code = matrices[0][1].state2.code
    return matrices


def stack(matrices=None, dtype=None, **options):
    """A stack, and what its values are."""
    matrices = matrices or made(**options)
    experts = Nf4Experts.stack(matrices)
    values = torch.stack([oracle(*matrix).to(experts.stored_dtype) for matrix in matrices])
    if dtype is not None:
        experts = experts.to(dtype)
    return experts, values.to(experts.dtype)


def is_packed(x):
    return isinstance(x, Nf4Experts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
# 640 blocks of 64: an expert's absmax spans three blocks of the double quantisation, the last one cut.
@pytest.mark.parametrize(("n", "k", "blocksize"), [(6, 64, 64), (3, 128, 128), (640, 64, 64), (2, 48, 32), (64, 5, 64)])
def test_values_of_any_range(n, k, blocksize, nested, quant_type, device):
    stored = FP32 if INTERPRETED else BF16
    x, values = stack(n=n, k=k, blocksize=blocksize, nested=nested, quant_type=quant_type, stored=stored, device=device)
    assert x.shape == (E, n, k) and x.dtype is x.stored_dtype is stored and x.device.type == device
    assert same(x.dequantize(), values)
    for first, count in ((0, 1), (4, 1), (1, 3), (2, None), (0, 5), (3, 0)):
        expected = values[first:] if count is None else values[first : first + count]
        assert same(x.dequantize(first, count), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [FP32, FP16] if INTERPRETED else [FP32, FP16, BF16, torch.float64])
def test_written_where_it_is_told(dtype, device, poisoned_empty):
    x, values = stack(stored=FP32, device=device)
    expected = values[1:4].to(dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert torch.equal(x.dequantize(1, 3, dtype=dtype).view(whole), expected.view(whole))
    rows = torch.full((3, N + 1, K + 8), 7.0, dtype=dtype, device=device)
    out = rows[:, :N, :K]
    assert x.dequantize(1, 3, out=out) is out
    assert torch.equal(out.contiguous().view(whole), expected.view(whole))
    assert (rows[:, N:] == 7).all() and (rows[:, :, K:] == 7).all()


def test_experts_of_one_kind():
    for other in (made(nested=False), made(n=N * 2), made(quant_type="fp4"), made(blocksize=128), made(stored=FP16)):
        with pytest.raises(WeightLayoutError, match="experts to stack: expected one"):
            Nf4Experts.stack([*made(), *other])
    with pytest.raises(WeightLayoutError, match="expected one code"):
        Nf4Experts.stack([*made(), *made()])


def test_rounded_to_what_was_stored_and_then_to_the_dtype():
    stored = FP16 if INTERPRETED else BF16
    matrices = made(stored=stored)
    for dtype in (FP32, FP16):
        x, values = stack(matrices, dtype)
        assert x.dtype is dtype and x.stored_dtype is stored and same(x.dequantize(), values)
        once = torch.stack([oracle(*matrix).to(dtype) for matrix in matrices])
        assert not torch.equal(once, values) or stored is dtype


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 6), (5, 1), (2, -1), (6, None)])
def test_no_other_experts(first, count):
    x, _ = stack()
    with pytest.raises(IndexError, match="of 5"):
        x.dequantize(first, count)


def test_out_that_does_not_fit():
    x, _ = stack()
    with pytest.raises(WeightLayoutError, match=r"out: expected \[2, 6, 64\], found \[3, 6, 64\]"):
        x.dequantize(0, 2, out=torch.empty(3, N, K))
    with pytest.raises(WeightLayoutError, match="unit stride"):
        x.dequantize(0, 2, out=torch.empty(2, K, N).transpose(1, 2))
    with pytest.raises(WeightLayoutError, match=r"torch\.int32"):
        x.dequantize(0, 2, out=torch.empty(2, N, K, dtype=torch.int32))


PACKED = {
    "detach": lambda x: x.detach(),
    "alias": torch.ops.aten.alias.default,
    "view_as": lambda x: x.view_as(x),
    "view": lambda x: x.view(E, N, K),
    "clone": torch.clone,
    "to device": lambda x: x.to("cpu", copy=True),
    "to meta": lambda x: x.to("meta"),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "data": lambda x: x.data,
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "contiguous": lambda x: x.contiguous(),
    "whole slice": lambda x: x[:],
    "ellipsis": lambda x: x[...],
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("nested", [True, False])
def test_stays_packed(name, nested):
    x, values = stack(nested=nested, stored=FP16)
    y = PACKED[name](x)
    assert is_packed(y) and y.shape == x.shape and y.requires_grad is False
    if name == "to meta":
        assert {part.device.type for part in y.parts if isinstance(part, torch.Tensor)} == {"meta"} == {y.device.type}
        return
    assert torch.equal(y.dequantize(dtype=torch.float64), values.double())
    shares = y.packed.data_ptr() == x.packed.data_ptr()
    assert shares is (name not in ("clone", "to device", "float", "double", "deepcopy", "pickle"))
    assert (y.identity() == x.identity()) is shares


def test_what_an_op_is_given():
    x, values = stack(nested=False)
    given = x.frozen()
    assert not isinstance(given, torch.Tensor) and x.frozen() is given
    assert (given.shape, given.dtype, given.device) == (tuple(x.shape), x.dtype, x.device)
    assert same(given.dequantize(1, 2), values[1:3])
    assert x.data_ptr() == 0  # a kernel that is given the tensor itself reads nothing, instead of other bytes
    x.copy_(stack(made(nested=False))[0])
    assert same(given.dequantize(), x.dequantize())
    moved = x.to(FP16)
    assert moved.frozen().dtype is FP16 and moved.frozen().weights[0].packed.data_ptr() != x.packed.data_ptr()


@pytest.fixture
def unpacked(monkeypatch):
    """Which experts' values were made, call after call."""
    calls = []
    stock = Nf4Experts.dequantize

    def spy(self, first=0, count=None, out=None, dtype=None):
        calls.append(list(range(first, self.shape[0] if count is None else first + count)))
        return stock(self, first, count, out, dtype)

    monkeypatch.setattr(Nf4Experts, "dequantize", spy)
    return calls


SELECTED = {
    "int": (lambda x: x[2], [[2]]),
    "negative": (lambda x: x[-1], [[4]]),
    "tensor": (lambda x: x[torch.tensor(3)], [[3]]),
    "select": (lambda x: torch.select(x, 0, 1), [[1]]),
    "slice": (lambda x: x[1:3], [[1, 2]]),
    "steps": (lambda x: x[1:5:2], [[1, 2, 3, 4]]),
    "empty slice": (lambda x: x[3:1], [[]]),
    "narrow": (lambda x: x.narrow(0, 1, 2), [[1, 2]]),
    "indices": (lambda x: x[torch.tensor([4, 0, 4])], [[4], [0], [4]]),
    "indices of two dimensions": (lambda x: x[torch.tensor([[4], [0]])], [[4], [0]]),
    "no indices": (lambda x: x[torch.tensor([], dtype=torch.int64)], [[]]),
    "row of one": (lambda x: x[2, 1], [[2]]),
    "rows": (lambda x: x[1, 2:4, ::3], [[1]]),
}


@pytest.mark.parametrize("name", SELECTED)
def test_only_what_is_selected_is_unpacked(name, unpacked):
    x, values = stack()
    select, experts = SELECTED[name]
    y = select(x)
    assert type(y) is torch.Tensor and same(y, select(values)) and unpacked == experts


WHOLE = {
    "select another dimension": lambda x: x.select(1, 2),
    "slice another dimension": lambda x: x[:, 1:3],
    "mask": lambda x: x[torch.tensor([True, False, True, False, True])],
    "two indices": lambda x: x[torch.tensor([1, 2]), torch.tensor([0, 5])],
    "chunk": lambda x: torch.cat(x.chunk(2, dim=1)[::-1]),
    "chunk of experts": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unbind(0)[3],
    "transpose": lambda x: x.transpose(-2, -1),
    "reshape": lambda x: x.reshape(E * N, K),
    "other view": lambda x: x.view(-1),
    "float to int": lambda x: x.to(torch.int32),
    "add": lambda x: x + 1,
    "neg": lambda x: -x,
    "equal": lambda x: torch.eq(x, x),
    "matmul": lambda x: torch.ones(E, 2, N) @ x,
    "einsum": lambda x: torch.einsum("enk,k->en", x, torch.arange(64.0)),
    "cat": lambda x: torch.cat([x, x], 0),
    "stack": lambda x: torch.stack((x[0], x[1])),
    "sum": lambda x: x.sum(),
    "out": lambda x: torch.mul(x, 2, out=torch.empty(E, N, K)),
    "baddbmm": lambda x: torch.baddbmm(x, torch.ones(E, N, 2), torch.ones(E, 2, K), alpha=0.5),
}


@pytest.mark.parametrize("name", WHOLE)
def test_any_other_operation_gets_the_values(name):
    x, values = stack()
    y, expected = WHOLE[name](x), WHOLE[name](values)
    assert type(y) is torch.Tensor and y.dtype is expected.dtype and torch.equal(y, expected)


def test_a_third_rounding_is_not_left_out():
    x, values = stack(stored=FP32, dtype=FP16)
    y = x.float()
    assert not is_packed(y) and torch.equal(y, values.float())


def test_gradients_go_through_and_the_values_are_not_kept():
    x, values = stack()
    token, routed = torch.randn(3, K, requires_grad=True), torch.randn(E, 2, K, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(type(t)), t)[1], lambda t: t):
        loss = nn.functional.linear(token, x[1]).square().sum() + torch.bmm(routed, x.transpose(1, 2)).square().sum()
    loss.backward()
    mine = token.grad, routed.grad
    token.grad = routed.grad = None
    expected = nn.functional.linear(token, values[1]).square().sum()
    (expected + torch.bmm(routed, values.transpose(1, 2)).square().sum()).backward()
    assert torch.equal(mine[0], token.grad) and torch.equal(mine[1], routed.grad)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(type(t)), t)[1], lambda t: t):
        torch.bmm(routed, stack(n=K)[0]).sum()
    assert Nf4Experts in kept


WRITES = {
    "add_": lambda x: x.add_(1),
    "data +=": lambda x: x.data.__iadd__(torch.ones(E, N, K)),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: nn.init.constant_(x, 1),
    "normal_": lambda x: x.normal_(),
    "out": lambda x: torch.add(torch.ones(E, N, K), 1, out=x),
    "foreach": lambda x: torch._foreach_mul_([x], 2),
    "setitem": lambda x: x.__setitem__(slice(None), torch.ones(E, N, K)),
    "copy_": lambda x: x.copy_(torch.ones(E, N, K)),
}


@pytest.mark.parametrize("name", WRITES)
def test_cannot_be_written_to(name):
    x, values = stack()
    with pytest.raises(RuntimeError, match=r"cannot be changed|cannot take other values"):
        WRITES[name](x)
    assert same(x.dequantize(), values)


def test_takes_over_another_stack():
    x, _ = stack()
    y, values = stack()
    address = x.packed.data_ptr()
    x.copy_(y)
    assert same(x.dequantize(), values) and x.packed.data_ptr() == address != y.packed.data_ptr()
    assert x.copy_(values) is x  # the values that it has
    for other, found in (
        (stack(nested=False)[0], "float32"),
        (stack(quant_type="fp4")[0], "fp4"),
        (stack(experts=4)[0], "4"),
    ):
        with pytest.raises((WeightLayoutError, RuntimeError), match=found):
            x.copy_(other)
    assert same(x.dequantize(), values)


def test_data_is_replaced_by_a_stack_only():
    x, _ = stack()
    y, values = stack()
    parameter = nn.Parameter(x, requires_grad=False)
    parameter.data = y
    assert same(parameter.dequantize(), values) and isinstance(parameter, nn.Parameter)
    with pytest.raises(TypeError, match=r"expected as many weights of four bits, found torch\.float32 \[5, 6, 64\]"):
        parameter.data = values
    with pytest.raises(TypeError, match="found"):
        parameter.data = stack(experts=4)[0]
    parameter.data = parameter.data.to(torch.float64)
    assert is_packed(parameter) and parameter.dtype is torch.float64


def test_never_requires_a_gradient():
    x, _ = stack()
    with pytest.warns(FastPatchWarning, match="requires_grad stays False"):
        parameter = nn.Parameter(x)
    with pytest.warns(FastPatchWarning):
        parameter.requires_grad = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter.requires_grad_(False)
        parameter.requires_grad = False
    assert parameter.requires_grad is False and torch.Tensor.requires_grad.__get__(parameter) is False


def layer(experts):
    module = nn.Module()
    module.up = nn.Parameter(experts, requires_grad=False)
    module.bias = nn.Parameter(torch.ones(2))
    return module


def test_as_a_parameter_of_a_module():
    x, values = stack()
    module = layer(x)
    assert [name for name, _ in module.named_parameters()] == ["up", "bias"]
    assert isinstance(module.up, nn.Parameter) and sum(p.numel() for p in module.parameters()) == E * N * K + 2
    for move in (lambda m: m.to("cpu"), lambda m: m.double(), lambda m: m.requires_grad_(False), copy.deepcopy):
        module = move(module)
        assert is_packed(module.up) and isinstance(module.up, nn.Parameter)
        assert torch.equal(module.up.dequantize(dtype=FP32), values)
    assert module.up.dtype is torch.float64 and module.bias.dtype is torch.float64
    shared = nn.ModuleList([layer(x), nn.Module()])
    shared[1].up = shared[0].up
    twin = copy.deepcopy(shared)
    assert twin[1].up is twin[0].up and twin[0].up.packed.data_ptr() != x.packed.data_ptr()


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("parameter", [True, False])
def test_torch_save_and_load(weights_only, parameter):
    x, values = stack(n=64)
    file = io.BytesIO()
    torch.save({"up": x.as_parameter() if parameter else x}, file)
    assert len(file.getvalue()) < values.nbytes / 2
    file.seek(0)
    y = torch.load(file, weights_only=weights_only)["up"]
    assert is_packed(y) and isinstance(y, nn.Parameter) is parameter and same(y.dequantize(), values)
    file.seek(0)
    assert torch.load(file, weights_only=weights_only, map_location="meta")["up"].device.type == "meta"


def test_a_module_is_pickled():
    x, values = stack()
    module = layer(x)
    register_state_hooks(module)
    again = pickle.loads(pickle.dumps(module))
    assert same(again.up.dequantize(), values) and isinstance(again.up, nn.Parameter)
    assert set(again.state_dict()) == set(module.state_dict()) > {"up", "up.absmax"}


def test_sizes_count_four_bits_a_value():
    x, _ = stack(n=32)
    values = E * 32 * K
    assert x.numel() == values and type(x).__name__ == "Params4bit"
    assert x.numel() * x.element_size() == values // 2 and type(x.nelement() * x.element_size()) is int
    assert x.numel() * 2 * x.element_size() == values and type(x.numel() * 2 * x.element_size()) is int
    # absmax, its absmax, the code, the offsets
    assert x.nbytes == values // 2 + values // 64 + 4 * E + 4 * 256 + 16 * E
    assert f"{x!r}" == "Nf4Experts([5, 32, 64], float32 in nf4, double quantised, device='cpu')"


@pytest.mark.parametrize("nested", [True, False])
def test_state_dict(nested):
    x, values = stack(nested=nested)
    module = layer(x)
    register_state_hooks(module)
    state = module.state_dict(prefix="mlp.")
    statistics = {"nested_absmax", "nested_quant_map"} if nested else set()
    suffixes = {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"} | statistics
    assert set(state) == {"mlp.up", "mlp.bias"} | {f"mlp.up.{suffix}" for suffix in suffixes}
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert state["mlp.up"].shape == (E * N * K // 2, 1) and state["mlp.up"].dtype is torch.uint8
    state = {name.removeprefix("mlp."): tensor.clone() for name, tensor in state.items()}
    for target in (layer(stack(nested=nested)[0]), layer(torch.zeros(E, N, K))):
        register_state_hooks(target)
        target.load_state_dict(state)
        assert is_packed(target.up) and isinstance(target.up, nn.Parameter) and same(target.up.dequantize(), values)
        assert not target.up.requires_grad
    assert set(state) == {"up", "bias"} | {f"up.{suffix}" for suffix in suffixes}  # it is the caller's
    del state["up.absmax"]
    with pytest.raises(WeightLayoutError, match=r"up\.absmax: expected 30 elements, found no such tensor"):
        target.load_state_dict(state)


STORED = {
    "settings": (lambda d: d.pop("quant_state.bitsandbytes__nf4"), r"up\.quant_state.*found no such tensor"),
    "absmax": (lambda d: d.pop("absmax"), r"up\.absmax: expected 30 elements, found no such tensor"),
    "nested": (lambda d: d.pop("nested_absmax"), r"up\.nested_absmax: expected 5 elements, found no such tensor"),
    "packed": (lambda d: d.update({"": d[""][1:]}), r"up: expected 960 elements for \[5, 6, 64\], found 959"),
    "short": (lambda d: d.update(absmax=d["absmax"][:9]), r"up\.absmax: expected 30 elements .* found 9"),
    "dtype": (lambda d: d.update(absmax=d["absmax"].float()), r"up: absmax: expected contiguous torch\.uint8 \[5, 6\]"),
}


@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_that_does_not_fit(name):
    x, _ = stack()
    tensors = to_dict(x)
    assert same(from_dict("up", tensors, x.shape).dequantize(), x.dequantize())
    change, message = STORED[name]
    change(tensors)
    with pytest.raises(WeightLayoutError, match=message):
        from_dict("up", tensors, x.shape)


def test_a_checkpoint_of_another_shape():
    x, _ = stack()
    with pytest.raises(WeightLayoutError, match=r"up: expected \[5, 64, 6\], found \[5, 6, 64\] in the checkpoint"):
        from_dict("up", to_dict(x), (5, 64, 6))
    sizes = {suffix: tensor.numel() for suffix, tensor in to_dict(x).items()}
    blob = to_dict(x)["quant_state.bitsandbytes__nf4"]
    assert stored_problem("up", sizes, blob, x.shape) is None
    with pytest.raises(WeightLayoutError, match="in JSON, found"):
        stored_problem("up", sizes, blob[3:], x.shape)
    y = from_dict("up", to_dict(x), x.shape, FP16)
    assert y.dtype is FP16 and y.stored_dtype is FP32


LAYOUTS = {
    "shape": (lambda p: (p, (E * N, K)), r"expected \[E, N, K\], found \[30, 64\]"),
    "type": (lambda p: (p._replace(quant_type="int4"), None), "quant_type: expected nf4 or fp4, found 'int4'"),
    "blocks": (lambda p: (p._replace(blocksize=256), None), "expected a multiple of the blocksize 256, found 384"),
    "packed": (lambda p: (p._replace(packed=p.packed.float()), None), r"packed: expected contiguous torch\.uint8"),
    "absmax": (lambda p: (p._replace(absmax=p.absmax[:4]), None), r"absmax: .*\[5, 6\].*found .*\[4, 6\]"),
    "strides": (lambda p: (p._replace(absmax=p.absmax.t().contiguous().t()), None), "absmax: expected contiguous"),
    "code2": (lambda p: (p._replace(code2=None), None), "code2: .*found NoneType"),
    "offset": (lambda p: (p._replace(offset=p.offset[:, :1]), None), r"offset: .*\[5, 4\].*found .*\[5, 1\]"),
    "blocksize2": (lambda p: (p._replace(blocksize2=0), None), "expected a positive number, found 0"),
    "device": (lambda p: (p._replace(absmax2=p.absmax2.to("meta")), None), "absmax2: .* on cpu, found .* on meta"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_that_do_not_fit(name):
    x, _ = stack()
    change, message = LAYOUTS[name]
    parts, shape = change(x.parts)
    with pytest.raises(WeightLayoutError, match=message):
        Nf4Experts.of(parts, shape or x.shape, FP32)
    with pytest.raises(WeightLayoutError, match="dtype: expected"):
        Nf4Experts.of(x.parts, x.shape, torch.float64)
    assert isinstance(x.parts, Packed)


def test_what_accelerate_does_with_it():
    x, values = stack()
    module = layer(x)
    modeling = pytest.importorskip("accelerate.utils.modeling")
    modeling.set_module_tensor_to_device(module, "up", "cpu")
    assert is_packed(module.up) and same(module.up.dequantize(), values)
    modeling.set_module_tensor_to_device(module, "up", "meta")
    assert is_packed(module.up) and isinstance(module.up, nn.Parameter) and module.up.device.type == "meta"
    with pytest.raises(TypeError, match=r"cannot be made of torch\.float32 \[5, 6, 64\]"):
        Nf4Experts(values)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_as_bitsandbytes_for_every_expert(dtype, quant_type, compress):
    if INTERPRETED and dtype is BF16:
        pytest.skip("the interpreter has no bfloat16")
    functional = pytest.importorskip("bitsandbytes.functional")
    # Experts of other sizes: quantised together, they would share the offset and the absmax of the absmax.
    weights = torch.randn(3, 96, 64, dtype=dtype) * torch.tensor([1.0, 30.0, 0.01], dtype=dtype)[:, None, None]
    options = {"blocksize": 64, "compress_statistics": compress, "quant_type": quant_type}
    matrices = [functional.quantize_4bit(weight, **options) for weight in weights]
    x = Nf4Experts.stack(matrices)
    expected = torch.stack([functional.dequantize_4bit(*matrix) for matrix in matrices])
    assert same(x.dequantize(), expected) and x.dtype is dtype
    again = from_dict("up", to_dict(x), x.shape)
    assert same(again.dequantize(), expected)
    if not compress:  # as bitsandbytes reads a weight of its own: all offsets are one number, that is none
        state = functional.QuantState.from_dict({k: v for k, v in to_dict(x).items() if k}, torch.device("cpu"))
        assert same(functional.dequantize_4bit(to_dict(x)[""], state), expected)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the interpreter")
def test_in_the_interpreter():
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout[-3000:]
