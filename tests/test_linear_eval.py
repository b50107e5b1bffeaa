"""linear_eval.py: protocols, foreign checkpoints, files and errors."""

import argparse
import fcntl
import itertools
import json
import os
import pickle
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, refused, start, write_folder
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2 import functional as TF

import common
from linear_eval import (
    FINETUNE,
    RECIPES,
    main,
    match_checkpoint,
    open_encoder,
    train,
)


def evaluate(encoder, *more):
    """Run linear_eval.py on an encoder; `more` are flags and values, or text of several."""
    main([word for part in (encoder, *more) for word in str(part).split()])


@pytest.fixture
def encoder(folder, tmp_path):
    torch.manual_seed(7)
    path = tmp_path / "run" / "encoder.safetensors"
    path.parent.mkdir()
    about = {"architecture": "small", "stem": "3x3", "image_size": 12, "data": folder}
    common.save_encoder(path, common.build_encoder("small"), **about)
    return path


def results(path):
    return json.loads((path.parent / "eval.json").read_text())


def test_linear_is_the_probe_on_the_frozen_features(encoder, folder, capsys):
    main([str(encoder), "--seeds", "2"])
    net, _ = common.load_encoder(encoder)
    _, bank, test, _ = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    h, h_test = (common.extract_features(net, images, 12) for images in (bank, test))
    expected = []
    for seed in (0, 1):
        logits, chosen = common.linear_probe(h, bank.labels, h_test, 3, seed)
        expected.append(common.accuracy(logits, test.labels))
        run = results(encoder)[0]["runs"][seed]
        assert run["top-1"] == pytest.approx(expected[-1]) and run["top-5"] == 100
        assert run["weight_decay"] == pytest.approx(chosen["weight_decay"])
    top = results(encoder)[0]["top-1"]
    assert top["mean"] == pytest.approx(np.mean(expected))
    assert top["std"] == pytest.approx(np.std(expected, ddof=1), abs=1e-4)
    assert top["interval"] == pytest.approx(common.wilson_interval(top["mean"], 18))
    assert common.format_accuracy(top) in capsys.readouterr().out


def test_knn_has_its_parameters_in_what_it_says(encoder, folder, capsys):
    main([str(encoder), "--protocol", "knn", "--knn-k", "7", "--knn-temperature", "0.3"])
    net, _ = common.load_encoder(encoder)
    _, bank, test, _ = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    h, h_test = (common.extract_features(net, images, 12) for images in (bank, test))
    scores = common.knn_predict(h, bank.labels, h_test, 7, 0.3)
    accuracy = common.accuracy(scores, test.labels)
    printed = capsys.readouterr().out
    assert "k = 7, T = 0.3, all labels" in printed
    top = results(encoder)[0]["top-1"]
    assert top["mean"] == pytest.approx(accuracy) and "std" not in top
    assert common.format_accuracy(top) in printed


@pytest.mark.parametrize(
    ("encoder_name", "labels", "runs"),
    [("own", [], 1), ("own", ["--labels", "4"], 3), ("random", [], 3)],
)
def test_what_leaves_nothing_to_chance_runs_once_and_says_so(
    encoder, folder, tmp_path, capsys, encoder_name, labels, runs
):
    name = str(encoder) if encoder_name == "own" else "random"
    argv = [name, "--protocol", "knn", "--seeds", "3", "--knn-k", "5", *labels]
    argv += ["--arch", "small"] if name == "random" else []
    main([*argv, "--data", str(folder), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "eval.json").read_text())[0]
    assert len(result["runs"]) == runs and ("std" in result["top-1"]) == (runs > 1)
    assert ("it runs once" in capsys.readouterr().out) == (runs == 1)


def test_labels_a_class_are_drawn_by_the_seed(encoder, monkeypatch):
    seen = []
    real = common.knn_predict

    def noting(bank, labels, *rest):
        seen.append((bank, labels))
        return real(bank, labels, *rest)

    monkeypatch.setattr(common, "knn_predict", noting)
    main([str(encoder), "--protocol", "knn", "--labels", "4", "--knn-k", "12", "--seeds", "2"])
    assert [labels.bincount().tolist() for _, labels in seen] == [[4, 4, 4]] * 2
    assert not torch.equal(seen[0][0], seen[1][0])


