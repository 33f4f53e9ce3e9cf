"""Where a model is: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from orthoft.hub_place import HubPlace, hub_place, named_in
from orthoft.merging.files.tensors import read_json

CARD = "README.md"
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


_asked: ContextVar[dict[HubPlace, Path] | None] = ContextVar("asked", default=None)


@contextmanager
def asked_once() -> Iterator[None]:
    """Ask the Hub for a place once while the block, or the function so decorated, runs.

    All of a run then reads one state of it, whatever is uploaded meanwhile; the next run asks anew.
    """
    token = _asked.set(known if (known := _asked.get()) is not None else {})
    try:
        yield
    finally:
        _asked.reset(token)


def find_folder(where: str | Path, what: str) -> Path:
    """Return the folder, or download what is at that place of the Hub (see `orthoft.hub_place`) and return its folder.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository that can be reached.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if (place := hub_place(where)) is None:
        raise FileNotFoundError(f"{what}: no folder {folder.absolute()}")
    known = _asked.get()
    if known is not None and place in known:
        return known[place]
    try:
        found = _downloaded(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{what}: no folder {folder.absolute()}, and the Hub gave nothing for {where!r} ({reason})"
        ) from error
    if known is not None:
        known[place] = found
    return found


def _downloaded(place: HubPlace) -> Path:
    from huggingface_hub import snapshot_download

    inside = f"{place.folder}/" if place.folder else ""
    patterns = [inside + pattern for pattern in (*FILES, CARD)]
    found = Path(snapshot_download(place.repository, revision=place.revision, allow_patterns=patterns), inside)
    if not found.is_dir():
        raise FileNotFoundError(f"{place.repository} has no folder {place.folder}")
    return found


def base_of(adapter: str | Path) -> str:
    """Return the base model that an adapter's configuration names, with its state on the Hub.

    Raises:
        FileNotFoundError: there is no adapter at that place.
        ValueError: the configuration names no base.
    """
    config = find_folder(adapter, "adapter") / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no adapter in {config.parent}: it has no adapter_config.json")
    base = named_in(read_json(config))
    if base is None:
        raise ValueError(f"{config} names no base model: say which one it was trained on (base)")
    return base
