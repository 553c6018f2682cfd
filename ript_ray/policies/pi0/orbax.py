"""openpi's JAX checkpoints, read by tensorstore alone (neither JAX nor orbax) under openpi's PyTorch names.

On disk all layers of a weight are one array, stacked on its first axis; each linear map is ``[in, out]``, and attention
keeps its heads as axes. Each array has an entry in :func:`_table` that says which tensors it holds; the entry's one
conversion gives the values and, run on the meta device, the shapes. An array without an entry (LoRA factors, a new
head) keeps its own path as its name, so that a strict loader can name it.

Sources: the einsum equations of openpi's ``models/gemma.py`` and ``models/siglip.py``; orbax's ``_METADATA``.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ript_ray.errors import UserError

Convert = Callable[[torch.Tensor], torch.Tensor]
Table = dict[str, tuple[tuple[str, Convert], ...]]
"""Path in the JAX tree -> the tensors it holds; a name with ``{i}`` says that the first axis is the layer."""

_PALIGEMMA = "paligemma_with_expert.paligemma.model."
_LANGUAGE = f"{_PALIGEMMA}language_model."
_VISION = f"{_PALIGEMMA}vision_tower.vision_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_PROJECTIONS = (
    "state_proj",
    "action_in_proj",
    "action_out_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "time_mlp_in",
    "time_mlp_out",
)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor comes from."""

    array: str
    layer: int | None
    convert: Convert


class OrbaxTensors:
    """The tensors of one orbax folder; each ``load`` reads from disk.

    Names come array by array, the largest first. Loaded in that order, every array is decoded once and at most one
    stack of layers is held; orbax stores a stack as one compressed chunk, so a single layer could not be read for less.
    While a stack is decoded, and when all its layers are there, it takes twice its size (π0's largest: 2 x 4.8 GB in
    float32): the large ones do so while little else is held.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, folder: Path) -> None:
        """Read names and shapes, not yet values.

        Args:
            folder: the ``params`` folder, with ``_METADATA`` and ``manifest.ocdbt``.

        Raises:
            UserError: when tensorstore is not installed, or a file is missing, damaged or of a strange shape.
        """
        self._folder = folder
        self._metadata = _read_metadata(folder)
        self._sources: dict[str, _Source] = {}
        self._stack: tuple[str, torch.Tensor] | None = None
        shapes: dict[str, tuple[int, ...]] = {}
        table = _table()
        arrays = {p: (array, tuple(self._open(array).shape)) for p, array in _leaves(self._metadata, folder).items()}
        for path, (array, shape) in sorted(arrays.items(), key=lambda item: -math.prod(item[1][1])):
            for name, convert in table.get(path, ((path, _same),)):
                try:
                    for tensor, layer, converted in _expand(name, convert, shape):
                        shapes[tensor], self._sources[tensor] = converted, _Source(array, layer, convert)
                except (RuntimeError, IndexError) as error:
                    raise UserError(
                        f"{folder}: array {array!r} has shape {list(shape)}, from which {name!r} cannot be made "
                        f"({error}); expected a π0 or π0.5 checkpoint as openpi writes it"
                    ) from error
        self.shapes = shapes

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's own dtype, contiguous and sharing memory with nothing.

        Raises:
            UserError: when its data are missing or damaged.
        """
        source = self._sources[name]
        if self._stack is not None and self._stack[0] != source.array:
            self._stack = None  # freed before the next one is read: for a moment each takes twice its size
        if source.layer is None:
            return source.convert(self._read(source.array)).contiguous()
        if self._stack is None:
            self._stack = source.array, self._read(source.array)
        return source.convert(self._stack[1][source.layer]).clone(memory_format=torch.contiguous_format)

    def _open(self, array: str) -> Any:
        spec: dict[str, Any] = {
            "driver": "zarr3" if self._metadata.get("use_zarr3") else "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{self._folder.resolve()}/", "path": array},
        }
        # A chunk that is not there reads as zeros. Older orbax left out chunks of zeros on purpose; newer orbax says
        # that it writes them all, and then an absent one is damage.
        spec["fill_missing_data_reads"] = not self._metadata.get("store_array_data_equal_to_fill_value", False)
        return self._result(array, _tensorstore().open(spec, read=True, open=True))

    def _read(self, array: str) -> torch.Tensor:
        values: np.ndarray[Any, Any] = self._result(array, self._open(array).read())
        if values.dtype.name == "bfloat16":  # torch does not know NumPy's extension type, only its bits
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)

    def _result(self, array: str, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, RuntimeError) as error:
            reason = str(error).partition(" [tensorstore_spec")[0]
            raise UserError(
                f"{self._folder}: array {array!r} cannot be read ({reason}); expected the whole folder as orbax wrote "
                "it (_METADATA, manifest.ocdbt, d/, ocdbt.process_*/): copy the checkpoint again"
            ) from error