def test_results_are_added_and_pictures_framed(encoder):
    before = encoder.read_bytes()
    main([str(encoder), "--protocol", "knn", "--seeds", "1"])
    main([str(encoder), "--protocol", "knn", "--seeds", "1", "--labels", "8"])
    assert [r["settings"].get("labels") for r in results(encoder)] == [None, 8]
    assert results(encoder)[0]["settings"]["protocol"] == "knn"
    assert encoder.read_bytes() == before
    names = {path.name for path in encoder.parent.iterdir()}
    assert names == {"encoder.safetensors", "eval.json", "neighbours.png", "features.png"}
    with Image.open(encoder.parent / "neighbours.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
        assert (26, 179, 51) in colors and (230, 26, 26) in colors  # right and wrong
        assert picture.width > 9 * 84 and picture.height > 10 * 84


def test_features_are_written(encoder, folder, tmp_path, capsys):
    path = tmp_path / "features.npz"
    argv = [
        str(encoder),
        "--protocol",
        "knn",
        "--features",
        str(path),
        "--limit",
        "20",
        "--knn-k",
        "5",
    ]
    main(argv)
    with np.load(path) as arrays:
        assert arrays["train"].shape == (20, 256) and arrays["test"].shape == (18, 256)
        assert arrays["train_labels"].shape == (20,) and set(arrays["test_labels"]) == {0, 1, 2}
        assert arrays["train"].dtype == np.float32
    assert "features.npz" in refused(capsys, main, argv)  # it is not overwritten


def test_a_random_encoder_is_drawn_anew_for_every_seed(folder, tmp_path):
    argv = [
        "random",
        "--arch",
        "small",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "a"),
        "--seeds",
        "4",
    ]
    main(argv)
    runs = json.loads((tmp_path / "a" / "eval.json").read_text())[0]["runs"]
    assert len({run["top-1"] for run in runs}) > 1
    main([*argv[:5], "--out", str(tmp_path / "b"), "--seeds", "4"])
    assert json.loads((tmp_path / "b" / "eval.json").read_text())[0]["runs"] == runs


def test_stem_size_root_batch_and_workers(folder, tmp_path, monkeypatch):
    built, sizes = [], []
    build, extract = common.build_encoder, common.extract_features
    monkeypatch.setattr(common, "build_encoder", lambda *a: built.append(a) or build(*a))
    monkeypatch.setattr(common, "extract_features", lambda *a: sizes.append(a[2:]) or extract(*a))
    monkeypatch.chdir(tmp_path)
    argv = [
        "random",
        "--data",
        str(folder),
        "--protocol",
        "knn",
        "--seeds",
        "1",
        "--workers",
        "2",
        "--root",
        "nowhere",
        "--batch-size",
        "10",
        "--image-size",
        "66",
    ]
    main(argv)
    main([*argv, "--image-size", "16"])
    main([*argv, "--image-size", "16", "--stem", "7x7"])
    assert built == [("resnet18", "7x7"), ("resnet18", "3x3"), ("resnet18", "7x7")]
    assert sizes[0] == (66, 10) and sizes[-1] == (16, 10)
    file = tmp_path / f"runs/random-resnet18-{folder.name}/eval.json"
    assert len(json.loads(file.read_text())) == 3


def test_an_encoder_that_changes_is_noticed(folder, tmp_path, monkeypatch):
    class Drifts(nn.Flatten):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    monkeypatch.setattr(common, "build_encoder", lambda *_: Drifts())
    with pytest.raises(RuntimeError, match="count"):
        main(["random", "--data", str(folder), "--out", str(tmp_path / "out"), "--seeds", "1"])


@pytest.mark.parametrize(
    "more",
    [
        ["--knn-k", "49", "--protocol", "knn"],
        ["--knn-k", "0"],
        ["--knn-temperature", "0"],
        ["--batch-size", "1", "--protocol", "finetune"],
        ["--labels", "17"],
        ["--labels", "0"],
        ["--labels", "1.5"],
        ["--labels", "many"],
        ["--seeds", "0"],
        ["--limit", "-1"],
        ["--features", "nowhere/f.npz"],
        ["--image-size", "0"],
        ["--batch-size", "0"],
        ["--workers", "0"],
        ["--data", "cifar11"],
        ["--protocol", "guess"],
        ["--arch", "vgg"],
        ["--stem", "5x5"],
        ["--seed", "1"],
        ["--recipe", "byol"],
        ["--epochs", "0"],
        ["--lr", "nan"],
        ["--normalize", "mnist"],
        ["--features", "f.npz", "--protocol", "finetune"],
        ["--knn-k", "3"],
        ["--knn-temperature", "1", "--protocol", "linear-augmented"],
        ["--recipe", "moco", "--protocol", "finetune"],
        ["--epochs", "2"],
        ["--lr", "1", "--protocol", "knn"],
        ["--arch", "small"],
        ["--stem", "3x3"],
    ],
    ids=lambda more: "".join(more),
)
def test_bad_flags_are_refused_in_one_line(encoder, capsys, more):
    error = refused(capsys, main, [encoder, *more])
    assert more[0] in error or more[1] in error
    assert not (encoder.parent / "eval.json").exists()


