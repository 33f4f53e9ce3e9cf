"""Models and adapters as GGUF files, which llama.cpp runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoft import __version__
from orthoft.convert.conversion import Conversion
from orthoft.convert.gguf_file import DTYPES, FILE_TYPES, Told, dtype_of, refuse_existing_file, write
from orthoft.convert.gguf_layout import NOT_STORED, Layout, frequency_divisors, layout_of, numbers
from orthoft.convert.gguf_tokenizer import words_of
from orthoft.convert.lora import to_lora
from orthoft.errors import unknown
from orthoft.hub_place import short_name
from orthoft.merging.files.hub import asked_once, base_of, find_folder
from orthoft.merging.files.tensors import TensorFolder, read_json
from orthoft.merging.prepared import refuse_what_is_read

STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
PREFIX, FACTOR = "base_model.model.", ".lora_A.weight"


@dataclass(frozen=True)
class GgufFile:
    """What was written: its architecture and dtype there, how many tensors, the conversion if it is an adapter."""

    path: Path
    architecture: str
    dtype: str
    tensors: int
    adapter: Conversion | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """What the rank of an adapter's LoRA leaves out of its change, relative to it."""
        return 0.0 if self.adapter is None else self.adapter.error


@asked_once()
def to_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> GgufFile:
    """Write a checkpoint, or an adapter as a LoRA, to a GGUF file for llama.cpp, one tensor at a time.

    Of architectures Llama, Mistral, Qwen 2 and Qwen 3, with BPE tokenizers. An adapter goes with a GGUF of its base
    (``llama-cli -m base.gguf --lora adapter.gguf``); all its factors have one rank there, filled up with zeros.

    Args:
        model: a checkpoint or an adapter, a folder or a place on the Hub.
        out: the file to write.
        dtype: of matrices: "f32", "f16", "bf16" or "q8_0"; unless given, the checkpoint's own, and f32 of an adapter.
        base: of an adapter, if not the one its configuration names.
        rank: of the LoRA of an adapter, see `to_lora`.

    Raises:
        FileNotFoundError, FileExistsError: the model or its tokenizer is missing, ``out`` exists.
        ValueError: the `gguf` package is missing, the architecture or tokenizer is none of these, a tensor has no place
            there, or ``out`` would replace a file of the model or of its base.
    """
    _need_gguf()
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype of GGUF", dtype, DTYPES)
    refuse_existing_file(out, overwrite)
    folder = find_folder(model, "model")
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, short_name(model), Path(out), dtype or "f32", base, rank, overwrite)
    if base is not None or rank is not None:
        raise ValueError(f"base and rank are of adapters, {folder} is a checkpoint")
    refuse_what_is_read(Path(out), [folder], "converted")
    return _checkpoint(folder, short_name(model), Path(out), dtype, overwrite)


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("GGUF needs the package gguf: pip install 'orthoft[gguf]'") from None


def _checkpoint(folder: Path, name: str, out: Path, dtype: str | None, overwrite: bool) -> GgufFile:
    stored, config = TensorFolder(folder), read_json(folder / "config.json")
    layout, words = layout_of(config), words_of(folder, int(config["vocab_size"]))
    dtype = dtype or STORED.get(max((stored.dtype(name) for name in stored), key=_breadth), "f16")
    tied = bool(config.get("tie_word_embeddings"))
    names = [name for name in stored if not NOT_STORED.fullmatch(name) and not (tied and name == "lm_head.weight")]

    def fill(writer: Any) -> None:
        _fill(writer, "model", name, dtype)
        for setter, value in numbers(layout).items():
            getattr(writer, setter)(value)
        if "add_rope_scaling_factor" in numbers(layout):
            from gguf import RopeScalingType

            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        words.add_to(writer)

    tensors = [_told(stored, layout, name, dtype) for name in names]
    if (divisors := frequency_divisors(layout)) is not None:
        tensors.append(Told("rope_freqs.weight", tuple(divisors.shape), "f32", lambda: divisors))
    write(out, layout.name, fill, tensors, overwrite)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    notes = [f"sliding_window={window}: llama.cpp attends to all of the context"] if window else []
    return GgufFile(out, layout.name, dtype, len(tensors), notes=[*words.notes, *notes])


def _breadth(dtype: torch.dtype) -> int:
    return dtype.itemsize if dtype in STORED else 0


def _told(stored: TensorFolder, layout: Layout, name: str, dtype: str) -> Told:
    module, _, kind = name.rpartition(".")
    shape = stored.shape(name)
    return Told(
        f"{layout.renamed(module)}.{kind}",
        shape,
        dtype_of(shape, dtype),
        lambda: layout.reordered(module, stored[name]),
    )


def _adapter(
    folder: Path, name: str, out: Path, dtype: str, base: str | Path | None, rank: int | None, over: bool
) -> GgufFile:
    home = find_folder(base or base_of(folder), "base")
    refuse_what_is_read(out, [folder, home], "converted")
    lora = to_lora(folder, base=base, rank=rank, pad_rank=True)
    layout = layout_of(read_json(home / "config.json"))
    factors = _factors(lora, layout)

    def fill(writer: Any) -> None:
        _fill(writer, "adapter", name, dtype)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(lora.config["lora_alpha"]))

    tensors = [
        Told(name, tuple(factor.shape), dtype_of(factor.shape, dtype), partial(_same, factor))
        for name, factor in factors.items()
    ]
    write(out, layout.name, fill, tensors, over)
    return GgufFile(out, layout.name, dtype, len(tensors), lora, lora.notes)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _factors(lora: Conversion, layout: Layout) -> dict[str, Tensor]:
    """Return ``A`` (r, n) and ``B`` (m, r) by their names in GGUF; the rows of B are those of the weight.

    Raises:
        ValueError: the adapter holds something else than factors of linear layers.
    """
    found = [key for key in lora.tensors if key.endswith(FACTOR)]
    used = {key.replace("lora_A", factor) for key in found for factor in ("lora_A", "lora_B")}
    others = [key for key in lora.tensors if key not in used and not key.endswith(".base_layer.weight")]
    others += [key for key in found if lora.tensors[key].ndim != 2]
    if others:
        one = min(others)
        raise ValueError(f"a GGUF adapter holds LoRAs of linear layers, and not {one!r}: merge it into a checkpoint")
    factors: dict[str, Tensor] = {}
    for key in found:
        module = key.removeprefix(PREFIX).removesuffix(FACTOR)
        name = f"{layout.renamed(module)}.weight"
        factors[f"{name}.lora_a"] = lora.tensors[key]
        factors[f"{name}.lora_b"] = layout.reordered(module, lora.tensors[key.replace("lora_A", "lora_B")])
    return factors


def _fill(writer: Any, kind: str, name: str, dtype: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type(kind)
    writer.add_name(name)
    writer.add_string("general.quantized_by", f"orthoft {__version__}")
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
