"""Files that a user names: pipes, devices, sockets and folders are refused at once, whatever kind of file is wanted."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from forks_helper import python

from cryoiso.core.errors import CryoisoError, InputError, UsageError
from cryoiso.io import checkpoint, read_particle_file
from cryoiso.io.models import read_model
from cryoiso.io.mrc import copy_labelled, read_map, write_map
from cryoiso.io.regular_file import open_regular, read_regular_text, require_regular_file
from cryoiso.io.shards import ShardSource, read_attributes, read_index
from cryoiso.io.stack import StackReader
from cryoiso.io.staging import NotStaged, copy_checked
from cryoiso.pipeline.batch.fill_template import read_template
from cryoiso.pipeline.jobfile import read_job
from cryoiso.pipeline.records.hashing import sha256_of
from cryoiso.pipeline.records.journal import read_journal
from cryoiso.pipeline.records.manifest import read_record
from cryoiso.report.run_reader import read_json

KINDS = {"fifo": "named pipe", "device": "character device", "socket": "a socket", "folder": "a folder"}


def make(kind: str, path: Path) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.mkdir()
    return path


@pytest.fixture(autouse=True)
def no_hang():
    """A reader that waits for a pipe fails instead of hanging."""

    def stop(*_):
        raise TimeoutError("still reading after 5 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS = {
    "x.star": read_particle_file,
    "x.cs": read_particle_file,
    "x.mrc": read_map,
    "x.mrc.gz": read_map,
    "x.mrc.bz2": read_map,
    "x.mrcs": lambda path: StackReader().read(str(path), np.arange(1)),
    "y.mrc": lambda path: copy_labelled(path, path.parent / "out.mrc", "label"),
    "x.pdb": read_model,
    "x.cif.gz": read_model,
    "index.json": lambda path: read_index(path.parent),
    "site.sh": read_template,
    "manifest.json": read_record,
    "journal.jsonl": read_journal,
    "report.json": read_json,
    "x.dat": sha256_of,
    "plain": require_regular_file,
    "handle": open_regular,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_refused_at_once(name, kind, tmp_path):
    path = make(kind, tmp_path / name)
    with raises_code("file-not-regular", InputError, match=KINDS[kind]) as error:
        READERS[name](path)
    assert str(path) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("kind", KINDS)
def test_job_file(kind, tmp_path):
    with raises_code("file-not-regular", UsageError, match=KINDS[kind]):
        read_job(make(kind, tmp_path / "job.toml"))


@pytest.mark.parametrize("kind", KINDS)
def test_shard_checkpoint_and_copy(kind, tmp_path):
    path = make(kind, tmp_path / "a.npz")
    assert read_attributes(path) == {}
    with pytest.raises((InputError, NotStaged), match=KINDS[kind]):
        copy_checked(path, tmp_path / "copy", "", lambda: "", lambda _: None)
    source = ShardSource.__new__(ShardSource)
    source._open, source._max_open, source.folder = {}, 4, tmp_path
    source.index = {"shards": [{"file": "a.npz"}]}
    source._copies = {}
    with raises_code("file-not-regular", InputError, match=KINDS[kind]):
        source._file(0)


def test_checkpoint_takes_the_generation_before(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path / "c.npz", {"a": np.arange(value)}, {"value": value})
    (tmp_path / "c.npz").unlink()
    os.mkfifo(tmp_path / "c.npz")
    arrays, values = checkpoint.load(tmp_path / "c.npz")
    assert values == {"value": 1} and arrays["a"].tolist() == [0]


def test_links_and_contents(tmp_path):
    volume = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    write_map(tmp_path / "a.mrc", volume, 2.0)
    (tmp_path / "b.mrc").symlink_to("a.mrc")
    assert (read_map(tmp_path / "b.mrc").data == volume).all()
    (tmp_path / "t").write_bytes("a\r\nÅ\n".encode())
    assert read_regular_text(tmp_path / "t") == "a\nÅ\n"
    with open_regular(tmp_path / "t") as stream:
        assert os.get_blocking(stream.fileno())


@pytest.mark.parametrize("name", ["a\0b.star", "a" * 300 + ".star", "loop.star", "\udce4\0.star"])
def test_names_that_cannot_be(name, tmp_path):
    if name == "loop.star":
        (tmp_path / name).symlink_to(name)
    with pytest.raises(CryoisoError):
        read_particle_file(str(tmp_path / name))


def test_command_ends_with_the_code_for_bad_input(tmp_path):
    os.mkfifo(tmp_path / "p.star")
    signal.alarm(0)  # a process of its own has a limit of its own: it loads the program first
    done = subprocess.run(
        [python(), "-m", "cryoiso.cli.main", "ingest", "p.star", "shards"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 65 and "named pipe" in done.stderr and "Traceback" not in done.stderr
