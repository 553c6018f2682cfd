"""Reading and writing π0 checkpoints: every format against truth that its own writer, or NumPy, made."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from ript_ray.errors import UserError
from ript_ray.policies.pi0 import orbax, weights
from ript_ray.policies.pi0.openpi import Checkpoint, open_checkpoint, write_openpi
from ript_ray.policies.pi0.weights import EMBEDDING, EXPERT_HEAD, LEFT_OUT, LM_HEAD, canonical_name

TINY = Path(__file__).parent / "data" / "openpi_jax_tiny"
STATS = {"state": {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": [-1.0, -2.0], "q99": [1.0, 2.0]}}
LIBERO = "physical-intelligence/libero"
Weights = dict[str, torch.Tensor]


def module(tensors: Weights) -> nn.Module:
    """A model with exactly these parameters, named as openpi nests its own."""
    root = nn.Module()
    for name, tensor in tensors.items():
        at = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


def openpi_model(tensors: Weights) -> nn.Module:
    """What openpi's PI0Pytorch has besides: a head tied to the word embedding, and the expert's unused head."""
    embedding, width = tensors[EMBEDDING], len(tensors["action_in_proj.weight"])
    model = module(tensors | {LM_HEAD: embedding, EXPERT_HEAD: torch.randn(len(embedding), width)})
    model.get_submodule(LM_HEAD.removesuffix(".weight")).weight = model.get_parameter(EMBEDDING)
    return model


def old_name(name: str) -> str:
    """The name before transformers 4.52."""
    return (
        name.replace(LM_HEAD, "paligemma_with_expert.paligemma.language_model.lm_head.weight")
        .replace("paligemma.model.language_model.", "paligemma.language_model.model.")
        .replace("paligemma.model.vision_tower.", "paligemma.vision_tower.")
        .replace("paligemma.model.multi_modal_projector.", "paligemma.multi_modal_projector.")
    )


def loaded(checkpoint: Checkpoint) -> Weights:
    """All tensors, each of the shape that was announced."""
    tensors = {name: checkpoint.tensors.load(name) for name in checkpoint.tensors.shapes}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(checkpoint.tensors.shapes)
    return tensors


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


@pytest.fixture(params=["pi0", "pi05"])
def model(request: pytest.FixtureRequest) -> tuple[str, Weights]:
    """Every tensor of a tiny π0 or π0.5 under its canonical name."""
    return request.param, load_file(TINY / f"expected_{request.param}.safetensors")


@pytest.fixture
def pi0(tmp_path: Path) -> tuple[Path, Weights]:
    """A folder to put a checkpoint in, and a π0's tensors."""
    return tmp_path, load_file(TINY / "expected_pi0.safetensors")


# openpi, JAX


@pytest.fixture
def tensorstore() -> None:
    pytest.importorskip("tensorstore", reason="openpi's JAX checkpoints need the extra jax-checkpoints")


@pytest.mark.usefixtures("tensorstore")
@pytest.mark.parametrize("inside", ["", "params"])
def test_jax_checkpoint_holds_what_the_einsums_say(model: tuple[str, Weights], inside: str) -> None:
    name, expected = model
    checkpoint = open_checkpoint(TINY / name / inside)
    assert (checkpoint.kind, checkpoint.pi05, checkpoint.config) == ("openpi_jax", name == "pi05", {})
    assert_same(loaded(checkpoint), expected)


@pytest.mark.usefixtures("tensorstore")
def test_jax_tensors_load_in_any_order_and_share_no_memory(model: tuple[str, Weights]) -> None:
    name, expected = model
    tensors = open_checkpoint(TINY / name).tensors
    found = {key: tensors.load(key) for key in sorted(expected, key=lambda key: key[::-1])}
    for tensor in found.values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # else one layer would keep its whole stack alive
        tensor.zero_()
    assert_same({key: tensors.load(key) for key in found}, expected)


@pytest.mark.usefixtures("tensorstore")
def test_jax_arrays_keep_their_dtype() -> None:
    tensors = open_checkpoint(TINY / "pi05").tensors
    bfloat16 = {name for name in tensors.shapes if tensors.load(name).dtype == torch.bfloat16}
    assert bfloat16 == {name for name in tensors.shapes if "vision_tower" in name or "multi_modal" in name}


@pytest.mark.usefixtures("tensorstore")
def test_each_jax_array_is_read_once_in_the_order_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, reads, read = open_checkpoint(TINY / "pi0").tensors, [], orbax.OrbaxTensors._read
    monkeypatch.setattr(orbax.OrbaxTensors, "_read", lambda self, array: reads.append(array) or read(self, array))
    sizes = []
    for name in tensors.shapes:
        tensors.load(name)
        sizes.append(math.prod(tensors._open(reads[-1]).shape))
    assert sizes == sorted(sizes, reverse=True)  # the largest, which takes twice its size, while little else is held
    assert (
        len(reads) == len(set(reads)) == len(json.loads((TINY / "pi0/params/_METADATA").read_text())["tree_metadata"])
    )


