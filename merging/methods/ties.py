"""TIES: trim, elect a sign, merge those that agree. arXiv 2306.01708."""

from __future__ import annotations

from torch import Tensor

from orthoft.merging.methods.entrywise import Consensus, agree, require_density, threshold, trim
from orthoft.merging.methods.registry import method, weighted


@method("ties", rowwise=True, prepare=threshold)
def ties(
    x: Tensor,
    weights: Tensor,
    *,
    density: float = 0.2,
    consensus: Consensus = "mean",
    prepared: Tensor | None = None,
) -> Tensor:
    """Return the mean of the entries whose sign is that of the sum, after trimming each task to its largest entries.

    With ``y_t = w_t trim(x_t)`` and the elected sign ``s = sign(sum_t y_t)``, the result is, entry by entry, the mean
    of the ``y_t`` whose sign is ``s``, and 0 where ``s = 0``. ``trim`` keeps the ``int(density p q)`` entries, at least
    one, largest in magnitude, and all that equal the smallest of them. The weights scale the tasks before the election
    and are not divided out: equal weights w give w times the unweighted result. ``consensus="weighted_mean"`` divides
    them out, by the sum of the weights of the tasks that agree, and ``"sum"`` does not divide at all.

    Entrywise, hence different in each space.

    Raises:
        ValueError: ``density`` is outside (0, 1], or a weighted mean with a negative weight.
    """
    require_density(density)
    return agree(weighted(trim(x, density, prepared), weights), weights, consensus)
