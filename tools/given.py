"""One's own pictures, of any size, doubled, colourised or completed: `sample RUN --given ..`."""
import dataclasses
import hashlib
import math
import pathlib

import numpy as np
import torch

from pixelaux import (
    Problem, evaluating, load, placed, progress_bar, read_npy, result_path, run_data, save_picture,
    to_array, to_tensor, tool, warn, write_atomically)

# --- What is given -----------------------------------------------------------------------------


@dataclasses.dataclass
class Given:
    """Images x of view k of a model of their size; k is X's if rows of X are given. original: X,
    uint8 (n, C, H, W), if it is known. size: (H, W) of X without what was padded. name: of no other
    images, so that no result takes the place of another."""

    name: str
    model: object
    x: torch.Tensor
    k: int
    original: torch.Tensor | None
    size: tuple


def name_of(path, images):
    """The file's stem, and 6 hexadecimal digits of what it holds: others may have that stem."""
    content = f"{images.shape}".encode() + images.tobytes()
    return f"{path.stem}-{hashlib.blake2b(content, digest_size=3).hexdigest()}"


def from_arrays(args, model):
    """Images of the test set or of a .npy file, of the trained size: X, or a view as it is."""
    finest = len(model.views) - 1
    if args.given == "test":
        images, name = run_data(args, model).test[: args.n or 16], "test"
    else:
        images = read_npy(args.given, channels={view.shape[0] for view in model.views})
        images = images[: args.n or 16]
        name = name_of(pathlib.Path(args.given), images)
    x = to_tensor(images)
    size, shape = model.config.size, tuple(x.shape[1:])
    if shape == model.views[-1].shape:
        check_rows(args, model, size[0])
        k = finest - 1 if args.view is None else args.view
        k = finest if args.rows else k
        return Given(name, model, model.views_of(x)[k], k, x, size)
    alike = [j for j in range(finest) if shape == model.views[j].shape]
    k = alike[0] if args.view is None and len(alike) == 1 else args.view
    if k not in alike or args.rows:
        known = ", ".join(f"{j}: {view.name} {view.shape}" for j, view in enumerate(model.views))
        raise Problem(f"--given {args.given}: (C, H, W) is {shape}, expected X's, or, without "
                      "--rows, a view's, and --view, its number, where several are alike: "
                      f"{known}")
    return Given(name, model, x, k, None, size)


def from_picture(args, model, path):
    """An image file of any size: X, if it is to be reduced or completed; or else the view, of which
    psi that keep the size, as Gray does, make what it has to be."""
    image = tool("images").read_image(path)
    finest = len(model.views) - 1
    k = finest - 1 if args.view is None else args.view
    if args.rows:
        check_rows(args, model, image.shape[0])
        k = finest
    psis = [view.psi for view in model.views[:k:-1]]
    whole = args.rows or args.reduce
    scale = 1 if whole else math.prod(psi.cell for psi in psis)
    height, width = image.shape[:2]
    padded, fitting = tool("drawing").padded(model, image, scale)
    if padded.shape != image.shape:
        print(f"{path}: {height}x{width} (height x width) is padded to {padded.shape[0]}x"
              f"{padded.shape[1]} by repeating its edges; results are cropped")
    x = to_tensor(padded[None])
    original = x if scale == 1 else None
    for psi in psis:
        if whole or psi.cell == 1:
            x = psi(x)
    view = fitting.views[k]
    if tuple(x.shape[1:]) != view.shape or int(x.max()) >= view.levels:
        raise Problem(f"--given {path}: no picture is {view.name} of {view.levels} levels as it "
                      "is; --reduce makes it of X")
    return Given(name_of(path, image), fitting, x, k, original, (scale * height, scale * width))


def pictures_in(folder):
    """Paths of the image files in a folder, by name. Raises Problem if there is none."""
    from PIL import Image

    endings, is_data = Image.registered_extensions(), tool("images").is_data
    paths = [path for path in sorted(folder.iterdir()) if is_data(path.name)]
    paths = [path for path in paths if path.suffix.lower() in endings and path.is_file()]
    if not paths:
        raise Problem(f"--given {folder}: no image files there")
    return paths


