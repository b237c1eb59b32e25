"""Decides which files are published beside a merge's weights, and makes notes of them."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.companion_checks import check_companions
from worker.engine.catalog.checkpoints.companions import companions
from worker.engine.catalog.checkpoints.config_differences import same, short
from worker.engine.catalog.checkpoints.files import CHAT_TEMPLATES, MORE_CHAT_TEMPLATES, PROCESSORS
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.library import completed
from worker.engine.catalog.checkpoints.modules import (
    SENTENCE_CONFIG,
    SENTENCE_MODULES,
    Module,
    Modules,
    check_agree,
    read_modules,
)
from worker.engine.catalog.checkpoints.token_tensors import vocabulary_size
from worker.engine.catalog.contracts.spec import Dtype
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.planning.plan import MergePlan, PlannedModules, PlannedTensor
from worker.engine.catalog.planning.tensors import output_dtype
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints
from worker.engine.catalog.primitives.values import TensorPlace

UNLIMITED = 10**15  # tokenizers without a limit have 10**30 as model_max_length
UNSAID = ("transformers_version", "_from_model_config")  # keys of a companion that say where it came from


def with_companions(
    plan: MergePlan, dtype: Dtype, last: CheckpointInfo | None = None, chat_template: str | None = None
) -> MergePlan:
    """Add modules of sentence-transformers to a plan, and notes for its users.

    Args:
        last: the model of the last layers of a stack, whose modules follow them.
        chat_template: the template that is asked for; `auto` is the one that most checkpoints have.

    Raises:
        InvalidCheckpoint: a file of a module is malformed or missing, or a published file would not load.
        IncompatibleCheckpoints: models that become one do different things with the transformer's output.
    """
    for info in plan.published:
        check_companions(plan.tokens_of(info))
    modules, notes = _modules(plan, dtype, last)
    notes += [note for note in map(beyond_matrix, _owners(plan)) if note]
    notes += _notes_of_tokens(plan)
    if plan.merges_heads:
        notes += _differences(plan, besides=() if chat_template is None else (_template("default"), CHAT_TEMPLATES[1]))
    if chat_template == "auto":
        chat_template = _commonest_template(plan)
        notes += ["no model has a chat template, so none is published"] if chat_template is None else []
    files = [file for info in plan.published for file in companions(plan.tokens_of(info)).values()]
    files += [file for planned in modules if planned for file in planned.modules.files.values()]
    return replace(
        plan,
        modules=modules,
        companion_bytes=sum(file.stat().st_size for file in files),
        notes=(*plan.notes, *notes),
        chat_template=chat_template,
    )


def _commonest_template(plan: MergePlan) -> str | None:
    """Return the most common chat template of all checkpoints; among equally common ones the base's comes first."""
    everyone = [*([plan.base] if plan.base else []), *plan.checkpoints]
    templates = [_companions(info).get(_template("default")) for info in everyone]
    counted = Counter(template.strip() for template in templates if isinstance(template, str) and template.strip())
    return counted.most_common(1)[0][0] if counted else None


def beyond_matrix(info: CheckpointInfo, last: int | None = None) -> str | None:
    """Note that the tokenizer gives ids for which the embedding matrix has no rows; None if it does not.

    Such a model is merged, because it is not run. Jobs that run it, or align its rows by token, refuse it.

    Args:
        last: the tokenizer's last id, if files do not tell it.
    """
    rows, last = vocabulary_size(info.config), info.last_token if last is None else last
    if rows is None or last is None or last < rows:
        return None
    return (
        f"the tokenizer of {info.source} has ids up to {last}, and its embedding matrix {rows} rows: the published "
        f"model cannot read tokens from {rows} on; resize the matrix, or take these tokens out of the tokenizer"
    )


def _owners(plan: MergePlan) -> list[CheckpointInfo]:
    """Return checkpoints whose tokenizers are published; one that gives the output's vocabulary was checked with it."""
    owners = map(plan.tokens_of, plan.published)
    return list({info.tokenizer_path: info for info in owners}.values()) if plan.vocabulary is None else []


