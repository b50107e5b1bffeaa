# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""DrLIM: Dimensionality Reduction by Learning an Invariant Mapping (Hadsell, Chopra and LeCun, CVPR
2006, http://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf).

    python drlim.py                                       the bundled images, on a laptop
    python drlim.py --data mnist --classes 4 9            the paper's first experiment
    python drlim.py --data mnist --classes 4 9 --graph shifts                   its second
    python drlim.py --data FOLDER --arch resnet18 --dim 3

The same command again goes on with an interrupted run. Deviations: dissimilar pairs are drawn among
a step's images, so many to each similar one; optimiser, margin, ReLU and epochs, not published.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm
from PIL import ImageColor
from torch import Tensor, nn

import common
from common import fail

BUNDLED = {"classes": ["5", "7", "9"]}  # of the bundled images: sandals, sneakers and boots
MAY_CHANGE = {"root", "eval_every", "workers", "out"}  # when a run goes on

# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("drlim.py", epilog=f"defaults with the bundled images: {BUNDLED}",
                                description="DrLIM: a map of images", allow_abbrev=False)
    p.error = fail
    def flag(name: str, help: str, default: object = None, **more: object) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        p.add_argument(name, help=help + shown, default=default, **more)
    flag("--data", default="fashion-mini", help=f"{', '.join(common.SETS)} or a folder")
    flag("--root", default="data", help="folder where torchvision's sets are or will be put")
    flag("--classes", nargs="+", help="classes to map, by name or number (default: all)")
    flag("--per-class", type=int, default=3000, help="training images of each class, at most")
    flag("--image-size", type=int, help="side of the images (default: theirs; paper: at most 32)")
    flag("--arch", choices=("paper", *common.ARCHITECTURES), default="paper", help="network G")
    flag("--dim", type=int, default=2, help="dimensions of the map")
    flag("--graph", choices=("neighbours", "shifts", "labels"), default="neighbours",
         help="similar: nearest by pixels, with all shifted copies, or alike labels (not DrLIM)")
    flag("--neighbours", type=int, default=5, help="similar images of each image")
    flag("--shifts", type=int, nargs="+", help="pixels to the right of copies (shifts: -6 -3 3 6)")
    flag("--ratio", type=float, default=0.1, help="dissimilar pairs to each similar one")
    flag("--margin", type=float, default=1.25, help="margin m of the loss")
    flag("--epochs", type=int, default=15, help="passes over the similar pairs")
    flag("--batch-size", type=int, default=128, help="similar pairs a step, over all processes")
    flag("--lr", type=float, default=0.005, help="first learning rate of Adam")
    flag("--seed", type=int, default=0, help="seed of the weights and pairs")
    flag("--eval-every", type=int, default=5, help="epochs between two looks at the map")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--out", help="folder of the run (default: runs/drlim-DATA)")
    if p.parse_args(argv).data == "fashion-mini":
        p.set_defaults(**BUNDLED)
    args = p.parse_args(argv)
    for k, v in vars(args).items():
        if isinstance(v, int | float) and not (k == "image_size") - (k == "seed") < v <= 1e18:
            fail(f"--{k.replace('_', '-')} {v} is out of range")
    args.shifts = args.shifts or ([-6, -3, 3, 6] if args.graph == "shifts" else [])
    args.out = Path(args.out or f"runs/drlim-{Path(args.data).name}")
    return args

