"""Functions and classes of another project's file, without the project.

They run without their decorators, which register them or switch off gradients that nobody asks for, and with what they
use given to them: nothing else of the project, and none of its requirements, is imported.
"""

from __future__ import annotations
import __future__

import ast
import math
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def extract(file: Path, names: Collection[str] | None, **given: object) -> SimpleNamespace:
    """Return these functions, classes and constants of a file, or all of them for None, and what was given to them.

    Raises:
        ValueError: the file has no such name.
    """
    tree = ast.parse(file.read_text())
    found = {name: node for node in tree.body if (name := name_of(node)) and (names is None or name in names)}
    if missing := set(names or ()) - set(found):
        raise ValueError(f"{file} has no {', '.join(sorted(missing))}: is it another version?")
    for node in found.values():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
    tree.body = list(found.values())
    scope: dict[str, Any] = {"__name__": file.stem, "torch": torch, "math": math, "nn": nn, **given}
    exec(compile(tree, str(file), "exec", __future__.annotations.compiler_flag, dont_inherit=True), scope)
    return SimpleNamespace(**scope)


def name_of(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(target, "name", getattr(target, "id", ""))
