"""Random numbers of single examples."""

import hashlib
import struct


def uniform(seed: int, index: int, label: int = 0) -> float:
    """A number in [0, 1) for one example (and label): the same however rows are batched or sharded."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, index, label), digest_size=8).digest()
    return float(struct.unpack("<Q", digest)[0] >> 11) / 2**53
