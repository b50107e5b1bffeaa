"""What is made of features: kNN, the linear probe, encoders in and out, the end of a run."""

import argparse
import json
import math
import os
import pathlib
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Images, build_encoder, knn_predict, linear_probe, load_encoder, save_encoder

CPU = torch.device("cpu")


def noise(n, channels=3, side=12, seed=0):
    """Random pixels."""
    rng = common.generator(seed)
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=rng)


def in_memory(pixels, labels):
    return Images(pixels, None, torch.as_tensor(labels), CPU, 0)


def blobs(n, spread=1.0, dim=6, seed=0):
    """Features of three classes, and their labels."""
    centers = torch.randn(3, dim, generator=common.generator(99)) * 2
    y = torch.arange(n) % 3
    return centers[y] + spread * torch.randn(n, dim, generator=common.generator(seed)), y


# --------------------------------------------------------------------------------------
# Features and their neighbors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("training", "channels"), [(True, 1), (False, 3)])
def test_features_are_a_plain_forward_pass_in_eval_mode(training, channels):
    torch.manual_seed(0)
    encoder = build_encoder("small")
    encoder(torch.randn(9, 3, 12, 12))  # for running averages that are not 0 and 1
    encoder.train(training)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = in_memory(noise(300, channels)[..., :8], torch.zeros(300).long())
    h = common.extract_features(encoder, images, 8)
    assert encoder.training == training and not h.requires_grad and h.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())

    mean, std = (torch.tensor(values)[:, None, None] for values in (common.MEAN, common.STD))
    middle = images.pixels[..., 2:10, :].expand(-1, 3, -1, -1) / 255
    expected = encoder.eval()((middle - mean) / std)
    torch.testing.assert_close(h, expected.detach(), atol=1e-4, rtol=1e-4)


def test_knn_of_five_angles():
    angles = torch.tensor([0, 10, 60, 80, 90, 40], dtype=torch.float64).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    shares = knn_predict(points[:5], torch.tensor([0, 0, 1, 1, 1]), points[5:], 3, 0.07)
    assert shares[0].tolist() == pytest.approx([0.302060243890, 0.697939756110], abs=1e-12)


@pytest.mark.parametrize("k", [1, 7, 40, 99])
def test_knn_is_a_double_loop(k):
    rng = common.generator(1)
    bank, queries = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (40, 9))
    labels = torch.randint(4, (40,), generator=rng)
    expected = torch.zeros(9, 4, dtype=torch.float64)
    for row, query in enumerate(queries):
        cosines = [float(query @ other / (query.norm() * other.norm())) for other in bank]
        for i in sorted(range(40), key=lambda i: -cosines[i])[:k]:
            expected[row, labels[i]] += math.exp(cosines[i] / 0.1)
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(knn_predict(bank, labels, queries * 99, k, 0.1), expected)


# --------------------------------------------------------------------------------------
# Linear probe
# --------------------------------------------------------------------------------------


def minimize(x, y, decay):
    """Weights of a logistic regression, in float64 and to the end."""
    W = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], 1, 3000, 9999, 1e-9, 0, 20, "strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(x.double() @ W, y) + decay / 2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return W.detach()


@pytest.mark.parametrize("decay", [1.0, 0.01, 0.0001])
def test_the_probe_minimizes_the_regularized_loss(decay):
    x, y = blobs(90, spread=3.0)
    W = common.train_probe(x, y, torch.zeros(6, 3), decay)
    torch.testing.assert_close(W.double(), minimize(x, y, decay), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(
    ("n", "dim", "spread"), [(99, 6, 0.1), (90, 6, 4.0), (99, 200, 15.0), (1200, 20, 6.0)]
)
def test_the_probe_is_as_good_as_with_the_best_decay(n, dim, spread):
    (x, y), (x_test, y_test) = blobs(n, spread, dim), blobs(2000, spread, dim, seed=1)
    z, z_test = (F.pad((part - x.mean(0)) / x.std(0), (0, 1), value=1) for part in (x, x_test))
    best = max(
        common.accuracy(z_test.double() @ minimize(z, y, decay), y_test)
        for decay in (3, 1, 0.3, 0.1, 0.03, 0.01, 0.001)
    )
    assert best > 60 and common.accuracy(linear_probe(x, y, x_test), y_test) > best - 4


def test_a_weak_decay_is_chosen_where_a_small_difference_tells():
    a, difference = torch.randn(2, 1200, 5, generator=common.generator(0))
    x, y = torch.cat([a, a + 0.1 * difference], dim=1), (difference[:, 0] > 0).long()
    assert common.accuracy(linear_probe(x[:200], y[:200], x[200:]), y[200:]) > 90


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_probe_sees_neither_scale_nor_shift_nor_other_test_images(scale):
    (x, y), (x_test, _) = blobs(100, 2.0), blobs(50, 2.0, seed=1)
    logits = linear_probe(x, y, x_test)
    assert torch.equal(logits, linear_probe(x, y, x_test))
    changed = linear_probe(scale * (x + 5), y, scale * (x_test[:7] + 5))
    torch.testing.assert_close(changed, logits[:7], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.full((40, 8), 1000.1), torch.arange(40) % 4),
        (torch.zeros(2000, 8), torch.arange(2000) % 2),
        (torch.eye(9), torch.full((9,), 5)),
        (torch.eye(6), torch.tensor([0, 0, 0, 1, 1, 1])),
    ],
)
def test_the_probe_of_data_that_say_little(x, y):
    logits = linear_probe(x, y, x)
    assert logits.shape == (len(y), y.max() + 1) and logits.isfinite().all()
    assert common.accuracy(logits, y) >= 99 * y.bincount().max() / len(y)


