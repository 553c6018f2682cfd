"""Objectives against their formulas in NumPy and gradients by hand, and on a bandit whose optimum is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.objectives import _begun
from ript_ray.algos.advantages import is_mixed, leave_one_out, process
from ript_ray.algos.objectives import OBJECTIVES, Draw, traits_of
from ript_ray.config import OBJECTIVE_NAMES, ObjectiveConfig, load_config
from ript_ray.errors import UserError
from ript_ray.policies.integration import (
    ChainStep,
    Explore,
    euler_maruyama,
    integrate,
    integrate_with_noise,
    log_prob_under,
)
from ript_ray.policies.policy import sample_time
from ript_ray.reporting import write_json
from ript_ray.types import Batch

ROWS, STEPS, DIMS = 5, 4, 3


class Identity:
    """A transform that leaves actions as they are."""

    action_mean = (0.0,) * 3

    def encode_actions(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return actions


class Table(nn.Module):
    """A policy whose velocities are its parameters, one for each condition and row: gradients can be read off."""

    transform: Any = Identity()

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.v = nn.Parameter(torch.randn(2, ROWS, STEPS, DIMS, generator=generator))

    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        return torch.arange(len(states))

    def conditioned(self, features: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return condition, features.repeat(len(condition) // len(features))

    def velocity(
        self, conditioned: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return self.v[conditioned]

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        return t.square()


def make_chain(generator: torch.Generator) -> ChainStep:
    def draw() -> torch.Tensor:
        return torch.randn(ROWS, STEPS, DIMS, generator=generator)

    time, duration = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.1]), torch.full((ROWS,), 0.1)
    return ChainStep(
        draw(), draw(), draw()[..., 0] - 3, time, duration, torch.full((ROWS,), 0.7), torch.full((ROWS,), 2)
    )


def make_draw(**changes: Any) -> tuple[Table, Table, Draw, dict[str, np.ndarray]]:
    """A policy, a reference and a draw; and its numbers as float64 arrays for the second computation."""
    g = torch.Generator().manual_seed(3)
    advantages = torch.tensor([0.75, -0.25, 0.5, -1.0, 0.0])
    batch = Batch(
        frames=torch.zeros(ROWS, 0),
        states=torch.zeros(ROWS, 1),
        actions=torch.randn(ROWS, STEPS, DIMS, generator=g),
        valid=torch.tensor([[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool),
        advantages=advantages,
        weights=changes.get("weights", advantages),
        versions=torch.zeros(ROWS, dtype=torch.int64),
        instructions=[""] * ROWS,
        chain=make_chain(g),
    )
    policy, reference = Table(1), Table(2)
    noise, time = torch.randn(ROWS, STEPS, DIMS, generator=g), torch.rand(ROWS, generator=g)
    chance = torch.tensor([0.05, 0.5, 0.5, 0.05, 0.5])
    draw = Draw(policy, batch, noise, time, chance, reference)
    known = {"u": noise - batch.actions, "t": time, "valid": batch.valid, "A": batch.weights, "raw": advantages}
    known |= {"v": policy.v.detach(), "old": reference.v.detach()}
    return policy, reference, draw, {k: np.asarray(value, dtype=np.float64) for k, value in known.items()}


def mean_error(velocity: np.ndarray, k: dict[str, np.ndarray]) -> np.ndarray:
    """ℓ of each row, in a plain loop over its valid elements."""
    rows = []
    for i in range(ROWS):
        valid = [s for s in range(STEPS) if k["valid"][i, s]]
        rows.append(
            np.mean([(k["t"][i] * (velocity[i, s, d] - k["u"][i, s, d])) ** 2 for s in valid for d in range(DIMS)])
        )
    return np.array(rows)


def error_gradient(velocity: np.ndarray, k: dict[str, np.ndarray]) -> np.ndarray:
    """dℓ/dv by hand: 2t²(v − u)/n on valid elements."""
    counts = k["valid"].sum(1) * DIMS
    return 2 * (k["t"] ** 2)[:, None, None] * (velocity - k["u"]) * k["valid"][..., None] / counts[:, None, None]


def by_hand(settings: ObjectiveConfig, k: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and their gradient with respect to the velocities of both conditions: [B] and [2, B, T, D]."""
    a, (v0, v1), old = k["A"], k["v"], k["old"][1]
    l1, l0, d1, d0 = mean_error(v1, k), mean_error(v0, k), error_gradient(v1, k), error_gradient(v0, k)

    def rows(weights: np.ndarray) -> np.ndarray:
        return np.asarray(weights, dtype=float)[:, None, None]

    zero = np.zeros_like(d1)
    match settings.name:
        case "cfg":
            good = k["raw"] > 0
            return good * l1 + 0.1 * l0, np.stack([0.1 * d0, rows(good) * d1])
        case "imitation":
            return l1 + 0.1 * l0, np.stack([0.1 * d0, d1])
        case "label_dropout":
            kept = np.array([False, False, True, False, False])  # the only good row with a chance above the dropout
            return np.where(kept, l1, l0), np.stack([rows(~kept) * d0, rows(kept) * d1])
        case "advantage_weighted":
            if settings.negatives != "hinge":
                return a * l1 + 0.1 * l0, np.stack([0.1 * d0, rows(a) * d1])
            ceiling = mean_error(old, k) + settings.margin
            free = ~((a < 0) & (l1 > ceiling))
            return a * np.where(free, l1, ceiling) + 0.1 * l0, np.stack([0.1 * d0, rows(a * free) * d1])
        case "nft":
            b, r = settings.beta, 0.5 + 0.5 * np.clip(a, -1, 1)
            plus, minus = (1 - b) * old + b * v1, (1 + b) * old - b * v1
            loss = (r * mean_error(plus, k) + (1 - r) * mean_error(minus, k)) / b
            return loss, np.stack([zero, rows(r) * error_gradient(plus, k) - rows(1 - r) * error_gradient(minus, k)])
        case "fpo":
            s = settings.ratio_scale
            log_ratio = s * (mean_error(old, k) - l1)
            limited = np.clip(log_ratio, -3, 3)
            losses, slope = clipped(np.exp(limited), a, settings.ratio_clip)
            inside = (log_ratio > -3) & (log_ratio < 3)
            return losses, np.stack([zero, rows(slope * np.exp(limited) * inside * -s) * d1])
    raise AssertionError(settings.name)


