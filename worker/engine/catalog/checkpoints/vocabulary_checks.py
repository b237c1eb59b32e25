"""Checks that tokens of two tokenizers mean the same, and that one tokenizer can have those of both."""

from collections.abc import Sequence

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.token_rows import NewToken
from worker.engine.catalog.checkpoints.token_tensors import matrix_rows
from worker.engine.catalog.checkpoints.tokenizer_files import Tokenizer, read_tokenizer
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint

MAX_ROWS = 1_000_000  # rows of the output; the largest real vocabularies have 260,000 tokens
KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
"""Kinds of tokenizers whose tokens are compared by their spelling."""
TUNED_TOKENS = ("bos_token", "eos_token", "pad_token")
"""Special tokens that instruction tuning changes; a decoder treats them like all other tokens."""


def tokenizer_of(info: CheckpointInfo) -> Tokenizer:
    """Return a model's tokenizer. Raises InvalidCheckpoint where its ids are not rows of the model's matrices."""
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
    rows, last = matrix_rows(info), max(tokenizer.ids.values(), default=0)
    if last >= rows:
        raise InvalidCheckpoint(info.source, f"its tokenizer has ids up to {last}, its embedding matrix {rows} rows")
    if rows > MAX_ROWS:
        raise InvalidCheckpoint(info.source, f"its embedding matrix has {rows} rows; {MAX_ROWS} are allowed")
    return tokenizer


def check_same_kind(owner: CheckpointInfo, of_owner: Tokenizer, info: CheckpointInfo, tokenizer: Tokenizer) -> None:
    """Raise IncompatibleCheckpoints where tokens of the same spelling may differ in meaning."""
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


def check_room(
    owner: CheckpointInfo, of_owner: Tokenizer, info: CheckpointInfo, rows: int, new: Sequence[NewToken]
) -> None:
    """Check that the owner's tokenizer can have the new tokens at their rows; `info` brought the last of them.

    Raises:
        InvalidCheckpoint: the owner has no file to which tokens can be added.
        IncompatibleCheckpoints: there are too many, or a Unigram tokenizer cannot use them.
    """
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
