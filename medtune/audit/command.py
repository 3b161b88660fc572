"""`medtune data audit`."""

from __future__ import annotations

import json as to_json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from medtune.audit.words import percent
from medtune.data import PairData, load_pair
from medtune.errors import ConfigError, DataError, StudyError


def data_audit(
    *,
    pair: str = "pneumoniamnist-cpn",
    native_size: int = 28,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
    study: str | None = None,
    storage: str | None = None,
    threshold: float = 0.95,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    json: bool = False,
) -> None:
    """Look for near-duplicates within and between train, val, test and the external set.

    An audit is kept in the user cache folder: the same images are looked through once.

    Args:
        pair: Data pair.
        native_size: Side in px of the training set's files: 28, 64, 128 or 224.
        data_dir: Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder.
        external_dir: Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR.
        study: Audit the data of this study, and leave the verdict in its folder, beside its external figures.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        threshold: Correlation at 28 px above which two images are near-duplicates.
        output: Folder for a contact sheet of the worst pairs, near-duplicates.png, and audit.json.
        json: Print JSON.
    """
    from medtune.audit.sheet import write_sheet
    from medtune.audit.verdict import FILE, kept_audit
    from medtune.record import write_json

    if not 0 < threshold < 1:
        raise ConfigError(f"threshold must be between 0 and 1, got {threshold:g}")
    if study is not None:
        data, record = _of_study(study, storage, data_dir, external_dir, threshold)
    else:
        data = load_pair(pair, native_size=native_size, data_dir=data_dir, external_dir=external_dir)
        record = kept_audit(data, threshold, _say)
    sheet = None
    if output is not None:
        sheet = write_sheet(record, data, output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / FILE, record)
        except OSError as error:
            raise DataError(f"cannot write to {output}: {error.strerror}. Name another folder with -o") from None
    if json:
        return print(to_json.dumps(record, indent=1))
    print_audit(record)
    if sheet:
        print(f"the worst pairs: {sheet}")


def _of_study(
    name: str, storage: str | None, data_dir: Path | None, external_dir: Path | None, threshold: float
) -> tuple[PairData, dict[str, Any]]:
    from medtune.audit.verdict import FILE, kept_audit, write
    from medtune.results import data_of, load_study
    from medtune.storage.patience import reason

    found = load_study(name, storage)
    data, other = data_of(found, data_dir, external_dir)
    if other:
        raise DataError(
            f"the {' and '.join(other)} images here are not those of study {found.name!r}, which was tested on "
            f"{found.record['data']['external_name']}: name its data with --data-dir and --external-dir"
        )
    record = kept_audit(data, threshold, _say)
    try:
        write(found.folder, record, data, found.record["settings"]["external_limit"])
    except OSError as error:
        raise StudyError(f"cannot write the verdict into {found.folder}: {reason(error)}") from None
    found.keep(found.folder / FILE)
    return data, record


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_audit(record: Mapping[str, Any]) -> None:
    """For people: a table of pairs of splits, what is usual, the verdict."""
    table = Table("images of", "with a partner in", "exact", "hash", "correlated", "other label", box=None, pad_edge=False)
    for names, found in record["leaked"].items():
        of, _, among = names.partition(" in ")
        shown = [_count(found, kind) for kind in ("exact", "perceptual", "correlated", "other_label")]
        table.add_row(f"{of} ({found['of']})", among if of != among else "itself", *shown)
    baseline = [percent(record["baseline"][kind]) for kind in ("exact", "perceptual", "correlated", "other_label")]
    table.add_row("usual: test", "train", *baseline)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    print(
        f"hash: pHash, at most {record['distance']} of 64 bits differ; correlated: above {record['threshold']:g} at 28 px, "
        "normalised;\nexternal images, and those of the last line, are also looked at in central crops; "
        "other label: correlated with one of another class"
    )
    print(record["words"])


def _count(found: Mapping[str, int], kind: str) -> str:
    return f"{found[kind]} ({percent(found[kind] / found['of'])})" if found[kind] else "0"
