"""Checks that a job's models load: configuration, tokenizer and weights, and the outputs of small models.

Weights are mapped into memory, not read, so this takes no memory of its own and little time. A forward pass reads them
all, so only small models are run. The weights of larger ones were checked to be finite when they were written.
`written.py` compares the weight files of all models with what was merged.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.companion_checks import TEXT
from worker.engine.catalog.checkpoints.files import TOKENIZER_FILES
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.library import decoded
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES
from worker.engine.catalog.checkpoints.token_tensors import vocabulary_size
from worker.engine.catalog.planning.memory import RUN_BYTES
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.publishing import beyond_matrix
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, NumericalError, is_of_library
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.catalog.tasks import TASKS
from worker.engine.checkpoints.configurations import OFFLINE, library_config
from worker.engine.checkpoints.layout import (
    check_layout,
    computed_bytes,
    library_class,
    misshapen,
    stores_copies,
)
from worker.engine.checkpoints.reader import TensorReader, digest_tokenizer
from worker.engine.checkpoints.tokenizer import load_tokenizer
from worker.engine.checkpoints.writer import write_config
from worker.engine.runtime.libraries import transformers
from worker.engine.runtime.resources import is_out_of_memory

Tensors = Mapping[str, Tensor]
"""Inputs or outputs of a model, by name."""
COMPUTED_BYTES = 256_000_000  # for tables that a model makes when it is built, from a few bytes of its configuration


class Reloading:
    """Checks whether the models of a plan will load, and later whether the published ones do.

    Descriptions that are the same in several folders are checked once.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._texts: dict[tuple[str, str, int | None], _Text] = {}
        self._were_run: set[str] = set()

    def check_descriptions(self) -> None:
        """Check everything that needs no merged weights, so that a job fails before its work begins.

        These are configuration, tokenizer and layout of each model.

        Raises:
            InvalidCheckpoint: a model would not load, whichever of its inputs is at fault.
        """
        for info, head in zip(self._plan.published, self._plan.heads, strict=True):
            owner = self._plan.tokens_of(info)
            tensors = {t.slot.name: replace(t.sources[0], shape=t.shape) for t in (*self._plan.backbone, *head)}
            with TemporaryDirectory(prefix="maskmerge-described-") as folder:
                write_config(info, self._plan, Path(folder))
                planned = replace(
                    info,
                    path=Path(folder),
                    config=_config_in(Path(folder), info.source),
                    tokenizer_path=owner.tokenizer_path,
                    vocabulary=owner.vocabulary,
                    tensors=tensors,
                )
                if _class_of(planned) is None:
                    continue
                _check_config(planned)
            self._text(planned, library_config(planned.config, info.source))
            check_layout(planned)

    def check_published(self, folders: Sequence[Path]) -> list[str]:
        """Check that the folder of every model to be published loads as it will for its user.

        Where the names, shapes and ties of a class's tensors are known, headers tell whether it takes those of a
        folder. Among small models, the first of each class is loaded with its weights and run. Its outputs must be
        those of the tensors themselves, bit by bit.

        Returns:
            Notes for the models' users.

        Raises:
            InvalidCheckpoint: a folder does not load, whichever of its inputs is at fault.
            NumericalError: the outputs of the inputs are finite, but not those of the merge; or the folder's model has
                other outputs than its tensors.
        """
        notes: list[str] = []
        for folder, origin in zip(folders, self._plan.published, strict=True):
            notes += self._check(inspect_checkpoint(folder, origin.source), origin)
        return list(dict.fromkeys(notes))

    def _check(self, published: CheckpointInfo, origin: CheckpointInfo) -> list[str]:
        model_class = _class_of(published)
        if model_class is None:
            kind = published.architecture or published.model_type
            return [f"transformers has no class {kind} here: the published model was not loaded anew"]
        _check_config(published)
        config = library_config(published.config, published.source)
        text = self._text(published, config)
        check_layout(published)
        copies = stores_copies(published)
        is_run = published.nbytes <= RUN_BYTES and published.architecture not in self._were_run
        if not is_run and (copies is False or (copies is None and published.nbytes > RUN_BYTES)):
            return text.notes
        model, problems = _model(published, model_class, config)
        if model is not None and is_run:
            self._were_run.add(published.architecture)
            given, notes = _run(published, model, text.ids, origin)
            problems += notes
            del model  # before another one of it is made
            if given is not None:
                _compare(published, model_class, *given)
        return [*text.notes, *problems]

    def _text(self, info: CheckpointInfo, config: Any) -> "_Text":
        key = (digest_tokenizer(info), info.model_type, vocabulary_size(info.config))
        if key not in self._texts:
            self._texts[key] = _cut(info, config, self._plan)
        return self._texts[key]


