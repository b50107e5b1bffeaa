# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.

Chen, Kornblith, Norouzi, Hinton, ICML 2020, https://arxiv.org/abs/2002.05709
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import tqdm
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, RandomApply, RandomResizedCrop, fail, grayscale

# What 2 CPU cores learn from the bundled images in some minutes; a flag that is given wins.
BUNDLED = {"arch": "small", "epochs": 40, "optimizer": "adamw", "crop_scale": 0.2}
LR_4096 = {"lars": 4.8, "sgd": 0.48, "adamw": 0.008}  # peak rates at batch 4096
MAY_BE_0 = {"head_layers", "color_strength", "warmup_epochs", "weight_decay", "seed"}
MAY_CHANGE = {"root", "eval_every", "workers", "out", "log_with"}  # when a run goes on


# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("simclr.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.error = fail
    flag = p.add_argument
    flag("--data", default="fashion-mini", help=f"{', '.join(common.SETS)} or a folder")
    flag("--root", default="data", help="folder where torchvision's sets are or will be put")
    flag("--limit", type=int, help="train on the first so many images of a fixed shuffle")
    flag("--image-size", type=int, help="side of the views in pixels (default: the images')")
    flag("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    flag("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    flag("--init", help="an encoder.safetensors to start from")
    flag("--head-layers", type=int, choices=range(4), default=2, help="layers of the projection g")
    flag("--hidden", type=int, default=512, help="width of the projection's hidden layers")
    flag("--dim", type=int, default=128, help="dimensions of z")
    flag("--augment", nargs="+", choices=("crop", "color", "gray", "blur"), help="operations (Fig. 5; crop flips too; "
         "default: crop color gray, and blur above 64 pixels)")  # fmt: skip
    flag("--crop-scale", type=float, default=0.08, help="smallest crop, as a share of the area")
    flag("--color-strength", type=float, default=0.5, help="strength s of the colours (Table 1)")
    flag("--temperature", type=float, default=0.2, help="temperature of NT-Xent")
    flag("--epochs", type=int, default=100, help="passes over the images")
    flag("--max-steps", type=int, help="make the run, and its schedule, no longer than this")
    flag("--batch-size", type=int, default=256, help="images a step, over all processes")
    flag("--optimizer", choices=LR_4096, default="lars", help="optimiser")
    flag("--lr", type=float, help="peak learning rate (default: by --lr-rule)")
    flag("--lr-rule", choices=("linear", "sqrt"), default="sqrt", help="how the batch sets --lr")
    flag("--warmup-epochs", type=float, default=10, help="epochs of linear warm-up")
    flag("--weight-decay", type=float, default=1e-6, help="weight decay")
    flag("--seed", type=int, default=0, help="seed of the weights, batches and views")
    flag("--knn-k", type=int, default=20, help="neighbours of the kNN evaluation")
    flag("--knn-temperature", type=float, default=0.07, help="temperature of the kNN's votes")
    flag("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    flag("--workers", type=int, default=os.cpu_count(), help="threads that decode image files")
    flag("--out", help="folder of the run (default: runs/simclr-DATA)")
    flag("--log-with", help="a tracker of Accelerate's: tensorboard, wandb, ...")
    args = p.parse_args(argv)
    if args.data == "fashion-mini":
        p.set_defaults(**BUNDLED)
        args = p.parse_args(argv)
    for name, value in vars(args).items():
        number = isinstance(value, int | float) and not (value == 0 and name in MAY_BE_0)
        if number and not 0 < value < math.inf or name == "crop_scale" and value > 1:
            fail(f"--{name.replace('_', '-')} {value} is out of range")
    if args.log_with and args.log_with not in map(str, get_available_trackers()):
        fail(f"--log-with {args.log_with}: no such tracker, or its package is not installed")
    if args.lr is None:
        share = args.batch_size / 4096
        args.lr = LR_4096[args.optimizer] * (share if args.lr_rule == "linear" else share**0.5)
    args.out = Path(args.out or f"runs/simclr-{Path(args.data).name}")
    return args


# -------------------------------------------------------------------------- augmentation
def augmentation(names: Sequence[str], size: int, crop_scale: float, s: float) -> list:
    """Appendix A, in the paper's order; without "crop" the whole image, resized."""
    recipe = {
        "crop": RandomResizedCrop(size, (crop_scale, 1.0), flip=0.5),
        "color": RandomApply(ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.2 * s, 0.5)), p=0.8),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(size // 10 | 1, (0.1, 2.0)), p=0.5),
    }
    whole = RandomResizedCrop(size, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    first = [] if "crop" in names else [whole]
    return first + [operation for name, operation in recipe.items() if name in names]


# --------------------------------------------------------------------------------- model
class SimCLR(nn.Module):
    """Encoder f and projection head g (§2.1): x [B, 3, H, W] → z [B, dim].

    The head's layers are linear without bias, then BN; all but the last have ReLU, and the last BN
    has a scale and no shift, as in the authors' code.
    """

    def __init__(self, encoder: nn.Module, layers: int, hidden: int, dim: int) -> None:
        super().__init__()
        widths, head = [encoder.width, *[hidden] * (layers - 1), dim], []
        for i in range(layers):
            head += [nn.Linear(widths[i], widths[i + 1], bias=False), nn.BatchNorm1d(widths[i + 1])]
            head += [nn.ReLU(inplace=True)] if i < layers - 1 else []
        if head:
            head[-1].bias.requires_grad_(False)
        self.encoder, self.head = encoder, nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


# ---------------------------------------------------------------------------------- loss
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent, Eq. 1 over both directions, mean over the 2N views: scalar.

    z1, z2 [N, D], of any length, row i of both from one image.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must be [N, D] alike, not {z1.shape} and {z2.shape}")
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # 1[k ≠ i]
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z1)))


