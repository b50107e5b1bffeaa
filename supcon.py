# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SupCon: Supervised Contrastive Learning, and its cross-entropy baseline.

Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu and Krishnan, NeurIPS 2020,
https://arxiv.org/abs/2004.11362

    python supcon.py                                    # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 supcon.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 supcon.py --data FOLDER --batch-size 4096

Type the same command again to continue an interrupted run.

Where to find the parts of the paper:
- section 3.1, the encoder, the head and the two views: the inner loop of `main`
- Eq. 2, L_out, and Eq. 3, L_in: `supcon_loss`; the baseline is --loss ce
- section 3.2.3, triplet and N-pairs losses as special cases: the docstring of `supcon_loss`
- the linear classifier on the features: the table at the end of the run, and linear_eval.py

Differences from the paper and the authors' code:
- The loss is the mean over all anchors that have a positive, without another factor. The authors'
  PyTorch code multiplies it by tau / 0.07, their TensorFlow code by tau.
- The head takes h as it is, as in the authors' PyTorch code; in the paper h is normalized first.
- The augmentation is SimCLR's. The optimizer is SGD or AdamW; for ImageNet the paper used LARS.
- Cross-entropy is trained on both views of an image; the authors use one.
- --label-noise is not in the paper. It changes labels for training alone, not for the evaluation.
- The defaults depend on the images (`PRESETS`).

