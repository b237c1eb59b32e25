"""Draws random numbers for single examples."""

import hashlib
import struct


def uniform(seed: int, index: int, label: int = 0) -> float:
    """Draw a number in [0, 1) for one example (and label), which is the same however rows are batched or sharded."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, index, label), digest_size=8).digest()
    return float(struct.unpack("<Q", digest)[0] >> 11) / 2**53
