"""Choosing guidance scales and updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_policy

from ript_ray.algos.sampling import contexts_to_choose_by, training_starts
from ript_ray.choosing import best_in_rollouts, candidates, choose_guidance, choose_update, episodes_of_halving
from ript_ray.config import Config
from ript_ray.evaluation import evaluation_contexts, paired_p_value
from ript_ray.policies.checkpoints import save_policy


def test_successive_halving_spends_its_episodes_on_the_better_half() -> None:
    rates = {0.5: 0.2, 1.0: 0.5, 2.0: 0.95, 3.0: 0.4, 5.0: 0.1}
    played: dict[float, list[int]] = {scale: [] for scale in rates}

    def play(scale: float, episodes: range) -> list[bool]:
        played[scale] += episodes
        return [np.random.default_rng([int(10 * scale), i]).random() < rates[scale] for i in episodes]

    result = choose_guidance(list(rates), play, first=20)
    assert {scale: len(episodes) for scale, episodes in played.items()} == {0.5: 20, 1.0: 80, 2.0: 80, 3.0: 40, 5.0: 20}
    assert all(episodes == list(range(len(episodes))) for episodes in played.values())
    assert (result["chosen"], result["best"], result["settings_tried"]) == (2.0, 2.0, 5)
    assert [row["episodes"] for row in result["table"]] == [20, 80, 80, 40, 20]


def test_a_scale_that_is_not_told_apart_from_one_is_not_chosen() -> None:
    result = choose_guidance([1.0, 2.0], lambda scale, episodes: [i % 2 == 0 or scale == 2.0 for i in episodes], 4)
    assert (result["best"], result["chosen"]) == (2.0, 1.0)


def test_scale_one_plays_every_round_and_what_failed_is_left_out_of_the_comparison() -> None:
    rates = {1.0: 0.4, 1.5: 0.6, 2.0: 0.95, 3.0: 0.6}

    def play(scale: float, episodes: range) -> list[bool | None]:
        return [None if i % 10 == 0 else (i * 7 % 100) / 100 < rates[scale] for i in episodes]

    result = choose_guidance(list(rates), play, first=50)
    assert [row["episodes"] for row in result["table"]] == [90, 90, 90, 45]
    assert (result["chosen"], result["best"]) == (2.0, 2.0)
    # One that drops out by bad luck at first is better in the end: what is left is not chosen.
    late = choose_guidance([1.0, 2.0, 3.0, 4.0], lambda w, at: [w > 1 if i < 10 else w == 1 for i in at], first=10)
    assert (late["chosen"], late["best"]) == (1.0, 1.0)
    both = [(play(1.0, range(i, i + 1))[0], play(2.0, range(i, i + 1))[0]) for i in range(100)]
    known = [(one, two) for one, two in both if one is not None and two is not None]
    assert result["paired_p"] == paired_p_value([bool(one) for one, _ in known], [bool(two) for _, two in known])


def test_the_best_update_is_chosen_and_of_equals_the_later() -> None:
    good = {1: {0, 1, 2, 4}, 2: {0, 1, 2, 3, 4, 5}, 4: {0, 1, 2, 5, 6, 7}}
    result = choose_update([1, 2, 4], lambda update, episodes: [i in good[update] for i in episodes], first=4)
    assert result["update"] == 4  # 4 of 4 and 3 of 4 at first, then 6 of 8 each
    assert [(row["update"], row["successes"], row["episodes"]) for row in result["table"]] == [
        (1, 3, 4),
        (2, 6, 8),
        (4, 6, 8),
    ]

    def never(update: int, episodes: range) -> list[bool]:
        raise AssertionError("a single one need not play")

    assert choose_update([7], never, first=4) == {"update": 7, "table": []}


def test_candidates_are_the_last_and_the_best_in_rollouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    played = {0: [True] * 10, 1: [True] * 4, 2: [True] * 9 + [False], 3: [True, False] * 5, 4: [True, False] * 5}
    apart = {version: [(success, i) for i, success in enumerate(won)] for version, won in played.items()}
    ranked = best_in_rollouts(apart)
    assert ranked == [2, 1, 4, 3]  # four of four prove less than nine of ten
    together = {version: [(success, 0) for success in won] for version, won in played.items()}
    assert best_in_rollouts(together) == ranked  # of a single start nothing more can be said
    shared = {1: [(i < 6, i // 2) for i in range(8)], 2: [(i % 4 != 3, i // 2) for i in range(8)]}
    assert best_in_rollouts(shared) == [2, 1]  # 6 of 8 each, of which one depends on the start alone
    assert best_in_rollouts({1: [(True, i // 4) for i in range(8)], 2: [(i > 0, i // 4) for i in range(8)]}) == [1, 2]
    for update in (1, 2, 3, 5):
        save_policy(tmp_path / f"{update:04d}", make_policy())
    assert candidates(5, ranked, 1, tmp_path) == [5]
    assert candidates(5, ranked, 3, tmp_path) == [1, 2, 5]
    assert candidates(2, ranked, 2, tmp_path) == [1, 2]
    assert candidates(5, ranked, 9, tmp_path) == [1, 2, 3, 5]  # 4 was not kept
    assert candidates(0, [], 3, tmp_path) == [0]
    assert not caplog.records
    (tmp_path / "0002" / "model.safetensors").write_bytes(b"cut short")
    assert candidates(5, ranked, 2, tmp_path) == [1, 5]
    assert "the policy of update 2 is not compared" in caplog.text


@pytest.mark.parametrize("count", [*range(1, 10), 16, 17])
def test_the_episodes_of_a_halving_are_known_before(count: int) -> None:
    played: list[int] = []

    def play(candidate: int, episodes: range) -> list[bool]:
        played.extend(episodes)
        return [i % (candidate + 1) == 0 for i in episodes]

    choose_update(range(count), play, first=6)
    assert len(played) == episodes_of_halving(count, 6)


@pytest.mark.parametrize("placements", [0, 5])
@pytest.mark.parametrize("tasks", ["libero_object/0", "libero_object/0,libero_object/3"])
def test_what_is_chosen_by_is_neither_trained_on_nor_in_the_exam(tasks: str, placements: int) -> None:
    config = Config.model_validate(
        {"env": {"id": tasks, "train_placements": placements}, "eval": {"random_placement": 20}}
    )
    contexts = contexts_to_choose_by(config.env, config.eval.seed, range(20))
    assert len(set(contexts)) == len({context.start for context in contexts}) == 20
    assert {context.env_id for context in contexts} == set(config.env.ids)
    assert contexts[7:] == contexts_to_choose_by(config.env, config.eval.seed, range(7, 20))
    assert not {context.start for context in contexts} & set(training_starts(config.env))
    exam = [context.start for column in evaluation_contexts(config).values() for context in column]
    assert not {context.start for context in contexts} & set(exam)
