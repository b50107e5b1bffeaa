# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020, https://arxiv.org/abs/2006.09882

    python swav.py                                      # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 swav.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 swav.py --data FOLDER --arch resnet50

The run is kept in --out. It can be stopped at any time; the same command resumes it from its last
checkpoint, and it ends as if it had never been stopped.

Where to find the parts of the paper:
- Eq. 2 and Eq. 6, swapped prediction over all crops: `swapped_prediction_loss`
- Eq. 3 to 5, codes with equal shares of the prototypes: `sinkhorn`
- section 3.1, online codes: `assign_codes`; the queue for small batches: `enqueue`
- section 3.1, the prototypes C of unit length: `SwAV` and `normalize_prototypes`
- section 3.2, multi-crop: --crops, --crop-sizes, --crop-scales and `SwAV.forward`
- Algorithm 1 (Appendix A): the inner loop of `main`
- Appendix A.1, optimizer and learning rate: `LARC`, `learning_rate` and `PEAK_LR`

Differences from the paper and the authors' code:
- Sinkhorn works in logarithms, which cannot overflow, and on the gathered embeddings of all
  processes; the authors' code reduces sums over the processes instead.
- The loss is a mean over codes and crops, as in the authors' code; Eq. 6 is a sum.
- How long the prototypes stay frozen is set in epochs, not in steps.
- The defaults depend on the images (`PRESETS`). Those of --preset paper are the authors' for batch
  size 256. Images up to 64 pixels are not blurred, and their small crops, if there are any, have
  9/16 of the large ones' side (3/7).
- By default, inputs are normalized with ImageNet's mean and standard deviation (--normalize). In
  the authors' code the deviation of red is 0.228, not the usual 0.229.
- With LARC and SGD, the default peak of the learning rate grows with the batch size to the power
  3/4, which gives the authors' 0.6 at 256 and 4.8 at 4096. With AdamW, it grows with the square
  root.
- On CPUs each process has its own batch norm statistics, because PyTorch synchronizes them only on
  GPUs.

The authors' experiments, with the linear accuracy that they report. They were not run here:
- ImageNet, batch size 256 (72.7 %): --data FOLDER --preset paper --arch resnet50 --eval-every 20
- ImageNet, 64 GPUs (75.3 %): the same with --batch-size 4096 --warmup-epochs 10 --queue-size 0
  --epochs 800

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
        "prototypes": 256,
        "epsilon": 0.03,
        "queue_size": 0,
        "crops": [2, 2],
        "crop_scales": [0.3, 1.0, 0.1, 0.4],
        "epochs": 26,
        "optimizer": "adamw",
        "warmup_epochs": 2.0,
    },
    "small": {
        "epsilon": 0.01,
        "queue_size": 0,
        "crops": [2],  # At 32 pixels, small crops cost time and bring nothing.
        "crop_scales": [0.2, 1.0, 0.05, 0.2],  # The second pair is for --crops with small crops.
        "color_strength": 0.5,
        "optimizer": "adamw",
    },
    "photos": {
        "epsilon": 0.01,
        "queue_size": 0,
        "color_strength": 0.5,
        "optimizer": "adamw",
    },
    "paper": {
        "batch_size": 256,
        "epochs": 200,
        "prototypes": 3000,
        "warmup_epochs": 0.0,
    },
}
OPERATIONS = ("crop", "color", "gray", "blur")
PEAK_LR = {"larc": 0.6, "sgd": 0.05, "adamw": 0.00085}  # at batch size 256
SMALL_NETWORK_PEAK_LR = PEAK_LR | {"adamw": 0.004}  # for --arch small, which takes a higher one
CONSOLE_METRICS = ("prototypes", "knn")  # shown besides loss, chance, spread and speed
MAY_CHANGE = ("root", "workers", "out", "eval_every", "log_with")  # when a run is resumed
SAVE_MINUTES = 10  # A longer epoch also saves checkpoints midway.
RUN_FORMAT = 5  # of the files in --out; runs of another format are refused


