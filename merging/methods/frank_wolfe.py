"""Frank-Wolfe merging without the data: a convex combination of the tasks, vertex by vertex. arXiv 2503.12649."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.merging.methods.registry import method, weighted
from orthoft.merging.statistics import by_inputs, complete, takes


@method("frank_wolfe", entries=True)
@takes("gram")
def frank_wolfe(
    x: Tensor,
    weights: Tensor,
    *,
    steps: int = 10,
    zero: bool = False,
    statistics: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return an approximate minimum of ``f(X) = sum_t tr((X - y_t) G_t (X - y_t)^T)`` over the hull of the ``y_t``.

    ``y_t = w_t x_t``; ``G_t`` (n, n) is the Gram matrix of the task's inputs, the identity in a weight that not all
    tasks have one of. From the mean of the ``y_t``, each step goes towards the vertex ``argmin_t <grad f(X), y_t>``, as
    far as ``f`` falls: it never grows, and comes within O(1 / steps) of the minimum. With ``zero`` the base itself, the
    delta 0, is a vertex too. Without Gram matrices the mean is the minimum. It costs 2 T products with a Gram matrix;
    the steps are taken in the T coefficients.

    The published algorithm needs the models and example data at each step. There ``f`` is the models' loss and its
    gradient is taken anew at each iterate, here ``f`` is the error of each layer's outputs; there the vertex is chosen
    by the cosine with the gradient (the inner product in the paper, as here); there steps are a rate times
    ``2 / (i + 2)``, here the exact line search; and there the start and each move are merges of another method (TIES,
    task arithmetic), which may leave the hull, here they are means.

    Raises:
        ValueError: ``steps`` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps is how often a vertex is chosen, 1 or more, got {steps}")
    vertices = weighted(x, weights)
    grams = complete(statistics)
    H, b = quadratic(vertices) if grams is None else quadratic(*by_inputs(vertices, grams)[:2])
    c = torch.full_like(b, 1 / len(b))
    if zero:
        H, b, c = (torch.nn.functional.pad(part, (0, 1) * part.ndim) for part in (H, b, c))
    shares = minimised(H, b, c, steps)[: len(x)]
    return torch.einsum("t,tpq->pq", shares.to(x), vertices)


def quadratic(y: Tensor, grams: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return ``H`` (T, T), ``b`` (T,) in float64 with ``f(sum_t c_t y_t) = c^T H c - 2 b^T c + constant``.

    ``H_ij = <y_i G, y_j>`` with ``G = sum_k G_k``, and ``b_i = <y_i, sum_k y_k G_k>``.
    """
    if grams is None:
        images, known = len(y) * y, y.sum(0)
    else:
        matrices = [G.to(y) for G in grams]
        images, known = y @ sum(matrices[1:], matrices[0]), torch.zeros_like(y[0])
        for task, G in zip(y, matrices, strict=True):
            known = torch.addmm(known, task, G)
    flat = y.flatten(1)
    H, b = (images.flatten(1) @ flat.mT).double(), (flat @ known.flatten()).double()
    return (H + H.mT) / 2, b


def minimised(H: Tensor, b: Tensor, c: Tensor, steps: int) -> Tensor:
    """Return ``c`` (T,) after Frank-Wolfe steps with exact line search for ``c^T H c - 2 b^T c`` on the simplex."""
    for _ in range(steps):
        gradient = H @ c - b  # half of it
        direction = -c
        direction[gradient.argmin()] += 1
        gap, curvature = float(-gradient @ direction), float(direction @ H @ direction)
        if gap <= 0 or curvature <= 0:
            break
        c = c + min(1.0, gap / curvature) * direction
    return c
