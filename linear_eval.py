# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""Evaluation of an encoder: linear probes, nearest neighbors, fine-tuning.

    python linear_eval.py runs/simclr-fashion-mini/encoder.safetensors --labels 10 --seeds 5
    python linear_eval.py random --arch small --data fashion-mini --protocol knn
    accelerate launch linear_eval.py FILE --arch resnet50 --data FOLDER --protocol linear-augmented

ENCODER is an encoder.safetensors of these scripts, another repository's checkpoint of a ResNet, or
`random`, an untrained encoder. The protocols:
- linear: logistic regression on the features of the images' middle squares (`common.linear_probe`)
- knn: weighted k nearest neighbors (Wu et al. 2018, section 3.4; `common.knn_predict`)
- linear-augmented: a linear layer on random crops and flips, as one of the methods' authors train
  it (`RECIPES`)
- finetune: all weights on random crops and flips, as SimCLR's authors do (Appendix B.5)

The test images are used once, at the end. An encoder runs in eval mode and stays as it is, bit by
bit; finetune trains a copy. A seed draws the labeled images, the held-out ones of the probe, the
new layer, the batches, the crops and a random encoder.

Differences from the authors' recipes:
- Learning rates change step by step, not once per epoch.
- The new layer starts from PyTorch's own initialization.
- SimCLR's recipe and fine-tuning have batch size 256 by default, with the learning rate for it.
- Crops have at least 0.08 of the area, in SupCon's recipe too (0.2).
- Fine-tuning takes at least 500 steps, also where 60 epochs are fewer.

What it leaves in --out:
- eval.json, a list to which each evaluation adds its settings and its result
- neighbours.png (linear and knn): test images (left), and the training images nearest to each, in a
  green frame if the class is the same and in a red one if not
"""

import argparse
import copy
import json
import math
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import common
from common import Images, RandomResizedCrop


class Recipe(NamedTuple):
    """SGD with momentum 0.9, with a cosine down to 0 or with drops by a factor."""

    lr: float  # at this batch size
    batch_size: int
    epochs: int
    weight_decay: float = 0.0
    nesterov: bool = False
    factor: float = 1.0
    drops: tuple[float, ...] = ()  # shares of the training


RECIPES = {
    "simclr": Recipe(0.1, 256, 90, nesterov=True),
    "moco": Recipe(30, 256, 100, factor=0.1, drops=(0.6, 0.8)),
    "swav": Recipe(0.3, 256, 100, weight_decay=1e-6),
    "supcon": Recipe(5, 512, 100, factor=0.2, drops=(0.6, 0.75, 0.9)),
}
FINETUNE = Recipe(0.05, 256, 30, nesterov=True)
# The flags that only some protocols use.
USED_BY = {
    "linear": (),
    "knn": ("knn_k", "knn_temperature"),
    "linear-augmented": ("recipe", "epochs", "lr", "batch_size"),
    "finetune": ("epochs", "lr", "batch_size"),
}


def draw_labeled(labels: Tensor, amount: float | None, seed: int) -> Tensor:
    """Draw the training images whose labels are used.

    Args:
        labels: [N] classes of the training images.
        amount: images of each class or, below 1, the share of each class; None for all images.
        seed: of the draw.

    Returns:
        Their indices, sorted by class unless they are all.
    """
    if amount is None:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=common.generator(seed))
    drawn = []
    for label in labels.unique():
        members = order[labels[order] == label]
        wanted = int(amount) if amount >= 1 else max(1, round(amount * len(members)))
        if wanted > len(members):
            common.fail(f"--labels {wanted} is too many: a class has only {len(members)} images")
        drawn.append(members[:wanted])
    return torch.cat(drawn)


def adapt(recipe: Recipe, args: argparse.Namespace, num_labeled: int, num_images: int) -> Recipe:
    """A recipe with the flags' epochs, learning rate and batch size, or else its own.

    Its learning rate is proportional to the batch size. As SimCLR's authors do, fine-tuning is
    twice as long with few labels.
    """
    batch_size = min(num_labeled, args.batch_size or recipe.batch_size)
    epochs = recipe.epochs
    if recipe is FINETUNE:
        if num_labeled < 0.05 * num_images:
            epochs = 2 * epochs
        epochs = max(epochs, math.ceil(500 / (num_labeled // batch_size)))
    lr = args.lr or recipe.lr * batch_size / recipe.batch_size
    return recipe._replace(lr=lr, batch_size=batch_size, epochs=args.epochs or epochs)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate at a step from 0 to steps - 1."""
    if recipe.drops:
        drops = sum(step >= round(share * steps) for share in recipe.drops)
        return recipe.lr * recipe.factor**drops
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    encoder: nn.Module,
    images: Images,
    size: int,
    recipe: Recipe,
    frozen: bool,
    accelerator: Accelerator,
    seed: int,
) -> nn.Module:
    """Train a linear layer on an encoder, and a copy of the encoder too unless it is frozen.

    Only fine-tuning on several GPUs shares the steps. Otherwise every process makes the same step
    on the whole batch, of which each has computed a part of the crops and of the frozen features:
    that is exact also with batch norm, which cannot be synchronized on CPUs.

    Args:
        encoder: x [B, 3, size, size] -> h [B, encoder.width].
        images: the labeled training images.
        size: side of the crops, in pixels.
        recipe: how to train.
        frozen: leave the encoder as it is, in eval mode.
        accelerator: of the run.
        seed: of the layer, the batches and the crops.

    Returns:
        The encoder with its layer: x -> logits [B, classes].
    """
    torch.manual_seed(seed)
    layer = nn.Linear(encoder.width, images.num_classes).to(accelerator.device)
    network = nn.Sequential(encoder if frozen else copy.deepcopy(encoder), layer)
    network.train(not frozen)
    # `fixed` runs without gradients; `model` is trained on its output.
    fixed, model = (encoder, layer) if frozen else (nn.Identity(), network)
    is_shared = not frozen and accelerator.num_processes > 1 and accelerator.device.type == "cuda"
    if is_shared:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        model = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(
        model.parameters(),
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )

    steps = recipe.epochs * (len(images) // recipe.batch_size)
    crops = [(1, [RandomResizedCrop(size)])]
    batches = common.batches(images, crops, recipe.batch_size, seed, range(steps))
    for step in common.progress(range(steps), f"seed {seed}"):
        index, (views,) = next(batches)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, steps)
        x = views[0].contiguous(memory_format=torch.channels_last)
        y = common.to_device_of(x, images.labels[index])
        with torch.no_grad(), accelerator.autocast():
            x = fixed(x).float()
        if not is_shared:
            x, y = accelerator.gather((x, y))
        with accelerator.autocast():
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def save_neighbors(
    path: Path, h: Tensor, bank: Images, h_test: Tensor, test: Images, size: int
) -> None:
    """Save ten test images, each with its eight nearest training images in colored frames.

    Args:
        path: of the picture.
        h, bank: features [N, D] of the training images, and the images.
        h_test, test: features [M, D] of the test images, and the images.
        size: side at which they are shown, in pixels.
    """
    queries = torch.randperm(len(test), generator=common.generator(0))[:10]
    cosine = F.normalize(h_test[queries], dim=1) @ F.normalize(h, dim=1).T
    nearest = cosine.topk(min(8, len(bank)), dim=1).indices.cpu()  # [10, 8]
    shown = torch.cat(list(common.middles(test, queries, size))).cpu()[:, None]
    neighbors = torch.cat(list(common.middles(bank, nearest.flatten(), size))).cpu()
    shown = torch.cat([shown, neighbors.unflatten(0, nearest.shape)], dim=1).flatten(0, 1)

    white_green_red = torch.tensor([[1, 1, 1], [0.1, 0.7, 0.2], [0.9, 0.1, 0.1]])
    differs = bank.labels[nearest] != test.labels[queries, None]
    color = white_green_red[F.pad(differs + 1, (1, 0)).flatten()]  # white for the test image
    width = math.ceil(size / 20)
    framed = color[:, :, None, None].repeat(1, 1, size + 2 * width, size + 2 * width)
    framed[:, :, width:-width, width:-width] = shown
    common.save_pictures(path, framed, 1 + nearest.shape[1])


