"""What the control plane costs, fitted and predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import _fit
from launch import main


def test_what_an_episode_costs_is_told_from_what_time_costs() -> None:
    def run(seconds: float, episodes: int) -> dict[str, Any]:
        cpu = 0.02 * seconds + 0.003 * episodes
        return {"measured": {"seconds": seconds, "episodes": episodes, "cpu_seconds": {"pool": cpu}}}

    idle, each = _fit([run(30.0, 5), run(25.0, 60), run(40.0, 900)], "pool")
    assert idle == pytest.approx(0.02)
    assert each == pytest.approx(0.003)


@pytest.mark.slow
@pytest.mark.ray
def test_sizes_are_run_and_the_next_bottleneck_is_named(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    arguments = ["bench", "scaling", "bench.sizes=[2,8,40]", "train.updates=3", "sampling.group_size=2"]
    assert main([*arguments, "data.tail=pad", "policy.execute=20", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["actors"] for row in result["sizes"]] == [2, 8, 40]
    assert result["next_bottleneck"] in result["actors_allowed"]
    assert result["actors_allowed"][result["next_bottleneck"]] == min(result["actors_allowed"].values())
    for row in result["sizes"]:
        assert 0.5 < row["in_episodes"] <= 1.01
        assert all(0 < busy < 1 for busy in row["busy"].values())
