# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""Evaluation of an encoder: linear probes, weighted k nearest neighbors, fine-tuning.

    python linear_eval.py runs/simclr-fashion-mini/encoder.safetensors --labels 10 --seeds 5
    python linear_eval.py random --arch small --data fashion-mini --protocol finetune --labels 0.1
    accelerate launch linear_eval.py CHECKPOINT --data FOLDER --protocol linear-augmented

ENCODER is an encoder.safetensors of these scripts, the checkpoint of a ResNet from another
repository, or `random`, an untrained encoder.

The protocols:
- linear: logistic regression on the features of the images' middle squares, which are computed
  once. The weight decay is chosen on a held-out tenth of the training labels or, with few, by
  cross-validation. The probe is then trained on all labels, and is tested once.
- knn: weighted k nearest neighbors (Wu et al. 2018, section 3.4).
- linear-augmented: a linear layer on random crops and flips, with the --recipe of one of the
  methods' authors.
- finetune: all weights on random crops and flips, as SimCLR's authors did (Appendix B.5), but for
  at least 500 steps.

Except in finetune, which trains a copy, the encoder runs in eval mode. In the end, it is compared
bit by bit with what it was. A seed draws the labeled images, the held-out tenth, the batches, the
new layer and a random encoder. Accuracies come with a 95 % Wilson interval for the number of test
images and, over several seeds, with their standard deviation.

Differences from the authors' recipes:
- Learning rates change step by step, not once per epoch.
- The new layer starts from PyTorch's own initialization.
- SimCLR's recipe and fine-tuning have batch size 256 by default, with the learning rate for it.
- Crops have at least 0.08 of the area, in SupCon's recipe too (0.2).

What it leaves in --out, by default the folder of the encoder:
- eval.json, a list to which each evaluation adds its result
- neighbours.png (linear and knn): test images (left), and the nearest training images of each, in a
  green frame if the class is the same and a red one if not
- features.png (linear and knn): test images, drawn at the first two principal components of their
  features
"""

import argparse
import copy
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import lr_scheduler

import common
from common import ImageSet, Normalize, RandomResizedCrop

ON_FEATURES = ("linear", "knn")  # the protocols that see each image once
ON_CROPS = ("linear-augmented", "finetune")  # those that train on random crops
# Flags that only some protocols use.
USED_BY = {
    "knn_k": ("knn",),
    "knn_temperature": ("knn",),
    "features": ON_FEATURES,
    "recipe": ("linear-augmented",),
    "epochs": ON_CROPS,
    "lr": ON_CROPS,
}

# Parts of the names, in other repositories' checkpoints, of a second encoder that their authors do
# not evaluate.
SECOND_ENCODERS = ("encoder_k", "momentum", "target", "student")


class Recipe(NamedTuple):
    """SGD with momentum 0.9.

    The learning rate follows a cosine down to 0 or, if there are drops, is multiplied by the factor
    at each of them.
    """

    lr: float  # at this batch size
    batch_size: int
    epochs: int
    weight_decay: float = 0.0
    nesterov: bool = False
    factor: float = 1.0
    drops: tuple[float, ...] = ()  # shares of the training


RECIPES = {
    "moco": Recipe(30, 256, 100, factor=0.1, drops=(0.6, 0.8)),
    "swav": Recipe(0.3, 256, 100, weight_decay=1e-6),
    "simclr": Recipe(0.1, 256, 90, nesterov=True),
    "supcon": Recipe(5, 512, 100, factor=0.2, drops=(0.6, 0.75, 0.9)),
}
FINETUNE = Recipe(0.05, 256, 30, nesterov=True)


# --------------------------------------------------------------------------------------
# Encoders of other repositories
# --------------------------------------------------------------------------------------


def flatten(tree: object, *path: str) -> Iterator[tuple[str, Tensor]]:
    """The names and values of all tensors in nested dictionaries.

    "module" and "_orig_mod", which DDP and torch.compile add to names, are left out.
    """
    if isinstance(tree, Tensor):
        yield ".".join(part for part in path if part not in ("module", "_orig_mod")), tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, *path, *str(key).split("."))


@dataclass
class Match:
    """How well a part of a checkpoint fits a ResNet.

    Attributes:
        architecture, stem: of the ResNet.
        prefix: what stands before torchvision's names in the checkpoint.
        weights: the tensors with this prefix, under torchvision's names.
        wrong: names that are missing, of another shape, or too many.
    """

    architecture: str
    stem: str
    prefix: str
    weights: dict[str, Tensor]
    wrong: list[str]


@cache
def expected_shapes(architecture: str, stem: str) -> dict[str, torch.Size]:
    """The shapes of a ResNet's tensors, by name."""
    with torch.device("meta"):  # without memory
        tensors = common.build_encoder(architecture, stem).state_dict()
    return {name: value.shape for name, value in tensors.items() if "num_batches" not in name}


