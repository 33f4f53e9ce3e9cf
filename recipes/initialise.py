"""Train to merge: each task's subspace chosen from inputs of all tasks, then set and frozen in its adapter.

LoRA reads its inputs through rows ``A`` that stay as chosen, and trains ``B`` from zero: half of LoRA's parameters.
PSOFT turns within rows ``V``, its basis. Both are saved as ever, so that a merge reads ordinary adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from orthoft.adapters.psoft import PSOFTLayer, SubspaceRotation
from orthoft.errors import unknown
from orthoft.merging.weightwise import weight_generator
from orthoft.quantization import quantization_backend
from orthoft.recipes import subspaces
from orthoft.recipes.base_weights import linear_layers
from orthoft.recipes.statistics import counted_grams
from orthoft.recipes.subspaces import RIDGE, mean_of_others, mutually_orthogonal

Method = Literal["osrm", "contrastive", "orthogonal", "principal"]
NEEDS_INPUTS = ("osrm", "contrastive")
UNCHANGED = (True, False, "gaussian")  # values of init_lora_weights that leave the base as it is
Rows = Mapping[str, Tensor]  # by the base's name of the weight


@torch.no_grad()
def covariances(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return ``C = X^T X / N`` (n, n) in float64 of the inputs of each linear layer, by the base's names of weights.

    N counts the tokens that the layer sees and that are not padding. Runs in evaluation mode, without labels, and
    leaves the model's modes as they were. Layers with the very same inputs, one after the other, share one tensor.

    Args:
        names: of the weights to look at, all unless given.

    Raises:
        ValueError: no batches, or no layer of these names.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    shown = ({key: value.to(device) for key, value in batch.items() if key != "labels"} for batch in batches)
    model.eval()
    try:
        grams, tokens = counted_grams(model, shown, ["*"] if names is None else names, lambda examples: None)
    finally:
        for module, training in modes:
            module.training = training
    if not grams:
        raise ValueError("there are no inputs to learn subspaces from: the batches are empty")
    found: dict[str, Tensor] = {}
    last: Tensor | None = None
    for name, gram in grams.items():
        C = gram.view(max(gram.shape), -1).double().cpu() / tokens[name]
        last = found[name] = last if last is not None and torch.equal(last, C) else C
    return found


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights (m, n) of linear layers of a model, outputs x inputs, by the base's names.

    Raises:
        ValueError: a name that is none of a linear layer.
    """
    layers = dict(linear_layers(model))
    found = {}
    for name in names:
        if name not in layers:
            raise unknown("linear layer", name, layers)
        found[name] = base_weight(*layers[name])
    return found


