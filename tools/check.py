"""Is a network causal, and does a run's model hold what it promises? Command check.

    check RUN           what this program promises, tried on the weights of a run
    check FILE.py:NAME  a network of one's own: does it see all that comes before, and no more?

What "sees", "within reach" and "blind spot" mean is told at the top of tools/sight.py.
"""
import contextlib
import copy
import dataclasses
import importlib.util
import pathlib
import sys
import traceback

import torch
from torch import nn

from pixelaux import (
    PATH, YES, Failure, Half, Parser, PixelAux, Problem, checked, evaluating, load, sample_fast,
    tool)


def main(argv):
    """check RUN, or check FILE.py:NAME. Raises Failure if something does not hold."""
    parser = Parser(prog="pixelaux.py check", description="Does a run's model hold what it "
                    "promises? Or: is a network of one's own causal, and blind nowhere?")
    parser.add_argument("what", metavar="RUN|FILE.py:NAME", help="a run or a checkpoint; or a "
                        "module, a class that is built without arguments, or a function: x (N, C, "
                        "H, W) -> parameters (N, P, H, W)")
    own = parser.add_argument_group("for FILE.py:NAME")
    own.add_argument("--shape", type=SHAPE, metavar="CxHxW", help="of x (default: 3x16x16)")
    own.add_argument("--channel-order", help="the P parameters are C equal groups, and group c may "
                     "see the channels before c of its own pixel", **YES)
    own.add_argument("--out", type=PATH, metavar="FILE.png", help="for a picture of the receptive "
                     "field (default: NAME-receptive-field.png)")
    args = parser.parse_args(argv[1:])
    file, _, name = args.what.rpartition(":")
    if args.what.endswith(".py"):
        raise Problem(f"{args.what}: expected FILE.py:NAME, the network's name in the file")
    if file.endswith(".py"):
        check_network(file, name, args)
    elif args.shape or args.channel_order or args.out:
        raise Problem("--shape, --channel-order and --out go with FILE.py:NAME, not with a run")
    else:
        check_run(PATH(args.what))


SHAPE = checked(lambda text: tuple(map(int, text.split("x"))), "CxHxW, from 1x1x1 to 64x64x64",
                lambda value: len(value) == 3 and 1 <= min(value) and max(value) <= 64)


def show(answers, what):
    """Lines for each (name of a check, does it hold, what was found), as it comes. Raises Failure
    if one does not hold."""
    failed = []
    for name, holds, found in answers:
        found = found.replace("\n", "\n" + 35 * " ")
        print(f"{name:<27} {'OK   ' if holds else 'FAILS'}  {found}", flush=True)
        if not holds:
            failed.append(name)
    if failed:
        raise Failure(f"{what} fails: {', '.join(failed)}")


# --- A network of one's own --------------------------------------------------------------------


def check_network(file, name, args):
    """The network `name` in `file`. Raises Failure, or Problem."""
    sights, shape, order = tool("sight"), args.shape or (3, 16, 16), bool(args.channel_order)
    what, out = f"{pathlib.Path(file).name}:{name}", args.out or f"{name}-receptive-field.png"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network, dtype = fitting(network_in(file, name), file, shape, order)
        with blaming(file, "its gradients"):
            sight = sights.Sight(network, shape, order, dtype)
            answers = sights.answers(sight)
        if not sight.seen.any():
            raise Problem(f"{file}: no gradient leads from any output to any pixel: is the input "
                          "rounded, or looked up in a table?")
        try:
            show(answers, what)
        finally:
            sights.save_picture(sight, answers, what, out)
            print(f"{out}: what an output sees")


@contextlib.contextmanager
def blaming(file, doing):
    """What is raised in here is the mistake of the user's file: one line, as a Problem."""
    try:
        yield
    except Problem:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        name = pathlib.Path(file).name
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename.endswith(name)]
        place, text = "".join([str(file), *lines[-1:]]), " ".join(str(error).split())
        raise Problem(f"{place}: {doing}: {type(error).__name__}: {text}") from None


