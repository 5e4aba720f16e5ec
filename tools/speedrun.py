"""How long a run took to how many bits/dim. Command speedrun.

Factors share nothing, and so it makes no difference to their weights whether they are trained one
after the other, as `train` does, or a twentieth of each in turns. Counted as if in turns, there are
bits of the whole model after each twentieth of the training: those of each factor, added up.
"""
import functools
import json
import math

from pixelaux import (
    Parser, Problem, counted, make_views, of_factor, read_config, tool, write_atomically)

# bits/dim; 3.32 is the paper's bound for this model
TARGETS = (4.5, 4.0, 3.7, 3.5, 3.4, 3.32, 3.2, 3.1, 3.0)
MEASURED, PARTS = "held_out_bits_per_dim", 20


def main(argv):
    """speedrun RUN."""
    parser = Parser(prog="pixelaux.py speedrun", description="RUN/speedrun.md and RUN/speedrun.png:"
                    " the time to bits/dim, from what `train --hold-out N` has recorded")
    parser.add("run", help="output folder of train")
    args = parser.parse_args(argv[1:])
    seconds, bits = totals(args.run)
    text = "\n".join([*head(args.run), "", *table(args.run, seconds, bits)])
    write_atomically(args.run / "speedrun.md", f"{text}\n".encode())
    save_curve(args.run / "speedrun.png", args.run, seconds, bits)
    print(text)


def totals(run):
    """Seconds of training, and bits/dim of X, of all factors after each twentieth: two lists.
    Raises Problem."""
    if not (run / "metrics.jsonl").exists():
        raise Problem(f"{run}: expected the output folder of train, with its metrics.jsonl")
    config = read_config(run)
    measured = [[] for _ in make_views(config)]  # of each factor, its records
    for record in tool("curves").read_metrics(run):
        if MEASURED in record:
            measured[record["factor"]].append(record)
    if not any(measured):
        raise Problem(f"{run}: no bits of images held out from training; train with --hold-out N")
    seconds, bits = [], []
    for part in range(1, PARTS + 1):
        reached = []
        for k, records in enumerate(measured):
            # A run by epochs does not know its steps before: then those that were made.
            end = of_factor(config.steps, k) or records[-1]["step"] if records else math.inf
            reached += [last_until(part, records, end)]
        if None not in reached:
            seconds.append(sum(record["seconds"] for record in reached))
            bits.append(sum(record[MEASURED] for record in reached))
    if not bits:
        raise Problem(f"{run}: expected measurements of all factors; train --resume goes on")
    return seconds, bits


def last_until(part, records, steps):
    """The last of a factor's records made until this twentieth of its steps was over (at the first
    look after that). None: there is none, or the training has not come so far."""
    over = [record for record in records if PARTS * record["step"] // steps <= part]
    come = bool(records) and PARTS * records[-1]["step"] // steps >= part
    return over[-1] if over and come else None


def time_to(target, seconds, bits):
    """The seconds after which bits/dim were first measured at `target` or below; None: never."""
    for second, bit in zip(seconds, bits):
        if bit <= target:
            return second
    return None


def head(run):
    """Lines: what was trained; by which command, on what."""
    config = read_config(run)
    steps = ", ".join(f"{number:,}" for number in config.steps)
    lines = [f"{config.model}, preset {config.preset}, {config.data}, seed {config.seed}, "
             f"{config.nr_filters} filters, batch {config.batch_size}; steps by factor: {steps}"]
    path = run / "commands.jsonl"
    for one in tool("curves").read_records(path) if path.exists() else ():
        versions = [f"{name} {one[name]}" for name in ("torch", "cuda", "python", "commit")
                    if one.get(name)]
        lines.append(f"`{one['command']}` ({one['processes']} x {one['hardware']}, "
                     f"{', '.join(versions)})")
    return lines


def table(run, seconds, bits):
    """Lines of markdown: time to bits/dim, and the test set, if `eval` was there."""
    config = read_config(run)
    kind = "exact" if config.tight else "bound,"
    lines = [f"| {kind} bits/dim of {counted(config.hold_out, 'image')} held out from training "
             "| seconds of training, all factors |", "| --- | --- |"]
    for target in TARGETS:
        time = time_to(target, seconds, bits)
        lines.append(f"| {target} | {'not reached' if time is None else f'{time:,.0f}'} |")
    lines.append(f"| at the end: {bits[-1]:.4f} | {seconds[-1]:,.0f} |")
    lines += ["", "Not counted: loading, compilation, checkpoints, pictures, and the time in which "
              "bits/dim are measured."]
    # eval.json, of all test images, comes last.
    evaluations = sorted([*run.glob("eval-[0-9]*.json"), *run.glob("eval.json")])
    if evaluations:
        result = json.loads(evaluations[-1].read_text())
        lines += ["", f"{counted(result['images'], 'test image')}: bound <= {result['bound']:.4f}, "
                  f"exact {result['exact']:.4f} bits/dim"]
    return lines


def save_curve(path, run, seconds, bits):
    """A PNG: bits/dim by time."""
    matplotlib = tool("curves").import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        axis.semilogx(seconds, bits, "o-", linewidth=1, markersize=4)
        for target in TARGETS:
            if min(bits) <= target <= max(bits):
                axis.axhline(target, linewidth=0.5, color="gray")
                axis.text(seconds[0], target, f"{target}", fontsize=8, va="bottom")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("seconds of training, all factors")
        axis.set_ylabel("bits/dim, images held out")
        axis.set_title(head(run)[0].partition(";")[0], fontsize=8)
        axis.grid(alpha=0.3)
        write_atomically(path, functools.partial(figure.savefig, dpi=110, format="png"))
