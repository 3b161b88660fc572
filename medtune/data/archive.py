"""External sets that are published as one zip of class folders, with no digest of the file: what makes one verified.

Verified means: decoded from the published archive, a zip (in a zip, for some) with exactly as many images per class as
published, and the SHA-256 of the zip that holds the images equal to the one recorded on first use (and to the
publisher's own, where `medtune data get` can ask for it). A folder is verified only if its images equal, pixel for
pixel and in order, those of an archive verified before; right counts alone do not do.

Nothing is unpacked under a name from the archive: an inner zip is copied into an unnamed temporary file and images
are read out of it. The real downloads are untried: written and tested against a local server.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from medtune.data import image_folder
from medtune.data.arrays import Decoded, New, decoded, short, stamp_of, write_text
from medtune.data.folders import get_command, is_writable, user_folder
from medtune.data.image_folder import Layout, Member
from medtune.errors import DataError

_LARGEST_IMAGE = 64 << 20
_BROKEN = (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Published:
    """A set as it was published, and the checks that an archive of it must pass."""

    key: str
    """A short name, for files."""
    called: str
    """What figures on the set are called when, and only when, it is verified."""
    title: str
    files: tuple[str, ...]
    """Names an archive may have: ours first, then those a browser gives it."""
    counts: Mapping[str, int]
    """Images by class folder, the classes that are not used as well."""
    layout: Layout
    page: str
    urls: tuple[str, ...]
    pair: str
    """The pair that `medtune data get` gets the archive with."""
    inner: str | None = None
    """Name of the zip with the images, where the archive holds one."""
    one_size: bool = False
    """Whether all images are published with the layout's side."""
    published_sha256: Callable[[], str | None] = lambda: None
    """Asks the publisher for the digest of the zip with the images; None where it cannot be had."""

    @property
    def expected(self) -> str:
        """The images of the whole set, in words."""
        counts = [f"{n} {name}" for name, n in self.counts.items()]
        size = f" of {self.layout.side}x{self.layout.side}" if self.one_size else ""
        return f"{', '.join(counts[:-1])} and {counts[-1]} images{size}"

    def find(self, place: Path) -> Path | None:
        """The archive at `place`: the file itself, or one of `files` in that folder."""
        if place.is_file():
            return place
        return next((place / name for name in self.files if (place / name).is_file()), None)

    def read(self, archive: Path, caches: Sequence[Path], origin: str = "found in place") -> Decoded:
        """Arrays `images` and `labels` of a verified archive, in the layout's order of classes, then by file name.

        Raises DataError for an archive that is damaged, not the set in full, or not the one recorded on first use.
        """
        found = decoded(archive, [stamp_of(archive)], lambda new: self.decode(archive, new), caches, self.key)
        self._check_record(archive, found.facts, origin)
        return found

    def check_structure(self, archive: Path, published: str | None = None) -> None:
        """Raise DataError unless `archive` is a whole zip with the right number of images per class; decodes nothing.

        `published` is the SHA-256 of the zip with the images as the publisher gives it, compared where known.
        """
        with self._images_zip(archive) as (images, sha):
            self._members(archive, images)
            if published and sha and sha != published:
                raise DataError(
                    f"{archive} is not the published file: {self._zip} has SHA-256 {sha}, the publisher lists "
                    f"{published}. {self.way_out(archive)}"
                )

    def decode(self, archive: Path, new: New) -> dict[str, Any]:
        """Read the archive in full and verify it; facts `archive_sha256`, `inner_sha256`, `digest`, `converted`."""
        with self._images_zip(archive) as (images, inner_sha):
            with open(archive, "rb") as file:
                archive_sha = hashlib.file_digest(file, "sha256").hexdigest()
            members = self._members(archive, images)
            used = [member for name in self.layout.labels for member in members[name]]
            facts = image_folder.decode(used, self.layout, new)
            unused = [member for name in self.counts if name not in self.layout.labels for member in members[name]]
            others = self._other_sizes(unused)
        if self.one_size and (wrong := facts["resized"] + others):
            raise DataError(
                f"{archive} is not {self.title}: {len(wrong)} images are not {self.layout.side}x{self.layout.side}: "
                f"{image_folder.listing(wrong)}. {self.way_out(archive)}"
            )
        return {**facts, "archive_sha256": archive_sha, "inner_sha256": inner_sha or archive_sha}

    def known_images(self, *folders: Path) -> set[str]:
        """Digests of the images of archives verified before, from records in these folders and the user's."""
        records = [folder / f"{name}.json" for folder in folders for name in self.files]
        records += sorted((user_folder() / "records").glob("*.json"))
        return {record["images"] for path in records if (record := self._load_record(path))}

    def way_out(self, archive: Path) -> str:
        """What to do about an archive that is refused."""
        command, place = get_command(self.pair, archive.parent), archive.with_name(self.files[0])
        return f"Remove it and run `{command}`, or download it from {self.page} and put it at {place}"

    @property
    def _zip(self) -> str:
        return "its inner zip" if self.inner else "it"

    @contextlib.contextmanager
    def _images_zip(self, archive: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
        """The zip with the images in it, and its SHA-256 if it lay inside another."""
        with contextlib.ExitStack() as stack:
            try:
                images, sha = self._open(archive, stack)
            except _BROKEN as error:
                size = archive.stat().st_size if archive.exists() else 0
                raise DataError(
                    f"{archive} ({size} bytes) is not a whole zip ({error}). {self.way_out(archive)}"
                ) from None
            except OSError as error:
                raise DataError(f"{archive} cannot be read: {error}") from None
            yield images, sha

    def _open(self, archive: Path, stack: contextlib.ExitStack) -> tuple[zipfile.ZipFile, str]:
        outer = stack.enter_context(zipfile.ZipFile(archive))
        inside = [info for info in outer.infolist() if PurePosixPath(info.filename).name == self.inner]
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

    def _members(self, archive: Path, images: zipfile.ZipFile) -> dict[str, list[Member]]:
        """Images by class, sorted by file name. Raises DataError unless there are exactly as many as published."""
        names = {name.lower(): name for name in self.counts}
        members: dict[str, list[Member]] = {name: [] for name in self.counts}
        for info in sorted(images.infolist(), key=lambda info: PurePosixPath(info.filename).name):
            path = PurePosixPath(info.filename)
            group = names.get(path.parent.name.lower())
            if group and "__MACOSX" not in path.parts and not info.is_dir() and self.layout.takes(path.name):
                label = self.layout.labels.get(group, -1)
                members[group].append(Member(f"{archive.name}: {path}", label, _reader(images, info)))
        found = {name: len(images) for name, images in members.items()}
        if found != dict(self.counts):
            have = ", ".join(f"{n} {name}" for name, n in found.items())
            raise DataError(
                f"{archive} is not {self.title}: expected {self.expected}, found {have} images. {self.way_out(archive)}"
            )
        return members

    def _other_sizes(self, members: Sequence[Member]) -> list[str]:
        """Names of images that have not the layout's side; reads them in full, which checks their CRC. DataError."""
        wrong, broken = [], []
        for member in members:
            try:
                with Image.open(io.BytesIO(member.read())) as image:
                    if image.size != (self.layout.side, self.layout.side):
                        wrong.append(member.name)
            except Exception as error:  # see image_folder: decoders raise what they like
                broken.append(f"{member.name}: {type(error).__name__}: {error}")
        if broken:
            raise DataError(f"{len(broken)} images of unused classes cannot be read:\n  " + "\n  ".join(broken))
        return wrong

    def _check_record(self, archive: Path, facts: dict[str, Any], origin: str) -> None:
        """Record an archive's digests on first use; raise DataError if the ones recorded then are others."""
        path = record_path(archive)
        known = self._load_record(path)
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
                f"{archive} has changed: {self._zip} has SHA-256 {facts['inner_sha256']}, on first use it had "
                f"{known['inner_sha256']} ({path}, {known.get('recorded')}). {self.way_out(archive)}; remove the record "
                "too if the new one is to be trusted"
            )

    def _load_record(self, path: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text())
            return record if {"inner_sha256", "images"} <= set(record) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}, the record of {self.title}'s digests, cannot be read ({error}): remove it") from None


def record_path(archive: Path) -> Path:
    """Where an archive's digests are kept: next to it, or in the user's cache folder where that is read-only."""
    beside = archive.with_name(archive.name + ".json")
    if beside.exists() or is_writable(archive.parent):
        return beside
    return user_folder() / "records" / f"{short(str(archive.resolve()))}.json"


def _reader(images: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read_member() -> bytes:
        if info.file_size > _LARGEST_IMAGE:
            raise ValueError(f"{info.file_size} bytes are too many for an image")
        return images.read(info)

    return read_member
