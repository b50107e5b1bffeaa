"""swav.py: Sinkhorn, loss, LARC, prototypes, queue and crops of several sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Calls, checkpoint, metrics, settings
from conftest import run as run_tiny
from PIL import Image
from torch import nn

import common
import swav
from swav import (
    LARC,
    PRESETS,
    SwAV,
    augmentation,
    default_crop_sizes,
    enqueue,
    learning_rate,
    parse_arguments,
    sinkhorn,
    swapped_prediction_loss,
)

S1 = torch.tensor(
    [[0.1, 0.2, 0.3], [0, 0.4, -0.1], [0.5, 0.1, 0.2], [-0.2, 0.3, 0.6]], dtype=torch.float64
)
S2 = torch.tensor(
    [[0.2, 0.1, 0.4], [0.1, 0.3, 0], [0.4, 0.2, 0.1], [-0.1, 0.2, 0.5]], dtype=torch.float64
)


def normalize():
    """The default normalization of inputs."""
    return common.Normalize(*common.STATISTICS["imagenet"])


def run(data, out, *more):
    """A tiny run with four prototypes that learn from the start, and without a queue."""
    return run_tiny("swav", data, out, "--queue-size 0 --freeze-prototypes 0", *more)


# --------------------------------------------------------------------------------------
# Sinkhorn
# --------------------------------------------------------------------------------------


def slow_sinkhorn(scores, epsilon, iterations):
    """Cuturi's iteration as the authors describe it, entry by entry, in plain numbers."""
    B, K = scores.shape
    Q = [[math.exp(scores[b, k].item() / epsilon) for k in range(K)] for b in range(B)]
    for _ in range(iterations):
        for k in range(K):  # each prototype gets 1/K
            total = sum(Q[b][k] for b in range(B))
            for b in range(B):
                Q[b][k] /= total * K
        for b in range(B):  # each sample 1/B
            total = sum(Q[b])
            Q[b] = [q / total / B for q in Q[b]]
    return torch.tensor([[q * B for q in row] for row in Q], dtype=torch.float64)


