"""What pixelaux promises, tried on the weights of a run. Command check RUN.

causal, normalised, fast = naive, psi(sample) = x_hat, coded = likelihood: one line each.
"""
import contextlib
import copy
import dataclasses
import importlib.util
import math

import torch

from pixelaux import Half, PixelAux, Problem, evaluating, load, tool


def answers(run):
    """Of the weights of a run or checkpoint, as it comes: (name of a promise, "OK", "FAILS" or,
    where it cannot be tried, "-", what was found)."""
    model = load(run)
    small = reduced(model)
    print(f"{run}, at {small.views[-1].name} in float64 unless said otherwise:")
    with evaluating(small):
        views = small.sample(1 if is_large(model) else 2, tight=True, fast=False)
        for name, check in CHECKS.items():
            try:
                holds, found = check(model if check is consistent else small, views)
            except Problem as error:  # the fast sampler refuses a network that is not causal
                holds, found = False, str(error)
            yield name, VERDICTS[holds], found


VERDICTS = {True: "OK", False: "FAILS", None: "-"}


# --- Promises: (model, images of all its views) -> (does it hold, what was found) --------------


def is_large(model):
    """Whether a pass takes so long that there must be fewer of them."""
    return sum(weights.numel() for weights in model.parameters()) > 10_000_000


def reduced(model):
    """The same weights in float64, for smaller images if they fit: naive sampling takes a pass of
    the network for every pixel."""
    config = model.config
    halvings = sum(isinstance(view.psi, Half) for view in model.views)
    sides = (8, 16, 32, 64) if is_large(model) else (16, 32, 64)
    sizes = [(side, side) for side in sides if side < min(config.size)]
    for size in [*sizes, config.size]:
        with contextlib.suppress(Problem):  # it does not fit
            small = PixelAux(dataclasses.replace(config, size=size, halvings=halvings))
            break
    small.load_state_dict(model.state_dict())
    return small.double().eval()


def causal(model, views):
    """All outputs see every earlier pixel within reach, and neither their own nor a later one. (In
    float32, in half the time: what is not seen has a gradient of exactly 0.)"""
    sights, model, outputs = tool("sight"), copy.deepcopy(model).float(), 0
    for name, factor, x_hat in zip(model.names, model.factors, [None, *views]):
        embeddings = [each[:1] for each in factor.embeddings(x_hat)]

        def network(x):
            """Of x (N, C, H, W), which need not be levels, and their plane of ones."""
            planes = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            return factor.net(planes, [each.expand(len(x), -1, -1, -1) for each in embeddings])

        with torch.enable_grad():
            sight = sights.Sight(network, factor.view.shape, dtype=factor.a_weight.dtype)
            for _, verdict, found in sights.answers(sight):
                if verdict != "OK":
                    return False, f"{name}: {found.splitlines()[0]}"
        outputs += sight.pixels
    return True, (f"{outputs:,} outputs of {len(views)} networks see every earlier pixel within "
                  "reach, and no other")


def normalised(model, views):
    """The masses of all levels of a sub-pixel, given those before it, sum to 1; and so do those
    that are left by x_hat."""
    found = []
    for factor, x, x_hat in zip(model.factors, views, [None, *views]):
        params = some(factor.params(x, factor.embeddings(x_hat)))
        every = torch.zeros_like(some(x)), torch.full_like(some(x), factor.view.levels - 1)
        found += deviations(factor, params, some(x), every)
        if x_hat is not None:
            left = [some(bound) for bound in factor.view.psi.bounds(x, x_hat)]
            found += deviations(factor, params, some(x), left)
        head = factor.head(params)
        found.append(torch.expm1(head.log_prob(some(x)) - head.log_prob(some(x), every)))
    worst = max(float(each.abs().max()) for each in found)
    return worst < 1e-9, f"the masses of all levels sum to 1 within {worst:.1e}"


