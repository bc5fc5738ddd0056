"""Activation by ``FAST_UNSLOTH``: start-up files of wheel and editable installs, ``run``, import; free if unset."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from conftest import ROOT

from fast_unsloth_patch import bootstrap, registry

LINE = (ROOT / "fast_unsloth_patch.pth").read_text()

# What no process may pay for before it asks for transformers or peft.
LLAMA = [patch for patch in registry.PATCHES if patch.id.startswith("llama.")]
HEAVY = "{'torch', 'transformers', 'peft', 'triton', 'wrapt', 'importlib.metadata', 'numpy', 'dataclasses'}"

PROBE = """
import sys, json
early = sorted(HEAVY & set(sys.modules))
from transformers.models.llama import modeling_llama
print(json.dumps([early, PATCHED]))
""".replace("HEAVY", HEAVY)

# The one row whose replacement needs nothing of the real transformers.
PATCHED = "'_gradient_checkpointing_func' in vars(modeling_llama.LlamaDecoderLayer)"
PROBE = PROBE.replace("PATCHED", PATCHED)
STUB = "class LlamaDecoderLayer:\n    gradient_checkpointing = False\n"


@pytest.fixture
def stub(tmp_path):
    """A folder with a package that claims to be transformers, so that activation is tested without its 5 s import."""
    llama = tmp_path / "stub" / "transformers" / "models" / "llama"
    llama.mkdir(parents=True)
    for folder in (llama, llama.parent):
        (folder / "__init__.py").write_text("")
    (llama.parent.parent / "__init__.py").write_text("__version__ = '5.23.0'\n")
    (llama / "modeling_llama.py").write_text(STUB)
    return tmp_path / "stub"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project to build from, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "fast_unsloth_patch.pth",
        "fast_unsloth_patch.start",
    ):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fast_unsloth_patch", folder / "fast_unsloth_patch", ignore=ignored)
    return folder


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, source, tmp_path_factory):
    """Python of a fresh virtual environment with this package in it; the heavy packages come from ours."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(folder)}))
    # Read after the package's own start-up files, so that an installation of it among ours does not come first.
    (site / "zz_ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    what = ["-e", str(source)] if request.param == "editable" else [str(source)]
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", str(python)]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "install", *options, *what], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    yield python, site
    done = subprocess.run([*pip, "uninstall", "-y", "fast-unsloth-patch"], capture_output=True, text=True)
    assert done.returncode == 0 and not list(site.glob("*fast_unsloth_patch*")), "uninstalling removes every file"


def run(python, *args, variables=None, cwd=None):
    env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(variables or {})}
    # Not in the checkout: `python -c` puts the working directory on the path.
    cwd = cwd or python.parent
    return subprocess.run([str(python), *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_installed_files(environment):
    python, site = environment
    assert (site / "fast_unsloth_patch.pth").read_text() == LINE
    assert (site / "fast_unsloth_patch.start").read_text() == "fast_unsloth_patch.bootstrap:activate\n"
    home = run(python, "-c", "import fast_unsloth_patch; print(fast_unsloth_patch.__file__)").stdout
    assert home.strip() and not home.startswith(str(ROOT))


def test_variable_patches_an_unmodified_script(environment, stub):
    python, _ = environment
    for value, patched in (("1", "true"), ("strict", "true"), ("0", "false"), ("", "false"), (None, "false")):
        variables = {"PYTHONPATH": str(stub), **({} if value is None else {"FAST_UNSLOTH": value})}
        done = run(python, "-c", PROBE, variables=variables)
        assert done.stdout.strip() == f"[[], {patched}]", (value, done.stderr)
        # In a stub, the other targets are missing; that is said, once, and only when patching.
        assert done.stderr.count("FastPatchWarning") == (len(LLAMA) - 1 if patched == "true" else 0), done.stderr


def test_variable_patches_the_real_transformers(environment):
    python, _ = environment
    code = PROBE + "import fast_unsloth_patch as f; print(f.status())"
    done = run(python, "-W", "error::UserWarning", "-c", code, variables={"FAST_UNSLOTH": "1"})
    assert done.returncode == 0, done.stderr
    # Loading a model imports transformers' quantisers: those patches are one line.
    assert done.stdout.startswith("[[], true]") and done.stdout.count(" applied ") == len(LLAMA) + 1, done.stdout


def test_children_inherit(environment, stub):
    python, _ = environment
    code = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {PROBE!r}]).returncode)"
    done = run(python, "-c", code, variables={"FAST_UNSLOTH": "1", "PYTHONPATH": str(stub)})
    assert done.stdout.strip() == "[[], true]"


def test_unset_it_costs_nothing(environment):
    """Nothing of ours is imported, and the line itself takes microseconds."""
    python, site = environment
    done = run(python, "-X", "importtime", "-c", "pass")
    assert "fast_unsloth_patch" not in done.stderr
    code = compile(LINE, "fast_unsloth_patch.pth", "exec")
    namespace: dict = {}
    start = time.perf_counter()
    for _ in range(1000):
        exec(code, namespace)
    assert (time.perf_counter() - start) / 1000 < 20e-6

    def start_up():
        begin = time.perf_counter()
        run(python, "-c", "pass")
        return time.perf_counter() - begin

    pth, aside = site / "fast_unsloth_patch.pth", site / "fast_unsloth_patch.off"
    with_line, without = [], []
    for _ in range(15):
        with_line.append(start_up())
        pth.rename(aside)
        without.append(start_up())
        aside.rename(pth)
    # The medians differ by noise; the bound is what importing wrapt in the line would already break.
    assert statistics.median(with_line) - statistics.median(without) < 0.015


