"""A folder of ours to the Hugging Face Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from orthoft.hub_place import REPOSITORY, hub_place
from orthoft.merging.files.hub import FILES
from orthoft.merging.files.tensors import read_json

# What others need of a model: weights, configuration, tokenizer, the card and the pages of a merge.
BELONG = (*FILES, "*.gguf", "README.md", "report.html")
# The state of a training run, and what only this machine knows.
STAY = ("trainer_state.json", "expert.json", "checkpoint-*/*", "runs/*", ".*", "*/.*")
WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Push:
    """What goes to the Hub, and where: the files with their sizes, the address once they are there."""

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The bytes of all files together."""
        return sum(self.files.values())


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Upload an expert, a merge or an export to a repository of the Hub, which is made if it is not there.

    Weights, configuration, tokenizer, model card and report go; journals, the state of a training run and hidden files
    stay. The token is that of ``HF_TOKEN`` or of ``hf auth login``.

    Args:
        folder: what to upload: it holds weights.
        repo_id: "name" or "owner/name".
        private: of a new repository; the owner's habit if None.
        revision: a branch, made if it is not there.
        message: of the commit.
        dry_run: only tell what would go.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: no name of a repository.
        ConnectionError: the Hub cannot be reached, or does not take it.
    """
    place = Path(folder).expanduser()
    files = _files(place)
    if not REPOSITORY.fullmatch(repo_id):
        raise ValueError(f"a repository of the Hub is called name or owner/name, got {repo_id!r}")
    told = Push(repo_id, files, notes=_notes(place))
    if dry_run:
        return told
    url = _upload(place, told, private, revision, message or f"Upload {place.resolve().name} with orthoft")
    return Push(repo_id, files, url, told.notes)


def _files(folder: Path) -> dict[str, int]:
    """Return the files of a folder that belong to its model, by their names in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"nothing to push: no folder {folder.absolute()}")
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path.stat().st_size for name, path in names.items() if belongs(name)}
    if not any(fnmatch(name, pattern) for name in files for pattern in WEIGHTS if "/" not in name):
        raise FileNotFoundError(
            f"nothing to push: {folder} itself holds no weights ({', '.join(WEIGHTS)}); of a run, push experts/NAME, "
            "merged or merged-lora"
        )
    return files


def belongs(name: str) -> bool:
    """Say whether a file, by its name in the folder of a model, is part of the model."""
    return any(fnmatch(name, one) for one in BELONG) and not any(fnmatch(name, one) for one in STAY)


def _notes(folder: Path) -> list[str]:
    """Say what others could not load as usual: an adapter whose base is a folder, here or in a repository."""
    config = folder / "adapter_config.json"
    base = str(read_json(config).get("base_model_name_or_path") or "") if config.is_file() else ""
    place = hub_place(base)
    if place is not None and place.folder is not None:
        return [f"the base is in a folder of a repository ({base}), which PEFT cannot name: load it as the card does"]
    if base and place is None:
        return [f"adapter_config.json names the base {base!r}, a folder here: others need its name on the Hub there"]
    return []


def _upload(folder: Path, told: Push, private: bool | None, revision: str | None, message: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    failed: type[Exception] = HfHubHTTPError.__mro__[1]  # of connections that fail, too; whose it is changes

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"the Hub is switched off here (HF_HUB_OFFLINE): {told.repo_id} was not pushed")
    api = HfApi()
    try:
        where = api.create_repo(told.repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(where.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=where.repo_id,
            folder_path=os.fspath(folder),
            allow_patterns=list(told.files),
            revision=revision,
            commit_message=message,
        )
    except (OSError, ValueError, failed) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        answered = isinstance(error, HfHubHTTPError)  # anything else is no matter of who asks
        hint = ": is HF_TOKEN set to a token that may write there?" if answered else ""
        raise ConnectionError(f"the Hub did not take {told.repo_id!r} ({reason}){hint}") from error
    return str(where)
