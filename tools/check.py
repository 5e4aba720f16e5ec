"""Is a network causal, and does a run's model hold what it promises? Command check.

    check RUN           what this program promises, tried on the weights of a run (promises.py)
    check FILE.py:NAME  a network of one's own: does it see all that comes before, and no more?

What "sees", "within reach" and "blind spot" mean is told at the top of tools/sight.py.
"""
import contextlib
import functools
import importlib.util
import inspect
import pathlib
import sys
import textwrap
import traceback

import torch
from torch import nn

from pixelaux import (
    PATH, YES, Failure, Parser, Problem, checked, tool, write_atomically)


def main(argv):
    """check RUN, or check FILE.py:NAME. Raises Failure if something does not hold."""
    parser = Parser(prog="pixelaux.py check", description="Does a run's model hold what it "
                    "promises? Or: is a network of one's own causal, and blind nowhere?")
    parser.add_argument("what", metavar="RUN|FILE.py:NAME", help="a run or a checkpoint; or a "
                        "module, a function, or what makes one without arguments: x (N, C, H, W) "
                        "-> parameters (N, P, H, W) or, of each channel, (N, P, C, H, W)")
    own = parser.add_argument_group("for FILE.py:NAME")
    own.add_argument("--shape", type=SHAPE, metavar="CxHxW", help="of x (default: "
                     "3x16x16). Blind spots show if it is twice as high and wide as outputs see")
    own.add_argument("--channel-order", help="each channel's parameters see the channels before it "
                     "in its own pixel. Of (N, P, H, W), P is C contiguous groups, first all "
                     "parameters of channel 0; in another order, return (N, P, C, H, W), which may "
                     "see these in any case, and by this flag must", **YES)
    own.add_argument("--blind-spot-ok", help="a blind spot, earlier pixels above and to the right "
                     "that a single stack of masks ignores, is told but is no failure", **YES)
    own.add_argument("--out", type=PATH, metavar="FILE.png", help="for a picture of the receptive "
                     "field (default: NAME-receptive-field.png)")
    args = parser.parse_args(argv[1:])
    file, _, name = args.what.rpartition(":")
    if args.what.endswith(".py"):
        raise Problem(f"{args.what}: expected FILE.py:NAME, the network's name in the file")
    if file.endswith(".py"):
        check_network(file, name, args)
    elif args.shape or args.channel_order or args.blind_spot_ok or args.out:
        raise Problem("--shape, --channel-order, --blind-spot-ok and --out go with FILE.py:NAME, "
                      "not with a run")
    else:
        run = PATH(args.what)
        show(tool("promises").answers(run), run)


SHAPE = checked(lambda text: tuple(map(int, text.split("x"))), "CxHxW, from 1x1x1 to 64x64x64",
                lambda value: len(value) == 3 and 1 <= min(value) and max(value) <= 64)


def show(answers, what, passing=("OK", "-")):
    """Lines for each (name of a check, verdict, what was found), as it comes. Raises Failure if
    a verdict is not among those that pass."""
    failed = []
    for name, verdict, found in answers:
        found = found.replace("\n", "\n" + 35 * " ")
        print(f"{name:<27} {verdict:<5}  {found}", flush=True)
        if verdict not in passing:
            failed.append(name)
    if failed:
        raise Failure(f"{what} fails: {', '.join(failed)}")


# --- A network of one's own --------------------------------------------------------------------


def check_network(file, name, args):
    """The network `name` in `file`. Raises Failure, or Problem."""
    sights, shape, claimed = tool("sight"), args.shape or (3, 16, 16), bool(args.channel_order)
    passing = ("OK", "BLIND") if args.blind_spot_ok else ("OK",)
    what, out = f"{pathlib.Path(file).name}:{name}", args.out or f"{name}-receptive-field.png"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network, dtype, order = fitting(network_in(file, name), file, shape, claimed)
        with blaming(file, "its gradients"):
            sight = sights.Sight(network, shape, order, dtype)
            answers = sights.answers(sight, claimed)
        if not sight.seen.any():
            raise Problem(f"{file}: no gradient leads from any output to any pixel: is the input "
                          "rounded, or looked up in a table, or are all weights of a layer 0?")
        try:
            show(answers, what, passing)
        finally:
            save_picture(sight, answers, what, out)
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
    if isinstance(network, type) or takes_nothing(network):
        with blaming(file, f"{name}() cannot be built without arguments (write net = {name}(..) "
                           "into the file, and name that)"):
            network = network()
    for each in [network, *vars(module).values()]:  # a function may call a module
        if isinstance(each, nn.Module):
            each.eval()
    return network


def takes_nothing(function):
    """Is it a function without parameters, which builds the network?"""
    return inspect.isfunction(function) and not inspect.signature(function).parameters