def test_bad_files_are_refused_in_one_line(encoder, folder, tmp_path, capsys):
    assert "nowhere" in refused(capsys, main, ["nowhere.safetensors", "--data", folder])
    (tmp_path / "file").write_text("mine")
    argv = [encoder, "--protocol", "knn", "--out"]
    assert "file" in refused(capsys, main, [*argv, tmp_path / "file"])
    (encoder.parent / "eval.json").write_text('{"mine": 1}')
    assert "eval" in refused(capsys, main, [encoder, "--protocol", "knn"])
    (encoder.parent / "eval.json").write_text("not json")
    assert "eval" in refused(capsys, main, [encoder, "--protocol", "knn"])
    assert (encoder.parent / "eval.json").read_text() == "not json"


# --------------------------------------------------------------------------------------
# Training on crops and flips
# --------------------------------------------------------------------------------------


def stripes(folder, labels=None):
    bank = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)[1]
    return (
        bank
        if labels is None
        else bank.take(common.draw_per_class(bank.labels, labels, common.generator(0)))
    )


@pytest.mark.parametrize("name", RECIPES)
def test_linear_augmented_is_the_recipes_sgd_on_crops_and_flips(folder, name):
    """Against SGD written out, on the features of torchvision's crops."""
    recipe = RECIPES[name]  # at a rate that moves the layer, and a decay that is noticed
    decay = 1e4 * recipe.weight_decay
    recipe = recipe._replace(batch_size=16, epochs=4, lr=20, weight_decay=decay)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Identity(), common.build_encoder("small"))
    with torch.no_grad():  # statistics that eval mode must use
        encoder.train()(torch.rand(32, 3, 12, 12) * 0.5)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    data = stripes(folder)
    net = train(encoder, data, 3, 12, recipe, True, 5, Accelerator())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())

    torch.manual_seed(5)
    head = nn.Linear(256, 3)
    w, v = [p.detach().clone() for p in head.parameters()], [0.0, 0.0]
    crop, steps = common.RandomResizedCrop(12, (0.08, 1.0), flip=0.5), 4 * 3
    for step in range(steps):
        plan = common.draw_plan(48, [(1, [crop])], 16, 5, torch.arange(16), step)
        index, (*u, flip) = plan.index, plan.views[0].parameters[0]
        x = torch.stack(
            [
                TF.resized_crop(image / 255, *box, [12, 12], antialias=True)
                for image, box in zip(
                    data.pixels[index], crop.boxes(*u, 12, 12).tolist(), strict=True
                )
            ]
        )
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        h = encoder.eval()(x).detach()
        p = (h @ w[0].T + w[1]).softmax(1) - nn.functional.one_hot(data.labels[index], 3)
        rate = {
            "moco": 0.1 ** sum(step >= round(d * steps) for d in (0.6, 0.8)),
            "supcon": 0.2 ** sum(step >= round(d * steps) for d in (0.6, 0.75, 0.9)),
        }.get(name, 0.5 + 0.5 * np.cos(np.pi * step / steps)) * recipe.lr
        for i, g in enumerate((p.T @ h / 16, p.mean(0))):
            g = g + {"swav": 1e-2}.get(name, 0) * w[i]
            v[i] = 0.9 * v[i] + g
            w[i] = w[i] - rate * (g + 0.9 * v[i] if name == "simclr" else v[i])
    torch.testing.assert_close(net[1].weight.detach(), w[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(net[1].bias.detach(), w[1], atol=2e-4, rtol=1e-3)
    assert (head.weight - w[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("moco", "moco"), ("swav", "swav"), ("supcon-out", "supcon"), ("drlim", "simclr")],
)
def test_the_recipe_is_that_of_the_encoders_method(encoder, folder, method, recipe):
    net, _ = common.load_encoder(encoder)
    about = {"architecture": "small", "stem": "3x3", "image_size": 12, "data": folder}
    common.save_encoder(encoder, net, **about, method=method)
    main([str(encoder), "--protocol", "linear-augmented", "--epochs", "1", "--lr", "0.1"])
    assert results(encoder)[0]["how"].startswith(f"linear-augmented, {recipe},")


def test_the_record_says_what_was_evaluated_and_how(encoder, folder, tmp_path):
    main([str(encoder), "--seeds", "2", "--labels", "0.5"])
    kept = results(encoder)[0]
    assert kept["settings"]["architecture"] == "small" and kept["settings"]["seeds"] == 2
    assert kept["how"] == "linear, 50 % of the labels" and "knn_k" not in kept["settings"]
    main(["random", "--data", str(folder), "--protocol", "knn", "--out", str(tmp_path)])
    (kept,) = json.loads((tmp_path / "eval.json").read_text())
    used = [kept["settings"][name] for name in ("architecture", "stem", "seeds", "knn_k")]
    assert used == ["resnet18", "3x3", 3, 20]


def test_recipes_are_the_papers():
    assert {k: v[:5] for k, v in RECIPES.items()} == {
        "moco": (30, 256, 100, 0, False),
        "swav": (0.3, 256, 100, 1e-6, False),
        "simclr": (0.1, 256, 90, 0, True),
        "supcon": (5, 512, 100, 0, False),
    }
    assert FINETUNE[:5] == (0.05, 256, 30, 0, True) and not FINETUNE.drops


def test_finetuning_trains_every_weight_and_leaves_the_pretrained_ones(encoder, folder):
    pretrained = nn.Sequential(nn.Identity(), common.load_encoder(encoder)[0].eval())
    start = {k: v.clone() for k, v in pretrained.state_dict().items()}
    recipe = FINETUNE._replace(batch_size=6, epochs=3, lr=0.1)
    net = train(pretrained, stripes(folder, 4), 3, 12, recipe, False, 0, Accelerator())
    for name, value in net[0].state_dict().items():
        if "num_batches" in name:
            assert value == start[name] + 6  # BN in training mode, 2 steps an epoch
        else:
            assert not torch.equal(value, start[name]), name
    argv = [str(encoder), "--protocol", "finetune", "--labels", "4", "--epochs", "3", "--lr", "0.1"]
    main([*argv, "--seeds", "2", "--batch-size", "6"])  # it would notice a changed encoder
    result = results(encoder)[-1]
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert (
        result["how"] == "finetune, learning rate 0.1, batch size 6, 3 epochs, 4 labels per class"
    )


def test_finetuning_learns(folder, tmp_path):
    folder = write_folder(tmp_path / "set", 60, 40)
    out = tmp_path / "out"
    evaluate(
        "random --arch small --data",
        str(folder),
        "--protocol finetune --lr 0.2 --epochs 30 --batch-size 30 --out",
        str(out),
    )
    assert json.loads((out / "eval.json").read_text())[0]["top-1"]["mean"] > 60


def test_rate_and_epochs_follow_batch_and_labels(encoder, capsys):
    for more, expected in [
        (
            ["finetune", "--labels", "3"],
            "finetune, learning rate 0.001758, batch size 9, 500 epochs, 3 labels per class,",
        ),
        (["finetune", "--limit", "40", "--epochs", "7"], "0.007812, batch size 40, 7 epochs,"),
        (
            ["linear-augmented", "--recipe", "supcon", "--batch-size", "16", "--epochs", "1"],
            "supcon, learning rate 0.1562, batch size 16, 1 epochs, all labels,",
        ),
        (
            ["linear-augmented", "--recipe", "moco", "--lr", "3", "--epochs", "2"],
            "linear-augmented, moco, learning rate 3, batch size 48, 2 epochs,",
        ),
        (["linear-augmented", "--epochs", "1"], "simclr, learning rate 0.01875, batch size 48,"),
    ]:
        main([str(encoder), "--protocol", *more])
        assert expected in capsys.readouterr().out


def test_finetuning_is_as_long_as_simclrs_where_there_are_images(tmp_path, capsys):
    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 300), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (4, 4, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "set" / split / name / f"{i}.png")
    argv = [
        "random",
        "--arch",
        "small",
        "--data",
        str(tmp_path / "set"),
        "--protocol",
        "finetune",
        "--out",
        str(tmp_path / "out"),
        "--batch-size",
        "2",
    ]
    main([*argv, "--labels", "0.07"])  # 42 images, 21 steps an epoch
    assert "batch size 2, 30 epochs, 7 % of the labels" in capsys.readouterr().out
    main([*argv, "--labels", "0.04"])  # 24 images
    assert "batch size 2, 60 epochs, 4 % of the labels" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["finetune", "linear-augmented"])
