"""What a run of each method promises: its files, console and flags, and that it can be killed."""

import contextlib
import fcntl
import importlib
import itertools
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import (
    METHODS,
    ROOT,
    arguments,
    assert_same_end,
    checkpoint,
    command,
    finish,
    metrics,
    refused,
    run,
    same_model,
    settings,
    start,
    write_folder,
)
from PIL import Image
from safetensors.torch import load_file

import common

FILES = {"config.json", "metrics.jsonl", "checkpoint.pt", "results.json"}
OWN_FILES = {
    "simclr": {"views.png", "encoder.safetensors"},
    "moco": {"views.png", "encoder.safetensors"},
    "swav": {"views.png", "encoder.safetensors", "prototypes.png"},
    "supcon": {"views.png", "encoder.safetensors"},
    "drlim": {"map.png", "map.npz"},
}
LOSSES = {
    "simclr": "nt_xent",
    "moco": "info_nce",
    "swav": "swapped_prediction_loss",
    "supcon": "supcon_loss",
    "drlim": "contrastive_loss",
}


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def plain(method, few, tmp_path_factory):
    """A run of two epochs of six steps."""
    return run(method, few, tmp_path_factory.mktemp("plain") / "run")


def main_of(method):
    return importlib.import_module(method).main


# --------------------------------------------------------------------------------------
# What it leaves and shows
# --------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_that_the_readme_lists(method, plain):
    assert {path.name for path in plain.iterdir()} == FILES | OWN_FILES[method]
    config = json.loads((plain / "config.json").read_text())
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert config["settings"]["seed"] == 0 and config["settings"]["method"] == method


def test_metrics_have_a_row_for_each_epoch(method, plain):
    rows = metrics(plain)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12)]
    measured = "5-NN" if method == "drlim" else "knn"
    for row in rows:
        assert 0 < row["spread"] < 1.5 and 0 <= row[measured] <= 100
        assert row["chance"] > 0 and row["images_per_s"] > 0
    assert rows[-1]["minutes_left"] == 0


def test_the_encoder_file_says_what_it_is(method, plain, few):
    if method == "drlim":
        pytest.skip("the paper's network is not exported")
    _, about = common.load_encoder(plain / "encoder.safetensors")
    name = "supcon-out" if method == "supcon" else method
    normalizes = method in ("moco", "swav", "supcon")
    assert about == {
        "method": name,
        "architecture": "small",
        "stem": "3x3",
        "image_size": "12",
        "mean": "[0.485, 0.456, 0.406]" if normalizes else "[0.0, 0.0, 0.0]",
        "std": "[0.229, 0.224, 0.225]" if normalizes else "[1.0, 1.0, 1.0]",
        "data": str(few),
    }
    results = json.loads((plain / "results.json").read_text())
    assert [row["features"] for row in results] == [name, "random", "raw pixels"]


def test_the_last_rows_knn_is_that_of_the_saved_encoder(method, plain, few):
    if method == "drlim":
        pytest.skip("it has a measure of its own")
    _, bank, test, _ = common.load_splits(str(few), "nowhere", None, torch.device("cpu"), 1)
    encoder, about = common.load_encoder(plain / "encoder.safetensors")
    normalize = common.Normalize(json.loads(about["mean"]), json.loads(about["std"]))
    knn = common.knn_accuracy(torch.nn.Sequential(normalize, encoder), bank, test, 12)
    assert metrics(plain)[-1]["knn"] == pytest.approx(knn)


@pytest.mark.parametrize("size", [12, 66])
def test_held_out_images_are_watched_and_the_test_images_are_used_at_the_end(
    method, few, tmp_path, size
):
    if method == "drlim":
        pytest.skip("it has a measure of its own")
    side = "--crop-sizes 66 12" if method == "swav" else "--image-size 66"
    more = "" if size == 12 else side
    more += " --loss ce" if method == "supcon" else ""
    out = run(method, few, tmp_path / "run", "--holdout 9 --max-steps 3 --lr 0.01", more)
    row = metrics(out)[-1]
    _, bank, test, held_out = common.load_splits(
        str(few), "nowhere", None, torch.device("cpu"), 1, holdout=9
    )
    assert settings(out)["images"] == "18 images (" + settings(out)["images"].split("(")[1]
    encoder, about = common.load_encoder(out / "encoder.safetensors")
    normalize = common.Normalize(json.loads(about["mean"]), json.loads(about["std"]))
    network = torch.nn.Sequential(normalize, encoder)
    assert row["knn"] == pytest.approx(common.knn_accuracy(network, bank, held_out, size))
    result = json.loads((out / "results.json").read_text())[0]
    assert result["kNN"]["mean"] == pytest.approx(common.knn_accuracy(network, bank, test, size))
    if method == "supcon":
        state = checkpoint(out)["model"]
        at_end = result["own classifier"]["mean"]
        for images, expected in ((held_out, row["classifier"]), (test, at_end)):
            h = common.extract_features(network, images, size)
            scores = h @ state["2.weight"].T + state["2.bias"]
            assert common.accuracy(scores, images.labels) == pytest.approx(expected)


