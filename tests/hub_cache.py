"""The Hub's cache on disk, offline, with repositories that tests put there: what `huggingface_hub` itself reads."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `huggingface_hub` read a cache and ask nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def put(cache: Path, repository: str, folder: Path, revision: str = "main") -> Path:
    """Copy a folder into the cache as a state of a repository; return where it is then."""
    place = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
    (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    return place / "snapshots" / commit
