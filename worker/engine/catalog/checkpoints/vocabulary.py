"""Aligns vocabularies that differ: finds the rows of each model's matrices that belong to each token of the output.

A row of an embedding matrix, or of a language model's head, stands for a token. Where tokenizers number their tokens
differently, rows are merged by token.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.token_rows import GivenRow, NewToken, TokenRows
from worker.engine.catalog.checkpoints.token_tensors import matrix_rows, vocabulary_size
from worker.engine.catalog.checkpoints.tokenizer_files import Tokenizer, read_tokenizer
from worker.engine.catalog.checkpoints.vocabulary_checks import MAX_ROWS, check_room, check_same_kind, tokenizer_of
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidRequest
from worker.engine.catalog.primitives.strict import did_you_mean
from worker.engine.catalog.primitives.tokens import TokenSettings

ADDED = {"normalized": True}
"""Flags of a token that a recipe adds; they are the library's defaults."""


@dataclass(frozen=True)
class TokenChoices:
    """A recipe's settings of the output's tokens, with the names of the models."""

    names: Sequence[str]
    tokens: TokenSettings

    def position(self, name: str, field: str) -> int:
        if name not in self.names:
            problem = f"there is no model '{name}'{did_you_mean(name, list(self.names))}"
            raise InvalidRequest(problem, field=f"output.{field}")
        return self.names.index(name)


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


def align_vocabularies(
    policy: Literal["union", "base"],
    checkpoints: Sequence[CheckpointInfo],
    base: CheckpointInfo | None,
    owner: CheckpointInfo | None = None,
    choices: TokenChoices | None = None,
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
    tokens = _Tokens(owner, (choices.tokens.tokens or {}) if choices is not None else ())
    aligned = [tokens.align(info, adds=policy == "union") for info in checkpoints]
    multiple = choices.tokens.pad_to_multiple_of if choices is not None else None
    padding = -tokens.count % multiple if multiple else 0
    total = tokens.count + padding
    if total > MAX_ROWS:
        raise InvalidRequest(f"that would be {total} rows; {MAX_ROWS} are allowed", field="output.pad_to_multiple_of")
    # A token that came from a later model is in none before it.
    models = tuple(one.rows + array("i", [-1]) * (total - len(one.rows)) for one in aligned)
    of_base = None if base is None else tokens.rows_in(base, total)
    given = {} if choices is None else _given(choices, checkpoints, base, tokens.places)
    for place, token in ((place, token) for token, place in tokens.places.items() if place not in given):
        if place >= tokens.owned and all(own[place] < 0 for own in (*models, *([of_base] if of_base else []))):
            problem = f"no model has a row for the token {token!r}, which is added; give it a source"
            raise InvalidRequest(problem, field="output.tokens")
    return Vocabulary(
        owner,
        total,
        len(tokens.places),
        tuple(tokens.new),
        tokens.merges[len(tokens.of_owner.merges) :],
        TokenRows(models, of_base, given, padding),
        tuple(one.shared for one in aligned),
        tuple(one.introduced for one in aligned),
    )


class _Aligned(NamedTuple):
    """A model's part in the output's tokens."""

    rows: "array[int]"
    """Its row of each of the tokens that were known by then; -1 where it has none."""
    shared: int
    introduced: int


class _Tokens:
    """The output's tokens, which grow model by model: those of `owner`, those of a recipe, and then each model's.

    Raises:
        InvalidCheckpoint: the owner's tokenizer has no ids to align by, or nothing can be added to it.
    """

    def __init__(self, owner: CheckpointInfo, added: Iterable[str]) -> None:
        self.owner, self.of_owner, self.owned = owner, tokenizer_of(owner), matrix_rows(owner)
        self.places = dict(self.of_owner.ids)
        """Row of each token in the output."""
        self.new: list[NewToken] = []
        self.merges = self.of_owner.merges
        for token in added:
            self._add(token, ADDED)
        check_room(owner, self.of_owner, owner, self.owned, self.new)

    @property
    def count(self) -> int:
        """Number of rows so far: the owner's, and one for each new token."""
        return self.owned + len(self.new)

    def align(self, info: CheckpointInfo, *, adds: bool) -> _Aligned:
        """Find a model's rows of the tokens; with `adds`, its own tokens are added first. Raises as the caller does."""
        tokenizer = self.of_owner if info is self.owner else tokenizer_of(info)
        check_same_kind(self.owner, self.of_owner, info, tokenizer)
        first = self.merges if adds else self.of_owner.merges
        shorter, longer = sorted((first, tokenizer.merges), key=len)
        if longer[: len(shorter)] != shorter:
            problem = "their tokenizers merge characters in different orders (BPE), so their tokens are not the same"
            raise IncompatibleCheckpoints(self.owner.source, info.source, problem)
        before = len(self.new)
        if adds:
            self.merges = longer
            for token, _ in sorted(tokenizer.ids.items(), key=lambda item: item[1]):
                self._add(token, tokenizer.added.get(token))
            check_room(self.owner, self.of_owner, info, self.owned, self.new)
        shared = sum(token in self.places for token in tokenizer.ids)
        rows = array("i", range(self.owned)) if info is self.owner else self._rows(tokenizer, self.count)
        return _Aligned(rows, shared, len(self.new) - before)

    def rows_in(self, base: CheckpointInfo, total: int) -> "array[int]":
        """Return the base's rows of the output's tokens; if it is the owner, its rows of no token too."""
        if base is self.owner:
            return array("i", range(self.owned)) + array("i", [-1]) * (total - self.owned)
        tokenizer = tokenizer_of(base)
        check_same_kind(self.owner, self.of_owner, base, tokenizer)
        return self._rows(tokenizer, total)

    def _add(self, token: str, entry: Mapping[str, Any] | None) -> None:
        if token not in self.places:
            self.places[token] = self.count
            self.new.append(NewToken(token, self.places[token], entry))

    def _rows(self, tokenizer: Tokenizer, length: int) -> "array[int]":
        rows = array("i", [-1]) * length
        for token, index in tokenizer.ids.items():
            if token in self.places:
                rows[self.places[token]] = index
        return rows


def _given(
    choices: TokenChoices, checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None, places: Mapping[str, int]
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
        row = said.id if said.id is not None else tokenizer_of(info).ids.get(wanted)
        if row is None or row >= matrix_rows(info):
            name = f"token {wanted!r}" if said.id is None else f"row {said.id}"
            raise InvalidRequest(f"{info.source} has no {name}, which {token!r} is to have", field="output.tokens")
        found[places[token]] = GivenRow(model, row, said.force)
    return found


def _with_tokens(config: Mapping[str, Any], owner: Mapping[str, Any], rows: int) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    found |= {key: value for key, value in owner.items() if key.endswith("_token_id")}
    if "vocab_size" in found:
        found["vocab_size"] = rows
    inner, of_owner = config.get("text_config"), owner.get("text_config")
    if isinstance(inner, Mapping) and isinstance(of_owner, Mapping):
        found["text_config"] = _with_tokens(inner, of_owner, rows)
    return found
