"""Where a model is: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from orthoft.merging.files.tensors import read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CARD = "README.md"
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def find_folder(where: str | Path, what: str) -> Path:
    """Return the folder, or download the Hub repository of that id and return its folder.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository that can be reached.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(where, Path) or not HUB_ID.fullmatch(where):
        raise FileNotFoundError(f"{what}: no folder {folder.absolute()}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, allow_patterns=[*FILES, CARD]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{what}: no folder {folder.absolute()}, and the Hub gave no repository {where!r} ({reason})"
        ) from error


def base_of(adapter: str | Path) -> str:
    """Return the base model that an adapter's configuration names.

    Raises:
        FileNotFoundError: there is no adapter at that place.
        ValueError: the configuration names no base.
    """
    config = find_folder(adapter, "adapter") / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no adapter in {config.parent}: it has no adapter_config.json")
    base = read_json(config).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config} names no base model: say which one it was trained on (base)")
    return str(base)
