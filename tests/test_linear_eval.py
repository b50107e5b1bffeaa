"""linear_eval.py: protocols, recipes, labels, seeds, files, and what it refuses."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from child import Child
from torch import nn
from torchvision.io import read_image

import common
import linear_eval
from linear_eval import FINETUNE, RECIPES, adapt, draw_labeled, learning_rate, main

ROOT = Path(__file__).resolve().parent.parent
BRIEF = ["--epochs", "2", "--batch-size", "40", "--lr", "0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 training images and 100 test images of the bundled ones, in equal numbers of a class."""
    bundled = np.load(ROOT / "data" / "fashion-mini.npz")
    arrays = {}
    for split, count in (("train", 20), ("test", 10)):
        labels = bundled[f"{split}_labels"]
        chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)])
        arrays[f"{split}_images"] = bundled[f"{split}_images"][chosen]
        arrays[f"{split}_labels"] = labels[chosen]
    path = tmp_path_factory.mktemp("data") / "some.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def splits(data):
    return common.load_splits(data, "nowhere", None, torch.device("cpu"), 1)[1:]


@pytest.fixture
def encoder(data, tmp_path):
    """The file of an encoder whose batch statistics are not those of its running averages."""
    torch.manual_seed(7)
    network = common.build_encoder("small")
    network(torch.randn(32, 3, 28, 28))
    path = tmp_path / "run" / "encoder.safetensors"
    about = {"architecture": "small", "stem": "3x3", "image_size": 28}
    common.save_encoder(path, network, **about, data=data)
    return path


def evaluate(path, *more):
    """Evaluate an encoder; its last result."""
    main([str(path), *map(str, more)])
    return json.loads((path.parent / "eval.json").read_text())[-1]


def features(path, splits):
    """The features of training and test images, written out."""
    network = common.load_encoder(path)[0].eval()
    pixels = [part.pixels.expand(-1, 3, -1, -1) / 255 for part in splits]
    with torch.no_grad():
        return [network(common.normalize(x)) for x in pixels]


# --------------------------------------------------------------------------------------
# Protocols
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", linear_eval.USED_BY)
def test_a_protocol_prints_and_adds_its_result(encoder, data, capsys, protocol):
    before = encoder.read_bytes()
    for seeds in (1, 2):
        evaluate(encoder, "--protocol", protocol, "--seeds", seeds, *BRIEF)
    first, last = json.loads((encoder.parent / "eval.json").read_text())
    assert encoder.read_bytes() == before
    assert first["runs"] == last["runs"][:1] and len(last["runs"]) == 2 and "std" not in first

    tops = [run["top-1"] for run in last["runs"]]
    assert last["mean"]["top-1"] == pytest.approx(np.mean(tops))
    assert last["std"]["top-1"] == pytest.approx(np.std(tops, ddof=1))
    assert (last["protocol"], last["data"], last["image_size"]) == (protocol, data, 28)
    assert last.get("recipe") == ("simclr" if protocol == "linear-augmented" else None)
    printed = capsys.readouterr().out
    assert f"image_size 28, arch small, stem 3x3, protocol {protocol}" in printed
    assert "100 test images in percent, ± 9.8" in printed and "seed std" in printed
    assert (encoder.parent / "neighbours.png").exists() == (protocol in ("linear", "knn"))


