# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SupCon: Supervised Contrastive Learning, and its cross-entropy baseline.

Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu and Krishnan, NeurIPS 2020,
https://arxiv.org/abs/2004.11362

    python supcon.py                                    # the bundled images, on a laptop
    python supcon.py --loss ce                          # the same encoder by cross-entropy
    accelerate launch --num_processes 1 --mixed_precision bf16 supcon.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 supcon.py --data FOLDER --batch-size 4096

The run is kept in --out. It can be stopped at any time; the same command resumes it from its last
checkpoint, and it ends as if it had never been stopped.

Where to find the parts of the paper:
- Eq. 2, L_out, and Eq. 3, L_in: `supcon_loss`
- section 3.1, stage 1 (encoder, projection head, two views): the inner loop of `main`
- section 3.1, stage 2 (a linear classifier): the table at the end of the run, and linear_eval.py
- section 3.2.3, triplet and N-pairs losses as special cases: the docstring of `supcon_loss`
- the number of positives: --max-positives
- batches larger than the memory, which are not in the paper: --chunk-size, `embed_in_chunks`

Differences from the paper and the authors' code:
- The loss is the mean over the anchors that have a positive; Eq. 2 and 3 are sums. It has no other
  factor. The authors' PyTorch code multiplies it by temperature / 0.07, their TensorFlow code by
  the temperature. So losses and learning rates are not on their scale.
- --max-positives leaves the denominator as it is; the authors' TensorFlow code takes the other
  positives out of it.
- The optimizer is SGD or AdamW; for ImageNet the paper used LARS.
- Inputs are normalized, as in the authors' PyTorch code, but by default with ImageNet's mean and
  standard deviation for all data (--normalize).
- The augmentation is SimCLR's. Cross-entropy is trained on the same two views.
- The defaults depend on the images (`PRESETS`). Those of --preset paper are those of the authors'
  PyTorch code, but with the paper's 350 epochs and batch size 256.
- --label-noise changes the labels for training only. The evaluation uses the true ones.
- On CPUs each process has its own batch norm statistics, because PyTorch synchronizes them only on
  GPUs.

The authors' experiments, with the accuracy that they report. They were not run here:
- CIFAR-10 (96.0 %; cross-entropy 95.0 %): --data cifar10 --preset paper --arch resnet50
  --batch-size 1024 --epochs 1000 --normalize cifar10
- ImageNet (78.7 %, theirs with LARS and AutoAugment): --data FOLDER --preset paper --arch resnet50
  --batch-size 4096 --eval-every 20

How to adapt it:
- Your own encoder: add it to `common.build_encoder`, under a name in `common.ARCHITECTURES`. It
  maps images [B, 3, H, W] to features [B, width] and has an attribute `width`.
- Channels other than RGB: change `common.read_image`, which reads files, and the first layer in
  `common.build_encoder`; leave out the operations "color" and "gray" (--augment crop blur).
"""

import argparse
import itertools
import json
import math
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, RandomApply, RandomResizedCrop, grayscale

# Defaults that depend on the data; see `common.choose_preset`. Flags given on the command line take
# precedence.
PRESETS = {
    "fashion-mini": {
        "batch_size": 256,
        "arch": "small",
        "hidden": 512,
        "epochs": 36,
        "optimizer": "adamw",
        "warmup_epochs": 1.0,
    },
    "small": {
        "optimizer": "adamw",
    },
    "photos": {
        "optimizer": "adamw",
    },
    "paper": {
        "batch_size": 256,
        "epochs": 350,
    },
}
OPERATIONS = ("crop", "color", "gray", "blur")
PEAK_LR = {"sgd": 0.125, "adamw": 0.0007}  # at batch size 256
SMALL_NETWORK_PEAK_LR = PEAK_LR | {"adamw": 0.004}  # for --arch small, which takes a higher one
LOSSES = ("out", "in", "ce")
# Shown besides loss, chance, spread and speed, for each --loss.
CONSOLE_METRICS = {"out": ("knn",), "in": ("knn",), "ce": ("knn", "classifier")}
MAY_CHANGE = ("root", "workers", "out", "eval_every", "log_with")  # when a run is resumed
SAVE_MINUTES = 10  # A longer epoch also saves checkpoints midway.
RUN_FORMAT = 5  # of the files in --out; runs of another format are refused


# --------------------------------------------------------------------------------------
# Augmentation (that of SimCLR) and label noise
# --------------------------------------------------------------------------------------


def augmentation(names: list[str], size: int, crop_scale: float, strength: float) -> list:
    """Build the operations that make one view, in SimCLR's order.

    Args:
        names: which of OPERATIONS to use.
        size: side of the views, in pixels.
        crop_scale: area of the smallest crop, as a share of the image's area.
        strength: strength s of the color jitter.

    Returns:
        Operations for `common.batches`, of which the first is a crop.
    """
    kernel_size = size // 10 | 1  # a tenth of the side, and odd
    jitter = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, min(0.2 * strength, 0.5))
    operations = {
        "crop": RandomResizedCrop(size, scale=(crop_scale, 1.0), flip=0.5),
        "color": RandomApply(jitter, p=0.8),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(kernel_size, sigma=(0.1, 2.0)), p=0.5),
    }
    if "crop" not in names:  # The middle square is shown, and not flipped.
        operations["crop"] = RandomResizedCrop(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    return [operation for name, operation in operations.items() if name in ("crop", *names)]


def mislabel(labels: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Give a share of the labels [N] another class, drawn at random."""
    rng = common.generator(seed)
    chosen = torch.randperm(len(labels), generator=rng)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=rng)
    return labels.index_copy(0, chosen, (labels[chosen] + shift) % num_classes)


