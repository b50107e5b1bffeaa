# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SupCon: Supervised Contrastive Learning (Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot,
Liu and Krishnan, NeurIPS 2020, https://arxiv.org/abs/2004.11362), and its cross-entropy baseline.

    python supcon.py                                      the bundled images, on a laptop
    python supcon.py --loss ce                            the same encoder by cross-entropy
    accelerate launch --mixed_precision bf16 supcon.py --data cifar10 --epochs 500
    accelerate launch --multi_gpu --num_processes 8 supcon.py --data FOLDER --batch-size 4096

The same command again goes on with an interrupted run. Deviations: the mean of Eq. 2 or 3 over the
anchors that have a positive, unscaled (the authors' codes: times temperature / 0.07, or times the
temperature); SGD in place of LARS; defaults for small images; on CPUs each process has its own BN.
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
import torchvision
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import tqdm
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, RandomApply, RandomResizedCrop, fail, grayscale

# What 2 CPU cores learn from the bundled images in some minutes; a flag that is given wins.
BUNDLED = {"arch": "small", "epochs": 36, "optimizer": "adamw", "warmup_epochs": 1}
OPERATIONS = ("crop", "color", "gray", "blur")
LR_256 = {"sgd": 0.125, "adamw": 0.004}  # peak rates at batch 256
MAY_BE_0 = {"label_noise", "color_strength", "warmup_epochs", "weight_decay", "seed"}
MAY_CHANGE = {"root", "eval_every", "workers", "out", "log_with"}  # when a run goes on

# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("supcon.py", epilog=f"defaults with the bundled images: {BUNDLED}",
                                description="SupCon pretraining", allow_abbrev=False)
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
    flag("--loss", choices=("out", "in", "ce"), default="out", help="L_out, L_in, or cross-entropy")
    flag("--max-positives", type=int, help="positives of an anchor, its own views first (all)")
    flag("--label-noise", type=float, default=0, help="share of training labels made wrong")
    flag("--head-layers", type=int, choices=(1, 2, 3), default=2, help="layers of the projection")
    flag("--hidden", type=int, default=512, help="width of the projection's hidden layers")
    flag("--dim", type=int, default=128, help="dimensions of z")
    flag("--augment", nargs="+", choices=OPERATIONS, help="operations (default: all, blur > 64 px)")
    flag("--crop-scale", type=float, default=0.2, help="smallest crop, as a share of the area")
    flag("--color-strength", type=float, default=0.5, help="strength s of the colours")
    flag("--temperature", type=float, default=0.1, help="temperature of the loss")
    flag("--epochs", type=int, default=100, help="passes over the images")
    flag("--max-steps", type=int, help="make the run, and its schedule, no longer than this")
    flag("--batch-size", type=int, default=256, help="images a step, over all processes")
    flag("--optimizer", choices=LR_256, default="sgd", help="optimiser")
    flag("--lr", type=float, help="peak learning rate (default: by optimiser and batch)")
    flag("--warmup-epochs", type=float, default=10, help="epochs of linear warm-up")
    flag("--weight-decay", type=float, default=1e-4, help="weight decay")
    flag("--seed", type=int, default=0, help="seed of the weights, batches and views")
    flag("--eval-every", type=int, default=5, help="epochs between kNN evaluations")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--out", help="folder of the run (default: runs/supcon-DATA)")
    flag("--log-with", choices=[*map(str, get_available_trackers())], help="an installed tracker")
    if p.parse_args(argv).data == "fashion-mini":
        p.set_defaults(**BUNDLED)
    args = p.parse_args(argv)
    for k, v in vars(args).items():
        low, top = k == "image_size", {"crop_scale": 1, "label_noise": 1,
                                               "seed": 2**63 - 1}.get(k, 1e30)
        if isinstance(v, int | float) and not (low < v <= top or (v == 0 and k in MAY_BE_0)):
            fail(f"--{k.replace('_', '-')} {v} is out of range")
    args.lr = args.lr or LR_256[args.optimizer] * args.batch_size / 256
    if args.loss == "ce" and args.max_positives:
        fail("--max-positives is for --loss out and in")
    args.out = Path(args.out or f"runs/supcon-{Path(args.data).name}")
    return args

