"""Image files that are read whenever they are needed: the same as memory, and what can fail."""

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
from conftest import (
    ROOT,
    arguments,
    assert_same_end,
    checkpoint,
    finish,
    refused,
    run,
    same_model,
    start,
    with_interrupts,
    write_folder,
)
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import common
import linear_eval
import simclr
from common import (
    CenterCrop,
    ColorJitter,
    ImageFiles,
    ImagesInMemory,
    RandomApply,
    RandomResizedCrop,
    StepPlan,
    ViewPlan,
    batches,
    generator,
)

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


# --------------------------------------------------------------------------------------
# The same as memory
# --------------------------------------------------------------------------------------


def test_crops_are_those_of_memory_to_two_gray_levels(folder):
    memory, files = load(folder, stream=False)[0], load(folder)[0]
    assert isinstance(memory, ImagesInMemory) and isinstance(files, ImageFiles)
    assert files.fingerprint == memory.fingerprint and files.side == memory.side == 12
    crops = [(count, operations[:1]) for count, operations in RECIPES]
    pairs = zip(batches(memory, crops, 8, 0, 3, 8), batches(files, crops, 8, 0, 3, 8), strict=True)
    for (index, views), (index_, views_) in pairs:
        assert torch.equal(index, index_)
        for a, b in zip(views, views_, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=2 / 255, rtol=0)
            assert a.std() > 0.05


def test_colors_are_applied_to_what_the_files_gave(folder):
    files = load(folder)[0]
    crop, jitter = RECIPES[0][1]
    _, (plain,) = next(batches(files, [(2, [crop])], 8, 0, 0, 1))
    _, (views,) = next(batches(files, [(2, [crop, jitter])], 8, 0, 0, 1))
    plan = common.draw_plan(48, RECIPES[:1], 8, 0, torch.arange(8), 0)
    plain = plain.flatten(0, 1)
    jittered = jitter(plain.clone(), *plan.views[0].parameters[1])
    torch.testing.assert_close(views.flatten(0, 1), jittered)
    assert (jittered - plain).abs().max() > 0.1


def test_centers_are_those_of_memory(folder):
    memory, files = load(folder, stream=False)[1], load(folder)[1]
    index = torch.tensor([5, 40, 0])
    assert torch.equal(memory.centers(index, 12), files.centers(index, 12))
    torch.testing.assert_close(memory.centers(index, 7), files.centers(index, 7))
    torch.manual_seed(0)
    encoder = common.build_encoder("small")
    h = [common.extract_features(encoder, images, 12, 7) for images in (memory, files)]
    torch.testing.assert_close(*h)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(photographs, workers):
    runs = [list(batches(load(photographs, n)[0], RECIPES, 4, 5, 1, 9)) for n in (1, workers)]
    for (index, views), (index_, views_) in zip(*runs, strict=True):
        assert torch.equal(index, index_)
        assert all(torch.equal(a, b) for a, b in zip(views, views_, strict=True))


def test_batches_resume_in_the_middle_of_an_epoch(photographs):
    data = load(photographs)[0]
    straight, resumed = (list(batches(data, RECIPES, 4, 5, start, 9)) for start in (0, 5))
    for (index, views), (index_, views_) in zip(straight[5:], resumed, strict=True):
        assert torch.equal(index, index_) and torch.equal(views[1], views_[1])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_run_does_not_depend_on_how_python_starts_the_readers(few, tmp_path, method):
    # macOS has only spawn and forkserver. Images without classes save the evaluation.
    data, more = few / "train", "--stream --workers"
    expected = run("simclr", data, tmp_path / "one", more, 1)
    argv = arguments("simclr", data, tmp_path / "run", more, 2)
    code, text = start("simclr", *argv, output=tmp_path / "text", start_method=method).wait()
    assert code == 0, text
    assert same_model(tmp_path / "run", expected)


# --------------------------------------------------------------------------------------
# Files and sizes
# --------------------------------------------------------------------------------------


def test_sets_of_several_sizes_or_beyond_memory_are_streamed(photographs, folder, monkeypatch):
    assert all(isinstance(v, ImageFiles) for v in load(photographs, stream=False))
    monkeypatch.setattr(common, "MAX_IMAGE_BYTES", 48 * 3 * 144 - 1)
    sets = load(folder, stream=False)
    assert isinstance(sets[0], ImageFiles) and isinstance(sets[2], ImagesInMemory)
    assert isinstance(load(folder, stream=False, limit=47)[0], ImagesInMemory)


