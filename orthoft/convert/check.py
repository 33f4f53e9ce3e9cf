"""What programs that serve LoRAs make of a folder: facts of vLLM's and llama.cpp's loaders, read in their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orthoft.merging.files.hub import find_folder
from orthoft.merging.files.tensors import TensorFolder, read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
VLLM_DEFAULT = 16
VLLM_SAVED = ("classifier", "score")  # modules that vLLM takes whole
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


def serving_notes(folder: str | Path) -> list[str]:
    """Return what keeps vLLM and llama.cpp from serving the LoRA in a folder, or what they need to: a line each.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a corrupt file.
    """
    place = find_folder(folder, "adapter")
    file = place / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no adapter in {place}: it has no adapter_config.json")
    config = read_json(file)
    if (kind := config.get("peft_type")) != "LORA":
        return [f"vLLM and llama.cpp serve LoRAs, this is {kind}: orthoft convert --to lora writes one"]
    tensors = TensorFolder(place, "adapter_model")
    shapes = {name: tensors.shape(name) for name in tensors}
    return [note for rule in RULES if (note := rule(config, shapes)) is not None]


def ranks_of(shapes: Shapes) -> dict[str, int]:
    """Return the rank of each module of a LoRA by its name."""
    first = {name: shape[0] for name, shape in shapes.items() if name.endswith(("lora_A.weight", "lora_embedding_A"))}
    return {name.rpartition(".lora_")[0].removeprefix("base_model.model."): rank for name, rank in first.items()}


def _large_rank(config: Config, shapes: Shapes) -> str | None:
    rank = max([int(config["r"]), *ranks_of(shapes).values()])
    if rank > VLLM_RANKS[-1]:
        return f"rank {rank} is above the {VLLM_RANKS[-1]} that vLLM takes: convert with a smaller --rank"
    if rank > VLLM_DEFAULT:
        return f"vLLM: rank {rank} needs --max-lora-rank {next(size for size in VLLM_RANKS if size >= rank)}"
    return None


def _several_ranks(config: Config, shapes: Shapes) -> str | None:
    ranks = sorted({*ranks_of(shapes).values(), int(config["r"])})
    if len(ranks) < 2 and not config.get("alpha_pattern"):
        return None
    return (
        f"layers of rank {', '.join(map(str, ranks))}: older vLLM and llama.cpp's converter do not read rank_pattern; "
        "orthoft convert --to lora --pad-rank fills them up with zeros"
    )


def _other_scale(config: Config, shapes: Shapes) -> str | None:
    if not config.get("use_rslora") or config["r"] == 1:
        return None
    return "use_rslora: llama.cpp scales by alpha / r; orthoft convert --to lora puts the scale into the factors"


def _refused_fields(config: Config, shapes: Shapes) -> str | None:
    named = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora")
    found = [name for name in named if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}")
    return f"{', '.join(found)}: vLLM refuses it, merge into a checkpoint instead" if found else None


def _saved_modules(config: Config, shapes: Shapes) -> str | None:
    saved = [name for name in config.get("modules_to_save") or () if name not in VLLM_SAVED]
    others = [name for name in shapes if not name.endswith((*FACTORS, ".bias", ".base_layer.weight"))]
    if not saved and not others:
        return None
    what = f"modules_to_save {', '.join(saved)}" if saved else f"the tensor {others[0]!r}"
    return f"{what}: vLLM and llama.cpp take factors only, merge into a checkpoint instead"


def _no_linear_layers(config: Config, shapes: Shapes) -> str | None:
    if any(name.endswith("lora_A.weight") and len(shape) > 2 for name, shape in shapes.items()):
        return "LoRAs of convolutions: vLLM and llama.cpp take linear layers only"
    if any("lora_embedding_" in name for name in shapes):
        return "LoRAs of embeddings: vLLM takes them of few architectures, merge into a checkpoint instead"
    return None


RULES: tuple[Callable[[Config, Shapes], str | None], ...] = (
    _refused_fields,
    _saved_modules,
    _no_linear_layers,
    _several_ranks,
    _other_scale,
    _large_rank,
)
