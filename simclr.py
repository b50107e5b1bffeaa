# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "accelerate>=1.2"]
# ///
"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.

Chen, Kornblith, Norouzi and Hinton, ICML 2020, https://arxiv.org/abs/2002.05709

    python simclr.py                                    # the bundled images, on a laptop
    accelerate launch --num_processes 1 --mixed_precision bf16 simclr.py --data cifar10
    accelerate launch --multi_gpu --num_processes 8 simclr.py --data FOLDER --batch-size 4096

Type the same command again to continue an interrupted run.

Where to find the parts of the paper:
- Algorithm 1: the inner loop of `main`
- Eq. 1, NT-Xent: `nt_xent`
- section 2.1 and Appendix A, the augmentation and the head g: `augmentation`, `projection_head`
- section 2.2, large batches: `gather`, `LARS`, --chunk-size; batch norm is synchronized over GPUs
- Appendix B.1, the learning rate: `learning_rate`
- Appendix B.9, small images: the 3x3 stem, and no blur

Differences from the paper and the authors' code:
- The loss is the mean over all 2N views, as in the paper. The authors' code returns twice that.
- Inputs are normalized with ImageNet's mean and standard deviation. The authors' are not.
- The defaults depend on the images (`PRESETS`): only larger ones get LARS and the paper's values.

The authors' ImageNet (69.3 %): --data FOLDER --arch resnet50 --batch-size 4096 --epochs 1000
Their repository's CIFAR-10 (ResNet-18, about 91 %): --data cifar10 --epochs 1000 --optimizer lars
--lr 2 --warmup-epochs 10 --weight-decay 1e-4 --crop-scale 0.08 --gray 0.2 --hidden 512
"""

import math
import time

import torch
import torch.nn.functional as F
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
        "warmup_epochs": 2.0,
        "augment": ["crop", "color", "gray"],
        "crop_scale": 0.2,
        "color_strength": 1.0,
        "temperature": 0.1,
        "hidden": 512,
    },
    "small": {
        "optimizer": "sgd",
        "warmup_epochs": 0.0,
        "weight_decay": 5e-4,
        "augment": ["crop", "color", "gray"],
        "crop_scale": 0.2,
        "gray": 0.1,
        "hidden": 1024,
    },
    "large": {"color_strength": 1.0, "temperature": 0.1, "weight_decay": 1e-6},
}
OPERATIONS = ["crop", "color", "gray", "blur"]
PEAK_LR = {"lars": 0.3, "sgd": 0.06, "adamw": 0.0007}  # at batch size 256


def augmentation(
    names: list[str], size: int, crop_scale: float, strength: float, gray: float = 0.2
) -> list:
    """The operations that make one view (Appendix A), for `common.batches`.

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


def projection_head(width: int, layers: int, hidden: int, dim: int) -> nn.Sequential:
    """The head g, which maps h [B, width] to z [B, dim]; with zero layers, z = h.

    Each layer is linear, followed by batch norm and, except the last, by ReLU. The last batch norm
    has a scale but no shift, as in the authors' code.
    """
    widths = [width] + [hidden] * (layers - 1) + [dim]
    head = []
    for i in range(layers):
        head += [nn.Linear(widths[i], widths[i + 1], bias=False), nn.BatchNorm1d(widths[i + 1])]
        head += [nn.ReLU(inplace=True)]
    if head:
        head.pop()
        head[-1].bias.requires_grad_(False)
    return nn.Sequential(*head)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent loss (Eq. 1), mean over all 2N views.

    With cosine similarities s, and j the other view of the image that view i shows,

        loss of i = -log( exp(s[i, j] / tau) / sum over k != i of exp(s[i, k] / tau) )

    Args:
        z1, z2: [N, D] embeddings of the two views; row n of both comes from image n.
            They are normalized here.
        temperature: tau > 0.

    Returns:
        Scalar; ln(2N - 1) if all embeddings are equal.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # leaves k = i out of the denominator
    positives = torch.arange(len(z), device=z.device).roll(len(z1))  # j = i + N, modulo 2N
    # Cross-entropy is -s[i, j] / tau + log(sum over k of exp(s[i, k] / tau)), and this sum is the
    # denominator of Eq. 1.
    return F.cross_entropy(similarity, positives)


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


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as in SimCLR's code.

        g <- gradient + weight_decay * w
        buffer <- momentum * buffer + lr * trust_coefficient * |w| / |g| * g
        w <- w - buffer

    Batch norm and biases, which have one dimension, are neither decayed nor adapted. If |w| is 0,
    the factor of g is lr.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        self.momentum, self.trust_coefficient = momentum, trust_coefficient
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        for w in group["params"]:
            if w.grad is None:
                continue
            if not self.state[w]:
                self.state[w]["buffer"] = torch.zeros_like(w)
            g = w.grad
            if w.ndim > 1:
                g = g + group["weight_decay"] * w
                norm = w.norm()
                trust = self.trust_coefficient * norm / g.norm().clamp(min=1e-12)
                g = torch.where(norm > 0, trust, 1.0) * g
            w -= self.state[w]["buffer"].mul_(self.momentum).add_(group["lr"] * g)


