"""What `inspect` measures of sources, what it advises on cases whose answer is known, and what a merge will cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging_files import linear_weights, load, save_adapter, save_base, save_lora, save_oftv2
from safetensors.torch import save_file
from torch import Tensor

from orthoft.delta import LowRank
from orthoft.merging import merge, plan
from orthoft.merging.reports.advice import Advice, Findings, advise, findings
from orthoft.merging.reports.diagnostics import diagnose
from orthoft.merging.reports.estimate import Estimate, Job, Rates, calibrate, estimate, estimates, plan_table, total
from orthoft.merging.reports.inspection import InspectReport, inspect_sources
from orthoft.recipes.describe import describe

Factors = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
R = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("inspect") / "base", "llama")


def lora(base: Path, folder: Path, factors: Factors, seed: int, size: float = 0.1) -> Path:
    """Save a LoRA on every linear weight whose factors ``B`` (m, r), ``A`` (r, n) a function draws."""
    random, tensors, rank = torch.Generator().manual_seed(seed), {}, 0
    for module, (weight, _) in linear_weights(base, "llama").items():
        B, A = factors(*weight.shape, random)
        tensors |= {f"{module}.lora_B.weight": size * B, f"{module}.lora_A.weight": A}
        rank = B.shape[1]
    names = sorted({name.split(".")[-3] for name in tensors})
    return save_adapter(folder, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}, tensors)


def drawn(rank: int = R) -> Factors:
    return lambda m, n, g: (torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g))


def reading(task: int, rank: int = R) -> Factors:
    """Factors that read inputs of their own."""
    return lambda m, n, g: (torch.randn(m, rank, generator=g), torch.eye(n)[task * rank : (task + 1) * rank])


def within(core: Tensor) -> Factors:
    """Factors of fixed row and column spaces, with this core."""
    return lambda m, n, g: (torch.eye(m)[:, : len(core)] @ core, torch.eye(n)[: len(core)])


def main(report: InspectReport) -> tuple[str, str]:
    return report.advice[0].method, report.advice[0].space


def test_unrelated_tasks_are_summed(base: Path, tmp_path: Path) -> None:
    folders = [lora(base, tmp_path / f"t{seed}", drawn(2), seed) for seed in (1, 2)]
    report = inspect_sources(base, folders)
    assert main(report) == ("task_arithmetic", "auto")
    assert "unrelated tasks" in report.advice[0].why
    assert report.totals.cosine[0][1] == pytest.approx(0.0, abs=0.1)


def test_tasks_that_read_different_inputs_are_summed(base: Path, tmp_path: Path) -> None:
    report = inspect_sources(base, [lora(base, tmp_path / f"t{task}", reading(task), task) for task in (0, 1)])
    assert main(report) == ("task_arithmetic", "auto")
    assert "Orthogonal Adaptation" in report.advice[0].why
    assert report.totals.cross_talk[0][1] == 0.0


def test_tasks_that_quarrel_elect_signs(base: Path, tmp_path: Path) -> None:
    folders = [lora(base, tmp_path / f"t{sign}", drawn(), 1, sign * 0.1) for sign in (1, -1)]
    report = inspect_sources(base, folders)
    assert main(report) == ("ties", "full")
    assert "100 % of the entries are pushed in opposite ways" in report.advice[0].why
    assert report.totals.sign_conflict[0][1] == 1.0


def test_tasks_that_agree_are_averaged(base: Path, tmp_path: Path) -> None:
    report = inspect_sources(base, [lora(base, tmp_path / name, drawn(), 1) for name in ("a", "b")])
    assert main(report) == ("mean", "auto")
    assert "mean cosine 1.00" in report.advice[0].why


def test_it_is_what_tasks_read_that_counts(base: Path, tmp_path: Path) -> None:
    """They write to the same outputs, but read inputs drawn at random."""
    writing: Factors = lambda m, n, g: (torch.eye(m)[:, :2], torch.randn(2, n, generator=g))  # noqa: E731
    report = inspect_sources(base, [lora(base, tmp_path / f"t{seed}", writing, seed) for seed in (1, 2)])
    assert report.totals.output_overlap[0][1] == 1.0
    assert [one.method for one in report.advice] == ["task_arithmetic"]


def test_chance_is_that_of_the_inputs() -> None:
    random = torch.Generator().manual_seed(0)
    deltas = [LowRank(*(torch.randn(size, generator=random) for size in ((8, 4), (4, 40)))) for _ in range(2)]
    told = diagnose(deltas, [1.0, 1.0], None, None, random)
    assert findings(["a", "b"], [((8, 40), told)], False, [], []).chance == pytest.approx(4 / 40)


def test_tasks_in_the_same_directions_are_decorrelated(base: Path, tmp_path: Path) -> None:
    cores = torch.eye(4), torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * 2)
    report = inspect_sources(base, [lora(base, tmp_path / f"t{i}", within(core), 0) for i, core in enumerate(cores)])
    assert main(report) == ("tsv", "auto")
    assert report.totals.input_overlap[0][1] == report.totals.output_overlap[0][1] == 1.0
    assert report.totals.cosine[0][1] == 0.0


def test_rotations_are_merged_as_rotations(base: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        save_oftv2(tmp_path / f"t{seed}", linear_weights(base, "llama"), "cayley", seed=seed)
    report = inspect_sources(base, [tmp_path / "t1", tmp_path / "t2"])
    assert main(report) == ("mean", "rotation")
    assert "all sources rotate" in report.advice[0].why
    assert all(defect is not None and defect < 1e-5 for defect in report.totals.rotation_defect)
    mixed = inspect_sources(base, [tmp_path / "t1", lora(base, tmp_path / "t3", drawn(), 3)])
    assert ("mean", "rotation") not in [(one.method, one.space) for one in mixed.advice]
    assert "t1 changes weights without low-rank factors" in next(one.why for one in mixed.advice if one.space == "full")


def test_weights_stored_inputs_first_are_measured_as_others(tmp_path: Path) -> None:
    """The tasks read different inputs; what they write is drawn. GPT-2 stores the inputs first."""
    base = save_base(tmp_path / "base", "gpt2")
    for task in (0, 1):
        tensors = {}
        for module, (weight, _) in linear_weights(base, "gpt2").items():
            B, A = reading(task)(*weight.shape, torch.Generator().manual_seed(task))
            tensors |= {f"{module}.lora_B.weight": 0.1 * B, f"{module}.lora_A.weight": A}
        config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": ["c_attn", "c_proj", "c_fc"]}
        save_adapter(tmp_path / f"t{task}", {**config, "fan_in_fan_out": True}, tensors)
    report = inspect_sources(base, [tmp_path / "t0", tmp_path / "t1"])
    assert "Orthogonal Adaptation" in report.advice[0].why
    assert report.totals.input_overlap[0][1] == report.totals.cross_talk[0][1] == 0.0
    assert report.totals.output_overlap[0][1] > 0.01


def test_circumstances_are_told_beside_the_method(base: Path, tmp_path: Path) -> None:
    folders = [lora(base, tmp_path / "small", reading(0, 2), 1), lora(base, tmp_path / "large", reading(1, 4), 2, 2.0)]
    told = {one.why.split(" ")[0]: one for one in inspect_sources(base, folders).advice}
    assert told["the"].why == "the ranks differ (2, 4): core space holds them all exactly"
    assert (told["the"].method, told["the"].space) == ("any", "core")
    assert told["norms"].why.count("small=") == told["norms"].why.count("large=") == 1


def test_dora_is_merged_in_full(base: Path, tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
    for name, dora in (("plain", False), ("dora", True)):
        save_lora(tmp_path / name, load(base), dora=dora, **targets)
    report = inspect_sources(base, [tmp_path / "plain", tmp_path / "dora"])
    assert any(one.space == "full" and one.why.startswith("dora changes") for one in report.advice)


def test_many_tasks_keep_the_mean_norm(base: Path, tmp_path: Path) -> None:
    folders = [lora(base, tmp_path / f"t{task}", reading(task, 2), task) for task in range(8)]
    report = inspect_sources(base, folders)
    assert main(report) == ("task_arithmetic", "auto")
    assert any(one.method == "opcm" and "8 tasks has 2.8 times" in one.why for one in report.advice)


def found(**changes: object) -> Findings:
    plain = {
        "tasks": ("a", "b"),
        "cosine": 0.1,
        "widest": 0.2,
        "conflict": 0.5,
        "cross_talk": 0.3,
        "overlap": 0.2,
        "chance": 0.1,
        "norms": (1.0, 1.0),
        "swelling": 1.4,
        "relative": 0.1,
        "ranks": (4, 4),
        "dense": (),
        "turning": False,
        "defect": None,
        "rounding": None,
    }
    return Findings(**{**plain, **changes})  # type: ignore[arg-type]


def test_rules_hold_on_both_sides_of_their_bounds() -> None:
    numbers = "mean cosine 0.10, sign conflict 0.50, input overlap 0.20 with chance 0.10"
    assert advise(found()) == [
        Advice("task_arithmetic", "auto", f"no measured number speaks against a sum ({numbers})")
    ]
    assert [one.method for one in advise(found(tasks=("a",), norms=(1.0,), cosine=None))] == ["task_arithmetic"]
    assert [one.method for one in advise(found(conflict=0.56))] == ["ties"]
    assert [one.method for one in advise(found(conflict=0.54))] == ["task_arithmetic"]
    assert [one.method for one in advise(found(cosine=0.34))] == ["mean"]
    assert [one.method for one in advise(found(cosine=0.33))] == ["task_arithmetic"]
    assert [one.method for one in advise(found(cosine=0.21, tasks=tuple("abcd")))] == ["mean"]
    assert [one.method for one in advise(found(cosine=0.34, overlap=0.9))] == ["mean"]
    assert [one.method for one in advise(found(overlap=0.26))] == ["tsv"]
    assert [one.method for one in advise(found(cross_talk=2e-3))] == ["task_arithmetic"]
    assert "is 9.0e-04, below 0.001" in advise(found(cross_talk=9e-4))[0].why
    faint = advise(found(rounding=0.339, relative=0.005))[-1].why
    assert "the changes are 0.50% of the weights" in faint
    assert "about 34% of them: write float32 or a LoRA" in faint
    assert len(advise(found(rounding=None, relative=0.009))) == len(advise(found(rounding=0.14))) == 1


@pytest.mark.parametrize("share", [0.02, 0.003, 0.001])
def test_what_bfloat16_takes_is_measured(share: float, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    stored = {f"{name}.weight": (0.02 * torch.randn(64, 96, generator=random)).bfloat16() for name in "xy"}
    changes = {name: share * 0.02 * torch.randn(64, 96, generator=random) for name in stored}
    small = {name: tensor.float() + 0.5 * changes[name] for name, tensor in stored.items()}
    large = {name: tensor.float() + changes[name] for name, tensor in stored.items()}
    for folder, tensors in (("base", stored), ("small", small), ("large", large)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    lost = sum(float((large[name].bfloat16().float() - large[name]).norm() ** 2) for name in stored) ** 0.5
    expected = lost / sum(float(change.norm() ** 2) for change in changes.values()) ** 0.5
    said = [one.why for one in inspect_sources(tmp_path / "base", [tmp_path / "small", tmp_path / "large"]).advice]
    told = [why for why in said if "rounding to bfloat16" in why]
    assert len(told) == (expected > 0.15)
    assert all(f"adds an error of about {expected:.0%} of them" in why for why in told)


def test_reports_are_told_as_text_json_and_a_page(base: Path, tmp_path: Path) -> None:
    folders = [lora(base, tmp_path / f"t{seed}", drawn(), seed) for seed in (1, 2)]
    report = inspect_sources(base, [("law", folders[0]), ("a <b>", folders[1])])
    said = str(report)
    assert "law    LORA, 6 weights, norm" in said
    assert "mean cosine: " in said
    assert "advice: method task_arithmetic: " in said
    report.to_json(tmp_path / "inspect.json")
    told = json.loads((tmp_path / "inspect.json").read_text(encoding="utf-8"))
    assert told["totals"]["cosine"] == report.totals.cosine
    assert [weight["name"] for weight in told["weights"]] == [weight.name for weight in report.weights]
    report.to_html(tmp_path / "inspect.html")
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert all(weight.name in page for weight in report.weights)
    assert "a &lt;b&gt;" in page
    assert "survives" not in page
    assert "What this suggests" in page
    assert "http:" not in page
    assert "https:" not in page


def test_inspection_is_the_same_each_time_and_reads_one_weight_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orthoft.merging.files.tensors import TensorFolder

    folders = [lora(base, tmp_path / f"t{seed}", drawn(), seed) for seed in (1, 2)]
    read: list[str] = []
    original = TensorFolder.__getitem__

    def noted(self: TensorFolder, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(TensorFolder, "__getitem__", noted)
    report = inspect_sources(base, folders)
    of_base = [name for name in read if "lora_" not in name]
    assert of_base == [weight.name for weight in report.weights]
    assert inspect_sources(base, folders).to_dict() == report.to_dict()


@pytest.mark.parametrize(
    ("sources", "error", "line"),
    [
        ("one", ValueError, "sources is a sequence of at least one folder"),
        ([], ValueError, "sources is a sequence of at least one folder"),
        (["{here}"], FileNotFoundError, "holds neither an adapter"),
    ],
)
def test_bad_sources_are_one_line(
    sources: object, error: type[Exception], line: str, base: Path, tmp_path: Path
) -> None:
    given = [str(tmp_path) for _ in sources] if isinstance(sources, list) else sources
    with pytest.raises(error, match=line) as caught:
        inspect_sources(base, given)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


def test_describe_tells_the_merge_a_checkpoint_comes_from(base: Path, tmp_path: Path) -> None:
    report = merge(base, [lora(base, tmp_path / "t", drawn(), 1)], tmp_path / "out", method="mean", progress=False)
    report.save(tmp_path / "out" / "report.json")
    told = describe(tmp_path / "out")
    assert told["merged"]["method"] == "mean"
    assert told["merged"]["sources"] == {"t": "LORA"}


# What a merge will cost

RATES = Rates(matmul=1e10, svd=1e9, copy=1e9, method={160: 1e-3, 512: 1e-2})


def job(space: str, n: int = 1024, tasks: int = 8, rank: int | None = 16, rowwise: bool = False) -> Job:
    result = None if rank is None or space == "full" else tasks * rank
    sizes = (2 if rank is None else 4,) * tasks
    return Job("w", (n, n), (rank,) * tasks, tasks, space, result, 2, rowwise, "checkpoint", 2 * n * n, sizes, (3, 2))


def test_bytes_are_those_of_the_files() -> None:
    cost = estimate(job("core"), RATES)
    assert cost.bytes_read == 1024 * 1024 * 2 + 8 * 16 * 2048 * 4
    assert cost.bytes_written == 1024 * 1024 * 2
    dense = estimate(job("full", rank=None), RATES)
    assert dense.bytes_read == 9 * 1024 * 1024 * 2


def test_costs_grow_as_the_spaces_do() -> None:
    def ratio(space: str, of: Callable[[Estimate], float], **larger: int) -> float:
        return of(estimate(job(space, **larger), RATES)) / of(estimate(job(space), RATES))

    assert 1.9 < ratio("core", lambda cost: cost.flops, n=2048) < 4.1
    assert ratio("rotation", lambda cost: cost.flops, n=2048) == pytest.approx(8, rel=0.1)
    assert ratio("full", lambda cost: cost.memory, tasks=16) > 1.7
    by_rows = estimate(job("full", n=4096, rowwise=True), RATES), estimate(job("full", n=4096, rowwise=False), RATES)
    assert by_rows[0].memory < by_rows[1].memory


def test_the_plan_is_a_table_with_totals(base: Path, tmp_path: Path) -> None:
    folders = [("a", lora(base, tmp_path / "a", drawn(2), 1)), ("b", lora(base, tmp_path / "b", drawn(4), 2))]
    todo = plan(base, folders, method="task_arithmetic")
    costs = estimates(todo, rates=RATES)
    whole = total(todo, costs)
    lines = plan_table(todo, costs, whole).splitlines()
    assert lines[0].split() == [
        "weight",
        "shape",
        "sources",
        "space",
        "rank",
        "reads",
        "writes",
        "GFLOP",
        "seconds",
        "memory",
    ]
    assert [line.split()[0] for line in lines[1 : 1 + len(todo.merged)]] == list(todo.merged)
    assert " a, b " in lines[1]
    assert " core " in lines[1]
    assert " 6 " in lines[1]
    assert lines[1 + len(todo.merged)].split()[:3] == ["total", "6", "weights"]
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert whole.bytes_written == pytest.approx(size, rel=0.1)
    assert whole.memory > max(cost.memory for cost in costs.values())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "opcm", "dare"])
def test_methods_are_tried_before_they_are_timed(method: str, base: Path, tmp_path: Path) -> None:
    todo = plan(base, [lora(base, tmp_path / "a", drawn(), 1)], method=method)
    params, _ = todo.wish.bound()
    rates = calibrate(todo.wish.method, params, todo.wish.weights)
    assert min(rates.matmul, rates.svd, rates.copy, *rates.method.values()) > 0
    assert all(cost.seconds > 0 for cost in estimates(todo, rates=rates).values())
