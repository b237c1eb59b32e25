"""Aligns vocabularies that differ: finds the rows of each model's matrices that belong to each token of the output.

A row of an embedding matrix, or of a language model's head, stands for a token. Where tokenizers number their tokens
differently, rows are merged by token.
"""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.tensor_names import EMBEDDINGS, OUTPUT_EMBEDDINGS, ends_with, layer_of
from worker.engine.catalog.checkpoints.tokenizer_files import Tokenizer, read_tokenizer
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint, InvalidRequest
from worker.engine.catalog.primitives.strict import did_you_mean
from worker.engine.catalog.primitives.tokens import TokenSettings

MAX_ROWS = 1_000_000  # rows of the output; the largest real vocabularies have 260,000 tokens
KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
TOKEN_INDEXED = (
    *EMBEDDINGS,
    *OUTPUT_EMBEDDINGS,
    *(f"{name.removesuffix('.weight')}.bias" for name in OUTPUT_EMBEDDINGS),
    "cls.predictions.bias",
    "embed_tokens_per_layer.weight",
)
"""Ends of names of tensors with a row for each token."""
COMMON_NAMES = ("embeddings.weight", "decoder.weight", "decoder.bias", "proj_out.weight", "proj_out.bias")
"""Ends among them that other tensors have too, which have nothing to do with tokens."""
POSITIONS = re.compile(r"position|wpe")
TUNED_TOKENS = ("bos_token", "eos_token", "pad_token")
"""Special tokens that instruction tuning changes; a decoder treats them like all other tokens."""


def is_token_indexed(name: str, shape: Sequence[int], rows: int) -> bool:
    """Return whether the tensor has a row for each token: an input embedding, or a language model's head.

    Args:
        rows: number of rows of the model's embedding matrix. A tensor that has another number of rows and one of the
            `COMMON_NAMES` has no rows of tokens.
    """
    if layer_of(name) is not None or not ends_with(name, TOKEN_INDEXED):
        return False
    return tuple(shape[:1]) == (rows,) or not ends_with(name, COMMON_NAMES)


def check_rows(info: CheckpointInfo, tensor: TensorInfo) -> None:
    """Raise InvalidCheckpoint where a token-indexed tensor has another number of rows than the configuration says."""
    rows = vocabulary_size(info.config)
    if tensor.shape[:1] != (rows,):
        problem = f"tensor {tensor.name} has shape {list(tensor.shape)}, config.json says vocab_size {rows}"
        raise InvalidCheckpoint(info.source, problem, tensor=tensor.name)


@dataclass(frozen=True)
class GivenRow:
    """The row that a recipe gives a token in the models that lack it, or, with `force`, in all models."""

    model: int | None
    """Position of the model whose row it is; None: the base, or zeros."""
    row: int | None
    """Number of the row in that model; None: zeros."""
    force: bool


@dataclass(frozen=True)
class TokenRows:
    """Maps each row of the output to its token's row in each model and in the base; -1 where there is none."""

    models: tuple["array[int]", ...]
    base: "array[int] | None"
    given: Mapping[int, GivenRow] = field(default_factory=dict)
    """Rows that a recipe gives to single tokens, by the row's number in the output."""
    padding: int = 0
    """Number of last rows that are the mean of all others."""

    def of(self, members: Sequence[int]) -> "TokenRows":
        """Return the rows for some of the models. Raises InvalidRequest if a recipe takes a row from another model."""
        given = {}
        for place, one in self.given.items():
            if one.model is not None and one.model not in members:
                problem = "a token's row is to be that of a model that has no part in the first or the last slice"
                raise InvalidRequest(problem, field="output.tokens")
            given[place] = one if one.model is None else replace(one, model=members.index(one.model))
        return replace(self, models=tuple(self.models[member] for member in members), given=given)


@dataclass(frozen=True)
class Choices:
    """A recipe's settings of the output's tokens, with the names of the models."""

    names: Sequence[str]
    tokens: TokenSettings

    def position(self, name: str, field: str) -> int:
        if name not in self.names:
            problem = f"there is no model '{name}'{did_you_mean(name, list(self.names))}"
            raise InvalidRequest(problem, field=f"output.{field}")
        return self.names.index(name)


@dataclass(frozen=True)
class NewToken:
    """A token that `union` appends. If it is found in text as it is, `entry` is its entry of `added_tokens`."""

    content: str
    id: int
    entry: Mapping[str, Any] | None


