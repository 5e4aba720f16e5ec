"""PixelCNN models with auxiliary variables: the method in one file (torch and numpy); commands.py has the tools.

    Kolesnikov & Lampert, "PixelCNN Models with Auxiliary Variables for Natural Image Modeling", ICML 2017;
    Salimans et al., "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood", ICLR 2017.

An image X is modelled together with deterministic functions of itself: X_0 = X, X_{i+1} = psi_i(X_i), and

    log p(X) >= log p(X, X_1, .., X_K) = log p(X_K) + sum_i log p(X_i | X_{i+1})                  (Eq. 2-5)

A model is its list of psi; a factor is a causal network, a head and, if it is conditional, an embedding network.

    Eq. 1      raster-order factorisation                        Conv, Network
    Eq. 2, 3   p(X, X^) = p(X^) p(X | X^)                        PixelAux.log_prob_factors, PixelAux.sample
    Eq. 4, 5   the bound; factors train apart                    PixelAux.log_prob, train_factor
    Sec. 3.1   4-bit gray as X^                                  Gray, Categorical
    Sec. 3.2   half resolution as X^, recursively                Half
    Sec. 3.3   embedding f_w(X^)                                 Network(causal=False), Factor
    Sec. 4.2   MAP and reduced-variance sampling                 LogisticMixture(shift=).sample(mode=)
    beyond     exact likelihood in place of the bound            psi.bounds, tight=True
    beyond     sampling at about the cost of one forward pass    Schedule, Decoder
    beyond     the likelihood as real bits                       commands.py: compress, decompress

Where we deviate from the paper, or the paper is silent, the docstring concerned says so.
Units: log-probabilities are natural logarithms (nats); bits/dim are bits per sub-pixel of X.
"""
import bisect
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing.pool
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VERSION = 1  # of the checkpoint format
# number of this process among all, among those of this machine, how many there are: torchrun's, if it started us
RANK, LOCAL_RANK, RANKS = (int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
                           for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class Problem(ValueError):
    """Something the user can put right; the command line prints it as one line and exits with status 2."""


# --- Configuration ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """One training configuration; the defaults are the paper's for CIFAR-10 (Sec. 4.1) where it gives them.

    A network's `layout` reads like the paper's text: numbers are residual blocks in a row, "down" halves and "up"
    doubles the resolution.
    """

    model: str = "pyramid"
    preset: str = "cifar10"
    size: tuple = (32, 32)
    levels: int = 256  # of a sub-pixel of X; small alphabets can be enumerated
    scales: int = -1  # how many Half; -1: as many as keep the shorter side at 8 or more
    nr_filters: int = 160
    nr_resnet: int = 6  # residual blocks a stage of PixelCNN++, six stages: 36
    nr_resnet_cond: int = 4  # the same for p(X | gray) and its embedding: 24
    nr_light: int = 3  # residual blocks of the pyramid's causal networks
    embedding: tuple = (3, "down", 6, "up", 3, "up", 3)  # f_w of one scale of the pyramid
    look_right: bool = True  # False: the light net's vertical stream looks up and left only (faster sampling)
    nr_logistic_mix: int = 10
    dropout: float = 0.5
    tight: bool = False  # train the exact likelihood in place of the bound
    batch_size: int = 64
    epochs: tuple = (30, 200)  # of the coarsest factor, of the others
    steps: tuple = (0, 0)  # likewise; 0: from epochs
    budget: float | tuple = 0.0  # minutes for each factor in place of steps, or several, coarsest first; 0: none
    precision: str = "auto"  # of the networks in training: float32, bfloat16; auto: bfloat16 on CUDA
    lr: float = 1e-3
    lr_decay: float = 0.99999  # factor on the learning rate after each step
    anneal: bool = False  # also bring the learning rate linearly to 0 at the end
    betas: tuple = (0.95, 0.9995)  # of Adam, PixelCNN++'s
    ema: float = 0.9995  # decay of the moving average of the weights, PixelCNN++'s
    seed: int = 0
    data: str = "shapes"
    data_dir: str = "data"
    start: str = ""  # run or checkpoint whose weights training begins with (the command loads them)


PRESETS = {
    "tiny": dict(nr_filters=24, nr_resnet=1, nr_resnet_cond=1, embedding=(1, "down", 2, "up", 1, "up", 1), dropout=0.0,
                 batch_size=8, steps=(5000, 2000), lr=1e-2, lr_decay=1.0, anneal=True, betas=(0.9, 0.99), ema=0.98),
    "small": dict(nr_filters=48, nr_resnet=2, nr_resnet_cond=2, embedding=(2, "down", 3, "up", 2, "up", 2), dropout=0.0,
                  batch_size=8, steps=(8000, 8000), lr=5e-3, lr_decay=1.0, anneal=True, betas=(0.9, 0.99), ema=0.995),
    "cifar10": dict(),
    "celeba": dict(nr_filters=100, batch_size=16, epochs=(60, 60), lr_decay=0.999995),
}


def make_config(preset="tiny", **fields):
    """The Config of a preset with some fields changed. Raises Problem, naming what there is to choose from."""
    choices = [("preset", preset, PRESETS), ("model", fields.get("model", Config.model), MODELS)]
    for kind, name, names in choices + [("option", name, Config.__annotations__) for name in fields]:
        if name not in names:
            raise Problem(f"unknown {kind} {name!r}: expected one of {', '.join(names)}")
    fields = {"preset": preset, **PRESETS[preset], **fields}
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})  # JSON has lists only


# --- psi: deterministic auxiliary variables --------------------------------------------------------------------------


def feasible(values, dim, weights, low, high, top):
    """Intervals that are left for v_1, v_2, .. in 0..top, each given those before it, when low <= sum w_j v_j <= high.

    values: int64, v_j along dim; weights: positive ints; low, high: int64, without dim. Returns lo, hi, inclusive.
    """
    lo, hi, rest = [], [], top * sum(weights)  # rest: the most that the sub-pixels to come can add
    for value, weight in zip(values.unbind(dim), weights):
        rest -= weight * top
        lo.append(-((rest - low) // weight))  # ceil((low - rest) / weight)
        hi.append(high // weight)
        low, high = low - weight * value, high - weight * value
    return torch.stack(lo, dim).clamp(0, top), torch.stack(hi, dim).clamp(0, top)


class Half:
    """X^ = half-resolution view (Sec. 3.2): (sum of each 2x2 block + 2) // 4 in each channel, uint8.

    The paper resizes every level from the full image; here each level is a function of the level above it, so that
    the chain is one of functions.
    """

    cell, light = 2, True  # side of the block of X that a pixel of X^ stands for; which causal network goes with it
    channels = None  # of X^; None: as many as X has

    def __init__(self, levels=256):
        self.levels = self.levels_out = levels

    def __call__(self, x):
        """x: uint8 (N, C, H, W) -> uint8 (N, C, H/2, W/2)."""
        return ((self.blocks(x).sum(2) + 2) // 4).to(torch.uint8)

    def blocks(self, x):
        """(N, C, H, W) -> int64 (N, C, 4, H/2, W/2): the pixels of each 2x2 block, in raster order."""
        return F.pixel_unshuffle(x.long(), 2).unflatten(1, (-1, 4))

    def bounds(self, x, x_hat):
        """Inclusive feasible (lo, hi), int64 (N, C, H, W), of each sub-pixel given x_hat and those before it."""
        total = 4 * x_hat.long()
        intervals = feasible(self.blocks(x), 2, (1, 1, 1, 1), total - 2, total + 1, self.levels - 1)
        return tuple(F.pixel_shuffle(v.flatten(1, 2), 2) for v in intervals)


class Gray:
    """X^ = 4-bit gray (Sec. 3.1): (77 R + 150 G + 29 B) >> 12, 16 levels, uint8.

    The paper does not say how gray is computed; this is ITU-R BT.601 luma in integers.
    """

    cell, light, channels, weights, levels_out = 1, False, 1, (77, 150, 29), 16

    def __init__(self, levels=256):
        self.levels = levels
        if 255 % (levels - 1):
            raise Problem(f"gray needs levels - 1 to divide 255, got levels={levels}")
        self.weights = tuple(w * (255 // (levels - 1)) for w in self.weights)

    def __call__(self, x):
        """x: uint8 (N, 3, H, W) -> uint8 (N, 1, H, W), 0..15."""
        return (sum(weight * value for weight, value in zip(self.weights, x.int().split(1, 1))) >> 12).to(torch.uint8)

    def bounds(self, x, x_hat):
        """Inclusive feasible (lo, hi), int64 (N, 3, H, W): of red, of green given red, of blue given both.

        Every value in an interval has a completion as long as no weight exceeds 4096 (levels of 16 and more).
        """
        low = 4096 * x_hat[:, 0].long()
        return feasible(x.long(), 1, self.weights, low, low + 4095, self.levels - 1)


MODELS = {"pixelcnn": (), "grayscale": (Gray,), "pyramid": (Half,), "grayscale-pyramid": (Gray, Half)}


# --- Heads: the distribution of a pixel given the network's output ---------------------------------------------------


def pick(log_weights, u):
    """Inverse-cdf draw of an index along dim 1. log_weights: (N, K, ...), any scale; u: (N, ...) in (0, 1)."""
    cdf = log_weights.softmax(1).cumsum(1)
    return (cdf < u.unsqueeze(1) * cdf[:, -1:]).sum(1, keepdim=True).clamp(max=log_weights.shape[1] - 1)


class LogisticMixture:
    """Mixture of K discretized logistics over (R, G, B) (PixelCNN++ Sec. 2.1, 2.2), with its exact pmf.

    params: (N, 10 K, H, W), PixelCNN++'s channel order: K mixture logits, then for each of R, G, B: K means, K
    log-scales, K coefficients. `levels` values 0..levels-1 stand at equal distances in [-1, 1]. `shift` is added to
    the log-scales (Sec. 4.2 subtracts constants). A component's mass on lo..hi, with b and a the logistic arguments
    at the upper edge of hi and at the lower edge of lo, b = inf at the last level and a = -inf at 0, is

        log(sigma(b) - sigma(a)) = log sigma(b) + log sigma(-a) + log(1 - exp(a - b))

    exact and stable everywhere, so that the pmf sums to 1. (PixelCNN++ approximates it where it is below 1e-5.)
    """

    def __init__(self, params, levels=256, shift=0.0):
        if params.shape[1] % 10:
            raise Problem(f"a logistic mixture takes 10 K channels of parameters, got {params.shape[1]}")
        k, params = params.shape[1] // 10, params.to(torch.promote_types(params.dtype, torch.float32)).contiguous()
        rest = params[:, k:].unflatten(1, (3, 3 * k))  # (N, 3, 3 K, H, W)
        self.levels = levels
        self.logit_probs = params[:, :k]  # (N, K, H, W)
        self.means = rest[:, :, :k]  # (N, 3, K, H, W)
        # At -7 a level holds 97% of a component centred on it (PixelCNN++'s clamp); 7 is a guard for float32.
        self.log_scales = rest[:, :, k : 2 * k].clamp(-7.0, 7.0) + shift
        self.coeffs = rest[:, :, 2 * k :].tanh()

    @staticmethod
    def start(bias):
        """Set the output layer's bias, (10 K,): means spread over the range, scales well below it.

        PixelCNN++ leaves them as data-dependent initialisation makes them, as wide as the range.
        """
        k = len(bias) // 10
        rest = bias[k:].view(3, 3 * k)
        rest[:, :k], rest[:, k : 2 * k] = torch.linspace(-0.9, 0.9, k), -2.5

    def means_given(self, c, units):
        """Means of channel c given the channels before it. units: those in [-1, 1], (N, 1, H, W) -> (N, K, H, W)."""
        means = self.means[:, c]
        for j in range(c):  # coefficients: R in G, R in B, G in B
            means = torch.addcmul(means, self.coeffs[:, c - 1 + j], units[j])
        return means

    def log_mass(self, means, log_scales, lo, hi):
        """Log mass of components on lo..hi (levels, broadcast against means and log_scales)."""
        inverse, half = torch.exp(-log_scales), 1.0 / (self.levels - 1)
        b = (to_unit(hi, self.levels, means.dtype) + half - means) * inverse
        a = (to_unit(lo, self.levels, means.dtype) - half - means) * inverse
        width = (hi - lo + 1).to(means.dtype) * (2 * half) * inverse  # b - a, without cancellation
        first, last = lo == 0, hi == self.levels - 1
        upper = F.logsigmoid(b).masked_fill(last, 0.0)
        lower = F.logsigmoid(-a).masked_fill(first, 0.0)
        return upper + lower + torch.log(-torch.expm1(-width)).masked_fill(first | last, 0.0)

    def log_prob(self, x, bounds=None):
        """x: uint8 (N, 3, H, W) -> nats (N, H, W), summed over the channels.

        bounds = (lo, hi) from psi.bounds: each channel's mixture, its weights updated by the channels before, is
        conditioned on the interval, p'(x_c) = sum_k w_k m_k(x_c) / sum_k w_k M_k.
        """
        x = x.long()
        units = to_unit(x, self.levels, self.means.dtype).split(1, 1)
        means = torch.stack([self.means_given(c, units) for c in range(3)], 1)  # (N, 3, K, H, W)
        level = x.unsqueeze(2)
        mass = self.log_mass(means, self.log_scales, level, level)  # (N, 3, K, H, W)
        weights = self.logit_probs.log_softmax(1)  # (N, K, H, W)
        if bounds is None:
            return (weights + mass.sum(1)).logsumexp(1)
        allowed = self.log_mass(means, self.log_scales, *(v.unsqueeze(2) for v in bounds))
        total = 0.0
        for c in range(3):
            total = total - (weights + allowed[:, c]).logsumexp(1)
            weights = weights + mass[:, c]
            total = total + weights.logsumexp(1)
        return total

    def sample(self, noise, mode="random", limits=None):
        """Draw from given noise, rounding each channel before the next is conditioned on it.

        noise: uniform in (0, 1), (N, 6, H, W): component and value for each channel. mode "random" draws the
        component, then its value; "map" takes the mean of its logistic, rounded, in place of its value (Sec. 4.2).
        Without limits one component serves all channels. limits(x, c) -> (lo, hi) of channel c given the channels
        before it: the draw is from the mixture conditioned on the interval. Returns int64 (N, 3, H, W).
        """
        x, units, top = torch.zeros_like(noise[:, :3], dtype=torch.long), [], self.levels - 1
        if limits:
            weights = self.logit_probs.log_softmax(1)
        else:
            one = self.component(pick(self.logit_probs, noise[:, 0]))
            if mode == "random":
                one.means = torch.addcmul(one.means, one.log_scales.exp(), torch.logit(noise[:, 1::2]).unsqueeze(2))
        for c in range(3):
            if limits:
                lo, hi = (v.unsqueeze(1) for v in limits(x, c))
                mass = functools.partial(self.log_mass, self.means_given(c, units), self.log_scales[:, c])
                one = self.component(pick(weights + mass(lo, hi), noise[:, 2 * c]))
            value = one.means_given(c, units)
            if limits and mode == "random":
                scale = one.log_scales[:, c].exp()
                value = value + scale * self.logistic(noise[:, 2 * c + 1].unsqueeze(1), value, scale, lo, hi)
            value = ((value + 1) * (top / 2)).round().clamp(0, top)
            if limits:
                value = value.long().clamp(lo, hi)
                weights = weights + mass(value, value)
            x[:, c : c + 1] = value
            units.append(to_unit(value, self.levels, self.means.dtype))
        return x

    def component(self, k):
        """Component k, (N, 1, H, W), of each pixel's mixture, as a mixture of one."""
        one, k = copy.copy(self), k.unsqueeze(1).expand(-1, 3, -1, -1, -1)
        one.means, one.log_scales, one.coeffs = (v.gather(2, k) for v in (self.means, self.log_scales, self.coeffs))
        return one

    def logistic(self, u, mean, scale, lo, hi):
        """Standard logistic by inverse cdf, restricted to what rounds into lo..hi."""
        half, top = 1.0 / (self.levels - 1), self.levels - 1
        a = ((to_unit(lo, self.levels, mean.dtype) - half - mean) / scale).masked_fill(lo == 0, -math.inf)
        b = ((to_unit(hi, self.levels, mean.dtype) + half - mean) / scale).masked_fill(hi == top, math.inf)
        flip = a + b > 0  # work in the left tail, where the cdf keeps its precision
        a, b, u = torch.where(flip, -b, a), torch.where(flip, -a, b), torch.where(flip, 1 - u, u)
        ratio = (F.logsigmoid(a) - F.logsigmoid(b)).exp()
        log_cdf = F.logsigmoid(b) + torch.log(ratio + u * (1 - ratio))
        z = log_cdf - torch.log(-torch.expm1(log_cdf))
        return torch.where(flip, -z, z)

    def pmf(self, c, x, limits=None):
        """Probabilities of every level of channel c given the channels before it. x: (N, 3, H, W) -> (N, L, H, W)."""
        weights, units = self.logit_probs.log_softmax(1), to_unit(x, self.levels, self.means.dtype).split(1, 1)
        for j in range(c):
            level = x[:, j : j + 1]
            weights = weights + self.log_mass(self.means_given(j, units), self.log_scales[:, j], level, level)
        symbols = torch.arange(self.levels, device=x.device).view(1, -1, 1, 1, 1)
        means, log_scales = self.means_given(c, units).unsqueeze(1), self.log_scales[:, c].unsqueeze(1)
        logits = (weights.unsqueeze(1) + self.log_mass(means, log_scales, symbols, symbols)).logsumexp(2)
        return masked(logits, limits and limits(x, c)).softmax(1)


def masked(logits, interval):
    """Logits (N, L, H, W) with -inf outside interval = (lo, hi), each (N, H, W); None: as they are."""
    if interval is None:
        return logits
    symbols, (lo, hi) = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1), interval
    return logits.masked_fill((symbols < lo.unsqueeze(1)) | (symbols > hi.unsqueeze(1)), -math.inf)


