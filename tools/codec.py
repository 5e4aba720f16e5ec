"""Lossless compression: the likelihood in real bits. Commands compress, decompress and export.

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
    PATH, YES_NO, Categorical, Half, Parser, PixelAux, Problem, bits_per_dim, cut, evaluating, load,
    log_mass, progress, read_checkpoint, sample_fast, to_array, to_tensor, tool,
    write_atomically, write_checkpoint)

# --- Images to words and back ------------------------------------------------------------------


def pmf(head, drawn, interval=None):
    """Probabilities, (N, levels, H, W), of the channel after those in the list `drawn`.

    drawn: int64 (N, 1, H, W) each; interval(drawn) -> (lo, hi), (N, 1, H, W) each, or None.
    """
    logits = head.logits if isinstance(head, Categorical) else mixture_logits(head, drawn)
    return cut(logits, interval and interval(drawn)).softmax(1)


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

    def __call__(self, head, rows, columns, interval):
        """As Draw's: the levels of P pixels of each image, int64 (N P, C, 1, 1)."""
        drawn = []
        for c in range(self.channels):
            probabilities = pmf(head, drawn, interval)
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


# --- Files -------------------------------------------------------------------------------------

# Magic, mark of the model, CRC of the image, height, width, tight; then come the words, and a CRC
# of all before it. Numbers are little-endian.
HEADER = struct.Struct("<4s8sIII?")
MAGIC = b"PXA2"


