# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""DrLIM: Dimensionality Reduction by Learning an Invariant Mapping.

Hadsell, Chopra and LeCun, CVPR 2006,
http://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf

    python drlim.py                                     # the bundled images, on a laptop
    python drlim.py --data mnist --classes 4 9
    python drlim.py --data FOLDER --arch resnet18 --dim 3

Type the same command again to continue an interrupted run. The second command is the paper's first
experiment. Its second one adds shifted copies of the digits: --graph shifts knows which images are
copies, --graph shifts-by-pixels does not (both with --epochs 4).

Where to find the parts of the paper:
- section 2.1, the algorithm: `build_graph`, `sample_pairs` and the inner loop of `main`
- Eq. 4, the loss, with Y = 1 for dissimilar pairs: `contrastive_loss`
- sections 3.1 to 3.3, the network and the experiments: `paper_network`, --graph

Differences from the paper:
- Dissimilar pairs are drawn among the images of a step; the paper uses all.
- The loss is a mean over pairs, not a sum. The optimizer is Adam, not stochastic gradient descent.
- The learning rate, the margin, the number of epochs, the nonlinearity and the scale of the inputs
  are choices of this code: the paper does not give them.
- --graph labels, where images of one class are similar, is for comparison.
"""

import argparse
import json
import math
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import ImageColor
from torch import Tensor, nn
from torchvision.transforms import v2

import common

# Defaults by the kind of images: the bundled ones, those of up to 64 pixels, and larger ones.
PRESETS = {
    "fashion-mini": {"batch_size": 128, "classes": [5, 7, 9]},  # sandals, sneakers and boots
    "small": {"batch_size": 128},
    "large": {"batch_size": 128},
}
GRAPHS = ("neighbours", "shifts", "shifts-by-pixels", "labels")
SHIFTS = (0, -6, -3, 3, 6)  # of an image and its copies, in pixels to the right


class Samples(NamedTuple):
    """Images x [N * copies, C, S, S] in 0..1, each followed by its shifted copies; and labels."""

    x: Tensor
    labels: Tensor
    copies: int


def load_samples(
    images: common.Images, classes: list, most: int | None, size: int, gray: bool, shifts: tuple
) -> Samples:
    """The middle squares of at most `most` images of each class, and their shifted copies."""
    if missing := set(classes) - set(images.labels.tolist()):
        common.fail(f"--classes {min(missing)}: there are no such images to train or to test on")
    order = torch.randperm(len(images), generator=common.generator(0))
    chosen = [order[images.labels[order] == label][:most] for label in classes]
    index = torch.cat(chosen).sort().values
    x = torch.cat(list(common.middles(images, index, size)))
    if gray:  # padded to 32 pixels, for the paper's network
        x = v2.functional.center_crop(x.mean(1, keepdim=True), [32])
    x = torch.stack([F.pad(x, [shift, -shift, 0, 0]) for shift in shifts], dim=1).flatten(0, 1)
    labels = images.labels[index].repeat_interleave(len(shifts))
    return Samples(x, labels.to(x.device), len(shifts))


def find_nearest(queries: Tensor, bank: Tensor, k: int, groups: Tensor | None = None) -> Tensor:
    """The k rows of bank [M, D] that are nearest to each of queries [Q, D], as indices [Q, k].

    If both are the same, rows with the same number in groups [M] are not each other's neighbors.
    """
    nearest = []
    for rows in torch.arange(len(queries), device=bank.device).split(max(1, 2**26 // len(bank))):
        distance = torch.cdist(queries[rows], bank)
        if groups is not None:
            distance[groups[rows, None] == groups] = torch.inf
        nearest.append(distance.topk(k, largest=False).indices)
    return torch.cat(nearest)


def build_graph(kind: str, samples: Samples, neighbors: int) -> tuple[Tensor, Tensor]:
    """Decide which of M training samples are similar (section 2.1, step 1).

    Args:
        kind: "neighbours" and "shifts-by-pixels", the nearest by pixels among all samples;
            "shifts", the copies of an image and of the nearest among the unshifted images; or
            "labels", random samples of the same class.
        neighbors: how many images are similar to an image.

    Returns:
        partners [M, k], samples that are similar to each; and groups [M], integers. Samples of a
        group are similar as well: those of a class, or the copies of an image.
    """
    copies = samples.copies if kind == "shifts" else 1
    x = samples.x[::copies].flatten(1)
    images = torch.arange(len(x))
    if neighbors > len(x) - 2:  # all but the image itself and one that is dissimilar
        common.fail(f"--neighbours {neighbors} is too many for {len(x)} images: use fewer")

    if kind == "labels":
        groups = samples.labels.cpu()
        if (groups == groups[0]).all():
            common.fail("--graph labels needs images of at least two --classes")
        partners = torch.empty(len(x), neighbors, dtype=torch.long)
        rng = common.generator(0)
        for label in groups.unique():
            same = images[groups == label]
            partners[same] = same[torch.randint(len(same), (len(same), neighbors), generator=rng)]
        return partners, groups

    nearest = find_nearest(x, x, neighbors, images.to(x.device)).cpu()
    similar = torch.cat([images[:, None], nearest], dim=1)
    similar = similar[:, :, None] * copies + torch.arange(copies)  # [images, images, copies]
    similar = similar.flatten(1).repeat_interleave(copies, dim=0)  # [M, 1 + k]
    itself = torch.arange(len(similar))[:, None]
    partners = similar[similar != itself].view(len(similar), -1)
    return partners, images.repeat_interleave(copies)


def sample_pairs(
    partners: Tensor, groups: Tensor, edges: Tensor, ratio: float, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of a step (section 2.1, step 2): edges of the graph, and dissimilar pairs.

    Args:
        partners, groups: [M, k] and [M], the graph.
        edges: [B]; edge m * k + j joins sample m and the j-th of its partners.
        ratio: dissimilar pairs for each edge. They are drawn among the samples of the edges.

    Returns:
        i [2B], the samples that are needed; pairs [P, 2], as places in i; and Y [P], 1 for
        dissimilar pairs. There is at least one, unless all samples are similar.
    """
    B = len(edges)
    i = torch.stack([edges // partners.shape[1], partners.flatten()[edges]], dim=1).flatten()
    similar = (partners[i][:, :, None] == i).any(1)  # [2B, 2B]
    similar = similar | similar.T | (groups[i][:, None] == groups[i])
    dissimilar = (~similar).triu().nonzero()  # each pair once
    pairs = torch.arange(2 * B).view(B, 2)
    if len(dissimilar):
        drawn = torch.randint(len(dissimilar), (max(1, round(ratio * B)),), generator=rng)
        pairs = torch.cat([pairs, dissimilar[drawn]])
    return i, pairs, (torch.arange(len(pairs)) >= B).long()


def paper_network() -> nn.Sequential:
    """The network without its last layer: x [B, 1, 32, 32] to [B, 30] (section 3.1)."""
    first = (nn.Conv2d(1, 15, 6), nn.ReLU(), nn.AvgPool2d(3))
    network = nn.Sequential(*first, nn.Conv2d(15, 30, 9), nn.ReLU(), nn.Flatten())
    network.width = 30
    return network


def contrastive_loss(g1: Tensor, g2: Tensor, dissimilar: Tensor, margin: float) -> Tensor:
    """Contrastive loss (Eq. 4), mean over N pairs.

    With the distance D = |g1 - g2| of a pair, and Y = 1 if it is dissimilar,

        loss = (1 - Y) / 2 * D^2 + Y / 2 * max(0, margin - D)^2

    Args:
        g1, g2: [N, dim] coordinates of the two images of each pair.
        dissimilar: Y [N], 0 or 1.
        margin: m > 0, the distance that dissimilar images should have.

    Returns:
        Scalar. Its gradient is 0 where D = 0.
    """
    D = torch.linalg.vector_norm(g1 - g2, dim=1)  # Its gradient at 0 is 0; that of sqrt is NaN.
    hinge = (margin - D).clamp(min=0)
    return torch.where(dissimilar == 0, D**2, hinge**2).mean() / 2


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


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate at a step from 0 to steps - 1: linear warm-up to the peak, then cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def measure(G: nn.Module, train: Samples, test: Samples) -> tuple[dict, Tensor]:
    """The quality of a map G, x [N, C, S, S] to g [N, dim], and g of the test samples.

    The quality is "5-NN", if there are classes: the percentage of test samples whose class is the
    most frequent one of the five nearest training samples; "rank", if there are copies: the median
    rank of a copy among all points by distance from its image; and, of maps, "flatness": the
    smallest singular value of g as a share of the largest, 0 if all points lie on a line.
    """
    g, g_test = (torch.cat([G(x) for x in samples.x.split(256)]) for samples in (train, test))
    row = {}
    if (train.labels != train.labels[0]).any():
        images = torch.arange(len(g), device=g.device) // train.copies if test is train else None
        nearest = find_nearest(g_test, g, min(5, len(g)), images)
        correct = train.labels[nearest].mode(1).values == test.labels
        row["5-NN"] = 100 * correct.float().mean().item()
    if test.copies > 1:
        rank = torch.cdist(g_test[:: test.copies][:1000], g_test).argsort(1).argsort(1)
        own = rank.unflatten(1, (-1, test.copies)).diagonal()  # [copies, images]
        row["rank"] = own[1:].median().item()
    if g.shape[1] < 100:
        axes = torch.linalg.svdvals(g_test - g_test.mean(0))
        row["flatness"] = (axes[-1] / axes[0].clamp(min=1e-30)).item()
    return row, g_test


def draw_map(g: Tensor, images: Tensor, kinds: Tensor, side: int = 1000) -> Tensor:
    """Draw images [N, C, S, S] at g [N, dim], with a frame by kind [N]; [3, side, side]."""
    size = images.shape[3] + 4  # with a frame of two pixels
    canvas = torch.ones(3, side, side)
    places = F.pad(g - g.amin(0), (0, 1))[:, :2]  # A map of one dimension is a line.
    places = (places / places.max().clamp(min=1e-30) * (side - size)).long().tolist()
    for (left, top), image, kind in zip(places, images.cpu(), kinds.tolist(), strict=True):
        color = ImageColor.getrgb(f"hsl({47 * kind % 360}, 100%, 45%)")
        frame = canvas[:, top : top + size, left : left + size]
        frame[:] = torch.tensor(color)[:, None, None] / 255
        frame[:, 2:-2, 2:-2] = image
    return canvas


def finish(
    args: argparse.Namespace, G: nn.Module, train: Samples, test: Samples, accelerator: Accelerator
) -> None:
    """Compare the map with PCA and raw pixels, and write map.npz, map.png and the results."""
    x = train.x.flatten(1)
    axes = torch.pca_lowrank(x, q=min(args.dim + 8, *x.shape), niter=9)[2][:, : args.dim]
    maps = {"DrLIM": G, "PCA": lambda x: x.flatten(1) @ axes, "raw pixels": nn.Flatten()}
    # Up to 1,000 images are drawn, framed by shift if there are copies, and else by class.
    shown = torch.randperm(len(test.x), generator=common.generator(args.seed))[:1000]
    kinds = shown % test.copies if test.copies > 1 else test.labels.cpu()[shown]
    rows, pictures = [], []
    for name, to_map in common.progress(maps.items(), "evaluation"):
        row, g = measure(to_map, train, test)
        rows.append({"features": name, **row})
        pictures.append(draw_map(g[shown], test.x[shown], kinds))
        if name == "DrLIM" and accelerator.is_main_process:
            with common.atomic_write(args.out / "map.npz") as file:
                np.savez(file, coordinates=g.cpu(), labels=test.labels.cpu())
    common.save_pictures(args.out / "map.png", torch.stack(pictures[:2]), 2)
    accelerator.print(f"the map of {len(test.x)} images, 5-NN in percent")
    accelerator.print("\n".join(common.describe(row) for row in rows))
    if accelerator.is_main_process:
        with common.atomic_write(args.out / "results.json") as file:
            file.write_text(json.dumps(rows, indent=1))


def main(argv: list[str] | None = None) -> None:
    """Learn the map, evaluate it, and leave the run in --out."""
    about = "Learn a map of images with DrLIM. --batch-size counts pairs of similar images."
    parser = common.build_parser(about, PRESETS, ("paper", *common.ARCHITECTURES))
    parser.set_defaults(arch="paper", epochs=15, lr=0.005, warmup_epochs=0.0, weight_decay=0.0)
    add = parser.add_argument_group("DrLIM").add_argument
    add("--classes", type=common.not_negative_int, nargs="+", help="labels to map (default: all)")
    add("--per-class", type=common.count, default=3000, help="training images of each, at most")
    add("--graph", choices=GRAPHS, default="neighbours", help="which images are similar")
    add("--neighbours", type=common.count, default=5, help="similar images for each image")
    add("--ratio", type=common.positive, default=0.1, help="dissimilar pairs for a similar pair")
    add("--margin", type=common.positive, default=1.25, help="margin m of the loss")
    add("--dim", type=common.count, default=2, help="dimensions of the map")
    args = parser.parse_args(argv)

    accelerator = common.start(args.log_with)
    device = accelerator.device
    # Training and test images. Without labeled test images, the training images are both.
    images, bank, test = common.load_splits(args.data, args.root, args.limit, device, args.workers)
    args = common.parse_for(images, parser, PRESETS, argv)
    is_paper = args.arch == "paper"
    if is_paper and args.init:
        common.fail("--init needs an --arch other than paper")
    bank = bank or images
    classes = args.classes or bank.labels.unique().tolist()
    size = min(args.image_size, 32) if is_paper else args.image_size
    shifts = SHIFTS if args.graph.startswith("shifts") else (0,)
    train = load_samples(bank, classes, args.per_class, size, is_paper, shifts)
    test = load_samples(test, classes, None, size, is_paper, shifts) if test else train

    # An epoch has all similar pairs or, with --graph shifts, a random part of them.
    partners, groups = build_graph(args.graph, train, args.neighbours)
    epoch_steps = len(train.x) * args.neighbours // args.batch_size
    if epoch_steps == 0:
        common.fail(f"--batch-size {args.batch_size} is more than there are similar pairs")

    # The map G: an encoder, and a linear layer.
    torch.manual_seed(args.seed)
    first = nn.Identity() if is_paper else v2.Normalize(common.MEAN, common.STD)
    encoder = paper_network() if is_paper else common.build_encoder(args.arch, args.stem, args.init)
    network = nn.Sequential(first, encoder, nn.Linear(encoder.width, args.dim)).to(device)
    if accelerator.num_processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    G = nn.Sequential(*network)  # the same layers, without Accelerate's autocast
    optimizer = torch.optim.Adam(network.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)

    rows = []  # the metrics of all epochs
    saved = common.load_run(args, images)
    if saved:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rows = saved["rows"]

    total_steps = args.epochs * epoch_steps
    warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps // 2)
    common.start_trackers(accelerator, "drlim", args)

    saved_at = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        began = time.monotonic()
        loss_sum = torch.zeros((), device=device)
        epoch_range = range(epoch * epoch_steps, (epoch + 1) * epoch_steps)
        order = torch.randperm(partners.numel(), generator=common.generator(args.seed, epoch))
        for step in common.progress(epoch_range, f"epoch {epoch + 1}/{args.epochs}"):
            lr = learning_rate(step, total_steps, warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # The pairs of a step depend only on the seed and the step, not on the number of
            # processes or on where the run was interrupted. Each process maps its share of them.
            rng = common.generator(args.seed, epoch, step % epoch_steps)
            edges = order[step % epoch_steps * args.batch_size :][: args.batch_size]
            drawn = sample_pairs(partners, groups, edges, args.ratio, rng)
            i, pairs, Y = (common.to_device_of(train.x, values) for values in drawn)
            own = i.chunk(accelerator.num_processes)[accelerator.process_index]
            g = gather(model(train.x[own]).float(), accelerator)  # [2B, dim]

            # Eq. 4, on the pairs of all processes.
            g1, g2 = g[pairs].unbind(1)
            loss = contrastive_loss(g1, g2, Y, args.margin)

            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss_sum += loss.detach()

        row = {
            "epoch": epoch + 1,
            "loss": accelerator.reduce(loss_sum, "mean").item() / epoch_steps,
            "chance": Y.float().mean().item() * args.margin**2 / 2,  # the loss of equal points
            "spread": (g.detach().std(0).norm() / args.margin).item(),  # of the last batch
            "lr": lr,
            "images/s": epoch_steps * 2 * args.batch_size / (time.monotonic() - began),
        }
        if not math.isfinite(row["loss"]):
            common.fail("the loss is not finite: use a lower --lr and another --out")
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            G.eval()
            row |= measure(G, train, test)[0]
            G.train()
        rows.append(row)
        accelerator.print(common.describe(row, args.warmup_epochs))
        accelerator.log(row, step=step)
        if epoch + 1 == args.epochs or time.monotonic() - saved_at > common.SAVE_SECONDS:
            state = {"model": network.state_dict()}
            kept = None if is_paper else encoder
            common.save_run(args, rows, kept, optimizer=optimizer.state_dict(), **state)
            saved_at = time.monotonic()

    finish(args, G.eval(), train, test, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    with common.one_line_errors():
        main()
