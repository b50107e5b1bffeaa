"""Several real processes, each with its own part of every batch, do what one process does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from child import ROOT, SAVE_OFTEN, Child, command
from conftest import TINY, metrics, run, words
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common

SGD = "--optimizer sgd --lr 0.1"
# By name, the method, its flags on one process, and those that two have too.
CASES = {
    "simclr": ("simclr", SGD, ""),
    "chunks": ("simclr", SGD, "--chunk-size 4"),
    "moco": ("moco", f"{SGD} --key-momentum 0.5 --queue-size 30", ""),
    "swav": ("swav", f"{SGD} --crops 2 1 --crop-sizes 12 8 --queue-size 18 --queue-start 0", ""),
    "supcon": ("supcon", f"{SGD} --label-noise 0.3", ""),
    "in": ("supcon", f"{SGD} --loss in", ""),
    "ce": ("supcon", f"{SGD} --loss ce", ""),
    "drlim": ("drlim", "--ratio 2 --lr 0.1", ""),
}
SIZE = {"simclr": 12, "moco": 12, "swav": 12, "supcon": 12, "drlim": 24}  # of a batch
STOP = 8  # The processes that are stopped have seen two of three epochs, of four steps each.


# --------------------------------------------------------------------------------------
# What the processes execute
# --------------------------------------------------------------------------------------


def without_batch_statistics(*_: object) -> nn.Module:
    """An encoder without batch norm, which does not see how a batch is split."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.width = 8
    return net


def record(
    method: str, argv: list[str], path: str, stop: int | None = None, batch_norm: bool = False
) -> None:
    """Run a method, and save the images, views and gradients of this process at each step.

    Args:
        method, argv: its name and flags.
        path: of the files, to which the process's rank is added.
        stop: after so many steps.
        batch_norm: leave it in the networks.
    """
    seen = {"index": [], "views": [], "gradients": []}
    rank = os.environ.get("RANK", "0")

    def note_batches(*args):
        for index, views in batches(*args):
            seen["index"].append(index)
            seen["views"].append([x.cpu() for x in views])
            yield index, views

    def note_gradients(optimizer, *_):
        if len(seen["gradients"]) == stop:
            torch.save(seen, f"{path}{rank}")
            raise SystemExit
        if not isinstance(optimizer, torch.optim.LBFGS):  # which trains the linear probe
            parameters = optimizer.param_groups[0]["params"]
            gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
            seen["gradients"].append(torch.cat(gradients).cpu())

    batches, common.batches = common.batches, note_batches
    if not batch_norm:
        common.build_encoder = without_batch_statistics
        nn.BatchNorm1d = nn.LayerNorm  # in the heads
        torch.optim.Adam = torch.optim.SGD  # Adam would magnify rounding.
    register_optimizer_step_pre_hook(note_gradients)
    run(method, *argv)
    torch.save(seen, f"{path}{rank}")


