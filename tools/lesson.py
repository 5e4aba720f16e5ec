"""The lesson in one picture, made by the functions it is about: python -m tools.lesson [FILE.png].

Panels are in the order of pixelaux.py, and numbered as the points of README.md.
"""
import argparse
import itertools
import pathlib

import numpy as np
import torch

from pixelaux import (
    HORIZONTAL, VERTICAL, Categorical, Gray, Half, LogisticMixture, Shapes, build, feasible,
    log_mass, to_array, to_tensor, to_unit, write_atomically)

SEEN, NOW, REST, LINE, BLUE = "#9cc3e6", "#f28e2b", "#f6f6f6", "#8a8a8a", "#3f7fb5"
SIZE = 9, 8.15  # of the picture in inches; it has 200 pixels an inch
HAT = r"$\hat{X}$"
BLOCK = (20, 15, 2, 3)  # four pixels of one channel; their rounded mean is 10
LAYERS = 4  # of the stacks
LEVELS = 32  # of the pixel whose distribution is drawn, for bins that can be seen
COMPONENTS = ((0.6, (8, 10, 14), 1.2), (0.4, (28, 22, 6), 1.6))  # weight, means of R, G, B, scale
RED, GREEN, LEFT = (8, 28), 10, (15, 20)  # of the pixel; what X^ leaves to its blue
GRAYS = (0, 1, 2, 3, 4, 3, 1, 0, 0, 2, 3, 2, 0, 0, 0, 0)  # logits


def views():
    """[(label, uint8 (h, w, 3))]: an image of shapes and simpler views of it."""
    image = Shapes((32, 32)).sample(1, 11)
    half, gray = Half()(to_tensor(image)), to_array(Gray()(to_tensor(image)))
    return [("X", image[0]), ("X₁ = Half(X)", to_array(half)[0]),
            ("X₂ = Half(X₁)", to_array(Half()(half))[0]),
            ("X₁ = Gray(X)", gray[0].repeat(3, 2) * 17)]


def terms():
    """(views X^ = 2..18, p(X^) p(X | X^) of the block X, the same with p(X | X^) cut to intervals).

    Each pixel is a logistic around the view, of scale 5; so is the view itself, around 11.
    """
    numbers, pixels, scale = torch.arange(2, 19), torch.tensor(BLOCK), torch.tensor(10 / 255).log()
    means = (numbers * 2 / 255 - 1)[:, None]  # on -1 .. 1, as in the heads
    log_p = log_mass(torch.tensor(11 * 2 / 255 - 1), scale, numbers, numbers, 256)
    log_p = log_p + log_mass(means, scale, pixels, pixels, 256).sum(1)
    lo, hi = feasible(list(pixels), (1, 1, 1, 1), 4 * numbers - 2, 4 * numbers + 1, 255)
    lo, hi = torch.stack(lo, 1), torch.stack(hi, 1)
    possible = ((lo <= pixels) & (pixels <= hi)).all(1)
    cut = log_p - log_mass(means, scale, lo, torch.maximum(lo, hi), 256).sum(1)
    return numbers, log_p.exp(), torch.where(possible, cut.exp(), 0)


def masses(before, interval=(0, LEVELS - 1)):
    """Of the mixture of COMPONENTS the channel after those in `before`, cut to interval: (LEVELS,).

    log_prob cuts each channel to an interval. Those of all channels but this one are what they are,
    so that they have probability 1.
    """
    weights, means, scales = (torch.tensor(numbers) for numbers in zip(*COMPONENTS))
    params = [weights.log()]
    for channel in range(3):
        mean = to_unit(means[:, channel], LEVELS, torch.float32)
        params += [mean, (scales * 2 / (LEVELS - 1)).log(), torch.zeros(2)]
    head = LogisticMixture(torch.cat(params).view(1, -1, 1, 1).expand(LEVELS, -1, -1, -1), LEVELS)
    x = torch.zeros(LEVELS, 3, 1, 1, dtype=torch.long)
    channel, levels = len(before), torch.arange(LEVELS)
    x[:, :channel, 0, 0] = torch.tensor(before, dtype=torch.long)
    x[:, channel, 0, 0] = levels
    lo, hi = x.clone(), x.clone()
    lo[:, channel], hi[:, channel] = interval
    possible = (interval[0] <= levels) & (levels <= interval[1])
    return torch.where(possible, head.log_prob(x, (lo, hi)).exp().flatten(), 0).numpy()


