"""Lossless compression: the likelihood in real bits. Commands compress and decompress.

A range coder turns symbols into bits, -log2 of their probability, if it is told the distribution of
each. Our sampler makes just these distributions, one after the other, and asks a `Draw` for levels.
So a coder takes its place: one that encodes knows the levels and hands them on, one that decodes
has them from the bits. Either way the same sampler does the same arithmetic, and must do it bit for
bit: where a probability differs in its last digit, all that comes after it may be decoded wrongly.
"""
import contextlib
import dataclasses
import hashlib
import io
import math
import struct
import zlib

import numpy as np
import torch

from pixelaux import (
    PATH, YES_NO, Categorical, Half, Parser, PixelAux, Problem, cut, evaluating, load, log_mass,
    progress_bar, sample_fast, to_array, to_tensor, tool, write_atomically)

# --- Images to words and back ------------------------------------------------------------------


def pmf(head, drawn, interval_of=None):
    """Probabilities, (N, levels, H, W), of the channel after those in the list `drawn`.

    drawn: int64 (N, 1, H, W) each; interval_of: as LogisticMixture.sample_tight's, or None.
    """
    logits = head.logits if isinstance(head, Categorical) else mixture_logits(head, drawn)
    if interval_of is not None:
        logits = cut(logits, *interval_of(drawn))
    return logits.softmax(1)


def mixture_logits(head, drawn):
    """The same of a LogisticMixture, as logarithms, without an interval."""
    log_weights = head.logit_probs.log_softmax(1)  # (N, K, H, W)
    for c, level in enumerate(drawn):  # what was drawn tells which component it may be
        means, log_scales = head.means_given(c, drawn), head.log_scales[:, c]
        mass = log_mass(means, log_scales, level, level, head.levels)
        log_weights = log_weights + mass
    c = len(drawn)
    means, log_scales = head.means_given(c, drawn).unsqueeze(1), head.log_scales[:, c].unsqueeze(1)
    level = torch.arange(head.levels, device=means.device).view(1, -1, 1, 1, 1)
    mass = log_mass(means, log_scales, level, level, head.levels)  # (N, levels, K, H, W)
    return (log_weights.unsqueeze(1) + mass).logsumexp(2)


class Coding:
    """Takes the place of `Draw`: codes a view of N images, (N, C, H, W), a coder for each image.

    The coders make integers of 24 bits of the probabilities, in which each level has at least 1. So
    no image is impossible, and that costs some 2e-5 bits a sub-pixel.
    """

    def __init__(self, coders, channels, known=None):
        """known: the view, uint8, to be encoded; None: it is to be decoded."""
        import constriction

        self.coders, self.channels = coders, channels
        self.known = None if known is None else known.cpu().numpy().astype(np.int32)
        self.kind = constriction.stream.model.Categorical(perfect=False)

    def __call__(self, head, rows, columns, interval_of):
        """As Draw's: the levels of P pixels of each image, int64 (N P, C, 1, 1)."""
        drawn = []
        for c in range(self.channels):
            probabilities = pmf(head, drawn, interval_of)
            levels = np.empty((len(self.coders), len(rows)), np.int32)
            if self.known is not None:
                levels[:] = self.known[:, c, rows, columns]
            tables = probabilities.view(*levels.shape, -1).cpu().numpy()  # (N, P, levels)
            for coder, of_image, table in zip(self.coders, levels, tables):
                if self.known is None:
                    of_image[:] = coder.decode(self.kind, table)
                else:
                    coder.encode(of_image, self.kind, table)
            drawn.append(torch.from_numpy(levels).view(-1, 1, 1, 1).to(probabilities.device).long())
        return torch.cat(drawn, 1)


def code(model, coders, views, tight, show):
    """Code all views, coarsest first, those that are None from the coders -> uint8 (N, 3, H, W)."""
    x, threads = None, torch.get_num_threads()
    torch.set_num_threads(1)  # how a sum is split among threads decides how it is rounded
    try:
        with evaluating(model):
            for factor, known in zip(model.factors, views):
                coding = Coding(coders, factor.view.shape[0], known)
                given = x is not None
                x = sample_fast(factor, len(coders), x, coding, tight and given, progress=show)
    finally:
        torch.set_num_threads(threads)
    return x


