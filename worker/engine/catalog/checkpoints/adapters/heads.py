"""Finds the head that an adapter brings its base, and what the configuration then says of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.adapters.folder import Adapter
from worker.engine.catalog.checkpoints.adapters.names import target_of
from worker.engine.catalog.checkpoints.adapters.peft import TASK_CLASSES
from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.descriptions import without_code
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.library import PRE_TRAINING, Architecture, architecture, decoded, model_type_of
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_LABELS
from worker.engine.catalog.families import Family, backbone_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

LABELS = ("id2label", "label2id", "problem_type")


def table_of_adapted(adapter: Adapter, base: CheckpointInfo) -> Family | None:
    """Return the table of the adapted model; None if it is no classifier of texts, which alone have tables."""
    family, task_type = backbone_of(base.model_type), adapter.config.task_type
    if family is None or task_type == "SEQ_CLS" or base.architecture == family.head.architecture:
        return family if task_type in (None, "SEQ_CLS") else None
    brings_head = f"{family.head.logits}.weight" in adapter.whole
    is_pre_trained = "For" not in base.architecture or PRE_TRAINING.fullmatch(base.architecture) is not None
    generates = use_of(base.config).pipeline_tag == "text-generation"
    return family if task_type is None and brings_head and is_pre_trained and not generates else None


def class_with_head(adapter: Adapter, base: CheckpointInfo, tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    """Return the class of the trained model if the adapter brings a head of its own, as PEFT's tasks do."""
    known = architecture(base.config, base.architecture)
    new = [name for name in adapter.whole if target_of(name, tensors, None, known) not in tensors]
    kind, ending = model_type_of(base.model_type), TASK_CLASSES.get(adapter.config.task_type or "")
    if not new or kind is None or ending is None:
        return None
    classes = [one for one in kind.architectures.values() if one.name.endswith(ending)]
    return next((one for one in classes if all(one.reads(name) for name in new)), None)


def with_table_head(
    adapter: Adapter, path: Path, base: CheckpointInfo, family: Family, replaced: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Return the base's configuration with the keys that describe the head and name its outputs.

    Raises:
        InvalidCheckpoint: neither the adapter nor the base has a head.
    """
    is_classifier = base.architecture == family.head.architecture
    logits = replaced.get(f"{family.head.logits}.weight")
    if logits is None and not is_classifier:
        problem = f"neither it nor {base.source} has a head; save it with modules_to_save, as PEFT does for SEQ_CLS"
        raise InvalidCheckpoint(adapter.source, problem)
    if logits is None:
        return base.config
    architectures = base.config["architectures"] if is_classifier else [family.head.architecture]
    return {**_labelled(adapter, path, base, logits, is_classifier), "architectures": architectures}


def with_class_head(
    adapter: Adapter, path: Path, base: CheckpointInfo, replaced: Mapping[str, TensorInfo], head: Architecture
) -> dict[str, Any]:
    """Return the base's configuration with the class of the adapter's head and the names of its outputs."""
    logits = next((replaced[name] for name in ("score.weight", "classifier.weight") if name in replaced), None)
    config = base.config if logits is None else _labelled(adapter, path, base, logits, is_classifier=False)
    return {**config, "architectures": [head.name]}


def _labelled(
    adapter: Adapter, path: Path, base: CheckpointInfo, logits: TensorInfo, is_classifier: bool
) -> dict[str, Any]:
    """Return the base's configuration with the names of a head's outputs."""
    outputs = logits.shape[0] if logits.shape else 0
    names = {str(index): f"LABEL_{index}" for index in range(min(outputs, MAX_LABELS))}
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
    for config in (_own_config(path, adapter.source), base.config if is_classifier else {}):
        named = config.get("id2label")
        if isinstance(named, dict) and len(named) == outputs:
            labels = {key: config[key] for key in LABELS if config.get(key) is not None}
            break
    rest = {key: value for key, value in base.config.items() if key not in (*LABELS, "num_labels")}
    return rest | labels


def _own_config(path: Path, source: str) -> dict[str, Any]:
    """Read the configuration of the whole model, which some trainers save beside the adapter."""
    if not (path / "config.json").exists():
        return {}
    config: dict[str, Any] = decoded(read_json(path / "config.json", source, MAX_CONFIG_BYTES))
    return without_code(config, source)[0]
