"""Merging with numbers from data: the methods, the files, and the collector on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference_statistics as reference
import torch
from merging_files import MODELS, TARGETS, bert_config, randomised, save_base
from peft import HRAConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

from orthoft.delta import Dense
from orthoft.merging import METHODS, merge
from orthoft.merging.files.tensors import TensorFolder
from orthoft.merging.methods.fisher import fisher
from orthoft.merging.methods.frank_wolfe import frank_wolfe
from orthoft.merging.methods.ota import ota
from orthoft.merging.methods.regmean import regmean
from orthoft.merging.statistics import STATISTICS_OF, open_statistics, statistics_of_tasks
from orthoft.merging.weightwise import merge_weight
from orthoft.merging.wish import wish_for
from orthoft.recipes.gradients import gradients
from orthoft.recipes.statistics import adam_moments, collect, from_optimizer

T, M, N = 3, 5, 7
WEIGHTS = [0.5, 2.0, 1.5]


def some_tasks(seed: int = 0, n: int = N) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Deltas (T, M, n), positive numbers of the same shape, and Gram matrices (n, n), all in float64."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(T, M, n, generator=random, dtype=torch.float64)
    squares = torch.randn(T, M, n, generator=random, dtype=torch.float64) ** 2
    inputs = torch.randn(T, 3 * n, n, generator=random, dtype=torch.float64) * (1 + torch.arange(float(n)))
    return x, list(squares), [X.T @ X for X in inputs]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


SETTINGS = [(name, params) for name, case in reference.CASES.items() for params in ({}, *case.settings)]


# The methods


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
@pytest.mark.parametrize("weights", [[1.0] * T, WEIGHTS])
def test_with_statistics_it_is_the_oracle(name: str, params: dict, weights: list[float]) -> None:
    x, squares, grams = some_tasks()
    own = grams if STATISTICS_OF[name] == "gram" else squares
    want = reference.CASES[name].oracle(list(x), weights, statistics=own, **params)
    given = [G[None].float() for G in grams] if STATISTICS_OF[name] == "gram" else [s.float() for s in squares]
    got = METHODS[name].merge(x.float(), torch.tensor(weights), statistics=given, **params)
    assert got.dtype == torch.float32
    assert relative(got, want) < 2e-5


@pytest.mark.parametrize("name", reference.CASES)
def test_a_weight_that_not_all_tasks_have_statistics_of_is_merged_without(name: str) -> None:
    x, squares, grams = some_tasks()
    given = [G[None] for G in grams] if STATISTICS_OF[name] == "gram" else squares
    without = METHODS[name].merge(x, torch.tensor(WEIGHTS))
    assert torch.equal(METHODS[name].merge(x, torch.tensor(WEIGHTS), statistics=[given[0], None, given[2]]), without)
    assert relative(METHODS[name].merge(x, torch.tensor(WEIGHTS), statistics=given), without) > 1e-2


@pytest.mark.parametrize("name", ["regmean", "frank_wolfe"])
@pytest.mark.parametrize("n", [M, N])
def test_weights_stored_with_the_inputs_first(name: str, n: int) -> None:
    """Also where the weight is square, so that only the shape of the Gram matrix tells the side."""
    x, _, grams = some_tasks(n=n)
    ones = torch.ones(T)
    want = METHODS[name].merge(x, ones, statistics=[G[None] for G in grams])
    assert relative(METHODS[name].merge(x.mT, ones, statistics=[G[..., None] for G in grams]).mT, want) < 1e-12
    if n == M:
        assert relative(METHODS[name].merge(x, ones, statistics=[G[..., None] for G in grams]), want) > 1e-2


@pytest.mark.parametrize("name", reference.CASES)
def test_every_method_with_statistics_says_of_which_kind(name: str) -> None:
    assert {method for method in METHODS if METHODS[method].needs("statistics")} == set(STATISTICS_OF)
    assert METHODS[name].entries({})


def test_fisher_by_hand() -> None:
    x = torch.tensor([[[2.0, 2.0]], [[4.0, 4.0]]])
    information = [torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    merged = fisher(x, torch.ones(2), statistics=information)
    torch.testing.assert_close(merged, torch.tensor([[2.5, 3.0]]))  # without information, the mean
    merged = fisher(x, torch.tensor([1.0, 3.0]), statistics=information)
    torch.testing.assert_close(merged, torch.tensor([[3.0, 3.5]]))


def test_fisher_minimises_its_objective() -> None:
    x, information, _ = some_tasks()
    X = fisher(x, torch.tensor(WEIGHTS), statistics=information).requires_grad_()
    parts = zip(WEIGHTS, information, x, strict=True)
    sum(w * ((F + 1e-6) * (X - task) ** 2).sum() for w, F, task in parts).backward()
    assert X.grad is not None
    assert X.grad.abs().max() < 1e-12


def test_the_base_drops_out() -> None:
    x, information, grams = some_tasks()
    base = 3 * torch.randn(M, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ones = torch.ones(T)
    of_models = fisher(base + x, ones, statistics=information)
    assert relative(of_models, base + fisher(x, ones, statistics=information)) < 1e-12
    given = [G[None] for G in grams]
    assert relative(regmean(base + x, ones, statistics=given), base + regmean(x, ones, statistics=given)) < 1e-10


def test_regmean_is_the_regression_on_the_tasks_outputs() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(T, M, N, generator=random, dtype=torch.float64)
    inputs = torch.randn(T, 20, N, generator=random, dtype=torch.float64)
    outputs = torch.cat([X @ task.T for X, task in zip(inputs, x, strict=True)])
    want = torch.linalg.lstsq(torch.cat(list(inputs)), outputs).solution.T
    grams = [(X.T @ X)[None] for X in inputs]
    assert relative(regmean(x, torch.ones(T), reduce=1.0, ridge=1e-12, statistics=grams), want) < 1e-9
    assert relative(regmean(x, torch.ones(T), statistics=grams), want) > 1e-3


def test_regmean_of_too_few_examples_averages_where_no_input_is() -> None:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(2, M, N, generator=random, dtype=torch.float64)
    inputs = torch.randn(2, 2, N, generator=random, dtype=torch.float64)  # two examples each, of 7 dimensions
    grams = [(X.T @ X)[None] for X in inputs]
    merged = regmean(x, torch.ones(2), reduce=1.0, statistics=grams)
    unseen = torch.linalg.svd(torch.cat(list(inputs))).Vh[4:].T
    torch.testing.assert_close(merged @ unseen, x.mean(0) @ unseen, rtol=0, atol=1e-6)
    for X, task in zip(inputs, x, strict=True):  # and is right on all that is seen
        torch.testing.assert_close(merged @ X.T, task @ X.T, rtol=0, atol=1e-4)
    zeros = [torch.zeros(1, N, N, dtype=torch.float64)] * 2
    torch.testing.assert_close(regmean(x, torch.ones(2), statistics=zeros), x.mean(0))


def test_frank_wolfe_by_hand() -> None:
    """``X^2 + 3 (X - 1)^2`` is least at 3/4, which one exact line search from the mean 1/2 finds."""
    x, grams = torch.tensor([[[0.0]], [[1.0]]]), [torch.tensor([[[1.0]]]), torch.tensor([[[3.0]]])]
    assert frank_wolfe(x, torch.ones(2), steps=1, statistics=grams).item() == 0.75
    assert frank_wolfe(x, torch.ones(2)).item() == 0.5


def test_frank_wolfe_never_grows_and_converges_to_the_minimum_over_the_hull() -> None:
    x, _, grams = some_tasks(1)
    points = [w * task for w, task in zip(WEIGHTS, x, strict=True)]

    def error(steps: int, zero: bool = False) -> float:
        given = [G[None] for G in grams]
        X = frank_wolfe(x, torch.tensor(WEIGHTS), steps=steps, zero=zero, statistics=given)
        return reference.hull_error(X, points, grams)

    for zero in (False, True):
        vertices = [*points, torch.zeros_like(points[0])] if zero else points
        least = reference.hull_error(reference.hull_minimum(points, grams, vertices), points, grams)
        errors = [error(steps, zero) for steps in range(1, 12)]
        assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
        assert errors[0] > errors[-1] > least * (1 - 1e-9)
        assert error(3000, zero) - least < 1e-3 * least
    mean = sum(points[1:], points[0]) / T
    assert errors[0] < reference.hull_error(mean, points, grams)


def test_frank_wolfe_leaves_out_a_task_that_its_inputs_speak_against() -> None:
    """A task without inputs of its own has no say, and the base may be a vertex."""
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)[None]
    merged = frank_wolfe(x, torch.ones(2), steps=100, statistics=[eye, 0 * eye])
    torch.testing.assert_close(merged, x[0], rtol=0, atol=1e-9)
    opposite = torch.stack([x[0], -0.5 * x[0]])
    away = frank_wolfe(opposite, torch.tensor([1.0, 1.0]), steps=100, zero=True, statistics=[0 * eye, 0 * eye])
    torch.testing.assert_close(away, opposite.mean(0))  # nothing to gain: it stays where it began


def test_ota_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 0.1, 4.0]], [[3.0, 0.1, 0.1, 2.0]]])
    moments = [torch.tensor([[4.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 9.0]])]
    # scores v x^2: (4, 4, .01, 16) and (9, .01, .01, 36): half of them are three entries (a tie) and two
    want = torch.tensor([[(2 * 1 + 1 * 3) / 3, 2.0, 0.0, (1 * 4 + 3 * 2) / 4]])
    got = ota(x, torch.ones(2), density=0.5, epsilon=0.0, statistics=moments)
    torch.testing.assert_close(got, want)
    every = ota(x, torch.ones(2), density=1.0, epsilon=0.0, statistics=moments)
    torch.testing.assert_close(every, torch.tensor([[5 / 3, 1.05, 0.1, 2.5]]))


def test_a_task_that_does_not_change_the_weight_has_no_say_in_ota() -> None:
    x, moments, _ = some_tasks()
    x[1] = 0
    both = ota(x, torch.ones(T), statistics=moments)
    without = ota(x[[0, 2]], torch.ones(2), epsilon=0.0, statistics=[moments[0], moments[2]])
    assert relative(both, without) < 1e-5


def test_tiny_second_moments_do_not_underflow() -> None:
    x, moments, _ = some_tasks()
    want = ota(x.float(), torch.ones(T), statistics=[v.float() for v in moments])
    tiny = ota(1e-4 * x.float(), torch.ones(T), statistics=[1e-36 * v.float() for v in moments])
    assert relative(1e4 * tiny, want) < 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fisher(x, torch.tensor([1.0, -1.0, 2.0])), "method 'fisher' takes weights of 0 or more, not all 0"),
        (lambda x: regmean(x, torch.zeros(3)), "method 'regmean' takes weights of 0 or more, not all 0, got"),
        (lambda x: ota(x, -torch.ones(3)), "method 'ota' takes weights of 0 or more"),
        (lambda x: fisher(x, torch.ones(3), epsilon=0.0), "epsilon is added to the Fisher information, above 0, got"),
        (lambda x: regmean(x, torch.ones(3), reduce=1.5), "reduce scales the off-diagonal entries, in [0, 1], got 1.5"),
        (lambda x: regmean(x, torch.ones(3), ridge=0.0), "ridge is a share of the mean diagonal entry, above 0, got"),
        (lambda x: frank_wolfe(x, torch.ones(3), steps=0), "steps is how often a vertex is chosen, 1 or more, got 0"),
        (lambda x: ota(x, torch.ones(3), density=0.0), "density is the share of entries kept, in (0, 1], got 0.0"),
        (lambda x: ota(x, torch.ones(3), power=-1.0), "power and epsilon are 0 or more, got -1.0"),
        (
            lambda x: regmean(x, torch.ones(3), statistics=[torch.ones(1, N, N) - 2 * torch.eye(N)] * 3),
            "the Gram matrices are not positive semidefinite",
        ),
    ],
)
def test_wrong_parameters_are_told_in_one_line(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(some_tasks()[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class ByRows(Dense):
    """A change that is never asked for as a whole."""

    def dense(self) -> Tensor:
        raise AssertionError("the whole task was made dense")

    def rows(self, start: int, stop: int) -> Tensor:
        return self.d[start:stop]


def test_fisher_goes_through_large_weights_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    x, numbers = torch.randn(3, 12, 9, generator=random), torch.rand(3, 12, 9, generator=random)
    want = METHODS["fisher"].merge(x, torch.ones(3), statistics=[*numbers])
    choice = wish_for(3, method="fisher").choice([None] * 3, vector=False)
    monkeypatch.setattr("orthoft.merging.weightwise.SLICE", 5 * 9)
    got = merge_weight([ByRows(task) for task in x], choice, None, torch.Generator(), [*numbers])
    torch.testing.assert_close(got.delta.dense(), want)
    assert got.task_norms == pytest.approx(torch.linalg.vector_norm(x, dim=(1, 2)).tolist())


# The files


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TensorFolder:
    return TensorFolder(save_base(tmp_path_factory.mktemp("base") / "llama", "llama"))


def save_statistics(file: Path, tensors: dict[str, Tensor], kind: str | None = "fisher") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, None if kind is None else {"kind": kind, "examples": "4"})
    return file


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("prefix", ["", "inner.", "-model."])
def test_fisher_information_comes_at_unit_root_mean_square(prefix: str, llama: TensorFolder, tmp_path: Path) -> None:
    """In a folder or a file, under the base's names, with a prefix, or without one of the base's."""
    own = {Q: 5 * torch.rand(32, 32), NORM: torch.rand(32)}
    named = {name.removeprefix("model.") if prefix == "-model." else prefix + name: t for name, t in own.items()}
    save_statistics(tmp_path / "statistics.safetensors", named | {"a.head.weight": torch.ones(3)})
    for path in (tmp_path, tmp_path / "statistics.safetensors"):
        opened = open_statistics(path, llama)
        assert (opened.kind, opened.metadata["examples"], opened.not_used) == ("fisher", "4", ["a.head.weight"])
        every = torch.cat([t.flatten() for t in own.values()])
        assert opened.root_mean_square == pytest.approx((every**2).mean().sqrt().item(), rel=1e-6)
        matrix, vector = opened.get(Q), opened.get(NORM)
        assert matrix is not None
        assert vector is not None
        assert opened.get("lm_head.weight") is None
        assert vector.shape == (1, 32)
        torch.testing.assert_close(matrix, own[Q] / opened.root_mean_square)


def test_second_moments_and_gram_matrices_come_as_they_are(llama: TensorFolder, tmp_path: Path) -> None:
    moments = torch.rand(32, 32)
    opened = open_statistics(save_statistics(tmp_path / "v.safetensors", {Q: moments}, "second_moment"), llama)
    got = opened.get(Q)
    assert got is not None
    assert torch.equal(got, moments)
    X = torch.randn(40, 48)
    for shape in ((1, 48, 48), (48, 48, 1)):  # down_proj: (32, 48); up_proj of other models: (48, 32)
        name = f"model.layers.1.mlp.{'down_proj' if shape[0] == 1 else 'gate_proj'}.weight"
        gram = (X.T @ X).to(torch.bfloat16).reshape(shape)
        opened = open_statistics(save_statistics(tmp_path / "g.safetensors", {name: gram}, "gram"), llama)
        assert torch.equal(opened.get(name), gram.float())


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({Q: torch.ones(32, 32)}, None, "unknown kind in the metadata of"),
        ({Q: torch.ones(32, 32)}, "fischer", "'fischer', did you mean 'fisher'? Choose from: fisher, gram"),
        ({"other": torch.ones(3)}, "fisher", "is of another base: none of its names, e.g. 'other', is in it"),
        ({Q: torch.ones(32, 3)}, "fisher", f"has shape (32, 3), fisher statistics of the base's '{Q}' have (32, 32)"),
        ({Q: torch.ones(32, 32)}, "gram", "gram statistics of the base's"),
        ({Q: torch.ones(32, 32) / 0}, "fisher", f"'{Q}' in"),
        ({Q: -torch.ones(32, 32)}, "second_moment", "has entries below 0, which a mean of squares cannot have"),
        ({Q: torch.randn(1, 32, 32)}, "gram", "is no Gram matrix: it is not symmetric, or negative on its diagonal"),
        ({Q: -torch.eye(32)[None]}, "gram", "is no Gram matrix"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    tensors: dict[str, Tensor], kind: str | None, message: str, llama: TensorFolder, tmp_path: Path
) -> None:
    file = save_statistics(tmp_path / "x.safetensors", tensors, kind)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_statistics(file, llama).get(Q)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_have_to_be_given_for_all_and_of_the_methods_kind(llama: TensorFolder, tmp_path: Path) -> None:
    a = save_statistics(tmp_path / "a.safetensors", {Q: torch.ones(32, 32)})
    good = statistics_of_tasks("fisher", {"b": a, "a": a}, ["a", "b"], llama)
    assert list(good) == ["a", "b"]
    assert statistics_of_tasks("ties", {}, ["a", "b"], llama) == {}
    for method, paths, message in (
        ("ties", {"a": a}, r"^method 'ties' takes no statistics \(those that do are fisher, frank_wolfe, ota, "),
        ("fisher", {"a": a, "c": a}, "unknown source in statistics 'c'"),
        ("fisher", {"a": a}, "there are no statistics for source 'b': give them for all sources, or for none"),
        ("regmean", {"a": a, "b": a}, "^method 'regmean' takes gram statistics, .*a.safetensors holds fisher$"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics_of_tasks(method, paths, ["a", "b"], llama)
    with pytest.raises(FileNotFoundError, match=r"no statistics: there is no file .*statistics\.safetensors"):
        open_statistics(tmp_path, llama)


# The collector


def token_batches(seed: int = 0) -> list[dict[str, Tensor]]:
    """Seven examples in batches of 3, 3 and 1, of different lengths, padded on the right."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for lengths in ((6, 9, 4), (8, 8, 5), (7,)):
        ids = torch.randint(60, (len(lengths), max(lengths)), generator=random)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)})
    return batches


