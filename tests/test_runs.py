"""Runs of the scripts: their flags, what they leave, how they continue, and how they refuse."""

import importlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from child import ROOT, SAVE_OFTEN, Child, command
from conftest import METHODS, TINY, metrics, run, words
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import common

# Of every script, flags that change what is learned in a tiny run.
SHARED = ["--limit 40", "--image-size 16", "--epochs 3", "--batch-size 8", "--lr 0.3"]
SHARED += ["--warmup-epochs 1", "--weight-decay 9", "--seed 1"]
COLORS = ["--augment crop blur", "--crop-scale 0.9", "--color-strength 2"]
FLAGS = {
    "simclr": [
        *(*COLORS, "--gray 1", "--hidden 24", "--head-layers 3", "--head-layers 0", "--dim 4"),
        *("--temperature 0.1", "--optimizer sgd --lr 0.1", "--optimizer adamw", "--chunk-size 5"),
    ],
    "moco": [
        *(*COLORS, "--hidden 24", "--dim 4", "--temperature 0.5", "--key-momentum 0.5"),
        *("--queue-size 64", "--key-groups 1", "--schedule steps", "--optimizer adamw"),
        "--head-layers 1 --schedule steps --temperature 0.07 --augment crop color gray",  # v1
    ],
    "swav": [
        *("--augment color blur", "--color-strength 2", "--hidden 24", "--dim 4", "--epsilon 0.5"),
        *("--crops 2 1 --crop-sizes 12 8 --crop-scales 0.3 1 0.1 0.4", "--crop-sizes 8"),
        *("--crop-scales 0.3 0.5", "--prototypes 9", "--freeze-prototypes 0.3", "--queue-size 0"),
        *("--temperature 0.5", "--queue-start 1", "--optimizer larc --lr 9", "--optimizer sgd"),
    ],
    "supcon": [
        *(*COLORS, "--hidden 24", "--head-layers 1", "--dim 4", "--temperature 0.5"),
        *("--optimizer adamw", "--loss in --label-noise 0.4", "--loss ce", "--label-noise 0.4"),
    ],
    "drlim": [
        *("--classes 0 1", "--per-class 12", "--graph shifts", "--graph shifts-by-pixels"),
        *("--graph labels", "--neighbours 3", "--ratio 2", "--margin 3", "--dim 3", "--arch small"),
    ],
}
# Flags of the other tests here.
ELSEWHERE = "--arch --stem --init --data --root --workers --out --eval-every --log-with"

FILES = {"checkpoint.pt", "config.json", "metrics.jsonl", "results.json"}
PICTURES = {"views.png", "encoder.safetensors"}
OWN_FILES = {"swav": PICTURES | {"prototypes.png"}, "drlim": {"map.png", "map.npz"}}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="session")
def unlabeled(tmp_path_factory, images):
    """Training images alone, which makes runs short."""
    path = tmp_path_factory.mktemp("unlabeled") / "images.npz"
    np.savez(path, train_images=np.load(images)["train_images"])
    return path


@pytest.fixture(scope="session")
def labeled(tmp_path_factory, images):
    """Training images with labels, but no test images."""
    path = tmp_path_factory.mktemp("labeled") / "images.npz"
    arrays = np.load(images)
    np.savez(path, **{name: arrays[name] for name in ("train_images", "train_labels")})
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The file of an encoder."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    common.save_encoder(path, common.build_encoder("small"), architecture="small", stem="7x7")
    return path


def flatten(value: object, path: str = "") -> dict:
    """The leaves of nested dictionaries and lists, by path."""
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, part in items for k, v in flatten(part, f"{path}/{name}").items()}


def load_checkpoint(out):
    """What a run has saved, without what may differ between equal runs."""
    leaves = flatten(torch.load(out / "checkpoint.pt", weights_only=True))
    return {k: v for k, v in leaves.items() if "flags" not in k and "images/s" not in k}