@pytest.mark.parametrize("size", [12, 66])
def test_encoders_are_shown_images_normalized_as_the_file_says(
    method, few, tmp_path, monkeypatch, size
):
    if method == "drlim":
        pytest.skip("it has no views")
    inputs, views, build, batches = [], [], common.build_encoder, common.batches

    def noting_build(*arguments):
        encoder = build(*arguments)
        encoder.register_forward_pre_hook(
            lambda net, x: inputs.append((net.training, x[0].clone()))
        )
        return encoder

    def noting_batches(*arguments, **more):
        for index, batch in batches(*arguments, **more):
            views.append(batch[0].clone())
            yield index, batch

    monkeypatch.setattr(common, "build_encoder", noting_build)
    monkeypatch.setattr(common, "batches", noting_batches)
    side = f"--crop-sizes {size} 12" if method == "swav" else f"--image-size {size}"
    out = run(method, few, tmp_path / "run", "--max-steps 1 --holdout 9", side)
    _, about = common.load_encoder(out / "encoder.safetensors")
    normalize = common.Normalize(json.loads(about["mean"]), json.loads(about["std"]))
    expected = normalize(views[0][0] if method == "moco" else views[0].flatten(0, 1))
    trained_on = [x for training, x in inputs if training and x.shape == expected.shape]
    assert sum(torch.allclose(x, expected) for x in trained_on) == 1
    # In the evaluations, the darkest and the brightest pixels tell.
    evaluated = [x for training, x in inputs if not training]
    assert len(evaluated) >= 4
    for x in evaluated:
        assert ((x.min() < -1) and (x.max() > 1.5)) == (method != "simclr")


def test_views_png_shows_a_batch_and_its_views(method, plain):
    if method == "drlim":
        pytest.skip("it has no views")
    rows = 9 if method == "swav" else 3  # SwAV: the images, 2 large crops and 6 small ones
    with Image.open(plain / "views.png") as picture:
        assert 4 * 84 < picture.width < 5 * 84
        assert rows * 84 < picture.height < (rows + 1) * 84


def test_the_console_shows_one_aligned_table_with_blanks_for_what_was_not_measured(
    method, few, tmp_path, capsys
):
    out = run(method, few, tmp_path / "run", "--epochs", 3, "--eval-every", 2)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.lstrip().startswith("epoch"))
    assert sum(line == header for line in lines) == 1
    begin = lines.index(header)
    table = [line for line in lines[begin:] if not line.startswith("warning")][: 3 + 1]
    assert len({len(line) for line in table}) == 1
    names = re.split(r" {2,}", header.strip())
    assert names[:4] == ["epoch", "loss", "chance", "spread"]
    assert names[-2:] == ["images/s", "time left"]
    measure = "5-NN" if method == "drlim" else "kNN"
    end = header.index(measure) + len(measure)
    cells = [line[end - 8 : end].strip() for line in table[1:]]
    rows = metrics(out)
    key = "5-NN" if method == "drlim" else "knn"
    assert [key in row for row in rows] == [False, True, True]
    assert cells == [f"{row[key]:.2f}" if key in row else "" for row in rows]
    assert all(f"{row['loss']:.4f}" in line for row, line in zip(rows, table[1:], strict=True))


def test_progress_is_shown_on_a_terminal(few, tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    argv = arguments("simclr", few, tmp_path / "run", "--eval-every 2")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "simclr.py"), *argv], stdout=subprocess.DEVNULL, stderr=end
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # when the process has ended
        while True:
            shown += os.read(terminal, 4096)
    assert process.wait() == 0
    for part in (b"epoch 1/2", b"epoch 2/2", b"features", b"evaluation", b"linear probe"):
        assert part in shown


