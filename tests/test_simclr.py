"""simclr.py: loss, optimiser, schedule, and the run with its flags, errors and resumption."""

import itertools
import json
import math
import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, command, finish, metrics, refused, write_folder
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import common
import simclr
from simclr import LARS, augmentation, learning_rate, nt_xent, projection_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """27 images: 6 steps an epoch at batch 4."""
    return write_folder(tmp_path_factory.mktemp("few") / "stripes", 9)


# ----------------------------------------------------------------------------------------- loss
def slow_nt_xent(z1, z2, temperature):
    """Eq. 1, term by term."""
    z = [*z1, *z2]
    N = len(z1)

    def similarity(i, k):
        return z[i] @ z[k] / (z[i].norm() * z[k].norm()) / temperature

    total = 0
    for i in range(2 * N):
        j = (i + N) % (2 * N)
        others = sum(similarity(i, k).exp() for k in range(2 * N) if k != i)
        total = total - torch.log(similarity(i, j).exp() / others)
    return total / (2 * N)


@pytest.mark.parametrize(("N", "D", "temperature"), [(2, 3, 0.1), (5, 4, 0.5), (7, 16, 1.0)])
def test_nt_xent_and_its_gradients_are_those_of_equation_1(N, D, temperature):
    torch.manual_seed(N)
    z1, z2 = (torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, slow = nt_xent(z1, z2, temperature), slow_nt_xent(z1, z2, temperature)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    gradients = zip(
        torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(slow, (z1, z2)), strict=True
    )
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("N", "temperature", "value"), [(2, 0.5, 0.2395448), (4, 0.5, 0.5944377)])
def test_nt_xent_of_orthonormal_identical_pairs(N, temperature, value):
    z = torch.eye(N, dtype=torch.float64)
    assert abs(nt_xent(z, 3 * z, temperature).item() - value) < 5e-8


def test_nt_xent_of_collapsed_embeddings_is_chance():
    z = torch.ones(6, 3, dtype=torch.float64)
    assert abs(nt_xent(z, z, 0.2).item() - math.log(11)) < 1e-12


def test_nt_xent_of_a_simplex_is_the_bound_that_a_run_shows(folder, tmp_path):
    N, T = 4, 0.2
    z = torch.eye(N, dtype=torch.float64) - 1 / N
    simclr.main(["--data", str(folder), "--out", str(tmp_path / "run"), *TINY])
    row = metrics(tmp_path / "run")[0]
    assert abs(nt_xent(z, z, T).item() - row["bound"]) < 1e-12
    assert row["chance"] == math.log(2 * N - 1)


def test_nt_xent_survives_half_precision_inputs_and_low_temperature():
    z1, z2 = torch.randn(2, 8, 4).bfloat16().requires_grad_()
    loss = nt_xent(z1.float(), z2.float(), 0.01)
    assert loss.isfinite() and torch.autograd.grad(loss, z1)[0].isfinite().all()


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3, 4, 1), (3, 4, 1))])
def test_nt_xent_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="z1 and z2"):
        nt_xent(*map(torch.rand, shapes), 0.1)


# ------------------------------------------------------------------------ optimiser and schedule
def test_lars_vector():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([p], lr=1, momentum=0.9, weight_decay=0.1, trust_coefficient=0.001)
    p.grad = torch.tensor([[0.8, -0.6]], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([[2.9950807, 4.0008944]], dtype=torch.float64)
    torch.testing.assert_close(p.data, expected, atol=5e-8, rtol=0)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    expected = torch.tensor([[2.990161521, 4.001788814]], dtype=torch.float64)
    torch.testing.assert_close(p.data, expected, atol=5e-10, rtol=0)


def test_lars_neither_decays_nor_adapts_vectors_and_survives_zeros():
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    zero, still = nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.ones(1, 2))
    unused = nn.Parameter(torch.ones(1, 2))
    optimizer = LARS([bias, zero, still, unused], lr=0.5, weight_decay=0.0)
    bias.grad, zero.grad, still.grad = torch.ones(2), torch.ones(1, 2), torch.zeros(1, 2)
    optimizer.step()
    assert bias.tolist() == [2.5, 3.5]
    assert zero.tolist() == [[-0.5, -0.5]] and still.tolist() == [[1, 1]]
    assert unused.tolist() == [[1, 1]]