def test_set_it_imports_nothing_heavy_until_asked(environment):
    python, _ = environment
    code = f"import sys; print(sorted({HEAVY} & set(sys.modules)), 'fast_unsloth_patch' in sys.modules)"
    assert run(python, "-c", code, variables={"FAST_UNSLOTH": "1"}).stdout.strip() == "[] True"


def test_import_loads_nothing_heavy_and_is_fast(run_python):
    code = f"""
import sys, time
start = time.process_time()
import fast_unsloth_patch
print(time.process_time() - start)
print(sorted({HEAVY} & set(sys.modules)))
"""
    times = []
    for _ in range(7):
        seconds, heavy = run_python(code).stdout.splitlines()
        assert heavy == "[]"
        times.append(float(seconds))
    assert min(times) < 0.020, times


def test_triggers_are_the_packages_of_the_registry():
    assert set(bootstrap._TRIGGERS) == {patch.module.partition(".")[0] for patch in registry.PATCHES}


QUIET = {"PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("before", [True, False])
def test_plain_import_with_the_variable_set(run_python, stub, before):
    """Where start-up files are not read; also after transformers was imported."""
    code = "import fast_unsloth_patch\n" + PROBE if before else PROBE + "import fast_unsloth_patch\n"
    code += f"print({PATCHED})"
    # -S, for this package may be installed in the environment of the tests, with its start-up files.
    env = {"FAST_UNSLOTH": "1", "PYTHONPATH": f"{stub}:{ROOT}:{sysconfig.get_path('purelib')}", **QUIET}
    done = run_python(None, args=["-S", "-c", code], env=env)
    assert done.stdout.splitlines() == [f"[[], {'true' if before else 'false'}]", "True"], done.stderr


def test_the_script_has_the_last_word(run_python, stub):
    """An explicit call before the import is not overwritten by the variable when transformers comes."""
    env = {"FAST_UNSLOTH": "1", "PYTHONPATH": f"{stub}:{ROOT}", **QUIET}
    for call, expected in (("apply(exclude='llama')", "in exclude"), ("unapply()", "has not been called")):
        code = f"import fast_unsloth_patch as f; f.{call}\n{PROBE}print(f.status()['llama.checkpointing'].reason)"
        done = run_python(code, env=env)
        lines = done.stdout.splitlines()
        assert lines[0].endswith("false]") and expected in lines[1], done.stdout + done.stderr


def test_kill_switch_is_absolute(run_python, stub):
    code = f"import fast_unsloth_patch as f\n{PROBE}print(f.apply(strict=True, only='no such name'))"
    done = run_python(code, env={"FAST_UNSLOTH": "0", "PYTHONPATH": f"{stub}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    declined = done.stdout.count("declined: FAST_UNSLOTH=0")
    assert done.stdout.startswith("[[], false]") and declined == len(registry.PATCHES)


def test_variables_mirror_the_arguments_and_arguments_win(run_python, stub):
    code = """
import fast_unsloth_patch as f
from transformers.models.llama import modeling_llama
def show():
    s = f.status()
    print(s['llama.checkpointing'].state, s['llama.mlp'].reason, s.environment['recompute'])
show()
f.apply(only='llama.checkpointing', exclude='llama.mlp', recompute='full', strict=False)
show()
"""
    variables = {"FAST_UNSLOTH_ONLY": "peft, llama.checkpointing", "FAST_UNSLOTH_EXCLUDE": "peft.linear"}
    variables |= {"FAST_UNSLOTH": "strict", "FAST_UNSLOTH_RECOMPUTE": "stock", "PYTHONPATH": f"{stub}:{ROOT}"}
    done = run_python(code, env=variables)
    assert done.stdout.splitlines() == ["applied not in only stock", "applied in exclude full"], done.stderr


SCRIPT = """
import json, os, sys
from transformers.models.llama import modeling_llama
import neighbour
print(json.dumps([__name__, sys.argv, sys.path[0], os.environ["FAST_UNSLOTH"],
                  PATCHED]))
sys.exit(7)
""".replace("PATCHED", PATCHED)


@pytest.mark.parametrize("as_module", [False, True])
def test_run_command(run_python, stub, tmp_path, as_module):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "neighbour.py").write_text("")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    target = ["-m", "train"] if as_module else [script]
    done = run_python(
        None,
        args=["-S", "-m", "fast_unsloth_patch", "run", *target, "--lr", "1", "-m", "--help"],
        env={"PYTHONPATH": f"{stub}:{ROOT}:{sysconfig.get_path('purelib')}", **QUIET},
        cwd=folder if as_module else tmp_path,
    )
    assert done.returncode == 7, done.stderr
    expected = f'["__main__", ["{script}", "--lr", "1", "-m", "--help"], "{folder}", "1", true]'
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["run", "no_such_script.py"], 2, "there is no file 'no_such_script.py'"),
        (["run"], 2, "usage:"),
        ([], 2, "usage:"),
        (["train"], 2, "usage:"),
        (["--help"], 0, "usage:"),
    ],
)
def test_command_line_errors(run_python, args, code, says):
    done = run_python(None, args=["-m", "fast_unsloth_patch", *args])
    assert done.returncode == code and says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_run_keeps_a_value_that_the_user_set(run_python, stub, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROBE)
    env = {"FAST_UNSLOTH": "0", "PYTHONPATH": f"{stub}:{ROOT}"}
    done = run_python(None, args=["-m", "fast_unsloth_patch", "run", script], env=env)
    assert done.stdout.strip().endswith("false]"), done.stderr
