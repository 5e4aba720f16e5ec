"""What the outputs of a network see: is it causal, is it blind anywhere?

By Eq. 1 an output may see the pixels before it, in raster order, and no others; and it should see
all of them, as far as it looks. Gradients tell: an output sees a pixel if at one of several random
inputs its gradient there is not exactly 0. (At a single input a relu may be off, a sigmoid flat.)

Forbidden is the output's own pixel, and those after it: a network that sees them predicts what it
has read, so that its likelihood is far too good and its samples are noise. An earlier pixel *within
reach* that does not arrive is a blind spot, "?": the model is valid, but poorer.

    x x x x x x x     Three layers of masked 3x3 convolutions, the first without its centre: a step
    x x x x x x ?     to the right is to be had only together with a step up. Within reach is the
    x x x x x ? ?     box that goes as far up as the output o sees straight above it, as far to the
    x x x o           left as it sees in its own row, and as far to the right as to the left, unless
                      nothing there is seen at all; and o's four neighbours in any case.

(The box of all that is seen would be too large: what passes a coarser resolution comes from far,
but not from the row above; and two streams may end at different columns.)
"""
import functools

import torch

from pixelaux import Problem, progress_bar

ATTEMPTS = 20  # at most, each with two inputs


def random_inputs(shape, attempt, dtype):
    """(2, C, H, W): one of a size from a tenth to one, one up to ten; a function of `attempt`."""
    generator = torch.Generator().manual_seed(attempt)
    tens = torch.rand(2, 1, 1, 1, generator=generator, dtype=torch.float64)
    tens[0] -= 1
    x = 10**tens * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype)


def gradient(y, x):
    """dy / dx of a number y, like x; 0 where there is none."""
    (grad,) = torch.autograd.grad(y, x, retain_graph=True, allow_unused=True)
    if grad is None:
        return torch.zeros_like(x)
    if not grad.isfinite().all():
        raise Problem("the network has gradients that are not finite numbers")
    return grad


