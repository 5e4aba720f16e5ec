"""Properties of tools/figures.py: what is drawn, for which models, what is said if it cannot be.

Images are looked for in the PNG files and compared with what model.sample gives, called directly.
"""
import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import pixelaux
from pixelaux import Gray, Half, Psi, build, main
from tools import figures

torch.set_num_threads(1)
settings.register_profile(
    "figures", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("figures")

SMALL = dict(
    nr_filters=4, nr_logistic_mix=2, layout=((0, 1),), layout_cond=((0, 1),),
    layout_light=((0, 1),), layout_embed=((1, 1), (0, 1)))
MODELS = {
    "pixelcnn": dict(size=8),
    "grayscale": dict(size=(8, 4), tight=False),
    "pyramid": dict(size=(8, 12), halvings=2, tight=True),
    "grayscale-pyramid": dict(size=(8, 8), halvings=1),
}
N, SEED = 2, 7
SHIFTS = (0.0, -0.2, -0.4, -0.6, -0.8, -1.0)


def small(name, size, **options):
    """An untrained model, its weights so far from their start that everything depends on all."""
    model = build(name, size, **{**SMALL, **options})
    generator = torch.Generator().manual_seed(0)
    model.initialise(torch.randint(256, (16, *model.views[-1].shape), generator=generator,
                                   dtype=torch.uint8))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(model, run, data):
    """Write the model as a run on the images in the file `data`."""
    model.config.data = str(data)
    weights = {k: factor.state_dict() for k, factor in enumerate(model.factors)}
    pixelaux.write_checkpoint(run / "weights.pt", model.config, weights)
    return run


def command(*arguments):
    """Exit status of figures, one column wide."""
    try:
        return main(["figures", *map(str, arguments), "--n", "1", "--device", "cpu"])
    except SystemExit as stop:
        return stop.code


def random_file(path):
    """Images of 8x8 for training and test."""
    images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    np.save(path, images)
    return path


@pytest.fixture
def quick(monkeypatch):
    """Any images in place of samples, where only what is around them matters."""

    def sample(model, n, seed, until=None, **options):
        images = []
        for view in model.views[:until]:
            images.append(torch.randint(view.levels, (n, *view.shape), dtype=torch.uint8))
        return images

    monkeypatch.setattr(pixelaux.PixelAux, "sample", sample)


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """(model, its test images (N, 3, H, W), its pictures {name: array}, what was printed)."""
    folder = tmp_path_factory.mktemp("run")
    model = small(request.param, **MODELS[request.param])
    rng = np.random.default_rng(1)
    np.save(folder / "x.npy", rng.integers(256, size=(200, *model.config.size, 3), dtype=np.uint8))
    run = saved(model, folder, folder / "x.npy")
    text = folder / "printed"
    with pytest.MonkeyPatch.context() as patch, open(text, "w") as file:
        patch.setattr("sys.stdout", file)
        flags = f"--n {N} --seed {SEED} --device cpu".split()
        assert main(["figures", str(run), *flags]) == 0
    test = pixelaux.load_data(str(folder / "x.npy"))[0].test[:N]
    assert len(test) == N
    pictures = {}
    for path in (run / "figures").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            pictures[path.stem] = np.asarray(image)
    return model, torch.from_numpy(test).permute(0, 3, 1, 2), pictures, text.read_text()


# --- What is drawn -------------------------------------------------------------------------------


def shown(images, levels=256):
    """Images (N, C, H, W) as they are shown, a list of (H, W, 3)."""
    x = images.numpy().astype(float) * (255 / (levels - 1))
    assert np.array_equal(x, x.round())
    return list(np.repeat(x.astype(np.uint8), 3 // x.shape[1], 1).transpose(0, 2, 3, 1))


def expected(model, test):
    """{name: rows of images} of all figures that the model could have."""
    options = dict(tight=model.config.tight)
    levels = [view.levels for view in model.views]
    seeds = range(SEED, SEED + 4)
    views = model.sample(N, SEED, **options)

    def completed(k):
        x_hat = model.views_of(test)[k]
        rows = [shown(test), shown(x_hat, levels[k])]
        for seed in seeds[:3]:
            rows.append(shown(model.sample(N, seed, given=x_hat, **options)[-1]))
        return rows

    rows = {}
    for k, view in enumerate(model.views[:-1]):
        rows[f"upscaled-{view.name.replace(' ', '-')}"] = completed(k)
    all_scales = [shown(x, top) for x, top in zip(views, levels)]
    rows["fig6-scales"] = [list(row) for row in zip(*all_scales)]
    rows["fig4-shift"] = []
    gray = [{} for seed in seeds]
    if model.config.model.startswith("gray"):
        rows["fig2-gray"] = [shown(views[-2], 16), shown(views[-1])]
        rows["fig3-colourised"] = completed(-2)
        rows["fig4-shift"] = [shown(views[-2], 16)]
        gray = [dict(given=model.sample(N, seed, **options)[-2]) for seed in seeds]
    for shift in SHIFTS:
        x = model.sample(N, SEED, shift=shift, **gray[0], **options)[-1]
        rows["fig4-shift"].append(shown(x))
    maps = [shown(model.sample(N, seed, "map", **more, **options)[-1])
            for seed, more in zip(seeds, gray)]
    rows["fig4-shift"].append(maps[0])
    rows["fig5-map"] = maps
    return rows


def packed(image):
    """(H, W, 3) -> (H, W), a number for each colour."""
    return image.astype(int) @ [65536, 256, 1]


def place(picture, tile):
    """Where the tile stands in the picture, (row, column), or None; both packed."""
    h, w = tile.shape
    if h > picture.shape[0] or w > picture.shape[1]:
        return None
    corners = picture[: picture.shape[0] - h + 1, : picture.shape[1] - w + 1] == tile[0, 0]
    corners &= picture[h - 1 :, w - 1 :] == tile[-1, -1]
    for r, c in zip(*np.nonzero(corners)):
        if np.array_equal(picture[r : r + h, c : c + w], tile):
            return r, c
    return None


def enlarged(image, times):
    return packed(image).repeat(times, 0).repeat(times, 1)


def times_of(picture, image):
    """By how much the image is enlarged, where the picture shows it; None: it does not."""
    for times in range(1, 65):
        if place(packed(picture), enlarged(image, times)):
            return times
    return None


def assert_grid(picture, rows):
    """The rows of images stand in a straight grid, equally large, with labels, and nothing else."""
    biggest, image = rows[-1][-1], rows[0][0]
    times = times_of(picture, biggest)
    tall, wide = times * biggest.shape[0], times * biggest.shape[1]
    assert wide >= 64
    rest, numbers = picture.copy(), packed(picture)
    top, left = place(numbers, enlarged(image, tall // image.shape[0]))
    lines, columns = [], []
    for images in rows:
        # Some rows may look alike, as MAP samples do: look below the row before.
        below = lines[-1] + tall if lines else 0
        for i, image in enumerate(images):
            right_of = columns[i - 1] + wide if i else 0
            tile = enlarged(image, tall // image.shape[0])
            r, c = place(numbers[below:, right_of:], tile)
            r, c = r + below, c + right_of
            if i == 0:
                lines.append(r)
            if len(lines) == 1:
                columns.append(c)
            assert (r, c) == (lines[-1], columns[i])
            rest[r : r + tall, c : c + wide] = 255
        label = picture[lines[-1] : lines[-1] + tall, : left - 2]
        assert label.min() < 50 and label.max() == 255  # black on white
    assert (np.diff(columns) > wide).all() and len(set(np.diff(columns))) <= 1
    assert (rest[top - 1 :, left - 1 :] >= 192).all()  # white, and a silver frame
    head = rest[: top - 1]
    for c in columns:
        assert head[-(top // 2) :, c : c + wide].min() < 50
    assert head[: top // 2].min() < 50  # the caption
    return times


def test_the_figures_hold_exactly_what_is_sampled(made):
    """Every row and every column, crisp, enlarged by whole pixels; test images and their views.

    In Fig. 4 each row has the noise of the first, which is what plain sampling gives. Controls:
    with another seed, and with `tight` the other way, the images would be others.
    """
    model, test, pictures, _ = made
    rows, times = expected(model, test), {}
    for name, picture in pictures.items():
        times[name] = assert_grid(picture, rows[name])

    def found(x):
        """Which of the samples x Fig. 4 shows."""
        picture = packed(pictures["fig4-shift"])
        tiles = [enlarged(image, times["fig4-shift"]) for image in shown(x)]
        return [place(picture, tile) is not None for tile in tiles]

    tight = model.config.tight
    assert found(model.sample(N, SEED, tight=tight)[-1]) == [True] * N
    assert not any(found(model.sample(N, SEED + 9, tight=tight)[-1]))
    if len(model.views) > 1:
        assert not any(found(model.sample(N, SEED, tight=not tight)[-1]))


FIGURES = {
    "pixelcnn": {"fig4-shift", "fig5-map"},
    "grayscale": {"fig2-gray", "fig3-colourised", "fig4-shift", "fig5-map"},
    "pyramid": {"fig4-shift", "fig5-map", "fig6-scales", "upscaled-2x3", "upscaled-4x6"},
    "grayscale-pyramid": {"fig2-gray", "fig3-colourised", "fig4-shift", "fig5-map", "fig6-scales",
                          "upscaled-gray-4x4"},
}


def test_which_figures_are_made_and_that_it_is_said(made):
    """A line for each: what it is, or why it is not made."""
    model, _, pictures, text = made
    name = model.config.model
    assert set(pictures) == FIGURES[name]
    told = {}
    for line in text.splitlines():
        path, _, rest = line.partition(".png")
        told[path.rpartition("/")[2]] = rest
    assert {key for key, rest in told.items() if rest.startswith(": ")} == FIGURES[name]
    left_out = {key: rest for key, rest in told.items() if key not in pictures}
    for key, rest in left_out.items():
        reason = "gray" if key in ("fig2-gray", "fig3-colourised") else "smaller"
        assert rest.startswith(" is not made: ") and reason in rest
    assert {"fig2-gray", "fig3-colourised", "fig6-scales"} <= set(told)
    assert ("upscaled" in told) == ("fig6-scales" in left_out)


class Dark(Psi):
    """A view as large as the image, and not a gray one."""

    label = "dark"

    def __init__(self, channels=3, levels=256):
        super().__init__(1, 2)

    def __call__(self, x):
        return (x.long().sum(1, keepdim=True) >= 384).to(torch.uint8)


class Luma(Gray):
    """The gray view by another class."""


@pytest.mark.parametrize("chain, expected", [
    ([Dark], {"fig4-shift", "fig5-map"}),
    ([Luma], FIGURES["grayscale"]),
    ([Half], {"fig4-shift", "fig5-map", "fig6-scales", "upscaled-4x4"}),
    ([Dark, Half], {"fig4-shift", "fig5-map", "fig6-scales", "upscaled-dark-4x4"}),
])
def test_views_decide_not_the_name(chain, expected, quick, monkeypatch, tmp_path):
    """All of these models have one name."""
    monkeypatch.setitem(pixelaux.MODELS, "grayscale", chain)
    model = small("grayscale", 8, halvings=1, tight=False)
    run = saved(model, tmp_path / "run", random_file(tmp_path / "x.npy"))
    assert command(run) == 0
    assert {path.stem for path in (run / "figures").iterdir()} == expected


# --- Text ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawn():
    """Everything that is written into pictures: [(text, size of the font, its box)]."""
    found, inside, draw = [], [], ImageDraw.ImageDraw.text

    def text(pen, xy, words, fill=None, font=None, anchor=None, **more):
        if not inside:
            found.append((words, font.size, pen.textbbox(xy, words, font, anchor)))
        inside.append(True)  # the lines of a text may be texts, too
        draw(pen, xy, words, fill, font, anchor, **more)
        inside.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", text)
        yield found


def test_labels_tell_views_shifts_and_what_is_given_and_sampled(quick, tmp_path):
    model = small("grayscale-pyramid", 8, halvings=1)
    run = saved(model, tmp_path, random_file(tmp_path / "x.npy"))
    with drawn() as found:
        assert command(run, "--seed", 4) == 0
    words = [text for text, _, _ in found]
    captions = [text for text in words if len(text) > 30]
    assert len(captions) == 6 and all("\n" not in text for text in captions)
    for number in range(2, 7):
        assert sum(text.startswith(f"Fig. {number}: ") for text in captions) == 1
    labels = {text.replace("\n", " ") for text in words}
    assert {f"shift {shift:.1f}" for shift in SHIFTS} <= labels
    assert {"MAP", "MAP seed 4", "MAP seed 7", "4-bit gray 8x8 sampled", "8x8 sampled",
            "8x8 original", "4-bit gray 8x8 given", "4-bit gray 4x4 given",
            "8x8 sampled with seed 4", "8x8 sampled with seed 6", "4-bit gray 4x4",
            "4-bit gray 8x8", "4-bit gray 8x8 sampled, given", "8x8", "test image", "1",
            "sample 1", "noise"} <= labels


@settings(max_examples=15)
@given(h=st.integers(4, 40), w=st.integers(4, 40), times=st.sampled_from([1, 4]),
       nr_rows=st.integers(1, 8), columns=st.integers(1, 16), scales=st.booleans())
@example(h=40, w=40, times=4, nr_rows=2, columns=16, scales=False)  # wide: the text must grow
@example(h=4, w=40, times=1, nr_rows=3, columns=8, scales=False)  # low: the labels are higher
def test_text_is_large_and_neither_cut_off_nor_covered(
        tmp_path_factory, h, w, times, nr_rows, columns, scales):
    """At least 16 px where the picture is 1,000 px wide; no text meets another or an image."""
    h, w = h * times, w * times
    labels = [str(i + 1) for i in range(columns)]
    if scales:
        labels = ["gray 128x128"] * min(columns, 5)
    images = [np.zeros((h, w, 3), np.uint8)] * len(labels)
    rows = [("128x128 sampled\nwith seed 12345", images)] * nr_rows
    caption = "Fig. 9: images of the height and width that is just being tried in this very test"
    figure = figures.Figure(caption, rows, "test image", labels)
    path = tmp_path_factory.mktemp("text") / "x.png"
    with drawn() as found:
        figures.save_figure(path, figure)
    with Image.open(path) as image:
        width, height = image.size
        black = np.asarray(image.convert("L"))
    assert len(found) == 2 + len(labels) + nr_rows
    for text, size, (x0, y0, x1, y1) in found:
        assert size >= 0.016 * width, (size, width)
        assert 0 <= x0 and x1 <= width and 0 <= y0 and y1 <= height, text
        assert (black[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] < 128).mean() < 0.6, text
    for (a, _, box), (b, _, other) in itertools.combinations(found, 2):
        apart = box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
        assert apart, (a, b)


# --- Errors --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A pyramid whose data are gone; it fits `shapes`."""
    return saved(small("pyramid", 16), tmp_path / "run", tmp_path / "gone.npy")


def own_lines(text):
    lines = text.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("pixelaux: ")]


def test_without_test_images_the_others_are_made(quick, run, capsys):
    """It says which were not, and why. Control: with test images they are."""
    assert command(run) == 0
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {"fig4-shift.png", "fig5-map.png", "fig6-scales.png"}
    line, = [line for line in capsys.readouterr().out.splitlines() if "upscaled" in line]
    assert "upscaled-8x8.png is not made: " in line and "gone.npy" in line and "--data" in line
    assert command(run, "--data", "shapes") == 0
    assert (run / "figures" / "upscaled-8x8.png").exists()


def test_bad_input_is_one_line(quick, run, tmp_path, capsys):
    """Before anything is sampled or written. Control: a checkpoint file, another folder."""
    (tmp_path / "file").write_text("mine")
    np.save(tmp_path / "other.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for arguments, word in (
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path], "holds no run"),
        ([run, "--data", tmp_path / "missing.npy"], "missing.npy"),
        ([run, "--data", tmp_path / "other.npy"], "other.npy"),
        ([run, "--out", tmp_path / "file"], "--out"),
    ):
        assert command(*arguments) == 2, arguments
        line, = own_lines(capsys.readouterr().err)
        assert word in line
    for n in ("0", "17", "many"):
        with pytest.raises(SystemExit):
            main(["figures", str(run), "--n", n])
        assert "--n" in own_lines(capsys.readouterr().err)[0]
    assert not (run / "figures").exists() and (tmp_path / "file").read_text() == "mine"
    out = tmp_path / "new" / "folder"
    assert command(run / "weights.pt", "--data", "shapes", "--out", out) == 0
    assert len(list(out.iterdir())) == 4
    assert not (run / "figures").exists()
    assert command(run / "weights.pt") == 0 and (run / "figures" / "fig5-map.png").exists()


def test_data_are_read_only_if_a_figure_needs_them(quick, tmp_path, monkeypatch):
    """As they may have to be downloaded. Control: the pyramid reads them."""
    read = []

    def run_data(args, model):
        read.append(model.config.model)
        raise pixelaux.Problem("none")

    monkeypatch.setattr(figures, "run_data", run_data)
    for name in ("pixelcnn", "pyramid"):
        assert command(saved(small(name, 16), tmp_path / name, "x.npy")) == 0
    assert read == ["pyramid"]
