"""An even subset of the views: every cone of views keeps at most as many particles as the cap says, the best ones.

A cut on quality over the whole set takes rare views first, since their references are the weakest and their poses the
least certain. Here particles compete only with those of their own cone, and a cone below the cap loses none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import Particles
from cryoiso.methods.assess.directional import sampling
from cryoiso.metrics.orientation import view_distribution
from cryoiso.metrics.view_cones import ViewCones, ranks


@dataclass(frozen=True)
class Rebalanced:
    """Which particles are kept, and how that was decided."""

    keep: np.ndarray
    """(n,) bool"""
    cap: int
    """Most particles of a cone, both half-sets together."""
    cones: ViewCones
    cone: np.ndarray
    """(n,) cone of each particle."""

    def counts(self, which: np.ndarray | None = None) -> np.ndarray:
        """(cones,) particles of each cone; of those where ``which`` (n,) is true."""
        return np.bincount(self.cone if which is None else self.cone[which], minlength=len(self.cones))


def rebalance(
    particles: Particles,
    symmetry: str,
    *,
    cap: int | None = None,
    keep: float | None = None,
    quality: np.ndarray | None = None,
    cone_deg: float = 10.0,
    seed: int = 1,
) -> Rebalanced:
    """Chooses the subset. Of a cone above the cap each half-set keeps the same number, as far as it has as many.

    Args:
        particles: n, with poses; half-set numbers count where there are any.
        symmetry: views are counted modulo this point group.
        cap: most particles of a cone.
        keep: instead of ``cap``, the fraction of all particles to keep at least: the cap is the smallest that does.
        quality: (n,) higher is better; None: particles are drawn at random.
        cone_deg: width of a cone.
        seed: of the draw, and of the order of particles of equal quality.

    Raises:
        InputError: no poses, both or neither of ``cap`` and ``keep``, or one of them out of range.
    """
    if (cap is None) == (keep is None):
        raise InputError(
            "a cap and a fraction to keep exclude each other, and one of them is needed",
            expected="cap or keep",
            code="options-conflict",
        )
    if (cap is not None and cap < 1) or (keep is not None and not 0 < keep <= 1):
        raise InputError("impossible size of the subset", expected="cap of 1 or more, or keep above 0 and at most 1",
                         found=f"cap {cap}, keep {keep}", code="option-out-of-range")  # fmt: skip
    rotation, _ = particles.require_poses()
    cones = ViewCones.with_step(cone_deg, symmetry)
    cone = cones.index(rotation[:, 2])
    if cap is None:
        assert keep is not None
        cap = cap_for(np.bincount(cone), keep)
    half = np.zeros(len(particles), np.int64) if particles.half is None else particles.half.astype(np.int64)
    values = np.zeros(len(particles)) if quality is None else quality
    place = ranks(3 * cone + half, values, shuffle_keys(seed, "rebalance", particles.uid))
    return Rebalanced(place < _quotas(cone, half, cap, len(cones))[cone, half], cap, cones, cone)


def cap_for(counts: np.ndarray, keep: float) -> int:
    """The smallest cap on ``counts`` (cones,) at which a fraction ``keep`` of all is left."""
    low, high = 1, max(int(counts.max()), 1)
    while low < high:
        middle = (low + high) // 2
        if np.minimum(counts, middle).sum() >= keep * counts.sum():
            high = middle
        else:
            low = middle + 1
    return low


def _quotas(cone: np.ndarray, half: np.ndarray, cap: int, cones: int) -> np.ndarray:
    """(cones, 3) particles that each cone keeps of those without a half-set, of half-set 1 and of half-set 2.

    Half-sets share a cap evenly; of an odd one, either has the odd particle in turn. Where one has fewer than its share
    the other fills up.
    """
    n = np.bincount(3 * cone + half, minlength=3 * cones).reshape(cones, 3)
    quota = np.minimum(n, cap)
    room = np.maximum(cap - quota[:, 0], 0)
    first, second = n[:, 1], n[:, 2]
    odd = (room % 2 == 1) & (first > room // 2) & (second > room // 2)
    share = room // 2 + (odd & (np.cumsum(odd) % 2 == 1))
    quota[:, 1] = np.minimum(first, np.maximum(share, room - second))
    quota[:, 2] = np.minimum(second, room - quota[:, 1])
    return quota


def facts(chosen: Rebalanced, particles: Particles, quality: np.ndarray | None = None) -> dict[str, Any]:
    """Counts by cone, and numbers on views and sampling before and after, for a JSON file.

    Keys: particles, kept, discarded, cap, symmetry, halves, cones (axis, before, after), cones_capped, cones_empty;
    before and after: views (`metrics.orientation.ViewDistribution.summary`), sampling (scf, scf_star, scf_star_even,
    empty_fraction, efficiency); quality: medians of kept and discarded particles.
    """
    before, after = chosen.counts(), chosen.counts(chosen.keep)
    record: dict[str, Any] = {
        "particles": len(particles),
        "kept": int(chosen.keep.sum()),
        "discarded": int((~chosen.keep).sum()),
        "cap": chosen.cap,
        "symmetry": chosen.cones.symmetry,
        "cones_capped": int((before > chosen.cap).sum()),
        "cones_empty": int((before == 0).sum()),
        "halves": {
            name: None if particles.half is None else [int((particles.half[rows] == h).sum()) for h in (1, 2)]
            for name, rows in (("before", slice(None)), ("after", chosen.keep))
        },
    }
    for name, part in (("before", particles), ("after", particles.take(chosen.keep))):
        record[name] = _of_views(part, chosen.cones.symmetry)
    if quality is not None:
        record["quality_median"] = {
            name: float(np.median(quality[rows])) if rows.any() else None
            for name, rows in (("kept", chosen.keep), ("discarded", ~chosen.keep))
        }
    record["cones"] = [
        {"axis": [round(float(x), 5) for x in axis], "before": int(b), "after": int(a)}
        for axis, b, a in zip(chosen.cones.axes, before, after, strict=True)
    ]
    return record


def _of_views(particles: Particles, symmetry: str) -> dict[str, Any]:
    rotation, _ = particles.require_poses()
    numbers = sampling(rotation, symmetry)
    names = ("n", "scf", "scf_star", "scf_star_even", "empty_fraction", "efficiency")
    return {
        "views": view_distribution(rotation, symmetry).summary(),
        "sampling": {name: numbers[name] for name in names},
    }
