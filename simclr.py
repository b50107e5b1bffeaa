# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.

Chen, Kornblith, Norouzi and Hinton, ICML 2020, https://arxiv.org/abs/2002.05709

    python simclr.py                                    # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 simclr.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 simclr.py --data FOLDER --batch-size 4096

The run is kept in --out. It can be stopped at any time; the same command resumes it from its last
checkpoint, and it ends as if it had never been stopped.

Where to find the parts of the paper:
- Eq. 1, NT-Xent: `nt_xent`
- Algorithm 1: the inner loop of `main`
- section 2.1 and Appendix A, the augmentation: `augmentation`
- section 2.1, the projection head g: `projection_head`
- section 2.2, large batches: `gather` and `LARS`; batch norm is synchronized over GPUs. Batches
  larger than the memory: --chunk-size, `embed_in_chunks`
- Appendix B.1, the learning rate: `PEAK_LR`, --lr-rule and `learning_rate`
- Appendix B.9, small images: the 3x3 stem and no blur, up to 64 pixels

Differences from the paper and the authors' code:
- The loss is the mean of Eq. 1 over all 2N views. The authors' code returns twice that.
- The defaults depend on the images (`PRESETS`). Those of --preset paper are the paper's, but with
  batch size 256 (4096) and the square-root rule for the learning rate (linear).
- Inputs are images in 0..1, without normalization, as in the authors' code.
- SGD and AdamW are offered besides LARS. Unlike LARS they also decay batch norm and biases.
- On CPUs each process has its own batch norm statistics, because PyTorch synchronizes them only on
  GPUs.

The authors' experiments, with the linear accuracy that they report. They were not run here:
- CIFAR-10, ResNet-18 (91 %): --data cifar10 --preset paper --batch-size 512 --epochs 1000 --lr 2
  --weight-decay 1e-4 --color-strength 0.5 --temperature 0.5
- ImageNet, 100 epochs (64.5 %): --data FOLDER --preset paper --arch resnet50 --batch-size 4096
  --lr-rule linear --eval-every 20

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
        "crop_scale": 0.2,
        "color_strength": 1.0,
        "temperature": 0.1,
        "epochs": 36,
        "optimizer": "adamw",
        "warmup_epochs": 2.0,
    },
    "small": {
        "crop_scale": 0.2,
        "temperature": 0.1,
        "optimizer": "adamw",
    },
    "photos": {
        "crop_scale": 0.2,
        "temperature": 0.1,
        "optimizer": "adamw",
    },
    "paper": {
        "batch_size": 256,
        "color_strength": 1.0,
        "temperature": 0.1,
    },
}
OPERATIONS = ("crop", "color", "gray", "blur")
# At batch size 4096. For LARS both rules agree there: 4.8 = 0.3 * 4096 / 256 = 0.075 * sqrt(4096).
PEAK_LR = {"lars": 4.8, "sgd": 0.48, "adamw": 0.004}
SMALL_NETWORK_PEAK_LR = PEAK_LR | {"adamw": 0.016}  # for --arch small, which takes a higher one
CONSOLE_METRICS = ("knn",)  # shown besides loss, chance, spread and speed
MAY_CHANGE = ("root", "workers", "out", "eval_every", "log_with")  # when a run is resumed
SAVE_MINUTES = 10  # A longer epoch also saves checkpoints midway.
RUN_FORMAT = 5  # of the files in --out; runs of another format are refused


# --------------------------------------------------------------------------------------
# Augmentation (Appendix A)
# --------------------------------------------------------------------------------------


