"""The paper's figures from a run's model, as annotated pictures. Command figures.

    Fig. 2     gray samples, and the colour samples made from them
    Fig. 3     test images, their 4-bit gray, colours sampled given that gray
    Fig. 4     samples with log-scales lowered step by step, and MAP sampling
    Fig. 5     MAP samples
    Fig. 6     samples at all scales
    beyond     test images, a small view of them, and what is sampled given that view

A model's views tell which figures it has: a gray view of colours, views smaller than the next.
"""
import dataclasses
import functools
import math

import numpy as np

from pixelaux import (
    Parser, Problem, checked, load, progress_bar, run_data, to_array, to_tensor, write_atomically)

SHIFTS = (0.0, -0.2, -0.4, -0.6, -0.8, -1.0)
COLUMNS = checked(int, "a whole number, 1..16", lambda value: 1 <= value <= 16)
NO_GRAY = "no view is the gray of a colour view"
NO_SCALES = "no view is smaller than the next"


class NotMade(Exception):
    """Why a figure cannot be made."""


def main(argv):
    """figures RUN."""
    text = "The paper's figures 2 to 6, as far as the model has the views, and upscaled test images"
    parser = Parser(prog="pixelaux.py figures", description=text)
    parser.add("run", "--data", "--data-dir", "--seed", "--device")
    parser.add("--n", type=COLUMNS, default=8, help="columns: images side by side (default 8)")
    parser.add("--out", metavar="FOLDER", help="for the pictures (default: RUN/figures)")
    args = parser.parse_args(argv[1:])
    folder = args.run if args.run.is_dir() else args.run.parent
    out = args.out or folder / "figures"
    if out.exists() and not out.is_dir():
        raise Problem(f"--out {out}: a file, expected a folder")
    source = Source(load(args.run, args.device), args)
    for name, make in planned(source):
        path = out / f"{name}.png"
        try:
            bar = progress_bar(desc=name, unit="pixel", unit_scale=True, delay=1, leave=False)
            with bar:
                source.count = bar.update
                figure = make(source)
        except NotMade as reason:
            print(f"{path} is not made: {reason}", flush=True)
            continue
        save_figure(path, figure)
        print(f"{path}: {figure.caption}", flush=True)


# --- What figures are made of ------------------------------------------------------------------


class Source:
    """A run's model, its samples and the first of its test images."""

    def __init__(self, model, args):
        self.model, self.views = model, model.views
        self.n, self.seed = args.n, args.seed or 0
        self.count = None  # told the pixels just sampled
        self.gray = None  # the number of the gray view of which colours are made
        self.small = []  # the numbers of the views smaller than the next
        for k, view in enumerate(self.views[:-1]):
            finer = self.views[k + 1]
            if view.label == "gray" and finer.label != "gray":
                self.gray = k
            if view.shape[1] < finer.shape[1]:
                self.small.append(k)
        self.test, self.without_test = None, ""
        if self.gray is not None or self.small:
            self.find_test_images(args)

    def find_test_images(self, args):
        """test: uint8 (N, 3, H, W), N at most n; or None, and without_test says why."""
        try:
            self.test = to_tensor(run_data(args, self.model).test[: self.n])
        except (Problem, OSError) as error:
            if args.data or args.data_dir:  # what was asked for is not there
                raise
            self.without_test = f"{error} (--data, --data-dir: where the test images are)"

    def test_images(self):
        if self.test is None:
            raise NotMade(self.without_test)
        return self.test

    def sample(self, n, add=0, **options):
        """model.sample with the seed plus `add`; tight, if the model was trained so."""
        tight = self.model.config.tight
        return self.model.sample(n, self.seed + add, tight=tight, progress=self.count, **options)

    def name(self, k):
        """A view's name in labels: of gray, which has few levels, with the bits of a pixel."""
        view = self.views[k]
        bits = f"{(view.levels - 1).bit_length()}-bit " if view.label == "gray" else ""
        return bits + view.name

    def colours(self, x, k=-1):
        """Images of view k, uint8 (N, C, H, W) -> (N, H, W, 3), the highest level being 255."""
        shades = to_array(x).astype(int) * 255 // (self.views[k].levels - 1)
        return np.broadcast_to(shades, (*shades.shape[:3], 3)).astype(np.uint8)


def planned(source):
    """[(name of the file, function of the source that makes the Figure)]."""
    figures = [
        ("fig2-gray", gray_and_colour),
        ("fig3-colourised", colourised),
        ("fig4-shift", shifted),
        ("fig5-map", map_samples),
        ("fig6-scales", scales),
    ]
    for k in source.small:
        view = source.views[k].name.replace(" ", "-")
        figures.append((f"upscaled-{view}", functools.partial(upscaled, k=k)))
    if not source.small:
        figures.append(("upscaled", upscaled))
    return figures


# --- The figures -------------------------------------------------------------------------------


@dataclasses.dataclass
class Figure:
    """Rows of images. The last image of the last row is of the largest size.

    rows: [(label, images)], an image being uint8 (h, w, 3), one for each column.
    """

    caption: str
    rows: list
    across: str  # what the columns are
    columns: list  # their labels


def numbers(n):
    return [str(i + 1) for i in range(n)]


def gray_and_colour(source):
    k = source.gray
    if k is None:
        raise NotMade(NO_GRAY)
    views = source.sample(source.n)
    rows = [
        (f"{source.name(k)}\nsampled", source.colours(views[k], k)),
        (f"{source.name(-1)}\nsampled", source.colours(views[-1])),
    ]
    caption = "Fig. 2: sampled gray, and below it colours sampled given that gray"
    return Figure(caption, rows, "sample", numbers(source.n))


