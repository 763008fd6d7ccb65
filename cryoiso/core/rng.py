"""Counter-based random numbers: a draw depends on (seed, purpose, uid) alone, never on rank count, order or
restarts."""

from __future__ import annotations

import hashlib

import numpy as np


def _purpose_key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, purpose: str, uid: int = 0) -> np.random.Generator:
    """A generator of its own for one thing (a particle, an iteration, ...).

    Args:
        seed: the run's seed.
        purpose: what the numbers are for; different purposes are independent.
        uid: 64-bit identity of the particle (or any other counter).
    """
    return np.random.Generator(np.random.Philox(key=[_purpose_key(seed, purpose), int(uid) & 0xFFFFFFFFFFFFFFFF]))


def stable_hash(text: str) -> int:
    """64-bit hash of a text that is the same on every machine and in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shuffle_keys(seed: int, purpose: str, uids: np.ndarray) -> np.ndarray:
    """One pseudo-random 64-bit key a uid, vectorised; sorting by it shuffles independently of the order of rows.

    Args:
        uids: (n,) uint64.

    Returns:
        (n,) uint64, the splitmix64 finaliser of uid + purpose key.
    """
    with np.errstate(over="ignore"):
        z = np.asarray(uids, np.uint64) + np.uint64(_purpose_key(seed, purpose))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
