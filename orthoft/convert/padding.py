"""LoRAs whose layers have several ranks at one rank, for programs that know one only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from orthoft.convert.conversion import Conversion

A, B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


def at_one_rank(lora: Conversion) -> Conversion:
    """Return a LoRA of scale 1 with every factor filled up with zeros to the largest rank; the product is the same."""
    rank = int(lora.config["r"])
    config = lora.config | {"lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    layers = [replace(layer, rank=rank) for layer in lora.layers]
    return replace(lora, config=config, tensors=padded(lora.tensors, rank), layers=layers)


def padded(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return tensors with ``A`` (r, ...) and ``B`` (m, r, ...) of LoRAs filled up with zeros to ``rank``."""
    return {name: _to_rank(name, tensor, rank) for name, tensor in tensors.items()}


def _to_rank(name: str, tensor: Tensor, rank: int) -> Tensor:
    if not name.endswith(A + B):
        return tensor
    axis = 0 if name.endswith(A) else 1
    missing = rank - tensor.shape[axis]
    return pad(tensor, [0, 0] * (tensor.ndim - 1 - axis) + [0, missing]) if missing else tensor
