"""Checks whether settings and vocabularies of checkpoints fit each other, and whose settings a request lets count."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from worker.engine.catalog.checkpoints import config_differences
from worker.engine.catalog.checkpoints.architectures import WITHOUT_HEAD, labels_of, use_of
from worker.engine.catalog.checkpoints.config_differences import STRUCTURAL, differences, short, shows_in_no_shape
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import completed, value_at
from worker.engine.catalog.checkpoints.tensor_names import HEADS, ends_with
from worker.engine.catalog.checkpoints.token_tensors import vocabulary_size
from worker.engine.catalog.checkpoints.vocabulary import TokenChoices, Vocabulary, align_vocabularies
from worker.engine.catalog.contracts.spec import Dtype, VocabularyPolicy
from worker.engine.catalog.families import Family
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints
from worker.engine.catalog.primitives.notes import Doubt

VOCABULARY_ADVICE = "output.vocabulary 'base' or 'union' merges them token by token"


@dataclass(frozen=True)
class MergeSettings:
    """The settings of a merge in a request, besides its models."""

    dtype: Dtype
    base: CheckpointInfo | None
    merges_heads: bool
    vocabulary: VocabularyPolicy
    config_from: CheckpointInfo | None
    choices: TokenChoices | None
    rows_of: CheckpointInfo | None = None
    """The model whose number of rows the output has, if only the padding of matrices differs."""

    def aligned(self, checkpoints: Sequence[CheckpointInfo]) -> Vocabulary | None:
        if self.vocabulary == "error":
            return None
        return align_vocabularies(self.vocabulary, checkpoints, self.base, self.rows_of, self.choices)


def check_vocabulary_size(first: CheckpointInfo, info: CheckpointInfo) -> None:
    """Raise IncompatibleCheckpoints where both configurations say a number of tokens, and another one."""
    ours, theirs = vocabulary_size(first.config), vocabulary_size(info.config)
    if None not in (ours, theirs) and ours != theirs:
        problem = f"vocab_size differs: {ours!r}, {theirs!r}; {VOCABULARY_ADVICE}"
        raise IncompatibleCheckpoints(first.source, info.source, problem)


def check_vocabulary(first: CheckpointInfo, info: CheckpointInfo, advice: str = VOCABULARY_ADVICE) -> None:
    """Raise IncompatibleCheckpoints where two tokenizers have different tokens, or different ids of them."""
    if not first.vocabulary and not info.vocabulary:  # models of images
        return
    common = first.vocabulary.keys() & info.vocabulary.keys()
    if not common:
        problem = "their tokenizers are stored in different forms; save both as tokenizer.json, by save_pretrained()"
        raise IncompatibleCheckpoints(first.source, info.source, problem)
    if all(first.vocabulary[form] != info.vocabulary[form] for form in common):
        problem = f"their tokenizers have different vocabularies; {advice}"
        raise IncompatibleCheckpoints(first.source, info.source, problem)


def differences_from_base(
    first: CheckpointInfo,
    base: CheckpointInfo,
    family: Family | None,
    asked: MergeSettings,
    notes: list[str],
    besides: Collection[str] = (),
) -> set[str]:
    """Return the settings in which the base differs, if its settings count.

    A base is never run, so that settings which only matter in a running model are noted.

    Raises:
        IncompatibleCheckpoints: a size differs, or another setting that says what tensors are for.
    """
    found = set()
    compared = {*family.config_names.values(), *family.settings} - {family.padding_position} if family else None
    for key, ours, theirs in differences(completed(first.config), completed(base.config)):
        if key in besides or key.endswith("_token_id") or key in STRUCTURAL:
            continue
        if compared is not None and key not in compared:
            continue
        if not shows_in_no_shape(key, ours, theirs):
            problem = f"{key} differs in config.json: {short(ours)}, {short(theirs)}"
            raise IncompatibleCheckpoints(first.source, base.source, problem)
        found.add(key)
        if asked.config_from is not base:
            values = f"{short(ours)} in the models, {short(theirs)} in {base.source}"
            notes.append(f"{key} differs from the base's: {values}; the base is not run, so that of the models counts")
    return found if asked.config_from is base else set()


def with_settings_of(
    info: CheckpointInfo, whose: CheckpointInfo | None, besides: Collection[str] = ()
) -> CheckpointInfo:
    """Return a checkpoint as it is published if another one's settings count."""
    if whose is None:
        return info
    return replace(info, config=config_differences.with_settings_of(info.config, whose.config, besides))


def notes_of_settings(
    everyone: Sequence[CheckpointInfo], keys: Collection[str], whose: CheckpointInfo | None
) -> list[str]:
    """Return notes of settings that differ and change what a model computes, with the values of all."""
    if whose is None:
        return []
    notes = []
    for key in sorted(keys):
        values = {info.source: short(value_at(completed(info.config), key)) for info in everyone}
        listed = ", ".join(f"{value} in {source}" for source, value in values.items())
        notes.append(f"{key} differs: {listed}; that of {whose.source} counts, whose configuration is published")
    return notes


def notes_of_heads(base: CheckpointInfo, alone: Sequence[str]) -> list[str]:
    """Note the tensors that the base lacks, so that they have no task vector."""
    if not alone:
        return []
    return [f"{base.source} has no {first_tensor(alone)} to compare with: it was averaged by the models' weights"]


def doubts_of_heads(checkpoints: Sequence[CheckpointInfo]) -> list[Doubt]:
    """Doubt that heads that become one are of one task, if they classify and have only the library's names of labels.

    Raises:
        IncompatibleCheckpoints: their configurations say that they are of different tasks.
    """
    first, *others = checkpoints
    labels = labels_of(first.config)
    are_named = any(name != f"LABEL_{index}" for index, name in labels.items())
    if not others or are_named or not all(map(_has_classifier, checkpoints)):
        return []
    for key in ("problem_type", "finetuning_task"):
        for info in others:
            ours, theirs = first.config.get(key), info.config.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                problem = f"their heads have no names of labels, and {key} differs: {short(ours)}, {short(theirs)}"
                advice = "one head cannot be of both; give both the same id2label if they are of one task"
                raise IncompatibleCheckpoints(first.source, info.source, f"{problem}; {advice}")
    shown = ", ".join(labels.values())[:100]
    sources = ", ".join(info.source for info in checkpoints)
    return [
        Doubt(
            f"the heads of {sources} are merged into one, and nothing says that they are of one task: their labels "
            f"have no names of their own ({shown}). If they are not, the merged head means nothing"
        )
    ]


def _has_classifier(info: CheckpointInfo) -> bool:
    """Return whether a head gives labels: by its class or, if that tells nothing, by the names of tensors."""
    use = use_of(info.config)
    tells_nothing = use.auto_class == WITHOUT_HEAD
    return use.has_labels or (tells_nothing and any(ends_with(name, HEADS) for name in info.tensors))


def first_tensor(names: Sequence[str]) -> str:
    """Name the first of some tensors in a message, and say how many more there are."""
    more = f" (like {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"
