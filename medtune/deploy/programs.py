"""The model as programs that run without medtune: `torch.export`'s for every architecture, ONNX where it is exact enough."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medtune.data import PairData
from medtune.data.transforms import prepare
from medtune.deploy.bundle import ONNX, PROGRAM
from medtune.errors import BundleError
from medtune.models import module_of

ONNX_MODULES = ("medtune.models.resnet", "medtune.models.medvit")
NO_ONNX = (
    "no ONNX: the selective scan has no operator there, and written out in plain ones it keeps every state in memory; "
    f"{PROGRAM} is for any host with PyTorch"
)
COMPARED = 16
"""Images of val that programs are compared on."""
MOST = 1e-4
"""Most that a program's logits may differ from the model's, per unit of the largest."""
BATCHES = 1024


def write(folder: Path, name: str, model: nn.Module, size: int, data: PairData) -> dict[str, Any]:
    """Write the programs of a model on the CPU; what is known of them, as the manifest has it.

    They take prepared images float32 (B, 3, size, size), any B, and give logits. Raises BundleError for a program that
    does not equal the model on images of val.
    """
    images = prepare(torch.tensor(np.asarray(data.val.images[:COMPARED])), size)
    with torch.inference_mode():
        wanted = model(images)
    takes = {"takes": f"prepared images float32 (B, 3, {size}, {size}), any B", "gives": f"logits (B, {wanted.shape[1]})"}
    program = {"file": PROGRAM, **takes, **_exported(folder / PROGRAM, model, images, wanted)}
    if module_of(name) not in ONNX_MODULES:
        return {"program": program, "onnx": {"file": None, "why": NO_ONNX}}
    return {"program": program, "onnx": {"file": ONNX, **takes, **_onnx(folder / ONNX, model, images, wanted)}}


def _batch() -> dict[int, Any]:
    return {0: torch.export.Dim("batch", min=1, max=BATCHES)}


def _exported(path: Path, model: nn.Module, images: Tensor, wanted: Tensor) -> dict[str, Any]:
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, (_pair(images),), dynamic_shapes=(_batch(),))
        torch.export.save(program, path)
        again = torch.export.load(path).module()
        found = torch.cat([again(images[:1]), again(images[1:])])
    return _compared(path, found.numpy(), wanted)


def _onnx(path: Path, model: nn.Module, images: Tensor, wanted: Tensor) -> dict[str, Any]:
    import onnxruntime

    with _quiet(), torch.no_grad():
        torch.onnx.export(
            model, (_pair(images),), path, dynamo=True, external_data=False, input_names=["images"],
            output_names=["logits"], dynamic_shapes=(_batch(),), verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(["logits"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
    return _compared(path, np.concatenate(parts), wanted)


def _pair(images: Tensor) -> Tensor:
    """Two images to trace with: of one alone, the batch would be taken for a constant."""
    return images[[0, -1]].clone()


def _compared(path: Path, found: np.ndarray, wanted: Tensor) -> dict[str, Any]:
    difference = float(np.abs(found - wanted.numpy()).max())
    if not difference <= MOST * max(1.0, float(wanted.abs().max())):
        raise BundleError(f"{path.name} does not equal the model: logits differ by up to {difference:.2g} on images of val")
    return {"largest_difference": difference, "compared_on": f"{len(found)} images of val"}


@contextlib.contextmanager
def _quiet() -> Any:
    """What exporters print and warn of their own workings is nothing to act on; errors are raised all the same."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