def test_only_the_labelled_images_are_trained_on(encoder, monkeypatch, protocol):
    seen, real = [], common.batches
    monkeypatch.setattr(
        common, "batches", lambda data, *a, **k: seen.append(data) or real(data, *a, **k)
    )
    argv = [str(encoder), "--protocol", protocol, "--epochs", "2", "--seeds", "2"]
    main([*argv, "--labels", "4"])
    assert [data.labels.bincount().tolist() for data in seen] == [[4, 4, 4]] * 2
    assert not torch.equal(seen[0].pixels, seen[1].pixels)
    main(argv)
    assert len(seen[2]) == 48


def test_one_labelled_image_is_too_few(encoder, capsys):
    assert "2 are needed" in refused(capsys, main, [encoder, "--limit", "1"])


def test_a_share_of_the_labels_is_drawn_of_each_class(encoder, folder, monkeypatch):
    seen, real = [], common.knn_predict
    monkeypatch.setattr(common, "knn_predict", lambda *a: seen.append(a[1]) or real(*a))
    main([str(encoder), "--protocol", "knn", "--labels", "0.25", "--knn-k", "3", "--seeds", "1"])
    assert seen[0].bincount().tolist() == [4, 4, 4]


def test_rates_that_are_too_high_are_reported(encoder, capsys):
    argv = [encoder, "--protocol", "finetune", "--lr", "1e30", "--epochs", "2"]
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    assert exit_.value.code == 2 and "--lr" in capsys.readouterr().err
    assert not (encoder.parent / "eval.json").exists()