def match_resnet(found: dict[str, Tensor], prefix: str, architecture: str, stem: str) -> Match:
    """Compare the tensors under a prefix with those of a ResNet."""
    weights = {}
    for name, value in found.items():
        if name.startswith(prefix):
            # SupContrast calls it a shortcut.
            ours = name.removeprefix(prefix).replace("shortcut.", "downsample.")
            weights[ours] = value
    wanted = expected_shapes(architecture, stem)
    wrong = []
    for name, shape in wanted.items():
        if name not in weights or weights[name].shape != shape:
            wrong.append(name)
    for name in weights:
        if name.startswith("layer") and name not in wanted and "num_batches" not in name:
            wrong.append(name)
    return Match(architecture, stem, prefix, weights, wrong)


def match_checkpoint(found: dict[str, Tensor]) -> Match:
    """Find the ResNet in a checkpoint: the one of which the fewest tensors are wrong."""
    first_layers = [
        name
        for name, value in found.items()
        if name.endswith("conv1.weight") and value.shape[1:2] == (3,)
    ]
    first_layers.sort(key=lambda name: any(second in name for second in SECOND_ENCODERS))
    prefixes = [name.removesuffix("conv1.weight") for name in first_layers] or [""]
    candidates = itertools.product(prefixes, common.RESNETS, ("7x7", "3x3"))
    matches = [match_resnet(found, *candidate) for candidate in candidates]
    return min(matches, key=lambda match: len(match.wrong))


def read_tensors(path: str) -> object:
    """The content of another repository's checkpoint, of which no code is run."""
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        # Many checkpoints hold the flags of their script as a Namespace, which is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        common.fail(f"{path} does not exist: check the path, or use random")
    except Exception as error:  # A damaged file can raise almost any exception.
        if common.memory_problem(error):  # The file is not to blame.
            raise
        text = str(error)
        if "GLOBAL " in text:
            name = text.partition("GLOBAL ")[2].split()[0]
            reason = f"it holds {name}, which could run code"
        else:
            reason = text.partition("Weights only load")[0][:200] or "it holds no tensors"
        common.fail(f"{path} was not loaded ({reason}): use a checkpoint that holds only tensors")


def open_encoder(path: str) -> tuple[nn.Module, dict[str, str], str]:
    """Load an encoder of these scripts, or the ResNet of another repository's checkpoint.

    Returns:
        The encoder; its metadata, which for another repository's are only architecture and stem;
        and, for another repository's, a line on what of the file was used and what was not.

    Raises:
        SystemExit: if there is no encoder in the file. The message is one line.
    """
    if path.endswith(".safetensors") and _is_ours(path):
        return *common.load_encoder(path), ""
    tree = read_tensors(path)
    if isinstance(tree, dict) and {"model", "optimizer", "rows"} <= set(tree):
        common.fail(
            f"{path} is the checkpoint of a run of these scripts: use encoder.safetensors, which "
            "the run writes at its end"
        )
    found = dict(flatten(tree))
    if not found:
        common.fail(f"{path} holds no tensors: use another checkpoint")
    match = match_checkpoint(found)
    if match.wrong:
        names = ", ".join(list(found)[:3])
        common.fail(
            f"{path} holds no ResNet that is known here: {match.architecture} with the "
            f"{match.stem} stem is the nearest, but {len(match.wrong)} of its tensors are missing, "
            f"too many or of another shape, such as {match.wrong[0]}; the file begins with {names}"
        )

    encoder = common.build_encoder(match.architecture, match.stem)
    names = encoder.state_dict()
    used = {name: value for name, value in match.weights.items() if name in names}
    encoder.load_state_dict(used, strict=False)
    rest = [".".join(n.split(".")[:2]) for n in found if not n.startswith(match.prefix)]
    rest += [match.prefix + name.split(".")[0] for name in match.weights if name not in names]
    unused = ", ".join(f"{name} ({count})" for name, count in Counter(rest).items())
    note = f"{match.architecture}, {match.stem} stem, from {match.prefix or 'the top'}"
    about = {"architecture": match.architecture, "stem": match.stem}
    return encoder, about, f"{note}; not used: {unused or 'nothing'}"


