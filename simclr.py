# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen, Kornblith,
Norouzi and Hinton, ICML 2020, https://arxiv.org/abs/2002.05709).

    python simclr.py                                      the bundled images, on a laptop
    accelerate launch --mixed_precision bf16 simclr.py --data cifar10 --epochs 500
    accelerate launch --multi_gpu --num_processes 8 simclr.py --data FOLDER --batch-size 4096

The same command again goes on with an interrupted run. Deviations: the mean of Eq. 1 over 2N views
(the authors' code: twice that); defaults for small images; on CPUs each process has its own BN.
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
BUNDLED = {"arch": "small", "epochs": 36, "crop_scale": 0.2, "color_strength": 1,
           "temperature": 0.1, "optimizer": "adamw", "weight_decay": 1e-4, "warmup_epochs": 2}
OPERATIONS = ("crop", "color", "gray", "blur")
LR_4096 = {"lars": 4.8, "sgd": 0.48, "adamw": 0.016}  # peak rates at batch 4096
MAY_BE_0 = {"head_layers", "color_strength", "warmup_epochs", "weight_decay", "seed"}
MAY_CHANGE = {"root", "eval_every", "workers", "out", "log_with"}  # when a run goes on

# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("simclr.py", epilog=f"defaults with the bundled images: {BUNDLED}",
                                description="SimCLR pretraining", allow_abbrev=False)
    p.error = fail
    def flag(name: str, help: str, default: object = None, **more: object) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        p.add_argument(name, help=help + shown, default=default, **more)
    flag("--data", default="fashion-mini", help=f"{', '.join(common.SETS)} or a folder")
    flag("--root", default="data", help="folder where torchvision's sets are or will be put")
    flag("--limit", type=int, help="train on the first so many images of a fixed shuffle")
    flag("--stream", action="store_true", help="read image files anew each epoch, as if too many")
    flag("--image-size", type=int, help="side of the views (default: the images', at most 224)")
    flag("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    flag("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    flag("--init", help="an encoder.safetensors to start from")
    flag("--head-layers", type=int, choices=range(4), default=2, help="layers of the projection g")
    flag("--hidden", type=int, default=512, help="width of the projection's hidden layers")
    flag("--dim", type=int, default=128, help="dimensions of z")
    flag("--augment", nargs="+", choices=OPERATIONS, help="operations (default: all, blur > 64 px)")
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
    flag("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--out", help="folder of the run (default: runs/simclr-DATA)")
    flag("--log-with", choices=[*map(str, get_available_trackers())], help="an installed tracker")
    if p.parse_args(argv).data == "fashion-mini":
        p.set_defaults(**BUNDLED)
    args = p.parse_args(argv)
    for k, v in vars(args).items():
        low, top = k == "image_size", {"crop_scale": 1, "seed": 2**63 - 1}.get(k, 1e30)
        if isinstance(v, int | float) and not (low < v <= top or (v == 0 and k in MAY_BE_0)):
            fail(f"--{k.replace('_', '-')} {v} is out of range")
    power = {"linear": 1, "sqrt": 0.5}[args.lr_rule]
    args.lr = args.lr or LR_4096[args.optimizer] * (args.batch_size / 4096) ** power
    args.out = Path(args.out or f"runs/simclr-{Path(args.data).name}")
    return args

# -------------------------------------------------------------------------- augmentation
def augmentation(names: Sequence[str], size: int, crop_scale: float, s: float) -> list:
    """Appendix A, in the paper's order; without "crop" the whole image, resized."""
    whole = RandomResizedCrop(size, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    recipe = {
        "crop": RandomResizedCrop(size, (crop_scale, 1.0), flip=0.5) if "crop" in names else whole,
        "color": RandomApply(ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.2 * s, 0.5)), p=0.8),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(size // 10 | 1, (0.1, 2.0)), p=0.5),
    }
    return [operation for name, operation in recipe.items() if name in ("crop", *names)]

# --------------------------------------------------------------------------------- model
def projection_head(width: int, layers: int, hidden: int, dim: int) -> nn.Sequential:
    """g (§2.1), h [B, width] → z [B, dim] (without layers, z = h). Layers: linear without bias, BN,
    all but the last ReLU; the last BN has a scale and no shift, as in the authors' code.
    """
    widths, head = [width, *[hidden] * (layers - 1), dim], []
    for i in range(layers):
        head += [nn.Linear(widths[i], widths[i + 1], bias=False), nn.BatchNorm1d(widths[i + 1])]
        head += [nn.ReLU(inplace=True)] if i < layers - 1 else []
    if head:
        head[-1].bias.requires_grad_(False)
    return nn.Sequential(*head)

# ---------------------------------------------------------------------------------- loss
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent, Eq. 1, mean over all 2N views: z1, z2 [N, D] of any length, alike rows from one
    image → scalar. ValueError for other shapes.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must be [N, D] alike, not {z1.shape} and {z2.shape}")
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # 1[k ≠ i]
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z1)))


