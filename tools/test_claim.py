"""Properties of tools/split.py and tools/claim.py.

Each test is headed by the property that it proves and compares with an oracle that shares no code
with what it checks.
"""
import functools
import itertools
import json
import math
import re
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pixelaux
from pixelaux import Gray, Half
from tools import claim, split

torch.set_num_threads(1)
DATA, _ = pixelaux.load_data("shapes")
FEW = DATA.test[:24]


def small(name, **changes):
    """A model of random weights, small."""
    model = pixelaux.build(name, 16, nr_filters=4, nr_logistic_mix=2, **changes)
    model.initialise(pixelaux.to_tensor(DATA.test[24:40]))
    return model


@functools.cache
def truth_of(name):
    """It depends on the chain alone, not on the weights."""
    return split.Truth(DATA.shapes, small(name), FEW)


# --- The truth ---


@pytest.mark.parametrize("name", pixelaux.MODELS)
def test_truths_of_a_chains_factors_add_up_to_the_known_probability(name):
    truth = truth_of(name)
    np.testing.assert_allclose(truth.log_level.sum(0), DATA.shapes.log_prob(FEW), atol=1e-8)
    if name == "pyramid":
        half = (FEW.reshape(-1, 8, 2, 8, 2, 3).sum((2, 4)) + 2) // 4
        np.testing.assert_allclose(
            truth.log_level[0], DATA.shapes.log_prob_half(half), atol=1e-8)
    if name == "pixelcnn":  # control: noise that is a little different is found out
        other = pixelaux.Shapes(DATA.shapes.size)
        other.pmf = other.pmf**1.01 / (other.pmf**1.01).sum()
        log_level = split.Truth(other, small(name), FEW).log_level.sum(0)
        assert abs(log_level - DATA.shapes.log_prob(FEW)).min() > 1e-4


def test_where_classes_are_clean_levels_the_truths_shape_bits_are_the_configurations():
    for name in ("pyramid", "grayscale", "pixelcnn"):
        bits = -truth_of(name).log_class / math.log(2)
        log_configurations = DATA.shapes.log_count / math.log(2)
        if name == "pyramid":  # 1296 configurations: mask and colours, then one of six weaves
            np.testing.assert_allclose(bits[0], math.log2(1296 / 6), atol=1e-6)
            np.testing.assert_allclose(bits[1], math.log2(6), atol=1e-6)
        elif name == "grayscale":  # a gray image leaves no doubt; and it is not split
            assert abs(bits[0]).max() < 1e-9 and abs(bits[1]).max() < 1e-3
        else:  # noise may tell 122 from 133
            assert bits[0].std() > 0.1 and abs(bits[0].mean() - log_configurations) < 0.5


def tiny_view(rng, kind):
    """(psi, size, levels, channels) of a view so small that all its images can be enumerated."""
    if kind == "gray":
        return Gray(3, 16), (1, 1), 16, 3
    if kind == "half":
        return Half(1, 5), (2, 2), 5, 1
    return None, (1, 2), 3, 3


