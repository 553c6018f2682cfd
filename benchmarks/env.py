"""This project's environment against the stock one: speed, memory, and whether anything differs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import mujoco
import numpy as np

from benchmarks.stock import StockEnv, Trace, differences, play_ours, play_stock, random_actions, timed
from ript_ray.config import Config
from ript_ray.envs import find_task, make

STEPS = 110
CHUNK = 10
SEED = 7
INIT_STATE = 1
COMPARED_STEPS = 60
ROUNDS = 3
EPISODES = 2
"""Of each way; of single ones the faster counts."""


def measure(config: Config) -> dict[str, Any]:
    """All figures of the environment ``env.id``, each beside the stock way's, measured in this run.

    An episode is reset, settle steps and 110 random steps; ours looks with both cameras every 10 (or every 2) steps,
    the stock loop renders every step and compiles the model at each reset, as every published wrapper does.
    """
    env_id, size = config.env.id, config.env.image_size
    find_task(env_id)  # only LIBERO has a stock way to compare with
    actions = random_actions(STEPS, SEED)
    result: dict[str, Any] = {"benchmark": "env", "env": env_id}
    result |= _construction(env_id, size)
    env: Any = make(env_id, size, max_steps=STEPS + 1)
    _episode(env, actions, CHUNK)  # the first frame loads textures, which the stock environment does when made
    rendered = env.frames_rendered
    seconds = {CHUNK: min(timed(partial(_episode, env, actions, CHUNK)) for _ in range(EPISODES))}
    result["frames_rendered_share"] = (env.frames_rendered - rendered) / (EPISODES * len(env.cameras) * (STEPS + 1))
    seconds[2] = timed(partial(_episode, env, actions, 2))
    result |= _control_step(env)
    resets = [timed(partial(env.begin_episode, i, i)) for i in range(7)]
    settled = [timed(partial(env.reset, seed=i, options={"init_state": i})) for i in range(5)]
    result["reset_seconds"] = statistics.median(resets)
    result["reset_and_settle_seconds"] = statistics.median(settled)
    frames_at = set(range(0, COMPARED_STEPS + 1, CHUNK))
    ours = play_ours(env, SEED, INIT_STATE, actions[:COMPARED_STEPS], frames_at, at_once=False)
    env.close()
    result |= _stock_figures(env_id, size, actions, seconds)
    result |= _equality(ours, play_stock(env_id, size, SEED, INIT_STATE, actions[:COMPARED_STEPS], frames_at))
    gc.collect()
    return result | _many(env_id, size)


def _construction(env_id: str, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("RIPT_RAY_CACHE")
        os.environ["RIPT_RAY_CACHE"] = folder
        try:
            make(env_id, size).close()  # imports and compiles code, once for all
            for entry in os.scandir(os.path.join(folder, "models")):
                os.unlink(entry.path)
            made: list[Any] = []
            first, *cached = (timed(lambda: made.append(make(env_id, size))) for _ in range(4))
            for env in made:
                env.close()
        finally:
            os.environ.pop("RIPT_RAY_CACHE")
            if before is not None:
                os.environ["RIPT_RAY_CACHE"] = before
    return {"construction_seconds": min(cached), "first_construction_seconds": first}


def _episode(env: Any, actions: np.ndarray, look_every: int) -> None:
    observation, _ = env.reset(seed=SEED, options={"init_state": INIT_STATE})
    for i, action in enumerate(actions):
        if i % look_every == 0:
            assert observation["agentview"].shape == observation["wrist"].shape
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            return


def _control_step(env: Any) -> dict[str, Any]:
    """A control step against 25 `mj_step` of the same model from the same state, in turns.

    Beside it, what the same bits demand of MuJoCo alone: robosuite solves the constraints of each substep three times,
    and each solution starts from the one before.
    """
    env.reset(seed=SEED, options={"init_state": INIT_STATE})
    env.max_steps = 10**9
    model, data = env.simulation.sim.model._model, env.simulation.sim.data._data
    bare_data = mujoco.MjData(model)
    state = np.zeros(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    ours, bare, demanded = [], [], []

    def substep() -> None:
        mujoco.mj_forwardSkip(model, bare_data, int(mujoco.mjtStage.mjSTAGE_NONE), 1)
        mujoco.mj_fwdConstraint(model, bare_data)
        mujoco.mj_fwdActuation(model, bare_data)
        mujoco.mj_fwdAcceleration(model, bare_data)
        mujoco.mj_fwdConstraint(model, bare_data)
        mujoco.mj_Euler(model, bare_data)

    for action in random_actions(STEPS, SEED):
        mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_setState(model, bare_data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        bare.append(timed(partial(_repeat, partial(mujoco.mj_step, model, bare_data))))
        mujoco.mj_setState(model, bare_data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        demanded.append(timed(partial(_repeat, substep)))
        ours.append(timed(partial(env.step, action)))
        env._over = False
    return {
        "control_step_over_physics": statistics.median(o / b for o, b in zip(ours, bare, strict=True)),
        "demanded_calls_over_physics": statistics.median(d / b for d, b in zip(demanded, bare, strict=True)),
        "control_step_ms": 1e3 * statistics.median(ours),
        "physics_ms": 1e3 * statistics.median(bare),
    }


def _repeat(substep: Callable[[], None]) -> None:
    for _ in range(25):
        substep()


def _stock_figures(env_id: str, size: int, actions: np.ndarray, seconds: dict[int, float]) -> dict[str, Any]:
    StockEnv(env_id, size).close()  # as ours: what comes once is left out, and the fastest of three counts
    made: list[StockEnv] = []
    constructed = min(timed(lambda: made.append(StockEnv(env_id, size))) for _ in range(3))
    stock, *others = made
    for other in others:
        other.close()
    state = find_task(env_id).init_states()[INIT_STATE]
    reset = statistics.median(timed(lambda: (stock.env.seed(SEED), stock.env.reset())) for _ in range(3))
    restore = timed(lambda: stock.env.set_init_state(state))

    def episode() -> None:
        stock.start(SEED, INIT_STATE)
        for action in actions:
            stock.step(action)

    eager = min(timed(episode) for _ in range(EPISODES))
    wanted = False
    stock.render_only(lambda: wanted)
    blind = [timed(partial(stock.step, action)) for action in actions[:30]]
    stock.close()
    return {
        "episode_speedup": eager / seconds[CHUNK],
        "episode_speedup_looking_every_2": eager / seconds[2],
        "episode_seconds": seconds[CHUNK],
        "stock_episode_seconds": eager,
        "stock_construction_seconds": constructed,
        "stock_reset_seconds": reset + restore,
        "stock_control_step_ms": 1e3 * statistics.median(blind),
    }


def _equality(ours: Trace, stock: Trace) -> dict[str, Any]:
    found = list(differences(ours, stock))
    cameras = tuple(stock.frames[0])
    return {
        "states_identical": not [line for line in found if not line.startswith(cameras)],
        "frames_identical": not [line for line in found if line.startswith(cameras)],
        "differences": found,
    }


def _many(env_id: str, size: int) -> dict[str, Any]:
    """Episodes per second of 1, 2, … processes, up to the number of cores, relative to one; and their memory."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, *(2**k for k in range(1, cores.bit_length()) if 2**k <= cores), cores})
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.Queue()
    arguments = (env_id, size, counts, barrier, results)
    children = [context.Process(target=_worker, args=(rank, *arguments)) for rank in range(cores)]
    for child in children:
        child.start()
    answers = dict(results.get(timeout=900) for _ in children)
    for child in children:
        child.join(timeout=60)
    rates = {  # by number of processes, of each round
        count: np.sum([answers[rank][0][count] for rank in range(count)], axis=0) for count in counts
    }
    return {
        "scaling": {str(count): float(np.median(rates[count] / rates[1])) for count in counts},
        # What the last of several processes has for itself; with one core there is nobody to share with.
        "memory_mb": min(memory for _, memory in answers.values()),
    }


def _worker(rank: int, env_id: str, size: int, counts: list[int], barrier: Any, results: Any) -> None:
    """Play in turns with the others, in rounds, since machines get faster and slower: first one, then two, …"""
    env = make(env_id, size, max_steps=STEPS + 1)
    actions = random_actions(STEPS, SEED)
    _episode(env, actions, CHUNK)
    memory = _private_mb()
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(ROUNDS):
        for count in counts:
            barrier.wait(timeout=300)
            if rank < count:
                seconds = sum(timed(partial(_episode, env, actions, CHUNK)) for _ in range(EPISODES))
                rates[count].append(EPISODES / seconds)
    results.put((rank, (rates, memory)))
    barrier.wait(timeout=300)
    env.close()


def _private_mb() -> float:
    """Memory that this process shares with no other."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(float(line.split()[1]) for line in file if line.startswith("Private_")) / 1024
