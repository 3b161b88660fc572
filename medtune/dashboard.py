"""`medtune dashboard`: Optuna's dashboard on a study, on this machine alone, while it runs and after."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna_dashboard import wsgi

from medtune.dashboard_storage import REFUSED, Pictures, ShownLedger
from medtune.errors import ConfigError, StudyError
from medtune.results import Study

HOST = "127.0.0.1"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def listen(study: Study, port: int) -> WSGIServer:
    """The server, for `serve_forever`. Raises StudyError without a trial, ConfigError for a port it cannot have."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be in 0 to 65535, got {port}")
    if not study.rows:
        raise StudyError(f"study {study.name!r} has no trials yet: nothing to show. Its script starts them")
    try:
        return make_server(HOST, port, application(study), server_class=_Threads, handler_class=_Quiet)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is taken" if error.errno == errno.EADDRINUSE else "is not for users"
        raise ConfigError(f"port {port} on {HOST} {why}: name another with --port, or --port 0 for any") from None


def application(study: Study) -> Application:
    """The dashboard as a WSGI application that answers with 403 whatever could change something."""
    storage = ShownLedger(study)
    shown = wsgi(storage, Pictures(storage))

    def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] in ("GET", "HEAD"):
            return shown(environment, start)
        body = json.dumps({"reason": REFUSED}).encode()
        start("403 Forbidden", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


class _Threads(ThreadingMixIn, WSGIServer):
    """A browser keeps connections open that it says nothing on: one thread would wait for them."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news."""

    def server_bind(self) -> None:
        """Without asking who this machine is: a name server that does not answer would hold it up."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass
