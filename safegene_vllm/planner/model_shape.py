"""Sizes of a model from its config.json: vLLM's linear layers, parameters, KV bytes per token.

Dense Llama-like decoders only (grouped-query attention, fused projections, tied embeddings);
mixtures of experts are rejected and vision towers are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import read_json

EXACT = ("llama", "mistral", "qwen2", "qwen3", "phi3", "glm4")
"""Model types with an exact parameter count; others are counted like Llama."""

_NORMS_PER_LAYER = {"glm4": 4}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Linear:
    """A linear layer of vLLM: output `widths` of its parts, and their checkpoint names `sites`.

    One site per part, or one site over all parts (GLM-4's gate_up_proj, which vLLM splits in two).
    """

    name: str
    d_in: int
    widths: tuple[int, ...]
    sites: tuple[str, ...]

    @property
    def d_out(self) -> int:
        """Output width of the whole layer."""
        return sum(self.widths)

    def parts_of(self, targets: frozenset[str]) -> int:
        """Count the parts with a site in `targets`."""
        if len(self.sites) == 1:
            return len(self.widths) if self.sites[0] in targets else 0
        return sum(site in targets for site in self.sites)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder model.

    `read_parameters` are those a decode step reads: all `parameters` but an untied embedding table,
    of which a step reads a row per token.
    """

    name: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    linears: tuple[Linear, ...]
    parameters: int
    read_parameters: int
    remarks: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of a layer's target modules, e.g. q_proj, as in checkpoints."""
        return tuple(site for linear in self.linears for site in linear.sites)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


def read_shape(model: Path) -> ModelShape:
    """Read the sizes of a checkpoint directory or a config.json.

    Errors: MissingFileError, HeaderError (the file); ConfigError (an unsupported model, or a field
    that is missing or not a positive whole number).
    """
    path = model / "config.json" if model.is_dir() else model
    raw = read_json(path)
    remarks = []
    if "hidden_size" not in raw and isinstance(raw.get("text_config"), dict):
        raw = raw["text_config"]
        remarks.append("only the text model is counted, not vision or audio towers")
    experts = [key for key in _EXPERTS if raw.get(key)]
    if experts:
        raise ConfigError(
            f"{path}: {experts[0]} {raw[experts[0]]!r} found: a mixture of experts; expected a "
            "dense model."
        )
    kind = str(raw.get("model_type", "unknown"))
    if kind not in EXACT:
        known = ", ".join(EXACT)
        remarks.append(f"model_type {kind!r} is counted like Llama's; exact for {known}")
    if raw.get("quantization_config"):
        remarks.append("quantization is not counted: weights are taken at the dtype given")
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        remarks.append("a sliding window is not counted: KV is taken as the full context")
    return _shape(raw, kind, str(path), path.resolve().parent.name, tuple(remarks))


def _shape(
    raw: Mapping[str, Any], kind: str, where: str, name: str, remarks: tuple[str, ...]
) -> ModelShape:
    hidden, inner = _whole(raw, "hidden_size", where), _whole(raw, "intermediate_size", where)
    layers, heads = (
        _whole(raw, "num_hidden_layers", where),
        _whole(raw, "num_attention_heads", where),
    )
    vocab = _whole(raw, "vocab_size", where)
    kv_heads = _whole(raw, "num_key_value_heads", where, heads)
    head_dim = _whole(raw, "head_dim", where, hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    linears = _linears(kind, hidden, inner, q, kv)
    per_layer = sum(linear.d_in * linear.d_out for linear in linears)
    per_layer += _biases(raw, kind, hidden, inner, q, kv)
    per_layer += _NORMS_PER_LAYER.get(kind, 2) * hidden + (2 * head_dim if kind == "qwen3" else 0)
    table = vocab * hidden
    read = layers * per_layer + hidden + table
    return ModelShape(
        name=name,
        model_type=kind,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        linears=linears,
        parameters=read if raw.get("tie_word_embeddings", False) else read + table,
        read_parameters=read,
        remarks=remarks,
    )


def _linears(kind: str, hidden: int, inner: int, q: int, kv: int) -> tuple[Linear, ...]:
    """The four linear layers of a decoder layer, as vLLM packs them."""
    attention = Linear("qkv_proj", hidden, (q, kv, kv), ("q_proj", "k_proj", "v_proj"))
    mlp = Linear("gate_up_proj", hidden, (inner, inner), ("gate_proj", "up_proj"))
    if kind == "phi3":
        attention = Linear("qkv_proj", hidden, (q + 2 * kv,), ("qkv_proj",))
        mlp = Linear("gate_up_proj", hidden, (2 * inner,), ("gate_up_proj",))
    elif kind == "glm4":
        mlp = Linear("gate_up_proj", hidden, (inner, inner), ("gate_up_proj",))
    return (
        attention,
        Linear("o_proj", q, (hidden,), ("o_proj",)),
        mlp,
        Linear("down_proj", inner, (hidden,), ("down_proj",)),
    )


def _biases(raw: Mapping[str, Any], kind: str, hidden: int, inner: int, q: int, kv: int) -> int:
    """Number of bias parameters of one layer, as transformers builds these models."""
    if kind == "qwen2":
        return q + 2 * kv
    count = q + 2 * kv if raw.get("attention_bias", False) else 0
    if count and kind != "glm4":
        count += hidden
    return count + (2 * inner + hidden if raw.get("mlp_bias", False) else 0)


def _whole(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """Read a positive whole number. Errors: ConfigError."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where}: {key} {value!r} found; expected a whole number above 0.")
    return value
