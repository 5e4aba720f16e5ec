"""PixelCNN models with auxiliary variables, in one file: read it from top to bottom, or run it.

    Kolesnikov & Lampert, "PixelCNN Models with Auxiliary Variables for Natural Image Modeling",
    ICML 2017 ("Sec." and "Eq." refer to it); Salimans et al., "PixelCNN++", ICLR 2017

The problem: a model that predicts an image pixel by pixel spends its capacity where the bits are,
and nearly all of them are texture. An image takes some three bits per sub-pixel (one channel of one
pixel). Few of these bits are about the shape of things, which is all that a person sees: a model
that ignores it loses next to nothing. So, the paper argues, it learns the cloth and not the coat.

The idea: model the image X together with a simpler view of itself, X^ = psi(X), gray or smaller, by
p(X, X^) = p(X^) p(X | X^). The view, which is poorer in texture, has a network of its own; and a
view may have a view in turn:  X_0 = X,  X_1 = psi_0(X_0),  ..,  X_K = psi_{K-1}(X_{K-1}),

    log p(X) >= log p(X_0, .., X_K) = log p(X_K) + log p(X_{K-1} | X_K) + .. + log p(X_0 | X_1)

It is a bound because p(X) is the sum of p(X, X^) over all X^, and a sum of terms that are 0 or more
is no smaller than any one of them. (X has one view only, psi(X). But the networks do not know that:
p(X | X^) gives X some probability under other X^, too. These are the other terms.) p(X_0 | X_1) is
given X_1 alone: X_2, .. are functions of X_1, and would add nothing.

    Eq. 1       p(X) = product of p(pixel | earlier ones)    Conv, CausalNet
    Eq. 2, 3    p(X, X^) = p(X^) p(X | X^)                   PixelAux.log_prob_factors, .sample
    Eq. 4, 5    the bound; factors are trained apart         PixelAux.log_prob, train_factor
    Sec. 3.1    X^ is a 4-bit gray image                     Gray, Categorical
    Sec. 3.2    X^ is half as large, recursively             Half
    Sec. 3.3    X^ enters through an embedding f_w(X^)       EmbeddingNet, Factor
    Sec. 4.2    MAP sampling, reduced variance               LogisticMixture: sample's mode, shift
    beyond      the bound made exact: "tight"                feasible, psi.bounds
    beyond      sampling in the time of a few passes         sample_fast

Words: a *view* is one of the X_i; a *factor* one term of the formula, with its networks. Lists
of both are coarsest first: code counts from the coarsest, formulas from X_0 = X. For example a
pyramid at 32x32, K = 2:

    views[0] = X_2     <-- psi_1 --     views[1] = X_1     <-- psi_0 --     views[2] = X_0 = X
    8x8                                 16x16                               32x32

    psi: None                           psi: psi_1                          psi: psi_0
    factors[0]                          factors[1]                          factors[2]
    p(X_2)                              p(X_1 | X_2)                        p(X_0 | X_1)

views[k] is X_{K-k}, and its psi, psi_{K-k}, makes the view before it. (model.views is a list of
View, which describe them; images are in lists of their own.)

A *level* is one of the values 0 .. levels - 1 of a sub-pixel. log_prob is in nats, of an image
unless said otherwise; bits/dim are bits per sub-pixel of X. Where we deviate from the paper, or the
paper is silent, the docstring concerned says so.
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import operator
import os
import pathlib
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import typing
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.fx.node import map_aggregate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__version__ = "1.0"
# What others build on, and what pydoc shows.
__all__ = """
    build load save PixelAux Config PRESETS MODELS Problem Psi Half Gray feasible LogisticMixture
    Categorical bits_per_dim sample_naive sample_fast evaluating
    Shapes Dataset load_data train_factor evaluate save_picture to_tensor to_array main""".split()


class Problem(ValueError):
    """Something that the user can mend: the command line prints it as one line, exit status 2."""


class Failure(Exception):
    """Training that cannot go on: one line, exit status 1."""


# --- psi: simpler views of an image ------------------------------------------------------------
#
# A view leaves information out, but it also rules images out. Take the four pixels of a 2x2 cell,
# in one channel, whose rounded mean is known to be 10: their sum is 38, 39, 40 or 41. If they are
# drawn one after the other, what is left for each of them is an interval of levels:
#
#     v1 is in 0..41, say 20;  then v2 + v3 + v4 is in 18..21
#     v2 is in 0..21, say 15;  then      v3 + v4 is in  3..6
#     v3 is in 0..6,  say  2;  then           v4 is in  1..4
#
# A network does not know this, and the paper's p(X | X^) wastes probability on images that have
# other views. If each distribution is cut to its interval and scaled to sum to 1 again, then p(X,
# X^) is 0 unless X^ = psi(X); the sum over X^ that makes p(X) has one term only, and the bound is
# an equality. We call this *tight*. It is another model with the same weights, whose log p(X) is
# known exactly, and is never below the paper's bound, as dividing by a mass of at most 1 only
# raises it. (The paper's own p(X), the whole sum, stays unknown. And a model that is trained tight
# has a poor bound, as nothing teaches it to keep to the intervals by itself.)


def feasible(values, weights, low, high, top):
    """Intervals of v1, v2, .., each given those before, that can still make low <= sum w v <= high.

    It is a budget: low and high are what is still to be spent, and each v takes w v from both.
    After it high - w v must be 0 or more, and low - w v no more than `rest`, what those after v can
    add with at most `top` each. So w v lies in low - rest .. high, and in 0 .. w top.

    values: int64 tensors, of which those not drawn yet may be anything, as lo[i] and hi[i] depend
    on the ones before i; weights: positive ints; low, high: int64 tensors. -> lists lo, hi.

    No interval is empty if (1) high >= 0, (2) low <= rest + w top, (3) high - low + 1 >= each
    weight (low .. high has 4 numbers for Half, 4096 for Gray). For, `rest` not counting v itself,

        low <= rest    v = 0 will do
        low > rest     the least v with w v >= low - rest will do: this w v exceeds low - rest by at
                       most w - 1, so, by (3), it is <= low - rest + w - 1 <= high - rest <= high;
                       and w top is a multiple of w that is >= low - rest, by (2), so v <= top

    At the start (1) and (2) hold, as some values have this view: the sum they make is in low ..
    high, and in 0 .. rest + w top. After any v of the interval all three hold for the next one: w v
    <= high is (1); w v >= low - rest is (2), as `rest` is what the next one's rest + w top will be;
    and high - low does not change.
    """
    lo, hi = [], []
    rest = top * sum(weights)
    for value, weight in zip(values, weights):
        rest = rest - top * weight  # the most that the values after this one can add
        least = (low - rest + weight - 1) // weight  # (low - rest) / weight, rounded up
        lo.append(least.clamp(0, top))
        hi.append((high // weight).clamp(0, top))
        low = low - weight * value
        high = high - weight * value
    return lo, hi


class Psi:
    """A function that makes a view. Likelihood and sampling know no more of it than:

    psi(x): uint8 (N, C, H, W) -> x_hat: uint8 (N, channels_out, H / cell, W / cell) of levels_out
    levels. Each of its pixels is made of `cell` x `cell` pixels of x (Half: 2, Gray: 1).

    psi.bounds(x, x_hat) -> (lo, hi), int64 of x's shape: the interval, both ends included, that is
    left for each sub-pixel by x_hat and the sub-pixels before it in its cell (raster order, then
    channels). Those after it may not be drawn yet, and make no difference. (This has nothing to do
    with the bound on log p.)
    """

    cell = 1
    label = ""  # in the names of views

    def __init__(self, channels=3, levels=256):
        """channels, levels: of x."""
        self.levels = levels
        self.channels_out, self.levels_out = channels, levels


class Half(Psi):
    """Half the resolution (Sec. 3.2): (sum of each 2x2 cell + 2) // 4, in each channel.

    Each view is made from the one before it. (The authors' demo shrinks the full image for each;
    then X_2 is not a function of X_1.)
    """

    cell = 2

    def __call__(self, x):
        return ((sum(self.four(x)) + 2) // 4).to(torch.uint8)

    def four(self, x):
        """The four pixels of each cell, in raster order: int64 (N, C, H / 2, W / 2) each."""
        four = F.pixel_unshuffle(x.long(), 2)  # (N, C * 4, ..), the four of channel 0 first
        return four.unflatten(1, (-1, 4)).unbind(2)

    def bounds(self, x, x_hat):
        low = 4 * x_hat.long() - 2  # the least sum with (sum + 2) // 4 = x_hat; low + 3 is the most
        lo, hi = feasible(self.four(x), (1, 1, 1, 1), low, low + 3, self.levels - 1)
        return self.joined(lo), self.joined(hi)

    def joined(self, values):
        """The inverse of `four`."""
        return F.pixel_shuffle(torch.stack(values, 2).flatten(1, 2), 2)


class Gray(Psi):
    """4-bit gray (Sec. 3.1): (77 R + 150 G + 29 B) >> 12, one channel of 16 levels.

    The paper does not say how gray is computed: this is the luma of ITU-R BT.601 in integers. A
    level of the view leaves 4096 sums, and no weight may be larger (see feasible). Fewer levels of
    x have larger weights, so it must have 16 or more.
    """

    label = "gray"

    def __init__(self, channels=3, levels=256):
        if channels != 3 or levels < 16 or 255 % (levels - 1):
            raise Problem("gray needs 3 channels of 16 levels or more, levels - 1 dividing 255, "
                          f"got {channels=}, {levels=}")
        self.levels, self.channels_out, self.levels_out = levels, 1, 16
        # They sum to 256, and >> 12 divides by 256 and by 16. Fewer levels are spread over 0..255.
        self.weights = [weight * 255 // (levels - 1) for weight in (77, 150, 29)]

    def __call__(self, x):
        luma = sum(weight * value for weight, value in zip(self.weights, x.long().split(1, 1)))
        return (luma >> 12).to(torch.uint8)

    def bounds(self, x, x_hat):
        low = 4096 * x_hat.long()
        lo, hi = feasible(x.long().split(1, 1), self.weights, low, low + 4095, self.levels - 1)
        return torch.cat(lo, 1), torch.cat(hi, 1)


# A model is its list of psi, in the order in which they are applied, from X on. Half stands for as
# many of it as `halvings` says.
MODELS = {
    "pixelcnn": [],
    "grayscale": [Gray],
    "pyramid": [Half],
    "grayscale-pyramid": [Gray, Half],  # which the paper leaves to future work (Sec. 5)
}


# --- Heads: the distribution of one pixel ------------------------------------------------------
#
# A head turns the numbers that the network puts out for a pixel, its parameters, into a
# distribution over its levels: it has log_prob and sample.
#
# 256 probabilities, each a number of its own, would not know that level 100 is near level 101. So
# PixelCNN++ takes a mixture of logistic distributions on the line (bells much like Gaussians, but
# with sigma(z) = 1 / (1 + e^-z) as cdf) and gives each level the mass of its bin. Levels stand on
# -1 .. 1, 2/255 apart; so a bin reaches 1/255 to both sides of its level. The first and the last
# bin are open: what lies beyond belongs to them, and the masses sum to 1.
#
#     level      0     1     2    ..   254   255            mass of a bin:
#     bin   -inf   |  .  |  .  |  .. |  .  |   +inf         sigma((right edge - mean) / scale)
#                                                           - sigma((left edge - mean) / scale)
#
# Red, green and blue of a pixel go together: so all three have the mixture's component in common,
# and green's mean moves with the red that was drawn, blue's with both.


def to_unit(x, levels, dtype):
    """Levels 0 .. levels - 1 -> -1 .. 1."""
    return x.to(dtype) * (2.0 / (levels - 1)) - 1.0


def bits_per_dim(log_prob, dims):
    """Nats of an image -> bits per dimension. log_prob: a float, array or tensor."""
    return -log_prob / (dims * math.log(2))


def edges(means, log_scales, lo, hi, levels):
    """(a, b): the left edge of lo's bin and the right one of hi's, as (edge - mean) / scale."""
    half_bin, inverse = 1.0 / (levels - 1), torch.exp(-log_scales)
    a = (to_unit(lo, levels, means.dtype) - half_bin - means) * inverse
    b = (to_unit(hi, levels, means.dtype) + half_bin - means) * inverse
    return a, b


def log_mass(means, log_scales, lo, hi, levels):
    """Log of a logistic's mass on the levels lo..hi. All arguments broadcast.

    With sigma(b) = e^b / (1 + e^b) and sigma(-a) = 1 / (1 + e^a)

        sigma(b) - sigma(a) = (e^b - e^a) / ((1 + e^b) (1 + e^a)) = sigma(b) sigma(-a) (1 - e^(a-b))
        its log             = log sigma(b) + log sigma(-a) + log(1 - e^(a-b))

    At the last level b is infinite, which leaves log sigma(-a); at level 0 a is -infinite, which
    leaves log sigma(b). (`edges` does not know of open bins, and returns finite a and b there, too:
    masked_fill makes 0 of the terms that vanish.) This is exact and stable everywhere. (Code that
    is widely copied takes the density where the mass is below 1e-5: the masses of all levels then
    sum to as little as 1 - 1.4e-5.)
    """
    a, b = edges(means, log_scales, lo, hi, levels)
    # b - a, not by subtraction: both are large and nearly equal where a bin is narrow and far off.
    width = (hi - lo + 1).to(means.dtype) * (2.0 / (levels - 1)) * torch.exp(-log_scales)
    first, last = lo == 0, hi == levels - 1
    below_b = F.logsigmoid(b).masked_fill(last, 0.0)
    above_a = F.logsigmoid(-a).masked_fill(first, 0.0)
    between = torch.log(-torch.expm1(-width))  # 1 - e^(a-b)
    return below_b + above_a + between.masked_fill(first | last, 0.0)


def pick(log_weights, u):
    """Draw an index in dim 1 by inverse cdf. log_weights: (N, K, H, W), up to a constant; u: (N, H,
    W)."""
    cdf = log_weights.softmax(1).cumsum(1)
    # Times the last value, which is 1 but for rounding.
    index = (cdf < u.unsqueeze(1) * cdf[:, -1:]).sum(1, keepdim=True)
    return index.clamp(max=log_weights.shape[1] - 1)


class LogisticMixture:
    """Mixture of K discretized logistics over (R, G, B) (PixelCNN++ Sec. 2.1, 2.2).

    params: (N, 10 K, H, W), in PixelCNN++'s order, K of each:

        mixture logits
        R's means, log-scales;  coefficients of R in G's mean
        G's means, log-scales;  coefficients of R in B's mean
        B's means, log-scales;  coefficients of G in B's mean

    (mind: those in R's and G's row are for the mean of another channel). levels: of a sub-pixel.
    shift: added to the log-scales; below 0 it reduces the variance (Sec. 4.2 subtracts constants).
    """

    def __init__(self, params, levels=256, shift=0.0):
        if params.shape[1] % 10:
            raise Problem(f"a mixture takes 10 K channels of parameters, got {params.shape[1]}")
        k = params.shape[1] // 10
        params = params.to(torch.promote_types(params.dtype, torch.float32)).contiguous()
        by_channel = params[:, k:].unflatten(1, (3, 3 * k))  # (N, 3, 3 K, H, W)
        self.levels = levels
        self.logit_probs = params[:, :k]  # (N, K, H, W)
        self.means = by_channel[:, :, :k]  # (N, 3, K, H, W), as the next two
        # PixelCNN++'s clamp: at -7 half a bin is e^7 / 255 = 4.3 scales, and one level holds 97% of
        # a component centred on it. 7 is ours, so that exp stays finite.
        self.log_scales = by_channel[:, :, k : 2 * k].clamp(-7.0, 7.0) + shift
        # In dim 1 R in G, R in B, G in B; within -1 .. 1, as PixelCNN++'s.
        self.coeffs = by_channel[:, :, 2 * k :].tanh()

    @staticmethod
    def set_bias(bias):
        """Set the network's last bias, (10 K,): means spread over the range, scales well below it.

        PixelCNN++ starts with components as wide as the range, which all have to find places. Here
        exp(-2.5) = 0.08 is two fifths of the distance between ten of them.
        """
        k = len(bias) // 10
        by_channel = bias[k:].view(3, 3 * k)
        by_channel[:, :k] = torch.linspace(-0.9, 0.9, k)
        by_channel[:, k : 2 * k] = -2.5

    def means_given(self, c, x):
        """Means of channel c given x, a list that begins with the channels before, (N, 1, H, W)
        each."""
        means = self.means[:, c]  # (N, K, H, W)
        for j in range(c):
            unit = to_unit(x[j], self.levels, means.dtype)
            which = c - 1 + j  # R in G: 0, R in B: 1, G in B: 2
            means = torch.addcmul(means, self.coeffs[:, which], unit)
        return means

    def log_prob(self, x, intervals=None):
        """x: uint8 (N, 3, H, W) -> nats of each pixel, (N, H, W), its channels together.

        intervals = (lo, hi) of psi.bounds: each channel's mixture is cut to its interval. With w_k
        the weights and m_k a component's mass on a value, it is without intervals

            p(r, g, b) = sum_k w_k m_k(r) m_k(g | r) m_k(b | r, g)

        (.. | r: green's mean has moved with r). With them each of p(r), p(g | r) and p(b | r, g) is
        divided by what the mixture gives to all that is allowed. With M_k, a component's mass on an
        interval:

            p'(r)     = sum_k w_k m_k(r) / sum_k w_k M_k(r's interval)
            p'(g | r) = sum_k w_k m_k(r) m_k(g | r) / sum_k w_k m_k(r) M_k(g's interval | r)

        Given r, component k has the weight w_k m_k(r). (The cut of red has divided the weights of
        all by one number. It stands above and below in p'(g | r), and cancels.) Blue likewise, with
        the weights w_k m_k(r) m_k(g | r). (If each component were cut by itself, one with hardly
        any mass on the interval would keep all of its weight there.)
        """
        x = x.long().unsqueeze(2)  # (N, 3, 1, H, W)
        means = torch.stack([self.means_given(c, x.unbind(1)) for c in range(3)], 1)
        log_masses = log_mass(means, self.log_scales, x, x, self.levels)  # (N, 3, K, H, W)
        log_weights = self.logit_probs.log_softmax(1)  # (N, K, H, W)
        if intervals is None:
            return (log_weights + log_masses.sum(1)).logsumexp(1)
        lo, hi = (ends.unsqueeze(2) for ends in intervals)
        log_allowed = log_mass(means, self.log_scales, lo, hi, self.levels)  # M
        # The log of the weights so far: of w_k, then w_k m_k(r), then w_k m_k(r) m_k(g | r), ..
        total, log_joint = 0.0, log_weights
        for channel in range(3):
            total = total - (log_joint + log_allowed[:, channel]).logsumexp(1)  # denominator
            log_joint = log_joint + log_masses[:, channel]
            total = total + log_joint.logsumexp(1)  # numerator
        return total

    def sample(self, noise, mode="random", interval_of=None):
        """Draw every pixel from given noise -> int64 (N, 3, H, W). (Given, so that an image does
        not depend on the order in which its pixels are drawn.)

        noise: uniform in (0, 1), (N, 6, H, W), of which

        index     0                1    2                3    4                5
        plain     the component    R    unused           G    unused           B
        tight     R's component    R    G's component    G    B's component    B    (sample_tight)

        "random" draws values from the component, by the inverse of the logistic's cdf, which is the
        logit; "map" draws the component, too, but takes its means: the image without the noise
        around it (what the paper calls MAP sampling, Sec. 4.2). Each channel is rounded, which
        sends exactly the level's bin to it, before the next is conditioned on it; without that,
        samples have another distribution than log_prob. interval_of: see sample_tight.
        """
        if interval_of is not None:
            return self.sample_tight(noise, mode, interval_of)
        picked, x = self.component(pick(self.logit_probs, noise[:, 0])), []
        from_mean = torch.zeros_like(picked.means)  # (N, 3, 1, H, W)
        if mode == "random":
            from_mean = picked.log_scales.exp() * noise[:, 1::2].logit().unsqueeze(2)
        for c in range(3):
            x.append(self.round(picked.means_given(c, x) + from_mean[:, c]))
        return torch.cat(x, 1)

    def sample_tight(self, noise, mode, interval_of):
        """The same from the mixtures cut to intervals, as in log_prob.

        interval_of(x) -> (lo, hi) of the channel after those in the list x, (N, 1, H, W) each: a
        function, as green's interval depends, by Gray, on the red that was drawn.

        For each channel a component is drawn, by its weight so far times its mass on the interval,
        M; then a value from it, within the interval; then its weight so far is multiplied by the
        mass of that value, m.

        Why a component for each channel? For green it is

            p'(g | r) = sum_k w_k m_k(r) M_k(g's interval | r) / total    times    m_k(g | r) / M_k

        where the first factor is what k is drawn by, and the second what g is drawn by. Red's k was
        drawn by w_k M_k(red's interval), and has w_k m_k(r) once r is known: M_k(g's interval | r)
        is missing. (Without intervals that is 1, and one k for all channels will do. "map" takes
        red's for all three nevertheless, so that a pixel's channels belong together.)
        """
        x, log_joint = [], self.logit_probs.log_softmax(1)  # as in log_prob
        for c in range(3):
            lo, hi = interval_of(x)
            means, log_scales = self.means_given(c, x), self.log_scales[:, c]
            log_allowed = log_mass(means, log_scales, lo, hi, self.levels)
            k = pick(log_joint + log_allowed, noise[:, 2 * c])
            mean, log_scale = means.gather(1, k), log_scales.gather(1, k)
            value = mean
            if mode == "map":
                # All weight on k, so that it is drawn for the next channel, too.
                log_joint = torch.full_like(log_joint, -math.inf).scatter(1, k, 0.0)
            else:
                a, b = edges(mean, log_scale, lo, hi, self.levels)
                a = a.masked_fill(lo == 0, -math.inf)
                b = b.masked_fill(hi == self.levels - 1, math.inf)
                logistic = logistic_between(a, b, noise[:, 2 * c + 1].unsqueeze(1))
                value = mean + log_scale.exp() * logistic
            x.append(self.round(value).clamp(lo, hi))
            # By m alone, without M: see above.
            log_joint = log_joint + log_mass(means, log_scales, x[c], x[c], self.levels)
        return torch.cat(x, 1)

    def component(self, k):
        """Component k, (N, 1, H, W), of each pixel's mixture, as a mixture of one. (Its
        logit_probs, still those of all, are not used.)"""
        one = copy.copy(self)
        k = k.unsqueeze(1).expand(-1, 3, -1, -1, -1)  # for R, G and B
        one.means, one.log_scales = self.means.gather(2, k), self.log_scales.gather(2, k)
        one.coeffs = self.coeffs.gather(2, k)
        return one

    def round(self, unit):
        """-1 .. 1 -> levels, int64. What lies beyond goes to the first and the last, as their bins
        are open."""
        top = self.levels - 1
        return ((unit + 1) * (top / 2)).round().clamp(0, top).long()


def logistic_between(a, b, u):
    """The standard logistic cut to (a, b), which may be infinite, at its quantile u, by which
    sample_tight draws: the z with sigma(z) = sigma(a) + u (sigma(b) - sigma(a)).
    """
    # Far to the right sigma rounds to 1, far to the left it keeps its digits (sigma(40) is 1 in
    # float64, sigma(-40) is 4.2e-18). And sigma(-z) = 1 - sigma(z). So an interval on the right is
    # mirrored: -z lies between -b and -a, at 1 - u.
    flip = a + b > 0  # False also if both are infinite, as -inf + inf is nan
    low = torch.where(flip, -b, a)
    high = torch.where(flip, -a, b)
    u = torch.where(flip, 1 - u, u)
    # With ratio = sigma(low) / sigma(high)
    #
    #     sigma(z) = sigma(low) + u (sigma(high) - sigma(low)) = sigma(high) (ratio + u (1 - ratio))
    #
    # and z is its logit. All by logs, as sigma may be too small for a number. (Without a cut ratio
    # is 0, and z the logit of u, as in `sample`.)
    ratio = torch.exp(F.logsigmoid(low) - F.logsigmoid(high))
    log_cdf = F.logsigmoid(high) + torch.log(ratio + u * (1 - ratio))
    z = log_cdf - torch.log(-torch.expm1(log_cdf))  # logit p = log p - log(1 - p)
    return torch.where(flip, -z, z)


def cut(logits, lo, hi):
    """Logits (N, levels, H, W), -inf outside lo..hi, (N, 1, H, W) each."""
    level = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    return logits.masked_fill((level < lo) | (level > hi), -math.inf)


class Categorical:
    """Softmax over the levels of a one-channel image (Sec. 3.1): 16 are few enough to learn each by
    itself. params: (N, levels, H, W).

    shift: the logits are divided by exp(shift), so that below 0 it reduces the variance, too.
    """

    def __init__(self, params, levels=None, shift=0.0):
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        self.logits = params * math.exp(-shift)

    @staticmethod
    def set_bias(bias):
        """Nothing to set: equal logits are uniform."""

    def log_prob(self, x, intervals=None):
        """x: uint8 (N, 1, H, W) -> nats (N, H, W); intervals = (lo, hi) of psi.bounds."""
        logits = self.logits if intervals is None else cut(self.logits, *intervals)
        return logits.log_softmax(1).gather(1, x.long()).squeeze(1)

    def sample(self, noise, mode="random", interval_of=None):
        """noise: uniform (N, 2, H, W), of which the first is used -> int64 (N, 1, H, W). "map"
        takes the most probable level. interval_of: as in LogisticMixture.sample_tight."""
        logits = self.logits if interval_of is None else cut(self.logits, *interval_of([]))
        return logits.argmax(1, keepdim=True) if mode == "map" else pick(logits, noise[:, 0])


# --- Causal convolutions -----------------------------------------------------------------------
#
# By Eq. 1 what the network says of pixel o may depend on the pixels before o, in raster order, and
# on no others. A kernel that reads the row above, up to one column to the right, and in its own
# row what is left of o, sees to that. But a stack of such layers is blind: a step to the right is
# to be had only together with a step up, so that however many layers there are, the pixels marked
# "?" are never seen, though they come before o. Therefore PixelCNN++ (after Gated PixelCNN) has two
# streams of layers:
#
#     one stream, blind        v, the vertical stream     h, the horizontal stream
#     x x x x x x x x          x x x x x x x x            reads h to the left and above,
#     x x x x x x x ?          x x x x x x x x            and v at its own place, which
#     x x x x x x ? ?          x x x x x x x x            has seen all the rows above
#     x x x x o                        o                  (x: seen by way of all layers)
#
# v's first layer reads the rows above alone: a value of v that stands at row r, in whatever column,
# is made of rows above r. So v's other layers may read v in o's row, and to the right of o: no
# pixel of that row comes in. Likewise h's first layers leave out, of o's row, o and what is to the
# right of it, and its others may read h at o. h reads v. v must not read h: v at c reads v at c +
# 1; if that had read h at c + 1, which has seen pixel c, v at c would know the pixel that is to be
# predicted.


class Conv(nn.Module):
    """Weight-normalised convolution that reads `rows` and `columns` around its output, inclusive.
    (Direction and length of the weights are trained apart. A first pass sets the lengths, so
    that the outputs of all layers begin at one scale: data_dependent_init.)

        stride 1 or 2    out(p) = b + sum over d of w_d in(stride p + d)
        up               the same with stride 1, of `in` with zeros between its values, a 0 b 0 c 0:
                         it doubles height and width, on PixelCNN++'s way back

    d = (dy, dx) runs over rows x columns, and `in` is 0 outside the image. Causality is a matter of
    the two ranges (others multiply a larger kernel by a mask: a masked convolution):

        VERTICAL   HORIZONTAL     v_first    h_above    h_left
         x x x        x x          x x x      x x x       x
         x(x)x        x(x)         x x x        o         x o
                                     o

    x is read; (x) is the output's own place, which is read; o is that place where it is not read.
    (v_first, h_above and h_left are the first layers of CausalNet. As in PixelCNN++ h_left also
    reads the pixel above its left one, which h_above has already.)
    """

    def __init__(self, c_in, c_out, rows, columns, stride=1, up=False, gain=1.0,
                 outermost=False):
        super().__init__()
        # Required: that a kernel reaches up at least as far as down, and left as far as right, as
        # rows (-2, -1), (-1, 0) and (-1, 1) do, but not (0, 1). Then torch can pad both sides
        # alike, and we cut off what is too much.
        if stride not in (1, 2) or (up and stride > 1):
            raise Problem(f"Conv cannot have {stride=}, {up=}: expected stride 1 or 2, or up")
        for first, last in (rows, columns):
            if not first <= last <= -first:
                raise Problem(f"Conv cannot read {rows=}, {columns=}: expected first <= last <= "
                              "-first")
        self.rows, self.columns, self.stride, self.up = rows, columns, stride, up
        self.gain = gain  # the standard deviation of its outputs after data_dependent_init
        # Whether it is a network's first or last layer (of f_w the first): these compute in float32
        # in bfloat16 training, too, and are trained by Adam, whatever trains the others (see
        # Optimizer).
        self.outermost = outermost
        kernel = (rows[1] - rows[0] + 1, columns[1] - columns[0] + 1)
        # Salimans & Kingma 2016: v is a weight's direction (not the stream v), g its length.
        self.v = nn.Parameter(0.05 * torch.randn(c_out, c_in, *kernel))
        self.g = nn.Parameter(gain * torch.ones(c_out))
        self.b = nn.Parameter(torch.zeros(c_out))

    def weight(self):
        """g v / |v|, the norm over all but the output channels: (C_out, C_in, rows, columns)."""
        weight = self.v * (self.g / self.v.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        # (`up` stores v turned by 180 degrees, as old files have it: a matter of storage alone.)
        return weight.flip(2, 3) if self.up else weight

    def forward(self, x):
        """(N, C_in, H, W) -> (N, C_out, H, W), or half or twice the height and width."""
        # (Skip this: x may be a stand-in without numbers, which notes the call. See Tracing.)
        if isinstance(x, Symbol):
            return x.recorder.convolution(self, x)
        if not self.outermost:
            return self.convolve(x, self.weight(), self.b)
        # bfloat16 rounds numbers near 1 by up to 1/512, a quarter of the distance between levels.
        with torch.autocast(x.device.type, enabled=False):
            return self.convolve(x.to(self.v.dtype), self.weight(), self.b)

    def convolve(self, x, weight, bias):
        if self.up:
            x = zeros_between(x)
        # torch pads both sides alike: as much as the upper left needs. What is too much is cut off
        # below and on the right. (With columns (-1, 0) of a b c it makes 0 a b c 0, and of that 0a,
        # ab, bc, c0: the last one is too much.)
        y = F.conv2d(x, weight, bias, self.stride, padding=(-self.rows[0], -self.columns[0]))
        height, width = x.shape[2:]
        return y[:, :, : height // self.stride, : width // self.stride]


def zeros_between(x):
    """(N, C, H, W) -> (N, C, 2 H, 2 W): of a b c, in rows and in columns, a 0 b 0 c 0."""
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    y = y.contiguous(memory_format=torch.channels_last)
    y[:, :, ::2, ::2] = x
    return y


VERTICAL = dict(rows=(-1, 0), columns=(-1, 1))
VERTICAL_LEFT = dict(rows=(-1, 0), columns=(-2, 0))  # if look_right is False, see Sampling fast
# PixelCNN++'s: it has row -1, though h reads v, which has seen that.
HORIZONTAL = dict(rows=(-1, 0), columns=(-1, 0))
ORDINARY = dict(rows=(-1, 1), columns=(-1, 1))
POINT = dict(rows=(0, 0), columns=(0, 0))


@torch.no_grad()
def data_dependent_init(network, *inputs):
    """PixelCNN++'s start: one pass, in which each Conv in turn is given the g and b that make its
    outputs have mean 0 and standard deviation `gain` in every channel."""

    def normalise(conv, given):  # just before its turn, when those before it are done
        conv.g.fill_(1.0)
        y = conv.convolve(given[0].to(conv.v.dtype), conv.weight(), None)
        std, mean = torch.std_mean(y.transpose(0, 1).flatten(1), 1)
        g = torch.where(std > 1e-5, conv.gain / std, conv.gain)  # std 0: a constant channel
        conv.g.copy_(g)
        conv.b.copy_(-mean * g)

    convs = [module for module in network.modules() if isinstance(module, Conv)]
    hooks = [conv.register_forward_pre_hook(normalise) for conv in convs]
    network(*inputs)
    for hook in hooks:
        hook.remove()


# --- Networks ----------------------------------------------------------------------------------
#
# A network is a sequence of residual *blocks* (two convolutions, whose result is added to what they
# are given: drawn at Block), in stages; in a causal one each is a pair, one for v and one for h.
# Its *layout* lists the stages, each (times halved, blocks). 0 times is always the resolution of x,
# the image that is modelled. PixelCNN++ goes down to a quarter of the resolution, so that few
# blocks see far, and comes back. On the way back each block also reads, by a *skip*, what its
# counterpart on the way down has made, as that has the detail. With 2 blocks a stage,
# six_stages(2),
#
#     ((0, 2), (1, 2), (2, 2), (2, 2), (1, 2), (0, 2))
#
# the blocks are, in order, a1, a2, b1, .., f2, and their skips those in parentheses:
#
#     H x W        a1 a2                                                f1(a2) f2(a1)
#     H/2 x W/2           b1 b2                           e1(b2) e2(b1)
#     H/4 x W/4                  c1 c2   d1(c2) d2(c1)
#
# The pyramid's causal networks are *light*, ((0, 3),): three blocks at one resolution. They see
# only what is near, but X^ tells them the rest; and the smallest view, 8x8, is all near. They are
# sampled fast, see there.
#
# The embedding f_w knows X^ whole, and has one stream. Its layout, too, counts from x: if X^ is x
# halved once, it begins with (1, ..). embeddings[i] is its last output at x's resolution halved i
# times, which a causal network's blocks at that resolution read (those of a light network, which
# has one resolution, read embeddings[0]). If x is 16x16, and X^ 8x8,
#
#     layout        (1, 3),         (2, 6),         (1, 3),         (0, 3)
#     it has        3 blocks, 8x8   6 blocks, 4x4   3 blocks, 8x8   3 blocks, 16x16
#                                                   with skips
#     and makes                     embeddings[2]   embeddings[1]   embeddings[0]
#
# (embeddings[1] is taken after the third stage, not after the first: it has seen more, and has the
# first one's outputs by skips.)
#
# The pyramid at 32x32 (N images, F filters, K mixture components):
#
#     factor           x              f_w(x_hat)                         causal network
#     8x8              N 3 8 8        none                               N F 8 8   -> N 10K 8 8
#     16x16 | 8x8      N 3 16 16      N 3 8 8 -> 4x4 -> 8x8 -> 16x16     N F 16 16 -> N 10K 16 16
#     32x32 | 16x16    N 3 32 32      N 3 16 16 -> 8x8 .. -> 32x32       N F 32 32 -> N 10K 32 32
#
# (Networks get a fourth channel of ones, see Factor.planes.)
#
# A change of resolution lets no later pixel in. Let h[p] be h in column p of a row: it has seen the
# pixels before p (and rows above, which do no harm). On the way down kernels of columns -1 and 0
# make half[q] of h[2 q - 1] and h[2 q]: so it has seen those before 2 q. On the way up they read
# half[0] 0 half[1] 0 ..: up[2 q] reads 0 and half[q], up[2 q + 1] half[q] and 0. So both have seen
# those before 2 q, and are allowed to.
#
#     pixels                  0 1 2 3 4 5 6 7
#     h[5] has seen           x x x x x
#     h[6] has seen           x x x x x x
#     half[3] reads both      x x x x x x
#     up[6] reads half[3]     x x x x x x      allowed: those before 6
#     up[7] reads half[3]     x x x x x x      allowed: those before 7 (6 comes by the skip)
#
# (Blocks at half the resolution change nothing: half[q] reads itself and what is to its left. For v
# the same holds with rows: half's row q is made of v's rows 2 q - 1 and 2 q, and has seen the rows
# before 2 q; up's rows 2 q and 2 q + 1 read it, and row 2 q comes to the latter by the skip.)


def six_stages(blocks):
    """The layout of PixelCNN++: down to a quarter of the resolution, and back."""
    return tuple((halved, blocks) for halved in (0, 1, 2, 2, 1, 0))


def skip_source(layout, i, j):
    """Where block j of stage i has its skip from, as (stage, block): the last stage before at its
    resolution, whose blocks are taken from the last to the first. None if there is no such stage,
    or if it has fewer blocks."""
    halved = layout[i][0]
    earlier = [k for k in range(i) if layout[k][0] == halved]
    if not earlier or j >= layout[earlier[-1]][1]:
        return None
    return earlier[-1], layout[earlier[-1]][1] - 1 - j


def pointwise(function):
    """Marks a function that treats each position by itself. (Skip this until Tracing: for tensors
    it changes nothing. sample_fast notes a call of it as one node, and does not look into it.)"""

    @functools.wraps(function)
    def marked(*values, **options):
        for value in (*values, *options.values()):
            if isinstance(value, Symbol):
                return value.recorder.record(function, values, options)
        return function(*values, **options)

    return marked


@pointwise
def concat_elu(x):
    """(N, C, ..) -> (N, 2 C, ..): elu of x and of -x, so that neither sign is lost (PixelCNN++)."""
    return F.elu(torch.cat([x, -x], 1), inplace=True)


@pointwise
def gate(x, y):
    """x + a sigmoid(b), where a and b are the halves of y: (N, C, ..), (N, 2 C, ..) -> (N, C, ..).
    b decides how much of a is let through, value by value."""
    a, b = y.chunk(2, 1)
    return torch.addcmul(x, a, torch.sigmoid(b))


class Block(nn.Module):
    """Gated residual block (PixelCNN++): two convolutions, the second one gated, added to x; side
    inputs come in between. reach: rows and columns of both, as VERTICAL.

        x --> concat_elu --> conv_in --> + --> concat_elu --> conv_out --> a sigmoid(b) --> + -->
        |                                ^                                                  ^
        |                           side inputs                                             |
        +-----------------------------------------------------------------------------------+

    Side inputs, each by a conv_aux (the name is PixelCNN++'s, and has nothing to do with auxiliary
    variables), in this order: v, in the blocks of h; a skip, where there is one; the embedding of
    X^. (Who calls a block passes concat_elu of these.)
    """

    def __init__(self, filters, nr_aux, reach, dropout):
        super().__init__()
        self.dropout = dropout
        self.conv_in = Conv(2 * filters, filters, **reach)
        self.conv_aux = nn.ModuleList(Conv(2 * filters, filters, **POINT) for _ in range(nr_aux))
        # A block begins close to the identity.
        self.conv_out = Conv(2 * filters, 2 * filters, **reach, gain=0.1)

    def forward(self, x, *aux):
        """x: (N, F, H, W); aux: concat_elu of side inputs, (N, 2 F, H, W) -> (N, F, H, W)."""
        hidden = self.conv_in(concat_elu(x))
        for conv, a in zip(self.conv_aux, aux, strict=True):
            hidden = hidden + conv(a)
        hidden = F.dropout(concat_elu(hidden), self.dropout, self.training)
        return gate(x, self.conv_out(hidden))


class Stage(nn.Module):
    """The modules of stage i of a layout, which CausalNet and EmbeddingNet run.

    reaches, nr_aux_without_skips: for each stream its kernel, and the number of its side inputs.
    enter: if the resolution changes, a convolution for each stream. blocks: lists of a Block for
    each stream.
    """

    def __init__(self, layout, i, filters, dropout, reaches, nr_aux_without_skips):
        super().__init__()
        self.halved, nr_blocks = layout[i]
        halved_before = layout[i - 1][0] if i > 0 else self.halved
        self.enter, self.blocks = nn.ModuleList(), nn.ModuleList()
        if self.halved != halved_before:
            change = dict(stride=2) if self.halved > halved_before else dict(up=True)
            self.enter.extend(Conv(filters, filters, **reach, **change) for reach in reaches)
        for j in range(nr_blocks):
            streams = nn.ModuleList()
            nr_skips = 0 if skip_source(layout, i, j) is None else 1
            for reach, nr in zip(reaches, nr_aux_without_skips):
                streams.append(Block(filters, nr + nr_skips, reach, dropout))
            self.blocks.append(streams)


def multiple_of(layout):
    """What height and width must be multiples of, so that they can be halved and doubled so."""
    halved = [halved for halved, _ in layout]
    return 2 ** (max(halved) - min(halved))


def check_layout(layout, doublings=0):
    """Raises Problem if it does not lead to x's resolution, from `doublings` times less."""
    halved = [halved for halved, _ in layout]
    apart = [abs(b - a) for a, b in itertools.pairwise(halved)]
    if halved[:1] + halved[-1:] != [doublings, 0] or min(halved) < 0 or max(apart, default=0) > 1:
        raise Problem(f"layout {layout}: expected stages (times halved, blocks), the first one "
                      f"{doublings:g} times halved, the last one 0, neighbours 0 or 1 apart, none "
                      "below 0")