@dataclass(frozen=True)
class Vocabulary:
    """The output's vocabulary: that of `owner`, with new tokens after its last row."""

    owner: CheckpointInfo
    """The base, or the first model where there is no base."""
    rows: int
    """Number of rows of the output's matrices, including rows of no token."""
    tokens: int
    new: tuple[NewToken, ...]
    merges: tuple[tuple[str, str], ...]
    """Pairs of pieces from which a BPE makes new tokens; they follow the owner's merges."""
    token_rows: TokenRows
    shared: tuple[int, ...]
    """Number of the output's tokens that each model has."""
    introduced: tuple[int, ...]
    """Number of new tokens that each model is the first to have."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's configuration with the output's number of rows and the owner's ids of special tokens."""
        return _with_tokens(config, self.owner.config, self.rows)


def pads_differ(checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None) -> bool:
    """Return whether all have the same tokens, but matrices with different numbers of padding rows after them."""
    everyone = [*checkpoints, *([base] if base else ())]
    rows = [vocabulary_size(info.config) for info in everyone]
    known = [row for row in rows if row is not None]
    if len(known) < len(rows) or len(set(known)) == 1:
        return False
    ours = everyone[0].vocabulary
    if any(not ours.keys() & (theirs := info.vocabulary).keys() or _differ(ours, theirs) for info in everyone):
        return False
    tokenizer = read_tokenizer(everyone[0])
    return tokenizer is not None and max(tokenizer.ids.values(), default=0) < min(known)