def some(images, most=64):
    """At most that many of the pixels of images (N, C, H, W): (1, C, 1, n)."""
    pixels = images.transpose(0, 1).flatten(1)
    chosen = torch.linspace(0, pixels.shape[1] - 1, min(most, pixels.shape[1])).long()
    return pixels[None, :, None, chosen]


def deviations(factor, params, x, bounds):
    """For each channel, (1, n): the sum over the masses of its levels within bounds, given the
    channels before, minus 1.

    If those after it have intervals of one level, log_prob is that of the channels up to it.
    """
    x, lo, hi = x.long(), bounds[0].long(), bounds[1].long()
    level = torch.arange(factor.view.levels).view(-1, 1, 1, 1)
    head = factor.head(params.expand(len(level), -1, -1, -1))
    before, found = torch.zeros(()), []
    for c in range(x.shape[1]):
        tried = x.repeat(len(level), 1, 1, 1)
        tried[:, c : c + 1] = level
        least, most = tried.clone(), tried.clone()
        least[:, : c + 1], most[:, : c + 1] = lo[:, : c + 1], hi[:, : c + 1]
        log_masses = head.log_prob(tried, (least, most))  # (levels, 1, n)
        outside = (level[..., 0] < lo[:, c]) | (level[..., 0] > hi[:, c])
        total = log_masses.masked_fill(outside, -torch.inf).logsumexp(0)
        found.append(torch.expm1(total - before))
        before = log_masses.gather(0, x[:, c])[0]
    return found


def fast_is_naive(model, views):
    """The fast sampler draws what a pass of the network for every pixel draws."""
    fast = model.sample(len(views[0]), tight=True)
    differ = sum(int((one != other).sum()) for one, other in zip(fast, views))
    of = sum(view.numel() for view in views)
    return differ == 0, f"{differ} of {of:,} sub-pixels of {len(views[0])} samples differ"


def consistent(model, views):
    """psi of a tight sample is the view that it was sampled for; as the run has its weights."""
    samples, differ, of = model.sample(4, tight=True), 0, 0
    for view, x_hat, x in zip(model.views[1:], samples, samples[1:]):
        differ += int((view.psi(x) != x_hat).sum())
        of += x_hat.numel()
    size = model.views[-1].name
    if len(samples) == 1:
        return True, "X has no view in this model"
    return differ == 0, f"{differ} of {of:,} sub-pixels of views differ, at {size} in float32"


def coded(model, views):
    """Images are restored bit for bit from as many bits as the likelihood says.

    The probabilities that a coder is told multiply to p(image), but for rounding in float64. From
    each image's the range coder makes integers of 24 bits (some 2e-5 bits a sub-pixel), and whole
    words, two of them to end with: 64 bits. Fewer bits than -log2 p by 64 have, for an image that
    the model has drawn, a probability of 2^-64 with whatever code.
    """
    codec, x, worst = tool("codec"), views[-1], 0.0
    if importlib.util.find_spec("constriction") is None:
        return None, "not tried, as the package constriction is missing: pip install constriction"
    for tight in (False, True):
        bits = -model.log_prob(x, tight) / math.log(2)
        ideal = torch.tensor(codec.ideal_bits(model, x, tight), dtype=torch.float64)
        worst = max(worst, float((ideal / bits - 1).abs().max()))
    # These bits are the exact likelihood's, by which `compress` codes.
    words = codec.compress(model, x)
    restored = int((codec.decompress(model, words) == x).flatten(1).all(1).sum())
    spent = torch.tensor([32.0 * len(of_image) for of_image in words])
    near = bool(((spent - bits).abs() <= 64).all())
    return worst < 1e-9 and near and restored == len(x), (
        f"{restored} of {len(x)} images restored from {int(spent.sum()):,} bits, -log2 p(X) = "
        f"{float(bits.sum()):,.1f}; the pmfs that are coded give p(X) within {worst:.1e}")


CHECKS = {
    "causal": causal,
    "normalised": normalised,
    "fast = naive": fast_is_naive,
    "psi(sample) = x_hat": consistent,
    "coded = likelihood": coded,
}
