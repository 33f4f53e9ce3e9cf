"""Adapters as LoRAs, which plain PEFT loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from orthoft.convert.conversion import COMMON, Conversion, Kind, LayerReport, keys, open_adapter
from orthoft.convert.padding import at_one_rank
from orthoft.delta import Delta, LowRank
from orthoft.hub_place import config_fields
from orthoft.linalg import at_least_float32
from orthoft.merging.files.hub import asked_once
from orthoft.merging.files.writer import refuse_existing
from orthoft.merging.outputs.lora import lora_config
from orthoft.merging.prepared import refuse_what_is_read


@dataclass(frozen=True)
class Change:
    """The change (m, n) of one layer's weight, named by its module; ``shape`` is that of the stored weight."""

    module: str
    kind: Kind
    shape: tuple[int, ...]
    delta: Delta


@asked_once()
def to_lora(
    adapter: Any,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    pad_rank: bool = False,
    adapter_name: str = "default",
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Return an adapter as a LoRA of scale 1, and write it to the folder ``out``, which plain PEFT loads.

    Exact for adapters that are the identity plus a low rank (HRA, PSOFT); others need ``rank``, the best approximation
    of at most that rank in the Frobenius norm of the weight, with its relative error per layer in the result. Layers
    may be linear, GPT-2's Conv1D, embeddings and convolutions. Modules and biases trained beside are carried over.

    Args:
        adapter: an adapter's folder or place on the Hub, or a PeftModel with one of ours.
        out: folder to write, refused if it exists, without ``overwrite``; None to write nothing.
        base: folder or place on the Hub of a folder's base model; the one its configuration names if None.
        rank: rank of the LoRA, None for the exact one.
        pad_rank: give all layers one rank, filled up with zeros, as some programs that serve LoRAs need it.
        adapter_name: which adapter of a PeftModel.
        progress: show a bar.

    Raises:
        FileNotFoundError, FileExistsError: the adapter or its base is missing, ``out`` exists.
        ValueError: the adapter is not of this base, has no exact form and no ``rank`` is given, is merged, or sits in a
            model on a convolution that a LoRA of PEFT computes otherwise (groups, dilation, padding other than zeros;
            files do not tell, so that from a folder the result has a note); ``out`` holds what is read, or is a part.
        TypeError: neither a folder nor a PeftModel.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is a positive number, got {rank!r}")
    if out is not None:
        refuse_existing(Path(out), overwrite)
    if isinstance(adapter, str | Path):
        conversion = _from_folder(adapter, base, out, rank, progress)
    else:
        conversion = _from_model(adapter, adapter_name, out, rank, progress)
    if pad_rank:
        conversion = at_one_rank(conversion)
    if out is not None:
        conversion.save(out, overwrite)
    return conversion


def _from_folder(
    adapter: str | Path, base: str | Path | None, out: str | Path | None, rank: int | None, progress: bool
) -> Conversion:
    opened = open_adapter(adapter, base, out)
    source = opened.source

    def change(name: str) -> Change:
        flipped, weight = source.inputs_first[name], opened.weight(name)
        delta = source.adapted(name, weight.mT if flipped else weight)
        shape = opened.base.shape(name)
        return Change(source.module(name), opened.kind(name), shape, delta.transposed() if flipped else delta)

    names = list(source.inputs_first)
    _need_a_rank(str(adapter), source.kind, rank, [name for name in names if source.adapter_ranks[name] is None])
    changes = (change(name) for name in names)
    config = dict(source.config) | ({} if base is None else config_fields(str(base)))
    conversion = _lora(changes, config, source.beside(), rank, len(names) if progress else 0)
    conversion.notes += opened.guesses()
    if layers := [name for name in names if opened.kind(name) == "convolution"]:
        conversion.notes.append(
            f"right for convolutions without groups, dilation and paddings other than zeros, which files do not tell: "
            f"{', '.join(layers)}"
        )
    return conversion


def _from_model(model: Any, adapter_name: str, out: str | Path | None, rank: int | None, progress: bool) -> Conversion:
    from orthoft.errors import unknown
    from orthoft.layer import OrthoLayer

    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not hasattr(model, "get_base_model"):
        raise TypeError(f"expected the folder of an adapter or a PeftModel, got a {type(model).__name__}")
    if adapter_name not in configs:
        raise unknown("adapter", adapter_name, configs)
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, OrthoLayer) and adapter_name in layer.adapters
    }
    if not layers:
        raise ValueError(f"{adapter_name!r} is no adapter of orthoft: it is a {type(configs[adapter_name]).__name__}")
    dense = [name for name, layer in layers.items() if _change_of(name, layer, adapter_name, 1).delta.rank() is None]
    changes = (_change_of(name, layer, adapter_name) for name, layer in layers.items())  # one at a time in memory
    config = _saved_config(model, adapter_name)
    if out is not None and (base := config["base_model_name_or_path"]) and Path(base).is_dir():
        refuse_what_is_read(Path(out), [Path(base)], "converted")
    saved = _saved_beside(model, adapter_name, list(layers))
    _need_a_rank(f"adapter {adapter_name!r}", config["peft_type"], rank, dense)
    return _lora(changes, config, saved, rank, len(layers) if progress else 0)


