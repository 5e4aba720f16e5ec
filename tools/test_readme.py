"""What README.md says of the lesson, of `check` and of the course, is what happens.

The other commands and blocks of the README are run by test_pixelaux.py.
"""
import itertools
import math
import pathlib
import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import pixelaux
from tools import lesson

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text()


def block(words, kind="python"):
    """The only block of the README that has these words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    (found,) = [text for name, text in blocks if name == kind and words in text]
    return found


def digits(n, seed):
    """Coloured digits: uint8 (n, 28, 28, 3), levels 0..3, light on dark."""
    rng, font = np.random.default_rng(seed), ImageFont.load_default(24)
    images = np.empty((n, 28, 28, 3), np.uint8)
    for i in range(n):
        picture = Image.new("L", (28, 28))
        text = str(rng.integers(10))
        ImageDraw.Draw(picture).text(rng.integers(12, 17, 2), text, 255, font, anchor="mm")
        ground, ink = rng.integers(0, 2, 3), rng.integers(2, 4, 3)
        images[i] = np.where(np.array(picture)[:, :, None] > 127, ink, ground)
    return images


# --- The course ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The recipe, made small, on coloured digits: (its names when it has ended, its folder, the
    steps whose batches it took)."""
    folder, patch = tmp_path_factory.mktemp("course"), pytest.MonkeyPatch()
    steps, batch = [], pixelaux.Dataset.batch

    def noted(data, step, *arguments, **options):
        steps.append(step)
        return batch(data, step, *arguments, **options)

    with patch.context() as context:
        context.chdir(folder)
        context.syspath_prepend(folder)
        context.setattr(pixelaux, "MODELS", dict(pixelaux.MODELS))
        context.setattr(pixelaux.Dataset, "batch", noted)
        context.setenv("MPLBACKEND", "Agg")
        np.save("train.npy", digits(40, 0))
        np.save("test.npy", digits(7, 1))
        (folder / "view.py").write_text(block("class TwoColour"))
        recipe = block("train.npy")
        for words, fewer in ((".size, 64", ".size, 8"), ("range(20 *", "range(3 *"),
                             ("sample(50,", "sample(12,"), ("(0, 128,", "(0, 32,")):
            assert words in recipe
            recipe = recipe.replace(words, fewer)
        (folder / "recipe.py").write_text(recipe)
        names = runpy.run_path("recipe.py")
    return names, folder, steps


def test_the_recipe_of_the_course_trains_and_its_losses_are_nats_per_dimension(course):
    """One loss a batch, one test loss an epoch; the last test loss is that of each image by itself,
    from bits/dim; training brings both far down; an epoch has each image once."""
    names, folder, steps = course
    model, test = names["model"], np.load(folder / "test.npy")
    assert len(names["losses"]) == 15 and len(names["test_losses"]) == 1 + 3
    assert steps == [0, *range(15)]  # the first for the initialisation
    nats = 0.0
    with pixelaux.evaluating(model):
        for image in test:
            x = torch.from_numpy(image).permute(2, 0, 1)[None]
            nats += sum(float(factor) for factor in model.log_prob_factors(x))
    bits = pixelaux.bits_per_dim(nats / len(test), 28 * 28 * 3)
    assert math.isclose(names["test_losses"][-1], bits * math.log(2), rel_tol=1e-4)
    assert names["test_losses"][-1] < 0.6 * names["test_losses"][0]
    assert np.mean(names["losses"][-3:]) < 0.6 * names["losses"][0]
    order = [names["data"].batch(step, 8, seed=(0,)) for step in range(5)]
    assert len(np.unique(torch.cat(order).flatten(1), axis=0)) == 40