def assert_same_end(a, b) -> None:
    """Two runs have ended the same, bit by bit."""
    one, two = load_checkpoint(a), load_checkpoint(b)
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
        assert same, name
    for rows in zip(metrics(a), metrics(b), strict=True):
        first, second = ({k: v for k, v in row.items() if k != "images/s"} for row in rows)
        assert first == second
    assert (a / "results.json").read_text() == (b / "results.json").read_text()
    if (a / "encoder.safetensors").exists():
        one, two = (load_file(out / "encoder.safetensors") for out in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refuse(capsys, method, *flags) -> str:
    """The line with which a script refuses flags, and all that it writes to stderr."""
    with pytest.raises(SystemExit) as end, common.one_line_errors():
        importlib.import_module(method).main(words(TINY[method], *flags))
    line = end.value.code  # Python prints a string, and exits with 1.
    assert isinstance(line, str) and line.strip() and "\n" not in line
    assert capsys.readouterr().err == ""
    return line


# --------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------


def test_every_flag_is_used_by_a_test_here(method, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(method).main(["--help"])
    flags = set(re.findall(r"^ +(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    used = set(words(*SHARED, *FLAGS[method], ELSEWHERE))
    assert len(flags) > 20 and flags <= used
    assert {word for word in used if word.startswith("--")} <= flags


@pytest.fixture(scope="module")
def plain_losses(labeled, tmp_path_factory):
    """The losses of a tiny run of each method."""
    losses = {}
    for method in METHODS:
        out = tmp_path_factory.mktemp(method)
        run(method, "--data", labeled, "--out", out)
        losses[method] = [row["loss"] for row in metrics(out)]
    return losses


CASES = [(method, flags) for method in METHODS for flags in SHARED + FLAGS[method]]


@pytest.mark.parametrize(("method", "flags"), CASES)
def test_a_flag_changes_what_is_learned(method, flags, plain_losses, labeled, tmp_path):
    run(method, "--data", labeled, "--out", tmp_path, flags)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert all(map(math.isfinite, losses)) and losses != plain_losses[method]


def test_init_is_where_training_starts(method, encoder, labeled, tmp_path):
    flags = f"--arch small --init {encoder} --epochs 1 --lr 1e-25"
    run(method, "--data", labeled, "--out", tmp_path, flags)
    start, end = load_file(encoder), load_file(tmp_path / "encoder.safetensors")
    assert start.keys() == end.keys()
    for name, value in start.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, end[name], rtol=0, atol=1e-20)


def test_processes_that_read_files_change_nothing(method, folder, tmp_path):
    for workers in (0, 1):
        flags = f"--workers {workers} --out {tmp_path}/{workers}"
        run(method, "--data", folder, flags)
    assert_same_end(tmp_path / "0", tmp_path / "1")


def test_an_encoder_can_have_a_resnets_stems(labeled, tmp_path):
    for stem, shape in (("3x3", (64, 3, 3, 3)), ("7x7", (64, 3, 7, 7))):
        flags = f"--arch resnet18 --stem {stem} --epochs 1 --limit 16"
        run("simclr", "--data", labeled, "--out", tmp_path / stem, flags)
        encoder, about = common.load_encoder(tmp_path / stem / "encoder.safetensors")
        assert encoder.conv1.weight.shape == shape and about["stem"] == stem


# --------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------


def test_a_run_with_the_defaults_leaves_its_files_and_curves(method, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Instead of the bundled 10,000 training images and as many test images, some of them.
    arrays = np.load(ROOT / "data" / "fashion-mini.npz")
    (tmp_path / "data").mkdir()
    few = {name: array[: 120 if "train" in name else 50] for name, array in arrays.items()}
    np.savez(tmp_path / "data" / "fashion-mini.npz", **few)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{method}.py"])
    flags = "--root nowhere --limit 100 --batch-size 64 --eval-every 2 --log-with tensorboard"
    main, out = importlib.import_module(method).main, tmp_path / "runs" / f"{method}-fashion-mini"
    for epochs in (3, 4):  # The second run continues the first.
        main(words(flags, f"--epochs {epochs}"))

    made = {path.name for path in out.iterdir() if path.is_file()}
    assert made == FILES | OWN_FILES.get(method, PICTURES)
    for path in out.glob("*.png"):
        assert len(np.unique(np.asarray(Image.open(path)))) > 50
    config = json.loads((out / "config.json").read_text())
    assert config["epochs"] == 4 and config["data"] == "fashion-mini" and config["lr"] > 0
    assert load_checkpoint(out)["/rows/3/epoch"] == 4

    rows, results = metrics(out), json.loads((out / "results.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    measured = "5-NN" if method == "drlim" else "knn"
    assert [measured in row for row in rows] == [False, True, True, True]
    for row in rows:
        assert 0 < row["spread"] < 1.6 and row["chance"] > 0 and row["images/s"] > 0
    names = ["DrLIM", "PCA"] if method == "drlim" else ["trained", "untrained"]
    assert [row["features"] for row in results] == [*names, "raw pixels"]
    assert all(40 < value <= 100 for name, value in results[-1].items() if name != "features")
    if method != "drlim":
        _, about = common.load_encoder(out / "encoder.safetensors")
        expected = {"architecture": "small", "image_size": 28, "data": "fashion-mini"}
        assert expected.items() <= about.items()

    events = EventAccumulator(str(out / method)).Reload()
    for name in ("loss", "lr", measured):
        curve = [event.value for event in events.Scalars(name)]
        assert curve == pytest.approx([row[name] for row in rows if name in row])
    steps = np.array([event.step for event in events.Scalars("loss")])
    assert ((steps + 1) == (steps[0] + 1) * np.arange(1, 5)).all()
    texts = [path.read_text() for path in sorted(out.rglob("hparams.yml"))]
    assert re.search(r"^lr: [\d.]+$", texts[0], re.MULTILINE) and "\nepochs: 3\n" in texts[0]


def test_images_without_labels_train_an_encoder(method, unlabeled, tmp_path):
    if method == "supcon":
        pytest.skip("it needs labels, and a test below has it refuse such images")
    run(method, "--data", unlabeled, "--out", tmp_path)
    assert len(metrics(tmp_path)) == 2 and not {"knn", "5-NN"} & metrics(tmp_path)[1].keys()
    assert (tmp_path / ("map.npz" if method == "drlim" else "encoder.safetensors")).exists()


# --------------------------------------------------------------------------------------
# How a run continues
# --------------------------------------------------------------------------------------


def test_a_killed_run_ends_as_one_that_was_not_bit_by_bit(method, images, tmp_path):
    flags = words(TINY[method], "--data", images, "--epochs 16 --eval-every 7 --out")
    main = importlib.import_module(method).main
    began = time.monotonic()
    main([*flags, str(tmp_path / "whole")])
    delay = random.uniform(0, 0.5) * (time.monotonic() - began)

    out = tmp_path / "run"
    killed = Child(SAVE_OFTEN + command(method, [*flags, str(out)]), tmp_path / "text")
    killed.wait_for(out / "checkpoint.pt")
    time.sleep(delay)
    killed.processes[0].kill()
    killed.end(-signal.SIGKILL)
    assert 0 < len(metrics(out)) < 16, delay
    if method != "drlim":  # whose own network is not exported
        common.load_encoder(out / "encoder.safetensors")

    main([*flags, str(out)])
    assert_same_end(out, tmp_path / "whole")
    assert not list(out.glob(".*"))


def test_a_run_continues_with_its_flags_and_images_and_no_others(method, folder, tmp_path, capsys):
    data, out = shutil.copytree(folder, tmp_path / "images"), tmp_path / "run"
    run(method, "--data", data, "--out", out)
    rows, weights = metrics(out), load_checkpoint(out)
    table = capsys.readouterr().out.splitlines()[-4:]
    run(method, "--data", data, "--out", out)
    again = capsys.readouterr().out
    assert again.splitlines()[-4:] == table and "learning rate" not in again
    assert metrics(out) == rows and load_checkpoint(out).keys() == weights.keys()

    # More epochs, and the images elsewhere: at the rates of a run that had them all along.
    elsewhere = shutil.move(data, tmp_path / "elsewhere")
    run(method, "--data", elsewhere, "--out", out, "--epochs 4")
    assert "learning rate" in capsys.readouterr().out
    run(method, "--data", elsewhere, "--out", tmp_path / "whole", "--epochs 4")
    longer, whole = metrics(out), metrics(tmp_path / "whole")
    assert longer[:2] == rows and len(longer) == 4
    assert [row["lr"] for row in longer[2:]] == [row["lr"] for row in whole[2:]]

    before = (out / "checkpoint.pt").read_bytes()
    flags = ("--data", elsewhere, "--out", out, "--epochs 4")
    assert "seed" in refuse(capsys, method, *flags, "--seed 1")
    assert "lr" in refuse(capsys, method, *flags, "--lr 0.2")
    assert "epochs" in refuse(capsys, method, *flags, "--epochs 3")
    image = elsewhere / "train" / "class0" / "0.png"
    image.rename(image.with_name("renamed.png"))
    assert "images" in refuse(capsys, method, *flags)
    image.with_name("renamed.png").unlink()
    assert "images" in refuse(capsys, method, *flags)
    other = METHODS[METHODS.index(method) - 1]
    assert str(out) in refuse(capsys, other, *flags)
    assert (out / "checkpoint.pt").read_bytes() == before


# --------------------------------------------------------------------------------------
# How a run refuses, and is stopped
# --------------------------------------------------------------------------------------

# Of every script; and of one. The line names the flag, or what is in braces.
WRONG = ["--workers -1", "--epochs 0", "--batch-size 1", "--batch-size 9999", "--lr 0", "--lr nan"]
WRONG += ["--arch vit", "--stem 5x5", "--limit 1", "--seed -1", "--image-size 0", "--eval-every 0"]
WRONG += ["--data nowhere", "--data nowhere.npz", "--epoch 2", "--warmup-epochs -1"]
WRONG += ["--weight-decay -1", "--log-with nobody", "--init nowhere.pth --arch small"]
OWN_WRONG = {
    "simclr": ["--augment colour", "--temperature 0", "--crop-scale 0", "--gray 2", "--dim 0"],
    "moco": ["--queue-size -5", "--queue-size 8", "--key-momentum 2", "--key-groups 0"],
    "swav": ["--queue-size -5", "--crops 1 6", "--crop-scales 0.3", "--crops 2 1 --crop-sizes 12"],
    "supcon": ["--label-noise 1.5", "--loss triplet", "--color-strength -1", "--head-layers 3"],
    "drlim": ["--neighbours 47", "--classes 7", "--graph colors", "--margin 0", "--ratio 0"],
}


def test_wrong_flags_are_refused_in_one_line(method, images, tmp_path, capsys):
    for flags in WRONG + OWN_WRONG[method]:
        line = refuse(capsys, method, "--data", images, "--out", tmp_path, flags)
        assert line.startswith("error: ") and flags.split()[0] in line.replace(
            "nowhere.pth", "--init"
        ), line
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_refused_in_one_line(method, images, unlabeled, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(images.read_bytes()[:2000])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros((20, 12, 12), np.uint8))
    arrays = {"train_images": np.zeros((20, 12, 12, 4), np.uint8), "train_labels": np.arange(20)}
    np.savez(tmp_path / "four.npz", **arrays)
    for name in ("cut", "single", "four"):
        data = tmp_path / f"{name}.npz"
        assert str(data) in refuse(capsys, method, "--data", data, "--out", tmp_path / "run")
    for data, out in ((images, "/proc/run"), (images, tmp_path / "cut.npz" / "run")):
        assert str(out) in refuse(capsys, method, "--data", data, "--out", out)
    assert not (tmp_path / "run").exists()


def test_methods_that_need_classes_refuse_images_without(unlabeled, tmp_path, capsys):
    flags = ("--data", unlabeled, "--out", tmp_path)
    assert "class" in refuse(capsys, "supcon", *flags)
    assert "class" in refuse(capsys, "drlim", *flags, "--graph labels")


def test_a_rate_that_is_too_high_is_refused_in_one_line(method, labeled, tmp_path, capsys):
    flags = "--lr 1e30 --epochs 4 --warmup-epochs 0"
    assert "--lr" in refuse(capsys, method, "--data", labeled, "--out", tmp_path, flags)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_tracker_that_is_not_installed_is_named(images, capsys):
    missing = [name for name in ("wandb", "mlflow", "swanlab") if not find_spec(name)]
    for tracker in missing:
        line = refuse(capsys, "moco", "--data", images, "--log-with", tracker)
        assert f"pip install {tracker}" in line


def test_ctrl_c_ends_in_one_line(images, tmp_path):
    out = tmp_path / "run"
    argv = words(TINY["simclr"], "--epochs 999 --data", images, "--out", out)
    child = Child(SAVE_OFTEN + command("simclr", argv), tmp_path / "text")
    child.wait_for(out / "checkpoint.pt")
    os.kill(child.processes[0].pid, signal.SIGINT)
    lines = child.end(1).splitlines()
    assert "stopped" in lines[-1] and "epoch" in lines[-2] and len(metrics(out)) < 999


def test_a_full_disk_ends_in_one_line(images, tmp_path):
    for size in (10**3, 10**6, 2 * 10**6):  # too little for a picture, an encoder, a checkpoint
        limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        argv = words(TINY["simclr"], "--data", images, "--out", tmp_path / "run")
        child = Child(limit + command("simclr", argv), tmp_path / str(size))
        lines = child.end(1).splitlines()
        assert "error: " in lines[-1] and sum("rror" in line for line in lines) == 1, lines
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# --------------------------------------------------------------------------------------
# Parts of a script, used and exchanged
# --------------------------------------------------------------------------------------

VIT = """encoder = torchvision.models.VisionTransformer(12, 4, 1, 2, 32, 32)
    encoder.heads, encoder.width = nn.Identity(), 32
"""


@pytest.mark.parametrize("method", ["simclr", "moco", "swav", "supcon"])
def test_an_encoder_of_ones_own_takes_two_edits(method, images, tmp_path):
    source = (ROOT / f"{method}.py").read_text()
    line = "encoder = common.build_encoder(args.arch, args.stem, args.init)\n"
    assert source.count(line) == 1
    source = source.replace(line, VIT).replace(
        "import common\n", "import common\nimport torchvision\n"
    )
    (tmp_path / "own.py").write_text(source)
    runpy.run_path(str(tmp_path / "own.py"))["main"](
        words(TINY[method], "--data", images, "--out", tmp_path)
    )
    weights = load_file(tmp_path / "encoder.safetensors")
    vit = common.torchvision.models.VisionTransformer(12, 4, 1, 2, 32, 32)
    assert vit.load_state_dict(weights, strict=False).unexpected_keys == []
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path))


def losses_alone(z1, z2, labels):
    """The loss of each method, on the embeddings of two views."""
    from drlim import contrastive_loss
    from moco import info_nce
    from simclr import nt_xent
    from supcon import supcon_loss
    from swav import sinkhorn, swapped_prediction_loss

    z1, z2 = (nn.functional.normalize(z, dim=1) for z in (z1, z2))
    scores = torch.stack([z1, z2]) @ torch.eye(8)[:6].T
    return {
        "simclr": nt_xent(z1, z2, 0.5),
        "moco": info_nce(z1, z2.detach(), torch.eye(8), 0.2),
        "swav": swapped_prediction_loss(scores, torch.stack([sinkhorn(s) for s in scores]), 0.1),
        "supcon": supcon_loss(torch.stack([z1, z2], dim=1), labels, 0.1),
        "drlim": contrastive_loss(z1, z2, labels, 1.25),
    }


def test_a_loss_alone_trains_ones_own_network(method):
    torch.manual_seed(0)
    network, x = nn.Linear(5, 8), torch.randn(2, 12, 5)
    labels = torch.arange(12) % 2
    optimizer = torch.optim.SGD(network.parameters(), 0.3)
    values = []
    for _ in range(20):
        loss = losses_alone(*network(x), labels)[method]
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.03