def colourised(source):
    if source.gray is None:
        raise NotMade(NO_GRAY)
    gray = source.name(source.gray)
    caption = f"Fig. 3: test images colourised, by samples given their {gray}"
    return completed(source, source.gray, caption)


def upscaled(source, k=None):
    if k is None:
        raise NotMade(NO_SCALES)
    caption = f"Test images upscaled: {source.name(-1)} sampled given {source.name(k)}"
    return completed(source, k, caption)


def completed(source, k, caption):
    """Test images, their view k, and three samples of X given that view, by a seed each."""
    x = source.test_images()
    given = source.model.views_of(x)[k]
    rows = [
        (f"{source.name(-1)}\noriginal", source.colours(x)),
        (f"{source.name(k)}\ngiven", source.colours(given, k)),
    ]
    for add in range(3):
        samples = source.sample(len(x), add, given=given, given_view=k)[-1]
        label = f"{source.name(-1)} sampled\nwith seed {source.seed + add}"
        rows.append((label, source.colours(samples)))
    return Figure(caption, rows, "test image", numbers(len(x)))


def sampled_gray(source, add=0):
    """What figures of log-scales begin with, as options of `sample`: gray views have no log-scales,
    and their most probable levels are one white or black image for all noise. Other models begin
    with nothing.
    """
    k = source.gray
    if k is None:
        return {}
    return dict(given=source.sample(source.n, add, until=k + 1)[k], given_view=k)


def shifted(source):
    begin = sampled_gray(source)
    rows = []
    for shift in SHIFTS:
        samples = source.sample(source.n, shift=shift, **begin)[-1]
        rows.append((f"shift {shift:.1f}", source.colours(samples)))
    samples = source.sample(source.n, mode="map", **begin)[-1]
    rows.append(("MAP", source.colours(samples)))
    caption = "Fig. 4: log-scales lowered by the shift, the same noise in each row; last MAP"
    if begin:
        gray = source.colours(begin["given"], source.gray)
        rows.insert(0, (f"{source.name(source.gray)}\nsampled, given", gray))
    return Figure(caption, rows, "noise", numbers(source.n))


def map_samples(source):
    rows = []
    for add in range(4):
        samples = source.sample(source.n, add, mode="map", **sampled_gray(source, add))[-1]
        rows.append((f"MAP\nseed {source.seed + add}", source.colours(samples)))
    caption = "Fig. 5: MAP samples: a mixture component is drawn, its mode taken"
    if source.gray is not None:
        caption = "Fig. 5: MAP samples of the colours, given sampled gray"
    return Figure(caption, rows, "sample", numbers(source.n))


def scales(source):
    """A row for each sample, a column for each view."""
    if not source.small:
        raise NotMade(NO_SCALES)
    n = min(3, source.n)
    views = []
    for k, x in enumerate(source.sample(n)):
        views.append(source.colours(x, k))
    rows = []
    for i in range(n):
        rows.append((f"sample {i + 1}", [images[i] for images in views]))
    names = [source.name(k) for k in range(len(source.views))]
    caption = "Fig. 6: samples at all scales, each given the one on its left"
    return Figure(caption, rows, "sampled", names)


# --- Drawing -----------------------------------------------------------------------------------


def save_figure(path, figure):
    """A PNG. A pixel becomes a square of whole pixels; all images are shown equally large.

    The picture is at most some 1,000 px wide and high, unless its images need more; the text grows
    with it.
    """
    from PIL import Image, ImageDraw, ImageFont

    def extent(text):
        """(width, height) of text, which may be lines."""
        box = pen.multiline_textbbox((0, 0), text, font)
        return math.ceil(box[2]), math.ceil(box[3])

    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    font = ImageFont.load_default(20)
    tall, wide = figure.rows[-1][1][-1].shape[:2]
    nr_rows, nr_columns = len(figure.rows), len(figure.columns)
    least = max(64, *[extent(label)[0] for label in figure.columns])
    most = min(256 // max(tall, wide), 840 // (nr_columns * wide), 900 // (nr_rows * tall))
    enlarge = max(math.ceil(least / wide), most)
    tall, wide = enlarge * tall, enlarge * wide

    gap = 6
    font = ImageFont.load_default(max(20, nr_columns * wide // 40))
    labels = [label for label, _ in figure.rows]
    label_sizes = [extent(label) for label in (figure.across, *labels)]
    left = 3 * gap + max(width for width, _ in label_sizes)
    row_height = max(tall, *[height for _, height in label_sizes])
    line = 2 * gap + extent(figure.caption)[1]
    top = 2 * line
    width = max(left + nr_columns * (wide + gap), extent(figure.caption)[0] + 2 * gap)
    picture = Image.new("RGB", (width, top + nr_rows * (row_height + gap)), "white")

    pen = ImageDraw.Draw(picture)
    pen.text((gap, line / 2), figure.caption, "black", font, "lm")
    pen.text((gap, 1.5 * line), figure.across, "black", font, "lm")
    for i, label in enumerate(figure.columns):
        pen.text((left + i * (wide + gap) + wide / 2, 1.5 * line), label, "black", font, "mm")
    for j, (label, images) in enumerate(figure.rows):
        middle = top + j * (row_height + gap) + row_height // 2
        pen.text((gap, middle), label, "black", font, "lm")
        y = middle - tall // 2
        for i, image in enumerate(images):
            tile = Image.fromarray(image).resize((wide, tall), Image.Resampling.NEAREST)
            x = left + i * (wide + gap)
            pen.rectangle((x - 1, y - 1, x + wide, y + tall), "silver")  # a frame, if it is white
            picture.paste(tile, (x, y))
    write_atomically(path, lambda file: picture.save(file, "PNG"))