def test_the_grid_of_the_course_shows_views_over_images_of_these_views(course):
    """Ten side by side, each image's view, light or dark, above it; the last ones are looked up."""
    names, folder, _ = course
    views, images = names["views"], names["images"]
    light = images.long().sum(1, keepdim=True) >= 5  # the sum of three levels is at most 9
    assert torch.equal(views, light.to(torch.uint8)) and 0 < light.float().mean() < 1
    picture = np.array(Image.open(folder / "samples.png"))
    side = 28 * math.ceil(512 / 280)
    left, groups = picture.shape[1] - 10 * (side + 4), len(picture) // 2
    for row, x in enumerate((views * 255, images * 85)):
        for i in (0, 9, 11):
            top, start = i // 10 * groups + row * (side + 4) + 4, left + i % 10 * (side + 4)
            tile = picture[top : top + side, start : start + side]
            expected = x[i].permute(1, 2, 0).expand(28, 28, 3).numpy()
            assert np.array_equal(tile[::2, ::2], expected), (row, i)
    pixelaux.save_picture(folder / "like.png", names["rows"], ["view", "image"], columns=10)
    assert np.array_equal(np.array(Image.open(folder / "like.png")), picture)  # and the labels
    assert Image.open(folder / "curves.png").width > 300


@pytest.mark.parametrize("right", [False, True])
def test_check_says_of_the_mask_what_the_readme_says(tmp_path, capsys, monkeypatch, right):
    """And that it is causal once the first layer leaves its centre out, as the comment says: still
    blind (control)."""
    monkeypatch.chdir(tmp_path)
    code, wrong = block("class Masked"), "2, 3:]"
    assert wrong in code
    if right:
        code = code.replace(wrong, "2, 3 - (self.in_channels == 3) :]")
    pathlib.Path("mask.py").write_text(code)
    assert pixelaux.main(["check", "mask.py:net", "--out", "check.png"]) == 1
    said = capsys.readouterr().out.splitlines()
    told = block("it sees itself", "").splitlines()
    assert len(told) == 4 and (set(told) <= set(said)) != right
    assert any(re.match("causal +FAILS", line) for line in said) != right
    assert any("blind spot" in line for line in said)
    assert Image.open("check.png").width > 300


def test_what_the_readme_names_is_there_and_every_command_is_named():
    for command in (*pixelaux.TOOLS, "train", "eval", "sample"):
        assert re.search(rf"`{command}\b", README), command
    for name in re.findall(r"`(\w+)`", README.split("| the paper |")[1].split("\n\n")[0]):
        assert hasattr(pixelaux, name), name
    for path in re.findall(r"\]\((?!https?:)(\w[^)#]*)", README):
        assert (HERE / path).exists(), path
    assert len(README.splitlines()) <= 250


# --- The picture of the lesson -------------------------------------------------------------------


def test_the_masks_are_what_networks_see():
    """By gradients of convolutions with these kernels: what one stream, and both, see of the pixels
    that come earlier. One is blind to some, both to none."""
    masks = dict(lesson.masks())
    earlier = {(y, x) for y, x in itertools.product(range(-4, 1), range(-4, 5)) if (y, x) < (0, 0)}
    first, others = masks["h: first layers"], masks["h: first layers"] | {(0, 0)}
    assert masks["one stream: blind"] == touched([first] + 3 * [others])
    assert earlier - masks["one stream: blind"] == {
        (-1, 2), (-1, 3), (-1, 4), (-2, 3), (-2, 4), (-3, 4)}
    v = touched([masks["v: first layer"]] + 3 * [masks["v: others"]])
    both = masks["v and h: blind nowhere"]
    assert both == v | touched([first] + 3 * [masks["h: others"]])
    assert earlier <= both and all(offset < (0, 0) for offset in both)