def test_a_finished_run_only_shows_its_results(method, plain, few, capsys):
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    run(method, few, plain)
    results = json.loads((plain / "results.json").read_text())
    printed = capsys.readouterr().out
    assert "is finished" in printed and common.format_table(results) in printed
    assert before == {path.name: path.read_bytes() for path in plain.iterdir()}


def test_log_with_reports_every_row_to_the_tracker(method, few, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(method, few, tmp_path / "run", "--log-with", "tensorboard")
    events = EventAccumulator(str(out / method))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in metrics(out)]


# --------------------------------------------------------------------------------------
# Crash-only: it can be stopped at any moment, and the same command continues it
# --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run(method, plain, few, tmp_path):
    assert_same_end(run(method, few, tmp_path / "again"), plain)


def test_a_run_that_is_killed_in_a_save_and_within_an_epoch_ends_bit_identical(
    method, few, tmp_path, capsys
):
    longer = ["--epochs", 10, "--batch-size", 2, "--eval-every", 99]
    if method == "drlim":
        longer = ["--epochs", 30, "--eval-every", 99]
    if method == "swav":  # The queue is half full at the first kill.
        longer += ["--queue-start", 0, "--queue-size", 16, "--freeze-prototypes", 0]
    whole, out = run(method, few, tmp_path / "whole", *longer), tmp_path / "run"
    argv = arguments(method, few, out, *longer)

    killed = start(method, *argv, output=tmp_path / "1", save_always=True, die_in_save=5)
    code, text = killed.wait()
    assert code == -signal.SIGKILL, text
    assert checkpoint(out)["step"] == 4  # in the middle of the first epoch
    assert (out / ".partial-checkpoint.pt").exists()

    moment = random.uniform(0, 0.5)
    killed = start(method, *argv, output=tmp_path / "2", save_always=True)
    while checkpoint(out)["step"] == 4 and killed.processes[0].is_alive():
        time.sleep(0.002)
    time.sleep(moment)
    killed.processes[0].kill()
    code, text = killed.wait()
    assert code == -signal.SIGKILL and "resuming after step 4 of" in text, (moment, text)

    step = checkpoint(out)["step"]
    capsys.readouterr()
    run(method, few, out, *longer)
    assert f"resuming after step {step} of" in capsys.readouterr().out
    assert step < checkpoint(out)["step"]
    assert_same_end(out, whole)
    assert not list(out.glob(".partial*"))


def test_without_more_time_a_checkpoint_is_saved_after_each_epoch(
    method, few, tmp_path, monkeypatch
):
    module, steps = importlib.import_module(method), []
    real = module.save_run
    monkeypatch.setattr(
        module, "save_run", lambda out, state: steps.append(state["step"]) or real(out, state)
    )
    run(method, few, tmp_path / "run", "--eval-every", 9)
    assert steps == [6, 12]
    monkeypatch.setattr(module, "SAVE_MINUTES", 0)
    run(method, few, tmp_path / "often", "--eval-every", 9)
    assert steps[2:] == [*range(1, 13)]


@pytest.mark.parametrize("more", ["", "--stream --workers 2"], ids=["memory", "stream"])
def test_a_run_that_was_stopped_before_its_table_only_makes_the_table(
    method, few, tmp_path, capsys, more
):
    out = run(method, few, tmp_path / "run", "--epochs 1", more)
    rows, results = metrics(out), (out / "results.json").read_text()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"versions": {"torch": "2.6.0"}}))
    (out / "results.json").unlink()
    run(method, few, out, "--epochs 1", more)
    assert "resuming after step 6 of 6" in capsys.readouterr().out
    assert metrics(out) == rows and (out / "results.json").read_text() == results
    config = json.loads((out / "config.json").read_text())
    assert config["versions"] == {"torch": "2.6.0"}  # those that the run began with


