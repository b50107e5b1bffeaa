"""Runs of the scripts: their flags, what they leave, how they continue, and how they refuse."""

import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from child import ROOT, SAVE_OFTEN, Child, command
from conftest import BRIEF, HEAD, METHODS, TINY, metrics, run, words
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import common

# Flags that change what a tiny run learns: of every script, and of one.
SHARED = "--limit 40 | --image-size 16 | --epochs 3 | --batch-size 8 | --lr 0.3 | --seed 1"
SHARED += " | --warmup-epochs 1 | --weight-decay 9"
BOTH = "--augment crop blur | --color-strength 2 | --crop-scale 0.9 | --hidden 24 | --dim 4"
FLAGS = {
    "simclr": f"{BOTH} | --gray 1 | --head-layers 3 | --head-layers 0 | --temperature 0.1 "
    "| --optimizer sgd --lr 0.1 | --optimizer adamw | --chunk-size 5",
    "moco": f"{BOTH} | --temperature 0.5 | --key-momentum 0.5 | --queue-size 64 | --key-groups 1 "
    "| --schedule steps | --optimizer adamw "
    "| --head-layers 1 --schedule steps --temperature 0.07 --augment crop color gray",  # v1
    "swav": "--augment color blur | --color-strength 2 | --hidden 24 | --dim 4 | --epsilon 0.5 "
    "| --crops 2 1 --crop-sizes 12 8 --crop-scales 0.3 1 0.1 0.4 | --crop-scales 0.3 0.5 "
    "| --crop-sizes 8 | --prototypes 9 | --freeze-prototypes 0.3 | --queue-size 0 "
    "| --queue-start 1 | --temperature 0.5 | --optimizer larc --lr 9 | --optimizer sgd",
    "supcon": f"{BOTH} | --head-layers 1 | --temperature 0.5 | --optimizer adamw "
    "| --label-noise 0.4 | --loss in --label-noise 0.4 | --loss ce --label-noise 0.4",
    "drlim": "--classes 0 1 | --per-class 12 | --graph shifts | --graph shifts-by-pixels "
    "| --graph labels | --neighbours 3 | --ratio 2 | --margin 3 | --dim 3 | --arch small",
}
CASES = {method: f"{SHARED} | {flags}".split(" | ") for method, flags in FLAGS.items()}
# Flags of the other tests here.
ELSEWHERE = "--arch --stem --init --data --root --workers --out --eval-every --log-with"