@pytest.mark.parametrize(("B", "K", "iterations"), [(4, 3, 3), (3, 7, 1), (6, 2, 5), (5, 5, 20)])
def test_sinkhorn_is_the_iteration_written_out(B, K, iterations):
    torch.manual_seed(B)
    scores = torch.rand(B, K, dtype=torch.float64) * 2 - 1
    codes = sinkhorn(scores, 0.1, iterations)
    expected = slow_sinkhorn(scores, 0.1, iterations)
    torch.testing.assert_close(codes, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(codes.sum(1), torch.ones(B, dtype=torch.float64))


def test_sinkhorn_vector():
    expected = torch.tensor([0.0467147, 0.65254, 0.3007454], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(S1)[0], expected, rtol=0, atol=5e-8)


def test_sinkhorns_marginals_after_many_iterations():
    codes = sinkhorn(S1, 0.05, 100)
    torch.testing.assert_close(codes.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((3,), 4 / 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.05, 0.01, 0.002])
@pytest.mark.parametrize("B", [64, 700])
def test_sinkhorn_of_half_precision_scores_is_float64s(dtype, epsilon, B):
    torch.manual_seed(0)
    z, C = F.normalize(torch.randn(B, 8), dim=1), F.normalize(torch.randn(300, 8), dim=1)
    C[: B // 4] = z[: B // 4]  # scores of 1, whose exp at .002 overflows even float64
    scores = (z @ C.T).to(dtype)
    codes, exact = sinkhorn(scores, epsilon), sinkhorn(scores.double(), epsilon)
    assert codes.dtype == torch.float32 and exact.dtype == torch.float64
    assert codes.isfinite().all() and exact.isfinite().all()
    torch.testing.assert_close(codes.double(), exact, rtol=0, atol=1e-5)
    log_q = scores.double() / epsilon
    for _ in range(3):
        log_q = log_q.log_softmax(0)
        log_q = log_q.log_softmax(1)
    torch.testing.assert_close(exact, log_q.exp(), rtol=1e-9, atol=1e-12)


def test_sinkhorn_has_no_gradient():
    assert not sinkhorn(S1.clone().requires_grad_()).requires_grad


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def slow_loss(scores, codes, temperature):
    """Eq. 2 and 6, term by term, averaged as in the authors' code."""
    V, B, K = scores.shape
    total = 0
    for i in (0, 1):
        for v in range(V):
            if v == i:
                continue
            for b in range(B):
                p = [(s / temperature).exp() for s in scores[v, b]]
                total = total - sum(codes[i, b, k] * torch.log(p[k] / sum(p)) for k in range(K))
    return total / (2 * (V - 1) * B)


@pytest.mark.parametrize(("V", "B", "K", "T"), [(2, 3, 4, 0.1), (5, 2, 3, 0.5), (8, 1, 6, 1.0)])
def test_swapped_prediction_loss_and_its_gradients_are_those_of_equation_6(V, B, K, T):
    torch.manual_seed(V)
    scores = torch.randn(V, B, K, dtype=torch.float64, requires_grad=True)
    codes = torch.rand(2, B, K, dtype=torch.float64).softmax(2).requires_grad_()
    ours = swapped_prediction_loss(scores, codes, T)
    slow = slow_loss(scores, codes, T)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (scores, codes)),
        torch.autograd.grad(slow, (scores, codes)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_swapped_prediction_loss_vector():
    codes = torch.stack([sinkhorn(S1), sinkhorn(S2)])
    loss = swapped_prediction_loss(torch.stack([S1, S2]), codes, 0.1)
    assert abs(loss.item() - 0.576336471215) < 5e-13


def test_collapsed_scores_give_the_chance_that_a_run_shows(few, tmp_path):
    scores = torch.full((3, 5, 4), 0.3, dtype=torch.float64)
    codes = torch.stack([sinkhorn(s) for s in scores[:2]])
    chance = metrics(run(few, tmp_path / "run", "--max-steps", 1))[0]["chance"]
    assert abs(swapped_prediction_loss(scores, codes, 0.1).item() - chance) < 1e-12
    assert chance == math.log(4)


@pytest.mark.parametrize(
    "shapes",
    [((3, 4, 5), (3, 4, 5)), ((1, 4, 5), (2, 4, 5)), ((3, 4, 5), (2, 4, 6)), ((3, 4), (2, 4))],
)
def test_swapped_prediction_loss_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="scores"):
        swapped_prediction_loss(*map(torch.rand, shapes), 0.1)


# --------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------


def test_larc_vector():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARC([p], lr=1, momentum=0.9, weight_decay=0.1)
    p.grad = torch.tensor([[0.8, -0.6]], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([[2.996333333, 4.000666667]], dtype=torch.float64)
    torch.testing.assert_close(p.data, expected, atol=1e-9, rtol=0)


def test_larc_is_sgd_with_momentum_on_adapted_gradients():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))  # vectors are adapted as well
    q, v = p.detach().clone(), torch.zeros(4, dtype=torch.float64)
    optimizer = LARC([p], lr=0.5, momentum=0.9, weight_decay=0.1)
    for lr in (0.5, 0.25, 0.1):
        g = torch.randn(4, dtype=torch.float64)
        v = 0.9 * v + 0.001 * q.norm() / (g.norm() + 0.1 * q.norm()) * (g + 0.1 * q)
        q = q - lr * v  # the rate is outside of the momentum
        optimizer.param_groups[0]["lr"], p.grad = lr, g.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-9)


