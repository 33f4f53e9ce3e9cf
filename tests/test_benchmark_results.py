"""The benchmark of the results, on tiny models: every cell, stopped and gone on with, and the tables of the docs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import label_task, save_bert, save_llama, text_task

from benchmarks.results import report, suites
from benchmarks.results.cells import Cells
from benchmarks.results.experts import Workshop
from benchmarks.results.merges import Merges, peak, wanted
from benchmarks.results.suites import Row, Suite

DOCS = Path(__file__).parents[1] / "docs" / "results.md"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("encoder")
    save_bert(folder / "bert")
    for seed, name in enumerate("ab"):
        label_task(folder / name, 6 * seed, seed=seed)
    rows = {
        "lora": Row("LoRA", {"type": "peft.lora", "r": 2}, (1e-3, 1e-2), merges="some"),
        "apart": Row(
            "LoRA apart",
            {"type": "peft.lora", "r": 4},
            to_merge={"method": "contrastive", "rows": 20},
            rate_of="lora",
            keep_away=3.0,
        ),
    }
    return replace(
        suites.ENCODER,
        name="tiny",
        base=folder / "bert",
        tasks={name: folder / name for name in "ab"},
        rows=rows,
        tuned_on=("a",),
        task_words={"max_length": 16},
        adapter_words={"target_modules": ["query", "output.dense"]},
        training={"max_steps": 3, "per_device_train_batch_size": 16},
        trial_rows=20,
    )


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("language")
    save_llama(folder / "llama")
    for step, name in enumerate("ab", 1):
        text_task(folder / name, 2 * step + 1, seed=step)
    return replace(
        suites.LANGUAGE,
        name="tiny-lm",
        base=folder / "llama",
        tasks={name: folder / name for name in "ab"},
        rows={"lora": Row("LoRA", {"type": "peft.lora", "r": 2}, (1e-2,))},
        tuned_on=("a",),
        task_words={"block_size": 16},
        training={"max_steps": 3, "per_device_train_batch_size": 4},
    )


def measured(suite: Suite, row: str, folder: Path, seed: int = 0) -> Workshop:
    shop = Workshop(suite, folder / "cache", folder / "numbers")
    shop.score_base()
    shop.experts(row, seed, cross=suite.kind == "causal-lm")
    Merges(shop, row, seed).run()
    return shop


def numbers(suite: Suite, row: str, folder: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((folder / "numbers" / f"{suite.name}.{row}.json").read_text())
    return known


@pytest.fixture(scope="module")
def whole(encoder: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each row was measured, by one seed and without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    for row in encoder.rows:
        measured(encoder, row, folder)
    return folder


class Stopped(Exception):
    """Stands for a power cut."""


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_numbers(
    encoder: Suite, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, left = Cells.put, [6]

    def stopping(self: Cells, value: Any, *place: str) -> None:
        put(self, value, *place)
        left[0] -= 1
        if not left[0]:
            raise Stopped

    monkeypatch.setattr(Cells, "put", stopping)
    with pytest.raises(Stopped):
        measured(encoder, "lora", tmp_path / "twice")
    first = numbers(encoder, "lora", tmp_path / "twice")
    assert first["rates"].keys() == {"0.001", "0.01"}
    assert "merges" not in first.get("seeds", {}).get("0", {})
    measured(encoder, "lora", tmp_path / "twice")
    assert _without_times(numbers(encoder, "lora", tmp_path / "twice")) == _without_times(
        numbers(encoder, "lora", whole)
    )


def _without_times(known: dict[str, Any]) -> dict[str, Any]:
    for seed in known["seeds"].values():
        for expert in seed["experts"].values():
            del expert["seconds"]
    return known


def test_what_is_measured_is_not_measured_again(encoder: Suite, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*words: Any, **more: Any) -> None:
        raise AssertionError("measured again")

    for name in ("train", "score"):
        monkeypatch.setattr(Workshop, name, again)
    measured(encoder, "apart", whole)


def test_numbers_of_other_settings_are_not_mixed(encoder: Suite, whole: Path) -> None:
    longer = replace(encoder, training={**encoder.training, "max_steps": 4})
    with pytest.raises(ValueError, match="was measured with other training: move it away"):
        measured(longer, "apart", whole)


def test_tables_of_a_suite(encoder: Suite, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    measured(encoder, "apart", tmp_path, seed=1)
    found = report.Measured(encoder, tmp_path / "numbers")
    assert found.rows == ["lora", "apart"]
    assert [len(found.experts(row)) for row in found.rows] == [1, 2]
    table = report.adapters(found)
    assert f"{found.experts('lora')[0]:.3f} |" in table
    assert "±" in table.splitlines()[-1]
    kept = found.merges("lora")["task_arithmetic/auto"]
    base, expert = sum(found.base().values()) / 2, found.experts("lora")[0]
    assert kept.kept[0] == pytest.approx((kept.scores[0] - base) / (expert - base))
    assert "| iso_c | auto |" in report.merges(found)
    tuned = {
        name: max(one["tuning"].values())
        for name, one in numbers(encoder, "lora", tmp_path)["seeds"]["0"]["merges"].items()
    }
    assert tuned[found.best("lora").name] == max(tuned.values())
    tried = numbers(encoder, "lora", tmp_path)["seeds"]["0"]["merges"]
    assert not [name for name, one in tried.items() if "refused" in one]
    assert report.to_merge(found).count("LoRA") == 2


def test_a_sum_is_scored_under_heads_fitted_anew(encoder: Suite, tmp_path: Path) -> None:
    shop = measured(encoder, "apart", tmp_path)
    Merges(shop, "apart", 0).refit()
    one = numbers(encoder, "apart", tmp_path)["seeds"]["0"]["merges"]["task_arithmetic/auto"]
    assert one["refit"].keys() == one["test"].keys()
    found = report.Measured(encoder, tmp_path / "numbers")
    base, expert = sum(found.base().values()) / 2, found.experts("apart")[0]
    kept = (sum(one["refit"].values()) / 2 - base) / (expert - base)
    assert found.merges("apart")["task_arithmetic/auto"].refit == [pytest.approx(kept)]


def test_figures(encoder: Suite, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.results.figures import draw

    draw([report.Measured(encoder, whole / "numbers")], tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert sizes.keys() == {"tiny-experts.png", "tiny-merges.png"}
    assert all(1_000 < size < 100_000 for size in sizes.values())


def test_domains_of_text_are_scored_on_each_other(language: Suite, tmp_path: Path) -> None:
    measured(language, "lora", tmp_path)
    found = report.Measured(language, tmp_path / "numbers")
    base = found.base()
    other = [found.expert("lora", "0", "a", "b") - base["b"], found.expert("lora", "0", "b", "a") - base["a"]]
    assert found.forgotten("lora")[0] == pytest.approx(sum(other) / 2)
    assert report.forgetting(found).count("\n") == 4


def test_each_method_is_tried_in_each_space_that_differs() -> None:
    every = list(wanted("all"))
    assert len(every) == len(set(every))
    assert {("ties", "full"), ("ties", "core"), ("ties", "knots"), ("tsv", "auto"), ("mean", "rotation")} <= {*every}
    assert ("tsv", "full") not in every


@pytest.mark.parametrize(
    ("values", "best"),
    [((1, 2, 3, 4, 5), 4), ((5, 4, 3, 2, 1), 0), ((1, 2, 3, 3, 1), 2), ((1, 3, 3, 2, 1), 1), ((1, 2, 3, 4, 4, 2), 3)],
)
def test_the_weakest_of_the_best_strengths_is_taken(values: tuple[int, ...], best: int) -> None:
    asked: list[int] = []
    assert peak(lambda at: asked.append(at) or float(values[at]), len(values)) == best
    assert {*asked} >= {at for at in (best - 1, best, best + 1) if 0 <= at < len(values)}


def test_merges_are_compared_over_the_same_experts(encoder: Suite, whole: Path) -> None:
    found = report.Measured(encoder, whole / "numbers")
    seed = next(iter(found.cells["lora"]["seeds"].values()))
    found.cells["lora"]["seeds"]["1"] = {**seed, "merges": {"tsv/auto": seed["merges"]["tsv/auto"]}}
    assert [merge.name for merge in found.compared("lora")] == ["tsv/auto"]
    assert found.best("lora").name == "tsv/auto"


@pytest.mark.parametrize("suite", suites.SUITES.values(), ids=lambda suite: suite.name)
def test_rows_train_about_as_much_as_the_first(suite: Suite) -> None:
    known = report.Measured(suite, report.NUMBERS)
    for row in known.rows:
        if "r=40" not in suite.rows[row].title and row != "goft":
            assert 0.85 < known.parameters(row) / known.parameters(known.rows[0]) < 1.15, row


def test_the_tables_in_the_docs_are_those_of_the_numbers() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert text.count("<!-- results: ") >= 3
    assert report.filled(text) == text


@pytest.mark.parametrize("page", ["README.md", "docs/comparison.md", "docs/results.md"])
def test_the_headline_is_what_was_measured(page: str) -> None:
    known = report.Measured(suites.ENCODER, report.NUMBERS)
    text = (DOCS.parents[1] / page).read_text(encoding="utf-8")
    told = {}
    for row in ("lora", "contrastive"):
        kept = known.merges(row)["task_arithmetic/auto"].kept
        told[row] = f"{sum(kept) / len(kept):.2f}"[1:]
        assert re.search(rf"keeps? {told[row]}\b", text), row
    assert {*re.findall(r"sum of (?:the |plain )?LoRAs keeps (\.\d+)", text)} <= {told["lora"]}
    assert {*re.findall(r"(\.\d+), trained plainly", text)} <= {told["lora"]}
    assert {*re.findall(r"(\.\d+), trained to be merged", text)} <= {told["contrastive"]}
