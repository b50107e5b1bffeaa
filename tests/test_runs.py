"""What a run of each further method promises, as test_simclr.py shows it for simclr.py."""

import importlib
import itertools
import json
import math
import os
import signal
import time

import pytest
import torch
from conftest import TINY, command, finish, metrics, refused, write_folder
from safetensors.torch import load_file

import common

OWN = {"moco": ["--queue-size", "18", "--symmetric"],
       "swav": ["--prototypes", "4", "--queue-size", "10", "--queue-start", "0.5"], "supcon": []}
TIMES = ("images_per_s", "minutes_left", "wait")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """27 images: 6 steps an epoch at batch 4."""
    return write_folder(tmp_path_factory.mktemp("few") / "stripes", 9)


@pytest.fixture(scope="module", params=OWN)
def method(request):
    return request.param


def arguments(method, folder, out, *more):
    return ["--data", str(folder), "--out", str(out), *TINY, *OWN[method], *map(str, more)]


def run(method, folder, out, *more):
    importlib.import_module(method).main(arguments(method, folder, out, *more))
    return out


@pytest.fixture(scope="module")
def plain(method, folder, tmp_path_factory):
    return run(method, folder, tmp_path_factory.mktemp("plain") / "run")


def weights(out):
    return load_file(out / "encoder.safetensors")


def same_weights(a, b):
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_end(a, b):
    """Bit by bit: weights, key encoder, queue, optimiser, sums; and all numbers but times."""
    def flat(v, path=""):
        if isinstance(v, dict | list | tuple):
            items = v.items() if isinstance(v, dict) else enumerate(v)
            return {k: x for name, part in items for k, x in flat(part, f"{path}/{name}").items()}
        return {path: v}

    ends = flat(checkpoint(a)), flat(checkpoint(b))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        if not name.endswith(TIMES):
            other = ends[1][name]
            same = torch.equal(value, other) if torch.is_tensor(value) else value == other
            assert same, name
    assert same_weights(a, b)
    results = [json.loads((run / "results.json").read_text()) for run in (a, b)]
    assert results[0] == results[1]


def test_a_run_leaves_what_the_readme_lists(method, plain, folder, capsys):
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "views.png", "encoder.safetensors",
             "results.json"} | ({"prototypes.png"} if method == "swav" else set())
    assert {path.name for path in plain.iterdir()} == files
    rows = metrics(plain)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12)]
    assert all(0 < row["spread"] < 1.5 and 0 <= row["knn"] <= 100 for row in rows)
    about = common.load_encoder(plain / "encoder.safetensors")[1]
    name = "supcon-out" if method == "supcon" else method
    assert (about["method"], about["image_size"]) == (name, "12")
    results = json.loads((plain / "results.json").read_text())
    assert [row["features"] for row in results] == [name, "random", "raw pixels"]
    before = (plain / "checkpoint.pt").read_bytes()
    run(method, folder, plain)
    assert "finished" in capsys.readouterr().out
    assert (plain / "checkpoint.pt").read_bytes() == before


def test_the_same_seed_gives_the_same_run(method, plain, folder, tmp_path):
    assert_same_end(run(method, folder, tmp_path / "again"), plain)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_bit_identical(method, folder, tmp_path, number):
    argv = ["--epochs", 15, "--batch-size", 2, "--freeze-prototypes", 3][: 6 if method == "swav"
                                                                        else 4]
    whole, out = run(method, folder, tmp_path / "whole", *argv), tmp_path / "run"
    argv = arguments(method, folder, out, *argv)
    process = command(f"{method}.py", *argv)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), err
    step = checkpoint(out)["step"]
    assert 0 < step < 195 and not (out / "results.json").exists()
    code, text, err = finish(command(f"{method}.py", *argv))
    assert code == 0 and f"going on after step {step} of 195" in text, err
    assert_same_end(out, whole)


def test_a_run_stopped_within_an_epoch_goes_on_within_it(method, plain, folder, tmp_path,
                                                         monkeypatch):
    real = common.batches

    def interrupted(*args):
        for step, *rest in real(*args):
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step, *rest

    monkeypatch.setattr(common, "batches", interrupted)
    with pytest.raises(SystemExit) as exit_:
        run(method, folder, tmp_path / "run")
    assert exit_.value.code == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "run")["step"] == 9 and len(metrics(tmp_path / "run")) == 1
    monkeypatch.setattr(common, "batches", real)
    assert_same_end(run(method, folder, tmp_path / "run"), plain)


CHANGES = {
    "moco": [["--key-momentum", 0.5], ["--queue-size", 19], ["--jitter", 1, 1, 1, 0.5, 1],
             ["--version", "v1"], ["--bn-splits", 2], ["--schedule", "steps"], ["--image-size", 16],
             ["--crop-scale", 0.9], ["--optimizer", "adamw"], ["--head-layers", 1]],
    "swav": [["--prototypes", 5], ["--epsilon", 0.5], ["--queue-size", 0], ["--queue-start", 0],
             ["--freeze-prototypes", 0], ["--crops", 2, 1], ["--crop-sizes", 12, 8],
             ["--crop-scales", 0.5, 1, 0.1, 0.2], ["--optimizer", "adamw"], ["--optimizer", "sgd"],
             ["--color-strength", 0.5], ["--head-layers", 1]],
    "supcon": [["--loss", "in"], ["--loss", "ce"], ["--max-positives", 1], ["--label-noise", 0.5],
               ["--head-layers", 1], ["--image-size", 16], ["--crop-scale", 0.9],
               ["--optimizer", "adamw"], ["--color-strength", 1]],
}
SHARED = [["--seed", 1], ["--lr", 0.5], ["--temperature", 0.5], ["--weight-decay", 0.1],
          ["--warmup-epochs", 0.5], ["--hidden", 24], ["--augment", "crop"], ["--dim", 4],
          ["--batch-size", 8], ["--limit", 20], ["--epochs", 3], ["--max-steps", 7]]


