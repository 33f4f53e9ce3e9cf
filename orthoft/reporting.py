"""What the adapters of a model are: how orthogonal, how far from the identity, how large, how costly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from orthoft.adapter import Adapter, InputRotation
from orthoft.layer import OrthoLayer
from orthoft.layouts import LinearLayout, loaded

COLUMNS = ("layer", "adapter", "shape", "|QQ^T - I|", "angle", "rms angle", "parameters", "bytes", "FLOPs")


@dataclass(frozen=True)
class AdapterReport:
    """One adapter on one layer.

    ``defect`` is ``||Q Q^T - I||_2`` as float32 computes it, ``angle`` and ``rms_angle`` are the largest and the root
    mean square rotation angle in degrees (None where the adapter does not act on the inputs;
    by how far vectors move where it also stretches), ``flops`` what it costs
    per token relative to the frozen layer's ``2 m n`` operations (None where it is not a linear layer),
    ``requantization_error`` that of a merge into a quantised weight.
    """

    layer: str
    adapter: str
    shape: tuple[int, int]
    defect: float | None
    angle: float | None
    rms_angle: float | None
    parameters: int
    bytes: int
    flops: float | None
    requantization_error: float | None


class Report(list[AdapterReport]):
    """The adapters of a model; prints as a table."""

    def to_dict(self) -> list[dict[str, Any]]:
        return [asdict(line) for line in self]

    def __str__(self) -> str:
        lines = [COLUMNS, *(_cells(line) for line in self), _total(self)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        aligned = [[*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])] for line in lines]
        return "\n".join("  ".join(cells).rstrip() for cells in aligned)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@torch.no_grad()
def report(model: nn.Module) -> Report:
    """Return one line for each adapter on each layer of ``model``.

    Raises:
        ValueError: the model has no layer with an orthoft adapter.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, OrthoLayer)]
    if not layers:
        raise ValueError("the model has no orthoft adapters: apply one with peft.get_peft_model first")
    return Report(_one(name, layer, key) for name, layer in layers for key in layer.adapters)


def _one(name: str, layer: OrthoLayer, key: str) -> AdapterReport:
    adapter = layer.adapters[key]
    with loaded(adapter):
        turned = _turns(adapter, layer.in_features) if isinstance(adapter, InputRotation) else (None, None, None)
    frozen = 2 * layer.in_features * layer.out_features
    return AdapterReport(
        name.removeprefix("base_model.model."),
        key,
        (layer.out_features, layer.in_features),
        defect=turned[0],
        angle=turned[1],
        rms_angle=turned[2],
        parameters=sum(p.numel() for p in adapter.parameters()),
        bytes=sum(t.numel() * t.element_size() for t in _state(adapter)),
        flops=adapter.flops_per_token() / frozen if isinstance(layer.layout, LinearLayout) else None,
        requantization_error=layer.requantization_error,
    )


def _state(adapter: Adapter) -> Iterator[Tensor]:
    yield from adapter.parameters()
    yield from adapter.buffers()


def _turns(adapter: InputRotation, features: int) -> tuple[float, float, float]:
    """Return ``||Q Q^T - I||_2``, the largest and the rms angle in degrees, all from products with ``Q`` alone.

    A rotation by t moves vectors by ``2 sin(t / 2)``, so that ``||Q - I||_2`` tells the largest angle, and the mean
    squared displacement of an orthonormal basis the rms.
    """
    state = next(adapter.parameters())
    eye = torch.eye(features, dtype=torch.promote_types(state.dtype, torch.float32), device=state.device)
    parts = torch.tensor_split(eye, eye.shape[0] // 256 + 1)
    moved = sum(float(torch.sum((adapter.rotate(rows) - rows) ** 2)) for rows in parts)
    displaced = _norm(lambda x: adapter.rotate(x) - x, lambda x: adapter.rotate(x, transpose=True) - x, eye)

    def defect(x: Tensor) -> Tensor:
        return adapter.rotate(adapter.rotate(x), transpose=True) - x

    return _norm(defect, defect, eye), _angle(displaced), _angle(math.sqrt(moved / features))


def _angle(displacement: float) -> float:
    return math.degrees(2 * math.asin(min(1.0, displacement / 2)))


def _norm(apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], eye: Tensor) -> float:
    """Return ``||A||_2`` by 30 steps of subspace iteration, from a seeded start; within a percent or two from below."""
    size = min(16, eye.shape[0])
    x = torch.randn(size, eye.shape[0], generator=torch.Generator().manual_seed(0)).to(eye)
    for _ in range(30):
        x = torch.linalg.qr(adjoint(apply(x)).mT).Q.mT
    return float(torch.linalg.matrix_norm(apply(x), ord=2))


def _cells(line: AdapterReport) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    return (
        line.layer,
        line.adapter,
        f"{line.shape[0]} x {line.shape[1]}",
        shown(line.defect, "{:.1e}"),
        shown(line.angle, "{:.2f}°"),
        shown(line.rms_angle, "{:.2f}°"),
        f"{line.parameters:,}",
        f"{line.bytes:,}",
        shown(line.flops, "{:.2%}"),
    )


def _total(lines: Report) -> tuple[str, ...]:
    defects = [line.defect for line in lines if line.defect is not None]
    angles = [line.angle for line in lines if line.angle is not None]
    return (
        f"{len(lines)} adapters",
        "",
        "",
        f"{max(defects):.1e}" if defects else "-",
        f"{max(angles):.2f}°" if angles else "-",
        "",
        f"{sum(line.parameters for line in lines):,}",
        f"{sum(line.bytes for line in lines):,}",
        "",
    )
