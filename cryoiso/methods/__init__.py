"""The ideas of the papers, each a method on top of refinement and training."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.methods.anisotropy.correct import Corrected, correct_halves
    from cryoiso.methods.anisotropy.filter import missing_cone
    from cryoiso.methods.anisotropy.settings import Correction
    from cryoiso.methods.assess.measure import diagnose
    from cryoiso.methods.micelle.protein import ProteinMask, protein_mask
    from cryoiso.methods.micelle.recover import MicelleSettings, Recovery, recover_micelle_halves

__all__ = [
    "Corrected",
    "Correction",
    "MicelleSettings",
    "ProteinMask",
    "Recovery",
    "correct_halves",
    "diagnose",
    "missing_cone",
    "protein_mask",
    "recover_micelle_halves",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "anisotropy.correct": ["Corrected", "correct_halves"],
            "anisotropy.filter": ["missing_cone"],
            "anisotropy.settings": ["Correction"],
            "assess.measure": ["diagnose"],
            "micelle.protein": ["ProteinMask", "protein_mask"],
            "micelle.recover": ["MicelleSettings", "Recovery", "recover_micelle_halves"],
        },
    )
