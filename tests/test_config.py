from pathlib import Path

import pytest

from ript_ray.config import load_config, save_config
from ript_ray.config.rules import notes
from ript_ray.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_valid_and_survive_a_round_trip(file: Path, tmp_path: Path) -> None:
    config = load_config(file, [])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == config


def test_overrides_are_typed() -> None:
    config = load_config(None, ["train.lr=1e-4", "run.seed=3", "env.train_init_states=[0, 5]", "run.dir=null"])
    assert (config.train.lr, config.run.seed, config.env.train_init_states, config.run.dir) == (1e-4, 3, (0, 5), None)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.updtes=3", ["train.updtes", "train.updates"]),
        ("train.updates=many", ["train.updates", "many", "integer"]),
        ("train.mode=turbo", ["train.mode", "turbo", "sync"]),
        ("scaling.actors=-1", ["scaling.actors", "-1", "greater than or equal to 0"]),
        ("nonsense", ["nonsense", "section.key=value"]),
        ("sampling.max_groups=1", ["sampling.max_groups=1", "sampling.groups=8"]),
        ("env.eval_init_states=[20, 30]", ["env.train_init_states", "overlap"]),
        ("env.train_init_states=[3, 3]", ["env.train_init_states", "first < end"]),
        ("env.eval_init_states=[25, 80]", ["env.eval_init_states", "<= 50"]),
        ("objective.clip=symmetric", ["objective.clip=symmetric", "objective.name=cfg", "advantage_weighted"]),
        ("objective.name=nft", ["train.restart=true", "set train.restart=false train.max_staleness=0"]),
        ("objective.name=advantage_weighted", ["objective.negatives=keep", "set objective.negatives=hinge"]),
        ("objective.name=flow_sde", ["policy.explore=0", "0.5"]),
        ("scaling.learners=3", ["train.batch_size=64", "scaling.learners=3"]),
        ("train.shard=true", ["train.shard=true with scaling.learners=1", "two learners or more"]),
        ("scaling.min_actors=3", ["scaling.min_actors=3", "scaling.actors=2"]),
        ("scaling.min_actors=1", ["scaling.min_actors=1 without scaling.actor_labels", "which nodes are whose"]),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(("learners", "gpus", "expected"), [(2, 0.5, "whole ones"), (0, 1, "on the CPU")])
def test_learners_get_gpus_that_they_can_use(learners: int, gpus: float, expected: str) -> None:
    message = rf"scaling\.learner_gpus={gpus} with scaling\.learners={learners}.*{expected}"
    with pytest.raises(UserError, match=message):
        load_config(None, [f"scaling.learners={learners}", f"scaling.learner_gpus={gpus}"])