def test_learning_rate_has_three_phases():
    rates = [learning_rate(step, 110, 10, 2.0) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.001 and learning_rate(0, 5, 0, 1.0) == 1


# ---------------------------------------------------------------------- model and augmentation
@pytest.mark.parametrize(
    ("layers", "linear"),
    [(0, []), (1, [(4, 3)]), (2, [(4, 5), (5, 3)]), (3, [(4, 5), (5, 5), (5, 3)])],
)
def test_projection_head_has_the_official_layers(layers, linear):
    head = projection_head(4, layers, 5, 3)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * layers
    assert [type(m) for m in head] == kinds[:-1]
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == linear
    assert not any(m.bias is not None for m in head if isinstance(m, nn.Linear))
    assert [m.bias.requires_grad for m in head if isinstance(m, nn.BatchNorm1d)] == [
        *[True] * (layers - 1),
        False,
    ][:layers]
    assert head(torch.rand(6, 4)).shape == (6, 3 if layers else 4)


def test_augmentation_is_appendix_a():
    crop, color, gray, blur = augmentation(["blur", "gray", "color", "crop"], 224, 0.08, 1.0)
    assert (crop.size, crop.scale, crop.ratio, crop.flip) == (224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (tuple(color.operation), color.p) == ((0.8, 0.8, 0.8, 0.2), 0.8)
    assert (gray.operation, gray.p) == (common.grayscale, 0.2)
    assert (tuple(blur.operation), blur.p) == ((23, (0.1, 2.0)), 0.5)
    half = augmentation(["crop", "color"], 32, 0.2, 0.5)
    assert tuple(half[1].operation) == (0.4, 0.4, 0.4, 0.1) and half[0].scale == (0.2, 1.0)


def test_without_the_crop_the_whole_image_is_shown():
    data = common.ImageSet(torch.randint(256, (4, 3, 9, 9), dtype=torch.uint8), torch.zeros(4))
    recipe = augmentation(["gray"], 9, 0.08, 1.0)
    _, index, (views,) = next(common.batches(data, [(2, recipe)], 4, 0, 0, 1))
    whole, views = data.images[index] / 255, views.flatten(0, 1)
    for view, image in zip(views, whole.repeat(2, 1, 1, 1), strict=True):
        grey = common.grayscale(image).allclose(view, atol=1e-5)
        assert grey or image.allclose(view, atol=1e-5)


# ------------------------------------------------------------------------------------- the run
def run(folder, out, *more):
    simclr.main(["--data", str(folder), "--out", str(out), *TINY, *map(str, more)])
    return out


def test_a_run_leaves_what_the_readme_lists(folder, tmp_path, capsys):
    out = run(folder, tmp_path / "run")
    files = {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "views.png",
        "encoder.safetensors",
        "results.json",
    }
    assert {path.name for path in out.iterdir()} == files
    config, rows = json.loads((out / "config.json").read_text()), metrics(out)
    assert config["settings"]["batch_size"] == 4 and torch.__version__.startswith(config["torch"])
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12)]
    assert all(row["bound"] < row["loss"] and 0 < row["spread"] < 1.5 for row in rows)
    printed = capsys.readouterr().out
    for row in rows:  # the same numbers on the console
        assert f"epoch {row['epoch']}" in printed and f"loss {row['loss']:.4g}" in printed
        assert f"knn {row['knn']:.4g}" in printed
    _, about = common.load_encoder(out / "encoder.safetensors")
    assert about == {
        "method": "simclr",
        "data": str(folder),
        "architecture": "small",
        "stem": "3x3",
        "image_size": "12",
    }
    results = json.loads((out / "results.json").read_text())
    assert [row["features"] for row in results] == ["simclr", "random", "raw pixels"]
    assert {"kNN", "linear"} < set(results[0]) and common.table(results) in printed
    with Image.open(out / "views.png") as picture:  # a batch, as it is and as two views
        assert 4 * 84 < picture.width < 5 * 84 and 3 * 84 < picture.height < 4 * 84
    checkpoint = out / "checkpoint.pt"
    before = checkpoint.read_bytes()
    run(folder, out)
    assert "finished" in capsys.readouterr().out and checkpoint.read_bytes() == before


def test_the_rows_knn_is_the_saved_encoders(folder, tmp_path):
    out = run(folder, tmp_path / "run")
    _, bank, test = common.load_splits(str(folder), "nowhere", None, torch.device("cpu"), 1)
    encoder, _ = common.load_encoder(out / "encoder.safetensors")
    assert metrics(out)[-1]["knn"] == pytest.approx(common.knn_accuracy(encoder, bank, test, 12))


def test_training_lowers_the_loss(folder, tmp_path):
    rows = metrics(
        run(
            folder,
            tmp_path / "run",
            "--epochs",
            10,
            "--optimizer",
            "adamw",
            "--lr",
            0.003,
            "--crop-scale",
            0.8,
            "--augment",
            "crop",
        )
    )
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def weights(out):
    return load_file(out / "encoder.safetensors")


