"""The batched image operations: torchvision's results, and torchvision's distributions."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common
import moco
import simclr
import supcon
import swav
from common import CenterCrop, ColorJitter, GaussianBlur, Grayscale, RandomApply, RandomResizedCrop

N = 40


def pictures(channels=3, height=23, width=31):
    """Images [N, C, H, W] in 0..1, some of which have no hue, or equal or extreme channels."""
    x = torch.rand(N, channels, height, width, generator=common.generator(1))
    x[0] = 0.5
    x[1, :, :5] = x[1, :1, :5]
    x[2] = x[2].round()
    return x


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, torch.stack(list(theirs)), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 24, 31, 40])  # The last two only enlarge.
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_torchvisions_antialiased_resized_crop(size, channels):
    x, crop = pictures(channels), RandomResizedCrop(size)
    *place, flip = crop.draw(N, common.generator(2))
    theirs = []
    for image, box, mirrored in zip(x, crop.boxes(*place, 23, 31).tolist(), flip, strict=True):
        cut = TF.resized_crop(image, *box, [size, size], antialias=True)
        theirs.append(cut.flip(2) if mirrored else cut)
    assert_close(crop(x, *place, flip), theirs)
    in_bytes = (255 * x).round().to(torch.uint8)
    torch.testing.assert_close(crop(in_bytes, *place, flip), crop(in_bytes / 255, *place, flip))


@pytest.mark.parametrize("size", [16, 40])
def test_crops_of_files_are_those_in_memory_but_for_rounding(size):
    image, crop = (255 * pictures()[3]).to(torch.uint8), RandomResizedCrop(size)
    drawn = crop.draw(N, common.generator(2))
    in_memory = 255 * crop(image.expand(N, -1, -1, -1), *drawn)
    assert (crop.cut(image, *drawn) - in_memory).abs().max() < 1.01  # rounded for rows and columns


def test_large_images_are_cropped_in_parts_as_each_alone():
    x = torch.randint(0, 256, (3, 1, 5000, 5000), dtype=torch.uint8)  # Two of them fill a part.
    crop = RandomResizedCrop(8)
    drawn = crop.draw(3, common.generator(0))
    alone = [crop(x[i : i + 1], *[v[i : i + 1] for v in drawn])[0] for i in range(3)]
    assert_close(crop(x, *drawn), alone)


@pytest.mark.parametrize(("size", "side"), [(16, 23), (64, 23), (100, 20)])
def test_center_crop_is_the_middle_square_and_of_large_images_most_of_it(size, side):
    x = (255 * pictures()).to(torch.uint8)
    theirs = [TF.resize(TF.center_crop(image, [side]), [size, size]) / 255 for image in x]
    assert_close(CenterCrop(size)(x), theirs)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_torchvisions_in_the_order_drawn(channels):
    x, jitter = pictures(channels, 5, 6), ColorJitter(0.8, 0.8, 0.8, 0.5)
    factors, _ = jitter.draw(N, common.generator(3))
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for order in itertools.permutations(range(4)):
        theirs = []
        for image, factor in zip(x, factors.tolist(), strict=True):
            for kind in order:
                image = adjust[kind](image, factor[kind])
            theirs.append(image)
        assert_close(jitter(x.clone(), factors, torch.tensor(order).expand(N, 4)), theirs)


@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale_is_torchvisions(channels):
    x = pictures(channels)
    assert_close(Grayscale()(x.clone()), [TF.rgb_to_grayscale(image, channels) for image in x])


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 23])
def test_blur_is_torchvisions(kernel_size):
    x, blur = pictures(height=24, width=24), GaussianBlur(kernel_size, (0.1, 2.0))
    (sigma,) = blur.draw(N, common.generator(4))
    theirs = [TF.gaussian_blur(x[i], kernel_size, [sigma[i].item()]) for i in range(N)]
    assert_close(blur(x.clone(), sigma), theirs)


def test_normalize_is_torchvisions_with_imagenets_statistics():
    x, mean, std = pictures(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert_close(common.normalize(x.clone()), TF.normalize(x, mean, std))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("operation", [ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur(5, (0.1, 2))])
def test_random_apply_leaves_the_other_images_untouched_bit_for_bit(operation, p):
    x = pictures(height=24, width=24)
    chosen, *parameters = RandomApply(operation, p).draw(N, common.generator(6))
    assert chosen.any() == (p > 0) and chosen.all() == (p == 1)
    ours = RandomApply(operation, p)(x.clone(), chosen, *parameters)
    assert torch.equal(ours[~chosen], x[~chosen])
    torch.testing.assert_close(ours[chosen], operation(x.clone(), *parameters)[chosen])


# --------------------------------------------------------------------------------------
# Distributions
# --------------------------------------------------------------------------------------


def assert_same_distribution(ours, theirs):
    """Two samples of which the distribution functions differ by less than chance allows."""
    ours, theirs = (torch.as_tensor(v, dtype=torch.float64).sort().values for v in (ours, theirs))
    points = torch.cat([ours, theirs])
    cdfs = [torch.searchsorted(v, points, right=True) / len(v) for v in (ours, theirs)]
    allowed = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))  # Kolmogorov-Smirnov at p = 0.001
    assert (cdfs[0] - cdfs[1]).abs().max() < allowed


@pytest.mark.parametrize(("height", "width", "least"), [(32, 32, 0.08), (40, 120, 0.3)])
def test_boxes_are_distributed_as_torchvisions(height, width, least):
    torch.manual_seed(7)
    image, transform = torch.zeros(1, height, width), v2.RandomResizedCrop(8, (least, 1.0))
    theirs = [transform.make_params([image]) for _ in range(3000)]
    crop = RandomResizedCrop(8, (least, 1.0))
    *place, flip = crop.draw(20000, common.generator(8))
    boxes = crop.boxes(*place, height, width)
    for name, values in zip(("top", "left", "height", "width"), boxes.T, strict=True):
        assert_same_distribution(values, [box[name] for box in theirs])
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_boxes_lie_in_the_image_even_for_the_largest_numbers():
    crop = RandomResizedCrop(8)
    *place, _ = crop.draw(1000, common.generator(9))
    largest = [torch.full_like(v, 1 - 2**-24) for v in place[2:]]  # of top and left
    top, left, height, width = crop.boxes(*place[:2], *largest, 4000, 3000).T
    assert set((top + height).tolist()) == {4000} and set((left + width).tolist()) == {3000}


def test_jitter_is_drawn_as_torchvisions_with_one_order_for_all():
    torch.manual_seed(10)
    transform, jitter = v2.ColorJitter(0.4, 1.5, 0.2, 0.1), ColorJitter(0.4, 1.5, 0.2, 0.1)
    theirs = [transform.make_params([torch.zeros(3, 2, 2)]) for _ in range(3000)]
    factors, _ = jitter.draw(20000, common.generator(11))
    names = ("brightness", "contrast", "saturation", "hue")
    for name, values in zip(names, factors.T, strict=True):
        assert_same_distribution(values, [drawn[f"{name}_factor"] for drawn in theirs])
    rng, orders = common.generator(12), []
    for _ in range(1200):
        order = jitter.draw(2, rng)[1]
        assert torch.equal(order[0], order[1])
        orders.append(order[0])
    counts = torch.stack(orders).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and (counts - 50).abs().max() < 5 * math.sqrt(50)


def test_blur_and_choice_are_uniform():
    chosen, sigma = RandomApply(GaussianBlur(3, (0.1, 2.0)), 0.3).draw(20000, common.generator(13))
    assert_same_distribution(sigma, torch.linspace(0.1, 2.0, 20000))
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.015)


# --------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------


def in_memory(n):
    """Random images of 32 pixels."""
    rng = common.generator(14)
    pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=rng)
    return common.Images(pixels, None, torch.zeros(n).long(), torch.device("cpu"), 0)


@pytest.mark.parametrize("script", [simclr, moco, supcon, swav])
def test_views_are_made_as_in_simclrs_appendix_a(script):
    names, scale = ["blur", "gray", "color"], (0.08, 1.0)
    if script is not swav:
        names, scale = [*names, "crop"], 0.08
    crop, color, gray, blur = script.augmentation(names, 224, scale, 1.0)
    assert crop == RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert color == RandomApply(ColorJitter(0.8, 0.8, 0.8, 0.2), 0.8)
    assert gray == RandomApply(Grayscale(), 0.2)
    assert blur == RandomApply(GaussianBlur(23, (0.1, 2.0)), 0.5)


def test_views_are_the_operations_on_what_a_step_draws():
    images, recipe = in_memory(200), simclr.augmentation(simclr.OPERATIONS, 32, 0.2, 1.0)
    index, (views,) = next(common.batches(images, [(2, recipe)], 200, 0, range(1)))
    order, (parameters,) = common.Steps(images, [(2, recipe)], 200, 0).draw(0)
    x = images.pixels[order.repeat(2)]
    for operation, values in zip(recipe, parameters, strict=True):
        x = operation(x, *values)
    assert torch.equal(index, order)
    torch.testing.assert_close(views.flatten(0, 1), common.normalize(x), atol=1e-5, rtol=0)


def test_views_depend_on_the_seed_the_epoch_and_the_step_alone():
    images, recipe = in_memory(24), simclr.augmentation(simclr.OPERATIONS, 32, 0.2, 1.0)
    images.pixels[:] = images.pixels[:1]  # so that only the operations make a difference

    def views(seed, start):
        """The views of the steps `start` to 5, of which an epoch has three."""
        steps = common.batches(images, [(2, recipe)], 8, seed, range(start, 6))
        return torch.stack([x for _, (x,) in steps])

    whole = views(0, 0)
    assert torch.equal(whole[4:], views(0, 4))
    pixels = torch.cat([whole, views(1, 0)]).flatten(0, 2).flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels)


class Calls(TorchDispatchMode):
    """Counts the operations that are launched, of which views of tensors are none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_the_views_of_a_step_take_at_most_200_operations():
    recipe = simclr.augmentation(["crop", "color", "gray"], 32, 0.2, 0.5)
    steps = common.batches(in_memory(1024), [(2, recipe)], 512, 0, range(2))
    next(steps)  # It also makes the constants.
    with Calls() as calls:
        next(steps)
    assert calls.count <= 200
