"""Next-token prediction: running text, completions of prompts, chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthoft.recipes.data import Row
from orthoft.recipes.head import Head
from orthoft.recipes.kinds.chat import as_chat, last_answer, marked_chats
from orthoft.recipes.kinds.kind import (
    IGNORED,
    Batch,
    Example,
    TaskData,
    filled,
    padded,
    padded_labels,
)
from orthoft.recipes.kinds.marked import Marked, as_example, has_labels, tokens_of
from orthoft.recipes.kinds.packing import keeps_apart, packed, positions, unpacked
from orthoft.recipes.kinds.writing import Writing
from orthoft.recipes.task_schema import CausalLM


class CausalLanguageModel(Writing[CausalLM]):
    """Blocks of running text, or completions and chats with a loss on what is to be written.

    Completions and chats are packed for training alone: whoever asks for `batches` sees them one by one.
    """

    auto = CausalLM.auto
    peft_task = "CAUSAL_LM"

    def __init__(self, task: CausalLM, base: Path) -> None:
        super().__init__(task, base)
        self.left_out = 0  # examples without a label in their first block_size tokens
        self.not_asked = 0  # examples whose last answer begins behind them

    def columns(self) -> list[str]:
        return self.task.data.columns

    def about(self, data: TaskData) -> str:
        if self.task.packs and self.task.data.form == "text":
            return f"blocks of {len(data.train[0]['input_ids'])}"
        lengths = [length for row in data.train for length in row.get("lengths", (len(row["input_ids"]),))]
        words = f"{min(lengths)} to {max(lengths)} tokens"
        if self.task.packs:
            words = f"{len(lengths)} of {words} packed for training"
        if self.left_out:
            words += f"; {self.left_out} too long to have a label left out"
        return f"{words}; {self.not_asked} whose last answer is cut off not asked" if self.not_asked else words

    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        """Return blocks, or one example a row without those whose labels are all cut off; train examples packed.

        Raises:
            ValueError: texts that fill no block, or rows of which none has a label, or none an answer that is wanted.
        """
        where, size = f"{self.task.name} {split}", self.task.block_size
        if self.task.packs and self.task.data.form == "text":
            return self._blocks([str(row[self.columns()[0]]) for row in rows], where)
        found = list(self._of_rows(rows, where))
        kept = [example for example in found if has_labels(example)]
        if not kept:
            raise ValueError(f"{where}: no row has a token to learn among its first {size}: raise block_size")
        self.left_out += len(found) - len(kept)
        if self.task.generate and split != "train":
            cut = sum(example["answer"] is None for example in kept)
            if cut == len(kept):
                raise ValueError(
                    f"{where}: no row's last answer begins among its first {size} tokens: raise block_size"
                )
            self.not_asked += cut
        return packed(kept, size) if self.task.packs and split == "train" else kept

    def _blocks(self, texts: Sequence[str], where: str) -> list[Example]:
        """Return blocks of the texts one after the other, each text ended by the end-of-text token."""
        end = [] if self.processor.eos_token_id is None else [self.processor.eos_token_id]
        ids, size = self.processor(texts, verbose=False)["input_ids"], self.task.block_size
        stream = list(chain.from_iterable(chain.from_iterable((each, end) for each in ids)))
        blocks = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        if not blocks:
            raise ValueError(f"{where}: {len(stream)} tokens do not fill one block of {size}; lower block_size")
        return [{"input_ids": block, "labels": block} for block in blocks]

    def _of_rows(self, rows: Sequence[Row], where: str) -> Iterator[Example]:
        """Return each row as an example, with labels or without."""
        column, everything = self.task.data.messages, self.task.loss == "all"
        if column is not None:
            chats = [as_chat(row[column], where) for row in rows]
            targets = [last_answer(chat) for chat in chats]
            marked = marked_chats(self.processor, chats, where, everything and not self.task.generate)
        else:
            prompts, targets = self._prompts(rows, where)
            end = self.processor.eos_token or ""
            texts = [prompt + target + end for prompt, target in zip(prompts, targets, strict=True)]
            marked = [Marked(text, [(len(prompt), len(text))]) for prompt, text in zip(prompts, texts, strict=True)]
        tokens = tokens_of(self.processor, marked, self.task.block_size, where, special=column is None)
        return (as_example(each, target, everything) for each, target in zip(tokens, targets, strict=True))

    def _prompts(self, rows: Sequence[Row], where: str) -> tuple[list[str], list[str]]:
        """Return prompts and completions; a text completes nothing."""
        if self.task.data.form == "text":
            return [""] * len(rows), [str(row[self.columns()[0]]) for row in rows]
        prompts, completions = (filled(rows, column, where) for column in self.columns())
        return prompts, completions

    def texts(self, texts: Sequence[str]) -> list[Example]:
        ids = self.processor(list(texts), truncation=True, max_length=self.task.block_size)["input_ids"]
        return [{"input_ids": each, "labels": each} for each in ids]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return a batch; packed rows have positions that keep their examples apart, and no mask."""
        batch = padded(examples, self.processor.pad_token_id) | {"labels": padded_labels(examples)}
        if "lengths" not in examples[0]:
            return batch
        del batch["attention_mask"]
        return batch | {"position_ids": positions(examples)}

    def alone(self, examples: Sequence[Example]) -> list[Example]:
        return unpacked(examples)

    def trained(self, model: nn.Module, head: Head | None) -> nn.Module:
        """Return the model itself.

        Raises:
            ValueError: examples are packed, and the model would let them see each other.
        """
        if self.task.packs and self.task.data.form != "text" and not keeps_apart(model):
            raise ValueError(
                f"{self.task.name}: this model lets packed examples see each other: set packing to false, "
                "or take a base with attention by sdpa or eager"
            )
        return model

    def predicted(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch["labels"][:, 1:]  # (b, t - 1)
        chosen = labels != IGNORED
        return model(**self.inputs(model, batch)).logits[:, :-1][chosen], labels[chosen]

    def answers(self, model: Any, examples: Sequence[Example], batch: Batch) -> list[tuple[str, str]]:
        asked = [example for example in examples if example["answer"] is not None]
        found = self.written(model, [example["input_ids"][: example["answer"]] for example in asked]) if asked else []
        return list(zip(found, (example["target"] for example in asked), strict=True))

    def written(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the greedy continuation of prompts, filled on the left: the same model writes the same text."""
        tokenizer, device = self.processor, next(model.parameters()).device
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        rows = [torch.tensor(prompt) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad or 0, padding_side="left")
        missing = torch.tensor([ids.shape[1] - len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) >= missing[:, None]).long()
        words = {"max_new_tokens": self.task.new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad}
        found = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **words)
        return [str(text) for text in tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)]

    @torch.no_grad()
    def sample(self, model: Any) -> str | None:
        """Return the greedy continuation of the task's prompt, which is a user's turn where the data are chats."""
        if self.prompt is None:
            return None
        model.eval()
        if self.task.data.form == "chat":
            turn = [{"role": "user", "content": self.prompt}]
            asked = self.processor.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            asked = self.processor(self.prompt)["input_ids"]
        return self.written(model, [asked])[0]
