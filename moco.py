# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning.

He, Fan, Wu, Xie and Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722 (v1)
Chen, Fan, Girshick and He 2020, https://arxiv.org/abs/2003.04297 (v2, the default)

    python moco.py                                      # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 moco.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 moco.py --data FOLDER --arch resnet50

Type the same command again to continue an interrupted run.

Where to find the parts of the papers:
- Algorithm 1: the inner loop of `main`
- Eq. 1, InfoNCE: `info_nce`
- Eq. 2, the momentum update: `update_key_encoder`
- section 3.2, the queue: `enqueue`; section 3.3, shuffled batch norm: `encode_keys`
- v2, the default: an MLP head, blur and a cosine schedule. v1: --head-layers 1 --schedule steps
  --temperature 0.07 --augment crop color gray

Differences from the papers and the authors' code:
- The keys are encoded in 8 groups, as if each were on a GPU of its own, so that shuffled batch norm
  also works on one GPU. The queries of a process are one group.
- The settings of v1 have v2's color jitter, too.
- The defaults depend on the images (`PRESETS`).

The authors' ImageNet (they report 67.5 % linear for v2): --data FOLDER --arch resnet50
Their demo on CIFAR-10 (82.6 % kNN): --data cifar10 --epochs 200
"""

import copy
import math
import time

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, Grayscale, RandomApply, RandomResizedCrop

# Defaults by the kind of images: the bundled ones, those of up to 64 pixels, and larger ones.
PRESETS = {
    "fashion-mini": {
        "arch": "small",
        "epochs": 54,
        "batch_size": 256,
        "optimizer": "adamw",
        "warmup_epochs": 2.0,
        "lr": 0.006,
        "augment": ["crop", "color", "gray"],
        "color_strength": 1.0,
        "key_momentum": 0.99,
        "temperature": 0.07,
        "queue_size": 1024,
        "hidden": 512,
    },
    "small": {
        "warmup_epochs": 0.0,
        "weight_decay": 5e-4,
        "augment": ["crop", "color", "gray"],
        "crop_scale": 0.08,
        "key_momentum": 0.99,
        "temperature": 0.1,
    },
    "large": {"batch_size": 256, "epochs": 200, "warmup_epochs": 0.0},
}
OPERATIONS = ["crop", "color", "gray", "blur"]
PEAK_LR = {"sgd": 0.03, "adamw": 0.0003}  # at batch size 256


def augmentation(
    names: list[str], size: int, crop_scale: float, strength: float, gray: float = 0.2
) -> list:
    """The operations that make one view (section 3.3; v2), for `common.batches`.

    Args:
        names: which of OPERATIONS to use. Without crop, views show the whole image.
        size: side of the views, in pixels.
        crop_scale: area of the smallest crop, as a share of the image's area.
        strength: strength s of the color jitter.
        gray: probability of a gray view.
    """
    scale = (crop_scale, 1.0) if "crop" in names else (1.0, 1.0)
    jitter = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, min(0.2 * strength, 0.5))
    operations = [RandomResizedCrop(size, scale)]  # and a flip
    if "color" in names:
        operations.append(RandomApply(jitter, p=0.8))
    if "gray" in names:
        operations.append(RandomApply(Grayscale(), p=gray))
    if "blur" in names:  # by an odd kernel, about a tenth of the side
        operations.append(RandomApply(GaussianBlur(size // 10 | 1, sigma=(0.1, 2.0)), p=0.5))
    return operations


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss (Eq. 1), mean over N queries.

        loss of n = -log( exp(q[n]·k[n] / tau) / (exp(q[n]·k[n] / tau) + negatives of n) )
        negatives of n = sum over the queue's keys of exp(q[n]·key / tau)

    Args:
        q, k: [N, D] queries and their keys, of unit length.
        queue: [K, D] negative keys, of unit length.
        temperature: tau > 0.

    Returns:
        Scalar; ln(K + 1) if all similarities are equal.
    """
    l_pos = (q * k).sum(1, keepdim=True)
    l_neg = q @ queue.T
    logits = torch.cat([l_pos, l_neg], dim=1) / temperature
    positives = torch.zeros(len(q), dtype=torch.long, device=q.device)  # column 0
    # Cross-entropy is -l_pos / tau + log(sum over a row of exp(logits)), and this sum is the
    # denominator of Eq. 1.
    return F.cross_entropy(logits, positives)


