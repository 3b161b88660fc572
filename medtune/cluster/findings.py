"""What is wrong with nodes, from what they tell: a pure function, and its outcome in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medtune.cluster.nodes import Node
from medtune.ops.choice import choose

Severity = Literal["error", "warning"]

RENEW = "`ray up --no-restart cluster.yaml`, where you ran `ray up`, renews it and kills nothing that runs"
MUST_EQUAL = ("ray", "torch")
"""Packages whose versions must be the driver's: another one of these fails, or gives other figures."""
SKEW_WARNING, SKEW_ERROR = 2.0, 30.0
"""Seconds between clocks."""
DISK = {"storage": (2.0, 10.0), "temporary": (2.0, 10.0), "cache": (0.5, 2.0)}
"""Gigabytes (10^9 bytes) free, by use: less than the first is an error, less than the second a warning."""
GPU_ERROR, GPU_WARNING = 0.1, 0.8
"""Free memory of a GPU, as part of it."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    severity: Severity
    node: str
    """The node as people know it; `the cluster` for what concerns all."""
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what}. {self.remedy}"


def diagnose(nodes: Sequence[Node], reference: Node) -> list[Finding]:
    """What is wrong with each of `nodes`; `reference` is the driver's process, which they must agree with.

    Errors are what would make trials fail, or their figures differ; all else is a warning. In the nodes' order.
    """
    findings: list[Finding] = []
    for node in nodes:
        if node.silence is not None:
            what = f"does not answer: {node.silence}"
            findings.append(Finding("error", node.label, what, "Look at its Ray logs in /tmp/ray/session_latest/logs"))
            continue
        for rule in RULES:
            findings += (
                Finding(severity, node.label, what, remedy) for severity, what, remedy in rule(node, reference)
            )
    return [*findings, *_unequal_kernels(nodes)]


Wrong = Iterable[tuple[Severity, str, str]]


def _python(node: Node, reference: Node) -> Wrong:
    mine, its = reference.facts["python"], node.facts["python"]
    if its != mine:
        apart = its.rpartition(".")[0] != mine.rpartition(".")[0]
        yield "error" if apart else "warning", f"Python {its}, the driver has {mine}", "Install the same on all nodes"


def _packages(node: Node, reference: Node) -> Wrong:
    for name, its in node.facts["packages"].items():
        mine = reference.facts["packages"].get(name)
        if its == mine:
            continue
        if its is None:
            yield "error", f"{name} is not installed, the driver has {mine}", f"There: pip install '{name}=={mine}'"
        elif mine is not None:
            severity: Severity = "error" if name in MUST_EQUAL else "warning"
            yield severity, f"{name} {its}, the driver has {mine}", f"There: pip install '{name}=={mine}'"


def _content(node: Node, reference: Node) -> Wrong:
    mine, its = reference.facts["medtune"], node.facts["medtune"]
    if its is None:
        yield "error", "medtune is not installed", f"List the repository in file_mounts of cluster.yaml; {RENEW}"
    elif mine and its["digest"] != mine["digest"]:
        names = sorted(set(mine["files"].items()) ^ set(its["files"].items()))
        what = f"medtune in {its['folder']} is not the driver's: {_some(dict(names))}"
        if its["version"] != mine["version"]:
            what = f"medtune {its['version']}, the driver has {mine['version']}: {_some(dict(names))}"
        yield "error", what, f"Code edited after it was brought there is stale: {RENEW}"


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(shown)}{more} differ{'s' if len(names) == 1 else ''}"


def _cuda(node: Node, reference: Node) -> Wrong:
    built, supported = node.facts["torch_cuda"], node.facts["driver_cuda"]
    if node.facts["gpus"] and built is None:
        yield "error", "torch is built without CUDA: its GPUs would stay unused", "Install torch's CUDA build there"
    elif node.facts["gpus"] and supported and int(built.split(".")[0]) > int(supported.split(".")[0]):
        what = f"torch is built for CUDA {built}, its GPU driver supports {supported} at most"
        yield "error", what, "Update the NVIDIA driver there, or install on all nodes a torch built for an older CUDA"
    seen = len(node.facts["gpus"])
    if node.gpus > seen:
        what = f"Ray counts {node.gpus:g} GPUs, nvidia-smi sees {seen}"
        yield "warning", what, "Trials there train on the CPU unless torch finds them; is --num-gpus of `ray start` right?"
    elif node.id and node.gpus < seen:
        what = f"Ray counts {node.gpus:g} GPUs, nvidia-smi sees {seen}"
        yield "warning", what, "To use all, start Ray there without --num-gpus"


def _gpu_kinds(node: Node, reference: Node) -> Wrong:
    cards = node.facts["gpus"]
    kinds = sorted({card["name"] for card in cards})
    if len(kinds) > 1:
        biggest = max(cards, key=lambda card: card["total"])["name"]
        shown = ",".join(card["uuid"] for card in cards if card["name"] == biggest)
        yield (
            "error",
            f"GPUs of {len(kinds)} kinds in one host ({', '.join(kinds)}), which Ray cannot tell apart",
            f"Hide one kind: start Ray there with CUDA_VISIBLE_DEVICES={shown} (the {biggest}) before `ray start`",
        )


def _gpu_memory(node: Node, reference: Node) -> Wrong:
    for card in node.facts["gpus"]:
        if card["total"] and card["free"] < GPU_WARNING * card["total"]:
            severity: Severity = "error" if card["free"] < GPU_ERROR * card["total"] else "warning"
            held = f", held by {', '.join(card['holders'])}" if card["holders"] else ""
            what = f"GPU {card['index']} ({card['name']}) has {_gib(card['free'])} of {_gib(card['total'])} free{held}"
            yield severity, what, "End what holds it, or hide this GPU with CUDA_VISIBLE_DEVICES before `ray start`"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _storage(node: Node, reference: Node) -> Wrong:
    told = node.facts["storage"]
    if told is None:
        return
    if "://" in told["path"]:
        if told["reason"]:
            remedy = "Each node must reach the server; what opens it comes from the driver's environment"
            yield "error", f"cannot work in {told['path']}: {told['reason'].rstrip('.')}", remedy
        return
    remedy = "--storage must name a folder that all nodes share (NFS, say), at the same path"
    if not told["read"] or told["reason"]:
        why = told["reason"] or "what the driver wrote is not there"
        yield "error", f"the storage folder {told['path']} is not the driver's: {why}", remedy
    elif not node.storage_seen:
        yield "error", f"the driver does not see what is written into {told['path']} there", remedy


def _clock(node: Node, reference: Node) -> Wrong:
    apart = node.ahead
    if abs(apart) > SKEW_WARNING:
        side = "ahead of" if apart > 0 else "behind"
        severity: Severity = "error" if abs(apart) > SKEW_ERROR else "warning"
        yield severity, f"its clock is {abs(apart):.1f} s {side} the driver's", "Turn on time synchronisation (NTP) there"


def _disk(node: Node, reference: Node) -> Wrong:
    for disk in node.facts["disks"]:
        limits = [DISK[use] for use in disk["uses"] if use in DISK]
        if not limits:
            continue
        free, least, low = disk["free"] / 1e9, max(a for a, _ in limits), max(b for _, b in limits)
        if free < low:
            severity: Severity = "error" if free < least else "warning"
            what = f"{free:.1f} GB free in {disk['path']} ({', '.join(disk['uses'])})"
            yield severity, what, f"Make room: {low:g} GB are enough"


def scan(node: Node) -> str:
    """The selective scan that trials use on its GPUs. Raises ValueError where MEDTUNE_SCAN asks for what cannot be."""
    kernels = node.facts["kernels"]
    missing = {
        "triton": "triton is not installed" if "triton" not in kernels else "",
        "mamba": "mamba-ssm is not installed" if "mamba-ssm" not in kernels else "",
        "torch": "",
    }
    if "triton" in kernels and not node.facts["compiler"]:
        missing["triton"] = "Triton needs a C compiler (gcc or clang, or what CC names)"
    return choose(node.facts["scan"], missing)


def _scan(node: Node, reference: Node) -> Wrong:
    if node.facts["gpus"]:
        try:
            scan(node)
        except ValueError as error:
            yield "error", str(error), "Unset it in the environment that Ray was started in, or install what it asks for"


RULES = (_python, _packages, _content, _cuda, _gpu_kinds, _gpu_memory, _scan, _storage, _clock, _disk)


def _unequal_kernels(nodes: Sequence[Node]) -> list[Finding]:
    """A kernel on some of the nodes with GPUs: their figures may differ in rounding."""
    with_gpus = [node for node in nodes if node.facts.get("gpus")]
    findings = []
    for kernel in sorted({kernel for node in with_gpus for kernel in node.facts["kernels"]}):
        without = [node.label for node in with_gpus if kernel not in node.facts["kernels"]]
        if without:
            what = f"{kernel}'s kernel is on some nodes but not on {', '.join(without)}: figures may differ in rounding"
            findings.append(Finding("warning", "the cluster", what, "Install it on all nodes or on none"))
    return findings


def together(findings: Iterable[Finding]) -> list[Finding]:
    """The same thing on several nodes, as one finding that names them all; errors first."""
    nodes: dict[tuple[Severity, str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: finding.severity):
        nodes.setdefault((finding.severity, finding.what, finding.remedy), []).append(finding.node)
    return [Finding(key[0], ", ".join(dict.fromkeys(names)), *key[1:]) for key, names in nodes.items()]


def in_words(findings: Iterable[Finding]) -> str:
    """One line for each, errors first; the empty string for none."""
    return "\n".join(f"{finding.severity}: {finding}" for finding in together(findings))