def network_in(file, name):
    """What FILE.py calls NAME; a class is built. Raises Problem."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise Problem(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(f"checked {path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    sys.path.insert(0, str(path.parent))  # for what lies beside the file
    try:
        with blaming(file, "cannot be imported"):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    network = getattr(module, name, None)
    if not callable(network):
        raise Problem(f"{file}: expected a module, a class or a function {name!r} there")
    if isinstance(network, type):
        with blaming(file, f"{name}() cannot be built without arguments"):
            network = network()
    return network.eval() if isinstance(network, nn.Module) else network


def fitting(network, file, shape, order):
    """(the network, raising Problem where something is wrong with its outputs; its dtype: float64
    if it takes that)."""

    def called(x):
        with blaming(file, f"of an input {tuple(x.shape)}"):
            y = network(x)
        got = tuple(y.shape) if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        if len(got) != 4 or got[0] != len(x) or got[2:] != shape[1:]:
            raise Problem(f"{file}: expected ({len(x)}, P, {shape[1]}, {shape[2]}), got {got}")
        if order and got[1] % shape[0]:
            raise Problem(f"--channel-order: {shape[0]} equal groups cannot be made of {got[1]} "
                          "parameters")
        if not y.isfinite().all():
            raise Problem(f"{file}: {int((~y.isfinite()).sum())} outputs are not finite numbers")
        if x.requires_grad and not y.requires_grad:
            raise Problem(f"{file}: no gradient leads from the outputs to the input: is it "
                          "detached, rounded, under no_grad, or not used?")
        return y

    for dtype in (torch.float64, torch.float32):
        if isinstance(network, nn.Module):
            network.to(dtype=dtype)
        try:
            called(torch.zeros(2, *shape, dtype=dtype))
            return called, dtype
        except Problem:
            if dtype == torch.float32:
                raise


# --- A run -------------------------------------------------------------------------------------


def check_run(run):
    """What pixelaux promises, for the weights of a run or checkpoint. Raises Failure."""
    model = load(run)
    small = reduced(model)
    print(f"{run}, at {small.views[-1].name} in float64 unless said otherwise:")
    with evaluating(small):
        show(answers_of(model, small), run)


def answers_of(model, small):
    """What `show` takes. A check: (model, images of all its views) -> (does it hold, found)."""
    views = small.sample(1 if is_large(model) else 2, tight=True, fast=False)
    for name, check in CHECKS.items():
        try:
            yield name, *check(model if check is consistent else small, views)
        except Problem as error:  # the fast sampler refuses a network that is not causal
            yield name, False, str(error)


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
    return tool("sight").of_model(copy.deepcopy(model).float(), views)


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


class Given:
    """In place of Draw: draws the pixels of given images x, and adds up their log-probabilities."""

    def __init__(self, x):
        self.x, self.log_prob = x, torch.zeros(len(x), dtype=torch.float64)

    def __call__(self, head, rows, columns, interval_of):
        pixels = self.x[:, :, rows, columns].transpose(1, 2).flatten(0, 1)[:, :, None, None]
        intervals = None
        if interval_of is not None:
            channels = list(pixels.long().split(1, 1))
            of_channels = [interval_of(channels[:c]) for c in range(len(channels))]
            intervals = [torch.cat(ends, 1) for ends in zip(*of_channels)]
        self.log_prob += head.log_prob(pixels, intervals).view(len(self.x), -1).sum(1)
        return pixels.long()


def likelihood(model, views):
    """What a sampler, or a coder in its place, is told of an image's pixels is the likelihood."""
    worst = 0.0
    for tight in (False, True):
        told = 0.0
        for factor, x, x_hat in zip(model.factors, views, [None, *views]):
            given = Given(x)
            sample_fast(factor, len(x), x_hat, given, tight and x_hat is not None)
            told = told + given.log_prob
        nats = model.log_prob(views[-1], tight)
        worst = max(worst, float((told / nats - 1).abs().max()))
    return worst < 1e-9, f"largest relative difference of log p(image): {worst:.1e}"


CHECKS = {
    "causal": causal,
    "normalised": normalised,
    "fast = naive": fast_is_naive,
    "psi(sample) = x_hat": consistent,
    "sampler's pmfs = likelihood": likelihood,
}
