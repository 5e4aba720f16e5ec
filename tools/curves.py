"""Pictures of training. Command curves."""
import contextlib
import functools
import json
import os
import sys

import torch

from pixelaux import (
    Half, Parser, PixelAux, Problem, bits_per_dim, load_data, make_views, read_config, to_array,
    to_tensor, write_atomically)


def main(argv):
    """curves RUN."""
    parser = Parser(prog="pixelaux.py curves", description="RUN/curves.png, from RUN/metrics.jsonl")
    parser.add("run", help="output folder of train")
    args = parser.parse_args(argv[1:])
    with torch.device("meta"):  # the names alone are needed, no weights
        names = PixelAux(read_config(args.run)).names
    save_curves(args.run, names)
    print(args.run / "curves.png")


def read_records(path):
    """What append_record has written, without lines that a kill has cut."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def read_metrics(out):
    """The records of OUT/metrics.jsonl, in order. A run that was stopped and resumed has done some
    steps again, those after its checkpoint: of records of the same step the last is valid."""
    kept = {}  # factor -> records
    for record in read_records(out / "metrics.jsonl"):
        with contextlib.suppress(TypeError, KeyError):
            before = kept.setdefault(record["factor"], [])
            while before and before[-1]["step"] >= record["step"]:
                before.pop()
            before.append(record)
    return sum((kept[k] for k in sorted(kept)), [])


def save_curves(out, names):
    """OUT/curves.png: bits/dim of X by the steps of training, a panel for each factor; and the
    limit, where the truth is known.

    From OUT/metrics.jsonl, and OUT/config.json if it is there. names: of the factors, coarsest
    first. Raises Problem.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    lines = records(out, names)
    factors = sorted({line["factor"] for line in lines})
    limits, unit = limits_of(out), unit_of(lines)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has chosen, LaTeX among it
        figure = Figure(figsize=(4.8 * len(factors), 3.4), layout="constrained")
        axes = figure.subplots(1, len(factors), squeeze=False)[0]
        for axis, k in zip(axes, factors):
            draw(axis, [line for line in lines if line["factor"] == k], unit, limits.get(k))
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


def unit_of(lines):
    """(name, seconds): one unit of time for all panels."""
    longest = max(line["seconds"] for line in lines)
    return ("minutes", 60) if longest >= 60 else ("seconds", 1)


def limits_of(out):
    """{factor: the best bits/dim of X that it can have on the images of the test points}.

    Known of built-in data alone, of p(X), p(X_1) and p(X | X_1), X_1 = Half(X).
    """
    if not (out / "config.json").exists():
        return {}
    config = read_config(out)
    psis = tuple(type(view.psi) for view in make_views(config))
    return truths(config.size, psis) if config.data == "shapes" else {}


@functools.lru_cache(1)  # asked for after each quarter of the training
def truths(size, psis):
    """The same of images of `size`, (H, W), and a model of views of these psi, coarsest first."""
    data, _ = load_data("shapes", size=size)
    images = data.test[:128]
    whole, nats = data.shapes.log_prob(images), {}
    if len(psis) == 1:
        nats[0] = whole
    elif psis[-1] is Half:
        half = data.shapes.log_prob_half(to_array(Half()(to_tensor(images))))
        nats[len(psis) - 1] = whole - half  # as X tells X_1
        if len(psis) == 2:
            nats[0] = half
    return {k: float(bits_per_dim(nats[k].mean(), images[0].size)) for k in nats}


def draw(axis, lines, unit, limit):
    """A factor's training batches, and what was measured on test or held-out images, by step.
    limit: None where it is not known."""
    name, length = unit
    last = lines[-1]
    training = lines[len(lines) // 10 :]  # beside the first losses the others would look all alike
    for among, key, style, label in (
        (training, "bits_per_dim", "-", "training batches"),
        (lines, "test_bits_per_dim", "o-", "test images, averaged weights"),
        (lines, "held_out_bits_per_dim", "o-", "held-out images, averaged weights"),
    ):
        shown = [line for line in among if key in line]
        if shown:
            steps = [line["step"] for line in shown]
            bits = [line[key] for line in shown]
            style = "o-" if len(shown) < 3 else style
            axis.plot(steps, bits, style, linewidth=1, markersize=4, label=label)
    if limit is not None:
        label = "limit: the true probability"
        axis.axhline(limit, linestyle="--", linewidth=1, color="black", label=label)
    axis.set_xlabel(f"steps\n{last['step']:,} in {last['seconds'] / length:.1f} {name} of training")
    axis.set_ylabel("bits/dim of X")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
