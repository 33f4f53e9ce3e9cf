"""Language models on completions and chats: what the loss looks at, packing, answers, TRL."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import WORDS, save_llama, write_rows
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from orthoft.recipes import RecipeError, load, run
from orthoft.recipes.kinds import kind_of
from orthoft.recipes.kinds.causal_lm import CausalLanguageModel
from orthoft.recipes.kinds.packing import best_fit, keeps_apart, packed, unpacked
from orthoft.recipes.measure import measure
from orthoft.recipes.statistics import collect

Words = dict[str, Any]
Rows = list[Words]
ASSISTANT, USER, END, IGNORED = 26, 25, 2, -100  # tokens of w23, w22 and [EOS]; what no loss looks at
TEMPLATE = (
    "{% for m in messages %}{{ 'w23' if m.role == 'assistant' else 'w22' }}{{ ' ' + m.content + ' [EOS]\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w23' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w23{% generation %}{{ ' ' + m.content + ' [EOS]' }}"
    "{%- endgeneration %}{{ '\n' }}{% else %}{{ 'w22 ' + m.content + ' [EOS]\n' }}{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_llama(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def with_template(base: Path, folder: Path, template: str | None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def countdowns(count: int, seed: int) -> Rows:
    """Prompts of two words, answered by the two words that come next: what a tiny model learns in a few steps."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        start = draw.randrange(12)
        rows.append({"prompt": f"{WORDS[start]} {WORDS[start + 1]}", "completion": f" {WORDS[start + 2]} w9"})
    return rows


def of_any_length(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    some = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 7)))  # noqa: E731
    return [{"prompt": some(), "completion": f" {some()}"} for _ in range(count)]


def as_chats(rows: Rows) -> Rows:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in rows
    ]


def data_of(folder: Path, rows: Rows) -> dict[str, str]:
    return {split: write_rows(folder / f"{split}.jsonl", rows) for split in ("train", "tuning", "test")}


def recipe(base: Path, folder: Path, rows: Rows, **task: Any) -> Words:
    form = {"messages": "messages"} if "messages" in rows[0] else {"prompt": "prompt", "completion": "completion"}
    common = {"kind": "causal-lm", "block_size": 24, "adapter": {"type": "hra", "r": 4, "target_modules": "all-linear"}}
    own = {"name": "a", "data": data_of(folder / "data", rows) | form}
    return {"name": "tiny", "base": str(base), "output": str(folder / "out"), "tasks": [common | own | task]}


def kind(base: Path, folder: Path, rows: Rows, **task: Any) -> CausalLanguageModel:
    found = kind_of(load(recipe(base, folder, rows, **task)).tasks[0], base)
    assert isinstance(found, CausalLanguageModel)
    return found


def ids(text: str) -> list[int]:
    """Return the tokens of words, as `tiny.save_tokenizer` numbers them."""
    return [END if word == "[EOS]" else WORDS.index(word) + 3 for word in text.split()]


# Words of the recipe


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (
            {"data": {"completion": None}},
            "tasks[0].data: its columns are text, or prompt and completion, or messages: ",
        ),
        (
            {"data": {"text": "t"}},
            "tasks[0].data: its columns are text, or prompt and completion, or messages: got text ",
        ),
        (
            {"data": {"prompt": None, "completion": None}, "loss": "completion"},
            "tasks[0]: loss: completion needs compl",
        ),
        (
            {"data": {"prompt": None, "completion": None}, "generate": True},
            "tasks[0]: generate needs completions: data",
        ),
        ({"metric": "exact_match"}, "tasks[0]: metric 'exact_match' needs answers of the model: set generate to true"),
        ({"loss": "prompt"}, "tasks[0].loss: expected 'completion' or 'all', got 'prompt'"),
        ({"training": {"packing": True}}, "tasks[0].training.packing: unknown key, "),
    ],
)
def test_words_that_do_not_go_together(task: Words, line: str, base: Path, tmp_path: Path) -> None:
    words = recipe(base, tmp_path, countdowns(4, 0))
    words["tasks"][0] |= task | {"data": words["tasks"][0]["data"] | task.get("data", {})}
    with pytest.raises(RecipeError) as error:
        load(words)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1


