"""From one rollout actor to thousands: what the control plane costs at several sizes, and what bounds the next one."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import control
from ript_ray.config import Config, resolve
from ript_ray.policies.checkpoints import load_policy
from ript_ray.reporting import progress_bar

_BUSY = 0.8
"""A process that has more to do than this share of its time makes others wait."""
_NETWORK_BYTES_S = 1.25e9
"""10 Gbit/s into and out of the driver's node."""
_ACTORS_PER_NODE = 64


def measure(config: Config) -> dict[str, Any]:
    """Run `control` at each of ``bench.sizes`` and say how many actors each resource allows.

    The model: a process of the control plane needs a share of a processor at any rate, and some time for each episode.
    Both are fitted to all sizes but the largest, which then checks them.
    """
    sizes = config.bench.sizes
    runs = [
        control.measure(config.model_copy(update={"bench": config.bench.model_copy(update={"simulated": size})}))
        for size in progress_bar(len(sizes), "sizes", iterable=sizes)
    ]
    *smaller, largest = runs
    seconds = largest["episode_seconds"]["mean"]
    model, allowed = {}, {}
    for name in largest["measured"]["cpu_seconds"]:
        idle, each = _fit(smaller, name)
        rate = largest["measured"]["episodes"] / largest["measured"]["seconds"]
        model[name] = {
            "busy_at_rest": idle,
            "ms_per_episode": 1e3 * each,
            "busy_at_the_largest": {"predicted": idle + each * rate, "measured": _busy(largest, name)},
        }
        # By what an episode took at the largest: the model says whether that goes on in a straight line.
        taken = max(1e-6, _busy(largest, name) - idle) / rate
        allowed[name] = (_BUSY - idle) * seconds / taken
    weights = sum(tensor.nbytes for tensor in load_policy(resolve(config.policy.checkpoint)).state_dict().values())
    allowed["trajectories into the driver's node"] = _NETWORK_BYTES_S * seconds / largest["bytes_per_episode"]
    # Every node fetches a version once, within an episode.
    allowed["weights out of the driver's node"] = _NETWORK_BYTES_S * seconds / weights * _ACTORS_PER_NODE
    return {
        "benchmark": "scaling",
        "sizes": [
            {name: run[name] for name in ("actors", "episodes_per_second", "in_episodes", "learner_idle")}
            | {"busy": {name: _busy(run, name) for name in model}}
            for run in runs
        ],
        "model": model,
        "actors_allowed": {name: round(count) for name, count in allowed.items()},
        "next_bottleneck": min(allowed, key=allowed.__getitem__),
    }


def _busy(run: dict[str, Any], name: str) -> float:
    """Share of one processor that a process took."""
    return float(run["measured"]["cpu_seconds"][name] / run["measured"]["seconds"])


def _fit(runs: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Least squares of cpu = busy_at_rest · seconds + each · episodes, over the relative error of each run."""
    taken = [run["measured"] for run in runs]
    cpu = np.array([row["cpu_seconds"][name] for row in taken])
    known = np.array([[row["seconds"], row["episodes"]] for row in taken])
    (idle, each), *_ = np.linalg.lstsq(known / cpu[:, None], np.ones(len(cpu)), rcond=None)
    return float(idle), float(each)
