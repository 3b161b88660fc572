"""How long a connection may keep the server waiting for a request's head; uvicorn itself waits for ever."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 10.0
"""From a connection's beginning, and from each answer; of idle ones uvicorn's own 5 seconds come first."""


class Patience(H11Protocol):
    """HTTP as uvicorn speaks it; who says nothing, or says it too slowly, is hung up on and leaves its place to others."""

    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end = self.loop.call_later(SECONDS, transport.close)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._leave()
        elif self._end is None:
            self._end = self.loop.call_later(SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def _leave(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None
