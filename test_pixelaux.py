"""Properties of pixelaux, each beside an oracle that shares no code with what it checks, and a positive control."""
import argparse
import contextlib
import dataclasses
import decimal
import functools
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
import threading
import time
import weakref
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import commands
import pixelaux
from commands import main
from pixelaux import Categorical, Conv, Decoder, Gray, Half, LogisticMixture, Problem, Shapes, bits_per_dim, build

HERE = pathlib.Path(__file__).resolve().parent
SMALL = dict(nr_filters=6, nr_logistic_mix=2, nr_resnet=1, nr_resnet_cond=1, nr_light=2)
SIZES = {"pixelcnn": (8, 12), "grayscale": (8, 4), "pyramid": (16, 24), "grayscale-pyramid": (16, 16)}
settings.register_profile("pixelaux", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("pixelaux")


def small(name, size=None, seed=0, dtype=torch.float64, wild=0.1, **overrides):
    """A small model with weights far enough from their start that everything depends on everything."""
    model = build(name, size or SIZES[name], seed=seed, **{**SMALL, **overrides}).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    levels = model.config.levels
    model.initialise(torch.randint(levels, (16, *model.shapes[0]), generator=generator, dtype=torch.uint8))
    for parameter in model.parameters():
        parameter.data += wild * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model.eval()


def images(n, shape, levels=256, seed=0):
    return torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def all_images(shape, levels):
    """Every image of a shape, (levels ** prod(shape), *shape)."""
    grids = np.indices((levels,) * math.prod(shape)).reshape(math.prod(shape), -1).T
    return torch.from_numpy(grids.astype(np.uint8).reshape(-1, *shape))


# --------------------------------------------------------------------------- psi


def test_psi_is_the_stated_integer_function():
    x = images(3, (3, 4, 6))
    half, gray = Half()(x), Gray()(x)
    for n, r, c in itertools.product(range(3), range(4), range(6)):
        red, green, blue = (int(v) for v in x[n, :, r, c])
        assert int(gray[n, 0, r, c]) == (77 * red + 150 * green + 29 * blue) // 4096
        for k in range(3):
            block = [int(x[n, k, r // 2 * 2 + i, c // 2 * 2 + j]) for i in (0, 1) for j in (0, 1)]
            assert int(half[n, k, r // 2, c // 2]) == (sum(block) + 2) // 4
    assert int(Gray()(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))) == 15
    assert half.dtype == gray.dtype == torch.uint8


@pytest.mark.parametrize("psi, shape", [*((Half(levels), (1, 2, 2)) for levels in (2, 4, 7)), (Gray(16), (3, 1, 1))])
def test_bounds_admit_exactly_the_preimage(psi, shape):
    everything = all_images(shape, psi.levels)
    for value in range(psi.levels_out):
        x_hat = torch.full((len(everything), 1, 1, 1), value, dtype=torch.uint8)
        lo, hi = psi.bounds(everything, x_hat)
        inside = ((everything >= lo) & (everything <= hi)).flatten(1).all(1)
        assert torch.equal(inside, (psi(everything) == x_hat).flatten(1).all(1)) and inside.any()


@pytest.mark.parametrize("psi", [Half(), Gray()], ids=["half", "gray"])
@given(seed=st.integers(0, 10**6), extreme=st.booleans())
def test_bounds_at_256_levels_contain_x_and_are_sharp(psi, seed, extreme):
    rng = np.random.default_rng(seed)
    x = rng.integers(256, size=(4, 3, 2, 2)) if not extreme else rng.choice([0, 1, 2, 253, 254, 255], size=(4, 3, 2, 2))
    x = torch.from_numpy(x.astype(np.uint8))
    lo, hi = psi.bounds(x, psi(x))
    assert ((lo <= x) & (x <= hi) & (lo >= 0) & (hi <= 255)).all()
    # sharp: drawing every sub-pixel at an end of its interval, in order, always ends in the preimage
    y, ends = torch.zeros_like(x), rng.integers(2, size=x.shape)
    order = [(c, r, k) for r, k in itertools.product(range(2), range(2)) for c in range(3)]
    for c, r, k in order:
        bounds = psi.bounds(y, psi(x))
        for n in range(4):
            y[n, c, r, k] = bounds[ends[n, c, r, k]][n, c, r, k]
    assert torch.equal(psi(y), psi(x))


# --------------------------------------------------------------------------- heads


def oracle_log_pmf(mean, log_scale, value, levels):
    """log of one component's mass on a level, with 60 digits."""
    D = decimal.Decimal
    with decimal.localcontext() as context:
        context.prec = 60
        scale, step = D(log_scale).exp(), D(2) / (levels - 1)
        sigma = lambda z: 1 / (1 + (-z).exp())
        centre = value * step - 1
        upper = D(1) if value == levels - 1 else sigma((centre + step / 2 - D(mean)) / scale)
        lower = D(0) if value == 0 else sigma((centre - step / 2 - D(mean)) / scale)
        return upper - lower


def oracle_log_prob(params, x, levels):
    """log p of one pixel by PixelCNN++'s formulas. params: (10 K,) numpy; x: three ints."""
    k = len(params) // 10
    rest = params[k:].reshape(3, 3 * k)
    weights = np.exp(params[:k] - params[:k].max())
    weights /= weights.sum()
    red, green = (2 * v / (levels - 1) - 1 for v in x[:2])
    total = decimal.Decimal(0)
    for j in range(k):
        c = np.tanh(rest[:, 2 * k + j])
        means = [rest[0, j], rest[1, j] + c[0] * red, rest[2, j] + c[1] * red + c[2] * green]
        mass = decimal.Decimal(float(weights[j]))
        for channel in range(3):
            mass *= oracle_log_pmf(float(means[channel]), float(max(rest[channel, k + j], -7)), x[channel], levels)
        total += mass
    return float(total.ln())


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=30)
def test_mixture_log_prob_equals_the_direct_formula(seed, spread):
    rng = np.random.default_rng(seed)
    params = spread * rng.standard_normal(30)
    params[3:].reshape(3, 9)[:, 3:6] -= 2
    x = rng.choice([0, 1, 100, 128, 254, 255], size=3)
    head = LogisticMixture(torch.from_numpy(params)[None, :, None, None])
    ours = float(head.log_prob(torch.from_numpy(x.astype(np.uint8))[None, :, None, None]))
    assert ours == pytest.approx(oracle_log_prob(params, [int(v) for v in x], 256), rel=1e-9, abs=1e-9)


@given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0, 100.0]))
@settings(max_examples=40)
def test_mixture_sums_to_one(levels, seed, spread):
    params = spread * torch.randn(1, 20, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    everything = all_images((3, 1, 1), levels)
    head = LogisticMixture(params.expand(len(everything), -1, 1, 1), levels)
    assert float(head.log_prob(everything).exp().sum()) == pytest.approx(1, abs=1e-12)


@given(mean=st.floats(-50, 50), log_scale=st.floats(-7, 7))
def test_component_sums_to_one_over_256_levels_and_intervals_add_up(mean, log_scale):
    head = LogisticMixture(torch.zeros(1, 10, 1, 1, dtype=torch.float64))
    mean, log_scale = (torch.tensor(v, dtype=torch.float64) for v in (mean, log_scale))
    values = torch.arange(256)
    mass = head.log_mass(mean, log_scale, values, values)
    assert float(mass.exp().sum()) == pytest.approx(1, abs=1e-12)
    for lo, hi in ((0, 255), (0, 3), (17, 17), (30, 200), (250, 255)):
        whole = head.log_mass(mean, log_scale, torch.tensor(lo), torch.tensor(hi))
        assert float(whole) == pytest.approx(float(mass[lo : hi + 1].logsumexp(0)), abs=1e-9, rel=1e-9)


@given(st.integers(0, 10**6), st.sampled_from([1.0, 30.0]))
def test_categorical_sums_to_one(seed, spread):
    logits = spread * torch.randn(1, 16, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = torch.arange(16, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 3)
    p = Categorical(logits.expand(16, -1, -1, -1)).log_prob(x).exp()
    assert torch.allclose(p.sum(0), torch.ones(2, 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(p[:, 0, 0], torch.softmax(logits[0, :, 0, 0], 0), atol=1e-12)


def test_a_constant_head_costs_log2_levels():
    x = images(2, (1, 4, 4), 16)
    log_prob = Categorical(torch.zeros(2, 16, 4, 4)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(bits_per_dim(log_prob, 16), torch.full((2,), 4.0))
    x = images(2, (3, 4, 4), 2)
    log_prob = LogisticMixture(torch.zeros(2, 20, 4, 4), levels=2).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(bits_per_dim(log_prob, 48), torch.ones(2), atol=1e-6)


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1.0, 5.0, 50.0]))
@settings(max_examples=25)
def test_conditioned_mixture_sums_to_one_over_the_interval(seed, spread):
    """Also far in the tails: means tens of units outside, scales at the clamp."""
    rng, levels = np.random.default_rng(seed), 5
    params = torch.from_numpy(spread * rng.standard_normal((1, 20, 1, 1)))
    lo = torch.from_numpy(rng.integers(0, levels, (1, 3, 1, 1)))
    hi = torch.minimum(lo + torch.from_numpy(rng.integers(0, 3, (1, 3, 1, 1))), torch.tensor(levels - 1))
    everything = all_images((3, 1, 1), levels)
    inside = ((everything >= lo) & (everything <= hi)).flatten(1).all(1)
    everything = everything[inside]
    head = LogisticMixture(params.expand(len(everything), -1, 1, 1), levels)
    log_p = head.log_prob(everything, tuple(v.expand(len(everything), -1, 1, 1) for v in (lo, hi)))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_conditioning_far_in_a_tail_is_finite_in_float32_with_finite_gradients():
    params = torch.zeros(1, 20, 1, 1)
    params[:, 2:].view(1, 3, 6)[:, :, :2] = 40.0  # means
    params[:, 2:].view(1, 3, 6)[:, :, 2:4] = -9.0  # log-scales, below the clamp
    params.requires_grad_()
    x = torch.tensor([3, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    bounds = torch.tensor([2, 0, 250]).view(1, 3, 1, 1), torch.tensor([5, 1, 255]).view(1, 3, 1, 1)
    log_prob = LogisticMixture(params).log_prob(x, bounds)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and params.grad.isfinite().all()
    draws = LogisticMixture(params.detach().double().expand(500, -1, 1, 1)).sample(
        torch.rand(500, 6, 1, 1, dtype=torch.float64), "random", lambda x, c: tuple(v[:, c].expand(500, 1, 1)
                                                                                 for v in bounds))
    assert ((draws >= bounds[0]) & (draws <= bounds[1])).all()


@given(st.integers(0, 10**6), st.integers(0, 15), st.integers(0, 15))
def test_categorical_given_an_interval_is_the_part_of_the_pmf_there(seed, a, b):
    logits = torch.randn(1, 16, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    lo, hi = (torch.full((1, 1, 1, 1), v) for v in sorted((a, b)))
    weights = np.exp(logits.numpy().ravel())
    inside = np.arange(int(lo), int(hi) + 1)
    for x in inside:
        log_prob = Categorical(logits).log_prob(torch.full((1, 1, 1, 1), x, dtype=torch.uint8), (lo, hi))
        assert float(log_prob) == pytest.approx(np.log(weights[x] / weights[inside].sum()), abs=1e-12)
    pmf = Categorical(logits).pmf(0, None, lambda x, c: (lo[:, 0], hi[:, 0])).flatten().numpy()
    assert np.allclose(pmf, np.where((np.arange(16) >= int(lo)) & (np.arange(16) <= int(hi)), weights, 0)
                       / weights[inside].sum(), atol=1e-12)


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
def test_head_samples_follow_the_pmf(limited):
    levels, n = 6, 40000
    params = torch.randn(1, 20, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    everything = all_images((3, 1, 1), levels)
    bounds = torch.tensor([1, 0, 2]).view(1, 3, 1, 1), torch.tensor([4, 3, 5]).view(1, 3, 1, 1)
    limits = (lambda x, c: tuple(v[:, c].expand(n, 1, 1) for v in bounds)) if limited else None
    head = LogisticMixture(params.expand(len(everything), -1, 1, 1), levels)
    p = head.log_prob(everything, tuple(v.expand(len(everything), -1, 1, 1) for v in bounds) if limited else None).exp()
    if limited:
        p = p * ((everything >= bounds[0]) & (everything <= bounds[1])).flatten(1).all(1)[:, None, None]
    noise = torch.rand(n, 6, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = LogisticMixture(params.expand(n, -1, 1, 1), levels).sample(noise, "random", limits)[:, :, 0, 0].numpy()
    counts = np.bincount(x @ np.array([levels**2, levels, 1]), minlength=levels**3)
    p = p.flatten().numpy()
    assert abs(chi_square(counts, p)) < 5
    assert chi_square(np.roll(counts, 1), p) > 50  # control: one level off is found


def test_map_takes_the_mode_of_a_component():
    head = LogisticMixture(torch.randn(200, 20, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    noise = torch.rand(200, 6, 1, 1, dtype=torch.float64)
    x = head.sample(noise, "map")
    red = ((head.means[:, 0].clamp(-1, 1) + 1) * 127.5).round().long()  # (N, K, 1, 1)
    assert (x[:, :1] == red).any(1).all()
    quiet = LogisticMixture(torch.randn(9, 20, 1, 1, dtype=torch.float64), shift=-30.0)
    noise = torch.rand(9, 6, 1, 1, dtype=torch.float64)
    assert torch.equal(quiet.sample(noise), quiet.sample(noise, "map"))  # variance 0 is MAP
    logits = torch.randn(9, 16, 1, 1)
    assert torch.equal(Categorical(logits).sample(noise, "map"), logits.argmax(1, keepdim=True))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_pmf_of_each_channel_is_the_joint_factorised(seed):
    levels = 5
    params = torch.randn(1, 20, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    everything = all_images((3, 1, 1), levels)
    n = len(everything)
    head = LogisticMixture(params.expand(n, -1, 1, 1), levels)
    p = 1.0
    for c in range(3):
        p = p * head.pmf(c, everything.long()).gather(1, everything[:, c : c + 1].long()).flatten()
    assert torch.allclose(p, head.log_prob(everything).exp().flatten(), atol=1e-10)


# --------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", SIZES)
def test_every_factor_is_causal_and_sees_all_that_is_earlier(name):
    """Gradients in float64: exactly zero from outputs to later pixels and their own, nonzero to every earlier pixel."""
    size = {"pixelcnn": (8, 4), "grayscale": (4, 4), "pyramid": (8, 8), "grayscale-pyramid": (4, 4)}[name]
    model = small(name, size, scales=1, nr_light=3)  # so small that everything is within reach
    x = images(1, model.shapes[0])
    levels = model.levels_of(x)
    for k, factor in enumerate(model.factors):
        c, h, w = factor.shape
        planes = factor.planes(levels[k], factor.levels).requires_grad_()
        e = factor.embeddings(levels[k - 1]) if k else ()
        out = factor.net(planes, e)[0]
        for r, col in itertools.product(range(h), range(w)):
            grad, = torch.autograd.grad(out[0, :, r, col].abs().sum(), planes, retain_graph=True)
            seen = grad[0, :c].abs().reshape(c, -1)
            here = r * w + col
            assert not seen[:, here:].any(), (k, r, col)
            assert seen[:, :here].bool().all(), (k, r, col)
        if k:  # every output pixel sees its own pixel of x_hat
            hat = factor.planes(levels[k - 1], factor.psi.levels_out).requires_grad_()
            e = factor.embed(hat)
            out = factor.net(planes.detach(), e)[0]
            for r, col in itertools.product(range(h), range(w)):
                grad, = torch.autograd.grad(out[0, :, r, col].abs().sum(), hat, retain_graph=True)
                assert grad[0, :-1, r * hat.shape[2] // h, col * hat.shape[3] // w].bool().all()


def test_a_channel_depends_on_the_channels_before_it_and_no_other():
    head = LogisticMixture(torch.randn(1, 20, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    x = torch.tensor([100, 50, 200]).view(1, 3, 1, 1)
    for c, changed in itertools.product(range(3), range(3)):
        y = x.clone()
        y[:, changed] += 30
        assert torch.equal(head.pmf(c, x), head.pmf(c, y)) == (changed >= c)


@pytest.mark.parametrize("shift", ["mask", "offset"])
def test_the_causality_test_finds_a_shift_by_one(shift):
    model = small("pyramid", (8, 8), scales=0)
    conv = model.factors[0].net.layers[0].convs[0]  # the vertical stream's first layer: rows above only
    conv.offset = (1, 1) if shift == "mask" else (3, 1)
    if shift == "mask":
        with pytest.raises(AssertionError, match="not causal"):
            model.sample(1)
    planes = model.factors[0].planes(images(1, (3, 8, 8)), 256).requires_grad_()
    out = model.factors[0].net(planes)[0]
    grad, = torch.autograd.grad(out[0, :, 3, 3].abs().sum(), planes)
    assert grad[0, :3, 3, 3].any() == (shift == "mask")
    assert grad[0, :3, 2, 6].any() == (shift == "mask")  # far to the right: by the vertical stream alone


def plain_network(network, x, embeddings=()):
    """The layers one after the other: what is read is padded by zeros, or interleaved with them, then correlated."""
    nodes = [x, *embeddings[: len(network.embeddings)]]
    for i, layer in enumerate(network.layers, len(nodes)):
        total = 0
        for source, conv in zip(layer.sources, layer.convs):
            a, weight = nodes[source], conv.g.view(-1, 1, 1, 1) * conv.v / conv.v.square().sum((1, 2, 3), True).sqrt()
            if conv.activation == "concat_elu":
                a = torch.cat([a, -a], 1)
            if conv.activation != "none":
                a = torch.where(a > 0, a, torch.expm1(a))
            (kh, kw), (oy, ox), (h, w) = conv.kernel, conv.offset, network.size(i, x.shape[2:])
            if conv.up:
                spread = a.new_zeros(*a.shape[:2], 2 * a.shape[2] + kh + 2, 2 * a.shape[3] + kw + 2)
                spread[:, :, kh - 1 : -3 : 2, kw - 1 : -3 : 2] = a
                b = torch.nn.functional.conv2d(spread, weight.flip(2, 3), conv.b)[:, :, oy : oy + h, ox : ox + w]
            else:
                padded = torch.nn.functional.pad(a, (ox, kw, oy, kh))
                b = torch.nn.functional.conv2d(padded, weight, conv.b)[:, :, :: conv.stride, :: conv.stride]
            total = total + b[:, :, :h, :w]
        if layer.residual is not None:
            a, b = total.chunk(2, 1)
            total = nodes[layer.residual] + a / (1 + torch.exp(-b))
        nodes.append(total)
    return [nodes[i] for i in network.outputs]


@pytest.mark.parametrize("name", SIZES)
def test_networks_and_those_of_the_bench_equal_the_plain_implementation(name):
    model = small(name)
    levels = model.levels_of(images(2, model.shapes[0]))
    for factor, x, x_hat in zip(model.factors, levels, [None, *levels]):
        planes, embed = factor.planes(x, factor.levels), factor.embed
        e = plain_network(embed, factor.planes(x_hat, factor.psi.levels_out)) if embed else ()
        params, = plain_network(factor.net, planes, e)
        for one in (factor, commands.plain(factor)):
            assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one.embeddings(x_hat), e, strict=True))
            assert torch.allclose(one.net(planes, e)[0], params, atol=1e-10)
    assert commands.plain(factor).net.layers[0].convs[0](planes, planes.shape[2:]).is_contiguous()  # NCHW


def shifted(x, down, right):
    """x moved down and right, zeros coming in."""
    h, w = x.shape[2:]
    return torch.nn.functional.pad(x, (right, 0, down, 0))[:, :, :h, :w]


@pytest.mark.parametrize("kind, resample", [
    *itertools.product(["vertical", "horizontal", "ordinary"], ["", "down", "up"]),
    ("first vertical", ""), ("first above", ""), ("first left", "")])
def test_convolutions_are_pixelcnnpps(kind, resample):
    """Pad, shift and crop as in PixelCNN++'s nn.py, written out."""
    F, size = torch.nn.functional, (6, 8)
    spec = {"vertical": pixelaux.VERTICAL, "horizontal": pixelaux.HORIZONTAL, "ordinary": pixelaux.ORDINARY,
            "first vertical": dict(kernel=(2, 3), offset=(2, 1)), "first above": dict(kernel=(1, 3), offset=(1, 1)),
            "first left": dict(kernel=(2, 1), offset=(1, 1))}[kind]
    (kh, kw), x = spec["kernel"], torch.randn(2, 3, *size, dtype=torch.float64)
    if resample == "up":
        conv = Conv(3, 4, (kh, kw), pixelaux.UP[kh, kw], up=True).double()
    else:
        conv = Conv(3, 4, **spec, stride=2 if resample else 1).double()
    w = conv.v * (conv.g / conv.v.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    stride = 2 if resample else 1
    target = {"": (6, 8), "down": (3, 4), "up": (12, 16)}[resample]
    if resample == "up":  # full transposed convolution, cropped
        full = F.conv_transpose2d(x, w.transpose(0, 1), conv.b, 2)
        full = F.pad(full, (0, 2, 0, 2))  # the bias of what nothing reaches is never cropped in
        top, left = {"vertical": (0, 1), "horizontal": (0, 0), "ordinary": (1, 1)}[kind]
        missing = torch.zeros_like(full) + conv.b.view(1, -1, 1, 1)
        full = torch.where(torch.arange(full.shape[2]).view(-1, 1) < full.shape[2] - 2, full, missing)
        full = torch.where(torch.arange(full.shape[3]) < full.shape[3] - 2, full, missing)
        expected = full[:, :, top : top + target[0], left : left + target[1]]
    else:
        pad = {"vertical": (1, 1, 1, 0), "horizontal": (1, 0, 1, 0), "ordinary": (1, 1, 1, 1),
               "first vertical": (1, 1, 1, 0), "first above": (1, 1, 0, 0), "first left": (0, 0, 1, 0)}[kind]
        y = F.conv2d(F.pad(x, pad), w, None, stride)
        y = shifted(y, int(kind in ("first vertical", "first above")), int(kind == "first left"))
        expected = y + conv.b.view(1, -1, 1, 1)
    assert torch.allclose(conv(x, target), expected, atol=1e-12)


def test_block_counts_are_the_papers():
    blocks = lambda net: sum(layer.residual is not None for layer in net.layers)
    config = dict(nr_filters=2, nr_logistic_mix=1)
    pixelcnn = build("pixelcnn", 32, "cifar10", **config).factors[0]
    assert blocks(pixelcnn.net) == 2 * 36  # both streams
    coarse, fine = build("grayscale", 32, "cifar10", **config).factors
    assert blocks(coarse.net) == 2 * 36 and blocks(fine.net) == 2 * 24 and blocks(fine.embed) == 24
    pyramid = build("pyramid", 128, "celeba", **config).factors
    assert [factor.shape[1] for factor in pyramid] == [8, 16, 32, 64, 128]
    assert all(blocks(factor.net) == 2 * 3 for factor in pyramid)
    assert all(blocks(factor.embed) == 15 for factor in pyramid[1:])
    for factor in (fine, *pyramid[1:]):  # the embedding reaches every residual block
        for layer, after in zip(factor.net.layers, list(factor.net.layers)[1:]):
            if after.residual is not None:
                assert set(layer.sources) & set(factor.net.embeddings)


def test_data_dependent_initialisation_gives_mean_0_and_the_gain_as_deviation():
    model = build("grayscale", 16, **SMALL).double()
    x = images(32, model.shapes[0])
    model.initialise(x)
    seen = []
    for factor in model.factors:
        for conv in factor.modules():
            if isinstance(conv, Conv):
                conv.register_forward_hook(lambda conv, _, y: seen.append((conv, y)))
    output = [factor.net.layers[-1].convs[0] for factor in model.factors]
    model.log_prob(x)
    assert len(seen) > 30
    for conv, y in seen:
        y = y.transpose(0, 1).flatten(1)
        if conv not in output:  # the output layer's bias is the head's start
            assert torch.allclose(y.mean(1), torch.zeros(len(y), dtype=torch.float64), atol=1e-9)
        assert torch.allclose(y.std(1), torch.full((len(y),), conv.gain, dtype=torch.float64), rtol=1e-6)


# --------------------------------------------------------------------------- the model: normalisation, bound, tightness

TINY = dict(SMALL, nr_filters=4, embedding=(1, "up", 1), nr_resnet=(1, 1), nr_resnet_cond=(1, 1))


@functools.cache
def enumerable(name):
    """A model whose images can be enumerated, and all of them."""
    size, levels, scales = {"pixelcnn": ((2, 2), 2, -1), "pyramid": ((2, 2), 2, 1), "grayscale": ((1, 1), 16, -1)}[name]
    model = small(name, size, levels=levels, scales=scales, wild=0.3, **{k: v for k, v in TINY.items() if k not in SMALL
                                                                     or k.startswith("nr_")})
    return model, all_images(model.shapes[0], levels)


@pytest.mark.parametrize("name", ["pixelcnn", "pyramid", "grayscale"])
def test_exact_likelihood_sums_to_one_over_all_images(name):
    model, everything = enumerable(name)
    with torch.no_grad():
        tight, bound = model.log_prob(everything, tight=True), model.log_prob(everything)
    assert float(tight.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert (tight >= bound - 1e-9).all()
    if name == "pixelcnn":
        assert torch.allclose(tight, bound)
    else:
        assert float(bound.exp().sum()) < 0.99  # control: the bound does leak


@pytest.mark.parametrize("name", ["pyramid", "grayscale"])
def test_the_gap_of_the_bound_is_the_leaked_mass(name):
    """sum over X of p(X, psi(X)) = 1 - sum over X^ of p(X^) P(psi(X) != X^ | X^), by enumeration."""
    model, everything = enumerable(name)
    coarse, fine = model.factors
    leaked = joint = 0.0
    with torch.no_grad():
        for x_hat in all_images(coarse.shape, coarse.levels):
            p_hat = float(coarse.log_prob(x_hat[None]).exp())
            p = fine.log_prob(everything, x_hat[None].expand(len(everything), -1, -1, -1)).exp()
            assert float(p.sum()) == pytest.approx(1, abs=1e-9)
            wrong = (model.chain[0](everything) != x_hat).flatten(1).any(1)
            leaked, joint = leaked + p_hat * float(p[wrong].sum()), joint + p_hat
        bound = float(model.log_prob(everything).exp().sum())
    assert joint == pytest.approx(1, abs=1e-9)
    assert bound == pytest.approx(1 - leaked, abs=1e-9) and leaked > 0.01


@pytest.mark.parametrize("name", ["pixelcnn", "pyramid", "grayscale"])
@pytest.mark.parametrize("tight", [False, True])
def test_samples_follow_the_model(name, tight):
    model, everything = enumerable(name)
    n, levels = 20000, model.config.levels
    sampled = model.sample(n, seed=7, tight=tight)[-1]
    with torch.no_grad():
        if tight or not model.chain:
            p = model.log_prob(everything, tight=True).exp()
        else:  # the marginal of X, over all X^
            p = sum(model.factors[0].log_prob(x_hat[None]).exp()
                    * model.factors[1].log_prob(everything, x_hat[None].expand(len(everything), -1, -1, -1)).exp()
                    for x_hat in all_images(model.shapes[1], model.levels[1]))
    digits = levels ** np.arange(sampled[0].numel())[::-1]
    counts = np.bincount(sampled.flatten(1).numpy().astype(np.int64) @ digits, minlength=len(everything))
    assert abs(chi_square(counts, p.numpy())) < 5
    assert chi_square(np.roll(counts, 1), p.numpy()) > 50


@pytest.mark.parametrize("name", SIZES)
def test_tight_is_at_least_the_bound_and_tight_samples_are_consistent(name):
    model = small(name)
    x = images(4, model.shapes[0])
    with torch.no_grad():
        for tight, bound in zip(model.log_prob_factors(x, tight=True), model.log_prob_factors(x)):
            assert (tight >= bound - 1e-9).all()
        for mode in ("random", "map"):
            levels = model.sample(3, seed=1, tight=True, mode=mode)
            for i, psi in enumerate(model.chain):
                assert torch.equal(psi(levels[::-1][i]), levels[::-1][i + 1])


def test_log_prob_is_the_sum_of_the_factors_in_nats_and_bad_input_is_named():
    model = small("pyramid")
    x = images(2, model.shapes[0])
    with torch.no_grad():
        parts = model.log_prob_factors(x)
        assert torch.equal(sum(parts), model.log_prob(x)) and parts[0].shape == (2,)
    with pytest.raises(Problem, match="uint8"):
        model.log_prob(x.float())
    assert bits_per_dim(-math.log(2) * 12, 3) == pytest.approx(4)


def test_sizes_that_do_not_fit_are_named_with_those_that_do():
    for name, size, multiple in (("pyramid", 36, 8), ("grayscale", (8, 6), 4), ("pixelcnn", 30, 4), ("pyramid", 17, 4)):
        with pytest.raises(Problem, match=f"multiples of {multiple}"):
            build(name, size)
    for name, size in (("pyramid", (24, 40)), ("grayscale", (4, 12)), ("grayscale-pyramid", (16, 24))):
        assert build(name, size, **SMALL).shapes[0] == (3, *size)
    for bad in (dict(name="nonsense", size=32), dict(name="pyramid", size=32, preset="huge"),
                dict(name="pyramid", size=32, nr_filtres=3)):
        with pytest.raises(Problem, match="expected one of"):
            build(**bad)


# --------------------------------------------------------------------------- samplers


def plain_sample(model, n, seed, mode, tight):
    """Ancestral sampling by the ordinary forward pass, a pass a pixel: nothing of the sampler's."""
    done = []
    for k, factor in enumerate(model.factors):
        c, h, w = factor.shape
        noise = torch.rand(n, h * w, 2 * c, generator=torch.Generator().manual_seed(1_000_003 * seed + k),
                           dtype=torch.float64)
        x = torch.zeros(n, c, h, w, dtype=torch.uint8)
        x_hat = done[-1] if done else None
        e = factor.embeddings(x_hat)
        for r, col in itertools.product(range(h), range(w)):
            params = factor.net(factor.planes(x, factor.levels), e)[0][:, :, r : r + 1, col : col + 1]

            def limits(so_far, channel):
                y = x.clone()
                y[:, :, r, col] = so_far[:, :, 0, 0].to(torch.uint8)
                return tuple(v[:, channel, r : r + 1, col : col + 1] for v in factor.psi.bounds(y, x_hat))

            head = factor.Head(params.double(), factor.levels)
            drawn = head.sample(noise[:, r * w + col, :, None, None], mode, limits if tight and k else None)
            x[:, :, r, col] = drawn[:, :, 0, 0].to(torch.uint8)
        done.append(x)
    return done


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("mode, tight", [("random", False), ("random", True), ("map", False)])
def test_fast_and_naive_equal_plain_ancestral_sampling(name, mode, tight):
    model = small(name, (8, 8), **({"scales": 1} if "pyramid" in name else {}))
    with torch.no_grad():
        counted = []
        fast = model.sample(2, seed=3, mode=mode, tight=tight, progress=counted.append)
        assert sum(counted) == 2 * sum(h * w for _, h, w in model.shapes)
        assert same(fast, plain_sample(model, 2, 3, mode, tight))
        assert same(fast, model.sample(2, seed=3, mode=mode, tight=tight, fast=False))
    assert not same(fast, model.sample(2, seed=4, mode=mode, tight=tight))


@pytest.mark.parametrize("name, size, n", [("pixelcnn", (4, 12), 1), ("pixelcnn", (8, 8), 3), ("grayscale", (8, 4), 5),
                                           ("pyramid", (16, 12), 1), ("pyramid", (12, 20), 2), ("pyramid", (8, 8), 7),
                                           ("pixelcnn", (4, 12), 4), ("grayscale", (8, 4), 8),
                                           ("pyramid", (12, 20), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_equals_naive_integer_for_integer(name, size, n, dtype):
    model = small(name, size, dtype=dtype, nr_filters=24, **({"scales": 1} if name == "pyramid" else {}))
    for seed in range(3):
        assert same(model.sample(n, seed=seed), model.sample(n, seed=seed, fast=False))


@pytest.mark.parametrize("look_right, lag", [(True, 8), (False, 2)])
def test_the_light_networks_wavefront(look_right, lag):
    model = small("pyramid", (16, 32), scales=0, nr_light=3, look_right=look_right)
    decoder = Decoder(model.factors[0], 1)
    schedule = decoder.schedule
    assert schedule.lag == lag and len(schedule.steps) == 31 + lag * 15 + 1
    layers = {parts[-1][0] for parts in schedule.parts.values()}
    for layout, indices, _ in schedule.steps[1:]:
        for index, slots in zip([index for index, _ in layout], indices.split([count for _, count in layout])):
            if index in layers:  # a diagonal, neighbours in memory; the diagonals before are forgotten
                ring = schedule.indices[index][0] - 2
                slots = slots[slots < ring].numpy()
                assert (np.diff(slots) % ring == 1).all() and len(slots) <= 32 // lag and ring <= 96
    assert same(model.sample(1), model.sample(1, fast=False))


def test_every_activation_is_computed_once():
    model = small("pixelcnn", (8, 12))
    net, schedule = model.factors[0].net, Decoder(model.factors[0], 4).schedule
    assert schedule.lag == 12
    for layer, (i, parts) in zip(net.layers, schedule.parts.items()):
        h, w = net.size(i, (8, 12))
        for own, _, _ in parts:
            slots = [dict(zip([k for k, _ in layout], indices.split([m for _, m in layout]))).get(own)
                     for layout, indices, _ in schedule.steps]
            slots, ring = [s.numpy() for s in slots if s is not None], schedule.indices[own][0] - 2
            assert sorted(s for s in np.concatenate(slots) if s < ring) == sorted(p % ring for p in range(h * w))
            assert ring <= 3 * w  # the rows above are forgotten
            if layer.convs[0].kernel == (2, 3):
                assert len(slots) <= h  # the vertical stream: once a row
    assert any(len(parts) == 2 for parts in schedule.parts.values())
    schedule = Decoder(small("pixelcnn", (8, 64)).factors[0], 4).schedule  # so wide that several rows are on their way
    assert schedule.lag == 36
    for i, parts in schedule.parts.items():
        assert schedule.indices[parts[-1][0]][0] - 2 == 2 * schedule.sizes[i][1]


def test_a_replayed_step_is_the_step_that_was_captured(monkeypatch):
    """CUDA graphs with a stand-in on the CPU that, like them, does not run what it captures."""
    model, captured, replays = small("pyramid", (16, 16)), [], []
    x_hat = images(2, (3, 8, 8))
    noise = torch.rand(2, 2, 256, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = [pixelaux.Draw(part) for part in noise]
    expected = [Decoder(model.factors[1], 2, x_hat, tight=True).run(draw) for draw in draws]

    class Graph:
        def replay(self):
            replays.append(self)
            step(*self.arguments)

        def pool(self):
            return "pool"

    @contextlib.contextmanager
    def capture(graph, pool, **options):
        assert pool == ("pool" if any(decoder.graphs.values()) else None)
        captured.append(graph)
        monkeypatch.setattr(Decoder, "step", lambda *arguments: setattr(graph, "arguments", arguments))
        yield
        monkeypatch.setattr(Decoder, "step", step)

    step = Decoder.step
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    decoder = Decoder(model.factors[1], 2, x_hat, tight=True)
    decoder.captures = True
    assert torch.equal(decoder.run(draws[0]), expected[0])
    layouts = [layout for layout, _, _ in decoder.schedule.steps]
    assert len(captured) == sum(layouts.count(layout) > 1 for layout in set(layouts)) > 1
    assert len(replays) == len(layouts) - len(set(layouts))
    assert torch.equal(decoder.run(draws[1]), expected[1])  # other noise, so other graphs
    assert not torch.equal(*expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", sorted(pixelaux.MODELS))
def test_cuda_samples_and_trains_as_the_cpu_does(name, tmp_path, capsys):
    model = small(name, (16, 16)).double().to("cuda")
    fast, naive = (model.sample(3, seed=1, fast=fast)[-1].cpu() for fast in (True, False))
    assert torch.equal(fast, naive) and torch.equal(fast, small(name, (16, 16)).double().sample(3, seed=1)[-1])
    out = str(tmp_path / "run")
    assert main(["train", "--model", name, "--steps", "30", "--device", "cuda", "--no-compile", "--out", out]) == 0
    for device in ("cuda", "cpu"):
        assert main(["eval", out, "--device", device]) == 0
    totals = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("total")][1:]
    assert np.allclose(*(np.array(total, float) for total in totals), atol=1e-3)


def test_given_images_stay_and_coarser_levels_follow():
    model = small("grayscale-pyramid")
    x = images(3, model.shapes[0])
    for level in model.levels_of(x)[:-1]:
        done = model.sample(3, seed=1, given=level, tight=True)
        assert len(done) == len(model.factors)
        k = [tuple(v.shape) for v in done].index(tuple(level.shape))
        assert torch.equal(done[k], level) and same(done[: k + 1], model.levels_of(x)[: k + 1])
    with pytest.raises(Problem, match="given"):
        model.sample(3, given=x[:, :, :5])
    with pytest.raises(Problem, match="0..15"):
        model.sample(3, given=model.levels_of(x)[0] + 100)
    with pytest.raises(Problem, match="expected uint8 images"):
        model.log_prob(model.levels_of(x)[1])  # a level alone has no likelihood of X
    with pytest.raises(Problem, match="given: expected 3 images, got 2"):
        model.sample(3, given=x[:2])


def test_shift_reduces_the_variance():
    params = torch.randn(1, 10, 1, 1, dtype=torch.float64).expand(500, -1, 1, 1)
    noise = torch.rand(500, 6, 1, 1, dtype=torch.float64)
    spread = [float(LogisticMixture(params, shift=shift).sample(noise).double().std(0).mean()) for shift in (0, -2, -9)]
    assert spread[0] > spread[1] > spread[2]
    logits = torch.randn(1, 16, 1, 1).expand(500, -1, 1, 1)
    kinds = [len(Categorical(logits, shift=shift).sample(noise).unique()) for shift in (0, -1, -9)]
    assert kinds[0] > kinds[1] > kinds[2] == 1


def test_sampling_leaves_the_mode_and_global_random_state_alone():
    model = small("pyramid", (8, 8), scales=0).train()
    state = torch.get_rng_state()
    model.sample(1)
    build("pyramid", 8, **SMALL)
    assert model.training and torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------- codec


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tight", [True, False])
def test_images_come_back_from_as_many_bits_as_their_probability_says(name, tight):
    model = small(name, dtype=torch.float32)
    shape = model.shapes[0]
    x = torch.cat([images(2, shape), images(1, shape, levels=2), 255 * images(1, shape, levels=2)])
    words = commands.compress(model, x, tight)
    assert torch.equal(commands.decompress(model, words, tight), x)
    with torch.no_grad():
        ideal = -model.double().log_prob(x, tight) / math.log(2)
    for part, bits in zip(words, ideal.tolist()):
        assert 32 * len(part) <= 1.001 * bits + 64
    other = torch.zeros(0)
    try:
        other = commands.decompress(model.float(), [words[1], *words[1:]], tight)
    except AssertionError as error:
        assert "invalid for the employed entropy model" in str(error)  # constriction's
    assert not torch.equal(other, x)  # control: other bits, another image or none


def test_impossible_images_are_coded_all_the_same():
    model = small("pyramid", dtype=torch.float32, wild=3.0)  # means far outside, log-scales at the clamp
    x = images(2, model.shapes[0])
    with torch.no_grad():
        assert model.double().log_prob(x, tight=True).min() < -30 * model.dims * math.log(2)
    words = commands.compress(model.float(), x)
    assert torch.equal(commands.decompress(model, words), x)
    assert max(map(len, words)) <= model.dims  # 24 bits a sub-pixel at most, and 32 for a carry


@pytest.fixture(scope="module")
def packed():
    model = small("pyramid", (16, 16), dtype=torch.float32)
    x = images(1, (3, 24, 16))[0]  # another size than the model was built for
    return model, x, commands.pack(commands.resized(model, (24, 16)), x)


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_file_is_refused(packed, data):
    model, x, file = packed
    how = data.draw(st.sampled_from(["flip", "cut", "longer"]))
    if how == "flip":
        bit = data.draw(st.integers(0, 8 * len(file) - 1))
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
    else:
        damaged = file[: data.draw(st.integers(0, len(file) - 1))] if how == "cut" else file + b"\0"
    with pytest.raises(Problem, match="not a .pxa file|truncated or altered"):
        commands.unpack(model, bytes(damaged))


def test_a_whole_file_comes_back_from_its_own_model_alone(packed):
    model, x, file = packed
    assert torch.equal(commands.unpack(model, file), x)
    with pytest.raises(Problem, match="another model"):
        commands.unpack(small("pyramid", (16, 16), dtype=torch.float32, seed=1), file)
    header = commands.HEADER.unpack_from(file)
    wrong = [commands.HEADER.pack(*header[:2], header[2] ^ 1, *header[3:]) + file[commands.HEADER.size : -4]]
    for byte in range(commands.HEADER.size, commands.HEADER.size + 48, 3):  # what other probabilities would come to
        wrong.append(file[:byte] + bytes([file[byte] ^ 129]) + file[byte + 1 : -4])
    for content in wrong:
        with pytest.raises(Problem, match="rounds otherwise"):
            commands.unpack(model, content + zlib.crc32(content).to_bytes(4, "little"))
    with pytest.raises(Problem, match="multiples of"):
        commands.resized(model, (17, 16))


# --------------------------------------------------------------------------- data


@pytest.mark.parametrize("size", [(12, 12), (14, 14), (12, 40), (16, 16), (18, 22), (32, 32)])
def test_every_configuration_of_shapes_is_another_image(size):
    masks = Shapes(size).masks.reshape(len(Shapes(size).masks), -1)
    assert len(np.unique(masks, axis=0)) == len(masks) and masks.any(1).all() and not masks.all(1).any()


def test_a_small_alphabet_refuses_other_values():
    model, x = build("pixelcnn", 8, levels=16, **SMALL), torch.full((1, 3, 8, 8), 15, dtype=torch.uint8)
    assert model.log_prob(x).isfinite().all()
    with pytest.raises(Problem, match=r"up to 16, expected 0\.\.15"):
        model.log_prob(x + 1)


def test_shapes_have_the_probability_they_claim():
    shapes = Shapes((16, 16))
    x = shapes.sample(200, [1, 2])
    assert x.dtype == np.uint8 and np.array_equal(x, shapes.sample(200, [1, 2]))
    assert shapes.pmf.sum() == pytest.approx(1) and len(shapes.pmf) == 2 * shapes.bound + 1
    masks = shapes.masks.reshape(len(shapes.masks), -1)
    for a, b in itertools.combinations(shapes.palette, 2):
        assert abs(a - b).sum() > 6 * shapes.bound  # decoding by the nearest colour cannot err
    # the direct formula: all configurations that could have made the image, by a slow loop
    sigma = lambda z: 1 / (1 + math.exp(-z))
    mass = [sigma((v + 0.5) / 0.25) - sigma((v - 0.5) / 0.25) for v in range(-3, 4)]
    mass = [m / sum(mass) for m in mass]
    entropy = -sum(m * math.log(m) for m in mass) * 768 + math.log(len(masks) * 12)
    for image, log_p in zip(x[:3], shapes.log_prob(x[:3])):
        total = 0.0
        for (ground, shape), mask in itertools.product(shapes.pairs, masks):
            clean = np.where(mask.reshape(16, 16, 1), shapes.palette[shape], shapes.palette[ground])
            noise = image.astype(int) - clean
            if abs(noise).max() <= 3:
                total += math.exp(sum(math.log(mass[v + 3]) for v in noise.ravel()) + entropy)
        assert math.log(total / len(masks) / len(shapes.pairs)) - entropy == pytest.approx(float(log_p), rel=1e-9)
    assert -shapes.log_prob(x).mean() == pytest.approx(entropy, rel=0.01)
    assert shapes.decodable(x).all()
    wrong = x.copy()
    wrong[:, 8, 8, 1] ^= 64
    assert np.isinf(shapes.log_prob(wrong)).all() and shapes.decodable(wrong).all()
    assert not shapes.decodable(np.random.default_rng(0).integers(256, size=(5, 16, 16, 3), dtype=np.uint8)).any()


@pytest.mark.parametrize("n, batch", [(10, 4), (3, 8), (5, 1)])
def test_batches_are_functions_of_the_step_and_epochs_are_permutations(n, batch):
    array = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
    data = pixelaux.Dataset(array, array[:1])
    seen = torch.cat([data.batch(step, batch, (0, 1)) for step in range(3 * n)])[:, 0, 0, 0].reshape(-1, n)
    for epoch in seen:
        assert sorted(epoch.tolist()) == array[:, 0, 0, 0].tolist()
    assert len(seen.unique(dim=0)) > 1  # every epoch its own order
    assert torch.equal(data.batch(2, batch, (0, 1)), pixelaux.Dataset(array, array[:1]).batch(2, batch, (0, 1)))
    flipped = pixelaux.Dataset(array, array[:1], flip=True).batch(0, 200, (0, 1))
    left = (flipped[:, 0, 0, 0] < flipped[:, 0, 0, 1]).float().mean()
    assert 0.3 < left < 0.7


def png(path, mode, size=(40, 50), **options):
    values = np.random.default_rng(0).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert(mode)
    image.save(path, **options)
    return values


def test_folders_take_every_kind_of_image_and_skip_what_is_broken(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images" / "deeper"
    folder.mkdir(parents=True)
    gray = png(folder / "gray.png", "L", (32, 32))
    png(folder / "deep.png", "I;16", (32, 32))
    for mode in ("RGB", "RGBA", "P", "LA", "1", "CMYK"):
        png(folder / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}", mode)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "RGB.png").read_bytes()[:1000])
    (folder / "notes.txt").write_text("no image")
    png(folder / "small.png", "RGB", (31, 60))
    data, size = commands.load_data(f"folder:{tmp_path / 'images'}", "data", (32, 32))
    error = capfd.readouterr().err
    assert len(data.train) + len(data.test) == 8 and size == (32, 32)
    for name, reason in {"broken.jpg": "not an image that", "empty.png": "not an image that", "cut.png": "truncated",
                         "small.png": "60x31 is smaller than --size 32x32 (height x width)"}.items():
        assert re.search(rf"skipped {re.escape(f'{folder / name}: ')}.*{re.escape(reason)}", error)
    assert "<" not in re.sub("decoding.*", "", error)  # no Python object
    everything = np.concatenate([data.train[np.arange(7)], data.test[np.arange(1)]])
    deep = gray[..., 0]  # 16-bit: 257 times the value is the value
    assert (everything == deep[..., None]).all((1, 2, 3)).sum() == 1
    Image.new("RGBA", (1, 1), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.array_equal(commands.read_image(tmp_path / "clear.png"), [[[255] * 3]])
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright
    Image.fromarray(gray).convert("RGB").save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(commands.read_image(tmp_path / "turned.png"), np.rot90(gray[..., :3], -1))
    again, _ = commands.load_data(f"folder:{tmp_path / 'images'}", "data", (32, 32))  # from the cache
    assert np.array_equal(again.train[np.arange(7)], data.train[np.arange(7)])


def test_celeba_is_cropped_as_in_the_paper_and_split_by_a_fixed_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = np.indices((218, 178)).sum(0).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.stack([values] * 3, -1)).save(stream, "PNG")
    for part in range(2):  # JPEG would change the values
        with zipfile.ZipFile(tmp_path / f"part{part}.zip", "w") as archive:
            for i in range(part, 40, 2):
                archive.writestr(f"img_align_celeba/{i:06}.jpg", stream.getvalue())
    data, size = commands.load_data("celeba", tmp_path)
    assert size == (128, 128) and (len(data.train), len(data.test)) == (38, 2)
    assert np.array_equal(data.test[np.arange(1)][0, :, :, 0], values[50:178, 25:153])
    turned, damaged = tmp_path / "turned", bytearray(stream.getvalue())
    turned.mkdir()
    Image.fromarray(values.T).save(turned / "a.png")
    with pytest.raises(Problem, match=re.escape("a.png: 178x218 (height x width), expected CelebA's aligned 218x178")):
        commands.load_data("celeba", turned)
    damaged[len(damaged) // 2] ^= 255
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.writestr("damaged.png", bytes(stream.getvalue()))
    (tmp_path / "one.zip").write_bytes((tmp_path / "one.zip").read_bytes().replace(stream.getvalue(), damaged))
    with pytest.raises(Problem, match=re.escape(f"{tmp_path / 'one.zip'}/damaged.png: ")):
        commands.load_data(f"folder:{tmp_path / 'one.zip'}", "data")


def cifar_archive(path, images_per_file=10000):
    blob = np.zeros((images_per_file, 3073), np.uint8)
    blob[:, 1:] = np.arange(3072) % 251
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = blob.nbytes
            tar.addfile(info, io.BytesIO(blob.tobytes()))


def test_cifar10_is_downloaded_resumed_checked_and_read(tmp_path, monkeypatch):
    served = tmp_path / "server"
    served.mkdir()
    cifar_archive(served / "cifar.tar.gz")
    content = (served / "cifar.tar.gz").read_bytes()
    ranges = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            ranges.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : len(content) // 2] if len(ranges) == 1 else content[start:])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/cifar.tar.gz"
    folder = tmp_path / "data"
    try:
        monkeypatch.setattr(commands, "CIFAR10", dict(url=url, md5=hashlib.md5(content).hexdigest()))
        with pytest.raises(Problem, match="broke off|incomplete|IncompleteRead"):
            commands.load_data("cifar10", folder)
        assert not (folder / "cifar-10-binary.tar.gz").exists()
        data, _ = commands.load_data("cifar10", folder)
        assert ranges[0] == 0 and 0 < ranges[1] <= len(content) // 2 and len(ranges) == 2
        assert data.train.shape == (50000, 32, 32, 3) and data.test.shape == (10000, 32, 32, 3)
        assert data.train[0, 0, 1, 2] == (2 * 1024 + 1) % 251 and data.flip
        monkeypatch.setattr(commands, "CIFAR10", dict(url=url, md5="0" * 32))
        with pytest.raises(Problem, match="MD5"):
            commands.load_data("cifar10", tmp_path / "other")
        assert not list((tmp_path / "other").iterdir())
        monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"not HTTP\r\n\r\n"))
        with pytest.raises(Problem, match="run again"):
            commands.load_data("cifar10", tmp_path / "other")
    finally:
        server.shutdown()
    with tarfile.open(folder / "cifar-10-binary.tar.gz") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    for place in (folder / "cifar-10-binary.tar.gz", tmp_path / "unpacked", tmp_path / "unpacked/cifar-10-batches-bin"):
        found, _ = commands.load_data("cifar10", place)
        assert np.array_equal(found.train[:2], data.train[:2]) and found.test.shape == data.test.shape
    (folder / "cifar-10-binary.tar.gz").write_bytes(content[:5000])
    (place / "test_batch.bin").write_bytes(b"short")
    for place in (folder, tmp_path / "unpacked"):
        with pytest.raises(Problem, match="not the CIFAR-10"):
            commands.load_data("cifar10", place)


def test_npy_files_of_either_layout(tmp_path):
    array = np.random.default_rng(0).integers(256, size=(40, 8, 12, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", array.transpose(0, 3, 1, 2))
    a, size = commands.load_data(str(tmp_path / "a.npy"), "data")
    b, _ = commands.load_data(str(tmp_path / "b.npy"), "data")
    assert size == (8, 12) and np.array_equal(a.test[np.arange(2)], b.test[np.arange(2)])


# --------------------------------------------------------------------------- training, evaluation, command line

TRAIN = ["train", "--model", "pyramid", "--steps", "8", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def dropout_in_training():
    """The tiny preset has none; with it, a resumed run must also draw the same units."""
    before = pixelaux.PRESETS["tiny"]
    pixelaux.PRESETS["tiny"] = {**before, "dropout": 0.5}
    yield
    pixelaux.PRESETS["tiny"] = before


@pytest.fixture(scope="module")
def run(tmp_path_factory, dropout_in_training):
    """A short run that was not disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


def weights(run):
    return {f"{path.name} {k} {name}": value for path in sorted(run.glob("factor-*.pt"))
            for k, factor in torch.load(path, weights_only=True)["factors"].items() for name, value in factor.items()}


def assert_same_run(first, second):
    """The same weights, bit for bit, and the same records."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = ([{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
             for line in pixelaux.read_metrics(path)] for path in (first, second))
    assert a == b


def test_training_leaves_what_the_readme_says(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "factor-0.pt", "factor-1.pt", "samples.png", "curves.png"} <= names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["factor"] == 1] == list(range(1, 9))
    assert all(math.isfinite(line["bits_per_dim"]) for line in lines)
    with Image.open(run / "samples.png") as image:
        assert image.width > 400 and np.asarray(image).std() > 10
    assert not list(run.glob("part-*")) and not torch.backends.cudnn.benchmark  # as before the training


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_n_steps_equal_half_and_resume_bit_for_bit(run, tmp_path, monkeypatch, number):
    batch = pixelaux.Dataset.batch

    def interrupted(self, step, n, seed):
        if step == 4 and seed[1] == 1:
            os.kill(os.getpid(), number)
        return batch(self, step, n, seed)

    out = tmp_path / "halves"
    monkeypatch.setattr(pixelaux.Dataset, "batch", interrupted)
    assert main([*TRAIN, "--out", str(out)]) == 130
    monkeypatch.undo()
    assert torch.load(out / "factor-1.pt", weights_only=True)["training"]["step"] in (4, 5)  # batches are made ahead
    assert main(["train", "--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert_same_run(run, out)


def test_a_kill_in_the_middle_of_a_write_costs_nothing(run, tmp_path):
    out = tmp_path / "killed"
    assert main([*TRAIN, "--factor", "0", "--out", str(out)]) == 0
    (out / "part-1-factor-0.pt").write_bytes(b"half a checkpoint")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"factor": 1, "st')
    assert main(["train", "--resume", "--out", str(out), "--device", "cpu"]) == 0
    a, b = weights(run), weights(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_kills_at_random_moments_cost_nothing(run, tmp_path):
    """SIGKILL, once the child has begun to write: in a step, a checkpoint, a picture, wherever it happens to be."""
    out = tmp_path / "killed"
    out.mkdir()
    (out / "config.json").write_bytes((run / "config.json").read_bytes())
    code = """if True:
        import commands, os, pathlib, sys, time
        metrics = pathlib.Path(sys.argv[1], "metrics.jsonl")
        written = lambda: metrics.exists() and metrics.stat().st_mtime_ns
        for moment in sys.argv[2:]:
            before = written()
            if not (child := os.fork()):
                os._exit(commands.main(f"train --resume --device cpu --save-every 0.001 --out {sys.argv[1]}".split()))
            while written() == before and not os.waitpid(child, os.WNOHANG)[0]:
                time.sleep(0.002)
            time.sleep(float(moment))
            os.kill(child, 9)
            assert os.waitpid(child, 0)[1] == 9
        """
    moments = [f"{moment:.4f}" for moment in np.random.default_rng().uniform(0, 0.5, 3)]
    subprocess.run([sys.executable, "-c", code, str(out), *moments], cwd=HERE, check=True, capture_output=True)
    assert (out / "factor-0.pt").exists(), moments
    assert main(["train", "--resume", "--out", str(out), "--device", "cpu"]) == 0
    assert_same_run(run, out)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pixelaux.py"]
    return subprocess.Popen([*command, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    """Control: half of every batch alone ends elsewhere."""
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "dropout": 0.0})
    arguments = ["train", "--model", "pyramid", "--factor", "0", "--steps", "6", "--device", "cpu"]
    process = torchrun(*arguments, "--batch-size", "8", "--out", str(tmp_path / "two"))
    for n in (8, 4):
        assert main([*arguments, "--batch-size", str(n), "--out", str(tmp_path / f"one-{n}")]) == 0
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and text.count("factor 0 is in") == 1, text
    two, one, half = (weights(tmp_path / name) for name in ("two", "one-8", "one-4"))
    assert all(torch.allclose(two[name], one[name], atol=2e-4) for name in one)
    assert not all(torch.allclose(two[name], half[name], atol=2e-3) for name in one)
    for a, b in zip(*(pixelaux.read_metrics(tmp_path / name) for name in ("two", "one-8"))):
        assert a["bits_per_dim"] == pytest.approx(b["bits_per_dim"], rel=1e-4) and a["step"] == b["step"]
    command, = map(json.loads, (tmp_path / "two" / "commands.jsonl").read_text().splitlines())
    assert command["processes"] == 2 and "--batch-size 8" in command["command"]


def test_a_lost_process_ends_the_run_which_can_be_resumed(tmp_path):
    out = tmp_path / "lost"
    process = torchrun(*f"train --budget 5 --batch-size 2 --save-every 0.001 --device cpu --out {out}".split())
    while not (out / "factor-0.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    last = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(last), signal.SIGKILL)
    text = process.communicate(timeout=100)[0]
    assert process.returncode not in (0, None) and "SIGKILL" in text and "--resume goes on" in text, text
    before = torch.load(out / "factor-0.pt", weights_only=True)["training"]
    budget = str(before["seconds"] / 60 + 0.01)
    assert main(["train", "--resume", "--factor", "0", "--budget", budget, "--device", "cpu", "--out", str(out)]) == 0
    assert torch.load(out / "factor-0.pt", weights_only=True)["training"]["step"] > before["step"] > 0


def test_compiled_training_is_the_same_and_falls_back(run, tmp_path, monkeypatch, capsys):
    plain, calls = torch.compile, []
    arguments = [*TRAIN, "--factor", "0", "--compile"]
    monkeypatch.setattr(torch, "compile", lambda module, **_: calls.append(1) or plain(module, backend="aot_eager"))
    assert main([*arguments, "--out", str(tmp_path / "compiled")]) == 0 and calls
    monkeypatch.setattr(torch, "compile", lambda module, **options: plain(module, backend=lambda *_: 1 / 0))
    assert main([*arguments, "--out", str(tmp_path / "without")]) == 0
    assert capsys.readouterr().err.count("warning: training without torch.compile") == 1
    a, b, c = weights(run), weights(tmp_path / "compiled"), weights(tmp_path / "without")
    assert b.keys() == c.keys() <= a.keys() and all(torch.equal(a[name], c[name]) for name in c)
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in b)


def test_the_best_is_kept_and_survives_a_resume(run, tmp_path, monkeypatch):
    """The test images' cost is made to rise after the second time that it is measured."""
    for k in (0, 1):
        state = torch.load(run / f"factor-{k}.pt", weights_only=True)
        costs = [line["test_bits_per_dim"] for line in pixelaux.read_metrics(run)
                 if line["factor"] == k and "test_bits_per_dim" in line]
        assert state["training"]["best"] == min(costs)
        assert torch.load(run / f"best-{k}.pt", weights_only=True).keys() == state.keys() - {"training"}
    out, cost, write = tmp_path / "best", pixelaux.bits_per_dim, pixelaux.write_atomically
    given, written = iter([3.0, 2.0, 2.5, 2.7]), []
    monkeypatch.setattr(pixelaux, "write_atomically", lambda path, w: (written.append(path.name), write(path, w)))
    monkeypatch.setattr(pixelaux, "bits_per_dim", lambda nats, dims: next(given))
    batch = pixelaux.Dataset.batch
    monkeypatch.setattr(pixelaux.Dataset, "batch", lambda self, step, *rest: (
        os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None, batch(self, step, *rest))[1])
    assert main([*TRAIN, "--factor", "0", "--out", str(out)]) == 130
    monkeypatch.setattr(pixelaux.Dataset, "batch", batch)
    assert main(["train", "--resume", "--factor", "0", "--out", str(out), "--device", "cpu"]) == 0
    assert written.count("best-0.pt") == 2 and next(given, None) is None
    monkeypatch.setattr(pixelaux, "bits_per_dim", cost)
    (out / "factor-1.pt").write_bytes((run / "factor-1.pt").read_bytes())
    best = torch.load(out / "best-0.pt", weights_only=True)["factors"][0]
    best = {f"factor-0.pt 0 {name}": value for name, value in best.items()}
    (out / "best-1.pt").write_bytes((run / "best-1.pt").read_bytes())
    for path, which, expected in ((out, False, weights(out)), (out / "best-0.pt", False, best), (out, True, best)):
        loaded = pixelaux.load(path, best=which).factors[0].state_dict()
        assert all(torch.equal(loaded[name], expected[f"factor-0.pt 0 {name}"]) for name in loaded)
    assert not torch.equal(loaded["net.layers.0.convs.0.v"], weights(out)["factor-0.pt 0 net.layers.0.convs.0.v"])


def test_images_on_the_device_give_the_same_batches():
    array = np.random.default_rng(0).integers(256, size=(7, 4, 6, 3), dtype=np.uint8)
    data, other = (pixelaux.Dataset(commands.Subset(array, np.array([1, 2, 5, 6])), array[:1], flip=True) for _ in "ab")
    there = dataclasses.replace(other, train=torch.from_numpy(data.train[[0, 1, 2, 3]]))  # as keep_on leaves it
    stream = pixelaux.batches(there, 3, 5, (0, 1), torch.device("cpu"))
    for step in range(3, 9):
        assert torch.equal(next(stream), data.batch(step, 5, (0, 1)))


def test_bfloat16_keeps_float32_weights_and_costs_little(run, tmp_path):
    assert main([*TRAIN, "--factor", "0", "--precision", "bfloat16", "--out", str(tmp_path / "low")]) == 0
    low, high = (pixelaux.read_metrics(path)[7]["bits_per_dim"] for path in (tmp_path / "low", run))
    assert low != high and low == pytest.approx(high, abs=0.02)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "low").values())


def test_a_budget_ends_the_run_annealed_and_can_be_extended(tmp_path, monkeypatch):
    out = tmp_path / "budget"
    monkeypatch.setattr(commands, "show_progress", lambda *_: None)  # on a busy machine pictures take longer than that
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", {**pixelaux.PRESETS["tiny"], "anneal": False})
    arguments = f"train --model pixelcnn --size 12 --batch-size 2 --device cpu --out {out}".split()
    assert main([*arguments, "--steps", "3"]) == 0 and not json.loads((out / "config.json").read_text())["anneal"]
    assert main([*arguments, "--resume", "--budget", "0.05"]) == 0
    read = lambda: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = read()[-1]
    assert 2.8 < first["seconds"] < 30 and first["lr"] < 0.01 / 2 and "test_bits_per_dim" in first
    assert main([*arguments, "--resume", "--budget", str(first["seconds"] / 60 + 0.02)]) == 0
    assert read()[-1]["step"] > first["step"] and read()[-1]["seconds"] > first["seconds"] + 1.1


def test_the_average_of_the_weights_is_what_is_saved(tmp_path, monkeypatch):
    model = build("pyramid", 12, **dict(SMALL, scales=0), batch_size=2, steps=(3, 3), ema=0.7)
    data, seen = pixelaux.Dataset(None, Shapes((12, 12)).sample(4, [0]), shapes=Shapes((12, 12))), []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (step(self), seen.append(
        [p.detach().clone() for p in self.param_groups[0]["params"]]))[0])
    pixelaux.train_factor(model, 0, data, tmp_path, torch.device("cpu"))
    expected = [a * 0.49 + b * 0.21 + c * 0.3 for a, b, c in zip(*seen)]  # the first step is the start of the average
    saved = torch.load(tmp_path / "factor-0.pt", weights_only=True)["factors"][0]
    for (name, value), mean, last in zip(model.factors[0].named_parameters(), expected, seen[-1]):
        assert torch.allclose(saved[name], mean, atol=1e-6) and torch.equal(value, saved[name])
    assert not torch.equal(expected[0], seen[-1][0])


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = build("grayscale", 8, **dict(SMALL, dropout=0.5))
    x = images(2, model.shapes[0])
    model.initialise(x)
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            for a, b in zip(model.log_prob_factors(x), model.log_prob_factors(x)):
                assert torch.equal(a, b) != training
    embed = [conv.dropout for conv in model.factors[1].embed.modules() if isinstance(conv, Conv)]
    assert sorted(set(embed)) == [0, 0.5]


def test_inference_lets_go_of_activations_that_training_keeps(monkeypatch):
    net, seen, most = build("pyramid", 16, **dict(SMALL, nr_light=6)).factors[0].net, [], []
    finish = pixelaux.Layer.finish

    def finished(layer, y, residual):
        node = finish(layer, y, residual)
        seen.append(weakref.ref(node))
        most.append(sum(one() is not None for one in seen))
        return node

    monkeypatch.setattr(pixelaux.Layer, "finish", finished)
    for grad, least, at_most in ((False, 1, 4), (True, 12, 12)):
        seen.clear()
        most.clear()
        with torch.set_grad_enabled(grad):
            net(torch.ones(1, 4, 8, 8))
        assert len(seen) == 12 and least <= max(most) <= at_most


def test_training_runs_in_any_thread_and_restores_the_signals(tmp_path):
    before, done = signal.getsignal(signal.SIGINT), []
    line = f"train --model pyramid --steps 1 --batch-size 2 --factor 0 --device cpu --out {tmp_path}"
    thread = threading.Thread(target=lambda: done.append(main(line.split())))
    thread.start()
    thread.join()
    assert done == [0] and main([*line.split(), "--resume"]) == 0 and signal.getsignal(signal.SIGINT) is before


def test_factors_trained_apart_are_joined(run, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for k in (0, 1):
        assert main([*TRAIN, "--factor", str(k), "--out", str(parts[k])]) == 0
    assert main(["eval", str(parts[0]), "--n", "4"]) == 2  # factor 1 is missing
    (parts[0] / "factor-1.pt").write_bytes((parts[1] / "factor-1.pt").read_bytes())
    assert main(["train", "--factor", "0", "--device", "cpu", "--out", str(parts[1])]) == 0  # settings as there
    for part in parts:
        a, b = weights(run), weights(part)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for path in (parts[0], parts[0] / "factor-1.pt"):
        assert pixelaux.load(path).log_prob(images(2, (3, 16, 16))).isfinite().all()


def test_few_test_images_are_warned_of(tmp_path, monkeypatch, capsys):
    """Control: 32 of 640 images are enough."""
    monkeypatch.chdir(tmp_path)
    for n, warnings in ((639, 1), (640, 0)):
        np.save(f"{n}.npy", np.random.default_rng(0).integers(256, size=(n, 8, 8, 3), dtype=np.uint8))
        capsys.readouterr()
        assert main(shlex.split(f"train --model pixelcnn --factor 0 --steps 1 --data {n}.npy --device cpu")) == 0
        assert capsys.readouterr().err.count("pixelaux: warning: 31 test images only") == warnings
        assert pathlib.Path(f"runs/pixelcnn-{n}/factor-0.pt").exists()


def test_the_papers_schedule():
    data = pixelaux.Dataset(np.zeros((50000, 1, 1, 3), np.uint8), np.zeros((1, 1, 1, 3), np.uint8))
    config = build("grayscale", 32, "cifar10", nr_filters=2).config
    assert [pixelaux.training_steps(config, k, data) for k in (0, 1)] == [math.ceil(30 * 50000 / 64), 200 * 50000 // 64]
    assert (config.lr, config.lr_decay, config.dropout, config.batch_size) == (1e-3, 0.99999, 0.5, 64)
    config = build("pyramid", 128, "celeba", nr_filters=2).config
    assert [pixelaux.training_steps(config, k, data) for k in (0, 4)] == [60 * 50000 // 16] * 2
    assert (config.lr, config.lr_decay, pixelaux.PRESETS["celeba"]["nr_filters"]) == (1e-3, 0.999995, 100)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch, capsys):
    log_prob = LogisticMixture.log_prob
    calls = []

    def broken(self, x, bounds=None):
        calls.extend([1] * torch.is_grad_enabled())  # training steps alone
        return log_prob(self, x, bounds) * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(LogisticMixture, "log_prob", broken)
    assert main([*TRAIN, "--out", str(tmp_path / "nan")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 4" in error and "checkpoint" in error


def test_training_learns(tmp_path):
    model = build("pyramid", 8, **dict(SMALL, scales=0), batch_size=8, steps=(60, 60), ema=0.5)
    data = pixelaux.Dataset(None, Shapes((16, 16)).sample(32, [0])[:, ::2, ::2], shapes=None)
    data.shapes = type("Few", (), {"sample": lambda self, n, seed: Shapes((16, 16)).sample(n, seed)[:, ::2, ::2]})()
    before = float(pixelaux.evaluate(model, data.test)[0].mean())
    pixelaux.train_factor(model, 0, data, tmp_path, torch.device("cpu"))
    assert pixelaux.evaluate(model, data.test)[0].mean() > before + 100


def test_pictures_show_every_image_and_every_test_point(tmp_path, monkeypatch):
    levels = [images(3, (1, 4, 6), levels=16), images(3, (3, 8, 12)), images(3, (3, 16, 24))]
    commands.save_grid(levels, tmp_path / "few.png", tile=32)
    grid = np.array(Image.open(tmp_path / "few.png"))
    assert grid.shape == (3 * 36, 3 * 52, 3)  # a row for each level, as wide as there are images
    assert (grid[:, [0, 1, 50, 51, -1]] == 255).all() and (grid[[0, 1, 34, 35, -1]] == 255).all()
    for k, level in enumerate(levels):
        tile = grid[36 * k + 2 : 36 * k + 34, 54:102][:: 32 // level.shape[2], :: 32 // level.shape[2]]
        assert np.array_equal(tile, (level[1] * (17 if level.shape[1] == 1 else 1)).permute(1, 2, 0).expand(-1, -1, 3))
    commands.save_grid(levels, tmp_path / "more.png", columns=2, tile=32)
    more = np.array(Image.open(tmp_path / "more.png"))
    assert more.shape == (6 * 36, 2 * 52, 3) and np.array_equal(more[:108], grid[:, :104])
    assert np.array_equal(more[108:, :52], grid[:, 104:]) and (more[108:, 52:] == 255).all()

    lines = [dict(factor=0, step=step, seconds=3.0 * step, bits_per_dim=9 - step / 10) for step in range(1, 41)]
    lines[19]["test_bits_per_dim"], lines[39]["test_bits_per_dim"] = 30.0, 2.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from matplotlib.figure import Figure
    seen, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self.axes[0]), savefig(self, *a, **k)))
    commands.save_curves(tmp_path, ["8x8"])
    low, high = seen[0].get_ylim()
    assert low < 2 and high > 30 and (tmp_path / "curves.png").stat().st_size > 1000
    assert 2 <= seen[0].get_xlim()[1] < 2.2 and "minutes" in seen[0].get_xlabel()
    lines = [json.dumps({**line, "seconds": line["step"]}) + "\n" for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    commands.save_curves(tmp_path, ["8x8"])
    assert 40 <= seen[1].get_xlim()[1] < 44 and "seconds" in seen[1].get_xlabel()
    assert seen[0].get_title() == "factor 0: 8x8"


def test_evaluation_covers_every_image_and_prints_the_table(run, capsys):
    model = pixelaux.load(run)
    assert model.names == ["8x8", "16x16 | 8x8"]
    assert small("grayscale-pyramid", (16, 16)).names == ["gray 8x8", "gray 16x16 | gray 8x8", "16x16 | gray 16x16"]
    x = Shapes((16, 16)).sample(7, [9])
    bound, tight = pixelaux.evaluate(model, x, batch_size=3)
    with torch.no_grad():
        assert np.allclose(bound.sum(0), model.log_prob(pixelaux.to_tensor(x)), rtol=1e-5)
        assert np.allclose(tight.sum(0), model.log_prob(pixelaux.to_tensor(x), tight=True), rtol=1e-5)
    assert bound.shape == (2, 7) and (tight >= bound - 1e-3).all()
    capsys.readouterr()
    assert main(["eval", str(run), "--n", "5", "--device", "cpu"]) == 0
    text, result = capsys.readouterr().out, json.loads((run / "eval-5.json").read_text())
    assert "true p(X)" in text and "decodes" in text and result["images"] == 5
    rows = result["factors"]
    assert sum(row["bound_of_x"] for row in rows) == pytest.approx(result["bound"])
    assert rows[0]["bound_cumulative"] == pytest.approx(rows[0]["bound_of_x"] * 4)  # 8x8: a quarter of the sub-pixels
    assert rows[0]["exact_own"] == rows[0]["exact_cumulative"] and rows[1]["exact_own"] == rows[1]["exact_of_x"]
    assert rows[1]["bound_cumulative"] == pytest.approx(result["bound"])
    assert result["bound_interval"][0] <= result["bound"] <= result["bound_interval"][1]
    assert result["bound_excess_bits"] == pytest.approx((result["bound"] - result["true"]) * 768, rel=1e-6)


def test_sample_command_writes_the_images_of_the_api(run, tmp_path):
    out = tmp_path / "pictures" / "s"
    assert main(["sample", str(run), "--n", "3", "--seed", "5", "--out", str(out), "--device", "cpu"]) == 0
    arrays = np.load(f"{out}.npz")
    expected = pixelaux.load(run).sample(3, seed=5)
    for i, level in enumerate(expected[::-1]):
        assert np.array_equal(arrays[f"level{i}"], level.permute(0, 2, 3, 1))
    given = tmp_path / "given.npy"
    np.save(given, arrays["level1"])
    for source, how in ((str(given), ["--mode", "map"]), ("test", ["--shift", "-1"])):
        assert main(["sample", str(run), "--n", "3", "--given", source, *how, "--tight",
                     "--out", str(out), "--device", "cpu"]) == 0
        again = np.load(f"{out}.npz")
        half = Half()(torch.from_numpy(again["level0"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert np.array_equal(half, again["level1"])
        assert source == "test" or np.array_equal(again["level1"], arrays["level1"])


def test_exported_weights_make_the_same_model_in_a_small_file(run, tmp_path):
    file = tmp_path / "weights.pt"
    assert main(["export", str(run), str(file)]) == 0
    assert file.stat().st_size < sum(path.stat().st_size for path in run.glob("factor-*.pt")) / 6
    before, after = pixelaux.load(run), pixelaux.load(file)
    for a, b in zip(before.parameters(), after.parameters()):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)
    assert all(map(torch.equal, after.parameters(), pixelaux.load(tmp_path).parameters()))  # a folder with nothing else
    assert main(["sample", str(file), "--n", "1", "--device", "cpu", "--out", str(tmp_path / "s")]) == 0


def test_given_images_are_reduced_to_the_level_that_is_asked_for(tmp_path):
    model, x = build("pyramid", 32), images(3, (3, 32, 32))
    np.save(tmp_path / "x.npy", x)
    for level, size in ((None, 16), (1, 16), (2, 8)):
        args = argparse.Namespace(given=str(tmp_path / "x.npy"), n=2, level=level)
        reduced = commands.given_images(args, model)
        assert torch.equal(reduced, model.levels_of(x[:2])[-1 - (level or 1)]) and reduced.shape[2] == size
        np.save(tmp_path / "reduced.npy", reduced)
    args = argparse.Namespace(given=str(tmp_path / "reduced.npy"), n=2, level=None)
    assert torch.equal(commands.given_images(args, model), reduced)
    with pytest.raises(Problem, match="is a level already"):
        commands.given_images(argparse.Namespace(**{**vars(args), "level": 1}), model)


def test_errors_name_the_file_and_not_its_unfinished_part(monkeypatch, capsys):
    def full(args):
        raise OSError(28, "No space left on device", "runs/part-123-factor-0.pt")

    monkeypatch.setattr(commands, "command_bench", full)
    assert main(["bench", "train"]) == 2
    assert capsys.readouterr().err == "pixelaux: runs/factor-0.pt: No space left on device\n"


def test_results_of_other_weights_and_data_have_names_of_their_own(run, tmp_path):
    for path in [*run.glob("*.pt"), run / "config.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "eval.json").write_text("the run's own")
    np.save(tmp_path / "mine.npy", np.zeros((40, 16, 16, 3), np.uint8))
    cpu = ["--device", "cpu"]
    for arguments, name in ((["--best", "--n", "9999"], "eval-best.json"), (["--n", "2"], "eval-2.json"),
                            (["--data", str(tmp_path / "mine.npy")], "eval-mine.json")):
        assert main(["eval", str(tmp_path), *arguments, *cpu]) == 0
        assert json.loads((tmp_path / name).read_text())["images"] > 0
    assert main(["eval", str(tmp_path / "best-0.pt"), *cpu]) == 0 and (tmp_path / "eval-best-0.json").exists()
    assert main(["sample", str(tmp_path), "--best", "--n", "1", *cpu]) == 0
    assert main(["sample", str(tmp_path), "--given", "test", "--level", "1", "--n", "1", *cpu]) == 0
    assert main(["sample", str(tmp_path), "--out", str(tmp_path / "mine.png"), "--n", "1", *cpu]) == 0
    assert {path.name for path in tmp_path.glob("*.npz")} == {
        "sample-random-0-best.npz", "sample-random-0-given-test-level1.npz", "mine.npz"}
    assert (tmp_path / "eval.json").read_text() == "the run's own"


def test_training_starts_from_exported_weights(run, tmp_path, capsys):
    file, out = tmp_path / "small.pt", tmp_path / "more"
    assert main(["export", str(run), str(file)]) == 0
    tiny = [*TRAIN, "--steps", "1", "--lr", "1e-12", "--out"]
    assert main([*tiny, str(out), "--start", str(file)]) == 0
    for a, b in zip(pixelaux.load(file).parameters(), pixelaux.load(out).parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    (out / "factor-1.pt").unlink()  # a resumed run starts there, too
    assert main(["train", "--resume", "--device", "cpu", "--out", str(out)]) == 0
    for a, b in zip(pixelaux.load(file).parameters(), pixelaux.load(out).parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert main([*tiny, str(tmp_path / "fresh")]) == 0  # the control: weights of their own
    differ = [not torch.allclose(a, b, atol=1e-6) for a, b in
              zip(pixelaux.load(file).parameters(), pixelaux.load(tmp_path / "fresh").parameters())]
    assert np.mean(differ) > 0.9
    capsys.readouterr()
    assert main([*tiny, str(tmp_path / "other"), "--model", "pixelcnn", "--start", str(file)]) == 2
    assert f"--start: {file} is of another model: model pyramid, not pixelcnn" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_training_that_starts_with_weights_does_not_ruin_them(tmp_path):
    """Control: from random weights it costs more."""
    line = f"train --model pyramid --size 12 --device cpu --out {tmp_path}/"
    costs = []
    for more in ("first --steps 150", f"second --steps 12 --start {tmp_path}/first", "third --steps 12"):
        assert main((line + more).split()) == 0
        records = pixelaux.read_metrics(tmp_path / more.split()[0])
        costs.append([r[key] for r in records for key in ("bits_per_dim", "test_bits_per_dim") if key in r])
    records = pixelaux.read_metrics(tmp_path / "second")
    rates = [0.01 * (1 - step / 12) * (step + 1) / 200 for step in range(12)]  # annealed, and 200 steps of warm-up
    assert np.allclose([record["lr"] for record in records], rates)
    first, second, third = costs
    assert max(second) < second[0] + 0.2 and second[-1] < first[-1] + 0.02 and third[-1] > first[-1] + 0.2


def test_compress_and_decompress_commands(run, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(256, size=(16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :16, 0]).save(tmp_path / "b.png")
    Image.fromarray(pixels[:, :16]).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(pixels[:7]).save(tmp_path / "odd.png")
    for name in ("text.png", "foreign.pxa"):
        (tmp_path / name).write_text("hello")
    header = bytes([0, 0, 0, 2, 0, 0, 0, 1, 16, 2, 0, 0, 0])  # width, height, bits, RGB
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(13)), b"IEND"]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks))
    assert commands.read_image(tmp_path / "deep.png").shape == (1, 2, 3)  # 16-bit RGB, which Pillow cuts to 8
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    frames = [Image.fromarray(pixels), Image.fromarray(pixels[::-1])]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    files, out, back = [str(tmp_path / n) for n in ("a.png", "b.png")], tmp_path / "out", tmp_path / "back"
    bars, bar_of = [], commands.bar_of
    monkeypatch.setattr(commands, "bar_of", lambda **options: bars.append(bar_of(**options)) or bars[-1])
    assert main(["compress", str(run), *files, "--out", str(out)]) == 0
    assert [(bar.n, bar.total) for bar in bars] == [(640, 640), (320, 320)]
    assert main(["decompress", str(run), str(out / "a.pxa"), str(out / "b.pxa"), "--out", str(back)]) == 0
    assert np.array_equal(np.array(Image.open(back / "a.png")), pixels)
    assert np.array_equal(np.array(Image.open(back / "b.png")), np.repeat(pixels[:, :16, :1], 3, 2))
    before = (out / "a.pxa").read_bytes()
    for arguments, expected in [
        (["compress", str(run), files[0], "--out", str(out)], "exists"),
        (["compress", str(run), "gone.png"], "gone.png"),
        (["compress", str(run), str(tmp_path / "alpha.png")], "RGBA"),
        (["compress", str(run), str(tmp_path / "odd.png")], "multiples of"),
        (["compress", str(run), str(tmp_path / "text.png")], "text.png: not an image"),
        (["compress", str(run), str(tmp_path / "cut.png")], "truncated"),
        (["compress", str(run), str(tmp_path / "deep.png")], "expected one image of 8-bit"),
        (["compress", str(run), str(tmp_path / "moving.png")], "expected one image"),
        (["compress", str(run), files[0], str(tmp_path / "alpha.png")], "RGBA"),  # before the first is written
        (["compress", str(run), files[0], os.path.relpath(files[0])], "another of the files"),
        (["compress", str(run), files[0], "--out", files[1]], "is a file, expected a folder"),
        (["decompress", str(run), files[0]], "expected a .pxa file"),
        (["decompress", str(run), str(tmp_path / "foreign.pxa")], "not a .pxa file"),
        (["decompress", str(run), str(tmp_path / "gone.pxa")], "gone.pxa"),
    ]:
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error, arguments
    assert (out / "a.pxa").read_bytes() == before and [*tmp_path.glob("*.pxa")] == [tmp_path / "foreign.pxa"]


def test_coded_evaluation_counts_real_bits(run, capsys):
    assert main(["eval", str(run), "--n", "6", "--coded", "4", "--device", "cpu"]) == 0
    text, result = capsys.readouterr().out, json.loads((run / "eval-6.json").read_text())["coded"]
    assert "4 images coded and restored" in text and "PNG" in text and "WebP" in text
    assert result["ideal"] < result["coded"] <= 1.001 * result["ideal"] + 64 / 768
    one = np.zeros((5, 8, 8, 3), np.uint8)
    single, mosaic = len(commands.image_file(one[:1])), len(commands.image_file(one, 3))
    Image.fromarray(one[0]).save(buffer := io.BytesIO(), "PNG")
    assert single == buffer.tell() < mosaic < 5 * single
    for x in Shapes((16, 16)).sample(512, [0, 20170806])[:4]:  # the test images
        Image.fromarray(x).save(buffer := io.BytesIO(), "PNG", optimize=True)
        result["PNG"][0] -= 8 * buffer.tell() / (4 * 768)
    assert abs(result["PNG"][0]) < 1e-9


def test_bad_input_is_one_line_and_status_2(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = (run / "factor-0.pt").read_bytes()
    for folder in ("mixed", "nothing", "odd", "weights"):
        pathlib.Path(folder).mkdir()
    assert main(shlex.split("train --model pixelcnn --steps 1 --batch-size 2 --out pc")) == 0
    for name, content in {"cut.pt": first[:3000], "foreign.pt": b"hello", "bad.npy": b"no array", "file": b"",
                          "odd/config.json": b'{"surprise": 1}', "mixed/factor-0.pt": first, "half.zip": b"PK",
                          "mixed/factor-1.pt": pathlib.Path("pc/factor-0.pt").read_bytes(),
                          "weights/factor-0.pt": (run / "best-0.pt").read_bytes(),
                          "weights/config.json": (run / "config.json").read_bytes()}.items():
        pathlib.Path(name).write_bytes(content)
    torch.save({"weights": 1}, "other.pt")
    torch.save(dict(format="pixelaux", version=pixelaux.VERSION, config={}, factors=3), "shape.pt")
    torch.save(dict(format="pixelaux", version=pixelaux.VERSION, factors={}), "part.pt")
    torch.save({**torch.load(run / "factor-0.pt", weights_only=True), "version": 999}, "version.pt")
    np.save("float.npy", np.zeros((9, 8, 8, 3)))
    np.save("good.npy", np.zeros((9, 8, 8, 3), np.uint8))
    np.save("tall.npy", np.zeros((9, 9, 8, 3), np.uint8))
    with open("pack.npy", "wb") as file:
        np.savez(file, np.zeros((9, 8, 8, 3), np.uint8))
    for line, expected in [
        ("train --model nonsense", "nonsense"), ("train --preset huge", "huge"), ("train --nonsense", "--nonsense"),
        ("nonsense", "nonsense"), ("", "required"), ("train --data nonsense", "nonsense"),
        ("train --steps 0", "--steps"), ("train --steps 1.5", "whole number"), ("train --seed -1", "--seed"),
        (f"train --seed {'9' * 30}", "--seed"), ("train --lr nan", "--lr"), ("train --size 12y", "--size"),
        ("train --size 8x8x8", "HEIGHTxWIDTH"), ("train --device cuda:77", "--device"),
        ("train --factor 5", "--factor"),
        ("train --budget 1,2,3", "2 factors"),
        ("train --budget 1,-2", "--budget"), ("train --precision int8", "int8"),
        ("train --save-every 0", "--save-every"), (f"train --resume --out {run} --precision bfloat16", "precision"),
        ("train --size 18", "multiples of"), ("train --size 18 --data folder:nothing", "multiples of"),
        ("train --size 4", "--size"), ("train --data cifar10 --size 16", "32x32"),
        ("train --data folder:none", "none: No such file"), ("train --data folder:nothing", "no image files"),
        ("train --data folder:half.zip", "half.zip: File is not a zip file"),
        ("train --data celeba --data-dir nothing", "img_align_celeba.zip"), ("train --data float.npy", "float64"),
        ("train --data bad.npy", "bad.npy"), ("train --data gone.npy", "gone.npy"),
        ("train --data good.npy --size 64", "are 8x8 (height"), ("train --resume --out odd", "not a configuration"),
        (f"train --out {run}", "already holds a run"), ("train --resume --out x", "no run"),
        (f"train --out {run} --factor 1", "already holds factor 1; --resume goes on"),
        ("train --out weights --factor 1 --lr 3", "--lr: weights was begun with 0.01, not 3.0"),
        (f"train --out {run} --resume --steps 9", f"--steps: {run} was begun with (8, 8), not (9, 9)"),
        ("train --out weights --resume --device cpu", "cannot go on from this"),
        (f"train --resume --out {run} --model grayscale", "pyramid"), ("train --out file/run", "file"),
        ("eval gone", "gone"), ("eval nothing", "no such checkpoint"), ("eval cut.pt", "cut.pt"),
        ("eval foreign.pt", "foreign.pt"), ("eval other.pt", "other.pt"), ("eval version.pt", "999"),
        ("eval mixed", "another model"), (f"sample {run} --given gone.png", "gone.png: No such file"),
        (f"sample {run} --given bad.npy --device cpu", "bad.npy: not a .npy file"),
        (f"sample {run} --given file", "file: not an image"), (f"sample {run} --level 1", "--level: goes with --given"),
        (f"sample {run} --given tall.npy", "--given tall.npy: 9x8x3, expected 16x16x3 or 8x8x3 (height x width x"),
        (f"sample {run} --given test --level 9", "--level"), (f"sample {run} --given test --level 0", "--level"),
        (f"export {run} nothing", "nothing: a folder, expected a checkpoint"),
        ("train --data pack.npy", "pack.npy: not a .npy file"), ("bench", "{train,sample}"),
        ("eval gone --modle", "eval --help"), (f"sample {run} --mode best", "best"),
        (f"sample {run} --n -1", "--n"), (f"sample {run} --mode map --shift -1", "--shift"),
        (f"compress {run} a.png --seed 1", "--seed"), ("eval shape.pt", "shape.pt"), ("eval part.pt", "part.pt"),
        ("train --budget 1,inf", "--budget"), (f"sample {run} --shift nan", "--shift"), ("train --start ''", "--start"),
        (f"eval {run}/best-0.pt --best", "--best"), ("eval weights --best", "best-0.pt"),
        ("train --data folder:", "folder"), (f"export {run} bad.npy", "bad.npy: not a pixelaux checkpoint"),
        ("bench sample --precision bfloat16", "--precision"),
        (f"export {run} {run}/factor-0.pt", "factor-0.pt: a checkpoint of training"),
        ("train --start foreign.pt --steps 1", "foreign.pt"),
        (f"eval {run} --data cifar10", "CIFAR-10 images are 32x32 (height x width), not 16x16"),
        (f"eval {run} --data good.npy", "the images of good.npy are 8x8 (height x width), not 16x16"),
    ]:
        capsys.readouterr()
        never = ["--out", "never"] if line.startswith("train") and "--out" not in line else []
        try:
            status = main([*shlex.split(line), *never])
        except SystemExit as exit:
            status = exit.code
        error = capsys.readouterr().err
        lines = [text for text in error.replace("\r", "\n").splitlines() if text.startswith("pixelaux: ")]
        assert status == 2 and len(lines) == 1 and expected in lines[0], (line, status, error)
        assert "Traceback" not in error and not pathlib.Path("never").exists(), line


def test_a_full_disk_is_one_line_and_leaves_the_old_file(run, tmp_path, capsys):
    """A limit on the size of files acts as a disk that is full after 100 kB."""
    resource = pytest.importorskip("resource")
    before, checkpoint = resource.getrlimit(resource.RLIMIT_FSIZE), (run / "factor-0.pt").read_bytes()
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError):
            pixelaux.write_atomically(run / "factor-0.pt", lambda file: file.write(bytes(200_000)))
        status = main([*TRAIN, "--out", str(tmp_path / "full")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert status == 2 and error[-1].startswith("pixelaux: ") and "File too large" in error[-1]
    assert (run / "factor-0.pt").read_bytes() == checkpoint
    assert not list(run.glob("part-*")) and not list((tmp_path / "full").glob("*.pt"))


def test_reproduce_resumes_what_was_interrupted_and_skips_what_is_finished(run, tmp_path):
    """With a stand-in for python that notes its arguments and makes the files; the table with python itself."""
    stub, log, out = tmp_path / "python", tmp_path / "log", tmp_path / "runs" / "smoke"
    stub.write_text(f"""#!/usr/bin/env bash
        echo "$*" >> {log}
        [ ! -e {tmp_path}/stop-$2 ] || exit 130
        mkdir -p {out}; touch {out}/config.json
        case "$*" in *eval*) touch {out}/eval.json ;; *map*) touch {out}/sample-map-0.npz ;;
          *sample*) touch {out}/sample-random-0.npz ;; esac""")
    stub.chmod(0o755)

    def reproduce(*arguments, stop="", **env):
        log.write_text("")
        (tmp_path / f"stop-{stop}").touch()
        result = subprocess.run(["bash", str(HERE / "reproduce.sh"), *arguments], capture_output=True, text=True, env={
            **os.environ, "PYTHON": str(stub), "RUNS": str(tmp_path / "runs"), **env})
        (tmp_path / f"stop-{stop}").unlink()
        assert result.returncode == (130 if stop else 0), result.stderr
        return result.stdout, [line.split()[1] for line in log.read_text().splitlines()], log.read_text()

    assert reproduce("smoke", stop="train")[1] == ["train"]
    out.mkdir(parents=True)
    (out / "config.json").touch()  # as far as it came
    assert "--resume" in reproduce("smoke", stop="eval")[2]
    assert reproduce("smoke")[1] == ["eval", "sample", "sample"]
    assert reproduce("smoke")[1] == []
    made = reproduce("smoke", "--budget", "2", NPROC="4")[2].splitlines()
    assert "torch.distributed.run" in made[0] and "--nproc_per_node=4" in made[0] and "--budget 2 --resume" in made[0]
    assert len(made) == 4 and "map" in made[3]
    assert main(["eval", str(run), "--n", "3", "--device", "cpu"]) == 0
    for name, file in {"eval.json": "eval-3.json", "commands.jsonl": "commands.jsonl",
                       "metrics.jsonl": "metrics.jsonl"}.items():
        (out / name).write_bytes((run / file).read_bytes())
    row = reproduce("table", PYTHON=sys.executable)[0].splitlines()[2]
    bound = json.loads((run / "eval-3.json").read_text())["bound"]
    assert f"{bound:.4f}" in row and torch.__version__ in row and "| 3 |" in row


def test_reproduce_half_an_hour_and_files_in_parts(tmp_path):
    """With a stand-in for python that notes its arguments and makes what it is asked for."""
    stub, log, name = tmp_path / "python", tmp_path / "log", tmp_path / "runs" / "half-hour-cifar10-grayscale"
    stub.write_text(f"""#!/usr/bin/env bash
        echo "$*" >> {log}
        mkdir -p {name}
        [ $2 != export ] || head -c 2500000 /dev/urandom > {name}/weights.pt
        [ $2 != bench ] || echo some numbers""")
    stub.chmod(0o755)

    def reproduce(*arguments, **env):
        result = subprocess.run(["bash", str(HERE / "reproduce.sh"), *arguments], capture_output=True, text=True, env={
            **os.environ, "PYTHON": str(stub), "RUNS": str(tmp_path / "runs"), **env})
        return result.returncode, result.stderr

    assert reproduce("benchmarks", "cifar10-grayscale") == (0, "") and "--size 32" in log.read_text()
    log.unlink()
    (name / "bench-sample.txt").unlink()
    assert reproduce("half-hour", "cifar10-grayscale", "--seed", "3", PART="1", MINUTES="10") == (0, "")
    ran = log.read_text().splitlines()
    assert [line.split()[1] for line in ran] == ["train", "eval", "sample", "sample", "export", "bench"]
    assert tarfile.open(name / "records.tgz").getmember("./bench-train.txt").size > 13
    status, _ = reproduce("benchmarks", "cifar10-grayscale", PRESET="tiny")  # other arguments: again
    assert status == 0 and "bench train --model grayscale --preset tiny" in (name / "bench-train.txt").read_text()
    assert "--model grayscale" in ran[0] and "--budget 2.5,7.5 --seed 3" in ran[0]
    status, message = reproduce("half-hour", "celeba")
    assert status == 2 and "celeba-pyramid" in message
    weights, parts = (name / "weights.pt").read_bytes(), sorted((name / "parts").glob("part.*"))
    assert len(parts) == 3 and all(part.stat().st_size <= 2**20 for part in parts)
    (name / "weights.pt").unlink()
    assert reproduce("unpack", str(name / "parts"))[0] == 0 and (name / "weights.pt").read_bytes() == weights
    (name / "weights.pt").unlink()
    parts[1].write_bytes(b"x" + parts[1].read_bytes()[1:])
    status, message = reproduce("unpack", str(name / "parts"))
    assert status != 0 and "part.ab" in message and not (name / "weights.pt").exists()


def test_importing_needs_torch_and_numpy_alone():
    code = ("import sys; sys.modules.update(dict.fromkeys(['PIL', 'tqdm', 'matplotlib', 'constriction']));"
            "import pixelaux; print(pixelaux.build('pyramid', 16).dims)")
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.stdout.strip() == "768", result.stderr


def test_the_method_needs_no_other_file(tmp_path):
    """Train, sample and evaluate with pixelaux.py alone in a folder; its command line then says what is missing."""
    shutil.copy(HERE / "pixelaux.py", tmp_path)
    code = """if True:
        import dataclasses, pathlib, torch
        from pixelaux import Dataset, Shapes, PixelAux, build, evaluate, load, train_factor, to_tensor
        shapes, out, device = Shapes((16, 16)), pathlib.Path("run"), torch.device("cpu")
        data = Dataset(None, shapes.sample(4, 1), shapes=shapes)
        model, shown = build("pyramid", 16, nr_filters=4, batch_size=2, steps=(2, 2)), []
        for k in range(2):
            train_factor(model, k, data, out, device, show=lambda: shown.append(k))
        assert shown == [0, 1]  # of the quarters, one step meets the second, the other the last
        bound, tight = evaluate(load(out), data.test)
        assert bound.shape == (2, 4) and (tight >= bound).all()
        assert [len(level) for level in load(out).sample(2)] == [2, 2]
        """
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (tmp_path / "pixelaux.py").rename(tmp_path / "mine.py")  # whatever its name, and wherever Python looks for modules
    for lines, arguments, expected in ((1, "train", "commands.py"), (1, "train --modle x", "train --help"),
                                       (1, "sample gone", "gone: no such checkpoint"), (None, "train --help", "")):
        result = subprocess.run([sys.executable, "-P", "mine.py", *arguments.split()], cwd=tmp_path, text=True,
                                capture_output=True)
        assert result.returncode == (2 if lines else 0), result.stderr
        assert expected in result.stderr and result.stderr.count("\n") == (lines or 0), result.stderr
        shutil.copy(HERE / "commands.py", tmp_path)


def test_what_is_not_torchruns_environment_is_ignored():
    """Control: what torchrun sets is taken."""
    code = "import pixelaux; print(pixelaux.RANK, pixelaux.LOCAL_RANK, pixelaux.RANKS)"
    torchruns = {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    for environment, expected in (({"RANK": "gold", "WORLD_SIZE": "4"}, "0 0 1"), (torchruns, "2 1 4")):
        result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                                env={**os.environ, **environment})
        assert result.stdout.strip() == expected, result.stderr


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].replace("$WEIGHTS", "runs/pyramid-cifar10").strip()
             for block in blocks for line in block.splitlines()]
    return [line for line in lines if "python pixelaux.py" in line]


def test_the_commands_of_the_readme_run(run, tmp_path, monkeypatch):
    """Each, with its sizes and steps made small; data sets replaced by a few made images of their size."""
    monkeypatch.chdir(tmp_path)
    lines, made = readme_commands(), np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
    assert len(lines) >= 8
    shutil.copytree(HERE / "results", "results")
    load_data = commands.load_data

    def replaced(spec, folder, size=None):
        if spec in ("cifar10", "celeba") or spec.startswith("folder:"):
            return pixelaux.Dataset(made, made[:4], flip=True), (32, 32)
        return load_data(spec, folder, size)

    monkeypatch.setattr(commands, "load_data", replaced)
    for line in lines:
        arguments = shlex.split(line[line.index("pixelaux.py") :])[1:]
        if arguments[0] == "train":
            small_run = [] if "--resume" in arguments else ["--steps", "2", "--batch-size", "2", "--preset", "tiny"]
            dropped = ("--steps", "--batch-size", "--preset", "--budget", "--size")
            keep = [a for a, before in zip(arguments, ["", *arguments]) if not {a, before} & {*dropped}]
            arguments = [a for a in keep if a != "--compile"] + small_run
        elif arguments[0] == "bench":
            arguments += ["--preset", "tiny", "--batch-size", "1", "--size", "16"]
        elif arguments[0] in ("eval", "sample"):
            assert pathlib.Path(arguments[1]).exists(), f"no earlier command of the README makes {arguments[1]}"
            arguments += ["--n", "2"]
        elif arguments[0] == "compress":
            pathlib.Path(arguments[2]).parent.mkdir()
            Image.fromarray(made[0]).save(arguments[2])
        assert main(arguments) == 0, line
    assert np.array_equal(np.array(Image.open("restored/picture.png")), made[0])
