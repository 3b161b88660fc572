"""One replica: a process with a bundle's predictor, asked for single images, predicting those that wait together.

The model runs in one thread, images are decoded in others; the event loop stays free, so that Ray's health checks are
answered whatever is computed.
"""

from __future__ import annotations

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ray import serve

from medtune.deploy.images import read_image
from medtune.deploy.predictor import Prediction, Predictor
from medtune.errors import BundleError, ImageError

Answer = tuple[int, dict[str, Any]]
"""A status and the JSON that goes with it."""


class Replica:
    """Answers `(image file, wants heat map)` with an Answer. Raises BundleError for a bundle that is not of `version`."""

    def __init__(self, folder: str, version: str, *, batch: int, wait: float, threads: int) -> None:
        torch.set_num_threads(threads)
        self._predictor = Predictor.load(Path(folder))
        if self._predictor.bundle.version != version:
            raise BundleError(f"{folder} is another bundle than when serving began: start `medtune serve` again")
        self._model = ThreadPoolExecutor(1)
        self._decoders = ThreadPoolExecutor(2)
        batched: Any = self._predict
        batched.set_max_batch_size(batch)
        batched.set_batch_wait_timeout_s(wait)

    async def __call__(self, file: bytes, heat_map: bool) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            # Before it joins a batch: an image that is broken costs no other its answer.
            image = await loop.run_in_executor(self._decoders, self._read, file)
            prediction = await self._predict(image)
        except ImageError as error:
            return 422, {"error": str(error), "rule": "PNG, JPEG or TIFF of 8 or 16 bits", "way_out": "send another image"}
        answer = {**prediction.to_dict(), "bundle": self._predictor.bundle.version}
        if heat_map:
            answer["heatmap"] = await loop.run_in_executor(self._model, self._heat_map, image)
        return 200, answer

    def _read(self, file: bytes) -> Any:
        # Brought to its size at once: many large ones that wait together do not fit into memory.
        return self._predictor.prepared(read_image(file)).numpy()

    @serve.batch
    async def _predict(self, images: list[Any]) -> list[Prediction]:
        return await asyncio.get_running_loop().run_in_executor(self._model, self._predictor.predict, images)

    def _heat_map(self, image: Any) -> str:
        png = io.BytesIO()
        self._predictor.heat_map(image).save(png, "png")
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


DEPLOYMENT: Any = serve.deployment(Replica)
"""What Ray Serve starts."""