def touched(kernels):
    """Offsets of the pixels on which the middle output of stacked masked convolutions depends."""
    size = 2 * 3 * len(kernels) + 1
    x = torch.zeros(1, 1, size, size, requires_grad=True)
    y = x
    for offsets in kernels:
        weight = torch.zeros(1, 1, 7, 7)
        for dy, dx in offsets:
            weight[0, 0, 3 + dy, 3 + dx] = 1
        y = torch.nn.functional.conv2d(y, weight, padding=3)
    y[0, 0, size // 2, size // 2].backward()
    return {(int(r) - size // 2, int(c) - size // 2) for r, c in x.grad[0, 0].nonzero()}


def test_the_bars_are_sums_over_what_a_view_allows():
    """In numpy from the logistic function: the bar of each view; and cut to its intervals, one
    bar, the only view that the block has, higher than that of the bound."""
    numbers, bound, cut = lesson.terms()

    def mass(mean, lo, hi):
        edges = (np.array([lo, hi]) + [-0.5, 0.5] - mean) / 5
        sigma = 1 / (1 + np.exp(-edges))
        return (1 if hi == 255 else sigma[1]) - (0 if lo == 0 else sigma[0])

    left = ((0, 41), (0, 21), (0, 6), (1, 4))  # of the README
    for number, paper, exact in zip(numbers.tolist(), bound.tolist(), cut.tolist()):
        expected = mass(11, number, number) * math.prod(mass(number, v, v) for v in lesson.BLOCK)
        assert math.isclose(paper, expected, rel_tol=1e-3)
        if number == 10:
            expected /= math.prod(mass(number, lo, hi) for lo, hi in left)
            assert math.isclose(exact, expected, rel_tol=1e-3) and exact > paper
        else:
            assert exact == 0


def test_the_distributions_are_of_a_mixture_whose_component_is_common_to_the_channels():
    """In numpy from the logistic function: masses of bins, of which the first and the last are
    open; each channel given those before, by Bayes; and cut to an interval, scaled to sum to 1."""
    top = lesson.LEVELS - 1
    weights = np.array([weight for weight, _, _ in lesson.COMPONENTS])

    def bins(channel):  # (components, levels)
        edges = np.concatenate([[-np.inf], np.arange(top) + 0.5, [np.inf]])
        rows = [1 / (1 + np.exp(-(edges - means[channel]) / scale))
                for _, means, scale in lesson.COMPONENTS]
        return np.diff(rows, axis=1)

    dark, light = lesson.RED
    for before in ((), (dark,), (light,), (dark, lesson.GREEN)):
        joint = weights * math.prod(bins(c)[:, level] for c, level in enumerate(before))
        expected = joint @ bins(len(before)) / joint.sum()
        np.testing.assert_allclose(lesson.masses(before), expected, rtol=1e-3, atol=1e-6)
    lo, hi = lesson.LEFT
    expected[:lo], expected[hi + 1 :] = 0, 0  # of blue
    np.testing.assert_allclose(
        lesson.masses(before, lesson.LEFT), expected / expected.sum(), rtol=1e-3, atol=1e-6)
    # Controls: the last bin has more than its neighbour, and red tells green's component.
    assert lesson.masses(())[top] > lesson.masses(())[top - 1]
    assert lesson.masses((dark,)).argmax() != lesson.masses((light,)).argmax()


def test_the_views_are_of_one_image_and_the_picture_is_written(tmp_path):
    """Means of 2x2 blocks, and of 4x4; gray has one shade a pixel."""
    (_, x), (_, half), (_, quarter), (_, gray) = lesson.views()
    for small, cell in ((half, 2), (quarter, 4)):
        means = x.reshape(32 // cell, cell, 32 // cell, cell, 3).mean((1, 3))
        assert small.shape == means.shape and abs(small - means).max() <= 1
    assert np.ptp(gray, axis=2).max() == 0 and set(np.unique(gray)) <= set(range(0, 256, 17))
    lesson.draw(tmp_path / "lesson.png")
    picture = np.array(Image.open(tmp_path / "lesson.png").convert("RGB"))
    assert picture.shape == (1630, 1800, 3)
    for colour in (lesson.SEEN, lesson.NOW):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == rgb).all(2).sum() > 1000
