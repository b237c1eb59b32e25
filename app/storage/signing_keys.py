"""The key that signs the provenance of artifacts: a private key in PEM, in a file of this machine."""

import json
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from app.contracts.provenance import PAYLOAD_TYPE

KINDS = "Ed25519, ECDSA (P-256, P-384, P-521) and RSA"


class SigningKey:
    """Signs statements.

    Args:
        path: file of the private key, without a passphrase.

    Raises:
        ValueError: the file cannot be read, or holds no key that signs.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._signer = CryptoSigner(load_pem_private_key(path.read_bytes(), None))
        except OSError as error:
            raise ValueError(f"MASKMERGE_SIGNING_KEY: {path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # their words may quote the file
            problem = f"holds no private key in PEM without a passphrase; {KINDS} sign"
            raise ValueError(f"MASKMERGE_SIGNING_KEY: {path} {problem}") from error

    def signed(self, statement: bytes) -> bytes:
        """Return the envelope of a statement, as one line of JSON."""
        envelope = Envelope(statement, PAYLOAD_TYPE, {})
        envelope.sign(self._signer)
        return json.dumps(envelope.to_dict(), separators=(",", ":")).encode() + b"\n"


def verified(envelope: bytes, public_key: bytes) -> bytes:
    """Return the statement in an envelope that the owner of a key has signed.

    Args:
        public_key: the public key, in PEM.

    Raises:
        ValueError: the key or the envelope cannot be read, or another key or nobody signed these bytes.
    """
    try:
        key = SSlibKey.from_crypto(load_pem_public_key(public_key))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"the key is no public key in PEM; {KINDS} verify") from error
    try:
        found = Envelope.from_dict(json.loads(envelope))
    except Exception as error:  # whatever a malformed envelope makes the library raise
        raise ValueError("the signature is no DSSE envelope") from error
    if found.payload_type != PAYLOAD_TYPE:
        raise ValueError(f"the signature is of {found.payload_type}, not of {PAYLOAD_TYPE}")
    # Envelopes name a key by whatever its signer calls it, so the name does not count (DSSE has it as a hint).
    for signature in found.signatures.values():
        signature.keyid = key.keyid
        try:
            Envelope(found.payload, found.payload_type, {key.keyid: signature}).verify([key], 1)
        except VerificationError:
            continue
        return found.payload
    raise ValueError("this key did not sign it")
