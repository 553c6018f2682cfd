"""What docs/extending.md shows works as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_resume import SETTINGS

from launch import main

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def test_the_objective_of_the_page_trains(
    point_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 60
    (tmp_path / "my_objective.py").write_text(code)
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", "scaling.ray=false", "train.updates=1"]
    name = "objective.name=my_objective:rare_successes"
    assert main(["train", *settings, name, f"run.dir={tmp_path / 'early'}"]) == 2
    assert "No module named 'my_objective'" in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", *settings, name, f"run.dir={tmp_path / 'run'}"]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["learner/steps"] > 0
    assert row["learner/conditional"] > 0
    assert main(["train", *settings, "objective.name=rare", f"run.dir={tmp_path / 'no'}"]) == 2
    assert "objective.name='rare': expected the name of one, or module:function" in capsys.readouterr().err


def test_the_reference_of_all_settings_is_current() -> None:
    from ript_ray.reference import PAGE, configuration_page

    assert PAGE.read_text() == configuration_page(), "run: python -m ript_ray.reference"
