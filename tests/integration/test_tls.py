"""The API with a certificate: real connections, to a real server."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import trustme
from redis import Redis

from app.contracts.settings import Settings
from app.server import Server
from app.tls import Certificate
from tests.conftest import HANGS_S, REPOSITORY, free_port, wait_until


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    """The settings of a certificate for `localhost`, and the file of the authority that signed it."""
    found = {"tls_certificate": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    write(authority.issue_cert("localhost"), found)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    return found


def write(certificate: trustme.LeafCert, files: dict[str, Path]) -> None:
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    files["tls_certificate"].write_bytes(chain)
    files["tls_key"].write_bytes(certificate.private_key_pem.bytes())


@contextmanager
def served(settings: Settings) -> Iterator[Server]:
    server = Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "the server to listen")
    yield server
    server.should_exit = True
    thread.join(HANGS_S)


@pytest.fixture
def settings(redis: Redis, redis_url: str, tmp_path: Path, files: dict[str, Path]) -> Settings:
    return Settings.model_validate(
        {"redis_url": redis_url, "queue": "tls", "data_dir": tmp_path / "data", "port": free_port(), **files}
    )


def version(settings: Settings, context: ssl.SSLContext) -> str | None:
    with (
        socket.create_connection(("127.0.0.1", settings.port), timeout=HANGS_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.version()


def serial(settings: Settings, context: ssl.SSLContext) -> str:
    with (
        socket.create_connection(("127.0.0.1", settings.port), timeout=HANGS_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        certificate = secured.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])


def test_clients_of_the_authority_are_served_and_no_connection_is_older_than_tls_1_2(
    settings: Settings, authority: trustme.CA, files: dict[str, Path], tmp_path: Path
) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    url = f"https://localhost:{settings.port}"
    with served(settings) as server:
        assert httpx.get(f"{url}/healthz", verify=trusting).json() == {"status": "ok"}
        for tls in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            trusting.minimum_version = trusting.maximum_version = tls
            assert version(settings, trusting) == tls.name.replace("_", ".")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            version(settings, old)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/healthz")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{settings.port}/healthz")

        for address, environment, said in (
            (url, {"SSL_CERT_FILE": str(tmp_path / "authority.pem")}, "there is no job"),
            (url, {}, "SSL_CERT_FILE names"),
            (url.replace("https:", "http:"), {}, "if it speaks TLS, its URL begins with https://"),
        ):
            command = [sys.executable, "-m", "app.cli", "download", "0" * 28, "--url", address]
            command += ["--output", str(tmp_path / "o")]
            variables = {**os.environ, **environment}
            done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
            assert done.returncode != 0
            assert said in done.stderr

        modern = ssl.create_default_context()
        authority.configure_trust(modern)
        first = serial(settings, modern)
        kept = server._certificate
        assert kept is not None
        files["tls_key"].write_text("half written")
        kept.renew()
        assert serial(settings, modern) == first, "a certificate without its key takes nobody's place"
        write(authority.issue_cert("localhost"), files)
        kept.renew()
        assert serial(settings, modern) != first


def test_clients_that_do_not_agree_on_tls_are_cut_off_soon_and_disturb_nobody(
    settings: Settings, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.server.HANDSHAKE_S", 0.5)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with served(settings), ExitStack() as stalling:
        silent = [
            stalling.enter_context(socket.create_connection(("127.0.0.1", settings.port), timeout=HANGS_S))
            for _ in range(50)
        ]
        assert httpx.get(f"https://localhost:{settings.port}/healthz", verify=trusting).json() == {"status": "ok"}
        for connection in silent:
            assert connection.recv(1) == b""


def test_the_service_on_tls_says_that_it_is_ready(settings: Settings, files: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--data-dir",
        str(tmp_path / "own"),
        "--port",
        str(free_port()),
    ]
    variables = {f"MASKMERGE_{name.upper()}": str(path) for name, path in files.items()}
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **variables}, stderr=stream)
    try:
        wait_until(lambda: process.poll() is not None or "ready on https://127.0.0.1" in log.read_text(), "its message")
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(HANGS_S)


def test_files_that_do_not_do_keep_the_service_from_starting_and_the_message_says_why(
    settings: Settings, authority: trustme.CA, files: dict[str, Path], tmp_path: Path
) -> None:
    def refused(**changes: Path | None) -> str:
        with pytest.raises(ValueError, match="MASKMERGE_TLS_") as error:
            Server(settings.model_copy(update=changes))
        return str(error.value)

    assert refused(tls_key=None) == "MASKMERGE_TLS_KEY is not set; a certificate and its key belong together"
    assert "MASKMERGE_TLS_CERTIFICATE is not set" in refused(tls_certificate=None)
    assert "No such file" in refused(tls_key=tmp_path / "absent.pem")
    assert "directory" in refused(tls_certificate=tmp_path)
    assert "holds no certificate in PEM" in refused(tls_certificate=files["tls_key"])
    assert "holds no private key in PEM" in refused(tls_key=files["tls_certificate"])
    other = {name: tmp_path / f"other-{name}" for name in files}
    write(authority.issue_cert("localhost"), other)
    assert "is not the key of the certificate" in refused(tls_key=other["tls_key"])
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    assert "cannot be used" in refused(tls_certificate=damaged)
    openssl = shutil.which("openssl")
    assert openssl is not None, "it comes with every system that Python's ssl comes with"
    locked = tmp_path / "locked.pem"
    command = [openssl, "pkey", "-in", str(files["tls_key"]), "-out", str(locked), "-aes128", "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True)
    assert "needs a passphrase" in refused(tls_key=locked)
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--data-dir",
        str(tmp_path / "own"),
        "--port",
        str(free_port()),
    ]
    variables = {"MASKMERGE_TLS_CERTIFICATE": str(files["tls_certificate"]), "MASKMERGE_TLS_KEY": str(other["tls_key"])}
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "is not the key of the certificate" in done.stderr) == (1, True), done.stderr
    assert Certificate.of(settings) is not None
    assert Certificate.of(Settings()) is None
