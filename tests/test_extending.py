"""What docs/extending.md shows works as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_resume import SETTINGS

from launch import main
from ript_ray.config import load_config

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
    assert main(["train", *settings, name, "objective.own={power: 2}", f"run.dir={tmp_path / 'run'}"]) == 0
    assert load_config(tmp_path / "run/config.yaml", []).objective.own == {"power": 2}
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["learner/steps"] > 0
    assert row["learner/conditional"] > 0
    assert main(["train", *settings, "objective.name=rare", f"run.dir={tmp_path / 'no'}"]) == 2
    assert "objective.name='rare': expected advantage_weighted, cfg" in capsys.readouterr().err


ONE_BRANCH = """
def policy_gradient(draw, settings):
    raise NotImplementedError

policy_gradient.trains_one_branch = True

def from_recordings(draw, settings):
    raise NotImplementedError

from_recordings.compares_with_recording = True
"""


def test_settings_that_do_not_go_with_what_ones_own_objective_says_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_gradients.py").write_text(ONE_BRANCH)
    monkeypatch.syspath_prepend(tmp_path)
    for name, part in (
        ("policy_gradient", "eval.guidance=2 with objective.name=my_gradients:policy_gradient"),
        ("from_recordings", "with policy.explore=0: expected more than 0"),
    ):
        run = tmp_path / name
        assert main(["train", f"objective.name=my_gradients:{name}", f"run.dir={run}"]) == 2
        assert part in capsys.readouterr().err
        assert not run.exists()


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
    assert main(["sft", *settings, name, "sft.own={widht: 64}", f"run.dir={tmp_path / 'typo'}"]) == 2
    assert "sft.own={'widht': 64} with sft.policy=my_policy:CoarsePolicy: got an unexpected" in capsys.readouterr().err
    assert main(["sft", *settings, name, "sft.own={width: 64}", f"run.dir={tmp_path / 'sft'}"]) == 0
    run = tmp_path / "run"
    assert main(["train", *settings, "scaling.ray=false", "train.updates=1", f"run.dir={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["episodes"] > 0
    learnt = load_policy(run / "checkpoints/0001")
    assert type(learnt).__name__ == "CoarsePolicy"
    assert learnt.seen.out_features == 64
    start = load_policy(tmp_path / "start")
    assert any(not p.equal(q) for p, q in zip(learnt.parameters(), start.parameters(), strict=True))


TICKING = """
import torch
from my_policy import CoarsePolicy

class Ticking(CoarsePolicy):
    kind = "my_ticking:Ticking"

    def __init__(self, *arguments, **sizes):
        super().__init__(*arguments, **sizes)
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)

class Forgetful(CoarsePolicy):
    kind = "my_ticking:Forgetful"

    def describe(self):
        return super().describe() | {"sizes": {"horizon": self.horizon, "cameras": self.cameras}}
"""


def test_a_policy_keeps_what_is_no_weight_and_is_tried_before_it_is_trained(
    point_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ript_ray.policies.checkpoints import load_policy

    write_example(tmp_path / "my_policy.py")
    (tmp_path / "my_ticking.py").write_text(TICKING)
    monkeypatch.syspath_prepend(tmp_path)
    settings = [*SETTINGS, f"data.demos={point_start / '../demos.safetensors'}", "data.tail=pad", "sft.steps=2"]
    settings += [f"sft.output={tmp_path / 'start'}"]
    assert main(["sft", *settings, "sft.policy=my_ticking:Ticking", f"run.dir={tmp_path / 'sft'}"]) == 0
    assert load_policy(tmp_path / "start").frequencies.tolist() == [0.0, 1.0, 2.0]
    forgetful = ["sft.policy=my_ticking:Forgetful", "sft.own={width: 64}", f"run.dir={tmp_path / 'no'}"]
    assert main(["sft", *settings, *forgetful]) == 2
    assert "policy weights do not fit" in capsys.readouterr().err


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