def _modules(
    plan: MergePlan, dtype: Dtype, last: CheckpointInfo | None
) -> tuple[tuple[PlannedModules | None, ...], list[str]]:
    """Return the modules of every published model, and notes."""
    found = [(info, read_modules(info)) for info in plan.checkpoints]
    given = [(info, modules) for info, modules in found if modules is not None]
    if not given:
        return (), []
    unknown = next(((info, modules.unknown) for info, modules in given if modules.unknown), None)
    if unknown is not None:
        source, name = unknown[0].source, unknown[1]
        note = (
            f"{source} is a folder of sentence-transformers with a module of class {name}, which is not available: the "
            "merge is published without modules.json and its modules, and sentence-transformers would take mean pooling"
        )
        return (), [note]
    if not plan.merges_heads:  # modules follow the head, which each model keeps
        return tuple(_own(modules, dtype) if modules else None for _, modules in found), []
    notes = []
    first, owner = given[0]
    for _, modules in given[1:]:
        check_agree(owner, modules)
        notes += _settings_notes(owner, modules)
    without = [info.source for info, modules in found if modules is None]
    if without:
        notes.append(f"{', '.join(without)}: no modules.json is there; the merge has the modules of {first.source}")
    if last is not None:
        of_last = next((modules for info, modules in given if info.path == last.path), owner)
        return (_own(of_last, dtype),), notes
    tensors = {}
    for number, step in enumerate(owner.steps):
        if step.tensors and without:
            lacking = next(info for info, modules in found if modules is None)
            problem = f"{step.folder} of the first has weights, and the second has no modules.json"
            raise IncompatibleCheckpoints(first.source, lacking.source, problem)
        of_models = [modules.steps[number] for _, modules in given]
        tensors[step.folder] = [
            _planned(step, name, [other.tensors[name] for other in of_models], dtype) for name in step.tensors
        ]
    return (PlannedModules(owner, {folder: tuple(of) for folder, of in tensors.items() if of}),), notes


def _own(modules: Modules, dtype: Dtype) -> PlannedModules:
    """Plan a checkpoint's own modules, with their weights unchanged."""
    tensors = {
        step.folder: tuple(_planned(step, name, [one], dtype, is_copied=True) for name, one in step.tensors.items())
        for step in modules.steps
        if step.tensors
    }
    return PlannedModules(modules, tensors)


def _planned(
    step: Module, name: str, sources: Sequence[TensorInfo], dtype: Dtype, *, is_copied: bool = False
) -> PlannedTensor:
    own = f"{SENTENCE_MODULES}.{step.folder}.{name}"
    slot = Slot(own, Kind.HEAD, None, name.endswith("bias"), name_in_files=name)
    place = TensorPlace(f"{step.folder}.{name}", 1.0)
    shape = sources[0].shape
    return PlannedTensor(slot, place, shape, output_dtype(sources, dtype), tuple(sources), is_copied=is_copied)


def _settings_notes(owner: Modules, other: Modules) -> list[str]:
    """Return notes of settings in which embedding models differ although they compute the same for the same text."""
    ours, theirs = [
        {**_content(modules.path / SENTENCE_CONFIG), "max_seq_length": _most_tokens(modules)}
        for modules in (owner, other)
    ]
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    different = [key for key in different if not key.startswith("__")]
    if not different:
        return []
    return [f"{', '.join(different)[:300]} of {other.info.source} differ from what is published, {owner.info.source}'s"]


def _most_tokens(modules: Modules) -> Any:
    """Return how many tokens of a text an embedding model reads, as sentence-transformers finds it; None if all."""
    given = modules.encoder.get("max_seq_length")
    if given is not None:
        return given
    config = completed(modules.info.config)
    of_tokenizer = _content(modules.info.tokenizer_path / "tokenizer_config.json").get("model_max_length")
    limits = (of_tokenizer, config.get("max_position_embeddings"))
    return min((one for one in limits if isinstance(one, int | float) and 0 < one < UNLIMITED), default=None)


