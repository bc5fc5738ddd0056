"""Bad input and poor surroundings: what was found, what to do, and never a broken script."""

from __future__ import annotations

import pytest
from conftest import ROOT

import fast_unsloth_patch as fup
from fast_unsloth_patch import compat, install
from fast_unsloth_patch.registry import PATCHES


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    monkeypatch.setattr(install, "_state", install._State())
    for name in ("FAST_UNSLOTH", "FAST_UNSLOTH_ONLY", "FAST_UNSLOTH_EXCLUDE", "FAST_UNSLOTH_RECOMPUTE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("argument", ["only", "exclude"])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llama.atention", "llama.attention"),
        ("lama", "llama"),
        ("peft_linear", "peft.linear"),
        ("Llama.MLP", "llama.mlp"),
    ],
)
def test_unknown_patch_names_the_nearest(argument, name, nearest):
    with pytest.raises(fup.UnknownPatchError, match=rf"did you mean '{nearest}'\? Known names: ") as caught:
        fup.apply(**{argument: name})
    assert isinstance(caught.value, (fup.FastPatchError, ValueError)) and repr(name) in str(caught.value)
    assert not install._state.active, "a wrong call changes nothing"


def test_unknown_patch_that_is_near_nothing():
    with pytest.raises(fup.UnknownPatchError, match=r"unknown patch 'xyzzy'\. Known names"):
        fup.apply(only=["llama.mlp", "xyzzy"])


@pytest.mark.parametrize("value", [3, True, object()])
def test_only_of_another_type(value):
    with pytest.raises(fup.OptionError, match="only takes patch ids or families"):
        fup.apply(only=value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("x", "recompute='x' is unknown: use 'full', 'stock', 'auto' or 'offload'"),
        (True, "recompute=True is unknown"),
        ("", "recompute='' is unknown"),
    ],
)
def test_recompute(value, says):
    with pytest.raises(ValueError, match=says) as caught:
        fup.apply(recompute=value)
    assert isinstance(caught.value, fup.FastPatchError)
    assert not install._state.active


def test_what_is_no_model():
    with pytest.raises(fup.OptionError, match=r"status\(model\) takes a torch.nn.Module, not int"):
        fup.status(3)
    with pytest.raises(fup.OptionError, match=r"keep_stock\(model\) takes a torch.nn.Module, not str"):
        fup.keep_stock("model")
    with pytest.raises(fup.OptionError, match="needs a name"):
        fup.status().require()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"FAST_UNSLOTH": "banana"}, "FAST_UNSLOTH=banana is ignored"),
        ({"FAST_UNSLOTH": "1", "FAST_UNSLOTH_ONLY": "llama.mlp,llama.nlp"}, "did you mean 'llama.mlp'?"),
        ({"FAST_UNSLOTH": "1", "FAST_UNSLOTH_EXCLUDE": "peftt"}, "did you mean 'peft'?"),
        ({"FAST_UNSLOTH": "1", "FAST_UNSLOTH_RECOMPUTE": "most"}, "recompute='most' is unknown"),
        ({"FAST_UNSLOTH": "1", "FAST_UNSLOTH_LOG": "loud"}, "FAST_UNSLOTH_LOG=loud is ignored"),
    ],
)
@pytest.mark.parametrize("filters", ["", "error"])
def test_wrong_variable_is_one_line_and_ignored(run_python, stubs, variables, says, filters):
    code = "import fast_unsloth_patch as f, transformers.models.llama.modeling_llama; print(f.status(), '\\nran')"
    done = run_python(code, env={**variables, "PYTHONWARNINGS": filters, "PYTHONPATH": stubs()})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ran\n")
    assert done.stderr.count(says) == 1, done.stderr
    assert "Traceback" not in done.stderr
    if variables["FAST_UNSLOTH"] == "banana":
        assert done.stdout.count("apply() has not been called") == len({p.id.partition(".")[0] for p in PATCHES})


STUB_MODELS = """
class LlamaRMSNorm:
    def forward(self, hidden_states):
        return hidden_states
class LlamaAttention:
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        return hidden_states
class LlamaMLP:
    def forward(self, x):
        return x
class LlamaForCausalLM:
    def forward(self, input_ids=None):
        return input_ids
class LlamaDecoderLayer:
    gradient_checkpointing = False
"""


