"""The paper's claim, counted on `shapes`. Command claim.

The paper: texture dominates the likelihood, so a PixelCNN spends its capacity there; an auxiliary
view frees capacity for the shape of things. It shows samples. On `shapes` the probability of each
image is known, and one can count: what does a model miss, in bits, of the shape and of the texture
(tools/split.py says how they are told apart), and in how many of its samples does a shape decode?

All models have about as many parameters and as much time: CPU seconds of one thread, by the time
that a step is found to take. A model's factors have the same number of steps each. Everything else
is as preset tiny has it, but for the optimiser, which is Adam alone, as in the paper, and its
learning rate. This is chosen for each model: by what seed 0 gives at each rate, in bits of images
that are neither trained on nor counted. These are runs like all others, as a rate that is good in
short ones may be unstable at full length; and that of the best rate is then seed 0's.
"""
import json
import math
import platform
import shutil
import statistics
import time

import torch

from pixelaux import (
    NUMBER, PATH, Failure, Parser, PixelAux, Problem, Quiet, Training, batch_of, describe, evaluate,
    hardware, load_data, make_config, to_array, tool, train_factor, write_atomically)

# Filters, for about as many parameters.
FILTERS = {"pixelcnn": 28, "grayscale": 16, "pyramid": 26, "grayscale-pyramid": 16}
RATES = (4e-2, 2e-2)  # learning rates that are tried first: one of them is mostly the best
SAMPLES, VALIDATION = 256, 256  # images drawn by each run; those by which rates are chosen
MEASURING = 10  # CPU seconds that it takes to measure a run, about
COLOURS = {"shape": "#c1440e", "gray view": "#a0a0a0", "texture": "#7ba7c7", "98%": "#6f9a52",
           "95..98%": "#c5dbb4"}  # of what is counted
COLUMNS = {"shape": ["shape"], "gray view": ["gray view"], "texture": ["texture"],
           "all": ["shape", "gray view", "texture"], "98%": ["98%"], "95%": ["98%", "95..98%"]}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # for 95% intervals, by number of seeds


def main(argv):
    """claim."""
    parser = Parser(prog="pixelaux.py claim", description="the paper's claim counted on shapes")
    parser.add("--out", help="where results go, or are (default: runs/claim)",
               default=PATH("runs/claim"))
    parser.add_argument("--seconds", type=NUMBER, default=100.0,
                        help="of CPU time for each model and seed (default: 100)")
    parser.add_argument("--seeds", type=int, choices=STUDENT, default=3, help="how many")
    args = parser.parse_args(argv[1:])
    torch.set_num_threads(1)
    out, results = args.out, settings(args)
    print(to_go(results, args.seeds), file=Quiet())
    data, _ = load_data("shapes")
    if not results["steps"]:
        calibrate(results, data)
    runs = all_runs(out, results, data, args.seeds)
    text = table(results, runs)
    write_atomically(out / "claim.md", text.encode())
    save_figure(out / "claim.png", runs)
    print(f"{text}\n{out / 'claim.png'}")


def settings(args):
    """results as they are in OUT/claim.json, or new ones: {.., "runs": {key: run}}."""
    path = args.out / "claim.json"
    results = dict(seconds=args.seconds, steps={}, runs={})
    if path.exists():
        try:
            results = json.loads(path.read_text())
            begun, _ = results["seconds"], results["steps"]
            _ = [run["measuring"] for run in results["runs"].values()]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Problem(f"{path}: expected what `claim` writes") from None
        if begun != args.seconds:
            raise Problem(f"--seconds: {path} was begun with {begun:g}; else take another --out")
    command = f"python pixelaux.py claim --seconds {args.seconds:g} --seeds {args.seeds}"
    return results | dict(command=command)


def calibrate(results, data):
    """Put into results what depends on the machine, first of all how many steps a model makes."""
    cost = step_seconds(data)
    steps = {name: max(1, round(results["seconds"] / cost[name])) for name in FILTERS}
    results |= dict(hardware=hardware(torch.device("cpu")), torch=torch.__version__,
                    python=platform.python_version(), step_seconds=cost, steps=steps)


# --- Runs -----------------------------------------------------------------------------------------


def all_runs(out, results, data, seeds):
    """{model: [the run of each seed]}."""
    runs = {}
    for name in FILTERS:
        rate = best_rate(lambda rate: run_of(out, results, data, name, rate, 0, seeds))
        runs[name] = [run_of(out, results, data, name, rate, seed, seeds) for seed in range(seeds)]
    return runs


