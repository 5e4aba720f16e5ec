"""A model's excess over the truth on `shapes`, split into shape bits and texture bits.

What a model misses on an image of known probability is its excess, log2 p_true - log2 p_model. Some
of it concerns what is shown, some the noise on it. To tell one from the other, the levels of every
sub-pixel are cut into a few *classes*, each around a clean level (a level without noise), or around
two that are near each other. Red of X, for one, has the clean levels 40, 122, 133 and 215, and its
classes, dark, middle and light, are 0..80, 81..173 and 174..255. The probability of a sub-pixel is
that of its class, times that of its level within the class, each given all sub-pixels before:

    -log2 q(level | before) = -log2 q(class | before) - log2 q(level | class, before)
                                    shape                      texture

The truth p is cut the same way. The shape excess is the difference of the first terms of model and
truth, the texture excess that of the second ones. They add up to the whole excess, image by image.
Averaged over all images neither is below 0, whatever the model: each is a Kullback-Leibler
divergence, one of classes, one of levels within them. That needs classes that are the same for all
images. If instead one asked for the level to be within the noise of the image's own clean level,
sets that overlap would be asked for in different images, and a model could gain on the truth.

Is it right for each chain? The factors of a chain are split one by one, and the truth of a factor
is p(X_i | X_{i+1}).
- X, three channels: the three classes of a pixel tell without error which of the six clean pixels
  it has around it, as the noise is bounded. The noises of 122 and 133 overlap, so they share a
  class; where it is not known yet which of them it is, that counts as texture.
- Half of X: clean levels 81 and 174, and noise of at most 40. A channel's class is its clean level.
  Given this view, what is left for shape in X is the weave, light or dark.
- Gray, and Half of it: not split. On 16 levels the noises of all neighbouring clean grays overlap,
  so that a level is shape and noise at once. The excess of these views stands by itself: the shape
  excess of a model with gray is that of X at least, and that of X and the gray views at most.
What the truth predicts is computed by Bayes, without approximation: each configuration has a
probability, which every sub-pixel changes. The truth's own shape bits are log2 of the number of
configurations (for X alone on average nearly so, as noise may tell 122 from 133).
"""
import itertools
import math

import numpy as np
import torch

from pixelaux import Gray, Half, Problem, evaluating, to_tensor

KINDS = 18  # what a configuration says of a pixel: its colour, 3, and the weave, 6


# --- The noise in every view ----------------------------------------------------------------------


def block_of(psi, row, column, channel):
    """Which sub-pixels of x make one sub-pixel of psi(x), (sum of weight value - low) // width.

    -> ([(row in the cell, column, channel, weight), ..], the place in this list of the sub-pixel at
    (row, column, channel), low, width). Without psi each sub-pixel is a block, and nothing is known
    of its sum, 0.
    """
    if isinstance(psi, Gray):
        return [(row, column, c, psi.weights[c]) for c in range(3)], channel, 0, 4096
    if isinstance(psi, Half):
        four = [(r, c, channel, 1) for r, c in itertools.product((0, 1), (0, 1))]
        return four, 2 * row + column, -2, 4
    return [(row, column, channel, 0)], 0, 0, 1


def pmf_of_sum(pmfs, weights):
    """The pmf of the sum of weight value, of independent values 0, 1, .. with these pmfs."""
    total = np.ones(1)
    for pmf, weight in zip(pmfs, weights):
        longer = np.zeros(len(total) + weight * (len(pmf) - 1))
        for value in np.flatnonzero(pmf):
            longer[weight * value : weight * value + len(total)] += pmf[value] * total
        total = longer
    return total


def kinds_of(shapes):
    """The kind, 6 colour + weave, of every pixel in every configuration: int (C, H, W). Cells of
    2x2 pixels, of which masks are made, are of one kind."""
    parts = len(shapes.masks), len(shapes.pairs), len(shapes.weaves)
    mask, pair, weave = np.indices(parts).reshape(3, -1)
    return 6 * shapes.colours(shapes.masks[mask], pair) + weave[:, None, None]


def pmfs_of(shapes, views):
    """Of each view, coarsest first, the pmf of a sub-pixel given the pixel's kind: (18, R, R,
    channels, levels), where R is 2 if it depends on the place in a cell of 2x2 pixels, or 1. Raises
    Problem."""
    if [type(view.psi) for view in views].count(Half) > 1:
        raise Problem(f"the split is for at most one Half, got {views[-1].name}")
    pmf = np.zeros((KINDS, 2, 2, 3, 256))
    for kind, row, column, channel in np.ndindex(pmf.shape[:4]):
        colour, weave = divmod(kind, 6)
        clean = shapes.values[2 * colour + shapes.weaves[weave, row, column], channel]
        reach = slice(clean - shapes.farthest, clean + shapes.farthest + 1)
        pmf[kind, row, column, channel, reach] = shapes.pmf
    pmfs = [pmf]
    for view in views[:0:-1]:
        pmfs.insert(0, pmf_of_view(pmfs[0], view.psi))
    return pmfs


