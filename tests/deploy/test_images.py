"""Images as users have them: read as the external test reads its own, or refused with the reason."""

from __future__ import annotations

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medtune.data.image_folder import Layout, read
from medtune.deploy import images as room
from medtune.deploy.images import as_tested, image_paths, read_image
from medtune.errors import ImageError


def picture(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA")
    if mode.startswith("I;16"):
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0])).astype(np.uint16))
    return colours.convert("RGB").convert(mode) if mode in ("P", "1", "CMYK", "F", "I") else colours.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


CASES = [
    ("L", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"),
    ("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("F", "TIFF"), ("I;16", "TIFF"), ("RGB", "WEBP"), ("L", "BMP"),
    ("P", "GIF"),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_every_kind_is_read_as_the_external_test_reads_it(mode: str, kind: str, channels: int, tmp_path: Path) -> None:
    data = encoded(picture(mode), kind)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.png").write_bytes(data)
    tested = read(tmp_path, Layout({"a": 0, "b": 1}, 24, channels), [tmp_path / "cache"], "").arrays["images"][0]
    image = read_image(tmp_path / "a" / "one.png")
    assert image.dtype == np.uint8 and image.shape[1:] == (30, 40)
    assert len(image) == (3 if mode in ("RGB", "RGBA", "P", "CMYK") else 1)
    np.testing.assert_array_equal(as_tested(image, channels, 24, 24, 28), tested)
    np.testing.assert_array_equal(read_image(data), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_the_way_up_that_its_exif_says(orientation: int) -> None:
    upright = picture("L", (16, 8))
    ways = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")
    back = dict(enumerate(ways, 2))
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_image(encoded(stored, exif=exif))[0], np.asarray(upright))


def test_images_of_the_training_files_size_stay_as_they_are() -> None:
    image = read_image(encoded(picture("L", (28, 28))))
    np.testing.assert_array_equal(as_tested(image, 1, 64, 64, 28), image)
    assert as_tested(image, 3, 64, 64, 28).shape == (3, 28, 28)
    assert as_tested(image[:, 1:], 1, 64, 64, 28).shape == (1, 64, 64)


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(levels)))[0].ravel(), np.arange(256))


@pytest.mark.parametrize("kind", ["F", "I"])
def test_levels_of_neither_8_nor_16_bits_are_refused(kind: str) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)

    def file(levels: np.ndarray) -> bytes:
        return encoded(Image.fromarray(levels.astype({"F": np.float32, "I": np.int32}[kind])), "TIFF")

    strange = [-100 * ramp, 1e6 * ramp]
    if kind == "F":
        strange += [ramp, np.where(ramp > 0.5, np.nan, ramp * 255), np.where(ramp > 0.5, np.inf, ramp * 255)]
    for levels in strange:
        with pytest.raises(ImageError, match=r"levels are .* save it with 8 or 16 bits"):
            read_image(file(levels))
    for top in (255, 65535):
        assert read_image(file((top * ramp).round())).max() == 255
    assert read_image(file(np.round(ramp))).max() == 1  # a mask is dark, but whole levels are what they are


def test_of_large_images_one_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LARGE", 1000)
    inside: list[int] = []

    def slowly(image: Image.Image, channels: int) -> Image.Image:
        inside.append(1)
        time.sleep(0.02)
        assert len(inside) == 1
        inside.pop()
        return image.convert("L")

    monkeypatch.setattr(room, "to_levels", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read_image, [encoded(picture("L"))] * 4))) == 4


def bomb(side: int) -> bytes:
    """A PNG whose header says that it is `side` x `side`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image"),
        (b"hello", "no image"),
        (encoded(picture("RGB"))[:600], "damaged"),
        (encoded(picture("L"), "JPEG")[:300], "damaged"),
        (bomb(12_000), "12000 x 12000 pixels"),
        (bomb(60_000), "too many pixels"),
        (bytes(128) + b"DICM" + bytes(50), "DICOM"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(data)


def test_files_that_are_not_there_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.png", tmp_path, Path("a\0b")):
        with pytest.raises(ImageError):
            read_image(path)
    (tmp_path / "large.png").write_bytes(encoded(picture("L")))
    monkeypatch.setattr(room, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="MB"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize(("shape", "kind"), [((4, 9, 9), "u1"), ((9, 9), "u1"), ((1, 9, 9), "f8"), ((1, 0, 9), "u1")])
def test_arrays_that_are_no_image_are_refused(shape: tuple[int, ...], kind: str) -> None:
    array = np.zeros(shape, kind)
    with pytest.raises(ImageError, match="uint8"):
        as_tested(array, 1, 8, 8, 28)


def test_files_folders_and_lists_are_gone_through_in_order(tmp_path: Path) -> None:
    for name in ("deep/b.PNG", "deep/er/a.jpg", "deep/notes.txt", "c.png", "deep/._b.PNG", "deep/.thumbs/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("\ufeffx.png\r\n\n y.png \nz\u2028z.png", "utf-8")  # as Windows writes it
    named = [tmp_path / "c.png", tmp_path / "deep", Path(f"@{tmp_path / 'list.txt'}"), Path("-"), Path("long" * 99)]
    found = list(image_paths(named, io.StringIO("z.png\n")))
    there = [tmp_path / name for name in ("c.png", "deep/b.PNG", "deep/er/a.jpg")]
    wanted = [*there, *map(Path, ("x.png", "y.png", "z\u2028z.png", "z.png", "long" * 99))]
    assert found == wanted
