"""The lesson in one picture, made by the functions it is about: python -m tools.lesson [FILE.png].

Panels in the order of pixelaux.py: views, the bound, intervals, masks, the wavefront.
"""
import itertools
import pathlib
import sys

import numpy as np
import torch

from pixelaux import (
    HORIZONTAL, VERTICAL, Gray, Half, Shapes, build, feasible, log_mass, to_array, to_tensor,
    write_atomically)

SEEN, NOW, REST, LINE = "#9cc3e6", "#f28e2b", "#f6f6f6", "#8a8a8a"
BLOCK = (20, 15, 2, 3)  # four pixels of one channel; their rounded mean is 10
LAYERS = 4  # of the stacks
REACH = (2, 2, 2, 2, LAYERS, LAYERS)  # of the masks: what is shown above "o" and beside it
MASKS = f"4  What layers read around o, and what a stack of {LAYERS} sees (?: never)"
SAMPLING = "5  Sampling: pixels at step {} row + column, here step {} (orange), given the blue ones"


def views():
    """[(label, uint8 (h, w, 3))]: an image of shapes and simpler views of it."""
    image = Shapes((32, 32)).sample(1, 11)
    half, gray = Half()(to_tensor(image)), to_array(Gray()(to_tensor(image)))
    return [("X, 32x32", image[0]), ("Half(X)", to_array(half)[0]),
            ("Half(Half(X))", to_array(Half()(half))[0]), ("Gray(X)", gray[0].repeat(3, 2) * 17)]


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
    from matplotlib.patches import Rectangle

    for (r, c), text in np.ndenumerate(texts):
        axes.add_patch(Rectangle((c, r), 1, 1, fc=colours[r][c], ec=LINE, lw=0.6))
        axes.text(c + 0.5, r + 0.53, text, ha="center", va="center")
    axes.set(xlim=(-0.1, c + 1.1), ylim=(r + 1.1, -0.1), aspect="equal", anchor="N")
    axes.axis("off")


def draw_mask(axes, label, seen, reach):
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
    axes.set_title(label)


def draw_terms(axes):
    numbers, bound, cut = (part.numpy() for part in terms())
    axes.bar(numbers, bound, color=[NOW if x_hat == 10 else SEEN for x_hat in numbers], width=0.8)
    axes.set(ylim=(0, 1.9 * float(bound.max())), yticks=[], ylabel="p(X^) p(X | X^)",
             xlabel="X^; X is a block of 20, 15, 2, 3")
    at = list(numbers).index(10)
    share, gain = float(bound[at] / bound.sum()), float(cut[at] / bound[at])
    axes.text(0.03, 0.96, f"p(X): all bars. Bound: {share:.0%},\nX^ = 10 alone. If exact:\n"
              f"this bar only, {gain:.0f}x as high", va="top", transform=axes.transAxes)


def draw_intervals(axes):
    values, low, high = list(torch.tensor(BLOCK)), torch.tensor(38), torch.tensor(41)
    lo, hi = feasible(values, (1, 1, 1, 1), low, high, 255)
    for i, value in enumerate(BLOCK):
        axes.plot((lo[i], hi[i]), (i, i), color=SEEN, lw=9, solid_capstyle="butt")
        axes.plot(value, i, "o", color=NOW, ms=6)
        axes.text(46, i, f"{value} of {lo[i]}..{hi[i]}", va="center")
    axes.set(xlim=(-2, 84), ylim=(3.6, -0.6), xticks=range(0, 41, 10), yticks=range(4),
             yticklabels=["v1", "v2", "v3", "v4"], xlabel="X^ = 10: the sum is 38..41")


def draw(path, lag=8, step=24):
    """Write the picture, 1,800 px wide."""
    import matplotlib.figure

    def across(bottom, top, widths, left=0.012, right=0.985):
        place = dict(left=left, right=right, bottom=bottom, top=top, wspace=0.12)
        return figure.subplots(1, len(widths), width_ratios=widths, gridspec_kw=place,
                               squeeze=False)[0]

    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8, "axes.titlepad": 3}):
        figure = matplotlib.figure.Figure((9, 5.2), dpi=200)
        for axes, (label, image) in zip(across(0.66, 0.9, (1, 1, 1, 1), right=0.475), views()):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(label)
            axes.axis("off")
        draw_terms(across(0.69, 0.92, (1,), 0.53, 0.735)[0])
        draw_intervals(across(0.69, 0.92, (1,), 0.785)[0])
        for axes, reach, mask in zip(across(0.3, 0.505, (5, 5, 5, 5, 9, 9)), REACH, masks()):
            draw_mask(axes, *mask, reach)
        steps = lag * np.arange(4)[:, None] + np.arange(32)
        when = [steps < step, steps == step]
        cells(across(0.01, 0.215, (1,))[0], np.select(when, [SEEN, NOW], REST), steps)
        for x, y, text in (
                (0.012, 0.955, "1  Views of X"), (0.505, 0.955, "2  A bound: one term"),
                (0.76, 0.955, "3  Exact: what X^ leaves"), (0.012, 0.56, MASKS),
                (0.012, 0.235, SAMPLING.format(lag, step))):
            figure.text(x, y, text, size=9.5, weight="bold")
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "pictures/lesson.png"))