def same_weights(a, b):
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("plain") / "run")


def test_the_same_seed_gives_the_same_run(plain, folder, tmp_path):
    assert same_weights(run(folder, tmp_path / "again"), plain)


@pytest.mark.parametrize(
    "more",
    [
        ["--seed", 1],
        ["--lr", 0.5],
        ["--lr-rule", "linear"],
        ["--temperature", 0.5],
        ["--weight-decay", 0.1],
        ["--warmup-epochs", 0.5],
        ["--color-strength", 0],
        ["--hidden", 24],
        ["--crop-scale", 0.9],
        ["--augment", "crop"],
        ["--head-layers", 3],
        ["--dim", 4],
        ["--optimizer", "sgd"],
        ["--optimizer", "adamw"],
        ["--batch-size", 8],
        ["--limit", 20],
        ["--image-size", 16],
        ["--epochs", 3],
        ["--max-steps", 7],
    ],
    ids=lambda more: more[0] + str(more[1]),
)
def test_each_flag_changes_the_result(plain, folder, tmp_path, more):
    assert not same_weights(run(folder, tmp_path / "run", *more), plain)


@pytest.mark.parametrize(
    "more",
    [["--eval-every", 7], ["--workers", 3], ["--root", "elsewhere"]],
    ids=lambda more: more[0],
)
def test_other_flags_do_not(plain, folder, tmp_path, more):
    assert same_weights(run(folder, tmp_path / "run", *more), plain)


def test_flags_do_what_they_say(folder, tmp_path):
    out = run(
        folder,
        tmp_path / "a",
        "--epochs",
        4,
        "--eval-every",
        3,
        "--batch-size",
        8,
        "--optimizer",
        "sgd",
        "--lr-rule",
        "linear",
        "--weight-decay",
        0.25,
        "--dim",
        5,
    )
    assert ["knn" in row for row in metrics(out)] == [False, False, True, True]
    state = checkpoint(out)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    assert state["model"]["1.3.weight"].shape == (5, 16)
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["lr"] == pytest.approx(0.03 * 8 / 256)
    out = run(
        folder,
        tmp_path / "b",
        "--max-steps",
        8,
        "--image-size",
        16,
        "--limit",
        20,
        "--optimizer",
        "lars",
        "--batch-size",
        9,
    )
    assert [row["step"] for row in metrics(out)] == [2, 4]  # 2 epochs of 2 steps end first
    config = json.loads((out / "config.json").read_text())
    assert config["images"].startswith("20 images (")
    assert config["settings"]["lr"] == pytest.approx(0.075 * 3)
    out = run(folder, tmp_path / "c", "--max-steps", 5)
    assert checkpoint(out)["step"] == 5
    assert metrics(out)[-1]["lr"] == pytest.approx(learning_rate(4, 5, 4, 4.8 * (4 / 4096) ** 0.5))


@pytest.mark.parametrize("stem", ["3x3", "7x7"])
def test_architecture_and_stem(folder, tmp_path, stem):
    out = run(folder, tmp_path / "run", "--arch", "resnet18", "--stem", stem, "--max-steps", 1)
    assert weights(out)["conv1.weight"].shape[2:] == (int(stem[0]),) * 2


def test_init_starts_from_an_encoder(plain, folder, tmp_path):
    out = run(
        folder,
        tmp_path / "run",
        "--init",
        plain / "encoder.safetensors",
        "--max-steps",
        1,
        "--lr",
        1e-12,
        "--optimizer",
        "sgd",
    )
    for name, value in weights(out).items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, weights(plain)[name], atol=1e-9, rtol=0)


