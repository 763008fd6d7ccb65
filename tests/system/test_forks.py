"""The server that tests fork their processes from: without it everything still passes, in twice the time."""

from __future__ import annotations

import os
import sys

import pytest
from forks_helper import python


@pytest.mark.skipif(os.environ.get("CRYOISO_TEST_FORKS") == "0" or sys.platform != "linux", reason="no forks here")
def test_no_import_of_the_program_starts_a_thread():
    """A fork would lose it, so that the server refuses to start."""
    assert python() != sys.executable
