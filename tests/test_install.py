"""The mechanism: apply and unapply in every order, on stand-in modules (fast) and on every row of the registry."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import textwrap
import threading
import types
import warnings
from importlib.machinery import ModuleSpec

import pytest

import fast_unsloth_patch as fup
from fast_unsloth_patch import install, registry
from fast_unsloth_patch.registry import Patch

TARGETS = textwrap.dedent("""
    class Norm:
        def forward(self, x):
            return ("stock norm", x)

    class Loss:
        def forward(self, x, *, scale=1, **kwargs):
            return ("stock loss", x * scale)

    class Layer:
        gradient_checkpointing = False
""")

REPLACEMENTS = """
    policies = []

    def norm(stock, tally):
        def forward(self, x):
            return ("fast", stock(self, x))
        return forward

    def loss(stock, tally):
        def forward(self, x, **kwargs):
            return ("fast", stock(self, x, **kwargs))
        return forward

    def checkpointing(stock, tally):
        return property(lambda self: "ours")

    def set_policy(policy):
        policies.append(policy)

    def raises(stock, tally):
        raise RuntimeError("this replacement is broken")
"""


class StandIn:
    """A package ``name`` with one leaf module of targets, a module of replacements, and the rows that join them."""

    def __init__(self, folder, name):
        self.folder, self.name, self.module_name = folder, name, f"{name}.leaf"
        self.builders = f"{name}_builders"
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
        self.write(TARGETS)
        (folder / f"{self.builders}.py").write_text(textwrap.dedent(REPLACEMENTS))

    def write(self, source, before="", after=""):
        (self.folder / self.name / "leaf.py").write_text(before + source + after)
        importlib.invalidate_caches()

    def row(self, patch_id, target, builder, **options):
        return Patch(patch_id, self.module_name, target, f"{self.builders}:{builder}", **options)

    def rows(self):
        return (
            self.row("fake.norm", "Norm.forward", "norm", parameters=("self", "x")),
            self.row("fake.loss", "Loss.forward", "loss", parameters=("self", "x", "scale", "kwargs")),
            self.row("fake.checkpointing", "Layer._checkpoint", "checkpointing", kind="checkpoint_property"),
        )

    def load(self):
        return importlib.import_module(self.module_name)

    def state(self, patch_id):
        row = fup.status()[patch_id]
        return row.state, row.reason


@pytest.fixture
def fake(tmp_path, monkeypatch):
    name = f"fup_fake_{tmp_path.name.replace('-', '_')}_{id(tmp_path)}"
    stand_in = StandIn(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(install, "_state", install._State())
    monkeypatch.setattr(registry, "PATCHES", stand_in.rows())
    yield stand_in
    install.unapply()
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def attributes(module):
    owners = (module.Norm, module.Loss, module.Layer)
    return [owner.__dict__.get("forward", owner.__dict__.get("_checkpoint")) for owner in owners]


@pytest.mark.parametrize("order", ["apply, import", "import, apply", "import, build, apply"])
def test_every_order_patches_and_unapply_restores_the_identical_objects(fake, order):
    if order == "apply, import":
        assert {row.state for row in fup.apply().rows} == {"pending"}
        module = fake.load()
        stock = [getattr(attribute, "__wrapped__", None) for attribute in attributes(module)]
        norm = module.Norm()
    else:
        module = fake.load()
        stock = attributes(module)
        norm = module.Norm()
        if order == "import, apply":
            norm = None
        fup.apply()
    norm = norm or module.Norm()
    assert {row.state for row in fup.status().rows} == {"applied"}
    assert norm.forward(1) == ("fast", ("stock norm", 1))
    assert module.Loss().forward(2, scale=3) == ("fast", ("stock loss", 6))
    assert module.Layer()._checkpoint == "ours"

    fup.unapply()
    assert all(now is before for now, before in zip(attributes(module), stock, strict=True))
    assert "_checkpoint" not in module.Layer.__dict__, "an attribute that did not exist must not exist again"
    assert norm.forward(1) == ("stock norm", 1)
    assert {row.state for row in fup.status().rows} == {"reverted"}


def test_second_apply_changes_nothing_and_keeps_signature_and_names(fake):
    module = fake.load()
    stock = module.Loss.forward
    fup.apply()
    first = attributes(module)
    fup.apply()
    assert all(now is before for now, before in zip(attributes(module), first, strict=True))
    assert module.Loss.forward.__wrapped__ is stock
    assert inspect.signature(module.Loss.forward) == inspect.signature(stock)
    assert module.Loss.forward.__qualname__ == "Loss.forward"
    assert type(module.Loss.forward) is types.FunctionType


def test_hooks_that_have_not_fired_are_inert_after_unapply_and_live_again_after_apply(fake):
    fup.apply()
    fup.unapply()
    module = fake.load()
    assert module.Norm().forward(1) == ("stock norm", 1)
    assert fake.state("fake.norm")[0] == "reverted"
    fup.apply()
    assert module.Norm().forward(1) == ("fast", ("stock norm", 1))


def test_second_apply_replaces_the_configuration(fake):
    module = fake.load()
    stock = attributes(module)
    fup.apply(only="fake.norm")
    assert fake.state("fake.norm") == ("applied", "")
    assert fake.state("fake.loss") == ("declined", "not in only")
    fup.apply(exclude=["fake.norm"])
    assert module.Norm.forward is stock[0]
    assert fake.state("fake.norm") == ("declined", "in exclude")
    assert fake.state("fake.loss") == ("applied", "")
    fup.apply()
    assert {row.state for row in fup.status().rows} == {"applied"}


def test_recompute_policy_reaches_its_module(fake):
    fup.apply(recompute="stock")
    fake.load()
    builders = sys.modules[fake.builders]
    assert builders.policies[-1] == "stock"
    fup.apply()
    assert builders.policies[-1] == "full"
    assert fup.status().environment["recompute"] == "full"


@pytest.mark.parametrize("filters", ["default", "error"])
def test_raising_replacement_leaves_the_import_alone(fake, monkeypatch, capsys, filters):
    rows = (fake.row("fake.norm", "Norm.forward", "raises"), fake.row("fake.loss", "Loss.forward", "loss"))
    monkeypatch.setattr(registry, "PATCHES", rows)
    fup.apply()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filters, fup.FastPatchWarning)
        module = fake.load()
    said = [str(w.message) for w in caught] if filters == "default" else capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "fake.norm" in said[0] and "this replacement is broken" in said[0]
    assert module.Norm().forward(1) == ("stock norm", 1)
    assert module.Loss().forward(1)[0] == "fast", "the rows after a broken one are applied"
    assert fake.state("fake.norm") == ("declined", "RuntimeError: this replacement is broken")


@pytest.mark.parametrize("options", [{"strict": True}, {"only": "fake.norm"}])
def test_what_was_asked_for_raises_and_then_nothing_is_patched(fake, monkeypatch, options):
    rows = (fake.row("fake.norm", "Norm.forward", "raises"), fake.row("fake.loss", "Loss.forward", "loss"))
    monkeypatch.setattr(registry, "PATCHES", rows)
    module = None if "strict" in options else fake.load()
    with pytest.raises(fup.PatchUnavailableError, match=r"this replacement is broken \(fake.norm\)"):
        fup.apply(**options)
    module = module or fake.load()
    assert module.Loss().forward(1)[0] == "stock loss"


def test_strict_imports_the_targets(fake):
    assert {row.state for row in fup.apply(strict=True).rows} == {"applied"}


def test_apply_inside_the_import_of_the_target(fake):
    """A circular import: apply() sees the module half built, before its classes exist."""
    fake.write(TARGETS, before="import fast_unsloth_patch as fup\nfup.apply()\nSEEN = str(fup.status())\n")
    module = fake.load()
    assert "half imported" in module.SEEN
    assert module.Norm().forward(1) == ("fast", ("stock norm", 1))
    assert {row.state for row in fup.status().rows} == {"applied"}
    assert type(module.__spec__) is ModuleSpec


def test_import_that_fails_half_way_is_patched_when_it_succeeds(fake):
    fake.write(TARGETS, before="import fast_unsloth_patch as fup\nfup.apply()\n", after="raise OSError('disk')\n")
    with pytest.raises(OSError, match="disk"):
        fake.load()
    fake.write(TARGETS + "\n# now whole\n")
    assert fake.load().Norm().forward(1)[0] == "fast"


def test_apply_while_another_thread_imports(fake):
    fake.write(TARGETS, before="import time\ntime.sleep(0.3)\n")
    importer = threading.Thread(target=fake.load)
    importer.start()
    while fake.module_name not in sys.modules:
        threading.Event().wait(0.01)
    fup.apply()
    importer.join()
    assert fake.load().Norm().forward(1) == ("fast", ("stock norm", 1))


def test_many_threads_apply_and_import(fake):
    fake.write(TARGETS, before="import time\ntime.sleep(0.1)\n")
    errors, seen = [], []
    start = threading.Barrier(8)

    def work(number):
        try:
            start.wait()
            if number % 2:
                fup.apply()
            else:
                fake.load()
            fup.apply()
            seen.append(fake.load().Norm().forward(1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert seen == [("fast", ("stock norm", 1))] * 8
    assert len(install._state.records) == 3, "each target was swapped once"


def test_reload_is_noticed_and_patched_again(fake):
    module = fake.load()
    fup.apply()
    old = module.Norm
    importlib.reload(module)
    assert fake.state("fake.norm") == ("declined", "conflict: Norm was replaced or reloaded after apply()")
    fup.apply()
    assert fake.state("fake.norm") == ("applied", "")
    assert module.Norm().forward(1)[0] == "fast" and old().forward(1)[0] == "fast"
    fup.unapply()
    assert module.Norm().forward(1)[0] == old().forward(1)[0] == "stock norm"


def test_deleted_module_is_patched_when_it_comes_back(fake):
    fake.load()
    fup.apply()
    del sys.modules[fake.module_name]
    fup.apply()
    assert fake.load().Norm().forward(1)[0] == "fast"


def other_patcher(stock):
    @functools.wraps(stock)
    def forward(self, x):
        return ("theirs", stock(self, x))

    return forward


def test_stands_aside_for_another_patcher(fake):
    module = fake.load()
    module.Norm.forward = other_patcher(module.Norm.forward)
    module.Loss = type("TheirLoss", (), {"forward": lambda self, x: "theirs"})
    with pytest.warns(fup.FastPatchWarning, match="conflict"):
        fup.apply()
    assert fake.state("fake.norm")[1] == "conflict: Norm.forward was replaced by test_install.forward"
    assert fake.state("fake.loss")[1] == "conflict: Loss was replaced by test_install.TheirLoss"
    assert module.Norm().forward(1) == ("theirs", ("stock norm", 1))


def test_another_patcher_afterwards_is_shown_and_left_in_place(fake):
    module = fake.load()
    fup.apply()
    module.Norm.forward = theirs = other_patcher(module.Norm.forward)
    expected = "conflict: Norm.forward was replaced after apply() by test_install.forward"
    assert fake.state("fake.norm") == ("declined", expected)
    with pytest.warns(fup.FastPatchWarning, match=r"Norm\.forward"):
        fup.unapply()
    assert module.Norm.forward is theirs


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("class Norm:\n    def forward(self, x, cache_position):\n        pass\n", "takes (self, x, cache_position)"),
        ("class Base:\n    def forward(self, x):\n        pass\nclass Norm(Base):\n    pass\n", "defines no forward"),
        ("class Renamed:\n    pass\n", "has no class Norm"),
    ],
)
def test_target_that_is_not_as_known_is_declined(fake, monkeypatch, source, reason):
    monkeypatch.setattr(registry, "PATCHES", fake.rows()[:1])
    fake.write(source)
    fake.load()
    with pytest.warns(fup.FastPatchWarning):
        fup.apply()
    state, why = fake.state("fake.norm")
    assert state == "declined" and reason in why


def test_ids_are_unique_and_rows_resolve():
    assert len({patch.id for patch in registry.PATCHES}) == len(registry.PATCHES)
    for patch in registry.PATCHES:
        assert patch.target.count(".") == 1 and patch.replacement.count(":") == 1 and patch.summary and patch.requires


# Every row of the registry, in one process an order: importing torch and transformers costs most of the time.
REAL = """
import sys
from importlib.util import find_spec
import fast_unsloth_patch as fup
from fast_unsloth_patch.registry import MISSING, PATCHES