def build_optimizer(name: str, params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names."""
    if name == "lars":
        return LARS(params, lr, weight_decay=weight_decay)
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
    parser = common.build_parser("Pretrain an image encoder with SimCLR.", PRESETS)
    add = parser.add_argument_group("SimCLR").add_argument
    add("--augment", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="what makes a view")
    add("--crop-scale", type=common.share, default=0.08, help="area of the smallest crop")
    add("--color-strength", type=common.not_negative, default=0.5, help="strength s of the jitter")
    add("--gray", type=common.share, default=0.2, help="probability of a gray view")
    add("--head-layers", type=int, choices=range(4), default=2, help="layers of the head g")
    add("--hidden", type=common.count, help="width of its inner layers (default: the encoder's)")
    add("--dim", type=common.count, default=128, help="dimensions of z")
    add("--temperature", type=common.positive, default=0.5, help="temperature tau of NT-Xent")
    add("--optimizer", choices=PEAK_LR, default="lars", help="what updates the weights")
    add(
        "--chunk-size",
        type=common.count,
        help="images of a process in a forward pass (default: all)",
    )
    args = parser.parse_args(argv)

    accelerator = common.start(args.log_with)
    device = accelerator.device
    # The images to train on; those of them that have labels, for kNN; and the test images.
    images, bank, test = common.load_splits(args.data, args.root, args.limit, device, args.workers)
    # Flags that are not given take the defaults for such images.
    args = common.parse_for(images, parser, PRESETS, argv)

    # Encoder f and head g are one module, so that a step is one forward pass.
    torch.manual_seed(args.seed)
    encoder = common.build_encoder(args.arch, args.stem, args.init)
    head = projection_head(encoder.width, args.head_layers, args.hidden or encoder.width, args.dim)
    network = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    if accelerator.num_processes > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    peak_lr = args.lr or PEAK_LR[args.optimizer] * args.batch_size / 256
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
    recipe = augmentation(
        args.augment, args.image_size, args.crop_scale, args.color_strength, args.gray
    )
    # The images and views of a step depend only on the seed and the step, not on the number of
    # processes or on where the run was interrupted.
    steps = range(len(rows) * epoch_steps, total_steps)
    batches = common.batches(images, [(2, recipe)], args.batch_size, args.seed, steps)
    common.start_trackers(accelerator, "simclr", args)

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

            # Algorithm 1: both views of every image through f and g. Chunks are embedded without a
            # graph; when the gradient of the loss with respect to z is known, each is embedded
            # again and propagated back, so that memory holds one chunk at a time (Gao et al. 2021).
            chunks = views.split(args.chunk_size or views.shape[1], dim=1)
            in_chunks = len(chunks) > 1
            with torch.set_grad_enabled(not in_chunks):
                z = torch.cat([embed(model, chunk) for chunk in chunks])  # [B, 2, D]
            if in_chunks:
                z.requires_grad_()

            # Eq. 1, on the batch of all processes.
            z1, z2 = gather(z, accelerator).unbind(1)  # [N, D] each
            loss = nt_xent(z1, z2, args.temperature)

            optimizer.zero_grad()
            accelerator.backward(loss)
            if in_chunks:
                for chunk, gradient in zip(chunks, z.grad.split(args.chunk_size), strict=True):
                    accelerator.backward(embed(model, chunk), gradient=gradient)
            optimizer.step()
            loss_sum += loss.detach()

        row = {
            "epoch": epoch + 1,
            "loss": accelerator.reduce(loss_sum, "mean").item() / epoch_steps,
            "chance": math.log(2 * args.batch_size - 1),  # the loss of equal embeddings
            "spread": common.spread(z1),  # of the last batch
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
            state = {"model": network.state_dict()}
            common.save_run(args, rows, encoder, optimizer=optimizer.state_dict(), **state)
            saved_at = time.monotonic()

    common.finish(args, encoder, bank, test)
    accelerator.end_training()


if __name__ == "__main__":
    with common.one_line_errors():
        main()