def test_linear_is_the_probe_on_frozen_features(encoder, splits):
    bank, test = splits
    h, h_test = features(encoder, splits)
    run = evaluate(encoder, "--seeds", 2)["runs"][1]
    logits = common.linear_probe(h, bank.labels, h_test, 1)
    assert run["top-1"] == pytest.approx(common.accuracy(logits, test.labels))
    rank = (logits > logits.gather(1, test.labels[:, None])).sum(1)
    assert run["top-5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert 30 < run["top-1"] < run["top-5"] < 100


def test_knn_uses_its_flags(encoder, splits):
    bank, test = splits
    h, h_test = features(encoder, splits)
    result = evaluate(encoder, "--protocol", "knn", "--knn-k", 7, "--knn-temperature", 0.3)
    expected = common.accuracy(common.knn_predict(h, bank.labels, h_test, 7, 0.3), test.labels)
    assert result["mean"]["top-1"] == pytest.approx(expected)
    assert (result["knn_k"], result["knn_temperature"]) == (7, 0.3)


@pytest.mark.parametrize("name", RECIPES)
def test_linear_augmented_is_sgd_on_frozen_features_of_crops(encoder, splits, name):
    network = common.load_encoder(encoder)[0].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    recipe = RECIPES[name]._replace(epochs=5, batch_size=50, lr=2)
    recipe = recipe._replace(weight_decay=1e4 * recipe.weight_decay)  # so that it is noticed
    trained = linear_eval.train(network, splits[0], 28, recipe, True, Accelerator(), 3)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    torch.manual_seed(3)
    W, b = (parameter.detach() for parameter in nn.Linear(256, 10).parameters())
    velocity = [torch.zeros_like(W), torch.zeros_like(b)]
    crops = [(1, [common.RandomResizedCrop(28, (0.08, 1.0))])]
    batches = common.batches(splits[0], crops, 50, 3, range(5 * 4))
    for step, (index, (views,)) in enumerate(batches):
        h = network(views[0]).detach()
        error = (h @ W.T + b).softmax(1) - F.one_hot(splits[0].labels[index], 10)
        rate = learning_rate(recipe, step, 20)
        for w, v, gradient in zip((W, b), velocity, (error.T @ h / 50, error.mean(0)), strict=True):
            gradient = gradient + recipe.weight_decay * w
            v.mul_(0.9).add_(gradient)
            w -= rate * (gradient + 0.9 * v if name == "simclr" else v)
    torch.testing.assert_close(trained[1].weight.detach(), W, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(trained[1].bias.detach(), b, atol=1e-4, rtol=1e-3)


def test_finetuning_trains_every_weight_of_a_copy(encoder, splits):
    network = common.load_encoder(encoder)[0].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    recipe = FINETUNE._replace(epochs=2, batch_size=50)
    trained = linear_eval.train(network, splits[0], 28, recipe, False, Accelerator(), 0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(
        not torch.equal(value, before[key]) for key, value in trained[0].state_dict().items()
    )
    assert trained[0][0][1].num_batches_tracked == before["0.1.num_batches_tracked"] + 2 * 4


# --------------------------------------------------------------------------------------
# Recipes, labels, seeds
# --------------------------------------------------------------------------------------


def test_recipes_are_the_authors():
    # Batch size, epochs, weight decay and Nesterov's momentum.
    assert {name: recipe[1:5] for name, recipe in RECIPES.items()} == {
        "simclr": (256, 90, 0, True),
        "moco": (256, 100, 0, False),
        "swav": (256, 100, 1e-6, False),
        "supcon": (512, 100, 0, False),
    }
    assert FINETUNE[1:5] == (256, 30, 0, True)


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        (RECIPES["simclr"], {0: 0.1, 50: 0.05, 75: 0.0146447, 99: 2.467e-5}),
        (RECIPES["moco"], {0: 30, 59: 30, 60: 3, 79: 3, 80: 0.3, 99: 0.3}),
        (RECIPES["swav"], {0: 0.3, 50: 0.15, 99: 7.4e-5}),
        (RECIPES["supcon"], {59: 5, 60: 1, 74: 1, 75: 0.2, 89: 0.2, 90: 0.04}),
        (FINETUNE, {0: 0.05, 50: 0.025}),
    ],
)
def test_the_learning_rate_is_that_of_the_recipe(recipe, rates):
    for step, rate in rates.items():
        assert learning_rate(recipe, step, 100) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "flags", "labeled", "images", "rate", "batch_size", "epochs"),
    [
        (RECIPES["moco"], {}, 2000, 2000, 30, 256, 100),
        (RECIPES["supcon"], {"batch_size": 256}, 2000, 2000, 2.5, 256, 100),
        (RECIPES["simclr"], {}, 64, 2000, 0.025, 64, 90),
        (RECIPES["swav"], {"lr": 2, "epochs": 3}, 2000, 2000, 2, 256, 3),
        (FINETUNE, {}, 12800, 128000, 0.05, 256, 30),  # 10 % of the labels
        (FINETUNE, {}, 12800, 1280000, 0.05, 256, 60),  # 1 %
        (FINETUNE, {}, 100, 10000, 0.05 * 100 / 256, 100, 500),  # a step an epoch
        (FINETUNE, {"epochs": 7}, 100, 10000, 0.05 * 100 / 256, 100, 7),
    ],
)
def test_recipes_follow_labels_and_flags(recipe, flags, labeled, images, rate, batch_size, epochs):
    args = argparse.Namespace(**{"lr": None, "batch_size": None, "epochs": None} | flags)
    adapted = adapt(recipe, args, labeled, images)
    assert adapted.lr == pytest.approx(rate)
    assert (adapted.batch_size, adapted.epochs) == (batch_size, epochs)


