"""Refinement programs behind one protocol (core.protocols.Engine)."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.engines.by_command.engine import CommandEngine
    from cryoiso.engines.cryosparc.engine import CryosparcEngine
    from cryoiso.engines.native import NativeEngine
    from cryoiso.engines.relion.engine import RelionEngine

__all__ = ["CommandEngine", "CryosparcEngine", "NativeEngine", "RelionEngine"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "by_command.engine": ["CommandEngine"],
            "cryosparc.engine": ["CryosparcEngine"],
            "native": ["NativeEngine"],
            "relion.engine": ["RelionEngine"],
        },
    )
