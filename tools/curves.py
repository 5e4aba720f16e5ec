"""Pictures of training. Command curves."""
import contextlib
import functools
import os
import sys

import torch

from pixelaux import Parser, PixelAux, Problem, read_config, read_metrics, write_atomically


def main(argv):
    """curves RUN."""
    parser = Parser(prog="pixelaux.py curves", description="RUN/curves.png, from RUN/metrics.jsonl")
    parser.add("run", help="output folder of train")
    args = parser.parse_args(argv[1:])
    with torch.device("meta"):  # the names alone are needed, no weights
        names = PixelAux(read_config(args.run)).names
    save_curves(args.run, names)
    print(args.run / "curves.png")


def save_curves(out, names):
    """OUT/curves.png: bits/dim of X over the time of training, a panel for each factor.

    From OUT/metrics.jsonl. names: of the factors, coarsest first. Raises Problem.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    lines = records(out, names)
    factors = sorted({line["factor"] for line in lines})
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has chosen, LaTeX among it
        figure = Figure(figsize=(4.8 * len(factors), 3.4), layout="constrained")
        axes = figure.subplots(1, len(factors), squeeze=False)[0]
        for axis, k in zip(axes, factors):
            draw(axis, [line for line in lines if line["factor"] == k])
            axis.set_title(names[k])
        picture = functools.partial(figure.savefig, dpi=110, format="png")
        write_atomically(out / "curves.png", picture)


def import_matplotlib():
    """matplotlib; it would not start if MPLBACKEND is a name that it does not know."""
    if "MPLBACKEND" in os.environ and "matplotlib" not in sys.modules:
        chosen = os.environ.pop("MPLBACKEND")
        import matplotlib

        os.environ["MPLBACKEND"] = chosen
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = chosen  # for the pictures that others make
    import matplotlib

    return matplotlib


def records(out, names):
    """The lines of OUT/metrics.jsonl. Raises Problem if there are none, or others."""
    path = out / "metrics.jsonl"
    try:
        lines = read_metrics(out)
        for line in lines:
            names[line["factor"]], line["step"], line["seconds"], line["bits_per_dim"]
    except FileNotFoundError:
        raise Problem(f"{path} is missing; `train` writes it") from None
    except (ValueError, TypeError, LookupError):
        raise Problem(f"{path}: not what `train` writes of factors {', '.join(names)}") from None
    if not lines:
        raise Problem(f"{path}: empty, expected what `train` writes after its first steps")
    return lines


def draw(axis, lines):
    """A factor's training batches and test points, by time."""
    last = lines[-1]
    unit, length = ("minutes", 60) if last["seconds"] >= 60 else ("seconds", 1)
    training = lines[len(lines) // 10 :]  # beside the first losses the others would look all alike
    test = [line for line in lines if "test_bits_per_dim" in line]
    for shown, key, style, label in (
        (training, "bits_per_dim", "-", "training batches"),
        (test, "test_bits_per_dim", "o-", "test images, averaged weights"),
    ):
        times = [line["seconds"] / length for line in shown]
        bits = [line[key] for line in shown]
        axis.plot(times, bits, style, linewidth=1, markersize=4, label=label)
    axis.set_xlabel(f"{unit} of training ({last['step']:,} steps)")
    axis.set_ylabel("bits/dim of X")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