def _differences(plan: MergePlan, besides: Collection[str]) -> list[str]:
    """Return notes of templates and settings in which merged models differ from the published ones.

    Args:
        besides: names of what is published as the request says, not as a model has it.
    """
    owner = plan.tokens_of(plan.published[0])
    of_owner = _companions(owner)
    notes = []
    for info in plan.checkpoints:
        if info.path == owner.path:
            continue
        found = _companions(info)
        names = sorted((of_owner.keys() | found.keys()) - {*besides})
        different = [name for name in names if of_owner.get(name) != found.get(name)]
        if different:
            which = ", ".join(different)
            notes.append(f"published with the merge are {owner.source}'s own; those of {info.source} differ: {which}")
    return list(dict.fromkeys(notes))


def _notes_of_tokens(plan: MergePlan) -> list[str]:
    """Return notes of differing settings of the end and the length of texts, if one model's settings are published.

    They do not change what a model computes, but much of what it writes.
    """
    if not plan.merges_heads and plan.config_from is None:
        return []
    everyone = {info.path: info for info in (*plan.checkpoints, *([plan.config_from] if plan.config_from else ()))}
    configs = {info.source: completed(info.config) for info in everyone.values()}
    published = completed(plan.published[0].config)
    notes = []
    for key in sorted(published.keys() | set[str]().union(*configs.values())):
        by_token = key.endswith("_token_id") and plan.vocabulary is None
        if not (by_token or key == "max_position_embeddings"):
            continue
        values = {source: config.get(key) for source, config in configs.items()}
        if any(not same(value, published.get(key)) for value in values.values()):
            listed = ", ".join(f"{short(value)} in {source}" for source, value in values.items())
            notes.append(f"{key} differs: {listed}; published is {short(published.get(key))}")
    return notes


def _companions(info: CheckpointInfo) -> dict[str, Any]:
    """Return a checkpoint's chat templates and its settings of generation and of processors."""
    found: dict[str, Any] = {}
    for name, file in companions(info).items():
        if name == "tokenizer_config.json":
            template = _content(file).get("chat_template")
            listed = template if isinstance(template, list) else [{"name": "default", "template": template}]
            for one in listed:
                if isinstance(one, dict) and one.get("template"):
                    found[_template(str(one.get("name")))] = one["template"]
        elif name == CHAT_TEMPLATES[0] or MORE_CHAT_TEMPLATES.fullmatch(name):
            own = "default" if name == CHAT_TEMPLATES[0] else Path(name).stem
            found[_template(own)] = file.read_text(encoding="utf-8", errors="replace")
        elif name in (CHAT_TEMPLATES[1], "generation_config.json", *PROCESSORS):
            found[name] = _content(file)
    return found


def chat_templates(info: CheckpointInfo) -> dict[str, str]:
    """Return a checkpoint's chat templates, by their names in messages."""
    found = _companions(info)
    older = found.get(CHAT_TEMPLATES[1], {}).get("chat_template")
    own = {name: text for name, text in found.items() if name.startswith("chat template") and isinstance(text, str)}
    return {**own, CHAT_TEMPLATES[1]: older} if isinstance(older, str) else own


def main_template(info: CheckpointInfo) -> str | None:
    """Return the template by which transformers writes a checkpoint's conversations; None where it has none.

    Once there is a file of a template, those in tokenizer_config.json do not count.
    """
    files = [name for name in companions(info) if name == CHAT_TEMPLATES[0] or MORE_CHAT_TEMPLATES.fullmatch(name)]
    config = companions(info).get("tokenizer_config.json")
    given = None if files or config is None else _content(config).get("chat_template")
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}
    if isinstance(given, dict):
        given = given.get("default")
    found = _companions(info).get(_template("default")) if files else given
    return found if isinstance(found, str) else None


def _template(name: str) -> str:
    return "chat template" if name == "default" else f"chat template {name[:100]!r}"


def _content(file: Path) -> Mapping[str, Any]:
    """Read a JSON file that only its users need; empty if it is not a JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in content.items() if key not in UNSAID} if isinstance(content, dict) else {}
