"""Parts of a pair of one's own images: folders on this machine, one per class, with nothing to download.

README.md, "How to add", has a whole pair made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from medtune.data import image_folder
from medtune.data.folders import EXTERNAL_VARIABLE, data_folder, data_places
from medtune.data.image_folder import Layout
from medtune.data.pair import Finding, PairData, Place, Split, class_counts, digest
from medtune.data.registry import Urls
from medtune.errors import DataError, DataMissing

Places = Callable[[Path | None, Path | None], Sequence[Path]]
"""(data_dir, external_dir) -> the folders of a pair, each with a folder per class."""


def pair_data(
    name: str,
    classes: Sequence[str],
    native_size: int,
    *,
    train: Split,
    val: Split,
    test: Split,
    external: Split,
    external_name: str,
) -> PairData:
    """A pair of these splits, their digests taken; of two classes, label 1 is the positive one.

    The external set is called a folder, lest the name of one read as that of a published set.
    """
    splits = {"train": train, "val": val, "test": test, "external": external}
    return PairData(
        name=name,
        classes=tuple(classes),
        positive=1,
        native_size=native_size,
        train=train,
        val=val,
        test=test,
        external=external,
        external_name=f"{external_name} (folder)",
        fingerprint={key: digest(split) for key, split in splits.items()},
    )


def on_this_machine(
    places: Places, classes: Sequence[str]
) -> tuple[Callable[..., Iterator[str]], Callable[..., list[Finding]], Callable[..., list[Place]]]:
    """`get`, `check` and `where` of a pair whose folders are `places`; see `medtune.data.registry.Pair`."""
    expected = f"the folders {' and '.join(classes)} with images"

    def get(*, native_size: int, data_dir: Path | None, urls: Urls | None) -> Iterator[str]:
        for folder in places(data_dir, None):
            if not folder.is_dir():
                raise DataMissing(f"{folder}, which must hold {expected}, is missing. Put it there: it cannot be downloaded")
            yield f"{folder}: was there, {_state(folder, classes)}"

    def check(*, native_size: int, data_dir: Path | None, external_dir: Path | None) -> list[Finding]:
        return [_check(folder, classes, native_size, expected) for folder in places(data_dir, external_dir)]

    def where(*, data_dir: Path | None, external_dir: Path | None) -> list[Place]:
        data, by_data = data_folder(data_dir), data_places(data_dir)[0][0]
        by_external = "--external-dir" if external_dir is not None else f"${EXTERNAL_VARIABLE}"
        found = []
        for folder in places(data_dir, external_dir):
            by = by_data if folder.is_relative_to(data) else by_external
            found.append(Place("images", by, str(folder), _state(folder, classes), True))
        return found

    return get, check, where


def _check(folder: Path, classes: Sequence[str], side: int, expected: str) -> Finding:
    try:
        split = image_folder.read_classes(folder, classes, side, 1, [])
    except DataError as error:
        return Finding(str(folder), str(error), expected, "missing" if isinstance(error, DataMissing) else "broken")
    counts = zip(class_counts(split.labels, len(classes)), classes, strict=True)
    return Finding(str(folder), ", ".join(f"{n} {name}" for n, name in counts), expected, "ok")


def _state(folder: Path, classes: Sequence[str]) -> str:
    if not folder.is_dir():
        return "no such folder"
    layout = Layout({name: label for label, name in enumerate(classes)}, side=1)
    found = image_folder.class_folders(folder, layout)
    return ", ".join(f"{len(image_folder.image_files(path, layout))} {name}" for name, path in found.items()) or "no class"
