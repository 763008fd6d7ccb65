"""Identity of a refinement: everything that affects its result; see ``core.identity``."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryoiso import __version__
from cryoiso.core.identity import MARK, Identity, digest_of, of_images, of_map, of_particles, plain
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import HALVES

if TYPE_CHECKING:
    from cryoiso.refine.model import Model
    from cryoiso.refine.search import SearchPlan

ONLY_WHEN = ("max_iterations",)
"""Settings that determine when a refinement ends; it may be continued with other values."""


def of_request(request: RefineRequest, diameter_A: float | None, *, ordered: bool = False) -> Identity:
    """Everything that affects an engine's result, except the number of iterations.

    Args:
        diameter_A: as used by the engine.
        ordered: whether the order of the rows affects the engine.
    """
    grey_scale = {} if request.grey_scale is None else {"grey scale": request.grey_scale}
    settings = {k: v for k, v in request.settings.model_dump().items() if k not in ONLY_WHEN and k != "local_deg"}
    source, halves = request.source, request.half_references
    correction: Any = request.correction
    return {
        "particles": of_particles(source.particles, poses=request.local_deg is not None, ordered=ordered),
        "images": _volumes(source) if getattr(source, "dimensions", 2) == 3 else of_images(source),
        "box_px": source.box_px,
        "symmetry": request.symmetry,
        "reference": of_map(request.reference),
        "half references": "none"
        if halves is None
        else {str(half): of_map(half_map) for half, half_map in halves.items()},
        "mask": of_map(request.mask),
        "lowpass_A": request.lowpass_A,
        "diameter_A": diameter_A,
        "local_deg": request.local_deg,
        "seed": request.seed,
        "settings": settings,
        "intensities": _intensities(request),
        "auxiliary": _auxiliary(request),
        "correction": "none" if correction is None else getattr(correction, "identity", correction.facts)(),
        **grey_scale,
    }


def of_iteration(request: RefineRequest, identity: Identity, model: Model, plan: SearchPlan, centre_px: Any) -> str:
    """Digest of everything that the posteriors of an iteration depend on, except the batch.

    Args:
        identity: of the refinement.
        centre_px: (N, 2) places of the images' contents that were known before any search.
    """
    grid = (plan.rotations.cpu().numpy(), plan.shifts_px.cpu().numpy())
    rest = replace(plan, rotations=torch.empty(0), shifts_px=torch.empty(0))
    from cryoiso.refine.search import ARITHMETIC

    return digest_of(
        __version__, ARITHMETIC, asdict(model.state), model.sigma2, *(model.references[half] for half in HALVES),
        *grid, rest, request.source.particles.uid, request.settings.padding, centre_px, plain(identity),
        model.intensity.scale, model.intensity.noise,
        *(model.views.get(half, np.zeros(0)) for half in HALVES),
        *([] if request.settings.image_mask == "none" else [model.shift_A]),
    )  # fmt: skip


def _intensities(request: RefineRequest) -> str:
    """Digest of the micrographs, which group the intensities if these are estimated, and of those that a local search
    starts with."""
    p = request.source.particles
    used = [p.micrograph] if request.settings.scale != "none" else []
    used += [p.signal_scale, p.noise_level] if request.local_deg is not None else []
    order = np.argsort(p.uid, kind="stable")
    arrays = ["none" if values is None else values[order] for values in used]
    return "none" if all(isinstance(a, str) for a in arrays) else MARK + digest_of(*arrays)


def _auxiliary(request: RefineRequest) -> Any:
    if request.auxiliary is None:
        return "none"
    uids = np.sort(request.source.particles.uid[request.auxiliary])
    identity = {"uids": MARK + digest_of(uids), "weight": request.auxiliary_weight}
    if request.auxiliary_weight == "measured":
        identity["homologue"] = of_map(request.homologue)
    return identity


def _volumes(source: Any) -> str:
    """Digest of the table of subtomograms, which identifies them: only the engine's program reads the volumes."""
    table = source.particles.table
    order = source.particles.uid.argsort(kind="stable")
    return MARK + digest_of(*(f"{name} {table[name].iloc[order].tolist()}" for name in sorted(table.columns)))