def augmentation(names: list[str], size: int, crop_scale: float, strength: float) -> list:
    """Build the operations that make one view, in the paper's order.

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


# --------------------------------------------------------------------------------------
# Model (section 2.1): encoder f and projection head g
# --------------------------------------------------------------------------------------


def projection_head(width: int, layers: int, hidden: int, dim: int) -> nn.Sequential:
    """Build g, which maps h [B, width] to z [B, dim]. With zero layers, z = h.

    Each layer is linear without bias, followed by batch norm and, except the last, by ReLU.
    The last batch norm has a scale but no shift, as in the authors' code.

    Args:
        width: of h.
        layers: from 0 to 3.
        hidden: width of the inner layers.
        dim: of z.
    """
    widths = [width] + [hidden] * (layers - 1) + [dim]
    head = []
    for i in range(layers):
        head += [nn.Linear(widths[i], widths[i + 1], bias=False), nn.BatchNorm1d(widths[i + 1])]
        if i < layers - 1:
            head.append(nn.ReLU(inplace=True))
    if head:
        head[-1].bias.requires_grad_(False)
    return nn.Sequential(*head)


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent loss (Eq. 1), mean over all 2N views.

    With cosine similarities s, and j the other view of the image that view i shows,

        loss of i = -log( exp(s[i, j] / tau) / sum over k != i of exp(s[i, k] / tau) )

    Args:
        z1, z2: [N, D] embeddings of the two views; row n of both comes from image n.
            They are normalized here.
        temperature: tau > 0.

    Returns:
        Scalar; ln(2N - 1) if all embeddings are equal.

    Raises:
        ValueError: if z1 and z2 are not [N, D] of the same shape.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must both be [N, D], got {z1.shape} and {z2.shape}")
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # leaves k = i out of the denominator
    positives = torch.arange(len(z), device=z.device).roll(len(z1))  # j = i + N, modulo 2N
    # Cross-entropy is -s[i, j] / tau + log(sum over k of exp(s[i, k] / tau)), and this sum is the
    # denominator of Eq. 1.
    return F.cross_entropy(similarity, positives)


def lower_bound(N: int, temperature: float) -> float:
    """Lower bound of the NT-Xent loss of N images.

    It would be reached if both views of an image coincided and the images formed a simplex, in
    which the cosine of any two is -1 / (N - 1). That takes N - 1 dimensions or more. Each positive
    pair then has the cosine 1, which is N / (N - 1) more than that of the 2N - 2 others.
    """
    return math.log1p((2 * N - 2) * math.exp(-N / (N - 1) / temperature))


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


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as in SimCLR's code.

        g <- gradient + weight_decay * p
        buffer <- momentum * buffer + lr * trust_coefficient * |p| / |g| * g
        p <- p - buffer

    The learning rate is inside the buffer, so that a new rate does not rescale past gradients.
    One-dimensional parameters (batch norm, biases) are neither decayed nor adapted. The factor
    trust_coefficient * |p| / |g| is 1 where |p| or |g| is 0.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
            },
        )

    @torch.no_grad()
    def step(self, closure=None):
        # Each operation is one call for all parameters, as in torch's optimizers. A loop over the
        # parameters would make so many small calls that a GPU waits for them.
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:  # torch's _foreach functions refuse empty lists.
                continue
            weights = [p for p in params if p.ndim > 1]
            others = [p for p in params if p.ndim <= 1]  # batch norm and biases
            params = weights + others
            g = self.adapt(weights, group) + [p.grad for p in others]

            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, g, alpha=group["lr"])
            torch._foreach_sub_(params, buffers)

    @staticmethod
    def adapt(params: list[Tensor], group: dict) -> list[Tensor]:
        """The gradients with weight decay, each multiplied by trust_coefficient * |p| / |g|."""
        if not params:
            return []
        g = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        p_norms = torch.stack(torch._foreach_norm(params))
        g_norms = torch.stack(torch._foreach_norm(g))
        trust = group["trust_coefficient"] * p_norms / g_norms
        trust = torch.where((trust > 0) & trust.isfinite(), trust, 1)
        torch._foreach_mul_(g, list(trust.unbind()))
        return list(g)


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer that --optimizer names."""
    if name == "lars":
        return LARS(params, lr, weight_decay=weight_decay)
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
        "simclr.py",
        description="Pretrain an image encoder with SimCLR.",
        formatter_class=common.HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = common.fail
    common.add_data_arguments(parser)
    common.add_preset_argument(parser, PRESETS)

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    add("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    add("--init", help="encoder.safetensors to start f from")
    add("--head-layers", type=int, choices=range(4), default=2, help="layers of the head g")
    add(
        "--hidden",
        type=common.positive_int,
        help="width of the head's inner layers (default: the encoder's width)",
    )
    add("--dim", type=common.positive_int, default=128, help="dimensions of z")

    add = parser.add_argument_group("method").add_argument
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
        default=0.08,
        help="area of the smallest crop, as a share of the image's",
    )
    add(
        "--color-strength",
        type=common.nonnegative_float,
        default=0.5,
        help="strength s of the color jitter",
    )
    add("--temperature", type=common.positive_float, default=0.2, help="temperature tau of NT-Xent")

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
    add("--optimizer", choices=PEAK_LR, default="lars", help="algorithm that updates the weights")
    add(
        "--lr",
        type=common.positive_float,
        help="peak learning rate (default: by --optimizer, --batch-size and --lr-rule)",
    )
    add(
        "--lr-rule",
        choices=("linear", "sqrt"),
        default="sqrt",
        help="how the default peak grows with the batch size",
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
    add("--out", type=Path, help="folder of the run (default: runs/simclr-DATA)")
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
    if args.weight_decay is None:
        args.weight_decay = 1e-4 if args.optimizer == "adamw" else 1e-6
    if args.lr is None:
        power = {"linear": 1, "sqrt": 0.5}[args.lr_rule]
        rates = SMALL_NETWORK_PEAK_LR if args.arch == "small" else PEAK_LR
        args.lr = rates[args.optimizer] * (args.batch_size / 4096) ** power
    if args.out is None:
        args.out = Path("runs", f"simclr-{Path(args.data).absolute().name}".removesuffix(".npz"))
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
    names = [name for name in OPERATIONS if name != "blur" or side > 64]
    args.augment = args.augment or names

    taken = {name: value for name, value in defaults.items() if vars(args)[name] == value}
    return args, taken


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def find_problems(row: dict, warmed_up: bool) -> list[str]:
    """Return warnings about the metrics of one epoch."""
    found = []
    if row["spread"] < 0.1:  # 1 if embeddings fill the sphere, 0 if all are equal
        found.append(
            "the embeddings collapse (their spread should be near 1, and is near 0): use a lower "
            "--lr or a longer --warmup-epochs"
        )
    if warmed_up and row["chance"] - row["loss"] < 0.02 * (row["chance"] - row["bound"]):
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
    recipe = augmentation(args.augment, args.image_size, args.crop_scale, args.color_strength)
    common.check_batch_size(args.batch_size, len(images), processes)
    common.check_chunk_size(args.chunk_size, args.batch_size // processes)
    epoch_steps = len(images) // args.batch_size
    total_steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    if args.warmup_epochs is None:
        warmup_steps = min(10 * epoch_steps, total_steps // 10)
    else:
        warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps - 1)
    epochs = math.ceil(total_steps / epoch_steps)

    # Model: f and g in one module, so that a step is one forward pass.
    mean, std = common.STATISTICS["none"]  # The inputs are not normalized.
    torch.manual_seed(args.seed)
    if args.init:
        encoder = common.load_initial_encoder(args.init, args.arch, args.stem, mean, std)
    else:
        encoder = common.build_encoder(args.arch, args.stem)
    args.hidden = args.hidden or encoder.width
    head = projection_head(encoder.width, args.head_layers, args.hidden, args.dim)
    network = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = build_optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)

    # Run: start a new one, print a finished one, or resume from a checkpoint.
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"method": "simclr", "images": images.fingerprint}
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
    accelerator.init_trackers("simclr", {name: str(value) for name, value in settings.items()})
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
            lr = learning_rate(step, total_steps, warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # Algorithm 1: both views of every image through f and g.
            if args.chunk_size:
                z = embed_in_chunks(model, views, args.chunk_size)
            else:
                z = embed(model, views)  # [B, 2, D]

            # Eq. 1 on the batch of all processes, N images. `gather` joins along the first
            # dimension, so the images come first.
            z1, z2 = gather(z, accelerator).unbind(1)  # [N, D] each
            loss = nt_xent(z1, z2, args.temperature)

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
            "chance": math.log(2 * args.batch_size - 1),  # the loss of equal embeddings
            "bound": lower_bound(args.batch_size, args.temperature),
            "spread": common.spread(z1),  # of the last batch
            "lr": lr,
            "images_per_s": (step - first_step) * args.batch_size / seconds,
            "wait": images.waited / seconds,  # share of the epoch spent waiting for files
            "minutes_left": (total_steps - step) / (step - first_step) * seconds / 60,
        }

        # Evaluate, report and save.
        if bank and ((epoch + 1) % args.eval_every == 0 or step == total_steps):
            row["knn"] = common.knn_accuracy(encoder, bank, validation, args.image_size)
        rows.append(row)
        accelerator.print(common.format_row(row, CONSOLE_METRICS))
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
        "method": "simclr",
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
