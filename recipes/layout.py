"""Where a recipe's output has what: names of files and folders alone, without torch."""

from __future__ import annotations

from pathlib import Path

RESULTS, RECIPE = "results.json", "recipe.yaml"
SCORES = "scores.json"  # until results.json has them all
EXPERTS, HEADS, SUBSPACES = "experts", "heads", "subspaces"
STATISTICS, SEARCH = "statistics", "search"  # of the experts
MERGED, MERGED_LORA = "merged", "merged-lora"
FINISHED = "expert.json"  # in an expert's folder, once it is complete
MADE_OF_EXPERTS = (MERGED, MERGED_LORA, RESULTS)
ALL = (EXPERTS, HEADS, SUBSPACES, SEARCH, STATISTICS, SCORES, *MADE_OF_EXPERTS, RECIPE)


def expert_folder(out: Path, name: str) -> Path:
    """Return where the expert of a task is."""
    return out / EXPERTS / name


def head_file(expert: Path) -> Path:
    """Return where the head of the expert in a folder is: ``heads`` stands beside ``experts``."""
    return expert.parents[1] / HEADS / f"{expert.name}.safetensors"


def trainer_folder(expert: Path) -> Path:
    """Return where the checkpoints of an expert's training are."""
    return expert.with_name(f".{expert.name}.trainer")


def statistics_of(folder: Path, name: str, kind: str) -> Path:
    """Return the file in a folder of statistics of an expert."""
    return folder / f"{name}-{kind}.safetensors"
