"""Data and evaluation for the scripts beside it; all else stands in each script."""

import atexit
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from accelerate import PartialState
from accelerate.utils import broadcast, gather, gather_object, tqdm
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

MEMORY_LIMIT = 8 * 2**30  # bytes of uint8 images that may lie on the device
SETS = {"fashion-mini": "FashionMNIST", "mnist": "MNIST", "fashionmnist": "FashionMNIST",
        "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}  # torchvision's names
ARCHITECTURES = ("small", "resnet18", "resnet34", "resnet50")
Recipes = Sequence[tuple[int, Sequence]]  # pairs: number of views V, their operations, a crop first
shuffled = lru_cache(2)(lambda n, *key: torch.randperm(n, generator=generator(*key)))  # kept


def fail(message: str, alone: bool = False) -> NoReturn:
    """Stop for what a user can mend: one line on stderr (one a machine, or `alone`), code 2."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` once all went well: no reader meets half a file."""
    aside = Path(path).with_name(f".partial-{Path(path).name}")  # some writers look at the suffix
    yield aside
    aside.replace(path)


def generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of non-negative integers, such as (seed, epoch, step)."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)  # (1,) ≠ (1, 0)
    return torch.Generator().manual_seed(int(state[0]))

# ------------------------------------------------------------------------------- image operations
# On x [B, C, H, W], float32 in 0..1, C 1 or 3. draw(n, rng) gives the parameters of n images, CPU
# tensors of n rows, distributed as in torchvision's transform of the same name; with rows of them
# an operation gives what torchvision.transforms.v2.functional gives. All but crops may overwrite x.
def beside(x: Tensor, v: Tensor) -> Tensor:
    """v on the device of x; a CUDA device is not waited for."""
    return v.to(x.device, non_blocking=x.is_cuda)


def grayscale(x: Tensor) -> Tensor:
    """Luma in each of the channels."""
    return TF.rgb_to_grayscale(x, x.shape[-3])


class RandomResizedCrop(NamedTuple):
    """Crop of a random area and aspect ratio, resized to a square, mirrored with p `flip`."""
    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.rand(n, 22, generator=rng), torch.rand(n, generator=rng) < self.flip

    def boxes(self, u: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
        """Boxes [n, 4] (top, left, height, width) for u [n, 22] and images of these sizes."""
        height, width = (torch.as_tensor(v).expand(len(u))[:, None] for v in (height, width))
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, :10])
        low, high = map(math.log, self.ratio)
        ratio = torch.exp(low + (high - low) * u[:, 10:20])
        # As torchvision: the first of ten tries that fits, else the middle at the nearest ratio.
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first, found = fits.int().argmax(1, keepdim=True), fits.any(1, keepdim=True)
        nearest = (width / height).clamp(*self.ratio)
        h = torch.where(found, h.gather(1, first), (width / nearest).round().minimum(height))
        w = torch.where(found, w.gather(1, first), (height * nearest).round().minimum(width))
        top = (u[:, 20:21] * (height - h + 1)).floor().minimum(height - h)  # may have rounded up
        left = (u[:, 21:] * (width - w + 1)).floor().minimum(width - w)
        top = torch.where(found, top, (height - h) // 2)
        return torch.cat([top, torch.where(found, left, (width - w) // 2), h, w], 1).long()

    def __call__(self, x: Tensor, u: Tensor, flip: Tensor) -> Tensor:
        """x [B, C, H, W] uint8 or float → [B, C, size, size]: bilinear, antialiased."""
        size, (H, W), scale = self.size, x.shape[2:], 255 if x.dtype == torch.uint8 else 1
        start, length = beside(x, self.boxes(u, H, W).float())[:, None].split(2, dim=2)
        at = start + length / size * (torch.arange(size, device=x.device)[:, None] + 0.5)
        mirrored = beside(x, flip[:, None, None] & torch.tensor([False, True]))  # columns only
        at = torch.where(mirrored, at.flip(1), at)  # [B, size, 2]: where the new pixels lie
        if max(H, W) <= size:  # nothing shrinks: between four pixels
            rows, columns = at.clamp(start + 0.5, start + length - 0.5).unbind(2)
            grid = torch.complex((columns * (2 / W) - 1)[:, None], (rows * (2 / H) - 1)[..., None])
            return F.grid_sample(x / scale, torch.view_as_real(grid), align_corners=False)
        def filters(at: Tensor, start: Tensor, length: Tensor, n: int) -> Tensor:  # [B, size, n]
            pixel = torch.arange(n, device=x.device)
            inside = (pixel >= start) & (pixel < start + length)
            w = (pixel + 0.5 - at[..., None]).div_((length / size).clamp(min=1)[..., None]).abs_()
            w = w.sub_(1).clamp_(max=0).mul_(inside[:, None])  # below 0, as the sum
            return w.div_(w.sum(2, keepdim=True))
        rows, columns = map(filters, at.unbind(2), start.unbind(2), length.unbind(2), (H, W))
        x = x.transpose(1, 2).flatten(1, 2).float() @ (columns / scale).mT
        return (rows @ x.view(len(x), H, -1)).unflatten(2, (-1, size)).transpose(1, 2)

    def cut(self, image: Tensor, u: Tensor, flip: Tensor) -> Tensor:
        """The same by torchvision: image [3, H, W], V rows → [V, 3, size, size], all uint8."""
        boxes = self.boxes(u, *image.shape[1:]).tolist()
        crops = [TF.resized_crop(image, *box, [self.size] * 2) for box in boxes]
        return torch.stack([v.flip(2) if f else v for v, f in zip(crops, flip, strict=True)])


class CentreCrop(NamedTuple):
    """The middle square, resized; above 64 pixels, as usual, of 224/256 of the shorter side."""
    size: int
    def __call__(self, x: Tensor) -> Tensor:
        """x [..., H, W] → [..., size, size] of its type."""
        side = round(min(x.shape[-2:]) * (1 if self.size <= 64 else 224 / 256))
        return TF.resize(TF.center_crop(x, [side]), [self.size] * 2)
    cut = __call__


class ColorJitter(NamedTuple):
    """Brightness, contrast, saturation and hue, in an order of its own for each image."""
    brightness: float
    contrast: float
    saturation: float
    hue: float
    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        middle, strength = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor(self)
        low = torch.maximum(middle - strength, torch.tensor([0.0, 0.0, 0.0, -0.5]))
        factors = low + (middle + strength - low) * torch.rand(n, 4, generator=rng)
        return factors, torch.rand(n, 4, generator=rng).argsort(1)

    def __call__(self, x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """factors [B, 4]: three around 1 and the hue's shift; order [B, 4]: their permutation."""
        for turn in order.unbind(1):
            factor = beside(x, factors.gather(1, turn[:, None]))[..., None, None]
            i = beside(x, (turn == 3).nonzero()[:, 0])
            hue = self.shift_hue(x.index_select(0, i), factor[i, 0]) if x.shape[1] == 3 else x[i]
            # The others mix the image with something grey: black, its mean, its luma.
            kind, grey = beside(x, turn)[:, None, None, None], TF.rgb_to_grayscale(x, 1)
            grey = grey * (kind == 2) + grey.mean((2, 3), keepdim=True) * (kind == 1)
            torch.lerp(grey, x, factor, out=x).clamp_(0, 1)[i] = hue
        return x

    @staticmethod
    def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
        """Turn the hue of x [B, 3, H, W] by shift [B, 1, 1], in -.5..0.5 of the circle."""
        # The hue in sixths of the circle (red 0, green 2, blue 4), with no case for each channel.
        (r, g, b), least, value = x.unbind(1), x.amin(1), x.amax(1)
        chroma = value - least
        away, side = torch.stack([value - r, g - b]) / chroma.clamp(min=1e-12)
        hue = torch.addcmul(side.abs(), away, 3 - 2 * side.abs()).copysign_(side).add_(6 * shift)
        hue.sub_((hue / 6).floor_(), alpha=6)
        x = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)
        return x.clamp_(0, 1).mul_(chroma[:, None]).add_(least[:, None])


class GaussianBlur(NamedTuple):
    """Blur with a sigma, in pixels, uniform between two; the borders reflect."""
    kernel_size: int
    sigma: tuple[float, float]
    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor]:
        return (self.sigma[0] + (self.sigma[1] - self.sigma[0]) * torch.rand(n, generator=rng),)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, C, S, S], sigma [B]: two products with banded matrices [S, S]."""
        n, tap = x.shape[3], torch.arange(self.kernel_size, device=x.device) - self.kernel_size // 2
        weights = (-0.5 * (tap / beside(x, sigma)[:, None]) ** 2).softmax(1)[:, None]
        source = (torch.arange(n, device=x.device)[:, None] + tap).abs()
        source = source.minimum(2 * (n - 1) - source).expand(len(x), -1, -1)
        band = x.new_zeros(len(x), n, n).scatter_add_(2, source, weights.expand_as(source))
        return band[:, None] @ (x.flatten(1, 2) @ band.mT).view_as(x)


class RandomApply(NamedTuple):
    """On each image with probability p: an operation, or a function of x (torchvision's, say)."""
    operation: Callable[..., Tensor]
    p: float
    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        drawn = self.operation.draw(n, rng) if hasattr(self.operation, "draw") else ()
        return torch.rand(n, generator=rng) < self.p, *drawn

    def __call__(self, x: Tensor, chosen: Tensor, *drawn: Tensor) -> Tensor:
        i = chosen.nonzero()[:, 0]  # on the CPU: its size is known without a wait
        there, drawn = beside(x, i), [v[i] for v in drawn]
        return x.index_copy_(0, there, self.operation(x.index_select(0, there), *drawn))

# ------------------------------------------------------------------------------------------- data
@dataclass
class ImageSet:
    """Images: uint8 [N, C, H, W] on the device, C 1 (grey) or 3, or paths of files of any sizes,
    which `workers` processes read anew each time, ahead of use. Labels [N], -1: none."""
    images: Tensor | np.ndarray
    labels: Tensor
    classes: Sequence[str] = ()  # their names
    fingerprint: str = ""  # another where the list of files is another
    device: torch.device | None = None  # for what is read from files
    workers: int = 1
    waited: float = 0.0  # seconds so far that the next step's files were not ready

    def __len__(self) -> int:
        return len(self.images)

    @property
    def side(self) -> int:
        """The default size of views: the first image's shorter side, at most 224."""
        first = self.images[0]
        return min(224, *(first if isinstance(first, Tensor) else read_image(first)).shape[1:])

    def take(self, index: Tensor) -> "ImageSet":
        """The images index [n] as a set."""
        return replace(self, images=self.images[index.numpy()], labels=self.labels[index])

    def centres(self, index: Tensor, size: int) -> Tensor:
        """The middle squares of the images index [n] → [n, 3, size, size] float32."""
        loaded = self.load([(1, [CentreCrop(size)])], lambda _: (index, [[()]]), [0])
        return next(loaded)[2][0].expand(-1, 3, -1, -1)

    def load(self, recipes: Recipes, plan: Callable[[int], tuple],
             steps: Sequence[int]) -> Iterator[tuple]:
        """Of each step index [B] and drawn, as `plan` gives them, and by recipe the crops [V·B, C,
        size, size] float32. drawn: by recipe and operation, its parameters. Bad file: fail()."""
        if isinstance(x := self.images, Tensor):
            for index, drawn in map(plan, steps):  # index_select: ten times as fast as x[index]
                views = [crop(x.index_select(0, beside(x, index.repeat(count))), *first) for (
                    count, (crop, *_)), (first, *_) in zip(recipes, drawn, strict=True)]
                yield index, drawn, [v if v.dtype == torch.float else v / 255 for v in views]
            return
        cuda, processes = self.device.type == "cuda", PartialState().num_processes
        loader = iter(torch.utils.data.DataLoader(
            steps, None, collate_fn=partial(_read_crops, self.images, recipes, plan),
            num_workers=max(0, min(self.workers, len(steps) - 1)), pin_memory=cuda))
        if hasattr(signal, "SIGCHLD"):  # else torch's raises for a dead worker at any point
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end = atexit.register(getattr(loader, "_shutdown_workers", int))  # an exit waits for them
        try:
            for step in steps:
                wrong, self.waited = "", self.waited - time.monotonic()
                try:
                    views = next(loader)
                except (OSError, RuntimeError) as error:  # a worker's: its last line says it
                    wrong = str(error).strip().splitlines()[-1].removeprefix("OSError: ")
                    wrong += ": take fewer --workers" * isinstance(error, RuntimeError)
                self.waited += time.monotonic()
                if processes > 1 and not cuda:  # there it would wait for the device
                    wrong = max(gather_object([wrong]))
                if wrong:
                    fail(wrong, alone=cuda)
                views = [v.to(self.device, non_blocking=cuda).float().div_(255) for v in views]
                yield *plan(step), views
        finally:
            end()
            atexit.unregister(end)


def _read_crops(paths: np.ndarray, recipes: Recipes, plan: Callable[[int], tuple],
                step: int) -> list[Tensor]:
    """A step's crops as uint8, each file decoded once for all its views."""
    if torch.utils.data.get_worker_info():  # the script ends its workers, no signal does
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    index, drawn = plan(step)
    n, crops = len(index), [(count, operations[0]) for count, operations in recipes]
    views = [torch.empty(v * n, 3, c.size, c.size, dtype=torch.uint8) for v, c in crops]
    for i, path in enumerate(paths[index.numpy()]):
        image = read_image(path)
        for (_, crop), (first, *_), out in zip(crops, drawn, views, strict=True):
            out[i::n] = crop.cut(image, *(v[i::n] for v in first))
    return views


def read_image(path: str) -> Tensor:
    """A file, turned as its EXIF says → RGB [3, H, W] uint8; OSError: a line with its name."""
    try:
        with Image.open(str(path)) as image:
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow raises nearly everything on a damaged file
        raise OSError(f"{path} cannot be read ({error}): mend or remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_splits(data: str, root: str, limit: int | None, device: torch.device,
                workers: int | None = None, stream: bool = False) -> tuple[ImageSet | None, ...]:
    """Images to pretrain on (stl10: unlabelled, else the next), labelled training images and test
    images: of a set by name, or a folder with train and val or test, which hold a folder a class,
    or (the last two None) with images anywhere. limit: the first so many of a fixed shuffle, of
    training images. Files of one size that fit into memory are read at once, unless `stream`.
    fail() also where Accelerate runs one process of the several that were asked for."""
    with suppress(OSError, AttributeError):  # a tenth of a step: glibc returns memory, asks anew
        for option in ((-1, -1), (-4, 0)) if device.type == "cpu" else ():  # M_TRIM_..., M_MMAP_MAX
            ctypes.CDLL("libc.so.6").mallopt(*option)
    one_of_many = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if int(os.environ.get("WORLD_SIZE", 1 + one_of_many)) > PartialState().num_processes:
        fail("Accelerate runs one process, not several; CPU: ACCELERATE_USE_CPU=true torchrun ...")
    workers = workers or min(16, -(-os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    def load(split: str) -> ImageSet:
        named = data in SETS
        with PartialState().local_main_process_first() if named else nullcontext():
            images, labels, classes = _named(data, split, root) if named else _folder(data, split)
        found = ImageSet(images, torch.as_tensor(labels).long(), classes, "", device, workers)
        if limit and split != "test":
            found = found.take(torch.randperm(len(found), generator=generator(0))[:limit])
        found.fingerprint = f"{len(found)} images"
        if not named:
            names = os.fsencode("\n".join(found.images))
            found.fingerprint += f" ({hashlib.sha256(names).hexdigest()[:8]})"
            found.images = _decode(found.images, workers, stream)
        if named or isinstance(found.images, Tensor):
            found.images = torch.as_tensor(found.images).to(device)
        return found
    if data not in SETS and not any(Path(data, name).is_dir() for name in ("train", "val", "test")):
        return load("all"), None, None
    bank = load("train")
    return load("unlabeled") if data == "stl10" else bank, bank, load("test")


def _named(name: str, split: str, root: str) -> tuple[np.ndarray, Sequence[int], Sequence[str]]:
    kind = getattr(torchvision.datasets, SETS[name])
    try:
        if name == "fashion-mini":
            with np.load(Path(__file__).resolve().parent / "data" / "fashion-mini.npz") as file:
                return file[f"{split}_images"][:, None], file[f"{split}_labels"], kind.classes
        images = kind(root, split if name == "stl10" else split == "train", download=True)
    except Exception as error:  # of the network, or of damaged files
        fail(f"{name} is neither here nor to be downloaded ({str(error) or repr(error):.300}): "
             f"copy its files, or take another --data: {', '.join(SETS)} or a folder")
    pixels, labels = np.asarray(images.data), images.labels if name == "stl10" else images.targets
    if name != "stl10":
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return pixels, labels, images.classes


def _folder(data: str, split: str) -> tuple[np.ndarray, Sequence[int], Sequence[str]]:
    if split == "all":
        kinds = torchvision.datasets.folder.IMG_EXTENSIONS
        files = [str(Path(path, name)) for path, _, names in os.walk(data, followlinks=True)
                 if "config.json" not in names  # else it is a run, with pictures of its own
                 for name in names if name.lower().endswith(kinds)]
        if not files:
            fail(f"--data {data} is neither one of {', '.join(SETS)} nor a folder with images")
        return np.array(sorted(files)), [-1] * len(files), ()
    parts = [p for p in (Path(data, name) for name in ("train", "val", "test")) if p.is_dir()]
    if len(parts) < 2 or parts[0].name != "train":
        fail(f"--data {data} needs a folder train and a folder val or test, which hold a folder a "
             "class (or none of the three, to train on images without classes)")
    try:
        train, test = (torchvision.datasets.ImageFolder(part) for part in parts[:2])
    except OSError as error:  # no class folder, or one without an image: it says which
        fail(str(error).splitlines()[0])
    if odd := sorted({*train.classes} ^ {*test.classes}):
        fail(f"{data}: these class folders are not in both splits: {', '.join(odd[:10])}")
    images = test if split == "test" else train
    return np.array([path for path, _ in images.samples]), images.targets, images.classes


def _decode(paths: np.ndarray, workers: int, stream: bool) -> Tensor | np.ndarray:
    """[N, 3, H, W] uint8; or the paths: to be streamed, of several sizes, or too many."""
    pool = ThreadPoolExecutor(workers)
    try:
        first = read_image(paths[0])
        if stream or len(paths) * first.numel() > MEMORY_LIMIT:
            return paths
        pixels = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
        images, quiet = pool.map(read_image, paths), not sys.stderr.isatty()
        for i, image in enumerate(tqdm(images, "decoding", len(paths), disable=quiet)):
            if image.shape != first.shape:
                return paths
            pixels[i] = image
        return pixels
    except OSError as error:
        fail(str(error))
    finally:
        pool.shutdown(cancel_futures=True)


def draw(images: int, recipes: Recipes, B: int, seed: int, rows: Tensor,
         step: int) -> tuple[Tensor, list[list[list[Tensor]]]]:
    """A step's index [B] and, by recipe and operation, parameters: rows [B] of the whole batch."""
    epoch, i = divmod(step, images // B)
    rng = generator(seed, epoch, i)
    drawn = [[[v.unflatten(0, (V, B))[:, rows].flatten(0, 1) for v in operation.draw(V * B, rng)]
              for operation in operations] for V, operations in recipes]
    return shuffled(images, seed, epoch)[i * B + rows], drawn


def batches(data: ImageSet, recipes: Recipes, batch_size: int, seed: int, start: int,
            stop: int) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """The steps `start` to `stop` - 1 of a training run: this process's rows of shuffled batches
    of batch_size over all processes; an epoch's smaller last one is left out. Yields the step, the
    images' index [B] and by recipe [V, B, 3, size, size], drawn from (seed, epoch, step)."""
    state, steps = PartialState(), range(start, stop)
    rows = torch.arange(batch_size).chunk(state.num_processes)[state.process_index]
    plan = partial(draw, len(data), recipes, batch_size, seed, rows)
    for step, (index, drawn, views) in zip(steps, data.load(recipes, plan, steps), strict=True):
        for i, (count, operations) in enumerate(recipes):
            for operation, parameters in zip(operations[1:], drawn[i][1:], strict=True):
                views[i] = operation(views[i], *parameters)
            views[i] = views[i].expand(-1, 3, -1, -1).unflatten(0, (count, -1))
        yield step, index, views

# --------------------------------------------------------------------------------------- encoders
def build_encoder(architecture: str, stem: str = "7x7") -> nn.Module:
    """[B, 3, H, W] → h [B, encoder.width]: a ResNet with torchvision's names, its stem "7x7" or
    "3x3" without max-pooling (SimCLR, B.9), or "small", five convolutions."""
    if architecture == "small":
        w = (3, 32, 32, 64, 128, 256)
        layers = [torchvision.ops.Conv2dNormActivation(*w[i:i + 2], 3, 2 - i % 2) for i in range(5)]
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoder.width = w[-1]
        return encoder
    encoder = torchvision.models.get_model(architecture)
    if stem == "3x3":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    encoder.width, encoder.fc = encoder.fc.in_features, nn.Identity()
    return encoder


def save_encoder(path: str | Path, encoder: nn.Module, **metadata: object) -> None:
    """Weights as safetensors under torchvision's names, with the metadata as strings."""
    weights = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    with written_aside(path) as aside:
        safetensors.torch.save_file(weights, aside, {k: str(v) for k, v in metadata.items()})


def load_encoder(path: str | Path, **expected: str) -> tuple[nn.Module, dict[str, str]]:
    """The encoder of save_encoder's file, and its metadata; another, or unexpected: fail()."""
    try:
        metadata = safetensors.safe_open(path, "pt").metadata() or {}
        encoder = build_encoder(metadata["architecture"], metadata["stem"])
        encoder.load_state_dict(safetensors.torch.load_file(path))
    except Exception as error:  # a foreign file leads to nearly everything
        fail(f"{path} is no encoder.safetensors of these scripts ({error!r:.200})")
    if not expected.items() <= metadata.items():
        fail(f"{path}: take --arch {metadata['architecture']} --stem {metadata['stem']}")
    return encoder, metadata


@torch.no_grad()
def extract_features(encoder: nn.Module, data: ImageSet, size: int, batch: int = 256) -> Tensor:
    """h [N, D] float32 of the images' centres, by the encoder in eval mode, on all processes."""
    state, training = PartialState(), encoder.training
    share = -(-len(data) // state.num_processes)
    index = (state.process_index * share + torch.arange(share)).clamp(max=len(data) - 1)
    plan = [(i, [[()]]) for i in index.split(batch)]
    x = data.load([(1, [CentreCrop(size)])], plan.__getitem__, range(len(plan)))
    bar = tqdm(x, "features", len(plan), leave=False, disable=not sys.stderr.isatty())
    broadcast([*encoder.eval().buffers()])  # on CPUs each process has BN statistics of its own
    h = [encoder(v.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)).float()
         for _, _, (v,) in bar]
    encoder.train(training)
    return gather(torch.cat(h))[: len(data)]  # without what the last process repeated

# ------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def knn_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float,
                num_classes: int | None = None) -> Tensor:
    """Weighted k nearest neighbours by cosine (Wu et al. 2018, §3.4): bank [M, D] and queries
    [Q, D] (normalised here, in chunks), bank_labels [M] → [Q, num_classes]: exp(cosine /
    temperature) summed over the k nearest, rows scaled to 1. ValueError: no such k."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} does not fit a bank of {len(bank)}")
    num_classes = num_classes or int(bank_labels.max()) + 1
    bank_labels, lengths, scores = bank_labels.to(bank.device), bank.norm(dim=1).clamp(1e-12), []
    for q in F.normalize(queries, dim=1).split(max(1, 2**28 // len(bank))):  # 1 GiB of cosines
        cosine, i = (q @ bank.T).div_(lengths).topk(k, dim=1)
        weight = (cosine / temperature).softmax(1)
        scores.append(q.new_zeros(len(q), num_classes).scatter_add_(1, bank_labels[i], weight))
    return torch.cat(scores)


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, classes: int, seed: int = 0,
                 epochs: int = 20) -> tuple[Tensor, dict[str, float]]:
    """Logistic regression on fixed features: x [N, D], y [N], x_test [M, D] → logits [M, classes]
    and the chosen rate and decay: of a grid trained side by side, the best on a held-out tenth of
    each class, then on all. Features are standardised, over sqrt(D): so one grid suits all."""
    rng, y = generator(seed), y.to(x.device)
    mean, scale = x.mean(0), (x.std(0) + 1e-6) * x.shape[1] ** 0.5
    x, x_test = (F.pad((v - mean) / scale, (0, 1), value=1) for v in (x, x_test))  # 1: the bias
    def losses(i: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:  # [n], [D + 1, G, C] → [n, G] each
        logits = (x[i] @ W.flatten(1)).unflatten(1, W.shape[1:]).transpose(1, 2)
        target = y[i, None].expand(-1, W.shape[1])
        return F.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target
    def train(index: Tensor, grid: Sequence[tuple[float, float]]) -> Tensor:
        n, batch = len(index), min(256, len(index))
        rate, decay = torch.tensor(grid, device=x.device).T
        W = torch.zeros(x.shape[1], len(grid), classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.SGD([W], momentum=0.9, nesterov=True)
        passes = range(max(epochs, 400 * batch // n))
        order = [torch.randperm(n, generator=rng)[: n // batch * batch] for _ in passes]
        order = index[torch.cat(order)].split(batch)
        for step, i in enumerate(order):
            # A cell's rate multiplies its loss and so its gradient: one optimiser trains them all.
            loss = losses(i, W)[0].mean(0) + 0.5 * decay * W.square().sum((0, 2))
            optimizer.param_groups[0]["lr"] = 0.5 + 0.5 * math.cos(math.pi * step / len(order))
            optimizer.zero_grad()
            (rate * loss).sum().backward()
            optimizer.step()
        return W.detach()
    order = torch.randperm(len(x), generator=rng)
    order = order[y.cpu()[order].argsort(stable=True)]  # by class: every tenth is a fair tenth
    grid = [(lr, decay) for lr in (1.0, 3.0, 10.0, 30.0, 100.0) for decay in (0.0, 1e-5, 1e-4)]
    W = train(order[torch.arange(len(x)) % 10 > 0], grid)
    parts = [losses(i, W) for i in order[::10].split(4096)]
    loss, hits = (torch.cat(part).float().mean(0) for part in zip(*parts, strict=True))
    lr, weight_decay = grid[int((hits - 1e-6 * loss).argmax())]  # the loss breaks ties
    logits = x_test @ train(order, [(lr, weight_decay)])[:, 0]
    return logits, {"lr": lr, "weight_decay": weight_decay, "held-out": 100 * hits.max().item()}


def accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the scores [N, C] whose k largest hold the label."""
    top = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100 * (top == labels.to(top.device)[:, None]).any(1).float().mean().item()


def some_of_each(labels: Tensor, n: float, rng: torch.Generator) -> Tensor:
    """Indices of n random images of each class, or (below 1) of that share of them."""
    order = torch.randperm(len(labels), generator=rng)
    order = order[labels[order].argsort(stable=True)].split(labels.bincount().tolist())
    return torch.cat([part[: int(n) if n >= 1 else max(1, round(n * len(part)))] for part in order])


def knn_accuracy(encoder: nn.Module, bank: ImageSet, test: ImageSet, size: int) -> float:
    """Percent of the test images whose class the bank tells by kNN (k 20 or the bank, T .07)."""
    h, h_test = (extract_features(encoder, images, size) for images in (bank, test))
    return accuracy(knn_predict(h, bank.labels, h_test, min(20, len(bank)), 0.07), test.labels)


def compare(encoder: nn.Module, about: dict, bank: ImageSet, test: ImageSet, seed: int) -> list:
    """Test accuracies in percent of the encoder, the same untrained, and pixels: kNN (k 20, T .07)
    and linear probe, with all labels and, where there are as many, 10 a class (mean of 5 draws)."""
    torch.manual_seed(seed)
    random = build_encoder(about["architecture"], about["stem"]).to(PartialState().device)
    encoders = {about["method"]: encoder, "random": random, "raw pixels": nn.Flatten()}
    size, y, sets = about["image_size"], bank.labels, {"": [torch.arange(len(bank))]}
    if y.bincount().min() >= 10:
        sets[" (10 a class)"] = [some_of_each(y, 10, generator(seed, i)) for i in range(5)]
    rows = []
    for features, encoder in encoders.items():
        x, x_test = (extract_features(encoder, images, size) for images in (bank, test))
        rows.append({"features": features})
        for name, indices in sets.items():
            hits = torch.zeros(2)
            for i in indices:
                scores = knn_predict(x[i], y[i], x_test, min(20, len(i)), 0.07, int(y.max()) + 1)
                logits, _ = linear_probe(x[i], y[i], x_test, int(y.max()) + 1, seed)
                hits += torch.tensor([accuracy(v, test.labels) for v in (scores, logits)])
            rows[-1][f"kNN{name}"], rows[-1][f"linear{name}"] = (hits / len(indices)).tolist()
    return rows


def finish(out: Path, encoder: nn.Module, about: dict, bank: ImageSet | None,
           test: ImageSet | None, seed: int, last: dict) -> None:
    """The end of a run, whose last row is `last`: its table, printed and as results.json, and
    encoder.safetensors with `about`: method, architecture, stem, image_size, data."""
    rows = [{"features": about["method"], "loss": last["loss"], "kNN": last.get("knn", "-")}]
    if bank and about["image_size"] <= 64:
        rows = compare(encoder, about, bank, test, seed)
    PartialState().print(f"test accuracy in percent:\n{table(rows)}\n"
                         f"more: python linear_eval.py {out}/encoder.safetensors")
    if PartialState().is_main_process:
        save_encoder(out / "encoder.safetensors", encoder, **about)
        with written_aside(out / "results.json") as aside:
            aside.write_text(json.dumps(rows, indent=1))


def table(rows: Sequence[dict]) -> str:
    """Rows with the same keys as aligned text, numbers with one decimal."""
    lines = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, v, widths)).rstrip() for v in (rows[0], *lines))


def save_pictures(path: Path, images: Tensor, columns: int) -> None:
    """A grid of images [N, 3, S, S] in 0..1, small ones enlarged; by the main process."""
    if PartialState().is_main_process:
        images = F.interpolate(images.cpu(), scale_factor=max(1, 84 // images.shape[3]))
        with written_aside(path) as aside:
            torchvision.utils.save_image(images, aside, nrow=columns, pad_value=1)
