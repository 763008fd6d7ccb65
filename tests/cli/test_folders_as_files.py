"""The name of a folder where a file is meant, or nothing at all: one sentence, before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE
from cryoiso.io.mrc import write_map
from cryoiso.physics.phantom import phantom_map


@pytest.fixture
def halves(tmp_path):
    """Two half-maps, 16 px of 10 Å."""
    density, noise = phantom_map(16, 10.0, 25.0).data, np.random.default_rng(0).standard_normal((2, 16, 16, 16))
    for number in (1, 2):
        data = density + 0.1 * density.std() * noise[number - 1]
        write_map(tmp_path / f"half{number}.mrc", data.astype(np.float32), 10.0)
    return tmp_path / "half1.mrc", tmp_path / "half2.mrc"


@pytest.mark.parametrize("command", ["run", "launch", "plan"])
@pytest.mark.parametrize("name", [".", "", "/"])
def test_a_folder_in_place_of_the_job_file(command, name):
    done = cryoiso_here(command, name)
    assert done.returncode == EXIT_USAGE and "folder" in done.stderr and "[file-not-regular]" in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--out", "--fsc3d", "--local-resolution"])
@pytest.mark.parametrize("name", [".", ""])
def test_a_folder_in_place_of_a_file_to_write(halves, option, name):
    done = cryoiso_here("diagnose", *halves, option, name)
    assert done.returncode == EXIT_INPUT and "[file-not-regular]" in done.stderr, done.stdout + done.stderr
    assert not done.stdout, "refused before anything is measured"


def test_a_job_file_without_names(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('[particles]\nfile = ""\n[reference]\nfile = "r.mrc"\n')
    done = cryoiso_here("run", job)
    assert done.returncode == EXIT_USAGE and "'particles.file' is empty [job-key-missing]" in done.stderr, done.stderr
    job.write_text(f'[particles]\nfile = "{tmp_path}"\n[reference]\nfile = "r.mrc"\n')
    done = cryoiso_here("run", job)
    assert done.returncode == EXIT_INPUT and "no shards in this folder" in done.stderr and "STAR" in done.stderr