def test_the_default_folder_is_named_after_script_and_data(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simclr.main(["--data", str(folder), *TINY])
    assert (tmp_path / "runs" / f"simclr-{folder.name}" / "results.json").exists()


def test_bundled_images_have_defaults_of_their_own_and_flags_win():
    bundled = simclr.parse_arguments([])
    assert (bundled.data, bundled.arch) == ("fashion-mini", "small")
    assert simclr.parse_arguments(["--arch", "resnet34"]).arch == "resnet34"
    other = simclr.parse_arguments(["--data", "cifar10"])
    assert (other.arch, other.optimizer, other.crop_scale) == ("resnet18", "lars", 0.08)


def test_log_with_writes_every_row_to_the_tracker(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(folder, tmp_path / "run", "--log-with", "tensorboard")
    events = EventAccumulator(str(out / "simclr"))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in metrics(out)]


# --------------------------------------------------------------------------------- resumption
TIMES = ("images_per_s", "minutes_left", "wait")
LONGER = ["--epochs", "15", "--batch-size", "2"]  # 13 steps an epoch


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    argv = ["--data", folder, "--out", out, *TINY, *LONGER]
    code, _, err = finish(command("simclr.py", *argv))
    assert code == 0, err
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_bit_identical(uninterrupted, folder, tmp_path, number):
    out = tmp_path / "run"
    argv = ["--data", folder, "--out", out, *TINY, *LONGER]
    process = command("simclr.py", *argv)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    code, text, err = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), err
    assert not (out / "results.json").exists() and not (out / "encoder.safetensors").exists()
    step = checkpoint(out)["step"]
    assert 0 < step < 195
    if number != signal.SIGKILL:
        assert f"stopped after step {step} of 195" in text and "Traceback" not in err
    code, text, err = finish(command("simclr.py", *argv))
    assert code == 0 and f"going on after step {step} of 195" in text, err
    assert same_weights(out, uninterrupted)
    ends = checkpoint(out), checkpoint(uninterrupted)
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name])
    timeless = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(run)]
        for run in (out, uninterrupted)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 15
    results = [json.loads((run / "results.json").read_text()) for run in (out, uninterrupted)]
    assert results[0] == results[1]


def test_a_run_stopped_within_an_epoch_goes_on_within_it(plain, folder, tmp_path, monkeypatch):
    # The signal comes while step 8 is prepared, in the second epoch of 6 steps.
    real = common.batches

    def interrupted(*args):
        for step, *rest in real(*args):
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step, *rest

    monkeypatch.setattr(common, "batches", interrupted)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        run(folder, out)
    assert exit_.value.code == 128 + signal.SIGTERM and checkpoint(out)["step"] == 9
    assert len(metrics(out)) == 1
    monkeypatch.setattr(common, "batches", real)
    run(folder, out)
    assert same_weights(out, plain)
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(plain)]


def test_checkpoints_come_with_time_as_well(folder, tmp_path, monkeypatch):
    clock = itertools.count(0, 400)  # seconds, a look at the clock apart
    monkeypatch.setattr(simclr.time, "monotonic", lambda: float(next(clock)))
    steps = []
    replace = common.written_aside

    def noting(path):
        if path.name == "checkpoint.pt":
            steps.append(path)
        return replace(path)

    monkeypatch.setattr(common, "written_aside", noting)
    run(folder, tmp_path / "run")
    assert len(steps) > 2 + 2  # two epochs, and in between


def test_a_run_with_other_settings_is_refused_and_named(plain, folder, capsys):
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    argv = ["--data", folder, "--out", plain, *TINY, "--lr", "0.125", "--dim", "9"]
    error = refused(capsys, simclr.main, argv)
    assert "lr" in error and "dim" in error and "seed" not in error
    assert before == {path.name: path.read_bytes() for path in plain.iterdir()}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    folder, tmp_path, monkeypatch, capsys
):
    out, real = tmp_path / "run", simclr.nt_xent
    calls = itertools.count()

    def breaks(*args):  # at step 8 of 12
        return real(*args) * (math.nan if next(calls) == 8 else 1)

    monkeypatch.setattr(simclr, "nt_xent", breaks)
    with pytest.raises(SystemExit) as exit_:
        run(folder, out)
    assert exit_.value.code == 2 and "step 8 is not finite" in capsys.readouterr().err
    state = checkpoint(out)
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())
    assert not (out / "results.json").exists()


def test_a_huge_rate_breaks_the_loss_and_is_reported(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "run", "--lr", 1e30, "--optimizer", "sgd", "--head-layers", 0)
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        (["--lr", 1e-9, "--optimizer", "sgd", "--augment", "color", "--color-strength", 0], False),
        (["--head-layers", 0, "--lr", 1e-12, "--optimizer", "sgd", "--warmup-epochs", 0], True),
    ],
)
def test_a_collapsed_embedding_is_warned_of(folder, tmp_path, capsys, more, warned):
    out = tmp_path / "run"
    if warned:  # an encoder that gives nearly the same for everything
        encoder = common.build_encoder("small")
        nn.init.zeros_(encoder[4][1].weight)
        nn.init.ones_(encoder[4][1].bias)
        flat = tmp_path / "flat.safetensors"
        common.save_encoder(flat, encoder, architecture="small", stem="3x3")
        more = [*more, "--init", flat]
    run(folder, out, *more)
    printed = capsys.readouterr().out
    assert ("the embedding collapses" in printed) == warned
    assert ("stays at chance" in printed) == warned