class Sight:
    """What each output of a network sees. Outputs and pixels are numbered in raster order; tables
    of them are bool (outputs, pixels).

    network: (N, C, H, W) -> (N, P, H, W). order: the P parameters of an output are C groups of
    P / C, and group c may see the channels before c of its own pixel, too.
    Raises Problem where gradients are not finite.
    """

    def __init__(self, network, shape, order=False, dtype=torch.float64):
        self.network, self.shape, self.order, self.dtype = network, shape, order, dtype
        channels, self.height, self.width = shape
        self.groups = channels if order else 1
        self.pixels = self.height * self.width
        size = self.pixels, self.groups, channels, self.pixels
        self.by_channel = torch.zeros(size, dtype=torch.bool)
        self.look()

        number = torch.arange(self.pixels)
        own = ~self.allowed_of_its_own()
        after = (number > number[:, None])[:, None, None]
        itself = (number == number[:, None])[:, None, None]
        self.forbidden = self.by_channel & (after | itself & own[:, :, None])
        self.touched = self.forbidden.any(1).any(1)

    def look(self):
        """Try inputs until they add nothing; then again, for the outputs that are blind."""
        outputs, idle = range(self.pixels), 0
        for attempt in range(ATTEMPTS):
            before = int(self.by_channel.sum())
            self.attempt(attempt, outputs)
            if int(self.by_channel.sum()) == before:
                idle += 1
            self.seen = self.by_channel.any(1).any(1)
            self.reach = torch.stack([self.reach_of(i) for i in range(self.pixels)])
            self.blind = self.reach & ~self.seen
            if idle > 0:
                outputs = self.blind.any(1).nonzero().flatten().tolist()
            if len(outputs) == 0 or idle == 4:
                break

    def attempt(self, number, outputs):
        """Add to `by_channel` what the outputs see at the inputs of an attempt."""
        x = random_inputs(self.shape, number, self.dtype).requires_grad_()
        y = self.network(x * 1)  # not x itself: it may be changed in place
        self.parameters = y.shape[1]
        # A random combination of the parameters: their gradients do not cancel.
        y = y * random_inputs(y.shape[1:], ATTEMPTS + number, y.dtype)
        y = y.unflatten(1, (self.groups, -1)).sum(2).flatten(2)  # (2, groups, outputs)
        for i in progress_bar(outputs, desc="gradients", delay=1, mininterval=1, leave=False):
            for group in range(self.groups):
                grad = gradient(y[:, group, i].sum(), x)
                self.by_channel[i, group] |= (grad != 0).any(0).flatten(1)

    def allowed_of_its_own(self):
        """Which channels of its own pixel each group may see, bool (groups, C)."""
        return torch.ones(self.by_channel.shape[1:3], dtype=torch.bool).tril(-1) & self.order

    def only_the_blind_spot(self):
        """Are all blind outputs blind above and to the right alone, the neighbour there excepted?
        (A single stack of right masks is; what does not see its neighbours has another fault.)"""
        number = torch.arange(self.pixels)
        row, column = number // self.width, number % self.width
        up, right = row[:, None] - row, column - column[:, None]
        spot = (up > 0) & (right > 0) & (up + right > 2)
        return not (self.blind & ~spot).any()

    def reach_of(self, i):
        """What is within reach of output i, bool (pixels,): see the top of the file."""
        row, column = divmod(i, self.width)
        seen = self.seen[i].view(self.height, self.width)
        # From the first pixel seen straight above it, or to its left; the neighbours at the least.
        top = min([max(row - 1, 0), *seen[:row, column].nonzero().flatten().tolist()])
        left = min([max(column - 1, 0), *seen[row, :column].nonzero().flatten().tolist()])
        right = max([column + 1, *seen[:row].nonzero()[:, 1].tolist()])
        right = min(right, column + max(1, column - left))
        reach = torch.zeros_like(seen)
        reach[top:row, left : right + 1] = True
        reach[row, left:column] = True
        return reach.flatten()

    def example(self, table):
        """An output with entries in a table: the middle one, unless only others have any."""
        middle = self.height // 2 * self.width + self.width // 2
        counts = table.sum(1)
        return middle if counts[middle] or not counts.any() else int(counts.argmax())

    @functools.lru_cache(maxsize=1)  # `causal` and the picture ask for the same output
    def strengths(self, i):
        """The largest |gradient| of a parameter of each group of output i by each sub-pixel,
        (groups, C, pixels)."""
        attempts = max(2, ATTEMPTS * 100 // max(100, self.parameters))  # 768 of them take time
        x = [random_inputs(self.shape, attempt, self.dtype) for attempt in range(attempts)]
        x = torch.cat(x).requires_grad_()
        y = self.network(x * 1).flatten(2)[:, :, i].sum(0).view(self.groups, -1)
        largest = torch.zeros(self.groups, *self.shape, dtype=self.dtype)
        for of_group, parameters in zip(largest, y):
            for parameter in parameters:
                grad = gradient(parameter, x).abs().amax(0)
                torch.maximum(of_group, grad, out=of_group)
        return largest.flatten(2)

    def place(self, i):
        return f"({i // self.width}, {i % self.width})"

    def offsets(self, i, pixels, most=8):
        """Where pixels, bool (pixels,), lie as seen from output i: (rows down, columns right)."""
        row, column = divmod(i, self.width)
        words = []
        for number in pixels.nonzero().flatten().tolist():
            down, right = number // self.width - row, number % self.width - column
            words.append(f"({down:+d}, {right:+d})".replace("+0", "0"))
        more = f" and {len(words) - most} more" if len(words) > most else ""
        return ", ".join(words[:most]) + more


# --- Questions: each -> (does it hold, what was found) -----------------------------------------


def answers(sight, claimed=True):
    """[(name of a question, "OK", "BLIND" or "FAILS", what was found, in lines)]. claimed: each
    group must see the channels before its own; otherwise it may."""
    found = [("causal", *causal(sight)), ("sees all before it", *sees_all(sight))]
    if sight.order:
        found.append(("order of the channels", *channel_order(sight, claimed)))
    answers = []
    for name, holds, text in found:
        verdict = "OK" if holds else "FAILS"
        if name == "sees all before it" and not holds and sight.only_the_blind_spot():
            verdict = "BLIND"
        answers.append((name, verdict, text))
    return answers


def causal(sight):
    """Is no output touched by itself or a pixel after it?"""
    after = "after" if sight.order else "at or after"
    touched = int(sight.touched.any(1).sum())
    if touched == 0:
        return True, f"none of {sight.pixels:,} outputs is touched by a pixel {after} it"
    i = sight.example(sight.touched)
    strengths = sight.strengths(i).masked_fill(~sight.forbidden[i], 0).amax((0, 1))
    pixel = int(strengths.argmax())
    lines = [f"output {sight.place(i)} is touched by pixel {sight.place(pixel)}, gradient "
             f"{strengths[pixel]:.2g}; {touched} of {sight.pixels:,} outputs are touched"]
    if sight.touched[i].sum() > 1:
        lines.append(f"it is touched by pixels at offsets {sight.offsets(i, sight.touched[i])}")
    return False, "\n".join([*lines, *diagnosis(sight, i)])


def diagnosis(sight, i):
    """[of which mistake it is a sign that output i sees what it sees], if that is known."""
    row, column = divmod(i, sight.width)
    rows, columns = sight.seen[i].view(sight.height, sight.width).nonzero().T
    by_columns = (columns < column) | ((columns == column) & (rows < row))
    if not sight.touched[i, i + 1 :].any():
        if excused(sight):
            return ["only the channels before its own: with --channel-order that is right"]
        if torch.equal(sight.forbidden[i, :, :, i], ~sight.allowed_of_its_own()):
            return ["it sees itself: the first layer must leave its centre out (mask A, not B)"]
        return []
    if not sight.seen[i, :i].any():
        return ["it sees nothing that comes before it: the mask is the wrong way round"]
    if by_columns.all():
        return ["it sees column by column: rows and columns are exchanged"]
    if sight.seen[i, :-1].all():  # the last pixel may be read by none
        return ["it sees the whole image: no mask, or a normalisation over pixels or the batch"]
    if rows.max() - row == row - rows.min():
        return ["it sees as far down as up: no mask is at work"]
    return []


def excused(sight):
    """Is what outputs see of their own pixel right by the order of the channels?"""
    channels = sight.shape[0]
    if sight.order or channels == 1 or sight.parameters % channels:
        return False
    ordered = Sight(sight.network, sight.shape, True, sight.dtype)
    return not ordered.touched.any()


def sees_all(sight):
    """Does every earlier pixel within reach arrive?"""
    i = sight.example(sight.blind)
    row, column = divmod(i, sight.width)
    place = sight.place(i)
    if not sight.blind.any():
        rows, columns = sight.reach[i].view(sight.height, sight.width).nonzero().T.tolist()
        up, left = row - min([row, *rows]), column - min([column, *columns])
        right = max([column, *columns]) - column
        return True, (f"every earlier pixel within reach arrives; for output {place} that is {up} "
                      f"rows up, {left} columns to the left and {right} to the right")
    if not sight.seen[i, :i].any():
        return False, f"output {place} sees no pixel that comes before it"
    text = f"output {place} does not see earlier pixels at offsets "
    text += sight.offsets(i, sight.blind[i])
    if sight.only_the_blind_spot():
        means = "causal and a valid model, but it ignores these pixels"
        if sight.touched.any():
            means = "a single stack of masks has it"
        return False, f"blind spot: {text}\n{means} (--blind-spot-ok: does not count)"
    if column > 0 and sight.blind[i, i - 1] and sight.seen[i, i - column : i].any():
        text += "\nnot its left neighbour, but others: has more than the first layer mask A?"
    return False, text


def channel_order(sight, claimed=True):
    """Does group c see no channels of its own pixel but those before c; if claimed, all these?"""
    own = sight.by_channel.diagonal(dim1=0, dim2=3).any(2)  # (groups, C)
    before = sight.allowed_of_its_own()
    found = []
    for group in range(sight.groups):
        if wrong := channels_in(own[group] & ~before[group]):
            found.append(f"group {group} is touched by channel {wrong} of its own pixel")
        if claimed and (missing := channels_in(before[group] & ~own[group])):
            found.append(f"group {group} does not see channel {missing} of its own pixel")
    if torch.equal(own, before.T):
        found.append("the order of the channels is the wrong way round")
    if found:
        return False, "\n".join(found)
    if not own.any():
        return True, "no group sees a channel of its own pixel"
    some = "the" if torch.equal(own, before) else "only some"
    return True, f"group c sees {some} channels before c of its own pixel, and no others"


def channels_in(row):
    return ", ".join(map(str, row.nonzero().flatten().tolist()))
