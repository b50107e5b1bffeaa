"""drlim.py: loss, graphs and their pairs, network, the map's numbers and files, runs."""

import json
import math
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import command, finish, metrics, refused, write_folder
from PIL import Image
from torch import nn

import common
import drlim
from drlim import contrastive_loss, copies_rank, draw_map, draw_pairs, nearest, paper_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """27 images of 3 classes, 18 to test."""
    return write_folder(tmp_path_factory.mktemp("few") / "stripes", 9)


SMALL = [
    "--epochs",
    "4",
    "--neighbours",
    "2",
    "--batch-size",
    "9",
    "--workers",
    "1",
    "--eval-every",
    "2",
]  # 54 pairs: 6 steps an epoch


def arguments(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), *SMALL, *map(str, more)]


def run(folder, out, *more):
    drlim.main(arguments(folder, out, *more))
    return out


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("plain") / "run")


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same_weights(a, b):
    a, b = checkpoint(a)["model"], checkpoint(b)["model"]
    return all(torch.equal(value, b[name]) for name, value in a.items())


# ----------------------------------------------------------------------------------------- loss
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


# ---------------------------------------------------------------------------------------- graphs
def test_nearest_are_the_nearest():
    x, bank = torch.rand(50, 7, dtype=torch.float64), torch.rand(31, 7, dtype=torch.float64)
    slow = torch.stack([(bank - row).norm(dim=1).argsort()[:4] for row in x])
    assert torch.equal(nearest(x, bank, 4), slow)
    bank[3] = bank[5]  # equal rows are neighbours; a row is not its own
    own = nearest(bank, bank, 4, itself=True)
    assert own[3, 0] == 5 and own[5, 0] == 3
    assert not (own == torch.arange(31)[:, None]).any()


def test_chunks_do_not_change_who_is_nearest(monkeypatch):
    x = torch.rand(50, 3, dtype=torch.float64)
    whole = nearest(x, x, 3, itself=True)
    sizes, real = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: sizes.append(len(a)) or real(a, b))
    monkeypatch.setitem(drlim.__dict__, "max", lambda a, b: 7)
    assert torch.equal(nearest(x, x, 3, itself=True), whole) and sizes == [7] * 7 + [1]


def pairs_of(edges, partners, labels=None, copies=1, ratio=2.0, seed=0):
    i, pairs, Y = draw_pairs(edges, partners, labels, copies, ratio, common.generator(seed))
    return i, i[pairs], Y


def test_similar_pairs_are_the_edges_and_no_neighbour_is_ever_dissimilar():
    torch.manual_seed(0)
    x = torch.rand(12, 2)
    partners = nearest(x, x, 3, itself=True)
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
    partners = torch.cat([nearest(x, x, 2, itself=True), torch.arange(10)[:, None]], 1)
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
    partners = nearest(x := torch.rand(40, 2), x, 2, itself=True)
    _, pairs, Y = pairs_of(torch.arange(0, 80, 4), partners, ratio=ratio)
    assert Y.sum() == round(20 * ratio) and len(pairs) == 20 + Y.sum()


@pytest.mark.parametrize("graph", ["neighbours", "shifts", "labels"])
def test_an_epoch_passes_each_similar_pair_once_and_runs_use_their_graph(
    graph, folder, tmp_path, monkeypatch
):
    calls, real = [], draw_pairs
    monkeypatch.setattr(drlim, "draw_pairs", lambda *a: calls.append(a) or real(*a))
    run(folder, tmp_path / "run", "--graph", graph, "--epochs", 2)
    edges = torch.cat([a[0] for a in calls]).view(2, -1)
    partners, labels, copies = calls[0][1:4]
    assert torch.equal(edges[0].sort().values, torch.arange(partners.numel()))
    assert not torch.equal(edges[0], edges[1])
    train = common.load_splits(str(folder), "", None, torch.device("cpu"), 1)[1]
    if graph == "labels":
        assert torch.equal(labels, train.labels)
        assert (labels[partners] == labels[:, None]).all()
        assert not (partners == torch.arange(27)[:, None]).any()
    else:
        x = train.images.double().mean(1).flatten(1)
        slow = (x[:, None] - x).norm(dim=2).fill_diagonal_(math.inf).argsort(1)[:, :2]
        assert torch.equal(partners[:, :2], slow) and labels is None
        assert (partners.shape[1], copies) == ((3, 5) if graph == "shifts" else (2, 1))