def test_ctrl_c_prints_one_line_and_the_same_command_continues(few, tmp_path):
    out = tmp_path / "run"
    argv = arguments("simclr", few, out, "--epochs", 40, "--eval-every", 999)
    process = command("simclr.py", *argv)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGINT
    assert "same command continues" in err and len(err.strip().splitlines()) == 1, err
    step = checkpoint(out)["step"]
    assert 0 < step < 240 and not (out / "results.json").exists()
    code, text, err = finish(command("simclr.py", *argv))
    assert code == 0 and f"resuming after step {step} of 240" in text, err
    assert checkpoint(out)["step"] == 240


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(method, few, tmp_path):
    out = tmp_path / "run"
    argv = arguments(method, few, out, "--epochs", 50, "--eval-every", 99)
    killed = start(method, *argv, output=tmp_path / "1", save_always=True, die_in_save=3)
    killed.wait()
    before = (out / "checkpoint.pt").read_bytes()
    code, text = start(method, *argv, output=tmp_path / "2", file_size=2000).wait()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "free some space" in errors[0], text
    assert "Traceback" not in text
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob(".partial*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    method, few, tmp_path, monkeypatch, capsys
):
    module, calls = importlib.import_module(method), itertools.count()
    real = getattr(module, LOSSES[method])

    def breaks(*args):  # at step 8 of 12, in the second epoch
        return real(*args) * (math.nan if next(calls) == 8 else 1)

    monkeypatch.setattr(module, LOSSES[method], breaks)
    monkeypatch.setattr(module, "SAVE_MINUTES", 0)
    with pytest.raises(SystemExit) as exit_:
        run(method, few, tmp_path / "run")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "epoch 2 is not finite" in error and error.count("\n") == 1
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 8  # a checkpoint within the epoch is finite as well
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "run" / "results.json").exists()


EXTREMES = {
    "simclr": ["--temperature 0.01", "--temperature 10"],
    "moco": ["--temperature 0.01", "--temperature 10"],
    "swav": ["--temperature 0.01 --epsilon 0.002", "--temperature 10 --epsilon 10"],
    "supcon": ["--temperature 0.01", "--temperature 10", "--temperature 0.01 --loss in"],
    "drlim": ["--margin 100", "--margin 0.001"],
}


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_run_stays_finite_at_extreme_settings(method, few, tmp_path, precision):
    # Images without classes, or views above 64 pixels, save the evaluation at the end. In bfloat16,
    # large views take longer than that on some CPUs.
    data = few if method in ("supcon", "drlim") else few / "train"
    large = "--image-size 66" if method == "supcon" and not precision else ""
    for i, more in enumerate(EXTREMES[method]):
        out = tmp_path / str(i)
        argv = arguments(method, data, out, more, large, "--eval-every 9")
        environment = {"ACCELERATE_MIXED_PRECISION": precision} if precision else {}
        started = start(method, *argv, output=tmp_path / "text", environment=environment)
        code, text = started.wait()
        assert code == 0, text
        rows = metrics(out)
        assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows), more
        values = checkpoint(out)["model"].values()
        assert all(value.isfinite().all() for value in values), more


def test_memory_does_not_grow_with_the_steps(method, few, tmp_path):
    larger = {"swav": "--crop-sizes 24 12", "drlim": ""}.get(method, "--image-size 24")
    more = "--epochs 999 --max-steps 301 --eval-every 99"
    argv = arguments(method, few, tmp_path / "run", larger, more)
    watched = start(
        "child.watch_memory", method, tmp_path / "rss", "50,300", *argv, output=tmp_path / "text"
    )
    code, text = watched.wait()
    assert code == 0, text
    early, late = map(int, (tmp_path / "rss").read_text().split())
    assert late - early < 250 * 24 * 2**10  # 24 KiB a step: less than half of the views


# --------------------------------------------------------------------------------------
# What it refuses
# --------------------------------------------------------------------------------------


def test_a_run_with_other_settings_is_refused_and_they_are_named(method, plain, few, capsys):
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    argv = arguments(method, few, plain, "--lr", "0.125", "--epochs", "3")
    error = refused(capsys, main_of(method), argv)
    assert "lr was" in error and "epochs was 2" in error and "seed" not in error
    assert before == {path.name: path.read_bytes() for path in plain.iterdir()}


def test_what_may_change_does_not_refuse(method, plain, few, capsys):
    run(method, few, plain, "--eval-every", 7, "--workers", 3, "--root", "elsewhere")
    assert "is finished" in capsys.readouterr().out


def test_the_folder_of_another_method_is_refused(method, plain, few, capsys):
    other = "moco" if method == "simclr" else "simclr"
    error = refused(capsys, main_of(other), arguments(other, few, plain))
    assert f"method was {method}" in error