class Categorical:
    """Softmax over the levels of a one-channel image (Sec. 3.1). params: (N, L, H, W).

    shift, the reduction of variance, acts as on a log-scale: the logits are divided by exp(shift).
    """

    start = staticmethod(lambda bias: None)  # nothing to set: zero logits are uniform

    def __init__(self, params, levels=None, shift=0.0):
        self.logits = params.to(torch.promote_types(params.dtype, torch.float32)) * math.exp(-shift)

    def log_prob(self, x, bounds=None):
        """x: uint8 (N, 1, H, W) -> nats (N, H, W); bounds = (lo, hi), each (N, 1, H, W), masks the logits."""
        logits = masked(self.logits, bounds and [bound.squeeze(1) for bound in bounds])
        return logits.log_softmax(1).gather(1, x.long()).squeeze(1)

    def sample(self, noise, mode="random", limits=None):
        """noise: uniform (N, 2, H, W), of which the first is used. "map" takes the mode. Returns int64 (N, 1, H, W)."""
        logits = masked(self.logits, limits and limits(torch.zeros_like(noise[:, :1], dtype=torch.long), 0))
        return logits.argmax(1, keepdim=True) if mode == "map" else pick(logits, noise[:, 0])

    def pmf(self, c, x, limits=None):
        """Probabilities (N, L, H, W)."""
        return masked(self.logits, limits and limits(x, c)).softmax(1)


def to_unit(x, levels, dtype):
    """Levels 0..levels-1 -> [-1, 1], in dtype."""
    return x.to(dtype) * (2.0 / (levels - 1)) - 1.0


def bits_per_dim(log_prob, dims):
    """Nats (of an image) -> bits per dimension: -log_prob / (dims ln 2). log_prob: a float, array or tensor."""
    return -log_prob / (dims * math.log(2))


# --- Causal convolutions and networks --------------------------------------------------------------------------------


