"""Every kernel of ops/ and weights/, as the ops launch it, compiles for every kind of chip and fits its memory.

No GPU is needed: Triton builds a cubin for any target, and `kernel_cases` says what to build. Everything is built for
sm_90; for the other chips one case of each kernel in 16 bits and in fp32, the one that takes the most shared memory.
"""

import json
import math
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
import kernel_cases

from fast_unsloth_patch.device import launch as _launch

MAIN = 90


def kernels_defined():
    # What the op modules define, to catch a kernel that no case builds. By our convention its name ends in _kernel.
    for module in kernel_cases.op_modules():
        for name, value in vars(module).items():
            if name.endswith("_kernel") and getattr(value, "__module__", None) == module.__name__:
                yield value


def size_of(case):
    """The operands' tiles: what shared memory grows with, good enough to find the case that takes the most."""
    sizes = [v for name, v in case.constexprs if name.startswith(("BLOCK", "SLOTS")) and isinstance(v, int)]
    flags = [v for name, v in case.constexprs if name in ("J", "MASKED") and v]
    return math.prod(sizes + flags)


def most_demanding(cases):
    """One case of each kernel and size of its first operand's elements."""
    found = {}
    for case in cases:
        key = case.kernel, case.signature[0][1] == "*fp32"
        if key not in found or size_of(case) > size_of(found[key]):
            found[key] = case
    return list(found.values())


def checked(case, capability):
    try:
        compiled = kernel_cases.build(case, capability)
    except Exception as error:  # whatever the compiler raises, say for which case
        raise AssertionError(f"sm_{capability}: {case}: {error}") from error
    assert "cubin" in compiled.asm, case
    check_fits(case, compiled, _launch.SHARED_MEMORY[capability])
    return compiled


def check_fits(case, compiled, limit):
    needed = compiled.metadata.shared
    assert needed <= limit, f"{case} needs {needed} bytes of shared memory, the chip has {limit}"


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    os.environ.pop("TRITON_CACHE_DIR")
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before


@pytest.mark.parametrize("capability", [c for c in _launch.TARGETS if c != MAIN])
def test_compiles_and_fits(capability):
    built = most_demanding(kernel_cases.cases(capability))
    for case in built:
        checked(case, capability)
    assert len(built) > 15


KERNELS = sorted({kernel.__name__ for kernel in kernels_defined()})


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case(kernel, tmp_path):
    """For sm_90; and the kernels of a bf16 training step keep their registers: a spill is traffic nobody counted."""
    cases = [case for case in kernel_cases.cases(MAIN) if case.kernel.__name__ == kernel]
    assert cases, f"nothing launches {kernel}"
    for case in cases:
        compiled = checked(case, MAIN)
        if case.of_a_model():
            used = kernel_cases.resources(compiled, tmp_path)
            assert used["STACK"] == 0, f"{case} spills: {used}"


def test_every_kernel_is_launched():
    assert {id(case.kernel) for case in kernel_cases.cases(MAIN)} >= {id(kernel) for kernel in kernels_defined()}
    assert len(KERNELS) >= 14


def test_every_kind_of_operand_is_covered():
    cases = kernel_cases.cases(MAIN)
    down = [case for case in cases if case.kernel.__name__ == "down_kernel"]
    assert {case.signature[0][1] for case in down} == {"*bf16", "*fp16", "*fp32"}
    assert {dict(case.constexprs)["MASKED"] for case in down} == {True, False}
    assert len({case.specialisation() for case in cases}) == len(cases) > 150


def test_shared_memory_that_does_not_fit_is_seen(tmp_path):
    """The check itself, with a kernel that is known to need some; and that the assembler's report is read."""
    case = next(case for case in kernel_cases.cases(86) if case.kernel.__name__ == "_rms_norm_bwd_kernel")
    compiled = kernel_cases.build(case, 86)
    check_fits(case, compiled, 99 * 1024)
    with pytest.raises(AssertionError, match="the chip has 8"):
        check_fits(case, compiled, 8)
    used = kernel_cases.resources(compiled, tmp_path)
    assert used["REG"] > 16 and {"STACK", "SHARED"} <= used.keys()


def test_the_benchmark_runs(run_python, tmp_path):
    """On a CPU: every op of benchmarks/kernels.py agrees with its oracle and leaves its rows in the results file."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.py"
    results = tmp_path / "results.json"
    done = run_python(None, args=(script, "--cpu", "--tiny", "--json", results))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())["kernels"]
    assert {row["op"] for row in rows} >= {"rms_norm", "rope", "swiglu", "lora_qkv", "lora_mlp", "linear_cross_entropy"}
    # The errors of dropout_bits are in other units, and those of the experts' parts in what they may be; that of
    # unpacked weights, which depend on no tokens, is none.
    fast = [row for row in rows if row["impl"] == "fast"]
    parts = [row for row in fast if row["op"].startswith("experts_")]
    assert len({row["op"] for row in parts}) >= 12 and all(0 <= e < 1 for row in parts for e in row["errors"])
    mine = [row for row in fast if not row["op"].startswith(("dropout_bits", "experts_"))]
    assert all(0 < error < 0.02 for row in mine if row["tokens"] for error in row["errors"])
    unpacked = [row for row in mine if not row["tokens"]]
    assert len(unpacked) >= 5 and all(error == 0 for row in unpacked for error in row["errors"])
    assert all(row["ms"] > 0 and row["versions"]["torch"] for row in rows)
    again = run_python(None, args=(script, "--cpu", "--tiny", "--ops", "swiglu", "--json", results))
    assert again.returncode == 0 and len(json.loads(results.read_text())["kernels"]) == len(rows)
    wrong = run_python(None, args=(script, "--cpu", "--ops", "swigloo"))
    assert wrong.returncode == 2 and "no swigloo; there are" in wrong.stderr