The authors' CIFAR-10: --data cifar10 --arch resnet50 --batch-size 1024, with --epochs 1000 (96.0 %)
or --loss ce --epochs 500 (95.0 %). Nearest to their ImageNet (78.7 %, with LARS and AutoAugment):
--data FOLDER --arch resnet50 --batch-size 4096.
"""

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
        "epochs": 36,
        "batch_size": 256,
        "optimizer": "adamw",
        "lr": 0.004,
        "warmup_epochs": 1.0,
        "augment": ["crop", "color", "gray"],
        "hidden": 512,
    },
    "small": {"augment": ["crop", "color", "gray"], "warmup_epochs": None},
    "large": {"batch_size": 256, "epochs": 350, "warmup_epochs": None},
}
# The same for --loss ce: in the authors' code it sees crops alone. On the bundled images it sees
# what the other losses see.
CROSS_ENTROPY = {"fashion-mini": {}, "small": {"augment": ["crop"]}, "large": {"augment": ["crop"]}}
OPERATIONS = ["crop", "color", "gray", "blur"]
LOSSES = ("out", "in", "ce")
PEAK_LR = {"sgd": 0.125, "adamw": 0.0007}  # at batch size 256


def augmentation(
    names: list[str], size: int, crop_scale: float, strength: float, gray: float = 0.2
) -> list:
    """The operations that make one view (SimCLR's), for `common.batches`.

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


def mislabel(labels: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Give a share of the labels [N] another class, drawn at random."""
    rng = common.generator(seed)
    chosen = torch.randperm(len(labels), generator=rng)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=rng)
    return labels.index_copy(0, chosen, (labels[chosen] + shift) % num_classes)


def supcon_loss(z: Tensor, labels: Tensor, temperature: float, variant: str = "out") -> Tensor:
    """Supervised contrastive loss, mean over all anchors: the views that have a positive.

    With P(i) the other views of anchor i's class, and A(i) all views but i,

        p[i, j] = exp(z[i]·z[j] / tau) / sum over a in A(i) of exp(z[i]·z[a] / tau)
        "out" (Eq. 2): loss of i = -mean over j in P(i) of log p[i, j]
        "in" (Eq. 3):  loss of i = -log( mean over j in P(i) of p[i, j] )

    With unique labels it is NT-Xent. With one view, temperature 1 and two images of each class it
    is what the paper calls the N-pairs loss. With one positive p and one negative n, of unit
    length, the loss of anchor a is ln 2 + (|a - p|^2 - |a - n|^2) / (4 tau) + O(x^2), where
    x = (|a - p|^2 - |a - n|^2) / (2 tau): a triplet loss up to scale and constant, for x near 0.

    Args:
        z: [N, V, D] embeddings of V views of N images. They are used as they are; the paper's have
            unit length.
        labels: [N].
        temperature: tau > 0.
        variant: "out" or "in".

    Returns:
        Scalar; ln(NV - 1) if all embeddings are equal, 0 if no anchor has a positive.
    """
    V = z.shape[1]
    z, labels = z.flatten(0, 1), labels.repeat_interleave(V)
    positive = labels[:, None] == labels  # [NV, NV]
    positive.fill_diagonal_(False)

    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # leaves i out of the denominator, the sum over A(i)
    log_p = similarity.log_softmax(1)
    count = positive.sum(1).clamp(min=1).to(z.dtype)  # |P(i)|
    has_positive = positive.any(1)
    if variant == "out":
        loss = -log_p.masked_fill(~positive, 0).sum(1) / count
    else:
        loss = count.log() - log_p.masked_fill(~positive, -torch.inf).logsumexp(1)
    return loss.masked_fill(~has_positive, 0).sum() / has_positive.sum().clamp(min=1)


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


def embed(model: nn.Module, views: Tensor) -> Tensor:
    """The embeddings z [B, 2, D] of the views [2, B, 3, S, S] of B images."""
    x = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return model(x).float().unflatten(0, (2, -1)).transpose(0, 1)


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names."""
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate at a step from 0 to steps - 1: linear warm-up to the peak, then cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main(argv: list[str] | None = None) -> None:
    """Pretrain, evaluate, and leave the run in --out."""
    parser = common.build_parser("Pretrain an image encoder with SupCon.", PRESETS)
    add = parser.add_argument_group("SupCon").add_argument
    add("--loss", choices=LOSSES, default="out", help="L_out, L_in or cross-entropy")
    add("--label-noise", type=common.share, default=0.0, help="share of training labels made wrong")
    add("--augment", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="what makes a view")
    add("--crop-scale", type=common.share, default=0.2, help="area of the smallest crop")
    add("--color-strength", type=common.not_negative, default=0.5, help="strength s of the jitter")
    add("--head-layers", type=int, choices=(1, 2), default=2, help="layers of the head g")
    add("--hidden", type=common.count, help="width of its inner layers (default: the encoder's)")
    add("--dim", type=common.count, default=128, help="dimensions of z")
    add("--temperature", type=common.positive, default=0.1, help="temperature tau of the loss")
    add("--optimizer", choices=PEAK_LR, default="sgd", help="what updates the weights")
    args = parser.parse_args(argv)

    accelerator = common.start(args.log_with)
    device = accelerator.device
    # The images to train on; those of them that have labels, for kNN; and the test images.
    images, bank, test = common.load_splits(args.data, args.root, args.limit, device, args.workers)
    images = bank  # The loss needs labels.
    if not images or images.num_classes < 2:
        common.fail(f"--data {args.data} has fewer than two classes: see the README for its form")
    presets = PRESETS
    if args.loss == "ce":
        presets = {kind: flags | CROSS_ENTROPY[kind] for kind, flags in PRESETS.items()}
    # Flags that are not given take the defaults for such images.
    args = common.parse_for(images, parser, presets, argv)
    if args.warmup_epochs is None:  # The authors warm up for batches of more than 256 images.
        args.warmup_epochs = 10.0 if args.batch_size > 256 else 0.0
    labels = mislabel(images.labels, images.num_classes, args.label_noise, args.seed).to(device)

    # Encoder f and head g, or a classifier, are one module, so that a step is one forward pass.
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem, args.init)
    if args.loss == "ce":
        head = nn.Linear(encoder.width, images.num_classes)
    else:
        hidden = [args.hidden or encoder.width] * (args.head_layers - 1)
        head = torchvision.ops.MLP(encoder.width, [*hidden, args.dim])
    network = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    chance = math.log(images.num_classes if args.loss == "ce" else 2 * args.batch_size - 1)
    rates = PEAK_LR | ({"sgd": 0.2} if args.loss == "ce" else {})
    peak_lr = args.lr or rates[args.optimizer] * args.batch_size / 256
    optimizer = build_optimizer(args.optimizer, network.parameters(), peak_lr, args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)

    rows = []  # the metrics of all epochs
    saved = common.load_run(args, images)
    if saved:
        network.load_state_dict(saved["model"])
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
    common.start_trackers(accelerator, "supcon", args)

    saved_at = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        began = time.monotonic()
        loss_sum = torch.zeros((), device=device)
        epoch_range = range(epoch * epoch_steps, (epoch + 1) * epoch_steps)
        for step in common.progress(epoch_range, f"epoch {epoch + 1}/{args.epochs}"):
            index, (views,) = next(batches)  # [2, B, 3, S, S], of this process's B images
            if step == 0:
                common.save_views(args.out / "views.png", images, index, [views])
            lr = learning_rate(step, total_steps, warmup_steps, peak_lr)
            optimizer.param_groups[0]["lr"] = lr

            # Section 3.1: both views of every image through f and g.
            z = embed(model, views)  # [B, 2, D]

            # Eq. 2 or 3, on the batch of all processes: N images with labels y.
            z = gather(z, accelerator)  # [N, 2, D]
            y = accelerator.gather(labels[common.to_device_of(labels, index)])
            if args.loss == "ce":
                loss = F.cross_entropy(z.flatten(0, 1), y.repeat_interleave(2))
            else:
                loss = supcon_loss(F.normalize(z, dim=2), y, args.temperature, args.loss)

            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss_sum += loss.detach()

        row = {
            "epoch": epoch + 1,
            "loss": accelerator.reduce(loss_sum, "mean").item() / epoch_steps,
            "chance": chance,  # the loss of equal embeddings
            "spread": common.spread(z[:, 0]),  # of the last batch
            "lr": lr,
            "images/s": epoch_steps * args.batch_size / (time.monotonic() - began),
        }
        if not math.isfinite(row["loss"]):
            common.fail("the loss is not finite: use a lower --lr and another --out")
        if test and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
            row["knn"] = common.knn_accuracy(encoder, bank, test, args.image_size)
            if args.loss == "ce":
                scores = common.extract_features(network, test, args.image_size)
                row["classifier"] = common.accuracy(scores, test.labels)
        rows.append(row)
        accelerator.print(common.describe(row, args.warmup_epochs))
        accelerator.log(row, step=step)
        if epoch + 1 == args.epochs or time.monotonic() - saved_at > common.SAVE_SECONDS:
            state = {"model": network.state_dict()}
            common.save_run(args, rows, encoder, optimizer=optimizer.state_dict(), **state)
            saved_at = time.monotonic()

    common.finish(args, encoder, bank, test)
    accelerator.end_training()


if __name__ == "__main__":
    with common.one_line_errors():
        main()
