"""`medtune ...`: looking at studies, data and checkpoints."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from medtune.audit.command import data_audit
from medtune.choose.command import choose
from medtune.deploy.export_command import export
from medtune.deploy.gradcam_command import gradcam
from medtune.deploy.predict_command import predict
from medtune.deploy.serve_command import serve
from medtune.errors import ConfigError, DataError, MedtuneError
from medtune.report.command import report
from medtune.seeing import dashboard, wandb

StudyName = tyro.conf.Positional[str]
OutputPath = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]


def studies(*, storage: str | None = None, json: bool = False) -> None:
    """List the studies, oldest first.

    Args:
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        json: Print JSON.
    """
    from medtune.results import all_studies, study_summary

    found = [study_summary(study) for study in all_studies(storage)]
    if json:
        return _print_json(found)
    table = Table("study", "begun", "trials", "best", "state", box=None, pad_edge=False)
    for item in found:
        counts = " ".join(f"{n} {state}" for state, n in item["trials"].items())
        best = "" if item["best_value"] is None else f"{item['selection']} {item['best_value']:.4f}"
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(item["created"]))
        marks = [mark for mark, on in (("running", item["running"]), ("SYNTHETIC", item["synthetic"])) if on]
        driver = item["driver"]
        if driver and driver["state"] in ("failed", "crashed", "killed", "stopped"):
            marks.append(driver["state"])
        table.add_row(item["name"], begun, counts, best, " ".join(marks))
    _print_table(table, "no studies yet")
    for item in found:
        driver = item["driver"]
        if driver and driver["state"] in ("failed", "crashed"):
            print(f"{item['name']} {driver['state']}, exit status {driver['status']}: {driver['message']}")


def trials(study: StudyName, *, storage: str | None = None, json: bool = False) -> None:
    """List a study's trials.

    Args:
        study: The study's name, or its folder.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        json: Print JSON.
    """
    from medtune.audit import sentence
    from medtune.progress import brief
    from medtune.results import SYNTHETIC, load_study, trial_summary
    from medtune.usage import lines, read_usage

    found = load_study(study, storage)
    items = [trial_summary(found, row) for row in found.rows]
    if json:
        return _print_json(items)
    interrupted = any(item["faults"] or item["errors"] for item in items)
    again = ("faults", "errors") if interrupted else ()
    heads = ("trial", "state", "epochs", found.selection, "ext. auc", "ext. oa", "time", *again, "node", "settings")
    table = Table(*heads, box=None, pad_edge=False)
    for item in items:
        figures = (item["value"], item["external"].get("external/auc"), item["external"].get("external/oa"))
        shown = ("" if value is None else f"{value:.4f}" for value in figures)
        what = item["cause"] or brief(item["params"])
        seconds = f"{item['seconds']:.0f} s"
        epochs = f"{item['epochs']}/{item['epochs_asked']}" if "epochs" in item["params"] else str(item["epochs"])
        counts = (str(item["faults"]), str(len(item["errors"]))) if interrupted else ()
        table.add_row(str(item["number"]), item["state"], epochs, *shown, seconds, *counts, item["node"] or "", what)
    _print_table(table, "no trials yet")
    if interrupted:
        print("faults: times its process or machine died; errors: of its own, after which it was tried again")
    print(f"ext.: external test on {found.record['data']['external_name']}, images as they are")
    if leaks := sentence(found):
        print(f"  {leaks}")
    for line in lines(read_usage(found.folder)):
        print(line)
    if found.record["synthetic"]:
        print(SYNTHETIC)


def best(
    study: StudyName,
    *,
    by: str | None = None,
    top: int = 1,
    drop_leaked: bool = False,
    storage: str | None = None,
    json: bool = False,
) -> None:
    """Name the configuration to deploy.

    Args:
        study: The study's name, or its folder.
        by: Metric to rank by; default: the study's selection metric, on val.
        top: How many to show.
        drop_leaked: Also give the external figures without the images that have near-duplicates in the training set.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        json: Print JSON.
    """
    from medtune.results import best as answer
    from medtune.results import load_study, print_best, without_leaked

    read = load_study(study, storage)
    found = answer(read, by, max(1, top))
    for trial in found["trials"] if drop_leaked else ():
        trial["without_leaked"] = without_leaked(read, trial["number"])
    _print_json(found) if json else print_best(found)


def compare(
    study: StudyName, *, output: OutputPath = None, storage: str | None = None, json: bool = False
) -> None:
    """Print the report's tables with a study's figures beside them, and write them as a page and as CSV.

    Args:
        study: The study's name, or its folder.
        output: Folder for compare.html and compare.csv; default: the study's, or its bucket.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        json: Print JSON.
    """
    from medtune.compare import compare as compared
    from medtune.compare import print_comparison, to_json, write
    from medtune.results import load_study

    found = load_study(study, storage)
    comparison = compared(found)
    if not json:
        print_comparison(comparison, _console())
    paths = write(comparison, output or found.folder)
    written = [found.keep(path) for path in paths]
    if json:
        return _print_json({**to_json(comparison), "files": [str(path) for path in paths]})
    print("\n".join(f"written: {where}" for where in written))


def curves(
    study: StudyName,
    trials: tyro.conf.Positional[tuple[int, ...]] = (),
    *,
    output: OutputPath = None,
    storage: str | None = None,
) -> None:
    """Draw loss, OA, AUC, sensitivity, specificity and F1 over the epochs, train and val.

    Args:
        study: The study's name, or its folder.
        trials: Numbers of the trials to draw; default: the best three.
        output: Picture to write, .png, .svg or .pdf; default: curves.png in the study's folder or bucket.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.curves import draw
    from medtune.results import SYNTHETIC, load_study

    found = load_study(study, storage)
    path = output or found.folder / "curves.png"
    drawn = draw(found, trials, path)
    print(f"trials {', '.join(map(str, drawn))} drawn: {found.keep(path)}")
    if found.record["synthetic"]:
        print(SYNTHETIC)


