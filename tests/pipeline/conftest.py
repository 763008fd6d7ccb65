"""What tests of runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in this process are made by stand-ins, and no signal of one reaches the next."""
    from pipeline_helper import forget_signals, use_quick_parts

    use_quick_parts(monkeypatch)
    yield
    forget_signals()
