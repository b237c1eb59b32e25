"""Loads checkpoints as running models: once each, kept warm within a memory budget."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.companion_checks import TEXT, check_ids, check_run_tokenizer, check_segments
from worker.engine.catalog.checkpoints.files import described_files
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.modules import SENTENCE_MODULES, embedder_of
from worker.engine.catalog.families import Family
from worker.engine.catalog.planning.holding import Holding
from worker.engine.catalog.planning.memory import CACHE_BYTES
from worker.engine.catalog.planning.plan import require_reader, required_table
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, is_of_library
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.catalog.tasks import Embedding, Task, reads_images, task_of
from worker.engine.checkpoints.configurations import OFFLINE, library_config
from worker.engine.checkpoints.image_processor import ImageProcessor, load_image_processor
from worker.engine.checkpoints.layout import check_layout, misshapen
from worker.engine.checkpoints.reader import TensorReader, digest_file, file_identity
from worker.engine.checkpoints.tokenizer import load_tokenizer
from worker.engine.inputs.examples import padding_values
from worker.engine.models.attention import cpu_attention
from worker.engine.models.experts import with_single_experts
from worker.engine.models.sentence_modules import SentenceModules
from worker.engine.models.weights import Source, Weights, first_names, parts_of, tensors_of
from worker.engine.runtime.libraries import transformers
from worker.engine.runtime.placeholders import is_placeholder, without_values
from worker.engine.runtime.resources import is_out_of_memory
from worker.engine.tasks import HeadKind, kind_of
from worker.engine.tasks.last_token import pad_token_of

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device that computes in float32, with its tokenizer or image processor."""

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
    weights: Weights | None = None
    """The weights of its parts; None where it is held whole."""

    @property
    def holding(self) -> Holding:
        return Holding.WHOLE if self.weights is None else self.weights.holding

    @property
    def nbytes(self) -> int:
        """Number of bytes of the weights that are held."""
        of_parts = 0 if self.weights is None else self.weights.nbytes
        return of_parts + sum(p.numel() * p.element_size() for p in self.model.parameters() if not is_placeholder(p))

    def take(self, sources: Mapping[str, Source]) -> None:
        """Replace parameters by others of the same shapes, by their names."""
        if self.weights is not None:
            self.weights.replace(sources)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in sources.keys() & own.keys():
                if not is_placeholder(own[name]):
                    own[name].copy_(sources[name](None))

    def held_as(self, holding: Holding) -> "LoadedModel":
        """Return the model held in a way that takes less memory. It is the same module, so this one is no longer whole.

        Raises:
            OSError: this process may open no more files.
        """
        if self.weights is not None:
            self.weights.stream()
            return self
        tensors = tensors_of(self.model, self.info, self.family)
        return replace(self, weights=Weights(self.model, self.info, self.family, tensors, holding, self.device))

    @cached_property
    def kind(self) -> HeadKind[Any]:
        """The head as the engine runs it."""
        return kind_of(self.task, self.model)


def load(info: CheckpointInfo, device: torch.device, holding: Holding = Holding.WHOLE) -> LoadedModel:
    """Load with transformers: safetensors only, no code from the checkpoint, no network.

    Args:
        holding: where its weights are; unless it is held whole, they are never in memory together.

    Raises:
        InvalidCheckpoint: transformers cannot load it, a weight is missing, or a weight is NaN or infinite.
    """
    family = required_table(info)
    require_reader(info)
    try:
        check_layout(info)  # first, because the configuration may claim a model of any size
        check_run_tokenizer(info)
        attention = _attention(info, device)
        if info.base is None and holding is Holding.WHOLE:
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
            made = _adapted if holding is Holding.WHOLE else _outlined
            model, report = made(info, family, attention), {"mismatched_keys": (), "missing_keys": ()}
        task = task_of(info)
        embedder = embedder_of(info) if isinstance(task, Embedding) else None
        if embedder is not None:
            setattr(model, SENTENCE_MODULES, SentenceModules(embedder))
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
        if not parameter.is_meta:
            _check_finite(info, name, parameter)
    model.config.use_cache = False  # rows are computed whole, and blocks of layers again and again
    model.eval().requires_grad_(False)
    weights = None
    if holding is not Holding.WHOLE:
        weights = Weights(model, info, family, tensors_of(model, info, family), holding, device)
    _move(model, device)
    positions = family.max_tokens(info.config)
    if embedder is not None and embedder.max_tokens is not None:
        positions = min(positions, embedder.max_tokens)
    if is_of_text:
        check_ids(info, last, model.config.vocab_size)
        reader.model_input_names = _inputs(reader, model)
        _check_segments(info, reader, model)
    return LoadedModel(
        info=info,
        family=family,
        task=task,
        model=model,
        tokenizer=reader,
        device=device,
        max_length=min(positions, _length_limit(reader, positions)) if is_of_text else positions,
        padding=padding_values(reader, pad_token_of(model)) if is_of_text else {},
        weights=weights,
    )


def _image_processor(info: CheckpointInfo, model: Any) -> ImageProcessor:
    config = getattr(model.config, "vision_config", model.config)
    return load_image_processor(info, (config.num_channels, config.image_size, config.image_size))


