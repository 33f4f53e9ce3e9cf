"""Places on the Hugging Face Hub as people write them: ``org/name``, ``org/name@state``, ``org/name@state/folder``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

NAME = r"[A-Za-z0-9][\w.-]*"
REPOSITORY = re.compile(rf"{NAME}(/{NAME})?")
OWN = r"refs/(?:pr/\d+|convert/\w+)"  # states that the Hub makes itself, the only ones written with their slashes
FOLDER = r"\w[\w.-]*(?:/\w[\w.-]*)*"
PLACE = re.compile(rf"(?P<repository>{REPOSITORY.pattern})(?:@(?P<revision>{OWN}|[^/@\s]+)(?:/(?P<folder>{FOLDER}))?)?")
NO_REVISION = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|@\{|^[./-]|[./]$|\.lock$")  # as git


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
        state = self.revision if re.fullmatch(OWN, self.revision) else quote(self.revision, safe="")
        return f"{self.repository}@{state}" + (f"/{self.folder}" if self.folder else "")

    @property
    def name(self) -> str:
        """How one calls it for short: the last name of its folder, or of the repository."""
        return (self.folder or self.repository).rpartition("/")[2]


def hub_place(where: str | Path) -> HubPlace | None:
    """Return the place on the Hub that ``where`` may speak of; None if it is a path, or a folder or file here.

    ``name``, ``org/name``, and with a state and a folder as `huggingface_hub.HfFileSystem` writes them:
    ``org/name@v1.0``, ``org/name@refs/pr/3``, ``org/name@main/adapters/law``. What else is no letter, digit, dot or
    line in the name of a branch is quoted as in addresses of the web, its slashes as ``%2F``.
    """
    if isinstance(where, Path) or (match := PLACE.fullmatch(where)) is None or Path(where).expanduser().exists():
        return None
    state = None if match["revision"] is None else unquote(match["revision"])
    if state is not None and NO_REVISION.search(state):
        return None
    return HubPlace(match["repository"], state, match["folder"])


def short_name(where: str | Path) -> str:
    """Return how one calls a model for short: the last name of its folder, or of its place on the Hub."""
    place = hub_place(where)
    return (Path(where).name or Path(where).resolve().name) if place is None else place.name


def may_be_one(one: str, other: str) -> bool:
    """Return whether two names may be of one model on the Hub: of one repository, not in two states that are told."""
    places = [place for name in (one, other) if (place := hub_place(name)) is not None]
    states = {place.revision for place in places} - {None}
    return len(places) == 2 and len({(place.repository, place.folder) for place in places}) == 1 and len(states) < 2


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
        return json.dumps(model, ensure_ascii=False)  # whatever a name holds stays inside its quotes
    more = {"revision": place.revision, "subfolder": place.folder}
    words = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in more.items() if value]
    return ", ".join([f'"{place.repository}"', *words])
