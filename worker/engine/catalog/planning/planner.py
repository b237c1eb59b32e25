"""Plans merges. Whatever can be refused is refused here, before a byte of weights is read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from worker.engine.catalog.checkpoints.config_differences import check_architectures
from worker.engine.catalog.checkpoints.identity import check_tensors, identify
from worker.engine.catalog.checkpoints.info import DTYPE_BYTES, CheckpointInfo
from worker.engine.catalog.checkpoints.settings import check_settings
from worker.engine.catalog.checkpoints.tensor_names import stacks_of
from worker.engine.catalog.checkpoints.token_tensors import vocabulary_size
from worker.engine.catalog.checkpoints.vocabulary import TokenChoices, pads_differ
from worker.engine.catalog.contracts.spec import Dtype, Heads, OutputSpec, VocabularyPolicy
from worker.engine.catalog.families import Family
from worker.engine.catalog.methods import BaseParameters, MethodParameters
from worker.engine.catalog.planning.by_name import planned_by_name
from worker.engine.catalog.planning.by_table import planned_by_table, table_of
from worker.engine.catalog.planning.comparing import MergeSettings
from worker.engine.catalog.planning.plan import MergePlan, named
from worker.engine.catalog.planning.publishing import with_companions
from worker.engine.catalog.planning.stacking import plan_slices
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint, InvalidRequest
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.catalog.tasks import reads_images


def plan_merge(
    checkpoints: Sequence[CheckpointInfo],
    dtype: Dtype = "auto",
    base: CheckpointInfo | None = None,
    heads: Heads | None = None,
    vocabulary: VocabularyPolicy = "error",
    config_from: CheckpointInfo | None = None,
    choices: TokenChoices | None = None,
) -> MergePlan:
    """Check that the checkpoints fit each other, and their ancestor `base`, and lay out the merge.

    Args:
        heads: whether each model keeps its own head; by default it does where a table tells heads from the backbone.
        vocabulary: vocabulary of the output if the tokenizers differ; `error` refuses that.
        config_from: the checkpoint whose configuration and tokenizer are published; None: those of the first, and
            models that differ in settings that no shape shows are refused.
        choices: a recipe's settings of single tokens.

    Raises:
        InvalidRequest: heads cannot be kept.
        InvalidCheckpoint: the architecture's table has no place for a tensor, or a size contradicts the configuration.
        IncompatibleCheckpoints: a tensor or setting differs; the message names it and both values.
    """
    identities = [identify(info) for info in checkpoints]
    if base is not None and config_from is base:
        check_settings(base)
    whose = next((i.info for i, info in zip(identities, checkpoints, strict=True) if info is config_from), config_from)
    checkpoints = [identity.info for identity in identities]
    first = checkpoints[0]
    tables = [table_of(info) for info in checkpoints]
    if base is not None and tables[0] is not None and base.model_type in tables[0].part_of:
        if config_from is base:
            raise InvalidRequest(f"{base.source} has the configuration of a part alone", field="output.config_from")
        inside = {tables[0].part_of[base.model_type]: base.config}
        base = replace(base, config={"model_type": tables[0].model_type, **inside})
    for info in checkpoints[1:]:
        check_architectures(first, info)
    notes = list(dict.fromkeys(note for identity in identities for note in identity.notes))
    owner = None
    if vocabulary == "error" and not reads_images(first) and pads_differ(checkpoints, base):
        vocabulary, owner = "base", whose or first
        notes.append(_note_of_padding(checkpoints, base, owner))
    asked = MergeSettings(dtype, base, heads == "merged", vocabulary, whose, choices, owner)
    if tables[0] is None or tables[0].head.merges:
        if heads == "per_model":
            problem = f"no table tells the head of {named(first)} from the rest"
            if tables[0] is not None:
                problem = f"the head of {named(first)} was pre-trained with the rest"
            problem += ": all tensors are merged; leave output.heads out, or say merged"
            raise InvalidRequest(problem, field="output.heads")
        # Embedding models may differ in steps that are run here or not.
        plan = planned_by_name(identities, asked, tables[0] if None not in tables else None)
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


def notes_of_estimates(method: MethodParameters) -> list[str]:
    """Return a doubt if the method estimates something instead of measuring it."""
    if method.estimated is None:
        return []
    return [Doubt(f"{method.estimated} were not measured, but estimated from the task vectors")]


def notes_of_rounding(method: BaseParameters, plan: MergePlan) -> list[str]:
    """Return a doubt for each model of whose differences from the base a part is what its data type rounded off."""
    if not method.needs_base:
        return []
    rounded: dict[str, tuple[str, str]] = {}
    for tensor in plan.backbone:
        for source in tensor.sources:
            if tensor.base is not None and DTYPE_BYTES[source.dtype] < DTYPE_BYTES[tensor.base.dtype]:
                rounded.setdefault(source.source, (source.dtype, tensor.base.dtype))
    return [
        Doubt(
            f"{source} is stored as {own} and the base as {wider}, so what rounding changed counts as a difference "
            "from the base too; a base in the same format has none of that"
        )
        for source, (own, wider) in rounded.items()
    ]


def misfit(method: BaseParameters, family: Family | None) -> str | None:
    """Return why a method cannot merge models of a family, though others can; None if it can."""
    if family is None:
        tells = any(one.needs_table for one in method.methods)
        return f"{method.name} takes linear layers from a table, and this architecture has none" if tells else None
    if not method.refits_layers:
        return None
    if all(one.refits_every_form for one in method.methods if one.refits_layers):
        return None
    if family.shares_layers:
        return f"{method.name} fits one layer after another, and the layers of this architecture are one"
    if family.decoder is not None:
        return f"{method.name} fits one layer after another, and this architecture has an encoder and a decoder"
    if family.stacked:
        return f"{method.name} fits layers to the same tokens in model and merge, and experts get others"
    return None


def plan_job(
    method: BaseParameters,
    names: Sequence[str],
    checkpoints: Sequence[CheckpointInfo],
    output: OutputSpec,
    base: CheckpointInfo | None = None,
    slices: Sequence[OutputSlice] | None = None,
) -> MergePlan:
    """Plan a merge by any method, with all files that are published.

    Raises:
        InvalidCheckpoint, IncompatibleCheckpoints, InvalidRequest: see `plan_merge` and `plan_slices`. Besides, the
            method may not suit the models' architecture or matrices.
    """
    choices, whose = TokenChoices(names, output), None
    if output.config_from is not None:
        whose = base if output.config_from not in names else checkpoints[names.index(output.config_from)]
    scale: Callable[[TensorPlace], float] | None = None
    if method.stacked_slices:
        slices = [OutputSlice(sources=[part]) for part in method.stacked_slices]
        [stacking] = method.methods
        scale = partial(stacking.at, "scale")
    elif slices is None or _are_all_layers(slices, names, checkpoints, base):
        plan = plan_merge(checkpoints, output.dtype, base, output.heads, output.vocabulary, whose, choices)
        by_own_tokens = method.search is not None or method.refits_layers
        if plan.vocabulary is not None and output.vocabulary == "error" and by_own_tokens:
            problem = f"method {method.name} needs matrices with the same number of rows, padding included"
            raise IncompatibleCheckpoints(checkpoints[0].source, checkpoints[-1].source, problem)
        for one in method.methods:
            why = misfit(one, plan.family)
            if why is not None:
                advice = "name method.candidates without it" if method.search else "use regmean"
                if one.needs_table:
                    advice = "use a method that works on single tensors, such as ties"
                raise InvalidCheckpoint(checkpoints[0].source, f"{why}; {advice}")
        estimates = [] if method.search else [note for one in method.methods for note in notes_of_estimates(one)]
        plan = replace(plan, notes=(*estimates, *notes_of_rounding(method, plan), *plan.notes))
        return with_companions(plan, output.dtype, chat_template=output.chat_template)
    if output.heads == "per_model":
        raise InvalidRequest("slices make one model with one head", field="output.heads")
    identities = [identify(info) for info in checkpoints]
    whose = next((i.info for i, info in zip(identities, checkpoints, strict=True) if info is whose), whose)
    checkpoints = [identity.info for identity in identities]
    asked = MergeSettings(output.dtype, base, True, output.vocabulary, whose, choices)
    plan = plan_slices(slices, names, identities, asked, scale)
    notes = dict.fromkeys([*(note for identity in identities for note in identity.notes), *plan.notes])
    plan = replace(plan, notes=(*notes_of_rounding(method, plan), *notes))
    only, *others = slices[-1].sources
    last = None if others else checkpoints[names.index(only.model)]
    return with_companions(plan, output.dtype, last=last, chat_template=output.chat_template)


def _are_all_layers(
    slices: Sequence[OutputSlice],
    names: Sequence[str],
    checkpoints: Sequence[CheckpointInfo],
    base: CheckpointInfo | None,
) -> bool:
    """Return whether there is one slice of all layers of all models, which is a merge like any other."""
    [one, *others] = slices
    if others or [source.model for source in one.sources] != list(names):
        return False
    runs = [source.layers for source in one.sources] + ([one.base_layers] if one.base_layers else [])
    infos = [*checkpoints, *([base] if base and one.base_layers else [])]
    return all(
        run in (None, (0, max(stacks_of(info.tensors).values(), default=0)))
        for run, info in zip(runs, infos, strict=True)
    )