def evaluate(
    checkpoint: tyro.conf.Positional[Path],
    *,
    model: str | None = None,
    image_size: int | None = None,
    pair: str | None = None,
    native_size: int | None = None,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
    drop_leaked: bool = False,
    json: bool = False,
) -> None:
    """Test a checkpoint, ours or a published one, on val, test and the external set.

    Args:
        checkpoint: A .safetensors file of ours, or published weights (.pth, .pt, .safetensors).
        model: Architecture; needed for published weights.
        image_size: Side in px; needed for published weights.
        pair: Data pair; default: the checkpoint's, else pneumoniamnist-cpn.
        native_size: Side in px of the training set's files; default: the checkpoint's, else 28.
        data_dir: Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder.
        external_dir: Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR.
        drop_leaked: Also give the external figures without the images that have near-duplicates in the training set.
        json: Print JSON.
    """
    from medtune.evaluate import evaluate_checkpoint
    from medtune.results import print_figures

    found = evaluate_checkpoint(
        checkpoint,
        model=model,
        image_size=image_size,
        pair=pair,
        native_size=native_size,
        data_dir=data_dir,
        external_dir=external_dir,
        drop_leaked=drop_leaked,
    )
    if json:
        return _print_json(found)
    print_figures(found)
    for part in found.get("without_leaked", ()):
        print(part["words"])
        print_figures(part["figures"])


def sync(study: StudyName, *, storage: str | None = None) -> None:
    """Upload a study's W&B runs that were written offline.

    Args:
        study: The study's name, or its folder.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.results import load_study
    from medtune.storage.home import wandb_files_here
    from medtune.wandb_sync import sync as upload

    found = load_study(study, storage)
    with wandb_files_here(found.bucket, found.folder):
        report = upload(found.folder, where=found.where)
    print(report.describe())
    if not report.ok:
        raise MedtuneError("not all runs were uploaded; what is left is safe on disk")


def doctor(
    *,
    cluster: bool = False,
    launcher: Path | None = None,
    expect: str | None = None,
    storage: str | None = None,
    json: bool = False,
) -> int:
    """Look at this machine, or at every node of the cluster, and say what would fail a study, with the remedy.

    The exit status is 1 where something is wrong.

    Args:
        cluster: Look at all nodes of the Ray cluster that this machine is part of.
        launcher: The file you gave to `ray up`: look at that cluster, and find code that was edited here since.
        expect: Digest that medtune must have on this machine; --launcher gives it.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
        json: Print JSON.
    """
    from medtune.cluster import doctor as room
    from medtune.storage.home import storage_root

    if launcher is not None:
        return room.from_launcher(launcher, [*(("--storage", storage) if storage else ()), *["--json"] * json])
    return room.doctor(storage_root(storage), cluster=cluster, as_json=json, expect=expect)


def models(*, image_size: int = 224, classes: int = 2, json: bool = False) -> None:
    """List the models that can be trained, with what they cost.

    Args:
        image_size: Side in px of the images that multiply-adds are counted for.
        classes: Classes to tell apart.
        json: Print JSON.
    """
    from medtune.models import available
    from medtune.models.cost import NOT_COUNTED, cost, source

    if image_size < 28:
        raise ConfigError(f"image_size must be at least 28, got {image_size}")
    found = [(name, cost(name, image_size, classes), source(name)) for name in available()]
    if json:
        return _print_json([{"name": name, **counted._asdict(), "source": paper} for name, counted, paper in found])
    table = Table("model", "parameters", "multiply-adds", "source", box=None, pad_edge=False)
    for name, counted, paper in found:
        table.add_row(name, _amount(counted.parameters), _amount(counted.multiply_adds), paper)
    _print_table(table, "no models")
    print(f"with {classes} classes; multiply-adds of one image of {image_size}x{image_size} px, {NOT_COUNTED}")


def _amount(number: float) -> str:
    """`24.1 K`, `14.5 M`, `2.24 G`: three digits."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.{max(0, 3 - len(str(int(number / size))))}f}{unit}"
    return f"{number:.0f}"


