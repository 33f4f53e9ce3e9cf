"""LoRA on disk, with its variants: rsLoRA, DoRA, biases, ranks and scales by pattern, embeddings, convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank
from orthoft.merging.formats.fields import COUNT, COUNTS, FLAG, NUMBER, NUMBERS, Field, needed
from orthoft.merging.formats.registry import Config, Extent, Shapes, Tensors, by_pattern, reader

REFUSED = ("alora_invocation_tokens", "use_qalora", "arrow_config", "layer_replication")
UNREAD = ("use_bdlora", "kasa_config", "monteclora_config")
# These change the base weights at the start, so that the factors alone are not the change of the base.
CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


def _are_names(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return False
    return len({name.rpartition(".")[2] for name in value}) <= 100  # each is looked for in each module


FIELDS = {
    "r": needed(COUNT),
    "lora_alpha": needed(NUMBER),
    "rank_pattern": COUNTS,
    "alpha_pattern": NUMBERS,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "fan_in_fan_out": FLAG,
    "target_parameters": Field("a list of names, of at most 100 parameters", _are_names),
    "init_lora_weights": Field("true, false or a word", lambda value: isinstance(value, bool | str)),
}
NAMES = frozenset(
    [
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
        *("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    ]
)


def _refusals(config: Config) -> list[str]:
    init = _init(config)
    changed = [f"init_lora_weights={init[:40]!r}"] if init.startswith(CHANGING_INITS) else []
    return [field for field in REFUSED if config.get(field)] + changed


def _advice(config: Config) -> str:
    how = " (convert it: save_pretrained with path_initial_model_for_weight_conversion)"
    return how if _init(config).startswith(CONVERTIBLE_INITS) else ""


def _init(config: Config) -> str:
    return str(config.get("init_lora_weights")).lower()


def _extent(config: Config, shapes: Shapes) -> Extent:
    if "lora_embedding_A" in shapes:
        (rank, rows), (columns, _) = shapes["lora_embedding_A"], shapes["lora_embedding_B"]
        return Extent(rows, columns, rank)
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    if len(a) < 2 or len(b) < 2:
        raise ValueError("factors are matrices")
    magnitude = any(name.startswith("lora_magnitude_vector") for name in shapes)
    return Extent(b[0], torch.Size(a[1:]).numel(), None if magnitude else a[0])


def rank_and_scale(config: Config, module: str) -> tuple[int, float]:
    """Return the rank of a module by its configuration, and ``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA)."""
    rank: int = by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha: float = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def lora_bias(config: Config, module: str, tensors: Tensors) -> Tensor:
    """Return what the bias of ``B`` adds to the bias of the layer: it is scaled like ``B``."""
    return rank_and_scale(config, module)[1] * tensors["lora_B.bias"]


def same_when_tied(head: Tensors, embedding: Tensors) -> bool:
    """Say whether the LoRA of an output head is the one of the embedding, transposed."""
    pairs = (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A"))
    return all(a in head and b in embedding and torch.equal(head[a], embedding[b].mT) for a, b in pairs)


@reader(
    "LORA",
    prefix="lora_",
    weightless=True,
    extent=_extent,
    refusals=_refusals,
    advice=_advice,
    unread=lambda config: [field for field in UNREAD if config.get(field)],
    fields=FIELDS,
    names=NAMES,
    bias="lora_B.bias",
    read_bias=lora_bias,
    same=same_when_tied,
)
def lora(config: Config, module: str, tensors: Tensors, weight: Tensor) -> Delta:
    """``delta = s B A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA); the scale goes inside ``B``.

    DoRA: ``W' = m (W + s B A) / |W + s B A|``, norms over the inputs, ``m`` one number per output, which has full rank.
    arXiv 2106.09685, 2312.03732, 2402.09353.
    """
    embedding = "lora_embedding_A" in tensors
    A = tensors["lora_embedding_A" if embedding else "lora_A.weight"].flatten(1)  # (r, n)
    B = tensors["lora_embedding_B" if embedding else "lora_B.weight"].flatten(1)  # (m, r)
    magnitude = tensors.get("lora_magnitude_vector", tensors.get("lora_magnitude_vector.weight"))
    if embedding and magnitude is not None:
        raise ValueError(f"module {module!r} has DoRA on an embedding, which cannot be merged")
    if magnitude is not None and magnitude.numel() != len(B):
        raise ValueError(f"module {module!r} has {len(B)} outputs and {magnitude.numel()} magnitudes")
    rank, scale = rank_and_scale(config, module)
    if rank != A.shape[0]:
        raise ValueError(f"module {module!r} has rank {rank} by its configuration and {A.shape[0]} by its tensors")
    if B.shape[1] != rank:
        raise ValueError(f"module {module!r} has factors of ranks {rank} and {B.shape[1]} (a grouped convolution?)")
    delta = LowRank(A.mT * scale, B.mT) if embedding else LowRank(B * scale, A)
    if magnitude is None:
        return delta
    directed = weight + delta.dense()
    norms = torch.linalg.vector_norm(directed, dim=1, keepdim=True)
    return Dense(directed * (magnitude.reshape(-1, 1) / norms) - weight)
