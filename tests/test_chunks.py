"""--chunk-size of simclr.py and supcon.py: the gradient of a batch larger than the memory."""

import importlib

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, checkpoint, run, start
from test_processes import keep_gradients, without_batch_statistics
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import simclr

METHODS = {"simclr": "", "supcon": "--max-positives 1", "ce": "--loss ce"}


def save_gradients(name, has_batch_norm, folder, out, *flags):
    """Run one step, and save the parameter gradients with which it was made."""
    if has_batch_norm == "no":
        common.build_encoder = without_batch_statistics
        nn.BatchNorm1d = nn.LayerNorm  # in the heads
    gradients = []
    torch.optim.SGD = keep_gradients(torch.optim.SGD, gradients)
    module = importlib.import_module("supcon" if name == "ce" else name)
    more = f"--batch-size 12 --optimizer sgd --max-steps 1 {METHODS[name]}".split()
    module.main(["--data", folder, "--out", f"{out}-run", *TINY, *more, *flags])
    if common.PartialState().is_main_process:
        torch.save(gradients[0], out)


def gradients_of(cases, name, has_batch_norm, folder, out):
    """The first step's gradients in some cases: pairs of a number of processes and flags."""
    started = []
    for i, (processes, flags) in enumerate(cases):
        argv = (name, has_batch_norm, folder, out / str(i), *flags.split())
        case = start(
            "test_chunks.save_gradients", *argv, output=out / f"{i}.txt", processes=processes
        )
        started.append(case)
    for case in started:
        code, text = case.wait()
        assert code == 0, text
    return [torch.load(out / str(i), weights_only=True) for i in range(len(cases))]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chunks", [2, 3])
def test_a_chunk_is_a_virtual_process(name, chunks, few, tmp_path):
    # On CPUs every process has batch statistics of its own.
    cases = [(chunks, ""), (1, f"--chunk-size {12 // chunks}"), (1, "")]
    processes, in_chunks, at_once = gradients_of(cases, name, "yes", few, tmp_path)
    for a, b in zip(in_chunks, processes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    differences = [(a - b).abs().max() for a, b in zip(in_chunks, at_once, strict=True)]
    assert max(differences) > 1e-3  # The batch statistics do matter.


@pytest.mark.parametrize("name", METHODS)
def test_without_batch_statistics_the_gradient_is_that_of_the_whole_batch(name, few, tmp_path):
    cases = [(1, ""), (1, "--chunk-size 3"), (1, "--chunk-size 12"), (2, "--chunk-size 2")]
    whole, *others = gradients_of(cases, name, "no", few, tmp_path)
    assert max(v.abs().max() for v in whole) > 1e-2
    for gradients in others:
        for a, b in zip(gradients, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def count_exchanges(folder, out):
    """Save how many of a step's forward passes were made without an exchange of gradients."""
    real, passes = DistributedDataParallel.forward, []

    def noting(self, *args):
        if torch.is_grad_enabled():
            passes.append(self.require_backward_grad_sync)
        return real(self, *args)

    DistributedDataParallel.forward = noting
    more = ["--batch-size", "12", "--chunk-size", "2", "--max-steps", "1"]
    simclr.main(["--data", folder, "--out", f"{out}-run", *TINY, *more])
    if common.PartialState().is_main_process:
        torch.save(passes, out)


def test_processes_exchange_gradients_after_the_last_chunk_only(few, tmp_path):
    argv = ("test_chunks.count_exchanges", few, tmp_path / "passes")
    code, text = start(*argv, output=tmp_path / "text", processes=2).wait()
    assert code == 0, text
    assert torch.load(tmp_path / "passes", weights_only=True) == [False, False, True]


def test_running_averages_see_each_chunk_once():
    torch.manual_seed(0)
    encoder = common.build_encoder("small")
    head = simclr.projection_head(256, 2, 8, 4)
    model = nn.Sequential(encoder, head)
    expected = nn.Sequential(common.build_encoder("small"), simclr.projection_head(256, 2, 8, 4))
    expected.load_state_dict(model.state_dict())
    views = torch.rand(2, 6, 3, 12, 12)
    z = simclr.embed_in_chunks(model, views, 2)
    simclr.backward_in_chunks(model, views, 2, torch.ones_like(z), Accelerator())
    for chunk in views.split(2, dim=1):
        simclr.embed(expected, chunk)
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, expected.get_buffer(name))
    assert int(model.get_buffer("0.0.1.num_batches_tracked")) == 3


def test_no_more_than_a_chunk_is_embedded_at_once(few, tmp_path, monkeypatch):
    sizes, real = [], simclr.embed
    monkeypatch.setattr(
        simclr,
        "embed",
        lambda model, views: (
            sizes.append((views.shape[1], torch.is_grad_enabled())) or real(model, views)
        ),
    )
    out = run("simclr", few, tmp_path / "run", "--batch-size 12 --chunk-size 4 --max-steps 1")
    assert sizes == [(4, False)] * 3 + [(4, True)] * 3
    assert checkpoint(out)["step"] == 1
