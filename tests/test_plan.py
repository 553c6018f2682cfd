"""The resource plan: what it says an update takes against what one takes, and what fits by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_policy

from cluster.plan import fit_actors, make_plan, policy_without_weights
from launch import main
from ript_ray.algos.objectives import Draw, find_objective
from ript_ray.config import Config, ObjectiveConfig, load_config
from ript_ray.errors import UserError
from ript_ray.footprint import check_gpu_share, update_footprint
from ript_ray.policies.policy import Policy
from ript_ray.types import Batch

POINT = ["env.id=gymnasium/ript_ray/PointReach-v0", "env.image_size=32"]


def a_batch(rows: int, size: int) -> Batch:
    return Batch(
        frames=torch.zeros(rows, 2, size, size, 3, dtype=torch.uint8),
        states=torch.zeros(rows, 8),
        actions=torch.zeros(rows, 50, 7),
        valid=torch.ones(rows, 50, dtype=torch.bool),
        advantages=torch.ones(rows),
        weights=torch.ones(rows),
        versions=torch.zeros(rows, dtype=torch.int64),
        instructions=["pick up the bowl"] * rows,
    )


def live_bytes_after_forward(policy: Policy, rows: int, size: int, precision: str, anchor: float) -> float:
    """What PyTorch's profiler saw allocated and not freed again, while the loss and its graph are there."""
    batch = a_batch(rows, size)
    noise, time = torch.randn(rows, policy.horizon, policy.action_dim), torch.full((rows,), 0.5)
    start = copy.deepcopy(policy).requires_grad_(False)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        draw = Draw(policy, batch, noise, time, time, None)
        loss = find_objective("cfg")(draw, ObjectiveConfig()).per_sample.sum()
        if anchor:
            loss = loss + anchor * draw.change_since(start).sum()
    live = sum(event.self_cpu_memory_usage for event in profiled.events())
    loss.backward()
    return live


@pytest.mark.parametrize(
    ("kind", "precision", "anchor"),
    [("flow", "float32", 0.0), ("flow", "float32", 0.1), ("pi0_tiny", "bfloat16", 0.0), ("pi0_tiny", "bfloat16", 0.1)],
)
def test_what_an_update_takes_is_what_one_takes(kind: str, precision: str, anchor: float) -> None:
    from ript_ray.config import ConvertConfig
    from ript_ray.policies.pi0.convert import random_policy

    policy: Policy = make_policy() if kind == "flow" else random_policy(kind, ConvertConfig())
    policy.train()
    config = Config.model_validate(
        {
            "train": {"micro_batch": 32, "precision": precision, "anchor": anchor},
            "env": {"image_size": 32},
            "scaling": {"learners": 1},
        }
    )
    told = update_footprint(policy, config, cameras=2, state_dim=8, action_dim=7)
    live = live_bytes_after_forward(policy, 32, 32, precision, anchor)
    # Autocast keeps its copies of the weights, too; the graph holds some kilobytes of its own.
    assert told["activations of 32 windows"] == pytest.approx(live, rel=0.15)
    parameters = [p for p in policy.parameters() if p.grad is not None]
    optimiser = torch.optim.AdamW(parameters)
    optimiser.step()
    moments = [v for state in optimiser.state.values() for v in state.values() if v.dim()]
    assert told["gradients"] >= sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert told["AdamW's two moments"] == pytest.approx(sum(m.nbytes for m in moments), rel=0.02)
    assert ("weights in bfloat16" in told) == (precision == "bfloat16")


@pytest.mark.parametrize(("kind", "condition"), [("pi05_tiny", "embedding"), ("pi0_tiny", "text")])
def test_what_an_update_takes_where_prompts_depend_on_numbers(kind: str, condition: Any) -> None:
    from ript_ray.config import ConvertConfig
    from ript_ray.policies.pi0.convert import random_policy

    policy = random_policy(kind, ConvertConfig(condition=condition)).train()
    settings = {"train": {"micro_batch": 4}, "env": {"image_size": 32}, "scaling": {"learners": 1}}
    told = update_footprint(policy, Config.model_validate(settings), cameras=2, state_dim=8, action_dim=7)
    live = live_bytes_after_forward(policy, 4, 32, "float32", 0.0)
    assert live < told["activations of 4 windows"] < 3 * live  # as if each prompt were as long as may be