# What the loss looks at


def test_the_loss_looks_at_the_completion_and_its_end(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2", "completion": " w3 w4 w5"}]
    (example,) = kind(base, tmp_path, rows).data(0).train
    assert example["input_ids"] == ids("w1 w2 w3 w4 w5 [EOS]")
    assert example["labels"] == [IGNORED, IGNORED, *ids("w3 w4 w5 [EOS]")]
    assert (example["answer"], example["target"]) == (2, " w3 w4 w5")
    (example,) = kind(base, tmp_path, rows, loss="all").data(0).train
    assert example["labels"] == [IGNORED, *ids("w2 w3 w4 w5 [EOS]")]


def test_a_text_by_itself_is_learnt_whole(base: Path, tmp_path: Path) -> None:
    words = recipe(base, tmp_path, countdowns(2, 0), packing=False)
    words["tasks"][0]["data"] = data_of(tmp_path / "texts", [{"text": "w1 w2 w3"}, {"text": ""}])
    data = kind_of(load(words).tasks[0], base).data(0)
    assert [(row["input_ids"], row["labels"]) for row in data.train] == [
        (ids("w1 w2 w3 [EOS]"), [IGNORED, *ids("w2 w3 [EOS]")])
    ]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["prefixes", "marks"])
def test_the_loss_looks_at_the_turns_of_the_assistant(template: str, base: Path, tmp_path: Path) -> None:
    folder = with_template(base, tmp_path / "base", template)
    task = load(recipe(base, tmp_path, [{"messages": CHAT}])).tasks[0]
    (example,) = kind_of(task, folder).data(0).train
    asked, answer = [USER, *ids("w1 w2 [EOS]"), ASSISTANT], ids("w3 [EOS]")
    again, last = [USER, *ids("w4 [EOS]"), ASSISTANT], ids("w5 w6 [EOS]")
    assert example["input_ids"] == asked + answer + again + last
    assert example["labels"] == [IGNORED] * len(asked) + answer + [IGNORED] * len(again) + last
    assert (example["answer"], example["target"]) == (len(asked + answer + again), "w5 w6")


@pytest.mark.parametrize(
    ("template", "chat", "line"),
    [
        (None, CHAT, "a train: messages need a chat template, which the base's tokenizer has not: "),
        (FORGETFUL, CHAT, "a train: the base's chat template changes earlier turns when later ones come"),
        ("{{ raise_exception('no') }}", CHAT, "a train: the base's chat template refuses a chat: no"),
        (
            TEMPLATE,
            "hello",
            "a train: messages are a list of {role, content} in which the assistant answers, got 'hello'",
        ),
        (TEMPLATE, CHAT[:1], "a train: messages are a list of "),
        (TEMPLATE, CHAT[1:], "a train: messages are a list of "),
        (TEMPLATE, [*CHAT, {"role": "user"}], "a train: messages are a list of "),
    ],
)
def test_chats_that_cannot_be_used(template: str | None, chat: Any, line: str, base: Path, tmp_path: Path) -> None:
    folder = with_template(base, tmp_path / "base", template)
    task = load(recipe(base, tmp_path, [{"messages": chat}])).tasks[0]
    with pytest.raises(ValueError, match="a train: ") as error:
        kind_of(task, folder).data(0)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1


def test_a_template_that_forgets_is_good_for_a_loss_on_everything(base: Path, tmp_path: Path) -> None:
    folder = with_template(base, tmp_path / "base", FORGETFUL)
    task = load(recipe(base, tmp_path, [{"messages": CHAT}], loss="all")).tasks[0]
    (example,) = kind_of(task, folder).data(0).train
    assert example["labels"] == [IGNORED, *ids("w6")]