def test_accuracies_by_class_are_those_of_the_predictions(encoder, folder):
    main([str(encoder), "--protocol", "knn", "--seeds", "1", "--knn-k", "5"])
    result = results(encoder)[0]
    net, _ = common.load_encoder(encoder)
    _, bank, test, _ = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    h, h_test = (common.extract_features(net, images, 12) for images in (bank, test))
    right = common.knn_predict(h, bank.labels, h_test, 5, 0.07).argmax(1) == test.labels
    expected = {
        name: 100 * right[test.labels == i].float().mean().item()
        for i, name in enumerate(("across", "along", "both"))
    }
    assert result["per-class"] == pytest.approx(expected) and len(set(expected.values())) > 1
    assert result["top-1"]["mean"] == pytest.approx(np.mean([*expected.values()]))


PROTOCOLS = [
    ["linear"],
    ["knn"],
    ["linear-augmented", "--epochs", "3", "--lr", "0.1"],
    ["finetune", "--epochs", "3", "--lr", "0.1"],
]


def evaluate_all(path, out):
    """All protocols, one after the other, in one process or in several."""
    for protocol, *more in PROTOCOLS:
        argv = ["--seeds", "2", "--batch-size", "12", "--out", f"{out}/{protocol}", *more]
        main([path, "--protocol", protocol, *argv])


def test_two_processes_give_exactly_the_accuracy_of_one(tmp_path):
    folder = write_folder(tmp_path / "set", 16, 7)  # 21 test images: 11 and 10
    torch.manual_seed(7)
    about = {"architecture": "small", "stem": "3x3", "image_size": 12, "data": folder}
    path = tmp_path / "encoder.safetensors"
    common.save_encoder(path, common.build_encoder("small"), **about)
    for n in (1, 2):
        started = start(
            "test_linear_eval.evaluate_all",
            path,
            tmp_path / str(n),
            output=tmp_path / f"{n}.txt",
            processes=n,
        )
        code, text = started.wait()
        assert code == 0 and text.count("wrote ") == 4, text
    for protocol, *_ in PROTOCOLS:
        one, two = (
            json.loads((tmp_path / n / protocol / "eval.json").read_text())[0] for n in ("1", "2")
        )
        assert 20 < one["top-1"]["mean"] < 80
        assert one["runs"] == two["runs"] and one["per-class"] == two["per-class"]


def test_a_batch_that_processes_cannot_share_is_refused(encoder, tmp_path):
    argv = [encoder, "--protocol", "finetune", "--batch-size", "9"]
    code, text = start("linear_eval", *argv, output=tmp_path / "text", processes=2).wait()
    assert code == 2 and text.count("error: --batch-size") == 1


