"""Memory that a training frees stays with the process while it goes on."""

from __future__ import annotations

import platform
import resource

import numpy as np
import pytest

from cryoiso.core import allocator
from cryoiso.train import steady_memory
from cryoiso.train.step import training_mode

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="LOUD: no glibc")


def page_faults_of_a_step() -> int:
    """Of taking 200 MiB in blocks of 1 MiB and freeing them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(200)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@needs_glibc
def test_a_step_of_a_training_finds_the_pages_of_the_one_before(monkeypatch):
    for name in ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    page_faults_of_a_step()
    assert page_faults_of_a_step() > 5_000
    with training_mode("cpu"):
        page_faults_of_a_step()
        assert page_faults_of_a_step() < 5_000
    assert page_faults_of_a_step() > 5_000, "what is free has gone back"
    assert page_faults_of_a_step() > 5_000, "and goes back from now on"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(allocator, "_library", None)
    with steady_memory.steady_memory():
        pass


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    monkeypatch.setattr(allocator, "_library", allocator._library.__wrapped__)
    with steady_memory.steady_memory():
        pass