def _is_ours(path: str) -> bool:
    """Whether the metadata of a .safetensors file are those of these scripts."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return "architecture" in (file.metadata() or {})
    except FileNotFoundError:
        common.fail(f"{path} does not exist: check the path, or use random")
    except Exception as error:  # A damaged file can raise almost any exception.
        if common.memory_problem(error):
            raise
        common.fail(f"{path} was not loaded ({error}): use a checkpoint that holds only tensors")


# --------------------------------------------------------------------------------------
# Training on crops and flips
# --------------------------------------------------------------------------------------


def choose_recipe(
    args: argparse.Namespace, about: dict[str, str], num_labeled: int, num_images: int
) -> tuple[str, Recipe]:
    """The recipe for linear-augmented or finetune, adapted to the flags and the images.

    Args:
        args: the flags.
        about: metadata of the encoder; its method chooses the default recipe.
        num_labeled: how many training images have labels.
        num_images: how many training images there are.

    Returns:
        The name of the recipe, and the recipe.
    """
    # The encoders of supcon.py say supcon-out, supcon-in or supcon-ce.
    method = about.get("method", "").partition("-")[0]
    candidates = (args.recipe, method, "simclr")
    name = next(candidate for candidate in candidates if candidate in RECIPES)
    recipe = FINETUNE if args.protocol == "finetune" else RECIPES[name]
    batch_size = min(num_labeled, args.batch_size or recipe.batch_size)
    epochs = recipe.epochs
    if recipe is FINETUNE:
        # As SimCLR's authors did, twice as long with few labels. With very few, at least 500 steps.
        if num_labeled < 0.05 * num_images:
            epochs = 2 * epochs
        epochs = max(epochs, math.ceil(500 / (num_labeled // batch_size)))
    lr = args.lr or recipe.lr * batch_size / recipe.batch_size
    return name, recipe._replace(lr=lr, batch_size=batch_size, epochs=args.epochs or epochs)


def build_sgd(
    params, recipe: Recipe, steps: int
) -> tuple[torch.optim.SGD, lr_scheduler.LRScheduler]:
    """The optimizer of a recipe, and its learning-rate schedule over a number of steps."""
    optimizer = torch.optim.SGD(
        params,
        recipe.lr,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    if recipe.drops:
        drops = [round(share * steps) for share in recipe.drops]
        return optimizer, lr_scheduler.MultiStepLR(optimizer, drops, recipe.factor)
    return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, steps)


def train(
    encoder: nn.Sequential,
    images: ImageSet,
    num_classes: int,
    size: int,
    recipe: Recipe,
    frozen: bool,
    seed: int,
    accelerator: Accelerator,
) -> nn.Module:
    """Train a linear layer on an encoder, and the encoder too unless it is frozen.

    Only fine-tuning on several GPUs shares the work. A layer on a frozen encoder is trained by
    every process alike, on the features of the whole batch. So is any network on CPUs, where batch
    norm cannot be synchronized: that is exact, and no faster than one process.

    Args:
        encoder: normalization of the inputs, then an encoder with an attribute `width`.
        images: the labeled training images.
        num_classes: how many classes there are.
        size: side of the crops, in pixels.
        recipe: how to train.
        frozen: leave the encoder as it is, in eval mode.
        seed: of the layer, the batches and the crops.
        accelerator: of the run.

    Returns:
        The encoder with its layer, in float32.
    """
    device = accelerator.device
    torch.manual_seed(seed)
    network = nn.Sequential(encoder, nn.Linear(encoder[1].width, num_classes)).to(device)
    # `fixed` runs in eval mode and without gradients; `model` is trained on its output.
    if frozen:
        fixed, model = encoder, network[1]
    else:
        fixed, model = nn.Identity(), network
    is_shared = not frozen and accelerator.num_processes > 1 and device.type == "cuda"
    if is_shared:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        model = accelerator.prepare(network)
    fixed.eval()
    model.train()

    steps = recipe.epochs * (len(images) // recipe.batch_size)
    optimizer, scheduler = build_sgd(model.parameters(), recipe, steps)
    crops = [(1, [RandomResizedCrop(size)])]
    batches = common.batches(images, crops, recipe.batch_size, seed, start=0, stop=steps)
    for index, (views,) in common.progress(batches, f"seed {seed}", steps):
        x = views[0].contiguous(memory_format=torch.channels_last)
        y = common.to_device_of(x, images.labels[index])
        with torch.no_grad(), accelerator.autocast():
            x = fixed(x).float()
        if not is_shared:  # Every process then makes the same step.
            x, y = accelerator.gather((x, y))
        with accelerator.autocast():
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    accelerator.free_memory()  # Accelerate no longer refers to this seed's DDP.
    return nn.Sequential(*network)  # the same layers without Accelerate's autocast, to evaluate


# --------------------------------------------------------------------------------------
# Pictures and results
# --------------------------------------------------------------------------------------


def save_neighbors(path: Path, h: Tensor, bank: ImageSet, h_test: Tensor, test: ImageSet) -> None:
    """Save ten test images, each with its eight nearest training images in colored frames."""
    side = bank.side
    queries = torch.randperm(len(test), generator=common.generator(0))[:10]
    cosine = F.normalize(h_test[queries], dim=1) @ F.normalize(h, dim=1).T
    nearest = cosine.topk(min(8, len(bank)), dim=1).indices.cpu()
    images = bank.centers(nearest.flatten(), side).unflatten(0, nearest.shape)
    images = torch.cat([test.centers(queries, side)[:, None], images], dim=1).flatten(0, 1)

    white_green_red = torch.tensor([[1, 1, 1], [0.1, 0.7, 0.2], [0.9, 0.1, 0.1]])
    is_other = bank.labels[nearest] != test.labels[queries, None]
    color = F.pad(is_other + 1, (1, 0)).flatten()  # 0 for the test image, then 1 or 2
    frame = math.ceil(side / 20)
    framed = white_green_red[color][:, :, None, None].repeat(
        1, 1, side + 2 * frame, side + 2 * frame
    )
    framed[:, :, frame:-frame, frame:-frame] = images.cpu()
    common.save_pictures(path, framed, 1 + nearest.shape[1])


def save_map(path: Path, h_test: Tensor, test: ImageSet) -> None:
    """Save up to 1,000 test images at the place of their first two principal components."""
    sample = torch.randperm(len(test), generator=common.generator(0))[:1000]
    coordinates = h_test @ common.principal_axes(h_test, 2, seed=0)
    images = test.centers(sample, min(32, test.side))
    picture = common.draw_map(coordinates[sample.to(h_test.device)], images, test.labels[sample])
    common.save_pictures(path, picture[None], 1)


def prepare_record(path: Path) -> None:
    """Fail now if the result could not be added to eval.json in the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        common.fail(f"{path} cannot be written ({error}): choose another --out")
    read_record(path)


