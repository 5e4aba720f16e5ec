"""What stands around the method of pixelaux.py: `python pixelaux.py COMMAND`.

Image files and data sets, pictures, lossless compression, benchmarks, and the command line. Nothing here is needed to
read, import or train the models; everything here uses them.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing.pool
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import timeit
import urllib.request
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from pixelaux import (ACTIVATIONS, LOCAL_RANK, MODELS, PRESETS, RANK, RANKS, Config, Conv, Dataset, Decoder, Draw,
                      Half, Loss, PixelAux, Problem, Shapes, bar_of, bits_per_dim, build, compiled, evaluate, load,
                      make_config, permutation, read_checkpoint, read_metrics, summed, to_tensor, train_factor, update,
                      write_atomically, write_checkpoint)

# --- Image files: data in, pictures out ------------------------------------------------------------------------------


CIFAR10 = dict(url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", md5="c32a1d4ab5d03f1284b67883e8d87530")


def download(url, path, md5):
    """Fetch url to path: progress bar, taken up again where it broke off, checked, moved into place in one step."""
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            path.parent.mkdir(parents=True, exist_ok=True)
            have = have if reply.status == 206 else 0  # 206: the server goes on where we stopped
            total = have + int(reply.headers.get("Content-Length", 0))
            bar = tqdm.wrapattr(reply, "read", total or None, initial=have, desc=path.name)
            with open(part, "ab" if have else "wb") as file, bar as body:
                shutil.copyfileobj(body, file)
        if part.stat().st_size < total:
            raise OSError("the connection broke off")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: the part is the whole file already
            raise Problem(f"{url}: {error}; run again to go on, or fetch it by hand into {path.parent}") from None
    if (found := hashlib.md5(part.read_bytes()).hexdigest()) != md5:
        part.unlink()
        raise Problem(f"{url}: MD5 {found}, expected {md5}; the file was removed, run again")
    os.replace(part, path)


def load_cifar10(folder):
    """The 50,000 training and 10,000 test images of the official binary archive, or its unpacked files, in `folder`."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    unpacked = [f for f in (folder, folder / "cifar-10-batches-bin") if all((f / name).is_file() for name in names)]
    source = unpacked[0] if unpacked else folder if folder.is_file() else folder / "cifar-10-binary.tar.gz"
    if not source.exists():
        download(CIFAR10["url"], source, CIFAR10["md5"])
    try:
        if unpacked:
            content = b"".join((source / name).read_bytes() for name in names)
        else:
            with tarfile.open(source) as tar:
                content = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
        images = np.frombuffer(content, np.uint8).reshape(60_000, 3073)[:, 1:]  # the first byte is the label
    except (tarfile.TarError, KeyError, EOFError, OSError, ValueError, zlib.error) as error:
        raise Problem(f"{source}: not the CIFAR-10 binary archive ({error})") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_image(file, size=None, celeba=False, exact=False):
    """The image in a file (pathlib.Path or zipfile.Path) as RGB, uint8 (H, W, 3). Raises Problem.

    All of Pillow's formats and modes: 16 bits are scaled, transparency goes over white, EXIF rotation is applied.
    size: (H, W), to which a centre crop of that aspect is resized. celeba: first the paper's crop of an aligned image
    (218 high, 178 wide): 25 left and right, 50 top, 40 bottom. exact: refuses what would lose something as 8-bit RGB.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            deep = ";16" in str(image.tile)  # 16-bit RGB, which Pillow opens as 8-bit RGB
            other = deep or image.mode not in ("RGB", "L") or image.has_transparency_data
            if exact and (other or getattr(image, "n_frames", 1) > 1):
                raise Problem(f"of mode {image.mode}, expected one image of 8-bit RGB or gray without transparency")
            image = ImageOps.exif_transpose(image)
        if celeba:
            if image.size != (178, 218):
                raise Problem(f"{image.height}x{image.width} (height x width), expected CelebA's aligned 218x178")
            image = image.crop((25, 50, 153, 178))
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, np.float64)
            top = values.max(initial=0)  # I and F do not tell their range
            scale = 257 if "16" in image.mode or top > 255 else 1 / 255 if image.mode == "F" and top <= 1 else 1
            image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        if size:
            if image.height < size[0] or image.width < size[1]:
                raise Problem("{}x{} is smaller than --size {}x{} (height x width)".format(*image.size[::-1], *size))
            image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
        return np.array(image)
    except UnidentifiedImageError:  # its text shows a Python object
        raise Problem(f"{file}: not an image that Pillow can read") from None
    except Exception as error:  # Pillow and zipfile raise many kinds
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Problem(f"{file}: {reason}") from None


def read_images(kind, sources, size):
    """The images in the sources, folders (searched recursively) or zip files, as uint8 (N, H, W, 3); see read_image.

    They are decoded once, with all cores, into a memory-mapped file in $XDG_CACHE_HOME/pixelaux (~/.cache/pixelaux);
    its name depends on kind ("celeba" or "folder") and on the files' names, sizes and dates. Files that cannot be read
    are named and skipped.
    """
    from PIL import Image

    files, broken, known = [], [], Image.registered_extensions()
    expected = "expected a folder or a zip file of images" if kind == "folder" else (
        "expected img_align_celeba.zip or its JPEGs (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)")
    for source in sources:
        try:
            archive = None if source.is_dir() else zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise Problem(f"{source}: {getattr(error, 'strerror', error)}; {expected}") from None
        inside = [zipfile.Path(archive, member) for member in archive.namelist()] if archive else source.rglob("*")
        files += [f for f in inside if f.suffix.lower() in known and f.is_file()]
    if not files:
        raise Problem(f"{sources[0]}: no image files there; {expected}")

    def read(file):
        try:
            return read_image(file, size, kind == "celeba").tobytes()
        except Problem as error:
            broken.append(str(error))
            return b""

    def decode(out):
        with multiprocessing.pool.ThreadPool() as pool:  # by 1,024 files, lest decoding run ahead of the disk
            images = (x for i in range(0, len(files), 1024) for x in pool.imap(read, files[i : i + 1024]))
            out.writelines(bar_of(images, "image", 0, desc=f"decoding {kind}", total=len(files)))
        for line in broken[:10] + [f"{len(broken) - 10} more files"] * (len(broken) > 10):
            print(f"pixelaux: skipped {line}", file=sys.stderr)
        if len(broken) == len(files):
            raise Problem(f"none of the {len(files)} image files could be read; the first: {broken[0]}")

    files.sort(key=lambda file: (file.name, str(file)))
    on_disk = [f for f in [*sources, *files] if isinstance(f, pathlib.Path) and f.is_file()]
    stamp = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in on_disk])
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pixelaux"
    path = cache / f"{kind}-{size[0]}x{size[1]}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.bytes"
    if not path.exists():
        write_atomically(path, decode)
    return np.memmap(path, np.uint8, "r").reshape(-1, *size, 3)


def read_npy(path, channels=(1, 3)):
    """uint8 (N, H, W, C) of a .npy file that holds it, or (N, C, H, W)."""
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise Problem(f"{path}: not a .npy file of numbers, or a damaged one") from None
    if images.ndim == 4 and images.shape[1] in channels and images.shape[3] not in channels:
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in channels or not len(images):
        raise Problem(f"{path}: {images.dtype} {images.shape}, expected uint8 (N, H, W, C) or (N, C, H, W), "
                      f"C {' or '.join(map(str, channels))}")
    return images


def load_data(spec, folder, size=None):
    """spec: "shapes", "cifar10", "celeba", "folder:PATH" or a .npy file -> (Dataset, (H, W)). Raises Problem.

    Images that come without a test set give a random 5% to it, by a fixed seed: the share is the paper's (Sec. 4.2),
    which states no seed; ours is 0.
    """
    folder = pathlib.Path(folder)
    if spec == "shapes":
        shapes = Shapes(size or (16, 16))
        return Dataset(None, shapes.sample(512, [0, 20170806]), shapes=shapes), shapes.size
    if spec == "cifar10":
        if size not in (None, (32, 32)):
            raise Problem(f"CIFAR-10 images are 32x32 (height x width), not {size[0]}x{size[1]}")
        images = load_cifar10(folder)
        return Dataset(images[:50_000], images[50_000:], flip=True), (32, 32)
    if spec == "celeba":
        images = read_images("celeba", sorted(folder.glob("*.zip")) or [folder], size or (128, 128))
    elif spec.startswith("folder:") and spec != "folder:":
        images = read_images("folder", [pathlib.Path(spec.removeprefix("folder:"))], size or (64, 64))
    elif spec.endswith(".npy"):
        images = read_npy(spec, channels=(3,))
    else:
        raise Problem(f"unknown data {spec!r}: expected shapes, cifar10, celeba, folder:PATH or a .npy file")
    if size not in (None, images.shape[1:3]):
        height, width = images.shape[1:3]
        raise Problem(f"the images of {spec} are {height}x{width} (height x width), not {size[0]}x{size[1]}")
    if len(images) < 2:
        raise Problem(f"{spec}: one image only; at least 2 are needed, one of them for the test")
    order, count = permutation(0, len(images)), max(1, int(0.05 * len(images)))
    train, test = (Subset(images, np.sort(rows)) for rows in (order[count:], order[:count]))
    return Dataset(train, test, flip=not spec.endswith(".npy")), images.shape[1:3]


def to_array(images):
    """Tensor (N, C, H, W) -> array (N, H, W, C)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def image_file(images, columns=1, value=0, **how):
    """One picture of images, uint8 (N, H, W, 3), row by row, `value` where none is left: bytes of a PNG, or see how."""
    from PIL import Image

    n, h, w, _ = images.shape
    images = np.pad(images, [(0, -n % columns), (0, 0), (0, 0), (0, 0)], constant_values=value)
    pixels = images.reshape(-1, columns, h, w, 3).swapaxes(1, 2).reshape(-1, columns * w, 3)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), **{"format": "PNG", **how})
    return buffer.getvalue()


