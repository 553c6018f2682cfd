"""How a policy acts, and what rollouts try besides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ript_ray.config import PolicyConfig
from ript_ray.envs import make
from ript_ray.policies.acting import Acting, coloured_noise
from ript_ray.policies.checkpoints import load_policy
from ript_ray.rollout import play
from ript_ray.types import Context, Trajectory


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [128, 129])
def test_coloured_noise_has_its_spectrum_and_a_variance_of_one(exponent: float, steps: int) -> None:
    noise = coloured_noise(steps, 4000, exponent, np.random.default_rng(0))
    assert noise.shape == (steps, 4000)
    assert np.square(noise).mean() == pytest.approx(1.0, rel=0.05)
    # By the definition of the discrete Fourier transform, not by the library's.
    times = np.arange(steps)
    powers = []
    for k in (2, 8, 32):
        wave = np.exp(-2j * np.pi * k * times / steps)
        powers.append(np.square(np.abs(wave @ noise)).mean())
    slopes = np.diff(np.log(powers)) / np.log(4.0)
    np.testing.assert_allclose(slopes, -exponent, atol=0.08)


def test_pink_noise_leads_further_than_white() -> None:
    rng = np.random.default_rng(1)
    white, pink = (np.abs(coloured_noise(100, 2000, b, rng).cumsum(0)[50]).mean() for b in (0.0, 1.0))
    assert pink > 2 * white


def test_a_rollout_executes_and_records_the_policy_with_noise(point_start: Path) -> None:
    env = make("gymnasium/ript_ray/PointReach-v0", image_size=32, max_steps=7)
    policy = load_policy(point_start)

    plainly = Acting(execute=5, denoise_steps=4, guidance=1.0)
    noisily = dataclasses.replace(plainly, action_noise=0.2, noise_dimensions=1)

    def played(acting: Acting) -> Trajectory:
        return play(env, policy, Context(env.id, init_state=1, seed=3), acting, policy_version=0)

    plain, noisy = played(plainly), played(noisily)
    drawn = noisily.noise(7 + 5, env.action_dim, seed=3)
    assert not drawn[:, 1:].any()
    assert drawn[:5, 0].any()
    assert len(noisy) == 7  # in the middle of the second chunk
    # Until the second look it has seen the same.
    np.testing.assert_allclose(noisy.actions[:5], np.clip(plain.actions[:5] + drawn[:5], -1.0, 1.0), atol=1e-6)
    np.testing.assert_array_equal(played(noisily).actions, noisy.actions)
    assert not np.array_equal(noisily.noise(30, 3, seed=4), noisily.noise(30, 3, seed=3))
    env.close()


def test_evaluation_never_explores() -> None:
    settings = PolicyConfig(explore=0.5, action_noise=0.1, execute=7)
    assert Acting.of(settings, 2.0, exploring=False) == Acting(7, settings.denoise_steps, guidance=2.0)
    rollout = Acting.of(settings, 1.0, exploring=True)
    assert (rollout.explore, rollout.action_noise, rollout.guidance) == (0.5, 0.1, 1.0)
