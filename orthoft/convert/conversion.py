"""What a conversion reads and gives: an opened adapter on its base, and the converted one with its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orthoft.convert.card import conversion_card
from orthoft.errors import unknown
from orthoft.hub_place import config_fields
from orthoft.merging.files.hub import asked_once, base_of, find_folder
from orthoft.merging.files.safetensors_file import write_tensors
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.files.writer import refuse_existing, write_json, write_text
from orthoft.merging.prepared import refuse_what_is_read
from orthoft.merging.ranks import Ranks
from orthoft.merging.reports.card import CARD
from orthoft.merging.resume.partial import partial_folder
from orthoft.merging.sources.adapter import AdapterSource
from orthoft.merging.sources.names import EMBEDDING

Kind = Literal["linear", "conv1d", "embedding", "convolution"]
# What every method of PEFT has in its configuration, ours included.
COMMON = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)


@dataclass(frozen=True)
class LayerReport:
    """One converted layer: its rank as a LoRA, the norm of what is converted, and the error relative to it.

    That is the change of the weight for a LoRA, and the rotation or the adapted weight for other formats.
    """

    name: str
    norm: float
    error: float
    rank: int | None = None


@dataclass
class Conversion:
    """A converted adapter: what goes into ``adapter_config.json`` and ``adapter_model.safetensors``, and its errors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: list[LayerReport]
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The error over all layers, relative to the norm over all layers."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error * layer.norm for layer in self.layers)) / norm if norm > 0 else 0.0

    @property
    def worst(self) -> LayerReport:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def save(self, out: str | Path, overwrite: bool = False) -> None:
        """Write the folder of the adapter, with a model card; it appears only when it is complete.

        Raises:
            FileExistsError: ``out`` exists and may not be overwritten, or another process is writing it.
        """
        with partial_folder(Path(out), overwrite, resume=False, ranks=Ranks()) as partial:
            folder = partial.folder
            write_json(folder / "adapter_config.json", self.config)
            write_tensors(folder / "adapter_model.safetensors", self.tensors)
            write_text(folder / CARD, conversion_card(self.config, len(self.layers), self.error, self.worst.error))

    def require(self, tolerance: float, reason: str) -> None:
        """Raise a ValueError that gives ``reason`` if a layer's error exceeds the tolerance."""
        if not self.worst.error <= tolerance:
            raise ValueError(
                f"{reason}: the nearest differs by {self.worst.error:.2g} (relative) in {self.worst.name!r}, accept it "
                f"with a tolerance of more than that (it is {tolerance:g}), or convert to a LoRA"
            )


@dataclass(frozen=True)
class Opened:
    """An adapter on disk and the base it belongs to."""

    source: AdapterSource
    base: TensorFolder

    def kind(self, name: str) -> Kind:
        """Return the kind of layer that a weight belongs to: by its shape and what PEFT's files say, else by its name.

        Our files do not tell an embedding from a linear layer.
        """
        if len(self.base.shape(name)) > 2:
            return "convolution"
        if self.source.inputs_first[name]:
            return "conv1d"
        if any("_embedding_" in suffix for suffix in self.source.shapes(name)):
            return "embedding"
        module = name.removesuffix(".weight")
        ours = self.source.kind.startswith("ORTHOFT_") and f"{module}.bias" not in self.base
        return "embedding" if ours and EMBEDDING.fullmatch(module.rpartition(".")[2]) else "linear"

    def guesses(self) -> list[str]:
        """Return a note on the layers that are taken for embeddings by their names, for people to check."""
        names = [name for name in self.source.inputs_first if self.kind(name) == "embedding"]
        guessed = [name for name in names if self.source.kind.startswith("ORTHOFT_")]
        return [f"taken for embeddings, by their names: {', '.join(guessed)}"] if guessed else []

    def weight(self, name: str) -> Tensor:
        """Return an adapted weight (m, n) before the adapter, in float32 or more."""
        return self.source.weight(name, self.base)

    def inputs(self, name: str) -> int:
        """Return the n of an adapted weight (m, n)."""
        rows, *columns = self.base.shape(name)
        return rows if self.source.inputs_first[name] else math.prod(columns)

    def shared_config(self, only: str, bias: bool = True) -> dict[str, Any]:
        """Return what the configurations of two methods share; ``only`` is the new name of a bias of adapted layers.

        Raises:
            ValueError: biases are trained, and the new format has no ``bias``.
        """
        config = self.source.config
        shared = {name: config[name] for name in COMMON if config.get(name) is not None} | {"inference_mode": True}
        trained = str(config.get("bias") or "none")
        if trained != "none" and not bias:
            raise ValueError(f"bias={trained!r} has no place in {only}: it holds no biases, convert to a LoRA")
        return shared | ({"bias": only if trained.endswith("_only") else trained} if bias else {})


def open_adapter(adapter: str | Path, base: str | Path | None, out: str | Path | None = None) -> Opened:
    """Open an adapter, in a folder or on the Hub, on the base it names unless one is given; ``out`` will be replaced.

    Raises:
        FileNotFoundError: the adapter or the base is missing.
        ValueError: a corrupt file, an unknown format, an adapter of another base, or one that holds nothing; or ``out``
            holds the adapter or its base, or is a part of them.
    """
    folder = find_folder(adapter, "adapter")
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter in {folder}: it has no adapter_config.json")
    tensors = TensorFolder(find_folder(base_of(folder) if base is None else base, "base"))
    if out is not None:
        refuse_what_is_read(Path(out), [folder, tensors.folder], "converted")
    source = AdapterSource(str(adapter), folder, tensors)
    if not source.inputs_first:
        source.beside()  # says what it changes instead, if it does
        raise ValueError(f"{folder} adapts no weight, it only holds saved modules: there is nothing to convert")
    return Opened(source, tensors)


def relative(difference: Tensor, whole: Tensor) -> tuple[float, float]:
    """Return the norm of ``whole``, and that of ``difference`` relative to it, in float64."""
    norm = torch.linalg.vector_norm(whole.double()).item()
    lost = torch.linalg.vector_norm(difference.double()).item()
    return norm, lost / norm if norm > 0 else 0.0


def keys(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module under the names they have in an adapter's file."""
    return {f"base_model.model.{module}.{name}": tensor for name, tensor in tensors.items()}


Convert = Callable[[Opened, float], Conversion]


@asked_once()
def converted(
    formats: Mapping[str, Convert],
    what: str,
    adapter: str | Path,
    out: str | Path | None,
    base: str | Path | None,
    tolerance: float,
    overwrite: bool,
) -> Conversion:
    """Convert an adapter folder by the function of its kind in ``formats``, with what is saved beside it, and save it.

    Raises:
        FileNotFoundError, FileExistsError: the adapter or its base is missing, ``out`` exists.
        ValueError: ``formats`` has no such kind (it is called ``what``), the new format cannot hold it, or ``out`` may
            not be replaced, as it holds what is read or is a part of it.
    """
    if out is not None:
        refuse_existing(Path(out), overwrite)
    opened = open_adapter(adapter, base, out)
    if opened.source.kind not in formats:
        raise unknown(what, opened.source.kind, formats)
    conversion = formats[opened.source.kind](opened, tolerance)
    conversion.tensors |= opened.source.beside()
    conversion.notes += opened.guesses()
    if base is not None:
        conversion.config |= config_fields(str(base))
    if out is not None:
        conversion.save(out, overwrite)
    return conversion
