"""Properties of pixelaux, in the order of its sections, then of tools/.

Each test is headed by the property that it proves, compares with an oracle that shares no code with
what it checks, and has a positive control: something that would be found if it were wrong. Nothing
depends on the clock or on a quiet machine: each process works on one thread.
"""
import ast
import collections
import contextlib
import copy
import decimal
import errno
import fcntl
import functools
import gc
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.overrides import wrap_torch_function

import pixelaux
from pixelaux import (
    bits_per_dim, Block, build, Categorical, CausalNet, Conv, Dataset, Draw, Factor,
    feasible, Gray, Half, LogisticMixture, main, make_config, Plan, Problem, Psi, sample_fast,
    sample_naive, Shapes, six_stages, View)
from tools import bench, codec, curves, export, figures, formats, images

HERE = pathlib.Path(__file__).resolve().parent
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that we start, too
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "pixelaux", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("pixelaux")

STAGES = tuple((halved, 1) for halved in (0, 1, 2, 2, 1, 0))  # PixelCNN++'s, one block each
SMALL = dict(
    nr_filters=6, nr_logistic_mix=2, layout=STAGES, layout_cond=STAGES, layout_light=((0, 2),),
    layout_embed=((1, 1), (2, 1), (1, 1), (0, 1)), dropout=0.0)
SIZES = {
    "pixelcnn": (8, 12), "grayscale": (8, 4), "pyramid": (16, 24), "grayscale-pyramid": (16, 16)}


def small(name, size=None, seed=0, dtype=torch.float64, wild=0.1, **overrides):
    """A small model, its weights so far from their start that everything depends on everything."""
    model = build(name, size or SIZES[name], seed=seed, **{**SMALL, **overrides}).to(dtype)
    model.initialise(random_batch(16, model.views[-1].shape, model.config.levels, seed))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += wild * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model.eval()


def random_batch(n, shape, levels=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (n, *shape), generator=generator, dtype=torch.uint8)


def all_images(shape, levels):
    """Every image of a shape, (levels ** prod(shape), *shape)."""
    grids = np.indices((levels,) * math.prod(shape)).reshape(math.prod(shape), -1).T
    return torch.from_numpy(grids.astype(np.uint8).reshape(-1, *shape))


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


# --- psi -----------------------------------------------------------------------------------------


class TwoColour(Psi):
    """Dark or bright: do the channels add up to at least half of the most that they can?"""

    label = "two-colour"

    def __init__(self, channels=3, levels=256):
        self.levels, self.channels_out, self.levels_out = levels, 1, 2
        self.weights, self.most = [1] * channels, channels * (levels - 1)
        self.bright = (self.most + 1) // 2

    def __call__(self, x):
        return (x.long().sum(1, keepdim=True) >= self.bright).to(torch.uint8)

    def bounds(self, x, x_hat):
        low = self.bright * x_hat.long()
        high = torch.where(x_hat == 1, self.most, self.bright - 1)
        lo, hi = feasible(x.long().split(1, 1), self.weights, low, high, self.levels - 1)
        return torch.cat(lo, 1), torch.cat(hi, 1)