def compress(model, x, tight=True, show=None):
    """Images, uint8 (N, 3, H, W) -> N arrays of uint32, each of -log2 p(x) bits and up to 64 more.

    `decompress` must be called with as many images, and on a machine that rounds alike: the same
    kind of device and the same versions. show: called with the number of pixels done.
    """
    import constriction

    coders = [constriction.stream.queue.RangeEncoder() for _ in range(len(x))]
    code(model, coders, model.views_of(x), tight, show)
    return [coder.get_compressed() for coder in coders]


def decompress(model, words, tight=True, show=None):
    """What `compress` returned -> uint8 (N, 3, H, W)."""
    import constriction

    coders = [constriction.stream.queue.RangeDecoder(of_image) for of_image in words]
    return code(model, coders, [None] * len(model.factors), tight, show)


class Ideal:
    """In place of a coder: adds up -log2 of the probabilities that it is told, not rounded."""

    bits = 0.0

    def encode(self, levels, kind, table):
        self.bits -= float(np.log2(np.take_along_axis(table, levels[:, None], 1)).sum())


def ideal_bits(model, x, tight=True):
    """Images, uint8 (N, 3, H, W) -> [bits that an ideal coder would need of each]."""
    coders = [Ideal() for _ in x]
    code(model, coders, model.views_of(x), tight, None)
    return [coder.bits for coder in coders]


# --- Files -------------------------------------------------------------------------------------

# Magic, mark of the model; the image's CRC, height and width; tight. Then come the words, of the
# image as it is padded, and a CRC of all before it. Numbers are little-endian.
HEADER = struct.Struct("<4s8sIII?")
MAGIC = b"PXA6"  # changes with the order of sums: files need it as it was