# --------------------------------------------------------------------------------------
# Encoders out and in
# --------------------------------------------------------------------------------------

torch.manual_seed(0)
NETWORK = build_encoder("resnet18").eval()
for name, buffer in NETWORK.named_buffers():
    if "running" in name:
        buffer.uniform_(0.5, 1.5)
OWN, OTHER = NETWORK.state_dict(), {"conv1.weight": torch.rand(64, 3, 7, 7)}
HEAD = {"fc.weight": torch.rand(8, 512), "fc.bias": torch.rand(8)}


def assert_same_weights(encoder, weights):
    for name, value in encoder.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, weights[name]), name


def test_a_saved_encoder_comes_back_the_same(tmp_path):
    path = tmp_path / "run" / "encoder.safetensors"
    encoder = build_encoder("small").to(memory_format=torch.channels_last)
    about = {"architecture": "small", "stem": "3x3", "image_size": 28, "data": "cifar10"}
    save_encoder(path, encoder, **about)
    again, told = load_encoder(path)
    assert told | about == told and told["mean"] == list(common.MEAN)
    for network in (again, build_encoder("small", init=path)):
        assert_same_weights(network, encoder.state_dict())
    assert [*path.parent.iterdir()] == [path]


@pytest.fixture
def path(tmp_path):
    """The path of a checkpoint, which is removed in the end, since it is large."""
    yield tmp_path / "checkpoint.pth"
    (tmp_path / "checkpoint.pth").unlink(missing_ok=True)


def named(prefix, weights=OWN):
    return {prefix + name: value for name, value in (weights | HEAD).items()}


# Layers that have numbers for names, with those between them that have no weights or without
NUMBERED = nn.Sequential(*NETWORK.children()).state_dict()
OWN_RESNET = [layer for layer in NETWORK.children() if list(layer.parameters())]
FILES = {
    "torchvision": OWN | HEAD,
    "MoCo": {
        "epoch": 3,
        "state_dict": named("module.encoder_k.", OTHER)
        | named("module.encoder_q.")
        | {"module.queue": torch.rand(8, 16)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(64, 3, 7, 7)}}},
    },
    "other names of MoCo": named("key_encoder.", OTHER) | named("query_encoder."),
    "SwAV": named("module.") | {"module.prototypes.weight": torch.rand(5, 8)},
    "SupContrast": {
        "opt": argparse.Namespace(temp=0.07),
        "model": {
            name.replace("downsample", "shortcut"): value
            for name, value in named("encoder.module.").items()
        },
    },
    "DINO": {
        "student": named("module.backbone.", OTHER),
        "teacher": named("backbone.") | {"head.mlp.0.weight": torch.rand(8, 512)},
        "args": argparse.Namespace(out=pathlib.Path("runs")),
    },
    "lightly": {"state_dict": named("backbone.", NUMBERED)},
    "lightly's own ResNet": named("backbone.", nn.Sequential(*OWN_RESNET).state_dict()),
    "torch.compile": {"model": named("_orig_mod.module.encoder.")},
    "without counters": {name: value for name, value in OWN.items() if "num_" not in name},
    "optimizer first": {"state": {0: {"exp_avg": torch.rand(64, 3, 7, 7)}}, "model": OWN},
    "another 4-dimensional tensor first": {"mean": torch.rand(1, 3, 1, 1)} | named("net."),
}


@pytest.mark.parametrize("name", FILES)
def test_other_peoples_checkpoints_give_their_encoder(path, capsys, name):
    torch.save(FILES[name], path)
    encoder, about = load_encoder(path, "resnet18")
    assert_same_weights(encoder, OWN)
    assert (about["architecture"], about["stem"]) == ("resnet18", "7x7")
    said = capsys.readouterr().out
    assert re.fullmatch(r".*: used 1[02]0 tensors under [\w. ]+; not used: .+\n", said)
    assert name != "MoCo" or "encoder_k (3), state_dict.encoder_q (2), state_dict.queue" in said


def test_the_stem_follows_from_the_first_layer_and_safetensors_are_read(tmp_path):
    weights = OWN | {"conv1.weight": torch.rand(64, 3, 3, 3)}
    for metadata in (None, {"format": "pt"}, {"architecture": "resnet18"}):  # not as we write it
        safetensors.torch.save_file(weights, tmp_path / "their.safetensors", metadata)
        encoder, about = load_encoder(tmp_path / "their.safetensors", "resnet18")
        assert_same_weights(encoder, weights)
        assert about["stem"] == "3x3" and isinstance(encoder.maxpool, nn.Identity)
    assert_same_weights(build_encoder("resnet18", "3x3", tmp_path / "their.safetensors"), weights)
    (tmp_path / "their.safetensors").unlink()


