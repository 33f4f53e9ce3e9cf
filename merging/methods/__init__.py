"""Merge methods: one pure function per file, found by name in `METHODS`. Every module of this package is imported."""

from importlib import import_module
from pkgutil import iter_modules

from orthoft.merging.methods.registry import METHODS, Finish, Method, get_method, method

__all__ = ["METHODS", "Finish", "Method", "get_method", "method"]

for name in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{name}")
