"""Two learners, in processes of their own, against one that does the work of both."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import make_policy, make_trajectory
from safetensors.torch import load_file, save_file
from test_pi0 import make_config, make_pi0
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import learner.update
from learner.sharding import shard
from learner.update import Step, update
from ript_ray.config import ObjectiveConfig, TrainConfig
from ript_ray.data.windows import gather
from ript_ray.policies.checkpoints import cpu_weights
from ript_ray.policies.policy import Policy
from ript_ray.types import Batch, Window

STEPS, ROWS, LEARNERS = 4, 3, 2
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "flow": ("flow", {}, "cfg"),
    "pi0": ("pi0", {"checkpoint_activations": True, "anchor": 0.1}, "cfg"),
    "pi0, parts": ("pi0", {"freeze": ("vision",), "lora_rank": 2, "lora_part": "expert"}, "imitation"),
    "pi05": ("pi05", {"ema": 0.5, "micro_batch": 2}, "nft"),
    "pi0, fp16": ("pi0", {"precision": "float16"}, "imitation"),
    "pi05, bf16": ("pi05", {"precision": "bfloat16", "checkpoint_activations": True}, "imitation"),
}
"""Policy, settings of `TrainConfig`, and objective."""


def new_policy(kind: str) -> Policy:
    return make_policy() if kind == "flow" else make_pi0(make_config(kind == "pi05"))


def batches(rank: int, micro_batch: int) -> list[Batch]:
    """The micro-batches of a learner's step."""
    pool = {i: make_trajectory(60, seed=10 * rank + i) for i in range(ROWS)}
    advantages = {i: 1.0 if i % 2 else -1.0 for i in pool}
    rows = [Window(i, 10 * i) for i in pool]
    return [gather(rows[i : i + micro_batch], pool, advantages) for i in range(0, ROWS, micro_batch)]


def settings_of(case: str) -> tuple[Policy, TrainConfig, ObjectiveConfig]:
    kind, changes, name = CASES[case]
    train = TrainConfig(**({"lr": 1e-3, "image_shift": 0, "clip_norm": 0.1} | changes))
    return new_policy(kind), train, ObjectiveConfig(name=name)


def learn(rank: int, folder: Path) -> None:
    """What a process of the two does: each case with the weights divided and with all of them."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=120), world_size=LEARNERS, rank=rank)
    mesh = init_device_mesh("cpu", (LEARNERS,))
    for case in CASES:
        for divided in (True, False):
            policy, train, objective = settings_of(case)
            steps = [Step([lambda b=b: b for b in batches(rank, train.micro_batch)], ROWS, LEARNERS * ROWS)] * STEPS
            generator = torch.Generator().manual_seed(rank)
            anchor = new_policy(CASES[case][0])  # what the policy is before the update
            acting, found = update(
                policy, steps, train, objective, generator, anchor=anchor, mesh=mesh if divided else None
            )
            result = cpu_weights(acting) | {name: torch.tensor(found[name]) for name in ("loss", "grad_norm")}
            save_file(result, folder / f"{case}-{divided}-{rank}.safetensors")
    policy = shard(new_policy("pi0"), mesh)
    parts = [p for p in policy.parameters() if isinstance(p, DTensor)]
    sizes = {"own": sum(p.to_local().numel() for p in parts), "all": sum(p.numel() for p in parts)}
    sizes["gathered separately"] = sum(isinstance(module, FSDPModule) for module in policy.modules())
    save_file({name: torch.tensor(size) for name, size in sizes.items()}, folder / f"sizes-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learners")
    mp.spawn(learn, (folder,), nprocs=LEARNERS)
    return folder


def draw_as_each_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one process draw for the windows of each learner by that learner's random numbers."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(LEARNERS)]
    draw = learner.update.Chances.draw

    def draw_all(terms: Any, rows: int, cameras: int) -> Any:
        assert rows == LEARNERS * ROWS
        parts = [draw(replace(terms, generator=generator), ROWS, cameras) for generator in generators]
        assert all(part.shifts is None for part in parts)
        return learner.update.Chances(
            None, *(torch.cat([getattr(part, name) for part in parts]) for name in ("noise", "time", "uniform"))
        )

    monkeypatch.setattr(learner.update.Chances, "draw", staticmethod(draw_all))


@pytest.mark.parametrize("case", CASES)
def test_two_learners_do_what_one_does(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, train, objective = settings_of(case)
    before = cpu_weights(policy)
    draw_as_each_learner(monkeypatch)
    loads = [lambda b=b: b for rank in range(LEARNERS) for b in batches(rank, train.micro_batch)]
    step = Step(loads, LEARNERS * ROWS, LEARNERS * ROWS)
    acting, found = update(policy, [step] * STEPS, train, objective, torch.Generator())
    alone = cpu_weights(acting)
    assert any(not torch.equal(before[name], alone[name]) for name in before)
    for divided in (True, False):
        results = [load_file(folder / f"{case}-{divided}-{rank}.safetensors") for rank in range(LEARNERS)]
        for result in results:
            for name in ("loss", "grad_norm"):  # AdamW itself would not notice gradients of another size
                assert result.pop(name).item() == pytest.approx(found[name], rel=1e-3), (name, divided)
        for name, tensor in alone.items():
            assert torch.equal(results[0][name], results[1][name]), name
            difference = (results[0][name] - tensor).abs()
            assert (difference <= 1e-4 + 1e-3 * tensor.abs()).all(), (name, divided, difference.max())


def test_each_learner_holds_its_part(folder: Path) -> None:
    for rank in range(LEARNERS):
        sizes = load_file(folder / f"sizes-{rank}.safetensors")
        assert sizes["own"] <= 0.55 * sizes["all"]
        assert sizes["gathered separately"] == 2 + 3 + 3 + 1  # layers of vision, language and expert, and the rest