@torch.no_grad()
def update_key_encoder(f_k: nn.Module, f_q: nn.Module, m: float) -> None:
    """Momentum update (Eq. 2) of all parameters: key = m * key + (1 - m) * query."""
    for key, query in zip(f_k.parameters(), f_q.parameters(), strict=True):
        key.lerp_(query, 1 - m)


@torch.no_grad()
def encode_keys(
    f_k: nn.Module, x: Tensor, groups: int, rng: torch.Generator, accelerator: Accelerator
) -> Tensor:
    """The keys [P * n, D], of unit length, of the images x [n, 3, S, S] of all P processes.

    The images of all processes are shuffled, and each process encodes its share in `groups` groups.
    The statistics of batch norm in a key's group then tell little about those of its query;
    otherwise the two could be matched by them (section 3.3). rng is the same on all processes.
    """
    x = accelerator.gather(x)
    order = common.to_device_of(x, torch.randperm(len(x), generator=rng))
    own = order.chunk(accelerator.num_processes)[accelerator.process_index]
    x = x[own].contiguous(memory_format=torch.channels_last)
    k = accelerator.gather(torch.cat([f_k(group) for group in x.tensor_split(groups)]).float())
    return F.normalize(k[order.argsort()], dim=1)


def enqueue(queue: Tensor, k: Tensor, step: int) -> None:
    """Write the keys k [n, D] of a step over the oldest ones in the queue [K, D].

    The queue is a ring: counted from the start of the run, key number i is in row i mod K.
    """
    number = step * len(k) + torch.arange(len(k), device=k.device)
    queue[number % len(queue)] = k


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names."""
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, warmup: int, peak: float, schedule: str) -> float:
    """Learning rate at a step: linear warm-up, then a cosine to 0 or steps by a tenth (v1)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "steps":
        return peak * 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main(argv: list[str] | None = None) -> None:
    """Pretrain, evaluate, and leave the run in --out."""
    parser = common.build_parser("Pretrain an image encoder with MoCo.", PRESETS)
    add = parser.add_argument_group("MoCo").add_argument
    add("--augment", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="what makes a view")
    add("--crop-scale", type=common.share, default=0.2, help="area of the smallest crop")
    add("--color-strength", type=common.not_negative, default=0.5, help="strength s of the jitter")
    add("--head-layers", type=int, choices=(1, 2), default=2, help="layers of the head g")
    add("--hidden", type=common.count, help="width of its inner layers (default: the encoder's)")
    add("--dim", type=common.count, default=128, help="dimensions of q and k")
    add("--temperature", type=common.positive, default=0.2, help="temperature tau of InfoNCE")
    add("--key-momentum", type=common.share, default=0.999, help="m of the momentum update")
    add("--queue-size", type=common.count, help="keys in the queue, K (default: by the set)")
    add("--key-groups", type=common.count, default=8, help="groups of keys, of at least 8 images")
    add("--schedule", choices=("cosine", "steps"), default="cosine", help="of the learning rate")
    add("--optimizer", choices=PEAK_LR, default="sgd", help="what updates the weights")
    args = parser.parse_args(argv)

    accelerator = common.start(args.log_with)
    device = accelerator.device
    # The images to train on; those of them that have labels, for kNN; and the test images.
    images, bank, test = common.load_splits(args.data, args.root, args.limit, device, args.workers)
    # Flags that are not given take the defaults for such images.
    args = common.parse_for(images, parser, PRESETS, argv)

    if args.queue_size is None:  # the demo's or the paper's, but at most a tenth of the images
        most = 4096 if args.image_size <= 64 else 65536
        args.queue_size = max(args.batch_size, min(most, len(images) // 10))
    if args.batch_size > args.queue_size:
        common.fail(f"--queue-size {args.queue_size} is less than the keys of a step")

    # f_q is an encoder with a head. f_k starts as a copy of it, and gets no gradient.
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem, args.init)
    hidden = [args.hidden or encoder.width] * (args.head_layers - 1)
    head = torchvision.ops.MLP(encoder.width, [*hidden, args.dim])
    f_q = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    f_k = copy.deepcopy(f_q).requires_grad_(False)
    rng = common.generator(args.seed)
    queue = F.normalize(torch.randn(args.queue_size, args.dim, generator=rng), dim=1).to(device)
    peak_lr = args.lr or PEAK_LR[args.optimizer] * args.batch_size / 256
    optimizer = build_optimizer(args.optimizer, f_q.parameters(), peak_lr, args.weight_decay)
    model, optimizer = accelerator.prepare(f_q, optimizer)
    key_model = accelerator.prepare_model(f_k, evaluation_mode=True)  # no DDP, but in train mode
    own_images = args.batch_size // accelerator.num_processes
    groups = max(1, min(args.key_groups // accelerator.num_processes, own_images // 8))

    rows = []  # the metrics of all epochs
    saved = common.load_run(args, images)
    if saved:
        f_q.load_state_dict(saved["f_q"])
        f_k.load_state_dict(saved["f_k"])
        queue.copy_(saved["queue"])
        optimizer.load_state_dict(saved["optimizer"])
        rows = saved["rows"]

    epoch_steps = len(images) // args.batch_size
    total_steps = args.epochs * epoch_steps
    warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps // 2)
    recipe = augmentation(args.augment, args.image_size, args.crop_scale, args.color_strength)
    # The images and views of a step depend only on the seed and the step, not on the number of
    # processes or on where the run was interrupted.
    steps = range(len(rows) * epoch_steps, total_steps)
    batches = common.batches(images, [(2, recipe)], args.batch_size, args.seed, steps)
    common.start_trackers(accelerator, "moco", args)

    saved_at = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        began = time.monotonic()
        loss_sum = torch.zeros((), device=device)
        epoch_range = range(epoch * epoch_steps, (epoch + 1) * epoch_steps)
        for step in common.progress(epoch_range, f"epoch {epoch + 1}/{args.epochs}"):
            index, (views,) = next(batches)  # [2, B, 3, S, S], of this process's B images
            if step == 0:
                common.save_views(args.out / "views.png", images, index, [views])
            lr = learning_rate(step, total_steps, warmup_steps, peak_lr, args.schedule)
            optimizer.param_groups[0]["lr"] = lr

            # Algorithm 1. Every process has the whole queue, into which go the keys of all; the
            # positives of its queries are its own part of them.
            x_q, x_k = views
            update_key_encoder(f_k, f_q, args.key_momentum)
            shuffle_rng = common.generator(args.seed, epoch, step, 1)  # not that of the views
            k = encode_keys(key_model, x_k, groups, shuffle_rng, accelerator)
            q = model(x_q.contiguous(memory_format=torch.channels_last)).float()
            q = F.normalize(q, dim=1)
            own_k = k.chunk(accelerator.num_processes)[accelerator.process_index]
            loss = info_nce(q, own_k, queue, args.temperature)

            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            enqueue(queue, k, step)
            loss_sum += loss.detach()

        row = {
            "epoch": epoch + 1,
            "loss": accelerator.reduce(loss_sum, "mean").item() / epoch_steps,
            "chance": math.log(args.queue_size + 1),  # the loss of equal embeddings
            "spread": common.spread(q),  # of the last batch
            "lr": lr,
            "images/s": epoch_steps * args.batch_size / (time.monotonic() - began),
        }
        if not math.isfinite(row["loss"]):
            common.fail("the loss is not finite: use a lower --lr and another --out")
        if test and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
            row["knn"] = common.knn_accuracy(encoder, bank, test, args.image_size)
        rows.append(row)
        accelerator.print(common.describe(row, args.warmup_epochs))
        accelerator.log(row, step=step)
        if epoch + 1 == args.epochs or time.monotonic() - saved_at > common.SAVE_SECONDS:
            state = {"f_q": f_q.state_dict(), "f_k": f_k.state_dict(), "queue": queue}
            common.save_run(args, rows, encoder, optimizer=optimizer.state_dict(), **state)
            saved_at = time.monotonic()

    common.finish(args, encoder, bank, test)
    accelerator.end_training()


if __name__ == "__main__":
    with common.one_line_errors():
        main()
