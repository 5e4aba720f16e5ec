"""Image files and data sets in: CIFAR-10, CelebA, and your own pictures in a folder or zip file."""
import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing.pool
import os
import pathlib
import tarfile
import tempfile
import urllib.request
import zipfile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pixelaux import (
    Dataset, Problem, Quiet, Rows, fingerprint, progress_bar, split, write_atomically)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
SIZES = {"cifar10": (32, 32), "celeba": (128, 128), "folder": (64, 64)}
RULES = 1  # version of all that makes images of files, and of `split`, in the cache's names
WHITES = (1, 255, 4095, 65535)  # what white may be in numbers that do not tell it:
KINDS = {"F": "float", "I": "32-bit", "I;16": "16-bit"}  # those of Pillow's images of these modes
OVERSHOOT = 1.05  # values up to this much above white are clipped


class WhiteUnknown(Exception):
    """(kind, white): all images of the kind decide what white is; by this one, it is this."""


def shown(what):
    """A file's name, or what an error says: one line that can be printed, whatever bytes it has."""
    text = getattr(what, "strerror", None) or str(what) or type(what).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


def download(url, path, md5, or_else=""):
    """Fetch url to path; what came before a connection broke off is kept. Raises Problem."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the name is everyone's: a second process waits
            if path.exists():
                return part.unlink(missing_ok=True)
            have = max(0, file.seek(0, os.SEEK_END) - 1)  # a server refuses to send no byte
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                if reply.status != 206:  # it does not go on where we stopped, but starts again
                    have = 0
                file.truncate(have)
                total = have + int(reply.headers.get("Content-Length", 0))
                with progress_bar(total=total, initial=have, unit="B", unit_scale=True) as bar:
                    while chunk := reply.read(2**20):
                        bar.update(file.write(chunk))
            if file.tell() < total:
                raise OSError("the connection broke off")
            file.seek(0)
            found = hashlib.file_digest(file, "md5").hexdigest()
            if found == md5:
                return os.replace(part, path)
            file.truncate(0)  # not removed: who waits has it open
            raise OSError(f"MD5 {found}, expected {md5}; what came was dropped")
    except Exception as error:  # urllib raises many kinds
        raise Problem(f"{url}: {shown(error)}; run again, or fetch it to {shown(path)}{or_else}")


def read_cifar10(folder):
    """uint8 (60000, 32, 32, 3), the last 10,000 for the test, of the binary archive or unpacked."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    source = folder if folder.is_file() else folder / "cifar-10-binary.tar.gz"
    for place in (folder, folder / "cifar-10-batches-bin"):
        if all((place / name).is_file() for name in names):
            source = place
    if not source.exists():
        or_else = f", or {names[0]} .. {names[-1]} to {shown(folder)}[/cifar-10-batches-bin]"
        download(CIFAR10_URL, source, CIFAR10_MD5, or_else)
    try:
        if source.is_dir():
            parts = [(source / name).read_bytes() for name in names]
        else:
            with tarfile.open(source) as tar:
                parts = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
        images = np.frombuffer(b"".join(parts), np.uint8).reshape(60_000, 3073)[:, 1:]  # no labels
    except Exception as error:  # tarfile and zlib raise many kinds
        raise Problem(f"{shown(source)}: not CIFAR-10's binary archive ({shown(error)})") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def to_8_bits(image, whites):
    """An image of one of KINDS in 8-bit gray; whites: see read_image."""
    kind = image.mode[:4]  # without the order of the bytes
    values = np.asarray(image, np.float64)
    lowest, highest = values.min(), values.max()
    if not np.isfinite(values).all() or highest > OVERSHOOT * max(WHITES):
        raise Problem(f"values up to {highest:g}, expected finite ones up to {max(WHITES)}")
    white = min(white for white in WHITES if highest <= OVERSHOOT * white)
    if whites is not None and kind not in whites:
        raise WhiteUnknown(kind, white)
    white = white if whites is None else whites[kind]
    if lowest < (1 - OVERSHOOT) * white:
        raise Problem(f"values down to {lowest:g}, expected 0..{white}")
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))


