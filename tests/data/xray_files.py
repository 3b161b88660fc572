"""Small X-ray-like files."""

from __future__ import annotations

import io

from PIL import Image


def png(seed: int, size: tuple[int, int] = (256, 256), mode: str = "L") -> bytes:
    """A PNG that differs for every seed."""
    image = Image.new("L", size, seed % 251)
    image.putpixel((seed % size[0], (seed // size[0]) % size[1]), 255)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
