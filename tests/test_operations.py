"""The batched image operations: torchvision's results and torchvision's distributions."""

import math
from functools import partial

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common
from common import (
    ColorJitter,
    GaussianBlur,
    RandomApply,
    RandomResizedCrop,
    generator,
    grayscale,
)

N = 40


def images(channels=3, height=23, width=31):
    x = torch.rand(N, channels, height, width, generator=generator(1))
    x[0] = 0.5  # no hue
    x[1, :, :5] = x[1, :1, :5]  # gray in part
    x[2] = x[2].round()  # saturated colors, and ties between channels
    return x


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [16, 24, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_torchvisions_antialiased_resized_crop(size, channels):
    x, crop = images(channels), RandomResizedCrop(size, flip=0.5)
    *u, flip = crop.draw(N, generator(2))
    assert flip.any() and not flip.all()
    theirs = [
        TF.resized_crop(image, *box, [size, size], antialias=True)
        for image, box in zip(x, crop.boxes(*u, 23, 31).tolist(), strict=True)
    ]
    theirs = [t.flip(2) if f else t for t, f in zip(theirs, flip, strict=True)]
    close(crop(x, *u, flip), theirs)
    as_bytes = (x * 255).round().to(torch.uint8)
    torch.testing.assert_close(crop(as_bytes, *u, flip), crop(as_bytes / 255, *u, flip))


def test_large_images_are_cropped_in_parts_as_each_alone():
    x = torch.randint(0, 256, (3, 3, 2900, 3000), dtype=torch.uint8)  # two of them fill a part
    crop = common.RandomResizedCrop(8)
    drawn = crop.draw(3, common.generator(0))
    alone = [crop(x[i : i + 1], *(v[i : i + 1] for v in drawn)) for i in range(3)]
    torch.testing.assert_close(crop(x, *drawn), torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_torchvisions_in_each_images_order(channels):
    x, jitter = images(channels), ColorJitter(0.8, 0.8, 0.8, 0.2)
    factors, order = jitter.draw(N, generator(3))
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    theirs = []
    for image, factor, turns in zip(x, factors.tolist(), order.tolist(), strict=True):
        for turn in turns:
            image = adjust[turn](image, factor[turn])
        theirs.append(image)
    close(jitter(x.clone(), factors, order), theirs)


def test_whole_circle_of_hues():
    x = images()
    shift = torch.linspace(-0.5, 0.5, N)
    factors = torch.cat([torch.ones(N, 3), shift[:, None]], 1)
    ours = ColorJitter(0, 0, 0, 0.5)(x.clone(), factors, torch.arange(4).expand(N, 4))
    close(ours, [TF.adjust_hue(image, s) for image, s in zip(x, shift.tolist(), strict=True)])


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 23])
def test_blur_is_torchvisions(kernel_size):
    x, blur = images(height=24, width=24), GaussianBlur(kernel_size, (0.1, 2.0))
    (sigma,) = blur.draw(N, generator(4))
    theirs = [
        TF.gaussian_blur(image, [kernel_size] * 2, [s] * 2)
        for image, s in zip(x, sigma.tolist(), strict=True)
    ]
    close(blur(x, sigma), theirs)


@pytest.mark.parametrize(
    "function",
    [
        grayscale,
        partial(TF.solarize, threshold=0.5),
        partial(TF.normalize, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4]),
    ],
)
def test_random_apply_leaves_the_others_alone(function):
    x, operation = images(), RandomApply(function, 0.5)
    (chosen,) = operation.draw(N, generator(5))
    assert 0 < chosen.sum() < N
    ours = operation(x.clone(), chosen)
    assert torch.equal(ours[~chosen], x[~chosen])
    close(ours[chosen], [function(image) for image in x[chosen]])
    assert torch.equal(operation(x.clone(), torch.zeros(N, dtype=torch.bool)), x)