class CausalNet(nn.Module):
    """PixelCNN++, or a light network of the pyramid, by its layout: the parameters of every pixel's
    distribution from the pixels before it.

    Deviation: all six stages have as many blocks, 6 x 6 = 36 and 6 x 4 = 24 as in the paper.
    PixelCNN++'s code (for who knows it) also has skips from the first and from the strided layers,
    and for these one block more in each of two stages on the way up.
    """

    def __init__(self, c_in, c_out, layout, filters, dropout, conditional, look_right=True):
        super().__init__()
        self.layout, self.conditional = layout, conditional
        # Rows -2 and -1 as in PixelCNN++, though one would do. h's first layer reads no rectangle,
        # so it is two. look_right: see VERTICAL_LEFT.
        self.v_first = Conv(c_in, filters, rows=(-2, -1), columns=(-1, 1), outermost=True)
        self.h_above = Conv(c_in, filters, rows=(-1, -1), columns=(-1, 1), outermost=True)
        self.h_left = Conv(c_in, filters, rows=(-1, 0), columns=(-1, -1), outermost=True)
        reaches = (VERTICAL if look_right else VERTICAL_LEFT, HORIZONTAL)
        # Not counting skips: v's blocks read the embedding, h's also v.
        without_skips = (int(conditional), 1 + int(conditional))
        self.stages = nn.ModuleList(
            Stage(layout, i, filters, dropout, reaches, without_skips) for i in range(len(layout)))
        # Its outputs begin near the bias, which the head sets (set_bias).
        self.last = Conv(filters, c_out, **POINT, gain=0.03, outermost=True)

    def forward(self, x, embeddings=()):
        """x: (N, C_in, H, W); embeddings: number i has x's resolution, halved i times.

        -> (N, C_out, H, W).
        """
        v = self.v_first(x)
        h = self.h_above(x) + self.h_left(x)
        made = {}  # (stage, block) -> its outputs
        for i, stage in enumerate(self.stages):
            embedding = [concat_elu(embeddings[stage.halved])] if self.conditional else []
            if stage.enter:
                v_enter, h_enter = stage.enter
                v, h = v_enter(v), h_enter(h)
            for j, (vertical, horizontal) in enumerate(stage.blocks):
                v_skip, h_skip = [], []
                if source := skip_source(self.layout, i, j):
                    v_before, h_before = made[source]
                    v_skip, h_skip = [concat_elu(v_before)], [concat_elu(h_before)]
                v = vertical(v, *v_skip, *embedding)
                h = horizontal(h, concat_elu(v), *h_skip, *embedding)
                made[i, j] = v, h
        return self.last(F.elu(h))


class EmbeddingNet(nn.Module):
    """The embedding f_w(X^) (Sec. 3.3): one stream of ordinary convolutions, as X^ is known whole.

    The paper does not say what the coarser stages of PixelCNN++ take from it. Here it is f_w's last
    output at their resolution. f_w, too, has skips where its layout comes back to a resolution.
    """

    def __init__(self, c_in, layout, filters, dropout):
        super().__init__()
        self.layout = layout
        self.first = Conv(c_in, filters, **ORDINARY, outermost=True)
        self.stages = nn.ModuleList(
            Stage(layout, i, filters, dropout, [ORDINARY], [0]) for i in range(len(layout)))

    def forward(self, x_hat):
        """(N, C_in, H^, W^) -> the last outputs, finest first, number i halved i times: (N, F, H,
        W), (N, F, H/2, W/2), .."""
        y = self.first(x_hat)
        made, last = {}, {}
        for i, stage in enumerate(self.stages):
            for enter in stage.enter:
                y = enter(y)
            for j, (block,) in enumerate(stage.blocks):
                source = skip_source(self.layout, i, j)
                y = block(y, *([concat_elu(made[source])] if source else []))
                made[i, j] = y
            last[stage.halved] = y
        return [last[halved] for halved in sorted(last)]  # 0, 1, .. times, without gaps


# --- The model: a chain of views, a factor for each --------------------------------------------
#
# Here the parts meet. A View is a shape and the psi that makes the next coarser one from it; a
# Factor is a head, a causal network and, if there is an X^, its embedding; PixelAux is a chain of
# views with a factor for each. The likelihood takes one pass of every factor, as all pixels are
# known. A sample is drawn pixel by pixel, because each is needed to know the next one's
# distribution.


@dataclasses.dataclass
class View:
    """What one of the X_i is; its images are tensors, in lists of their own. psi makes the next
    coarser view of it, x_hat = psi(x), which its factor is given; None for the coarsest, which is
    given none."""

    shape: tuple  # (C, H, W)
    levels: int
    label: str = ""
    psi: Psi | None = None

    @property
    def name(self):
        return f"{self.label} {self.shape[1]}x{self.shape[2]}".strip()