ABSENT = {p.id for p in PATCHES if p.optional and find_spec(p.optional) is None}
PATCHES = [p for p in PATCHES if p.id not in ABSENT]

def owner_of(patch):
    return getattr(sys.modules[patch.module], patch.target.split(".")[0])

def attributes():
    return {p.id: vars(owner_of(p)).get(p.target.split(".")[1], MISSING) for p in PATCHES}

def import_all():
    import importlib
    for patch in PATCHES:
        importlib.import_module(patch.module)

def build():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).train()

def step(model):
    import torch
    ids = torch.arange(24).view(2, 12) % 64
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return torch.stack([loss.detach(), *(p.grad.norm() for p in model.parameters() if p.requires_grad)])

def same(a, b):
    return ((a - b).abs().max() / b.abs().max()).item() < 1e-5

def all_applied():
    states = {row.id: (row.state, row.reason) for row in fup.status().rows}
    assert all("is not installed: pip install" in states.pop(i)[1] for i in ABSENT)
    assert set(states.values()) == {("applied", "")}, states
"""

APPLY_FIRST = """
fup.apply()
assert "torch" not in sys.modules and "transformers" not in sys.modules
import_all()
all_applied()
patched = attributes()
fup.apply()
assert attributes() == patched
model = build()
fast = step(model)
hits = {row.id: row.forward for row in fup.status().rows}
fup.unapply()
stock = attributes()
for patch in PATCHES:
    new = patched[patch.id]
    assert new is not stock[patch.id]
    wrapped = [MISSING]
    while patch.kind == "forward" and hasattr(new, "__wrapped__"):
        new = new.__wrapped__
        wrapped.append(new)
    assert any(stock[patch.id] is w for w in wrapped), patch
