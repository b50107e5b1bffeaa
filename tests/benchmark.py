"""Speed, as ratios taken in one run: `python tests/benchmark.py` (some minutes on two cores).

1. Images a second of each script's own training loop, end to end, against its encoder alone: on
   ready views of the same shapes and precision forward, backward and optimizer step, for moco.py
   also the forward pass of the keys (both with BN in 8 groups, as it has; and in a second figure
   with their heads, as its paper's encoders f_q and f_k have them), for swav.py a pass for each
   resolution. They take turns within one run of main(): the machine's drift cancels.
2. Views a second of the augmentation alone against torchvision's v2 transforms image by image, in
   as many worker processes as there are cores.
3. Gray levels between views of the same parameters from memory and from files read anew.
4. With --photographs FOLDER (train/ and val/ with class folders): images a second of files, as
   views with all operations, against torchvision's ImageFolder with its transforms image by image
   and as many workers; then the share of time for which a ResNet-18 step waits for files, views of
   128 and 224 pixels, and how many images a second the readers make alone.
5. With --negatives: seconds a step and peak memory of moco.py by the size of its queue, and of
   simclr.py by its batch, each in a process of its own.
6. With --chunks: seconds a step and peak memory of simclr.py by its batch, at once and with
   --chunk-size 256, each in a process of its own.
7. With --probe: seconds of a linear probe of 10,000 and of 50,000 images, with the choice of its
   weight decay.
8. With --against lightly, where lightly is installed: images a second of simclr.py against SimCLR
   of lightly's parts; in bfloat16 with ACCELERATE_MIXED_PRECISION=bf16.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import moco
import simclr
import supcon
import swav

SGD = torch.optim.SGD
# Of a script: its views of an image (number, side), whether keys pass forward, its optimizer
WORK = {
    simclr: ([(2, 32)], False, partial(simclr.LARS, weight_decay=1e-6)),
    supcon: ([(2, 32)], False, partial(SGD, momentum=0.9, weight_decay=1e-4)),
    moco: ([(1, 32)], True, partial(SGD, momentum=0.9, weight_decay=1e-4)),
    swav: ([(2, 32), (6, 18)], False, partial(swav.LARC, momentum=0.9, weight_decay=1e-6)),
}
IS_BF16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
BLOCK, WARM_UP = 4, 4  # steps of a turn; turns, after which SwAV's queue of 3,840 is full


def class_folders(folder: Path, images: int, side: int = 32) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 64)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side)).save(folder / split / "ab"[i % 2] / f"{i}.png")


def encoder_alone(script, inputs: list[torch.Tensor], *head: torch.nn.Module) -> Callable:
    """A step of a script's encoder, with a head if there is one: forward, backward and update."""
    _, with_keys, make_optimizer = WORK[script]

    def build(*head: torch.nn.Module) -> torch.nn.Module:
        norm_layer = torch.nn.BatchNorm2d
        if script is moco:
            norm_layer = partial(moco.SplitBatchNorm, splits=8)
        encoder = common.build_encoder("resnet18", "7x7", norm_layer)
        return torch.nn.Sequential(encoder, *head).to(memory_format=torch.channels_last)

    model, keys = build(*head), build(*copy.deepcopy(head))
    optimizer = make_optimizer(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=IS_BF16):
            loss = torch.cat([model(x) for x in inputs]).square().mean()
        loss.backward()
        optimizer.step()
        if with_keys:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=IS_BF16):
                keys(inputs[0])

    return step


def block_of(step: Callable[[], None]) -> Callable[[], float]:
    """A function that makes BLOCK steps and returns their seconds."""

    def run() -> float:
        began = time.perf_counter()
        for _ in range(BLOCK):
            step()
        return time.perf_counter() - began

    return run


def take_turns(script, argv: list[str], others: dict[str, Callable], batch: int, turns: int):
    """Run script.main with pauses in which others make a block of steps; print the ratios.

    Args:
        script: one of the scripts.
        argv: its flags.
        others: functions that make BLOCK steps and return their seconds, by what they are.
        batch: images of a step.
        turns: how many of them count; WARM_UP turns are made before.
    """
    batches, times = common.batches, []

    def taking_turns(*args, **kwargs):
        began, steps = time.perf_counter(), batches(*args, **kwargs)
        while True:
            for _ in range(BLOCK):
                yield next(steps)
            own_seconds = time.perf_counter() - began  # done with the block, the loop asks for more
            times.append([own_seconds, *(other() for other in others.values())])
            if len(times) == turns + WARM_UP:
                return
            began = time.perf_counter()

    common.batches = taking_turns
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(argv)
    common.batches = batches
    own, *theirs = zip(*times[WARM_UP:], strict=True)
    print(f"{script.__name__}: {BLOCK * batch / statistics.median(own):.0f} images/s end to end")
    for name, seconds in zip(others, theirs, strict=True):
        ratio = statistics.median(b / a for a, b in zip(own, seconds, strict=True))
        print(
            f"  {BLOCK * batch / statistics.median(seconds):.0f} {name}: {ratio:.3f} "
            f"(median of {turns} turns)",
            flush=True,
        )


