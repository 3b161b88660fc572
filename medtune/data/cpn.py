"""The CPN X-ray set (Mendeley Data dvntn9yhd2 v1, CC BY 4.0): its archive, and what makes a set of images verified.

Verified means: decoded from the published archive, a zip that holds an inner zip of the published name, with exactly
1626 COVID, 1802 NORMAL and 1800 PNEUMONIA images of 256x256, and the inner zip's SHA-256 equal to the one recorded on
first use (and to the publisher's own, where `medtune data get` can ask for it). A folder is verified only if its
images equal, pixel for pixel and in order, those of an archive verified before; right counts alone do not do.

Nothing is unpacked under a name from the archive: the inner zip is copied into an unnamed temporary file and images
are read out of it. The real download is untried: written and tested against a local server.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from PIL import Image

from medtune.data import image_folder
from medtune.data.arrays import Decoded, decoded, short, stamp_of, write_text
from medtune.data.folders import AGENT, get_command, is_writable, user_folder
from medtune.data.image_folder import CLASSES, EXTENSIONS, SIDE, Member
from medtune.errors import DataError

FILE = "cpn-xray.zip"
INNER = "Covid19-Pneumonia-Normal Chest X-Ray Images Dataset.zip"
ARCHIVES = (FILE, "dvntn9yhd2-1.zip", INNER)
"""Names an archive may have: ours, and those a browser gives it."""
COUNTS = {"COVID": 1626, "NORMAL": 1802, "PNEUMONIA": 1800}
PAGE = "https://doi.org/10.17632/dvntn9yhd2.1"
URLS = (
    "https://data.mendeley.com/public-api/zip/dvntn9yhd2/download/1",
    "https://prod-dcd-datasets-cache-zipfiles.s3.eu-west-1.amazonaws.com/dvntn9yhd2-1.zip",
)
LISTING = "https://data.mendeley.com/public-api/datasets/dvntn9yhd2/files?folder_id=root&version=1"
EXPECTED = "1626 COVID, 1802 NORMAL and 1800 PNEUMONIA images of 256x256"
_LARGEST_IMAGE = 64 << 20
_BROKEN = (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def find_archive(place: Path) -> Path | None:
    """The archive at `place`: the file itself, or one of `ARCHIVES` in that folder."""
    if place.is_file():
        return place
    return next((place / name for name in ARCHIVES if (place / name).is_file()), None)


def read(archive: Path, caches: Sequence[Path], origin: str = "found in place") -> Decoded:
    """Arrays `images` uint8 (3602, 1, 256, 256), NORMAL first, and `labels`, of a verified archive.

    Raises DataError for an archive that is damaged, not CPN X-ray in full, or not the one recorded on first use.
    """
    found = decoded(archive, [stamp_of(archive)], lambda: decode(archive), caches, "cpn")
    check_record(archive, found.facts, origin)
    return found


def check_structure(archive: Path, published: str | None = None) -> None:
    """Raise DataError unless `archive` is a whole zip with the right number of images per class; decodes nothing.

    `published` is the inner zip's SHA-256 as the publisher gives it, compared where known.
    """
    with _images_zip(archive) as (inner, sha):
        _members(archive, inner)
        if published and sha and sha != published:
            raise DataError(
                f"{archive} is not the published file: its inner zip has SHA-256 {sha}, the publisher lists "
                f"{published}. {_way_out(archive)}"
            )


def decode(archive: Path) -> Decoded:
    """Read the archive in full and verify it; facts `archive_sha256`, `inner_sha256`, `digest`, `converted`."""
    with _images_zip(archive) as (inner, inner_sha):
        with open(archive, "rb") as file:
            archive_sha = hashlib.file_digest(file, "sha256").hexdigest()
        members = _members(archive, inner)
        found = image_folder.decode([member for name in CLASSES for member in members[name]])
        wrong = found.facts["resized"] + _wrong_size(members["COVID"])
    if wrong:
        raise DataError(
            f"{archive} is not CPN X-ray: {len(wrong)} images are not {SIDE}x{SIDE}: {image_folder.listing(wrong)}. "
            f"{_way_out(archive)}"
        )
    facts = {**found.facts, "archive_sha256": archive_sha, "inner_sha256": inner_sha or archive_sha}
    return Decoded(found.arrays, facts)


@contextlib.contextmanager
def _images_zip(archive: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """The zip with the images in it, and its SHA-256 if it lay inside another."""
    with contextlib.ExitStack() as stack:
        try:
            images, sha = _open(archive, stack)
        except _BROKEN as error:
            size = archive.stat().st_size if archive.exists() else 0
            raise DataError(f"{archive} ({size} bytes) is not a whole zip ({error}). {_way_out(archive)}") from None
        except OSError as error:
            raise DataError(f"{archive} cannot be read: {error}") from None
        yield images, sha


def _open(archive: Path, stack: contextlib.ExitStack) -> tuple[zipfile.ZipFile, str]:
    outer = stack.enter_context(zipfile.ZipFile(archive))
    inside = [info for info in outer.infolist() if PurePosixPath(info.filename).name == INNER]
    if not inside:
        return outer, ""
    scratch = archive.parent if is_writable(archive.parent) else user_folder()
    scratch.mkdir(parents=True, exist_ok=True)
    copy = stack.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
    with outer.open(inside[0]) as packed:
        shutil.copyfileobj(packed, copy, 1 << 20)
    copy.seek(0)
    sha = hashlib.file_digest(copy, "sha256").hexdigest()
    return stack.enter_context(zipfile.ZipFile(copy)), sha


def _members(archive: Path, inner: zipfile.ZipFile) -> dict[str, list[Member]]:
    """Images by class, sorted by file name. Raises DataError unless there are exactly as many as published."""
    members: dict[str, list[Member]] = {name: [] for name in COUNTS}
    for info in sorted(inner.infolist(), key=lambda info: PurePosixPath(info.filename).name):
        path = PurePosixPath(info.filename)
        group = path.parent.name.upper()
        junk = path.name.startswith(".") or "__MACOSX" in path.parts
        if group in members and not junk and path.name.lower().endswith(EXTENSIONS) and not info.is_dir():
            label = CLASSES.index(group) if group in CLASSES else -1
            members[group].append(Member(f"{archive.name}: {path}", label, _reader(inner, info)))
    found = {name: len(images) for name, images in members.items()}
    if found != COUNTS:
        have = ", ".join(f"{n} {name}" for name, n in found.items())
        raise DataError(f"{archive} is not CPN X-ray: expected {EXPECTED}, found {have} images. {_way_out(archive)}")
    return members


def _reader(inner: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read_member() -> bytes:
        if info.file_size > _LARGEST_IMAGE:
            raise ValueError(f"{info.file_size} bytes are too many for an image of {SIDE}x{SIDE}")
        return inner.read(info)

    return read_member


def _wrong_size(members: Sequence[Member]) -> list[str]:
    """Names of the images that are not 256x256; reads them in full, which checks their CRC. DataError if broken."""
    wrong, broken = [], []
    for member in members:
        try:
            with Image.open(io.BytesIO(member.read())) as image:
                if image.size != (SIDE, SIDE):
                    wrong.append(member.name)
        except Exception as error:  # see image_folder: decoders raise what they like
            broken.append(f"{member.name}: {type(error).__name__}: {error}")
    if broken:
        raise DataError(f"{len(broken)} COVID images cannot be read:\n  " + "\n  ".join(broken))
    return wrong


def _way_out(archive: Path) -> str:
    command, place = get_command(archive.parent), archive.with_name(FILE)
    return f"Remove it and run `{command}`, or download it from {PAGE} and put it at {place}"


def record_path(archive: Path) -> Path:
    """Where an archive's digests are kept: next to it, or in the user's cache folder where that is read-only."""
    beside = archive.with_name(archive.name + ".json")
    if beside.exists() or is_writable(archive.parent):
        return beside
    return user_folder() / "records" / f"{short(str(archive.resolve()))}.json"


def check_record(archive: Path, facts: dict[str, Any], origin: str) -> None:
    """Record an archive's digests on first use; raise DataError if the ones recorded then are others."""
    path = record_path(archive)
    known = _load_record(path)
    if known is None:
        record = {
            "inner_sha256": facts["inner_sha256"],
            "archive_sha256": facts["archive_sha256"],
            "images": facts["digest"],
            "origin": origin,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if is_writable(path.parent):
            write_text(path, json.dumps(record, indent=1))
        return
    if known["inner_sha256"] != facts["inner_sha256"]:
        raise DataError(
            f"{archive} has changed: its inner zip has SHA-256 {facts['inner_sha256']}, on first use it had "
            f"{known['inner_sha256']} ({path}, {known.get('recorded')}). {_way_out(archive)}; remove the record too "
            "if the new one is to be trusted"
        )


def known_images(*folders: Path) -> set[str]:
    """Digests of the images of archives that were verified before, from records in these folders and the user's."""
    records = [folder / f"{name}.json" for folder in folders for name in ARCHIVES]
    records += sorted((user_folder() / "records").glob("*.json"))
    return {record["images"] for path in records if (record := _load_record(path))}


def _load_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
        return record if {"inner_sha256", "images"} <= set(record) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}, the record of CPN X-ray's digests, cannot be read ({error}): remove it") from None


def published_sha256(listing: str | None = None, timeout: float = 10.0) -> str | None:
    """The inner zip's SHA-256 as the publisher lists it; None where it cannot be had."""
    try:
        answer = requests.get(listing or LISTING, headers={"User-Agent": AGENT}, timeout=timeout)
        answer.raise_for_status()
        names = {file["filename"]: file["content_details"]["sha256_hash"] for file in answer.json()}
        return str(names[INNER]).lower()
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None
