"""Magnitude pruning: the sum of the largest entries of each task."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.entrywise import require_density, threshold, trim
from orthoft.merging.methods.registry import combined, method


@method("magnitude", rowwise=True, prepare=threshold)
def magnitude(x: Tensor, weights: Tensor, *, density: float = 0.2, prepared: Tensor | None = None) -> Tensor:
    """Return ``sum_t w_t trim(x_t)``, each task trimmed to the share ``density`` of its entries largest in magnitude.

    ``trim`` is that of TIES: ``int(density p q)`` entries, at least one, and all that equal the smallest of them.
    Nothing makes up for what is dropped. Entrywise, hence different in each space.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    require_density(density)
    return combined(trim(x, density, prepared), weights)