def read_image(file, size=None, celeba=False, exact=False, whites=None):
    """The image in a file (pathlib.Path or zipfile.Path) as RGB, uint8 (H, W, 3).

    All of Pillow's formats and modes: transparency goes over white, EXIF rotation is applied.
    size: (H, W), to which a centre crop of that aspect is resized. celeba: first the paper's crop
    of an aligned image, 218x178: 25 left and right, 50 top, 40 bottom. exact: refuse what would
    lose something as 8-bit RGB. whites: {kind: value of white}; None: by the image's own maximum.
    Raises Problem, from what caused it, and WhiteUnknown if whites lacks the image's kind.
    """
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            deep = ";16" in str(image.tile)  # 16 bits a colour, of which Pillow takes the upper 8
            other = deep or image.mode not in ("RGB", "L") or image.has_transparency_data
            if exact and (other or getattr(image, "n_frames", 1) > 1):
                raise Problem(f"of mode {image.mode}, expected one image of 8-bit RGB or gray only")
            if image.format == "PPM" and image.mode == "I":  # which does tell, and Pillow heeds it
                whites = {"I": 65535}
            image = ImageOps.exif_transpose(image)
        shape = f"{image.height}x{image.width}"
        if celeba:
            if image.size != (178, 218):
                raise Problem(f"{shape} (height x width), expected CelebA's aligned 218x178")
            image = image.crop((25, 50, 153, 178))
        if size and (image.height < size[0] or image.width < size[1]):
            raise Problem(f"{shape} is smaller than --size {size[0]}x{size[1]} (height x width)")
        if image.mode[:4] in KINDS:
            image = to_8_bits(image, whites)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        if size:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
        return np.array(image)
    except WhiteUnknown:
        raise
    except Exception as error:  # Pillow and zipfile raise many kinds
        unknown = isinstance(error, UnidentifiedImageError)  # whose text shows a Python object
        reason = "not an image that Pillow can read" if unknown else shown(error)
        raise Problem(f"{shown(file)}: {reason}") from error


def is_data(name):
    """Whether a file or folder is meant: hidden ones and __MACOSX are other programs' notes."""
    return name == ".." or not name.startswith(".") and name != "__MACOSX"


def find_in_zip(source, found, word):
    """Add a zip file's images, if `word` is in their names, to `found`; see find_in_folder."""
    archive, state = zipfile.ZipFile(source), source.stat()
    for name in archive.namelist():
        file = zipfile.Path(archive, name)
        image = file.suffix.lower() in Image.registered_extensions() and file.is_file()
        if image and word in f"{source.name}/{name}" and all(map(is_data, name.split("/"))):
            found[f"{source.resolve()}/{name}", state.st_size, state.st_mtime_ns] = file


def find_in_folder(path, found, seen, lines):
    """Add the image files at `path`, in any depth, to `found`: {(real path, size, time): path}."""
    real = os.path.realpath(path)
    if real in seen:  # links are followed, but they may lead round in a circle
        return
    seen.add(real)
    try:
        state = path.stat()
        if path.is_dir():
            for name in sorted(filter(is_data, os.listdir(path))):
                find_in_folder(path / name, found, seen, lines)
        elif path.is_file() and path.suffix.lower() in Image.registered_extensions():
            found[real, state.st_size, state.st_mtime_ns] = path
    except OSError as error:
        lines.append(f"skipped {shown(path)}: {shown(error)}")


