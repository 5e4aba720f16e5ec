"""PixelCNN models with auxiliary variables, in one file (torch and numpy).

    Kolesnikov & Lampert, "PixelCNN Models with Auxiliary Variables for Natural Image Modeling", ICML 2017;
    Salimans et al., "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood", ICLR 2017.

An image X is modelled together with deterministic functions of itself: X_0 = X, X_{i+1} = psi_i(X_i), and

    log p(X) >= log p(X, X_1, .., X_K) = log p(X_K) + sum_i log p(X_i | X_{i+1})                  (Eq. 2-5)

A model is its list of psi; a factor is a causal network, a head and, if it is conditional, an embedding network.

    Eq. 1      raster-order factorisation                        Conv, Network
    Eq. 2, 3   p(X, X^) = p(X^) p(X | X^)                        PixelAux.log_prob_factors, PixelAux.sample
    Eq. 4, 5   the bound; factors train apart                    PixelAux.log_prob, train
    Sec. 3.1   4-bit gray as X^                                  Gray, Categorical
    Sec. 3.2   half resolution as X^, recursively                Half
    Sec. 3.3   embedding f_w(X^)                                 Network(causal=False), Factor
    Sec. 4.2   MAP and reduced-variance sampling                 LogisticMixture.sample(mode=, shift)
    beyond     exact likelihood in place of the bound            psi.bounds, tight=True
    beyond     sampling at about the cost of one forward pass    Schedule, Decoder
    beyond     the likelihood as real bits                       compress, decompress

Where we deviate from the paper, or the paper is silent, the docstring concerned says so.
Units: log-probabilities are natural logarithms (nats); bits/dim are bits per sub-pixel of X.
"""
import argparse
import bisect
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing.pool
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import timeit
import urllib.request
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset

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
    start: str = ""  # run or checkpoint whose weights training begins with


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
        k, params = params.shape[1] // 10, at_least_float32(params).contiguous()
        rest = params[:, k:].unflatten(1, (3, 3 * k))  # (N, 3, 3 K, H, W)
        self.levels = levels
        self.logit_probs = params[:, :k]  # (N, K, H, W)
        self.means = rest[:, :, :k]  # (N, 3, K, H, W)
        # Below -7 one level holds all of a component (PixelCNN++'s clamp); above 7 it is flat: a guard for float32.
        self.log_scales = rest[:, :, k : 2 * k].clamp(-7.0, 7.0) + shift
        self.coeffs = rest[:, :, 2 * k :].tanh()

    @staticmethod
    def start(bias):
        """Set the output layer's bias, (10 K,): means spread over the range, scales well below it.

        PixelCNN++ starts all components alike and as wide as the range; from here training is some 3 times shorter.
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
        component, then its value; "map" takes the component's mode in place of its value (Sec. 4.2). Without limits
        one component serves all channels. limits(x, c) -> (lo, hi) of channel c given the channels before it:
        the draw is from the mixture conditioned on the interval. Returns int64 (N, 3, H, W).
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
        return masked(logits, *limits(x, c)).softmax(1) if limits else logits.softmax(1)


def masked(logits, lo, hi):
    """Logits (N, L, H, W) with -inf outside lo..hi, each (N, H, W)."""
    symbols = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    return logits.masked_fill((symbols < lo.unsqueeze(1)) | (symbols > hi.unsqueeze(1)), -math.inf)


class Categorical:
    """Softmax over the levels of a one-channel image (Sec. 3.1). params: (N, L, H, W).

    shift, the reduction of variance, acts as on a log-scale: the logits are divided by exp(shift).
    """

    @staticmethod
    def start(bias):
        """Nothing to set: zero logits are uniform."""

    def __init__(self, params, levels=None, shift=0.0):
        self.logits = at_least_float32(params) * math.exp(-shift)

    def log_prob(self, x, bounds=None):
        """x: uint8 (N, 1, H, W) -> nats (N, H, W); bounds = (lo, hi), each (N, 1, H, W), masks the logits."""
        logits = masked(self.logits, bounds[0][:, 0], bounds[1][:, 0]) if bounds else self.logits
        return logits.log_softmax(1).gather(1, x.long()).squeeze(1)

    def sample(self, noise, mode="random", limits=None):
        """noise: uniform (N, 2, H, W), of which the first is used. "map" takes the mode. Returns int64 (N, 1, H, W)."""
        logits = self.logits
        if limits:
            logits = masked(logits, *limits(torch.zeros_like(noise[:, :1], dtype=torch.long), 0))
        return logits.argmax(1, keepdim=True) if mode == "map" else pick(logits, noise[:, 0])

    def pmf(self, c, x, limits=None):
        """Probabilities (N, L, H, W)."""
        return (masked(self.logits, *limits(x, c)) if limits else self.logits).softmax(1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


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

        VERTICAL  x x x     HORIZONTAL  x x     first layer, both   x x x      x x x      .
                  x o x                 x o     exclude o:          x x x  and .   .  and x .
                                                                    . o .      . o .      x o
    The forward pass is torch's convolution, `taps` give the sampler the same as a gather and a product.
    """

    def __init__(self, c_in, c_out, kernel, offset, activation="none", stride=1, up=False, gain=1.0, dropout=0.0,
                 exact=False):
        super().__init__()
        self.exact = exact  # also under autocast: bfloat16 would round means to half a level, pixels to a quarter
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
        self.g.fill_(1.0)
        y = self.apply_to(x, self.weight(), None, size)
        std, mean = torch.std_mean(y.transpose(0, 1).flatten(1), 1)
        scale = torch.where(std > 1e-5, self.gain / std, self.gain)  # a constant channel has no scale to set
        self.g.copy_(scale)
        self.b.copy_(-mean * scale)

    @property
    def geometry(self):
        return self.kernel, self.offset, self.stride, self.up

    @staticmethod
    @functools.lru_cache(100)
    def taps(geometry, source, target):
        """Flat positions in the source (int64, (H_t W_t, kh kw)) that each target position reads; H_s W_s: outside."""
        (h, w), ((kh, kw), (oy, ox), stride, up) = source, geometry
        r, c, ky, kx = np.ogrid[: target[0], : target[1], :kh, :kw]
        r, c = (r + oy - ky, c + ox - kx) if up else (stride * r + ky - oy, stride * c + kx - ox)
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
    auxiliary inputs: the long skips. PixelCNN++ lets 2 blocks more take the outputs of the first and of the
    strided layers; here all six stages have the same number, the 6 x 6 = 36 and 6 x 4 = 24 blocks of the paper.
    """

    def __init__(self, c_in, c_out, layout, filters, causal=True, embeddings=0, dropout=0.0, look_right=True):
        super().__init__()
        self.layers, self.causal, self.filters, self.dropout = nn.ModuleList(), causal, filters, dropout
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
        self.last_use = {node: i for i, layer in enumerate(self.layers, self.nodes_given)
                         for node in (*layer.sources, layer.residual)}

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
            if not torch.is_grad_enabled():  # what nobody reads any more need not be kept
                for node in {*layer.sources, layer.residual} - {None, *self.outputs}:
                    if self.last_use[node] == i:
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

    @property
    def dtype(self):
        return self.net.layers[0].convs[0].v.dtype

    @property
    def device(self):
        return self.net.layers[0].convs[0].v.device

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

    @property
    def device(self):
        return next(self.parameters()).device

    def levels_of(self, x):
        """[X_K, .., X_1, X], coarsest first, of x: uint8 (N, 3, H, W)."""
        if x.dtype != torch.uint8 or x.dim() != 4 or tuple(x.shape[1:]) != self.shapes[0]:
            raise Problem(f"expected uint8 images (N, {', '.join(map(str, self.shapes[0]))}), "
                          f"got {x.dtype} {tuple(x.shape)}")
        return list(itertools.accumulate(self.chain, lambda level, psi: psi(level), initial=x))[::-1]

    def log_prob_factors(self, x, tight=False):
        """x: uint8 (N, 3, H, W) -> [log p(X_K), .., log p(X | X_1)], coarsest first, nats per image, each (N,).

        tight=True: every factor is conditioned on what x_hat leaves possible; the sum is then log p(X) itself.
        """
        levels = self.levels_of(x)
        return [factor.log_prob(level, level_hat, tight)
                for factor, level, level_hat in zip(self.factors, levels, [None, *levels])]

    def log_prob(self, x, tight=False):
        """x: uint8 (N, 3, H, W) -> log p(X, psi(X), ..), a lower bound on log p(X) (tight: equal), nats, (N,)."""
        return sum(self.log_prob_factors(x, tight))

    @torch.no_grad()
    def initialise(self, x, factors=None):
        """Data-dependent initialisation of all factors (or those numbered) on a batch x: uint8 (N, 3, H, W)."""
        levels = self.levels_of(x)
        for k in range(len(self.factors)) if factors is None else factors:
            convs = [m for m in self.factors[k].modules() if isinstance(m, Conv)]
            for conv in convs:
                conv.initialise = True
            self.factors[k].log_prob(levels[k], levels[k - 1] if k else None)
            for conv in convs:
                conv.initialise = False
            self.factors[k].Head.start(self.factors[k].net.layers[-1].convs[0].b)

    @torch.no_grad()
    def sample(self, n, seed=0, mode="random", shift=0.0, tight=False, given=None, fast=True, progress=None,
               until=None):
        """n images at every level: list of uint8 (n, C, H, W), coarsest first, X last. The model may be in any mode.

        mode: "random" (ancestral) or "map" (Sec. 4.2); shift is added to the log-scales; tight=True keeps every
        sample consistent, psi(sample) = x_hat. given: uint8 images of one level, (n, C, h, w), told by its shape;
        coarser levels are computed from them, finer ones sampled. The images are a function of the weights and the
        seed; `fast` (every activation once) and not fast (a full pass for every pixel, the oracle) give the same.
        progress: called with the number of pixels done. until: sample that many levels only. Memory: f_w, its
        projections and the buffers of one factor, for chunks of images that keep it under about 4 GiB (on CUDA: half of
        what is free).
        """
        if n < 1:
            raise Problem(f"expected 1 image or more, got {n}")
        if mode not in ("random", "map"):
            raise Problem(f"unknown mode {mode!r}: expected random or map")
        training, done = self.training, []
        shapes = self.shapes[::-1]
        if given is not None:
            if given.dtype != torch.uint8 or tuple(given.shape[1:]) not in shapes or len(given) != n:
                raise Problem(f"given: expected {n} uint8 images of a level's shape, one of {shapes}, "
                              f"got {given.dtype} {tuple(given.shape)}")
            level = shapes.index(tuple(given.shape[1:]))
            if int(given.max()) >= self.levels[::-1][level]:
                raise Problem(f"given: levels up to {int(given.max())}, expected 0..{self.levels[::-1][level] - 1}")
            chain = self.chain[len(self.chain) - level :]
            done = list(itertools.accumulate(chain, lambda x, psi: psi(x), initial=given.to(self.device)))[::-1]
        self.eval()
        try:
            for k in range(len(done), until or len(self.factors)):
                factor = self.factors[k]
                c, h, w = factor.shape
                generator = torch.Generator().manual_seed(1_000_003 * seed + k)
                noise = torch.rand(n, h * w, 2 * c, generator=generator, dtype=torch.float64).clamp_(1e-16)
                x_hat, images = done[-1] if done else None, []
                for part in torch.arange(n).split(factor.at_once()):
                    draw = Draw(noise[part].to(self.device), mode)
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
        self.reads = {i: {j: (node, Conv.taps(conv.geometry, self.sizes[node], self.sizes[i]))
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


def current(device):
    """A context in which the device is the current one of its kind: kernels, graphs and pinned memory belong to it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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


