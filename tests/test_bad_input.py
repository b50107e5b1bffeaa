"""Wrong inputs, each given to main(argv): one line that says what is wrong, and exit code 2.

Flags with wrong values are in test_runs.py and test_linear_eval.py.
"""

import gc
import importlib
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torchvision
from conftest import METHODS, arguments, checkpoint, refused, run, write_folder
from PIL import Image
from safetensors.torch import save_file

import common
import drlim
import linear_eval


def main_of(script):
    """The main function of a script, surrounded as on the command line."""

    def main(argv):
        with common.entry_point("the same command continues"):
            importlib.import_module(script).main(argv)

    return main


def photograph(size=(12, 12)):
    """A colored picture of random pixels."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


# --------------------------------------------------------------------------------------
# Image files that cannot be read
# --------------------------------------------------------------------------------------


def write_half(path, **options):
    """Write the first part of an image file."""
    photograph().save(path, **options)
    cut(path, 0.6)


def cut(path, share):
    """Keep only the first part of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def write_header(path):
    """Write the first bytes of a PNG file, which say its size."""
    photograph().save(path)
    path.write_bytes(path.read_bytes()[:33])


def png_that_claims(width, height):
    """A few bytes of PNG with a header of a huge image."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


# How each is written, under the name of a file.
UNREADABLE = {
    "cut.jpg": write_half,
    "cut.png": write_half,
    "cut.webp": write_half,
    "header.png": write_header,
    "bomb.png": lambda path: path.write_bytes(png_that_claims(60_000, 60_000)),
    "hollow.png": lambda path: path.write_bytes(png_that_claims(12, 12)),
    "empty.png": Path.touch,
    "zeros.png": lambda path: path.write_bytes(bytes(1000)),
    "text.jpg": lambda path: path.write_text("I am no image."),
    "16bits.png": lambda path: Image.fromarray(np.full((12, 12), 40000, np.uint16)).save(path),
    "floats.tif": lambda path: Image.fromarray(np.ones((12, 12), np.float32)).save(path),
    "link.png": lambda path: path.symlink_to("nowhere.png"),
}


def add_unreadable(name, folder):
    """Add a file that cannot be read to a folder of images; returns its path."""
    path = folder / "train" / "both" / name
    UNREADABLE[name](path)
    return path


@pytest.fixture
def own_folder(tmp_path):
    """27 images of three classes that a test may change."""
    return write_folder(tmp_path / "set", 9)


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_one_line_before_training(name, own_folder, tmp_path, capsys):
    bad = add_unreadable(name, own_folder)
    out = tmp_path / "run"
    error = refused(capsys, main_of("simclr"), arguments("simclr", own_folder, out))
    assert str(bad) in error and "repair, convert or remove it" in error
    assert not out.exists()


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_that_is_streamed_is_one_line_when_it_is_read(
    name, own_folder, tmp_path, capsys
):
    bad = add_unreadable(name, own_folder)
    out = tmp_path / "run"
    argv = arguments("simclr", own_folder, out, "--batch-size 7 --stream")
    assert str(bad) in refused(capsys, main_of("simclr"), argv)
    gc.collect()  # The frames of the error hold on to the processes that read.
    assert not (out / "checkpoint.pt").exists()  # It is read in the first epoch.


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", ["cut.jpg", "bomb.png"])
def test_every_script_refuses_an_unreadable_image(method, name, own_folder, tmp_path, capsys):
    bad = add_unreadable(name, own_folder)
    argv = arguments(method, own_folder, tmp_path / "run")
    assert str(bad) in refused(capsys, main_of(method), argv)
    argv = ["random", "--arch", "small", "--data", own_folder, "--out", tmp_path / "evaluation"]
    assert str(bad) in refused(capsys, main_of("linear_eval"), argv)


# --------------------------------------------------------------------------------------
# Image files that are unusual, but right
# --------------------------------------------------------------------------------------


def same(image, path, **options):
    """Save an image, and give the pixels as which it should be read."""
    image.save(path, **options)
    return np.array(image.convert("RGB"))


def with_alpha(image, path):
    """Save an image with transparent pixels, whose colors count."""
    pixels = np.array(image)
    image.putalpha(Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)))
    image.save(path)
    return pixels


def turned(image, path):
    """Save an image which its EXIF data say to turn by 90 degrees, clockwise."""
    exif = Image.Exif()
    exif[0x112] = 6
    return np.rot90(same(image, path, exif=exif), -1)


def animated(image, path):
    """Save an animation, of which the first frame counts."""
    return same(image, path, save_all=True, append_images=[Image.new("RGB", image.size)])


# How each is written, under the name of a file; it gives the pixels as which it should be read.
UNUSUAL = {
    "cmyk.tif": lambda image, path: same(image.convert("CMYK"), path),
    "alpha.png": with_alpha,
    "gray-with-alpha.png": lambda image, path: same(image.convert("LA"), path),
    "palette.png": lambda image, path: same(image.quantize(16), path, transparency=3),
    "black-and-white.png": lambda image, path: same(image.convert("1"), path),
    "turned.png": turned,
    "pixel.png": lambda image, path: same(image.crop((0, 0, 1, 1)), path),
    "animated.png": animated,
    "UPPER.PNG": same,
    "a-png-named.jpg": lambda image, path: same(image, path, format="png"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_read_right(name, tmp_path):
    expected = UNUSUAL[name](photograph((12, 8)), tmp_path / name)
    files = common.load_splits(str(tmp_path), "", None, torch.device("cpu"), 1)[0]
    assert len(files) == 1
    image = files.first()
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_a_run_on_all_kinds_of_images(tmp_path):
    for name, write in UNUSUAL.items():
        write(photograph((12, 8)), tmp_path / name)
    out = run("simclr", tmp_path, tmp_path / "run", "--image-size 12 --batch-size 5")
    assert checkpoint(out)["step"] == 4


def test_a_run_on_images_of_one_pixel(tmp_path):
    for i in range(8):
        photograph((1, 1)).save(tmp_path / f"{i}.png")
    out = run("simclr", tmp_path, tmp_path / "run")
    assert checkpoint(out)["step"] == 4


# --------------------------------------------------------------------------------------
# Folders and labels
# --------------------------------------------------------------------------------------


def without(split):
    """A change of a folder: no images of a split, or no such split."""
    return lambda folder: shutil.rmtree(folder / split)


def with_empty(name):
    """A change of a folder: another folder, without images."""
    return lambda folder: (folder / name).mkdir()


def with_image(name):
    """A change of a folder: another image."""

    def change(folder):
        (folder / name).parent.mkdir()
        photograph().save(folder / name)

    return change


def without_classes(folder):
    """A change of a folder: images in its splits, but not in folders for classes."""
    for split in ("train", "test"):
        shutil.rmtree(folder / split)
        (folder / split).mkdir()
        photograph().save(folder / split / "0.png")


def empty_split(folder):
    """A change of a folder: no class in the test split."""
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()


# How a folder is made wrong, what of it is given to --data, and what the error names.
WRONG_FOLDERS = {
    "missing": (None, "nowhere", "nowhere"),
    "a file": (None, "train/both/0.png", "0.png"),
    "no images": (with_empty("texts"), "texts", "texts"),
    "no test split": (without("test"), "", "a folder val or test"),
    "no training split": (without("train"), "", "a folder train"),
    "splits without classes": (without_classes, "", "lacks images"),
    "an empty class": (with_empty("train/zebra"), "", "zebra"),
    "a class only in training": (with_image("train/zebra/0.png"), "", "zebra"),
    "a class only in the test": (with_image("test/zebra/0.png"), "", "zebra"),
    "an empty split": (empty_split, "", "lacks images"),
}


@pytest.mark.parametrize("kind", WRONG_FOLDERS)
def test_wrong_folders_are_one_line(kind, own_folder, tmp_path, capsys):
    change, part, named = WRONG_FOLDERS[kind]
    if change:
        change(own_folder)
    data = own_folder / part
    for method in ("simclr", "supcon", "drlim"):
        argv = arguments(method, data, tmp_path / "run")
        assert named in refused(capsys, main_of(method), argv)
        assert not (tmp_path / "run").exists()


def test_methods_that_need_labels_refuse_images_without(few, tmp_path, capsys):
    data = few / "train" / "both"
    argv = arguments("supcon", data, tmp_path / "run")
    assert "class" in refused(capsys, main_of("supcon"), argv)
    argv = ["random", "--arch", "small", "--data", data, "--out", tmp_path / "run"]
    assert "class" in refused(capsys, main_of("linear_eval"), argv)
    argv = arguments("drlim", data, tmp_path / "run", "--graph labels")
    assert "two classes" in refused(capsys, main_of("drlim"), argv)
    assert not (tmp_path / "run").exists()


IMAGES = np.zeros((30, 12, 12), np.uint8)
LABELS = np.arange(30) % 3
ARRAYS = {"train_images": IMAGES, "train_labels": LABELS}
ARRAYS |= {"test_images": IMAGES, "test_labels": LABELS}
# What is changed in a file of arrays, and a part of the line that it leads to.
WRONG_ARRAYS = {
    "numbers in 0..1": ({"test_images": IMAGES / 255}, "test_images must be uint8"),
    "two channels": ({"train_images": np.zeros((30, 2, 12, 12), np.uint8)}, "C = 1 or 3"),
    "no images": ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "test_images is empty"),
    "flat images": ({"train_images": IMAGES.reshape(30, -1)}, "is uint8 [30, 144]"),
    "fewer labels": ({"train_labels": LABELS[:20]}, "train_labels"),
    "no label at all": ({"train_labels": LABELS * 0 - 1, "test_labels": LABELS * 0 - 1}, "from 0"),
    "names as labels": ({"test_labels": LABELS.astype(str)}, "cannot be read|test_labels"),
    "negative labels": ({"train_labels": LABELS - 1}, "from 0"),
    "a new class": ({"test_labels": LABELS + 1}, "highest of train_labels"),
    "no labels": ({"train_labels": None}, "train_labels"),
    "no test images": ({"test_images": None, "test_labels": None}, "test_images"),
    "a pickle": ({"train_images": np.array([None, "x"])}, "allow_pickle"),
}


@pytest.mark.parametrize("kind", WRONG_ARRAYS)
def test_wrong_arrays_are_one_line(kind, tmp_path, capsys):
    change, words = WRONG_ARRAYS[kind]
    arrays = {name: array for name, array in (ARRAYS | change).items() if array is not None}
    np.savez(tmp_path / "mine.npz", **arrays)
    argv = arguments("simclr", tmp_path / "mine.npz", tmp_path / "run")
    error = refused(capsys, main_of("simclr"), argv)
    assert "mine.npz" in error and any(word in error for word in words.split("|"))


def test_a_file_that_holds_no_arrays_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.npz").write_text("nothing")
    for name in ("mine.npz", "absent.npz"):
        argv = arguments("simclr", tmp_path / name, tmp_path / "run")
        assert name in refused(capsys, main_of("simclr"), argv)


def test_a_link_to_a_folder_above_itself_does_not_count_images_twice(tmp_path):
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    photograph().save(folder / "a.png")
    photograph().save(folder / "deep" / "b.png")
    (folder / "deep" / "again").symlink_to(folder)
    files = common.load_splits(str(folder), "", None, torch.device("cpu"), 1)[0]
    assert len(files) == 2


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "set"
    (folder / "secret").mkdir(parents=True)
    photograph().save(folder / "a.png")
    list_folder = os.scandir

    def scandir(path):  # The tests may run as root, who may read everything.
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    argv = arguments("simclr", folder, tmp_path / "run")
    assert "secret" in refused(capsys, main_of("simclr"), argv)


@pytest.mark.parametrize("script", [*METHODS, "linear_eval"])
def test_paths_that_are_too_long_are_one_line(script, few, tmp_path, capsys):
    long = tmp_path / ("long" * 100)
    main = main_of(script)
    if script == "linear_eval":
        argv = ["random", "--arch", "small", "--data"]
        assert "longlong" in refused(capsys, main, [*argv, few, "--out", long])
        assert "longlong" in refused(capsys, main, [*argv, few, "--features", long / "f.npz"])
        assert "longlong" in refused(capsys, main, [*argv, long, "--out", tmp_path / "run"])
    else:
        assert "longlong" in refused(capsys, main, arguments(script, few, long))
        assert "longlong" in refused(capsys, main, arguments(script, long, tmp_path / "run"))


# --------------------------------------------------------------------------------------
# Encoder files
# --------------------------------------------------------------------------------------


class RunsCode:
    """Would create a folder if it were unpickled."""

    def __reduce__(self):
        return Path.mkdir, (Path("harm"),)


SMALL = {"architecture": "small", "stem": "3x3"}


def small_with(about=SMALL, leave_out="", **changed):
    """A file of --arch small with other metadata, or with tensors changed or left out."""

    def write(path):
        weights = common.build_encoder("small").state_dict() | changed
        weights.pop(leave_out, None)
        save_file(weights, path, about)

    return write


def half_of_small(path):
    """The first half of the file of an encoder."""
    small_with()(path)
    cut(path, 0.5)


def another_network(path):
    """A file that says that it holds --arch small, and holds a ResNet."""
    common.save_encoder(path, common.build_encoder("resnet18"), **SMALL)


# How each is written, under its path.
WRONG_ENCODERS = {
    "missing": lambda path: None,
    "another network": another_network,
    "a wrong shape": small_with(**{"0.0.weight": torch.zeros(32, 3, 5, 5)}),
    "a tensor too few": small_with(leave_out="0.0.weight"),
    "no metadata": small_with(None),
    "an unknown network": small_with({"architecture": "vit_b_16", "stem": "7x7"}),
    "half a file": half_of_small,
    "a pickle that runs code": lambda path: path.write_bytes(pickle.dumps({"m": RunsCode()})),
    "a checkpoint of torch": lambda path: torch.save({"weight": torch.zeros(1)}, path),
    "text": lambda path: path.write_text("no weights"),
    "no bytes": Path.touch,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", WRONG_ENCODERS)
def test_wrong_encoder_files_are_one_line(kind, few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.safetensors"
    WRONG_ENCODERS[kind](path)
    argv = arguments("simclr", few, tmp_path / "run", "--init", path)
    assert str(path) in refused(capsys, main_of("simclr"), argv)
    argv = [path, "--data", few, "--out", tmp_path / "run"]
    assert str(path) in refused(capsys, main_of("linear_eval"), argv)
    assert not (tmp_path / "run").exists() and not (tmp_path / "harm").exists()


# --------------------------------------------------------------------------------------
# Folders of runs
# --------------------------------------------------------------------------------------


def test_an_out_that_cannot_be_written_is_one_line(few, capsys):
    for method in METHODS:
        argv = arguments(method, few, "/proc/run")
        assert "/proc/run" in refused(capsys, main_of(method), argv)
    argv = ["random", "--arch", "small", "--data", few, "--out", "/proc/run"]
    assert "/proc/run" in refused(capsys, main_of("linear_eval"), argv)


def test_an_unfinished_run_of_another_script_is_refused(few, tmp_path, capsys):
    out = run("moco", few, tmp_path / "run", "--max-steps 1")
    (out / "results.json").unlink()
    before = (out / "checkpoint.pt").read_bytes()
    for method in ("simclr", "swav", "supcon", "drlim"):
        error = refused(capsys, main_of(method), arguments(method, few, out))
        assert "method was moco" in error
    assert (out / "checkpoint.pt").read_bytes() == before


# --------------------------------------------------------------------------------------
# More than there is memory
# --------------------------------------------------------------------------------------

HUGE = "1000000000"  # squared, it is beyond what any machine can address
LARGE = "300000"  # A step of four such images takes terabytes.
TOO_LARGE = {
    "simclr": ["--image-size", LARGE],
    "moco": ["--queue-size", HUGE, "--dim", HUGE],
    "swav": ["--prototypes", HUGE, "--dim", HUGE],
    "supcon": ["--image-size", LARGE],
    "drlim": ["--arch", "resnet18", "--dim", HUGE],
    "linear_eval": ["--image-size", LARGE],
}


@pytest.mark.parametrize("script", TOO_LARGE)
def test_what_cannot_be_allocated_is_one_line(script, few, tmp_path, capsys):
    argv = ["random", "--arch", "small", "--data", str(few), "--out", str(tmp_path / "run")]
    if script != "linear_eval":
        argv = arguments(script, few, tmp_path / "run")
    error = refused(capsys, main_of(script), [*argv, *TOO_LARGE[script]])
    assert "not enough memory" in error
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(10**9, 10**9),
        lambda: torch.empty(2, 3, 10**9, 10**9),
        lambda: torch.empty(1).expand(10**12, 10**12).contiguous(),
        lambda: np.zeros((10**9, 10**9)),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        allocate()
    assert common.memory_problem(error.value)
    with pytest.raises(RuntimeError) as error:
        torch.tensor([1]).fill_(1e30)  # "... without overflow"
    assert common.memory_problem(error.value) is None


# --------------------------------------------------------------------------------------
# Modes of Accelerate
# --------------------------------------------------------------------------------------

MODES = {
    "DEEPSPEED": ("ACCELERATE_USE_DEEPSPEED", "true"),
    "FSDP": ("ACCELERATE_USE_FSDP", "true"),
    "MEGATRON_LM": ("ACCELERATE_USE_MEGATRON_LM", "true"),
    "PARALLELISM_CONFIG": ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    "fp16": ("ACCELERATE_MIXED_PRECISION", "fp16"),
    "fp8": ("ACCELERATE_MIXED_PRECISION", "fp8"),
    "gradient accumulation": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_that_are_not_supported_are_one_line(mode, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(*MODES[mode])  # what `accelerate launch` sets
    for method in METHODS:
        argv = arguments(method, few, tmp_path / "run")
        error = refused(capsys, main_of(method), argv)
        assert mode in error and "bf16" in error and "--multi_gpu" in error
    argv = ["random", "--arch", "small", "--data", few, "--out", tmp_path / "run"]
    assert mode in refused(capsys, main_of("linear_eval"), argv)
    assert not (tmp_path / "run").exists()


def test_the_tiny_flags_are_of_a_run_that_is_not_refused(few, tmp_path):
    # Otherwise all of the above might be refused for another reason.
    for method in METHODS:
        assert checkpoint(run(method, few, tmp_path / method, "--max-steps 1"))["step"] == 1


def test_a_lack_of_memory_is_not_blamed_on_the_file(monkeypatch, tmp_path):
    def full(*arguments, **more):
        raise MemoryError

    monkeypatch.setattr(common.Image, "open", full)
    monkeypatch.setattr(torch, "load", full)
    monkeypatch.setattr(np, "load", full)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", full)
    monkeypatch.setattr(safetensors, "safe_open", full)

    def read_set(name):
        common.load_splits(name, str(tmp_path), None, torch.device("cpu"))

    for read, what in [
        (common.read_image, tmp_path / "file"),
        (common.read_checkpoint, tmp_path / "file"),
        (common.load_encoder, tmp_path / "file"),
        (read_set, "fashion-mini"),
        (read_set, "cifar10"),
        (read_set, "file.npz"),
        (linear_eval.read_tensors, "file.pth"),
        (linear_eval._is_ours, "file.safetensors"),
    ]:
        with pytest.raises(MemoryError):
            read(what)


def test_mapped_classes_without_images_are_refused_in_one_line(tmp_path, capsys):
    data = tmp_path / "set.npz"
    np.savez(data, **ARRAYS | {"test_labels": LABELS % 2})  # no test image of class 2
    argv = arguments("drlim", data, tmp_path / "run", "--classes 2")
    assert "--classes" in refused(capsys, drlim.main, argv)
    argv = arguments("drlim", data, tmp_path / "run", "--classes 1 --limit 1")
    assert "--limit" in refused(capsys, drlim.main, argv)


def test_too_few_held_out_images_of_the_mapped_classes_are_refused(few, tmp_path, capsys):
    argv = arguments("drlim", few, tmp_path / "run", "--classes along --holdout 1")
    assert "--holdout" in refused(capsys, drlim.main, argv)