FIRST_LAYER = {"conv1.weight": torch.ones(64, 3, 7, 7)}


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=np.float64(1), out=pathlib.Path("runs")),
        [np.float32(1), np.float16(1), np.int64(1), np.uint8(1), np.bool_(True)],
        np.arange(3),
        np.random.get_state(),
        {"device": CPU, "kind": torch.float32},
    ],
)
def test_a_checkpoint_may_hold_what_runs_no_code(path, value):
    torch.save({"other": value, "model": FIRST_LAYER}, path)
    assert common.read_weights(path)[0].keys() == FIRST_LAYER.keys()


class RunsCode:
    """Would create a folder if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


FOREIGN = {"architecture": '"vit"', "stem": '"7x7"', "mean": "[]"}
FOREIGN = safetensors.torch.save(FIRST_LAYER, FOREIGN)
# What a file holds, or its bytes, and words of the line with which it is refused.
REFUSED = {
    "code": ({"other": RunsCode()}, "mkdir", "could run code"),
    "a module": (build_encoder("small"), "Sequential"),
    "another network": ({"conv_proj.weight": torch.rand(8, 3, 4, 4)}, "no ResNet", "conv_proj"),
    "one channel": (OWN | {"conv1.weight": torch.rand(64, 1, 7, 7)}, "3 channels", "[64, 1, 7, 7]"),
    "a deeper network": (OWN | {"layer1.2.conv1.weight": torch.rand(1)}, "resnet18", "layer1.2"),
    "empty.pth": (b"", "not loaded"),
    "cut.pth": (b"PK\3\4" + bytes(5000), "not loaded"),
    "cut.safetensors": (FOREIGN[:-9], "not loaded"),
    "unknown.safetensors": (FOREIGN, "vit"),
    "missing.safetensors": (None, "No such file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_no_encoder_are_refused_in_one_line(
    path, tmp_path, monkeypatch, capsys, kind
):
    content, *words = REFUSED[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / kind if "." in kind else path
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as error, common.one_line_errors():
        load_encoder(path, "resnet18")
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message and "()" not in message
    said = message + capsys.readouterr().out
    assert all(word in said for word in (str(path), *words)), said
    assert not (tmp_path / "harm").exists()


# --------------------------------------------------------------------------------------
# The end of a run
# --------------------------------------------------------------------------------------


def end(out, encoder, bank, test, side=12):
    """The rows of results.json."""
    args = argparse.Namespace(arch="small", stem="3x3", image_size=side, seed=0, out=out)
    common.finish(args, encoder, bank, test)
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (noise(6), [0, 0, 0, 1, 1, 1]),
        (noise(6), [2] * 6),
        (noise(6, 1).fill_(255), [0, 0, 0, 1, 1, 1]),
        (noise(12, 3, 48), [0, 1, 2] * 4),
        (noise(12, 3, 64), [0, 1, 2] * 4),
    ],
)
def test_tiny_sets_are_evaluated(tmp_path, capsys, monkeypatch, pixels, labels):
    sizes, extract = [], common.extract_features
    monkeypatch.setattr(common, "extract_features", lambda *a: sizes.append(a[2]) or extract(*a))
    images = in_memory(pixels, labels)
    encoder = build_encoder("small")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    side = pixels.shape[3]
    rows = end(tmp_path, encoder, images, images, side)
    assert sizes == [side] * 4 + [min(side, 32)] * 2  # of raw pixels at most 32 x 32
    assert [row["features"] for row in rows] == ["trained", "untrained", "raw pixels"]
    if pixels.min() < 255:
        assert rows[2]["linear"] == 100
    assert_same_weights(encoder, before)
    printed = capsys.readouterr().out.splitlines()
    assert f"{len(labels)} test images" in printed[0] and len(printed) == 4


def test_the_table_tells_good_features_from_bad(tmp_path, capsys):
    labels = torch.arange(60) % 2
    pixels = noise(60, side=8) // 4 + (150 * labels[:, None, None, None]).to(torch.uint8)
    brightness = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    rows = end(tmp_path, brightness, *[in_memory(pixels, labels)] * 2, 8)
    assert (rows[0]["kNN"], rows[0]["linear"]) == (100, 100)
    bank, test = (in_memory(noise(60, side=8, seed=seed), labels) for seed in (1, 2))
    encoder = build_encoder("small")
    chance = end(tmp_path, encoder, bank, test, 8)
    assert all(25 < row[name] < 75 for row in chance for name in ("kNN", "linear"))
    assert end(tmp_path, encoder, bank, test, 8) == chance
    common.finish(argparse.Namespace(), encoder, None, None)
    assert "no labeled test images" in capsys.readouterr().out