def test_random_apply_hands_each_image_its_own_parameters():
    x, blur = images(height=24, width=24), GaussianBlur(5, (0.1, 2.0))
    chosen, sigma = RandomApply(blur, 0.5).draw(N, generator(6))
    ours = RandomApply(blur, 0.5)(x.clone(), chosen, sigma)
    torch.testing.assert_close(ours[chosen], blur(x, sigma)[chosen])
    assert torch.equal(ours[~chosen], x[~chosen])


def same_distribution(ours, theirs):
    """Two samples whose empirical distribution functions differ by less than chance allows."""
    ours, theirs = (torch.as_tensor(v, dtype=torch.float64).sort().values for v in (ours, theirs))
    points = torch.cat([ours, theirs])
    cdfs = [torch.searchsorted(v, points, right=True) / len(v) for v in (ours, theirs)]
    distance = (cdfs[0] - cdfs[1]).abs().max()
    allowed = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))  # Kolmogorov-Smirnov, p .001
    assert distance < allowed, (distance, allowed)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (32, 32, (0.08, 1.0)),
        (40, 120, (0.3, 1.0)),
        (28, 28, (0.9, 1.0)),
    ],
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(7)
    image = torch.zeros(1, height, width)
    theirs = v2.RandomResizedCrop(8, scale=scale)
    theirs = [theirs.make_params([image]) for _ in range(6000)]
    crop = RandomResizedCrop(8, scale)
    *u, flip = crop.draw(20000, generator(8))
    for column, name in enumerate(("top", "left", "height", "width")):
        same_distribution(crop.boxes(*u, height, width)[:, column], [t[name] for t in theirs])
    assert abs(flip.float().mean() - 0.5) < 0.02
    top, left, h, w = crop.boxes(*u, height, width).T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_boxes_of_images_of_different_sizes_are_those_of_each():
    crop = RandomResizedCrop(8)
    *u, _ = crop.draw(N, generator(9))
    heights, widths = torch.arange(20, 20 + N), torch.arange(90, 90 - N, -1)
    each = [
        crop.boxes(*(v[i : i + 1] for v in u), int(heights[i]), int(widths[i])) for i in range(N)
    ]
    assert torch.equal(crop.boxes(*u, heights, widths), torch.cat(each))


def test_the_largest_random_number_keeps_the_box_inside():
    crop = RandomResizedCrop(8)
    largest = 1 - 2**-24
    scale, ratio = torch.full((1, 10), 0.2), torch.full((1, 10), largest)
    place = torch.full((1, 1), largest)
    top, left, h, w = crop.boxes(scale, ratio, place, place, 4000, 4000)[0].tolist()
    assert top + h <= 4000 and left + w <= 4000


def test_jitter_parameters_are_distributed_as_torchvisions():
    torch.manual_seed(10)
    image = torch.zeros(3, 2, 2)
    theirs = v2.ColorJitter(0.4, 1.5, 0.2, 0.1)
    theirs = [theirs.make_params([image]) for _ in range(4000)]
    factors, order = ColorJitter(0.4, 1.5, 0.2, 0.1).draw(20000, generator(11))
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for column, name in enumerate(names):
        same_distribution(factors[:, column], [t[name] for t in theirs])
    code = order @ torch.tensor([64, 16, 4, 1])
    _, counts = code.unique(return_counts=True)
    assert len(counts) == 24 and (counts - 20000 / 24).abs().max() < 5 * math.sqrt(20000 / 24)


def test_blur_and_probability_parameters_are_distributed_as_torchvisions():
    torch.manual_seed(12)
    theirs = v2.GaussianBlur(3, (0.1, 2.0))
    theirs = [theirs.make_params([])["sigma"][0] for _ in range(4000)]
    chosen, sigma = RandomApply(GaussianBlur(3, (0.1, 2.0)), 0.3).draw(20000, generator(13))
    same_distribution(sigma, theirs)
    assert abs(chosen.float().mean() - 0.3) < 0.015
