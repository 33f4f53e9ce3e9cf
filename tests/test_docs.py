"""The documentation's code runs as it stands, on tiny models laid out where the demo lays the real ones."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import Block, blocks, run_command, run_python
from tiny import label_task, save_bert

from orthoft import ADAPTERS
from orthoft.merging import METHODS, OUTPUTS, SPACES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN = [DOCS / "theory.md", *sorted((DOCS / "tutorials").glob("*.md"))]
TASKS = ("sarcasm", "rotten_tomatoes", "amazon", "tweets")
OTHERS = ("make ", "pip install ")  # commands of other programs
STEPS = re.compile(r"(max_steps\s*[:=]\s*)100\b")


def shortened(text: str) -> str:
    """Return code or a recipe with trainings of three steps: what is learnt in them is not tested here."""
    return STEPS.sub(r"\g<1>3", text)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `make demo` leaves: a base, four tasks, and the experts and heads of its recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    save_bert(Path(".cache/demo/minilm"))
    for seed, name in enumerate(TASKS):
        label_task(Path(f".cache/demo/{name}"), offset=5 * seed, seed=seed)
    return tmp_path


def made_demo(page: Path) -> None:
    if "runs/minilm/experts" in page.read_text(encoding="utf-8"):
        recipe = Path("demo.yaml")
        recipe.write_text(shortened((ROOT / "recipes/configs/minilm.yaml").read_text(encoding="utf-8")))
        run_command(f"orthoft finetune {recipe}")


def run_block(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    if block.title is not None:
        Path(block.title).write_text(shortened(block.text), encoding="utf-8")
    elif block.language == "python":
        run_python(shortened(block.text), f"{page.name}:{block.line}", namespace)
    elif block.language == "bash":
        for command in block.commands:
            if not command.startswith(OTHERS):
                run_command(command)
                for recipe in Path().glob("*.yaml"):
                    recipe.write_text(shortened(recipe.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, demo: Path) -> None:
    made_demo(page)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if "BitsAndBytesConfig" in block.text and find_spec("bitsandbytes") is None:
            continue
        run_block(block, page, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_reference_names_everything_that_can_be_chosen() -> None:
    def described(page: str) -> set[str]:
        return set(re.findall(r"^::: (\S+)", (DOCS / "reference" / page).read_text(encoding="utf-8"), re.MULTILINE))

    chosen = [m.merge for m in METHODS.values()] + [s.encode for s in SPACES.values()] + list(OUTPUTS.values())
    assert described("methods.md") == {f"{one.__module__}.{one.__qualname__}" for one in chosen}
    assert {f"{c.__module__}.{c.__name__}" for c in ADAPTERS.values()} <= described("orthoft.md")


@pytest.mark.parametrize(
    ("page", "heading", "least"), [("docs/comparison.md", "#", 50), ("README.md", "## How it", 11)]
)
def test_comparisons_hold_only_measured_numbers(page: str, heading: str, least: int) -> None:
    measured = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("results.md", "agreement.md"))
    text = (ROOT / page).read_text(encoding="utf-8")
    numbers = set(re.findall(r"(?<![\w.])\d*\.\d+(?:e-\d+)?(?![\w])", text[text.index(heading) :]))
    assert len(numbers) >= least
    assert not {number for number in numbers if number not in measured}


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("commands.md", ["\n## orthoft merge\n", "\n## orthoft recipes validate\n", "--dry-run"]),
        (
            "recipes.md",
            ["\n### Recipe\n", "| `tasks` | list of ", "\n### TrainToMerge\n", "| `rows` | whole number | `300` |"],
        ),
    ],
)
def test_pages_are_made_from_the_code(page: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from docs_pages import on_page_markdown

    made = on_page_markdown((DOCS / "reference" / page).read_text(encoding="utf-8"))
    assert "<!--" not in made
    assert [text for text in found if text not in made] == []
    assert on_page_markdown("another page") == "another page"
