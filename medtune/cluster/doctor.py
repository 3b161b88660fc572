"""`medtune doctor`: a look at this machine, or at all nodes of the cluster, in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medtune.cluster.absent import absent, launcher
from medtune.cluster.findings import Finding, diagnose, together
from medtune.cluster.nodes import Node, ask, here
from medtune.wandb_env import TrackingError, check, find_account, how_to_log_in, user_says_offline

_COLOURS = {"error": "red", "warning": "yellow"}


def doctor(storage: Path, *, cluster: bool, as_json: bool) -> int:
    """Look, print, and return the exit status: 1 where something is wrong. Raises StudyError where no cluster answers."""
    with ThreadPoolExecutor(1) as pool:
        account = pool.submit(wandb)
        nodes, findings = examine_cluster(storage) if cluster else examine_machine(storage)
        said, wandb_findings = account.result()
    findings = together([*findings, *wandb_findings])
    if as_json:
        print(json.dumps(to_json(nodes, findings, said), indent=1))
    else:
        show(nodes, findings, said)
    return int(any(finding.severity == "error" for finding in findings))


def examine_machine(storage: Path) -> tuple[list[Node], list[Finding]]:
    """This machine alone, without Ray."""
    node = here(str(storage))
    return [node], diagnose([node], node)


def examine_cluster(storage: Path) -> tuple[list[Node], list[Finding]]:
    """All nodes of the cluster this machine is part of, and those that should be."""
    import ray

    from medtune.launch import start_ray

    start_ray()
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        with ThreadPoolExecutor(1) as pool:
            missing: Future[list[Finding]] = pool.submit(absent, launcher(), alive)
            nodes = ask(alive, str(storage))
            return nodes, [*diagnose(nodes, here()), *missing.result()]
    finally:
        ray.shutdown()


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


def to_json(nodes: Sequence[Node], findings: Sequence[Finding], said: str) -> dict[str, Any]:
    """All that is known, in plain values."""
    return {"nodes": [asdict(node) for node in nodes], "findings": [asdict(f) for f in findings], "wandb": said}


def show(nodes: Sequence[Node], findings: Sequence[Finding], said: str) -> None:
    """A table of the nodes, then what is wrong."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width
    table = Table(*HEADS, box=None, pad_edge=False)
    for node in nodes:
        table.add_row(*row(node))
    console.print(table)
    console.print(Text(said))
    for finding in findings:
        console.print(Text(finding.severity, style=_COLOURS[finding.severity]) + Text(f": {finding}"), soft_wrap=True)
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        console.print(Text(f"{errors} thing{'s' * (errors > 1)} to mend before a study can begin", style="red"))
    else:
        console.print(Text("fit for a study", style="green"))


HEADS = ("node", "GPUs", "CPUs", "Python", "torch", "CUDA", "medtune", "kernels", "images", "clock", "free disk")


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
        " ".join(facts["kernels"]) or "ours",
        f"of {packs} stud{'ies' if packs > 1 else 'y'}" if packs else "when needed",
        f"{node.ahead:+.2f} s" if node.id else "",
        " ".join(f"{disk['free'] / 1e9:.0f} GB {'/'.join(disk['uses'])}" for disk in facts["disks"]),
    )


def cards(gpus: Sequence[dict[str, Any]]) -> str:
    """`2x NVIDIA H200 (139.1, 139.1 GiB free)`."""
    kinds = {card["name"]: [c for c in gpus if c["name"] == card["name"]] for card in gpus}
    shown = []
    for kind, members in kinds.items():
        free = ", ".join(f"{card['free'] / 2**30:.1f}" for card in members)
        shown.append(f"{len(members)}x {kind} ({free} GiB free)")
    return "; ".join(shown) or "none"

