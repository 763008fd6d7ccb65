"""Batches made ahead of time in a thread of their own, and on GPUs copied there meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
_PATIENCE_S = 30.0
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Prefetcher:
    """Calls ``prepare(step)`` for step after step in a thread, a few steps ahead of ``get``.

    All reading of images happens in that thread while this is open: HDF5 and numba bear one user at a time.
    """

    def __init__(
        self, prepare: Callable[[int], Any], start: int, stop: int, device: str, *, channels_last: bool = False
    ) -> None:
        """
        Args:
            prepare: makes the batch of a step: tensors, or tuples, lists, dicts or dataclasses of them.
            start, stop: first step, and the one after the last.
            device: where the tensors of a batch go.
            channels_last: store 4-d and 5-d tensors with the channels last.
        """
        self._prepare, self._steps, self._channels_last = prepare, range(start, stop), channels_last
        self._device = torch.device(device)
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(_PATIENCE_S)

    def get(self) -> Any:
        """The batch of the next step; raises what ``prepare`` raised."""
        batch, event, error = self._ready.get()
        if error is not None:
            raise error
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            return _each_tensor(batch, lambda tensor: _used_on(stream, tensor))
        return batch

    def _work(self) -> None:
        try:
            with torch.no_grad():
                if self._device.type == "cuda":
                    self._work_on_gpu()
                else:
                    for step in self._steps:
                        if not self._put(self._move(self._prepare(step)), None):
                            return
        except BaseException as error:
            self._put(None, None, error)

    def _work_on_gpu(self) -> None:
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            for step in self._steps:
                batch = self._move(self._prepare(step))
                event = torch.cuda.Event()
                event.record()
                if not self._put(batch, event):
                    return

    def _put(self, *item: Any) -> bool:
        """Hands an item over; False once nobody wants it."""
        while not self._ended.is_set():
            try:
                self._ready.put((*item, None)[:3], timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _move(self, batch: Any) -> Any:
        return _each_tensor(batch, self._to_device)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._channels_last and tensor.ndim in _LAYOUTS:
            tensor = tensor.contiguous(memory_format=_LAYOUTS[tensor.ndim])
        if self._device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def _used_on(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Tells the allocator that a tensor of another stream is in use on this one."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
    return tensor


def part_of(batch: Any, start: int, stop: int, images: int) -> Any:
    """Some of the images of a batch: a copy of rows start..stop - 1 of every tensor and array in it.

    A copy, because some libraries' last bits depend on where in memory a number lies.

    Args:
        images: in the batch. Numbers, text, None and tensors and arrays without an axis are the same for all.

    Raises:
        ValueError: something else is in the batch, or an axis of another length.
    """

    def cut(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)) or getattr(value, "ndim", None) == 0:
            return value
        if not isinstance(value, (Tensor, np.ndarray)) or len(value) != images:
            description = f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}"
            raise ValueError(f"a batch of {images} images cannot be divided: it holds a {description}")
        rows = value[start:stop]
        return rows.clone() if isinstance(rows, Tensor) else rows.copy()

    return _each_leaf(batch, cut)


def _each_tensor(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with ``function`` applied to each tensor in it."""
    return _each_leaf(value, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def _each_leaf(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same tuples, lists, dicts and dataclasses with ``function`` applied to all else in them."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each_leaf(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_each_leaf(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _each_leaf(v, function) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _each_leaf(getattr(value, f.name), function) for f in fields(value)})
    return function(value)
