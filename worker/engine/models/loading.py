"""Loads checkpoints as running models: once each, kept warm within a memory budget."""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.companion_checks import TEXT, check_ids, check_run_tokenizer, check_segments
from worker.engine.catalog.checkpoints.files import described_files
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.families import Family
from worker.engine.catalog.planning.memory import CACHE_BYTES
from worker.engine.catalog.planning.plan import require_reader, required_table
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, is_of_library
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.catalog.tasks import Task, reads_images, task_of
from worker.engine.checkpoints.configurations import OFFLINE, library_config
from worker.engine.checkpoints.image_processor import ImageProcessor, load_image_processor
from worker.engine.checkpoints.layout import check_layout, misshapen
from worker.engine.checkpoints.reader import TensorReader, digest_file, file_identity
from worker.engine.checkpoints.tokenizer import load_tokenizer
from worker.engine.inputs.examples import padding_values
from worker.engine.models.attention import cpu_attention
from worker.engine.models.experts import with_single_experts
from worker.engine.runtime.libraries import transformers
from worker.engine.runtime.resources import is_out_of_memory
from worker.engine.tasks import HeadKind, kind_of
from worker.engine.tasks.last_token import pad_token_of


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model in eval mode on its device, with its tokenizer or image processor."""

    info: CheckpointInfo
    family: Family
    """The table of its backbone."""
    task: Task
    model: nn.Module
    tokenizer: Any
    """The library's tokenizer, or, for images, an `ImageProcessor`."""
    device: torch.device
    max_length: int
    padding: dict[str, int]

    @cached_property
    def kind(self) -> HeadKind[Any]:
        """The head as the engine runs it."""
        return kind_of(self.task, self.model)


def load(info: CheckpointInfo, device: torch.device) -> LoadedModel:
    """Load with transformers: safetensors only, no code from the checkpoint, no network.

    Raises:
        InvalidCheckpoint: transformers cannot load it, a weight is missing, or a weight is NaN or infinite.
    """
    family = required_table(info)
    require_reader(info)
    try:
        check_layout(info)  # first, because the configuration may claim a model of any size
        check_run_tokenizer(info)
        attention = _attention(info, device)
        if info.base is None:
            model, report = _auto_class(info).from_pretrained(
                info.path,
                config=library_config(info.config, info.source),
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, by name
                **OFFLINE,
            )
            with_single_experts(model, family)
        else:
            model, report = _adapted(info, family, attention), {"mismatched_keys": (), "missing_keys": ()}
        is_of_text = not reads_images(info)
        reader: Any
        reader, last = load_tokenizer(info, model.config) if is_of_text else (_image_processor(info, model), 0)
    except InvalidCheckpoint:
        raise
    except BaseException as error:  # transformers, tokenizers and their checks of the configuration raise anything
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        raise InvalidCheckpoint(info.source, f"transformers cannot load it: {in_one_line(error)}") from error
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise misshapen(info, name, found, wanted)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidCheckpoint(info.source, f"no tensor {missing[0]}, which {info.architecture} needs")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InvalidCheckpoint(info.source, f"tensor {name} has values that are NaN or infinite", tensor=name)
    model.config.use_cache = False  # rows are computed whole, and blocks of layers again and again
    model.eval().requires_grad_(False).to(device)
    positions = family.max_tokens(info.config)
    if is_of_text:
        check_ids(info, last, model.config.vocab_size)
        reader.model_input_names = _inputs(reader, model)
        _check_segments(info, reader, model)
    return LoadedModel(
        info=info,
        family=family,
        task=task_of(info),
        model=model,
        tokenizer=reader,
        device=device,
        max_length=min(positions, _length_limit(reader, positions)) if is_of_text else positions,
        padding=padding_values(reader, pad_token_of(model)) if is_of_text else {},
    )


def _image_processor(info: CheckpointInfo, model: Any) -> ImageProcessor:
    config = getattr(model.config, "vision_config", model.config)
    return load_image_processor(info, (config.num_channels, config.image_size, config.image_size))