def end_to_end(script, argv: list[str], batch: int, turns: int) -> None:
    """Compare a script's loop with its encoder alone."""
    views, *_ = WORK[script]
    shapes = [(count * batch, 3, side, side) for count, side in views]
    inputs = [torch.rand(s).contiguous(memory_format=torch.channels_last) for s in shapes]
    alone = {"its encoder alone": block_of(encoder_alone(script, inputs))}
    if script is moco:
        head = torchvision.ops.MLP(512, [512, 128])
        alone["with the head"] = block_of(encoder_alone(script, inputs, head))
    take_turns(script, argv, alone, batch, turns)


def lightly_block(folder: str, batch: int) -> Callable[[], float]:
    """SimCLR of lightly's parts, put together as its example does, on the images of a folder."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    images = torchvision.datasets.ImageFolder(f"{folder}/train", transform)
    backbone = torchvision.models.resnet18()
    backbone.fc = torch.nn.Identity()
    model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def run() -> float:
        # The readers begin and end with a turn, so that they do not work in the other's time. Of a
        # block alone, reading ahead and their start would be too large a part.
        blocks = 4
        sample = torch.randperm(len(images))[: blocks * BLOCK * batch].tolist()
        began = time.perf_counter()
        loader = DataLoader(Subset(images, sample), batch, num_workers=os.cpu_count())
        for (x0, x1), _ in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=IS_BF16):
                z0, z1 = model(x0), model(x1)
                loss = criterion(z0, z1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - began) / blocks

    return run


def against_lightly(folder: str, turns: int) -> None:
    """simclr.py and lightly's SimCLR: the same images, encoder, batch and workers, in turns."""
    argv = ["--data", f"{folder}/images", "--out", f"{folder}/simclr", "--stem", "7x7"]
    argv += ["--batch-size", "256", "--epochs", "1", "--optimizer", "sgd", "--preset", "paper"]
    ready = torch.rand(512, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    others = {
        "lightly": lightly_block(f"{folder}/images", 256),
        "the bare encoder": block_of(encoder_alone(simclr, [ready])),
    }
    take_turns(simclr, argv, others, 256, turns)


class PerImage(Dataset):
    """Two views of each image with torchvision's transforms."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(32, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.stack([self.transform(self.images[i]) for _ in range(2)])


def augmentation(turns: int) -> None:
    cores = os.cpu_count()
    data = common.ImagesInMemory(
        torch.randint(256, (2048, 3, 32, 32), dtype=torch.uint8), torch.zeros(2048)
    )
    recipe = simclr.augmentation(["crop", "color", "gray"], 32, 0.08, 0.5)
    loader = DataLoader(PerImage(data.pixels), 256, num_workers=cores, persistent_workers=True)
    times = []
    for turn in range(turns + 1):
        began = time.perf_counter()
        for _ in common.batches(data, [(2, recipe)], 256, 0, 8 * turn, 8 * turn + 8):
            pass
        middle = time.perf_counter()
        for _ in loader:
            pass
        times.append((middle - began, time.perf_counter() - middle))
    ours, theirs = (2 * 2048 / statistics.median(t) for t in zip(*times[1:], strict=True))
    ratio = statistics.median(b / a for a, b in times[1:])
    print(
        f"augmentation: {ours:.0f} views/s, torchvision v2 image by image, {cores} workers, "
        f"{theirs:.0f}: {ratio:.2f} times (median of {turns} turns)"
    )


def waiting(photographs: str, folder: str) -> None:
    for size in (128, 224):
        out = f"{folder}/waiting-{size}"
        argv = ["--data", photographs, "--out", out, "--stream", "--image-size", str(size)]
        argv += ["--batch-size", "64", "--epochs", "2", "--preset", "paper"]
        with contextlib.redirect_stdout(io.StringIO()):
            simclr.main(argv)
        row = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
        print(
            f"photographs, 2 views of {size} px: {row['images_per_s']:.1f} images/s, waiting for "
            f"files {100 * row['wait']:.2f} % of the second epoch"
        )
        files = common.load_splits(photographs, "", None, torch.device("cpu"), stream=True)[0]
        crop = [(2, [common.RandomResizedCrop(size)])]
        for step, _ in enumerate(common.batches(files, crop, 64, 0, 0, 60)):
            if step == 14:  # warm-up
                began = time.perf_counter()
        print(f"readers alone: {45 * 64 / (time.perf_counter() - began):.0f} images/s")


def per_image(side: int, scale: tuple[float, float]) -> v2.Compose:
    """SimCLR's augmentation with torchvision's transforms, for one image of PIL."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(side, scale, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(side // 10 | 1, (0.1, 2.0))], 0.5),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


class SeveralViews:
    """A transform for ImageFolder: all views of an image."""

    def __init__(self, views: list[tuple[int, int, tuple[float, float]]]) -> None:
        self.transforms = [(count, per_image(side, scale)) for count, side, scale in views]

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [transform(image) for count, transform in self.transforms for _ in range(count)]


def streaming(photographs: str, turns: int) -> None:
    """Views of files by our readers, and by torchvision's ImageFolder, with as many workers.

    What is timed are whole passes, from the start of the workers to the last batch, so that nobody
    reads ahead at another's expense.
    """
    workers, batch, steps = os.cpu_count(), 64, 30
    images = common.load_splits(photographs, "", None, torch.device("cpu"), workers, True)[0]
    names = ["crop", "color", "gray", "blur"]
    for what, views in (
        ("2 views of 128 px", [(2, 128, (0.08, 1.0))]),
        ("2 views of 224 px", [(2, 224, (0.08, 1.0))]),
        ("SwAV's 2 of 224 and 6 of 96 px", [(2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14))]),
    ):
        recipes = [(n, swav.augmentation(names, side, scale, 1.0)) for n, side, scale in views]
        folder = torchvision.datasets.ImageFolder(f"{photographs}/train", SeveralViews(views))
        sample = torch.randint(len(folder), (steps * batch,)).tolist()
        folder = Subset(folder, sample)

        def our_pass(recipes=recipes) -> None:
            for _ in common.batches(images, recipes, batch, 0, 0, steps):
                pass

        def their_pass(folder=folder) -> None:
            for _ in DataLoader(folder, batch, num_workers=workers):
                pass

        times = []
        for turn in range(turns):
            seconds = {}
            for run in (our_pass, their_pass) if turn % 2 else (their_pass, our_pass):
                began = time.perf_counter()
                run()
                seconds[run] = time.perf_counter() - began
            times.append((seconds[our_pass], seconds[their_pass]))
        ours, theirs = (steps * batch / statistics.median(t) for t in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(
            f"files, {what}: {ours:.0f} images/s, ImageFolder with transforms of each image "
            f"{theirs:.0f}: {ratio:.2f} times (median of {turns} turns, {workers} workers)",
            flush=True,
        )


def negatives(folder: str) -> None:
    """A table of moco.py by queue and simclr.py by batch, and what 65,536 would cost SimCLR."""
    scripts = Path(__file__).resolve().parent.parent
    rows = []
    for script, flag, values in (
        ("moco", "--queue-size", (1024, 4096, 16384, 65536)),
        ("simclr", "--batch-size", (64, 128, 256, 512, 1024)),
    ):
        for value in values:
            out = f"{folder}/{script}{value}"
            argv = [sys.executable, scripts / f"{script}.py", "--data", f"{folder}/images"]
            argv += ["--stem", "7x7", "--epochs", "2", "--limit", "2048", "--warmup-epochs", "0"]
            argv += ["--preset", "paper", "--out", out, flag, str(value)]
            child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            assert status == 0
            last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
            batch = value if script == "simclr" else 256
            rows.append(
                [
                    script,
                    batch,
                    value if script == "moco" else 2 * value - 2,
                    batch / last["images_per_s"],
                    usage.ru_maxrss / 2**20,
                ]
            )
    (*_, s1, m1), (*_, s2, m2) = rows[-2:]  # linear in the batch from 512 to 1,024
    more = (32768 - 1024) / 512
    s, m = s2 + more * (s2 - s1), m2 + more * (m2 - m1)
    rows.append(["simclr, extrapolated", 32768, 65534, s, m])
    for name, batch, count, seconds, memory in rows:
        print(f"{name}, batch {batch}: {count} negatives, {seconds:.2f} s a step, {memory:.2f} GiB")


def chunks(folder: str) -> None:
    """A table of simclr.py by batch, at once and in chunks of 256 images."""
    script = Path(__file__).resolve().parent.parent / "simclr.py"
    for batch in (256, 512, 1024, 2048, 4096, 8192):
        for more in ([], ["--chunk-size", "256"]):
            out = f"{folder}/simclr{batch}{len(more)}"
            argv = [sys.executable, script, "--data", f"{folder}/images/train", "--stem", "7x7"]
            argv += ["--batch-size", str(batch), "--max-steps", "2", "--warmup-epochs", "0"]
            argv += ["--preset", "paper"]
            child = subprocess.Popen([*argv, "--out", out, *more], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            what = f"batch {batch}, {'in chunks of 256' if more else 'at once'}"
            if status:
                print(f"{what}: not enough memory", flush=True)
                continue
            last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
            seconds, memory = batch / last["images_per_s"], usage.ru_maxrss / 2**20
            print(f"{what}: {seconds:.2f} s a step, {memory:.2f} GiB", flush=True)


def probe() -> None:
    """Seconds of a linear probe on made features: 512 of them, correlated, and 100 classes."""
    rng = common.generator(0)
    mix = torch.randn(512, 512, generator=rng) * torch.logspace(0, -2, 512)
    centers = torch.randn(100, 512, generator=rng) / 3
    for images in (10_000, 50_000):
        y = torch.arange(images) % 100
        x = (centers[y] + torch.randn(images, 512, generator=rng)) @ mix
        began = time.perf_counter()
        _, chosen = common.linear_probe(x, y, x[:1000], 100)
        seconds = time.perf_counter() - began
        print(f"linear probe of {images} images: {seconds:.1f} s, {chosen}", flush=True)


def rounding(folder: str) -> None:
    memory, files = (
        common.load_splits(folder, "", 256, torch.device("cpu"), 2, stream)[0]
        for stream in (False, True)
    )
    for names in (["crop"], ["crop", "color", "gray"]):
        recipe, worst = [(2, simclr.augmentation(names, 32, 0.08, 0.5))], 0.0
        pairs = zip(
            common.batches(memory, recipe, 256, 0, 0, 1),
            common.batches(files, recipe, 256, 0, 0, 1),
            strict=True,
        )
        for (_, (a,)), (_, (b,)) in pairs:
            worst = max(worst, 255 * (a - b).abs().max().item())
        print(f"memory and files, {' '.join(names)}: at most {worst:.2f} gray levels apart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=12, help="turns of each comparison")
    parser.add_argument("--only", choices=[s.__name__ for s in WORK], help="one script's loop")
    parser.add_argument("--photographs", help="class folders of photographs")
    parser.add_argument("--negatives", action="store_true", help="moco.py's memory by its queue")
    parser.add_argument("--chunks", action="store_true", help="simclr.py's memory by its batch")
    parser.add_argument("--against", choices=["lightly"], help="simclr.py and another library's")
    parser.add_argument("--probe", action="store_true", help="seconds of a linear probe")
    args = parser.parse_args()
    turns = args.turns
    common.use_all_cores()
    common.keep_freed_memory()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if args.probe:
        probe()
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        steps = BLOCK * (turns + WARM_UP)  # in one epoch, as with a real set
        class_folders(Path(folder, "images"), 256 * steps)
        if args.negatives:
            negatives(folder)
            sys.exit()
        if args.chunks:
            chunks(folder)
            sys.exit()
        if args.against:
            against_lightly(folder, turns)
            sys.exit()
        if args.photographs:
            streaming(args.photographs, turns)
            waiting(args.photographs, folder)
            sys.exit()
        for script in [s for s in WORK if args.only in (None, s.__name__)]:
            argv = ["--data", f"{folder}/images", "--out", f"{folder}/{script.__name__}"]
            argv += ["--stem", "7x7", "--batch-size", "256", "--epochs", "1"]
            argv += ["--preset", "paper"]
            argv += ["--prototypes", "512", "--queue-start", "0"] if script is swav else []
            end_to_end(script, argv, 256, turns)
        if args.only:
            sys.exit()
        rounding(f"{folder}/images")
    augmentation(turns)
