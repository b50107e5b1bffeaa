"""What a run reads: folders, arrays and files, what is said of them, and the batches they give."""

import traceback
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from torchvision.transforms.v2 import functional as TF

import common
from common import Images, RandomResizedCrop, batches, load_splits, one_line_errors

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(folder, names, width=12, height=12):
    """Write random pictures, each of its own, under some names; returns the folder."""
    for i, name in enumerate(names.split()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(height, width, 3, seed=i)).save(folder / name)
    return folder


def load(data, limit=None, workers=0):
    return load_splits(str(data), "nowhere", limit, CPU, workers)


def line_of(capsys, data):
    """The line that is printed about what was read."""
    load(data)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return printed.strip()


def refused(data, *words):
    """Reading ends in one line, which holds some words."""
    with pytest.raises(SystemExit) as error, one_line_errors():
        load(data)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_folder_of_two_parts_with_a_folder_for_each_class(tmp_path, capsys, part):
    write(tmp_path, f"train/b/1.png train/a/deep/2.png train/a/1.PNG {part}/b/3.png {part}/b/4.png")
    said = "train: 3 images, 2 classes, 12x12 RGB; test: 2 images, 2 classes, 12x12 RGB"
    assert line_of(capsys, tmp_path) == said
    images, bank, test = load(tmp_path)
    assert images is bank and bank.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [1, 1]
    names = ["train/a/1.PNG", "train/a/deep/2.png", "train/b/1.png"]
    assert images.paths.tolist() == [str(tmp_path / name) for name in names]
    expected = [np.array(Image.open(path)).transpose(2, 0, 1) for path in images.paths]
    np.testing.assert_array_equal(images.pixels, expected)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ("train/b/1.png train/a/2.png", [0, 1]),
        ("b/1.png a/2.png", [0, 1]),
        ("train/a/1.png train/b/2.png val/1.png val/2.png", [0, 1]),
        ("1.png 2.png", [-1, -1]),
        ("train/1.png train/2.png val/a/1.png val/b/2.png", [-1, -1]),
    ],
)
def test_without_labeled_test_images_nothing_is_evaluated(tmp_path, names, labels):
    images, bank, test = load(write(tmp_path, names))
    assert images.labels.tolist() == labels
    assert bank is (images if labels[0] == 0 else None) and test is None


def test_what_is_left_out_is_named(tmp_path, capsys):
    parts = ("train", "val", "test", "unlabeled", ".cache")
    write(tmp_path, " ".join(f"{part}/a/{i}.png" for part in parts for i in "12"))
    assert line_of(capsys, tmp_path).endswith("; ignored: test, unlabeled")
    said = line_of(capsys, write(tmp_path, "train/outside.png"))
    assert said.count("no classes") == 1 and "1 images lie" in said
    assert line_of(capsys, write(tmp_path, "beside.png")) != said
    for name in ("train/1.heic", "val/2.heic", "train/3.jfif", "train/4.npy"):
        (tmp_path / name).touch()
    assert "skipped: 2 files (.heic), 1 files (.jfif), 1 files (.npy)" in line_of(capsys, tmp_path)
    for i in range(50):  # as DICOM files are often named
        (tmp_path / "train" / f"IM{i:05}").touch()
    assert line_of(capsys, tmp_path).count("files (") < 7
    assert "val_images" in line_of(capsys, arrays(tmp_path, val_images=noise(2, 9, 9)))


def test_names_that_begin_with_a_dot_are_neither_images_nor_classes(tmp_path, capsys):
    write(
        tmp_path, "a/1.png b/2.png ._3.png a/._4.png .cache/5.png a/.cache/6.png __MACOSX/._2.png"
    )
    (tmp_path / ".DS_Store").touch()
    assert line_of(capsys, tmp_path) == "train: 2 images, 2 classes, 12x12 RGB"


def test_limit_is_the_start_of_one_shuffle_of_the_training_images(tmp_path):
    names = [f"{part}/{i % 2}/{i}.png" for part in ("train", "val") for i in range(9)]
    write(tmp_path, " ".join(names))
    whole, five, three = (load(tmp_path, limit)[0] for limit in (None, 5, 3))
    assert len(five) == 5 and len(load(tmp_path, 5)[2]) == len(load(tmp_path, 99)[0]) == 9
    assert torch.equal(five.pixels[:3], three.pixels)
    index = torch.tensor([whole.paths.tolist().index(path) for path in five.paths])
    assert not torch.equal(index, torch.arange(5)) and torch.equal(five.labels, whole.labels[index])
    assert torch.equal(whole.take(index).pixels, five.pixels) and whole.num_classes == 2