def test_larc_adapts_each_parameter_by_its_own_norms():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), (2, 3, 2, 2))]
    before = [p.detach().clone() for p in params]
    optimizer = LARC(params, lr=1.0, weight_decay=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    gradients = [p.grad.clone() for p in params]
    optimizer.step()
    for p, old, g in zip(params, before, gradients, strict=True):
        trust = 0.001 * old.norm() / (g.norm() + 0.1 * old.norm())
        torch.testing.assert_close(p.detach(), old - trust * (g + 0.1 * old))


def test_larc_adapts_many_parameters_in_as_few_calls_as_few():
    counts = []
    for layers in (2, 20):
        params = [nn.Parameter(torch.ones(2, 2)) for _ in range(layers)]
        optimizer = LARC(params, lr=0.1, weight_decay=0.1, foreach=True)
        for _ in range(2):  # The first step also allocates the buffers.
            for p in params:
                p.grad = torch.ones(2, 2)
            with Calls() as calls:
                optimizer.step()
        names = [name for name in calls.names if "unbind" not in name and "detach" not in name]
        counts.append(len(names))
    assert counts[0] == counts[1] < 30


def test_larc_leaves_zeros_and_parameters_without_gradient():
    zero, still, unused = (nn.Parameter(v) for v in (torch.zeros(2), torch.ones(2), torch.ones(2)))
    optimizer = LARC([zero, still, unused], lr=0.5, momentum=0.9, weight_decay=0.1)
    zero.grad, still.grad = torch.ones(2), torch.zeros(2)
    optimizer.step()
    assert zero.tolist() == [-0.5, -0.5] and still.tolist() == [1, 1] and unused.tolist() == [1, 1]


def test_learning_rate_is_the_authors():
    rates = [learning_rate(i, 1100, 100, 4.8) for i in range(1100)]
    assert rates[0] == pytest.approx(0.3) and rates[50] == pytest.approx((0.3 + 4.8) / 2)
    assert rates[100] == 4.8 and rates[600] == pytest.approx((4.8 + 0.0048) / 2)
    assert rates[-1] == pytest.approx(0.0048, rel=0.01)
    default = ["--data", "cifar10", "--batch-size"]
    assert parse_arguments([*default, "256"]).lr == pytest.approx(0.6)
    assert parse_arguments([*default, "4096"]).lr == pytest.approx(4.8)


# --------------------------------------------------------------------------------------
# Model and prototypes
# --------------------------------------------------------------------------------------


def test_one_forward_a_resolution_and_one_of_the_head_over_all():
    shapes = []

    class Counting(nn.Module):
        width = 3

        def forward(self, x):
            shapes.append(tuple(x.shape))
            return x.mean((2, 3))

    net = SwAV(nn.Identity(), Counting(), [5, 4], 7)
    heads = []
    net.head.register_forward_hook(lambda _, x, z: heads.append(z))
    z, scores = net(torch.rand(4, 3, 8, 8), torch.rand(6, 3, 5, 5))
    assert shapes == [(4, 3, 8, 8), (6, 3, 5, 5)] and len(heads) == 1
    torch.testing.assert_close(z, F.normalize(heads[0], dim=1))
    torch.testing.assert_close(scores, z @ net.prototypes.weight.T)
    assert scores.shape == (10, 7)
    kinds = [type(m) for m in net.head if not isinstance(m, nn.Dropout)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_scores_are_float32_under_autocast():
    encoder = nn.Flatten()
    encoder.width = 12
    net = SwAV(nn.Identity(), encoder, [4], 7)
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = net(torch.rand(5, 3, 2, 2))
    assert z.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, z @ net.prototypes.weight.T, rtol=1e-6, atol=1e-6)


@pytest.fixture
def seen(monkeypatch):
    """What each step of a run gives to Sinkhorn and to the loss."""
    codes, losses, real, loss = [], [], swav.sinkhorn, swav.swapped_prediction_loss

    def noting(scores, *args):
        codes.append((scores.clone(), real(scores, *args)))
        return codes[-1][1]

    def noting_loss(scores, q, temperature):
        losses.append((scores.detach().clone(), q.clone()))
        return loss(scores, q, temperature)

    monkeypatch.setattr(swav, "sinkhorn", noting)
    monkeypatch.setattr(swav, "swapped_prediction_loss", noting_loss)
    return codes, losses


def test_the_first_two_crops_get_codes_of_the_batch(few, tmp_path, seen):
    run(few, tmp_path / "run", "--crops", 3, 2, "--crop-sizes", 12, 8, "--max-steps", 2)
    codes, losses = seen
    assert len(codes) == 4 and len(losses) == 2
    for step, (scores, q) in enumerate(losses):
        assert scores.shape == (5, 4, 4)
        for i in (0, 1):
            torch.testing.assert_close(codes[2 * step + i][0], scores[i])
            torch.testing.assert_close(q[i], codes[2 * step + i][1])


def test_the_queue_serves_once_full_and_only_the_batchs_codes_enter_the_loss(few, tmp_path, seen):
    # 6 steps an epoch, from half of which 10 features fill in 3 steps of 4: used from step 6.
    out = run(
        few,
        tmp_path / "run",
        "--queue-size 10 --queue-start 0.5 --optimizer sgd",
        "--lr 1e-12 --weight-decay 1e-12",
    )
    codes, losses = seen
    lengths = [len(scores) for scores, _ in codes]
    assert lengths == [4] * 12 + [14] * 12
    history = torch.stack([scores[:2] for scores, _ in losses])  # [12, 2, 4, 4]; C stands still
    queue = torch.zeros(2, 10, 4)
    for step in range(12):
        for i in (0, 1):
            scores, q = codes[2 * step + i]
            if step >= 6:
                torch.testing.assert_close(scores[:10], queue[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores[-4:], history[step, i])
            assert torch.equal(losses[step][1][i], q[-4:])
            if step >= 3:
                for j in range(4):
                    queue[i, (step * 4 + j) % 10] = history[step, i, j]
    state = checkpoint(out)
    stored = state["queue"] @ state["model"]["prototypes.weight"].T
    torch.testing.assert_close(stored, queue, rtol=1e-4, atol=1e-5)


def test_a_queue_smaller_than_the_batch_holds_its_last(few, tmp_path, seen):
    state = checkpoint(
        run(
            few,
            tmp_path / "run",
            "--queue-size 3 --queue-start 0 --max-steps 1 --optimizer sgd --lr 1e-12",
        )
    )
    stored = state["queue"] @ state["model"]["prototypes.weight"].T
    order = [(i % 3, i) for i in (1, 2, 3)]
    for place, row in order:
        torch.testing.assert_close(stored[:, place], seen[1][0][0][:2, row], rtol=1e-4, atol=1e-5)


def test_prototypes_have_length_one_and_freeze_for_the_first_epochs(few, tmp_path):
    torch.manual_seed(0)
    fresh = SwAV(normalize(), common.build_encoder("small", "3x3"), [16, 8], 4)
    start = F.normalize(fresh.prototypes.weight.detach(), dim=1)
    for optimizer in ("larc", "adamw", "sgd"):
        frozen = run(
            few,
            tmp_path / f"frozen-{optimizer}",
            "--freeze-prototypes 1 --epochs 1 --optimizer",
            optimizer,
        )
        state = checkpoint(frozen)["model"]
        torch.testing.assert_close(state["prototypes.weight"], start)
        assert not torch.equal(state["head.0.weight"], fresh.head[0].weight)
        free = checkpoint(
            run(
                few,
                tmp_path / f"free-{optimizer}",
                "--freeze-prototypes 0.5 --epochs 1 --optimizer",
                optimizer,
                "--lr 0.1",
            )
        )
        assert not torch.allclose(free["model"]["prototypes.weight"], start, atol=1e-6)


def test_scores_are_of_prototypes_normalized_at_the_start_of_the_step(few, tmp_path, seen):
    run(few, tmp_path / "run", "--optimizer", "sgd", "--lr", 50, "--max-steps", 3)
    for scores, _ in seen[1]:
        assert scores.abs().max() <= 1 + 1e-6


def test_use_of_prototypes_counts_the_nearest_ones_of_the_epoch(few, tmp_path, seen):
    rows = metrics(run(few, tmp_path / "run"))
    for epoch, row in enumerate(rows):
        codes = seen[0][12 * epoch : 12 * epoch + 12]
        nearest = torch.cat([scores.argmax(1) for scores, _ in codes])
        p = nearest.bincount(minlength=4) / len(nearest)
        assert len(nearest) == 48 and row["prototypes"] == (p > 0).sum()
        assert row["entropy"] == pytest.approx(torch.distributions.Categorical(p).entropy().item())


# --------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------


def test_augmentation_is_simclrs_for_crops_of_any_size():
    crop, color, gray, blur = augmentation(["blur", "gray", "color", "crop"], 96, (0.05, 0.14), 1.0)
    assert (crop.size, crop.scale, crop.ratio, crop.flip) == (96, (0.05, 0.14), (3 / 4, 4 / 3), 0.5)
    assert (tuple(color.operation), color.p) == ((0.8, 0.8, 0.8, 0.2), 0.8)
    assert (gray.operation, gray.p) == (common.grayscale, 0.2)
    assert (tuple(blur.operation), blur.p) == ((9, (0.1, 2.0)), 0.5)
    whole, _ = augmentation(["gray"], 18, (0.05, 0.14), 1.0)
    assert (whole.size, whole.scale, whole.ratio, whole.flip) == (18, (1, 1), (1, 1), 0)


def test_prototypes_png_shows_the_images_nearest_to_some(few, tmp_path, monkeypatch):
    shown, real = {}, common.save_pictures

    def noting(path, images, columns):
        shown[path.name] = images, columns
        real(path, images, columns)

    monkeypatch.setattr(common, "save_pictures", noting)
    out = run(few, tmp_path / "run")
    images, columns = shown["prototypes.png"]
    assert columns == 8 and len(images) == 32  # 8 for each of the 4 prototypes
    data, _, _, _ = common.load_splits(str(few), "", None, torch.device("cpu"), 1)
    state, net = (
        checkpoint(out)["model"],
        SwAV(normalize(), common.build_encoder("small", "3x3"), [16, 8], 4),
    )
    net.load_state_dict(state)
    with torch.no_grad():
        pictures = data.centers(torch.arange(27), 12)
        _, scores = net.eval()(pictures)
        scores = scores / net.prototypes.weight.norm(dim=1)
    used = scores.argmax(1).bincount(minlength=4).argsort(descending=True)
    best = scores[:, used[0]].argsort(descending=True)[:8]
    torch.testing.assert_close(images[:8], pictures[best])
    with Image.open(out / "prototypes.png") as picture:
        assert picture.width > 8 * 84


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ("--prototypes 5 --max-steps 1", True),  # for a batch of 4
        ("--prototypes 4 --max-steps 1", False),
        ("--prototypes 12 --queue-size 8 --queue-start 0.5", False),  # full at step 5 of 12
        ("--prototypes 13 --queue-size 8 --queue-start 0.5", True),  # 4 + 8 are not enough
        ("--prototypes 5 --queue-size 8 --queue-start 2", True),  # It would be full too late.
    ],
)
def test_too_many_prototypes_are_warned_of_at_the_start(few, tmp_path, capsys, more, warned):
    run(few, tmp_path / "run", more)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].startswith("warning: codes are computed from") == warned
    assert ("fewer than the" in printed) == warned


