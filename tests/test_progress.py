"""How much of a job is done."""

from __future__ import annotations

import pytest

from actors.progress import CHOOSING, CHOOSING_GUIDANCE, Progress
from ript_ray.config import Config


def test_the_whole_job_is_done_when_all_its_stages_are() -> None:
    config = Config.model_validate(
        {
            "train": {"updates": 2, "candidates": 2},
            "sampling": {"groups": 2, "group_size": 2, "max_groups": 2},
            "eval": {"episodes": 4, "halving_episodes": 3},
        }
    )
    progress = Progress(config, training=True)
    seen = [progress.now()["fraction"]]

    def play(stage: str, episodes: int) -> None:
        progress.enter(stage, episodes)
        for _ in range(episodes):
            progress.one_more()
            seen.append(progress.now()["fraction"])

    play("evaluating before", 4)
    for step in range(2):
        play(f"update {step + 1}: rollouts", 4)
        progress.enter("waiting for weights", 0)
        progress.learning(step, 1, 2)
        assert progress.now()["stage"] == f"update {step + 1}: learning"
        progress.learning(step, 2, 2)
        seen.append(progress.now()["fraction"])
    play(CHOOSING, 3)
    play(CHOOSING, 3)  # of another update: the same stage goes on
    assert (progress.now()["done"], progress.now()["expected"]) == (6, 6)
    play("evaluating after", 4)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == pytest.approx(1.0)


def test_a_choice_of_guidance_is_done_when_its_halving_is() -> None:
    config = Config.model_validate({"eval": {"scales": [1, 2], "halving_episodes": 3}})
    progress = Progress(config, training=False)
    seen = []
    for _ in config.eval.scales:  # the better one plays no more: it is the last
        progress.enter(CHOOSING_GUIDANCE, 3)
        for _ in range(3):
            progress.one_more()
            seen.append(progress.now()["fraction"])
    assert seen == pytest.approx([i / 6 for i in range(1, 7)])


def test_what_earlier_sessions_did_is_told_apart() -> None:
    progress = Progress(Config(), training=True)
    progress.enter("evaluating before", 75)
    for i in range(30):
        progress.one_more(earlier=i < 20)
    now = progress.now()
    assert 0 < now["earlier"] == pytest.approx(now["fraction"] * 20 / 30)


def test_rollouts_that_run_while_an_update_is_learnt_are_shown_rather() -> None:
    progress = Progress(Config(), training=True)
    progress.enter("update 2: rollouts", 8)
    progress.learning(0, 1, 2)
    assert progress.now()["stage"] == "update 2: rollouts"


def test_updates_of_an_earlier_session_are_done() -> None:
    progress = Progress(Config(), training=True)
    whole = Progress(Config(), training=True)
    for step in range(Config().train.updates):
        progress.learnt_before(step)
        whole.learning(step, 2, 2)
    assert progress.now()["earlier"] == progress.now()["fraction"] == whole.now()["fraction"] > 0
