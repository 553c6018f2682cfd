"""Broken input by the thousand: each is refused with an error that names what is wrong, or means what it says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_policy, make_trajectory

from ript_ray.config import Config, known_keys, load_config
from ript_ray.data.storage import load_episode, load_trajectories, load_trajectory, save_episode, save_trajectories
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import cpu_weights, load_policy, save_policy, weights_sha256
from ript_ray.types import EpisodeRecord

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "configs" / "default.yaml"
JUNK = [
    "",
    "null",
    "-1",
    "0",
    "1.5",
    "1e999",
    ".nan",
    "99999999999999999999999",
    "true",
    "abc",
    "[]",
    "[1, 2, 3]",
    "{a: 1}",
    "{",
    "!!python/object/apply:os.getcwd []",
    "\x00",
    "2024-01-01",
]


def damage(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, cut out, doubled, or the end missing."""
    broken = bytearray(content)
    at = rng.randrange(len(broken))
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 4)):
                broken[rng.randrange(len(broken))] ^= rng.randint(1, 255)
        case 1:
            del broken[at:]
        case 2:
            del broken[at : at + rng.randint(1, 20)]
        case 3:
            broken[at:at] = broken[at : at + rng.randint(1, 20)]
    return bytes(broken)


def refusal(load: Callable[[], Any]) -> str | None:
    """The error by which something is refused, if it is; any other kind of exception is a bug."""
    try:
        load()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", known_keys())
def test_a_wrong_value_is_refused_with_its_key(key: str) -> None:
    for value in JUNK:
        error = refusal(lambda value=value: load_config(DEFAULT, [f"{key}={value}"]))
        assert error is None or key in error, (value, error)


def test_no_number_is_made_of_what_is_none() -> None:
    plain = [
        f"{section}.{name}"
        for section, model in Config.model_fields.items()
        for name, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
        if field.annotation in (int, float, bool)
    ]
    assert len(plain) > 60
    for key in plain:
        for value in ("abc", "[1, 2, 3]", "{a: 1}", "null", ".nan", "-.inf", ".inf"):
            assert refusal(lambda setting=f"{key}={value}": load_config(DEFAULT, [setting])), (key, value)


def test_a_damaged_configuration_file_is_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    file = tmp_path / "broken.yaml"
    errors = []
    for _ in range(1000):
        file.write_bytes(damage(DEFAULT.read_bytes(), rng))
        errors.append(refusal(lambda: load_config(file, [])))
    # The others changed a comment, a name or a number into another.
    assert sum(error is not None for error in errors) > 300


def survives_damage(file: Path, load: Callable[[], Any], same: Callable[[Any], bool], count: int = 500) -> None:
    """Whatever is done to a file, loading refuses it by name, or gives what was written."""
    rng, content = random.Random(1), file.read_bytes()
    for _ in range(count):
        broken = damage(content, rng)
        file.write_bytes(broken)
        error = refusal(load)
        assert str(file.parent) in error if error else same(load())
    file.write_bytes(content)
    assert same(load())


@pytest.mark.parametrize("name", ["policy.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    policy = make_policy()
    save_policy(tmp_path / "policy", policy)
    fingerprint = weights_sha256(cpu_weights(policy))
    survives_damage(
        tmp_path / "policy" / name,
        lambda: load_policy(tmp_path / "policy"),
        lambda found: weights_sha256(cpu_weights(found)) == fingerprint and found.transform == policy.transform,
    )


def test_damaged_demonstrations_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "demos.safetensors"
    save_trajectories(file, [make_trajectory(20), make_trajectory(25, seed=1)], {})
    written = [t.actions.tobytes() for t in load_trajectories(file)]
    survives_damage(
        file, lambda: load_trajectories(file), lambda found: [t.actions.tobytes() for t in found] == written
    )


def test_damaged_episodes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "episode.safetensors"
    trajectory = make_trajectory(20)
    save_episode(file, EpisodeRecord.of(trajectory, 20), trajectory)
    survives_damage(
        file, lambda: load_episode(file), lambda found: found[0].actions.tobytes() == trajectory.actions.tobytes()
    )
    survives_damage(
        file, lambda: load_trajectory(file), lambda found: found.frames.tobytes() == trajectory.frames.tobytes()
    )
