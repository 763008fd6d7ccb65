"""The names that a package offers, imported when they are first used.

Importing a package of cryoiso must not import torch, scipy or numba: the command line shows its help, and reads job
files, without them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562) that take its names from its modules.

    No name may be that of a module of the package: once imported, the module would stand in its place.

    Args:
        package: its ``__name__``.
        modules: module, relative to the package -> names.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value: object = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names
