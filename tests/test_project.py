"""What holds the repository together: packages, twins, flags, words and the console."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import METHODS, ROOT, arguments, checkpoint, refused, settings, write_folder

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

MODULES = [simclr, moco, swav, supcon, drlim, linear_eval]
SCRIPTS = [module.__name__ for module in MODULES]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def source(name):
    return (ROOT / f"{name}.py").read_text()


# --------------------------------------------------------------------------------------
# Packages and files
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_scripts_own_list_of_packages_is_that_of_pyproject(name):
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", source(name), re.M)
    inline = tomllib.loads(re.sub(r"^# ", "", block[1], flags=re.M))
    assert inline == {key: PROJECT[key] for key in ("requires-python", "dependencies")}


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_scripts_import_no_other_script_and_no_other_package(name):
    names = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    allowed = {"torch", "torchvision", "numpy", "accelerate", "common"}
    allowed |= {"safetensors", "psutil", "PIL"}  # which come with the others
    assert names <= allowed | set(sys.stdlib_module_names)
    assert name != "common" or "common" not in names


def test_importing_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(SCRIPTS)}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


def test_a_copied_script_works_with_common_alone(few, tmp_path):
    runs = []
    for method in METHODS:
        for name in (f"{method}.py", "common.py"):
            (tmp_path / method).mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / method / name)
        runs.append([method, arguments(method, few, "run", "--max-steps 1")])
    program = f"""
