"""What holds the repository together."""

import argparse
import ast
import contextlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import drlim
import linear_eval
import moco
import simclr
import supcon
import swav

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

MODULES = [simclr, moco, swav, supcon, drlim, linear_eval]
METHODS = [module.__name__ for module in MODULES]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", METHODS)
def test_pep_723_block_is_pyprojects(name):
    text = (ROOT / f"{name}.py").read_text()
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", text, re.M)
    inline = tomllib.loads(re.sub(r"^# ", "", block[1], flags=re.M))
    assert inline == {key: PROJECT[key] for key in ("requires-python", "dependencies")}


@pytest.mark.parametrize("name", [*METHODS, "common"])
def test_scripts_import_no_other_script_and_no_other_package(name):
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    allowed = {"torch", "torchvision", "numpy", "accelerate", "safetensors", "PIL", "common"}
    assert names <= allowed | set(sys.stdlib_module_names)
    assert name != "common" or "common" not in names


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("common", 600),
        *((name, 330) for name in METHODS),
    ],
)
def test_files_stay_short(name, most):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= most


def parser(module, monkeypatch):
    made = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, _: made.append(self))
    with contextlib.suppress(AttributeError, TypeError):  # None has no flags
        module.parse_arguments([])
    return made[0]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_flag_has_a_help_of_one_sentence(module, monkeypatch):
    for action in parser(module, monkeypatch)._actions:
        assert action.help and "\n" not in action.help and ". " not in action.help, action
        assert len(action.help.split()) > 1 or action.dest == "optimizer", action


def test_flags_that_readme_names_exist(monkeypatch):
    known = {
        "--mixed_precision",
        "--num_processes",
        "--multi_gpu",
        "--nproc_per_node",
        "--cpu",
        "--dynamo_backend",
        "--python",
        "--extra",
        "--num_machines",  # the launchers'
        "--shm-size",
        "--dist",  # docker's, pytest's
        "--photographs",
        "--negatives",
        "--only",
        "--turns",
    }  # the benchmark's
    for module in MODULES:
        for action in parser(module, monkeypatch)._actions:
            known |= set(action.option_strings)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


@pytest.mark.parametrize("name", METHODS)
def test_importing_runs_nothing(name, tmp_path):
    code = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"]
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["simclr.py", "moco.py", "swav.py", "supcon.py"])
def test_a_copied_script_with_common_works_elsewhere(script, folder, tmp_path):
    for name in (script, "common.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [
        sys.executable,
        script,
        "--data",
        str(folder),
        "--arch",
        "small",
        "--batch-size",
        "24",
        "--max-steps",
        "1",
        "--out",
        "run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "encoder.safetensors").exists(), done.stderr
    done = subprocess.run(command[:2], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "fashion-mini" in done.stderr
