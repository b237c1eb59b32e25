"""Reads LoRA adapters, as PEFT saves them, from their headers, as the whole checkpoints that they make of their base.

Every adapted matrix is `W_base + scaling * B A` with `scaling = alpha / r`, or, rank-stabilised, `alpha / sqrt(r)`
(https://arxiv.org/abs/2106.09685 and https://arxiv.org/abs/2312.03732). Tensors that PEFT stores whole
(`modules_to_save`, trained biases) replace the base's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, ValidationError

from worker.engine.catalog.checkpoints.adapter_targets import HEAD_MODULES, TargetConfig, Targets
from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.descriptions import check_folder, without_code
from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, INDEX, WEIGHTS
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.identity import identify
from worker.engine.catalog.checkpoints.info import FLOATS, CheckpointInfo, LowRank, TensorInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint, readable
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.library import (
    PRE_TRAINING,
    Architecture,
    architecture,
    completed,
    decoded,
    model_type_of,
    ties,
)
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES
from worker.engine.catalog.checkpoints.patterns import ModulePatterns
from worker.engine.catalog.checkpoints.tensor_names import EMBEDDINGS, OUTPUT_EMBEDDINGS, ends_with, layer_of
from worker.engine.catalog.checkpoints.tokenizer_files import vocabulary_of
from worker.engine.catalog.checkpoints.weights import layer_count
from worker.engine.catalog.families import Family, Kind, backbone_of
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint

PREFIX = "base_model.model."  # prefix of the name of every tensor that PEFT saves
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
"""Parts of names that tensors stored whole have in an adapter but not in the base."""
FACTORS = {
    "lora_A.weight": ("a", False),
    "lora_B.weight": ("b", False),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
}
"""Ends of names, each with its factor, and whether that adapts an embedding."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Kinds of `init_lora_weights` that leave the base's weights as they are; others move a part of them into the adapter,
whose base is then another."""
HARMLESS = {
    "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
"""Keys of `adapter_config.json` that describe the training, or that the tensors show too. PEFT itself corrects
`fan_in_fan_out` for each layer by the layer's kind."""
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""Ends of the names of the classes that PEFT trains for each task."""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
"""Model types that have layers stored as (inputs, outputs)."""
TRANSPOSED_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Names of these layers."""
EMBEDDING = re.compile(
    r"shared|wte|wpe|embeddings|(word|token|token_type|tok|position|rel|lang)_embeddings?"
    r"|embed_(tokens|in|positions)|(tokens|positions)_embed|relative_attention_bias"
)
"""Last parts of names of modules that are embeddings, not linear layers."""
MAY_BE_EMBEDDING = re.compile(r"emb|token|posi|shared|wte|wpe|relative_attention_bias|\Aw\Z")
"""Parts of names of modules that may be embeddings."""
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
WITHOUT_LOGITS = ("Model", "Classification", "QuestionAnswering", "MultipleChoice")
"""Ends of the names of classes without logits of tokens."""
LARGEST_SCALING = 3.4e38  # largest number of float32, in which it is multiplied
MAX_LABELS = 100_000  # number of labels that get names: a header may claim any number
LABELS = ("id2label", "label2id", "problem_type")

MERGE_IT = "merge it into its base with PEFT (merge_and_unload) and name the result"


Rank = Annotated[int, Field(ge=1, le=1_000_000)]


class AdapterConfig(TargetConfig):
    """The keys of `adapter_config.json` that change what the adapter computes; other keys are in `model_extra`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: float
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: StrictBool | None = False
    init_lora_weights: bool | str | None = True


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration, its factors by module, and its whole tensors by name."""

    source: str
    config: AdapterConfig
    factors: Mapping[str, Mapping[str, TensorInfo]]
    embeddings: frozenset[str]
    """Modules among `factors` that are embeddings."""
    whole: Mapping[str, TensorInfo]


def inspect_model(
    path: Path,
    source: str,
    base: CheckpointInfo | None,
    *,
    without_base: str = "name that as base",
) -> CheckpointInfo:
    """Read the headers of a checkpoint or of an adapter of `base`, see `inspect_checkpoint`.

    Args:
        without_base: advice in the message for an adapter if there is no base.

    Raises:
        InvalidCheckpoint: a file or tensor is refused; the message names it and says what to do.
        IncompatibleCheckpoints: the adapter does not adapt `base`.
    """
    with readable(source):
        if not (path / ADAPTER_CONFIG).exists():
            return inspect_checkpoint(path, source)
        check_folder(path, source)
        adapter = _adapter(path, source)
        if base is None:
            of = adapter.config.base_model_name_or_path
            of = of[:200] if of else "a model that it does not name"
            raise InvalidCheckpoint(source, f"it is an adapter of {of}; {without_base}")
        return _adapted(adapter, path, base)


