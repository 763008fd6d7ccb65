"""Mathematics of the native engine: likelihood, search, maximisation, reconstruction, the loop over iterations."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.refine.full_map import FullReconstruction, reconstruct_full
    from cryoiso.refine.reconstruct import reconstruct_halves, reconstruct_references

__all__ = ["FullReconstruction", "reconstruct_full", "reconstruct_halves", "reconstruct_references"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "full_map": ["FullReconstruction", "reconstruct_full"],
            "reconstruct": ["reconstruct_halves", "reconstruct_references"],
        },
    )
