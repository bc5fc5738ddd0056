"""LoRA on GPTQ layers: starts `gptq_lora_cases` in a process of its own, since gptqmodel sets variables and prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(f"gptq_lora_{name}.py") for name in ("cases", "states")]
# Without the extension, its packer need not be compiled first. On two cores gptqmodel starts one worker of the two
# that its own loader asks for.
ENVIRONMENT = {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_CPU_WORKERS": "2"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


def run_files(run_python, files, *arguments, **variables):
    command = ("-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *arguments, *files)
    done = run_python(None, ENVIRONMENT | variables, 500, command)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_on_the_cpu(run_python):
    assert run_files(run_python, CASES) >= 60


@pytest.mark.gpu
def test_on_a_gpu(run_python):
    """`test_quantised_gpu` over GPTQ."""
    file = CASES[0].with_name("test_quantised_gpu.py")
    assert run_files(run_python, [file], FAST_UNSLOTH_TEST_BASE="gptq") >= 40
