"""`medtune serve`."""

from __future__ import annotations

from pathlib import Path

import tyro


def serve(
    bundle: tyro.conf.Positional[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    threads: int | None = None,
    batch: int = 16,
    batch_wait_ms: float = 5.0,
    max_mb: float = 20.0,
    waiting: int = 64,
    seconds: float = 30.0,
    token_file: Path | None = None,
) -> None:
    """Serve a bundle: a page to drop an image on, and POST /predict, until Ctrl-C.

    Args:
        bundle: Folder that `medtune export` wrote.
        host: Address to listen on; others than this machine's own (127.0.0.1) need a token.
        port: Port to listen on; 0 takes a free one.
        replicas: Processes that predict.
        threads: Threads of each; default: an equal share of the cores.
        batch: Images that are predicted together at most; 1 predicts each alone.
        batch_wait_ms: How long an image waits for others to be predicted with.
        max_mb: Size of a request from which on it is refused.
        waiting: Requests that may be under way at once; more are refused until one is answered.
        seconds: Time limit for an upload, and for a prediction.
        token_file: File with the token that requests must bring; default: $MEDTUNE_SERVE_TOKEN, else none.
    """
    from medtune.deploy.serving import ServeConfig
    from medtune.deploy.serving import serve as run

    config = ServeConfig(
        bundle=bundle,
        host=host,
        port=port,
        replicas=replicas,
        threads=threads,
        batch=batch,
        batch_wait_ms=batch_wait_ms,
        max_mb=max_mb,
        waiting=waiting,
        seconds=seconds,
        token_file=token_file,
    )
    run(config, lambda line: print(line, flush=True))
