"""drlim.py: the loss, graphs and their pairs, the network, the map, and runs."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
import drlim
from drlim import Samples, build_graph, contrastive_loss, find_nearest, sample_pairs

TINY = ["--epochs", "2", "--eval-every", "1", "--batch-size", "9", "--neighbours", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """27 training images and 18 test images of three classes."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 27), ("test", 18)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(3).repeat(count // 3)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def splits(data):
    """Its training images and its test images."""
    return common.load_splits(data, "", None, torch.device("cpu"), 0)[1:]


def run(data, out, *more):
    drlim.main(["--data", data, "--out", str(out), *TINY, *map(str, more)])
    return out


def table(out):
    return json.loads((out / "results.json").read_text())


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"images/s": 0} for line in lines]


def random_samples(images, copies, classes=3):
    x = torch.rand(images * copies, 1, 4, 4, generator=common.generator(1))
    return Samples(x, (torch.arange(images) % classes).repeat_interleave(copies), copies)


@pytest.mark.parametrize(("N", "dim", "margin"), [(1, 1, 0.5), (6, 2, 1.25), (9, 5, 3.0)])
def test_loss_and_gradients_are_those_of_equation_4(N, dim, margin):
    torch.manual_seed(N)
    g = torch.randn(2, N, dim, dtype=torch.float64, requires_grad=True)
    Y = torch.arange(N) % 2
    slow = 0
    for n in range(N):
        D = (g[0, n] - g[1, n]).square().sum().sqrt()
        slow += (1 - Y[n]) / 2 * D**2 + Y[n] / 2 * torch.clamp(margin - D, min=0) ** 2
    loss = contrastive_loss(g[0], g[1], Y, margin)
    torch.testing.assert_close(loss, slow / N, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, g)[0] for value in (loss, slow / N))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# Similar pairs, Y = 0, are pulled together; dissimilar ones are pushed apart up to the margin.
@pytest.mark.parametrize(
    ("D", "Y", "value"),
    [(0, 0, 0), (1, 0, 0.5), (0.5, 1, 0.28125), (1, 1, 0.03125), (5, 1, 0), (5, 0, 12.5)],
)
def test_vectors_at_margin_1_25(D, Y, value):
    g1, g2 = torch.zeros(2, 1, 2, dtype=torch.float64)
    g1 += torch.tensor([0.6 * D, -0.8 * D], dtype=torch.float64)
    assert contrastive_loss(g1, g2, torch.tensor([Y]), 1.25).item() == pytest.approx(value, 1e-12)


@pytest.mark.parametrize("Y", [0, 1])
def test_at_distance_0_the_gradient_is_0(Y):
    g = torch.ones(3, 2, requires_grad=True)
    loss = contrastive_loss(g, g.detach(), torch.full((3,), Y), 2.0)
    assert loss.item() == 2.0 * Y
    assert torch.equal(torch.autograd.grad(loss, g)[0], torch.zeros(3, 2))


def test_nearest_rows_are_found_and_may_exclude_their_own_group():
    bank = torch.rand(30, 7, dtype=torch.float64, generator=common.generator(0))
    queries = torch.rand(50, 7, dtype=torch.float64, generator=common.generator(1))
    slow = torch.stack([(bank - row).norm(dim=1).argsort()[:4] for row in queries])
    assert torch.equal(find_nearest(queries, bank, 4), slow)
    groups = torch.arange(30) // 3
    for i, nearest in enumerate(find_nearest(bank, bank, 4, groups)):
        order = (bank - bank[i]).norm(dim=1).argsort()
        assert torch.equal(nearest, order[groups[order] != groups[i]][:4])


