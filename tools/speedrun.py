"""How long a run took to how many bits/dim. Command speedrun.

Factors share nothing, and so it makes no difference to their weights whether they are trained one
after the other, as `train` does, or a twentieth of each in turns. Counted as if in turns, there are
bits of the whole model after each twentieth of the training: those of each factor, added up.
"""
import functools
import json
import pathlib
import subprocess

from pixelaux import (
    Parser, Problem, counted, make_views, of_factor, read_config, read_metrics, tool,
    write_atomically)

# bits/dim; 3.32 is the paper's bound for this model
TARGETS = (4.5, 4.0, 3.7, 3.5, 3.4, 3.32, 3.2, 3.1, 3.0)
MEASURED = "held_out_bits_per_dim"


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
    for record in read_metrics(run):
        if MEASURED in record:
            measured[record["factor"]].append(record)
    if not any(measured):
        raise Problem(f"{run}: no bits of images held out from training; train with --hold-out N")
    steps = [of_factor(config.steps, k) for k in range(len(measured))]
    if any(not records or records[-1]["step"] < end for records, end in zip(measured, steps)):
        raise Problem(f"{run}: expected all factors trained to the end; train --resume goes on")
    seconds, bits = [], []
    for part in range(1, 21):
        reached = [last_until(part, records, end) for records, end in zip(measured, steps)]
        if None not in reached:  # as when a factor has fewer steps than there are parts
            seconds.append(sum(record["seconds"] for record in reached))
            bits.append(sum(record[MEASURED] for record in reached))
    return seconds, bits


def last_until(part, records, steps):
    """The last of a factor's records made until this twentieth of its steps was over; None: there is
    none. (It is made at the first look after that.)"""
    over = [record for record in records if 20 * record["step"] // steps <= part]
    return over[-1] if over else None


def time_to(target, seconds, bits):
    """The seconds after which bits/dim were first measured at `target` or below; None: never."""
    for second, bit in zip(seconds, bits):
        if bit <= target:
            return second
    return None


def head(run):
    """Lines: what was trained, by which command, on what."""
    config, made = read_config(run), []
    if (run / "commands.jsonl").exists():
        made = [json.loads(line) for line in (run / "commands.jsonl").read_text().splitlines()]
    steps = ", ".join(f"{number:,}" for number in config.steps)
    lines = [f"{config.model}, preset {config.preset}, {config.data}, seed {config.seed}, "
             f"{config.nr_filters} filters, batch {config.batch_size}; steps by factor: {steps}; "
             f"commit {commit()}"]
    for one in made:
        lines.append(f"`{one['command']}` ({one['processes']} x {one['hardware']}, "
                     f"torch {one['torch']})")
    return lines


def commit():
    """Of the code that runs, with a + if it was changed since; "unknown" outside a clone."""
    here = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
    lines += ["", "Not counted: compilation, and the time in which bits/dim are measured."]
    evaluations = sorted(run.glob("eval*.json"))  # eval.json, of all test images, comes last
    if evaluations:
        result = json.loads(evaluations[-1].read_text())
        lines += ["", f"{counted(result['images'], 'test image')}: bound <= {result['bound']:.4f}, "
                  f"exact {result['exact']:.4f} bits/dim"]
    return lines


def save_curve(path, run, seconds, bits):
    """A PNG: bits/dim by time."""
    matplotlib = tool("curves").import_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        axis.semilogx(seconds, bits, "o-", linewidth=1, markersize=4)
        for target in TARGETS:
            if min(bits) <= target <= max(bits):
                axis.axhline(target, linewidth=0.5, color="gray")
        axis.set_xlabel("seconds of training, all factors")
        axis.set_ylabel("bits/dim, images held out")
        axis.set_title(head(run)[0].partition(";")[0], fontsize=8)
        axis.grid(alpha=0.3)
        write_atomically(path, functools.partial(figure.savefig, dpi=110, format="png"))
