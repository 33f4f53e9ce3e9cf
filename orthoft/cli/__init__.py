"""The command line: parse, call, print. Each command is one Python call, and imports what it needs when it runs."""

from orthoft.cli import train  # isort: skip  (commands are listed in this order)
from orthoft.cli import merge  # isort: skip
from orthoft.cli import convert, look
from orthoft.cli.app import app, main

__all__ = ["app", "convert", "look", "main", "merge", "train"]