def read_record(path: Path) -> list:
    """The results so far, from eval.json.

    Raises:
        SystemExit: if the file is something else. The message is one line.
    """
    try:
        results = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        common.fail(f"{path} cannot be used ({error}): choose another --out")
    if not isinstance(results, list):
        common.fail(f"{path} holds no list of results: choose another --out")
    return results


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------


def label_count(text: str) -> float:
    """A type for --labels: a whole number, or a share below 1."""
    value = common.positive_float(text)
    if value > 1 and value % 1:
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number nor a share below 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "linear_eval.py",
        description=__doc__.splitlines()[0],
        formatter_class=common.HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = common.fail
    parser.add_argument(
        "encoder", help="encoder.safetensors of these scripts, another checkpoint, or random"
    )
    common.add_data_arguments(parser, data=None)

    add = parser.add_argument_group("encoder").add_argument
    add(
        "--image-size",
        type=common.int_above_1,
        help="side of the images in pixels (default: as in training)",
    )
    add(
        "--normalize",
        choices=common.STATISTICS,
        help="mean and standard deviation with which the inputs are normalized (default: as in "
        "training; imagenet for other repositories' files, none for random)",
    )
    add(
        "--arch",
        choices=common.ARCHITECTURES,
        help="architecture of the random encoder (default: resnet18)",
    )
    add(
        "--stem",
        choices=("3x3", "7x7"),
        help="first layer of the random encoder (default: 3x3 up to 64 pixels)",
    )

    add = parser.add_argument_group("protocol").add_argument
    add(
        "--protocol",
        choices=(*ON_FEATURES, "linear-augmented", "finetune"),
        default="linear",
        help="how the encoder is evaluated",
    )
    add(
        "--holdout",
        type=common.positive_int,
        help="training images to leave out and to evaluate on, instead of on the test images",
    )
    add(
        "--labels",
        type=label_count,
        help="labeled images of each class or, below 1, their share (default: all)",
    )
    add(
        "--seeds",
        type=common.positive_int,
        help="number of runs, with seeds from 0 on (default: 3, or 1 for linear-augmented and "
        "finetune)",
    )
    add("--knn-k", type=common.positive_int, help="number of neighbors of knn (default: 20)")
    add(
        "--knn-temperature",
        type=common.positive_float,
        help="temperature of the votes of knn (default: 0.07)",
    )
    add(
        "--recipe",
        choices=RECIPES,
        help="whose recipe linear-augmented uses (default: that of the encoder's method, or else "
        "simclr)",
    )
    add(
        "--epochs",
        type=common.positive_int,
        help="epochs of linear-augmented and finetune (default: the recipe's)",
    )
    add(
        "--lr",
        type=common.positive_float,
        help="initial learning rate of linear-augmented and finetune (default: the recipe's, "
        "scaled with the batch size)",
    )
    add(
        "--batch-size",
        type=common.positive_int,
        help="images per step over all processes (default: the recipe's) or, for linear and knn, "
        "per forward pass (default: 256 per process)",
    )

    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, help="folder of the results (default: that of the encoder)")
    add("--features", type=Path, help="new .npz file for the features of linear and knn")

    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags, and refuse those that would have no effect."""
    args = build_parser().parse_args(argv)
    for name, protocols in USED_BY.items():
        if vars(args)[name] is not None and args.protocol not in protocols:
            flag = name.replace("_", "-")
            common.fail(f"--{flag} has no effect with --protocol {args.protocol}: leave it out")
    if args.encoder != "random" and (args.arch or args.stem):
        common.fail("--arch and --stem are only for random: leave them out, a file names its own")
    if args.features:
        try:
            is_new = args.features.parent.is_dir() and not args.features.exists()
        except OSError:  # The folder may not be searched, or the name is too long.
            is_new = False
        if not is_new:
            common.fail(f"--features {args.features} must be a new file in an existing folder")
    if args.protocol == "knn":
        args.knn_k = args.knn_k or common.KNN_K
        args.knn_temperature = args.knn_temperature or common.KNN_TEMPERATURE
    return args


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


def input_statistics(
    choice: str | None, about: dict[str, str], is_foreign: bool
) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel with which inputs are normalized.

    Args:
        choice: --normalize. Without it, they are what the encoder's file says.
        about: the metadata of the file.
        is_foreign: whether the encoder is another repository's. The default is ImageNet's then.

    Raises:
        SystemExit: if the file's mean and standard deviation are not JSON. The message is one line.
    """
    if choice is None and "mean" in about:
        try:
            return json.loads(about["mean"]), json.loads(about["std"])
        except (KeyError, ValueError):
            common.fail("the encoder's file gives no mean and std as JSON: use --normalize")
    mean, std = common.STATISTICS[choice or ("imagenet" if is_foreign else "none")]
    return list(mean), list(std)


