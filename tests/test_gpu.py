"""What a GPU computes, against the CPU, and commands on it; the CPU runs each of them as well."""

import signal

import pytest
import torch
from child import SAVE_OFTEN, Child, command
from conftest import METHODS, TINY, metrics, words
from test_runs import losses_alone
from torch import nn

import common
import linear_eval
import simclr
import swav

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


# Of the environment of a process.
ON = {"cpu": {"ACCELERATE_USE_CPU": "true"}, "cuda": {"ACCELERATE_USE_CPU": "false"}}


def compute(data: str, device_name: str, path: str) -> None:
    """Save what must not depend on the device: views, losses, gradients, steps and features."""
    device = torch.device(device_name)
    torch.backends.cudnn.allow_tf32 = False
    images, bank, test = common.load_splits(data, "nowhere", None, device, 0)
    saved = {}

    # Crops are enlarged to one size, and made smaller to the other.
    recipes = [(2, simclr.augmentation(simclr.OPERATIONS, size, 0.08, 1.0)) for size in (12, 8)]
    ((index, (views, saved["small views"])),) = common.batches(images, recipes, 24, 0, range(1))
    saved["views"] = views

    torch.manual_seed(0)
    encoder = common.build_encoder("small")
    network = nn.Sequential(encoder, simclr.projection_head(encoder.width, 2, 64, 32))
    network.to(device, memory_format=torch.channels_last)
    z1, z2 = simclr.embed(network, views).unbind(1)
    for name, loss in losses_alone(z1, z2, bank.labels[index].to(device)).items():
        network.zero_grad()
        loss.backward(retain_graph=True)
        saved[f"{name} loss"] = loss.detach()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        saved[f"{name} gradients"] = torch.cat(gradients)
    simclr.LARS(network.parameters(), 0.1, weight_decay=1e-4).step()
    swav.LARC(network.parameters(), 0.1, weight_decay=1e-4).step()
    saved["weights"] = torch.cat([p.detach().flatten() for p in network.parameters()])

    h, h_test = (common.extract_features(encoder, part, 12) for part in (bank, test))
    saved |= {"features": h_test, "votes": common.knn_predict(h, bank.labels, h_test)}
    saved["logits"] = common.linear_probe(h, bank.labels, h_test)
    torch.save({name: value.cpu() for name, value in saved.items()}, path)


def test_a_device_computes_what_the_cpu_computes(device, images, tmp_path):
    for name, path in (("cpu", tmp_path / "expected"), (device, tmp_path / "saved")):
        source = f"import test_gpu\ntest_gpu.compute({str(images)!r}, {name!r}, {str(path)!r})\n"
        Child(source, tmp_path / "text", **ON[name]).end(0)
    expected, saved = (torch.load(tmp_path / name) for name in ("expected", "saved"))
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        error = (saved[name] - value).abs().max() / value.abs().max()
        # Gradients pass several layers, and a probe takes many steps: rounding adds up.
        assert error < (1e-3 if "gradients" in name or name == "logits" else 2e-5), name


# --------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_run_is_killed_continues_and_is_evaluated(
    method, device, images, folder, tmp_path
):
    flags = words(TINY[method], "--eval-every 9 --workers 1 --epochs 9 --data")
    out, files = tmp_path / "run", tmp_path / "files"
    source = command(method, [*flags, str(images), "--out", str(out)])
    bf16 = ON[device] | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    killed = Child(SAVE_OFTEN + source, tmp_path / "text", **bf16)
    killed.wait_for(out / "checkpoint.pt")
    killed.processes[0].kill()
    killed.end(-signal.SIGKILL)

    source += command(method, [*flags, str(folder), "--out", str(files)])
    for protocol in linear_eval.USED_BY if method != "drlim" else ():
        argv = words(out / "encoder.safetensors", "--protocol", protocol)
        trains = protocol in ("linear-augmented", "finetune")
        source += command("linear_eval", argv + words("--epochs 1 --batch-size 16" * trains))
    text = Child(source, tmp_path / "text", **bf16).end(0)
    assert "continuing" in text and text.count(f"device: {device}") == 1 + source.count("run_path")
    for made in (out, files):
        assert len(metrics(made)) == 9 and all(0 < row["loss"] < 99 for row in metrics(made))


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_run_ends(method, device, labeled, tmp_path):
    backend = {"cpu": "EAGER", "cuda": "INDUCTOR"}[device]  # which takes minutes on a CPU
    source = command(method, words(TINY[method], "--data", labeled, "--out", tmp_path))
    Child(source, tmp_path / "text", **ON[device], ACCELERATE_DYNAMO_BACKEND=backend).end(0)
    assert all(0 < row["loss"] < 99 for row in metrics(tmp_path))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_on_a_gpu_share_the_statistics_of_a_batch(method, device, images, tmp_path):
    gradients = []
    for processes in (1, 2):
        path = str(tmp_path / f"seen{processes}-")
        call = (method, words("--data", images, "--out", tmp_path / "run"), path, 1, True)
        source = f"import test_processes\ntest_processes.record{call}\n"
        if processes == 2:  # NCCL refuses two processes on one GPU.
            state = f"PartialState(cpu={device == 'cpu'}, backend='gloo')\n"
            source = f"from accelerate import PartialState\n{state}{source}"
        environment = ON[device] | {"ACCELERATE_BYPASS_DEVICE_MAP": "true"}
        Child(source, tmp_path / "text", processes, **environment).end(*[0] * processes)
        gradients += [torch.load(f"{path}{rank}")["gradients"][0] for rank in range(processes)]
    one, *two = gradients
    assert torch.equal(*two) and two[0].isfinite().all()
    if device == "cuda" and method != "moco":  # whose queries have the statistics of a process
        assert (two[0] - one).norm() < 1e-3 * one.norm()
