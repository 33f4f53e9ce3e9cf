"""GGUF files, read back by the gguf package and by transformers, and compared with what they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from orthoft import HRAConfig
from orthoft.cli import main
from orthoft.convert import to_gguf
from orthoft.convert.gguf_layout import frequency_divisors, in_pairs, layout_of
from orthoft.convert.gguf_tokenizer import LLAMA_3, QWEN_2, words_of

gguf = pytest.importorskip("gguf")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
TEXT = ["merge 12 experts, or 345; don't lose 'em", "words of  two\n\nlines"] * 20
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), NO_SPLIT]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_2), "isolated"), NO_SPLIT]),
}


def save_tokenizer(folder: Path, split: Any) -> int:
    """Save a small byte-level tokenizer; return the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    return len(fast)


def save_model(
    folder: Path, kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, split: str = "gpt-2", **options: Any
) -> Path:
    vocabulary = save_tokenizer(folder, SPLITS[split]) + 3
    torch.manual_seed(0)
    kind(config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **(SIZES | options))).save_pretrained(folder)
    return folder


def again(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(40)[None]).logits
    return found


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "qwen2": {"kind": Qwen2ForCausalLM, "config": Qwen2Config, "split": "qwen2"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_after_reading_back(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", **MODELS[name])
    done = to_gguf(folder, tmp_path / "model.gguf")
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    torch.testing.assert_close(logits(again(tmp_path / "model.gguf")), wanted, rtol=0, atol=1e-5)
    assert done.dtype == "f32"
    assert done.architecture == ("qwen2" if name == "qwen2" else "llama")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert found(TEXT[0])["input_ids"] == AutoTokenizer.from_pretrained(folder)(TEXT[0])["input_ids"]


@pytest.mark.parametrize(("dtype", "off"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_smaller_dtypes(dtype: str, off: float, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    to_gguf(folder, tmp_path / "model.gguf", dtype=dtype)
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    got = logits(again(tmp_path / "model.gguf"))
    assert 0 < (got - wanted).norm() / wanted.norm() < off
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_what_stands_at_the_top_of_the_file(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    to_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    told = {name: field.contents() for name, field in fields.items() if "tokens" not in name and "merges" not in name}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {name: told[name] for name in expected} == expected
    assert told["tokenizer.ggml.token_type"][:3] == [3, 3, 1]  # two control tokens
    assert told["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]  # ids of the model that the tokenizer does not have


@pytest.mark.parametrize("name", SPLITS)
def test_how_text_is_split_has_a_name(name: str, tmp_path: Path) -> None:
    vocabulary = save_tokenizer(tmp_path, SPLITS[name])
    assert words_of(tmp_path, vocabulary).pre == name


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Bytes, scores in the order of the merges, bos in front, a space before the text."""
    pieces = {"<unk>": 0, "<s>": 1, "<0x41>": 2, "a": 3, "b": 4, "ab": 5, "▁": 6, "▁ab": 7}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]}
    told = {
        "model": {"type": "BPE", "byte_fallback": True, "vocab": pieces, "merges": ["a b", ["▁", "ab"]]},
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]},
        "post_processor": template,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "unk_token": {"content": "<unk>"}}')
    words = words_of(tmp_path, 8)
    assert (words.model, words.space_prefix, words.starts_with_bos) == ("llama", True, True)
    assert words.types == [2, 3, 6, 1, 1, 1, 1, 1]
    assert words.scores[5] > words.scores[7]
    assert words.merges == []


def test_rows_of_heads_in_pairs() -> None:
    assert in_pairs(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert in_pairs(torch.arange(8)[:, None].expand(8, 3), 1)[:, 1].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_frequencies_of_llama_3() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(**SIZES | {"hidden_size": 512}, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = frequency_divisors(layout_of({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    assert divisors is not None
    plain = 5e5 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / divisors, wanted, rtol=1e-5, atol=0)
    assert divisors.min() == 1
    assert divisors.max() == 8


def test_an_adapter_as_a_gguf_lora(tmp_path: Path) -> None:
    """Base and factors, as read from both files, make the adapted weight in the order of the file."""
    folder = save_model(tmp_path / "model")
    config = HRAConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "hra")
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(tmp_path / "hra"), str(tmp_path / "hra.gguf"), "--to", "gguf"])
    assert exit_.value.code == 0
    to_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "hra.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 4
    held = {t.name: torch.tensor(np.array(t.data)) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    factors = {t.name: torch.tensor(np.array(t.data)) for t in reader.tensors}
    adapted = model.merge_and_unload().state_dict()
    for name, module in (("blk.1.attn_q", "self_attn.q_proj"), ("blk.0.ffn_down", "mlp.down_proj")):
        A, B = factors[f"{name}.weight.lora_a"], factors[f"{name}.weight.lora_b"]
        assert A.shape[0] == B.shape[1] == 4
        wanted = adapted[f"model.layers.{name.split('.')[1]}.{module}.weight"]
        wanted = in_pairs(wanted, 4) if "attn_q" in name else wanted
        torch.testing.assert_close(held[f"{name}.weight"] + B @ A, wanted, rtol=0, atol=1e-5)


def changed(**fields: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


REFUSED = {
    "architecture": (changed(architectures=["BertModel"]), "unknown architecture for GGUF 'BertModel'"),
    "rope": (changed(rope_parameters={"rope_type": "yarn"}), "unknown rope_type for GGUF 'yarn'"),
    "activation": (changed(hidden_act="gelu"), "hidden_act='gelu' is not what llama.cpp computes"),
    "vocabulary": (changed(vocab_size=3), "a token of id \\d+, the model a vocabulary of 3"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "a GGUF file holds its tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    folder = save_model(tmp_path / "model")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        to_gguf(folder, tmp_path / "model.gguf")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_refusals(tmp_path: Path) -> None:
    save_llama(tmp_path / "words")
    with pytest.raises(ValueError, match="is a WordLevel tokenizer: GGUF is written of BPE tokenizers"):
        to_gguf(tmp_path / "words", tmp_path / "model.gguf")
    folder = save_model(tmp_path / "model")
    with pytest.raises(ValueError, match="unknown dtype of GGUF 'q4'"):
        to_gguf(folder, tmp_path / "model.gguf", dtype="q4")
    with pytest.raises(FileExistsError, match="is a folder: a GGUF is one file"):
        to_gguf(folder, tmp_path / "words")
    (tmp_path / "old.gguf").write_text("old")
    with pytest.raises(FileExistsError, match="output file exists"):
        to_gguf(folder, tmp_path / "old.gguf")
    words = LoraConfig(r=2, target_modules=["embed_tokens"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), words)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError, match=r"holds LoRAs of linear layers, and not 'base_model.*lora_embedding_A'"):
        to_gguf(tmp_path / "embedding", tmp_path / "new.gguf")
    assert (tmp_path / "old.gguf").read_text() == "old"


def test_weights_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'output\.weight' contains NaN or Inf as float16"):
        to_gguf(folder, tmp_path / "model.gguf", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