def share_alone(labels: Tensor, batch_size: int) -> float:
    """The expected share of the images of a batch that are the only one of their class."""
    share = labels.bincount() / len(labels)  # of each class
    return (share * (1 - share) ** (batch_size - 1)).sum().item()


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def supcon_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    variant: str = "out",
    max_positives: int | None = None,
) -> Tensor:
    """Supervised contrastive loss, mean over all anchors: the views that have a positive.

    With P(i) the other views of anchor i's class, and A(i) all views but i,

        p[i, j] = exp(z[i]·z[j] / tau) / sum over a in A(i) of exp(z[i]·z[a] / tau)
        "out" (Eq. 2): loss of i = -mean over j in P(i) of log p[i, j]
        "in" (Eq. 3):  loss of i = -log( mean over j in P(i) of p[i, j] )

    With unique labels it is NT-Xent. With one view, temperature 1 and two images of each class it
    is what the paper calls the N-pairs loss. With one positive p and one negative n, of unit
    length, the loss of anchor a is ln 2 + (|a - p|^2 - |a - n|^2) / (4 tau) + O(x^2), where
    x = (|a - p|^2 - |a - n|^2) / (2 tau): a triplet loss up to scale and constant, for x near 0.

    Args:
        z: [N, V, D] embeddings of V views of N images. They are used as they are; the paper's have
            unit length.
        labels: [N].
        temperature: tau > 0.
        variant: "out" or "in".
        max_positives: the most positives that an anchor may have. Its own views come first, then
            those of the next images of its class in batch order, wrapping around. A(i) stays.

    Returns:
        Scalar; ln(NV - 1) if all embeddings are equal, 0 if no anchor has a positive.

    Raises:
        ValueError: if the shapes do not match, the variant is unknown, or max_positives is below 1.
    """
    if z.ndim != 3 or labels.shape != z.shape[:1] or variant not in ("out", "in"):
        raise ValueError(
            f"z must be [N, V, D], labels [N] and variant out or in, got {z.shape}, "
            f"{labels.shape} and {variant}"
        )
    if max_positives is not None and max_positives < 1:
        raise ValueError(f"max_positives must be at least 1, got {max_positives}")
    V = z.shape[1]
    z, labels = z.flatten(0, 1), labels.repeat_interleave(V)
    positive = labels[:, None] == labels  # [NV, NV]
    positive.fill_diagonal_(False)
    if max_positives:
        positive = keep_first(positive, V, max_positives)

    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # leaves i out of the denominator, the sum over A(i)
    log_p = similarity.log_softmax(1)
    count = positive.sum(1).clamp(min=1).to(z.dtype)  # |P(i)|
    has_positive = positive.any(1)
    if variant == "out":
        loss = -log_p.masked_fill(~positive, 0).sum(1) / count
    else:
        # Anchors without a positive get a finite value first, or their gradient would be NaN.
        included = positive | ~has_positive[:, None]
        loss = count.log() - log_p.masked_fill(~included, -torch.inf).logsumexp(1)
    return loss.masked_fill(~has_positive, 0).sum() / has_positive.sum().clamp(min=1)


