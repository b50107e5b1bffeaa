"""Data and evaluation for the scripts beside it. Each script holds the rest.

Sections: errors, files and processes; command line; image operations; image sets and batches;
encoders; evaluation; console and pictures.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import textwrap
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import psutil
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    tqdm,
)
from PIL import Image, ImageColor, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

# The names that --data knows, and torchvision's class of each.
SETS = {
    "fashion-mini": "FashionMNIST",
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
}
# All ResNets of torchvision. Sorting by length puts resnet18 first, ahead of resnet101.
RESNETS = sorted(
    torchvision.models.list_models(torchvision.models, include=["resn*", "wide_resn*"]), key=len
)
ARCHITECTURES = ("small", *RESNETS)  # small: five convolutions, for very small images
# Mean and standard deviation of the three channels, with which an encoder's inputs are normalized.
STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # The inputs stay in 0..1.
}
# The weight decays that a linear probe tries, from the strongest to the weakest.
PROBE_DECAYS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
MAX_IMAGE_BYTES = 8 * 2**30  # of the image files of a split that are kept on the device
# The pictures that the scripts write beside config.json or eval.json. They are not training images.
PICTURES = ("views.png", "prototypes.png", "map.png", "features.png", "neighbours.png")
MAY_DIFFER = ("root", "workers", "out")  # flags that may differ between machines
KNN_K = 20  # neighbors that vote in the evaluation, or all images if there are fewer
KNN_TEMPERATURE = 0.07
# A probe on raw pixels is trained on at most this many numbers: images times 3 * side^2.
MAX_PIXEL_FEATURES = 2**30


# --------------------------------------------------------------------------------------
# Errors, files and processes
# --------------------------------------------------------------------------------------


def report(message: str, every_process: bool = False) -> None:
    """Print a message to stderr as one line that begins with "error:".

    Args:
        message: what happened, and what to do.
        every_process: print it on every process that comes here. Otherwise the first process of
            each machine speaks for all of them.
    """
    # Accelerate may not have started yet, so the launcher's own variable is read.
    if every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        line = " ".join(message.splitlines())
        sys.stderr.write(f"error: {line}\n")  # at once, since several processes may write
        sys.stderr.flush()


def fail(message: str, every_process: bool = False) -> NoReturn:
    """End the program because of something that the user can fix.

    Args:
        message, every_process: what to print; see `report`.

    Raises:
        SystemExit: always, with code 2.
    """
    report(message, every_process)
    raise SystemExit(2)


@contextmanager
def entry_point(advice: str) -> Iterator[None]:
    """Surround the main function of a script that is started from the command line.

    Ctrl-C ends the program with one line of advice instead of a traceback, and a lack of memory
    with one line as well. At the end, the process group is destroyed, except after a failure with
    NCCL, which would wait for the other processes.
    """
    failure = None
    try:
        yield
    except (SystemExit, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        failure = explain(error, advice)
        if failure is None:
            raise
        traceback.clear_frames(error.__traceback__)  # Their local variables refer to DDP.

    # DDP refers to the process group. Some runs abort at their end if it outlives the group, so it
    # is deleted first.
    gc.collect()
    group_exists = torch.distributed.is_initialized()
    if group_exists and (failure is None or torch.distributed.get_backend() == "gloo"):
        torch.distributed.destroy_process_group()
    if failure:
        raise failure


def explain(error: BaseException, advice: str) -> SystemExit | None:
    """Print one line on an error that the user can fix.

    Returns:
        The exit to raise, or None for any other error.
    """
    if isinstance(error, SystemExit):  # The line was printed before.
        return error
    if isinstance(error, KeyboardInterrupt):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\ninterrupted: {advice}", file=sys.stderr, flush=True)
        return SystemExit(128 + signal.SIGINT)
    # Torch raises this error in a signal handler, so it can come from any line.
    if "DataLoader worker (pid" in str(error):
        report(
            "a data-loading process was killed, probably out of memory: use fewer --workers, or, "
            "in a container, more shared memory (docker run --shm-size 8g)",
            every_process=True,
        )
        return SystemExit(2)
    problem = memory_problem(error)
    if problem is None:
        return None
    report(
        f"there is not enough memory ({problem:.150}): use smaller images, a smaller batch or a "
        "smaller network",
        every_process=True,
    )
    return SystemExit(2)


def memory_problem(error: BaseException) -> str | None:
    """The line of an error which says that memory ran out, of the host or of a device."""
    if isinstance(error, MemoryError):
        return str(error).partition("\n")[0] or repr(error)
    # The last two are of tensors that are larger than any memory.
    phrases = ("can't allocate memory", "out of memory", "size calculation", "multiplication over")
    for line in str(error).splitlines():
        if any(phrase in line for phrase in phrases):
            return line.rpartition("Allocator: ")[2]  # without torch's file and line
    return None


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, which replaces `path` when the block has succeeded.

    So nobody reads half a file, and after an error or a kill the old file is still there. Only one
    process may write a file at a time.
    """
    path = Path(path)
    temporary = path.with_name(f".partial-{path.name}")  # some writers need to see the suffix
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, and create its folder where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(json.dumps(value, indent=1))
    except OSError as error:
        fail(f"{path} cannot be written ({error}): free some space, or choose another --out")


def read_json(path: Path) -> object:
    """The content of a JSON file that one of the scripts wrote."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}): delete it or choose another --out")


def read_checkpoint(path: Path) -> dict:
    """The checkpoint of a run, with its tensors on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file can raise almost any exception.
        if memory_problem(error):  # The file is not to blame.
            raise
        fail(f"{path} cannot be read ({error!r:.200}): if it is damaged, delete it to start over")


def save_arrays(path: Path, arrays: dict[str, Tensor]) -> None:
    """Write tensors to an .npz file; by the main process."""
    if not PartialState().is_main_process:
        return
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: value.cpu().numpy() for name, value in arrays.items()})
    except OSError as error:
        fail(f"{path} cannot be written ({error}): free some space and repeat the command")


def generator(*key: int) -> torch.Generator:
    """A random generator on the CPU that is a function of integers such as (seed, epoch, step)."""
    # Without the length, SeedSequence would not tell (1,) from (1, 0).
    entropy = np.random.SeedSequence((len(key), *key))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def start_accelerator(log_with: str | None = None, folder: Path | None = None) -> Accelerator:
    """Start Accelerate in the mode that its launcher chose, and tune threads and memory on CPUs.

    Args:
        log_with: an experiment tracker.
        folder: where the tracker writes files.

    Raises:
        SystemExit: if the launcher asks for what the scripts do not support. The message is one
            line.
    """
    refuse_other_modes()
    # One process may download a data set while the others wait for it.
    group_options = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(
        log_with=log_with, project_dir=folder, kwargs_handlers=[group_options]
    )
    check_number_of_processes(accelerator)
    if accelerator.device.type == "cpu":
        use_all_cores()
        keep_freed_memory()
    return accelerator


def refuse_other_modes() -> None:
    """Fail on modes of Accelerate in which the scripts would be wrong.

    A loss that compares the images of a whole batch cannot accumulate gradients, and the scaler of
    fp16 would be missing in checkpoints. The launcher passes the modes, also those of the user's
    configuration file, as environment variables. Accelerate itself would end in a traceback if,
    say, DeepSpeed is not installed.
    """
    found = []
    for mode in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{mode}", "").lower() == "true":
            found.append(mode)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        found.append(f"mixed precision {precision}")
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        found.append("gradient accumulation")
    if found:
        fail(
            f"Accelerate was asked for {', '.join(found)}, which is not supported: use CPUs, one "
            "GPU or several GPUs (--multi_gpu), in float32 or with --mixed_precision bf16"
        )


def check_number_of_processes(accelerator: Accelerator) -> None:
    """Refuse to run on fewer processes than the user asked for.

    `accelerate launch --num_processes 2` silently starts a single process with --cpu, on a machine
    with fewer than two GPUs, or if the user's configuration file names no distributed mode. It sets
    the address at which several processes would meet, but not how many they are.
    """
    asked_for = int(os.environ.get("WORLD_SIZE", 1))
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        asked_for = 2  # or more
    if asked_for > accelerator.num_processes:
        fail(
            "several processes were asked for, but only one was started: on several GPUs, use "
            "accelerate launch --multi_gpu; on CPUs, ACCELERATE_USE_CPU=true torchrun "
            "--nproc_per_node N SCRIPT; for a single process, unset MASTER_ADDR"
        )