@pytest.mark.parametrize("kind", ["half", "gray", "alone"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_the_truth_is_what_enumeration_of_all_images_says(kind, seed):
    rng = np.random.default_rng(seed)
    psi, (height, width), levels, channels = tiny_view(rng, kind)
    pmf = rng.random((18, width, width, channels, levels))
    pmf *= rng.random(pmf.shape) < 0.6
    pmf[..., 0] += 0.1
    pmf /= pmf.sum(-1, keepdims=True)
    pmf[4:] = pmf[0]
    cells = rng.integers(4, size=(4, 1, 1))  # of 4 configurations; a cell is of one kind
    kinds = cells.repeat(height, 1).repeat(width, 2)
    prior = rng.dirichlet(np.ones(4))
    edges = [np.array([0, 2, 3, levels])] * channels

    # All images, and their probability with each configuration.
    shape = (channels, height, width)
    places = list(itertools.product(range(height), range(width), range(channels)))
    images = np.array(list(itertools.product(range(levels), repeat=len(places))))
    joint = np.ones((4, len(images)))
    for c in range(4):
        for i, (row, column, channel) in enumerate(places):
            joint[c] *= pmf[kinds[c, row, column], row, column, channel, images[:, i]]
    x = np.zeros((len(images), *shape), np.uint8)
    for i, (row, column, channel) in enumerate(places):
        x[:, channel, row, column] = images[:, i]
    x_hat = np.zeros_like(x)
    if psi is not None:
        x_hat = psi(torch.from_numpy(x)).numpy()
    drawn = rng.choice(len(images), p=prior @ joint, size=1)[0]
    same = (x_hat == x_hat[drawn]).all((1, 2, 3))
    joint = prior[:, None] * joint * same
    posterior = joint.sum(1, keepdims=True) / joint.sum()

    given_x_hat = joint.sum(0)
    log_class = log_level = 0.0
    before = same
    for i in range(len(places)):
        cut = np.digitize(images[:, i], edges[0][1:-1])
        whole = given_x_hat[before].sum()
        log_class += math.log(given_x_hat[before & (cut == cut[drawn])].sum() / whole)
        before = before & (images[:, i] == images[drawn, i])
        log_level += math.log(given_x_hat[before].sum() / whole)

    one = slice(drawn, drawn + 1)
    kept = posterior.T.copy()
    got = split.true_view(psi, pmf, edges, kinds, x[one], x_hat[one], kept)
    np.testing.assert_allclose(got, [[log_class], [log_level]], atol=1e-9)
    np.testing.assert_allclose(kept[0], joint[:, drawn] / joint[:, drawn].sum(), atol=1e-9)


# --- Classes ---


def test_bounded_noise_never_leaves_its_class_and_the_classes_tell_the_six_clean_pixels_apart():
    shapes, pyramid = DATA.shapes, small("pyramid")
    half, full = split.pmfs_of(shapes, pyramid.views)
    for pmf, clean in ((full, shapes.values), (half, shapes.palette)):
        edges = split.class_edges(pmf, shapes.farthest)
        told = set()
        for pixel in clean:
            ends = []
            for noise in (-shapes.farthest, 0, shapes.farthest):
                x = (pixel + noise).astype(np.uint8).reshape(1, 3, 1, 1)
                lo, hi = split.class_bounds(x, edges)
                assert (lo <= x).all() and (x <= hi).all()
                ends.append((*lo.flatten(), *hi.flatten()))
            assert len(set(ends)) == 1
            told.add(ends[0])
        assert len(told) == len(clean)
    # Control: with every clean level in a class of its own, noise does leave it.
    edges = split.class_edges(full, 1)
    x = np.full((1, 3, 1, 1), 122, np.uint8)
    assert (split.class_bounds(x + 8, edges)[0] != split.class_bounds(x, edges)[0]).all()


def test_gray_views_are_not_split():
    views = small("grayscale-pyramid").views
    pmfs = split.pmfs_of(DATA.shapes, views)
    assert [len(split.class_edges(pmf, 40)[0]) for pmf in pmfs] == [2, 2, 4]
    for pmf in pmfs:
        np.testing.assert_allclose(pmf.sum(-1), 1.0, atol=1e-9)


def test_a_pyramid_of_two_halves_is_refused():
    views = pixelaux.make_views(pixelaux.make_config(model="pyramid", size=(32, 32)))
    with pytest.raises(pixelaux.Problem, match="at most one Half.*32x32"):
        split.pmfs_of(DATA.shapes, views)


# --- The model ---


def mixture_pmf(params, before, levels=256):
    """PixelCNN++'s pmf of the next channel of one pixel: params (10 K,), before: its levels."""
    k, c = len(params) // 10, len(before)
    weights = np.exp(params[:k] - params[:k].max())
    by_channel = params[k:].reshape(3, 3, k)
    unit = [2 * level / (levels - 1) - 1 for level in before]

    def masses(channel):
        means, scales = by_channel[channel, 0].copy(), by_channel[channel, 1].clip(-7, 7)
        for j in range(channel):
            means = means + np.tanh(by_channel[channel - 1 + j, 2]) * unit[j]
        right = (2 * np.arange(levels - 1) + 1) / (levels - 1) - 1
        cdf = 1 / (1 + np.exp(-(right[:, None] - means) / np.exp(scales)))
        return np.diff(np.pad(cdf, [(1, 1), (0, 0)], constant_values=((0, 1), (0, 0))), axis=0)

    for channel in range(c):
        weights = weights * masses(channel)[before[channel]]
    return masses(c) @ weights / weights.sum()


@pytest.mark.parametrize("name", ["pixelcnn", "grayscale", "pyramid"])
def test_a_models_class_has_the_probability_of_all_its_levels_together(name):
    model = small(name).double()
    factor, (x, x_hat) = model.factors[-1], model.pairs(pixelaux.to_tensor(FEW[:1]))[-1]
    edges = [np.array([0, 81, 174, 256])] * 3
    with torch.no_grad():
        log_class, log_level = split.class_and_level(factor, x, x_hat, edges)
        params = factor.params(x, factor.embeddings(x_hat))[0].numpy()
    lo, hi = np.zeros((3, 16, 16), int), np.full((3, 16, 16), 255)
    if x_hat is not None:
        lo, hi = (bound[0].numpy() for bound in factor.view.psi.bounds(x, x_hat))
    of_class = of_level = 0.0
    for channel, row, column in np.ndindex(3, 16, 16):
        levels = x[0, :, row, column].tolist()
        pmf = mixture_pmf(params[:, row, column], levels[:channel])
        pmf[: lo[channel, row, column]] = 0.0
        pmf[hi[channel, row, column] + 1 :] = 0.0
        number = np.digitize(np.arange(256), [81, 174])
        of_class += math.log(pmf[number == number[levels[channel]]].sum() / pmf.sum())
        of_level += math.log(pmf[levels[channel]] / pmf.sum())
    np.testing.assert_allclose([log_class[0], log_level[0]], [of_class, of_level], atol=1e-4)
    assert of_class > of_level + 100  # or there would be nothing to tell apart


@pytest.mark.parametrize("name", pixelaux.MODELS)
def test_the_parts_are_the_whole_excess_and_none_is_below_zero_on_average(name):
    model = small(name)
    parts = truth_of(name).parts(model)
    exact = pixelaux.evaluate(model, FEW)[1].sum(0)
    whole = (DATA.shapes.log_prob(FEW) - exact) / math.log(2)
    np.testing.assert_allclose(sum(parts.values()), whole, atol=0.02)
    assert (parts["gray view"] == 0).all() == ("gray" not in name)
    for part, bits in parts.items():
        assert bits.mean() > 0 or (part == "gray view" and "gray" not in name)


# --- The command ---


def test_all_models_have_about_as_many_parameters_and_all_names():
    numbers = []
    for name in pixelaux.MODELS:
        with torch.device("meta"):
            model = claim.new_model(name, DATA)
        numbers.append(sum(weight.numel() for weight in model.parameters()))
    assert max(numbers) < 1.1 * min(numbers)
    assert list(claim.FILTERS) == list(pixelaux.MODELS)


@given(best=st.floats(-3, 3), width=st.floats(0.5, 3))
@settings(max_examples=30, deadline=None)
def test_the_learning_rate_is_the_best_of_all_that_are_near_it(best, width):
    def bits(rate):
        return abs(math.log2(rate / 2e-2) - best) * width

    asked = []

    def run_at(rate):
        asked.append(rate)
        return dict(validation_bits=bits(rate))

    rate = claim.best_rate(run_at)
    assert bits(rate) <= min(bits(rate / 2), bits(rate * 2)) and rate in asked
    assert len(asked) == len(set(asked)) <= 3 + math.ceil(abs(best)) + 1
    if 0 <= best <= 1:
        assert len(asked) == 3  # what is announced


def test_a_rate_at_which_the_loss_is_not_finite_is_worse_than_all(capsys):
    def run_at(rate):
        if rate > 1e-2:
            raise pixelaux.Failure("the loss is not finite")
        return dict(validation_bits=-math.log2(rate))

    assert claim.best_rate(run_at) == 1e-2
    assert "not finite" in capsys.readouterr().err


@pytest.fixture
def toy(monkeypatch):
    """Small models, few images, and no clock: each step takes as many seconds as it is told."""
    monkeypatch.setattr(claim, "FILTERS", {"pixelcnn": 2, "pyramid": 2})
    monkeypatch.setattr(claim, "SAMPLES", 3)
    monkeypatch.setattr(claim, "VALIDATION", 4)
    monkeypatch.setattr(claim, "RATES", (2.56, 1.28))  # the best of so few steps
    data = types.SimpleNamespace(**{**vars(DATA), "test": FEW[:4]})
    data.batch = DATA.batch
    monkeypatch.setattr(claim, "load_data", lambda spec: (data, (16, 16)))
    cost = dict(zip(claim.FILTERS, (2.0, 3.0)))
    monkeypatch.setattr(claim, "step_seconds", lambda data: cost)


def test_claim_gives_each_model_equal_time_and_a_second_call_trains_nothing(
        toy, tmp_path, monkeypatch, capsys):
    """Every run is of full length, those by which rates are chosen as well, and each is measured.
    The best rate of seed 0 is that of all seeds."""
    argv = ["claim", "--out", str(tmp_path), "--seconds", "12", "--seeds", "2"]
    assert pixelaux.main(argv) == 0
    error, table = capsys.readouterr().err, (tmp_path / "claim.md").read_text()
    first, *later = re.findall(r"(\d+) of about (\d+) runs done, some (\d+) min", error)
    assert first == ("0", "8", str(math.ceil(8 * (12 + claim.MEASURING) / 60)))
    results = json.loads((tmp_path / "claim.json").read_text())
    runs = results["runs"]
    assert [int(done) for done, _, _ in later] == list(range(len(runs)))
    assert results["steps"] == dict(zip(claim.FILTERS, (6, 4)))
    assert all(run["steps"] == results["steps"][run["model"]] for run in runs.values())
    for run in list(runs.values())[::3]:
        name, seed, rate = run["model"], run["seed"], run["rate"]
        model = pixelaux.load(tmp_path / "runs" / f"{name}-rate-{rate:g}-seed-{seed}")
        assert model.config.steps == (run["steps"],) and model.config.lr == rate
        excess = DATA.shapes.log_prob(FEW[:4]) - pixelaux.evaluate(model, FEW[:4])[1].sum(0)
        parts = [run["counts"][part] for part in ("shape", "gray view", "texture")]
        assert sum(parts) == pytest.approx(excess.mean() / math.log(2), abs=0.1)
        samples = pixelaux.to_array(model.sample(3, seed, tight=True)[-1])
        share = (abs(DATA.shapes.noise_of(samples)) <= DATA.shapes.farthest).mean((1, 2, 3))
        assert run["counts"]["98%"] == pytest.approx(100 * (share >= 0.98).mean())
    for name in claim.FILTERS:
        of_model = [run for run in runs.values() if run["model"] == name]
        best = min((run for run in of_model if run["seed"] == 0),
                   key=lambda run: run["validation_bits"])
        assert [run["rate"] for run in of_model if run["seed"] == 1] == [best["rate"]]
        tried = sorted({run["rate"] for run in of_model})
        assert len(tried) >= 3
        assert f"| {best['rate']:g} ({', '.join(f'{rate:g}' for rate in tried)}) |" in table
    seconds = sum(run["cpu_seconds"] + run["measuring"] for run in runs.values())
    assert f"{len(runs)} runs, {seconds / 60:.0f} minutes of CPU time in all" in table

    def no_training(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(claim, "train_factor", no_training)
    (tmp_path / "claim.md").unlink()
    assert pixelaux.main(argv) == 0
    assert (tmp_path / "claim.md").read_text() == table
    assert f"{len(runs)} of about {len(runs)} runs done, some 0 min" in capsys.readouterr().err
    # Control: one run less, and it would train.
    runs.popitem()
    (tmp_path / "claim.json").write_text(json.dumps(results))
    with pytest.raises(AssertionError, match="trained again"):
        pixelaux.main(argv)


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(2, 4), st.data())
def test_what_is_to_go_is_what_the_search_and_the_seeds_will_take(more, seeds, data):
    """Of a command that tries so many rates of each model, and stands somewhere."""
    order = []
    for name, rates in zip(claim.FILTERS, more):
        order += [(name, 0.01 * 2**i, 0) for i in range(rates + 2)]  # three or more
        order += [(name, 0.01, seed) for seed in range(1, seeds)]
    done = data.draw(st.integers(0, len(order)))
    runs = {}
    for name, rate, seed in order[:done]:
        runs[f"{name} {rate} {seed}"] = dict(
            model=name, rate=rate, seed=seed, cpu_seconds=50.0, measuring=10.0)
    told = claim.to_go(dict(seconds=110.0 - claim.MEASURING, runs=runs), seeds)
    made, total, minutes = map(int, re.match(r"(\d+) of about (\d+) .* (\d+) min", told).groups())
    assert made == done and total <= len(order)
    if more == [1] * 4 or done == len(order):
        assert total == len(order)
    assert minutes == math.ceil((total - made) * (60 if done else 110) / 60)


def canned(values):
    """Runs of three seeds whose excess of shape is `values`."""
    runs = {}
    for name in claim.FILTERS:
        runs[name] = []
        for seed, value in enumerate(values):
            counts = {"shape": value, "gray view": 0.0, "texture": 10.0}
            counts |= {"98%": 50.0, "95..98%": 20.0}
            runs[name].append(dict(
                model=name, rate=0.01, seed=seed, steps=7, cpu_seconds=99.0, parameters=1000,
                measuring=33.0, counts=counts, images=4, samples=3))
    return runs


def test_the_table_has_means_of_seeds_with_students_interval(tmp_path):
    values = [1.0, 2.0, 4.5]
    results = dict(command="x", hardware="y", torch="z", python="3", seconds=1.0, steps={})
    results["runs"] = dict(enumerate(sum(canned(values).values(), [])))
    text = claim.table(results, canned(values))
    assert "\n12 runs, 26 minutes of CPU time in all, 20 of them training.\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    # By hand: mean 2.5, standard deviation 1.803, over sqrt 3 and times 4.303: 4.479.
    assert all("| 2.50 ± 4.48 (1.00, 2.00, 4.50) | – | 10.0 ± 0.0" in row for row in rows)
    assert all("| 12.5 ± 4.5" in row and "| 50.0 ± 0.0" in row for row in rows)
    assert all("| 70.0 ± 0.0" in row for row in rows)
    for n, t in claim.STUDENT.items():  # the integral of Student's density over -t .. t is 0.95
        grid = np.linspace(-t, t, 400_001)
        density = (1 + grid**2 / (n - 1)) ** (-n / 2)
        norm = math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt(math.pi * (n - 1))
        area = norm * np.trapezoid(density, grid)
        assert area == pytest.approx(0.95, abs=1e-4)
    claim.save_figure(tmp_path / "claim.png", canned(values))
    assert (tmp_path / "claim.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content, flags, named", [
    (None, ["--seeds", "1"], "--seeds"),
    (None, ["--seconds", "0"], "--seconds"),
    ("{}", [], "claim.json"),
    ("[", [], "claim.json"),
    ('{"seconds": 3, "steps": {}, "runs": {}}', ["--seconds", "4"], "--seconds"),
    ('{"seconds": 100, "steps": {}, "runs": {"old": {}}}', [], "claim.json"),
])
def test_bad_input_gets_one_line_that_names_it(toy, tmp_path, capsys, content, flags, named):
    if content is not None:
        (tmp_path / "claim.json").write_text(content)
    try:
        status = pixelaux.main(["claim", "--out", str(tmp_path), *flags])
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and named in error
