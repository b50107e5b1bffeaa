"""Sets, folders and batches."""

import gzip
import os
import pickle
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import SHARED, arguments, metrics, refused, run, same_model, write_folder
from PIL import Image

import common
import linear_eval
import supcon
from common import ColorJitter, RandomApply, RandomResizedCrop, batches, load_splits

CPU = torch.device("cpu")


def fails(capsys, data, *words, root="nowhere", limit=None):
    with pytest.raises(SystemExit) as exit_:
        load_splits(str(data), str(root), limit, CPU, 2)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    for word in words:
        assert str(word) in error


def test_bundled_images_are_the_first_thousand_of_each_class(shared, tmp_path):
    raw = {}
    for name in ("train", "t10k"):
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8)):
            file = SHARED / "fashion-mnist" / f"{name}-{kind}-ubyte.gz"
            raw[name, kind] = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)[skip:]
    labels, images = raw["train", "labels-idx1"], raw["train", "images-idx3"].reshape(-1, 1, 28, 28)
    first = np.sort(np.concatenate([np.flatnonzero(labels == c)[:1000] for c in range(10)]))
    data, bank, test, _ = load_splits("fashion-mini", "nowhere", None, CPU, 1)
    assert data is bank
    np.testing.assert_array_equal(bank.pixels, images[first])
    np.testing.assert_array_equal(bank.labels, labels[first])
    np.testing.assert_array_equal(test.pixels.flatten(), raw["t10k", "images-idx3"])
    np.testing.assert_array_equal(test.labels, raw["t10k", "labels-idx1"])
    assert (common.Path(common.__file__).parent / "data/fashion-mini.npz").stat().st_size < 9e6


def test_without_the_bundled_file_it_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    fails(capsys, "fashion-mini", tmp_path / "data" / "fashion-mini.npz", "restore it")


def test_memory_that_a_step_freed_is_there_for_the_next(tmp_path):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("it is glibc that would hand the memory back")
    program = """
import resource, torch, common
common.keep_freed_memory()
def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _ = [torch.ones(10 * 2**20) for _ in range(6)]  # 40 MiB: glibc's own threshold ends at 32
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began
print([faults() for _ in range(6)][-1])"""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(common.__file__).parent,
        env=environment,
    )
    assert int(run.stdout) < 100  # pages, usually of 4 KiB


def write_idx(folder, name, count):
    """MNIST's files as its makers packed them: image i of class i % 10, filled with i.

    Test images are filled with 100 + i.
    """
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, first in (("train", 0), ("t10k", 100)):
        images = np.repeat(np.arange(first, first + count, dtype=np.uint8), 784)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([0x803, count, 28, 28], ">i4").tobytes() + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], ">i4").tobytes() + labels.tobytes()
        )


def arrays_of(folder):
    """The images and labels of class folders, as the arrays of an .npz file."""
    _, bank, test, _ = load_splits(str(folder), "nowhere", None, CPU, 1)
    arrays = {"train_images": bank.pixels, "train_labels": bank.labels}
    arrays |= {"test_images": test.pixels, "test_labels": test.labels}
    return {name: array.numpy() for name, array in arrays.items()}


@pytest.mark.parametrize("layout", ["[N, C, H, W]", "[N, H, W, C]", "[N, H, W]"])
def test_arrays_are_the_same_images_in_each_layout(folder, tmp_path, layout):
    arrays = arrays_of(folder)
    expected = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name in ("train_images", "test_images"):
        if layout == "[N, H, W]":
            expected[name] = expected[name][:, :1]
            arrays[name] = arrays[name][:, 0]
        elif layout == "[N, H, W, C]":
            arrays[name] = arrays[name].transpose(0, 2, 3, 1)
    np.savez(tmp_path / "stripes.npz", **arrays)
    data, bank, test, _ = load_splits(str(tmp_path / "stripes.npz"), "nowhere", None, CPU, 1)
    assert data is bank and bank.classes == ["0", "1", "2"]
    assert torch.equal(bank.pixels, expected["train_images"])
    assert torch.equal(bank.labels, expected["train_labels"])
    assert torch.equal(test.pixels, expected["test_images"])
    assert torch.equal(test.labels, expected["test_labels"])


