"""Statistics of a fine-tuned model, which some merge methods use: Fisher information, Gram matrices, second moments.

The files are those of `orthoft.merging.statistics`. The model may carry PEFT adapters of any kind that can be merged:
the statistics are of the adapted weights, under the names that the base has for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from orthoft.errors import unknown
from orthoft.merging.files.safetensors_file import write_tensors
from orthoft.merging.resume.partial import new_file
from orthoft.merging.statistics import statistics_file
from orthoft.recipes.base_weights import adapters_merged, base_parameters, linear_layers
from orthoft.recipes.gradients import gradients

Batch = dict[str, Any]
Count = Callable[[int], object]
BETA = 0.999  # how much of Adam's second moments is left after a step, by default
Found = TypeVar("Found")


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    kind: Literal["fisher", "gram"],
    out: str | Path,
    *,
    examples: int = 256,
    only: Sequence[str] = ("*",),
    overwrite: bool = False,
    progress: bool = True,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write the statistics of a model on the first ``examples`` of some batches, and return the file.

    Runs in evaluation mode and leaves the model as it was, bit for bit. Sums are kept in float32 on the model's device.

    Args:
        batches: keyword arguments of the model, with ``labels`` for "fisher"; tensors have one row per example.
        kind: "fisher", see `squared_gradients`, or "gram", see `input_grams`.
        out: a file that ends in .safetensors, or a folder for ``statistics.safetensors``.
        only: glob patterns of the base's names of weights, of which one has to match.
        more: what the file's metadata say beside kind and number of examples.

    Raises:
        ValueError: an unknown kind, no examples, a model that gives no loss, or no weight that matches.
        FileExistsError: the file exists.
    """
    makers = {"fisher": squared_gradients, "gram": input_grams}
    if kind not in makers:
        raise unknown("kind of statistics to collect", kind, makers)
    file = _free(statistics_file(out), overwrite)
    seen = 0
    with tqdm(total=examples, desc=kind, unit="example", disable=not progress) as bar, _evaluation(model):

        def count(size: int) -> None:
            nonlocal seen
            seen += size
            bar.update(size)

        sums = makers[kind](model, _first(batches, examples, next(model.parameters()).device), only, count)
    if not seen:
        raise ValueError("there are no examples: the batches are empty")
    told = {"kind": kind, "examples": str(seen), **(more or {})}
    return _save({name: total.div_(seen) for name, total in sums.items()}, file, told)


def adam_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    examples: int = 256,
    only: Sequence[str] = ("*",),
    overwrite: bool = False,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write the second moments that Adam would have at this model, see `collect` for the arguments; return the file.

    ``v = (1 - b) sum_s b^(S - s) g_s^2 / (1 - b^S)``, b = 0.999, with the gradient ``g_s`` of the s-th of S batches on
    which the weight's loss depends, in float32. An adapter's own optimizer has none of the base's weights.

    Raises:
        ValueError: a model that gives no loss, or no weight that matches.
        FileExistsError: the file exists.
    """
    file = _free(statistics_file(out), overwrite)
    moments: dict[str, Tensor] = {}
    steps: Counter[str] = Counter()

    def add(name: str, gradient: Tensor) -> None:
        if name not in moments:
            moments[name] = torch.zeros_like(gradient)
        moments[name].mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)
        steps[name] += 1

    with _evaluation(model), adapters_merged(model):
        found = _wanted(base_parameters(model), only)
        with gradients(found, add) as backward, torch.enable_grad():
            for batch in _first(batches, examples, next(model.parameters()).device):
                backward(_loss(model, batch))
    kept = {name: moment.div_(1 - BETA ** steps[name]) for name, moment in moments.items()}
    told = {"kind": "second_moment", "steps": str(max(steps.values(), default=0)), **(more or {})}
    return _save(kept, file, told)


def from_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    out: str | Path,
    *,
    only: Sequence[str] = ("*",),
    overwrite: bool = False,
) -> Path:
    """Write Adam's second moments ``v / (1 - beta_2^step)`` of the base's weights that it trains; return the file.

    They are those that Adam divides by. Parameters of adapters have none that speak of the base's weights.

    Raises:
        ValueError: the optimizer has second moments of none of the base's weights.
        FileExistsError: the file exists.
    """
    file = _free(statistics_file(out), overwrite)
    trained = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    decay = {parameter: group["betas"][1] for parameter, group in trained if "betas" in group}
    moments, steps = {}, 0
    for name, parameter in _wanted(base_parameters(model), only):
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state:
            steps = int(state["step"])
            moments[name] = state["exp_avg_sq"].float() / (1 - decay[parameter] ** steps)
    return _save(moments, file, {"kind": "second_moment", "steps": str(steps)})


def squared_gradients(
    model: nn.Module, batches: Iterable[Batch], only: Sequence[str], count: Count
) -> dict[str, Tensor]:
    """Return the sums over examples of the squared gradient of the loss, by the base's names of the weights.

    The empirical Fisher information (its diagonal) is their mean: the gradient is that of each example alone, one
    after the other, at the labels in the batch (give labels drawn from the model for the true Fisher information).
    Adapters are merged for the time being. Weights that the loss does not depend on are left out.

    Raises:
        ValueError: the model gives no loss.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        sums[name] = sums[name].addcmul_(gradient, gradient) if name in sums else gradient.square()

    with adapters_merged(model):
        found = _wanted(base_parameters(model), only)
        with gradients(found, add) as backward, torch.enable_grad():
            for example in _one_by_one(batches):
                backward(_loss(model, example))
                count(1)
    return sums


