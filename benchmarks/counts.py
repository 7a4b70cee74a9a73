"""Whole numbers that a benchmark's option has, with commas between them."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def counts(least: int) -> Callable[[str], list[int]]:
    """Return what reads ``4,8`` for :mod:`argparse`; no number may be less than ``least``."""

    def read_counts(text: str) -> list[int]:
        parts = text.split(",")
        if not all(each.isdecimal() and int(each) >= least for each in parts):
            raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers from {least} on, as 4,8")
        return [int(each) for each in parts]

    return read_counts
