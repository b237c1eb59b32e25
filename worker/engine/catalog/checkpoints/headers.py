"""Reads a checkpoint's description (config, tensor names, dtypes, shapes) without reading a weight.

A checkpoint is a folder as `save_pretrained` writes it: `config.json`, and `model.safetensors` or
`model.safetensors.index.json` with its shards. See `adapters` for adapters. Nothing here unpickles or runs anything;
sizes are checked before anything is parsed.
"""

import errno
import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.architectures import architecture_of, use_of
from worker.engine.catalog.checkpoints.growth import check_growth
from worker.engine.catalog.checkpoints.library import decoded, kind_of
from worker.engine.catalog.checkpoints.pointers import POINTER, WHAT_TO_DO, is_pointer
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

MAX_HEADER_BYTES = 10_000_000  # the largest real models have headers of 1 to 2 MB
MAX_TENSORS = 100_000
MAX_RANK = 8  # axes of a tensor; the largest real one has 6
MAX_SIZE = 2**63 - 1  # largest length of an axis, and offset, that readers of the format can hold
MAX_NAME = 500  # characters of a tensor's name; the longest real ones have 150
MAX_DEPTH = 32  # lists and objects within each other; the deepest real ones, pipelines of tokenizers, have 10
MAX_DIGITS = 100  # digits of a number in JSON; the longest real one, model_max_length, has 31
MAX_KEYS = 300_000  # keys of all objects in a configuration: 100,000 labels by id and by name, and some more
MAX_KEY = 1000  # characters of a configuration's key; names of labels are keys too
MAX_CONFIG_BYTES = 5_000_000
MAX_TOKENIZER_BYTES = 50_000_000  # the largest real ones have 35 MB
MAX_MODULE_BYTES = 1_000_000_000  # weights of a sentence-transformers module; the largest real ones have 50 MB
MAX_TEMPLATE_BYTES = 1_000_000  # the largest real ones have 30 kB
MAX_DESCRIPTION_BYTES = 80_000_000  # all files beside the weights together
MAX_DESCRIPTION_FILES = 200
MAX_WEIGHT_FILES = 1000

TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
"""The system's error numbers when this process or the machine may open no more files."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "BF16", "F16")
# Data types of quantised weights, by the format's names.
QUANTISED = {"F8_E4M3": "float8", "F8_E5M2": "float8", "F8_E4M3FNUZ": "float8", "F8_E5M2FNUZ": "float8"}
QUANTISED |= {"F8_E8M0": "float8", "F6_E2M3": "float6", "F6_E3M2": "float6", "F4": "float4"}
QUANTISED |= dict.fromkeys(("U16", "U32", "U64"), "packed")
PACKED = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|absmax|quant_map|SCB|weight_scale|weight_scale_inv)(\.|$)")
"""Names of parts of quantised weights in GPTQ, AWQ, compressed-tensors and bitsandbytes."""
INTEGERS_THAT_PACK = ("I32", "I16", "I8", "U8")
SENTENCEPIECE = (
    "sentencepiece.bpe.model",
    "spm.model",
    "spiece.model",
    "tokenizer.model",
    "spm_char.model",
    "sentencepiece.model",
)
OLDER_VOCABULARIES = (
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    *SENTENCEPIECE,
    # Only single kinds of models have these: Marian, FSMT, Whisper, LUKE, RoCBert, GPT-NeoX Japanese, BARTpho,
    # ProphetNet.
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "normalizer.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "emoji.json",
    "dict.txt",
    "byte_maps.json",
    "prophetnet.tokenizer",
    "tekken.json",
)
"""Files with tokens that are read beside tokenizer.json, or instead of it."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *OLDER_VOCABULARIES)
VOCABULARIES = ("tokenizer.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", *SENTENCEPIECE)
"""Files that `vocabulary_of` reads."""
MAX_VOCABULARIES = 64  # number that is remembered, a few hundred bytes each
_vocabularies: dict[tuple[tuple[str, bytes], ...], tuple[Mapping[str, str], int | None]] = {}
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that say how images and sound become a model's inputs."""
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Chat templates of the tokenizer and, in older folders, of the processor."""
MORE_CHAT_TEMPLATES = re.compile(r"additional_chat_templates/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\.jinja")
COMPANIONS = (*CHAT_TEMPLATES, "generation_config.json", *PROCESSORS)
"""Files that are published beside the tokenizer, as further chat templates are, and not read here."""
MODULES = "modules.json"
ENCODER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that sentence-transformers has used for the settings of the transformer itself; it takes the first one."""
SENTENCE_FILES = (MODULES, "config_sentence_transformers.json", *ENCODER_CONFIGS)
"""Files of a sentence-transformers folder, besides the folders of its modules."""
MODULE_FILE = re.compile(r"[0-9]{1,2}_[A-Za-z0-9_]{1,64}/(config\.json|model\.safetensors)")
INNER_FOLDER = re.compile(r"additional_chat_templates|[0-9]{1,2}_[A-Za-z0-9_]{1,64}")
"""Names of sub-folders that may hold files of a checkpoint."""
SPECIAL_TOKENS = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
"""Keys of `tokenizer_config.json` and `special_tokens_map.json` whose values are several tokens."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")  # files of whole models


@dataclass(frozen=True)
class LowRank:
    """The update that an adapter adds to a matrix: `scaling * B A`, (outputs, inputs), or its transpose.

    The transpose is added where the matrix is stored as (inputs, outputs).
    """

    a: "TensorInfo"
    """The matrix A, (rank, inputs)."""
    b: "TensorInfo"
    """The matrix B, (outputs, rank)."""
    scaling: float
    transposed: bool
    """Whether the matrix is stored as (inputs, outputs), as embeddings and the layers of GPT-2 are."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: its place, data type and shape. `source` is its checkpoint's, for messages."""

    source: str
    name: str
    path: Path
    offset: int
    """Position of its first byte in the file."""
    dtype: str
    shape: tuple[int, ...]
    delta: LowRank | None = None
    """An adapter's update, which is added when the tensor is read."""

    @property
    def file(self) -> str:
        return self.path.name

    @property
    def nbytes(self) -> int:
        """Number of bytes that are read for the tensor."""
        own = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        return own if self.delta is None else own + self.delta.a.nbytes + self.delta.b.nbytes


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as its headers describe it. `source` is the name the user gave it, used in every message."""

    source: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    vocabulary: Mapping[str, str]
    """Digests of the rules that cut text into token ids, by the form they are stored in; empty without a tokenizer."""
    tokenizer_path: Path
    """Folder of the tokenizer's files."""
    base: "CheckpointInfo | None" = None
    """The model that an adapter adapts. Its tensors are among this checkpoint's, its files are not."""
    last_token: int | None = None
    """Highest id that the tokenizer gives; None where its files do not tell."""
    notes: tuple[str, ...] = ()
    """Notes for the result of a job that reads the checkpoint."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def architecture(self) -> str:
        return architecture_of(self.config)

    @property
    def weight_files(self) -> list[str]:
        """Names of the checkpoint's own weight files."""
        if self.base is not None:
            return [ADAPTER_WEIGHTS]
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's tokens, and the rules that must agree for the tokens of two tokenizers to mean the same."""

    kind: str
    """Type of the tokenizer's model: `BPE`, `WordPiece`, `Unigram` or `WordLevel`."""
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    """Added tokens, each with the entry of tokenizer.json's `added_tokens` that says how it is found in text."""
    merges: tuple[tuple[str, str], ...]
    """Pairs of pieces that a BPE merges, in order."""
    scores: Mapping[str, float]
    """Log probabilities of a Unigram's pieces."""
    special: Mapping[str, str]
    """Special tokens by role, such as `pad_token`; roles that no file names are missing."""
    affixes: tuple[str, str]
    """Prefix of a piece that continues a word, and suffix of one that ends it."""


def inspect_checkpoint(path: Path, source: str) -> CheckpointInfo:
    """Read config and headers of a whole model's checkpoint folder.

    Args:
        path: the folder; a view, see `views`, where the checkpoint comes from outside.

    Raises:
        InvalidCheckpoint: a file or tensor is refused; the message names it and says what to do.
    """
    with readable(source):
        return _inspect(path, source)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn the system's errors about files into InvalidCheckpoint."""
    try:
        yield
    except OSError as error:  # a name too long, links in a circle
        if error.errno in TOO_MANY_OPEN:
            raise
        raise InvalidCheckpoint(source, f"cannot be read: {error.strerror}") from error


def check_folder(path: Path, source: str) -> None:
    """Raise InvalidCheckpoint where there is no folder, and for a tokenizer that names code to run."""
    if not path.is_dir():
        raise InvalidCheckpoint(source, "not a folder; a checkpoint is a folder written by save_pretrained()")
    check_description(path, source)
    file = path / "tokenizer_config.json"
    if file.exists():
        refuse_code(file.name, read_json(file, source, MAX_CONFIG_BYTES), source)


def check_description(path: Path, source: str) -> None:
    """Check sizes and first bytes of the files beside the weights.

    Raises:
        InvalidCheckpoint: one is too large, all together are too large, or one is a Git LFS pointer.
    """
    names = described_files({*file_names(path)})
    sizes = {}
    for name in names:
        file = path / name
        if not file.is_file():
            continue
        sizes[name] = file.stat().st_size
        if sizes[name] > size_limit(name):
            raise InvalidCheckpoint(source, f"{name} is larger than {size_limit(name)} bytes", file=name)
        with file.open("rb") as stream:
            refuse_pointer(name, stream.read(len(POINTER)), source)
    whole = sum(size for name, size in sizes.items() if not name.endswith(WEIGHTS))
    if whole > MAX_DESCRIPTION_BYTES:
        problem = f"its files beside the weights have {whole} bytes; {MAX_DESCRIPTION_BYTES} are allowed"
        raise InvalidCheckpoint(source, problem)
    if MODULES in sizes:
        module_entries(path / MODULES, source)
    if len(sizes) > MAX_DESCRIPTION_FILES:
        problem = f"it has {len(sizes)} files beside the weights; {MAX_DESCRIPTION_FILES} are allowed"
        raise InvalidCheckpoint(source, problem)


def size_limit(name: str) -> int:
    """Return the number of bytes that a file beside the weights may have."""
    if name in ("tokenizer.json", *OLDER_VOCABULARIES):
        return MAX_TOKENIZER_BYTES
    if name.endswith(WEIGHTS):
        return MAX_MODULE_BYTES
    if name.endswith(".jinja"):
        return MAX_TEMPLATE_BYTES
    return MAX_HEADER_BYTES if name == INDEX else MAX_CONFIG_BYTES


def refuse_pointer(name: str, start: bytes, source: str) -> None:
    """Raise InvalidCheckpoint where a file begins as a Git LFS pointer does."""
    if is_pointer(start):
        raise InvalidCheckpoint(source, f"{name} is not there: {WHAT_TO_DO}", file=name)


def refuse_code(name: str, content: Mapping[str, Any], source: str) -> None:
    """Raise InvalidCheckpoint where a configuration names code to run."""
    if content.get("auto_map"):
        raise InvalidCheckpoint(
            source, f"{name} has auto_map, which would run code from the checkpoint; this service never does"
        )


def is_of_library(config: Mapping[str, Any]) -> bool:
    """Return whether transformers has the model's own class, so that code beside the checkpoint is not needed."""
    kind = kind_of(config.get("model_type", ""))
    name = architecture_of(config)
    return kind is not None and (not name or name in kind.architectures)


