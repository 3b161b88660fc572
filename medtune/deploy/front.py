"""What answers HTTP: it checks the token and the limits, and passes images on to the replicas.

It runs in the process of `medtune serve`, not in Ray: the token stays here, and a replica that dies is answered for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from medtune.deploy.refusal import Refusal
from medtune.deploy.upload import read_upload

SILENCE = 15.0
"""Seconds without word from Ray after which the replicas are not said to be up."""

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page asks nobody but this server, and no other page shows it in a frame."""

log = logging.getLogger("medtune.serve")


class ReplicaLost(Exception):
    """The replica that had the image is gone."""


@dataclass
class Fleet:
    """What is known of the replicas."""

    wanted: int
    up: int = 0
    reason: str = "the replicas are starting"
    seen: float = field(default_factory=time.monotonic)
    ask: Callable[[bytes, bool], Awaitable[tuple[int, dict[str, Any]]]] | None = None
    """Has a replica predict an image file, with a heat map or without. Raises ReplicaLost."""

    def note(self, up: int, reason: str) -> None:
        """The newest word on the replicas."""
        self.up, self.reason, self.seen = up, reason, time.monotonic()

    def trouble(self) -> str | None:
        """Why no image can be predicted now; None where one can."""
        if self.ask is None or not self.up:
            return self.reason
        silence = time.monotonic() - self.seen
        return f"nothing was heard of the replicas for {silence:.0f} s" if silence > SILENCE else None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may take."""

    max_bytes: int
    waiting: int
    """Requests that are read or predicted at once."""
    seconds: float
    """For the upload, and for the prediction."""


class Front:
    """The routes, over a fleet. `about`: what GET /version answers."""

    def __init__(self, fleet: Fleet, limits: Limits, about: dict[str, Any], token: str | None) -> None:
        self._fleet = fleet
        self._limits = limits
        self._about = about
        self._token = None if token is None else f"Bearer {token}".encode()
        self._inside = 0
        self._page = files("medtune.deploy").joinpath("page.html").read_text("utf-8")

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/version", self.version),
                Route("/predict", self.predict, methods=["POST"]),
            ],
            exception_handlers={Refusal: _refused, HTTPException: _http_error, Exception: _own_error},
        )

    async def page(self, request: Request) -> Response:
        """The page to drop an image on; it holds nothing secret."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    async def health(self, request: Request) -> Response:
        """Whether images can be predicted now: 200, or 503 with the reason. Needs no token."""
        trouble = self._fleet.trouble()
        replicas = {"up": self._fleet.up, "wanted": self._fleet.wanted}
        body = {"status": "down" if trouble else "up", "replicas": replicas, "inside": self._inside}
        return JSONResponse({**body, "reason": trouble} if trouble else body, 503 if trouble else 200)

    async def version(self, request: Request) -> Response:
        """Which bundle is served, and its limits."""
        self._let_in(request)
        return JSONResponse(self._about)

    async def predict(self, request: Request) -> Response:
        """A prediction for the image that the request brings; `?heatmap=1` adds its heat map as a PNG data URI."""
        self._let_in(request)
        heat_map = _flag(request, "heatmap")
        with self._place():
            limits = self._limits
            image = await read_upload(request, max_bytes=limits.max_bytes, seconds=limits.seconds)
            status, body = await self._ask(image, heat_map)
        return JSONResponse(body, status)

    def _let_in(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._token is not None and not hmac.compare_digest(given, self._token):
            way_out = "send the header `Authorization: Bearer TOKEN` with the token that the server was started with"
            raise Refusal(401, "no valid token was sent" if given else "no token was sent", "this server wants one", way_out)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places that are there; their number bounds the memory that bodies take."""
        if trouble := self._fleet.trouble():
            raise Refusal(503, f"no replica is up: {trouble}", "", "GET /health says when one is", retry_after=2)
        if self._inside >= self._limits.waiting:
            rule = f"{self._limits.waiting} requests may wait at once"
            raise Refusal(503, "too many requests are waiting", rule, "send it again later", retry_after=1)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def _ask(self, image: bytes, heat_map: bool) -> tuple[int, dict[str, Any]]:
        assert self._fleet.ask is not None
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._fleet.ask(image, heat_map)
        except TimeoutError:
            rule = f"a prediction may take {self._limits.seconds:g} s"
            raise Refusal(504, "no replica answered in time", rule, "send the image again") from None
        except ReplicaLost:
            error = "the replica that had this image died; it is started again"
            raise Refusal(503, error, "", "send the image again", retry_after=2) from None


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "0")
    if value not in ("0", "1"):
        raise Refusal(400, f"{name} is {value[:20]!r}", "it must be 0 or 1", f"ask for ?{name}=1, or leave it out")
    return value == "1"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if error.status >= 500:
        log.warning("%s: %s", error.status, error)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    way_out = "GET / (page), GET /health, GET /version, POST /predict"
    refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "", way_out)
    return JSONResponse(refusal.body, error.status_code, dict(error.headers or {}))


async def _own_error(request: Request, error: Exception) -> Response:
    return Refusal(500, "the server failed on this image", "", "look at the server's output").response()
