"""What docs/extending.md shows works as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_resume import SETTINGS

from launch import main

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def write_example(file: Path) -> None:
    """The page's example of this name, as it stands there."""
    examples = re.findall(r"`(\w+\.py)`[^\n]*:\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = dict(examples)[file.name]
    assert len(code.splitlines()) < 60
    file.write_text(code)


def test_the_objective_of_the_page_trains(
    point_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_example(tmp_path / "my_objective.py")
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
    assert "objective.name='rare': expected advantage_weighted, cfg" in capsys.readouterr().err


def test_the_policy_of_the_page_starts_and_trains(
    point_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ript_ray.policies.checkpoints import load_policy

    write_example(tmp_path / "my_policy.py")
    settings = [*SETTINGS, f"data.demos={point_start / '../demos.safetensors'}", "data.tail=pad", "sft.steps=150"]
    settings += [f"sft.output={tmp_path / 'start'}", f"policy.checkpoint={tmp_path / 'start'}"]
    name = "sft.policy=my_policy:CoarsePolicy"
    assert main(["sft", *settings, name, f"run.dir={tmp_path / 'early'}"]) == 2
    assert "type='my_policy:CoarsePolicy': No module named 'my_policy'" in capsys.readouterr().err
    assert main(["sft", *settings, "sft.policy=coarse", f"run.dir={tmp_path / 'no'}"]) == 2
    assert "expected flow or module:class" in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["sft", *settings, name, f"run.dir={tmp_path / 'sft'}"]) == 0
    run = tmp_path / "run"
    assert main(["train", *settings, "scaling.ray=false", "train.updates=1", f"run.dir={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["episodes"] > 0
    learnt = load_policy(run / "checkpoints/0001")
    assert type(learnt).__name__ == "CoarsePolicy"
    start = load_policy(tmp_path / "start")
    assert any(not p.equal(q) for p, q in zip(learnt.parameters(), start.parameters(), strict=True))


def test_the_reference_of_all_settings_is_current() -> None:
    from ript_ray.reference import PAGE, configuration_page

    assert PAGE.read_text() == configuration_page(), "run: python -m ript_ray.reference"


def test_every_message_of_the_troubleshooting_page_is_one_of_ours() -> None:
    page = (PAGE.parent / "troubleshooting.md").read_text()
    root = PAGE.parents[1]
    files = [
        root / "launch.py",
        *(f for room in ("actors", "learner", "cluster", "ript_ray") for f in (root / room).rglob("*.py")),
    ]
    # Adjacent parts of a text that is split over lines belong together.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    assert len(rows) > 12
    for row in rows:
        for part in re.findall(r"`(.*?)`", row):
            assert part in code, part