# --------------------------------------------------------------------------------- graph
def nearest(queries: Tensor, bank: Tensor, k: int, itself: bool = False) -> Tensor:
    """Indices [Q, k] of the rows of bank [M, D] nearest to each of queries [Q, D]; `itself`: these
    are the bank, and no row is its own neighbour."""
    found, step = [], max(1, 2**26 // len(bank))
    for start in range(0, len(queries), step):
        distance = torch.cdist(queries[start : start + step], bank)
        if itself:
            distance[:, start:].fill_diagonal_(torch.inf)
        found.append(distance.topk(k, largest=False).indices)
    return torch.cat(found)


def draw_pairs(edges: Tensor, partners: Tensor, labels: Tensor | None, copies: int, ratio: float,
               rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images i [2B] of edges [B] (n·k + j: n and the j-th of its partners [N, k]); pairs of rows of
    i [(1 + ratio)·B, 2]: the edges, then dissimilar ones (without ones in the batch, none), neither
    partners nor of equal labels [N]; Y of each. n has copies, all similar, from i = n·copies."""
    B, n, u = len(edges), edges // partners.shape[1], torch.rand(2, len(edges), generator=rng)
    n = torch.stack([n, partners.flatten()[edges]], 1)  # [B, 2]
    own, first = (n[:, 0] == n[:, 1]).long(), (u[0] * copies).long()
    second = (first + own + (u[1] * (copies - own)).long()) % copies  # its own: by another shift
    i, n = (n * copies + torch.stack([first, second], 1)).flatten(), n.flatten()
    if labels is None:
        alike = (partners[n][:, :, None] == n).any(1) | (n[:, None] == n)
    else:
        alike = labels[n][:, None] == labels[n]
    unlike = (~(alike | alike.T)).triu().nonzero()
    some = torch.randint(len(unlike) or 1, (max(1, round(ratio * B)),), generator=rng)
    pairs = torch.cat([torch.arange(2 * B).view(B, 2), unlike[some] if len(unlike) else unlike])
    return i, pairs, (torch.arange(len(pairs)) >= B).long()

# --------------------------------------------------------------------------------- model
def paper_network() -> nn.Module:
    """§3.1, [B, 1, 32, 32] → [B, width]: convolution 6×6 to 15 maps, subsampling 3×3, convolution
    9×9 to 30 maps; a linear layer follows."""
    encoder = nn.Sequential(nn.Conv2d(1, 15, 6), nn.ReLU(), nn.AvgPool2d(3), nn.Conv2d(15, 30, 9),
                            nn.ReLU(), nn.Flatten())
    encoder.width = 30
    return encoder

# ---------------------------------------------------------------------------------- loss
def contrastive_loss(g1: Tensor, g2: Tensor, dissimilar: Tensor, margin: float) -> Tensor:
    """Eq. 4, mean over N pairs, (1 - Y)·½·D² + Y·½·max(0, m - D)² of their distance D: g1 and g2
    [N, D], Y = dissimilar [N] in {0, 1} → scalar. Gradient 0 at D = 0. ValueError: other shapes."""
    if g1.shape != g2.shape or g1.ndim != 2 or dissimilar.shape != g1.shape[:1]:
        raise ValueError(f"not g1, g2 [N, D], Y [N]: {g1.shape}, {g2.shape}, {dissimilar.shape}")
    D = torch.linalg.vector_norm(g1 - g2, dim=1)  # with gradient 0 at 0
    return torch.where(dissimilar == 0, D**2, (margin - D).clamp(min=0) ** 2).mean() / 2


def gather(z: Tensor, accelerator: Accelerator) -> Tensor:
    """z [B, ...] of each process → [P·B, ...] of all, with the gradient of the one big batch, of
    which every process computes the whole loss. DDP averages over P processes: the factor P."""
    P, own = accelerator.num_processes, accelerator.process_index
    everyone = list(accelerator.gather(z.detach()).chunk(P))
    everyone[own] = z.detach() + P * (z - z.detach())
    return torch.cat(everyone)

# ---------------------------------------------------------------- optimiser and schedule
def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rate of step 0 .. steps - 1: half a cosine from the peak to 0."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))

# ----------------------------------------------------------------------------------- map
def copies_rank(g: Tensor, copies: int) -> float:
    """Median rank of an image's shifted copies among all other points of g [N·copies, D], image n
    and its copies from n·copies, by their distance from it; those as near count as nearer."""
    ranks = []
    for i in torch.arange(0, len(g), copies, device=g.device)[:, None].split(512):
        distance = torch.cdist(g[i[:, 0]], g).scatter_(1, i, torch.inf)
        ranks += [(distance <= distance.gather(1, i + s)).sum(1) for s in range(1, copies)]
    return torch.cat(ranks).float().quantile(0.5).item()


def draw_map(g: Tensor, images: Tensor, kinds: Tensor, side: int = 1000) -> Tensor:
    """Images [N, 3, S, S] at their places g [N, D], the first two coordinates, framed in the colour
    of their kind [N] → [3, side, side]."""
    g, size = F.pad(g, (0, 1))[:, :2].cpu(), images.shape[3] + 4
    g, canvas = g - g.amin(0), torch.ones(3, side, side)
    g = g / g.max().clamp(min=1e-30)
    places = ((g + (1 - g.amax(0)) / 2) * (side - size)).long().tolist()
    for (left, top), image, kind in zip(places, images.cpu(), kinds.tolist(), strict=True):
        colour = torch.tensor(ImageColor.getrgb(f"hsl({47 * kind % 360}, 100%, 45%)")) / 255
        canvas[:, top : top + size, left : left + size] = colour[:, None, None]
        canvas[:, top + 2 : top + size - 2, left + 2 : left + size - 2] = image
    return canvas

# ---------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and leave a run in --out; the same arguments again go on with it."""
    args = parse_arguments(argv)
    out, torch.backends.cudnn.benchmark = args.out, True
    accelerator = Accelerator()
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() // processes or 1)  # accelerate launch: one
    data, bank, test = common.load_splits(args.data, args.root, None, device, args.workers)
    bank, test = bank or data, test or data  # of a folder without classes all images
    names, S, k = bank.classes or ["all"], 1 + len(args.shifts), args.neighbours
    chosen = sorted({names.index(c) if c in names else int(c) if c.isdecimal() else -1
                     for c in args.classes or names})
    if not {*chosen} <= {*range(len(names))}:
        fail(f"--classes {' '.join(args.classes)}: take of {', '.join(names)}, or their numbers")
    size = args.image_size = args.image_size or min(bank.side, 224 if args.arch != "paper" else 32)
    if size > (32 if args.arch == "paper" else 224) or max(0, 0, *map(abs, args.shifts)) >= size:
        fail("--image-size, --shifts: images of 224 pixels at most, for the paper's network of 32; "
             "shifts smaller than the image")
    def load(images: common.ImageSet, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images and copies [N·S, C, size, size], their labels and numbers in the set [N·S]."""
        y = images.labels.clamp(min=0)
        index = torch.isin(y, torch.tensor(chosen)).nonzero()[:, 0]
        index = index[common.some_of_each(y[index], most, common.generator(0))].sort().values
        if len(index) * S * 12 * size**2 > common.MEMORY_LIMIT:
            fail(f"{len(index)} images do not fit: take less --classes, --per-class, --image-size")
        x = common.extract_features(nn.Flatten(), images.take(index), size)
        x = x.unflatten(1, (3, size, size))
        if args.arch == "paper":  # grey, in the middle of 32 pixels
            x = F.pad(x.mean(1, keepdim=True), [(32 - size) // 2, (33 - size) // 2] * 2)
        x = torch.stack([F.pad(x, [s, -s, 0, 0]) for s in (0, *args.shifts)], 1).flatten(0, 1)
        index = index.repeat_interleave(S)
        return x, y[index].to(device), index
    (x, y, index), (x_test, y_test, index_test) = load(bank, args.per_class), load(test, 10**9)
    copies, labels, B = S if args.graph == "shifts" else 1, None, args.batch_size
    N, most, near_by = len(x) // copies, len(x) // copies - 2, x[::copies].flatten(1)
    if args.graph == "labels":  # partners: of equal label, at the nearest random places on a line
        labels, u = y.cpu(), torch.rand(N, generator=common.generator(args.seed)).double()
        near_by, most = torch.stack([2.0 * labels, u], 1), labels.bincount()[chosen].min() - 1
    if k > most or (args.graph == "labels" and len(chosen) < 2):
        fail(f"--graph {args.graph}, --neighbours {k}: {N} images of {len(chosen)} classes leave "
             f"no pair dissimilar, or only {most} neighbours")
    partners = [nearest(near_by, near_by, k, itself=True).cpu(), torch.arange(N)[:, None]]
    partners = torch.cat(partners[:copies], 1)  # where there are copies, itself too
    if not (E := partners.numel()) >= B >= 2 or B % processes:
        fail(f"--batch-size: take 2 to {E} pairs, a multiple of {processes} processes")
    epoch_steps, steps = E // B, E // B * args.epochs
    settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    settings |= {"mixed_precision": accelerator.mixed_precision, "images": bank.fingerprint}
    config = {"settings": settings, "devices": f"{processes} {device}",
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
                aside.write_text(json.dumps(old, indent=1))
    except Exception as error:  # damaged files lead to nearly everything
        fail(f"--out {out} is no folder of a run, nor can it be made one ({error!r:.200})")
    if results:
        return say(f"{out} is finished; the map of the test images:\n{common.table(results)}")
    torch.manual_seed(args.seed)
    about = {"architecture": args.arch, "stem": "3x3" if size <= 64 else "7x7"}
    encoder = common.build_encoder(**about) if args.arch != "paper" else paper_network()
    net = nn.Sequential(encoder, nn.Linear(encoder.width, args.dim)).to(device)
    if processes > 1 and device.type == "cuda":  # it has no CPU kernel
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    G = nn.Sequential(*net)  # the same layers, without the autocast that prepare gives to net
    model, optimizer = accelerator.prepare(net, optimizer)
    done, rows, sums = 0, [], torch.zeros(2, device=device)  # the epoch's losses, spreads
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, rows = state["step"], state["rows"]
        say(f"going on after step {done} of {steps}")
    for number in (signal.SIGTERM, signal.SIGINT):  # epochs are short: an interrupted one is lost
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    @torch.no_grad()
    def measured(to_map: nn.Module) -> tuple[dict, Tensor, Tensor]:
        g_test, g = (torch.cat([*map(to_map, v.split(256))]).float() for v in (x_test, x))
        if not (g_test.isfinite().all() and g.isfinite().all()):
            fail("the map is not finite: take a lower --lr, another --out")
        axes = torch.linalg.svdvals(g_test - g_test.mean(0))
        row = {"flatness": (axes[-1] / axes[0].clamp(min=1e-30)).item()}
        if len(chosen) > 1:  # percent whose class most of the 5 nearest training images have
            votes = y[nearest(g_test, g, min(5, len(g)))].mode(1).values
            row["5-NN"] = 100 * (votes == y_test).float().mean().item()
        return row | ({"rank": copies_rank(g_test, S)} if S > 1 else {}), g_test, g
    rank, began, unlike = accelerator.process_index, time.monotonic(), max(1, round(args.ratio * B))
    chance = unlike / (B + unlike) * args.margin**2 / 2
    bar = tqdm(range(done, steps), total=steps, initial=done, disable=not sys.stderr.isatty())
    for step in bar:
        epoch, i = divmod(step, epoch_steps)
        edges = torch.randperm(E, generator=common.generator(args.seed, epoch))[i * B : i * B + B]
        i, pairs, Y = (common.beside(x, v) for v in draw_pairs(
            edges, partners, labels, copies, args.ratio, common.generator(args.seed, epoch, i)))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)
        g = model(x[i.chunk(processes)[rank]]).float()
        g1, g2 = gather(g, accelerator)[pairs].unbind(1)
        loss = contrastive_loss(g1, g2, Y, args.margin)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        sums += torch.stack([loss.detach(), g1.detach().std(0).norm() / args.margin])
        done = step + 1
        if done % epoch_steps:
            continue
        seconds, (mean, spread) = time.monotonic() - began, (sums / epoch_steps).tolist()
        if not math.isfinite(mean):
            fail(f"the loss of epoch {epoch + 1} is not finite: take a lower --lr, another --out")
        row = {"epoch": epoch + 1, "step": done, "loss": mean, "chance": chance,
               "spread": spread, "lr": lr, "images_per_s": 2 * B * epoch_steps / seconds,
               "minutes_left": (steps - done) / epoch_steps * seconds / 60}
        if row["epoch"] % args.eval_every == 0 or done == steps:
            row |= measured(G.eval())[0]
            G.train()
        bar.clear()
        say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
        if spread < 0.02:
            say("warning: the map collapses to a point: take a lower --lr, more --ratio")
        rows.append(row)
        sums, began = sums.zero_(), time.monotonic()
        if accelerator.is_main_process:
            with common.written_aside(out / "metrics.jsonl") as aside:
                aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with common.written_aside(out / "checkpoint.pt") as aside:
                torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                            "step": done, "rows": rows}, aside)
    torch.manual_seed(args.seed)  # pca_lowrank draws
    axes = torch.pca_lowrank(x.flatten(1), min(max(6, args.dim), len(x)), niter=9)[2][:, : args.dim]
    ways = {"DrLIM": G.eval(), "PCA": lambda v: v.flatten(1) @ axes, "pixels": nn.Flatten()}
    numbers, places, bank_places = zip(*map(measured, ways.values()), strict=True)
    rows = [{"features": f"{name}, {g.shape[1]}-D", **row}
            for name, g, row in zip(ways, places, numbers, strict=True)]
    say(f"the map of the test images:\n{common.table(rows)}")
    some = torch.randperm(len(x_test), generator=common.generator(args.seed))[:1000]
    images, kinds = x_test[some].expand(-1, 3, -1, -1), some % S if S > 1 else y_test.cpu()[some]
    pictures = torch.stack([draw_map(g[some], images, kinds) for g in places[:2]])
    common.save_pictures(out / "map.png", pictures, 2)
    if accelerator.is_main_process:
        about |= {"method": "drlim", "image_size": size, "data": args.data}
        if args.arch != "paper":
            common.save_encoder(out / "encoder.safetensors", encoder, **about)
        maps = {"coordinates": places[0], "labels": y_test, "indices": index_test}
        maps |= {"train_coordinates": bank_places[0], "train_labels": y, "train_indices": index}
        with common.written_aside(out / "map.npz") as aside:
            np.savez(aside, **{name: v.cpu() for name, v in maps.items()})
        with common.written_aside(out / "results.json") as aside:
            aside.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