def _adapter(path: Path, source: str) -> Adapter:
    config = _config(path, source)
    if not (path / ADAPTER_WEIGHTS).is_file():
        if (path / ADAPTER_PICKLE).exists():
            problem = (
                f"{ADAPTER_PICKLE} is there but no {ADAPTER_WEIGHTS}; pickle files are not opened. Convert it where "
                'you trust it: python -c "import torch; from safetensors.torch import save_file; '
                f"save_file({{k: v.contiguous() for k, v in torch.load('{ADAPTER_PICKLE}').items()}}, "
                f"'{ADAPTER_WEIGHTS}')\""
            )
            raise InvalidCheckpoint(source, problem)
        raise InvalidCheckpoint(source, f"{ADAPTER_WEIGHTS} is missing")
    for name in (WEIGHTS, INDEX):
        if (path / name).exists():
            raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG} and {name} are both there; leave the one that is meant")
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    copies: dict[str, TensorInfo] = {}
    embeddings = set()
    for tensor in read_header(path / ADAPTER_WEIGHTS, source):
        if not tensor.name.startswith(PREFIX):
            raise InvalidCheckpoint(source, f"tensor {tensor.name} has no name of PEFT's, which begin with {PREFIX}")
        if tensor.dtype not in FLOATS:
            raise InvalidCheckpoint(source, f"tensor {tensor.name} has dtype {tensor.dtype}, not a float")
        if ".original_module." in tensor.name:  # modules_to_save replaces these; PEFT saves them too if it saves biases
            continue
        name = WRAPPERS.sub("", tensor.name.removeprefix(PREFIX))
        if ".modules_to_save." in tensor.name:  # PEFT, too, reads it under its name without that part
            copies[name] = tensor
            continue
        end = next((end for end in FACTORS if name.endswith(f".{end}")), None)
        if end is not None:
            module = name.removesuffix(f".{end}")
            factor, is_embedding = FACTORS[end]
            if factors.setdefault(module, {}).setdefault(factor, tensor) is not tensor:
                problem = f"tensors {factors[module][factor].name} and {tensor.name} are both of {module}"
                raise InvalidCheckpoint(source, f"{problem}; save it again")
            if is_embedding:
                embeddings.add(module)
        elif ".lora_" in name:
            raise InvalidCheckpoint(source, f"tensor {tensor.name} is of no plain LoRA adapter; {MERGE_IT}")
        else:
            whole[name] = tensor
    if not factors and not whole:
        raise InvalidCheckpoint(source, f"{ADAPTER_WEIGHTS} has no tensor of an adapter; save it again")
    for module, pair in factors.items():
        if len(pair) < 2:
            raise InvalidCheckpoint(source, f"of {module}, only one of the tensors lora_A and lora_B is there")
        if (pair["a"].name.endswith("lora_embedding_A")) is not pair["b"].name.endswith("lora_embedding_B"):
            raise _left_out(source, pair["a"], f"tensor {pair['b'].name} is of another kind of layer")
    adapter = Adapter(source, config, factors, frozenset(embeddings), whole)
    _refuse_left_out(adapter, copies)
    return adapter


