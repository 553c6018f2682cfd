"""The tool that names the stage at which two pipelines part finds every suspect that is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_policy, make_trajectory
from test_lerobot import complete
from test_pi0 import TOKENIZER, make_batch, make_config, make_pi0

import launch
from ript_ray.data.lerobot.write import write_dataset
from ript_ray.data.storage import save_trajectories
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import save_policy
from ript_ray.policies.compare import compare, load_stages, save_stages, stages_of
from ript_ray.policies.pi0.policy import Pi0Policy
from ript_ray.policies.pi0.prompt import PromptTokenizer
from ript_ray.policies.pi0.transform import Pi0Transform


class Mirrored(Pi0Transform):
    def encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        return super().encode_images(frames.flip(-2))


class OtherBase(Pi0Transform):
    """Adds a later state than the chunk's first."""

    def decode_actions(self, encoded: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return super().decode_actions(encoded, state + 0.02)


class TwiceNormalised(Pi0Transform):
    def encode_state(self, state: torch.Tensor) -> torch.Tensor:
        return super().encode_state(super().encode_state(state)[..., : len(self.state_mean)])


class TwoBeginnings(PromptTokenizer):
    def encode(self, text: str, begin: bool = True) -> list[int]:
        return super().encode("", begin) + super().encode(text, begin)


class RoughTime(Pi0Policy):
    def velocity(self, conditioned: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().velocity(conditioned, x, t.bfloat16().float())


def with_transform(kind: type[Pi0Transform]) -> Callable[[Pi0Policy], None]:
    def plant(policy: Pi0Policy) -> None:
        policy.transform = kind(**asdict(policy.transform))

    return plant


def scale(name: str) -> Callable[[Pi0Policy], None]:
    def plant(policy: Pi0Policy) -> None:
        policy.get_parameter(name).data *= 48**0.5

    return plant


def two_beginnings(policy: Pi0Policy) -> None:
    policy.tokenizer = TwoBeginnings(TOKENIZER.file, TOKENIZER.content)


def rough_time(policy: Pi0Policy) -> None:
    policy.__class__ = RoughTime


def another_weight(policy: Pi0Policy) -> None:
    policy.expert.layers[1].mlp.up_proj.weight.data[0] += 1


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (with_transform(Mirrored), "pixels"),
        (with_transform(TwiceNormalised), "state"),
        (with_transform(OtherBase), "action"),
        (two_beginnings, "tokens"),
        (scale("words.weight"), "words"),
        (scale("projector.weight"), "images"),
        (rough_time, "time embedding 1"),
        (another_weight, "velocity"),
    ],
)
def test_each_suspect_is_named(plant: Callable[[Pi0Policy], None], stage: str) -> None:
    batch, good, suspect = make_batch(), make_pi0(make_config()), make_pi0(make_config())
    plant(suspect)
    seen = batch.frames, batch.states, batch.instructions
    result = compare(stages_of(good, *seen), stages_of(suspect, *seen))
    assert result.first is not None
    assert result.first.stage == stage
    assert f"the first stage that differs is '{stage}'" in result.describe()
    same = compare(stages_of(good, *seen), stages_of(make_pi0(make_config()), *seen))
    assert same.first is None


def test_other_noise_is_named_and_a_moved_base_is_told_in_centimetres() -> None:
    batch, policy, moved = make_batch(), make_pi0(make_config()), make_pi0(make_config())
    seen = batch.frames, batch.states, batch.instructions
    result = compare(stages_of(policy, *seen), stages_of(policy, *seen, noise=torch.randn(3, 50, 32)))
    assert result.first is not None
    assert result.first.stage == "noise"
    with_transform(OtherBase)(moved)
    far = {d.stage: d for d in compare(stages_of(policy, *seen), stages_of(moved, *seen)).differences}
    # 0.02 of an action of 1, which is 5 cm.
    assert far["position cm"].mean == pytest.approx(0.1, rel=1e-3)


