"""Statistics against NumPy on everything at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_trajectory

import launch
from ript_ray.data.statistics import norm_stats
from ript_ray.data.storage import save_trajectories
from ript_ray.errors import UserError


@pytest.mark.parametrize("relative", [0, 6])
def test_statistics_of_whole_chunks(relative: int) -> None:
    made = [make_trajectory(length, seed=length) for length in (70, 20, 90)]
    stats = norm_stats(lambda: iter(made), relative, horizon=50)
    rows = []
    for t in made:
        for start in range(len(t)):
            for k in range(50):
                action = t.actions[min(start + k, len(t) - 1)].astype(np.float64)
                action[:relative] -= t.states[start, :relative]
                rows.append(action)
    states = np.concatenate([t.states for t in made])
    for group, values in (("state", states), ("actions", np.array(rows))):
        np.testing.assert_allclose(stats[group]["mean"], values.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats[group]["std"], values.std(0), rtol=1e-5)
        for name, share in (("q01", 0.01), ("q99", 0.99)):
            # The upper edge of the bin that holds the value by which the share is reached.
            beyond = stats[group][name] - np.quantile(values, share, axis=0, method="inverted_cdf")
            assert (beyond > -1e-6).all()
            assert (beyond < 1.001 * np.ptp(values, axis=0) / 5000 + 1e-6).all()


def test_no_more_dimensions_can_be_relative_than_there_are() -> None:
    with pytest.raises(UserError, match=r"convert\.relative=8: there are 7 action and 8 state"):
        norm_stats(lambda: iter([make_trajectory(60)]), relative=8)


def test_a_dimension_that_never_moves_has_no_width() -> None:
    made = make_trajectory(60)
    made.actions[:, 3] = 0.25
    stats = norm_stats(lambda: iter([made]))["actions"]
    assert [stats[name][3] for name in ("mean", "std", "q01", "q99")] == [0.25, 0.0, 0.25, 0.25]


def test_the_command_writes_openpi_s_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trajectories(tmp_path / "demos.safetensors", [make_trajectory(60)], {})
    target = tmp_path / "norm_stats.json"
    assert launch.main(["stats", str(tmp_path / "demos.safetensors"), str(target)]) == 0
    assert set(json.loads(target.read_text())["norm_stats"]) == {"state", "actions"}
    assert launch.main(["stats", str(target)]) == 2
    assert "expected 2 paths, found 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no demonstrations"):
        norm_stats(lambda: iter([]))
