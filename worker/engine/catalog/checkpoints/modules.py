"""Folders of sentence-transformers, whose `modules.json` lists the steps after the transformer, such as pooling.

Each module lies in a folder of its own with its settings, and its weights if it has any. The transformer itself lies in
the checkpoint's folder, as any other. https://sbert.net/docs/package_reference/sentence_transformer/modules.html
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.descriptions import module_entries
from worker.engine.catalog.checkpoints.files import ENCODER_CONFIGS, MODULES, WEIGHTS
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint

SENTENCE_CONFIG = "config_sentence_transformers.json"
SENTENCE_MODULES = "sentence_modules"
"""Name of the part of a running model that holds the modules after the transformer, by their folders."""
SAVE_ANEW = "save it anew by SentenceTransformer('IN').save_pretrained('OUT')"
MAX_MODULES = 20
FOLDER = re.compile(r"[0-9]{1,2}_[A-Za-z0-9_]{1,64}")
TYPE = re.compile(r"sentence_transformers(\.[a-z_]{1,40}){1,4}(\.[A-Za-z]{1,40})?\.(?P<kind>[A-Za-z]{1,40})")
WITHOUT_WEIGHTS = ("Pooling", "Normalize", "Dropout", "LogitScore", "SpladePooling", "MultiVectorMask")
WITH_WEIGHTS = ("Dense", "LayerNorm")
NEEDS_NO_CONFIG = ("Normalize", "Dropout")
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Older spellings of `pooling_mode`, in the order in which vectors are joined."""
ACTIVATION = re.compile(r"torch\.nn\.modules\.[a-z]{1,40}\.[A-Za-z0-9]{1,40}")
RUN_ACTIVATION = re.compile(r"torch\.nn\.modules\.(activation\.[A-Za-z0-9]{1,40}|linear\.Identity)")
"""Matches the activations that are run here."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Pooling": {"include_prompt": True},
    "Normalize": {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    "Dense": {
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
        "module_input_name": "sentence_embedding",
        "use_residual": False,
    },
}
ENCODER_KEYS = (
    "transformer_task", "modality_config", "module_output_name", "processing_kwargs", "unpad_inputs", "query_length",
    "document_length", "query_expansion", "max_seq_length", "do_lower_case",
)  # fmt: skip
"""Settings of the transformer itself that are published. Others control what is loaded from elsewhere, and how."""
COMPUTING = {"transformer_task": "feature-extraction", "do_lower_case": False}
"""Settings among these that change the computation, each with the value that a missing key stands for."""


@dataclass(frozen=True)
class Module:
    """One step after the transformer."""

    kind: str
    folder: str
    settings: Mapping[str, Any]
    """The module's settings in the newest spelling, with defaults."""
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Modules:
    """The modules that a checkpoint's `modules.json` lists, except the transformer."""

    info: CheckpointInfo
    path: Path
    """Folder of the files; for an adapter without `modules.json`, the folder of its base."""
    entries: tuple[Mapping[str, Any], ...]
    """Entries of modules.json, the transformer's first."""
    steps: tuple[Module, ...]
    unknown: str | None
    """Class of a module that cannot be published; if there is one, the others are not read."""
    encoder: Mapping[str, Any]
    """Settings of the transformer, such as the largest number of tokens of a text."""

    @property
    def files(self) -> dict[str, Path]:
        """Files that are published unchanged, by name."""
        names = [SENTENCE_CONFIG, *(f"{step.folder}/config.json" for step in self.steps)]
        return {name: self.path / name for name in names if (self.path / name).is_file()}


