"""Properties of tools/check.py and tools/sight.py: what outputs see, what a run promises."""
import contextlib
import itertools
import pathlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pixelaux
from pixelaux import build, CausalNet, Conv, Half, LogisticMixture, main, six_stages
from test_pixelaux import names_used
from tools import check, codec, promises, sight

# --- Check: what an output sees ------------------------------------------------------------------


def masked_stack(*masks, nonlinear=torch.tanh, channels=2, seed=0):
    """A function: convolutions of `channels` channels whose kernels are nonzero where masks are."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for mask in masks:
        weight = torch.randn(channels, channels, *mask.shape, generator=generator).double()
        weights.append(weight * mask)

    def network(x):
        for weight in weights:
            x = nonlinear(F.conv2d(x, weight, padding="same"))
        return x

    return network


def mask(*rows):
    """A kernel's mask: "x" is read."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


A, B = mask("xxx", "x..", "..."), mask("xxx", "xx.", "...")


def offsets_of(mask):
    """What a masked kernel reads, as offsets from its output."""
    return {(r - mask.shape[0] // 2, c - mask.shape[1] // 2) for r, c in mask.nonzero().tolist()}


def sums(first, second):
    return {(a + c, b + d) for (a, b), (c, d) in itertools.product(first, second)}


def offsets_in(table, output, width):
    """The offsets of a table's pixels from an output."""
    row, column = divmod(output, width)
    return {(number // width - row, number % width - column)
            for number in table[output].nonzero().flatten().tolist()}


def before(offsets):
    """Those that come before the output in raster order."""
    return {(down, right) for down, right in offsets if down < 0 or (down == 0 and right < 0)}


kernels = st.integers(0, 2**15 - 1).map(
    lambda bits: torch.tensor([bits >> i & 1 for i in range(15)]).view(3, 5).bool())


@given(first=kernels, second=kernels, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_an_output_sees_what_its_masks_read_one_after_the_other(first, second, seed):
    """The offsets of two masked layers are the sums of theirs; touched are those at or after it.
    The output in the middle is far from the borders."""
    height, width, middle = 5, 9, 22
    expected = sums(offsets_of(first), offsets_of(second))
    found = sight.Sight(masked_stack(first, second, seed=seed), (2, height, width))
    assert offsets_in(found.seen, middle, width) == expected
    assert offsets_in(found.touched, middle, width) == expected - before(expected)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_stack_of_masked_convolutions_has_its_blind_spot(layers):
    """n layers of 3x3, the first without its centre: of the pixels up to n rows up and n columns to
    the side those at i rows up and more than i columns to the right never arrive."""
    side = 2 * layers + 1
    middle = side * layers + layers
    found = sight.Sight(masked_stack(A, *[B] * (layers - 1)), (2, side, side))
    by_hand = set()
    for i in range(1, layers + 1):
        by_hand |= {(-i, j) for j in range(i + 1, layers + 1)}
    assert offsets_in(found.blind, middle, side) == by_hand
    assert not found.touched.any() and bool(by_hand) == (layers > 1)
    holds, text = sight.sees_all(found)
    assert holds == (layers == 1) and ("blind spot" in text) != holds
    assert all(f"({i}, {j:+d})" in text for i, j in list(by_hand)[:5])
    assert dict_of(found)["sees all before it"] == ("OK" if holds else "BLIND")
    assert holds or "causal and a valid model" in text and "--blind-spot-ok" in text


def dict_of(found, **more):
    return {name: verdict for name, verdict, _ in sight.answers(found, **more)}


@given(sizes=st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_a_stack_of_right_masks_of_any_size_is_blind_in_the_spot_or_nowhere(sizes, seed):
    """Controls: with mask B first it is not causal; with mask A in every layer it does not see its
    left neighbour, and that is not the blind spot."""
    def masks(*kinds):
        found = []
        for side, kind in zip([3, *sizes], kinds):
            number = torch.arange(side * side).view(side, side)
            found.append(number < side * side // 2 + (kind == "B"))
        return masked_stack(*found, seed=seed)

    n = len(sizes)
    right = dict_of(sight.Sight(masks("A", *n * "B"), (2, 6, 8)))
    assert right["causal"] == "OK" and right["sees all before it"] in ("OK", "BLIND")
    assert dict_of(sight.Sight(masks("B", *n * "B"), (2, 6, 8)))["causal"] == "FAILS"
    found = sight.Sight(masks("A", *n * "A"), (2, 6, 8))
    assert dict_of(found) == {"causal": "OK", "sees all before it": "FAILS"}
    if sizes == [3]:
        assert "mask A" in sight.sees_all(found)[1]


@pytest.mark.parametrize("mask, missing", [
    (mask("xxx", "...", "..."), (0, -1)), (mask("...", "x..", "..."), (-1, 0)),
    (mask("xx.", "x..", "..."), (-1, 1)), (mask(".xx", "x..", "..."), (-1, -1)),
    (mask("xxxxx", "xxxxx", "xx.x.", ".....", "....."), None),
    (mask("xxxxx", "xxx.x", "xx...", ".....", "....."), (-1, 1)),
    (mask("x.xxx", "xxxxx", "xx...", ".....", "....."), (-2, -1))])
def test_a_neighbour_or_a_hole_that_is_not_read_is_blind(mask, missing):
    found = sight.Sight(masked_stack(mask), (2, 9, 9))
    blind = offsets_in(found.blind, 40, 9)
    assert blind == ({missing} if missing else set()) or missing in blind
    # A missing neighbour is not the blind spot, which --blind-spot-ok allows.
    assert dict_of(found)["sees all before it"] == ("FAILS" if missing else "OK")


@pytest.mark.parametrize("layout, size, look_right", [
    (((0, 3),), (10, 20), True), (((0, 3),), (10, 20), False), (six_stages(1), (12, 20), True)])
def test_two_streams_are_blind_nowhere(layout, size, look_right):
    """The networks of this program, in images larger than they reach; the same without what sees
    the rows above are blind (control)."""
    torch.manual_seed(0)
    net = CausalNet(1, 10, layout, 2, 0.0, False, look_right).double()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = sight.Sight(net, (1, *size))
    assert not found.touched.any() and not found.blind.any()
    net.h_above.g.data.zero_()
    for stage in net.stages:
        for _, horizontal in stage.blocks:
            horizontal.conv_aux[0].g.data.zero_()
    assert sight.Sight(net, (1, *size)).blind.any()


@pytest.mark.parametrize("nonlinear", [
    torch.relu, lambda x: torch.relu(x - 2), lambda x: torch.sigmoid(8 * x),
    lambda x: torch.tanh(8 * x), torch.abs, lambda x: x * 1e-9])
def test_flat_nonlinearities_hide_nothing(nonlinear):
    """Where a gradient is 0 at most inputs, it is found at another one: neither a blind spot nor a
    fault is told of that is none, and none is missed."""
    for first in (A, B):
        smooth, flat = (sight.Sight(masked_stack(first, B, nonlinear=each, channels=4), (4, 7, 7))
                        for each in (torch.tanh, nonlinear))
        assert torch.equal(flat.blind, smooth.blind) and flat.blind.any()
        assert torch.equal(flat.touched, smooth.touched) and flat.touched.any() == (first is B)


def test_the_gradient_that_is_told_is_the_weight():
    """Of a linear network; control: half the weight, half the gradient."""
    for value in (0.5, 0.25):
        weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
        weight[0, 0, 0], weight[0, 0, 2, 1] = 1.0, value  # row above, and the pixel below
        found = sight.Sight(lambda x: F.conv2d(x, weight, padding=1), (1, 5, 5))
        holds, text = sight.causal(found)
        assert not holds and f"(2, 2) is touched by pixel (3, 2), gradient {value:.2g}; " in text
        assert "20 of 25 outputs" in text


MISTAKES = {
    "sees itself": [B, B],
    "wrong way round": [~A, ~B],
    "rows and columns are exchanged": [A.T, B.T],
    "no mask is at work": [mask("xxx", "xxx", "xxx")],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_called_by_their_names(mistake):
    """Each by its own; one that has no name is described by its offsets alone."""
    holds, text = sight.causal(sight.Sight(masked_stack(*MISTAKES[mistake]), (2, 9, 9)))
    assert not holds and [name for name in MISTAKES if name in text] == [mistake]
    too_far = masked_stack(mask("xxx", "xxx", "..."))
    holds, text = sight.causal(sight.Sight(too_far, (2, 9, 9)))
    assert not holds and "at offsets (0, 0), (0, +1)" in text
    assert not any(name in text for name in MISTAKES)
    one_row_below = masked_stack(mask("xxxxx", "xxxxx", "xx...", "x....", "....."))
    holds, text = sight.causal(sight.Sight(one_row_below, (2, 9, 9)))
    assert not holds and not any(name in text for name in MISTAKES)


def ordered(reads):
    """A function of 3 channels -> 6 parameters: group c reads the pixel to the left, and the
    channels reads[c] of its own pixel."""
    def network(x):
        left = F.pad(x, (1, 0))[..., :-1].sum(1)
        groups = [left + sum([x[:, j] for j in channels], 0) for channels in reads]
        return torch.stack(groups, 1).repeat_interleave(2, 1)

    return network


@pytest.mark.parametrize("reads, expected", [
    ([[], [0], [0, 1]], []),
    ([[], [0], [0, 1, 2]], ["group 2 is touched by channel 2"]),
    ([[0], [0], [0, 1]], ["group 0 is touched by channel 0"]),
    ([[], [0], [0]], ["group 2 does not see channel 1"]),
    ([[1, 2], [2], []], ["group 0 is touched by channel 1", "wrong way round"]),
])
def test_the_order_of_channels(reads, expected):
    """Right, one too many, one too few, and reversed. Where the order is allowed but not claimed,
    one too few is right. Without groups, any own pixel is too many; but where the order would make
    it right, that is said."""
    found = sight.Sight(ordered(reads), (3, 3, 4), order=True)
    holds, text = sight.channel_order(found)
    assert holds == (not expected) and all(words in text for words in expected)
    too_many = "touched" in "".join(expected)
    assert sight.causal(found)[0] == sight.channel_order(found, claimed=False)[0] == (not too_many)
    assert len(dict_of(found)) == len(dict_of(found, claimed=False)) == 3
    plain = sight.Sight(ordered(reads), (3, 3, 4))
    holds, text = sight.causal(plain)
    assert not holds and ("with --channel-order" in text) == (not too_many)
    assert len(dict_of(plain)) == 2


def test_the_gradient_of_what_a_group_must_not_see_is_told_and_not_another():
    """Group 0 reads its own channel by 0.25; that group 2 reads channel 0 by 8 is right."""
    def network(x):
        y = ordered([[], [0], [0, 1]])(x)
        return y + torch.stack([0.25 * x[:, 0], *4 * [0 * x[:, 0]], 8 * x[:, 0]], 1)

    holds, text = sight.causal(sight.Sight(network, (3, 3, 4), order=True))
    assert not holds and "gradient 0.25;" in text and "mask A" not in text
    own = sight.Sight(masked_stack(B, channels=3), (3, 3, 4), order=True)
    assert "mask A" in sight.causal(own)[1]  # control


# --- Check: a network of one's own, from the command line ----------------------------------------

NETWORKS = '''
import torch
from torch import nn
import beside

class Masked(nn.Conv2d):
    def forward(self, x):
        mask, middle = torch.ones_like(self.weight), self.kernel_size[0] // 2
        mask[:, :, middle, middle + self.start :] = 0
        mask[:, :, middle + 1 :] = 0
        return self._conv_forward(x, self.weight * mask, self.bias)

def masked(start, *sizes, **more):
    layer = Masked(*sizes, padding=sizes[2] // 2, **more)
    layer.start = start
    return layer

right = nn.Sequential(masked(0, 3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
one_off = nn.Sequential(masked(1, 3, 8, 5), nn.ReLU(), nn.Conv2d(8, 6, 1))
stack = nn.Sequential(masked(0, 3, 8, 3), nn.ReLU(), masked(1, 8, 8, 3), nn.Conv2d(8, 6, 1))

class Built(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = masked(0, 3, 4, 3)
        for parameter in self.parameters():
            parameter.requires_grad = False

    def forward(self, x):
        x *= 0.5
        return self.layer(x.to(self.layer.weight.dtype))

weight = torch.randn(4, 3, 1, 1)

def function(x):
    return torch.conv2d(torch.nn.functional.pad(x, (1, 0, 1, 0))[..., :-1, :-1], weight) \\
        + beside.left(x) + beside.above(x)

class Demanding(nn.Module):
    def __init__(self, filters):
        super().__init__()

def smaller(x): return x[:, :, 1:, 1:]
def flat(x): return x.mean(1)
def pair(x): return x, x
def raising(x):
    raise KeyError("no such\\nlayer")
def untied(x): return torch.zeros_like(x)
def detached(x): return right(x.detach()).detach()
def infinite(x): return x / 0
looked_up = __import__("torch").nn.Embedding(100, 3)
def embedded(x): return looked_up(x.long()[:, 0].clamp(0, 99)).movedim(3, 1).to(x.dtype)
def five(x): return x[:, :1].repeat(1, 5, 1, 1)
def undone(x):
    y = torch.exp(x)
    z = y * y
    y += 1
    return z
number = 3
def by_channel(x):
    first, both = x[:, 0], x[:, 0] + x[:, 1]
    y = right(x) + torch.stack([0 * first, 0 * first, first, first, both, both], 1)
    return y.unflatten(1, (3, 2)).transpose(1, 2)
def independent(x): return right(x).unflatten(1, (3, 2)).transpose(1, 2)
def sees_its_own(x): return one_off(x).unflatten(1, (3, 2)).transpose(1, 2)
def reversed_channels(x): return by_channel(x.flip(1)).flip(2)
def other_way(x): return by_channel(x).transpose(1, 2)
def made(): return right
normed = nn.Sequential(masked(0, 3, 8, 5), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 6, 1))
def calls_normed(x): return normed(x)
grouped = nn.Sequential(masked(0, 3, 8, 5), nn.GroupNorm(2, 8))
all_a = nn.Sequential(masked(0, 3, 8, 3), masked(0, 8, 8, 3))
twice = nn.Sequential(masked(0, 3, 8, 5), nn.Conv2d(8, 6, 1)).double()
zeroed = nn.Sequential(masked(0, 3, 8, 3), nn.Conv2d(8, 6, 1))
nn.init.zeros_(zeroed[1].weight)
'''
BESIDE = '''
import torch
from torch.nn.functional import pad
def left(x): return pad(x, (1, 0))[..., :-1].sum(1, keepdim=True)
def above(x): return (pad(x, (1, 1, 1, 0))[..., :-1, 1:-1]
                      + pad(x, (0, 1, 1, 0))[..., :-1, 1:]).sum(1, keepdim=True)
'''


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """The working directory has the networks of a student."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(NETWORKS)
    (tmp_path / "beside.py").write_text(BESIDE)
    (tmp_path / "broken.py").write_text("x = 1\nif x\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no data')\n")
    monkeypatch.delitem(__import__("sys").modules, "beside", raising=False)
    return tmp_path


def checking(capsys, *arguments):
    """(status, lines on stdout, the program's lines on stderr) of `check`."""
    capsys.readouterr()
    try:
        status = main(["check", *map(str, arguments)])
    except SystemExit as exit:
        status = exit.code
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    lines = error.replace("\r", "\n").splitlines()
    return status, out.splitlines(), [line for line in lines if line.startswith("pixelaux: ")]


@pytest.mark.parametrize("name, failing", [
    ("right", []), ("one_off", ["causal"]), ("stack", ["sees all before it"]),
    ("Built", []), ("function", []), ("made", []), ("calls_normed", []), ("twice", []),
    ("grouped", ["causal"]), ("all_a", ["sees all before it"])])
def test_the_command_tells_what_is_wrong_with_a_network(networks, capsys, name, failing):
    """A module, a class and a function, in float64 or float32; status 1 if something is."""
    status, out, error = checking(capsys, f"own.py:{name}", "--shape", "3x6x7")
    verdicts = words_of(out)
    bad = "BLIND" if name == "stack" else "FAILS"
    assert verdicts == {question: bad if question in failing else "OK"
                        for question in ("causal", "sees all before it")}
    assert status == (1 if failing else 0)
    told = [f"pixelaux: own.py:{name} fails: {', '.join(failing)}"] if failing else []
    assert error == told
    picture = f"{name}-receptive-field.png"
    assert out[-1].startswith(picture) and Image.open(picture).size[0] > 600
    if name == "one_off":
        assert "output (3, 3) is touched by pixel (3, 3), gradient 0." in out[0]
    hint = {"grouped": "normalisation", "all_a": "mask A"}.get(name, "")
    assert hint in "".join(out)
    if name == "stack":
        assert "output (3, 3) does not see earlier pixels at offsets (-1, +2)" in out[1]


def words_of(lines):
    """{question: its verdict} of the lines on stdout."""
    found = [re.match("(.{27}) (OK|FAILS|BLIND|-) ", line) for line in lines]
    return {each[1].strip(): each[2] for each in found if each}


@pytest.mark.parametrize("name, passes", [
    ("stack", True), ("right", True), ("one_off", False), ("all_a", False)])
def test_a_blind_spot_may_be_allowed_and_nothing_else(networks, capsys, name, passes):
    """With --blind-spot-ok it is told all the same; other pixels that are not seen still fail."""
    status, out, error = checking(capsys, f"own.py:{name}", "--shape", "3x6x7", "--blind-spot-ok")
    assert status == (0 if passes else 1) and bool(error) != passes
    plain = checking(capsys, f"own.py:{name}", "--shape", "3x6x7")
    assert plain[1] == out and plain[0] == (0 if name == "right" else 1)  # control
    words = {"stack": "BLIND", "all_a": "FAILS"}
    assert words_of(out)["sees all before it"] == words.get(name, "OK")


@pytest.mark.parametrize("name, verdict, claimed", [
    ("by_channel", "OK", "OK"), ("independent", "OK", "FAILS"), ("sees_its_own", "FAILS", "FAILS"),
    ("reversed_channels", "FAILS", "FAILS")])
def test_parameters_by_channel_tell_the_order_of_channels(networks, capsys, name, verdict, claimed):
    """Outputs (N, P, C, H, W): each channel's may see those before it; with the flag, must."""
    for more, expected in (((), verdict), (("--channel-order",), claimed)):
        status, out, _ = checking(capsys, f"own.py:{name}", "--shape", "3x5x6", *more)
        words = words_of(out)
        assert words["order of the channels"] == expected and status == (expected == "FAILS")
        assert words["causal"] == ("OK" if name in ("by_channel", "independent") else "FAILS")
    if name == "sees_its_own":
        assert "mask A" in "".join(out)


def test_the_order_of_channels_from_the_command_line(networks, capsys):
    """--channel-order asks one question more; an output of five groups of one cannot have it."""
    status, out, _ = checking(capsys, "own.py:right", "--shape", "3x5x5", "--channel-order")
    assert status == 1 and "group 1 does not see channel 0" in "\n".join(out)
    status, _, error = checking(capsys, "own.py:five", "--shape", "3x5x5", "--channel-order")
    assert status == 2 and "--channel-order: 3 equal groups" in error[0]


WRONG = [
    ("own.py:gone", "'gone'"), ("gone.py:net", "gone.py: no such file"),
    ("own.py", "expected FILE.py:NAME"), ("own.py:", "own.py"), ("own.py:number", "'number'"),
    ("broken.py:net", "broken.py: cannot be imported: SyntaxError"),
    ("leaves.py:net", "leaves.py, line 2: cannot be imported: SystemExit: no data"),
    ("own.py:Demanding", "Demanding() cannot be built without arguments (write net"),
    ("own.py:smaller", "expected (2, P, 6, 7) or (2, P, 3, 6, 7), got (2, 3, 5, 6)"),
    ("own.py:other_way", "expected (2, P, 6, 7) or (2, P, 3, 6, 7), got (2, 3, 2, 6, 7)"),
    ("own.py:zeroed", "all weights of a layer 0"),
    ("own.py:right --shape 1x6x7", "--shape CxHxW gives another"),
    ("gone --blind-spot-ok", "--blind-spot-ok"),
    ("own.py:flat", "got (2, 6, 7)"), ("own.py:pair", "got a tuple"),
    ("own.py:raising",
     "of an input (2, 3, 6, 7) (--shape CxHxW gives another): KeyError: 'no such"),
    ("own.py:untied", "no gradient"), ("own.py:detached", "no gradient"),
    ("own.py:embedded", "no gradient leads from any output to any pixel"),
    ("own.py:infinite", "not finite"), ("own.py:undone", "its gradients: RuntimeError"),
    ("own.py:right --shape 4x6x7", "RuntimeError"), ("own.py:right --shape 3x6", "--shape"),
    ("own.py:right --shape 3x0x6", "--shape"), ("own.py:right --shape 3x99x6", "--shape"),
    ("gone", "gone: no such checkpoint"), ("gone --shape 3x6x7", "--shape"), ("", "what"),
    ("gone --out x.png", "--out"), ("gone --channel-order", "--channel-order"),
]


@pytest.mark.parametrize("line, expected", WRONG, ids=[line for line, _ in WRONG])
def test_what_cannot_be_checked_is_one_line_and_status_2(networks, capsys, line, expected):
    """It names the file, and the exception of the user's code by its type and message."""
    words = line.split()
    if ".py:" in line and "--shape" not in line:
        words += ["--shape", "3x6x7"]
    status, out, error = checking(capsys, *words)
    assert status == 2 and out == [] and len(error) == 1, (out, error)
    assert expected in error[0] or (line == "" and "required" in error[0])
    assert not list(networks.glob("*.png"))


def test_a_picture_that_cannot_be_written_costs_no_answers(networks, capsys):
    status, lines, errors = checking(
        capsys, "own.py:right", "--shape", "3x6x7", "--out", "beside.py/x.png")
    assert status == 2 and lines[0].startswith("causal") and "OK" in lines[0]
    assert errors == ["pixelaux: beside.py: File exists"]


def test_a_check_leaves_the_program_as_it_was(networks, capsys):
    """Random numbers, sys.path and gradients; whatever style matplotlib has, the picture is the
    same."""
    import sys

    import matplotlib

    path, state = list(sys.path), torch.get_rng_state()
    arguments = ("own.py:one_off", "--shape", "3x6x7", "--out")
    checking(capsys, *arguments, "first.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True}), torch.no_grad():
        torch.rand(1)  # control
        assert not torch.equal(torch.get_rng_state(), state)
        checking(capsys, *arguments, "second.png")
    torch.set_rng_state(state)
    assert sys.path == path and torch.is_grad_enabled()
    assert pathlib.Path("first.png").read_bytes() == pathlib.Path("second.png").read_bytes()


def test_the_picture_marks_what_is_seen_blind_and_forbidden(networks, capsys, monkeypatch):
    """Cells are blue where an earlier pixel is seen, hatched where it is not and should be, red
    where the output sees what it must not, and nothing elsewhere."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    found = sight.Sight(masked_stack(mask("xxx", "xx.", "x.."), B), (2, 7, 9))
    check.save_picture(found, sight.answers(found), "own.py:net", "net.png")
    (figure,) = figures
    axis = figure.axes[0]
    cells = {"red": set(), "hatched": set(), "frame": set()}
    for patch in axis.patches:
        place = (round(patch.get_y() + 0.5), round(patch.get_x() + 0.5))
        if patch.get_hatch():
            cells["hatched"].add(place)
        elif patch.get_facecolor() == (1, 0, 0, 1):
            cells["red"].add(place)
        elif patch.get_linewidth() == 2:
            cells["frame"].add(place)
    seen = sums(offsets_of(mask("xxx", "xx.", "x..")), offsets_of(B))

    def at(offsets):
        return {(3 + down, 4 + right) for down, right in offsets}

    blue = {tuple(place) for place in np.argwhere(axis.images[0].get_array() > 0).tolist()}
    assert blue == at(before(seen)) and cells["red"] == at(seen - before(seen)) != set()
    assert cells["hatched"] == at({(-1, 2)}) and cells["frame"] == at({(0, 0)})
    title = figure.get_suptitle()
    assert "own.py:net" in title and "output (3, 4) is touched by pixel" in title
    assert axis.get_xlabel() == "column" and axis.get_ylabel() == "row"
    assert len(axis.get_legend().get_texts()) == 4 and len(figure.axes) == 2
    picture = np.array(Image.open("net.png").convert("RGB")).reshape(-1, 3)
    assert (picture == (255, 0, 0)).all(1).sum() > 1000


# --- Check: a run --------------------------------------------------------------------------------

PROMISES = ["causal", "normalised", "fast = naive", "psi(sample) = x_hat",
            "coded = likelihood"]


def saved_small(out, name="pyramid", size=(8, 8), spoil=lambda model: None, **more):
    """A checkpoint of a small model, its weights far from their start."""
    options = dict(nr_filters=4, nr_logistic_mix=2, layout=six_stages(1), layout_cond=six_stages(1),
                   layout_light=((0, 1),), layout_embed=((1, 1), (0, 1)))
    halvings = 1 if "pyramid" in name else -1
    model = build(name, size, halvings=halvings, **{**options, **more})
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(256, (16, 3, *size), generator=generator, dtype=torch.uint8)
    model.initialise(x)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    spoil(model)
    weights = {k: factor.state_dict() for k, factor in enumerate(model.factors)}
    pixelaux.write_checkpoint(out, model.config, weights)
    return out


def verdicts_of(lines):
    """{name of a check: does it hold} of the lines on stdout."""
    found = {}
    for line in lines:
        if verdict := re.match("(.{27}) (OK   |FAILS|-    )  .", line):
            found[verdict[1].strip()] = {"O": True, "F": False, "-": None}[verdict[2][0]]
    return found


def test_a_run_that_was_trained_for_a_moment_holds_what_it_promises(tmp_path, monkeypatch, capsys):
    """From the command line, status 0; a line for each promise, and no others."""
    tiny = dict(pixelaux.PRESETS["tiny"], nr_filters=4, nr_logistic_mix=2, steps=(4, 4))
    monkeypatch.setitem(pixelaux.PRESETS, "tiny", tiny)
    arguments = ["train", "--size", "12", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(arguments) == 0
    status, out, error = checking(capsys, tmp_path / "run")
    assert (status, error) == (0, []) and verdicts_of(out) == dict.fromkeys(PROMISES, True)
    assert len(out) == 1 + len(PROMISES)


@pytest.mark.parametrize("name, size, at", [
    ("pixelcnn", (8, 8), "8x8"), ("grayscale", (4, 8), "4x8"), ("pyramid", (32, 24), "16x16")])
def test_models_of_every_kind_and_size_hold(tmp_path, capsys, name, size, at):
    """Larger ones are looked at in a smaller size with the same weights."""
    run = saved_small(tmp_path / "run.pt", name, size, layout=((0, 1),), layout_cond=((0, 1),))
    status, out, error = checking(capsys, run)
    assert (status, error) == (0, []) and f", at {at} in float64" in out[0]
    assert verdicts_of(out) == dict.fromkeys(PROMISES, True)


@pytest.mark.parametrize("name", ["pixelcnn", "grayscale"])
def test_networks_of_three_resolutions_are_blind_nowhere_at_the_size_that_is_checked(name):
    """What comes by way of a coarser resolution reaches further for some outputs than for their
    neighbours: this is no blind spot. Control: without what h reads of v there is one."""
    model = build(name, 16, nr_filters=4, nr_logistic_mix=1, dropout=0.0).double().eval()
    views = model.views_of(torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8))
    assert promises.causal(model, views)[0]
    for vertical, horizontal in itertools.chain(*(s.blocks for s in model.factors[0].net.stages)):
        horizontal.conv_aux[0].g.data.zero_()
    holds, found = promises.causal(model, views)
    assert not holds and "blind spot" in found


def reads_too_far(monkeypatch):
    """The horizontal stream's first layer reads its own column, in training alone."""
    convolve = Conv.convolve

    def shifted(self, x, weight, bias):
        y = convolve(self, x, weight, bias)
        return F.pad(y[..., 1:], (0, 1)) if self.columns == (-1, -1) else y

    monkeypatch.setattr(Conv, "convolve", shifted)


def reads_too_far_everywhere(monkeypatch):
    """The same, and the fast sampler knows it."""
    init = Conv.__init__

    def shifted(self, *arguments, **options):
        init(self, *arguments, **options)
        if self.columns == (-1, -1):
            self.columns = (0, 0)

    monkeypatch.setattr(Conv, "__init__", shifted)


def drops_a_mass(monkeypatch):
    """The last level's bin ends, where it should be open."""
    mass = pixelaux.log_mass

    def closed(means, log_scales, lo, hi, levels):
        return mass(means, log_scales, lo, hi, levels) - 0.01 * (hi == levels - 1)

    monkeypatch.setattr(pixelaux, "log_mass", closed)


def loses_a_little(monkeypatch):
    log_prob = LogisticMixture.log_prob
    monkeypatch.setattr(LogisticMixture, "log_prob", lambda *args: log_prob(*args) - 1e-7)


def another_formula_without_a_cut(monkeypatch):
    log_prob = LogisticMixture.log_prob

    def other(self, x, intervals=None):
        return log_prob(self, x, intervals) + (1e-7 if intervals is None else 0.0)

    monkeypatch.setattr(LogisticMixture, "log_prob", other)


def samples_otherwise(monkeypatch):
    fast = pixelaux.sample_fast

    def other(*arguments, **options):
        x = fast(*arguments, **options)
        x[0, 0, -1, -1] ^= 1
        return x

    monkeypatch.setattr(pixelaux, "sample_fast", other)


def cuts_too_wide(monkeypatch):
    bounds = Half.bounds
    monkeypatch.setattr(Half, "bounds", lambda self, x, x_hat: (
        (bounds(self, x, x_hat)[0] - 9).clamp(min=0), bounds(self, x, x_hat)[1]))


def reports_otherwise(monkeypatch):
    log_prob = pixelaux.PixelAux.log_prob
    monkeypatch.setattr(pixelaux.PixelAux, "log_prob", lambda *args: log_prob(*args) + 1e-3)


def codes_by_another_pmf(monkeypatch):
    """As good as the right one within 1e-6, and decodable."""
    pmf = codec.pmf

    def other(*arguments):
        table = pmf(*arguments)
        return (1 - 1e-6) * table + 1e-6 / table.shape[1]

    monkeypatch.setattr(codec, "pmf", other)


def restores_otherwise(monkeypatch):
    decompress = codec.decompress

    def other(*arguments):
        x = decompress(*arguments)
        x[-1, -1, -1, -1] ^= 1
        return x

    monkeypatch.setattr(codec, "decompress", other)


def wastes_words(monkeypatch):
    """Three words that nobody needs."""
    compress = codec.compress
    monkeypatch.setattr(codec, "compress", lambda *arguments: [
        np.append(words, np.zeros(3, np.uint32)) for words in compress(*arguments)])


def test_bits_are_within_two_words_of_the_likelihood_and_what_is_ideal_is_it(tmp_path):
    """Of images of a model's own: the bound that `check` relies on. Without --tight, too."""
    model = pixelaux.load(saved_small(tmp_path / "run.pt"), "cpu").double()
    x = model.sample(40, tight=True)[-1]
    for tight in (True, False):
        bits = -model.log_prob(x, tight).detach() / np.log(2)
        ideal = torch.tensor(codec.ideal_bits(model, x, tight), dtype=torch.float64)
        assert torch.allclose(ideal, bits, rtol=1e-11)
    bits = -model.log_prob(x, True).detach() / np.log(2)
    spent = torch.tensor([32.0 * len(words) for words in codec.compress(model, x)])
    over = spent - bits
    assert 0 < over.min() and over.max() <= 64
    assert over.max() > 16  # control: it is not the ideal


def test_without_constriction_the_rest_is_told_and_status_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    status, out, error = checking(capsys, saved_small(tmp_path / "run.pt"))
    expected = {**dict.fromkeys(PROMISES, True), "coded = likelihood": None}
    assert (status, error) == (0, []) and verdicts_of(out) == expected
    assert "constriction is missing" in out[-1]


@pytest.mark.parametrize("sabotage, failing", [
    (lambda monkeypatch: None, set()),  # control
    (reads_too_far, {"causal", "fast = naive", "coded = likelihood"}),
    (reads_too_far_everywhere, {"causal", "fast = naive", "psi(sample) = x_hat",
                                "coded = likelihood"}),
    (drops_a_mass, {"normalised"}), (loses_a_little, {"normalised"}),
    (another_formula_without_a_cut, {"normalised"}),
    (samples_otherwise, {"fast = naive"}), (cuts_too_wide, {"psi(sample) = x_hat"}),
    (reports_otherwise, {"coded = likelihood"}), (codes_by_another_pmf, {"coded = likelihood"}),
    (restores_otherwise, {"coded = likelihood"}), (wastes_words, {"coded = likelihood"})])
def test_what_is_spoiled_fails_and_the_rest_is_told_all_the_same(
        tmp_path, monkeypatch, capsys, sabotage, failing):
    """Each break of a promise is found under its name; all lines are there, then status 1."""
    run = saved_small(tmp_path / "run.pt")
    sabotage(monkeypatch)
    status, out, error = checking(capsys, run)
    verdicts = verdicts_of(out)
    assert list(verdicts) == PROMISES and status == (1 if failing else 0)
    assert failing <= {name for name in PROMISES if not verdicts[name]}
    fails = [name for name in PROMISES if not verdicts[name]]
    assert error == ([f"pixelaux: {run} fails: {', '.join(fails)}"] if failing else [])


def test_weights_that_see_nothing_to_the_left_are_blind(tmp_path, capsys):
    """A network may be blind by its weights alone, and everything else holds."""
    def spoil(model):
        for stage in model.factors[1].net.stages:
            for _, horizontal in stage.blocks:
                horizontal.conv_in.v.data[..., :-1] = 0
                horizontal.conv_out.v.data[..., :-1] = 0
        model.factors[1].net.h_left.g.data.zero_()

    status, out, _ = checking(capsys, saved_small(tmp_path / "run.pt", spoil=spoil))
    assert status == 1 and verdicts_of(out) == {name: name != "causal" for name in PROMISES}
    assert "8x8 | 4x4: output" in out[1] and "does not see" in out[1] and "(0, -1)" in out[1]


@pytest.mark.parametrize("module", [check, promises, sight])
def test_check_takes_public_names_alone(module):
    used = names_used(pathlib.Path(module.__file__))
    assert used["pixelaux"]  # control
    assert not any(name.startswith("_") or not hasattr(pixelaux, name) for name in used["pixelaux"])
    assert not any(name.split(".")[0] == "tools" for name in used)
