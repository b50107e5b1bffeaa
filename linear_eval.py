# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""Evaluation of a frozen encoder: a linear probe or weighted k nearest neighbours.

    python linear_eval.py runs/simclr-fashion-mini/encoder.safetensors
    python linear_eval.py runs/simclr-fashion-mini/encoder.safetensors --labels 10 --seeds 5
    python linear_eval.py random --arch small --data fashion-mini --protocol knn
    accelerate launch linear_eval.py ENCODER --data FOLDER --protocol knn --knn-k 200

linear: multinomial logistic regression on the features of uncropped images, computed once. A grid
of learning rates and weight decays is trained side by side on nine tenths of the training labels;
the pair that is best on the held-out tenth is trained again on all of them and meets the test set
once. A seed draws the held-out tenth, the batches, with --labels the labelled images, and with the
encoder "random" its weights. knn: Wu et al. 2018, §3.4, https://arxiv.org/abs/1805.01978; without
--labels it has nothing random.

The encoder stays in eval mode and is compared, bit by bit, with what it was before. Into --out (the
encoder's folder) go eval.json, to which every evaluation adds its result, and neighbours.png: test
images (left) and the nearest training images, framed green where the class is the same, else red.

Deviation: the papers train with crops and flips for 90 or 100 epochs, at one rate. On cached
features a grid costs less than one such run, and needs no knowledge of the method.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import common
from common import ImageSet, fail


# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("linear_eval.py", description=__doc__.splitlines()[0],
                                allow_abbrev=False)
    p.error = fail

    def flag(name: str, help: str, default: object = None, **more: object) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        p.add_argument(name, help=help + shown, default=default, **more)
    flag("encoder", help="an encoder.safetensors of these scripts, or random")
    flag("--protocol", choices=("linear", "knn"), default="linear", help="how it is evaluated")
    flag("--data", help=f"{', '.join(common.SETS)} or a folder (default: what it was trained on)")
    flag("--root", default="data", help="folder where torchvision's sets are or will be put")
    flag("--limit", type=int, help="use the first so many training images of a fixed shuffle")
    flag("--image-size", type=int, help="side of the images in pixels (default: as in training)")
    flag("--arch", choices=common.ARCHITECTURES, default="resnet18", help="the random encoder's")
    flag("--stem", choices=("3x3", "7x7"), help="the random encoder's (default: by the size)")
    flag("--labels", type=int, help="labelled training images a class (default: all)")
    flag("--seeds", type=int, default=3, help="number of repetitions, with the seeds 0, 1 and on")
    flag("--knn-k", type=int, default=20, help="neighbours of the kNN protocol")
    flag("--knn-temperature", type=float, default=0.07, help="temperature of the kNN's votes")
    flag("--batch-size", type=int, default=512, help="images a forward pass, of each process")
    flag("--workers", type=int, default=os.cpu_count(), help="threads that decode image files")
    flag("--features", type=Path, help="write the features to this .npz file as well")
    flag("--out", type=Path, help="folder of the results (default: the encoder's)")
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')} {value} is out of range")
    if args.features and (args.features.exists() or not args.features.parent.is_dir()):
        fail(f"--features {args.features}: take a new name, in a folder that exists")
    return args