def local_processes() -> int:
    """How many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def use_all_cores() -> None:
    """Divide the cores among a launcher's processes, which it gives one thread each by default.

    A number above one that the user has set is kept.
    """
    # These variables are set by accelerate launch and by torchrun.
    is_launched = bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ))
    if is_launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, available_cores() // local_processes()))


def keep_freed_memory() -> None:
    """Keep freed memory for the next step.

    By default glibc returns large blocks to the system when they are freed. Asking for them anew at
    every step costs a tenth of the time.
    """
    M_TRIM_THRESHOLD = -1  # from glibc's malloc.h
    M_MMAP_MAX = -4
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # Never shrink the heap.
        libc.mallopt(M_MMAP_MAX, 0)  # Take large blocks from the heap, too.


def on_main_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function on the main process only, and give its result to all processes.

    On several machines, perhaps only the main process can see the files of a run. If the function
    fails there, all processes end.
    """
    result = None
    code = None
    if PartialState().is_main_process:
        try:
            result = function(*arguments)
        except SystemExit as exit_:
            code = exit_.code
        except (MemoryError, RuntimeError) as error:
            if explain(error, advice="") is None:
                raise
            code = 2
    result, code = broadcast_object_list([result, code])
    if code is not None:
        raise SystemExit(code)
    return result


def check_agreement(settings: dict) -> None:
    """Fail if the processes were not all started with the same flags and images."""
    differing = set()
    for others in gather_object([settings]):
        differing |= {name for name in settings if others[name] != settings[name]}
    differing -= set(MAY_DIFFER)
    if differing:
        fail(
            f"the machines do not agree on {', '.join(sorted(differing))}: start the same command "
            "on each, with the same images"
        )


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every flag that has one, and keeps the lines of the epilog."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.dest == "help":
            return action.help
        return f"{action.help} (default: %(default)s)"


def number(kind: type, low: float, high: float, meaning: str) -> Callable[[str], float]:
    """A type for argparse: a number of a kind, int or float, from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not {meaning}") from None
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is too large: it can be at most {high}")
        if not value >= low:  # This is also true of NaN.
            raise argparse.ArgumentTypeError(f"{text} is not {meaning}")
        return value

    return parse


TINY, HUGE = 1e-30, 10**9
positive_int = number(int, 1, HUGE, "a whole number of at least 1")
nonnegative_int = number(int, 0, 2**63 - 1, "a whole number of at least 0")
int_above_1 = number(int, 2, HUGE, "a whole number of at least 2")
positive_float = number(float, TINY, 1e30, "a number above 0")
nonnegative_float = number(float, 0, HUGE, "a number of at least 0")
positive_fraction = number(float, TINY, 1, "a number above 0 and at most 1")
fraction = number(float, 0, 1, "a number from 0 to 1")


def add_data_arguments(parser: argparse.ArgumentParser, data: str | None = "fashion-mini") -> None:
    """Add the flags that say which images are used; `data` is the default of --data."""
    data_help = f"{', '.join(SETS)}, a folder of images, or an .npz file of arrays"
    if data is None:
        data_help += " (default: what the encoder was trained on; fashion-mini for random)"

    add = parser.add_argument_group("data").add_argument
    add("--data", default=data, help=data_help)
    add(
        "--root",
        default="data",
        help="folder of torchvision's data sets, which are downloaded to it if they are missing",
    )
    add(
        "--limit",
        type=positive_int,
        help="use a subset of this many training images, the same for all seeds",
    )
    add(
        "--stream",
        action="store_true",
        help="read image files whenever they are needed, even if they would fit in memory",
    )
    add(
        "--workers",
        type=positive_int,
        help="processes that read image files, for each process that trains (default: its share of "
        "the cores, at most 16)",
    )


def add_preset_argument(parser: argparse.ArgumentParser, presets: dict[str, dict]) -> None:
    """Add --preset, and to the end of --help the defaults that each preset gives."""
    parser.add_argument(
        "--preset",
        choices=presets,
        help="set of defaults for the other flags, see below (default: chosen by the size and the "
        "number of images)",
    )
    parser.epilog = "\n".join(describe_preset(name, presets[name]) for name in presets)


def choose_preset(data: str, side: int, num_images: int) -> str:
    """Name the preset for images of a kind.

    Args:
        data: the value of --data.
        side: of the views, in pixels.
        num_images: how many there are to train on.
    """
    if data == "fashion-mini":
        return data
    if side <= 64:
        return "small"
    return "photos" if num_images <= 100_000 else "paper"


def default_batch_size(num_images: int) -> int:
    """A power of two that leaves 64 to 127 steps in an epoch, but from 32 to 256.

    In a small set, larger batches would leave too few steps to learn from. Sets of fewer than 32
    images get the largest power of two that they can fill.
    """
    largest = 2 ** (num_images.bit_length() - 1)  # the largest power of two up to num_images
    return min(largest, max(32, min(256, largest // 64)))


def describe_preset(name: str, defaults: dict) -> str:
    """One line on a preset: the data that it is for, and the defaults that it gives."""
    kind = {
        "fashion-mini": "the bundled images",
        "small": "small images, up to 64 pixels",
        "photos": "larger images in a set of up to 100,000",
        "paper": "large sets, as in the paper",
    }[name]
    flags = []
    for flag, value in defaults.items():
        values = value if isinstance(value, list) else [value]
        flags.append(" ".join([f"--{flag.replace('_', '-')}", *map(str, values)]))
    return f"defaults for {kind} (--preset {name}): {' '.join(flags) or 'none that differ'}"


def check_batch_size(batch_size: int, available: int, processes: int, what: str = "images") -> None:
    """Fail if a batch is larger than what is available, or the processes cannot share it."""
    if available < 2:
        fail(f"there are too few {what} ({available}): use at least two")
    if batch_size > available:
        fail(
            f"--batch-size {batch_size} is more than the {available} {what} there are: use at most "
            f"{available}"
        )
    if batch_size % processes:
        fail(
            f"--batch-size {batch_size} must be a multiple of {processes}, the number of processes"
        )


def check_chunk_size(chunk_size: int | None, own_images: int) -> None:
    """Fail if the images that a process has of a batch do not fill whole chunks."""
    if chunk_size and own_images % chunk_size:
        fail(
            f"--chunk-size {chunk_size} must divide {own_images}, the images of a batch on each "
            "process"
        )


# --------------------------------------------------------------------------------------
# Image operations
#
# They work on batches x [B, C, H, W] with C = 1 or 3. Crops take uint8 or float32; the other
# operations take float32 in 0..1, and may overwrite it. draw(n, rng) gives the parameters of n
# images as CPU tensors with n rows, distributed as in torchvision's transform of the same name.
# Called with them, an operation gives what torchvision gives for each image.
# --------------------------------------------------------------------------------------


def to_device_of(x: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of x, without waiting for a CUDA device."""
    return value.to(x.device, non_blocking=x.is_cuda)


def grayscale(x: Tensor) -> Tensor:
    """The luma of x in each of its channels."""
    return TF.rgb_to_grayscale(x, x.shape[-3])