def test_long_examples_lose_their_end_and_rows_without_a_label_are_left_out(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2", "completion": " w3 w4 w5"}, {"prompt": "w1 w2 w3 w4", "completion": " w5"}]
    task = kind(base, tmp_path, rows, block_size=4)
    data = task.data(0)
    for split in (data.train, data.tuning, data.test):
        assert [row["labels"] for row in split] == [[IGNORED, IGNORED, *ids("w3 w4")]]
    assert task.about(data) == "4 to 4 tokens; 3 too long to have a label left out"
    with pytest.raises(ValueError, match="a train: no row has a token to learn among its first 2: raise block_size"):
        kind(base, tmp_path, rows, block_size=2).data(0)


# Packing


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=50))))
def test_rows_are_those_of_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    size, lengths = case
    rows = best_fit(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [used for used in filled if used + length <= size]
        if fitting:
            filled.remove(max(fitting))
        filled.append(max(fitting, default=0) + length)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(filled)
    with pytest.raises(ValueError, match="does not fit a row"):
        best_fit([size + 1], size)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_has_the_loss_of_its_examples(attention: str, base: Path, tmp_path: Path) -> None:
    task = kind(base, tmp_path, of_any_length(24, 0), packing=True)
    data = task.data(0)
    assert len(data.train) < 14 < len(data.tuning) == 24
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention, use_cache=False)
    assert task.trained(model, None) is model
    rows = task.collate(data.train)
    assert "attention_mask" not in rows
    together = model(**rows, num_items_in_batch=1).loss
    apart = sum(model(**task.collate([row]), num_items_in_batch=1).loss for row in data.tuning)
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    plain = F.cross_entropy(model(rows["input_ids"]).logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
    count = int((rows["labels"] != IGNORED).sum())
    assert abs(plain.item() - together.item() / count) > 1e-3  # without positions it would be another loss


def test_who_asks_for_batches_sees_packed_examples_one_by_one(base: Path, tmp_path: Path) -> None:
    task = kind(base, tmp_path, of_any_length(24, 0), packing=True)
    data = task.data(0)
    alone = [(row["input_ids"], row["labels"]) for row in data.tuning]
    assert [(one["input_ids"], one["labels"]) for one in task.alone(data.train)] == alone  # in the same order
    batches = list(task.batches(data.train, 5, "x"))
    assert sum(len(batch["input_ids"]) for batch in batches) == 24
    assert all("attention_mask" in batch for batch in batches)
    assert task.about(data).startswith("24 of ")


def test_a_model_that_would_let_examples_see_each_other_is_refused(base: Path, tmp_path: Path) -> None:
    task = kind(base, tmp_path, of_any_length(4, 0), packing=True)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not keeps_apart(recurrent)
    with pytest.raises(ValueError, match="a: this model lets packed examples see each other: set packing to false"):
        task.trained(recurrent, None)
    assert recurrent.training


def test_the_first_token_of_a_packed_example_follows_none() -> None:
    examples = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    (row,) = packed(examples, 5)
    assert (row["input_ids"], row["labels"]) == ([1, 2, 3, 4, 5], [IGNORED, 2, IGNORED, 4, 5])
    assert unpacked([row])[0] == {"input_ids": [1, 2], "labels": [IGNORED, 2]}


def test_statistics_are_of_the_first_examples_and_not_of_the_first_rows(base: Path, tmp_path: Path) -> None:
    words = recipe(base, tmp_path, of_any_length(24, 0), packing=True, training={"max_steps": 1})
    run(words, until="finetune")
    file = measure(words, ["evaluate.batch_size=3"], "gram", examples=4, only=["*q_proj*"])["files"]["a"]
    task = kind_of(load(words).tasks[0], base)
    expert = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out/experts/a"))
    first = [task.collate([example]) for example in task.data(0).tuning[:4]]  # the same rows, which are not packed
    want = collect(expert, first, "gram", tmp_path, only=["*q_proj*"], progress=False)
    for mine, theirs in zip(load_file(file).values(), load_file(want).values(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    with safe_open(file, "pt") as found:
        told = {"kind": "gram", "examples": "4", "asked": "4", "only": '["*q_proj*"]'}
        assert found.metadata() == told


# Answers


def test_answers_in_a_batch_are_those_one_by_one(base: Path, tmp_path: Path) -> None:
    task = kind(base, tmp_path, of_any_length(12, 3), generate=True, new_tokens=6)
    model, examples = AutoModelForCausalLM.from_pretrained(base), task.data(0).test
    asked = [example["input_ids"][: example["answer"]] for example in examples]
    found = task.written(model, asked)
    for prompt, text in zip(asked, found, strict=True):
        row, written = list(prompt), list[int]()
        for _ in range(6):
            written.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            row.append(written[-1])
            if written[-1] == END:
                break
        assert text.split() == [WORDS[token - 3] for token in written if token > END]
    for example, text in zip(examples[:3], found, strict=False):
        example["target"] = text  # so that three answers are right
    scores = task.score(model, None, examples, 5, "x")
    assert scores["exact_match"] == 3 / 12
    assert 3 / 12 <= scores["f1"] < 1


def test_a_chat_whose_last_answer_is_cut_off_is_not_asked(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": CHAT[:2]}, {"messages": CHAT}]  # 7 tokens; 11 up to its last answer
    task = kind(base, tmp_path, rows, generate=True, block_size=10)
    data = task.data(0)
    assert {len(row["input_ids"]): row["answer"] for row in data.test} == {7: 5, 10: None}
    assert task.about(data) == "7 to 10 tokens; 2 whose last answer is cut off not asked"
    model = AutoModelForCausalLM.from_pretrained(base)
    (short,) = (row for row in data.test if len(row["input_ids"]) == 7)
    short["target"] = task.written(model, [short["input_ids"][:5]])[0]
    for size in (1, 2):
        assert task.score(model, None, data.test, size, "x")["exact_match"] == 1
    with pytest.raises(ValueError, match="a tuning: no row's last answer begins among its first 10 tokens: raise blo"):
        kind(base, tmp_path, rows[1:], generate=True, block_size=10).data(0)


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_an_expert_learns_to_answer(form: str, base: Path, tmp_path: Path) -> None:
    rows = countdowns(24, 0)
    words = recipe(base, tmp_path, rows if form == "completion" else as_chats(rows), packing=True, generate=True)
    words["tasks"][0] |= {"prompt": "w4 w5", "new_tokens": 4, "metric": "exact_match"}
    words["tasks"][0]["training"] = {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 5e-2}
    results = run(words | {"merge": {"method": "mean"}})
    scores = results["scores"]
    assert scores["base"]["a"]["exact_match"] == 0
    assert scores["a"]["a"]["exact_match"] > 0.5
    assert scores["merge"]["a"] == pytest.approx(scores["a"]["a"], rel=1e-3)
    assert results["samples"]["a"]["merge"] == "w6 w9"


# TRL


def test_without_trl_one_line_says_what_to_install(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("orthoft.recipes.task_schema.find_spec", lambda name: None if name == "trl" else found(name))
    with pytest.raises(RecipeError) as error:
        load(recipe(base, tmp_path, countdowns(2, 0), trainer="trl"))
    assert str(error.value) == "tasks[0]: trainer 'trl' needs TRL: pip install 'orthoft[trl]'"


def test_words_of_trl_need_trl(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = recipe(base, tmp_path, countdowns(2, 0), training={"loss_type": "dft"})
    with pytest.raises(RecipeError) as error:
        load(words)
    assert str(error.value) == "tasks[0]: training.loss_type is a word of TRL: it needs trainer: trl"
    assert load(words, ["tasks.0.trainer=trl"]).tasks[0].training == {"loss_type": "dft"}


@pytest.mark.parametrize("packing", [True, False])
def test_trl_trains_on_the_same_rows_with_the_same_loss(packing: bool, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    adapter = {"type": "hra", "r": 4, "target_modules": "all-linear", "orthogonality_weight": 0.01}
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    losses = {}
    for trainer in ("transformers", "trl"):
        words = recipe(base, tmp_path / trainer, of_any_length(24, 0), packing=packing, adapter=adapter)
        words["tasks"][0] |= {"trainer": trainer, "training": training | {"learning_rate": 1e-2, "save_steps": 2}}
        losses[trainer] = [loss for _, loss in run(words, until="finetune")["experts"]["a"]["losses"]]
    assert len(losses["trl"]) == 4
    assert losses["trl"] == pytest.approx(losses["transformers"], rel=1e-4)
    words["tasks"][0]["adapter"] = adapter | {"orthogonality_weight": 0.0}
    plain = run(words, until="finetune", overwrite=True)["experts"]["a"]["losses"]
    assert losses["trl"][0] > plain[0][1] + 0.1  # the penalty is in TRL's loss too
