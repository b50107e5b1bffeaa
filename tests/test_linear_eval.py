"""linear_eval.py: protocols, files and errors."""

import json

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

import common
from linear_eval import frozen_features, main


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
    _, bank, test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    h, h_test = (common.extract_features(net, images, 12) for images in (bank, test))
    expected = []
    for seed in (0, 1):
        logits, chosen = common.linear_probe(h, bank.labels, h_test, 3, seed)
        expected.append(common.accuracy(logits, test.labels))
        run = results(encoder)[0]["runs"][seed]
        assert run["top-1"] == pytest.approx(expected[-1]) and run["top-5"] == 100
        assert float(run["lr"]) == pytest.approx(chosen["lr"])
    assert results(encoder)[0]["top-1"] == pytest.approx(np.mean(expected))
    assert results(encoder)[0]["top-1 std"] == pytest.approx(np.std(expected, ddof=1), abs=1e-4)
    assert f"top-1 {np.mean(expected):.2f}" in capsys.readouterr().out


def test_knn_has_its_parameters_in_what_it_says(encoder, folder, capsys):
    main([str(encoder), "--protocol", "knn", "--knn-k", "7", "--knn-temperature", "0.3"])
    net, _ = common.load_encoder(encoder)
    _, bank, test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    h, h_test = (common.extract_features(net, images, 12) for images in (bank, test))
    scores = common.knn_predict(h, bank.labels, h_test, 7, 0.3)
    accuracy = common.accuracy(scores, test.labels)
    printed = capsys.readouterr().out
    assert f"k = 7, T = 0.3, all labels a class, 3 seeds: top-1 {accuracy:.2f} ± 0.00" in printed


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
    assert names == {"encoder.safetensors", "eval.json", "neighbours.png"}
    with Image.open(encoder.parent / "neighbours.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
        assert (26, 179, 51) in colours and (230, 26, 26) in colours  # right and wrong
        assert picture.width > 9 * 84 and picture.height > 10 * 84


def test_features_are_written(encoder, folder, tmp_path, capsys):
    path = tmp_path / "features.npz"
    argv = [str(encoder), "--protocol", "knn", "--features", str(path), "--limit", "20",
            "--knn-k", "5"]
    main(argv)
    with np.load(path) as arrays:
        assert arrays["train"].shape == (20, 256) and arrays["test"].shape == (18, 256)
        assert arrays["train_labels"].shape == (20,) and set(arrays["test_labels"]) == {0, 1, 2}
        assert arrays["train"].dtype == np.float32
    assert "features.npz" in refused(capsys, main, argv)  # it is not overwritten


def test_a_random_encoder_is_drawn_anew_for_every_seed(folder, tmp_path):
    argv = ["random", "--arch", "small", "--data", str(folder), "--out", str(tmp_path / "a"),
            "--seeds", "4"]
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
    argv = ["random", "--data", str(folder), "--protocol", "knn", "--seeds", "1", "--workers", "2",
            "--root", "nowhere", "--batch-size", "10", "--image-size", "66"]
    main(argv)
    main([*argv, "--image-size", "16"])
    main([*argv, "--image-size", "16", "--stem", "7x7"])
    assert built == [("resnet18", "7x7"), ("resnet18", "3x3"), ("resnet18", "7x7")]
    assert sizes[0] == (66, 10) and sizes[-1] == (16, 10)
    file = tmp_path / f"runs/random-resnet18-{folder.name}/eval.json"
    assert len(json.loads(file.read_text())) == 3


def test_an_encoder_that_changes_is_noticed(folder):
    _, bank, _ = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)

    class Drifts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x.flatten(1)

    with pytest.raises(RuntimeError, match="count"):
        frozen_features(Drifts(), [bank], 12, 16)


@pytest.mark.parametrize("more", [
    ["--knn-k", "49", "--protocol", "knn"], ["--knn-k", "0"], ["--knn-temperature", "0"],
    ["--labels", "17"], ["--labels", "0"], ["--seeds", "0"], ["--limit", "-1"], ["--limit", "1"],
    ["--features", "nowhere/f.npz"],
    ["--image-size", "0"], ["--batch-size", "0"], ["--workers", "0"], ["--data", "cifar11"],
    ["--protocol", "finetune"], ["--arch", "vgg"], ["--stem", "5x5"], ["--seed", "1"],
], ids=lambda more: "".join(more))
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
