"""A pair that trains on a MedMNIST set and is tested on that set's own test split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medtune.data import medmnist_npz
from medtune.data.folders import data_folder, data_places, decoded_folders
from medtune.data.pair import Finding, PairData, Place, Split
from medtune.data.registry import NATIVE_SIZES, Urls
from medtune.errors import DataError


@dataclass(frozen=True, eq=False)
class External:
    """An external set as it was read."""

    split: Split
    name: str
    digest: str
    verified: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MedmnistPair:
    """See `medtune.data.registry.Pair` for its methods."""

    name: str
    medmnist: str
    """The MedMNIST set."""

    def load(
        self, *, native_size: int, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
    ) -> PairData:
        """See `medtune.data.load_pair`."""
        source, folder = medmnist_npz.source(self.medmnist, native_size), data_folder(data_dir)
        splits, digests, warnings = medmnist_npz.read(source, folder, decoded_folders(data_dir), self.name)
        own = External(splits["test"], f"{self.medmnist}-test", digests["test"])
        external = self.external(own, data_dir, external_dir, external_fallback)
        return PairData(
            name=self.name,
            classes=source.classes,
            positive=1,
            native_size=native_size,
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            external=external.split,
            external_name=external.name,
            verified_cpn=external.verified and external.name == "cpn",
            warnings=(*warnings, *external.warnings),
            fingerprint={**digests, "external": external.digest},
        )

    def external(
        self, own: External, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
    ) -> External:
        """The external set, given the own test split."""
        return own

    def get(self, *, native_size: int, data_dir: Path | None, urls: Urls | None) -> Iterator[str]:
        """Download what is missing; a file that fails does not stop the others."""
        failures: list[DataError] = []
        for step in self.steps(native_size, data_dir, urls):
            try:
                yield step()
            except DataError as error:
                failures.append(error)
        if failures:
            kind = type(failures[0]) if len({type(error) for error in failures}) == 1 else DataError
            raise kind("\n".join(map(str, failures)))

    def steps(self, native_size: int, data_dir: Path | None, urls: Urls | None) -> list[Callable[[], str]]:
        """What `get` does, a file each."""
        return [lambda: self._get_npz(native_size, data_dir, urls)]

    def _get_npz(self, native_size: int, data_dir: Path | None, urls: Urls | None) -> str:
        from medtune.data import download  # requests and rich.progress: not needed to load

        source, folder = medmnist_npz.source(self.medmnist, native_size), data_folder(data_dir)
        path = folder / source.file
        url = download.fetch(addresses(urls, source.file, (source.url,)), path, download.md5_is(source.md5))
        _, _, warnings = medmnist_npz.read(source, folder, decoded_folders(data_dir), self.name)
        return "\n".join([f"{path}: {how(url)}", *warnings])

    def check(self, *, native_size: int, data_dir: Path | None, external_dir: Path | None) -> list[Finding]:
        """Read every file in full, past the caches."""
        source = medmnist_npz.source(self.medmnist, native_size)
        return [medmnist_npz.check(source, data_folder(data_dir), self.name)]

    def where(self, *, data_dir: Path | None, external_dir: Path | None) -> list[Place]:
        """Data folders in order."""
        return self.data_folders(data_dir, ())

    def data_folders(self, data_dir: Path | None, more: tuple[str, ...]) -> list[Place]:
        """The data folders, with what is there of the set's files and of `more`."""
        files = [medmnist_npz.source(self.medmnist, size).file for size in NATIVE_SIZES] + list(more)
        places = []
        for position, (by, folder) in enumerate(data_places(data_dir)):
            found = [name for name in files if (folder / name).is_file()]
            state = ", ".join(found) if found else ("none of the files" if folder.is_dir() else "no such folder")
            places.append(Place("data folder", by, str(folder), state, position == 0))
        return places


def addresses(urls: Urls | None, file: str, published: tuple[str, ...]) -> tuple[str, ...]:
    """Where a file is downloaded from: the published addresses unless others are given."""
    return tuple(urls[file]) if urls and file in urls else published


def how(url: str | None) -> str:
    """What was done to have a file."""
    return f"downloaded from {url}" if url else "was there"
