"""Code of the README, run as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import torchvision
from conftest import metrics, run
from torchvision.transforms import v2

import common
import simclr

ROOT = Path(__file__).resolve().parent.parent
# What a reader of the README would write around its code: other paths, and an evaluation by kNN.
SETUP = """
import sys
import common
from PIL import Image
folder, file = sys.argv[1:]
image = Image.new("L", (30, 40))
"""
SCORE = """
def features(network, split):
    images = torchvision.datasets.ImageFolder(f"{folder}/{split}", transform)
    x = torch.stack([image for image, _ in images])
    with torch.no_grad():
        return network.eval()(x), torch.tensor(images.targets)

for network in (resnet, model):
    (h, y), (h_test, y_test) = features(network, "train"), features(network, "test")
    votes = common.knn_predict(h, y, h_test, 20, 0.07)
    print(common.accuracy(votes, y_test))
"""


@pytest.mark.parametrize(("method", "stem"), [("simclr", "7x7"), ("moco", "3x3")])
def test_an_exported_encoder_scores_alike_in_torchvision_and_timm(method, stem, folder, tmp_path):
    more = "--arch resnet18 --image-size 16 --max-steps 3 --lr 0.01 --stem"
    out = run(method, folder, tmp_path / "run", more, stem)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = "\n".join(block for block in blocks if "(file" in block)
    code = re.sub(r"\nfile = .*", "", code)
    if stem == "7x7":
        code = re.sub(r".*# 3x3 stem only\n", "", code)
    argv = [sys.executable, "-c", SETUP + code + SCORE, folder, out / "encoder.safetensors"]
    child = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    expected = metrics(out)[-1]["knn"]
    assert [float(line) for line in child.stdout.split()] == pytest.approx([expected] * 2)


@pytest.mark.parametrize("size", [24, 72])
def test_the_transform_gives_the_inputs_of_the_encoder(size, tmp_path):
    file, mean, std = tmp_path / "encoder.safetensors", [0.3, 0.4, 0.5], [0.1, 0.2, 0.3]
    about = {"architecture": "small", "stem": "3x3", "mean": mean, "std": std, "image_size": size}
    common.save_encoder(file, common.build_encoder("small"), **about)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    coarse = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))
    image = v2.functional.to_pil_image(v2.functional.resize(coarse, [96, 120]))
    names = {"file": file, "json": json, "safetensors": safetensors, "torch": torch, "v2": v2}
    names |= {"image": image, "resnet": torch.nn.Flatten()}
    exec(next(block for block in blocks if "v2.Compose" in block), names)

    pixels = v2.functional.pil_to_tensor(image)
    x = common.Normalize(mean, std)(common.CenterCrop(size)(pixels) / 255)
    torch.testing.assert_close(names["transform"](image), x, atol=0.15, rtol=0)
    assert names["features"].shape == (1, 3 * size * size)


def test_the_parts_work_in_a_loop_of_ones_own():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "ImagesInMemory" in block)
    names = {"common": common, "simclr": simclr, "labels": torch.arange(300)}
    names["pixels"] = torch.randint(256, (300, 3, 40, 36), dtype=torch.uint8)
    names["network"] = torch.nn.Flatten()
    exec(code.replace("stop=1000", "stop=2"), names)
    assert names["z1"].shape == (256, 3 * 32 * 32) and names["loss"].isfinite()
    assert names["x"].shape == (2, 256, 3, 32, 32) and names["index"].shape == (256,)


def test_a_dataset_becomes_a_file_that_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "np.savez" in block)
    names = {}
    for name, size in (("train_set", 40), ("test_set", 20)):
        names[name] = torchvision.datasets.FakeData(size, (3, 12, 10), num_classes=2)
    exec(code, names)
    out = run("simclr", "birds.npz", tmp_path / "run", "--max-steps 1")
    images, _, test, _ = common.load_splits("birds.npz", "data", None, torch.device("cpu"))
    assert images.pixels.shape == (40, 3, 12, 10) and len(test) == 20
    assert (out / "results.json").exists()
