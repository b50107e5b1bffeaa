"""What the tests share: images, and tiny runs in the process of the test."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["ACCELERATE_USE_CPU"] = "true"  # Tests are exact; a GPU has tests of its own.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

METHODS = ("simclr", "moco", "swav", "supcon", "drlim")
# Flags of runs of two epochs, with three steps each on `images`.
BRIEF = "--epochs 2 --batch-size 16 --workers 0"
HEAD = "--arch small --hidden 16 --dim 8"
TINY = {
    "simclr": f"{BRIEF} {HEAD}",
    "moco": f"{BRIEF} {HEAD} --queue-size 40",
    "swav": f"{BRIEF} {HEAD} --prototypes 6 --queue-size 24 --queue-start 0.3",
    "supcon": f"{BRIEF} {HEAD}",
    "drlim": f"{BRIEF} --batch-size 32 --neighbours 2",
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An .npz file with 48 training and 18 test images of three classes, 12x12 RGB."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 48), ("test", 18)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def labeled(tmp_path_factory, images):
    """Training images with labels, but no test images; unlabeled.npz beside it has no labels."""
    arrays = np.load(images)
    path = tmp_path_factory.mktemp("labeled") / "labeled.npz"
    np.savez(path, train_images=arrays["train_images"], train_labels=arrays["train_labels"])
    np.savez(path.with_name("unlabeled.npz"), train_images=arrays["train_images"])
    return path


@pytest.fixture(scope="session")
def folder(images, tmp_path_factory):
    """The same images as files in folders, but that one of them is larger, so files are read."""
    path = tmp_path_factory.mktemp("folder") / "images"
    arrays = np.load(images)
    for split in ("train", "test"):
        for label in range(3):
            (path / split / f"class{label}").mkdir(parents=True)
        for i, pixels in enumerate(arrays[f"{split}_images"]):
            Image.fromarray(pixels).save(path / split / f"class{i % 3}" / f"{i}.png")
    Image.fromarray(pixels).resize((13, 13)).save(path / "train" / "class0" / "0.png")
    return path


def words(*flags: object) -> list[str]:
    """Flags as the command line has them, of which a string may hold several."""
    return [word for part in flags for word in str(part).split()]


def run(method: str, *flags: object) -> None:
    """A tiny run, in this process."""
    importlib.import_module(method).main(words(TINY[method], *flags))


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
