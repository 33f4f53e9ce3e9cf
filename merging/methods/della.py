"""DELLA: drop entries at random, small ones more often than large ones. arXiv 2406.11617."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoft.merging.methods.entrywise import Consensus, agree, uniform
from orthoft.merging.methods.registry import method, weighted


@method("della", rowwise=True)
def della(
    x: Tensor,
    weights: Tensor,
    *,
    density: float = 0.5,
    epsilon: float = 0.15,
    consensus: Consensus | None = "mean",
    generator: torch.Generator,
) -> Tensor:
    """Return the sign consensus of the tasks ``m_t o x_t / k_t``, masks ``m_t`` being 1 with probability ``k_t``.

    ``k_t = density - epsilon + 2 epsilon rank / (q - 1)``, where rank counts from 0 for the smallest magnitude of a row
    to q - 1 for the largest (MAGPRUNE); a row of one entry has ``k_t = density``. Each kept entry is divided by its own
    probability, so that the expectation of every pruned task is the task itself, exactly. The weights scale the pruned
    tasks; then the signs are elected as in TIES, and ``consensus=None`` sums up without an election.

    Entrywise, hence different in each space.

    Raises:
        ValueError: ``density`` -+ ``epsilon`` leave (0, 1], or a weighted mean with a negative weight.
    """
    if epsilon < 0.0 or density - epsilon <= 0.0 or density + epsilon > 1.0:
        raise ValueError(
            "density - epsilon and density + epsilon are the smallest and the largest probability to keep an entry, "
            f"in (0, 1], got density {density} and epsilon {epsilon}"
        )
    keep = keep_probability(x, density, epsilon)
    pruned = torch.where(uniform(x, generator) < keep, x / keep, 0.0)
    return agree(weighted(pruned, weights), weights, consensus)


def keep_probability(x: Tensor, density: float, epsilon: float) -> Tensor:
    """Return ``k_t`` (T, p, q): from ``density - epsilon`` to ``density + epsilon`` in equal steps along each row."""
    columns = x.shape[-1]
    if columns == 1:
        return torch.full_like(x, density)
    steps = torch.linspace(density - epsilon, density + epsilon, columns, dtype=x.dtype, device=x.device)
    order = x.abs().argsort(dim=-1, stable=True)
    return torch.empty_like(x).scatter_(-1, order, steps.expand_as(x))
