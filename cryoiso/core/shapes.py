"""Checks of the shapes of maps, images and rotations, for functions that anybody may call.

Without them a wrong shape ends in an error of torch or numpy far from its cause, or in numbers that mean nothing. Only
``shape`` is looked at, so arrays, tensors and memory maps will do.
"""

from __future__ import annotations

from typing import Protocol

from cryoiso.core.errors import InputError


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def require_cube(volume: HasShape, what: str = "a map") -> int:
    """The box D of a map.

    Raises:
        InputError: it is not (D, D, D).
    """
    shape = tuple(volume.shape)
    if len(shape) != 3 or len(set(shape)) != 1:
        raise InputError(f"{what} is a cube", expected="(D, D, D)", found=shape, code="map-not-cubic")
    return int(shape[0])


def require_box(array: HasShape, dims: int) -> int:
    """The box D of images (dims 2) or volumes (dims 3), any number of them.

    Raises:
        InputError: it is not (..., D, D) or (..., D, D, D).
    """
    shape = tuple(array.shape)
    if len(shape) < dims or len(set(shape[-dims:])) != 1:
        what, expected = ("images are squares", "(..., D, D)") if dims == 2 else ("maps are cubes", "(..., D, D, D)")
        raise InputError(what, expected=expected, found=shape, code="arrays-do-not-fit")
    return int(shape[-1])


def require_images(images: HasShape) -> int:
    """The box D of a set of images.

    Raises:
        InputError: they are not (n, D, D).
    """
    shape = tuple(images.shape)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise InputError(
            "a set of images has one square for each image", expected="(n, D, D)", found=shape, code="arrays-do-not-fit"
        )
    return int(shape[-1])


def require_rotations(rotation: HasShape) -> int:
    """The number n of rotations.

    Raises:
        InputError: they are not (n, 3, 3).
    """
    shape = tuple(rotation.shape)
    if len(shape) != 3 or shape[1:] != (3, 3):
        raise InputError(
            "a set of rotations has one matrix for each", expected="(n, 3, 3)", found=shape, code="arrays-do-not-fit"
        )
    return int(shape[0])


def require_like(array: HasShape, other: HasShape, what: str) -> None:
    """Makes sure that an array has the shape of another.

    Raises:
        InputError: it has not.
    """
    if tuple(array.shape) != tuple(other.shape):
        raise InputError(
            f"{what} has another shape", expected=tuple(other.shape), found=tuple(array.shape), code="arrays-do-not-fit"
        )
