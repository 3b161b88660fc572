"""Requests a second and latency of `medtune serve`, batched and one by one, at 1, 8 and 32 clients.

Run:  python -m benchmarks.serve BUNDLE [--clients 1 8 32] [--requests 400] [--replicas 1]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests
from PIL import Image


@contextmanager
def server(bundle: Path, *args: str) -> Iterator[str]:
    """The address of a server of the bundle's."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "medtune.cli", "serve", str(bundle), "--port", "0", *args]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while True:
                log.seek(0)
                text = log.read()
                if found := re.search(r"serving on (\S+)", text):
                    break
                if process.poll() is not None:
                    raise SystemExit(text)
                time.sleep(0.2)
            yield found.group(1)
        finally:
            process.terminate()
            process.wait(30)


def pictures(folder: Path, count: int = 16, side: int = 224) -> list[bytes]:
    """Generated images, as PNG files."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return [(folder / f"{number}.png").read_bytes() for number in range(count)]


def measure(url: str, images: list[bytes], clients: int, count: int) -> tuple[float, float, float]:
    """Requests a second, and the 50th and 99th percentile of their latency in ms."""

    def client(number: int) -> list[float]:
        took = []
        with requests.Session() as session:
            for turn in range(count // clients):
                start = time.perf_counter()
                image = images[(number + turn) % len(images)]
                session.post(f"{url}/predict", data=image, headers={"Content-Type": "image/png"}).raise_for_status()
                took.append(time.perf_counter() - start)
        return took

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        took = [seconds for each in pool.map(client, range(clients)) for seconds in each]
    wall = time.perf_counter() - start
    p50, p99 = np.percentile(took, [50, 99]) * 1000
    return len(took) / wall, float(p50), float(p99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = pictures(Path(folder))
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    for batch in (16, 1):
        with server(args.bundle, "--batch", str(batch), "--replicas", str(args.replicas)) as url:
            measure(url, images, 4, 40)
            for clients in args.clients:
                rate, p50, p99 = measure(url, images, clients, args.requests)
                kind = f"batches of up to {batch}" if batch > 1 else "one by one"
                figures = f"{rate:7.1f} requests/s  p50 {p50:6.1f} ms  p99 {p99:6.1f} ms"
                print(f"{kind:22} {clients:3} clients  {figures}", flush=True)


if __name__ == "__main__":
    main()
