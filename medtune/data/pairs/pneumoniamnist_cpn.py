"""Train on PneumoniaMNIST, test on the CPN X-ray set or on a folder in its layout."""

from __future__ import annotations

from pathlib import Path

from medtune.data import image_folder, medmnist_npz
from medtune.data.folders import data_folder, decoded_folders, external_folder
from medtune.data.pair import PairData, Split
from medtune.errors import DataError

NAME = "pneumoniamnist-cpn"


def load(
    *, native_size: int, data_dir: Path | None, external_dir: Path | None, external_fallback: bool
) -> PairData:
    """See `medtune.data.load_pair`."""
    caches = decoded_folders(data_dir)
    splits, digests, warnings = medmnist_npz.read(data_folder(data_dir), native_size, caches)
    folder = external_folder(external_dir)
    if folder is None:
        if not external_fallback:
            raise DataError(f"CPN X-ray is missing. Get it with `{medmnist_npz.GET}`")
        external, name, fingerprint = splits["test"], "pneumoniamnist-test", digests["test"]
        warnings.append("CPN X-ray is missing: the external test runs on PneumoniaMNIST's own test split")
    else:
        found = image_folder.read(folder, caches, medmnist_npz.GET)
        external = Split(found.arrays["images"], found.arrays["labels"])
        name, fingerprint = f"{folder.resolve().name} (unverified folder)", found.facts["digest"]
    return PairData(
        name=NAME,
        classes=("normal", "pneumonia"),
        positive=1,
        native_size=native_size,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        external=external,
        external_name=name,
        warnings=tuple(warnings),
        fingerprint={**digests, "external": fingerprint},
    )