def data_get(*, pair: str = "pneumoniamnist-cpn", native_size: int = 28, data_dir: Path | None = None) -> None:
    """Download a pair's files and verify them.

    Args:
        pair: Data pair.
        native_size: Side in px of the training set's files: 28, 64, 128 or 224.
        data_dir: Where to; default: $MEDTUNE_DATA, then a user cache folder.
    """
    from medtune.data import cli

    cli.get(pair=pair, native_size=native_size, data_dir=data_dir)


def data_check(
    *,
    pair: str = "pneumoniamnist-cpn",
    native_size: int = 28,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
) -> None:
    """Read and verify a pair's files in full.

    Args:
        pair: Data pair.
        native_size: Side in px of the training set's files: 28, 64, 128 or 224.
        data_dir: Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder.
        external_dir: Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR.
    """
    from medtune.data import cli

    if not cli.check(pair=pair, native_size=native_size, data_dir=data_dir, external_dir=external_dir):
        raise DataError(f"{pair} is not complete here: the table says what is missing and how to get it")


def data_where(
    *, pair: str | None = None, data_dir: Path | None = None, external_dir: Path | None = None
) -> None:
    """Print where data are looked for, and what is there.

    Args:
        pair: Data pair; default: all.
        data_dir: Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder.
        external_dir: Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR.
    """
    from medtune.data import cli

    cli.where(pair=pair, data_dir=data_dir, external_dir=external_dir)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


LONG = 1000
"""Rows from which on a table is not fitted to the terminal: measuring and wrapping it would take seconds."""


def _print_table(table: Table, none: str) -> None:
    if table.row_count < LONG:
        _console().print(table if table.row_count else none)
        return
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _console() -> Console:
    console = Console()
    # A pipe has no width: do not cut what is to be read.
    return console if console.is_terminal else Console(width=200)


COMMANDS: dict[str, Any] = {
    "studies": studies,
    "trials": trials,
    "best": best,
    "choose": choose,
    "export": export,
    "predict": predict,
    "gradcam": gradcam,
    "compare": compare,
    "curves": curves,
    "report": report,
    "evaluate": evaluate,
    "sync": sync,
    "dashboard": dashboard,
    "wandb": wandb,
    "models": models,
    "doctor": doctor,
    "data": {"get": data_get, "check": data_check, "where": data_where, "audit": data_audit},
    "serve": serve,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = COMMANDS
    prog = "medtune"
    while args and isinstance(commands.get(args[0]), dict):
        prog += f" {args[0]}"
        commands = commands[args.pop(0)]
    flat = {name: _group(name) if isinstance(command, dict) else command for name, command in commands.items()}
    try:
        _require_output_here(args)
        status = tyro.extras.subcommand_cli_from_dict(flat, args=args, prog=prog)
    except MedtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `medtune ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status or 0


def _require_output_here(args: Sequence[str]) -> None:
    """Raises ConfigError for an --output in a bucket, which would become a folder named `s3:` here."""
    for name, value in pairwise([part for arg in args for part in arg.split("=", 1)]):
        if name in ("-o", "--output") and "://" in value:
            raise ConfigError(f"{name} must be a place on this machine, got {value!r}: write here, then copy it there")


def _group(name: str) -> Any:
    def group() -> None:
        print(f"medtune {name} --help lists its commands")

    group.__doc__ = f"`medtune {name} --help` lists its commands."
    return group


if __name__ == "__main__":
    sys.exit(main())