def test_progress_is_shown_on_a_terminal(encoder):
    argv = [encoder, "--protocol", "linear-augmented", "--epochs", "2"]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "linear_eval.py"), *map(str, argv)],
        stdout=subprocess.DEVNULL,
        stderr=end,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # it ended
            break
        shown += part
    assert process.wait() == 0 and b"seed 0" in shown and b"features" in shown


def test_features_png_shows_test_images_at_their_principal_components(encoder, folder):
    main([str(encoder), "--protocol", "knn", "--seeds", "1"])
    with Image.open(encoder.parent / "features.png") as picture:
        drawn = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
    net, _ = common.load_encoder(encoder)
    test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)[2]
    h = common.extract_features(net, test, 12)
    axes = torch.linalg.svd(h - h.mean(0), full_matrices=False)[2][:2].T
    last = torch.randperm(18, generator=common.generator(0))[-1]  # nothing is drawn over it
    image = test.pixels[last] / 255
    found = []
    for signs in itertools.product((-1, 1), (-1, 1)):  # The sign of an axis is arbitrary.
        places = (h - h.mean(0)) @ axes * torch.tensor(signs)
        places = places - places.amin(0)
        places = places / places.max()  # The first axis is the longer one: it fills the width.
        places = places + (1 - places.amax(0)) / 2
        left, top = (places[last] * (1000 - 16)).long().tolist()
        there = drawn[:, max(0, top + 1) : top + 17, max(0, left + 1) : left + 17]
        windows = there.unfold(1, 12, 1).unfold(2, 12, 1)  # up to a pixel of rounding
        found.append((windows - image[:, None, None]).abs().amax((0, 3, 4)).min() < 0.01)
    assert any(found)


# --------------------------------------------------------------------------------------
# Foreign checkpoints
# --------------------------------------------------------------------------------------


def resnet(architecture="resnet18", stem="7x7", seed=1):
    torch.manual_seed(seed)
    net = common.build_encoder(architecture, stem)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return net.state_dict()


def named(weights, prefix, rename=("", "")):
    return {prefix + k.replace(*rename): v for k, v in weights.items()}


def head(prefix, *shapes):
    return {f"{prefix}{i}.weight": torch.rand(shape) for i, shape in enumerate(shapes)}


OWN, TWIN = resnet(), resnet(seed=2)
SMALL_STEM = resnet(stem="3x3")
FILES = {
    "MoCo": {
        "epoch": 3,
        "arch": "resnet18",
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.rand(3)}},
            "param_groups": [{"lr": 0.03}],
        },
        "state_dict": named(TWIN, "module.encoder_k.")
        | head("module.encoder_k.fc.", (8, 512))
        | named(OWN, "module.encoder_q.")
        | head("module.encoder_q.fc.", (8, 512))
        | {"module.queue": torch.rand(8, 16), "module.queue_ptr": torch.zeros(1)},
    },
    "MoCo v3": {
        "state_dict": named(TWIN, "module.momentum_encoder.")
        | named(OWN, "module.base_encoder.")
        | head("module.base_encoder.fc.", (8, 512))
        | head("module.predictor.", (8, 8)),
        "scaler": {"scale": 65536.0},
    },
    "SwAV": named(OWN, "module.")
    | head("module.projection_head.", (8, 512))
    | {"module.prototypes.weight": torch.rand(5, 8)},
    "SupContrast": {
        "opt": argparse.Namespace(temp=0.07, model="resnet18"),
        "epoch": 1,
        "model": named(SMALL_STEM, "encoder.module.", ("downsample", "shortcut"))
        | head("head.", (512, 512), (128, 512)),
    },
    "SimCLR port": {
        "arch": "resnet18",
        "state_dict": named(OWN, "backbone.") | head("backbone.fc.", (512, 512), (128, 512)),
    },
    "DINO": {
        "student": named(TWIN, "module.backbone.") | head("module.head.mlp.", (8, 512)),
        "teacher": named(OWN, "backbone.") | head("head.mlp.", (8, 512)),
        "epoch": 2,
        "args": argparse.Namespace(arch="resnet18"),
    },
    "Barlow Twins": {
        "epoch": 9,
        "model": named(OWN, "module.backbone.")
        | head("module.projector.", (8, 512))
        | {"module.bn.running_mean": torch.rand(8)},
    },
    "bare": OWN | {"fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)},
    "compiled": {"model": named(OWN, "_orig_mod.module.encoder.")},
    "compiled within DDP": named(OWN, "module._orig_mod."),
    "without counters": {k: v for k, v in OWN.items() if "num_batches" not in k},
    "BYOL": named(TWIN, "target_encoder.") | named(OWN, "online_encoder."),
    "after another stem": {"critic.conv1.weight": torch.rand(8, 3, 3, 3)} | named(OWN, "net."),
    "half": {k: v.half() if v.is_floating_point() else v for k, v in OWN.items()},
}