def test_wrong_folders_are_one_line(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "cifar10", "folder")
    refused(write(tmp_path / "one", "1.png"), "two are needed")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    refused(tmp_path / "empty", "no images", "empty/train")
    refused(write(tmp_path / "new", "train/a/1.png train/a/2.png val/b/1.png"), "'b' in val")


@pytest.mark.parametrize("names", ["1.png 2.png", "a/1.png b/2.png", "train/1.png train/2.png"])
def test_the_identity_is_of_names_and_not_of_the_folder(tmp_path, names):
    identity = load(write(tmp_path / "here", names))[0].identity
    (tmp_path / "here").rename(tmp_path / "there")
    assert load(tmp_path / "there")[0].identity == identity
    last = tmp_path / "there" / names.split()[1]
    last.rename(last.with_stem("3"))
    assert load(tmp_path / "there")[0].identity != identity


# --------------------------------------------------------------------------------------
# Arrays and torchvision's sets
# --------------------------------------------------------------------------------------

LABELS = np.arange(6) % 3


def arrays(folder, **changed):
    """Write an .npz file of 6 images of 3 classes, with some arrays changed, or None to drop."""
    file = {"train_images": noise(6, 12, 10), "train_labels": LABELS}
    file |= {"test_images": noise(6, 12, 10, seed=1), "test_labels": LABELS[::-1]} | changed
    np.savez(folder / "mine.npz", **{k: v for k, v in file.items() if v is not None})
    return folder / "mine.npz"


@pytest.mark.parametrize(
    "shape", [(6, 12, 10), (6, 1, 12, 10), (6, 12, 10, 1), (6, 3, 12, 10), (6, 12, 10, 3)]
)
def test_arrays_of_all_shapes(tmp_path, capsys, shape):
    path = arrays(tmp_path, train_images=noise(*shape))
    channels = "RGB" if 3 in shape else "gray"
    said = f"train: 6 images, 3 classes, 10x12 {channels}; test: 6 images, 3 classes, 10x12 gray"
    assert line_of(capsys, path) == said
    images, bank, test = load(path)
    expected = noise(*shape) if shape[-1] == 10 else noise(*shape).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.pixels, expected.reshape(6, -1, 12, 10))
    assert images is bank and bank.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.labels.tolist() == [2, 1, 0, 2, 1, 0] and images.pixels.is_contiguous()


@pytest.mark.parametrize("values", [[1, 2, 10], [7, 30_000, 300_000], np.uint64([0, 4, 255])])
def test_classes_are_numbered_by_what_occurs(tmp_path, values):
    labels = np.array(values)[LABELS]
    images, _, test = load(arrays(tmp_path, train_labels=labels, test_labels=labels[::-1]))
    assert images.num_classes == 3 and images.labels.tolist() == LABELS.tolist()
    assert test.labels.tolist() == LABELS[::-1].tolist()


def test_a_label_of_minus_one_is_none(tmp_path):
    some = np.array([-1, 5, 9, -1, 5, 5])
    images, bank, test = load(arrays(tmp_path, train_labels=some, test_labels=some.clip(5)))
    assert len(images) == 6 and bank.labels.tolist() == [0, 1, 0, 0] and len(test) == 6
    assert torch.equal(bank.pixels, images.pixels[[1, 2, 4, 5]])
    for labels in (None, some * 0 - 1):
        images, bank, test = load(arrays(tmp_path, train_labels=labels))
        assert images.labels.tolist() == [-1] * 6 and bank is test is None
        assert load(arrays(tmp_path, test_labels=labels))[2] is None
    test = load(arrays(tmp_path, test_labels=LABELS - 1))[2]
    assert test is None or test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train_labels": np.array([*"abcabc"])}, ["<U1", "numbers"]),
        ({"train_labels": LABELS[:, None]}, ["train", "[6, 1]"]),
        ({"test_labels": LABELS + 1}, ["test", "class 3"]),
        ({"train_images": noise(6, 9, 9) / 255}, ["train", "float64", "uint8"]),
        ({"train_images": noise(6, 12, 10, 4)}, ["train", "[6, 12, 10, 4]"]),
        ({"train_images": noise(6, 4, 12, 10)}, ["train", "[6, 4, 12, 10]"]),
    ],
)
def test_wrong_arrays_are_one_line(tmp_path, changed, words):
    refused(arrays(tmp_path, **changed), "mine.npz", *words)