def keep_first(positive: Tensor, V: int, most: int) -> Tensor:
    """Keep the first `most` positives of each anchor in the mask [NV, NV].

    They are counted in the order of the batch, from the first view of the anchor's own image on,
    wrapping around.
    """
    column = torch.arange(len(positive), device=positive.device)
    start = (column // V * V)[:, None]  # of each anchor, the first view of its image
    in_order = positive.gather(1, (column + start) % len(column))
    kept = in_order & (in_order.cumsum(1) <= most)
    return kept.gather(1, (column - start) % len(column))


def gather(z: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather z [n, ...] of all P processes as [P * n, ...]. Gradient flows only to one's own rows.

    Every process computes the whole loss, so the gradient with respect to its own rows is already
    complete. DDP then averages the parameter gradients over the processes, hence the factor P.
    """
    P = accelerator.num_processes
    parts = list(accelerator.gather(z.detach()).chunk(P))
    # The value of z, with its gradient multiplied by P.
    parts[accelerator.process_index] = z.detach() + P * (z - z.detach())
    return torch.cat(parts)


# --------------------------------------------------------------------------------------
# Embeddings of a batch, at once or in chunks
# --------------------------------------------------------------------------------------


def embed(model: nn.Module, views: Tensor) -> Tensor:
    """The embeddings z [B, 2, D], float32, of the views [2, B, 3, S, S] of B images."""
    x = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return model(x).float().unflatten(0, (2, -1)).transpose(0, 1)


@torch.no_grad()
def embed_in_chunks(model: nn.Module, views: Tensor, chunk_size: int) -> Tensor:
    """The embeddings of `embed`, for some images at a time and without their graph.

    With `backward_in_chunks`, this gives the gradient of the loss of a whole batch, while only the
    activations of one chunk are in memory (Gao et al. 2021, https://arxiv.org/abs/2101.06983).
    Batch norm sees one chunk at a time, as if each chunk were on a process of its own.

    Args:
        model: as Accelerate has prepared it.
        views: [2, B, 3, S, S].
        chunk_size: images in a chunk.

    Returns:
        z [B, 2, D]. After the backward pass of the loss, z.grad holds the gradient.
    """
    buffers = [value.clone() for value in model.buffers()]
    z = torch.cat([embed(model, chunk) for chunk in views.split(chunk_size, dim=1)])
    # The chunks are seen again, and should move the running averages of batch norm only once.
    for value, before in zip(model.buffers(), buffers, strict=True):
        value.copy_(before)
    return z.requires_grad_()


def backward_in_chunks(
    model: nn.Module, views: Tensor, chunk_size: int, gradient: Tensor, accelerator: Accelerator
) -> None:
    """Run the forward pass of each chunk again, and its backward pass.

    Args:
        model: as Accelerate has prepared it.
        views: [2, B, 3, S, S].
        chunk_size: images in a chunk.
        gradient: [B, 2, D], of the loss with respect to the embeddings.
        accelerator: shares the parameter gradients among the processes, after the last chunk.
    """
    chunks = views.split(chunk_size, dim=1)
    for i, part in enumerate(gradient.split(chunk_size)):
        is_last = i == len(chunks) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            accelerator.backward(embed(model, chunks[i]), gradient=part)


# --------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer that --optimizer names."""
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate at a step from 0 to steps - 1: linear warm-up to the peak, then cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# --------------------------------------------------------------------------------------
# The run's folder (the same in every script)
# --------------------------------------------------------------------------------------


def open_run(
    out: Path, settings: dict, accelerator: Accelerator
) -> tuple[dict | None, list[dict] | None]:
    """Create the folder of a run and its config.json, or reopen it.

    Args:
        out: a folder that is new, empty, or holds a run with the same settings.
        settings: all that the result of the run depends on.
        accelerator: the run's.

    Returns:
        The checkpoint to resume from, or None if the run is new or finished; and the results of the
        run, or None if it is not finished.

    Raises:
        SystemExit: if the folder holds anything else, or cannot be used. The message is one line.
    """
    path = out / "config.json"
    try:
        is_new = not path.exists()
        is_empty = not any(out.glob("[!.]*"))
    except OSError as error:
        common.fail(f"{out} cannot be used ({error}): choose another --out")
    if is_new:
        if not is_empty:
            common.fail(f"{out} is not empty and does not hold a run: choose another --out")
        packages = {name: version(name) for name in ("torch", "torchvision", "accelerate")}
        devices = f"{accelerator.num_processes} x {accelerator.device}"
        config = {"format": RUN_FORMAT, "settings": settings}
        common.write_json(path, config | {"devices": devices, "versions": packages})

    config = common.read_json(path)
    if not isinstance(config, dict) or config.get("format") != RUN_FORMAT:
        common.fail(f"{out} was made by another version of this code: choose another --out")
    before = config.get("settings", {})
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        previous = ", ".join(f"{name} was {before.get(name)}" for name in changed)
        common.fail(
            f"{out} holds a run with other settings ({previous}): "
            "repeat its command to resume it, or choose another --out"
        )
    results = common.read_results(out)
    checkpoint = out / "checkpoint.pt"
    if results or not checkpoint.exists():
        return None, results
    return common.read_checkpoint(checkpoint), None


def save_run(out: Path, state: dict) -> None:
    """Write metrics.jsonl and checkpoint.pt. Each replaces the old one only when it is complete.

    Args:
        out: the folder of the run.
        state: all that is needed to resume the run, with the metrics so far as "rows".

    Raises:
        SystemExit: if the files cannot be written. The message is one line.
    """
    try:
        with common.atomic_write(out / "metrics.jsonl") as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in state["rows"]))
        with common.atomic_write(out / "checkpoint.pt") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # If the disk is full, torch raises the latter.
        common.fail(
            f"the run could not be saved in {out} ({error}): the last checkpoint is kept; "
            "if the disk is full, free some space and repeat the command to resume"
        )


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line, with the defaults where a preset gives no others."""
    parser = argparse.ArgumentParser(
        "supcon.py",
        description="Pretrain an image encoder with labels, by SupCon or cross-entropy.",
        formatter_class=common.HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = common.fail
    common.add_data_arguments(parser)
    common.add_preset_argument(parser, PRESETS)

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    add("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    add(
        "--init",
        help="encoder.safetensors to start f from; use the --normalize that it was trained with",
    )
    add(
        "--normalize",
        choices=common.STATISTICS,
        default="imagenet",
        help="mean and standard deviation with which the inputs are normalized",
    )
    add(
        "--head-layers",
        type=int,
        choices=(1, 2, 3),
        default=2,
        help="layers of the head, which --loss ce does not have",
    )
    add(
        "--hidden",
        type=common.positive_int,
        help="width of the head's inner layers (default: the encoder's width)",
    )
    add("--dim", type=common.positive_int, default=128, help="dimensions of the head's output z")

    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="out", help="L_out, L_in or cross-entropy (ce)")
    add(
        "--max-positives",
        type=common.positive_int,
        help="most positives of an anchor, its own views first (default: all)",
    )
    add(
        "--label-noise",
        type=common.fraction,
        default=0.0,
        help="share of the images that are given a wrong label, in training only",
    )
    add(
        "--image-size",
        type=common.int_above_1,
        help="side of the views in pixels (default: the side of the images, at most 224)",
    )
    add(
        "--augment",
        nargs="+",
        choices=OPERATIONS,
        help="operations; crop includes flips (default: all, but blur only above 64 pixels)",
    )
    add(
        "--crop-scale",
        type=common.positive_fraction,
        default=0.2,
        help="area of the smallest crop, as a share of the image's",
    )
    add(
        "--color-strength",
        type=common.nonnegative_float,
        default=0.5,
        help="strength s of the color jitter",
    )
    add(
        "--temperature",
        type=common.positive_float,
        default=0.1,
        help="temperature tau of L_out and L_in",
    )

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=common.positive_int, default=100, help="passes over the images")
    add(
        "--max-steps",
        type=common.positive_int,
        help="stop after this many steps; the learning rate's schedule ends there too",
    )
    add(
        "--batch-size",
        type=common.int_above_1,
        default=256,
        help="images per step, over all processes; the small and photos presets use smaller "
        "batches for sets of fewer than 16,384 images",
    )
    add(
        "--chunk-size",
        type=common.positive_int,
        help="images whose activations a process keeps in memory at a time (default: all)",
    )
    add("--optimizer", choices=PEAK_LR, default="sgd", help="algorithm that updates the weights")
    add(
        "--lr",
        type=common.positive_float,
        help="peak learning rate (default: by --optimizer and --batch-size)",
    )
    add(
        "--warmup-epochs",
        type=common.nonnegative_float,
        help="epochs of linear warm-up (default: a tenth of the run, at most 10 epochs)",
    )
    add(
        "--weight-decay",
        type=common.nonnegative_float,
        default=1e-4,
        help="weight decay of the optimizer",
    )
    add("--seed", type=common.nonnegative_int, default=0, help="random seed of weights and views")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/supcon-DATA)")
    add(
        "--holdout",
        type=common.positive_int,
        help="labeled training images to set aside; during the run, kNN is measured on them "
        "instead of on the test images",
    )
    add("--eval-every", type=common.positive_int, default=5, help="epochs between kNN evaluations")
    add(
        "--log-with",
        choices=[*map(str, get_available_trackers())],
        help="experiment tracker to report to",
    )

    return parser


def parse_arguments(argv: list[str] | None, preset: dict | None = None) -> argparse.Namespace:
    """Parse the flags. A flag that is not given takes the preset's value, or else its default."""
    parser = build_parser()
    parser.set_defaults(**preset or {})
    args = parser.parse_args(argv)
    if args.loss == "ce" and args.max_positives:
        common.fail("--max-positives has no effect with --loss ce: leave it out")
    if args.lr is None:
        power = 0.5 if args.optimizer == "adamw" else 1
        rates = SMALL_NETWORK_PEAK_LR if args.arch == "small" else PEAK_LR
        args.lr = rates[args.optimizer] * (args.batch_size / 256) ** power
    if args.out is None:
        args.out = Path("runs", f"supcon-{Path(args.data).absolute().name}".removesuffix(".npz"))
    return args


def batch_size_for(labels: Tensor) -> int:
    """The default batch size for images with these labels.

    It is doubled, up to 256, while more than a tenth of the images would be alone in their class.
    Their only positive would be their own other view, and the loss little more than NT-Xent.
    """
    batch_size = common.default_batch_size(len(labels))
    while batch_size < min(256, len(labels) // 2) and share_alone(labels, batch_size) > 0.1:
        batch_size *= 2
    return batch_size


def parse_arguments_for(
    images: common.ImageSet, args: argparse.Namespace, argv: list[str] | None
) -> tuple[argparse.Namespace, dict]:
    """Parse the flags again, with the defaults for these images.

    Args:
        images: those to train on.
        args: the flags as they were parsed without a preset.
        argv: the command line.

    Returns:
        The flags, and the defaults of the preset that they have taken.
    """
    side = args.image_size or images.side
    preset = args.preset or common.choose_preset(args.data, side, len(images))
    defaults = {"batch_size": batch_size_for(images.labels)} | PRESETS[preset]
    args = parse_arguments(argv, defaults | {"preset": preset})

    # Flags that follow from the size of the views.
    args.image_size = side
    args.stem = args.stem or ("3x3" if side <= 64 else "7x7")
    names = [name for name in OPERATIONS if name != "blur" or side > 64]
    args.augment = args.augment or names

    taken = {name: value for name, value in defaults.items() if vars(args)[name] == value}
    return args, taken


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def classifier_accuracy(network: nn.Sequential, images: common.ImageSet, size: int) -> float:
    """Accuracy in percent of encoder and classifier on labeled images, in float32."""
    layers = nn.Sequential(*network)  # without the autocast that Accelerate gave to `network`
    scores = common.extract_features(layers, images, size)
    return common.accuracy(scores, images.labels)


def find_problems(row: dict, warmed_up: bool) -> list[str]:
    """Return warnings about the metrics of one epoch."""
    found = []
    if row["spread"] < 0.1:  # 1 if embeddings fill the sphere, 0 if all are equal
        found.append(
            "the embeddings collapse (their spread should be near 1, and is near 0): use a lower "
            "--lr or a longer --warmup-epochs"
        )
    # With few classes, even a perfect network has a loss that is only a little below chance.
    if warmed_up and row["chance"] - row["loss"] < 0.003 * row["chance"]:
        found.append(
            "the loss stays at chance: use another --lr or, with --loss out and in, another "
            "--temperature (with few classes or many wrong labels, there is little to gain)"
        )
    return found


def main(argv: list[str] | None = None) -> None:  # noqa: C901, PLR0912, PLR0915
    """Pretrain, evaluate, and leave the run in --out."""
    # The flags are parsed here to find the images, and again below, where defaults depend on them.
    args = parse_arguments(argv)
    torch.backends.cudnn.benchmark = True  # All steps have the same shapes.
    accelerator = common.start_accelerator(args.log_with, args.out)
    common.check_agreement(vars(args))
    device = accelerator.device
    processes = accelerator.num_processes

    # Data: labeled images to train on, which are also the bank of the evaluation, and test images.
    # During the run, kNN and, with --loss ce, the classifier are measured on the validation images,
    # which are those of --holdout or else the test images.
    _, images, test, validation = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream, args.holdout
    )
    if not images or images.labels.unique().numel() < 2:
        common.fail(
            f"--data {args.data} has no labels, or a single class: use a folder with train and val "
            "or test, each with one folder per class, an .npz file with labels, or one of "
            f"{', '.join(common.SETS)}"
        )
    num_classes = len(images.classes)

    # The flags again, with the defaults for images of this size and number.
    args, defaults = parse_arguments_for(images, args, argv)
    accelerator.print(common.describe_preset(args.preset, defaults))
    recipe = augmentation(args.augment, args.image_size, args.crop_scale, args.color_strength)
    common.check_batch_size(args.batch_size, len(images), processes)
    common.check_chunk_size(args.chunk_size, args.batch_size // processes)
    labels = mislabel(images.labels, num_classes, args.label_noise, args.seed).to(device)
    alone = share_alone(labels, args.batch_size)
    if args.loss != "ce" and alone > 0.1:
        accelerator.print(
            f"warning: about {100 * alone:.0f} % of the {args.batch_size} images of a batch are "
            "alone in their class, with no positive but their own other view: use a larger "
            "--batch-size"
        )
    epoch_steps = len(images) // args.batch_size
    total_steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    if args.warmup_epochs is None:
        warmup_steps = min(10 * epoch_steps, total_steps // 10)
    else:
        warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps - 1)
    epochs = math.ceil(total_steps / epoch_steps)

    # Model: encoder and head (for cross-entropy, a classifier) in one module, so that a step is one
    # forward pass.
    mean, std = common.STATISTICS[args.normalize]
    torch.manual_seed(args.seed)
    if args.init:
        encoder = common.load_initial_encoder(args.init, args.arch, args.stem, mean, std)
    else:
        encoder = common.build_encoder(args.arch, args.stem)
    args.hidden = args.hidden or encoder.width
    head_widths = [args.hidden] * (args.head_layers - 1) + [args.dim]
    head = torchvision.ops.MLP(encoder.width, head_widths)
    if args.loss == "ce":  # The unused head has drawn random numbers, as in earlier versions.
        head = nn.Linear(encoder.width, num_classes)
    normalize = common.Normalize(mean, std)
    network = nn.Sequential(normalize, encoder, head)
    network = network.to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = build_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)

    # Run: start a new one, print a finished one, or resume from a checkpoint.
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"method": "supcon", "images": images.fingerprint, "classes": num_classes}
    settings |= {"test images": test.fingerprint}
    settings |= {"mixed_precision": accelerator.mixed_precision}
    common.check_agreement(settings)
    checkpoint, results = common.on_main_process(open_run, args.out, settings, accelerator)
    if results:
        accelerator.print(f"{args.out} is finished:\n{common.format_table(results)}")
        return

    step = 0
    losses = []  # of the steps of the current epoch
    rows = []  # the metrics of all epochs
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        rows = checkpoint["rows"]
        losses = list(checkpoint["losses"].to(device))
        accelerator.print(f"resuming after step {step} of {total_steps}")

    def state() -> dict:
        """All that is needed to resume the run."""
        return {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "losses": torch.tensor(losses),
            "rows": rows,
        }

    # Training. The images and views of a step depend only on the seed, the epoch and the step, not
    # on the number of processes or on where the run was interrupted.
    recipes = [(2, recipe)]  # two views of each image
    batches = common.batches(
        images, recipes, args.batch_size, args.seed, start=step, stop=total_steps
    )
    # The loss while all embeddings or, for cross-entropy, the scores of all classes are equal.
    chance = math.log(num_classes if args.loss == "ce" else 2 * args.batch_size - 1)
    accelerator.init_trackers("supcon", {name: str(value) for name, value in settings.items()})
    accelerator.print(common.format_header(CONSOLE_METRICS[args.loss]))
    saved_at = time.monotonic()
    while step < total_steps:
        epoch = step // epoch_steps
        first_step = step
        started_at = time.monotonic()
        last_step = min((epoch + 1) * epoch_steps, total_steps)
        epoch_batches = itertools.islice(batches, last_step - step)
        bar = common.progress(epoch_batches, f"epoch {epoch + 1}/{epochs}", last_step - step)
        for index, (views,) in bar:  # views [2, B, 3, S, S]
            if step == 0:
                common.save_views(args.out / "views.png", images, index, [views])
            lr = learning_rate(step, total_steps, warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # Both views of every image through encoder and head.
            if args.chunk_size:
                z = embed_in_chunks(model, views, args.chunk_size)
            else:
                z = embed(model, views)  # [B, 2, D]

            # The loss of the batch of all processes, N images with labels y. `gather` joins along
            # the first dimension, so the images come first.
            all_z = gather(z, accelerator)  # [N, 2, D]
            y = accelerator.gather(labels[common.to_device_of(labels, index)])
            if args.loss == "ce":
                loss = F.cross_entropy(all_z.flatten(0, 1), y.repeat_interleave(2))
            else:
                all_z = F.normalize(all_z, dim=2)
                loss = supcon_loss(all_z, y, args.temperature, args.loss, args.max_positives)

            optimizer.zero_grad()
            accelerator.backward(loss)
            if args.chunk_size:
                backward_in_chunks(model, views, args.chunk_size, z.grad, accelerator)
            optimizer.step()

            # Count the step; within a long epoch, save from time to time.
            step += 1
            losses.append(loss.detach())
            minutes = (time.monotonic() - saved_at) / 60
            if minutes > SAVE_MINUTES and step < last_step and accelerator.is_main_process:
                if torch.stack(losses).isfinite().all():
                    save_run(args.out, state())
                saved_at = time.monotonic()

        # Metrics. All processes see the same loss, so all of them stop if it is not finite.
        mean_loss = torch.stack(losses).mean().item()
        if not math.isfinite(mean_loss):
            common.fail(
                f"the loss of epoch {epoch + 1} is not finite: use a lower --lr and another --out"
            )
        seconds = time.monotonic() - started_at
        row = {
            "epoch": epoch + 1,
            "step": step,
            "loss": mean_loss,
            "chance": chance,
            "spread": common.spread(all_z[:, 0]),  # of the last batch
            "lr": lr,
            "images_per_s": (step - first_step) * args.batch_size / seconds,
            "wait": images.waited / seconds,  # share of the epoch spent waiting for files
            "minutes_left": (total_steps - step) / (step - first_step) * seconds / 60,
        }

        # Evaluate, report and save.
        if (epoch + 1) % args.eval_every == 0 or step == total_steps:
            features = nn.Sequential(normalize, encoder)
            row["knn"] = common.knn_accuracy(features, images, validation, args.image_size)
            if args.loss == "ce":
                row["classifier"] = classifier_accuracy(network, validation, args.image_size)
        rows.append(row)
        accelerator.print(common.format_row(row, CONSOLE_METRICS[args.loss]))
        for problem in find_problems(row, step > max(warmup_steps, epoch_steps)):
            accelerator.print(f"warning: {problem}")
        accelerator.log(row, step=step)
        losses = []
        images.waited = 0.0
        if accelerator.is_main_process:
            save_run(args.out, state())
        saved_at = time.monotonic()

    # The end of the run: export the encoder, evaluate it, and write and print the results.
    about = {
        "method": f"supcon-{args.loss}",
        "architecture": args.arch,
        "stem": args.stem,
        "image_size": args.image_size,
        "mean": list(mean),
        "std": list(std),
        "data": args.data,
    }
    if accelerator.is_main_process:
        common.save_encoder(args.out / "encoder.safetensors", encoder, **about)
    classifier_row = {}
    if args.loss == "ce":
        percent = classifier_accuracy(network, test, args.image_size)
        classifier_row["own classifier"] = common.summarize([percent], len(test))
    common.finish(
        args.out, encoder, about, images, test, validation, args.seed, rows[-1], classifier_row
    )
    # Accelerate's end_training would also destroy the process group, to which DDP still refers.
    # `common.entry_point` does it later.
    for tracker in accelerator.trackers:
        tracker.finish()


if __name__ == "__main__":
    with common.entry_point("the same command continues from the last checkpoint"):
        main()
