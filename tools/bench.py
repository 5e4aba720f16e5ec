"""How fast it is, beside plain implementations in one process. Command bench train|sample.

The machine may be shared with others. So what is compared takes turns, and of each the fastest turn
counts.
"""
import copy
import dataclasses
import math
import os
import pathlib
import re
import resource
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from pixelaux import (
    Conv, Draw, Parser, Plan, Problem, Training, bfloat16, build, evaluating, hardware, nats_of,
    sample_fast, six_stages, wrapped)


def main(argv):
    """bench train or bench sample."""
    parser = Parser(
        prog="pixelaux.py bench", description="Speed, beside plain implementations. On two CPU "
        "cores bench sample takes some 2 minutes and 9 GiB of memory, with --model pyramid half a "
        "minute, as bench train does. Each says at its start what to expect.")
    parser.add_argument("what", choices=("train", "sample"))
    parser.add("--model", "--preset", "--size", "--precision", "--compile", "--seed", "--device")
    parser.add("--batch-size", help="default: the preset's; bench sample: 1, 16 and 64")
    args = parser.parse_args(argv[1:])
    if args.what == "sample" and (args.precision or args.compile is not None):
        raise Problem("--precision and --compile are for bench train; "
                      "sampling is in float32 and not compiled")
    print(f"torch {torch.__version__}, {hardware(args.device)}, seed {args.seed or 0}")
    if args.what == "train":
        bench_train(args)
    else:
        bench_sample(args)


def expected(duration, gib=0):
    """A line that says how long it will take, by an estimate in seconds, and how many GiB."""
    minutes = round(duration / 60)
    time_needed = f"{minutes} minutes" if minutes > 1 else "a minute or less"
    memory_needed = f", up to {math.ceil(gib)} GiB of memory" if gib else ""
    return f"estimate: {time_needed}{memory_needed}, if nothing else runs here"


def seconds(device, turns, *functions):
    """Wall-clock time of each function, the fastest of some turns; they alternate."""
    wait = torch.get_device_module(device).synchronize
    fastest = [math.inf] * len(functions)
    for _ in range(turns):
        for i, function in enumerate(functions):
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest


# --- Training ----------------------------------------------------------------------------------


class PlainConv(nn.Module):
    """A Conv as people usually write it: torch's own weight norm, padding by a copy, NCHW."""

    def __init__(self, conv):
        super().__init__()
        self.rows, self.columns = conv.rows, conv.columns
        self.stride, self.up = conv.stride, conv.up
        self.v = nn.Parameter(conv.v.detach().contiguous())
        self.b = nn.Parameter(conv.b.detach().clone())
        weight_norm(self, "v")  # from now on self.v is what v and its norms, the g of Conv, make
        self.parametrizations.v.original0.data.copy_(conv.g.detach().view(-1, 1, 1, 1))

    def forward(self, x):
        """As Conv's."""
        (top, bottom), (left, right) = self.rows, self.columns
        height, width = x.shape[2:]
        x = x.contiguous()
        if self.up:
            y = F.conv_transpose2d(x, self.v.transpose(0, 1), self.b, 2)
            return y[:, :, bottom : bottom + 2 * height, right : right + 2 * width]
        return F.conv2d(F.pad(x, (-left, right, -top, bottom)), self.v, self.b, self.stride)


def plain(factor):
    """A copy of a factor that computes the same, each Conv as people usually write it."""
    factor = copy.deepcopy(factor).to(memory_format=torch.contiguous_format)
    for name, module in list(factor.named_modules()):
        if isinstance(module, Conv):
            factor.set_submodule(name, PlainConv(module))
    return factor


def step_of(factor, pair, config, dims, forward=None):
    """The function that makes a training step. forward: what the factor was compiled to, if it
    was."""
    training = Training(factor, config, dims)
    training.forward = factor if forward is None else forward
    return lambda: training.step(pair, 1.0)


def peak_flops(device, dtype):
    """FLOP/s of a product of two large matrices; a multiplication and an addition are two."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(device, 4, lambda: a @ a)[0]


def memory(device):
    """GiB, the most so far: of tensors on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


TRAIN = """\
training steps (gradient, optimizer, moving average), batch {}, model {}, preset {}, ours in {}.
plain: float32 (torch's default: TF32 on CUDA), NCHW, padding by copy, torch's weight norm, Adam.
Peak: a product of large matrices in {}, {:.3g} TFLOP/s. Memory: ours, the most so far.
factor               images/s: ours    plain   ratio   GFLOP/image   TFLOP/s   of peak     GiB"""