def best_rate(run_at):
    """The learning rate of the least validation bits: from RATES on by factors of 2, until the
    rates on either side are worse. One at which the loss is not finite is worse than all."""
    tried, wanted = {}, list(RATES)
    while wanted:
        rate = wanted.pop()
        try:
            tried[rate] = run_at(rate)["validation_bits"]
        except Failure as failure:
            print(failure, file=Quiet())
            tried[rate] = math.inf
        best = min(tried, key=tried.get)
        if not wanted:
            wanted = [near for near in (best / 2, best * 2) if near not in tried]
    return best


def rates_tried(results, name):
    runs = results["runs"].values()
    return sorted(run["rate"] for run in runs if run["model"] == name and run["seed"] == 0)


def to_go(results, seeds):
    """Of how many runs how many are done, and how long the others take, in words.

    They are RATES and mostly one rate more, or what was tried, and then the other seeds of the best
    rate; each takes what those that are done took.
    """
    total = 0
    for name in FILTERS:
        total += max(len(rates_tried(results, name)), len(RATES) + 1) + seeds - 1
    spent = [run["cpu_seconds"] + run["measuring"] for run in results["runs"].values()]
    each = statistics.mean(spent) if spent else results["seconds"] + MEASURING
    total = max(total, len(spent))  # which may be for more seeds
    minutes = math.ceil((total - len(spent)) * each / 60)
    return f"{len(spent)} of about {total} runs done, some {minutes} min of a CPU core to go"


def run_of(out, results, data, name, rate, seed, seeds):
    """A run from results; else it is trained and measured."""
    key = f"{name} rate {rate:g} seed {seed}"
    if key in results["runs"]:
        return results["runs"][key]
    print(f"{to_go(results, seeds)}; next: {key}", file=Quiet())
    folder = out / "runs" / key.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut short
    steps = results["steps"][name]
    model = new_model(name, data, lr=rate, seed=seed, steps=(steps,))
    before = time.process_time()
    for k in range(len(model.factors)):
        train_factor(model, k, data, folder, save_every=math.inf)
    trained = time.process_time()
    run = measured(model, data, seed)
    run |= dict(model=name, rate=rate, seed=seed, steps=steps, cpu_seconds=trained - before,
                measuring=time.process_time() - trained)
    results["runs"][key] = run
    write_atomically(out / "claim.json", json.dumps(results, indent=1).encode())
    return run


def measured(model, data, seed):
    """What is counted: the excess in bits an image, by part, and % of samples that decode. And by
    what rates are chosen: the bits of images that are neither trained on nor counted."""
    parts = tool("split").Truth(data.shapes, model, data.test).parts(model)
    counts = {part: float(bits.mean()) for part, bits in parts.items()}
    samples = to_array(model.sample(SAMPLES, seed, tight=True)[-1])
    strict, loose = [data.shapes.decodable(samples, share).mean() for share in (0.98, 0.95)]
    counts |= {"98%": 100 * float(strict), "95..98%": 100 * float(loose - strict)}
    fresh = data.shapes.sample(VALIDATION, (1, 20170806))
    bits = -evaluate(model, fresh)[1].sum(0).mean() / math.log(2)
    parameters = sum(weight.numel() for weight in model.parameters())
    return dict(counts=counts, images=len(data.test), samples=SAMPLES, parameters=parameters,
                validation_bits=float(bits))


def new_model(name, data, **changes):
    return PixelAux(make_config(model=name, size=data.shapes.size, nr_filters=FILTERS[name],
                                muon=0.0, data_set=describe(data), **changes))


def step_seconds(data, rounds=21):
    """{model: CPU seconds of a training step of each of its factors, added up}.

    The models take turns, as the machine may be faster now than later; the median turn counts.
    """
    models = {name: new_model(name, data) for name in FILTERS}
    turns = {name: [] for name in FILTERS}
    for _ in range(rounds):
        for name, model in models.items():
            factors = range(len(model.factors))
            turns[name].append(sum(seconds_of(model, k, data) for k in factors))
    return {name: statistics.median(seconds) for name, seconds in turns.items()}


def seconds_of(model, k, data, steps=5):
    """CPU seconds of a training step of factor k; the first is not counted."""
    training = Training(model.factors[k], model.config, model.dims)
    for step in range(steps + 1):
        if step == 1:
            begin = time.process_time()
        training.step(batch_of(model, k, data, step), 0.01)
    return (time.process_time() - begin) / steps


