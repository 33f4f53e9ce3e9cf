"""Oracles for merges with numbers from data: the definitions entry by entry, and minimisation by other algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import reference
import torch
from merging_case import Case
from torch import Tensor

Statistics = Sequence[Tensor] | None


def fisher(
    deltas: Sequence[Tensor], weights: Sequence[float], epsilon: float = 1e-6, statistics: Statistics = None
) -> Tensor:
    if statistics is None:
        return reference.mean(deltas, weights)
    merged = torch.zeros_like(deltas[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            shares = [w * (F[i, j].item() + epsilon) for w, F in zip(weights, statistics, strict=True)]
            values = [delta[i, j].item() for delta in deltas]
            merged[i, j] = sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)
    return merged


def regmean(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    reduce: float = 0.9,
    ridge: float = 1e-6,
    statistics: Statistics = None,
) -> Tensor:
    """By least squares on the rows of a factor of each matrix; the Gram matrices (n, n) act on the columns."""
    if statistics is None:
        return reference.mean(deltas, weights)
    n = deltas[0].shape[1]
    shift = ridge * sum(G.trace() / n for G in statistics) / len(statistics)
    inputs, outputs = [], []
    for w, G, delta in zip(weights, statistics, deltas, strict=True):
        H = torch.stack([torch.stack([G[i, j] * (1 if i == j else reduce) for j in range(n)]) for i in range(n)])
        values, vectors = torch.linalg.eigh(H + shift * torch.eye(n, dtype=H.dtype))
        rows = (w * values).clamp(min=0).sqrt()[:, None] * vectors.T
        inputs.append(rows)
        outputs.append(rows @ delta.T)
    return torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T


def hull_error(X: Tensor, points: Sequence[Tensor], grams: Sequence[Tensor]) -> float:
    return sum(torch.trace((X - y) @ G @ (X - y).T).item() for y, G in zip(points, grams, strict=True))


def frank_wolfe(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    steps: int = 10,
    zero: bool = False,
    statistics: Statistics = None,
) -> Tensor:
    """The steps on whole matrices, with the gradient in X and the best of the steps found from two derivatives."""
    points = [w * delta for w, delta in zip(weights, deltas, strict=True)]
    X = sum(points[1:], points[0]) / len(points)
    if statistics is None:
        return X
    vertices = [*points, torch.zeros_like(X)] if zero else points
    for _ in range(steps):
        gradient = 2 * sum((X - y) @ G for y, G in zip(points, statistics, strict=True))
        vertex = min(vertices, key=lambda v: (gradient * v).sum().item())
        slope = (gradient * (vertex - X)).sum().item()
        bend = 2 * sum(torch.trace((vertex - X) @ G @ (vertex - X).T).item() for G in statistics)
        if slope >= 0 or bend <= 0:
            break
        X = X + min(1.0, -slope / bend) * (vertex - X)
    return X


def nearest_on_simplex(c: Tensor) -> Tensor:
    ordered = c.sort(descending=True).values
    shifts = [(sum(ordered[: k + 1]) - 1) / (k + 1) for k in range(len(c))]
    last = max(k for k in range(len(c)) if ordered[k] > shifts[k])
    return (c - shifts[last]).clamp(min=0)


def hull_minimum(points: Sequence[Tensor], grams: Sequence[Tensor], vertices: Sequence[Tensor]) -> Tensor:
    """The minimum of `hull_error` over the hull of the vertices, by projected gradients."""
    total = sum(grams[1:], grams[0])
    target = sum(y @ G for y, G in zip(points, grams, strict=True))
    H = torch.stack([torch.stack([(u @ total * v).sum() for v in vertices]) for u in vertices])
    b = torch.stack([(target * v).sum() for v in vertices])
    c = torch.full_like(b, 1 / len(b))
    for _ in range(5000):
        c = nearest_on_simplex(c - (H @ c - b) / H.trace())
    return sum(share * v for share, v in zip(c, vertices, strict=True))


def ota(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    power: float = 0.5,
    density: float = 0.4,
    epsilon: float = 1e-6,
    statistics: Statistics = None,
) -> Tensor:
    if statistics is None:
        return reference.mean(deltas, weights)
    powers = [[[v**power for v in row] for row in moments.tolist()] for moments in statistics]
    every = [p for rows in powers for row in rows for p in row]
    floor = epsilon * sum(every) / len(every)
    scores = [(v * delta**2) for v, delta in zip(statistics, deltas, strict=True)]
    kept = max(1, int(density * deltas[0].numel()))
    smallest = [sorted(score.flatten().tolist(), reverse=True)[kept - 1] for score in scores]
    merged = torch.zeros_like(deltas[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            top = bottom = 0.0
            for t, delta in enumerate(deltas):
                score = scores[t][i, j].item()
                if density == 1 or (score >= smallest[t] and score > 0):
                    share = weights[t] * (powers[t][i][j] + floor)
                    top, bottom = top + share * delta[i, j].item(), bottom + share
            merged[i, j] = top / bottom if bottom > 0 else 0.0
    return merged


CASES: dict[str, Case] = {
    "fisher": Case(fisher, weights_scale=False, settings=({"epsilon": 1e-3},), idempotent={}),
    "regmean": Case(regmean, weights_scale=False, settings=({"reduce": 1.0, "ridge": 1e-3},), idempotent={}),
    "frank_wolfe": Case(frank_wolfe, settings=({"steps": 3}, {"zero": True}), idempotent={}),
    "ota": Case(ota, weights_scale=False, settings=({"power": 1.0, "density": 1.0},), idempotent={}),
}
