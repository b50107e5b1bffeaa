# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning.

He, Fan, Wu, Xie and Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722, and v2: Chen, Fan,
Girshick and He, Improved Baselines with Momentum Contrastive Learning,
https://arxiv.org/abs/2003.04297

    python moco.py                                      # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 moco.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 moco.py --data FOLDER --arch resnet50

The run is kept in --out. It can be stopped at any time; the same command resumes it from its last
checkpoint, and it ends as if it had never been stopped.

Where to find the parts of the papers:
- Eq. 1, InfoNCE: `info_nce`
- Eq. 2, the momentum update: `update_key_encoder`
- Algorithm 1: the inner loop of `main`; the queue: `new_queue` and `enqueue`
- section 3.3, the augmentation and shuffled batch norm: `augmentation`, `encode_keys` and
  `SplitBatchNorm`
- section 4, the training: `PEAK_LR`, `learning_rate`, and --weight-decay, which applies to
  all parameters
- v2 (head, blur, color jitter, cosine schedule, temperature): `VERSIONS` and `OPERATIONS`

Differences from the papers and the authors' code:
- The learning rate follows its schedule step by step; the authors' code changes it once per epoch.
- Batch norm works in groups on one device as well (--bn-splits), as in the authors' CIFAR demo.
  It is never synchronized. Small batches form a single group by default.
- --symmetric makes each view a query once and a key once, in one pass. The loss is the mean of
  both directions; the demo takes their sum.
- The defaults depend on the images (`PRESETS`). Those of --preset paper are the papers', but with a
  queue of at most an eighth of the images, batch norm in groups, and without blur up to 64 pixels.
- By default, all inputs are normalized with ImageNet's mean and standard deviation (--normalize).
  The authors' CIFAR demo uses CIFAR's.
- The running averages of batch norm, which only the evaluation uses, are those of the first
  process.

The authors' experiments, with the accuracy that they report. They were not run here:
- CIFAR-10, their demo, ResNet-18 (kNN 88.7 %): --data cifar10 --preset paper --epochs 800
  --batch-size 512 --lr 0.06 --weight-decay 5e-4 --head-layers 1 --queue-size 4096
  --key-momentum 0.99 --temperature 0.1 --crop-scale 0.08 --normalize cifar10
- ImageNet (linear 67.5 %; with --version v1 60.8 %): --data FOLDER --preset paper
  --arch resnet50 --eval-every 20

How to adapt it:
- Your own encoder: add it to `common.build_encoder`, under a name in `common.ARCHITECTURES`. It
  maps images [B, 3, H, W] to features [B, width], has an attribute `width`, and makes its batch
  norm with `norm_layer`.
- Channels other than RGB: change `common.read_image`, which reads files, and the first layer in
  `common.build_encoder`; leave out the operations "color" and "gray" (--augment crop blur).