def _differ(ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Return whether two tokenizers, given as digests by form, have different tokens."""
    return all(ours[form] != theirs[form] for form in ours.keys() & theirs.keys())


ADDED = {"normalized": True}
"""Flags of a token that a recipe adds; they are the library's defaults."""


def align_vocabularies(
    policy: Literal["union", "base"],
    checkpoints: Sequence[CheckpointInfo],
    base: CheckpointInfo | None,
    owner: CheckpointInfo | None = None,
    choices: Choices | None = None,
) -> Vocabulary:
    """Find the output's vocabulary, and the rows of its tokens in the models.

    The owner's rows keep their numbers, also rows of no token, which no other model has. `union` appends the tokens
    that only other models have, in the order of the models and of their ids.

    Args:
        owner: the model whose vocabulary comes first; by default the base, or the first model where there is no base.

    Raises:
        InvalidCheckpoint: a tokenizer has no ids to align by, or an id beyond its embedding matrix.
        IncompatibleCheckpoints: tokens of two models do not mean the same, or one tokenizer cannot have all of them.
        InvalidRequest: there is no such model or token as `choices` name.
    """
    if choices is not None and choices.tokens.vocabulary_of is not None:
        owner = checkpoints[choices.position(choices.tokens.vocabulary_of, "vocabulary_of")]
    owner = owner or base or checkpoints[0]
    of_owner, rows = _tokenizer(owner), _matrix_rows(owner)
    places = dict(of_owner.ids)
    new: list[NewToken] = []
    for token in (choices.tokens.tokens or {}) if choices is not None else ():
        if token not in places:
            places[token] = rows + len(new)
            new.append(NewToken(token, places[token], ADDED))
    _check_room(owner, of_owner, owner, rows, new)
    merges = of_owner.merges
    maps, shared, introduced = [], [], []
    for info in checkpoints:
        tokenizer = of_owner if info is owner else _tokenizer(info)
        _check_same_kind(owner, of_owner, info, tokenizer)
        first = merges if policy == "union" else of_owner.merges
        longer, shorter = (tokenizer.merges, first) if len(tokenizer.merges) > len(first) else (first, tokenizer.merges)
        if longer[: len(shorter)] != shorter:
            problem = "their tokenizers merge characters in different orders (BPE), so their tokens are not the same"
            raise IncompatibleCheckpoints(owner.source, info.source, problem)
        before = len(new)
        if policy == "union":
            merges = longer
            for token, _ in sorted(tokenizer.ids.items(), key=lambda item: item[1]):
                if token not in places:
                    places[token] = rows + len(new)
                    new.append(NewToken(token, places[token], tokenizer.added.get(token)))
            _check_room(owner, of_owner, info, rows, new)
        introduced.append(len(new) - before)
        own = array("i", range(rows)) if info is owner else array("i", [-1]) * (rows + len(new))
        common = 0
        for token, index in tokenizer.ids.items():
            if token in places:
                common += 1
                if info is not owner:
                    own[places[token]] = index
        maps.append(own)
        shared.append(common)
    total = rows + len(new)
    multiple = choices.tokens.pad_to_multiple_of if choices is not None else None
    padding = -total % multiple if multiple else 0
    total += padding
    if total > MAX_ROWS:
        raise InvalidRequest(f"that would be {total} rows; {MAX_ROWS} are allowed", field="output.pad_to_multiple_of")
    # A token that came from a later model is in none before it.
    models = tuple(own + array("i", [-1]) * (total - len(own)) for own in maps)
    of_base = None
    if base is not None:
        of_base = _places_in(base, owner, of_owner, rows, places, total)
    given = {} if choices is None else _given(choices, checkpoints, base, places)
    for place, token in ((place, token) for token, place in places.items() if place not in given):
        if place >= rows and all(own[place] < 0 for own in (*models, *([of_base] if of_base else []))):
            problem = f"no model has a row for the token {token!r}, which is added; give it a source"
            raise InvalidRequest(problem, field="output.tokens")
    return Vocabulary(
        owner,
        total,
        len(places),
        tuple(new),
        merges[len(of_owner.merges) :],
        TokenRows(models, of_base, given, padding),
        tuple(shared),
        tuple(introduced),
    )


def _places_in(
    base: CheckpointInfo,
    owner: CheckpointInfo,
    of_owner: Tokenizer,
    rows: int,
    places: Mapping[str, int],
    total: int,
) -> "array[int]":
    """Return the base's rows of the output's tokens; if it is the owner, its rows of no token too."""
    if base is owner:
        return array("i", range(rows)) + array("i", [-1]) * (total - rows)
    tokenizer = _tokenizer(base)
    _check_same_kind(owner, of_owner, base, tokenizer)
    own = array("i", [-1]) * total
    for token, index in tokenizer.ids.items():
        if token in places:
            own[places[token]] = index
    return own


def _given(
    choices: Choices, checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None, places: Mapping[str, int]
) -> dict[int, GivenRow]:
    found = {}
    for token, said in (choices.tokens.tokens or {}).items():
        if said.source == "own":
            continue
        if said.source == "zero":
            found[places[token]] = GivenRow(None, None, said.force)
            continue
        model = None if said.model is None else choices.position(said.model, "tokens")
        info = base if model is None else checkpoints[model]
        if info is None:
            raise InvalidRequest("there is no base whose row a token could have", field="output.tokens")
        wanted = said.token if said.token is not None else token
        row = said.id if said.id is not None else _tokenizer(info).ids.get(wanted)
        if row is None or row >= _matrix_rows(info):
            name = f"token {wanted!r}" if said.id is None else f"row {said.id}"
            raise InvalidRequest(f"{info.source} has no {name}, which {token!r} is to have", field="output.tokens")
        found[places[token]] = GivenRow(model, row, said.force)
    return found


def runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, own row, length) of every stretch that is contiguous on both sides; entries of -1 are left out."""
    start = 0
    while start < len(places):
        stop = start + 1
        while places[start] >= 0 and stop < len(places) and places[stop] == places[start] + stop - start:
            stop += 1
        if places[start] >= 0:
            yield start, places[start], stop - start
        start = stop


def check_names_tell_tokens(info: CheckpointInfo) -> None:
    """Check an architecture without a table, whose token-indexed tensors are only known by their names.

    Raises:
        InvalidCheckpoint: another tensor may have a value for each token, which would be merged with other tokens'.
    """
    rows = vocabulary_size(info.config)
    for tensor in info.tensors.values():
        name, shape = tensor.name, list(tensor.shape)
        if rows is None or rows not in shape or is_token_indexed(name, shape, rows):
            continue
        if layer_of(name) is not None or POSITIONS.search(name):
            continue
        problem = f"tensor {name} of shape {shape} seems to have a value for each of {rows} tokens, by an unknown name"
        raise InvalidCheckpoint(info.source, f"{problem}; its vocabulary must be that of the others", tensor=name)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the embedding matrix; None where the configuration does not say."""
    for part in (config, config.get("text_config")):
        rows = part.get("vocab_size") if isinstance(part, Mapping) else None
        if type(rows) is int and rows > 0:
            return rows
    return None


