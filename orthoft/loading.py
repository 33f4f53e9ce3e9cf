"""How a model is loaded elsewhere: the class that transformers has for it, and the words to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orthoft.hub_place import load_arguments

# By the end of the name of an architecture; the first that fits.
AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
}
TASK_TYPES = {  # PEFT's
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

LEARNT_FROM_US = "PEFT learns the method from orthoft; without the import it fails with a `KeyError`."
WITHOUT_US = (
    "For use without orthoft, `orthoft convert this-folder OUT --to lora` writes a LoRA that plain PEFT loads; where "
    "none is exact it asks for a `--rank`."
)


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that loads a model whole, by its ``config.json``; AutoModel if it tells none.

    The end of ``architectures`` says which; a model with code of its own must have it in ``auto_map``.
    """
    architecture = str((config.get("architectures") or [""])[0])
    found = next((auto for end, auto in AUTO.items() if architecture.endswith(end)), "AutoModel")
    if found == "AutoModelForSeq2SeqLM" and "vision_config" in config:
        found = "AutoModelForImageTextToText"
    own = [name for name in config.get("auto_map") or {} if name.startswith("AutoModel")]
    return found if not own or found in own else own[0]


def words_to_load(auto: str, where: str, remote_code: bool = False) -> str:
    """Return the Python that loads a whole model."""
    trust = ", trust_remote_code=True" if remote_code else ""
    return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{where}"{trust})'


def words_to_adapt(auto: str, base: str, where: str, ours: bool) -> str:
    """Return the Python that loads an adapter on its base, a folder or a place on the Hub.

    ``ours``: PEFT learns the method from orthoft.
    """
    learn = "import orthoft  # teaches PEFT the method\n" if ours else ""
    return (
        f"{learn}from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained({load_arguments(base)})\nmodel = PeftModel.from_pretrained(base, "{where}")'
    )
