"""``run`` and ``finetune``: recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from orthoft.cli.app import Overrides, Overwrite, RecipeFile, app


@app.command()
def run(recipe: RecipeFile, set_: Overrides = None, overwrite: Overwrite = False) -> None:
    """Fine-tune, merge, export and evaluate as a recipe says.

    Example: orthoft run recipes/configs/minilm.yaml --set seed=1 --set output=runs/second
    """
    from orthoft import recipes

    recipes.run(recipe, set_ or (), overwrite=overwrite, say=typer.echo)


@app.command()
def finetune(
    recipe: RecipeFile,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    set_: Overrides = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the experts of a recipe; `run` takes them up later.

    Example: orthoft finetune recipes/configs/minilm.yaml --task sarcasm
    """
    from orthoft import recipes

    done = recipes.run(recipe, set_ or (), until="finetune", tasks=task or None, overwrite=overwrite, say=typer.echo)
    for name, expert in done["experts"].items():
        typer.echo(f"{name}: {expert['folder']}")
