import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ript_ray.algos.advantages import (
    against_task,
    credit_fastest,
    is_kept,
    is_mixed,
    leave_one_out,
    process,
)
from ript_ray.algos.sampling import ContextSampler, training_starts
from ript_ray.config import Config, EnvConfig, ObjectiveConfig, SamplingConfig
from ript_ray.errors import UserError
from ript_ray.evaluation import (
    before_and_after,
    effective_episodes,
    evaluation_contexts,
    paired_p_value,
    success_summary,
    wilson_interval,
)
from ript_ray.types import Context


@given(st.lists(st.booleans(), min_size=2, max_size=16))
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(outcomes: list[bool]) -> None:
    rewards = [Fraction(int(outcome)) for outcome in outcomes]
    expected = [r - sum(rewards[:k] + rewards[k + 1 :]) / (len(rewards) - 1) for k, r in enumerate(rewards)]
    np.testing.assert_allclose(leave_one_out(np.array(outcomes, dtype=float)), [float(e) for e in expected], atol=1e-12)
    assert is_mixed(np.array(outcomes, dtype=float)) == (len(set(outcomes)) == 2)


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan")], [[1.0, 0.0]]])
def test_leave_one_out_refuses_what_has_no_meaning(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite rewards"):
        leave_one_out(np.array(rewards))


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 300), st.sampled_from(["a", "b"])), min_size=1, max_size=40),
    st.sampled_from([0.1, 0.5, 0.7, 1.0]),
)
def test_only_the_fastest_successes_of_a_task_keep_their_credit(
    episodes: list[tuple[bool, int, str]], share: float
) -> None:
    advantages = np.array([1.0 if success else -1.0 for success, _, _ in episodes])
    successes, lengths, tasks = (list(column) for column in zip(*episodes, strict=True))
    credited = credit_fastest(advantages, np.array(lengths), np.array(successes), tasks, share)
    for task in ("a", "b"):
        own = sorted(length for success, length, name in episodes if success and name == task)
        limit = own[math.ceil(Fraction(str(share)) * len(own)) - 1] if own else 0
        for (success, length, name), value in zip(episodes, credited, strict=True):
            if name == task:
                assert value == (-1.0 if not success else 1.0 if length <= limit else 0.0)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("ab")), min_size=1, max_size=30))
def test_against_its_task_a_rollout_is_compared_with_all_others_of_it(rollouts: list[tuple[bool, str]]) -> None:
    successes, tasks = (list(column) for column in zip(*rollouts, strict=True))
    found = against_task(np.array(successes), tasks)
    for i, (success, task) in enumerate(rollouts):
        others = [other for j, (other, name) in enumerate(rollouts) if name == task and j != i]
        with_one_that_half_succeeded = [*others, Fraction(1, 2)]
        expected = success - sum(with_one_that_half_succeeded) / Fraction(len(with_one_that_half_succeeded))
        assert found[i] == pytest.approx(float(expected))
        assert (found[i] > 0) == success  # also where all agree


def test_against_its_group_a_uniform_group_is_not_kept_against_its_task_it_is() -> None:
    for rewards in (np.zeros(4), np.ones(4)):
        assert not is_kept(rewards, ObjectiveConfig())
        assert is_kept(rewards, ObjectiveConfig(baseline="task"))


def test_seeds_of_contexts_are_distinct_and_fit_into_32_bits() -> None:
    seeds: set[int] = set()
    for seed in (0, 1, 428, 429, 2026_11_22):
        sampler = ContextSampler(training_starts(EnvConfig()), SamplingConfig(), seed)
        contexts = [context for _ in range(20) for context in sampler.next_group().contexts]
        assert all(0 <= context.reset_arguments()["seed"] < 2**32 for context in contexts)
        seeds |= {context.seed for context in contexts}
    assert len(seeds) == 5 * 20 * SamplingConfig().group_size


NORMALISATIONS = ["none", "zero_mean", "standard", "robust", "min_max"]
CLIPS = ["none", "symmetric", "asymmetric", "quantile"]
NEGATIVES = ["keep", "softplus", "exp", "abs", "clamp", "relu", "hinge"]
values = st.lists(st.floats(-50, 50), min_size=2, max_size=40).map(np.array)
separate = st.lists(st.integers(-500, 500), min_size=3, max_size=40, unique=True).map(lambda v: np.array(v) / 10)


def processed(advantages: np.ndarray, **settings: object) -> np.ndarray:
    return process(advantages, ObjectiveConfig.model_validate(settings))[0]