# --------------------------------------------------------------------------------------
# One process and two
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does_and_one_continues_their_run(
    case, images, labeled, tmp_path
):
    method, flags, more = CASES[case]
    is_evaluated = case in ("moco", "drlim")  # To evaluate all would take longer.
    data = images if is_evaluated else labeled
    argv = words("--data", data, "--epochs 3 --eval-every 1 --batch-size", SIZE[method], flags)

    def start(name, processes, out, more="", stop=None):
        call = (method, [*argv, *words(more, "--out", tmp_path / out)], f"{tmp_path}/{name}", stop)
        source = f"{SAVE_OFTEN}import test_processes\ntest_processes.record{call}\n"
        return Child(source, tmp_path / f"{name}.txt", processes)

    two = start("seen-two", 2, "two", more, STOP)
    start("seen-one", 1, "one").end(0)
    two.end(0, 0)
    expected = torch.load(tmp_path / "seen-one0")
    ranks = [torch.load(tmp_path / f"seen-two{rank}") for rank in range(2)]

    # Images and views of the two processes are those of the one, in this order.
    for step in range(STOP if method != "drlim" else 0):
        index = torch.cat([seen["index"][step] for seen in ranks])
        assert torch.equal(index, expected["index"][step]) and len(index.unique()) == 12
        for i, views in enumerate(expected["views"][step]):
            both = torch.cat([seen["views"][step][i] for seen in ranks], dim=1)
            assert torch.equal(both, views)

    # So are the gradients, on both.
    for step in range(STOP):
        gradient = expected["gradients"][step]
        assert gradient.norm() > 1e-3
        for seen in ranks:
            error = (seen["gradients"][step] - gradient).norm() / gradient.norm()
            assert error < (1e-5 if step == 0 else 1e-3), step

    # One process continues after the second epoch, and ends as if it had been alone.
    assert len(metrics(tmp_path / "two")) == 2
    start("continued", 1, "two", more).end(0)
    for row, whole in zip(*(metrics(tmp_path / name) for name in ("two", "one")), strict=True):
        for name in ("loss", "chance", "lr"):
            assert row[name] == pytest.approx(whole[name], rel=1e-3), name
    if is_evaluated:
        both = [
            json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one")
        ]
        for row, whole in zip(*both, strict=True):
            assert row.pop("features") == whole.pop("features")
            assert row == pytest.approx(whole, abs=6)  # one of 18 images


def test_mocos_keys_are_encoded_in_the_same_groups(labeled, tmp_path):
    queues = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = f"--epochs 1 --batch-size 32 --queue-size 32 --key-groups 2 --out {out}"
        argv = words(TINY["moco"], "--data", labeled, flags)
        child = Child(command("moco", argv), tmp_path / "text", processes)
        child.end(*[0] * processes)
        queues.append(torch.load(out / "checkpoint.pt")["queue"])
    torch.testing.assert_close(*queues)


def test_a_run_under_torchrun_is_one_run(images, tmp_path, capsys):
    out = tmp_path / "run"
    argv = words(TINY["simclr"], "--eval-every 1 --data", images, "--out", out)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "simclr.py"), *argv], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "2" in lines[0] and "cpu" in lines[0]
    assert [line.split()[:2] for line in lines[2:4]] == [["epoch", "1"], ["epoch", "2"]]
    assert len(lines) == 2 + 2 + 4  # with the table
    assert len(metrics(out)) == 2 and not list(out.glob(".*"))

    # Its processes had batch statistics of their own, and the file has those that were evaluated.
    encoder, about = common.load_encoder(out / "encoder.safetensors")
    splits = common.load_splits(str(images), "", None, torch.device("cpu"), 0)
    knn = common.knn_accuracy(encoder, *splits[1:], about["image_size"])
    assert metrics(out)[-1]["knn"] == pytest.approx(knn)
    run("simclr", "--eval-every 1 --data", images, "--out", out, "--epochs 3")
    assert len(metrics(out)) == 3


def refuse(source, output) -> str:
    """The one line with which two processes refuse to run."""
    text = Child(source, output, 2).end(1, 2)
    lines = [line for line in text.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert "Traceback" not in text
    return lines[0]


@pytest.mark.parametrize("flags", ["--batch-size 9", "--data nowhere"])
def test_wrong_flags_are_refused_in_one_line(flags, images, tmp_path):
    argv = words(TINY["simclr"], "--data", images, "--out", tmp_path / "run", flags)
    assert flags.split()[0] in refuse(command("simclr", argv), tmp_path / "text")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_the_processes_do_not_share_is_refused(images, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    argv = words(TINY["simclr"], "--data", images, "--out run")
    run("simclr", *argv, "--out", tmp_path / "0" / "run")
    before = shutil.copytree(tmp_path / "0", tmp_path / "before")
    source = f"import os\nos.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
    assert "--out" in refuse(
        source + command("simclr", [*argv, "--epochs", "3"]), tmp_path / "text"
    )
    assert metrics(tmp_path / "0" / "run") == metrics(before / "run")