def test_labels_are_drawn_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 3)
    for amount, counts in ((2, [2, 2, 2]), (3, [3, 3, 3]), (0.1, [1, 2, 1]), (0.5, [5, 10, 2])):
        drawn = draw_labeled(labels, amount, 0)
        assert labels[drawn].bincount().tolist() == counts and len(drawn.unique()) == len(drawn)
    assert torch.equal(draw_labeled(labels, None, 5), torch.arange(33))
    assert torch.equal(draw_labeled(labels, 3, 1), draw_labeled(labels, 3, 1))
    assert not torch.equal(draw_labeled(labels, 3, 1), draw_labeled(labels, 3, 2))
    with pytest.raises(SystemExit, match="only 3 images"):
        draw_labeled(labels, 4, 0)


USERS = {"linear": (common, "linear_probe"), "knn": (common, "knn_predict")}


@pytest.mark.parametrize("protocol", linear_eval.USED_BY)
def test_only_drawn_labels_are_used(encoder, monkeypatch, protocol):
    module, name = USERS.get(protocol, (linear_eval, "train"))
    seen = []
    real = getattr(module, name)

    def noting(first, second, *rest):
        used = (first, second) if module is common else (second.pixels, second.labels)
        seen.append((*used, rest[-1]))
        return real(first, second, *rest)

    monkeypatch.setattr(module, name, noting)
    evaluate(encoder, "--protocol", protocol, "--labels", 3, "--seeds", 2, *BRIEF)
    (x, y, seed), (x_next, y_next, seed_next) = seen
    assert protocol == "knn" or (seed, seed_next) == (0, 1)
    assert len(x) == len(x_next) == 30 and not torch.equal(x, x_next)
    assert y.bincount().tolist() == y_next.bincount().tolist() == [3] * 10


def test_a_random_encoder_is_new_for_every_seed(data, tmp_path, capsys):
    flags = f"random --arch small --data {data} --protocol knn --seeds 3 --limit 150 --out"
    runs = []
    for name in ("a", "b"):
        main([*flags.split(), str(tmp_path / name)])
        (result,) = json.loads((tmp_path / name / "eval.json").read_text())
        runs.append(result["runs"])
    assert runs[0] == runs[1] and len({run["top-1"] for run in runs[0]}) > 1
    assert (result["limit"], result["arch"], result["stem"]) == (150, "small", "3x3")
    assert "train: 150 images" in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# Files, pictures, processes, mistakes
# --------------------------------------------------------------------------------------