@pytest.fixture
def stubs(tmp_path):
    """Writes packages that claim to be transformers (and peft) of some version, with nothing heavy in them."""

    def write(transformers="5.23.0", peft="0.21.2"):
        llama = tmp_path / "transformers" / "models" / "llama"
        llama.mkdir(parents=True)
        for folder in (llama, llama.parent):
            (folder / "__init__.py").write_text("")
        (llama.parent.parent / "__init__.py").write_text(f"__version__ = {transformers!r}\n")
        (llama / "modeling_llama.py").write_text(STUB_MODELS)
        lora = tmp_path / "peft" / "tuners" / "lora"
        lora.mkdir(parents=True)
        for folder in (lora, lora.parent):
            (folder / "__init__.py").write_text("")
        (lora.parent.parent / "__init__.py").write_text(f"__version__ = {peft!r}\n")
        (lora / "layer.py").write_text("class Linear:\n    def forward(self, x, *args, **kwargs):\n        return x\n")
        return f"{tmp_path}:{ROOT}"

    return write


@pytest.mark.parametrize("version", ["5.5.4", "4.57.1", "6.0.0.dev0"])
def test_unsupported_transformers(run_python, stubs, version):
    code = """
import fast_unsloth_patch as fup
fup.apply()
from transformers.models.llama import modeling_llama
print(modeling_llama.LlamaMLP().forward(3), hasattr(modeling_llama.LlamaMLP.forward, "__wrapped__"))
print(fup.status()["llama.mlp"].reason)
try:
    fup.apply(strict=True)
except fup.PatchUnavailableError as error:
    print(error)
"""
    done = run_python(code, env={"PYTHONPATH": stubs(transformers=version)})
    assert done.returncode == 0, done.stderr
    reason = f"transformers {version} is outside the supported window: pip install 'transformers>=5.6,<6'"
    lines = done.stdout.splitlines()
    assert lines[:2] == ["3 False", reason]
    assert lines[2].startswith("nothing is patched") and reason in lines[2]
    assert done.stderr.count(reason) == 1, "one warning a reason, not one a patch"
    assert "llama.rms_norm, llama.attention, llama.mlp" in done.stderr


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_peft_and_bitsandbytes_missing(run_python, stubs):
    code = (
        f"BLOCKED = ('peft', 'bitsandbytes')\n{BLOCK}"
        + """
import fast_unsloth_patch as fup
fup.apply()
try:
    import peft
except ModuleNotFoundError as error:
    print(error)
from transformers.models.llama import modeling_llama
print(fup.status()["peft.linear"].state)
try:
    fup.apply(only="peft")
except fup.PatchUnavailableError as error:
    print(error)
"""
    )
    done = run_python(code, env={"PYTHONPATH": stubs()})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["No module named 'peft'", "pending"]
    assert "peft is not installed: pip install 'peft>=0.18' (peft.linear, " in lines[2]
    assert "peft" not in done.stderr, "nobody asked for it"


def test_wrapt_missing(run_python, stubs):
    code = (
        f"BLOCKED = ('wrapt',)\n{BLOCK}"
        + """
import fast_unsloth_patch as fup
fup.apply()
from transformers.models.llama import modeling_llama
print(modeling_llama.LlamaMLP().forward(3))
print(fup.status()["llama.mlp"].reason)
"""
    )
    done = run_python(code, env={"PYTHONPATH": stubs()})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3\n") and "wrapt is not installed: pip install 'wrapt>=1.16'" in done.stdout


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.11.0+cu130", (2, 11, 0)), ("6.0.0.dev0", (6, 0, 0)), ("5.6.0rc1", (5, 6, 0)), ("5.23", (5, 23)), ("x", ())],
)
def test_release(text, numbers):
    assert compat.release(text) == numbers


def test_no_gpu_is_said():
    import torch

    expected = "Triton" if torch.cuda.is_initialized() else "PyTorch reference"
    assert fup.status().environment["backend"].startswith(expected)
