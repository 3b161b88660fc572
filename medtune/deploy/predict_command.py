"""`medtune predict`."""

from __future__ import annotations

import contextlib
import io
import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TextIO

import tyro
from rich.console import Console
from rich.progress import track

from medtune.errors import ImageError

ANY_NAME = "surrogateescape"


def predict(
    bundle: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[str, ...]],
    *,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    gradcam: Path | None = None,
    json: bool = False,
    device: str | None = None,
) -> int:
    """Predict images with a bundle: a CSV line for each, with probabilities, decision and flags.

    The exit status is 1 where a file could not be read: it is named, the others are predicted.

    Args:
        bundle: Folder that `medtune export` wrote.
        images: Files, folders (with all below them), @list.txt with a path a line, or - for such a list from stdin.
        output: CSV to write; default: stdout.
        gradcam: Folder for pictures of what speaks for the positive class in each image.
        json: Print JSON.
        device: cpu or cuda; default: the GPU where there is one.
    """
    from medtune.deploy.images import image_paths
    from medtune.deploy.predict import Answer, Table, predictions
    from medtune.deploy.predictor import Predictor

    predictor = Predictor.load(bundle, _device(device))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _take_any_name(stream)
    paths = list(image_paths(map(Path, images), sys.stdin))
    if not paths:
        raise ImageError(f"no image in {', '.join(images) or 'an empty list'}: name files, folders with images, or a list")
    answers: list[Answer] = []
    with _named_where_it_cannot_write(output), contextlib.ExitStack() as stack:
        if gradcam:
            gradcam.mkdir(parents=True, exist_ok=True)
        opened = output.open("w", newline="", encoding="utf-8", errors=ANY_NAME) if output else None
        file = stack.enter_context(opened) if opened else sys.stdout
        table = None if json and not output else Table(file, predictor.bundle.classes)
        found = predictions(predictor, paths, gradcam)
        for answer in track(found, "predicting", len(paths), console=Console(stderr=True), disable=not sys.stderr.isatty()):
            answers.append(answer)
            if answer.error:
                print(f"{answer.path}: {answer.error}", file=sys.stderr)
            if table:
                table.add(answer)
    if json:
        print(json_module.dumps([answer.to_dict() for answer in answers], indent=1))
    bad = sum(answer.error is not None for answer in answers)
    unlike = sum(answer.prediction is not None and answer.prediction.unlike_training for answer in answers)
    print(f"{len(answers) - bad} predicted, {bad} not read, {unlike} unlike the training images", file=sys.stderr)
    return 1 if bad else 0


@contextlib.contextmanager
def _named_where_it_cannot_write(output: Path | None) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # `medtune predict ... | head` has read enough
        raise
    except OSError as error:
        what = error.filename or output or "the answers"
        raise ImageError(f"cannot write {what}: {error.strerror or error}") from None


def _take_any_name(stream: TextIO) -> None:
    """Names of files may be bytes that are no UTF-8."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=ANY_NAME)


def _device(name: str | None) -> str | None:
    import torch

    try:
        if name is not None and torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("it must be cpu or cuda")
        if name is not None:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ImageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
