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
the images of a step, so many to each similar one; Adam, margin, ReLU and epochs are our choice (the
paper names none).
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
from accelerate.tracking import get_available_trackers
from accelerate.utils import tqdm
from torch import Tensor, nn

import common
from common import fail

BUNDLED = {"classes": ["5", "7", "9"]}  # of the bundled images: sandals, sneakers and boots
MAY_BE_0 = {"weight_decay", "seed"}
MAY_CHANGE = {"root", "eval_every", "workers", "out", "log_with"}  # when a run goes on

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
    flag("--image-size", type=int, help="side of the images (default: theirs, at most 224)")
    flag("--arch", choices=("paper", *common.ARCHITECTURES), default="paper", help="network G")
    flag("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    flag("--dim", type=int, default=2, help="dimensions of the map")
    flag("--graph", choices=("neighbours", "shifts", "labels"), default="neighbours",
         help="similar: nearest by pixels, with all shifted copies, or alike labels (not DrLIM)")
    flag("--neighbours", type=int, default=5, help="similar images of each image")
    flag("--shifts", type=int, nargs="+", help="pixels to the right of copies (shifts: -6 -3 3 6)")
    flag("--ratio", type=float, default=0.25, help="dissimilar pairs to each similar one")
    flag("--margin", type=float, default=1.25, help="margin m of the loss")
    flag("--epochs", type=int, default=20, help="passes over the similar pairs")
    flag("--max-steps", type=int, help="make the run, and its schedule, no longer than this")
    flag("--batch-size", type=int, default=256, help="similar pairs a step, over all processes")
    flag("--lr", type=float, default=0.005, help="first learning rate of Adam")
    flag("--weight-decay", type=float, default=0, help="weight decay")
    flag("--seed", type=int, default=0, help="seed of the weights and pairs")
    flag("--eval-every", type=int, default=5, help="epochs between two looks at the map")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--out", help="folder of the run (default: runs/drlim-DATA)")
    flag("--log-with", choices=[*map(str, get_available_trackers())], help="an installed tracker")
    if p.parse_args(argv).data == "fashion-mini":
        p.set_defaults(**BUNDLED)
    args = p.parse_args(argv)
    for k, v in vars(args).items():
        low, top = k == "image_size", {"seed": 2**63 - 1}.get(k, 1e30)
        if isinstance(v, int | float) and not (low < v <= top or (v == 0 and k in MAY_BE_0)):
            fail(f"--{k.replace('_', '-')} {v} is out of range")
    args.shifts = args.shifts or ([-6, -3, 3, 6] if args.graph == "shifts" else [])
    args.out = Path(args.out or f"runs/drlim-{Path(args.data).name}")
    return args

# --------------------------------------------------------------------------------- graph
def shifted(x: Tensor, shifts: Sequence[int]) -> Tensor:
    """x [N, C, S, S] → [N·(1 + shifts), C, S, S]: each image, then its copies, black moving in."""
    return torch.stack([F.pad(x, [s, -s, 0, 0]) for s in (0, *shifts)], 1).flatten(0, 1)


def nearest(queries: Tensor, bank: Tensor, k: int, itself: bool = False) -> Tensor:
    """Indices [Q, k] of the rows of bank [M, D] nearest to each of queries [Q, D], in chunks.
    itself: the queries are the bank, and no row is its own neighbour."""
    found, step = [], max(1, 2**26 // len(bank))
    for start in range(0, len(queries), step):
        distance = torch.cdist(queries[start : start + step], bank)
        if itself:
            distance[:, start:].fill_diagonal_(torch.inf)
        found.append(distance.topk(k, largest=False).indices)
    return torch.cat(found)


def similar(i: Tensor, partners: Tensor, labels: Tensor | None) -> Tensor:
    """Which pairs of images i [M] are similar, [M, M]: those of equal label where there are labels
    [N], else an image, itself and its partners [N, k]."""
    if labels is not None:
        return labels[i][:, None] == labels[i]
    known = (partners[i][:, :, None] == i).any(1)
    return known | known.T | (i[:, None] == i)


def draw_pairs(edges: Tensor, partners: Tensor, labels: Tensor | None, copies: int, ratio: float,
               rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The similar pairs edges [B] (n·k + j: image n, its j-th partner) and ratio·B dissimilar ones
    among their images: numbers i [2B] of images, of which image n has copies, from n·copies; pairs
    of rows of i [(1 + ratio)·B, 2], the similar first; Y of each. Without dissimilar: none."""
    B, n = len(edges), edges // partners.shape[1]
    other, u = partners.flatten()[edges], torch.rand(2, B, generator=rng)
    own, first = (n == other).long(), (u[0] * copies).long()  # its own copy: by another shift
    second = (first + own + (u[1] * (copies - own)).long()) % copies
    i = torch.stack([n * copies + first, other * copies + second], 1).flatten()
    unlike = (~similar(i // copies, partners, labels)).triu().nonzero()
    some = torch.randint(len(unlike) or 1, (round(ratio * B) if len(unlike) else 0,), generator=rng)
    pairs = torch.cat([torch.arange(2 * B).view(B, 2), unlike[some]])
    return i, pairs, (torch.arange(len(pairs)) >= B).long()

# --------------------------------------------------------------------------------- model
def paper_network(dim: int) -> nn.Sequential:
    """§3.1, [B, 1, 32, 32] → [B, dim]: convolution 6×6 to 15 maps, subsampling 3×3, convolution 9×9
    to 30 maps, a linear layer."""
    return nn.Sequential(nn.Conv2d(1, 15, 6), nn.ReLU(), nn.AvgPool2d(3), nn.Conv2d(15, 30, 9),
                         nn.ReLU(), nn.Flatten(), nn.Linear(30, dim))

# ---------------------------------------------------------------------------------- loss
def contrastive_loss(g1: Tensor, g2: Tensor, dissimilar: Tensor, margin: float) -> Tensor:
    """Eq. 4, mean over N pairs: g1, g2 [N, D], Y = dissimilar [N] in {0, 1} → scalar; with D_W the
    distance, (1 - Y)·½·D_W² + Y·½·max(0, m - D_W)². At D_W = 0 its gradient is 0. ValueError for
    other shapes.
    """
    if g1.shape != g2.shape or g1.ndim != 2 or dissimilar.shape != g1.shape[:1]:
        raise ValueError(f"g1, g2 [N, D], dissimilar [N], not {g1.shape}, {g2.shape}, "
                         f"{dissimilar.shape}")
    D = torch.linalg.vector_norm(g1 - g2, dim=1)  # its gradient at 0 is 0
    return torch.where(dissimilar == 0, D**2, (margin - D).clamp(min=0) ** 2).mean() / 2


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
def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rate of step 0 .. steps - 1: half a cosine from the peak to 0."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))

# ----------------------------------------------------------------------------------- map
def neighbour_accuracy(g: Tensor, y: Tensor, bank: Tensor, bank_labels: Tensor) -> float:
    """Percent of g [N, D] whose label y [N] most of the 5 nearest of bank [M, D] have."""
    votes = bank_labels[nearest(g, bank, min(5, len(bank)))]
    return 100 * (votes.mode(1).values == y).float().mean().item()


def copies_rank(g: Tensor, copies: int) -> float:
    """Median rank of an image's shifted copies among all other points of g [N·copies, D], image n
    and its copies from n·copies, by their distance from it; those as near count as nearer."""
    ranks = []
    for i in torch.arange(0, len(g), copies, device=g.device)[:, None].split(512):
        distance = torch.cdist(g[i[:, 0]], g).scatter_(1, i, torch.inf)
        ranks += [(distance <= distance.gather(1, i + s)).sum(1) for s in range(1, copies)]
    return torch.cat(ranks).float().quantile(0.5).item()


def draw_map(g: Tensor, images: Tensor, kinds: Tensor, side: int = 1000) -> Tensor:
    """Images [N, 3, S, S] at their places g [N, D], by the two main axes, framed in the colour of
    their kind [N] → [3, side, side]."""
    g, size = g.cpu() - g.cpu().mean(0), images.shape[3] + 4
    g = F.pad(g @ torch.linalg.svd(g, full_matrices=False)[2][:2].T, (0, max(0, 2 - g.shape[1])))
    low, high = g.quantile(0.005, dim=0), g.quantile(0.995, dim=0)
    g = (g - (low + high) / 2) / (high - low).max().clamp(min=1e-30) * (side - size)
    places = (g + (side - size) / 2).round().long().clamp(0, side - size).tolist()
    hues = 6 * torch.arange(int(kinds.max()) + 1) / (int(kinds.max()) + 1)
    colours = ((hues[:, None] + torch.tensor([0, 4, 2])) % 6 - 3).abs().sub(1).clamp(0, 1)
    canvas = torch.ones(3, side, side)
    for (left, top), image, kind in zip(places, images.cpu(), kinds.tolist(), strict=True):
        tile = canvas[:, top : top + size, left : left + size]
        tile[:] = colours[kind][:, None, None]
        tile[:, 2:-2, 2:-2] = image
    return canvas

# ---------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and leave a run in --out; the same arguments again go on with it."""
    args = parse_arguments(argv)
    out, torch.backends.cudnn.benchmark = args.out, True
    accelerator = Accelerator(log_with=args.log_with, project_dir=out)
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() // processes or 1)  # accelerate launch: one
    data, bank, test = common.load_splits(args.data, args.root, None, device, args.workers)
    bank, test, kind = bank or data, test or data, {}  # of a folder without classes all images
    names = bank.classes or ("all",)
    for c in args.classes or map(str, range(len(names))):
        number = names.index(c) if c in names else int(c) if c.isdecimal() else len(names)
        if number >= len(names):
            fail(f"--classes {c}: take of " + ", ".join(f"{i} ({n})" for i, n in enumerate(names)))
        kind[number] = len(kind)
    paper, S, k = args.arch == "paper", 1 + len(args.shifts), args.neighbours
    size = args.image_size = args.image_size or min(bank.side, 32 if paper else 224)
    stem = args.stem = args.stem or ("3x3" if size <= 64 else "7x7")
    if size > (32 if paper else 1e30) or max(map(abs, args.shifts), default=0) >= size:
        fail(f"--image-size {size}, --shifts {args.shifts}: the paper's network (--arch) takes 32 "
             "pixels at most, shifts must be smaller")
    def load(images: common.ImageSet, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images and their copies [N·S, C, size, size], their kinds and numbers in the set."""
        y = torch.tensor([kind.get(c, -1) for c in images.labels.clamp(min=0).tolist()])
        index = (y >= 0).nonzero()[:, 0]
        index = index[common.some_of_each(y[index], most, common.generator(0))].sort().values
        x = common.extract_features(nn.Flatten(), images.take(index), size)
        x, rest = x.unflatten(1, (3, size, size)), 32 - size
        if paper:  # grey, in the middle of 32 pixels
            x = F.pad(x.mean(1, keepdim=True), [rest // 2, rest - rest // 2] * 2)
        y, index = (v.repeat_interleave(S) for v in (y[index], index))
        return shifted(x, args.shifts), y.to(device), index
    (x, y, index), (x_test, y_test, index_test) = load(bank, args.per_class), load(test, 10**9)
    copies, labels = S if args.graph == "shifts" else 1, None  # of what the graph connects
    N, B = len(x) // copies, args.batch_size
    if k > N - 2 or (args.graph == "labels" and len(kind) < 2):
        fail(f"--graph {args.graph}: {N} images of {len(kind)} classes, with {k} --neighbours, "
             "leave no pair dissimilar")
    if args.graph == "labels":
        labels, order, count = y.cpu(), y.cpu().argsort(stable=True), y.cpu().bincount()
        u = torch.rand(N, k, generator=common.generator(args.seed)) * count[labels, None]
        partners = order[(count.cumsum(0) - count)[labels, None] + u.long()]
    else:
        pixels, own = x[::copies].flatten(1), torch.arange(N)[:, None]
        partners = nearest(pixels, pixels, k, itself=True).cpu()
        partners = torch.cat([partners, own], 1) if copies > 1 else partners
    E = partners.numel()
    if B > E or B % processes:
        fail(f"--batch-size: take 1 to {E} pairs, a multiple of {processes} processes")
    epoch_steps = E // B
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
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
        return say(f"{out} is finished; the map of the test images:\n{common.table(results)}")
    torch.manual_seed(args.seed)
    about = {"architecture": args.arch, "stem": stem}
    encoder = nn.Identity() if paper else common.build_encoder(**about)
    head = paper_network(args.dim) if paper else nn.Linear(encoder.width, args.dim)
    net = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    if processes > 1 and device.type == "cuda":  # it has no CPU kernel
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)
    done, rows, sums = 0, [], torch.zeros(4, device=device)  # losses, D of both kinds, steps
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
    accelerator.init_trackers("drlim", {k: str(v) for k, v in settings.items()})
    @torch.no_grad()
    def measured(to_map: nn.Module) -> tuple[dict, Tensor, Tensor]:
        """Numbers of the map, and the places of the test and the training images."""
        g, g_test = (torch.cat([to_map(v).float() for v in part.split(512)]) for part in (x, x_test))
        axes = torch.linalg.svdvals(g_test - g_test.mean(0))
        row = {"flatness": (axes[-1] / axes[0].clamp(min=1e-30)).item()}
        if len(kind) > 1:
            row["5-NN"] = neighbour_accuracy(g_test, y_test, g, y)
        return row | ({"rank": copies_rank(g_test, S)} if S > 1 else {}), g_test, g
    rank, chance = accelerator.process_index, args.ratio / (1 + args.ratio) * args.margin**2 / 2
    look = 1 if device.type == "cpu" else 20  # steps between two looks at what is on the device
    saved, began, epoch_start = time.monotonic(), time.monotonic(), done
    bar = tqdm(range(done, steps), total=steps, initial=done, disable=not sys.stderr.isatty())
    for step in bar:
        epoch, i = divmod(step, epoch_steps)
        edges = torch.randperm(E, generator=common.generator(args.seed, epoch))[i * B : i * B + B]
        rng = common.generator(args.seed, epoch, i)
        i, pairs, Y = (common.beside(x, v) for v in draw_pairs(
            edges, partners, labels, copies, args.ratio, rng))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)
        own = x[i.chunk(processes)[rank]].contiguous(memory_format=torch.channels_last)
        g1, g2 = gather(model(own).float(), accelerator)[pairs].unbind(1)
        loss = contrastive_loss(g1, g2, Y, args.margin)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        near, far = (v.detach().norm(dim=1).sum() / max(1, len(v)) for v in (g1 - g2).split([B, len(Y) - B]))
        sums += torch.stack([loss.detach(), near, far, near**0])
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
            mean, similar, dissimilar, _ = (sums / sums[3]).tolist()
            row = {"epoch": epoch + 1, "step": done, "loss": mean, "chance": chance,
                   "similar": similar, "dissimilar": dissimilar, "lr": lr,
                   "images_per_s": 2 * n * B / seconds,
                   "minutes_left": (steps - done) / n * seconds / 60}
            if row["epoch"] % args.eval_every == 0 or done == steps:
                row |= measured(net.eval())[0]
                net.train()
            bar.clear()
            say(" · ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if chance - mean < 0.02 * chance:
                say("warning: the map collapses to a point: take a lower --lr, another --margin")
            rows.append(row)
            accelerator.log(row, step=done)
            sums.zero_()
            epoch_start, began = done, time.monotonic()
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
    axes = torch.pca_lowrank(x.flatten(1), max(6, args.dim), niter=9)[2][:, : args.dim]
    ways = {"DrLIM": net.eval(), "PCA": lambda v: v.flatten(1) @ axes, "pixels": nn.Flatten()}
    numbers, places, bank_places = zip(*map(measured, ways.values()), strict=True)
    rows = [{"features": f"{name}, {g.shape[1]}-D", **row}
            for name, g, row in zip(ways, places, numbers, strict=True)]
    say(f"the map of the test images:\n{common.table(rows)}")
    some = torch.randperm(len(x_test), generator=common.generator(args.seed))[:1000]
    images, kinds = x_test[some].expand(-1, 3, -1, -1), some % S if S > 1 else y_test.cpu()[some]
    pictures = torch.stack([draw_map(g[some], images, kinds) for g in places[:2]])
    common.save_pictures(out / "map.png", pictures, 2)
    about |= {"method": "drlim", "image_size": size, "data": args.data}
    if accelerator.is_main_process:
        common.save_encoder(out / "network.safetensors", net, **about)
        if not paper:
            common.save_encoder(out / "encoder.safetensors", encoder, **about)
        number = torch.tensor([*kind])
        with common.written_aside(out / "map.npz") as aside:
            np.savez(aside, coordinates=places[0].cpu(), labels=number[y_test.cpu()],
                     indices=index_test, train_coordinates=bank_places[0].cpu(),
                     train_labels=number[y.cpu()], train_indices=index)
        with common.written_aside(out / "results.json") as aside:
            aside.write_text(json.dumps(rows, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    main()