def test_views_of_several_sizes_are_torchvisions_on_boxes_of_each_size(photographs):
    files, crop = load(photographs)[0], RandomResizedCrop(16, (0.2, 0.9))
    index, (views,) = next(batches(files, [(2, [crop])], 8, 0, 0, 1))
    plan = common.draw_plan(14, [(2, [crop])], 8, 0, torch.arange(8), 0)
    *u, flip = plan.views[0].parameters[0]
    for i, view in enumerate(views.flatten(0, 1)):
        image = common.read_image(files.paths[index[i % 8]])
        (box,) = crop.boxes(*(v[i : i + 1] for v in u), *image.shape[1:]).tolist()
        assert box[0] + box[2] <= image.shape[1] and box[1] + box[3] <= image.shape[2]
        expected = TF.resized_crop(image, *box, [16, 16], antialias=True)
        expected = expected.flip(2) if flip[i] else expected
        torch.testing.assert_close(view, expected / 255)
    assert len({tuple(common.read_image(path).shape) for path in files.paths}) == 7


@pytest.mark.parametrize(("height", "width"), [(256, 341), (400, 256), (300, 300)])
def test_above_64_pixels_the_center_is_the_usual_one(height, width):
    rows = torch.linspace(0, 255, height)[:, None].expand(3, height, width)
    image = (rows * 0.5 + 0.5 * torch.linspace(0, 255, width)).to(torch.uint8)
    usual = TF.center_crop(TF.resize(image, 256), 224)
    difference = CenterCrop(224)(image).int() - usual.int()
    assert difference.abs().max() <= 2
    assert CenterCrop(64)(image).float().std() > usual.float().std() + 1  # the whole side


