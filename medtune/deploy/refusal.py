"""What a request is answered with when it gets no prediction: a status and, in JSON, what is wrong and the way out."""

from __future__ import annotations

from starlette.responses import JSONResponse


class Refusal(Exception):
    """A request that is not answered with a prediction. `rule`: what would have been right; empty where that is plain."""

    def __init__(self, status: int, error: str, rule: str, way_out: str, *, retry_after: int | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error, "rule": rule, "way_out": way_out}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def response(self) -> JSONResponse:
        """As it is sent."""
        return JSONResponse(self.body, self.status, self.headers)
