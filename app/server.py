"""The API's server."""

import socket

import uvicorn

from app.contracts.settings import Settings
from app.main import create_app


class Server(uvicorn.Server):
    """Ends event streams and long waits before it stops; uvicorn would wait for them, then cut them off.

    Raises ValueError or OSError when the app cannot be made.
    """

    def __init__(self, settings: Settings) -> None:
        app = create_app(settings)
        self._watcher = app.state.services.watcher
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_level=settings.log_level.lower(),
                access_log=False,
                timeout_graceful_shutdown=5,  # a download in progress does not keep the service from stopping
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.stop()
        await super().shutdown(sockets)
