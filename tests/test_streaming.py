"""Image files that are read anew each epoch: the batches of memory, sizes, formats, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command, finish, metrics, refused, write_folder
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as TF

import common
import linear_eval
import simclr
from common import CentreCrop, ColorJitter, RandomApply, RandomResizedCrop, batches, generator

CPU = torch.device("cpu")
RECIPES = [
    (2, [RandomResizedCrop(8), RandomApply(ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8)]),
    (3, [RandomResizedCrop(6, (0.05, 0.3))]),
]


def load(folder, workers=1, stream=True, limit=None):
    return common.load_splits(str(folder), "nowhere", limit, CPU, workers, stream)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of images of several sizes, smooth as photographs are."""
    folder, rng = tmp_path_factory.mktemp("photographs") / "set", np.random.default_rng(1)
    for split, count in (("train", 7), ("val", 3)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                size = (70 + 9 * i, 100 - 5 * i)
                coarse.resize(size, Image.BICUBIC).save(folder / split / name / f"{i}.jpg")
    return folder


# ------------------------------------------------------------------------------ the same as memory
def test_crops_are_those_of_memory_to_two_grey_levels(folder):
    memory, files = load(folder, stream=False)[0], load(folder)[0]
    assert isinstance(memory.images, torch.Tensor) and isinstance(files.images, np.ndarray)
    assert files.fingerprint == memory.fingerprint and files.side == memory.side == 12
    crops = [(count, operations[:1]) for count, operations in RECIPES]
    pairs = zip(batches(memory, crops, 8, 0, 3, 8), batches(files, crops, 8, 0, 3, 8), strict=True)
    for (step, index, views), (step_, index_, views_) in pairs:
        assert step == step_ and torch.equal(index, index_)
        for a, b in zip(views, views_, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=2 / 255, rtol=0)
            assert a.std() > 0.05


def test_colours_are_applied_to_what_the_files_gave(folder):
    files, whole = load(folder)[0], RECIPES[:1]
    _, _, (plain,) = next(batches(files, [(2, whole[0][1][:1])], 8, 0, 0, 1))
    _, _, (views,) = next(batches(files, whole, 8, 0, 0, 1))
    _, drawn = common.draw(48, whole, 8, 0, torch.arange(8), 0)
    jittered = whole[0][1][1](plain.flatten(0, 1).clone(), *drawn[0][1])
    torch.testing.assert_close(views.flatten(0, 1), jittered)
    assert (jittered - plain.flatten(0, 1)).abs().max() > 0.1


def test_centres_are_those_of_memory(folder):
    memory, files = load(folder, stream=False)[1], load(folder)[1]
    index = torch.tensor([5, 40, 0])
    assert torch.equal(memory.centres(index, 12), files.centres(index, 12))
    torch.testing.assert_close(memory.centres(index, 7), files.centres(index, 7))
    torch.manual_seed(0)
    encoder = common.build_encoder("small")
    h = [common.extract_features(encoder, images, 12, 7) for images in (memory, files)]
    torch.testing.assert_close(*h)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(photographs, workers):
    runs = [list(batches(load(photographs, n)[0], RECIPES, 4, 5, 1, 9)) for n in (1, workers)]
    for (step, index, views), (step_, index_, views_) in zip(*runs, strict=True):
        assert step == step_ and torch.equal(index, index_)
        assert all(torch.equal(a, b) for a, b in zip(views, views_, strict=True))


def test_batches_resume_in_the_middle_of_an_epoch(photographs):
    data = load(photographs)[0]
    straight, resumed = (list(batches(data, RECIPES, 4, 5, start, 9)) for start in (0, 5))
    for (_, index, views), (_, index_, views_) in zip(straight[5:], resumed, strict=True):
        assert torch.equal(index, index_) and torch.equal(views[1], views_[1])


# ---------------------------------------------------------------------------------- files and sizes
def test_sets_of_several_sizes_or_beyond_memory_are_streamed(photographs, folder, monkeypatch):
    assert all(isinstance(v.images, np.ndarray) for v in load(photographs, stream=False))
    monkeypatch.setattr(common, "MEMORY_LIMIT", 48 * 3 * 144 - 1)
    sets = load(folder, stream=False)
    assert isinstance(sets[0].images, np.ndarray) and isinstance(sets[2].images, torch.Tensor)
    assert isinstance(load(folder, stream=False, limit=47)[0].images, torch.Tensor)


def test_views_of_several_sizes_are_torchvisions_on_boxes_of_each_size(photographs):
    data, crop = load(photographs)[0], RandomResizedCrop(16, (0.2, 0.9))
    _, index, (views,) = next(batches(data, [(2, [crop])], 8, 0, 0, 1))
    u, flip = common.draw(14, [(2, [crop])], 8, 0, torch.arange(8), 0)[1][0][0]
    for i, view in enumerate(views.flatten(0, 1)):
        image = common.read_image(data.images[index[i % 8]])
        (box,) = crop.boxes(u[i : i + 1], *image.shape[1:]).tolist()
        assert box[0] + box[2] <= image.shape[1] and box[1] + box[3] <= image.shape[2]
        expected = TF.resized_crop(image, *box, [16, 16], antialias=True)
        expected = expected.flip(2) if flip[i] else expected
        torch.testing.assert_close(view, expected / 255)
    assert len({tuple(common.read_image(p).shape) for p in data.images}) == 7


@pytest.mark.parametrize(("height", "width"), [(256, 341), (400, 256), (300, 300)])
def test_above_64_pixels_the_centre_is_the_usual_one(height, width):
    rows = torch.linspace(0, 255, height)[:, None].expand(3, height, width)
    image = (rows * 0.5 + 0.5 * torch.linspace(0, 255, width)).to(torch.uint8)
    usual = TF.center_crop(TF.resize(image, 256), 224)
    difference = CentreCrop(224)(image).int() - usual.int()
    assert difference.abs().max() <= 2
    assert CentreCrop(64)(image).float().std() > usual.float().std() + 1  # the whole side


def test_a_file_is_decoded_once_for_all_its_views(photographs, monkeypatch):
    data, read, seen = load(photographs)[0], common.read_image, []
    monkeypatch.setattr(common, "read_image", lambda path: seen.append(path) or read(path))
    _, index, _ = next(batches(data, RECIPES, 6, 0, 0, 1))  # one step is read in this process
    assert sorted(seen) == sorted(data.images[index])


def test_orientation_and_modes(tmp_path):
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[0] = 200, 100, 50
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    for i, mode in enumerate(("L", "P", "CMYK", "RGBA", "LA", "RGB")):
        suffix = "tif" if mode == "CMYK" else "png"
        image.convert(mode).save(tmp_path / f"{i}.{suffix}")
    image.save(tmp_path / "6.png", exif=exif)
    data, bank, test = load(tmp_path)
    assert bank is test is None and data.labels.tolist() == [-1] * 7 and len(data.classes) == 0
    x = data.centres(torch.arange(7), 12)
    assert x.shape == (7, 3, 12, 12)
    assert x[:6, :, 0].amin() > 0 and x[:6, :, 1:].amax() < 0.01
    assert x[6, :, 11].amin() > 0 and x[6, :, :11].amax() == 0
    whole = RandomResizedCrop(12, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    _, index, (views,) = next(batches(data, [(1, [whole])], 7, 0, 0, 1))
    torch.testing.assert_close(views[0], x[index])


def test_a_tree_without_classes_is_one_set(tmp_path):
    for name in ("b/deep", "a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "x.PNG")
    (tmp_path / "notes.txt").write_text("mine")
    data, bank, test = load(tmp_path, stream=False)
    assert data.images.shape == (2, 3, 9, 9) and bank is test is None


# --------------------------------------------------------------------------------------- the script
def run(folder, out, *more):
    simclr.main(["--data", str(folder), "--out", str(out), *TINY, *map(str, more)])
    return out


def test_streaming_trains_as_memory_does(folder, tmp_path):
    same = ("--epochs", 4, "--augment", "crop", "--optimizer", "sgd", "--lr", 1e-5)
    runs = [
        run(folder, tmp_path / name, *same, *more)
        for name, more in (("memory", ()), ("files", ("--stream", "--workers", 2)))
    ]
    losses = [[row["loss"] for row in metrics(out)] for out in runs]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    waits = [[row["wait"] for row in metrics(out)] for out in runs]
    assert not any(waits[0]) and all(0 < v < 1 for v in waits[1])
    assert (runs[1] / "views.png").exists() and (runs[1] / "results.json").exists()


def test_images_without_classes_serve_for_pretraining(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", 8, 2) / "train"
    out = run(folder, tmp_path / "run")
    printed = capsys.readouterr().out
    assert [set(row) >= {"loss", "knn"} for row in metrics(out)] == [False, False]
    assert "loss" in printed and (out / "encoder.safetensors").exists()
    run(folder, out)
    assert "is finished" in capsys.readouterr().out
    error = refused(capsys, linear_eval.main, [out / "encoder.safetensors"])
    assert "no classes" in error and str(folder) in error


def same(a, b):
    one, two = (load_file(v / "encoder.safetensors") for v in (a, b))
    return all(torch.equal(one[name], two[name]) for name in one)


LONGER = ["--stream", "--workers", "2", "--epochs", "12", "--batch-size", "2"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_and_the_run_goes_on(folder, tmp_path, number):
    whole = run(folder, tmp_path / "whole", *LONGER)
    out = tmp_path / "run"
    argv = [
        sys.executable,
        str(ROOT / "simclr.py"),
        "--data",
        str(folder),
        "--out",
        str(out),
        *TINY,
        *LONGER,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, number)
    code, _, err = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), err
    assert "Traceback" not in err and not (out / "results.json").exists()
    run(folder, out, *LONGER)
    assert same(out, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_unreadable_file_stops_the_run_which_goes_on_without_it(tmp_path, processes):
    folder, out = write_folder(tmp_path / "set", 8, 3), tmp_path / "run"
    bad = sorted((folder / "train" / "both").iterdir())[-1]
    argv = ["--data", folder, "--out", out, *TINY, "--stream", "--workers", "2", "--epochs", "40"]
    process = command("simclr.py", *argv, processes=processes)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    bad.write_bytes(bad.read_bytes()[:50])
    code, _, err = finish(process)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == (2 if processes == 1 else 1) and len(errors) == 1, err
    assert str(bad) in errors[0] and 'simclr.py", line' not in err
    assert not (out / "encoder.safetensors").exists()
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    bad.unlink()
    code, text, err = finish(command("simclr.py", *argv, processes=processes))
    assert code == 0 and f"after step {step} of 200; the files changed: 24 images" in text, err
    assert "now 23 images" in text and metrics(out)[-1]["step"] == 200
    assert json.loads((out / "config.json").read_text())["images"].startswith("23 images")


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_a_run_that_is_past_its_end_without_some_files_still_ends(tmp_path, more, capsys):
    folder = write_folder(tmp_path / "set", 8, 3)  # 24 images, 6 steps an epoch
    out = run(folder, tmp_path / "run", *more)
    for name in ("results.json", "encoder.safetensors"):
        (out / name).unlink()
    (folder / "train" / "both" / "7.png").unlink()
    run(folder, out, *more)  # 5 steps an epoch
    assert "going on after step 9 of 10; the files changed" in capsys.readouterr().out
    assert (out / "results.json").exists() and metrics(out)[-1]["step"] == 10


def test_a_streamed_run_that_was_stopped_at_its_end_ends(folder, tmp_path, capsys):
    out = run(folder, tmp_path / "run", "--stream")
    (out / "results.json").unlink()
    run(folder, out, "--stream")
    assert "going on after step 24 of 24" in capsys.readouterr().out
    assert (out / "results.json").exists()


def test_batches_and_splits_of_one_image(photographs):
    data, bank, test = load(photographs)
    encoder = common.build_encoder("small")
    assert common.extract_features(encoder, bank, 8, 13).shape == (14, 256)
    assert len(data.take(torch.tensor([3]))) == len(load(photographs, limit=1)[0]) == 1
    assert test.centres(torch.tensor([2]), 8).shape == (1, 3, 8, 8)
    _, index, (views, _) = next(batches(data, RECIPES, 1, 0, 0, 3))
    assert views.shape == (2, 1, 3, 8, 8) and len(index) == 1


def test_a_run_within_its_own_folder_does_not_train_on_its_pictures(tmp_path, monkeypatch):
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    run(".", "runs/a")
    assert Path("runs/a/views.png").exists() and len(load(".")[0]) == 8


def test_links_and_odd_names_are_images_too(tmp_path):
    (tmp_path / "there").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "there" / "a.png")
    (tmp_path / "set" / "folder.jpg").mkdir(parents=True)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "there")
    name = os.fsencode(tmp_path / "set") + b"/\xe9.png"
    Path(os.fsdecode(name)).write_bytes((tmp_path / "there" / "a.png").read_bytes())
    data = load(tmp_path / "set")[0]
    assert len(data) == 2 and data.centres(torch.tensor([0, 1]), 9).shape == (2, 3, 9, 9)


@pytest.mark.parametrize("busy", [0, 0.5])
def test_workers_that_die_are_one_line(photographs, capsys, busy):
    data = load(photographs, 2)[0]
    steps = data.load([(1, [CentreCrop(8)])], partial(deadly, os.getpid(), busy), range(20))
    with pytest.raises(SystemExit) as exit_:
        for _ in steps:
            time.sleep(busy)  # they die meanwhile
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and "--workers" in error


def deadly(parent, late, step):
    if os.getpid() != parent and step == (8 if late else 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor([0]), [[()]]


def test_an_unreadable_first_file_is_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", 2, 2)
    (folder / "train" / "across" / "0.png").write_bytes(b"no image")
    error = refused(capsys, simclr.main, ["--data", folder, "--out", tmp_path / "run", "--stream"])
    assert "across/0.png" in error and not (tmp_path / "run").exists()


def test_features_of_files_on_two_processes_count_each_once(photographs, tmp_path):
    torch.manual_seed(0)
    encoder = tmp_path / "encoder.safetensors"
    about = {"architecture": "small", "stem": "3x3", "image_size": 66, "data": photographs}
    common.save_encoder(encoder, common.build_encoder("small"), **about)
    for processes in (1, 2):
        argv = [
            encoder,
            "--protocol",
            "knn",
            "--seeds",
            "1",
            "--knn-k",
            "3",
            "--features",
            tmp_path / f"{processes}.npz",
        ]
        code, _, err = finish(command("linear_eval.py", *argv, processes=processes))
        assert code == 0, err
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert len(one["train"]) == 14 and len(one["test"]) == 6
        for name in one.files:
            np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_the_seed_of_a_stream_counts(photographs):
    data = load(photographs)[0]
    a, b = (next(batches(data, RECIPES, 4, seed, 0, 1))[1] for seed in (0, 1))
    assert not torch.equal(a, b) and generator(0).initial_seed() != generator(1).initial_seed()


def test_an_error_elsewhere_does_not_wait_for_the_workers(photographs):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import common
data = common.load_splits({str(photographs)!r}, "", None, torch.device("cpu"), 2, True)[0]
for _ in common.batches(data, [(1, [common.RandomResizedCrop(8)])], 2, 0, 0, 40):
    raise KeyError("mine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().endswith("KeyError: 'mine'"), done.stderr