_COMPARING = ["train.restart=false", "train.max_staleness=0", "policy.explore=0.5"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.name=flow_sde", "policy.explore=0.5"], "set train.restart=false"),
        (["objective.name=flow_sde", *_COMPARING, "data.windows=all"], "set data.windows=seen"),
        (["objective.name=nft", *_COMPARING, "data.demo_share=0.5"], "set data.demo_share=0"),
        (["objective.name=fpo", *_COMPARING, "policy.action_noise=0.1"], "set policy.action_noise=0"),
        (["data.demo_share=0.999", "train.batch_size=16", "train.micro_batch=16"], "are 16 windows of demonstrations"),
        (["policy.compiled=true", "scaling.ray=false"], "only rollout actors compile"),
        (["objective.name=fpo", *_COMPARING, "train.ema=0.9"], "set train.act_with_ema=false"),
        (["objective.name=nft", *_COMPARING, "policy.guidance=2"], "set policy.guidance=1"),
        (["objective.name=fpo", *_COMPARING, "eval.guidance=2"], "set eval.guidance=1"),
        (["objective.alpha=0", "eval.guidance=2"], "set eval.guidance=1"),
        (["objective.name=nft", *_COMPARING, "objective.negatives=abs"], "set objective.negatives=keep"),
        (
            ["objective.name=advantage_weighted", "objective.negatives=exp", "objective.fastest=0.7"],
            "a slow success would have no weight",
        ),
        (
            ["objective.name=nft", *_COMPARING, "objective.negatives=softplus", "objective.fastest=0.7"],
            "a slow success would have no weight",
        ),
        (["objective.name=fpo", *_COMPARING, "objective.normalise=min_max"], "it would make failures likelier"),
        (
            ["objective.name=advantage_weighted", "objective.negatives=relu", "objective.normalise=min_max"],
            "failures would be imitated",
        ),
        (["train.stop_at=0.9", "sampling.target_success=0.5"], "the goal would not be reached"),
        (["objective.name=flow_sde", *_COMPARING, "policy.precision=bfloat16"], "set both to float32"),
        (["objective.name=flow_sde", *_COMPARING, "train.precision=bfloat16"], "set both to float32"),
    ],
)
def test_an_objective_is_refused_where_it_would_not_do_what_it_says(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ""),
        (["objective.name=label_dropout", "objective.alpha=0.5"], "alpha=0.5 has no say with objective.name=label"),
        (["objective.beta=0.3"], "beta=0.3 has no say with objective.name=cfg"),
        (["objective.name=nft", *_COMPARING, "objective.clip=symmetric", "objective.clip_low=2"], "clip_low=2 has no"),
        (["objective.own={margin: 1}"], "own has no say with objective.name=cfg"),
        (["objective.name=mine:loss", "objective.own={margin: 1}", "objective.beta=3"], ""),
        (["objective.normalise=standard", "objective.name=nft", *_COMPARING, "objective.baseline=task"], ""),
        (
            ["objective.normalise=robust", "objective.name=nft", *_COMPARING, "objective.baseline=task"],
            "once most rollouts succeed it is the median",
        ),
    ],
)
def test_what_has_no_say_is_noted(overrides: list[str], expected: str) -> None:
    found = notes(load_config(None, overrides))
    assert expected in "".join(found)
    assert bool(found) == bool(expected)


@pytest.mark.parametrize("name", ["fpo", "nft", "flow_sde"])
def test_objectives_that_compare_with_the_old_policy_are_accepted_with_its_own_samples(name: str) -> None:
    assert load_config(None, [f"objective.name={name}", *_COMPARING]).objective.name == name


@pytest.mark.parametrize("seed", [0, 49, 499_990, 500_019, 500_020, 999_999])
def test_the_exam_is_not_what_was_trained_on(seed: int) -> None:
    settings = ["env.train_placements=20", "eval.random_placement=20"]
    with pytest.raises(UserError, match=rf"eval\.seed={seed} .* set eval\.seed=1000000"):
        load_config(None, [f"eval.seed={seed}", *settings])
    for fine in (50, 499_980, 1_000_000):
        assert load_config(None, [f"eval.seed={fine}", *settings]).eval.seed == fine


def test_all_fifty_states_are_for_the_exam_where_none_is_trained_on() -> None:
    with pytest.raises(UserError, match=r"overlap; .* set env.train_placements=400"):
        load_config(None, ["env.eval_init_states=[0,50]"])
    assert load_config(None, ["env.eval_init_states=[0,50]", "env.train_placements=400"])


@pytest.mark.parametrize("key", ["eval.seed", "run.seed"])
def test_seeds_that_a_simulator_would_refuse_are_refused_at_once(key: str) -> None:
    assert load_config(None, [f"{key}=4293967295"])
    with pytest.raises(UserError, match=rf"{key}=4293967296: simulators take seeds below 2\^32; .* at most 4293967295"):
        load_config(None, [f"{key}=4293967296"])


@pytest.mark.parametrize("sizes", ["[]", "[1000]", "[10, 100, 10]", "[0, 1, 2]"])
def test_two_numbers_of_actors_make_no_line_that_a_third_could_check(sizes: str) -> None:
    with pytest.raises(UserError, match=r"bench\.sizes.*expected three different numbers"):
        load_config(None, [f"bench.sizes={sizes}"])
    assert load_config(None, ["bench.sizes=[100, 1, 10]"]).bench.sizes == (1, 10, 100)


def test_an_unknown_key_in_a_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("train: {learning_rate: 1}\n")
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        load_config(file, [])
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "absent.yaml", [])
    file.write_text("train: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(file, [])


def test_lead_beyond_staleness_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.lead=3"):
        load_config(None, ["train.mode=async", "train.lead=3", "train.max_staleness=2"])