def alone(batches: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Each example without its padding."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask == 1][None]
            yield {"input_ids": ids, "labels": ids}


def language_model(kind: str) -> PreTrainedModel:
    model: PreTrainedModel = randomised(MODELS[kind](), seed=7)
    return model.eval()


def naive_fisher(model: nn.Module, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        model(**example).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.double() ** 2
    return {name: total / len(examples) for name, total in sums.items()}


def naive_grams(model: nn.Module, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        for row in x.flatten(0, -2).double():
            sums[name] = sums.get(name, 0) + torch.outer(row, row) / len(examples)

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args, output: add(name, args[0])

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    hooks = [layer.register_forward_hook(watch(f"{name}.weight")) for name, layer in layers]
    with torch.no_grad():
        for example in examples:
            model(**example)
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_fisher_information_is_that_of_a_loop_over_examples(kind: str, tmp_path: Path) -> None:
    model = language_model(kind).train()
    frozen = next(model.parameters()).requires_grad_(False)
    file = collect(model, token_batches(), "fisher", tmp_path, examples=5, progress=False)
    assert model.training
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen.requires_grad_(True)
    want = naive_fisher(model.eval(), list(alone(token_batches()))[:5])
    base = TensorFolder(save_base(tmp_path / "base", kind))
    opened = open_statistics(file, base)
    assert opened.metadata == {"kind": "fisher", "examples": "5"}
    assert not opened.not_used
    got = load_file(file)
    assert got.keys() == want.keys()
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gram_matrices_are_those_of_a_loop_over_tokens(kind: str, tmp_path: Path) -> None:
    model = language_model(kind)
    file = collect(model, token_batches(), "gram", tmp_path / "g.safetensors", progress=False)
    opened = open_statistics(file, TensorFolder(save_base(tmp_path / "base", kind)))
    assert opened.metadata == {"kind": "gram", "examples": "7"}
    assert opened.not_used == (["lm_head.weight"] if kind == "gpt2" else [])  # it is tied to the embedding
    got, want = load_file(file), naive_grams(model, list(alone(token_batches())))
    assert got.keys() == want.keys()
    assert len(want) == (15 if kind == "llama" else 9)
    for name, gram in want.items():
        n = len(gram)
        assert got[name].shape == ((n, n, 1) if kind == "gpt2" and name != "lm_head.weight" else (1, n, n))
        assert relative(got[name].reshape(n, n), gram) < 1e-5
    hidden = [model(**one, output_hidden_states=True).hidden_states[-1][0] for one in alone(token_batches())]
    rows = torch.cat(hidden).double()
    assert relative(got["lm_head.weight"][0], rows.T @ rows / 7) < 1e-5


ADAPTERS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda targets: LoraConfig(target_modules=targets, r=4),
    "dora": lambda targets: LoraConfig(target_modules=targets, r=4, use_dora=True),
    "oft": lambda targets: OFTConfig(target_modules=targets, oft_block_size=4),
    "hra": lambda targets: HRAConfig(target_modules=targets, r=4),
}


def adapted(kind: str, adapter: str) -> PeftModel:
    tuned = get_peft_model(language_model(kind), ADAPTERS[adapter](TARGETS[kind]))
    marker = {"lora": "lora_", "dora": "lora_", "oft": "oft_R", "hra": "hra_u"}[adapter]
    return randomised(tuned, marker, std=0.3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("what", ["fisher", "gram"])
def test_an_adapted_model_gives_the_statistics_of_the_merged_one(adapter: str, what: Any, tmp_path: Path) -> None:
    tuned = adapted("llama", adapter)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    trainable = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    got = load_file(collect(tuned, token_batches(), what, tmp_path / "a", progress=False))
    after = tuned.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, parameter in tuned.named_parameters() if parameter.requires_grad] == trainable
    merged = tuned.merge_and_unload()
    want = load_file(collect(merged, token_batches(), what, tmp_path / "b", progress=False))
    assert got.keys() == want.keys()
    assert Q in want
    assert all(relative(got[name], want[name]) < 1e-3 for name in want)
    unadapted = load_file(collect(language_model("llama"), token_batches(), what, tmp_path / "c", progress=False))
    late = "model.layers.1.mlp.down_proj.weight"
    assert relative(unadapted[late], want[late]) > 1e-2


def test_modules_trained_whole_have_the_names_of_the_base(tmp_path: Path) -> None:
    model = randomised(BertForSequenceClassification(bert_config()))
    known = {name for name, _ in model.named_parameters()}
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"])
    tuned = get_peft_model(model, config)
    batches = [{"input_ids": torch.arange(24).reshape(4, 6), "labels": torch.tensor([0, 1, 1, 0])}]
    assert set(load_file(collect(tuned, batches, "fisher", tmp_path / "f", progress=False))) == known
    whole = ["*pooler*", "classifier*"]
    grams = load_file(collect(tuned, batches, "gram", tmp_path / "g", only=whole, progress=False))
    assert set(grams) == {"bert.pooler.dense.weight", "classifier.weight"}


def test_second_moments_of_adam(tmp_path: Path) -> None:
    """``v_2 / (1 - b^2) = (b g_1^2 + g_2^2) / (1 + b)``."""
    model = language_model("gpt2")
    trained = dict(list(model.named_parameters())[:8])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.8))
    gradients = []
    for batch in token_batches()[:2]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        optimizer.step()
    file = from_optimizer(optimizer, model, tmp_path)
    opened = open_statistics(file, TensorFolder(save_base(tmp_path / "base", "gpt2")))
    assert (opened.kind, opened.metadata["steps"]) == ("second_moment", "2")
    got = load_file(file)
    assert got.keys() == trained.keys()
    for name in trained:
        want = (0.8 * gradients[0][name] ** 2 + gradients[1][name] ** 2) / 1.8
        assert relative(got[name], want) < 1e-5