def _refuse_left_out(adapter: Adapter, copies: Mapping[str, TensorInfo]) -> None:
    """Raise InvalidCheckpoint where PEFT would leave a tensor out without a word, and so make another model."""
    for name, tensor in copies.items():
        if name not in adapter.whole:
            problem = f"PEFT reads {PREFIX}{name} in its place, which is missing"
            raise _left_out(adapter.source, tensor, problem)
    for name, tensor in adapter.whole.items():
        module, is_wrapped = name.rpartition(".")[0], ".base_layer." in tensor.name
        if is_wrapped is not (module in adapter.factors):
            problem = f"{module} has {'no' if is_wrapped else ''} matrices of its own, so that PEFT expects the name "
            expected = f"{PREFIX}{name}" if is_wrapped else f"{PREFIX}{module}.base_layer.{name.rpartition('.')[2]}"
            raise _left_out(adapter.source, tensor, f"{problem}{expected}")
    if not adapter.factors:
        return
    try:
        targets = Targets(adapter.config)
        for module, pair in adapter.factors.items():
            is_embedding, last = module in adapter.embeddings, module.rpartition(".")[2]
            key = targets.left_out_by(module, is_embedding)
            if key is not None:
                raise _left_out(adapter.source, pair["a"], f"{ADAPTER_CONFIG}: {key} leaves out {module}")
            if is_embedding and MAY_BE_EMBEDDING.search(last) is None:
                raise _left_out(adapter.source, pair["a"], "its name is of an embedding, and the module's of none")
            if not is_embedding and EMBEDDING.fullmatch(last):
                problem = "of an embedding PEFT reads lora_embedding_A and lora_embedding_B"
                raise _left_out(adapter.source, pair["a"], problem)
    except ValueError as error:
        raise InvalidCheckpoint(adapter.source, f"{ADAPTER_CONFIG}: {error}; {MERGE_IT}") from error


def _left_out(source: str, tensor: TensorInfo, problem: str) -> InvalidCheckpoint:
    problem = f"{ADAPTER_WEIGHTS}: tensor {tensor.name} would not count in PEFT: {problem}"
    return InvalidCheckpoint(source, f"{problem}; correct that, or leave the tensor out", tensor=tensor.name)