def _built(info: CheckpointInfo, family: Family, attention: str | None, *, whole: bool) -> Any:
    """Build a model whose layout was checked, with parameters that have no values unless it is whole."""
    config = library_config(info.config, info.source)
    with nullcontext() if whole else without_values():
        model: Any = _auto_class(info).from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    with_single_experts(model, family)
    described = (info.base or info).path
    if (described / GENERATION_CONFIG).exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(described, **OFFLINE)
    return model


def _adapted(info: CheckpointInfo, family: Family, attention: str | None) -> nn.Module:
    """Apply an adapter to its base, whose layout was checked, and return the model."""
    model: nn.Module = _built(info, family, attention, whole=True)
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


def _outlined(info: CheckpointInfo, family: Family, attention: str | None) -> nn.Module:
    """Build a model whose layout was checked, and read what it has besides its parts; their tensors are checked."""
    model: nn.Module = _built(info, family, attention, whole=False)
    of_parts = {
        id(parameter)
        for module, kind in parts_of(model, info, family)
        for _, _, parameter in kind.own_parameters(module)
    }
    parameters, state = dict(model.named_parameters()), model.state_dict(keep_vars=True)
    first, found = first_names(model), dict[str, TensorInfo]()
    with TensorReader() as reader:
        for tensor in info.tensors.values():
            slot = family.slot(tensor.name)
            own = None if slot is None else state.get(slot.name)
            if slot is None or own is None:
                continue
            if own.shape != tensor.shape:
                raise misshapen(info, tensor.name, tensor.shape, own.shape)
            values = reader.read(tensor)
            if not isinstance(own, nn.Parameter):  # a buffer
                own.copy_(values)
                continue
            _check_finite(info, slot.name, values)
            other = found.setdefault(first[slot.name], tensor)
            if other is not tensor:
                if not torch.equal(reader.read(other), values):
                    problem = f"tensors {other.name} and {tensor.name} should be one matrix, and differ"
                    raise InvalidCheckpoint(
                        info.source, f"{problem}; a worker with memory for the whole model takes it"
                    )
            elif id(own) not in of_parts:
                _put(model, own, values.float())
    lacking = next((name for name in parameters if name not in found), None)
    if lacking is not None:
        raise InvalidCheckpoint(info.source, f"no tensor {lacking}, which {info.architecture} needs")
    return model


def _put(model: nn.Module, parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Put a parameter with these values everywhere in place of one without."""
    made = nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is parameter:
                module._parameters[name] = made


def _move(model: nn.Module, device: torch.device) -> None:
    """Move a model to its device, except placeholders, which are there already and would take their memory."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not is_placeholder(parameter):
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _check_finite(info: CheckpointInfo, name: str, values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InvalidCheckpoint(info.source, f"tensor {name} has values that are NaN or infinite", tensor=name)


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
    """Keeps the models used last, by the state of their files; the oldest go when the budget is exceeded.

    `holding` says how models are held from now on, see `hold`.
    """

    def __init__(self, device: torch.device, capacity_bytes: int = CACHE_BYTES) -> None:
        self._device = device
        self._capacity = capacity_bytes
        self._models: OrderedDict[tuple[object, ...], LoadedModel] = OrderedDict()
        self.holding = Holding.WHOLE

    def get(self, info: CheckpointInfo) -> LoadedModel:
        return self._kept(_state(info), info, lambda: self.fresh(info))

    def made_of(
        self, name: str, info: CheckpointInfo, others: Sequence[CheckpointInfo], make: Callable[[], LoadedModel]
    ) -> LoadedModel:
        """Return a model that is made of several checkpoints, and keep it while models are held whole.

        Args:
            name: tells it from others that are made of the same ones.
            info: the checkpoint that describes it.
            make: makes it if it is not kept.
        """
        if self.holding is not Holding.WHOLE:  # it reads its weights from what its maker has open
            return make()
        return self._kept((name, *map(_state, (info, *others))), info, make)

    def _kept(self, key: tuple[object, ...], info: CheckpointInfo, make: Callable[[], LoadedModel]) -> LoadedModel:
        if key in self._models and self._models[key].holding <= self.holding:
            self._models[key] = replace(self._models[key], info=info)  # the view of this `info` is open now
            self._models.move_to_end(key)
        else:
            self._models[key] = make()
            while len(self._models) > 1 and sum(model.nbytes for model in self._models.values()) > self._capacity:
                self._models.popitem(last=False)
        return self._models[key]

    def fresh(self, info: CheckpointInfo) -> LoadedModel:
        """Load a model that is not kept."""
        return load(info, self._device, self.holding)

    def hold(self, holding: Holding, infos: Sequence[CheckpointInfo]) -> None:
        """Hold models in this way from now on. Those of these checkpoints that take more memory give it up.

        Others that take more are given up, since the views that they were loaded from may be closed.
        """
        self.holding = holding
        open_now = {_state(info): info for info in infos}
        for key, model in list(self._models.items()):
            if model.holding >= holding:
                continue
            if key in open_now:
                self._models[key] = replace(model, info=open_now[key]).held_as(holding)
            else:
                del self._models[key]

    def bytes_besides(self, infos: Sequence[CheckpointInfo]) -> int:
        """Return the bytes that are held for other checkpoints than these."""
        keys = {_state(info) for info in infos}
        return sum(model.nbytes for key, model in self._models.items() if key not in keys)

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
