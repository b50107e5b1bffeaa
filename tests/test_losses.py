"""Losses, codes, optimizers, schedules and keys: loops over the equations, known values."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import common
import moco
import simclr
import supcon
import swav
from moco import encode_keys, info_nce, update_key_encoder
from simclr import LARS, nt_xent, projection_head
from supcon import mislabel, supcon_loss
from swav import LARC, SwAV, assign_codes, sinkhorn, swapped_prediction_loss


def exact(*rows):
    """Rows of numbers as a float64 tensor."""
    return torch.tensor(rows, dtype=torch.float64)


def unit(*shape):
    """Random vectors of unit length, the same for each call."""
    z = torch.randn(shape, dtype=torch.float64, generator=common.generator(1))
    return F.normalize(z, dim=-1)


# --------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------


def mean(terms):
    terms = list(terms)
    return sum(terms) / len(terms)


def slow_nt_xent(z1, z2, temperature):
    """SimCLR's Eq. 1 for each view i, with j the other view of its image."""
    z, N = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    losses = []
    for i in range(2 * N):
        e = [(z[i] @ z[k] / temperature).exp() for k in range(2 * N)]
        losses.append(-torch.log(e[(i + N) % (2 * N)] / sum(e[:i] + e[i + 1 :])))
    return mean(losses)


def slow_info_nce(q, k, queue, temperature):
    """MoCo's Eq. 1 for each query."""
    losses = []
    for query, positive in zip(q, k, strict=True):
        e = [(query @ key / temperature).exp() for key in (positive, *queue)]
        losses.append(-torch.log(e[0] / sum(e)))
    return mean(losses)


def slow_swapped_prediction(scores, codes, temperature):
    """SwAV's Eq. 2 and 6, for each code i, other crop v and image b; a mean instead of the sum."""
    log_p = [[torch.log(x.exp() / sum(x.exp())) for x in s / temperature] for s in scores]
    pairs = [(i, v) for i in range(2) for v in range(len(scores)) if v != i]
    losses = [-sum(codes[i, b] * log_p[v][b]) for i, v in pairs for b in range(len(codes[i]))]
    return mean(losses)


def slow_supcon(z, labels, temperature, variant):
    """SupCon's Eq. 2 ("out") or 3 ("in") for each anchor i that has positives."""
    views = [(view, label) for image, label in zip(z, labels, strict=True) for view in image]
    losses = []
    for i, (anchor, own_label) in enumerate(views):
        others = views[:i] + views[i + 1 :]
        total = sum((anchor @ view / temperature).exp() for view, _ in others)
        p = [(anchor @ v / temperature).exp() / total for v, label in others if label == own_label]
        if p and variant == "out":
            losses.append(-mean(map(torch.log, p)))
        elif p:
            losses.append(-torch.log(mean(p)))
    return mean(losses)


LOOPS = [
    (nt_xent, slow_nt_xent, [(2, 3)] * 2, [0.1]),
    (nt_xent, slow_nt_xent, [(5, 4)] * 2, [0.5]),
    (info_nce, slow_info_nce, [(1, 3), (1, 3), (2, 3)], [0.2]),
    (info_nce, slow_info_nce, [(5, 4), (5, 4), (7, 4)], [1.0]),
    (swapped_prediction_loss, slow_swapped_prediction, [(2, 3, 4), (2, 3, 4)], [0.1]),
    (swapped_prediction_loss, slow_swapped_prediction, [(5, 2, 3), (2, 2, 3)], [0.5]),
]
for variant in ("out", "in"):
    for V, labels in [(1, [0, 1, 0, 2, 0]), (3, [0, 0, 1]), (2, [1, 1, 1])]:
        more = [torch.tensor(labels), 0.7, variant]
        LOOPS.append((supcon_loss, slow_supcon, [(len(labels), V, 4)], more))


@pytest.mark.parametrize(("loss", "slow", "shapes", "more"), LOOPS)
def test_losses_and_their_gradients_are_those_of_the_equations(loss, slow, shapes, more):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    values = [function(*inputs, *more) for function in (loss, slow)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value, inputs) for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


