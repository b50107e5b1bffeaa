"""simclr.py: loss, optimizer, schedule, model and augmentation, and what its flags do."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Calls, checkpoint, metrics, run, settings
from torch import nn

import common
from simclr import (
    LARS,
    PRESETS,
    augmentation,
    learning_rate,
    lower_bound,
    nt_xent,
    parse_arguments,
    projection_head,
)

# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def slow_nt_xent(z1, z2, temperature):
    """Eq. 1, term by term."""
    z = [*z1, *z2]
    N = len(z1)

    def similarity(i, k):
        return z[i] @ z[k] / (z[i].norm() * z[k].norm()) / temperature

    total = 0
    for i in range(2 * N):
        j = (i + N) % (2 * N)
        others = sum(similarity(i, k).exp() for k in range(2 * N) if k != i)
        total = total - torch.log(similarity(i, j).exp() / others)
    return total / (2 * N)


@pytest.mark.parametrize(("N", "D", "temperature"), [(2, 3, 0.1), (5, 4, 0.5), (7, 16, 1.0)])
def test_nt_xent_and_its_gradients_are_those_of_equation_1(N, D, temperature):
    torch.manual_seed(N)
    z1, z2 = (torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, slow = nt_xent(z1, z2, temperature), slow_nt_xent(z1, z2, temperature)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    gradients = zip(
        torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(slow, (z1, z2)), strict=True
    )
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("N", "temperature", "value"), [(2, 0.5, 0.2395448), (4, 0.5, 0.5944377)])
def test_nt_xent_of_orthonormal_identical_pairs(N, temperature, value):
    z = torch.eye(N, dtype=torch.float64)
    assert abs(nt_xent(z, 3 * z, temperature).item() - value) < 5e-8


def test_nt_xent_of_collapsed_embeddings_is_chance():
    z = torch.ones(6, 3, dtype=torch.float64)
    assert abs(nt_xent(z, z, 0.2).item() - math.log(11)) < 1e-12


@pytest.mark.parametrize(("N", "temperature"), [(2, 0.1), (4, 0.2), (9, 1.0)])
def test_nt_xent_of_a_simplex_is_the_lower_bound(N, temperature):
    z = torch.eye(N, dtype=torch.float64) - 1 / N
    assert abs(nt_xent(z, z, temperature).item() - lower_bound(N, temperature)) < 1e-12
    for seed in range(5):
        z1, z2 = torch.randn(2, N, 3, generator=common.generator(seed), dtype=torch.float64)
        assert nt_xent(z1, z2, temperature).item() > lower_bound(N, temperature)


def test_a_run_shows_chance_and_bound_of_its_batch(few, tmp_path):
    row = metrics(run("simclr", few, tmp_path / "run", "--temperature 0.3"))[0]
    assert row["chance"] == math.log(2 * 4 - 1) and row["bound"] == lower_bound(4, 0.3)


def test_nt_xent_survives_half_precision_inputs_and_low_temperature():
    z1, z2 = torch.randn(2, 8, 4).bfloat16().requires_grad_()
    loss = nt_xent(z1.float(), z2.float(), 0.01)
    assert loss.isfinite() and torch.autograd.grad(loss, z1)[0].isfinite().all()


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3, 4, 1), (3, 4, 1))])
def test_nt_xent_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="z1 and z2"):
        nt_xent(*map(torch.rand, shapes), 0.1)


# --------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------


def test_lars_vector():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([p], lr=1, momentum=0.9, weight_decay=0.1, trust_coefficient=0.001)
    p.grad = torch.tensor([[0.8, -0.6]], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([[2.9950807, 4.0008944]], dtype=torch.float64)
    torch.testing.assert_close(p.data, expected, atol=5e-8, rtol=0)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    expected = torch.tensor([[2.990161521, 4.001788814]], dtype=torch.float64)
    torch.testing.assert_close(p.data, expected, atol=5e-10, rtol=0)


def test_lars_neither_decays_nor_adapts_vectors_and_survives_zeros():
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    zero, still = nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.ones(1, 2))
    unused = nn.Parameter(torch.ones(1, 2))
    optimizer = LARS([bias, zero, still, unused], lr=0.5, weight_decay=0.0)
    bias.grad, zero.grad, still.grad = torch.ones(2), torch.ones(1, 2), torch.zeros(1, 2)
    optimizer.step()
    assert bias.tolist() == [2.5, 3.5]
    assert zero.tolist() == [[-0.5, -0.5]] and still.tolist() == [[1, 1]]
    assert unused.tolist() == [[1, 1]]


def test_lars_of_several_parameters_is_the_docstrings_for_each():
    torch.manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3, 2, 2), (5, 1)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    expected = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    for lr in (0.5, 0.2):
        for p in params:
            p.grad = torch.randn_like(p)
        for i, p in enumerate(params):
            g = p.grad
            if p.ndim > 1:
                g = g + (0.1 if i < 2 else 0.3) * expected[i]
                g = 0.01 * expected[i].norm() / g.norm() * g
            buffers[i] = 0.9 * buffers[i] + lr * g
            expected[i] = expected[i] - buffers[i]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-12)


def test_lars_makes_as_few_calls_for_many_parameters_as_for_few():
    counts = []
    for layers in (2, 20):
        params = [nn.Parameter(torch.ones(2, 2)) for _ in range(layers)]
        optimizer = LARS(params, lr=0.1, weight_decay=0.1)
        for _ in range(2):  # The first step also allocates the buffers.
            for p in params:
                p.grad = torch.ones(2, 2)
            with Calls() as calls:
                optimizer.step()
        counts.append(len([name for name in calls.names if "unbind" not in name]))
    assert counts[0] == counts[1] < 25


def test_learning_rate_has_three_phases():
    rates = [learning_rate(step, 110, 10, 2.0) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.001 and learning_rate(0, 5, 0, 1.0) == 1


# --------------------------------------------------------------------------------------
# Model and augmentation
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "linear"),
    [(0, []), (1, [(4, 3)]), (2, [(4, 5), (5, 3)]), (3, [(4, 5), (5, 5), (5, 3)])],
)
def test_projection_head_has_the_official_layers(layers, linear):
    head = projection_head(4, layers, 5, 3)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * layers
    assert [type(m) for m in head] == kinds[:-1]
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == linear
    assert not any(m.bias is not None for m in head if isinstance(m, nn.Linear))
    assert [m.bias.requires_grad for m in head if isinstance(m, nn.BatchNorm1d)] == [
        *[True] * (layers - 1),
        False,
    ][:layers]
    assert head(torch.rand(6, 4)).shape == (6, 3 if layers else 4)


def test_augmentation_is_appendix_a():
    crop, color, gray, blur = augmentation(["blur", "gray", "color", "crop"], 224, 0.08, 1.0)
    assert (crop.size, crop.scale, crop.ratio, crop.flip) == (224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (tuple(color.operation), color.p) == ((0.8, 0.8, 0.8, 0.2), 0.8)
    assert (gray.operation, gray.p) == (common.grayscale, 0.2)
    assert (tuple(blur.operation), blur.p) == ((23, (0.1, 2.0)), 0.5)
    half = augmentation(["crop", "color"], 32, 0.2, 0.5)
    assert tuple(half[1].operation) == (0.4, 0.4, 0.4, 0.1) and half[0].scale == (0.2, 1.0)


@pytest.mark.parametrize("width", [9, 12])
def test_without_the_crop_the_middle_square_is_shown(width):
    pixels = torch.randint(256, (4, 3, 9, width), dtype=torch.uint8)
    images = common.ImagesInMemory(pixels, torch.zeros(4))
    recipe = augmentation(["gray"], 9, 0.08, 1.0)
    index, (views,) = next(common.batches(images, [(2, recipe)], 4, 0, 0, 1))
    left = (width - 9) // 2
    middle = pixels[index, :, :, left : left + 9].repeat(2, 1, 1, 1) / 255
    for view, image in zip(views.flatten(0, 1), middle, strict=True):
        is_gray = common.grayscale(image).allclose(view, atol=1e-5)
        assert is_gray or image.allclose(view, atol=1e-5)


# --------------------------------------------------------------------------------------
# Flags and warnings
# --------------------------------------------------------------------------------------


def test_flags_reach_the_schedule_the_optimizer_and_the_head(few, tmp_path):
    more = "--epochs 4 --eval-every 3 --batch-size 8 --weight-decay 0.25 --dim 5"
    out = run("simclr", few, tmp_path / "a", more, "--optimizer sgd --lr-rule linear")
    assert ["knn" in row for row in metrics(out)] == [False, False, True, True]
    state = checkpoint(out)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    assert state["model"]["1.3.weight"].shape == (5, 16)
    assert settings(out)["lr"] == pytest.approx(0.03 * 8 / 256)

    more = "--max-steps 8 --image-size 16 --limit 20 --optimizer lars --batch-size 9"
    out = run("simclr", few, tmp_path / "b", more)
    assert [row["step"] for row in metrics(out)] == [2, 4]  # 2 epochs of 2 steps end first
    assert settings(out)["lr"] == pytest.approx(0.075 * 3)

    out = run("simclr", few, tmp_path / "c", "--max-steps 5")
    rate = learning_rate(4, 5, 4, 4.8 * (4 / 4096) ** 0.5)
    assert metrics(out)[-1]["lr"] == pytest.approx(rate)


def test_a_preset_replaces_defaults_and_flags_replace_the_preset():
    preset = PRESETS["fashion-mini"]
    assert parse_arguments([], preset).arch == "small"
    assert parse_arguments(["--arch", "resnet34"], preset).arch == "resnet34"
    plain = parse_arguments([], PRESETS["paper"])
    assert (plain.arch, plain.optimizer, plain.crop_scale) == ("resnet18", "lars", 0.08)
    assert plain.lr == pytest.approx(4.8 * (256 / 4096) ** 0.5)
    assert (plain.temperature, plain.color_strength, plain.epochs) == (0.1, 1.0, 100)
    assert parse_arguments([], preset).lr == pytest.approx(0.016 * (256 / 4096) ** 0.5)
    # A ResNet takes a lower rate than the small network.
    larger = parse_arguments(["--arch", "resnet34"], preset)
    assert larger.lr == pytest.approx(0.004 * (256 / 4096) ** 0.5)


def test_a_huge_learning_rate_ends_in_one_line(few, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("simclr", few, tmp_path / "run", "--lr 1e30 --optimizer sgd --head-layers 0")
    assert exit_.value.code == 2 and "not finite" in capsys.readouterr().err


def test_collapse_and_a_loss_at_chance_are_warned_of(few, tmp_path, capsys, flat_encoder):
    more = "--head-layers 0 --lr 1e-12 --optimizer sgd --warmup-epochs 0 --init"
    run("simclr", few, tmp_path / "flat", more, flat_encoder)
    printed = capsys.readouterr().out
    assert "the embeddings collapse" in printed and "stays at chance" in printed
    more = "--lr 1e-9 --optimizer sgd --augment color --color-strength 0"
    run("simclr", few, tmp_path / "fine", more)
    assert "warning" not in capsys.readouterr().out


def test_spread_is_one_on_the_sphere():
    z = F.normalize(torch.randn(4096, 64, generator=common.generator(0)), dim=1)
    assert common.spread(3 * z) == pytest.approx(1, abs=0.02)
    assert common.spread(z[:1].expand(9, -1)) == pytest.approx(0, abs=1e-6)
