"""Tells how transformers loads a class, and what it is for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from worker.engine.catalog.checkpoints.library import auto_classes

PIPELINE_TAGS: Mapping[str, str | None] = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForPreTraining": None,
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForTableQuestionAnswering": "table-question-answering",
    "AutoModelForDocumentQuestionAnswering": "document-question-answering",
    "AutoModelForVisualQuestionAnswering": "visual-question-answering",
    "AutoModelForMultipleChoice": None,
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageSegmentation": "image-segmentation",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForInstanceSegmentation": "image-segmentation",
    "AutoModelForUniversalSegmentation": "image-segmentation",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForZeroShotObjectDetection": "zero-shot-object-detection",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForMaskGeneration": "mask-generation",
    "AutoModelForKeypointMatching": "keypoint-matching",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForTDT": "automatic-speech-recognition",
    "AutoModelForRNNT": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForTextToSpectrogram": "text-to-audio",
    "AutoModelForTextToWaveform": "text-to-audio",
}
"""The hub's names of tasks, by the classes of transformers that load models for them."""
OTHER_ENDINGS = {"LMHeadModel": "AutoModelForCausalLM", "ForConditionalGeneration": "AutoModelForSeq2SeqLM"}
"""Ends of names of classes, where they are other words than in the names of the classes that load them."""

WITHOUT_HEAD = "AutoModel"


class Use(NamedTuple):
    """The use of a model with a head of some kind."""

    auto_class: str
    """Class of transformers that loads the model."""
    pipeline_tag: str | None
    """The hub's name of the model's task."""

    @property
    def has_labels(self) -> bool:
        """Whether the head's outputs are labels, which the configuration names."""
        is_of_labels = self.auto_class.endswith(("Classification", "Segmentation", "ObjectDetection"))
        return is_of_labels and "ZeroShot" not in self.auto_class


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the name of the class in transformers; empty where the configuration has none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def use_of(config: Mapping[str, Any]) -> Use:
    """Return the use of a checkpoint with this configuration; of a class that transformers lacks, by its name's end."""
    name = architecture_of(config)
    auto_class = auto_classes().get(name) or _by_ending(name)
    return Use(auto_class, PIPELINE_TAGS.get(auto_class))


def _by_ending(name: str) -> str:
    endings = {**{auto_class.removeprefix("AutoModel"): auto_class for auto_class in PIPELINE_TAGS}, **OTHER_ENDINGS}
    return next((auto_class for ending, auto_class in endings.items() if name.endswith(ending)), WITHOUT_HEAD)


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