@dataclass(frozen=True)
class _Text:
    """The tokens that a published tokenizer gives for `TEXT`; the tokenizer itself, which is large, is not kept."""

    ids: Sequence[int] | None
    """Ids of the tokens; None where no tokenizer is published or it cannot be loaded here."""
    notes: list[str]


def _class_of(info: CheckpointInfo) -> Any:
    """Return the class that transformers has for the checkpoint; None where it has none."""
    return library_class(info.architecture) if info.model_type in transformers.CONFIG_MAPPING else None


def _config_in(folder: Path, source: str) -> dict[str, Any]:
    config: dict[str, Any] = decoded(read_json(folder / "config.json", source, MAX_CONFIG_BYTES))
    return config


def _check_config(published: CheckpointInfo) -> None:
    """Load the configuration file itself, because users have no allow-list of keys. No code of a checkpoint is run."""
    try:
        transformers.AutoConfig.from_pretrained(published.path, **OFFLINE)
    except Exception as error:  # transformers raises various exceptions for configurations
        raise _unloadable(published, "config.json", error) from error


def _unloadable(published: CheckpointInfo, what: str, error: BaseException) -> InvalidCheckpoint:
    problem = f"what would be published with its configuration does not load again: {what}: {in_one_line(error)}"
    return InvalidCheckpoint(published.source, problem)


def _cut(info: CheckpointInfo, config: Any, plan: MergePlan) -> _Text:
    """Load the tokenizer that is published with this configuration, and cut a text by it."""
    if not info.vocabulary:
        return _Text(None, [])
    owner = plan.tokens_of(info).source
    try:
        tokenizer, last = load_tokenizer(info, config)
        ids = tokenizer(TEXT)["input_ids"]
    except ImportError as error:
        return _Text(None, [f"the published tokenizer was not loaded anew: {in_one_line(error)}"])
    except BaseException as error:  # the library has no exception of its own for files that it cannot read
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        names = ", ".join(name for name in TOKENIZER_FILES if (info.tokenizer_path / name).exists())
        problem = f"its tokenizer does not load ({names}): {in_one_line(error)}; save it anew by save_pretrained()"
        raise InvalidCheckpoint(owner, problem) from error
    _refuse_methods(info, owner, tokenizer)
    if beyond_matrix(info):  # planning has made this note
        return _Text(ids, [])
    # The files beside tokenizer.json may add tokens, and so may the tokenizer's class.
    note = beyond_matrix(info, last)
    return _Text(ids, [note] if note else [])


def _refuse_methods(info: CheckpointInfo, owner: str, tokenizer: Any) -> None:
    """Raise InvalidCheckpoint where a key is the name of a method, for which transformers does not load the file.

    The service itself does not pass on such keys, but users of the published files do.
    """
    file = info.tokenizer_path / "tokenizer_config.json"
    for key in read_json(file, owner, MAX_CONFIG_BYTES) if file.exists() else ():
        if callable(getattr(type(tokenizer), key, None)):
            problem = f"{file.name} has {key}, which is a method of {type(tokenizer).__name__} in transformers"
            raise InvalidCheckpoint(owner, f"{problem}: it would not load again; remove the key", file=file.name)


def _model(published: CheckpointInfo, model_class: Any, config: Any) -> tuple[Any, list[str]]:
    """Return the loaded model, and notes; None if a library that it needs is missing, or it computes large tables."""
    try:
        computed = computed_bytes(published, model_class, deepcopy(config))
        if computed > COMPUTED_BYTES:
            note = (
                f"the published model was not loaded anew: its tables of positions and the like have {computed} bytes"
            )
            return None, [note]
        model, report = model_class.from_pretrained(
            published.path,
            config=config,
            use_safetensors=True,
            dtype="auto",
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
            **OFFLINE,
        )
    except InvalidCheckpoint:
        raise
    except ImportError as error:
        return None, [f"the published model was not loaded anew: {in_one_line(error)}"]
    except BaseException as error:
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        raise _unloadable(published, "its weights", error) from error
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise misshapen(published, name, found, wanted)
    _check_tied(published, model)
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would make up values for it
        problem = f"no tensor {missing[0]}, which {published.architecture} needs"
        raise InvalidCheckpoint(published.source, problem, tensor=missing[0])
    return model, []


def _check_tied(published: CheckpointInfo, model: Any) -> None:
    """Check that tied weights stay tied: transformers takes stored copies that differ for matrices of their own."""
    for copy, original in model.all_tied_weights_keys.items():
        tensors = [model.state_dict(keep_vars=True).get(name) for name in (copy, original)]
        if None in tensors or tensors[0].data_ptr() == tensors[1].data_ptr():
            continue
        problem = (
            f"tensor {copy} would be published with other values than {original}, to which {published.architecture} "
            "ties it; set tie_word_embeddings in config.json to what the models were trained with"
        )
        raise InvalidCheckpoint(published.source, problem, tensor=copy)