def test_collapse_is_warned_of_with_what_to_change(few, tmp_path, capsys, flat_encoder):
    more = "--epochs 6 --lr 1e-9 --head-layers 1 --init"
    rows = metrics(run(few, tmp_path / "flat", more, flat_encoder))
    printed = capsys.readouterr().out
    assert "the embeddings collapse" in printed and "--epsilon" in printed
    assert rows[-1]["spread"] < 0.1 and rows[-1]["entropy"] < 0.1

    more = "--epochs 6 --optimizer adamw --lr 0.003 --augment crop --batch-size 8 --crops 2"
    rows = metrics(run(few, tmp_path / "fine", more, "--crop-scales 0.7 1 --warmup-epochs 0"))
    assert "warning" not in capsys.readouterr().out
    assert rows[-1]["spread"] > 0.1 and rows[-1]["entropy"] > 0.1


@pytest.mark.parametrize(
    ("losses", "warned"), [((1.39, 1.385), True), ((1.45, 1.40), False), ((0.9, 0.8), False)]
)
def test_a_loss_that_stays_at_chance_is_warned_of_not_one_that_passes_it(
    few, tmp_path, monkeypatch, capsys, losses, warned
):
    steps, real = iter([losses[0]] * 6 + [losses[1]] * 6), swav.swapped_prediction_loss

    def given(*args):  # ln 4 is 1.386
        return real(*args) * 0 + next(steps)

    monkeypatch.setattr(swav, "swapped_prediction_loss", given)
    run(few, tmp_path / "run", "--crops", 2, "--lr", 1e-9)
    assert ("the loss stays at chance" in capsys.readouterr().out) == warned