def test_second_moments_at_a_model_are_those_of_adam(tmp_path: Path) -> None:
    model, batches = language_model("gpt2"), token_batches()
    adam = torch.optim.Adam(model.parameters(), lr=0.0)
    for batch in [batches[0], {key: value[:1] for key, value in batches[1].items()}]:
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
    count = len(batches[0]["input_ids"]) + 1  # the second batch is cut
    want, got = from_optimizer(adam, model, tmp_path / "a"), tmp_path / "b"
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found, wanted = load_file(adam_moments(model, batches, got, examples=count)), load_file(want)
    assert found.keys() == wanted.keys()
    assert all(relative(found[name], wanted[name]) < 1e-5 for name in wanted)
    opened = open_statistics(got, TensorFolder(save_base(tmp_path / "base", "gpt2")))
    assert opened.metadata == {"kind": "second_moment", "steps": "2"}
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())


class Slope(nn.Module):
    """A loss whose gradient is its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=dtype))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * x.to(self.weight.dtype)).sum()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_moments_of_models_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    gradient = torch.tensor([[2.0**-11, 2.0**-12]])  # whose squares are no numbers of float16
    file = adam_moments(Slope(dtype), [{"x": gradient}] * 1000, tmp_path, examples=1000)
    assert torch.allclose(load_file(file)["weight"], gradient[0].square(), rtol=1e-4)


def test_gradients_come_one_at_a_time() -> None:
    model, batch = language_model("gpt2"), token_batches()[0]
    found = list(model.named_parameters())[:5]
    mine = found[0][1].requires_grad_(False)
    mine.grad = torch.ones_like(mine)
    seen = {}

    def use(name: str, gradient: Tensor) -> None:
        assert all(parameter.grad is None for parameter in model.parameters())
        seen[name] = gradient

    with gradients(found, use) as backward:
        backward(model(**batch).loss)
    assert seen.keys() == dict(found).keys()
    assert not mine.requires_grad
    assert torch.equal(mine.grad, torch.ones_like(mine))
    model.zero_grad()
    mine.requires_grad_(True)
    model(**batch).loss.backward()
    assert all(relative(seen[name], parameter.grad) < 1e-6 for name, parameter in found)


def test_the_collector_tells_what_is_wrong(tmp_path: Path) -> None:
    model, batches = language_model("llama"), token_batches()
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    tuned = adapted("llama", "lora")
    adam = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad])
    tuned(**batches[0]).loss.backward()
    adam.step()
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    out = tmp_path / "out"
    wrong: list[tuple[Callable[[], Path], type[Exception], str]] = [
        (lambda: collect(model, batches, "grams", out), ValueError, "unknown kind of statistics to collect 'grams'"),
        (lambda: collect(model, [], "gram", out), ValueError, "^there are no examples: the batches are empty$"),
        (lambda: collect(model, unlabelled, "fisher", out), ValueError, "^the model gives no loss for input_ids, att"),
        (lambda: collect(model, batches, "gram", out, only=["x*"]), ValueError, r"no weight .* named like x\*$"),
        (lambda: from_optimizer(adam, tuned, out), ValueError, "no second_moment statistics of any of the base's"),
        (lambda: collect(model, batches, "gram", there), FileExistsError, "choose another file, or replace it by over"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
    assert list(tmp_path.iterdir()) == [there]
    collect(model, batches, "gram", there, overwrite=True, progress=False)
    assert len(load_file(there)) == 15


# All of it


def oriented(tensor: Tensor, flipped: bool) -> Tensor:
    """A stored tensor as (outputs, inputs) in float64."""
    rows = tensor.double().reshape(-1, tensor.shape[-1])
    return rows.T if flipped else rows


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram"), ("frank_wolfe", "gram")])
@pytest.mark.parametrize("model_kind", ["llama", "gpt2"])
def test_a_merge_with_collected_statistics(method: str, kind: Any, model_kind: str, tmp_path: Path) -> None:
    base, names = save_base(tmp_path / "base", model_kind), ["a", "b"]
    for seed, name in enumerate(names):
        model = randomised(MODELS[model_kind](), seed=7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / name)
        collect(model, token_batches(seed), kind, tmp_path / f"{name}.safetensors", progress=False)
    files = {name: tmp_path / f"{name}.safetensors" for name in names}
    sources = [(name, tmp_path / name) for name in names]
    merge(base, sources, tmp_path / "out", method=method, statistics=files, progress=False)
    merged, before, *tuned = (TensorFolder(tmp_path / name) for name in ("out", "base", *names))
    opened = statistics_of_tasks(method, files, names, before)
    for name in before:
        flipped = model_kind == "gpt2" and ".h." in name and name.endswith(".weight") and "ln_" not in name
        origin, *models = (oriented(folder[name], flipped) for folder in (before, *tuned))
        numbers = [one.get(name) for one in opened.values()]
        known = [
            n.double().reshape(-1, max(n.shape)) if kind == "gram" else oriented(n, flipped)
            for n in numbers
            if n is not None
        ]
        oracle = reference.CASES[method].oracle
        want = origin + oracle([model - origin for model in models], [1.0, 1.0], statistics=known or None)
        torch.testing.assert_close(oriented(merged[name], flipped), want, rtol=0, atol=1e-5)
    used = [name for name in before if opened["a"].get(name) is not None]
    assert len(used) == (len(list(before)) if kind == "fisher" else {"llama": 15, "gpt2": 8}[model_kind])