def mark_of(model):
    """8 bytes that depend on every weight and on what it is used for, not on the size of images."""
    config = model.config
    use = (config.model, len(model.views), config.levels, config.look_right, config.layout,
           config.layout_cond, config.layout_light, config.layout_embed)
    digest = hashlib.sha256(repr(use).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.digest()[:8]


def crc_of(x):
    return zlib.crc32(x.cpu().contiguous().numpy().tobytes())


def pack(model, x, tight=True, show=None):
    """An image of the model's size, uint8 (3, H, W) -> the bytes of a .pxa file."""
    words = compress(model, x[None], tight, show)[0]
    body = HEADER.pack(MAGIC, mark_of(model), crc_of(x), *x.shape[1:], tight)
    body += words.astype("<u4").tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little")


def parse(model, file):
    """The bytes of a .pxa file -> (CRC of the image, the model for its size, tight, words).

    Raises Problem: foreign, damaged, or of another model.
    """
    body, crc_of_body = file[:-4], file[-4:]
    if len(body) < HEADER.size or not body.startswith(MAGIC):
        raise Problem("not a .pxa file, or one of another version")
    if zlib.crc32(body).to_bytes(4, "little") != crc_of_body:
        raise Problem("truncated or altered")
    _, mark, crc, height, width, tight = HEADER.unpack_from(body)
    if mark != mark_of(model):
        raise Problem("was compressed with another model")
    words = np.frombuffer(body[HEADER.size :], "<u4").astype(np.uint32)
    return crc, model.resized((height, width)), tight, words


def unpack(model, file, show=None):
    """The bytes of a .pxa file -> uint8 (3, H, W). Raises Problem if it is not the same image."""
    crc, fitting, tight, words = parse(model, file)
    try:
        x = decompress(fitting, [words], tight, show)[0].cpu()
    except (AssertionError, ValueError):  # constriction's, of words that no encoder writes
        x = torch.zeros(0)
    if crc_of(x) != crc:
        raise Problem("this machine rounds otherwise than the one that wrote it: "
                      "the same kind of device and the same versions are needed")
    return x


def image_file(image, **options):
    """The bytes of a PNG of an image, uint8 (H, W, 3), or of another format of Pillow's."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


# --- Beside PNG and WebP -----------------------------------------------------------------------

FORMATS = {
    "PNG": dict(format="PNG", optimize=True),
    "lossless WebP": dict(format="WEBP", lossless=True, quality=100, method=6),
}


def coded(model, images, nats):
    """Code and restore images, uint8 (N, H, W, 3): how many bits it takes -> (text, a dict).

    nats: (N,), their exact log p, which says how many it should. Raises Problem if an image is not
    restored.
    """
    n, bits = len(images), 0
    at_once = min(64, *(factor.at_once for factor in model.factors))
    with bar_of(model, "coding", 2 * n) as bar:
        for start in range(0, n, at_once):
            x = to_tensor(images[start : start + at_once])
            words = compress(model, x, show=bar.update)
            if not torch.equal(decompress(model, words, show=bar.update).cpu(), x):
                raise Problem(f"images {start}..{start + len(x) - 1} were not restored: "
                              "no two runs on this device round alike")
            bits += 32 * sum(map(len, words))
    rate = bits / (n * model.dims)
    ideal = float(bits_per_dim(nats.mean(), model.dims))
    result = dict(images=n, coded=rate, ideal=ideal)
    text = (f"{n} images coded and restored bit for bit: {rate:.4f} bits/dim; -log2 p {ideal:.4f} "
            f"({rate / ideal - 1:+.3%}, {(rate - ideal) * model.dims:.1f} bits an image)")
    for name, options in FORMATS.items():
        single = sum(len(image_file(image, **options)) for image in images)
        together = len(image_file(mosaic(images), **options))
        result[name] = [8 * size / (n * model.dims) for size in (single, together)]
        text += "\n{}: {:.4f} bits/dim, as one mosaic of all {:.4f}".format(name, *result[name])
    return text, result


def mosaic(images):
    """Images, uint8 (N, H, W, 3), in one: about as many side by side as below each other."""
    n, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(n))
    whole = np.pad(images, [(0, -n % columns), (0, 0), (0, 0), (0, 0)])
    whole = whole.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return whole.reshape(-1, columns * width, 3)


def bar_of(model, name, n=1):
    """A progress bar over the pixels of all views of n images."""
    pixels = sum(math.prod(view.shape[1:]) for view in model.views)
    return progress(total=n * pixels, desc=name, unit="pixel", unit_scale=True)


# --- Commands ----------------------------------------------------------------------------------


def main(argv):
    """compress, decompress or export, as argv[0] says."""
    commands = {"compress": compress_files, "decompress": decompress_files, "export": export}
    commands[argv[0]](argv)


def compress_files(argv):
    parser = parser_of_files(argv, "images, losslessly, into .pxa files", "8-bit RGB or gray")
    parser.add_argument("--tight", default=True, **YES_NO,
                        help="with the exact likelihood (default), or with the paper's")
    args = parser.parse_args(argv[1:])

    def packed(fitting, x, show):
        return pack(fitting, x, args.tight, show)

    convert(args, ".pxa", read_fitting, packed)


def decompress_files(argv):
    parser = parser_of_files(argv, ".pxa files into PNG files", "what compress has written")

    def picture(fitting, file, show):
        x = unpack(fitting, file, show)
        return image_file(to_array(x[None])[0])

    convert(parser.parse_args(argv[1:]), ".png", read_packed, picture)


def parser_of_files(argv, text, what):
    parser = Parser(prog=f"pixelaux.py {argv[0]}", description=text)
    parser.add("run", "--device")
    parser.add("--out", metavar="FOLDER", help="for results (default: beside the files)")
    parser.add_argument("files", nargs="+", type=PATH, metavar="FILE", help=what)
    return parser


def convert(args, ending, read, make):
    """For each file write the bytes make(*read(model, path), show), under its name and ending."""
    model = load(args.run, args.device)
    targets = targets_of(args, ending)
    for path in args.files:  # all are looked at before one is written
        read(model, path)
    for path, target in zip(args.files, targets):
        fitting, content = read(model, path)
        with naming(path), bar_of(fitting, path.name) as bar:
            file = make(fitting, content, bar.update)
        write_atomically(target, file)
        height, width = fitting.config.size
        rate = 8 * len(file) / fitting.dims
        print(f"{target}: height {height}, width {width}, {len(file)} bytes, {rate:.3f} bits/dim")


def read_fitting(model, path):
    """(the model for its size, uint8 (3, H, W)) of an image file. Raises Problem."""
    image = tool("images").read_image(path, exact=True)
    with naming(path):
        fitting = model.resized(image.shape[:2])
        return fitting, fitting.check(to_tensor(image[None]), -1)[0]


def read_packed(model, path):
    """(the model for its image's size, the bytes) of a .pxa file. Raises Problem."""
    file = path.read_bytes()
    with naming(path):
        return parse(model, file)[1], file


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


def export(argv):
    parser = Parser(prog="pixelaux.py export", description="all factors in one file, in bfloat16")
    parser.add("run")
    parser.add_argument("file", type=PATH, metavar="FILE", help="to write")
    args = parser.parse_args(argv[1:])
    model = load(args.run)
    if args.file.exists() and "training" in read_checkpoint(args.file):  # which refuses others
        raise Problem(f"{args.file}: a checkpoint of training, which is not overwritten; "
                      "expected another name")
    factors = {}
    for k, factor in enumerate(model.factors):
        factors[k] = {name: weight.bfloat16() for name, weight in factor.state_dict().items()}
    write_checkpoint(args.file, model.config, factors)
    nr_weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.file}: {nr_weights:,} weights, {args.file.stat().st_size:,} bytes")
