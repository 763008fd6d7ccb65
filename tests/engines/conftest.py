"""Particle sets and servers that tests of several engines share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 simulated particles in two half-sets, with truth.star and truth_map.mrc; not written to."""
    from pipeline_helper import cryoiso_here

    folder = tmp_path_factory.mktemp("data")
    words = ("--n", 60, "--box", 24, "--pixel-size", 7, "--snr-db", 10, "--halves")
    assert cryoiso_here("simulate", "phantom", folder, *words).returncode == 0
    return folder


@pytest.fixture
def server(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for cryoSPARC whose refinements find the true poses."""
    import cryosparc_stand_in as stand_in
    from cryosparc_helper import truth_of

    stand_in_server = stand_in.Server(tmp_path / "P1", truth_of(data))
    monkeypatch.setattr("cryosparc.tools.CryoSPARC", stand_in_server.session)
    return stand_in_server
