"""An interrupted iteration of the native engine searches no batch twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from mpi_helper import run_mpi
from test_refine_engine import DIAMETER_A, RANKS_SCRIPT, StoppingContext, contents, request_for, small_set

from cryoiso.core.errors import Interrupted
from cryoiso.core.protocols import RefineRequest
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context
from cryoiso.refine import batches, expectation, search, search_cache
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.iterate import Refinement


@pytest.fixture(scope="module")
def few() -> ArraySource:
    return small_set()


class Counting(search.Searcher):
    """Notes which batches are searched."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def search(self, batch, white, given=None):
        self.seen.append((int(batch.rows[0]), len(batch)))
        return super().search(batch, white, given)


@pytest.fixture
def searched(monkeypatch) -> list[tuple[int, int]]:
    """(first row, images) of every batch that is searched from now on; batches of 16."""
    monkeypatch.setattr(expectation, "Searcher", Counting)
    monkeypatch.setattr(Counting, "seen", [])
    monkeypatch.setattr(batches, "BATCH_IMAGES", 16)
    return Counting.seen


ONCE = {"max_iterations": 2, "healpix_order": 1}


def straight_run(few, folder: Path, searched: list) -> tuple[dict[str, str], list]:
    """Contents of an uninterrupted refinement and what it searched."""
    NativeEngine().refine(request_for(few, folder, **ONCE), Context())
    whole = list(searched)
    searched.clear()
    return contents(folder), whole


def stopped(request: RefineRequest, after: int) -> list[Path]:
    """Stops a refinement after so many batches and more; what it put aside of the iteration."""
    with pytest.raises(Interrupted, match="what was found so far is kept"):
        NativeEngine().refine(request, StoppingContext(after))
    return sorted((request.folder / "checkpoint").glob("searched-*"))


def test_an_interrupted_iteration_searches_no_batch_twice(few, searched, tmp_path, caplog):
    """Stopped twice in the first iteration and once in the second: the same bits, and every batch searched once."""
    caplog.set_level("INFO", "cryoiso")
    expected, whole = straight_run(few, tmp_path / "straight", searched)
    request = request_for(few, tmp_path / "resumed", **ONCE)
    first = len(whole) // 2
    asked = initial_questions(few)
    assert len(stopped(request, asked + 3)) == 1
    stopped(replace(request, resume=True), asked + 5)
    assert len(searched) == 5
    stopped(replace(request, resume=True), asked + first + 2)
    NativeEngine().refine(replace(request, resume=True), Context())
    assert searched == whole
    assert f"2 of {first} batches were searched before the interruption" in caplog.text
    assert contents(tmp_path / "resumed") == expected


def initial_questions(few) -> int:
    """How often a refinement asks whether to stop before its first iteration."""
    comm = StoppingContext(10**6)
    initial_model(Refinement(request_for(few, None, **ONCE), comm, "cpu", DIAMETER_A), 40.0)
    return 10**6 - comm.left


@pytest.mark.mpi
def test_an_iteration_begun_on_one_rank_ends_on_two(few, searched, tmp_path):
    """The second rank finds what the first process put aside: same bits, and nothing is searched twice."""
    here, three = str(Path(__file__).parent), {"max_iterations": 3, "healpix_order": 1}
    NativeEngine().refine(request_for(few, tmp_path / "straight", **three), Context())
    stopped(request_for(few, tmp_path / "moved", **three), initial_questions(few) + 5)
    done = run_mpi(2, ["-c", RANKS_SCRIPT, here, tmp_path / "moved", "2"])
    found = contents(tmp_path / "moved")
    assert contents(tmp_path / "straight").items() <= found.items()
    assert "5 of 8 batches were searched before the interruption" in done.stdout + done.stderr


@pytest.mark.parametrize("harm", ["cut off", "turned bit", "other iteration"])
def test_damaged_or_foreign_searches_are_made_again(few, searched, tmp_path, harm):
    expected, whole = straight_run(few, tmp_path / "straight", searched)
    request = request_for(few, tmp_path / "resumed", **ONCE)
    (file,) = stopped(request, initial_questions(few) + 3)
    data = bytearray(file.read_bytes())
    if harm == "cut off":
        file.write_bytes(data[:-100])
    elif harm == "turned bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        other = request_for(few, tmp_path / "other", **{**ONCE, "padding": 1})
        (foreign,) = stopped(other, initial_questions(few) + 3)
        foreign.replace(file)
    searched.clear()
    NativeEngine().refine(replace(request, resume=True), Context())
    missing = len(whole) - len(searched)
    assert missing == (0 if harm == "other iteration" else 2)
    assert contents(tmp_path / "resumed") == expected


def test_a_new_refinement_uses_nothing_of_an_old_one(few, searched, tmp_path):
    request = request_for(few, tmp_path, **ONCE)
    assert stopped(request, initial_questions(few) + 3)
    searched.clear()
    assert len(stopped(request, initial_questions(few) + 2)) == 1
    assert len(searched) == 2


def test_searches_are_written_as_time_goes_by_and_a_full_disk_only_warns(few, searched, tmp_path, monkeypatch, caplog):
    """As it would be found after a kill: on the disk before anybody stops."""
    monkeypatch.setattr(search_cache, "EVERY_S", 0.0)
    request = request_for(few, tmp_path / "killed", **ONCE)
    sizes: list[int] = []

    class Watching(Counting):
        def search(self, batch, white, given=None):
            files = (tmp_path / "killed" / "checkpoint").glob("searched-*")
            sizes.append(sum(f.stat().st_size for f in files))
            return super().search(batch, white, given)

    monkeypatch.setattr(expectation, "Searcher", Watching)
    stopped(request, initial_questions(few) + 4)
    assert sizes == sorted(set(sizes)) and len(sizes) == 4 and sizes[0] == 0

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search_cache, "append", full)
    caplog.clear()
    NativeEngine().refine(request_for(few, tmp_path / "full", **ONCE), Context())
    assert caplog.text.count("an interruption would cost this iteration") == 2  # one an iteration


def test_resuming_nothing_starts(few, tmp_path):
    request = request_for(few, tmp_path, max_iterations=1, healpix_order=1)
    result = NativeEngine().refine(replace(request, resume=True), Context())
    assert len(result.iterations) == 1
