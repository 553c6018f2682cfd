"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Several processes share the cores: threads that wait for one another in a loop take them from those they wait for.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from ript_ray.config import Config, ScalingConfig
from ript_ray.policies.flow import FlowConfig, FlowPolicy
from ript_ray.policies.transform import Transform
from ript_ray.types import Context, Trajectory

# The same examples each time: what passes here passes elsewhere. HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several test processes one of them runs everything that starts Ray: a machine has room for one session."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


INSTRUCTION = "pick up the alphabet soup and place it in the basket"


def make_trajectory(length: int = 60, success: bool = True, version: int = 0, seed: int = 0) -> Trajectory:
    """A random trajectory of small frames, looked at every tenth step."""
    rng = np.random.default_rng(seed)
    looks = np.arange(0, length, 10, dtype=np.int32)
    return Trajectory(
        context=Context("libero_object/0", seed % 25, seed),
        policy_version=version,
        success=success,
        actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        states=rng.normal(size=(length, 8)).astype(np.float32),
        frames=rng.integers(0, 256, (len(looks), 2, 32, 32, 3), dtype=np.uint8),
        frame_steps=looks,
        tickets={"qpos": rng.normal(size=(length, 9)), "site_alpha": np.zeros((length, 3), dtype=np.float32)},
        scene={"body_pose": rng.normal(size=(4, 7))},
        state_hashes=np.arange(length + 1, dtype=np.uint64),
        instruction=INSTRUCTION,
        seconds={"physics": 0.1, "render": 0.1, "inference": 0.1},
    )


def make_policy(seed: int = 0, image_size: int = 32) -> FlowPolicy:
    """A small policy with random weights and uneven statistics."""
    torch.manual_seed(seed)
    transform = Transform(
        state_mean=tuple(float(x) for x in torch.randn(8)),
        state_std=tuple(float(x) for x in torch.rand(8) + 0.5),
        action_mean=tuple(float(x) for x in torch.randn(7)),
        action_std=tuple(float(x) for x in torch.rand(7) + 0.5),
        relative=(True, False, True, False, False, False, False),
        image_size=image_size,
    )
    policy = FlowPolicy(
        FlowConfig(channels=8, context=32, width=32, depth=1),
        transform,
        torch.randn(50, 7) * 0.1,
        torch.rand(50, 7) + 0.5,
    )
    # The last layer starts at zero, which would hide mistakes before it.
    torch.nn.init.normal_(policy.project_out.weight, std=0.1)
    return policy.eval()


@pytest.fixture(scope="session")
def point_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a policy for `PointReach` that has seen some demonstrations and succeeds now and then."""
    from learner.sft import train_on_demonstrations
    from ript_ray.data.demonstrator import demonstrate
    from ript_ray.data.storage import save_trajectories
    from ript_ray.envs import make
    from ript_ray.policies.checkpoints import save_policy

    folder = tmp_path_factory.mktemp("point_start")
    config = Config.model_validate(
        {
            "env": {"id": "gymnasium/ript_ray/PointReach-v0", "image_size": 32, "max_steps": 30},
            "data": {"demos": str(folder / "demos.safetensors"), "tail": "pad"},
            "demos": {"noise": 0.3, "frame_every": 1},
            "sft": {"steps": 120},
            "train": {"image_shift": 0},
        }
    )
    world = make(config.env.id, 32, 30)
    demos = [demonstrate(world, Context(config.env.id, i, i), config.demos) for i in range(24)]
    save_trajectories(Path(config.data.demos), demos, {})
    policy, _ = train_on_demonstrations(config, lambda step, loss: None)
    save_policy(folder / "policy", policy)
    return folder / "policy"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real Ray session with two CPUs."""
    from cluster.session import ResourcePlan, ray_session

    scaling = ScalingConfig(actors=2)
    with ray_session(scaling, ResourcePlan.of(scaling)):
        yield


@pytest.fixture
def tiny_config() -> Config:
    """Settings for tests that are about mechanics."""
    return Config.model_validate(
        {
            "sampling": {"group_size": 4, "groups": 2, "max_groups": 4},
            "train": {"batch_size": 8, "micro_batch": 8, "epochs": 1, "updates": 2, "image_shift": 0},
            "scaling": {"actors": 1, "learners": 1, "wait_timeout_s": 120},
            "env": {"image_size": 32},
        }
    )
