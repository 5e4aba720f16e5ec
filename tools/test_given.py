"""Properties of tools/drawing.py and tools/given.py: one's own pictures, of any size."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pixelaux
from pixelaux import Factor, Gray, Half, build, to_array, to_tensor
from test_pixelaux import (
    SMALL_RUN, TINY, all_images, chi_square, command, enumerable, fits, halved, places,
    random_batch, random_images, said, same, saved, small)
from tools import drawing


def how(seed=0, mode="random", shift=0.0, tight=True, naive=False):
    return drawing.How(seed, mode, shift, tight, naive, lambda pixels: None)


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


@pytest.mark.parametrize("rows", [0, 50])
def test_bands_are_the_image_drawn_whole(monkeypatch, rows):
    """Where the network looks no further than neighbouring bands share. Control: where they share
    too few rows, they are not."""
    model = small("pyramid", (112, 8), halvings=1, layout_light=((0, 1),), look_right=False,
                  layout_embed=((0, 1), (-1, 1)))
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
    assert torch.equal(made[:, :, :1], x[None, :, :1].expand(n, -1, -1, -1)) and not told
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
def test_completions_of_a_chain_come_close_with_many_candidates(monkeypatch, name):
    """To p(X | its first rows), enumerated; with one candidate, without a choice, they stay far
    away (control)."""
    model, x, rows, everything = chain(name)
    with torch.no_grad():
        p = model.log_prob(everything, tight=True).softmax(0).numpy()
    far = {}
    for candidates in (1, 24):
        monkeypatch.setattr(drawing, "CANDIDATES", candidates)
        with pixelaux.evaluating(model):
            views, told = drawing.complete(model, x.repeat(800, 1, 1, 1), rows, 1, how(seed=1))
        for view, known in zip(views, model.views_of(x), strict=True):
            upper = rows * view.shape[2] // x.shape[2]
            assert (view[:, :, :upper] == known[:, :, :upper]).all()
        assert all(fits(model, views)) and len(told) == 1
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
    assert out.count("is one of 8 candidates") == len(arrays.files) - 2


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
        together, single = np.load(tmp_path / f"all-{stem}.npz"), np.load(tmp_path / "one.npz")
        assert together.files == single.files
        assert all(np.array_equal(together[name], single[name]) for name in single.files)
    assert command(f"sample {run} --given {folder} --n 2") == 0
    names = {path.name for path in run.glob("sample*.png")}
    assert names == {"sample-random-0-n2-given-a.png", "sample-random-0-n2-given-b.png"}
    assert len(list(tmp_path.glob("all-*"))) == 6


def test_pictures_show_columns_and_large_answers_have_files_of_their_own(runs, tmp_path):
    """Original, given and answers from left to right, pixels repeated. A small one has no files."""
    for size, times, large in (((12, 8), 11, False), ((8, 66), 16, True)):
        image = save_image(tmp_path / "x.png", size)
        out = tmp_path / f"o{size[0]}"
        assert command(f"sample {runs['pyramid']} --given {tmp_path}/x.png --reduce --answers 2",
                       "--out", out) == 0
        arrays, picture = np.load(f"{out}.npz"), np.asarray(Image.open(f"{out}.png"))
        made = arrays["{}x{}".format(*size)]
        view = arrays["{}x{}".format(size[0] // 2, size[1] // 2)][0]
        tiles = [image.repeat(times, 0).repeat(times, 1),
                 view.repeat(2 * times, 0).repeat(2 * times, 1),
                 *made.repeat(times, 1).repeat(times, 2)]
        found = [places(picture, tile) for tile in tiles]
        assert [len(where) for where in found] == [1] * 4
        (rows, columns) = zip(*(where[0] for where in found))
        assert len(set(rows)) == 1 and list(columns) == sorted(set(columns))
        assert all(right - left >= times * size[1]
                   for left, right in itertools.pairwise(columns))
        for left, right in itertools.pairwise([*columns, picture.shape[1]]):
            label = picture[: rows[0], left:right]
            assert label.min() < 100 < 255 == label[:, -1].min()  # nothing is cut off
        for a in (1, 2):
            path = tmp_path / f"o{size[0]}-answer-{a}.png"
            assert path.exists() == large
            assert not large or np.array_equal(Image.open(path), made[a - 1])


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
    ("--reduce", "pyramid", "--reduce: goes with --given"),
    ("--answers 2", "pyramid", "--answers: goes with --given"),
    ("--given empty", "pyramid", "empty: no image files"),
    ("--given twins", "pyramid", "twins: 2 images are called x"),
    ("--given gone", "pyramid", "gone: No such file"),
]


@pytest.mark.parametrize("flags, name, expected", BAD)
def test_bad_input_is_one_line(runs, tmp_path, monkeypatch, capsys, flags, name, expected):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "twins"):
        (tmp_path / folder).mkdir()
    image = save_image(tmp_path / "x.png", (8, 8))
    np.save(tmp_path / "x.npy", image[None])
    for ending in ("png", "jpg"):
        save_image(tmp_path / "twins" / f"x.{ending}", (8, 8))
    before = set(tmp_path.iterdir())
    assert command(f"sample {runs[name]} {flags} --out {tmp_path}/o") == 2
    out, error = capsys.readouterr()
    assert len(error.splitlines()) == 1 and expected in error and "Traceback" not in error
    assert set(tmp_path.iterdir()) == before and out == ""
