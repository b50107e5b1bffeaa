# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron, Misra,
Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020, https://arxiv.org/abs/2006.09882).

    python swav.py                                        the bundled images, on a laptop
    accelerate launch --mixed_precision bf16 swav.py --data cifar10 --epochs 500
    accelerate launch --multi_gpu --num_processes 8 swav.py --data FOLDER --prototypes 3000

The same command again goes on with an interrupted run. Deviations: Sinkhorn in logs, on the batch
of all processes; freezing and queue counted in epochs; defaults for small images.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import tqdm
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, RandomApply, RandomResizedCrop, fail, grayscale

# What 2 CPU cores learn from the bundled images in some minutes; a flag that is given wins.
BUNDLED = {"arch": "small", "epochs": 26, "crops": [2, 2], "crop_scales": [0.3, 1, 0.1, 0.4],
           "optimizer": "adamw", "weight_decay": 1e-4, "warmup_epochs": 2,
           "prototypes": 256, "queue_size": 0, "epsilon": 0.03}
OPERATIONS, AREAS = ("crop", "color", "gray", "blur"), [0.14, 1.0, 0.05, 0.14]
LR_256 = {"larc": 0.6, "sgd": 0.05, "adamw": 0.004}  # × (batch / 256)^.75: 4.8 at 4096
MAY_BE_0 = {"color_strength", "warmup_epochs", "freeze_prototypes", "queue_size", "queue_start",
            "weight_decay", "seed"}
MAY_CHANGE = {"root", "eval_every", "workers", "out", "log_with"}  # when a run goes on

# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("swav.py", epilog=f"with the bundled images: {BUNDLED}",
                                description="SwAV pretraining", allow_abbrev=False)
    p.error = fail
    def flag(name: str, help: str, default: object = None, **more: object) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        p.add_argument(name, help=help + shown, default=default, **more)
    flag("--data", default="fashion-mini", help=f"{', '.join(common.SETS)} or a folder")
    flag("--root", default="data", help="folder where torchvision's sets are or will be put")
    flag("--limit", type=int, help="train on the first so many images of a fixed shuffle")
    flag("--stream", action="store_true", help="read image files anew each epoch, as if too many")
    flag("--arch", choices=common.ARCHITECTURES, default="resnet18", help="encoder f")
    flag("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    flag("--init", help="an encoder.safetensors to start from")
    flag("--head-layers", type=int, choices=(1, 2, 3), default=2, help="layers of the projection")
    flag("--hidden", type=int, default=512, help="width of the projection's hidden layers")
    flag("--dim", type=int, default=128, help="dimensions of z")
    flag("--prototypes", type=int, default=512, help="number of prototypes K")
    flag("--freeze-prototypes", type=float, default=1, help="epochs for which they stay as drawn")
    flag("--epsilon", type=float, default=0.05, help="epsilon of Sinkhorn, softness of the codes")
    flag("--queue-size", type=int, default=3840, help="images in the queue for the codes, 0: none")
    flag("--queue-start", type=float, default=15, help="epochs before the queue begins to fill")
    flag("--crops", type=int, nargs="+", default=[2, 6], help="crops of an image, by resolution")
    flag("--crop-sizes", type=int, nargs="+", help="their sides (default: the image's, and a half)")
    flag("--crop-scales", type=float, nargs="+", default=AREAS, help="least and largest areas")
    flag("--augment", nargs="+", choices=OPERATIONS, help="operations (default: all, blur > 64 px)")
    flag("--color-strength", type=float, default=1, help="strength s of the colours")
    flag("--temperature", type=float, default=0.1, help="temperature of the prediction")
    flag("--epochs", type=int, default=100, help="passes over the images")
    flag("--max-steps", type=int, help="make the run, and its schedule, no longer than this")
    flag("--batch-size", type=int, default=256, help="images a step, over all processes")
    flag("--optimizer", choices=LR_256, default="larc", help="optimiser")
    flag("--lr", type=float, help="peak learning rate (default: by optimiser and batch)")
    flag("--warmup-epochs", type=float, default=0, help="epochs of linear warm-up")
    flag("--weight-decay", type=float, default=1e-6, help="weight decay")
    flag("--seed", type=int, default=0, help="seed of the weights, batches and views")
    flag("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--out", help="folder of the run (default: runs/swav-DATA)")
    flag("--log-with", choices=[*map(str, get_available_trackers())], help="an installed tracker")
    if p.parse_args(argv).data == "fashion-mini":
        p.set_defaults(**BUNDLED)
    args = p.parse_args(argv)
    for k, v in ((k, v) for k, x in vars(args).items() for v in (x if type(x) is list else [x])):
        low, top = k in {"prototypes", "crop_sizes"}, {"crop_scales": 1, "seed": 2**63}.get(k, 1e30)
        if isinstance(v, int | float) and not (low < v <= top or (v == 0 and k in MAY_BE_0)):
            fail(f"--{k.replace('_', '-')} {v} is out of range")
    args.lr = args.lr or LR_256[args.optimizer] * (args.batch_size / 256) ** 0.75
    args.out = Path(args.out or f"runs/swav-{Path(args.data).name}")
    return args

# -------------------------------------------------------------------------- augmentation
def augmentation(names: list[str], size: int, low: float, high: float, s: float) -> list:
    """SimCLR's operations, in their order; without "crop" the whole image, resized."""
    crop = ((low, high), (3 / 4, 4 / 3), 0.5) if "crop" in names else ((1.0, 1.0), (1.0, 1.0), 0.0)
    recipe = {"color": RandomApply(ColorJitter(*[0.8 * s] * 3, min(0.2 * s, 0.5)), p=0.8),
              "gray": RandomApply(grayscale, p=0.2),
              "blur": RandomApply(GaussianBlur(size // 10 | 1, (0.1, 2.0)), p=0.5)}
    return [RandomResizedCrop(size, *crop), *(recipe[name] for name in recipe if name in names)]

# --------------------------------------------------------------------------------- model
class SwAV(nn.Module):
    """Encoder, projection (linear, BN, ReLU, …, linear of these widths) and K prototypes C."""

    def __init__(self, encoder: nn.Module, widths: list[int], K: int) -> None:
        super().__init__()
        self.encoder, self.prototypes = encoder, nn.Linear(widths[-1], K, bias=False)
        self.head = torchvision.ops.MLP(encoder.width, widths, norm_layer=nn.BatchNorm1d)

    def forward(self, *crops: Tensor) -> tuple[Tensor, Tensor]:
        """Crops [n, 3, S, S] by resolution → of all, z [N, D] of length 1 and scores z·C [N, K]."""
        z = self.head(torch.cat([self.encoder(x) for x in crops]))
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            return z, self.prototypes(z)

# ---------------------------------------------------------------------------------- loss
@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes of Eq. 5: scores [B, K] → [B, K], float32 or better, whose rows sum to 1. In turn each
    prototype gets an equal share of the batch and each row one; in logs, below 0.01 in float64."""
    dtype = torch.float32 if epsilon >= 0.01 or scores.device.type == "mps" else torch.float64
    log_q = scores.to(torch.promote_types(scores.dtype, dtype)) / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0).log_softmax(1)
    return log_q.exp().to(torch.promote_types(scores.dtype, torch.float32))


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Eq. 2 and 6: codes [2, B, K] of the first two crops, each predicted from the scores [V, B, K]
    of all other crops, mean → scalar. ValueError for other shapes."""
    if scores.ndim != 3 or len(scores) < 2 or codes.shape != (2, *scores.shape[1:]):
        raise ValueError(f"scores [V, B, K], codes [2, B, K], not {scores.shape}, {codes.shape}")
    log_p = (scores / temperature).log_softmax(2)
    predicted = codes.flatten(1) @ log_p.flatten(1).T / -scores.shape[1]  # [2, V]
    return (predicted.sum() - predicted.trace()) / (2 * (len(scores) - 1))

# ---------------------------------------------------------------- optimiser and schedule
class LARC(torch.optim.SGD):
    """You et al. 2017 as in apex, without clipping: of each parameter, gradient and decay times
    0.001·|p| / (|g| + decay·|p|), then SGD with momentum."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                g, size = p.grad.norm(), p.norm()
                adapted = 0.001 * size / (g + decay * size + 1e-8) * (p.grad + decay * p)
                p.grad = torch.where((g > 0) & (size > 0), adapted, p.grad) - decay * p
        super().step()  # which adds the decay back


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Rate of step 0 .. steps - 1: linear from 1/16 of the peak, then half a cosine to 1/1000."""
    if step < warmup:
        return peak * (1 + 15 * step / warmup) / 16
    return peak * (0.001 + 0.4995 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))

# ---------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and leave a run in --out; the same arguments again go on with it."""
    args = parse_arguments(argv)
    out, torch.backends.cudnn.benchmark = args.out, True
    accelerator = Accelerator(log_with=args.log_with, project_dir=out)
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() // processes or 1)  # accelerate launch: one
    data, bank, test = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream)
    half = round(data.side * (9 / 16 if data.side <= 64 else 3 / 7))  # 18 of 32, 96 of 224
    sizes = args.crop_sizes = args.crop_sizes or [data.side, half][: len(args.crops)]
    size, low, high = sizes[0], args.crop_scales[::2], args.crop_scales[1::2]
    if len(args.crops) > min(len(sizes), len(high)) or args.crops[0] < 2 or any(
            a > b for a, b in zip(low, high, strict=False)):
        fail("--crops, --crop-sizes, --crop-scales: take, for each resolution, a number (2 or more "
             "of the first), a side, and the least and largest share of the area")
    stem = args.stem = args.stem or ("3x3" if size <= 64 else "7x7")
    names, s = args.augment or OPERATIONS[: 4 if size > 64 else 3], args.color_strength
    recipes = [(args.crops[i], augmentation(names, sizes[i], low[i], high[i], s))
               for i in range(len(args.crops))]
    N, K, Q = args.batch_size, args.prototypes, args.queue_size
    if not 2 <= N <= len(data) or N % processes:
        fail(f"--batch-size: take 2 to {len(data)} images, a multiple of {processes} processes")
    epoch_steps = len(data) // N
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    warmup = min(round(args.warmup_epochs * epoch_steps), steps - 1)
    freeze, fill = (round(v * epoch_steps) for v in (args.freeze_prototypes, args.queue_start))
    if N + Q * (fill + -(-Q // N) < steps) < K:
        say(f"warning: {N} images of a step share {K} --prototypes, the queue is no help: too many")
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
    net = SwAV(encoder, [args.hidden] * (args.head_layers - 1) + [args.dim], K)
    net = net.to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":  # it has no CPU kernel
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    C, queue = net.prototypes.weight, torch.zeros(2, Q, args.dim, device=device)
    make = {"larc": partial(LARC, momentum=0.9), "sgd": partial(torch.optim.SGD, momentum=0.9)}
    make["adamw"] = torch.optim.AdamW
    optimizer = make[args.optimizer](net.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)
    done, rows, sums = 0, [], torch.zeros(3 + K, device=device)  # losses, spreads, steps, uses
    if state:
        net.load_state_dict(state["model"])
        queue.copy_(state["queue"])
        optimizer.load_state_dict(state["optimizer"])
        new = old["images"] != data.fingerprint  # then one step at least is done, for its row
        done, rows, sums = min(state["step"], steps - new), state["rows"], state["sums"].to(device)
        say(f"going on after step {done} of {steps}"
            + f"; the files changed: {old['images']}, now {data.fingerprint}" * new)
    full = max(fill, done) + -(-(queue[0] == 0).all(1).sum().item() // N)  # then it is used
    signals, halt = [], 0  # looked at between steps; launchers repeat one, the third ends the run
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: signals.append(n) or (signals[2:] and os._exit(128 + n)))
    accelerator.init_trackers("swav", {k: str(v) for k, v in settings.items()})
    rank, chance, order = accelerator.process_index, math.log(K), torch.arange(N, device=device)
    look = 1 if device.type == "cpu" else 20  # steps between two looks at what is on the device
    saved, began, epoch_start = time.monotonic(), time.monotonic(), done
    stream = common.batches(data, recipes, N, args.seed, done, steps)
    bar = tqdm(stream, total=steps, initial=done, disable=not sys.stderr.isatty())
    for step, index, views in bar:
        if step == 0:
            shown = [F.interpolate(x, size) for v in views for x in v[:, :8]]
            shown = torch.cat([data.centres(index[:8], size), *shown])
            common.save_pictures(out / "views.png", shown, len(index[:8]))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, warmup, args.lr)
        C.detach().copy_(F.normalize(C.detach(), dim=1))
        x = (v.flatten(0, 1).contiguous(memory_format=torch.channels_last) for v in views)
        z, scores = (v.unflatten(0, (-1, N // processes)) for v in model(*x))
        with torch.no_grad():  # codes of the batch of all processes, of which each takes its rows
            Z = accelerator.gather(z[:2].transpose(0, 1).contiguous()).transpose(0, 1)  # [2, N, D]
            S = torch.cat([queue, Z], 1) @ C.T if step >= full else Z @ C.T
            codes = torch.stack([sinkhorn(s, args.epsilon)[-N:] for s in S]).chunk(processes, 1)
            if Q and step >= fill:  # its last rows, should it be smaller than the batch
                queue[:, (step * N + order[-Q:]) % Q] = Z[:, -Q:]
        loss = swapped_prediction_loss(scores, codes[rank], args.temperature)
        optimizer.zero_grad()
        accelerator.backward(loss)
        C.grad = None if step < freeze else C.grad
        optimizer.step()
        spread, nearest = Z[0].std(0).mean() * args.dim**0.5, S[:, -N:].argmax(2).flatten()
        sums[:3] += accelerator.reduce(torch.stack([loss.detach(), spread, spread**0]), "mean")
        sums[3:].index_add_(0, nearest, torch.ones_like(nearest, dtype=sums.dtype))
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
            mean, spread, _ = (sums[:3] / sums[2]).tolist()
            use = sums[3:] / sums[3:].sum()
            row = {"epoch": step // epoch_steps + 1, "step": done, "loss": mean, "chance": chance,
                   "prototypes": (use > 0).sum().item(),
                   "entropy": torch.special.entr(use).sum().item(), "spread": spread, "lr": lr,
                   "images_per_s": n * N / seconds, "wait": data.waited / seconds,
                   "minutes_left": (steps - done) / n * seconds / 60}
            if bank and (row["epoch"] % args.eval_every == 0 or done == steps):
                row["knn"] = common.knn_accuracy(encoder, bank, test, size)
            bar.clear()
            say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
            stuck = abs(mean / chance - 1) < 0.02 and not (rows and rows[-1]["loss"] - mean > 0.02)
            if done > max(warmup, freeze) and (stuck or spread < 0.1):
                say("warning: it collapses: the loss stays at chance, or the spread at 0; lower "
                    "--epsilon, longer --freeze-prototypes, later --queue-start, less --prototypes")
            rows.append(row)
            accelerator.log(row, step=done)
            sums.zero_()
            epoch_start, began, data.waited = done, time.monotonic(), 0.0
        if accelerator.is_main_process and (epoch_ends or halt or time.monotonic() - saved > 600):
            with common.written_aside(out / "metrics.jsonl") as aside:
                aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with common.written_aside(out / "checkpoint.pt") as aside:
                torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                            "queue": queue, "step": done, "rows": rows, "sums": sums}, aside)
            saved = time.monotonic()
        if halt:
            break
    bar.close()
    if halt or signals:  # the latter: while the last epoch was evaluated
        say(f"stopped after step {done} of {steps}; the same command goes on from there")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    signals += [0, 0]  # from here on the first one ends the run
    about |= {"method": "swav", "image_size": size, "data": args.data}
    some = data.take(torch.randperm(len(data), generator=common.generator(args.seed))[:5000])
    z = common.extract_features(nn.Sequential(encoder, net.head), some, size)
    S = F.normalize(z, dim=1) @ F.normalize(C.detach(), dim=1).T  # [5000, K]
    most = S.argmax(1).bincount(minlength=K).argsort(descending=True)[:10]
    near = S[:, most].argsort(0, descending=True)[:8].T.cpu()
    common.save_pictures(out / "prototypes.png", some.centres(near.flatten(), size), near.shape[1])
    common.finish(out, encoder, about, bank, test, args.seed, rows[-1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