# --------------------------------------------------------------------------------- model and map
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


def test_the_network_sees_grey_images_in_the_middle_of_32_pixels_and_their_copies_shifted(
    folder, tmp_path, monkeypatch
):
    seen, real = [], drlim.paper_network

    def network():
        net = real()
        net.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
        return net

    monkeypatch.setattr(drlim, "paper_network", network)
    run(folder, tmp_path / "run", "--epochs", 1, "--shifts", 3, -2)
    x_test, x = seen[-2:]  # the last look at the map
    train = common.load_splits(str(folder), "", None, torch.device("cpu"), 1)[1]
    grey = train.images.float().mean(1) / 255
    assert x.shape == (81, 1, 32, 32) and x_test.shape == (54, 1, 32, 32)
    for s, shift in enumerate((0, 3, -2)):
        expected = torch.zeros(27, 32, 32)
        expected[:, 10:22, 10 + shift : 22 + shift] = grey
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
    picture = draw_map(torch.tensor([[0.0, 0], [4, 0], [4, 2]]), images, kinds, 90)
    assert picture.shape == (3, 90, 90)
    for (top, left), value in zip(((20, 0), (20, 80), (60, 80)), (0.2, 0.4, 0.6), strict=True):
        assert (picture[:, top + 2 : top + 8, left + 2 : left + 8] == value).all()
    frames = picture[:, 20, 5], picture[:, 20, 85], picture[:, 60, 85]
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])
    assert (picture[:, :20] == 1).all() and (picture[:, 70:] == 1).all()


def test_a_run_leaves_its_numbers_and_map_whose_accuracy_follows_from_it(plain, folder):
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
    assert 100 * hits.double().mean().item() == pytest.approx(table[0]["5-NN"])
    assert table[0]["5-NN"] == rows[-1]["5-NN"]
    values = torch.linalg.svdvals(g - g.mean(0))
    assert table[0]["flatness"] == pytest.approx((values[1] / values[0]).item())
    assert Image.open(plain / "map.png").size == (2006, 1004)
    x, x_test = (
        v.images.double().mean(1).flatten(1) / 255
        for v in common.load_splits(str(folder), "", None, torch.device("cpu"), 1)[1:]
    )
    votes = [labels[(x - row).norm(dim=1).argsort()[:5]].bincount(minlength=3) for row in x_test]
    hits = torch.stack(votes).argmax(1) == y
    assert 100 * hits.double().mean().item() == pytest.approx(table[2]["5-NN"])
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    votes = [
        labels[((x - row) @ axes).norm(dim=1).argsort()[:5]].bincount(minlength=3) for row in x_test
    ]
    hits = torch.stack(votes).argmax(1) == y
    assert 100 * hits.double().mean().item() == pytest.approx(table[1]["5-NN"])


def test_chance_is_the_loss_of_a_map_that_is_one_point_and_is_warned_of(
    folder, tmp_path, monkeypatch, capsys
):
    real = drlim.gather
    monkeypatch.setattr(drlim, "gather", lambda z, a: 0 * real(z, a))
    for ratio in (0.01, 0.3, 2):  # of 9 pairs: 1 (at least), 3, 18 dissimilar
        rows = metrics(run(folder, tmp_path / str(ratio), "--ratio", ratio, "--margin", 1.5))
        assert all(row["loss"] == pytest.approx(row["chance"], rel=1e-6) for row in rows)
        assert "collapses to a point" in capsys.readouterr().out


def test_a_small_margin_is_no_collapse(folder, tmp_path, capsys):
    rows = metrics(run(folder, tmp_path / "run", "--margin", 0.001, "--epochs", 1))
    assert rows[0]["spread"] > 1 and "warning" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- runs
def test_training_separates_what_the_graph_separates(folder, tmp_path, capsys):
    out = run(
        folder, tmp_path / "run", "--graph", "labels", "--epochs", 30, "--lr", 0.01, "--ratio", 1
    )
    rows = metrics(out)
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"] and "warning" not in capsys.readouterr().out
    assert rows[-1]["lr"] < 1e-4 < 0.009 < rows[0]["lr"]


