"""`medtune doctor`: a look at this machine, or at all nodes of the cluster, in words and as JSON."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medtune.cluster.absent import absent, launcher
from medtune.cluster.facts import package
from medtune.cluster.findings import RENEW, Finding, diagnose, scan, together
from medtune.cluster.nodes import Node, ask, here, staying
from medtune.data.cli import DEFAULT_PAIR
from medtune.data.registry import pair
from medtune.errors import StudyError
from medtune.storage.bucket import Bucket
from medtune.wandb_env import TrackingError, check, find_account, how_to_log_in, user_says_offline

_COLOURS = {"error": "red", "warning": "yellow"}


def doctor(storage: Path | Bucket, *, cluster: bool, as_json: bool, expect: str | None = None) -> int:
    """Look, print, and return the exit status: 1 where something is wrong. Raises StudyError where no cluster answers.

    `expect`: the digest that medtune has where the user works.
    """
    place = storage.uri if isinstance(storage, Bucket) else str(storage)
    with ThreadPoolExecutor(1) as pool:
        account = pool.submit(wandb)
        nodes, findings = examine_cluster(place) if cluster else examine_machine(place)
        wandb_said, wandb_findings = account.result()
    findings = together([*findings, *edited_since(expect), *wandb_findings])
    said = [*images(), wandb_said]
    if as_json:
        print(json.dumps(to_json(nodes, findings, said), indent=1))
    else:
        show(nodes, findings, said)
    return int(any(finding.severity == "error" for finding in findings))


def examine_machine(storage: str) -> tuple[list[Node], list[Finding]]:
    """This machine alone, without Ray."""
    node = here(storage)
    return [node], diagnose([node], node)


def examine_cluster(storage: str) -> tuple[list[Node], list[Finding]]:
    """All nodes of the cluster this machine is part of, and those that should be."""
    import ray

    from medtune.launch import cluster_address, start_ray

    if cluster_address() is None:
        raise StudyError(
            "no Ray cluster runs on this machine: run this on a node of it, or with --launcher cluster.yaml where you ran "
            "`ray up`; without --cluster it looks at this machine alone"
        )
    start_ray()
    try:
        alive = staying()
        with ThreadPoolExecutor(1) as pool:
            missing: Future[list[Finding]] = pool.submit(absent, launcher(), alive)
            nodes = ask(alive, storage)
            return nodes, [*diagnose(nodes, here()), *missing.result()]
    finally:
        ray.shutdown()


def from_launcher(file: Path, arguments: Sequence[str]) -> int:
    """`medtune doctor --cluster` on the head of the cluster that `ray up FILE` made, which also hears what medtune is here.

    Returns the exit status. Raises StudyError when there is no such file.
    """
    if not file.is_file():
        raise StudyError(f"no file {file}: name the one that you gave to `ray up`")
    mine = package()
    assert mine is not None
    command = ["medtune", "doctor", "--cluster", "--expect", mine["digest"], *arguments]
    ray = Path(sys.executable).with_name("ray")
    return subprocess.run([str(ray), "exec", str(file), shlex.join(command)]).returncode


def edited_since(expect: str | None) -> list[Finding]:
    """Whether medtune was edited where the user works after it was brought here: then all nodes agree on what is stale."""
    mine = package()
    if expect is None or mine is None or mine["digest"] == expect:
        return []
    what = "medtune on the head is not the one where you are: it was edited since, or this is another checkout"
    return [Finding("error", "the cluster", what, RENEW)]


def images() -> list[str]:
    """Where the images lie that a study on this machine uses; other nodes get them from here."""
    places = pair(DEFAULT_PAIR).where(data_dir=None, external_dir=None)
    return [f"{DEFAULT_PAIR}: {p.what} {p.path}: {p.found} (`medtune data check` verifies it)" for p in places if p.used]


def wandb() -> tuple[str, list[Finding]]:
    """What there is to say of W&B; out of reach is a warning, as uploads can wait."""
    if user_says_offline():
        return "W&B: runs are written offline, as you set", []
    account = find_account()
    if account is None:
        return f"W&B: no key, so runs are written offline. {how_to_log_in()}", []
    try:
        check(account)
    except TrackingError as error:
        remedy = "Studies run all the same, and `medtune sync STUDY` uploads later"
        return "W&B: nothing can be uploaded now", [Finding("warning", "W&B", str(error).rstrip("."), remedy)]
    return f"W&B: {account.url} takes the key", []


def to_json(nodes: Sequence[Node], findings: Sequence[Finding], said: Sequence[str]) -> dict[str, Any]:
    """All that is known, in plain values."""
    return {"nodes": [asdict(node) for node in nodes], "findings": [asdict(f) for f in findings], "notes": list(said)}


def show(nodes: Sequence[Node], findings: Sequence[Finding], said: Sequence[str]) -> None:
    """A table of the nodes, then what is wrong."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width
    columns = zip(HEADS, *map(row, nodes), strict=True)
    shown = [column for column in columns if any(column[1:])]  # what no node has takes no room
    table = Table(*(column[0] for column in shown), box=None, pad_edge=False)
    for cells in zip(*(column[1:] for column in shown), strict=True):
        table.add_row(*cells)
    console.print(table)
    for line in said:
        console.print(Text(line), soft_wrap=True)
    for finding in findings:
        console.print(Text(finding.severity, style=_COLOURS[finding.severity]) + Text(f": {finding}"), soft_wrap=True)
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        console.print(Text(f"{errors} thing{'s' * (errors > 1)} to mend before a study can begin", style="red"))
    else:
        console.print(Text("fit for a study", style="green"))


HEADS = (
    "node", "GPUs", "CPUs", "Python", "torch", "CUDA", "medtune", "kernels", "scan", "images", "clock", "least free disk",
)  # fmt: skip


def row(node: Node) -> tuple[str, ...]:
    """A node's cells, as `HEADS` names them."""
    facts = node.facts
    if not facts:
        return (node.label, "no answer", *[""] * (len(HEADS) - 2))
    packs = len(facts["packs"])
    return (
        node.label,
        cards(facts["gpus"]),
        str(facts["cpus"]),
        facts["python"],
        facts["packages"]["torch"] or "missing",
        facts["driver_cuda"] or "",
        f"{facts['medtune']['version']} {facts['medtune']['digest'][:8]}" if facts["medtune"] else "missing",
        " ".join(facts["kernels"]),
        scan_used(node),
        f"of {packs} stud{'ies' if packs > 1 else 'y'}" if packs else "",
        f"{node.ahead:+.2f} s" if node.id else "",
        f"{min(disk['free'] for disk in facts['disks']) / 1e9:.0f} GB",
    )


def scan_used(node: Node) -> str:
    """The engine of the selective scan on a node's GPUs; findings tell why there is none."""
    try:
        return scan(node) if node.facts["gpus"] else "torch"
    except ValueError:
        return "none"


def cards(gpus: Sequence[dict[str, Any]]) -> str:
    """`2x H200 (139.1, 139.1 GiB free)`."""
    kinds = {card["name"]: [c for c in gpus if c["name"] == card["name"]] for card in gpus}
    shown = []
    for kind, members in kinds.items():
        free = ", ".join(f"{card['free'] / 2**30:.1f}" for card in members)
        shown.append(f"{len(members)}x {kind.removeprefix('NVIDIA ')} ({free} GiB free)")
    return "; ".join(shown) or "none"