def test_checkpoints_of_others_are_evaluated(data, splits, tmp_path):
    torch.manual_seed(1)
    network = common.build_encoder("resnet18", "7x7")
    weights = {f"module.encoder_q.{key}": value for key, value in network.state_dict().items()}
    other = common.build_encoder("resnet18", "7x7").state_dict()
    weights |= {f"module.encoder_k.{key}": value for key, value in other.items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "moco.pth.tar")

    flags = ["--arch", "resnet18", "--data", data, "--protocol", "knn", "--image-size", 32]
    top = evaluate(tmp_path / "moco.pth.tar", *flags)["mean"]["top-1"]
    h, h_test = (common.extract_features(network, images, 32) for images in splits)
    votes = common.knn_predict(h, splits[0].labels, h_test)
    assert top == pytest.approx(common.accuracy(votes, splits[1].labels))


def test_neighbors_stand_beside_their_test_image(tmp_path):
    """Gray images, whose features lie on a quarter circle in the order of their brightness."""

    def grays(levels, labels):
        pixels = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 20, 20)
        angle = torch.tensor(levels) / 256 * torch.pi / 2
        images = common.Images(pixels, None, torch.tensor(labels), torch.device("cpu"), 1)
        return torch.stack([angle.cos(), angle.sin()], dim=1), images

    h, bank = grays([10 * i for i in range(20)], [i % 2 for i in range(20)])
    h_test, test = grays([62, 121], [0, 0])
    linear_eval.save_neighbors(tmp_path / "a.png", h, bank, h_test, test, 20)
    picture = read_image(str(tmp_path / "a.png"))
    # Small images are enlarged, to 66 pixels here, and the grid has lines of two pixels between.
    cells = [picture[:, y::68, x::68] for y, x in ((35, 35), (3, 35))]
    middles, frames = [cell[:, :2, :9].permute(1, 2, 0) for cell in cells]
    expected = {62: [60, 70, 50, 80, 40, 90, 30, 100], 121: [120, 130, 110, 140, 100, 150, 90, 160]}
    for middle, frame in zip(middles, frames, strict=True):
        query, *nearest = middle[:, 0].tolist()
        assert nearest == expected.pop(query)
        assert frame[0].tolist() == [255, 255, 255]
        for level, (red, green, _) in zip(nearest, frame[1:].tolist(), strict=True):
            assert (green > red) == (level % 20 == 0)  # Even ones are of class 0.


def evaluate_all(encoder: str, out: str) -> None:
    """Evaluate by each protocol, and refuse a batch that two processes cannot share."""
    for protocol in linear_eval.USED_BY:
        flags = ["--protocol", protocol, "--labels", "8", "--out", f"{out}/{protocol}"]
        main([encoder, *flags, *BRIEF])
    if Accelerator().num_processes > 1:
        with pytest.raises(SystemExit, match=r"--batch-size 9|2"):
            main([encoder, "--protocol", "finetune", "--batch-size", "9"])


def test_two_processes_give_the_result_of_one(encoder, tmp_path):
    argv = (str(encoder), str(tmp_path))
    source = f"from test_linear_eval import evaluate_all\nevaluate_all(*{argv})"
    printed = Child(source, tmp_path / "printed", processes=2).end(0, 0)
    assert printed.count("processes: 2") == 5
    evaluate_all(*argv)
    for protocol in linear_eval.USED_BY:
        two, one = json.loads((tmp_path / protocol / "eval.json").read_text())
        assert one == two


def test_files_that_are_missing_or_say_too_little_are_refused(data, tmp_path):
    torch.save({"state_dict": common.build_encoder("resnet18").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(SystemExit, match="--data"):
        main([str(tmp_path / "a.pth"), "--arch", "resnet18"])
    with pytest.raises(SystemExit, match="--data"):
        main(["random"])
    with pytest.raises(SystemExit, match="nowhere"), common.one_line_errors():
        main(["nowhere.safetensors", "--data", data])
    np.savez(tmp_path / "bare.npz", train_images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(SystemExit, match="no labeled"):
        main(["random", "--data", str(tmp_path / "bare.npz")])