def check_flags(args, model):
    finest = len(model.views) - 1
    if args.view is not None and args.view not in range(finest):
        raise Problem(f"--view {args.view}: expected a view coarser than X, 0..{finest - 1}")
    if args.rows and (args.view is not None or args.reduce):
        raise Problem("--rows: it is X that is completed; leave --view and --reduce out")
    if not finest and not args.rows:
        raise Problem("--given: this model has no view to begin with; --rows R completes X")
    if args.candidates and not (args.rows and finest):
        raise Problem("--candidates: goes with --rows and a model of several views; a model of X "
                      "alone needs none")


def check_rows(args, model, height):
    """Rows that are kept make whole rows of all views, and there must be others."""
    cell = math.prod(view.psi.cell for view in model.views[1:])
    if args.rows and (args.rows % cell or args.rows >= height):
        raise Problem(f"--rows {args.rows}: expected a multiple of {cell}, below the height "
                      f"{height} of {args.given}")


def sources(args, model):
    """What is to be answered, one Given after the other; of a folder what cannot be read is told
    and skipped. Raises Problem."""
    path = pathlib.Path(args.given).expanduser()
    if args.given == "test" or args.given.endswith(".npy"):
        yield from_arrays(args, model)
    elif not path.is_dir():
        if args.n:
            raise Problem("--n: one image is given; --answers draws several answers to it")
        yield from_picture(args, model, path)
    else:
        for path in pictures_in(path)[: args.n]:
            try:
                given = from_picture(args, model, path)
            except Problem as error:
                warn(f"skipped {error}")
                continue
            yield given


# --- Results -----------------------------------------------------------------------------------


def cropped(given, k, x):
    """Images of view k without what was padded, uint8 (n, h, w, C), and the view's name then."""
    view, (height, width) = given.model.views[k], given.model.config.size
    h = math.ceil(given.size[0] * view.shape[1] / height)
    w = math.ceil(given.size[1] * view.shape[2] / width)
    name = dataclasses.replace(view, shape=(view.shape[0], h, w)).name
    return to_array(x[:, :, :h, :w]), name


def kinds_of(given, views, answers, rows):
    """{label: images to be shown, uint8 (n, h, w, 3)}: the original, what is given, answers."""
    def shown(k, x):
        shade = cropped(given, k, x)[0].astype(int) * 255 // (given.model.views[k].levels - 1)
        return np.broadcast_to(shade, (*shade.shape[:3], 3)).astype(np.uint8)

    finest, kinds = len(views) - 1, {}
    if given.original is not None:
        kinds["original"] = shown(finest, given.original)
    if rows:
        kinds["given"] = shown(finest, given.x)
        kinds["given"][:, rows:] = 128
    else:
        view, name = given.model.views[given.k], cropped(given, given.k, given.x)[1]
        bits = f"{(view.levels - 1).bit_length()}-bit " if view.label == "gray" else ""
        kinds[f"{bits}{name} given"] = shown(given.k, given.x)
    for a, x in enumerate(views[-1].chunk(answers)):
        kinds["answer" if answers == 1 else f"answer {a + 1}"] = shown(finest, x)
    return kinds


