# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""DrLIM: Dimensionality Reduction by Learning an Invariant Mapping.

Hadsell, Chopra and LeCun, CVPR 2006,
http://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf

    python drlim.py                                     # the bundled images, on a laptop
    python drlim.py --data mnist --classes 4 9          # the paper's first experiment
    python drlim.py --data mnist --classes 4 9 --graph shifts                # its second
    python drlim.py --data FOLDER --arch resnet18 --dim 3

The run is kept in --out. It can be stopped at any time; the same command resumes it from its last
checkpoint, and it ends as if it had never been stopped.

Where to find the parts of the paper:
- Eq. 4, the loss, with Y = 1 for dissimilar pairs: `contrastive_loss`
- section 2.1, the algorithm (a graph of similar images, then pairs of both kinds): `build_graph`,
  `sample_pairs` and the inner loop of `main`
- section 3.1, the network: `paper_network`
- section 3.2, the first experiment, five nearest neighbors by pixels: --graph neighbours
- section 3.3, the second experiment, with shifted copies: --graph shifts; without the knowledge of
  which images are copies: --graph neighbours --shifts -6 -3 3 6

Differences from the paper:
- Dissimilar pairs are drawn among the images of a step, --ratio pairs for each similar pair. The
  paper uses all pairs. Where images have shifted copies, a step shows each similar pair as one
  random pair of their copies.
- The loss is a mean over pairs; Eq. 2 is a sum.
- The optimizer is Adam (in the paper, stochastic gradient descent). The learning rate and its
  schedule, the margin, ReLU and the number of epochs are choices of this code: the paper does not
  give them.
- Inputs are in 0..1; the paper does not say how it scales them.
- --graph labels, where images of one class are similar, is not the paper's; it is for comparison.
- On CPUs each process has its own batch norm statistics (--arch small and the ResNets), because
  PyTorch synchronizes them only on GPUs.

What other implementations get wrong, and the tests exclude: the meaning of Y; a bare square root,
whose gradient at distance 0 is not a number; a hinge that is not squared; an elementwise root in
place of the norm; a sigmoid that keeps distances below the margin; class labels as neighbors. Too
many dissimilar pairs keep classes from separating, since half of those pairs are of one class: on
MNIST's fours and nines, 5-NN falls from 95.9 to 90.6 % with --ratio 1 and to 89.0 % with --ratio 4.

How to adapt it:
- Your own network: add it to `common.build_encoder`, under a name in `common.ARCHITECTURES`. It
  maps images [B, 3, H, W] to features [B, width] and has an attribute `width`. A linear layer to
  the map follows.
- Channels other than RGB: change `common.read_image`, which reads files, the first layer in
  `common.build_encoder`, and `load_samples`; `finish_map` draws three channels.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

import common

# Defaults that depend on the data. Flags given on the command line take precedence.
PRESETS = {
    "fashion-mini": {
        "classes": ["5", "7", "9"],  # sandals, sneakers and boots
    },
}
CONSOLE_METRICS = ("flatness", "5-NN", "rank")  # shown besides loss, chance, spread and speed
MAY_CHANGE = ("root", "workers", "out", "eval_every", "log_with")  # when a run is resumed
SAVE_MINUTES = 10  # A longer epoch also saves checkpoints midway.
RUN_FORMAT = 5  # of the files in --out; runs of another format are refused


# --------------------------------------------------------------------------------------
# Images, the graph of similar ones, and pairs
# --------------------------------------------------------------------------------------


@dataclass
class Samples:
    """The images that are mapped: N of them, each followed by its shifted copies.

    Attributes:
        x: [N * copies, C, H, W] float32 in 0..1, on the device.
        labels: [N * copies] classes, on the device.
        index: [N * copies] which image of the data set each one is.
    """

    x: Tensor
    labels: Tensor
    index: Tensor


@dataclass
class Graph:
    """Which images are similar.

    Attributes:
        partners: [N, k] the images that are similar to each of N images.
        copies: how many samples show each image, if these are similar: rows n * copies to
            n * copies + copies - 1 of the samples show image n.
        labels: [N] classes, if all images of a class are similar, or None.
    """

    partners: Tensor
    copies: int = 1
    labels: Tensor | None = None


