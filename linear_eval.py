# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""Evaluation of an encoder: linear probes, weighted k nearest neighbours, fine-tuning.

    python linear_eval.py runs/simclr-fashion-mini/encoder.safetensors --labels 10 --seeds 5
    python linear_eval.py random --arch small --data fashion-mini --protocol finetune --labels 0.1
    accelerate launch linear_eval.py CHECKPOINT --data FOLDER --protocol linear-augmented

ENCODER is a file of these scripts, another repository's checkpoint of a ResNet, or `random`.

linear: logistic regression on the features of uncropped images, computed once. A grid of learning
rates and weight decays is trained side by side on nine tenths of the training labels; the pair that
is best on the held-out tenth is trained again on all, and meets the test set once. knn: Wu et al.
2018, §3.4. linear-augmented: a linear layer on random crops and flips, as the --recipe's authors
did it. finetune: all weights, as SimCLR's authors did (B.5), and for 500 steps at least; else the
encoder stays in eval mode, and is compared bit by bit with what it was. A seed draws the labelled
images, the held-out tenth, the batches, the layer and a random encoder. Deviations: rates fall by
step, the layer begins as torch's, crops are from .08 of the area.

Into --out (the encoder's folder) go eval.json, to which every evaluation adds its result, and
neighbours.png: test images (left) and the nearest training images, framed green or red by class.
"""

import argparse
import copy
import itertools
import json
import math
import os
import sys
from collections import Counter, namedtuple
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torchvision.transforms.v2 import Normalize

import common
from common import ImageSet, RandomResizedCrop, fail

STATISTICS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # mean and deviation
              "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), "none": ()}
RESNETS = (*common.ARCHITECTURES[1:], "resnet101", "resnet152", "wide_resnet50_2")
CACHED = ("linear", "knn")  # protocols that see every image once
TWINS = ("encoder_k", "momentum", "target", "student")  # which their authors do not evaluate


# SGD, momentum .9; the rate, for this batch, falls by factor at drops, else as half a cosine.
Recipe = namedtuple("Recipe", "lr batch_size epochs weight_decay nesterov factor drops",
                    defaults=(0.0, False, 1.0, ()))
RECIPES = {"moco": Recipe(30, 256, 100, factor=0.1, drops=(0.6, 0.8)),
           "swav": Recipe(0.3, 256, 100, weight_decay=1e-6),
           "simclr": Recipe(0.1, 256, 90, nesterov=True),
           "supcon": Recipe(5, 512, 100, factor=0.2, drops=(0.6, 0.75, 0.9))}
FINETUNE = Recipe(0.05, 256, 30, nesterov=True)

# ----------------------------------------------------------------------------- arguments
def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the data."""
    p = argparse.ArgumentParser("linear_eval.py", description=__doc__.splitlines()[0],
                                allow_abbrev=False)
    p.error = fail

    def flag(name: str, help: str, default: object = None, **more: object) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        p.add_argument(name, help=help + shown, default=default, **more)
    flag("encoder", help="an encoder.safetensors of these scripts, a foreign checkpoint, or random")
    flag("--protocol", choices=(*CACHED, "linear-augmented", "finetune"), default="linear",
         help="how it is evaluated")
    flag("--recipe", choices=RECIPES, help="of linear-augmented (default: the encoder's or simclr)")
    flag("--data", help=f"{', '.join(common.SETS)} or a folder (default: what it was trained on)")
    flag("--root", default="data", help="folder where torchvision's sets are or will be put")
    flag("--limit", type=int, help="use the first so many training images of a fixed shuffle")
    flag("--stream", action="store_true", help="read image files anew each time, as if too many")
    flag("--image-size", type=int, help="side of the images in pixels (default: as in training)")
    flag("--normalize", choices=STATISTICS, help="input statistics (foreign files: imagenet)")
    flag("--arch", choices=common.ARCHITECTURES, default="resnet18", help="the random encoder's")
    flag("--stem", choices=("3x3", "7x7"), help="the random encoder's (default: by the size)")
    flag("--labels", type=float, help="labelled images a class, below 1 a share (default: all)")
    flag("--seeds", type=int, help="runs, with the seeds from 0 on (default: 3, on crops 1)")
    flag("--epochs", type=int, help="passes over the crops (default: the recipe's)")
    flag("--lr", type=float, help="first rate on the crops (default: the recipe's, by the batch)")
    flag("--batch-size", type=int, help="images a step, over all processes (default: the recipe's)")
    flag("--knn-k", type=int, default=20, help="neighbours of the kNN protocol")
    flag("--knn-temperature", type=float, default=0.07, help="temperature of the kNN's votes")
    flag("--workers", type=int, help="readers of files, of each process (default: cores, to 16)")
    flag("--features", type=Path, help="write the features to this .npz file (linear and knn)")
    flag("--out", type=Path, help="folder of the results (default: the encoder's)")
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        part = name == "labels" and value and value > 1 and value % 1
        if isinstance(value, int | float) and (not 0 < value < math.inf or part):
            fail(f"--{name.replace('_', '-')} {value} is out of range")
    file = args.features
    if file and (args.protocol not in CACHED or file.exists() or not file.parent.is_dir()):
        fail(f"--features {file}: of linear or knn, a new name in a folder that exists")
    return args

# ------------------------------------------------------------------------------ encoders
def flatten(tree: object, *path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by path, without the parts that DDP and torch.compile put in."""
    if isinstance(tree, Tensor):
        yield ".".join(v for v in path if v not in ("module", "_orig_mod")), tree
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from flatten(value, *path, *str(key).split("."))


def open_encoder(path: str) -> tuple[nn.Module, dict[str, str], str]:
    """The encoder of a file of these scripts and its metadata; or the ResNet of another checkpoint,
    and a line on what of the file was used and what was not. Neither: fail()."""
    try:
        if path.endswith(".safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                if "architecture" in (file.metadata() or {}):
                    return *common.load_encoder(path), ""
            tree = safetensors.torch.load_file(path)
        else:  # a Namespace is how many keep their flags; it holds no code
            with torch.serialization.safe_globals([argparse.Namespace]):
                tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files lead to nearly everything
        code = str(error).partition("GLOBAL ")[2].split()
        why = f"it holds {code[0]}, code" if code else str(error).partition("Weights only load")[0]
        fail(f"{path} is not loaded ({why[:200] or 'no tensors'}): take a checkpoint of tensors")
    if {"model", "optimizer", "rows"} <= set(tree if isinstance(tree, dict) else ()):
        fail(f"{path} is the state of a run: take encoder.safetensors, which its end writes beside")
    found = dict(flatten(tree))
    stems = [k for k, v in found.items() if k.endswith("conv1.weight") and v.shape[1:2] == (3,)]
    stems.sort(key=lambda k: any(v in k for v in TWINS))
    fits = []
    for first, architecture, stem in itertools.product(stems or [""], RESNETS, ("7x7", "3x3")):
        prefix = first.removesuffix("conv1.weight")
        weights = {k.removeprefix(prefix).replace("shortcut.", "downsample."): v  # SupContrast's
                   for k, v in found.items() if k.startswith(prefix)}
        with torch.device("meta"):
            wanted = common.build_encoder(architecture, stem).state_dict()
        off = [k for k, v in wanted.items() if "num_batches" not in k
               and (k not in weights or weights[k].shape != v.shape)]
        off += [k for k in weights if k.startswith("layer") and k not in wanted]
        fits.append((len(off), architecture, stem, off, wanted, prefix, weights))
    n, architecture, stem, off, wanted, prefix, weights = min(fits, key=lambda fit: fit[0])
    if n:
        fail(f"{path}: {', '.join([*found][:3]) or 'nothing'} and so on is no ResNet known here; "
             f"for {architecture}, {stem} stem, {n} tensors are not as {off[0]} should be")
    encoder = common.build_encoder(architecture, stem)
    encoder.load_state_dict({k: v for k, v in weights.items() if k in wanted}, strict=False)
    unused = Counter(".".join(k.split(".")[:2]) for k in found if not k.startswith(prefix))
    unused.update(prefix + k.split(".")[0] for k in weights if k not in wanted)
    return encoder, {}, f"{architecture}, {stem} stem, from {prefix or 'the top'}; not used: " + (
        ", ".join(f"{k} ({n})" for k, n in unused.items()) or "nothing")

# ----------------------------------------------------------------------------- protocols
def train(encoder: nn.Module, data: ImageSet, classes: int, size: int, recipe: Recipe, frozen: bool,
          seed: int, accelerator: Accelerator) -> nn.Module:
    """The encoder (as it is if `frozen`) and a new linear layer, trained on crops. On CPUs, without
    synchronised BN, each process trains all of it on the whole batch: exact, and no faster."""
    device, processes = accelerator.device, accelerator.num_processes
    torch.manual_seed(seed)
    net = nn.Sequential(encoder, nn.Linear(encoder[1].width, classes)).to(device)
    fixed, model = (encoder, net[1]) if frozen else (nn.Identity(), net)
    shared = not frozen and processes > 1 and device.type == "cuda"
    if shared:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        model = accelerator.prepare(net)
    fixed.eval()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, 0.9, nesterov=recipe.nesterov,
                                weight_decay=recipe.weight_decay)
    batch, crops = recipe.batch_size, [(1, [RandomResizedCrop(size)])]
    steps = recipe.epochs * (len(data) // batch)
    drops = [round(v * steps) for v in recipe.drops]
    scheduler = (lr_scheduler.MultiStepLR(optimizer, drops, recipe.factor) if drops
                 else lr_scheduler.CosineAnnealingLR(optimizer, steps))
    bar = tqdm(common.batches(data, crops, batch, seed, 0, steps), f"seed {seed}", steps,
               disable=not sys.stderr.isatty())
    for _, index, (x,) in bar:
        with torch.no_grad(), accelerator.autocast():
            x = fixed(x[0].contiguous(memory_format=torch.channels_last)).float()
        y = data.labels[index].to(device)
        if not shared:
            x, y = accelerator.gather((x, y))
        with accelerator.autocast():
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return net


def draw_neighbours(path: Path, features: Sequence[Tensor], sets: Sequence[ImageSet]) -> None:
    """A row for each of ten test images: itself and its eight nearest training images."""
    (h, h_test), (bank, test) = features, sets
    queries, side = torch.randperm(len(test), generator=common.generator(0))[:10], bank.side
    near = F.normalize(h_test[queries], dim=1) @ F.normalize(h, dim=1).T
    near = near.topk(min(8, len(bank)), dim=1).indices.cpu()
    shown = bank.centres(near.flatten(), side).unflatten(0, near.shape)
    shown = torch.cat([test.centres(queries, side)[:, None], shown], 1).flatten(0, 1)
    other = bank.labels[near] != test.labels[queries, None]
    colours = torch.tensor([[1, 1, 1], [0.1, 0.7, 0.2], [0.9, 0.1, 0.1]])  # white, green, red
    frame = -(-side // 20)
    framed = colours[F.pad(other + 1, (1, 0)).flatten()][:, :, None, None].repeat(
        1, 1, side + 2 * frame, side + 2 * frame)
    framed[:, :, frame:-frame, frame:-frame] = shown.cpu()
    common.save_pictures(path, framed, 1 + near.shape[1])

# ---------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate args.encoder, print the table and add the result to eval.json."""
    args = parse_arguments(argv)
    accelerator = Accelerator()
    device, processes, say = accelerator.device, accelerator.num_processes, accelerator.print
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() // processes or 1)  # accelerate launch: one
    cached, untrained, about, said = args.protocol in CACHED, args.encoder == "random", {}, ""
    if not untrained:
        encoder, about, said = open_encoder(args.encoder)
    data = args.data or about.get("data", "" if said else "fashion-mini")
    _, bank, test = common.load_splits(
        data, args.root, args.limit, device, args.workers, args.stream)
    if not bank:
        fail(f"--data {data} has no classes: take a set, or a folder with train and val or test")
    labels, classes = bank.labels, int(bank.labels.max()) + 1
    size = args.image_size or int(about.get("image_size", bank.side))
    stem = args.stem or ("3x3" if size <= 64 else "7x7")
    statistics = args.normalize or ("imagenet" if said else "none")
    if said:
        say(f"{args.encoder}: {said}; --normalize {statistics}")
    if args.labels and args.labels > (least := int(labels.bincount().min())):
        fail(f"--labels {args.labels}: a class has only {least} images")
    draws = [common.some_of_each(labels, args.labels, common.generator(seed)) if args.labels else
             torch.arange(len(bank)) for seed in range(args.seeds or 1 + 2 * cached)]
    used = len(draws[0])
    if used < (needed := args.knn_k if args.protocol == "knn" else 2):
        fail(f"{needed} labelled images (--knn-k, or 2) are needed; --limit, --labels leave {used}")
    name = next(v for v in (args.recipe, about.get("method"), "simclr") if v in RECIPES)
    recipe = FINETUNE if args.protocol == "finetune" else RECIPES[name]
    batch, epochs = min(used, args.batch_size or recipe.batch_size), recipe.epochs
    if recipe is FINETUNE:  # twice as long with few labels, and on a handful 500 steps
        epochs = max(epochs * (1 + (used < 0.05 * len(bank))), -(-500 // (used // batch)))
    recipe = recipe._replace(lr=args.lr or recipe.lr * batch / recipe.batch_size,
                             batch_size=batch, epochs=args.epochs or epochs)
    how = {"knn": f"kNN, k = {args.knn_k}, T = {args.knn_temperature}",
           "linear-augmented": f"linear-augmented, {name}"}.get(args.protocol, args.protocol)
    how += "" if cached else f", rate {recipe.lr:.4g}, {recipe.epochs} epochs of {batch}"
    how += f", {args.labels:g} labels a class" if args.labels else ", all labels"
    if not cached and (batch < 2 or batch % processes):
        fail(f"--batch-size: {batch} images a step are less than 2 or no multiple of {processes}")
    per = max(1, (args.batch_size or 256 * processes) // processes)  # images a forward pass
    out = args.out or (Path("runs", f"random-{args.arch}-{Path(data).name}") if untrained
                       else Path(args.encoder).parent)
    record = out / "eval.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        record.with_name(".partial-eval.json").touch()  # it can be written
        list.copy(json.loads(record.read_text()) if record.exists() else [])
    except (OSError, ValueError, TypeError) as error:  # the last: it holds no list
        fail(f"{record} cannot be used ({error}): take another --out")
    rows, hits = [], []
    for seed, index in enumerate(draws):
        if untrained:
            torch.manual_seed(seed)
            encoder = common.build_encoder(args.arch, stem)
        row, y, fresh = {"seed": seed}, labels[index], untrained or seed == 0
        if fresh:
            before = Normalize(*STATISTICS[statistics]) if statistics != "none" else nn.Identity()
            encoder = nn.Sequential(before, encoder).to(device, memory_format=torch.channels_last)
        state = {k: v.clone() for k, v in encoder.state_dict().items()}
        if cached and fresh:
            h, h_test = (common.extract_features(encoder, v, size, per) for v in (bank, test))
        if args.protocol == "knn":
            scores = common.knn_predict(
                h[index], y, h_test, args.knn_k, args.knn_temperature, classes)
        elif args.protocol == "linear":
            scores, chosen = common.linear_probe(h[index], y, h_test, classes, seed)
            row |= {k: f"{v:g}" for k, v in chosen.items()}
        else:
            frozen = args.protocol == "linear-augmented"
            net = train(encoder if frozen else copy.deepcopy(encoder), bank.take(index) if
                        args.labels else bank, classes, size, recipe, frozen, seed, accelerator)
            scores = common.extract_features(net, test, size, per)
        if moved := [k for k, v in encoder.state_dict().items() if not torch.equal(v, state[k])]:
            raise RuntimeError(f"the evaluation changed the frozen encoder: {moved}")
        if not scores.isfinite().all():
            fail(f"seed {seed}: scores are not finite: take a lower --lr, or another encoder")
        row["top-1"], row["top-5"] = (common.accuracy(scores, test.labels, k) for k in (1, 5))
        hits.append(scores.argmax(1).cpu() == test.labels)
        rows.append(row)
    top = torch.tensor([[row["top-1"], row["top-5"]] for row in rows])
    mean, std = top.mean(0).tolist(), top.std(0, correction=min(1, len(top) - 1)).tolist()
    say(f"{common.table(rows)}\n{data}, {how}, {len(rows)} seeds: "
        f"top-1 {mean[0]:.2f} ± {std[0]:.2f} %, top-5 {mean[1]:.2f} ± {std[1]:.2f} %")
    if cached:
        draw_neighbours(out / "neighbours.png", (h, h_test), (bank, test))
    if not accelerator.is_main_process:
        return
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items() if v}
    settings |= {"data": data, "image_size": size, "normalize": statistics}
    right = 100 * torch.stack(hits).float().mean(0)
    per_class = {c: right[test.labels == i].mean().item() for i, c in enumerate(bank.classes)}
    result = {"how": how, "settings": settings, "torch": version("torch"), "top-1": mean[0],
              "top-1 std": std[0], "top-5": mean[1], "top-5 std": std[1], "per-class": per_class}
    results = json.loads(record.read_text()) if record.exists() else []  # now with others' too
    with common.written_aside(record) as aside:
        aside.write_text(json.dumps([*results, result | {"runs": rows}], indent=1))
    say(f"wrote {record}")
    if args.features:
        with common.written_aside(args.features) as aside, aside.open("wb") as file:
            np.savez(file, train=h.cpu(), train_labels=labels, test=h_test.cpu(),
                     test_labels=test.labels)


if __name__ == "__main__":
    main()
