"""What the outputs of a network see: is it causal, is it blind anywhere? In words, and a picture.

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
import textwrap

import torch

from pixelaux import Problem, progress_bar, tool, write_atomically

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

    network: (N, C, H, W) -> (N, P, H, W). order: the P parameters of an output are in C equal
    groups, and group c may see the channels before c of its own pixel, too.
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
        self.touched = self.seen & (number >= number[:, None])  # by what is forbidden
        if order:  # `channel_order` looks at an output's own pixel
            self.touched.fill_diagonal_(False)

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
        # A random combination of the parameters: their gradients do not cancel.
        y = y * random_inputs(y.shape[1:], ATTEMPTS + number, y.dtype)
        y = y.unflatten(1, (self.groups, -1)).sum(2).flatten(2)  # (2, groups, outputs)
        for i in progress_bar(outputs, desc="gradients", delay=1, mininterval=1, leave=False):
            for group in range(self.groups):
                grad = gradient(y[:, group, i].sum(), x)
                self.by_channel[i, group] |= (grad != 0).any(0).flatten(1)

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

    def strengths(self, i):
        """The largest |gradient| of a parameter of output i by each sub-pixel, (C, pixels)."""
        x = [random_inputs(self.shape, attempt, self.dtype) for attempt in range(ATTEMPTS)]
        x = torch.cat(x).requires_grad_()
        largest = torch.zeros(self.shape, dtype=self.dtype)
        for parameter in self.network(x * 1).flatten(2)[:, :, i].sum(0):
            largest = torch.maximum(largest, gradient(parameter, x).abs().amax(0))
        return largest.flatten(1)

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


def answers(sight):
    """[(name of a question, does it hold, what was found, in lines)]"""
    found = [("causal", *causal(sight)), ("sees all before it", *sees_all(sight))]
    return [*found, ("order of the channels", *channel_order(sight))] if sight.order else found


def causal(sight):
    """Is no output touched by itself or a pixel after it?"""
    after = "after" if sight.order else "at or after"
    touched = int(sight.touched.any(1).sum())
    if touched == 0:
        return True, f"none of {sight.pixels:,} outputs is touched by a pixel {after} it"
    i = sight.example(sight.touched)
    strengths = sight.strengths(i).amax(0).masked_fill(~sight.touched[i], 0)
    pixel = int(strengths.argmax())
    return False, (
        f"output {sight.place(i)} is touched by pixel {sight.place(pixel)}, gradient "
        f"{strengths[pixel]:.2g}\nit is touched by pixels at offsets "
        f"{sight.offsets(i, sight.touched[i])}; {touched} of {sight.pixels:,} outputs are touched"
        f"{diagnosis(sight, i)}")


def diagnosis(sight, i):
    """Of which mistake it is a sign that output i sees what it sees."""
    row, column = divmod(i, sight.width)
    rows, columns = sight.seen[i].view(sight.height, sight.width).nonzero().T
    by_columns = (columns < column) | ((columns == column) & (rows < row))
    if not sight.touched[i, i + 1 :].any() and not sight.order:
        return "\nit sees itself: the first layer must leave its centre out (mask A, not B)"
    if not sight.seen[i, :i].any():
        return "\nit sees nothing that comes before it: the mask is the wrong way round"
    if by_columns.all():
        return "\nit sees column by column: rows and columns are exchanged"
    if sight.seen[i, :i].any() and rows.max() - row == row - rows.min():
        return "\nit sees as far down as up: no mask is at work"
    return ""


def sees_all(sight):
    """Does every earlier pixel within reach arrive?"""
    blind = int(sight.blind.any(1).sum())
    i = sight.example(sight.blind)
    place = sight.place(i)
    if blind == 0:
        row, column = divmod(i, sight.width)
        rows, columns = sight.reach[i].view(sight.height, sight.width).nonzero().T.tolist()
        up, left = row - min([row, *rows]), column - min([column, *columns])
        right = max([column, *columns]) - column
        return True, (f"every earlier pixel within reach arrives; for output {place} that is {up} "
                      f"rows up, {left} columns to the left and {right} to the right")
    if not sight.seen[i, :i].any():
        return False, f"output {place} sees no pixel that comes before it"
    return False, (
        f"blind spot: output {place} does not see earlier pixels at offsets "
        f"{sight.offsets(i, sight.blind[i])}\n{blind} of {sight.pixels:,} outputs are blind: a "
        "valid model still, but a second stream, of the rows above, would see more")


def channel_order(sight):
    """Does group c see the channels before c of its own pixel, and no others?"""
    own = sight.by_channel.diagonal(dim1=0, dim2=3).any(2)  # (groups, C)
    before = torch.ones_like(own).tril(-1)
    if torch.equal(own, before):
        return True, "group c sees the channels before c of its own pixel, and no others"
    found = []
    for group, channel in (own & ~before).nonzero().tolist():
        found.append(f"group {group} is touched by channel {channel} of its own pixel")
    for group, channel in (before & ~own).nonzero().tolist():
        found.append(f"group {group} does not see channel {channel} of its own pixel")
    if torch.equal(own, before.T):
        found.append("the order of the channels is the wrong way round")
    return False, "\n".join(found)


def of_model(model, views):
    """`causal` and `sees_all` of all networks of a model, given images of all its views."""
    outputs = 0
    for name, factor, x_hat in zip(model.names, model.factors, [None, *views]):
        embeddings = [each[:1] for each in factor.embeddings(x_hat)]

        def network(x):
            """Of x (N, C, H, W), which need not be levels, and their plane of ones."""
            planes = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            return factor.net(planes, [each.expand(len(x), -1, -1, -1) for each in embeddings])

        with torch.enable_grad():
            sight = Sight(network, factor.view.shape, dtype=factor.a_weight.dtype)
            for holds, found in (causal(sight), sees_all(sight)):
                if not holds:
                    return False, f"{name}: {found.splitlines()[0]}"
        outputs += sight.pixels
    return True, (f"{outputs:,} outputs of {len(views)} networks see every earlier pixel within "
                  "reach, and no other")


# --- The receptive field as a picture ----------------------------------------------------------


def save_picture(sight, answers, what, path):
    """A .png: what an output of the network `what` sees, should see and must not see."""
    matplotlib = tool("curves").import_matplotlib()
    from matplotlib.figure import Figure

    faults = [found.splitlines()[0] for _, holds, found in answers if not holds]
    faults = faults or ["causal, and sees every earlier pixel within reach"]
    title = "\n".join([what, *(textwrap.fill(fault, 80) for fault in faults)])
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has chosen, LaTeX among it
        figure = Figure(figsize=(6.4, 6), layout="constrained")
        figure.suptitle(title, fontsize=10)
        draw(figure, figure.subplots(), sight)
        write_atomically(path, functools.partial(figure.savefig, dpi=120, format="png"))


def draw(figure, axis, sight):
    """The gradients of an output, one with a fault if there is any, as cells."""
    from matplotlib import colormaps, colors
    from matplotlib.patches import Patch, Rectangle

    i = sight.example(sight.touched if sight.touched.any() else sight.blind)
    strengths = sight.strengths(i).amax(0)
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