"""

import argparse
import copy
import itertools
import json
import math
import time
from functools import partial
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
        "key_momentum": 0.99,
        "jitter": [0.8, 0.8, 0.8, 0.2, 0.8],
        "temperature": 0.07,
        "epochs": 54,
        "optimizer": "adamw",
        "warmup_epochs": 2.0,
    },
    "small": {
        "key_momentum": 0.99,
        "temperature": 0.1,
        "optimizer": "adamw",
    },
    "photos": {
        "key_momentum": 0.99,
        "temperature": 0.1,
        "optimizer": "adamw",
    },
    "paper": {
        "batch_size": 256,
        "epochs": 200,
        "warmup_epochs": 0.0,
    },
}
# Defaults of the two papers. A preset replaces those of v2, but not those of a --version that the
# user gives.
VERSIONS = {
    "v1": {
        "head_layers": 1,
        "jitter": [0.4, 0.4, 0.4, 0.4, 1.0],
        "temperature": 0.07,
        "schedule": "steps",
    },
    "v2": {
        "head_layers": 2,
        "jitter": [0.4, 0.4, 0.4, 0.1, 0.8],
        "temperature": 0.2,
        "schedule": "cosine",
    },
}
OPERATIONS = {"v1": ("crop", "gray", "color"), "v2": ("crop", "color", "gray", "blur")}
PEAK_LR = {"sgd": 0.03, "adamw": 0.00035}  # at batch size 256; SGD's is the papers'
SMALL_NETWORK_PEAK_LR = PEAK_LR | {"adamw": 0.006}  # for --arch small, which takes a higher one
CONSOLE_METRICS = ("knn",)  # shown besides loss, chance, spread and speed
MAY_CHANGE = ("root", "workers", "out", "eval_every", "log_with")  # when a run is resumed
SAVE_MINUTES = 10  # A longer epoch also saves checkpoints midway.
RUN_FORMAT = 5  # of the files in --out; runs of another format are refused


# --------------------------------------------------------------------------------------
# Augmentation (section 3.3)
# --------------------------------------------------------------------------------------


def augmentation(names: list[str], size: int, crop_scale: float, jitter: list[float]) -> list:
    """Build the operations that make one view: the crop, then the others in the order given.

    Args:
        names: which of "crop", "color", "gray" and "blur" to use.
        size: side of the views, in pixels.
        crop_scale: area of the smallest crop, as a share of the image's area.
        jitter: strength of brightness, contrast, saturation and hue; probability of the jitter.

    Returns:
        Operations for `common.batches`, of which the first is a crop.
    """
    kernel_size = size // 10 | 1  # a tenth of the side, and odd
    operations = {
        "crop": RandomResizedCrop(size, scale=(crop_scale, 1.0), flip=0.5),
        "color": RandomApply(ColorJitter(*jitter[:4]), p=jitter[4]),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(kernel_size, sigma=(0.1, 2.0)), p=0.5),
    }
    if "crop" not in names:  # The middle square is shown, and not flipped.
        operations["crop"] = RandomResizedCrop(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    return [operations["crop"], *(operations[name] for name in names if name != "crop")]


# --------------------------------------------------------------------------------------
# Model: query encoder f_q, key encoder f_k and the queue of keys
# --------------------------------------------------------------------------------------


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm of `splits` parts of a batch, each on its own, as if on as many GPUs."""

    def __init__(self, num_features: int, splits: int) -> None:
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """x [splits * n, C, H, W] to the same shape. In eval mode it is plain batch norm."""
        if not self.training:
            return super().forward(x)
        # Each part updates a copy of the running averages. The layer keeps the mean of the copies.
        means = self.running_mean.repeat(self.splits, 1)  # [splits, C]
        variances = self.running_var.repeat(self.splits, 1)
        # On a GPU, many small calls would take longer to launch than to run. On a CPU, they are
        # faster than the copies that a single call needs.
        if x.is_cuda:
            y = self.normalize_as_channels(x, means, variances)
        else:
            y = self.normalize_each_part(x, means, variances)
        self.num_batches_tracked += 1
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return y

    def normalize_each_part(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize each part by a call of its own."""
        parts = []
        for part, mean, var in zip(x.chunk(self.splits), means, variances, strict=True):
            parts.append(
                F.batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            )
        return torch.cat(parts)

    def normalize_as_channels(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize all parts at once, side by side as channels of their own.

        The channels are the last dimension in memory. So that each rearrangement copies x only
        once, they are the last dimension of the shapes, too.
        """
        x = x.permute(0, 2, 3, 1).unflatten(0, (self.splits, -1))  # [splits, n, H, W, C]
        x = x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)  # [n, splits * C, H, W]
        x = F.batch_norm(
            x,
            means.view(-1),
            variances.view(-1),
            self.weight.repeat(self.splits),
            self.bias.repeat(self.splits),
            True,
            self.momentum,
            self.eps,
        )
        x = x.permute(0, 2, 3, 1).unflatten(3, (self.splits, -1))  # [n, H, W, splits, C]
        return x.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


