"""The certificate with which the API speaks TLS."""

import logging
import ssl
from pathlib import Path

from app.contracts.settings import Settings

CERTIFICATE, KEY = "MASKMERGE_TLS_CERTIFICATE", "MASKMERGE_TLS_KEY"

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate and its key, as the context of a server that speaks TLS 1.2 or newer.

    Raises ValueError: a file cannot be read, is no PEM, or the key is another certificate's. The message names the
    setting and says what is wrong.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._state = self._current_state()
        self.context = _context(certificate, key)

    @classmethod
    def of(cls, settings: Settings) -> "Certificate | None":
        """Return the certificate that the settings name; None where they name none. Raises ValueError."""
        if settings.tls_certificate is None and settings.tls_key is None:
            return None
        if settings.tls_certificate is None or settings.tls_key is None:
            missing = CERTIFICATE if settings.tls_certificate is None else KEY
            raise ValueError(f"{missing} is not set; a certificate and its key belong together")
        return cls(settings.tls_certificate, settings.tls_key)

    def renew(self) -> None:
        """Take up files that have changed, for new connections. Files that do not do are logged, and left alone."""
        state = self._current_state()
        if state == self._state:
            return
        try:
            _context(*self._files)  # the pair is tried elsewhere first: loading half of it would leave neither
            self.context.load_cert_chain(*self._files)
        except (ValueError, OSError) as error:
            logger.error("the old certificate is kept: %s", error)
        else:
            logger.info("the certificate was renewed")
        self._state = state

    def _current_state(self) -> list[tuple[int, int] | None]:
        """Return what tells a file from the one that takes its place; None for one that is not there."""
        found: list[tuple[int, int] | None] = []
        for file in self._files:
            try:
                stat = file.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_mtime_ns))
        return found


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    _check(CERTIFICATE, certificate, "CERTIFICATE-----", "certificate")
    if "ENCRYPTED" in _check(KEY, key, "PRIVATE KEY-----", "private key"):
        raise ValueError(f"{KEY}: {key} needs a passphrase; give it without one, readable for the service alone")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{KEY}: {key} is not the key of the certificate {certificate}") from error
        raise ValueError(f"{CERTIFICATE}, {KEY}: {certificate} and {key} cannot be used: {error}") from error
    return context


def _check(setting: str, file: Path, mark: str, kind: str) -> str:
    """Return the text of a file that should hold this kind of thing. Raises ValueError."""
    try:
        text = file.read_text("latin-1")
    except OSError as error:
        raise ValueError(f"{setting}: {file}: {error.strerror}") from error
    if mark not in text:
        raise ValueError(f"{setting}: {file} holds no {kind} in PEM (-----BEGIN …)")
    return text
