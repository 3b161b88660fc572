"""The look at all nodes with which a study on several begins: what would fail later stops it here, by name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from medtune.cluster.absent import absent, launcher
from medtune.cluster.findings import diagnose, in_words
from medtune.cluster.nodes import ask, here, staying
from medtune.cluster.roster import Roster
from medtune.errors import StudyError


def preflight(storage: str, say: Callable[[str], None]) -> Roster:
    """The nodes that may take trials. On this machine alone, nothing is asked.

    `storage`: the studies' folder. Warnings are said; raises StudyError with all that is wrong otherwise.
    """
    nodes = staying()
    told = launcher()
    if len(nodes) == 1 and told is None:
        return Roster([nodes[0]["NodeID"]], storage=storage, say=say)
    with ThreadPoolExecutor(1) as pool:
        missing = pool.submit(absent, told, nodes)
        findings = diagnose(ask(nodes, storage), here())
    for host in missing.result():
        say(f"warning: {host}. The study goes on without it; it takes trials once it joins")
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise StudyError(
            f"not all of the cluster's {len(nodes)} nodes are fit for a study; nothing was started\n{in_words(findings)}"
        )
    if findings:
        say(in_words(findings))
    say(f"  {len(nodes)} nodes, looked at and fit: `medtune doctor --cluster` shows them")
    return Roster([node["NodeID"] for node in nodes], storage=storage, say=say)