def find_classes(wanted: list[str] | None, names: list[str]) -> list[int]:
    """The numbers of the classes that are wanted by name or number; by default all."""
    found = set()
    for name in wanted or names:
        if name in names:
            found.add(names.index(name))
        elif name.isdecimal() and int(name) < len(names):
            found.add(int(name))
        else:
            common.fail(
                f"--classes {name} is neither one of {', '.join(names)} nor the number of one"
            )
    return sorted(found)


def load_samples(
    images: common.ImageSet,
    classes: list[int],
    most: int | None,
    size: int,
    shifts: list[int],
    is_paper: bool,
) -> Samples:
    """Load images of some classes, and copies that are shifted to the right.

    Args:
        images: the data set.
        classes: the numbers of the classes.
        most: images of each class, at most; the same ones whatever the seed. None takes all.
        size: side of the images in pixels.
        shifts: how far each copy is shifted, in pixels.
        is_paper: make the images gray, in the middle of 32 x 32 pixels, for the paper's network.

    Raises:
        SystemExit: if there are fewer than two images of these classes, or too many for the memory.
    """
    labels = images.labels.clamp(min=0)  # Images without classes are all of one.
    index = torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0]
    if len(index) < 2:
        common.fail(
            f"there are only {len(index)} images of these classes in one part of the data (for "
            "training, to hold out or for testing): use other --classes, or a higher --limit or "
            "--holdout"
        )
    if most is not None:
        drawn = common.draw_per_class(labels[index], most, common.generator(0))
        index = index[drawn].sort().values
    copies = 1 + len(shifts)
    if len(index) * copies * 3 * 4 * size**2 > common.memory_limit():  # of three float32 channels
        common.fail(
            f"{len(index)} images do not fit in memory: "
            "use fewer --classes or --per-class, or a smaller --image-size"
        )

    # With the pixels themselves for features, this loads, crops and resizes the images.
    x = common.extract_features(nn.Flatten(), images.take(index), size)
    x = x.unflatten(1, (3, size, size))
    if is_paper:
        before, after = (32 - size) // 2, (33 - size) // 2
        x = F.pad(x.mean(1, keepdim=True), [before, after, before, after])
    # A shift to the right pads on the left with zeros, and crops on the right.
    x = torch.stack([F.pad(x, [shift, -shift, 0, 0]) for shift in (0, *shifts)], dim=1)
    index = index.repeat_interleave(copies)
    return Samples(x.flatten(0, 1), labels[index].to(x.device), index)