# ------------------------------------------------------------------------------ features
def frozen_features(
    encoder: nn.Module, sets: Sequence[ImageSet], size: int, batch_size: int
) -> list[Tensor]:
    """h [N, D] of each set; RuntimeError if that changed a weight or a buffer."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = [common.extract_features(encoder, images, size, batch_size) for images in sets]
    for name, value in encoder.state_dict().items():
        if not torch.equal(value, before[name]):
            raise RuntimeError(f"the evaluation changed {name} of the frozen encoder")
    return features


def draw_neighbours(path: Path, features: Sequence[Tensor], sets: Sequence[ImageSet]) -> None:
    """A row for each of ten test images: itself and its eight nearest training images."""
    (h, h_test), (bank, test) = features, sets
    queries = torch.randperm(len(test), generator=common.generator(0))[:10]
    near = F.normalize(h_test[queries], dim=1) @ F.normalize(h, dim=1).T
    near = near.topk(min(8, len(bank)), dim=1).indices.cpu()
    side = min(bank.images.shape[2:])
    white, green, red = torch.tensor([[1, 1, 1], [0.1, 0.7, 0.2], [0.9, 0.1, 0.1]])
    rows, colours = [], []
    for query, found in zip(queries, near, strict=True):
        rows += [test.centres(query[None], side), bank.centres(found, side)]
        same = bank.labels[found] == test.labels[query]
        colours += [white[None], torch.where(same[:, None], green, red)]
    frame = -(-side // 20)
    framed = torch.cat(colours)[:, :, None, None].repeat(1, 1, side + 2 * frame, side + 2 * frame)
    framed[:, :, frame:-frame, frame:-frame] = torch.cat(rows).cpu()
    common.save_pictures(path, framed, 1 + near.shape[1])


# ---------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate args.encoder, print the table and add the result to eval.json."""
    args = parse_arguments(argv)
    accelerator = Accelerator()
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    one_of_many = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if int(os.environ.get("WORLD_SIZE", 1 + one_of_many)) > processes:
        fail("Accelerate runs one process, not several; CPU: ACCELERATE_USE_CPU=true torchrun ...")
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() // processes or 1)  # accelerate launch: one

    untrained, about = args.encoder == "random", {}
    if not untrained:
        encoder, about = common.load_encoder(args.encoder)
    data = args.data or about.get("data", "fashion-mini")
    splits = common.load_splits(data, args.root, args.limit, device, args.workers)
    sets = bank, test = splits[1:]
    labels, classes = bank.labels, int(bank.labels.max()) + 1
    size = args.image_size or int(about.get("image_size", min(bank.images.shape[2:])))
    stem = args.stem or ("3x3" if size <= 64 else "7x7")
    if args.labels and args.labels > labels.bincount().min():
        fail(f"--labels {args.labels}: a class has only {labels.bincount().min()} images")
    used = args.labels * classes if args.labels else len(bank)
    if args.protocol == "knn" and args.knn_k > used:
        fail(f"--knn-k {args.knn_k} is more than the {used} labelled images")
    if args.protocol == "linear" and used < 2:
        fail("--limit: a linear probe needs at least 2 labelled images")
    name = f"random-{args.arch}-{Path(data).name}"
    out = args.out or (Path("runs", name) if untrained else Path(args.encoder).parent)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").touch()
        results = json.loads((out / "eval.json").read_text() or "[]")
        if not isinstance(results, list):
            raise ValueError("it holds no list of results")
    except (OSError, ValueError) as error:
        fail(f"{out}/eval.json cannot be used ({error}): take another --out")

    rows = []
    for seed in range(args.seeds):
        if untrained:
            torch.manual_seed(seed)
            encoder = common.build_encoder(args.arch, stem)
        if untrained or seed == 0:
            encoder = encoder.to(device, memory_format=torch.channels_last)
            h, h_test = frozen_features(encoder, sets, size, args.batch_size)
        index = torch.arange(len(bank))
        if args.labels:
            index = common.some_of_each(labels, args.labels, common.generator(seed))
        if args.protocol == "knn":
            scores = common.knn_predict(
                h[index], labels[index], h_test, args.knn_k, args.knn_temperature, classes)
            row = {"seed": seed}
        else:
            scores, chosen = common.linear_probe(h[index], labels[index], h_test, classes, seed)
            row = {"seed": seed} | {k: f"{v:g}" for k, v in chosen.items()}
        row["top-1"], row["top-5"] = (common.accuracy(scores, test.labels, k) for k in (1, 5))
        rows.append(row)
    say(common.table(rows))
    top = torch.tensor([[row["top-1"], row["top-5"]] for row in rows])
    mean, std = top.mean(0).tolist(), top.std(0, correction=min(1, len(top) - 1)).tolist()
    how = f"k = {args.knn_k}, T = {args.knn_temperature}" if args.protocol == "knn" else "linear"
    say(f"{data}, {how}, {args.labels or 'all'} labels a class, {args.seeds} seeds: "
        f"top-1 {mean[0]:.2f} ± {std[0]:.2f} %, top-5 {mean[1]:.2f} ± {std[1]:.2f} %")
    if not accelerator.is_main_process:
        return
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items() if v}
    result = {"settings": settings | {"data": data, "image_size": size, "torch": version("torch")}}
    result |= {"top-1": mean[0], "top-1 std": std[0], "top-5": mean[1], "top-5 std": std[1]}
    results = json.loads((out / "eval.json").read_text() or "[]")  # others may have added theirs
    with common.written_aside(out / "eval.json") as aside:
        aside.write_text(json.dumps([*results, result | {"runs": rows}], indent=1))
    draw_neighbours(out / "neighbours.png", (h, h_test), sets)
    say(f"wrote {out}/eval.json and {out}/neighbours.png")
    if args.features:
        arrays = {"train": h, "train_labels": labels, "test": h_test, "test_labels": test.labels}
        with common.written_aside(args.features) as aside, aside.open("wb") as file:
            np.savez(file, **{k: v.cpu().numpy() for k, v in arrays.items()})
        say(f"wrote {args.features}: h and labels of the training and the test images")


if __name__ == "__main__":
    main()