def test_other_image_files_are_refused(method, tmp_path, capsys):
    folder = write_folder(tmp_path / "data", 9)
    out = run(method, folder, tmp_path / "run")
    (out / "results.json").unlink()
    image = folder / "train" / "along" / "0.png"
    image.rename(image.with_name("renamed.png"))
    error = refused(capsys, main_of(method), arguments(method, folder, out))
    assert "images was 27 images" in error


def test_changed_test_images_are_refused(method, tmp_path, capsys):
    folder = write_folder(tmp_path / "data", 9)
    out = run(method, folder, tmp_path / "run")
    (out / "results.json").unlink()
    [split] = [name for name in ("val", "test") if (folder / name).is_dir()]
    image = next((folder / split).rglob("*.png"))
    image.rename(image.with_name("renamed.png"))
    error = refused(capsys, main_of(method), arguments(method, folder, out))
    assert "test images was" in error


def test_a_run_of_the_code_before_this_format_is_refused(method, few, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    old = {"settings": {"seed": 0}, "images": "27 images", "devices": "1 cpu", "torch": "2.6.0"}
    (out / "config.json").write_text(json.dumps(old))
    torch.save({"step": 3}, out / "checkpoint.pt")
    error = refused(capsys, main_of(method), arguments(method, few, out))
    assert "another version" in error and "--out" in error


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", None),
        ("checkpoint.pt", b"PK"),
        ("results.json", b"[{"),
        ("results.json", b"[]"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(plain, method, few, tmp_path, capsys, name, content):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    if name == "checkpoint.pt":
        (out / "results.json").unlink()
    (out / name).unlink() if content is None else (out / name).write_bytes(content)
    error = refused(capsys, main_of(method), arguments(method, few, out))
    assert str(out) in error


def test_an_out_that_cannot_hold_a_run_is_refused(few, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path):
        error = refused(capsys, main_of("simclr"), arguments("simclr", few, out))
        assert str(out) in error
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


BAD = [
    ["--epochs", "0"],
    ["--epochs", "-1"],
    ["--epochs", "many"],
    ["--epochs", "1.5"],
    ["--batch-size", "0"],
    ["--batch-size", "1"],
    ["--batch-size", "99"],
    ["--lr", "0"],
    ["--lr", "-1"],
    ["--lr", "inf"],
    ["--lr", "nan"],
    ["--weight-decay", "-1"],
    ["--warmup-epochs", "-1"],
    ["--warmup-epochs", "1e308"],
    ["--max-steps", "0"],
    ["--seed", "-1"],
    ["--seed", "9" * 20],
    ["--limit", "0"],
    ["--limit", "-5"],
    ["--dim", "0"],
    ["--arch", "vgg"],
    ["--workers", "0"],
    ["--eval-every", "0"],
    ["--log-with", "paper"],
    ["--data", "cifar11"],
    ["--init", "nowhere.safetensors"],
    ["--unknown", "1"],
    ["--epoch", "3"],  # flags are not abbreviated
]
BAD_VIEWS = [
    ["--temperature", "0"],
    ["--hidden", "0"],
    ["--augment", "rotate"],
    ["--optimizer", "lion"],
    ["--head-layers", "9"],
    ["--stem", "5x5"],
]
OWN_BAD = {
    "simclr": [
        ["--image-size", "1"],
        ["--crop-scale", "0"],
        ["--crop-scale", "1.5"],
        ["--color-strength", "-1"],
        ["--lr-rule", "cubic"],
        ["--chunk-size", "0"],
        ["--chunk-size", "3"],
        ["--chunk-size", "8"],
    ],
    "moco": [
        ["--queue-size", "3"],
        ["--queue-size", "7", "--symmetric"],
        ["--bn-splits", "3"],
        ["--bn-splits", "4"],
        ["--key-momentum", "1.5"],
        ["--jitter", "1", "1", "1", "1", "-1"],
        ["--jitter", "nan", "1", "1", "0.5", "1"],
        ["--jitter", "1", "1", "1", "0.5", "1.5"],
        ["--jitter", "1"],
        ["--version", "v3"],
        ["--schedule", "linear"],
        ["--optimizer", "lars"],
        ["--image-size", "1"],
    ],
    "swav": [
        ["--crops", "1", "6"],
        ["--crops", "2", "0"],
        ["--crops", "2", "6", "3"],
        ["--crop-sizes", "12", "--crops", "2", "6"],
        ["--crop-sizes", "12", "6", "--crops", "2"],
        ["--crop-sizes", "12", "0"],
        ["--crop-sizes", "1", "1"],
        ["--crop-scales", "0.1", "1", "--crops", "2", "6"],
        ["--crop-scales", "0.1", "1", "0.2", "0.1"],
        ["--crop-scales", "0.1", "1", "0.2", "--crops", "2"],
        ["--crop-scales", "0.1", "1.1", "0.1", "0.2"],
        ["--crop-scales", "0", "1", "0.1", "0.2"],
        ["--prototypes", "1"],
        ["--epsilon", "0"],
        ["--queue-size", "-1"],
        ["--freeze-prototypes", "-1"],
        ["--queue-start", "nan"],
    ],
    "supcon": [
        ["--label-noise", "1.1"],
        ["--label-noise", "-0.1"],
        ["--max-positives", "0"],
        ["--max-positives", "1", "--loss", "ce"],
        ["--loss", "both"],
        ["--chunk-size", "0"],
        ["--chunk-size", "3"],
    ],
    "drlim": [
        ["--margin", "0"],
        ["--margin", "nan"],
        ["--ratio", "0"],
        ["--classes", "7"],
        ["--classes", "nowhere"],
        ["--neighbours", "26"],
        ["--graph", "labels", "--classes", "0"],
        ["--graph", "labels", "--classes", "0", "across"],
        ["--graph", "labels", "--neighbours", "9"],
        ["--image-size", "1"],
        ["--image-size", "33"],
        ["--shifts", "12"],
        ["--stem", "7x7"],
    ],
}


def test_bad_flags_are_refused_in_one_line_before_training(method, few, tmp_path, capsys):
    bad = BAD + OWN_BAD[method] + (BAD_VIEWS if method != "drlim" else [])
    for more in bad:
        argv = arguments(method, few, tmp_path / "run", *more)
        error = refused(capsys, main_of(method), argv)
        assert more[0] in error or more[1] in error, (more, error)
        assert not (tmp_path / "run").exists(), more


def test_an_init_of_another_architecture_is_refused(method, few, tmp_path, capsys):
    path = tmp_path / "encoder.safetensors"
    common.save_encoder(path, common.build_encoder("small"), architecture="small", stem="3x3")
    argv = arguments(method, few, tmp_path / "run", "--arch", "resnet18", "--init", path)
    assert "--arch small" in refused(capsys, main_of(method), argv)


# --------------------------------------------------------------------------------------
# Its flags
# --------------------------------------------------------------------------------------

# Flags of which each must change the network that a run ends with.
CHANGES = [
    ["--seed", 1],
    ["--lr", 0.5],
    ["--weight-decay", 0.1],
    ["--batch-size", 8],
    ["--epochs", 3],
    ["--max-steps", 7],
    ["--limit", 20],
]
CHANGES_VIEWS = [
    ["--warmup-epochs", 0.5],
    ["--temperature", 0.5],
    ["--hidden", 24],
    ["--dim", 4],
    ["--augment", "crop"],
]
OWN_CHANGES = {
    "simclr": [
        ["--lr-rule", "linear"],
        ["--chunk-size", 2],
        ["--color-strength", 0],
        ["--crop-scale", 0.9],
        ["--head-layers", 3],
        ["--optimizer", "sgd"],
        ["--optimizer", "adamw"],
        ["--image-size", 16],
    ],
    "moco": [
        ["--key-momentum", 0.5],
        ["--queue-size", 19],
        ["--jitter", 1, 1, 1, 0.5, 1],
        ["--version", "v1"],
        ["--bn-splits", 2],
        ["--schedule", "steps"],
        ["--image-size", 16],
        ["--crop-scale", 0.9],
        ["--optimizer", "adamw"],
        ["--head-layers", 1],
        ["--symmetric"],
    ],
    "swav": [
        ["--prototypes", 5],
        ["--epsilon", 0.5],
        ["--queue-size", 0],
        ["--queue-start", 0],
        ["--freeze-prototypes", 0],
        ["--crops", 2, 1],
        ["--crop-sizes", 12, 8],
        ["--crop-scales", 0.5, 1, 0.1, 0.2],
        ["--optimizer", "adamw"],
        ["--optimizer", "sgd"],
        ["--color-strength", 0.5],
        ["--head-layers", 1],
    ],
    "supcon": [
        ["--loss", "in"],
        ["--chunk-size", 2],
        ["--loss", "ce"],
        ["--max-positives", 1],
        ["--label-noise", 0.5],
        ["--head-layers", 1],
        ["--image-size", 16],
        ["--crop-scale", 0.9],
        ["--optimizer", "adamw"],
        ["--color-strength", 1],
    ],
    "drlim": [
        ["--warmup-epochs", 1],
        ["--margin", 3],
        ["--ratio", 2],
        ["--neighbours", 3],
        ["--graph", "labels"],
        ["--graph", "shifts"],
        ["--shifts", 1],
        ["--classes", "along", "both"],
        ["--per-class", 6],
        ["--image-size", 10],
    ],
}


def test_each_flag_changes_the_result(method, few, tmp_path):
    # Images without classes, where the method needs none, save the evaluation at the end.
    data = few if method in ("supcon", "drlim") else few / "train"
    plain = run(method, data, tmp_path / "plain", "--eval-every", 9)
    changes = CHANGES + OWN_CHANGES[method] + (CHANGES_VIEWS if method != "drlim" else [])
    for i, more in enumerate(changes):
        out = run(method, data, tmp_path / str(i), "--eval-every", 9, *more)
        assert not same_shapes(out, plain) or not same_model(out, plain), more


def same_shapes(a, b):
    one, two = checkpoint(a)["model"], checkpoint(b)["model"]
    return {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}


def test_flags_that_only_concern_how_it_runs_do_not_change_the_result(method, few, tmp_path):
    data = few if method in ("supcon", "drlim") else few / "train"
    plain = run(method, data, tmp_path / "plain", "--eval-every", 9)
    for i, more in enumerate([["--eval-every", 1], ["--workers", 3], ["--root", "elsewhere"]]):
        assert same_model(run(method, data, tmp_path / str(i), *more), plain), more


def test_the_encoder_is_saved_before_the_final_evaluation(method, few, tmp_path, monkeypatch):
    def out_of_memory(*arguments, **more):
        raise MemoryError

    if method == "swav":  # What comes first after the last epoch.
        monkeypatch.setattr(importlib.import_module("swav"), "save_prototypes", out_of_memory)
    elif method == "drlim":
        monkeypatch.setattr(torch, "pca_lowrank", out_of_memory)
    else:
        monkeypatch.setattr(torch.linalg, "eigh", out_of_memory)
    flags = "--arch small --stem 3x3 --max-steps 1"
    with pytest.raises(MemoryError):
        run(method, few, tmp_path / "run", flags)
    assert (tmp_path / "run" / "encoder.safetensors").exists()
    assert not (tmp_path / "run" / "results.json").exists()

    monkeypatch.undo()
    out = run(method, few, tmp_path / "run", flags)
    assert (out / "results.json").exists()


def test_the_results_of_a_finished_run_do_not_need_its_checkpoint(
    method, few, plain, tmp_path, capsys
):
    out = shutil.copytree(plain, tmp_path / "run")
    (out / "checkpoint.pt").write_bytes(b"damaged")
    run(method, few, out)
    assert "is finished" in capsys.readouterr().out


def test_max_steps_ends_the_run_and_its_schedule(method, few, tmp_path):
    out = run(method, few, tmp_path / "run", "--max-steps", 5, "--eval-every", 2)
    rows = metrics(out)
    assert checkpoint(out)["step"] == 5 and [row["step"] for row in rows] == [5]
    assert rows[-1]["minutes_left"] == 0


def test_limit_leaves_so_many_training_images(method, few, tmp_path):
    out = run(method, few, tmp_path / "run", "--limit", 20, "--max-steps", 1)
    assert settings(out)["images"].startswith("20 images")


def test_stem_init_stream_and_the_default_folder(method, few, tmp_path, monkeypatch):
    tiny = ["--arch", "resnet18", "--stem", "7x7", "--max-steps", 1]
    out = run(method, few, tmp_path / "a", *tiny, "--stream")
    first = load_file(out / "encoder.safetensors")
    assert first["conv1.weight"].shape[2:] == (7, 7)
    monkeypatch.chdir(tmp_path)
    argv = arguments(method, few, tmp_path, *tiny, "--lr", 1e-12)
    argv += ["--init", str(out / "encoder.safetensors")]
    argv += ["--optimizer", "sgd"] if method != "drlim" else []
    del argv[2:4]  # --out
    main_of(method)(argv)
    again = load_file(tmp_path / "runs" / f"{method}-{few.name}" / "encoder.safetensors")
    for name, value in again.items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, first[name], atol=1e-9, rtol=0)


def test_an_init_trained_on_inputs_of_another_scale_is_warned_of(method, few, tmp_path, capsys):
    used = "imagenet" if method in ("moco", "swav", "supcon") else "none"
    for name in (used, "cifar10"):
        mean, std = common.STATISTICS[name]
        path = tmp_path / f"{name}.safetensors"
        about = {"architecture": "small", "stem": "3x3", "mean": list(mean), "std": list(std)}
        common.save_encoder(path, common.build_encoder("small"), **about)
        flags = "--arch small --stem 3x3 --max-steps 1 --init"
        run(method, few, tmp_path / name, flags, path)
        assert ("was trained on inputs" in capsys.readouterr().out) == (name != used)


def test_a_streamed_run_is_as_one_from_memory(method, few, tmp_path):
    more = ["--eval-every", 9, "--lr", 1e-5]
    memory = run(method, few, tmp_path / "memory", *more)
    files = run(method, few, tmp_path / "files", *more, "--stream", "--workers", 2)
    losses = [[row["loss"] for row in metrics(out)] for out in (memory, files)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    if method != "drlim":  # which reads its images once
        assert losses[0] != losses[1]  # crops of files are rounded to bytes
        assert all(0 < row["wait"] < 1 for row in metrics(files))
        assert not any(row["wait"] for row in metrics(memory))


def test_training_lowers_the_loss(method, few, tmp_path):
    adamw = ["--optimizer", "adamw", "--lr", 0.003, "--augment", "crop", "--batch-size", 8]
    more = {
        "simclr": [*adamw, "--crop-scale", 0.8],
        "moco": [*adamw, "--queue-size", 10, "--key-momentum", 0.9, "--crop-scale", 0.8],
        "swav": [*adamw, "--crops", 2, "--crop-scales", 0.8, 1, "--freeze-prototypes", 0],
        "supcon": [*adamw, "--crop-scale", 0.8],
        "drlim": ["--graph", "labels", "--lr", 0.01, "--ratio", 1],
    }[method]
    more += ["--queue-size", 0] if method == "swav" else []
    rows = metrics(run(method, few, tmp_path / "run", "--epochs", 12, "--eval-every", 99, *more))
    losses = [row["loss"] for row in rows]
    best = 0.8 * losses[0] if method == "drlim" else max(losses[:4]) - 0.2  # MoCo's rises first
    assert losses[-1] < best


def test_bfloat16_trains_float32_weights(method, few, tmp_path):
    # One step: later ones would tell apart what the processors' bfloat16 makes of the weights.
    more = ["--max-steps", 1] + (["--crops", 2] if method == "swav" else [])
    exact = run(method, few, tmp_path / "exact", *more)
    argv = arguments(method, few, tmp_path / "run", *more)
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # what `accelerate launch` sets
    code, text = start(method, *argv, output=tmp_path / "text", environment=bf16).wait()
    assert code == 0, text
    state = checkpoint(tmp_path / "run")
    for part in (state["model"], state.get("key_model", {})):
        assert all(v.dtype == torch.float32 for v in part.values() if v.is_floating_point())
    assert settings(tmp_path / "run")["mixed_precision"] == "bf16"
    losses = [metrics(out)[0]["loss"] for out in (exact, tmp_path / "run")]
    assert 1e-7 < abs(losses[0] - losses[1]) < 0.1  # it did compute in bfloat16


def test_a_run_of_images_without_classes_leaves_an_encoder(method, few, tmp_path, capsys):
    if method == "supcon":
        pytest.skip("it needs labels")
    out = run(method, few / "train" / "along", tmp_path / "run", "--limit", 9)
    assert all("knn" not in row and "5-NN" not in row for row in metrics(out))
    assert (out / "results.json").exists()
    run(method, few / "train" / "along", out, "--limit", 9)
    assert "is finished" in capsys.readouterr().out