def read_modules(info: CheckpointInfo) -> Modules | None:
    """Read the modules of a checkpoint; None if it is not a folder of sentence-transformers.

    Raises:
        InvalidCheckpoint: a file is malformed or missing, or names a folder that is not a module's.
    """
    path, source = info.path, info.source
    if info.base is not None and not (path / MODULES).is_file():
        path = info.base.path
    if not (path / MODULES).is_file():
        return None
    entries = module_entries(path / MODULES, source)
    if len(entries) > MAX_MODULES:
        raise InvalidCheckpoint(source, f"{MODULES} lists {len(entries)} modules; {MAX_MODULES} are allowed")
    kinds = [TYPE.fullmatch(str(entry["type"])) for entry in entries]
    known = ("Transformer", *WITHOUT_WEIGHTS, *WITH_WEIGHTS)
    for entry, kind in zip(entries, kinds, strict=True):
        if kind is None or kind["kind"] not in known:
            return Modules(info, path, tuple(entries), (), str(entry["type"])[:200], {})
    steps = []
    for number, (entry, kind) in enumerate(zip(entries, kinds, strict=True)):
        name = kind["kind"] if kind else ""
        if (number == 0) != (name == "Transformer"):
            raise InvalidCheckpoint(source, f"{MODULES} has {name} in place {number}; its transformer comes first")
        if number > 0:
            steps.append(_module(name, entry["path"], path, source))
    folders = [step.folder for step in steps]
    if len({*folders}) < len(folders):
        raise InvalidCheckpoint(source, f"{MODULES} names one folder for two modules")
    return Modules(info, path, tuple(entries), tuple(steps), None, _encoder(path, source))


SIMILARITIES = ("cosine", "dot")
"""Names of the similarities by which embeddings are compared here; the first is the default."""
COMPUTED = ("Pooling", "Normalize", "Dropout", *WITH_WEIGHTS)
POOLING_MODES = frozenset(POOLING_FLAGS.values())
SENTENCE = "sentence_embedding"


@dataclass(frozen=True)
class Embedder:
    """How a folder of sentence-transformers makes embeddings of its transformer's outputs, and compares them."""

    steps: tuple[Module, ...]
    width: int
    """Width of an embedding."""
    similarity: str
    """One of `SIMILARITIES`."""
    max_tokens: int | None
    """Number of tokens of a text that are read; None: as many as the transformer and its tokenizer allow."""


def embedder_of(info: CheckpointInfo) -> Embedder | None:
    """Return how a checkpoint makes embeddings; None if it is no embedding model, or has a step that is not run here.

    Raises:
        InvalidCheckpoint: see `read_modules`.
    """
    modules = read_modules(info)
    if modules is None or modules.unknown or not all(starmap(_is_computed, enumerate(modules.steps))):
        return None
    file = modules.path / SENTENCE_CONFIG
    said = read_json(file, info.source, MAX_CONFIG_BYTES) if file.is_file() else {}
    similarity, most = said.get("similarity_fn_name") or SIMILARITIES[0], modules.encoder.get("max_seq_length")
    computing = all(modules.encoder.get(key, default) == default for key, default in COMPUTING.items())
    if similarity not in SIMILARITIES or said.get("default_prompt_name") or not computing or not modules.steps:
        return None
    width = modules.steps[0].settings["embedding_dimension"]
    width = width * len(modules.steps[0].settings["pooling_mode"]) if isinstance(width, int) else None
    for step in modules.steps:
        width = step.settings["out_features"] if step.kind == "Dense" else width
    if not isinstance(width, int) or width <= 0:
        return None
    return Embedder(modules.steps, width, similarity, most if isinstance(most, int) and most > 0 else None)


def _is_computed(number: int, step: Module) -> bool:
    """Return whether a step is run here: pooling first, and then steps that read and give the text's one vector."""
    settings = step.settings
    if (number == 0) != (step.kind == "Pooling") or step.kind not in COMPUTED:
        return False
    if step.kind == "Pooling":
        return settings["include_prompt"] is True and POOLING_MODES.issuperset(settings["pooling_mode"])
    if step.kind == "Dense" and not RUN_ACTIVATION.fullmatch(str(settings["activation_function"])):
        return False
    names = (settings.get("module_input_name") or SENTENCE, settings.get("module_output_name") or SENTENCE)
    return names == (SENTENCE, SENTENCE)


