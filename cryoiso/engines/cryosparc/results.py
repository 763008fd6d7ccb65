"""What comes out of a cryoSPARC refinement: particles and half-maps as files of the round, complete or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.core.errors import CryoisoError
from cryoiso.engines.cryosparc.order import Order
from cryoiso.io.atomic import atomic_path

PARTICLES = "particles_out.cs"
LETTER = {1: "A", 2: "B"}
"""Half-set -> letter of cryoSPARC's half-map; alignments3D/split is 0 and 1."""


def take_results(project: Any, job: Any, order: Order) -> None:
    """Writes ``particles_out.cs`` and the half-maps into the folder of the round.

    Raises:
        CryoisoError: particles are missing, or there are no half-maps.
    """
    particles = job.load_output("particles")
    where = f"cryoSPARC {job.project_uid}-{job.uid}"
    require_all(np.asarray(particles["uid"]), order.shipment.rows["uid"], where)
    with atomic_path(order.folder / PARTICLES) as part:
        particles.save(str(part))
    if not order.half_maps:
        return
    volume = job.load_output("volume")
    for half, name in order.half_maps.items():
        field = f"map_half_{LETTER[half]}/path"
        if field not in volume or not str(volume[field][0]):
            raise CryoisoError(
                f"{where}: its volume has no {field}. Set cryosparc.half_maps = 'reconstruct' and start again",
                code="cryosparc-result-invalid",
            )
        with atomic_path(order.folder / name) as part:
            project.download_file(str(volume[field][0]).lstrip(">"), part)


def require_all(uids: np.ndarray, expected_uids: np.ndarray, where: str) -> None:
    """
    Raises:
        CryoisoError: not every particle exactly once.
    """
    lost = np.setdiff1d(expected_uids, uids)
    if len(lost) or len(uids) != len(expected_uids):
        first = f"; the first missing one has uid {lost[0]}" if len(lost) else ""
        raise CryoisoError(
            f"{where} did not return each particle exactly once ({len(expected_uids):,} were given, {len(uids):,} came "
            f"back, {len(lost):,} are missing{first}). It leaves out particles where half-sets differ in size or "
            "alignments fail: see its log",
            code="cryosparc-particles-lost",
        )