def test_the_same_seed_gives_the_same_run(plain, folder, tmp_path):
    again = run(folder, tmp_path / "again")
    assert same_weights(again, plain)
    assert (again / "results.json").read_text() == (plain / "results.json").read_text()
    assert (again / "map.npz").read_bytes() == (plain / "map.npz").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_bit_identical(folder, tmp_path, number):
    whole, out = run(folder, tmp_path / "whole", "--epochs", 60), tmp_path / "run"
    argv = arguments(folder, out, "--epochs", 60)
    process = command("drlim.py", *argv)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), err
    step = checkpoint(out)["step"]
    assert 0 < step < 360 and not (out / "results.json").exists() and "Traceback" not in err
    code, text, err = finish(command("drlim.py", *argv))
    assert code == 0 and f"going on after step {step} of 360" in text, err
    ends = checkpoint(whole), checkpoint(out)
    assert same_weights(whole, out) and ends[0]["step"] == ends[1]["step"]
    for a, b in zip(*(end["optimizer"]["state"].values() for end in ends), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and torch.equal(a["step"], b["step"])
    for a, b in zip(metrics(whole), metrics(out), strict=True):
        assert {k: v for k, v in a.items() if k not in ("images_per_s", "minutes_left")} == {
            k: v for k, v in b.items() if k not in ("images_per_s", "minutes_left")
        }
    assert (whole / "results.json").read_text() == (out / "results.json").read_text()


def test_each_flag_changes_the_result(plain, folder, tmp_path):
    changes = [
        ["--seed", 1],
        ["--lr", 0.01],
        ["--margin", 3],
        ["--ratio", 2],
        ["--neighbours", 3],
        ["--batch-size", 6],
        ["--epochs", 3],
        ["--graph", "labels"],
        ["--graph", "shifts"],
        ["--shifts", 1],
        ["--classes", "along", "both"],
        ["--per-class", 6],
        ["--image-size", 10],
    ]
    for i, more in enumerate(changes):
        assert not same_weights(run(folder, tmp_path / str(i), *more), plain), more
    for i, more in enumerate([["--eval-every", 3], ["--workers", 2], ["--root", "elsewhere"]]):
        assert same_weights(run(folder, tmp_path / f"no{i}", *more), plain), more


def test_classes_by_name_or_number_and_images_per_class_are_the_same_each_time(folder, tmp_path):
    out = run(folder, tmp_path / "run", "--classes", "both", 0, "--per-class", 5)
    with np.load(out / "map.npz") as file:
        assert sorted({*file["labels"].tolist()}) == [0, 2] and len(file["labels"]) == 12
        numbers, labels = file["train_indices"], file["train_labels"]
        assert np.bincount(labels).tolist() == [5, 0, 5]
        train = common.load_splits(str(folder), "", None, torch.device("cpu"), 1)[1]
        assert train.labels[numbers].tolist() == labels.tolist()
    other = run(folder, tmp_path / "other", "--classes", "both", 0, "--per-class", 5, "--seed", 3)
    with np.load(other / "map.npz") as file:
        assert np.array_equal(file["train_indices"], numbers)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_a_resnet_and_other_dimensions(folder, tmp_path, dim):
    out = run(folder, tmp_path / "run", "--arch", "small", "--dim", dim, "--epochs", 1)
    with np.load(out / "map.npz") as file:
        assert file["coordinates"].shape == (18, dim)
    encoder, about = common.load_encoder(out / "encoder.safetensors")
    assert about["method"] == "drlim" and (out / "map.png").exists()
    weights = checkpoint(out)["model"]
    assert all(torch.equal(v, weights[f"0.{name}"]) for name, v in encoder.state_dict().items())


def test_images_without_classes_have_a_map_of_their_own(folder, tmp_path):
    out = run(folder / "train" / "along", tmp_path / "run", "--batch-size", 4)
    assert "5-NN" not in json.loads((out / "results.json").read_text())[0]
    with np.load(out / "map.npz") as file:
        assert len(file["coordinates"]) == len(file["train_coordinates"]) == 9


def test_ranks_are_shown_where_there_are_copies(folder, tmp_path):
    for graph in ("shifts", "neighbours"):
        out = run(folder, tmp_path / graph, "--graph", graph, "--shifts", -2, 2, "--epochs", 2)
        with np.load(out / "map.npz") as file:
            rank = copies_rank(torch.from_numpy(file["coordinates"]), 3)
        assert json.loads((out / "results.json").read_text())[0]["rank"] == rank
        assert metrics(out)[-1]["rank"] == rank


@pytest.mark.parametrize(
    "more",
    [
        ["--margin", "0"],
        ["--margin", "nan"],
        ["--ratio", "0"],
        ["--epochs", "0"],
        ["--dim", "0"],
        ["--classes", "7"],
        ["--classes", "nowhere"],
        ["--neighbours", "26"],
        ["--batch-size", "55"],
        ["--graph", "labels", "--classes", "0"],
        ["--graph", "labels", "--classes", "0", "across"],
        ["--batch-size", "1"],
        ["--image-size", "1"],
        ["--graph", "labels", "--neighbours", "9"],
        ["--image-size", "33"],
        ["--shifts", "12"],
        ["--lr", "-1"],
        ["--seed", "-1"],
        ["--data", "cifar11"],
        ["--arch", "vgg"],
        ["--epoch", "3"],
    ],
    ids="".join,
)
def test_bad_input_is_refused_in_one_line_before_training(folder, tmp_path, capsys, more):
    error = refused(capsys, drlim.main, arguments(folder, tmp_path / "run", *more))
    assert more[0] in error or more[1] in error
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_other_settings_a_damaged_run_and_other_files_are_refused(plain, tmp_path, capsys):
    folder = write_folder(tmp_path / "data", 9)
    out = run(folder, tmp_path / "run")
    error = refused(capsys, drlim.main, arguments(folder, out, "--margin", 2))
    assert "margin" in error and "seed" not in error
    before = (out / "checkpoint.pt").read_bytes()
    run(folder, out)
    assert "finished" in capsys.readouterr().out
    assert (out / "checkpoint.pt").read_bytes() == before
    (folder / "train" / "along" / "0.png").unlink()
    assert "images" in refused(capsys, drlim.main, arguments(folder, out))
    (out / "config.json").write_text("{")
    assert "no folder of a run" in refused(capsys, drlim.main, arguments(folder, out))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    folder, tmp_path, monkeypatch, capsys
):
    calls, real = [], contrastive_loss

    def breaks(*args):  # in epoch 3
        calls.append(0)
        return real(*args) * (math.nan if len(calls) == 15 else 1)

    monkeypatch.setattr(drlim, "contrastive_loss", breaks)
    with pytest.raises(SystemExit) as exit_:
        run(folder, tmp_path / "run")
    assert exit_.value.code == 2 and "epoch 3 is not finite" in capsys.readouterr().err
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 12 and all(v.isfinite().all() for v in state["model"].values())


