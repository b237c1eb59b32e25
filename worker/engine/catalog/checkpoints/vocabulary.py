"""Vocabularies that differ: which rows of each model's matrices are which token of the output.

A row of an embedding matrix, or of a language model's head, stands for a token. Where tokenizers number their tokens
differently, rows are merged by token.
"""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.headers import CheckpointInfo, TensorInfo, Tokenizer, read_tokenizer
from worker.engine.catalog.checkpoints.layouts import EMBEDDINGS, OUTPUT_EMBEDDINGS, ends_with, layer_of
from worker.engine.catalog.contracts.spec import Tokens
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint, InvalidRequest
from worker.engine.catalog.primitives.strict import did_you_mean

MAX_ROWS = 1_000_000  # of the output; the largest real vocabularies have 260,000 tokens
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
"""Those among them that tensors have too which know of no tokens."""
POSITIONS = re.compile(r"position|wpe")
TUNED_TOKENS = ("bos_token", "eos_token", "pad_token")
"""Special tokens that instruction tuning changes; to a decoder they are tokens like all others."""


def is_token_indexed(name: str, shape: Sequence[int], rows: int) -> bool:
    """Whether the tensor has a row for each token: an input embedding, or a language model's head.

    Args:
        rows: of the model's embedding matrix. A tensor of another number that goes by a name that others have too is
            none.
    """
    if layer_of(name) is not None or not ends_with(name, TOKEN_INDEXED):
        return False
    return tuple(shape[:1]) == (rows,) or not ends_with(name, COMMON_NAMES)


def check_rows(info: CheckpointInfo, tensor: TensorInfo) -> None:
    """Raises InvalidCheckpoint where a token-indexed tensor has not the rows that the configuration says."""
    rows = vocabulary_size(info.config)
    if tensor.shape[:1] != (rows,):
        problem = f"tensor {tensor.name} has shape {list(tensor.shape)}, config.json says vocab_size {rows}"
        raise InvalidCheckpoint(info.source, problem, tensor=tensor.name)


@dataclass(frozen=True)
class GivenRow:
    """The row of a token for models that lack it, and with `force` for all."""

    model: int | None
    """Position of the model whose row it is; None: the base's, or zeros."""
    row: int | None
    """The token's id there; None means zeros."""
    force: bool


@dataclass(frozen=True)
class TokenRows:
    """By row of the output, the row of the same token in each model and in the base; -1 where it has none."""

    models: tuple["array[int]", ...]
    base: "array[int] | None"
    given: Mapping[int, GivenRow] = field(default_factory=dict)
    """What a recipe says about single rows, by the row's number in the output."""
    padding: int = 0
    """How many of the last rows are the mean of all others."""

    def of(self, members: Sequence[int]) -> "TokenRows":
        """The rows for some of the models. Raises InvalidRequest if a row is to be that of another model."""
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
    tokens: Tokens

    def position(self, name: str, field: str) -> int:
        if name not in self.names:
            problem = f"there is no model '{name}'{did_you_mean(name, list(self.names))}"
            raise InvalidRequest(problem, field=f"output.{field}")
        return self.names.index(name)


@dataclass(frozen=True)
class NewToken:
    """A token that `union` appends. `entry` is that of `added_tokens`, for one that is found in text as it is."""

    content: str
    id: int
    entry: Mapping[str, Any] | None


@dataclass(frozen=True)
class Vocabulary:
    """The output's: that of `owner`, and new tokens after its last row."""

    owner: CheckpointInfo
    """The base, or the first model where there is none."""
    rows: int
    """Number of rows of the output's matrices, with those of no token."""
    tokens: int
    new: tuple[NewToken, ...]
    merges: tuple[tuple[str, str], ...]
    """Merges of a BPE by which new tokens are made; they follow the owner's."""
    token_rows: TokenRows
    shared: tuple[int, ...]
    """How many of the output's tokens each model has."""
    introduced: tuple[int, ...]
    """How many new tokens come from each model, as the first that has them."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A model's configuration, with the output's number of rows and the owner's ids of special tokens."""
        return _with_tokens(config, self.owner.config, self.rows)


def pads_differ(checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None) -> bool:
    """Whether all have the same tokens, and matrices of different numbers of rows that are enough for them: the rows
    beyond are padding."""
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
    """Whether two tokenizers, given as digests by form, have different tokens."""
    return all(ours[form] != theirs[form] for form in ours.keys() & theirs.keys())


ADDED = {"normalized": True}
"""Flags of a token that a recipe adds, as the library has them by default."""


def align_vocabularies(
    policy: Literal["union", "base"],
    checkpoints: Sequence[CheckpointInfo],
    base: CheckpointInfo | None,
    owner: CheckpointInfo | None = None,
    choices: Choices | None = None,
) -> Vocabulary:
    """The output's vocabulary, and where its tokens are in the models.

    The owner's rows stay where they are, also those of no token, which no other model has. `union` appends the other
    models' further tokens in the order of the models and of their ids.

    Args:
        owner: by default the base, or the first model where there is none.

    Raises:
        InvalidCheckpoint: a tokenizer has no ids to align by, or an id beyond its embedding matrix.
        IncompatibleCheckpoints: tokens of the two do not mean the same, or one tokenizer cannot have both's.
        InvalidRequest: a model or a token that `choices` name is not there.
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
    """The base's rows of the output's tokens; where it is the owner, its rows of no token too."""
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
    """(row, own row, length) of every stretch that is contiguous on both sides; what is -1 is left out."""
    start = 0
    while start < len(places):
        stop = start + 1
        while places[start] >= 0 and stop < len(places) and places[stop] == places[start] + stop - start:
            stop += 1
        if places[start] >= 0:
            yield start, places[start], stop - start
        start = stop


def check_names_tell_tokens(info: CheckpointInfo) -> None:
    """Of an architecture without a table, whose tensors are known by their names.

    Raises:
        InvalidCheckpoint: another tensor may have a value for each token, which would be merged with that of others.
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
    """Rows of the embedding matrix; None where the configuration does not say."""
    for part in (config, config.get("text_config")):
        rows = part.get("vocab_size") if isinstance(part, Mapping) else None
        if type(rows) is int and rows > 0:
            return rows
    return None


def token_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that follow from the vocabulary, inner keys after a dot; not the id of padding, from which positions may be
    counted."""
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
    """Whether tokens that are spelt the same are the same."""
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
    """Whether the owner's tokenizer can have the new tokens at their rows."""
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
