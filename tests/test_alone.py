"""One process without Ray does what a Ray job does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_resume import SETTINGS, TIMING, finish, start

from launch import main


@pytest.mark.ray
@pytest.mark.parametrize("windows", ["seen", pytest.param("all", marks=pytest.mark.slow)])
def test_the_loop_without_ray_ends_with_the_same_weights(point_start: Path, tmp_path: Path, windows: str) -> None:
    settings = [
        *SETTINGS,
        f"policy.checkpoint={point_start}",
        f"data.windows={windows}",
        "objective.fastest=0.5",
    ]
    finish(start(*settings, "scaling.actors=1", f"run.dir={tmp_path / 'ray'}"))
    assert main(["train", *settings, "scaling.ray=false", f"run.dir={tmp_path / 'alone'}"]) == 0
    expected, found = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("ray", "alone"))
    for key in ("weights_sha256", "evaluation", "updates"):
        assert found[key] == expected[key], key

    def rows(name: str) -> dict[tuple[int, str], float]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return {(r["update"], k): v for r in lines for k, v in r.items() if "/" in k and not k.endswith(TIMING)}

    mine, theirs = rows("alone"), rows("ray")
    assert len(mine) > 20
    assert mine[3, "learner/steps"] > 0
    assert mine == {key: theirs[key] for key in mine}