def test_the_papers_preset_has_its_settings_for_batches_of_256():
    args = parse_arguments([], PRESETS["paper"])
    assert (args.crops, args.crop_scales) == ([2, 6], [0.14, 1.0, 0.05, 0.14])
    assert (args.epsilon, args.temperature, args.dim) == (0.05, 0.1, 128)
    assert (args.optimizer, args.weight_decay, args.freeze_prototypes) == ("larc", 1e-6, 1)
    assert (args.queue_size, args.queue_start, args.head_layers) == (3840, 15, 2)
    assert (args.batch_size, args.epochs, args.prototypes, args.warmup_epochs) == (
        256,
        200,
        3000,
        0,
    )
    assert args.lr == pytest.approx(0.6)
    bundled = parse_arguments([], PRESETS["fashion-mini"])
    assert bundled.arch == "small" and parse_arguments(["--crops", "2"]).crops == [2]


@pytest.mark.parametrize(("batch_size", "prototypes"), [("128", 128), ("4096", 3000)])
def test_by_default_a_step_has_an_image_for_each_prototype(batch_size, prototypes):
    args = parse_arguments(["--batch-size", batch_size], PRESETS["small"])
    assert args.prototypes == prototypes


def test_fewer_crops_take_the_first_sizes_and_scales(few, tmp_path, seen):
    run(few, tmp_path / "run", "--crops", 2, "--max-steps", 1)
    assert seen[1][0][0].shape == (2, 4, 4)


@pytest.mark.parametrize(("side", "small"), [(32, 18), (28, 16), (64, 36), (224, 96)])
def test_default_crop_sizes_follow_the_images(side, small):
    assert default_crop_sizes(side) == [side, small]


def test_a_run_takes_the_default_crop_sizes(few, tmp_path):
    out = run(few, tmp_path / "run", "--crops 2 1 --max-steps 1")
    assert settings(out)["crop_sizes"] == [12, 7]


def test_enqueue_writes_over_the_oldest_embeddings():
    queue = torch.zeros(2, 5, 1)
    for step in range(4):
        Z = torch.tensor([[[2.0 * step], [2.0 * step + 1]], [[-2.0 * step], [-2.0 * step - 1]]])
        enqueue(queue, Z, step)
    assert queue[0].flatten().tolist() == [5, 6, 7, 3, 4]
    assert torch.equal(queue[1], -queue[0])
    short = torch.zeros(2, 3, 1)
    enqueue(short, torch.arange(4.0)[None, :, None].expand(2, -1, -1), 0)
    assert short[0].flatten().tolist() == [3, 1, 2]