EYE = torch.eye(4, dtype=torch.float64)
EQUAL = torch.ones(4, 2, 3, dtype=torch.float64) / 3**0.5
LABELS = torch.tensor([0, 0, 1])
FEATURES = exact(
    [[0.01, 0.02, 0.14], [0.38, 0.61, 0.50]],
    [[0.86, 0.97, 0.33], [0.26, 0.68, 0.45]],
    [[0.32, 0.64, 0.28], [0.45, 0.74, 0.73]],
)
TETRAHEDRON = exact([[1, 1, 1], [1, -1, -1]], [[-1, 1, -1], [-1, -1, 1]]) / 3**0.5
SCORES = exact(
    [[0.1, 0.2, 0.3], [0, 0.4, -0.1], [0.5, 0.1, 0.2], [-0.2, 0.3, 0.6]],
    [[0.2, 0.1, 0.4], [0.1, 0.3, 0], [0.4, 0.2, 0.1], [-0.1, 0.2, 0.5]],
)
CODES = torch.stack([sinkhorn(scores) for scores in SCORES])
LN_3, LN_7, LN_10 = (f"{math.log(n):.12f}" for n in (3, 7, 10))


@pytest.mark.parametrize(
    ("loss", "inputs", "value"),
    [
        (nt_xent, (EYE[:2], 3 * EYE[:2], 0.5), "0.2395448"),
        (nt_xent, (EYE, EYE, 0.5), "0.5944377"),
        (nt_xent, (*EQUAL.unbind(1), 0.1), LN_7),  # ln(2N - 1)
        (info_nce, (EYE[:1], EYE[:1], EYE[1:2].expand(4096, 4), 0.1), "0.1705510"),
        (info_nce, (EYE[:1], EYE[:1], EYE[1:2].expand(65536, 4), 0.2), "6.0926169"),
        (info_nce, (EYE[:1], EYE[:1], EYE[:1].expand(9, 4), 0.2), LN_10),  # ln(K + 1)
        (swapped_prediction_loss, (SCORES, CODES, 0.1), "0.576336471215"),
        (swapped_prediction_loss, (0 * SCORES, CODES, 0.1), LN_3),  # ln K
        (supcon_loss, (FEATURES, LABELS, 1), "1.685890835910"),
        (supcon_loss, (FEATURES, LABELS, 1, "in"), "1.644654982217"),
        (supcon_loss, (EYE[:3, None].expand(3, 2, 4), LABELS, 1), "1.349276885999"),
        (supcon_loss, (TETRAHEDRON, LABELS[1:], 0.05), LN_3),
        (supcon_loss, (TETRAHEDRON, LABELS[1:], 1, "in"), LN_3),
        (supcon_loss, (EQUAL, torch.tensor([0, 0, 1, 2]), 0.1), LN_7),  # ln(NV - 1)
    ],
)
def test_losses_have_their_known_values_to_the_last_digit(loss, inputs, value):
    decimals = len(value.split(".")[1])
    assert f"{loss(*inputs).item():.{decimals}f}" == value


@pytest.mark.parametrize(("loss", "slow", "shapes", "more"), LOOPS)
def test_losses_and_their_gradients_are_finite_at_low_temperatures(loss, slow, shapes, more):
    inputs = [unit(*shape).bfloat16().requires_grad_() for shape in shapes]
    more = [0.001 if isinstance(value, float) else value for value in more]
    value = loss(*[x.float() for x in inputs], *more)
    assert all(x.isfinite().all() for x in (value, *torch.autograd.grad(value, inputs)))


@pytest.mark.parametrize("variant", ["out", "in"])
def test_supcon_with_unique_labels_is_nt_xent(variant):
    z = unit(5, 2, 6)
    loss = supcon_loss(z, torch.arange(5), 0.3, variant)
    torch.testing.assert_close(loss, nt_xent(*z.unbind(1), 0.3))


def test_supcon_with_one_view_and_two_images_of_each_class_is_the_n_pairs_loss():
    z, losses = 2 * unit(6, 1, 4), []
    for a in range(6):
        p = (a + 3) % 6
        differences = [z[a, 0] @ (z[n, 0] - z[p, 0]) for n in range(6) if n not in (a, p)]
        losses.append(torch.log1p(sum(map(torch.exp, differences))))
    torch.testing.assert_close(supcon_loss(z, torch.arange(6) % 3, 1.0), mean(losses))