def gather(z: Tensor, accelerator: Accelerator) -> Tensor:
    """z [B, ...] of each process → [P·B, ...] of all, with the gradient of the one big batch.

    Every process computes the whole loss, so its own rows carry their whole gradient; DDP averages
    the parameters' gradients over the P processes, hence the factor P.
    """
    P, own = accelerator.num_processes, accelerator.process_index
    everyone = list(accelerator.gather(z.detach()).chunk(P))
    everyone[own] = z.detach() + P * (z - z.detach())
    return torch.cat(everyone)

# ---------------------------------------------------------------- optimiser and schedule
class LARS(torch.optim.Optimizer):
    """You et al. 2017 as SimCLR's code has it: lr inside the momentum buffer, and one-dimensional
    parameters (BN, biases) neither decayed nor adapted."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
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
    """Train, evaluate and leave a run in --out; the same arguments again go on with it."""
    args = parse_arguments(argv)
    out, torch.backends.cudnn.benchmark = args.out, True
    accelerator = Accelerator(log_with=args.log_with, project_dir=out)
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() // processes or 1)  # accelerate launch: one
    data, bank, test = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream)
    size = args.image_size = args.image_size or data.side
    stem = args.stem = args.stem or ("3x3" if size <= 64 else "7x7")
    names = args.augment or OPERATIONS[: 4 if size > 64 else 3]
    recipe = augmentation(names, size, args.crop_scale, args.color_strength)
    if not 2 <= args.batch_size <= len(data) or args.batch_size % processes:
        fail(f"--batch-size: take 2 to {len(data)} images, a multiple of {processes} processes")
    epoch_steps = len(data) // args.batch_size
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    warmup = min(round(args.warmup_epochs * epoch_steps), steps - 1)
    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    settings["mixed_precision"] = accelerator.mixed_precision
    config = {"settings": settings, "images": data.fingerprint, "devices": f"{processes} {device}",
              **{p: version(p) for p in ("torch", "torchvision", "accelerate")}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        old = json.loads((out / "config.json").read_text()) if any(out.glob("[!.]*")) else config
        if changed := [f"{k} ({v})" for k, v in old["settings"].items() if settings.get(k) != v]:
            fail(f"{out} holds a run with another {', '.join(changed)}: take it or another --out")
        results = (out / "results.json").exists() and json.loads((out / "results.json").read_text())
        state = (out / "checkpoint.pt").exists() and torch.load(
            out / "checkpoint.pt", map_location="cpu", weights_only=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not results:
            with common.written_aside(out / "config.json") as aside:
                aside.write_text(json.dumps(old | {"images": data.fingerprint}, indent=1))
    except Exception as error:  # damaged files lead to nearly everything
        fail(f"--out {out} is no folder of a run, nor can it be made one ({error!r:.200})")
    if results:
        return say(f"{out} is finished; test accuracy in percent:\n{common.table(results)}")
    torch.manual_seed(args.seed)
    about = {"architecture": args.arch, "stem": stem}
    encoder = common.load_encoder(args.init, **about)[0] if args.init else (
        common.build_encoder(**about))
    head = projection_head(encoder.width, args.head_layers, args.hidden, args.dim)
    net = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":  # it has no CPU kernel
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    make = {"lars": LARS, "sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
    optimizer = make[args.optimizer](net.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)
    done, rows, sums = 0, [], torch.zeros(3, device=device)  # the epoch's losses, spreads, steps
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        new = old["images"] != data.fingerprint  # then one step at least is done, for its row
        done, rows, sums = min(state["step"], steps - new), state["rows"], state["sums"].to(device)
        say(f"going on after step {done} of {steps}"
            + f"; the files changed: {old['images']}, now {data.fingerprint}" * new)
    signals, halt = [], 0  # looked at between steps; launchers repeat one, the third ends the run
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: signals.append(n) or (signals[2:] and os._exit(128 + n)))
    accelerator.init_trackers("simclr", {k: str(v) for k, v in settings.items()})
    N, chance = args.batch_size, math.log(2 * args.batch_size - 1)  # least: a simplex of N points
    least = math.log1p((2 * N - 2) * math.exp(-N / (N - 1) / args.temperature))
    look = 1 if device.type == "cpu" else 20  # steps between two looks at what is on the device
    saved, began, epoch_start = time.monotonic(), time.monotonic(), done
    stream = common.batches(data, [(2, recipe)], args.batch_size, args.seed, done, steps)
    bar = tqdm(stream, total=steps, initial=done, disable=not sys.stderr.isatty())
    for step, index, (views,) in bar:
        if step == 0:
            shown = torch.cat([data.centres(index[:8], size), *views[:, :8]])
            common.save_pictures(out / "views.png", shown, len(shown) // 3)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, warmup, args.lr)
        z = model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        z1, z2 = gather(z.unflatten(0, (2, -1)).transpose(0, 1), accelerator).unbind(1)
        loss = nt_xent(z1, z2, args.temperature)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        spread = F.normalize(z1.detach(), dim=1).std(0).mean() * z1.shape[1] ** 0.5
        sums += torch.stack([loss.detach(), spread, torch.ones_like(spread)])
        done = step + 1
        epoch_ends = done % epoch_steps == 0 or done == steps
        if done % look and not epoch_ends:
            continue
        flags = torch.stack([~sums[0].isfinite(), torch.tensor(bool(signals), device=device)])
        nan, halt = accelerator.reduce(flags.float()).tolist()
        if nan:
            fail(f"the loss of step {step} is not finite: take a lower --lr, another --out")
        if epoch_ends:
            seconds, n = time.monotonic() - began, done - epoch_start
            mean, spread, _ = (sums / sums[2]).tolist()
            row = {"epoch": step // epoch_steps + 1, "step": done, "loss": mean, "chance": chance,
                   "bound": least, "spread": spread, "lr": lr, "images_per_s": n * N / seconds,
                   "wait": data.waited / seconds, "minutes_left": (steps - done) / n * seconds / 60}
            if bank and (row["epoch"] % args.eval_every == 0 or done == steps):
                row["knn"] = common.knn_accuracy(encoder, bank, test, size)
            bar.clear()
            say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if spread < 0.1:
                say("warning: the embedding collapses: its spread, 1 on the sphere, nears 0")
            if done > max(warmup, epoch_steps) and chance - mean < 0.02 * (chance - least):
                say("warning: the loss stays at chance: take another --lr or --temperature")
            rows.append(row)
            accelerator.log(row, step=done)
            sums.zero_()
            epoch_start, began, data.waited = done, time.monotonic(), 0.0
        if accelerator.is_main_process and (epoch_ends or halt or time.monotonic() - saved > 600):
            with common.written_aside(out / "metrics.jsonl") as aside:
                aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with common.written_aside(out / "checkpoint.pt") as aside:
                torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                            "step": done, "rows": rows, "sums": sums}, aside)
            saved = time.monotonic()
        if halt:
            break
    bar.close()
    if halt or signals:  # the latter: while the last epoch was evaluated
        say(f"stopped after step {done} of {steps}; the same command goes on from there")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    signals += [0, 0]  # from here on the first one ends the run
    about |= {"method": "simclr", "image_size": size, "data": args.data}
    common.finish(out, encoder, about, bank, test, args.seed, rows[-1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