def mark_of(model):
    """8 bytes that depend on every weight and on what it is used for, not on the size of images."""
    config = model.config
    use = (config.model, len(model.views), config.levels, config.look_right, config.layout,
           config.layout_cond, config.layout_light, config.layout_embed)
    digest = hashlib.sha256(repr(use).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.digest()[:8]


def fitting(model, size):
    """The model for images of `size`, (H, W), padded to what its networks take."""
    height, width = (math.ceil(side / model.size_multiple) * model.size_multiple for side in size)
    return model.resized((height, width))


def padded(x, size):
    """uint8 (3, h, w) -> (3, H, W) of `size`, by repetition of its last row and column."""
    below, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return torch.from_numpy(np.pad(x.cpu(), [(0, 0), (0, below), (0, right)], "edge"))


def crc_of(x):
    return zlib.crc32(x.cpu().contiguous().numpy().tobytes())


def pack(model, x, tight=True, show=None):
    """An image of any size, uint8 (3, H, W) -> the bytes of a .pxa file."""
    model = fitting(model, x.shape[1:])
    words = compress(model, padded(x, model.config.size)[None], tight, show)[0]
    body = HEADER.pack(MAGIC, mark_of(model), crc_of(x), *x.shape[1:], tight)
    body += words.astype("<u4").tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little")


def parse(model, file):
    """The bytes of a .pxa file -> (CRC of the image, its size, tight, words).

    Raises Problem: foreign, damaged, of an earlier format or of another model.
    """
    body, crc_of_body = file[:-4], file[-4:]
    if len(body) < HEADER.size or not body.startswith(MAGIC[:3]):
        raise Problem("not a .pxa file")
    if zlib.crc32(body).to_bytes(4, "little") != crc_of_body:
        raise Problem("truncated or altered")
    magic, mark, crc, height, width, tight = HEADER.unpack_from(body)
    if magic != MAGIC:
        raise Problem(f"of format {magic.decode('ascii', 'replace')}, expected {MAGIC.decode()}: "
                      "decompress it with the version of pixelaux that wrote it")
    if mark != mark_of(model):
        raise Problem("was compressed with another model")
    return crc, (height, width), tight, np.frombuffer(body[HEADER.size :], "<u4").astype(np.uint32)


def unpack(model, file, show=None):
    """The bytes of a .pxa file -> uint8 (3, H, W). Raises Problem if it is not the same image."""
    crc, (height, width), tight, words = parse(model, file)
    try:
        x = decompress(fitting(model, (height, width)), [words], tight, show)
        x = x[0, :, :height, :width].cpu()
    except (AssertionError, ValueError):  # constriction's, of words that no encoder writes
        x = torch.zeros(0)
    if crc_of(x) != crc:
        raise Problem("this machine rounds otherwise than the one that wrote it: "
                      "the same kind of processor or GPU, and the same versions, are needed")
    return x


def bar_of(model, name, n=1):
    """A progress bar over the pixels of all views of n images."""
    pixels = sum(math.prod(view.shape[1:]) for view in model.views)
    return progress_bar(total=n * pixels, desc=name, unit="pixel", unit_scale=True)


# --- Commands ----------------------------------------------------------------------------------


def main(argv):
    """compress or decompress, as argv[0] says."""
    packing = argv[0] == "compress"
    text, ending, look = ".pxa files into PNG files", ".png", read_packed
    if packing:
        text, ending, look = "8-bit RGB or gray images into .pxa files, losslessly", ".pxa", read_x
    parser = Parser(prog=f"pixelaux.py {argv[0]}", description=text)
    parser.add("run", "--device")
    parser.add("--out", metavar="FOLDER", help="for results (default: beside the files)")
    parser.add_argument("files", nargs="+", type=PATH, metavar="FILE", help="to read")
    if packing:
        parser.add_argument("--tight", default=True, **YES_NO,
                            help="with the exact likelihood (default), or with the paper's")
    args = parser.parse_args(argv[1:])
    model = load(args.run, args.device)
    for path in args.files:  # all are looked at before one is written
        look(model, path)
    targets = targets_of(args, ending)
    for path, target in zip(args.files, targets):
        content, size = look(model, path)
        fit = fitting(model, size)
        with naming(path), bar_of(fit, path.name) as bar:
            if packing:
                file = pack(fit, content, args.tight, bar.update)
            else:
                file = png(unpack(fit, content, bar.update))
        write_atomically(target, file)
        packed = len(file) if packing else path.stat().st_size
        rate = 8 * packed / (3 * math.prod(size))
        print(f"{path} {path.stat().st_size:,} bytes -> {target} {len(file):,} bytes, "
              f"{rate:.3f} bits/dim, height {size[0]}, width {size[1]}")


def read_x(model, path):
    """(uint8 (3, H, W), its size) of an image file. Raises Problem."""
    x = to_tensor(tool("images").read_image(path, exact=True)[None])[0]
    top = model.config.levels - 1
    if int(x.max()) > top:
        raise Problem(f"{path}: expected levels 0..{top}, got {int(x.max())}")
    return x, x.shape[1:]


def png(x):
    """uint8 (3, H, W) -> the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_array(x[None])[0]).save(buffer, "PNG")
    return buffer.getvalue()


def read_packed(model, path):
    """(the bytes, the size of the image) of a .pxa file. Raises Problem."""
    file = path.read_bytes()
    with naming(path):
        return file, parse(model, file)[1]


def targets_of(args, ending):
    """The path of each file's result. Raises Problem rather than overwrite anything."""
    targets = []
    for path in args.files:
        folder = args.out or path.parent
        target = folder / f"{path.stem}{ending}"
        if folder.is_file():
            raise Problem(f"--out {folder} is a file, expected a folder")
        if target.exists():
            raise Problem(f"{path}: {target} exists already; --out FOLDER writes elsewhere")
        if target.resolve() in [other.resolve() for other in targets]:
            raise Problem(f"{path}: another of the files would go to {target}, too; rename one")
        targets.append(target)
    return targets


@contextlib.contextmanager
def naming(path):
    """A Problem in here is this file's."""
    try:
        yield
    except Problem as error:
        raise Problem(f"{path}: {error}") from None