@given(separate, st.floats(0.1, 10), st.floats(-5, 5))
def test_normalisations_are_invariant_to_what_they_remove(a: np.ndarray, scale: float, shift: float) -> None:
    np.testing.assert_allclose(processed(a, normalise="none"), a)
    centred = processed(a, normalise="zero_mean")
    np.testing.assert_allclose(processed(a + shift, normalise="zero_mean"), centred, atol=1e-9)
    for normalise in ("standard", "robust", "min_max"):
        expected = processed(a, normalise=normalise)
        np.testing.assert_allclose(processed(scale * a + shift, normalise=normalise), expected, rtol=1e-6, atol=1e-6)
    assert centred.sum() == pytest.approx(0, abs=1e-8)
    assert processed(a, normalise="standard").std() == pytest.approx(1)
    assert np.median(processed(a, normalise="robust")) == pytest.approx(0, abs=1e-9)
    mapped = processed(a, normalise="min_max")
    assert (mapped.min(), mapped.max()) == pytest.approx((0, 1))


@given(values, st.sampled_from(NORMALISATIONS), st.sampled_from(CLIPS), st.sampled_from(NEGATIVES))
def test_processing_keeps_order_and_stays_finite(a: np.ndarray, normalise: str, clip: str, negatives: str) -> None:
    result = processed(a, normalise=normalise, clip=clip, negatives=negatives)
    assert np.isfinite(result).all()
    if negatives != "abs":
        order = np.argsort(a, kind="stable")
        assert (np.diff(result[order]) >= -1e-9).all()
    if negatives not in ("keep", "hinge"):
        assert (result >= 0).all()


@given(values)
def test_clips_are_bounds_and_leave_the_inside_alone(a: np.ndarray) -> None:
    for clip, low, high in (
        ("symmetric", -3.0, 3.0),
        ("asymmetric", -0.5, 3.0),
        ("quantile", *np.quantile(a, [0.1, 0.9])),
    ):
        settings = ObjectiveConfig.model_validate(
            {"clip": clip, "clip_low": 0.5, "clip_high": 3.0, "clip_quantile": 0.1}
        )
        result, counts = process(a, settings)
        inside = (a >= low) & (a <= high)
        assert (result >= low).all()
        assert (result <= high).all()
        np.testing.assert_array_equal(result[inside], a[inside])
        assert counts.clipped == (~inside).sum()


@given(values)
def test_rules_for_negatives_against_their_formulas(a: np.ndarray) -> None:
    np.testing.assert_array_equal(processed(a, negatives="keep"), a)
    np.testing.assert_array_equal(processed(a, negatives="hinge"), a)
    np.testing.assert_allclose(processed(a, negatives="relu"), [max(0.0, x) for x in a])
    np.testing.assert_allclose(processed(a, negatives="abs"), [math.hypot(x) for x in a])
    np.testing.assert_allclose(processed(a, negatives="clamp", floor=0.3), [x if x > 0.3 else 0.3 for x in a])
    np.testing.assert_allclose(
        processed(a, negatives="exp", temperature=2.0, weight_limit=9.0), [min(9.0, math.exp(x / 2)) for x in a]
    )
    softplus = torch.nn.functional.softplus(torch.from_numpy(a), beta=0.5, threshold=1e9)
    np.testing.assert_allclose(processed(a, negatives="softplus", temperature=2.0), softplus, atol=1e-12)


def test_what_is_not_finite_or_far_out_is_caught_and_counted() -> None:
    a = np.array([0.5, -0.5, 0.4, -0.4, 0.3, np.nan, np.inf, -np.inf, 1e6])
    result, counts = process(a, ObjectiveConfig(clip="symmetric", clip_high=1.0))
    assert result.tolist() == [0.5, -0.5, 0.4, -0.4, 0.3, 0.0, 0.0, 0.0, 1.0]
    assert (counts.not_finite, counts.outliers, counts.clipped) == (3, 1, 1)
    for negatives in NEGATIVES:
        assert processed(a, negatives=negatives)[5:8].tolist() == [0.0, 0.0, 0.0]
    # More than half are equal, as with binary rewards: the median absolute deviation is 0.
    assert process(np.array([0.2] * 90 + [-0.8] * 9 + [40.0]), ObjectiveConfig())[1].outliers == 1
    assert process(np.array([0.2] * 80 + [-0.8] * 20), ObjectiveConfig())[1].outliers == 0
    for normalise in NORMALISATIONS:  # advantages that are all equal have no scale
        assert np.isfinite(processed(np.full(4, 0.25), normalise=normalise)).all()
        assert processed(np.array([]), normalise=normalise).shape == (0,)


