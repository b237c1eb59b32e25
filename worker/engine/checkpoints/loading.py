"""Checkpoints as running models: loaded once, kept warm within a memory budget."""

import inspect
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from worker.engine.catalog.architectures import architecture_of
from worker.engine.catalog.errors import InvalidCheckpoint
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.headers import CheckpointInfo
from worker.engine.catalog.labels import Task, task_of
from worker.engine.catalog.layouts import spellings
from worker.engine.catalog.planning import CACHE_BYTES, require_tokenizer
from worker.engine.checkpoints.attention import CPU_ATTENTION
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.resources import is_out_of_memory
from worker.engine.scoring.data import padding_values

SETTINGS = {
    "return_dict": True,
    "output_attentions": False,  # what is asked for here costs time, and not every attention can give it
    "chunk_size_feed_forward": 0,  # in chunks, the second projection would see parts of its input
}

PARTS_PER_TENSOR, PARTS_BESIDE = 10, 1000  # modules and parameters; in BERT there are 2.2 for each tensor


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model in eval mode on its device, with what feeds it."""

    info: CheckpointInfo
    task: Task
    model: nn.Module
    tokenizer: Any
    device: torch.device
    max_length: int
    padding: dict[str, int]


def load(info: CheckpointInfo, device: torch.device) -> LoadedModel:
    """Load with transformers: safetensors only, no code from the checkpoint, no network.

    Raises:
        InvalidCheckpoint: transformers cannot load it, a weight is missing, or a weight is NaN or infinite.
    """
    family = FAMILIES[info.model_type]
    require_tokenizer(info)
    offline = {"local_files_only": True, "trust_remote_code": False}
    # None: fused where the family has it.
    attention = None if device.type == "cuda" else CPU_ATTENTION
    try:
        if info.base is None:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                info.path,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, by name
                **SETTINGS,
                **offline,
            )
        else:
            check_layout(info)
            model, report = _adapted(info, attention), {"mismatched_keys": (), "missing_keys": ()}
        # Without a tokenizer_config.json, its class is that of the model's type.
        tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path, config=model.config, **offline)
    except InvalidCheckpoint:
        raise
    except BaseException as error:  # whatever transformers, tokenizers or their checks of the configuration think of it
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        raise InvalidCheckpoint(info.source, f"transformers cannot load it: {in_one_line(error)}") from error
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise _misshapen(info, name, found, wanted)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidCheckpoint(info.source, f"no tensor {missing[0]}, which {info.architecture} needs")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InvalidCheckpoint(info.source, f"tensor {name} has values that are NaN or infinite", tensor=name)
    model.eval().requires_grad_(False).to(device)
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= model.config.vocab_size:
        problem = f"its tokenizer has ids up to {last}, its embedding matrix {model.config.vocab_size} rows"
        raise InvalidCheckpoint(info.source, problem)
    tokenizer.model_input_names = _inputs(tokenizer, model)
    positions = family.max_tokens(info.config)
    return LoadedModel(
        info=info,
        task=task_of(info),
        model=model,
        tokenizer=tokenizer,
        device=device,
        max_length=min(positions, _length_limit(tokenizer, positions)),
        padding=padding_values(tokenizer),
    )


def _adapted(info: CheckpointInfo, attention: str | None) -> nn.Module:
    """The model that an adapter makes of its base, whose layout was checked."""
    config = AutoConfig.for_model(**{**info.config, **SETTINGS})
    model: nn.Module = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    family, parameters = FAMILIES[info.model_type], dict(model.named_parameters())
    with TensorReader() as reader, torch.no_grad():
        for tensor in info.tensors.values():
            slot = family.slot(tensor.name)
            parameter = None if slot is None else parameters.pop(slot.name, None)
            if parameter is None:
                continue
            if parameter.shape != tensor.shape:  # which copying would stretch, where it has an axis of 1
                raise _misshapen(info, tensor.name, tensor.shape, parameter.shape)
            parameter.copy_(reader.read(tensor))
    if parameters:
        raise InvalidCheckpoint(info.source, f"no tensor {next(iter(parameters))}, which {info.architecture} needs")
    return model


def check_layout(info: CheckpointInfo) -> None:
    """Whether the model that transformers makes of the configuration has the checkpoint's tensors; reads no weights.

    Nothing is known of an architecture that is not one of the library's own, nor of one whose tensors it renames or
    rearranges while it loads them.

    Raises:
        InvalidCheckpoint: transformers takes no such configuration, or a tensor is missing or has another shape.
    """
    layout = _layout_of(info)
    if layout is None:
        return
    found = _shapes(info, layout)
    for name, shape in layout.shapes.items():
        if name not in found:
            if found.keys() & layout.tied.get(name, ()):
                continue
            raise InvalidCheckpoint(info.source, f"no tensor {name}, which {info.architecture} needs")
        if found[name] != shape:
            raise _misshapen(info, name, found[name], shape)


def _misshapen(info: CheckpointInfo, name: str, found: Sequence[int], wanted: Sequence[int]) -> InvalidCheckpoint:
    problem = f"tensor {name} has shape {list(found)}, by its configuration it would have {list(wanted)}"
    return InvalidCheckpoint(info.source, problem, tensor=name)


def unread_tensors(info: CheckpointInfo) -> list[str]:
    """Names of the tensors that transformers does not read; none where `check_layout` knows nothing either."""
    layout = _layout_of(info)
    if layout is None:
        return []
    known = {*layout.shapes, *layout.buffers, *(name for names in layout.tied.values() for name in names)}
    return [name for name in _shapes(info, layout) if name not in known]


@dataclass(frozen=True)
class _Layout:
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, by name; of tied ones, under the first of their names."""
    tied: dict[str, set[str]]
    """Other names of the same parameter."""
    buffers: frozenset[str]
    prefix: str
    """Of what lies under the head, which names in a checkpoint may lack."""