def test_supcon_of_one_positive_and_one_negative_is_near_the_triplet_loss():
    temperature, errors = 0.1, []
    for scale in (0.1, 0.05):  # Distances are halved, so x falls to a quarter.
        a, p, n = F.normalize(torch.ones(5) + scale * unit(3, 5), dim=1)
        loss = supcon_loss(torch.stack([a, p, n])[:, None], LABELS, temperature)
        positive = (a - p).square().sum()
        negatives = torch.stack([(a - n).square().sum(), (p - n).square().sum()])
        triplet = math.log(2) + ((positive - negatives) / (4 * temperature)).mean()
        x = (positive - negatives) / (2 * temperature)
        errors.append((loss - triplet).item())
        assert errors[-1] == pytest.approx(x.square().mean().item() / 8, rel=0.1)
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("N", [1, 3])
def test_supcon_without_any_positive_is_0_and_so_is_its_gradient(variant, N):
    z = unit(N, 1, 4).requires_grad_()
    loss = supcon_loss(z, torch.arange(N), 0.1, variant)
    assert loss.item() == 0 and not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_mislabel_gives_just_that_share_another_class_evenly(share):
    labels = torch.arange(5).repeat(2000)
    noisy = mislabel(labels, 5, share, 3)
    wrong = noisy != labels
    assert wrong.sum() == round(share * 10000)
    counts = ((noisy - labels) % 5)[wrong].bincount(minlength=5)[1:]
    assert (counts - wrong.sum() / 4).abs().max() < 5 * 50
    assert torch.equal(noisy, mislabel(labels, 5, share, 3))
    assert noisy.min() == 0 and noisy.max() == 4


# --------------------------------------------------------------------------------------
# SwAV's codes, and both queues
# --------------------------------------------------------------------------------------


def slow_sinkhorn(scores, epsilon, iterations):
    """The authors' iteration, entry by entry: each prototype gets 1/K, then each sample 1/B."""
    B, K = scores.shape
    Q = (scores / epsilon).exp()
    for _ in range(iterations):
        for k in range(K):
            Q[:, k] /= K * sum(Q[:, k])
        for b in range(B):
            Q[b] /= B * sum(Q[b])
    return B * Q


@pytest.mark.parametrize(("B", "K", "iterations"), [(4, 3, 3), (3, 7, 1), (6, 2, 20)])
def test_sinkhorn_is_the_authors_iteration(B, K, iterations):
    scores = unit(B, K)
    expected = slow_sinkhorn(scores, 0.1, iterations)
    torch.testing.assert_close(sinkhorn(scores, 0.1, iterations), expected, rtol=1e-11, atol=1e-13)


def test_sinkhorn_has_its_known_values_and_converges_to_equal_shares():
    codes = sinkhorn(SCORES[0].clone().requires_grad_())
    expected = exact(0.0467147, 0.65254, 0.3007454)
    torch.testing.assert_close(codes[0], expected, rtol=0, atol=5e-8)
    assert not codes.requires_grad
    codes = sinkhorn(SCORES[0], iterations=100)
    torch.testing.assert_close(codes.sum(0), exact(4 / 3, 4 / 3, 4 / 3))
    torch.testing.assert_close(codes.sum(1), exact(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.05, 0.002, 1e-4])
def test_sinkhorn_is_finite_and_precise_for_any_epsilon(dtype, epsilon):
    z, C = unit(1000, 8).split([700, 300])
    C[:99] = z[:99]  # scores of 1, of which exp(1 / epsilon) would overflow
    scores = (z @ C.T).to(dtype)
    codes, expected = sinkhorn(scores, epsilon), sinkhorn(scores.double(), epsilon)
    torch.testing.assert_close(codes, expected.float(), rtol=0, atol=1e-5)
    of_long_vectors = sinkhorn(1000 * scores, epsilon)
    torch.testing.assert_close(of_long_vectors.sum(1), torch.ones(700))


