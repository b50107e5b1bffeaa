"""What a CUDA device computes, against the CPU, and runs of each script on it to the end."""

import signal
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, arguments, checkpoint, metrics, start
from torch import nn

import common
import drlim
import moco
import simclr
import supcon
import swav

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ON_GPU = {"ACCELERATE_USE_CPU": "false"}


# --------------------------------------------------------------------------------------
# The same numbers as on the CPU
# --------------------------------------------------------------------------------------


def losses(z: torch.Tensor, labels: torch.Tensor) -> dict:
    """The loss of each method on the embeddings z [2, B, D] of two views."""
    z1, z2 = F.normalize(z, dim=2)
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(64, z.shape[2], generator=generator), dim=1).to(z.device)
    scores = torch.stack([z1 @ keys.T, z2 @ keys.T])
    codes = torch.stack([swav.sinkhorn(s.detach(), 0.05) for s in scores])
    both = torch.stack([z1, z2], dim=1)
    return {
        "simclr": simclr.nt_xent(z1, z2, 0.2),
        "moco": moco.info_nce(z1, z2.detach(), keys, 0.2),
        "swav": swav.swapped_prediction_loss(scores, codes, 0.1),
        "supcon": supcon.supcon_loss(both, labels, 0.1),
        "drlim": drlim.contrastive_loss(z1, z2, labels % 2, 1.25),
    }


def compute(folder: str, device_name: str, path: str) -> None:
    """Save what must not depend on the device: views, losses, gradients, steps and features."""
    device = torch.device(device_name)
    torch.backends.cudnn.allow_tf32 = False
    images, bank, test, _ = common.load_splits(folder, "nowhere", None, device, 1)
    saved = {}

    jitter = common.RandomApply(common.ColorJitter(0.8, 0.8, 0.8, 0.2), 0.8)
    gray = common.RandomApply(common.grayscale, 0.2)
    blur = common.RandomApply(common.GaussianBlur(3, (0.1, 2.0)), 0.5)
    recipes = []
    for size in (12, 8):  # One is as large as the images, the other smaller.
        recipes.append((2, [common.RandomResizedCrop(size), jitter, gray, blur]))
    index, (views, small_views) = next(common.batches(images, recipes, 24, 0, 0, 1))
    saved |= {"views": views, "small views": small_views}

    split = partial(moco.SplitBatchNorm, splits=4)
    for name, norm_layer in (("plain", nn.BatchNorm2d), ("split", split)):
        torch.manual_seed(0)
        encoder = common.build_encoder("small", norm_layer=norm_layer)
        network = nn.Sequential(encoder, simclr.projection_head(256, 2, 64, 32))
        network.to(device, memory_format=torch.channels_last)
        x = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        z = network(x).unflatten(0, (2, -1))
        for method, loss in losses(z, bank.labels[index].to(device)).items():
            network.zero_grad()
            loss.backward(retain_graph=True)
            saved[f"{name} {method} loss"] = loss.detach()[None]
            gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            saved[f"{name} {method} gradients"] = torch.cat(gradients)
        simclr.LARS(network.parameters(), 0.1, weight_decay=1e-4).step()
        swav.LARC(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4).step()
        saved[f"{name} weights"] = torch.cat([p.detach().flatten() for p in network.parameters()])

    h, h_test = (common.extract_features(encoder, part, 12) for part in (bank, test))
    saved |= {"features": h_test, "votes": common.knn_predict(h, bank.labels, h_test, 20, 0.07)}
    saved["logits"] = common.linear_probe(h, bank.labels, h_test, 3)[0]
    torch.save({name: value.cpu() for name, value in saved.items()}, path)


@pytest.fixture(scope="module")
def devices(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("devices")
    for device in ("cpu", "cuda"):
        argv = ("test_gpu.compute", folder, device, out / device)
        code, text = start(*argv, output=out / "text", environment=ON_GPU).wait()
        assert code == 0, text
    return [torch.load(out / device, weights_only=True) for device in ("cpu", "cuda")]


def test_a_gpu_computes_what_the_cpu_computes(devices):
    cpu, gpu = devices
    assert cpu.keys() == gpu.keys()
    for name, expected in cpu.items():
        size = expected.abs().max()
        assert size > 0, name
        error = (gpu[name] - expected).abs().max() / size
        # Gradients pass several layers, and a probe takes 400 steps: rounding adds up.
        tolerance = 1e-3 if "gradients" in name or name == "logits" else 2e-5
        assert error < tolerance, (name, error)


# --------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", "--stream --workers 2"], ids=["memory", "stream"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_bfloat16_ends_and_its_encoder_is_evaluated(method, few, tmp_path, more):
    out, environment = tmp_path / "run", ON_GPU | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    argv = arguments(method, few, out, more)
    code, text = start(method, *argv, output=tmp_path / "text", environment=environment).wait()
    assert code == 0, text
    assert all(0 < row["loss"] < 1e3 for row in metrics(out))
    if method == "drlim":
        return
    for protocol in ("linear", "knn", "linear-augmented", "finetune"):
        argv = [out / "encoder.safetensors", "--protocol", protocol, "--seeds", 1, "--epochs", 1]
        argv += ["--batch-size", 8] if protocol in ("linear-augmented", "finetune") else []
        evaluation = start("linear_eval", *argv, output=tmp_path / "text", environment=environment)
        code, text = evaluation.wait()
        assert code == 0, text


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_on_a_gpu_continues(method, few, tmp_path):
    out = tmp_path / "run"
    argv = arguments(method, few, out, "--epochs 200 --eval-every 999")
    killed = start(method, *argv, output=tmp_path / "text", environment=ON_GPU, save_always=True)
    while not (out / "checkpoint.pt").exists() and killed.processes[0].is_alive():
        time.sleep(0.01)
    time.sleep(0.3)
    killed.processes[0].kill()
    assert killed.wait()[0] == -signal.SIGKILL
    step = checkpoint(out)["step"]
    code, text = start(method, *argv, output=tmp_path / "text", environment=ON_GPU).wait()
    assert code == 0 and f"resuming after step {step} of" in text, text
    assert (out / "results.json").exists()
