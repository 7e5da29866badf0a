"""Image files as pixels."""

import io

import numpy as np
from PIL import Image, ImageOps


def read_image(data: bytes) -> Image.Image:
    """Decode the whole file, turn it upright (EXIF), put transparent images on white, and convert to RGB.

    Raises `OSError` or `ValueError` for a file that is truncated, damaged, no image, or so large that Pillow takes it
    for a decompression bomb (over twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.verify()  # checksums; leaves the file unusable
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = _eight_bits(ImageOps.exif_transpose(file))
            if "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow's readers also raise SyntaxError, struct.error, DecompressionBombError, ...
        raise ValueError(f"not a readable image: {type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled to 8, which Pillow would clip to white; the others unchanged."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    scaled = Image.fromarray(((np.clip(values, 0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:
        opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        scaled.putalpha(Image.fromarray(opaque))
    return scaled
