"""Data and evaluation for the scripts beside it. Each script holds the rest."""

import _codecs
import argparse
import io
import json
import math
import os
import re
import secrets
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import NamedTuple, NoReturn

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, broadcast, gather, gather_object, tqdm
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10, FashionMNIST
from torchvision.transforms.v2 import functional as TF

# The names that --data knows. The first is of the bundled images.
SETS = {"fashion-mini": None, "mnist": MNIST, "fashionmnist": FashionMNIST}
SETS |= {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}
ARCHITECTURES = ("small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# Of the inputs of every encoder, as torchvision and timm expect them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_IMAGE_BYTES = 4 * 2**30  # Images that take more are read from their files at each step.
SAVE_SECONDS = 60  # between checkpoints, which are written at the end of an epoch
LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
# A run continues even if these flags have changed.
IGNORED = ["data", "root", "workers", "out", "eval_every", "log_with", "epochs", "run_id"]


# --------------------------------------------------------------------------------------
# Starting a script
# --------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End the program with one line, because of something that the user can fix."""
    raise SystemExit(f"error: {message}" if PartialState().is_local_main_process else 2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Surround `main`: files, memory and Ctrl-C end in one line instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command continues from the last checkpoint") from None
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        # An error of a process that reads files comes with its traceback, and ends on its line.
        lines = str(error).strip().splitlines() or [repr(error)]
        raise SystemExit(f"error: {lines[-1]}") from None


def start(log_with: str | None = None) -> Accelerator:
    """Start Accelerate as its launcher asks, and refuse modes that the scripts don't support."""
    if log_with and log_with not in map(str, get_available_trackers()):
        fail(f"--log-with {log_with} needs its package: pip install {log_with}")
    accelerator = Accelerator(log_with=log_with, project_dir="runs")
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    is_fp16 = accelerator.mixed_precision == "fp16"
    accumulates = accelerator.gradient_accumulation_steps > 1
    if accelerator.distributed_type not in kinds or is_fp16 or accumulates:
        fail("FSDP, DeepSpeed, fp16 and gradient accumulation are not supported: leave them out")
    # Without GPUs, `accelerate launch --multi_gpu` starts processes that are each on their own.
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        fail("there are too few GPUs for all processes: start fewer or, on CPUs, use torchrun")
    torch.backends.cudnn.benchmark = True  # All steps have the same shapes.
    launchers = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if launchers and accelerator.device.type == "cpu":  # Each process has a single thread.
        torch.set_num_threads(max(1, os.cpu_count() // LOCAL_PROCESSES))
    accelerator.print(f"processes: {accelerator.num_processes}, device: {accelerator.device}")
    return accelerator


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default is not None and action.dest != "help"
        return f"{action.help} (default: %(default)s)" if shown else action.help


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse, named for its messages: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # This is also true of NaN.
            raise ValueError
        return value

    parse.__name__ = f"{'whole ' if kind is int else ''}number from {low:g} to {high:g}"
    return parse


count = number(int, 1)
not_negative_int = number(int, 0)
positive = number(float, 1e-30, 1e30)
not_negative = number(float, 0, 1e30)
share = number(float, 0, 1)


def build_parser(
    description: str, presets: dict[str, dict], architectures: Sequence[str] = ARCHITECTURES
) -> argparse.ArgumentParser:
    """A command line with the flags that the training scripts share."""
    kinds = "; ".join(f"{kind}: {str(flags)[1:-1]}" for kind, flags in presets.items())
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"Other defaults by the kind of images, small up to 64 pixels. {kinds}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    add = parser.add_argument_group("data").add_argument
    add("--data", default="fashion-mini", help=f"{', '.join(SETS)}, a folder or an .npz file")
    add("--root", default="data", help="where torchvision's sets are, or are downloaded to")
    add("--limit", type=number(int, 2), help="train on a subset of this many images")
    workers = min(16, os.cpu_count() // LOCAL_PROCESSES)
    add("--workers", type=not_negative_int, default=workers, help="processes that read files")

    add = parser.add_argument_group("encoder").add_argument
    add("--arch", choices=architectures, default="resnet18", help="its architecture")
    add("--stem", choices=("3x3", "7x7"), help="its first layer (default: 3x3 up to 64 pixels)")
    add("--image-size", type=number(int, 8), help="side of inputs (default: the images', max. 224)")
    add("--init", help="encoder.safetensors or another checkpoint to start from")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=count, default=100, help="passes over the images")
    add("--batch-size", type=number(int, 2), help="images a step (default: 32 to 512, by the set)")
    add("--lr", type=positive, help="peak learning rate (otherwise by optimizer and batch)")
    add("--warmup-epochs", type=not_negative, default=10.0, help="epochs of warm-up, at most half")
    add("--weight-decay", type=not_negative, default=1e-4, help="weight decay")
    add("--seed", type=not_negative_int, default=0, help="of the weights, the order and the views")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="its folder (default: runs/SCRIPT-DATA)")
    add("--eval-every", type=count, default=5, help="epochs between kNN evaluations")
    trackers = [str(kind) for kind in LoggerType if str(kind) != "all"]
    add("--log-with", choices=trackers, help="experiment tracker, whose package is installed")
    return parser


def parse_for(
    images: "Images", parser: argparse.ArgumentParser, presets: dict[str, dict], argv: list | None
) -> argparse.Namespace:
    """Parse the command line; flags that are not given take the preset for such images."""
    args = parser.parse_args(argv)
    side = args.image_size or min(224, *images.size)
    kind = "small" if side <= 64 else "large"
    preset = presets["fashion-mini" if args.data == "fashion-mini" else kind]
    batch_size = preset.get("batch_size", 512)
    if args.data != "fashion-mini":  # A power of two leaves about 64 steps in an epoch.
        batch_size = max(32, min(batch_size, 2 ** int(math.log2(max(1, len(images) / 64)))))
    defaults = {
        "batch_size": min(batch_size, len(images)),
        "image_size": side,
        "stem": "3x3" if kind == "small" else "7x7",
        "out": Path("runs", f"{Path(sys.argv[0]).stem}-{Path(args.data).resolve().stem}"),
    }
    parser.set_defaults(**preset | defaults)
    args = parser.parse_args(argv)
    processes = PartialState().num_processes
    if args.batch_size > len(images) or args.batch_size % processes:
        most = f"at most {len(images)}, the images, and a multiple of {processes}, the processes"
        fail(f"--batch-size {args.batch_size} must be {most}")
    return args


def generator(*key: int) -> torch.Generator:
    """A random generator on the CPU that is a function of integers such as (seed, epoch, step)."""
    entropy = np.random.SeedSequence((len(key), *key))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path, which replaces `path` when the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------
# Image operations
#
# They work on batches x [B, C, H, W] with C = 1 or 3, the crops of uint8 and the others of float32
# in 0..1. draw(n, rng) gives the parameters of n images as CPU tensors with n rows, distributed as
# in torchvision's transform of the same name. Called with them, an operation gives what torchvision
# gives for each image.
# --------------------------------------------------------------------------------------


def to_device_of(x: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of x, without waiting for a CUDA device."""
    return value.to(x.device, non_blocking=x.is_cuda)


class RandomResizedCrop(NamedTuple):
    """A crop of random area and aspect ratio, resized to a square, mirrored with p = `flip`."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Numbers in 0..1: scale, ratio [n, 10] for ten tries, top, left [n, 1]; and flip [n]."""
        uniform = torch.rand(n, 22, generator=rng)
        scale, ratio, top, left = uniform.split([10, 10, 1, 1], dim=1)
        flip = torch.rand(n, generator=rng) < self.flip
        return scale, ratio, top, left, flip

    def boxes(
        self, scale: Tensor, ratio: Tensor, top: Tensor, left: Tensor, height: int, width: int
    ) -> Tensor:
        """The boxes [n, 4] that the drawn numbers choose: top, left, height and width.

        As in torchvision, the first of ten tries counts that fits into the image, or else the
        middle of the image with the nearest allowed aspect ratio.
        """
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * scale)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + (high - low) * ratio)
        w = (area * aspect).sqrt().round()
        h = (area / aspect).sqrt().round()

        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        found = fits.any(1, keepdim=True)
        first = fits.int().argmax(1, keepdim=True)
        nearest = min(max(width / height, self.ratio[0]), self.ratio[1])
        h = torch.where(found, h.gather(1, first), min(round(width / nearest), height))
        w = torch.where(found, w.gather(1, first), min(round(height * nearest), width))

        y = torch.where(found, (top * (height - h + 1)).floor(), (height - h) // 2)
        x = torch.where(found, (left * (width - w + 1)).floor(), (width - w) // 2)
        return torch.cat([y, x, h, w], dim=1).long()

    def __call__(
        self, x: Tensor, scale: Tensor, ratio: Tensor, top: Tensor, left: Tensor, flip: Tensor
    ) -> Tensor:
        """x [B, C, H, W], uint8 or float, to [B, C, size, size], float: bilinear, antialiased."""
        H, W = x.shape[2:]
        boxes = to_device_of(x, self.boxes(scale, ratio, top, left, H, W).float())
        start, length = boxes[:, None].split(2, dim=2)  # [B, 1, 2]: of the rows, of the columns

        # Where the centers of the new pixels lie in the image: [B, size, 2].
        pixel = torch.arange(self.size, device=x.device)[:, None]
        centers = start + length / self.size * (pixel + 0.5)
        mirrored = flip[:, None, None] & torch.tensor([False, True])  # columns only
        centers = torch.where(to_device_of(x, mirrored), centers.flip(1), centers)

        if max(H, W) <= self.size:
            return self._enlarge(x, start, length, centers)
        # Each image is copied as float32. That is done for 256 MiB at a time.
        at_once = max(1, 2**26 // x[0].numel())
        split = [values.split(at_once) for values in (x, start, length, centers)]
        parts = [self._shrink(*part) for part in zip(*split, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _enlarge(self, x: Tensor, start: Tensor, length: Tensor, centers: Tensor) -> Tensor:
        """Resize crops that are not larger than the result: each pixel is a mean of four."""
        rows, columns = centers.clamp(start + 0.5, start + length - 0.5).unbind(2)
        vertical = rows * (2 / x.shape[2]) - 1  # grid_sample counts from -1 to 1
        horizontal = columns * (2 / x.shape[3]) - 1
        grid = torch.broadcast_tensors(horizontal[:, None, :], vertical[:, :, None])
        white = 255 if x.dtype == torch.uint8 else 1
        return F.grid_sample(x / white, torch.stack(grid, dim=3), align_corners=False)

    def _shrink(self, x: Tensor, start: Tensor, length: Tensor, centers: Tensor) -> Tensor:
        """Resize any crops by two matrix products: each pixel is a mean of all that it covers."""
        H, W = x.shape[2:]
        rows = self._filters(centers[:, :, 0], start[:, :, 0], length[:, :, 0], H)
        columns = self._filters(centers[:, :, 1], start[:, :, 1], length[:, :, 1], W)
        white = 255 if x.dtype == torch.uint8 else 1
        x = x.transpose(1, 2).flatten(1, 2).float()  # [B, H * C, W]
        x = x @ (columns / white).mT
        x = rows @ x.view(len(x), H, -1)  # [B, size, C * size]
        return x.unflatten(2, (-1, self.size)).transpose(1, 2)

    def _filters(self, centers: Tensor, start: Tensor, length: Tensor, n: int) -> Tensor:
        """Triangle filters [B, size, n] over the n old pixels of one axis; each row sums to 1."""
        pixel = torch.arange(n, device=centers.device)
        inside = (pixel >= start) & (pixel < start + length)
        radius = (length / self.size).clamp(min=1)[..., None]
        weight = (pixel + 0.5 - centers[..., None]).div_(radius).abs_()
        # In place, -max(0, 1 - distance). The sign cancels when a row is divided by its sum.
        weight = weight.sub_(1).clamp_(max=0).mul_(inside[:, None])
        return weight.div_(weight.sum(2, keepdim=True))

    def cut(
        self, image: Tensor, scale: Tensor, ratio: Tensor, top: Tensor, left: Tensor, flip: Tensor
    ) -> Tensor:
        """The same by torchvision: image [3, H, W] uint8 to one crop for each row of parameters."""
        crops = []
        boxes = self.boxes(scale, ratio, top, left, *image.shape[1:])
        for box, mirrored in zip(boxes.tolist(), flip.tolist(), strict=True):
            crop = TF.resized_crop(image, *box, [self.size, self.size])
            crops.append(crop.flip(2) if mirrored else crop)
        return torch.stack(crops)


class CenterCrop(NamedTuple):
    """The middle square, resized. Above 64 pixels it is, as usual, 224/256 of the shorter side."""

    size: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., H, W], uint8, to [..., size, size] in 0..1."""
        return self.cut(x) / 255

    def cut(self, x: Tensor) -> Tensor:
        """The same as uint8."""
        side = round(min(x.shape[-2:]) * (1 if self.size <= 64 else 224 / 256))
        return TF.resize(TF.center_crop(x, [side]), [self.size, self.size])


class ColorJitter(NamedTuple):
    """Brightness, contrast, saturation and hue, in an order that each step draws."""

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """factors [n, 4], three around 1 and the shift of the hue; order [n, 4], n equal rows."""
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
        strength = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        low = torch.maximum(middle - strength, torch.tensor([0.0, 0.0, 0.0, -0.5]))
        factors = low + (middle + strength - low) * torch.rand(n, 4, generator=rng)
        return factors, torch.randperm(4, generator=rng).expand(n, 4)

    def __call__(self, x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """x [B, C, H, W] with the four adjustments made."""
        factors = to_device_of(x, factors)[:, :, None, None, None]
        for kind in order[:1].flatten().tolist():
            factor = factors[:, kind]
            if kind == 3:
                x = shift_hue(x, factor[:, 0]) if x.shape[1] == 3 else x
                continue
            # Mix the image with a black one, with its mean gray, or with its gray version.
            gray = TF.rgb_to_grayscale(x) if kind > 0 else x.new_zeros(1)
            gray = gray.mean((2, 3), keepdim=True) if kind == 1 else gray
            x.lerp_(gray, 1 - factor).clamp_(0, 1)
        return x


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x [B, 3, H, W] by shift [B, 1, 1], in -0.5..0.5 of the circle."""
    r, g, b = x.unbind(1)
    least, value = x.amin(1), x.amax(1)
    chroma = value - least

    # The hue in sixths of the circle: red is 0, green 2, blue 4. Since one channel is the
    # smallest, |side| or away is 1. With that, the formula below gives side if red is the
    # largest channel, 2 + (b - r) / chroma if green is, and 4 + (r - g) / chroma - 6 if blue
    # is.
    away, side = torch.stack([value - r, g - b]) / chroma.clamp(min=1e-12)
    hue = torch.addcmul(side.abs(), away, 3 - 2 * side.abs()).copysign_(side)
    hue.add_(6 * shift)
    hue.sub_((hue / 6).floor_(), alpha=6)

    r = (hue - 3).abs_().sub_(1)
    g = 2 - (hue - 2).abs_()
    b = 2 - (hue - 4).abs_()
    x = torch.stack([r, g, b], dim=1).clamp_(0, 1)
    return x.mul_(chroma[:, None]).add_(least[:, None])


class GaussianBlur(NamedTuple):
    """A blur whose sigma, in pixels, is uniform between two; the image is reflected at its edge."""

    kernel_size: int
    sigma: tuple[float, float]

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor]:
        """sigma [n]."""
        low, high = self.sigma
        return (low + (high - low) * torch.rand(n, generator=rng),)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, C, S, S], sigma [B]: two products with banded matrices [S, S]."""
        n = x.shape[3]
        tap = torch.arange(self.kernel_size, device=x.device) - self.kernel_size // 2
        weights = (-0.5 * (tap / to_device_of(x, sigma)[:, None]) ** 2).softmax(1)[:, None]
        source = (torch.arange(n, device=x.device)[:, None] + tap).abs()  # reflected on the left
        source = source.minimum(2 * (n - 1) - source).expand(len(x), -1, -1)  # and on the right
        band = x.new_zeros(len(x), n, n).scatter_add_(2, source, weights.expand_as(source))
        return band[:, None] @ x @ band[:, None].mT


class Grayscale(NamedTuple):
    """The luma, in each of the channels."""

    def draw(self, n: int, rng: torch.Generator) -> tuple:
        return ()

    def __call__(self, x: Tensor) -> Tensor:
        return TF.rgb_to_grayscale(x, x.shape[1])


class RandomApply(NamedTuple):
    """Another operation, on each image with probability p."""

    operation: Callable[..., Tensor]
    p: float

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """chosen [n], bool, and the parameters of the operation."""
        chosen = torch.rand(n, generator=rng) < self.p
        return chosen, *self.operation.draw(n, rng)

    def __call__(self, x: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
        """x [B, C, H, W] with the chosen images changed, in place."""
        rows = chosen.nonzero()[:, 0]  # on the CPU, where its size is known without waiting
        there = to_device_of(x, rows)
        parameters = [values.index_select(0, rows) for values in parameters]
        return x.index_copy_(0, there, self.operation(x.index_select(0, there), *parameters))


# --------------------------------------------------------------------------------------
# Images and views
# --------------------------------------------------------------------------------------


@dataclass
class Images:
    """N images, in memory or as files.

    Attributes:
        pixels: uint8 [N, C, H, W], on the device if they fit, or None if files are read.
        paths: [N] of the files, or None.
        labels: [N] classes from 0 on, -1 where there is none.
        device, workers: where crops are wanted, and how many processes read files.
    """

    pixels: Tensor | None
    paths: np.ndarray | None
    labels: Tensor
    device: torch.device
    workers: int

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Images":
        """The images `index` [n]."""
        pixels = None if self.pixels is None else self.pixels[index.to(self.pixels.device)]
        paths = None if self.paths is None else self.paths[index.numpy()]
        return replace(self, pixels=pixels, paths=paths, labels=self.labels[index])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height; of files, medians of the shorter and the longer side of up to 100."""
        if self.pixels is not None:
            return self.pixels.shape[3], self.pixels.shape[2]
        sizes = [sorted(Image.open(p).size) for p in self.paths[:: math.ceil(len(self) / 100)]]
        return tuple(int(median) for median in np.median(sizes, axis=0))

    @property
    def at_hand(self) -> bool:
        """Whether crops are made on the device, and not by other processes."""
        return self.pixels is not None and self.pixels.device.type == self.device.type

    @property
    def num_classes(self) -> int:
        """The largest label and one; 0 without labels."""
        return int(self.labels.max()) + 1

    def __str__(self) -> str:
        width, height = self.size
        channels = "gray" if self.pixels is not None and self.pixels.shape[1] == 1 else "RGB"
        missing = int((self.labels < 0).sum())
        some = f" ({missing} images without)" if 0 < missing < len(self) else ""
        about = f"{len(self)} images, {self.num_classes} classes{some}, {width}x{height} {channels}"
        return about if self.pixels is not None else f"{about} (median), read at each step"

    @property
    def identity(self) -> str:
        """Tells other images apart, but not the same images in another folder."""
        if self.paths is None:
            content = self.pixels[:100].cpu().numpy().tobytes()
        else:
            folder = os.path.commonpath([min(self.paths), max(self.paths)])
            content = str([os.path.relpath(path, folder) for path in self.paths]).encode()
        return f"{len(self)} images, {zlib.crc32(content + self.labels.numpy().tobytes())}"

    def crops(self, index: Tensor, operations: Sequence, drawn: Sequence) -> list[Tensor]:
        """For each cropping operation, crops [rows, C, S, S] of the images `index` [n].

        They are float32 in 0..1 or, if not at hand, uint8. What is drawn has n, 2n, ... rows.
        """
        n = len(index)
        views = [len(parameters[0]) // n if parameters else 1 for parameters in drawn]
        results = []
        if self.pixels is not None:
            for operation, parameters, count in zip(operations, drawn, views, strict=True):
                rows = to_device_of(self.pixels, index.repeat(count))
                x = operation(self.pixels.index_select(0, rows), *parameters)
                results.append(x if self.at_hand else (x * 255).round().byte())
            return results
        for operation, count in zip(operations, views, strict=True):
            shape = (count * n, 3, operation.size, operation.size)
            results.append(torch.empty(shape, dtype=torch.uint8))
        for i, path in enumerate(self.paths[index.numpy()]):
            image = read_image(path)
            for x, operation, parameters in zip(results, operations, drawn, strict=True):
                x[i::n] = operation.cut(image, *[values[i::n] for values in parameters])
        return results

    def load(self, steps: Dataset, numbers: Sequence[int]) -> Iterator[list[Tensor]]:
        """The items `numbers` of a data set whose items are tuples of crops, on the device."""
        on_gpu = self.device.type == "cuda"
        workers = 0 if self.at_hand or len(numbers) == 1 else self.workers
        pin = on_gpu and not self.at_hand
        for crops in DataLoader(steps, None, sampler=numbers, num_workers=workers, pin_memory=pin):
            crops = [x.to(self.device, non_blocking=on_gpu) for x in crops]
            yield [x if x.is_floating_point() else x / 255 for x in crops]


def read_image(path: str) -> Tensor:
    """Read a file as RGB, turned as its EXIF data say: [3, H, W] uint8."""
    try:
        with Image.open(str(path)) as image:
            bits = getattr(image, "tag_v2", {}).get(258, "")  # of a TIFF, for each band
            layout = f"{image.format} {image.mode} {[tile[3] for tile in image.tile[:1]]} {bits}"
            # Pillow would drop bits (";16", or a largest value in a PPM) or bands ("X" in a TIFF).
            loses = re.search(r";16|PPM.*, (?!255\))|TIFF.*X", layout) or np.max(bits or 8) > 8
            if loses or image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"):
                raise ValueError(f"{layout} is not 8-bit gray, palette, RGB, RGBA or CMYK")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # A damaged file can raise almost any exception.
        raise OSError(f"{path} cannot be read ({error}): repair, convert or remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_splits(
    data: str, root: str, limit: int | None, device: torch.device, workers: int
) -> tuple[Images, Images | None, Images | None]:
    """Load the images of --data, and print what was read.

    Args:
        data: a name of SETS; a folder with train/ and val/ or test/, which hold one folder per
            class, or with images anywhere in it; or an .npz file with uint8 train_images,
            train_labels, test_images and test_labels, or with train_images alone.
        root: where torchvision's data sets are, or are downloaded to.
        limit: keep the first `limit` training images of a fixed shuffle.

    Returns:
        The images to train on; those of them that have labels, or for stl10 others that have; and
        the labeled test images. The last two are None if there are none.
    """
    notes = []
    if data in SETS:
        found = read_set(data, root)
    elif data.endswith(".npz"):
        found = read_arrays(data, notes)
    else:
        found = list_folder(data, notes)
    splits, classes = {}, None  # the labels that occur in training, which are numbered in order
    for name, (source, labels) in found.items():
        labels = np.asarray(labels)
        if classes is None:
            classes = np.unique(labels[labels >= 0])
        unknown = np.setdiff1d(labels[labels >= 0], classes)
        if len(unknown) and len(classes):
            fail(f"--data {data} has class {unknown[0]} in its {name} part, but not in train")
        labels = torch.from_numpy(np.where(labels < 0, -1, np.searchsorted(classes, labels)))
        if limit and name != "test":
            chosen = torch.randperm(len(labels), generator=generator(0))[:limit]
            source, labels = source[chosen.numpy()], labels[chosen]
        if len(labels) < 2:
            fail(f"--data {data} has {len(labels)} images to {name}, but two are needed")
        paths = source if source.ndim == 1 else None
        pixels = decode(paths, workers) if source.ndim == 1 else torch.from_numpy(source)
        room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf
        if pixels is not None and pixels.nbytes < room:
            pixels = pixels.to(device)
        splits[name] = Images(pixels, paths, labels, device, workers)

    width, height = splits["train"].size
    if max(width, height) > 2 * min(width, height):
        notes.append("views and evaluation show only squares of such long images: cut or pad them")
    PartialState().print("; ".join([f"{name}: {part}" for name, part in splits.items()] + notes))

    labeled = {}
    for name, images in splits.items():
        index = (images.labels >= 0).nonzero()[:, 0]
        if len(index) > 1:
            labeled[name] = images if len(index) == len(images) else images.take(index)
    images, bank = splits.get("unlabeled", splits["train"]), labeled.get("train")
    return images, bank, labeled.get("test") if bank else None


def read_set(name: str, root: str) -> dict[str, tuple[np.ndarray, Sequence[int]]]:
    """The pixels [N, C, H, W] and labels of a set of torchvision, which may be downloaded."""
    if name == "fashion-mini":
        return read_arrays(str(Path(__file__).resolve().parent / "data" / "fashion-mini.npz"), [])
    splits = {}
    with PartialState().local_main_process_first():
        for split in ("train", "test", "unlabeled") if name == "stl10" else ("train", "test"):
            try:
                kind = split if name == "stl10" else split == "train"
                images = SETS[name](root, kind, download=True)
            except (OSError, RuntimeError) as error:
                fail(f"{name} is not in --root {root} and cannot be downloaded: {error}")
            labels = images.labels if name == "stl10" else images.targets
            splits[split] = (channels_first(np.asarray(images.data)), labels)
    return splits


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """Images [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3 as [N, C, H, W]."""
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[1] not in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels)


def read_arrays(path: str, notes: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The pixels [N, C, H, W] and labels of an .npz file; see `list_folder`."""
    form = "uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W] with whole numbers [N] as labels"
    splits = {}
    try:
        file = np.load(path)
        for name in ("train", "test") if "test_images" in file.files else ("train",):
            images = file[f"{name}_images"]
            splits[name] = (images, file.get(f"{name}_labels", np.full(len(images), -1)))
        ignored = [name for name in file.files if name.split("_")[0] not in splits]
    except Exception as error:  # A damaged file can raise almost any exception.
        fail(f"--data {path} cannot be read ({error}): it must hold train_images, {form}")
    for name, (images, labels) in splits.items():
        pixels = channels_first(images)
        right = pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.dtype == np.uint8
        if not right or labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
            found = f"{images.dtype} {list(images.shape)}, {labels.dtype} {list(labels.shape)}"
            fail(f"--data {path}: {name} images and labels are {found}, not {form}")
        splits[name] = (pixels, labels)
    if ignored:
        notes.append(f"ignored: {', '.join(ignored)}")
    return splits


def list_folder(data: str, notes: list[str]) -> dict[str, tuple[np.ndarray, list[int]]]:
    """The paths and labels of a folder of images; adds to `notes` what of it is not used."""
    if not Path(data).is_dir():
        fail(f"--data {data} is none of {', '.join(SETS)}, no folder and no .npz file")
    inside = [path for path in sorted(Path(data).iterdir()) if path.name[0] != "."]
    folders = [path.name for path in inside if path.is_dir()]
    parts = [name for name in ("train", "val", "test") if name in folders][:2]
    if parts[:1] != ["train"]:
        parts = [""]  # the folder itself
    splits, classes, skipped = {}, None, Counter()
    for name, part in zip(("train", "test"), parts, strict=False):
        paths, kinds = find_images(Path(data, part), skipped)
        if not paths:
            fail(f"--data {data} has no images in {Path(data, part)}")
        alone = kinds.count("")  # outside of a class folder: then there are no classes
        if 0 < alone < len(kinds):
            notes.append(f"no classes in {name}, since {alone} images lie beside its folders")
        if classes is None:
            classes = {} if alone else {kind: i for i, kind in enumerate(sorted(set(kinds)))}
        unknown = sorted(set(kinds) - set(classes))
        if unknown and classes and not alone:
            fail(f"--data {data} has a folder {unknown[0]!r} in {part}, but none in train")
        labels = [-1 if alone else classes.get(kind, -1) for kind in kinds]
        splits[name] = (np.array(paths), labels)

    ignored = [path.name for path in inside if path.name not in parts]
    if ignored and parts != [""]:
        notes.append(f"ignored: {', '.join(ignored[:5])}{', ...' if len(ignored) > 5 else ''}")
    if skipped:
        files = [f"{number} files ({suffix})" for suffix, number in skipped.most_common()]
        notes.append(f"skipped: {', '.join(files)}")
    return splits


def find_images(folder: Path, skipped: Counter) -> tuple[list[str], list[str]]:
    """The images in a folder and below it, and of each the first folder on its path, or "".

    Other files are counted in `skipped`, by their suffix, unless their names begin with a dot.
    """
    paths, kinds = [], []
    for where, subfolders, files in os.walk(folder, followlinks=True, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        kind = "".join(Path(where).relative_to(folder).parts[:1])
        for name in sorted(name for name in files if not name.startswith(".")):
            if torchvision.datasets.folder.is_image_file(name):
                paths.append(f"{where}/{name}")
                kinds.append(kind)
            else:
                skipped[Path(name).suffix or "without suffix"] += 1
    return paths, kinds


def decode(paths: np.ndarray, workers: int) -> Tensor | None:
    """All files as [N, 3, H, W] uint8, or None if they differ in size or take too much memory."""
    first = read_image(paths[0])
    if len(paths) * first.numel() > MAX_IMAGE_BYTES:
        return None
    pixels = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        images = pool.map(read_image, paths)
        for i, image in enumerate(progress(images, "reading images", len(paths))):
            if image.shape != first.shape:
                return None
            pixels[i] = image
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


class Steps(Dataset):
    """Maps the number of a training step to its crops, on each process those of its own images."""

    def __init__(self, images: Images, recipes: Sequence, batch_size: int, seed: int) -> None:
        self.images, self.recipes, self.batch_size, self.seed = images, recipes, batch_size, seed
        self.per_epoch = len(images) // batch_size
        state = PartialState()
        self.rows = torch.arange(batch_size).chunk(state.num_processes)[state.process_index]
        self.epoch, self.order = -1, torch.empty(0)
        self.step, self.drawn = -1, None

    def draw(self, step: int) -> tuple[Tensor, list[list[tuple[Tensor, ...]]]]:
        """What a step shows, drawn for all processes by the seed, the epoch and the step.

        Returns:
            index [B] of this process's images, and for each recipe the parameters of its
            operations, of which row v * B + i belongs to view v of image i.
        """
        if step == self.step:  # Without other processes, each step is asked for twice.
            return self.drawn
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng = generator(self.seed, epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.images), generator=rng)
        rng = generator(self.seed, epoch, i)
        drawn = []
        for count, operations in self.recipes:
            rows = torch.cat([self.rows + view * self.batch_size for view in range(count)])
            n = count * self.batch_size
            drawn.append([tuple(v[rows] for v in op.draw(n, rng)) for op in operations])
        self.step, self.drawn = step, (self.order[i * self.batch_size + self.rows], drawn)
        return self.drawn

    def __getitem__(self, step: int) -> list[Tensor]:
        index, drawn = self.draw(step)
        crops = [operations[0] for _, operations in self.recipes]
        return self.images.crops(index, crops, [parameters[0] for parameters in drawn])


def batches(
    images: Images, recipes: Sequence, batch_size: int, seed: int, steps: range
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The views of some steps of a training run.

    Every epoch goes through all images in an order of its own; the rest that does not fill a batch
    is left out.

    Args:
        recipes: pairs of a number of views and their operations, of which the first is a crop.
        batch_size: images per step, over all processes.
        steps: their numbers, counted from the start of the run.

    Yields:
        index [B] of this process's images, and normalized views [count, B, 3, S, S] of each recipe.
    """
    dataset = Steps(images, recipes, batch_size, seed)
    for step, crops in zip(steps, images.load(dataset, steps), strict=True):
        # Drawing the parameters again is cheaper than sending them from another process.
        index, drawn = dataset.draw(step)
        views = []
        for (count, operations), parameters, x in zip(recipes, drawn, crops, strict=True):
            for operation, values in zip(operations[1:], parameters[1:], strict=True):
                x = operation(x, *values)
            views.append(normalize(x.expand(-1, 3, -1, -1)).unflatten(0, (count, -1)))
        yield index, views


@lru_cache  # A new copy for each batch would make a GPU wait.
def scale_and_shift(device: torch.device) -> tuple[Tensor, Tensor]:
    """What an image is multiplied by, and what is then added, by MEAN and STD: [3, 1, 1] each."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return 1 / std, -mean / std


def normalize(x: Tensor) -> Tensor:
    """x [..., 3, H, W] in 0..1 as inputs of an encoder."""
    scale, shift = scale_and_shift(x.device)
    return torch.addcmul(shift, x, scale)


# --------------------------------------------------------------------------------------
# Encoders
# --------------------------------------------------------------------------------------

RESNET_LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# Parts of the names, in other people's checkpoints, of encoders that their authors don't evaluate.
SECOND_ENCODERS = ("encoder_k", "key_encoder", "momentum", "target", "student")
# What their checkpoints hold beside tensors, and runs no code: flags, paths and NumPy's numbers.
HARMLESS = [argparse.Namespace, np.dtype, np.ndarray, _codecs.encode]
HARMLESS += {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
for kind in ("pathlib.Posix", "pathlib.Windows", "pathlib._local.Posix", "pathlib._local.Windows"):
    HARMLESS.append((PurePath, f"{kind}Path"))
for module in ("numpy.core", "numpy._core"):
    HARMLESS.append((np.float64(0).__reduce__()[0], f"{module}.multiarray.scalar"))
    HARMLESS.append((np.zeros(0).__reduce__()[0], f"{module}.multiarray._reconstruct"))


def build_encoder(
    architecture: str, stem: str = "7x7", init: str | dict[str, Tensor] | None = None
) -> nn.Module:
    """A new encoder, x [B, 3, H, W] -> h [B, encoder.width].

    Args:
        architecture: "small", five convolutions, or a ResNet under torchvision's name.
        stem: of a ResNet; "3x3" is the one for small images, without max-pooling (SimCLR, B.9).
        init: a file to take the weights from, or the weights; see `read_weights`.
    """
    if architecture == "small":
        layers = []
        channels = (3, 32, 32, 64, 128, 256)
        for i in range(5):
            stride = 2 if i % 2 == 0 else 1
            conv = torchvision.ops.Conv2dNormActivation(channels[i], channels[i + 1], 3, stride)
            layers.append(conv)
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoder.width = channels[-1]
    else:
        encoder = torchvision.models.get_model(architecture)
        if stem == "3x3":
            encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            encoder.maxpool = nn.Identity()
        encoder.width = encoder.fc.in_features
        encoder.fc = nn.Identity()
    if init:
        weights = init if isinstance(init, dict) else read_weights(init)[0]
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            fail(f"the weights do not fit {architecture} with 3 channels: {reason:.200}")
    return encoder


def save_encoder(path: Path, encoder: nn.Module, **about: object) -> None:
    """Write the weights under torchvision's names, with what the file is about as its metadata."""
    about |= {"mean": MEAN, "std": STD}
    about = {name: json.dumps(value) for name, value in about.items()}
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    with atomic_write(path) as file:
        file.write_bytes(safetensors.torch.save(weights, about))


def load_encoder(path: str | Path, architecture: str | None = None) -> tuple[nn.Module, dict]:
    """The encoder of a file, on the CPU, and what the file is about; see `read_weights`."""
    weights, about = read_weights(path)
    if not about:
        stem = "3x3" if weights["conv1.weight"].shape[-1] == 3 else "7x7"
        about = {"architecture": architecture or "resnet50", "stem": stem}
    if about["architecture"] not in ARCHITECTURES:
        fail(f"{path} holds a {about['architecture']}, which is none of {ARCHITECTURES}")
    return build_encoder(about["architecture"], about["stem"], weights), about


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The weights of an encoder under torchvision's names, and what the file is about.

    The file is one of `save_encoder`; or somebody else's checkpoint with a ResNet. No code of it is
    run, and one line says what of it is used.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                about = file.metadata() or {}
            tensors = safetensors.torch.load_file(path)
            if {"architecture", "stem", "mean"} <= about.keys():  # one of ours
                return tensors, {name: json.loads(value) for name, value in about.items()}
        else:
            with torch.serialization.safe_globals(HARMLESS):
                tensors = flatten(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # A damaged file can raise almost any exception.
        held = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {held[1]}, which could run code" if held else "is it damaged?"
        fail(f"{path} was not loaded ({reason}): use a checkpoint that holds only tensors")

    # The encoder is where the first convolution stands that is not of a second encoder.
    names = [name for name in tensors if not any(word in name for word in SECOND_ENCODERS)]
    names = [name for name in names if name.endswith(("conv1.weight", "0.weight"))]
    first = next((name for name in names if tensors[name].ndim == 4), None)
    if not first:
        names = ", ".join(list(tensors)[:3]) or "nothing"
        fail(f"{path} holds no ResNet under torchvision's names; it begins with {names}")
    prefix = first.removesuffix("conv1.weight").removesuffix("0.weight")
    inside = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    # If the layers have numbers, they are torchvision's in the same order.
    numbers = sorted({int(part) for name in inside if (part := name.split(".")[0]).isdecimal()})
    layer_of = dict(zip(map(str, numbers), RESNET_LAYERS, strict=False))
    weights, unused = {}, Counter()
    for name, value in tensors.items():
        layer, _, rest = name.removeprefix(prefix).partition(".")
        layer = layer_of.get(layer, layer)
        if name.startswith(prefix) and layer in RESNET_LAYERS:
            # SupContrast calls it a shortcut.
            weights[f"{layer}.{rest.replace('shortcut.', 'downsample.')}"] = value
        else:
            unused[".".join(name.split(".")[:2])] += 1
    left = ", ".join(f"{name} ({number})" for name, number in unused.items()) or "nothing"
    used = f"{len(weights)} tensors under {prefix or 'no prefix'}"
    PartialState().print(f"{path}: used {used}; not used: {left}")
    return weights, {}


def flatten(tree: object, *path: str) -> dict[str, Tensor]:
    """All tensors in nested dictionaries, by name."""
    if isinstance(tree, Tensor):  # DDP and torch.compile have added to its name.
        return {".".join(part for part in path if part not in ("module", "_orig_mod")): tree}
    tensors = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        tensors |= flatten(value, *path, *str(key).split("."))
    return tensors


class Middles(Dataset):
    """Maps the number of a part to the middle squares of its images."""

    def __init__(self, images: Images, parts: Sequence[Tensor], size: int) -> None:
        self.images, self.parts, self.size = images, parts, size

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.images.crops(self.parts[i], [CenterCrop(self.size)], [()])


def middles(images: Images, index: Tensor, size: int) -> Iterator[Tensor]:
    """The middle squares of the images `index`, [256, 3, size, size] in 0..1 at a time."""
    parts = index.split(256)
    for (x,) in images.load(Middles(images, parts, size), range(len(parts))):
        yield x.expand(-1, 3, -1, -1)


@torch.no_grad()
def extract_features(encoder: nn.Module, images: Images, size: int) -> Tensor:
    """The features h [N, D], float32, of the images' middle squares, by the encoder in eval mode.

    The work is shared by all processes, which all get the result.
    """
    state = PartialState()
    was_training = encoder.training
    encoder.eval()
    broadcast(list(encoder.buffers()))  # the running averages of batch norm, which may differ
    share = math.ceil(len(images) / state.num_processes)
    index = (state.process_index * share + torch.arange(share)).clamp(max=len(images) - 1)
    h = []
    for x in progress(middles(images, index, size), "features", math.ceil(share / 256)):
        x = normalize(x).contiguous(memory_format=torch.channels_last)
        h.append(encoder(x).float())
    encoder.train(was_training)
    return gather(torch.cat(h))[: len(images)]  # without the last image's repetitions


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Weighted k nearest neighbors by cosine similarity (Wu et al. 2018, section 3.4).

    Args:
        bank, labels, queries: features [M, D] with labels [M], and features [Q, D].
        k: how many neighbors vote, each with exp(cosine / temperature).

    Returns:
        [Q, C]: the votes for each class, as shares of all votes.
    """
    bank, labels = F.normalize(bank, dim=1), labels.to(bank.device)
    num_classes = int(labels.max()) + 1
    scores = []
    for q in F.normalize(queries, dim=1).split(max(1, 2**28 // len(bank))):  # 1 GiB of cosines
        cosine, neighbors = (q @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = (cosine / temperature).softmax(1)
        scores.append(q.new_zeros(len(q), num_classes).scatter_add_(1, labels[neighbors], votes))
    return torch.cat(scores)


def train_probe(x: Tensor, y: Tensor, W: Tensor, decay: float) -> Tensor:
    """Logistic regression by L-BFGS: weights [D, C] for x [N, D] and y [N], starting from W."""
    W = W.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([W], max_iter=50, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W, y) + 0.5 * decay * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return W.detach()


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, seed: int = 0) -> Tensor:
    """Logits [M, C] of a linear classifier, trained on features x [N, D] with labels y [N].

    The weight decay is chosen by the loss on a held-out tenth of x, or below 1,000 images by five
    folds, and the classifier is then trained on all.
    """
    device = x.device
    if x.numel() < 1e6:  # A GPU would mostly wait between operations so small.
        x, x_test = x.cpu(), x_test.cpu()
    order = torch.randperm(len(y), generator=generator(seed))
    x, y = x[order.to(x.device)], y[order].to(x.device)
    mean, std = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    x, x_test = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (x, x_test))
    places = torch.arange(len(y), device=x.device)
    parts = places.chunk(5) if len(y) < 1000 else places.split(len(y) // 10)[:1]
    folds = [(places[~torch.isin(places, part)], part) for part in parts]

    weights = [x.new_zeros(x.shape[1], int(y.max()) + 1)] * len(folds)
    best_loss = math.inf
    for decay in (1.0, 0.1, 0.01, 0.001, 0.0001):  # each starts from the one before
        loss = 0.0
        for i, (rest, held_out) in enumerate(folds):
            weights[i] = train_probe(x[rest], y[rest], weights[i], decay)
            logits = x[held_out] @ weights[i]
            loss += F.cross_entropy(logits, y[held_out], reduction="sum").item()
        if loss < best_loss:
            best_loss, best_decay, W = loss, decay, weights[0]
    return (x_test @ train_probe(x, y, W, best_decay)).to(device)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Percent of the rows of scores [N, C] whose largest entry is at the label."""
    return 100 * (scores.argmax(1) == labels.to(scores.device)).float().mean().item()


def knn_accuracy(encoder: nn.Module, bank: Images, test: Images, size: int) -> float:
    """kNN accuracy on the test images, in percent."""
    h, h_test = (extract_features(encoder, images, size) for images in (bank, test))
    return accuracy(knn_predict(h, bank.labels, h_test), test.labels)


# --------------------------------------------------------------------------------------
# What a run prints and leaves
# --------------------------------------------------------------------------------------


def progress(items: Iterable, description: str, total: int | None = None) -> Iterable:
    """The items with a progress bar, on the terminal of each machine's first process."""
    return tqdm(items, desc=description, total=total, leave=False, disable=not sys.stderr.isatty())


def spread(z: Tensor) -> float:
    """How far embeddings z [N, D] fill the sphere: about 1 if they do, 0 if all are equal."""
    return F.normalize(z.detach(), dim=1).std(0).mean().item() * z.shape[1] ** 0.5


def describe(row: dict, warmup_epochs: float = 0.0) -> str:
    """The metrics of an epoch, or a row of the results, as one line; and what looks wrong."""
    parts = []
    for name, value in row.items():
        if isinstance(value, float):
            value = f"{value:.0f}" if value > 1000 else f"{value:.4g}"
        parts.append(f"{name} {value:<7}")
    if row.get("spread", 1) < 0.1:
        parts.append("warning: the embeddings collapse: use a lower --lr or a longer warm-up")
    elif row.get("epoch", 0) > warmup_epochs + 1 and row["loss"] > 0.997 * row["chance"]:
        parts.append("warning: the loss stays at chance: use another --lr, and look at views.png")
    return " ".join(parts).rstrip()


def load_run(args: argparse.Namespace, images: Images) -> dict | None:
    """The last checkpoint of the run in args.out, or None if the run is new.

    The flags and images must be those with which it began, except that it may get more epochs.
    """
    path = args.out / "checkpoint.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    epochs = len(saved["rows"]) if saved else 0
    args.images = images.identity
    if len(set(gather_object([(epochs, args.images)]))) > 1:
        fail(f"the processes see different images, or runs in --out {args.out}: share the folders")
    before = saved.get("flags", {}) if saved else {}  # Runs of earlier versions have none.
    args.run_id = before.get("run_id", secrets.token_hex(4))
    if saved:
        now = vars(args)
        changed = [name for name in now if now[name] != before.get(name) and name not in IGNORED]
        if changed or args.epochs < epochs:
            was = "; ".join(f"{name} was {before.get(name)}" for name in changed) or "more --epochs"
            fail(f"--out {args.out} holds another run ({was}): repeat its command or change --out")
        jump = "; the learning rate jumps to where the new schedule stands"
        jump = jump if args.epochs != before["epochs"] else ""
        PartialState().print(f"continuing after epoch {epochs} of {args.epochs}{jump}")
    if PartialState().is_main_process:
        with atomic_write(args.out / "config.json") as file:
            file.write_text(json.dumps(vars(args), indent=1, default=str))
    return saved


def save_run(
    args: argparse.Namespace, rows: list[dict], encoder: nn.Module | None, **state: object
) -> None:
    """Write metrics.jsonl, encoder.safetensors and checkpoint.pt; by the main process."""
    if not PartialState().is_main_process:
        return
    with atomic_write(args.out / "metrics.jsonl") as file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if encoder:
        about = {"architecture": args.arch, "stem": args.stem, "image_size": args.image_size}
        save_encoder(args.out / "encoder.safetensors", encoder, **about, data=args.data)
    flags = vars(args) | {"out": str(args.out)}
    buffer = io.BytesIO()  # If the disk is full, torch.save would not say so.
    torch.save({"flags": flags, "rows": rows, **state}, buffer)
    with atomic_write(args.out / "checkpoint.pt") as file:
        file.write_bytes(buffer.getbuffer())


def start_trackers(accelerator: Accelerator, method: str, args: argparse.Namespace) -> None:
    """Begin the curves of a run with the tracker of --log-with, or continue them."""
    accelerator.project_configuration.logging_dir = str(args.out)
    flags = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(args).items()}
    accelerator.init_trackers(method, flags, {"wandb": {"id": args.run_id, "resume": "allow"}})


def finish(
    args: argparse.Namespace, encoder: nn.Module, bank: Images | None, test: Images | None
) -> None:
    """Evaluate the encoder, an untrained one and raw pixels; print and write the results."""
    state = PartialState()
    if test is None:
        state.print("there are no labeled test images, so there is no accuracy")
        return
    torch.manual_seed(args.seed)
    untrained = build_encoder(args.arch, args.stem).to(bank.device)
    networks = {"trained": encoder, "untrained": untrained}
    if len(bank) < 300_000:  # The pixels of more would take too much memory.
        networks["raw pixels"] = nn.Flatten()
    rows = []
    for features, network in progress(networks.items(), "evaluation"):
        size = args.image_size if features != "raw pixels" else min(32, args.image_size)
        x, x_test = (extract_features(network, images, size) for images in (bank, test))
        votes = knn_predict(x, bank.labels, x_test)
        logits = linear_probe(x, bank.labels, x_test, args.seed)
        scores = {"kNN": accuracy(votes, test.labels), "linear": accuracy(logits, test.labels)}
        rows.append({"features": features} | scores)
    error = 196 * math.sqrt(0.25 / len(test))  # at most: 1.96 standard errors of a share of 1/2
    state.print(f"accuracy on {len(test)} test images in percent, ± {error:.1f}; kNN: K 20, T 0.07")
    state.print("\n".join(describe(row) for row in rows))
    if state.is_main_process:
        with atomic_write(args.out / "results.json") as file:
            file.write_text(json.dumps(rows, indent=1))


def save_pictures(path: Path, images: Tensor, columns: int) -> None:
    """Save a grid of images [N, 3, S, S] in 0..1, small ones enlarged; by the main process."""
    if PartialState().is_main_process:
        images = F.interpolate(images.cpu(), scale_factor=max(1, 84 // images.shape[3]))
        with atomic_write(path) as file:
            torchvision.utils.save_image(images, file, nrow=columns, pad_value=1)


def save_views(path: Path, images: Images, index: Tensor, views: list[Tensor]) -> None:
    """Save up to eight images of a batch (first row), and the views that the network is shown."""
    size = views[0].shape[-1]
    scale, shift = scale_and_shift(torch.device("cpu"))
    shown = [next(middles(images, index[:8], size)).cpu()]
    for same_size in views:
        shown += [F.interpolate((view[:8].cpu() - shift) / scale, size) for view in same_size]
    save_pictures(path, torch.cat(shown), len(index[:8]))
