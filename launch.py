"""The front door: one command line for everything a user does.

    python launch.py doctor                      is this machine ready?
    python launch.py plan                        what a job takes, and how many actors fit
    python launch.py demos                       demonstrations by a scripted expert
    python launch.py sft sft.output=DIR          a starting policy from demonstrations
    python launch.py train                       make the policy better by trying
    python launch.py train --resume RUN_DIR      go on with a run that was interrupted
    python launch.py submit run.dir=/DIR         train, as a job on a running cluster
    python launch.py tune 'tune.search={KEY: [A, B]}'   the settings that learn best, by many such jobs
    python launch.py eval policy.checkpoint=DIR  success rate on held-out initial states
    python launch.py guidance policy.checkpoint=DIR   the guidance scale it acts best with
    python launch.py convert SOURCE DIR          a π0 checkpoint of openpi or LeRobot, or random:pi0_tiny, as a policy
    python launch.py compare A B                 where two policies part, stage by stage
    python launch.py stats DEMOS norm_stats.json normalisation statistics of demonstrations
    python launch.py export RUN_DIR DIR          the episodes of a run as a LeRobot dataset
    python launch.py info RUN_DIR                a run's story; compare-runs A B: what differs between two
    python launch.py report RUN_DIR              its page, as one file
    python launch.py replay EPISODE              play a recorded episode again and compare, step by step
    python launch.py dissect EPISODE             what the policy saw, thought and did in it, look by look
    python launch.py bench NAME                  a benchmark

Every command takes ``--config FILE``, ``section.key=value`` overrides and ``--json FILE`` for its result.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

try:
    from ript_ray.config import Config, load_config, resolve
    from ript_ray.errors import UserError
    from ript_ray.tools import TOOLS, run_tool
except ModuleNotFoundError as missing:
    if missing.name is not None and (Path(__file__).parent / missing.name.split(".")[0]).exists():
        raise  # one of the project's own
    sys.exit(
        f"error: the package {missing.name!r} is not there for {sys.executable}; run: make setup && source "
        ".venv/bin/activate"
    )

if TYPE_CHECKING:
    from cluster.storage import Storage
    from cluster.tracking import Tracker
    from learner.alone import Player
    from ript_ray.policies.policy import Policy
    from ript_ray.types import Context, Trajectory

log = logging.getLogger("ript_ray")

COMMANDS = ("doctor", "plan", "demos", "sft", "train", "submit", "tune", "eval", "guidance", *TOOLS, "bench")
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default.yaml"
_OTHER_CONTEXTS = 100_000
_NO_ROOM = ("No space left on device", "Disk quota exceeded")


def train(config: Config, run_dir: Path) -> dict[str, Any]:
    """Collect, learn, publish, again and again; evaluate on held-out states before and after.

    When one of the processes that cannot be replaced dies, all start again and go on from the journal; a failure that
    comes again before anything new was played or learnt ends the run after ``scaling.max_restarts`` times.
    """
    from actors.journal import work_done
    from cluster.serving import report_server
    from cluster.storage import stored
    from cluster.tracking import tracking

    survived: list[str] = []
    restarts = 0
    with (
        told_how_to_resume(run_dir),
        tracking(config.run.mlflow_uri, run_dir, config.run.name, config.model_dump(mode="json")) as tracker,
        stored(config.run.storage, run_dir, config.run.keep_checkpoints) as storage,
        report_server(run_dir, config.run.report_host, config.run.report_port) as address,
    ):
        if address is not None:
            print(f"report: {address}")
        while True:
            before = work_done(run_dir)
            try:
                return train_until_it_fails(config, run_dir, tracker, storage, survived)
            except UserError:
                raise
            except Exception as error:
                restarts = restarts + 1 if work_done(run_dir) == before else 1
                reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
                log.exception("failed, %d times without progress, %d allowed", restarts, config.scaling.max_restarts)
                if any(words in str(error) for words in _NO_ROOM):
                    free = {folder: shutil.disk_usage(folder).free // 10**6 for folder in (run_dir, "/tmp")}
                    rooms = ", ".join(f"{folder} has {room} MB" for folder, room in free.items())
                    raise UserError(f"a disk is full ({rooms}); make room, and go on") from error
                if restarts > config.scaling.max_restarts:
                    raise UserError(
                        f"{reason}\nThis ended the run {restarts} times with nothing played or learnt in between, and "
                        f"would do so again. All of it is in {run_dir / 'run.log'}; what actors and learners printed "
                        "is in /tmp/ray/session_latest/logs"
                    ) from error
                survived.append(f"all processes were started again: {reason}")
                print(f"\n{reason}; starting again from what is on disk", file=sys.stderr)
                time.sleep(min(60.0, 2.0**restarts))


def train_until_it_fails(
    config: Config, run_dir: Path, tracker: Tracker, storage: list[Storage], survived: list[str]
) -> dict[str, Any]:
    """One session of `train`, from what is in the run directory to the summary.

    It starts what takes part and waits. The two loops are `Coordinator.run`, which collects, and
    `learner.loop.train_loop`, which learns and publishes; `learner/alone.py` has both as one.

    Args:
        config: the whole configuration.
        run_dir: of the run, new or not.
        tracker: takes metrics and files.
        storage: what keeps the run's files elsewhere, too.
        survived: failures of earlier sessions, to be noted; takes those of this one that the next has to note.
    """
    import ray

    from actors.coordinator import Coordinator
    from actors.final_policy import choose_policy
    from actors.home import Home
    from actors.journal import journal_holds
    from actors.pool import SamplePool
    from cluster.gallery import Gallery
    from cluster.metrics import Metrics
    from cluster.monitor import Monitor
    from cluster.session import ResourcePlan, ray_session, spawn
    from cluster.summary import leave_behind, summarise
    from learner.loop import learner_group
    from ript_ray.data.demonstrations import check_same_demonstrations, demonstrations_to_show
    from ript_ray.policies.checkpoints import newest_policy
    from ript_ray.policies.starting import keep_starting_policy
    from ript_ray.report import LiveReport
    from ript_ray.runs import settings_tried
    from ript_ray.types import EpisodeReport

    started = time.perf_counter()
    policy = keep_starting_policy(config, run_dir)
    shown = demonstrations_to_show(config, policy)
    check_same_demonstrations(shown, config, run_dir)
    update, newest, damaged = newest_policy(run_dir / "checkpoints", journal_holds(run_dir, "collected"))
    for reason in damaged:
        log.warning("%s; going on from update %d", reason, update)
    patience_s = config.scaling.wait_timeout_s if survived else 0.0  # a node that was lost may come back
    with ray_session(config.scaling, ResourcePlan.of(config.scaling), patience_s):
        store, actors, absent = start_rollouts(config, newest or policy, update)
        demos = []
        while shown:  # from here to the object store, one by one
            demo = shown.pop(0)
            demos.append((EpisodeReport.of(demo), ray.put(demo)))
        pool = spawn(SamplePool, config, demos, name="SamplePool")
        folder, noted = run_dir.resolve(), len(survived)
        faults = survived + damaged
        coordinator = spawn(Coordinator, config, actors, pool, store, folder, faults, absent, name="Coordinator")
        home = Home.here(run_dir, config.scaling.wait_timeout_s)
        learners = learner_group(config, policy, pool, store, coordinator, home)
        listeners: list[Callable[[dict[str, Any]], Any]] = [
            tracker,
            Metrics(run_dir.name),
            gallery := Gallery(coordinator, run_dir),
            LiveReport(run_dir),
            *storage,
        ]
        others = {"SamplePool": pool, "WeightStore": store}
        with gallery, Monitor(coordinator, config.scaling, listeners, others, survived) as monitor:
            base = ray.get(coordinator.evaluate.remote("evaluating before", keep=1))
            del survived[:noted]  # it has answered, so it has them
            collecting = coordinator.run.remote()
            monitor.watch(collecting, pool)
            try:
                learners.fit()
            except Exception as error:
                monitor.raise_if_collecting_failed()
                with contextlib.suppress(ray.exceptions.RayError):  # of a coordinator that is gone, too
                    if (reason := ray.get(coordinator.diagnosis.remote(), timeout=60)) is not None:
                        raise UserError(reason) from error
                raise
            monitor.raise_if_collecting_failed()
            ray.get(collecting, timeout=config.scaling.wait_timeout_s)
            end = choose_policy(config, coordinator, store, folder)
            final = ray.get(coordinator.evaluate.remote("evaluating after", keep=1))
        totals = ray.get(coordinator.totals.remote(), timeout=60)
        counts = ray.get(pool.stats.remote(), timeout=60)
        actor, *_ = ray.get(coordinator.present.remote(), timeout=60)
        summary = summarise(
            config, base, final, totals, counts, monitor.rows, ray.get(actor.renderer.remote(), timeout=60)
        )
        summary |= end | {"settings_tried": settings_tried(run_dir)}
        summary["seconds"]["total"] = summary["seconds"].pop("earlier") + time.perf_counter() - started
        leave_behind(run_dir, summary, monitor.rows, actor, {"before": base, "after": final})
        acting = {"guidance": config.eval.guidance, "denoise_steps": config.policy.denoise_steps}
        try:
            tracker.artifacts(run_dir, acting)
        except Exception:  # the run is finished, whatever becomes of the copies
            log.exception("MLflow did not take the files of %s", run_dir)
    return summary


def train_without_ray(config: Config, run_dir: Path) -> dict[str, Any]:
    """The same as `train` in this process alone."""
    from learner.alone import train_alone
    from ript_ray.policies.starting import load_policy_to_train
    from ript_ray.reporting import describe_rate, write_json
    from ript_ray.runs import settings_tried

    summary = train_alone(config, load_policy_to_train(config), run_dir)
    summary |= {"settings_tried": settings_tried(run_dir)}
    write_json(run_dir / "summary.json", summary)
    for name, column in summary["evaluation"].items():
        print(f"{name.replace('_', ' ')}: {describe_rate(column['base'])} → {describe_rate(column['final'])}")
    return summary


def evaluate(config: Config, run_dir: Path) -> dict[str, Any]:
    """Success rate of ``policy.checkpoint`` on held-out initial states."""
    from ript_ray.evaluation import evaluation_contexts, summary_by_start
    from ript_ray.reporting import describe_rate, versions

    with players(config, run_dir) as playing:
        outcomes = playing.evaluate()
        renderer = playing.renderer()
    contexts, columns = evaluation_contexts(config), {}
    for name, results in outcomes.items():
        played = [(r, c.start) for r, c in zip(results, contexts[name], strict=True) if r is not None]
        columns[name] = summary_by_start(played)
    print(config.env.id)
    for name, result in columns.items():
        failed = sum(result is None for result in outcomes[name])
        without = f", {failed} more were not played: their environments failed" if failed else ""
        print(f"  {name.replace('_', ' '):<17}{describe_rate(result)}{without}")
    return {"env": config.env.id} | columns | {"results": outcomes, "versions": versions(renderer)}


def guidance(config: Config, run_dir: Path) -> dict[str, Any]:
    """Choose the guidance scale of ``policy.checkpoint`` by successive halving, not on the states of the exam."""
    from ript_ray.algos.sampling import contexts_to_choose_by
    from ript_ray.choosing import choose_guidance
    from ript_ray.reporting import describe_rate

    if 1.0 not in config.eval.scales:
        raise UserError(f"eval.scales={list(config.eval.scales)}: 1 must be among them, to compare with")

    def contexts(episodes: range) -> list[Context]:
        # Others than those by which a run has chosen this policy, acting at one of the scales.
        others = range(_OTHER_CONTEXTS + episodes.start, _OTHER_CONTEXTS + episodes.stop)
        return contexts_to_choose_by(config.env, config.eval.seed, others)

    with players(config, run_dir) as playing:
        result = choose_guidance(
            config.eval.scales,
            lambda scale, episodes: playing.play(contexts(episodes), scale),
            config.eval.halving_episodes,
        )
    for row in result["table"]:
        print(f"  w = {row['scale']:<5g}{describe_rate(row)}")
    told = "the best" if result["chosen"] == result["best"] else f"{result['best']:g} is not told apart from it"
    print(f"eval.guidance={result['chosen']:g}: {told} (p = {result['paired_p']:.2g} in the same episodes)")
    return {"env": config.env.id} | result


def demos(config: Config, run_dir: Path) -> dict[str, Any]:
    """Have the scripted expert make ``demos.episodes`` demonstrations."""
    from ript_ray.algos.sampling import start_context, training_starts
    from ript_ray.data.demonstrator import demonstrate_all
    from ript_ray.data.storage import save_trajectories
    from ript_ray.reporting import progress_bar

    starts = training_starts(config.env)
    contexts = [start_context(starts[i % len(starts)], config.run.seed + i) for i in range(config.demos.episodes)]
    contexts.sort(key=lambda context: config.env.ids.index(context.env_id))  # another task is another environment
    making = demonstrations_of_actors(config, contexts) if config.scaling.ray else demonstrate_all(config, contexts)
    made = list(progress_bar(len(contexts), "demonstrations", iterable=making))
    if not made:
        raise UserError(f"no demonstration was made: the actors died in all of them; see {run_dir / 'run.log'}")
    file = resolve(config.data.demos)
    save_trajectories(file, made, {"env": config.env.model_dump(), "demos": config.demos.model_dump()})
    successes = sum(demo.success for demo in made)
    missing = (
        f"; {len(contexts) - len(made)} were not made, see {run_dir / 'run.log'}" if len(made) < len(contexts) else ""
    )
    print(f"{len(made)} demonstrations, {successes} successful, in {file}{missing}")
    return {"episodes": len(made), "successes": successes, "file": str(file)}


def demonstrations_of_actors(config: Config, contexts: list[Context]) -> Iterator[Trajectory]:
    """A demonstration of each context, in their order, made by rollout actors."""
    from ray.exceptions import RayActorError
    from ray.util import ActorPool

    from actors.rollout import RolloutActor
    from cluster.session import ResourcePlan, ray_session, start_actors

    with ray_session(config.scaling, ResourcePlan.of(config.scaling, learners=False)):
        actors, _ = start_actors(RolloutActor, config.scaling, config, {}, None)
        workers = ActorPool(actors)
        for context in contexts:  # an actor that dies starts again and makes the same demonstration
            workers.submit(lambda a, context: a.demonstrate.options(max_task_retries=3).remote(context), context)
        for context in contexts:
            if not workers.has_next():
                log.warning("no rollout actor is left; %s and what follows is left out", context)
                return
            try:
                yield workers.get_next(timeout=config.scaling.wait_timeout_s)
            except TimeoutError as error:
                raise UserError(
                    f"scaling.wait_timeout_s={config.scaling.wait_timeout_s:g}: no demonstration of {context} came "
                    "within it; see what became of the actors: ray list actors --detail"
                ) from error
            except RayActorError as error:
                log.warning("the demonstration of %s is left out, its actor died each time: %s", context, error)


def sft(config: Config, run_dir: Path) -> dict[str, Any]:
    """Train a starting policy on demonstrations."""
    import torch

    from learner.sft import train_on_demonstrations
    from ript_ray.policies.checkpoints import cpu_weights, save_policy, weights_sha256
    from ript_ray.reporting import progress_bar

    torch.set_num_threads(config.scaling.learner_threads)
    with progress_bar(config.sft.steps, "imitation") as bar:

        def on_step(index: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        policy, diagnostics = train_on_demonstrations(config, on_step)
    folder = resolve(config.sft.output)
    save_policy(folder, policy, about={"sft": config.sft.model_dump(), "demos": config.data.demos})
    print(f"policy of {sum(p.numel() for p in policy.parameters()):,} parameters in {folder}")
    return diagnostics | {"output": str(folder), "weights_sha256": weights_sha256(cpu_weights(policy))}


@contextlib.contextmanager
def told_how_to_resume(run_dir: Path) -> Iterator[None]:
    """Say how to go on, however a run ends before it is finished. SIGTERM ends it as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        if (run_dir / "journal.jsonl").exists() and not (run_dir / "summary.json").exists():
            print(f"\nnot finished; nothing that was played is lost: python launch.py train --resume {run_dir}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def players(config: Config, run_dir: Path) -> Iterator[Players | Player]:
    """What plays episodes with ``policy.checkpoint`` and learns nothing: a session's actors, or this process."""
    from ript_ray.policies.starting import load_starting_policy

    policy = load_starting_policy(config)
    if not config.scaling.ray:
        from learner.alone import Player

        yield Player(config, policy)
        return
    from actors.coordinator import Coordinator
    from cluster.monitor import Monitor
    from cluster.session import ResourcePlan, ray_session, spawn

    with ray_session(config.scaling, ResourcePlan.of(config.scaling, learners=False)):
        store, actors, absent = start_rollouts(config, policy)
        folder = run_dir.resolve()
        coordinator = spawn(Coordinator, config, actors, None, store, folder, [], absent, name="Coordinator")
        with Monitor(coordinator, config.scaling):
            yield Players(coordinator)


class Players:
    """The rollout actors of a session, asked as `learner.alone.Player` is."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def evaluate(self) -> dict[str, list[bool | None]]:
        """Successes on the contexts of each column of the evaluation; None where the environment failed."""
        return dict(self._wait("evaluate", "evaluating")["results"])

    def play(self, contexts: Sequence[Context], guidance: float) -> list[bool | None]:
        """Successes in the order of the contexts."""
        from actors.progress import CHOOSING_GUIDANCE

        return list(self._wait("play", CHOOSING_GUIDANCE, contexts, guidance))

    def renderer(self) -> str:
        """The OpenGL backend of the actors."""
        import ray

        actor, *_ = self._wait("present")
        return str(ray.get(actor.renderer.remote(), timeout=60))

    def _wait(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._coordinator, method).remote(*arguments))  # the monitor bounds it


def start_rollouts(config: Config, policy: Policy, version: int = 0) -> tuple[Any, list[Any], list[Any]]:
    """The weight store, with ``policy`` as its first version, and the rollout actors that pull from it: those that are
    there, and those that wait for a node with room.
    """
    from actors.rollout import RolloutActor
    from actors.weights import WeightStore, publish
    from cluster.session import spawn, start_actors
    from ript_ray.policies.checkpoints import to_publish

    store = spawn(WeightStore, name="WeightStore")
    publish(store, version, *to_publish(policy, config.policy.precision), config.scaling.wait_timeout_s)
    return store, *start_actors(RolloutActor, config.scaling, config, policy.describe(), "WeightStore")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says; the exit code is 0, 1 when ``doctor`` finds something, 2 when it cannot be done,
    mostly for a mistake in the input, 130 when it was stopped.
    """
    from benchmarks import BENCHMARKS

    parser = argparse.ArgumentParser(
        prog="launch.py",
        description=__doc__,
        epilog=f"benchmarks: {', '.join(BENCHMARKS)}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("settings", nargs="*", help="section.key=value, and what the command is about")
    parser.add_argument("--suite", help="short for env.id=SUITE/TASK, with --task")
    parser.add_argument("--task", help="number or name of a task in --suite; 0 by default")
    parser.add_argument(
        "--config", type=Path, help="YAML file of settings; configs/default.yaml by default, or the benchmark's own"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="train: go on with a run that was interrupted")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.json:
            from ript_ray.reporting import make_folder

            make_folder(options.json.parent, "--json")
            if options.json.is_dir():
                raise UserError(f"--json {options.json}: is a folder; expected the file to write the result to")
        settings = options.settings
        if options.suite or options.task:
            settings = [*settings, f"env.id={options.suite or 'libero_object'}/{options.task or 0}"]
        if options.resume and options.config:
            raise UserError(f"--config {options.config} with --resume {options.resume}: a run has its configuration")
        if options.resume:
            result = resume(options.command, settings, options.resume)
        else:
            result = dispatch(options.command, settings, options.config or default_config(options.command, settings))
        if options.json:
            from ript_ray.reporting import write_json

            write_json(options.json, result)
    except UserError as error:
        # To that of an actor Ray adds its traceback.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (Path(__file__).parent / str(error.name).split(".")[0]).exists():
            raise  # one of the project's own
        print(f"error: the package {error.name!r} is not there for {sys.executable}; run: make setup", file=sys.stderr)
        return 2
    except OSError as error:
        if not any(words in str(error) for words in _NO_ROOM):
            raise
        where = f"temporary files are in {gettempdir()}, see TMPDIR"
        print(f"error: a disk is full: {error}; make room ({where})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(options.command == "doctor" and not all(check["ok"] for check in result.values()))


def resume(command: str, settings: list[str], run_dir: Path) -> dict[str, Any]:
    """Go on with an interrupted training run, with its own configuration."""
    if command != "train":
        raise UserError(f"--resume {run_dir}: only train can go on, not {command}")
    if settings:
        raise UserError(f"{settings[0]!r}: a run is resumed with its own configuration, {run_dir / 'config.yaml'}")
    if not (run_dir / "journal.jsonl").exists():
        raise UserError(f"--resume {run_dir}: no journal.jsonl there; expected a directory that train made")
    return go_on(load_config(run_dir / "config.yaml", [f"run.dir={run_dir}"]), run_dir)


def go_on(config: Config, run_dir: Path) -> dict[str, Any]:
    """Finish the run in a directory, once no process of its last session is left."""
    from actors.journal import read_journal, wait_until_free
    from cluster.rundir import reopened_run_dir
    from ript_ray.algos.objectives import check_objective
    from ript_ray.data.lines import read_json_lines

    check_objective(config)
    reopened = reopened_run_dir(run_dir)
    wait_until_free(reopened)
    read_journal(reopened)  # a damaged line is told now, not by processes that would be started again and again
    read_json_lines(reopened / "metrics.jsonl")
    return train(config, reopened)


def finish_or_find(config: Config) -> dict[str, Any] | None:
    """The result of the run in ``run.dir``, which is finished first if need be; None when there is none."""
    from cluster.plan import fit_actors
    from cluster.rundir import run_to_go_on_with
    from cluster.storage import stored

    was_here = config.run.dir is not None and (Path(config.run.dir) / "journal.jsonl").exists()
    run = run_to_go_on_with(config)
    if run is None:
        return None
    if run.summary is None:
        start = config.policy.model_copy(update={"checkpoint": str(run.folder / "start")})  # what it began with
        scaling = fit_actors(config.model_copy(update={"policy": start})).scaling
        return go_on(config.model_copy(update={"scaling": scaling}), run.folder)
    print(f"{run.folder}: {run.state()}")
    if was_here:
        try:
            with stored(config.run.storage, run.folder, config.run.keep_checkpoints):
                pass  # what was not copied when it finished
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
    return run.summary


def default_config(command: str, settings: list[str]) -> Path:
    """The configuration of a command that names none."""
    from benchmarks import CONFIGS

    names = [CONFIGS[word] for word in settings if word in CONFIGS] if command == "bench" else []
    return DEFAULT_CONFIG.with_name(names[0]) if names else DEFAULT_CONFIG


def dispatch(command: str, settings: list[str], config_file: Path) -> dict[str, Any]:
    """Run one command with its configuration and return its result."""
    from benchmarks import run_benchmark
    from cluster.plan import fit_actors
    from ript_ray.envs import canonical_name

    subjects = [word for word in settings if "=" not in word]
    config = load_config(config_file, [word for word in settings if "=" in word])
    if command == "bench" and subjects == ["policy"]:  # which needs no simulator to be there
        return run_benchmark(subjects, config)
    names = ",".join(dict.fromkeys(canonical_name(env_id) for env_id in config.env.ids))
    config = config.model_copy(update={"env": config.env.model_copy(update={"id": names})})
    if command == "bench":
        return run_benchmark(subjects, config)
    if command in TOOLS:
        return run_tool(command, subjects, config, {word.partition("=")[0] for word in settings})
    if subjects:
        raise UserError(f"{subjects[0]!r}: expected section.key=value, for example run.seed=1")
    if command == "doctor":
        from cluster.doctor import examine

        return examine(config)
    if command == "plan":
        from cluster.plan import plan

        return plan(config)
    if command == "submit":
        from cluster.submit import submit

        return submit(config, config_file, settings)
    from cluster.rundir import new_run_dir

    if command == "tune":
        from cluster.tune import search, search_space

        space = search_space(config, config_file, settings)
        return search(config, space, config_file, settings, new_run_dir(config, command))
    if command == "train" and config.run.resume and (earlier := finish_or_find(config)) is not None:
        return earlier
    if command == "train":
        from ript_ray.algos.objectives import check_objective
        from ript_ray.config.rules import notes

        check_objective(config)
        for note in notes(config):
            print(f"note: {note}", file=sys.stderr)
    if command == "train" and not config.scaling.ray:
        return train_without_ray(config, new_run_dir(config, command))
    config = fit_actors(config) if config.scaling.ray else config
    commands = {"train": train, "eval": evaluate, "guidance": guidance, "demos": demos, "sft": sft}
    return commands[command](config, new_run_dir(config, command))


if __name__ == "__main__":
    sys.exit(main())