FILES = {"checkpoint.pt", "config.json", "metrics.jsonl", "results.json"}
PICTURES = {"views.png", "encoder.safetensors"}
OWN_FILES = {"swav": PICTURES | {"prototypes.png"}, "drlim": {"map.png", "map.npz"}}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def load_state(out):
    """What a run has saved, without what may differ between runs that are the same."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    state.pop("flags")
    for row in state["rows"]:
        row.pop("images/s")
    return state


def assert_same_end(a, b) -> None:
    """Two runs have ended the same, bit by bit."""
    torch.testing.assert_close(load_state(a), load_state(b), rtol=0, atol=0)
    for file in {"metrics.jsonl", "results.json"}:
        one, two = ((out / file).read_text() for out in (a, b))
        assert re.sub('"images/s": [^,}]+', "", one) == re.sub('"images/s": [^,}]+', "", two)
    if (a / "encoder.safetensors").exists():
        one, two = (load_file(out / "encoder.safetensors") for out in (a, b))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


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
    used = set(words(*CASES[method], ELSEWHERE))
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


@pytest.mark.parametrize(("method", "flags"), [(m, flags) for m in CASES for flags in CASES[m]])
def test_a_flag_changes_what_is_learned(method, flags, plain_losses, labeled, tmp_path):
    run(method, "--data", labeled, "--out", tmp_path, flags)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert all(map(math.isfinite, losses)) and losses != plain_losses[method]


@pytest.mark.parametrize(
    ("method", "flags", "name", "value"),
    [
        ("moco", "--batch-size 2", "queue_size", 4),  # a tenth of the 48 images
        ("swav", "--prototypes 50 --queue-size 34", "epsilon", 0.05),  # of 16 images and the queue
        ("swav", "--prototypes 51 --queue-size 34", "epsilon", 0.01),
    ],
)
def test_flags_not_given_follow_from_the_images(method, flags, name, value, images, tmp_path):
    main = importlib.import_module(method).main
    main(words(BRIEF, HEAD, "--data", images, "--out", tmp_path, flags))
    assert json.loads((tmp_path / "config.json").read_text())[name] == value


def test_init_is_where_training_starts(method, labeled, tmp_path):
    encoder, file = common.build_encoder("small"), tmp_path / "init.safetensors"
    common.save_encoder(file, encoder, architecture="small", stem="7x7")
    flags = f"--arch small --init {file} --epochs 1 --lr 1e-25"
    run(method, "--data", labeled, "--out", tmp_path, flags)
    trained = load_file(tmp_path / "encoder.safetensors")
    for name, value in encoder.named_parameters():
        torch.testing.assert_close(trained[name], value.detach(), rtol=0, atol=1e-20)


def test_processes_that_read_files_change_nothing(folder, tmp_path):
    for workers in (0, 1):
        run("swav", "--crops 2 1 --data", folder, f"--workers {workers} --out {tmp_path}/{workers}")
    assert_same_end(tmp_path / "0", tmp_path / "1")


def test_an_encoder_can_be_a_resnet(labeled, tmp_path):
    flags = "--arch resnet18 --stem 7x7 --epochs 1 --limit 16"
    run("simclr", "--data", labeled, "--out", tmp_path, flags)
    assert load_file(tmp_path / "encoder.safetensors")["conv1.weight"].shape == (64, 3, 7, 7)


# --------------------------------------------------------------------------------------
# What a run leaves
# --------------------------------------------------------------------------------------


def test_a_run_with_the_defaults_leaves_its_files(method, tmp_path, monkeypatch):
    # Instead of the bundled 10,000 training images and as many test images, some of them.
    arrays = np.load(ROOT / "data" / "fashion-mini.npz")
    (tmp_path / "data").mkdir()
    few = {name: array[: 120 if "train" in name else 50] for name, array in arrays.items()}
    np.savez(tmp_path / "data" / "fashion-mini.npz", **few)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{method}.py"])
    flags = "--epochs 3 --limit 100 --batch-size 64 --eval-every 2"
    main = importlib.import_module(method).main
    main(words(flags, "--root nowhere --log-with tensorboard"))

    out = tmp_path / "runs" / f"{method}-fashion-mini"
    files = FILES | OWN_FILES.get(method, PICTURES)
    assert {path.name for path in out.iterdir()} == files | {method}  # the curves
    for path in out.glob("*.png"):
        assert len(np.unique(np.asarray(Image.open(path)))) > 50
    config = json.loads((out / "config.json").read_text())
    expected = {"epochs": 3, "data": "fashion-mini", "stem": "3x3", "image_size": 28, "seed": 0}
    assert expected.items() <= config.items() and config["lr"] > 0
    rows, results = metrics(out), json.loads((out / "results.json").read_text())
    assert load_state(out)["rows"] == [{k: row[k] for k in row if k != "images/s"} for row in rows]

    assert [row["epoch"] for row in rows] == [1, 2, 3]
    measured = "5-NN" if method == "drlim" else "knn"
    assert [measured in row for row in rows] == [False, True, True]
    for row in rows:
        assert 0 < row["spread"] < 1.6 and row["chance"] > 0 and row["images/s"] > 0
    names = ["DrLIM", "PCA"] if method == "drlim" else ["trained", "untrained"]
    assert [row.pop("features") for row in results] == [*names, "raw pixels"]
    assert all(40 < value <= 100 for value in results[-1].values())
    if method != "drlim":  # whose own network is not exported
        about = common.load_encoder(out / "encoder.safetensors")[1]
        assert (about["architecture"], about["image_size"]) == ("small", 28)


@pytest.mark.parametrize("method", ["simclr", "moco", "swav", "drlim"])
def test_images_without_labels_train_an_encoder(method, labeled, tmp_path):
    run(method, "--data", labeled.with_name("unlabeled.npz"), "--out", tmp_path)
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
    delay = random.uniform(0, 0.3) * (time.monotonic() - began)

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
    run(method, "--data", data, "--out", out, "--log-with tensorboard")
    rows, state = metrics(out), load_state(out)
    table = capsys.readouterr().out.splitlines()[-4:]
    run(method, "--data", data, "--out", out)
    again = capsys.readouterr().out
    assert again.splitlines()[-4:] == table and "learning rate" not in again
    assert metrics(out) == rows
    torch.testing.assert_close(load_state(out), state, rtol=0, atol=0)

    # More epochs, and the images elsewhere: at the rates of a run that had them all along.
    elsewhere = shutil.move(data, tmp_path / "elsewhere")
    run(method, "--data", elsewhere, "--out", out, "--epochs 4 --log-with tensorboard")
    assert "learning rate" in capsys.readouterr().out
    run(method, "--data", elsewhere / "train", "--out", tmp_path / "whole", "--epochs 4")
    longer, whole = metrics(out), metrics(tmp_path / "whole")
    assert longer[:2] == rows and len(longer) == 4
    assert [row["lr"] for row in longer[2:]] == [row["lr"] for row in whole[2:]]
    events = EventAccumulator(str(out / method)).Reload()
    for name in ("loss", "lr"):
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        assert curve == [(3 * i + 2, pytest.approx(row[name])) for i, row in enumerate(longer)]
    hparams = sorted(out.rglob("hparams.yml"))[0].read_text()
    assert {"epochs: 2", "warmup_epochs: 0.0"} <= set(hparams.splitlines())

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

# Of every script, and of one.
WRONG = ["--workers -1", "--epochs 0", "--batch-size 1", "--batch-size 9999", "--lr 0", "--lr nan"]
WRONG += ["--arch vit", "--stem 5x5", "--limit 1", "--seed -1", "--image-size 0", "--eval-every 0"]
WRONG += ["--data nowhere", "--data nowhere.npz", "--epoch 2", "--warmup-epochs -1"]
WRONG += ["--weight-decay -1", "--log-with nobody", "--init nowhere.pth --arch small"]
OWN_WRONG = {
    "simclr": ["--augment colour", "--temperature 0", "--crop-scale 2", "--gray 2", "--dim 0"],
    "moco": ["--queue-size -5", "--queue-size 8", "--key-momentum 2", "--key-groups 0"],
    "swav": ["--queue-size -5", "--crops 1 6", "--crop-scales 0.3", "--crops 2 1 --crop-sizes 12"],
    "supcon": ["--label-noise 1.5", "--loss triplet", "--color-strength -1", "--head-layers 3"],
    "drlim": ["--neighbours 47", "--classes 7", "--graph colors", "--margin 0", "--ratio 0"],
}


def test_wrong_flags_are_refused_in_one_line(method, images, tmp_path, capsys):
    for flags in WRONG + OWN_WRONG[method]:
        line = refuse(capsys, method, "--data", images, "--out", tmp_path, flags)
        assert line.startswith("error: ")
        assert any(word in line for word in flags.split()[:2]), line  # the flag, or its value
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_refused_in_one_line(method, images, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(images.read_bytes()[:2000])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros((20, 12, 12), np.uint8))
    arrays = {"train_images": np.zeros((20, 12, 12, 4), np.uint8), "train_labels": np.arange(20)}
    np.savez(tmp_path / "four.npz", **arrays)
    for name in ("cut", "single", "four"):
        data = tmp_path / f"{name}.npz"
        assert str(data) in refuse(capsys, method, "--data", data, "--out", tmp_path / "run")
    for out in ("/proc/run", tmp_path / "cut.npz" / "run"):
        assert str(out) in refuse(capsys, method, "--data", images, "--out", out)
    assert not (tmp_path / "run").exists()


def test_methods_that_need_classes_refuse_images_without(labeled, tmp_path, capsys):
    flags = ("--data", labeled.with_name("unlabeled.npz"), "--out", tmp_path)
    assert "class" in refuse(capsys, "supcon", *flags)
    assert "class" in refuse(capsys, "drlim", *flags, "--graph labels")


def test_a_rate_that_is_too_high_is_refused_in_one_line(method, labeled, tmp_path, capsys):
    flags = "--lr 1e30 --epochs 4 --warmup-epochs 0"
    assert "--lr" in refuse(capsys, method, "--data", labeled, "--out", tmp_path, flags)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_tracker_that_is_not_installed_is_named(images, capsys):
    for tracker in [name for name in ("wandb", "mlflow", "swanlab") if not find_spec(name)]:
        line = refuse(capsys, "moco", "--data", images, "--log-with", tracker)
        assert f"pip install {tracker}" in line


def test_processes_that_do_not_see_one_another_are_refused(images, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refuse(capsys, "simclr", "--data", images)


def test_ctrl_c_ends_in_one_line(images, tmp_path):
    out = tmp_path / "run"
    argv = words(TINY["simclr"], "--epochs 999 --data", images, "--out", out)
    child = Child(SAVE_OFTEN + command("simclr", argv), tmp_path / "text")
    child.wait_for(out / "checkpoint.pt")
    os.kill(child.processes[0].pid, signal.SIGINT)
    lines = child.end(1).splitlines()
    assert "stopped" in lines[-1] and "epoch" in lines[-2] and len(metrics(out)) < 999


def test_a_full_disk_ends_in_one_line_and_spares_the_last_checkpoint(images, tmp_path):
    def fill(size: int, out: str) -> None:
        source = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        argv = words(TINY["simclr"], "--data", images, "--epochs 4 --out", tmp_path / out)
        text = Child(source + command("simclr", argv), tmp_path / f"{out}{size}").end(1)
        assert text.splitlines()[-1].startswith("error: ") and text.count("rror") == 1, text

    for size in (10**3, 10**6):  # too little for a picture, and for an encoder
        fill(size, "new")
    assert not (tmp_path / "new" / "checkpoint.pt").exists()
    run("simclr", "--data", images, "--out", tmp_path / "old")
    before = (tmp_path / "old" / "checkpoint.pt").read_bytes()
    fill(len(before) - 10**4, "old")
    assert (tmp_path / "old" / "checkpoint.pt").read_bytes() == before


# --------------------------------------------------------------------------------------
# The loss alone
# --------------------------------------------------------------------------------------


def losses_alone(z1, z2, labels):
    """The loss of each method, on the embeddings [N, D] of two views, as one would import it."""
    from drlim import contrastive_loss
    from moco import info_nce
    from simclr import nt_xent
    from supcon import supcon_loss
    from swav import sinkhorn, swapped_prediction_loss

    z1, z2 = (nn.functional.normalize(z, dim=1) for z in (z1, z2))
    both, axes = torch.stack([z1, z2], dim=1), torch.eye(z1.shape[1], device=z1.device)
    scores = torch.stack([z1, z2]) @ axes[:6].T
    codes = torch.stack([sinkhorn(part.detach()) for part in scores])
    return {
        "simclr": nt_xent(z1, z2, 0.5),
        "moco": info_nce(z1, z2.detach(), axes, 0.2),
        "swav": swapped_prediction_loss(scores, codes, 0.1),
        "supcon": supcon_loss(both, labels, 0.1),
        "in": supcon_loss(both, labels, 0.1, "in"),
        "drlim": contrastive_loss(z1, z2, labels % 2, 1.25),
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
