"""Plans merges: whatever can be refused is refused here, before a byte of weights is read."""

from collections.abc import Sequence
from dataclasses import replace

from worker.engine.catalog.checkpoints import layouts
from worker.engine.catalog.checkpoints.headers import CheckpointInfo
from worker.engine.catalog.checkpoints.identity import check_tensors, identify
from worker.engine.catalog.checkpoints.settings import check_settings
from worker.engine.catalog.checkpoints.vocabulary import Choices, pads_differ, vocabulary_size
from worker.engine.catalog.contracts.spec import Dtype, Heads, VocabularyPolicy
from worker.engine.catalog.planning.by_name import planned_by_name
from worker.engine.catalog.planning.by_table import planned_by_table, table_of
from worker.engine.catalog.planning.comparing import Asked
from worker.engine.catalog.planning.plan import MergePlan, named
from worker.engine.catalog.primitives.errors import InvalidRequest


def plan_merge(
    checkpoints: Sequence[CheckpointInfo],
    dtype: Dtype = "auto",
    base: CheckpointInfo | None = None,
    heads: Heads | None = None,
    vocabulary: VocabularyPolicy = "error",
    config_from: CheckpointInfo | None = None,
    choices: Choices | None = None,
) -> MergePlan:
    """Check that the checkpoints fit each other, and their ancestor `base`, and lay out the merge.

    Args:
        heads: whether each model keeps its own; by default it does where a table tells heads from the backbone.
        vocabulary: of the output, where the tokenizers differ; `error` refuses that.
        config_from: the one of them whose configuration and tokenizer are published; None: the first's, and models
            that differ in settings that no shape shows are refused.
        choices: what a recipe says of single tokens.

    Raises:
        InvalidRequest: heads cannot be kept.
        InvalidCheckpoint: a tensor that no rule of the architecture's table owns, a size that contradicts the config.
        IncompatibleCheckpoints: names the tensor or setting that differs, with both values.
    """
    identities = [identify(info) for info in checkpoints]
    if base is not None and config_from is base:
        check_settings(base)
    whose = next((i.info for i, info in zip(identities, checkpoints, strict=True) if info is config_from), config_from)
    checkpoints = [identity.info for identity in identities]
    first = checkpoints[0]
    tables = [table_of(info) for info in checkpoints]
    for info in checkpoints[1:]:
        layouts.check_architectures(first, info)
    notes = list(dict.fromkeys(note for identity in identities for note in identity.notes))
    owner = None
    if vocabulary == "error" and pads_differ(checkpoints, base):
        vocabulary, owner = "base", whose or first
        notes.append(_note_of_padding(checkpoints, base, owner))
    asked = Asked(dtype, base, heads == "merged", vocabulary, whose, choices, owner)
    if tables[0] is None:
        if heads == "per_model":
            problem = f"no table tells the head of {named(first)} from the rest: all tensors are merged"
            raise InvalidRequest(f"{problem}; leave output.heads out, or say merged", field="output.heads")
        plan = planned_by_name(identities, asked)
    else:
        plan = planned_by_table(tables[0], identities, asked)
    for identity in identities:
        check_tensors(identity)
    return replace(plan, notes=(*notes, *plan.notes))


def _note_of_padding(checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None, owner: CheckpointInfo) -> str:
    rows = {info.source: vocabulary_size(info.config) for info in (*checkpoints, *([base] if base else ()))}
    listed = ", ".join(f"{count} in {source}" for source, count in rows.items())
    return (
        f"embedding matrices have different numbers of rows for the same tokens ({listed}): those beyond the tokens "
        f"are padding, and the merge has the rows of {owner.source}"
    )
