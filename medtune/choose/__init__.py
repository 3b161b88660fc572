"""Choosing with evidence: finalists trained again from fresh seeds, ranked with intervals, one named, ties named as ties."""

from medtune.choose.record import mention, read_choice

__all__ = ["mention", "read_choice"]