def _config(path: Path, source: str) -> AdapterConfig:
    content = read_json(path / ADAPTER_CONFIG, source, MAX_CONFIG_BYTES)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG} has peft_type {str(kind)[:40]}; only LORA is available")
    try:
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG}: {where}: {first['msg']}") from error
    for key, value in (config.model_extra or {}).items():
        if value and key not in HARMLESS:
            raise InvalidCheckpoint(source, f"{ADAPTER_CONFIG} has {key[:100]}, which is not available; {MERGE_IT}")
    start = config.init_lora_weights
    if isinstance(start, str) and start not in PLAIN_STARTS:
        problem = (
            f"init_lora_weights '{start[:40]}' changes the base's weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
        raise InvalidCheckpoint(source, problem)
    return config


def _adapted(adapter: Adapter, path: Path, base: CheckpointInfo) -> CheckpointInfo:
    """Make the adapted checkpoint of the base: the adapter's tensors replace the base's, or are added to them."""
    family = _table_of(adapter, base)
    config, tensors = base.config, _of_base(base, family)
    head = _class_with_head(adapter, base, tensors) if family is None else None
    known = head or architecture(base.config, base.architecture)
    if family is None and head is None:
        known = known or identify(base).known
        _refuse_tied(adapter, base, known)
    replaced = _replaced(adapter, base, family, tensors, head, known)
    if head is not None:
        config = _with_labels(adapter, path, base, replaced, head)
    elif family is not None:
        config = _task_config(adapter, path, base, family, replaced)
    tensors |= replaced
    for module, (alpha, rank) in _strengths(adapter).items():
        target = _target(f"{module}.weight", tensors, family, known)
        if target not in tensors:
            raise _unknown(adapter, base, adapter.factors[module]["a"])
        scaling = alpha / (math.sqrt(rank) if adapter.config.use_rslora else rank)
        if not abs(scaling) <= LARGEST_SCALING:
            problem = f"{ADAPTER_CONFIG}: lora_alpha or alpha_pattern gives {module} the scaling {scaling:.3g}"
            raise InvalidCheckpoint(adapter.source, f"{problem}, which float32 cannot hold")
        delta = _low_rank(adapter, module, rank, scaling, base, tensors[target])
        tensors[target] = replace(tensors[target], source=adapter.source, delta=delta)
    _check_complete(adapter, base, tensors)
    vocabulary, last = vocabulary_of(path, adapter.source)
    if not vocabulary:
        return CheckpointInfo(
            adapter.source, path, config, tensors, base.vocabulary, base.tokenizer_path, base, base.last_token
        )
    return CheckpointInfo(adapter.source, path, config, tensors, vocabulary, path, base, last)


def _table_of(adapter: Adapter, base: CheckpointInfo) -> Family | None:
    """Return the table of the adapted model; None if it is no classifier of texts, which alone have tables."""
    family, task_type = backbone_of(base.model_type), adapter.config.task_type
    if family is None or task_type == "SEQ_CLS" or base.architecture == family.head.architecture:
        return family if task_type in (None, "SEQ_CLS") else None
    brings_head = f"{family.head.logits}.weight" in adapter.whole
    is_pre_trained = "For" not in base.architecture or PRE_TRAINING.fullmatch(base.architecture) is not None
    generates = use_of(base.config).pipeline_tag == "text-generation"
    return family if task_type is None and brings_head and is_pre_trained and not generates else None


def _class_with_head(adapter: Adapter, base: CheckpointInfo, tensors: Mapping[str, TensorInfo]) -> Architecture | None:
    """Return the class of the trained model if the adapter brings a head of its own, as PEFT's tasks do."""
    known = architecture(base.config, base.architecture)
    new = [name for name in adapter.whole if _target(name, tensors, None, known) not in tensors]
    kind, ending = model_type_of(base.model_type), TASK_CLASSES.get(adapter.config.task_type or "")
    if not new or kind is None or ending is None:
        return None
    classes = [one for one in kind.architectures.values() if one.name.endswith(ending)]
    return next((one for one in classes if all(one.reads(name) for name in new)), None)


def _replaced(
    adapter: Adapter,
    base: CheckpointInfo,
    family: Family | None,
    tensors: Mapping[str, TensorInfo],
    head: Architecture | None,
    known: Architecture | None,
) -> dict[str, TensorInfo]:
    """Return tensors that are stored whole, by the names that they replace; the base may lack a head or a pooler."""
    replaced = {}
    for name, tensor in adapter.whole.items():
        target = _target(name, tensors, family, known)
        slot = family.slot(name) if family is not None else None
        is_new = target not in tensors and (
            (slot is not None and slot.kind is Kind.POOLER) or (head is not None and head.reads(name))
        )
        if not is_new and (slot is None or slot.kind is not Kind.HEAD):
            if target not in tensors:
                raise _unknown(adapter, base, tensor)
            if tensor.shape != tensors[target].shape:
                problem = f"has shape {list(tensor.shape)}, in the base {list(tensors[target].shape)}"
                raise _misfit(adapter, base, tensor, problem)
        replaced[target] = replace(tensor, name=target)
    return replaced


def _low_rank(
    adapter: Adapter, module: str, rank: int, scaling: float, base: CheckpointInfo, matrix: TensorInfo
) -> LowRank:
    """Return the low-rank change of `matrix`, in its shape."""
    a, b = adapter.factors[module]["a"], adapter.factors[module]["b"]
    if a.shape[:1] != (rank,):
        problem = f"has shape {list(a.shape)}, by {ADAPTER_CONFIG} its rank is {rank}"
        raise InvalidCheckpoint(adapter.source, f"tensor {a.name} {problem}")
    if len(matrix.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
        problem = f"tensor {a.name} adapts {matrix.name}, which is no matrix; {MERGE_IT}"
        raise InvalidCheckpoint(adapter.source, problem)
    adds = (b.shape[0], a.shape[1])
    # The kind of the layer decides, as in PEFT: the flag fan_in_fan_out is for all layers together.
    transposed = module in adapter.embeddings or _is_transposed(module, base.config)
    if b.shape[1] != rank or matrix.shape != (adds[::-1] if transposed else adds):
        problem = f"of shape {list(a.shape)}, with lora_B of {list(b.shape)}, does not fit {matrix.name}"
        raise _misfit(adapter, base, a, f"{problem}, {list(matrix.shape)}")
    return LowRank(a, b, scaling, transposed)


def _is_transposed(module: str, config: Mapping[str, Any]) -> bool:
    """Return whether a model of this configuration, or a part of it, stores the layer as (inputs, outputs)."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return module.rpartition(".")[2] in TRANSPOSED_LAYERS and any(
        part.get("model_type") in TRANSPOSED for part in parts
    )


def _of_base(base: CheckpointInfo, family: Family | None) -> dict[str, TensorInfo]:
    """Return the base's tensors, if there is a table by canonical names, and without a head of another class."""
    if family is None:
        return dict(base.tensors)
    found: dict[str, TensorInfo] = {}
    for tensor in base.tensors.values():
        slot = family.slot(tensor.name) or family.slot(family.prefix + tensor.name)
        if slot is None or slot.kind is Kind.UNREAD:
            continue
        if slot.kind is Kind.HEAD and base.architecture != family.head.architecture:
            continue
        if slot.name in found:
            raise InvalidCheckpoint(base.source, f"tensor {slot.name} is there under two spellings")
        found[slot.name] = replace(tensor, name=slot.name)
    return found


def _target(
    name: str, tensors: Mapping[str, TensorInfo], family: Family | None, known: Architecture | None = None
) -> str:
    """Return the name in the base's files of the tensor that is `name` in the running model, of the class `known`."""
    if family is not None:
        slot = family.slot(name)
        return name if slot is None else slot.name
    names = [*(known.in_files(name) if known is not None else ()), name]
    inner = [one.partition(".")[2] for one in names]  # pre-trained models are saved without the prefix of their holders
    return next((one for one in (*names, *inner) if one in tensors), name)


def _strengths(adapter: Adapter) -> dict[str, tuple[float, int]]:
    """Return alpha and rank of every adapted module."""
    config = adapter.config
    try:
        alphas, ranks = ModulePatterns(config.alpha_pattern or {}), ModulePatterns(config.rank_pattern or {})
        return {
            module: (alphas.value(module, config.lora_alpha), int(ranks.value(module, config.r)))
            for module in adapter.factors
        }
    except ValueError as error:
        raise InvalidCheckpoint(adapter.source, f"{ADAPTER_CONFIG}: {error}; {MERGE_IT}") from error


def _refuse_tied(adapter: Adapter, base: CheckpointInfo, known: Architecture | None) -> None:
    """Refuse an adapter of one of two tied matrices: it unties them, which a merge of files cannot show."""
    tied = set() if known is None else {name for pair in ties(known, completed(base.config)) for name in pair}
    tied |= {other for name in tied if known is not None for other in known.in_files(name)}
    may_tie = _may_tie(base, known)
    for name in [*(f"{module}.weight" for module in adapter.factors), *adapter.whole]:
        by_name = may_tie and ends_with(name, (*EMBEDDINGS, *OUTPUT_EMBEDDINGS))
        if by_name or (name in tied and name.endswith(".weight")):
            problem = f"it adapts {name}, which the base ties to another matrix (tie_word_embeddings)"
            raise InvalidCheckpoint(adapter.source, f"{problem}; {MERGE_IT}")


def _may_tie(base: CheckpointInfo, known: Architecture | None) -> bool:
    """Return whether a model may have one matrix for embeddings and logits, as far as its configuration tells.

    A class that is not known ties them unless it says otherwise, or has no logits of tokens by its name.
    """
    has_output = any(ends_with(name, OUTPUT_EMBEDDINGS) for name in base.tensors)
    if base.architecture.endswith(GENERATES):
        return bool(base.config.get("tie_word_embeddings", not has_output))
    gives_tokens = known is None and not base.architecture.endswith(WITHOUT_LOGITS)
    return gives_tokens and base.config.get("tie_word_embeddings") is not False


def _check_complete(adapter: Adapter, base: CheckpointInfo, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InvalidCheckpoint where a layer's matrix is not adapted though `target_modules` names it.

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


def _own_config(path: Path, source: str) -> dict[str, Any]:
    """Read the configuration of the whole model, which some trainers save beside the adapter."""
    if not (path / "config.json").exists():
        return {}
    config: dict[str, Any] = decoded(read_json(path / "config.json", source, MAX_CONFIG_BYTES))
    return without_code(config, source)[0]


def _task_config(
    adapter: Adapter, path: Path, base: CheckpointInfo, family: Family, replaced: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Return the base's configuration with the keys that describe the head and name its outputs."""
    is_classifier = base.architecture == family.head.architecture
    logits = replaced.get(f"{family.head.logits}.weight")
    if logits is None and not is_classifier:
        problem = f"neither it nor {base.source} has a head; save it with modules_to_save, as PEFT does for SEQ_CLS"
        raise InvalidCheckpoint(adapter.source, problem)
    if logits is None:
        return base.config
    architectures = base.config["architectures"] if is_classifier else [family.head.architecture]
    return {**_labelled(adapter, path, base, logits, is_classifier), "architectures": architectures}


def _with_labels(
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


def _unknown(adapter: Adapter, base: CheckpointInfo, tensor: TensorInfo) -> IncompatibleCheckpoints:
    return _misfit(adapter, base, tensor, "is for a tensor that is not in the base")


def _misfit(adapter: Adapter, base: CheckpointInfo, tensor: TensorInfo, problem: str) -> IncompatibleCheckpoints:
    return IncompatibleCheckpoints(adapter.source, base.source, f"tensor {tensor.name} {problem}", tensor=tensor.name)
