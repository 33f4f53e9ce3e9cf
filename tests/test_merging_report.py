"""What a merge tells: diagnostics against dense formulas, reports that survive a file, pages that load nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthoft.delta import Delta, Dense, LowRank, Rotated
from orthoft.linalg import rotation_update
from orthoft.merging import MergeReport, WeightReport, merge
from orthoft.merging.reports.diagnostics import WeightDiagnostics, combined, diagnose
from orthoft.merging.reports.measures import leading, sample_rows
from orthoft.merging.reports.pictures import curves, grid, heat_map, number

M, N = 40, 36
WEIGHTS = [1.0, 0.5, 2.0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int, rank: int = 3, m: int = M, n: int = N) -> LowRank:
    return LowRank(normal(m, rank, seed=seed), normal(rank, n, seed=100 + seed))


def rotated(seed: int) -> Rotated:
    return Rotated(normal(M, N, seed=9), rotation_update(0.1 * normal(N // 4, 6, seed=seed), 4, "cayley"))


KINDS: dict[str, list[Delta]] = {
    "factored": [low_rank(1), low_rank(2, 5), LowRank(low_rank(1).B + 0.3 * low_rank(3).B, low_rank(1).A)],
    "dense": [Dense(normal(M, N, seed=seed) + low_rank(seed).dense()) for seed in (1, 2, 3)],
    "rotations": [rotated(1), rotated(2), rotated(3)],
    "mixed": [low_rank(1), Dense(normal(M, N, seed=5)), rotated(4)],
    "vectors": [Dense(normal(1, N, seed=seed)) for seed in (1, 2, 3)],
}


def told_of(
    deltas: Sequence[Delta | None], merged: Delta | None = None, base: Tensor | None = None
) -> WeightDiagnostics:
    return diagnose(deltas, WEIGHTS[: len(deltas)], merged, base, torch.Generator().manual_seed(0))


def space_of(D: Tensor, rows: bool) -> Tensor:
    """An orthonormal basis of the rows or columns of a matrix, by a full SVD; the leading 32 at most."""
    U, s, Vh = torch.linalg.svd(D)
    rank = min(32, int((s > 1e-5 * s[0]).sum()))
    return Vh[:rank].T if rows else U[:, :rank]


def overlap(first: Tensor, second: Tensor) -> float:
    return float(torch.linalg.norm(first.T @ second) ** 2 / min(first.shape[1], second.shape[1]))


def conflict(first: Tensor, second: Tensor) -> float:
    both = [(a, b) for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True) if a and b]
    return sum(a * b < 0 for a, b in both) / len(both)


@pytest.mark.parametrize("kind", KINDS)
def test_diagnostics_are_those_of_the_dense_matrices(kind: str) -> None:
    deltas = KINDS[kind]
    D = [delta.dense().double() for delta in deltas]
    merged = sum((w * d for w, d in zip(WEIGHTS, D, strict=True)), torch.zeros_like(D[0])) * 0.7
    told = told_of(deltas, Dense(merged.float()), normal(*D[0].shape, seed=8))
    near = {"rel": 1e-4, "abs": 1e-5}
    pairs = [(i, j) for i in range(3) for j in range(3)]
    assert told.task_norms == pytest.approx([float(d.norm()) for d in D], rel=1e-5)
    assert told.base_norm == pytest.approx(float(normal(*D[0].shape, seed=8).norm()), rel=1e-5)
    for i, j in pairs:
        assert told.cosine[i][j] == pytest.approx(float((D[i] * D[j]).sum() / D[i].norm() / D[j].norm()), **near)
        assert told.sign_conflict[i][j] == pytest.approx(conflict(D[i], D[j]), **near)
        if kind != "dense":  # 36 directions of noise: the leading 32 are not sharp
            for name, rows in (("input_overlap", True), ("output_overlap", False)):
                expected = overlap(space_of(D[i], rows), space_of(D[j], rows))
                assert getattr(told, name)[i][j] == pytest.approx(expected, abs=2e-3 if kind != "factored" else 1e-5)
    for d, spectrum, captured in zip(D, told.spectra, told.captured, strict=True):
        s = torch.linalg.svdvals(d)
        assert spectrum == pytest.approx(s[: len(spectrum)].tolist(), rel=2e-3)
        assert len(spectrum) == min(32, int((s > 1e-5 * s[0]).sum()))
        assert captured == pytest.approx(float((s[:32] ** 2).sum() / (s**2).sum()), rel=1e-3)
    assert told.ranks == [int((torch.linalg.svdvals(d) > 1e-5 * torch.linalg.svdvals(d)[0]).sum()) for d in D]
    assert told.merged is not None
    assert told.merged.norm == pytest.approx(float(merged.norm()), rel=1e-4)
    for t in range(3):
        square = float((D[t] ** 2).sum())
        others = sum(WEIGHTS[s] * float((D[s] * D[t]).sum()) for s in range(3) if s != t)
        assert told.merged.survival[t] == pytest.approx(float((merged * D[t]).sum()) / square, **near)
        assert told.merged.interference[t] == pytest.approx(others / square, **near)


def test_a_factored_merge_is_measured_as_the_dense_one() -> None:
    deltas = KINDS["factored"]
    factors = [delta.factors() for delta in deltas]
    merged = LowRank(torch.cat([f[0] for f in factors if f], 1), torch.cat([f[1] for f in factors if f]))
    by_factors, by_entries = told_of(deltas, merged).merged, told_of(deltas, Dense(merged.dense())).merged
    assert by_factors is not None
    assert by_entries is not None
    assert by_factors.survival == pytest.approx(by_entries.survival, rel=1e-4)
    assert by_factors.spectrum == pytest.approx(by_entries.spectrum, rel=1e-3)
    assert (by_factors.norm, by_factors.rank) == (pytest.approx(by_entries.norm, rel=1e-5), 8)


def test_cross_talk_is_that_of_the_input_factors() -> None:
    deltas = [low_rank(1), low_rank(2, 5), LowRank(normal(M, 2), torch.eye(N)[:2])]
    A = [delta.A.double() for delta in deltas]
    told = told_of(deltas).cross_talk
    for i in range(3):
        for j in range(3):
            expected = torch.linalg.norm(A[i] @ A[j].T) / torch.linalg.norm(A[i]) / torch.linalg.norm(A[j])
            assert told[i][j] == pytest.approx(float(expected), rel=1e-4)
    assert told_of(KINDS["mixed"]).cross_talk[1] == [None, None, None]


def test_rotation_defect_is_the_largest_of_the_blocks() -> None:
    blocks = torch.eye(4).repeat(N // 4, 1, 1)
    blocks[2] *= 1.01
    told = told_of([Rotated(normal(M, N), blocks - torch.eye(4)), rotated(2), low_rank(1)]).rotation_defect
    assert told[0] == pytest.approx(float(torch.linalg.norm(torch.eye(4) * (1.01**2 - 1))), rel=1e-4)
    assert told[1] is not None
    assert told[1] < 1e-5
    assert told[2] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_error_is_that_of_storing_base_and_delta(dtype: torch.dtype) -> None:
    base, merged = normal(M, N, seed=3), 0.01 * normal(M, N, seed=4)
    exact = base.double() + merged.double()
    told = diagnose([Dense(merged)], [1.0], Dense(merged), base, torch.Generator(), dtype)
    assert told.merged is not None
    expected = torch.linalg.norm(exact.to(dtype).double() - exact) / torch.linalg.norm(merged.double())
    assert told.merged.rounding_error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "words",
    [
        {},
        *({"dtype": dtype} for dtype in ("float32", "bfloat16", "float16")),
        *({"output": kind, "rank": rank} for kind, rank in (("lora", 4), ("delta", None))),
        {"rescale": "model", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_rounding_error_is_that_of_what_is_written(words: dict[str, Any], stored: torch.dtype, tmp_path: Path) -> None:
    weight = normal(M, N, seed=3).to(stored)
    for folder, tensor in (("base", weight), ("tuned", weight.float() + 0.01 * normal(M, N, seed=4))):
        (tmp_path / folder).mkdir()
        save_file({"x.weight": tensor}, tmp_path / folder / "model.safetensors")
    told = merge(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", method="mean", progress=False, **words)
    assert told.totals is not None
    assert told.totals.merged is not None
    found = told.totals.merged.rounding_error
    if "output" in words:
        assert found is None
        assert ("rounding error", "not measured") in told.page().facts
        return
    exact = load_file(tmp_path / "tuned" / "model.safetensors")["x.weight"].double()
    written = load_file(tmp_path / "out" / "model.safetensors")["x.weight"].double()
    expected = float((written - exact).norm() / (exact - weight.double()).norm())
    assert found == pytest.approx(expected, rel=0.02, abs=1e-6)


def test_samples_of_a_large_weight_are_near_the_whole() -> None:
    deltas = [low_rank(seed, 4, 3000, 200) for seed in (1, 2)]
    told = told_of([*deltas, None]).sign_conflict
    assert told[0][1] == pytest.approx(conflict(deltas[0].dense()[:600], deltas[1].dense()[:600]), abs=0.05)
    assert told_of([*deltas, None]).sign_conflict == told
    ranges = sample_rows(3000, 200, torch.Generator())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
    assert 0 < sum(stop - start for start, stop in ranges) * 200 <= 1 << 16


def test_the_range_finder_keeps_its_word_where_the_spectrum_is_flat() -> None:
    D = normal(300, 280)
    found, exact = leading(Dense(D), torch.Generator().manual_seed(1)), torch.linalg.svdvals(D)[:32]
    assert found.rank is None
    assert (found.s <= exact * (1 + 1e-5)).all()
    assert (found.s >= 0.85 * exact).all()
    steep = (torch.linalg.qr(normal(300, 280)).Q * torch.logspace(0, -6, 280)) @ torch.linalg.qr(
        normal(280, 280, seed=1)
    ).Q
    assert leading(Dense(steep), torch.Generator()).s.tolist() == pytest.approx(
        torch.linalg.svdvals(steep)[:32].tolist(), rel=4e-2
    )


def test_tasks_that_do_not_change_the_weight_are_none() -> None:
    told = told_of([None, low_rank(1), None], low_rank(1))
    assert told.merged is not None
    assert told.task_norms[::2] == told.ranks[::2] == told.merged.survival[::2] == [None, None]
    assert told.spectra[0] == []
    assert told.cosine[1] == [None, pytest.approx(1.0, abs=1e-5), None]
    assert told.cosine[0] == [None, None, None]
    assert told.merged.survival[1] == pytest.approx(1.0, rel=1e-4)
    assert told.merged.interference[1] == pytest.approx(0.0, abs=1e-6)


def test_a_zero_delta_has_no_directions() -> None:
    told = told_of([low_rank(1), LowRank(torch.zeros(M, 2), normal(2, N)), Dense(torch.zeros(M, N))], low_rank(1))
    assert told.task_norms[1:] == [0.0, 0.0]
    assert told.ranks == [3, 0, 0]
    assert told.cosine[0][1:] == told.input_overlap[0][1:] == told.sign_conflict[0][1:] == [None, None]
    json.dumps(told.cosine, allow_nan=False)


def test_nothing_to_diagnose_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a weight for each of the deltas, got 2 for 0 deltas"):
        told_of([None, None])
    with pytest.raises(ValueError, match="got 1 for 2 deltas"):
        diagnose([low_rank(1), low_rank(2)], [1.0], None, None, torch.Generator())


def test_totals_are_weighted_by_norms() -> None:
    small, large = [LowRank(0.1 * d.B, d.A) for d in (low_rank(1), low_rank(2))], [low_rank(3), low_rank(3)]
    each = [told_of(deltas, deltas[0]) for deltas in (small, large)]
    whole = combined(each)
    assert whole is not None
    assert whole.merged is not None
    D = [torch.cat([small[t].dense().flatten(), large[t].dense().flatten()]).double() for t in (0, 1)]
    assert whole.task_norms == pytest.approx([float(d.norm()) for d in D], rel=1e-5)
    assert whole.merged.survival == pytest.approx([float(D[0] @ d / (d @ d)) for d in D], rel=1e-4)
    norms = [[float(d.dense().norm()) for d in deltas] for deltas in (small, large)]
    shares = [a * b for a, b in norms]
    expected = sum(c.cosine[0][1] * share for c, share in zip(each, shares, strict=True)) / sum(shares)  # type: ignore[operator]
    assert whole.cosine[0][1] == pytest.approx(expected, rel=1e-4)
    assert combined([]) is None


# Reports


def report(
    layers: int = 3,
    tasks: Sequence[str] = ("law", "a & <b>"),
    diagnosed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> MergeReport:
    made = MergeReport(
        base="models/base",
        sources=dict.fromkeys(tasks, "LORA"),
        output="merged",
        output_kind="checkpoint",
        method="ties",
        params={"density": 0.2},
        weights=[1.0] * len(tasks),
        dtype=None,
        seed=0,
        notes=["a note with <tags>"],
        not_carried={"law": ["head.weight: the base has no such tensor"]},
    )
    for layer in range(layers):
        for module in ("q_proj", "down_proj"):
            deltas = [low_rank(10 * layer + t) for t in range(len(tasks))]
            told = (
                diagnose(deltas, [1.0] * len(tasks), deltas[0], 50 * normal(M, N), torch.Generator(), dtype)
                if diagnosed
                else None
            )
            name = f"model.layers.{layer}.{module}.weight"
            norms = {task: float(delta.norm()) for task, delta in zip(tasks, deltas, strict=True)}
            made.merged.append(
                WeightReport(name, (M, N), "full", None, norms, float(deltas[0].norm()), 0.0, 0.01, told)
            )
    return made


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    made = report()
    made.save(tmp_path / "report.json")
    assert MergeReport.load(tmp_path / "report.json") == MergeReport.load(tmp_path) == made
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert told["norm"] == made.norm
    assert made.totals is not None
    assert told["totals"]["cosine"] == made.totals.cosine
    assert told["version"]
    report(diagnosed=False).save(tmp_path / "report.json")
    assert MergeReport.load(tmp_path).totals is None


def test_what_is_not_a_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no report of a merge at .*: give the folder of a merge"):
        MergeReport.load(tmp_path)
    (tmp_path / "report.json").write_text('{"base": "b"}')
    with pytest.raises(
        ValueError, match=r"report.json is not the report of a merge by this version of orthoft: 'sources'"
    ):
        MergeReport.load(tmp_path)


class Reader(HTMLParser):
    """What a page holds: its words, its links and scripts, and whether its elements are closed."""

    EMPTY = ("meta", "br", "line", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [(tag, value) for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def test_the_page_shows_every_weight_and_task_and_loads_nothing(tmp_path: Path) -> None:
    made = report()
    made.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert not page.open
    assert not page.loads
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    words = "\n".join(page.words)
    for expected in (*made.sources, *(weight.name for weight in made.merged), *made.notes, "ties(density=0.2)"):
        assert expected in words
    assert "law: head.weight: the base has no such tensor" in words
    assert page.counts["polyline"] == 6 * 3
    assert page.counts["script"] == 1
    titles = (
        "survives",
        "stand to each other",
        "Survival by layer",
        "Interference",
        "Rounding",
        "Spectra before and after",
    )
    assert all(title in words for title in titles)


def test_the_page_leaves_out_what_says_nothing() -> None:
    """A float32 base is hardly rounded, nothing is truncated in a checkpoint, and dense results have no rank."""
    made = report(dtype=torch.float32)
    words = Reader(made.page().html()).words
    assert "Rounding" not in words
    assert "rounding" in words
    assert not {"rank", "truncation"} & set(words)
    made.merged[0].truncation_error, made.merged[0].rank = 0.25, 4
    assert {"rank", "truncation", "0.25"} <= set(Reader(made.page().html()).words)


def test_the_report_is_strict_json(tmp_path: Path) -> None:
    made = report(1)
    made.merged[0].norm = float("inf")
    made.save(tmp_path / "report.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert told["merged"][0]["norm"] is None
    assert told["merged"][1]["norm"] == made.merged[1].norm


def test_a_page_without_diagnostics_or_with_one_task_is_whole() -> None:
    plain = Reader(report(diagnosed=False).page().html())
    assert not plain.open
    assert "without diagnostics" in "".join(plain.words)
    alone = "".join(Reader(report(tasks=["only"]).page().html()).words)
    assert "stand to each other" not in alone
    assert "Spectra before and after" in alone


def test_a_large_page_stays_small() -> None:
    made = report(43, [f"task {t}" for t in range(8)])
    modules = made.merged
    for copy in range(3):
        renamed = [WeightReport(**{**vars(w), "name": w.name.replace("proj", f"proj{copy}")}) for w in modules]
        made.merged = made.merged + renamed
    assert len(made.merged) > 300
    assert len(made.page().html().encode()) < 2e6


def test_a_notebook_shows_a_fragment() -> None:
    page = Reader(report()._repr_html_())
    assert not page.open
    assert not page.loads
    assert "a & <b>" in "".join(page.words)
    assert "html" not in page.counts


def test_layers_and_modules_are_read_from_names() -> None:
    names = [
        "model.layers.0.q.weight",
        "model.layers.0.mlp.experts.3.up.weight",
        "model.layers.1.q.weight",
        "head.weight",
    ]
    where = grid(names)
    assert where.rows == ["model.layers.0", "model.layers.1", "outside the layers"]
    assert where.columns == ["q", "mlp.experts.*.up", "head"]
    cells = where.cells(dict(zip(names, [1.0, 2.0, 3.0, None], strict=True)))
    assert cells == [[1.0, 2.0, None], [3.0, None, None], [None, None, None]]
    deep = grid([f"layers.{i}.m{j}.weight" for i in range(250) for j in range(40)])
    assert (len(deep.rows), len(deep.columns)) == (84, 24)
    assert deep.columns[-1] == "other modules"


def test_pictures_say_what_they_are_given() -> None:
    shown = heat_map(["r&1"], ["c"], [[-0.5]], top=1.0)
    assert 'class="neg"' in shown
    assert "--v:0.50" in shown
    assert "r&amp;1" in shown
    around = heat_map(["r"], ["a", "b", "c"], [[0.5, 0.25, 0.9]], top=1.0, middle=0.5)
    assert [around.count(text) for text in ("--v:0.00", "--v:0.50", "--v:0.80", 'class="neg"')] == [1, 1, 1, 1]
    drawn = curves("w", {"a": [10.0, 1.0, 0.0], "b": []})
    points = drawn.split('points="')[1].split('"')[0].split()
    (_, top), (_, below) = (point.split(",") for point in points)
    assert float(below) - float(top) == pytest.approx((170 - 22 - 6) / 4, abs=0.2)  # one decade of four
    assert [number(value) for value in (None, 0.0, 0.5, -0.001, 12345.0)] == ["–", "0.00", "0.50", "-0.001", "1.2e+04"]
