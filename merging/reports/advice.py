"""Which method and which space suit some tasks: rules on measured numbers, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orthoft.merging.reports.diagnostics import WeightDiagnostics, combined, pair_mean

INDEPENDENT = 0.05  # cosines within twice this of 0, and overlaps within this of chance, are those of unrelated tasks
SHARED = 0.15  # from this much input overlap above chance, tasks read the same directions
QUARREL = 0.55  # from this share of opposite signs on, tasks pull apart: of normal entries, a cosine of -0.16
APART = 1e-3  # below this cross-talk, tasks read different inputs
UNEVEN = 3.0  # ratio of norms from which one task outweighs another
SWOLLEN = 2.5  # ratio of the norm of the sum to the mean norm of a task
LOSSY = 0.15  # share of the changes from which on what rounding adds to them is worth a word


@dataclass(frozen=True)
class Advice:
    """A method in a space, and one sentence why."""

    method: str
    space: str
    why: str


@dataclass(frozen=True)
class Findings:
    """The numbers that the rules look at, over all weights.

    Args:
        tasks: their names, in order.
        cosine, conflict, cross_talk: means over the pairs of tasks, None where there is nothing to compare.
        widest: the largest magnitude of a cosine.
        overlap, chance: mean input overlap, and that of unrelated tasks of these ranks. Output overlap says less:
            changes ``W (Q - I)`` of the same weight write where W does, whatever the rotations have in common.
        norms: by task.
        swelling: the norm of the plain sum, relative to the mean norm of a task.
        relative: norm of the largest task, relative to the weights it changes.
        ranks: the ranks of all tasks' factors.
        dense: the tasks without factors somewhere.
        turning: every task rotates every weight.
        defect: of these rotations, the largest ``||Q Q^T - I||_F`` of a block.
        rounding: what rounding to bfloat16 adds to the largest task, relative to its norm; None if the base is stored
            in something else.
    """

    tasks: tuple[str, ...]
    cosine: float | None
    widest: float | None
    conflict: float | None
    cross_talk: float | None
    overlap: float | None
    chance: float
    norms: tuple[float, ...]
    swelling: float
    relative: float
    ranks: tuple[int, ...]
    dense: tuple[str, ...]
    turning: bool
    defect: float | None
    rounding: float | None

    @property
    def excess(self) -> float:
        """Overlap above chance, 0 if nothing overlaps."""
        return max(0.0, (self.overlap or 0.0) - self.chance)


Rule = tuple[Callable[[Findings], bool], str, str, Callable[[Findings], str]]


def _alone(f: Findings) -> bool:
    return len(f.tasks) == 1


def _turning(f: Findings) -> bool:
    return len(f.tasks) > 1 and f.turning


def _apart(f: Findings) -> bool:
    return f.cross_talk is not None and f.cross_talk < APART


def _independent(f: Findings) -> bool:
    return f.widest is not None and f.widest < 2 * INDEPENDENT and f.excess < INDEPENDENT


def _quarrel(f: Findings) -> bool:
    return f.conflict is not None and f.conflict > QUARREL


def _alike(f: Findings) -> bool:
    """Say whether a sum overshoots each task, by ``(T - 1) c``, more than a mean falls short of it."""
    return f.cosine is not None and f.cosine > 1 / (len(f.tasks) + 1)


def _shared(f: Findings) -> bool:
    return f.excess > SHARED and not _alike(f)


# (when, method, space, why). The first that holds is the main advice; those below it that hold are further ones.
METHODS: tuple[Rule, ...] = (
    (_alone, "task_arithmetic", "auto", lambda f: "there is one source: nothing to reconcile"),
    (
        _turning,
        "mean",
        "rotation",
        lambda f: (
            f"all sources rotate the inputs of their weights (defect {f.defect or 0:.1e}): merged by their angles, the "
            "result is a rotation again"
        ),
    ),
    (
        _apart,
        "task_arithmetic",
        "auto",
        lambda f: (
            f"cross-talk of the input factors is {f.cross_talk:.1e}, below {APART:g}: the sum of Orthogonal Adaptation "
            "keeps each task"
        ),
    ),
    (
        _quarrel,
        "ties",
        "full",
        lambda f: (
            f"{100 * (f.conflict or 0):.0f} % of the entries are pushed in opposite ways (chance is 50 %): elect signs "
            "instead of cancelling"
        ),
    ),
    (
        _alike,
        "mean",
        "auto",
        lambda f: (
            f"the tasks point the same way (mean cosine {f.cosine:.2f}): a sum overshoots each by "
            f"{(len(f.tasks) - 1) * (f.cosine or 0):.0%}, a mean falls short of it by less"
        ),
    ),
    (
        _shared,
        "tsv",
        "auto",
        lambda f: (
            f"the tasks read the same inputs (overlap {f.overlap:.2f}, chance {f.chance:.2f}) without agreeing (cosine "
            f"{f.cosine or 0:.2f}): decorrelate their singular vectors"
        ),
    ),
    (
        _independent,
        "task_arithmetic",
        "auto",
        lambda f: (
            f"cosines of at most {f.widest:.2f} and an input overlap of {f.overlap or 0:.2f} (chance {f.chance:.2f}) "
            "are those of unrelated tasks: a sum keeps each"
        ),
    ),
)
# What holds whatever the method: (when, method or "any", space, why).
CIRCUMSTANCES: tuple[Rule, ...] = (
    (
        lambda f: f.swelling > SWOLLEN and not f.turning,
        "opcm",
        "auto",
        lambda f: (
            f"the sum of {len(f.tasks)} tasks has {f.swelling:.1f} times the norm of one: OPCM keeps the mean norm, "
            "and so does rescale=model with any method"
        ),
    ),
    (
        lambda f: len(set(f.ranks)) > 1 and not f.dense and not f.turning,
        "any",
        "core",
        lambda f: f"the ranks differ ({_list(sorted(set(f.ranks)))}): core space holds them all exactly",
    ),
    (
        lambda f: bool(f.dense) and not f.turning,
        "any",
        "full",
        lambda f: (
            f"{_list(f.dense)} changes weights without low-rank factors (DoRA, rotations, checkpoints): those weights "
            "merge entry by entry"
        ),
    ),
    (
        lambda f: len(f.norms) > 1 and max(f.norms) > UNEVEN * max(min(f.norms), 1e-30),
        "any",
        "auto",
        lambda f: (
            f"norms reach from {min(f.norms):.3g} to {max(f.norms):.3g}: the largest outweighs the rest unless weights "
            f"even them out, e.g. {_list(_evened(f))}"
        ),
    ),
    (
        lambda f: f.rounding is not None and f.rounding > LOSSY,
        "any",
        "auto",
        lambda f: (
            f"the changes are {f.relative:.2%} of the weights, and rounding to bfloat16 adds an error of about "
            f"{f.rounding or 0:.0%} of them: write float32 or a LoRA"
        ),
    ),
)
OTHERWISE = "no measured number speaks against a sum"


def advise(findings: Findings) -> list[Advice]:
    """Return the main advice first, then the other rules that hold."""
    held = [Advice(method, space, why(findings)) for when, method, space, why in METHODS if when(findings)] or [
        Advice("task_arithmetic", "auto", f"{OTHERWISE}{_measured(findings)}")
    ]
    return held + [Advice(method, space, why(findings)) for when, method, space, why in CIRCUMSTANCES if when(findings)]


def findings(
    tasks: Sequence[str],
    weights: Sequence[tuple[tuple[int, int], WeightDiagnostics]],
    turning: bool,
    dense: Sequence[str],
    lost: Sequence[float],
) -> Findings:
    """Return the numbers for the rules from (shape, diagnostics) of each weight; see `Findings` for the rest.

    ``lost`` is the norm of what rounding to bfloat16 adds to each task, empty if the base is stored in something else.
    """
    whole = combined(told for _, told in weights)
    assert whole is not None, "a plan has weights"
    norms = [norm or 0.0 for norm in whole.task_norms]
    squares = sum(
        (cosine or 0.0) * (told.task_norms[i] or 0.0) * (told.task_norms[j] or 0.0)
        for _, told in weights
        for i, row in enumerate(told.cosine)
        for j, cosine in enumerate(row)
    )
    mean, largest = sum(norms) / len(norms), norms.index(max(norms))
    return Findings(
        tasks=tuple(tasks),
        cosine=pair_mean(whole.cosine),
        widest=max((abs(c) for i, row in enumerate(whole.cosine) for c in row[:i] if c is not None), default=None),
        conflict=pair_mean(whole.sign_conflict),
        cross_talk=pair_mean(whole.cross_talk),
        overlap=pair_mean(whole.input_overlap),
        chance=_chance(weights),
        norms=tuple(norms),
        swelling=math.sqrt(max(squares, 0.0)) / mean if mean > 0 else 0.0,
        relative=norms[largest] / whole.base_norm if whole.base_norm else 0.0,
        ranks=tuple(rank for shape, told in weights if min(shape) > 1 for rank in told.ranks if rank),
        dense=tuple(dense),
        turning=turning,
        defect=max((one for one in whole.rotation_defect if one is not None), default=None),
        rounding=lost[largest] / norms[largest] if lost and norms[largest] > 0 else None,
    )


def _chance(weights: Sequence[tuple[tuple[int, int], WeightDiagnostics]]) -> float:
    """Return the mean input overlap of unrelated tasks, ``max(r_i, r_j) / n``."""
    each = [
        max(len(spectrum) if rank is None else rank for rank, spectrum in zip(told.ranks, told.spectra, strict=True))
        / shape[1]
        for shape, told in weights
        if sum(norm is not None for norm in told.task_norms) > 1
    ]
    return min(1.0, sum(each) / len(each)) if each else 0.0


def _measured(f: Findings) -> str:
    if f.cosine is None or f.overlap is None:
        return ""
    conflict = "" if f.conflict is None else f"sign conflict {f.conflict:.2f}, "
    return f" (mean cosine {f.cosine:.2f}, {conflict}input overlap {f.overlap:.2f} with chance {f.chance:.2f})"


def _evened(f: Findings) -> list[str]:
    mean = sum(f.norms) / len(f.norms)
    return [f"{name}={mean / norm:.2g}" for name, norm in zip(f.tasks, f.norms, strict=True) if norm > 0]


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