def test_sampler_skips_states_that_always_succeed_and_measures_them_again() -> None:
    config = SamplingConfig(group_size=2, skip_after=1, remeasure_after=2, groups=1)
    sampler = ContextSampler([("libero_object/0", state, None) for state in range(3)], config, seed=0)
    visits = []
    for _ in range(9):
        group = sampler.next_group()
        visits.append(group.start[1])
        sampler.record(group, np.array([1.0, 1.0]) if group.start[1] == 1 else np.array([1.0, 0.0]))
    assert sampler.skipped == 2
    assert visits.count(1) < visits.count(0)


def test_a_group_shares_its_start_and_placements_are_told_from_each_other() -> None:
    env = EnvConfig(id="libero_object/0,libero_goal/1", train_placements=3)
    starts = training_starts(env)
    assert len(set(starts)) == len(starts) == 6
    assert {start[0] for start in starts[:2]} == {"libero_object/0", "libero_goal/1"}
    sampler = ContextSampler(starts, SamplingConfig(group_size=4), seed=0)
    for _ in range(12):
        group = sampler.next_group()
        assert {context.start for context in group.contexts} == {group.start}
        assert len({str(context.reset_arguments()) for context in group.contexts}) == 1
        assert len({context.seed for context in group.contexts}) == 4
    bad = sampler.next_group()
    sampler.set_aside(bad.contexts[0], "it hangs")
    assert all(sampler.is_aside(context) for context in bad.contexts)
    assert len({sampler.next_group().start for _ in range(10)} | {bad.start}) == 6
    # With a given initial state the rest of the scene is the same within a group, too.
    fixed = ContextSampler(training_starts(EnvConfig()), SamplingConfig(group_size=4), seed=0).next_group()
    assert len({str(context.reset_arguments()) for context in fixed.contexts}) == 1
    assert fixed.contexts[0].init_state is not None


def test_curriculum_prefers_states_near_the_target() -> None:
    config = SamplingConfig(group_size=2, target_success=0.5, skip_after=100)
    sampler = ContextSampler([("libero_object/0", state, None) for state in range(3)], config, seed=0)
    rates = {0: [0.0, 0.0], 1: [1.0, 0.0], 2: [1.0, 1.0]}
    visits = []
    for _ in range(300):
        group = sampler.next_group()
        visits.append(group.start[1])
        sampler.record(group, np.array(rates[group.start[1]]))
    late = visits[50:]
    # exp(−½(0.5/0.2)²) = 0.044 for the states far from the target
    assert late.count(1) / len(late) == pytest.approx(1 / (1 + 2 * 0.044), abs=0.05)
    assert late.count(0) > 0


def test_sampler_never_repeats_a_seed_and_is_reproducible() -> None:
    config = SamplingConfig(group_size=4)
    a, b = (ContextSampler([("libero_object/0", state, None) for state in range(5)], config, seed=7) for _ in range(2))
    groups = [a.next_group() for _ in range(20)]
    assert groups == [b.next_group() for _ in range(20)]
    seeds = [context.seed for group in groups for context in group.contexts]
    assert len(set(seeds)) == 80
    assert {group.start[1] for group in groups[:5]} == set(range(5))


@pytest.mark.parametrize(("successes", "episodes"), [(0, 10), (5, 10), (10, 10), (24, 48)])
def test_wilson_interval_solves_its_equation(successes: int, episodes: int) -> None:
    rate = successes / episodes
    for bound in wilson_interval(successes, episodes):
        # Both bounds p satisfy |rate − p| = z·sqrt(p(1 − p)/n).
        assert abs(rate - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / episodes) ** 0.5, abs=1e-6)


def test_wilson_interval_contains_the_rate_to_the_last_bit() -> None:
    for episodes in range(1, 101):
        for successes in range(episodes + 1):
            low, high = wilson_interval(successes, episodes)
            assert 0.0 <= low <= successes / episodes <= high <= 1.0


