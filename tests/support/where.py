"""Played trials that note where they run, and that say what they take of a GPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import Any

import ray

from benchmarks.played import PlayedAttempt, PlayedTrial
from medtune.search.conductor import Report, attempt_folder

GIB = 2**30


class NotedAttempt(PlayedAttempt):
    """Notes its process, machine, GPU and time in `where.jsonl`; `reserved`: what it says of memory, where it measures."""

    reserved: int | None = None

    def next_report(self) -> Report:
        """One epoch."""
        begun = time.time()
        report = super().next_report()
        here = {
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "cap": self.spec.memory_cap,
            "epoch": report.epoch,
            "begun": begun,
            "ended": time.time(),
        }
        with open(attempt_folder(self.spec.trials, self.spec.number, self.spec.attempt) / "where.jsonl", "a") as file:
            file.write(json.dumps(here) + "\n")
        if self.spec.measure and self.reserved:
            memory: dict[str, Any] = {"kind": "H100", "card": 80 * GIB, "reserved": self.reserved, "overhead": GIB}
            return replace(report, memory=memory)
        return report


class SmallAttempt(NotedAttempt):
    """Takes 20 of 80 GiB."""

    reserved = 19 * GIB


class HeldAttempt(NotedAttempt):
    """Begins no epoch after its first before the study's folder holds a file `go`."""

    def next_report(self) -> Report:
        """One epoch, when it may."""
        while self.epoch and not (self.spec.trials.parent / "go").exists():
            time.sleep(0.05)
        return super().next_report()


class NotedTrial(PlayedTrial):
    attempt_class = NotedAttempt


class HeldTrial(PlayedTrial):
    attempt_class = HeldAttempt


class SmallTrial(PlayedTrial):
    attempt_class = SmallAttempt