def test_a_file_of_arrays_trains_as_a_folder_of_the_same_images(folder, tmp_path, capsys):
    file = tmp_path / "stripes.npz"
    arrays = arrays_of(folder)
    np.savez(file, **arrays)
    from_folder = run("supcon", folder, tmp_path / "folder", "--limit 40")
    from_arrays = run("supcon", file, tmp_path / "arrays", "--limit 40")
    assert same_model(from_folder, from_arrays)
    assert metrics(from_folder)[-1]["knn"] == metrics(from_arrays)[-1]["knn"]

    capsys.readouterr()
    linear_eval.main([str(from_arrays / "encoder.safetensors"), "--protocol", "knn"])
    knn = metrics(from_arrays)[-1]["knn"]
    assert f"{knn:.1f}" in capsys.readouterr().out

    for name in ("train_images", "train_labels"):  # another pixel of each image, or other labels
        changed = {name: arrays[name].copy()}
        changed[name].reshape(48, -1)[:, 0] = changed[name].reshape(48, -1)[::-1, 0]
        np.savez(file, **arrays | changed)
        argv = arguments("supcon", file, from_arrays, "--limit 40")
        assert "images was" in refused(capsys, supcon.main, argv)


def test_arrays_without_labels_are_for_training_alone(folder, tmp_path):
    np.savez(tmp_path / "stripes.npz", train_images=arrays_of(folder)["train_images"])
    data, bank, test, validation = load_splits(
        str(tmp_path / "stripes.npz"), "nowhere", 40, CPU, 1, holdout=5
    )
    assert len(data) == 40 and (data.labels == -1).all()
    assert bank is test is validation is None


@pytest.mark.parametrize(("data", "name"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_mnist_and_fashionmnist_are_read_from_root(tmp_path, data, name):
    write_idx(tmp_path, name, 20)
    _, bank, test, _ = load_splits(data, str(tmp_path), None, CPU, 1)
    assert bank.pixels.shape == test.pixels.shape == (20, 1, 28, 28)
    assert bank.pixels[7].unique().tolist() == [7] and bank.labels[17] == 7
    assert test.pixels[7].unique().tolist() == [107]
    held_out = load_splits(data, str(tmp_path), None, CPU, 1, holdout=19)[3]
    assert held_out.pixels.max() < 100 and len(held_out) == 19


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar_is_read_from_root(tmp_path, monkeypatch, data):
    kind = getattr(torchvision.datasets, data.upper())
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for i, (name, _) in enumerate(kind.train_list + kind.test_list):
        pixels = np.full((4, 3, 32, 32), i, np.uint8)
        pixels[:, 1] = 100
        key = "labels" if data == "cifar10" else "fine_labels"
        entry = {"data": pixels.reshape(4, -1), key: [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: list("abcd")}))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})  # torchvision's own check
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    _, bank, test, _ = load_splits(data, str(tmp_path), None, CPU, 1)
    assert bank.pixels.shape == (4 * len(kind.train_list), 3, 32, 32)
    assert bank.pixels[0, 0].unique().tolist() == [0]
    assert bank.pixels[:, 1].unique().tolist() == [100] and bank.labels[3] == 3
    assert test.pixels[0, 2].unique().tolist() == [len(kind.train_list)]
    assert bank.pixels.is_contiguous()


def test_the_memory_limit_is_a_processs_share_of_the_machine(monkeypatch):
    memory = SimpleNamespace(total=8 * 2**30)
    monkeypatch.setattr(common.psutil, "virtual_memory", lambda: memory)
    assert common.memory_limit() == 2 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert common.memory_limit() == 2**29
    memory.total = 2**50
    assert common.memory_limit() == common.MAX_IMAGE_BYTES


@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_processes_that_a_launcher_started_share_the_cores(monkeypatch, variable):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the launchers set
    torch.set_num_threads(1)
    common.use_all_cores()
    assert torch.get_num_threads() == 1  # Without a launcher it is the user's choice.
    monkeypatch.setenv(variable, "no")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    common.use_all_cores()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    common.use_all_cores()
    assert torch.get_num_threads() == 2  # The user has asked the launcher for two.


