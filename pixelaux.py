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

Where we deviate from the paper, or the paper is silent, the docstring concerned says so.
Units: log-probabilities are natural logarithms (nats); bits/dim are bits per sub-pixel of X.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import signal
import sys
import time
import typing

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VERSION = 1  # of the checkpoint format


class Problem(ValueError):
    """Something the user can put right; the command line prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


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
    budget: float = 0.0  # minutes for each factor in place of steps; 0: none
    lr: float = 1e-3
    lr_decay: float = 0.99999  # factor on the learning rate after each step
    anneal: bool = False  # also bring the learning rate linearly to 0 at the end
    betas: tuple = (0.95, 0.9995)  # of Adam, PixelCNN++'s
    ema: float = 0.9995  # decay of the moving average of the weights, PixelCNN++'s
    seed: int = 0


PRESETS = {
    "tiny": dict(nr_filters=32, nr_resnet=1, nr_resnet_cond=1, embedding=(1, "down", 2, "up", 1, "up", 1), dropout=0.0,
                 batch_size=16, steps=(600, 600), lr=4e-3, lr_decay=1.0, anneal=True, betas=(0.9, 0.99), ema=0.98),
    "small": dict(nr_filters=64, nr_resnet=2, nr_resnet_cond=2, embedding=(2, "down", 3, "up", 2, "up", 2), dropout=0.0,
                  batch_size=32, steps=(4000, 4000), lr=2e-3, lr_decay=1.0, anneal=True, betas=(0.9, 0.99), ema=0.995),
    "cifar10": dict(),
    "celeba": dict(nr_filters=100, batch_size=16, epochs=(60, 60), lr_decay=0.999995),
}


# ---------------------------------------------------------------------------------------------------------------------
# psi: deterministic auxiliary variables
# ---------------------------------------------------------------------------------------------------------------------


def feasible(values, weights, low, high, top):
    """Intervals that are left for v_1, v_2, .. in 0..top, each given those before it, when low <= sum w_j v_j <= high.

    values: int64 (..., J); weights: J positive ints; low, high: int64 (...). Returns lo, hi: int64 (..., J), inclusive.
    """
    lo, hi, rest = [], [], top * sum(weights)  # rest: the most that the sub-pixels to come can add
    for value, weight in zip(values.unbind(-1), weights):
        rest -= weight * top
        lo.append(-((rest - low) // weight))  # ceil((low - rest) / weight)
        hi.append(high // weight)
        low, high = low - weight * value, high - weight * value
    return torch.stack(lo, -1).clamp(0, top), torch.stack(hi, -1).clamp(0, top)


class Half:
    """X^ = half-resolution view (Sec. 3.2): (sum of each 2x2 block + 2) // 4 in each channel, uint8.

    The paper resizes every level from the full image; here each level is a function of the level above it, so that
    the chain is one of functions.
    """

    cell, light = 2, True  # side of the block of X that a pixel of X^ stands for; which causal network goes with it

    def __init__(self, levels=256):
        self.levels = self.levels_out = levels

    def shape(self, c, h, w):
        return c, h // 2, w // 2

    def __call__(self, x):
        """x: uint8 (N, C, H, W) -> uint8 (N, C, H/2, W/2)."""
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).int()
        return ((blocks.sum((3, 5)) + 2) // 4).to(torch.uint8)

    def bounds(self, x, x_hat):
        """Inclusive feasible interval (lo, hi), int64 (N, C, H, W), of each sub-pixel given x_hat and those before it."""
        n, c, h, w = x.shape
        blocks = x.long().reshape(n, c, h // 2, 2, w // 2, 2).transpose(3, 4)  # (N, C, H/2, W/2, 2, 2)
        total = 4 * x_hat.long()
        intervals = feasible(blocks.flatten(4), (1, 1, 1, 1), total - 2, total + 1, self.levels - 1)
        return tuple(v.unflatten(4, (2, 2)).transpose(3, 4).reshape(n, c, h, w) for v in intervals)


class Gray:
    """X^ = 4-bit gray (Sec. 3.1): (77 R + 150 G + 29 B) >> 12, 16 levels, uint8.

    The paper does not say how gray is computed; this is ITU-R BT.601 luma in integers.
    """

    cell, light, weights, levels_out = 1, False, (77, 150, 29), 16

    def __init__(self, levels=256):
        self.levels = levels
        if 255 % (levels - 1):
            raise Problem(f"gray needs levels - 1 to divide 255, got levels={levels}")
        self.weights = tuple(w * (255 // (levels - 1)) for w in self.weights)

    def shape(self, c, h, w):
        return 1, h, w

    def __call__(self, x):
        """x: uint8 (N, 3, H, W) -> uint8 (N, 1, H, W), 0..15."""
        red, green, blue = x.int().split(1, 1)
        a, b, c = self.weights
        return ((a * red + b * green + c * blue) >> 12).to(torch.uint8)

    def bounds(self, x, x_hat):
        """Inclusive feasible interval (lo, hi), int64 (N, 3, H, W): of red, of green given red, of blue given both.

        Every value in an interval has a completion as long as no weight exceeds 4096 (levels of 16 and more).
        """
        low = 4096 * x_hat[:, 0].long()
        intervals = feasible(x.long().movedim(1, -1), self.weights, low, low + 4095, self.levels - 1)
        return tuple(v.movedim(-1, 1) for v in intervals)


MODELS = {"pixelcnn": (), "grayscale": (Gray,), "pyramid": (Half,), "grayscale-pyramid": (Gray, Half)}


def make_chain(config):
    """The model's list of psi, finest first. Raises Problem if the size does not fit, naming the sizes that do."""
    if config.model not in MODELS:
        raise Problem(f"unknown model {config.model!r}: expected one of {', '.join(MODELS)}")
    h, w = config.size
    chain, levels = [], config.levels
    for kind in MODELS[config.model]:
        scales = config.scales if config.scales >= 0 else max(0, int(math.log2(max(1, min(h, w) // 8))))
        for _ in range(scales if kind is Half else 1):
            chain.append(kind(levels))
            levels = chain[-1].levels_out
    return chain


# ---------------------------------------------------------------------------------------------------------------------
# Heads: the distribution of a pixel given the network's output
# ---------------------------------------------------------------------------------------------------------------------


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

    channels, params_per_mix = 3, 10

    def __init__(self, params, levels=256, shift=0.0):
        n, c, h, w = params.shape
        if c % 10:
            raise Problem(f"a logistic mixture takes 10 K channels of parameters, got {c}")
        k = c // 10
        if params.dtype in (torch.bfloat16, torch.float16):
            params = params.float()
        params = params.contiguous()
        rest = params[:, k:].unflatten(1, (3, 3 * k))  # (N, 3, 3 K, H, W)
        self.levels = levels
        self.logit_probs = params[:, :k]  # (N, K, H, W)
        self.means = rest[:, :, :k]  # (N, 3, K, H, W)
        # Below -7 one level holds all of a component (PixelCNN++'s clamp); above 7 it is flat: a guard for float32.
        self.log_scales = rest[:, :, k : 2 * k].clamp(-7.0, 7.0) + shift
        self.coeffs = rest[:, :, 2 * k :].tanh()

    def means_given(self, c, x):
        """Means of channel c given the channels before it. x: levels, (N, 3, H, W) -> (N, K, H, W)."""
        x, means = to_unit(x, self.levels, self.means.dtype).unsqueeze(2), self.means[:, c]  # x: (N, 3, 1, H, W)
        if c == 1:
            means = means + self.coeffs[:, 0] * x[:, 0]
        if c == 2:
            means = means + self.coeffs[:, 1] * x[:, 0] + self.coeffs[:, 2] * x[:, 1]
        return means

    def log_mass(self, means, log_scales, lo, hi):
        """Log mass of components on lo..hi (levels, broadcast against means and log_scales)."""
        inverse, half = torch.exp(-log_scales), 1.0 / (self.levels - 1)
        b = (to_unit(hi, self.levels, means.dtype) + half - means) * inverse
        a = (to_unit(lo, self.levels, means.dtype) - half - means) * inverse
        width = (hi - lo + 1) * (2 * half) * inverse  # b - a, without cancellation
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
        means = torch.stack([self.means_given(c, x) for c in range(3)], 1)  # (N, 3, K, H, W)
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
        x = torch.zeros_like(noise[:, :3], dtype=torch.long)
        top, weights = self.levels - 1, self.logit_probs.log_softmax(1)
        for c in range(3):
            means, log_scales, lo, hi = self.means_given(c, x), self.log_scales[:, c], 0, top
            if limits:
                lo, hi = (v.unsqueeze(1) for v in limits(x, c))
                k = pick(weights + self.log_mass(means, log_scales, lo, hi), noise[:, 2 * c])
            elif c == 0:
                k = pick(weights, noise[:, 0])
            value = means.gather(1, k)
            if mode == "random":
                scale = log_scales.gather(1, k).exp()
                value = value + scale * self.logistic(noise[:, 2 * c + 1].unsqueeze(1), value, scale, lo, hi)
            value = ((value + 1) * (top / 2)).round().clamp(0, top).long()
            if limits:
                value = value.clamp(lo, hi)
                weights = weights + self.log_mass(means, log_scales, value, value)
            x[:, c : c + 1] = value
        return x

    def logistic(self, u, mean, scale, lo, hi):
        """Standard logistic by inverse cdf, restricted to what rounds into lo..hi (ints 0 and levels - 1: all)."""
        if isinstance(lo, int):
            return torch.logit(u)
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
        weights = self.logit_probs.log_softmax(1)
        for j in range(c):
            level = x[:, j : j + 1]
            weights = weights + self.log_mass(self.means_given(j, x), self.log_scales[:, j], level, level)
        symbols = torch.arange(self.levels, device=x.device).view(1, -1, 1, 1, 1)
        means, log_scales = self.means_given(c, x).unsqueeze(1), self.log_scales[:, c].unsqueeze(1)
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

    channels = 1

    def __init__(self, params, levels=None, shift=0.0):
        self.logits = (params.float() if params.dtype in (torch.bfloat16, torch.float16) else params) * math.exp(-shift)

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


def to_unit(x, levels, dtype):
    """Levels 0..levels-1 -> [-1, 1], in dtype."""
    return x.to(dtype) * (2.0 / (levels - 1)) - 1.0


def bits_per_dim(log_prob, dims):
    """Nats (of an image) -> bits per dimension: -log_prob / (dims ln 2). log_prob: a float, array or tensor."""
    return -log_prob / (dims * math.log(2))


# ---------------------------------------------------------------------------------------------------------------------
# Causal convolutions and networks
# ---------------------------------------------------------------------------------------------------------------------


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
    The forward pass is torch's convolution, `taps` and `matrix` give the sampler the same as a gather and a product.
    """

    def __init__(self, c_in, c_out, kernel, offset, activation="none", stride=1, up=False, gain=1.0, dropout=0.0):
        super().__init__()
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
        return self.apply_to(x, self.weight(), self.b, size)

    def apply_to(self, x, weight, bias, size):
        # Padding on both sides and cutting what is too much costs a row and saves the copy that F.pad would make.
        if self.up:
            extra = tuple(2 + o - k if 2 + o > k else 0 for o, k in zip((2 * o for o in self.offset), self.kernel))
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

    def taps(self, source, target):
        """Flat positions in the source (int64, (H_t W_t, kh kw)) that each target position reads; H_s W_s: outside."""
        (h, w), (kh, kw), (oy, ox) = source, self.kernel, self.offset
        r, c, ky, kx = np.ogrid[: target[0], : target[1], :kh, :kw]
        r, c = (r + oy - ky, c + ox - kx) if self.up else (self.stride * r + ky - oy, self.stride * c + kx - ox)
        whole = (r % 2 == 0) & (c % 2 == 0) if self.up else True
        r, c = (r // 2, c // 2) if self.up else (r, c)
        inside = whole & (r >= 0) & (r < h) & (c >= 0) & (c < w)
        return np.where(inside, r * w + c, h * w).reshape(target[0] * target[1], kh * kw)

    def matrix(self):
        """The weight as (kh kw C_in, C_out), the layout of gathered taps."""
        return self.weight().permute(2, 3, 1, 0).flatten(0, 2).contiguous()


class Layer(nn.Module):
    """A sum of convolutions of earlier nodes; with a residual node r: r + a sigmoid(b), (a, b) halves of the sum."""

    def __init__(self, inputs, residual=None):
        super().__init__()
        self.sources, self.residual = [node for node, _ in inputs], residual
        self.convs = nn.ModuleList(conv for _, conv in inputs)

    def finish(self, y, residual):
        if residual is None:
            return y
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

    def __init__(self, c_in, c_out, layout, filters, causal=True, embeddings=0, c_embedding=0, dropout=0.0,
                 look_right=True):
        super().__init__()
        self.layers, self.causal, self.filters, self.dropout = nn.ModuleList(), causal, filters, dropout
        self.channels = [c_in] + [c_embedding] * embeddings
        self.scale = [0] + list(range(embeddings))  # node i has resolution 2^-scale of the input's
        self.embeddings = list(range(1, embeddings + 1))
        if causal:
            kernels = [VERTICAL if look_right else VERTICAL_LEFT, HORIZONTAL]
            streams = [
                self.add([(0, dict(kernel=(2, 3), offset=(2, 1)))]),
                self.add([(0, dict(kernel=(1, 3), offset=(1, 1))), (0, dict(kernel=(2, 1), offset=(1, 1)))]),
            ]
        else:
            kernels, streams = [ORDINARY], [self.add([(0, ORDINARY)])]
        skips, last = {}, {}
        for stage in layout:
            scale = self.scale[streams[0]]
            if stage in ("down", "up"):
                for s, kernel in enumerate(kernels):
                    if stage == "up":
                        kernel = dict(kernel=kernel["kernel"], offset=UP[kernel["kernel"]], up=True)
                    else:
                        kernel = dict(kernel, stride=2)
                    streams[s] = self.add([(streams[s], kernel)], scale=scale + (1 if stage == "down" else -1))
                continue
            earlier = skips.get(scale, [])
            done = []
            for _ in range(stage):
                skip = earlier.pop() if earlier else [None] * len(streams)
                below = None  # the vertical stream's output, which the horizontal one takes as well
                for s, kernel in enumerate(kernels):
                    aux = [node for node in (below, skip[s]) if node is not None]
                    streams[s] = below = self.block(streams[s], kernel, aux)
                done.append(list(streams))
            skips.setdefault(scale, done)
            last[scale] = streams[-1]
        if causal:
            self.outputs = [self.add([(streams[-1], dict(POINT, activation="elu"))], channels=c_out)]
        else:
            self.outputs = [last[scale] for scale in sorted(last)]
        self.first = self.scale[self.outputs[0]]
        self.last_use = {}
        for i, layer in enumerate(self.layers, self.nodes_given):
            for node in [*layer.sources, *([] if layer.residual is None else [layer.residual])]:
                self.last_use[node] = i

    @property
    def nodes_given(self):
        return 1 + len(self.embeddings)

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
        nodes, read = dict(enumerate([x, *embeddings[: len(self.embeddings)]])), {}

        def activated(node, activation):
            if (node, activation) not in read:
                read[node, activation] = ACTIVATIONS[activation](nodes[node])
            return read[node, activation]

        for i, layer in enumerate(self.layers, self.nodes_given):
            size = self.size(i, x.shape[2:])
            y = functools.reduce(torch.add, (conv(activated(node, conv.activation), size)
                                             for node, conv in zip(layer.sources, layer.convs)))
            nodes[i] = layer.finish(y, None if layer.residual is None else nodes[layer.residual])
            for node in {*layer.sources, layer.residual}:  # what nobody reads any more need not be kept
                if self.last_use.get(node) == i and node not in self.outputs:
                    nodes.pop(node)
                    for activation in ACTIVATIONS:
                        read.pop((node, activation), None)
        return [nodes[i] for i in self.outputs]


def pixelcnnpp_layout(nr_resnet):
    """Three resolutions, down and up again, nr_resnet blocks a stage; a layout in place of the number stays as it is."""
    n = nr_resnet
    return (n, "down", n, "down", n, n, "up", n, "up", n) if isinstance(n, int) else tuple(n)


def depth(layout):
    """By how much a layout reduces the resolution at most."""
    steps = itertools.accumulate(({"down": 1, "up": -1}.get(stage, 0) for stage in layout), initial=0)
    return 2 ** max(steps)


# ---------------------------------------------------------------------------------------------------------------------
# The model: a chain of psi, a factor for each level
# ---------------------------------------------------------------------------------------------------------------------


class Factor(nn.Module):
    """p(x) or p(x | x_hat): a causal network, a head and, if conditional, an embedding network.

    psi: the function that x_hat is made with, or None; it chooses the networks.
    """

    def __init__(self, config, shape, levels, psi, light, shape_hat=None):
        super().__init__()
        c, h, w = shape
        self.shape, self.levels, self.psi = shape, levels, psi
        self.Head = LogisticMixture if c == 3 else Categorical
        if psi is None:
            nr_resnet, embedding, self.embed = config.nr_resnet, (), None
        else:
            nr_resnet = config.nr_resnet_cond
            embedding = tuple(config.embedding) if psi.light else pixelcnnpp_layout(nr_resnet)
            self.embed = Network(shape_hat[0] + 1, 0, embedding, config.nr_filters, causal=False)
        layout = (config.nr_light,) if light else pixelcnnpp_layout(nr_resnet)
        c_out = config.nr_logistic_mix * 10 if c == 3 else levels
        self.net = Network(c + 1, c_out, layout, config.nr_filters, True, 0 if psi is None else 1 if light else 3,
                           config.nr_filters, config.dropout, config.look_right or not light)
        # H and W of x must be multiples of this: for the resampling of the causal network and of f_w
        self.multiple = max(depth(layout), depth(embedding) * (psi.cell if psi else 1))

    @property
    def dtype(self):
        return self.net.layers[0].convs[0].v.dtype

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
        self.config, self.chain = config, make_chain(config)
        self.shapes, self.levels = [(3, *config.size)], [config.levels]  # of X_0, X_1, ..
        for psi in self.chain:
            self.shapes.append(psi.shape(*self.shapes[-1]))
            self.levels.append(psi.levels_out)
        kinds = [*self.chain, *MODELS[config.model][-1:], None]  # the coarsest level has the network of the last psi
        self.factors = nn.ModuleList(  # coarsest first
            Factor(config, self.shapes[i], self.levels[i], psi, bool(kinds[i] and kinds[i].light),
                   self.shapes[i + 1] if psi else None)
            for i, psi in reversed(list(enumerate([*self.chain, None])))
        )
        need = 1
        for i, factor in enumerate(reversed(self.factors)):
            need = max(need, factor.multiple * 2 ** sum(isinstance(psi, Half) for psi in self.chain[:i]))
        if min(config.size) < need or any(s % need for s in config.size):
            raise Problem(f"size {'x'.join(map(str, config.size))} does not fit model {config.model}: "
                          f"height and width must be multiples of {need}")
        self.dims = 3 * config.size[0] * config.size[1]

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

    @torch.no_grad()
    def sample(self, n, seed=0, mode="random", shift=0.0, tight=False, given=None, fast=True, progress=None):
        """n images at every level: list of uint8 (n, C, H, W), coarsest first, X last. The model may be in any mode.

        mode: "random" (ancestral) or "map" (Sec. 4.2); shift is added to the log-scales; tight=True keeps every
        sample consistent, psi(sample) = x_hat. given: uint8 images of one level, (n, C, h, w), told by its shape;
        coarser levels are computed from them, finer ones sampled. The images are a function of the weights and the
        seed; `fast` (every activation once) and not fast (a full pass for every pixel, the oracle) give the same.
        progress: called with the number of pixels done. Memory: the buffers of one factor's layers, in chunks of
        images that keep them under about 4 GiB.
        """
        if mode not in ("random", "map"):
            raise Problem(f"unknown mode {mode!r}: expected random or map")
        training, done = self.training, []
        shapes = self.shapes[::-1]
        if given is not None:
            if given.dtype != torch.uint8 or tuple(given.shape[1:]) not in shapes or len(given) != n:
                raise Problem(f"given: expected {n} uint8 images of a level's shape, one of {shapes}, "
                              f"got {given.dtype} {tuple(given.shape)}")
            level = shapes.index(tuple(given.shape[1:]))
            chain = self.chain[len(self.chain) - level :]
            done = list(itertools.accumulate(chain, lambda x, psi: psi(x), initial=given.to(self.device)))[::-1]
        self.eval()
        try:
            for k in range(len(done), len(self.factors)):
                factor = self.factors[k]
                c, h, w = factor.shape
                generator = torch.Generator().manual_seed(1_000_003 * seed + k)
                noise = torch.rand(n, h * w, 2 * c, generator=generator, dtype=torch.float64).clamp_(1e-16)
                x_hat, images = done[-1] if done else None, []
                chunk = max(1, int(4 * 2**30 / Decoder.bytes_per_image(factor)))
                for part in torch.arange(n).split(chunk):
                    draw = Draw(noise[part].to(self.device), mode)
                    decoder = Decoder(factor, len(part), None if x_hat is None else x_hat[part], shift, tight)
                    images.append(decoder.run(draw, fast, progress))
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


def make_config(preset="tiny", **fields):
    if preset not in PRESETS:
        raise Problem(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
    known = {f.name for f in dataclasses.fields(Config)}
    if unknown := sorted(set(fields) - known):
        raise Problem(f"unknown option {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
    config = Config(**{"preset": preset, **PRESETS[preset], **fields})
    for name in ("size", "embedding", "epochs", "steps", "betas"):  # lists, when they come from a checkpoint
        setattr(config, name, tuple(getattr(config, name)))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: each activation computed once, independent positions together
# ---------------------------------------------------------------------------------------------------------------------


class Schedule:
    """Where each node of a causal network is evaluated at each sequential step.

    Pixel (r, c) is drawn at step c + lag r, with the smallest lag at which everything that it needs is drawn before;
    lag = W is the raster order. A node's position is evaluated at the first step at which all that its taps read is
    there. So the light network comes out as a diagonal wavefront (lag 8), and a network with resampling row by row,
    its vertical stream once a row, without either being written down anywhere. Nodes with equal times form a group.

    fast=False: one step that evaluates everything everywhere, the full pass.

    Slot H W of a buffer stands for "outside" and holds 0; slot H W + 1 takes what is computed for padding: positions
    come in multiples of `multiple`, because a matrix product's rows are the same to the last bit in products of
    different heights only where these are multiples of 4 (seen with MKL), and we promise equal images.
    """

    def __init__(self, net, size, multiple, fast, device):
        sizes = [net.size(i, size) for i in range(len(net.channels))]
        count = [h * w for h, w in sizes]
        first = net.nodes_given
        taps = {(sizes[node], sizes[i], conv.geometry): conv.taps(sizes[node], sizes[i])
                for i, layer in enumerate(net.layers, first) for node, conv in zip(layer.sources, layer.convs)}

        def times(lag):
            """Step of each pixel, and first step at which each node's positions can be evaluated."""
            r, c = np.ogrid[: size[0], : size[1]]
            drawn = (c + lag * r).ravel()
            ready = [drawn + 1] + [np.zeros(n, int) for n in count[1:first]]
            for i, layer in enumerate(net.layers, first):
                step = np.zeros(count[i], int) if layer.residual is None else ready[layer.residual]
                for node, conv in zip(layer.sources, layer.convs):
                    if node not in net.embeddings:
                        read = np.append(ready[node], 0)[taps[sizes[node], sizes[i], conv.geometry]]
                        step = np.maximum(step, read.max(1))
                ready.append(step)
            return drawn, ready

        if fast:
            low, high = 1, size[1]
            while low < high:
                lag = (low + high) // 2
                drawn, ready = times(lag)
                low, high = (low, lag) if (ready[-1] <= drawn).all() else (lag + 1, high)
            self.lag = low
            drawn, ready = times(low)
            if (ready[-1] > drawn).any():
                raise AssertionError("the network is not causal")
            ready[0] = ready[-1] = drawn
        else:
            ready = [np.zeros(n, int) for n in count]
        groups = {}
        self.group = [groups.setdefault((sizes[i], step.tobytes()), len(groups)) for i, step in enumerate(ready)]

        steps = 1 + max(int(step.max()) for step in ready)
        tables, self.reads = {}, {}  # tables: key -> (first row of each step, rows); key: a group, or its taps
        for i, step in enumerate(ready):
            if self.group[i] in tables or i in net.embeddings:
                continue
            number = np.bincount(step, minlength=steps)
            padded = -(-number // multiple) * multiple
            if device.type == "cuda":  # few different shapes, each captured as one graph
                padded = np.where(number > 0, multiple * 2 ** np.ceil(np.log2(np.maximum(padded, 1) / multiple)), 0)
            start = np.append(0, np.cumsum(padded)).astype(int)
            order = np.full(start[-1], count[i] + 1)
            rank = np.arange(count[i]) - np.repeat(np.append(0, np.cumsum(number))[:-1], number)
            by_step = np.argsort(step, kind="stable")
            order[start[step[by_step]] + rank] = by_step
            tables[self.group[i]] = start, order[:, None]
        for i, layer in enumerate(net.layers, first):
            for j, (node, conv) in enumerate(zip(layer.sources, layer.convs)):
                key = self.group[i]
                if conv.kernel != (1, 1):
                    key = self.group[i], sizes[node], conv.geometry
                    start, order = tables[self.group[i]]
                    outside = np.full((2, conv.kernel[0] * conv.kernel[1]), count[node])
                    rows = np.concatenate([taps[sizes[node], sizes[i], conv.geometry], outside])
                    tables.setdefault(key, (start, rows[order[:, 0]]))
                self.reads[i, j] = key
        self.steps = []  # (layout, indices): layout = ((key, how many indices), ..), for the keys that have any
        for t in range(steps):
            parts = {key: rows[start[t] : start[t + 1]].ravel() for key, (start, rows) in tables.items()}
            layout = tuple((key, len(part)) for key, part in parts.items() if len(part))
            if layout:
                indices = np.concatenate([parts[key] for key, _ in layout])
                self.steps.append((layout, torch.from_numpy(indices).to(device)))


class Draw:
    """Source of symbols: sampling from given noise, uniform (N, H W, 2 C) in (0, 1)."""

    def __init__(self, noise, mode="random"):
        self.noise, self.mode = F.pad(noise, (0, 0, 0, 2), value=0.5), mode

    def __call__(self, head, positions, limits):
        """head: of N P pixels as (N P, .., 1, 1), image by image; positions: (P,) -> levels, int64 (N P, C, 1, 1)."""
        return head.sample(self.noise[:, positions].flatten(0, 1)[:, :, None, None], self.mode, limits)


class Decoder:
    """Runs a factor's causal network over n images in an order in which everything is known when it is needed, and
    asks `symbol(head, positions, limits)` for the levels of each set of pixels.

    Every activation is kept in a buffer (n, H W + 2, C) and computed once; a layer at a set of positions is a gather
    and a matrix product. The embedding's 1x1 projections do not depend on x and are computed once, for all positions.
    On CUDA a step is captured as a graph, one for each layout that recurs, and replayed.
    """

    def __init__(self, factor, n, x_hat=None, shift=0.0, tight=False):
        self.factor, self.n, self.shift, self.x_hat = factor, n, shift, x_hat
        self.tight, net = tight and factor.psi is not None, factor.net
        first, self.device = net.nodes_given, net.layers[0].convs[0].v.device
        c, h, w = factor.shape
        e = dict(zip(net.embeddings, map(concat_elu, factor.embeddings(x_hat))))
        self.matrices, self.biases, self.projections = {}, [], []
        for i, layer in enumerate(net.layers, first):
            self.biases.append(sum(conv.b for node, conv in zip(layer.sources, layer.convs) if node not in e))
            projection = 0
            for j, (node, conv) in enumerate(zip(layer.sources, layer.convs)):
                if node in e:
                    projection = projection + conv(e[node], net.size(i, (h, w))).flatten(2).transpose(1, 2)
                else:
                    self.matrices[i, j] = conv.matrix()
            if torch.is_tensor(projection):
                projection = F.pad(projection + self.biases[-1], (0, 0, 0, 2))
            self.projections.append(projection)
        self.canvas = torch.zeros(n, h * w + 2, c, dtype=torch.long, device=self.device)
        self.graphs = {}
        if self.tight:  # for each position: its cell's positions, its place in the cell, the position in x_hat
            side = factor.psi.cell
            r, col = np.ogrid[:h, :w]
            dy, dx = np.ogrid[:side, :side]
            cells = (r // side * side)[..., None, None] * w + (col // side * side)[..., None, None] + dy * w + dx
            place, coarse = r % side * side + col % side, r // side * (w // side) + col // side
            self.cells, self.place, self.coarse = (
                torch.from_numpy(np.concatenate([v.reshape(h * w, -1), np.zeros((2, v.size // (h * w)), int)]))
                .to(self.device) for v in (cells, place, coarse))

    @staticmethod
    def bytes_per_image(factor):
        net, (_, h, w) = factor.net, factor.shape
        size = torch.finfo(factor.dtype).bits // 8
        return size * sum(4 * channels * math.prod(net.size(i, (h, w))) for i, channels in enumerate(net.channels))

    def limits(self, positions):
        """Function (x, c) -> inclusive interval of channel c at these positions; x: (N P, C, 1, 1), so far."""
        psi, n, p = self.factor.psi, self.n, len(positions)
        blocks = self.canvas[:, self.cells[positions].flatten()].reshape(n * p, psi.cell**2, -1)
        x_hat = self.x_hat.flatten(2)[:, :, self.coarse[positions, 0]].transpose(1, 2).reshape(n * p, -1, 1, 1)
        place = self.place[positions].repeat(n, 1).unsqueeze(2)  # (N P, 1, 1)

        def interval(x, c):
            filled = blocks.scatter(1, place.expand(-1, -1, x.shape[1]), x.reshape(n * p, 1, -1))
            filled = filled.transpose(1, 2).unflatten(2, (psi.cell, psi.cell))
            return tuple(v[:, c].flatten(1).gather(1, place[:, :, 0]).unsqueeze(2) for v in psi.bounds(filled, x_hat))

        return interval

    def plan(self, schedule):
        """One record a layer: what it reads, and which of its activations are needed at once or in a buffer."""
        net, first, n = self.factor.net, self.factor.net.nodes_given, self.n
        group, records, buffered = schedule.group, [], set()
        wanted = [set() for _ in net.channels]  # activations of each node
        for i, layer in enumerate(net.layers, first):
            reads = []
            for j, (node, conv) in enumerate(zip(layer.sources, layer.convs)):
                if (i, j) in self.matrices:
                    read = node, conv.activation
                    wanted[node].add(conv.activation)
                    direct = conv.kernel == (1, 1) and group[node] == group[i]
                    buffered |= set() if direct else {read}
                    reads.append((read, None if direct else schedule.reads[i, j], self.matrices[i, j]))
            residual, direct = layer.residual, layer.residual is not None and group[layer.residual] == group[i]
            if residual is not None:
                wanted[residual].add("none")
                buffered |= set() if direct else {(residual, "none")}
            records.append((i, layer, reads, direct))
        sizes = [math.prod(net.size(i, self.factor.shape[1:])) for i in range(len(net.channels))]
        self.buffers = {
            (i, a): torch.zeros(n, sizes[i] + 2, net.channels[i] * (2 if a == "concat_elu" else 1),
                                dtype=self.factor.dtype, device=self.device) for i, a in buffered}
        self.records = [(*record, group[record[0]], self.biases[k], self.projections[k],
                         [(a, self.buffers.get((record[0], a))) for a in sorted(wanted[record[0]])])
                        for k, record in enumerate(records)]

    def step(self, layout, indices, symbol, only=None):
        """Evaluate what `layout` names, then draw. only: draw this position alone (the full pass)."""
        n = self.n
        index = dict(zip([key for key, _ in layout], indices.split([length for _, length in layout])))
        now = {}
        for i, layer, reads, direct, group, bias, projection, wanted in self.records:
            positions = index.get(group)
            if positions is None:
                continue
            rows = n * len(positions)
            y = projection.index_select(1, positions).view(rows, -1) if torch.is_tensor(projection) else bias
            for read, key, matrix in reads:
                taps = now[read] if key is None else self.buffers[read].index_select(1, index[key]).view(rows, -1)
                y = torch.addmm(y, taps, matrix)
            if layer.residual is not None:
                r = layer.residual, "none"
                y = layer.finish(y, now[r] if direct else self.buffers[r].index_select(1, positions).view(rows, -1))
            for activation, buffer in wanted:
                now[i, activation] = value = ACTIVATIONS[activation](y)
                if buffer is not None:
                    buffer.index_copy_(1, positions, value.view(n, len(positions), -1))
        if positions is None:  # the last record is the output: nothing to draw at this step
            return
        params = y.view(n, len(positions), -1)
        if only is not None:
            params, positions = params[:, only : only + 1], positions[only : only + 1]
        head = self.factor.Head(params.flatten(0, 1)[:, :, None, None].double(), self.factor.levels, self.shift)
        x = symbol(head, positions, self.limits(positions) if self.tight else None).view(n, len(positions), -1)
        self.canvas.index_copy_(1, positions, x)
        unit = F.pad(to_unit(x, self.factor.levels, self.factor.dtype), (0, 1), value=1.0)
        self.buffers[0, "none"].index_copy_(1, positions, unit)

    def run(self, symbol, fast=True, progress=None):
        """-> uint8 (n, C, H, W)"""
        c, h, w = self.factor.shape
        schedule = self.schedule(fast)
        self.plan(schedule)
        self.buffers[0, "none"].zero_()[:, : h * w, -1] = 1.0
        for only in [None] if fast else range(h * w):
            for layout, indices in schedule.steps:
                if self.device.type == "cuda" and fast and isinstance(symbol, Draw):
                    self.replay(layout, indices, symbol)
                else:
                    self.step(layout, indices, symbol, only)
                if progress:
                    pixels = dict(layout).get(schedule.group[0], 0) if fast else 1
                    progress(self.n * pixels)
        return self.canvas[:, : h * w].transpose(1, 2).reshape(self.n, c, h, w).to(torch.uint8)

    def schedule(self, fast=True):
        cache = self.factor.net.__dict__.setdefault("schedules", {})
        key = self.factor.shape[1:], 4 // math.gcd(self.n, 4), fast, self.device
        if key not in cache:
            cache[key] = Schedule(self.factor.net, *key)
        return cache[key]

    def replay(self, layout, indices, symbol):
        """A layout's first step runs eagerly, the second is captured, and from then on the graph is replayed."""
        if layout not in self.graphs:
            self.graphs[layout] = None
            return self.step(layout, indices, symbol)
        if self.graphs[layout] is None:
            graph, static = torch.cuda.CUDAGraph(), indices.clone()
            with torch.cuda.graph(graph):
                self.step(layout, static, symbol)
            self.graphs[layout] = graph, static
        graph, static = self.graphs[layout]
        static.copy_(indices)
        graph.replay()