@pytest.mark.parametrize("with_queue", [False, True])
def test_codes_share_the_prototypes_with_the_queue_of_their_own_crop(with_queue):
    embeddings, C = unit(2, 9, 4), unit(5, 4).requires_grad_()
    queue, Z = embeddings.split([6, 3], dim=1)
    codes, scores = assign_codes(Z, C, queue if with_queue else None, 0.03)
    torch.testing.assert_close(scores, Z @ C.T)
    for i in range(2):
        rows = embeddings[i] if with_queue else Z[i]
        torch.testing.assert_close(codes[i], sinkhorn(rows @ C.T, 0.03)[-3:])
    assert not codes.requires_grad


@pytest.mark.parametrize(
    ("script", "size", "n"), [(moco, 5, 2), (moco, 6, 6), (swav, 5, 2), (swav, 3, 4)]
)
def test_enqueue_writes_over_the_oldest_rows(script, size, n):
    queue = -torch.ones(size, 1) if script is moco else -torch.ones(2, size, 1)
    expected = [-1] * size
    for step in range(4):
        numbers = range(step * n, (step + 1) * n)
        for number in numbers:
            expected[number % size] = number
        rows = torch.tensor(numbers).float()[:, None]
        script.enqueue(queue, rows if script is moco else torch.stack([rows, rows]), step)
        assert queue.flatten().tolist() == expected * (1 if script is moco else 2)


# --------------------------------------------------------------------------------------
# Optimizers and schedules
# --------------------------------------------------------------------------------------


def take_steps(optimizer, p, rates, gradients):
    """The values of p after steps at these learning rates."""
    for lr, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = gradient.clone()
        optimizer.step()
        yield p.detach().clone()


def test_lars_and_larc_have_their_known_values():
    p = nn.Parameter(exact([3, 4]))
    g = exact([0.8, -0.6])
    first, second = take_steps(LARS([p], lr=1, weight_decay=0.1), p, [1, 0.1], [g, g])
    torch.testing.assert_close(first, exact([2.9950807, 4.0008944]), rtol=0, atol=5e-8)
    torch.testing.assert_close(second, exact([2.990161521, 4.001788814]), rtol=0, atol=5e-10)
    p = nn.Parameter(exact([3, 4]))
    (first,) = take_steps(LARC([p], lr=1, weight_decay=0.1), p, [1], [g])
    torch.testing.assert_close(first, exact([2.996333333, 4.000666667]), rtol=0, atol=5e-10)


@pytest.mark.parametrize("kind", [LARS, LARC])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 2, 2)])
def test_lars_and_larc_are_momentum_on_adapted_gradients(kind, shape):
    p = nn.Parameter(unit(*shape))
    w, buffer = p.detach().clone(), 0
    rates, gradients = [0.5, 0.2, 0.1], unit(3, *shape)
    steps = take_steps(kind([p], lr=1, momentum=0.9, weight_decay=0.1), p, rates, gradients)
    for value, lr, g in zip(steps, rates, gradients, strict=True):
        if kind is LARC:  # It adapts all, and the learning rate is outside of the momentum.
            g = 0.001 * w.norm() / (g.norm() + 0.1 * w.norm()) * (g + 0.1 * w)
            buffer = 0.9 * buffer + g
            w = w - lr * buffer
        else:  # It leaves batch norm and biases alone; the learning rate is inside.
            if w.ndim > 1:
                g = g + 0.1 * w
                g = 0.001 * w.norm() / g.norm() * g
            buffer = 0.9 * buffer + lr * g
            w = w - buffer
        torch.testing.assert_close(value, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [LARS, LARC])
def test_lars_and_larc_train_the_zeros_that_batch_norm_starts_with(kind):
    shift, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    list(take_steps(kind([shift, unused], lr=1, weight_decay=0.1), shift, [0.5], [torch.ones(2)]))
    assert shift.tolist() == [-0.5, -0.5] and unused.tolist() == [1, 1]