def fitting(network, file, shape, claimed):
    """(the network, x -> (N, P, H, W), raising Problem where something is wrong with its outputs;
    its dtype: float64 if it takes that; are its parameters groups, one of each channel?)"""

    def called(x):
        with blaming(file, f"of an input {tuple(x.shape)} (--shape CxHxW gives another)"):
            y = network(x)
        y = flat(y, file, shape, len(x))
        if claimed and y.shape[1] % shape[0]:
            raise Problem(f"--channel-order: {shape[0]} equal groups cannot be made of "
                          f"{y.shape[1]} parameters")
        if not y.isfinite().all():
            raise Problem(f"{file}: {int((~y.isfinite()).sum())} outputs are not finite numbers")
        if x.requires_grad and not y.requires_grad:
            raise Problem(f"{file}: no gradient leads from the outputs to the input: is it "
                          "detached, rounded, under no_grad, or not used?")
        return y

    for dtype in (torch.float64, torch.float32):
        if isinstance(network, nn.Module):
            network.to("cpu", dtype)
        try:
            x = tool("sight").random_inputs(shape, 0, dtype)
            called(x)
            by_channel = network(x).dim() == 5 and shape[0] > 1
            return called, dtype, claimed or by_channel
        except Problem:
            if dtype == torch.float32:
                raise


def flat(y, file, shape, n):
    """Outputs (N, P, H, W) or (N, P, C, H, W) -> (N, P, H, W), the latter by channel."""
    channels, *size = shape
    got = list(y.shape) if isinstance(y, torch.Tensor) else []
    if got[:1] == [n] and got[2:] == [channels, *size]:
        return y.transpose(1, 2).flatten(1, 2)
    if got[:1] == [n] and got[2:] == size and got[1] > 0:
        return y
    got = tuple(got) if got else f"a {type(y).__name__}"
    height, width = size
    raise Problem(f"{file}: expected ({n}, P, {height}, {width}) or "
                  f"({n}, P, {channels}, {height}, {width}), got {got}")


# --- The receptive field as a picture ----------------------------------------------------------


def save_picture(sight, answers, what, path):
    """A .png: what an output of the network `what` sees, should see and must not see."""
    matplotlib = tool("curves").import_matplotlib()
    from matplotlib.figure import Figure

    faults = [found.splitlines()[0] for _, verdict, found in answers if verdict != "OK"]
    faults = faults or ["causal, and sees every earlier pixel within reach"]
    title = "\n".join([what, *(textwrap.fill(fault, 95) for fault in faults)])
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has chosen, LaTeX among it
        figure = Figure(figsize=(6.4, 6), layout="constrained")
        figure.suptitle(title, fontsize=9)
        draw(figure, figure.subplots(), sight)
        write_atomically(path, functools.partial(figure.savefig, dpi=120, format="png"))


def draw(figure, axis, sight):
    """The gradients of an output, one with a fault if there is any, as cells."""
    from matplotlib import colormaps, colors
    from matplotlib.patches import Patch, Rectangle

    i = sight.example(sight.touched if sight.touched.any() else sight.blind)
    strengths = sight.strengths(i).amax((0, 1))
    # White is for what is not seen at all; what is forbidden is red.
    strengths = (strengths / strengths.max()).clamp(min=1e-3).masked_fill(~sight.seen[i], 0)
    strengths = strengths.masked_fill(sight.touched[i], 0).view(sight.height, sight.width)
    blues = colors.ListedColormap(colormaps["Blues"](range(80, 256)), under="white")
    scale = colors.LogNorm(1e-3, 1)
    picture = axis.imshow(strengths.numpy(), blues, scale, interpolation="nearest")
    figure.colorbar(picture, label="gradient, largest = 1", shrink=0.7)

    red = dict(facecolor="red", edgecolor="white")
    hatched = dict(facecolor="white", edgecolor="dimgray", hatch="////")
    frame = dict(facecolor="none", edgecolor="black", linewidth=2)

    def mark(number, **style):
        row, column = divmod(number, sight.width)
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))

    for number in range(sight.pixels):
        mark(number, facecolor="none", edgecolor="lightgray", linewidth=0.3)
        if sight.touched[i, number]:
            mark(number, **red)
        if sight.blind[i, number]:
            mark(number, **hatched)
    mark(i, **frame)
    axis.legend(handles=[
        Patch(label=f"output {sight.place(i)}", **frame),
        Patch(label="earlier pixel that it sees", facecolor=blues(120)),
        Patch(label="earlier pixel within reach, not seen", **hatched),
        Patch(label="pixel that it sees and must not", **red),
    ], loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False)
    axis.set_xlabel("column")
    axis.set_ylabel("row")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