@pytest.mark.parametrize("name", FILES)
def test_foreign_checkpoints_give_their_encoder(tmp_path, name):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(FILES[name], path)
    net, about, said = open_encoder(str(path))
    expected = SMALL_STEM if name == "SupContrast" else OWN
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if name == "half" else {"atol": 0, "rtol": 0}
    for key, value in net.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, expected[key], **tolerance)
    stem = "3x3" if name == "SupContrast" else "7x7"
    assert about == {"architecture": "resnet18", "stem": stem}
    assert f"resnet18, {stem} stem" in said


def test_what_was_not_matched_is_said(tmp_path, capsys):
    path = tmp_path / "moco.pth.tar"
    torch.save(FILES["MoCo"], path)
    said = open_encoder(str(path))[2]
    assert "state_dict.encoder_q." in said and "state_dict.encoder_k (121)" in said
    assert "queue (1)" in said and "encoder_q.fc (1)" in said and "optimizer.state (1)" in said
    torch.save(FILES["without counters"], path)
    assert "not used: nothing" in open_encoder(str(path))[2]
    torch.save(FILES["compiled"], path)
    assert "from model.encoder.; not used: nothing" in open_encoder(str(path))[2]


@pytest.mark.parametrize(
    ("architecture", "stem"),
    [
        ("resnet34", "7x7"),
        ("resnet50", "3x3"),
        ("resnet50", "7x7"),
        ("resnet101", "7x7"),
        ("wide_resnet50_2", "7x7"),
    ],
)
def test_architecture_and_stem_are_read_off_the_shapes(tmp_path, architecture, stem):
    torch.save(named(resnet(architecture, stem), "module."), tmp_path / "a.pth")
    net, _, said = open_encoder(str(tmp_path / "a.pth"))
    assert f"{architecture}, {stem} stem" in said and net.width in (512, 2048)


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
@pytest.mark.parametrize("architecture", common.RESNETS)
def test_every_resnet_of_torchvision_is_recognized(architecture, stem):
    with torch.device("meta"):
        tensors = common.build_encoder(architecture, stem).state_dict()
    match = match_checkpoint({f"encoder_q.{name}": value for name, value in tensors.items()})
    assert (match.architecture, match.stem, match.wrong) == (architecture, stem, [])
    assert len(common.RESNETS) >= 10


def test_foreign_safetensors(tmp_path):
    save_file({k: v.contiguous() for k, v in OWN.items()}, tmp_path / "a.safetensors")
    net, _, _ = open_encoder(str(tmp_path / "a.safetensors"))
    assert torch.equal(net.conv1.weight, OWN["conv1.weight"])


