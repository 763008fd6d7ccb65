"""Run-time checks of the shapes and number types that signatures name (jaxtyping, beartype).

The annotations are text that nothing evaluates, and jaxtyping is imported for type checkers only, so they cost nothing
where the program runs. ``checked`` gives a function that evaluates them; ``install`` makes every function of the
packages such a function as its module is imported (``pytest --shapes``).
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

import beartype
import jaxtyping

NAMES = {name: getattr(jaxtyping, name) for name in ("Bool", "Complex", "Float", "Int", "Real", "Shaped", "UInt")}
PACKAGES = ("core", "physics", "metrics", "io", "nets", "refine", "methods")


def shaped(function: Callable[..., Any]) -> dict[str, str]:
    """Parameter (or "return") -> annotation, of those that name a shape."""
    texts = inspect.get_annotations(function)
    return {k: v for k, v in texts.items() if isinstance(v, str) and any(f"{name}[" in v for name in NAMES)}


def resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that name a shape, evaluated where the function is defined."""
    scope = {**vars(sys.modules[function.__module__]), **NAMES}
    return {name: eval(text, scope) for name, text in shaped(function).items()}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising jaxtyping.TypeCheckError where arguments or the result have other shapes than it says."""
    if not shaped(function):
        return function
    twin = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(twin, function)
    del twin.__wrapped__
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, resolved(function)
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(twin)


def checked_or_refused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``checked``, but where the function itself refuses its arguments, its own error is raised."""
    strict = checked(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return strict(*args, **options)
        except jaxtyping.TypeCheckError:
            function(*args, **options)
            raise

    return call


def check_module(module: ModuleType) -> int:
    """Replaces the functions and methods that a module defines; gives their number."""
    count = 0
    for owner in (
        module,
        *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__),
    ):
        for name, value in list(vars(owner).items()):
            plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not isinstance(plain, FunctionType) or plain.__module__ != module.__name__ or not shaped(plain):
                continue
            new = checked_or_refused(plain)
            setattr(owner, name, type(value)(new) if isinstance(value, classmethod | staticmethod) else new)
            count += 1
    return count


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        check_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(tuple(f"cryoiso.{p}." for p in PACKAGES)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """From now on modules of the packages are checked as they are imported; those imported before are not."""
    sys.meta_path.insert(0, _Finder())
