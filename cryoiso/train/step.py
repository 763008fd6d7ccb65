"""One optimisation step on a CPU or a GPU: autocast, compilation, clipping, and skipping what is not finite.

A GPU is never waited for: whether a step is good is decided there, and its numbers are read one step later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cryoiso.core.log import logger
from cryoiso.core.rng import stable_hash
from cryoiso.parallel.pairwise_sum import sum_in_pairs
from cryoiso.train.steady_memory import steady_memory


class Stepper:
    """A module with its optimiser."""

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        learning_rate: float,
        clip_norm: float,
        amp: bool,
        *,
        parts: bool = False,
    ) -> None:
        """
        Args:
            module: on the group's device.
            group: parallel.ddp.TrainingGroup.
            clip_norm: gradients longer than this are shortened to it; 0: never.
            amp: the module's forward pass in bfloat16 where it is safe.
            parts: steps are made by ``in_parts`` and not by calls.
        """
        self.module, self.group, self.clip_norm = module, group, clip_norm
        self.on_gpu = torch.device(group.device).type == "cuda"
        self.amp = amp
        self.optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True)
        # gradients of parts are added up over the group here and not by what wraps the module
        self.wrapped = self.in_autocast(group.spread(module) if parts else group.wrap(module))
        self.layout: dict[str, tuple[int, ...]] = {}

    def set_rate(self, learning_rate: float) -> None:
        """Learning rate of the next steps."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate

    def __call__(self, loss_of: Callable[[nn.Module], Any], share: float, flags: Callable[[], list[float]]) -> Tensor:
        """Makes one step, unless loss or gradient are not finite.

        Args:
            loss_of: module -> (loss, terms), means over this rank's images.
            share: this rank's fraction of the images of the step.
            flags: numbers to be added up over the group; asked for when the gradient is there.

        Returns:
            float64 vector, the same on every rank: flags, loss, terms (means over all images of the step; their
            shapes are in ``layout``), norm of the gradient, 1 if the step was skipped.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss, terms = loss_of(self.wrapped)
        (loss * (share * self.group.size)).backward()
        numbers = share * self._values(loss, terms)
        flag_values = flags()
        return self._finish(self.group.all_sum(_after(flag_values, numbers)), len(flag_values))

    def in_parts(
        self,
        loss_of: Callable[[nn.Module, int], Any],
        sizes: Sequence[int],
        images: int,
        flags: Callable[[], list[float]],
    ) -> Tensor:
        """Makes one step like a call, from parts of this rank's images whose gradients are added in pairs.

        Sums over images are added up, and divided once at the end: a mean of means rounds differently when the images
        are divided among the ranks in another way.

        Args:
            loss_of: (module, number of the part) -> (loss, terms), means over the images of the part.
            sizes: images in each of this rank's parts.
            images: of the step, on all ranks.
            flags: as for a call.
        """
        parameters = [p for p in self.module.parameters() if p.requires_grad]

        def part(i: int) -> list[Tensor]:
            self.optimiser.zero_grad(set_to_none=True)
            loss, terms = loss_of(self.wrapped, i)
            (loss * sizes[i]).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            return [sizes[i] * self._values(loss, terms), *gradients]

        sums, *gradients = sum_in_pairs(part, 0, len(sizes))
        self.group.sum_gradients(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.div_(images)
        flag_values = flags()
        numbers = self.group.all_sum(_after(flag_values, sums))
        numbers[len(flag_values) :] /= images
        return self._finish(numbers, len(flag_values))

    def _finish(self, numbers: Tensor, at: int) -> Tensor:
        """Clips and applies the gradient, unless it or the loss, number ``at``, is not finite."""
        norm = self._clipped()
        bad = ~(torch.isfinite(numbers[at]) & torch.isfinite(norm))
        if self.on_gpu:
            self.optimiser.found_inf = bad.float()  # type: ignore[attr-defined]  # the fused kernel reads it
            self.optimiser.step()
        elif not bad:
            self.optimiser.step()
        return torch.cat([numbers, norm.detach().double().view(1), bad.double().view(1)])

    def _clipped(self) -> Tensor:
        """The gradient's norm, before the gradient is shortened."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm: Tensor = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip_norm, norm)
        return norm

    def in_autocast(self, module: nn.Module) -> nn.Module:
        """The module with autocast in its forward pass alone: projections and losses need all their digits."""
        return _Autocast(module, torch.device(self.group.device).type) if self.amp else module

    def _values(self, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        self.layout = {name: tuple(value.shape) for name, value in terms.items()}
        return torch.cat([_beside(value.detach().double().reshape(-1), loss) for value in (loss, *terms.values())])


def _after(flag_values: list[float], numbers: Tensor) -> Tensor:
    return torch.cat([_beside(torch.tensor(flag_values, dtype=torch.float64), numbers), numbers])


def _beside(values: Tensor, other: Tensor) -> Tensor:
    """On the device of the other tensor, without waiting for that device."""
    if values.device == other.device:
        return values
    return values.pin_memory().to(other.device, non_blocking=True)


class _Autocast(nn.Module):
    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with torch.autocast(self.kind, torch.bfloat16):
            return self.inner(*inputs, **options)


class Readback:
    """Numbers of steps on their way from the device, in order; those of a GPU arrive one step late."""

    def __init__(self, on_gpu: bool) -> None:
        self._late = 1 if on_gpu else 0
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()

    def push(self, step: int, numbers: Tensor) -> None:
        if not self._late:
            self._waiting.append((step, numbers, None))
            return
        there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        there.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((step, there, event))

    def pop(self, everything: bool = False) -> Iterator[tuple[int, list[float]]]:
        """(step, numbers) of the steps that are due, or of all."""
        while len(self._waiting) > (0 if everything else self._late):
            step, numbers, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            yield step, numbers.tolist()


def try_compiled(stepper: Stepper, loss_of: Callable[[nn.Module], Any]) -> bool:
    """Compiles the module and tries it forward and backward; falls back to the plain one with a warning."""
    module = stepper.module
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    try:
        module.compile()
        loss, _ = loss_of(stepper.in_autocast(module))
        loss.backward()
        return True
    except Exception as error:
        module._compiled_call_impl = None
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("torch.compile does not work here (%s); training goes on without it", first)
        return False
    finally:
        module.zero_grad(set_to_none=True)
        for name, value in module.named_buffers():
            value.copy_(buffers[name])


def channels_last_of(module: nn.Module) -> torch.memory_format:
    """The layout with the channels last for the weights of this module: of volumes if it has any, else of images."""
    volumes = any(parameter.ndim == 5 for parameter in module.parameters())
    return torch.channels_last_3d if volumes else torch.channels_last


def seed_torch(*what: Any) -> None:
    """Seeds torch's generators from a few plain values."""
    torch.manual_seed(stable_hash("/".join(map(str, what))))


@contextmanager
def training_mode(device: str) -> Iterator[None]:
    """TF32 and tuned convolutions on GPUs, steady memory on CPUs inside; precision and random numbers are put back
    afterwards."""
    on_gpu = torch.device(device).type == "cuda"
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        if on_gpu:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        memory = nullcontext() if on_gpu else steady_memory()
        with torch.random.fork_rng([torch.device(device)] if on_gpu else []), memory:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