def pmf_of_view(pmf, psi):
    """The pmf of psi(x), from that of x."""
    places = pmf.shape[1] // psi.cell
    made = np.zeros((KINDS, places, places, psi.channels_out, psi.levels_out))
    for kind, row, column, channel in np.ndindex(made.shape[:4]):
        block, _, low, width = block_of(psi, row, column, channel)
        pmfs = [pmf[kind, r, c, of] for r, c, of, _ in block]
        total = pmf_of_sum(pmfs, [weight for *_, weight in block])
        level = (np.arange(len(total)) - low) // width
        made[kind, row, column, channel] = np.bincount(level, total, psi.levels_out)
    return made


# --- Classes --------------------------------------------------------------------------------------


def class_edges(pmf, bound):
    """Of each channel of a view [0, .., levels]: class i is the levels edges[i]..edges[i + 1] - 1.

    Cuts are midway between neighbouring clean levels that are more than 2 bound apart. (Gray, of
    one channel, has no cuts: a single class.)
    """
    edges, (*_, channels, levels) = [], pmf.shape
    for channel in range(channels):
        clean = np.unique((pmf[..., channel, :] @ np.arange(levels)).round(6))
        far = (np.diff(clean) > 2 * bound) & (channels > 1)
        cuts = np.ceil((clean[:-1] + clean[1:])[far] / 2).astype(int)
        edges.append(np.array([0, *cuts, levels]))
    return edges


def class_bounds(x, edges):
    """(lo, hi), both ends included, of the class of each sub-pixel: int64 like x, uint8 array (N,
    channels, H, W)."""
    lo, hi = np.zeros(x.shape, np.int64), np.zeros(x.shape, np.int64)
    for channel, cuts in enumerate(edges):
        number = np.searchsorted(cuts, x[:, channel], side="right") - 1
        lo[:, channel], hi[:, channel] = cuts[number], cuts[number + 1] - 1
    return lo, hi


# --- The truth ------------------------------------------------------------------------------------


class Place:
    """The truth's prediction of a sub-pixel at one place of the cell, for each kind.

    Given x_hat the sum of its block is known up to `width`. What is left of that sum has a
    probability with every level, by the pmf of what the rest of the block can add.
    """

    def __init__(self, pmf, psi, place, edges):
        row, column, channel = place
        block, j, _, self.width = block_of(psi, row, column, channel)
        self.pmf, self.weight = pmf[:, row, column, channel], block[j][-1]  # (18, levels)
        later = [(pmf[:, r, c, of], weight) for r, c, of, weight in block[j + 1 :]]
        level = np.arange(self.pmf.shape[1])
        self.rest = cdf_of_sum(later)
        self.classes, self.edges = [], edges[channel]
        for first, end in zip(self.edges[:-1], self.edges[1:]):
            within = self.pmf * ((level >= first) & (level < end))
            self.classes.append(cdf_of_sum([(within, self.weight), *later]))

    def predict(self, value, low):
        """value: the level, low: the least sum of it and the rest of its block, int (N,) ->
        P(its class), P(the level), (18, N) each; 0 of kinds for which there is no such sum."""
        high = low + self.width - 1
        by_class = np.stack([mass(cdf, low, high) for cdf in self.classes])
        spent = self.weight * value
        of_level = self.pmf[:, value] * mass(self.rest, low - spent, high - spent)
        number = np.searchsorted(self.edges, value, side="right") - 1
        of_class = by_class[number, :, np.arange(len(value))].T
        whole = by_class.sum(0)
        whole[whole == 0] = 1.0
        return of_class / whole, of_level / whole


def cdf_of_sum(terms):
    """P(sum < b), b = 0, 1, .., for each kind, (18, ..). terms: (pmf (18, levels), weight)."""
    sums, done = [], {}  # done: as many kinds have the same pmf here
    for kind in range(KINDS):
        pmfs = [pmf[kind] for pmf, _ in terms]
        same = b"".join(pmf.tobytes() for pmf in pmfs)
        if same not in done:
            done[same] = pmf_of_sum(pmfs, [weight for _, weight in terms])
        sums.append(done[same])
    return np.pad(np.cumsum(sums, 1), [(0, 0), (1, 0)])