def offsets(rows, columns):
    """The (dy, dx) that a Conv reads around its output."""
    ys, xs = range(rows[0], rows[1] + 1), range(columns[0], columns[1] + 1)
    return set(itertools.product(ys, xs))


def through(seen, kernel, layers):
    """What is seen through more layers of a kernel."""
    for _ in range(layers):
        steps = itertools.product(seen, kernel)
        seen = {(y + dy, x + dx) for (y, x), (dy, dx) in steps}
    return seen


def masks():
    """[(label, offsets)]: what layers read, what a stack of one stream sees, what both streams."""
    net = build("pyramid", 16).factors[0].net
    convs = net.v_first, net.h_above, net.h_left
    v_first, above, left = (offsets(conv.rows, conv.columns) for conv in convs)
    h_first, vertical, horizontal = above | left, offsets(**VERTICAL), offsets(**HORIZONTAL)
    one = through(h_first, h_first | {(0, 0)}, LAYERS - 1)
    v = through(v_first, vertical, LAYERS - 1)
    two = through(h_first, horizontal, LAYERS - 1) | v  # h reads v at its own place
    return [("v: first layer", v_first), ("v: others", vertical), ("h: first layers", h_first),
            ("h: others", horizontal), ("one stream: blind", one), ("v and h: blind nowhere", two)]


def cells(axes, colours, texts):
    """A grid of squares. colours, texts: rows of them."""
    for (r, c), text in np.ndenumerate(texts):
        axes.bar(c, 1, 1, r, align="edge", fc=colours[r][c], ec=LINE, lw=0.6)
        axes.text(c + 0.5, r + 0.53, text, ha="center", va="center")
    axes.set(xlim=(-0.1, c + 1.1), ylim=(r + 1.1, -0.1), aspect="equal", anchor="NW")
    axes.axis("off")


class Page:
    """The picture, and places in it: inches from the left and from the top."""

    def __init__(self):
        import matplotlib.figure

        self.figure = matplotlib.figure.Figure(SIZE, dpi=200)
        self.all = self.axes(0, 0, *SIZE)
        self.all.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
        self.all.axis("off")
        self.all.set_zorder(2)  # arrows before what they join

    def axes(self, x, y, width, height):
        across, down = SIZE
        return self.figure.add_axes(
            (x / across, 1 - (y + height) / down, width / across, height / down))

    def text(self, x, y, text, **style):
        self.all.text(x, y, text, **{"ha": "center", "va": "center", **style})

    def title(self, x, y, text):
        self.text(x, y, text, size=9.5, weight="bold", ha="left")

    def arrow(self, start, end, colour="black"):
        style = dict(arrowstyle="-|>", color=colour, lw=1, shrinkA=0, shrinkB=0, mutation_scale=8)
        self.all.annotate("", end, start, arrowprops=style)

    def box(self, x, y, width, height, text, colour):
        self.all.bar(x, height, width, y, align="edge", fc=colour, ec=LINE, lw=0.6)
        self.text(x + width / 2, y + height / 2, text)

    def image(self, x, y, side, pixels):
        axes = self.axes(x, y, side, side)
        axes.imshow(pixels, interpolation="nearest")
        axes.axis("off")


def draw_views(page, left, top):
    """From X to simpler views by psi, and back by the factors."""
    page.title(left, top, "1  Views of X and their factors: grayscale (left), pyramid (right)")
    x, half, quarter, gray = views()
    side, step, y = 0.9, 1.7, top + 0.42
    for i, (label, image) in enumerate((gray, x, half, quarter)):
        page.image(left + step * i, y, side, image)
        page.text(left + step * i + side / 2, y - 0.12, label)
    gaps = ("Gray", "p(X | X₁)"), ("Half", "p(X | X₁)"), ("Half", "p(X₁ | X₂)")
    for i, (psi, factor) in enumerate(gaps):
        middle = left + step * i + (side + step) / 2
        reach = -0.34 if psi == "Gray" else 0.34  # to the coarser view
        page.arrow((middle - reach, y + 0.32), (middle + reach, y + 0.32))
        page.arrow((middle + reach, y + 0.58), (middle - reach, y + 0.58), NOW)
        page.text(middle, y + 0.2, f"ψ = {psi}")
        page.text(middle, y + 0.7, factor)
    for i, factor in ((0, "p(X₁)"), (3, "p(X₂)")):
        middle = left + step * i + side / 2
        page.arrow((middle, y + side + 0.2), (middle, y + side + 0.02), NOW)
        page.text(middle, y + side + 0.28, factor)
    page.text(left + 1.5 * step + side / 2, y + side + 0.2,
              "black: ψ leaves something out\norange: a network draws it again")


