"""A pair that trains on a MedMNIST set and is tested on a published external set or on a folder in its layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medtune.data import image_folder
from medtune.data.archive import Published
from medtune.data.arrays import Decoded
from medtune.data.folders import EXTERNAL_VARIABLE, data_folder, decoded_folders, external_folder, get_command
from medtune.data.medmnist_pair import External, MedmnistPair, addresses, how
from medtune.data.pair import Finding, Place, Split, class_counts
from medtune.data.registry import Urls
from medtune.errors import DataError, DataMissing


@dataclass(frozen=True)
class ExternalPair(MedmnistPair):
    """The archive in the data folder, or the folder that was named, is the external set."""

    published: Published
    note: str = ""
    """What must be known of the external set whenever figures on it are."""

    def external(
        self, own: External, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
    ) -> External:
        """The set, under its own name only when verified. Raises DataMissing where there is none and no fallback."""
        place = self._find(data_dir, external_dir)
        if place is not None:
            return self._read(place, data_dir, decoded_folders(data_dir))
        if not external_fallback:
            raise DataMissing(f"{self._missing(data_dir, external_dir)} {self._way_out(data_dir)}")
        warning = (
            f"{self._missing(data_dir, external_dir)} The external test runs on {self.medmnist}'s own test split: "
            f"its figures say nothing about {self.published.title}"
        )
        return External(own.split, own.name, own.digest, warnings=(warning,))

    def steps(self, native_size: int, data_dir: Path | None, urls: Urls | None) -> list[Callable[[], str]]:
        """The training set's file, then the archive."""
        return [*super().steps(native_size, data_dir, urls), lambda: self._get_archive(data_dir, urls)]

    def check(self, *, native_size: int, data_dir: Path | None, external_dir: Path | None) -> list[Finding]:
        """Read every file in full, past the caches."""
        findings = super().check(native_size=native_size, data_dir=data_dir, external_dir=external_dir)
        return [*findings, self._check_external(data_dir, external_dir)]

    def where(self, *, data_dir: Path | None, external_dir: Path | None) -> list[Place]:
        """Data folders in order, then the external set's."""
        places = self.data_folders(data_dir, self.published.files)
        from_variable, named = external_folder(), external_folder(external_dir)
        if external_dir is not None:
            places.append(Place("external set", "--external-dir", str(named), self._state(named), True))
        used = external_dir is None and from_variable is not None
        what = str(from_variable or "not set")
        places.append(Place("external set", f"${EXTERNAL_VARIABLE}", what, self._state(from_variable), used))
        archive = data_folder(data_dir) / self.published.files[0]
        found = self.published.find(archive.parent)
        state = found.name if found else "not there"
        return [*places, Place("external set", "data folder", str(archive), state, named is None and bool(found))]

    def _read(self, place: Path, data_dir: Path | None, caches: list[Path]) -> External:
        data, published = data_folder(data_dir), self.published
        if (archive := published.find(place)) is not None:
            found, verified = published.read(archive, caches), True
        else:
            found = image_folder.read(place, published.layout, caches, self._folder_way_out(data))
            verified = found.facts["digest"] in published.known_images(data)
        split = Split(found.arrays["images"], found.arrays["labels"])
        name = published.called if verified else f"{place.resolve().name} (unverified folder)"
        warnings = [] if verified else self._folder_warnings(place, found, split, data)
        return External(split, name, found.facts["digest"], verified, (*warnings, *[self.note] * bool(self.note)))

    def _folder_warnings(self, place: Path, found: Decoded, split: Split, data: Path) -> list[str]:
        warnings, layout = [], self.published.layout
        resized, converted = found.facts["resized"], found.facts["converted"]
        if resized and self.published.one_size:
            names = image_folder.listing([Path(name).name for name in resized], 3)
            side = f"{layout.side}x{layout.side}"
            warnings.append(f"{place}: {len(resized)} images were not {side} and were resized to it ({names})")
        if converted and self.published.one_size:
            warnings.append(f"{place}: {converted} images were not 8-bit grey and were converted to it")
        expected = [0] * len(set(layout.labels.values()))
        for name, label in layout.labels.items():
            expected[label] += self.published.counts[name]
        if class_counts(split.labels, len(expected)) == tuple(expected):
            warnings.append(
                f"{place} has as many images as {self.published.title}, but where they come from is not known, so figures "
                f"are not named {self.published.called}. Run `{get_command(self.name, data)}` once: if they are the "
                "archive's images, they are recognised then"
            )
        return warnings

    def _find(self, data_dir: Path | None, external_dir: Path | None) -> Path | None:
        """What is there: a folder that was named, else the archive in the data folder, else None."""
        named = external_folder(external_dir)
        if named is not None:
            return named if named.exists() else None
        return self.published.find(data_folder(data_dir))

    def _missing(self, data_dir: Path | None, external_dir: Path | None) -> str:
        named = external_folder(external_dir)
        if named is not None:
            by = "--external-dir" if external_dir is not None else f"${EXTERNAL_VARIABLE}"
            return f"{named}, the external set's folder named by {by}, does not exist."
        archive = data_folder(data_dir) / self.published.files[0]
        return f"{archive} ({self.published.title}, {self.published.expected}) is missing."

    def _way_out(self, data_dir: Path | None) -> str:
        folder = data_folder(data_dir)
        layout = ", ".join(f"{name}/" for name in self.published.layout.labels)
        return (
            f"Get it with `{get_command(self.name, folder)}`, or from {self.published.page} (put it at "
            f"{folder / self.published.files[0]}), or name a folder that holds {layout} with --external-dir or "
            f"${EXTERNAL_VARIABLE}"
        )

    def _folder_way_out(self, data: Path) -> str:
        command = get_command(self.name, data)
        return f"Name another folder with --external-dir, or get {self.published.title} with `{command}`"

    def _get_archive(self, data_dir: Path | None, urls: Urls | None) -> str:
        from medtune.data import download  # requests and rich.progress: not needed to load

        folder, published = data_folder(data_dir), self.published
        listed: list[str | None] = []

        def verify(part: Path) -> None:
            listed.append(None if urls else published.published_sha256())
            published.check_structure(part, listed[-1])

        archive, url = published.find(folder), None
        if archive is None:
            archive = folder / published.files[0]
            url = download.fetch(addresses(urls, archive.name, published.urls), archive, verify)
        if not listed:
            verify(archive)
        origin = how(url) + (", SHA-256 as its publisher lists it" if any(listed) else "")
        found = published.read(archive, decoded_folders(data_dir), origin)
        return f"{archive}: {origin}; {published.expected}; SHA-256 {found.facts['inner_sha256']}"

    def _check_external(self, data_dir: Path | None, external_dir: Path | None) -> Finding:
        place, expected = self._find(data_dir, external_dir), self.published.expected
        if place is None:
            missing = external_folder(external_dir) or data_folder(data_dir) / self.published.files[0]
            return Finding(str(missing), f"nothing; {self._way_out(data_dir)}", expected, "missing")
        try:
            external = self._read(place, data_dir, [])
        except DataError as error:
            return Finding(str(place), str(error), expected, "broken")
        by_label = class_counts(external.split.labels, len(set(self.published.layout.labels.values())))
        names = [" and ".join(n for n, at in self.published.layout.labels.items() if at == c) for c in range(len(by_label))]
        counts = ", ".join(f"{n} {name}" for n, name in zip(by_label, names, strict=True))
        what = "; ".join([f"{external.name}: {counts}", *external.warnings])
        return Finding(str(place), what, expected, "ok" if external.verified else "note")

    def _state(self, folder: Path | None) -> str:
        if folder is None:
            return ""
        if (archive := self.published.find(folder)) is not None:
            return archive.name
        layout = self.published.layout
        classes = image_folder.class_folders(folder, layout).items()
        counts = [f"{len(image_folder.image_files(path, layout))} {name}" for name, path in classes]
        none = "none of " + ", ".join(f"{name}/" for name in layout.labels)
        return ", ".join(counts) if counts else (none if folder.is_dir() else "no such folder")