# --------------------------------------------------------------------------------------
# Augmentation (section 3.2 and Appendix A.1)
# --------------------------------------------------------------------------------------


def augmentation(
    names: list[str], size: int, crop_scale: tuple[float, float], strength: float
) -> list:
    """Build the operations that make one crop, in the paper's order.

    Args:
        names: which of OPERATIONS to use.
        size: side of the crops, in pixels.
        crop_scale: least and largest area of a crop, as shares of the image's area.
        strength: strength s of the color jitter.

    Returns:
        Operations for `common.batches`, of which the first is a crop.
    """
    kernel_size = size // 10 | 1  # a tenth of the side, and odd
    jitter = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, min(0.2 * strength, 0.5))
    operations = {
        "crop": RandomResizedCrop(size, scale=crop_scale, flip=0.5),
        "color": RandomApply(jitter, p=0.8),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(kernel_size, sigma=(0.1, 2.0)), p=0.5),
    }
    if "crop" not in names:  # The middle square is shown, and not flipped.
        operations["crop"] = RandomResizedCrop(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    return [operation for name, operation in operations.items() if name in ("crop", *names)]


def default_crop_sizes(side: int) -> list[int]:
    """Sides of the large and the small crops for images with this side: 32 and 18, 224 and 96."""
    share = 9 / 16 if side <= 64 else 3 / 7
    return [side, round(side * share)]


# --------------------------------------------------------------------------------------
# Model: encoder, projection head and prototypes
# --------------------------------------------------------------------------------------


class SwAV(nn.Module):
    """Encoder f, projection head and prototypes C.

    Args:
        normalize: maps images in 0..1 to the inputs of the encoder, of the same shape.
        encoder: maps [B, 3, H, W] to [B, encoder.width].
        widths: outputs of the head's layers (linear, batch norm, ReLU, ..., linear); the last is D.
        K: number of prototypes.
    """

    def __init__(self, normalize: nn.Module, encoder: nn.Module, widths: list[int], K: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.encoder = encoder
        self.prototypes = nn.Linear(widths[-1], K, bias=False)  # the weight is C, [K, D]
        self.head = torchvision.ops.MLP(encoder.width, widths, norm_layer=nn.BatchNorm1d)

    def forward(self, *crops: Tensor) -> tuple[Tensor, Tensor]:
        """Embed crops of several sizes.

        Args:
            crops: [n, 3, S, S] in 0..1 for each size. The encoder takes one size at a time, and the
                head takes all.

        Returns:
            z [V * B, D] of unit length and the scores z C^T [V * B, K], float32, of all V crops of
            B images: all images' first crop, then all images' second crop, and so on.
        """
        z = self.head(torch.cat([self.encoder(self.normalize(x)) for x in crops]))
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            return z, self.prototypes(z)


@torch.no_grad()
def normalize_prototypes(C: Tensor) -> None:
    """Give the prototypes C [K, D] unit length."""
    C.copy_(F.normalize(C, dim=1))


# --------------------------------------------------------------------------------------
# Codes
# --------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes Q (Eq. 5): soft assignments that use all prototypes about equally.

    Each round first gives every prototype the same total weight, and then makes each row sum to 1.

    Args:
        scores: [B, K] of embeddings and prototypes.
        epsilon: weight of the entropy in Eq. 3; a smaller one gives harder codes.
        iterations: number of rounds; the more, the more equal the shares.

    Returns:
        [B, K], float32 or better; each row sums to 1.
    """
    dtype = torch.float32
    if epsilon < 0.01 and scores.device.type != "mps":  # MPS has no float64.
        dtype = torch.float64  # With so small an epsilon, float32 is not precise enough.
    log_q = scores.to(torch.promote_types(scores.dtype, dtype)) / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0).log_softmax(1)
    return log_q.exp().to(torch.promote_types(scores.dtype, torch.float32))


@torch.no_grad()
def assign_codes(
    Z: Tensor, C: Tensor, queue: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Codes of the two large crops of a batch.

    Args:
        Z: [2, N, D] embeddings of these crops of the images of all processes.
        C: [K, D] prototypes.
        queue: [2, L, D] embeddings of earlier batches, or None. They count toward the equal
            shares, but their codes are dropped.
        epsilon: the weight of the entropy; see `sinkhorn`.

    Returns:
        Codes [2, N, K], and the scores Z C^T that they come from, [2, N, K].
    """
    N = Z.shape[1]
    embeddings = Z if queue is None else torch.cat([queue, Z], dim=1)
    scores = embeddings @ C.T
    codes = torch.stack([sinkhorn(s, epsilon)[-N:] for s in scores])
    return codes, scores[:, -N:]


def enqueue(queue: Tensor, Z: Tensor, step: int) -> None:
    """Write the embeddings Z [2, N, D] of a step over the oldest ones in the queue [2, L, D].

    The queue is a ring: counted from the start of the run, image number i is in row i mod L. If it
    is shorter than the batch, it holds the last L images of the batch.
    """
    L, N = queue.shape[1], Z.shape[1]
    number = step * N + torch.arange(N, device=Z.device)
    queue[:, number[-L:] % L] = Z[:, -L:]


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Swapped prediction (Eq. 2 and 6), mean over images, codes and the crops that predict them.

    The code q of each large crop i, 0 or 1, is predicted from every other crop v:

        loss of i and v = -sum over k of q[i, k] * log softmax(scores[v] / tau)[k]

    Args:
        scores: [V, B, K] of all V crops (in the paper V + 2), of which the first two have codes.
        codes: [2, B, K] without gradient.
        temperature: tau > 0.

    Returns:
        Scalar; ln K if all scores are equal.

    Raises:
        ValueError: if the shapes do not match.
    """
    if scores.ndim != 3 or len(scores) < 2 or codes.shape != (2, *scores.shape[1:]):
        raise ValueError(
            f"scores must be [V, B, K] and codes [2, B, K], got {scores.shape} and {codes.shape}"
        )
    V, B = scores.shape[:2]
    log_p = (scores / temperature).log_softmax(2)
    # [2, V]: entry (i, v) compares code i with its prediction from crop v, averaged over the
    # images. The diagonal, on which a crop would predict its own code, is left out.
    cross_entropy = -(codes.flatten(1) @ log_p.flatten(1).T) / B
    return (cross_entropy.sum() - cross_entropy.trace()) / (2 * (V - 1))


# --------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------


class LARC(torch.optim.SGD):
    """Layer-wise adaptive rate control (You et al. 2017), as in NVIDIA's apex without clipping.

        g <- 0.001 * |p| / (|gradient| + weight_decay * |p|) * (gradient + weight_decay * p)

    for every parameter p, unless |p| or |gradient| is 0: then g is the gradient. SGD with momentum
    follows, with g for the gradient and no further decay.
    """

    @torch.no_grad()
    def step(self, closure=None):
        # Each operation is one call for all parameters, as in torch's optimizers. A loop over the
        # parameters would make so many small calls that a GPU waits for them.
        for group in self.param_groups:
            decay = group["weight_decay"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            p_norms = torch.stack(torch._foreach_norm(params))
            g_norms = torch.stack(torch._foreach_norm(gradients))
            trust = 0.001 * p_norms / (g_norms + decay * p_norms + 1e-8)
            is_adapted = (g_norms > 0) & (p_norms > 0)
            trust = torch.where(is_adapted, trust, 1)

            # p.grad <- g - decay * p, since SGD adds the decay, which g already has.
            decays = torch._foreach_mul(params, decay)
            g = torch._foreach_mul(decays, list(is_adapted.float().unbind()))
            torch._foreach_add_(g, gradients)
            torch._foreach_mul_(g, list(trust.unbind()))
            torch._foreach_sub_(g, decays)
            for p, g_p in zip(params, g, strict=True):
                p.grad = g_p
        super().step()


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer that --optimizer names."""
    if name == "larc":
        return LARC(params, lr, momentum=0.9, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate at a step from 0 to steps - 1.

    It rises linearly from 1/16 of the peak to the peak. Then it follows a cosine down to 1/1000 of
    it.
    """
    if step < warmup:
        return peak * (1 + 15 * step / warmup) / 16
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))  # from 1 to 0
    return peak * (0.001 + 0.999 * cosine)


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
# Pictures
# --------------------------------------------------------------------------------------


def save_prototypes(
    path: Path, network: SwAV, images: common.ImageSet, size: int, seed: int
) -> None:
    """Save, for each of the ten most used prototypes, the eight nearest of 5,000 images."""
    sample = torch.randperm(len(images), generator=common.generator(seed))[:5000]
    images = images.take(sample)
    layers = nn.Sequential(network.normalize, network.encoder, network.head)
    z = common.extract_features(layers, images, size)
    C = network.prototypes.weight.detach()
    scores = F.normalize(z, dim=1) @ F.normalize(C, dim=1).T  # [5000, K]
    uses = scores.argmax(1).bincount(minlength=len(C))
    most_used = uses.argsort(descending=True)[:10]
    nearest = scores[:, most_used].argsort(0, descending=True)[:8].T.cpu()
    common.save_pictures(path, images.centers(nearest.flatten(), size), nearest.shape[1])


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line, with the defaults where a preset gives no others."""
    parser = argparse.ArgumentParser(
        "swav.py",
        description="Pretrain an image encoder with SwAV.",
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
    add("--head-layers", type=int, choices=(1, 2, 3), default=2, help="layers of the head")
    add(
        "--hidden",
        type=common.positive_int,
        help="width of the head's inner layers (default: the encoder's width)",
    )
    add("--dim", type=common.positive_int, default=128, help="dimensions of z")

    add = parser.add_argument_group("method").add_argument
    add(
        "--prototypes",
        type=common.int_above_1,
        help="number of prototypes, K (default: the batch size, at most 3000)",
    )
    add(
        "--freeze-prototypes",
        type=common.nonnegative_float,
        default=1.0,
        help="epochs at the start during which the prototypes are not trained",
    )
    add(
        "--epsilon",
        type=common.positive_float,
        default=0.05,
        help="weight of the entropy in the codes; a smaller one gives harder codes",
    )
    add(
        "--queue-size",
        type=common.nonnegative_int,
        default=3840,
        help="earlier images that take part in computing the codes; 0 for none",
    )
    add(
        "--queue-start",
        type=common.nonnegative_float,
        default=15.0,
        help="epochs before the queue begins to fill; it is used once it is full",
    )
    add(
        "--crops",
        type=common.positive_int,
        nargs="+",
        default=[2, 6],
        help="number of crops of each image at each resolution; the first number is at least 2, "
        "since two crops get codes",
    )
    add(
        "--crop-sizes",
        type=common.int_above_1,
        nargs="+",
        help="side of the crops in pixels, for each resolution (default: the side of the images, "
        "at most 224, and 3/7 of it, or 9/16 up to 64 pixels)",
    )
    add(
        "--crop-scales",
        type=common.positive_fraction,
        nargs="+",
        default=[0.14, 1.0, 0.05, 0.14],
        help="for each resolution two numbers, the least and the largest area of a crop, as shares "
        "of the image's",
    )
    add(
        "--augment",
        nargs="+",
        choices=OPERATIONS,
        help="operations; crop includes flips (default: all, but blur only above 64 pixels)",
    )
    add(
        "--color-strength",
        type=common.nonnegative_float,
        default=1.0,
        help="strength s of the color jitter",
    )
    add(
        "--temperature",
        type=common.positive_float,
        default=0.1,
        help="temperature tau of the softmax",
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
    add("--optimizer", choices=PEAK_LR, default="larc", help="algorithm that updates the weights")
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
        help="weight decay of the optimizer (default: 1e-6, for adamw 1e-4)",
    )
    add("--seed", type=common.nonnegative_int, default=0, help="random seed of weights and views")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/swav-DATA)")
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
    if args.prototypes is None:
        args.prototypes = min(3000, args.batch_size)
    if args.weight_decay is None:
        args.weight_decay = 1e-4 if args.optimizer == "adamw" else 1e-6
    if args.lr is None:
        power = 0.5 if args.optimizer == "adamw" else 0.75
        rates = SMALL_NETWORK_PEAK_LR if args.arch == "small" else PEAK_LR
        args.lr = rates[args.optimizer] * (args.batch_size / 256) ** power
    if args.out is None:
        args.out = Path("runs", f"swav-{Path(args.data).absolute().name}".removesuffix(".npz"))
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
    side = args.crop_sizes[0] if args.crop_sizes else images.side
    preset = args.preset or common.choose_preset(args.data, side, len(images))
    defaults = {"batch_size": common.default_batch_size(len(images))} | PRESETS[preset]
    args = parse_arguments(argv, defaults | {"preset": preset})

    # Flags that follow from the size of the views.
    args.crop_sizes = args.crop_sizes or default_crop_sizes(side)[: len(args.crops)]
    args.stem = args.stem or ("3x3" if side <= 64 else "7x7")
    names = [name for name in OPERATIONS if name != "blur" or side > 64]
    args.augment = args.augment or names

    taken = {name: value for name, value in defaults.items() if vars(args)[name] == value}
    return args, taken


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def build_recipes(args: argparse.Namespace) -> list[tuple[int, list]]:
    """For each resolution the number of crops of an image, and the operations that make a crop.

    Raises:
        SystemExit: if --crops, --crop-sizes and --crop-scales do not fit together.
    """
    resolutions = len(args.crops)
    if args.crops[0] < 2:
        common.fail("--crops must begin with 2 or more, because the first two crops get codes")
    if len(args.crop_sizes) != resolutions:
        common.fail(
            f"--crop-sizes needs one number for each of the {resolutions} resolutions of --crops, "
            f"but has {len(args.crop_sizes)}"
        )
    # More numbers than needed are allowed, because presets have them for small crops, too.
    if len(args.crop_scales) < 2 * resolutions or len(args.crop_scales) % 2 == 1:
        common.fail(
            f"--crop-scales needs two numbers, the least and the largest area, for each of the "
            f"{resolutions} resolutions of --crops, but has {len(args.crop_scales)}"
        )
    recipes = []
    for i, crops in enumerate(args.crops):
        least, largest = args.crop_scales[2 * i : 2 * i + 2]
        if least > largest:
            common.fail(f"--crop-scales {least} {largest}: the smaller area comes first")
        scale = (least, largest)
        operations = augmentation(args.augment, args.crop_sizes[i], scale, args.color_strength)
        recipes.append((crops, operations))
    return recipes


def find_problems(rows: list[dict], warmed_up: bool) -> list[str]:
    """Return warnings about the metrics of the last epoch.

    Args:
        rows: the metrics of all epochs. A loss that passes chance on its way down is no problem.
        warmed_up: whether the loss should have left chance by now.
    """
    row = rows[-1]
    at_chance = abs(row["loss"] / row["chance"] - 1) < 0.02
    is_falling = len(rows) > 1 and rows[-2]["loss"] - row["loss"] > 0.02
    found = []
    if warmed_up and row["spread"] < 0.1:  # 1 if embeddings fill the sphere, 0 if all are equal
        found.append(
            "the embeddings collapse (their spread should be near 1, and is near 0): use a lower "
            "--lr or --epsilon, or fewer --prototypes"
        )
    if warmed_up and at_chance and not is_falling:
        found.append(
            "the loss stays at chance: use a lower --epsilon, a longer --freeze-prototypes, a "
            "later --queue-start or fewer --prototypes"
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

    # Data: images to train on, without labels. Labeled training images (the bank) and test images
    # are used only for evaluation. During the run, kNN is measured on the validation images, which
    # are those of --holdout or else the test images.
    images, bank, test, validation = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream, args.holdout
    )

    # The flags again, with the defaults for images of this size and number.
    args, defaults = parse_arguments_for(images, args, argv)
    accelerator.print(common.describe_preset(args.preset, defaults))
    large_size = args.crop_sizes[0]
    recipes = build_recipes(args)
    common.check_batch_size(args.batch_size, len(images), processes)
    epoch_steps = len(images) // args.batch_size
    total_steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    if args.warmup_epochs is None:
        warmup_steps = min(10 * epoch_steps, total_steps // 10)
    else:
        warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps - 1)
    epochs = math.ceil(total_steps / epoch_steps)

    # The steps from which the prototypes are trained, the queue is filled, and the full queue is
    # used.
    unfreeze_step = round(args.freeze_prototypes * epoch_steps)
    queue_start_step = round(args.queue_start * epoch_steps)
    queue_full_step = queue_start_step + math.ceil(args.queue_size / args.batch_size)
    images_with_codes = args.batch_size
    if queue_full_step < total_steps:
        images_with_codes += args.queue_size
    if images_with_codes < args.prototypes:
        accelerator.print(
            f"warning: codes are computed from {images_with_codes} images at a time, fewer than "
            f"the {args.prototypes} prototypes: use fewer --prototypes, a larger --batch-size, or "
            "a --queue-size that is full early in the run"
        )

    # Model: encoder, head and prototypes in one module, so that a step is one forward pass.
    mean, std = common.STATISTICS[args.normalize]
    torch.manual_seed(args.seed)
    if args.init:
        encoder = common.load_initial_encoder(args.init, args.arch, args.stem, mean, std)
    else:
        encoder = common.build_encoder(args.arch, args.stem)
    args.hidden = args.hidden or encoder.width
    head_widths = [args.hidden] * (args.head_layers - 1) + [args.dim]
    normalize = common.Normalize(mean, std)
    network = SwAV(normalize, encoder, head_widths, args.prototypes)
    network = network.to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    C = network.prototypes.weight
    queue = torch.zeros(2, args.queue_size, args.dim, device=device)
    optimizer = build_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)

    # Run: start a new one, print a finished one, or resume from a checkpoint.
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"method": "swav", "images": images.fingerprint}
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
    # For each prototype, how many of this epoch's large crops are nearest to it.
    uses = torch.zeros(args.prototypes, device=device)
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        queue.copy_(checkpoint["queue"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        rows = checkpoint["rows"]
        losses = list(checkpoint["losses"].to(device))
        uses.copy_(checkpoint["uses"])
        accelerator.print(f"resuming after step {step} of {total_steps}")

    def state() -> dict:
        """All that is needed to resume the run."""
        return {
            "model": network.state_dict(),
            "queue": queue,
            "optimizer": optimizer.state_dict(),
            "step": step,
            "losses": torch.tensor(losses),
            "uses": uses,
            "rows": rows,
        }

    # Training. The images and views of a step depend only on the seed, the epoch and the step, not
    # on the number of processes or on where the run was interrupted.
    batches = common.batches(
        images, recipes, args.batch_size, args.seed, start=step, stop=total_steps
    )
    accelerator.init_trackers("swav", {name: str(value) for name, value in settings.items()})
    accelerator.print(common.format_header(CONSOLE_METRICS))
    saved_at = time.monotonic()
    while step < total_steps:
        epoch = step // epoch_steps
        first_step = step
        started_at = time.monotonic()
        last_step = min((epoch + 1) * epoch_steps, total_steps)
        epoch_batches = itertools.islice(batches, last_step - step)
        bar = common.progress(epoch_batches, f"epoch {epoch + 1}/{epochs}", last_step - step)
        for index, views in bar:
            if step == 0:
                common.save_views(args.out / "views.png", images, index, views)
            lr = learning_rate(step, total_steps, warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # Algorithm 1: embeddings z [V, B, D] and scores z C^T [V, B, K] of all V crops of this
            # process's B images.
            normalize_prototypes(C)
            x = [v.flatten(0, 1).contiguous(memory_format=torch.channels_last) for v in views]
            z, scores = model(*x)
            z = z.unflatten(0, (-1, len(index)))
            scores = scores.unflatten(0, (-1, len(index)))

            # Codes [2, N, K] of the two large crops of the N images of all processes, of which each
            # process takes its own rows. `gather` joins along the first dimension, so the images
            # come first.
            own_z = z[:2].detach().transpose(0, 1).contiguous()
            Z = accelerator.gather(own_z).transpose(0, 1)  # [2, N, D]
            full_queue = queue if args.queue_size and step >= queue_full_step else None
            codes, code_scores = assign_codes(Z, C, full_queue, args.epsilon)
            if args.queue_size and step >= queue_start_step:
                enqueue(queue, Z, step)
            own_codes = codes.chunk(processes, dim=1)[accelerator.process_index]
            loss = swapped_prediction_loss(scores, own_codes, args.temperature)

            optimizer.zero_grad()
            accelerator.backward(loss)
            if step < unfreeze_step:
                C.grad = None  # Unlike zeros, None also stops momentum and weight decay.
            optimizer.step()

            # Count the step; within a long epoch, save from time to time.
            step += 1
            losses.append(accelerator.reduce(loss.detach(), "mean"))
            nearest = code_scores.argmax(2).flatten()
            uses.index_add_(0, nearest, torch.ones_like(nearest, dtype=uses.dtype))
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
        shares = uses / uses.sum()
        row = {
            "epoch": epoch + 1,
            "step": step,
            "loss": mean_loss,
            "chance": math.log(args.prototypes),  # the loss of uniform predictions
            "prototypes": (uses > 0).sum().item(),  # that were the nearest one
            "entropy": torch.special.entr(shares).sum().item(),  # ln K if all are used equally
            "spread": common.spread(Z[0]),  # of the last batch
            "lr": lr,
            "images_per_s": (step - first_step) * args.batch_size / seconds,
            "wait": images.waited / seconds,  # share of the epoch spent waiting for files
            "minutes_left": (total_steps - step) / (step - first_step) * seconds / 60,
        }

        # Evaluate, report and save.
        if bank and ((epoch + 1) % args.eval_every == 0 or step == total_steps):
            features = nn.Sequential(normalize, encoder)
            row["knn"] = common.knn_accuracy(features, bank, validation, large_size)
        rows.append(row)
        accelerator.print(common.format_row(row, CONSOLE_METRICS))
        for problem in find_problems(rows, step > max(warmup_steps, unfreeze_step)):
            accelerator.print(f"warning: {problem}")
        accelerator.log(row, step=step)
        losses = []
        images.waited = 0.0
        uses.zero_()
        if accelerator.is_main_process:
            save_run(args.out, state())
        saved_at = time.monotonic()

    # The end of the run: export the encoder, evaluate it, and write and print the results.
    about = {
        "method": "swav",
        "architecture": args.arch,
        "stem": args.stem,
        "image_size": large_size,
        "mean": list(mean),
        "std": list(std),
        "data": args.data,
    }
    if accelerator.is_main_process:
        common.save_encoder(args.out / "encoder.safetensors", encoder, **about)
    save_prototypes(args.out / "prototypes.png", network, images, large_size, args.seed)
    common.finish(args.out, encoder, about, bank, test, validation, args.seed, rows[-1])
    # Accelerate's end_training would also destroy the process group, to which DDP still refers.
    # `common.entry_point` does it later.
    for tracker in accelerator.trackers:
        tracker.finish()


if __name__ == "__main__":
    with common.entry_point("the same command continues from the last checkpoint"):
        main()