def save_columns(path, kinds):
    """A PNG of images under their labels, as large as the last one: side by side, or wide ones one
    below the other. kinds: {label: uint8 (h, w, 3)}. Pixels are repeated, until the longer side is
    256 px or more; the text grows with the picture."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = list(kinds.values())[-1].shape[:2]
    enlarge, gap, below = math.ceil(256 / max(height, width)), 6, width > 2 * height
    size = (enlarge * width, enlarge * height)

    def widest(font):
        return max(math.ceil(font.getlength(label)) for label in kinds)

    least = ImageFont.load_default(14)
    across = size[0] * (1 if below else len(kinds))
    fitting = int(14 * 0.9 * size[0] / widest(least))  # narrower than an image
    font = ImageFont.load_default(max(14, min(across // 36, fitting)))
    column, line = max(size[0], widest(font)) + gap, math.ceil(1.7 * font.size)
    row = line + size[1] + gap
    columns, rows = (1, len(kinds)) if below else (len(kinds), 1)
    picture = Image.new("RGB", (gap + columns * column, rows * row), "white")
    for i, (label, image) in enumerate(kinds.items()):
        left, top = gap + (i % columns) * column, (i // columns) * row
        ImageDraw.Draw(picture).text((left, top + line // 2), label, "black", font, anchor="lm")
        tile = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
        picture.paste(tile, (left, top + line))
    save_png(path, picture)


def save_png(path, picture):
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def save(args, given, views, out):
    """The picture, the arrays, and of one large image each answer in a file of its own."""
    from PIL import Image

    answers = args.answers or 1
    kinds = kinds_of(given, views, answers, args.rows)
    arrays = {}
    for k, x in enumerate(views):
        array, name = cropped(given, k, x)
        arrays[name] = array
    if given.original is not None:
        arrays["original"], _ = cropped(given, -1, given.original)
    write_atomically(f"{out}.npz", lambda file: np.savez(file, **arrays))
    if len(given.x) == 1:
        save_columns(f"{out}.png", {label: images[0] for label, images in kinds.items()})
    else:
        save_picture(f"{out}.png", [images[:128] for images in kinds.values()], list(kinds))
    print(f"{out}.png: {', '.join(kinds)}")
    if len(given.x) == 1 and max(given.size) > 64:
        for a, (image,) in enumerate(list(kinds.values())[-answers:], 1):
            save_png(f"{out}-answer-{a}.png", Image.fromarray(image))
            print(f"{out}-answer-{a}.png: {image.shape[0]}x{image.shape[1]} (height x width)")
    shapes = ", ".join(f"{name!r} {array.shape}" for name, array in arrays.items())
    print(f"{out}.npz: uint8 arrays {shapes}")


def result_name(args, given, tight):
    """Where the results go, without an ending. tight: "tight" or "no-tight" where that is not what
    the run has."""
    name = result_path(
        args, f"sample-{args.mode}-{args.seed or 0}", args.n and f"n{args.n}",
        args.naive and "naive", args.shift and f"shift{args.shift:g}", f"given-{given.name}",
        args.view is not None and f"view{args.view}",
        args.reduce and "reduced", args.rows and f"rows{args.rows}",
        args.candidates and f"candidates{args.candidates}",
        args.answers and f"answers{args.answers}", tight)
    out = placed(args.out, name)
    one_of_several = pathlib.Path(args.given).expanduser().is_dir() and args.given != "test"
    own_name = args.out and not args.out.is_dir()
    return f"{out}-{given.name}" if one_of_several and own_name else out


def draw(args, given, tight):
    """The answers to what is given: (their views, a line that tells how exact they are, or "")."""
    drawing, answers, candidates = tool("drawing"), args.answers or 1, args.candidates or 8
    pixels = drawing.pixels_of(given.model, given.k, args.rows or 0, candidates)
    pixels = [answers * len(given.x) * count for count in pixels]
    with evaluating(given.model):
        seconds = drawing.seconds_for(given.model, pixels, args.naive)
        if seconds > 20:  # less is not worth a line
            about = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
            print(f"{given.name}: {sum(pixels):,} pixels are drawn, in about {about}", flush=True)
        bar = progress_bar(total=sum(pixels), unit="pixel", unit_scale=True, delay=0.3)

        def show(pixels):
            if not bar.n:
                bar.unpause()  # the rate is that of drawing, without what is prepared for it
            bar.update(min(pixels, bar.total - bar.n))  # shares of bands add up to a little more

        how = drawing.How(
            args.seed or 0, args.mode, args.shift, tight, args.naive, candidates, show)
        with bar:
            if args.rows:
                return drawing.complete(given.model, given.x, args.rows, answers, how)
            return drawing.answer(given.model, given.x, given.k, answers, how), ""


def command(args):
    """`sample RUN --given ..`."""
    model = load(args.run, args.device)
    check_flags(args, model)
    tight = model.config.tight if args.tight is None else args.tight
    word = tight != model.config.tight and ("tight" if tight else "no-tight")
    for given in sources(args, model):
        views, told = draw(args, given, tight)
        if told:
            print(told)
        save(args, given, views, result_name(args, given, word))