# --- Lossless compression: the likelihood in real bits ---------------------------------------------------------------


@torch.no_grad()
def code(model, x=None, words=None, tight=True, progress=None):
    """Write images x, uint8 (N, 3, H, W), to N range coders, or read them from N arrays of words. Returns x, coders.

    Both directions run the same steps of `Decoder`, so their probabilities agree bit for bit. constriction makes 24-bit
    integer tables of them, in which every level has at least 1: no image is impossible, and that costs some 2e-5 bits.
    """
    import constriction

    tables, queue = constriction.stream.model.Categorical(perfect=False), constriction.stream.queue
    coders = [queue.RangeEncoder() for _ in x] if words is None else [queue.RangeDecoder(part) for part in words]
    levels = model.levels_of(x.to(model.device)) if words is None else [None] * len(model.factors)
    for k, (factor, level) in enumerate(zip(model.eval().factors, levels)):
        (c, h, w), known = factor.shape, None if level is None else level.flatten(2).cpu().numpy().astype(np.int32)

        def symbol(head, positions, limits):
            """The levels at these positions, written or read; a source of symbols for Decoder, as Draw is."""
            levels = torch.zeros(len(positions), len(coders), c, dtype=torch.long, device=positions.device)
            real = positions[positions < h * w].cpu().numpy()  # padding comes after them and is not coded
            for channel in range(c):
                pmf = head.pmf(channel, levels.flatten(0, 1)[:, :, None, None], limits)
                pmf = pmf.view(len(positions), len(coders), -1)[: len(real)].transpose(0, 1).contiguous().cpu().numpy()
                symbols = np.empty((len(coders), len(real)), np.int32) if known is None else known[:, channel, real]
                for coder, table, row in zip(coders, pmf, symbols):
                    if known is None:
                        row[:] = coder.decode(tables, table)
                    else:
                        coder.encode(row, tables, table)
                levels[: len(real), :, channel] = torch.from_numpy(symbols.T).to(levels)
            return levels

        x = Decoder(factor, len(coders), x if k else None, tight=tight).run(symbol, progress)
    return x, coders


def compress(model, x, tight=True, progress=None):
    """x: uint8 (N, 3, H, W) -> N arrays of uint32 of -log2 p(x) bits each, up to 64 more. progress: as in `sample`.

    The arithmetic must be the same for `decompress`: device, number of threads, versions and N.
    """
    return [coder.get_compressed() for coder in code(model, x, None, tight, progress)[1]]


def decompress(model, words, tight=True, progress=None):
    """What `compress` returned -> uint8 (N, 3, H, W)."""
    return code(model, None, words, tight, progress)[0]


HEADER = struct.Struct("<4s8sIHHHH")  # magic, fingerprint, CRC of the image, height, width, threads, tight