def test_each_flag_changes_the_result(method, plain, folder, tmp_path):
    for i, more in enumerate(CHANGES[method] + SHARED):
        out = run(method, folder, tmp_path / str(i), "--eval-every", 9, *more)
        assert not same_weights(out, plain), more


def test_other_flags_do_not(method, plain, folder, tmp_path):
    for i, more in enumerate([["--eval-every", 7], ["--workers", 3], ["--root", "elsewhere"]]):
        assert same_weights(run(method, folder, tmp_path / str(i), *more), plain), more


def test_architecture_stem_init_stream_and_default_folder(method, folder, tmp_path, monkeypatch):
    out = run(method, folder, tmp_path / "a", "--arch", "resnet18", "--stem", "7x7",
              "--max-steps", 1, "--stream")
    assert weights(out)["conv1.weight"].shape[2:] == (7, 7)
    monkeypatch.chdir(tmp_path)
    argv = arguments(method, folder, "", "--arch", "resnet18", "--stem", "7x7", "--max-steps", 1,
                     "--lr", 1e-12, "--optimizer", "sgd", "--init", out / "encoder.safetensors")
    argv.remove("--out"), argv.remove("")
    importlib.import_module(method).main(argv)
    again = tmp_path / "runs" / f"{method}-{folder.name}"
    for name, value in weights(again).items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, weights(out)[name], atol=1e-9, rtol=0)


def test_log_with_writes_every_row_to_the_tracker(method, folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(method, folder, tmp_path / "run", "--log-with", "tensorboard")
    events = EventAccumulator(str(out / method))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in metrics(out)]


def test_training_lowers_the_loss(method, folder, tmp_path):
    more = {"moco": ["--queue-size", 10, "--key-momentum", 0.9, "--crop-scale", 0.8],
            "swav": ["--crops", 2, "--crop-scales", 0.8, 1, "--freeze-prototypes", 0,
                     "--prototypes", 4, "--queue-size", 0],
            "supcon": ["--crop-scale", 0.8]}[method]
    out = tmp_path / "run"
    argv = ["--data", folder, "--out", out, *TINY, "--epochs", 12, "--optimizer", "adamw", "--lr",
            0.003, "--augment", "crop", "--batch-size", 8, *more]
    importlib.import_module(method).main([*map(str, argv)])
    losses = [row["loss"] for row in metrics(out)]  # MoCo's rises while the queue fills
    assert losses[-1] < max(losses[:4]) - 0.2


def test_a_run_with_other_settings_or_a_damaged_one_is_refused(method, plain, folder, tmp_path,
                                                               capsys):
    main = importlib.import_module(method).main
    error = refused(capsys, main, arguments(method, folder, plain, "--lr", "0.125"))
    assert "lr" in error and "seed" not in error
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    error = refused(capsys, main, arguments(method, folder, tmp_path / "run"))
    assert "no folder of a run" in error


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(method, folder, tmp_path,
                                                                  monkeypatch, capsys):
    module, calls = importlib.import_module(method), itertools.count()
    name = {"moco": "info_nce", "swav": "swapped_prediction_loss", "supcon": "supcon_loss"}[method]
    real = getattr(module, name)

    def breaks(*args):  # at step 8 of 12
        return real(*args) * (math.nan if next(calls) == 8 else 1)

    monkeypatch.setattr(module, name, breaks)
    with pytest.raises(SystemExit) as exit_:
        run(method, folder, tmp_path / "run")
    assert exit_.value.code == 2 and "step 8 is not finite" in capsys.readouterr().err
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("more", [
    ["--epochs", "0"], ["--batch-size", "1"], ["--batch-size", "28"], ["--temperature", "0"],
    ["--lr", "nan"], ["--seed", "-1"], ["--seed", "9" * 20], ["--limit", "0"], ["--dim", "0"],
    ["--arch", "vgg"], ["--warmup-epochs", "1e308"], ["--data", "cifar11"],
    ["--init", "nowhere.safetensors"], ["--epoch", "3"],
], ids=lambda more: "".join(more))
def test_bad_flags_are_refused_in_one_line_before_training(method, folder, tmp_path, capsys, more):
    main = importlib.import_module(method).main
    error = refused(capsys, main, arguments(method, folder, tmp_path / "run", *more))
    assert more[0] in error or more[1] in error
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_bfloat16_trains_float32_weights(method, plain, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
    code, _, err = finish(command(f"{method}.py", *arguments(method, folder, tmp_path / "run")))
    assert code == 0, err
    state = checkpoint(tmp_path / "run")
    parts = [state["model"], state.get("keys", {})]
    assert all(v.dtype == torch.float32 for part in parts for v in part.values()
               if v.is_floating_point())
    exact, rounded = (metrics(out)[0]["loss"] for out in (plain, tmp_path / "run"))
    assert 1e-5 < abs(exact - rounded) < 0.3  # it did compute in bfloat16
