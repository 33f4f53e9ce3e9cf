"""Places on the Hugging Face Hub as people write them: ``org/name``, ``org/name@state``, ``org/name@state/folder``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

NAME = r"[A-Za-z0-9][\w.-]*"
REPOSITORY = re.compile(rf"{NAME}(/{NAME})?")
REVISION = r"refs/(?:pr/\d+|convert/\w+)|\w[\w.-]*(?:%2F\w[\w.-]*)*"  # a branch, tag or commit; its own slashes are %2F
FOLDER = r"\w[\w.-]*(?:/\w[\w.-]*)*"
PLACE = re.compile(rf"(?P<repository>{REPOSITORY.pattern})(?:@(?P<revision>{REVISION})(?:/(?P<folder>{FOLDER}))?)?")
OWN_REVISION = re.compile(r"refs/(pr/\d+|convert/\w+)")


@dataclass(frozen=True)
class HubPlace:
    """A repository, which state of it (a branch, tag or commit, its newest if None), and a folder in it."""

    repository: str
    revision: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        """Return it as people write it."""
        if self.revision is None:
            return self.repository
        state = self.revision if OWN_REVISION.fullmatch(self.revision) else quote(self.revision, safe="")
        return f"{self.repository}@{state}" + (f"/{self.folder}" if self.folder else "")


def hub_place(where: str | Path) -> HubPlace | None:
    """Return the place on the Hub that ``where`` may speak of; None if it is a path, or a folder or file here.

    ``name``, ``org/name``, and with a state and a folder as `huggingface_hub.HfFileSystem` writes them:
    ``org/name@v1.0``, ``org/name@refs/pr/3``, ``org/name@main/adapters/law``; a slash in the name of a branch is
    ``%2F``.
    """
    if isinstance(where, Path) or (match := PLACE.fullmatch(where)) is None or Path(where).expanduser().exists():
        return None
    state = match["revision"]
    return HubPlace(match["repository"], None if state is None else unquote(state), match["folder"])


def same_repository(one: str, other: str) -> bool:
    """Return whether both may be of one repository of the Hub, in whatever states."""
    places = [place for name in (one, other) if (place := hub_place(name)) is not None]
    return len(places) == 2 and len({place.repository for place in places}) == 1


def public_name(model: str, folder: Path) -> str:
    """Return how others are told of a model that was found in a folder: its place on the Hub, if it has one."""
    return str(folder) if hub_place(model) is None else model


def config_fields(base: str) -> dict[str, str | None]:
    """Return how an ``adapter_config.json`` names a base: PEFT has a field for the state, and none for a folder."""
    place = hub_place(base)
    if place is None or place.folder is not None:
        return {"base_model_name_or_path": base, "revision": None}
    return {"base_model_name_or_path": place.repository, "revision": place.revision}


def named_in(config: Mapping[str, Any]) -> str | None:
    """Return the base that an ``adapter_config.json`` names, with its state; None if it names none."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name or not revision or (place := hub_place(str(name))) is None or place.revision is not None:
        return str(name) if name else None
    return str(HubPlace(place.repository, str(revision)))


def load_arguments(model: str) -> str:
    """Return what stands between the brackets of ``from_pretrained`` for a folder here or a place on the Hub."""
    place = hub_place(model)
    if place is None:
        return f'"{model}"'
    more = {"revision": place.revision, "subfolder": place.folder}
    return f'"{place.repository}"' + "".join(f', {name}="{value}"' for name, value in more.items() if value)