def find_nearest(queries: Tensor, bank: Tensor, k: int, exclude_self: bool = False) -> Tensor:
    """The k rows of bank [M, D] that are nearest to each of queries [Q, D], as indices [Q, k].

    If the queries are the bank, `exclude_self` keeps rows from being their own neighbors.
    """
    at_once = max(1, 2**26 // len(bank))  # at most 512 MiB of distances
    nearest = []
    for start in range(0, len(queries), at_once):
        distance = torch.cdist(queries[start : start + at_once], bank)
        if exclude_self:  # Row i of this part is row start + i of the bank.
            distance[:, start:].fill_diagonal_(torch.inf)
        nearest.append(distance.topk(k, largest=False).indices)
    return torch.cat(nearest)


def build_graph(kind: str, samples: Samples, neighbors: int, copies: int, seed: int) -> Graph:
    """Decide which images are similar (section 2.1, step 1).

    Args:
        kind: "neighbours", the nearest by pixels among all samples; "shifts", the nearest by pixels
            among the unshifted images, and all copies of both; or "labels", images of the same
            class.
        samples: the training images.
        neighbors: how many images are similar to each image.
        copies: how many samples show each image.
        seed: for choosing among the images of a class.

    Raises:
        SystemExit: if no pair would be dissimilar, or there are not as many neighbors.
    """
    similar_copies = copies if kind == "shifts" else 1
    N = len(samples.x) // similar_copies
    labels = None
    available = N - 2  # all but the image itself and one that is dissimilar
    if kind == "labels":
        labels = samples.labels.cpu()
        sizes = labels.bincount()
        sizes = sizes[sizes > 0]
        if len(sizes) < 2:
            common.fail("--graph labels needs images of at least two classes: use more --classes")
        available = sizes.min().item() - 1
        # This draws random partners within each class. Each class is a line, on which its images
        # get random places, and their partners are the nearest. Places differ by less than 1, and
        # the lines are at least 2 apart, so no image of another class is as near.
        places = torch.rand(N, generator=common.generator(seed)).double()
        features = torch.stack([2.0 * labels, places], dim=1)
    else:
        features = samples.x[::similar_copies].flatten(1)
    if neighbors > available:
        common.fail(
            f"--neighbours {neighbors} is too many: with --graph {kind} and these images, at most "
            f"{max(0, available)} are possible; use fewer, or more images"
        )

    partners = find_nearest(features, features, neighbors, exclude_self=True).cpu()
    if similar_copies > 1:  # An image's own copies are similar as well.
        partners = torch.cat([partners, torch.arange(N)[:, None]], dim=1)
    return Graph(partners, similar_copies, labels)


def count_dissimilar(similar: int, ratio: float) -> int:
    """How many dissimilar pairs are drawn for a number of similar pairs."""
    return max(1, round(ratio * similar))


def sample_pairs(
    graph: Graph, edges: Tensor, ratio: float, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of a step (section 2.1, step 2): edges of the graph, and dissimilar pairs.

    Args:
        graph: of N images with k partners each.
        edges: [B]; edge n * k + j joins image n and the j-th of its partners.
        ratio: dissimilar pairs for each edge. They are drawn among the images of the edges.
        rng: for drawing the copies and the dissimilar pairs.

    Returns:
        i [2B], the samples that are needed; pairs [B + max(1, ratio * B), 2], the positions in i of
        the two samples of each pair; and Y of each pair, 1 if it is dissimilar. There are only B
        pairs if no two images are dissimilar.
    """
    B = len(edges)
    copies = graph.copies
    a = edges // graph.partners.shape[1]
    b = graph.partners.flatten()[edges]

    # A random copy stands for each image. If both are the same image, the copies must differ: the
    # second is then 1 to copies - 1 places after the first.
    u = torch.rand(2, B, generator=rng)
    same = (a == b).long()
    copy_a = (u[0] * copies).long()
    copy_b = (copy_a + same + (u[1] * (copies - same)).long()) % copies
    i = torch.stack([a * copies + copy_a, b * copies + copy_b], dim=1).flatten()

    # Two images are similar if one is the other's partner, or they are the same.
    n = torch.stack([a, b], dim=1).flatten()  # [2B], the images that i shows
    if graph.labels is not None:
        similar = graph.labels[n][:, None] == graph.labels[n]
    else:
        similar = (graph.partners[n][:, :, None] == n).any(1) | (n[:, None] == n)
    dissimilar = (~(similar | similar.T)).triu().nonzero()  # each pair once
    pairs = torch.arange(2 * B).view(B, 2)
    if len(dissimilar):
        drawn = torch.randint(len(dissimilar), (count_dissimilar(B, ratio),), generator=rng)
        pairs = torch.cat([pairs, dissimilar[drawn]])
    Y = (torch.arange(len(pairs)) >= B).long()
    return i, pairs, Y


# --------------------------------------------------------------------------------------
# Model (section 3.1)
# --------------------------------------------------------------------------------------


def paper_network() -> nn.Module:
    """The paper's network but for its last linear layer: [B, 1, 32, 32] to [B, width].

    A convolution of 6x6 to 15 maps, subsampling by 3x3, and a convolution of 9x9 to 30 maps.
    """
    network = nn.Sequential(
        nn.Conv2d(1, 15, 6),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Conv2d(15, 30, 9),
        nn.ReLU(),
        nn.Flatten(),
    )
    network.width = 30
    return network


class FloatLinear(nn.Linear):
    """A linear layer in float32. With bfloat16, coordinates near the margin would be too coarse."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def contrastive_loss(g1: Tensor, g2: Tensor, dissimilar: Tensor, margin: float) -> Tensor:
    """Contrastive loss (Eq. 4), mean over N pairs.

    With the distance D = |g1 - g2| of a pair, and Y = 1 if it is dissimilar,

        loss = (1 - Y) / 2 * D^2 + Y / 2 * max(0, margin - D)^2

    Args:
        g1, g2: [N, dim] coordinates of both images of each pair.
        dissimilar: Y [N], 0 or 1.
        margin: m > 0, the distance that dissimilar images should have.

    Returns:
        Scalar. Its gradient is 0 where D = 0.

    Raises:
        ValueError: if the shapes do not match.
    """
    if g1.shape != g2.shape or g1.ndim != 2 or dissimilar.shape != g1.shape[:1]:
        raise ValueError(
            f"g1, g2 must be [N, dim] and dissimilar [N], got {g1.shape}, {g2.shape} and "
            f"{dissimilar.shape}"
        )
    D = torch.linalg.vector_norm(g1 - g2, dim=1)  # Its gradient at 0 is 0; that of sqrt is NaN.
    hinge = (margin - D).clamp(min=0)
    return torch.where(dissimilar == 0, D**2, hinge**2).mean() / 2  # 1/2 is in both terms


def collapsed_loss(batch_size: int, ratio: float, margin: float) -> float:
    """The loss of a map that is a single point: every dissimilar pair costs margin^2 / 2."""
    dissimilar = count_dissimilar(batch_size, ratio)
    return dissimilar / (batch_size + dissimilar) * margin**2 / 2


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
# Schedule
# --------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate at a step from 0 to steps - 1: linear warm-up to the peak, then cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# --------------------------------------------------------------------------------------
# The map
# --------------------------------------------------------------------------------------


@torch.no_grad()
def map_images(G: nn.Module, x: Tensor) -> Tensor:
    """The coordinates [N, dim] to which G maps the images x [N, C, H, W]."""
    g = torch.cat([G(part) for part in x.split(256)]).float()
    if not g.isfinite().all():
        common.fail("the map is not finite: use a lower --lr and another --out")
    return g


def copies_rank(g: Tensor, copies: int) -> float:
    """How near the shifted copies of an image lie to it.

    Args:
        g: [N * copies, dim] coordinates; the copies of an image follow it.
        copies: how many there are of each image, itself included.

    Returns:
        The median rank of the shifted copies among all other points, by their distance from the
        image. Ties count as nearer.
    """
    ranks = []
    for i in torch.arange(0, len(g), copies, device=g.device)[:, None].split(512):
        distance = torch.cdist(g[i[:, 0]], g).scatter_(1, i, torch.inf)
        for s in range(1, copies):
            own = distance.gather(1, i + s)
            ranks.append((distance <= own).sum(1))
    return torch.cat(ranks).float().quantile(0.5).item()


def measure_map(
    g_test: Tensor, test: Samples, g: Tensor, train: Samples, num_classes: int, copies: int
) -> dict:
    """The quality of a map.

    Args:
        g_test, test: coordinates [M, dim] of the test images, and the test images.
        g, train: coordinates of the training images, and the training images.
        num_classes: how many classes there are.
        copies: how many samples show each image.

    Returns:
        - "flatness", the smallest singular value of the test images' coordinates as a share of the
          largest; in the plane, 0 means that all lie on a line
        - "5-NN", if there are classes: the percentage of test images that a vote of the five
          nearest training images classifies correctly
        - "rank", if there are copies: see `copies_rank`
    """
    axes = torch.linalg.svdvals(g_test - g_test.mean(0))
    row = {"flatness": (axes[-1] / axes[0].clamp(min=1e-30)).item()}
    if num_classes > 1:
        nearest = find_nearest(g_test, g, min(5, len(g)))
        votes = F.one_hot(train.labels[nearest]).sum(1)
        row["5-NN"] = 100 * (votes.argmax(1) == test.labels).float().mean().item()
    if copies > 1:
        row["rank"] = copies_rank(g_test, copies)
    return row


def finish_map(
    args: argparse.Namespace, G: nn.Module, train: Samples, test: Samples, num_classes: int
) -> None:
    """Compare the map with PCA and with pixels, and write map.png, map.npz and results.json.

    Args:
        args: the flags.
        G: maps images to coordinates, in float32.
        train, test: the images.
        num_classes: how many classes there are.
    """
    copies = 1 + len(args.shifts)
    axes = common.principal_axes(train.x.flatten(1), args.dim, args.seed)
    maps = {
        "DrLIM": G.eval(),
        "PCA": lambda x: x.flatten(1) @ axes,
        "pixels": nn.Flatten(),
    }
    rows, places = [], {}
    for name, to_map in common.progress(maps.items(), "evaluation"):
        g, g_test = map_images(to_map, train.x), map_images(to_map, test.x)
        metrics = measure_map(g_test, test, g, train, num_classes, copies)
        if "5-NN" in metrics:
            metrics["5-NN"] = common.summarize([metrics["5-NN"]], len(test.x) // copies)
        rows.append({"features": f"{name}, {g.shape[1]}-D", **metrics})
        places[name] = g_test, g

    # The picture: up to 1,000 test images, DrLIM's map on the left and PCA's on the right.
    sample = torch.randperm(len(test.x), generator=common.generator(args.seed))[:1000]
    images = test.x[sample].expand(-1, 3, -1, -1)
    # Frames are colored by shift if there are shifted copies, and otherwise by class.
    kinds = sample % copies if copies > 1 else test.labels.cpu()[sample]
    drawn = [common.draw_map(places[name][0][sample], images, kinds) for name in ("DrLIM", "PCA")]
    common.save_pictures(args.out / "map.png", torch.stack(drawn), 2)

    arrays = {
        "coordinates": places["DrLIM"][0],
        "labels": test.labels,
        "indices": test.index,
        "train_coordinates": places["DrLIM"][1],
        "train_labels": train.labels,
        "train_indices": train.index,
    }
    common.save_arrays(args.out / "map.npz", arrays)
    common.write_results(args.out, rows, "the map of the test images; 5-NN in % [95 % interval]")


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
    """The command line, with the defaults for data without a preset."""
    parser = argparse.ArgumentParser(
        "drlim.py",
        description="Learn a map of images with DrLIM.",
        epilog="With --data fashion-mini, --classes is 5 7 9 by default: sandals, sneakers, boots.",
        formatter_class=common.HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = common.fail
    common.add_data_arguments(parser)

    add = parser.add_argument_group("model").add_argument
    add(
        "--arch",
        choices=("paper", *common.ARCHITECTURES),
        default="paper",
        help="network G without its last, linear layer",
    )
    add("--stem", choices=("3x3", "7x7"), help="first layer (default: 3x3 up to 64 pixels)")
    add("--init", help="encoder.safetensors to start G from")
    add("--dim", type=common.positive_int, default=2, help="dimensions of the map")

    add = parser.add_argument_group("method").add_argument
    add("--classes", nargs="+", help="classes to map, by name or number (default: all)")
    add(
        "--per-class",
        type=common.positive_int,
        default=3000,
        help="training images of each class, at most",
    )
    add(
        "--graph",
        choices=("neighbours", "shifts", "labels"),
        default="neighbours",
        help="which images are similar: the nearest by pixels (neighbours), the nearest by pixels "
        "and all shifted copies (shifts), or those of the same class (labels)",
    )
    add(
        "--neighbours",
        type=common.positive_int,
        default=5,
        help="number of similar images for each image",
    )
    add(
        "--shifts",
        type=int,
        nargs="+",
        help="shifts of the copies of each image, in pixels to the right (default: none; with "
        "--graph shifts -6 -3 3 6)",
    )
    add(
        "--ratio",
        type=common.positive_float,
        default=0.1,
        help="dissimilar pairs drawn for each similar pair",
    )
    add("--margin", type=common.positive_float, default=1.25, help="margin m of the loss")
    add(
        "--image-size",
        type=common.int_above_1,
        help="side of the images in pixels (default: that of the images, at most 224, or 32 with "
        "--arch paper)",
    )

    add = parser.add_argument_group("optimization").add_argument
    add(
        "--epochs",
        type=common.positive_int,
        default=15,
        help="passes over the pairs of similar images",
    )
    add(
        "--max-steps",
        type=common.positive_int,
        help="stop after this many steps; the learning rate's schedule ends there too",
    )
    add(
        "--batch-size",
        type=common.int_above_1,
        default=128,
        help="similar pairs per step, over all processes",
    )
    add("--lr", type=common.positive_float, default=0.005, help="peak learning rate of Adam")
    add(
        "--warmup-epochs",
        type=common.nonnegative_float,
        default=0.0,
        help="epochs of linear warm-up",
    )
    add(
        "--weight-decay",
        type=common.nonnegative_float,
        default=0.0,
        help="weight decay of the optimizer",
    )
    add("--seed", type=common.nonnegative_int, default=0, help="random seed of weights and pairs")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/drlim-DATA)")
    add(
        "--holdout",
        type=common.positive_int,
        help="training images of all classes to set aside; during the run, the map is measured on "
        "them instead of on the test images",
    )
    add("--eval-every", type=common.positive_int, default=5, help="epochs between evaluations")
    add(
        "--log-with",
        choices=[*map(str, get_available_trackers())],
        help="experiment tracker to report to",
    )

    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags, with the defaults for the data set that --data names."""
    parser = build_parser()
    data = parser.parse_args(argv).data
    parser.set_defaults(**PRESETS.get(data, {}))
    args = parser.parse_args(argv)
    if args.arch == "paper" and (args.init or args.stem):
        common.fail("--init and --stem cannot be used with --arch paper")
    if args.shifts is None:
        args.shifts = [-6, -3, 3, 6] if args.graph == "shifts" else []
    if args.out is None:
        args.out = Path("runs", f"drlim-{Path(args.data).absolute().name}".removesuffix(".npz"))
    return args


def choose_image_size(args: argparse.Namespace, side: int) -> int:
    """The value of --image-size; by default that of the images, `side`."""
    largest = 32 if args.arch == "paper" else 224
    size = args.image_size or min(side, largest)
    if size > largest:
        common.fail(f"--image-size {size} must be at most {largest} for this --arch")
    return size


def check_shifts(shifts: list[int], size: int) -> None:
    """Fail if a shift would leave nothing of an image."""
    if any(abs(shift) >= size for shift in shifts):
        common.fail(f"--shifts must be smaller than the side of the images, {size} pixels")


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def find_problems(row: dict) -> list[str]:
    """Return warnings about the metrics of one epoch."""
    if row["spread"] < 0.02:  # standard deviation of the map, as a share of the margin
        return ["the map collapses to a point: use a lower --lr or a higher --ratio"]
    return []


def main(argv: list[str] | None = None) -> None:  # noqa: C901, PLR0912, PLR0915
    """Learn the map, evaluate it, and leave the run in --out."""
    args = parse_arguments(argv)
    torch.backends.cudnn.benchmark = True  # All steps have the same shapes.
    accelerator = common.start_accelerator(args.log_with, args.out)
    common.check_agreement(vars(args))
    device = accelerator.device
    processes = accelerator.num_processes

    # Data: training images (the bank) and test images; without classes, all images are both. During
    # the run, the map is measured on the validation images, which are those of --holdout or else
    # the test images.
    images, bank, test_images, validation_images = common.load_splits(
        args.data, args.root, args.limit, device, args.workers, args.stream, args.holdout
    )
    bank = bank or images
    test_images = test_images or images
    validation_images = validation_images or images
    args.image_size = choose_image_size(args, bank.side)
    check_shifts(args.shifts, args.image_size)
    classes = find_classes(args.classes, list(bank.classes) or ["all"])
    is_paper = args.arch == "paper"
    train = load_samples(bank, classes, args.per_class, args.image_size, args.shifts, is_paper)
    test = load_samples(test_images, classes, None, args.image_size, args.shifts, is_paper)
    validation = test
    if validation_images is not test_images:
        validation = load_samples(
            validation_images, classes, None, args.image_size, args.shifts, is_paper
        )

    # The graph, which a resumed run builds again. Its edges are the pairs of similar images. An
    # epoch visits each of them at most once: those that do not fill a batch are left out.
    copies = 1 + len(args.shifts)
    graph = build_graph(args.graph, train, args.neighbours, copies, args.seed)
    num_edges = graph.partners.numel()
    common.check_batch_size(args.batch_size, num_edges, processes, "similar pairs")
    epoch_steps = num_edges // args.batch_size
    total_steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps - 1)
    epochs = math.ceil(total_steps / epoch_steps)

    # Model: G, an encoder and a linear layer to the map.
    args.stem = args.stem or ("3x3" if args.image_size <= 64 else "7x7")
    mean, std = common.STATISTICS["none"]  # The inputs are not normalized.
    torch.manual_seed(args.seed)
    if is_paper:
        encoder = paper_network()
    elif args.init:
        encoder = common.load_initial_encoder(args.init, args.arch, args.stem, mean, std)
    else:
        encoder = common.build_encoder(args.arch, args.stem)
    network = nn.Sequential(encoder, FloatLinear(encoder.width, args.dim)).to(device)
    if processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = torch.optim.Adam(network.parameters(), args.lr, weight_decay=args.weight_decay)
    G = nn.Sequential(*network)  # the same layers without Accelerate's autocast, to evaluate
    model, optimizer = accelerator.prepare(network, optimizer)

    # Run: start a new one, print a finished one, or resume from a checkpoint.
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"method": "drlim", "images": bank.fingerprint}
    settings |= {"test images": test_images.fingerprint}
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

    # Training.
    accelerator.init_trackers("drlim", {name: str(value) for name, value in settings.items()})
    accelerator.print(common.format_header(CONSOLE_METRICS))
    saved_at = time.monotonic()
    while step < total_steps:
        epoch = step // epoch_steps
        first_step = step
        started_at = time.monotonic()
        last_step = min((epoch + 1) * epoch_steps, total_steps)
        order = common.epoch_order(num_edges, args.seed, epoch).split(args.batch_size)
        epoch_batches = itertools.islice(order, step % epoch_steps, last_step - epoch * epoch_steps)
        bar = common.progress(epoch_batches, f"epoch {epoch + 1}/{epochs}", last_step - step)
        for batch in bar:
            lr = learning_rate(step, total_steps, warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # The pairs depend on the seed, the epoch and the step alone. Each process maps its
            # share of their images, and computes the loss (Eq. 4) of all pairs.
            rng = common.generator(args.seed, epoch, step % epoch_steps)
            drawn = sample_pairs(graph, batch, args.ratio, rng)
            i, pairs, Y = (common.to_device_of(train.x, v) for v in drawn)
            own_rows = i.chunk(processes)[accelerator.process_index]
            g = gather(model(train.x[own_rows]), accelerator)
            g1, g2 = g[pairs].unbind(1)
            loss = contrastive_loss(g1, g2, Y, args.margin)

            optimizer.zero_grad()
            accelerator.backward(loss)
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
            "chance": collapsed_loss(args.batch_size, args.ratio, args.margin),
            "spread": (g1.detach().std(0).norm() / args.margin).item(),  # of the last batch
            "lr": lr,
            "images_per_s": (step - first_step) * 2 * args.batch_size / seconds,
            "minutes_left": (total_steps - step) / (step - first_step) * seconds / 60,
        }

        # Evaluate, report and save.
        if (epoch + 1) % args.eval_every == 0 or step == total_steps:
            G.eval()
            g_train = map_images(G, train.x)
            g_validation = map_images(G, validation.x)
            row |= measure_map(g_validation, validation, g_train, train, len(classes), copies)
            G.train()
        rows.append(row)
        accelerator.print(common.format_row(row, CONSOLE_METRICS))
        for problem in find_problems(row):
            accelerator.print(f"warning: {problem}")
        accelerator.log(row, step=step)
        losses = []
        if accelerator.is_main_process:
            save_run(args.out, state())
        saved_at = time.monotonic()

    # The end of the run: export the encoder, unless it is the paper's; write and print the results.
    about = {
        "method": "drlim",
        "architecture": args.arch,
        "stem": args.stem,
        "image_size": args.image_size,
        "mean": list(mean),
        "std": list(std),
        "data": args.data,
    }
    if accelerator.is_main_process and not is_paper:
        common.save_encoder(args.out / "encoder.safetensors", encoder, **about)
    finish_map(args, G, train, test, len(classes))
    # Accelerate's end_training would also destroy the process group, to which DDP still refers.
    # `common.entry_point` does it later.
    for tracker in accelerator.trackers:
        tracker.finish()


if __name__ == "__main__":
    with common.entry_point("the same command continues from the last checkpoint"):
        main()
