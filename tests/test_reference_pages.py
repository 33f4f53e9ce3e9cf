"""Every name on the pages of the reference is found, and where the page says."""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[1] / "docs" / "reference"
SHOWN = sorted(
    (page.name, name)
    for page in PAGES.glob("*.md")
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
)
# Pages that say "found as HOME.NAME", but for what they say has a home of its own.
HOMES = {"orthoft.md": "orthoft", "merging.md": "orthoft.merging"}
OWN_HOME = "orthoft.delta."


def at(address: str) -> Any:
    """What is found at an address: a module, or a name in one."""
    module, _, name = address.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        return reduce(getattr, address.split(".")[1:], import_module("orthoft"))


def test_the_pages_show_names() -> None:
    assert {page for page, _ in SHOWN} >= HOMES.keys()


@pytest.mark.parametrize(("page", "address"), SHOWN, ids=[address for _, address in SHOWN])
def test_what_is_shown_is_found(page: str, address: str) -> None:
    found = at(address)
    if page in HOMES and not address.startswith(OWN_HOME):
        home, name = import_module(HOMES[page]), address.rpartition(".")[2]
        assert name in home.__all__
        assert getattr(home, name) is found


@pytest.mark.parametrize(("page", "home"), HOMES.items())
def test_a_page_says_where_its_names_are(page: str, home: str) -> None:
    text = " ".join((PAGES / page).read_text(encoding="utf-8").split())
    assert f"found as `{home}.NAME`" in text
    assert page != "merging.md" or "classes of `orthoft.delta`" in text