def _module(kind: str, folder: str, path: Path, source: str) -> Module:
    if not FOLDER.fullmatch(folder):
        raise InvalidCheckpoint(
            source, f"{MODULES} names the folder {folder[:100]!r}; modules lie in such as 1_Pooling"
        )
    file = path / folder / "config.json"
    if not file.is_file() and kind not in NEEDS_NO_CONFIG:
        raise InvalidCheckpoint(source, f"{folder}/config.json is missing; {SAVE_ANEW}")
    given = read_json(file, source, MAX_CONFIG_BYTES) if file.is_file() else {}
    settings = {**DEFAULTS.get(kind, {}), **given}
    if kind == "Pooling":
        settings = _pooling(settings)
    if kind == "Dense" and not ACTIVATION.fullmatch(str(settings["activation_function"])):
        problem = f"{folder}/config.json has an activation_function that is none of torch.nn.modules"
        raise InvalidCheckpoint(source, problem)
    return Module(kind, folder, settings, _weights(kind, folder, settings, path, source))


def _pooling(settings: dict[str, Any]) -> dict[str, Any]:
    older = {"word_embedding_dimension", *POOLING_FLAGS}
    modes = settings.get("pooling_mode") or [mode for key, mode in POOLING_FLAGS.items() if settings.get(key)] or "mean"
    return {
        **{key: value for key, value in settings.items() if key not in older},
        "embedding_dimension": settings.get("embedding_dimension", settings.get("word_embedding_dimension")),
        "pooling_mode": [modes] if isinstance(modes, str) else list(modes),
    }


def _weights(kind: str, folder: str, settings: Mapping[str, Any], path: Path, source: str) -> dict[str, TensorInfo]:
    if kind not in WITH_WEIGHTS:
        return {}
    file = path / folder / WEIGHTS
    if not file.is_file():
        raise InvalidCheckpoint(source, f"{folder}/{WEIGHTS} is missing, and pickle files are not opened; {SAVE_ANEW}")
    found = {tensor.name: tensor for tensor in read_header(file, source)}
    wanted: dict[str, tuple[Any, ...]]
    if kind == "LayerNorm":
        wanted = dict.fromkeys(("norm.weight", "norm.bias"), (settings.get("dimension"),))
    else:
        inputs, outputs = settings.get("in_features"), settings.get("out_features")
        wanted = {"linear.weight": (outputs, inputs)}
        if settings["bias"]:
            wanted["linear.bias"] = (outputs,)
        if settings["use_residual"] and inputs != outputs:
            wanted["residual.weight"] = (outputs, inputs)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if shapes != wanted:
        problem = f"{folder}/{WEIGHTS} has {_shown(shapes)}; by its config.json it would have {_shown(wanted)}"
        raise InvalidCheckpoint(source, problem)
    return found


def _shown(shapes: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{name[:100]} {list(shape)}" for name, shape in sorted(shapes.items())[:5]) or "no tensors"


def _encoder(path: Path, source: str) -> dict[str, Any]:
    file = next((path / name for name in ENCODER_CONFIGS if (path / name).is_file()), None)
    given = read_json(file, source, MAX_CONFIG_BYTES) if file else {}
    return {key: given[key] for key in ENCODER_KEYS if key in given}


def check_agree(first: Modules, other: Modules) -> None:
    """Raise IncompatibleCheckpoints if modules do different things with a transformer's output."""
    problem = None
    ours, theirs = [[step.kind for step in modules.steps] for modules in (first, other)]
    if ours != theirs:
        problem = f"{MODULES} lists other modules: {', '.join(ours) or 'none'}; {', '.join(theirs) or 'none'}"
    for one, two in zip(first.steps, other.steps, strict=False):
        for key in sorted(one.settings.keys() | two.settings.keys()) if problem is None else ():
            values = one.settings.get(key), two.settings.get(key)
            if values[0] != values[1]:
                problem = f"{key} of {one.kind} ({one.folder}/config.json) differs: {values[0]!r}, {values[1]!r}"
    for key, default in COMPUTING.items():
        values = first.encoder.get(key, default), other.encoder.get(key, default)
        if problem is None and values[0] != values[1]:
            problem = f"{key} of their transformers ({ENCODER_CONFIGS[0]}) differs: {values[0]!r}, {values[1]!r}"
    if problem is not None:
        problem = f"they are embedding models of sentence-transformers, and {problem[:400]}"
        raise IncompatibleCheckpoints(first.info.source, other.info.source, problem)
