"""What somebody has typed into the form of a new merge, and the recipe that it makes."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from app.contracts.api_keys import Caller
from app.contracts.errors import FieldError, ProblemError
from app.contracts.plans import Plan
from app.contracts.requests import MergeRequest
from app.dashboard.methods import NAMES, method_form
from app.services.bodies import field_of, field_there
from app.services.composition import Services
from app.services.json_text import NotJson, parse_json
from app.services.previews import Preview, RowsAsked
from worker.engine.catalog.primitives.paths import without_paths
from worker.engine.catalog.primitives.words import message_of

MOST_MODELS = 16  # models of the form; a recipe that is written as text may have more
MODEL_FIELD = re.compile(r"models\.(\d{1,2})\.")
PARTS = ("dataset", "evaluation")
NO_COLUMN = "-"
"""Choice of a column that is not to be read, although one was guessed."""


@dataclass
class Checked:
    """A recipe, and what checking it has found."""

    recipe: dict[str, Any]
    request: MergeRequest | None = None
    """The request; None where the recipe is none."""
    plan: Plan | None = None
    errors: list[FieldError] = field(default_factory=list)


@dataclass
class Draft:
    """The fields of a form as they were typed, without empty ones, and the first rows of its data sets."""

    values: dict[str, str]
    models: int
    previews: dict[str, Preview] = field(default_factory=dict)
    """First rows by field, as models.0.dataset."""

    def value(self, name: str) -> str:
        return self.values.get(name, "")

    @property
    def method(self) -> str:
        named = self.value("method")
        return named if named in NAMES else NAMES[0]

    @property
    def is_tuned(self) -> bool:
        """Whether a parameter of the method is given."""
        return bool(self._parameters())

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to be checked."""
        return any(self.value(f"models.{index}.checkpoint") for index in range(self.models))

    @property
    def recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = {"method": {"name": self.method, **self._parameters()}}
        recipe |= {name: self.value(name) for name in ("name", "base") if self.value(name)}
        if self.value("labels"):
            pairs = (label.partition(":") for label in self.value("labels").split(","))
            recipe["labels"] = {key.strip(): value.strip() for key, _, value in pairs}
        recipe["models"] = [self._model(index) for index in range(self.models)]
        return recipe

    def _parameters(self) -> dict[str, Any]:
        names = [parameter.name for parameter in method_form(self.method).parameters]
        return {name: _typed(text) for name in names if (text := self.value(f"method.{name}"))}

    def _model(self, index: int) -> dict[str, Any]:
        where = f"models.{index}"
        checkpoint = self.value(f"{where}.checkpoint")
        model: dict[str, Any] = {"name": self.name_of(index), "checkpoint": checkpoint}
        if self.value(f"{where}.weight"):
            model["weight"] = _typed(self.value(f"{where}.weight"))
        for part in PARTS:
            if self.value(f"{where}.{part}.source"):
                model[part] = self._rows(f"{where}.{part}")
        return model

    def name_of(self, index: int) -> str:
        """Return the name of a model: what was typed, or the last part of its checkpoint's reference."""
        where = f"models.{index}"
        last = re.split(r"[/:]", self.value(f"{where}.checkpoint").partition("@")[0])[-1]
        return self.value(f"{where}.name") or re.sub(r"[^A-Za-z0-9._-]", "-", last)[:64] or f"model-{index + 1}"

    def _rows(self, where: str) -> dict[str, Any]:
        rows: dict[str, Any] = {"source": self.value(f"{where}.source")}
        for setting, column in self.columns(where).items():
            if column is not None:
                rows[setting] = column
        return rows

    def columns(self, where: str) -> dict[str, str | None]:
        """Return the column of each setting of a data set: the one that was chosen, or else guessed."""
        preview = self.previews.get(where)
        columns = {}
        for setting, guess in (preview.settings if preview else {}).items():
            chosen = self.value(f"{where}.{setting}") or guess
            columns[setting] = None if chosen == NO_COLUMN else chosen
        return columns

    def asked(self) -> Iterator[RowsAsked]:
        """Yield every data set that the form names, with its model's checkpoint."""
        for index in range(self.models):
            checkpoint = self.value(f"models.{index}.checkpoint") or None
            for part in PARTS:
                where = f"models.{index}.{part}"
                if source := self.value(f"{where}.source"):
                    yield RowsAsked(field=where, source=source, checkpoint=checkpoint)


def drafted(fields: Sequence[tuple[str, str]]) -> Draft:
    """Read a form. Its field `do` adds a model, or removes one by its index."""
    values = {name: text for name, sent in fields if (text := sent.strip())}
    do = values.pop("do", "")
    indices = {int(found[1]) for name, _ in fields if (found := MODEL_FIELD.match(name))}
    gone = int(do[7:]) if re.fullmatch(r"remove-\d{1,2}", do) else None
    kept = [index for index in sorted(indices) if index != gone][:MOST_MODELS]
    places = {f"models.{index}.": f"models.{place}." for place, index in enumerate(kept)}
    moved = {}
    for name, text in values.items():
        found = MODEL_FIELD.match(name)
        if found is None:
            moved[name] = text
        elif found[0] in places:
            moved[places[found[0]] + name[found.end() :]] = text
    models = min(MOST_MODELS, max(1, len(kept) + (do == "add")))
    return Draft(moved, models)


async def look_at(draft: Draft, services: Services, caller: Caller) -> Checked:
    """Read the first rows of what a draft names, and check the recipe that it makes."""
    asked = list(draft.asked())
    try:
        previews = await services.jobs.preview(asked, caller) if asked else []
    except ProblemError as error:  # reading takes too long, or too many wait
        previews = [Preview(problem=without_paths(error.detail)) for _ in asked]
    draft.previews = {one.field: preview for one, preview in zip(asked, previews, strict=True)}
    if not draft.is_begun:
        return Checked(draft.recipe)
    return await check(draft.recipe, {}, services, caller)


async def check(content: Any, fields_there: Mapping[str, str], services: Services, caller: Caller) -> Checked:
    """Check a recipe as `POST /merge/validate` does. What is wrong is found under the recipe's own fields."""
    checked = Checked(content if isinstance(content, dict) else {})
    try:
        checked.request = MergeRequest.model_validate(content)
        checked.plan = await services.jobs.plan(checked.request, caller)
    except ValidationError as error:
        checked.errors = [
            FieldError(field=field_of(("body", *found["loc"])), message=message_of(dict(found)))
            for found in error.errors()
        ]
    except ProblemError as error:
        checked.errors = problems_of(error)
    for one in checked.errors:
        one.field, one.message = field_there(one.field, fields_there), without_paths(one.message)
    return checked


def problems_of(error: ProblemError) -> list[FieldError]:
    """Return the fields that are wrong, or what is wrong with none."""
    return [one.model_copy() for one in error.errors] or [FieldError(field="", message=error.detail)]


def _typed(text: str) -> Any:
    """Return the value of a JSON text, and any other text as it is, as is one of what no page can show."""
    try:
        value = parse_json(text.encode())
        json.dumps(value, ensure_ascii=False).encode()
    except (NotJson, UnicodeEncodeError):
        return text
    return value
