"""What a job needs is compared with what the nodes of a cluster have before anything starts."""

from __future__ import annotations

import pytest

from cluster.session import Node, ResourcePlan
from ript_ray.config import ScalingConfig
from ript_ray.errors import UserError

NODES = [
    Node(cpus=0, gpus=0, labels={}),
    Node(cpus=3, gpus=1, labels={"role": "rollout", "zone": "a"}),
    Node(cpus=3, gpus=0, labels={"role": "learner"}),
]


def fits(**settings: object) -> bool:
    try:
        ResourcePlan.of(ScalingConfig.model_validate(settings)).check(NODES)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"actors": 3, "actor_cpus": 1, "learners": 1, "learner_cpus": 1}, True),
        ({"actors": 7, "actor_cpus": 1, "learners": 0}, False),  # more than all have
        ({"actors": 3, "actor_cpus": 2, "learners": 0}, False),  # 6 of 6 CPUs, but one on each node
        ({"actors": 3, "actor_cpus": 1, "actor_labels": {"role": "rollout"}}, True),
        ({"actors": 4, "actor_cpus": 1, "actor_labels": {"role": "rollout"}}, False),
        ({"actors": 1, "actor_labels": {"role": "rolout"}}, False),
        ({"actors": 1, "actor_labels": {"role": "rollout", "zone": "b"}}, False),
        ({"actors": 3, "actor_cpus": 1, "actor_labels": {"role": "in(learner, rollout)"}}, True),
        ({"actors": 3, "actor_cpus": 1, "actor_labels": {"role": "!learner"}}, True),
        ({"actors": 4, "actor_cpus": 1, "actor_labels": {"role": "!learner"}}, False),
        ({"actors": 4, "actor_gpus": 0.25}, True),
        ({"actors": 5, "actor_gpus": 0.25}, False),
        ({"actors": 4, "actor_cpus": 1, "learners": 1, "learner_cpus": 2}, False),  # one CPU is left on each
        ({"actors": 3, "actor_cpus": 1, "learners": 1, "learner_cpus": 2}, True),
        ({"actors": 5, "actor_cpus": 0.5, "learners": 1, "learner_cpus": 2}, True),
        ({"actors": 1, "actor_cpus": 3, "learners": 1, "learner_cpus": 3}, True),
        ({"actors": 2, "actor_cpus": 1, "learners": 1, "learner_cpus": 3}, False),  # one on each
        ({"actors": 1, "actor_cpus": 1, "learners": 1, "learner_gpus": 1, "learner_cpus": 3}, True),  # on the other
        ({"learners": 2, "learner_cpus": 2, "learner_labels": {"role": "learner"}}, False),
        ({"learners": 0, "learner_cpus": 2, "learner_labels": {"role": "nobody"}}, True),
    ],
)
def test_a_job_starts_only_where_all_its_workers_find_a_place(settings: dict[str, object], expected: bool) -> None:
    assert fits(**settings) is expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"actors": 2, "actor_gpus": 0.6, "learners": 0}, True),
        ({"actors": 3, "actor_gpus": 0.6, "learners": 0}, False),  # 1.8 of 2 GPUs, but one on each
        ({"actors": 6, "actor_gpus": 0.3, "learners": 0}, True),
        ({"actors": 7, "actor_gpus": 0.25, "learners": 1, "learner_gpus": 0.25}, True),
        ({"actors": 2, "actor_gpus": 0.6, "learners": 1, "learner_gpus": 0.5}, False),
        ({"actors": 3, "actor_gpus": 0.3, "learners": 1, "learner_gpus": 1}, True),  # all on one
        ({"actors": 4, "actor_gpus": 0.3, "learners": 1, "learner_gpus": 1}, False),
        ({"actors": 4, "actor_gpus": 0.3, "learners": 1, "learner_gpus": 0.7}, True),
        ({"actors": 1, "actor_gpus": 2, "learners": 0}, True),
        ({"actors": 1, "actor_gpus": 2, "learners": 1, "learner_gpus": 0.1}, False),
    ],
)
def test_a_share_is_of_one_gpu(settings: dict[str, object], expected: bool) -> None:
    plan = ResourcePlan.of(ScalingConfig.model_validate({"actor_cpus": 0.1, "learner_cpus": 0.1} | settings))
    machine = [Node(cpus=16, gpus=2, labels={})]
    if expected:
        plan.check(machine)
    else:
        with pytest.raises(UserError):
            plan.check(machine)


def test_the_message_says_who_does_not_fit_where_and_what_to_change() -> None:
    scaling = ScalingConfig(learner_labels={"role": "lerner"})
    with pytest.raises(UserError, match=r"scaling\.learners=1: 0 fit on the 3 nodes.*role.*lerner.*ray list nodes"):
        ResourcePlan.of(scaling).check(NODES)
