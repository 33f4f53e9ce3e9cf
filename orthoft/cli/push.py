"""``push``: experts, merges and exports to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orthoft.cli.app import app
from orthoft.cli.convert import EXPORT
from orthoft.cli.output import Output


@app.command(rich_help_panel=EXPORT)
def push(
    out: Output,
    folder: Annotated[Path, typer.Argument(help="An expert, a merged model or an export.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="name or owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub: weights, configuration, tokenizer, card and report, nothing else.

    The token is that of HF_TOKEN, or of `hf auth login`.

    Example: orthoft push runs/minilm/merged me/minilm-four-tasks --private

    Example: orthoft push runs/minilm/experts/sarcasm me/sarcasm --dry-run

    In Python: orthoft.convert.push_to_hub("runs/minilm/merged", "me/minilm-four-tasks", private=True)
    """
    from orthoft.convert import push_to_hub

    done = push_to_hub(folder, repo_id, private=private or None, revision=revision, message=message, dry_run=dry_run)
    for note in done.notes:
        out.say(f"note: {note}")
    goes = "would go to" if done.url is None else "are now at"
    files = [f"{size:>15,}  {name}" for name, size in done.files.items()]
    total = f"{len(files)} files, {done.nbytes / 1e6:,.1f} MB, {goes} {done.url or done.repo_id}"
    out.show(asdict(done), "\n".join([*files, total]))