def mass(cdf, low, high):
    """P(low <= sum <= high), (18, N)."""
    last = cdf.shape[1] - 1
    return cdf[:, np.clip(high + 1, 0, last)] - cdf[:, np.clip(low, 0, last)]


def true_view(psi, pmf, edges, kinds, x, x_hat, posterior):
    """Of images x of a view, given x_hat: log p of the classes, and of the levels, each given all
    before and summed, nats (N,).

    posterior: P(configuration | x_hat), (N, C); changed to P(configuration | x).
    """
    n, channels, height, width = x.shape
    places = {place: Place(pmf, psi, place, edges) for place in np.ndindex(pmf.shape[1:4])}
    cell, repeat = psi.cell if psi else 1, pmf.shape[1]
    step = kinds.shape[1] // height  # pixels of X that a row of the view stands for
    _, _, offset, size = block_of(psi, 0, 0, 0)
    low = size * x_hat.astype(np.int64) + offset  # of the sums of the blocks
    log_class, log_level = np.zeros(n), np.zeros(n)
    for r, c, channel in np.ndindex(height, width, channels):
        place, value = places[r % repeat, c % repeat, channel], x[:, channel, r, c].astype(int)
        block = np.s_[:, min(channel, low.shape[1] - 1), r // cell, c // cell]
        of_class, of_level = place.predict(value, low[block])
        low[block] -= place.weight * value
        kind = kinds[:, step * r, step * c]  # (C,)
        share = posterior @ np.eye(KINDS)[kind]  # P(kind | before), (N, 18)
        p = (share * of_level.T).sum(1)
        log_class += np.log((share * of_class.T).sum(1))
        log_level += np.log(p)
        posterior *= of_level.T[:, kind] / p[:, None]
    return log_class, log_level


class Truth:
    """The truth of a model's chain on images, uint8 (N, H, W, 3) of `shapes`.

    log_class, log_level: of each factor, coarsest first, nats (factors, N).
    """

    def __init__(self, shapes, model, images):
        self.images, kinds = images, kinds_of(shapes)
        pmfs = pmfs_of(shapes, model.views)
        self.edges = [class_edges(pmf, shapes.farthest) for pmf in pmfs]
        posterior = np.full((len(images), len(kinds)), 1 / len(kinds))
        results = []
        pairs = model.pairs(to_tensor(images))
        for view, (x, x_hat), pmf, edges in zip(model.views, pairs, pmfs, self.edges):
            x_hat = np.zeros_like(x) if x_hat is None else x_hat.numpy()
            results.append(
                true_view(view.psi, pmf, edges, kinds, x.numpy(), x_hat, posterior))
        self.log_class, self.log_level = np.array(results).swapaxes(0, 1)

    def excess(self, model):
        """Of a model of this chain: (shape, texture), excess bits of each factor on each image,
        (factors, N). The model is cut to what each x_hat leaves possible, see `feasible`."""
        results = [[] for _ in model.factors]
        with evaluating(model):
            for x in to_tensor(self.images).split(64):
                for k, (view, x_hat) in enumerate(model.pairs(x)):
                    log_probs = class_and_level(model.factors[k], view, x_hat, self.edges[k])
                    results[k].append(torch.stack(log_probs))
        of_model = torch.stack([torch.cat(parts, 1) for parts in results], 1).double().numpy()
        shape = (self.log_class - of_model[0]) / math.log(2)
        return shape, (self.log_level - of_model[1]) / math.log(2) - shape

    def parts(self, model):
        """The excess of all factors together, bits of each image: {part: (N,)}."""
        shape, texture = self.excess(model)
        gray = np.array([view.label == Gray.label for view in model.views])
        return {"shape": shape[~gray].sum(0), "gray view": (shape + texture)[gray].sum(0),
                "texture": texture[~gray].sum(0)}


def class_and_level(factor, x, x_hat, edges):
    """A factor's log q of the classes, and of the levels, of images x, nats (N,) each.

    head.log_prob with bounds is log q(level) - log q(bounds), so that what the class takes off is
    found by two such bounds, those of x_hat and the same within the class.
    """
    head = factor.head(factor.params(x, factor.embeddings(x_hat)))
    lo, hi = torch.zeros_like(x).long(), torch.full_like(x, factor.view.levels - 1).long()
    if factor.view.psi is not None:
        lo, hi = factor.view.psi.bounds(x, x_hat)
    class_lo, class_hi = map(torch.from_numpy, class_bounds(x.numpy(), edges))
    within = head.log_prob(x, (torch.maximum(lo, class_lo), torch.minimum(hi, class_hi)))
    level = head.log_prob(x, (lo, hi))
    return (level - within).flatten(1).sum(1), level.flatten(1).sum(1)
