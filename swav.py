# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020, https://arxiv.org/abs/2006.09882

    python swav.py                                      # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 swav.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 swav.py --data FOLDER --arch resnet50

Type the same command again to continue an interrupted run.

Where to find the parts of the paper:
- Algorithm 1 (Appendix A): the inner loop of `main`
- Eq. 2 and Eq. 6, swapped prediction over all crops: `swapped_prediction_loss`
- Eq. 3 to 5, codes with equal shares of the prototypes: `sinkhorn`
- section 3.1, online codes and the queue for small batches: `assign_codes`, `enqueue`
- section 3.2, multi-crop: --crops, --crop-sizes, --crop-scales and `SwAV.forward`

Differences from the paper and the authors' code:
- Sinkhorn works in logarithms, on the gathered embeddings of all processes.
- The loss is a mean over codes and crops, as in the authors' code; Eq. 6 is a sum.
- The learning rate falls to 0, not to a thousandth of its peak.
- The defaults depend on the images (`PRESETS`).

The authors' ImageNet (they report 72.7 % linear): --data FOLDER --arch resnet50
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import common
from common import ColorJitter, GaussianBlur, Grayscale, RandomApply, RandomResizedCrop

# Defaults by the kind of images: the bundled ones, those of up to 64 pixels, and larger ones.
PRESETS = {
    "fashion-mini": {
        "arch": "small",
        "epochs": 26,
        "batch_size": 256,
        "optimizer": "adamw",
        "lr": 0.004,
        "warmup_epochs": 2.0,
        "hidden": 512,
        "augment": ["color", "gray"],
        "prototypes": 256,
        "epsilon": 0.03,
        "queue_size": 0,
        "crops": [2, 2],
        "crop_sizes": [28, 16],
        "crop_scales": [0.3, 1.0, 0.1, 0.4],
    },
    "small": {
        "optimizer": "adamw",
        "warmup_epochs": 0.0,
        "weight_decay": 1e-6,
        "augment": ["color", "gray"],
        "prototypes": 512,
        "queue_size": 0,
        "crops": [2],
        "color_strength": 0.5,
    },
    "large": {"batch_size": 256, "epochs": 200, "warmup_epochs": 0.0, "weight_decay": 1e-6},
}
OPERATIONS = ["color", "gray", "blur"]
PEAK_LR = {"larc": 0.6, "sgd": 0.05, "adamw": 0.0007}  # at batch size 256


