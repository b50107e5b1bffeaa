"""moco.py: loss, momentum, queue, shuffled and split batch norm, and what the versions set."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, metrics, run, settings, write_folder
from torch import nn

import common
import moco
from moco import (
    PRESETS,
    SplitBatchNorm,
    augmentation,
    default_bn_splits,
    default_queue_size,
    enqueue,
    info_nce,
    learning_rate,
    new_queue,
    parse_arguments,
    update_key_encoder,
)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def slow_info_nce(q, k, queue, temperature):
    """Eq. 1 for each query, term by term."""
    total = 0
    for i in range(len(q)):
        positive = (q[i] @ k[i] / temperature).exp()
        negatives = sum((q[i] @ key / temperature).exp() for key in queue)
        total = total - torch.log(positive / (positive + negatives))
    return total / len(q)


@pytest.mark.parametrize(("N", "D", "K", "T"), [(1, 3, 2, 0.07), (5, 4, 7, 0.2), (7, 16, 3, 1.0)])
def test_info_nce_and_its_gradients_are_those_of_equation_1(N, D, K, T):
    torch.manual_seed(N)
    q, k, queue = (unit(n, D).requires_grad_() for n in (N, N, K))
    ours, slow = info_nce(q, k, queue, T), slow_info_nce(q, k, queue, T)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, queue)),
        torch.autograd.grad(slow, (q, k, queue)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("K", "T", "value"), [(4096, 0.1, 0.1705510), (65536, 0.2, 6.0926169)])
def test_info_nce_of_a_matching_key_and_orthogonal_negatives(K, T, value):
    q, other = torch.eye(2, dtype=torch.float64).split(1)
    assert abs(info_nce(q, q, other.expand(K, -1), T).item() - value) < 5e-8


def test_info_nce_of_equal_logits_is_the_chance_that_a_run_shows(few, tmp_path):
    q = unit(1, 8)
    out = run("moco", few, tmp_path / "run", "--queue-size", 9, "--max-steps", 1)
    chance = metrics(out)[0]["chance"]
    assert abs(info_nce(q, q, q.expand(9, -1), 0.2).item() - chance) < 1e-12
    assert chance == math.log(10)


@pytest.mark.parametrize(
    "shapes",
    [((3, 4), (2, 4), (5, 4)), ((3, 4), (3, 4), (5, 3)), ((3, 4, 1), (3, 4, 1), (5, 4, 1))],
)
def test_info_nce_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="queue"):
        info_nce(*map(torch.rand, shapes), 0.1)


# --------------------------------------------------------------------------------------
# Momentum and queue
# --------------------------------------------------------------------------------------


def test_update_of_the_key_encoder_moves_its_parameters_only():
    torch.manual_seed(0)
    queries, keys = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    queries(torch.rand(2, 3, 4, 4))
    expected = [
        0.9 * k + 0.1 * q for k, q in zip(keys.parameters(), queries.parameters(), strict=True)
    ]
    buffers = [b.clone() for b in keys.buffers()]
    update_key_encoder(keys, queries, 0.9)
    torch.testing.assert_close([*keys.parameters()], [p.detach() for p in expected])
    assert all(torch.equal(a, b) for a, b in zip(keys.buffers(), buffers, strict=True))


def test_keys_start_as_the_queries_and_follow_by_momentum(few, tmp_path):
    first = checkpoint(run("moco", few, tmp_path / "a", "--max-steps", 1, "--key-momentum", 0.75))
    torch.manual_seed(0)
    start = common.build_encoder("small", "3x3").state_dict()
    for name, value in start.items():  # the first update moved them nowhere
        if name.endswith(("weight", "bias")):
            torch.testing.assert_close(first["key_model"][f"1.{name}"], value)
    second = checkpoint(
        run(
            "moco",
            few,
            tmp_path / "b",
            "--max-steps 2 --key-momentum 0.75 --schedule steps",
            "--warmup-epochs 0 --optimizer sgd",
        )
    )
    first = checkpoint(
        run(
            "moco",
            few,
            tmp_path / "c",
            "--max-steps 1 --key-momentum 0.75 --schedule steps",
            "--warmup-epochs 0 --optimizer sgd",
        )
    )
    names = [name for name in first["model"] if name.endswith(("weight", "bias"))]
    assert any(name.startswith("2.") for name in names)  # the head, too
    for name in names:
        expected = 0.75 * first["key_model"][name] + 0.25 * first["model"][name]
        torch.testing.assert_close(second["key_model"][name], expected)
    assert not torch.equal(first["key_model"]["2.0.weight"], second["key_model"]["2.0.weight"])


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_join_the_queue_after_the_logits_and_the_write_wraps(
    few, tmp_path, monkeypatch, symmetric
):
    calls, real = [], moco.info_nce

    def noting(q, k, queue, temperature):
        calls.append((q.detach(), k.clone(), queue.clone()))
        return real(q, k, queue, temperature)

    monkeypatch.setattr(moco, "info_nce", noting)
    out = run(
        "moco", few, tmp_path / "run", "--queue-size 10 --max-steps 4", *["--symmetric"] * symmetric
    )
    n = 8 if symmetric else 4
    expected = calls[0][2].clone()  # random unit vectors
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(10))
    for step, (q, k, queue) in enumerate(calls):
        assert q.shape == k.shape == (n, 8) and not k.requires_grad
        torch.testing.assert_close(q.norm(dim=1), torch.ones(n))
        torch.testing.assert_close(queue, expected)
        assert (q @ queue.T).max() < 0.99999 and (k @ queue.T).max() < 0.99999  # none of this step
        for i, key in enumerate(k):
            expected[(step * n + i) % 10] = key
    torch.testing.assert_close(checkpoint(out)["queue"], expected)


def test_symmetric_makes_each_view_a_query_and_the_others_key(few, tmp_path, monkeypatch):
    calls, real = [], moco.info_nce

    def noting(q, k, queue, temperature):
        calls.append((q.detach(), k))
        return real(q, k, queue, temperature)

    monkeypatch.setattr(moco, "info_nce", noting)
    run("moco", few, tmp_path / "run", "--symmetric", "--max-steps", 1)
    q, k = calls[0]  # at the first step both encoders are one: rows 2i and 2i + 1 change places
    torch.testing.assert_close(k, q.view(4, 2, -1).flip(1).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_split_batch_norm_is_batch_norm_of_each_part():
    torch.manual_seed(0)
    x, whole, one = torch.randn(6, 3, 2, 2), nn.BatchNorm2d(3), SplitBatchNorm(3, splits=1)
    torch.testing.assert_close(one(x), whole(x))
    torch.testing.assert_close(one.running_var, whole.running_var)
    split = SplitBatchNorm(3, splits=3)
    parts = [nn.BatchNorm2d(3) for _ in range(3)]
    expected = torch.cat([bn(part) for bn, part in zip(parts, x.split(2), strict=True)])
    torch.testing.assert_close(split(x), expected)
    for name in ("running_mean", "running_var"):  # They are the means over the parts.
        mean = torch.stack([getattr(bn, name) for bn in parts]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    split.eval(), whole.eval(), whole.load_state_dict(split.state_dict())
    torch.testing.assert_close(split(x), whole(x))


def test_split_batch_norm_in_one_call_is_that_part_by_part():
    torch.manual_seed(0)
    split = SplitBatchNorm(6, splits=8)
    nn.init.normal_(split.weight), nn.init.normal_(split.bias)
    x, w = torch.randn(2, 64, 5, 5, 6).permute(0, 1, 4, 2, 3)  # channels last, as in a network
    results = []
    for normalize in (split.normalize_each_part, split.normalize_as_channels):
        own_x = x.clone().requires_grad_()
        means, variances = torch.zeros(8, 6), torch.ones(8, 6)
        split.zero_grad()
        y = normalize(own_x, means, variances)
        (y * w).sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y.detach(), means, variances))
        results[-1] += (own_x.grad, split.weight.grad.clone(), split.bias.grad.clone())
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if i < 3:
            assert torch.equal(a, b)
        else:  # Their sums are made in another order.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


class Recording(nn.Module):
    """An encoder that notes the batches it is trained on."""

    width, seen = 12, None

    def __init__(self, norm_layer):
        super().__init__()
        self.norm = norm_layer(3)

    def forward(self, x):
        if self.training:
            self.seen.append((x.detach(), self.norm.splits))
        return self.norm(x).mean(3).mean(1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_keys_batch_norm_group_is_not_its_querys(few, tmp_path, monkeypatch, symmetric):
    monkeypatch.setattr(
        common, "build_encoder", lambda _, __, norm_layer=nn.BatchNorm2d: Recording(norm_layer)
    )
    monkeypatch.setattr(Recording, "seen", [])
    more = "--batch-size 24 --bn-splits 4 --queue-size 48 --epochs 3 --augment blur"
    run("moco", few, tmp_path / "run", more, "--symmetric" if symmetric else "")
    data, _, _, _ = common.load_splits(str(few), "", None, torch.device("cpu"), 1)
    images = data.pixels.float().div(255).flatten(1)

    def groups(x):  # of each of 24 images, the groups in which its views stand
        nearest = torch.cdist(x.flatten(1), images).argmin(1)
        return [
            {int(g) for g in (nearest == i).nonzero()[:, 0] // (len(x) // 4)}
            for i in nearest.unique()
        ]

    orders = []
    for (k, splits), (q, again) in zip(Recording.seen[0::2], Recording.seen[1::2], strict=False):
        assert splits == again == 4 and len(q) == 24 * (1 + symmetric)
        pairs = [*zip(groups(q), groups(k), strict=True)]
        moved = sum(a != b for a, b in pairs)
        assert len(pairs) == 24 and moved > 24 / 2  # 3/4 are expected, without a shuffle none
        for group in range(4):  # nor does a group of queries become one of keys
            assert len(set.union(*(b for a, b in pairs if group in a))) > 2
        orders.append(torch.cdist(k.flatten(1), images).argmin(1))
    assert len(orders) == 3 and not torch.equal(orders[0], orders[1])


def test_every_batch_norm_is_split_and_averages_over_a_steps_groups(few, tmp_path):
    out = run("moco", few, tmp_path / "run", "--batch-size", 8, "--bn-splits", 4, "--max-steps", 1)
    state = checkpoint(out)
    for part in ("model", "key_model"):
        counts = [v for name, v in state[part].items() if name.endswith("num_batches_tracked")]
        assert [int(v) for v in counts] == [1] * 5
    plain = checkpoint(run("moco", few, tmp_path / "plain", "--batch-size", 8, "--max-steps", 1))
    mean, split = (s["model"]["1.0.1.running_mean"] for s in (plain, state))
    torch.testing.assert_close(split, mean)  # the mean over the groups is that over the batch


@pytest.mark.parametrize(
    ("batch_size", "processes", "splits"),
    [(256, 1, 8), (250, 1, 5), (128, 1, 4), (40, 1, 1), (256, 2, 8), (64, 4, 4), (4096, 16, 16)],
)
def test_by_default_batch_norm_has_up_to_eight_groups_of_32(batch_size, processes, splits):
    assert default_bn_splits(batch_size, processes) == splits


@pytest.mark.parametrize(
    ("images", "keys", "size"),
    [(270, 4, 32), (50000, 256, 4096), (1281167, 256, 65536), (27, 4, 4), (5, 4, 4)],
)
def test_the_default_queue_is_a_power_of_two_up_to_an_eighth_of_the_images(images, keys, size):
    assert default_queue_size(images, keys) == size


def test_a_run_takes_the_default_groups_and_queue(few, tmp_path):
    out = run("moco", few, tmp_path / "run", "--max-steps 1")
    assert (settings(out)["bn_splits"], settings(out)["queue_size"]) == (1, 18)
    many = write_folder(tmp_path / "many", 90, 2)
    out = tmp_path / "default"
    argv = f"--data {many} --arch small --batch-size 128 --max-steps 1 --out {out}"
    moco.main(argv.split())
    assert (settings(out)["bn_splits"], settings(out)["queue_size"]) == (4, 128)


def test_a_queue_of_more_than_half_the_images_is_warned_of(few, tmp_path, capsys):
    run("moco", few, tmp_path / "a", "--queue-size 14 --max-steps 1")
    assert "keys of more than half of the 27 images" in capsys.readouterr().out
    run("moco", few, tmp_path / "b", "--queue-size 13 --max-steps 1")
    assert "more than half" not in capsys.readouterr().out
    run("moco", few, tmp_path / "c", "--queue-size 26 --symmetric --max-steps 1")  # two keys each
    assert "more than half" not in capsys.readouterr().out


def test_a_new_queue_holds_random_unit_vectors():
    queue = new_queue(9, 5, 3, torch.device("cpu"))
    assert queue.shape == (9, 5)
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(9))
    assert torch.equal(queue, new_queue(9, 5, 3, torch.device("cpu")))
    assert not torch.equal(queue, new_queue(9, 5, 4, torch.device("cpu")))


def test_enqueue_writes_over_the_oldest_keys():
    queue = torch.full((5, 1), -1.0)
    for step in range(4):
        enqueue(queue, torch.tensor([[2.0 * step], [2.0 * step + 1]]), step)
    assert queue.flatten().tolist() == [5, 6, 7, 3, 4]


# --------------------------------------------------------------------------------------
# Versions and their parts
# --------------------------------------------------------------------------------------


def test_versions_set_what_the_papers_did_and_flags_win():
    paper = PRESETS["paper"]
    v1, v2 = (parse_arguments(["--version", v], paper) for v in ("v1", "v2"))
    assert (v1.head_layers, v1.schedule, v1.temperature) == (1, "steps", 0.07)
    assert (v2.head_layers, v2.schedule, v2.temperature) == (2, "cosine", 0.2)
    assert v1.jitter == [0.4, 0.4, 0.4, 0.4, 1.0] and v2.jitter == [0.4, 0.4, 0.4, 0.1, 0.8]
    for v in (v1, v2):
        assert (v.lr, v.weight_decay, v.optimizer, v.key_momentum) == (0.03, 1e-4, "sgd", 0.999)
        assert (v.crop_scale, v.dim, v.batch_size, v.warmup_epochs) == (0.2, 128, 256, 0)
        assert v.epochs == 200
    mixed = parse_arguments(["--version", "v1", "--head-layers", "2", "--batch-size", "512"], paper)
    assert (mixed.head_layers, mixed.temperature, mixed.lr) == (2, 0.07, 0.06)
    preset = PRESETS["fashion-mini"]
    bundled = parse_arguments([], preset)
    assert (bundled.arch, bundled.head_layers, bundled.schedule) == ("small", 2, "cosine")
    assert bundled.version == "v2" and bundled.jitter[:2] == [0.8, 0.8]
    v1 = parse_arguments(["--version", "v1"], preset)  # one that is named wins over the images'
    assert (v1.arch, v1.head_layers, v1.temperature, v1.jitter[3]) == ("small", 1, 0.07, 0.4)


@pytest.mark.parametrize(
    ("version", "size", "operations"),
    [
        ("v1", 80, [common.grayscale, common.ColorJitter]),
        ("v2", 64, [common.ColorJitter, common.grayscale]),
        ("v2", 80, [common.ColorJitter, common.grayscale, common.GaussianBlur]),
    ],
)
def test_a_run_takes_the_versions_operations_in_order(
    few, tmp_path, monkeypatch, version, size, operations
):
    class SeenError(Exception):
        pass

    def seeing(images, recipes, *_, **__):
        raise SeenError(recipes)

    monkeypatch.setattr(common, "batches", seeing)
    with pytest.raises(SeenError) as seen:
        run("moco", few, tmp_path / "run", "--version", version, "--image-size", size)
    ((count, (crop, *rest)),) = seen.value.args[0]
    assert (count, crop.size, crop.scale) == (2, size, (0.2, 1.0))
    kinds = [getattr(o.operation, "__name__", type(o.operation).__name__) for o in rest]
    assert kinds == [o.__name__ for o in operations]


def test_augmentation_keeps_the_given_order():
    jitter = [0.4, 0.4, 0.4, 0.1, 0.8]
    crop, gray, color = augmentation(["crop", "gray", "color"], 32, 0.2, jitter)
    assert (crop.scale, crop.flip, gray.operation, gray.p) == (
        (0.2, 1.0),
        0.5,
        common.grayscale,
        0.2,
    )
    assert (tuple(color.operation), color.p) == ((0.4, 0.4, 0.4, 0.1), 0.8)
    _, color, _, blur = augmentation(["color", "gray", "crop", "blur"], 224, 0.2, jitter)
    assert color.p == 0.8 and (tuple(blur.operation), blur.p) == ((23, (0.1, 2.0)), 0.5)
    whole, _ = augmentation(["gray"], 32, 0.2, jitter)
    assert (whole.scale, whole.ratio, whole.flip) == ((1, 1), (1, 1), 0)


@pytest.mark.parametrize(("version", "shapes"), [("v1", [(8, 256)]), ("v2", [(16, 256), (8, 16)])])
def test_the_head_is_each_papers(few, tmp_path, version, shapes):
    state = checkpoint(run("moco", few, tmp_path / "run", "--version", version, "--max-steps", 1))
    head = {name: v for name, v in state["model"].items() if name.startswith("2.")}
    assert [tuple(v.shape) for name, v in head.items() if name.endswith("weight")] == shapes
    assert len(head) == 2 * len(shapes)  # weights and biases, no BN


def test_learning_rate_of_both_schedules():
    steps = [learning_rate(i, 200, 0, 0.03, "steps") for i in range(200)]
    assert steps[:120] == [0.03] * 120 and steps[120:160] == pytest.approx([0.003] * 40)
    assert steps[160:] == pytest.approx([0.0003] * 40)
    cosine = [learning_rate(i, 110, 10, 2.0, "cosine") for i in range(110)]
    assert cosine[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert cosine[10] == 2.0 and cosine[60] == pytest.approx(1.0) and cosine[-1] < 0.001


def test_collapse_and_a_loss_at_chance_are_warned_of(few, tmp_path, capsys, flat_encoder):
    run("moco", few, tmp_path / "flat", "--lr 1e-12 --version v1 --init", flat_encoder)
    printed = capsys.readouterr().out
    assert "the embeddings collapse" in printed and "stays at chance" in printed
    more = "--queue-size 10 --key-momentum 0.9 --lr 0.003 --optimizer adamw --epochs 4"
    run("moco", few, tmp_path / "fine", more, "--augment crop --crop-scale 0.8")
    assert "warning" not in capsys.readouterr().out
