"""What the codec makes of test images, beside PNG and WebP: `eval --coded N`."""
import io
import math

import numpy as np
import torch
from PIL import Image

from pixelaux import Problem, bits_per_dim, counted, to_tensor, tool

FORMATS = {
    "PNG": dict(format="PNG", optimize=True),
    "lossless WebP": dict(format="WEBP", lossless=True, quality=100, method=6),
}


def coded(model, images, nats):
    """Code and restore images, uint8 (N, H, W, 3): how many bits it takes -> (text, a dict).

    nats: (N,), their exact log p, which says how many it should. Raises Problem if an image is not
    restored.
    """
    n, bits, codec = len(images), 0, tool("codec")
    at_once = min(64, *(factor.at_once for factor in model.factors))
    with codec.bar_of(model, "coding", 2 * n) as bar:
        for start in range(0, n, at_once):
            x = to_tensor(images[start : start + at_once])
            words = codec.compress(model, x, show=bar.update)
            if not torch.equal(codec.decompress(model, words, show=bar.update).cpu(), x):
                raise Problem(f"images {start}..{start + len(x) - 1} were not restored: "
                              "no two runs on this device round alike")
            bits += 32 * sum(map(len, words))
    rate = bits / (n * model.dims)
    ideal = float(bits_per_dim(nats.mean(), model.dims))
    result = dict(images=n, coded=rate, ideal=ideal)
    text = (f"{counted(n, 'image')} coded and restored bit for bit: {rate:.4f} bits/dim; -log2 p "
            f"{ideal:.4f} ({rate / ideal - 1:+.3%}, {(rate - ideal) * model.dims:.1f} bits an "
            "image)")
    for name, options in FORMATS.items():
        single = sum(size_of(image, options) for image in images)
        together = size_of(mosaic(images), options)
        result[name] = [8 * size / (n * model.dims) for size in (single, together)]
        text += "\n{}: {:.4f} bits/dim, as one mosaic of all {:.4f}".format(name, *result[name])
    return text, result


def size_of(image, options):
    """Bytes of the file that Pillow makes of an image, uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.tell()


def mosaic(images):
    """Images, uint8 (N, H, W, 3), in one: about as many side by side as below each other."""
    n, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(n))
    whole = np.pad(images, [(0, -n % columns), (0, 0), (0, 0), (0, 0)])
    whole = whole.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return whole.reshape(-1, columns * width, 3)
