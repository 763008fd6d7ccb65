"""What one round asks of cryoSPARC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoiso.core.config import CryosparcSection
from cryoiso.engines.cryosparc.outputs import Shipment

JOB_TYPES = {"homogeneous": "homo_refine_new", "non-uniform": "nonuniform_refine_new", "local": "new_local_refine"}
"""Kind of refinement -> its name in cryoSPARC, from a published plug-in."""


@dataclass(frozen=True)
class Order:
    """What cryoSPARC is to do in a round."""

    section: CryosparcSection
    kind: str
    """Key of ``JOB_TYPES``."""
    params: dict[str, Any]
    title: str
    folder: Path
    shipment: Shipment
    half_maps: dict[int, str]
    """Half -> name of the half-map to bring back; empty: none."""