def test_an_actors_share_of_a_gpu_holds_its_policy() -> None:
    policy = policy_without_weights("random:pi0")

    def check(share: float, gpu_gb: float, **changes: Any) -> None:
        settings = {"policy": {"precision": changes.pop("precision", "bfloat16")}, "scaling": {"actor_gpus": share}}
        check_gpu_share(policy, Config.model_validate(settings | changes), 1e9 * gpu_gb)

    check(0.15, 80)
    with pytest.raises(UserError, match=r"=0\.15 of a GPU of 24\.0 GB: an actor takes 7\.5 GB .*actor_gpus=0\.32"):
        check(0.15, 24)
    check(0.32, 24)
    check(0.2, 24, precision="int8")
    check(0.15, 24, plan={"actor_gpu_gb": 3.5})
    with pytest.raises(UserError, match="actor_gpus=4"):
        check(4, 6)


def test_what_makes_an_update_smaller_and_larger() -> None:
    policy = policy_without_weights("random:pi0")
    assert all(p.is_meta for p in policy.parameters())

    def told(scaling: dict[str, Any] | None = None, **train: Any) -> dict[str, float]:
        config = Config.model_validate({"train": {"micro_batch": 8, **train}, "scaling": scaling or {}})
        return update_footprint(policy, config, cameras=2, state_dim=8, action_dim=7)

    whole = told()
    assert whole["weights"] == pytest.approx(4 * 3.238e9, rel=0.001)  # of the published π0, its 263 M dead ones aside
    kept = "activations of 8 windows"
    assert told(checkpoint_activations=True)[kept] < whole[kept] / 10
    small = told(lora_rank=16, lora_part="expert")
    assert small["gradients"] < whole["gradients"] / 50
    assert told(ema=0.99)["copies to compare with or to average"] == whole["gradients"]
    eight = told(shard=True, scaling={"learners": 8})
    assert eight["AdamW's two moments"] == whole["AdamW's two moments"] / 8
    # Embedded words, 2.1 GB, belong to no block and take their buffer besides; the largest blocks, two at a time, are
    # those of the language model: 110 million numbers each.
    assert eight["weights gathered"] == pytest.approx(2 * 2.1e9 + 2 * 4 * 110e6, rel=0.05)
    assert sum(eight.values()) - eight[kept] < (sum(whole.values()) - whole[kept]) / 3


def test_a_job_is_fitted_to_a_machine_that_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["plan.cpus=32", "plan.memory_gb=200", "plan.gpus=2", "plan.gpu_gb=80"]
    sizes = ["plan.actor_gb=4", "plan.actor_gpu_gb=7", "plan.learner_gpu_gb=50", "policy.checkpoint=random:pi0"]
    shares = ["scaling.actor_gpus=0.1", "scaling.learner_gpus=1", "scaling.learners=1", "scaling.actor_cpus=1"]
    file = tmp_path / "plan.json"
    assert main(["plan", *POINT, *machine, *sizes, *shares, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    # 76 GB of each GPU: 26 beside the learner hold 3 actors, the other GPU 10. CPUs: 31.
    # Memory: (200 · 0.65 − 2 − 13) / 4, since the learner keeps the starting policy, 3.2 billion numbers, on its node.
    assert (result["by_gpus"], result["by_memory"], result["by_cpus"]) == (13, 28, 31)
    assert result["actors"] == 13
    assert result["limited_by"] == "GPU memory"
    assert result["settings"] == {"scaling.actors": 13, "scaling.learner_gpus": 0.6579, "scaling.actor_gpus": 0.0922}
    assert "13 rollout actors fit, by GPU memory" in capsys.readouterr().out

    # The shares that are set, though, give the learner a GPU of its own.
    assert fit_actors(load_config(None, [*POINT, *machine, *sizes, *shares, "scaling.actors=0"])).scaling.actors == 10

    large = [*machine, "plan.actor_gb=4", "plan.actor_gpu_gb=77", "plan.learner_gpu_gb=50"]
    assert main(["plan", *POINT, *large, *shares, "policy.checkpoint=random:pi0"]) == 2
    assert "0 fit, by GPU memory" in capsys.readouterr().err
    assert main(["plan", *POINT, *machine, *sizes, *shares, "scaling.actors=14"]) == 2
    assert "scaling.actors=14: 13 fit, by GPU memory" in capsys.readouterr().err
    assert main(["plan", *POINT, *machine, *sizes, *shares, "plan.learner_gpu_gb=77"]) == 2
    assert "scaling.learners=1: each needs 77.0 GB of a GPU" in capsys.readouterr().err


def test_a_plan_for_gpus_that_nobody_described() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one to ask")
    with pytest.raises(UserError, match=r"plan\.gpus=1: this machine has none to ask"):
        make_plan(Config.model_validate({"plan": {"gpus": 1}}))