def draw_terms(page, left, top):
    page.title(left, top, "2  A bound: one term")
    axes = page.axes(left + 0.28, top + 0.25, 2.0, 1.2)
    numbers, bound, cut = (part.numpy() for part in terms())
    axes.bar(numbers, bound, color=[NOW if x_hat == 10 else SEEN for x_hat in numbers], width=0.8)
    axes.set(ylim=(0, 1.95 * float(bound.max())), yticks=[], ylabel=f"p({HAT}) p(X | {HAT})",
             xlabel=f"{HAT}; X is a block of 20, 15, 2, 3")
    at = list(numbers).index(10)
    share, gain = float(bound[at] / bound.sum()), float(cut[at] / bound[at])
    text = (f"p(X): all bars. Bound: {share:.0%},\n{HAT} = 10 alone. Cut as in 3, the\n"
            f"others are 0, and this {gain:.0f}x as high")
    axes.text(0.03, 0.96, text, va="top", transform=axes.transAxes)


def draw_intervals(page, left, top):
    page.title(left, top, f"3  Exact: what {HAT} leaves")
    axes = page.axes(left + 0.25, top + 0.25, 1.95, 1.1)
    low, high = torch.tensor((38, 41))
    lo, hi = feasible(list(torch.tensor(BLOCK)), (1, 1, 1, 1), low, high, 255)
    for i, value in enumerate(BLOCK):
        axes.plot((lo[i], hi[i]), (i, i), color=SEEN, lw=8, solid_capstyle="butt")
        axes.plot(value, i, "o", color=NOW, ms=5)
        axes.text(46, i, f"{value} of {lo[i]}..{hi[i]}", va="center")
    axes.set(xlim=(-2, 84), ylim=(3.6, -0.6), xticks=range(0, 41, 10), yticks=range(4),
             yticklabels=["v1", "v2", "v3", "v4"], xlabel=f"{HAT} = 10: the sum is 38..41")


def draw_distributions(page, left, top):
    """Of red; of green for two reds; of blue, whole and cut to an interval; of gray."""
    page.title(left, top, f"4  A pixel's distribution (of {LEVELS} levels): "
               "R, G, B share a component")
    dark, light = RED
    whole, kept = masses((dark, GREEN)), masses((dark, GREEN), LEFT)
    head = Categorical(torch.tensor(GRAYS).view(1, 16, 1, 1).expand(16, -1, -1, -1))
    gray = head.log_prob(torch.arange(16).view(16, 1, 1, 1)).exp().flatten().numpy()
    labels = ["R: mixture of logistics", "then G, by R", f"then B, cut by {HAT}",
              "or 4-bit gray: softmax"]
    panels = []
    for i, p in enumerate((masses(()), masses((dark,)), whole, gray)):
        axes = page.axes(left + 0.05 + 1.58 * i, top + 0.35, 1.45, 1.05)
        axes.bar(range(len(p)), p, color=SEEN, width=0.8)
        axes.set(yticks=[], xticks=(0, len(p) - 1), ylim=(0, 1.45 * p.max()))
        axes.set_title(labels[i])
        panels.append(axes)
    red, green, blue, _ = panels
    red.text(LEVELS, 0.76 * red.get_ylim()[1], f"bins 0 and {LEVELS - 1}\nare open", ha="right")
    green.text(10, 0.8 * green.get_ylim()[1], f"R = {dark}", ha="center")
    green.text(22, 0.6 * green.get_ylim()[1], f"R = {light}", ha="center")
    green.step(range(LEVELS), masses((light,)), where="mid", color=LINE, lw=1)
    blue.axvspan(LEFT[0] - 0.5, LEFT[1] + 0.5, color=NOW, alpha=0.2, lw=0)
    blue.step(range(LEVELS), kept, where="mid", color=NOW, lw=1)
    blue.set(ylim=(0, 1.15 * kept.max()))