def cache_folder(lines):
    """A folder for decoded images that can be written to; `lines` tell if it is temporary."""
    places = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    for place in filter(os.path.isabs, places):  # not if it is not set, or there is no home
        folder = pathlib.Path(place, "pixelaux")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError:
            continue
    folder = pathlib.Path(tempfile.gettempdir(), f"pixelaux-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    if folder.exists() and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="pixelaux-"))  # somebody else made it
    lines.append(f"neither XDG_CACHE_HOME nor ~/.cache can be written to; the cache is {folder}")
    return folder


def decode(files, size, celeba, out):
    """Write the images to the open file `out`; -> what to tell, whether to try again next time."""
    problems, whites = [], {}

    def attempt(file):
        try:
            return read_image(file, size, celeba, whites=whites)
        except (Problem, WhiteUnknown) as error:  # returned: raised, it would stop the others
            return error

    with multiprocessing.pool.ThreadPool() as pool:
        while files:  # a second time for images whose white depends on all of their kind
            later, highest = [], {}
            for start in progress_bar(range(0, len(files), 256), desc="decoding, 256 files a step"):
                some = files[start : start + 256]  # not all, lest decoding run ahead of the disk
                for file, image in zip(some, pool.imap(attempt, some)):
                    if isinstance(image, WhiteUnknown):
                        kind, white = image.args
                        highest[kind] = max(highest.get(kind, 0), white)
                        later.append(file)
                    elif isinstance(image, Problem):
                        problems.append(image)
                    else:
                        out.write(image.tobytes())
            whites |= highest
            files = later
    if not out.tell():
        raise Problem(f"none of the image files could be read; the first: {problems[0]}")
    told = [f"{KINDS[kind]} images: white is {white} in all" for kind, white in whites.items()]
    told += [f"skipped {problem}" for problem in problems]
    causes = [problem.__cause__ for problem in problems]  # only the system's errors have a number
    return told, any(isinstance(x, MemoryError) or getattr(x, "errno", None) for x in causes)


def cached(path, files, size, celeba):
    """The images in the files, uint8 (N, H, W, 3) mapped from the cache; what is known of them."""
    beside = path.with_suffix(".json")
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as scratch:
            part = pathlib.Path(scratch, "part")
            with open(part, "wb") as out:
                told, again = decode(files, size, celeba, out)
                out.flush()
                os.fsync(out.fileno())
            images = np.memmap(part, np.uint8, "r").reshape(-1, *size, 3)
            notes = dict(told=told, test=split(images)[1].tolist(), fingerprint=fingerprint(images))
            if again:
                return images, notes  # the map outlives its file
            if not path.exists():  # else another process was faster: its files are taken
                write_atomically(beside, json.dumps(notes).encode())
                os.replace(part, path)
    return np.memmap(path, np.uint8, "r").reshape(-1, *size, 3), json.loads(beside.read_bytes())


def load(spec, folder, size=None):
    """The data set "cifar10", "celeba" (both in `folder`) or "folder:PATH", a folder or zip file.

    size: (H, W), or None: see SIZES. What was decided or skipped is told on stderr. Raises Problem.
    """
    kind, _, path = spec.partition(":")
    if kind not in SIZES or (kind == "folder") != bool(path):
        raise Problem(f"unknown data {shown(spec)}: expected shapes, cifar10, "
                      "celeba, folder:PATH or FILE.npy")
    folder = pathlib.Path(os.path.expanduser(path or folder))
    size = tuple(size or SIZES[kind])
    if kind == "cifar10":
        if size != SIZES[kind]:
            raise Problem(f"CIFAR-10 images are 32x32 (height x width), not {size[0]}x{size[1]}")
        images = read_cifar10(folder)
        return Dataset(images[:50_000], images[50_000:], True, fingerprint(images))
    found, lines, sources, word = {}, [], [folder], ""
    expected = "expected a folder or a zip file of images"
    if kind == "celeba":
        word = "img_align_celeba"
        expected = f"expected {word}.zip or its JPEGs (mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
        sources = [*sorted(folder.glob("*.zip")), folder]
    try:
        for source in sources:
            if not source.is_dir():
                if word in source.name or zipfile.is_zipfile(source):
                    find_in_zip(source, found, word)
            elif not found:
                find_in_folder(source, found, set(), lines)
    except (OSError, zipfile.BadZipFile) as error:
        raise Problem(f"{shown(source)}: {shown(error)}; {expected}") from None
    if not found:
        raise Problem(f"{shown(folder)}: no image files there; {expected}")
    files = sorted(found.values(), key=lambda file: (file.name, str(file)))
    digest = hashlib.sha256(repr((RULES, sorted(found))).encode()).hexdigest()[:12]
    path = cache_folder(lines) / f"{kind}-{size[0]}x{size[1]}-{digest}.bytes"
    try:
        images, notes = cached(path, files, size, kind == "celeba")
    except OSError as error:
        raise Problem(f"{shown(path)}: {shown(error)}; set XDG_CACHE_HOME elsewhere") from None
    except Problem as error:
        raise Problem(f"{shown(folder)}: {error}") from None
    lines = sorted(lines + notes["told"], key=lambda line: line.startswith("skipped"))
    more = [f"and {len(lines) - 12} more lines"] if len(lines) > 12 else []
    for line in lines[:12] + more:
        print(f"pixelaux: {line}", file=Quiet())
    train = np.setdiff1d(np.arange(len(images)), notes["test"])
    return Dataset(Rows(images, train), Rows(images, notes["test"]), True, notes["fingerprint"])
