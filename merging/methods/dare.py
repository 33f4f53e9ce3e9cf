"""DARE: drop entries at random and rescale the others. arXiv 2311.03099."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.entrywise import Consensus, agree, uniform
from orthoft.merging.methods.registry import method, weighted


@method("dare", rowwise=True)
def dare(
    x: Tensor,
    weights: Tensor,
    *,
    drop: float = 0.5,
    consensus: Consensus | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Return ``sum_t w_t m_t o x_t / (1 - drop)`` with independent masks ``m_t``, entries 0 with probability ``drop``.

    The expectation is ``sum_t w_t x_t``: the factor is exactly ``1 / (1 - drop)``, whatever was drawn. With a
    ``consensus`` the pruned tasks are merged by the sign election of TIES, without its trimming (DARE-TIES): "mean",
    "weighted_mean" or "sum" over the tasks that agree.

    Entrywise, hence different in each space.

    Raises:
        ValueError: ``drop`` is outside [0, 1), or a weighted mean with a negative weight.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop is the probability with which an entry is dropped, in [0, 1), got {drop}")
    kept = torch.where(uniform(x, generator) >= drop, x, 0.0) / (1.0 - drop)
    return agree(weighted(kept, weights), weights, consensus)
