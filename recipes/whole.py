"""Files that are there whole, or as they were before: a process that is killed leaves no half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthoft.merging.resume.partial import partial_of


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name beside it, and put it in place once it is complete and on the disk."""
    partial = partial_of(file)
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def write_whole_text(file: Path, text: str) -> None:
    """Write UTF-8; names of files that the locale could not decode are written as the bytes that they are."""
    write_whole(file, text.encode("utf-8", "surrogateescape"))


def write_whole_json(file: Path, told: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    write_whole_text(file, json.dumps(told, indent=2) + "\n")