def make_views(config):
    """The views of a model, coarsest first, X last."""
    halvings = config.halvings
    if halvings < 0:
        halvings = max(0, int(math.log2(min(config.size) / 8)))  # the shorter side to 8 .. 15
    views = [View((3, *config.size), config.levels)]
    for kind in MODELS[config.model]:
        for _ in range(halvings if kind is Half else 1):
            finer = views[0]
            channels, height, width = finer.shape
            psi = finer.psi = kind(channels, finer.levels)  # psi_0, psi_1, ..
            shape = (psi.channels_out, height // psi.cell, width // psi.cell)
            views.insert(0, View(shape, psi.levels_out, psi.label or finer.label))
    return views


def is_light(config, view):
    """Whether a view has a light network, as all of a pyramid have: see the table in Factor. (Of
    pixelcnn and grayscale none, of pyramid all, of grayscale-pyramid all but X given gray.)"""
    if view.psi is not None:
        return view.psi.cell > 1  # it is given a smaller view
    # The coarsest is part of a pyramid if the model's last psi makes smaller images. (Also if it is
    # the only view, as of a pyramid at 8x8.)
    kinds = MODELS[config.model]
    return len(kinds) > 0 and kinds[-1].cell > 1


class Factor(nn.Module):
    """p(x), or p(x | x_hat), of a view x: a causal network, a head, and for x_hat an embedding.

    Layouts are fields of config (see Configuration, which comes next):

        x                                    light    causal network    f_w
        pixelcnn's X; grayscale's gray       no       layout            none
        X given gray                         no       layout_cond       the same
        all views of a pyramid; in a
        grayscale-pyramid all gray ones      yes      layout_light      layout_embed, of the
                                                                        coarsest none
    """

    def __init__(self, config, view, light):
        super().__init__()
        self.view, self.embed, psi = view, None, view.psi
        channels, filters, dropout = view.shape[0], config.nr_filters, config.dropout
        if light:
            layout, layout_embed = config.layout_light, config.layout_embed
        elif psi is None:
            layout, layout_embed = config.layout, None
        else:  # X^ is as large as X: so f_w has an embedding at each resolution of the network
            layout = layout_embed = config.layout_cond
        check_layout(layout)
        self.multiple = multiple_of(layout)  # height and width of x must be multiples of it
        if psi is not None:
            check_layout(layout_embed, doublings=math.log2(psi.cell))  # of Half 1
            made = {halved for halved, _ in layout_embed}
            if not made.issuperset(halved for halved, _ in layout):
                raise Problem(f"layout {layout}: expected resolutions that f_w's, {layout_embed}, "
                              "has an embedding for")
            self.embed = EmbeddingNet(psi.channels_out + 1, layout_embed, filters, dropout)
            self.multiple = max(self.multiple, multiple_of(layout_embed))

        self.kind_of_head, nr_params = Categorical, view.levels
        if channels == 3:
            self.kind_of_head, nr_params = LogisticMixture, 10 * config.nr_logistic_mix
        look_right = config.look_right or not light
        self.net = CausalNet(channels + 1, nr_params, layout, filters, dropout,
                             conditional=psi is not None, look_right=look_right)

    @property
    def a_weight(self):
        """One of the weights, for its dtype and device."""
        return self.net.last.v

    @property
    def at_once(self):
        """How many images to take at once. A rough estimate: what the causal network's convolutions
        read, in a pass or in the buffers of sample_fast, is to stay within 2^30 numbers, 4 GiB."""
        channels = sum(conv.v.shape[1] for conv in self.net.modules() if isinstance(conv, Conv))
        numbers = channels * math.prod(self.view.shape[1:])
        return min(256, max(1, 2**30 // numbers))

    def planes(self, x, levels):
        """uint8 (N, C, H, W) -> -1 .. 1 and a plane of ones, which tells the image from the zeros
        around it: (N, C + 1, H, W)."""
        x = to_unit(x, levels, self.a_weight.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        # A pixel's channels side by side in memory: convolutions are quicker.
        return x.contiguous(memory_format=torch.channels_last)

    def embeddings(self, x_hat):
        """f_w(x_hat), by resolution, finest first; [] of an unconditional factor."""
        if self.embed is None:
            return []
        return self.embed(self.planes(x_hat, self.view.psi.levels_out))

    def params(self, x, embeddings):
        """The parameters of every pixel's distribution, (N, parameters, H, W), given the pixels
        before it."""
        return self.net(self.planes(x, self.view.levels), embeddings)

    def head(self, params, shift=0.0):
        return self.kind_of_head(params, self.view.levels, shift)

    def forward(self, x, x_hat=None, tight=False):
        """log p(x | x_hat), nats per image, (N,). x: uint8 (N, C, H, W); x_hat = psi(x), or None.

        tight: of the distribution that is cut to what x_hat leaves possible.
        """
        head = self.head(self.params(x, self.embeddings(x_hat)))
        intervals = self.view.psi.bounds(x, x_hat) if tight and x_hat is not None else None
        return head.log_prob(x, intervals).flatten(1).sum(1)


class Draw:
    """Where a sampler gets its pixels: from noise, so that images are a function of it. (A decoder
    of compressed images can take its place.)

    draw(head, rows, columns, interval_of) -> levels, int64 (n P, C, 1, 1), of P pixels in each of n
    images. Each is an image of 1x1, as a head expects images. (For now P is 1: sample_naive draws
    one pixel of each image at a time. sample_fast draws several, on a diagonal; they come in the
    order image 0's P, image 1's P, ..)
    """

    def __init__(self, noise, mode="random"):
        """noise: uniform in (0, 1), float64 (n, 2 C, H, W)."""
        self.noise, self.mode = noise, mode

    def __call__(self, head, rows, columns, interval_of):
        noise = self.noise[:, :, rows, columns]  # (n, 2 C, P)
        noise = noise.transpose(1, 2).flatten(0, 1)  # (n P, 2 C)
        return head.sample(noise[:, :, None, None], self.mode, interval_of)


def sample_naive(factor, n, x_hat, draw, tight=False, shift=0.0, progress=None):
    """Sampling as it is defined: pixel by pixel, with a pass of the whole network for each.

    -> uint8 (n, C, H, W). sample_fast, further down, samples the same.
    """
    channels, height, width = factor.view.shape
    x = torch.zeros(n, channels, height, width, dtype=torch.uint8, device=factor.a_weight.device)
    embeddings = factor.embeddings(x_hat)
    for r, c in itertools.product(range(height), range(width)):
        pixel = x[:, :, r : r + 1, c : c + 1]  # no copy: what is written to it is written to x
        params = factor.params(x, embeddings)[:, :, r : r + 1, c : c + 1]

        def interval_of(drawn):
            """(lo, hi) of the channel after those drawn. psi.bounds looks for these in x, so they
            are written there first."""
            for channel, value in enumerate(drawn):
                pixel[:, channel : channel + 1] = value
            lo, hi = factor.view.psi.bounds(x, x_hat)
            here = np.s_[:, len(drawn) : len(drawn) + 1, r : r + 1, c : c + 1]
            return lo[here], hi[here]

        # float64, so that the head adds no rounding to the network's.
        head = factor.head(params.double(), shift)
        pixel[:] = draw(head, [r], [c], interval_of if tight else None)
        if progress:
            progress(n)
    return x


class PixelAux(nn.Module):
    """p(X_0, X_1, ..), see the top of the file. `build` makes it. Lists are coarsest first."""

    def __init__(self, config):
        super().__init__()
        self.config, self.views = config, make_views(config)
        self.dims = math.prod(self.views[-1].shape)
        names = [view.name for view in self.views]
        self.names = names[:1] + [f"{x} | {x_hat}" for x_hat, x in itertools.pairwise(names)]
        self.factors = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for view in self.views:
                self.factors.append(Factor(config, view, is_light(config, view)))
        (height, width), multiple = config.size, self.size_multiple
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise Problem(f"size {height}x{width} does not fit model {config.model}: height and "
                          f"width must be multiples of {multiple}")

    @property
    def size_multiple(self):
        """Height and width of X must be multiples of this."""
        # scale: one row of the view is `scale` rows of X, in a pyramid 1, 2, 4, ..
        multiple, scale = 1, 1
        for factor in reversed(self.factors):
            multiple = math.lcm(multiple, scale * factor.multiple)
            scale *= factor.view.psi.cell if factor.view.psi else 1
        return multiple

    @property
    def device(self):
        return self.factors[0].a_weight.device

    def check(self, x, k):
        """x, tensor or array, as images of view k on the model's device. Raises Problem."""
        if not isinstance(x, torch.Tensor):
            x = torch.from_numpy(np.require(x, requirements=("C", "W")))
        view = self.views[k]
        if x.dtype != torch.uint8 or tuple(x.shape[1:]) != view.shape or len(x) == 0:
            expected = ", ".join(map(str, view.shape))
            got = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            raise Problem(f"expected images of {view.name}: uint8 (N, {expected}) with N > 0, "
                          f"got {got}")
        top = view.levels - 1
        if top < 255 and int(x.max()) > top:
            raise Problem(f"expected levels 0..{top} of {view.name}, got {int(x.max())}")
        return x.to(self.device)

    def views_of(self, x, k=-1):
        """[X_K, .., x] of images x of view k, -1 being X: coarsest first, uint8 (N, C, H, W) each.
        (views[k].psi makes those of views[k - 1].)"""
        k = k % len(self.views)
        images = [self.check(x, k)]
        for view in self.views[k:0:-1]:
            images.insert(0, view.psi(images[0]))
        return images

    def pairs(self, x):
        """Of each factor what it models and what it is given: [(X_K, None), .., (X, X_1)]."""
        images = self.views_of(x)
        return list(zip(images, [None, *images]))

    def log_prob_factors(self, x, tight=False):
        """x: uint8 (N, 3, H, W) -> [log p(X_K), .., log p(X | X_1)], nats per image, (N,) each.

        tight: factors are cut to what their x_hat leaves possible; the sum is then log p(X) itself,
        of that model (see psi). (The default is what the paper means, however the model was
        trained. Commands go by config.tight.)
        """
        return [factor(*pair, tight) for factor, pair in zip(self.factors, self.pairs(x))]

    def log_prob(self, x, tight=False):
        """x: uint8 (N, 3, H, W) -> the bound, log p(X, X_1, ..) <= log p(X), nats per image, (N,);
        tight: of the model that is cut, log p(X) itself."""
        return sum(self.log_prob_factors(x, tight))

    @torch.no_grad()
    def initialise(self, x, k=None):
        """Data-dependent initialisation on images x, uint8 (N, 3, H, W), of factor k, or of all."""
        for j, pair in enumerate(self.pairs(x)):
            if k is None or j == k:
                with evaluating(self):  # without dropout
                    data_dependent_init(self.factors[j], *pair)
                # The outputs of `last` are 0 on average now, so that all components of a mixture
                # would be much the same: the head spreads them by last.b.
                self.factors[j].kind_of_head.set_bias(self.factors[j].net.last.b)

    def sample(self, n, seed=0, mode="random", shift=0.0, tight=False, given=None, fast=True,
               given_view=None, until=None, progress=None):
        """n images of every view: list of uint8 (n, C, H, W), coarsest first, X last.

        They are a function of the weights, the seed and the image's number. mode: "random"
        (ancestral) or "map" (Sec. 4.2). shift: added to the log-scales. tight: each view is psi of
        the next (mind: False also for a model that was trained tight). given: images of some view,
        (n, C, h, w), from which the coarser ones are computed and the finer ones sampled;
        given_view: its number, where the shape does not tell. fast=False: by sample_naive. until:
        that many views only. progress: is called with the pixels just done.
        """
        if n < 1 or (given is not None and len(given) != n):
            got = f"n = {n}" if given is None else f"n = {n} and {len(given)} given"
            raise Problem(f"expected n of 1 or more, and as many images if any are given, got "
                          f"{got}")
        check_one_of("mode", mode, ("random", "map"))
        images = [] if given is None else self.views_of(given, self.view_like(given, given_view))
        sampler = sample_fast if fast else sample_naive
        with evaluating(self):
            for k in range(len(images), until or len(self.views)):
                factor, parts = self.factors[k], []
                for numbers in torch.arange(n).split(factor.at_once):
                    x_hat = images[-1][numbers] if images else None
                    noise = noise_for(seed, k, numbers, self.views[k].shape).to(self.device)
                    # The coarsest view has no x_hat to be cut by.
                    draw, tight_here = Draw(noise, mode), tight and k > 0
                    parts.append(
                        sampler(factor, len(numbers), x_hat, draw, tight_here, shift, progress))
                images.append(torch.cat(parts))
        return images

    def resized(self, size):
        """The same weights, which are convolutions' and fit any size, with as many views, for
        images of another size (H, W). (For tools, as images of one's own are doubled.) Raises
        Problem."""
        halvings = sum(isinstance(view.psi, Half) for view in self.views)
        other = PixelAux(dataclasses.replace(self.config, size=tuple(size), halvings=halvings))
        other.to(self.device, self.factors[0].a_weight.dtype, memory_format=torch.channels_last)
        other.load_state_dict(self.state_dict())
        return other.eval()

    def view_like(self, x, k=None):
        """The number of the view of which x are images: k, or by their shape. Raises Problem."""
        if k in range(len(self.views)):
            return k
        alike = [j for j, view in enumerate(self.views) if tuple(x.shape[1:]) == view.shape]
        if k is None and len(alike) == 1:
            return alike[0]
        views = ", ".join(f"{j}: {view.name} {view.shape}" for j, view in enumerate(self.views))
        raise Problem(f"given images (N, C, H, W) are {tuple(x.shape)}: expected the shape of one "
                      f"view, or its number, given_view, where several are alike: {views}")


def noise_for(seed, k, images, shape):
    """Uniform noise for samples of factor k, float64 (n, 2 C, H, W); images: their numbers."""
    channels, height, width = shape
    generators = [np.random.default_rng((seed, k, int(i))) for i in images]
    noise = np.stack([generator.random((2 * channels, height, width)) for generator in generators])
    return torch.from_numpy(noise).clamp_(1e-16)  # as the logit of 0 is infinite


# `evaluating` changes what all of a user's threads share, modes of modules and flags of cuDNN: one
# at a time.
IN_TURN = threading.RLock()


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode, without gradients and autocast; on CUDA full float32, the same each time.
    Everything is put back in the end; several threads come in turn."""
    cudnn = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with IN_TURN, cudnn, torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


# --- Configuration -----------------------------------------------------------------------------
#
# All that a model, above, and its training, below, depend on.


@dataclasses.dataclass
class Config:
    """A model and its training. The values here are the paper's for CIFAR-10, where it gives them;
    the number of filters is that of its grayscale models, its pyramids have 100. (The default is
    not this but the preset tiny, as the paper's takes days.)

    Epochs, steps and minutes are given by factor, coarsest first; the last number serves all
    factors that follow.
    """

    model: str = "pyramid"
    preset: str = "cifar10"
    size: tuple = (32, 32)  # (H, W) of X
    levels: int = 256  # of a sub-pixel of X
    halvings: int = -1  # of a pyramid; -1: as many as leave the shorter side at 8 or more
    nr_filters: int = 160
    nr_logistic_mix: int = 10  # components of a pixel's mixture
    # Which network has which layout: see Factor.
    layout: tuple = six_stages(6)  # PixelCNN++'s 36 blocks
    layout_cond: tuple = six_stages(4)  # 24 blocks (Sec. 4.1)
    layout_light: tuple = ((0, 3),)  # (Sec. 4.2)
    layout_embed: tuple = ((1, 3), (2, 6), (1, 3), (0, 3))
    look_right: bool = True  # False: in light networks only the first layers do (VERTICAL_LEFT)
    dropout: float = 0.5

    batch_size: int = 64
    # How long each factor is trained: the first of these three that is not 0.
    steps: tuple = (0,)
    minutes: tuple = (0.0,)  # become steps when the pace is known (--minutes sets steps = 0)
    # The paper's, of gray and of X given gray; it tells none for CIFAR-10's pyramid, which takes
    # these as well. (Where images are made on the fly, 50,000 are an epoch.)
    epochs: tuple = (30, 200)
    lr: float = 1e-3
    lr_decay: float = 0.99999  # the learning rate is multiplied by it after each step
    warmup: int = 0  # steps in which the learning rate grows to its full value
    anneal: float = 0.0  # share of the steps, the last ones, in which it falls linearly to 0
    betas: tuple = (0.95, 0.9995)  # of Adam, PixelCNN++'s
    ema: float = 0.9995  # decay of the moving average of the weights, PixelCNN++'s
    precision: str = "auto"  # in training: float32, bfloat16; auto: bfloat16 on CUDA
    seed: int = 0
    data: str = "shapes"
    data_dir: str = "data"
    data_set: str = ""  # what was found there: see `describe`
    flip: bool = False  # mirror half of the training images

    # Beyond the paper.
    tight: bool = False  # train distributions that are cut to what X^ leaves possible (see psi)
    muon: float = 0.0  # rate of Muon (see Optimizer); 0: Adam for all
    hold_out: int = 0  # training images that are not trained on: the loss on them is recorded
    start: str = ""  # run or checkpoint whose weights training begins with


# What `small`, for a CPU core, and `speedrun`, for a GPU, have in common. How it was found:
# results/recipe.md.
RECIPE = dict(
    layout=six_stages(1), layout_cond=six_stages(1), layout_embed=((1, 2), (0, 1)), dropout=0.0,
    tight=True, lr=5e-3, muon=0.05, lr_decay=1.0, anneal=1.0, betas=(0.9, 0.99))
# tiny, small and speedrun are for short runs: tight, as that is worth much (see the README), at
# higher rates, averaged over fewer steps.
PRESETS = {
    "tiny": dict(
        nr_filters=24, layout=six_stages(1), layout_cond=six_stages(1),
        layout_embed=((1, 1), (0, 1)), dropout=0.0, tight=True, batch_size=16, steps=(1500, 2600),
        lr=2e-2, muon=0.03, lr_decay=1.0, warmup=50, anneal=1.0, betas=(0.9, 0.95), ema=0.98),
    "small": dict(
        RECIPE, nr_filters=48, batch_size=8, steps=(8000,), warmup=30, ema=0.99),
    "speedrun": dict(
        RECIPE, nr_filters=128, batch_size=64, steps=(8000,), warmup=100, ema=0.998,
        precision="bfloat16"),
    "cifar10": dict(),  # for the paper's pyramid nr_filters=100
    "celeba": dict(nr_filters=100, batch_size=16, epochs=(60,), lr_decay=0.999995),
}


def make_config(preset="tiny", **fields):
    """The Config of a preset with some fields changed. Raises Problem, naming what there is."""
    check_one_of("preset", preset, PRESETS)
    check_one_of("model", fields.get("model", Config.model), MODELS)
    for name in fields:
        check_one_of("option", name, Config.__annotations__)
    fields = {"preset": preset, **PRESETS[preset], **fields}
    embed = fields.get("layout_embed")
    if embed and embed[-1][0] < 0:  # older runs count from X^
        fields["layout_embed"] = [(halved - embed[-1][0], blocks) for halved, blocks in embed]
    return Config(**{name: as_tuple(value) for name, value in fields.items()})


def check_one_of(what, name, known):
    if name not in known:
        raise Problem(f"unknown {what} {name!r}: expected one of {', '.join(known)}")


def as_tuple(value):
    """Lists, of which JSON has no other kind, as tuples, those within them too."""
    return tuple(map(as_tuple, value)) if isinstance(value, (list, tuple)) else value


def of_factor(numbers, k):
    """The number for factor k."""
    return numbers[min(k, len(numbers) - 1)]


def build(name, size, preset="tiny", seed=0, **overrides):
    """The model `name` of MODELS for images X of `size`, H = W or (H, W): an nn.Module.

    preset: one of PRESETS; overrides: fields of Config. The weights are a function of the seed;
    call `initialise` on some images before training. Raises Problem, a ValueError.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    return PixelAux(make_config(model=name, size=size, preset=preset, seed=seed, **overrides))


# --- Data: uint8 (N, H, W, 3) ------------------------------------------------------------------
#
# With images whose probability is known, the distance of a model to the best one possible can be
# told in bits, and it can be counted how often a sample is a thing at all: so the built-in data are
# made from a known distribution. Other images come from .npy files, or by way of tools/images.py.
# A batch is a function of the seed and the step, so that a resumed run sees the same ones.
#
# An image's digest, a hash of its bytes, decides whether it is for training or for the test (but
# CIFAR-10 has a test set). The fingerprint of a data set, a hash of all its digests, is put into
# Config.data_set by `describe`: by it --resume knows the data again. (Who reads for the method
# needs Shapes, Dataset.batch and load_data.)


class Shapes:
    """Built-in images whose probability is known: a woven shape on a woven ground, and noise.

    A configuration (no relation to Config) is a mask (square, cross, triangle or ring, and its
    centre), a pair of colours and a weave (rows, columns or checks, that begin light or dark).
    Drawn uniformly, it fixes a clean image. Then every sub-pixel gets its own noise: a logistic,
    rounded to levels and cut off at `farthest`.

    A clean pixel has one of six values, three colours, light or dark:

                 red              yellow           blue
        light    215 122 122      215 215 122      122 122 215
        dark     133  40  40      133 133  40       40  40 133

    With noise of -40..40 these stay within 0..255. Two configurations differ in some clean pixel,
    and any two values of the table are at least 82 levels apart in some channel, more than 2 *
    farthest. So only one configuration can have made an image: the sum over configurations has one
    term, and

        log p(X) = -log_count + sum over the sub-pixels of log pmf(noise)

    is exact. (At 16x16 there are 3x3 centres x 4 kinds x 6 pairs of colours x 6 weaves = 1,296
    configurations, 10.3 bits: 5.2 of the mask, 2.6 of the colours, 2.6 of the weave.) Masks are
    made of cells of 2x2 pixels, and the weave averages out in every cell: the half-resolution view
    has the mask and the colours, and leaves the weave to p(X | X_1).
    """

    contrast = 41  # of the weave: levels from a colour up to light and down to dark
    scale, farthest = 6.0, 40  # of the noise, in levels

    def __init__(self, size):
        (h, w), side = size, min(size)
        if side < 12 or h % 2 or w % 2:
            raise Problem(f"--size {h}x{w}: shapes need an even height and width of 12 or more")
        # Red, yellow, blue; and pairs of colours, of ground and shape.
        self.palette = np.array([[174, 81, 81], [174, 174, 81], [81, 81, 174]], np.int16)
        self.pairs = np.array(list(itertools.permutations(range(3), 2)))
        self.size = (h, w)
        # From here on all is counted in cells of 2x2 pixels; 16x16 has 8x8 of them. A shape has
        # radius 2 there, and its centre is a corner of cells, 3, 4 or 5, so that a cell is left at
        # the border.
        radius = 2 * max(1, side // 16)
        # (In steps that grow with the radius: else 32x32 would have many more centres.)
        ys, xs = (range(radius + 1, cells - radius, radius // 2) for cells in (h // 2, w // 2))
        centres = np.array(list(itertools.product(ys, xs)))
        y, x = centres.T[:, :, None, None]  # (centres, 1, 1) each

        # From the centre to the middle of each cell: (centres, H/2, 1) and (centres, 1, W/2).
        dy, dx = np.arange(h // 2)[:, None] + 0.5 - y, np.arange(w // 2) + 0.5 - x
        # Of radius 2:    # # # #    . # # .    . # # .    # # # #
        #                 # # # #    # # # #    . # # .    # . . #
        #                 # # # #    # # # #    # # # #    # . . #
        #                 # # # #    . # # .    # # # #    # # # #
        square = np.maximum(abs(dy), abs(dx)) < radius
        cross = square & (np.minimum(abs(dy), abs(dx)) < radius / 2)
        triangle = square & (2 * abs(dx) < dy + radius + 1)  # by row: |dx| < 0.75, 1.25, 1.75, 2.25
        ring = square & (np.maximum(abs(dy), abs(dx)) > radius / 2)
        self.masks_half = np.concatenate([square, cross, triangle, ring])  # (M, H/2, W/2)
        self.masks = self.masks_half.repeat(2, 1).repeat(2, 2)  # (M, H, W)

        row, column = np.indices(size)
        odd = np.stack([row, column, row + column]) % 2 == 1
        self.weaves = np.concatenate([odd, ~odd])  # (6, H, W): where it is dark
        shades = np.array([[self.contrast], [-self.contrast]], np.int16)
        self.values = (self.palette[:, None] + shades).reshape(-1, 3)  # at 2 * colour + dark
        # Of configurations, all equally likely.
        self.log_count = math.log(len(self.masks) * len(self.pairs) * len(self.weaves))

        between = np.arange(-self.farthest, self.farthest + 2) - 0.5  # edges of bins of noise
        cdf = 1 / (1 + np.exp(-between / self.scale))
        self.pmf = np.diff(cdf) / (cdf[-1] - cdf[0])  # of noise -farthest..farthest

    def sample(self, n, seed):
        """uint8 (n, H, W, 3), a function of the seed (an int or a sequence of ints)."""
        rng = np.random.default_rng(seed)
        parts = self.masks, self.pairs, self.weaves
        mask, pair, weave = (rng.integers(len(part), size=n) for part in parts)
        clean = self.values[2 * self.colours(self.masks[mask], pair) + self.weaves[weave]]
        uniform = rng.random(clean.shape, np.float32)
        noise = np.searchsorted(self.pmf.cumsum()[:-1], uniform, side="right") - self.farthest
        return (clean + noise).astype(np.uint8)

    def colours(self, masks, pair):
        """Number of each pixel's colour, (N, H, W): of masks (N, H, W) in pairs (N,)."""
        ground, shape = self.pairs[pair].T[:, :, None, None]
        return np.where(masks, shape, ground)

    def fit(self, colour, masks):
        """colour: the number, 0..2, of each pixel's colour, (N, H, W). Finds the mask and the pair
        that agree with it on most pixels -> the colours that these give, (N, H, W). It counts for
        all masks and pairs; a matrix product does so for all at once. (True images agree on all
        pixels; samples of a model may not, and this is a vote.)
        """
        numbers = np.arange(len(self.palette))[:, None]
        has = (colour.reshape(len(colour), 1, -1) == numbers).astype(np.float32)  # (N, 3, pixels)
        # How many pixels of each colour are inside, and outside, of each mask:
        # (N, 3, pixels) @ (pixels, M) -> (N, 3, M).
        inside = has @ masks.reshape(len(masks), -1).T.astype(np.float32)
        outside = has.sum(2, keepdims=True) - inside
        # Pixels that agree: of the ground's colour outside the mask, or of the shape's inside it.
        # agree[i, p, m]: on how many pixels image i agrees with pair p and mask m.
        ground, shape = self.pairs.T  # the colours of each pair, (pairs,)
        agree = outside[:, ground] + inside[:, shape]  # (N, pairs, M)
        best = agree.reshape(len(colour), -1).argmax(1)  # pair * M + mask
        pair, mask = np.divmod(best, len(masks))
        return self.colours(masks[mask], pair)

    def noise_of(self, x):
        """x: uint8 (N, H, W, 3) -> x - the clean image that fits it best, int16."""
        x = np.asarray(x).astype(np.int16)
        colour, dark = np.divmod(nearest(x, self.values), 2)  # their number is 2 * colour + dark
        weave = (dark[:, None] == self.weaves).sum((2, 3)).argmax(1)
        return x - self.values[2 * self.fit(colour, self.masks) + self.weaves[weave]]

    def decodable(self, x, share=0.98):
        """bool (N,): is this share of the sub-pixels within the noise of the configuration that
        fits best?"""
        return (abs(self.noise_of(x)) <= self.farthest).mean((1, 2, 3)) >= share

    def log_prob(self, x):
        """True log p(X) of uint8 (N, H, W, 3), nats (N,); -inf where X is impossible."""
        return log_pmf_of(self.noise_of(x), self.pmf) - self.log_count

    def log_prob_half(self, x_hat):
        """True log p(X_1) of X_1 = Half(X), uint8 (N, H/2, W/2, 3), nats (N,); -inf likewise.

        The four sub-pixels of a cell are colour + noise, the weave cancels, and Half makes of them
        colour + (sum of the four noises + 2) // 4: again a colour with independent noise, of
        -40..40, and colours are 93 apart.
        """
        x_hat, pmf_of_sum = np.asarray(x_hat).astype(np.int16), np.ones(1)
        for _ in range(4):
            pmf_of_sum = np.convolve(pmf_of_sum, self.pmf)  # of four noises, in the end
        total = np.arange(-4 * self.farthest, 4 * self.farthest + 1)
        # Sums that Half rounds to one level are added up; at i: the probability of i - farthest.
        pmf = np.bincount((total + 2) // 4 + self.farthest, weights=pmf_of_sum)
        noise = x_hat - self.palette[self.fit(nearest(x_hat, self.palette), self.masks_half)]
        log_count = self.log_count - math.log(len(self.weaves))  # the view does not show the weave
        return log_pmf_of(noise, pmf) - log_count


def nearest(x, values):
    """Number of the value, (values, 3), that each pixel of x, (N, H, W, 3), is nearest to, in its
    worst channel. (The right one of true images: noise is at most 40 in each channel, and any other
    value is 82 - 40 = 42 off, or more, in one.)"""
    return np.stack([abs(x - value).max(3) for value in values]).argmin(0)


def log_pmf_of(noise, pmf):
    """Log probability of noise, (N, H, W, 3), summed: (N,). pmf: of -farthest..farthest."""
    # For a pmf of -1..1 log_pmf is -inf, a, b, c, -inf; noise is clipped to -2..2, and found at
    # noise + 2.
    far = len(pmf) // 2 + 1
    log_pmf = np.pad(np.log(pmf), 1, constant_values=-np.inf)
    return log_pmf[noise.clip(-far, far) + far].sum((1, 2, 3))


@dataclasses.dataclass
class Dataset:
    """train, test: uint8 (N, H, W, 3), arrays or Rows (see there); train is None if `shapes` makes
    images on the fly. held_out: see holding_out. flip: what Config.flip is of a new run on these
    data, if no flag says otherwise. fingerprint: of all images."""

    train: object
    test: object
    flip: bool = False
    fingerprint: str = ""
    shapes: Shapes | None = None
    held_out: object = ()

    def batch(self, step, n, seed, flip=False):
        """Batch number `step` for training, uint8 (n, 3, H, W): a function of the arguments. seed:
        a tuple of ints, in training (the run's seed, the factor)."""
        if self.train is None:
            return to_tensor(self.shapes.sample(n, (*seed, step)))
        rows = []
        for i in range(step * n, (step + 1) * n):
            epoch, place = divmod(i, len(self.train))
            rows.append(permutation((*seed, epoch), len(self.train))[place])
        images = to_tensor(self.train[np.array(rows)])
        if flip:
            mirrored = torch.from_numpy(np.random.default_rng((*seed, step)).random(n) < 0.5)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images

    def holding_out(self, n):
        """The same, but n training images, and copies of them, are kept from training: who looks at
        a model's progress, and chooses by it, must not do so by the test set. The images' contents
        alone decide which ones. Raises Problem."""
        if n == 0:
            return self
        if self.train is None or n >= len(self.train):
            there = "made on the fly" if self.train is None else f"{len(self.train)} in number"
            raise Problem(f"--hold-out {n}: expected fewer than all images, which are {there}")
        # By another seed than split's, so as to have nothing to do with it.
        values = digests(self.train, seed=1)
        lowest = np.argsort(values, kind="stable")[:n]
        rest = np.flatnonzero(values > values[lowest[-1]])  # not >=: a copy has the same value
        if len(rest) == 0:
            raise Problem(f"--hold-out {n}: all other images are copies of these")
        held_out = self.train[np.sort(lowest)]
        return dataclasses.replace(self, train=Rows(self.train, rest), held_out=held_out)


@functools.lru_cache(2)  # a batch may lie in two epochs
def permutation(seed, n):
    """Of 0 .. n - 1, a function of the seed."""
    return np.random.default_rng(seed).permutation(n)


class Rows:
    """Some rows of an array, taken as they are asked for: a memory map's images stay on disk."""

    def __init__(self, images, rows):
        self.images, self.rows = images, np.asarray(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.images[self.rows[index]]


def digests(images, seed=0):
    """uint64 (N,): a digest of each image's bytes, with the seed."""
    values = np.empty(len(images), np.uint64)
    for i in range(len(images)):
        digest = hashlib.blake2b(images[i].tobytes(), digest_size=8, key=str(seed).encode())
        values[i] = int.from_bytes(digest.digest(), "big")
    return values


def split(images, seed=0):
    """Rows for training and rows for the test, some 5% (the paper's share for CelebA), sorted.

    An image's side follows from its content alone: others may come and go, and copies of it are on
    its side. Only where one side would be empty, the image of the lowest digest goes to the test,
    or the one of the highest to training. Raises Problem if all images are alike.
    """
    values = digests(images, seed)  # as good as uniform noise, but copies have the same
    if len(np.unique(values)) < 2:
        raise Problem("expected at least two different images, one of them for the test")
    test = values < np.uint64(0.05 * 2**64)
    if not test.any():
        test = values == values.min()
    if test.all():
        test = values < values.max()
    return np.flatnonzero(~test), np.flatnonzero(test)


def fingerprint(images):
    """12 hexadecimal digits that tell one set of images from another, whatever their order."""
    values = np.sort(digests(images)).astype("<u8")
    return hashlib.blake2b(values.tobytes(), digest_size=6).hexdigest()


def read_npy(path, channels=(3,)):
    """uint8 (N, H, W, C), mapped from a .npy file of that or of (N, C, H, W). Raises Problem."""
    try:
        images = np.lib.format.open_memmap(pathlib.Path(path).expanduser(), mode="r")
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise Problem(f"{path}: not a .npy file of numbers, or a damaged one") from None
    if images.ndim == 4 and images.shape[1] in channels and images.shape[3] not in channels:
        images = images.transpose(0, 2, 3, 1)
    fits = images.ndim == 4 and images.shape[3] in channels and len(images) > 0
    if images.dtype != np.uint8 or not fits:
        wanted = " or ".join(map(str, sorted(channels)))
        raise Problem(f"{path}: {images.dtype} {images.shape}, expected uint8 (N, H, W, C) or "
                      f"(N, C, H, W), N > 0, C {wanted}")
    return images


def load_data(spec, folder="data", size=None):
    """spec: shapes, a .npy file, or what tools/images.py reads -> (Dataset, (H, W)).
    Raises Problem."""
    if spec == "shapes":
        shapes = Shapes(size or (16, 16))
        test = shapes.sample(512, (0, 20170806))  # no batch of train_factor has this seed
        return Dataset(None, test, shapes=shapes), shapes.size
    if spec.endswith(".npy"):
        images = read_npy(spec)
        try:
            train, test = split(images)
        except Problem as error:
            raise Problem(f"{spec}: {error}") from None
        data = Dataset(Rows(images, train), Rows(images, test), fingerprint=fingerprint(images))
    else:
        data = tool("images").load(spec, folder, size)  # loads tools/images.py, see Command line
    height, width = data.test[:1].shape[1:3]
    if size not in (None, (height, width)):
        raise Problem(f"{spec}: images are {height}x{width} (height x width), not "
                      f"{size[0]}x{size[1]}")
    return data, (height, width)


def describe(data):
    """What a training set is: where it lies may change in the course of a run, this may not."""
    if data.train is None:
        return "made on the fly"
    return f"{len(data.train) + len(data.held_out)} images, {data.fingerprint}"


def digests_of(data):
    """Of all images of a data set, sorted."""
    parts = [data.train, data.held_out, data.test]
    return np.sort(np.concatenate([digests(images) for images in parts]))


def what_changed(out, data):
    """Since the run in the folder `out` was begun: so many images are new, so many are gone."""
    path = out / "digests.npy"
    if data.train is None or not path.exists():
        return ""
    before, now = np.load(path), digests_of(data)
    new, gone = len(np.setdiff1d(now, before)), len(np.setdiff1d(before, now))
    return f" ({new} new, {gone} gone)"


def to_tensor(images):
    """uint8 array (N, H, W, C) -> tensor (N, C, H, W)."""
    return torch.from_numpy(np.require(images, requirements=("C", "W"))).permute(0, 3, 1, 2)


def to_array(images):
    """Tensor (N, C, H, W) -> array (N, H, W, C)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


# --- Files and progress: nothing is half-written, nothing ends for want of a terminal ----------
#
# (Who reads for the method may skip this section.)
#
# A run may be killed at any moment, and is resumed from what it has written. A run's folder has
#
#     config.json        the Config                      commands.jsonl   each `train`, its hardware
#     factor-k.pt        the checkpoint of factor k      metrics.jsonl    the loss, now and then
#     digests.npy        a digest of each image          weights.pt       what `export` writes
#
# (factor-0.pt is that of p(X_K), the coarsest.) A checkpoint has
#
#     format
#     config
#     factors       {k: averaged weights}, which are evaluated and sampled, see Training
#     training      missing where only weights are kept
#         weights       those that are trained, with which training goes on
#         optimizer     its state
#         step, seconds
#
# Training goes by config.json, and `load` by the copy in the checkpoint, so that one file is
# enough. No random state is in it, as all that is random is a function of seed, factor and step.


def rank():
    """The number of this process, where several train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def write_atomically(path, content):
    """Write content, bytes or a function that writes to a binary file, in one step: who reads
    `path` finds the old file or the new one. Makes folders; leaves nothing behind after a
    failure."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name that must be new: the processes of two containers may have the same number.
    part = path.with_name(f"part-{secrets.token_hex(8)}")
    try:
        with open(part, "xb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name the user knows
    finally:
        with contextlib.suppress(OSError):  # it is not there, or the disk is read-only
            part.unlink()


def write_checkpoint(path, config, factors, **more):
    """factors: {k: averaged weights}, of some or all; more: what training goes on with."""
    state = dict(format="pixelaux 2", config=dataclasses.asdict(config), factors=factors, **more)
    buffer = io.BytesIO()  # as torch does not report a full disk as an OSError
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def save(model, path):
    """Write a model's weights to a file, which `load` and all commands take for a run."""
    factors = {k: factor.state_dict() for k, factor in enumerate(model.factors)}
    write_checkpoint(path, model.config, factors)


def read_checkpoint(path):
    """What write_checkpoint has written. Raises Problem for any other file."""
    try:
        # It is a zip file with checksums, which torch does not look at.
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != "pixelaux 2":
            raise ValueError(f"format {state['format']}, expected pixelaux 2")
        if not state["config"] or not state["factors"]:
            raise ValueError("it is empty")
        return state
    except FileNotFoundError:
        raise Problem(f"{path}: no such checkpoint; `train` writes it in its folder") from None
    except Exception as error:  # torch raises many kinds (weights_only: no file can run code)
        reason = getattr(error, "strerror", None) or type(error).__name__
        if isinstance(error, ValueError):
            reason = str(error)
        raise Problem(f"{path}: not a checkpoint of ours, or a damaged one ({reason})") from None


def load(run, device="cpu"):
    """The model of a run, with averaged weights; model.files are the files that they are from.
    Raises Problem.

    run: a folder                      its factor-k.pt; if there is none, weights.pt (see export)
         a file that has all factors   that
         a file that has some          that, and of the other factors the factor-k.pt beside it: so
                                       one factor can be tried out in another's place
    """
    run = pathlib.Path(run)
    paths = [run]
    if run.is_dir():
        paths = sorted(run.glob("factor-*.pt")) or sorted(run.glob("weights.pt"))
        if not paths:
            raise Problem(f"{run} holds no run: expected factor-0.pt, .. or weights.pt there")
    first = read_checkpoint(paths[0])
    try:
        model = PixelAux(make_config(**first["config"]))
    except (Problem, TypeError) as error:
        own = first["config"].get("model") not in MODELS  # by a file with views of one's own
        hint = "; call the file that defines it in place of pixelaux.py" if own else ""
        raise Problem(f"{paths[0]}: {error}{hint}") from None
    if run.is_file() and len(first["factors"]) < len(model.factors):
        paths = sorted(run.parent.glob("factor-*.pt")) + [run]  # the last one wins
    missing = set(range(len(model.factors)))
    for path in paths:
        for k, weights in read_checkpoint(path)["factors"].items():
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise Problem(f"{path}: factor {k} has weights that are not finite numbers")
            try:
                model.factors[k].load_state_dict(weights)
            except (RuntimeError, IndexError, TypeError):
                raise Problem(f"{path}: factor {k} is of another model than {paths[0]}") from None
            missing.discard(k)
    if missing:
        k = min(missing)
        folder = run if run.is_dir() else run.parent
        raise Problem(f"{run}: factor {k} is missing; `train --resume --out {folder}` makes it")
    model.files = list(dict.fromkeys(paths))  # each once
    return model.to(device, memory_format=torch.channels_last).eval()


def read_config(out):
    """The Config of the run in folder `out`. Raises Problem."""
    path = out / "config.json"
    try:
        return make_config(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise Problem(f"{out} holds no run: {path} is missing") from None
    except (ValueError, TypeError) as error:
        raise Problem(f"{path}: not a configuration of this program ({error})") from None


def write_config(out, config):
    write_atomically(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())


@contextlib.contextmanager
def locked(out, name, wait=False):
    """Hold a lock in a run's folder; it goes with the process, however that ends. Raises
    Problem."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".lock-{name}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"--out: another process is training {name} in {out}") from None
        yield


def append_record(path, record):
    """Add a line of JSON to a file; other processes may do so, too."""
    line = json.dumps(record).encode() + b"\n"
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):  # a kill has cut the last line
            line = b"\n" + line
        file.write(line)


def counted(n, what):
    """As in "1 image", "2 images"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


class Quiet:
    """stderr, for progress and warnings. What cannot be shown is not shown: that a terminal is gone
    must not end training."""

    in_line = False  # whether a bar stands in the line

    def write(self, text):
        Quiet.in_line = not text.endswith("\n")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()


def say(text):
    """A line of its own on stderr."""
    newline = "\n" if Quiet.in_line else ""
    print(f"{newline}pixelaux: {text}", file=Quiet())


def warn(text):
    say(f"warning: {text}")


def progress_bar(iterable=None, **options):
    """A bar of tqdm's on stderr; of several processes the first one shows it."""
    from tqdm import tqdm

    return tqdm(iterable, file=Quiet(), **{"disable": rank() > 0, **options})


# --- Training ----------------------------------------------------------------------------------
#
# Factors share nothing (Eq. 4, 5): each is trained on its own, in turn or on machines of their own.
# All that is random is a function of the seed, the factor and the step, so that a run that is
# stopped and resumed ends in the same weights as one that is not. Several processes (torchrun) each
# take a share of the rows of every batch, and average their gradients.
#
# What is trained is not what is evaluated and sampled: the moving average of the weights is better,
# and less noisy, than the weights themselves. train_factor is the loop
#
#     each step     make_step: batch -> loss -> gradient -> optimizer -> moving average
#     at a look     what the table below has, in this order
#
# A look comes every 20 steps (or every hundredth part of the steps, if that is less), after the
# last step, and, of a single process, when a signal has come. It begins by reading the loss. Why
# not in each step? To read a number is to wait for the device: a GPU works off a queue, ahead of
# which Python runs.
#
#     what is done at a look                            at which looks
#     is the loss finite?                               all
#     loss on images held out, if there are             each twentieth of the steps
#     if not, loss on test images                       each quarter
#     a line in metrics.jsonl                           all
#     checkpoint                                        each quarter; every two minutes
#                                                       (--save-every); at a signal
#     stop                                              at a signal
#     pictures                                          each quarter but the last (then by `train`)
#
# With --minutes some steps are tried out first (steps_of says that the number is not known yet,
# steps_in tries), and taken back: so minutes become a number of steps, once and for all. It is
# written to config.json (record_steps), and all that follows is a function of the step.


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_of_processes(values, device):
    """Means of floats over the processes, the same in all of them; each waits for the last."""
    if world_size() > 1:
        values = torch.tensor(values, dtype=torch.float64, device=device) / world_size()
        dist.all_reduce(values)
        values = values.tolist()
    return values


def steps_of(config, k, data):
    """How many steps factor k is trained; math.inf: not known yet, see steps_in."""
    if of_factor(config.steps, k):
        return of_factor(config.steps, k)
    if of_factor(config.minutes, k):
        return math.inf
    images = 50_000 if data.train is None else len(data.train)
    return math.ceil(of_factor(config.epochs, k) * images / config.batch_size)


def record_steps(out, config, k, steps):
    """Write down how many steps factor k takes. (0 stands for: not known yet.) In config.json the
    other factors' numbers may be newer than ours, if other processes train them: there only that of
    k is changed."""
    factors = range(len(make_views(config)))
    ours = [of_factor(config.steps, j) for j in factors]
    ours[k] = steps
    config.steps = tuple(ours)
    if rank() == 0:
        with locked(out, "config", wait=True):
            there = read_config(out)
            theirs = [of_factor(there.steps, j) for j in factors]
            theirs[k] = steps
            write_config(out, dataclasses.replace(there, steps=tuple(theirs)))


class Optimizer:
    """Adam, as in the paper; with config.muon, Muon (Jordan 2024) for the directions v of all
    convolutions but a network's first and last ones, and Adam for all else.

    Adam sees numbers, each with a step of its own. Muon sees a matrix, a convolution's outputs by
    what it reads: if P S Q^T is the singular value decomposition of the gradient's running mean,
    its step is about P Q^T, with all singular values 1. So what the gradient shows faintly is
    learnt as fast as what dominates it, in a fraction of the steps (results/recipe.md). (All this
    is torch's; ours is step_of_muon.) The lengths g stay with Adam.
    """

    def __init__(self, factor, config):
        self.config, self.muon, self.directions = config, None, []
        convs = [module for module in factor.modules() if isinstance(module, Conv)]
        if config.muon and convs:
            self.directions = [conv.v for conv in convs if not conv.outermost]
            # Copies, as torch's Muon takes matrices only.
            self.matrices = [nn.Parameter(v.detach().flatten(1).clone()) for v in self.directions]
            self.muon = torch.optim.Muon(self.matrices, weight_decay=0.0)
        by_muon = set(map(id, self.directions))
        others = [weights for weights in factor.parameters() if id(weights) not in by_muon]
        self.adam = torch.optim.Adam(others, betas=config.betas, fused=True)

    def zero_grad(self):
        self.adam.zero_grad()
        for v in self.directions:
            v.grad = None

    def step(self, share):
        """A step at this share of the full learning rates."""
        self.adam.param_groups[0]["lr"] = self.config.lr * share
        self.adam.step()
        if self.muon:
            self.muon.param_groups[0]["lr"] = self.config.muon * share
            self.step_of_muon()

    @torch.no_grad()
    def step_of_muon(self):
        """Rows of v are scaled to length 1, then Muon makes its step.

        The length of v changes nothing in the weight, g v / |v|, but would grow without this, on
        average (fourfold in the first 400 steps of `tiny`). Muon's steps are always of one length,
        and turn a longer v by a smaller angle: learning would fade.
        """
        for v, matrix in zip(self.directions, self.matrices):
            matrix.copy_(F.normalize(v.flatten(1)))
            matrix.grad = None if v.grad is None else v.grad.flatten(1)  # None: it was not used
        self.muon.step()
        for v, matrix in zip(self.directions, self.matrices):
            v.copy_(matrix.view_as(v))

    def state_dict(self):
        muon = self.muon.state_dict() if self.muon else None
        return dict(adam=self.adam.state_dict(), muon=muon)

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["adam"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])


def share_of_rate(config, step, steps):
    """The share of the full learning rates at a step. (steps is infinite while they are tried.)"""
    warmup = config.warmup
    if config.start:
        # Adam has yet to learn how large gradients are, which takes 1 / (1 - beta2) steps; at full
        # rate its steps until then would ruin good weights. So it is given twice that time.
        warmup = max(warmup, 2 / (1 - config.betas[1]))
    share = config.lr_decay**step * min(1.0, (step + 1) / max(1, warmup))
    if config.anneal:
        share *= min(1.0, (1 - step / steps) / config.anneal)
    return share


def bfloat16(config, device):
    """Whether networks compute in bfloat16 in training. Weights and the loss are always float32,
    and so are heads, which cast what they get."""
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16"


def nats_of(forward, batch, config):
    """A factor's log-probabilities in training, nats per image, (N,)."""
    device = batch[0].device
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16(config, device)):
        return forward(*batch, config.tight)


def never():
    return False


class Training:
    """A factor in training.

        trained          the factor that is trained
        forward          the same, perhaps compiled or distributed: what is called in a step
        average.module   the moving average, a copy, which becomes the model's factor
    """

    def __init__(self, factor, config, dims):
        """dims: of X."""
        self.trained = self.forward = factor.train()
        self.config, self.dims = config, dims
        self.optimizer = Optimizer(factor, config)
        multi_avg_fn = get_ema_multi_avg_fn(config.ema)
        self.average = AveragedModel(factor, multi_avg_fn=multi_avg_fn).eval()

    def step(self, batch, share):
        """Make a step, at this share of the learning rates -> the loss: bits per sub-pixel of X."""
        loss = bits_per_dim(nats_of(self.forward, batch, self.config).mean(), self.dims)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(share)
        self.average.update_parameters(self.trained)
        return loss.detach()

    def state(self, k, step, seconds):
        """What a checkpoint of factor k has besides format and config, see Files."""
        training = dict(weights=self.trained.state_dict(), optimizer=self.optimizer.state_dict(),
                        step=step, seconds=seconds)
        return dict(factors={k: self.average.module.state_dict()}, training=training)

    def restore(self, state, path=None):
        """Go on from a state -> (step, seconds). path: of its file. Raises Problem."""
        try:
            training, [averaged] = state["training"], state["factors"].values()
            self.trained.load_state_dict(training["weights"])
            self.average.module.load_state_dict(averaged)
            # It counts the updates, one a step. (If it is 0, AveragedModel copies the weights.)
            self.average.n_averaged.fill_(training["step"])
            self.optimizer.load_state_dict(training["optimizer"])
            return training["step"], training["seconds"]
        except (KeyError, RuntimeError, ValueError):
            raise Problem(f"{path}: training as in config.json cannot go on from this") from None

    @contextlib.contextmanager
    def taken_back(self):
        """The steps that are made within this are as if they had not been made."""
        # (`restore` sets n_averaged to the step; k and seconds are not used.)
        now = self.state(k=0, step=int(self.average.n_averaged), seconds=0.0)
        before = copy.deepcopy(now)  # as the tensors in `now` are those that steps change
        try:
            yield
        finally:
            self.restore(before)


def wrapped(factor, batch, config, compile, stop=never):
    """The factor as training calls it: compiled and distributed, where that is asked for.

    stop(): whether a signal has come. A signal also ends the compiler's processes: then their error
    is no failure, but the stop that was asked for.
    """
    forward, device = factor, factor.a_weight.device
    if compile:
        try:
            torch.compiler.reset()  # what earlier factors were compiled to
            forward = torch.compile(factor, dynamic=False)
            nats_of(forward, batch, config).sum().backward()  # it compiles when it is called
        except Exception as error:  # compilers raise many kinds
            if stop():
                raise KeyboardInterrupt("stopped while compiling; --resume goes on") from None
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            warn(f"training without torch.compile, which failed: {reason}")
            forward = factor
    if world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(forward, devices)
    return forward


def batch_of(model, k, data, step):
    """What factor k models and what it is given at a step, in this process's rows of the batch."""
    config = model.config
    x = data.batch(step, config.batch_size, (config.seed, k), config.flip)
    return model.pairs(x[rank() :: world_size()])[k]


def steps_in(minutes, make_step, stop, device):
    """How many steps fit into the minutes -> (steps, the seconds that it took to find out): some
    are made, for 3% of the time or a minute. The first one counts nowhere, as much happens only
    once.

    make_step(number, of) -> its loss, a tensor.
    """
    with progress_bar(desc="trying the pace", unit="step") as bar:
        loss = float(make_step(0, math.inf))  # waits until the device has done it
        begun, made, seconds = time.monotonic(), 0, 0.0
        enough = min(0.03 * 60 * minutes, 60)
        # (A loss that is not finite ends it: what training will say of that need not wait.)
        while made < 2 or (seconds < enough and math.isfinite(loss)):
            made += 1
            loss = float(make_step(made, math.inf))
            told = [loss, time.monotonic() - begun, stop()]
            loss, seconds, stopping = mean_of_processes(told, device)
            if stopping:
                raise KeyboardInterrupt("stopped while trying the pace; --resume does so again")
            bar.update()
    return max(1, round((60 * minutes - seconds) * made / seconds)), seconds


def time_to_look(step, steps):
    """Whether to look at the loss after this step: after each hundredth part of the steps, but at
    most 20 steps apart."""
    every = min(20, max(1, steps // 100))
    return step % every == 0 or step == steps


def has_ended(parts, step_before, step, steps):
    """Whether one of so many equal parts of the steps (4: a quarter) has ended since step_before.
    (Of 10 steps the first quarter ends with step 3: 4 * 3 // 10 is 1, 4 * 2 // 10 is 0.)"""
    return parts * step // steps > parts * step_before // steps


@torch.random.fork_rng()  # it seeds torch's generators, for dropout: the caller is not to see it
def train_factor(model, k, data, out, stop=never, compile=False, save_every=120, show=None):
    """Train factor k of `model` on `data`, or go on from its checkpoint in the folder `out`.

    The model has the averaged factor from here on. -> the number of steps made. Writes
    out/factor-k.pt every save_every seconds and after each quarter, and out/metrics.jsonl. stop():
    whether to save and raise KeyboardInterrupt. show(): makes pictures after each quarter. Raises
    Failure if the loss is not finite, Problem if the checkpoint is of another run.
    """
    config, device, seed = model.config, model.device, (model.config.seed, k)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"factor-{k}.pt"
    saved = read_checkpoint(path) if path.exists() else None
    if not saved and not config.start:  # with --start the model has weights already
        # By 32 images or more: statistics of few are rough.
        model.initialise(data.batch(0, max(config.batch_size, 32), seed), k)
    training = Training(model.factors[k], config, model.dims)
    model.factors[k] = training.average.module  # which measurements, show and the caller see
    first_step, seconds = training.restore(saved, path) if saved else (0, 0.0)
    step, steps = first_step, steps_of(config, k, data)
    if step < steps:
        first_batch = batch_of(model, k, data, 0)
        training.forward = wrapped(training.trained, first_batch, config, compile, stop)

    def make_step(number, of):
        torch.manual_seed(hash((*seed, rank(), number)))  # for dropout; ints hash alike everywhere
        batch = batch_of(model, k, data, number)
        return training.step(batch, share_of_rate(config, number, of))

    if steps == math.inf:
        with training.taken_back():
            steps, spent = steps_in(of_factor(config.minutes, k), make_step, stop, device)
        seconds += spent
        record_steps(out, config, k, steps)
    log, since = Log(out, k, step, steps), time.monotonic()
    save_at = since + save_every
    last_look, total = step, torch.zeros((), device=device)  # total of the losses since last_look
    while step < steps:
        total += make_step(step, steps)
        step += 1
        # At a look the host waits for the device, and processes for each other. So several must
        # do so at the same steps; a single one also looks as soon as a signal has come.
        if not (time_to_look(step, steps) or (world_size() == 1 and stop())):
            continue
        bits = float(total) / (step - last_look)  # waits until the device has done it all
        seconds += time.monotonic() - since  # of steps alone: what follows is not counted
        # stopping: above 0 if stop() is True, 1, in any of the processes.
        bits, seconds, stopping = mean_of_processes([bits, seconds, stop()], device)
        check_finite(bits, k, step, path)
        quarter = has_ended(4, last_look, step, steps)
        log.write(step, bits, seconds, measurements(model, k, data, last_look, step, steps))
        if (quarter or stopping or time.monotonic() > save_at) and rank() == 0:
            write_checkpoint(path, config, **training.state(k, step, seconds))
            save_at = time.monotonic() + save_every
        if stopping and step < steps:  # (if not, what comes next stops, or show_samples)
            log.bar.close()
            raise KeyboardInterrupt(f"stopped at step {step}; --resume goes on from {path}")
        if quarter and step < steps and show and rank() == 0:
            show()
        total, last_look, since = torch.zeros_like(total), step, time.monotonic()
    return step - first_step


def measurements(model, k, data, step_before, step, steps):
    """{name: bits/dim of X} on images that the model is not trained on: after each twentieth of the
    steps those held out; if there are none, after each quarter test images. {} at other looks."""
    if len(data.held_out):
        over = has_ended(20, step_before, step, steps)
        return {"held_out_bits_per_dim": bits_of(model, k, data.held_out)} if over else {}
    over = has_ended(4, step_before, step, steps)
    return {"test_bits_per_dim": bits_of(model, k, data.test[:128])} if over else {}


def check_finite(bits, k, step, path):
    """Raises Failure."""
    if not math.isfinite(bits):
        good = path if path.exists() else "not there"
        raise Failure(f"factor {k}: the loss is not finite at step {step} (--lr too high?); "
                      f"the last good checkpoint is {good}")


class Log:
    """A factor's lines in OUT/metrics.jsonl, and its bar. The first process writes."""

    def __init__(self, out, k, step, steps):
        self.path, self.k, self.step = out / "metrics.jsonl", k, step
        self.bar = progress_bar(initial=step, total=steps, desc=f"factor {k}", unit="step")

    def write(self, step, bits, seconds, measured):
        record = dict(factor=self.k, step=step, bits_per_dim=bits, seconds=round(seconds, 3))
        if rank() == 0:
            append_record(self.path, record | measured)
        self.bar.set_postfix_str(f"{bits:.3f} bits/dim", refresh=False)
        self.bar.update(step - self.step)
        self.step = step


# --- Evaluation and pictures -------------------------------------------------------------------
#
# A factor's bits, of an image, become bits/dim by one of three divisions:
#
#     of X          bits of factor k / sub-pixels of X                  add up to the total
#     own           bits of factor k / sub-pixels of view k
#     cumulative    bits of factors 0..k / sub-pixels of view k         as in the paper's Table 2


def bits_of(model, k, images):
    """Factor k's bits/dim of X on images, uint8 (N, H, W, 3)."""
    nats = []
    with evaluating(model):
        for x in to_tensor(images).split(model.factors[k].at_once):
            nats.append(model.factors[k](*model.pairs(x)[k], model.config.tight))
    return float(bits_per_dim(torch.cat(nats).mean(), model.dims))


def evaluate(model, images, batch_size=None):
    """Log-probabilities of images, uint8 (N, H, W, 3), from the same passes: (the paper's bound,
    exact), each float64 (factors, N), nats per image, coarsest factor first."""
    at_once = min(factor.at_once for factor in model.factors)
    batches = to_tensor(images[:]).split(batch_size or at_once)
    bound = [[] for _ in model.factors]  # of each factor, batch by batch
    exact = [[] for _ in model.factors]
    with evaluating(model):
        for x in progress_bar(batches, desc="evaluation", unit="batch"):
            for k, (x_k, x_hat) in enumerate(model.pairs(x)):
                factor = model.factors[k]
                head = factor.head(factor.params(x_k, factor.embeddings(x_hat)))
                intervals = None  # the coarsest factor is exact as it is
                if x_hat is not None:
                    intervals = factor.view.psi.bounds(x_k, x_hat)
                bound[k].append(head.log_prob(x_k).flatten(1).sum(1).double().cpu())
                exact[k].append(head.log_prob(x_k, intervals).flatten(1).sum(1).double().cpu())
    both = [torch.stack([torch.cat(nats) for nats in kind]).numpy() for kind in (bound, exact)]
    return both[0], both[1]


REPORT = """\
{images}, bits/dim, divided three ways. of X: bits / {dims} sub-pixels of X, these add up.
own: bits / sub-pixels of the view. cumulative: bits of all views so far / sub-pixels of this one
(as in the paper's Table 2).
bound: the paper's, <=. exact: log p(X) itself, =, of the tight model (the same weights).

{blank:{wide}}        of X              own           cumulative
{factor:{wide}}   bound   exact     bound   exact     bound   exact"""


def widest(model):
    """Of the table's first column, in characters."""
    return max(21, *map(len, model.names))


def by_factor(model, both):
    """A dict of bits/dim for each factor, divided three ways. both: bound and exact, nats, (2,
    factors, N)."""
    factors = []
    for k, view in enumerate(model.views):
        own = math.prod(view.shape)
        row = dict(factor=model.names[k], shape=view.shape)
        # the division, the first factor that is summed, the sub-pixels that divide
        for name, first, dims in (("of_x", k, model.dims), ("own", k, own), ("cumulative", 0, own)):
            nats = both[:, first : k + 1].sum(1)  # (2, N)
            bound, exact = bits_per_dim(nats.mean(1), dims).tolist()
            row |= {f"bound_{name}": bound, f"exact_{name}": exact}
        factors.append(row)  # its numbers are in the order of the table's columns
    return factors


def confidence_of(bits):
    """95% interval of the mean over images, by the bootstrap. bits: (2, N) -> [low, high] twice."""
    n = bits.shape[1]
    # 1000 times n of the images, with replacement, (2, 1000, n); means, (2, 1000).
    means = np.random.default_rng(0).choice(bits, (1000, n), axis=1).mean(2)
    return np.percentile(means, [2.5, 97.5], axis=1).T.tolist()


def report(model, bound, exact, data, images, kind="test image"):
    """The table of `eval` -> (text, the same as a dict). bound, exact: of images of `data`."""
    both = np.stack([bound, exact])  # (2, factors, N)
    n, wide = both.shape[2], widest(model)
    bits = bits_per_dim(both.sum(1), model.dims)  # (2, N)
    total, confidence, factors = bits.mean(1).tolist(), confidence_of(bits), by_factor(model, both)
    result = dict(images=n, factors=factors, bound=total[0], exact=total[1],
                  bound_interval=confidence[0], exact_interval=confidence[1])

    lines = [REPORT.format(
        images=counted(n, kind), dims=model.dims, blank="", factor="factor", wide=wide)]
    for row in factors:
        name, _, *numbers = row.values()
        lines.append(f"{name:{wide}}{('{:8.4f}{:8.4f}  ' * 3).format(*numbers)}".rstrip())
    in_nats = [of_kind * math.log(2) for of_kind in total]
    for name, pair in (("total", total), ("total in nats/dim", in_nats)):
        lines.append("{:{wide}}{:8.4f}{:8.4f}".format(name, *pair, wide=wide))
    if n > 1:
        of_bound, of_exact = ["{:.4f}..{:.4f}".format(*ends) for ends in confidence]
        lines.append(f"95% interval over the images: bound {of_bound}, exact {of_exact}")
    if data.shapes:
        more, distances = distance_to_truth(model, bound, exact, data.shapes, images)
        lines, result = lines + more, result | distances
    return "\n".join(lines), result


def distance_to_truth(model, bound, exact, shapes, images):
    """For images of `shapes`: lines, and the same as a dict.

    The mean of -log2 p_model(X) + log2 p_true(X) is KL(p_true || p_model), the distance to the
    limit; here it is estimated by these images. (The bound's column has the bound's gap as well.)
    """
    true = shapes.log_prob(images)
    bits = float(bits_per_dim(true.mean(), model.dims))
    shape_bits = shapes.log_count / math.log(2)
    wide = widest(model)
    lines = [f"{'true p(X)':{wide}}{bits:8.4f}{bits:8.4f}  the limit: {shape_bits:.1f} bits an "
             "image for what is shown,",
             "the rest is noise. excess over the limit, bits per image:"]
    parts, result = [("total", true, bound.sum(0), exact.sum(0))], dict(true=bits)
    # In a pyramid of two views the truth of each factor is known.
    if len(model.views) == 2 and type(model.views[1].psi) is Half:
        coarse = shapes.log_prob_half(to_array(model.views_of(to_tensor(images))[0]))
        # log p(X | X_1) = log p(X) - log p(X_1), as X_1 is a function of X.
        parts = [(model.names[0], coarse, bound[0], exact[0]),
                 (model.names[1], true - coarse, bound[1], exact[1]), *parts]
    for name, truth, *of_model in parts:
        excess = [float((truth - nats).mean()) / math.log(2) for nats in of_model]
        lines.append(f"{name:{wide}}{excess[0]:8.1f}{excess[1]:8.1f}")
        result[f"excess_bits {name}"] = excess
    return lines, result


def save_picture(path, rows, labels, columns=8):
    """A PNG with, for every `columns` images, a row of each kind. labels: of the rows; rows: uint8
    arrays (N, h, w, 3), shown equally large by repetition of pixels, a row 512 px wide or more."""
    from PIL import Image, ImageDraw, ImageFont

    n, tall, wide = rows[-1].shape[:3]
    columns = min(n, columns)
    enlarge, gap = math.ceil(512 / (columns * max(tall, wide))), 4
    tall, wide = enlarge * tall, enlarge * wide
    font = ImageFont.load_default(columns * wide // 28)  # 18 px or more: grows with the picture
    left = 3 * gap + math.ceil(max(font.getlength(label) for label in labels))
    groups, group_height = math.ceil(n / columns), len(rows) * (tall + gap) + 2 * gap
    picture = Image.new("RGB", (left + columns * (wide + gap), groups * group_height), "white")
    for group, (j, images) in itertools.product(range(groups), enumerate(rows)):
        top = group * group_height + j * (tall + gap) + gap
        ImageDraw.Draw(picture).text((gap, top + tall // 2), labels[j], "black", font, anchor="lm")
        for i, image in enumerate(images[group * columns : (group + 1) * columns]):
            tile = Image.fromarray(image).resize((wide, tall), Image.Resampling.NEAREST)
            picture.paste(tile, (left + i * (wide + gap), top))
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def save_samples(model, views, path, given=0):
    """A picture of samples, the first 128, of the first views; given: how many were not sampled."""
    rows, labels = [], []
    for k, x in enumerate(views):
        view = model.views[k]
        shade = to_array(x[:128]).astype(int) * 255 // (view.levels - 1)
        rows.append(np.broadcast_to(shade, (*shade.shape[:3], 3)).astype(np.uint8))
        labels.append(f"{view.name} {'given' if k < given else 'sampled'}")
    save_picture(path, rows, labels)


# --- Sampling fast: each value once, independent pixels together -------------------------------
#
# For an image of 128x128 the naive sampler makes 16,384 passes. But most of each only repeats the
# passes before it, and pixels that do not need each other can be drawn together.
#
# **The wavefront.** What does pixel (r, c) need in the pyramid's light network? Each of v's 1 + 6
# convolutions (the first, and 2 in each of 3 blocks) looks one column to the right, the first of
# them in the row above: so nothing further to the right than column c + 7, in row r - 1 and in the
# rows above that. (h does not look to the right, but for h_above, by one.) Let each row be a number
# of steps, the *lag*, behind the row above: pixel (r, c) is drawn in step lag * r + c, together
# with (r - 1, c + lag). Before it (r - 1, c + 7) must be drawn: lag * (r - 1) + c + 7 < lag * r +
# c, so the lag is 8 or more. The step of each pixel at lag 8, step 8 in brackets:
#
#     row 0    0   1   2   3   4   5   6   7  (8)  9  10
#     row 1   (8)  9  10  11  12  13  14  15  16  17  18
#     row 2   16  17  18  19  20  21  22  23  24  25  26
#
# The pixels of a step lie on a diagonal, a wave that runs to the right, and 128x128 are drawn in
# 8 * 127 + 128 = 1,144 steps.
#
# (An option, look_right=False: the kernel of v's later layers is moved to the left, VERTICAL_LEFT.
# Then only the first layers look right, to (r - 1, c + 1), and the lag is 2: 382 steps. The price
# is a blind spot, as v sees no more than one column to the upper right.)
#
# **Running ahead.** Call a value inside the network, at all positions, a *node*; a node that uses
# another one is its *reader*, the other one the *source*. At each position a node is computed some
# steps before the pixel there is drawn. The number of these steps, the same everywhere, is how
# far it is *ahead*:
#
#     pixel (r, c) is drawn in            step lag * r + c
#     a node, at (r, c), is computed in   step lag * r + c - ahead
#
# v's last convolution is 0 ahead. It reads its source one column to the right, where the pixel is
# drawn a step later: so the source must be 1 ahead, to be there in time; the source of the
# convolution before must be 2 ahead; and so on, back to v_first:
#
#     v's convolutions       v_first    block 1            block 2            block 3
#                                       conv_in conv_out   conv_in conv_out   conv_in conv_out
#     ahead                  6          5       4          3       2          1       0
#     step 24 computes it    (0, 30)    (0, 29) (0, 28)    (0, 27) (0, 26)    (0, 25) (0, 24)
#
# as 30 - 6 = 24, 29 - 5 = 24, .. All of h and the output are 0 ahead, at (0, 24), and after them
# step 24 draws that pixel. In row 1 it does the same 8 columns further to the left: v_first at (1,
# 22), .., pixel (1, 16).
#
# In general a reader at (r, c) reads its source at (r + dy, c + dx), where dy is 0, or negative for
# rows above. The step in which the source is computed there must not be later than the reader's
# own. (It may be the same one: within a step sources are computed before their readers. Not so x,
# which is drawn last: see below.)
#
#     lag * (r + dy) + c + dx - ahead of the source <= lag * r + c - ahead of the reader
#     ahead of the source >= ahead of the reader + lag * dy + dx
#
# The conv_out of block 3, for example, is 0 ahead, and reads columns c - 1 .. c + 1 of two rows, r
# and the one above. (r, c + 1) asks for 0 + 8 * 0 + 1 = 1, (r - 1, c + 1) for 0 - 8 + 1 = -7, which
# is less: the lower right corner of a kernel asks for the most. The output is 0 ahead. From there
# back, each node gets the least that serves all its readers.
#
# What decides the lag? x. Pixel (r, c) is drawn at the end of step lag * r + c, and can be read
# from the next one on. So x counts as -1 ahead. A node can be given whatever its readers ask for, x
# cannot. So the lag gives way: it is the smallest number for which no reader of x asks for more
# than -1:
#
#     reader of x    lower right corner    its ahead    -1 >= its ahead + lag * dy + dx
#     v_first        (r - 1, c + 1)        6            -1 >= 6 - lag + 1      lag >= 8, as above
#     h_above        (r - 1, c + 1)        0            -1 >= 0 - lag + 1      lag >= 2
#     h_left         (r, c - 1)            0            -1 >= 0 - 1            any lag
#
# (If all nodes were one step further ahead, v_first would ask for lag >= 9, and h_left for what no
# lag gives, -1 >= 1 - 1.)
#
# (The 6 does not depend on the lag here, as no kernel ends in a row above but those that read x. In
# other networks it may, so smallest_lag tries one lag after the other.)
#
# **How it is done.** Any network will do that consists of Convs, which may not read rows below, and
# of functions of values at one position. `traced`, in Tracing, makes a list of Nodes of it; Plan
# decides all that can be decided beforehand; and sample_fast is the loop
#
#     for each step                   Plan.steps
#         for each node that is due   Plan.run_step
#             read, compute, store    Plan.value, Plan.compute, Node.window
#         draw the pixels where the output was computed, write them into x
#
# Nodes that are equally far ahead are a *group*: they are computed in the same steps, at the same
# positions. What a node has computed last is its `latest`. That will do for readers in its group
# that read at their own position alone. For all others it also has a `buffer`, an image of all that
# it has computed. For example a light network of one block, without X^. v has 1 + 2 convolutions,
# and needs (r - 1, c + 3): its lag is 4. Below are its nodes, in the order in which they are
# computed within a step; h_above(x) + h_left(x), a sum of convolutions, is one.
#
#     asked for by    the reader: how far it is ahead + how far it reads to its right
#     buffer for      who cannot take `latest`
#
# For example 3 is asked for by 4, which is 1 ahead and reads 1 to its right: so it is 1 + 1 ahead;
# and 4 cannot take its `latest`, which is of another position. 1 is read twice: by 3 in the same
# step, and by 7 two steps later. (2 is, too, by 9 and 13 in the same step.)
#
#         node                          ahead    asked for by     buffer for
#      1  v_first(x)                      2       3: 2 + 0      7, which is 0 ahead
#      2  h_above(x) + h_left(x)          0       9: 0 + 0      -
#      3  concat_elu of 1                 2       4: 1 + 1      4, at (r, c + 1), ..
#      4  v's conv_in of 3                1       5: 1 + 0      -
#      5  concat_elu of 4                 1       6: 0 + 1      6, at (r, c + 1), ..
#      6  v's conv_out of 5               0       7: 0 + 0      -
#      7  v's gate of 1 and 6             0       8: 0 + 0      -
#      8  concat_elu of 7                 0      10: 0 + 0      -
#      9  concat_elu of 2                 0      10: 0 + 0      10, at (r, c - 1), ..
#     10  h's conv_in of 9 +
#         conv_aux of 8                   0      11: 0 + 0      -
#     11  concat_elu of 10                0      12: 0 + 0      12, at (r, c - 1), ..
#     12  h's conv_out of 11              0      13: 0 + 0      -
#     13  h's gate of 2 and 12            0      14: 0 + 0      -
#     14  elu of 13                       0      15: 0 + 0      -
#     15  last of 14                      0     (the pixel)       -
#         x                              -1     (drawn last)      1 and 2
#
# Step 25, for example, draws (3, 13), (4, 9), (5, 5), as 4 * 5 + 5 = 25, and (6, 1). In terms of
# what follows, if the image is 16 wide:
#
#     v_first, group of 2 ahead     places (3, 15), (4, 11), (5, 7), (6, 3): its 4 values there are
#                                   v_first.latest, and are copied into v_first.buffer
#     v's conv_in, group of 1       at (3, 14), (4, 10), (5, 6), (6, 2): reads the buffer of 3,
#                                   concat_elu of v_first, around each of these
#     v's gate, group of 0          at (3, 13), (4, 9), (5, 5), (6, 1): reads v_first.buffer there,
#                                   from two steps before, and the `latest` of conv_out
#
# Two things are left for sections of their own: *Raster order*, where the image is too narrow for a
# wavefront, and *Half the resolution*. Until then let `spacing` and `apart` be 1, and skip what is
# done if `lag` is None.


class Places(typing.NamedTuple):
    """Where a group is due in a step: `count` positions (row, column), (row + row_step,
    column + column_step), .. On a diagonal of lag 8 they are 1 and -8."""

    row: int
    column: int
    count: int
    row_step: int
    column_step: int

    def positions(self):
        """The rows and the columns of the `count`."""
        rows = [self.row + i * self.row_step for i in range(self.count)]
        columns = [self.column + i * self.column_step for i in range(self.count)]
        return rows, columns


@dataclasses.dataclass(eq=False, repr=False)
class Read:
    """What a node reads of `source` for its position (r, c).

    If weight is None that is the value of source at (r, c). If not, it is a rectangle of values,
    those that a convolution's kernel multiplies: nr_rows x nr_columns, `apart` pixels apart, the
    first at (r + top, c + left). For v_first: Read(x, weight, top=-2, left=-1, nr_rows=2,
    nr_columns=3).
    """

    source: "Node"
    weight: torch.Tensor | None = None  # (F, nr_rows, nr_columns * C): rows_of can cut it by rows
    top: int = 0
    left: int = 0
    nr_rows: int = 1
    nr_columns: int = 1
    apart: int = 1  # see Half the resolution
    # Decided in Plan.allocate: read from source.latest? If not, from source.buffer.
    at_hand: bool = False
    # How it is added to a running total: (total, values) -> total + values, or, with a weight,
    # total + values @ weight.T (choose_products puts that in).
    add: object = operator.add

    @property
    def bottom(self):
        """The dy of the last row."""
        return self.top + (self.nr_rows - 1) * self.apart

    @property
    def right(self):
        """The dx of the last column."""
        return self.left + (self.nr_columns - 1) * self.apart

    @functools.cached_property
    def numbers(self):
        """How many numbers are read for one position: the columns of the weight."""
        return self.nr_rows * self.nr_columns * self.source.channels

    @property
    def own_position(self):
        """Is it of the node's own position alone?"""
        return (self.top, self.left, self.nr_rows, self.nr_columns) == (0, 0, 1, 1)


@dataclasses.dataclass(eq=False, repr=False)
class Node:
    """A value inside the network, at every position (r, c), or, if it is of half or a quarter of
    the resolution, at those of which r and c are multiples of `spacing`, 2 or 4.

    It is function(*what it reads); or, without a function, bias + the sum of what it reads, each
    times the weight of its Read if that has one. x, and what is known from the start, read nothing.
    (eq=False: a node is equal to itself alone.)
    """

    spacing: int
    channels: int
    reads: list = dataclasses.field(default_factory=list)
    function: object = None
    bias: torch.Tensor | None = None  # (C,)
    known: bool = False  # from the start, as what is made of X^ alone
    # Decided in Plan:
    ahead: float = 0  # in steps, of the pixel there: a whole number; in raster order also infinite
    by_rows: bool = False  # see Raster order
    margin: tuple = (0, 0, 0)  # of zeros in `buffer`: rows above, columns left, columns right
    buffer: torch.Tensor | None = None  # (n, H, W, C) with margins, if it is needed
    latest: torch.Tensor | None = None  # (n * positions, C)

    @property
    def computed(self):
        """Is it neither x nor known from the start?"""
        return len(self.reads) > 0

    @property
    def is_sum(self):
        """A convolution, or several added up, perhaps with other values."""
        return self.function is None and self.computed

    @functools.cached_property
    def group(self):
        """The same for nodes that are computed in the same steps, at the same positions. (To be
        asked for when `ahead` is decided.)"""
        return self.spacing, self.ahead

    def window(self, places, read=None):
        """A torch view (no copy), (n, count, nr_rows, nr_columns, C), of `buffer`: of each image,
        for each position of `places`, the rectangle that `read` tells, or the position alone.

        torch's as_strided(size, strides, start) is a view of which element i, j, .. is number start
        + i strides[0] + j strides[1] + .. of the memory: no copy, and no table of indices. It will
        do, as positions are equally far apart in memory: next_place, on a diagonal a row down and
        lag columns to the left. With 2 channels, rows of 5 columns, no margins, lag 3, and a kernel
        of one row and 2 columns, c and c + 1:

            element of the buffer     0 1   2 3   4 5   6 7   8 9     row 0, columns 0 .. 4
                                    10 11 12 13 14 15 16 17 18 19     row 1
            position 0 = (0, 3)   reads 6 7 8 9
            position 1 = (1, 0)   reads 10 11 12 13
            start 6;  next_place = 1 * 10 - 3 * 2 = 4;  next_column = 2

        (Margins shift the start, and make rows longer; nothing else.)
        """
        read = read or Read(self)  # of one value, at the position itself
        next_image, next_row, next_column, _ = self.buffer.stride()
        above, left, _ = self.margin  # row r of the image is row above + r of the buffer
        start = (above + places.row + read.top) * next_row
        start += (left + places.column + read.left) * next_column
        next_place = places.row_step * next_row + places.column_step * next_column
        size = (self.buffer.shape[0], places.count, read.nr_rows, read.nr_columns, self.channels)
        strides = (next_image, next_place, read.apart * next_row, read.apart * next_column, 1)
        return self.buffer.as_strided(size, strides, start)


class Plan:
    """What is computed when, for n images of size (H, W), and how. Raises Problem.

    nodes: all that is computed, sources before readers, the output last. (Without x and what is
    known from the start, which are only read.)
    lag: None where there is no wavefront, see Raster order.
    least_lag: 2 where cells of 2x2 are cut, see sample_fast.
    """

    def __init__(self, net, channels, n, size, embeddings=(), least_lag=1):
        self.n, self.size, self.threads = n, size, torch.get_num_threads()
        self.x = Node(1, channels)
        self.nodes = traced(net, self.x, n, size, embeddings)
        self.output = self.nodes[-1]
        self.lag = self.smallest_lag(least_lag)
        if self.lag:
            ahead = self.needed_ahead(self.lag)
            for node in self.nodes:
                node.ahead = ahead[node]
        else:  # the image is too narrow
            self.nodes = in_raster_order(self.nodes, self.x)
        self.allocate(next(net.parameters()))
        choose_products(self)  # puts in each Read's `add`, see Products and threads
        self.work = work_of(self.nodes, n)  # for set_threads

    def smallest_lag(self, least_lag):
        """None if it would be the width or more: then no two pixels are drawn in one step."""
        for lag in range(least_lag, self.size[1]):
            if self.needed_ahead(lag)[self.x] <= -1:  # x is that far ahead, see above
                return lag
        return None

    def needed_ahead(self, lag):
        """{node: how far ahead its readers need it}, from the output back; that of x, too."""
        ahead = collections.defaultdict(lambda: -math.inf, {self.output: 0})
        for node in reversed(self.nodes):
            for read in node.reads:  # (bottom, right) is the (dy, dx) of the lower right corner
                needed = ahead[node] + lag * read.bottom + read.right
                ahead[read.source] = max(ahead[read.source], needed)
        return ahead

    def allocate(self, weight):
        """Decides where each read is from, and makes the buffers.

        A read is `at_hand`, of source.latest, if source and reader are of one group, so that the
        source has just been computed for the same positions, and if only the own position is read.
        All others are of source.buffer. Its margins are zeros, as what kernels read beyond the
        image is 0.
        (What is not computed yet is mostly 0, too; by lag and `ahead` nobody reads it.)
        """
        buffered = collections.defaultdict(list)  # source -> the reads of its buffer
        for node in self.nodes:
            for read in node.reads:
                source = read.source
                same_group = source.computed and source.group == node.group
                read.at_hand = same_group and read.own_position
                # (What is known has its buffer. x is in no group, as it is drawn last.)
                if not read.at_hand and not source.known:
                    buffered[source].append(read)
        for source, reads in buffered.items():
            above, left, right = source.margin = margin_for(reads)
            height, width = above + self.size[0], left + self.size[1] + right
            # (The row that serves for all: skip this until Half the resolution is read.)
            one_row = not self.lag and one_row_will_do(source, reads)
            rows = 1 if one_row else height
            buffer = zeros((self.n, rows, width, source.channels), weight)
            source.buffer = buffer.expand(-1, height, -1, -1)  # one row: at stride 0

    def steps(self):
        """Of each step, in order: {group: Places to compute}. (In the light network from step -6
        on. At half the resolution a group is due in every second step at most. In raster order
        steps are pairs, see there; they only have to be in order.)"""
        groups = {node.group for node in self.nodes}
        due = collections.defaultdict(dict)
        for spacing, ahead in groups:
            if self.lag:
                # `places`: where pixels are drawn in `step`. These nodes are there `ahead` earlier.
                for step, places in diagonals(self.size, self.lag, spacing).items():
                    due[step - ahead][spacing, ahead] = places
            else:
                for step, places in raster_steps(self.size, spacing, ahead):
                    due[step][spacing, ahead] = places
        for step in sorted(due):
            yield due[step]

    @torch.inference_mode()  # no gradients, and quicker than no_grad
    def run_step(self, due):
        """Compute what is due, {group: Places}."""
        set_threads(self, due)  # for speed alone
        for node in self.nodes:
            places = due.get(node.group)
            if places is None:
                continue
            node.latest = self.compute(node, places)
            if node.buffer is not None:
                window = node.window(places)
                window.copy_(node.latest.view(window.shape))

    def compute(self, node, places):
        """The node's values at places, (n * positions, C)."""
        if node.function is not None:
            return node.function(*[self.value(read, places) for read in node.reads])
        total = node.bias
        for read in node.reads:
            value = self.value(read, places)
            # add: total + value, or, with a weight, total + value @ weight.T. (There is no bias
            # after split_sum, and then the first read is the part, which has no weight.)
            total = value if total is None else read.add(total, value)
        return total

    def value(self, read, places):
        """What is read for places, (n * positions, nr_rows * nr_columns * C)."""
        if read.at_hand:
            return read.source.latest
        # The window is a view. reshape copies where what is read is not one run of memory.
        return read.source.window(places, read).reshape(-1, read.numbers)


def margin_for(reads):
    """How far reads reach beyond the image: (rows above, columns left, columns right)."""
    above = max(0, *(-read.top for read in reads))
    left = max(0, *(-read.left for read in reads))
    right = max(0, *(read.right for read in reads))
    return above, left, right


@functools.lru_cache(16)
def diagonals(size, lag, spacing):
    """{step: Places of what is 0 ahead then}, of positions `spacing` pixels apart."""
    height, width = size
    waves = collections.defaultdict(list)
    for r, c in itertools.product(range(0, height, spacing), range(0, width, spacing)):
        waves[lag * r + c].append((r, c))
    # The first position is the topmost; the others lie down the diagonal, without gaps.
    return {step: Places(*positions[0], len(positions), spacing, -lag * spacing)
            for step, positions in waves.items()}


def sample_fast(factor, n, x_hat, draw, tight=False, shift=0.0, progress=None):
    """What sample_naive samples, in the time of 2 to 15 passes. (It computes about as much as one,
    but in many small steps.) In exact arithmetic the images are the same; float32 sums in another
    order, so that now and then a pixel, and those after it, differ.
    """
    channels, height, width = factor.view.shape
    # When cut, a pixel depends on those before it in its cell, by its interval, which is no read of
    # the network. With lag 1 the upper right and the lower left one of a 2x2 cell would be drawn
    # together; lag 2 draws them in order. (CausalNet's is 2 or more anyway, by h_above.)
    least_lag = factor.view.psi.cell if tight else 1
    embeddings = factor.embeddings(x_hat)
    plan = Plan(factor.net, channels + 1, n, (height, width), embeddings, least_lag)
    x = torch.zeros(n, channels, height, width, dtype=torch.uint8, device=factor.a_weight.device)
    with threads_put_back(), torch.no_grad():
        for due in plan.steps():
            plan.run_step(due)
            # Where the output is due pixels can be drawn, as it is 0 ahead.
            pixels = due.get(plan.output.group)
            if pixels is None:
                continue
            rows, columns = pixels.positions()
            params = plan.output.latest.double()
            head = factor.head(params[:, :, None, None], shift)
            interval_of = intervals_at(factor.view.psi, x, x_hat, rows, columns) if tight else None
            drawn = draw(head, rows, columns, interval_of).view(n, -1, channels)  # (n, count, C)
            x[:, :, rows, columns] = drawn.transpose(1, 2).to(torch.uint8)
            # To the plan's x as well, on -1 .. 1 with the plane of ones. (Pixels not drawn yet are
            # 0 there, -1 in sample_naive: what is computed does not read them.)
            unit = to_unit(drawn, factor.view.levels, factor.a_weight.dtype)
            planes = F.pad(unit, (0, 1), value=1.0)  # (n, count, C + 1)
            plan.x.window(pixels).copy_(planes[:, :, None, None])
            if progress:
                progress(n * pixels.count)
    return x


def intervals_at(psi, x, x_hat, rows, columns):
    """What interval_of is in sample_naive, for P pixels (rows, columns) of x at once: the function
    drawn -> (lo, hi) of the next channel, (n P, 1, 1, 1), first all of image 0, then of image 1, ..

    Each pixel's cell is cut out of x, and its pixel out of x_hat: then psi.bounds need only look at
    n P images of one cell. For example, of pixels (0, 5) and (1, 2) the cells of 2x2 begin at (0,
    4) and (0, 2); in these they are at (0, 1) and (1, 0).
    """
    rows, columns = torch.tensor([rows, columns], device=x.device)
    cell_row, cell_column = rows % psi.cell, columns % psi.cell  # in their cells, (P,)
    inside = torch.arange(psi.cell, device=x.device)
    all_rows = (rows - cell_row)[:, None, None] + inside[:, None]  # (P, cell, 1)
    all_columns = (columns - cell_column)[:, None, None] + inside  # (P, 1, cell)
    # Indices (P, cell, 1) and (P, 1, cell) make (P, cell, cell) of them.
    cells = x[:, :, all_rows, all_columns]  # a copy, (n, C, P, cell, cell)
    cells = cells.transpose(1, 2).flatten(0, 1)  # (n P, C, cell, cell)
    # Cells are in the order image 0's P, image 1's P, .., and so are their pixels of x_hat.
    of_x_hat = x_hat[:, :, rows // psi.cell, columns // psi.cell]  # (n, C^, P)
    of_x_hat = of_x_hat.transpose(1, 2).flatten(0, 1)[:, :, None, None]  # (n P, C^, 1, 1)
    # Of each cell the pixel that is drawn: cells[each, channel, row, column]. (In the example, of 2
    # images, `each` is 0 1 2 3, `row` 0 1 0 1, `column` 1 0 1 0.)
    each = torch.arange(len(cells), device=x.device)
    row, column = cell_row.repeat(len(x)), cell_column.repeat(len(x))  # (n P,)

    def interval_of(drawn):
        for channel, values in enumerate(drawn):
            cells[each, channel, row, column] = values.flatten().to(torch.uint8)
        ends = psi.bounds(cells, of_x_hat)
        return [end[each, len(drawn), row, column][:, None, None, None] for end in ends]

    return interval_of


# --- Raster order: what depends on rows above alone, a row at once -----------------------------
#
# If the lag would be the width W or more, no two pixels are drawn in one step. So it is in the
# pyramid's 8x8, where the smallest lag is 8, and in PixelCNN++ at 32x32, which looks further to the
# right than the image is wide. Then pixels are drawn one by one, and the rows above are complete
# when a row is begun (on a wavefront they are not).
#
# That can be used. A convolution is a matrix product: what the kernel reads at each of some
# positions, times its weights; and one large product is faster than many small ones (for one image
# two to five times). Call a node *by rows* if all that it reads is
#
#     in rows above, of whatever node, as these are complete, or
#     of a node by rows, or
#     of one that is known from the start.
#
# So are v_first, which reads rows above of x, v's next convolution, which reads v_first, and so on:
# all of v. When a row is begun the whole of it can be computed at once. A sum of which only a part
# is so is split: this part becomes a node of its own, by rows, and the rest is added pixel by
# pixel. For example h's conv_in, to which v is added by a conv_aux (as v is by rows, it is complete
# in the own row, too):
#
#     out = [bias + kernel row -1 of h + v by conv_aux, a row at once]
#           + kernel row 0 of h, pixel by pixel
#
# The light network of one block, of the table above, in raster order:
#
#     when a row is begun       v's nodes, from v_first to the last concat_elu
#                               new: bias + h_above(x) + row -1 of h_left(x)
#                               new: bias + row -1 of h's conv_in + v by a conv_aux
#                               new: bias + row -1 of h's conv_out
#     for each of its pixels    the first new one + row 0 of h_left(x);  concat_elu
#                               the second + row 0 of conv_in;  concat_elu
#                               the third + row 0 of conv_out;  gate; elu; last;  the pixel
#
# Steps are pairs (row, column - ahead), and come in the order of these pairs:
#
#     ahead        step                when
#     infinity     (row, -infinity)    what is by rows: a row at once, before its pixels
#     0            (row, column)       all else in CausalNet: pixel by pixel
#     -infinity    (row, infinity)     what nobody asks for in its own row (in other networks: say,
#                                      what reads x to its left, and is read by the next row
#                                      alone): a row at once, after its pixels
#
# As one row is done after the other, what is read in its own row alone needs memory for one row:
# the next one takes its place (one_row_will_do; all rows of the buffer are the same memory). What
# is not computed yet is then no longer 0, but of the row before; nobody reads it.


BY_ROWS = math.inf


def in_raster_order(nodes, x):
    """Decides how far ahead nodes are -> the nodes, with those that are new. Raises Problem."""
    # Forwards: which nodes are by rows.
    planned = []
    for node in nodes:
        planned += split_sum(node, is_output=node is nodes[-1])
    # Backwards, as in Plan.needed_ahead, but rows above are complete: only what is read in a node's
    # own row has to run ahead. (What a node by rows reads there is by rows itself, or known.)
    ahead = collections.defaultdict(lambda: -math.inf, {planned[-1]: 0})
    for node in reversed(planned):
        if node.by_rows:
            node.ahead = BY_ROWS
            continue
        node.ahead = ahead[node]
        for read in node.reads:
            if read.bottom == 0:
                ahead[read.source] = max(ahead[read.source], node.ahead + read.right)
    if ahead[x] > -1:
        raise Problem("sample_fast: the network is not causal")
    return planned


def split_sum(node, is_output):
    """Decides whether a node is by rows -> [node], or, if it is a sum of which a part can be, [this
    part, the rest]:

        before       conv_in     reads h, rows -1 and 0; v          bias
        after        the part    reads h, row -1; v                 bias    by rows
                     conv_in     reads the part; h, row 0

    The output is not to be by rows, as it is wanted pixel by pixel. A node without an early product
    stays as it is, as nothing would be gained; a function has no products.
    """
    early, late = [], []  # what can be read when the row is begun; what needs pixels of this row
    for read in node.reads:
        # A kernel that begins at row `top` has -top / apart rows above the node's own: h's conv_in
        # (top -1, 2 rows) 1, v_first (top -2, 2 rows) 2, which is all.
        nr_above = min(read.nr_rows, (-read.top) // read.apart)
        own_row_too = read.source.by_rows or read.source.known  # then all of its rows are early
        nr_early = read.nr_rows if own_row_too else nr_above
        if nr_early > 0:
            early.append(rows_of(read, 0, nr_early))
        if nr_early < read.nr_rows:
            late.append(rows_of(read, nr_early, read.nr_rows))
    if not late and not is_output:  # as v's nodes: all by rows
        node.by_rows = True
        return [node]
    product_is_early = any(read.weight is not None for read in early)
    if not product_is_early:  # as concat_elu and gate of h: as it is
        return [node]
    part = dataclasses.replace(node, reads=early, by_rows=True)  # as h's convolutions: split
    node.reads, node.bias = [Read(part), *late], None  # the part has the bias
    return [part, node]


def rows_of(read, first, end):
    """The same of the rows first .. end - 1 of what a kernel reads."""
    weight = None if read.weight is None else read.weight[:, first:end]
    top = read.top + first * read.apart
    return dataclasses.replace(read, weight=weight, top=top, nr_rows=end - first)


def one_row_will_do(source, reads):
    """Is all that they read of source in their own row? (And not by `up`: see the end of Half the
    resolution.)"""
    up = any(read.weight is not None and read.apart < source.spacing for read in reads)
    return not up and all(read.top == 0 for read in reads)


def raster_steps(size, spacing, ahead):
    """The steps of a group, and its Places in each: a whole row or one pixel."""
    height, width = size
    for r in range(0, height, spacing):
        if math.isinf(ahead):  # before or after the row's pixels
            yield (r, -ahead), Places(r, 0, width // spacing, row_step=0, column_step=spacing)
        else:
            for c in range(0, width, spacing):
                yield (r, c - ahead), Places(r, c, 1, row_step=0, column_step=0)


# --- Half the resolution: values at every second pixel -----------------------------------------
#
# PixelCNN++ has values of half and of a quarter of the resolution. The sampler keeps these, too, in
# images as large as x: in every second (fourth) row and column, `spacing` = 2 (4) pixels apart,
# with zeros between. So each value has a position in pixels of x, and a step lag * r + c - ahead;
# and all that was said of waves and rows holds as it stands, with distances in pixels of x.
#
# Only what a kernel multiplies lies further apart, `apart` pixels of x:
#
#     apart = the smaller of the spacings of source and result
#
# On the way down a kernel's neighbours are neighbours in the source, the finer one; on the way up
# they are neighbours among the values and zeros between, which stand as close as the result, again
# the finer one. A kernel of columns -1 and 0, with weights w_-1 and w_0,
#
#     from spacing  to    source, columns 0 .. 5    apart    out in column 2
#          1        2     a b c d e f               1        w_-1 b + w_0 c
#          2        2     a 0 b 0 c 0               2        w_-1 a + w_0 b
#          2        1     a 0 b 0 c 0               1        w_-1 0 + w_0 b  (0: between a and b)
#
# The last one doubles the resolution, `up`. As Conv has the same zeros between, it is an ordinary
# convolution here. (Rows are alike: `out` in an odd row reads zeros by kernel row 0.)
#
# (A kernel that looks one column to its right at spacing 2 looks 2 pixels to the right. So in
# six_stages(1) v looks 1 + 2 * (1 + 2 + 4 + 4 + 2 + 1) + (1 + 2) + (2 + 1) = 35 pixels to the
# right: by its first layer, by two convolutions in each of the six blocks, and by one at each
# change of resolution, which reaches by the finer spacing. The lag is 36. That of six_stages(6) is
# 176; images that are no wider are sampled in raster order.)
#
# (In raster order what is read by `up` keeps all its rows in memory, even if it is read in its own
# row alone: in odd rows its reader must find zeros. If all rows were one, it would find the values
# of the even row before.)


def convolution(conv, x, size):
    """A Node: what conv makes of the Node x, in images of size (H, W). Raises Problem."""
    spacing = x.spacing // 2 if conv.up else x.spacing * conv.stride
    if spacing == 0:
        raise Problem("sample_fast: values of more than the resolution of x")
    if conv.rows[1] > 0:
        raise Problem("sample_fast: the network is not causal, or reads rows below")
    if size[0] % spacing or size[1] % spacing:
        raise Problem(f"sample_fast: {size[0]}x{size[1]} cannot be halved as the network wants")
    weight = conv.weight().permute(0, 2, 3, 1)  # (F, rows, columns, C)
    if weight.shape[3] != x.channels:
        raise Problem(f"sample_fast: a Conv of {weight.shape[3]} channels reads {x.channels}")
    apart = min(x.spacing, spacing)
    nr_rows, nr_columns = weight.shape[1:3]
    top, left = apart * conv.rows[0], apart * conv.columns[0]
    read = Read(x, weight.flatten(2), top, left, nr_rows, nr_columns, apart)
    return Node(spacing, len(conv.b), [read], bias=conv.b)


# --- Tracing: what a network computes, as a list of nodes --------------------------------------
#
# The nodes of CausalNet could be written down by hand. But then the network would stand in the file
# twice, and one could drift away from the other. So it is noted what the network computes, once, as
# Nodes, and computed by Plan in each step. To note it, its forward pass is run on a stand-in for x,
# a Symbol, which has no numbers but a Node. What is called with a Symbol notes the call as a new
# Node, and returns the Symbol of that:
#
#     Conv, and functions of ours that are marked `pointwise`,     as they look for a Symbol
#     functions of torch, as F.elu, and +,                         by Symbol.__torch_function__
#
# (Every function of torch looks at its arguments before it runs: if the class of one of them has a
# method __torch_function__, it calls that in its place, and returns what this returns.) Of two
# lines of Block, run on the Symbol of a Node X,
#
#     hidden = self.conv_in(concat_elu(x))
#     hidden = hidden + conv(a)                 (conv: a conv_aux; a: the Symbol of a Node Y)
#
# and of F.elu(h) in CausalNet's last line, on the Symbol of a Node H, there are five calls:
#
#     concat_elu(x)       A = Node(reads=[Read(X)], function=concat_elu)
#     conv_in(..)         B = Node(reads=[Read(A, its weight, ..)], bias=its bias)
#     conv(a)             C = Node(reads=[Read(Y, its weight)], bias=its bias)
#     hidden + ..         D = Node(reads=[those of B and of C], bias=both biases added)
#     F.elu(h)            E = Node(reads=[Read(H)], function=value -> F.elu(value, its options))
#
# A sum takes in its convolutions, so that it is one running total in place of two results and an
# addition. In the end nobody reads B and C, and they are dropped. (If another one read B, B would
# stay, and its product be made twice; CausalNet has no such case.) Without its mark concat_elu
# would be refused, as its elu works in place; and without that it would be three nodes, -x, cat and
# elu.
#
# What does not depend on x, as f_w(X^) and conv_aux of it, is no Symbol: it is really computed,
# once for the whole image. Where such a tensor is added to a Symbol, a Node is made of it that is
# `known`, and has its buffer from the start.
#
# In a step A.function is given a list (n * positions, C), of the values that are due, in place of
# images (n, C, H, W). So it must do the same to both: dim 1 are channels in both, and no position
# may see another one. That is tried out when it is noted.


def traced(net, x, n, size, embeddings):
    """The Nodes of net(x, embeddings), x being a Node, for n images of size (H, W): in the order of
    computation, the output last. Raises Problem."""
    recorder = Recorder(n, size, next(net.parameters()))
    output = net(recorder.symbol(x), embeddings)
    if not isinstance(output, Symbol) or output.node.spacing > 1 or output.node is x:
        raise Problem("sample_fast: the network's output is x, or smaller, or does not depend on x")
    needed = {output.node}  # leaving out what nobody reads, as B and C above
    for node in reversed(recorder.nodes):
        if node in needed:
            needed.update(read.source for read in node.reads)
    return [node for node in recorder.nodes if node in needed]


class Symbol(torch.Tensor):
    """Stands for a Node while a network is traced, see above. (A Tensor, so that all its methods, +
    and the like come to __torch_function__; without numbers, as nothing is computed of it.)"""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        symbols = elements((args, kwargs), Symbol)
        if not symbols:  # it is in something that is no list, tuple or dict
            raise Problem(f"sample_fast: {name_of(function)} takes values in an unknown way")
        return symbols[0].recorder.record(function, args, kwargs)


def elements(structure, kind):
    """Those of a kind in lists, tuples and dicts that may lie in each other, in order.
    (map_aggregate(structure, f) returns the same structure with each element replaced by f of it;
    here it only visits them.)"""
    found = []
    map_aggregate(structure, lambda a: found.append(a) if isinstance(a, kind) else None)
    return found


ADDITIONS = (torch.add, torch.Tensor.add)  # torch hands on x + y as the second


class Recorder:
    """Lists in `nodes` what a network computes. Raises Problem for what cannot be computed position
    by position."""

    def __init__(self, n, size, weight):
        """weight: one of the network's, for its dtype and device."""
        self.nodes, self.n, self.size, self.weight = [], n, size, weight
        self.made = {}  # (function, Nodes) -> Node, for what is called again, as concat_elu(v)

    def symbol(self, node):
        """A Node's Symbol. New Nodes go to the list."""
        if node.computed and node not in self.nodes:
            self.nodes.append(node)
        symbol = torch.empty(0).as_subclass(Symbol)
        symbol.recorder, symbol.node = self, node
        return symbol

    def convolution(self, conv, symbol):
        """conv(symbol), noted -> the Symbol of its Node."""
        return self.symbol(convolution(conv, symbol.node, self.size))

    def record(self, function, args, kwargs=None):
        """Note a call of a function, with Symbols among its arguments -> the Symbol of its Node. Of
        F.elu(h) args is (h,), kwargs dict(alpha=1.0, inplace=False), as torch hands them on.

        concat_elu(x)       Nodes alone: `call`
        hidden + conv(a)    Nodes alone, an addition with a convolution: sum_of
        hidden + known      symbols_to_nodes makes a Node of the known tensor; then the same
        F.elu(h)            other arguments, too: nodes_to_values hides them, then `call`
        """
        kwargs = kwargs or {}
        # In evaluation dropout returns what it is given. (torch hands on all of its options by
        # keyword.)
        if function is F.dropout and not kwargs["training"]:
            return args[0]
        args, kwargs = self.symbols_to_nodes(function, args, kwargs)
        nodes = elements((args, kwargs), Node)
        nodes_alone = nodes == list(args) and not kwargs  # no other arguments
        if function in ADDITIONS and nodes_alone and are_one_sum(*nodes):
            return self.symbol(sum_of(nodes))
        if not nodes_alone:
            function = nodes_to_values(function, args, kwargs)
        return self.symbol(self.call(function, nodes))

    def symbols_to_nodes(self, function, args, kwargs):
        """The arguments with Nodes in the places of Symbols, and of tensors that are known."""
        spacings = {symbol.node.spacing for symbol in elements((args, kwargs), Symbol)}
        if len(spacings) > 1:
            raise Problem(f"sample_fast: {name_of(function)} of values at two resolutions")
        spacing, = spacings

        def as_node(a):
            if isinstance(a, Symbol):
                return a.node
            if not isinstance(a, torch.Tensor):
                return a
            # What stands beside a Symbol, as conv_aux(e) in conv_in(a) + conv_aux(e), does not
            # depend on x, and is known. (A tensor without dimensions, as a learned scale,
            # stays one: a copy, as the network may change it in place.)
            return self.known(a, spacing) if a.dim() > 0 else a.clone()

        return map_aggregate((args, kwargs), as_node)

    def known(self, value, spacing):
        """A Node of what is known from the start: (n, C, H, W), or what can be broadcast to it."""
        channels = value.shape[-3] if value.dim() > 2 else 1
        height, width = self.size
        try:
            values = value.expand(self.n, channels, height // spacing, width // spacing)
        except RuntimeError:
            raise Problem(f"sample_fast: a tensor {tuple(value.shape)} is no image") from None
        buffer = value.new_zeros(self.n, height, width, channels)
        buffer[:, ::spacing, ::spacing] = values.permute(0, 2, 3, 1)
        return Node(spacing, channels, known=True, buffer=buffer)

    def call(self, function, nodes):
        """A Node: function(*values of Nodes). Called again, as concat_elu(v) for h and by v's next
        block, it is the Node that there is. (What nodes_to_values makes is new each time.)"""
        key = function, *nodes
        if key not in self.made:
            channels = channels_of(function, nodes, self.weight)
            self.made[key] = Node(nodes[0].spacing, channels, list(map(Read, nodes)), function)
        return self.made[key]


def sum_of(nodes):
    """A Node: the sum of Nodes, with what convolutions among them read, and their biases."""
    total = Node(nodes[0].spacing, nodes[0].channels, bias=0)
    for node in nodes:
        if node.is_sum:
            total.bias = total.bias + node.bias
            # Copies, as Plan writes into a Read what depends on its reader.
            total.reads += map(dataclasses.replace, node.reads)
        else:
            total.reads.append(Read(node))
    return total


def are_one_sum(a, b):
    """Whether a + b can take in a convolution, or a sum of some. (If channels differ, + broadcasts:
    then it is a function like others.)"""
    return a.channels == b.channels and (a.is_sum or b.is_sum)


def nodes_to_values(function, args, kwargs):
    """The function of values that calls function(*args, **kwargs) with these in the places of
    Nodes: value -> elu(value, alpha=1.0, inplace=False)."""

    @functools.wraps(function)
    def of_values(*values):
        remaining = iter(values)
        filled = map_aggregate(
            (args, kwargs), lambda a: next(remaining) if isinstance(a, Node) else a)
        return function(*filled[0], **filled[1])

    return of_values


def channels_of(function, nodes, weight):
    """How many channels function(*values of Nodes) has. It is tried out; and so is whether the
    function treats each position by itself, as all of CausalNet's do. Raises Problem if not.

    It is given two images, (2, C, H, W), and the list of all positions of the first one, (H W, C).
    What it makes of these must be the same (by a mean over the image, or a softmax over columns, it
    is not), and the list must be as it was, as others read it, too.
    """
    sizes = [(2, node.channels, 2, 3) for node in nodes]
    images = [torch.linspace(-1, 1, math.prod(s)).view(s).to(weight) for s in sizes]
    lists = [as_list(image[:1]) for image in images]
    given = list(map(torch.clone, lists))  # to the function, which may change them
    with contextlib.suppress(Exception):  # it may raise any kind
        made, expected = function(*given), as_list(function(*map(torch.clone, images))[:1])
        unchanged = all(map(torch.equal, given, lists))
        alike = made.shape == expected.shape and torch.allclose(expected, made)
        if alike and unchanged:
            return made.shape[1]
    # It has raised something, does not do the same to both, or has changed the list.
    raise Problem(f"sample_fast: {name_of(function)} is no function of values at one position")


def as_list(images):
    """(N, C, H, W) as the list of all positions, (N H W, C)."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def name_of(function):
    name = getattr(function, "__name__", str(function))
    # x.shape is a call of __get__, of an object named "shape".
    return function.__self__.__name__ if name == "__get__" else name


# --- Products and threads: nothing of the method comes here ------------------------------------
#
# Who reads for the method has seen all of it.
#
# By which library, and by how many threads, a Read's values are multiplied by its weight and added.
# No result depends on the choice but by rounding. (Compressed images depend on that: the machine
# that reads them must round as the one that wrote them.)


def choose_products(plan):
    """Puts in each read's `add`, by which it is multiplied and added."""
    for node in plan.nodes:
        columns = plan.size[1] // node.spacing
        positions = 1  # so many at once, or so
        if math.isinf(node.ahead):  # a row
            positions = columns
        elif plan.lag:  # a diagonal goes lag columns to the left in each row
            positions = max(1, columns // plan.lag)
        for read in node.reads:
            if read.weight is not None:
                read.add = product(read.weight.flatten(1), plan.n * positions)


def work_of(nodes, n):
    """{group: multiplications of its largest product, for one position in each of n images}."""
    work = collections.Counter()
    for node in nodes:
        for read in node.reads:
            if read.weight is not None:
                work[node.group] = max(work[node.group], n * read.weight.numel())
    return work


def set_threads(plan, due):
    """The number of threads for a step: all, or one. Small products gain little from more, and
    beside other load threads wait long for each other."""
    work = max(plan.work[group] * places.count for group, places in due.items())
    torch.set_num_threads(plan.threads if work > 20_000_000 else 1)


@contextlib.contextmanager
def threads_put_back():
    """set_threads is for the sampler's steps alone."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def zeros(size, weight):
    """weight.new_zeros(size). On a CPU numpy makes it faster, of memory that is zero already: a
    tenth of the time of 16 images by PixelCNN++."""
    if weight.device.type != "cpu":
        return weight.new_zeros(size)
    memory = np.zeros(math.prod(size) * weight.element_size(), np.uint8)
    return torch.from_numpy(memory).view(weight.dtype).view(size)


def product(weight, positions):
    """The function (total, values) -> total + values weight^T. weight: (F, K), values: (positions,
    K), usually so many.

    MKL and oneDNN are libraries for products; they copy a weight into an order that suits the
    processor, they pack it. MKL, by addmm, does so in each call. oneDNN can keep it packed, and
    takes half the time where there is much to do, on processors with AVX-512 (with AVX2 it has
    never been faster). Its operators are private: where they are missing, addmm serves.
    """
    onednn, large = torch.ops.mkldnn, positions * weight.numel() >= 1_000_000
    cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    cpu = cpu and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    there = hasattr(onednn, "_linear_pointwise") and hasattr(onednn, "_reorder_linear_weight")
    if not (large and cpu and there and torch.backends.mkldnn.is_available()):
        transposed = weight.t().contiguous()
        return lambda total, values: torch.addmm(total, values, transposed)
    packed = onednn._reorder_linear_weight(weight, None)

    def add_product(total, values):
        if total.dim() == 1:  # the bias alone; "none", [], "": no activation, of no options
            return onednn._linear_pointwise(values, packed, total, "none", [], "")
        # (None: without a bias.)
        return onednn._linear_pointwise.binary(values, total.contiguous(), packed, None, "add")

    return add_product


# --- Runs: begun, resumed, stopped -------------------------------------------------------------
#
# `train`, the function, is what `python pixelaux.py train` does, in this order:
#
#     plan_run           (by plan_in_turn, in all processes) what is to be trained, and on what: a
#                        new run or one that is there. It may read data for minutes, without a lock
#     lock factor-k      of each factor to train, until the end: nobody else trains it
#     begin              under a lock on config, for a moment: look into the folder again (`agree`),
#                        and write down what is trained
#     train_factor       for each factor
#     show_samples
#
# By what is in the folder and what flags say, plan_run comes to
#
#     in the folder    no flag      --resume              --factor K                 both
#     nothing          a new run    refused               a new run, factor K alone  refused
#     a run            refused      goes on, all factors  K begins (refused if it    K begins or
#                                                         has begun)                 goes on
#
# (It goes on if flags do not contradict what the run was begun with. train_factor then goes on from
# what there is: a finished factor makes no step, one without a checkpoint begins.)
#
# Why look twice? Several commands may train factors of one run at the same time. For example A,
# --factor 0 --minutes 10, and B, --factor 1 --minutes 10, both called when the folder is empty:
#
#     A plans, B plans    both find nothing: a new run, of as yet unknown numbers of steps
#     A begins            writes config.json
#     A trains            finds that 10 minutes are 1,200 steps of factor 0, and writes that, too
#     B begins            finds a run: are its settings B's? But for A's 1,200 steps, which it takes
#                         over, they are; and there is no factor-1.pt
#
# So there are two comparisons:
#
#     existing_run    of the flags with a run that is there. What no flag says is the run's; what
#                     one says must be as in the run, but for where the data lie
#     agree           of all settings with those of a run that was begun since we looked: as both
#                     are new runs, all must be the same, but for where the data lie and the steps
#                     that minutes have become
#
# A flag of the Config that is not given is None in args: the preset or the run decides.


def plan_run(args, out):
    """(config, data) of a new run in the folder `out`, or of the one that is there. Raises
    Problem."""
    # Flags of the Config have the names of its fields.
    given = {name: value for name, value in vars(args).items() if value is not None}
    fields = {name: value for name, value in given.items() if name in Config.__annotations__}
    for name in {"data", "data_dir", "start"} & fields.keys():
        fields[name] = from_anywhere(fields[name])
    if args.minutes:
        if args.steps:
            raise Problem("--steps and --minutes exclude each other")
        fields["anneal"] = 1.0  # a run of any length ends annealed
    if args.resume:
        return existing_run(out, fields)
    if not (out / "config.json").exists():
        return new_run(fields)
    if args.factor is None or (out / f"factor-{args.factor}.pt").exists():
        raise Problem(f"--out: {out} holds a run; --resume goes on with it, or take another folder")
    return existing_run(out, fields)  # for a factor that it does not have yet


def new_run(fields):
    if "minutes" in fields:
        fields["steps"] = (0,)  # those of the preset would come first, see Config
    # A size that does not fit is refused before images are read ("meta": weights without numbers).
    if "size" in fields:
        with torch.device("meta"):
            PixelAux(make_config(**fields))
    folder = fields.setdefault("data_dir", from_anywhere("data"))
    data, size = load_data(fields.get("data", "shapes"), folder, fields.get("size"))
    fields = dict(flip=data.flip) | fields | dict(size=size, data_set=describe(data))
    config = make_config(**fields)
    return config, data.holding_out(config.hold_out)


def existing_run(out, fields):
    """The run that is in `out`, to go on with or for a factor more. Where the data lie may have
    changed since it was begun, and nothing else."""
    config = read_config(out)
    for name, new in fields.items():
        flag, old = f"--{name.replace('_', '-')}", getattr(config, name)
        may_move = name == "data_dir" or (name == "data" and kind_of(old) == kind_of(new))
        if old != new and not may_move:
            was, now = as_typed(name, old), as_typed(name, new)
            raise Problem(f"{flag}: {out} was begun with {was}, not {now}; leave this flag out to "
                          "go on, or take another folder")
        if may_move:
            setattr(config, name, new)
    data, _ = load_data(config.data, config.data_dir, config.size)
    if config.data_set != describe(data):
        raise Problem(f"--data: {out} was begun with {config.data_set}, now there are "
                      f"{describe(data)}{what_changed(out, data)}; --start takes its weights over "
                      "to another folder")
    return config, data.holding_out(config.hold_out)


def as_typed(name, value):
    """A field of the Config as its flag has it: 16x32 is a size, 0.5,2 are minutes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    values = value if isinstance(value, tuple) else (value,)
    mark = "x" if name == "size" else ","
    return mark.join(str(one).removesuffix(".0") for one in values) or "nothing"


def kind_of(data):
    """folder, .npy, or the name of a data set."""
    return ".npy" if data.endswith(".npy") else data.partition(":")[0]


def from_anywhere(place):
    """A path, FILE.npy or folder:PATH, as it is called from any working directory."""
    kind = "folder:" if place.startswith("folder:") else ""
    path = place.removeprefix(kind)
    if path in ("", "shapes", "cifar10", "celeba"):
        return place
    return kind + str(pathlib.Path(path).expanduser().absolute())


def train(args, device):
    if args.start and not args.resume:
        take_over(args)
    kind = pathlib.Path((args.data or "shapes").partition(":")[0]).stem
    out = args.out or pathlib.Path("runs", f"{args.model or 'pyramid'}-{kind}")
    config, data = plan_in_turn(args, out)
    model = PixelAux(config).to(device, memory_format=torch.channels_last)
    factors = factors_to_train(args, model, data)
    # (A factor that has a checkpoint goes on from that: Training.restore puts its weights in
    # place.)
    if config.start and not all((out / f"factor-{k}.pt").exists() for k in factors):
        start_from(model, config.start)
    with contextlib.ExitStack() as held:
        if rank() == 0:
            for k in factors:
                held.enter_context(locked(out, f"factor-{k}"))
            begin(out, config, factors, data, args, device)
        stop = held.enter_context(signals_noted())
        made = 0
        for k in factors:
            show = functools.partial(show_samples, model, k, factors[0], data, out, stop)
            made += train_factor(model, k, data, out, stop, args.compile, args.save_every, show)
        if rank() > 0:
            return
        show_samples(model, factors[-1], factors[0], data, out, stop)
    if not made:
        print(f"{out} was finished before; --start {out} goes on in another folder")
    if args.factor is None:
        few, kind = data.test[:256], "test image"
        if len(data.held_out):  # then the test set is not looked at before `eval`
            few, kind = data.held_out[:256], "held-out image"
        print(report(model, *evaluate(model, few), data, few, kind)[0])
        print(f"\nsamples: {out / 'samples.png'}\nnext: {CALLED} eval {out}")
        print(f"      {CALLED} sample {out}")
    else:
        print(f"factor {args.factor} is in {out / f'factor-{args.factor}.pt'}")


def factors_to_train(args, model, data):
    """Their numbers. Raises Problem if something does not fit."""
    config, nr_factors = model.config, len(model.factors)
    if args.factor is not None and args.factor not in range(nr_factors):
        raise Problem(f"--factor {args.factor}: expected 0..{nr_factors - 1}")
    if len(config.minutes) not in (1, nr_factors):
        raise Problem(f"--minutes: expected one number, or {nr_factors}, one a factor")
    if config.batch_size % world_size():
        n = config.batch_size
        raise Problem(f"--batch-size: {world_size()} processes cannot share {n} images equally")
    if len(data.test) < 32:
        warn(f"{counted(len(data.test), 'test image')} only: bits/dim will be rough")
    return list(range(nr_factors)) if args.factor is None else [args.factor]


def take_over(args):
    """Fill in of args what no flag says from the run that --start names."""
    theirs = load(pathlib.Path(args.start).expanduser()).config
    if args.model not in (None, theirs.model):  # told before data are fetched; the rest: start_from
        same_kind(theirs, dataclasses.replace(theirs, model=args.model), args.start)
    names = ["model", "preset", "size", "look_right", "tight"]
    if args.data is None and args.data_dir is None:
        names += ["data", "data_dir"]
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, getattr(theirs, name))


def same_kind(theirs, ours, run):
    """Raises Problem if the models of two Configs differ in name or in number of views."""
    a, b = [f"{config.model} of {counted(len(make_views(config)), 'view')}"
            for config in (theirs, ours)]
    if a != b:
        raise Problem(f"--start: {run} is of another model, preset or size: a {a}, expected a {b}")


def start_from(model, run):
    """Give the model the weights of another run or checkpoint. Raises Problem."""
    theirs, other = load(pathlib.Path(run).expanduser()), "of another model, preset or size"
    same_kind(theirs.config, model.config, run)
    weights = theirs.state_dict()
    for name, expected in model.state_dict().items():
        if name not in weights or weights[name].shape != expected.shape:
            got = tuple(weights[name].shape) if name in weights else "missing"
            raise Problem(f"--start: {run} is {other}: {name} is {got}, expected "
                          f"{tuple(expected.shape)}")
    if surplus := weights.keys() - model.state_dict().keys():
        raise Problem(f"--start: {run} is {other}: it has {min(surplus)}, which is not expected")
    model.load_state_dict(weights)
    if rank() == 0:
        print(f"begins with {', '.join(map(str, theirs.files))}")


def begin(out, config, factors, data, args, device):
    """Write down what is trained, by which command, and on what: config.json, digests.npy and a
    line of commands.jsonl."""
    with locked(out, "config", wait=True):
        agree(out, config, factors, args.resume)
        if data.train is not None and not (out / "digests.npy").exists():
            images = digests_of(data)
            write_atomically(out / "digests.npy", lambda file: np.save(file, images))
        write_config(out, config)
    for part in out.glob("part-*"):  # an hour old: of a writer that was killed
        with contextlib.suppress(FileNotFoundError):
            if part.stat().st_mtime < time.time() - 3600:
                part.unlink()
    record = dict(time=time.strftime("%F %T"), command=shlex.join(["pixelaux.py", *args.argv]),
                  processes=world_size(), hardware=hardware(device), torch=torch.__version__,
                  cuda=torch.version.cuda, python=platform.python_version(), commit=commit())
    append_record(out / "commands.jsonl", record)


@contextlib.contextmanager
def signals_noted():
    """SIGINT and SIGTERM are only noted, as no step may be cut in two, and SIGHUP, a terminal that
    goes away, is no reason to stop. -> stop(): has one come? While stop.immediately is true, as in
    show_samples alone, one is a KeyboardInterrupt at once."""
    noted, before = [], {}

    def stop():
        return len(noted) > 0

    def note(number, frame):
        noted.append(number)
        if stop.immediately:
            raise KeyboardInterrupt("stopped; --resume goes on from the last checkpoint")

    stop.immediately = False
    if threading.current_thread() is threading.main_thread():  # no other may set signals
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_samples(model, k, first, data, out, stop):
    """Pictures during training: samples of the views up to k, and curves. first: the first factor
    that is trained by this call. Views before it are given, of test images, as their factors may
    not be there. If they cannot be made, training goes on without; a signal ends them at once, as
    all is saved by now."""
    try:
        stop.immediately = True  # from here on a signal raises at once
        if stop():
            raise KeyboardInterrupt("stopped; --resume goes on from the last checkpoint")
        given = model.views_of(to_tensor(data.test[:16]))[first - 1] if first else None
        n = 16 if given is None else len(given)
        views = model.sample(n, model.config.seed, tight=model.config.tight, given=given,
                             given_view=first - 1 if first else None, until=k + 1)
        save_samples(model, views, out / "samples.png", first)
        with contextlib.suppress(Problem):  # where this file stands alone
            tool("curves").save_curves(out, model.names)
    except Exception as error:  # whatever it is, it is only a picture
        warn(f"no picture: {type(error).__name__}: {error}")
    finally:
        stop.immediately = False


# What is left of this section is for several processes, those of one torchrun (plan_in_turn) and
# other commands in the same folder (agree, see the example above), and for messages.


def plan_in_turn(args, out):
    """plan_run in all processes. The first one of a machine plans, and fetches the data, while the
    others wait; then they plan, with the data that are there. When all have, `begin` may write."""
    fetches = not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"
    planned = plan_run(args, out) if fetches else None
    if world_size() > 1:
        dist.barrier()
    planned = planned or plan_run(args, out)
    if world_size() > 1:
        dist.barrier()
    return planned


def agree(out, config, factors, resume):
    """Compare our config with the one that is in the folder by now, see above; and our factors must
    not be there, unless we resume. Raises Problem."""
    if (out / "config.json").exists():
        there = read_config(out)
        if any(config.minutes):
            config.steps = there.steps
        may_differ = dict(data=config.data, data_dir=config.data_dir)
        if dataclasses.replace(there, **may_differ) != config:
            raise Problem(f"--out: {out} was begun meanwhile with other settings")
    if not resume and any((out / f"factor-{k}.pt").exists() for k in factors):
        raise Problem(f"--out: {out} holds a run by now; --resume goes on with it")


def commit():
    """Of this file, with a + if it was changed since; what the environment calls COMMIT where there
    is no clone."""
    here = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = pathlib.Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)|$", cpu.read_text() if cpu.exists() else "")[1]
    return f"{torch.get_num_threads()} threads of {name or platform.processor()}"


# --- Command line: train, eval, sample ---------------------------------------------------------
#
# A command is a function of what argparse has found (FLAGS tells it what there is), called by main,
# which makes one line of what the user can mend.

# What stands around the method is loaded when it is asked for: {command: (module of tools/, help)}.
TOOLS = {
    "bench": ("bench", "speed, beside plain implementations in one process"),
    "compress": ("codec", "images, losslessly, into .pxa files"),
    "decompress": ("codec", ".pxa files into PNG files"),
    "export": ("export", "all factors in one small file, weights in bfloat16"),
    "curves": ("curves", "a picture of a run's bits/dim by steps of training"),
    "figures": ("figures", "the paper's figures from a run's model"),
    "check": ("check", "is a network causal, and does a run's model hold what it promises"),
    "claim": ("claim", "the paper's claim counted on shapes: four models at equal time"),
    "speedrun": ("speedrun", "time to bits/dim, of a run with images held out from training"),
}


def tool(name):
    """The module tools/NAME.py, or pixelaux_tools/NAME.py as pip installs it. Raises Problem where
    this file stands alone."""
    here = pathlib.Path(__file__).resolve().parent
    package = "pixelaux_tools" if (here / "pixelaux_tools").is_dir() else "tools"
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in (package, f"{package}.{name}"):
            raise
        raise Problem(f"this needs tools/{name}.py, expected beside pixelaux.py") from None


def command_train(args):
    import PIL.Image, tqdm  # noqa: F401, E401  so that what is missing is missed before training

    device = args.device
    if not dist.is_torchelastic_launched():
        return train(args, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    patience = datetime.timedelta(hours=3)  # while one process reads the data
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        train(args, device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Failure(f"process {rank()} lost another one; --resume goes on") from None
    dist.destroy_process_group()


def run_data(args, model):
    """The data that a run was trained on, or what --data and --data-dir say."""
    config = model.config
    if (args.run / "config.json").exists():  # it knows where the data are now
        config = read_config(args.run)
    data, _ = load_data(args.data or config.data, args.data_dir or config.data_dir, config.size)
    if not args.data and config.data_set not in ("", describe(data)):
        now = describe(data) + what_changed(args.run, data)
        warn(f"{config.data}: trained on {config.data_set}, now there are {now}")
    return data


def result_path(args, *words):
    """Where a result goes, without its ending: beside the weights, named by what was used for
    it."""
    folder, own = (args.run, []) if args.run.is_dir() else (args.run.parent, [args.run.stem])
    data = [pathlib.Path(args.data.rpartition(":")[2]).stem] if args.data else []
    return folder / "-".join([words[0], *own, *data, *filter(None, words[1:])])


def placed(out, name):
    """Where samples go, without an ending: as --out tells, a file or a folder that is there; if it
    is None, to `name`."""
    if out is None:
        return name
    return out / name.name if out.is_dir() else re.sub(r"\.(png|npz)$", "", str(out))


def command_eval(args):
    if args.coded:
        import constriction  # noqa: F401  if it is missing, say so before the evaluation

    model = load(args.run, args.device)
    data = run_data(args, model)
    images = data.test[: args.n]
    bound, exact = evaluate(model, images, args.batch_size)
    text, result = report(model, bound, exact, data, images)
    if data.shapes:
        samples = model.sample(64, args.seed or 0, tight=model.config.tight)[-1]
        result["decodable"] = float(data.shapes.decodable(to_array(samples)).mean())
        text += f"\nsamples whose shape decodes: {result['decodable']:.0%} of 64"
    if args.coded:
        nats = exact.sum(0)[: args.coded]
        coded, result["coded"] = tool("formats").coded(model, images[: args.coded], nats)
        text += f"\n{coded}"
    print(f"weights: {', '.join(map(str, model.files))}\n{text}")
    some = str(len(images)) if len(images) < len(data.test) else ""
    path = f"{result_path(args, 'eval', some)}.json"
    write_atomically(path, json.dumps(result, indent=1).encode())


def command_sample(args):
    if args.shift and args.mode == "map":
        raise Problem("--shift: --mode map draws no values, so there is no variance to change")
    if args.given:
        return tool("given").command(args)
    for name in ("view", "reduce", "answers", "rows", "candidates"):
        if getattr(args, name) is not None:
            raise Problem(f"--{name}: goes with --given, the images that it is about")
    model, seed, n = load(args.run, args.device), args.seed or 0, args.n or 16
    tight = model.config.tight if args.tight is None else args.tight
    pixels = sum(math.prod(view.shape[1:]) for view in model.views)
    with progress_bar(total=n * pixels, unit="pixel", unit_scale=True, delay=0.3) as bar:
        views = model.sample(n, seed, args.mode, args.shift, tight, fast=not args.naive,
                             progress=bar.update)
    name = result_path(
        args, f"sample-{args.mode}-{seed}", n != 16 and f"n{n}", args.naive and "naive",
        args.shift and f"shift{args.shift:g}",
        tight != model.config.tight and ("tight" if tight else "no-tight"))
    out = placed(args.out, name)
    arrays = {view.name: to_array(x) for view, x in zip(model.views, views)}
    write_atomically(f"{out}.npz", lambda file: np.savez(file, **arrays))
    save_samples(model, views, f"{out}.png")
    shapes = ", ".join(f"{name!r} {array.shape}" for name, array in arrays.items())
    print(f"{out}.png: a row for each view, coarsest first\n{out}.npz: uint8 arrays {shapes}")


def checked(kind, expected, valid=lambda value: True):
    """A type for argparse: kind(text), which must be valid; the error tells what was expected."""

    def parse(text):
        with contextlib.suppress(ValueError, RuntimeError, AssertionError, NotImplementedError):
            if valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


def sides(text):
    height, x, width = text.lower().partition("x")
    return int(height), int(width if x else height)


COUNT = checked(int, "a whole number above 0", lambda value: value > 0)
NUMBER = checked(float, "a number above 0", lambda value: 0 < value < math.inf)
STEPS = checked(lambda text: (int(text),), "a whole number above 0", lambda value: value[0] > 0)
MINUTES = checked(lambda text: tuple(map(float, text.split(","))), "minutes, such as 10 or 6,14,40",
                  lambda value: 0 < min(value) <= max(value) < 1e9)
SIZE = checked(sides, "SIDE or HEIGHTxWIDTH, such as 32 or 48x64", lambda value: min(value) > 0)
SEED = checked(int, "0..2147483648", lambda value: 0 <= value <= 2**31)
SHIFT = checked(float, "a finite number", math.isfinite)
PATH = checked(lambda text: pathlib.Path(text).expanduser(), "a path")
DEVICE = checked(torch.device, "cpu or cuda, as available here",
                 lambda value: torch.ones(1, device=value).item())
YES, YES_NO = dict(action="store_true", default=None), dict(action=argparse.BooleanOptionalAction)
# What the user has called, for the hints that we print: it may be a file with views of one's own.
PROGRAM = pathlib.Path(sys.argv[0]).name
CALLED = "pixelaux" if PROGRAM == "pixelaux" else "python pixelaux.py"
if PROGRAM.endswith(".py") and not PROGRAM.startswith("__"):
    CALLED = f"python {PROGRAM}"
BEST = "cuda" if torch.cuda.is_available() else "cpu"

# flag: (the commands that take it, help, what else argparse is told); tools take some of them, too
FLAGS = {
    "run": ("eval sample", "output folder of train, or a checkpoint file",
            dict(metavar="RUN", type=PATH)),
    "--model": ("train", "default pyramid", dict(choices=MODELS)),
    "--preset": ("train", "tiny: minutes on a laptop (default); small: an hour; speedrun: minutes "
                 "on a GPU; cifar10, celeba: the paper's", dict(choices=PRESETS)),
    "--data": ("train eval sample", "shapes, cifar10, celeba, folder:PATH or FILE.npy (default: "
               "train: shapes; others: the run's)", {}),
    "--data-dir": ("train eval sample", "where cifar10 (cifar-10-binary.tar.gz, fetched if it is "
                   "missing, or cifar-10-batches-bin) or celeba (img_align_celeba.zip, or its "
                   "JPEGs) lies (default: data)", dict(metavar="FOLDER")),
    "--size": ("train", "side of X, or HEIGHTxWIDTH (default: the data's; folder: 64)",
               dict(type=SIZE)),
    "--out": ("train sample", "where results go (sample: a file, or a folder that is there)",
              dict(type=PATH)),
    "--resume": ("train", "go on with the run in --out", YES),
    "--start": ("train", "begin with the weights of this run or checkpoint, and with its model, "
                "preset, size and data where no flag tells others",
                dict(metavar="RUN", type=checked(str, "a run or a checkpoint", len))),
    "--factor": ("train", "train factor K alone, 0 is the coarsest", dict(type=int, metavar="K")),
    "--steps": ("train", "for each factor (default: the preset's)", dict(type=STEPS)),
    "--minutes": ("train", "for each factor, in place of --steps: a few that are tried tell how "
                  "many fit; or by factor, coarsest first: 6,14,40", dict(type=MINUTES)),
    "--batch-size": ("train eval", "images at once (default: the preset's, or what fits)",
                     dict(type=COUNT, metavar="N")),
    "--lr": ("train", "learning rate of Adam (default: the preset's)", dict(type=NUMBER)),
    "--flip": ("train", "mirror half of the images (default: of cifar10, celeba, folder)", YES_NO),
    "--hold-out": ("train", "keep N images from training, and record the loss on them",
                   dict(type=COUNT, metavar="N")),
    "--tight": ("train sample", "cut distributions to what the coarser view leaves possible: the "
                "exact likelihood in place of the bound, consistent samples (default: the "
                "preset's; sample: the run's)", YES_NO),
    "--look-right": ("train", "no: only the first layers of light networks look to the right, "
                     "to sample in a third of the steps", YES_NO),
    "--precision": ("train", "of the networks in training (default: bfloat16 on CUDA)",
                    dict(choices=["float32", "bfloat16"])),
    "--compile": ("train", "torch.compile (default: no)", YES_NO),
    "--save-every": ("train", "default 120", dict(type=NUMBER, default=120, metavar="SECONDS")),
    "--n": ("eval sample", "how many images (default: all; sample: 16, but of a folder all)",
            dict(type=COUNT)),
    "--coded": ("eval", "code N images, restore them, compare with PNG and WebP",
                dict(type=COUNT, metavar="N")),
    "--mode": ("sample", "map: the paper's MAP sampling",
               dict(choices=["random", "map"], default="random")),
    "--shift": ("sample", "added to the log-scales; below 0: less variance",
                dict(type=SHIFT, default=0.0)),
    "--given": ("sample", "begin with these: test, a .npy file, an image or a folder of images, "
                "which may have any size and are doubled or colourised", {}),
    "--reduce": ("sample", "images of --given are X: reduce them to the view first", YES),
    "--view": ("sample", "the view that --given is of, or is reduced to; 0 is the coarsest "
               "(default: the one next to X)", dict(type=int, metavar="K")),
    "--rows": ("sample", "complete images X of --given, of which the first R rows are kept",
               dict(type=COUNT, metavar="R")),
    "--candidates": ("sample", "with --rows: of each coarser view, of which one is chosen "
                     "(default 8)", dict(type=COUNT, metavar="N")),
    "--answers": ("sample", "how many for each of --given (default 1)",
                  dict(type=COUNT, metavar="A")),
    "--naive": ("sample", "by a pass of the network for every pixel", YES),
    "--seed": ("train eval sample", "of all that is random (default 0)", dict(type=SEED)),
    "--device": ("train eval sample", "cpu, cuda, cuda:1 (default: cuda, if any)",
                 dict(type=DEVICE, default=BEST)),
}


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message):
        self.exit(2, f"pixelaux: {message}; see {self.prog} --help\n")

    def add(self, *names, **changes):
        """Add arguments of FLAGS."""
        for name in names:
            _, text, options = FLAGS[name]
            self.add_argument(name, **{"help": text, **options, **changes})


def parser():
    top = Parser(prog="pixelaux.py", description="PixelCNN models with auxiliary variables")
    top.add_argument("--version", action="version", version=f"pixelaux {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, function, text in (
            ("train", command_train, "train all factors of a model in turn, or one of them"),
            ("eval", command_eval, "bits/dim on the whole test set, by factor and resolution"),
            ("sample", command_sample, "a picture of samples, and the arrays")):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function, parser=command)
        command.add(*(flag for flag in FLAGS if name in FLAGS[flag][0].split()))
    for name, (_, text) in TOOLS.items():  # only to be listed: main hands these over
        commands.add_parser(name, help=text)
    return top


def main(argv=None):
    """Run a command -> exit status. What the user can mend is one line on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in TOOLS:
            tool(TOOLS[argv[0]][0]).main(argv)
            return 0
        for i, flag in enumerate(argv[:-1]):  # argparse takes -1e-1 for a flag
            if flag == "--shift":
                argv[i : i + 2] = [f"--shift={argv[i + 1]}"]
        args, unknown = parser().parse_known_args(argv)
        if unknown:  # let the command say it, whose --help lists what there is
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.argv = argv
        args.function(args)
        return 0
    except (Problem, Failure, OSError, ImportError, KeyboardInterrupt) as error:
        message, status = str(error) or "interrupted", 2
        if isinstance(error, KeyboardInterrupt):
            status = 130
        elif isinstance(error, Failure):
            status = 1
        elif isinstance(error, ImportError):
            message = f"{error.name} is not installed: pip install -r requirements.txt"
        elif isinstance(error, OSError):
            message = f"{error.filename or 'output'}: {error.strerror or error}"
        say(message)
        return status


def terminate(number, frame):
    """SIGTERM ends a program as Ctrl-C does: what is being written is removed first."""
    raise KeyboardInterrupt("terminated")


def program():
    """The command `pixelaux` that pip installs."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # names of files may be any bytes
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, terminate)
    status = main()
    if status == 130:  # who stops a program does not want to wait a second for torch to be unloaded
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    # This module is __main__ here; tools import `pixelaux`: so that there is one copy, we do, too.
    from pixelaux import program

    sys.exit(program())
