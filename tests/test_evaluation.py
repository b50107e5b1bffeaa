"""Encoders, features, kNN and probe."""

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import common
from common import ImagesInMemory, generator, knn_predict, linear_probe


def test_knn_vector():
    angle = torch.tensor([0.0, 10, 60, 80, 90], dtype=torch.float64).deg2rad()
    bank = torch.stack([angle.cos(), angle.sin()], 1)
    angle = torch.tensor([40.0], dtype=torch.float64).deg2rad()
    query = torch.stack([angle.cos(), angle.sin()], 1)
    P = knn_predict(bank, torch.tensor([0, 0, 1, 1, 1]), query, 3, 0.07)
    expected = torch.tensor([[0.302060243890, 0.697939756110]], dtype=torch.float64)
    torch.testing.assert_close(P, expected, atol=1e-11, rtol=0)


def slow_knn(bank, labels, queries, k, temperature, classes):
    P = torch.zeros(len(queries), classes, dtype=torch.float64)
    for row, q in enumerate(queries):
        cosines = [float(q @ b / (q.norm() * b.norm())) for b in bank]
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            P[row, labels[i]] += math.exp(cosines[i] / temperature)
    return P / P.sum(1, keepdim=True)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_knn_is_the_sum_over_the_nearest(k):
    rng = generator(1)
    bank, queries = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (60, 9))
    labels = torch.randint(4, (60,), generator=rng)
    P = knn_predict(bank, labels, queries * 100, k, 0.1, 6)
    torch.testing.assert_close(P, slow_knn(bank, labels, queries, k, 0.1, 6))
    torch.testing.assert_close(P.sum(1), torch.ones(9, dtype=torch.float64))


def test_knn_in_chunks_is_knn_at_once():
    rng = generator(2)
    bank, queries = torch.randn(70000, 4, generator=rng), torch.randn(1030, 4, generator=rng)
    labels = torch.randint(3, (70000,), generator=rng)
    cosine = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    top, i = cosine.topk(10, dim=1)
    expected = torch.zeros(1030, 3).scatter_add_(1, labels[i], (top / 0.07).softmax(1))
    torch.testing.assert_close(knn_predict(bank, labels, queries, 10, 0.07), expected)


@pytest.mark.parametrize("k", [0, 6])
def test_knn_refuses_a_k_that_does_not_fit(k):
    with pytest.raises(ValueError, match="bank"):
        knn_predict(torch.eye(5), torch.arange(5), torch.eye(5), k, 0.1)


def blobs(n, classes=3, dim=6, spread=1.0, seed=0):
    centres = torch.randn(classes, dim, generator=generator(99)) * 2
    y = torch.arange(n) % classes
    return centres[y] + spread * torch.randn(n, dim, generator=generator(seed)), y


@pytest.mark.parametrize("decay", [1.0, 0.01, 0.0001])
def test_a_probe_minimizes_the_regularized_cross_entropy(decay):
    (x, y), dtype = blobs(90, spread=3.0), torch.float64
    x = x * torch.tensor([30.0, 3.0, 1.0, 1.0, 0.1, 0.01])  # axes of very different lengths
    x = F.pad(x, (0, 1), value=1)
    W = common.train_probe(x, y, torch.zeros(7, 3), decay)

    def objective(W):
        return F.cross_entropy(x.to(dtype) @ W, y) + decay / 2 * W[:-1].square().sum()

    best = torch.zeros(7, 3, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [best],
        max_iter=5000,
        max_eval=9999,
        tolerance_change=0,
        tolerance_grad=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(best)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert objective(W.to(dtype)) < objective(best) + 1e-4
    assert objective(torch.zeros(7, 3, dtype=dtype)) > objective(best) + 0.1


def test_a_probe_of_features_that_are_all_the_same_is_the_share_of_the_classes():
    y = torch.tensor([0] * 30 + [1] * 10)
    logits, _ = linear_probe(torch.ones(40, 8), y, torch.rand(5, 8), 2)
    expected = torch.tensor([0.75, 0.25]).expand(5, 2)
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-3, rtol=1e-3)