def test_a_file_is_decoded_once_for_all_its_views(photographs, monkeypatch):
    data, read, seen = load(photographs)[0], common.read_image, []
    monkeypatch.setattr(common, "read_image", lambda path: seen.append(path) or read(path))
    index, _ = next(batches(data, RECIPES, 6, 0, 0, 1))  # one step is read in this process
    assert sorted(seen) == sorted(data.paths[index])


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
    data, bank, test, _ = load(tmp_path)
    assert bank is test is None and data.labels.tolist() == [-1] * 7 and len(data.classes) == 0
    x = data.centers(torch.arange(7), 12)
    assert x.shape == (7, 3, 12, 12)
    assert x[:6, :, 0].amin() > 0 and x[:6, :, 1:].amax() < 0.01
    assert x[6, :, 11].amin() > 0 and x[6, :, :11].amax() == 0
    whole = RandomResizedCrop(12, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    index, (views,) = next(batches(data, [(1, [whole])], 7, 0, 0, 1))
    torch.testing.assert_close(views[0], x[index])


def test_a_tree_without_classes_is_one_set(tmp_path):
    for name in ("b/deep", "a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "x.PNG")
    (tmp_path / "notes.txt").write_text("mine")
    data, bank, test, _ = load(tmp_path, stream=False)
    assert data.pixels.shape == (2, 3, 9, 9) and bank is test is None


def test_images_without_classes_cannot_be_evaluated_on(few, tmp_path, capsys):
    out = run("simclr", few / "train", tmp_path / "run", "--max-steps 1")
    capsys.readouterr()
    error = refused(capsys, linear_eval.main, [out / "encoder.safetensors"])
    assert "no labels" in error and str(few) in error


LONGER = "--stream --workers 2 --epochs 12 --batch-size 2 --eval-every 99"


def test_a_killed_run_continues(few, tmp_path):
    whole, out = run("simclr", few, tmp_path / "whole", LONGER), tmp_path / "run"
    argv = arguments("simclr", few, out, LONGER)
    killed = start("simclr", *argv, output=tmp_path / "text", save_always=True)
    while not (out / "checkpoint.pt").exists() and killed.processes[0].is_alive():
        time.sleep(0.005)
    killed.processes[0].kill()
    code, text = killed.wait()
    assert code == -signal.SIGKILL and not (out / "results.json").exists(), text
    run("simclr", few, out, LONGER)
    assert_same_end(out, whole)


def test_ctrl_c_to_all_processes_of_a_terminal_is_one_line(few, tmp_path):
    out = tmp_path / "run"
    argv = [sys.executable, str(ROOT / "simclr.py"), *arguments("simclr", few, out, LONGER)]
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=with_interrupts,
    )
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGINT
    assert "same command continues" in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("processes", [1, 2])
def test_an_unreadable_file_stops_the_run_which_continues_when_it_is_repaired(
    tmp_path, capsys, processes
):
    folder, out = write_folder(tmp_path / "set", 8, 3), tmp_path / "run"
    bad = sorted((folder / "train" / "both").iterdir())[-1]
    whole = bad.read_bytes()
    more = "--stream --workers 2 --epochs 40 --eval-every 99"
    argv = arguments("simclr", folder, out, more)
    started = start("simclr", *argv, output=tmp_path / "text", processes=processes)
    while not (out / "checkpoint.pt").exists() and started.processes[0].is_alive():
        time.sleep(0.005)
    bad.write_bytes(whole[:50])
    code, text = started.wait()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and str(bad) in errors[0], text
    assert "Traceback" not in text and not (out / "encoder.safetensors").exists()

    step = checkpoint(out)["step"]
    assert step % 6 == 0  # the last epoch's
    bad.unlink()
    error = refused(capsys, simclr.main, argv)
    assert "images was 24 images" in error  # It does not continue with other files.
    bad.write_bytes(whole)
    if processes == 1:
        run("simclr", folder, out, more)
        assert f"resuming after step {step} of 240" in capsys.readouterr().out


def test_batches_and_splits_of_one_image(photographs):
    data, bank, test, _ = load(photographs)
    encoder = common.build_encoder("small")
    assert common.extract_features(encoder, bank, 8, 13).shape == (14, 256)
    assert len(data.take(torch.tensor([3]))) == len(load(photographs, limit=1)[0]) == 1
    assert test.centers(torch.tensor([2]), 8).shape == (1, 3, 8, 8)
    index, (views, _) = next(batches(data, RECIPES, 1, 0, 0, 3))
    assert views.shape == (2, 1, 3, 8, 8) and len(index) == 1


def test_a_run_within_its_own_folder_does_not_train_on_its_pictures(tmp_path, monkeypatch):
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    run("simclr", Path(), Path("runs/a"), "--max-steps 1")
    assert Path("runs/a/views.png").exists() and len(load(".")[0]) == 8
    Path("config.json").write_text("{}")  # of another program: the images beside it count
    assert len(load(".")[0]) == 8


def test_links_and_odd_names_are_images_too(tmp_path):
    (tmp_path / "there").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "there" / "a.png")
    (tmp_path / "set" / "folder.jpg").mkdir(parents=True)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "there")
    name = os.fsencode(tmp_path / "set") + b"/\xe9.png"
    Path(os.fsdecode(name)).write_bytes((tmp_path / "there" / "a.png").read_bytes())
    data = load(tmp_path / "set")[0]
    assert len(data) == 2 and data.centers(torch.tensor([0, 1]), 9).shape == (2, 3, 9, 9)


def test_readers_that_are_killed_are_one_line(photographs, capsys):
    data = load(photographs, 2)[0]
    steps = data.load(partial(deadly, os.getpid()), range(20))
    with pytest.raises(SystemExit) as exit_, common.entry_point(""):
        list(steps)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and "fewer --workers" in error


def deadly(parent, step):
    """A plan of a step, in whose making a reader is killed."""
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return StepPlan(torch.tensor([0]), [ViewPlan(1, [CenterCrop(8)], [()])])


def test_an_unreadable_first_file_is_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", 2, 2)
    (folder / "train" / "across" / "0.png").write_bytes(b"no image")
    argv = arguments("simclr", folder, tmp_path / "run", "--stream")
    error = refused(capsys, simclr.main, argv)
    assert "across/0.png" in error and not (tmp_path / "run").exists()


def test_the_seed_of_a_stream_counts(photographs):
    data = load(photographs)[0]
    a, b = (next(batches(data, RECIPES, 4, seed, 0, 1))[0] for seed in (0, 1))
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
