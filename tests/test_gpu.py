"""What a GPU computes, against the CPU, and commands on it; the CPU runs each of them as well."""

import signal

import pytest
import torch
import torch.nn.functional as F
from child import SAVE_OFTEN, Child, command
from conftest import METHODS, TINY, metrics, words
from torch import nn

import common
import drlim
import linear_eval
import moco
import simclr
import supcon
import swav

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


def variables(device: str, **more: str) -> dict[str, str]:
    """Of the environment of a process that works on a device."""
    return {"ACCELERATE_USE_CPU": str(device == "cpu"), **more}


# --------------------------------------------------------------------------------------
# The same numbers as on the CPU
# --------------------------------------------------------------------------------------


def losses(z: torch.Tensor, labels: torch.Tensor) -> dict:
    """The loss of each method on the embeddings z [2, B, D] of two views."""
    z1, z2 = F.normalize(z, dim=2)
    keys = F.normalize(torch.randn(64, z.shape[2], generator=common.generator(0)), dim=1)
    keys = keys.to(z.device)
    scores = torch.stack([z1, z2]) @ keys.T
    codes = torch.stack([swav.sinkhorn(part.detach(), 0.05) for part in scores])
    return {
        "simclr": simclr.nt_xent(z1, z2, 0.2),
        "moco": moco.info_nce(z1, z2.detach(), keys, 0.2),
        "swav": swav.swapped_prediction_loss(scores, codes, 0.1),
        "out": supcon.supcon_loss(torch.stack([z1, z2], dim=1), labels, 0.1),
        "in": supcon.supcon_loss(torch.stack([z1, z2], dim=1), labels, 0.1, "in"),
        "drlim": drlim.contrastive_loss(z1, z2, labels % 2, 1.25),
    }


def compute(data: str, device_name: str, path: str) -> None:
    """Save what must not depend on the device: views, losses, gradients, steps and features."""
    device = torch.device(device_name)
    torch.backends.cudnn.allow_tf32 = False
    images, bank, test = common.load_splits(data, "nowhere", None, device, 0)
    saved = {}

    recipes = []
    for size in (12, 8):  # Crops are enlarged to one, and made smaller to the other.
        operations = simclr.augmentation(simclr.OPERATIONS, size, 0.08, 1.0)
        recipes.append((2, operations))
    ((index, (views, saved["small views"])),) = common.batches(images, recipes, 24, 0, range(1))
    saved["views"] = views
    labels = bank.labels[index].to(device)

    torch.manual_seed(0)
    encoder = common.build_encoder("small")
    network = nn.Sequential(encoder, simclr.projection_head(encoder.width, 2, 64, 32))
    network.to(device, memory_format=torch.channels_last)
    z = simclr.embed(network, views).transpose(0, 1)
    for name, loss in losses(z, labels).items():
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
        Child(source, tmp_path / "text", **variables(name)).end(0)
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
    bf16 = variables(device, ACCELERATE_MIXED_PRECISION="bf16")
    flags = words(TINY[method], "--eval-every 9 --workers 1")
    out, files = tmp_path / "run", tmp_path / "files"
    run = command(method, [*flags, "--data", str(images), "--out", str(out), "--epochs", "12"])
    killed = Child(SAVE_OFTEN + run, tmp_path / "text", **bf16)
    killed.wait_for(out / "checkpoint.pt")
    killed.processes[0].kill()
    killed.end(-signal.SIGKILL)

    run += command(method, [*flags, "--data", str(folder), "--out", str(files)])
    for protocol in linear_eval.USED_BY if method != "drlim" else ():
        argv = words(out / "encoder.safetensors", "--protocol", protocol)
        if protocol in ("linear-augmented", "finetune"):
            argv += words("--epochs 1 --batch-size 16")
        run += command("linear_eval", argv)
    text = Child(run, tmp_path / "text", **bf16).end(0)
    assert (
        "continuing after epoch" in text
        and text.count(f"device: {device}") == run.count("run_path") + 1
    )
    for rows, epochs in ((metrics(out), 12), (metrics(files), 2)):
        assert len(rows) == epochs and all(0 < row["loss"] < 1e3 for row in rows)


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_run_ends(method, device, images, tmp_path):
    backend = (
        "INDUCTOR" if device == "cuda" else "EAGER"
    )  # The first compiles for minutes on a CPU.
    run = command(method, words(TINY[method], "--data", images, "--out", tmp_path / "run"))
    Child(run, tmp_path / "text", **variables(device, ACCELERATE_DYNAMO_BACKEND=backend)).end(0)
    assert all(0 < row["loss"] < 1e3 for row in metrics(tmp_path / "run"))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_on_a_device_share_the_statistics_of_a_batch(
    method, device, images, tmp_path
):
    argv = words("--data", images, "--out", tmp_path / "run")
    seen = []
    for processes in (1, 2):
        path = tmp_path / f"seen{processes}-"
        # NCCL refuses two processes on one GPU.
        source = "from accelerate import PartialState\n"
        source += f"PartialState(cpu={device == 'cpu'}, backend='gloo')\n" * (processes - 1)
        call = (method, argv, str(path), 1, True)
        source += f"import test_processes\ntest_processes.record{call}\n"
        both = variables(device, ACCELERATE_BYPASS_DEVICE_MAP="true")
        Child(source, tmp_path / "text", processes, **both).end(*[0] * processes)
        seen += [torch.load(f"{path}{rank}")["gradients"][0] for rank in range(processes)]
    one, *two = seen
    for gradient in two:
        # On a CPU, they don't share them, and MoCo's never do.
        alike = 1e-3 if device == "cuda" and method != "moco" else 2
        assert 0 < (gradient - one).norm() + one.norm() < (1 + alike) * one.norm()