def test_principal_coordinates_keep_the_inner_products_of_standardized_features():
    (x, _), (x_test, _) = blobs(60), blobs(20, seed=1)
    x[:, 2] = 5  # constant
    x[:, 3] = 2 * x[:, 1] - 1  # of no news
    mean, deviation = x.mean(0), x.std(0)
    z, z_test = common.principal_coordinates(x, x_test)
    assert z.shape == (60, 4)
    rest = [0, 1, 3, 4, 5]
    a, b = ((v - mean)[:, rest] / deviation[rest] for v in (x, x_test))
    torch.testing.assert_close(z @ z.T, a @ a.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(z_test @ z.T, b @ a.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("images", "trained_on"), [(100, 80), (6000, 5400)])
def test_few_images_are_cross_validated_and_of_many_a_tenth_is_held_out(
    images, trained_on, monkeypatch
):
    sizes, real = [], common.train_probe
    monkeypatch.setattr(common, "PROBE_DECAYS", (1.0, 0.1))
    monkeypatch.setattr(
        common, "train_probe", lambda x, y, W, decay: sizes.append(len(x)) or real(x, y, W, decay)
    )
    (x, y), (x_test, y_test) = blobs(images), blobs(300, seed=1)
    logits, choice = linear_probe(x, y, x_test, 3)
    assert sizes == [trained_on] * (10 if images == 100 else 2) + [images]
    assert abs(choice["held-out"] - common.accuracy(logits, y_test)) < 8
    held_out = images if images == 100 else images // 10
    assert (choice["held-out"] / 100 * held_out) == pytest.approx(
        round(choice["held-out"] / 100 * held_out)
    )


def test_probe_does_not_see_the_scale_of_features_nor_the_test_set():
    (x, y), (x_test, _) = blobs(200), blobs(50, seed=1)
    logits, choice = linear_probe(x, y, x_test, 3)
    scaled, same = linear_probe(x * 1000 + 5, y, x_test * 1000 + 5, 3)
    torch.testing.assert_close(scaled, logits, atol=1e-2, rtol=1e-2)
    part, alone = linear_probe(x, y, x_test[:7], 3)
    assert choice == same == alone
    torch.testing.assert_close(part, logits[:7])


def test_a_probe_chooses_a_strong_decay_for_noise_and_a_weak_one_for_clear_classes():
    rng = generator(3)
    noise, y = torch.randn(200, 50, generator=rng), torch.arange(200) % 2
    (clear, labels), x_test = blobs(2000, spread=0.5), torch.zeros(1, 50)
    strong = linear_probe(noise, y, x_test, 2)[1]["weight_decay"]
    weak = linear_probe(clear, labels, clear[:1], 3)[1]["weight_decay"]
    assert weak < 0.01 < 1 <= strong
    assert {strong, weak} <= {*common.PROBE_DECAYS}


@pytest.mark.parametrize(("images", "folds"), [(100, 5), (5000, 1)])
def test_held_out_images_are_a_fair_sample_of_the_classes(images, folds):
    y = torch.cat([torch.zeros(images // 2), torch.arange(images // 2) % 3 + 1]).long()
    pairs = common.probe_folds(y, seed=0)
    assert len(pairs) == folds
    for train, held_out in pairs:
        assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(images))
        share = len(held_out) / images
        assert share == (0.2 if folds == 5 else 0.1)
        counts = y[held_out].bincount(minlength=4)
        assert ((counts - share * y.bincount()).abs() <= 1).all()
    held_out = torch.cat([held_out for _, held_out in pairs])
    assert len(held_out.unique()) == len(held_out) == (images if folds == 5 else images // 10)
    other = common.probe_folds(y, seed=1)[0][1]
    assert not torch.equal(other.sort().values, pairs[0][1].sort().values)


def test_wilson_interval_vector():
    # Wilson 1927; the same as statsmodels.stats.proportion.proportion_confint(method="wilson").
    assert common.wilson_interval(90, 100) == pytest.approx((82.56, 94.48), abs=0.01)
    assert common.wilson_interval(84.2, 10000) == pytest.approx((83.47, 84.90), abs=0.01)
    assert common.wilson_interval(0, 20) == pytest.approx((0, 16.11), abs=0.01)
    assert common.wilson_interval(100, 20) == pytest.approx((83.89, 100), abs=0.01)
    for n in range(1, 50):  # Rounding must not leave 0..100.
        assert common.wilson_interval(0, n)[0] >= 0 and common.wilson_interval(100, n)[1] <= 100


def test_a_wilson_interval_holds_the_true_accuracy_19_times_of_20():
    rng = generator(0)
    for true in (0.5, 0.9, 0.99):
        measured = (torch.rand(4000, 200, generator=rng) < true).float().mean(1) * 100
        intervals = [common.wilson_interval(v, 200) for v in measured.tolist()]
        held = sum(low <= 100 * true <= high for low, high in intervals) / 4000
        assert 0.92 < held < 0.98


def test_a_summary_has_a_deviation_only_of_several_accuracies():
    one, three = common.summarize([80.0], 100), common.summarize([79.0, 80.0, 81.0], 100)
    assert one == {"mean": 80.0, "interval": common.wilson_interval(80, 100)}
    assert three == one | {"std": 1.0}
    assert common.format_accuracy(one) == "80.0 [71.1, 86.7]"
    assert common.format_accuracy(three) == "80.0 ± 1.0 [71.1, 86.7]"


def test_some_of_each_class():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1])
    index = common.draw_per_class(labels, 2, generator(4))
    assert labels[index].tolist() == [0, 0, 1, 1, 2, 2] and len(index.unique()) == 6
    assert not torch.equal(index, common.draw_per_class(labels, 2, generator(5)))
    labels = torch.arange(3).repeat_interleave(torch.tensor([2, 20, 49]))
    index = common.draw_per_class(labels, 0.1, generator(4))  # at least one
    assert labels[index].bincount().tolist() == [1, 2, 5] and len(index.unique()) == 8


def test_top_k_accuracy():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    labels = torch.tensor([0, 1, 0])
    assert [round(common.accuracy(scores, labels, k), 2) for k in (1, 3, 5)] == [33.33, 100, 100]


@pytest.mark.parametrize(
    ("architecture", "width"),
    [
        ("small", 256),
        ("resnet18", 512),
        ("resnet34", 512),
        ("resnet50", 2048),
    ],
)
def test_encoders_give_features_of_their_width(architecture, width):
    encoder = common.build_encoder(architecture, "3x3")
    assert encoder.width == width and encoder(torch.rand(2, 3, 32, 32)).shape == (2, width)


def test_resnet_is_torchvisions_without_fc():
    encoder, theirs = common.build_encoder("resnet18"), torchvision.models.resnet18()
    theirs.load_state_dict(encoder.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(x), theirs.eval()(x))
    small = common.build_encoder("resnet18", "3x3")
    assert small.conv1.stride == (1, 1) and small.conv1.weight.shape == (64, 3, 3, 3)
    assert small.layer1(small.maxpool(small.relu(small.conv1(x)))).shape[2:] == (64, 64)


def test_saved_encoder_comes_back_the_same(tmp_path):
    encoder = common.build_encoder("resnet18", "3x3").to(memory_format=torch.channels_last)
    path = tmp_path / "encoder.safetensors"
    common.save_encoder(path, encoder, architecture="resnet18", stem="3x3", image_size=8)
    again, about = common.load_encoder(path)
    assert about == {"architecture": "resnet18", "stem": "3x3", "image_size": "8"}
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in again.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_readmes_two_liner_loads_into_torchvision(tmp_path):
    encoder = common.build_encoder("resnet18", "7x7")
    common.save_encoder(tmp_path / "e.safetensors", encoder, architecture="resnet18", stem="7x7")
    resnet = torchvision.models.resnet18()
    missing = resnet.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("content", ["missing", "text", "pickle", "other", "cut", "foreign"])
def test_a_file_that_is_no_encoder_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "e.safetensors"
    encoder = common.build_encoder("small")
    if content == "text":
        path.write_text("no weights")
    elif content == "pickle":
        torch.save(encoder.state_dict(), path)
    elif content == "other":
        save_file({"a": torch.ones(1)}, path)
    elif content == "foreign":
        save_file({"a": torch.ones(1)}, path, {"architecture": "vit_b_16", "stem": "7x7"})
    elif content == "cut":
        common.save_encoder(path, encoder, architecture="small", stem="3x3")
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit) as exit_:
        common.load_encoder(path)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and str(path) in error


def test_features_are_those_of_the_encoder_in_eval_mode():
    torch.manual_seed(0)
    encoder = common.build_encoder("small").train()
    data = ImagesInMemory(torch.randint(256, (7, 3, 12, 16), dtype=torch.uint8), torch.zeros(7))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    h = common.extract_features(encoder, data, 12, batch_size=3)
    assert encoder.training and not h.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    middle = data.pixels[:, :, :, 2:14] / 255
    torch.testing.assert_close(h, encoder.eval()(middle).detach(), atol=1e-5, rtol=1e-4)


def test_comparison_tells_good_features_from_bad_and_counts_labels():
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    pixels = torch.randint(256, (120, 1, 8, 8), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = (y * 100).to(torch.uint8)

    class Good(nn.Module):
        def forward(self, x):
            x = x[:, 0, 0, 0] * 0.5 + 0.25  # in 0..1 again
            return F.one_hot((x * 2.55).round().long(), 3).float() + 0.1

    data = ImagesInMemory(pixels, y)
    about = {"method": "good", "architecture": "small", "stem": "3x3", "image_size": 8}
    about |= {"mean": [0.25] * 3, "std": [0.5] * 3}
    rows = common.compare_features(Good(), about, data, data, seed=0)
    assert [row["features"] for row in rows] == ["good", "random", "raw pixels"]
    for name in ("kNN", "linear", "linear (10 a class)"):
        assert rows[0][name]["mean"] == 100
        assert ("std" in rows[0][name]) == ("10" in name)
    assert rows[2]["kNN (10 a class)"]["mean"] < 80
    assert rows[1] == common.compare_features(Good(), about, data, data, seed=0)[1]  # by the seed
    few = ImagesInMemory(pixels[:20], y[:20])
    assert set(common.compare_features(Good(), about, few, data, 0)[0]) == {
        "features",
        "kNN",
        "linear",
    }
    assert "raw pixels" in common.format_table(rows) and "100.0" in common.format_table(rows)


def test_raw_pixels_of_a_large_set_are_left_out(monkeypatch):
    data = ImagesInMemory(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.arange(8) % 2)
    about = {"method": "m", "architecture": "small", "stem": "3x3", "image_size": 4}
    about |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    for limit, names in [(8 * 48, ["m", "random", "raw pixels"]), (8 * 48 - 1, ["m", "random"])]:
        monkeypatch.setattr(common, "MAX_PIXEL_FEATURES", limit)
        rows = common.compare_features(common.build_encoder("small"), about, data, data, 0)
        assert [row["features"] for row in rows] == names


def test_normalize_is_torchvisions_and_its_statistics_move_with_the_network():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    x, normalize = torch.rand(4, 3, 5, 5), common.Normalize(mean, std)
    torch.testing.assert_close(normalize(x), torchvision.transforms.v2.Normalize(mean, std)(x))
    assert all(v.device.type == "meta" for v in normalize.to("meta").buffers())


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
def test_others_may_read_an_encoder_as_the_umask_says(tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        common.save_encoder(tmp_path / "e.safetensors", common.build_encoder("small"))
        os.umask(before)
        assert (tmp_path / "e.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), common.atomic_write(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"


def test_generator_keys_do_not_collide():
    keys = [(1, 2), (1, 2, 0), (2, 1), (1,), (1, 0), (0, 1, 2)]
    draws = {tuple(torch.rand(2, generator=generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert np.isclose(
        torch.rand(1, generator=generator(1, 2)).item(),
        torch.rand(1, generator=generator(1, 2)).item(),
    )