def token_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that follow from the vocabulary, with inner keys after a dot.

    The id of padding is not among them, because positions may be counted from it.
    """
    for key in config:
        if key == "vocab_size" or (key.endswith("_token_id") and key != "pad_token_id"):
            yield key
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        yield from (f"text_config.{key}" for key in token_keys(inner))


def _with_tokens(config: Mapping[str, Any], owner: Mapping[str, Any], rows: int) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    found |= {key: value for key, value in owner.items() if key.endswith("_token_id")}
    if "vocab_size" in found:
        found["vocab_size"] = rows
    inner, of_owner = config.get("text_config"), owner.get("text_config")
    if isinstance(inner, Mapping) and isinstance(of_owner, Mapping):
        found["text_config"] = _with_tokens(inner, of_owner, rows)
    return found


def _matrix_rows(info: CheckpointInfo) -> int:
    rows = vocabulary_size(info.config)
    if rows is None:
        raise InvalidCheckpoint(info.source, "config.json has no usable vocab_size")
    for tensor in info.tensors.values():
        if is_token_indexed(tensor.name, tensor.shape, rows):
            check_rows(info, tensor)
    return rows


def _tokenizer(info: CheckpointInfo) -> Tokenizer:
    tokenizer = read_tokenizer(info)
    if tokenizer is None:
        problem = (
            "output.vocabulary needs its tokens' ids, and neither tokenizer.json, vocab.txt nor vocab.json is there; "
            "save the tokenizer by AutoTokenizer.from_pretrained('IN').save_pretrained('OUT')"
        )
        raise InvalidCheckpoint(info.source, problem)
    if tokenizer.kind not in KINDS:
        problem = f"its tokenizer is of kind '{tokenizer.kind}'; output.vocabulary takes {', '.join(KINDS)}"
        raise InvalidCheckpoint(info.source, problem)
    rows, last = _matrix_rows(info), max(tokenizer.ids.values(), default=0)
    if last >= rows:
        raise InvalidCheckpoint(info.source, f"its tokenizer has ids up to {last}, its embedding matrix {rows} rows")
    if rows > MAX_ROWS:
        raise InvalidCheckpoint(info.source, f"its embedding matrix has {rows} rows; {MAX_ROWS} are allowed")
    return tokenizer


def _check_same_kind(owner: CheckpointInfo, of_owner: Tokenizer, info: CheckpointInfo, tokenizer: Tokenizer) -> None:
    """Check that tokens that are spelt the same are the same."""
    problem = None
    if tokenizer.kind != of_owner.kind:
        problem = f"their tokenizers are of different kinds: {of_owner.kind}, {tokenizer.kind}"
    elif tokenizer.affixes != of_owner.affixes:
        problem = f"their tokenizers mark pieces of words differently: {of_owner.affixes}, {tokenizer.affixes}"
    is_decoder = use_of(owner.config).pipeline_tag == "text-generation"
    for role, ours in of_owner.special.items():
        if is_decoder and role in TUNED_TOKENS:
            continue
        theirs = tokenizer.special.get(role, ours)
        if ours != theirs:
            problem = f"{role} differs: {ours!r}, {theirs!r}"
    unlike = (piece for piece, score in of_owner.scores.items() if tokenizer.scores.get(piece, score) != score)
    piece = next(unlike, None)
    if piece is not None:
        problem = f"their tokenizers (Unigram) give the piece {piece!r} different scores, so they cut text differently"
    if problem:
        raise IncompatibleCheckpoints(owner.source, info.source, problem)


def _check_room(
    owner: CheckpointInfo, of_owner: Tokenizer, info: CheckpointInfo, rows: int, new: Sequence[NewToken]
) -> None:
    """Check that the owner's tokenizer can have the new tokens at their rows."""
    if not new:
        return
    if not (owner.tokenizer_path / "tokenizer.json").exists():
        problem = "output.vocabulary 'union' adds to its tokenizer.json, which is not there; save the tokenizer again"
        raise InvalidCheckpoint(owner.source, problem)
    if rows + len(new) > MAX_ROWS:
        problem = f"the union of their vocabularies has more than {MAX_ROWS} rows; use output.vocabulary 'base'"
        raise IncompatibleCheckpoints(owner.source, info.source, problem)
    if of_owner.kind != "Unigram":
        return
    pieces = [token.content for token in new if token.entry is None]
    if pieces:
        problem = (
            f"the second has pieces (Unigram) that the first lacks, as {pieces[0]!r}, and no score tells their use"
        )
    elif rows != len(of_owner.ids):  # the library numbers the added tokens of such a tokenizer, without gaps
        problem = f"the first has {len(of_owner.ids)} tokens and {rows} rows; new tokens would not be at the rows' end"
    else:
        return
    raise IncompatibleCheckpoints(owner.source, info.source, f"{problem}; use output.vocabulary 'base'")