def draw_labeled(args: argparse.Namespace, bank: ImageSet, seeds: int) -> list[Tensor]:
    """The labeled training images of each seed, as indices."""
    if args.labels is None:
        draws = [torch.arange(len(bank))] * seeds
    else:
        least = int(bank.labels.bincount().min())
        if args.labels >= 1 and args.labels > least:
            common.fail(f"--labels {args.labels:g} is too many: a class has only {least} images")
        draws = [
            common.draw_per_class(bank.labels, args.labels, common.generator(seed))
            for seed in range(seeds)
        ]
    needed = args.knn_k if args.protocol == "knn" else 2
    if len(draws[0]) < needed:
        common.fail(
            f"there are only {len(draws[0])} labeled images, but {needed} are needed: use a higher "
            "--labels or --limit, or for knn a lower --knn-k"
        )
    return draws


def describe(args: argparse.Namespace, recipe_name: str, recipe: Recipe) -> str:
    """The protocol and its settings, in words."""
    if args.labels is None:
        labels = "all labels"
    elif args.labels < 1:
        labels = f"{100 * args.labels:g} % of the labels"
    else:
        labels = f"{args.labels:g} labels per class"
    text = args.protocol
    if args.protocol == "knn":
        text = f"kNN, k = {args.knn_k}, T = {args.knn_temperature}"
    elif args.protocol == "linear-augmented":
        text = f"{args.protocol}, {recipe_name}"
    if args.protocol in ON_CROPS:
        text += f", learning rate {recipe.lr:.4g}, batch size {recipe.batch_size}"
        text += f", {recipe.epochs} epochs"
    return f"{text}, {labels}"