@pytest.mark.parametrize("kind", ["neighbours", "shifts-by-pixels", "shifts"])
def test_the_graph_joins_the_nearest_by_pixels_and_with_shifts_their_copies(kind):
    copies = 1 if kind == "neighbours" else 3
    samples = random_samples(12, copies)
    partners, groups = build_graph(kind, samples, 2)
    known = copies if kind == "shifts" else 1  # how many copies are known to be of one image
    x = samples.x[::known].flatten(1)
    for m in range(len(samples.x)):
        nearest = (x - x[m // known]).norm(dim=1).argsort()[:3].tolist()  # the image, and two
        expected = {n * known + copy for n in nearest for copy in range(known)} - {m}
        assert len(partners[m]) == len(expected) and set(partners[m].tolist()) == expected
        assert groups[m] == m // known


def test_the_graph_of_labels_joins_random_images_of_a_class():
    samples = random_samples(60, 1)
    partners, groups = build_graph("labels", samples, 4)
    assert torch.equal(groups, samples.labels) and partners.shape == (60, 4)
    assert (samples.labels[partners] == samples.labels[:, None]).all()
    assert len(partners.unique()) > 50  # They are not always the same ones.


@pytest.mark.parametrize(
    ("kind", "copies", "ratio", "dissimilar"),
    [("neighbours", 1, 0.01, 1), ("shifts", 3, 0.5, 3), ("labels", 1, 2.0, 12)],
)
def test_pairs_are_edges_and_others_that_are_not_similar(kind, copies, ratio, dissimilar):
    partners, groups = build_graph(kind, random_samples(12, copies), 2)
    M, k = partners.shape
    similar = groups[:, None] == groups
    for m in range(M):
        similar[m, partners[m]] = similar[partners[m], m] = True
    seen = torch.zeros(M, M, dtype=torch.bool)
    for seed in range(500):
        rng = common.generator(seed)
        edges = torch.randperm(M * k, generator=rng)[:6]
        i, pairs, Y = sample_pairs(partners, groups, edges, ratio, rng)
        a, b = i[pairs].unbind(1)
        assert len(i) == 12 and Y.tolist() == [0] * 6 + [1] * dissimilar
        assert torch.equal(a[:6], edges // k) and torch.equal(b[:6], partners.flatten()[edges])
        assert not similar[a[6:], b[6:]].any()
        seen[a[6:], b[6:]] = seen[b[6:], a[6:]] = True
    assert (seen == ~similar).float().mean() > 0.9  # Nearly each dissimilar pair has been drawn.


def test_a_step_may_have_no_dissimilar_pair():
    partners, groups = torch.tensor([[1], [0]]), torch.tensor([0, 0])
    i, pairs, Y = sample_pairs(partners, groups, torch.arange(2), 1.0, common.generator(0))
    assert i.tolist() == [0, 1, 1, 0] and Y.tolist() == [0, 0] and len(pairs) == 2


def test_images_are_gray_in_the_middle_of_32_pixels_and_shifted(splits):
    x, labels, copies = drlim.load_samples(splits[0], [2, 0], None, 12, True, drlim.SHIFTS)
    gray = splits[0].pixels[splits[0].labels != 1].float().mean(1) / 255
    assert x.shape == (18 * 5, 1, 32, 32) and copies == 5
    assert torch.equal(labels, torch.tensor([0, 2]).repeat_interleave(9 * 5))
    for copy, shift in enumerate((0, -6, -3, 3, 6)):
        expected = torch.zeros(18, 32, 32)
        expected[:, 10:22, 10 + shift : 22 + shift] = gray
        torch.testing.assert_close(x[copy::5, 0], expected, atol=1e-6, rtol=0)


def test_the_network_is_the_papers():
    network, x = drlim.paper_network(), torch.rand(2, 1, 32, 32)
    shapes = [(x := layer(x)).shape[1:] for layer in network]
    assert [tuple(shapes[i]) for i in (0, 2, 3, 5)] == [(15, 27, 27), (15, 9, 9), (30, 1, 1), (30,)]
    assert network.width == 30


def test_the_quality_of_a_map():
    train = random_samples(20, 3)
    test = random_samples(12, 3)._replace(x=random_samples(36, 2).x[36:])
    row, g = drlim.measure(lambda x: x.flatten(1)[:, :2], train, test)
    assert torch.equal(g, test.x.flatten(1)[:, :2])
    nearest = torch.cdist(g, train.x.flatten(1)[:, :2]).argsort(1)[:, :5]
    votes = torch.stack([train.labels[five].bincount(minlength=3) for five in nearest])
    hits = votes.argmax(1) == test.labels
    assert row["5-NN"] == pytest.approx(100 * hits.float().mean().item())
    order = torch.cdist(g, g).argsort(1).tolist()
    ranks = [order[n].index(n + copy) for n in range(0, 36, 3) for copy in (1, 2)]
    assert row["rank"] == sorted(ranks)[11]
    low, high = torch.linalg.eigvalsh(g.T.cov())
    assert row["flatness"] == pytest.approx(math.sqrt(low / high), rel=1e-3)


def test_images_measured_among_themselves_are_not_their_own_neighbours():
    x = torch.rand(40, 1, 1, 2, generator=common.generator(0)).repeat_interleave(2, dim=0)
    samples = Samples(x, torch.arange(40).repeat_interleave(2) % 2, 2)  # equal copies, random class
    assert drlim.measure(torch.nn.Flatten(), samples, samples)[0]["5-NN"] < 75


def test_images_are_drawn_at_their_places_in_the_frame_of_their_kind():
    images = torch.tensor([0.2, 0.4, 0.6])[:, None, None, None].expand(3, 1, 6, 6)
    places = torch.tensor([[0.0, 0], [4, 0], [4, 2]])
    picture = drlim.draw_map(places, images, torch.tensor([4, 4, 9]), 90)
    corners = [(0, 0), (0, 80), (40, 80)]  # top and left
    for (top, left), image in zip(corners, images, strict=True):
        assert (picture[:, top + 2 : top + 8, left + 2 : left + 8] == image).all()
    frames = [picture[:, top, left].tolist() for top, left in corners]
    assert frames[0] == frames[1] != frames[2] and (picture[:, 50:] == 1).all()


@pytest.mark.parametrize("graph", drlim.GRAPHS)
def test_a_run_leaves_its_metrics_and_its_map(data, tmp_path, graph):
    out = run(data, tmp_path / "run", "--graph", graph)
    files = ["checkpoint.pt", "config.json", "map.npz", "map.png", "metrics.jsonl", "results.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    rows, copies = metrics(out), 5 if graph.startswith("shifts") else 1
    drl, pca, pixels = table(out)
    assert [row["features"] for row in table(out)] == ["DrLIM", "PCA", "raw pixels"]
    names = ["5-NN", "rank", "flatness"] if copies > 1 else ["5-NN", "flatness"]
    assert list(drl) == list(pca) == ["features", *names] and "flatness" not in pixels
    assert all(drl[name] == rows[-1][name] for name in names)
    with np.load(out / "map.npz") as file:
        g, labels = file["coordinates"], file["labels"]
    assert g.shape == (18 * copies, 2) and labels.tolist() == [*np.arange(3).repeat(6 * copies)]
    values = np.linalg.svd(g - g.mean(0), compute_uv=False)
    assert drl["flatness"] == pytest.approx(values[1] / values[0], rel=1e-4)
    assert Image.open(out / "map.png").size == (2006, 1004)


def test_a_run_ten_times_as_long_does_not_crush_the_map(tmp_path):
    flags, maps = ("--limit", 300, "--batch-size", 64), []
    for epochs in (3, 30):
        out = run("fashion-mini", tmp_path / str(epochs), *flags, "--epochs", epochs)
        maps.append(table(out)[0])
    short, long = maps
    assert long["flatness"] > max(0.3, short["flatness"] / 2) and long["5-NN"] > short["5-NN"] - 5


def test_another_network_has_normalized_inputs_and_is_exported(data, splits, tmp_path):
    out = run(data, tmp_path / "run", "--arch", "small", "--dim", 3)
    encoder, about = common.load_encoder(out / "encoder.safetensors")
    assert about["architecture"] == "small" and about["image_size"] == 12
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    h = common.extract_features(encoder, splits[1], 12)
    with np.load(out / "map.npz") as file:
        g = h @ weights["2.weight"].T + weights["2.bias"]
        np.testing.assert_allclose(file["coordinates"], g, atol=1e-4)


@pytest.mark.parametrize("labeled", [True, False])
def test_without_test_images_the_training_images_are_mapped(tmp_path, labeled):
    images = np.random.default_rng(0).integers(0, 256, (18, 12, 12), dtype=np.uint8)
    labels = {"train_labels": np.arange(18) % 3} if labeled else {}
    np.savez(tmp_path / "one.npz", train_images=images, **labels)
    out = run(str(tmp_path / "one.npz"), tmp_path / "run", "--dim", 1)
    assert all(("5-NN" in row) == labeled for row in table(out))
    with np.load(out / "map.npz") as file:
        assert file["coordinates"].shape == (18, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--classes 0 7", "--classes 7: there are no such images"),
        ("--neighbours 26", "--neighbours 26 is too many"),
        ("--per-class 1 --classes 0", "too many for 1 images"),
        ("--batch-size 20 --classes 0", "--batch-size 20 is more than there are similar pairs"),
        ("--graph labels --classes 1", "at least two --classes"),
        ("--init encoder.safetensors", "--init needs an --arch"),
    ],
)
def test_mistakes_end_in_one_line(data, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        run(data, tmp_path / "run", *flags.split())
