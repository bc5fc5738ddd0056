"""Every kernel of ops/, in every configuration it may run with, compiles for every kind of chip and fits its memory.

No GPU is needed: Triton builds a cubin for any target. An op module takes part by offering

    compile_cases() -> iterable of (name, kernel, signature, constexprs, options)

with the types of the run-time arguments by name, the constexprs by name, and Triton's options. Two more keys of
``options`` say what `_launch.pick` knows of the configuration: ``smem``, bytes it needs at most, ``min_capability``.
A chip that would not be given the configuration is not built for.
"""

import importlib
import json
import os
import pkgutil
from pathlib import Path

import pytest

from fast_unsloth_patch import ops
from fast_unsloth_patch.ops import _launch

triton = pytest.importorskip("triton")


def discover():
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        if hasattr(module, "compile_cases"):
            yield from module.compile_cases()


def kernels_defined():
    # What the op modules define, to catch a kernel that no case builds. By our convention its name ends in _kernel.
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        for name, value in vars(module).items():
            if name.endswith("_kernel") and getattr(value, "__module__", None) == module.__name__:
                yield f"{module.__name__}.{name}"


def build(kernel, signature, constexprs, options, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    # As at run time: aligned pointers, and strides divisible by 16, which is what the widest loads are made for.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(types.values())
        if kind.startswith("*") or kind in ("i32", "i64")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=divisible)
    settings = {"enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


def applicable(cases, capability):
    limits = _launch.target_limits(capability)
    seen = set()
    for name, kernel, signature, constexprs, options in cases:
        options = dict(options)
        smem, min_capability = options.pop("smem", 0), options.pop("min_capability", 80)
        if smem > limits.smem or min_capability > capability:
            continue
        # All dtypes on one chip; on the others one dtype of each configuration, to save time.
        key = (kernel.__name__, tuple(sorted(constexprs.items(), key=str)), tuple(sorted(options.items())))
        if capability != 90 and key in seen:
            continue
        seen.add(key)
        yield name, kernel, signature, constexprs, options, smem


def check_fits(name, compiled, limit, smem):
    needed = compiled.metadata.shared
    assert needed <= limit, f"{name} needs {needed} bytes of shared memory, the chip has {limit}"
    assert not smem or needed <= smem, f"{name} needs {needed} bytes of shared memory, its table says {smem}"


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    os.environ.pop("TRITON_CACHE_DIR")
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before


@pytest.mark.parametrize("capability", _launch.TARGETS)
def test_compiles_and_fits(capability):
    limit = _launch.SHARED_MEMORY[capability]
    built = 0
    for name, kernel, signature, constexprs, options, smem in applicable(discover(), capability):
        try:
            compiled = build(kernel, signature, constexprs, options, capability)
        except Exception as error:  # whatever the compiler raises, say for which case
            raise AssertionError(f"{name} for sm_{capability}: {error}") from error
        assert "cubin" in compiled.asm, name
        check_fits(name, compiled, limit, smem)
        built += 1
    assert built > 20


def test_every_kernel_has_a_case():
    built = {f"{kernel.__module__}.{kernel.__name__}" for _, kernel, *_ in discover()}
    assert set(kernels_defined()) <= built
    assert len(built) >= 6


def test_shared_memory_that_does_not_fit_is_seen():
    """The check itself, with a kernel that is known to need some."""
    cases = (case for case in discover() if case[0] == "rms_norm_bwd-bf16-bf16-4096-dw1")
    name, kernel, signature, constexprs, options = next(cases)
    compiled = build(kernel, signature, constexprs, options, 86)
    check_fits(name, compiled, 99 * 1024, 0)
    with pytest.raises(AssertionError, match="the chip has 1024"):
        check_fits(name, compiled, 1024, 0)
    with pytest.raises(AssertionError, match="its table says 512"):
        check_fits(name, compiled, 99 * 1024, 512)


def test_the_benchmark_runs(run_python, tmp_path):
    """On a CPU: every op of benchmarks/kernels.py agrees with its oracle and leaves its rows in the results file."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.py"
    results = tmp_path / "results.json"
    done = run_python(None, args=(script, "--cpu", "--tiny", "--json", results))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())["kernels"]
    assert {row["op"] for row in rows} >= {"rms_norm", "rms_norm_dw", "rope", "swiglu"}
    assert all(0 < error < 0.01 for row in rows if row["impl"] == "fast" for error in row["errors"])
    assert all(row["ms"] > 0 and row["versions"]["torch"] for row in rows)
    again = run_python(None, args=(script, "--cpu", "--tiny", "--ops", "swiglu", "--json", results))
    assert again.returncode == 0 and len(json.loads(results.read_text())["kernels"]) == len(rows)
    wrong = run_python(None, args=(script, "--cpu", "--ops", "swigloo"))
    assert wrong.returncode == 2 and "no swigloo; there are" in wrong.stderr
