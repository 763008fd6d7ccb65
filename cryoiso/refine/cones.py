"""Viewing cones: the sphere of views, modulo a point group, cut into cells of about equal area.

Whatever judges particles judges them among others of their own cone. A cut over all of them keeps the views that the
reference knows best, which are the frequent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryoiso.physics.so3 import so3_directions
from cryoiso.physics.symmetry import point_group

ORDER = 1
"""HEALPix order of the cones' axes: 48 on the whole sphere, 29 degrees apart."""
AT_ONCE = 4096
"""Views that are compared with all axes at once."""


@dataclass(frozen=True)
class ViewCones:
    """Cones about axes of the asymmetric unit; a view belongs to the nearest one, whichever symmetry mate is meant."""

    axes: np.ndarray
    """(C, 3) unit vectors."""
    operations: np.ndarray
    """(g, 3, 3) of the point group."""

    @classmethod
    def of(cls, symmetry: str) -> ViewCones:
        return cls(so3_directions(ORDER, symmetry), point_group(symmetry))

    def __len__(self) -> int:
        return len(self.axes)

    def index(self, rotation: np.ndarray) -> np.ndarray:
        """(n,) int64 cone of the view of each pose (n, 3, 3)."""
        mates = np.concatenate([self.axes @ operation for operation in self.operations])
        views = np.asarray(rotation, np.float64)[:, 2]
        found = [(views[i : i + AT_ONCE] @ mates.T).argmax(1) for i in range(0, len(views), AT_ONCE)]
        return np.concatenate(found or [np.zeros(0, np.int64)]) % len(self)

    def places(self) -> list[dict[str, float]]:
        """Direction of each axis as rot and tilt in degrees."""
        tilt = np.degrees(np.arccos(np.clip(self.axes[:, 2], -1, 1)))
        rot = np.degrees(np.arctan2(self.axes[:, 1], self.axes[:, 0]))
        return [{"rot_deg": round(r, 1), "tilt_deg": round(t, 1)} for r, t in zip(rot.tolist(), tilt.tolist())]


def sums_by_cone(cone: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """(C, ...) sums of values (N, ...) over the particles of each cone, in row order."""
    out = np.zeros((n, *np.shape(values)[1:]))
    np.add.at(out, cone, values)
    return out


def cone_facts(cones: ViewCones, cone: np.ndarray, names: list[str], weight: np.ndarray) -> list[dict[str, Any]]:
    """For every cone with particles: where it is, how many there are, and how their weight is spread.

    Args:
        cone: (N,) of each particle.
        names: M, of the columns of ``weight``.
        weight: (N, M) posterior weight of each particle in each of them.
    """
    counts = np.bincount(cone, minlength=len(cones))
    sums = sums_by_cone(cone, weight, len(cones))
    return [
        {**place, "particles": int(count), **{name: round(float(v), 3) for name, v in zip(names, row)}}
        for place, count, row in zip(cones.places(), counts, sums)
        if count
    ]