def test_stl10_pretrains_on_its_unlabelled_images(tmp_path, monkeypatch):
    kind = torchvision.datasets.STL10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for name, count in (("train", 3), ("test", 2), ("unlabeled", 5)):
        np.full((count, 3, 96, 96), count, np.uint8).tofile(folder / f"{name}_X.bin")
        (np.arange(count) + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("a\nb\nc\n")
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    data, bank, test, _ = load_splits("stl10", str(tmp_path), None, CPU, 1)
    assert [len(v) for v in (data, bank, test)] == [5, 3, 2]
    assert data.labels.tolist() == [-1] * 5 and bank.labels.tolist() == [0, 1, 2]
    assert data.pixels.unique().tolist() == [5]
    assert data.pixels.is_contiguous()  # Selecting images is then several times as fast.
    splits = load_splits("stl10", str(tmp_path), None, CPU, 1, holdout=1)
    assert [len(images) for images in splits] == [5, 2, 2, 1]


def test_a_download_without_network_is_one_line(capsys, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):  # where nothing answers
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fails(capsys, "cifar10", "cifar10", "downloaded", root=tmp_path)


def test_folders_give_every_image_with_its_class(folder):
    data, bank, test, _ = load_splits(str(folder), "nowhere", None, CPU, 3)
    assert data is bank and bank.pixels.shape == (48, 3, 12, 12) and len(test) == 18
    assert bank.labels.bincount().tolist() == [16] * 3  # sorted: across, along, both
    file = sorted((folder / "train" / "along").iterdir(), key=str)[0]
    pixels = np.asarray(Image.open(file)).transpose(2, 0, 1)
    np.testing.assert_array_equal(bank.pixels[16], pixels)


def test_limit_is_the_start_of_one_shuffle_of_the_training_images(folder):
    _, all_of_them, _, _ = load_splits(str(folder), "nowhere", None, CPU, 1)
    _, ten, test, _ = load_splits(str(folder), "nowhere", 10, CPU, 1)
    _, five, _, _ = load_splits(str(folder), "nowhere", 5, CPU, 1)
    assert len(ten) == 10 and len(test) == 18 and torch.equal(ten.pixels[:5], five.pixels)
    assert len(ten.labels.unique()) > 1  # shuffled, not the first class
    for image, label in zip(ten.pixels, ten.labels, strict=True):
        same = (all_of_them.pixels == image).flatten(1).all(1)
        assert all_of_them.labels[same].tolist() == [label]


@pytest.mark.parametrize("stream", [False, True])
def test_held_out_images_are_the_end_of_that_shuffle_and_no_others_change(folder, stream):
    load = partial(load_splits, str(folder), "nowhere", device=CPU, workers=1, stream=stream)

    def pixels(images):
        return images.centers(torch.arange(len(images)), 12)

    _, everything, test, validation = load(limit=None)
    assert validation is test
    _, limited, _, _ = load(limit=20)
    for limit, left in ((None, 41), (20, 20), (45, 41)):
        images, bank, same_test, held_out = load(limit=limit, holdout=7)
        assert images is bank and (len(bank), len(held_out)) == (left, 7)
        assert torch.equal(pixels(same_test), pixels(test))
        if limit == 20:
            assert torch.equal(pixels(bank), pixels(limited))
        both = torch.cat([pixels(bank), pixels(held_out)]).flatten(1)
        assert len(both.unique(dim=0)) == left + 7  # no image is in both
        labels = torch.cat([bank.labels, held_out.labels])
        known = pixels(everything).flatten(1)
        for image, label in zip(both, labels, strict=True):
            assert everything.labels[(known == image).all(1)].tolist() == [label]


def test_holding_out_all_images_is_refused_and_without_labels_none_are(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_splits(str(folder), "nowhere", None, CPU, 1, holdout=48)
    error = capsys.readouterr().err
    assert "--holdout 48" in error and error.count("\n") == 1
    images, *others = load_splits(str(folder / "train"), "nowhere", None, CPU, 1, holdout=8)
    assert len(images) == 48 and others == [None] * 3
    assert "--holdout" in capsys.readouterr().out


def test_orientation_and_modes_of_files(tmp_path):
    folder = write_folder(tmp_path / "a", 1, 1)
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    pixels = np.zeros((12, 12), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(folder / "train" / "along" / "0.png", exif=exif)
    _, bank, _, _ = load_splits(str(folder), "nowhere", None, CPU, 1)
    assert bank.pixels[1, :, 11].min() == 255 and bank.pixels[1, :, :11].max() == 0


def test_bad_folders_are_refused_in_one_line(tmp_path, capsys):
    fails(capsys, tmp_path / "missing", "missing", "cifar10")
    fails(capsys, "cifar11", "cifar11", "cifar10")
    (tmp_path / "empty").mkdir()
    fails(capsys, tmp_path / "empty", "empty", "images")
    (tmp_path / "empty" / "test").mkdir()
    fails(capsys, tmp_path / "empty", "empty", "train")
    folder = write_folder(tmp_path / "classes", 2, 2)
    (folder / "test" / "more").mkdir()
    fails(capsys, folder, "more")  # without an image
    Image.new("RGB", (12, 12)).save(folder / "test" / "more" / "0.png")
    fails(capsys, folder, "more", "both splits")
    folder = write_folder(tmp_path / "damaged", 2, 2)
    whole = (folder / "train" / "both" / "1.png").read_bytes()
    (folder / "train" / "both" / "0.png").write_bytes(whole[: len(whole) // 2])
    fails(capsys, folder, "both/0.png", "cannot be read")
    (folder / "train" / "both" / "0.png").write_bytes(b"no image")
    (folder / "train" / "both" / "1.png").write_bytes(b"nor this")
    fails(capsys, folder, "both/0.png", "cannot be read")
    deep = Image.fromarray(np.full((12, 12), 40000, np.uint16))
    deep.save(folder / "train" / "both" / "0.png")
    fails(capsys, folder, "both/0.png", "8 bits")


RECIPES = [
    (2, [RandomResizedCrop(8), RandomApply(ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8)]),
    (3, [RandomResizedCrop(6)]),
]


def test_batches_cover_an_epoch_in_an_order_of_its_own(folder):
    data, _, _, _ = load_splits(str(folder), "nowhere", None, CPU, 1)
    steps = list(batches(data, RECIPES, 10, 0, 0, 8))
    assert len(steps) == 8
    order = torch.cat([index for index, _ in steps])
    assert len(order[:40].unique()) == len(order[40:].unique()) == 40  # the last 8 are left out
    assert not torch.equal(order[:40], order[40:])
    large, small = steps[0][1]
    assert large.shape == (2, 10, 3, 8, 8) and small.shape == (3, 10, 3, 6, 6)
    assert not torch.equal(large[0], large[1])


def test_views_show_the_images_of_their_index(folder):
    data, _, _, _ = load_splits(str(folder), "nowhere", None, CPU, 1)
    whole = RandomResizedCrop(12, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    for index, (views,) in batches(data, [(2, [whole])], 8, 0, 0, 6):
        torch.testing.assert_close(views[0], data.pixels[index] / 255)
        torch.testing.assert_close(views[1], views[0])


def test_batches_are_a_function_of_seed_epoch_and_step(folder):
    data, _, _, _ = load_splits(str(folder), "nowhere", None, CPU, 1)
    straight = list(batches(data, RECIPES, 8, 3, 0, 12))
    torch.rand(5)  # nobody else's randomness counts
    resumed = list(batches(data, RECIPES, 8, 3, 7, 12))
    for (index, views), (index_, views_) in zip(straight[7:], resumed, strict=True):
        assert torch.equal(index, index_)
        assert all(torch.equal(a, b) for a, b in zip(views, views_, strict=True))
    other = next(batches(data, RECIPES, 8, 4, 7, 12))
    assert not torch.equal(other[0], resumed[0][0])
    assert not torch.equal(straight[0][1][0], straight[6][1][0])


def test_gray_sets_become_three_channels():
    data = common.ImagesInMemory(
        torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8), torch.zeros(4)
    )
    _, (views,) = next(batches(data, [(1, [RandomResizedCrop(8)])], 4, 0, 0, 1))
    assert views.shape == (1, 4, 3, 8, 8) and torch.equal(views[:, :, 0], views[:, :, 2])
    assert data.centers(torch.tensor([2]), 4).shape == (1, 3, 4, 4)


def test_every_view_of_every_image_has_parameters_of_its_own():
    image = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    data = common.ImagesInMemory(image.repeat(12, 1, 1, 1), torch.zeros(12))
    _, (views, _) = next(batches(data, RECIPES, 12, 0, 0, 1))
    assert len(views.flatten(0, 1).flatten(1).unique(dim=0)) == 24
