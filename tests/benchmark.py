"""Speed as ratios, each of two programs that take turns in one run.

    python tests/benchmark.py simclr    # the training loop of a script against its bare encoder
    python tests/benchmark.py lightly   # simclr.py against SimCLR made of lightly's parts

The images are noise of 32 pixels, 256 in a batch. The network is a ResNet-18: with its 3x3 stem (in
five minutes on two cores), and against lightly, which `pip install lightly` brings, the 7x7 stem.
"""

import contextlib
import importlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

BATCH, BLOCK = 256, 4  # images of a step; steps of a turn
WARM_UP, TURNS = 1, 5  # turns that do not count, and that do
# What the bare encoder is shown in a step: numbers and sides of the views.
VIEWS = {"simclr": [(2, 32)], "supcon": [(2, 32)], "moco": [(1, 32)], "swav": [(2, 32)]}


def take_turns(script: str, stem: str, data: Path, other: Callable[[], None], name: str) -> None:
    """Run a script's own loop, with pauses in which `other` makes a block of steps."""
    batches, times = common.batches, []

    def pausing(*arguments):
        steps = batches(*arguments)
        for _ in range(WARM_UP + TURNS):
            began = time.perf_counter()
            for _ in range(BLOCK):
                yield next(steps)
            paused = time.perf_counter()  # The loop is done with the block: it asks for more.
            other()
            times.append((paused - began, time.perf_counter() - paused))
        raise KeyboardInterrupt

    argv = ["--data", str(data), "--stem", stem, "--batch-size", str(BATCH), "--epochs", "99"]
    common.batches = pausing
    quiet, stopped = (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(KeyboardInterrupt),
    )
    with tempfile.TemporaryDirectory() as out, quiet, stopped:
        importlib.import_module(script).main([*argv, "--eval-every", "99", "--out", out])
    common.batches = batches

    own, others = zip(*times[WARM_UP:], strict=True)
    ratio = statistics.median(b / a for a, b in times[WARM_UP:])
    speeds = [f"{BLOCK * BATCH / statistics.median(seconds):.0f}" for seconds in (own, others)]
    print(f"{script}.py {speeds[0]} images/s, {name} {speeds[1]}: {ratio:.3f} times as fast")


def bare_encoder(script: str) -> Callable[[], None]:
    """A block of steps of the encoder alone: forward, backward and AdamW on ready views."""
    encoder, keys = (
        common.build_encoder("resnet18", "3x3").to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-4)
    views = [torch.rand(count * BATCH, 3, side, side) for count, side in VIEWS[script]]
    views = [x.contiguous(memory_format=torch.channels_last) for x in views]

    def block() -> None:
        for _ in range(BLOCK):
            optimizer.zero_grad()
            torch.cat([encoder(x) for x in views]).square().mean().backward()
            optimizer.step()
            if script == "moco":
                with torch.no_grad():
                    keys(views[0])

    return block


def lightly_simclr(folder: Path) -> Callable[[], None]:
    """A block of steps of lightly's SimCLR, put together as its example does."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    images = torchvision.datasets.ImageFolder(folder, transform)
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    model = torch.nn.Sequential(encoder, SimCLRProjectionHead(512, 512, 128))
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def block() -> None:
        # The readers begin and end with a turn, so that they do not work in the other's time.
        some = Subset(images, torch.randperm(len(images))[: BLOCK * BATCH].tolist())
        for (x0, x1), _ in DataLoader(some, BATCH, num_workers=os.cpu_count()):
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return block


def write_images(folder: Path, count: int) -> None:
    """PNG files of 32 pixels."""
    rng = np.random.default_rng(0)
    (folder / "noise").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((32, 32)).save(folder / "noise" / f"{i}.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        write_images(folder, 4096)
        arrays = Path(temporary, "noise.npz")
        labels = np.arange(4096) % 10
        np.savez(
            arrays, train_images=np.zeros((4096, 32, 32, 3), np.uint8) + 99, train_labels=labels
        )
        for name in sys.argv[1:]:
            if name == "lightly":
                take_turns("simclr", "7x7", folder, lightly_simclr(folder), "lightly")
            else:
                take_turns(name, "3x3", arrays, bare_encoder(name), "its bare encoder")
