"""Composes the API process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI

from app.api import (
    artifacts,
    docs,
    errors,
    events,
    health,
    jobs,
    keys,
    mcp,
    merges,
    methods,
    metrics,
    predictions,
    scores,
    uploads,
    webhooks,
)
from app.api.body_limit import BodyLimit
from app.api.cors import Cors
from app.api.head import HeadAsGet
from app.api.hosts import OwnHosts
from app.api.metrics import ApiMetrics
from app.api.openapi import Api
from app.api.proxies import Proxies
from app.contracts.settings import Settings
from app.dashboard import routers
from app.observability.traces import open_tracer
from app.services.composition import compose
from app.storage.reaper import EXPIRY_S, SWEEP_S, Repeater, remove_outlived
from app.storage.uploads import remove_unused


def create_app(settings: Settings) -> FastAPI:
    services = compose(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        expire = partial(remove_outlived, services.store.records, services.artifacts, services.searches)
        expire_uploads = partial(
            remove_unused, services.uploads.folders, services.uploads.in_use, settings.upload_retention
        )
        repeaters = [
            Repeater(SWEEP_S, services.upgrade.run),
            Repeater(SWEEP_S, services.reaper.sweep),
            Repeater(EXPIRY_S, expire),
            Repeater(EXPIRY_S, expire_uploads),
        ]
        for repeater in repeaters:
            repeater.start()
        services.inspectors.start()
        services.deliverer.start()
        yield
        await services.deliverer.stop()
        services.inspectors.close()
        for repeater in repeaters:
            repeater.stop()
        await services.watcher.close()
        app.state.tracer.close()
        services.close()

    app = Api(
        title="maskmerge",
        summary="Merges fine-tuned language models by the Fisher information of their mask nodes",
        version=version("maskmerge"),
        lifespan=lifespan,
        openapi_url=None,  # `app.api.docs` has it
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would redirect to whatever host the caller names
        responses=errors.RESPONSES,
        generate_unique_id_function=lambda route: route.name,
        # Its spans and messages quote query strings and exceptions; `Observed` tells less.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.services = services
    app.state.metrics = ApiMetrics(services.store, settings.data_dir)
    app.state.tracer = open_tracer("api")
    app.add_middleware(BodyLimit, limit_bytes=settings.max_body_bytes, upload_bytes=settings.max_upload_bytes)
    app.add_middleware(HeadAsGet)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(
        OwnHosts, names=(settings.host, *settings.allowed_hosts), origins=frozenset(settings.cors_origins)
    )
    app.add_middleware(Proxies, trusted=settings.trusted_proxies)  # the last one added comes first
    for module in (
        merges,
        scores,
        jobs,
        predictions,
        events,
        webhooks,
        artifacts,
        uploads,
        methods,
        keys,
        health,
        metrics,
        docs,
    ):
        app.include_router(module.router)
    for router in routers:
        app.include_router(router)
    app.router.routes.append(mcp.route)
    errors.install(app)
    return app
