"""Plans a merge of an architecture with a table, which says what each tensor is and which nodes own its slices."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from worker.engine.catalog.checkpoints.config_differences import (
    SETTINGS_ADVICE,
    check_labels,
    is_idle,
    same,
    shows_in_no_shape,
)
from worker.engine.catalog.checkpoints.identity import Identity
from worker.engine.catalog.checkpoints.info import FLOATS, CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.library import completed
from worker.engine.catalog.contracts.spec import VocabularyPolicy
from worker.engine.catalog.families import Family, Kind, Slot
from worker.engine.catalog.planning.comparing import (
    VOCABULARY_ADVICE,
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
from worker.engine.catalog.planning.plan import (
    MergePlan,
    PlannedTensor,
    require_reader,
    unavailable_setting,
    usable_sizes,
)
from worker.engine.catalog.planning.tensors import merged_tensor, output_dtype
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.catalog.tasks import family_of, reads_images, task_of


def table_of(info: CheckpointInfo) -> Family | None:
    """Return the table of a checkpoint, if there is one.

    Raises:
        InvalidCheckpoint: a setting is not available, and the model cannot be merged without a table.
    """
    family = family_of(info)
    if family is None:
        return None
    if info.config.get("quantization_config"):
        raise InvalidCheckpoint(info.source, "its weights are quantised; merge the checkpoints before quantising them")
    problem = unavailable_setting(info, family)
    if problem is None:
        return family
    if family.head.merges:  # it can still be merged by name
        return None
    raise InvalidCheckpoint(info.source, problem)


def planned_by_table(family: Family, identities: Sequence[Identity], asked: MergeSettings) -> MergePlan:
    """Plan to merge the backbones of a family, slot by slot. Raises as `plan_merge` does."""
    checkpoints, base, vocabulary = [identity.info for identity in identities], asked.base, asked.vocabulary
    first, everyone = checkpoints[0], [*checkpoints, *([base] if base else ())]
    tasks, differing, notes = [], set[str](), list[str]()
    slots = [_slots(identity, family) for identity in identities]
    for info, of in zip(checkpoints, slots, strict=True):
        if not reads_images(info):  # what makes pixels of images is only needed to run a model
            require_reader(info)
        _check_sizes(info, of, family)
        tasks.append(task_of(info))
        differing |= _check_settings(first, info, family, asked)
        if vocabulary == "error":
            check_vocabulary(first, info)
        if asked.merges_heads:
            check_labels(first, info)
            if tasks[-1].name != tasks[0].name:
                problem = f"their heads have different tasks: {tasks[0].name}, {tasks[-1].name}"
                raise IncompatibleCheckpoints(first.source, info.source, problem)
    ancestor: dict[str, TensorInfo] = {}
    if base is not None:
        ancestor = _ancestor(
            first, base, family, (Kind.UNREAD,) if asked.merges_heads else (Kind.HEAD, Kind.UNREAD), vocabulary
        )
        differing |= differences_from_base(first, base, family, asked, notes)
    # If the base was pre-trained without a pooler, poolers have no ancestor: each began at random, like the heads.
    kept = {Kind.HEAD}
    if base is not None and Kind.POOLER not in {slot.kind for name in ancestor if (slot := family.slot(name))}:
        kept.add(Kind.POOLER)
    apart = {Kind.UNREAD} if asked.merges_heads else {*kept, Kind.UNREAD}
    aligned = asked.aligned(checkpoints)
    layers = {stack.name: family.size(first.config, stack.size("layers")) for stack in family.stacks}
    place = partial(_place, layers)
    named = [{name: tensor for name, (_, tensor) in of.items()} for of in slots]
    backbone, alone = [], []
    for name, (slot, tensor) in slots[0].items():
        if slot.kind in apart:
            continue
        origin = None
        if base is not None:
            found = ancestor.get(slot.name)
            if slot.kind in kept and (found is None or found.shape != tensor.shape):
                alone.append(name)
            else:
                origin = (base, found)
        backbone.append(merged_tensor(slot, place(slot), checkpoints, named, name, origin, asked.dtype, aligned))
    for info, of in zip(checkpoints, slots, strict=True):
        for name, (slot, _) in of.items():
            if slot.kind not in apart and name not in slots[0]:
                raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is in the second only")
    if base is not None:
        notes += notes_of_heads(base, alone)
    if asked.merges_heads:
        notes += doubts_of_heads(checkpoints)
    more = notes_of_settings(everyone, differing, asked.config_from)
    published = [with_settings_of(info, asked.config_from) for info in checkpoints]
    whole = MergePlan(
        family,
        tuple(checkpoints),
        base,
        tuple(tasks),
        tuple(backbone),
        ((),),
        tuple(published[:1]),
        vocabulary=aligned,
        config_from=asked.config_from,
        notes=(*notes, *more),
    )
    if asked.merges_heads:
        return whole
    if Kind.POOLER in kept and (poolers := [name for name, (slot, _) in slots[0].items() if slot.kind is Kind.POOLER]):
        note = f"{base.source if base else ''} has no {first_tensor(poolers)}: every model kept its own, with its head"
        whole = replace(whole, notes=(*whole.notes, note))
    heads = tuple(
        tuple(
            PlannedTensor(
                slot, place(slot), tensor.shape, output_dtype([tensor], asked.dtype), (tensor,), is_copied=True
            )
            for slot, tensor in of.values()
            if slot.kind in kept
        )
        for of in slots
    )
    return replace(whole, heads=heads, published=tuple(published))


def _slots(identity: Identity, family: Family) -> dict[str, tuple[Slot, TensorInfo]]:
    info, slots = identity.info, dict[str, tuple[Slot, TensorInfo]]()
    for tensor in info.tensors.values():
        if tensor.name in identity.leftovers:
            continue
        slot = family.slot(tensor.name)
        if slot is None:
            raise InvalidCheckpoint(
                info.source, f"tensor {tensor.name} is unknown in {family.model_type}; nothing is averaged by guess"
            )
        if slot.kind is not Kind.UNREAD and tensor.dtype not in FLOATS:
            raise InvalidCheckpoint(info.source, f"tensor {tensor.name} has dtype {tensor.dtype}, not a float")
        if slot.name in slots:
            raise InvalidCheckpoint(info.source, f"tensor {slot.stored} is there under two spellings")
        slots[slot.name] = (slot, tensor)
    return slots


def _place(layers: Mapping[str, int], slot: Slot) -> TensorPlace:
    if slot.layer is not None:
        count = layers[slot.stack]
        return TensorPlace(slot.stored, slot.layer / max(1, count - 1), slot.layer, count)
    return TensorPlace(slot.stored, 0.0 if slot.kind in (Kind.EMBEDDING, Kind.EMBEDDING_PROJECTION) else 1.0)


def _check_sizes(info: CheckpointInfo, slots: Mapping[str, tuple[Slot, TensorInfo]], family: Family) -> None:
    sizes = usable_sizes(info, family)
    if "head_size" not in sizes and sizes["hidden"] % sizes["heads"]:
        raise InvalidCheckpoint(info.source, f"hidden size {sizes['hidden']} is no multiple of {sizes['heads']} heads")
    layers: dict[str, dict[int, set[str]]] = {stack.name: {} for stack in family.stacks}
    for slot, tensor in slots.values():
        if slot.layer is not None:
            inner = slot.name.removeprefix(family.layer_path(slot.layer, slot.stack))
            layers[slot.stack].setdefault(slot.layer, set()).add(inner)
        owner = slot.owner
        is_checked = slot.kind in (Kind.QUERY, Kind.CROSS_QUERY, Kind.UP, Kind.DOWN) or (
            owner is not None and len(owner.parts) > 1
        )
        if is_checked and owner is not None and not slot.is_bias:
            owned = sum(family.owned(info.config, score.kind, score.stack) for score in owner.scores)
            if len(tensor.shape) != 2 or tensor.shape[owner.axis] != owned:
                what = " and ".join(kind.name for kind in owner.kinds)
                if owner.kinds[0].width and owned == sizes["hidden"]:
                    what = "hidden"
                raise InvalidCheckpoint(
                    info.source, f"tensor {tensor.name} has shape {list(tensor.shape)}, config.json says {owned} {what}"
                )
    for stack in family.stacks:
        found, count = layers[stack.name], family.size(info.config, stack.size("layers"))
        if len(found) != count or max(found) != count - 1:
            what = f"{stack.name} layers".strip()
            raise InvalidCheckpoint(info.source, f"{len(found)} {what} are there, config.json says {count}")
    experts = {slot.expert for slot, _ in slots.values()} - {None}
    if experts != {*range(sizes.get("experts", 0))}:
        problem = f"{len(experts)} experts are there, config.json says {sizes.get('experts', 0)}"
        raise InvalidCheckpoint(info.source, problem)
    for stack in family.stacks:
        everywhere = set.union(*layers[stack.name].values())
        for layer, names in layers[stack.name].items():
            for name in sorted(everywhere - names):
                lacking = family.slot(family.layer_path(layer, stack.name) + name)
                if lacking is not None:  # None: this layer has no such tensor
                    raise InvalidCheckpoint(info.source, f"no tensor {lacking.stored}; other layers have it")


def _check_settings(first: CheckpointInfo, info: CheckpointInfo, family: Family, asked: MergeSettings) -> set[str]:
    """Return the settings in which two checkpoints differ and may do so, because a request says whose settings count.

    Raises:
        IncompatibleCheckpoints: a setting differs; the message names it and both values.
    """
    differing = set()
    for key in (*family.config_names.values(), *family.settings):
        if key == "vocab_size" and asked.vocabulary != "error":
            continue
        whole = completed(first.config), completed(info.config)  # however spelt
        ours, theirs = (family.setting(config, key) for config in whole)
        if same(ours, theirs) or (key in family.settings and is_idle(key, *whole)):
            continue
        is_size = key in (*family.config_names.values(), family.padding_position)
        is_free = not is_size and shows_in_no_shape(key, ours, theirs)
        if not is_free or asked.config_from is None:
            advice = f"; {VOCABULARY_ADVICE}" if key == "vocab_size" else ""
            advice = f"; {SETTINGS_ADVICE}" if is_free else advice
            raise IncompatibleCheckpoints(first.source, info.source, f"{key} differs: {ours!r}, {theirs!r}{advice}")
        differing.add(key)
    return differing


def _ancestor(
    first: CheckpointInfo,
    base: CheckpointInfo,
    family: Family,
    apart: Collection[Kind],
    vocabulary: VocabularyPolicy,
) -> dict[str, TensorInfo]:
    """Return the base's backbone by canonical name, without the kinds in `apart`, of which it may have any or none.

    Its names may lack the family's prefix.
    """
    if base.model_type != family.model_type:
        raise IncompatibleCheckpoints(
            first.source, base.source, f"architectures differ: {first.model_type}, {base.model_type}"
        )
    if base.config.get("quantization_config"):
        raise InvalidCheckpoint(base.source, "its weights are quantised; name the base before quantising")
    for key in family.config_names.values():
        ours, theirs = family.setting(first.config, key), family.setting(base.config, key)
        if not same(ours, theirs):
            raise IncompatibleCheckpoints(first.source, base.source, f"{key} differs: {ours!r}, {theirs!r}")
    if vocabulary == "error" and not reads_images(first):
        check_vocabulary_size(first, base)
    if base.vocabulary and vocabulary == "error":
        check_vocabulary(first, base)
    found = {}
    for tensor in base.tensors.values():
        slot = family.slot(tensor.name) or family.slot(family.prefix + tensor.name)
        if slot is not None and slot.kind not in apart:
            if slot.name in found:
                raise InvalidCheckpoint(base.source, f"tensor {slot.stored} is there under two spellings")
            found[slot.name] = tensor
    return found
