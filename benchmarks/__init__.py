"""Measured speed, as ratios of two things timed in the same run."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ript_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from ript_ray.config import Config

BENCHMARKS = {
    "async": "asynchrony:measure",
    "control": "control:measure",
    "env": "env:measure",
    "faults": "faults:measure",
    "learner": "learner:measure_speed",
    "memory": "learner:measure_memory",
    "objectives": "objectives:measure",
    "policy": "policy:measure",
    "scaling": "scaling:measure",
    "soak": "soak:measure",
    "weights": "weights:measure",
}
"""Module and function of each; only the one that is asked for is imported: ``policy`` needs neither Ray nor LIBERO."""

CONFIGS = {"async": "faults.yaml", "faults": "faults.yaml", "objectives": "objectives.yaml", "soak": "faults.yaml"}
"""Configuration of those that have one of their own, unless another is given."""


def run_benchmark(subjects: list[str], config: Config) -> dict[str, Any]:
    """Run one benchmark and print its figures.

    Raises:
        UserError: when no or an unknown subject is named.
    """
    if len(subjects) != 1 or subjects[0] not in BENCHMARKS:
        given = " ".join(subjects)
        raise UserError(f"bench {given!r}: name one benchmark; {nearest(given, BENCHMARKS)}")
    module, _, function = BENCHMARKS[subjects[0]].partition(":")
    result: dict[str, Any] = getattr(import_module(f"benchmarks.{module}"), function)(config)
    print(json.dumps(result, indent=2))
    return result