def _shapes(info: CheckpointInfo, layout: _Layout) -> dict[str, tuple[int, ...]]:
    """By the names that the model gives them."""
    family = FAMILIES.get(info.model_type)
    found = {}
    for name, tensor in info.tensors.items():
        slot = family.slot(name) if family else None
        name = slot.name if slot else name
        names = [known for one in spellings(name) for known in (one, f"{layout.prefix}.{one}")]
        own = (one for one in names if one in layout.shapes or one in layout.buffers)
        found[next(own, name)] = tensor.shape
    return found


def _layout_of(info: CheckpointInfo) -> _Layout | None:
    return _layout(json.dumps(info.config, sort_keys=True), info.source, len(info.tensors))


@lru_cache(maxsize=64)
def _layout(config: str, source: str, tensors: int) -> _Layout | None:
    """None where transformers' own names and shapes are not those of a checkpoint."""
    values = json.loads(config)
    model_class = _library_class(architecture_of(values))
    if model_class is None or values.get("model_type") not in CONFIG_MAPPING:
        return None
    if model_class.forward is nn.Module.forward:
        problem = f"architectures in config.json names {model_class.__name__}, which computes nothing by itself"
        raise InvalidCheckpoint(source, f"{problem}; name the model's own class")
    try:
        with torch.device("meta"), _built_for(tensors, source):
            model = model_class._from_config(AutoConfig.for_model(**values), attn_implementation="eager")
        model.tie_weights()
        if get_model_conversion_mapping(model, add_legacy=False):
            return None
        tied: dict[str, set[str]] = {}
        for target, origin in model.all_tied_weights_keys.items():
            tied.setdefault(origin, set()).add(target)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        buffers = frozenset(name for name, _ in model.named_buffers())
        return _Layout(shapes, tied, buffers, model.base_model_prefix)
    except InvalidCheckpoint:
        raise
    except Exception as error:  # whatever transformers thinks of the configuration
        raise InvalidCheckpoint(source, f"transformers cannot load it: {in_one_line(error)}") from error


@contextmanager
def _built_for(tensors: int, source: str) -> Iterator[None]:
    """Stops building a model that is far larger than a checkpoint of so many tensors.

    How many layers it gets is for a few bytes of its configuration to say, under a key of any name.
    """
    left = PARTS_PER_TENSOR * tensors + PARTS_BESIDE

    def count(module: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            problem = f"by its configuration it would have many more than the {tensors} tensors that are there"
            raise InvalidCheckpoint(source, f"{problem} (at {name} of a {type(module).__name__})")

    with (
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(count),
    ):
        yield


def _library_class(name: str) -> Any:
    """The model class of this name that transformers itself has; None where there is none."""
    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # it needs a library that is not there
        return None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model and found.__module__.startswith("transformers.") else None


def _inputs(tokenizer: Any, model: Any) -> list[str]:
    """The tokenizer's outputs that the model takes.

    With one segment or none, every token is of the same and the ids say nothing; a tokenizer that counts to two would
    reach beyond the matrix.
    """
    taken = set(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 0) < 2:
        taken.discard("token_type_ids")
    # Without a mask, padding would be read as text; not every tokenizer's configuration asks for one.
    names = dict.fromkeys(["input_ids", *tokenizer.model_input_names, "attention_mask"])
    return [name for name in names if name in taken]


def _length_limit(tokenizer: Any, positions: int) -> int:
    """What the tokenizer's own configuration says, if it is a length at all."""
    limit = tokenizer.model_max_length
    return limit if isinstance(limit, int) and limit > 0 else positions


class ModelCache:
    """The models used last, by the state of their files; the oldest go when the budget is exceeded."""

    def __init__(self, device: torch.device, capacity_bytes: int = CACHE_BYTES) -> None:
        self._device = device
        self._capacity = capacity_bytes
        self._models: OrderedDict[tuple[object, ...], LoadedModel] = OrderedDict()

    def get(self, info: CheckpointInfo) -> LoadedModel:
        key = _state(info)
        if key in self._models:
            self._models.move_to_end(key)
        else:
            self._models[key] = load(info, self._device)
            while len(self._models) > 1 and sum(_bytes(m) for m in self._models.values()) > self._capacity:
                self._models.popitem(last=False)
        return self._models[key]

    def bytes_besides(self, infos: Sequence[CheckpointInfo]) -> int:
        """Held for other checkpoints than these."""
        keys = {_state(info) for info in infos}
        return sum(_bytes(model) for key, model in self._models.items() if key not in keys)

    def keep_only(self, infos: Sequence[CheckpointInfo]) -> None:
        keys = {_state(info) for info in infos}
        for key in [key for key in self._models if key not in keys]:
            del self._models[key]


def _state(info: CheckpointInfo) -> tuple[object, ...]:
    """Of every file, since tokenizer and configuration count as much as the weights."""
    stats = sorted((file.name, file.stat()) for file in info.path.iterdir())
    own = (info.path, *((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats))
    return own if info.base is None else (own, _state(info.base))


def _bytes(loaded: LoadedModel) -> int:
    return sum(p.numel() * p.element_size() for p in loaded.model.parameters())


def is_of_library(error: BaseException) -> bool:
    """Whether it is an error, or a panic of compiled code, as tokenizers has at some files; no signal to stop."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def in_one_line(error: BaseException) -> str:
    """What it says, which may be on several lines; at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
