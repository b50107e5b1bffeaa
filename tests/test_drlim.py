"""drlim.py: loss, graphs and their pairs, network, and the map with its numbers and files."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch
from conftest import arguments, checkpoint, metrics, refused, start
from conftest import run as run_tiny
from PIL import Image
from torch import nn

import common
import drlim
from drlim import (
    FloatLinear,
    Graph,
    Samples,
    build_graph,
    contrastive_loss,
    copies_rank,
    find_nearest,
    paper_network,
    sample_pairs,
)


def run(data, out, *more):
    """A tiny run of four epochs, which looks at the map after the second and the fourth."""
    return run_tiny("drlim", data, out, "--epochs 4 --eval-every 2", *more)


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    return run(few, tmp_path_factory.mktemp("plain") / "run")


# --------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------


def slow_loss(g1, g2, dissimilar, margin):
    """Eq. 4, pair by pair."""
    total = 0
    for a, b, Y in zip(g1, g2, dissimilar, strict=True):
        D = ((a - b) ** 2).sum().sqrt()
        total = total + (1 - Y) / 2 * D**2 + Y / 2 * torch.clamp(margin - D, min=0) ** 2
    return total / len(g1)


@pytest.mark.parametrize(("N", "D", "margin"), [(1, 1, 0.5), (6, 2, 1.25), (9, 5, 3.0)])
@pytest.mark.parametrize("kind", [torch.long, torch.double, torch.bool])
def test_the_loss_and_its_gradients_are_those_of_equation_4(N, D, margin, kind):
    torch.manual_seed(N)
    g1, g2 = (torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    Y = torch.arange(N) % 2
    ours, slow = contrastive_loss(g1, g2, Y.to(kind), margin), slow_loss(g1, g2, Y, margin)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (g1, g2)), torch.autograd.grad(slow, (g1, g2)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("D", "Y", "value"), [(0, 0, 0), (1, 0, 0.5), (0.5, 1, 0.28125), (5, 1, 0)]
)
def test_vectors_at_margin_1_25(D, Y, value):
    g1, g2 = torch.zeros(2, 1, 2, dtype=torch.float64)
    g1 += torch.tensor([0.6 * D, -0.8 * D], dtype=torch.float64)
    assert abs(contrastive_loss(g1, g2, torch.tensor([Y]), 1.25).item() - value) < 1e-12


@pytest.mark.parametrize("Y", [0, 1])
def test_at_distance_0_the_gradient_is_0(Y):
    g = torch.ones(3, 2, requires_grad=True)
    loss = contrastive_loss(g, g.detach(), torch.full((3,), Y), 2.0)
    assert loss.item() == 2.0 * Y
    assert torch.equal(torch.autograd.grad(loss, g)[0], torch.zeros(3, 2))


def test_it_refuses_other_shapes():
    g, Y = torch.rand(3, 2), torch.zeros(3)
    for wrong in ((g, g[:2], Y), (g[0], g[1], Y), (g, g, Y[:2]), (g, g, Y[:, None])):
        with pytest.raises(ValueError, match="g1, g2"):
            contrastive_loss(*wrong, 1.0)


# --------------------------------------------------------------------------------------
# Graphs
# --------------------------------------------------------------------------------------


def test_nearest_are_the_nearest():
    x, bank = torch.rand(50, 7, dtype=torch.float64), torch.rand(31, 7, dtype=torch.float64)
    slow = torch.stack([(bank - row).norm(dim=1).argsort()[:4] for row in x])
    assert torch.equal(find_nearest(x, bank, 4), slow)
    bank[3] = bank[5]  # equal rows are neighbours; a row is not its own
    own = find_nearest(bank, bank, 4, exclude_self=True)
    assert own[3, 0] == 5 and own[5, 0] == 3
    assert not (own == torch.arange(31)[:, None]).any()


def test_chunks_do_not_change_who_is_nearest(monkeypatch):
    x = torch.rand(50, 3, dtype=torch.float64)
    whole = find_nearest(x, x, 3, exclude_self=True)
    sizes, real = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: sizes.append(len(a)) or real(a, b))
    monkeypatch.setitem(drlim.__dict__, "max", lambda a, b: 7)
    assert torch.equal(find_nearest(x, x, 3, exclude_self=True), whole) and sizes == [7] * 7 + [1]


def pairs_of(edges, partners, labels=None, copies=1, ratio=2.0, seed=0):
    graph = Graph(partners, copies, labels)
    i, pairs, Y = sample_pairs(graph, edges, ratio, common.generator(seed))
    return i, i[pairs], Y


def test_similar_pairs_are_the_edges_and_no_neighbour_is_ever_dissimilar():
    torch.manual_seed(0)
    x = torch.rand(12, 2)
    partners = find_nearest(x, x, 3, exclude_self=True)
    known = {(n, int(m)) for n in range(12) for m in partners[n]}
    seen = set()
    for seed in range(60):
        edges = torch.randperm(36)[:6]
        i, pairs, Y = pairs_of(edges, partners, seed=seed)
        assert len(i) == 12 and Y.tolist() == [0] * 6 + [1] * 12
        expected = [(int(e) // 3, int(partners[int(e) // 3, int(e) % 3])) for e in edges]
        assert list(map(tuple, pairs[:6].tolist())) == expected
        for a, b in pairs[6:].tolist():
            assert a != b and (a, b) not in known and (b, a) not in known
            seen.add(frozenset((a, b)))
    assert len(seen) == sum(
        (a, b) not in known and (b, a) not in known for a in range(12) for b in range(a)
    )  # each of them, at some time


def test_copies_of_an_image_and_of_its_neighbours_are_similar_in_all_shifts():
    torch.manual_seed(0)
    x = torch.rand(10, 2)
    partners = torch.cat([find_nearest(x, x, 2, exclude_self=True), torch.arange(10)[:, None]], 1)
    near, own = set(), set()
    for seed in range(200):
        edges = torch.randperm(30)[:8]
        _, pairs, Y = pairs_of(edges, partners, copies=3, seed=seed)
        for (a, b), dissimilar in zip(pairs.tolist(), Y.tolist(), strict=True):
            n, m = a // 3, b // 3
            if dissimilar:
                assert n != m and m not in partners[n] and n not in partners[m]
            elif n == m:
                assert a != b
                own.add((a % 3, b % 3))
            else:
                assert m in partners[n]
                near.add((a % 3, b % 3))
    assert len(own) == 6 and len(near) == 9  # every pair of shifts occurs


def test_labels_decide_where_they_are_the_graph_and_one_class_leaves_no_dissimilar_pair():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    partners = torch.tensor([[1], [2], [0], [4], [5], [3]])
    _, pairs, Y = pairs_of(torch.arange(6), partners, labels, ratio=5)
    assert torch.equal(labels[pairs[:, 0]] != labels[pairs[:, 1]], Y == 1) and Y.sum() == 30
    _, pairs, Y = pairs_of(torch.arange(3), partners, labels, ratio=5)
    assert len(pairs) == 3 and Y.sum() == 0
    assert contrastive_loss(*torch.rand(2, 3, 2), Y, 1.0).isfinite()


@pytest.mark.parametrize("ratio", [0.1, 1.0, 7.0])
def test_pairs_are_drawn_in_the_stated_ratio(ratio):
    partners = find_nearest(x := torch.rand(40, 2), x, 2, exclude_self=True)
    _, pairs, Y = pairs_of(torch.arange(0, 80, 4), partners, ratio=ratio)
    assert Y.sum() == round(20 * ratio) and len(pairs) == 20 + Y.sum()


def test_an_epoch_goes_through_each_similar_pair_once(few, tmp_path, monkeypatch):
    calls, real = [], sample_pairs
    monkeypatch.setattr(drlim, "sample_pairs", lambda *a: calls.append(a) or real(*a))
    run(few, tmp_path / "run", "--epochs 2")
    edges = torch.cat([edges for _, edges, *_ in calls]).view(2, -1)
    assert torch.equal(edges[0].sort().values, torch.arange(calls[0][0].partners.numel()))
    assert not torch.equal(edges[0], edges[1])


@pytest.mark.parametrize("kind", ["neighbours", "shifts", "labels"])
def test_the_graph_joins_what_is_similar(kind):
    rng, copies = common.generator(1), 3
    x = torch.rand(12 * copies, 1, 2, 2, generator=rng, dtype=torch.float64)
    labels = torch.arange(12 * copies) // 6 % 2
    samples = Samples(x, labels, torch.arange(12 * copies))
    graph = build_graph(kind, samples, 2, copies, seed=0)
    unshifted = x if kind == "neighbours" else x[::copies]
    distance = (unshifted.flatten(1)[:, None] - unshifted.flatten(1)).norm(dim=2)
    nearest = distance.fill_diagonal_(math.inf).argsort(1)[:, :2]
    if kind == "neighbours":  # copies are samples like all others
        assert torch.equal(graph.partners, nearest) and graph.copies == 1
    elif kind == "shifts":  # an image is a partner of itself, by its other copies
        itself = torch.arange(12)[:, None]
        assert torch.equal(graph.partners, torch.cat([nearest, itself], 1)) and graph.copies == 3
    else:
        assert torch.equal(graph.labels, labels) and graph.partners.shape == (36, 2)
        assert (labels[graph.partners] == labels[:, None]).all()
        assert not (graph.partners == torch.arange(36)[:, None]).any()
        other = build_graph(kind, samples, 2, copies, seed=1)
        assert not torch.equal(graph.partners, other.partners)


# --------------------------------------------------------------------------------------
# Model and map
# --------------------------------------------------------------------------------------


def test_the_network_is_the_papers():
    net = paper_network()
    shapes = []
    for module in net:
        module.register_forward_hook(lambda m, _, y: shapes.append((type(m), *y.shape[1:])))
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 30) and net.width == 30
    assert [s for s in shapes if s[0] in (nn.Conv2d, nn.AvgPool2d)] == [
        (nn.Conv2d, 15, 27, 27),
        (nn.AvgPool2d, 15, 9, 9),
        (nn.Conv2d, 30, 1, 1),
    ]


def test_the_network_sees_gray_images_in_the_middle_of_32_pixels_and_their_copies_shifted(
    few, tmp_path, monkeypatch
):
    seen, real = [], drlim.paper_network

    def network():
        net = real()
        net.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
        return net

    monkeypatch.setattr(drlim, "paper_network", network)
    run(few, tmp_path / "run", "--epochs", 1, "--shifts", 3, -2)
    x, x_test = seen[-2:]  # the last look at the map
    train = common.load_splits(str(few), "", None, torch.device("cpu"), 1)[1]
    gray = train.pixels.float().mean(1) / 255
    assert x.shape == (81, 1, 32, 32) and x_test.shape == (54, 1, 32, 32)
    for s, shift in enumerate((0, 3, -2)):
        expected = torch.zeros(27, 32, 32)
        expected[:, 10:22, 10 + shift : 22 + shift] = gray
        torch.testing.assert_close(x[s::3, 0], expected, atol=1e-6, rtol=0)


def test_rank_of_copies_counts_ties_against_us():
    g = torch.tensor([[0.0, 0], [0, 1], [0, 5], [3, 0], [3, 1], [9, 9]]).double()
    # image 0: copies at 1, 5; others from it at 3, 3.2, 12.7. Image 1: at 1, 10.8; 3, 3.2, 5.8
    ranks = []
    for n in (0, 3):
        distance = (g - g[n]).norm(dim=1)
        ranks += [sum(distance[m] <= distance[n + s] for m in range(6) if m != n) for s in (1, 2)]
    assert ranks == [1, 4, 1, 5] and copies_rank(g, 3) == 2.5
    assert copies_rank(torch.zeros(6, 2), 3) == 5  # all at one point: the last of all


def test_thumbnails_lie_at_their_places_in_the_frame_of_their_kind():
    images = torch.stack([torch.full((1, 6, 6), v) for v in (0.2, 0.4, 0.6)])
    kinds = torch.tensor([4, 4, 9])
    picture = common.draw_map(torch.tensor([[0.0, 0], [4, 0], [4, 2]]), images, kinds, 90)
    assert picture.shape == (3, 90, 90)
    for (top, left), value in zip(((20, 0), (20, 80), (60, 80)), (0.2, 0.4, 0.6), strict=True):
        assert (picture[:, top + 2 : top + 8, left + 2 : left + 8] == value).all()
    frames = picture[:, 20, 5], picture[:, 20, 85], picture[:, 60, 85]
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])
    assert (picture[:, :20] == 1).all() and (picture[:, 70:] == 1).all()


def test_a_run_leaves_its_numbers_and_map_whose_accuracy_follows_from_it(plain, few):
    assert {path.name for path in plain.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "map.png",
        "map.npz",
        "results.json",
    }
    rows, table = metrics(plain), json.loads((plain / "results.json").read_text())
    assert [(row["epoch"], row["step"]) for row in rows] == [(i, 6 * i) for i in (1, 2, 3, 4)]
    assert ["5-NN" in row for row in rows] == [False, True, False, True]
    assert [row["features"] for row in table] == ["DrLIM, 2-D", "PCA, 2-D", "pixels, 1024-D"]
    with np.load(plain / "map.npz") as file:
        g, y, i, bank, labels, numbers = (
            torch.from_numpy(file[name])
            for name in (
                "coordinates",
                "labels",
                "indices",
                "train_coordinates",
                "train_labels",
                "train_indices",
            )
        )
    assert g.shape == (18, 2) and torch.equal(i, torch.arange(18)) and len(numbers) == 27
    votes = [labels[(bank - row).norm(dim=1).argsort()[:5]].bincount(minlength=3) for row in g]
    hits = torch.stack(votes).argmax(1) == y
    assert 100 * hits.double().mean().item() == pytest.approx(table[0]["5-NN"]["mean"])
    assert table[0]["5-NN"]["interval"] == [*common.wilson_interval(rows[-1]["5-NN"], 18)]
    assert table[0]["5-NN"]["mean"] == rows[-1]["5-NN"]
    values = torch.linalg.svdvals(g - g.mean(0))
    assert table[0]["flatness"] == pytest.approx((values[1] / values[0]).item())
    assert Image.open(plain / "map.png").size == (2006, 1004)
    x, x_test = (
        v.pixels.double().mean(1).flatten(1) / 255
        for v in common.load_splits(str(few), "", None, torch.device("cpu"), 1)[1:3]
    )
    votes = [labels[(x - row).norm(dim=1).argsort()[:5]].bincount(minlength=3) for row in x_test]
    hits = torch.stack(votes).argmax(1) == y
    assert 100 * hits.double().mean().item() == pytest.approx(table[2]["5-NN"]["mean"])
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    votes = [
        labels[((x - row) @ axes).norm(dim=1).argsort()[:5]].bincount(minlength=3) for row in x_test
    ]
    hits = torch.stack(votes).argmax(1) == y
    assert 100 * hits.double().mean().item() == pytest.approx(table[1]["5-NN"]["mean"])


def test_held_out_images_are_watched_and_the_test_images_are_used_at_the_end(few, tmp_path):
    out = run(few, tmp_path / "run", "--holdout 9 --arch small --max-steps 3")
    _, bank, *others = common.load_splits(
        str(few), "nowhere", None, torch.device("cpu"), 1, holdout=9
    )
    G = torch.nn.Sequential(common.build_encoder("small", "3x3"), torch.nn.Linear(256, 2))
    G.load_state_dict(checkpoint(out)["model"])
    G.eval()
    train = drlim.load_samples(bank, [0, 1, 2], 100, 12, [], False)
    measured = []
    for images in others:
        samples = drlim.load_samples(images, [0, 1, 2], 100, 12, [], False)
        g, g_train = drlim.map_images(G, samples.x), drlim.map_images(G, train.x)
        measured.append(drlim.measure_map(g, samples, g_train, train, 3, 1))
    assert len(train.x) == 18
    result = json.loads((out / "results.json").read_text())[0]
    assert result["5-NN"]["mean"] == pytest.approx(measured[0]["5-NN"])
    for name in ("5-NN", "flatness"):
        assert metrics(out)[-1][name] == pytest.approx(measured[1][name], rel=1e-4)


def test_chance_is_the_loss_of_a_map_that_is_one_point_and_is_warned_of(
    few, tmp_path, monkeypatch, capsys
):
    real = drlim.gather
    monkeypatch.setattr(drlim, "gather", lambda z, a: 0 * real(z, a))
    for ratio in (0.01, 0.3, 2):  # of 9 pairs: 1 (at least), 3, 18 dissimilar
        rows = metrics(run(few, tmp_path / str(ratio), "--ratio", ratio, "--margin", 1.5))
        assert all(row["loss"] == pytest.approx(row["chance"], rel=1e-6) for row in rows)
        assert "collapses to a point" in capsys.readouterr().out


def test_a_small_margin_is_no_collapse(few, tmp_path, capsys):
    rows = metrics(run(few, tmp_path / "run", "--margin", 0.001, "--epochs", 1))
    assert rows[0]["spread"] > 1 and "warning" not in capsys.readouterr().out


def test_classes_by_name_or_number_and_images_per_class_are_the_same_each_time(few, tmp_path):
    out = run(few, tmp_path / "run", "--classes", "both", 0, "--per-class", 5)
    with np.load(out / "map.npz") as file:
        assert sorted({*file["labels"].tolist()}) == [0, 2] and len(file["labels"]) == 12
        numbers, labels = file["train_indices"], file["train_labels"]
        assert np.bincount(labels).tolist() == [5, 0, 5]
        train = common.load_splits(str(few), "", None, torch.device("cpu"), 1)[1]
        assert train.labels[numbers].tolist() == labels.tolist()
    other = run(few, tmp_path / "other", "--classes", "both", 0, "--per-class", 5, "--seed", 3)
    with np.load(other / "map.npz") as file:
        assert np.array_equal(file["train_indices"], numbers)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_a_resnet_and_other_dimensions(few, tmp_path, dim):
    out = run(few, tmp_path / "run", "--arch", "small", "--dim", dim, "--epochs", 1)
    with np.load(out / "map.npz") as file:
        assert file["coordinates"].shape == (18, dim)
    encoder, about = common.load_encoder(out / "encoder.safetensors")
    assert about["method"] == "drlim" and (out / "map.png").exists()
    weights = checkpoint(out)["model"]
    assert all(torch.equal(v, weights[f"0.{name}"]) for name, v in encoder.state_dict().items())


def test_images_without_classes_have_a_map_of_their_own(few, tmp_path):
    out = run(few / "train" / "along", tmp_path / "run", "--batch-size", 4)
    assert "5-NN" not in json.loads((out / "results.json").read_text())[0]
    with np.load(out / "map.npz") as file:
        assert len(file["coordinates"]) == len(file["train_coordinates"]) == 9


def test_ranks_are_shown_where_there_are_copies(few, tmp_path):
    for graph in ("shifts", "neighbours"):
        out = run(few, tmp_path / graph, "--graph", graph, "--shifts", -2, 2, "--epochs", 2)
        with np.load(out / "map.npz") as file:
            rank = copies_rank(torch.from_numpy(file["coordinates"]), 3)
        row = json.loads((out / "results.json").read_text())[0]
        assert row["rank"] == rank
        # The copies of an image are no further evidence.
        assert row["5-NN"]["interval"] == [*common.wilson_interval(row["5-NN"]["mean"], 18)]
        assert metrics(out)[-1]["rank"] == rank


def test_a_map_that_is_not_finite_is_one_line(few, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(few, tmp_path / "run", "--lr 1e18 --batch-size 54 --eval-every 1")
    assert exit_.value.code == 2 and "not finite" in capsys.readouterr().err


def test_images_that_do_not_fit_in_memory_are_refused(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "MAX_IMAGE_BYTES", 27 * 12 * 12 * 3 * 4 - 1)
    error = refused(capsys, drlim.main, arguments("drlim", few, tmp_path / "run"))
    assert "27 images do not fit" in error


def save_map(path, *argv):
    """Run drlim.py, and save the part of the map of which a step has computed the loss."""
    real = drlim.contrastive_loss

    def saving(g1, *others):
        torch.save(g1.detach(), path)
        return real(g1, *others)

    drlim.contrastive_loss = saving
    drlim.main(list(argv))


def test_bfloat16_leaves_the_map_in_float32(few, tmp_path):
    argv = (tmp_path / "g", *arguments("drlim", few, tmp_path / "run"))
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    started = start("test_drlim.save_map", *argv, output=tmp_path / "text", environment=bf16)
    code, text = started.wait()
    assert code == 0, text
    in_training = torch.load(tmp_path / "g", weights_only=True)
    assert not torch.equal(in_training, in_training.bfloat16().float())
    with np.load(tmp_path / "run" / "map.npz") as file:
        g = torch.from_numpy(file["coordinates"])
    assert not torch.equal(g, g.bfloat16().float())


def test_the_last_layer_is_exact_in_a_run_in_bfloat16():
    torch.manual_seed(0)
    layer, h = FloatLinear(8, 2), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        g = layer(h.bfloat16())
    assert torch.equal(g, layer(h.bfloat16().float()))


@pytest.mark.slow
def test_fours_and_nines_lie_apart_without_a_label(shared, tmp_path):
    subprocess.run(
        ["bash", shared / "unpack.sh", tmp_path / "data"], check=True, capture_output=True
    )
    out = tmp_path / "run"
    drlim.main(
        [
            "--data",
            "mnist",
            "--root",
            str(tmp_path / "data"),
            "--classes",
            "4",
            "9",
            "--per-class",
            "1000",
            "--epochs",
            "6",
            "--out",
            str(out),
        ]
    )
    drl, pca, pixels = json.loads((out / "results.json").read_text())
    assert drl["5-NN"]["mean"] > 75 > 70 > pca["5-NN"]["mean"] and drl["flatness"] > 0.2
    assert pixels["5-NN"]["mean"] > 95