def _run(
    published: CheckpointInfo, model: Any, ids: Sequence[int] | None, origin: CheckpointInfo
) -> tuple[tuple[Tensors, Tensors] | None, list[str]]:
    """Run a published model on a text or an image. Return these inputs and its outputs, or a note why there are none.

    Raises:
        InvalidCheckpoint: it does not run, and the model that it comes from does.
        NumericalError: its outputs are not finite, and those of the model that it comes from are.
    """
    inputs = _inputs(model, ids, published)
    problem: EngineError | None = None
    if inputs is not None:
        outputs = _outputs(published, model, inputs)
        if not isinstance(outputs, EngineError):
            return (inputs, outputs), []
        problem = outputs
        # Not every model runs on these inputs alone. The merge need not do what its own model does not do either.
        before = origin.base or origin  # an adapter has no model of its own
        if not isinstance(_outputs(before, _loaded(before, type(model)), inputs), EngineError):
            raise problem
    if isinstance(problem, NumericalError):
        note = f"the outputs of the published {published.architecture} are not finite, nor those of the model"
        return None, [Doubt(note)]
    note = f"the published {published.architecture} was loaded anew, but not run: it takes more than a text or an image"
    return None, [note]


def _loaded(origin: CheckpointInfo, model_class: Any) -> Any:
    config = library_config(origin.config, origin.source)
    return model_class.from_pretrained(
        origin.path, config=config, use_safetensors=True, dtype="auto", attn_implementation="eager", **OFFLINE
    )


def _inputs(model: Any, ids: Sequence[int] | None, published: CheckpointInfo) -> Tensors | None:
    """Return an image, or a text of the model's own tokens, as inputs; None for a model that takes something else."""
    if model.main_input_name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        sides = [size, size] if isinstance(size, int) else size
        if not isinstance(channels, int) or not isinstance(sides, list | tuple) or len(sides) != 2:
            return None
        shape = (1, channels, *sides)
        return {"pixel_values": torch.linspace(-1, 1, prod(shape)).reshape(shape)}
    rows = vocabulary_size(published.config)
    if model.main_input_name != "input_ids" or rows is None:
        return None
    known = [index for index in (range(4) if ids is None else ids) if index < rows] or [0]
    inputs = {"input_ids": torch.tensor([known[:16]])}
    if any(task.reads_choices for task in TASKS if published.architecture.endswith(task.ending)):
        inputs["input_ids"] = inputs["input_ids"].repeat(1, 2, 1)  # (rows, choices, tokens)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
    return inputs


def _compare(published: CheckpointInfo, model_class: Any, inputs: Tensors, outputs: Tensors) -> None:
    """Raise NumericalError where a loaded model had other outputs than its class has with the published tensors.

    These are read one by one, without the library's reading of the folder. Both models do the same arithmetic, so
    nothing is tolerated.
    """
    with TensorReader() as reader:
        state = {name: reader.read(tensor) for name, tensor in published.tensors.items()}
    config = library_config(published.config, published.source)
    settings: dict[str, Any] = {"config": config, "dtype": "auto", "attn_implementation": "eager"}
    model = model_class.from_pretrained(None, state_dict=state, **settings)
    del state
    again = _outputs(published, model, inputs)
    if isinstance(again, EngineError):
        raise again
    for key, value in outputs.items():
        if not torch.equal(again[key], value):
            problem = f"the published {published.architecture} gives other {key} of a text or an image than its tensors"
            raise NumericalError(f"{problem}; nothing is published")


def _outputs(info: CheckpointInfo, model: Any, inputs: Tensors) -> Tensors | InvalidCheckpoint | NumericalError:
    """Return a model's floating point outputs, or an error where it does not run or they are not finite."""
    if model.dtype == torch.float16:  # CPUs lack operations in it, and values that a GPU keeps finite may overflow
        model = model.float()
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    try:
        with torch.inference_mode():
            given = model.eval()(**inputs)
    except Exception as error:  # a model's code may raise anything
        if is_out_of_memory(error):
            raise
        problem = f"the merge with its configuration does not run, though the models do: {in_one_line(error)}"
        return InvalidCheckpoint(info.source, problem)
    outputs = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()}
    for key, value in outputs.items():
        if not bool(value.isfinite().all()):
            return NumericalError(
                f"the merge's {key} of a text or an image are not finite, though those of the models are"
            )
    return outputs
