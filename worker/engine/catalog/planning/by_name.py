"""Plans a merge of tensors of the same name: of architectures without a table, and of models whose heads merge."""

from collections.abc import Sequence
from dataclasses import replace

from worker.engine.catalog.checkpoints.config_differences import check_architectures, check_configs
from worker.engine.catalog.checkpoints.identity import Identity, check_present, check_tensors
from worker.engine.catalog.checkpoints.info import FLOATS, TensorInfo
from worker.engine.catalog.checkpoints.tensor_names import (
    HEADS,
    OUTPUT_EMBEDDINGS,
    ends_with,
    is_buffer,
    layer_of,
    own_name,
    place_of,
    slot_of,
    stacks_of,
    tensors_by_name,
)
from worker.engine.catalog.checkpoints.tied import tied_in_base, without_copies
from worker.engine.catalog.checkpoints.token_tensors import check_names_tell_tokens, token_keys
from worker.engine.catalog.checkpoints.weights import check_checkpoint, check_weights
from worker.engine.catalog.families import Family, Slot
from worker.engine.catalog.planning.comparing import (
    MergeSettings,
    check_vocabulary,
    check_vocabulary_size,
    differences_from_base,
    doubts_of_heads,
    first_tensor,
    notes_of_heads,
    notes_of_settings,
    with_settings_of,
)
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.planning.tensors import check_shape, merged_tensor
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.tasks import task_of


def planned_by_name(identities: Sequence[Identity], asked: MergeSettings, family: Family | None = None) -> MergePlan:
    """Plan to merge tensors of the same name; buffers are copied, and copies of tied weights left out.

    Args:
        family: the table that says which nodes own slices of a tensor; None if there is none.

    Raises:
        InvalidCheckpoint: a checkpoint is not whole, or a table of its family does not know one of its tensors.
        IncompatibleCheckpoints: a tensor or setting differs; the message names it and both values.
    """
    checkpoints, base, vocabulary = [identity.info for identity in identities], asked.base, asked.vocabulary
    first, notes, differing = checkpoints[0], list[str](), set[str]()
    everyone = [*checkpoints, *([base] if base else ())]
    if base is not None and base.model_type != first.model_type:
        check_architectures(first, base)
    for identity in identities:
        if identity.known is None or identity.known.converted:  # for others, `check_tensors` knows better
            check_checkpoint(identity.info)
        else:
            check_present(identity)
    for info in everyone:
        check_weights(info)
        besides: set[str] = set()
        if vocabulary == "error":
            check_vocabulary_size(first, info)
            if first.vocabulary and info.vocabulary:
                check_vocabulary(first, info)
        else:
            check_names_tell_tokens(info)
            besides = {*token_keys(first.config), *token_keys(info.config)}
        if base is not None and info is base:
            differing |= differences_from_base(first, info, None, asked, notes, besides)
        else:
            differing |= {*check_configs(first, info, besides, settles=asked.config_from is not None)}
    aligned = asked.aligned(checkpoints)
    read = [
        replace(i.info, tensors={n: t for n, t in i.info.tensors.items() if n not in i.leftovers}) for i in identities
    ]
    states = [tensors_by_name(info, read[0]) for info in (*read, *([base] if base else ()))]
    own, tied = without_copies(identities[0], states, len(checkpoints))
    versions, ancestor = own[: len(checkpoints)], own[-1] if base else {}
    notes += _left_out_unread(identities, versions)
    stacks = stacks_of(versions[0])
    backbone, alone = [], []
    for name, tensor in versions[0].items():
        slot, place = _slot_of(identities[0], name, family), place_of(name, stacks, identities[0].known)
        if is_buffer(tensor, identities[0].known):
            for info, other in zip(everyone, own, strict=True):
                if name in other:
                    check_shape(first, tensor, info, other[name])
            source = ancestor.get(name, tensor)
            backbone.append(PlannedTensor(slot, place, tensor.shape, source.dtype, (source,), is_copied=True))
            continue
        origin = None
        if base is not None:
            found = ancestor.get(name) or tied_in_base(identities[0], name, base.config, ancestor)
            if _is_head(identities[0], name) and (found is None or found.shape[1:] != tensor.shape[1:]):
                alone.append(name)
            else:
                origin = (base, found)
        backbone.append(merged_tensor(slot, place, checkpoints, versions, name, origin, asked.dtype, aligned))
    for info, state in zip(checkpoints, versions, strict=True):
        for name, tensor in state.items():
            if name not in versions[0] and not is_buffer(replace(tensor, name=name), identities[0].known):
                raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is in the second only")
    if not any(t.dtype in FLOATS for t in backbone):
        raise InvalidCheckpoint(first.source, "it has no tensor of floats to merge")
    if base is not None:
        notes += notes_of_heads(base, alone)
    notes += doubts_of_heads(checkpoints)
    more = notes_of_settings(everyone, differing, asked.config_from)
    published = (with_settings_of(first, asked.config_from),)
    return MergePlan(
        family,
        tuple(checkpoints),
        base,
        tuple(None if family is None else task_of(info) for info in checkpoints),
        tuple(backbone),
        ((),),
        published,
        tuple(tied),
        aligned,
        asked.config_from,
        notes=(*notes, *more),
    )


def _slot_of(first: Identity, name: str, family: Family | None) -> Slot:
    """Return the slot of a tensor in the table. Raises InvalidCheckpoint where the table has none for it."""
    if family is None or name in first.unread or is_buffer(first.info.tensors[name], first.known):
        return slot_of(name)
    slot = family.slot(name) or family.slot(family.prefix + name)
    if slot is None:
        check_tensors(first)  # a setting may be the reason
        problem = f"tensor {name} is unknown in {family.model_type}; nothing is averaged by guess"
        raise InvalidCheckpoint(first.info.source, problem)
    return slot


def _is_head(first: Identity, name: str) -> bool:
    """Return whether fine-tuning may have started a tensor from scratch, so that a base may lack it."""
    if layer_of(name) is not None:
        return False
    if "pooler" in name.split("."):
        return True
    known = first.known
    if known is None:
        return ends_with(name, (*OUTPUT_EMBEDDINGS, *HEADS))
    own = own_name(known, name)
    if not known.body or own == known.output:
        return own == known.output or ends_with(name, HEADS)
    is_body = known.name.endswith("Model") and not known.is_pre_training
    return not is_body and not own.startswith(known.body)


def _left_out_unread(identities: Sequence[Identity], states: Sequence[dict[str, TensorInfo]]) -> list[str]:
    """Return notes of tensors that the class does not read, and remove those that only some models have."""
    notes = []
    known = identities[0].known
    if known is None or known.converted:
        return []
    unread = {name for i in identities for name in (*i.unread, *(i.names[one] for one in i.unread))}
    unread = {name for state in states for name in state if name in unread and not is_buffer(state[name])}
    for name in sorted(unread):
        if not all(name in state for state in states):
            for state in states:
                state.pop(name, None)
            notes.append(f"tensor {name} was left out: only some models have it, and {known.name} does not read it")
    merged = sorted(name for name in unread if all(name in state for state in states))
    if merged:
        notes.append(f"{first_tensor(merged)} is not one that {known.name} reads; it was merged all the same")
    return notes