assert same(fast, step(model))
assert {row.id: row.forward for row in fup.status().rows} == hits, "unapply() leaves nothing behind"
assert hits["llama.rms_norm"] and hits["llama.attention"] and hits["llama.mlp"] and hits["llama.loss"], hits
assert set(row.state for row in fup.status().rows if row.id not in ABSENT) == {"reverted"}
"""

APPLY_LAST = """
import_all()
stock = attributes()
model = build()
reference = step(model)
fup.apply(strict=True)
all_applied()
assert not any(row.forward for row in fup.status().rows)
assert same(step(model), reference)
fup.status().require("llama.rms_norm", "llama.attention", "llama.mlp", "llama.loss")
with fup.disabled():
    step(model)
assert fup.status()["llama.mlp"].fallbacks["disabled"] == 2
modules = {row.id: row.modules for row in fup.status(model).rows}
assert modules["llama.mlp"] == 2 and modules["llama.loss"] == 1 and modules["peft.linear"] == 6, modules
fup.unapply()
assert all(now is stock[i] for i, now in attributes().items())
fup.apply(exclude="llama")
before = {row.id: row.forward for row in fup.status().rows}
assert same(step(model), reference)
fup.status().require("peft.linear")
assert all(row.forward == before[row.id] for row in fup.status().rows if row.id.startswith("llama."))
fup.apply()
fup.keep_stock(model)
before = {row.id: row.forward for row in fup.status().rows}
assert same(step(model), reference)
assert {row.id: row.forward for row in fup.status().rows} == before
assert "keep_stock" in str(fup.status(model))
fup.unapply()
assert all(now is stock[i] for i, now in attributes().items())

from transformers import LlamaConfig
from transformers.models.llama import modeling_llama
try:
    from transformers.monkey_patching import register_patch_mapping
except ImportError:
    sys.exit(0)
register_patch_mapping({"LlamaMLP": type("TheirMLP", (modeling_llama.LlamaMLP,), {})})
import warnings
warnings.simplefilter("ignore")
assert "monkey_patching maps LlamaMLP" in fup.apply()["llama.mlp"].reason
"""


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral"])
@pytest.mark.parametrize("order", ["apply first", "apply last"])
def test_every_row_of_the_registry(run_python, order, family):
    code = REAL + (APPLY_FIRST if order == "apply first" else APPLY_LAST)
    if family == "Mixtral":  # Its experts stand for the MLP, and PEFT's LoRA on them is no linear layer.
        code = code.replace("LlamaMLP", "LlamaSparseMoeBlock").replace("llama.mlp", "llama.moe")
        code = code.replace("down_proj", "o_proj")
    code = code.replace("Llama", family).replace("llama", family.lower())
    done = run_python(code, env={"FAST_UNSLOTH_LOG": "0"})
    assert done.returncode == 0, done.stderr[-4000:]