def new_queue(size: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """A queue of random unit vectors, [K, D]."""
    return F.normalize(torch.randn(size, dim, generator=common.generator(seed)).to(device), dim=1)


def enqueue(queue: Tensor, k: Tensor, step: int) -> None:
    """Write the keys k [n, D] of a step over the oldest ones in the queue [K, D].

    The queue is a ring: counted from the start of the run, key number i is in row i mod K.
    """
    number = step * len(k) + torch.arange(len(k), device=k.device)
    queue[number % len(queue)] = k


@torch.no_grad()
def update_key_encoder(f_k: nn.Module, f_q: nn.Module, m: float) -> None:
    """Momentum update (Eq. 2) of all parameters: key = m * key + (1 - m) * query."""
    # One call for all parameters, as in torch's optimizers. A loop over the parameters would make
    # so many small calls that a GPU waits for them.
    torch._foreach_lerp_(list(f_k.parameters()), list(f_q.parameters()), 1 - m)


def queries_and_keys(views: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The images x_q and x_k, [n, 3, S, S], from the two views [2, B, 3, S, S] of a batch.

    If `symmetric`, each view is in both, and n = 2B. The two views of an image then stand next to
    each other, so that the order does not depend on the number of processes.
    """
    if not symmetric:
        return views[0], views[1]
    x_q = views.transpose(0, 1).flatten(0, 1)
    x_k = views.flip(0).transpose(0, 1).flatten(0, 1)
    return x_q, x_k


@torch.no_grad()
def encode_keys(
    f_k: nn.Module, x_k: Tensor, rng: torch.Generator, accelerator: Accelerator
) -> Tensor:
    """Keys of the images of all processes, with shuffled batch norm (section 3.3).

    The images of all processes are shuffled before f_k sees them, so that a key's batch statistics
    come from a random group of images, and not from the group of its query. Otherwise a query could
    recognize its key by the statistics that they share. With a single group (--bn-splits 1), the
    shuffle has no effect.

    Args:
        f_k: the key encoder, as Accelerate has prepared it.
        x_k: [n, 3, S, S] images of this process.
        rng: of the shuffle. It must be in the same state on all processes.
        accelerator: gathers the images and then the keys.

    Returns:
        k [P * n, D] of unit length, in the order of the images.
    """
    all_x_k = accelerator.gather(x_k)
    shuffle = common.to_device_of(x_k, torch.randperm(len(all_x_k), generator=rng))
    own_rows = shuffle.chunk(accelerator.num_processes)[accelerator.process_index]
    x = all_x_k.index_select(0, own_rows).contiguous(memory_format=torch.channels_last)
    k = accelerator.gather(f_k(x).float())
    return F.normalize(k[shuffle.argsort()], dim=1)  # in their old order


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss (Eq. 1), mean over N queries.

        loss of n = -log( exp(q[n]·k[n] / tau) / (exp(q[n]·k[n] / tau) + negatives of n) )
        negatives of n = sum over the queue's keys of exp(q[n]·key / tau)

    Args:
        q, k: [N, D] queries and their keys, of unit length.
        queue: [K, D] negative keys, of unit length.
        temperature: tau > 0.

    Returns:
        Scalar; ln(K + 1) if all similarities are equal.

    Raises:
        ValueError: if the shapes do not match.
    """
    if q.shape != k.shape or q.ndim != 2 or queue.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"q and k must be [N, D] and queue [K, D], got {q.shape}, {k.shape} and {queue.shape}"
        )
    q = q / temperature  # cheaper than dividing the logits, which are K / D times as many
    l_pos = (q * k).sum(1, keepdim=True)
    l_neg = q @ queue.T
    logits = torch.cat([l_pos, l_neg], dim=1)
    positives = torch.zeros(len(q), dtype=torch.long, device=q.device)  # column 0
    # Cross-entropy is -l_pos + log(sum over a row of exp(logits)), and this sum is the denominator
    # of Eq. 1.
    return F.cross_entropy(logits, positives)


# --------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer that --optimizer names."""
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, warmup: int, peak: float, schedule: str) -> float:
    """Learning rate at a step from 0 to steps - 1.

    It rises linearly to the peak. Then it follows a cosine down to 0 or, if the schedule is
    "steps", drops to a tenth after 60 % of the run and to a hundredth after 80 %.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "steps":
        if step >= 0.8 * steps:
            return peak * 0.1**2
        if step >= 0.6 * steps:
            return peak * 0.1
        return peak
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
        "moco.py",
        description="Pretrain an image encoder with MoCo.",
        formatter_class=common.HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = common.fail
    common.add_data_arguments(parser)
    common.add_preset_argument(parser, PRESETS)

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoders f_q and f_k")
    add("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    add(
        "--init",
        help="encoder.safetensors to start f_q and f_k from; use the --normalize that it was "
        "trained with",
    )
    add(
        "--normalize",
        choices=common.STATISTICS,
        default="imagenet",
        help="mean and standard deviation with which the inputs are normalized",
    )
    add("--head-layers", type=int, choices=(1, 2), help="layers of the head (v1: 1)")
    add(
        "--hidden",
        type=common.positive_int,
        help="width of the head's inner layer (default: the encoder's width)",
    )
    add("--dim", type=common.positive_int, default=128, help="dimensions of queries and keys")

    add = parser.add_argument_group("method").add_argument
    add(
        "--version",
        choices=VERSIONS,
        help="paper whose head, operations, jitter, temperature and schedule to use, even where "
        "the preset sets others (default: v2's, except what the preset sets)",
    )
    add(
        "--queue-size",
        type=common.positive_int,
        help="keys in the queue, K (default: a power of two, at most an eighth of the images and "
        "at most 65,536, but no fewer than the keys of a step)",
    )
    add("--key-momentum", type=common.fraction, default=0.999, help="momentum m of f_k")
    add("--symmetric", action="store_true", help="use each view as a query and as a key")
    add(
        "--bn-splits",
        type=common.positive_int,
        help="groups of a batch that are normalized on their own, over all processes (default: at "
        "most 8 groups of at least 32 images, but one per process or more)",
    )
    add(
        "--image-size",
        type=common.int_above_1,
        help="side of the views in pixels (default: the side of the images, at most 224)",
    )
    add(
        "--augment",
        nargs="+",
        choices=OPERATIONS["v2"],
        help="operations, in the order given, except that crop, with its flips, comes first "
        "(default: the version's, but blur only above 64 pixels)",
    )
    add(
        "--crop-scale",
        type=common.positive_fraction,
        default=0.2,
        help="area of the smallest crop, as a share of the image's",
    )
    add(
        "--jitter",
        type=common.nonnegative_float,
        nargs=5,
        metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "PROBABILITY"),
        help="strengths of the color jitter, and the probability that it is applied",
    )
    add(
        "--temperature",
        type=common.positive_float,
        help="temperature tau of InfoNCE (v1: 0.07)",
    )
    add(
        "--schedule",
        choices=("steps", "cosine"),
        help="how the learning rate falls (v1: steps)",
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
    add(
        "--seed",
        type=common.nonnegative_int,
        default=0,
        help="random seed of weights, views, queue and shuffle",
    )

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/moco-DATA)")
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

    parser.set_defaults(**VERSIONS["v2"])
    return parser


def parse_arguments(argv: list[str] | None, preset: dict | None = None) -> argparse.Namespace:
    """Parse the flags.

    A flag that is not given takes the value of --version if that is given, or else the preset's, or
    else its default.
    """
    parser = build_parser()
    parser.set_defaults(**preset or {})
    given_version = parser.parse_args(argv).version
    if given_version:
        parser.set_defaults(**VERSIONS[given_version])
    args = parser.parse_args(argv)
    args.version = given_version or "v2"
    hue, probability = args.jitter[3:]
    if hue > 0.5 or probability > 1:
        common.fail(
            f"--jitter: the hue must be at most 0.5 and the probability at most 1, but they are "
            f"{hue} and {probability}"
        )
    if args.lr is None:
        power = 0.5 if args.optimizer == "adamw" else 1
        rates = SMALL_NETWORK_PEAK_LR if args.arch == "small" else PEAK_LR
        args.lr = rates[args.optimizer] * (args.batch_size / 256) ** power
    if args.out is None:
        args.out = Path("runs", f"moco-{Path(args.data).absolute().name}".removesuffix(".npz"))
    return args


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
    defaults = {"batch_size": common.default_batch_size(len(images))} | PRESETS[preset]
    args = parse_arguments(argv, defaults | {"preset": preset})

    # Flags that follow from the size of the views.
    args.image_size = side
    args.stem = args.stem or ("3x3" if side <= 64 else "7x7")
    names = [name for name in OPERATIONS[args.version] if name != "blur" or side > 64]
    args.augment = args.augment or names

    taken = {name: value for name, value in defaults.items() if vars(args)[name] == value}
    return args, taken


def default_bn_splits(batch_size: int, processes: int) -> int:
    """The default of --bn-splits: the groups of images that are normalized together.

    As many equal groups as possible of at least 32 images, at most 8 over all processes. Each
    process has at least one group, even if it is smaller.
    """
    own_images = batch_size // processes
    most_per_process = max(1, min(8, batch_size // 32) // processes)
    divisors = [n for n in range(1, most_per_process + 1) if own_images % n == 0]
    return processes * max(divisors)


def default_queue_size(num_images: int, num_keys: int) -> int:
    """The default of --queue-size.

    The largest power of two that is at most 65,536 and at most an eighth of the images, or the keys
    of a step if they are more.
    """
    eighth = max(1, num_images // 8)
    power_of_two = 2 ** (eighth.bit_length() - 1)  # the largest one up to `eighth`
    return max(num_keys, min(65536, power_of_two))


def check_bn_splits(bn_splits: int, num_keys: int, processes: int) -> None:
    """Fail if --bn-splits does not divide the keys of a step, over all processes."""
    if num_keys % bn_splits or bn_splits == num_keys or bn_splits % processes:
        common.fail(
            f"--bn-splits {bn_splits} must be a multiple of {processes}, the number of processes, "
            f"and divide the {num_keys} images of a step into equal groups of at least two: choose "
            "another, or a larger --batch-size"
        )


def check_queue_size(queue_size: int, num_keys: int) -> None:
    """Fail if the keys of a step, over all processes, do not fit into the queue."""
    if queue_size < num_keys:
        common.fail(f"--queue-size {queue_size} must be at least {num_keys}, the keys of a step")


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def find_problems(row: dict, temperature: float, warmed_up: bool) -> list[str]:
    """Return warnings about the metrics of one epoch.

    Args:
        row: the metrics.
        temperature: of the loss.
        warmed_up: whether the loss should have left chance by now.
    """
    found = []
    if row["spread"] < 0.1:  # 1 if embeddings fill the sphere, 0 if all are equal
        found.append(
            "the embeddings collapse (their spread should be near 1, and is near 0): use a lower "
            "--lr or a longer --warmup-epochs"
        )
    # With orthogonal negatives, the loss is at most about 1 / temperature below chance. It cannot
    # fall below 0 either.
    reach = min(row["chance"], 1 / temperature)
    if warmed_up and row["chance"] - row["loss"] < 0.02 * reach:
        found.append("the loss stays at chance: use another --lr or --temperature")
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

    # Data: images to train on, without labels. Labeled training images (the bank) and test images
    # are used only for evaluation. During the run, kNN is measured on the validation images, which
    # are those of --holdout or else the test images.
    images, bank, test, validation = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream, args.holdout
    )

    # The flags again, with the defaults for images of this size and number.
    args, defaults = parse_arguments_for(images, args, argv)
    accelerator.print(common.describe_preset(args.preset, defaults))
    recipe = augmentation(args.augment, args.image_size, args.crop_scale, args.jitter)
    common.check_batch_size(args.batch_size, len(images), processes)

    num_keys = args.batch_size * (2 if args.symmetric else 1)  # of a step, over all processes
    args.bn_splits = args.bn_splits or default_bn_splits(args.batch_size, processes)
    check_bn_splits(args.bn_splits, num_keys, processes)
    args.queue_size = args.queue_size or default_queue_size(len(images), num_keys)
    check_queue_size(args.queue_size, num_keys)
    images_in_queue = args.queue_size * args.batch_size // num_keys
    if images_in_queue > len(images) / 2:
        accelerator.print(
            f"warning: the queue holds keys of more than half of the {len(images)} images, so a "
            "negative is often the query's own image: use a smaller --queue-size or --batch-size"
        )
    epoch_steps = len(images) // args.batch_size
    total_steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    if args.warmup_epochs is None:
        warmup_steps = min(10 * epoch_steps, total_steps // 10)
    else:
        warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps - 1)
    epochs = math.ceil(total_steps / epoch_steps)

    # Model: f_q is an encoder with a head. f_k starts as a copy of it, and is not trained by
    # gradients.
    norm_layer = nn.BatchNorm2d
    if args.bn_splits > processes:
        norm_layer = partial(SplitBatchNorm, splits=args.bn_splits // processes)
    mean, std = common.STATISTICS[args.normalize]
    torch.manual_seed(args.seed)
    if args.init:
        encoder = common.load_initial_encoder(
            args.init, args.arch, args.stem, mean, std, norm_layer
        )
    else:
        encoder = common.build_encoder(args.arch, args.stem, norm_layer)
    args.hidden = args.hidden or encoder.width
    head_widths = [args.hidden] * (args.head_layers - 1) + [args.dim]
    head = torchvision.ops.MLP(encoder.width, head_widths)
    normalize = common.Normalize(mean, std)
    network = nn.Sequential(normalize, encoder, head)
    network = network.to(device, memory_format=torch.channels_last)
    key_network = copy.deepcopy(network).requires_grad_(False)
    queue = new_queue(args.queue_size, args.dim, args.seed, device)
    optimizer = build_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    f_q, optimizer = accelerator.prepare(network, optimizer)
    # "evaluation_mode" only leaves out DDP, which refuses a module without gradients. f_k stays in
    # training mode.
    f_k = accelerator.prepare_model(key_network, evaluation_mode=True)
    # DDP has given f_q the weights of the first process.
    key_network.load_state_dict(network.state_dict())

    # Run: start a new one, print a finished one, or resume from a checkpoint.
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"method": "moco", "images": images.fingerprint}
    settings |= {"test images": test.fingerprint if test else None}
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
        key_network.load_state_dict(checkpoint["key_model"])
        queue.copy_(checkpoint["queue"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        rows = checkpoint["rows"]
        losses = list(checkpoint["losses"].to(device))
        accelerator.print(f"resuming after step {step} of {total_steps}")

    def state() -> dict:
        """All that is needed to resume the run."""
        return {
            "model": network.state_dict(),
            "key_model": key_network.state_dict(),
            "queue": queue,
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
    accelerator.init_trackers("moco", {name: str(value) for name, value in settings.items()})
    accelerator.print(common.format_header(CONSOLE_METRICS))
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
            lr = learning_rate(step, total_steps, warmup_steps, args.lr, args.schedule)
            optimizer.param_groups[0]["lr"] = lr

            # Algorithm 1. The paper updates f_k at the end of a step, and the authors' code at its
            # start. Both are the same, because f_k starts as a copy of f_q.
            x_q, x_k = queries_and_keys(views, args.symmetric)  # [n, 3, S, S] each, n = B or 2B
            update_key_encoder(f_k, f_q, args.key_momentum)

            # The keys [P * n, D] of all processes, because each has the whole queue. The number 1
            # keeps their shuffle independent of the views, which the other three numbers seed.
            rng = common.generator(args.seed, epoch, step % epoch_steps, 1)
            k = encode_keys(f_k, x_k, rng, accelerator)

            # The queries [n, D] of this process. Their own keys are the positives, and those in the
            # queue are the negatives.
            q = f_q(x_q.contiguous(memory_format=torch.channels_last)).float()
            q = F.normalize(q, dim=1)
            own_k = k.chunk(processes)[accelerator.process_index]
            loss = info_nce(q, own_k, queue, args.temperature)

            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            enqueue(queue, k, step)

            # Count the step; within a long epoch, save from time to time.
            step += 1
            losses.append(accelerator.reduce(loss.detach(), "mean"))
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
            "chance": math.log(args.queue_size + 1),  # the loss of equal embeddings
            "spread": common.spread(accelerator.gather(q.detach())),  # of the last batch
            "lr": lr,
            "images_per_s": (step - first_step) * args.batch_size / seconds,
            "wait": images.waited / seconds,  # share of the epoch spent waiting for files
            "minutes_left": (total_steps - step) / (step - first_step) * seconds / 60,
        }

        # Evaluate, report and save.
        if bank and ((epoch + 1) % args.eval_every == 0 or step == total_steps):
            features = nn.Sequential(normalize, encoder)
            row["knn"] = common.knn_accuracy(features, bank, validation, args.image_size)
        rows.append(row)
        accelerator.print(common.format_row(row, CONSOLE_METRICS))
        # The loss says little until keys have replaced the random vectors in the queue.
        fill_steps = args.queue_size // num_keys
        warmed_up = step > max(warmup_steps, epoch_steps, fill_steps)
        for problem in find_problems(row, args.temperature, warmed_up):
            accelerator.print(f"warning: {problem}")
        accelerator.log(row, step=step)
        losses = []
        images.waited = 0.0
        if accelerator.is_main_process:
            save_run(args.out, state())
        saved_at = time.monotonic()

    # The end of the run: export the encoder, evaluate it, and write and print the results.
    about = {
        "method": "moco",
        "architecture": args.arch,
        "stem": args.stem,
        "image_size": args.image_size,
        "mean": list(mean),
        "std": list(std),
        "data": args.data,
    }
    if accelerator.is_main_process:
        common.save_encoder(args.out / "encoder.safetensors", encoder, **about)
    common.finish(args.out, encoder, about, bank, test, validation, args.seed, rows[-1])
    # Accelerate's end_training would also destroy the process group, to which DDP still refers.
    # `common.entry_point` does it later.
    for tracker in accelerator.trackers:
        tracker.finish()


if __name__ == "__main__":
    with common.entry_point("the same command continues from the last checkpoint"):
        main()
