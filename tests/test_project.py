"""What holds the repository together: packages, twins, flags, and what the README says."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import claims
import numpy as np
import pytest
import torch

import common
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

ROOT = Path(__file__).resolve().parent.parent
MODULES = [simclr, moco, swav, supcon, drlim, linear_eval]
SCRIPTS = [module.__name__ for module in MODULES]
TWINS = ["simclr", "moco", "swav", "supcon"]
README = (ROOT / "README.md").read_text()


def source(name):
    return (ROOT / f"{name}.py").read_text()


def helps(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    return capsys.readouterr().out


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# --------------------------------------------------------------------------------------
# Files, packages and twins
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_scripts_own_list_of_packages_is_that_of_pyproject(name):
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", source(name), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    inline = tomllib.loads(re.sub(r"^# ", "", block[1], flags=re.M))
    assert inline == {key: project[key] for key in ("requires-python", "dependencies")}


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_a_script_imports_no_other_script_and_no_other_package(name):
    names = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    allowed = {"torch", "torchvision", "numpy", "accelerate", "common"}
    allowed |= {"safetensors", "PIL"}  # which come with the others
    assert names <= allowed | set(sys.stdlib_module_names)
    assert name != "common" or "common" not in names


def test_functions_of_the_same_name_are_the_same_word_for_word():
    # Apart from the functions in which the papers differ.
    own = {"main", "build_optimizer", "finish"}
    seen = {}
    for name in SCRIPTS:
        text = source(name)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in own:
                code = ast.get_source_segment(text, node)
                code = re.sub(r'"""The operations that make one (?s:.*?)"""', "", code)
                seen.setdefault(node.name, []).append((name, code))
    shared = {name: found for name, found in seen.items() if len(found) > 1}
    assert {"augmentation", "gather", "embed", "learning_rate"} <= shared.keys()
    exceptions = {("swav", "augmentation"), ("moco", "learning_rate")}
    exceptions |= {("linear_eval", "learning_rate"), ("swav", "enqueue")}
    for function, found in shared.items():
        codes = {code for name, code in found if (name, function) not in exceptions}
        assert len(codes) == 1, (function, [name for name, _ in found])


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("    accelerator = common.start(", "    images, bank, test = common.load_splits("),
        ("    epoch_steps = len(images)", "    warmup_steps = "),
        ("    saved_at = time.monotonic()", "        loss_sum = "),
        ("        epoch_range = ", "        for step in "),
        ("            lr = learning_rate(step", '            optimizer.param_groups[0]["lr"]'),
        ("        if not math.isfinite(", "        if test and ("),
        ("        rows.append(row)", "        if epoch + 1 == args.epochs or "),
        ("    common.finish(", "        main()"),
    ],
)
def test_the_frame_of_main_is_the_same_in_each_script(name, first, last):
    def paragraph(name):
        lines = source(name).partition("\ndef main(")[2].splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(first))
        end = next(i for i, line in enumerate(lines) if i > start and line.startswith(last))
        return [line for line in lines[start : end + 1] if "common.start_trackers" not in line]

    def without_arguments(lines):
        return [line.replace(", args.schedule)", ")") for line in lines]

    assert without_arguments(paragraph(name)) == paragraph("simclr")


@pytest.mark.parametrize(("name", "most"), [("supcon", 260), ("moco", 300), ("swav", 400)])
def test_a_diff_of_two_scripts_shows_the_difference_of_two_papers(name, most):
    argv = ["diff", ROOT / "simclr.py", ROOT / f"{name}.py"]
    lines = subprocess.run(argv, capture_output=True, text=True).stdout.splitlines()
    assert 0 < sum(line[0] in "<>" for line in lines) <= most


@pytest.mark.parametrize("name", SCRIPTS)
def test_names_in_the_docstrings_map_of_the_paper_exist(name):
    module = sys.modules[name]
    for quoted in re.findall(r"`([\w.]+)`", module.__doc__):
        value = module
        for part in quoted.split("."):
            value = getattr(value, part, None)
        assert value or quoted in ("random",), quoted
    flags = set(re.findall(r"--[a-z][\w-]+", module.__doc__))
    launcher = {"--num_processes", "--mixed_precision", "--multi_gpu"}
    assert all(f'"{flag}"' in source(name) + source("common") for flag in flags - launcher)


@pytest.mark.parametrize("module", MODULES)
def test_help_has_a_sentence_and_the_default_of_each_flag(module, capsys):
    text = re.sub(r"\s+", " ", helps(module, capsys)).replace("'", "")
    flags = re.findall(r"add\(\s*\"(--[\w-]+)\"", source(module.__name__))
    assert flags
    for flag in flags:
        assert re.search(rf"{flag} [A-Z{{]\S* [^-]*\w", text), flag
    presets = getattr(module, "PRESETS", {})
    for preset in presets.values():
        for name, value in preset.items():
            words = ", ".join(map(str, value)) if isinstance(value, list) else value
            assert re.search(rf"{name}: \[?{re.escape(str(words))}", text), name


# --------------------------------------------------------------------------------------
# The README
# --------------------------------------------------------------------------------------


def test_flags_of_the_readme_exist(capsys):
    known = " ".join(helps(module, capsys) for module in MODULES)
    launchers = {"--num_processes", "--mixed_precision", "--multi_gpu", "--num_machines"}
    launchers |= {"--machine_rank", "--main_process_ip", "--main_process_port", "--nproc_per_node"}
    launchers |= {"--dist", "--shm-size"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) - launchers:
        assert f"{flag} " in known, flag


def test_files_of_the_readme_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_figures_of_the_readme_are_those_of_the_results(name):
    commands, _ = claims.CLAIMS[name]
    for command in commands:
        figures = claims.figures(command, metric=claims.METRIC.get(name))
        cells = figures.replace(" / ", " | ")
        lines = README.splitlines()
        found = any(figures in line or cells in line for line in lines)
        assert figures != "not run" and found, (command, figures)
    for features in ("untrained", "raw pixels"):
        kNN, linear = claims.figures("simclr.py", features).split(" / ")
        assert f"| {kNN} | {linear} |" in README


def test_an_exported_encoder_has_the_same_features_in_torchvision_and_timm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = common.build_encoder("resnet18", "3x3").eval()
    common.save_encoder(Path("runs/moco-cifar10/encoder.safetensors"), encoder)
    (code,) = (block for block in code_blocks("python") if "timm" in block)
    names = {}
    exec(
        code + "    x = torch.rand(2, 3, 32, 32)\n    models.append(model)",
        names | {"torch": torch, "models": (models := [])},
    )
    x = torch.rand(2, 3, 32, 32)
    for model in models:
        torch.testing.assert_close(model.eval()(x), encoder(x))
    assert len(models) == 2


def test_two_edits_bring_an_encoder_of_ones_own(tmp_path, images, monkeypatch):
    (code,) = (block for block in code_blocks("python") if "vit" in block)
    code = code.replace("vit_b_16()", "VisionTransformer(12, 4, 1, 2, 32, 32)")  # a tiny one
    edited = source("common").replace('"resnet18",', '"vit_b_16", "resnet18",', 1)
    head, found, tail = edited.partition(
        "    else:\n        encoder = torchvision.models.get_model"
    )
    assert found
    (tmp_path / "common.py").write_text(head + code + found + tail)
    (tmp_path / "simclr.py").write_text(source("simclr"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "common")
    main = runpy.run_path(str(tmp_path / "simclr.py"))["main"]
    out = tmp_path / "run"
    main(["--arch", "vit_b_16", "--data", str(images), "--out", str(out), "--epochs", "1"])
    encoder, about = sys.modules["common"].load_encoder(out / "encoder.safetensors")
    assert about["architecture"] == "vit_b_16" and encoder.width == 32


def test_arrays_become_a_file_that_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in code_blocks("python") if "np.savez" in block)
    images, labels = np.zeros((4, 12, 10, 3), np.uint8), np.array([1, 2, 1, 2])
    names = {"train_images": images, "train_labels": labels}
    exec(code, names | {"test_images": images[:2], "test_labels": labels[:2]})
    train, bank, test = common.load_splits("birds.npz", "", None, torch.device("cpu"), 0)
    assert (len(train), len(bank), len(test), bank.num_classes) == (4, 4, 2, 2)


def test_a_loss_is_used_alone():
    (code,) = (block for block in code_blocks("python") if "nt_xent" in block)
    names = {"z1": torch.randn(4, 8), "z2": torch.randn(4, 8)}
    exec(code, names)
    assert names["loss"].isfinite()
