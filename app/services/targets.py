"""Refuses requests to publish where a tenant may not."""

from collections.abc import Iterator

from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.requests import MergeRequest, ScoreRequest
from app.contracts.settings import Settings
from app.contracts.targets import Target
from app.storage.targets import refusal


class Targets:
    """The targets of publishing that settings allow."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def require(self, request: MergeRequest | ScoreRequest, tenant: str) -> None:
        """Raise ProblemError where a request names a place that its tenant may not publish at."""
        if not isinstance(request, MergeRequest):
            return
        errors = [FieldError(field=field, message=why) for field, why in self._problems(request, tenant)]
        if errors:
            detail = "; ".join(f"{error.field}: {error.message}" for error in errors)
            raise ProblemError(Problem.INVALID_REQUEST, detail, errors)

    def _problems(self, request: MergeRequest, tenant: str) -> Iterator[tuple[str, str]]:
        for index, text in enumerate(request.output.publish):
            target = Target.parse(text)
            why = refusal(target, tenant, self._settings)
            if why is None and target.scheme == "mlflow" and target.at is not None and request.accept is None:
                why = f"the alias {target.at} is set for a merge that is accepted; state accept, or leave the alias out"
            if why is not None:
                yield f"output.publish.{index}", why