def augmentation(names: list[str], size: int, scale: tuple[float, float], strength: float) -> list:
    """The operations that make one crop (section 3.2 and Appendix A.1), for `common.batches`.

    Args:
        names: which of OPERATIONS to use.
        size: side of the views, in pixels.
        scale: least and largest area of a crop, as shares of the image's area.
        strength: strength s of the color jitter.
    """
    jitter = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, min(0.2 * strength, 0.5))
    operations = [RandomResizedCrop(size, scale)]  # and a flip
    if "color" in names:
        operations.append(RandomApply(jitter, p=0.8))
    if "gray" in names:
        operations.append(RandomApply(Grayscale(), p=0.2))
    if "blur" in names:  # by an odd kernel, about a tenth of the side
        operations.append(RandomApply(GaussianBlur(size // 10 | 1, sigma=(0.1, 2.0)), p=0.5))
    return operations


class SwAV(nn.Module):
    """Encoder f, projection head and K prototypes C."""

    def __init__(self, encoder: nn.Module, hidden: int, dim: int, K: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torchvision.ops.MLP(encoder.width, [hidden, dim], norm_layer=nn.BatchNorm1d)
        self.prototypes = nn.Linear(dim, K, bias=False)  # the weight is C, [K, D]

    def forward(self, *crops: Tensor) -> tuple[Tensor, Tensor]:
        """Embed crops [n, 3, S, S] of several sizes: one size at a time, and the head takes all.

        Returns:
            z [V * B, D] of unit length and the scores z C^T [V * B, K], float32, of all V crops of
            B images: all images' first crop, then all images' second crop, and so on.
        """
        z = self.head(torch.cat([self.encoder(x) for x in crops]))
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            return z, self.prototypes(z)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes Q (Eq. 5) for scores [B, K]: rows that sum to 1 and use all prototypes about equally.

    Each round first gives every prototype the same total weight, and then makes each row sum to 1.
    """
    # With a small epsilon, float32 is not precise enough.
    dtype = torch.promote_types(scores.dtype, torch.float64 if epsilon < 0.01 else torch.float32)
    log_q = scores.to(dtype) / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0)  # the same as log_softmax(0), but faster on GPUs
        log_q = log_q.log_softmax(1)
    return log_q.exp().to(torch.promote_types(scores.dtype, torch.float32))


@torch.no_grad()
def assign_codes(Z: Tensor, C: Tensor, queue: Tensor | None, epsilon: float) -> tuple:
    """Codes and scores Z C^T [2, N, K] of the embeddings Z [2, N, D] of N images' two large crops.

    The embeddings in the queue [2, L, D], if there is one, count toward the equal shares.
    """
    N = Z.shape[1]
    embeddings = Z if queue is None else torch.cat([queue, Z], dim=1)
    scores = embeddings @ C.T
    return torch.stack([sinkhorn(s, epsilon)[-N:] for s in scores]), scores[:, -N:]


def enqueue(queue: Tensor, Z: Tensor, step: int) -> None:
    """Write the embeddings Z [2, N, D] of a step over the oldest ones in the queue [2, L, D].

    The queue is a ring: counted from the start of the run, image number i is in row i mod L.
    """
    L, N = queue.shape[1], Z.shape[1]
    number = step * N + torch.arange(N, device=Z.device)
    queue[:, number[-L:] % L] = Z[:, -L:]


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Swapped prediction (Eq. 2 and 6), mean over images, codes and the crops that predict them.

    The code q of each large crop i, 0 or 1, is predicted from every other crop v:

        loss of i and v = -sum over k of q[i, k] * log softmax(scores[v] / tau)[k]

    Args:
        scores: [V, B, K] of all V crops (in the paper V + 2), of which the first two have codes.
        codes: [2, B, K] without gradient.
        temperature: tau > 0.

    Returns:
        Scalar; ln K if all scores are equal.
    """
    V, B = scores.shape[:2]
    log_p = (scores / temperature).log_softmax(2)
    # [2, V]: entry (i, v) compares code i with its prediction from crop v, averaged over the
    # images. The diagonal, on which a crop would predict its own code, is left out.
    cross_entropy = -(codes.flatten(1) @ log_p.flatten(1).T) / B
    return (cross_entropy.sum() - cross_entropy.diagonal().sum()) / (2 * (V - 1))


class LARC(torch.optim.SGD):
    """Layer-wise adaptive rate control (You et al. 2017), as in NVIDIA's apex without clipping.

        g <- 0.001 * |p| / (|gradient| + weight_decay * |p|) * (gradient + weight_decay * p)

    SGD with momentum follows. If |p| is 0, as of batch norm's shifts at first, g is the gradient.
    """

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        decay = group["weight_decay"]
        for p in group["params"]:
            if p.grad is not None:
                norm = p.norm()
                trust = 0.001 * norm / (p.grad.norm() + decay * norm + 1e-8)
                trust = torch.where(norm > 0, trust, 1.0)
                # SGD adds decay * p, which g contains.
                p.grad = trust * (p.grad + decay * p) - decay * p
        super().step(closure)


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names."""
    if name == "larc":
        return LARC(params, lr, momentum=0.9, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate at a step from 0 to steps - 1: linear warm-up to the peak, then cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def save_prototypes(path: Path, network: SwAV, images: common.Images, size: int) -> None:
    """Save the ten prototypes that are nearest to most images, as rows of their nearest images."""
    images = images.take(torch.arange(min(len(images), 10000)))
    layers = nn.Sequential(network.encoder, network.head)
    z = F.normalize(common.extract_features(layers, images, size), dim=1)
    scores = z @ F.normalize(network.prototypes.weight, dim=1).T
    used = scores.argmax(1).bincount(minlength=scores.shape[1])
    rows = used.topk(min(10, len(used))).indices
    nearest = scores[:, rows].topk(min(8, len(images)), dim=0).indices  # [8, 10]
    shown = torch.cat(list(common.middles(images, nearest.T.flatten().cpu(), size)))
    common.save_pictures(path, shown, len(nearest))


def main(argv: list[str] | None = None) -> None:
    """Pretrain, evaluate, and leave the run in --out."""
    parser = common.build_parser("Pretrain an image encoder with SwAV.", PRESETS)
    add = parser.add_argument_group("SwAV").add_argument
    add("--augment", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="what follows a crop")
    add("--crops", nargs="+", type=common.count, default=[2, 6], help="crops of each resolution")
    add("--crop-sizes", nargs="+", type=common.count, help="their sides (default: 224 96, 32 18)")
    add(
        "--crop-scales",
        nargs="+",
        type=common.share,
        default=[0.14, 1.0, 0.05, 0.14],
        help="least and largest area of the crops of each resolution, as shares of the image's",
    )
    add("--color-strength", type=common.not_negative, default=1.0, help="strength s of the jitter")
    add("--hidden", type=common.count, help="hidden width of the head (default: the encoder's)")
    add("--dim", type=common.count, default=128, help="dimensions of z")
    add("--prototypes", type=common.count, default=3000, help="number of prototypes, K")
    add(
        "--freeze-prototypes",
        type=common.not_negative,
        default=1.0,
        help="first epochs, in which the prototypes are not trained",
    )
    add("--temperature", type=common.positive, default=0.1, help="temperature tau of the softmax")
    add("--epsilon", type=common.positive, help="entropy's weight, Eq. 3 (default: 0.05 or 0.01)")
    add(
        "--queue-size",
        type=common.not_negative_int,
        default=3840,
        help="earlier images that count in the codes, L",
    )
    add("--queue-start", type=common.not_negative, default=15.0, help="epoch from which it fills")
    add("--optimizer", choices=PEAK_LR, default="larc", help="what updates the weights")
    args = parser.parse_args(argv)

    accelerator = common.start(args.log_with)
    device = accelerator.device
    # The images to train on; those of them that have labels, for kNN; and the test images.
    images, bank, test = common.load_splits(args.data, args.root, args.limit, device, args.workers)
    # Flags that are not given take the defaults for such images.
    args = common.parse_for(images, parser, PRESETS, argv)

    small = round(args.image_size * (9 / 16 if args.image_size <= 64 else 3 / 7))
    sizes = args.crop_sizes or [args.image_size, small]
    resolutions = len(args.crops)
    if args.crops[0] < 2 or len(sizes) < resolutions or len(args.crop_scales) < 2 * resolutions:
        common.fail(
            "--crops begins with 2 or more; each needs a --crop-sizes and two --crop-scales"
        )
    recipes = []
    for i, crops in enumerate(args.crops):  # of each resolution
        scale = tuple(args.crop_scales[2 * i : 2 * i + 2])
        recipes.append((crops, augmentation(args.augment, sizes[i], scale, args.color_strength)))

    if args.epsilon is None:  # Codes of fewer images than prototypes must be sharper.
        sharing = args.batch_size + args.queue_size
        args.epsilon = 0.05 if sharing >= args.prototypes else 0.01

    # Encoder, head and prototypes are one module, so that a step is one forward pass.
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem, args.init)
    network = SwAV(encoder, args.hidden or encoder.width, args.dim, args.prototypes)
    network = network.to(device, memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    C = network.prototypes.weight
    queue = torch.zeros(2, args.queue_size, args.dim, device=device)
    power = 0.5 if args.optimizer == "adamw" else 0.75  # 4.8 at batch size 4096, as in the paper
    peak_lr = args.lr or PEAK_LR[args.optimizer] * (args.batch_size / 256) ** power
    optimizer = build_optimizer(args.optimizer, network.parameters(), peak_lr, args.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)

    rows = []  # the metrics of all epochs
    saved = common.load_run(args, images)
    if saved:
        network.load_state_dict(saved["model"])
        queue.copy_(saved["queue"])
        optimizer.load_state_dict(saved["optimizer"])
        rows = saved["rows"]

    epoch_steps = len(images) // args.batch_size
    total_steps = args.epochs * epoch_steps
    warmup_steps = min(round(args.warmup_epochs * epoch_steps), total_steps // 2)
    # The steps from which the prototypes are trained, the queue is filled, and the queue is full.
    unfreeze_step = round(args.freeze_prototypes * epoch_steps)
    queue_start_step = round(args.queue_start * epoch_steps)
    queue_full_step = queue_start_step + math.ceil(args.queue_size / args.batch_size)
    # The images and views of a step depend only on the seed and the step, not on the number of
    # processes or on where the run was interrupted.
    steps = range(len(rows) * epoch_steps, total_steps)
    batches = common.batches(images, recipes, args.batch_size, args.seed, steps)
    common.start_trackers(accelerator, "swav", args)

    saved_at = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        began = time.monotonic()
        loss_sum = torch.zeros((), device=device)
        used = torch.zeros(args.prototypes, dtype=torch.bool, device=device)
        epoch_range = range(epoch * epoch_steps, (epoch + 1) * epoch_steps)
        for step in common.progress(epoch_range, f"epoch {epoch + 1}/{args.epochs}"):
            index, views = next(batches)  # [crops, B, 3, S, S] of each resolution
            if step == 0:
                common.save_views(args.out / "views.png", images, index, views)
            lr = learning_rate(step, total_steps, warmup_steps, peak_lr)
            optimizer.param_groups[0]["lr"] = lr

            # Algorithm 1: embeddings z [V, B, D] and scores z C^T [V, B, K] of all V crops of this
            # process's B images.
            with torch.no_grad():
                C.copy_(F.normalize(C, dim=1))
            x = [v.flatten(0, 1).contiguous(memory_format=torch.channels_last) for v in views]
            z, scores = model(*x)
            z, scores = z.unflatten(0, (-1, len(index))), scores.unflatten(0, (-1, len(index)))

            # Codes [2, N, K] of the two large crops of the N images of all processes, of which each
            # process takes its own. `gather` joins the first dimension, hence the transposes.
            Z = accelerator.gather(z[:2].detach().transpose(0, 1).contiguous()).transpose(0, 1)
            is_full = args.queue_size > 0 and step >= queue_full_step
            codes, Z_scores = assign_codes(Z, C, queue if is_full else None, args.epsilon)
            if args.queue_size and step >= queue_start_step:
                enqueue(queue, Z, step)
            own = codes.chunk(accelerator.num_processes, dim=1)[accelerator.process_index]
            loss = swapped_prediction_loss(scores, own, args.temperature)

            optimizer.zero_grad()
            accelerator.backward(loss)
            if step < unfreeze_step:
                C.grad = None  # Unlike zeros, None also stops momentum and weight decay.
            optimizer.step()
            loss_sum += loss.detach()
            used.index_fill_(0, Z_scores.argmax(2).flatten(), True)

        row = {
            "epoch": epoch + 1,
            "loss": accelerator.reduce(loss_sum, "mean").item() / epoch_steps,
            "chance": math.log(args.prototypes),  # the loss of uniform predictions
            "prototypes": used.sum().item(),  # that a large crop was nearest to
            "spread": common.spread(Z[0]),  # of the last batch
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
            state = {"model": network.state_dict(), "queue": queue}
            common.save_run(args, rows, encoder, optimizer=optimizer.state_dict(), **state)
            saved_at = time.monotonic()

    save_prototypes(args.out / "prototypes.png", network, images, args.image_size)
    common.finish(args, encoder, bank, test)
    accelerator.end_training()


if __name__ == "__main__":
    with common.one_line_errors():
        main()