@pytest.mark.usefixtures("tensorstore")
@pytest.mark.parametrize("inside", ["", "params"])
def test_statistics_beside_a_jax_checkpoint(inside: str) -> None:
    checkpoint = open_checkpoint(TINY / "pi05" / inside)
    assert checkpoint.norm_stats is not None
    assert set(checkpoint.assets) == {LIBERO}
    assert checkpoint.norm_stats["state"] == STATS["state"]
    assert checkpoint.norm_stats["actions"]["q01"] is None
    assert open_checkpoint(TINY / "pi0").norm_stats is None


@pytest.mark.usefixtures("tensorstore")
def test_unknown_jax_array_keeps_its_path(tmp_path: Path) -> None:
    def rename(metadata: str) -> str:
        return metadata.replace('"key": "action_out_proj"', '"key": "lora"')

    folder = damaged_jax(tmp_path, "_METADATA", lambda b: rename(b.decode()).encode())
    with pytest.raises(UserError, match=r"array 'params\.lora\.bias' cannot be read \(NOT_FOUND"):
        open_checkpoint(folder)
    tensorstore = importlib.import_module("tensorstore")
    spec = {"driver": "ocdbt", "base": f"file://{folder}/params/"}
    store = tensorstore.KvStore.open(spec).result()
    for key in store.list().result():
        if b"action_out_proj" in key:
            store.write(key.replace(b"action_out_proj", b"lora"), store.read(key).result().value).result()
    tensors = open_checkpoint(folder).tensors
    assert (tensors.shapes["lora/kernel"], tuple(tensors.load("lora/kernel").shape)) == ((4, 5), (4, 5))
    assert "action_out_proj.weight" not in tensors.shapes


@pytest.mark.usefixtures("tensorstore")
def test_missing_chunk_is_no_zeros(tmp_path: Path) -> None:
    folder = damaged_jax(tmp_path, "_METADATA", lambda b: b)
    tensorstore = importlib.import_module("tensorstore")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/params/"}).result()
    store.write(b"params.state_proj.kernel/0.0", None).result()
    with pytest.raises(UserError, match=r"'params\.state_proj\.kernel' cannot be read"):
        open_checkpoint(folder).tensors.load("state_proj.weight")
    metadata = json.loads((folder / "params/_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]  # as older orbax: what is not there was zero
    (folder / "params/_METADATA").write_text(json.dumps(metadata))
    assert not open_checkpoint(folder).tensors.load("state_proj.weight").any()


def damaged_jax(tmp_path: Path, file: str, change: Callable[[bytes], bytes]) -> Path:
    folder = tmp_path / "step"
    shutil.copytree(TINY / "pi0", folder)
    for path in (folder / "params").glob(file):
        path.write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("_METADATA", lambda b: b[:100], "_METADATA cannot be read"),
        ("_METADATA", lambda b: b"[]", "_METADATA cannot be read"),
        ("_METADATA", lambda b: b'{"tree_metadata": {"a": {}}}', "no readable 'key_metadata'"),
        ("manifest.ocdbt", lambda b: b[:-20], "array 'params.*' cannot be read"),
        ("d/*", lambda b: b[: len(b) // 2], "array 'params.*' cannot be read"),
        ("_METADATA", lambda b: b.replace(b"attn_vec_einsum_1", b"final_norm_1"), "cannot be"),
    ],
)
@pytest.mark.usefixtures("tensorstore")
def test_damaged_jax_checkpoint(tmp_path: Path, file: str, change: Callable[[bytes], bytes], message: str) -> None:
    folder = damaged_jax(tmp_path, file, change)
    with pytest.raises(UserError, match=message):
        loaded(open_checkpoint(folder))


def test_missing_tensorstore_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UserError, match=r"tensorstore, which is not installed.*jax-checkpoints"):
        open_checkpoint(TINY / "pi0")


def test_array_of_a_strange_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax.OrbaxTensors, "_open", lambda self, array: torch.empty(3))
    with pytest.raises(UserError, match=r"array 'params\..*' has shape \[3\], from which .* cannot be made"):
        orbax.OrbaxTensors(TINY / "pi0" / "params")


# openpi, PyTorch


def test_openpi_pytorch(tmp_path: Path, model: tuple[str, Weights]) -> None:
    name, expected = model
    save_model(openpi_model(expected), str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"action_horizon": 10}')
    stored = load_file(tmp_path / "model.safetensors")
    assert LM_HEAD in stored
    assert EMBEDDING not in stored
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.pi05) == ("openpi_pytorch", name == "pi05")
    assert checkpoint.config == {"action_horizon": 10}
    assert_same(loaded(checkpoint), expected)