def test_files_that_are_no_arrays_are_one_line(tmp_path):
    path = arrays(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    refused(path, "mine.npz", "cannot be read")
    with path.open("wb") as file:
        np.save(file, noise(6, 9, 9))
    refused(path, "mine.npz", "train_images")


def test_stl10_trains_on_its_unlabeled_images(monkeypatch):
    def read(root, split, download):
        count = {"train": 3, "test": 2, "unlabeled": 5}[split]
        labels = np.full(count, -1) if split == "unlabeled" else np.arange(count)
        return SimpleNamespace(data=noise(count, 3, 9, 9), labels=labels)

    monkeypatch.setitem(common.SETS, "stl10", read)
    images, bank, test = load("stl10")
    assert images.labels.tolist() == [-1] * 5 and images.pixels.shape == (5, 3, 9, 9)
    assert bank.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [0, 1]


# --------------------------------------------------------------------------------------
# Image files
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_8_bits_are_read_as_rgb(tmp_path, mode, suffix):
    image = Image.fromarray(noise(8, 12, 3)).convert(mode)
    path = tmp_path / f"image.{suffix if mode != 'CMYK' else 'tif'}"
    image.save(path)
    pixels = common.read_image(path).permute(1, 2, 0)
    np.testing.assert_array_equal(pixels, np.array(image.convert("RGB")))


def test_images_of_unusual_forms_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees, clockwise
    pixels = noise(8, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "a png named.jpg", "png", exif=exif)
    turned = common.read_image(tmp_path / "a png named.jpg").permute(1, 2, 0)
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))
    (tmp_path / "text.ppm").write_text("P3 1 1 255 7 8 9")
    assert common.read_image(tmp_path / "text.ppm").flatten().tolist() == [7, 8, 9]


PNG_OF_16_BITS = bytes.fromhex(  # one RGB pixel
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d"
    "0000000b4944415478da6360000300000700012122db130000000049454e44ae426082"
)


def write_tiff(path, bits, bands, planes=1):
    """Write an RGB image of four pixels that may have more bands, in planes or pixel by pixel."""
    size = 4 * bands * bits // 8 // planes
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.update({256: 2, 257: 2, 278: 2, 259: 1, 262: 2})  # 2x2, not compressed, RGB
    tags.update({258: (bits,) * bands, 277: bands, 284: min(planes, 2), 338: (0,) * (bands - 3)})
    tags.update({273: tuple(range(0, planes * size, size)), 279: (size,) * planes})
    with path.open("wb") as file:
        tags.save(file)
        file.write(bytes(planes * size))


@pytest.mark.parametrize(
    ("name", "write_image", "word"),
    [
        ("rgb.png", lambda path: path.write_bytes(PNG_OF_16_BITS), "RGB;16"),
        ("gray.png", lambda path: Image.fromarray(np.uint16([[9]])).save(path), "I;16"),
        ("12.ppm", lambda path: path.write_bytes(b"P6 1 1 4095 123456"), "4095"),
        ("16.tif", lambda path: write_tiff(path, 16, 3), "RGB;16"),
        ("planes.tif", lambda path: write_tiff(path, 16, 3, 3), "16"),
        ("four.tif", lambda path: write_tiff(path, 8, 4), "RGBX"),
    ],
)
def test_images_that_would_lose_bits_or_bands_are_refused(tmp_path, name, write_image, word):
    write_image(tmp_path / name)
    refused(write(tmp_path, "right.png"), f"{name} cannot be read", word)


@pytest.mark.parametrize("height", [40, 41])  # Images of several sizes are read at each step.
@pytest.mark.parametrize(
    ("name", "content"),
    [("half.jpg", None), ("empty.png", b"")],
)
def test_a_damaged_file_is_named_when_it_is_read(tmp_path, name, content, height):
    write(write(tmp_path, f"0.png {name}", 40, 40), "1.png 2.png", 40, height)
    content = (tmp_path / name).read_bytes()[:1500] if content is None else content
    (tmp_path / name).write_bytes(content)
    for workers in (0, 2):
        with pytest.raises(SystemExit, match=name) as error, one_line_errors():
            images = load(tmp_path, workers=workers)[0]
            list(batches(images, [(2, [RandomResizedCrop(4)])], 2, 0, range(4)))
        assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
        traceback.clear_frames(error.value.__context__.__traceback__)  # ends the processes


def zeros(n, height=1, width=1):
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(n, 1, height, width)
    return Images(pixels, None, torch.zeros(n).long(), CPU, 0)


def flags_for(images, *argv):
    """What the flags are for some images."""
    presets = {"small": {"lr": 1.0}, "large": {"lr": 2.0}, "fashion-mini": {"lr": 3.0}}
    parser = common.build_parser("", presets)
    return common.parse_for(images, parser, presets, ["--data", "a/b.npz", *argv])