# --- The table and the figure ---------------------------------------------------------------------


TABLE = """\
`{command}` ({hardware}, torch {torch}, Python {python}, preset tiny, 16x16):
{number} runs, {minutes:.0f} minutes of CPU time in all, {training:.0f} of them training.
Excess over the truth, bits an image, on {images} test images, and the share in % of {samples}
samples whose shape decodes: 98% (or 95%) of the sub-pixels are within the noise of one
configuration. Mean of seeds 0..{last}, its 95% interval over the seeds (Student's t), and what each
gave. Rate: of learning, the best of those tried with seed 0; steps: of each factor; CPU s: of
training a run.

Shape and texture: the levels of each sub-pixel of X, and of half of X, are cut into classes around
the levels without noise (red of X: 0..80, 81..173, 174..255). Shape is -log2 q(class | all before),
texture -log2 q(level | class, all before), each minus the truth's, which is cut the same way, by
Bayes, exactly. They add up to the excess, and each is a Kullback-Leibler divergence, 0 or more
(tools/split.py). Gray views are not split, as each of 16 levels is shape and noise at once: a
model's shape excess is between the column shape and the sum of shape and gray view.

| model | filters, parameters | rate (tried) | steps | CPU s | {columns} |
{rule}
"""


def table(results, runs):
    """Markdown. runs: {model: [run of each seed]}."""
    first, made = next(iter(runs.values())), results["runs"].values()
    training = sum(run["cpu_seconds"] for run in made) / 60
    minutes = training + sum(run["measuring"] for run in made) / 60
    text = TABLE.format(**(results | first[0]), number=len(made), minutes=minutes,
                        training=training, last=len(first) - 1, columns=" | ".join(COLUMNS),
                        rule="| --- " * (5 + len(COLUMNS)) + "|")
    for name, of_seed in runs.items():
        run = of_seed[0]
        seconds = statistics.mean(run["cpu_seconds"] for run in of_seed)
        tried = ", ".join(f"{rate:g}" for rate in rates_tried(results, name))
        cells = [f"`{name}`", f"{FILTERS[name]}, {run['parameters']:,}",
                 f"{run['rate']:g} ({tried})", f"{run['steps']:,}", f"{seconds:.0f}"]
        for parts in COLUMNS.values():
            cells.append(cell(column(of_seed, parts)))
        text += f"| {' | '.join(cells)} |\n"
    return text


def cell(values):
    """Mean, interval and what each seed gave; – of what the model does not have."""
    if not any(values):
        return "–"
    mean, around = statistics.mean(values), half_width(values)
    digits = 2 if mean < 10 else 1
    seeds = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ± {around:.{digits}f} ({seeds})"


def column(of_seed, parts):
    """Of each seed's run the sum of some of the counts."""
    return [sum(run["counts"][part] for part in parts) for run in of_seed]


def half_width(values):
    """Of the 95% interval of the mean, by Student's t."""
    return STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def save_figure(path, runs):
    """Shape and gray view, texture, and what decodes: means with intervals; dots are the seeds."""
    matplotlib = tool("curves").import_matplotlib()
    from matplotlib.figure import Figure

    panels = {"excess: shape; gray view, bits an image": ["shape", "gray view"],
              "excess: texture, bits an image": ["texture"],
              "samples whose shape decodes, %": COLUMNS["95%"]}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        for axis, (title, parts) in zip(figure.subplots(1, 3), panels.items()):
            bars(axis, runs, parts)
            axis.set_title(title, fontsize=11)
            if len(parts) > 1:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def bars(axis, runs, parts):
    """A bar for each model, of parts that are stacked; of their sum the interval and the seeds."""
    for place, of_seed in enumerate(runs.values()):
        left = 0.0
        for part in parts:
            mean, label = statistics.mean(column(of_seed, [part])), "" if place else part
            axis.barh(place, mean, 0.6, left, color=COLOURS[part], label=label)
            left += mean
        values = column(of_seed, parts)
        axis.errorbar(left, place, xerr=half_width(values), color="black", capsize=4)
        axis.plot(values, [place] * len(values), "o", color="black", markersize=3)
    axis.set_yticks(range(len(runs)), list(runs) if axis.get_subplotspec().is_first_col() else [])
    axis.invert_yaxis()
    axis.set_xlim(0, 100 if "98%" in parts else None)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
