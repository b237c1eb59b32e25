"""The process that publishes a merge at other places: `python -m worker.publisher PARENT`.

It is a process of its own, so that a cancelled job, a lost lease or a server that never answers ends it, and so that
tokens are where nothing else is. It reads an `Order` from stdin, and writes a `Publication` a line to stdout.
"""

import logging
import os
import sys
import time

from app.contracts.lifetime import die_with_parent
from app.contracts.settings import Settings
from app.contracts.targets import Target
from app.observability.context import process_concerns
from app.observability.logs import configure
from app.storage.targets import publish, refusal
from app.storage.targets.mlflow import registered_models
from app.storage.targets.target import NotPublished, WholeArtifact
from worker.engine.catalog.contracts.publication import Publication, PublicationError
from worker.engine.catalog.primitives.paths import hide
from worker.publishing import Order

PAUSES_S = (1.0, 5.0)  # between tries of a place that does not answer

logger = logging.getLogger("worker.publisher")


def published(text: str, order: Order, settings: Settings) -> Publication:
    """Publish at one place, which is tried again while it does not answer."""
    try:
        target = Target.parse(text)
    except ValueError as error:  # a request of an earlier release
        return _failed(text, NotPublished("refused", str(error)))
    artifact = WholeArtifact(order.folder, order.job, order.name, order.accepted)
    for place in (target, *_written_to(target, artifact)):
        why = refusal(place, order.tenant, settings)
        if why is not None:
            return _failed(text, NotPublished("refused", why))
    for pause in (*PAUSES_S, None):
        try:
            receipt = publish(target, artifact, settings)
        except NotPublished as error:
            if error.retryable and pause is not None:
                logger.info("%s: %s; again in %g s", text, error, pause)
                time.sleep(pause)
                continue
            return _failed(text, error)
        except Exception as error:
            logger.exception("%s: unexpected", text)
            problem = f"unexpected {type(error).__name__}; the worker's log has the trace"
            return _failed(text, NotPublished("internal", problem))
        return Publication(
            target=text,
            outcome="published" if receipt.is_new else "unchanged",
            versions=dict(receipt.versions),
            url=receipt.url,
        )
    raise AssertionError("the last try returns")


def _written_to(target: Target, artifact: WholeArtifact) -> list[Target]:
    """Return the places that are written to; the models of a request name some, so each must be allowed too."""
    if target.scheme != "mlflow":
        return [target]
    server, _, model = target.name.partition("/")
    return [Target("mlflow", f"{server}/{name}", None) for name in registered_models(model, artifact).values()]


def _failed(target: str, error: NotPublished) -> Publication:
    told = PublicationError(code=error.code, message=str(error), retryable=error.retryable)
    return Publication(target=target, outcome="failed", error=told)


def main() -> None:
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    settings = Settings()
    hide(*settings.hidden_folders)
    configure(settings.log_level, settings.log_format, "publisher")
    order = Order.model_validate_json(sys.stdin.buffer.read())
    process_concerns(order.facts)
    for target in order.targets:
        os.write(answers, published(target, order, settings).model_dump_json().encode() + b"\n")


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    main()