@torch.no_grad()
def _change_of(name: str, layer: Any, adapter_name: str, first: int | None = None) -> Change:
    """Return the change of a layer, of all its rows or of the first alone, which tell whether it has factors."""
    if layer.merged:
        raise ValueError(f"adapters are merged into {name!r}: call unmerge_adapter() first")
    base, weight = layer.get_base_layer(), layer.get_base_weight()
    kind = _kind(name, base)
    rows = at_least_float32(layer.layout.rows(weight)[:first])
    return Change(name, kind, tuple(weight.shape), layer.adapters[adapter_name].delta(rows))


def _kind(name: str, base: Any) -> Kind:
    from torch.nn import Embedding

    from orthoft.experts import are_experts
    from orthoft.layouts import CONVOLUTIONS, Conv1DLayout, layout_of

    if are_experts(base):
        raise ValueError(
            f"{name!r} holds the experts of a mixture, each of which would need a LoRA of its own: merge instead"
        )
    if isinstance(base, CONVOLUTIONS):
        if base.groups > 1 or any(d > 1 for d in base.dilation) or base.padding_mode != "zeros":
            raise ValueError(
                f"{name!r} has groups, dilation or padding_mode that PEFT's LoRA leaves out: merge instead"
            )
        return "convolution"
    if isinstance(base, Embedding):
        return "embedding"
    return "conv1d" if isinstance(layout_of(base), Conv1DLayout) else "linear"


def _saved_config(model: Any, adapter_name: str) -> dict[str, Any]:
    """Return the configuration as PEFT would save it."""
    config: dict[str, Any] = model.peft_config[adapter_name].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    base = config.get("base_model_name_or_path") or getattr(model.get_base_model(), "name_or_path", None)
    return config | {"base_model_name_or_path": base, "task_type": _text(config.get("task_type"))}


def _saved_beside(model: Any, adapter_name: str, modules: list[str]) -> dict[str, Tensor]:
    """Return the tensors that PEFT saves beside the adapter's own: PEFT alone knows which, and how it names them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[adapter_name])
        where = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
        tensors = load_file(where / "adapter_model.safetensors")
    own = tuple(f"base_model.model.{module}.orthoft_" for module in modules)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(own)}


def _need_a_rank(what: str, kind: str, rank: int | None, dense: list[str]) -> None:
    if rank is None and dense:
        raise ValueError(
            f"{what} holds {kind}, which has no exact LoRA form: give the rank of an approximation "
            f"({len(dense)} weights need one, e.g. {dense[0]!r})"
        )


def _lora(
    changes: Iterable[Change], config: Mapping[str, Any], saved: Mapping[str, Tensor], rank: int | None, steps: int
) -> Conversion:
    from tqdm.auto import tqdm

    tensors, layers, kinds = dict(saved), [], set()
    for change in tqdm(changes, desc="to LoRA", unit="weight", total=steps or None, disable=not steps):
        factors, report = _factors(change, rank)
        tensors |= keys(change.module, _named(factors, change))
        layers.append(report)
        kinds.add(change.kind)
    trained = str(config.get("bias") or "none")
    shared = {name: config[name] for name in COMMON if config.get(name) is not None}
    kept = {name: value for name, value in shared.items() if name not in NOT_OF_A_LORA}
    kept |= {"bias": "lora_only" if trained.endswith("_only") else trained, "fan_in_fan_out": "conv1d" in kinds}
    return Conversion(lora_config({report.name: report.rank or 1 for report in layers}, **kept), tensors, layers)


# Its layers are named one by one, with their ranks.
NOT_OF_A_LORA = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")


def _factors(change: Change, rank: int | None) -> tuple[LowRank, LayerReport]:
    """Return the exact factors, or the best of the given rank, and how close they are."""
    found = change.delta.factors()
    if found is not None and (rank is None or found[0].shape[1] <= rank):
        factors = LowRank(*found)
        return factors, LayerReport(change.module, float(factors.norm()), 0.0, factors.rank())
    assert rank is not None, change.module
    factors, lost = change.delta.truncated(min(rank, *change.delta.shape))
    norm = (float(lost) ** 2 + float(torch.linalg.vector_norm(factors.B.double())) ** 2) ** 0.5
    return factors, LayerReport(change.module, norm, float(lost) / norm if norm > 0 else 0.0, factors.rank())


def _named(factors: LowRank, change: Change) -> dict[str, Tensor]:
    """Return ``B`` (m, r), ``A`` (r, n) shaped and named as PEFT's LoRA has them for this kind of layer."""
    B, A = factors.B.float(), factors.A.float()
    if change.kind == "embedding":  # PEFT looks rows of A^T up, and multiplies them by B^T
        return {"lora_embedding_A": B.mT, "lora_embedding_B": A.mT}
    if change.kind == "convolution":
        _, *filter_ = change.shape
        A, B = A.reshape(-1, *filter_), B.reshape(*B.shape, *[1] * (len(filter_) - 1))
    return {"lora_A.weight": A, "lora_B.weight": B}


def _text(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))
