"""Measured speed, as ratios of two things timed in the same run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ript_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from ript_ray.config import Config


def run_benchmark(subjects: list[str], config: Config) -> dict[str, Any]:
    """Run one benchmark and print its figures.

    Raises:
        UserError: when no or an unknown subject is named.
    """
    from benchmarks import asynchrony, control, env, faults, learner, objectives, policy, scaling, soak, weights

    benchmarks = {
        "async": asynchrony.measure,
        "control": control.measure,
        "env": env.measure,
        "faults": faults.measure,
        "learner": learner.measure_speed,
        "memory": learner.measure_memory,
        "objectives": objectives.measure,
        "policy": policy.measure,
        "scaling": scaling.measure,
        "soak": soak.measure,
        "weights": weights.measure,
    }
    if len(subjects) != 1 or subjects[0] not in benchmarks:
        given = " ".join(subjects)
        raise UserError(f"bench {given!r}: name one benchmark; {nearest(given, benchmarks)}")
    result = benchmarks[subjects[0]](config)
    print(json.dumps(result, indent=2))
    return result
