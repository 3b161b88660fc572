"""A server on 127.0.0.1 that cuts, stalls and lies on demand."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FaultyServer:
    """Serves `files` by path; each request takes the next of `faults` (None: behave).

    Faults: ("cut", n) sends n bytes of the body, then closes; ("status", code); ("slow", seconds) waits before the
    second half; "no-range" ignores Range; "silent" answers nothing; "close" closes the connection at once;
    ("body", bytes) sends these bytes instead.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[Any] = []
        self.requests: list[tuple[str, str | None]] = []
        self.etag = '"one"'
        self.length = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                outer._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted))
        fault = self.faults.pop(0) if self.faults else None
        kind, value = fault if isinstance(fault, tuple) else (fault, None)
        if kind == "silent":
            time.sleep(3)
            return
        if kind == "close":
            return
        if kind == "status" or request.path.lstrip("/") not in self.files:
            request.send_error(value or 404)
            return
        body = value if kind == "body" else self.files[request.path.lstrip("/")]
        start, same = 0, request.headers.get("If-Range", self.etag) == self.etag
        if wanted and kind != "no-range" and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        if self.length:
            request.send_header("Content-Length", str(len(body) - start))
        request.send_header("ETag", self.etag)
        request.end_headers()
        rest = body[start:]
        if kind == "cut":
            rest = rest[:value]
        if kind == "slow":
            request.wfile.write(rest[: len(rest) // 2])
            request.wfile.flush()
            time.sleep(value)
            rest = rest[len(rest) // 2 :]
        request.wfile.write(rest)