def accuracy_per_class(
    hits: list[Tensor], labels: Tensor, classes: Sequence[str]
) -> dict[str, float]:
    """The accuracy on the test images of each class that has any, in percent.

    Args:
        hits: for each seed, whether it classified each test image correctly, [M] bool.
        labels: [M].
        classes: their names.
    """
    correct = 100 * torch.stack(hits).float().mean(0)
    accuracies = {}
    for i, name in enumerate(classes):
        of_class = labels == i
        if of_class.any():
            accuracies[name] = correct[of_class].mean().item()
    return accuracies


def check_unchanged(encoder: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise RuntimeError if the evaluation has changed the encoder."""
    changed = [
        name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])
    ]
    if changed:
        raise RuntimeError(f"the evaluation changed the frozen encoder: {changed}")


def main(argv: list[str] | None = None) -> None:  # noqa: C901, PLR0912, PLR0915
    """Evaluate an encoder, print the table and add the result to eval.json."""
    args = parse_arguments(argv)
    torch.backends.cudnn.benchmark = True  # All steps have the same shapes.
    accelerator = common.start_accelerator()
    common.check_agreement(vars(args))
    device = accelerator.device
    processes = accelerator.num_processes

    # Encoder: one of these scripts, another repository's (with a note on what was used), or random.
    is_random = args.encoder == "random"
    about = {}
    note = ""
    if not is_random:
        encoder, about, note = common.on_main_process(open_encoder, args.encoder)
    is_foreign = bool(note)
    if is_foreign and not args.data:
        common.fail(f"--data is needed: {args.encoder} does not say what it was trained on")

    # Data, and the labeled images of each seed. With --holdout, the images that are set aside (the
    # validation images) take the place of the test images.
    data = args.data or about.get("data", "fashion-mini")
    _, bank, _, test = common.load_splits(
        data, args.root, args.limit, device, args.workers, args.stream, args.holdout
    )
    if not bank:
        common.fail(
            f"--data {data} has no labels: use a folder with train and val or test, each with one "
            f"folder per class, an .npz file with labels, or one of {', '.join(common.SETS)}"
        )
    num_classes = int(bank.labels.max()) + 1
    size = args.image_size or int(about.get("image_size", bank.side))
    if is_random:
        stem = args.stem or ("3x3" if size <= 64 else "7x7")
        about = {"architecture": args.arch or "resnet18", "stem": stem}
    mean, std = input_statistics(args.normalize, about, is_foreign)
    if is_foreign:
        accelerator.print(f"{args.encoder}: {note}")
    accelerator.print(f"inputs are normalized with mean {mean} and standard deviation {std}")
    on_features = args.protocol in ON_FEATURES
    seeds = args.seeds or (3 if on_features else 1)
    if args.protocol == "knn" and args.labels is None and not is_random:
        seeds = 1
        accelerator.print("kNN with all labels leaves nothing to chance: it runs once")
    draws = draw_labeled(args, bank, seeds)

    # The recipe, which only training on crops uses, and the file for the results.
    recipe_name, recipe = choose_recipe(args, about, len(draws[0]), len(bank))
    if not on_features and (recipe.batch_size < 2 or recipe.batch_size % processes):
        common.fail(
            f"--batch-size {recipe.batch_size} (at most the number of labeled images) must be at "
            f"least 2 and a multiple of {processes}, the number of processes"
        )
    images_at_once = 256  # on each process, for features
    if args.batch_size:
        images_at_once = max(1, args.batch_size // processes)
    description = describe(args, recipe_name, recipe)
    if args.out is None and is_random:
        data_name = Path(data).absolute().name.removesuffix(".npz")
        args.out = Path("runs", f"random-{about['architecture']}-{data_name}")
    elif args.out is None:
        args.out = Path(args.encoder).parent
    record = args.out / "eval.json"
    common.on_main_process(prepare_record, record)
    accelerator.print(f"evaluating {args.encoder} on {data}: {description}")

    # Each seed's evaluation.
    runs = []
    hits = []  # whether each test image was classified correctly
    for seed, labeled in enumerate(draws):
        # Each seed draws a new random encoder. Other encoders need their features only once.
        if is_random:
            torch.manual_seed(seed)
            encoder = common.build_encoder(about["architecture"], about["stem"])
        if is_random or seed == 0:
            network = nn.Sequential(Normalize(mean, std), encoder)
            network = network.to(device, memory_format=torch.channels_last)
            original = {name: value.clone() for name, value in network.state_dict().items()}
            if on_features:
                h = common.extract_features(network, bank, size, images_at_once)
                h_test = common.extract_features(network, test, size, images_at_once)

        y = bank.labels[labeled]
        chosen = {}  # what the probe has chosen
        if on_features:
            x = h if args.labels is None else h[labeled.to(device)]
        if args.protocol == "knn":
            scores = common.knn_predict(x, y, h_test, args.knn_k, args.knn_temperature, num_classes)
        elif args.protocol == "linear":
            scores, chosen = common.linear_probe(x, y, h_test, num_classes, seed)
        else:
            frozen = args.protocol == "linear-augmented"
            start = network if frozen else copy.deepcopy(network)
            images = bank if args.labels is None else bank.take(labeled)
            trained = train(start, images, num_classes, size, recipe, frozen, seed, accelerator)
            scores = common.extract_features(trained, test, size, images_at_once)
        if not scores.isfinite().all():
            common.fail(
                f"the scores of seed {seed} are not finite: use a lower --lr or another encoder"
            )
        check_unchanged(network, original)

        run = {"seed": seed} | chosen
        run["top-1"] = common.accuracy(scores, test.labels, 1)
        run["top-5"] = common.accuracy(scores, test.labels, 5)
        runs.append(run)
        hits.append(scores.argmax(1).cpu() == test.labels)

    # Results: printed, drawn, and added to eval.json.
    summary = {}
    for metric in ("top-1", "top-5"):
        summary[metric] = common.summarize([run[metric] for run in runs], len(test))
    printed = []
    for run in runs:
        # With one decimal, like the accuracies, a small weight decay would be printed as 0.
        digits = {name: f"{run[name]:g}" for name in ("weight_decay", "held-out") if name in run}
        printed.append(run | digits)
    accelerator.print(
        f"{common.format_table(printed)}\n{data}, {description}, seeds: {len(runs)}\n"
        f"in percent, with the 95 % interval for {len(test)} images:\n"
        f"{common.format_table([summary])}"
    )
    if on_features:
        save_neighbors(args.out / "neighbours.png", h, bank, h_test, test)
        save_map(args.out / "features.png", h_test, test)
    if args.features:
        arrays = {"train": h, "train_labels": bank.labels, "test": h_test}
        common.save_arrays(args.features, arrays | {"test_labels": test.labels})
    if not accelerator.is_main_process:
        return

    settings = {}
    for name, value in vars(args).items():
        if value and name not in ("arch", "stem", "normalize"):  # See below for what they led to.
            settings[name] = value if isinstance(value, int | float) else str(value)
    settings |= {"architecture": about["architecture"], "stem": about["stem"], "seeds": len(runs)}
    settings |= {"data": data, "image_size": size, "mean": mean, "std": std}
    result = {
        "how": description,
        "settings": settings,
        "torch": version("torch"),
        **summary,
        "per-class": accuracy_per_class(hits, test.labels, bank.classes),
        "runs": runs,
    }
    common.write_json(record, [*read_record(record), result])  # read again: others may add to it
    accelerator.print(f"wrote {record}")


if __name__ == "__main__":
    with common.entry_point("nothing was recorded; run the same command to start over"):
        main()