def input_grams(model: nn.Module, batches: Iterable[Batch], only: Sequence[str], count: Count) -> dict[str, Tensor]:
    """Return ``X^T X`` of the inputs (tokens, n) of each linear layer, summed, by the base's names of the weights.

    See `counted_grams`, which tells the numbers of tokens too.
    """
    return counted_grams(model, batches, only, count)[0]


@torch.no_grad()
def counted_grams(
    model: nn.Module, batches: Iterable[Batch], only: Sequence[str], count: Count
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return ``X^T X`` of the inputs (tokens, n) of each linear layer, summed, and tokens, by the base's names.

    (1, n, n), or (n, n, 1) of a Conv1D, as in `orthoft.merging.statistics`. An adapted layer's inputs are those before
    its adapter. Tokens that ``attention_mask`` or ``decoder_attention_mask`` (b, t) hides are left out of inputs
    (b, t, n) of its length. Layers that are not called are left out; of those called several times, all inputs count.
    """
    sums: dict[str, Tensor] = {}
    tokens: Counter[str] = Counter()
    masks: list[Tensor] = []

    def add(name: str, inputs_first: bool, x: Tensor) -> None:
        mask = next((mask for mask in masks if x.ndim == 3 and x.shape[:2] == mask.shape), None)
        rows = (x.flatten(0, -2) if mask is None else x[mask.bool()]).float()  # (tokens, n)
        if name not in sums:
            n = rows.shape[1]
            sums[name] = rows.new_zeros((n, n, 1) if inputs_first else (1, n, n))
        sums[name].view(rows.shape[1], -1).addmm_(rows.mT, rows)
        tokens[name] += len(rows)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name, first=first: add(name, first, args[0]))
        for name, (layer, first) in _wanted(linear_layers(model), only)
    ]
    try:
        for batch in batches:
            masks[:] = [batch[key] for key in ("attention_mask", "decoder_attention_mask") if key in batch]
            model(**batch)
            count(_size(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return sums, tokens


def _first(batches: Iterable[Mapping[str, Any]], examples: int, device: torch.device) -> Iterator[Batch]:
    """Give the batches up to a number of examples, the last one cut, on the device."""
    left = examples
    for batch in batches:
        if left <= 0:
            return
        yield {key: value[:left].to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        left -= _size(batch)


def _one_by_one(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for i in range(_size(batch)):
            yield {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}


def _size(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor)), 0)


def _loss(model: nn.Module, example: Batch) -> Tensor:
    loss: Tensor | None = model(**example).get("loss")
    if loss is None:
        raise ValueError(f"the model gives no loss for {', '.join(example)}: the batches need its labels")
    return loss


def refuse_unknown(model: nn.Module, kind: str, only: Sequence[str]) -> None:
    """Check that a model, which may be without storage, has weights of which this kind of numbers is measured.

    Raises:
        ValueError: none is named like one of the patterns.
    """
    _wanted(linear_layers(model) if kind == "gram" else base_parameters(model), only)


def _wanted(weights: Iterable[tuple[str, Found]], only: Sequence[str]) -> list[tuple[str, Found]]:
    found = [(name, what) for name, what in weights if any(fnmatchcase(name, pattern) for pattern in only)]
    if not found:
        raise ValueError(f"the model has no weight of such a kind that is named like {' or '.join(only)}")
    return found


def _free(file: Path, overwrite: bool) -> Path:
    if file.exists() and not overwrite:
        raise FileExistsError(f"statistics exist: {file} (choose another file, or replace it by overwrite)")
    return file


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> Path:
    """Write the file under another name first: it is there when it is complete."""
    if not tensors:
        raise ValueError(
            f"there are no {metadata['kind']} statistics of any of the base's weights: none of them was used"
        )
    with new_file(file) as partial:
        write_tensors(partial, tensors, metadata)
    return file


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