def test_defaults_follow_from_the_images_and_flags_win():
    sizes = {20: 20, 40: 32, 4095: 32, 4096: 64, 10_000: 128, 32_767: 256, 32_768: 512, 10**6: 512}
    assert {n: flags_for(zeros(n)).batch_size for n in sizes} == sizes
    small, large = flags_for(zeros(9, 64, 99)), flags_for(zeros(9, 300, 260))
    assert (small.image_size, small.stem, small.lr) == (64, "3x3", 1)
    assert (large.image_size, large.stem, large.lr) == (224, "7x7", 2)
    args = flags_for(zeros(9, 300, 260), "--image-size", "32", "--lr", "9")
    assert (args.image_size, args.stem, args.lr) == (32, "3x3", 9) and args.out.name.endswith("-b")
    assert flags_for(zeros(9), "--data", "fashion-mini").lr == 3


def test_the_median_of_the_shorter_sides_decides_what_is_small(tmp_path):
    write(write(tmp_path / "photographs", "0.png 1.png", 9, 9), "2.png 3.png 4.png", 90, 70)
    assert flags_for(load(tmp_path / "photographs")[0]).image_size == 70
    write(write(tmp_path / "both", "0.png 1.png", 60, 100), "2.png 3.png", 100, 60)
    assert flags_for(load(tmp_path / "both")[0]).image_size == 60


@pytest.mark.parametrize("tall", ["", "3.png 4.png", "3.png 4.png 5.png"])
def test_long_images_are_warned_of_once(tmp_path, capsys, tall):
    write(write(tmp_path / "long", "1.png 2.png", 280, 28), tall, 28, 280)
    assert line_of(capsys, tmp_path / "long").count("only squares") == 1
    assert "squares" not in line_of(capsys, arrays(tmp_path))


def test_on_a_gpu_is_less_than_a_quarter_of_its_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 6 * 12 * 10, 10**9))
    images = load_splits(str(arrays(tmp_path)), "nowhere", None, torch.device("cuda"), 0)[0]
    assert images.pixels.device == CPU


# --------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------

JITTER = common.RandomApply(common.ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8)
RECIPES = [(2, [RandomResizedCrop(8), JITTER]), (3, [RandomResizedCrop(6, (0.05, 0.3))])]


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Eleven smooth images, as photographs are."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(11):
        coarse = Image.fromarray(noise(4, 4, 3, seed=i))
        coarse.resize((40, 30), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return load(folder)[0]


def test_an_epoch_is_each_image_once_in_an_order_of_its_own(memory):
    index = torch.cat([index for index, _ in batches(memory, [], 3, 0, range(6))])
    first, second = index.view(2, 9).tolist()
    steps = common.Steps(memory, RECIPES, 3, 0)
    assert len({str(steps.draw(step)[1][0]) for step in range(6)}) == 6
    assert len({*first}) == len({*second}) == 9 and first != second


def test_views_are_normalized_crops_of_their_images(memory):
    whole = (2, [RandomResizedCrop(30, (1, 1), (4 / 3, 4 / 3), flip=0)])
    index, (views,) = next(batches(memory, [whole], 4, 0, range(1)))
    x = memory.pixels[index]
    expected = TF.normalize(TF.resize(x, [30, 30]) / 255, common.MEAN, common.STD)
    torch.testing.assert_close(views, expected.expand(2, -1, -1, -1, -1), atol=0.02, rtol=0)
    torch.testing.assert_close(next(common.middles(memory, index, 30)), x[..., 5:35] / 255)


def test_files_give_what_memory_gives_to_two_gray_levels(memory):
    both = (memory, replace(memory, pixels=None))
    crops = [(count, operations[:1]) for count, operations in RECIPES]
    runs = [list(batches(images, crops, 4, 7, range(5))) for images in both]
    for (index, views), (index_, views_) in zip(*runs, strict=True):
        assert torch.equal(index, index_)
        for a, b in zip(views, views_, strict=True):
            torch.testing.assert_close(a, b, atol=2 / 255 / min(common.STD), rtol=0)
    encoder = common.build_encoder("small")
    torch.testing.assert_close(*[common.extract_features(encoder, images, 30) for images in both])


def test_views_depend_neither_on_the_readers_nor_on_where_a_run_continues(memory):
    files = replace(memory, pixels=None)
    expected = list(batches(files, RECIPES, 4, 7, range(6)))
    for workers, start in ((0, 3), (2, 0), (3, 4)):
        images = replace(files, workers=workers)
        continued = list(batches(images, RECIPES, 4, 7, range(start, 6)))
        for (index, views), (index_, views_) in zip(continued, expected[start:], strict=True):
            assert torch.equal(index, index_) and all(map(torch.equal, views, views_))
    assert not torch.equal(next(batches(files, RECIPES, 4, 8, range(1)))[1][0], expected[0][1][0])
