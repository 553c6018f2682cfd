"""Commands on files, without Ray: each takes paths and the configuration, says what it did and returns its result."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ript_ray.config import Config, resolve
from ript_ray.errors import UserError


def replay(file: str, config: Config) -> dict[str, Any]:
    """Play a recorded episode again, compare the simulator's state at every step, and write a video beside it."""
    from ript_ray.replay import replay_episode
    from ript_ray.reporting import write_video

    result, frames = replay_episode(Path(file))
    video = Path(file).with_suffix(".mp4")
    write_video(video, frames, 10.0)
    print(result.describe())
    print(f"  video in {video}")
    return result.to_json() | {"video": str(video)}


def dissect(file: str, config: Config, asked: Collection[str] = ()) -> dict[str, Any]:
    """What a policy saw, thought and did in a recorded episode, look by look, in a folder beside it.

    It is the policy that played it, acting as it did then, but for the settings that are asked for by key.
    """
    import torch

    from ript_ray.data.storage import load_episode
    from ript_ray.dissect import dissect, write_dissection
    from ript_ray.policies.acting import Acting
    from ript_ray.policies.checkpoints import load_policy
    from ript_ray.runs import policy_that_played

    torch.set_num_threads(1)  # as rollout actors: more threads add in another order, and the last bits differ
    record, _ = load_episode(Path(file))
    known: dict[str, Any] = {key: value for key, value in record.acting.items() if f"policy.{key}" not in asked}
    found = None if "policy.checkpoint" in asked else policy_that_played(Path(file), record.policy_version)
    policy = found or resolve(config.policy.checkpoint)
    acting = replace(Acting.of(config.policy, config.policy.guidance, exploring=True), **known)
    result = dissect(Path(file), load_policy(policy), acting)
    folder = Path(file).with_suffix(".looks")
    write_dissection(folder, result)
    print(f"{result.describe()}\n  played by {policy}; images and numbers in {folder}")
    about = {"success": result.trajectory.success, "first_difference": result.first_difference}
    return about | {"looks": len(result.looks), "folder": str(folder)}


def convert(source: str, target: str, config: Config) -> dict[str, Any]:
    """A checkpoint in another layout."""
    from ript_ray.policies.pi0.convert import convert

    result = convert(source, Path(target), config.convert)
    print(f"{target}: {result['model']}, {result['parameters']:,} parameters, {result['horizon']} actions")
    return result


def compare(first: str, second: str, config: Config) -> dict[str, Any]:
    """Two policies, or files of what another system computed, on the same observations.

    When the second is a file that does not exist, the first one's stages are written to it.
    """
    from ript_ray.policies import compare as stages
    from ript_ray.policies.checkpoints import load_policy, load_shape

    folders = [Path(path) for path in (first, second) if Path(path).is_dir()]
    transforms = [load_shape(folder).transform for folder in folders]
    frame_size = next((t.frame_size for t in transforms if t.frame_size is not None), None)
    state_dims = [len(t.state_mean) for t in transforms]
    if len(set(state_dims)) > 1:
        raise UserError(f"compare {first} {second}: one takes states of {state_dims[0]}, the other of {state_dims[1]}")
    state_dim = state_dims[0] if state_dims else 8  # of two files nothing is asked
    seen = stages.observations(config.data, frame_size, config.env.image_size, state_dim)
    if transforms and seen[1].shape[1] != state_dim:
        raise UserError(
            f"data.demos={config.data.demos!r}: its states have {seen[1].shape[1]} dimensions, those of the policies "
            f"{state_dim}; expected demonstrations of their robot"
        )

    def side(path: Path) -> stages.Stages:
        if path.is_file():
            return stages.load_stages(path)
        acting = config.policy
        return stages.stages_of(load_policy(path), *seen, guidance=acting.guidance, steps=acting.denoise_steps)

    if second.endswith(".safetensors") and not Path(second).exists():
        stages.save_stages(Path(second), side(Path(first)))
        print(f"wrote the stages of {first} to {second}")
        return {"stages": second}
    left, right = side(Path(first)), side(Path(second))
    order = right if Path(first).is_file() else left  # a file of somebody else need not be in order
    result = stages.compare(left, right, order=order)
    print(result.describe())
    return result.to_json()


def stats(source: str, target: str, config: Config) -> dict[str, Any]:
    """Normalisation statistics of demonstrations, as openpi keeps them."""
    from ript_ray.data.demonstrations import read_demonstrations
    from ript_ray.data.statistics import norm_stats
    from ript_ray.reporting import write_json

    chosen = config.convert
    result = norm_stats(
        lambda: read_demonstrations(Path(source), config.env.ids[0], config.data, frames=False),
        chosen.relative,
        chosen.horizon or 50,
    )
    write_json(Path(target), {"norm_stats": result})
    sizes = {name: len(group["mean"]) for name, group in result.items()}
    print(f"wrote {target}: {sizes['state']} state and {sizes['actions']} action dimensions")
    return result


def export(run_dir: str, target: str, config: Config) -> dict[str, Any]:
    """The episodes of a run as a LeRobot dataset."""
    from ript_ray.data.demonstrations import export_run

    episodes = export_run(Path(run_dir), Path(target), config.data.dataset_version)
    print(f"wrote {episodes} episodes to {target}")
    return {"episodes": episodes, "version": config.data.dataset_version}


def info(run_dir: str, config: Config) -> dict[str, Any]:
    """A run's story, finished or not."""
    from ript_ray.runs import Run, describe_run

    run = Run.load(Path(run_dir))
    print(describe_run(run))
    return {"state": run.state(), "settings": run.settings, "rows": run.rows, "faults": run.faults} | {
        "summary": run.summary
    }


def compare_runs(first: str, second: str, config: Config) -> dict[str, Any]:
    """What differs between two runs: settings, versions, curves, and results with a test."""
    from ript_ray import runs

    sides = runs.Run.load(Path(first)), runs.Run.load(Path(second))
    result = runs.compare_runs(*sides)
    print(runs.describe_comparison(*sides, result))
    return result


def report(run_dir: str, config: Config) -> dict[str, Any]:
    """The report page of a run, finished or not, as one file that needs no server."""
    from ript_ray.report import write_report

    file = write_report(Path(run_dir))
    print(f"wrote {file}")
    return {"file": str(file)}


TOOLS: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {
    "convert": (convert, 2),
    "compare": (compare, 2),
    "stats": (stats, 2),
    "export": (export, 2),
    "replay": (replay, 1),
    "dissect": (dissect, 1),
    "info": (info, 1),
    "compare-runs": (compare_runs, 2),
    "report": (report, 1),
}
"""By command, with the number of paths that each takes."""


def run_tool(command: str, paths: list[str], config: Config, asked: Collection[str] = ()) -> dict[str, Any]:
    """Run one of `TOOLS`.

    Args:
        command: its name.
        paths: that it takes.
        config: the whole configuration.
        asked: keys of settings that the command line names, which go before what `dissect` knows of an episode.

    Raises:
        UserError: for another number of paths than it takes, and what the tool itself finds wrong.
    """
    tool, count = TOOLS[command]
    if len(paths) != count:
        raise UserError(
            f"{command} {' '.join(paths)!r}: expected {count} path{'s' * (count > 1)}, found {len(paths)}; "
            "see 'python launch.py --help'"
        )
    return tool(*paths, config, asked) if tool is dissect else tool(*paths, config)
