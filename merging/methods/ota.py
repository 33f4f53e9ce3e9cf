"""OTA with FFG: tasks averaged by the curvature that Adam has seen, each on its salient entries. arXiv 2509.11167."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthoft.merging.methods.entrywise import require_density, threshold
from orthoft.merging.methods.mean import mean
from orthoft.merging.methods.registry import method
from orthoft.merging.statistics import check_weights, complete, takes


@method("ota", entries=True)
@takes("second_moment")
def ota(
    x: Tensor,
    weights: Tensor,
    *,
    power: float = 0.5,
    density: float = 0.4,
    epsilon: float = 1e-6,
    statistics: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return ``sum_t w_t P_t o m_t o x_t / sum_t w_t P_t o m_t``, entry by entry, 0 where all tasks are masked.

    ``P_t = v_t^power + epsilon mean(v^power)`` (p, q) with Adam's second moments ``v_t``, the mean over all tasks and
    entries of this weight. The mask ``m_t`` of FFG keeps the share ``density`` of the task's entries with the largest
    ``v_t x_t^2`` in this weight, and all that equal the smallest of them, but none where that is 0; at density 1
    nothing is masked.

    Two definitions differ from the published code. Its masks have absolute thresholds on ``v_t x_t^2``, found for each
    model beforehand to keep about 40 %: a share needs no search, and each weight keeps its part. And its epsilon
    is absolute, which has to change with the scale of the gradients. A weight that not all tasks have second moments of
    becomes the weighted mean, unmasked.

    Raises:
        ValueError: a weight is negative or all are zero, ``power`` or ``epsilon`` is negative, or ``density`` is
            outside (0, 1].
    """
    if power < 0 or epsilon < 0:
        raise ValueError(f"power and epsilon are 0 or more, got {power} and {epsilon}")
    require_density(density)
    check_weights("ota", weights)
    moments = complete(statistics)
    if moments is None:
        return mean(x, weights)
    floor = epsilon * sum(float((v.to(x) ** power).mean()) for v in moments) / len(moments)
    total, merged = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for w, v, task in zip(weights.tolist(), moments, x, strict=True):
        v = v.to(x)
        share = w * (v**power + floor) * salient(v, task, density)  # (p, q)
        total += share
        merged += share * task
    return torch.where(total > 0, merged / total, 0.0)


def salient(v: Tensor, task: Tensor, density: float) -> Tensor:
    """Return the mask of the share ``density`` of entries, at least one, with the largest ``v o task^2``, if not 0."""
    if density == 1:
        return torch.ones_like(task, dtype=torch.bool)
    score = v.sqrt() * task.abs()  # in the same order, but does not underflow
    return (score >= threshold(score, density=density)) & (score > 0)
