"""An adapter on disk, before anything is known of its base: configuration and tensors, sorted by what they are."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from orthoft.merging.files.tensors import TensorFolder, read_json
from orthoft.merging.formats.registry import Extent, get_reader
from orthoft.merging.formats.tokens import TOKENS
from orthoft.merging.sources.rows import finite

DEEPEST = 32  # components that a module in target_parameters may have


class AdapterFile:
    """``adapter_config.json`` and ``adapter_model.safetensors`` in a folder.

    ``settings`` is the configuration without what is null. ``keys`` maps modules to the tensors of the adapter itself
    (suffix: key in the file), ``beside`` tensors of the model to those saved beside them, ``tokens`` weights to their
    trained rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupt, empty, of an unknown format, or disagrees with the other.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self.config = read_json(folder / "adapter_config.json")
        self.reader = get_reader(self.config)
        self.settings = {field: value for field, value in self.config.items() if value is not None}
        self.tensors = TensorFolder(folder, "adapter_model")
        self.keys, self.beside, self.tokens = self._split()
        self._targets: dict[str, list[str]] = {}
        for target in self.settings.get("target_parameters", ()):
            module, _, parameter = target.rpartition(".")
            self._targets.setdefault(module, []).append(parameter)
        self._owner = owner
        if not self.keys and not self.beside and not self.tokens:
            raise ValueError(f"{folder / 'adapter_model.safetensors'} holds no tensors")
        if self.config.get("trainable_token_indices") and not self.tokens:
            raise ValueError("'trainable_token_indices' in its configuration and in its tensors disagree")

    def read(self, key: str) -> Tensor:
        """Return a tensor in float32 or more, or raise a ValueError if it holds NaN or Inf."""
        return finite(self.tensors[key], f"{self._owner}: tensor {key!r}")

    def read_module(self, module: str) -> dict[str, Tensor]:
        """Return the adapter's tensors of a module, named by what stands behind the module's name."""
        return {suffix: self.read(key) for suffix, key in self.keys[module].items()}

    def targets(self, module: str) -> list[str]:
        """Return the names that its configuration tells of parameters of a module, if the module has such."""
        parts = module.split(".")[-DEEPEST:]
        ends = [".".join(parts[start:]) for start in range(len(parts) + 1)] if self._targets else []
        return list(dict.fromkeys(f"{module}.{name}" for end in ends for name in self._targets.get(end, ())))

    def _split(self) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
        """Return {module: {suffix: key}} of the adapter's own tensors, {tensor: key} of those saved beside them, and
        {weight: key} of rows of tokens."""
        own: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        tokens: dict[str, str] = {}
        for key in self.tensors:
            name = key.removeprefix("base_model.model.")
            module, found, rest = name.partition(f".{self.reader.prefix}")
            if found:
                own.setdefault(module, {})[self.reader.prefix + rest] = key
            elif name.endswith(TOKENS):
                tokens[name.removesuffix(TOKENS) + ".weight"] = key
            # doubles, with bias="all", are left out
            elif key not in self.reader.shared and ".original_module." not in name and ".modules_to_save." not in name:
                saved[name.replace(".base_layer.", ".")] = key
        return own, saved, tokens

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of those tensors, from the header alone."""
        return {suffix: self.tensors.shape(key) for suffix, key in self.keys[module].items()}

    def extent(self, module: str) -> Extent:
        """Return what the adapter says of the weight of a module, or raise a ValueError if its tensors are strange."""
        shapes = self.shapes(module)
        known = self.reader.names
        strange = [] if known is None else [suffix for suffix in shapes if suffix not in known]
        if strange:
            raise ValueError(f"module {module!r} has {', '.join(map(repr, strange[:3]))}, which cannot be merged")
        try:
            return self.reader.extent(self.settings, shapes)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"module {module!r} has no {self.reader.peft_type} adapter, only {', '.join(map(str, shapes.items()))}"
            ) from error