def clipped(ratio: np.ndarray, a: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The clipped surrogate by cases, and its derivative with respect to the ratio."""
    outside = ((a > 0) & (ratio > 1 + epsilon)) | ((a < 0) & (ratio < 1 - epsilon))
    bound = np.where(a > 0, 1 + epsilon, 1 - epsilon)
    return -a * np.where(outside, bound, ratio), np.where(outside, 0.0, -a)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "cfg"},
        {"name": "imitation"},
        {"name": "label_dropout"},
        {"name": "advantage_weighted"},
        {"name": "advantage_weighted", "negatives": "hinge", "margin": 0.01},
        {"name": "nft"},
        {"name": "nft", "beta": 0.3},
        {"name": "fpo", "ratio_scale": 0.5},
        {"name": "fpo", "ratio_scale": 20.0},
    ],
    ids=str,
)
def test_an_objective_equals_its_formula_and_its_gradient(settings: dict[str, Any]) -> None:
    config = ObjectiveConfig.model_validate(settings)
    policy, _, draw, known = make_draw()
    result = OBJECTIVES[config.name](draw, config)
    losses, gradient = by_hand(config, known)
    np.testing.assert_allclose(result.per_sample.detach(), losses, rtol=1e-4, atol=1e-6)
    result.per_sample.sum().backward()
    assert policy.v.grad is not None
    np.testing.assert_allclose(policy.v.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(values.shape == (ROWS,) and torch.isfinite(values).all() for values in result.diagnostics.values())


def test_flow_sde_equals_its_formula_and_its_gradient() -> None:
    config = ObjectiveConfig(name="flow_sde", ratio_clip=0.2)
    policy, _, draw, known = make_draw()
    chain = draw.batch.chain
    assert chain is not None
    # Make the old probabilities those of velocities nearby, so that some ratios are clipped and some are not.
    nearby = known["v"][1] + 0.02 * np.random.default_rng(0).normal(size=known["v"][1].shape)
    c = {name: getattr(chain, name).numpy().astype(np.float64) for name in ("x", "x_next", "time", "duration", "level")}

    def log_probs(velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the executed and valid steps of each row, and their derivative by the velocity."""
        total, slope = np.zeros(ROWS), np.zeros_like(velocity)
        for i in range(ROWS):
            t, d, level = c["time"][i], c["duration"][i], c["level"][i]
            sigma = level * math.sqrt(t / (1 - t if t < 1 else d))
            for s in range(2):
                if not known["valid"][i, s]:
                    continue
                for j in range(DIMS):
                    x, v = c["x"][i, s, j], velocity[i, s, j]
                    k0, k1 = 1 - (t - d), t - d - sigma**2 * d / (2 * t)
                    mean, std = (x - t * v) * k0 + (x + (1 - t) * v) * k1, math.sqrt(d) * sigma
                    z = (c["x_next"][i, s, j] - mean) / std
                    total[i] += -0.5 * z**2 - math.log(std * math.sqrt(2 * math.pi))
                    slope[i, s, j] = z / std * ((1 - t) * k1 - t * k0)
        return total, slope

    then, _ = log_probs(nearby)
    per_step = np.zeros((ROWS, STEPS))
    per_step[:, 0] = then
    chain.log_prob.copy_(torch.from_numpy(per_step))
    result = OBJECTIVES["flow_sde"](draw, config)
    now, slope = log_probs(known["v"][1])
    ratio = np.exp(now - then)
    losses, by_ratio = clipped(ratio, known["A"], 0.2)
    assert (by_ratio == 0).any()
    assert (by_ratio != 0).any()
    np.testing.assert_allclose(result.per_sample.detach(), losses, rtol=2e-3, atol=1e-5)
    result.per_sample.sum().backward()
    assert policy.v.grad is not None
    np.testing.assert_allclose(policy.v.grad[1], (by_ratio * ratio)[:, None, None] * slope, rtol=2e-3, atol=1e-4)
    assert not policy.v.grad[0].any()


def test_the_configuration_names_all_objectives() -> None:
    assert set(OBJECTIVE_NAMES) == set(OBJECTIVES)


def test_objectives_that_lack_something_say_what() -> None:
    _, _, draw, _ = make_draw()
    draw.batch.chain = None
    with pytest.raises(ValueError, match=r"set policy\.explore"):
        OBJECTIVES["flow_sde"](draw, ObjectiveConfig(name="flow_sde"))
    alone = Draw(Table(0), draw.batch, torch.zeros(ROWS, STEPS, DIMS), torch.ones(ROWS), torch.ones(ROWS))
    with pytest.raises(ValueError, match="policy before the update"):
        OBJECTIVES["nft"](alone, ObjectiveConfig(name="nft"))


# A bandit: an action in the plane succeeds in a small circle beside the middle of the starting policy.
GOAL, RADIUS = torch.tensor([1.2, 0.0]), 0.7
NOISE_LEVEL = 0.7


class Bandit(nn.Module):
    """A flow policy over single actions in the plane, without observations."""

    transform: Any = Identity()

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Embedding(2, 16)
        self.layers = nn.Sequential(
            nn.Linear(2 + 1 + 16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def encode(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        return states

    def conditioned(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.condition(condition)

    def velocity(self, conditioned: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        features = torch.cat([x[:, 0], t[:, None], conditioned], 1)
        # A network that can jump has no finite optimum at t = 0, whatever the objective.
        return (x - self.layers(features)[:, None]) / t[:, None, None].clamp_min(0.05)

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        return t.square()


def bandit_batch(actions: torch.Tensor, advantages: np.ndarray, weights: np.ndarray, chain: ChainStep | None) -> Batch:
    rows = len(actions)
    return Batch(
        frames=torch.zeros(rows, 0),
        states=torch.zeros(rows, 1),
        actions=actions,
        valid=torch.ones(rows, 1, dtype=torch.bool),
        advantages=torch.from_numpy(advantages).float(),
        weights=torch.from_numpy(weights).float(),
        versions=torch.zeros(rows, dtype=torch.int64),
        instructions=[""] * rows,
        chain=chain,
    )


def train_bandit(policy: Bandit, batch: Batch, settings: ObjectiveConfig, steps: int, lr: float, seed: int) -> float:
    """Train on minibatches; returns the lowest loss of a step."""
    generator = torch.Generator().manual_seed(seed)
    reference = Bandit()
    reference.load_state_dict(policy.state_dict())
    optimiser = torch.optim.Adam(policy.parameters(), lr=lr)
    lowest = math.inf
    for _ in range(steps):
        at = int(torch.randint(0, max(1, len(batch) - 255), (1,), generator=generator))
        part = batch[at : at + 256]
        rows = len(part)
        noise, time = torch.randn(rows, 1, 2, generator=generator), sample_time(rows, generator)
        known = reference if traits_of(settings).compares_with_reference else None
        draw = Draw(policy, part, noise, time, torch.rand(rows, generator=generator), known)
        loss = OBJECTIVES[settings.name](draw, settings).per_sample.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        lowest = min(lowest, loss.item())
    return lowest


def act(policy: Bandit, rows: int, seed: int, level: float = 0.0) -> tuple[torch.Tensor, ChainStep | None]:
    generator = torch.Generator().manual_seed(seed)
    noise, ones = torch.randn(rows, 1, 2, generator=generator), torch.ones(rows, dtype=torch.long)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return policy.velocity(policy.conditioned(torch.zeros(rows, 1), ones), x, t)

    with torch.no_grad():
        if level == 0.0:
            return integrate(velocity, noise, 10), None
        return integrate_with_noise(velocity, noise, 10, Explore(level, 1, generator, noise.shape[-1]))


def succeeds(actions: torch.Tensor) -> torch.Tensor:
    return (actions[:, 0] - GOAL).norm(dim=-1) < RADIUS


@pytest.fixture(scope="module")
def start() -> Bandit:
    """Imitates a standard normal distribution of actions, in both modes."""
    torch.manual_seed(0)
    policy = Bandit()
    demonstrations = torch.randn(4096, 1, 2)
    nothing = np.zeros(4096)
    batch = bandit_batch(demonstrations, nothing, nothing, None)
    train_bandit(policy, batch, ObjectiveConfig(name="imitation", alpha=1.0), 1500, 2e-3, 0)
    rate = succeeds(act(policy, 4000, 1)[0]).float().mean().item()
    assert 0.04 < rate < 0.25
    return policy


def learn_bandit(start: Bandit, settings: ObjectiveConfig, rounds: int, steps: int, lr: float) -> tuple[Bandit, float]:
    """Rounds of rollouts in groups of 8 and updates; returns the policy and the lowest loss."""
    policy = Bandit()
    policy.load_state_dict(start.state_dict())
    lowest = math.inf
    for index in range(rounds):
        level = NOISE_LEVEL if settings.name == "flow_sde" else 0.0
        actions, chain = act(policy, 1024, 100 + index, level)
        rewards = succeeds(actions).numpy().astype(float).reshape(-1, 8)
        mixed = np.repeat([is_mixed(group) or settings.name == "imitation" for group in rewards], 8)
        if not mixed.any():
            break
        advantages = np.concatenate([leave_one_out(group) for group in rewards])[mixed]
        weights, _ = process(advantages, settings)
        chain = None if chain is None else chain[torch.from_numpy(mixed)]
        batch = bandit_batch(actions[torch.from_numpy(mixed)], advantages, weights, chain)
        share = max(1, steps * len(batch) // 1024)  # passes over the samples are fixed, as in the learner
        lowest = min(lowest, train_bandit(policy, batch, settings, share, lr, index))
    return policy, lowest


def success_rate(policy: Bandit) -> float:
    return succeeds(act(policy, 4000, 1)[0]).float().mean().item()


@pytest.mark.parametrize(
    ("settings", "at_least"),
    [
        ({"name": "cfg"}, 0.9),
        ({"name": "label_dropout"}, 0.9),
        ({"name": "advantage_weighted", "negatives": "relu"}, 0.9),
        ({"name": "advantage_weighted", "negatives": "exp"}, 0.8),
        ({"name": "advantage_weighted", "negatives": "softplus", "temperature": 0.2}, 0.8),
        ({"name": "advantage_weighted", "negatives": "clamp"}, 0.8),
        ({"name": "advantage_weighted", "negatives": "hinge"}, 0.8),
        ({"name": "nft", "beta": 0.3}, 0.8),
        ({"name": "fpo", "ratio_scale": 2.0}, 0.8),
        ({"name": "flow_sde"}, 0.8),
    ],
    ids=str,
)
def test_an_objective_finds_the_optimum_of_a_bandit(start: Bandit, settings: dict[str, Any], at_least: float) -> None:
    policy, _ = learn_bandit(start, ObjectiveConfig.model_validate(settings), rounds=6, steps=150, lr=1e-3)
    assert success_rate(policy) > at_least


def test_imitation_of_everything_does_not_improve_the_bandit(start: Bandit) -> None:
    policy, _ = learn_bandit(start, ObjectiveConfig(name="imitation"), rounds=6, steps=150, lr=1e-3)
    assert abs(success_rate(policy) - success_rate(start)) < 0.12


def test_negative_weights_diverge_unless_they_are_bounded(start: Bandit) -> None:
    def after(negatives: str) -> tuple[Bandit, float]:
        settings = ObjectiveConfig.model_validate({"name": "advantage_weighted", "negatives": negatives})
        return learn_bandit(start, settings, rounds=1, steps=1500, lr=1e-3)

    naive, lowest = after("keep")
    assert lowest < -100  # unbounded below
    assert not act(naive, 500, 1)[0].abs().max() < 10  # far out, or NaN
    for rule in ("relu", "exp", "softplus", "clamp", "hinge"):
        policy, lowest = after(rule)
        assert lowest > -2
        assert act(policy, 500, 1)[0].abs().max() < 5


def test_a_stochastic_step_keeps_the_distribution() -> None:
    """For a Gaussian the true velocity is known: after any one stochastic step the end is still that Gaussian."""
    mean, std = 0.7, 0.4

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None]
        variance = t**2 + (1 - t) ** 2 * std**2
        clean = mean + (1 - t) * std**2 / variance * (x - (1 - t) * mean)
        return (x - clean) / t

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, 1, generator=generator)
    for level in (0.2, 0.5):
        x, chain = integrate_with_noise(velocity, noise, 50, Explore(level, 1, generator, noise.shape[-1]))
        assert x.mean().item() == pytest.approx(mean, abs=0.02)
        assert x.std().item() == pytest.approx(std, rel=0.05)
        again = euler_maruyama(
            velocity(chain.x, chain.time), chain.x, chain.time, chain.duration, torch.full((len(x),), level)
        )
        expected = torch.distributions.Normal(*again).log_prob(chain.x_next).sum(-1)
        torch.testing.assert_close(chain.log_prob, expected, rtol=1e-4, atol=1e-4)
    # Every place was drawn, and the rest of the steps are the plain ones.
    assert len(torch.unique(chain.time)) == 50
    # Padded dimensions move as the others do, and nobody counts them.
    wide = torch.randn(64, 1, 3, generator=generator)
    _, chain = integrate_with_noise(lambda x, t: x, wide, 10, Explore(0.5, 1, generator, real=2))
    told = log_prob_under(chain.x, chain, real=2)
    torch.testing.assert_close(chain.log_prob, told)
    moved = torch.cat([chain.x[..., :2], chain.x[..., 2:] + 0.3], -1)
    torch.testing.assert_close(log_prob_under(moved, chain, real=2), told)
    assert (log_prob_under(moved, chain, real=3) - told).abs().min() > 1e-3


def test_a_comparison_goes_on_in_a_version_with_more_settings(tmp_path: Path) -> None:
    config = load_config(Path(__file__).parents[1] / "configs/objectives.yaml", [])
    file = tmp_path / "objectives.json"
    result = _begun(file, config, "start")
    del result["settings"]["objective"]["own"], result["settings"]["sft"]
    write_json(file, result | {"base": {"1": [True]}})
    assert _begun(file, config, "start")["base"] == {"1": [True]}
    for other in (
        (file, config, "another start"),
        (file, load_config(None, ["objective.alpha=0.2"]), "start"),
    ):
        with pytest.raises(UserError, match="is of other settings"):
            _begun(*other)