def _tensorstore() -> Any:
    try:
        return importlib.import_module("tensorstore")
    except ImportError as error:
        raise UserError(
            "openpi's JAX checkpoints need the package tensorstore, which is not installed: "
            "pip install 'ript-ray[jax-checkpoints]'"
        ) from error


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads((folder / "_METADATA").read_text())
        metadata["tree_metadata"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / '_METADATA'} cannot be read ({type(error).__name__}: {error}); expected orbax's JSON with a "
            "'tree_metadata' table: copy the checkpoint again"
        ) from error
    return metadata


def _leaves(metadata: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Path in the JAX tree -> name of the array on disk.

    Checkpoints of a training run carry a last level ``value`` on every leaf (flax's ``nnx.State``); released ones may
    not. It is left out, as in openpi's ``restore_params``.
    """
    try:
        keys = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in metadata["tree_metadata"].values()]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / '_METADATA'}: an entry of 'tree_metadata' has no readable 'key_metadata' "
            f"({type(error).__name__}: {error}); expected what orbax writes: copy the checkpoint again"
        ) from error
    return {"/".join(path).removeprefix("params/").removesuffix("/value"): ".".join(path) for path in keys}


def _expand(name: str, convert: Convert, shape: tuple[int, ...]) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """Name, layer and shape of each tensor that an array of this shape holds."""
    if "{i}" not in name:
        return [(name, None, tuple(convert(torch.empty(shape, device="meta")).shape))]
    converted = tuple(convert(torch.empty(shape[1:], device="meta")).shape)
    return [(name.replace("{i}", str(layer)), layer, converted) for layer in range(shape[0])]


def _same(array: torch.Tensor) -> torch.Tensor:
    return array


def _first(array: torch.Tensor) -> torch.Tensor:
    return array[0]


def _transposed(kernel: torch.Tensor) -> torch.Tensor:
    """``[in, out] -> [out, in]``."""
    return kernel.transpose(0, 1)


def _patches(kernel: torch.Tensor) -> torch.Tensor:
    """``[height, width, in, out] -> [out, in, height, width]``."""
    return kernel.permute(3, 2, 0, 1)


def _into_heads(kernel: torch.Tensor) -> torch.Tensor:
    """``[C, N, H] -> [N*H, C]``, flax's attention."""
    return kernel.flatten(1).mT


def _out_of_heads(kernel: torch.Tensor) -> torch.Tensor:
    """``[N, H, D] -> [D, N*H]``; ``"BTNH,NHD->BTD"`` in Gemma."""
    return kernel.flatten(0, 1).mT


def _einsum_into_heads(kernel: torch.Tensor) -> torch.Tensor:
    """``[N, D, H] -> [N*H, D]``; ``"BTD,NDH->BTNH"`` in Gemma."""
    return kernel.mT.flatten(0, 1)


def _part(index: int, convert: Convert) -> Convert:
    """Keys and values, or gate and up, are one array with the pair on its first axis."""
    return lambda pair: convert(pair[index])


def _table() -> Table:
    table = _vision() | _gemma("", _LANGUAGE) | _gemma("_1", _EXPERT)
    table["PaliGemma/llm/embedder/input_embedding"] = ((f"{_LANGUAGE}embed_tokens.weight", _same),)
    for name in _PROJECTIONS:
        table |= _dense(name, name)
    return table


def _dense(path: str, name: str) -> Table:
    return {f"{path}/kernel": ((f"{name}.weight", _transposed),), f"{path}/bias": ((f"{name}.bias", _same),)}


def _layer_norm(path: str, name: str) -> Table:
    return {f"{path}/scale": ((f"{name}.weight", _same),), f"{path}/bias": ((f"{name}.bias", _same),)}


def _vision() -> Table:
    """SigLIP: the tower and the projection of its tokens to the language model's width."""
    block, layer = "PaliGemma/img/Transformer/encoderblock/", f"{_VISION}encoder.layers.{{i}}."
    attention = f"{block}MultiHeadDotProductAttention_0/"
    table: Table = {
        "PaliGemma/img/embedding/kernel": ((f"{_VISION}embeddings.patch_embedding.weight", _patches),),
        "PaliGemma/img/embedding/bias": ((f"{_VISION}embeddings.patch_embedding.bias", _same),),
        "PaliGemma/img/pos_embedding": ((f"{_VISION}embeddings.position_embedding.weight", _first),),
        f"{attention}out/kernel": ((f"{layer}self_attn.out_proj.weight", _out_of_heads),),
        f"{attention}out/bias": ((f"{layer}self_attn.out_proj.bias", _same),),
    }
    for jax_name, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        table[f"{attention}{jax_name}/kernel"] = ((f"{layer}self_attn.{name}.weight", _into_heads),)
        table[f"{attention}{jax_name}/bias"] = ((f"{layer}self_attn.{name}.bias", torch.flatten),)
    for index in (0, 1):
        table |= _layer_norm(f"{block}LayerNorm_{index}", f"{layer}layer_norm{index + 1}")
        table |= _dense(f"{block}MlpBlock_0/Dense_{index}", f"{layer}mlp.fc{index + 1}")
    table |= _layer_norm("PaliGemma/img/Transformer/encoder_norm", f"{_VISION}post_layernorm")
    return table | _dense("PaliGemma/img/head", f"{_PALIGEMMA}multi_modal_projector.linear")


def _gemma(suffix: str, model: str) -> Table:
    """One Gemma: the language model has no suffix, the action expert has ``_1``."""
    jax_layer, layer = "PaliGemma/llm/layers/", f"{model}layers.{{i}}."
    table: Table = {
        f"{jax_layer}attn/q_einsum{suffix}/w": ((f"{layer}self_attn.q_proj.weight", _einsum_into_heads),),
        f"{jax_layer}attn/kv_einsum{suffix}/w": (
            (f"{layer}self_attn.k_proj.weight", _part(0, _einsum_into_heads)),
            (f"{layer}self_attn.v_proj.weight", _part(1, _einsum_into_heads)),
        ),
        f"{jax_layer}attn/attn_vec_einsum{suffix}/w": ((f"{layer}self_attn.o_proj.weight", _out_of_heads),),
        f"{jax_layer}mlp{suffix}/gating_einsum": (
            (f"{layer}mlp.gate_proj.weight", _part(0, _transposed)),
            (f"{layer}mlp.up_proj.weight", _part(1, _transposed)),
        ),
        f"{jax_layer}mlp{suffix}/linear": ((f"{layer}mlp.down_proj.weight", _transposed),),
    }
    for path, name in (
        (f"{jax_layer}pre_attention_norm{suffix}", f"{layer}input_layernorm"),
        (f"{jax_layer}pre_ffw_norm{suffix}", f"{layer}post_attention_layernorm"),
        (f"PaliGemma/llm/final_norm{suffix}", f"{model}norm"),
    ):
        table[f"{path}/scale"] = ((f"{name}.weight", _same),)
        table |= _dense(f"{path}/Dense_0", f"{name}.dense")  # π0.5 modulates its expert's norms by the flow time
    return table