def label_amount(text: str) -> float:
    """A type for --labels: a whole number or, below 1, a share."""
    value = float(text)
    if not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise ValueError
    return value


label_amount.__name__ = "whole number or share below 1"  # for the message of argparse


def main(argv: list[str] | None = None) -> None:
    """Evaluate an encoder, print the accuracies and add them to eval.json."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=common.HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = common.fail
    add = parser.add_argument_group("evaluation").add_argument
    add("encoder", help="encoder.safetensors, another repository's checkpoint, or random")
    add("--protocol", choices=USED_BY, default="linear", help="how it is evaluated")
    add("--labels", type=label_amount, help="labels of each class, or their share (default: all)")
    add("--seeds", type=common.count, default=1, help="number of runs, with seeds from 0 on")
    add("--out", type=Path, help="folder of the results (default: that of the encoder)")

    add = parser.add_argument_group("data").add_argument
    add("--data", help=f"{', '.join(common.SETS)}, a folder or an .npz file (default: as trained)")
    add("--root", default="data", help="where torchvision's sets are, or are downloaded to")
    add("--limit", type=common.number(int, 2), help="use a subset of this many training images")
    workers = min(16, os.cpu_count() // common.LOCAL_PROCESSES)
    add(
        "--workers", type=common.not_negative_int, default=workers, help="processes that read files"
    )
    add(
        "--image-size", type=common.count, help="side of the encoder's inputs (default: as trained)"
    )

    add = parser.add_argument_group("random and other repositories' encoders").add_argument
    add(
        "--arch",
        choices=common.ARCHITECTURES,
        help="architecture (default: resnet18, of others resnet50)",
    )
    add("--stem", choices=("3x3", "7x7"), help="of random (default: 3x3 up to 64 pixels)")

    add = parser.add_argument_group("knn").add_argument
    add("--knn-k", type=common.count, default=20, help="how many neighbors vote")
    add("--knn-temperature", type=common.positive, default=0.07, help="temperature of the votes")

    add = parser.add_argument_group("linear-augmented and finetune").add_argument
    add("--recipe", choices=RECIPES, default="simclr", help="whose recipe linear-augmented uses")
    add("--epochs", type=common.count, help="passes over the images (default: the recipe's)")
    add("--batch-size", type=common.number(int, 2), help="images a step (default: the recipe's)")
    add("--lr", type=common.positive, help="first learning rate (default: by recipe and batch)")
    args = parser.parse_args(argv)

    accelerator = common.start()
    device = accelerator.device
    about = {}
    if args.encoder != "random":
        encoder, about = common.load_encoder(args.encoder, args.arch)
    args.data = args.data or about.get("data")
    if not args.data:
        common.fail(f"--data is needed, since {args.encoder} does not say on what it was trained")
    _, bank, test = common.load_splits(args.data, args.root, args.limit, device, args.workers)
    if test is None:
        common.fail(f"--data {args.data} has no labeled training and test images: use another")

    # What the flags leave open.
    args.image_size = args.image_size or about.get("image_size") or min(224, *bank.size)
    args.arch = about.get("architecture") or args.arch or "resnet18"
    args.stem = about.get("stem") or args.stem or ("3x3" if args.image_size <= 64 else "7x7")
    if args.out is None and args.encoder == "random":
        args.out = Path("runs", f"random-{args.arch}-{Path(args.data).stem}")
    args.out = args.out or Path(args.encoder).parent

    draws = [draw_labeled(bank.labels, args.labels, seed) for seed in range(args.seeds)]
    recipe = FINETUNE if args.protocol == "finetune" else RECIPES[args.recipe]
    recipe = adapt(recipe, args, len(draws[0]), len(bank))
    args.lr, args.batch_size, args.epochs = recipe.lr, recipe.batch_size, recipe.epochs
    trains = args.protocol in ("linear-augmented", "finetune")
    if trains and args.batch_size % accelerator.num_processes:
        common.fail(
            f"--batch-size {args.batch_size} (at most the number of labeled images) must be a "
            f"multiple of {accelerator.num_processes}, the number of processes"
        )
    names = ["encoder", "data", "limit", "image_size", "arch", "stem", "protocol", "labels"]
    settings = {name: vars(args)[name] for name in (*names, *USED_BY[args.protocol])}
    accelerator.print(", ".join(f"{name} {value}" for name, value in settings.items() if value))

    runs = []
    for seed, labeled in enumerate(draws):
        if args.encoder == "random":
            torch.manual_seed(seed)
            encoder = common.build_encoder(args.arch, args.stem)
        encoder = encoder.to(device, memory_format=torch.channels_last)
        before = copy.deepcopy(encoder.state_dict())
        y = bank.labels[labeled]

        if not trains and (seed == 0 or args.encoder == "random"):
            h, h_test = (common.extract_features(encoder, s, args.image_size) for s in (bank, test))
            if not (h.isfinite().all() and h_test.isfinite().all()):
                common.fail(f"the features of {args.encoder} are not finite: use another encoder")
        if args.protocol == "linear":
            scores = common.linear_probe(h[labeled], y, h_test, seed)
        elif args.protocol == "knn":
            vote = (args.knn_k, args.knn_temperature)
            scores = common.knn_predict(h[labeled], y, h_test, *vote)
        else:
            images = bank if args.labels is None else bank.take(labeled)
            frozen = args.protocol == "linear-augmented"
            network = train(encoder, images, args.image_size, recipe, frozen, accelerator, seed)
            scores = common.extract_features(network, test, args.image_size)  # the logits
        if not scores.isfinite().all():
            common.fail(f"the scores of seed {seed} are not finite: use a lower --lr")
        after = encoder.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "encoder changed"

        runs.append({"seed": seed, "top-1": common.accuracy(scores, test.labels)})
        if scores.shape[1] > 5:
            hits = scores.topk(5).indices.cpu() == test.labels[:, None]
            runs[-1]["top-5"] = 100 * hits.any(1).float().mean().item()

    # Print the accuracies, save the picture, and add the result to eval.json.
    metrics = [name for name in runs[0] if name != "seed"]
    mean = {name: statistics.mean(run[name] for run in runs) for name in metrics}
    result = settings | {"runs": runs, "mean": mean}
    error = 196 * math.sqrt(0.25 / len(test))  # at most: 1.96 standard errors of a share of 1/2
    accelerator.print(f"accuracy on {len(test)} test images in percent, ± {error:.1f}")
    accelerator.print("\n".join(common.describe(run) for run in runs))
    if len(runs) > 1:
        result["std"] = {name: statistics.stdev(run[name] for run in runs) for name in metrics}
        accelerator.print(common.describe({"seed": "mean"} | mean))
        accelerator.print(common.describe({"seed": "std"} | result["std"]))
    if not trains:
        save_neighbors(args.out / "neighbours.png", h, bank, h_test, test, args.image_size)
    if accelerator.is_main_process:
        path = args.out / "eval.json"
        results = json.loads(path.read_text()) if path.exists() else []
        with common.atomic_write(path) as file:
            file.write_text(json.dumps([*results, result], indent=1))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
