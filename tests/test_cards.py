"""Model cards: what they say of adapters, conversions, merges and runs, and whom they cite."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from peft import get_peft_model
from tiny import save_llama
from transformers import AutoModelForCausalLM

from orthoft.adapters import ADAPTERS
from orthoft.citations import PAPERS, bibtex, citation_section, cited_in
from orthoft.convert import to_lora
from orthoft.loading import auto_class
from orthoft.merging import merge
from orthoft.merging.formats import READERS
from orthoft.merging.methods import METHODS
from orthoft.merging.reports.card import papers
from orthoft.merging.reports.front_matter import Scored, front_matter
from orthoft.merging.spaces import SPACES
from orthoft.recipes import subspaces
from orthoft.recipes.cards import DIRECTIONS, write_cards
from orthoft.recipes.initialise import Method
from orthoft.recipes.schema import TrainToMerge


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and two adapters of it."""
    root = tmp_path_factory.mktemp("cards")
    save_llama(root / "llama")
    for name in ("hra", "psoft"):
        config = ADAPTERS[name](r=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(root / "llama"), config).save_pretrained(root / name)
    return root


def front(card: str) -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return told


def python(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


CITED = {
    **{f"adapter {name}": cited_in(sys.modules[config.__module__]) for name, config in ADAPTERS.items()},
    **{f"method {name}": papers(method.merge) for name, method in METHODS.items()},
    **{f"space {name}": papers(space.encode) for name, space in SPACES.items()},
    **{f"subspace {name}": cited_in(getattr(subspaces, name)) for name in get_args(Method)},
}


@pytest.mark.parametrize("name", [name for name, found in CITED.items() if found])
def test_everything_with_a_paper_can_be_cited(name: str) -> None:
    for paper in CITED[name]:
        entry = bibtex(paper)
        assert f"eprint = {{{paper}}}" in entry
        assert entry.count("{") == entry.count("}")


def test_our_adapters_have_papers() -> None:
    assert all(CITED[f"adapter {name}"] for name in ADAPTERS)
    for name in ADAPTERS:
        assert cited_in(READERS[f"ORTHOFT_{name.upper()}"].read)[:1] == CITED[f"adapter {name}"][:1]


def test_ways_to_keep_tasks_apart_are_told_and_have_papers() -> None:
    assert set(DIRECTIONS) == set(get_args(Method))
    assert [CITED[f"subspace {name}"] for name in DIRECTIONS] == [["2505.22934"], [], ["2312.02432"], ["2505.11235"]]


def test_papers_are_told_apart() -> None:
    assert all(paper.authors and paper.title and 2000 + int(key[:2]) == paper.year for key, paper in PAPERS.items())
    assert len({paper.title for paper in PAPERS.values()}) == len(PAPERS)
    assert citation_section(["2306.01708", "2306.01708"])[3].count("@misc") == 1
    assert citation_section([]) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM"),
        ({"architectures": ["BertForSequenceClassification"]}, "AutoModelForSequenceClassification"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "AutoModelForSeq2SeqLM"),
        ({"architectures": ["GemmaForConditionalGeneration"], "vision_config": {}}, "AutoModelForImageTextToText"),
        ({"architectures": ["BertModel"]}, "AutoModel"),
        ({"auto_map": {"AutoConfig": "a", "AutoModelForCausalLM": "b"}}, "AutoModelForCausalLM"),
        ({}, "AutoModel"),
    ],
)
def test_the_class_that_loads_a_model(config: dict[str, Any], expected: str) -> None:
    assert auto_class(config) == expected


def test_the_card_of_a_saved_adapter(models: Path) -> None:
    card = (models / "psoft" / "README.md").read_text()
    assert f"base = AutoModelForCausalLM.from_pretrained({str(models / 'llama')!r})".replace("'", '"') in card
    assert "import orthoft  # teaches PEFT the method" in card
    assert "--to lora" in card
    assert "eprint = {2505.11235}" in card
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    model = get_peft_model(model, ADAPTERS["psoft"](r=4, target_modules=["q_proj"]))
    model.save_pretrained(models / "psoft")
    assert (models / "psoft" / "README.md").read_text().count("## This adapter") == 1