def draw_mask(axes, seen, reach):
    """What "o" sees; "?" marks earlier pixels that a stack does not."""
    shape = (reach + 1, 2 * reach + 1)
    colours, texts = np.full(shape, REST), np.full(shape, "")
    for r, c in np.ndindex(*shape):
        if (r - reach, c - reach) in seen:
            colours[r, c] = SEEN
        elif (r, c) < (reach, reach) and reach == LAYERS:
            texts[r, c] = "?"
    texts[reach, reach] = "o"
    cells(axes, colours, texts)


def draw_masks(page, left, top):
    page.title(left, top, f"5  What a layer reads, what {LAYERS} layers see")
    for i, (label, seen) in enumerate(masks()):
        x, y = [(0.2, 0), (1.2, 0), (0.2, 1), (1.2, 1), (2.35, 0), (2.35, 1)][i]
        axes = page.axes(left + x, top + 0.4 + 1.15 * y, 0.92 if i < 4 else 1.5, 0.9)
        draw_mask(axes, seen, 2 if i < 4 else LAYERS)
        axes.set_title("" if i in (2, 3) else label.removeprefix("v: "))
    page.text(left + 0.1, top + 0.68, "v")
    page.text(left + 0.1, top + 1.83, "h")
    page.arrow((left + 1.66, top + 0.93), (left + 1.66, top + 1.95), NOW)
    page.text(left + 1.72, top + 1.25, "h reads v", ha="left", color=NOW)


def draw_network(page, left, top):
    """A causal network of the pyramid, and the embedding that goes into each of its blocks."""
    net = build("pyramid", 32).factors[-1].net
    page.title(left, top, f"6  The network of p(X | {HAT}): f_w({HAT}) goes into every block")
    (_, x), (_, half), *_ = views()
    page.image(left, top + 0.25, 0.4, half)
    page.text(left + 0.5, top + 0.45, HAT)
    page.arrow((left + 0.6, top + 0.45), (left + 0.88, top + 0.45))
    page.box(left + 0.9, top + 0.25, 2.8, 0.4, f"f_w: ordinary layers, see all of {HAT}", SEEN)
    page.image(left, top + 1.3, 0.66, x)
    page.text(left + 0.33, top + 2.06, "X")
    v, h = top + 1.4, top + 1.92
    for i in range(len(net.stages[0].blocks)):
        x = left + 1.05 + 0.95 * i
        page.box(x, top + 1.1, 0.6, 1.1, "", REST)
        page.text(x + 0.3, top + 1.2, "block")
        for y, stream in ((v, "v"), (h, "h")):
            page.box(x + 0.1, y - 0.12, 0.4, 0.24, stream, "white")
            page.arrow((x - 0.33, y), (x + 0.09, y))
        page.arrow((x + 0.3, v + 0.12), (x + 0.3, h - 0.12), NOW)
        page.arrow((x + 0.3, top + 0.65), (x + 0.3, top + 1.09), BLUE)
    page.text(left + 1.42, top + 0.87, "+", size=10, color=BLUE)
    page.arrow((x + 0.5, h), (x + 0.88, h))
    page.text(x + 0.92, h, f"{net.last.b.numel()} numbers\na pixel: a\nmixture as in 4", ha="left")


def draw_sampling(page, left, top, lag=8, step=24):
    page.title(left, top, f"7  Sampling: pixels at step {lag} row + column, here step {step} "
               "(orange), given the blue ones")
    steps = lag * np.arange(4)[:, None] + np.arange(32)
    colours = np.select([steps < step, steps == step], [SEEN, NOW], REST)
    cells(page.axes(left, top + 0.17, 8.8, 1.2), colours, steps)


def draw(path):
    """Write the picture."""
    import matplotlib

    style = {"font.size": 8, "axes.titlesize": 8, "axes.titlepad": 3, "mathtext.default": "regular"}
    with matplotlib.rc_context(style):
        page = Page()
        for panel, place in (
                (draw_views, (0.1, 0.15)), (draw_terms, (6.6, 0.15)), (draw_intervals, (0.1, 2.22)),
                (draw_distributions, (2.65, 2.22)), (draw_masks, (0.1, 4.18)),
                (draw_network, (4.2, 4.18)), (draw_sampling, (0.1, 6.78))):
            panel(page, *place)
        write_atomically(path, lambda file: page.figure.savefig(file, format="png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw what the README's lesson tells.")
    parser.add_argument("path", nargs="?", type=pathlib.Path, default="pictures/lesson.png")
    draw(parser.parse_args().path)
