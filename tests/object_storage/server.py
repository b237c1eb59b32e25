"""Object storage for tests: the server of moto, which speaks S3, and a proxy that fails as networks and disks do."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer

from tests.conftest import wait_until

KEYS = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
CHUNK_BYTES = 4096
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class ObjectServer:
    """A server at `url`, and the same behind a proxy at `proxy.url`.

    Args:
        url: the server's.
    """

    def __init__(self, url: str, *, counts_uploads: bool = True) -> None:
        self.url = url
        self.counts_uploads = counts_uploads
        self.proxy = Proxy(url)
        self.client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def answers(self) -> bool:
        try:
            httpx.get(self.url)
        except httpx.TransportError:
            return False
        return True

    def make(self, *buckets: str) -> None:
        for bucket in buckets:
            self.client.create_bucket(Bucket=bucket)

    def put(self, place: str, source: Path) -> None:
        """Store a folder's files below a place, `BUCKET/KEY`, or one file there."""
        bucket, _, key = place.partition("/")
        if source.is_file():
            self.client.put_object(Bucket=bucket, Key=key, Body=source.read_bytes())
            return
        for path in source.rglob("*"):
            if path.is_file():
                self.put(f"{place}/{path.relative_to(source)}", path)

    def keys(self, bucket: str) -> list[str]:
        return sorted(one["Key"] for one in self.client.list_objects_v2(Bucket=bucket).get("Contents", []))

    def has_unfinished(self, bucket: str) -> bool:
        """Return whether there are uploads in parts that were neither completed nor removed; s3rver cannot say."""
        return self.counts_uploads and "Uploads" in self.client.list_multipart_uploads(Bucket=bucket)


@contextmanager
def moto() -> Iterator[ObjectServer]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = ObjectServer(f"http://{host}:{port}")
    yield found
    found.proxy.close()
    server.stop()


class Proxy:
    """Passes connections on, and does harm to the answers on demand.

    `failures` is the number of requests that are answered with 503; `cuts` is that of answers that are cut off in the
    middle; `is_stalled` holds everything back; `pause_s` passes between two chunks of 4 kB.
    """

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heal()
        Thread(target=self._accept, daemon=True).start()

    def heal(self) -> None:
        self.failures = self.cuts = 0
        self.is_stalled = False
        self.pause_s = 0.0

    def close(self) -> None:
        self.heal()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server, suppress(OSError):
            Thread(target=self._answer, args=(server, client), daemon=True).start()
            while request := client.recv(1 << 20):
                self._wait()
                if self.failures and request.split(b" ", 1)[0] in (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"):
                    self.failures -= 1
                    client.sendall(BUSY)
                    return
                server.sendall(request)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while answer := server.recv(CHUNK_BYTES if self.pause_s or self.cuts else 1 << 20):
                self._wait()
                if self.cuts and len(answer) == CHUNK_BYTES:  # in the middle of something long
                    self.cuts -= 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                time.sleep(self.pause_s)
                client.sendall(answer)
            client.shutdown(socket.SHUT_WR)

    def _wait(self) -> None:
        while self.is_stalled:
            time.sleep(0.01)


@contextmanager
def s3rver() -> Iterator[ObjectServer]:
    """A second server, of Node, which checks signatures, their expiry and ranges.

    `npm install --prefix DIR s3rver` brings it, and `DIR/node_modules/.bin` must be on the PATH.
    """
    program = shutil.which("s3rver")
    if program is None:
        pytest.skip("s3rver is not on the PATH, which is a program of Node")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        command = [program, "-d", folder, "-a", "127.0.0.1", "-p", str(port), "--no-vhost-buckets", "-s"]
        process = subprocess.Popen(command)
        found = ObjectServer(f"http://127.0.0.1:{port}", counts_uploads=False)
        try:
            wait_until(found.answers, "s3rver to answer")
            yield found
        finally:
            found.proxy.close()
            process.terminate()
            process.wait()


PROGRAMS = {"moto": moto, "s3rver": s3rver}
"""All servers, by name."""


def set_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the keys to any server."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
