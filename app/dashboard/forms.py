"""The form that builds a recipe, and the page on which one is written as text. Both are checked while one types."""

import hashlib
import json
import secrets
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from app.api.dependencies import CallerOf, ServicesOf, get_record
from app.contracts.api_keys import Caller, Scope
from app.contracts.errors import ProblemError
from app.contracts.jobs import JOB_ID, JobKind
from app.dashboard.drafts import MOST_MODELS, NO_COLUMN, PARTS, Checked, Draft, check, drafted, look_at, problems_of
from app.dashboard.methods import NAMES, method_form
from app.dashboard.pages import page
from app.dashboard.recipes import as_yaml, ways_to_send, without_defaults
from app.dashboard.route import DashboardRoute, form_of
from app.services.browsing import found_below
from app.services.composition import Services
from app.storage.tenants import roots_of

EXAMPLE = """method:
  name: average
models:
- name: a
  checkpoint: local:experts/a
- name: b
  checkpoint: local:experts/b
"""


class FormRoute(DashboardRoute):
    """A route for who may make jobs. It lists what lies under the local roots, which recipes may name."""

    scope = Scope.WRITE


router = APIRouter(route_class=FormRoute, include_in_schema=False)


@router.get("/dashboard/new")
async def new(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Show the empty form of two models."""
    return await _form(request, Draft({}, 2), services, caller)


@router.post("/dashboard/new/check")
async def check_form(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Show the form as it is filled in, with the first rows, the plan, and what is wrong."""
    return await _form(request, drafted(await form_of(request)), services, caller)


@router.post("/dashboard/new")
async def send_form(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Queue the merge of a form; where it is refused, show the form with the reason."""
    draft = drafted(await form_of(request))
    checked = await look_at(draft, services, caller)
    sent = await _sent(checked, draft.value("once"), services, caller)
    return sent or await _form(request, draft, services, caller, checked)


@router.post("/dashboard/new/as-text")
async def form_as_text(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Show the recipe of a form as text, which can say more than the form."""
    checked = await look_at(drafted(await form_of(request)), services, caller)
    return _text(request, as_yaml(checked.recipe), checked)


@router.get("/dashboard/new/text")
async def new_text(
    request: Request,
    services: ServicesOf,
    caller: CallerOf,
    job: Annotated[str | None, Query(pattern=f"^{JOB_ID}$")] = None,
) -> Response:
    """Show a recipe as text to be changed: that of a merge, or an example."""
    text = EXAMPLE
    if job is not None:
        record = await run_sync(get_record, job, services, caller)
        text = as_yaml(without_defaults(record))
    return _text(request, text, None)


@router.post("/dashboard/new/text/check")
async def check_text(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    text = dict(await form_of(request)).get("recipe", "")
    return _text(request, text, await _read(text, services, caller))


@router.post("/dashboard/new/text")
async def send_text(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Queue the merge of a text; where it is refused, show the text with the reason."""
    fields = dict(await form_of(request))
    text = fields.get("recipe", "")
    checked = await _read(text, services, caller)
    return await _sent(checked, fields.get("once", ""), services, caller) or _text(request, text, checked)


async def _form(
    request: Request, draft: Draft, services: Services, caller: Caller, refused: Checked | None = None
) -> Response:
    checked = refused or await look_at(draft, services, caller)
    roots = roots_of(services.settings.local_roots, caller.tenant)
    return page(
        request,
        "new.html",
        422 if refused else 200,
        draft=draft,
        checked=checked,
        ways=ways_to_send(checked.recipe, JobKind.MERGE),
        methods=NAMES,
        method=method_form(draft.method),
        found=await run_sync(found_below, roots),
        parts_of_model=PARTS,
        most_models=MOST_MODELS,
        no_column=NO_COLUMN,
        once=draft.value("once") or secrets.token_hex(8),
    )


def _text(request: Request, text: str, checked: Checked | None) -> Response:
    return page(request, "text.html", text=text, checked=checked, once=secrets.token_hex(8))


async def _read(text: str, services: Services, caller: Caller) -> Checked:
    """Check a text in YAML, JSON or mergekit's form."""
    try:
        body = await services.inspectors.read(text.encode(), is_yaml=True)
    except ProblemError as error:
        return Checked({}, errors=problems_of(error))
    return await check(body.content, body.fields_there, services, caller)


async def _sent(checked: Checked, once: str, services: Services, caller: Caller) -> Response | None:
    """Queue a checked merge, and go to its page; None where it is refused. One form makes no recipe's job twice."""
    if checked.request is None or checked.errors:
        return None
    digest = hashlib.sha256(json.dumps(checked.recipe, sort_keys=True).encode()).hexdigest()
    try:
        record = await services.jobs.submit(checked.request, caller, idempotency_key=f"form-{once[:32]}-{digest}")
    except ProblemError as error:
        checked.errors = problems_of(error)
        return None
    return RedirectResponse(f"/dashboard/jobs/{record.id}", 303)
