"""Marks in the code that acts, by which somebody may look at what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_recorded: dict[str, torch.Tensor] | None = None


def note(stage: str, value: torch.Tensor) -> torch.Tensor:
    """Hand ``value`` on; keep a copy while somebody records, numbered from the second time of a stage on."""
    if _recorded is not None:
        times = sum(name.rstrip("0123456789 ") == stage for name in _recorded)
        _recorded[f"{stage} {times}" if times else stage] = value.detach().clone()
    return value


@contextmanager
def recording() -> Iterator[dict[str, torch.Tensor]]:
    """Record all stages noted inside, in their order."""
    global _recorded
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None
