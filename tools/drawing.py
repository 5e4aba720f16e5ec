"""Views of any size, drawn given the coarser view, or given their first rows as well.

The networks are convolutional, so that weights serve images of other sizes than they were trained
on. An image is drawn whole, as its pixels depend on each other: tiles drawn apart have seams, and
cost more bits. One that is too large for memory is drawn in bands of rows, from top to bottom, each
of which begins with the last rows of the band above.

Rows that are known stay as they are, and the rest is drawn given them. In raster order that is what
p(X) says, exactly. A chain draws X^ first, and p(X^ | known rows of X) is not to be had pixel by
pixel. But the known rows of X^ follow from those of X, its other rows can be drawn given them, and
p(known rows of X | X^) tells how well such a candidate fits. One of several is drawn by these
weights (importance resampling), which comes the closer to p(X | its known rows) the more there are.
(Of a chain that is not tight, X^ = psi(X) in the known rows is an approximation of its own.)
"""
import dataclasses
import math
import time

import numpy as np
import torch

from pixelaux import Draw, noise_for, sample_fast, sample_naive

MARGIN = 64  # rows of a view that neighbouring bands share: about as far as a light network looks
# To draw a pixel of a large image takes some 3 (light networks) to 10 times its share of a pass
# over a small image: see `seconds_for`.
PASSES = 6.0


@dataclasses.dataclass
class How:
    """How pixels are drawn: flags of `sample`. candidates: for each view but X, where rows are
    known. show: is called with the number of pixels done."""

    seed: int
    mode: str
    shift: float
    tight: bool
    naive: bool
    candidates: int
    show: object


class Completing:
    """In place of Draw: pixels in the first `rows` rows are those of `known`, uint8 (n, C, H, W);
    `draw` draws the others."""

    def __init__(self, draw, known, rows):
        self.draw, self.known, self.rows = draw, known, rows

    def __call__(self, head, rows, columns, interval_of):
        drawn = self.draw(head, rows, columns, interval_of)  # (n P, C, 1, 1)
        known = self.known[:, :, rows, columns].transpose(1, 2).flatten(0, 1)  # (n P, C)
        keep = torch.tensor(rows, device=drawn.device) < self.rows
        keep = keep.repeat(len(self.known))[:, None, None, None]
        return torch.where(keep, known[:, :, None, None].long(), drawn)


def padded(model, image, scale):
    """(the image, uint8 (H, W, C), its lower and right edges repeated until X, `scale` times as
    large, fits the model's weights; the model for that size, with as many views)."""
    unit = model.size_multiple
    step = unit // math.gcd(unit, scale)
    more = [(0, -side % step) for side in image.shape[:2]]
    image = np.pad(image, [*more, (0, 0)], mode="edge")
    return image, model.resized([scale * side for side in image.shape[:2]])


def bands_of(model, k):
    """(factor k for bands, their rows, how many of these neighbours share), so that one image of a
    band's size takes some 4 GiB at most; a single band, if the whole image does."""
    (height, width), unit = model.config.size, model.size_multiple
    scale = height // model.views[k].shape[1]
    margin = unit * math.ceil(MARGIN * scale / unit)  # this, too, in rows of X
    strip = model.resized((unit, width))
    rows = max(3 * margin, unit * strip.factors[k].at_once)
    if rows >= height:
        return model.factors[k], height // scale, 0
    band = model.resized((rows, width))
    return band.factors[k], rows // scale, margin // scale