def save_grid(levels, path, columns=8, tile=64):
    """A PNG with a row for each level (coarsest first) of every `columns` images; levels: [uint8 (N, C, H, W)].

    Every image is shown as high as X, or some `tile` pixels if that is more, by repetition of its pixels.
    """
    size = [max(1, tile // levels[-1].shape[2]) * side for side in levels[-1].shape[2:]]
    shown = [F.interpolate((level if level.shape[1] == 3 else 17 * level.expand(-1, 3, -1, -1)).cpu(), size)
             for level in levels]
    images = to_array(torch.cat([F.pad(image, (2, 2, 2, 2), value=255) for image in shown], 2))  # levels under levels
    write_atomically(path, image_file(images, min(columns, len(images)), 255))


def save_curves(out, names):
    """OUT/curves.png: bits/dim of X by time, a panel for each factor, from OUT/metrics.jsonl. names: of the factors."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    factors = sorted({line["factor"] for line in lines})
    figure = Figure(figsize=(4.5 * len(factors), 3.2), layout="tight")
    for axis, k in zip(figure.subplots(1, len(factors), squeeze=False)[0], factors):
        mine = [line for line in lines if line["factor"] == k]
        unit, length = ("minutes", 60) if mine[-1]["seconds"] >= 60 else ("seconds", 1)
        shown = mine[len(mine) // 10 :]  # it starts too high
        for key, style, label in (("bits_per_dim", "-", "training batches"),
                                  ("test_bits_per_dim", "o-", "test images, averaged weights")):
            points = [(line["seconds"] / length, line[key]) for line in shown if key in line]
            axis.plot(*np.array(points).reshape(-1, 2).T, style, lw=1, ms=4, label=label)
        axis.set(title=f"factor {k}: {names[k]}", xlabel=f"{unit} ({mine[-1]['step']:,} steps)", ylabel="bits/dim of X")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    write_atomically(out / "curves.png", lambda file: figure.savefig(file, dpi=110, format="png"))


# --- Lossless compression: the likelihood in real bits ---------------------------------------------------------------


@torch.no_grad()
def code(model, x=None, words=None, tight=True, progress=None):
    """Write images x, uint8 (N, 3, H, W), to N range coders, or read them from N arrays of words. Returns x, coders.

    Both directions run the same steps of `Decoder`, so their probabilities agree bit for bit. constriction makes 24-bit
    integer tables of them, in which every level has at least 1: no image is impossible, and that costs some 2e-5 bits.
    """
    import constriction

    tables, queue = constriction.stream.model.Categorical(perfect=False), constriction.stream.queue
    coders = [queue.RangeEncoder() for _ in x] if words is None else [queue.RangeDecoder(part) for part in words]
    levels = model.levels_of(x.to(model.device)) if words is None else [None] * len(model.factors)
    for k, (factor, level) in enumerate(zip(model.eval().factors, levels)):
        (c, h, w), known = factor.shape, None if level is None else level.flatten(2).cpu().numpy().astype(np.int32)

        def symbol(head, positions, limits):
            """The levels at these positions, written or read; a source of symbols for Decoder, as Draw is."""
            levels = torch.zeros(len(positions), len(coders), c, dtype=torch.long, device=positions.device)
            real = positions[positions < h * w].cpu().numpy()  # padding comes after them and is not coded
            for channel in range(c):
                pmf = head.pmf(channel, levels.flatten(0, 1)[:, :, None, None], limits)
                pmf = pmf.view(len(positions), len(coders), -1)[: len(real)].transpose(0, 1).contiguous().cpu().numpy()
                symbols = np.empty((len(coders), len(real)), np.int32) if known is None else known[:, channel, real]
                for coder, table, row in zip(coders, pmf, symbols):
                    if known is None:
                        row[:] = coder.decode(tables, table)
                    else:
                        coder.encode(row, tables, table)
                levels[: len(real), :, channel] = torch.from_numpy(symbols.T).to(levels)
            return levels

        x = Decoder(factor, len(coders), x if k else None, tight=tight).run(symbol, progress)
    return x, coders


def compress(model, x, tight=True, progress=None):
    """x: uint8 (N, 3, H, W) -> N arrays of uint32 of -log2 p(x) bits each, up to 64 more. progress: as in `sample`.

    The arithmetic must be the same for `decompress`: device, number of threads, versions and N.
    """
    return [coder.get_compressed() for coder in code(model, x, None, tight, progress)[1]]


def decompress(model, words, tight=True, progress=None):
    """What `compress` returned -> uint8 (N, 3, H, W)."""
    return code(model, None, words, tight, progress)[0]


HEADER = struct.Struct("<4s8sIHHHH")  # magic, fingerprint, CRC of the image, height, width, threads, tight


def fingerprint(model):
    """8 bytes that depend on every weight and on the kind of model, not on the size of the images."""
    config = model.config
    digest = hashlib.sha256(f"{config.model} {len(model.chain)} {config.levels} {config.look_right}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.digest()[:8]


def resized(model, size):
    """The same weights for images of another size (H, W), with as many levels. Raises Problem if it does not fit."""
    if tuple(size) == tuple(model.config.size):
        return model
    scales = sum(isinstance(psi, Half) for psi in model.chain)
    other = PixelAux(dataclasses.replace(model.config, size=tuple(size), scales=scales))
    other.load_state_dict(model.state_dict())
    return other.to(model.device, memory_format=torch.channels_last).eval()


def pack(model, x, tight=True, progress=None):
    """One image, uint8 (3, H, W) -> the bytes of a .pxa file: header, range coder's words, CRC of all before it."""
    words, = compress(model, x[None], tight, progress)
    crc = zlib.crc32(x.cpu().contiguous().numpy().tobytes())
    file = HEADER.pack(b"PXA1", fingerprint(model), crc, *x.shape[1:], torch.get_num_threads(), tight)
    file += words.astype("<u4").tobytes()
    return file + zlib.crc32(file).to_bytes(4, "little")


def unpack(model, file, progress=None):
    """The bytes of a .pxa file -> uint8 (3, H, W). Raises Problem rather than return another image."""
    if len(file) < HEADER.size + 4 or not file.startswith(b"PXA1"):
        raise Problem("not a .pxa file")
    if zlib.crc32(file[:-4]).to_bytes(4, "little") != file[-4:]:
        raise Problem("truncated or altered")
    _, mark, crc, h, w, threads, tight = HEADER.unpack_from(file)
    if mark != fingerprint(model):
        raise Problem("was compressed with another model")
    model, words = resized(model, (h, w)), np.frombuffer(file[HEADER.size : -4], "<u4").astype(np.uint32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # a product split otherwise may round otherwise
    try:
        x = decompress(model, [words], bool(tight), progress)[0].cpu()
    except (AssertionError, ValueError):  # constriction's, of what no encoder writes
        x = torch.zeros(0)
    finally:
        torch.set_num_threads(before)
    if zlib.crc32(x.contiguous().numpy().tobytes()) != crc:
        raise Problem("this machine rounds otherwise than the one that wrote it: same device and versions are needed")
    return x


def coded(model, images, nats):
    """Code and restore images, uint8 (N, H, W, 3): bits/dim beside -log2 p (nats: (N,)), PNG and WebP; text, dict."""
    n, bits, chunk = len(images), 0, min(64, *(factor.at_once() for factor in model.factors))
    with bar_of(total=2 * n * sum(h * w for _, h, w in model.shapes), desc="coding") as bar:
        for start, x in zip(range(0, n, chunk), to_tensor(images).split(chunk)):
            words = compress(model, x, progress=bar.update)
            if not torch.equal(decompress(model, words, progress=bar.update).cpu(), x):
                raise Problem(f"images {start}..{start + len(x) - 1} were not restored: no two runs here round alike")
            bits += 32 * sum(map(len, words))
    rate, ideal = bits / (n * model.dims), float(bits_per_dim(nats.mean(), model.dims))
    result = dict(images=n, coded=rate, ideal=ideal)
    lines = [f"{n} images coded and restored bit for bit: {rate:.4f} bits/dim; -log2 p {ideal:.4f} "
             f"({100 * (rate / ideal - 1):+.3f}%, {(rate - ideal) * model.dims:.1f} bits an image)"]
    for name, how in (("PNG", dict(format="PNG", optimize=True)),
                      ("lossless WebP", dict(format="WEBP", lossless=True, quality=100, method=6))):
        single = sum(len(image_file(image[None], **how)) for image in images)
        together = len(image_file(images, math.ceil(math.sqrt(n)), **how))
        single, together = result[name] = [8 * size / (n * model.dims) for size in (single, together)]
        lines.append(f"{name}: {single:.4f} bits/dim, as one mosaic of all {together:.4f}")
    return "\n".join(lines), result


# --- Benchmarks ------------------------------------------------------------------------------------------------------


def plain(factor):
    """A copy of a factor as people usually write it: NCHW, every activation where it is used, padding by copy, torch's
    stock weight norm."""
    def forward(conv, activation, x, size):
        (kh, kw), (oy, ox) = conv.kernel, conv.offset
        x = F.dropout(activation(x.contiguous()), conv.dropout, conv.training)
        weight = torch._weight_norm(conv.v, conv.g.view(-1, 1, 1, 1), 0)
        if conv.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), conv.b, 2)
            return x[:, :, oy : oy + size[0], ox : ox + size[1]]
        return F.conv2d(F.pad(x, (ox, kw - 1 - ox, oy, kh - 1 - oy)), weight, conv.b, conv.stride)

    factor = copy.deepcopy(factor).to(memory_format=torch.contiguous_format)
    for conv in factor.modules():
        if isinstance(conv, Conv):
            conv.forward = functools.partial(forward, conv, ACTIVATIONS[conv.activation])
            conv.activation = "none"  # for Network.forward
    return factor


def seconds(function, device, repeat=4):
    """Wall-clock time of the best of `repeat` calls; the first one warms up."""
    wait = torch.get_device_module(device).synchronize
    wait(device)
    return min(timeit.repeat(lambda: (function(), wait(device)), number=1, repeat=repeat))


def bench_train(args, device):
    """A training step of each factor, ours and a `plain` one, and how much of the device's peak it uses."""
    from resource import RUSAGE_SELF, getrusage

    from torch.utils.flop_counter import FlopCounterMode

    model = build(args.model or "pyramid", args.size or 32, args.preset or "tiny", args.seed or 0,
                  precision=args.precision or "auto").to(device, memory_format=torch.channels_last)
    config, cuda = model.config, device.type == "cuda"
    n, many, side = args.batch_size or config.batch_size, 10 if cuda else 1, 8192 if cuda else 2048
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    x = torch.randint(256, (n, *model.shapes[0]), dtype=torch.uint8, device=device)
    model.initialise(x)
    pairs, bfloat16 = model.pairs(x), Loss(None, config, 1, device).bfloat16
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    peak = 2 * side**3 / seconds(lambda: a @ a, device)
    print(f"training steps (gradient and Adam) of a batch of {n}, model {config.model}, preset {config.preset}; plain: "
          "float32 (TF32 on CUDA), NCHW,\npadding by copy, stock weight norm. Peak: a product of two matrices of "
          f"{side}x{side} in {a.dtype}, {peak / 1e12:.3g} TFLOP/s.\nMemory: the largest so far\n"
          "factor    images/s: ours     plain    ratio    GFLOP/image    TFLOP/s    of peak    GiB")

    def timed(loss, factor, **options):
        adam, average = torch.optim.Adam(factor.parameters(), config.lr, config.betas, **options), copy.deepcopy(factor)
        return seconds(lambda: [update(loss, adam, average, 0.9, *batch) for _ in range(many)], device) / many

    for k, factor in enumerate(model.factors):
        loss, batch = Loss(factor, config, model.dims, device), pairs[k]
        with FlopCounterMode(display=False) as counter:
            loss(*batch).backward()
        if args.compile or (args.compile is None and cuda):
            loss = compiled(loss, *batch)
        if cuda:
            loss(*batch).backward()  # cuDNN tries its algorithms here
            torch.cuda.reset_peak_memory_stats(device)
        ours, work = timed(loss, factor, fused=True), counter.get_total_flops()
        memory = torch.cuda.max_memory_allocated(device) if cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        loss = Loss(plain(factor), dataclasses.replace(config, precision="float32"), model.dims, device)
        torch.backends.cudnn.allow_tf32 = True  # torch's default
        theirs = timed(loss, loss.factor)
        torch.backends.cudnn.allow_tf32 = False
        print(f"{k:<10}{n / ours:14.1f}{n / theirs:10.1f}{theirs / ours:9.2f}{work / n / 1e9:15.2f}"
              f"{work / ours / 1e12:11.3g}{work / ours / peak:11.0%}{memory / 2**30:7.2f}", flush=True)


@torch.no_grad()
def bench_sample(args, device):
    """The sampler of the finest factor beside its forward pass, and the pyramid's whole chain."""
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 16 * 2**30
    cases = [("pyramid", "celeba", 128, {}), ("pixelcnn", "cifar10", 32, dict(nr_resnet=5))]
    print("the finest factor alone, f_w included, float32, random weights; pass: a teacher-forced pass of the batch;\n"
          "naive: a pass for every pixel, of which one is timed\n"
          "network                       batch   steps  s/image: naive    fast    pass  us/pixel  fast/pass naive/fast")
    for name, preset, side, extra in [(args.model, "tiny", 32, {})] if args.model else cases:
        (h, w), preset = args.size or (side, side), args.preset or preset
        model = build(name, (h, w), preset, args.seed or 0, **extra).to(device, memory_format=torch.channels_last)
        factor, label = model.eval().factors[-1], f"{name}, {preset}, {h}x{w}"
        for n in [args.batch_size] if args.batch_size else (1, 16, 64):
            if factor.at_once(room) < n:
                print(f"{label:30}{n:5}  left out: needs more than {room / 2**30:.0f} GiB")
                continue
            x = torch.randint(256, (n, *model.shapes[0]), dtype=torch.uint8, device=device)
            x_hat = model.levels_of(x)[-2] if model.chain else None
            draw = Draw(torch.rand(n, h * w, 2 * factor.shape[0], dtype=torch.float64, device=device))
            steps = len(Decoder(factor, n, x_hat).schedule.steps)
            turns = [(seconds(lambda: factor.head(x, x_hat), device, 2),
                      seconds(lambda: Decoder(factor, n, x_hat).run(draw), device, 1))
                     for _ in range(3 if n < 4 else 2)]  # in turn, as the machine may be shared
            forward, fast = np.min(turns, 0) / n
            print(f"{label:30}{n:5}{steps:8}{forward * h * w:16.1f}{fast:8.3f}{forward:8.3f}{fast / h / w * 1e6:10.1f}"
                  f"{fast / forward:11.2f}{forward * h * w / fast:11.0f}", flush=True)
        if name == "pyramid":
            chain = seconds(lambda: model.sample(1), device, 2)
            print(f"{label:30}    1  the whole chain, f_w included: {chain:.2f} s")
    print("for reference: the paper 4,000 us/pixel (Titan X, no caching), PixelCNN++ 50,000 (caching, as it quotes)")


# --- Commands --------------------------------------------------------------------------------------------------------


REPORT = """\
{} test images, bits/dim. of X: bits / {}, which add up; own: bits / sub-pixels of the level; cumulative: bits of all
levels so far / sub-pixels of this one (the model stopped there: the paper's Table 2). bound: the paper's, <=; exact: =.

                            of X                     own              cumulative
factor                     bound       exact       bound       exact       bound       exact"""


def report(model, bound, tight, shapes=None, images=None, samples=None):
    """The table that `eval` prints, and the same as a dict; bound, tight: as `evaluate` returns them.

    With shapes, also the distance of images, which came from it, to their true probability, and how many of samples,
    the model's, decode; both are uint8 (N, H, W, 3).
    """
    both, n = np.stack([bound, tight]), bound.shape[1]  # (2, factors, N)
    lines, result, pair = [REPORT.format(n, model.dims)], dict(images=n, factors=[]), "{:20}{:12.4f}{:12.4f}"
    for k, factor in enumerate(model.factors):
        row, dims = dict(factor=model.names[k]), math.prod(factor.shape)
        for of, first, per in (("of_x", k, model.dims), ("own", k, dims), ("cumulative", 0, dims)):
            row[f"bound_{of}"], row[f"exact_{of}"] = bits_per_dim(both[:, first : k + 1].sum(1).mean(1), per).tolist()
        lines.append((pair + 4 * "{:12.4f}").format(*row.values()))
        result["factors"].append(dict(row, shape=factor.shape))
    bits = bits_per_dim(both.sum(1), model.dims)  # (2, N)
    means = np.random.default_rng(0).choice(bits, (1000, n), axis=1).mean(2)  # bootstrap over the images
    total, (first, second) = bits.mean(1).tolist(), np.percentile(means, [2.5, 97.5], axis=1).T.tolist()
    result |= dict(bound=total[0], exact=total[1], bound_interval=first, exact_interval=second)
    intervals = "bound [{:.4f}, {:.4f}], exact [{:.4f}, {:.4f}]".format(*first, *second)
    lines += [pair.format("total", *total), f"95% intervals over the images: {intervals if n > 1 else 'none of one'}"]
    if shapes:
        true = float(bits_per_dim(shapes.log_prob(images).mean(), model.dims))
        shape = bits_per_dim(-shapes.log_configurations, model.dims)
        excess = [model.dims * (bits - true) for bits in total]
        result |= dict(true=true, bound_excess_bits=excess[0], exact_excess_bits=excess[1],
                       decodable=float(shapes.decodable(samples).mean()))
        lines += [f"{pair.format('true p(X)', true, true)}  the limit; {shape:.4f} of it are the shape, the rest noise",
                  "excess over the true p(X): bound {:.1f}, exact {:.1f} bits per image".format(*excess),
                  f"samples whose shape decodes: {result['decodable']:.0%} of {len(samples)}"]
    return "\n".join(lines), result


def run_to_train(args, out):
    """(config, data) of a new run in folder out, or of the one there that goes on. Raises Problem."""
    chosen = {key: value for key, value in vars(args).items() if key in Config.__annotations__ and value is not None}
    if args.steps and args.budget:
        raise Problem("--steps and --budget exclude each other")
    if args.steps:
        chosen["steps"] = (args.steps, args.steps)
    if args.budget:
        chosen["anneal"] = True  # a run of any length ends annealed
    what, pattern = ("a run", "*") if args.factor is None else (f"factor {args.factor}", args.factor)
    settings, there = out / "config.json", any(out.glob(f"factor-{pattern}.pt"))
    if not args.resume and (there or (args.factor is None and settings.exists())):
        raise Problem(f"--out: {out} already holds {what}; --resume goes on with it, another folder begins anew")
    if not args.resume and not settings.exists():
        if args.size:  # one that does not fit is refused before images are decoded for it
            with torch.device("meta"):
                PixelAux(make_config(**chosen))
        data, chosen["size"] = load_data(args.data or "shapes", args.data_dir or "data", args.size)
        return make_config(**chosen), data
    try:
        config = make_config(**json.loads(settings.read_text()))
    except FileNotFoundError:
        raise Problem(f"--resume: {out} holds no run") from None
    except (ValueError, TypeError) as error:
        raise Problem(f"{settings}: not a configuration of pixelaux ({error})") from None
    for key in chosen.keys() - {"budget", "anneal", "data_dir"}:
        if (old := getattr(config, key)) != chosen[key]:
            raise Problem(f"--{key.replace('_', '-')}: {out} was begun with {old}, not {chosen[key]}; leave this flag "
                          "out to go on there, or choose another folder")
    return dataclasses.replace(config, **chosen), load_data(config.data, config.data_dir, config.size)[0]


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = pathlib.Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)|$", cpu.read_text() if cpu.exists() else "")[1] or platform.processor()
    return f"{torch.get_num_threads()} threads of {name}"


