"""One's own pictures, of any size, doubled, colourised or completed: `sample RUN --given ..`."""
import collections
import dataclasses
import math
import pathlib
import re

import numpy as np
import torch

from pixelaux import (
    Problem, evaluating, load, progress_bar, read_npy, result_path, run_data, save_picture,
    to_array, to_tensor, tool, warn, write_atomically)

# --- What is given -----------------------------------------------------------------------------


@dataclasses.dataclass
class Given:
    """Images x of view k of a model of their size; k is X's if rows of X are given. original: X,
    uint8 (n, C, H, W), if it is known. size: (H, W) of X without what was padded."""

    name: str
    model: object
    x: torch.Tensor
    k: int
    original: torch.Tensor | None
    size: tuple


def from_arrays(args, model):
    """Images of the test set or of a .npy file, of the trained size: X, or a view as it is."""
    finest = len(model.views) - 1
    if args.given == "test":
        images = run_data(args, model).test
    else:
        images = read_npy(args.given, channels={view.shape[0] for view in model.views})
    x = to_tensor(images[: args.n or 16])
    name, size, shape = pathlib.Path(args.given).stem, model.config.size, tuple(x.shape[1:])
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
    return Given(path.stem, fitting, x, k, original, (scale * height, scale * width))


def pictures_in(folder):
    """Paths of the image files in a folder, by name. Raises Problem if there is none, or if two
    would have results of one name."""
    from PIL import Image

    endings, is_data = Image.registered_extensions(), tool("images").is_data
    paths = [path for path in sorted(folder.iterdir()) if is_data(path.name)]
    paths = [path for path in paths if path.suffix.lower() in endings and path.is_file()]
    if not paths:
        raise Problem(f"--given {folder}: no image files there")
    for stem, times in collections.Counter(path.stem for path in paths).items():
        if times > 1:
            raise Problem(f"--given {folder}: {times} images are called {stem}; rename them")
    return paths


def check_flags(args, model):
    finest = len(model.views) - 1
    if args.view is not None and args.view not in range(finest):
        raise Problem(f"--view {args.view}: expected a view coarser than X, 0..{finest - 1}")
    if args.rows and (args.view is not None or args.reduce):
        raise Problem("--rows: it is X that is completed; leave --view and --reduce out")
    if not finest and not args.rows:
        raise Problem("--given: this model has no view to begin with; --rows R completes X")


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
        kinds[f"{cropped(given, given.k, given.x)[1]} given"] = shown(given.k, given.x)
    for a, x in enumerate(views[-1].chunk(answers)):
        kinds["answer" if answers == 1 else f"answer {a + 1}"] = shown(finest, x)
    return kinds


def save_columns(path, kinds, least=128):
    """A PNG of images side by side, as large as the last one, under their labels. kinds: {label:
    uint8 (h, w, 3)}. Pixels are repeated, the more of them where it is lower than `least`."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = list(kinds.values())[-1].shape[:2]
    enlarge, gap, line = math.ceil(least / height), 4, 24
    size, font = (enlarge * width, enlarge * height), ImageFont.load_default(14)
    column = max(size[0], *(math.ceil(font.getlength(label)) for label in kinds)) + gap
    picture = Image.new("RGB", (gap + len(kinds) * column, line + size[1] + gap), "white")
    for i, (label, image) in enumerate(kinds.items()):
        left = gap + i * column
        ImageDraw.Draw(picture).text((left, line // 2), label, "black", font, anchor="lm")
        tile = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
        picture.paste(tile, (left, line))
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
    if args.out:
        out = re.sub(r"\.(png|npz)$", "", str(args.out))
        folder = pathlib.Path(args.given).expanduser().is_dir()
        return f"{out}-{given.name}" if folder and args.given != "test" else out
    return result_path(
        args, f"sample-{args.mode}-{args.seed or 0}", args.n and f"n{args.n}",
        args.naive and "naive", args.shift and f"shift{args.shift:g}", f"given-{given.name}",
        args.view is not None and f"view{args.view}",
        args.reduce and "reduced", args.rows and f"rows{args.rows}",
        args.answers and f"answers{args.answers}", tight)


def command(args):
    """`sample RUN --given ..`."""
    model, drawing, answers = load(args.run, args.device), tool("drawing"), args.answers or 1
    check_flags(args, model)
    tight = model.config.tight if args.tight is None else args.tight
    word = tight != model.config.tight and ("tight" if tight else "no-tight")
    for given in sources(args, model):
        total = drawing.pixels_of(given.model, given.k, args.rows or 0)
        total *= answers * len(given.x)
        bar = progress_bar(total=total, unit="pixel", unit_scale=True, delay=0.3)
        how = drawing.How(args.seed or 0, args.mode, args.shift, tight, args.naive, bar.update)
        with bar, evaluating(given.model):
            if args.rows:
                views, told = drawing.complete(given.model, given.x, args.rows, answers, how)
            else:
                views, told = drawing.answer(given.model, given.x, given.k, answers, how), []
        print(*told, sep="\n", end="\n" if told else "")
        save(args, given, views, result_name(args, given, word))
