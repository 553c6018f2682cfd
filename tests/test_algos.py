from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ript_ray.algos.advantages import is_mixed, leave_one_out
from ript_ray.algos.objectives import cfg, imitation, weighted_loss
from ript_ray.algos.sampling import ContextSampler
from ript_ray.config import SamplingConfig
from ript_ray.evaluation import paired_p_value, success_summary, wilson_interval


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


def test_cfg_counts_successes_conditionally_and_everything_unconditionally() -> None:
    advantages = torch.tensor([0.5, -0.5, 0.0])
    conditional, unconditional = cfg(advantages, 0.1)
    assert conditional.tolist() == [1.0, 0.0, 0.0]
    assert unconditional.tolist() == pytest.approx([0.1] * 3)
    assert imitation(advantages, 0.2)[0].tolist() == [1.0] * 3


def test_weighted_loss_against_a_plain_loop() -> None:
    torch.manual_seed(0)
    errors = torch.rand(2, 3, 5, 2)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    weights = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.1, 0.1, 0.1])
    expected = 0.0
    for branch in range(2):
        for row in range(3):
            kept = [errors[branch, row, t, d].item() for t in range(5) for d in range(2) if valid[row, t]]
            expected += weights[branch][row].item() * sum(kept) / len(kept)
    assert weighted_loss(errors[0], errors[1], valid, weights).item() == pytest.approx(expected, rel=1e-6)


def test_sampler_skips_states_that_always_succeed_and_measures_them_again() -> None:
    config = SamplingConfig(group_size=2, skip_after=1, remeasure_after=2, groups=1)
    sampler = ContextSampler(["libero_object/0"], (0, 3), config, seed=0)
    visits = []
    for _ in range(9):
        group = sampler.next_group()
        visits.append(group.start[1])
        sampler.record(group, np.array([1.0, 1.0]) if group.start[1] == 1 else np.array([1.0, 0.0]))
    assert sampler.skipped == 2
    assert visits.count(1) < visits.count(0)


def test_sampler_never_repeats_a_seed_and_is_reproducible() -> None:
    config = SamplingConfig(group_size=4)
    a, b = (ContextSampler(["libero_object/0"], (0, 5), config, seed=7) for _ in range(2))
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


def test_summary_and_paired_test() -> None:
    assert success_summary([True, False])["rate"] == 0.5
    assert success_summary([])["ci95"] == [0.0, 1.0]
    # Six gains and no loss: 2·(1/2)^6.
    assert paired_p_value([False] * 6 + [True], [True] * 7) == pytest.approx(2 / 64)
    assert paired_p_value([True], [True]) == 1.0