def base_weight(layer: nn.Module, inputs_first: bool) -> Tensor:
    """Return the weight (m, n) of one of `linear_layers`, outputs x inputs, in floating point where it is quantised."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    backend = quantization_backend(base)
    weight: Tensor = base.weight if backend is None else backend.get_base_weight(base)
    return (weight.mT if inputs_first else weight).detach()


def choose(
    method: Method,
    ranks: Sequence[Mapping[str, int]],
    weights: Rows,
    inputs: Sequence[Rows] = (),
    *,
    general: Rows | None = None,
    ridge: float = RIDGE,
    seed: int = 0,
    rotations: bool = False,
) -> list[dict[str, Tensor]]:
    """Return for each task, by the base's names, the rows (r, n) in float32 through which its adapter reads.

    Args:
        method: see `orthoft.recipes.subspaces`.
        ranks: by task and weight, r; a weight that a task does not adapt is missing.
        weights: (m, n) by name, see `weights_of`; of each the shape, and with "principal" the values, are used.
        inputs: one result of `covariances` per task, for "osrm" and "contrastive".
        general: covariances of general text, which count as one more task to keep away from.
        seed: of "orthogonal"; each weight has its own basis.
        rotations: make the rows of all tasks mutually orthonormal, as PSOFT needs them.

    Raises:
        ValueError: an unknown method, ranks that do not fit, or a weight without inputs.
    """
    if method not in get_args(Method):
        raise unknown("way to choose subspaces", method, get_args(Method))
    if method in NEEDS_INPUTS and len(inputs) != len(ranks):
        raise ValueError(f"{method!r} needs inputs of each of {len(ranks)} tasks, got those of {len(inputs)}")
    chosen: list[dict[str, Tensor]] = [{} for _ in ranks]
    made: dict[tuple[int, ...], list[Tensor]] = {}  # layers that share their inputs share the eigenproblems
    for name, weight in weights.items():
        of_tasks = [own.get(name, 0) for own in ranks]
        if method == "orthogonal":
            rows = subspaces.orthogonal(of_tasks, weight.shape[1], weight_generator(seed, name))
        elif method == "principal":
            rows = subspaces.principal(of_tasks, weight)
        else:
            own = _of_layer(method, name, inputs)
            text = None if general is None else _of_layer(method, name, [general])[0]
            key = (*map(id, own), id(text), *of_tasks)
            if key not in made:
                made[key] = _from_inputs(method, of_tasks, own, text, ridge)
            rows = made[key]
        for task, r, A in zip(chosen, of_tasks, mutually_orthogonal(rows) if rotations else rows, strict=True):
            if r:
                task[name] = A.float().cpu().contiguous()
    return chosen


def _from_inputs(
    method: Method, ranks: Sequence[int], inputs: Sequence[Tensor], general: Tensor | None, ridge: float
) -> list[Tensor]:
    rows = []
    for task, (own, r) in enumerate(zip(inputs, ranks, strict=True)):
        others = mean_of_others(inputs, task, general)
        if not r:
            rows.append(own.new_zeros(0, len(own)))
        elif method == "osrm":
            rows.append(subspaces.osrm(others, r))
        else:
            rows.append(subspaces.contrastive(own, others, r, ridge))
    return rows


def _of_layer(method: Method, name: str, inputs: Sequence[Rows]) -> list[Tensor]:
    """Return each task's covariance of one layer."""
    for own in inputs:
        if name not in own:
            raise ValueError(
                f"{method!r} needs inputs of {name!r}, which is not called or no linear layer: leave it out"
            )
    return [own[name] for own in inputs]


@torch.no_grad()
def initialise(model: nn.Module, rows: Rows, adapter: str = "default", *, frozen: bool = True) -> None:
    """Set the rows that an adapter of a PEFT model reads through, and freeze them; the adapter starts at the identity.

    Of LoRA ``A`` is set, and trains from there unless it is ``frozen``; ``B`` is zero and trained. Of PSOFT the basis
    is set. To call it just before training: PEFT's ``set_adapter`` and ``load_adapter`` make every parameter of an
    adapter train again.

    Raises:
        ValueError: a layer without such an adapter, another rank, or an adapter that changes or rebuilds its base.
    """
    layers = dict(linear_layers(model))
    for name, A in rows.items():
        layer = layers[name][0] if name in layers else None
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            _set_lora(model, layer, adapter, A, name, frozen)
        elif isinstance(layer, PSOFTLayer) and adapter in layer.adapters:
            _set_psoft(layer.adapters[adapter], A, name)
        else:
            raise ValueError(f"{name!r} has no LoRA or PSOFT adapter {adapter!r} whose subspace could be chosen")


def _set_lora(model: Any, layer: LoraLayer, adapter: str, A: Tensor, name: str, frozen: bool) -> None:
    start = model.peft_config[adapter].init_lora_weights
    if start not in UNCHANGED:
        raise ValueError(f"init_lora_weights={start!r} changes the base weight for a subspace of its own: leave it out")
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    _expect(A, a, name)
    a.copy_(A)
    b.zero_()
    a.requires_grad_(not frozen)


def _set_psoft(held: Any, V: Tensor, name: str) -> None:
    assert isinstance(held, SubspaceRotation)
    if not held.save_basis:
        raise ValueError(f"a chosen subspace must be saved with the adapter of {name!r}: set save_basis to true")
    _expect(V, held.basis, name)
    held.basis.copy_(V)


def _expect(rows: Tensor, place: Tensor, name: str) -> None:
    if rows.shape != place.shape:
        raise ValueError(f"the adapter of {name!r} reads through {tuple(place.shape)}, got rows {tuple(rows.shape)}")
