# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He, Fan, Wu, Xie and
Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722); v2 (https://arxiv.org/abs/2003.04297).

    python moco.py                                        the bundled images, on a laptop
    accelerate launch --mixed_precision bf16 moco.py --data cifar10 --epochs 500
    accelerate launch --multi_gpu --num_processes 8 moco.py --data FOLDER --arch resnet50

The same command again goes on with an interrupted run. Deviations: the rate falls step by step (the
authors': by epoch); BN in groups also on one device; --symmetric in one pass, with the mean of both
directions (their demo: the sum); defaults for small images.
"""

import argparse
import copy
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
import torchvision
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import tqdm
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, RandomApply, RandomResizedCrop, fail, grayscale

# What 2 CPU cores learn from the bundled images in some minutes; a flag that is given wins.
BUNDLED = {"arch": "small", "epochs": 54, "jitter": [0.8, 0.8, 0.8, 0.2, 0.8],
           "temperature": 0.07, "optimizer": "adamw", "warmup_epochs": 2, "key_momentum": 0.99}
VERSIONS = {
    "v1": {"head_layers": 1, "jitter": [0.4] * 4 + [1.0], "schedule": "steps", "temperature": 0.07},
    "v2": {"head_layers": 2, "jitter": [0.4, 0.4, 0.4, 0.1, 0.8], "schedule": "cosine",
           "temperature": 0.2}}
OPERATIONS = {"v1": ("crop", "gray", "color"), "v2": ("crop", "color", "gray", "blur")}
LR_256 = {"sgd": 0.03, "adamw": 0.006}  # peak rates at batch 256
MAY_BE_0 = {"warmup_epochs", "weight_decay", "seed", "key_momentum"}
MAY_CHANGE = {"root", "eval_every", "workers", "out", "log_with"}  # when a run goes on

# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("moco.py", epilog=f"defaults with the bundled images: {BUNDLED}",
                                description="MoCo pretraining", allow_abbrev=False)
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
    flag("--version", choices=VERSIONS, help="paper of the defaults (v2; if named, of all data)")
    flag("--head-layers", type=int, choices=(1, 2), help="layers of the head (v1: 1, v2: 2)")
    flag("--hidden", type=int, default=512, help="width of the head's hidden layer")
    flag("--dim", type=int, default=128, help="dimensions of q and k")
    flag("--queue-size", type=int, help="keys K (default: a power of 2, images / 8 or 65536)")
    flag("--key-momentum", type=float, default=0.999, help="momentum m of the key encoder")
    flag("--symmetric", action="store_true", help="each view is a query once and a key once")
    flag("--bn-splits", type=int, help="groups of a batch with a BN each (default: by 32, to 8)")
    flag("--augment", nargs="+", choices=OPERATIONS["v2"], help="operations (blur above 64 px)")
    flag("--crop-scale", type=float, default=0.2, help="smallest crop, as a share of the area")
    flag("--jitter", type=float, nargs=5, help="brightness, contrast, saturation, hue, probability")
    flag("--temperature", type=float, help="temperature of InfoNCE (v1: 0.07, v2: 0.2)")
    flag("--schedule", choices=("steps", "cosine"), help="fall of the rate (v1: steps, v2: cosine)")
    flag("--epochs", type=int, default=100, help="passes over the images")
    flag("--max-steps", type=int, help="make the run, and its schedule, no longer than this")
    flag("--batch-size", type=int, default=256, help="images a step, over all processes")
    flag("--optimizer", choices=LR_256, default="sgd", help="optimiser")
    flag("--lr", type=float, help="peak learning rate (default: by optimiser and batch)")
    flag("--warmup-epochs", type=float, default=0, help="epochs of linear warm-up")
    flag("--weight-decay", type=float, default=1e-4, help="weight decay of all parameters")
    flag("--seed", type=int, default=0, help="seed of the weights, batches and views")
    flag("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--out", help="folder of the run (default: runs/moco-DATA)")
    flag("--log-with", choices=[*map(str, get_available_trackers())], help="an installed tracker")
    args = p.parse_args(argv)
    bundled = BUNDLED if args.data == "fashion-mini" else {}
    p.set_defaults(**VERSIONS["v2"] | bundled | VERSIONS.get(args.version, {}))
    args = p.parse_args(argv)
    args.version = args.version or "v2"
    for k, v in vars(args).items():
        top = {"crop_scale": 1, "key_momentum": 1, "seed": 2**63 - 1}.get(k, 1e30)
        low = k == "image_size"
        if isinstance(v, int | float) and not (low < v <= top or (v == 0 and k in MAY_BE_0)):
            fail(f"--{k.replace('_', '-')} {v} is out of range")
    if not all(0 <= v <= top for v, top in zip(args.jitter, (9, 9, 9, 0.5, 1), strict=True)):
        fail(f"--jitter {args.jitter}: take 0 to 9, of the hue to 0.5, the probability to 1")
    args.lr = args.lr or LR_256[args.optimizer] * args.batch_size / 256
    args.out = Path(args.out or f"runs/moco-{Path(args.data).name}")
    return args

# -------------------------------------------------------------------------- augmentation
def augmentation(names: Sequence[str], size: int, crop_scale: float,
                 jitter: Sequence[float]) -> list:
    """The operations in the order of their names; without "crop" the whole image, resized."""
    whole = RandomResizedCrop(size, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    recipe = {
        "crop": RandomResizedCrop(size, (crop_scale, 1.0), flip=0.5) if "crop" in names else whole,
        "color": RandomApply(ColorJitter(*jitter[:4]), p=jitter[4]),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(size // 10 | 1, (0.1, 2.0)), p=0.5),
    }
    return [recipe[name] for name in ("crop", *(name for name in names if name != "crop"))]

# --------------------------------------------------------------------------------- model
class SplitBatchNorm(nn.BatchNorm2d):
    """BN of each of `splits` parts of the rows on its own, as if each were on a GPU of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts = x.chunk(self.splits)
        return torch.cat([nn.BatchNorm2d.forward(self, part) for part in parts])


@torch.no_grad()
def momentum_update(keys: nn.Module, queries: nn.Module, m: float) -> None:
    """Eq. 2 for all parameters at once: key = m·key + (1 - m)·query."""
    torch._foreach_lerp_([*keys.parameters()], [*queries.parameters()], 1 - m)

# ---------------------------------------------------------------------------------- loss
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE, Eq. 1, mean over N queries: unit vectors q and their keys k [N, D], the negatives
    queue [K, D] → scalar. ValueError for other shapes.
    """
    if q.shape != k.shape or q.ndim != 2 or queue.shape[1:] != q.shape[1:]:
        raise ValueError(f"q, k [N, D] and queue [K, D], not {q.shape}, {k.shape}, {queue.shape}")
    q = q / temperature  # rather than the logits: they are K / D times as many
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

# ---------------------------------------------------------------- optimiser and schedule
def learning_rate(step: int, steps: int, warmup: int, peak: float, schedule: str) -> float:
    """Rate of step 0 .. steps - 1: linear up to the peak, then half a cosine to 0, or a tenth from
    0.6 and a hundredth from 0.8 of the run."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "steps":
        return peak * 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))
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
    names = args.augment or OPERATIONS[args.version][: 4 if size > 64 else 3]
    recipe = augmentation(names, size, args.crop_scale, args.jitter)
    N, V = args.batch_size, 1 + bool(args.symmetric)  # V views of an image are queries, V are keys
    if not 2 <= N <= len(data) or N % processes:
        fail(f"--batch-size: take 2 to {len(data)} images, a multiple of {processes} processes")
    groups = range(1, 1 + (min(8, N // 32) // processes or 1))  # of a process: those that divide
    groups = max(n for n in groups if N // processes % n == 0)
    splits = args.bn_splits = args.bn_splits or processes * groups
    if N * V % splits or splits == N * V or splits % processes:
        fail(f"--bn-splits {splits}: take a multiple of {processes} that divides {N * V} queries "
             "into groups of two or more, or another --batch-size")
    K = args.queue_size or max(N * V, min(65536, 1 << (len(data) // 8 or 1).bit_length() - 1))
    args.queue_size = K
    if K < N * V:
        fail(f"--queue-size {K}: take {N * V} keys of a step at least")
    if len(data) < 2 * K:
        say(f"warning: --queue-size {K} is above half of the {len(data)} images: too many of the "
            "negatives show the query's own image")
    epoch_steps = len(data) // N
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
    head = torchvision.ops.MLP(encoder.width, [args.hidden] * (args.head_layers - 1) + [args.dim])
    net = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and splits > processes:
            module.__class__, module.splits = SplitBatchNorm, splits // processes
            module.momentum /= module.splits  # a step's groups are one step of its averages
    keys = copy.deepcopy(net).requires_grad_(False)
    queue = torch.randn(K, args.dim, generator=common.generator(args.seed)).to(device)
    keys.register_buffer("queue", F.normalize(queue, dim=1))
    make = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
    optimizer = make[args.optimizer](net.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)
    key_model = accelerator.prepare_model(keys, evaluation_mode=True)
    done, rows, sums = 0, [], torch.zeros(3, device=device)  # the epoch's losses, spreads, steps
    if state:
        net.load_state_dict(state["model"])
        keys.load_state_dict(state["keys"])
        optimizer.load_state_dict(state["optimizer"])
        new = old["images"] != data.fingerprint  # then one step at least is done, for its row
        done, rows, sums = min(state["step"], steps - new), state["rows"], state["sums"].to(device)
        say(f"going on after step {done} of {steps}"
            + f"; the files changed: {old['images']}, now {data.fingerprint}" * new)
    signals, halt = [], 0  # looked at between steps; launchers repeat one, the third ends the run
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: signals.append(n) or (signals[2:] and os._exit(128 + n)))
    accelerator.init_trackers("moco", {k: str(v) for k, v in settings.items()})
    rank, chance = accelerator.process_index, math.log(K + 1)
    look = 1 if device.type == "cpu" else 20  # steps between two looks at what is on the device
    saved, began, epoch_start = time.monotonic(), time.monotonic(), done
    stream = common.batches(data, [(2, recipe)], N, args.seed, done, steps)
    bar = tqdm(stream, total=steps, initial=done, disable=not sys.stderr.isatty())
    for step, index, (views,) in bar:
        if step == 0:
            shown = torch.cat([data.centres(index[:8], size), *views[:, :8]])
            common.save_pictures(out / "views.png", shown, len(shown) // 3)
        lr = learning_rate(step, steps, warmup, args.lr, args.schedule)
        optimizer.param_groups[0]["lr"] = lr
        # Rows image by image: so they, and the groups of BN, are the same on all process counts.
        x_q, x_k = (x.transpose(0, 1).flatten(0, 1) for x in (views[:V], views[2 - V:].flip(0)))
        with torch.no_grad():
            momentum_update(keys, net, args.key_momentum)
            rng = common.generator(args.seed, *divmod(step, epoch_steps), 1)
            shuffle = common.beside(x_k, torch.randperm(N * V, generator=rng))  # one for all
            x_k = accelerator.gather(x_k).index_select(0, shuffle.chunk(processes)[rank])
            k = key_model(x_k.contiguous(memory_format=torch.channels_last)).float()
            k = F.normalize(accelerator.gather(k)[shuffle.argsort()], dim=1)
        q = model(x_q.contiguous(memory_format=torch.channels_last)).float()
        q = F.normalize(q, dim=1)
        loss = info_nce(q, k.chunk(processes)[rank], keys.queue, args.temperature)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        keys.queue[(step * N * V + torch.arange(N * V, device=device)) % K] = k
        spread = q.detach().std(0).mean() * args.dim**0.5
        sums += accelerator.reduce(torch.stack([loss.detach(), spread, spread**0]), "mean")
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
                   "spread": spread, "lr": lr, "images_per_s": n * N / seconds,
                   "wait": data.waited / seconds, "minutes_left": (steps - done) / n * seconds / 60}
            if bank and (row["epoch"] % args.eval_every == 0 or done == steps):
                row["knn"] = common.knn_accuracy(encoder, bank, test, size)
            bar.clear()
            say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if spread < 0.1:
                say("warning: the embedding collapses: its spread, 1 on the sphere, nears 0")
            limit = 0.02 * min(chance, 1 / args.temperature)
            if done > max(warmup, epoch_steps, K // N) and chance - mean < limit:
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
                            "keys": keys.state_dict(), "step": done, "rows": rows,
                            "sums": sums}, aside)
            saved = time.monotonic()
        if halt:
            break
    bar.close()
    if halt or signals:  # the latter: while the last epoch was evaluated
        say(f"stopped after step {done} of {steps}; the same command goes on from there")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    signals += [0, 0]  # from here on the first one ends the run
    about |= {"method": "moco", "image_size": size, "data": args.data}
    common.finish(out, encoder, about, bank, test, args.seed, rows[-1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
