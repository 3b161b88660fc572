"""Train on PneumoniaMNIST, test on the CPN X-ray set or on a folder in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medtune.data import cpn, image_folder, medmnist_npz
from medtune.data.arrays import Decoded
from medtune.data.folders import (
    EXTERNAL_VARIABLE,
    data_folder,
    data_places,
    decoded_folders,
    external_folder,
    get_command,
)
from medtune.data.pair import Finding, PairData, Place, Split, class_counts
from medtune.data.registry import Urls
from medtune.errors import DataError, DataMissing

NAME = "pneumoniamnist-cpn"


def load(
    *, native_size: int, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
) -> PairData:
    """See `medtune.data.load_pair`."""
    caches = decoded_folders(data_dir)
    splits, digests, warnings = medmnist_npz.read(data_folder(data_dir), native_size, caches)
    found = _find_external(data_dir, external_dir)
    if found is None and external_fallback:
        external = External(splits["test"], "pneumoniamnist-test", False, digests["test"])
        warnings.append(
            f"{_missing_external(data_dir, external_dir)} "
            "The external test runs on PneumoniaMNIST's own test split: its figures say nothing about CPN X-ray"
        )
    elif found is None:
        raise DataMissing(f"{_missing_external(data_dir, external_dir)} {_external_way_out(data_dir)}")
    else:
        external = read_external(found, data_folder(data_dir), caches)
    return PairData(
        name=NAME,
        classes=("normal", "pneumonia"),
        positive=1,
        native_size=native_size,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        external=external.split,
        external_name=external.name,
        verified_cpn=external.verified_cpn,
        warnings=(*warnings, *external.warnings),
        fingerprint={**digests, "external": external.digest},
    )


@dataclass(frozen=True, eq=False)
class External:
    """An external set as it was read."""

    split: Split
    name: str
    verified_cpn: bool
    digest: str
    warnings: tuple[str, ...] = ()


def read_external(place: Path, data: Path, caches: list[Path]) -> External:
    """The archive or the folder at `place`; the name `cpn` only for what `medtune.data.cpn` calls verified."""
    if (archive := cpn.find_archive(place)) is not None:
        found, verified = cpn.read(archive, caches), True
    else:
        found = image_folder.read(place, caches)
        verified = found.facts["digest"] in cpn.known_images(data)
    split = Split(found.arrays["images"], found.arrays["labels"])
    name = "cpn" if verified else f"{place.resolve().name} (unverified folder)"
    warnings = () if verified else tuple(_folder_warnings(place, found, split, data))
    return External(split, name, verified, found.facts["digest"], warnings)


def _folder_warnings(place: Path, found: Decoded, split: Split, data: Path) -> list[str]:
    warnings = []
    resized, converted = found.facts["resized"], found.facts["converted"]
    if resized:
        names = image_folder.listing([Path(name).name for name in resized], 3)
        warnings.append(f"{place}: {len(resized)} images were not 256x256 and were resized to it ({names})")
    if converted:
        warnings.append(f"{place}: {converted} images were not 8-bit grey and were converted to it")
    if class_counts(split.labels, 2) == (cpn.COUNTS["NORMAL"], cpn.COUNTS["PNEUMONIA"]):
        warnings.append(
            f"{place} has as many images as CPN X-ray, but where they come from is not known, so figures are not named "
            f"cpn. Run `{get_command(data)}` once: if they are the archive's images, they are recognised then"
        )
    return warnings


def _find_external(data_dir: Path | None, external_dir: Path | None) -> Path | None:
    """What is there: a folder that was named, else the archive in the data folder, else None."""
    named = external_folder(external_dir)
    if named is not None:
        return named if named.exists() else None
    return cpn.find_archive(data_folder(data_dir))


def _missing_external(data_dir: Path | None, external_dir: Path | None) -> str:
    named = external_folder(external_dir)
    if named is not None:
        by = "--external-dir" if external_dir is not None else f"${EXTERNAL_VARIABLE}"
        return f"{named}, the external set's folder named by {by}, does not exist."
    return f"{data_folder(data_dir) / cpn.FILE} (CPN X-ray, {cpn.EXPECTED}) is missing."


def _external_way_out(data_dir: Path | None) -> str:
    folder = data_folder(data_dir)
    return (
        f"Get it with `{get_command(folder)}`, or from {cpn.PAGE} (put it at {folder / cpn.FILE}), or name a folder "
        f"that holds NORMAL/ and PNEUMONIA/ with --external-dir or ${EXTERNAL_VARIABLE}"
    )


def get(*, native_size: int, data_dir: Path | None, urls: Urls | None) -> Iterator[str]:
    """Download PneumoniaMNIST and CPN X-ray where they are missing; one that fails does not stop the other."""
    folder, caches = data_folder(data_dir), decoded_folders(data_dir)
    failures: list[DataError] = []
    for step in (lambda: _get_npz(folder, native_size, caches, urls), lambda: _get_cpn(folder, caches, urls)):
        try:
            yield step()
        except DataError as error:
            failures.append(error)
    if failures:
        kind = type(failures[0]) if len({type(error) for error in failures}) == 1 else DataError
        raise kind("\n".join(map(str, failures)))


def _get_npz(folder: Path, native_size: int, caches: list[Path], urls: Urls | None) -> str:
    from medtune.data import download  # requests and rich.progress: not needed to load

    source = medmnist_npz.source(native_size)
    at = _urls(urls, source.file, (source.url,))
    url = download.fetch(at, folder / source.file, download.md5_is(source.md5))
    _, _, warnings = medmnist_npz.read(folder, native_size, caches)
    return "\n".join([f"{folder / source.file}: {_how(url)}", *warnings])


def _get_cpn(folder: Path, caches: list[Path], urls: Urls | None) -> str:
    from medtune.data import download

    published: list[str | None] = []

    def verify(part: Path) -> None:
        published.append(None if urls else cpn.published_sha256())
        cpn.check_structure(part, published[-1])

    archive, url = cpn.find_archive(folder), None
    if archive is None:
        archive = folder / cpn.FILE
        url = download.fetch(_urls(urls, cpn.FILE, cpn.URLS), archive, verify)
    if not published:
        verify(archive)
    how = _how(url) + (", SHA-256 as its publisher lists it" if any(published) else "")
    found = cpn.read(archive, caches, how)
    return f"{archive}: {how}; {cpn.EXPECTED}; inner zip's SHA-256 {found.facts['inner_sha256']}"


def _urls(urls: Urls | None, file: str, published: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(urls[file]) if urls and file in urls else published


def _how(url: str | None) -> str:
    return f"downloaded from {url}" if url else "was there"


def check(*, native_size: int, data_dir: Path | None, external_dir: Path | None) -> list[Finding]:
    """Read every file in full, past the caches."""
    return [_check_npz(native_size, data_dir), _check_external(data_dir, external_dir)]


def _check_npz(native_size: int, data_dir: Path | None) -> Finding:
    source = medmnist_npz.source(native_size)
    path = data_folder(data_dir) / source.file
    expected = f"MD5 {source.md5}, train 4708, val 524, test 624 images of {native_size}x{native_size}"
    if not path.is_file():
        command = get_command(path.parent, native_size)
        return Finding(str(path), f"nothing; get it with `{command}`", expected, "missing")
    try:
        found = medmnist_npz.decode(path, source)
    except DataError as error:
        return Finding(str(path), str(error), expected, "broken")
    same = found.facts["md5"] == source.md5
    what = f"MD5 {found.facts['md5']}; keys, shapes, labels and counts are right"
    return Finding(str(path), what, expected, "ok" if same else "note")


def _check_external(data_dir: Path | None, external_dir: Path | None) -> Finding:
    place = _find_external(data_dir, external_dir)
    if place is None:
        missing = external_folder(external_dir) or data_folder(data_dir) / cpn.FILE
        return Finding(str(missing), f"nothing; {_external_way_out(data_dir)}", cpn.EXPECTED, "missing")
    try:
        external = read_external(place, data_folder(data_dir), [])
    except DataError as error:
        return Finding(str(place), str(error), cpn.EXPECTED, "broken")
    normal, pneumonia = class_counts(external.split.labels, 2)
    what = "; ".join([f"{external.name}: {normal} NORMAL, {pneumonia} PNEUMONIA", *external.warnings])
    return Finding(str(place), what, cpn.EXPECTED, "ok" if external.verified_cpn else "note")


def where(*, data_dir: Path | None, external_dir: Path | None) -> list[Place]:
    """Data folders in order, then the external set's."""
    places = []
    for position, (by, folder) in enumerate(data_places(data_dir)):
        files = [medmnist_npz.source(size).file for size in (28, 64, 128, 224)] + list(cpn.ARCHIVES)
        found = [name for name in files if (folder / name).is_file()]
        state = ", ".join(found) if found else ("none of the files" if folder.is_dir() else "no such folder")
        places.append(Place("data folder", by, str(folder), state, position == 0))
    from_variable = external_folder()
    named = external_folder(external_dir)
    if external_dir is not None:
        places.append(Place("external set", "--external-dir", str(named), _state(named), True))
    used = external_dir is None and from_variable is not None
    what = str(from_variable or "not set")
    places.append(Place("external set", f"${EXTERNAL_VARIABLE}", what, _state(from_variable), used))
    archive = data_folder(data_dir) / cpn.FILE
    found_archive = cpn.find_archive(archive.parent)
    state = str(found_archive.name) if found_archive else "not there"
    places.append(Place("external set", "data folder", str(archive), state, named is None and bool(found_archive)))
    return places


def _state(folder: Path | None) -> str:
    if folder is None:
        return ""
    if (archive := cpn.find_archive(folder)) is not None:
        return archive.name
    classes = image_folder.class_folders(folder).items()
    counts = [f"{len(image_folder.image_files(path))} {name}" for name, path in classes]
    return ", ".join(counts) if counts else ("neither NORMAL/ nor PNEUMONIA/" if folder.is_dir() else "no such folder")