def concat_elu(x):
    """(N, C, ...) -> (N, 2 C, ...): elu of x and of -x (PixelCNN++)."""
    return F.elu(torch.cat([x, -x], 1), inplace=True)


ACTIVATIONS = {"none": lambda x: x, "elu": F.elu, "concat_elu": concat_elu}


class Conv(nn.Module):
    """Weight-normalised convolution, described once by its taps; causality is a matter of `offset` alone.

        plain, strided   out(p) = sum_k w_k in(stride p + k - offset) + b         stride 1 or 2
        transposed       out(p) = sum_k w_k in((p + offset - k) / 2) + b          taps at whole positions only

    k runs over 0..kh-1, 0..kw-1; what lies outside the image is 0. The sources that PixelCNN++'s kernels reach from
    the output o, for stride 1 (vertical: "down-shifted", horizontal: "down-right-shifted"):

        VERTICAL  x x x     HORIZONTAL  x x     first layer, all    x x x      x x x      x .
                  x o x                 x o     exclude o:          x x x  and . o .  and x o
                                                                    . o .
    The forward pass is torch's convolution, `taps` give the sampler the same as a gather and a product.
    """

    def __init__(self, c_in, c_out, kernel, offset, activation="none", stride=1, up=False, gain=1.0, dropout=0.0,
                 exact=False):
        super().__init__()
        self.exact = exact  # also under autocast: in bfloat16 means and pixels are up to a quarter of a level off
        self.kernel, self.offset, self.stride, self.up = kernel, offset, stride, up
        self.activation, self.gain, self.dropout, self.initialise = activation, gain, dropout, False
        c_in *= 2 if activation == "concat_elu" else 1
        self.v = nn.Parameter(0.05 * torch.randn(c_out, c_in, *kernel))
        self.g = nn.Parameter(gain * torch.ones(c_out))
        self.b = nn.Parameter(torch.zeros(c_out))

    def weight(self):
        """g v / |v|, the norm over all but the output channels (Salimans & Kingma 2016)."""
        return self.v * (self.g / self.v.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)

    def forward(self, x, size):
        """x: (N, C_in, H, W), activated -> (N, C_out, *size)."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if self.initialise:
            self.data_dependent_init(x, size)
        if self.exact:
            with torch.autocast(x.device.type, enabled=False):
                return self.apply_to(x.to(self.v.dtype), self.weight(), self.b, size)
        return self.apply_to(x, self.weight(), self.b, size)

    def apply_to(self, x, weight, bias, size):
        # Padding on both sides and cutting what is too much costs a row and saves the copy that F.pad would make.
        if self.up:
            extra = tuple(max(0, 2 + 2 * o - k) for o, k in zip(self.offset, self.kernel))
            y = F.conv_transpose2d(x, weight.transpose(0, 1), bias, 2, self.offset, extra)
        else:
            y = F.conv2d(x, weight, bias, self.stride, self.offset)
        return y[:, :, : size[0], : size[1]]

    @torch.no_grad()
    def data_dependent_init(self, x, size):
        """Choose g and b so that this batch's outputs have mean 0 and standard deviation `gain` in every channel."""
        self.initialise = False
        self.g.fill_(1.0)
        y = self.apply_to(x, self.weight(), None, size)
        std, mean = torch.std_mean(y.transpose(0, 1).flatten(1), 1)
        scale = torch.where(std > 1e-5, self.gain / std, self.gain)  # a constant channel has no scale to set
        self.g.copy_(scale)
        self.b.copy_(-mean * scale)

    def taps(self, source, target):
        """Flat positions in the source (int64, (H_t W_t, kh kw)) that each target position reads; H_s W_s: outside."""
        (h, w), (kh, kw), (oy, ox), up = source, self.kernel, self.offset, self.up
        r, c, ky, kx = np.ogrid[: target[0], : target[1], :kh, :kw]
        r, c = (r + oy - ky, c + ox - kx) if up else (self.stride * r + ky - oy, self.stride * c + kx - ox)
        whole = (r % 2 == 0) & (c % 2 == 0) if up else True
        r, c = (r // 2, c // 2) if up else (r, c)
        inside = whole & (r >= 0) & (r < h) & (c >= 0) & (c < w)
        return np.where(inside, r * w + c, h * w).reshape(target[0] * target[1], kh * kw)


class Layer(nn.Module):
    """A sum of convolutions of earlier nodes; with a residual node r: r + a sigmoid(b), (a, b) halves of the sum."""

    def __init__(self, inputs, residual=None):
        super().__init__()
        self.sources, self.residual = [node for node, _ in inputs], residual
        self.convs = nn.ModuleList(conv for _, conv in inputs)

    def finish(self, y, residual):
        a, b = y.chunk(2, 1)
        return torch.addcmul(residual, a, torch.sigmoid(b))


VERTICAL = dict(kernel=(2, 3), offset=(1, 1))
VERTICAL_LEFT = dict(kernel=(2, 3), offset=(1, 2))
HORIZONTAL = dict(kernel=(2, 2), offset=(1, 1))
ORDINARY = dict(kernel=(3, 3), offset=(1, 1))
POINT = dict(kernel=(1, 1), offset=(0, 0))
UP = {(2, 3): (0, 1), (2, 2): (0, 0), (3, 3): (1, 1)}  # offsets of the transposed kernels


class Network(nn.Module):
    """PixelCNN++ as a list of layers, which the forward pass runs over whole images and the sampler position by
    position. Nodes are numbered: 0 is the input, then the embeddings, then one per layer.

    causal=True: two streams (vertical, horizontal) and an output that depends on earlier pixels only. False: the
    embedding f_w, one stream of ordinary convolutions (Sec. 3.3); its outputs are the last features at each
    resolution, finest first. (The paper does not say how f_w's output reaches the coarser stages of the causal
    network; taking f_w's own last features there loses nothing.)

    A stage in `layout` that comes back to the resolution of an earlier one takes that one's blocks, in reverse, as
    auxiliary inputs: the long skips, of which the fourth stage's first is its own input. PixelCNN++ lets 2 blocks
    more take the outputs of the first and of the strided layers; here all six stages have the same number, the
    6 x 6 = 36 and 6 x 4 = 24 blocks of the paper.
    """

    def __init__(self, c_in, c_out, layout, filters, causal=True, embeddings=0, dropout=0.0, look_right=True):
        super().__init__()
        self.layers, self.filters, self.dropout = nn.ModuleList(), filters, dropout
        self.channels = [c_in] + [filters] * embeddings
        self.scale = [0] + list(range(embeddings))  # node i has resolution 2^-scale of the input's
        self.embeddings, self.nodes_given = list(range(1, embeddings + 1)), 1 + embeddings
        if causal:
            kernels = [VERTICAL if look_right else VERTICAL_LEFT, HORIZONTAL]
            streams = [
                self.add([(0, dict(kernel=(2, 3), offset=(2, 1), exact=True))]),
                self.add([(0, dict(kernel=(1, 3), offset=(1, 1), exact=True)),
                          (0, dict(kernel=(2, 1), offset=(1, 1), exact=True))]),
            ]
        else:
            kernels, streams = [ORDINARY], [self.add([(0, dict(ORDINARY, exact=True))])]
        skips, last = {}, {}
        for stage in layout:
            scale = self.scale[streams[0]]
            if stage in ("down", "up"):
                down = stage == "down"
                for s, kernel in enumerate(kernels):
                    change = dict(stride=2) if down else dict(offset=UP[kernel["kernel"]], up=True)
                    streams[s] = self.add([(streams[s], dict(kernel, **change))], scale=scale + (1 if down else -1))
                continue
            earlier, done = skips.get(scale, []), []
            for _ in range(stage):
                skip, below = earlier.pop() if earlier else [], []  # below: what the horizontal stream takes as well
                for s, kernel in enumerate(kernels):
                    streams[s] = self.block(streams[s], kernel, below + skip[s : s + 1])
                    below = [streams[s]]
                done.append(list(streams))
            skips.setdefault(scale, done)
            last[scale] = streams[-1]
        if causal:
            head = dict(POINT, activation="elu", gain=0.03, exact=True)
            self.outputs = [self.add([(streams[-1], head)], channels=c_out)]
        else:
            self.outputs = [last[scale] for scale in sorted(last)]
        last_use = {node: i for i, layer in enumerate(self.layers, self.nodes_given)
                    for node in (*layer.sources, layer.residual) if node not in (None, *self.outputs)}
        self.free_after = {i: {node for node in last_use if last_use[node] == i} for i in last_use.values()}

    def add(self, inputs, residual=None, channels=None, scale=None):
        """Append a layer over [(node, convolution's arguments)]; returns its node."""
        channels = channels or self.filters
        width = channels if residual is None else 2 * channels
        self.layers.append(Layer([(node, Conv(self.channels[node], width, **conv)) for node, conv in inputs], residual))
        self.channels.append(channels)
        self.scale.append(self.scale[inputs[0][0]] if scale is None else scale)
        return len(self.channels) - 1

    def block(self, x, kernel, aux):
        """Gated residual block (PixelCNN++): convolution, auxiliary inputs and embedding by 1x1, convolution, gate."""
        point = dict(POINT, activation="concat_elu")
        aux = aux + [e for e in self.embeddings if self.scale[e] == self.scale[x]]
        hidden = self.add([(x, dict(kernel, activation="concat_elu")), *((node, point) for node in aux)])
        gate = dict(kernel, activation="concat_elu", gain=0.1, dropout=self.dropout)
        return self.add([(hidden, gate)], residual=x)

    def size(self, node, size):
        """(H, W) of a node when the input's is `size`."""
        scale = self.scale[node]
        return tuple(s >> scale if scale >= 0 else s << -scale for s in size)

    def forward(self, x, embeddings=()):
        """x: (N, C, H, W), embeddings as the embedding network returns them -> list of (N, C_out, H', W')."""
        nodes, read, parts = [x, *embeddings[: len(self.embeddings)]], {}, []
        for i, layer in enumerate(self.layers, self.nodes_given):
            for node, conv in zip(layer.sources, layer.convs):
                if (node, conv.activation) not in read:
                    read[node, conv.activation] = ACTIVATIONS[conv.activation](nodes[node])
                parts.append(conv(read[node, conv.activation], self.size(i, x.shape[2:])))
            y, parts = functools.reduce(torch.add, parts), []
            nodes.append(y if layer.residual is None else layer.finish(y, nodes[layer.residual]))
            for node in () if torch.is_grad_enabled() else self.free_after.get(i, ()):  # nobody reads it any more
                nodes[node] = None
                read = {key: value for key, value in read.items() if key[0] != node}
        return [nodes[i] for i in self.outputs]


# --- The model: a chain of psi, a factor for each level --------------------------------------------------------------


class Factor(nn.Module):
    """p(x) or p(x | x_hat): a causal network, a head and, if conditional, an embedding network.

    psi: the function that x_hat is made with, or None; it chooses the networks.
    """

    def __init__(self, config, psi, levels, shape):
        super().__init__()
        self.shape, self.levels, self.psi, self.embed, c = shape, levels, psi, None, shape[0]
        self.Head = LogisticMixture if c == 3 else Categorical
        light = any(kind.light for kind in ([psi] if psi else MODELS[config.model][-1:]))  # coarsest: as the last psi
        n = config.nr_resnet_cond if psi else config.nr_resnet  # residual blocks a stage, or a whole layout
        full = (n, "down", n, "down", n, n, "up", n, "up", n) if isinstance(n, int) else n  # PixelCNN++'s six stages
        if psi:
            self.embed = Network((psi.channels or c) + 1, 0, config.embedding if light else full, config.nr_filters,
                                 causal=False, dropout=config.dropout)
        layout = (config.nr_light,) if light else full
        depth = max(itertools.accumulate({"down": 1, "up": -1}.get(stage, 0) for stage in layout))  # times halved
        self.net = Network(c + 1, config.nr_logistic_mix * 10 if c == 3 else levels, layout, config.nr_filters, True,
                           1 + depth if psi else 0, config.dropout, config.look_right or not light)
        # H and W of x must be multiples of this: for the resampling of the causal network and of f_w
        self.multiple = max(2 ** max(self.net.scale), psi.cell * 2 ** max(self.embed.scale) if psi else 1)

    dtype = property(lambda self: self.net.layers[0].convs[0].v.dtype)
    device = property(lambda self: self.net.layers[0].convs[0].v.device)

    def at_once(self, room=None):
        """How many images a forward pass, or f_w and the sampler's buffers, fit into `room` bytes; default: 4 GiB, on
        CUDA half of what is free."""
        if room is None:
            room = torch.cuda.mem_get_info(self.device)[0] / 2 if self.device.type == "cuda" else 2**32
        values = sum(channels * math.prod(self.net.size(i, self.shape[1:]))
                     for i, channels in enumerate(self.net.channels))
        return max(1, int(room / (2 * values * torch.finfo(self.dtype).bits // 8)))

    def planes(self, x, levels):
        """uint8 (N, C, H, W) -> [-1, 1] and a plane of ones, which tells the image from the padding: (N, C+1, H, W)."""
        x = to_unit(x, levels, self.dtype)
        return torch.cat([x, torch.ones_like(x[:, :1])], 1).contiguous(memory_format=torch.channels_last)

    def embeddings(self, x_hat):
        """f_w(x_hat): features (N, F, H / 2^i, W / 2^i), finest first; () for an unconditional factor."""
        return self.embed(self.planes(x_hat, self.psi.levels_out)) if self.embed is not None else ()

    def head(self, x, x_hat=None):
        """The distribution of every pixel of x given the pixels before it and x_hat."""
        params = self.net(self.planes(x, self.levels), self.embeddings(x_hat))[0]
        return self.Head(params, self.levels)

    def log_prob(self, x, x_hat=None, tight=False):
        """x: uint8 (N, C, H, W), x_hat = psi(x) -> nats per image, (N,)."""
        bounds = self.psi.bounds(x, x_hat) if tight and self.psi is not None else None
        return self.head(x, x_hat).log_prob(x, bounds).flatten(1).sum(1)


class PixelAux(nn.Module):
    """p(X, psi(X), ..): see the top of the file. Made by `build`; `config` and `chain` are public."""

    def __init__(self, config):
        super().__init__()
        # On CUDA, too, evaluation, sampling and codec are float32 throughout, and the same each time.
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
        self.config, self.chain, self.shapes, self.levels = config, [], [(3, *config.size)], [config.levels]
        scales = config.scales if config.scales >= 0 else (min(config.size) // 8).bit_length() - 1
        for kind in MODELS[config.model]:  # chain: finest first; shapes and levels: of X_0, X_1, ..
            for _ in range(scales if kind is Half else 1):
                psi, (c, h, w) = kind(self.levels[-1]), self.shapes[-1]
                self.chain.append(psi)
                self.shapes.append((psi.channels or c, h // psi.cell, w // psi.cell))
                self.levels.append(psi.levels_out)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            of = zip([*self.chain, None], self.levels, self.shapes)
            self.factors = nn.ModuleList(Factor(config, *each) for each in reversed(list(of)))  # coarsest first
        need = max(factor.multiple * math.prod(psi.cell for psi in self.chain[:i])
                   for i, factor in enumerate(reversed(self.factors)))
        if min(config.size) < need or any(s % need for s in config.size):
            raise Problem(f"size {'x'.join(map(str, config.size))} does not fit model {config.model}: "
                          f"height and width must be multiples of {need}")
        self.dims = 3 * config.size[0] * config.size[1]
        names = [f"{'gray ' * (c == 1)}{h}x{w}" for c, h, w in self.shapes]
        self.names = [" | ".join(names[k : k + 2]) for k in reversed(range(len(names)))]  # of the factors

    device = property(lambda self: self.factors[0].device)

    def levels_of(self, x, given=False):
        """[X_K, .., X_1, X], coarsest first, of x: uint8 (N, 3, H, W); given: of x of any level, told by its shape, the
        last of the list. Raises Problem."""
        shapes, what = (self.shapes, "given: ") if given else (self.shapes[:1], "")
        if x.dtype != torch.uint8 or tuple(x.shape[1:]) not in shapes:
            raise Problem(f"{what}expected uint8 images (N, C, H, W), (C, H, W) one of {shapes}, "
                          f"got {x.dtype} {tuple(x.shape)}")
        i = shapes.index(tuple(x.shape[1:]))
        if self.levels[i] < 256 and int(x.max()) >= self.levels[i]:
            raise Problem(f"{what}levels up to {int(x.max())}, expected 0..{self.levels[i] - 1}")
        return list(itertools.accumulate(self.chain[i:], lambda level, psi: psi(level), initial=x))[::-1]

    def pairs(self, x):
        """[(X_K, None), (X_{K-1}, X_K), .., (X, X_1)] of x: of each factor, what it models and what it is given."""
        levels = self.levels_of(x)
        return list(zip(levels, [None, *levels]))

    def log_prob_factors(self, x, tight=False):
        """x: uint8 (N, 3, H, W) -> [log p(X_K), .., log p(X | X_1)], coarsest first, nats per image, each (N,).

        tight=True: every factor is conditioned on what x_hat leaves possible; the sum is then log p(X) itself.
        """
        return [factor.log_prob(*pair, tight) for factor, pair in zip(self.factors, self.pairs(x))]

    def log_prob(self, x, tight=False):
        """x: uint8 (N, 3, H, W) -> log p(X, psi(X), ..), a lower bound on log p(X) (tight: equal), nats, (N,)."""
        return sum(self.log_prob_factors(x, tight))

    @torch.no_grad()
    def initialise(self, x, factors=None):
        """Data-dependent initialisation of all factors (or those numbered) on a batch x: uint8 (N, 3, H, W)."""
        pairs = self.pairs(x)
        for k in range(len(self.factors)) if factors is None else factors:
            for module in self.factors[k].modules():
                if isinstance(module, Conv):
                    module.initialise = True  # in the next pass
            self.factors[k].log_prob(*pairs[k])
            self.factors[k].Head.start(self.factors[k].net.layers[-1].convs[0].b)

    @torch.no_grad()
    def sample(self, n, seed=0, mode="random", shift=0.0, tight=False, given=None, fast=True, progress=None,
               until=None):
        """n images at every level: list of uint8 (n, C, H, W), coarsest first, X last. The model may be in any mode.

        mode: "random" (ancestral) or "map" (Sec. 4.2); shift is added to the log-scales; tight=True keeps every
        sample consistent, psi(sample) = x_hat. given: uint8 images of one level, (n, C, h, w), told by its shape;
        coarser levels are computed from them, finer ones sampled. The images are a function of the weights and the
        seed. Not fast: for each pixel p in raster order, x[p] = (factor.head(x, x_hat) at p).sample(noise[p]), the
        oracle; `fast` computes every activation once and gives the same. progress: called with the number of pixels
        just done. until: sample that many levels only. Memory: f_w, its projections and the buffers of one factor, for
        chunks of images that keep it under about 4 GiB (on CUDA: half of what is free).
        """
        if n < 1:
            raise Problem(f"expected 1 image or more, got {n}")
        if mode not in ("random", "map"):
            raise Problem(f"unknown mode {mode!r}: expected random or map")
        if given is not None and len(given) != n:
            raise Problem(f"given: expected {n} images, got {len(given)}")
        training, done = self.training, [] if given is None else self.levels_of(given.to(self.device), given=True)
        self.eval()
        try:
            for k in range(len(done), until or len(self.factors)):
                factor = self.factors[k]
                c, h, w = factor.shape
                generator = torch.Generator().manual_seed(1_000_003 * seed + k)
                noise = torch.rand(n, h * w, 2 * c, generator=generator, dtype=torch.float64).clamp_(1e-16)
                x_hat, images = done[-1] if done else None, []
                for part in torch.arange(n).split(factor.at_once()):
                    draw = Draw(noise[part].to(self.device), mode)  # both in the last section
                    decoder = Decoder(factor, len(part), None if x_hat is None else x_hat[part], shift, tight, fast)
                    images.append(decoder.run(draw, progress))
                done.append(torch.cat(images))
        finally:
            self.train(training)
        return done


def build(name, size, preset="tiny", seed=0, **overrides):
    """The model `name` ("pixelcnn", "grayscale", "pyramid", "grayscale-pyramid") for images of `size` (int or (H, W)).

    preset: "tiny", "small", "cifar10" or "celeba"; overrides: fields of Config. Weights are a function of the seed;
    call `initialise` on a batch of images before training. Raises Problem, a ValueError.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    return PixelAux(make_config(model=name, size=size, preset=preset, seed=seed, **overrides))


# --- Data: uint8 (N, H, W, 3) arrays, which stay bytes until they are on the device ----------------------------------


class Shapes:
    """Built-in images whose probability is known: a coloured shape on a coloured ground, and independent noise.

    A configuration (square, disc, triangle or cross; centre, radius, two colours) is drawn uniformly, then every
    sub-pixel gets noise from a logistic with a scale of 0.25 levels, discretised and cut off at `bound`. Colours are
    more than 2 bound apart in some channel, so that the configuration can be read off the image, and log p(X) is
    exact: -log(number of configurations) + sum log pmf(noise).
    """

    palette = np.array([[215, 55, 45], [50, 150, 70], [50, 90, 205], [240, 195, 55]], np.int16)
    pairs = np.array(list(itertools.permutations(range(4), 2)))  # ground, shape
    bound = 3

    def __init__(self, size):
        h, w = size[0] // 2, size[1] // 2  # shapes have pixels of 2x2: their half-resolution view is sharp
        self.size, side = size, min(h, w)
        if side < 6 or any(s % 2 for s in size):
            raise Problem(f"--size {size[0]}x{size[1]}: shapes need an even height and width of 12 or more")
        step = max(1, side // 16)
        radius, cy, cx = np.array([
            (radius, cy, cx) for radius in range(max(2, side // 8 + 1), side // 4 + 2, step)
            for cy in range(radius, h - radius, step) for cx in range(radius, w - radius, step)]).T[:, :, None, None]
        dy, dx = np.arange(h)[:, None] - cy, np.arange(w) - cx
        square = np.maximum(abs(dy), abs(dx)) <= radius
        disc = dy * dy + dx * dx <= radius * radius + radius
        triangle = square & (2 * abs(dx) <= dy + radius)
        cross = square & (np.minimum(abs(dy), abs(dx)) <= radius // 3)
        masks = np.concatenate([square, disc, triangle, cross])
        self.masks = masks.repeat(2, 1).repeat(2, 2)  # bool (places, H, W): where the shape is
        self.log_configurations = math.log(len(self.masks) * len(self.pairs))
        edges = 1 / (1 + np.exp(-(np.arange(-self.bound, self.bound + 2) - 0.5) / 0.25))
        self.pmf = np.diff(edges) / (edges[-1] - edges[0])  # of noise -bound..bound

    def clean(self, place, pair):
        """Noiseless images, int16 (N, H, W, 3), of the configurations with these indices, (N,)."""
        ground, shape = self.palette[self.pairs[pair].T][:, :, None, None]
        return np.where(self.masks[place][..., None], shape, ground)

    def sample(self, n, seed):
        """uint8 (n, H, W, 3), a function of the seed (an int or a sequence of ints)."""
        rng = np.random.default_rng(seed)
        pair, place = rng.integers(len(self.pairs), size=n), rng.integers(len(self.masks), size=n)
        uniform = rng.random((n, *self.size, 3), np.float32)
        noise = np.searchsorted(self.pmf.cumsum()[:-1], uniform, side="right") - self.bound
        return (self.clean(place, pair) + noise).astype(np.uint8)

    def decode(self, x):
        """x: uint8 (N, H, W, 3) -> the noise that x would be, int (N, H, W, 3), around its best configuration."""
        x = np.asarray(x).astype(np.int16)
        nearest = abs(x[:, None] - self.palette[:, None, None]).sum(-1).argmin(1)  # (N, H, W): which colour
        seen = (nearest.reshape(len(x), 1, -1) == np.arange(len(self.palette))[:, None]).astype(np.float32)
        inside = seen @ self.masks.reshape(len(self.masks), -1).T.astype(np.float32)  # (N, colours, places)
        ground, shape = self.pairs.T
        agree = inside[:, shape] + (seen.sum(2, keepdims=True) - inside)[:, ground]  # pixels, (N, pairs, places)
        pair, place = np.divmod(agree.reshape(len(x), -1).argmax(1), len(self.masks))
        return x - self.clean(place, pair)

    def log_prob(self, x):
        """True log p(X) of uint8 (N, H, W, 3), nats (N,); -inf where X is impossible."""
        far = self.bound + 1
        log_pmf = np.pad(np.log(self.pmf), 1, constant_values=-np.inf)  # of noise -far..far
        return log_pmf[self.decode(x).clip(-far, far) + far].sum((1, 2, 3)) - self.log_configurations

    def decodable(self, x, share=0.98):
        """bool (N,): at least this share of the sub-pixels within the noise of one configuration."""
        return (abs(self.decode(x)) <= self.bound).mean((1, 2, 3)) >= share


@dataclasses.dataclass
class Dataset:
    """train, test: uint8 (N, H, W, 3), arrays or torch's Subsets of one; train: also a tensor, or None where images are
    made on the fly, from `shapes`."""

    train: object
    test: object
    flip: bool = False
    shapes: Shapes | None = None

    def batch(self, step, n, seed):
        """Training batch number `step` as uint8 (n, 3, H, W), a function of (step, n, seed)."""
        if self.train is None:
            return to_tensor(self.shapes.sample(n, [*seed, step]))
        size, rows = len(self.train), range(step * n, (step + 1) * n)
        index = np.array([permutation((*seed, row // size), size)[row % size] for row in rows])
        flips = np.random.default_rng([*seed, step, 1]).random(n) < 0.5 * self.flip
        if isinstance(self.train, torch.Tensor):
            index, flips = (upload(torch.from_numpy(x), self.train.device) for x in (index, flips))
        images = to_tensor(self.train[index])
        return torch.where(torch.as_tensor(flips)[:, None, None, None], images.flip(3), images)


@functools.lru_cache(2)
def permutation(seed, n):
    """Of 0..n-1, a function of the seed."""
    return np.random.default_rng(seed).permutation(n)


def current(device):
    """A context in which the device is the current one of its kind: kernels, graphs and pinned memory belong to it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def upload(x, device):
    """x on the device, without the host waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def to_tensor(images):
    """uint8 (N, H, W, 3), array or tensor -> tensor (N, 3, H, W)."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.require(images, requirements=("C", "W")))
    return images.permute(0, 3, 1, 2)


def bar_of(iterable=None, unit="pixel", delay=0.3, **options):
    """A progress bar of tqdm's, which is imported when it is needed."""
    from tqdm import tqdm

    return tqdm(iterable, unit=unit, unit_scale=unit == "pixel", delay=delay, **options)


# --- Training and evaluation -----------------------------------------------------------------------------------------


def write_atomically(path, content):
    """content (bytes, or a function that writes them to a file) to a part, which is then moved to `path` in one step:
    nothing is ever half-written. Folders are made as needed."""
    path = pathlib.Path(path)
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_checkpoint(path, config, factors, **more):
    """factors: {k: state dict with averaged weights}, some or all of the model's; more: what training goes on with."""
    checkpoint = dict(format="pixelaux", version=VERSION, config=dataclasses.asdict(config), factors=factors, **more)
    torch.save(checkpoint, buffer := io.BytesIO())  # in memory: torch does not report a full disk as an OSError
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path):
    """A checkpoint's dict. Raises Problem if the file is truncated, foreign or of another version."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["version"] == VERSION
        parts = [state["config"], state["factors"]] if known else []
        if state["format"] != "pixelaux" or not all(isinstance(part, dict) for part in parts):
            raise ValueError
    except FileNotFoundError:
        raise Problem(f"{path}: no such checkpoint; `train` writes it in its folder") from None
    except IsADirectoryError:
        raise Problem(f"{path}: a folder, expected a checkpoint file") from None
    except Exception as error:  # torch raises many kinds; weights_only keeps foreign files from running code
        raise Problem(f"{path}: not a pixelaux checkpoint, or a damaged one ({type(error).__name__})") from None
    if not known:
        raise Problem(f"{path}: checkpoint format {state['version']}, this program reads {VERSION}")
    return state


def load(run, device="cpu", best=False):
    """The trained model of a run (folder of `train`, or a checkpoint file) with averaged weights, or, of a folder, the
    weights that cost the test images least.

    A folder's factors, which may have been trained on different machines, are joined; if it has none, its weights.pt is
    taken (exported ones). A file that holds some of the factors only is joined with its neighbours. Raises Problem.
    """
    run, kind = pathlib.Path(run), "best" if best else "factor"
    if best and run.is_file():
        raise Problem(f"--best: {run} is a file; it goes with a folder")
    paths = [run]
    if run.is_dir():
        paths = sorted(run.glob(f"{kind}-*.pt")) or sorted(run.glob("weights.pt")) or [run / f"{kind}-0.pt"]
    state = read_checkpoint(paths[0])
    model, found = PixelAux(make_config(**state["config"])), set()
    if run.is_file() and len(state["factors"]) < len(model.factors):
        paths = [*sorted(run.parent.glob("factor-*.pt")), run]  # the file named comes last: it wins
    for path in paths:
        for k, weights in read_checkpoint(path)["factors"].items():
            try:
                model.factors[k].load_state_dict(weights)
            except (RuntimeError, IndexError):
                raise Problem(f"{path}: of another model than {run}") from None
            found.add(k)
    if missing := sorted(set(range(len(model.factors))) - found):
        raise Problem(f"{run}: {kind}-{missing[0]}.pt is missing; `train --factor {missing[0]}` makes it")
    return model.to(device, memory_format=torch.channels_last).eval()


def read_metrics(out):
    """Records of OUT/metrics.jsonl, without a last line that a kill may have cut."""
    with open(out / "metrics.jsonl") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def training_steps(config, k, data):
    """Steps of factor k: as configured, or from epochs (of 50,000 images where they are made on the fly)."""
    images = 50_000 if data.train is None else len(data.train)
    return config.steps[min(k, 1)] or math.ceil(config.epochs[min(k, 1)] * images / config.batch_size)


def summed(values, device):
    """Sums of floats over the processes of a run, the same for all of them; all wait for the last."""
    if RANKS > 1:
        torch.distributed.all_reduce(values := torch.tensor(values, dtype=torch.float64, device=device))
        values = values.tolist()
    return values


def batches(data, step, n, seed, device):
    """This process's rows of the batches number step, step + 1, .., on the device; a thread prepares the next one."""
    def make(step):
        with current(device):
            x = data.batch(step, n, seed)[RANK::RANKS]
            return upload(x.contiguous(memory_format=torch.channels_last), device)

    with multiprocessing.pool.ThreadPool(1) as pool:
        begun = (pool.apply_async(make, [step]) for step in itertools.count(step))
        for batch, _ in itertools.pairwise(begun):
            yield batch.get()


class Loss(nn.Module):
    """What a batch costs a factor, as a module: torch.compile and DistributedDataParallel wrap modules."""

    def __init__(self, factor, config, dims, device):
        super().__init__()
        self.factor, self.tight, self.scale = factor, config.tight, 1 / (dims * math.log(2))
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and able)

    def forward(self, x, x_hat):
        """x: uint8 (N, C, H, W), x_hat: psi(x) or None -> bits per sub-pixel of X, a float32 scalar."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            return -self.factor.log_prob(x, x_hat, self.tight).mean() * self.scale


def compiled(loss, *batch):
    """loss compiled for batches of this shape; where that fails (no C++ compiler), as it is, with a warning."""
    torch.compiler.reset()  # what earlier factors were compiled to
    fast = torch.compile(loss, dynamic=False)
    try:
        fast(*batch).backward()
    except Exception as error:  # the compilers raise many kinds
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(f"pixelaux: warning: training without torch.compile, which failed: {reason}", file=sys.stderr)
        return loss
    return fast


def update(loss, optimizer, average, decay, *batch):
    """A training step: gradient, Adam, moving average of the weights. Returns the loss; the host waits for nothing."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(*batch)
    value.backward()
    optimizer.step()
    averaged = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # AveragedModel counts its updates on the host
    averaged(list(average.parameters()), optimizer.param_groups[0]["params"], None)
    return value.detach()


def train_factor(model, k, data, out, device, resume=False, caught=(), compile=False, save_every=120.0,
                 show=lambda: None):
    """Train factor k of model on data, or go on where its checkpoint stands; the model then has the averaged weights.

    Writes out/factor-k.pt every save_every seconds and at the end, out/best-k.pt when the test images cost less than
    ever, and lines of out/metrics.jsonl; calls `show` after each quarter but the last. A run that is stopped and
    resumed gives the same weights as one that is not: batches and dropout are functions of the step. Of several
    processes (torchrun) each takes its rows of every batch, and the first one writes.
    """
    config, seed = model.config, (model.config.seed, k)
    path, metrics, steps = out / f"factor-{k}.pt", out / "metrics.jsonl", training_steps(config, k, data)
    budget = 60 * (config.budget[k] if isinstance(config.budget, tuple) else config.budget)  # seconds; 0: steps count
    saved = read_checkpoint(path) if resume and path.exists() else None
    average = model.train().factors[k]  # of the weights in training: what is tested, shown and kept
    torch.manual_seed(hash(seed))
    if not saved and not config.start:
        model.initialise(data.batch(0, max(config.batch_size, 32), seed).to(device), [k])
    factor = copy.deepcopy(average)
    model.eval()
    optimizer = torch.optim.Adam(factor.parameters(), lr=config.lr, betas=config.betas, fused=True)
    step, elapsed, best = 0, 0.0, math.inf
    if saved:
        try:
            training = saved["training"]
            average.load_state_dict(saved["factors"][k])
            factor.load_state_dict(training["weights"])
            optimizer.load_state_dict(training["optimizer"])
            step, elapsed, best = training["step"], training["seconds"], training["best"]
        except (KeyError, RuntimeError, ValueError):
            raise Problem(f"{path}: training as in {out / 'config.json'} cannot go on from this") from None
    if metrics.exists() and RANK == 0:  # a resumed run repeats what came after its checkpoint
        keep = [line for line in read_metrics(out) if line["factor"] != k or line["step"] <= step]
        write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in keep).encode())

    pair = lambda x: model.pairs(x)[k]
    share = lambda: min(1.0, elapsed / budget if budget else step / steps)  # of the training, done
    quarter, test = int(4 * share()), to_tensor(data.test[:128])
    loss = Loss(factor, config, model.dims, device)
    if compile and quarter < 4:
        loss = compiled(loss, *pair(data.batch(0, config.batch_size // RANKS, seed).to(device)))
    if RANKS > 1:
        loss = nn.parallel.DistributedDataParallel(loss, [device] if device.type == "cuda" else None)
    pace, losses = budget, []  # pace: seconds a step, at first the longest possible
    stream, looked = batches(data, step, config.batch_size, seed, device), time.monotonic()
    started, written = looked - elapsed, looked
    with bar_of(total=1, delay=0, initial=share(), desc=f"factor {k}", disable=RANK > 0,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while quarter < 4:
            lr = config.lr * config.lr_decay**step * (1 - share() if config.anneal else 1)
            if config.start:  # Adam's second moments begin at 0, and at full rate its first steps ruin trained weights
                lr *= min(1.0, (step + 1) * (1 - config.betas[1]) / 2)
            optimizer.param_groups[0]["lr"] = lr
            torch.manual_seed(hash((*seed, RANK, step)))  # of the dropout
            losses.append(update(loss, optimizer, average, config.ema if step else 0.0, *pair(next(stream))))
            step += 1
            bar.update(share() - bar.n)
            every = max(1, min(20, int(0.01 * (budget / pace if budget else steps))))
            if step % every and share() < 1 and (RANKS > 1 or not caught):
                continue
            # only here the host waits for the device and the processes agree: on losses, the first one's clock, signals
            values, now, mine = torch.stack(losses).tolist(), time.monotonic(), RANK == 0
            *values, elapsed, pace, stop = summed([*(v / RANKS for v in values), mine * (now - started),
                                                   mine * (now - looked) / len(losses), len(caught)], device)
            if bad := [i for i, value in enumerate(values, step - len(values) + 1) if not math.isfinite(value)]:
                good = f"the last good checkpoint is {path}" if path.exists() else "it has no checkpoint yet"
                raise ArithmeticError(f"factor {k}: the loss is not finite at step {bad[0]} (--lr too high?); {good}")
            losses, before, quarter = [], quarter, int(4 * share())
            if RANK == 0:
                mean, speed = sum(values) / len(values), config.batch_size / pace
                record = dict(factor=k, step=step, bits_per_dim=mean, lr=lr, seconds=round(elapsed, 3),
                              images_per_second=round(speed, 1))
                if quarter > before:
                    with torch.inference_mode():
                        nats = torch.cat([average.log_prob(*pair(x.to(device)), config.tight)
                                          for x in test.split(config.batch_size)])
                    record["test_bits_per_dim"] = cost = float(bits_per_dim(nats.mean(), model.dims))
                    if cost < best:
                        best = cost
                        write_checkpoint(out / f"best-{k}.pt", config, {k: average.state_dict()})
                with open(metrics, "a") as file:
                    file.write(json.dumps(record) + "\n")
                bar.n = share()  # by the clock just looked at
                bar.set_postfix_str(f"step {step}, {mean:.3f} bits/dim, {speed:.0f} images/s")
                if quarter == 4 or stop or time.monotonic() - written > save_every:
                    training = dict(weights=factor.state_dict(), optimizer=optimizer.state_dict(), step=step,
                                    seconds=elapsed, best=best)
                    write_checkpoint(path, config, {k: average.state_dict()}, training=training)
                    written = time.monotonic()
                if before < quarter < 4:
                    show()
            if stop and quarter < 4:
                message = f"stopped at step {step}; --resume goes on from {path}"
                raise SystemExit(130) if RANK else KeyboardInterrupt(message)
            looked = time.monotonic()


@torch.inference_mode()
def evaluate(model, images, batch_size=None):
    """Log-probabilities of all images, uint8 (N, H, W, 3), from the same forward passes: (bound, tight), each float64
    (factors, N), nats per image, coarsest factor first."""
    model.eval()
    room = 2**30 if model.device.type == "cpu" else 2**33
    batches = to_tensor(images).split(batch_size or min(factor.at_once(room) for factor in model.factors))
    results = []
    for x in bar_of(batches, "batch", desc="evaluation"):
        nats = []
        for factor, (level, level_hat) in zip(model.factors, model.pairs(x.to(model.device))):
            head = factor.head(level, level_hat)
            limits = factor.psi and factor.psi.bounds(level, level_hat)
            nats += [head.log_prob(level, bounds).flatten(1).sum(1) for bounds in (None, limits)]
        results.append(torch.stack(nats).double().cpu())  # (2 factors, n)
    results = torch.cat(results, 1).numpy()
    return results[::2], results[1::2]


# --- Sampling: each activation computed once, independent positions together -----------------------------------------


class Schedule:
    """Where each layer of a causal network is evaluated at each sequential step.

    Pixel (r, c) is drawn at step c + lag r, with the smallest lag at which everything that it needs is drawn before;
    lag = W is the raster order. A position of a layer is evaluated when all that its taps read is there: at the next
    multiple of lag, a row together, if no reader has to wait for it; or else with its diagonal, as long before or after
    the pixels there as all readers allow. So the light network comes out as a diagonal wavefront (lag 8), and a network
    with resampling row by row, its vertical stream once a row and its horizontal one once a pixel, without either being
    written down anywhere.

    With few images the time goes into reading the weights, once a step. So a layer has up to two parts: the taps that
    are there `lag` steps early (in the raster order those of the row above) are summed for lag steps together, a row,
    and the others when the position's time comes.

    Positions are numbered in the order in which their pixels are drawn, so that those of a step are neighbours in
    memory. Of each layer the last ones are kept, those that are still to be read: position p lies in slot p mod `ring`
    of its buffer. Slot ring stands for "outside" and holds 0; slot ring + 1 takes what is computed for padding:
    positions come in multiples of `multiple`, because we promise equal images and a product's rows may depend on how
    many there are (see `ROWS`). On CUDA it is padded to powers of two of them: few different shapes, each captured as
    one graph.

    fast=False: one step that evaluates everything everywhere, the full pass.

    indices: [(slots of a buffer, the step of each position, (H W + 1, taps): what is read; padding last)].
    parts: {layer's node: in order, (index of its slots, of its positions if embedded, [(source, its taps, index)])}.
    steps: (layout, indices, runs) each, layout = ((index, how many), ..) of those that have any, runs = {index: first}
    of those that are in a row: views in place of copies. (Not on CUDA, where a step is captured for all its like.)
    """

    def __init__(self, net, size, multiple, fast, device):
        self.sizes, first, (h, w) = [net.size(i, size) for i in range(len(net.channels))], net.nodes_given, size
        self.places = [np.arange(h * w)[:, None] for h, w in self.sizes]
        # reads: of each layer, {which source, or "residual": (node, its positions that are read, (H W, taps))}
        self.reads = {i: {j: (node, conv.taps(self.sizes[node], self.sizes[i]))
                          for j, (node, conv) in enumerate(zip(layer.sources, layer.convs))
                          if node not in net.embeddings} for i, layer in enumerate(net.layers, first)}
        for i, layer in enumerate(net.layers, first):
            if layer.residual is not None:
                self.reads[i]["residual"] = layer.residual, self.places[i]
        self.lag = 1 + bisect.bisect_left(range(1, size[1]), True, key=self.causal)
        if not self.causal(self.lag):
            raise AssertionError("the network is not causal")
        # the raster positions of each resolution in the order in which they are numbered from here on, "outside" last
        order = {each: np.append(self.wave(self.lag, each).argsort(kind="stable"), math.prod(each))
                 for each in self.sizes}
        new = {each: positions.argsort() for each, positions in order.items()}
        self.reads = {i: {j: (node, new[self.sizes[node]][table[order[self.sizes[i]][:-1]]])
                          for j, (node, table) in read.items()} for i, read in self.reads.items()}
        drawn = np.append(np.sort(self.wave(self.lag, size)), 0)
        step = self.earliest(drawn, self.latest(drawn))  # of each position of each node, "outside" last
        step[0] = step[-1] = drawn
        parts = {i: self.split(i, step) for i in self.reads}
        if not fast:  # the same parts, all at once
            step = [0 * when for when in step]
            parts = {i: [(0 * when, taps) for when, taps in part] for i, part in parts.items()}
        rings, numbers, self.indices = self.rings(step, parts), {}, []

        def index(ring, when, table, padding):
            table = np.concatenate([table, np.full_like(table[:1], padding)])
            number = numbers.setdefault((ring, when.tobytes(), table.tobytes()), len(self.indices))
            self.indices += [(ring + 2, when[:-1], table)] * (number == len(self.indices))
            return number

        def own(i, when):
            ring = rings[self.sizes[i]]
            return index(ring, when, self.places[i] % ring, ring + 1)

        def gather(i, when, node, table):
            if np.array_equal(table, self.places[i]):  # at the same place: 1x1
                return own(i, when)
            ring = rings[self.sizes[node]]
            return index(ring, when, np.where(table < len(self.places[node]), table % ring, ring), ring)

        self.input, self.drawn = own(0, step[0]), index(h * w, step[0], order[size][:-1, None], h * w)
        embedded = {i for i, layer in enumerate(net.layers, first) if {*layer.sources} & {*net.embeddings}}
        views = device.type == "cpu" and multiple == 1

        def reads(i, when, taps):
            for j, some in taps.items():
                each = [(tap,) for tap in some] if views and np.bincount(when[:-1]).max() == 1 else [some]
                for some in each:  # of a position alone each tap is a view
                    yield j, some, gather(i, when, self.reads[i][j][0], self.reads[i][j][1][:, some])

        self.parts = {i: [(own(i, when), index(len(all), when, all, len(all)) if i in embedded else None,
                           [*reads(i, when, taps)]) for when, taps in part]
                      for (i, part), all in zip(parts.items(), self.places[first:])}
        found = []
        for _, when, table in self.indices:
            count = np.bincount(when, minlength=1 + max(map(np.max, step)))
            groups = -(-count // multiple)
            if device.type == "cuda":
                groups[count > 0] = [1 << int(n - 1).bit_length() for n in groups[count > 0]]
            each = np.split(when.argsort(kind="stable"), count.cumsum()[:-1])
            found.append([table[np.concatenate([part, np.full(n * multiple - len(part), len(when))])].ravel()
                          for part, n in zip(each, groups)])
        single = {number for number, (_, _, table) in enumerate(self.indices) if table.shape[1] == 1}
        self.steps = [(tuple((number, len(part)) for number, part in enumerate(parts) if len(part)),
                       torch.from_numpy(np.concatenate(parts)).to(device),
                       {number: part[0] for number, part in enumerate(parts)
                        if number in single and len(part) and (np.diff(part) == 1).all()}) for parts in zip(*found)]
        self.order = {each: torch.from_numpy(raster % math.prod(each)).to(device) for each, raster in order.items()}
        del self.reads, self.places  # large, and schedules are kept

    def wave(self, lag, size):
        """The step at which each pixel is drawn, raster order; the order of the steps for a coarser resolution."""
        return np.add.outer(lag * np.arange(size[0]), np.arange(size[1])).ravel()

    def earliest(self, drawn, latest=None):
        """The first step at which each position of each node is known ("outside", last, at 0); given the latest, the
        next multiple of lag if that is early enough, or else as many steps from the wave as is early enough for all."""
        step = [drawn + 1, *(np.zeros(len(place) + 1, int) for place in self.places[1:])]
        step[0][-1] = 0
        for i, read in self.reads.items():
            step[i][:-1] = np.max([step[node][table].max(1) for node, table in read.values()], 0)
            if latest:
                row = -(-step[i] // self.lag) * self.lag
                wave = np.sort(self.wave(self.lag, self.sizes[i])) * (self.sizes[0][0] // self.sizes[i][0])
                wave = np.append(wave + (latest[i][:-1] - wave).min(), 0)
                step[i] = row if (row <= latest[i]).all() else np.maximum(step[i], wave)
        return step

    def causal(self, lag):
        """Whether all that a pixel needs is known when it is drawn."""
        drawn = np.append(self.wave(lag, self.sizes[0]), 0)
        return bool((self.earliest(drawn)[-1] <= drawn)[:-1].all())

    def latest(self, drawn):
        """The last step at which each position of each node serves its purpose."""
        latest = [np.full(len(place) + 1, drawn.max()) for place in self.places[:-1]] + [drawn]
        for i, read in reversed(self.reads.items()):
            for node, table in read.values():
                for tap in table.T:  # with one tap no two positions read the same
                    latest[node][tap] = np.minimum(latest[node][tap], latest[i][:-1])
        return latest

    def split(self, i, step):
        """The parts of layer i, in order: (the step of each position, {which source: its taps})."""
        early, late, row = {}, {}, step[i] // self.lag * self.lag
        for j, (node, table) in self.reads[i].items():
            known = (step[node][table] <= row[:-1, None]).all(0) & (self.lag >= 4) & (node > 0)
            for taps, mask in ((early, known), (late, ~known)):
                if mask.any() and j != "residual":
                    taps[j] = tuple(np.flatnonzero(mask).tolist())
        return [(when, taps) for when, taps in ((row if late else step[i], early), (step[i], late)) if taps]

    def rings(self, step, parts):
        """Of each resolution, how many positions, a multiple of its width, hold all that is still to be read."""
        lives = {i: [step[i], step[i].copy()] for i in (0, *self.reads)}  # written, last read
        for i, part in parts.items():
            for when, taps in [*part, (step[i], {"residual": (0,)} if "residual" in self.reads[i] else {})]:
                for node, tap in [(self.reads[i][j][0], self.reads[i][j][1][:, k]) for j in taps for k in taps[j]]:
                    lives[node][1][tap] = np.maximum(lives[node][1][tap], when[:-1])
        lives = [(i, *life) for i, life in lives.items()] + [(i, part[0][0], step[i]) for i, part in parts.items()]

        def enough(size, ring):
            return all((begin[ring:-1] > end[: max(0, len(end) - 1 - ring)]).all()
                       for i, begin, end in lives if self.sizes[i] == size)

        return {(h, w): next(n * w for n in range(1, h + 1) if enough((h, w), n * w)) for h, w in set(self.sizes)}


class Draw:
    """Source of symbols: sampling from given noise, uniform (N, H W, 2 C) in (0, 1)."""

    def __init__(self, noise, mode="random"):
        self.noise, self.mode = F.pad(noise.transpose(0, 1), (0, 0, 0, 0, 0, 1), value=0.5), mode

    def __call__(self, head, positions, limits):
        """head: of P N pixels, (P N, .., 1, 1), positions first; positions: (P,) -> levels, int64 (P N, C, 1, 1)."""
        noise = self.noise.index_select(0, positions).flatten(0, 1)[:, :, None, None]
        return head.sample(noise, self.mode, limits)


ROWS = 4  # a product's rows are the same to the last bit in all of a multiple of 4 rows (seen with MKL and oneDNN)
MKLDNN = torch.ops.mkldnn  # private operators, so we look before we use them
PACKS = (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
         and hasattr(MKLDNN, "_linear_pointwise") and hasattr(MKLDNN, "_reorder_linear_weight"))


def product(weight):
    """The function (rows x, added) -> x weight^T + added, a bias or rows. weight: (C_out, C_in).

    MKL packs a weight at each call, oneDNN keeps it packed; but its calls cost more, so that it pays for large ones.
    """
    if PACKS and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 150_000:
        weight, linear = MKLDNN._reorder_linear_weight(weight, None), MKLDNN._linear_pointwise
        return lambda x, added: (linear(x, weight, added, "none", [], "") if added.dim() == 1 else
                                 linear.binary(x, added, weight, None, "add"))
    weight = weight.t().contiguous()
    return lambda x, added: torch.addmm(added, x, weight)


class Decoder:
    """Runs a factor's causal network over n images in an order in which everything is known when it is needed, and
    asks `symbol(head, positions, limits)` for the levels of each set of pixels.

    Every activation is computed once and kept in a buffer (ring + 2, n, C) while it is needed; a part of a layer at a
    set of positions is a gather of what its taps read and one matrix product. The embedding's 1x1 projections do not
    depend on x and are computed once, for all positions. fast=False: the same by a full pass for every pixel.
    On CUDA a step is captured as a graph, one for each layout that recurs, and replayed.
    """

    def __init__(self, factor, n, x_hat=None, shift=0.0, tight=False, fast=True):
        self.factor, self.n, self.shift, self.x_hat, self.fast = factor, n, shift, x_hat, fast
        self.tight, self.symbol, net = tight and factor.psi is not None, None, factor.net
        self.device, first, (c, h, w) = factor.device, net.nodes_given, factor.shape
        self.captures = self.device.type == "cuda"
        key, cache = ((h, w), ROWS // math.gcd(n, ROWS), fast, self.device), net.__dict__.setdefault("schedules", {})
        if key not in cache:
            cache[key] = Schedule(net, *key)
        self.schedule = schedule = cache[key]
        sizes = schedule.sizes
        own = {0: schedule.input} | {i: parts[-1][0] for i, parts in schedule.parts.items()}
        outputs = [{} for _ in net.channels]  # of each node: activation that is read -> its buffer, if it needs one

        def buffer(node, channels):
            return torch.zeros(schedule.indices[own[node]][0] * n, channels, dtype=factor.dtype, device=self.device)

        def read(node, activation, index):
            """(what is read, its buffer, where in it); no buffer if it is there from the same step."""
            outputs[node].setdefault(activation)
            if index != own[node] and outputs[node][activation] is None:
                outputs[node][activation] = buffer(node, net.channels[node] * (1 + (activation == "concat_elu")))
            return (node, activation), None if index == own[node] else outputs[node][activation], index

        # records: of each part: its slots, reads, product, what is added to it, layer, residual, node, outputs
        self.records, embedded = [], dict(zip(net.embeddings, map(concat_elu, factor.embeddings(x_hat))))
        for i, layer in enumerate(net.layers, first):
            weights, inputs = {}, list(enumerate(zip(layer.sources, layer.convs)))
            added = sum(conv.b for _, (node, conv) in inputs if node not in embedded)  # bias, or where rows lie
            for j, (node, conv) in inputs:
                if node in embedded:  # one at most
                    projection = conv(embedded[node], sizes[i]).flatten(2).permute(2, 0, 1)
                    projection = projection.index_select(0, schedule.order[sizes[i]]).add_(added)
                    added = None, projection.flatten(0, 1), schedule.parts[i][0][1]
                else:
                    weights[j] = conv.weight().permute(0, 2, 3, 1).flatten(1, 2)  # (C_out, kh kw, C_in), as gathered
            for part, (slots, _, reads) in enumerate(schedule.parts[i], 1):
                weight = torch.cat([weights[j][:, taps].flatten(1) for j, taps, _ in reads], 1)
                reads = [read(layer.sources[j], layer.convs[j].activation, index) for j, _, index in reads]
                if part < len(schedule.parts[i]):  # the early part is a sum for the other one to go on with
                    early = buffer(i, len(weight))
                    self.records.append((slots, reads, product(weight), added, None, None, i, {"none": early}))
                    added = None, early, own[i]
                else:
                    residual = None if layer.residual is None else read(layer.residual, "none", slots)
                    self.records.append((slots, reads, product(weight), added, layer, residual, i, outputs[i]))
        self.input, self.images = outputs[0]["none"], torch.arange(n, device=self.device).unsqueeze(1)
        self.canvas = torch.zeros(h * w + 1, n, c, dtype=torch.long, device=self.device)

    def limits(self, positions):
        """Function (x, c) -> inclusive interval of channel c at these positions; x: (P N, C, 1, 1), so far."""
        psi, (_, h, w), side = self.factor.psi, self.factor.shape, self.factor.psi.cell
        r, col, within = positions // w, positions % w, torch.arange(side, device=self.device)
        corner = (r - r % side) * w + col - col % side
        cells = (corner[:, None] + (within[:, None] * w + within).flatten()).clamp(max=h * w)  # padding: anywhere
        coarse = (r // side * (w // side) + col // side).clamp(max=h * w // side**2 - 1)
        blocks = self.canvas[cells].transpose(1, 2).flatten(0, 1)  # (P N, side^2, C)
        x_hat = self.x_hat.flatten(2)[:, :, coarse].permute(2, 0, 1).flatten(0, 1)[:, :, None, None]
        place = (r % side * side + col % side).repeat_interleave(self.n)[:, None, None]  # (P N, 1, 1)

        def interval(x, c):
            filled = blocks.scatter(1, place.expand(-1, -1, x.shape[1]), x.flatten(1).unsqueeze(1))
            filled = filled.transpose(1, 2).unflatten(2, (side, side))
            return tuple(v[:, c].flatten(1).gather(1, place[:, :, 0]).unsqueeze(2) for v in psi.bounds(filled, x_hat))

        return interval

    def step(self, layout, indices, runs, symbol, only=None):
        """Evaluate what `layout` names, then draw. runs: see Schedule; only: draw this position alone (full pass)."""
        n, length = self.n, dict(layout)
        index = dict(zip(length, indices.split(list(length.values()))))
        positions, slots = index.get(self.schedule.drawn), index.get(self.schedule.input)  # of the pixels to draw
        for number, part in index.items():  # a slot has a row for each image
            if number in runs:
                index[number] = slice(runs[number] * n, (runs[number] + len(part)) * n)
            elif n > 1:
                index[number] = (part.view(-1, 1, self.schedule.indices[number][2].shape[1]) * n + self.images).view(-1)
        now, rows = {}, 0

        def rows_of(read, buffer, number):
            if buffer is None:
                return now[read]
            at = index[number]
            return (buffer[at] if isinstance(at, slice) else buffer.index_select(0, at)).view(rows, -1)

        for own, reads, product, added, layer, residual, node, outputs in self.records:
            if own not in index:
                continue
            rows = n * length[own]
            taps = [rows_of(*read) for read in reads]
            y = product(torch.cat(taps, 1) if len(taps) > 1 else taps[0],
                        rows_of(*added) if isinstance(added, tuple) else added)
            if residual:
                y = layer.finish(y, rows_of(*residual))
            for activation, buffer in outputs.items():
                now[node, activation] = value = ACTIVATIONS[activation](y)
                if buffer is not None:
                    if isinstance(index[own], slice):
                        buffer[index[own]] = value
                    else:
                        buffer.index_copy_(0, index[own], value)
        if positions is None:
            return
        if only is not None:
            y = y.view(len(positions), n, -1)[only]
            positions, slots = positions[only : only + 1], slots[only : only + 1]
        head = self.factor.Head(y.double()[:, :, None, None], self.factor.levels, self.shift)
        x = symbol(head, positions, self.limits(positions) if self.tight else None).view(len(positions), n, -1)
        self.canvas.index_copy_(0, positions, x)
        unit = F.pad(to_unit(x, self.factor.levels, self.factor.dtype), (0, 1), value=1.0)
        self.input.view(-1, n, unit.shape[2]).index_copy_(0, slots, unit)

    def run(self, symbol, progress=None):
        """-> uint8 (n, C, H, W); progress is called with the number of pixels done, at each step."""
        c, h, w = self.factor.shape
        if symbol is not self.symbol:  # the graphs read its noise
            self.symbol, self.graphs, self.pool = symbol, {}, None
        steps = list(itertools.product([None] if self.fast else range(h * w), self.schedule.steps))
        with torch.inference_mode(), current(self.device):
            for i, (only, (layout, indices, runs)) in enumerate(steps):
                if self.captures and self.fast and isinstance(symbol, Draw):
                    self.replay(layout, indices, symbol)
                else:
                    self.step(layout, indices, runs, symbol, only)
                if progress:
                    progress(self.n * h * w * (i + 1) // len(steps) - self.n * h * w * i // len(steps))
        return self.canvas[: h * w].permute(1, 2, 0).reshape(self.n, c, h, w).to(torch.uint8)

    def replay(self, layout, indices, symbol):
        """A layout's first step runs eagerly, the second is captured, and from then on the graph is replayed."""
        if layout not in self.graphs:
            self.graphs[layout] = None
            return self.step(layout, indices, {}, symbol)
        if self.graphs[layout] is None:
            graph, static = torch.cuda.CUDAGraph(), indices.clone()
            stream = torch.cuda.Stream(self.device)  # torch's own for this is of the device that captured first
            with torch.cuda.graph(graph, self.pool, stream=stream, capture_error_mode="thread_local"):
                self.step(layout, static, {}, symbol)
            self.graphs[layout], self.pool = (graph, static), graph.pool()  # results are in buffers: one pool for all
        graph, static = self.graphs[layout]
        static.copy_(indices)
        graph.replay()


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    if not (here / "commands.py").exists():
        print("pixelaux: commands.py, the command line, is not here: expected it beside pixelaux.py", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(here))
    sys.modules["pixelaux"] = sys.modules["__main__"]  # commands.py works with this very module
    from commands import main

    sys.exit(main())