def without_code(config: dict[str, Any], source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a model's configuration without the code that it names, and a note where it named some.

    Raises:
        InvalidCheckpoint: it names code, and transformers has no class of its own in its place.
    """
    if not config.get("auto_map") or not is_of_library(config):
        refuse_code("config.json", config, source)
        return config, ()
    note = f"config.json of {source} has auto_map: its code was not run, the class is transformers' own"
    return {key: value for key, value in config.items() if key != "auto_map"}, (note,)


def _inspect(path: Path, source: str) -> CheckpointInfo:
    check_folder(path, source)
    if (path / ADAPTER_CONFIG).exists():
        raise InvalidCheckpoint(source, f"it is an adapter ({ADAPTER_CONFIG}); only the models of a merge may be")
    config = decoded(read_json(path / "config.json", source, MAX_CONFIG_BYTES))
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise InvalidCheckpoint(source, f"config.json has model_type {repr(kind)[:100]}, which is no text")
    config, notes = without_code(config, source)
    tensors: dict[str, TensorInfo] = {}
    files, indexed = _weight_files(path, source, config)
    for file_name in files:
        for tensor in read_header(path / file_name, source):
            if tensor.name in tensors:
                raise InvalidCheckpoint(
                    source, f"tensor {tensor.name} is in both {tensors[tensor.name].file} and {file_name}"
                )
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise InvalidCheckpoint(source, f"it has more than {MAX_TENSORS} tensors", file=file_name)
    for name, file_of in indexed.items():
        if name not in tensors:
            problem = f"{INDEX} says that tensor {name} is in {file_of}, and no weight file has it"
            raise InvalidCheckpoint(source, problem, tensor=name)
    if config.get("quantization_config") and not any(map(_may_be_packed, tensors.values())):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        notes += (f"config.json of {source} has a quantization_config though its weights are plain: it was left out",)
    vocabulary, last = vocabulary_of(path, source)
    return CheckpointInfo(source, path, config, tensors, vocabulary, path, last_token=last, notes=notes)


def is_packed(tensor: TensorInfo) -> bool:
    """Return whether a tensor is part of quantised weights: integers named as a weight, or their scales and so on."""
    return PACKED.search(tensor.name) is not None or (
        tensor.dtype not in FLOATS and (tensor.name == "weight" or tensor.name.endswith(".weight"))
    )


def _may_be_packed(tensor: TensorInfo) -> bool:
    """Return whether a tensor may be part of quantised weights, if a configuration says that there are some."""
    return is_packed(tensor) or tensor.dtype in INTEGERS_THAT_PACK


def read_header(file: Path, source: str) -> Iterable[TensorInfo]:
    """Read the tensors of one safetensors file, in the order of their bytes.

    The format: 8 bytes little-endian header length, the header as JSON without repeated keys, then the tensors' bytes
    without gaps (https://huggingface.co/docs/safetensors, *Format*).

    Raises:
        InvalidCheckpoint: header too large, malformed, or not matching the file's size.
    """
    name = file.name
    reads(source, name)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(len(POINTER))
            refuse_pointer(name, prefix, source)
            if len(prefix) < 8:
                raise InvalidCheckpoint(source, f"{name} is truncated: {size} bytes are no safetensors file", file=name)
            (header_bytes,) = struct.unpack_from("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise InvalidCheckpoint(
                    source, f"{name} announces a header of {header_bytes} bytes; {MAX_HEADER_BYTES} are allowed"
                )
            stream.seek(8)
            raw = stream.read(header_bytes)
    except OSError as error:
        raise InvalidCheckpoint(source, f"{name} cannot be read: {error.strerror}", file=name) from error
    if len(raw) < header_bytes:
        raise InvalidCheckpoint(source, f"{name} is truncated inside its header", file=name)
    try:
        header = parsed_json(raw, object_pairs_hook=_unrepeated)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.get("__metadata__")
        is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        if metadata is not None and not is_text:
            raise ValueError("its __metadata__ is no object of texts")
        data = 8 + header_bytes
        entries = [_tensor(source, file, data, key, entry) for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(source, f"{name} has a malformed header: {error}", file=name) from error
    if len(entries) > MAX_TENSORS:
        raise InvalidCheckpoint(source, f"{name} has {len(entries)} tensors; {MAX_TENSORS} are allowed", file=name)
    entries.sort(key=lambda item: item[1])
    position = 0
    for tensor, begin, end in entries:
        if begin != position or end - begin != tensor.nbytes:
            raise InvalidCheckpoint(
                source, f"{name}: tensor {tensor.name} has offsets [{begin}, {end}] that do not fit its shape and place"
            )
        position = end
    expected = 8 + header_bytes + position
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise InvalidCheckpoint(
            source,
            f"{name} is {state}: its header describes {expected} bytes, the file has {size}; copy it again",
            file=name,
        )
    return [tensor for tensor, _, _ in entries]


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object. Raises ValueError for a repeated key: readers differ in which of its values they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key '{name[:MAX_NAME]}' twice")
    return found


def _tensor(source: str, file: Path, data: int, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """Read one entry of a header. Raises ValueError for an entry that the format does not allow."""
    if not isinstance(entry, dict):
        raise ValueError(f"what it says of tensor {name[:MAX_NAME]} is no JSON object")
    if len(name) > MAX_NAME:
        raise ValueError(f"the name of tensor {name[:40]}… has {len(name)} characters; {MAX_NAME} are allowed")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise ValueError(f"tensor {name} has no {key}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {name} has a dtype that is no string")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has a shape that is no list, or data_offsets that are not a list of two")
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name} has {len(shape)} axes; {MAX_RANK} are allowed")
    if dtype in QUANTISED:
        kind = QUANTISED[dtype]
        problem = f"{file.name}: tensor {name} has dtype {dtype}; {kind} weights are quantised"
        raise InvalidCheckpoint(source, f"{problem}: merge the originals, then quantise", tensor=name)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has dtype {dtype[:20]}; supported are {', '.join(DTYPE_BYTES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):  # True is an instance of int
        raise ValueError(f"tensor {name} has a negative or non-integer shape or offset")
    if max(*shape, *offsets) > MAX_SIZE:
        raise ValueError(f"tensor {name} has a shape or an offset larger than {MAX_SIZE}")
    begin, end = offsets
    return TensorInfo(source, name, file, data + begin, dtype, tuple(shape)), begin, end


def checkpoint_state(info: CheckpointInfo) -> str:
    """Return a digest of the names, sizes and times of the checkpoint's own files, which changes when one is written.

    Raises:
        InvalidCheckpoint: a file is gone.
    """
    digest = hashlib.sha256()
    try:
        for name in (*described_files({*file_names(info.path)}), *info.weight_files):
            stat = (info.path / name).stat()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    except OSError as error:
        raise InvalidCheckpoint(info.source, f"{Path(error.filename).name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def described_files(names: Collection[str]) -> list[str]:
    """Return the files of a checkpoint beside its weights: configurations, tokenizer, templates, index.

    Args:
        names: names of files, relative to the checkpoint's folder, with `/` after a folder.
    """
    wanted = ("config.json", ADAPTER_CONFIG, *TOKENIZER_FILES, *COMPANIONS, *SENTENCE_FILES, INDEX)
    inner = (MORE_CHAT_TEMPLATES, MODULE_FILE) if MODULES in names else (MORE_CHAT_TEMPLATES,)
    return [
        *(name for name in wanted if name in names),
        *sorted(name for name in names if any(pattern.fullmatch(name) for pattern in inner)),
    ]


def file_names(folder: Path) -> Iterator[str]:
    """Yield the names in a checkpoint's folder; sub-folders that may hold its files are followed by their contents."""
    for entry in folder.iterdir():
        yield entry.name
        if INNER_FOLDER.fullmatch(entry.name) and entry.is_dir():
            yield from (f"{entry.name}/{inner.name}" for inner in entry.iterdir())


def weights_among(names: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """Return the weight files of a checkpoint whose files are `names`.

    The rule is that of transformers' `from_pretrained`: a single file takes precedence over an index and its shards.

    Args:
        read: returns the content of a file.
    """
    found = [name for name in (WEIGHTS, ADAPTER_WEIGHTS) if name in names]
    if WEIGHTS in found or INDEX not in names:
        return found
    try:
        files = sorted({str(file) for file in json.loads(read(INDEX))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return found  # `inspect_checkpoint` says what is wrong with it
    return [*found, *(file for file in files[:MAX_WEIGHT_FILES] if Path(file).name == file and file in names)]


def _weight_files(path: Path, source: str, config: Mapping[str, Any]) -> tuple[list[str], Mapping[str, object]]:
    """Return the names of the weight files, see `weights_among`, and each tensor's file according to the index."""
    if (path / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX, source, MAX_HEADER_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidCheckpoint(source, f"{INDEX} has no weight_map")
        files = sorted({str(file) for file in weight_map.values()})
        if len(files) > MAX_WEIGHT_FILES:
            raise InvalidCheckpoint(source, f"{INDEX} names {len(files)} files; {MAX_WEIGHT_FILES} are allowed")
        for file in files:
            if Path(file).name != file or not (path / file).is_file():
                raise InvalidCheckpoint(source, f"{INDEX} names {file}, which is not in the folder")
        return files, weight_map
    for pickle in PICKLES:
        if (path / pickle).exists():
            raise InvalidCheckpoint(
                source,
                f"{pickle} is there but no {WEIGHTS}; pickle files are not opened. Convert it where you trust it: "
                f'python -c "from transformers import {use_of(config).auto_class} as A; '
                "A.from_pretrained('IN').save_pretrained('OUT')\"",
            )
    raise InvalidCheckpoint(source, f"neither {WEIGHTS} nor {INDEX} is there")


def _read(file: Path, source: str, limit: int) -> bytes:
    reads(source, file.name)
    try:
        if file.stat().st_size > limit:
            raise InvalidCheckpoint(source, f"{file.name} is larger than {limit} bytes")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise InvalidCheckpoint(source, f"{file.name} is missing") from error
    except OSError as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read: {error.strerror}") from error


def parsed_json(raw: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON as UTF-8 without a byte order mark, as the libraries that load checkpoints do.

    Args:
        object_pairs_hook: as in `json.loads`.

    Raises:
        ValueError: it is no JSON, has nesting or numbers beyond anything real, or has half a surrogate pair, which no
            file could hold as UTF-8.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    content = json.loads(text, parse_int=_integer, object_pairs_hook=object_pairs_hook)
    for depth, _ in enumerate(_levels(content)):
        if depth == MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if b"\\u" in raw:  # only an escape can spell half a pair
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half a surrogate pair, which is no character") from error
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; {MAX_DIGITS} are allowed")
    return int(digits)


def _levels(content: Any) -> Iterator[list[Any]]:
    """Yield the objects and lists of a JSON value level by level, the outermost first."""
    level = [content] if isinstance(content, dict | list) else []
    while level:
        yield level
        inner = (value.values() if type(value) is dict else value for value in level)
        level = [value for values in inner for value in values if type(value) is dict or type(value) is list]


def _check_keys(content: Any) -> None:
    """Raise ValueError for more or longer keys than configurations have: each is compared and may be quoted."""
    count = 0
    for level in _levels(content):
        objects = [value for value in level if isinstance(value, dict)]
        count += sum(map(len, objects))
        if count > MAX_KEYS:
            raise ValueError(f"its objects have more than {MAX_KEYS} keys")
        longest = max((key for value in objects for key in value), key=len, default="")
        if len(longest) > MAX_KEY:
            raise ValueError(f"the key '{longest[:40]}…' has {len(longest)} characters; {MAX_KEY} are allowed")


def read_json(file: Path, source: str, limit: int) -> dict[str, Any]:
    """Read a JSON object. Raises InvalidCheckpoint when it is missing, larger than `limit` bytes or no JSON object."""
    try:
        content = parsed_json(_read(file, source, limit))
        if limit <= MAX_CONFIG_BYTES:  # vocabularies and indices have keys of their own
            _check_keys(content)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(source, f"{file.name} is not a JSON object")
    return content


def module_entries(file: Path, source: str) -> list[dict[str, Any]]:
    """Return the entries of a `modules.json`; `path` and `type` of each are text.

    Raises:
        InvalidCheckpoint: it is malformed, or the transformer lies in a sub-folder, as old versions saved it.
    """
    try:
        entries = parsed_json(_read(file, source, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InvalidCheckpoint(source, f"{file.name} is not a JSON list of modules")
    for entry in entries:
        texts = [entry.get(key) for key in ("path", "type")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidCheckpoint(source, f"{file.name} has an entry without a path and a type")
    folder = entries[0]["path"]
    if folder and entries[0]["type"].endswith("Transformer"):
        problem = f"{file.name} says that its transformer lies in the folder {folder[:100]!r}, as old versions had it"
        advice = "save it anew by SentenceTransformer('IN').save_pretrained('OUT')"
        raise InvalidCheckpoint(source, f"{problem}; {advice}", file=file.name)
    return entries


def read_tokenizer(info: CheckpointInfo) -> Tokenizer | None:
    """Read a tokenizer from the files of `CheckpointInfo.vocabulary`; None where no file has tokens with their ids.

    Raises:
        InvalidCheckpoint: a file is malformed.
    """
    path, source = info.tokenizer_path, info.source
    try:
        if (path / "tokenizer.json").exists():
            return _fast_tokenizer(path, source)
        return _slow_tokenizer(path, source)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InvalidCheckpoint(source, f"its tokenizer's files are malformed: {error}") from error


def _fast_tokenizer(path: Path, source: str) -> Tokenizer:
    content = read_json(path / "tokenizer.json", source, MAX_TOKENIZER_BYTES)
    model = content["model"]
    vocabulary, merges = model["vocab"], model.get("merges") or []
    by_kind = {isinstance(vocabulary, list): "Unigram", "merges" in model: "BPE"}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("tokenizer.json has a merge that is no pair")
    scores = {} if isinstance(vocabulary, dict) else {token: float(score) for token, score in vocabulary}
    known = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
    unknown = model.get("unk_token")
    kind = str(model.get("type") or by_kind.get(True, "WordPiece"))  # older files do not say
    absent = {"continuing_subword_prefix": "##"} if kind == "WordPiece" else {}
    affixes = [model.get(key, absent.get(key)) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    return Tokenizer(
        kind=kind,
        ids=_ids({**{token: entry["id"] for token, entry in added.items()}, **known}),
        added=added,
        merges=tuple((str(left), str(right)) for left, right in pairs),
        scores=scores,
        special={**({"unk_token": unknown} if isinstance(unknown, str) else {}), **_special_tokens(path, source)},
        affixes=(affixes[0] or "", affixes[1] or ""),
    )


def _slow_tokenizer(path: Path, source: str) -> Tokenizer | None:
    tokens = _tokens(path, source)
    if tokens is None:
        return None
    vocabulary, merges, added = tokens
    is_bpe = (path / "merges.txt").exists() and not (path / "vocab.txt").exists()
    return Tokenizer(
        kind="BPE" if is_bpe else "WordPiece",
        ids=_ids({**added, **vocabulary}),
        added={token: {"content": token} for token in added},
        merges=tuple((left, right) for left, right in (merge.split(" ") for merge in merges)),
        scores={},
        special=_special_tokens(path, source),
        affixes=("" if is_bpe else "##", ""),
    )


def _ids(ids: dict[Any, Any]) -> dict[str, int]:
    for token, index in ids.items():
        if not isinstance(token, str) or type(index) is not int or index < 0:
            raise ValueError(f"token {token!r} has the id {index!r}")
    return ids


def _special_tokens(path: Path, source: str) -> dict[str, str]:
    found = {}
    for file in (path / "special_tokens_map.json", path / "tokenizer_config.json"):
        content = read_json(file, source, MAX_CONFIG_BYTES) if file.exists() else {}
        for role in SPECIAL_TOKENS:
            token = content.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def vocabulary_of(path: Path, source: str) -> tuple[dict[str, str], int | None]:
    """Return the digests of a vocabulary by the form it is stored in, and its last id if the files tell it.

    The last id counts tokens that the files beside the vocabulary name and that it lacks, because tokenizers add them.
    The digest `tokens` is that of the pairs token → id, with a BPE's merges or a Unigram's scores; formatting and
    post-processing do not matter. The digest `sentencepiece` is that of the file, whose pieces have ids only once a
    tokenizer's class has shifted them. Models that are merged usually have the same tokenizer, so results are
    remembered by the bytes of the files.
    """
    names = [name for name in VOCABULARIES if (path / name).exists()]
    contents = {name: _read(path / name, source, size_limit(name)) for name in names}
    named = _named_tokens(path, source)
    key = (
        *((name, hashlib.sha256(content).digest()) for name, content in contents.items()),
        ("", hashlib.sha256(json.dumps(named).encode()).digest()),
    )
    if key not in _vocabularies:
        found = _vocabulary_of(path, source, contents, named)
        if len(_vocabularies) >= MAX_VOCABULARIES:
            del _vocabularies[next(iter(_vocabularies))]
        _vocabularies[key] = found
    forms, last = _vocabularies[key]
    return dict(forms), last


def _named_tokens(path: Path, source: str) -> list[str]:
    """Return the tokens that the files beside a vocabulary name, each once.

    As in transformers, `special_tokens_map.json` and `added_tokens.json` count if `tokenizer_config.json` does not list
    added tokens.
    """
    contents = {
        name: read_json(path / name, source, MAX_CONFIG_BYTES) if (path / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    config, older, added = contents.values()
    decoder = config.get("added_tokens_decoder")
    named: list[Any] = list(decoder.values()) if isinstance(decoder, dict) else []
    said = config
    if "added_tokens_decoder" not in config:
        said = {**config, **older}
        named += added
    named += (token for key, token in said.items() if key.endswith("_token"))
    for key in TOKEN_LISTS:
        tokens = said.get(key)
        named += tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return list(dict.fromkeys(text for text in texts if isinstance(text, str)))


def _vocabulary_of(
    path: Path, source: str, contents: Mapping[str, bytes], named: Collection[str]
) -> tuple[Mapping[str, str], int | None]:
    forms, last = {}, None
    tokens = _tokens(path, source)
    if tokens is not None:
        forms["tokens"] = json.dumps(tokens, sort_keys=True).encode()
        vocabulary, _, added = tokens
        known = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
        last = max((index for index in (*known.values(), *added.values()) if type(index) is int), default=None)
        if last is not None:
            last += sum(token not in known and token not in added for token in named)
    for name in SENTENCEPIECE:
        if name in contents:
            forms["sentencepiece"] = contents[name]
    return {form: hashlib.sha256(content).hexdigest() for form, content in forms.items()}, last


def _tokens(path: Path, source: str) -> list[Any] | None:
    """Return a value that is the same for the same tokens, whichever file they are in; None where there is no file."""
    if (path / "tokenizer.json").exists():
        content = read_json(path / "tokenizer.json", source, MAX_TOKENIZER_BYTES)
        model = content.get("model")
        # If a text is in the place of the vocabulary, the library takes it for the name of a file, and opens it.
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
            raise InvalidCheckpoint(source, "tokenizer.json has no vocabulary of its own")
        try:
            check_growth(content)
        except ValueError as error:
            problem = f"tokenizer.json is refused: {error}; use the tokenizer of the original model"
            raise InvalidCheckpoint(source, problem, file="tokenizer.json") from error
        merges = model.get("merges") or []
        if not isinstance(merges, list):
            raise InvalidCheckpoint(source, "tokenizer.json has merges that are no list")
        # A merge is a pair, or, in older files, text with a space between.
        merges = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in merges]
        return [model["vocab"], merges, _added(content.get("added_tokens"), model["vocab"], source)]
    added_file = path / "added_tokens.json"
    added = read_json(added_file, source, MAX_CONFIG_BYTES) if added_file.exists() else {}
    if (path / "vocab.txt").exists():
        vocabulary = {token: index for index, token in enumerate(_lines(path / "vocab.txt", source))}
        return [vocabulary, [], _beyond(vocabulary, added)]
    if (path / "vocab.json").exists():
        merges = _lines(path / "merges.txt", source) if (path / "merges.txt").exists() else []
        vocabulary = read_json(path / "vocab.json", source, MAX_TOKENIZER_BYTES)
        merges = [merge for merge in merges if merge and not merge.startswith("#version")]
        return [vocabulary, merges, _beyond(vocabulary, added)]
    return None


def _added(entries: Any, vocabulary: Any, source: str) -> dict[str, Any]:
    """Return the added tokens of tokenizer.json that its vocabulary, a mapping or a list of pieces, does not have."""
    try:
        known = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
        return _beyond(known, {entry["content"]: entry["id"] for entry in entries or ()})
    except (TypeError, KeyError, IndexError) as error:
        raise InvalidCheckpoint(source, "tokenizer.json has a malformed vocabulary or added_tokens") from error


def _beyond(vocabulary: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    return {token: index for token, index in added.items() if vocabulary.get(token) != index}


def _lines(file: Path, source: str) -> list[str]:
    try:
        text = _read(file, source, MAX_TOKENIZER_BYTES).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read as UTF-8: {error}") from error
    return text.removesuffix("\n").split("\n")  # splitlines() would take some tokens for the end of a line