def test_foreign_encoders_are_evaluated_with_imagenets_statistics(tmp_path, folder, capsys):
    path = tmp_path / "checkpoint.pth"
    torch.save(FILES["SwAV"], path)
    argv = [
        str(path),
        "--data",
        str(folder),
        "--protocol",
        "knn",
        "--seeds",
        "1",
        "--image-size",
        "32",
        "--knn-k",
        "5",
        "--features",
    ]
    main([*argv, str(tmp_path / "a.npz")])
    printed = capsys.readouterr().out
    assert "resnet18, 7x7 stem" in printed and "prototypes" in printed and "0.485" in printed
    main([*argv, str(tmp_path / "b.npz"), "--normalize", "none"])
    net = open_encoder(str(path))[0]
    test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)[2]
    main([*argv[:-1], "--normalize", "cifar10"])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = test.centers(torch.arange(len(test)), 32)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b, torch.no_grad():
        expected = net.eval()((x - mean) / std).numpy()
        np.testing.assert_allclose(a["test"], expected, atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(b["test"], net(x).numpy(), atol=1e-3, rtol=1e-3)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert [r["settings"]["mean"][0] for r in result] == [0.485, 0, 0.4914]
    assert [r["settings"]["std"][2] for r in result] == [0.225, 1, 0.2010]


def test_held_out_training_images_are_evaluated_instead_of_the_test_images(encoder, folder):
    evaluate(encoder, "--protocol knn --knn-k 5 --holdout 9")
    _, bank, _, held_out = common.load_splits(
        str(folder), "nowhere", None, torch.device("cpu"), 1, holdout=9
    )
    net = common.load_encoder(encoder)[0]
    h, q = (common.extract_features(net, images, 12) for images in (bank, held_out))
    scores = common.knn_predict(h, bank.labels, q, 5, 0.07)
    top = results(encoder)[0]["top-1"]
    assert top["mean"] == pytest.approx(common.accuracy(scores, held_out.labels))
    assert top["interval"] == pytest.approx(common.wilson_interval(top["mean"], 9))


def test_inputs_are_normalized_as_the_file_of_the_encoder_says(tmp_path, folder):
    path = tmp_path / "encoder.safetensors"
    torch.manual_seed(0)
    encoder = common.build_encoder("small")
    about = {"architecture": "small", "stem": "3x3", "image_size": 12, "data": folder}
    mean, std = [0.25, 0.5, 0.125], [0.5, 0.25, 2.0]
    test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)[2]
    x = test.centers(torch.arange(len(test)), 12)
    normal = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for i, (more, inputs) in enumerate([({}, x), ({"mean": mean, "std": std}, normal)]):
        common.save_encoder(path, encoder, **about, **more)
        file = tmp_path / f"{i}.npz"
        evaluate(path, "--protocol knn --knn-k 5 --features", file)
        with np.load(file) as features, torch.no_grad():
            expected = encoder.eval()(inputs).numpy()
            np.testing.assert_allclose(features["test"], expected, atol=1e-5, rtol=1e-4)
    evaluate(path, "--protocol knn --knn-k 5 --normalize none --features", tmp_path / "none.npz")
    with np.load(tmp_path / "none.npz") as none, np.load(tmp_path / "0.npz") as first:
        np.testing.assert_allclose(none["test"], first["test"], atol=1e-6)


def test_a_file_with_an_unreadable_mean_is_refused_in_one_line(tmp_path, folder, capsys):
    path = tmp_path / "encoder.safetensors"
    about = {"architecture": "small", "stem": "3x3", "image_size": 12, "data": folder}
    for more in ({"mean": "imagenet", "std": [1.0, 1.0, 1.0]}, {"mean": [0.0, 0.0, 0.0]}):
        common.save_encoder(path, common.build_encoder("small"), **about, **more)
        assert "--normalize" in refused(capsys, main, [path, "--protocol", "knn"])


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_files_without_an_encoder_are_refused_in_one_line(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def error(saved, name="a.pth"):
        if isinstance(saved, bytes):
            (tmp_path / name).write_bytes(saved)
        else:
            torch.save(saved, tmp_path / name)
        return refused(capsys, main, [name, "--data", folder])

    assert "mkdir" in error({"state_dict": OWN, "extra": RunsCode()})
    assert not (tmp_path / "harm").exists()
    assert "mkdir" in error(pickle.dumps({"state_dict": RunsCode()}, protocol=2))
    assert not (tmp_path / "harm").exists()
    vit = {"patch_embed.proj.weight": torch.rand(8, 3, 4, 4), "cls_token": torch.rand(1, 1, 8)}
    assert "patch_embed.proj.weight" in error(vit)
    assert all("no tensors" in error(empty) for empty in ({}, [1, 2], None))
    assert "encoder.safetensors" in error({"model": named(OWN, "0."), "optimizer": {}, "rows": []})
    lacking = {k: v for k, v in OWN.items() if not k.startswith("layer4.1")}
    assert "layer4.1" in error(named(lacking, "module."))
    assert "resnet18" in error(OWN | {"layer3.5.conv1.weight": torch.rand(256, 256, 3, 3)})
    assert "conv1" in error(OWN | {"conv1.weight": torch.rand(64, 3, 5, 5)})
    whole = (tmp_path / "a.pth").read_bytes()
    assert "a.pth" in error(whole[: len(whole) // 2]) and "a.pth" in error(b"no checkpoint")
    assert "b.safetensors" in error(b"no safetensors", "b.safetensors")
    assert "nowhere" in refused(capsys, main, ["nowhere.pth", "--data", folder])
    torch.save(OWN, tmp_path / "a.pth")
    assert "--data" in refused(capsys, main, ["a.pth"])  # what it was trained on is not known
    assert not (tmp_path / "eval.json").exists()
