"""The doctor: says good, degraded or broken for the right reasons, and leaves nothing patched."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from fast_unsloth_patch import compat, doctor, registry, status
from fast_unsloth_patch.ops import swiglu as swiglu_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("FAST_UNSLOTH", "FAST_UNSLOTH_ONLY", "FAST_UNSLOTH_EXCLUDE", "FAST_UNSLOTH_RECOMPUTE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examine(capsys, monkeypatch):
    """Run some of the sections in this process; exit status and the checks by name."""

    def run(*sections):
        for name in ("_environment", "_versions", "_startup", "_gpu", "_ops", "_patches"):
            if name not in sections:
                monkeypatch.setattr(doctor, name, lambda: iter(()))
        monkeypatch.setattr(doctor, "_environment", lambda: iter([doctor.Check("environment", "test", "ok", "")]))
        code = doctor.main(["--json"])
        result = json.loads(capsys.readouterr().out)
        assert result["exit"] == code and result["verdict"] == ("good", "degraded", "broken")[code]
        return code, {check["name"]: check for check in result["checks"]}

    return run


def test_command_line(run_python):
    done = run_python(None, args=["-m", "fast_unsloth_patch", "doctor", "--json"])
    result = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in result["checks"]}
    assert states.pop("start-up file") in ("ok", "note")
    not_good = {name for name, state in states.items() if state not in ("ok", "note")}
    # Without a GPU everything works, but nothing gets faster.
    assert not_good == (set() if torch.cuda.is_available() else {"no GPU"}), done.stdout
    assert done.returncode == result["exit"] == len(not_good)
    assert {patch.id for patch in registry.PATCHES} <= states.keys()
    assert {"rms_norm float32", "rope float32", "swiglu float32", "lora_linear float32"} <= states.keys()
    assert {"lora_qkv float32", "lora_mlp float32", "linear_cross_entropy float32"} <= states.keys()


def test_table(capsys, monkeypatch):
    def checks():
        yield doctor.Check("ops", "good one", "ok", "error 1e-7")
        yield doctor.Check("gpu", "bad one", "degraded", "no GPU")

    monkeypatch.setattr(doctor, "checks", checks)
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "ops", "good", "one", "error", "1e-7"]
    assert lines[-2:] == ["degraded", "  bad one: no GPU"]


def test_patches_are_tried_and_taken_off(examine):
    from transformers.models.llama.modeling_llama import LlamaMLP

    before = LlamaMLP.__dict__["forward"]
    code, checks = examine("_patches")
    assert code == 0 and checks["llama.mlp"]["detail"] == "applied"
    assert LlamaMLP.__dict__["forward"] is before and not status().environment["active"]


def test_conflict_with_another_patcher(examine, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    code, checks = examine("_patches")
    assert code == 1 and checks["llama.mlp"]["state"] == "degraded" and "conflict" in checks["llama.mlp"]["detail"]
    assert checks["llama.rms_norm"]["state"] == "ok"


def test_variables_are_respected(examine, monkeypatch):
    monkeypatch.setenv("FAST_UNSLOTH_EXCLUDE", "llama.loss,banana")
    code, checks = examine("_patches")
    assert code == 1
    assert checks["llama.loss"]["detail"] == "declined: in exclude" and checks["llama.mlp"]["state"] == "ok"
    assert "banana" in checks["configuration"]["detail"]


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        (lambda gate, up: torch.nn.functional.silu(gate) * up * 1.0001, "error 1.0e-04 forward, 1.0e-04 backward"),
        (lambda gate, up: torch.nn.functional.silu(gate) * up * float("nan"), "error inf forward, inf backward"),
        (lambda gate, up: gate.no_such_thing, "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    ],
)
def test_op_that_computes_wrong_is_broken(examine, monkeypatch, wrong, detail):
    monkeypatch.setattr(swiglu_module, "swiglu", wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, checks = examine("_ops")
    assert code == 2
    assert checks["swiglu float32"]["state"] == "broken" and detail in checks["swiglu float32"]["detail"]
    assert {check["state"] for name, check in checks.items() if name != "swiglu float32"} == {"ok"}


def test_low_precision_tolerance_sees_an_error_of_a_percent():
    cases = {case.name: case for case in doctor.op_cases()}
    for case in cases.values():
        assert max(doctor.op_errors(case, "cpu", torch.bfloat16)) < doctor._TOLERANCES["bfloat16"], case.name
    mlp = cases["lora_mlp"]
    wrong = mlp._replace(op=lambda *tensors: mlp.op(*tensors) * 1.02)
    assert min(doctor.op_errors(wrong, "cpu", torch.bfloat16)) > doctor._TOLERANCES["bfloat16"]


@pytest.mark.parametrize(
    ("name", "version", "code", "state"),
    [
        ("wrapt", None, 2, "broken"),
        ("transformers", "4.57.1", 2, "broken"),
        ("torch", "2.3.0", 2, "broken"),
        ("peft", None, 1, "degraded"),
        ("triton", None, 1 if torch.cuda.is_available() else 0, "degraded" if torch.cuda.is_available() else "note"),
    ],
)
def test_versions(examine, monkeypatch, name, version, code, state):
    found = compat.installed
    monkeypatch.setattr(compat, "installed", lambda package: version if package == name else found(package))
    got, checks = examine("_versions")
    assert got == code and checks[name]["state"] == state
    assert "pip install" in checks[name]["detail"] and (version is None or version in checks[name]["detail"])
    assert {check["state"] for other, check in checks.items() if other != name} == {"ok"}


def test_what_needs_a_missing_package_is_left_out(monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda package: None)
    ran = []
    for name in ("_environment", "_versions", "_startup", "_gpu", "_ops", "_patches"):
        monkeypatch.setattr(doctor, name, lambda name=name: ran.append(name) or iter(()))
    assert list(doctor.checks()) == [] and ran == ["_environment", "_versions", "_startup"]


def test_a_failing_section_does_not_end_the_examination(examine, monkeypatch):
    def _gpu():
        raise RuntimeError("CUDA driver is too old\nand more")

    monkeypatch.setattr(doctor, "_gpu", _gpu)
    code, checks = examine("_gpu", "_versions")
    assert code == 2 and checks["failed"]["detail"] == "RuntimeError: CUDA driver is too old"
    assert checks["torch"]["state"] == "ok"


class TestStartup:
    def test_active(self, examine, monkeypatch, tmp_path):
        (tmp_path / "sitecustomize.py").write_text((ROOT / "fast_unsloth_patch.pth").read_text())
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        code, checks = examine("_startup")
        assert code == 0 and checks["start-up file"]["state"] == "ok"

    @pytest.mark.parametrize(("variable", "code", "state"), [("", 0, "note"), ("1", 1, "degraded"), ("0", 0, "note")])
    def test_not_active(self, examine, monkeypatch, variable, code, state):
        monkeypatch.setenv("FAST_UNSLOTH", variable)
        run = subprocess.run
        # -S: start-up files are not read.
        monkeypatch.setattr(subprocess, "run", lambda args, **kwargs: run([args[0], "-S", *args[1:]], **kwargs))
        got, checks = examine("_startup")
        assert got == code and checks["start-up file"]["state"] == state
        assert "python -m fast_unsloth_patch run" in checks["start-up file"]["detail"]


@pytest.mark.gpu
def test_gpu_is_good(examine):
    code, checks = examine("_gpu", "_ops")
    assert code == 0, checks
    assert {"lora_mlp bfloat16", "lora_mlp float32", "cuda:0"} <= checks.keys()
    assert "Triton on cuda" in checks["lora_mlp bfloat16"]["detail"]
