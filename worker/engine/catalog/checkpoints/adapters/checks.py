"""Checks that an adapted checkpoint is whole, and that files can show it."""

from collections.abc import Mapping

from worker.engine.catalog.checkpoints.adapters.folder import Adapter
from worker.engine.catalog.checkpoints.adapters.peft import HEAD_MODULES, MERGE_IT
from worker.engine.catalog.checkpoints.files import ADAPTER_WEIGHTS
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.library import Architecture, completed, ties
from worker.engine.catalog.checkpoints.tensor_names import EMBEDDINGS, OUTPUT_EMBEDDINGS, ends_with, layer_of, own_name
from worker.engine.catalog.checkpoints.weights import layer_count
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes with logits of tokens."""
WITHOUT_LOGITS = ("Model", "Classification", "QuestionAnswering", "MultipleChoice")
"""Ends of the names of classes without logits of tokens."""


def refuse_tied(adapter: Adapter, base: CheckpointInfo, known: Architecture | None) -> None:
    """Raise InvalidCheckpoint for an adapter of one of two tied matrices: it unties them, which no file can show."""
    tied = set() if known is None else {name for pair in ties(known, completed(base.config)) for name in pair}
    may_tie = known is None and _may_tie(base)
    for name in [*(f"{module}.weight" for module in adapter.factors), *adapter.whole]:
        by_name = may_tie and ends_with(name, (*EMBEDDINGS, *OUTPUT_EMBEDDINGS))
        if by_name or (known is not None and name.endswith(".weight") and own_name(known, name) in tied):
            problem = f"it adapts {name}, which the base ties to another matrix (tie_word_embeddings)"
            raise InvalidCheckpoint(adapter.source, f"{problem}; {MERGE_IT}")


def _may_tie(base: CheckpointInfo) -> bool:
    """Return whether a model of an unknown class may have one matrix for embeddings and logits.

    It ties them unless it says otherwise, or has no logits of tokens by its name.
    """
    has_output = any(ends_with(name, OUTPUT_EMBEDDINGS) for name in base.tensors)
    if base.architecture.endswith(GENERATES):
        return bool(base.config.get("tie_word_embeddings", not has_output))
    gives_tokens = not base.architecture.endswith(WITHOUT_LOGITS)
    return gives_tokens and base.config.get("tie_word_embeddings") is not False


def check_complete(adapter: Adapter, base: CheckpointInfo, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InvalidCheckpoint where `modules_to_save` or, of a layer's matrices, `target_modules` names what is absent.

    The trained model may have lacked modules outside the layers, layers beyond those of the configuration, and whole
    lists of layers if other lists are adapted. Experts of a mixture are not looked for: transformers holds those of a
    layer as one tensor, which plain names do not adapt.
    """
    config = adapter.config
    whole = tuple(name for name in config.modules_to_save or () if name not in HEAD_MODULES)  # the base may have one
    for name, tensor in tensors.items() if whole else ():
        parts = name.split(".")[:-1]
        if tensor.source != adapter.source and any(
            ".".join(parts[:end]).endswith(whole) for end in range(1, 1 + len(parts))
        ):
            problem = f"{ADAPTER_WEIGHTS} has no tensor {name}, which modules_to_save names; save it again"
            raise InvalidCheckpoint(adapter.source, problem, tensor=name)
    targets = config.target_modules
    if not isinstance(targets, list) or config.layers_to_transform not in (None, []) or config.exclude_modules:
        return
    layers = {name: layer for name in tensors if (layer := layer_of(name)) and ".experts." not in name}
    adapted = {name for name, tensor in tensors.items() if tensor.delta is not None}
    places = {(layers[name].stack, layers[name].inner) for name in adapted & layers.keys()}
    endings = tuple(f".{target}.weight" for target in targets)
    met = tuple(ending for ending in endings if any(name.endswith(ending) for name in adapted))
    count = layer_count(base.config)
    for name, layer in layers.items():
        if not name.endswith(endings) or (count is not None and layer.number >= count):
            continue
        is_wanted = (layer.stack, layer.inner) in places or not name.endswith(met)
        if is_wanted and tensors[name].source != adapter.source:
            problem = (
                f"{ADAPTER_WEIGHTS} has no matrices for {name.removesuffix('.weight')}, which target_modules names"
            )
            raise InvalidCheckpoint(adapter.source, f"{problem}; save it again", tensor=name)
