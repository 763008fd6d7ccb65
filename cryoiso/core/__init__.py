"""Vocabulary of the project: types, units, errors, configuration, random numbers, logging, protocols. No files, no
ranks."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.core.config import RefineSection
    from cryoiso.core.errors import CryoisoError, InputError, Interrupted, MissingError, UsageError
    from cryoiso.core.protocols import (
        Communicator,
        HalfMaps,
        ImageSource,
        ReferenceCorrection,
        RefineRequest,
        RefineResult,
    )
    from cryoiso.core.types import DensityMap, OpticsGroup, Particles

__all__ = [
    "Communicator",
    "CryoisoError",
    "DensityMap",
    "HalfMaps",
    "ImageSource",
    "InputError",
    "Interrupted",
    "MissingError",
    "OpticsGroup",
    "Particles",
    "ReferenceCorrection",
    "RefineRequest",
    "RefineResult",
    "RefineSection",
    "UsageError",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "config": ["RefineSection"],
            "errors": ["CryoisoError", "InputError", "Interrupted", "MissingError", "UsageError"],
            "protocols": [
                "Communicator",
                "HalfMaps",
                "ImageSource",
                "ReferenceCorrection",
                "RefineRequest",
                "RefineResult",
            ],
            "types": ["DensityMap", "OpticsGroup", "Particles"],
        },
    )
