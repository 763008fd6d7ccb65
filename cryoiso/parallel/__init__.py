"""Ranks: who we are, who owns what, how partial sums become sums, how all stop together. The only home of mpi4py."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.parallel.context import Context, get_context

__all__ = ["Context", "get_context"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "context": ["Context", "get_context"],
        },
    )