# ---------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "more",
    [
        ["--epochs", "0"],
        ["--epochs", "-1"],
        ["--epochs", "many"],
        ["--batch-size", "0"],
        ["--batch-size", "1"],
        ["--batch-size", "28"],
        ["--temperature", "0"],
        ["--lr", "0"],
        ["--lr", "-1"],
        ["--lr", "inf"],
        ["--lr", "nan"],
        ["--weight-decay", "-1"],
        ["--seed", "-1"],
        ["--seed", "9" * 20],
        ["--image-size", "0"],
        ["--image-size", "1"],
        ["--warmup-epochs", "1e308"],
        ["--limit", "0"],
        ["--limit", "-5"],
        ["--hidden", "0"],
        ["--dim", "0"],
        ["--max-steps", "0"],
        ["--warmup-epochs", "-1"],
        ["--crop-scale", "0"],
        ["--crop-scale", "1.5"],
        ["--color-strength", "-1"],
        ["--eval-every", "0"],
        ["--workers", "0"],
        ["--head-layers", "4"],
        ["--arch", "vgg"],
        ["--augment", "rotate"],
        ["--optimizer", "lion"],
        ["--log-with", "paper"],
        ["--data", "cifar11"],
        ["--init", "nowhere.safetensors"],
        ["--unknown", "1"],
        ["--epoch", "3"],
    ],
    ids=lambda more: "".join(more),
)
def test_bad_flags_are_refused_in_one_line_before_training(folder, tmp_path, capsys, more):
    out = tmp_path / "run"
    error = refused(capsys, simclr.main, ["--data", folder, "--out", out, *TINY, *more])
    assert more[0] in error or more[1] in error
    assert not (out / "checkpoint.pt").exists()


def test_an_init_of_another_architecture_is_refused(plain, folder, tmp_path, capsys):
    argv = [
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        *TINY,
        "--arch",
        "resnet18",
        "--init",
        plain / "encoder.safetensors",
    ]
    assert "--arch small" in refused(capsys, simclr.main, argv)


def test_an_out_that_cannot_be_a_run_is_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    argv = ["--data", folder, *TINY, "--out"]
    assert "file" in refused(capsys, simclr.main, [*argv, tmp_path / "file"])
    assert "file" in refused(capsys, simclr.main, [*argv, tmp_path / "file" / "run"])
    assert str(tmp_path) in refused(capsys, simclr.main, [*argv, tmp_path])
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", None),
        ("checkpoint.pt", b"PK"),
        ("results.json", b"[{"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(folder, tmp_path, capsys, name, content):
    out = run(folder, tmp_path / "run", "--max-steps", 1)
    if name != "results.json":
        (out / "results.json").unlink()
    (out / name).unlink() if content is None else (out / name).write_bytes(content)
    argv = ["--data", folder, "--out", out, *TINY, "--max-steps", 1]
    capsys.readouterr()
    assert "no folder of a run" in refused(capsys, simclr.main, argv)


def test_going_on_mends_the_metrics_and_keeps_the_first_config(folder, tmp_path):
    out = run(folder, tmp_path / "run")
    rows, config = metrics(out), json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"torch": "2.6.0"}))
    (out / "results.json").unlink()
    run(folder, out)
    assert metrics(out) == rows
    assert json.loads((out / "config.json").read_text())["torch"] == "2.6.0"


def test_a_signal_during_the_last_evaluation_stops_before_the_table(folder, tmp_path, monkeypatch):
    real = common.knn_accuracy

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(common, "knn_accuracy", signalled)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        run(folder, out, "--eval-every", 9)
    assert exit_.value.code == 128 + signal.SIGTERM and checkpoint(out)["step"] == 12
    assert not (out / "results.json").exists()


def test_bfloat16_trains_float32_weights(plain, folder, tmp_path, monkeypatch):
    # What `accelerate launch --mixed_precision bf16` sets.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    argv = ["--data", folder, "--out", tmp_path / "run", *TINY]
    code, _, err = finish(command("simclr.py", *argv))
    assert code == 0, err
    state = checkpoint(tmp_path / "run")
    assert all(v.dtype == torch.float32 for v in state["model"].values() if v.is_floating_point())
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["mixed_precision"] == "bf16" and metrics(tmp_path / "run")[1]["loss"] < 4
    exact, rounded = (metrics(run)[0]["loss"] for run in (plain, tmp_path / "run"))
    assert 1e-5 < abs(exact - rounded) < 0.3  # it did compute in bfloat16


def test_spread_is_one_on_the_sphere():
    z = F.normalize(torch.randn(4096, 64, generator=common.generator(0)), dim=1)
    assert z.std(0).mean() * 64**0.5 == pytest.approx(1, abs=0.02)