class RandomResizedCrop(NamedTuple):
    """A crop of random area and aspect ratio, resized to a square, mirrored with p = `flip`."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Draw the numbers that choose the boxes and flips of n images.

        Returns:
            scale and ratio [n, 10], for ten tries, and top and left [n, 1], all uniform in 0..1;
            and flip [n], bool.
        """
        uniform = torch.rand(n, 22, generator=rng)
        scale, ratio, top, left = uniform.split([10, 10, 1, 1], dim=1)
        flip = torch.rand(n, generator=rng) < self.flip
        return scale, ratio, top, left, flip

    def boxes(
        self,
        scale: Tensor,
        ratio: Tensor,
        top: Tensor,
        left: Tensor,
        height: Tensor | int,
        width: Tensor | int,
    ) -> Tensor:
        """The boxes that the drawn numbers choose in images of given sizes.

        As in torchvision, the first of ten tries that fits into the image counts. If none does,
        the box is the middle of the image, with the nearest allowed aspect ratio.

        Args:
            scale, ratio, top, left: what `draw` gave: numbers in 0..1, not yet areas and pixels.
            height, width: of the images, one number or [n].

        Returns:
            [n, 4] integers: top, left, height and width.
        """
        height = torch.as_tensor(height).expand(len(top))[:, None]
        width = torch.as_tensor(width).expand(len(top))[:, None]
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * scale)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + (high - low) * ratio)
        w = (area * aspect).sqrt().round()
        h = (area / aspect).sqrt().round()

        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        found = fits.any(1, keepdim=True)
        first = fits.int().argmax(1, keepdim=True)
        nearest = (width / height).clamp(*self.ratio)
        h = torch.where(found, h.gather(1, first), (width / nearest).round().minimum(height))
        w = torch.where(found, w.gather(1, first), (height * nearest).round().minimum(width))

        # The product may be rounded up to one pixel too many: hence the minimum.
        random_y = (top * (height - h + 1)).floor().minimum(height - h)
        random_x = (left * (width - w + 1)).floor().minimum(width - w)
        y = torch.where(found, random_y, (height - h) // 2)
        x = torch.where(found, random_x, (width - w) // 2)
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
        """Resize crops of which none is larger than the result.

        Each new pixel is a weighted mean of the four old ones around its center.

        Args:
            x: [B, C, H, W].
            start, length: [B, 1, 2], of the boxes' rows and columns.
            centers: [B, size, 2], of the new rows and columns, in old pixels.
        """
        rows, columns = centers.clamp(start + 0.5, start + length - 0.5).unbind(2)
        vertical = rows * (2 / x.shape[2]) - 1  # grid_sample counts from -1 to 1
        horizontal = columns * (2 / x.shape[3]) - 1
        grid = torch.broadcast_tensors(horizontal[:, None, :], vertical[:, :, None])
        white = 255 if x.dtype == torch.uint8 else 1
        return F.grid_sample(x / white, torch.stack(grid, dim=3), align_corners=False)

    def _shrink(self, x: Tensor, start: Tensor, length: Tensor, centers: Tensor) -> Tensor:
        """Resize crops of any sizes by two matrix products; see `_enlarge` for the arguments.

        Each new pixel is a weighted mean of all old ones that it covers.
        """
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
        """x [..., H, W] to [..., size, size] of the same type."""
        share = 1 if self.size <= 64 else 224 / 256
        side = round(min(x.shape[-2:]) * share)
        return TF.resize(TF.center_crop(x, [side]), [self.size, self.size])

    def cut(self, image: Tensor) -> Tensor:
        """The same for one image [3, H, W]."""
        return self(image)


class ColorJitter(NamedTuple):
    """Brightness, contrast, saturation and hue, in an order of its own for each image."""

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """factors [n, 4], three around 1 and the shift of the hue; order [n, 4], of the four."""
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0])
        strength = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        low = torch.maximum(middle - strength, torch.tensor([0.0, 0.0, 0.0, -0.5]))
        factors = low + (middle + strength - low) * torch.rand(n, 4, generator=rng)
        order = torch.rand(n, 4, generator=rng).argsort(1)
        return factors, order

    def __call__(self, x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """x [B, C, H, W] with the adjustments made, in place."""
        CONTRAST, SATURATION, HUE = 1, 2, 3  # brightness is 0
        for turn in order.unbind(1):  # the adjustment [B] that is each image's next one
            factor = to_device_of(x, factors.gather(1, turn[:, None]))[..., None, None]
            hue_rows = to_device_of(x, (turn == HUE).nonzero()[:, 0])
            shifted = x.index_select(0, hue_rows)
            if x.shape[1] == 3:
                shifted = self.shift_hue(shifted, factor[hue_rows, 0])

            # The other three mix the image with a gray one: black, its mean, or its luma. This
            # spoils the images whose hue was shifted, which are put back at the end.
            kind = to_device_of(x, turn)[:, None, None, None]
            luma = TF.rgb_to_grayscale(x, 1)
            mean = luma.mean((2, 3), keepdim=True)
            gray = luma * (kind == SATURATION) + mean * (kind == CONTRAST)
            torch.lerp(gray, x, factor, out=x).clamp_(0, 1)
            x[hue_rows] = shifted
        return x

    @staticmethod
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
        return band[:, None] @ (x.flatten(1, 2) @ band.mT).view_as(x)


class RandomApply(NamedTuple):
    """Another operation, or a plain function of x, on each image with probability p."""

    operation: Callable[..., Tensor]
    p: float

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """chosen [n], bool, and the parameters of the operation."""
        parameters = self.operation.draw(n, rng) if hasattr(self.operation, "draw") else ()
        chosen = torch.rand(n, generator=rng) < self.p
        return chosen, *parameters

    def __call__(self, x: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
        """x [B, C, H, W] with the chosen images changed, in place."""
        rows = chosen.nonzero()[:, 0]  # on the CPU, where its size is known without waiting
        there = to_device_of(x, rows)
        changed = self.operation(x.index_select(0, there), *[v[rows] for v in parameters])
        return x.index_copy_(0, there, changed)


# --------------------------------------------------------------------------------------
# Image sets and batches
# --------------------------------------------------------------------------------------

Recipes = Sequence[tuple[int, Sequence]]  # pairs: the number of views, their operations


@dataclass
class ViewPlan:
    """How `count` views of each of a step's B images are made."""

    count: int
    operations: Sequence  # the first one is a crop
    parameters: Sequence[tuple[Tensor, ...]]  # of each operation, tensors of count * B rows


@dataclass
class StepPlan:
    """What a step shows: the images, by their index [B], and how their views are made."""

    index: Tensor
    views: list[ViewPlan]


class ImageSet(ABC):
    """Base class of images in memory and of image files.

    Attributes:
        labels: [N] classes, -1 where there is none.
        classes: the names of the classes.
        fingerprint: text that changes when the list of images changes.
        waited: seconds spent waiting for files since it was last set to 0.
    """

    labels: Tensor
    classes: Sequence[str] = ()
    fingerprint: str = ""
    waited: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """The default size of views: the shorter side of the first image, at most 224."""
        return min(224, *self.first().shape[1:])

    def centers(self, index: Tensor, size: int) -> Tensor:
        """The middle squares of the images `index` [n], as [n, 3, size, size] float32."""
        _, (x,) = next(self.load(partial(center_plan, [index], size), [0]))
        return x.expand(-1, 3, -1, -1)

    @abstractmethod
    def first(self) -> Tensor:
        """The first image, [C, H, W] uint8."""

    @abstractmethod
    def take(self, index: Tensor) -> "ImageSet":
        """The images `index` [n] as a set of their own."""

    @abstractmethod
    def load(
        self, plan_of: Callable[[int], StepPlan], steps: Sequence[int]
    ) -> Iterator[tuple[StepPlan, list[Tensor]]]:
        """Make the crops of several steps.

        Args:
            plan_of: gives the plan of a step.
            steps: the numbers of the steps.

        Yields:
            The plan of each step, and for each of its views the first operation's result: crops
            [count * B, C, size, size], float32 in 0..1, on the device.
        """


@dataclass
class ImagesInMemory(ImageSet):
    """Images of one size, kept on the device as uint8 [N, C, H, W] with C = 1 (gray) or 3."""

    pixels: Tensor
    labels: Tensor
    classes: Sequence[str] = ()
    fingerprint: str = ""

    def first(self) -> Tensor:
        return self.pixels[0]

    def take(self, index: Tensor) -> "ImagesInMemory":
        pixels = self.pixels[to_device_of(self.pixels, index)]
        return replace(self, pixels=pixels, labels=self.labels[index])

    def load(
        self, plan_of: Callable[[int], StepPlan], steps: Sequence[int]
    ) -> Iterator[tuple[StepPlan, list[Tensor]]]:
        for step in steps:
            plan = plan_of(step)
            crops = []
            for view in plan.views:
                index = to_device_of(self.pixels, plan.index.repeat(view.count))
                # index_select is ten times as fast as pixels[index] on a CPU.
                x = view.operations[0](self.pixels.index_select(0, index), *view.parameters[0])
                crops.append(x if x.dtype == torch.float32 else x / 255)
            yield plan, crops


@dataclass
class ImageFiles(ImageSet):
    """Image files of any sizes, which processes read ahead of use, each time they are needed."""

    paths: np.ndarray
    labels: Tensor
    device: torch.device  # where the crops are wanted
    workers: int
    classes: Sequence[str] = ()
    fingerprint: str = ""

    def first(self) -> Tensor:
        try:
            return read_image(self.paths[0])
        except OSError as error:
            fail(str(error))

    def take(self, index: Tensor) -> "ImageFiles":
        return replace(self, paths=self.paths[index.numpy()], labels=self.labels[index])

    def load(
        self, plan_of: Callable[[int], StepPlan], steps: Sequence[int]
    ) -> Iterator[tuple[StepPlan, list[Tensor]]]:
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            CropReader(self.paths, plan_of),
            batch_size=None,
            sampler=steps,
            # A single step is read here, since starting a process would take longer.
            num_workers=max(0, min(self.workers, len(steps) - 1)),
            pin_memory=on_gpu,
        )
        reader = iter(loader)
        for step in steps:
            began = time.monotonic()
            crops, error = next(reader)
            self.waited += time.monotonic() - began
            fail_together(error, self.device)
            crops = [crop.to(self.device, non_blocking=on_gpu) for crop in crops]
            # Drawing the plan again is cheaper than sending it from the other process.
            yield plan_of(step), [crop.float().div_(255) for crop in crops]


class CropReader(Dataset):
    """Maps the number of a step to its crops as uint8, and "" or what went wrong."""

    def __init__(self, paths: np.ndarray, plan_of: Callable[[int], StepPlan]) -> None:
        self.paths = paths
        self.plan_of = plan_of

    def __getitem__(self, step: int) -> tuple[list[Tensor], str]:
        plan = self.plan_of(step)
        n = len(plan.index)
        crops = []  # of each recipe; row v * n + i is view v of image i
        for view in plan.views:
            size = view.operations[0].size
            crops.append(torch.empty(view.count * n, 3, size, size, dtype=torch.uint8))
        try:
            for i, path in enumerate(self.paths[plan.index.numpy()]):
                image = read_image(path)  # once for all of its views
                for view, out in zip(plan.views, crops, strict=True):
                    rows = [values[i::n] for values in view.parameters[0]]
                    out[i::n] = view.operations[0].cut(image, *rows)
        except OSError as error:
            # Raised here, it would reach the main process in a long traceback.
            return [], str(error)
        return crops, ""


def fail_together(error: str, device: torch.device) -> None:
    """Fail if `error` is not empty, here or, on CPUs, on any process.

    On CPUs all processes stop together. On GPUs, asking the others would mean waiting for the
    device at every step. There one process fails, and the launcher ends the others.
    """
    on_gpu = device.type == "cuda"
    if PartialState().num_processes > 1 and not on_gpu:
        errors = [text for text in gather_object([error]) if text]
        error = errors[0] if errors else ""
    if error:
        fail(error, every_process=on_gpu)


def read_image(path: str) -> Tensor:
    """Read a file as RGB, turned as its EXIF data say.

    Returns:
        [3, H, W] uint8.

    Raises:
        OSError: if it cannot be read, with a line that names the file and what to do.
    """
    try:
        with Image.open(str(path)) as image:
            if image.mode[0] in "IF":  # whole numbers or floats, which convert() would clip to 255
                raise ValueError("it has more than 8 bits per channel")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise almost any exception.
        reason = str(error) or type(error).__name__
        raise OSError(f"{path} cannot be read ({reason}): repair, convert or remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_splits(
    data: str,
    root: str,
    limit: int | None,
    device: torch.device,
    workers: int | None = None,
    stream: bool = False,
    holdout: int | None = None,
) -> tuple[ImageSet, ImageSet | None, ImageSet | None, ImageSet | None]:
    """Load the images of --data.

    Args:
        data: a name of SETS; or a folder: with train/ and val/ or test/ (val/ counts if there are
            both), which hold one folder per class; or with images anywhere in it, which then have
            no classes; or an .npz file, see `_read_arrays`.
        root: where torchvision's data sets are, or are downloaded to.
        limit: keep the first `limit` training images of a fixed shuffle.
        device: where the images are kept.
        workers: processes (or threads) that read files; by default one per core, at most 16.
        stream: read files whenever they are needed. Otherwise files of one size are read at once,
            by every process, if those of a split fit into `memory_limit`. Named sets and .npz files
            are always kept in memory.
        holdout: set the last `holdout` labeled training images of the fixed shuffle aside.

    Returns:
        The images to pretrain on; the labeled training images, which are the same except for stl10;
        the test images; and the validation images, on which a run is evaluated while it lasts:
        those held out or, by default, the test images. The last three are None where there are no
        classes.

    Raises:
        SystemExit: with one line, if there is no such data or a file cannot be read.
    """
    if workers is None:
        workers = min(16, math.ceil(available_cores() / local_processes()))
    load = partial(_load_split, data, root, limit, holdout, device, workers, stream)
    # Machines with different images would wait for each other forever in the first evaluation.
    has_splits = _has_splits(data)
    check_agreement({"the folders of --data": has_splits})
    if not has_splits:
        if holdout:
            PartialState().print("warning: without labels, --holdout has no effect")
        images = load("all")
        check_agreement({"training images": images.fingerprint})
        return images, None, None, None
    bank = load("train")
    images = load("unlabeled") if data == "stl10" else bank
    test = load("test")
    validation = load("held-out") if holdout else test
    check_agreement({"training images": images.fingerprint, "test images": test.fingerprint})
    return images, bank, test, validation


def _has_splits(data: str) -> bool:
    """Whether --data has labeled images for training and test."""
    if data.endswith(".npz"):
        with _open_arrays(data) as file:
            return any(name in file for name in ("train_labels", "test_images", "test_labels"))
    try:
        return data in SETS or any(Path(data, name).is_dir() for name in ("train", "val", "test"))
    except OSError as error:
        fail(f"--data {data} cannot be read ({error}): check its path and its permissions")


def _load_split(
    data: str,
    root: str,
    limit: int | None,
    holdout: int | None,
    device: torch.device,
    workers: int,
    stream: bool,
    split: str,
) -> ImageSet:
    """One split of load_splits: "train", "held-out", "unlabeled", "test" or "all"."""
    part = "train" if split == "held-out" else split
    source, labels, classes = _read_source(data, part, root)
    labels = torch.as_tensor(labels).long()
    chosen = choose_images(len(labels), split, limit, holdout)
    if chosen is not None:
        source = source[chosen.numpy()]
        labels = labels[chosen]

    if source.ndim == 4:
        # Images whose pixels lie apart in memory, as stl10's, take several times as long to select.
        source = np.ascontiguousarray(source)
        pixels = torch.as_tensor(source)
    else:
        pixels = None if stream else _decode(source, workers, memory_limit())
    fingerprint = _fingerprint(data, source, labels)
    if pixels is None:
        return ImageFiles(source, labels, device, workers, classes, fingerprint)
    return ImagesInMemory(pixels.to(device), labels, classes, fingerprint)


def _read_source(
    data: str, split: str, root: str
) -> tuple[np.ndarray, Sequence[int], Sequence[str]]:
    """An array of pixels [N, C, H, W] or of paths [N], with their labels and the class names."""
    if data in SETS:
        # The first process of all downloads, and then, since machines need not share --root, the
        # first one of each other machine.
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():
            return _read_named_set(data, split, root)
    if data.endswith(".npz"):
        return _read_arrays(data, split)
    return _list_folder(data, split)


def _fingerprint(data: str, source: np.ndarray, labels: Tensor) -> str:
    """The number of images and, except for named sets, a hash of pixels and labels, or of paths."""
    count = f"{len(labels)} images"
    if data in SETS:
        return count
    if source.ndim == 4:
        content = hashlib.sha256(source)
        content.update(labels.numpy())
    else:
        content = hashlib.sha256(os.fsencode("\n".join(source)))
    return f"{count} ({content.hexdigest()[:8]})"


def choose_images(
    num_images: int, split: str, limit: int | None, holdout: int | None
) -> Tensor | None:
    """The indices of a split's images, or None if all are used in their own order.

    With --limit and --holdout, training images are taken from the start of a fixed shuffle, and
    those that are held out from its end.

    Args:
        num_images: how many there are, of all training images or of the split.
        split: see `_load_split`.
        limit, holdout: the values of the flags.
    """
    shuffled = torch.randperm(num_images, generator=generator(0))
    if split == "held-out":
        return shuffled[-holdout:]
    if split == "train" and holdout:
        if holdout >= num_images:
            fail(
                f"--holdout {holdout} leaves none of the {num_images} training images: use a lower "
                "one"
            )
        return shuffled[: min(limit or num_images, num_images - holdout)]
    if limit and split != "test":
        return shuffled[:limit]
    return None


def _read_named_set(
    name: str, split: str, root: str
) -> tuple[np.ndarray, Sequence[int], Sequence[str]]:
    """The pixels [N, C, H, W], labels and class names of a data set of torchvision."""
    kind = getattr(torchvision.datasets, SETS[name])
    if name == "fashion-mini":
        bundled = Path(__file__).resolve().parent / "data" / "fashion-mini.npz"
        try:
            with np.load(bundled) as file:
                return file[f"{split}_images"][:, None], file[f"{split}_labels"], kind.classes
        except Exception as error:  # A damaged file can raise almost any exception.
            if memory_problem(error):  # The file is not to blame.
                raise
            fail(f"the bundled {bundled} cannot be read ({error}): restore it from the repository")

    try:
        images = kind(root, split if name == "stl10" else split == "train", download=True)
    except Exception as error:  # The network or a damaged file can raise almost any exception.
        if memory_problem(error):
            raise
        fail(
            f"{name} was not found in --root {root} and could not be downloaded "
            f"({str(error) or repr(error):.300}): put its files there, or use another --data: "
            f"{', '.join(SETS)} or a folder of images"
        )
    if name == "stl10":
        return images.data, images.labels, images.classes
    pixels = np.asarray(images.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return pixels, images.targets, images.classes


@contextmanager
def _open_arrays(path: str) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an .npz file. If it cannot be read, or lacks an array that is asked for, fail."""
    try:
        with np.load(path) as file:
            yield file
    except Exception as error:  # A damaged file can raise almost any exception.
        if memory_problem(error):
            raise
        fail(
            f"--data {path} cannot be read ({error}): make it with numpy.savez, of train_images "
            "alone, or of train_images, train_labels, test_images and test_labels"
        )


def _read_arrays(path: str, split: str) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """The pixels [N, C, H, W], labels and class names of an .npz file.

    It holds train_images alone or, with labels from 0 on, train_images, train_labels, test_images
    and test_labels. Images are uint8, [N, H, W], [N, H, W, C] or [N, C, H, W], with C = 1 or 3.
    """
    part = "train" if split == "all" else split
    with _open_arrays(path) as file:
        images = file[f"{part}_images"]
        labels = np.full(len(images), -1) if split == "all" else file[f"{part}_labels"]
        classes = 0 if split == "all" else int(file["train_labels"].max()) + 1

    shape = list(images.shape)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != np.uint8:
        fail(
            f"--data {path}: {part}_images must be uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] "
            f"with C = 1 or 3, and is {images.dtype} {shape}: convert it"
        )
    if images.size == 0:
        fail(f"--data {path}: {part}_images is empty: add images")

    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        fail(f"--data {path}: {part}_labels must be a whole number for each image: convert it")
    if split != "all" and not 0 <= labels.min() <= labels.max() < classes <= HUGE:
        fail(f"--data {path}: labels must be from 0 to the highest of train_labels: convert them")
    return images, labels, [str(number) for number in range(classes)]


def _list_folder(data: str, split: str) -> tuple[np.ndarray, Sequence[int], Sequence[str]]:
    """The paths, labels and class names of a folder of images."""
    if split == "all":
        files = _find_images(data)
        if not files:
            fail(
                f"--data {data} is neither one of {', '.join(SETS)}, nor a folder with images, nor "
                "an .npz file"
            )
        return np.array(files), [-1] * len(files), ()

    parts = [Path(data, name) for name in ("train", "val", "test")]
    parts = [part for part in parts if part.is_dir()]
    if len(parts) < 2 or parts[0].name != "train":
        fail(
            f"--data {data} must have a folder train and a folder val or test, each with one "
            "folder per class (or none of the three, to train on images without classes)"
        )
    try:
        train, test = (torchvision.datasets.ImageFolder(part) for part in parts[:2])
    except OSError as error:  # no class folders, or one without images: the message says which
        reason = str(error).splitlines()[0]
        fail(f"--data {data} lacks images ({reason}): add some, or remove the empty folder")
    different = sorted({*train.classes} ^ {*test.classes})
    if different:
        fail(
            f"--data {data} must have the same class folders in both splits, but some are only in "
            f"one: {', '.join(different[:10])}"
        )
    images = test if split == "test" else train
    return np.array([path for path, _ in images.samples]), images.targets, images.classes


def _find_images(folder: str) -> list[str]:
    """All images below a folder, in order, except the pictures of runs."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            fail(f"--data {folder} cannot be read ({error}): check the permissions of its folders")

    files = []
    visited = set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()  # The order of the file system may differ between machines.
        # A link to a folder above itself would be followed forever.
        real_path = Path(path).resolve()
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        if {"config.json", "eval.json"} & set(names):  # the folder of a run
            names = [name for name in names if name not in PICTURES]
        for name in names:
            if torchvision.datasets.folder.is_image_file(name):
                files.append(str(Path(path, name)))
    return sorted(files)


def memory_limit() -> int:
    """How many bytes the image files of one split may take on the device of each process.

    It depends on what the machines have, not on what is free, so that a resumed run decides as it
    did before. It is the same on all processes. The memory limits of containers are not seen.
    """
    limit = min(MAX_IMAGE_BYTES, psutil.virtual_memory().total // (4 * local_processes()))
    device = PartialState().device
    if device.type == "cuda":
        limit = min(limit, torch.cuda.get_device_properties(device).total_memory // 4)
    return min(gather_object([limit]))


def _decode(paths: np.ndarray, workers: int, limit: int) -> Tensor | None:
    """All files as [N, 3, H, W] uint8, or None if they differ in size or exceed `limit` bytes."""
    pool = ThreadPoolExecutor(workers)
    try:
        first = read_image(paths[0])
        if len(paths) * first.numel() > limit:
            return None
        pixels = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
        # Read in parts, because every image that waits to be stored takes memory.
        parts = np.array_split(paths, math.ceil(len(paths) / 10_000))
        images = (image for part in parts for image in pool.map(read_image, part))
        for i, image in enumerate(progress(images, "reading images", len(paths))):
            if image.shape != first.shape:
                return None
            pixels[i] = image
        return pixels
    except OSError as error:
        fail(str(error))
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)  # All steps of an epoch use it. Each process that reads has its own cache.
def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order [num_images] in which an epoch goes through the images."""
    return torch.randperm(num_images, generator=generator(seed, epoch))


def draw_plan(
    num_images: int, recipes: Recipes, batch_size: int, seed: int, rows: Tensor, step: int
) -> StepPlan:
    """Draw what a step of training shows, as a function of the seed, the epoch and the step.

    Args:
        num_images: how many there are to train on.
        recipes: pairs of a number of views and their operations.
        batch_size: images per step, over all processes.
        seed: of everything that is drawn.
        rows: [B] the part of the batch that is wanted. The whole batch is drawn, so that the number
            of processes does not matter.
        step: counted from the start of the run.

    Returns:
        The plan for the images `rows` of the batch.
    """
    epoch, i = divmod(step, num_images // batch_size)
    rng = generator(seed, epoch, i)
    views = []
    for count, operations in recipes:
        parameters = []
        for operation in operations:
            # Row v * batch_size + i belongs to view v of image i.
            drawn = operation.draw(count * batch_size, rng)
            drawn = [values.unflatten(0, (count, batch_size))[:, rows] for values in drawn]
            parameters.append(tuple(values.flatten(0, 1) for values in drawn))
        views.append(ViewPlan(count, operations, parameters))
    order = epoch_order(num_images, seed, epoch)
    return StepPlan(order[i * batch_size + rows], views)


def center_plan(parts: Sequence[Tensor], size: int, step: int) -> StepPlan:
    """A plan that shows the middle of each of the images `parts[step]` [B], without randomness."""
    return StepPlan(parts[step], [ViewPlan(1, [CenterCrop(size)], [()])])


def batches(
    images: ImageSet, recipes: Recipes, batch_size: int, seed: int, start: int, stop: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The views of the steps `start` to `stop` - 1 of a training run.

    Every epoch goes through all images in an order of its own; the rest that does not fill a
    batch is left out. Each of P processes gets its own rows of every batch.

    Args:
        images: the images to train on.
        recipes: pairs of a number of views and their operations, of which the first is a crop.
        batch_size: images per step, over all processes.
        seed: of everything that is drawn.
        start, stop: the first step, and the one after the last.

    Yields:
        index [B] of the images, with B = batch_size / P, and for each recipe the views
        [count, B, 3, size, size], float32 in 0..1.
    """
    state = PartialState()
    rows = torch.arange(batch_size).chunk(state.num_processes)[state.process_index]
    plan_of = partial(draw_plan, len(images), recipes, batch_size, seed, rows)
    for plan, crops in images.load(plan_of, range(start, stop)):
        views = []
        for view, x in zip(plan.views, crops, strict=True):
            for operation, parameters in zip(view.operations[1:], view.parameters[1:], strict=True):
                x = operation(x, *parameters)
            views.append(x.expand(-1, 3, -1, -1).unflatten(0, (view.count, -1)))
        yield plan.index, views


# --------------------------------------------------------------------------------------
# Encoders
# --------------------------------------------------------------------------------------


def build_encoder(
    architecture: str, stem: str = "7x7", norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """A new encoder, x [B, 3, H, W] -> h [B, encoder.width].

    Args:
        architecture: "small", five convolutions, or a ResNet under torchvision's names.
        stem: of a ResNet; "3x3" is the one for small images, without max-pooling (SimCLR, B.9).
        norm_layer: makes a normalization layer for a number of channels.
    """
    if architecture == "small":
        channels = (3, 32, 32, 64, 128, 256)
        layers = []
        for i in range(5):
            stride = 2 if i % 2 == 0 else 1
            layers.append(
                torchvision.ops.Conv2dNormActivation(
                    channels[i], channels[i + 1], 3, stride, norm_layer=norm_layer
                )
            )
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoder.width = channels[-1]
        return encoder

    encoder = torchvision.models.get_model(architecture, norm_layer=norm_layer)
    if stem == "3x3":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    encoder.width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder


class Normalize(nn.Module):
    """Subtracts the mean of each channel, and divides by its standard deviation.

    Like torchvision's Normalize, but its statistics are buffers, which move to the device together
    with the network. torchvision's would copy them, and wait, for each batch.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] to the same shape."""
        return (x - self.mean) / self.std


def save_encoder(path: str | Path, encoder: nn.Module, **metadata: object) -> None:
    """Write the weights under torchvision's names as safetensors, with metadata as strings."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()
    }
    # The text of a list of numbers is also valid JSON, which is how readers parse mean and std.
    metadata = {name: str(value) for name, value in metadata.items()}
    try:
        with atomic_write(path) as file:
            # Unlike save_file, this leaves it to the user's umask who may read the file.
            file.write_bytes(safetensors.torch.save(weights, metadata))
    except OSError as error:
        fail(f"{path} cannot be written ({error}): free some space and repeat the command")


def load_encoder(
    path: str | Path, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d, **expected: str
) -> tuple[nn.Module, dict[str, str]]:
    """Load an encoder.

    Args:
        path: a file of `save_encoder`.
        norm_layer: see `build_encoder`.
        expected: metadata that the file must have, such as architecture="resnet18".

    Returns:
        The encoder, on the CPU, and its metadata.

    Raises:
        SystemExit: with one line, if it is no such file, or its metadata are not as expected.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        encoder = build_encoder(metadata["architecture"], metadata["stem"], norm_layer)
        encoder.load_state_dict(safetensors.torch.load_file(path))
    except Exception as error:  # A foreign file can raise almost any exception.
        if memory_problem(error):
            raise
        fail(
            f"{path} could not be loaded ({error!r:.200}): use an encoder.safetensors that one of "
            "these scripts has written"
        )
    if not expected.items() <= metadata.items():
        fail(
            f"{path} holds another encoder: "
            f"use --arch {metadata['architecture']} --stem {metadata['stem']}"
        )
    return encoder, metadata


def load_initial_encoder(
    path: str,
    architecture: str,
    stem: str,
    mean: Sequence[float],
    std: Sequence[float],
    norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
) -> nn.Module:
    """Load the encoder of --init, and warn if it was trained on inputs of another scale.

    Args:
        path: a file of `save_encoder`.
        architecture, stem: the values of the flags, which must be those of the file.
        mean, std: with which the inputs are normalized now.
        norm_layer: see `build_encoder`.

    Raises:
        SystemExit: see `load_encoder`.
    """
    encoder, about = load_encoder(path, norm_layer, architecture=architecture, stem=stem)
    mean = str(list(mean))
    std = str(list(std))
    trained_mean = about.get("mean", mean)
    trained_std = about.get("std", std)
    if (trained_mean, trained_std) != (mean, std):
        PartialState().print(
            "warning: the encoder of --init was trained on inputs that were normalized with mean "
            f"{trained_mean} and standard deviation {trained_std}, but this run uses {mean} and "
            f"{std}: if this script has a matching --normalize, use it"
        )
    return encoder


@torch.no_grad()
def extract_features(
    encoder: nn.Module, images: ImageSet, size: int, batch_size: int = 256
) -> Tensor:
    """The features of the images' middle squares, by the encoder in eval mode.

    The work is shared by all processes, which all get the result. The encoder's running averages
    are first set to those of the first process. DDP makes them equal only when a step begins, so on
    CPUs they differ after it.

    Args:
        encoder: x [B, 3, size, size] -> h [B, D].
        images: N of them.
        size: their side in pixels.
        batch_size: images in one forward pass.

    Returns:
        h [N, D], float32, on the device.
    """
    state = PartialState()
    was_training = encoder.training
    share = math.ceil(len(images) / state.num_processes)
    index = state.process_index * share + torch.arange(share)
    parts = index.clamp(max=len(images) - 1).split(batch_size)

    encoder.eval()
    broadcast(list(encoder.buffers()))
    loaded = images.load(partial(center_plan, parts, size), range(len(parts)))
    h = None  # allocated once and filled, since the features of a large set take gigabytes
    for i, (_, (x,)) in enumerate(progress(loaded, "features", len(parts))):
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        part = encoder(x).float()
        if h is None:
            h = part.new_empty(share, part.shape[1])
        first = i * batch_size
        h[first : first + len(part)] = part
    encoder.train(was_training)
    return gather(h)[: len(images)]  # without the last image's repetitions


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    temperature: float,
    num_classes: int | None = None,
) -> Tensor:
    """Weighted k nearest neighbors by cosine similarity (Wu et al. 2018, section 3.4).

    Args:
        bank, queries: features [M, D] and [Q, D]; they are normalized here.
        bank_labels: [M].
        k: how many neighbors vote.
        temperature: a neighbor's vote is exp(cosine / temperature).
        num_classes: by default one more than the largest label.

    Returns:
        [Q, num_classes]: the votes for each class, as shares of all votes.

    Raises:
        ValueError: if the bank has fewer than k rows.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} does not fit a bank of {len(bank)}")
    num_classes = num_classes or int(bank_labels.max()) + 1
    bank_labels = bank_labels.to(bank.device)
    lengths = bank.norm(dim=1).clamp(1e-12)  # dividing by them later saves a copy of the bank
    at_once = max(1, 2**28 // len(bank))  # 1 GiB of cosines
    scores = []
    for q in F.normalize(queries, dim=1).split(at_once):
        cosine, neighbors = (q @ bank.T).div_(lengths).topk(k, dim=1)
        votes = (cosine / temperature).softmax(1)
        empty = q.new_zeros(len(q), num_classes)
        scores.append(empty.scatter_add_(1, bank_labels[neighbors], votes))
    return torch.cat(scores)


def principal_coordinates(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardized features in the coordinates of their principal axes.

    Args:
        x, x_test: training features [N, D], which set means, deviations and axes, and test
            features [M, D].

    Returns:
        Both with K <= D columns. Axes along which the training features do not vary are left out.
    """
    mean, deviation = x.mean(0), x.std(0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0)
    x, x_test = (x - mean) * scale, (x_test - mean) * scale
    covariance = x.T @ x / len(x)
    if not x.is_cuda:  # Apple's devices lack this operation. CUDA devices are fast at it.
        covariance = covariance.cpu()
    variance, axes = torch.linalg.eigh(covariance)
    axes = axes[:, variance > 1e-6 * variance.max()].to(x.device)
    return x @ axes, x_test @ axes


def train_probe(x: Tensor, y: Tensor, W: Tensor, weight_decay: float) -> Tensor:
    """Train a linear classifier by L-BFGS.

    Args:
        x: [N, D] features in principal coordinates, and a last column of ones.
        y: labels [N].
        W: [D, C] weights to start from.
        weight_decay: half of it times the squared weights, without the biases, is added to the
            cross-entropy.

    Returns:
        [D, C] weights.
    """
    # This is about how much the loss is curved along each axis. The optimizer sees the weights in
    # units in which all axes are curved alike. Then it takes tens of steps instead of hundreds.
    curvature = x.square().mean(0)[:, None] / W.shape[1] + weight_decay
    unit = curvature.rsqrt()
    V = (W / unit).requires_grad_()  # W in these units
    optimizer = torch.optim.LBFGS(
        [V], max_iter=30, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        weights = unit * V
        loss = F.cross_entropy(x @ weights, y) + 0.5 * weight_decay * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return unit * V.detach()


def probe_folds(y: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Divide images into those that a probe is trained on and those that are held out.

    Args:
        y: labels [N].
        seed: of the division.

    Returns:
        Pairs of indices. With 5,000 images or more there is one pair, with a tenth held out; with
        fewer there are five, in which every image is held out once.
    """
    order = torch.randperm(len(y), generator=generator(seed))
    # Sorted by class, every tenth image makes a fair sample of the classes.
    order = order[y.cpu()[order].argsort(stable=True)].to(y.device)
    parts, held_out_parts = (10, 1) if len(y) >= 5000 else (5, 5)
    number = torch.arange(len(y), device=y.device) % parts
    return [(order[number != part], order[number == part]) for part in range(held_out_parts)]


def choose_decay(x: Tensor, y: Tensor, num_classes: int, seed: int) -> tuple[float, float]:
    """Choose the weight decay of a probe by its loss on held-out images; see `probe_folds`.

    Args:
        x, y: as for `train_probe`.
        num_classes: C.
        seed: of the held-out images.

    Returns:
        The best of PROBE_DECAYS, and the accuracy on held-out images with it, in percent.
    """
    folds = probe_folds(y, seed)
    weights = [x.new_zeros(x.shape[1], num_classes)] * len(folds)

    # Each decay starts from the weights of the stronger one before it. The loss falls at first.
    # When it has been above its minimum twice in a row, the weaker decays are not tried.
    losses, accuracies = [], []
    for decay in progress(PROBE_DECAYS, "linear probe"):
        logits = []
        for i, (train, held_out) in enumerate(folds):
            weights[i] = train_probe(x[train], y[train], weights[i], decay)
            logits.append(x[held_out] @ weights[i])
        labels = torch.cat([y[held_out] for _, held_out in folds])
        losses.append(F.cross_entropy(torch.cat(logits), labels).item())
        accuracies.append(accuracy(torch.cat(logits), labels))
        best = losses.index(min(losses))
        if len(losses) > best + 2:
            break
    return PROBE_DECAYS[best], accuracies[best]


def linear_probe(
    x: Tensor, y: Tensor, x_test: Tensor, num_classes: int, seed: int = 0
) -> tuple[Tensor, dict[str, float]]:
    """Logistic regression on fixed features, with the weight decay of `choose_decay`.

    Args:
        x, y: training features [N, D] and labels [N].
        x_test: test features [M, D].
        num_classes: C.
        seed: of the images that are held out to choose the decay.

    Returns:
        Logits [M, C], and the chosen "weight_decay" with the accuracy "held-out", in percent.
    """
    y = y.to(x.device)
    x, x_test = principal_coordinates(x, x_test)
    x, x_test = F.pad(x, (0, 1), value=1), F.pad(x_test, (0, 1), value=1)  # for the biases

    decay, held_out = choose_decay(x, y, num_classes, seed)
    W = train_probe(x, y, x.new_zeros(x.shape[1], num_classes), decay)
    return x_test @ W, {"weight_decay": decay, "held-out": held_out}


def accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the rows of scores [N, C] whose k largest entries contain the label."""
    top = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100 * (top == labels.to(top.device)[:, None]).any(1).float().mean().item()


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy that was measured on n images.

    It shows the uncertainty that the limited number of test images leaves (Wilson 1927). It does
    not include what another training run or another draw of labels would change.
    """
    z = 1.96  # 95 % of a normal distribution lies within this many standard deviations.
    share = percent / 100
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def summarize(accuracies: Sequence[float], n: int) -> dict:
    """The mean of accuracies and its uncertainty, all in percent.

    Args:
        accuracies: of one or several draws of labels, or seeds.
        n: how many images they were measured on.

    Returns:
        "mean"; "std", the standard deviation of the accuracies, if there are several; and
        "interval", see `wilson_interval`.
    """
    mean = sum(accuracies) / len(accuracies)
    summary = {"mean": mean}
    if len(accuracies) > 1:
        summary["std"] = statistics.stdev(accuracies)
    return summary | {"interval": wilson_interval(mean, n)}


def draw_per_class(labels: Tensor, n: float, rng: torch.Generator) -> Tensor:
    """The indices of n random images of each class or, if n is below 1, of that share of each."""
    order = torch.randperm(len(labels), generator=rng)
    order = order[labels[order].argsort(stable=True)]
    chosen = []
    for part in order.split(labels.bincount().tolist()):
        count = int(n) if n >= 1 else max(1, round(n * len(part)))
        chosen.append(part[:count])
    return torch.cat(chosen)


def knn_accuracy(encoder: nn.Module, bank: ImageSet, queries: ImageSet, size: int) -> float:
    """kNN accuracy on labeled images, in percent, with KNN_K and KNN_TEMPERATURE."""
    h = extract_features(encoder, bank, size)
    q = extract_features(encoder, queries, size)
    scores = knn_predict(h, bank.labels, q, min(KNN_K, len(bank)), KNN_TEMPERATURE)
    return accuracy(scores, queries.labels)


def score_features(
    x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, draws: Sequence[Tensor], seed: int
) -> tuple[dict, dict]:
    """Test accuracies of features by kNN and by a linear probe; see `summarize`.

    Args:
        x, y: training features [N, D] and labels [N].
        x_test, y_test: test features [M, D] and labels [M].
        draws: indices of the training images that are used. Each draw gives an accuracy.
        seed: of the linear probe.

    Returns:
        A summary for kNN, with KNN_K and KNN_TEMPERATURE, and one for the linear probe.
    """
    num_classes = int(y.max()) + 1
    knn, linear = [], []
    for i in draws:
        h = x[i.to(x.device)]
        votes = knn_predict(h, y[i], x_test, min(KNN_K, len(i)), KNN_TEMPERATURE, num_classes)
        logits, _ = linear_probe(h, y[i], x_test, num_classes, seed)
        knn.append(accuracy(votes, y_test))
        linear.append(accuracy(logits, y_test))
    return summarize(knn, len(y_test)), summarize(linear, len(y_test))


def compare_features(
    encoder: nn.Module, about: dict, bank: ImageSet, test: ImageSet, seed: int
) -> list[dict]:
    """Test accuracies of an encoder, of the same encoder untrained, and of raw pixels.

    Raw pixels are left out for large sets, because a linear probe on them would need several times
    the memory that they take as float32.

    Args:
        encoder: the trained encoder, which gets inputs with the mean and std that `about` says.
        about: the metadata of the encoder.
        bank, test: labeled training images and test images.
        seed: of the untrained encoder, the draws of labels and the linear probes.

    Returns:
        A row for each, with the accuracies of `score_features`, with all labels and, if there are
        as many, with 10 per class (5 draws).
    """
    torch.manual_seed(seed)
    untrained = build_encoder(about["architecture"], about["stem"])
    encoders = {
        about["method"]: nn.Sequential(Normalize(about["mean"], about["std"]), encoder),
        "random": nn.Sequential(Normalize(about["mean"], about["std"]), untrained),
    }
    if len(bank) * 3 * about["image_size"] ** 2 <= MAX_PIXEL_FEATURES:
        encoders["raw pixels"] = nn.Flatten()

    # The draws of training images, by what is added to the names of their columns.
    draws_by_suffix = {"": [torch.arange(len(bank))]}
    if bank.labels.bincount().min() >= 10:
        draws = [draw_per_class(bank.labels, 10, generator(seed, i)) for i in range(5)]
        draws_by_suffix[" (10 a class)"] = draws

    rows = []
    for features, network in progress(encoders.items(), "evaluation"):
        network.to(PartialState().device)
        x = extract_features(network, bank, about["image_size"])
        x_test = extract_features(network, test, about["image_size"])
        row = {"features": features}
        for suffix, draws in draws_by_suffix.items():
            knn, linear = score_features(x, bank.labels, x_test, test.labels, draws, seed)
            row[f"kNN{suffix}"] = knn
            row[f"linear{suffix}"] = linear
        rows.append(row)
    return rows


def finish(
    out: Path,
    encoder: nn.Module,
    about: dict,
    bank: ImageSet | None,
    test: ImageSet | None,
    validation: ImageSet | None,
    seed: int,
    last: dict,
    extra_columns: dict | None = None,
) -> None:
    """Evaluate the encoder at the end of a run, write results.json, and print the table.

    Args:
        out: the folder of the run.
        encoder: the trained encoder.
        about: the metadata of the encoder's file: method, architecture, stem, image_size, data, and
            the mean and std with which the inputs are normalized.
        bank, test: labeled images, or None. Views above 64 pixels are evaluated by kNN alone, since
            the rest would take longer than many runs; linear_eval.py does it.
        validation: the images of the evaluation during the run.
        seed: of the evaluation.
        last: the last row of the metrics.
        extra_columns: accuracies that only the trained encoder's row of the table has.
    """
    if bank and about["image_size"] <= 64:
        PartialState().print("evaluating features by kNN and linear probes")
        rows = compare_features(encoder, about, bank, test, seed)
    else:
        row = {"features": about["method"], "loss": last["loss"], "kNN": "-"}
        if bank:
            # The last epoch has measured it on the test images, unless others were held out.
            percent = last["knn"]
            if validation is not test:
                normalize = Normalize(about["mean"], about["std"]).to(PartialState().device)
                network = nn.Sequential(normalize, encoder)
                percent = knn_accuracy(network, bank, test, about["image_size"])
            row["kNN"] = summarize([percent], len(test))
        rows = [row]

    for name, value in (extra_columns or {}).items():
        for row in rows:
            row[name] = "-"
        rows[0][name] = value

    title = "test accuracy in percent [95 % interval]"
    if not bank:
        title = "the images have no labels, so there is no accuracy"
    write_results(out, rows, title)
    PartialState().print(f"for more: python linear_eval.py {out}/encoder.safetensors")


def write_results(out: Path, rows: list[dict], title: str) -> None:
    """Write results.json, which marks a run as finished, and print it as a table."""
    if PartialState().is_main_process:
        write_json(out / "results.json", rows)
    PartialState().print(f"{title}:\n{format_table(rows)}")


def read_results(out: Path) -> list[dict] | None:
    """The rows of results.json, or None if the run is not finished."""
    path = out / "results.json"
    if not path.exists():
        return None
    rows = read_json(path)
    if not rows or not isinstance(rows, list):
        fail(f"{path} holds no results: delete it and repeat the command")
    return rows


# --------------------------------------------------------------------------------------
# Console and pictures
# --------------------------------------------------------------------------------------

# The names of columns that differ from the keys of their metrics.
COLUMN_NAMES = {"knn": "kNN", "images_per_s": "images/s", "minutes_left": "time left"}


def progress(steps: Iterable, description: str, total: int | None = None) -> Iterable:
    """`steps` with a progress bar, on the terminal of each machine's first process."""
    return tqdm(steps, desc=description, total=total, leave=False, disable=not sys.stderr.isatty())


def spread(z: Tensor) -> float:
    """How far embeddings z [N, D] fill the sphere: about 1 if they do, 0 if all are equal.

    It is the standard deviation over the batch, averaged over the dimensions, times the square root
    of D.
    """
    return F.normalize(z.detach(), dim=1).std(0).mean().item() * z.shape[1] ** 0.5


def format_duration(minutes: float) -> str:
    """A time such as 40s, 3m20s or 2h05m."""
    seconds = round(60 * minutes)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"


def _columns(measures: Sequence[str]) -> dict[str, str]:
    """The title of each column, by the key of its metric, padded to the column's width."""
    keys = ["epoch", "loss", "chance", "spread", *measures, "images_per_s", "minutes_left"]
    names = {key: COLUMN_NAMES.get(key, key) for key in keys}
    return {key: name.rjust(max(9, len(name) + 2)) for key, name in names.items()}


def format_header(measures: Sequence[str]) -> str:
    """The names of the columns of `format_row`."""
    return "".join(_columns(measures).values())


def format_row(row: dict, measures: Sequence[str]) -> str:
    """An epoch's metrics in columns; `measures` are blank in epochs that did not measure them."""
    line = ""
    for key, name in _columns(measures).items():
        value = row.get(key, "")
        if key == "minutes_left":
            value = format_duration(value)
        elif key == "images_per_s":
            value = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
        elif isinstance(value, float):
            value = f"{value:.2f}" if key in measures else f"{value:.4f}"
        line += str(value).rjust(len(name))
    return line


def format_accuracy(summary: dict) -> str:
    """An accuracy of `summarize`, as 84.2 [83.5, 84.9] or 70.1 ± 1.2 [69.2, 71.0]."""
    std = f" ± {summary['std']:.1f}" if "std" in summary else ""
    low, high = summary["interval"]
    return f"{summary['mean']:.1f}{std} [{low:.1f}, {high:.1f}]"


def format_table(rows: Sequence[dict]) -> str:
    """Rows with the same keys as aligned text, numbers with one decimal."""
    lines = [list(rows[0])]
    for row in rows:
        cells = []
        for value in row.values():
            if isinstance(value, dict):
                value = format_accuracy(value)
            elif isinstance(value, float):
                value = f"{value:.1f}"
            cells.append(str(value))
        lines.append(cells)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def save_pictures(path: Path, images: Tensor, columns: int) -> None:
    """Save a grid of images [N, 3, S, S] in 0..1, small ones enlarged; by the main process."""
    if not PartialState().is_main_process:
        return
    enlarged = max(1, 84 // images.shape[3])  # 84 is three times the bundled images' 28
    images = F.interpolate(images.cpu(), scale_factor=enlarged)
    try:
        with atomic_write(path) as file:
            torchvision.utils.save_image(images, file, nrow=columns, pad_value=1)
    except OSError as error:
        fail(f"{path} cannot be written ({error}): free some space and repeat the command")


def save_views(path: Path, images: ImageSet, index: Tensor, views: list[Tensor]) -> None:
    """Save up to eight images of a batch (first row), and the views that the network is shown.

    Args:
        path: the picture.
        images, index: the set, and the batch's images in it, [B].
        views: one tensor [count, B, 3, S, S] per resolution.
    """
    size = views[0].shape[-1]
    shown = [images.centers(index[:8], size)]
    for same_size in views:
        shown += [F.interpolate(view[:8], size) for view in same_size]
    save_pictures(path, torch.cat(shown), len(index[:8]))


def principal_axes(x: Tensor, count: int, seed: int) -> Tensor:
    """The first principal axes of x [N, D], as [D, count].

    It is for maps, which need few of many axes, so it computes only these. `principal_coordinates`
    gives all of them.
    """
    torch.manual_seed(seed)  # pca_lowrank draws random numbers from torch's global generator.
    rank = min(max(6, count), *x.shape)  # More axes and iterations make the first ones more exact.
    _, _, axes = torch.pca_lowrank(x, rank, niter=9)
    return axes[:, :count]


def draw_map(coordinates: Tensor, images: Tensor, kinds: Tensor, side: int = 1000) -> Tensor:
    """Draw small images at their places in the plane.

    Args:
        coordinates: [N, D]; the first two dimensions are drawn, to the right and down.
        images: [N, 3, S, S] in 0..1.
        kinds: [N] integers, shown by the color of the frame.
        side: of the picture, in pixels.

    Returns:
        [3, side, side].
    """
    size = images.shape[3] + 4  # with a frame of two pixels
    canvas = torch.ones(3, side, side)
    places = F.pad(coordinates, (0, 1))[:, :2].cpu()  # A map of one dimension is a line.
    places = places - places.amin(0)
    places = places / places.max().clamp(min=1e-30)
    places = places + (1 - places.amax(0)) / 2  # The shorter axis lies in the middle.
    places = (places * (side - size)).long().tolist()
    for (left, top), image, kind in zip(places, images.cpu(), kinds.tolist(), strict=True):
        hue = 47 * kind % 360  # neighboring kinds get colors that differ
        color = torch.tensor(ImageColor.getrgb(f"hsl({hue}, 100%, 45%)")) / 255
        canvas[:, top : top + size, left : left + size] = color[:, None, None]
        canvas[:, top + 2 : top + size - 2, left + 2 : left + size - 2] = image
    return canvas