def test_shards(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    names = sorted(expected)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: expected[name] for name in names if weight_map[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(loaded(open_checkpoint(folder)), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match="no 'weight_map'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("names", [[LM_HEAD], [EMBEDDING], [LM_HEAD, EMBEDDING]])
def test_word_embedding_under_either_name(
    pi0: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(weights, "_ROWS", 4)
    folder, expected = pi0
    rest = {name: tensor for name, tensor in expected.items() if name != EMBEDDING}
    save_file(rest | {name: expected[EMBEDDING].clone() for name in names}, folder / "model.safetensors")
    assert_same(loaded(open_checkpoint(folder)), expected)


@pytest.mark.parametrize(
    "change", [lambda words: words * torch.arange(11)[:, None].lt(10), lambda words: words[:8].clone()]
)
def test_two_different_embeddings_are_refused(
    pi0: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    monkeypatch.setattr(weights, "_ROWS", 4)
    folder, expected = pi0
    save_file(expected | {LM_HEAD: change(expected[EMBEDDING])}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight' .* and .*embed_tokens\.weight' .* differ"):
        open_checkpoint(folder)


def test_unused_tensors_are_left_out_and_unknown_ones_kept(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    extra = {name: torch.zeros(2) for name in [*LEFT_OUT, "paligemma_with_expert.new.weight", "new_head.weight"]}
    save_file(expected | extra, folder / "model.safetensors")
    names = set(open_checkpoint(folder).tensors.shapes)
    assert names == set(expected) | {"paligemma_with_expert.new.weight", "new_head.weight"}


# LeRobot


def test_lerobot(tmp_path: Path, model: tuple[str, Weights]) -> None:
    name, expected = model
    policy = nn.Module()
    policy.model = openpi_model(expected)
    save_model(policy, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"type": name, "chunk_size": 10}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.pi05, checkpoint.norm_stats) == ("lerobot", name == "pi05", None)
    assert_same(loaded(checkpoint), expected)
    save_model(policy.model, str(tmp_path / "model.safetensors"))  # LeRobot's base models: openpi's names, own files
    assert open_checkpoint(tmp_path).kind == "lerobot"


@pytest.mark.parametrize("prefix", ["model.paligemma_with_expert.", "paligemma_with_expert.", "model.", ""])
def test_old_lerobot(pi0: tuple[Path, Weights], prefix: str) -> None:
    folder, expected = pi0
    own = expected | {LM_HEAD: expected[EMBEDDING].clone(), EXPERT_HEAD: torch.zeros(11, 4)}
    own |= {"normalize_inputs.buffer_observation_state.mean": torch.tensor(STATS["state"]["mean"])}
    own |= {"normalize_inputs.buffer_observation_state.std": torch.tensor(STATS["state"]["std"])}
    own |= {
        "normalize_targets.buffer_action.mean": torch.zeros(3),
        "normalize_targets.buffer_action.std": torch.ones(3),
    }
    own |= {"unnormalize_outputs.buffer_action.mean": torch.full([3], torch.inf)}
    own |= {"unnormalize_outputs.buffer_action.std": torch.full([3], torch.inf)}
    renamed = {old_name(name).replace("paligemma_with_expert.", prefix): tensor for name, tensor in own.items()}
    assert not any("paligemma.model." in name for name in renamed)
    save_file(renamed, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "lerobot"
    assert_same(loaded(checkpoint), expected)
    state = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": None, "q99": None}
    assert checkpoint.norm_stats == {"state": state}  # the action's were never filled


def test_vision_tower_flattened_by_transformers(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    flat = {f"model.{name.replace('vision_tower.vision_model.', 'vision_tower.')}": t for name, t in expected.items()}
    save_file(flat, folder / "model.safetensors")
    assert_same(loaded(open_checkpoint(folder)), expected)


def test_canonical_names_are_left_alone(model: tuple[str, Weights]) -> None:
    assert all(canonical_name(name) == name for name in [*model[1], *LEFT_OUT, LM_HEAD])


def test_statistics_of_lerobot_processors(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    save_file({f"model.{name}": tensor for name, tensor in expected.items()}, folder / "model.safetensors")
    state = {f"observation.state.{stat}": torch.tensor(values) for stat, values in STATS["state"].items()}
    actions = {"action.mean": torch.tensor([2.0]), "action.std": torch.tensor([3.0]), "action.count": torch.tensor([9])}
    for kind, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        file = f"policy_{kind}processor_step_5_{step}.safetensors"
        save_file(state | actions, folder / file)
        steps = [{"registry_name": "to_batch_processor", "config": {}}, {"registry_name": step, "state_file": file}]
        (folder / f"policy_{kind}processor.json").write_text(json.dumps({"name": kind, "steps": steps}))
    actions_found = {"mean": [2.0], "std": [3.0], "q01": None, "q99": None}
    assert open_checkpoint(folder).norm_stats == STATS | {"actions": actions_found}
    (folder / "policy_preprocessor_step_5_normalizer_processor.safetensors").unlink()
    with pytest.raises(UserError, match=r"step_5_normalizer_processor\.safetensors cannot be read"):
        open_checkpoint(folder)
    (folder / "policy_preprocessor.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match=r"policy_preprocessor\.json: 'steps' is no list"):
        open_checkpoint(folder)


# Writing


def test_openpi_loads_strictly_what_is_written(tmp_path: Path, model: tuple[str, Weights]) -> None:
    name, expected = model
    config = {"action_dim": 5, "action_horizon": 10, "precision": "float32"}
    write_openpi(tmp_path / "out", iter(expected.items()), config, STATS, LIBERO)
    fresh = openpi_model({key: torch.zeros_like(tensor) for key, tensor in expected.items()})
    load_model(fresh, tmp_path / "out/model.safetensors", strict=True)  # as openpi's BaseModelConfig.load_pytorch
    assert_same({key: fresh.get_parameter(key).data for key in expected}, expected)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.kind, checkpoint.pi05, checkpoint.config) == ("openpi_pytorch", name == "pi05", config)
    assert checkpoint.assets == {LIBERO: STATS}
    assert_same(loaded(checkpoint), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_appears_when_writing_fails(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    with pytest.raises(UserError, match="not finite"):
        write_openpi(folder / "out", expected, {}, {"state": {"mean": [float("nan")], "std": [1.0]}}, "a")
    assert not list(folder.iterdir())
    write_openpi(folder / "out", expected, {}, None, "a")
    with pytest.raises(UserError, match="exists already"):
        write_openpi(folder / "out", expected, {}, None, "a")
    for asset in ("../a", "/a", ""):
        with pytest.raises(UserError, match="expected a relative path"):
            write_openpi(folder / "new", expected, {}, None, asset)


# What is refused


def test_several_assets_ask_for_a_choice(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    save_file(expected, folder / "model.safetensors")
    for asset in ("droid", "trossen"):
        (folder / "assets" / asset).mkdir(parents=True)
        (folder / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": STATS}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.assets["droid"] == checkpoint.assets["trossen"] == STATS
    with pytest.raises(UserError, match="choice of one: droid, trossen"):
        _ = checkpoint.norm_stats


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent does not exist; expected .*_METADATA.*model\.safetensors"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="no checkpoint of a known format"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name} are pickles, which can run any code"):
            open_checkpoint(path)


def test_pickles_beside_the_weights_do_no_harm(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    save_file(expected, folder / "model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_same(loaded(open_checkpoint(folder)), expected)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_safetensors(pi0: tuple[Path, Weights], keep: int) -> None:
    folder, expected = pi0
    save_file(expected, folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ['{"a": ', "[]", "\x00\x01"])
def test_damaged_config(pi0: tuple[Path, Weights], text: str) -> None:
    folder, expected = pi0
    save_file(expected, folder / "model.safetensors")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json.*expected a JSON object"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({}, "no statistics"),
        ({"state": 3}, "state: found a int"),
        ({"state": {"mean": [0.0]}}, r"state\.std: found None"),
        ({"state": {"mean": ["a"], "std": [1.0]}}, r"state\.mean: found \['a'\]"),
        ({"state": {"mean": [0.0], "std": [float("inf")]}}, "not finite"),
        ({"state": {"mean": [0.0], "std": [1.0, 2.0]}}, r"lengths \{'mean': 1, 'std': 2\}"),
    ],
)
def test_damaged_statistics(pi0: tuple[Path, Weights], stats: dict[str, object], message: str) -> None:
    folder, expected = pi0
    save_file(expected, folder / "model.safetensors")
    (folder / "assets/libero").mkdir(parents=True)
    (folder / "assets/libero/norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    with pytest.raises(UserError, match=rf"libero/norm_stats\.json: .*{message}"):
        open_checkpoint(folder)


def test_one_tensor_under_two_names(pi0: tuple[Path, Weights]) -> None:
    folder, expected = pi0
    save_file(expected | {"model.state_proj.bias": torch.zeros(4)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"are the same tensor 'state_proj\.bias'"):
        open_checkpoint(folder)


def test_model_of_another_kind(tmp_path: Path) -> None:
    save_file({"model.encoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor 'action_in_proj\.weight' among 1 \(encoder\.weight"):
        open_checkpoint(tmp_path)