def test_a_set_that_does_not_fit_and_a_map_that_is_not_finite_are_one_line(
    folder, tmp_path, capsys, monkeypatch
):
    with pytest.raises(SystemExit) as exit_:
        run(folder, tmp_path / "run", "--lr", 1e18, "--batch-size", 54, "--eval-every", 1)
    assert exit_.value.code == 2 and "not finite" in capsys.readouterr().err
    monkeypatch.setattr(common, "MEMORY_LIMIT", 27 * 12 * 12 * 3 * 4 - 1)
    error = refused(capsys, drlim.main, arguments(folder, tmp_path / "large"))
    assert "27 images do not fit" in error


def test_bfloat16_trains_float32_weights(plain, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
    code, _, err = finish(command("drlim.py", *arguments(folder, tmp_path / "run")))
    assert code == 0, err
    assert all(v.dtype == torch.float32 for v in checkpoint(tmp_path / "run")["model"].values())
    exact, rounded = (metrics(out)[0]["loss"] for out in (plain, tmp_path / "run"))
    assert 0 < abs(exact - rounded) < 0.05
    with np.load(tmp_path / "run" / "map.npz") as file:  # the map is not rounded
        g = torch.from_numpy(file["coordinates"])
    assert not torch.equal(g, g.bfloat16().float())


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
            "2000",
            "--epochs",
            "6",
            "--out",
            str(out),
        ]
    )
    drl, pca, pixels = json.loads((out / "results.json").read_text())
    assert drl["5-NN"] > 75 > 70 > pca["5-NN"] and drl["flatness"] > 0.2 and pixels["5-NN"] > 95