def test_evaluation_has_columns_that_training_never_meets() -> None:
    config = Config.model_validate(
        {
            "env": {"id": "libero_object/0,libero_goal/3"},
            "eval": {"episodes": 60, "random_placement": 6, "shifted": 16},
        }
    )
    columns = evaluation_contexts(config)
    assert {name: len(contexts) for name, contexts in columns.items()} == {
        "held_out": 60,
        "random_placement": 6,
        "shifted": 16,
    }
    assert {c.env_id for c in columns["held_out"]} == {"libero_object/0", "libero_goal/3"}
    assert {c.init_state for c in columns["held_out"]} == set(range(25, 50))
    assert {c.init_state for c in columns["random_placement"]} == {None}
    assert {c.env_id for c in columns["shifted"]} == {
        f"libero_{suite}_{shift}/{task}"
        for suite, task in (("object", 0), ("goal", 3))
        for shift in ("lan", "object", "swap", "task")
    }
    for contexts in columns.values():
        assert len(set(contexts)) == len(contexts)
    assert "shifted" not in evaluation_contexts(
        config.model_copy(update={"eval": config.eval.model_copy(update={"shifted": 0})})
    )
    other = config.model_copy(update={"env": config.env.model_copy(update={"id": "libero_90/0"})})
    with pytest.raises(UserError, match=r"eval\.shifted=16: only libero_spatial.*set eval\.shifted=0"):
        evaluation_contexts(other)


@pytest.mark.parametrize(("enough", "groups", "quota"), [(0.28, 25, 7), (0.56, 25, 14), (0.5, 7, 4), (1.0, 8, 8)])
def test_the_share_that_is_enough_is_rounded_up_once(enough: float, groups: int, quota: int) -> None:
    assert SamplingConfig(enough=enough, groups=groups).quota == quota


def test_before_and_after_leaves_out_what_failed() -> None:
    contexts = [Context("libero_object/0", state, 1) for state in range(3)]
    result = before_and_after(contexts, [True, None, False], [True, True, True])
    assert (result["base"]["successes"], result["final"]["successes"], result["base"]["episodes"]) == (1, 2, 2)


def test_summary_and_paired_test() -> None:
    assert success_summary([True, False])["rate"] == 0.5
    assert success_summary([])["ci95"] == [0.0, 1.0]
    # Six gains and no loss: 2·(1/2)^6.
    assert paired_p_value([False] * 6 + [True], [True] * 7) == pytest.approx(2 / 64)
    assert paired_p_value([True], [True]) == 1.0


def test_episodes_from_one_start_count_for_as_much_as_they_tell() -> None:
    starts = [i // 2 for i in range(50)]
    outcomes = [i % 3 == 0 for i in range(25)]
    assert effective_episodes([outcomes[start] for start in starts], starts) == pytest.approx(25)  # all by the start
    assert effective_episodes([i % 2 == 0 for i in range(50)], starts) == 50  # not at all
    assert effective_episodes([True] * 50, starts) == 25  # nobody knows
    assert effective_episodes(outcomes, range(25)) == 25
    assert effective_episodes([True, False, True], [0, 0, 0]) == 3
    assert effective_episodes([], []) == 0
    # The deviation of a rate of such samples is that of a rate of so many independent ones.
    rng = np.random.default_rng(0)
    chances = rng.beta(1.0, 1.0, (4000, 25)).repeat(2, axis=1)  # a correlation of 1 / (1 + 1 + 1)
    samples = rng.random(chances.shape) < chances
    deviation = samples.mean(1).std()
    effective = np.mean([effective_episodes(sample.tolist(), starts) for sample in samples[:1000]])
    assert effective == pytest.approx(0.25 / deviation**2, rel=0.05)
    covered = [
        low <= 0.5 <= high for low, high in (success_summary(list(map(bool, s)), starts)["ci95"] for s in samples)
    ]
    assert 0.93 < np.mean(covered) < 0.97
    naive = [low <= 0.5 <= high for low, high in (wilson_interval(int(s.sum()), 50) for s in samples)]
    assert np.mean(naive) < 0.92


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), max_size=10))
def test_the_paired_test_tries_all_signs(rows: list[tuple[bool, bool, int]]) -> None:
    before, after, starts = ([row[i] for row in rows] for i in range(3))
    changes = [sum(a - b for b, a, s in rows if s == start) for start in set(starts)]
    sums = [sum(sign * c for sign, c in zip(signs, changes)) for signs in product((1, -1), repeat=len(changes))]  # noqa: B905
    expected = np.mean([abs(total) >= abs(sum(changes)) for total in sums])
    assert paired_p_value(before, after, starts) == pytest.approx(expected)
    gained, lost = sum(a > b for b, a in zip(before, after)), sum(b > a for b, a in zip(before, after))  # noqa: B905
    mcnemar = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert paired_p_value(before, after) == pytest.approx(mcnemar)