@pytest.mark.parametrize("script", [simclr, moco, swav, supcon])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_0(script):
    more = ["cosine"] if script is moco else []
    rates = [script.learning_rate(step, 110, 10, 2.0, *more) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2 and rates[60] == pytest.approx(1)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001
    assert script.learning_rate(0, 5, 0, 2.0, *more) == 2


def test_mocos_first_schedule_falls_by_a_tenth_twice():
    rates = [moco.learning_rate(step, 200, 0, 0.03, "steps") for step in range(200)]
    assert rates == pytest.approx([0.03] * 120 + [0.003] * 40 + [0.0003] * 40)


# --------------------------------------------------------------------------------------
# Networks, keys and the steps of training
# --------------------------------------------------------------------------------------


def test_simclrs_head_has_the_authors_layers():
    head = projection_head(4, 3, 5, 2)
    assert [type(m) for m in head] == ([nn.Linear, nn.BatchNorm1d, nn.ReLU] * 3)[:-1]
    assert [tuple(m.weight.shape) for m in head[::3]] == [(5, 4), (5, 5), (2, 5)]
    assert [m.bias for m in head[::3]] == [None] * 3
    assert [m.bias.requires_grad for m in head[1::3]] == [True, True, False]
    assert len(projection_head(4, 0, 5, 2)) == 0


def test_swav_embeds_each_resolution_at_once_and_scores_in_float32():
    encoder, batches = nn.AdaptiveAvgPool2d(2), []
    encoder.width = 12
    encoder.forward = lambda x: batches.append(len(x)) or F.adaptive_avg_pool2d(x, 2).flatten(1)
    network = SwAV(encoder, 5, 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = network(torch.rand(4, 3, 8, 8), torch.rand(6, 3, 5, 5))
    assert batches == [4, 6] and z.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(scores, z @ network.prototypes.weight.T)


@pytest.mark.parametrize("script", [simclr, supcon])
def test_views_are_embedded_side_by_side_and_gathered_with_gradient(script):
    views = torch.rand(2, 3, 3, 2, 2, requires_grad=True)
    z = script.gather(script.embed(nn.Flatten(), views), Accelerator())
    expected = views.flatten(2).transpose(0, 1)
    assert torch.equal(z, expected)
    weights = torch.rand_like(z)
    gradients = [torch.autograd.grad((x * weights).sum(), views)[0] for x in (z, expected)]
    assert torch.equal(*gradients)


def test_the_key_encoders_parameters_follow_the_queries_by_momentum():
    torch.manual_seed(0)
    f_q, f_k = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    f_q(torch.rand(5, 3))
    pairs = list(zip(f_k.parameters(), f_q.parameters(), strict=True))
    expected = [0.9 * k.detach() + 0.1 * q.detach() for k, q in pairs]
    update_key_encoder(f_k, f_q, 0.9)
    torch.testing.assert_close([k.detach() for k, _ in pairs], expected)
    assert not f_k[1].running_mean.any()  # Its statistics are of its own images.


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_without_batch_norm_keys_are_those_of_a_plain_forward_pass(groups):
    x, f_k = torch.rand(10, 3, 2, 2), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    k = encode_keys(f_k, x, groups, common.generator(0), Accelerator())
    torch.testing.assert_close(k, F.normalize(f_k(x), dim=1))
    assert not k.requires_grad


def test_a_key_depends_on_its_shuffled_group_alone():
    x, f_k = torch.rand(24, 3, 2, 2), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))

    def groups(seed):
        """Of each image, the images whose keys change with it."""
        keys = []
        for change in (torch.zeros(24), *torch.eye(24)):
            changed = x + change[:, None, None, None]
            keys.append(encode_keys(f_k, changed, 4, common.generator(seed), Accelerator()))
        return {frozenset((k != keys[0]).any(1).nonzero()[:, 0].tolist()) for k in keys[1:]}

    assert [len(group) for group in groups(0)] == [6] * 4
    assert frozenset.union(*groups(0)) == set(range(24))
    assert len(groups(0) | groups(1) | {frozenset(range(6))}) == 9