def fingerprint(model):
    """8 bytes that depend on every weight and on the kind of model, not on the size of the images."""
    config = model.config
    digest = hashlib.sha256(f"{config.model} {len(model.chain)} {config.levels} {config.look_right}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.digest()[:8]


def resized(model, size):
    """The same weights for images of another size (H, W), with as many levels. Raises Problem if it does not fit."""
    if tuple(size) == tuple(model.config.size):
        return model
    scales = sum(isinstance(psi, Half) for psi in model.chain)
    other = PixelAux(dataclasses.replace(model.config, size=tuple(size), scales=scales))
    other.load_state_dict(model.state_dict())
    return other.to(model.device, memory_format=torch.channels_last).eval()


def pack(model, x, tight=True, progress=None):
    """One image, uint8 (3, H, W) -> the bytes of a .pxa file: header, range coder's words, CRC of all before it."""
    words, = compress(model, x[None], tight, progress)
    crc = zlib.crc32(x.cpu().contiguous().numpy().tobytes())
    file = HEADER.pack(b"PXA1", fingerprint(model), crc, *x.shape[1:], torch.get_num_threads(), tight)
    file += words.astype("<u4").tobytes()
    return file + zlib.crc32(file).to_bytes(4, "little")


def unpack(model, file, progress=None):
    """The bytes of a .pxa file -> uint8 (3, H, W). Raises Problem rather than return another image."""
    if len(file) < HEADER.size + 4 or not file.startswith(b"PXA1"):
        raise Problem("not a .pxa file")
    if zlib.crc32(file[:-4]).to_bytes(4, "little") != file[-4:]:
        raise Problem("truncated or altered")
    _, mark, crc, h, w, threads, tight = HEADER.unpack_from(file)
    if mark != fingerprint(model):
        raise Problem("was compressed with another model")
    model, words = resized(model, (h, w)), np.frombuffer(file[HEADER.size : -4], "<u4").astype(np.uint32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # a product split otherwise may round otherwise
    try:
        x = decompress(model, [words], bool(tight), progress)[0].cpu()
    except (AssertionError, ValueError):  # constriction's, of what no encoder writes
        x = torch.zeros(0)
    finally:
        torch.set_num_threads(before)
    if zlib.crc32(x.contiguous().numpy().tobytes()) != crc:
        raise Problem("this machine rounds otherwise than the one that wrote it: same device and versions are needed")
    return x


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
            (radius, cy, cx) for radius in range(side // 8 + 1, side // 4 + 2, step)
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
    """train, test: uint8 (N, H, W, 3); train is None where images are made on the fly, from `shapes`."""

    train: np.ndarray | Subset | torch.Tensor | None
    test: np.ndarray | Subset
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

    def keep_on(self, device, share=0.25):
        """Move the training images to the GPU if they take no more than this share of the memory that is free."""
        if device.type == "cuda" and self.train is not None:
            size = len(self.train) * self.train[[0]].nbytes
            if size < share * torch.cuda.mem_get_info(device)[0]:
                chunks = np.array_split(np.arange(len(self.train)), 1 + size // 2**26)
                self.train = torch.cat([torch.from_numpy(self.train[rows]).to(device) for rows in chunks])


@functools.lru_cache(2)
def permutation(seed, n):
    """Of 0..n-1, a function of the seed."""
    return np.random.default_rng(seed).permutation(n)


def upload(x, device):
    """x on the device, without the host waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def to_tensor(images):
    """uint8 (N, H, W, 3), array or tensor -> tensor (N, 3, H, W)."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.require(images, requirements=("C", "W")))
    return images.permute(0, 3, 1, 2)


CIFAR10 = dict(url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", md5="c32a1d4ab5d03f1284b67883e8d87530")


def download(url, path, md5):
    """Fetch url to path: progress bar, taken up again where it broke off, checked, moved into place in one step."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            have = have if reply.status == 206 else 0  # 206: the server goes on where we stopped
            total = have + int(reply.headers.get("Content-Length", 0))
            bar = tqdm.wrapattr(reply, "read", total or None, initial=have, desc=path.name)
            with open(part, "ab" if have else "wb") as file, bar as body:
                shutil.copyfileobj(body, file)
        if part.stat().st_size < total:
            raise OSError("the connection broke off")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: the part is the whole file already
            raise Problem(f"{url}: {error}; run again to go on, or fetch it by hand into {path.parent}") from None
    if (found := hashlib.md5(part.read_bytes()).hexdigest()) != md5:
        part.unlink()
        raise Problem(f"{url}: MD5 {found}, expected {md5}; the file was removed, run again")
    os.replace(part, path)


def load_cifar10(folder):
    """The 50,000 training and 10,000 test images of the official binary archive, or its unpacked files, in `folder`."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    unpacked = [f for f in (folder, folder / "cifar-10-batches-bin") if all((f / name).is_file() for name in names)]
    source = unpacked[0] if unpacked else folder if folder.is_file() else folder / "cifar-10-binary.tar.gz"
    if not source.exists():
        download(CIFAR10["url"], source, CIFAR10["md5"])
    try:
        if unpacked:
            content = b"".join((source / name).read_bytes() for name in names)
        else:
            with tarfile.open(source) as tar:
                content = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
        images = np.frombuffer(content, np.uint8).reshape(60_000, 3073)[:, 1:]  # the first byte is the label
    except (tarfile.TarError, KeyError, EOFError, OSError, ValueError, zlib.error) as error:
        raise Problem(f"{source}: not the CIFAR-10 binary archive ({error})") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_image(file, size=None, celeba=False, exact=False):
    """The image in a file (pathlib.Path or zipfile.Path) as RGB, uint8 (H, W, 3). Raises Problem.

    All of Pillow's formats and modes: 16 bits are scaled, transparency goes over white, EXIF rotation is applied.
    size: (H, W), to which a centre crop of that aspect is resized. celeba: first the paper's crop of an aligned image
    (218 high, 178 wide): 25 left and right, 50 top, 40 bottom. exact: refuses what would lose something as 8-bit RGB.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            deep = ";16" in str(image.tile)  # 16-bit RGB, which Pillow opens as 8-bit RGB
            other = deep or image.mode not in ("RGB", "L") or image.has_transparency_data
            if exact and (other or getattr(image, "n_frames", 1) > 1):
                raise Problem(f"{image.mode} image, expected a single one, of 8-bit RGB or gray without transparency")
            image = ImageOps.exif_transpose(image)
        if celeba:
            if image.size != (178, 218):
                raise Problem(f"{image.height}x{image.width} (height x width), expected CelebA's aligned 218x178")
            image = image.crop((25, 50, 153, 178))
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, np.float64)
            top = values.max(initial=0)  # I and F do not tell their range
            scale = 257 if "16" in image.mode or top > 255 else 1 / 255 if image.mode == "F" and top <= 1 else 1
            image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        if size:
            if image.height < size[0] or image.width < size[1]:
                raise Problem("{}x{} is smaller than --size {}x{} (height x width)".format(*image.size[::-1], *size))
            image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
        return np.array(image)
    except UnidentifiedImageError:  # its text shows a Python object
        raise Problem(f"{file}: not an image that Pillow can read") from None
    except Exception as error:  # Pillow and zipfile raise many kinds
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Problem(f"{file}: {reason}") from None


def bar_of(iterable=None, unit="pixel", delay=0.3, **options):
    """A progress bar of tqdm's, which is imported when it is needed."""
    from tqdm import tqdm

    return tqdm(iterable, unit=unit, unit_scale=unit == "pixel", delay=delay, **options)


def read_images(kind, sources, size):
    """The images in the sources, folders (searched recursively) or zip files, as uint8 (N, H, W, 3); see read_image.

    They are decoded once, with all cores, into a memory-mapped file in $XDG_CACHE_HOME/pixelaux (~/.cache/pixelaux);
    its name depends on kind ("celeba" or "folder") and on the files' names, sizes and dates. Files that cannot be read
    are named and skipped.
    """
    from PIL import Image

    files, broken, known = [], [], Image.registered_extensions()
    expected = "expected a folder or a zip file of images" if kind == "folder" else (
        "expected img_align_celeba.zip or its JPEGs (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)")
    for source in sources:
        try:
            archive = None if source.is_dir() else zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise Problem(f"{source}: {getattr(error, 'strerror', error)}; {expected}") from None
        inside = [zipfile.Path(archive, member) for member in archive.namelist()] if archive else source.rglob("*")
        files += [f for f in inside if f.suffix.lower() in known and f.is_file()]
    if not files:
        raise Problem(f"{sources[0]}: no image files there; {expected}")

    def read(file):
        try:
            return read_image(file, size, kind == "celeba").tobytes()
        except Problem as error:
            broken.append(str(error))
            return b""

    def decode(out):
        with multiprocessing.pool.ThreadPool() as pool:  # by 1,024 files, lest decoding run ahead of the disk
            images = (x for i in range(0, len(files), 1024) for x in pool.imap(read, files[i : i + 1024]))
            out.writelines(bar_of(images, "image", 0, desc=f"decoding {kind}", total=len(files)))
        for line in broken[:10] + [f"{len(broken) - 10} more files"] * (len(broken) > 10):
            print(f"pixelaux: skipped {line}", file=sys.stderr)
        if len(broken) == len(files):
            raise Problem(f"none of the {len(files)} image files could be read; the first: {broken[0]}")

    files.sort(key=lambda file: (file.name, str(file)))
    on_disk = [f for f in [*sources, *files] if isinstance(f, pathlib.Path) and f.is_file()]
    stamp = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in on_disk])
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pixelaux"
    path = cache / f"{kind}-{size[0]}x{size[1]}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.bytes"
    if not path.exists():
        write_atomically(path, decode)
    return np.memmap(path, np.uint8, "r").reshape(-1, *size, 3)


def read_npy(path, channels=(1, 3)):
    """uint8 (N, H, W, C) of a .npy file that holds it, or (N, C, H, W)."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Problem(f"{path}: {error}") from None
    if images.ndim == 4 and images.shape[1] in channels and images.shape[3] not in channels:
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in channels or not len(images):
        raise Problem(f"{path}: {images.dtype} {images.shape}, expected uint8 (N, H, W, C), C in {channels}")
    return images


def load_data(spec, folder, size=None):
    """spec: "shapes", "cifar10", "celeba", "folder:PATH" or a .npy file -> (Dataset, (H, W)). Raises Problem.

    Images that come without a test set give a random 5% to it, by a fixed seed: the share is the paper's (Sec. 4.2),
    which states no seed; ours is 0.
    """
    folder = pathlib.Path(folder)
    if spec == "shapes":
        shapes = Shapes(size or (16, 16))
        return Dataset(None, shapes.sample(512, [0, 20170806]), shapes=shapes), shapes.size
    if spec == "cifar10":
        if size not in (None, (32, 32)):
            raise Problem(f"CIFAR-10 images are 32x32 (height x width), not {size[0]}x{size[1]}")
        images = load_cifar10(folder)
        return Dataset(images[:50_000], images[50_000:], flip=True), (32, 32)
    if spec == "celeba":
        images = read_images("celeba", sorted(folder.glob("*.zip")) or [folder], size or (128, 128))
    elif spec.startswith("folder:") and spec != "folder:":
        images = read_images("folder", [pathlib.Path(spec.removeprefix("folder:"))], size or (64, 64))
    elif spec.endswith(".npy"):
        images = read_npy(spec, channels=(3,))
    else:
        raise Problem(f"unknown data {spec!r}: expected shapes, cifar10, celeba, folder:PATH or a .npy file")
    if size not in (None, images.shape[1:3]):
        height, width = images.shape[1:3]
        raise Problem(f"the images of {spec} are {height}x{width} (height x width), not {size[0]}x{size[1]}")
    if len(images) < 2:
        raise Problem(f"{spec}: one image only; at least 2 are needed, one of them for the test")
    order, count = permutation(0, len(images)), max(1, int(0.05 * len(images)))
    train, test = (Subset(images, np.sort(rows)) for rows in (order[count:], order[:count]))
    return Dataset(train, test, flip=not spec.endswith(".npy")), images.shape[1:3]


# --- Runs: a folder with config.json, metrics.jsonl, a checkpoint for each factor, pictures --------------------------


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
        raise Problem(f"{path}: no checkpoint; `train` writes it") from None
    except Exception as error:  # torch raises many kinds; weights_only keeps foreign files from running code
        raise Problem(f"{path}: not a pixelaux checkpoint, or a damaged one ({type(error).__name__})") from None
    if not known:
        raise Problem(f"{path}: checkpoint format {state['version']}, this program reads {VERSION}")
    return state


def load(run, device="cpu", best=False):
    """The trained model of a run (folder of `train`, or a checkpoint file) with averaged weights, or, of a folder, the
    weights that cost the test images least.

    A folder's factors, which may have been trained on different machines, are joined; a file that holds some of the
    factors only is joined with its neighbours. Raises Problem.
    """
    run, kind = pathlib.Path(run), "best" if best else "factor"
    if best and run.is_file():
        raise Problem(f"--best: {run} is a file; it goes with a folder")
    paths = sorted(run.glob(f"{kind}-*.pt")) or [run / f"{kind}-0.pt"] if run.is_dir() else [run]
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


def total(values, device):
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


def train_factor(model, k, data, out, device, resume=False, caught=(), compile=False, save_every=120.0, first=0):
    """Train factor k of model on data, or go on where its checkpoint stands; the model then has the averaged weights.

    Writes out/factor-k.pt every save_every seconds and at the end, out/best-k.pt when the test images cost less than
    ever, lines of out/metrics.jsonl, and pictures: samples of factors first..k. A run that is stopped and resumed gives
    the same weights as one that is not: batches and dropout are functions of the step. Of several processes (torchrun)
    each takes its rows of every batch, and the first one writes.
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

    levels = lambda x: [None, *model.levels_of(x)][k : k + 2][::-1]  # of factor k: [x, x_hat]
    share = lambda: min(1.0, elapsed / budget if budget else step / steps)  # of the training, done
    quarter, test = int(4 * share()), to_tensor(data.test[:128])
    loss = Loss(factor, config, model.dims, device)
    if compile and quarter < 4:
        loss = compiled(loss, *levels(data.batch(0, config.batch_size // RANKS, seed).to(device)))
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
            losses.append(update(loss, optimizer, average, config.ema if step else 0.0, *levels(next(stream))))
            step += 1
            bar.update(share() - bar.n)
            every = max(1, min(20, int(0.01 * (budget / pace if budget else steps))))
            if step % every and share() < 1 and (RANKS > 1 or not caught):
                continue
            # only here the host waits for the device and the processes agree: on losses, the first one's clock, signals
            values, now, mine = torch.stack(losses).tolist(), time.monotonic(), RANK == 0
            *values, elapsed, pace, stop = total([*(v / RANKS for v in values), mine * (now - started),
                                                  mine * (now - looked) / len(losses), len(caught)], device)
            if bad := [i for i, value in enumerate(values, step - len(values) + 1) if not math.isfinite(value)]:
                good = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
                raise ArithmeticError(f"factor {k}: the loss is not finite at step {bad[0]}; {good}")
            losses, before, quarter = [], quarter, int(4 * share())
            if RANK == 0:
                mean, speed = sum(values) / len(values), config.batch_size / pace
                record = dict(factor=k, step=step, bits_per_dim=mean, lr=lr, seconds=round(elapsed, 3),
                              images_per_second=round(speed, 1))
                if quarter > before:
                    with torch.inference_mode():
                        nats = torch.cat([average.log_prob(*levels(x.to(device)), config.tight)
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
                    show_progress(model, k, first, test, out)
            if stop and quarter < 4:
                message = f"stopped at step {step}; --resume goes on from {path}"
                raise SystemExit(130) if RANK else KeyboardInterrupt(message)
            looked = time.monotonic()


def show_progress(model, k, first, test, out):
    """Pictures during training: samples of factors first..k, which start from test images unless first is 0."""
    given = model.levels_of(test[:8].to(model.device))[first - 1] if first else None
    save_grid(model.sample(8, given=given, until=k + 1), out / "samples.png")
    save_curves(out, model.names)


# --- Evaluation and pictures -----------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, images, batch_size=None):
    """Log-probabilities of all images, uint8 (N, H, W, 3), from the same forward passes: (bound, tight), each float64
    (factors, N), nats per image, coarsest factor first."""
    model.eval()
    room = 2**30 if model.device.type == "cpu" else 2**33
    batches = to_tensor(images).split(batch_size or min(factor.at_once(room) for factor in model.factors))
    results = []
    for x in bar_of(batches, "batch", desc="evaluation"):
        levels, nats = model.levels_of(x.to(model.device)), []
        for factor, level, level_hat in zip(model.factors, levels, [None, *levels]):
            head = factor.head(level, level_hat)
            limits = factor.psi and factor.psi.bounds(level, level_hat)
            nats += [head.log_prob(level, bounds).flatten(1).sum(1) for bounds in (None, limits)]
        results.append(torch.stack(nats).double().cpu())  # (2 factors, n)
    results = torch.cat(results, 1).numpy()
    return results[::2], results[1::2]


REPORT = """\
{} test images, bits/dim. of X: bits / {}, which add up; own: bits / sub-pixels of the level; cumulative: bits of all
levels so far / sub-pixels of this one (the model stopped there: the paper's Table 2). bound: the paper's, <=; exact: =.

                            of X                     own              cumulative
factor                     bound       exact       bound       exact       bound       exact"""


def report(model, bound, tight, shapes=None, images=None, samples=None):
    """The table that `eval` prints, and the same as a dict; bound, tight: as `evaluate` returns them.

    With shapes, also the distance of images, which came from it, to their true probability, and how many of samples,
    the model's, decode; both are uint8 (N, H, W, 3).
    """
    both, n = np.stack([bound, tight]), bound.shape[1]  # (2, factors, N)
    lines, result, pair = [REPORT.format(n, model.dims)], dict(images=n, factors=[]), "{:20}{:12.4f}{:12.4f}"
    for k, factor in enumerate(model.factors):
        row, dims = dict(factor=model.names[k]), math.prod(factor.shape)
        for of, first, per in (("of_x", k, model.dims), ("own", k, dims), ("cumulative", 0, dims)):
            row[f"bound_{of}"], row[f"exact_{of}"] = bits_per_dim(both[:, first : k + 1].sum(1).mean(1), per).tolist()
        lines.append((pair + 4 * "{:12.4f}").format(*row.values()))
        result["factors"].append(dict(row, shape=factor.shape))
    bits = bits_per_dim(both.sum(1), model.dims)  # (2, N)
    means = np.random.default_rng(0).choice(bits, (1000, n), axis=1).mean(2)  # bootstrap over the images
    total, (first, second) = bits.mean(1).tolist(), np.percentile(means, [2.5, 97.5], axis=1).T.tolist()
    result |= dict(bound=total[0], exact=total[1], bound_interval=first, exact_interval=second)
    intervals = "bound [{:.4f}, {:.4f}], exact [{:.4f}, {:.4f}]".format(*first, *second)
    lines += [pair.format("total", *total), f"95% intervals over the images: {intervals if n > 1 else 'none of one'}"]
    if shapes:
        true = float(bits_per_dim(shapes.log_prob(images).mean(), model.dims))
        shape = bits_per_dim(-shapes.log_configurations, model.dims)
        excess = [model.dims * (bits - true) for bits in total]
        result |= dict(true=true, bound_excess_bits=excess[0], exact_excess_bits=excess[1],
                       decodable=float(shapes.decodable(samples).mean()))
        lines += [f"{pair.format('true p(X)', true, true)}  the limit; {shape:.4f} of it are the shape, the rest noise",
                  "excess over the true p(X): bound {:.1f}, exact {:.1f} bits per image".format(*excess),
                  f"samples whose shape decodes: {result['decodable']:.0%} of {len(samples)}"]
    return "\n".join(lines), result


def to_array(images):
    """Tensor (N, C, H, W) -> array (N, H, W, C)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def image_file(images, columns=1, value=0, **how):
    """One picture of images, uint8 (N, H, W, 3), row by row, `value` where none is left: bytes of a PNG, or see how."""
    from PIL import Image

    n, h, w, _ = images.shape
    images = np.pad(images, [(0, -n % columns), (0, 0), (0, 0), (0, 0)], constant_values=value)
    pixels = images.reshape(-1, columns, h, w, 3).swapaxes(1, 2).reshape(-1, columns * w, 3)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), **{"format": "PNG", **how})
    return buffer.getvalue()


def save_grid(levels, path, columns=8, tile=64):
    """A PNG with a row for each level (coarsest first) of every `columns` images; levels: [uint8 (N, C, H, W)].

    Every image is shown as high as X, or some `tile` pixels if that is more, by repetition of its pixels.
    """
    size = [max(1, tile // levels[-1].shape[2]) * side for side in levels[-1].shape[2:]]
    shown = [F.interpolate((level if level.shape[1] == 3 else 17 * level.expand(-1, 3, -1, -1)).cpu(), size)
             for level in levels]
    images = to_array(torch.cat([F.pad(image, (2, 2, 2, 2), value=255) for image in shown], 2))  # levels under levels
    write_atomically(path, image_file(images, min(columns, len(images)), 255))


def save_curves(out, names):
    """OUT/curves.png: bits/dim of X by time, a panel for each factor, from OUT/metrics.jsonl. names: of the factors."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    factors = sorted({line["factor"] for line in lines})
    figure = Figure(figsize=(4.5 * len(factors), 3.2), layout="tight")
    for axis, k in zip(figure.subplots(1, len(factors), squeeze=False)[0], factors):
        mine = [line for line in lines if line["factor"] == k]
        shown = mine[len(mine) // 10 :]  # it starts too high
        for key, style, label in (("bits_per_dim", "-", "training batches"),
                                  ("test_bits_per_dim", "o-", "test images, averaged weights")):
            points = [(line["seconds"] / 60, line[key]) for line in shown if key in line]
            axis.plot(*np.array(points).reshape(-1, 2).T, style, lw=1, ms=4, label=label)
        minutes = f"minutes ({mine[-1]['step']:,} steps)"
        axis.set(title=f"factor {k}: {names[k]}", xlabel=minutes, ylabel="bits/dim of X")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    write_atomically(out / "curves.png", lambda file: figure.savefig(file, dpi=110, format="png"))


# --- Command line ----------------------------------------------------------------------------------------------------


def run_to_train(args, out):
    """(config, data) of a new run in folder out, or of the one there that goes on. Raises Problem."""
    chosen = {key: value for key, value in vars(args).items() if key in Config.__annotations__ and value is not None}
    if args.steps and args.budget:
        raise Problem("--steps and --budget exclude each other")
    if args.steps:
        chosen["steps"] = (args.steps, args.steps)
    if args.budget:
        chosen["anneal"] = True  # a run of any length ends annealed
    what, pattern = ("a run", "*") if args.factor is None else (f"factor {args.factor}", args.factor)
    settings, there = out / "config.json", any(out.glob(f"factor-{pattern}.pt"))
    if not args.resume and (there or (args.factor is None and settings.exists())):
        raise Problem(f"--out: {out} already holds {what}; --resume goes on with it, another folder begins anew")
    if not args.resume and not settings.exists():
        if args.size:  # one that does not fit is refused before images are decoded for it
            with torch.device("meta"):
                PixelAux(make_config(**chosen))
        data, chosen["size"] = load_data(args.data or "shapes", args.data_dir or "data", args.size)
        return make_config(**chosen), data
    try:
        config = make_config(**json.loads(settings.read_text()))
    except FileNotFoundError:
        raise Problem(f"--resume: {out} holds no run") from None
    except (ValueError, TypeError) as error:
        raise Problem(f"{settings}: not a configuration of pixelaux ({error})") from None
    for key in chosen.keys() - {"budget", "anneal", "data_dir"}:
        if (old := getattr(config, key)) != chosen[key]:
            raise Problem(f"--{key.replace('_', '-')}: {out} was begun with {old}, not {chosen[key]}; leave this flag "
                          "out to go on there, or choose another folder")
    return dataclasses.replace(config, **chosen), load_data(config.data, config.data_dir, config.size)[0]


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = pathlib.Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)|$", cpu.read_text() if cpu.exists() else "")[1] or platform.processor()
    return f"{torch.get_num_threads()} threads of {name}"


def command_train(args):
    device = args.device
    if RANKS == 1:
        return train(args, device)
    if device.type == "cuda":
        torch.cuda.set_device(device := torch.device("cuda", LOCAL_RANK))
    patience = datetime.timedelta(hours=3)  # while one process downloads or decodes the data
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        train(args, device)
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        message = f"pixelaux: process {RANK} lost another one; --resume goes on from the last checkpoint"
        raise SystemExit(message) from None  # which prints it, with status 1
    torch.distributed.destroy_process_group()


def train(args, device):
    name = f"{args.model or 'pyramid'}-{pathlib.Path((args.data or 'shapes').split(':')[0]).stem}"
    out = pathlib.Path(args.out or f"runs/{name}")
    for first in (True, False):  # process of a machine: it prepares the data; nobody writes before all have looked
        if first == (LOCAL_RANK == 0):
            config, data = run_to_train(args, out)
        total([0.0], device)
    model, k = PixelAux(config), args.factor
    if config.start:
        start = load(config.start)
        try:
            model.load_state_dict(start.state_dict())
        except RuntimeError:
            keys = itertools.takewhile(lambda key: key != "dropout", vars(config))  # what shapes the networks
            both = [(key, getattr(start.config, key), getattr(config, key)) for key in keys if key != "preset"]
            differ = [f"{key} {old}, not {new}" for key, old, new in both if old != new]
            raise Problem(f"--start: {config.start} is of another model: {'; '.join(differ)}") from None
    if k is not None and not 0 <= k < len(model.factors):
        raise Problem(f"--factor {k}: the model has factors 0..{len(model.factors) - 1}")
    if isinstance(config.budget, tuple) and len(config.budget) != len(model.factors):
        raise Problem(f"--budget: {len(config.budget)} numbers, the model has {len(model.factors)} factors")
    if config.batch_size % RANKS:
        raise Problem(f"--batch-size {config.batch_size} cannot be divided among {RANKS} processes")
    model = model.to(device, memory_format=torch.channels_last)
    data.keep_on(device)
    if RANK == 0:
        if len(data.test) < 32:
            print(f"pixelaux: warning: {len(data.test)} test images only: bits/dim. will be rough", file=sys.stderr)
        for part in out.glob("part-*" if k is None else f"part-*-{k}.pt"):  # of a run that was killed while it wrote
            part.unlink()
        write_atomically(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
        made = dict(time=time.strftime("%F %T"), command=shlex.join(["pixelaux.py", *sys.argv[1:]]), processes=RANKS,
                    hardware=hardware(device), torch=torch.__version__)
        with open(out / "commands.jsonl", "a") as file:
            file.write(json.dumps(made) + "\n")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    compile = device.type == "cuda" if args.compile is None else args.compile
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set signals
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    before = [signal.signal(number, lambda number, frame: caught.append(number)) for number in numbers]
    try:  # signals are only noted, so that a step is never cut in two
        for j in range(len(model.factors)) if k is None else [k]:
            train_factor(model, j, data, out, device, args.resume, caught, compile, args.save_every, k or 0)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if RANK:
        return
    save_curves(out, model.names)
    if k is not None:
        return print(f"factor {k} is in {out / f'factor-{k}.pt'}")
    few = data.test[:256]
    samples = model.sample(16 if data.shapes else 8, seed=config.seed, tight=config.tight)
    save_grid(samples, out / "samples.png")
    text, _ = report(model, *evaluate(model, few), data.shapes, few, to_array(samples[-1]))
    print(f"{text}\n\nsamples at every stage: {out / 'samples.png'}   curves: {out / 'curves.png'}\n"
          f"next: python pixelaux.py eval {out}   python pixelaux.py sample {out}{' --tight' * config.tight}")


def run_data(args, model):
    """The data that a run was trained on, or what --data and --data-dir say."""
    config = model.config
    return load_data(args.data or config.data, args.data_dir or config.data_dir, config.size)[0]


def result_path(args, kind, more):
    """Path of a result, without its ending; the name tells other weights, data and flags than the run's own."""
    own = ["best"] * args.best if args.run.is_dir() else [args.run.stem]
    words = [kind, *own, *([pathlib.Path(args.data).stem] if args.data else []), *(word for word in more if word)]
    return (args.run if args.run.is_dir() else args.run.parent) / "-".join(words)


def command_eval(args):
    if args.coded:
        import constriction  # noqa: F401  if it is missing, say so before the evaluation
    model = load(args.run, args.device, args.best)
    data = run_data(args, model)
    images = data.test[: args.n]
    bound, tight = evaluate(model, images, args.batch_size)
    samples = to_array(model.sample(64, args.seed or 0, tight=bool(args.tight))[-1]) if data.shapes else None
    text, result = report(model, bound, tight, data.shapes, images, samples)
    if args.coded:
        more, result["coded"] = coded(model, images[: args.coded], tight.sum(0)[: args.coded])
        text += "\n" + more
    print(text)
    path = result_path(args, "eval", [args.n and str(args.n)])  # eval.json: the last weights, all images
    write_atomically(f"{path}.json", json.dumps(result, indent=1).encode())


def coded(model, images, nats, tight=True):
    """Code and restore images, uint8 (N, H, W, 3): bits/dim beside -log2 p (nats: (N,)), PNG and WebP; text, dict."""
    n, bits, chunk = len(images), 0, min(64, *(factor.at_once() for factor in model.factors))
    with bar_of(total=2 * n * sum(h * w for _, h, w in model.shapes), desc="coding") as bar:
        for start, x in zip(range(0, n, chunk), to_tensor(images).split(chunk)):
            words = compress(model, x, tight, bar.update)
            if not torch.equal(decompress(model, words, tight, bar.update).cpu(), x):
                raise Problem(f"images {start}..{start + len(x) - 1} were not restored: no two runs here round alike")
            bits += 32 * sum(map(len, words))
    rate, ideal = bits / (n * model.dims), float(bits_per_dim(nats.mean(), model.dims))
    result = dict(images=n, coded=rate, ideal=ideal)
    lines = [f"{n} images coded and restored bit for bit: {rate:.4f} bits/dim; -log2 p {ideal:.4f} "
             f"({100 * (rate / ideal - 1):+.3f}%, {(rate - ideal) * model.dims:.1f} bits an image)"]
    for name, how in (("PNG", dict(format="PNG", optimize=True)),
                      ("lossless WebP", dict(format="WEBP", lossless=True, quality=100, method=6))):
        single = sum(len(image_file(image[None], **how)) for image in images)
        together = len(image_file(images, math.ceil(math.sqrt(n)), **how))
        single, together = result[name] = [8 * size / (n * model.dims) for size in (single, together)]
        lines.append(f"{name}: {single:.4f} bits/dim, as one mosaic of all {together:.4f}")
    return "\n".join(lines), result


def command_codec(args):
    """compress: IMAGE -> NAME.pxa; decompress: NAME.pxa -> NAME.png. Nothing is overwritten."""
    model, packing = load(args.run, args.device, args.best), args.command == "compress"
    for check, path in itertools.product((True, False), map(pathlib.Path, args.files)):  # all, before one is written
        target = pathlib.Path(args.out or path.parent) / f"{path.stem}.{'pxa' if packing else 'png'}"
        content = to_tensor(read_image(path, exact=True)[None])[0] if packing else path.read_bytes()
        try:
            if not packing and path.suffix.lower() != ".pxa":
                raise Problem("expected a .pxa file")
            if target.exists():
                raise Problem(f"{target} exists already; --out FOLDER writes elsewhere")
            fitting = resized(model, content.shape[1:]) if packing else model
            if check:
                continue
            total = sum(h * w for _, h, w in fitting.shapes) if packing else None
            with bar_of(desc=path.name, total=total) as bar:
                if packing:
                    x, file = content, pack(fitting, content, args.tight, bar.update)
                else:
                    x = unpack(model, content, bar.update)
                    file = image_file(to_array(x[None]))
        except Problem as error:
            raise Problem(f"{path}: {error}") from None
        write_atomically(target, file)
        rate = f", {8 * len(file) / x.numel():.3f} bits/dim" if packing else ""
        print(f"{target}: height {x.shape[1]}, width {x.shape[2]}, {len(file)} bytes{rate}")


def command_export(args):
    model = load(args.run, best=args.best)
    if os.path.exists(args.file) and "training" in read_checkpoint(args.file):  # Problem if it is something else
        raise Problem(f"{args.file}: a checkpoint of training, which is not overwritten; choose another name")
    factors = {k: {name: weight.bfloat16() for name, weight in factor.state_dict().items()}
               for k, factor in enumerate(model.factors)}
    write_checkpoint(args.file, model.config, factors)
    print(f"{args.file}: {sum(p.numel() for p in model.parameters()):,} weights, {os.path.getsize(args.file):,} bytes")


def given_images(args, model):
    """Images for --given: of a level's own size as they are, of X's size through the chain down to --level."""
    if args.given == "test":
        x = run_data(args, model).test
    elif args.given.endswith(".npy"):
        x = read_npy(args.given)
    else:
        x = read_image(pathlib.Path(args.given))[None].repeat(args.n, 0)
    x = to_tensor(x[: args.n])
    if tuple(x.shape[1:]) == model.shapes[0]:
        if not 1 <= args.level <= len(model.chain):
            raise Problem(f"--level {args.level}: the model has {len(model.chain)} levels below X")
        x = model.levels_of(x)[len(model.chain) - args.level]
    return x


def command_sample(args):
    if args.shift and args.mode == "map":
        raise Problem("--shift: --mode map draws no values, so there is no variance to change; leave one of them out")
    model, seed, tight = load(args.run, args.device, args.best), args.seed or 0, bool(args.tight)
    given = given_images(args, model) if args.given else None
    n, shape = (args.n, None) if given is None else (len(given), tuple(given.shape[1:]))
    sampled = itertools.takewhile(lambda level: level != shape, model.shapes)
    with bar_of(total=n * sum(h * w for _, h, w in sampled)) as bar:
        levels = model.sample(n, seed, args.mode, args.shift, tight, given, not args.naive, bar.update)
    more = [args.shift and f"shift{args.shift:g}", args.given and "given", tight and "tight"]
    out = str(args.out or result_path(args, f"sample-{args.mode}-{seed}", more))
    save_grid(levels, f"{out}.png")
    arrays = {f"level{i}": to_array(level) for i, level in enumerate(levels[::-1])}
    write_atomically(f"{out}.npz", lambda file: np.savez(file, **arrays))
    print(f"{out}.png: a row for each level, coarsest first; {out}.npz: "
          f"{', '.join(f'{k} {v.shape}' for k, v in arrays.items())}, uint8, level0 is X")


def plain(factor):
    """A copy of a factor as people usually write it: NCHW, every activation where it is used, padding by copy, torch's
    stock weight norm."""
    def forward(conv, activation, x, size):
        (kh, kw), (oy, ox) = conv.kernel, conv.offset
        x = F.dropout(activation(x.contiguous()), conv.dropout, conv.training)
        weight = torch._weight_norm(conv.v, conv.g.view(-1, 1, 1, 1), 0)
        if conv.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), conv.b, 2)
            return x[:, :, oy : oy + size[0], ox : ox + size[1]]
        return F.conv2d(F.pad(x, (ox, kw - 1 - ox, oy, kh - 1 - oy)), weight, conv.b, conv.stride)

    factor = copy.deepcopy(factor).to(memory_format=torch.contiguous_format)
    for conv in factor.modules():
        if isinstance(conv, Conv):
            conv.forward = functools.partial(forward, conv, ACTIVATIONS[conv.activation])
            conv.activation = "none"  # for Network.forward
    return factor


def seconds(function, device, repeat=4):
    """Wall-clock time of the best of `repeat` calls; the first one warms up."""
    wait = torch.get_device_module(device).synchronize
    wait(device)
    return min(timeit.repeat(lambda: (function(), wait(device)), number=1, repeat=repeat))


def command_bench(args):
    if args.what == "sample" and (args.precision or args.compile is not None):
        raise Problem("--precision and --compile are for bench train; sampling is float32 and not compiled")
    print(f"torch {torch.__version__}, {hardware(args.device)}, seed {args.seed or 0}")
    (bench_train if args.what == "train" else bench_sample)(args, args.device)


def bench_train(args, device):
    """A training step of each factor, ours and a `plain` one, and how much of the device's peak it uses."""
    from resource import RUSAGE_SELF, getrusage

    from torch.utils.flop_counter import FlopCounterMode

    model = build(args.model or "pyramid", args.size or 32, args.preset or "tiny", args.seed or 0,
                  precision=args.precision or "auto").to(device, memory_format=torch.channels_last)
    config, cuda = model.config, device.type == "cuda"
    n, many, side = args.batch_size or config.batch_size, 10 if cuda else 1, 8192 if cuda else 2048
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    x = torch.randint(256, (n, *model.shapes[0]), dtype=torch.uint8, device=device)
    model.initialise(x)
    levels, bfloat16 = model.levels_of(x), Loss(None, config, 1, device).bfloat16
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    peak = 2 * side**3 / seconds(lambda: a @ a, device)
    print(f"training steps (gradient and Adam) of a batch of {n}, model {config.model}, preset {config.preset}; plain: "
          "float32 (TF32 on CUDA), NCHW,\npadding by copy, stock weight norm. Peak: a product of two matrices of "
          f"{side}x{side} in {a.dtype}, {peak / 1e12:.3g} TFLOP/s.\nMemory: the largest so far\n"
          "factor    images/s: ours     plain    ratio    GFLOP/image    TFLOP/s    of peak    GiB")

    def timed(loss, factor, **options):
        adam, average = torch.optim.Adam(factor.parameters(), config.lr, config.betas, **options), copy.deepcopy(factor)
        return seconds(lambda: [update(loss, adam, average, 0.9, *batch) for _ in range(many)], device) / many

    for k, factor in enumerate(model.factors):
        loss, batch = Loss(factor, config, model.dims, device), (levels[k], levels[k - 1] if k else None)
        with FlopCounterMode(display=False) as counter:
            loss(*batch).backward()
        if args.compile or (args.compile is None and cuda):
            loss = compiled(loss, *batch)
        if cuda:
            loss(*batch).backward()  # cuDNN tries its algorithms here
            torch.cuda.reset_peak_memory_stats(device)
        ours, work = timed(loss, factor, fused=True), counter.get_total_flops()
        memory = torch.cuda.max_memory_allocated(device) if cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        loss = Loss(plain(factor), dataclasses.replace(config, precision="float32"), model.dims, device)
        torch.backends.cudnn.allow_tf32 = True  # torch's default
        theirs = timed(loss, loss.factor)
        torch.backends.cudnn.allow_tf32 = False
        print(f"{k:<10}{n / ours:14.1f}{n / theirs:10.1f}{theirs / ours:9.2f}{work / n / 1e9:15.2f}"
              f"{work / ours / 1e12:11.3g}{work / ours / peak:11.0%}{memory / 2**30:7.2f}", flush=True)


@torch.no_grad()
def bench_sample(args, device):
    """The sampler of the finest factor beside its forward pass, and the pyramid's whole chain."""
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 16 * 2**30
    cases = [("pyramid", "celeba", 128, {}), ("pixelcnn", "cifar10", 32, dict(nr_resnet=5))]
    print("the finest factor alone, f_w included, float32, random weights; pass: a teacher-forced pass of the batch;\n"
          "naive: a pass for every pixel, of which one is timed\n"
          "network                       batch   steps  s/image: naive    fast    pass  us/pixel  fast/pass naive/fast")
    for name, preset, side, extra in [(args.model, "tiny", 32, {})] if args.model else cases:
        (h, w), preset = args.size or (side, side), args.preset or preset
        model = build(name, (h, w), preset, args.seed or 0, **extra).to(device, memory_format=torch.channels_last)
        factor, label = model.eval().factors[-1], f"{name}, {preset}, {h}x{w}"
        for n in [args.batch_size] if args.batch_size else (1, 16, 64):
            if factor.at_once(room) < n:
                print(f"{label:30}{n:5}  left out: needs more than {room / 2**30:.0f} GiB")
                continue
            x = torch.randint(256, (n, *model.shapes[0]), dtype=torch.uint8, device=device)
            x_hat = model.levels_of(x)[-2] if model.chain else None
            draw = Draw(torch.rand(n, h * w, 2 * factor.shape[0], dtype=torch.float64, device=device))
            steps = len(Decoder(factor, n, x_hat).schedule.steps)
            turns = [(seconds(lambda: factor.head(x, x_hat), device, 2),
                      seconds(lambda: Decoder(factor, n, x_hat).run(draw), device, 1))
                     for _ in range(3 if n < 4 else 2)]  # in turn, as the machine may be shared
            forward, fast = np.min(turns, 0) / n
            print(f"{label:30}{n:5}{steps:8}{forward * h * w:16.1f}{fast:8.3f}{forward:8.3f}{fast / h / w * 1e6:10.1f}"
                  f"{fast / forward:11.2f}{forward * h * w / fast:11.0f}", flush=True)
        if name == "pyramid":
            chain = seconds(lambda: model.sample(1), device, 2)
            print(f"{label:30}    1  the whole chain, f_w included: {chain:.2f} s")
    print("for reference: the paper 4,000 us/pixel (Titan X, no caching), PixelCNN++ 50,000 (caching, as it quotes)")


def checked(kind, expected, valid):
    """A type for argparse: kind(text), which must be valid; the error tells what was expected."""
    def parse(text):
        with contextlib.suppress(ValueError, RuntimeError, AssertionError, NotImplementedError):
            if valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message):
        self.exit(2, f"pixelaux: {message}; see {self.prog} --help\n")


def parser():
    top = Parser(prog="pixelaux.py", description="PixelCNN models with auxiliary variables (Kolesnikov & Lampert 2017)")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, function, text in (("train", command_train, "train all factors of a model in turn, or one of them"),
                                 ("eval", command_eval, "bits/dim on the whole test set, by factor and resolution"),
                                 ("sample", command_sample, "a picture of samples, and the arrays"),
                                 ("compress", command_codec, "images, losslessly, into .pxa files"),
                                 ("decompress", command_codec, ".pxa files into PNG files"),
                                 ("export", command_export, "all factors in one small file, weights in bfloat16"),
                                 ("bench", command_bench, "speed, beside plain implementations in one process")):
        commands.add_parser(name, help=text, description=text).set_defaults(function=function)

    def add(names, flag, text=None, **options):
        for name in names.split():
            commands.choices[name].add_argument(flag, help=text, **options)

    count = checked(int, "a whole number above 0", lambda value: value > 0)
    number = checked(float, "a number above 0", lambda value: 0 < value < math.inf)
    size = checked(lambda text: tuple(map(int, text.lower().split("x"))) * (2 if text.isdecimal() else 1),
                   "SIDE or HEIGHTxWIDTH, such as 32 or 48x64", lambda sides: len(sides) == 2 and min(sides) > 0)
    budget = checked(lambda text: tuple(map(float, text.split(","))) if "," in text else float(text),
                     "minutes above 0, such as 10 or 6,14,40", lambda every: 0 < np.min(every) <= np.max(every) < 1e9)
    seed = checked(int, "0..2147483648", lambda value: 0 <= value <= 2**31)
    device = checked(torch.device, "cpu or cuda, as available here", lambda value: torch.ones(1, device=value).item())
    best = f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu"
    flag, yes_no = dict(action="store_true", default=None), dict(action=argparse.BooleanOptionalAction)

    add("eval sample compress decompress export", "run", "output folder of train, or a checkpoint file", metavar="RUN",
        type=pathlib.Path)
    add("eval sample compress decompress export", "--best", "of a folder, best-K.pt in place of factor-K.pt",
        action="store_true")
    add("compress decompress", "files", "images, or .pxa files", nargs="+", metavar="FILE")
    add("export", "file", "to write", metavar="FILE")
    add("bench", "what", choices=("train", "sample"))
    add("train bench", "--model", "default pyramid", choices=MODELS)
    add("train bench", "--preset", "tiny: minutes on a laptop (default); small: an hour; cifar10, celeba: the paper's",
        choices=PRESETS)
    add("train eval sample", "--data", "shapes, cifar10, celeba, folder:PATH, FILE.npy (default: shapes, or the run's)")
    add("train eval sample", "--data-dir", "where cifar10 or celeba lie or go (default: data)", metavar="FOLDER")
    add("train bench", "--size", "side of X, or HEIGHTxWIDTH (default: the data's; folder: 64)", type=size)
    add("train eval bench", "--batch-size", type=count)
    add("train", "--out", "folder of the run (default: runs/MODEL-DATA)", metavar="RUN")
    add("train", "--resume", "go on with the run in --out", **flag)
    add("train", "--start", "begin with the weights of this run or checkpoint", metavar="RUN",
        type=checked(str, "a run or a checkpoint", len))
    add("train", "--factor", "train factor K alone, 0 is the coarsest", type=int, metavar="K")
    add("train", "--steps", "for each factor (default: the preset's)", type=count)
    add("train", "--budget", "for each factor, in place of --steps; 6,14,40: one number a factor, coarsest first",
        type=budget, metavar="MINUTES")
    add("train", "--save-every", "default 120", type=number, default=120.0, metavar="SECONDS")
    add("train bench", "--precision", "of the networks (default: bfloat16 on CUDA)", choices=("float32", "bfloat16"))
    add("train bench", "--compile", "torch.compile (default: on CUDA)", **yes_no)
    add("train", "--lr", "learning rate of Adam (default: the preset's)", type=number)
    add("train", "--tight", "train the exact likelihood in place of the bound", **flag)
    add("eval sample", "--tight", "samples from the model conditioned on psi(x) = x_hat", **flag)
    add("compress", "--tight", "with the exact likelihood (default), or the paper's", default=True, **yes_no)
    add("train", "--look-right", "no: pyramid networks see up and left only, a third of the steps to sample", **yes_no)
    add("eval", "--n", "the first N test images only (default: all)", type=count)
    add("eval", "--coded", "code the first N images, restore them, compare with PNG and WebP", type=count, metavar="N")
    add("sample", "--n", "how many images (default 16)", type=count, default=16)
    add("sample", "--mode", "map: the paper's MAP sampling", choices=("random", "map"), default="random")
    add("sample", "--shift", "added to the log-scales; below 0: less variance (map has none)", default=0.0,
        type=checked(float, "a finite number", math.isfinite))
    add("sample", "--given", "start from these, of a level's size or X's: test, an image file or a .npy file")
    add("sample", "--level", "that --given of X's size are reduced to: 1 (default) is next to X", type=int, default=1)
    add("sample", "--naive", "the plain sampler, a full pass for every pixel: the oracle", **flag)
    add("sample", "--out", "writes NAME.png and NAME.npz (default: in the run's folder)", metavar="NAME")
    add("compress decompress", "--out", "for the results (default: beside the files)", metavar="FOLDER")
    add("train eval sample bench", "--seed", "of everything random, 0..2^31 (default 0)", type=seed)
    add(" ".join(commands.choices), "--device", "cpu, cuda, cuda:1 (default: cuda, if any)", type=device, default=best)
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        args.function(args)
        return 0
    except (Problem, ArithmeticError, OSError, ImportError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted"
        if isinstance(error, ImportError):
            message = f"{error.name} is not installed: pip install -r requirements.txt"
        elif isinstance(error, OSError):
            message = f"{error.filename or 'output'}: {error.strerror or error}"
        print(f"pixelaux: {message}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1 if isinstance(error, ArithmeticError) else 2


if __name__ == "__main__":
    sys.exit(main())
