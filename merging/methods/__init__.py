"""Merge methods: one pure function per file, found by name in `METHODS`."""

from orthoft.merging.methods import mean, opcm, task_arithmetic, ties
from orthoft.merging.methods.registry import METHODS, Finish, Method, get_method, method

__all__ = ["METHODS", "Finish", "Method", "get_method", "mean", "method", "opcm", "task_arithmetic", "ties"]