import os, runpy, sys
for method, argv in {runs}:
    os.chdir({str(tmp_path)!r} + "/" + method)
    sys.path[0] = os.getcwd()
    sys.modules.pop("common", None)
    sys.argv = [method + ".py", *argv]
    runpy.run_path(method + ".py", run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        assert (tmp_path / method / "run" / "results.json").exists()


# --------------------------------------------------------------------------------------
# Twins: a diff of two scripts shows the difference between two papers
# --------------------------------------------------------------------------------------

# What each method does in its own way, under a name that all of them use.
OWN_WAY = {"augmentation", "find_problems", "build_optimizer", "build_parser", "parse_arguments"}
OWN_WAY |= {"parse_arguments_for", "main"}
# Paragraphs of main that every script has, by what they begin with.
SHARED_PARAGRAPHS = [
    "    args = parse_arguments(argv)\n    torch.backends",
    "            optimizer.zero_grad()",
    "        mean_loss = ",
]


def functions(name):
    """The source of each function and class at the top level of a script."""
    nodes = ast.parse(source(name)).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {
        node.name: ast.get_source_segment(source(name), node)
        for node in nodes
        if isinstance(node, kinds)
    }


@pytest.mark.parametrize("name", METHODS[1:])
def test_functions_of_the_same_name_are_the_same_word_for_word(name):
    ours, theirs = functions("simclr"), functions(name)
    shared = (ours.keys() & theirs.keys()) - OWN_WAY
    shared -= {"learning_rate"} if name in ("moco", "swav") else set()  # of another schedule
    assert {"open_run", "save_run"} <= shared
    for function in shared:
        assert ours[function] == theirs[function], function


@pytest.mark.parametrize("name", METHODS[1:])
def test_paragraphs_of_main_that_all_share_are_the_same_word_for_word(name):
    ours, theirs = functions("simclr")["main"], functions(name)["main"]
    for begin in SHARED_PARAGRAPHS:
        start = ours.index(begin)
        paragraph = ours[start : ours.index("\n\n", start)]
        if name in ("moco", "swav") or "backward_in_chunks" in paragraph:
            # What is the script's own stands between the lines, or behind them.
            for line in paragraph.splitlines()[:2]:
                assert line in theirs, line
        else:
            assert paragraph.partition("seconds = ")[0] in theirs, paragraph
    save = ours[ours.index("            minutes = ") :]
    save = save[: save.index("\n\n")]
    assert save in theirs


def sections(name):
    """The titles of a script's sections, without what stands behind them in parentheses."""
    titles = re.findall(r"^# -{80,}\n# (.*)\n# -{80,}$", source(name), re.M)
    return [title.split(" (")[0] for title in titles]


@pytest.mark.parametrize("name", METHODS)
def test_sections_stand_in_the_same_order(name):
    order = ["Model", "Loss", "chedule", "The run's folder", "Command line", "Training"]
    titles = sections(name)
    places = [i for part in order for i, title in enumerate(titles) if part in title]
    assert len(places) >= 5 and places == sorted(places), titles


def test_nothing_handles_signals():
    for name in [*SCRIPTS, "common"]:
        assert "signal.signal(" not in source(name), name


# --------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------


def actions(module):
    """The flags of a script."""
    return module.build_parser()._actions


@pytest.mark.parametrize("module", MODULES, ids=SCRIPTS)
def test_every_flag_has_a_help_of_one_sentence(module):
    for action in actions(module):
        assert action.help and "\n" not in action.help and ". " not in action.help, action
        assert len(action.help.split()) > 1, action


def test_flags_that_scripts_share_have_the_same_kind_of_value():
    kinds = {}
    for module in MODULES[:-1]:
        for action in actions(module):
            if action.dest not in ("arch", "head_layers", "optimizer", "queue_size"):
                kinds.setdefault(action.dest, {})[module.__name__] = (action.type, action.nargs)
    for flag, of_scripts in kinds.items():
        assert len(set(of_scripts.values())) == 1, (flag, of_scripts)
    everywhere = {flag for flag, of_scripts in kinds.items() if len(of_scripts) == 5}
    assert everywhere >= {
        *("data", "root", "limit", "stream", "workers", "stem", "init", "dim", "epochs"),
        *("max_steps", "batch_size", "lr", "warmup_epochs", "weight_decay", "seed", "out"),
        *("eval_every", "log_with"),
    }


@pytest.mark.parametrize("module", MODULES[:-1], ids=SCRIPTS[:-1])
def test_presets_name_flags_and_have_values_that_these_allow(module):
    flags = {action.dest: action for action in actions(module)}
    for preset in module.PRESETS.values():
        for name, value in preset.items():
            action = flags[name]
            for part in value if isinstance(value, list) else [value]:
                assert action.choices is None or part in action.choices
                if action.type:
                    assert action.type(str(part)) == part and type(action.type(str(part))) is type(
                        part
                    )


@pytest.mark.parametrize(
    ("data", "side", "images", "preset"),
    [
        ("fashion-mini", 28, 10_000, "fashion-mini"),
        ("cifar10", 32, 50_000, "small"),
        ("FOLDER", 64, 1_000_000, "small"),
        ("FOLDER", 65, 100_000, "photos"),
        ("FOLDER", 224, 100_001, "paper"),
    ],
)
def test_the_preset_follows_the_images(data, side, images, preset):
    assert common.choose_preset(data, side, images) == preset


@pytest.mark.parametrize(
    ("images", "batch_size"),
    [(20, 16), (1000, 32), (4096, 64), (10_000, 128), (16_383, 128), (16_384, 256), (10**6, 256)],
)
def test_small_sets_have_small_batches(images, batch_size):
    assert common.default_batch_size(images) == batch_size


@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_run_takes_its_preset_from_the_images_and_flags_win(method, few, tmp_path, capsys):
    module = sys.modules[method]
    words = arguments(method, few, "OUT", "--max-steps 1")
    del words[words.index("--preset") : words.index("--preset") + 2]
    large = ["--crops", "2", "--crop-sizes", "80"] if method == "swav" else ["--image-size", "80"]

    def used(*flags):
        out = tmp_path / "".join(flags)
        module.main([*words, *flags, "--out", str(out)])
        [line] = [line for line in capsys.readouterr().out.splitlines() if "defaults for" in line]
        return settings(out)["preset"], settings(out)["optimizer"], "--optimizer adamw" in line

    assert used() == ("small", "adamw", True)
    assert used("--optimizer", "sgd") == ("small", "sgd", False)
    assert used(*large) == ("photos", "adamw", True)
    optimizer = module.build_parser().get_default("optimizer")
    assert used("--preset", "paper") == ("paper", optimizer, False)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_without_flags_batch_warm_up_and_head_follow_the_images_and_the_encoder(
    method, tmp_path, monkeypatch
):
    folder = write_folder(tmp_path / "images", train=24)
    seen = {}
    module = sys.modules[method]

    def rate(step, steps, warmup, *others):
        seen.update(steps=steps, warmup=warmup)
        return 1e-3

    monkeypatch.setattr(module, "learning_rate", rate)
    # Images without classes, where the method needs none, save the evaluation at the end.
    data = folder if method == "supcon" else folder / "train"
    words = f"--data {data} --arch resnet18 --stem 7x7 --workers 1 --epochs 15 --max-steps 21"
    words += " --eval-every 99"
    words += " --crops 2" if method == "swav" else ""
    words += " --queue-size 64" if method == "moco" else ""
    module.main([*words.split(), "--out", str(tmp_path / "run")])
    used = settings(tmp_path / "run")
    assert (used["batch_size"], used["hidden"]) == (32, 512)
    assert seen == {"steps": 21, "warmup": 2}  # a tenth of the steps
    widths = [v.shape for v in checkpoint(tmp_path / "run")["model"].values() if v.ndim == 2]
    assert (512, 512) in widths


@pytest.mark.parametrize("method", METHODS[:-1])
def test_the_batch_size_of_a_preset_wins_over_the_rule(method, few, tmp_path, capsys):
    words = ["--data", few, "--preset", "paper", "--out", tmp_path / "run"]
    assert "--batch-size 256 is more than" in refused(capsys, sys.modules[method].main, words)


@pytest.mark.parametrize("module", [moco, swav, supcon], ids=["moco", "swav", "supcon"])
def test_a_resnet_takes_a_lower_rate_that_grows_with_the_root_of_the_batch(module):
    small = module.PRESETS["small"]
    rates = {}
    for words in ("", "--arch small", "--batch-size 64"):
        rates[words] = module.parse_arguments(words.split(), small).lr
    assert rates[""] == module.PEAK_LR["adamw"] < rates["--arch small"]
    assert rates["--batch-size 64"] == rates[""] / 2


def test_help_shows_presets_and_defaults(capsys):
    with pytest.raises(SystemExit):
        simclr.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the bundled images (--preset fashion-mini): --batch-size 256 --arch small" in text
    assert "(--preset paper): --batch-size 256 --color-strength 1.0 --temperature 0.1" in text
    assert "of fewer than 16,384 images (default: 256)" in text
    assert "random seed of weights and views (default: 0)" in text
    assert "(default: None)" not in text and "(default: False)" not in text


def test_flags_that_the_readme_names_exist():
    launchers = {"--mixed_precision", "--num_processes", "--multi_gpu", "--nproc_per_node"}
    launchers |= {"--cpu", "--dynamo_backend", "--num_machines", "--shm-size", "--dist"}
    launchers |= {"--machine_rank", "--main_process_ip", "--main_process_port"}
    benchmark = {"--photographs", "--negatives", "--chunks", "--probe", "--only", "--turns"}
    benchmark |= {"--against", "--list"}  # and that of claims.py
    slurm = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"}
    slurm |= {"--requeue", "--kill-on-bad-exit"}
    known = launchers | benchmark | slurm
    for module in MODULES:
        for action in actions(module):
            known |= set(action.option_strings)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


# --------------------------------------------------------------------------------------
# Docstrings and the console
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_public_functions_and_classes_have_docstrings(name):
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", METHODS)
def test_names_in_the_docstrings_map_of_the_paper_exist(name):
    module = sys.modules[name]
    text = module.__doc__.partition("Where to find")[2].partition("How to adapt")[0]
    names = re.findall(r"`([A-Za-z_.]+)`", text)
    assert len(names) >= 3
    for dotted in names:
        value = module
        for part in dotted.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(0, "0s"), (0.5, "30s"), (0.9999, "1m00s"), (3 + 1 / 3, "3m20s"), (125, "2h05m")],
)
def test_durations_are_readable(minutes, text):
    assert common.format_duration(minutes) == text


def test_tables_are_aligned():
    rows = [{"features": "a", "kNN": 5.0}, {"features": "longer", "kNN": 100.0}]
    assert common.format_table(rows) == "features  kNN\na         5.0\nlonger    100.0"