def test_the_card_of_a_conversion_loads_it(models: Path, tmp_path: Path) -> None:
    to_lora(models / "hra", tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert front(card)["library_name"] == "peft"
    assert front(card)["pipeline_tag"] == "text-generation"
    assert "orthoft" not in python(card)
    assert "exactly" in card
    scope: dict[str, Any] = {}
    exec(python(card).replace("this-folder", str(tmp_path / "lora")), scope)
    assert type(scope["model"].get_base_model()).__name__ == "LlamaForCausalLM"


def test_the_card_of_a_merge_loads_it(models: Path, tmp_path: Path) -> None:
    for output in ("checkpoint", "lora"):
        merge(models / "llama", [models / "hra", models / "psoft"], tmp_path / output, method="opcm", output=output)
        card = (tmp_path / output / "README.md").read_text()
        scope: dict[str, Any] = {}
        exec(python(card).replace("this-folder", str(tmp_path / output)), scope)
        loaded = scope["model"] if output == "checkpoint" else scope["model"].get_base_model()
        assert type(loaded).__name__ == "LlamaForCausalLM"
        for paper in ("2501.09522", "2509.17786", "2405.17484", "2505.11235"):  # method, space, both adapters
            assert card.count(f"eprint = {{{paper}}}") == 1


def test_what_the_hub_reads() -> None:
    scores = Scored("tweets", "text-classification", {"accuracy": 0.9})
    words = {"library": "peft", "tags": ["hra"], "name": "mine", "results": [scores]}
    told = front(front_matter(base="bert-base-uncased", relation="adapter", **words) + "\n")  # type: ignore[arg-type]
    assert told["base_model"] == "bert-base-uncased"
    assert told["base_model_relation"] == "adapter"
    assert told["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.9}]
    assert "license" not in told
    here = front(front_matter(base=".cache/models/bert", relation="adapter", library="peft", tags=[]) + "\n")
    assert "base_model" not in here


def run_of(models: Path, merged: Path, **recipe: Any) -> dict[str, Any]:
    """What a run of two experts leaves in its results, here made by hand, with a merge."""
    sources = [("a", models / "hra"), ("b", models / "psoft")]
    report = merge(models / "llama", sources, merged, method="mean")
    task = {"kind": "causal-lm", "metric": "loss"}
    tasks = [task | {"name": name} for name in "ab"]
    results = {
        "recipe": {"base": str(models / "llama"), "seed": 3, "tasks": tasks} | recipe,
        "versions": {"orthoft": "0"},
        "experts": {
            name: {
                "folder": str(models / kind),
                "adapter": {"type": kind, "r": 4},
                "parameters": 1234,
                "steps": 7,
                "seconds": 2.0,
                "losses": [[5, 1.25]],
            }
            for name, kind in (("a", "hra"), ("b", "psoft"))
        },
        "scores": {
            "base": {"a": {"loss": 2.0}, "b": {"loss": 3.0}},
            "a": {"a": {"loss": 1.0}},
            "b": {"b": {"loss": 1.0}},
            "merge": {"a": {"loss": 1.5}, "b": {"loss": 2.0}},
        },
        "merge": report.to_dict(),
    }
    told: dict[str, Any] = json.loads(json.dumps(results))
    return told


def test_the_cards_of_a_run(models: Path, tmp_path: Path) -> None:
    written = write_cards(run_of(models, tmp_path / "merged"))
    assert written == [models / "hra" / "README.md", models / "psoft" / "README.md", tmp_path / "merged" / "README.md"]
    expert, merged = written[0].read_text(), written[2].read_text()
    assert front(expert)["model-index"][0]["results"][0]["metrics"] == [{"type": "loss", "value": 1.0}]
    assert "| trained parameters | 1,234 |" in expert
    assert "| adapted | 1 |" in expert
    assert "2405.17484" in expert
    assert "| gain kept | 50% | 50% | 50% |" in merged
    assert [one["dataset"]["name"] for one in front(merged)["model-index"][0]["results"]] == ["a", "b"]
    assert "AutoModelForCausalLM" in python(merged)
    assert not any(word in card for card in (expert, merged) for word in ("kept apart", "trained to be merged"))


@pytest.mark.parametrize(
    ("words", "row", "sentence", "papers"),
    [
        (
            {"method": "osrm"},
            "osrm, frozen, 300 rows of each task",
            "each reads its inputs through directions along which the other tasks' inputs vary least (osrm, ",
            ["2505.22934"],
        ),
        ({"method": "orthogonal"}, "orthogonal, frozen", "each reads its inputs through directions of", ["2312.02432"]),
        ({"method": "principal"}, "principal, frozen", "each reads its inputs through", ["2505.11235"]),  # PSOFT's
        (
            {"method": "contrastive", "penalty": 3000, "frozen": False, "general": "text.jsonl", "rows": 20},
            "contrastive, not frozen, ridge 0.1, penalty 3000, 20 rows of each task, general text",
            "little and was trained under a penalty on what it changes for the other tasks' inputs (contrastive, ",
            [],
        ),
        ({"penalty": 0.5}, "penalty 0.5, 300 rows of each task", "each was trained under a penalty on", []),
    ],
    ids=["osrm", "orthogonal", "principal", "contrastive and penalty", "penalty"],
)
def test_cards_say_and_cite_what_kept_the_experts_apart(
    words: dict[str, Any], row: str, sentence: str, papers: list[str], models: Path, tmp_path: Path
) -> None:
    wanted = TrainToMerge(**words).model_dump(mode="json")
    expert, other, merged = (f.read_text() for f in write_cards(run_of(models, tmp_path / "m", train_to_merge=wanted)))
    assert all(f"| kept apart | {row} |\n" in card for card in (expert, other))
    assert merged.count("The experts were trained to be merged: ") == 1
    assert sentence in merged
    assert f"({row})." in merged
    for card in (expert, other, merged):
        assert all(card.count(f"eprint = {{{paper}}}") == 1 for paper in papers)
    assert merged.endswith("```\n")