def gather(z: Tensor, accelerator: Accelerator) -> Tensor:
    """z [B, ...] of each process → [P·B, ...] of all, with the gradient of the one big batch.

    Every process then computes the whole loss, so that its own rows carry their whole gradient.
    DDP averages the parameters' gradients over the P processes: hence the factor P.
    """
    P, own = accelerator.num_processes, accelerator.process_index
    if P == 1:
        return z
    everyone = list(accelerator.gather(z.detach()).chunk(P))
    everyone[own] = z.detach() + P * (z - z.detach())
    return torch.cat(everyone)


def bounds(N: int, temperature: float) -> tuple[float, float]:
    """NT-Xent of a batch of N pairs at chance, and its least value (a simplex of N points)."""
    others = 2 * N - 2
    return math.log1p(others), math.log1p(others * math.exp(-N / ((N - 1) * temperature)))


# ---------------------------------------------------------------- optimiser and schedule
class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017), as the authors' code has it.

    lr inside the momentum buffer; one-dimensional parameters (BN, biases) are excluded from weight
    decay and from adaptation.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust_coefficient: float = 0.001) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      trust_coefficient=trust_coefficient))  # fmt: skip

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if (g := p.grad) is None:
                    continue
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    trust = group["trust_coefficient"] * p.norm() / g.norm()
                    g = g * torch.where((trust > 0) & trust.isfinite(), trust, 1)
                v = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p -= v.mul_(group["momentum"]).add_(g, alpha=group["lr"])


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Rate of step 0 .. steps - 1: linear up to the peak, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ---------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and leave a run in args.out; the same arguments again go on with it."""
    args = parse_arguments(argv)
    out = args.out
    accelerator = Accelerator(log_with=args.log_with, project_dir=out)
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    one_of_many = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if int(os.environ.get("WORLD_SIZE", 1 + one_of_many)) > processes:
        fail("several processes were asked for, but Accelerate started one; on a CPU, launch with "
             "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N")  # fmt: skip

    load = partial(common.load_images, args.data, root=args.root, device=device, workers=args.workers)
    data, test = load("pretrain", limit=args.limit), load("test")
    bank = load("train", limit=args.limit) if data.labels is None else data
    size = args.image_size or min(data.images.shape[2:])
    stem = args.stem or ("3x3" if size <= 64 else "7x7")
    names = args.augment or ["crop", "color", "gray", *["blur"] * (size > 64)]
    recipe = augmentation(names, size, args.crop_scale, args.color_strength)
    if not 2 <= args.batch_size <= len(data) or args.batch_size % processes:
        fail(f"--batch-size {args.batch_size}: take 2 to {len(data)} (the images), a multiple of "
             f"{processes} (the processes)")  # fmt: skip
    if args.knn_k > len(bank):
        fail(f"--knn-k {args.knn_k} is more than the {len(bank)} labelled images")
    epoch_steps = len(data) // args.batch_size
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    warmup = min(round(args.warmup_epochs * epoch_steps), steps - 1)

    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    settings |= {"images": len(data), "mixed_precision": accelerator.mixed_precision}
    config = {"settings": settings, "device": str(device), "processes": processes}
    config |= {name: version(name) for name in ("torch", "torchvision", "accelerate")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        old = json.loads((out / "config.json").read_text()) if any(out.iterdir()) else config
        changed = [f"{k} (was {old['settings'].get(k)})" for k in settings
                   if old["settings"].get(k) != settings[k]]  # fmt: skip
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not changed:
            with common.written_aside(out / "config.json") as aside:
                aside.write_text(json.dumps(config, indent=1))
    except (OSError, ValueError, KeyError) as error:
        fail(f"--out {out} is not a folder of a run, nor can it be made one ({error})")
    if changed:
        fail(f"{out} holds a run with another {', '.join(changed)}: take another --out")
    if (out / "results.json").exists():
        say(f"{out} is finished:\n{common.table(json.loads((out / 'results.json').read_text()))}")
        return

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    encoder = common.build_encoder(args.arch, stem)
    if args.init:
        encoder, about = common.load_encoder(args.init)
        if (about["architecture"], about["stem"]) != (args.arch, stem):
            fail(f"--init {args.init}: take --arch {about['architecture']} --stem {about['stem']}")
    net = SimCLR(encoder, args.head_layers, args.hidden, args.dim)
    if processes > 1 and device.type == "cuda":  # it has no CPU kernel
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net = net.to(device, memory_format=torch.channels_last)
    make = {"lars": LARS, "sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
    optimizer = make[args.optimizer](net.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)

    done, rows = 0, []  # steps; a row an epoch
    sums = torch.zeros(3, device=device)  # of this epoch: the losses, the spreads of z, the steps
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, rows, sums = state["step"], state["rows"], state["sums"].to(device)
        say(f"going on after step {done} of {steps}")

    def save() -> None:
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": done, "rows": rows, "sums": sums}
        if accelerator.is_main_process:
            with common.written_aside(out / "checkpoint.pt") as aside:
                torch.save(state, aside)
            with common.written_aside(out / "metrics.jsonl") as aside:
                aside.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def note(number: int, frame: object) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    signals = []
    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    if args.log_with:
        accelerator.init_trackers("simclr", {k: str(v) for k, v in settings.items()})
    chance, bound = bounds(args.batch_size, args.temperature)
    broken = torch.tensor(-1, device=device)  # the first step whose loss is not finite
    look = 1 if device.type == "cpu" else 20  # steps between two looks at what is on the device
    saved = epoch_began = time.monotonic()
    epoch_start, halt = done, 0
    stream = common.batches(data, [(2, recipe)], args.batch_size, args.seed, done, steps)
    for step, index, (views,) in tqdm(stream, "steps", steps, initial=done, smoothing=0.05,
                                      disable=not sys.stderr.isatty()):  # fmt: skip
        if step == 0 and accelerator.is_main_process:
            shown = torch.cat([data.centres(index[:8], size), *views[:, :8]])
            common.save_pictures(out / "views.png", shown, 8)
        lr = learning_rate(step, steps, warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        z = model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        z1, z2 = gather(z.unflatten(0, (2, -1)).transpose(0, 1), accelerator).unbind(1)
        loss = nt_xent(z1, z2, args.temperature)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        with torch.no_grad():
            spread = F.normalize(z1, dim=1).std(0).mean() * z1.shape[1] ** 0.5
            sums += torch.stack([loss, spread, torch.ones_like(loss)])
            broken = torch.where((broken < 0) & ~loss.isfinite(), step, broken)
        done = step + 1
        epoch_ends = done % epoch_steps == 0 or done == steps
        if done % look and not epoch_ends:
            continue
        flags = torch.stack([broken >= 0, torch.tensor(len(signals) > 0, device=device)])
        nan, halt = accelerator.reduce(flags.float()).tolist()
        if nan:
            fail(f"the loss of step {int(broken)} is not finite: take a lower --lr and another --out "
                 f"({out}/checkpoint.pt is from before)")  # fmt: skip
        if epoch_ends:
            seconds = (time.monotonic() - epoch_began) / (done - epoch_start)  # a step
            means = (sums[:2] / sums[2]).tolist()
            row = {"epoch": step // epoch_steps + 1, "step": done, "loss": means[0]}
            row |= {"chance": chance, "bound": bound, "spread": means[1], "lr": lr}
            row["images_per_s"] = round(args.batch_size / seconds)
            row["minutes_left"] = (steps - done) * seconds / 60
            if row["epoch"] % args.eval_every == 0 or done == steps:
                row["knn"] = common.knn_accuracy(encoder, bank, test, size, args.knn_k, args.knn_temperature)
            say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if means[1] < 0.1:
                say("warning: the embedding collapses (spread, 1 on the sphere, is near 0): ")
            if done > max(warmup, epoch_steps) and chance - means[0] < 0.02 * (chance - bound):
                say("warning: the loss stays at chance: ")
            rows.append(row)
            accelerator.log(row, step=done)
            sums.zero_()
            epoch_start, epoch_began = done, time.monotonic()
        if epoch_ends or halt or time.monotonic() - saved > 600:
            save()
            saved = time.monotonic()
        if halt:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    accelerator.end_training()
    if halt and done < steps:
        say(f"stopped after step {done} of {steps}; the same command goes on from there")
        raise SystemExit(128 + signals[0])

    untrained = (torch.manual_seed(args.seed), common.build_encoder(args.arch, stem))[1]
    encoders = {"SimCLR": encoder, "random initialisation": untrained.to(device)}
    rows = common.compare(encoders, bank, test, size, args.knn_k, args.knn_temperature, args.seed)
    if accelerator.is_main_process:
        common.save_encoder(out / "encoder.safetensors", encoder, method="simclr", data=args.data,
                            architecture=args.arch, stem=stem, image_size=size, epochs=args.epochs)  # fmt: skip
        with common.written_aside(out / "results.json") as aside:
            aside.write_text(json.dumps(rows, indent=1))
    say(f"test accuracy in percent, k = {args.knn_k}, T = {args.knn_temperature}\n{common.table(rows)}")


if __name__ == "__main__":
    main()
