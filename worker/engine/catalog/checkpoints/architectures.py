"""Finds, by an architecture's name and without a table, how transformers loads it and what it is for."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Use(NamedTuple):
    """The use of a model with a head of some kind."""

    auto_class: str
    """Class of transformers that loads the model."""
    pipeline_tag: str | None
    """The hub's name of the model's task."""


LANGUAGE_MODEL = Use("AutoModelForCausalLM", "text-generation")
SEQUENCE_TO_SEQUENCE = Use("AutoModelForSeq2SeqLM", "text2text-generation")
IMAGE_TO_TEXT = Use("AutoModelForImageTextToText", "image-text-to-text")
SPEECH_TO_TEXT = Use("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition")
SPEECH_TYPES = ("whisper", "speech_to_text", "moonshine", "moonshine_streaming")
"""Model types whose class names look like sequence-to-sequence models for text."""
BY_ENDING = {
    "ForCausalLM": LANGUAGE_MODEL,
    "LMHeadModel": LANGUAGE_MODEL,
    "ForConditionalGeneration": SEQUENCE_TO_SEQUENCE,
    "ForMaskedLM": Use("AutoModelForMaskedLM", "fill-mask"),
    "ForPreTraining": Use("AutoModelForPreTraining", None),
    "ForSequenceClassification": Use("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": Use("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": Use("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": Use("AutoModelForMultipleChoice", None),
    "ForImageClassification": Use("AutoModelForImageClassification", "image-classification"),
}
WITHOUT_HEAD = Use("AutoModel", None)


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the name of the class in transformers; empty where the configuration has none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def use_of(config: Mapping[str, Any]) -> Use:
    """Return the use of a checkpoint with this configuration."""
    name = architecture_of(config)
    found = next((use for ending, use in BY_ENDING.items() if name.endswith(ending)), WITHOUT_HEAD)
    if found is not SEQUENCE_TO_SEQUENCE:
        return found
    if config.get("model_type") in SPEECH_TYPES:
        return SPEECH_TO_TEXT
    return IMAGE_TO_TEXT if "vision_config" in config else found


def classifies(config: Mapping[str, Any]) -> bool:
    """Return whether the head's outputs are labels, which the configuration names."""
    return architecture_of(config).endswith("Classification")


def labels_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of labels by id, from id2label, else from label2id, else transformers' own."""
    names, ids = config.get("id2label"), config.get("label2id")
    count = config.get("num_labels", 2)
    counted = range(count if isinstance(count, int) and count < 10_000 else 0)
    found = {str(index): str(name) for index, name in names.items()} if isinstance(names, dict) else {}
    defaults = {str(index): f"LABEL_{index}" for index in found or counted}
    if found and found != defaults:
        return found
    by_id = {str(index): str(name) for name, index in ids.items()} if isinstance(ids, dict) else {}
    return {index: by_id.get(index, default) for index, default in defaults.items()}