@pytest.fixture
def train(monkeypatch, tmp_path):
    """A function that trains an encoder without batch norm on 24 random images.

    It returns the encoder and, for each forward pass, the number of views and if it had a graph.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=pixels)

    def run(script, flags):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 9))
        encoder.width, seen = 9, []
        encoder.register_forward_hook(lambda _, x, z: seen.append((len(z), z.requires_grad)))
        monkeypatch.setattr(common, "build_encoder", lambda *_: encoder)
        argv = f"--data {tmp_path}/images.npz --batch-size 8 --dim 6 {flags}".split()
        script.main([*argv, "--out", str(tmp_path / "run" / flags)])
        return encoder, seen

    return run


@pytest.fixture
def spy(monkeypatch):
    """A function that notes the calls of a script's functions, with copies of their arguments."""

    def watch(script, *names):
        calls = []

        def noting(name, function, *args):
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            calls.append((name, copies))
            return function(*args)

        for name in names:
            monkeypatch.setattr(script, name, partial(noting, name, getattr(script, name)))
        return calls

    return watch


def test_chunks_give_the_gradient_of_the_whole_batch(train):
    flags = "--epochs 1 --limit 8 --head-layers 0"
    whole, _ = train(simclr, flags)
    chunked, seen = train(simclr, f"{flags} --chunk-size 3")
    assert seen == [(n, graph) for graph in (False, True) for n in (6, 6, 4)]
    for a, b in zip(whole.parameters(), chunked.parameters(), strict=True):
        assert a.grad.abs().max() > 1e-4
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_moco_updates_encodes_compares_and_then_enqueues(train, spy):
    names = ["update_key_encoder", "encode_keys", "info_nce", "enqueue"]
    calls = spy(moco, *names)
    train(moco, "--epochs 2 --queue-size 12")
    assert [name for name, _ in calls] == names * 6
    queue = calls[2][1][2]
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(12))
    for step in range(6):
        q, k, negatives, _ = calls[4 * step + 2][1]
        torch.testing.assert_close(q.norm(dim=1), torch.ones(8))
        assert torch.equal(negatives, queue)
        queue[torch.arange(8 * step, 8 * step + 8) % 12] = k


@pytest.mark.parametrize("optimizer", ["larc", "sgd", "adamw"])
def test_swavs_prototypes_and_queue_begin_when_they_should(train, spy, optimizer):
    calls = spy(swav, "assign_codes", "swapped_prediction_loss")
    flags = "--epochs 3 --freeze-prototypes 1 --queue-size 12 --queue-start 1 --prototypes 5"
    crops = "--crops 2 1 --crop-sizes 8 5 --crop-scales .5 1 .1 .5"
    train(swav, f"{flags} {crops} --lr .5 --optimizer {optimizer}")
    expected, start = torch.zeros(2, 12, 6), calls[0][1][1]
    for step in range(9):  # 3 in an epoch; 12 rows are full after two steps of 8 images
        Z, C, queue, epsilon = calls[2 * step][1]
        scores, codes, _ = calls[2 * step + 1][1]
        torch.testing.assert_close(C.norm(dim=1), torch.ones(5))
        assert C.allclose(start) == (step <= 3)
        assert queue is None if step < 5 else torch.equal(queue, expected)
        torch.testing.assert_close(codes, assign_codes(Z, C, queue, epsilon)[0])
        assert scores.shape == (3, 8, 5)
        torch.testing.assert_close(scores[:2], Z @ C.T)
        if step >= 3:
            expected[:, torch.arange(8 * step, 8 * step + 8) % 12] = Z


def test_spread_is_1_on_the_sphere_and_0_in_a_point():
    z = unit(4096, 64)
    assert common.spread(3 * z) == pytest.approx(1, abs=0.02)
    assert common.spread(z[:1].expand(9, 64)) == pytest.approx(0, abs=1e-6)


def test_describe_warns_of_collapse_and_of_a_loss_at_chance():
    row = {"epoch": 9, "loss": 3.0, "chance": 4.0, "spread": 0.9}
    assert "warning" not in common.describe(row, warmup_epochs=2)
    assert "collapse" in common.describe({**row, "spread": 0.05}, 2)
    assert "at chance" in common.describe({**row, "loss": 4.0}, 2)
    assert "warning" not in common.describe({**row, "loss": 4.0, "epoch": 2}, 2)