class Quarter(Psi):
    """A quarter of the resolution: sum of each 4x4 block // 16, in each channel."""

    cell = 4

    def __call__(self, x):
        return (sum(self.block(x)) // 16).to(torch.uint8)

    def block(self, x):
        return F.pixel_unshuffle(x.long(), 4).unflatten(1, (-1, 16)).unbind(2)

    def bounds(self, x, x_hat):
        low = 16 * x_hat.long()
        lo, hi = feasible(self.block(x), [1] * 16, low, low + 15, self.levels - 1)
        return [F.pixel_shuffle(torch.stack(v, 2).flatten(1, 2), 4) for v in (lo, hi)]


class Brightness(Psi):
    """Of 2x2 blocks, 16 levels: the sum of the 12 sub-pixels // 192; it mixes the channels."""

    cell = 2

    def __init__(self, channels=3, levels=256):
        self.levels, self.channels_out, self.levels_out = levels, 1, 16

    def __call__(self, x):
        return (self.block(x).sum(1, keepdim=True) // 192).to(torch.uint8)

    def block(self, x):
        """(N, 12, H / 2, W / 2): of each pixel in raster order its channels."""
        return F.pixel_unshuffle(x.long(), 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)

    def bounds(self, x, x_hat):
        low = 192 * x_hat.long()
        ends = feasible(self.block(x).split(1, 1), [1] * 12, low, low + 191, self.levels - 1)
        ends = [torch.cat(end, 1).unflatten(1, (4, 3)).transpose(1, 2) for end in ends]
        return [F.pixel_shuffle(end.flatten(1, 2), 2) for end in ends]


@pytest.fixture
def new_models(monkeypatch):
    monkeypatch.setitem(pixelaux.MODELS, "two-colour", (TwoColour,))
    monkeypatch.setitem(pixelaux.MODELS, "gray-two-colour", (Gray, TwoColour))
    monkeypatch.setitem(pixelaux.MODELS, "quarter", (Quarter,))
    monkeypatch.setitem(pixelaux.MODELS, "brightness", (Brightness,))


def test_psi_is_the_stated_integer_function():
    """Half and Gray equal their formulas in Python's integers; white is 15."""
    x = random_batch(3, (3, 4, 6))
    half, gray = Half()(x), Gray()(x)
    for n, r, c in itertools.product(range(3), range(4), range(6)):
        red, green, blue = (int(v) for v in x[n, :, r, c])
        assert int(gray[n, 0, r, c]) == (77 * red + 150 * green + 29 * blue) // 4096
        for k in range(3):
            block = [int(x[n, k, r // 2 * 2 + i, c // 2 * 2 + j]) for i in (0, 1) for j in (0, 1)]
            assert int(half[n, k, r // 2, c // 2]) == (sum(block) + 2) // 4
    assert int(Gray()(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))) == 15
    assert half.dtype == gray.dtype == torch.uint8


@given(st.data())
def test_feasible_admits_exactly_the_sums_between_low_and_high(data):
    """Of all values, those inside every interval are those with low <= sum of w v <= high, for ones
    and for any weights that a step of the budget can bridge."""
    top, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    low = data.draw(st.integers(0, top * sum(weights)))
    high = data.draw(st.integers(low + max(weights) - 1, top * sum(weights) + max(weights)))
    everything = list(itertools.product(range(top + 1), repeat=count))
    values = torch.tensor(everything)
    ends = torch.full((len(values),), low), torch.full((len(values),), high)
    lo, hi = feasible(values.unbind(1), weights, *ends, top)
    inside = ((torch.stack(lo, 1) <= values) & (values <= torch.stack(hi, 1))).all(1).tolist()
    sums = [sum(w * v for w, v in zip(weights, each)) for each in everything]
    assert inside == [low <= total <= high for total in sums]
    assert any(inside)


@pytest.mark.parametrize("psi, shape", [
    *((Half(levels=levels), (3, 2, 2)) for levels in (2,)),
    *((Half(levels=levels), (1, 2, 2)) for levels in (4, 7)),
    *((TwoColour(1, levels), (1, 1, 1)) for levels in (2, 3, 16)),
    *((TwoColour(3, levels), (3, 1, 1)) for levels in (2, 3, 9)),
    (Gray(levels=16), (3, 1, 1)), (Quarter(levels=2), (1, 4, 4))], ids=lambda v: str(v)
    if isinstance(v, tuple) else f"{type(v).__name__}{v.levels}")
def test_bounds_admit_exactly_the_preimage(psi, shape):
    """Of all images, those inside the bounds of x_hat are those whose view is x_hat."""
    everything = all_images(shape, psi.levels)
    views = psi(everything)
    for x_hat in views.flatten(1).unique(dim=0).view(-1, *views.shape[1:]):
        lo, hi = psi.bounds(everything, x_hat.expand(len(everything), -1, -1, -1))
        inside = ((everything >= lo) & (everything <= hi)).flatten(1).all(1)
        assert torch.equal(inside, (views == x_hat).flatten(1).all(1))
        assert inside.any() and not inside.all()
        assert lo.dtype == hi.dtype == torch.int64


@pytest.mark.parametrize("psi", [Half(), Gray(), TwoColour(), Quarter(), Brightness()],
                         ids=["half", "gray", "two-colour", "quarter", "brightness"])
@given(seed=st.integers(0, 10**6), extreme=st.booleans())
@settings(max_examples=40)
def test_bounds_at_256_levels_contain_x_and_are_sharp(psi, seed, extreme):
    """x is inside; and drawing every sub-pixel at an end of its interval, in order, always ends in
    an image of the same view."""
    rng, side = np.random.default_rng(seed), max(2, psi.cell)
    shape = (4, 3, side, side)
    x = rng.choice([0, 1, 2, 253, 254, 255], shape) if extreme else rng.integers(256, size=shape)
    x = torch.from_numpy(x.astype(np.uint8))
    x_hat = psi(x)
    lo, hi = psi.bounds(x, x_hat)
    assert ((lo <= x) & (x <= hi) & (lo >= 0) & (hi <= 255)).all()
    y, at_high = torch.zeros_like(x), torch.from_numpy(rng.integers(2, size=shape)).bool()
    for r, col in itertools.product(range(side), range(side)):
        for c in range(3):
            lo, hi = psi.bounds(y, x_hat)
            assert (lo <= hi)[:, c, r, col].all()
            y[:, c, r, col] = torch.where(at_high, hi, lo)[:, c, r, col].to(torch.uint8)
    assert torch.equal(psi(y), x_hat)


def test_gray_names_what_it_cannot_be_made_of():
    """Other channels or levels than it can take are a Problem that names them."""
    for channels, levels in ((1, 256), (3, 7), (4, 16)):
        with pytest.raises(Problem, match=f"{levels=}"):
            Gray(channels, levels)
    Gray(3, 18)  # 255 = 15 * 17


# --- Heads ---------------------------------------------------------------------------------------


def test_each_channel_is_drawn_from_the_noise_that_the_docstring_says():
    """The component from 0; R, G, B from 1, 3, 5."""
    head = LogisticMixture(torch.zeros(1, 30, 1, 1, dtype=torch.float64))
    noise, moved = torch.full((1, 6, 1, 1), 0.4, dtype=torch.float64), []
    for i in range(1, 6):
        other = noise.clone()
        other[:, i] = 0.6
        moved.append((head.sample(other) != head.sample(noise)).flatten().tolist())
    red, green, blue = np.eye(3, dtype=bool).tolist()
    assert moved == [red, [False] * 3, green, [False] * 3, blue]


def oracle_mass(mean, log_scale, value, levels):
    """One logistic's mass on a level, with 60 digits."""
    D = decimal.Decimal
    with decimal.localcontext() as context:
        context.prec = 60
        scale, step = D(log_scale).exp(), D(2) / (levels - 1)
        above = lambda z: 1 / (1 + z.exp())  # the mass above z
        centre = value * step - 1 - D(mean)
        low, high = (centre - step / 2) / scale, (centre + step / 2) / scale
        if low < 0:  # by symmetry: no difference of two numbers near 1
            low, high, value = -high, -low, levels - 1 - value
        beyond = D(0) if value == levels - 1 else above(high)
        return (D(1) if value == 0 else above(low)) - beyond


def oracle_mixture(params, x, levels):
    """Of one pixel by PixelCNN++'s formulas: weights (K), and each channel's masses on x (3, K), on
    each level if x is None there. params: (10 K,) numpy; x: three ints."""
    k = len(params) // 10
    rest = params[k:].reshape(3, 3 * k)
    weights = np.exp(params[:k] - params[:k].max())
    red, green = (2 * v / (levels - 1) - 1 for v in x[:2])
    masses = []
    for channel, values in enumerate([[v] for v in x]):
        masses.append([])
        for j in range(k):
            c = np.tanh(rest[:, 2 * k + j])
            mean = [rest[0, j], rest[1, j] + c[0] * red, rest[2, j] + c[1] * red + c[2] * green]
            log_scale = float(np.clip(rest[channel, k + j], -7, 7))
            masses[-1].append(oracle_mass(float(mean[channel]), log_scale, values[0], levels))
    return [decimal.Decimal(float(w)) for w in weights / weights.sum()], masses


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=30)
def test_mixture_log_prob_equals_the_direct_formula(seed, spread):
    """As PixelCNN++ writes it, with 60 digits: also where a mass is far below 1e-5."""
    rng = np.random.default_rng(seed)
    params = spread * rng.standard_normal(30)
    params[3:].reshape(3, 9)[:, 3:6] -= 2
    x = [int(v) for v in rng.choice([0, 1, 100, 128, 254, 255], size=3)]
    head = LogisticMixture(torch.from_numpy(params)[None, :, None, None])
    ours = float(head.log_prob(torch.tensor(x, dtype=torch.uint8)[None, :, None, None]))
    weights, masses = oracle_mixture(params, x, 256)
    expected = float(sum(w * r * g * b for w, r, g, b in zip(weights, *masses)).ln())
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("log_scale, clamped", [(-6.5, -6.5), (-9, -7), (6.5, 6.5), (9, 7)])
def test_log_scales_are_clamped_at_7_to_either_side(log_scale, clamped):
    """The mass of the level on which a component is centred, and of its neighbour."""
    params = torch.zeros(1, 10, 2, 1, dtype=torch.float64)
    params[:, [1, 4, 7]], params[:, [2, 5, 8]] = 2 * 100 / 255 - 1, log_scale
    x = torch.tensor([100, 101], dtype=torch.uint8).view(1, 1, 2, 1).expand(-1, 3, -1, -1)
    mass = [oracle_mass(2 * 100 / 255 - 1, clamped, value, 256) for value in (100, 101)]
    expected = [3 * float(each.ln()) for each in mass]
    assert LogisticMixture(params).log_prob(x).flatten().tolist() == pytest.approx(expected)


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=25)
def test_a_cut_mixture_is_the_product_of_the_cut_channels(seed, spread):
    """p(x_c | before, in lo..hi) of each channel = its mass / the mass of its interval, with the
    weights of the components that the channels before have left: in 60 digits, at 6 levels."""
    rng, levels = np.random.default_rng(seed), 6
    params = spread * rng.standard_normal(20)
    x = [int(v) for v in rng.integers(levels, size=3)]
    lo = [int(rng.integers(0, v + 1)) for v in x]
    hi = [int(rng.integers(v, levels)) for v in x]
    expected = decimal.Decimal(1)
    for c in range(3):
        joint = []  # of the channels up to c, for each value that c can take
        for value in range(lo[c], hi[c] + 1):
            weights, masses = oracle_mixture(params, [*x[:c], value, *x[c + 1 :]], levels)
            parts = zip(weights, *masses[: c + 1])
            joint.append(sum(math.prod(each, start=w) for w, *each in parts))
        expected *= joint[x[c] - lo[c]] / sum(joint)
    as_pixel = lambda v, dtype=torch.int64: torch.tensor(v, dtype=dtype)[None, :, None, None]
    head = LogisticMixture(torch.from_numpy(params)[None, :, None, None], levels)
    ours = float(head.log_prob(as_pixel(x, torch.uint8), (as_pixel(lo), as_pixel(hi))))
    assert ours == pytest.approx(float(expected.ln()), rel=1e-9, abs=1e-9)


@given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0, 100.0]))
@settings(max_examples=40)
def test_mixture_sums_to_one(levels, seed, spread):
    """Over all colours of up to 9 levels, whatever the parameters."""
    generator = torch.Generator().manual_seed(seed)
    params = spread * torch.randn(1, 20, 1, 1, dtype=torch.float64, generator=generator)
    everything = all_images((3, 1, 1), levels)
    head = LogisticMixture(params.expand(len(everything), -1, 1, 1), levels)
    assert float(head.log_prob(everything).exp().sum()) == pytest.approx(1, abs=1e-12)


@given(mean=st.floats(-50, 50), log_scale=st.floats(-7, 7))
def test_a_component_sums_to_one_over_256_levels_and_intervals_add_up(mean, log_scale):
    """The mass of an interval is the sum of its levels', also 50 units away."""
    head = LogisticMixture(torch.zeros(1, 10, 1, 1, dtype=torch.float64))
    head.log_scales = torch.full_like(head.log_scales, log_scale)
    means = torch.full((256, 1, 1, 1), mean, dtype=torch.float64)
    values = torch.arange(256).view(-1, 1, 1, 1)
    log_scales = head.log_scales[:, 0]
    mass = pixelaux.log_mass(means, log_scales, values, values, 256).flatten()
    assert float(mass.exp().sum()) == pytest.approx(1, abs=1e-12)
    for lo, hi in ((0, 255), (0, 3), (17, 17), (30, 200), (250, 255)):
        interval = torch.tensor(lo), torch.tensor(hi)
        whole = float(pixelaux.log_mass(means[:1], log_scales, *interval, 256))
        assert whole == pytest.approx(float(mass[lo : hi + 1].logsumexp(0)), abs=1e-9, rel=1e-9)


@given(st.integers(0, 10**6), st.sampled_from([1.0, 30.0]))
@settings(max_examples=30)
def test_categorical_sums_to_one(seed, spread):
    """And is the softmax of its logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(1, 16, 2, 3, dtype=torch.float64, generator=generator)
    x = torch.arange(16, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 3)
    p = Categorical(logits.expand(16, -1, -1, -1)).log_prob(x).exp()
    assert torch.allclose(p.sum(0), torch.ones(2, 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(p[:, 0, 0], torch.softmax(logits[0, :, 0, 0], 0), atol=1e-12)


@given(st.integers(0, 10**6), st.integers(0, 15), st.integers(0, 15))
@settings(max_examples=30)
def test_a_cut_categorical_is_the_part_of_the_softmax_there(seed, a, b):
    """Its samples are the levels of the interval, and no other."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 16, 1, 1, dtype=torch.float64, generator=generator)
    lo, hi = (torch.full((1, 1, 1, 1), v) for v in sorted((a, b)))
    weights = np.exp(logits.numpy().ravel())
    inside = np.arange(int(lo), int(hi) + 1)
    for x in inside:
        x = torch.full((1, 1, 1, 1), x, dtype=torch.uint8)
        expected = np.log(weights[int(x)] / weights[inside].sum())
        ours = float(Categorical(logits).log_prob(x, (lo, hi)))
        assert ours == pytest.approx(expected, abs=1e-12)
    noise = (torch.arange(4000, dtype=torch.float64).view(-1, 1, 1, 1) + 0.5) / 4000
    noise = noise.expand(-1, 2, 1, 1)
    head = Categorical(logits.expand(4000, -1, 1, 1))
    drawn = head.sample(noise, "random", lambda x: (lo, hi))
    shares = np.bincount(drawn.flatten(), minlength=16) / 4000
    assert np.allclose(shares[inside], weights[inside] / weights[inside].sum(), atol=1e-3)
    assert set(drawn.flatten().tolist()) <= set(inside)


def test_a_constant_head_costs_log2_levels():
    """4 bits for 16 levels, 1 bit for 2."""
    x = random_batch(2, (1, 4, 4), 16)
    log_prob = Categorical(torch.zeros(2, 16, 4, 4)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(bits_per_dim(log_prob, 16), torch.full((2,), 4.0))
    x = random_batch(2, (3, 4, 4), 2)
    log_prob = LogisticMixture(torch.zeros(2, 20, 4, 4), levels=2).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(bits_per_dim(log_prob, 48), torch.ones(2), atol=1e-6)


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1.0, 5.0, 50.0]))
@settings(max_examples=25)
def test_a_cut_mixture_sums_to_one_over_the_interval(seed, spread):
    """Also far in the tails: means tens of units outside, scales at the clamp."""
    rng, levels = np.random.default_rng(seed), 5
    params = torch.from_numpy(spread * rng.standard_normal((1, 20, 1, 1)))
    lo = torch.from_numpy(rng.integers(0, levels, (1, 3, 1, 1)))
    width = torch.from_numpy(rng.integers(0, 3, (1, 3, 1, 1)))
    hi = torch.minimum(lo + width, torch.tensor(levels - 1))
    everything = all_images((3, 1, 1), levels)
    inside = ((everything >= lo) & (everything <= hi)).flatten(1).all(1)
    everything = everything[inside]
    head = LogisticMixture(params.expand(len(everything), -1, 1, 1), levels)
    bounds = tuple(v.expand(len(everything), -1, 1, 1) for v in (lo, hi))
    assert float(head.log_prob(everything, bounds).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_a_cut_far_in_a_tail_is_finite_in_float32_and_so_are_its_gradients():
    """Where the customary code has 0 / 0: means 40 units outside, scales below the clamp."""
    params = torch.zeros(1, 20, 1, 1)
    params[:, 2:].view(1, 3, 6)[:, :, :2] = 40.0  # means
    params[:, 2:].view(1, 3, 6)[:, :, 2:4] = -9.0  # log-scales
    params.requires_grad_()
    x = torch.tensor([3, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    lo, hi = torch.tensor([2, 0, 250]).view(1, 3, 1, 1), torch.tensor([5, 1, 255]).view(1, 3, 1, 1)
    log_prob = LogisticMixture(params).log_prob(x, (lo, hi))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and params.grad.isfinite().all()
    head = LogisticMixture(params.detach().double().expand(500, -1, 1, 1))
    noise = torch.rand(500, 6, 1, 1, dtype=torch.float64)
    limits = lambda x: [v[:, len(x) : len(x) + 1].expand(500, 1, 1, 1) for v in (lo, hi)]
    drawn = head.sample(noise, "random", limits)
    assert ((drawn >= lo) & (drawn <= hi)).all()


def chi_square(counts, probabilities, least=8):
    """z score of Pearson's chi^2, cells pooled until each expects `least`."""
    order, n = np.argsort(probabilities), counts.sum()
    cells, observed, expected = [], 0, 0.0
    for i in order:
        observed, expected = observed + counts[i], expected + n * probabilities[i]
        if expected >= least:
            cells.append((observed, expected))
            observed, expected = 0, 0.0
    cells[-1] = cells[-1][0] + observed, cells[-1][1] + expected
    degrees = len(cells) - 1
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("limited", [False, True])
def test_head_samples_follow_its_likelihood(limited):
    """chi^2 over all colours of 6 levels; shifted by one level it is far off (control)."""
    levels, n = 6, 40000
    generator = torch.Generator().manual_seed(3)
    params = torch.randn(1, 20, 1, 1, dtype=torch.float64, generator=generator)
    everything = all_images((3, 1, 1), levels)
    lo, hi = torch.tensor([1, 0, 2]).view(1, 3, 1, 1), torch.tensor([4, 3, 5]).view(1, 3, 1, 1)
    limits = lambda x: [v[:, len(x) : len(x) + 1].expand(n, 1, 1, 1) for v in (lo, hi)]
    head = LogisticMixture(params.expand(len(everything), -1, 1, 1), levels)
    bounds = tuple(v.expand(len(everything), -1, 1, 1) for v in (lo, hi)) if limited else None
    p = head.log_prob(everything, bounds).exp().flatten()
    if limited:
        p = p * ((everything >= lo) & (everything <= hi)).flatten(1).all(1)
    noise = torch.rand(n, 6, 1, 1, dtype=torch.float64, generator=generator.manual_seed(4))
    head = LogisticMixture(params.expand(n, -1, 1, 1), levels)
    x = head.sample(noise, "random", limits if limited else None)[:, :, 0, 0].numpy()
    counts = np.bincount(x @ np.array([levels**2, levels, 1]), minlength=levels**3)
    assert abs(chi_square(counts, p.numpy())) < 5
    assert chi_square(np.roll(counts, 1), p.numpy()) > 50


def test_map_takes_the_mode_of_a_component():
    """Mode "map": red is the mean of a component; the shift to variance 0 is the same image."""
    generator = torch.Generator().manual_seed(5)
    params = torch.randn(200, 20, 1, 1, dtype=torch.float64, generator=generator)
    noise = torch.rand(200, 6, 1, 1, dtype=torch.float64, generator=generator)
    x = LogisticMixture(params).sample(noise, "map")
    red = ((params[:, 2:4].clamp(-1, 1) + 1) * 127.5).round().long()  # the means of R
    assert (x[:, :1] == red).any(1).all()
    assert not (LogisticMixture(params).sample(noise)[:, :1] == red).any(1).all()
    quiet = LogisticMixture(params, shift=-30.0)
    assert torch.equal(quiet.sample(noise), quiet.sample(noise, "map"))
    logits = torch.randn(9, 16, 1, 1, generator=generator)
    assert torch.equal(Categorical(logits).sample(noise[:9], "map"), logits.argmax(1, keepdim=True))


def test_shift_reduces_the_variance():
    """Of the mixture and of the categorical, by as much as the log-scales are shifted."""
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(1, 10, 1, 1, dtype=torch.float64, generator=generator)
    params = params.expand(500, -1, 1, 1)
    noise = torch.rand(500, 6, 1, 1, dtype=torch.float64, generator=generator)
    drawn = [LogisticMixture(params, shift=shift).sample(noise).double() for shift in (0, -2, -9)]
    spread = [float(x.std(0).mean()) for x in drawn]
    assert spread[0] > spread[1] > spread[2]
    by_hand = params.clone()
    by_hand[:, [2, 5, 8]] -= 2  # K = 1: of R, G, B mean, log-scale, coefficient
    assert torch.equal(drawn[1], LogisticMixture(by_hand).sample(noise).double())
    logits = torch.randn(1, 16, 1, 1, generator=generator).expand(500, -1, 1, 1)
    heads = [Categorical(logits, shift=shift) for shift in (0, -1, -9)]
    kinds = [len(head.sample(noise).unique()) for head in heads]
    assert kinds[0] > kinds[1] > kinds[2] == 1
    assert torch.allclose(heads[1].log_prob(torch.zeros(500, 1, 1, 1).byte()),
                          (math.e * logits).log_softmax(1)[:, 0])


@given(log_weights=st.lists(st.floats(-30, 30), min_size=1, max_size=8),
       u=st.sampled_from([1e-16, 1e-9, 0.3, 0.5, 1 - 1e-9, 1 - 2**-53]))
def test_a_component_is_drawn_by_inverse_cdf_also_at_the_ends(log_weights, u):
    """u in (0, 1) leads to the index at which the sum of the weights first reaches u."""
    weights = np.exp(np.array(log_weights) - max(log_weights))
    cdf = np.cumsum(weights) / weights.sum()
    drawn = int(pixelaux.pick(torch.tensor(log_weights, dtype=torch.float64).view(1, -1, 1, 1),
                              torch.full((1, 1, 1), u, dtype=torch.float64)))
    below = cdf[drawn - 1] if drawn else 0.0
    assert below <= u + 1e-12 and u <= cdf[drawn] + 1e-12


# --- Causal convolutions -------------------------------------------------------------------------


def explicit(conv, x):
    """A Conv's output by torch's convolution with a square kernel, in which all that the rows and
    columns do not cover is 0; up: of an image with zeros between the pixels."""
    (top, bottom), (left, right) = conv.rows, conv.columns
    weight = conv.g.view(-1, 1, 1, 1) * conv.v / conv.v.square().sum((1, 2, 3), True).sqrt()
    reach = max(map(abs, (*conv.rows, *conv.columns)))
    mask = weight.new_zeros(*weight.shape[:2], 2 * reach + 1, 2 * reach + 1)
    if conv.up:
        between = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        between[:, :, ::2, ::2] = x
        x, weight = between, weight.flip(2, 3)
    rows, columns = slice(reach + top, reach + bottom + 1), slice(reach + left, reach + right + 1)
    mask[:, :, rows, columns] = weight
    y = F.conv2d(x, mask, padding=reach)[:, :, :: conv.stride, :: conv.stride]
    return y + conv.b.view(1, -1, 1, 1)


def reaches(first, last):
    """Hypothesis: rows or columns, (first, last), such that no more is read behind than before."""
    return st.tuples(st.integers(-3, 0), st.integers(-3, 3)).filter(
        lambda ends: ends[0] <= ends[1] <= -ends[0] and first <= ends[0] and ends[1] <= last)


@given(rows=reaches(-3, 3), columns=reaches(-3, 3), seed=st.integers(0, 99),
       change=st.sampled_from([dict(), dict(stride=2), dict(up=True)]))
@settings(max_examples=80)
def test_a_convolution_reads_its_rows_and_columns_and_no_other(rows, columns, seed, change):
    """Stride 1 and 2, up: as torch's with a mask; with a mask one row off it is not (control)."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    conv = Conv(3, 4, rows, columns, **change).double()
    conv.b.data.normal_()
    ours = conv(x)
    scale = {"stride": 0.5, "up": 2}.get(next(iter(change), None), 1)
    assert ours.shape == (2, 4, 6 * scale, 8 * scale)
    assert torch.allclose(ours, explicit(conv, x), atol=1e-12)
    conv.rows = rows[0] - 1, rows[1] - 1
    assert not torch.allclose(ours, explicit(conv, x), atol=1e-3)


@pytest.mark.parametrize("reach", [
    dict(rows=(-1, -1), columns=(0, 1)), dict(rows=(-2, -1), columns=(-1, 2)),
    dict(rows=(0, 1), columns=(-1, 0)), dict(rows=(1, 1), columns=(0, 0)),
    dict(rows=(-2, -1), columns=(0, 0), up=True), dict(rows=(-1, 0), columns=(-2, -1), up=True),
    dict(rows=(0, 1), columns=(0, 0), up=True), dict(rows=(0, 0), columns=(0, 0), stride=4)],
    ids=str)
def test_a_convolution_with_any_other_reach_is_right_or_refused(reach):
    """Never an output of another size, or torch's own error."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    try:
        conv = Conv(3, 4, **reach).double()
        ours = conv(x)
    except Problem:
        return
    expected = explicit(conv, x)
    assert ours.shape == expected.shape and torch.allclose(ours, expected, atol=1e-12)


def shifted(x, down, right):
    """x moved down and right, zeros coming in."""
    height, width = x.shape[2:]
    return F.pad(x, (right, 0, down, 0))[:, :, :height, :width]


REACHES = {
    "vertical": pixelaux.VERTICAL, "horizontal": pixelaux.HORIZONTAL, "ordinary": pixelaux.ORDINARY,
    "first vertical": dict(rows=(-2, -1), columns=(-1, 1)),
    "first above": dict(rows=(-1, -1), columns=(-1, 1)),
    "first left": dict(rows=(-1, 0), columns=(-1, -1))}


@pytest.mark.parametrize("kind, resample", [
    *itertools.product(["vertical", "horizontal", "ordinary"], ["", "down", "up"]),
    ("first vertical", ""), ("first above", ""), ("first left", "")])
def test_convolutions_are_pixelcnnpps(kind, resample):
    """Pad, shift and crop as in PixelCNN++'s nn.py, written out."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    conv = Conv(3, 4, **REACHES[kind], stride=2 if resample == "down" else 1, up=resample == "up")
    conv.double().b.data.normal_()
    w = conv.v * (conv.g / conv.v.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    if resample == "up":  # the full transposed convolution, cropped
        full = F.pad(F.conv_transpose2d(x, w.transpose(0, 1), None, 2), (0, 2, 0, 2))
        top, left = {"vertical": (0, 1), "horizontal": (0, 0), "ordinary": (1, 1)}[kind]
        expected = full[:, :, top : top + 12, left : left + 16]
    else:
        pad = {"vertical": (1, 1, 1, 0), "horizontal": (1, 0, 1, 0), "ordinary": (1, 1, 1, 1),
               "first vertical": (1, 1, 1, 0), "first above": (1, 1, 0, 0),
               "first left": (0, 0, 1, 0)}[kind]
        y = F.conv2d(F.pad(x, pad), w, None, 2 if resample else 1)
        moved = kind in ("first vertical", "first above"), kind == "first left"
        expected = shifted(y, *map(int, moved))
    assert torch.allclose(conv(x), expected + conv.b.view(1, -1, 1, 1), atol=1e-12)


def test_data_dependent_initialisation_gives_mean_0_and_the_gain_as_deviation():
    """Every convolution's outputs on the images that it was made on; the heads start elsewhere."""
    model = build("grayscale", 16, **SMALL).double().eval()
    x = random_batch(32, model.views[-1].shape)
    model.initialise(x)
    seen = []
    convs = [module for module in model.modules() if isinstance(module, Conv)]
    for conv in convs:
        conv.register_forward_hook(lambda conv, _, y: seen.append((conv, y)))
    model.log_prob(x)
    assert len(seen) == len(convs) > 30 and {conv for conv, _ in seen} == set(convs)
    heads = [factor.net.last for factor in model.factors]
    for conv, y in seen:
        y = y.transpose(0, 1).flatten(1)
        if conv not in heads:
            assert torch.allclose(y.mean(1), torch.zeros(len(y), dtype=torch.float64), atol=1e-9)
        gain = torch.full((len(y),), conv.gain, dtype=torch.float64)
        assert torch.allclose(y.std(1), gain, rtol=1e-6)
    gains = {conv.gain for conv in convs}
    assert gains == {1.0, 0.1, 0.03}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_initialisation_is_a_function_of_the_weights_and_the_images(dropout):
    """In training mode, too, and it takes nothing from the global random state."""
    model = build("pyramid", 16, **{**SMALL, "dropout": dropout}).train()
    x = random_batch(8, (3, 16, 16))
    found = []
    for seed in (0, 1):
        other = copy.deepcopy(model)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        other.initialise(x)
        assert torch.equal(before, torch.get_rng_state()) and other.training
        found.append(other.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["factors.0.net.last.g"], model.factors[0].net.last.g)


def test_only_outermost_convolutions_keep_float32_in_bfloat16_training():
    """It has all its digits under autocast, an ordinary one does not (control)."""
    x = torch.randn(2, 3, 8, 8)
    for exact in (True, False):
        conv = Conv(3, 4, **pixelaux.VERTICAL, outermost=exact)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        assert y.dtype == (torch.float32 if exact else torch.bfloat16)
        assert torch.equal(y.float(), conv(x)) == exact


# --- Networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_every_factor_is_causal_and_sees_all_that_is_earlier(name):
    """Gradients in float64: exactly zero from outputs to later pixels and their own, nonzero to
    every earlier pixel and to their own pixel of x_hat."""
    size = {"pixelcnn": (8, 4), "grayscale": (4, 4), "pyramid": (8, 8)}.get(name, (4, 4))
    halvings = 1 if "pyramid" in name else -1  # so small that everything is within reach
    model = small(name, size, halvings=halvings, layout_light=((0, 3),))
    views = model.views_of(random_batch(1, model.views[-1].shape))
    for k, factor in enumerate(model.factors):
        c, h, w = factor.view.shape
        planes = factor.planes(views[k], factor.view.levels).requires_grad_()
        hat, e = None, ()
        if k:
            hat = factor.planes(views[k - 1], factor.view.psi.levels_out).requires_grad_()
            e = factor.embed(hat)
        out = factor.net(planes, e)
        for r, col in itertools.product(range(h), range(w)):
            wanted = [planes] if hat is None else [planes, hat]
            grads = torch.autograd.grad(out[0, :, r, col].abs().sum(), wanted, retain_graph=True)
            seen = grads[0][0, :c].reshape(c, -1) != 0
            here = r * w + col
            assert not seen[:, here:].any(), (k, r, col)
            assert seen[:, :here].all(), (k, r, col)
            if k:
                at = r * hat.shape[2] // h, col * hat.shape[3] // w
                assert grads[1][0, :-1, at[0], at[1]].bool().all()


def light(look_right=True, filters=4, blocks=3, c_out=20):
    """The pyramid's causal network without an embedding, in float64."""
    torch.manual_seed(0)
    return CausalNet(4, c_out, ((0, blocks),), filters, 0.0, False, look_right).double()


def test_a_light_network_that_does_not_look_right_is_blind_there_only():
    """look_right False: the output sees the rows above up to one column to its right, and all that
    is to its left; with look_right all of the rows above."""
    seen = []
    for net in (light(True), light(False)):
        planes = torch.randn(1, 4, 8, 8, dtype=torch.float64).requires_grad_()
        grad, = torch.autograd.grad(net(planes)[0, :, 4, 3].abs().sum(), planes)
        seen.append(grad[0].abs().sum(0) != 0)
    assert seen[0][:4].all() and seen[0][4, :3].all()
    assert seen[1][:4, :5].all() and seen[1][4, :3].all()
    assert not seen[1][:4, 5:].any()


@pytest.mark.parametrize("rows, columns, causal", [
    ((-2, -1), (-1, 1), True), ((-1, 0), (-1, 1), False), ((-3, -2), (-1, 1), True),
    ((-2, -1), (-2, 0), True)])
def test_the_causality_test_finds_a_shift_by_one(rows, columns, causal):
    """The vertical stream's first layer moved by one: down is not causal, and refused by the fast
    sampler; up and to the left are, and sampled as the naive one does."""
    factor = small("pyramid", (16, 16), halvings=1).factors[0]
    factor.net.v_first.rows, factor.net.v_first.columns = rows, columns
    planes = factor.planes(random_batch(1, (3, 8, 8)), 256).requires_grad_()
    grad, = torch.autograd.grad(factor.net(planes)[0, :, 3, 3].abs().sum(), planes)
    assert grad[0, :3].flatten(1)[:, 3 * 8 + 3 :].any() != causal
    assert grad[0, :3].flatten(1)[:, : 3 * 8 + 3].any()
    draw = Draw(torch.rand(1, 6, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        if causal:
            naive = sample_naive(factor, 1, None, draw)
            assert torch.equal(sample_fast(factor, 1, None, draw), naive)
        else:
            with pytest.raises(Problem, match="not causal"):
                sample_fast(factor, 1, None, draw)


def plain_elu(x):
    return torch.where(x > 0, x, torch.expm1(x))


def plain_block(block, x, *aux):
    """PixelCNN++'s gated_resnet, written out, without dropout."""
    both = lambda a: plain_elu(torch.cat([a, -a], 1))
    c = explicit(block.conv_in, both(x))
    assert len(aux) == len(block.conv_aux)
    for a, conv in zip(aux, block.conv_aux):
        c = c + explicit(conv, both(a))
    a, b = explicit(block.conv_out, both(c)).chunk(2, 1)
    return x + a / (1 + torch.exp(-b))


def plain_causal(net, layout, x, embeddings=()):
    """PixelCNN++'s two streams u and ul, the lists of the way down taken off their ends on the way
    back; one more auxiliary input, the embedding of the resolution."""
    u, ul = explicit(net.v_first, x), explicit(net.h_above, x) + explicit(net.h_left, x)
    way_down = {}
    for i, ((scale, blocks), stage) in enumerate(zip(layout, net.stages, strict=True)):
        if i and layout[i - 1][0] != scale:
            u, ul = explicit(stage.enter[0], u), explicit(stage.enter[1], ul)
        e = [embeddings[scale]] if net.conditional else []
        back, way_down[scale] = way_down.get(scale, []), []
        for j, (vertical, horizontal) in enumerate(stage.blocks):
            skip_u, skip_ul = ([v] for v in back[-1 - j]) if j < len(back) else ([], [])
            u = plain_block(vertical, u, *skip_u, *e)
            ul = plain_block(horizontal, ul, u, *skip_ul, *e)
            way_down[scale].append((u, ul))
        assert len(stage.blocks) == blocks
    return explicit(net.last, plain_elu(ul))


def plain_embedding(net, layout, x_hat):
    """One stream in the same way: its last output at each resolution, finest first."""
    y = explicit(net.first, x_hat)
    made = {}
    for i, ((scale, blocks), stage) in enumerate(zip(layout, net.stages, strict=True)):
        if i and layout[i - 1][0] != scale:
            y = explicit(stage.enter[0], y)
        back, made[scale] = made.get(scale, []), []
        for j in range(blocks):
            y = plain_block(stage.blocks[j][0], y, *([back[-1 - j]] if j < len(back) else []))
            made[scale].append(y)
    return [made[scale][-1] for scale in sorted(made)]


@pytest.mark.parametrize("name", SIZES)
def test_networks_equal_the_plain_implementation(name):
    """Layer after layer by masked convolutions; 2 blocks a stage, so that their order matters, or 3
    on the way up, of which the third has no skip."""
    two = tuple((halved, 2) for halved, _ in STAGES)
    layouts = dict(layout=two, layout_cond=two, layout_light=((0, 2), (1, 1), (0, 3)),
                   layout_embed=((1, 2), (2, 2), (1, 3), (0, 2)))
    model = small(name, **layouts)
    views = model.views_of(random_batch(2, model.views[-1].shape))
    for factor, x, x_hat in zip(model.factors, views, [None, *views]):
        psi = factor.view.psi or (model.views[1].psi if len(views) > 1 else None)
        light = psi is not None and psi.cell > 1
        ones = lambda x: torch.ones(2, 1, *x.shape[2:], dtype=torch.float64)
        unit = lambda x, levels: torch.cat([x.double() / (levels - 1) * 2 - 1, ones(x)], 1)
        planes, e = unit(x, factor.view.levels), ()
        if x_hat is not None:
            layout = layouts["layout_embed"] if light else two
            e = plain_embedding(factor.embed, layout, unit(x_hat, psi.levels_out))
            ours = factor.embeddings(x_hat)
            assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, e, strict=True))
        expected = plain_causal(factor.net, layouts["layout_light"] if light else two, planes, e)
        ours = factor.params(x, factor.embeddings(x_hat))
        assert torch.allclose(ours, expected, atol=1e-10)
        assert not torch.allclose(ours, expected.roll(1, 0), atol=1e-3)  # control


@pytest.mark.parametrize("name, changes", [
    ("pixelcnn", dict(layout=((0, 1), (1, 1)))), ("pixelcnn", dict(layout=((1, 1), (0, 1)))),
    ("pixelcnn", dict(layout=((0, 1), (2, 1), (0, 1)))), ("grayscale", dict(layout_cond=())),
    ("pyramid", dict(layout_light=((0, 1), (1, 1)))), ("pyramid", dict(layout_embed=((0, 1),))),
    ("pyramid", dict(layout_embed=((1, 1), (0, 1), (1, 1)))), ("pyramid", dict(layout_light=())),
    ("pyramid", dict(layout_light=((1, 1),))), ("pixelcnn", dict(layout=((1, 1), (1, 1)))),
    ("pyramid", dict(layout_light=STAGES, layout_embed=((1, 1), (0, 1)))),
    ("grayscale", dict(layout_cond=((0, 1), (-1, 1), (0, 1)))),
    ("pyramid", dict(layout_embed=((1, 1), (0, 1), (-1, 1), (0, 1))))])
def test_a_layout_that_leads_elsewhere_is_refused(name, changes):
    """When the model is built, and by name; one that leads back is not."""
    layout = next(iter(changes.values()))
    with pytest.raises(Problem, match=re.escape(f"layout {layout}: expected ")):
        small(name, (16, 16), **changes)
    small(name, (16, 16), **{field: ((0, 1), (1, 1), (0, 1)) for field in changes
                            if field != "layout_embed"})


def test_a_view_of_a_block_that_cannot_be_doubled_up_to_is_refused(monkeypatch):
    class Third(pixelaux.Psi):
        cell = 3

    monkeypatch.setitem(pixelaux.MODELS, "third", (Third,))
    with pytest.raises(Problem, match="the first one 1.58"):
        small("third", (12, 12))


def test_skips_are_from_the_last_stage_before_at_the_resolution():
    """Each of its blocks once, the last one first; more blocks than it has get none."""
    layout = ((0, 2), (1, 2), (0, 3), (1, 1), (0, 2))
    found = [[pixelaux.skip_source(layout, i, j) for j in range(blocks)]
             for i, (_, blocks) in enumerate(layout)]
    assert found == [[None] * 2, [None] * 2, [(0, 1), (0, 0), None], [(1, 1)], [(2, 2), (2, 1)]]


def test_block_counts_are_the_papers():
    """36 and 24 blocks, 3 light ones, 15 of an embedding, and the embedding reaches all of them."""
    blocks = lambda net: [module for module in net.modules() if isinstance(module, Block)]
    config = dict(nr_filters=2, nr_logistic_mix=1)
    pixelcnn = build("pixelcnn", 32, "cifar10", **config).factors[0]
    assert len(blocks(pixelcnn.net)) == 2 * 36  # two streams
    coarse, fine = build("grayscale", 32, "cifar10", **config).factors
    assert len(blocks(coarse.net)) == 2 * 36 and len(blocks(fine.net)) == 2 * 24
    assert len(blocks(fine.embed)) == 24
    pyramid = build("pyramid", 128, "celeba", **config).factors
    assert [factor.view.shape[1] for factor in pyramid] == [8, 16, 32, 64, 128]
    assert all(len(blocks(factor.net)) == 2 * 3 for factor in pyramid)
    assert all(len(blocks(factor.embed)) == 15 for factor in pyramid[1:])
    assert pyramid[0].embed is None
    config = dict(config, layout_light=((0, 1),))
    models = build("grayscale", 8, **SMALL), build("pyramid", 16, **config)
    for factor in (model.factors[1] for model in models):
        for block in blocks(factor.net):
            reached = []
            hooks = [conv.register_forward_hook(lambda _, x, y: reached.append(x[0]))
                     for conv in block.conv_aux]
            view = random_batch(1, factor.view.shape, factor.view.levels)
            e = factor.embeddings(factor.view.psi(view))
            factor.params(view, e)
            wanted = [pixelaux.concat_elu(each) for each in e]
            assert any(a.shape == b.shape and torch.equal(a, b) for a in reached for b in wanted)
            for hook in hooks:
                hook.remove()


def test_a_pyramid_of_one_view_is_light_too():
    """So small an image has no half; its one factor has the light network all the same."""
    factor, = build("pyramid", 8, "celeba", nr_filters=2, nr_logistic_mix=1).factors
    assert sum(isinstance(module, Block) for module in factor.net.modules()) == 2 * 3


# --- The model: normalisation, bound, tightness --------------------------------------------------

TINY = dict(nr_filters=4, layout=((0, 1), (1, 1), (0, 1)), layout_cond=((0, 1),),
            layout_light=((0, 2),), layout_embed=((1, 1), (0, 1)))


@functools.cache
def enumerable(name):
    """A model whose images can be enumerated, and all of them."""
    size, levels, more = {
        "pixelcnn": ((2, 2), 2, {}), "pyramid": ((2, 2), 2, dict(halvings=1)),
        "grayscale": ((1, 1), 16, dict(layout=((0, 1),)))}[name]
    model = small(name, size, levels=levels, wild=0.3, **{**TINY, **more})
    return model, all_images(model.views[-1].shape, levels)


@pytest.mark.parametrize("name", ["pixelcnn", "pyramid", "grayscale"])
def test_exact_likelihood_sums_to_one_over_all_images(name):
    """And is nowhere below the bound, which leaks (control)."""
    model, everything = enumerable(name)
    with torch.no_grad():
        tight, bound = model.log_prob(everything, tight=True), model.log_prob(everything)
    assert float(tight.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert (tight >= bound - 1e-9).all()
    if name == "pixelcnn":
        assert torch.allclose(tight, bound)
    else:
        assert float(bound.exp().sum()) < 0.99


def fits(model, views):
    """Of each pair of neighbouring views, whether one is psi of the other."""
    return [torch.equal(finer.psi(b), a) for finer, a, b in zip(model.views[1:], views, views[1:])]


def repeated(x_hat, n):
    return x_hat[None].expand(n, -1, -1, -1)


@pytest.mark.parametrize("name", ["pyramid", "grayscale"])
def test_the_gap_of_the_bound_is_the_leaked_mass(name):
    """sum over X of p(X, psi(X)) = 1 - sum over X^ of p(X^) P(psi(X) != X^ | X^): enumerated."""
    model, everything = enumerable(name)
    coarse, fine = model.factors
    leaked = joint = 0.0
    with torch.no_grad():
        for x_hat in all_images(coarse.view.shape, coarse.view.levels):
            p_hat = float(coarse(x_hat[None]).exp())
            p = fine(everything, repeated(x_hat, len(everything))).exp()
            assert float(p.sum()) == pytest.approx(1, abs=1e-9)
            wrong = (fine.view.psi(everything) != x_hat).flatten(1).any(1)
            leaked, joint = leaked + p_hat * float(p[wrong].sum()), joint + p_hat
        bound = float(model.log_prob(everything).exp().sum())
    assert joint == pytest.approx(1, abs=1e-9)
    assert bound == pytest.approx(1 - leaked, abs=1e-9) and leaked > 0.01


@pytest.mark.parametrize("name", ["pixelcnn", "pyramid", "grayscale"])
@pytest.mark.parametrize("tight", [False, True])
def test_samples_follow_the_model(name, tight):
    """chi^2 over all images; numbered one off they are far away (control)."""
    model, everything = enumerable(name)
    n, levels = 6000, model.config.levels
    sampled = model.sample(n, seed=7, tight=tight)[-1]
    with torch.no_grad():
        if tight or len(model.views) == 1:
            p = model.log_prob(everything, tight=True).exp()
        else:  # the marginal of X, over all X^
            coarse, fine = model.factors
            p, all_hats = 0.0, all_images(coarse.view.shape, coarse.view.levels)
            for x_hat in all_hats:
                given_hat = fine(everything, repeated(x_hat, len(everything))).exp()
                p = p + coarse(x_hat[None]).exp() * given_hat
    digits = levels ** np.arange(sampled[0].numel())[::-1]
    numbers = sampled.flatten(1).numpy().astype(np.int64) @ digits
    counts = np.bincount(numbers, minlength=len(everything))
    assert abs(chi_square(counts, p.numpy())) < 5
    assert chi_square(np.roll(counts, 1), p.numpy()) > 50


@pytest.mark.parametrize("name", SIZES)
def test_tight_is_at_least_the_bound_and_tight_samples_are_consistent(name):
    """Factor by factor; every view of a tight sample is psi of the next, of a loose one it is not
    (control)."""
    model = small(name)
    x = random_batch(4, model.views[-1].shape)

    def consistent(views):
        return all(fits(model, views))

    with torch.no_grad():
        for tight, bound in zip(model.log_prob_factors(x, tight=True), model.log_prob_factors(x)):
            assert (tight >= bound - 1e-9).all()
    assert consistent(model.sample(3, seed=1, tight=True))
    assert consistent(model.sample(3, seed=1, tight=True, mode="map"))
    assert consistent(model.sample(3, seed=1)) == (name == "pixelcnn")


def test_log_prob_is_the_sum_of_the_factors_in_nats():
    """Of each what it models given the coarser view, by hand; bits/dim of known nats."""
    model = small("pyramid")
    x = random_batch(2, model.views[-1].shape)
    with torch.no_grad():
        parts = model.log_prob_factors(x)
        views = [x]
        for _ in model.views[1:]:
            views.append(Half()(views[-1]))
        views = views[::-1]
        by_hand = []
        for factor, view, x_hat in zip(model.factors, views, [None, *views]):
            head = factor.head(factor.params(view, factor.embeddings(x_hat)))
            by_hand.append(head.log_prob(view).sum((1, 2)))
        assert all(torch.allclose(a, b) for a, b in zip(parts, by_hand, strict=True))
        assert torch.allclose(sum(parts), model.log_prob(x)) and parts[0].shape == (2,)
    assert bits_per_dim(-math.log(2) * 12, 3) == pytest.approx(4)


def test_sizes_that_do_not_fit_are_named_with_those_that_do():
    """And so are unknown names of models, presets and options."""
    for name, size, multiple in (
            ("pyramid", 38, 4), ("grayscale", (8, 6), 4), ("pixelcnn", 30, 4), ("pyramid", 17, 2)):
        with pytest.raises(Problem, match=f"multiples of {multiple}"):
            build(name, size)
    for name, size in (
            ("pyramid", (24, 40)), ("grayscale", (4, 12)), ("grayscale-pyramid", (16, 24))):
        assert build(name, size, **SMALL).views[-1].shape == (3, *size)
    for bad in (dict(name="nonsense", size=32), dict(name="pyramid", size=32, preset="huge"),
                dict(name="pyramid", size=32, nr_filtres=3)):
        with pytest.raises(Problem, match="expected one of"):
            build(**bad)
    with pytest.raises(Problem, match="multiples of 4"):  # f_w's own layout counts
        build("pyramid", 10, **{**SMALL, "halvings": 1})
    old = ((0, 1), (1, 1), (0, 1), (-1, 1))  # of an older version: counts from X^
    assert build("pyramid", 12, **{**SMALL, "halvings": 1, "layout_embed": old}).size_multiple == 4
    assert make_config("tiny", model="pyramid", steps=[3, 4]).steps == (3, 4)


def test_images_that_do_not_fit_are_a_problem_that_names_shape_and_type():
    """An empty batch, another type, another shape, too high levels; images of a view and of numpy
    are taken."""
    model = small("grayscale")
    x = random_batch(3, (3, 8, 4))
    for bad, named in (
            (x[:0], r"uint8 \(0, 3, 8, 4\)"), (x.float(), r"float32 \(3, 3, 8, 4\)"),
            (x.numpy().astype(np.int64), r"int64 \(3, 3, 8, 4\)"), (x[0], r"uint8 \(3, 8, 4\)"),
            (x[:, :1], r"uint8 \(3, 1, 8, 4\)"), (x.permute(0, 2, 3, 1), r"uint8 \(3, 8, 4, 3\)")):
        expected = r"expected images of 8x4: uint8 \(N, 3, 8, 4\).*got " + named
        with pytest.raises(Problem, match=expected):
            model.log_prob(bad)
        with pytest.raises(Problem):
            model.sample(len(bad), given=bad)
    with pytest.raises(Problem, match="0..15 of gray 8x4, got 77"):
        model.sample(3, given=torch.full((3, 1, 8, 4), 77, dtype=torch.uint8))
    with pytest.raises(Problem, match="n = 3 and 2 given"):
        model.sample(3, given=x[:2])
    for n in (0, -1):
        with pytest.raises(Problem, match=f"n = {n}"):
            model.sample(n)
    with pytest.raises(Problem, match="expected one of random, map"):
        model.sample(1, mode="mean")


@pytest.mark.parametrize("form", [
    lambda x: x, lambda x: x.copy("F"), lambda x: x[::-1][::-1], lambda x: x[::-1].copy()[::-1],
    lambda x: np.broadcast_to(x, x.shape), torch.from_numpy],
    ids=["array", "Fortran", "view", "negative strides", "read-only", "tensor"])
@pytest.mark.filterwarnings("error")
def test_numpy_arrays_are_as_good_as_tensors(form):
    """In log_prob and as given images, whatever their strides, without a warning."""
    model = small("grayscale")
    x = random_batch(3, (3, 8, 4))
    with torch.no_grad():
        assert torch.equal(model.log_prob(form(x.numpy())), model.log_prob(x))
        gray = Gray()(x)
        assert same(model.sample(3, given=form(gray.numpy())), model.sample(3, given=gray))


# --- The samplers --------------------------------------------------------------------------------


def plain_sample(model, n, seed, mode, tight):
    """Ancestral sampling by the ordinary forward pass, a pass a pixel: nothing of the samplers'."""
    done = []
    for k, factor in enumerate(model.factors):
        c, h, w = factor.view.shape
        generators = [np.random.default_rng((seed, k, i)) for i in range(n)]
        noise = np.stack([generator.random((2 * c, h, w)) for generator in generators])
        x = torch.zeros(n, c, h, w, dtype=torch.uint8)
        x_hat = done[-1] if done else None
        for r, col in itertools.product(range(h), range(w)):
            params = factor.params(x, factor.embeddings(x_hat))[:, :, r : r + 1, col : col + 1]

            def limits(drawn):
                y = x.clone()
                for channel, value in enumerate(drawn):
                    y[:, channel, r, col] = value[:, 0, 0, 0].to(torch.uint8)
                at = slice(len(drawn), len(drawn) + 1), slice(r, r + 1), slice(col, col + 1)
                return [v[(slice(None), *at)] for v in factor.view.psi.bounds(y, x_hat)]

            head = factor.kind_of_head(params.double(), factor.view.levels)
            u = torch.from_numpy(noise[:, :, r, col])[:, :, None, None]
            drawn = head.sample(u, mode, limits if tight and k else None)
            x[:, :, r, col] = drawn[:, :, 0, 0].to(torch.uint8)
        done.append(x)
    return done


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("mode, tight", [("random", False), ("random", True), ("map", False)])
def test_fast_and_naive_equal_plain_ancestral_sampling(name, mode, tight):
    """Integer for integer; progress counts every pixel once; another seed is other images."""
    model = small(name, (8, 8), halvings=1 if "pyramid" in name else -1)
    pixels = 2 * sum(math.prod(view.shape[1:]) for view in model.views)
    with torch.no_grad():
        expected = plain_sample(model, 2, 3, mode, tight)
    for fast in (True, False):
        counted = []
        ours = model.sample(
            2, seed=3, mode=mode, tight=tight, fast=fast, progress=counted.append)
        assert same(ours, expected) and sum(counted) == pixels
    assert not same(ours, model.sample(2, seed=4, mode=mode, tight=tight))


@pytest.mark.parametrize("name, size, n", [
    ("pixelcnn", (4, 12), 1), ("pixelcnn", (8, 8), 3), ("grayscale", (8, 4), 5),
    ("pyramid", (8, 24), 1), ("pyramid", (12, 20), 2), ("pyramid", (8, 8), 7),
    ("pixelcnn", (4, 48), 2), ("grayscale", (4, 4), 2), ("grayscale", (4, 44), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_equals_naive_integer_for_integer(name, size, n, dtype):
    """Raster order and wavefront, one image and several, with and without large products."""
    model = small(name, size, dtype=dtype, nr_filters=24, halvings=1 if name == "pyramid" else -1)
    for seed in range(2 if dtype == torch.float32 else 1):
        assert same(model.sample(n, seed=seed), model.sample(n, seed=seed, fast=False))


def test_packed_products_are_the_products(monkeypatch):
    """oneDNN's packed weights, with a bias or rows added, equal float64's product."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    packed = []
    for count, shape in itertools.product((1, 8, 33), ((300, 200), (64, 1000), (5, 7))):
        x, weight = torch.randn(count, shape[1]), torch.randn(shape)
        ours = pixelaux.product(weight, count)
        packed.append(ours.__name__ == "add_product")
        for added in (torch.randn(shape[0]), torch.randn(count, shape[0])):
            expected = added.double() + x.double() @ weight.double().t()
            assert torch.allclose(ours(added, x).double(), expected, atol=1e-3)
    if torch.backends.mkldnn.is_available():
        assert any(packed) and not all(packed)


def test_buffers_go_with_the_plan():
    """At once, without a garbage collection: those of 16 images are gigabytes."""
    gc.disable()
    try:
        plan = Plan(light(True, filters=2), 4, 1, (16, 32))
        nodes = [weakref.ref(node) for node in (plan.x, *plan.nodes)]
        assert all(node() for node in nodes)  # control
        del plan
        assert not any(node() for node in nodes)
    finally:
        gc.enable()


@pytest.mark.parametrize("look_right, lag, steps", [(True, 8, 1144), (False, 2, 382)])
def test_the_light_networks_wavefront(look_right, lag, steps):
    """Three blocks: the stated lag, 128x128 pixels in the stated steps, each drawn once."""
    with torch.no_grad():
        plan = Plan(light(look_right, filters=2), 4, 1, (128, 128))
    drawn = [due[plan.output.group] for due in plan.steps() if plan.output.group in due]
    assert plan.lag == lag and len(drawn) == steps
    positions = [rc for pixels in drawn for rc in zip(*pixels.positions())]
    assert sorted(positions) == list(itertools.product(range(128), range(128)))


def reads_of(node):
    """(source, dy, dx) of all values that a node of a Plan is made of."""
    for read in node.reads:
        for row, column in itertools.product(range(read.nr_rows), range(read.nr_columns)):
            if not read.source.known:
                yield read.source, read.top + row * read.apart, read.left + column * read.apart


def test_places_lie_on_a_diagonal_or_in_a_row():
    places = pixelaux.Places(row=2, column=25, count=3, row_step=2, column_step=-8)
    assert places.positions() == ([2, 4, 6], [25, 17, 9])
    places = pixelaux.Places(row=2, column=0, count=3, row_step=0, column_step=4)
    assert places.positions() == ([2, 2, 2], [0, 4, 8])


@given(st.data())
@settings(max_examples=30)
def test_a_window_is_what_a_read_tells(data):
    """Of each image, at each place, the rectangle of values, by plain indices; zeros beyond."""
    def whole(low, high):
        return data.draw(st.integers(low, high))

    n, channels, apart = whole(1, 2), whole(1, 3), whole(1, 2)
    nr_rows, nr_columns, top, left = whole(1, 3), whole(1, 3), whole(-3, 0), whole(-3, 0)
    places = data.draw(st.sampled_from([
        pixelaux.Places(0, 6, 3, 1, -2), pixelaux.Places(2, 4, 2, 2, -4),
        pixelaux.Places(4, 0, 4, 0, 2), pixelaux.Places(5, 0, 1, 0, 0)]))
    source = pixelaux.Node(1, channels, margin=(3, 3, 4))
    values = torch.randn(n, 6, 8, channels)
    source.buffer = F.pad(values, (0, 0, 3, 4, 3, 4))
    read = pixelaux.Read(source, None, top, left, nr_rows, nr_columns, apart)
    window = source.window(places, read)
    assert window.shape == (n, places.count, nr_rows, nr_columns, channels)
    beyond = 0
    for p, (r, c) in enumerate(zip(*places.positions())):
        assert torch.equal(source.window(places)[:, p, 0, 0], values[:, r, c])
        for i, j in itertools.product(range(nr_rows), range(nr_columns)):
            y, x = r + top + i * apart, c + left + j * apart
            inside = 0 <= y < 6 and 0 <= x < 8
            beyond += not inside
            expected = values[:, y, x] if inside else torch.zeros(n, channels)
            assert torch.equal(window[:, p, i, j], expected)


@pytest.mark.parametrize("layout, size, lag", [
    (((0, 3),), (16, 32), 8), (((0, 3),), (8, 8), None), (((0, 5),), (6, 8), None),
    (STAGES, (8, 12), None),
    (STAGES, (4, 48), 36), (((0, 1), (1, 2), (0, 1)), (8, 24), 16)])
def test_every_activation_is_evaluated_once_after_all_that_it_reads(layout, size, lag):
    """Each node at each position of its resolution in exactly one step; each pixel drawn in one
    step, that of the output there; of what it reads, nodes before it, pixels in an earlier step.
    Where no lag below the width will do, what depends on the rows above alone is evaluated a row at
    once."""
    net = CausalNet(4, 20, layout, 2, 0.0, False).double()
    with torch.no_grad():
        plan = Plan(net, 4, 1, size)
    assert plan.lag == lag
    steps, drawn, done = list(plan.steps()), {}, {}
    for step, due in enumerate(steps):
        pixels = due.get(plan.output.group)
        for when, places in due.items():
            for position in zip(*places.positions()):
                assert (when, position) not in done
                done[when, position] = step
        for position in zip(*pixels.positions()) if pixels else ():
            assert position not in drawn
            drawn[position] = step
    assert set(drawn) == set(itertools.product(*map(range, size)))
    order = {node: i for i, node in enumerate(plan.nodes)}
    assert plan.output in order
    for node in plan.nodes:
        positions = list(itertools.product(*(range(0, side, node.spacing) for side in size)))
        for r, c in positions:
            step = done[node.group, (r, c)]
            for source, dy, dx in reads_of(node):
                at = r + dy, c + dx
                if not (0 <= at[0] < size[0] and 0 <= at[1] < size[1]):
                    continue  # a zero
                if at[0] % source.spacing or at[1] % source.spacing:
                    assert source.spacing > node.spacing  # a zero between
                elif source is plan.x:
                    assert drawn[at] < step
                else:
                    assert (done[source.group, at], order[source]) < (step, order[node])
        assert sum(when == node.group for when, _ in done) == len(positions)
    assert all(done[plan.output.group, position] == step for position, step in drawn.items())
    if lag is None:  # pixels are drawn one by one
        assert len(drawn) == sum(plan.output.group in due for due in steps)
        rows_back = {plan.x: 0}  # the fewest, over all paths to x
        for node in plan.nodes:
            rows_back[node] = min(rows_back[source] - dy for source, dy, _ in reads_of(node))
            by_rows = rows_back[node] > 0 and node is not plan.output
            assert node.ahead == (math.inf if by_rows else 0)


def test_what_is_made_of_rows_above_and_of_what_is_known_is_by_rows():
    """In raster order v is a row at once in conditional networks, too."""
    for layout in (((0, 2),), STAGES):
        net = CausalNet(4, 20, layout, 2, 0.0, True).double()
        known = [torch.randn(1, 2, 8 >> halved, 4 >> halved, dtype=torch.float64)
                 for halved in range(1 + max(halved for halved, _ in layout))]
        with torch.no_grad():
            plan = Plan(net, 4, 1, (8, 4), known)
        rows_back = {plan.x: 0}
        for node in plan.nodes:
            back = [rows_back[source] - dy for source, dy, _ in reads_of(node)]
            rows_back[node] = min(back, default=math.inf)
            by_rows = rows_back[node] > 0 and node is not plan.output
            assert node.ahead == (math.inf if by_rows else 0)


class Own:
    """What the samplers ask of a factor, around any causal network, for images of one channel."""

    kind_of_head = Categorical
    head = Factor.head

    def __init__(self, net, size, levels=6, embedding=None):
        self.net, self.view = net.double().eval(), View((1, *size), levels)
        self.a_weight = next(net.parameters())
        self.embedding = embedding

    def embeddings(self, x_hat):
        return () if self.embedding is None else (self.embedding,)

    def planes(self, x):
        unit = x.double() * 2 / (self.view.levels - 1) - 1
        return torch.cat([unit, torch.ones_like(unit)], 1)

    def params(self, x, embeddings):
        return self.net(self.planes(x), embeddings)


def slow_sample(own, n, noise):
    """Pixel by pixel with masked kernels and numpy's cumulative sums: nothing of the samplers'."""
    (_, height, width), x = own.view.shape, torch.zeros(n, *own.view.shape, dtype=torch.uint8)
    with mock.patch.object(Conv, "forward", explicit), torch.no_grad():
        for r, c in itertools.product(range(height), range(width)):
            logits = own.net(own.planes(x), own.embeddings(None))[:, :, r, c].numpy()
            p = np.exp(logits - logits.max(1, keepdims=True))
            cdf = np.cumsum(p, 1) / p.sum(1, keepdims=True)
            x[:, 0, r, c] = torch.from_numpy((cdf < noise[:, 0, r, c, None].numpy()).sum(1))
    return x


def fast_and_slow(own, n, seed=0):
    """(by the fast sampler, by the oracle); the naive one has been found equal to the oracle."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, 2, *own.view.shape[1:], dtype=torch.float64, generator=generator)
    expected = slow_sample(own, n, noise)
    with torch.no_grad():
        assert torch.equal(sample_naive(own, n, None, Draw(noise)), expected)
        assert not torch.equal(sample_naive(own, n, None, Draw(1 - noise)), expected)  # control
        return sample_fast(own, n, None, Draw(noise)), expected


class OneStream(nn.Module):
    """Wide kernels, nn.ELU, torch.tanh, a method call, a skip connection by addition."""

    def __init__(self, c_in, c_out, filters=5):
        super().__init__()
        self.first = Conv(c_in, filters, rows=(-3, -1), columns=(-2, 2))
        self.left = Conv(c_in, filters, rows=(0, 0), columns=(-3, -1))
        self.more = nn.Sequential(
            nn.ELU(), Conv(filters, filters, rows=(-2, 0), columns=(-2, 0)), nn.Tanh(),
            Conv(filters, filters, rows=(-1, 0), columns=(-1, 0)))
        self.head = Conv(filters, c_out, rows=(0, 0), columns=(0, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        h = self.first(x) + self.left(x)
        skip = torch.tanh(h) * 0.5
        h = self.more(h) + skip
        return self.head(h.sigmoid() + h)


class OneConvolution(nn.Module):
    """As little as can be: rows above and the left, one product."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.above = Conv(c_in, c_out, rows=(-1, -1), columns=(-1, 0), gain=2.0)
        self.left = Conv(c_in, c_out, rows=(0, 0), columns=(-1, -1), gain=2.0)

    def forward(self, x, embeddings=()):
        return self.above(x) + self.left(x)


class RowsAbove(nn.Module):
    """Sees the rows above and nothing of its own."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.above = Conv(c_in, 4, rows=(-2, -1), columns=(-1, 1))
        self.head = Conv(4, c_out, rows=(-1, 0), columns=(-1, 1), gain=2.0)

    def forward(self, x, embeddings=()):
        return self.head(F.elu(self.above(x)))


class Hourglass(nn.Module):
    """Down by stride 2 and up again, an addition over it, a number, a gate; gone down twice."""

    def __init__(self, c_in, c_out, filters=4):
        super().__init__()
        reach = dict(rows=(-2, 0), columns=(-1, 0))
        self.first = Conv(c_in, filters, rows=(-1, 0), columns=(-1, -1))
        self.above = Conv(c_in, filters, rows=(-2, -1), columns=(-2, 2))
        self.right = Conv(filters, filters, rows=(-1, 0), columns=(-1, 1), stride=1)
        self.down = Conv(filters, filters, **reach, stride=2)
        self.deeper = Conv(filters, filters, **reach, stride=2)
        self.higher = Conv(filters, filters, rows=(-1, 0), columns=(-2, 0), up=True)
        self.up = Conv(filters, 2 * filters, rows=(-1, 0), columns=(-1, 0), up=True)
        self.head = Conv(filters, c_out, rows=(-1, 0), columns=(-1, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        v = self.above(x)
        h = self.first(x) + self.right(torch.tanh(v))
        low = self.down(F.elu(h))
        low = low + 0.5 * self.higher(torch.sin(self.deeper(low)))
        return self.head(pixelaux.gate(h, self.up(F.elu(low))))


class LooksAhead(nn.Module):
    """Values that see far to the right in their own row, more than that is wide, are read from the
    row below alone."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.first = Conv(c_in, 4, rows=(0, 0), columns=(-1, 1))
        self.right, self.more = (Conv(4, 4, rows=(-1, 0), columns=(-2, 2)) for _ in range(2))
        self.above = Conv(4, 4, rows=(-1, -1), columns=(-1, 1))
        self.left = Conv(c_in, 4, rows=(0, 0), columns=(-2, -1))
        self.head = Conv(4, c_out, rows=(0, 0), columns=(0, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        row = self.more(torch.tanh(self.right(torch.tanh(self.first(x)))))
        return self.head(F.elu(self.above(torch.sin(row)) + self.left(x)))


class FarAbove(nn.Module):
    """Its first layer ends two rows above its own."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.far = Conv(c_in, 4, rows=(-3, -2), columns=(-1, 1))
        self.left = Conv(c_in, 4, rows=(0, 0), columns=(-2, -1))
        self.head = Conv(4, c_out, rows=(-1, 0), columns=(-1, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        return self.head(F.elu(self.far(x) + self.left(x)))


class LooksRight(nn.Module):
    """What it sees of its row ends so far to the left that the next layer may look right: it is
    computed before its pixel is due, and yet after what is of the rows above."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.above = Conv(c_in, 4, rows=(-1, -1), columns=(-1, 1))
        self.left = Conv(c_in, 4, rows=(0, 0), columns=(-3, -2))
        self.right = Conv(4, 4, rows=(-1, 0), columns=(-1, 1))
        self.head = Conv(4, c_out, rows=(0, 0), columns=(0, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        return self.head(F.elu(self.right(torch.tanh(self.above(x) + self.left(x)))))


class LooksDown(nn.Module):
    """Its first layer sees the rows from the second above on; its second one looks a row down."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.above = Conv(c_in, 4, rows=(-3, -2), columns=(-1, 1))
        self.below = Conv(4, 4, rows=(-1, 1), columns=(-1, 1))
        self.left = Conv(c_in, 4, rows=(0, 0), columns=(-2, -1))
        self.head = Conv(4, c_out, rows=(0, 0), columns=(0, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        return self.head(F.elu(self.below(self.above(x).tanh()) + self.left(x)))


class UsedTwice(nn.Module):
    """A convolution that is a term of a sum, which is read to the right, and is also used by
    itself: what it reads is at hand for the sum, but not for itself. One that reads the left."""

    def __init__(self, c_in, c_out, filters=4):
        super().__init__()
        self.above = Conv(c_in, filters, rows=(-1, -1), columns=(-1, 1))
        self.point, self.other = (
            Conv(filters, filters, rows=(0, 0), columns=(0, 0)) for _ in range(2))
        self.right = Conv(filters, filters, rows=(-1, 0), columns=(-1, 1))
        self.left = Conv(filters, filters, rows=(0, 0), columns=(-1, -1))
        self.head = Conv(filters, c_out, rows=(0, 0), columns=(0, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        v = self.above(x)
        a = self.point(torch.tanh(v))
        both = a + self.other(torch.sin(v))
        b = torch.sin(a)
        return self.head(F.elu(self.right(F.elu(both))) + self.left(b) * b)


class TwoReaches(nn.Module):
    """A value that two layers read: one at its own position, the other two columns further right."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.above = Conv(c_in, 4, rows=(-1, -1), columns=(-1, 1))
        self.left = Conv(c_in, 4, rows=(0, 0), columns=(-4, -3))
        self.near = Conv(4, 4, rows=(0, 0), columns=(0, 0))
        self.far = Conv(4, c_out, rows=(-1, 0), columns=(-2, 2), gain=2.0)
        self.head = Conv(4, c_out, rows=(0, 0), columns=(0, 0), gain=2.0)

    def forward(self, x, embeddings=()):
        h = torch.tanh(self.above(x) + self.left(x))
        return self.head(torch.tanh(self.near(h))) + self.far(h)


class UpInOneRow(nn.Module):
    """A Conv that doubles the resolution by one row: in odd rows it reads zeros alone."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.above = Conv(c_in, 4, rows=(-1, -1), columns=(-7, 7))
        self.left = Conv(c_in, 4, rows=(-1, 0), columns=(-1, -1))
        self.down = Conv(4, 4, rows=(-1, 0), columns=(-1, 0), stride=2)
        self.up = Conv(4, 4, rows=(0, 0), columns=(-1, 0), up=True)
        self.skip, self.head = (
            Conv(4, filters, rows=(0, 0), columns=(0, 0), gain=2.0) for filters in (4, c_out))

    def forward(self, x, embeddings=()):
        h = self.above(x) + self.left(x)
        return self.head(F.elu(self.up(F.elu(self.down(F.elu(h)))) + self.skip(h)))


@pytest.mark.parametrize("net, size, lag", [
    (UpInOneRow, (8, 4), None), (UpInOneRow, (8, 2), None), (UpInOneRow, (6, 24), 8),
    (TwoReaches, (5, 6), 4), (TwoReaches, (5, 5), 4),
    (TwoReaches, (5, 4), None), (TwoReaches, (5, 3), None), (OneStream, (6, 20), 3), (OneStream, (5, 3), None), (OneStream, (7, 1), None),
    (UsedTwice, (5, 9), 3), (UsedTwice, (5, 3), None),
    (OneConvolution, (5, 7), 1), (OneConvolution, (4, 1), None), (OneConvolution, (1, 1), None),
    (RowsAbove, (5, 9), 3), (RowsAbove, (5, 2), None), (LooksAhead, (4, 12), 7),
    (LooksAhead, (4, 3), None), (LooksAhead, (4, 1), None),
    (FarAbove, (7, 9), 1), (FarAbove, (7, 1), None),
    (LooksRight, (4, 9), 3), (LooksRight, (4, 3), None), (LooksRight, (4, 2), None),
    (Hourglass, (8, 24), 4), (Hourglass, (8, 4), None)],
    ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_network_of_ones_own_is_sampled_fast(net, size, lag):
    """Networks that the project does not contain: kernels, depth, strides, functions, additions; in
    wavefront and in raster order; equal to the oracle integer for integer."""
    torch.manual_seed(0)
    own = Own(net(2, 6), size)
    ours, expected = fast_and_slow(own, 3)
    assert torch.equal(ours, expected)
    with torch.no_grad():
        plan = Plan(own.net, 2, 3, size)
    assert plan.lag == lag


FUNCTIONS = ["tanh", "sigmoid", "elu", "module", "number", "square", "concat"]


class Made(nn.Module):
    """A causal network made at random. Values are of two kinds, as PixelCNN++'s streams: "v" depend
    on the rows above alone, "h" also on what is to the left; so "h" may not become "v"."""

    def __init__(self, rng, c_in, c_out, scales):
        super().__init__()
        self.convs, self.program, self.rng = nn.ModuleList(), [], rng
        self.values = [("x", 0, c_in)]  # kind, resolution, channels
        self.unused = set()
        self.conv(0, "v")
        self.conv(0, "h")
        if rng.random() < 0.5:
            filters = self.values[2][2]
            self.do("add", "h", 0, filters, 2, self.conv(0, "h", filters))
        for _ in range(rng.integers(3, 9)):
            i = int(rng.integers(1, len(self.values)))
            kind, scale, channels = self.values[i]
            step = rng.choice(["conv", "conv", "down", "up", "function", "add", "known"])
            if step == "conv":
                self.conv(i, rng.choice(["v", "h"]) if kind == "v" else "h")
            elif step == "down" and scale < scales:
                self.conv(i, kind, stride=2)
            elif step == "up" and scale > 0:
                self.conv(i, kind, up=True)
            elif step == "function":
                function = rng.choice(FUNCTIONS)
                self.do(str(function), kind, scale, channels * (1 + (function == "concat")), i)
            elif step == "add":
                like = [j for j, v in enumerate(self.values) if j and v[1:] == (scale, channels)]
                j = int(rng.choice(like))
                if j != i:
                    kind = max(kind, self.values[j][0], key="vh".index)
                    self.do("add", kind, scale, channels, i, j)
            elif step == "known" and scale == 0:
                self.convs.append(Conv(3, channels, rows=(-1, 1), columns=(-1, 0)))
                self.do("known", kind, 0, channels, i, len(self.convs) - 1)
        self.program.append(("sum", self.finish(c_out)))

    def do(self, name, kind, scale, channels, i, *more):
        self.program.append((name, i, *more))
        self.values.append((str(kind), scale, int(channels)))
        self.unused -= {i} | (set(more) if name == "add" else set())
        self.unused.add(len(self.values) - 1)
        return len(self.values) - 1

    def conv(self, i, to, filters=None, **change):
        rng, (kind, scale, channels) = self.rng, self.values[i]
        up = change.get("up", False)
        above = (kind == "x" and to == "v" or rng.random() < 0.3) and not up
        rows = (-above - int(rng.integers(0, 3)), -above)
        reach = int(rng.integers(0, 3))
        columns = (-reach, int(rng.integers(0, reach + 1)))
        if kind != "v" and not above:
            last = -1 if kind == "x" else 0
            columns = (last - int(rng.integers(0, 3)), last)
        filters = filters or int(rng.integers(2, 5))
        self.convs.append(Conv(channels, filters, rows, columns, gain=1.5, **change))
        scale += change.get("stride", 1) - 1 - up
        return self.do("conv", to, scale, filters, i, len(self.convs) - 1)

    def finish(self, c_out):
        """Everything that nothing reads is brought to the output."""
        outputs = []
        while self.unused:
            i = min(self.unused)
            kind, scale, channels = self.values[i]
            j = self.conv(i, kind, filters=c_out, **(dict(up=True) if scale else {}))
            if not scale:
                self.unused.discard(j)
                outputs.append(j)
        return outputs

    def forward(self, x, embeddings=()):
        values = [x]
        for name, i, *more in self.program:
            a = None if name == "sum" else values[i]
            if name == "conv":
                a = self.convs[more[0]](a)
            elif name == "add":
                a = a + values[more[0]]
            elif name == "known":
                a = a + self.convs[more[0]](embeddings[0])
            elif name == "tanh":
                a = torch.tanh(a)
            elif name == "sigmoid":
                a = a.sigmoid()
            elif name == "elu":
                a = F.elu(a)
            elif name == "module":
                a = F.leaky_relu(a, negative_slope=0.3)
            elif name == "number":
                a = 1.5 * a - 0.25
            elif name == "square":
                a = a * a
            elif name == "concat":
                a = pixelaux.concat_elu(a)
            elif name == "sum":
                return functools.reduce(lambda total, j: total + values[j], i[1:], values[i[0]])
            values.append(a)


@given(seed=st.integers(0, 10**6), scales=st.integers(0, 2), n=st.integers(1, 3),
       size=st.sampled_from([(4, 4), (4, 8), (8, 4), (4, 12), (4, 24), (8, 16)]))
@settings(max_examples=50)
def test_any_causal_network_is_sampled_fast(seed, scales, n, size):
    """Networks made at random, with known embeddings, in wavefront and in raster order: equal to
    the oracle integer for integer."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = Made(rng, 2, 6, scales)
    for conv in net.convs:
        conv.b.data.normal_(std=0.5)
    own = Own(net, size, embedding=torch.randn(n, 3, *size, dtype=torch.float64))
    ours, expected = fast_and_slow(own, n, seed)
    assert torch.equal(ours, expected)


def test_networks_made_at_random_are_causal_and_of_many_kinds():
    """A control of the test above: no output sees its pixel or a later one; both orders occur."""
    lags = []
    for seed in range(12):
        net = Made(np.random.default_rng(seed), 2, 6, seed % 3)
        own = Own(net, (8, 12), embedding=torch.randn(1, 3, 8, 12, dtype=torch.float64))
        planes = torch.randn(1, 2, 8, 12, dtype=torch.float64).requires_grad_()
        out = net(planes, own.embeddings(None))
        grad, = torch.autograd.grad(out[0, :, 5, 6].abs().sum(), planes)
        assert not grad.flatten(2)[0, :, 5 * 12 + 6 :].any() and grad.any()
        with torch.no_grad():
            plans = [Plan(net, 2, 1, (8, 12), own.embeddings(None)),
                     Plan(net, 2, 1, (4, 4), (torch.ones(1, 3, 4, 4).double(),))]
        lags += [plan.lag for plan in plans]  # None: raster order
    assert {1, 2, 3, None} <= set(lags)


class Around(nn.Module):
    """A causal network in which something is done `between` its first layer and its head."""

    def __init__(self, between, size, levels=6):
        super().__init__()
        self.between = between
        self.first = Conv(2, 4, rows=(-1, -1), columns=(-1, 1))
        self.left = Conv(2, 4, rows=(0, 0), columns=(-1, -1))
        self.more = Conv(4, 4, rows=(-1, 0), columns=(-1, 0))
        self.one = Conv(4, 1, rows=(-1, 0), columns=(-1, 0))
        self.head = Conv(4, levels, rows=(0, 0), columns=(0, 0), gain=2.0)
        self.scale = nn.Parameter(1 + torch.rand(1, 4, 1, 1))
        self.flat = nn.Parameter(1 + torch.rand(4, 1, 1))
        self.number = nn.Parameter(torch.tensor(1.7))
        self.place = nn.Parameter(torch.randn(1, 4, *size))
        self.norm = nn.GroupNorm(2, 4)
        self.point = nn.Conv2d(4, 4, 1)
        self.elu_in_place = nn.ELU(inplace=True)

    def forward(self, x, embeddings=()):
        return self.head(self.between(self, self.first(x) + self.left(x), x))


def two_of_chunk(net, h, x):
    a, b = h.chunk(2, 1)
    return h * (a * b).sum(1, keepdim=True)


def elu_in_place(net, h, x):
    more = net.more(h)
    F.elu(h, inplace=True)
    return h * more + net.more(h)


def module_in_place(net, h, x):
    more = net.more(h)
    return net.elu_in_place(h) * more + h


def plus_equals(net, h, x):
    more = net.more(h)
    h += 1.0
    return h * more + net.more(h)


def one_channel_in_place(net, h, x):
    one, more = net.one(h).sin(), net.more(h)
    one.relu_()
    return one * more


def plus_equals_of_two_names(net, h, x):
    other = h
    h += 1.0
    return h * other


def plus_equals_a_value(net, h, x):
    other = net.more(h)
    more = other
    more += h
    return h * other


def known_that_changes(net, h, x):
    known = net.place - 0.5
    before = h + known
    known.relu_()
    return before * (h + known)


def number_that_changes(net, h, x):
    number = net.number * 1
    before = h * number
    number.add_(1)
    return before + torch.tanh(h * number)


def alike_in_print(net, h, x):
    low, high = (torch.clamp(h, min=torch.tensor(m).double()) for m in (0.12341, 0.12344))
    return (high - low) * 1e5 + h


centred = wrap_torch_function(lambda x: (x,))(lambda x: x - x.mean())


AT_ONE_POSITION = {  # functions of values at one position: they must be right
    "none": lambda net, h, x: h,
    "functions": lambda net, h, x: torch.clamp(F.leaky_relu(h, 0.2), min=-0.5) ** 2 / 3 - (1 - h),
    "the larger one": lambda net, h, x: torch.maximum(h, net.more(h)),
    "slices": lambda net, h, x: h * h[:, :1] + h[:, 1:2] * h[:, 2:3],
    "softmax over channels": lambda net, h, x: h.softmax(1) * h,
    "h + h": lambda net, h, x: h + h,
    "gate of a known tensor": lambda net, h, x: pixelaux.gate(net.place, torch.cat([h, net.more(h)], 1)),
    "gate of a parameter": lambda net, h, x: pixelaux.gate(net.scale, torch.cat([h, h], 1)),
    "gate by a known tensor": lambda net, h, x: pixelaux.gate(h, torch.cat([net.place, net.place], 1)),
    "by keyword": lambda net, h, x: pixelaux.gate(net.more(x=h), y=pixelaux.concat_elu(x=h)),
    "difference": lambda net, h, x: net.more(h) - h,
    "difference of convolutions": lambda net, h, x: h - net.more(h.sin()) - net.more(h),
    "a vector over columns": lambda net, h, x: h * net.place[0, 0, 0],
    "a matrix over the image": lambda net, h, x: net.more(h) + net.place[0, 0],
    "a convolution twice": lambda net, h, x: net.more(h) + net.more(h),
    "a convolution read twice": lambda net, h, x: F.elu(net.more(h)) + net.more(h),
    "an unused value": lambda net, h, x: (torch.tanh(net.more(h)), h)[1],
    "a function of x": lambda net, h, x: h + net.first(x * 0.5),
    "one channel and four": lambda net, h, x: net.one(h) + net.more(h),
    "one channel and a function": lambda net, h, x: net.one(h) + F.elu(h),
    "cat": lambda net, h, x: torch.cat([h, h.tanh()], 1)[:, 2:6],
    "keyword": lambda net, h, x: torch.sigmoid(input=h),
    "convolution by keyword": lambda net, h, x: net.more(x=h),
    "other=": lambda net, h, x: torch.mul(h, other=net.more(h)),
    "parameter (1, C, 1, 1)": lambda net, h, x: net.scale * h,
    "parameter (1, C, 1, 1) added": lambda net, h, x: net.more(h) + net.scale,
    "parameter (C, 1, 1)": lambda net, h, x: net.flat * h,
    "parameter ()": lambda net, h, x: net.number * h,
    "parameter () added": lambda net, h, x: net.more(h) + net.number,
    "parameter (1, C, H, W)": lambda net, h, x: F.elu(h) * net.place,
    "parameter (1, C, H, W) added": lambda net, h, x: net.more(h) + net.place,
    "parameter by keyword": lambda net, h, x: torch.mul(h, other=net.scale),
    "a known tensor that changes": known_that_changes, "a number that changes": number_that_changes,
    "products of known tensors": lambda net, h, x: h * (net.place * 2) - h * (net.place * 3),
    "a look at the kind": lambda net, h, x: h.tanh() if isinstance(h, torch.Tensor) else h * 2,
}
REFUSED_OR_RIGHT = {
    "stack": lambda net, h, x: torch.stack([h, h.tanh()]).sum(0),
    "chunk": two_of_chunk,
    "where": lambda net, h, x: torch.where(h > 0, h, 0.1 * h),
    "+=": plus_equals, "+= of two names": plus_equals_of_two_names,
    "+= of a value": plus_equals_a_value, "group_norm": lambda net, h, x: F.group_norm(h, 2) + h,
    "in place": elu_in_place, "module in place": module_in_place,
    "method in place": lambda net, h, x: net.more(h) + h.relu_(),
    "over the columns: softmax": lambda net, h, x: h.softmax(-1),
    "over the columns: cumsum": lambda net, h, x: h.cumsum(-1),
    "over the columns: flip": lambda net, h, x: h.flip(-1),
    "over the image: mean": lambda net, h, x: h - h.mean((2, 3), keepdim=True),
    "over all images: mean": lambda net, h, x: h - h.mean(),
    "over the image: nn.GroupNorm": lambda net, h, x: net.norm(h),
    "over all that it gets": lambda net, h, x: centred(h),
    "one channel in place": one_channel_in_place, "numbers that print alike": alike_in_print,
    "nn.Conv2d": lambda net, h, x: net.point(h),
    "channels by shape": lambda net, h, x: h * h.shape[1],
    "if": lambda net, h, x: h if h.sum() > 0 else -h,
}


def sampled_around(between, size, n=3):
    """(by the fast sampler, by the naive one)."""
    torch.manual_seed(0)
    own = Own(Around(between, size), size)
    noise = torch.rand(n, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        naive = sample_naive(own, n, None, Draw(noise))
        return sample_fast(own, n, None, Draw(noise)), naive


@pytest.mark.parametrize("size", [(6, 14), (6, 2)], ids=["wavefront", "raster"])
@pytest.mark.parametrize("name", AT_ONE_POSITION)
def test_functions_of_values_at_one_position_are_right(name, size):
    """In both orders, with several images at once."""
    ours, expected = sampled_around(AT_ONE_POSITION[name], size)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [(6, 14), (6, 2)], ids=["wavefront", "raster"])
@pytest.mark.parametrize("name", REFUSED_OR_RIGHT)
def test_what_else_a_network_does_is_right_or_refused(name, size):
    """Lists, keywords, parameters, in-place operations, functions of several positions: the images
    of the naive sampler, or a Problem; never other images or another error."""
    try:
        ours, expected = sampled_around(REFUSED_OR_RIGHT[name], size)
    except Problem:
        return
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("change", [
    lambda net: setattr(net, "head", Conv(4, 6, rows=(0, 0), columns=(0, 0), stride=2)),
    lambda net: setattr(net, "more", Conv(4, 3, rows=(-1, 0), columns=(-1, 0)))],
    ids=["half the resolution", "channels that do not fit"])
def test_networks_that_make_no_image_are_refused_when_they_are_planned(change):
    net = Around(lambda net, h, x: net.more(h) + h.exp() + net.more(h), (6, 14)).double()
    with torch.no_grad():
        Plan(net, 2, 1, (6, 14))  # control
        change(net)
        with pytest.raises(Problem, match="sample_fast"):
            Plan(net.double(), 2, 1, (6, 14))


def test_channels_are_compared_when_a_convolution_is_noted():
    net = Around(lambda net, h, x: h, (6, 14)).double()
    with torch.no_grad():
        Plan(net, 2, 1, (6, 14))  # control
        net.head = Conv(3, 6, rows=(0, 0), columns=(0, 0)).double()
        with pytest.raises(Problem, match="a Conv of 3 channels reads 4"):
            Plan(net, 2, 1, (6, 14))


def test_dropout_is_refused_in_training_mode():
    """PixelAux.sample sees to it that networks are in evaluation mode."""
    net = CausalNet(4, 20, ((0, 1),), 2, 0.5, False)
    with torch.no_grad():
        Plan(net.eval(), 4, 1, (8, 8))  # control
        with pytest.raises(Problem, match="dropout"):
            Plan(net.train(), 4, 1, (8, 8))


@pytest.mark.parametrize("between, name", [
    (lambda net, h, x: h.softmax(-1), "softmax"), (lambda net, h, x: h * h.shape[1], "shape"),
    (lambda net, h, x: F.group_norm(h, 2), "group_norm")])
def test_refusals_name_the_function(between, name):
    with torch.no_grad(), pytest.raises(Problem, match=f"sample_fast: {name} is no function"):
        Plan(Around(between, (6, 14)).double(), 2, 1, (6, 14))


@pytest.mark.parametrize("between", [
    lambda net, h, x: net.more(h.tanh()) + net.more(h.sin()),
    lambda net, h, x: net.more(h.tanh()) + h.sin(),
    lambda net, h, x: h.sin() + net.more(h.tanh())])
def test_a_sum_takes_its_convolutions_in(between):
    """Three sums are left: the first layers', this one, the head."""
    with torch.no_grad():
        plan = Plan(Around(between, (6, 14)).double(), 2, 1, (6, 14))
    assert sum(node.is_sum for node in plan.nodes) == 3
    assert {node.function.__name__ for node in plan.nodes if not node.is_sum} == {"tanh", "sin"}


@pytest.mark.parametrize("fast", [True, False])
def test_samples_are_ordinary_tensors(fast):
    """Also what a Draw sees: they may be changed, and gradients may flow through what reads them."""
    model, seen = small("pyramid", (8, 16), halvings=1), []

    class Keep(Draw):
        def __call__(self, *arguments):
            seen.append(super().__call__(*arguments))
            return seen[-1]

    factor = model.factors[0]
    noise = torch.rand(2, 6, *factor.view.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        x = (sample_fast if fast else sample_naive)(factor, 2, None, Keep(noise))
    for values in (x, seen[0], *model.sample(1, fast=fast)):
        assert not values.is_inference()
        weights = torch.randn(256, dtype=torch.float64).requires_grad_()
        weights[values.long()].sum().backward()
        values.add_(1)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("output", [
    lambda x: x, lambda x: F.dropout(x, 0.5, False), lambda x: torch.ones(1, 6, 4, 4)])
def test_an_output_that_is_no_function_of_x_or_x_itself_is_refused(output):
    net = Forward(lambda net, x: output(x), unused=Conv(2, 6, rows=(0, 0), columns=(0, 0)))
    with torch.no_grad(), pytest.raises(Problem, match="output is x, or smaller"):
        Plan(net, 2, 1, (4, 4))


@pytest.mark.parametrize("size", [(6, 11), (6, 2)], ids=["wavefront", "raster"])
def test_kernels_that_read_rows_below_are_refused(size):
    """Though the network as a whole is causal."""
    own = Own(LooksDown(2, 6), size)
    planes = torch.randn(1, 2, *size, dtype=torch.float64).requires_grad_()
    grad, = torch.autograd.grad(own.net(planes)[0, :, 3, 1].abs().sum(), planes)
    seen = grad.flatten(2)[0].abs().sum(0)
    assert not seen[3 * size[1] + 1 :].any() and seen.any()  # control
    with torch.no_grad(), pytest.raises(Problem, match="rows below"):
        Plan(own.net, 2, 1, size)


class Forward(nn.Module):
    """A network of one channel: run(self, x), with these convolutions."""

    def __init__(self, run, **convs):
        super().__init__()
        self.run = run
        for name, conv in convs.items():
            self.add_module(name, conv)

    def forward(self, x, embeddings):
        return self.run(self, x)


def down_and_up(x_part):
    """The convolutions of a network that goes down and up; x_part: what its run does with both."""
    point = dict(rows=(0, 0), columns=(0, 0))
    return Forward(
        x_part, above=Conv(2, 3, rows=(-1, -1), columns=(-1, 1)), last=Conv(3, 6, **point),
        down=Conv(3, 3, rows=(-1, 0), columns=(-1, 0), stride=2),
        up=Conv(3, 3, rows=(-1, 0), columns=(-1, 0), up=True)).double()


@pytest.mark.parametrize("run, size, message", [
    (lambda net, h: net.last(net.up(net.down(h)) + h), (5, 8), "5x8"),
    (lambda net, h: net.last(net.up(net.down(h)) + h), (4, 7), "4x7"),
    (lambda net, h: net.last(h + net.down(h)), (2, 2), "two resolutions"),
    (lambda net, h: net.last(net.down(h) + h), (4, 8), "two resolutions"),
    (lambda net, h: net.last(net.down(net.up(h))), (4, 8), "more than the resolution")])
def test_resolutions_that_do_not_fit_are_refused(run, size, message):
    """Also where torch would broadcast them to images, and where naive samples more than it may."""
    torch.manual_seed(0)
    net = down_and_up(lambda net, x: run(net, net.above(x)))
    fitting = down_and_up(lambda net, x: net.last(net.up(net.down(net.above(x))) + net.above(x)))
    ours, expected = fast_and_slow(Own(fitting, (4, 8)), 2)  # control
    assert torch.equal(ours, expected)
    with torch.no_grad(), pytest.raises(Problem, match=message):
        Plan(net, 2, 1, size)


@pytest.mark.parametrize("options", [dict(stride=3), dict(stride=0), dict(stride=2, up=True)])
def test_a_convolution_has_stride_1_or_2_or_goes_up(options):
    with pytest.raises(Problem, match="stride"):
        Conv(2, 4, rows=(-1, 0), columns=(-1, 0), **options)
    for right in (dict(stride=1), dict(stride=2), dict(up=True)):  # control
        Conv(2, 4, rows=(-1, 0), columns=(-1, 0), **right)


@pytest.mark.parametrize("size", [(4, 16), (4, 3)], ids=["wide", "narrow"])
@pytest.mark.parametrize("rows, columns", [
    ((0, 0), (0, 0)), ((-1, 0), (-1, 0)), ((0, 0), (-1, 1)), ((-1, 1), (-2, -2)),
    ((-1, 1), (-1, 1))])
def test_a_network_that_is_not_causal_is_refused(size, rows, columns):
    """It reads its own pixel, one to the right, or the row below: a Problem, in either order."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Conv(2, 4, rows=(-1, -1), columns=(-1, 1))
            self.wrong = Conv(2, 4, rows=rows, columns=columns)
            self.head = Conv(4, 6, rows=(-1, 0), columns=(0, 0))

        def forward(self, x, embeddings=()):
            return self.head(F.elu(self.first(x) + self.wrong(x)))

    own = Own(Net(), size)
    noise = torch.rand(2, 2, *size, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(Problem, match="not causal"):
        sample_fast(own, 2, None, Draw(noise))
    own.net.wrong = Conv(2, 4, rows=(-1, -1), columns=(0, 0)).double()  # control: is causal
    with torch.no_grad():
        sample_fast(own, 2, None, Draw(noise))


class Forced:
    """In place of Draw: draws the pixels of given images, and adds up their log-probabilities."""

    def __init__(self, x, seed=0):
        self.x, self.log_prob, self.intervals = x, torch.zeros(len(x), dtype=torch.float64), {}

    def __call__(self, head, rows, columns, interval):
        pixels = self.x[:, :, rows, columns].transpose(1, 2).flatten(0, 1)[:, :, None, None]
        bounds = None
        if interval:
            levels = pixels.long().split(1, 1)
            both = [interval(list(levels[:c])) for c in range(len(levels))]
            bounds = tuple(torch.cat(each, 1) for each in zip(*both))
        self.log_prob += head.log_prob(pixels, bounds).view(len(self.x), -1).sum(1)
        return pixels.long()


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("sampler", [sample_fast, sample_naive])
@pytest.mark.parametrize("name", SIZES)
def test_what_a_sampler_says_of_an_image_is_its_likelihood(name, sampler, tight):
    """Made to draw the pixels of given images, either sampler comes to the sum that log_prob has:
    the distributions and intervals handed to `draw` are the model's."""
    model = small(name, (8, 8), halvings=1 if "pyramid" in name else -1)
    x = random_batch(2, model.views[-1].shape)
    with torch.no_grad():
        for factor, (view, x_hat) in zip(model.factors, model.pairs(x)):
            tight_here = tight and x_hat is not None
            forced = Forced(view)
            assert torch.equal(sampler(factor, 2, x_hat, forced, tight_here), view)
            expected = factor(view, x_hat, tight_here)
            assert torch.allclose(forced.log_prob, expected, rtol=1e-9)


class Blind(nn.Module):
    """One stream, which does not look right at all: lag 1."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.first = Conv(c_in, 4, rows=(-1, -1), columns=(-1, 0))
        self.left = Conv(c_in, 4, rows=(0, 0), columns=(-1, -1))
        self.head = Conv(4, c_out, rows=(-1, 0), columns=(-1, 0))

    def forward(self, x, embeddings=()):
        return self.head(F.elu(self.first(x) + self.left(x)) + embeddings[0])


@pytest.mark.parametrize("psi", [Half, Quarter])
def test_pixels_of_a_block_are_drawn_in_order(psi):
    """Where a network would allow a smaller lag than a block is high, the intervals of a block's
    pixels still know all those before them: tight samples are consistent and equal to the naive."""
    torch.manual_seed(0)
    own = Own(Blind(2, 6), (8, 12))
    own.view.psi, own.embedding = psi(1, 6), torch.randn(2, 4, 8, 12, dtype=torch.float64)
    x_hat = own.view.psi(random_batch(2, (1, 8, 12), 6))
    noise = torch.rand(2, 2, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        naive = sample_naive(own, 2, x_hat, Draw(noise), tight=True)
        assert torch.equal(own.view.psi(naive), x_hat)
        assert torch.equal(sample_fast(own, 2, x_hat, Draw(noise), tight=True), naive)
        loose = sample_naive(own, 2, x_hat, Draw(noise))
        assert torch.equal(sample_fast(own, 2, x_hat, Draw(noise)), loose)
    assert not torch.equal(own.view.psi(loose), x_hat)  # control


@pytest.mark.parametrize("size", [(8, 2), (8, 6)], ids=["raster", "wavefront"])
def test_tight_pixels_of_an_output_of_the_rows_above_know_their_row(size):
    """The network could be computed a row at once, but not drawn so."""
    torch.manual_seed(0)
    own = Own(RowsAbove(2, 6), size)
    own.view.psi = Half(1, 6)
    x_hat = own.view.psi(random_batch(3, (1, *size), 6))
    noise = torch.rand(3, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        naive = sample_naive(own, 3, x_hat, Draw(noise), tight=True)
        assert torch.equal(sample_fast(own, 3, x_hat, Draw(noise), tight=True), naive)
    assert torch.equal(own.view.psi(naive), x_hat)


def test_given_images_stay_and_coarser_views_follow():
    """Images of any view but X are kept, coarser views computed, finer ones sampled."""
    model = small("grayscale-pyramid", (8, 8), halvings=1)
    x = random_batch(3, model.views[-1].shape)
    views = model.views_of(x)
    for k, view in enumerate(views):
        done = model.sample(3, seed=1, given=view, tight=True)
        assert len(done) == len(model.factors) and same(done[: k + 1], views[: k + 1])
        assert k == len(views) - 1 or not torch.equal(done[-1], x)
        assert same(done, model.sample(3, seed=1, given=view, tight=True, fast=False))
    with pytest.raises(Problem, match=r"\(3, 3, 5, 8\).*0: gray 4x4 \(1, 4, 4\)"):
        model.sample(3, given=x[:, :, :5])
    with pytest.raises(Problem, match="expected images of gray 4x4: uint8"):
        model.sample(3, given=x, given_view=0)
    assert [len(model.sample(1, until=k)) for k in (1, 2)] == [1, 2]


# --- A new auxiliary variable --------------------------------------------------------------------


@pytest.mark.parametrize("name, layout, shape", [
    ("quarter", ((2, 1), (1, 1), (0, 1)), (3, 2, 3)),
    ("brightness", ((1, 1), (0, 1)), (1, 4, 6))])
def test_a_light_network_serves_a_view_of_any_block(name, layout, shape, new_models):
    """Of 4x4 pixels, or of 2x2 with the channels mixed: one class each; tight samples are
    consistent, fast = naive."""
    model = small(name, (8, 12), layout_embed=layout, look_right=False)
    assert [view.shape for view in model.views] == [shape, (3, 8, 12)]
    x = random_batch(2, (3, 8, 12))
    with torch.no_grad():
        assert (model.log_prob(x, tight=True) >= model.log_prob(x)).all()
    views = model.sample(2, tight=True)
    assert all(fits(model, views)) and not any(fits(model, model.sample(2)))
    assert same(views, model.sample(2, tight=True, fast=False))


@pytest.mark.parametrize("name", ["two-colour", "gray-two-colour"])
def test_a_new_view_trains_and_samples(name, new_models):
    """A class of some 12 lines, registered by its name, is all that a new auxiliary variable takes:
    Adam on -log_prob raises the likelihood; tight >= bound; tight samples are consistent, loose
    ones are not (control); fast = naive."""
    layout = ((0, 1), (1, 1), (0, 1))
    model = build(name, (4, 6), **{**SMALL, "layout": layout, "layout_cond": layout}).double()
    shapes = [view.shape for view in model.views]
    assert shapes == [(1, 4, 6)] * (len(shapes) - 1) + [(3, 4, 6)]
    assert model.views[0].levels == 2 and model.views[0].name == "two-colour 4x6"
    x = random_batch(16, (3, 4, 6)) // 3
    model.initialise(x)
    before = model.log_prob(x).mean().item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    assert -loss.item() > before + 20
    with torch.no_grad():
        for tight, bound in zip(model.log_prob_factors(x, tight=True), model.log_prob_factors(x)):
            assert (tight >= bound - 1e-9).all()
    for tight in (True, False):
        views = model.sample(5, seed=2, tight=tight)
        assert same(views, model.sample(5, seed=2, tight=tight, fast=False))
        assert all(fits(model, views)) == tight


def test_an_exact_likelihood_with_a_new_view_sums_to_one(new_models):
    """Over all images of 1x2 pixels of 3 levels; the bound leaks (control)."""
    model = small("two-colour", (1, 2), levels=3, wild=0.3, nr_filters=4, layout=((0, 1),),
                  layout_cond=((0, 1),))
    everything = all_images((3, 1, 2), 3)
    with torch.no_grad():
        exact = model.log_prob(everything, tight=True)
        assert float(exact.exp().sum()) == pytest.approx(1, abs=1e-9)
        assert float(model.log_prob(everything).exp().sum()) < 0.99


def test_of_two_views_of_one_shape_a_number_tells_which_is_given(new_models):
    """Without given_view there is a Problem that names the views; with it, the view stays."""
    model = small("gray-two-colour", (4, 4))
    gray = Gray()(random_batch(3, (3, 4, 4)))
    colours = TwoColour(1, 16)(gray)
    with pytest.raises(Problem, match="0: two-colour 4x4 .*1: gray 4x4 .*2: 4x4"):
        model.sample(3, given=gray)
    views = model.sample(3, given=gray, given_view=1, tight=True)
    assert same(views[:2], [colours, gray])
    views = model.sample(3, given=colours, given_view=0, tight=True)
    assert torch.equal(views[0], colours) and torch.equal(TwoColour(1, 16)(views[1]), colours)
    with pytest.raises(Problem, match="0..1 of two-colour 4x4"):
        model.sample(3, given=gray, given_view=0)
    x = random_batch(3, (3, 4, 4))
    assert same(model.sample(3, given=x), model.views_of(x))  # of one shape there is one only
    with pytest.raises(Problem):
        model.sample(3, given=gray, given_view=7)


# --- What sampling depends on, and what it leaves alone ------------------------------------------


@pytest.mark.parametrize("name", ["pixelcnn", "pyramid"])
def test_an_image_is_a_function_of_weights_seed_and_number(name, monkeypatch):
    """Not of how many are made, or of how many at once; images, views, seeds differ (control)."""
    model = small(name, (8, 16), halvings=1 if name == "pyramid" else -1)
    four = model.sample(4, seed=5, tight=True)
    assert same([view[:2] for view in four], model.sample(2, seed=5, tight=True))
    assert len(torch.unique(four[-1], dim=0)) == 4
    assert not same(four, model.sample(4, seed=6, tight=True))
    monkeypatch.setattr(Factor, "at_once", 3)
    assert same(four, model.sample(4, seed=5, tight=True))
    assert same(four, small(name, (8, 16), halvings=1 if name == "pyramid" else -1).sample(
        4, seed=5, tight=True))


@pytest.mark.parametrize("fast", [True, False])
def test_sampling_leaves_everything_as_it_was(fast):
    """Modes of the model and of its parts, gradients, random states, cudnn's flags; also if it is
    interrupted."""
    model = small("pyramid", (8, 8), halvings=1).train()
    model.factors[0].eval()
    model.log_prob(random_batch(1, (3, 8, 8))).sum().backward()
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, False, True

    def state():
        modes = [module.training for module in model.modules()]
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.is_grad_enabled()
        numpys = np.random.get_state()[1].tolist()
        return modes, flags, numpys, [torch.get_rng_state(), *grads, *weights]

    def stop(pixels):
        raise KeyboardInterrupt

    try:
        before = state()
        for interrupted in (False, True):
            with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
                model.sample(1, fast=fast, progress=stop if interrupted else None)
            after = state()
            assert before[:3] == after[:3] and same(before[3], after[3])
        build("pyramid", 8, **SMALL)
        assert torch.equal(before[3][0], torch.get_rng_state())
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, False, True


def test_sampling_is_in_evaluation_mode():
    """A model in training mode, with dropout, gives the images that it gives in evaluation mode."""
    model, x = small("pyramid", (8, 16), halvings=1, dropout=0.5), random_batch(1, (3, 8, 16))
    expected = model.eval().sample(2)
    assert same(model.train().sample(2), expected)
    assert not torch.equal(model.log_prob(x), model.log_prob(x))  # control: it does drop


@pytest.mark.parametrize("name, size", [("pyramid", (8, 16)), ("pixelcnn", (8, 8))])
def test_the_callers_autocast_changes_nothing(name, size):
    """Under autocast to bfloat16 the images are the same, float32 or float64, fast or naive; the
    caller's autocast is on again afterwards."""
    for dtype in (torch.float32, torch.float64):
        model = small(name, size, dtype=dtype, halvings=-1 if name == "pixelcnn" else 1)
        expected = model.sample(2, tight=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(model.sample(2, tight=True), expected)
            assert same(model.sample(2, tight=True, fast=False), expected)
            assert torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_model_does_not_grow_by_sampling():
    """What torch.save writes is as long afterwards; a copy samples the same."""
    model = small("pyramid", (8, 16), halvings=1)

    def saved():
        file = io.BytesIO()
        torch.save(model, file)
        return file

    before = len(saved().getvalue())
    views = model.sample(3, tight=True)
    file = saved()
    assert len(file.getvalue()) == before
    file.seek(0)
    assert same(torch.load(file, weights_only=False).sample(3, tight=True), views)
    assert same(copy.deepcopy(model).sample(3, tight=True), views)


def test_the_weights_of_the_day_are_used():
    """After a step of training the images are those of the new weights, as the naive sampler's."""
    model = small("pyramid", (8, 16), halvings=1)
    before = model.sample(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    assert not same(model.sample(2), before)
    assert same(model.sample(2), model.sample(2, fast=False))


def test_threads_that_sample_at_once_get_the_images_of_one():
    """Eight threads, a model in training mode with dropout: the same images, the mode as before."""
    model = small("pyramid", (8, 8), halvings=1, dropout=0.5).train()
    expected = [model.sample(1, seed=seed) for seed in range(4)]
    start, found = threading.Barrier(8), [None] * 8

    def sample(i):
        start.wait()
        found[i] = [model.sample(1, seed=(i + j) % 4) for j in range(3)]

    threads = [threading.Thread(target=sample, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found  # or a thread has failed
    assert all(same(found[i][j], expected[(i + j) % 4]) for i in range(8) for j in range(3))
    assert all(module.training for module in model.modules())


def test_likelihoods_of_one_thread_are_those_of_before_while_another_samples():
    """Networks are read and sampled by one thread; another calls them all the while."""
    model, other = small("pyramid", (8, 8), halvings=1), small("pixelcnn")
    x, x_other = (random_batch(2, m.views[-1].shape) for m in (model, other))
    expected = [model.log_prob(x), other.log_prob(x_other)]
    sampled, done = [], threading.Event()

    def sample():
        try:
            for _ in range(6):
                sampled.append(model.sample(1)[-1])
            for _ in range(60):  # what is traced, is traced while the other one calls
                Plan(other.factors[0].net, 4, 1, (8, 12))
        finally:
            done.set()

    thread = threading.Thread(target=sample)
    thread.start()
    calls = 0
    while calls < 3 or not done.is_set():
        found = [model.log_prob(x), other.log_prob(x_other)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        calls += 1
    thread.join()
    assert len(sampled) == 6 and all(torch.equal(x, sampled[0]) for x in sampled)


# A model that trains in no time. Dropout: a resumed run must also draw the same units.
SMALL_RUN = dict(
    nr_filters=6, nr_logistic_mix=2, layout=six_stages(1), layout_cond=six_stages(1),
    layout_light=((0, 1),), layout_embed=((1, 1), (2, 1), (1, 1), (0, 1)), dropout=0.5, ema=0.7,
    batch_size=2, steps=(6, 6))
TRAIN = "train --model pyramid --steps 6 --batch-size 2"


@pytest.fixture(scope="module")
def small_preset():
    """The command line's preset "tiny" is SMALL_RUN."""
    before = pixelaux.PRESETS["tiny"]
    plain = dict(tight=False, warmup=0, lr=1e-2, muon=0.0, batch_size=8, betas=(0.9, 0.99))
    pixelaux.PRESETS["tiny"] = {**before, **plain, **SMALL_RUN}
    yield
    pixelaux.PRESETS["tiny"] = before


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_preset):
    """A short run that was not disturbed: factors 8x8 and 16x16 | 8x8, of 6 steps each."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert command(TRAIN, "--out", out) == 0
    return out


def command(line, *more):
    """Exit status of a command."""
    arguments = [*shlex.split(line), *map(str, more)]
    try:
        return main([*arguments, "--device", "cpu"] if "--device" not in arguments else arguments)
    except SystemExit as exit:
        return exit.code


def program(*arguments, cwd=HERE, status=0, **env):
    """Run Python in a process of its own -> (stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **env}, text=True,
        capture_output=True, timeout=500)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def said(capsys):
    """The program's own lines on stderr, without bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line[line.index("pixelaux: "):] for line in lines if "pixelaux: " in line]


def checkpoints(run):
    """All that the checkpoints of a run hold, {name: value}."""
    found = {}

    def add(name, value):
        if isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                add(f"{name} {key}", inner)
        elif not name.endswith("seconds"):
            found[name] = value

    for path in sorted(run.glob("factor-*.pt")):
        add(path.name, torch.load(path, weights_only=True))
    return found


def records(run):
    """The records of a run's metrics, without times."""
    lines = curves.read_metrics(run)
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(first, second):
    """The same weights, averages, optimizers and records, bit for bit."""
    a, b = checkpoints(first), checkpoints(second)
    assert a.keys() == b.keys() and len(a) > 50
    for name, value in a.items():
        same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
        assert same, name
    by_factor = lambda record: (record["factor"], record["step"])
    assert sorted(records(first), key=by_factor) == sorted(records(second), key=by_factor)


def averages(run):
    return {name: value for name, value in checkpoints(run).items() if " factors " in name}


def random_images(n, size=(16, 16), seed=0, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(n, *size, channels), dtype=np.uint8)


def saved(model, out):
    """Write the untrained model as a run."""
    out.mkdir(parents=True, exist_ok=True)
    for k, factor in enumerate(model.factors):
        pixelaux.write_checkpoint(out / f"factor-{k}.pt", model.config, {k: factor.state_dict()})
    return out


def at_batch(monkeypatch, action):
    """Call action(step, factor) before each batch of training."""
    batch = Dataset.batch

    def watched(self, step, n, seed, *more):
        action(step, seed[1])
        return batch(self, step, n, seed, *more)

    monkeypatch.setattr(Dataset, "batch", watched)


# --- Built-in data -------------------------------------------------------------------------------


def configurations(shapes):
    """Every clean image of `shapes`, int (M, H, W, 3), by the words of its docstring."""
    for mask, (ground, shape), dark in itertools.product(shapes.masks, shapes.pairs, shapes.weaves):
        colour = np.where(mask[..., None], shapes.palette[shape], shapes.palette[ground])
        yield colour + np.where(dark[..., None], -shapes.contrast, shapes.contrast)


def noise_pmf(shapes):
    """{noise: probability} of a rounded logistic, cut off at the bound."""
    sigma = lambda z: 1 / (1 + math.exp(-z / shapes.scale))
    mass = {v: sigma(v + 0.5) - sigma(v - 0.5) for v in range(-shapes.farthest, shapes.farthest + 1)}
    return {v: m / sum(mass.values()) for v, m in mass.items()}


def slow_log_prob(shapes, x):
    """log p of images, (N,), as the sum over all configurations."""
    pmf = noise_pmf(shapes)
    log_pmf = np.array([math.log(pmf[v]) if v in pmf else -math.inf for v in range(-400, 401)])
    each = [log_pmf[x.astype(int) - clean + 400].sum((1, 2, 3)) for clean in configurations(shapes)]
    return np.logaddexp.reduce(each, 0) - math.log(len(each))


@pytest.mark.parametrize("size", [(12, 12), (14, 14), (12, 40), (16, 16), (18, 22), (32, 32)])
def test_every_configuration_of_shapes_is_another_image(size):
    """So that an image has one configuration. Its view of half the size does not tell the weave."""
    shapes = Shapes(size)
    clean = np.array(list(configurations(shapes)), np.int16).reshape(-1, *size, 3)
    assert len({image.tobytes() for image in clean}) == len(clean)
    assert math.log(len(clean)) == pytest.approx(shapes.log_count)
    masks = shapes.masks.reshape(len(shapes.masks), -1)
    assert masks.any(1).all() and not masks.all(1).any()
    blocks = clean.reshape(len(clean), size[0] // 2, 2, size[1] // 2, 2, 3).sum((2, 4))
    blocks = blocks.reshape(len(shapes.masks) * len(shapes.pairs), len(shapes.weaves), -1)
    assert (blocks == blocks[:, :1]).all()
    assert len({block.tobytes() for block in blocks[:, 0]}) == len(blocks)
    assert clean.min() - shapes.farthest >= 0 and clean.max() + shapes.farthest <= 255
    of_one_mask = clean[: len(shapes.pairs) * len(shapes.weaves)]
    values = np.unique(of_one_mask.reshape(-1, 3), axis=0).astype(int)
    assert len(values) == 6
    for a, b in itertools.combinations(values, 2):
        assert abs(a - b).max() > 2 * shapes.farthest  # noise cannot make one of the other


def chi_square_of(found, expected):
    """In standard deviations from its mean."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    freedom = len(found) - 1
    return (((found - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_shapes_are_drawn_with_the_probability_they_claim():
    """Chi square of configurations and noise, found by trying all. Control: a scale 5% larger."""
    shapes, n = Shapes((12, 12)), 2000
    x = shapes.sample(n, (1, 2))
    assert x.dtype == np.uint8 and np.array_equal(x, shapes.sample(n, (1, 2)))
    assert not np.array_equal(x, shapes.sample(n, (1, 3)))
    counts, noise = [], np.full(x.shape, 999)
    for clean in configurations(shapes):
        around = x - clean
        fits = (abs(around) <= shapes.farthest).all((1, 2, 3))
        counts.append(fits.sum())
        noise[fits] = around[fits]
    assert sum(counts) == n and (noise < 999).all()  # each has exactly one
    assert abs(chi_square_of(counts, np.full(len(counts), n / len(counts)))) < 5
    pmf = noise_pmf(shapes)
    of_level = [(noise == v).sum() for v in pmf]
    assert abs(chi_square_of(of_level, np.array(list(pmf.values())) * noise.size)) < 5
    wide = type("Wide", (), dict(scale=shapes.scale * 1.05, farthest=shapes.farthest))
    assert chi_square_of(of_level, np.array(list(noise_pmf(wide).values())) * noise.size) > 20
    for axis in (1, 2, 3):  # every sub-pixel has its own
        a, b = np.delete(noise, -1, axis), np.delete(noise, 0, axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)
    assert np.array_equal(shapes.noise_of(x), noise) and shapes.decodable(x).all()


def test_the_true_probability_is_the_sum_over_all_configurations():
    """Control: images that no configuration can make have probability 0."""
    shapes = Shapes((12, 12))
    x = shapes.sample(20, 5)
    wrong = x.copy()
    wrong[:, 6, 6, 1] ^= 128
    everything = np.concatenate([x, wrong, random_images(3, (12, 12))])
    expected, found = slow_log_prob(shapes, everything), shapes.log_prob(everything)
    assert np.isfinite(expected[:20]).all() and np.isneginf(expected[20:]).all()
    assert np.isneginf(found[20:]).all() and np.allclose(found[:20], expected[:20], rtol=1e-10)


def test_the_true_probability_of_the_half_view_is_the_sum_over_all_configurations():
    """Also: over the levels of one sub-pixel it sums to what the others have; X knows its view."""
    shapes, pmf = Shapes((12, 12)), noise_pmf(Shapes((12, 12)))
    four = {0: 1.0}
    for _ in range(4):
        total = collections.defaultdict(float)
        for (a, p), (b, q) in itertools.product(four.items(), pmf.items()):
            total[a + b] += p * q
        four = total
    x = shapes.sample(20, 6)
    half = Half()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    impossible = half.copy()
    impossible[:, 0, 0, 0] = 255
    both = np.concatenate([half, impossible])

    @functools.cache
    def log_pmf(block):
        """{level: log probability} of a sub-pixel of the view; block: the sum of its clean ones."""
        mass = collections.defaultdict(float)
        for noise, p in four.items():
            mass[(block + noise + 2) // 4] += p
        return np.array([math.log(mass[v]) if v in mass else -math.inf for v in range(256)])

    each = []
    for clean in configurations(shapes):
        blocks = clean.reshape(6, 2, 6, 2, 3).sum((1, 3))
        tables = np.stack([log_pmf(int(block)) for block in blocks.ravel()])  # (108, 256)
        each.append(tables[np.arange(108), both.reshape(len(both), -1)].sum(1))
    expected = np.logaddexp.reduce(each, 0) - math.log(len(each))
    found = shapes.log_prob_half(both)
    assert np.isfinite(expected[:20]).all() and np.isneginf(expected[20:]).all()
    assert np.isneginf(found[20:]).all() and np.allclose(found[:20], expected[:20], rtol=1e-10)
    assert (shapes.log_prob(x) < found[:20]).all()

    levels = half[:1].repeat(256, 0)
    levels[:, 2, 3, 1] = np.arange(256)
    inside = min(shapes.palette[:, 1], key=lambda colour: abs(int(colour) - int(half[0, 2, 3, 1])))
    of_level = log_pmf(4 * int(inside))[half[0, 2, 3, 1]]  # given the others
    total = np.logaddexp.reduce(shapes.log_prob_half(levels))
    assert total == pytest.approx(found[0] - of_level, rel=1e-12)


@settings(max_examples=15)
@given(h=st.integers(6, 13), w=st.integers(6, 13), seed=st.integers(0, 10**6))
def test_decoding_finds_the_configuration_at_every_size(h, w, seed):
    """Also where 1% of the sub-pixels are ruined. Controls: 5% are too many; noise is no shape."""
    shapes, rng = Shapes((2 * h, 2 * w)), np.random.default_rng(seed)
    x = shapes.sample(4, seed)
    clean = x - shapes.noise_of(x)
    known = {image.astype(np.int16).tobytes() for image in configurations(shapes)}
    assert all(image.astype(np.int16).tobytes() in known for image in clean)
    assert abs(x - clean).max() <= shapes.farthest and np.isfinite(shapes.log_prob(x)).all()
    assert shapes.decodable(x).all()
    for share, decodes in ((0.01, True), (0.05, False)):
        ruined = x.reshape(4, -1).copy()
        for image, whole in zip(ruined, clean.reshape(4, -1)):
            places = rng.choice(len(image), math.ceil(share * len(image)), replace=False)
            image[places] = np.where(whole[places] < 128, whole[places] + 90, whole[places] - 90)
        ruined = ruined.reshape(x.shape)
        assert np.array_equal(ruined - shapes.noise_of(ruined), clean)
        assert (shapes.decodable(ruined) == decodes).all()
        assert np.isneginf(shapes.log_prob(ruined)).all()
    noise = rng.integers(256, size=x.shape, dtype=np.uint8)
    assert not shapes.decodable(noise).any()


@pytest.mark.parametrize("size", [(11, 12), (12, 13), (10, 20), (2, 2)])
def test_shapes_refuse_sizes_that_they_cannot_have(size):
    """By the flag's name. Control: the sizes of the tests before."""
    with pytest.raises(Problem, match=rf"--size {size[0]}x{size[1]}: .*even.*12 or more"):
        Shapes(size)


# --- Batches, .npy files, the split --------------------------------------------------------------


@settings(max_examples=30)
@given(n=st.integers(2, 12), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_batches_are_functions_of_the_step_and_epochs_are_permutations(n, batch, seed):
    """Each of its own. Control: another seed, another order."""
    array = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
    data = Dataset(array, array[:1])
    steps = range(6 * n)
    seen = torch.cat([data.batch(step, batch, (seed, 1)) for step in steps])
    assert seen.shape[1:] == (3, 2, 2) and seen.dtype == torch.uint8
    firsts = seen[:, 0, 0, 0].numpy()
    for i, first in enumerate(firsts):
        assert np.array_equal(seen[i].permute(1, 2, 0), array[first // 12])  # whole images
    epochs = firsts[: len(firsts) // n * n].reshape(-1, n)
    assert all(sorted(epoch) == array[:, 0, 0, 0].tolist() for epoch in epochs)
    assert n < 5 or len(np.unique(epochs, axis=0)) > 1  # each has its own order
    again = Dataset(array.copy(), array[:1])
    pixelaux.permutation.cache_clear()
    for step in reversed(steps):
        expected = seen[step * batch : (step + 1) * batch]
        assert torch.equal(again.batch(step, batch, (seed, 1)), expected)
    other = torch.cat([data.batch(step, batch, (seed, 2)) for step in steps])
    assert n < 5 or not torch.equal(other, seen)  # control: another seed, another order


@settings(max_examples=20)
@given(n=st.integers(3, 20), data=st.data(), mapped=st.booleans(), seed=st.integers(0, 9))
def test_images_that_are_held_out_are_never_trained_on(n, data, mapped, seed):
    """All others are, once an epoch; the same ones are held out whatever the seed of the run, and
    what the set is called stays. Control: none held out."""
    number = data.draw(st.integers(1, n - 1))
    array = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
    train = pixelaux.Rows(array, np.arange(n)) if mapped else array
    whole = Dataset(train, array[:1], fingerprint="x")
    part = whole.holding_out(number)
    held = {image.tobytes() for image in part.held_out}
    seen = [pixelaux.to_array(part.batch(step, 1, (seed, 0)))[0].tobytes()
            for step in range(n - number)]
    assert len(held) == number and len(seen) == len(set(seen)) == n - number
    assert held | set(seen) == {image.tobytes() for image in array}
    assert np.array_equal(whole.holding_out(number).held_out, part.held_out)
    assert pixelaux.describe(part) == pixelaux.describe(whole)
    assert np.array_equal(pixelaux.digests_of(part), pixelaux.digests_of(whole))
    assert whole.holding_out(0) is whole and len(whole.held_out) == 0
    with pytest.raises(Problem, match=f"--hold-out {n}: .* {n} in number"):
        whole.holding_out(n)


def test_flip_mirrors_half_of_the_images():
    """Left and right, nothing else. Control: without it none is."""
    array = random_images(5, (4, 6))
    data = Dataset(array, array[:1])
    for flip, low, high in ((False, 0, 0), (True, 0.4, 0.6)):
        plain = data.batch(0, 400, (0, 1))
        images = data.batch(0, 400, (0, 1), flip)
        assert torch.equal(images, data.batch(0, 400, (0, 1), flip))
        mirrored = (images == plain.flip(3)).flatten(1).all(1)
        assert (mirrored | (images == plain).flatten(1).all(1)).all()
        assert low <= mirrored.double().mean() <= high


def test_images_made_on_the_fly_are_functions_of_seed_and_step():
    """Control: another step, factor or seed, other images."""
    data, _ = pixelaux.load_data("shapes")
    a, b = data.batch(3, 4, (0, 1)), pixelaux.load_data("shapes")[0].batch(3, 4, (0, 1))
    assert a.shape == (4, 3, 16, 16) and torch.equal(a, b)
    for other in (data.batch(4, 4, (0, 1)), data.batch(3, 4, (0, 0)), data.batch(3, 4, (1, 1))):
        assert not torch.equal(a, other)
    assert Shapes((16, 16)).decodable(a.permute(0, 2, 3, 1).numpy()).all()


@settings(max_examples=20)
@given(n=st.integers(200, 260), gone=st.integers(0, 40), come=st.integers(0, 40),
       seed=st.integers(0, 10**6))
def test_an_image_stays_on_its_side_of_the_split_when_others_come_or_go(n, gone, come, seed):
    """Wherever it stands, and its copies with it. Control: another seed splits otherwise."""
    images = random_images(n + come, (2, 2), seed)
    before = images[:n]
    after = np.random.default_rng(seed).permutation(images[gone:])
    after = np.concatenate([after, after[:9]])
    sides = []
    for some in (before, after):
        rows = pixelaux.split(some)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(some)))
        assert all(np.array_equal(np.sort(side), side) and len(side) for side in rows)
        sides.append([{some[i].tobytes() for i in side} for side in rows])
    (train, test), (train_after, test_after) = sides
    assert not train & test and not train_after & test_after
    assert not train & test_after and not test & train_after
    assert set(pixelaux.split(before, seed=1)[1]) != set(pixelaux.split(before)[1])


@settings(max_examples=40)
@given(n=st.integers(2, 8), seed=st.integers(0, 10**6), copies=st.integers(1, 3))
def test_neither_side_of_the_split_is_empty(n, seed, copies):
    """Control: of images that are all alike one cannot be kept for the test."""
    images = random_images(n, (2, 2), seed).repeat(copies, 0)
    train, test = pixelaux.split(images)
    assert len(train) and len(test)
    assert not {images[i].tobytes() for i in train} & {images[i].tobytes() for i in test}
    with pytest.raises(Problem, match="two different images"):
        pixelaux.split(images[:1].repeat(n, 0))


def test_the_test_is_some_five_percent():
    """Of many images: the paper's share for CelebA."""
    images = random_images(8000, (2, 2))
    assert 0.04 < len(pixelaux.split(images)[1]) / 8000 < 0.06


@settings(max_examples=30)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_the_fingerprint_tells_sets_of_images_apart_and_not_their_order(n, seed):
    """Control: one level of one sub-pixel, or one image twice, makes another set."""
    images, rng = random_images(n, (2, 3), seed), np.random.default_rng(seed)
    mark = pixelaux.fingerprint(images)
    assert re.fullmatch("[0-9a-f]{12}", mark)
    assert pixelaux.fingerprint(rng.permutation(images)) == mark
    other = images.copy()
    other[rng.integers(n), 1, 2, 0] ^= 1
    twice, turned = np.concatenate([images, images[:1]]), images.transpose(0, 2, 1, 3)[:, ::-1]
    for different in (other, twice, turned):
        assert pixelaux.fingerprint(different) != mark


def test_npy_files_of_either_layout_are_read_as_they_are(tmp_path):
    """And stay on disk. Where both layouts would fit, channels are last."""
    array = random_images(400, (6, 10))
    for name, content in {"last": array, "first": array.transpose(0, 3, 1, 2),
                          "fortran": np.asfortranarray(array), "both": array[:, :3, :3]}.items():
        np.save(tmp_path / f"{name}.npy", content)
        expected = content if name == "both" else array
        images = pixelaux.read_npy(tmp_path / f"{name}.npy")
        base = images
        while getattr(base, "base", None) is not None and not hasattr(base, "_mmap"):
            base = base.base
        assert np.array_equal(images, expected) and isinstance(base, np.memmap)
        data, size = pixelaux.load_data(str(tmp_path / f"{name}.npy"))
        assert size == expected.shape[1:3] and len(data.test) > 1 and not data.flip
        back = np.concatenate([data.train[np.arange(len(data.train))], data.test[:]])
        assert sorted(x.tobytes() for x in back) == sorted(x.tobytes() for x in expected)
        assert data.batch(0, 2, (0, 0)).shape == (2, 3, *size)
    files = (str(tmp_path / name) for name in ("last.npy", "first.npy"))
    last, first = (pixelaux.load_data(file)[0] for file in files)
    assert pixelaux.describe(last) == pixelaux.describe(first)


@pytest.mark.parametrize("content, expected", [
    (np.zeros((9, 8, 8, 3)), r"float64 \(9, 8, 8, 3\), expected uint8"),
    (np.zeros((9, 8, 8), np.uint8), "expected uint8"),
    (np.zeros((0, 8, 8, 3), np.uint8), "expected uint8"),
    (np.zeros((9, 8, 8, 4), np.uint8), "expected uint8"),
    (np.array([{}]), "not a .npy file of numbers"),
    (b"", "not a .npy file"), (b"hello", "not a .npy file"),
    (b"PK\3\4 an archive", "not a .npy file"),
    (None, "No such file"),
])
def test_bad_npy_files_are_named(tmp_path, content, expected):
    """Control: a good one, cut short, is bad."""
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(Problem, match=f"^{re.escape(str(path))}: .*{expected}"):
        pixelaux.load_data(str(path))
    np.save(path, random_images(9, (8, 8)))
    assert pixelaux.load_data(str(path))[1] == (8, 8)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Problem, match=f"^{re.escape(str(path))}: .*damaged"):
        pixelaux.load_data(str(path))
    np.save(path, random_images(9, (8, 8)))
    with pytest.raises(Problem, match=r"8x8 \(height x width\), not 8x16"):
        pixelaux.load_data(str(path), size=(8, 16))


# --- Alone ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with pixelaux.py and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(HERE / "pixelaux.py", folder)
    return folder


def test_the_file_alone_trains_evaluates_and_samples(alone, tmp_path):
    """From the command line, with bar, table and pictures, on built-in images and a .npy file."""
    out, error = program("pixelaux.py", *"train --steps 3 --device cpu".split(), cwd=alone)
    run = alone / "runs" / "pyramid-shapes"
    assert "factor 0: 100%" in error and "3/3" in error and "Traceback" not in error
    assert re.search(r"16x16 \| 8x8( +\d+\.\d{4}){6}", out) and "eval runs/pyramid-shapes" in out
    assert (run / "samples.png").stat().st_size > 1000
    np.save(alone / "mine.npy", random_images(60, (8, 8)))
    # The other commands in one process, as it takes seconds to start one.
    code = """if True:
        from pixelaux import main
        for line in ("eval runs/pyramid-shapes --n 4", "sample runs/pyramid-shapes --n 2",
                     "train --data mine.npy --model pixelcnn --batch-size 2 --steps 3",
                     "eval runs/pixelcnn-mine", "sample runs/pixelcnn-mine --n 2"):
            assert main([*line.split(), "--device", "cpu"]) == 0, line
        """
    out, error = program("-c", code, cwd=alone)
    assert "Traceback" not in error and out.count("95% interval") == 3
    names = {str(path.relative_to(alone / "runs")) for path in (alone / "runs").glob("*/*")}
    assert {"pyramid-shapes/eval-4.json", "pyramid-shapes/sample-random-0-n2.npz",
            "pixelcnn-mine/samples.png", "pixelcnn-mine/eval.json",
            "pixelcnn-mine/sample-random-0-n2.png"} <= names


def test_importing_needs_torch_and_numpy_alone(alone):
    """All other packages are blocked. Control: one of them cannot be imported then."""
    code = """if True:
        import sys, numpy, torch, torch.distributed, torch.fx, torch.optim.swa_utils
        class Block:
            def find_spec(name, path=None, target=None):
                top = name.partition(".")[0]
                if top not in {*sys.stdlib_module_names, "numpy", "torch", "pixelaux"}:
                    raise ImportError(name)
        for name in {name for name in sys.modules if name.partition(".")[0] in ("PIL", "tqdm")}:
            del sys.modules[name]  # which torch takes if it finds them
        sys.meta_path.insert(0, Block)
        try:
            import tqdm
            raise SystemExit("not blocked")
        except ImportError:
            import pixelaux
        print(pixelaux.build("pyramid", 16).dims)
        """
    assert program("-c", code, cwd=alone)[0].strip() == "768"


def test_commands_of_tools_are_refused_in_one_line_where_they_are_missing(alone):
    """Also data that tools read. Controls: a command of the file's own; an unknown one."""
    code = """if True:
        import sys, pixelaux
        for name, (module, _) in pixelaux.TOOLS.items():
            assert pixelaux.main([name, "x"]) == 2
            print(module)
        line = "train --data cifar10 --device cpu --out never"
        assert pixelaux.main(line.split()) == 2
        assert pixelaux.main(["eval", "gone", "--device", "cpu"]) == 2
        """
    out, error = program("-c", code, cwd=alone)
    lines, modules = error.splitlines(), out.split()
    assert len(lines) == len(modules) + 2 and len(modules) >= 5 and not (alone / "never").exists()
    for line, module in zip(lines, [*modules, "images"]):
        assert line.startswith("pixelaux: ") and f"tools/{module}.py" in line, line
    assert "gone" in lines[-1] and "tools" not in lines[-1]


def test_as_a_program_there_is_one_copy_of_the_module_for_the_tools(tmp_path):
    """From any folder: a tool's Problem is the one that the program catches. Control: its bug."""
    (tmp_path / "code" / "tools").mkdir(parents=True)
    shutil.copy(HERE / "pixelaux.py", tmp_path / "code")
    (tmp_path / "code" / "tools" / "__init__.py").touch()
    (tmp_path / "code" / "tools" / "bench.py").write_text("""if True:
        import sys, pixelaux
        def main(argv):
            print(sys.modules["__main__"] is pixelaux, sys.modules["pixelaux"] is pixelaux)
            raise pixelaux.Problem("mine") if argv[1:] == ["problem"] else TypeError
        """)
    program_file = tmp_path / "code" / "pixelaux.py"
    out, error = program("-P", program_file, "bench", "problem", cwd=tmp_path, status=2)
    assert out == "False True\n" and error == "pixelaux: mine\n"
    assert "Traceback" in program(program_file, "bench", cwd=tmp_path, status=1)[1]


# --- Training ------------------------------------------------------------------------------------


def test_runs_of_before_count_the_layout_of_f_w_from_its_own_input():
    """It is counted anew when they are read: the same model, sizes and likelihoods."""
    recorded = HERE / "results" / "cifar10-pyramid"
    assert json.loads((recorded / "config.json").read_text())["layout_embed"][-1][0] == -1
    model, x = pixelaux.load(recorded), random_batch(1, (3, 32, 32))
    assert model.config.layout_embed == ((1, 2), (0, 1)) and model.size_multiple == 4
    now = build("pyramid", 32, "small", layout_embed=((1, 2), (0, 1)))
    now.load_state_dict(model.state_dict())
    assert now.size_multiple == 4
    with torch.no_grad():
        assert torch.equal(now.eval().log_prob(x), model.log_prob(x))


def test_training_leaves_its_configuration_records_weights_and_pictures(run):
    """In its folder, each with what happened; nothing that is half-written."""
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "commands.jsonl", "metrics.jsonl", "factor-0.pt", "factor-1.pt",
            "samples.png"} <= names and not list(run.glob("part-*"))
    lines = records(run)
    steps = [(line["factor"], line["step"]) for line in lines]
    assert steps == [*itertools.product((0, 1), range(1, 7))]
    assert all(math.isfinite(line["bits_per_dim"]) for line in lines)
    tested = [line["step"] for line in lines if line["factor"] == 1 and "test_bits_per_dim" in line]
    assert tested == [2, 3, 5, 6]  # as the quarters are over
    model = pixelaux.load(run)
    nats = pixelaux.evaluate(model, pixelaux.load_data("shapes")[0].test[:128])[0].mean(1)
    assert lines[-1]["test_bits_per_dim"] == pytest.approx(-nats[1] / 768 / math.log(2), rel=1e-5)
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == [6] and config["batch_size"] == 2
    assert config["data_set"] == "made on the fly"
    begun, = map(json.loads, (run / "commands.jsonl").read_text().splitlines())
    assert TRAIN in begun["command"] and begun["processes"] == 1
    with Image.open(run / "samples.png") as image:
        assert image.width > 400 and np.asarray(image).std() > 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_n_steps_equal_half_and_resume_bit_for_bit(run, tmp_path, monkeypatch, capsys, number):
    """Weights, averages, optimizer and records, whatever torch's generators were at in between."""
    out = tmp_path / "halves"
    with monkeypatch.context() as patch:
        at_batch(patch, lambda step, k: (step, k) == (3, 1) and os.kill(os.getpid(), number))
        assert command(TRAIN, "--out", out) == 130
    assert "stopped at step 4; --resume goes on" in said(capsys)[-1]
    training = torch.load(out / "factor-1.pt", weights_only=True)["training"]
    assert training["step"] == 4 and records(out)[-1]["step"] == 4
    torch.manual_seed(99)
    assert command("train --resume --out", out) == 0
    assert_same_run(run, out)
    before = (out / "factor-1.pt").read_bytes()
    assert command("train --resume --out", out) == 0  # of what is finished nothing changes
    assert (out / "factor-1.pt").read_bytes() == before
    assert_same_run(run, out)


@pytest.mark.parametrize("state", [1, 2])
def test_training_is_a_function_of_the_seed(run, tmp_path, state):
    """Of nothing else: not of torch's generators. Factors trained apart are as those in turn."""
    for k in (1, 0):
        torch.manual_seed(state)
        assert command(TRAIN, "--factor", k, "--out", tmp_path / "apart") == 0
    assert_same_run(run, tmp_path / "apart")
    assert command(TRAIN, "--factor", 0, "--seed", 1, "--out", tmp_path / "other") == 0
    a, b = averages(run), averages(tmp_path / "other")
    assert not all(torch.equal(a[name], b[name]) for name in b)  # control: another seed


def test_factors_trained_apart_are_joined(run, tmp_path, capsys):
    """In a folder, or by a file and its neighbours. Control: a factor that is missing is named."""
    parts = [tmp_path / "a", tmp_path / "b"]
    for k, part in enumerate(parts):
        part.mkdir()
        shutil.copy(run / f"factor-{k}.pt", part)
    assert command("eval", parts[0], "--n", 4) == 2
    assert "factor 1 is missing; `train --resume --out" in said(capsys)[-1]
    shutil.copy(parts[1] / "factor-1.pt", parts[0])
    x = torch.from_numpy(random_images(2)).permute(0, 3, 1, 2)
    expected = pixelaux.load(run).log_prob(x)
    for path in (parts[0], parts[0] / "factor-1.pt", parts[0] / "factor-0.pt"):
        assert torch.equal(pixelaux.load(path).log_prob(x), expected)


def killed(out, *moments):
    """Train --resume once for each moment, and kill it then -> the statuses of os.waitpid.

    line:N is the N-th line run of what trains and writes, write:N the middle of its N-th write.
    """
    code = """if True:
        import os, sys
        import pixelaux
        watched = {"train", "begin", "write_config", "locked", "train_factor", "restore", "write",
                   "write_checkpoint", "write_atomically", "__init__", "show_samples"}
        fsync = os.fsync
        for moment in sys.argv[2:]:
            kind, left = moment.split(":")
            left = int(left)

            def count():
                global left
                left -= 1
                return left == 0

            def trace(frame, event, argument):
                code = frame.f_code
                if code.co_filename != pixelaux.__file__ or code.co_name not in watched:
                    return None
                if event == "line" and count():
                    os.kill(os.getpid(), 9)
                return trace

            def cut(file):
                if count():
                    os.ftruncate(file, os.fstat(file).st_size // 2)
                    os.kill(os.getpid(), 9)
                fsync(file)

            child = os.fork()
            if child == 0:
                if kind == "line":
                    sys.settrace(trace)
                else:
                    os.fsync = cut
                arguments = ["--save-every", "0.000001", "--device", "cpu", "--out", sys.argv[1]]
                os._exit(pixelaux.main(["train", "--resume", *arguments]))
            print(os.waitpid(child, 0)[1])
        """
    return list(map(int, program("-c", code, out, *moments)[0].split()))


def test_bits_of_images_that_are_held_out_are_recorded(tmp_path, small_preset):
    """After each twentieth of the steps, of the averaged weights; also in a resumed run. Images
    made on the fly cannot be held out."""
    images = random_images(40, (16, 16))
    np.save(tmp_path / "images.npy", images)
    out, line = tmp_path / "run", "train --model pyramid --steps 22 --batch-size 2 --hold-out 5"
    assert command(line, "--data", tmp_path / "images.npy", "--out", out) == 0
    name = "held_out_bits_per_dim"
    measured = [(line["step"], line["factor"]) for line in records(out) if name in line]
    parts = [(step, k) for k in (0, 1) for step in range(1, 23) if step * 20 // 22 > (step - 1) * 20 // 22]
    assert measured == parts and len(parts) == 40
    data, _ = pixelaux.load_data(str(tmp_path / "images.npy"))
    held_out = data.holding_out(5).held_out
    nats = pixelaux.evaluate(pixelaux.load(out), held_out)[0].mean(1)
    assert records(out)[-1][name] == pytest.approx(-nats[1] / 768 / math.log(2), rel=1e-5)
    last = [line[name] for line in records(out) if name in line][-1]
    (out / "factor-1.pt").unlink()
    assert command("train --resume --out", out) == 0
    assert [line[name] for line in records(out) if name in line][-1] == last
    assert command("train --hold-out 5 --out", tmp_path / "other") == 2


@settings(max_examples=10)
@given(seed=st.integers(0, 99), wide=st.booleans(), rate=st.floats(0.1, 1))
def test_muon_gives_its_step_equal_singular_values(seed, wide, rate):
    """In the directions of the gradient's own singular vectors, by an SVD in float64; at first its
    momentum is a multiple of the gradient. What is no convolution within blocks is Adam's, whose
    step has all signs of the gradient. Control: the singular values of the gradient are far from
    equal."""
    torch.manual_seed(seed)
    config = pixelaux.Config(muon=0.05, lr=0.01)
    reach = dict(rows=(-1, 0), columns=(-1, 1)) if wide else pixelaux.POINT
    inner = pixelaux.Conv(12, 8, **reach)
    outer = pixelaux.Conv(12, 8, **reach, outermost=True)
    x, network = torch.randn(2, 12, 5, 5), nn.ModuleList([inner, outer])
    optimizer = pixelaux.Optimizer(network, config)
    v = {conv: conv.v.detach().clone() for conv in network}
    rows = v[inner].flatten(1).double()  # their length means nothing
    rows /= rows.norm(dim=1, keepdim=True)
    g = inner.g.detach().clone()
    optimizer.zero_grad()
    ((inner(x) + outer(x)) ** 3).sum().backward()
    gradient = inner.v.grad.flatten(1).double()
    u, singular, w = torch.linalg.svd(gradient, full_matrices=False)
    assert singular.max() > 2 * singular.min()  # control
    optimizer.step(rate)
    step = (inner.v.detach().flatten(1).double() - rows) / (-0.05 * rate)
    along = u.T @ step @ w.T
    assert (along - torch.diag(along.diag())).abs().max() < 0.1
    assert 0.5 < along.diag().min() and along.diag().max() < 1.4
    moved = outer.v.detach() - v[outer]
    assert torch.allclose(moved, -0.01 * rate * outer.v.grad.sign(), atol=1e-4)
    assert torch.allclose(inner.g.detach() - g, -0.01 * rate * inner.g.grad.sign(), atol=1e-4)


def test_training_with_muon_resumes_bit_for_bit_and_learns(tmp_path):
    """Half of the steps and the rest of them, or all in one. Control: without its momentum the rest
    ends elsewhere. Bits fall."""
    data = pixelaux.load_data("shapes", size=(12, 12))[0]
    options = {**SMALL_RUN, "halvings": 0, "steps": (8,), "dropout": 0.5, "muon": 0.03}

    def trained(folder, stop_at=8):
        model = build("pyramid", 12, **options)
        steps = itertools.count(1)
        with contextlib.suppress(KeyboardInterrupt):
            pixelaux.train_factor(model, 0, data, folder, lambda: next(steps) >= 2 * stop_at)
        return torch.load(folder / "factor-0.pt", weights_only=True)

    whole = trained(tmp_path / "whole")
    half = trained(tmp_path / "parts", 3)
    assert half["training"]["step"] < 8
    parts = trained(tmp_path / "parts")
    assert same_weights(whole, parts)
    half["training"]["optimizer"]["muon"]["state"][0]["momentum_buffer"] *= 0
    (tmp_path / "other").mkdir()
    torch.save(half, tmp_path / "other" / "factor-0.pt")
    assert not same_weights(whole, trained(tmp_path / "other"))
    model = build("pyramid", 12, **{**options, "steps": (60,), "dropout": 0.0})
    pixelaux.train_factor(model, 0, data, tmp_path / "long")
    bits = [line["bits_per_dim"] for line in records(tmp_path / "long")]
    assert np.mean(bits[-5:]) < np.mean(bits[:5]) - 0.3


def same_weights(a, b):
    a, b = a["training"]["weights"], b["training"]["weights"]
    return all(torch.equal(a[name], b[name]) for name in a)


# What holds on every device. On a machine without a GPU these are the dry runs of `-k cuda`.
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
ON_DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])


@ON_DEVICES
@pytest.mark.parametrize("name", sorted(pixelaux.MODELS))
def test_a_device_samples_and_learns_what_the_cpu_does(name, device):
    """In float64: the same images, fast and naive; the same gradients. Control: of other weights
    they differ."""
    there, here = small(name, (16, 16)).to(device), small(name, (16, 16))
    fast, naive = (there.sample(3, seed=1, fast=fast)[-1].cpu() for fast in (True, False))
    expected = here.sample(3, seed=1)[-1]
    assert torch.equal(fast, naive) and torch.equal(fast, expected)
    gradients = []
    for model in (there, here):
        x = expected.to(model.device)
        model.log_prob(x, tight=True).sum().backward()
        model.log_prob(x).sum().backward()
        gradients.append([weights.grad.cpu() for weights in model.parameters()])
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8 * float(other.abs().max()) + 1e-12)
    with torch.no_grad():
        next(there.factors[-1].parameters()).add_(0.1)
    assert not torch.equal(there.sample(3, seed=1)[-1].cpu(), expected)


@ON_DEVICES
@pytest.mark.parametrize("muon", [0.0, 0.05])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_device_trains_and_resumes(device, muon, precision, tmp_path, small_preset, monkeypatch):
    """Bits fall; a run that was cut in two ends near where the whole one does; any device has one
    likelihood of it. bfloat16 costs a hundredth. Control: an untrained model is far off."""
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "muon": muon,
                                                   "dropout": 0.0, "nr_filters": 16})
    line = f"train --model pyramid --steps 60 --tight --precision {precision} --device {device}"
    assert command(line, "--out", tmp_path / "whole") == 0
    measured = [line["bits_per_dim"] for line in records(tmp_path / "whole") if line["factor"] == 0]
    assert np.mean(measured[-5:]) < np.mean(measured[:5]) - 0.5
    images = pixelaux.load_data("shapes")[0].test[:64]
    exact = {}
    for other in {device, "cpu"}:
        exact[other] = pixelaux.evaluate(pixelaux.load(tmp_path / "whole", other), images)[1].sum(0)
    assert np.allclose(exact[device], exact["cpu"], rtol=1e-4)

    data, config = pixelaux.load_data("shapes")[0], pixelaux.read_config(tmp_path / "whole")
    stops = iter([False, True])
    for _ in range(2):
        model = pixelaux.PixelAux(config).to(device)
        with contextlib.suppress(KeyboardInterrupt):
            pixelaux.train_factor(model, 0, data, tmp_path / "parts", lambda: next(stops, False))
    parts = [line["bits_per_dim"] for line in records(tmp_path / "parts")]
    assert len(parts) >= 60 and np.allclose(parts[-5:], measured[-5:], atol=0.05)
    untrained = build("pyramid", 16, nr_filters=16)
    untrained.initialise(pixelaux.to_tensor(images))
    assert pixelaux.evaluate(untrained, images)[1].sum(0).mean() < exact["cpu"].mean() - 500


def test_kills_at_any_moment_cost_nothing_but_steps(run, tmp_path):
    """SIGKILL in the middle of a write, and at lines drawn by chance. Control: all were killed."""
    out = tmp_path / "killed"
    out.mkdir()
    shutil.copy(run / "config.json", out)
    lines = np.random.default_rng(0).integers(20, 400, 4)
    moments = ["write:1", "write:2", *(f"line:{line}" for line in lines), "write:2", "write:4"]
    statuses = killed(out, *moments)
    assert statuses == [9] * len(moments)
    assert list(out.glob("part-*")), "no write was cut"
    assert (out / "factor-0.pt").exists()
    assert command("train --resume --out", out) == 0
    assert_same_run(run, out)


def test_records_that_a_kill_has_cut_are_dropped(run, tmp_path):
    """Also those of steps that are done again."""
    out = tmp_path / "cut"
    shutil.copytree(run, out)
    (out / "factor-1.pt").unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"factor": 1, "st')
    assert command("train --resume --out", out) == 0
    assert_same_run(run, out)


def test_the_average_is_the_exponential_moving_average_of_the_weights(tmp_path, monkeypatch):
    """It is what is saved, and what the model has in the end. Control: the last weights differ."""
    fields = dict(halvings=0, steps=(4,), ema=0.6, lr=0.01, muon=0.0)  # Adam for all
    model = build("pyramid", 12, **{**SMALL_RUN, **fields})
    data, seen = pixelaux.load_data("shapes", size=(12, 12))[0], []
    step = torch.optim.Adam.step

    def noted(self, *arguments):
        result = step(self, *arguments)
        seen.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    pixelaux.train_factor(model, 0, data, tmp_path)
    assert len(seen) == 4
    state = torch.load(tmp_path / "factor-0.pt", weights_only=True)
    trained = list(state["training"]["weights"])
    for i, (name, value) in enumerate(model.factors[0].named_parameters()):
        mean = seen[0][i]  # the first step is the start of the average
        for later in seen[1:]:
            mean = 0.6 * mean + 0.4 * later[i]
        assert torch.allclose(state["factors"][0][name], mean, atol=1e-6) and name == trained[i]
        assert torch.equal(value, state["factors"][0][name])
        assert torch.equal(state["training"]["weights"][name], seen[-1][i])
    assert not torch.allclose(mean, seen[-1][i], atol=1e-4)


def test_data_dependent_initialisation_happens_once(run, tmp_path, monkeypatch):
    """At the start of a factor; not in a resumed run, nor in one that starts with weights."""
    calls, initialise = [], pixelaux.data_dependent_init
    monkeypatch.setattr(pixelaux, "data_dependent_init", lambda network, *inputs: (
        calls.append(network.view.shape[1]), initialise(network, *inputs)))
    with monkeypatch.context() as patch:
        at_batch(patch, lambda step, k: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
        assert command(TRAIN, "--out", tmp_path / "a") == 130
    assert calls == [8]
    assert command("train --resume --out", tmp_path / "a") == 0
    assert calls == [8, 16]
    assert command(TRAIN, "--start", run, "--steps", 1, "--out", tmp_path / "b") == 0
    assert calls == [8, 16]


def test_dropout_is_on_in_training_steps_and_nowhere_else(tmp_path, monkeypatch, small_preset):
    """Not in tests, pictures, evaluation, and the data-dependent start."""
    seen, dropout = set(), F.dropout

    def noted(x, p, training, inplace=False):
        seen.add((torch.is_grad_enabled(), training))
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", noted)
    assert command(TRAIN, "--steps", 1, "--out", tmp_path) == 0
    assert command("sample", tmp_path, "--n", 1) == 0
    assert seen == {(True, True), (False, False)}
    model = pixelaux.load(tmp_path)
    x = torch.from_numpy(random_images(2)).permute(0, 3, 1, 2)
    with torch.no_grad():
        for training in (False, True):  # control: it does something
            model.train(training)
            for a, b in zip(model.log_prob_factors(x), model.log_prob_factors(x)):
                assert torch.equal(a, b) != training


def test_bfloat16_keeps_float32_weights_and_costs_little(run, tmp_path):
    """Control: it does compute otherwise."""
    out = tmp_path / "low"
    assert command(TRAIN, "--factor", 0, "--precision", "bfloat16", "--out", out) == 0
    low, high = (records(path)[5]["bits_per_dim"] for path in (out, run))
    assert low != high and low == pytest.approx(high, abs=0.02)
    floats = [v for v in checkpoints(out).values() if torch.is_tensor(v) and v.is_floating_point()]
    assert len(floats) > 20 and all(value.dtype == torch.float32 for value in floats)


def test_compiled_training_is_the_same_and_falls_back(run, tmp_path, monkeypatch, capsys):
    """Compilation that fails, when it is asked for or when it is used, is warned of in one line."""
    plain, calls = torch.compile, []

    def eager(module, **_):
        calls.append(1)
        return plain(module, backend="aot_eager")

    def late(module, **options):
        return plain(module, backend=lambda *_: 1 / 0)

    def early(module, **options):
        raise RuntimeError("no compiler\nand more")

    for name, compile in (("eager", eager), ("late", late), ("early", early)):
        monkeypatch.setattr(torch, "compile", compile)
        assert command(TRAIN, "--factor", 0, "--compile", "--out", tmp_path / name) == 0
        warnings = [line for line in said(capsys) if "warning" in line]
        assert len(warnings) == (name != "eager")
        assert all("training without torch.compile, which failed: " in line for line in warnings)
        a, b = averages(run), averages(tmp_path / name)
        assert b and all(torch.allclose(a[key], b[key], atol=1e-3) for key in b)
        assert name == "eager" or all(torch.equal(a[key], b[key]) for key in b)
    assert calls == [1]


SLOW = pytest.mark.skipif(not os.environ.get("PIXELAUX_SLOW") or not shutil.which("g++"),
                          reason="a real compiler takes half a minute: PIXELAUX_SLOW=1, and g++")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=SLOW), pytest.param("cuda", marks=NO_CUDA)])
def test_training_with_a_real_compiler_is_the_same(run, tmp_path, monkeypatch, capsys, device):
    """To rounding, and without a warning. (Without dropout, for which it draws other numbers.)"""
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "dropout": 0.0})
    line = f"{TRAIN} --steps 3 --factor 0 --precision float32 --device {device} --out"
    assert command(line, tmp_path / "plain") == 0
    assert command(line, tmp_path / "compiled", "--compile") == 0
    assert not [told for told in said(capsys) if "without torch.compile" in told]
    a, b = averages(tmp_path / "plain"), averages(tmp_path / "compiled")
    assert b and all(torch.allclose(a[key], b[key], atol=1e-3) for key in b)


def torchrun(script, *arguments):
    """A script in two processes -> (status, all that they said)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(script), *map(str, arguments)], cwd=HERE, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def without_dropout(monkeypatch):
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "dropout": 0.0})


def test_two_processes_train_as_one_does(run, tmp_path, monkeypatch):
    """The same gradients of the whole batch. Control: half of every batch has others."""
    without_dropout(monkeypatch)
    line = "train --model pyramid --factor 0 --steps 3 --lr 0.0001 --out"
    for n in (8, 4):
        assert command(line, tmp_path / f"one-{n}", "--batch-size", n) == 0
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one-8" / "config.json", tmp_path / "two")
    arguments = ["train", "--resume", "--factor", 0, "--device", "cpu", "--out", tmp_path / "two"]
    status, text = torchrun(HERE / "pixelaux.py", *arguments)
    assert status == 0 and text.count("factor 0 is in") == 1 and text.count("100%") >= 1, text
    two, one, half = (checkpoints(tmp_path / name) for name in ("two", "one-8", "one-4"))
    assert two.keys() == one.keys()
    moments = [name for name in one if name.endswith("exp_avg")]  # a mean of the gradients
    assert len(moments) > 10
    for name in moments:
        scale = float(one[name].abs().max())
        assert torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-4 * scale), name
    far = [not torch.allclose(half[name], one[name], rtol=0.05) for name in moments]
    assert np.mean(far) > 0.9
    for name, value in averages(tmp_path / "one-8").items():
        assert torch.allclose(two[name], value, atol=1e-6), name
    for a, b in zip(records(tmp_path / "two"), records(tmp_path / "one-8"), strict=True):
        assert a["step"] == b["step"]
        assert a["bits_per_dim"] == pytest.approx(b["bits_per_dim"], rel=1e-5)
    begun, = map(json.loads, (tmp_path / "two" / "commands.jsonl").read_text().splitlines())
    assert begun["processes"] == 2


def test_a_lost_process_ends_the_run_which_can_be_resumed(run, tmp_path):
    """One of two kills itself at step 3 of factor 1."""
    out = tmp_path / "lost"
    out.mkdir()
    shutil.copy(run / "config.json", out)
    script = tmp_path / "lost.py"
    script.write_text("""if True:
        import os, sys
        import pixelaux
        batch = pixelaux.Dataset.batch

        def lost(self, step, n, seed, *more):
            if (pixelaux.rank(), step, seed[1]) == (1, 3, 1):
                os.kill(os.getpid(), 9)
            return batch(self, step, n, seed, *more)

        pixelaux.Dataset.batch = lost
        sys.exit(pixelaux.main(sys.argv[1:]))
        """)
    status, text = torchrun(script, "train", "--resume", "--device", "cpu", "--out", out)
    assert status != 0 and "SIGKILL" in text, text
    assert "; --resume goes on" in text, text  # of the loss and torchrun's SIGTERM, either is first
    step = torch.load(out / "factor-1.pt", weights_only=True)["training"]["step"]
    assert step in (2, 3)
    assert command("train --resume --out", out) == 0
    assert len(checkpoints(out)) == len(checkpoints(run))
    assert [r["step"] for r in records(out)] == [r["step"] for r in records(run)]


def test_what_is_not_torchruns_environment_is_ignored(tmp_path, monkeypatch, small_preset):
    """A batch system's or a musician's RANK."""
    for name, value in {"RANK": "gold", "LOCAL_RANK": "gold", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert command(TRAIN, "--factor", 0, "--steps", 1, "--out", tmp_path) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch, capsys,
                                                                    small_preset):
    """The checkpoint before it stays, and is named."""
    log_prob, calls = LogisticMixture.log_prob, []

    def broken(self, x, intervals=None):
        calls.extend([1] * torch.is_grad_enabled())  # training steps alone
        return log_prob(self, x, intervals) * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(LogisticMixture, "log_prob", broken)
    assert command(TRAIN, "--out", tmp_path) == 1
    line = said(capsys)[-1]
    assert "not finite at step 4" in line and f"the last good checkpoint is {tmp_path}" in line
    state = torch.load(tmp_path / "factor-0.pt", weights_only=True)
    assert state["training"]["step"] == 3
    assert all(value.isfinite().all() for value in state["factors"][0].values())
    calls.clear()
    monkeypatch.setattr(LogisticMixture, "log_prob", lambda self, x, intervals=None: (
        log_prob(self, x, intervals) * (math.nan if torch.is_grad_enabled() else 1.0)))
    assert command(TRAIN, "--out", tmp_path / "at-once") == 1
    assert "at step 1 " in (line := said(capsys)[-1]) and "is not there" in line


def test_checkpoints_are_as_far_apart_as_told(tmp_path, monkeypatch, small_preset):
    """And after each quarter."""
    Clock(monkeypatch)
    at, write = [], pixelaux.write_checkpoint

    def noted(path, config, factors, training):
        at.append(training["step"])
        write(path, config, factors, training=training)

    monkeypatch.setattr(pixelaux, "write_checkpoint", noted)
    line = "train --model pyramid --factor 0 --steps 40 --save-every 6.5 --out"
    assert command(line, tmp_path) == 0
    assert at == [7, 10, 17, 20, 27, 30, 37, 40]


def test_a_stop_at_the_last_step_finishes_the_factor(tmp_path, monkeypatch):
    """There is nothing to go on with. Control: a step before, it stops."""
    data, stopped = pixelaux.load_data("shapes", size=(12, 12))[0], []
    for last, name in ((2, "finished"), (1, "stopped")):
        stopped.clear()
        model = build("pyramid", 12, **{**SMALL_RUN, "halvings": 0, "steps": (3,)})
        with monkeypatch.context() as patch:
            at_batch(patch, lambda step, k: step == last and stopped.append(step))
            with contextlib.ExitStack() as held:
                if name == "stopped":
                    held.enter_context(pytest.raises(KeyboardInterrupt, match="at step 2"))
                made = pixelaux.train_factor(
                    model, 0, data, tmp_path / name, stop=lambda: len(stopped) > 0)
                assert made == 3


def test_a_model_in_either_mode_trains_with_dropout_and_ends_without(tmp_path, monkeypatch):
    """As `load` returns models in evaluation mode, and log_prob is to be without dropout after."""
    fields = {**SMALL_RUN, "halvings": 0, "steps": (1,), "dropout": 0.5}
    model, modes, forward = build("pyramid", 12, **fields).eval(), set(), Factor.forward

    def noted(self, *arguments):
        modes.add((torch.is_grad_enabled(), self.training))
        return forward(self, *arguments)

    monkeypatch.setattr(Factor, "forward", noted)
    pixelaux.train_factor(model, 0, pixelaux.load_data("shapes", size=(12, 12))[0], tmp_path)
    assert modes == {(True, True), (False, False)} and not model.factors[0].training


class Clock:
    """Stands in for time.monotonic: a training step takes `pace` seconds, all else none."""

    def __init__(self, monkeypatch):
        self.now, self.pace, self.steps = 0.0, 1.0, []
        monkeypatch.setattr(pixelaux.time, "monotonic", lambda: self.now)
        at_batch(monkeypatch, self.tick)

    def tick(self, step, k):
        self.now += self.pace
        self.steps.append((k, step))


def test_minutes_fix_the_steps_once_and_for_all(tmp_path, monkeypatch, small_preset):
    """From the speed of the first ones; what follows, slower or resumed, has no say."""
    clock, out = Clock(monkeypatch), tmp_path / "minutes"
    line = "train --model pyramid --minutes 0.1,0.2 --out"
    assert command(line, out) == 0
    config = json.loads((out / "config.json").read_text())
    # 6 and 12 seconds, of which 2 tell the pace; the first step of all, which may be slow, is free.
    assert config["steps"] == [4, 10] and config["anneal"] and config["minutes"] == [0.1, 0.2]
    lines = records(out)
    assert [max(r["step"] for r in lines if r["factor"] == k) for k in (0, 1)] == [4, 10]
    assert "test_bits_per_dim" in lines[-1]
    assert curves.read_metrics(out)[-1]["seconds"] == 12
    assert command("train --model pyramid --factor 0 --steps 4 --out", tmp_path / "steps") == 0
    a, b = averages(tmp_path / "steps"), averages(out)
    assert all(torch.equal(a[name], b[name]) for name in a)  # the steps that were tried left nothing

    other = tmp_path / "interrupted"
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_batch(patch, lambda step, k: (k, step) == (1, 7) and stop())
        assert command(line, other) == 130
    assert json.loads((other / "config.json").read_text())["steps"] == [4, 10]
    clock.pace = 50.0
    assert command("train --resume --minutes 0.1,0.2 --out", other) == 0
    assert_same_run(out, other)  # bit for bit, as the learning rates are those of the plan
    assert curves.read_metrics(other)[-1]["seconds"] == 2 + 8 + 2 * 50
    clock.pace = 2.0  # control: half the speed, half the steps
    assert command("train --factor 0 --minutes 0.2 --out", tmp_path / "slow") == 0
    assert json.loads((tmp_path / "slow" / "config.json").read_text())["steps"][0] == 4


@pytest.mark.parametrize("minutes, pace, expected, made", [
    (10, 1.0, (582, 18.0), 19), (0.1, 1.0, (4, 2.0), 3), (0.1, 50.0, (1, 100.0), 3)])
def test_the_pace_is_told_by_3_percent_of_the_time(monkeypatch, minutes, pace, expected, made):
    """By two steps at least; the first one of all does not count. A step is made in any case. The
    time is the mean of the processes; a loss that is not finite ends it."""
    now, steps, losses = [0.0], [], itertools.repeat(1.0)
    monkeypatch.setattr(pixelaux.time, "monotonic", lambda: now[0])

    def make_step(number, of):
        steps.append((number, of))
        now[0] += pace if number else 1000.0
        return torch.tensor(next(losses))

    def told():
        steps.clear()
        return pixelaux.steps_in(minutes, make_step, pixelaux.never, torch.device("cpu"))

    assert told() == expected
    assert steps == [(number, math.inf) for number in range(made)]
    losses = itertools.chain([1.0, 1.0, math.nan], itertools.repeat(1.0))
    told()
    assert len(steps) == 3
    losses = itertools.repeat(1.0)
    monkeypatch.setattr(pixelaux, "mean_of_processes", lambda values, device: [
        values[0], 2 * values[1], values[2]])
    assert told()[1] == pytest.approx(max(0.03 * 60 * minutes, 4 * pace))


def test_steps_that_are_taken_back_leave_nothing_even_if_they_end_in_an_error():
    """Control: the step did change the weights."""
    model = build("pyramid", 12, **{**SMALL_RUN, "halvings": 0})
    training = pixelaux.Training(model.factors[0], model.config, model.dims)
    images = torch.from_numpy(random_images(2, (12, 12))).permute(0, 3, 1, 2)
    before = [weight.clone() for weight in training.trained.parameters()]
    with pytest.raises(KeyboardInterrupt), training.taken_back():
        training.step((images, None), 1.0)
        assert not all(map(torch.equal, training.trained.parameters(), before))
        raise KeyboardInterrupt
    assert all(map(torch.equal, training.trained.parameters(), before))
    assert all(map(torch.equal, training.average.module.parameters(), before))


def test_minutes_of_a_run_stopped_before_steps_are_fixed(tmp_path, monkeypatch, small_preset, capsys):
    """By a signal, or killed where they are just written down: it ends as one that is not stopped."""
    Clock(monkeypatch)
    line = "train --model pyramid --factor 0 --minutes 0.2 --out"
    assert command(line, tmp_path / "whole") == 0
    early = tmp_path / "early"
    with monkeypatch.context() as patch:
        at_batch(patch, lambda step, k: step == 1 and os.kill(os.getpid(), signal.SIGTERM))
        assert command(line, early) == 130
    assert "while trying the pace" in said(capsys)[-1]
    assert json.loads((early / "config.json").read_text())["steps"] == [0]
    late, record_steps = tmp_path / "late", pixelaux.record_steps

    def killed(*arguments):
        record_steps(*arguments)
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(pixelaux, "record_steps", killed)
        assert command(line, late) == 9
    assert json.loads((late / "config.json").read_text())["steps"][0] == 10
    for out in (early, late):
        assert not (out / "factor-0.pt").exists()
        assert command("train --resume --factor 0 --out", out) == 0
        a, b = averages(tmp_path / "whole"), averages(out)
        assert len(a) > 10 and all(torch.equal(a[name], b[name]) for name in a)
        assert records(out)[-1]["step"] == 10


def test_a_start_takes_what_no_flag_says_from_the_weights_run(tmp_path, small_preset, capsys):
    """Model, preset, size, look_right, tight, data; it says which files it begins with. Controls:
    flags go before; without --start it is the default."""
    line = "train --steps 1 --batch-size 2"
    images = tmp_path / "images.npy"
    np.save(images, random_images(40, (12, 12)))
    flags = "--model", "grayscale", "--data", images, "--no-look-right", "--tight"
    assert command(line, *flags, "--out", tmp_path / "first") == 0

    def begun(name, *flags):
        capsys.readouterr()
        assert command(line, "--factor", 0, *flags, "--out", tmp_path / name) == 0
        assert ("begins with " in capsys.readouterr().out) == ("--start" in flags)
        config = json.loads((tmp_path / name / "config.json").read_text())
        return [config[name] for name in ("model", "size", "look_right", "tight", "data")]

    start = "--start", tmp_path / "first"
    theirs = ["grayscale", [12, 12], False, True, str(images)]
    assert begun("second", *start) == theirs
    flags = "--data", "shapes", "--size", 16, "--look-right", "--no-tight"
    assert begun("other", *start, *flags) == ["grayscale", [16, 16], True, False, "shapes"]
    assert begun("default") == ["pyramid", [16, 16], True, False, "shapes"]


def test_training_starts_from_the_weights_of_another_run(run, tmp_path, capsys, monkeypatch):
    """Control: without, it starts elsewhere. Weights of another model are refused."""
    line = "train --model pyramid --batch-size 2 --steps 1 --lr 1e-12 --out"
    assert command(line, tmp_path / "more", "--start", run) == 0
    assert command(line, tmp_path / "fresh") == 0
    a, b, fresh = (averages(path) for path in (run, tmp_path / "more", tmp_path / "fresh"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert np.mean([not torch.allclose(a[name], fresh[name], atol=1e-6) for name in a]) > 0.9
    (tmp_path / "more" / "factor-1.pt").unlink()
    assert command("train --resume --out", tmp_path / "more") == 0  # it starts there, too
    b = averages(tmp_path / "more")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    capsys.readouterr()
    line = "train --model pixelcnn --steps 1 --out"
    assert command(line, tmp_path / "other", "--start", run) == 2
    assert re.search(f"--start: {run} is of another model", said(capsys)[-1])
    assert not (tmp_path / "other").exists()
    layout = pixelaux.PRESETS["tiny"]["layout_embed"][:-1] + ((0, 0),)  # the run has blocks more
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "layout_embed": layout})
    assert command("train --steps 1 --start", run, "--out", tmp_path / "other") == 2
    assert "is of another model, preset or size: it has factors.1.embed" in said(capsys)[-1]


@settings(max_examples=60)
@given(lr=st.floats(1e-6, 1), decay=st.floats(0.9, 1), steps=st.integers(1, 5000), data=st.data(),
       anneal=st.booleans(), start=st.booleans(), beta=st.sampled_from([0.99, 0.9995]))
def test_learning_rates_follow_their_formula(lr, decay, steps, data, anneal, start, beta):
    """lr decay^step; annealed to 0; after --start from 0 up, over 2 / (1 - beta2) steps."""
    step = data.draw(st.integers(0, steps - 1))
    config = pixelaux.Config(lr=lr, lr_decay=decay, anneal=anneal, start="x" if start else "",
                             betas=(0.9, beta))
    expected = lr * math.exp(step * math.log(decay))
    if anneal:
        expected *= (steps - step) / steps
    if start:
        warm = 2 / (1 - beta)
        expected *= (step + 1) / warm if step + 1 < warm else 1
    found = config.lr * pixelaux.share_of_rate(config, step, steps)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_optimizer_takes_the_learning_rates_of_the_formula(run, tmp_path, monkeypatch):
    """Annealed, as the preset says, and with a warm-up of 200 steps after --start."""
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: (
        rates.append(self.param_groups[0]["lr"]), step(self, *a))[1])
    line = "train --model pyramid --batch-size 2 --factor 0 --steps 4 --out"
    assert command(line, tmp_path / "plain") == 0
    assert command(line, tmp_path / "started", "--start", run) == 0
    assert np.allclose(rates[:4], [0.01 * (1 - i / 4) for i in range(4)])
    assert np.allclose(rates[4:], [0.01 * (1 - i / 4) * (i + 1) / 200 for i in range(4)])


def test_the_papers_schedule():
    """30 epochs for 4-bit gray, 200 for the images given it; CelebA's 60."""
    data = Dataset(np.zeros((50000, 1, 1, 3), np.uint8), np.zeros((1, 1, 1, 3), np.uint8))
    config = build("grayscale", 32, "cifar10", nr_filters=2).config
    assert [pixelaux.steps_of(config, k, data) for k in (0, 1)] == [
        math.ceil(30 * 50000 / 64), 200 * 50000 // 64]
    assert (config.lr, config.lr_decay) == (1e-3, 0.99999)
    assert (config.dropout, config.batch_size) == (0.5, 64)
    config = build("pyramid", 128, "celeba", nr_filters=2).config
    assert [pixelaux.steps_of(config, k, data) for k in (0, 4)] == [60 * 50000 // 16] * 2
    assert (config.lr, config.lr_decay) == (1e-3, 0.999995)
    assert pixelaux.PRESETS["celeba"]["nr_filters"] == 100


def global_state():
    flags = torch.backends.cudnn
    return [
        torch.get_rng_state().tolist(), repr(np.random.get_state()), torch.is_grad_enabled(),
        torch.get_default_dtype(), torch.get_num_threads(), flags.benchmark, flags.deterministic,
        flags.enabled, flags.allow_tf32, torch.is_autocast_enabled("cpu"), os.getcwd(), sys.path[:],
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


def test_commands_leave_global_state_as_it_was(run, tmp_path):
    """Of torch, numpy and signals, also where they fail. Control: a draw is seen."""
    torch.manual_seed(5)
    before = global_state()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    mine = global_state()
    assert command(TRAIN, "--steps", 1, "--factor", 0, "--out", tmp_path) == 0
    assert command(TRAIN, "--steps", 1, "--factor", 0, "--out", tmp_path) == 2
    assert command("eval", run, "--n", 2) == 0 and command("sample", run, "--n", 1) == 0
    assert global_state() == mine != before
    signal.signal(signal.SIGTERM, handler)
    assert global_state() == before
    torch.rand(1)
    assert global_state() != before


def test_training_runs_in_any_thread(run, tmp_path):
    """Where signals cannot be set. The result is the same."""
    done = []
    arguments = [TRAIN, "--factor", "0", "--out", str(tmp_path)]
    thread = threading.Thread(target=lambda: done.append(command(*arguments)))
    thread.start()
    thread.join()
    a, b = averages(run), averages(tmp_path)
    assert done == [0] and b and all(torch.equal(a[name], b[name]) for name in b)


def test_training_learns(tmp_path):
    """From Python, in a folder that it makes. Control: before, images were less probable."""
    shapes = Shapes((12, 12))
    few = shapes.sample(32, 0)
    settings = {**SMALL_RUN, "dropout": 0.0, "batch_size": 8, "steps": (60,), "lr": 0.01}
    model = build("pyramid", 12, **settings)
    data = Dataset(few, few)
    model.initialise(data.batch(0, 32, (0, 0)))
    before = pixelaux.evaluate(model, few)[0].sum(0).mean()
    pixelaux.train_factor(model, 0, data, tmp_path / "new" / "folder")
    assert pixelaux.evaluate(model, few)[0].sum(0).mean() > before + 200


def test_few_test_images_are_warned_of(tmp_path, monkeypatch, capsys, small_preset):
    """Control: of enough images there is no word. A run without --out has the name of its data."""
    monkeypatch.chdir(tmp_path)
    for n, warnings in ((100, 1), (1500, 0)):
        np.save(f"{n}.npy", random_images(n, (8, 8)))
        tests = len(pixelaux.load_data(f"{n}.npy")[0].test)
        assert (tests < 32) == warnings
        capsys.readouterr()
        assert command("train --model pixelcnn --factor 0 --steps 1 --data", f"{n}.npy") == 0
        told = [line for line in said(capsys) if "test images only" in line]
        assert len(told) == warnings and all(f"warning: {tests} test images" in x for x in told)
        assert pathlib.Path(f"runs/pixelcnn-{n}/factor-0.pt").exists()


# --- One run, one folder, one process ------------------------------------------------------------


@contextlib.contextmanager
def held(path):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_factor_is_trained_by_one_process_at_a_time(run, tmp_path, capsys):
    """While its lock is held. Another factor may be trained beside; later it goes on."""
    assert (run / ".lock-factor-0").exists()
    shutil.copy(run / "config.json", tmp_path)
    with held(tmp_path / ".lock-factor-0"):
        for line in ("train --resume", "train --factor 0", "train --factor 0 --resume"):
            capsys.readouterr()
            assert command(line, "--out", tmp_path) == 2
            lines = said(capsys)
            assert len(lines) == 1 and "--out: another process is training factor-0" in lines[0]
        assert not (tmp_path / "metrics.jsonl").exists()
        assert command("train --factor 1 --out", tmp_path) == 0
    assert command("train --resume --out", tmp_path) == 0
    assert_same_run(run, tmp_path)


def test_a_killed_process_leaves_no_lock(tmp_path):
    """Control: as long as it lives, the lock is held."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with pixelaux.locked(tmp_path, "factor-0"):
            os.write(write, b"x")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(read, 1) == b"x"
        with pytest.raises(Problem, match="another process"), pixelaux.locked(tmp_path, "factor-0"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pixelaux.locked(tmp_path, "factor-0"):
        pass
    os.close(read), os.close(write)


def test_a_run_that_was_begun_meanwhile_is_agreed_with_or_refused(tmp_path):
    """What the other's minutes have become is taken over; places of the data may differ, and
    nothing else; a factor that is there by now is refused, unless it is resumed."""

    def config(**fields):
        return make_config("tiny", model="pyramid", size=(16, 16), data_set="one", **fields)

    def agreed(there, ours, factors=(1,), resume=False):
        pixelaux.write_config(tmp_path, there)
        pixelaux.agree(tmp_path, ours, factors, resume)
        return ours

    minutes = dict(minutes=(0.5,), steps=(0,))
    there = config(minutes=(0.5,), steps=(900, 0))
    assert tuple(agreed(there, config(**minutes)).steps) == (900, 0)
    for other in (config(minutes=(0.6,), steps=(0,)), config(seed=1, **minutes)):
        with pytest.raises(Problem, match="other settings"):
            agreed(there, other)
    with pytest.raises(Problem, match="other settings"):  # without minutes steps are a setting
        agreed(config(steps=(900,)), config(steps=(800,)))
    moved = config(data="folder:/there", data_dir="/a", **minutes)
    agreed(config(data="folder:/here", data_dir="/b", **minutes), moved)
    assert (moved.data, moved.data_dir) == ("folder:/there", "/a")
    (tmp_path / "factor-1.pt").touch()
    agreed(there, config(**minutes), factors=[0])
    agreed(there, config(**minutes), factors=[0, 1], resume=True)
    for factors in ([1], [0, 1]):
        with pytest.raises(Problem, match="holds a run by now"):
            agreed(there, config(**minutes), factors)


# --- Checkpoints that cannot be used -------------------------------------------------------------


def spoiled(run, out, spoil):
    """A copy of the run, of whose factor-1.pt `spoil` makes another state."""
    shutil.copytree(run, out)
    state = torch.load(out / "factor-1.pt", weights_only=True)
    torch.save(spoil(state), out / "factor-1.pt")
    return out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(run, tmp_path, capsys, value):
    """By every command. Control: with the number put back they are taken."""
    def spoil(state):
        state["factors"][1]["net.last.b"][3] = value
        return state

    out = spoiled(run, tmp_path / "spoiled", spoil)
    expected = f"{out / 'factor-1.pt'}: factor 1 has weights that are not finite"
    with pytest.raises(Problem, match=re.escape(expected)):
        pixelaux.load(out)
    for line in (f"eval {out} --n 1", f"sample {out} --n 1",
                 f"train --start {out} --steps 1 --out never"):
        capsys.readouterr()
        assert command(line) == 2
        assert len(lines := said(capsys)) == 1 and expected in lines[0]
    value = 0.0
    shutil.rmtree(out)
    pixelaux.load(spoiled(run, out, spoil))


SPOILED = {
    "cut": lambda path, state: path.write_bytes(path.read_bytes()[:3000]),
    "empty": lambda path, state: path.write_bytes(b""),
    "foreign": lambda path, state: path.write_bytes(b"hello"),
    "a list": lambda path, state: torch.save([1], path),
    "other keys": lambda path, state: torch.save({"weights": 1}, path),
    "code": lambda path, state: torch.save({**state, "config": Half()}, path),
    "old format": lambda path, state: torch.save(
        {**state, "format": "pixelaux", "version": 2}, path),
    "another format": lambda path, state: torch.save({**state, "format": "pixelaux 3"}, path),
    "no factors": lambda path, state: torch.save({**state, "factors": {}}, path),
    "no config": lambda path, state: torch.save({**state, "config": {}}, path),
    "config unknown": lambda path, state: torch.save({**state, "config": {"surprise": 1}}, path),
    "factor 9": lambda path, state: torch.save(
        {**state, "factors": {9: state["factors"][0]}}, path),
    "a folder": lambda path, state: (path.unlink(), path.mkdir()),
    "a bit flipped": lambda path, state: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content):
    """The same with another bit in the middle, which is among the weights."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("kind", SPOILED)
def test_a_checkpoint_that_is_not_ours_or_damaged_is_one_line(run, tmp_path, capsys, kind):
    """For eval and for --resume. Control: the file as it was."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    path = out / "factor-0.pt"
    assert command("eval", out, "--n", 1) == 0
    SPOILED[kind](path, torch.load(path, weights_only=True))
    for line in (f"eval {out} --n 1", f"train --resume --out {out}"):
        if line.startswith("train") and kind in ("config unknown", "factor 9"):
            continue  # it goes by config.json, and by the name of the file
        capsys.readouterr()
        assert command(line) == 2, line
        assert len(lines := said(capsys)) == 1 and str(path) in lines[0], lines


def test_a_model_of_ones_own_is_known_to_the_file_that_defines_it(run, monkeypatch):
    pixelaux.load(run)  # control
    monkeypatch.delitem(pixelaux.MODELS, "pyramid")
    with pytest.raises(Problem, match="unknown model 'pyramid'.*call the file that defines it"):
        pixelaux.load(run)


def test_an_error_of_writing_names_the_file_and_not_its_part(tmp_path, monkeypatch):
    """Also where not even the part can be removed, as on a read-only disk."""
    def fails(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "part")

    for names in ([], ["unlink"]):
        for name in names:
            monkeypatch.setattr(pathlib.Path, name, fails)
        with pytest.raises(OSError) as caught:
            pixelaux.write_atomically(tmp_path / "result", fails)
        assert caught.value.filename == str(tmp_path / "result")


def test_a_run_of_another_model_does_not_mix(run, tmp_path, capsys, small_preset):
    """Neither in load, nor in a resumed training."""
    other = tmp_path / "other"
    assert command("train --model pixelcnn --steps 1 --out", other) == 0
    shutil.copy(run / "factor-0.pt", other / "factor-0.pt")
    capsys.readouterr()
    assert command("train --resume --out", other) == 2
    assert f"{other / 'factor-0.pt'}: training as in config.json" in said(capsys)[-1]
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    state = torch.load(run / "factor-1.pt", weights_only=True)
    state["factors"] = {1: {name: value[..., :1] for name, value in state["factors"][1].items()}}
    torch.save(state, mixed / "factor-1.pt")
    assert command("eval", mixed) == 2 and "factor 1 is of another model" in said(capsys)[-1]


# --- A training set that changes or moves --------------------------------------------------------


@pytest.fixture
def on_file(tmp_path, monkeypatch, small_preset):
    """A finished run of two steps on images.npy, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", random_images(60, (8, 8)))
    assert command("train --model pixelcnn --steps 2 --data images.npy --out run") == 0
    return tmp_path


def test_a_changed_training_set_is_refused_by_resume_and_told_by_eval(on_file, capsys):
    """With both counts and fingerprints, and what changed. Control: the same images in another order
    are the same."""
    images = np.load("images.npy")
    count = lambda: pixelaux.describe(pixelaux.load_data("images.npy")[0])
    before = count()
    np.save("images.npy", images[::-1])
    capsys.readouterr()
    assert command("train --resume --out run") == 0 and command("eval run") == 0
    assert not [line for line in said(capsys) if "trained on" in line or "--data" in line]
    np.save("images.npy", np.concatenate([images, random_images(1, (8, 8), seed=1)]))
    after = count()
    assert re.fullmatch(r"\d+ images, [0-9a-f]{12}", before) and before != after
    assert command("train --resume --out run") == 2
    assert len(lines := said(capsys)) == 1 and "--data" in lines[0]
    assert before in lines[0] and after in lines[0] and "(1 new, 0 gone)" in lines[0]
    np.save("images.npy", np.concatenate([images[2:], random_images(1, (8, 8), seed=1)]))
    assert command("eval run") == 0 and "(1 new, 2 gone)" in "".join(said(capsys))
    np.save("images.npy", np.concatenate([images, random_images(1, (8, 8), seed=1)]))
    assert command("eval run") == 0
    told = [line for line in said(capsys) if "trained on" in line]
    assert len(told) == 1 and before in told[0] and after in told[0]
    assert command("eval run --data images.npy") == 0  # asked for: nothing to tell
    assert not [line for line in said(capsys) if "trained on" in line]


def test_a_folder_of_images_may_move(tmp_path, monkeypatch, capsys, small_preset):
    """Control: another folder's images are refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder, seed in (("here", 0), ("other", 1)):
        pathlib.Path(folder).mkdir()
        for i, image in enumerate(random_images(8, (12, 12), seed)):
            Image.fromarray(image).save(f"{folder}/{i}.png")
    line = "train --model pixelcnn --size 12 --steps 1 --out run"
    assert command(line, "--data", "folder:here") == 0
    os.rename("here", "there")
    assert command("train --resume --out run") == 2
    assert command("train --resume --out run --data folder:there") == 0
    capsys.readouterr()
    assert command("train --resume --out run --data folder:other") == 2
    assert "was begun with" in said(capsys)[-1]


def test_a_npy_file_may_move(on_file, capsys):
    """Control: another file's images are refused."""
    os.rename("images.npy", "moved.npy")
    np.save("other.npy", random_images(60, (8, 8), seed=2))
    assert command("train --resume --out run") == 2
    assert command("train --resume --out run --data moved.npy") == 0
    capsys.readouterr()
    assert command("train --resume --out run --data other.npy") == 2
    assert "was begun with" in said(capsys)[-1]


# --- Bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory, run):
    """A folder with a run, `good`, and files that are none."""
    place = tmp_path_factory.mktemp("bad")
    shutil.copytree(run, place / "good")
    shutil.copytree(run, place / "begun")
    (place / "begun" / "factor-1.pt").unlink()
    for folder in ("nothing", "odd", "wrong"):
        (place / folder).mkdir()
    (place / "odd" / "config.json").write_text('{"surprise": 1}')
    (place / "wrong" / "config.json").write_text("no JSON")
    (place / "file").touch()
    (place / "bad.npy").write_bytes(b"no array")
    (place / "half.zip").write_bytes(b"PK")
    np.save(place / "small.npy", random_images(40, (8, 8)))
    np.save(place / "tall.npy", random_images(40, (17, 16)))
    np.save(place / "gray.npy", random_images(40, (8, 8), channels=1))
    np.save(place / "alike.npy", np.zeros((40, 8, 8, 3), np.uint8))
    return place


BAD = [
    ("", "required"), ("nonsense", "nonsense"), ("eval gone --modle x", "--modle"),
    ("eval gone --modle x", "eval --help"), ("train --nonsense", "--nonsense"),
    # train
    ("train --model nonsense", "--model"), ("train --preset huge", "--preset"),
    ("train --data nonsense", "nonsense: expected shapes"), ("train --steps 0", "--steps"),
    ("train --steps 1.5", "--steps: '1.5': expected a whole number"), ("train --seed -1", "--seed"),
    (f"train --seed {'9' * 30}", "--seed"), ("train --lr nan", "--lr"), ("train --lr 0", "--lr"),
    ("train --lr fast", "--lr: 'fast': expected a number above 0"), ("train --size 12y", "--size"),
    ("train --size 8x8x8", "HEIGHTxWIDTH"), ("train --size 0", "--size"),
    ("train --size 16x", "HEIGHTxWIDTH"),
    ("train --start good --model grayscale --data cifar10", "a pyramid of 2 views, expected a grayscale of 2 views"),
    ("train --size -8x16", "--size"), ("train --device cuda:77", "--device"),
    ("train --device tpu", "--device"), ("train --batch-size 0", "--batch-size"),
    ("train --factor 5", "--factor 5: expected 0..1"), ("train --factor -1", "--factor"),
    ("train --factor x", "--factor"), ("train --minutes 1,-2", "--minutes"),
    ("train --minutes 1,inf", "--minutes"), ("train --minutes ''", "--minutes"),
    ("train --minutes 1 --steps 2", "--steps and --minutes"),
    ("train --minutes 1,2,3", "--minutes"), ("train --precision int8", "--precision"),
    ("train --save-every 0", "--save-every"), ("train --size 18", "multiples of"),
    ("train --size 18 --data folder:nothing", "multiples of"), ("train --size 4", "size 4x4"),
    ("train --model pixelcnn --size 8", "--size 8x8"), ("train --data cifar10 --size 16", "32x32"),
    ("train --data folder:none", "none: No such file"), ("train --data folder:", "folder"),
    ("train --data folder:nothing", "nothing: no image files"),
    ("train --data folder:half.zip", "half.zip"),
    ("train --data celeba --data-dir nothing", "img_align_celeba"),
    ("train --data bad.npy", "bad.npy: not a .npy file"),
    ("train --data gone.npy", "gone.npy: No such"),
    ("train --data small.npy --size 64", "small.npy: images are 8x8 (height x width), not 64x64"),
    ("train --data tall.npy", "17x16"), ("train --data gray.npy", "gray.npy"),
    ("train --data alike.npy", "two different images"),
    ("train --out good", "--out: good holds a run; --resume"), ("train --resume", "holds no run"),
    ("train --resume --out gone", "gone holds no run"), ("train --out file/run", "file"),
    ("train --out good --factor 1", "--out: good holds a run"),
    ("train --out good --factor 0", "--out: good holds a run"),
    ("train --out begun --factor 1 --lr 3", "--lr: begun was begun with 0.01, not 3"),
    ("train --resume --out good --tight", "--tight: good was begun with no, not yes"),
    ("train --resume --out good --minutes 0.5,2", "--minutes: good was begun with 0, not 0.5,2"),
    ("train --resume --out good --steps 9", "--steps: good was begun with 6, not 9"),
    ("train --resume --out good --size 16x32", "--size: good was begun with 16x16, not 16x32"),
    ("train --resume --out good --model grayscale", "--model: good was begun with pyramid"),
    ("train --resume --out good --precision bfloat16", "--precision: good was begun with auto"),
    ("train --resume --out good --minutes 3", "--minutes: good was begun with 0, not 3"),
    ("train --resume --out good --batch-size 3", "--batch-size: good was begun with 2, not 3"),
    ("train --resume --out good --data small.npy", "--data: good was begun with"),
    ("train --resume --out good --start good", "--start: good was begun with"),
    ("train --resume --out odd", "config.json: not a configuration"),
    ("train --resume --out wrong", "config.json: not a configuration"),
    ("train --start gone", "gone: no such checkpoint"),
    ("train --start file", "file: not a checkpoint"),
    ("train --start ''", "--start"),
    # eval
    ("eval", "RUN"),
    ("eval gone", "gone: no such checkpoint"), ("eval file", "file: not a checkpoint"),
    ("eval nothing", "holds no run"),
    ("eval good --n 0", "--n"), ("eval good --n all", "--n"),
    ("eval good --batch-size 0", "--batch-size"), ("eval good --coded 0", "--coded"),
    ("eval good --data gone.npy", "gone.npy: No such"), ("eval good --model pyramid", "--model"),
    ("eval good --data small.npy", "small.npy: images are 8x8 (height x width), not 16x16"),
    ("eval good --data cifar10", "CIFAR-10 images are 32x32"),
    # sample
    ("sample", "RUN"), ("sample gone", "gone: no such checkpoint"), ("sample good --n -1", "--n"),
    ("sample good --mode best", "--mode"), ("sample good --shift nan", "--shift"),
    ("sample good --mode map --shift -1", "--shift: --mode map"),
    ("sample good --seed x", "--seed"),
    ("sample good --view 0", "--view: goes with --given"),
    ("sample good --given test --view 9", "--view 9: expected"),
    ("sample good --given test --view 1", "--view 1: expected"),
    ("sample good --given test --view -1", "--view"),
    ("sample good --given gone.npy", "gone.npy: No such"),
    ("sample good --given bad.npy", "bad.npy"),
    ("sample good --given gone.png", "gone.png: No such"),
    ("sample good --given file", "file: not an image"),
    ("sample good --given tall.npy", "17, 16"), ("sample good --given gray.npy", "gray.npy"),
    ("sample good --out file/x", "file"),
]


@pytest.mark.parametrize("line, expected", BAD, ids=[line or "nothing" for line, _ in BAD])
def test_bad_input_is_one_line_and_status_2(bad_place, monkeypatch, capsys, line, expected):
    """It names the flag or the file, and what was expected; nothing is begun."""
    monkeypatch.chdir(bad_place)
    monkeypatch.setattr(pixelaux, "train_factor", lambda *_: sys.exit("training was begun"))
    never = ["--out", "never"] if re.match("train(?!.*(--out|--resume))", line) else []
    arguments = [*shlex.split(line), *never]
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    out, error = capsys.readouterr()
    shown = error.replace("\r", "\n").splitlines()  # a bar may be among them, if it took long
    lines = [text for text in shown if text.strip() and "pixel/s" not in text]
    made = {path.name for path in bad_place.iterdir()}
    for folder in made & {"never", "runs"}:
        shutil.rmtree(folder)  # lest the lines that follow fail as well
    assert status == 2 and len(lines) == 1, (status, error)
    assert lines[0].startswith("pixelaux: ") and expected in lines[0] and out == ""
    assert not made & {"never", "runs"}


def test_help_tells_every_flag_of_every_command(capsys):
    """Control: those of other commands it does not."""
    for name in ("train", "eval", "sample"):
        assert command(f"{name} --help") == 0
        text = capsys.readouterr().out
        for flag, (commands, *_) in pixelaux.FLAGS.items():
            told = re.search(rf"^  {flag}\b", text, re.M | re.I) is not None
            assert told == (name in commands.split()), flag


@pytest.mark.parametrize("bug", [KeyError, ZeroDivisionError, RuntimeError, AssertionError])
def test_bugs_are_not_hidden(monkeypatch, bug):
    """They have a traceback: only what the user can mend is one line."""
    def broken(*_):
        raise bug("x")

    monkeypatch.setattr(pixelaux, "load", broken)
    with pytest.raises(bug):
        command("eval x")


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    """Before anything is begun."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert command("train --out", tmp_path / "never") == 2
    assert said(capsys) == ["pixelaux: tqdm is not installed: pip install -r requirements.txt"]
    assert not (tmp_path / "never").exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_file(run, tmp_path, capsys):
    """A limit on the size of files acts as a disk that is full amid the first checkpoint."""
    resource = pytest.importorskip("resource")
    limit, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "full"
    checkpoint = (run / "factor-0.pt").read_bytes()
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(checkpoint) // 2, limit[1]))
    try:
        for content in (bytes(200_000), lambda file: file.write(bytes(200_000))):
            with pytest.raises(OSError) as error:
                pixelaux.write_atomically(run / "factor-0.pt", content)
            assert error.value.filename == str(run / "factor-0.pt")
        status = command(TRAIN, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    lines = said(capsys)
    assert status == 2 and lines == [f"pixelaux: {out / 'factor-0.pt'}: File too large"]
    assert (run / "factor-0.pt").read_bytes() == checkpoint
    assert not [*run.glob("part-*"), *out.glob("part-*"), *out.glob("*.pt")]
    assert command("train --resume --out", out) == 0  # control, and how to go on
    assert_same_run(run, out)


def test_a_program_that_is_terminated_leaves_nothing_half_written(tmp_path):
    """In one line. Control: a kill, of which nobody is told, leaves a part."""
    code = """if True:
        import os, pixelaux, signal, sys, types
        def half_written(file):
            file.write(b"half")
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        job = types.SimpleNamespace(main=lambda argv: pixelaux.write_atomically("a", half_written))
        pixelaux.tool, sys.argv = lambda name: job, ["pixelaux.py", "curves"]
        sys.exit(pixelaux.program())"""
    env = dict(PYTHONPATH=str(HERE), cwd=tmp_path)
    _, error = program("-c", code, status=130, SIGNAL=str(int(signal.SIGTERM)), **env)
    assert error == "pixelaux: terminated\n" and not list(tmp_path.iterdir())
    program("-c", code, status=-signal.SIGKILL, SIGNAL=str(int(signal.SIGKILL)), **env)
    assert [path.name[:5] for path in tmp_path.iterdir()] == ["part-"]


def test_a_write_is_whole_or_did_not_happen(tmp_path, monkeypatch):
    """Whoever reads meanwhile finds the old file. Folders are made."""
    path, found = tmp_path / "a" / "b" / "file", []
    pixelaux.write_atomically(path, b"old")

    def content(file):
        file.write(b"new")
        file.flush()
        found.append(path.read_bytes())

    pixelaux.write_atomically(path, content)
    assert found == [b"old"] and path.read_bytes() == b"new"
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pixelaux.write_atomically(path, b"newer")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file"]


# --- Pictures and progress never end a training --------------------------------------------------


def test_pictures_that_cannot_be_made_do_not_end_training(run, tmp_path, monkeypatch, capsys):
    """The state is saved before each. Control: they were asked for, and are warned of."""
    out, saved_steps = tmp_path / "run", []

    def broken(*_):
        k = len(list(out.glob("factor-*.pt"))) - 1
        step = torch.load(out / f"factor-{k}.pt", weights_only=True)["training"]["step"]
        saved_steps.append((k, step))
        assert records(out)[-1]["step"] == step
        raise MemoryError("no room")

    monkeypatch.setattr(pixelaux, "save_samples", broken)
    assert command(TRAIN, "--out", out) == 0
    assert saved_steps == [(0, 2), (0, 3), (0, 5), (1, 2), (1, 3), (1, 5), (1, 6)]
    told = [line for line in said(capsys) if "no picture: MemoryError: no room" in line]
    assert len(told) == len(saved_steps)
    assert_same_run(run, out)


def test_curves_that_are_missing_or_broken_do_not_end_training(run, tmp_path, monkeypatch, capsys):
    """tools/curves.py may be absent, which is not worth a word; or fail, which is."""
    def absent(name):
        raise Problem(name)

    def broken(name):
        raise ImportError(name)

    for name, tool, words in (("absent", absent, 0), ("broken", broken, 4)):
        monkeypatch.setattr(pixelaux, "tool", tool)
        capsys.readouterr()
        assert command(TRAIN, "--factor", 0, "--out", tmp_path / name) == 0
        assert len([line for line in said(capsys) if "no picture" in line]) == words
        assert (tmp_path / name / "samples.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_pictures_ends_them_at_once_with_the_state_saved(
        run, tmp_path, monkeypatch, capsys, number):
    """No further pixel is drawn. Going on gives the same weights."""
    drawn, draw = [], pixelaux.Draw.__call__

    def counted(self, *arguments):
        drawn.append(1)
        if len(drawn) == 1:
            os.kill(os.getpid(), number)
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pixelaux.Draw, "__call__", counted)
        assert command(TRAIN, "--out", tmp_path) == 130
    assert len(drawn) == 1 and "--resume goes on" in said(capsys)[-1]
    assert torch.load(tmp_path / "factor-0.pt", weights_only=True)["training"]["step"] == 2
    assert command("train --resume --out", tmp_path) == 0
    assert_same_run(run, tmp_path)


def test_training_goes_on_without_stderr(run, tmp_path):
    """2>&-: nobody sees the bars; the run is the same."""
    shutil.copy(run / "config.json", tmp_path)
    line = f"{shlex.quote(sys.executable)} pixelaux.py train --resume --device cpu --out {tmp_path}"
    done = subprocess.run(["bash", "-c", f"exec {line} 2>&-"], cwd=HERE, text=True, timeout=500,
                          stdout=subprocess.PIPE)
    assert done.returncode == 0 and "95% interval" in done.stdout
    assert_same_run(run, tmp_path)


def test_a_broken_stderr_does_not_end_training(run, tmp_path, monkeypatch):
    """A terminal that has gone: every write fails."""
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = isatty = fileno = lambda self: self.write("")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert command(TRAIN, "--out", tmp_path) == 0
    monkeypatch.undo()
    assert_same_run(run, tmp_path)


# --- Evaluation ----------------------------------------------------------------------------------


@settings(max_examples=6)
@given(n=st.integers(1, 9), batch=st.integers(1, 10))
def test_evaluation_covers_every_image(run, n, batch):
    """In order, whatever the batches; both numbers as the model's log_prob gives them."""
    model, x = pixelaux.load(run), Shapes((16, 16)).sample(n, 9)
    bound, exact = pixelaux.evaluate(model, x, batch)
    assert bound.shape == exact.shape == (2, n) and bound.dtype == np.float64
    with torch.no_grad():
        for i in range(n):
            one = torch.from_numpy(x[i : i + 1]).permute(0, 3, 1, 2)
            for found, tight in ((bound, False), (exact, True)):
                factors = [float(nats) for nats in model.log_prob_factors(one, tight=tight)]
                assert np.allclose(found[:, i], factors, rtol=1e-5)
    assert (exact >= bound - 1e-3).all() and (exact[1] > bound[1] + 1).any()


def test_the_report_is_what_a_direct_computation_gives(run):
    """Every number of the table, of the dict, of the truth and of the excess over it."""
    model, n = pixelaux.load(run), 12
    data = pixelaux.load_data("shapes")[0]
    images = data.test[:n]
    rng = np.random.default_rng(0)
    bound = rng.uniform(-3000, -2000, (2, n))
    exact = bound + rng.uniform(0, 300, (2, n))
    text, result = pixelaux.report(model, bound, exact, data, images)
    bits = lambda nats, dims: -nats.mean() / dims / math.log(2)
    rows = [line for line in text.splitlines() if re.match(r"(8x8|16x16 \| 8x8)  ", line)]
    for k, (name, dims) in enumerate((("8x8", 192), ("16x16 | 8x8", 768))):
        expected = {}
        for kind, nats in (("bound", bound), ("exact", exact)):
            expected[f"{kind}_of_x"] = bits(nats[k], 768)
            expected[f"{kind}_own"] = bits(nats[k], dims)
            expected[f"{kind}_cumulative"] = bits(nats[: k + 1].sum(0), dims)
        row = result["factors"][k]
        assert row["factor"] == name and list(row["shape"]) == [3, 8 << k, 8 << k]
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        order = [f"{kind}_{what}" for what in ("of_x", "own", "cumulative")
                 for kind in ("bound", "exact")]
        assert rows[k][len(name):].split() == [f"{expected[key]:.4f}" for key in order]
    assert result["images"] == n and f"{n} test images" in text and "768 sub-pixels" in text
    for kind, nats in (("bound", bound), ("exact", exact)):
        total = -nats.sum(0) / 768 / math.log(2)
        assert result[kind] == pytest.approx(total.mean())
        low, high = result[f"{kind}_interval"]
        spread = 1.96 * total.std() / math.sqrt(n)
        assert total.mean() - low == pytest.approx(spread, rel=0.2)
        assert high - total.mean() == pytest.approx(spread, rel=0.2)
    assert re.search(rf"^total +{result['bound']:.4f} +{result['exact']:.4f}$", text, re.M)
    nats = [-kind.sum(0).mean() / 768 for kind in (bound, exact)]
    assert re.search(rf"^total in nats/dim +{nats[0]:.4f} +{nats[1]:.4f}$", text, re.M)
    shapes = Shapes((16, 16))
    truth = slow_log_prob(shapes, images)
    half = Half()(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    coarse = shapes.log_prob_half(half)  # see the tests of Shapes
    assert result["true"] == pytest.approx(bits(truth, 768))
    count = math.log2(len(list(configurations(shapes))))
    assert f"true p(X)            {result['true']:8.4f}{result['true']:8.4f}" in text
    assert f"{count:.1f} bits an image" in text
    for name, true, k in (("8x8", coarse, [0]), ("16x16 | 8x8", truth - coarse, [1]),
                          ("total", truth, [0, 1])):
        excess = [(true - nats[k].sum(0)).mean() / math.log(2) for nats in (bound, exact)]
        assert result[f"excess_bits {name}"] == pytest.approx(excess)
        assert re.search(rf"^{re.escape(name)} +{excess[0]:.1f} +{excess[1]:.1f}$", text, re.M)


def test_the_report_tells_no_truth_that_is_not_known(tmp_path):
    """Of other images there is none; of other models that of X alone."""
    images = random_images(4)
    model = build("grayscale", 16, **SMALL_RUN)
    bound = np.full((2, 4), -3000.0)
    text, result = pixelaux.report(model, bound, bound, Dataset(images, images), images)
    assert "true" not in text and not [key for key in result if "true" in key or "excess" in key]
    data = pixelaux.load_data("shapes")[0]
    text, result = pixelaux.report(model, bound, bound, data, data.test[:4])
    assert "true p(X)" in text
    assert [key for key in result if "excess" in key] == ["excess_bits total"]


def test_the_eval_command_counts_the_images_it_is_told_to(run, tmp_path, capsys):
    """Its file holds the numbers of the table, and how many samples decode."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    capsys.readouterr()
    assert command("eval", out, "--n", 5) == 0
    text, result = capsys.readouterr().out, json.loads((out / "eval-5.json").read_text())
    model, test = pixelaux.load(out), pixelaux.load_data("shapes")[0].test[:5]
    bound, exact = pixelaux.evaluate(model, test)
    assert result["images"] == 5
    assert result["bound"] == pytest.approx(-bound.sum(0).mean() / 768 / math.log(2), rel=1e-6)
    assert result["exact"] == pytest.approx(-exact.sum(0).mean() / 768 / math.log(2), rel=1e-6)
    assert f"{result['bound']:8.4f}{result['exact']:8.4f}" in text
    samples = model.sample(64)[-1].permute(0, 2, 3, 1).numpy()
    assert result["decodable"] == Shapes((16, 16)).decodable(samples).mean()
    assert f"samples whose shape decodes: {result['decodable']:.0%} of 64" in text


def test_results_tell_by_their_names_what_was_used(run, tmp_path):
    """So that none takes the place of another."""
    out = tmp_path / "run"
    out.mkdir()
    for path in run.glob("*.pt"):
        shutil.copy(path, out)
    np.save(tmp_path / "mine.npy", random_images(40))
    mine = str(tmp_path / "mine.npy")
    for line in (
            f"eval {out} --n 9999 --batch-size 256", f"eval {out} --n 2",
            f"eval {out} --data {mine}",
            f"eval {out}/factor-0.pt --n 3", f"sample {out} --n 1",
            f"sample {out} --n 1 --seed 3 --tight", f"sample {out} --n 1 --mode map",
            f"sample {out} --n 1 --shift -0.5", f"sample {out} --n 1 --given test",
            f"sample {out} --n 1 --given test --view 0", f"sample {out} --n 1 --given {mine}",
            f"sample {out} --n 1 --given test --data {mine}", f"sample {out}/factor-1.pt --n 1",
            f"sample {out} --n 1 --out {tmp_path}/o.png", f"sample {out} --n 1 --out {tmp_path}/p"):
        assert command(line) == 0, line
    expected = {"eval.json", "eval-2.json", "eval-mine.json", "eval-factor-0-3.json"}
    for name in ("0-n1", "0-n1-shift-0.5", "0-n1-given-test", "0-n1-given-test-view0",
                 "0-n1-given-mine", "0-mine-n1-given-test", "0-factor-1-n1", "3-n1-tight"):
        expected |= {f"sample-random-{name}.png", f"sample-random-{name}.npz"}
    expected |= {"sample-map-0-n1.png", "sample-map-0-n1.npz"}
    names = {re.sub("mine-[0-9a-f]{6}", "mine", path.name) for path in out.iterdir()}
    assert names == expected | {"factor-0.pt", "factor-1.pt"}
    assert {path.name for path in tmp_path.glob("[op].*")} == {"o.png", "o.npz", "p.png", "p.npz"}
    assert json.loads((out / "eval.json").read_text())["images"] == 512


def test_columns_of_the_report_are_in_line_whatever_views_are_called():
    """All factors' lines are of one length, and end with their numbers, under the heading's."""
    data, _ = pixelaux.load_data("shapes", size=(12, 12))
    model = build("pyramid", 12, **{**SMALL_RUN, "halvings": 1})
    images = data.test[:2]
    long = ["a view with a long name 6x6", "12x12 | a view with a long name 6x6"]
    for names in (model.names, long):
        model.names = names
        text, _ = pixelaux.report(model, *pixelaux.evaluate(model, images), data, images)
        lines = text.splitlines()
        heading = next(i for i, line in enumerate(lines) if line.startswith("factor"))
        rows = lines[heading : heading + 3]
        assert len({len(line) for line in rows}) == 1
        assert all(row.startswith(name) for row, name in zip(rows[1:], names))


def test_the_reports_interval_is_that_of_its_dict():
    """The interval in the table is that of the dict, the same each time; of one image there is none."""
    model, (data, _) = build("pyramid", 16, **SMALL_RUN), pixelaux.load_data("shapes")
    rng = np.random.default_rng(0)
    bound = rng.uniform(-3000, -2000, (len(model.views), 12))
    exact = bound + rng.uniform(100, 300, bound.shape)
    text, result = pixelaux.report(model, bound, exact, data, data.test[:12])
    assert pixelaux.report(model, bound, exact, data, data.test[:12]) == (text, result)
    of_bound, of_exact = ("{:.4f}..{:.4f}".format(*result[f"{kind}_interval"])
                          for kind in ("bound", "exact"))
    assert f"95% interval over the images: bound {of_bound}, exact {of_exact}" in text
    assert of_bound != of_exact
    text, _ = pixelaux.report(model, bound[:, :1], exact[:, :1], data, data.test[:1])
    assert "1 test image," in text and "95%" not in text


def test_of_three_views_the_truth_of_x_alone_is_told(monkeypatch):
    """Nor is that of a view that is not made by Half itself."""
    class OtherHalf(Half):
        pass

    monkeypatch.setitem(pixelaux.MODELS, "other", [OtherHalf])
    data, _ = pixelaux.load_data("shapes", size=(16, 16))
    model = build("pyramid", 16, **{**SMALL_RUN, "halvings": 2})
    bound = np.full((3, 4), -3000.0)
    _, result = pixelaux.report(model, bound, bound, data, data.test[:4])
    assert [key for key in result if "excess" in key] == ["excess_bits total"]
    _, result = pixelaux.report(
        build("other", 16, **SMALL_RUN), bound[:2], bound[:2], data, data.test[:4])
    assert [key for key in result if "excess" in key] == ["excess_bits total"]


# --- Sampling from the command line --------------------------------------------------------------


@pytest.fixture(scope="module")
def three_views(tmp_path_factory, small_preset):
    """A run of an untrained pyramid of 4x4, 8x8 and 16x16."""
    model = build("pyramid", 16, **{**SMALL_RUN, "halvings": 2}, data_set="made on the fly")
    model.initialise(torch.from_numpy(Shapes((16, 16)).sample(16, 0)).permute(0, 3, 1, 2))
    return saved(model, tmp_path_factory.mktemp("views") / "run")


NAMES = ["4x4", "8x8", "16x16"]


@pytest.mark.parametrize("flags, options", [
    ("", {}), ("--seed 5", dict(seed=5)), ("--mode map", dict(mode="map")),
    ("--shift -1", dict(shift=-1.0)), ("--tight", dict(tight=True)), ("--naive", dict(fast=False)),
])
def test_the_sample_command_writes_what_the_model_samples(three_views, tmp_path, flags, options):
    """Every view. Control: other options, other images."""
    assert command(f"sample {three_views} --n 3 {flags} --out {tmp_path}/made/s") == 0
    arrays = np.load(tmp_path / "made" / "s.npz")
    expected = pixelaux.load(three_views).sample(3, **options)
    assert arrays.files == NAMES
    for name, view in zip(NAMES, expected):
        assert arrays[name].dtype == np.uint8
        assert np.array_equal(arrays[name], view.permute(0, 2, 3, 1))
    plain = pixelaux.load(three_views).sample(3)
    assert torch.equal(plain[-1], expected[-1]) == (not options or "fast" in options)
    with Image.open(tmp_path / "made" / "s.png") as picture:
        assert picture.height > 3 * 64


def halved(x):
    """Rounded means of 2x2 blocks, (N, H, W, C)."""
    n, h, w, c = x.shape
    blocks = x.astype(int).reshape(n, h // 2, 2, w // 2, 2, c)
    return ((blocks.sum((2, 4)) + 2) // 4).astype(np.uint8)


def test_given_images_are_kept_or_reduced_to_the_view_that_is_asked_for(three_views, tmp_path):
    """Of a view, of X, or of the test set; what is coarser follows, what is finer is sampled."""
    x = random_images(5)
    chain = [halved(halved(x)), halved(x), x]
    for letter, images in zip("abc", chain):
        np.save(tmp_path / f"{letter}.npy", images)
    test = pixelaux.load_data("shapes")[0].test
    tests = [halved(halved(test)), halved(test), test]
    model = pixelaux.load(three_views)
    for name, flags, known, source in (
            ("a.npy", "", 1, chain), ("b.npy", "", 2, chain), ("c.npy", "", 2, chain),
            ("c.npy", "--view 1", 2, chain), ("c.npy", "--view 0", 1, chain),
            ("test", "", 2, tests), ("test", "--view 0", 1, tests),
            ("b.npy", "--view 1", 2, chain)):
        place = "test" if name == "test" else tmp_path / name
        line = f"sample {three_views} --n 3 --given {place} {flags}"
        assert command(line, "--out", tmp_path / "s") == 0
        arrays = np.load(tmp_path / "s.npz")
        for k, view in enumerate(NAMES):
            assert arrays[view].shape == (3, *source[k].shape[1:])
            assert np.array_equal(arrays[view], source[k][:3]) == (k < known), (name, flags, view)
        begun = torch.from_numpy(source[known - 1][:3]).permute(0, 3, 1, 2)
        expected = model.sample(3, given=begun)[-1]
        assert np.array_equal(arrays["16x16"], expected.permute(0, 2, 3, 1))


def test_tight_samples_have_the_view_that_was_given(three_views, tmp_path):
    """Control: others do not."""
    for flags, same in (("--tight", True), ("", False)):
        assert command(f"sample {three_views} --n 3 --given test {flags} --out {tmp_path}/s") == 0
        arrays = np.load(tmp_path / "s.npz")
        assert np.array_equal(halved(arrays["16x16"]), arrays["8x8"]) == same


@pytest.mark.parametrize("given", ["", "--given test"])
def test_samples_go_into_a_folder_that_is_there(run, tmp_path, given):
    """By their usual name. Control: a path that is none becomes the name of files."""
    assert command(f"sample {run} --n 1 {given} --out {tmp_path}") == 0
    png, npz = sorted(tmp_path.iterdir(), key=lambda path: path.suffix != ".png")
    assert png.name.startswith("sample-random-0-n1") and npz.name == png.stem + ".npz"
    assert command(f"sample {run} --n 1 {given} --out {tmp_path / 'x'}") == 0
    assert (tmp_path / "x.png").exists() and (tmp_path / "x.npz").exists()


# --- Pictures ------------------------------------------------------------------------------------


def places(picture, tile):
    """Where the tile stands in the picture, [(row, column)]."""
    h, w = tile.shape[:2]
    first = (picture[: -h + 1 or None, : -w + 1 or None] == tile[0, 0]).all(2)
    last = (picture[h - 1 :, w - 1 :] == tile[-1, -1]).all(2)
    return [(r, c) for r, c in zip(*np.nonzero(first & last))
            if np.array_equal(picture[r : r + tile.shape[0], c : c + tile.shape[1]], tile)]


@settings(max_examples=8)
@given(n=st.integers(1, 7), columns=st.integers(1, 4), h=st.integers(1, 3), w=st.integers(1, 3),
       rows=st.integers(1, 3))
def test_every_image_stands_at_its_place_in_the_picture(
        tmp_path_factory, n, columns, h, w, rows):
    """Enlarged by whole pixels, so that a row is some 512 px wide or more, if no image is taller
    than wide; rows and columns are straight; every row has a label."""
    path = tmp_path_factory.mktemp("p") / "x.png"
    sizes = [(h * 2**k, w * 2**k) for k in range(rows)]
    kinds = [random_images(n, size, seed=k + 1) for k, size in enumerate(sizes)]
    kinds = [np.minimum(images, 250) for images in kinds]  # none is as white as the ground
    pixelaux.save_picture(path, kinds, [f"row {k}" for k in range(rows)], columns)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        picture = np.asarray(image)
    times = min(t for t in range(1, 513) if t * max(sizes[-1]) * min(n, columns) >= 512)
    assert picture.shape[1] > 512 or h > w
    at = {}
    for k, images in enumerate(kinds):
        factor = times * sizes[-1][0] // sizes[k][0]
        for i, image in enumerate(images):
            found = places(picture, image.repeat(factor, 0).repeat(factor, 1))
            assert len(found) == 1 or min(image.shape[:2]) == 1 and found, (k, i)
            at[i, k] = found[0]
    tall, wide = times * sizes[-1][0], times * sizes[-1][1]
    for (i, k), (row, column) in at.items():
        assert column == at[i % columns, k][1] and row == at[i - i % columns, k][0]
        if i % columns:
            assert column >= at[i - 1, k][1] + wide
        if k:
            assert row >= at[i, k - 1][0] + tall and column == at[i, k - 1][1]
        elif i >= columns:
            assert row >= at[i - columns, rows - 1][0] + tall
    left = at[0, 0][1]
    blank = picture.copy()
    for row, column in at.values():
        blank[row : row + tall, column : column + wide] = 255
    assert (blank[:, left:] == 255).all()  # between the images there is white
    for (i, k), (row, column) in at.items():
        label = picture[row : row + tall, :left]
        assert i % columns or label.min() < 100 < 255 == label.max()


def test_pictures_of_samples_show_levels_as_brightness(tmp_path):
    """16 levels of gray are spread over 0..255; labels tell what was given. 128 images at most."""
    model = build("grayscale", 16, **SMALL_RUN)
    rng = np.random.default_rng(0)
    gray = torch.from_numpy(rng.integers(16, size=(130, 1, 16, 16), dtype=np.uint8))
    x = torch.from_numpy(rng.integers(250, size=(130, 3, 16, 16), dtype=np.uint8))
    pixelaux.save_samples(model, [gray, x], tmp_path / "x.png", given=1)
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    enlarged = lambda image: image.repeat(4, 0).repeat(4, 1)
    for i in (0, 127):
        shade = (gray[i, 0].numpy() * 17)[..., None].repeat(3, 2)
        assert len(places(picture, enlarged(shade))) == 1
        assert len(places(picture, enlarged(x[i].permute(1, 2, 0).numpy()))) == 1
    assert places(picture, enlarged(x[128].permute(1, 2, 0).numpy())) == []
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixelaux, "save_picture", lambda path, rows, labels: seen.append(labels))
        pixelaux.save_samples(model, [gray, x], tmp_path / "x.png", given=1)
        pixelaux.save_samples(model, [gray], tmp_path / "x.png")  # as far as training has come
    assert seen == [["gray 16x16 given", "16x16 sampled"], ["gray 16x16 sampled"]]


SMALL_TOOL = dict(nr_filters=6, nr_logistic_mix=2, layout=pixelaux.six_stages(1),
             layout_cond=pixelaux.six_stages(1), layout_light=((0, 2),), halvings=1)
SIZES_TOOL = {"pixelcnn": (8, 12), "grayscale": (8, 4), "pyramid": (8, 12), "grayscale-pyramid": (8, 8)}


def small_tool(name, size=None, seed=0, wild=0.1, dtype=torch.float32, **overrides):
    """A model so far from its start that everything in it depends on everything before."""
    model = build(name, size or SIZES_TOOL[name], seed=seed, **{**SMALL_TOOL, **overrides})
    generator = torch.Generator().manual_seed(seed)
    model.initialise(random_batch_of(16, model, seed))
    for parameter in model.parameters():
        parameter.data += wild * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def random_batch_of(n, model, seed=0):
    """uint8 (n, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.views[-1].shape
    return torch.randint(model.config.levels, (n, *shape), generator=generator, dtype=torch.uint8)


def bits_of(model, x, tight=True):
    """-log2 p of each image, as the model says."""
    with torch.no_grad():
        return (-model.double().log_prob(x, tight) / math.log(2)).tolist()


def told(capsys, arguments):
    """(status, the lines on stderr that are the program's) of a command."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = error.replace("\r", "\n").splitlines()
    return status, [line for line in lines if line.startswith("pixelaux: ")]


@pytest.fixture(scope="module")
def tool_run(tmp_path_factory):
    """A folder as `train` leaves it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    model = small_tool("pyramid", (16, 16))
    pixelaux.write_config(out, model.config)
    lines = []
    for k, factor in enumerate(model.factors):
        weights = factor.state_dict()
        training = dict(weights=weights, step=8, seconds=2.0)
        path = out / f"factor-{k}.pt"
        pixelaux.write_checkpoint(path, model.config, {k: weights}, training=training)
        for step in (4, 8):
            line = dict(factor=k, step=step, seconds=step / 4, bits_per_dim=9.0 - step)
            lines.append(json.dumps({**line, "test_bits_per_dim": 8.0 - step}) + "\n")
    (out / "metrics.jsonl").write_text("".join(lines))
    return out


# --- The probabilities that are coded ----------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def direct_pmf(params, drawn, levels):
    """PixelCNN++'s mixture, written out with numbers: the masses of all levels of the next channel.

    params: 10 K floats of one pixel; drawn: the levels of the channels before.
    """
    k = len(params) // 10
    total = np.zeros(levels)
    for component in range(k):
        def of(channel, kind):
            return params[k + 3 * k * channel + k * kind + component]

        def mass(channel, level):
            unit = [2 * value / (levels - 1) - 1 for value in drawn]
            mean = of(channel, 0)
            if channel == 1:
                mean += math.tanh(of(0, 2)) * unit[0]
            if channel == 2:
                mean += math.tanh(of(1, 2)) * unit[0] + math.tanh(of(2, 2)) * unit[1]
            scale = math.exp(max(of(channel, 1), -7))
            middle, half = 2 * level / (levels - 1) - 1, 1 / (levels - 1)
            above = 1 if level == levels - 1 else sigmoid((middle + half - mean) / scale)
            below = 0 if level == 0 else sigmoid((middle - half - mean) / scale)
            return above - below

        weight = math.exp(params[component])
        for channel, level in enumerate(drawn):
            weight *= mass(channel, level)
        for level in range(levels):
            total[level] += weight * mass(len(drawn), level)
    return total / total.sum()


@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 5, 16]), limited=st.booleans())
@settings(max_examples=40)
def test_what_is_coded_is_the_mixture_written_out(seed, levels, limited):
    rng = np.random.default_rng(seed)
    params = rng.normal(size=(2, 20))
    head = LogisticMixture(torch.from_numpy(params)[:, :, None, None], levels)
    for channels in range(3):
        drawn = rng.integers(levels, size=(2, channels))
        low = rng.integers(levels, size=2)
        high = rng.integers(low, levels)
        tensors = [torch.from_numpy(drawn[:, c]).view(2, 1, 1, 1) for c in range(channels)]
        limits = [torch.from_numpy(limit).view(2, 1, 1, 1) for limit in (low, high)]
        found = codec.pmf(head, tensors, (lambda drawn: limits) if limited else None)
        for i in range(2):
            expected = direct_pmf(params[i], drawn[i], levels)
            other = direct_pmf(params[1 - i], drawn[i], levels)
            if limited:
                inside = (np.arange(levels) >= low[i]) & (np.arange(levels) <= high[i])
                expected = expected * inside / (expected * inside).sum()
            assert np.allclose(found[i, :, 0, 0], expected, atol=1e-9)
            assert limited or not np.allclose(found[i, :, 0, 0], other, atol=1e-9)  # control


def test_what_is_coded_of_a_gray_view_is_its_softmax():
    logits = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    weights = logits.flatten().exp().numpy()
    limits = [torch.full((1, 1, 1, 1), limit) for limit in (1, 2)]
    found = codec.pmf(Categorical(logits), []).flatten().numpy()
    inside = codec.pmf(Categorical(logits), [], lambda drawn: limits).flatten().numpy()
    assert np.allclose(found, weights / weights.sum())
    assert np.allclose(inside, [0, *weights[1:3] / weights[1:3].sum(), 0])
    assert not np.allclose(found, inside)  # control


# --- Coding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES_TOOL)
@pytest.mark.parametrize("tight", [True, False])
def test_images_come_back_from_as_many_bits_as_their_probability_says(name, tight):
    model = small_tool(name)
    x = random_batch_of(4, model)
    x[:2] = model.sample(2, tight=True)[-1]  # what it thinks likely
    x[3] = 255 * (x[3] % 2)  # what it does not
    words = codec.compress(model, x, tight)
    assert torch.equal(codec.decompress(model, words, tight), x)
    try:  # control: other bits are another image, or none
        other = codec.decompress(model, [words[1], *words[1:]], tight)
    except (AssertionError, ValueError):
        other = None
    assert other is None or not torch.equal(other, x)
    ideal = bits_of(model, x, tight)
    for of_image, bits in zip(words, ideal, strict=True):
        assert 32 * len(of_image) <= 1.001 * bits + 64
    for of_image, bits in zip(words[:2] if tight else [], ideal):
        assert 32 * len(of_image) >= 0.999 * bits - 32  # nor can it be fewer


def test_impossible_images_are_coded_all_the_same():
    model = small_tool("pyramid", wild=3.0)  # means far outside, log-scales at their clamp
    x = random_batch_of(2, model)
    words = codec.compress(model, x)
    assert torch.equal(codec.decompress(model, words), x)
    assert max(map(len, words)) <= model.dims  # 24 bits a sub-pixel at most
    assert max(bits_of(model, x)) > 30 * model.dims  # control: they are next to impossible


def test_coding_does_not_depend_on_threads_or_autocast_and_leaves_them_alone(monkeypatch):
    model = small_tool("pyramid")
    x = random_batch_of(2, model)
    words = codec.compress(model, x)
    seen = []
    sampler = codec.sample_fast

    def watched(*arguments, **options):
        seen.append((torch.get_num_threads(), torch.is_autocast_enabled("cpu"), model.training))
        return sampler(*arguments, **options)

    monkeypatch.setattr(codec, "sample_fast", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    model.train()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = codec.compress(model, x)
            assert torch.equal(codec.decompress(model, again), x)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_num_threads() == 3 and model.training
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, False, False)] * 4
    assert all(map(np.array_equal, words, again))
    assert not np.array_equal(words[0], words[1])  # control


# --- Files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed():
    """(model, an image of another size than the model's, its file)."""
    model = small_tool("pyramid", (16, 16))
    fitting = model.resized((24, 16))
    x = random_batch_of(1, fitting)[0]
    return model, x, codec.pack(fitting, x)


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_file_is_refused(packed, data):
    model, x, file = packed
    how = data.draw(st.sampled_from(["flip", "cut", "longer"]))
    damaged = bytearray(file)
    if how == "flip":
        bit = data.draw(st.integers(0, 8 * len(file) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    elif how == "cut":
        del damaged[data.draw(st.integers(0, len(file) - 1)) :]
    else:
        damaged += b"\0"
    with pytest.raises(Problem, match="not a .pxa file|truncated or altered"):
        codec.unpack(model, bytes(damaged))


def with_crc(body):
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_a_whole_file_comes_back_from_its_own_model_alone(packed):
    model, x, file = packed
    assert torch.equal(codec.unpack(model, file), x)
    assert with_crc(file[:-4]) == file  # control of what comes below
    with pytest.raises(Problem, match="another model"):
        codec.unpack(small_tool("pyramid", (16, 16), seed=1), file)
    left = small_tool("pyramid", (16, 16), look_right=False)  # the same weights, put to another use
    left.load_state_dict(model.state_dict())
    with pytest.raises(Problem, match="another model"):
        codec.unpack(left, file)
    start = codec.HEADER.size
    wrong = [file[:12] + bytes([file[12] ^ 1]) + file[13:-4]]  # the CRC of the image
    for i in range(start, start + 20, 5):  # words that stand for what other probabilities give
        wrong.append(file[:i] + bytes([file[i] ^ 129]) + file[i + 1 : -4])
    for body in wrong:
        with pytest.raises(Problem, match="rounds otherwise"):
            codec.unpack(model, with_crc(body))


def test_a_file_holds_its_words_and_29_bytes(packed):
    model, x, file = packed
    fitting = model.resized((24, 16))
    words = codec.compress(fitting, x[None])[0]
    assert len(file) == 4 * len(words) + 29
    assert file[25:-4] == words.astype("<u4").tobytes()
    assert file[16:24] == bytes([24, 0, 0, 0, 16, 0, 0, 0])


@pytest.mark.parametrize("name", SIZES_TOOL)
def test_another_size_has_the_same_weights_and_views(name):
    model = small_tool(name)
    height, width = model.config.size
    other = model.double().resized((2 * height, width))
    assert len(other.views) == len(model.views)
    assert other.views[0].shape[1] == 2 * model.views[0].shape[1]
    assert other.factors[0].a_weight.dtype == torch.float64
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    assert codec.mark_of(other) == codec.mark_of(model)
    assert codec.mark_of(small_tool(name, seed=1).double()) != codec.mark_of(model)  # control
    with pytest.raises(Problem, match="multiples of"):
        model.resized((2 * height + 1, width))


# --- The commands compress, decompress, export, and eval --coded -------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Image files, good and bad: (their folder, the pixels of a.png)."""
    pixels = np.random.default_rng(0).integers(256, size=(16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :16, 0]).save(tmp_path / "b.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "foreign.pxa").write_text("hello")
    return tmp_path, pixels


def test_commands_compress_and_restore_rgb_and_gray(tool_run, pictures, capsys):
    folder, pixels = pictures
    out, back = folder / "out", folder / "back"
    files = [folder / "a.png", folder / "b.png"]
    assert told(capsys, ["compress", tool_run, *files, "--out", out]) == (0, [])
    loose = folder / "loose"
    assert told(capsys, ["compress", tool_run, files[0], "--no-tight", "--out", loose])[0] == 0
    coded = [out / "a.pxa", out / "b.pxa"]
    assert told(capsys, ["decompress", tool_run, *coded, "--out", back]) == (0, [])
    assert told(capsys, ["decompress", tool_run, loose / "a.pxa"])[0] == 0
    assert np.array_equal(np.array(Image.open(back / "a.png")), pixels)
    assert np.array_equal(np.array(Image.open(loose / "a.png")), pixels)
    assert np.array_equal(np.array(Image.open(back / "b.png")), pixels[:, :16, :1].repeat(3, 2))
    assert (out / "a.pxa").read_bytes() != (loose / "a.pxa").read_bytes()  # control
    altered = bytearray((out / "b.pxa").read_bytes())
    altered[40] ^= 1
    (folder / "altered.pxa").write_bytes(altered)
    status, lines = told(capsys, ["decompress", tool_run, out / "a.pxa", folder / "altered.pxa"])
    assert status == 2 and f"{folder}/altered.pxa: truncated or altered" in lines[0]
    assert not (out / "a.png").exists()  # as all are looked at before one is written


def test_nothing_is_written_where_one_file_is_wrong(tool_run, pictures, capsys):
    folder, _ = pictures
    good = folder / "b.png"
    (folder / "full").mkdir()
    (folder / "full" / "b.pxa").write_text("mine")
    before = sorted(folder.rglob("*"))
    for arguments, expected in [
        (["compress", tool_run, good, folder / "gone.png"], "gone.png: No such file"),
        (["compress", tool_run, good, folder / "alpha.png"], "alpha.png: of mode RGBA, expected"),
        (["compress", tool_run, good, folder / "text.png"], "text.png: not an image"),
        (["compress", tool_run, good, folder / "a.png", folder / "a.bmp"], "another of the files"),
        (["compress", tool_run, good, os.path.relpath(good)], "another of the files"),
        (["compress", tool_run, good, "--out", folder / "full"], "full/b.pxa exists already"),
        (["compress", tool_run, good, "--out", folder / "a.png"], "is a file, expected a folder"),
        (["compress", tool_run, good, "--seed", 1], "unrecognized arguments: --seed"),
        (["compress", tool_run], "required: FILE"),
        (["compress", folder, good], "holds no run"),
        (["decompress", tool_run, folder / "a.bmp", "--out", folder / "full"], "a.bmp: not a .pxa file"),
        (["decompress", tool_run, folder / "foreign.pxa"], "foreign.pxa: not a .pxa file"),
        (["decompress", tool_run, folder / "gone.pxa"], "gone.pxa: No such file"),
    ]:
        status, lines = told(capsys, arguments)
        assert status == 2 and len(lines) == 1 and expected in lines[0], (arguments, lines)
    assert sorted(folder.rglob("*")) == before
    assert (folder / "full" / "b.pxa").read_text() == "mine"
    assert told(capsys, ["compress", tool_run, good])[0] == 0  # control: it is not the good file's fault


def test_levels_that_a_model_does_not_have_are_refused_with_the_file(tmp_path, capsys):
    model = small_tool("pixelcnn", (8, 8), levels=16)
    factors = {0: model.factors[0].state_dict()}
    pixelaux.write_checkpoint(tmp_path / "model.pt", model.config, factors)
    for name, top in (("dark", 16), ("bright", 256)):
        pixels = np.random.default_rng(0).integers(top, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    files = [tmp_path / "dark.png", tmp_path / "bright.png"]
    status, lines = told(capsys, ["compress", tmp_path / "model.pt", *files])
    assert status == 2 and "expected levels 0..15" in lines[0]
    assert not list(tmp_path.glob("*.pxa"))
    assert told(capsys, ["compress", tmp_path / "model.pt", files[0]])[0] == 0  # control


def file_bits(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return 8 * buffer.tell()


def test_coded_evaluation_counts_real_bits(monkeypatch):
    model = small_tool("pyramid", (16, 16))
    x = pixelaux.to_array(model.sample(5, tight=True)[-1])
    ideal = np.array(bits_of(model, pixelaux.to_tensor(x)))
    model.float()
    text, result = formats.coded(model, x, -ideal * math.log(2))
    assert text.startswith("5 images coded and restored bit for bit")
    assert result["images"] == 5 and math.isclose(result["ideal"], ideal.mean() / 768)
    words = codec.compress(model, pixelaux.to_tensor(x))
    assert math.isclose(result["coded"], 32 * sum(map(len, words)) / (5 * 768))
    assert result["ideal"] < result["coded"] <= 1.001 * result["ideal"] + 64 / 768
    black = np.zeros((16, 16, 3), np.uint8)
    whole = np.vstack([np.hstack(x[:3]), np.hstack([*x[3:], black])])
    best = dict(lossless=True, quality=100, method=6)
    for name, options in [("PNG", dict(format="PNG", optimize=True)),
                          ("lossless WebP", dict(format="WEBP", **best))]:
        single = sum(file_bits(image, **options) for image in x)
        together = file_bits(whole, **options)
        assert np.allclose(result[name], [single / (5 * 768), together / (5 * 768)])
        assert name in text and single != together
    monkeypatch.setattr(codec, "decompress", lambda model, words, show: pixelaux.to_tensor(255 - x))
    with pytest.raises(Problem, match="images 0..4 were not restored"):  # control
        formats.coded(model, x, -ideal)


def test_exported_weights_make_the_same_model_in_a_small_file(tool_run, tmp_path, capsys):
    file = tmp_path / "weights.pt"
    assert told(capsys, ["export", tool_run, file]) == (0, [])
    assert told(capsys, ["export", tool_run, file]) == (0, [])  # of its own kind it is overwritten
    assert file.stat().st_size < 0.8 * sum(path.stat().st_size for path in tool_run.glob("factor-*.pt"))
    before, after = pixelaux.load(tool_run), pixelaux.load(file)
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)
    assert not all(map(torch.equal, before.parameters(), after.parameters()))  # control: rounded
    assert all(map(torch.equal, pixelaux.load(tmp_path).parameters(), after.parameters()))


def test_export_overwrites_no_training_and_no_foreign_file(tool_run, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("hello")
    checkpoint = (tool_run / "factor-0.pt").read_bytes()
    for target, expected in [
        (tool_run / "factor-0.pt", "factor-0.pt: a checkpoint of training"),
        (tmp_path / "letter.txt", "letter.txt: not a checkpoint"),
        (tmp_path, "Is a directory"),
    ]:
        status, lines = told(capsys, ["export", tool_run, target])
        assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert (tool_run / "factor-0.pt").read_bytes() == checkpoint
    assert (tmp_path / "letter.txt").read_text() == "hello"


# --- Benchmarks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES_TOOL)
def test_the_plain_network_computes_what_ours_does(name):
    model = small_tool(name, dtype=torch.float64)
    x = random_batch_of(2, model)
    for factor, (view, x_hat) in zip(model.factors, model.pairs(x)):
        other = bench.plain(factor)
        assert not any(isinstance(module, Conv) for module in other.modules())
        assert torch.allclose(factor(view, x_hat), other(view, x_hat), rtol=1e-10)
        ours = factor.params(view, factor.embeddings(x_hat))
        theirs = other.params(view, other.embeddings(x_hat))
        assert torch.allclose(ours, theirs, atol=1e-9)
        assert theirs.is_contiguous()  # NCHW
        other.net.h_left.rows = (0, 1)
        moved = other.params(view, other.embeddings(x_hat))
        assert not torch.allclose(ours, moved, atol=1e-9)  # control


def test_both_networks_of_the_bench_take_the_same_step():
    model = small_tool("pyramid", dropout=0.0, muon=0.0, dtype=torch.float64).train()
    pair = model.pairs(random_batch_of(2, model))[-1]
    factor, other = model.factors[-1], bench.plain(model.factors[-1])
    before = factor(*pair).sum().item()
    ours = bench.step_of(factor, pair, model.config, model.dims)
    theirs = bench.step_of(other, pair, model.config, model.dims)
    ours()
    theirs()
    after = factor(*pair).sum().item()
    assert abs(after - before) > 1  # control: it was a step
    assert torch.allclose(factor.net.last.b, other.net.last.b, atol=1e-6)
    assert torch.isclose(other(*pair).sum(), factor(*pair).sum(), rtol=1e-6)


def test_turns_alternate_and_the_fastest_counts(monkeypatch):
    durations = {"a": [5.0, 2.0, 3.0], "b": [7.0, 9.0, 1.0]}
    now, calls = [0.0], []

    def work(name):
        now[0] += durations[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    times = bench.seconds(torch.device("cpu"), 3, lambda: work("a"), lambda: work("b"))
    assert times == [2.0, 1.0]
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize("muon", [0.0, 0.05])
def test_bench_train_shows_every_factor_with_its_operations(capsys, monkeypatch, muon):
    """Those of the networks alone, whatever the optimizer."""
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "muon": muon})
    arguments = ["bench", "train", "--model", "pyramid", "--size", "16", "--device", "cpu"]
    assert main([*arguments, "--batch-size", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    model = build("pyramid", 16)
    for row, name, factor in zip(rows, model.names, model.factors, strict=True):
        assert row.startswith(name)
        ours, theirs, ratio, gflop, *_ = map(float, row[21:].replace("%", "").split())
        assert ours > 0 and theirs > 0 and ratio == pytest.approx(ours / theirs, abs=0.02, rel=0.02)
        # Forward, gradient of the inputs and of the weights: three products, each of as many
        # multiplications and additions as there are weights, at each place of the output.
        expected = 6e-9 * multiplications(factor)
        assert 0.9 * expected < gflop < 1.6 * expected  # torch counts what is cut off, too
        assert not 0.9 * 2 * expected < gflop  # control


def multiplications(factor):
    """Of one image: places of a convolution's output times its weights."""
    counts = []

    def count(conv, inputs, output):
        counts.append(output[0, 0].numel() * conv.v.numel())

    for conv in factor.modules():
        if isinstance(conv, Conv):
            conv.register_forward_hook(count)
    x = torch.zeros(1, *factor.view.shape, dtype=torch.uint8)
    factor(x, factor.view.psi(x) if factor.view.psi else None)
    return sum(counts)


def test_bench_sample_counts_steps_and_leaves_out_what_does_not_fit(monkeypatch, capsys):
    arguments = ["bench", "sample", "--model", "pixelcnn", "--size", "8x12", "--device", "cpu"]
    assert main([*arguments, "--batch-size", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[-2].removeprefix("pixelcnn tiny 8x12").split()
    assert row[:2] == ["2", "96"]  # no wavefront fits into this width, so there is a step a pixel
    naive, fast, of_pass, pixel, *_ = map(float, row[2:])
    assert pixel == pytest.approx(1e6 * fast / 96, abs=1e6 * 0.001 / 96)
    monkeypatch.setattr(bench, "available", lambda device: 2**20)
    assert main(arguments) == 0
    rows = capsys.readouterr().out.splitlines()[-4:-1]
    assert [row.split()[3] for row in rows] == ["1", "16", "64"]
    assert all("left out" in row for row in rows)


def test_bench_takes_no_options_that_do_nothing(capsys):
    for arguments, expected in [
        (["bench", "sample", "--precision", "bfloat16"], "--compile are for bench train"),
        (["bench", "sample", "--no-compile"], "--compile are for bench train"),
        (["bench"], "required: what"),
        (["bench", "eval"], "'eval'"),
        (["bench", "train", "--size", "17"], "multiples of"),
    ]:
        status, lines = told(capsys, arguments)
        assert status == 2 and len(lines) == 1 and expected in lines[0]


# --- Curves ------------------------------------------------------------------------------------


def training(seconds_a_step):
    """40 records of a factor; two of them with test points, one so high and one so low."""
    lines = []
    for step in range(1, 41):
        line = dict(factor=0, step=step, seconds=seconds_a_step * step, bits_per_dim=9 - step / 10)
        lines.append(line)
    lines[1]["test_bits_per_dim"] = 30.0
    lines[39]["test_bits_per_dim"] = 2.0
    return lines


@pytest.mark.parametrize("seconds, told", [
    (3.0, ["40 in 2.0 minutes", "40 in 0.7 minutes"]),
    (1.0, ["40 in 40.0 seconds", "40 in 13.3 seconds"])])
def test_curves_show_every_test_point_by_steps(tmp_path, monkeypatch, seconds, told):
    """All panels tell the time in one unit."""
    from matplotlib.figure import Figure

    records = training(seconds) + [{**line, "factor": 1} for line in training(seconds / 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    curves.save_curves(tmp_path, ["8x8", "16x16 | 8x8"])
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes] == ["8x8", "16x16 | 8x8"]
    for axis, text in zip(figure.axes, told):
        of_training, of_test = axis.get_lines()
        assert np.allclose(of_test.get_xydata(), [[2, 30], [40, 2]])
        assert np.allclose(of_training.get_xydata()[-1], [40, 5])
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        assert left <= 2 and 40 <= right < 44 and low < 2 and high > 30
        assert axis.get_xlabel() == f"steps\n{text} of training"
        assert "bits/dim" in axis.get_ylabel()
        assert len(axis.get_legend().get_texts()) == 2
    pixels = np.array(Image.open(tmp_path / "curves.png").convert("L"))
    assert pixels.shape[1] > 800 and 5 < pixels.std() < 100


DRAW = "import pathlib, sys; from tools.curves import save_curves; " \
       "save_curves(pathlib.Path(sys.argv[1]), ['8x8', '16x16 | 8x8'])"


def test_curves_are_the_same_whatever_matplotlib_is_told(tool_run, tmp_path):
    """A backend that does not exist, LaTeX, and another style."""
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(tool_run / name, tmp_path)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.facecolor: black\n")
    told = dict(os.environ, MPLBACKEND="nonsense", MATPLOTLIBRC=str(tmp_path))
    styled = dict(os.environ, MATPLOTLIBRC=str(tmp_path))
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path)], cwd=HERE, env=told, check=True)
    curves.save_curves(tool_run, ["8x8", "16x16 | 8x8"])
    assert (tmp_path / "curves.png").read_bytes() == (tool_run / "curves.png").read_bytes()
    # control: it was told
    plain = [sys.executable, "-c", "import matplotlib; assert matplotlib.rcParams['text.usetex']"]
    assert subprocess.run(plain, env=styled).returncode == 0
    assert subprocess.run(plain, env=told, stderr=subprocess.DEVNULL).returncode != 0


def test_the_command_curves_draws_or_says_what_is_missing(tool_run, tmp_path, capsys):
    (tool_run / "curves.png").unlink(missing_ok=True)
    assert told(capsys, ["curves", tool_run]) == (0, [])
    assert (tool_run / "curves.png").stat().st_size > 1000
    (tmp_path / "config.json").write_bytes((tool_run / "config.json").read_bytes())
    assert "metrics.jsonl is missing" in told(capsys, ["curves", tmp_path])[1][0]
    good = json.dumps(training(1.0)[0]) + "\n"
    for text, expected in [("", "empty"), ("hello\n", "empty"), ('{"step": 1}\n', "empty"),
                           (good + good.replace('"factor": 0', '"factor": 7'), "not what")]:
        (tmp_path / "metrics.jsonl").write_text(text)
        status, lines = told(capsys, ["curves", tmp_path])
        assert status == 2 and len(lines) == 1 and f"metrics.jsonl: {expected}" in lines[0]
    assert "holds no run" in told(capsys, ["curves", tmp_path / "gone"])[1][0]
    assert not (tmp_path / "curves.png").exists()


def test_curves_show_what_was_measured_and_name_nothing_else():
    """On test images or on those held out."""
    from matplotlib.figure import Figure

    for measured, label in (("test", "test images"), ("held_out", "held-out images")):
        lines = [dict(step=step, seconds=1.0, bits_per_dim=2.0) for step in range(1, 20)]
        lines[9][f"{measured}_bits_per_dim"] = 1.5
        axis = Figure().subplots()
        curves.draw(axis, lines, ("seconds", 1), None)
        named = [text.get_text() for text in axis.get_legend().get_texts()]
        assert named == ["training batches", f"{label}, averaged weights"]
        assert list(axis.lines[1].get_xdata()) == [10]


# --- All tools -------------------------------------------------------------------------------


def names_used(path):
    """Of a module's file: {module imported: names taken from it}."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update((alias.name, set()) for alias in node.names)
    return found


@pytest.mark.parametrize("name", sorted(
    path.stem for path in (HERE / "tools").glob("*.py") if not path.stem.startswith(("test_", "__"))))
def test_tools_take_public_names_of_pixelaux_and_know_nothing_of_each_other(name):
    used = names_used(HERE / "tools" / f"{name}.py")
    assert used["pixelaux"]  # control
    assert not any(name.startswith("_") or not hasattr(pixelaux, name) for name in used["pixelaux"])
    assert not any(name.split(".")[0] == "tools" for name in used)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixelaux"


@pytest.fixture
def pics(tmp_path):
    """A folder of 40 PNGs of 20x20, of random colours."""
    folder = tmp_path / "pics"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(pixels(i)).save(folder / f"{i:02}.png")
    return folder


def pixels(i):
    return np.random.default_rng(i).integers(256, size=(20, 20, 3), dtype=np.uint8)


def read(folder, size=(20, 20)):
    return images.load(f"folder:{folder}", "data", size)


def contents(data):
    """The images of a data set, of both sides, as sorted bytes."""
    everything = [*data.train[np.arange(len(data.train))], *data.test[np.arange(len(data.test))]]
    return sorted(image.tobytes() for image in everything)


def expected(numbers):
    return sorted(pixels(i).tobytes() for i in numbers)


def grays(folder, size=(4, 4)):
    """{upper left value: image} of a folder's images, which are gray."""
    data = read(folder, size)
    everything = [*data.train[np.arange(len(data.train))], *data.test[np.arange(len(data.test))]]
    assert all((image == image[..., :1]).all() for image in everything)
    return sorted(image[..., 0].tolist() for image in everything)


# --- Image files: the cache ----------------------------------------------------------------------


def test_a_folder_is_decoded_once_and_read_lazily(pics, cache, monkeypatch):
    """The second time no file is decoded; a new file, or a changed one, is seen."""
    data, calls = read(pics), []
    assert contents(data) == expected(range(40)) and data.flip
    real = images.read_image
    monkeypatch.setattr(images, "read_image", lambda *a, **k: calls.append(a) or real(*a, **k))
    again = read(pics)
    assert not calls and contents(again) == expected(range(40))
    assert again.fingerprint == data.fingerprint
    assert isinstance(again.train.images, np.memmap) and not again.train.images.flags.writeable
    assert sorted(path.suffix for path in cache.iterdir()) == [".bytes", ".json"]
    Image.fromarray(pixels(40)).save(pics / "more.png")
    more = read(pics)
    assert len(calls) == 41 and contents(more) == expected(range(41))
    assert more.fingerprint != data.fingerprint
    old, new = ({x.tobytes() for x in d.test[np.arange(len(d.test))]} for d in (data, more))
    assert old <= new and new - old <= {pixels(40).tobytes()}  # nothing moved
    monkeypatch.setattr(images, "RULES", images.RULES + 1)
    assert contents(read(pics)) == expected(range(41)) and len(calls) == 82  # new rules, new cache


def inodes(paths):
    return sorted((path.name, path.stat().st_ino) for path in paths)


def test_two_first_users_share_no_file_and_the_slower_takes_the_winners(pics, cache, monkeypatch):
    """One decodes everything in the midst of the other's decoding, under the same process id."""
    real, inner = images.read_image, []
    lock = threading.Lock()

    def interrupted(file, *args, **options):
        with lock:
            if not inner and file.name == "20.png":
                inner.append(None)
                monkeypatch.setattr(images, "read_image", real)
                inner[0] = read(pics), inodes(cache.glob("*.*"))
        return real(file, *args, **options)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(images, "read_image", interrupted)
    outer = read(pics)
    (winner, files), = inner
    assert contents(outer) == contents(winner) == expected(range(40))
    assert files == inodes(cache.iterdir())  # and no more files
    assert os.path.samefile(outer.train.images.filename, winner.train.images.filename)
    assert contents(read(pics)) == expected(range(40))


def test_fresh_processes_that_start_together_read_the_same(pics, cache):
    """Nothing of Pillow is set up there yet, and each tells the digest of all that it has read."""
    program = (
        "import hashlib, sys, numpy as np; from tools import images\n"
        "d = images.load(sys.argv[1], 'data', (20, 20))\n"
        "rows = [x.tobytes() for part in (d.train, d.test) for x in part[np.arange(len(part))]]\n"
        "print(hashlib.md5(b''.join(sorted(rows))).hexdigest())")
    command = [sys.executable, "-c", program, f"folder:{pics}"]
    here = pathlib.Path(__file__).parent
    users = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=here) for _ in range(2)]
    wanted = hashlib.md5(b"".join(expected(range(40)))).hexdigest()
    assert [user.communicate()[0].decode().strip() for user in users] == [wanted] * 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".bytes", ".json"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(),
                                   OSError(errno.EMFILE, "Too many open files")], ids=repr)
def test_what_fails_once_is_named_and_read_the_next_time(pics, cache, monkeypatch, capfd, error):
    real = pathlib.Path.open

    def opening(path, *args, **options):
        if path.name == "03.png":
            raise error
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", opening)
        for _ in range(2):
            assert contents(read(pics)) == expected(set(range(40)) - {3})
            assert capfd.readouterr().err.count(f"skipped {pics / '03.png'}: ") == 1
    assert not list(cache.iterdir())
    assert contents(read(pics)) == expected(range(40))
    assert "skipped" not in capfd.readouterr().err


def test_what_is_broken_is_cached_as_such_and_named_each_time(pics, cache, capfd):
    (pics / "bad.png").write_bytes((pics / "05.png").read_bytes()[:300])
    for i in range(14):
        (pics / f"worse{i}.png").write_bytes(b"no picture")
    told = []
    for _ in range(2):
        assert contents(read(pics)) == expected(range(40))
        lines = capfd.readouterr().err.splitlines()
        told.append([line for line in lines if "skipped" in line or "more" in line])
    assert told[0] == told[1] and "bad.png: " in told[0][0] and len(told[0]) == 13
    assert re.search(r"and 3 more", told[0][-1])
    note, = cache.glob("*.json")
    assert len([line for line in json.loads(note.read_text())["told"] if "skipped" in line]) == 15


def test_without_a_home_the_temporary_folder_serves(pics, tmp_path, monkeypatch, capfd):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for xdg in ("", None, "/dev/null"):  # the control: with a home, that is taken without a word
        monkeypatch.delenv("XDG_CACHE_HOME")
        if xdg is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        read(pics)
        assert "cache" not in capfd.readouterr().err
        assert list((tmp_path / ".cache" / "pixelaux").iterdir())
        monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert not list((tmp_path / "tmp").iterdir())
    for home in ("/dev/null", None):
        monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as in a container: no such user
        assert contents(read(pics)) == expected(range(40))
        assert capfd.readouterr().err.count(f"the cache is {tmp_path / 'tmp'}") == 1
    with monkeypatch.context() as patch, pytest.raises(Problem, match="XDG_CACHE_HOME"):
        patch.setattr(tempfile, "tempdir", "/dev/null")
        read(pics)
    theirs, = (tmp_path / "tmp").iterdir()  # another user may know its name, and make it
    assert theirs.stat().st_mode & 0o77 == 0
    shutil.rmtree(theirs)
    (tmp_path / "elsewhere").mkdir()
    theirs.symlink_to(tmp_path / "elsewhere")
    assert contents(read(pics)) == expected(range(40))
    assert not list((tmp_path / "elsewhere").iterdir())


# --- Image files: which files --------------------------------------------------------------------


HIDDEN = [".ipynb_checkpoints/a.png", "deep/.thumbnails/large/a.png", ".Trash-0/files/a.png",
          "._x.png", "__MACOSX/a.png", "deep/__MACOSX/._a.png", "deep/.a.png"]


@pytest.mark.parametrize("zipped", [False, True])
def test_hidden_files_and_folders_are_no_data(pics, tmp_path, zipped):
    """Names below the source count, not those above it."""
    home = tmp_path / ".hidden" / "__MACOSX"
    home.parent.mkdir()
    pics.rename(home)
    (home / "deep.er").mkdir()
    (home / "39.png").rename(home / "deep.er" / "39.PNG")
    for i, name in enumerate(HIDDEN):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(100 + i)).save(home / name)
    source = home
    if zipped:
        source = tmp_path / ".hidden" / ".all.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(home.rglob("*")):
                archive.write(path, f"../up/{path.relative_to(home)}")
    assert contents(read(source)) == expected(range(40))


def test_links_are_followed_and_what_is_reached_twice_counts_once(pics, tmp_path, capfd):
    d = tmp_path / "d"
    (d / "own").mkdir(parents=True)
    (d / "class0").symlink_to(pics)
    (d / "class1").symlink_to(pics)  # twice
    (pics / "loop").symlink_to(d)  # a circle through the outside
    (d / "self").symlink_to(".")
    (d / "again.png").symlink_to(pics / "00.png")
    Image.fromarray(pixels(40)).save(tmp_path / "outside.png")
    (d / "own" / "linked.png").symlink_to(tmp_path / "outside.png")
    (d / "dangling.png").symlink_to("nowhere.png")
    (d / "round.png").symlink_to("round.png")
    os.mkfifo(d / "pipe.png")  # would never end
    assert contents(read(d)) == expected(range(41))
    error = capfd.readouterr().err
    assert "dangling.png: No such file" in error and "round.png: Too many levels" in error


def test_names_that_are_not_utf8_are_printed_with_replacement_in_one_line(pics, capfd):
    broken = os.fsencode(pics) + b"/caf\xe9\n\x1b[31m.png"
    with open(broken, "wb") as file:
        file.write(b"no picture")
    os.rename(pics / "00.png", os.fsencode(pics) + b"/\xff.png")
    for _ in range(2):
        assert contents(read(pics)) == expected(range(40))
        lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
        name = f"{pics}/caf???[31m.png"
        assert lines == [f"pixelaux: skipped {name}: not an image that Pillow can read"]
    with pytest.raises(Problem) as caught:
        images.read_image(pathlib.Path(os.fsdecode(broken)))
    str(caught.value).encode()
    with pytest.raises(Problem) as caught:
        read(os.fsdecode(os.fsencode(pics) + b"/gone\xff"))
    str(caught.value).encode()


def test_a_tilde_is_the_home(pics, monkeypatch):
    monkeypatch.setenv("HOME", str(pics.parent))
    assert contents(read("~/pics")) == expected(range(40))


@pytest.mark.parametrize("spec, text", [
    ("nonsense", "nonsense.*expected shapes, cifar10, celeba, folder:PATH"),
    ("folder:", "expected shapes, cifar10"),
    ("celeba:x", "expected shapes, cifar10"),
    ("folder:gone", "gone: No such file.*expected a folder or a zip"),
    ("folder:empty", "empty: no image files there"),
    ("folder:half.zip", "half.zip: File is not a zip file"),
    ("folder:one", "one: .*two different"),
    ("folder:twins", "twins: .*two different"),
    ("folder:bad", "bad: none of the image files could be read; the first: .*a.png: "),
    ("celeba", "no image files there; expected img_align_celeba.zip"),
    ("cifar10", "32x32.*not 20x20")])
def test_what_the_user_can_mend_is_one_line_that_names_it(tmp_path, monkeypatch, spec, text):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "one", "twins", "bad"):
        (tmp_path / name).mkdir()
    for name in ("one/a", "twins/a", "twins/b"):
        Image.fromarray(pixels(0)).save(f"{name}.png")
    pathlib.Path("bad/a.png").write_bytes(b"no")
    pathlib.Path("half.zip").write_bytes(b"PK")
    with pytest.raises(Problem, match=text) as caught:
        images.load(spec, "empty", (20, 20))
    assert "\n" not in str(caught.value)


# --- Image files: one image ----------------------------------------------------------------------


def png(path, mode, size=(40, 50), **options):
    values = np.random.default_rng(0).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    image.save(path, **options)
    return values


def test_folders_take_every_kind_of_image_and_skip_what_is_broken(tmp_path, capfd):
    folder = tmp_path / "images" / "deeper"
    folder.mkdir(parents=True)
    png(folder / "gray.png", "L", (32, 32))
    for mode in ("RGB", "RGBA", "P", "LA", "1", "CMYK"):
        png(folder / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}", mode)
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "RGB.png").read_bytes()[:1000])
    (folder / "notes.txt").write_text("no image")
    png(folder / "small.png", "RGB", (31, 60))
    data = read(tmp_path / "images", (32, 32))
    error = capfd.readouterr().err
    assert len(data.train) + len(data.test) == 7
    small = "60x31 is smaller than --size 32x32 (height x width)"
    reasons = {"empty.png": "not an image that", "cut.png": "truncated", "small.png": small}
    for name, reason in reasons.items():
        assert re.search(rf"skipped {re.escape(f'{folder / name}: ')}.*{re.escape(reason)}", error)


def test_a_picture_stands_upright_over_white_and_is_cropped_in_its_middle(tmp_path):
    values = png(tmp_path / "x.png", "RGB", (32, 32))
    read = lambda name, **options: images.read_image(tmp_path / name, **options)
    assert np.array_equal(read("x.png"), values[..., :3])  # the control
    Image.new("RGBA", (1, 1), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read("clear.png").tolist() == [[[255] * 3]]
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright
    Image.fromarray(values[..., :3].copy()).save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(read("turned.png"), np.rot90(values[..., :3], -1))
    assert np.array_equal(read("x.png", size=(32, 20)), values[:, 6:26, :3])
    assert np.array_equal(read("x.png", size=(20, 32)), values[6:26, :, :3])


def test_exact_refuses_what_8_bit_rgb_cannot_hold(tmp_path):
    for mode in ("RGB", "L"):
        values = png(tmp_path / "x.png", mode)
        assert images.read_image(tmp_path / "x.png", exact=True).shape == (50, 40, 3)
    for mode in ("RGBA", "LA", "P", "1"):
        png(tmp_path / "x.png", mode)
        with pytest.raises(Problem, match=re.escape(f"x.png: of mode {mode}, expected")):
            images.read_image(tmp_path / "x.png", exact=True)
    frames = [Image.fromarray(values[..., i]) for i in range(3)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(Problem, match="expected one image"):
        images.read_image(tmp_path / "x.tif", exact=True)


# --- Image files: what white is ------------------------------------------------------------------


def save(path, values, dtype):
    Image.fromarray(np.asarray(values, dtype)).save(path)


TYPES = [("float32", "tif"), ("int32", "tif"), ("uint16", "png"), ("uint16", "tif")]


@given(st.sampled_from(TYPES), st.sampled_from([1, 255, 4095, 65535]), st.floats(0.2, 1.04),
       st.lists(st.floats(0, 1), min_size=3, max_size=6))
def test_one_white_for_all_images_of_a_kind(kind, white, top, shares):
    """Levels by the direct formula from the white that was meant; the brightest image decides."""
    dtype, ending = kind
    if white == 1 and dtype != "float32":
        white = 255
    peak = max(top * white, 2 if white > 1 else 0)
    if white > 255:
        peak = max(peak, {4095: 300, 65535: 5000}[white])
    levels = [[peak, 0.0]] + [[0.9 * share * peak, 0.0] for share in shares]
    with tempfile.TemporaryDirectory() as folder:
        for i, level in enumerate(levels):
            save(f"{folder}/{i}.{ending}", np.tile([level], (2, 1)), dtype)
        data = sorted(image[0][0] for image in grays(folder, (2, 2)))
    levels = np.asarray(levels).astype(dtype).astype(float)
    wanted = sorted(np.clip(255 * a / white, 0, 255) for a, _ in levels)
    assert np.abs(np.subtract(data, wanted)).max() <= 0.51


def test_the_faults_that_users_found_in_ranges(tmp_path, capfd):
    """A pixel a little too bright, one that is no number, two int32 images, and 12 bits in 16."""
    for name, dtype, ending, white, peaks in (
            ("a", "float32", "tif", 1, [1.001, 0.5, 0.25]),
            ("b", "float32", "tif", 255, [255.4, 100, 50]),
            ("c", "int32", "tif", 255, [260, 239, 17]),
            ("d", "uint16", "png", 4095, [4095, 2048, 70])):
        (tmp_path / name).mkdir()
        for i, peak in enumerate(peaks):
            save(tmp_path / name / f"{i}.{ending}", np.full((4, 4), peak), dtype)
        levels = sorted(round(min(255, 255 * peak / white)) for peak in peaks)
        for _ in range(2):  # said once each time
            assert [image[0][0] for image in grays(tmp_path / name)] == levels
            told = [line for line in capfd.readouterr().err.splitlines() if "white" in line]
            assert len(told) == 1 and str(white) in told[0]
    (tmp_path / "c" / "3.tif").write_bytes(b"")
    save(tmp_path / "c" / "3.tif", np.full((4, 4), 1000), "int32")  # now 255 cannot be meant in any
    assert [image[0][0] for image in grays(tmp_path / "c")] == [1, 15, 16, 62]
    for name, value, reason in (("nan", np.nan, "finite"), ("inf", np.inf, "finite"),
                                ("big", 1e9, "up to 1e.09"), ("low", -0.5, "down to -0.5")):
        values = np.full((4, 4), 0.5)
        values[1, 2] = value
        save(tmp_path / "a" / f"{name}.tif", values, "float32")
        assert len(grays(tmp_path / "a")) == 3
        assert re.search(rf"skipped .*{name}.tif: .*{reason}", capfd.readouterr().err)
        (tmp_path / "a" / f"{name}.tif").unlink()


def test_types_that_tell_their_range_are_not_guessed(tmp_path):
    """Dark images of 8 bits, 1 bit and PGM stay dark; one picture alone has its own maximum."""
    save(tmp_path / "a.png", np.full((4, 4), 3), "uint8")
    Image.fromarray(np.eye(4) > 2).save(tmp_path / "b.png")
    (tmp_path / "c.pgm").write_bytes(b"P5 4 4 65535\n" + b"\x05\x05" * 16)
    save(tmp_path / "d.tif", np.full((4, 4), 0.5), "float32")
    save(tmp_path / "e.tif", np.full((4, 4), 100), "int32")
    assert [image[0][0] for image in grays(tmp_path)] == [0, 3, 5, 100, 128]
    assert (images.read_image(tmp_path / "d.tif") == 128).all()


# --- Image files: CelebA -------------------------------------------------------------------------


def face():
    values = np.indices((218, 178)).sum(0).astype(np.uint8)
    return np.stack([values, values.T[:178].T[::-1], values[::-1]], -1)


def face_file(i):
    stream, values = io.BytesIO(), face()
    values[100, 100] = i
    Image.fromarray(values).save(stream, "PNG")  # JPEG would change the values
    return stream.getvalue()


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_celeba_is_cropped_as_in_the_paper_wherever_it_lies(tmp_path, capfd):
    """In parts, in a zip file of its name, or in a folder beside zip files of other things."""
    crop = face()[50:178, 25:153].copy()
    wanted = set()
    for i in range(20):
        crop[50, 75] = i
        wanted.add(crop.tobytes())
    other = {"a.jpg": face_file(99)}
    faces = {f"img_align_celeba/{i:06}.jpg": face_file(i) for i in range(20)}
    places = [tmp_path / name for name in ("parts", "named", "folder")]
    for place in places:
        place.mkdir()
        zip_of(place / "a-other.zip", other)
        (place / "z-broken.zip").write_bytes(b"no zip file")
    for part in range(2):
        zip_of(places[0] / f"part{part}.zip", dict(list(faces.items())[part::2]))
    flat = {os.path.basename(name): content for name, content in faces.items()}
    zip_of(places[1] / "img_align_celeba-1.zip", flat)
    (places[2] / "img_align_celeba").mkdir()
    for name, content in faces.items():
        (places[2] / name).write_bytes(content)
    marks = set()
    for place in places:
        data = images.load("celeba", place)
        assert set(contents(data)) == wanted and len(contents(data)) == 20 and data.flip
        assert data.train[0].shape == (128, 128, 3) and "skipped" not in capfd.readouterr().err
        marks.add(data.fingerprint)
    assert len(marks) == 1
    turned = tmp_path / "turned"
    turned.mkdir()
    Image.fromarray(face().transpose(1, 0, 2).copy()).save(turned / "a.png")
    reason = "a.png: 178x218 (height x width), expected CelebA's aligned 218x178"
    with pytest.raises(Problem, match=re.escape(reason)):
        images.load("celeba", turned)
    (turned / "img_align_celeba.zip").write_bytes(b"half")
    with pytest.raises(Problem, match="img_align_celeba.zip: File is not a zip file"):
        images.load("celeba", turned)


def test_a_damaged_member_of_a_zip_file_is_named(tmp_path, capfd):
    content, path = face_file(0), tmp_path / "all.zip"
    whole = {"b.png": face_file(1), "c.png": face_file(2), "d.png/": b""}
    zip_of(path, {"damaged.png": content, **whole})
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(path.read_bytes().replace(content, damaged))
    assert len(contents(read(path, (178, 178)))) == 2
    assert f"skipped {path}/damaged.png: " in capfd.readouterr().err


# --- Image files: CIFAR-10 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive():
    """The bytes of a false archive, in which image and sub-pixel give the value."""
    stream = io.BytesIO()
    blob = np.zeros((10000, 3073), np.uint8)
    blob[:, 1:] = np.arange(3072) % 251
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
            blob[0, 1] = i
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = blob.nbytes
            tar.addfile(info, io.BytesIO(blob.tobytes()))
    return stream.getvalue()


@pytest.fixture
def server(archive, monkeypatch):
    """A server of the archive on loopback; requests: where each began; cuts: where to break off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        requests, cuts = [], []
        body = archive

        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.requests.append(start)
            if start >= len(self.body):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(self.body) - start))
            self.end_headers()
            self.wfile.write(self.body[start : self.cuts.pop() if self.cuts else None])

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{running.server_address[1]}/cifar.tar.gz"
    monkeypatch.setattr(images, "CIFAR10_URL", url)
    monkeypatch.setattr(images, "CIFAR10_MD5", hashlib.md5(archive).hexdigest())
    yield Handler
    running.shutdown()
    running.server_close()


def test_cifar10_is_downloaded_resumed_checked_and_read(server, archive, tmp_path, monkeypatch):
    folder, half = tmp_path / "data", len(archive) // 2
    server.cuts.append(half)
    with pytest.raises(Problem, match="broke off.*run again, or fetch it to .*data"):
        images.load("cifar10", folder)
    assert not (folder / "cifar-10-binary.tar.gz").exists()
    data = images.load("cifar10", folder)
    assert len(server.requests) == 2 and half - 10 < server.requests[1] <= half
    assert os.listdir(folder) == ["cifar-10-binary.tar.gz"]
    assert data.train.shape == (50000, 32, 32, 3) and data.test.shape == (10000, 32, 32, 3)
    assert data.train[0, 0, 1].tolist() == [1, 1025 % 251, 2049 % 251] and data.flip
    assert [data.train[i, 0, 0, 0] for i in (0, 10000, 40000)] == [0, 1, 4]
    assert data.test[0, 0, 0, 0] == 5
    monkeypatch.setattr(images, "CIFAR10_MD5", "0" * 32)
    for _ in range(2):
        with pytest.raises(Problem, match="MD5"):
            images.load("cifar10", tmp_path / "other")
    assert server.requests[-2:] == [0, 0]  # nothing of the false one was kept
    monkeypatch.setattr(server, "do_GET", lambda self: self.wfile.write(b"not HTTP\r\n\r\n"))
    with pytest.raises(Problem, match="run again"):
        images.load("cifar10", tmp_path / "other")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Problem, match="Not a directory"):
        images.load("cifar10", tmp_path / "file" / "data")


def test_a_whole_part_is_taken_and_two_who_download_do_it_once(server, archive, tmp_path):
    """A process that was stopped before the last step; then two at the same time."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cifar.part").write_bytes(archive)
    images.download(images.CIFAR10_URL, tmp_path / "a" / "cifar", images.CIFAR10_MD5)
    assert (tmp_path / "a" / "cifar").read_bytes() == archive
    assert server.requests[0] > len(archive) - 10  # not all of it again
    server.requests.clear()
    begin = threading.Barrier(3)

    def user():
        begin.wait()
        images.download(images.CIFAR10_URL, tmp_path / "b" / "cifar", images.CIFAR10_MD5)

    users = [threading.Thread(target=user) for _ in range(3)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert server.requests == [0] and os.listdir(tmp_path / "b") == ["cifar"]
    assert (tmp_path / "b" / "cifar").read_bytes() == archive


def test_cifar10_is_found_unpacked_and_what_is_damaged_is_refused(archive, tmp_path):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tmp_path, filter="data")
    place = tmp_path / "cifar-10-batches-bin"
    marks = {images.load("cifar10", folder).fingerprint for folder in (tmp_path, place)}
    assert len(marks) == 1
    (place / "test_batch.bin").write_bytes(b"short")
    (tmp_path / "half.tar.gz").write_bytes(archive[:5000])
    for folder in (tmp_path, tmp_path / "half.tar.gz"):
        with pytest.raises(Problem, match="not CIFAR-10's"):
            images.load("cifar10", folder)


# --- reproduce.sh and the README ----------------------------------------------------------------


def stand_in(tmp_path, script):
    """A program in python's place: notes its arguments, then does what script says. Its path has a
    space, as python's may have. -> the function (arguments of reproduce.sh) -> (status, stderr)."""
    (tmp_path / "my tools").mkdir()
    stub = tmp_path / "my tools" / "python"
    stub.write_text(f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/log\n{script}')
    stub.chmod(0o755)

    def reproduce(*arguments, **env):
        env = {**os.environ, "PYTHON": str(stub), "RUNS": str(tmp_path / "runs"), **env}
        (tmp_path / "log").write_text("")
        result = subprocess.run(["bash", str(HERE / "reproduce.sh"), *arguments],
                                capture_output=True, text=True, env=env)
        return result.returncode, result.stdout, result.stderr

    return reproduce


def noted(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_reproduce_resumes_what_was_interrupted_and_skips_what_is_finished(tmp_path):
    """Training that was stopped is resumed; a finished part is not made again; other arguments are
    another training (control)."""
    out = tmp_path / "runs" / "smoke"
    reproduce = stand_in(tmp_path, f"""
        [ ! -e {tmp_path}/stop-$2 ] || exit 130
        sleep 0.05  # so that what it makes is newer, by the file system's clock, than what was
        mkdir -p {out}; touch {out}/config.json
        case "$*" in *eval*) touch {out}/eval.json ;; *map*) touch {out}/sample-map-0.npz ;;
          *sample*) touch {out}/sample-random-0.npz ;; esac""")
    (tmp_path / "stop-train").touch()
    assert reproduce("smoke")[0] == 130 and len(noted(tmp_path)) == 1
    (tmp_path / "stop-train").unlink()
    out.mkdir(parents=True)
    (out / "config.json").touch()
    assert reproduce("smoke")[0] == 0 and "--resume" in noted(tmp_path)[0]
    assert [line.split()[1] for line in noted(tmp_path)] == ["train", "eval", "sample", "sample"]
    assert reproduce("smoke")[0] == 0 and noted(tmp_path) == []
    assert reproduce("smoke", "--minutes", "2", NPROC="4")[0] == 0
    assert "--nproc_per_node=4" in noted(tmp_path)[0] and "--minutes 2" in noted(tmp_path)[0]


def test_reproduce_speedrun_and_files_in_parts(tmp_path):
    """Minutes are shared among the factors; a part that fails does not stop the next, one that is
    stopped does; weights come back from their parts, a damaged part is refused."""
    out = tmp_path / "runs" / "speedrun"
    reproduce = stand_in(tmp_path, f"""
        mkdir -p {out}
        [ ! -e {tmp_path}/fail-$2 ] || exit $(cat {tmp_path}/fail-$2)
        [ $2 != export ] || head -c 2500000 /dev/urandom > {out}/weights.pt
        [ $2 != speedrun ] || echo a table > {out}/speedrun.md
        [ $2 != eval ] || echo some numbers > {out}/eval.json""")
    parts = ["train", "export", "speedrun", "eval", "speedrun", "sample", "sample", "speedrun"]
    back = tmp_path / "back"
    assert reproduce("speedrun", "10", "--seed", "1", PART="1", HOLD_OUT="50", TEST="20",
                     BACK=str(back))[0] == 0
    assert [line.split()[1] for line in noted(tmp_path)] == parts
    train, _, _, evaluation = noted(tmp_path)[:4]
    assert sorted(path.name for path in back.iterdir()) == [
        "part.aa", "part.ab", "part.ac", "records.tgz", "speedrun.md", "sums"]
    minutes = [float(number) for number in re.search("--minutes ([0-9.,]+)", train)[1].split(",")]
    assert len(minutes) == 3 and sum(minutes) == pytest.approx(10)
    assert train.endswith("--hold-out 50 --seed 1") and "--preset speedrun" in train
    assert evaluation.endswith("--n 20")
    assert tarfile.open(out / "records.tgz").getmember("./eval.json").size > 5
    weights, pieces = (out / "weights.pt").read_bytes(), sorted((out / "parts").glob("part.*"))
    assert len(pieces) == 3 and all(piece.stat().st_size <= 2**20 for piece in pieces)
    (out / "weights.pt").unlink()
    assert reproduce("unpack", str(out / "parts"))[0] == 0
    assert (out / "weights.pt").read_bytes() == weights
    (out / "weights.pt").unlink()
    pieces[1].write_bytes(b"x" + pieces[1].read_bytes()[1:])
    status, _, message = reproduce("unpack", str(out / "parts"))
    assert status != 0 and "part.ab" in message and not (out / "weights.pt").exists()

    shutil.rmtree(out)
    for code in ("1", "139"):  # a failure; a crash
        (tmp_path / "fail-eval").write_text(code)
        status, _, message = reproduce("speedrun", MODEL="grayscale")
        assert status == 1 and f"failed ({code}), going on: part" in message and "eval" in message
        assert "--minutes 1.75,5.25" in noted(tmp_path)[0] or code == "139"
        assert [line.split()[1] for line in noted(tmp_path)][-5:] == parts[-5:]
    (tmp_path / "fail-eval").write_text("130")
    assert reproduce("speedrun", "7")[0] == 130
    assert [line.split()[1] for line in noted(tmp_path)][-1] == "eval"


def test_reproduce_proof_goes_on_after_a_failure(tmp_path):
    """Each part's command and output are in a file of its own."""
    reproduce = stand_in(tmp_path, "echo said; [ $2 != pytest ] || exit 1")
    status, _, message = reproduce("proof")
    assert status == 1 and message.count("failed (1), going on") == 1
    files = sorted((tmp_path / "runs" / "proof").glob("*.txt"))
    assert len(files) == len(noted(tmp_path)) == 5
    assert all(file.read_text().endswith("\nsaid\n") for file in files)


def readme(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_the_python_of_the_readme_runs_and_its_new_view_is_one_class(tmp_path, monkeypatch):
    """Blocks by themselves; the view of two colours is tight, sampled fast as naive, and trained;
    what is saved is read again. (Those of the course: tools/test_readme.py.)"""
    monkeypatch.setattr(pixelaux, "MODELS", dict(pixelaux.MODELS))
    monkeypatch.chdir(tmp_path)
    view, library = readme("python")[:2]
    names = {}
    exec(library.replace("model = pixelaux.load", "again = pixelaux.load"), names)
    assert all(map(torch.equal, names["model"].parameters(), names["again"].parameters()))
    exec(view, {})
    model, x = build("two-colour", 8).double(), random_batch(4, (3, 8, 8))
    model.initialise(x)
    views = model.sample(2, tight=True)
    assert [view.name for view in model.views] == ["two-colour 8x8", "8x8"]
    assert torch.equal(model.views_of(views[1])[0], views[0])
    assert all(map(torch.equal, views, model.sample(2, tight=True, fast=False)))
    optimizer, before = torch.optim.Adam(model.parameters(), 1e-3), model.log_prob(x).mean().item()
    for _ in range(5):
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()
    assert model.log_prob(x).mean().item() > before + 10
    assert (model.log_prob(x, tight=True) > model.log_prob(x)).all()


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """Each, with its sizes and steps made small, and data sets replaced by a few made images."""
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0].strip() for block in readme("sh") for line in block.splitlines()]
    lines = [line for line in lines if " pixelaux.py" in line]
    assert len(lines) >= 12
    made = np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
    shutil.copytree(HERE / "results", "results", ignore=shutil.ignore_patterns("sample-*"))
    ours = pixelaux.load_data

    def replaced(spec, folder="data", size=None):
        if spec == "cifar10" or spec.startswith("folder:"):
            return Dataset(made, made[:4], flip=True), (32, 32)
        return ours(spec, folder, size)

    monkeypatch.setattr(pixelaux, "load_data", replaced)
    monkeypatch.setattr(figures, "SHIFTS", (0.0, -1.0))
    os.mkdir("my")
    for line in lines:
        arguments = shlex.split(line[line.index("pixelaux.py") :])[1:]
        for picture in (word for word in arguments if re.fullmatch(r"my/\w+\.\w+", word)):
            Image.fromarray(made[0]).save(picture)
        if arguments[0] == "train":
            dropped, small_run = ("--batch-size", "--preset", "--minutes", "--size", "--compile"), []
            if "--start" in arguments:  # whose preset is that of the weights
                dropped, small_run = ("--size",), ["--steps", "2", "--batch-size", "2"]
            elif "--resume" not in arguments:
                small_run = ["--steps", "2", "--batch-size", "2", "--preset", "tiny"]
            before = ["", *arguments]
            keep = [a for a, b in zip(arguments, before) if not {a, b} & {*dropped}]
            arguments = keep + small_run
            if "--out" in arguments and "--resume" not in arguments:
                arguments[arguments.index("--out") + 1] += f"-{len(os.listdir())}"
            if pathlib.Path("runs/pyramid-cifar10").exists():
                shutil.rmtree("runs/pyramid-cifar10")
        elif arguments[0] == "bench":
            arguments += ["--preset", "tiny", "--batch-size", "1", "--size", "16"]
        elif arguments[0] in ("eval", "sample", "figures"):
            assert pathlib.Path(arguments[1]).exists(), f"nothing makes {arguments[1]} before"
            if "--rows" in arguments:  # of a picture that is that small
                arguments[arguments.index("--rows") + 1] = "8"
            if not any(word.startswith("my/") for word in arguments):
                arguments += ["--n", "1" if arguments[0] == "figures" else "2"]
        else:
            assert arguments[0] in ("compress", "decompress"), line
        assert main(arguments) == 0, line
    assert np.array_equal(np.array(Image.open("restored/picture.png")), made[0])


# --- What users ran into ------------------------------------------------------------------------


def test_a_signal_is_noted_or_ends_pictures_at_once_and_what_was_ignored_stays_so():
    """Control: what was set before is set afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler, noted in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGTERM, handler)
            with pixelaux.signals_noted() as stop:
                signal.raise_signal(signal.SIGHUP)  # a terminal goes away: training goes on
                assert not stop()
                signal.raise_signal(signal.SIGTERM)
                assert stop() == noted
                stop.immediately = True
                with pytest.raises(KeyboardInterrupt) if noted else contextlib.nullcontext():
                    signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", ["-1e-1", "-1.", "-.5", "-2", "+0.5", "1e-1", "0"])
def test_signed_numbers_are_taken_in_every_usual_form(run, tmp_path, number):
    """Other samples for other numbers (control: 0)."""
    assert command(f"sample {run} --n 1 --shift {number} --out {tmp_path / 'x'}") == 0
    assert command(f"sample {run} --n 1 --out {tmp_path / 'plain'}") == 0
    ours, plain = (np.load(tmp_path / f"{name}.npz")["8x8"] for name in ("x", "plain"))
    assert np.array_equal(ours, plain) == (float(number) == 0)


def test_mirroring_is_a_flag_whose_default_goes_by_the_data(small_preset, tmp_path, monkeypatch):
    """A .npy file is not mirrored, a folder is, unless --flip or --no-flip says otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = random_images(40)
    np.save(tmp_path / "x.npy", pictures)
    (tmp_path / "pics").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "pics" / f"{i}.png")
    places = {"npy": tmp_path / "x.npy", "folder": f"folder:{tmp_path / 'pics'} --size 16"}
    for name, flag, expected in (
            ("npy", "", False), ("npy", "--flip", True),
            ("folder", "", True), ("folder", "--no-flip", False)):
        out = tmp_path / f"{name}{flag}"
        assert command(f"train --data {places[name]} {flag} --steps 1 --out {out}") == 0
        assert json.loads((out / "config.json").read_text())["flip"] is expected


def test_a_message_has_a_line_of_its_own(capsys):
    """Below a bar that has not ended; no empty line before the next one (control)."""
    pixelaux.Quiet().write("\rfactor 0: 10%")
    for text in ("stopped", "again"):
        pixelaux.say(text)
    assert capsys.readouterr().err == "\rfactor 0: 10%\npixelaux: stopped\npixelaux: again\n"


def test_names_of_any_bytes_are_printed_and_all_is_done(run, tmp_path):
    """Also to a stdout that is strict about its encoding."""
    file = os.fsencode(tmp_path) + b"/\xff.pt"
    result = subprocess.run(
        [sys.executable, HERE / "pixelaux.py", "export", run, file], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert result.returncode == 0 and b"?.pt: " in result.stdout, result.stderr
    assert os.path.exists(file)


def test_many_samples_are_made_by_chunks_kept_first_and_shown_in_part(run, tmp_path, monkeypatch):
    """Noise for a chunk at a time; arrays are there if the picture cannot be made; of 300 images
    the picture shows 128."""
    counts, noise_for = [], pixelaux.noise_for
    monkeypatch.setattr(pixelaux.Factor, "at_once", 100)
    monkeypatch.setattr(
        pixelaux, "noise_for", lambda seed, k, some, shape: (
            counts.append(len(some)), noise_for(seed, k, some, shape))[1])
    assert command(f"sample {run} --n 300 --out {tmp_path / 'many'}") == 0
    assert set(counts) == {100} and len(np.load(tmp_path / "many.npz")["16x16"]) == 300
    height = Image.open(tmp_path / "many.png").height
    assert command(f"sample {run} --n 128 --out {tmp_path / 'some'}") == 0
    assert height == Image.open(tmp_path / "some.png").height
    assert command(f"sample {run} --n 64 --out {tmp_path / 'few'}") == 0
    assert height > Image.open(tmp_path / "few.png").height  # control

    def fail(*_):
        raise OSError(28, "No space left on device", "picture")

    monkeypatch.setattr(pixelaux, "save_samples", fail)
    assert command(f"sample {run} --n 2 --out {tmp_path / 'array'}") == 2
    assert len(np.load(tmp_path / "array.npz")["8x8"]) == 2


def test_a_tilde_in_a_flag_is_the_home(run, tmp_path, monkeypatch):
    """--out=~/x, which the shell leaves to us."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert command(f"sample {run} --n 1 --out=~/there/x") == 0
    assert (tmp_path / "there" / "x.npz").exists() and not (tmp_path / "~").exists()


def test_threads_are_put_back_if_a_draw_fails():
    def failing(*args):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    model, seen, before = small("pyramid", (16, 16)), [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            pixelaux.sample_fast(model.factors[0], 1, None, failing)
        assert torch.get_num_threads() == 3 and seen == [1]  # control: it was changed
    finally:
        torch.set_num_threads(before)


def test_small_products_run_on_one_thread_and_the_count_is_put_back(monkeypatch):
    """Large ones on as many as there are (control)."""
    model, seen = small("pyramid", (16, 16)), {}
    before = torch.get_num_threads()
    try:
        for channels in (1, 10**9):  # multiplications at a position
            torch.set_num_threads(2)
            plan = Plan(model.factors[0].net, 4, 1, (8, 8))
            plan.work = collections.Counter({when: channels for when in plan.work})
            compute = plan.compute
            noted = seen.setdefault(channels, set())
            plan.compute = lambda *args: (noted.add(torch.get_num_threads()), compute(*args))[1]
            due = next(iter(plan.steps()))
            plan.run_step(due)
        assert seen == {1: {1}, 10**9: {2}}
        torch.set_num_threads(2)
        model.sample(1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_runs_that_begin_at_one_moment_are_told_apart(small_preset, tmp_path, capsys, monkeypatch):
    """One plans, then another run begins in the folder; of other settings it is refused, and a run
    that has ended by then is not taken for one's own."""
    plan_run = pixelaux.plan_run
    for first, second in ((f"{TRAIN} --factor 0 --seed 0", f"{TRAIN} --factor 1 --seed 1"),
                          (f"{TRAIN} --seed 0", f"{TRAIN} --seed 0")):
        out = tmp_path / str(len(os.listdir(tmp_path)))

        def late(args, folder):
            planned = plan_run(args, folder)
            monkeypatch.setattr(pixelaux, "plan_run", plan_run)
            assert command(first, "--out", out) == 0
            return planned

        monkeypatch.setattr(pixelaux, "plan_run", late)
        assert command(second, "--out", out) == 2
        assert "--out" in said(capsys)[-1]


def test_training_by_the_function_leaves_the_random_state_alone(tmp_path):
    """Its dropout is seeded in each step; dropout did draw (control: two seeds, two weights)."""
    data, _ = pixelaux.load_data("shapes", size=(12, 12))
    before, weights = torch.random.get_rng_state(), []
    for seed in (0, 1):
        model = build("pixelcnn", 12, seed=seed, **SMALL_RUN)
        pixelaux.train_factor(model, 0, data, tmp_path / str(seed))
        weights.append(model.factors[0].net.last.b.detach())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(*weights)
