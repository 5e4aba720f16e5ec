"""Properties of tools/drawing.py and tools/given.py: one's own pictures, of any size."""
import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import pixelaux
from pixelaux import Factor, Gray, Half, build, to_array, to_tensor
from test_pixelaux import (
    SMALL_RUN, TINY, all_images, chi_square, command, enumerable, fits, halved, places,
    random_batch, random_images, said, same, saved, small)
from tools import drawing
from tools import given as tools_given


def how(seed=0, mode="random", shift=0.0, tight=True, naive=False, candidates=8):
    return drawing.How(seed, mode, shift, tight, naive, candidates, lambda pixels: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs of all models, at 16x16, and a folder for pictures."""
    made = {}
    for name in pixelaux.MODELS:
        model = build(name, 16, **{**SMALL_RUN, "halvings": 1, "tight": True})
        model.initialise(random_batch(16, (3, 16, 16)))
        made[name] = saved(model, tmp_path_factory.mktemp("runs") / name)
    return made


def save_image(path, size, seed=0):
    image = random_images(1, size, seed)[0]
    Image.fromarray(image).save(path)
    return image


# --- Drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [
    ("pyramid", (8, 12)), ("grayscale", (8, 4)), ("grayscale-pyramid", (8, 8))])
def test_answers_at_another_size_are_the_naive_samplers(name, size):
    """From each view, of weights made at another size: given images stay, psi of what is drawn is
    what it was drawn from; answer a to image i has the noise of sample a n + i."""
    model = small(name, (16, 16), halvings=1).resized(size)
    views = model.views_of(random_batch(2, (3, *size)))
    for k, view in enumerate(views[:-1]):
        with pixelaux.evaluating(model):
            made = drawing.answer(model, view, k, 2, how(seed=4))
            slow = drawing.answer(model, view, k, 2, how(seed=4, naive=True))
        assert same(made, slow) and all(fits(model, made))
        assert same(made[: k + 1], [x.repeat(2, 1, 1, 1) for x in views[: k + 1]])
        expected = model.sample(4, 4, given=view.repeat(2, 1, 1, 1), given_view=k, tight=True)
        assert same(made, expected)
        assert len({x.numpy().tobytes() for x in made[-1]}) == 4  # control: none is another one


def test_a_bar_ends_at_its_total_and_not_beyond(runs, tmp_path, monkeypatch):
    """Also where an image is drawn in bands, whose shares of pixels are no whole numbers."""
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n, self.seen = total, 0, []
            bars.append(self)

        def update(self, pixels):
            self.n += pixels
            self.seen.append(self.n)

        def unpause(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tools_given, "progress_bar", Bar)
    save_image(tmp_path / "a.png", (40, 8))
    for bands in (False, True):
        if bands:
            monkeypatch.setattr(Factor, "at_once", property(lambda factor: 1))
            monkeypatch.setattr(drawing, "MARGIN", 1)
        line = f"sample {runs['pyramid']} --given {tmp_path / 'a.png'} --out {tmp_path / 'x'}"
        assert command(line) == 0
        bar = bars[-1]
        assert bar.n == pytest.approx(bar.total, rel=1e-9) and max(bar.seen) <= bar.total
        assert bar.total > 0 and len(bar.seen) > 1


@pytest.mark.parametrize("rows", [0, 50])
def test_bands_are_the_image_drawn_whole(monkeypatch, rows):
    """Where the network looks no further than neighbouring bands share. Control: where they share
    too few rows, they are not."""
    model = small("pyramid", (112, 8), halvings=1, layout_light=((0, 1),), look_right=False,
                  layout_embed=((1, 1), (0, 1)))
    x = random_batch(2, (3, 112, 8))
    numbers = torch.arange(2)

    def drawn():
        with pixelaux.evaluating(model):
            return drawing.draw_view(model, 1, Half()(x), numbers, how(tight=False), x, rows)

    whole = drawn()
    monkeypatch.setattr(Factor, "at_once", property(lambda factor: 1))
    for margin, alike in ((20, True), (2, False)):
        monkeypatch.setattr(drawing, "MARGIN", margin)
        _, band, shared = drawing.bands_of(model, 1)
        assert band == 3 * shared < 112 and shared == margin
        assert torch.equal(drawn(), whole) == alike, margin
    assert torch.equal(whole[:, :, :rows], x[:, :, :rows])
    assert not torch.equal(whole[:, :, rows:], x[:, :, rows:])


def test_completions_follow_p_of_the_rest_given_the_first_rows():
    """All images with these rows enumerated, chi^2. Control: numbered one off they are far away."""
    model, everything = enumerable("pixelcnn")
    with torch.no_grad():
        p = model.log_prob(everything).exp()
    x = everything[2741]
    alike = (everything[:, :, :1] == x[:, :1]).flatten(1).all(1)
    assert 1 < int(alike.sum()) < len(everything)
    n = 3000
    with pixelaux.evaluating(model):
        (made,), told = drawing.complete(model, x.repeat(n, 1, 1, 1), 1, 1, how())
    assert torch.equal(made[:, :, :1], x[None, :, :1].expand(n, -1, -1, -1))
    assert told.startswith("exact: ")
    counts = counts_of(made[:, :, 1:], 2)
    p = p[alike] / p[alike].sum()
    assert abs(chi_square(counts, p.numpy())) < 5
    assert chi_square(np.roll(counts, 7), p.numpy()) > 50


def counts_of(images, levels):
    """How often each image is among them, in the order of `all_images`."""
    digits = levels ** np.arange(images[0].numel())[::-1]
    numbers = images.flatten(1).numpy().astype(np.int64) @ digits
    return np.bincount(numbers, minlength=levels ** images[0].numel())


CHAINS = {  # size, levels, known rows: what is below can be enumerated
    "pyramid": ((4, 2), 2, 2, dict(halvings=1)), "grayscale": ((2, 1), 16, 1, {})}


def chain(name):
    """A small chain, an image, and all images that have its first rows."""
    size, levels, rows, more = CHAINS[name]
    fields = {**TINY, "layout": ((0, 1),), **more}
    model = small(name, size, levels=levels, wild=1.2, seed=3, **fields)
    x = random_batch(1, model.views[-1].shape, levels, seed=5)
    below = all_images((3, size[0] - rows, size[1]), levels)
    return model, x, rows, torch.cat([x[:, :, :rows].expand(len(below), -1, -1, -1), below], 2)


@pytest.mark.parametrize("name", CHAINS)
def test_completions_of_a_chain_come_close_with_many_candidates(name):
    """To p(X | its first rows), enumerated; with one candidate, without a choice, they stay far
    away (control)."""
    model, x, rows, everything = chain(name)
    with torch.no_grad():
        p = model.log_prob(everything, tight=True).softmax(0).numpy()
    far = {}
    for candidates in (1, 24):
        how_many = how(seed=1, candidates=candidates)
        with pixelaux.evaluating(model):
            views, told = drawing.complete(model, x.repeat(800, 1, 1, 1), rows, 1, how_many)
        for view, known in zip(views, model.views_of(x), strict=True):
            upper = rows * view.shape[2] // x.shape[2]
            assert (view[:, :, :upper] == known[:, :, :upper]).all()
        assert all(fits(model, views)) and f"one of {candidates} candidates" in told
        far[candidates] = chi_square(counts_of(views[-1][:, :, rows:], model.config.levels), p)
    assert abs(far[24]) < 5 < 10 < far[1], far


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_weights_are_what_x_hat_says_of_the_first_rows(name, tight):
    """log of the sum of p(X | X^) over all X that have these rows. Control: they differ."""
    model, x, rows, everything = chain(name)
    factor, psi = model.factors[-1], model.views[-1].psi
    candidates = psi(everything[torch.arange(0, 4096, 700)])
    with torch.no_grad():
        made = drawing.log_weights(factor, x, candidates, rows, how(tight=tight))
        for x_hat, nats in zip(candidates, made):
            copies = x_hat.expand(len(everything), -1, -1, -1)
            possible = (psi(everything) == x_hat).flatten(1).all(1) | (not tight)
            of_each = factor(everything[possible], copies[possible], tight)
            assert float(nats) == pytest.approx(float(of_each.logsumexp(0)), abs=1e-8)
        assert made.std() > 0.05
        if not tight:  # of two images each has its own candidates
            pair, four = torch.cat([x, everything[-1:].flip(2)]), candidates[:4]
            made = drawing.log_weights(factor, pair, four, rows, how(tight=tight))
            apart = [drawing.log_weights(factor, pair[i : i + 1], four[2 * i : 2 * i + 2],
                                         rows, how(tight=tight)) for i in (0, 1)]
            assert torch.allclose(made, torch.cat(apart)) and made[0] != made[2]


def test_candidates_are_chosen_by_their_weights():
    """Frequencies, 3 sigma; the effective number is M of equal ones and 1 of a single one."""
    weights = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    both = torch.stack([weights.log() + 700, torch.zeros(4, dtype=torch.float64)])
    place, effective = drawing.choose(both, uniform.expand(2, -1).contiguous())
    counts = torch.bincount(place, minlength=8)
    assert (counts - torch.tensor([500, 200, 0, 300, 250, 250, 250, 250])).abs().max() <= 1
    assert effective.tolist() == pytest.approx([1 / 0.38, 4])
    single = torch.tensor([[0.0, -900.0, -900.0]])
    assert drawing.choose(single, torch.ones(1, 2))[1].tolist() == [1]


@pytest.mark.parametrize("name", pixelaux.MODELS)
def test_what_is_below_the_known_rows_does_not_leak(name):
    """Two images that differ there have the same completions, of any tightness, at any size.
    Control: images that differ above have not."""
    model = small(name, (8, 8), **(dict(halvings=1) if "pyramid" in name else {}))
    x, other = random_batch(1, (3, 8, 8)), random_batch(1, (3, 8, 8), seed=1)
    mixed = torch.cat([x[:, :, :4], other[:, :, 4:]], 2)
    for tight in (True, False):
        with pixelaux.evaluating(model):
            made, again, others = (drawing.complete(model, image, 4, 2, how(tight=tight))[0]
                                   for image in (x, mixed, other))
        assert same(made, again) and not torch.equal(made[-1][:, :, 4:], others[-1][:, :, 4:])
        assert len(made) == len(model.views) and len(made[-1]) == 2
        assert not torch.equal(made[-1][0], made[-1][1])


@pytest.mark.parametrize("name", pixelaux.MODELS)
def test_as_many_pixels_are_shown_as_were_counted(monkeypatch, name):
    """From every view, and below every row that may be kept; in bands, too. Control: with another
    number of candidates they are others."""
    more = dict(halvings=1) if "pyramid" in name else {}
    model = small(name, (16, 8), layout=((0, 1),), layout_light=((0, 1),), layout_cond=((0, 1),),
                  layout_embed=((1, 1), (0, 1)), **more)
    x, shown = random_batch(2, (3, 16, 8)), []
    for banded in (False, True):
        if banded:
            monkeypatch.setattr(Factor, "at_once", property(lambda factor: 1))
            monkeypatch.setattr(drawing, "MARGIN", 1)
            assert drawing.bands_of(model, len(model.views) - 1)[1] < 16
        cases = [(k, 0) for k in range(len(model.views) - 1)] + [(-1, 4), (-1, 12)]
        for k, rows in cases:
            ways = drawing.How(0, "random", 0.0, True, False, 3, shown.append)
            shown.clear()
            with pixelaux.evaluating(model):
                if rows:
                    _, told = drawing.complete(model, x, rows, 2, ways)
                    exact = name == "pixelcnn" and not banded
                    assert told.startswith("exact: " if exact else "approximate: ")
                    assert ("bands of 3 rows" in told) == (name == "pixelcnn" and banded)
                else:
                    drawing.answer(model, model.views_of(x)[k], k, 2, ways)
            pixels = drawing.pixels_of(model, k, rows, 3)
            assert sum(shown) == pytest.approx(4 * sum(pixels)) and len(pixels) == len(model.views)
            others = drawing.pixels_of(model, k, rows, 4)
            assert (others != pixels) == (rows > 0 and len(model.views) > 1)


def test_the_time_is_that_of_passes_over_what_is_drawn(monkeypatch):
    """As many as were drawn, of each factor; naively a pass over the whole image for each pixel.
    A pass is timed for each factor of every model, at sizes that it takes (control: it is)."""
    model = small("pyramid", (8, 8), halvings=2)
    times = dict(zip(model.factors, (1.0, 10.0, 100.0)))
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "pass_seconds", times.get)
        assert drawing.seconds_for(model, [0, 3, 2]) == 230 * drawing.PASSES
        assert drawing.seconds_for(model, [5, 0, 2], naive=True) == 5 * 4 + 200 * 64
    for name in pixelaux.MODELS:
        for factor in build(name, 32).factors:
            with torch.no_grad():
                assert 0 < drawing.pass_seconds(factor, 8) < math.inf


# --- The command ---------------------------------------------------------------------------------


@settings(max_examples=12)
@given(h=st.integers(1, 21), w=st.integers(1, 21), seed=st.integers(0, 99), shrink=st.booleans())
def test_a_picture_of_any_size_is_doubled_or_reduced_first(runs, tmp_path_factory, h, w, seed,
                                                           shrink):
    """The view of what is made is the picture itself; or its own halves, the last ones with edges
    repeated. Control: two answers differ."""
    place = tmp_path_factory.mktemp("p")
    image = save_image(place / "x.png", (h, w), seed)
    flags = "--reduce" if shrink else ""
    line = f"sample {runs['pyramid']} --given {place}/x.png --answers 2 {flags} --out {place}/o"
    assert command(line) == 0
    arrays = np.load(place / "o.npz")
    if shrink:
        size, view = (h, w), halved(np.pad(image, [(0, h % 2), (0, w % 2), (0, 0)], "edge")[None])
        assert np.array_equal(arrays["original"], image[None])
    else:
        size, view = (2 * h, 2 * w), image[None]
        assert "original" not in arrays
    made = arrays["{}x{}".format(*size)]
    assert made.shape == (2, *size, 3)
    given_view = arrays["{}x{}".format(*view.shape[1:3])]
    assert np.array_equal(given_view, view.repeat(2, 0))
    assert np.array_equal(halved(made[:, : h - h % 2, : w - w % 2]),
                          given_view[:, : (h - h % 2) // 2, : (w - w % 2) // 2]) or not shrink
    assert shrink or np.array_equal(halved(made), given_view)
    assert not np.array_equal(*made)


@pytest.mark.parametrize("name", ["grayscale", "grayscale-pyramid"])
def test_a_photo_is_colourised(runs, tmp_path, name, capsys):
    """Its 4-bit gray stays; its colours are shown and not used. What is padded is told, once.
    Control: a fitting size is not padded."""
    image = save_image(tmp_path / "x.png", (18, 13))
    gray = Gray()(to_tensor(image[None]))
    assert command(f"sample {runs[name]} --given {tmp_path}/x.png --out {tmp_path}/o") == 0
    out = capsys.readouterr().out
    assert out.count("18x13 (height x width) is padded to ") == 1
    arrays = np.load(tmp_path / "o.npz")
    assert np.array_equal(arrays["original"][0], image)
    assert np.array_equal(arrays["gray 18x13"], to_array(gray))
    assert "original, 4-bit gray 18x13 given, answer\n" in out
    assert torch.equal(Gray()(to_tensor(arrays["18x13"])), gray)
    assert not np.array_equal(arrays["18x13"][0], image)
    for size, run in (((16, 24), name), ((10, 14), "pyramid")):  # X is 20x28, a multiple of 4
        save_image(tmp_path / "y.png", size)
        assert command(f"sample {runs[run]} --given {tmp_path}/y.png --out {tmp_path}/o") == 0
        assert "padded" not in capsys.readouterr().out


def test_a_small_gray_photo_is_doubled_and_colourised(runs, tmp_path):
    """--view tells that it is the coarsest view of a chain of two kinds."""
    image = save_image(tmp_path / "x.png", (16, 8))
    run = runs["grayscale-pyramid"]
    assert command(f"sample {run} --given {tmp_path}/x.png --view 0 --out {tmp_path}/o") == 0
    arrays = np.load(tmp_path / "o.npz")
    gray = Gray()(to_tensor(image[None]))
    assert arrays.files == ["gray 16x8", "gray 32x16", "32x16"]
    assert np.array_equal(arrays["gray 16x8"], to_array(gray))
    fine = Gray()(to_tensor(arrays["32x16"]))
    assert np.array_equal(arrays["gray 32x16"], to_array(fine)) and torch.equal(Half()(fine), gray)


@pytest.mark.parametrize("name", pixelaux.MODELS)
def test_rows_of_a_picture_are_kept_and_the_rest_is_drawn(runs, tmp_path, name, capsys):
    """Of every size; of X and of its views. What is chosen among candidates is told."""
    image = save_image(tmp_path / "x.png", (19, 21))
    line = f"sample {runs[name]} --given {tmp_path}/x.png --rows 10 --answers 2 --out {tmp_path}/o"
    assert command(line) == 0
    out, arrays = capsys.readouterr().out, np.load(tmp_path / "o.npz")
    made = arrays["19x21"]
    assert made.shape == (2, 19, 21, 3) and np.array_equal(arrays["original"][0], image)
    assert (made[:, :10] == image[:10]).all() and not (made[:, 10:] == image[10:]).all()
    assert not np.array_equal(made[0, 10:], made[1, 10:])
    if "pyramid" == name:
        assert np.array_equal(arrays["10x11"][0, :5, :10], halved(image[None, :10, :20])[0])
    views = arrays.files[:-2]
    lines = [line for line in out.splitlines() if line.startswith(("exact: ", "approximate: "))]
    assert len(lines) == 1 and lines[0].startswith("approximate: " if views else "exact: ")
    assert "the 10 rows that are kept" in lines[0]
    assert ("one of 8 candidates" in lines[0]) == bool(views)
    numbers = re.findall(r"[0-9]+\.[0-9]", lines[0])
    assert len(numbers) == len(views) and all(1 <= float(number) <= 8 for number in numbers)


def test_rows_of_test_images_are_kept(runs, tmp_path):
    test = pixelaux.load_data("shapes")[0].test[:3]
    line = f"sample {runs['grayscale']} --given test --n 3 --rows 5 --answers 2 --out {tmp_path}/o"
    assert command(line) == 0
    arrays, gray = np.load(tmp_path / "o.npz"), to_array(Gray()(to_tensor(test)))
    made = arrays["16x16"]
    assert np.array_equal(made[:, :5], np.concatenate([test, test])[:, :5])
    assert np.array_equal(arrays["gray 16x16"][:, :5], np.concatenate([gray, gray])[:, :5])
    assert not (made[:, 5:] == np.concatenate([test, test])[:, 5:]).all((1, 2, 3)).any()


def test_each_image_of_a_folder_has_the_answers_that_it_has_alone(runs, tmp_path, capsys):
    """What cannot be read is told and skipped, what is hidden or no image is left alone."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for i, size in enumerate([(8, 12), (9, 5), (16, 16)]):
        save_image(folder / f"{'bac'[i]}.png", size, seed=i)
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("x")
    save_image(folder / ".hidden.png", (8, 8))
    run = runs["pyramid"]
    assert command(f"sample {run} --given {folder} --answers 2 --out {tmp_path}/all") == 0
    assert len(said(capsys)) == 1
    for stem in "abc":
        assert command(f"sample {run} --given {folder}/{stem}.png --answers 2 "
                       f"--out {tmp_path}/one") == 0
        (path,) = tmp_path.glob(f"all-{stem}-*.npz")
        together, single = np.load(path), np.load(tmp_path / "one.npz")
        assert together.files == single.files
        assert all(np.array_equal(together[name], single[name]) for name in single.files)
    run = shutil.copytree(run, tmp_path / "run")
    assert command(f"sample {run} --given {folder} --n 2") == 0
    names = [path.name[:-len("-123456.png")] for path in sorted(run.glob("sample*.png"))]
    assert names == ["sample-random-0-n2-given-a", "sample-random-0-n2-given-b"]
    assert len(list(tmp_path.glob("all-*"))) == 6


def test_no_result_takes_the_place_of_another_images(runs, tmp_path):
    """Whatever images are called: in other folders, with another ending, as an answer to another
    one, or `test`; .npy files, too. Control: the same image again has the results that it had."""
    run, a, b = shutil.copytree(runs["pyramid"], tmp_path / "run"), tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    images = [a / "x.png", b / "x.png", a / "x.bmp", a / "x-answer-1.png", a / "test.png"]
    for i, path in enumerate(images):
        save_image(path, (4, 4), seed=i)
    for i, folder in enumerate((a, b)):
        np.save(folder / "x.npy", random_images(1, (8, 8), seed=i))
    Image.new("RGB", (8, 4)).save(a / "black.png")
    Image.new("RGB", (4, 8)).save(b / "black.png")
    pictures = [*images, a / "x.npy", b / "x.npy", a / "black.png", b / "black.png"]
    for path in [*pictures, "test"]:
        several = str(path).endswith((".npy", "test"))
        assert command(f"sample {run} --given {path} {'--n 1' if several else ''}") == 0
    made = {path: path.read_bytes() for path in run.glob("sample-*")}
    assert len(made) == 2 * (len(pictures) + 1)
    assert command(f"sample {run} --given {a}/x.png") == 0
    assert {path: path.read_bytes() for path in run.glob("sample-*")} == made
    assert command(f"sample {run} --given {a} --out {tmp_path}/o") == 0
    assert len(list(tmp_path.glob("o-*.npz"))) == len(list(tmp_path.glob("o-*.png"))) == 5


@pytest.mark.parametrize("flags", ["--reduce", ""])
@pytest.mark.parametrize("size, times", [((12, 8), 22), ((6, 66), 4), ((2, 4), 64)])
def test_pictures_show_what_is_given_and_large_answers_have_files(
        runs, tmp_path, size, times, flags):
    """Original if there is one, given, answers: side by side, or wide ones one below the other, of
    one size, with labels, pixels repeated. A small answer has no file of its own."""
    whole = bool(flags)
    times = times if whole else max(1, math.ceil(times / 2))  # X is twice as large
    image, run, wide = save_image(tmp_path / "x.png", size), runs["pyramid"], size[1] > 2 * size[0]
    line = f"sample {run} --given {tmp_path}/x.png {flags} --answers 2 --out {tmp_path}/o"
    assert command(line) == 0
    arrays, picture = np.load(f"{tmp_path}/o.npz"), np.asarray(Image.open(f"{tmp_path}/o.png"))
    scale = 1 if whole else 2
    made = arrays["{}x{}".format(scale * size[0], scale * size[1])]
    tiles = [image.repeat(times, 0).repeat(times, 1)] if whole else []
    view = arrays["{}x{}".format(size[0] * scale // 2, size[1] * scale // 2)][0]
    assert whole or np.array_equal(view, image)
    tiles += [view.repeat(2 * times, 0).repeat(2 * times, 1),
              *made.repeat(times, 1).repeat(times, 2)]
    found = [places(picture, tile) for tile in tiles]
    assert [len(where) for where in found] == [1] * len(tiles)
    rows, columns = zip(*(where[0] for where in found))
    along, across = (rows, columns) if wide else (columns, rows)
    assert len(set(across)) == 1 and list(along) == sorted(set(along))
    tall, broad = tiles[0].shape[:2]
    assert all(b - a >= (tall if wide else broad) for a, b in itertools.pairwise(along))
    for top, left in zip(rows, columns):  # something is written above each, and not cut off
        label = picture[max(0, top - 14) : top, left:]
        assert label.min() < 100 < 255 == label[:, -1].min()
    for a in (1, 2):
        path = tmp_path / f"o-answer-{a}.png"
        assert path.exists() == (max(made.shape[1:3]) > 64)
        assert not path.exists() or np.array_equal(Image.open(path), made[a - 1])


@settings(max_examples=20)
@given(h=st.integers(1, 700), w=st.integers(1, 700), n=st.integers(2, 9))
def test_labels_grow_with_the_picture_and_stay_apart(tmp_path_factory, h, w, n):
    """Of 2% of its width, or as large as an image is wide; never wider, unless they are 14 px;
    nothing is cut off."""
    path, found, draw = tmp_path_factory.mktemp("p") / "x.png", [], ImageDraw.ImageDraw.text

    def text(pen, xy, words, fill=None, font=None, anchor=None, **more):
        found.append((font.size, pen.textbbox(xy, words, font, anchor)))
        draw(pen, xy, words, fill, font, anchor, **more)

    labels = ["4-bit gray 128x128 given"] + [f"answer {i + 1}" for i in range(n - 1)]
    kinds = {label: np.zeros((h, w, 3), np.uint8) for label in labels}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", text)
        tools_given.save_columns(path, kinds)
    picture = Image.open(path)
    black = np.asarray(picture.convert("L"))
    wide, widest = w * math.ceil(256 / max(h, w)), max(x1 - x0 for _, (x0, _, x1, _) in found)
    for size, (x0, y0, x1, y1) in found:
        assert 0 <= x0 and x1 <= picture.width and 0 <= y0 and y1 <= picture.height
        assert size == 14 or (size > 14 and widest <= 0.95 * wide)
        assert size >= 0.02 * picture.width or widest > 0.7 * wide
        assert (black[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] < 128).mean() < 0.6
    for (_, a), (_, b) in itertools.combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("seconds, expected", [
    (19, None), (21, "about 21 s"), (99, "about 99 s"), (130, "about 2 minutes")])
def test_what_takes_long_says_so_before_it_begins(
        runs, tmp_path, monkeypatch, capsys, seconds, expected):
    monkeypatch.setattr(drawing, "seconds_for", lambda *args: seconds)
    save_image(tmp_path / "x.png", (8, 8))
    line = f"sample {runs['pyramid']} --given {tmp_path}/x.png --answers 3 --out {tmp_path}/o"
    assert command(line) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(f": 768 pixels are drawn, in {expected}") == bool(expected)
    assert ("about" in first) == bool(expected)


BAD = [
    ("--given x.png --n 2", "pyramid", "--n: one image"),
    ("--given x.png --view 1", "pyramid", "--view 1: expected"),
    ("--given x.png --view 0", "pixelcnn", "--view 0: expected"),
    ("--given x.png", "pixelcnn", "--rows R completes X"),
    ("--given x.png --rows 3", "pyramid", "--rows 3: expected a multiple of 2"),
    ("--given x.png --rows 8", "grayscale", "--rows 8: expected a multiple of 1, below the height"),
    ("--given test --rows 16", "pyramid", "--rows 16: expected"),
    ("--given x.png --rows 2 --reduce", "pyramid", "--rows: it is X"),
    ("--given x.png --rows 2 --view 0", "pyramid", "--rows: it is X"),
    ("--given x.npy --rows 2", "pyramid", "(C, H, W) is (3, 8, 8), expected X's"),
    ("--given x.png --rows 0", "pyramid", "--rows"),
    ("--given x.png --answers 0", "pyramid", "--answers"),
    ("--rows 2", "pyramid", "--rows: goes with --given"),
    ("--candidates 2", "pyramid", "--candidates: goes with --given"),
    ("--given x.png --candidates 2", "pyramid", "--candidates: goes with --rows"),
    ("--given x.png --rows 2 --candidates 2", "pixelcnn", "--candidates: goes with --rows"),
    ("--given x.png --rows 2 --candidates 0", "pyramid", "--candidates"),
    ("--reduce", "pyramid", "--reduce: goes with --given"),
    ("--answers 2", "pyramid", "--answers: goes with --given"),
    ("--given empty", "pyramid", "empty: no image files"),
    ("--given gone", "pyramid", "gone: No such file"),
]


@pytest.mark.parametrize("flags, name, expected", BAD)
def test_bad_input_is_one_line(runs, tmp_path, monkeypatch, capsys, flags, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    image = save_image(tmp_path / "x.png", (8, 8))
    np.save(tmp_path / "x.npy", image[None])
    before = set(tmp_path.iterdir())
    assert command(f"sample {runs[name]} {flags} --out {tmp_path}/o") == 2
    out, error = capsys.readouterr()
    assert len(error.splitlines()) == 1 and expected in error and "Traceback" not in error
    assert set(tmp_path.iterdir()) == before and out == ""