# -------------------------------------------------------------------------- augmentation
def augmentation(names: Sequence[str], size: int, crop_scale: float, s: float) -> list:
    """SimCLR's operations, in their order; without "crop" the whole image, resized."""
    whole = RandomResizedCrop(size, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    recipe = {
        "crop": RandomResizedCrop(size, (crop_scale, 1.0), flip=0.5) if "crop" in names else whole,
        "color": RandomApply(ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.2 * s, 0.5)), p=0.8),
        "gray": RandomApply(grayscale, p=0.2),
        "blur": RandomApply(GaussianBlur(size // 10 | 1, (0.1, 2.0)), p=0.5),
    }
    return [operation for name, operation in recipe.items() if name in ("crop", *names)]

# --------------------------------------------------------------------------------- model
def mislabelled(labels: Tensor, C: int, share: float, seed: int) -> Tensor:
    """labels [N] of C classes, of which a share, drawn by the seed, became any of the others."""
    rng = common.generator(seed)
    i = torch.randperm(len(labels), generator=rng)[: round(share * len(labels))]
    wrong = labels[i] + torch.randint(1, C, (len(i),), generator=rng)
    return labels.index_copy(0, i, wrong % C)

# ---------------------------------------------------------------------------------- loss
def supcon_loss(z: Tensor, labels: Tensor, temperature: float, variant: str = "out",
                max_positives: int | None = None) -> Tensor:
    """L_out (Eq. 2) or L_in (Eq. 3): z [N, V, D], V views each, as they are (the paper's have unit
    length), labels [N] → scalar. Mean over the anchors, all views, that have a positive; 0 if none
    has. max_positives: of each anchor these P(i) at most, its own views, then those of the next
    images of its class in the batch, round and round; A(i) stays (the authors' TensorFlow code
    takes the rest out of it as well). ValueError for other shapes or variants.

    With unique labels it is NT-Xent; with V = 1, temperature 1 and two of each class, the N-pairs
    loss. With one positive p and one negative n of unit length, the term of anchor a is
    ln 2 + (|a - p|² - |a - n|²) / 4τ + O(x²), x = (|a - p|² - |a - n|²) / 2τ: a triplet loss up to
    scale and constant, but only for x near 0 (the paper's chain has it at all distances).
    """
    if z.ndim != 3 or labels.shape != z.shape[:1] or variant not in ("out", "in"):
        raise ValueError(f"z [N, V, D], labels [N], variant out or in, not {z.shape}, "
                         f"{labels.shape}, {variant}")
    if max_positives is not None and max_positives < 1:
        raise ValueError(f"max_positives must be 1 or more, not {max_positives}")
    V, z, y = z.shape[1], z.flatten(0, 1), labels.repeat_interleave(z.shape[1])
    i = torch.arange(len(z), device=z.device)
    positive = (y[:, None] == y).fill_diagonal_(False)  # [NV, NV], P(i)
    if max_positives:
        first = (i // V * V)[:, None]  # view of the anchor's image: from there in turn
        order, turn = (i + first) % len(z), (i - first) % len(z)
        within = positive.gather(1, order).cumsum(1) <= max_positives
        positive &= within.gather(1, turn)
    least = torch.finfo(z.dtype).min  # e^least = 0: A(i) is all but i
    log_p = (z @ z.T / temperature).fill_diagonal_(least).log_softmax(1)
    has, count = positive.any(1), positive.sum(1).clamp(min=1).to(z.dtype)
    if variant == "out":
        loss = -log_p.masked_fill(~positive, 0).sum(1) / count
    else:  # anchors without a positive get a finite value, and then none
        among = positive | ~has[:, None]
        loss = count.log() - log_p.masked_fill(~among, -torch.inf).logsumexp(1)
    return loss.masked_fill(~has, 0).sum() / has.sum().clamp(min=1)


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
    _, data, test = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream)
    if not data or data.labels.unique().numel() < 2:
        fail(f"--data {args.data} has no labels, or a single class: take class folders, or a set")
    bank, labels, C = data, data.labels, len(data.classes)
    labels = mislabelled(labels, C, args.label_noise, args.seed).to(device)
    size = args.image_size = args.image_size or data.side
    stem = args.stem = args.stem or ("3x3" if size <= 64 else "7x7")
    names = args.augment or OPERATIONS[: 4 if size > 64 else 3]
    recipe = augmentation(names, size, args.crop_scale, args.color_strength)
    N = args.batch_size
    if not 2 <= N <= len(data) or N % processes:
        fail(f"--batch-size: take 2 to {len(data)} images, a multiple of {processes} processes")
    share = labels.bincount() / len(labels)  # of each class
    alone = (share * (1 - share) ** (N - 1)).sum().item()
    if alone > 0.1 and args.loss != "ce":
        say(f"warning: about {100 * alone:.0f} % of a batch's {N} images are alone in their class: "
            "take a larger --batch-size")
    epoch_steps = len(data) // N
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    warmup = min(round(args.warmup_epochs * epoch_steps), steps - 1)
    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    settings |= {"mixed_precision": accelerator.mixed_precision, "classes": C}
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
    head = nn.Linear(encoder.width, C) if args.loss == "ce" else head
    net = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":  # it has no CPU kernel
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    make = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
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
    accelerator.init_trackers("supcon", {k: str(v) for k, v in settings.items()})
    chance = math.log(C if args.loss == "ce" else 2 * N - 1)
    look = 1 if device.type == "cpu" else 20  # steps between two looks at what is on the device
    saved, began, epoch_start = time.monotonic(), time.monotonic(), done
    stream = common.batches(data, [(2, recipe)], N, args.seed, done, steps)
    bar = tqdm(stream, total=steps, initial=done, disable=not sys.stderr.isatty())
    for step, index, (views,) in bar:
        if step == 0:
            shown = torch.cat([data.centres(index[:8], size), *views[:, :8]])
            common.save_pictures(out / "views.png", shown, len(shown) // 3)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, warmup, args.lr)
        z = model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        z = gather(z.unflatten(0, (2, -1)).transpose(0, 1), accelerator)  # [N, V, D]
        y = accelerator.gather(labels[common.beside(labels, index)])
        if args.loss == "ce":
            loss = F.cross_entropy(z.flatten(0, 1), y.repeat_interleave(2))
        else:
            z = F.normalize(z, dim=2)
            loss = supcon_loss(z, y, args.temperature, args.loss, args.max_positives)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        spread = F.normalize(z[:, 0].detach(), dim=1).std(0).mean() * z.shape[2] ** 0.5
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
                   "spread": spread, "lr": lr, "images_per_s": n * N / seconds,
                   "wait": data.waited / seconds, "minutes_left": (steps - done) / n * seconds / 60}
            if row["epoch"] % args.eval_every == 0 or done == steps:
                row["knn"] = common.knn_accuracy(encoder, bank, test, size)
                if args.loss == "ce":
                    scores = common.extract_features(nn.Sequential(*net), test, size)
                    row["classifier"] = common.accuracy(scores, test.labels)
            bar.clear()
            say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if spread < 0.1:
                say("warning: the embedding collapses: its spread, 1 on the sphere, nears 0")
            if done > max(warmup, epoch_steps) and chance - mean < 0.003 * chance:
                say("warning: the loss stays at chance: take another --lr or --temperature, unless "
                    "few classes or much noise leave no more to gain")
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
    if args.loss == "ce":
        say(f"test accuracy of its own classifier: {rows[-1]['classifier']:.1f}")
    about |= {"method": f"supcon-{args.loss}", "image_size": size, "data": args.data}
    common.finish(out, encoder, about, bank, test, args.seed, rows[-1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