def keep_on(device, data, share=0.25):
    """Move the training images to the GPU if they take no more than this share of the memory that is free."""
    size = 0 if data.train is None or device.type != "cuda" else len(data.train) * data.train[[0]].nbytes
    if size and size < share * torch.cuda.mem_get_info(device)[0]:
        chunks = np.array_split(np.arange(len(data.train)), 1 + size // 2**26)
        data.train = torch.cat([torch.from_numpy(data.train[rows]).to(device) for rows in chunks])


def command_train(args):
    device = args.device
    if RANKS == 1:
        return train(args, device)
    if device.type == "cuda":
        torch.cuda.set_device(device := torch.device("cuda", LOCAL_RANK))
    patience = datetime.timedelta(hours=3)  # while one process downloads or decodes the data
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        train(args, device)
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        message = f"pixelaux: process {RANK} lost another one; --resume goes on from the last checkpoint"
        raise SystemExit(message) from None  # which prints it, with status 1
    torch.distributed.destroy_process_group()


def train(args, device):
    name = f"{args.model or 'pyramid'}-{pathlib.Path((args.data or 'shapes').split(':')[0]).stem}"
    out = pathlib.Path(args.out or f"runs/{name}")
    for first in (True, False):  # process of a machine: it prepares the data; nobody writes before all have looked
        if first == (LOCAL_RANK == 0):
            config, data = run_to_train(args, out)
        summed([0.0], device)
    model, k = PixelAux(config), args.factor
    if config.start:
        start = load(config.start)
        try:
            model.load_state_dict(start.state_dict())
        except RuntimeError:
            keys = itertools.takewhile(lambda key: key != "dropout", vars(config))  # what shapes the networks
            both = [(key, getattr(start.config, key), getattr(config, key)) for key in keys if key != "preset"]
            differ = [f"{key} {old}, not {new}" for key, old, new in both if old != new]
            raise Problem(f"--start: {config.start} is of another model: {'; '.join(differ)}") from None
    if k is not None and not 0 <= k < len(model.factors):
        raise Problem(f"--factor {k}: the model has factors 0..{len(model.factors) - 1}")
    if isinstance(config.budget, tuple) and len(config.budget) != len(model.factors):
        raise Problem(f"--budget: {len(config.budget)} numbers, the model has {len(model.factors)} factors")
    if config.batch_size % RANKS:
        raise Problem(f"--batch-size {config.batch_size} cannot be divided among {RANKS} processes")
    model = model.to(device, memory_format=torch.channels_last)
    keep_on(device, data)
    if RANK == 0:
        if len(data.test) < 32:
            print(f"pixelaux: warning: {len(data.test)} test images only: bits/dim. will be rough", file=sys.stderr)
        for part in out.glob("part-*" if k is None else f"part-*-{k}.pt"):  # of a run that was killed while it wrote
            part.unlink()
        write_atomically(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
        made = dict(time=time.strftime("%F %T"), command=shlex.join(["pixelaux.py", *sys.argv[1:]]), processes=RANKS,
                    hardware=hardware(device), torch=torch.__version__)
        with open(out / "commands.jsonl", "a") as file:
            file.write(json.dumps(made) + "\n")
    compile, caught = device.type == "cuda" if args.compile is None else args.compile, []
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set signals
    with contextlib.ExitStack() as restored:
        for flag, value in (("benchmark", True), ("deterministic", False)):
            setattr(torch.backends.cudnn, flag, value)
            restored.callback(setattr, torch.backends.cudnn, flag, not value)
        for number in (signal.SIGINT, signal.SIGTERM) if main_thread else ():  # only noted: no step is cut in two
            handler = signal.signal(number, lambda number, frame: caught.append(number))
            restored.callback(signal.signal, number, handler)
        for j in range(len(model.factors)) if k is None else [k]:
            show = functools.partial(show_progress, model, j, k or 0, data.test, out)
            train_factor(model, j, data, out, device, args.resume, caught, compile, args.save_every, show)
    if RANK:
        return
    save_curves(out, model.names)
    if k is not None:
        return print(f"factor {k} is in {out / f'factor-{k}.pt'}")
    few = data.test[:256]
    samples = model.sample(16 if data.shapes else 8, seed=config.seed, tight=config.tight)
    save_grid(samples, out / "samples.png")
    text, _ = report(model, *evaluate(model, few), data.shapes, few, to_array(samples[-1]))
    print(f"{text}\n\nsamples at every stage: {out / 'samples.png'}   curves: {out / 'curves.png'}\n"
          f"next: python pixelaux.py eval {out}   python pixelaux.py sample {out}{' --tight' * config.tight}")


def show_progress(model, k, first, test, out):
    """Pictures during training: samples of factors first..k, which start from test images unless first is 0."""
    given = model.levels_of(to_tensor(test[:8]).to(model.device))[first - 1] if first else None
    save_grid(model.sample(8, given=given, until=k + 1), out / "samples.png")
    save_curves(out, model.names)


def run_data(args, model):
    """The data that a run was trained on, or what --data and --data-dir say."""
    config = model.config
    return load_data(args.data or config.data, args.data_dir or config.data_dir, config.size)[0]


def result_path(args, kind, more):
    """Path of a result, without its ending; the name tells other weights, data and flags than the run's own."""
    own = ["best"] * args.best if args.run.is_dir() else [args.run.stem]
    words = [kind, *own, *([pathlib.Path(args.data).stem] if args.data else []), *(word for word in more if word)]
    return (args.run if args.run.is_dir() else args.run.parent) / "-".join(words)


def command_eval(args):
    if args.coded:
        import constriction  # noqa: F401  if it is missing, say so before the evaluation
    model = load(args.run, args.device, args.best)
    data = run_data(args, model)
    images = data.test[: args.n]
    bound, tight = evaluate(model, images, args.batch_size)
    samples = to_array(model.sample(64, args.seed or 0, tight=bool(args.tight))[-1]) if data.shapes else None
    text, result = report(model, bound, tight, data.shapes, images, samples)
    if args.coded:
        more, result["coded"] = coded(model, images[: args.coded], tight.sum(0)[: args.coded])
        text += "\n" + more
    print(text)
    path = result_path(args, "eval", [len(images) < len(data.test) and str(len(images))])  # eval.json: all images
    write_atomically(f"{path}.json", json.dumps(result, indent=1).encode())


def command_codec(args):
    """compress: IMAGE -> NAME.pxa; decompress: NAME.pxa -> NAME.png. Nothing is overwritten."""
    model, packing, targets = load(args.run, args.device, args.best), args.command == "compress", set()
    for check, path in itertools.product((True, False), map(pathlib.Path, args.files)):  # all, before one is written
        target = pathlib.Path(args.out or path.parent) / f"{path.stem}.{'pxa' if packing else 'png'}"
        content = to_tensor(read_image(path, exact=True)[None])[0] if packing else path.read_bytes()
        try:
            if not packing and path.suffix.lower() != ".pxa":
                raise Problem("expected a .pxa file")
            if target.exists():
                raise Problem(f"{target} exists already; --out FOLDER writes elsewhere")
            fitting = resized(model, content.shape[1:]) if packing else model
            if check:
                if target.resolve() in targets:
                    raise Problem(f"another of the files would go to {target}, too; rename one")
                if target.parent.is_file():
                    raise Problem(f"--out {target.parent} is a file, expected a folder")
                targets.add(target.resolve())
                continue
            total = sum(h * w for _, h, w in fitting.shapes) if packing else None
            with bar_of(desc=path.name, total=total) as bar:
                if packing:
                    x, file = content, pack(fitting, content, args.tight, bar.update)
                else:
                    x = unpack(model, content, bar.update)
                    file = image_file(to_array(x[None]))
        except Problem as error:
            raise Problem(f"{path}: {error}") from None
        write_atomically(target, file)
        rate = f", {8 * len(file) / x.numel():.3f} bits/dim" if packing else ""
        print(f"{target}: height {x.shape[1]}, width {x.shape[2]}, {len(file)} bytes{rate}")


def command_export(args):
    model = load(args.run, best=args.best)
    if os.path.exists(args.file) and "training" in read_checkpoint(args.file):  # Problem if it is something else
        raise Problem(f"{args.file}: a checkpoint of training, which is not overwritten; choose another name")
    factors = {k: {name: weight.bfloat16() for name, weight in factor.state_dict().items()}
               for k, factor in enumerate(model.factors)}
    write_checkpoint(args.file, model.config, factors)
    print(f"{args.file}: {sum(p.numel() for p in model.parameters()):,} weights, {os.path.getsize(args.file):,} bytes")


def given_images(args, model):
    """Images for --given: of a level's own size as they are, of X's size through the chain down to --level."""
    if args.given == "test":
        x = run_data(args, model).test
    elif args.given.endswith(".npy"):
        x = read_npy(args.given)
    else:
        x = read_image(pathlib.Path(args.given))[None].repeat(args.n, 0)
    x, level = to_tensor(x[: args.n]), args.level or 1
    if tuple(x.shape[1:]) not in model.shapes:
        fitting = " or ".join("x".join(map(str, (h, w, c))) for c, h, w in model.shapes)
        raise Problem(f"--given {args.given}: {x.shape[2]}x{x.shape[3]}x{x.shape[1]}, expected {fitting} "
                      "(height x width x channels)")
    if tuple(x.shape[1:]) != model.shapes[0] and args.level:
        raise Problem(f"--level: {args.given} is not of X's size, so it is a level already")
    if not 1 <= level <= len(model.chain):
        raise Problem(f"--level {level}: the model has {len(model.chain)} levels below X")
    return model.levels_of(x)[len(model.chain) - level] if tuple(x.shape[1:]) == model.shapes[0] else x


def command_sample(args):
    if args.shift and args.mode == "map":
        raise Problem("--shift: --mode map draws no values, so there is no variance to change; leave one of them out")
    if args.level and not args.given:
        raise Problem("--level: goes with --given, the images that are reduced to it")
    model, seed, tight = load(args.run, args.device, args.best), args.seed or 0, bool(args.tight)
    given = given_images(args, model) if args.given else None
    n, shape = (args.n, None) if given is None else (len(given), tuple(given.shape[1:]))
    sampled = itertools.takewhile(lambda level: level != shape, model.shapes)
    with bar_of(total=n * sum(h * w for _, h, w in sampled)) as bar:
        levels = model.sample(n, seed, args.mode, args.shift, tight, given, not args.naive, bar.update)
    more = [args.shift and f"shift{args.shift:g}", args.given and f"given-{pathlib.Path(args.given).stem}",
            args.level and f"level{args.level}", tight and "tight"]
    out = re.sub(r"\.(png|npz)$", "", str(args.out or result_path(args, f"sample-{args.mode}-{seed}", more)))
    save_grid(levels, f"{out}.png")
    arrays = {f"level{i}": to_array(level) for i, level in enumerate(levels[::-1])}
    write_atomically(f"{out}.npz", lambda file: np.savez(file, **arrays))
    print(f"{out}.png: a row for each level, coarsest first; {out}.npz: "
          f"{', '.join(f'{k} {v.shape}' for k, v in arrays.items())}, uint8, level0 is X")


def command_bench(args):
    if args.what == "sample" and (args.precision or args.compile is not None):
        raise Problem("--precision and --compile are for bench train; sampling is float32 and not compiled")
    print(f"torch {torch.__version__}, {hardware(args.device)}, seed {args.seed or 0}")
    (bench_train if args.what == "train" else bench_sample)(args, args.device)


# --- Command line ----------------------------------------------------------------------------------------------------


def checked(kind, expected, valid):
    """A type for argparse: kind(text), which must be valid; the error tells what was expected."""
    def parse(text):
        with contextlib.suppress(ValueError, RuntimeError, AssertionError, NotImplementedError):
            if valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message):
        self.exit(2, f"pixelaux: {message}; see {self.prog} --help\n")


def parser():
    top = Parser(prog="pixelaux.py", description="PixelCNN models with auxiliary variables (Kolesnikov & Lampert 2017)")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, function, text in (("train", command_train, "train all factors of a model in turn, or one of them"),
                                 ("eval", command_eval, "bits/dim on the whole test set, by factor and resolution"),
                                 ("sample", command_sample, "a picture of samples, and the arrays"),
                                 ("compress", command_codec, "images, losslessly, into .pxa files"),
                                 ("decompress", command_codec, ".pxa files into PNG files"),
                                 ("export", command_export, "all factors in one small file, weights in bfloat16"),
                                 ("bench", command_bench, "speed, beside plain implementations in one process")):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function, parser=command)

    def add(names, flag, text=None, **options):
        for name in names.split():
            commands.choices[name].add_argument(flag, help=text, **options)

    count = checked(int, "a whole number above 0", lambda value: value > 0)
    number = checked(float, "a number above 0", lambda value: 0 < value < math.inf)
    size = checked(lambda text: tuple(map(int, text.lower().split("x"))) * (2 if text.isdecimal() else 1),
                   "SIDE or HEIGHTxWIDTH, such as 32 or 48x64", lambda sides: len(sides) == 2 and min(sides) > 0)
    budget = checked(lambda text: tuple(map(float, text.split(","))) if "," in text else float(text),
                     "minutes above 0, such as 10 or 6,14,40", lambda every: 0 < np.min(every) <= np.max(every) < 1e9)
    seed = checked(int, "0..2147483648", lambda value: 0 <= value <= 2**31)
    device = checked(torch.device, "cpu or cuda, as available here", lambda value: torch.ones(1, device=value).item())
    best = f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu"
    flag, yes_no = dict(action="store_true", default=None), dict(action=argparse.BooleanOptionalAction)

    add("eval sample compress decompress export", "run", "output folder of train, or a checkpoint file", metavar="RUN",
        type=pathlib.Path)
    add("eval sample compress decompress export", "--best", "of a folder, best-K.pt in place of factor-K.pt",
        action="store_true")
    add("compress", "files", "images of 8-bit RGB or gray", nargs="+", metavar="FILE")
    add("decompress", "files", ".pxa files", nargs="+", metavar="FILE")
    add("export", "file", "to write", metavar="FILE")
    add("bench", "what", choices=("train", "sample"), metavar="{train,sample}")
    add("train bench", "--model", "default pyramid", choices=MODELS)
    add("train bench", "--preset", "tiny: minutes on a laptop (default); small: an hour; cifar10, celeba: the paper's",
        choices=PRESETS)
    add("train eval sample", "--data", "shapes, cifar10, celeba, folder:PATH, FILE.npy (default: shapes, or the run's)")
    add("train eval sample", "--data-dir", "where cifar10 or celeba lie or go (default: data)", metavar="FOLDER")
    add("train bench", "--size", "side of X, or HEIGHTxWIDTH (default: the data's; folder: 64)", type=size)
    add("train bench", "--batch-size", "images a step (default: the preset's; bench sample: 1, 16, 64)", type=count)
    add("eval", "--batch-size", "images at once (default: as many as fit into 1 GiB, on CUDA 8)", type=count)
    add("train", "--out", "folder of the run (default: runs/MODEL-DATA)", metavar="RUN")
    add("train", "--resume", "go on with the run in --out", **flag)
    add("train", "--start", "begin with the weights of this run or checkpoint", metavar="RUN",
        type=checked(str, "a run or a checkpoint", len))
    add("train", "--factor", "train factor K alone, 0 is the coarsest", type=int, metavar="K")
    add("train", "--steps", "for each factor (default: the preset's)", type=count)
    add("train", "--budget", "for each factor, in place of --steps; 6,14,40: one number a factor, coarsest first",
        type=budget, metavar="MINUTES")
    add("train", "--save-every", "default 120", type=number, default=120.0, metavar="SECONDS")
    add("train bench", "--precision", "of the networks (default: bfloat16 on CUDA)", choices=("float32", "bfloat16"))
    add("train bench", "--compile", "torch.compile (default: on CUDA)", **yes_no)
    add("train", "--lr", "learning rate of Adam (default: the preset's)", type=number)
    add("train", "--tight", "train the exact likelihood in place of the bound", **flag)
    add("sample", "--tight", "from the model conditioned on psi(x) = x_hat: all levels are consistent", **flag)
    add("eval", "--tight", "for the samples of shapes that are decoded; bits/dim are always both", **flag)
    add("compress", "--tight", "with the exact likelihood (default), or the paper's", default=True, **yes_no)
    add("train", "--look-right", "no: pyramid networks see up and left only, a third of the steps to sample", **yes_no)
    add("eval", "--n", "the first N test images only (default: all)", type=count)
    add("eval", "--coded", "code the first N images, restore them, compare with PNG and WebP", type=count, metavar="N")
    add("sample", "--n", "how many images (default 16)", type=count, default=16)
    add("sample", "--mode", "map: the paper's MAP sampling", choices=("random", "map"), default="random")
    add("sample", "--shift", "added to the log-scales; below 0: less variance (map has none)", default=0.0,
        type=checked(float, "a finite number", math.isfinite))
    add("sample", "--given", "start from these, of a level's size or X's: test, an image file or a .npy file")
    add("sample", "--level", "that --given of X's size are reduced to: 1 (default) is next to X", type=count)
    add("sample", "--naive", "the plain sampler, a full pass for every pixel: the oracle", **flag)
    add("sample", "--out", "writes NAME.png and NAME.npz (default: in RUN, or beside it)", metavar="NAME")
    add("compress decompress", "--out", "for the results (default: beside the files)", metavar="FOLDER")
    add("train eval sample bench", "--seed", "of everything random, 0..2^31 (default 0)", type=seed)
    add(" ".join(commands.choices), "--device", "cpu, cuda, cuda:1 (default: cuda, if any)", type=device, default=best)
    return top


def main(argv=None):
    args, unknown = parser().parse_known_args(argv)
    if unknown:  # said by the command, whose --help lists what there is
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        args.function(args)
        return 0
    except (Problem, ArithmeticError, OSError, ImportError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted"
        if isinstance(error, ImportError):
            message = f"{error.name} is not installed: pip install -r requirements.txt"
        elif isinstance(error, OSError):
            message = re.sub(r"\bpart-\d+-", "", f"{error.filename or 'output'}: {error.strerror or error}")
        print(f"pixelaux: {message}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1 if isinstance(error, ArithmeticError) else 2
