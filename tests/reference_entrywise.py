"""Oracles for the entrywise and the geometric merges: definitions on float64 matrices, entry by entry, with loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import reference
import torch
from merging_case import Case
from torch import Tensor

Tasks = Sequence[Tensor]


def scaled(tasks: Tasks, weights: Sequence[float]) -> list[Tensor]:
    return [weight * task for weight, task in zip(weights, tasks, strict=True)]


def largest_first(task: Tensor) -> list[float]:
    return sorted(task.abs().flatten().tolist(), reverse=True)


def trimmed(task: Tensor, density: float) -> Tensor:
    smallest = largest_first(task)[max(1, int(density * task.numel())) - 1]
    return task * (task.abs() >= smallest)


def agreed(tasks: Tasks, weights: Sequence[float], consensus: str | None) -> Tensor:
    """The tasks are weighted already; the weights are for what "weighted_mean" divides by."""
    merged = torch.zeros_like(tasks[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            values = [task[i, j].item() for task in tasks]
            agreeing = [t for t, value in enumerate(values) if consensus is None or value * sum(values) > 0]
            total = sum(values[t] for t in agreeing)
            if agreeing and consensus == "mean":
                total /= len(agreeing)
            elif agreeing and consensus == "weighted_mean":
                total /= sum(weights[t] for t in agreeing)
            merged[i, j] = total
    return merged


def magnitude(deltas: Tasks, weights: Sequence[float], density: float = 0.2) -> Tensor:
    return sum(scaled([trimmed(delta, density) for delta in deltas], weights), torch.zeros_like(deltas[0]))


def drawn(deltas: Tasks, generator: torch.Generator) -> list[Tensor]:
    """One number after the other: row by row, in a row task by task."""
    numbers = [torch.zeros_like(delta) for delta in deltas]
    for i in range(deltas[0].shape[0]):
        for task in numbers:
            for j in range(task.shape[1]):
                task[i, j] = torch.rand((), generator=generator)
    return numbers


def dare(
    deltas: Tasks,
    weights: Sequence[float],
    drop: float = 0.5,
    consensus: str | None = None,
    *,
    generator: torch.Generator,
) -> Tensor:
    numbers = drawn(deltas, generator)
    kept = [delta * (number >= drop) / (1 - drop) for delta, number in zip(deltas, numbers, strict=True)]
    return agreed(scaled(kept, weights), weights, consensus)


def keep_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    keep = torch.zeros_like(delta)
    for i, row in enumerate(delta.abs().tolist()):
        for j, value in enumerate(row):
            rank = sum(other < value for other in row) + sum(other == value for other in row[:j])
            keep[i, j] = density - epsilon + 2 * epsilon * (rank / (len(row) - 1))
    return keep


def della(
    deltas: Tasks,
    weights: Sequence[float],
    density: float = 0.5,
    epsilon: float = 0.15,
    consensus: str | None = "mean",
    *,
    generator: torch.Generator,
) -> Tensor:
    pruned = []
    for delta, number in zip(deltas, drawn(deltas, generator), strict=True):
        keep = keep_probabilities(delta, density, epsilon)
        pruned.append(delta * (number < keep) / keep)
    return agreed(scaled(pruned, weights), weights, consensus)


def breadcrumbs(
    deltas: Tasks,
    weights: Sequence[float],
    density: float = 0.9,
    gamma: float = 0.01,
    consensus: str | None = None,
) -> Tensor:
    pruned = []
    for delta in deltas:
        sizes = largest_first(delta)
        kept = max(1, int(density * len(sizes)))
        first = min(int(gamma * len(sizes)), len(sizes) - kept)
        pruned.append(delta * (delta.abs() <= sizes[first]) * (delta.abs() >= sizes[first + kept - 1]))
    return agreed(scaled(pruned, weights), weights, consensus)


def sce(deltas: Tasks, weights: Sequence[float], density: float = 1.0) -> Tensor:
    tasks = scaled(deltas, weights)
    if density < 1:
        mean = sum(tasks[1:], tasks[0]) / len(tasks)
        variance = sum(((task - mean) ** 2 for task in tasks), torch.zeros_like(mean)) / len(tasks)
        variance = variance * (variance > 1e-25)
        varying = int((variance > 0).sum())
        chosen = variance >= largest_first(variance)[max(1, int(density * varying)) - 1]
        tasks = [task * chosen for task in tasks]
    energy = [(task**2).mean().item() for task in tasks]
    merged = torch.zeros_like(deltas[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            values = [task[i, j].item() for task in tasks]
            agreeing = [t for t, value in enumerate(values) if value * sum(values) > 0]
            if agreeing:
                merged[i, j] = sum(energy[t] * values[t] for t in agreeing) / sum(energy[t] for t in agreeing)
    return merged


def pcb(deltas: Tasks, weights: Sequence[float], density: float = 0.1, clip: float = 0.01) -> Tensor:
    tasks = []
    for task in scaled(deltas, weights):
        ends, sizes = int(clip * task.numel()), largest_first(task)
        tasks.append(task.sign() * task.abs().clamp(sizes[-1 - ends], sizes[ends]))
    marks = [t.sign() * (t.abs() - t.abs().min()) / (t.abs().max() - t.abs().min()) for t in tasks]
    shares = []
    for mark in marks:
        balance = sum((torch.tanh(mark * other) for other in marks), torch.zeros_like(mark))
        score = torch.exp(len(marks) * mark**2) * balance
        best = sorted(score.flatten().tolist(), reverse=True)
        cut = best[min(max(1, int(density * len(best))), len(best) - 1)]
        shares.append((score.clamp(min=cut) - cut) / (best[0] - cut))
    total = sum(shares[1:], shares[0])
    products = [share * task for share, task in zip(shares, tasks, strict=True)]
    return sum(products[1:], products[0]) / total.clamp(min=1e-300)


def cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def on_arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    if not a.any() or not b.any() or abs(cosine(a, b)) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine(a, b))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def points(deltas: Tasks, on: str, base: Tensor | None) -> list[Tensor]:
    """What the geometric methods combine, and at the end the origin to which the result is a delta."""
    if on == "deltas" or base is None:
        return [*deltas, torch.zeros_like(deltas[0])]
    return [*(base + delta for delta in deltas), base]


def slerp(
    deltas: Tasks, weights: Sequence[float], t: float | None = None, on: str = "deltas", base: Tensor | None = None
) -> Tensor:
    first, second, origin = points(deltas, on, base)
    return on_arc(first, second, weights[1] / sum(weights) if t is None else t) - origin


def multislerp(
    deltas: Tasks, weights: Sequence[float], on: str = "deltas", base: Tensor | None = None, steps: int = 1
) -> Tensor:
    """With the steps through the tangent space, over and over: the first leaves the mean direction where it is."""
    *tasks, origin = points(deltas, on, base)
    weights = [weight / sum(weights) for weight in weights]
    units = [task / task.norm() for task in tasks]
    mean = reference.task_arithmetic(units, weights)
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = reference.task_arithmetic([unit - (unit * mean).sum() * mean for unit in units], weights)
        mean = moved(mean, tangent)
    return sum(weight * task.norm().item() for weight, task in zip(weights, tasks, strict=True)) * mean - origin


def moved(mean: Tensor, tangent: Tensor) -> Tensor:
    length = tangent.norm()
    mean = length.cos() * mean + length.sin() / length.clamp(min=1e-30) * tangent
    return mean / mean.norm()


def karcher(
    deltas: Tasks,
    weights: Sequence[float],
    on: str = "deltas",
    max_iter: int = 1000,
    tol: float = 0.0,
    base: Tensor | None = None,
) -> Tensor:
    *tasks, origin = points(deltas, on, base)
    weights = [weight / sum(weights) for weight in weights]
    units = [task / task.norm() for task in tasks]
    mean = reference.task_arithmetic(units, weights)
    mean = mean / mean.norm()
    for _ in range(max_iter):
        logs = []
        for unit in units:
            angle = math.acos(max(-1.0, min(1.0, (unit * mean).sum().item())))
            logs.append((unit - math.cos(angle) * mean) * (angle / math.sin(angle) if angle > 1e-7 else 1.0))
        mean = moved(mean, reference.task_arithmetic(logs, weights))
    return sum(weight * task.norm().item() for weight, task in zip(weights, tasks, strict=True)) * mean - origin


def stock_ratio(tasks: Tasks) -> float:
    tasks = [task for task in tasks if task.any()]
    pairs = [cosine(a, b) for i, a in enumerate(tasks) for b in tasks[:i]]
    if not pairs:
        return 1.0
    c = sum(pairs) / len(pairs)
    return len(tasks) * c / (1 + (len(tasks) - 1) * c) if c > 0 else 0.0


def model_stock(deltas: Tasks, weights: Sequence[float], filter_wise: bool = False) -> Tensor:
    tasks = scaled(deltas, weights)
    mean = sum(tasks[1:], tasks[0]) / len(tasks)
    if not filter_wise:
        return stock_ratio(tasks) * mean
    return torch.stack([stock_ratio([task[i] for task in tasks]) * mean[i] for i in range(len(mean))])


CASES = {
    "ties": Case(reference.ties, settings=({"density": 0.5}, {"density": 1.0}), idempotent={"density": 1.0}),
    "magnitude": Case(magnitude, settings=({"density": 0.5}, {"density": 1e-9}), idempotent={"density": 1.0}),
    "dare": Case(
        dare,
        settings=({"drop": 0.1}, {"drop": 0.2, "consensus": "mean"}, {"consensus": "sum"}),
        symmetric=False,
        idempotent={"drop": 0.0},
    ),
    "della": Case(
        della,
        settings=({"density": 0.7, "epsilon": 0.3}, {"consensus": None}, {"epsilon": 0.0, "consensus": "sum"}),
        symmetric=False,
        idempotent={"density": 1.0, "epsilon": 0.0},
    ),
    "breadcrumbs": Case(
        breadcrumbs,
        settings=({"density": 0.3, "gamma": 0.2}, {"density": 0.9, "gamma": 0.5}, {"consensus": "mean"}),
        idempotent={"density": 1.0},
    ),
    "sce": Case(sce, settings=({"density": 0.3},), idempotent={}),
    "pcb": Case(pcb, settings=({"density": 0.5, "clip": 0.1}, {"clip": 0.0})),
    "slerp": Case(slerp, tasks=2, weights_scale=False),
    "multislerp": Case(multislerp, idempotent={}, weights_scale=False),
    "karcher": Case(karcher, idempotent={}, weights_scale=False),
    "model_stock": Case(model_stock, settings=({"filter_wise": True},), idempotent={}),
}