def draw_view(model, k, x_hat, numbers, how, known=None, rows=0):
    """Images of view k, uint8 (n, C, H, W), given those of the next coarser view; the first `rows`
    rows are those of `known`. numbers: (n,), of which the noise is a function, as in
    PixelAux.sample."""
    shape, (factor, band, margin) = model.views[k].shape, bands_of(model, k)
    cell = factor.view.psi.cell if factor.view.psi else 1
    sampler = sample_naive if how.naive else sample_fast
    x = torch.zeros(len(numbers), *shape, dtype=torch.uint8, device=model.device)
    if rows:
        x[:, :, :rows] = known[:, :, :rows]
    for some in torch.arange(len(numbers)).split(factor.at_once):
        noise = noise_for(how.seed, k, numbers[some], shape).to(model.device)
        done = rows
        while done < shape[1]:
            first = min(max(0, done - margin), shape[1] - band)
            last = first + band
            end = last if last == shape[1] else last - margin  # below, the view must be seen first
            draw = Draw(noise[:, :, first:last], how.mode)
            draw = Completing(draw, x[some, :, first:last], done - first)
            view = None if x_hat is None else x_hat[some, :, first // cell : last // cell]
            show, share = how.show, (end - done) / band
            part = sampler(factor, len(some), view, draw, how.tight and k > 0, how.shift,
                           lambda pixels: show(pixels * share))
            x[some, :, done:end] = part[:, :, done - first : end - first]
            done = end
    return x


def pixels_of(model, k, rows, candidates):
    """How many pixels of each view are drawn, coarsest first, for an answer to an image of view k,
    or to `rows` rows of X."""
    pixels = []
    for j, view in enumerate(model.views):
        height, width = view.shape[1:]
        upper = rows * height // model.config.size[0]
        copies = candidates if rows and view is not model.views[-1] else 1
        pixels.append(copies * (height - upper) * width if rows or j > k else 0)
    return pixels


def seconds_for(model, pixels, naive=False):
    """About how long it takes to draw `pixels` of each view, as the time of a pass over a small
    image tells it. Right to a factor of two or so."""
    seconds = 0.0
    for factor, count in zip(model.factors, pixels, strict=True):
        if count:
            share = pass_seconds(factor)
            height, width = factor.view.shape[1:]
            seconds += count * share * (height * width if naive else PASSES)
    return seconds


def pass_seconds(factor, least=48):
    """Seconds for a pixel in a pass over an image of about least x least pixels."""
    side, psi = factor.multiple * math.ceil(least / factor.multiple), factor.view.psi
    x, x_hat = factor.a_weight.new_zeros((1, factor.view.shape[0], side, side)).byte(), None
    if psi is not None:
        x_hat = x.new_zeros((1, psi.channels_out, side // psi.cell, side // psi.cell))
    times = []
    for _ in range(3):  # the first one prepares kernels
        start = time.perf_counter()
        factor.params(x, factor.embeddings(x_hat)).sum().item()
        times.append(time.perf_counter() - start)
    return min(times) / side**2


def answer(model, x, k, answers, how):
    """All views for images of view k, coarsest first: answer a to image i is number a n + i."""
    views = [view.repeat(answers, 1, 1, 1) for view in model.views_of(x, k)]
    for j in range(k + 1, len(model.views)):
        views.append(draw_view(model, j, views[-1], torch.arange(len(views[-1])), how))
    return views


def complete(model, x, rows, answers, how):
    """(all views for images X of which the first `rows` rows are kept, as `answer` has them; a line
    that tells whether they are drawn from p(X | these rows))."""
    known = [view.repeat(answers, 1, 1, 1) for view in model.views_of(x)]
    n, views, effective = len(known[0]), [], []
    for k, factor in enumerate(model.factors):
        upper = rows * model.views[k].shape[1] // x.shape[2]
        last = k == len(model.factors) - 1
        count = 1 if last else how.candidates  # of this view for each image
        if k > 0:
            weights = log_weights(factor, known[k], views[-1], upper, how).view(n, how.candidates)
            uniform = noise_for(how.seed, len(model.factors) + k, range(n), (1, 1, count))
            uniform = uniform[:, 0, 0].contiguous()
            chosen, numbers = choose(weights, uniform.to(model.device))
            effective.append(float(numbers.mean()))
            views = [view[chosen] for view in views]
        x_hat = views[-1] if views else None
        copies = known[k].repeat_interleave(count, 0)
        views.append(draw_view(model, k, x_hat, torch.arange(n * count), how, copies, upper))
    return views, told_of(model, rows, effective, how)


def told_of(model, rows, effective, how):
    """Whether a completion is exact. effective: how many candidates are, by view, coarsest
    first."""
    if effective:
        numbers = ", ".join(f"{number:.1f}" for number in effective)
        return (f"approximate: of each coarser view one of {how.candidates} candidates is drawn, "
                f"by p(the {rows} rows that are kept | it); effective are {numbers} of them (near "
                "1: it may fit badly; --candidates N: more)")
    _, band, margin = bands_of(model, 0)
    if margin:
        return f"approximate: drawn in bands of {band} rows, each of which sees {margin} rows above"
    return f"exact: the other rows are drawn from p(X | the {rows} rows that are kept)"


def log_weights(factor, known, candidates, rows, how):
    """log p(first rows of known | X^), nats, float64, for the candidates X^: as many for each of
    the images known."""
    known = known.repeat_interleave(len(candidates) // len(known), 0)
    nats = []
    for some in torch.arange(len(known)).split(factor.at_once):
        x, x_hat = known[some], candidates[some]
        head = factor.head(factor.params(x, factor.embeddings(x_hat)).double(), how.shift)
        bounds = factor.view.psi.bounds(x, x_hat) if how.tight else None
        nats.append(head.log_prob(x, bounds)[:, :rows].flatten(1).sum(1))
    return torch.cat(nats)


def choose(log_weights, uniform):
    """Draw candidates by their weights. log_weights: (n, M); uniform: in 0 .. 1, (n, count) ->
    (their numbers among all n M, (n count,); the effective number for each image, (n,))."""
    weights = log_weights.softmax(1)
    n, candidates = weights.shape
    place = torch.searchsorted(weights.cumsum(1), uniform).clamp(max=candidates - 1)
    first = candidates * torch.arange(n, device=weights.device)
    return (first[:, None] + place).flatten(), 1 / weights.square().sum(1)