def _adapted(info: CheckpointInfo, family: Family, attention: str | None) -> nn.Module:
    """Apply an adapter to its base, whose layout was checked, and return the model."""
    config = library_config(info.config, info.source)
    model: nn.Module = _auto_class(info).from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    with_single_experts(model, family)
    parameters, state = dict(model.named_parameters()), model.state_dict(keep_vars=True)  # has copies, buffers
    copies: dict[str, Tensor] = {}
    with TensorReader() as reader, torch.no_grad():
        for tensor in info.tensors.values():
            slot = family.slot(tensor.name)
            own = None if slot is None else state.get(slot.name)
            if slot is None or own is None:
                continue
            if own.shape != tensor.shape:  # copying would stretch a tensor that has an axis of 1
                raise misshapen(info, tensor.name, tensor.shape, own.shape)
            values = reader.read(tensor)
            if parameters.pop(slot.name, None) is None and isinstance(own, nn.Parameter):
                copies[slot.name] = values
            else:
                own.copy_(values)
    if parameters:
        raise InvalidCheckpoint(info.source, f"no tensor {next(iter(parameters))}, which {info.architecture} needs")
    for name, values in copies.items():  # as transformers does, where a checkpoint has another matrix than the original
        if not torch.equal(state[name], values.to(state[name].dtype)):
            module, _, part = name.rpartition(".")
            setattr(model.get_submodule(module), part, nn.Parameter(values.to(state[name].dtype)))
    return model


def _attention(info: CheckpointInfo, device: torch.device) -> str | None:
    """Return the name of the attention to run. With None, families that have a fused attention use it."""
    if device.type == "cuda":
        return None
    config = library_config(info.config, info.source)
    model_class = _auto_class(info)._model_mapping[type(config)]
    # Falcon's classes choose among their own implementations by name.
    own_alone = model_class._supports_sdpa and not model_class._supports_attention_backend
    if own_alone and getattr(config, "alibi", False):
        return "sdpa"  # with "eager" they add the positions of ALiBi twice
    return "eager" if own_alone else cpu_attention()


def _auto_class(info: CheckpointInfo) -> Any:
    return getattr(transformers, use_of(info.config).auto_class)


def _check_segments(info: CheckpointInfo, tokenizer: Any, model: Any) -> None:
    """Raise InvalidCheckpoint when the tokenizer numbers segments of a text beyond those of the model."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return
    given = [*tokenizer(TEXT)["token_type_ids"], *tokenizer(TEXT, TEXT)["token_type_ids"]]
    check_segments(info, max(given), model.config.type_vocab_size)


def _inputs(tokenizer: Any, model: Any) -> list[str]:
    """Return the tokenizer's outputs that the model takes.

    If a model has one segment or none, ids of segments say nothing, and those of a tokenizer with two segments would
    reach beyond the matrix.
    """
    taken = set(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 0) < 2:
        taken.discard("token_type_ids")
    # Without a mask, padding would be read as text; not every tokenizer's configuration asks for one.
    names = dict.fromkeys(["input_ids", *tokenizer.model_input_names, "attention_mask"])
    return [name for name in names if name in taken]


def _length_limit(tokenizer: Any, positions: int) -> int:
    """Return the limit of the tokenizer's own configuration if it has one, and otherwise `positions`."""
    limit = tokenizer.model_max_length
    return limit if isinstance(limit, int) and limit > 0 else positions


class ModelCache:
    """Keeps the models used last, by the state of their files; the oldest go when the budget is exceeded."""

    def __init__(self, device: torch.device, capacity_bytes: int = CACHE_BYTES) -> None:
        self._device = device
        self._capacity = capacity_bytes
        self._models: OrderedDict[tuple[object, ...], LoadedModel] = OrderedDict()

    def get(self, info: CheckpointInfo) -> LoadedModel:
        key = _state(info)
        if key in self._models:
            self._models[key] = replace(self._models[key], info=info)  # the view of this `info` is open now
            self._models.move_to_end(key)
        else:
            self._models[key] = load(info, self._device)
            while len(self._models) > 1 and sum(_bytes(m) for m in self._models.values()) > self._capacity:
                self._models.popitem(last=False)
        return self._models[key]

    def bytes_besides(self, infos: Sequence[CheckpointInfo]) -> int:
        """Return the bytes that are held for other checkpoints than these."""
        keys = {_state(info) for info in infos}
        return sum(_bytes(model) for key, model in self._models.items() if key not in keys)

    def keep_only(self, infos: Sequence[CheckpointInfo]) -> None:
        keys = {_state(info) for info in infos}
        for key in [key for key in self._models if key not in keys]:
            del self._models[key]


def _state(info: CheckpointInfo) -> tuple[object, ...]:
    """Return everything that a loaded model depends on, wherever the checkpoint's view is.

    Tokenizer and configuration count as much as the weights, and so does the source, which messages name.
    """
    described = described_files({file.name for file in info.path.iterdir()})
    own = [(name, digest_file(info.path / name)) for name in described]
    weights = [(name, *file_identity((info.path / name).stat())) for name in info.weight_files]
    state = (info.source, *own, *weights)
    return state if info.base is None else (*state, _state(info.base))


def _bytes(loaded: LoadedModel) -> int:
    return sum(p.numel() * p.element_size() for p in loaded.model.parameters())
