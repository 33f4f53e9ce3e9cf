"""Oracle for SVFT: the adapted weight as a sum of outer products of singular vectors, entry by entry."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def svft(weight: Tensor, state: Mapping[str, Tensor], config: Any, key: str = "lin") -> Tensor:
    """``W + sum_ij M_ij u_i v_j^T``, in the bases of the state, or else those of ``weight``."""
    U, V = (state["U"], state["V"]) if "U" in state else signed_bases(weight, config.rank)
    gate = 1 / (1 + torch.exp(-state["gate"])) if config.gate else 1.0
    result = weight
    for (i, j), value in zip(entries(config, U, V, key), state["values"], strict=True):
        result = result + gate * value * torch.outer(U[:, i], V[j])
    return result


def signed_bases(weight: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """``U`` (m, k) and rows ``V`` (k, n) from the smaller Gram matrix's eigenvectors; largest entry of v positive."""
    W = weight.detach().double()
    k = rank or min(W.shape)
    if W.shape[0] < W.shape[1]:
        U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :k]
        V = torch.nn.functional.normalize(W.T @ U, dim=0)
    else:
        V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(1)[:, :k]
        U = torch.nn.functional.normalize(W @ V, dim=0)
    signs = torch.tensor([1.0 if v.max() > -v.min() else -1.0 for v in V.T], dtype=W.dtype)
    return U * signs, (V * signs).T


def entries(config: Any, U: Tensor, V: Tensor, key: str = "lin") -> list[tuple[int, int]]:
    """The places of the values, row by row."""
    k = len(V)
    places = [(i, j) for i in range(k) for j in range(k)]
    d = 0 if config.pattern == "plain" else config.off_diagonals
    band = [(i, j) for i, j in places if abs(i - j) <= d]
    if config.pattern == "random":
        digest = hashlib.sha256(f"{config.seed}:{key}".encode()).hexdigest()
        order = torch.randperm(k * k, generator=torch.Generator().manual_seed(int(digest[:14], 16)))
        return sorted(places[at] for at in order[: len(band)].tolist())
    if config.pattern == "top_k":
        score = {(i, j): math.fabs(float(U[:, i].detach() @ V[j].detach())) for i, j in places}
        return sorted(sorted(places, key=lambda place: -score[place])[: len(band)])
    return band