def bench_train(args):
    """Prints, of each factor, a training step of ours beside a plain one."""
    device = args.device
    model = build(args.model or "pyramid", args.size or 32, args.preset or "tiny", args.seed or 0,
                  precision=args.precision or "auto").train()
    config = model.config
    n = args.batch_size or config.batch_size
    x = torch.randint(config.levels, (n, *model.views[-1].shape), dtype=torch.uint8)
    model.initialise(x)
    model.to(device, memory_format=torch.channels_last)
    dtype = torch.bfloat16 if bfloat16(config, device) else torch.float32
    peak = peak_flops(device, dtype)
    many = 10 if device.type == "cuda" else 1  # so that it is not the host that is measured
    pairs = model.pairs(x)
    with evaluating(model):
        passes = sum(seconds(device, 1, lambda: factor(*pair))[0]
                     for factor, pair in zip(model.factors, pairs))
    print(expected(passes * 3.5 * (2 + 8 * many)))  # a step: some 3.5 passes; 4 turns of either
    print(TRAIN.format(n, config.model, config.preset, dtype, dtype, peak / 1e12))

    for name, factor, pair in zip(model.names, model.factors, pairs):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with FlopCounterMode(display=False) as counter:
            nats_of(factor, pair, config).sum().backward()
        gflop = counter.get_total_flops() / 1e9
        forward = wrapped(factor, pair, config, args.compile)
        our_step = step_of(factor, pair, config, model.dims, forward)
        our_step()
        gib = memory(device)
        other = plain(factor)
        float32 = dataclasses.replace(config, precision="float32", muon=0.0)
        plain_step = step_of(other, pair, float32, model.dims)
        ours, theirs = seconds(device, 4, lambda: [our_step() for _ in range(many)],
                               lambda: [plain_step() for _ in range(many)])
        ours, theirs = ours / many, theirs / many
        rate = gflop / ours / 1e3
        print(f"{name:21}{n / ours:14.1f}{n / theirs:9.1f}{theirs / ours:8.2f}{gflop / n:14.3f}"
              f"{rate:10.3g}{1e12 * rate / peak:10.0%}{gib:8.2f}", flush=True)


# --- Sampling ----------------------------------------------------------------------------------

SAMPLE = """\
the finest factor alone, float32, random weights. pass: a teacher-forced pass of the batch, f_w
included. naive: a pass of the network, f_w not included, for every pixel, of which one is timed.
network                      batch steps s/image:naive   fast  pass us/pixel fast/pass naive/fast"""

# Of PixelCNN++'s own size: 5 blocks a stage.
CASES = [("pyramid", "celeba", 128, {}), ("pixelcnn", "cifar10", 32, dict(layout=six_stages(5)))]


def bench_sample(args):
    """Prints times of the samplers of the finest factor, and of a pyramid's whole chain."""
    batches = [args.batch_size] if args.batch_size else [1, 16, 64]
    models = []
    for name, preset, side, changes in [(args.model, "tiny", 32, {})] if args.model else CASES:
        model = build(name, args.size or side, args.preset or preset, args.seed or 0, **changes)
        models.append(model.to(args.device, memory_format=torch.channels_last))
    print(expected(*estimate(models, batches)))
    print(SAMPLE)
    for model in models:
        config = model.config
        label = f"{config.model} {config.preset} {config.size[0]}x{config.size[1]}"
        with evaluating(model):
            for n in batches:
                print(f"{label:29}{n:5}{sampler_row(model, n)}", flush=True)
            if "pyramid" in config.model:
                for n in (1, 64) if args.device.type == "cuda" else (1,):
                    chain = seconds(args.device, 2, lambda: model.sample(n))[0]
                    print(f"{label:29}{n:5}  the whole chain, f_w included: {chain:.2f} s")
    print("for reference: the paper 4,000 us/pixel (Titan X, nothing kept from pass to pass), "
          "PixelCNN++ 50,000 (as the paper quotes it)")


def estimate(models, batches):
    """(seconds, GiB) of the rows that fit: rough, by a pass of one image."""
    duration, gib = 0, 0
    for model in models:
        factor = model.factors[-1]
        pair = model.pairs(torch.zeros(1, *factor.view.shape, dtype=torch.uint8))[-1]
        with evaluating(model):
            (of_pass,) = seconds(model.device, 2, lambda: factor(*pair))
        for n in batches:
            if memory_of(factor, n) <= available(model.device):
                duration += turns_of(n) * 4.5 * n * of_pass  # two passes, and sampling: 2 to 3
                gib = max(gib, memory_of(factor, n) / 2**30)
    return duration, gib


def turns_of(n):
    return 3 if n < 4 else 2


def memory_of(factor, n):
    """Bytes that n images need: 4 GiB for at_once of them, and in sampling twice as much."""
    return n / factor.at_once * 2**33


def sampler_row(model, n):
    """The rest of the table's row, for n images."""
    device, factor = model.device, model.factors[-1]
    channels, height, width = factor.view.shape
    if memory_of(factor, n) > available(device):
        return f"  left out: needs more than {available(device) / 2**30:.0f} GiB"
    x = torch.randint(model.config.levels, (n, *factor.view.shape), dtype=torch.uint8)
    x, x_hat = model.pairs(x)[-1]
    noise = torch.rand(n, 2 * channels, height, width, dtype=torch.float64, device=device)
    embeddings = factor.embeddings(x_hat)
    plan = Plan(factor.net, channels + 1, n, (height, width), embeddings)
    steps = sum(plan.output.group in due for due in plan.steps())  # that draw pixels
    of_pass, of_naive, fast = seconds(
        device, turns_of(n),
        lambda: factor.params(x, factor.embeddings(x_hat)),
        lambda: factor.params(x, embeddings),
        lambda: sample_fast(factor, n, x_hat, Draw(noise)))
    pixels = height * width
    naive = pixels * of_naive
    return (f"{steps:6}{naive / n:14.1f}{fast / n:7.3f}{of_pass / n:6.3f}"
            f"{fast / n / pixels * 1e6:9.1f}{fast / of_pass:10.2f}{naive / fast:11.0f}")


def available(device):
    """Bytes of memory that are free; all that the machine has, where it does not tell more."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = pathlib.Path("/proc/meminfo")
    free = re.search(r"MemAvailable: *(\d+) kB|$", file.read_text() if file.exists() else "")[1]
    return int(free) * 2**10 if free else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
