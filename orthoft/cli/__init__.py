"""The command line: parse, call, print. Each command is one Python call, and imports what it needs when it runs."""

from orthoft.cli import train  # isort: skip  (commands are listed in this order)
from orthoft.cli import merge  # isort: skip
from orthoft.cli import search  # isort: skip
from orthoft.cli import statistics  # isort: skip
from orthoft.cli import convert  # isort: skip
from orthoft.cli import push  # isort: skip
from orthoft.cli import look  # isort: skip
from orthoft.cli import recipes  # isort: skip
from orthoft.cli import doctor  # isort: skip
from orthoft.cli.app import app, main

__all__ = ["app", "convert", "doctor", "look", "main", "merge", "push", "recipes", "search", "statistics", "train"]