def test_the_command_compares_folders_and_files_of_another_system(tmp_path: Path) -> None:
    policy, other = make_pi0(make_config()), make_pi0(make_config())
    another_weight(other)
    save_policy(tmp_path / "a", policy)
    save_policy(tmp_path / "b", other)
    assert launch.main(["compare", str(tmp_path / "a"), str(tmp_path / "theirs.safetensors")]) == 0
    assert list(load_stages(tmp_path / "theirs.safetensors"))[:3] == ["frames", "pixels", "images"]
    result = tmp_path / "result.json"
    arguments = ["compare", str(tmp_path / "b"), str(tmp_path / "theirs.safetensors"), "--json", str(result)]
    assert launch.main(arguments) == 0
    assert json.loads(result.read_text())["first"] == "velocity"
    quick = ["compare", str(tmp_path / "a"), str(tmp_path / "quick.safetensors"), "policy.denoise_steps=4"]
    assert launch.main(quick) == 0
    for file, steps in (("theirs", 10), ("quick", 4)):
        stages = load_stages(tmp_path / f"{file}.safetensors")
        assert sum(name.startswith("velocity") for name in stages) == steps
    (tmp_path / "bad.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"bad\.safetensors cannot be read"):
        load_stages(tmp_path / "bad.safetensors")


def test_demonstrations_of_another_robot_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(tmp_path / "a", make_policy())
    demo = make_trajectory(20)
    save_trajectories(tmp_path / "demos.safetensors", [replace(demo, states=demo.states[:, :6])], {})
    here = str(tmp_path / "a")
    assert launch.main(["compare", here, here, f"data.demos={tmp_path / 'demos.safetensors'}"]) == 2
    assert "its states have 6 dimensions, those of the policies 8" in capsys.readouterr().err


def test_one_other_token_is_named_and_what_only_one_has_is_told() -> None:
    ours = {"tokens": np.array([[2, 235274, 108]]), "words": np.ones((1, 3, 4))}
    for kind in (np.int64, np.float32):
        other = compare(ours, {"tokens": np.array([[2, 235275, 108]], dtype=kind), "words": np.ones((1, 3, 4))})
        assert other.first is not None
        assert other.first.stage == "tokens"
    theirs = {"action": np.ones(3), "words": np.ones((1, 3, 4)) + 1, "tokens": ours["tokens"]}  # in no order
    result = compare(theirs, ours | {"state": np.ones(2)}, order=["tokens", "words", "state"])
    assert [d.stage for d in result.differences] == ["tokens", "words"]
    assert "only one of them has 'action', 'state'" in result.describe()
    with pytest.raises(UserError, match=r"no stage is in both: one has action, .*the other state"):
        compare(theirs, {"state": np.ones(2)})


def test_what_is_no_number_differs() -> None:
    good, bad = {"action": np.array([0.0, 1.0])}, {"action": np.array([0.0, np.nan])}
    for result in (compare(good, bad), compare(bad, good)):
        assert result.first is not None
        assert "the first stage that differs is 'action'" in result.describe()


def test_frames_of_a_dataset_are_scaled_to_what_the_policies_take(tmp_path: Path) -> None:
    write_dataset(tmp_path / "demos", [complete(4, 0, size=(24, 40))])
    save_policy(tmp_path / "small", make_policy(image_size=32))
    save_policy(tmp_path / "pi0", make_pi0(make_config()))
    for name, size in (("small", (32, 32)), ("pi0", (24, 40))):
        stages = tmp_path / f"{name}.safetensors"
        command = ["compare", str(tmp_path / name), str(stages), f"data.demos={tmp_path / 'demos'}"]
        assert launch.main(command) == 0
        assert load_stages(stages)["frames"].shape == (4, 2, *size, 3)


def test_the_small_policy_has_stages_too(tmp_path: Path) -> None:
    policy, batch = make_policy(), make_batch()
    save_stages(tmp_path / "s.safetensors", stages_of(policy, batch.frames, batch.states, batch.instructions))
    stages = load_stages(tmp_path / "s.safetensors")
    assert list(stages)[:6] == ["frames", "pixels", "tokens", "state", "prefix", "noise"]
    assert list(stages)[-3:] == ["raw action", "action", "position cm"]
