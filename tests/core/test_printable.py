"""Names and values from elsewhere steer no terminal, log or page, and a report says nothing of its user's folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from pipeline_helper import cryoiso_here, forget_signals, use_quick_parts, write_job

from cryoiso.cli.common import _Formatter, echo
from cryoiso.core.errors import EXIT_INPUT, InputError
from cryoiso.core.log import LineFormatter, ProgressLine, printable
from cryoiso.parallel.context import Context
from cryoiso.pipeline.run import run_job
from cryoiso.report import publish
from cryoiso.report.collect import collect, provenance
from cryoiso.report.page import escape
from cryoiso.report.sharing import for_others

EVIL = "a\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m\u2028b\udcff"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m\u2028b\udcff"
RAW = "\x1b\x07\x9b\u202e\u2028\udcff"


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("cryoiso", logging.WARNING, "x.py", 1, "%s", (message,), None)


def test_what_steers_a_terminal_is_shown_as_what_it_is():
    assert printable(EVIL) == SHOWN
    assert printable("50 Å, µm, 日本, עברית, é, a\tb\nc") == "50 Å, µm, 日本, עברית, é, a\tb\nc"
    assert printable("a\tb\r\nc", lines=False) == r"a\tb\r\nc"
    assert escape("<b>" + EVIL) == "&lt;b&gt;" + SHOWN


def test_logs_messages_and_results_are_escaped(capsys):
    for form in (LineFormatter(), _Formatter()):
        line = form.format(record(f"{EVIL}\n12:00:00  all is well"))
        assert SHOWN in line and not set(line) & set(RAW)
        assert line.splitlines()[1] == "    12:00:00  all is well"  # no message of its own
    echo(EVIL)
    assert capsys.readouterr().out == SHOWN + "\n"


def test_a_live_line_is_one_line():
    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    line = ProgressLine(f"reading {EVIL}\nx", 10, stream=(terminal := Terminal()))
    line.last -= 60
    line.update(5)
    assert terminal.text.startswith("\r\x1b[2Kreading " + SHOWN + r"\nx: 5 of 10")
    assert not set(terminal.text.removeprefix("\r\x1b[2K")) & set(RAW)


@pytest.mark.parametrize("where", ["stack", "value", "file"])
def test_errors_of_a_particle_file_are_escaped(where, data, tmp_path):
    evil = EVIL.replace("\udcff", "").replace("\x1b]0;owned\x07", "").replace("\u2028", "")
    star = tmp_path / (f"{evil}.star" if where == "file" else "p.star")
    text = (data / "particles.star").read_text()
    row = next(line for line in text.splitlines() if "@" in line)
    name = next(word for word in row.split() if "@" in word)
    new = {"stack": name + evil, "value": name.replace("@", f"{evil}@"), "file": name.replace("@", "x@")}[where]
    star.write_text(text.replace(name, new))
    done = cryoiso_here("ingest", star, tmp_path / "shards")
    assert done.returncode == EXIT_INPUT and "error:" in done.stderr
    assert not set(done.stderr) & set(RAW) and r"\x1b[2J\u202e" in done.stderr.replace("\\\\", "\\")


# --- what others see


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A finished run with its report, in folders with telling names."""
    from pipeline_helper import simulate

    home = tmp_path_factory.mktemp("home of secret user")
    simulate(home)
    job = write_job(
        home, "titled.toml", run_title=f"my {EVIL[:-1]} <i>", relion_program="/opt/secret/relion_refine_mpi",
        auxiliary_post_command=f"/opt/secret/x --in '{home}/x.mrc' {{input}} {{output}}",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        run = run_job(job, home / "run", Context(), publish).path
    forget_signals()
    return run


def test_nothing_that_is_passed_on_names_the_users_folders(published):
    manifest = (published / "manifest.json").read_text()
    assert "home of secret user" in manifest  # the record of the run has them; it stays
    given = [published / "report.html", published / "report.json", *(published / "result").iterdir()]
    assert len(given) > 12
    for file in given:
        content = file.read_bytes()
        assert b"secret" not in content and b"/tmp/" not in content, file
    report = json.loads((published / "report.json").read_text())
    assert report["job"]["particles"]["file"] == "particles.star"
    assert report["job"]["relion"]["program"] == "relion_refine_mpi"
    (inputs, *_) = (text for label, text in report["provenance"] if label == "input")
    assert inputs.startswith("particles.star (sha256 ")


def test_a_title_steers_neither_page_nor_terminal(published):
    for file in ("report.html", "report.json", "logs/rank-0000.log", "result/METHODS.md"):
        assert not set((published / file).read_text()) & set(RAW), file
    assert "&lt;i&gt;" in (published / "report.html").read_text()


PATHS = {
    "/home/u/a b/x.star": "x.star",
    "map /home/u/x.mrc, 3 Å": "map x.mrc, 3 Å",
    "1/2 and/or 3 Å/px": "1/2 and/or 3 Å/px",
    "see https://doi.org/10.1/abc": "see https://doi.org/10.1/abc",
    "/data/run/04_reconstruct/map.mrc": "04_reconstruct/map.mrc",
    "prog --x=/home/u/y.mrc": "prog --x=y.mrc",
    "in /data/run now": "in run now",
    "'/home/u/z'": "'z'",
    "p --in '/home/a b/c d.mrc' x": "p --in 'c d.mrc' x",
    7: 7,
}


@pytest.mark.parametrize("text, shown", PATHS.items())
def test_paths_in_words_are_cut(text, shown):
    assert for_others({"job": {}, "x": [text]}, Path("/data/run"))["x"] == [shown]


MANIFESTS = {
    "inputs": [[1], {"/etc/passwd": 3}, {"/a/b": {"sha256": 5}}],
    "starts": [3, [3], [{"command": 7, "machine": [1], "packages": [], "time": 5}]],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in MANIFESTS.items() for value in values])
def test_a_report_of_a_strange_manifest_is_made(key, value):
    assert isinstance(provenance({key: value}, {}), list)


@pytest.mark.parametrize("name", ["manifest.json", "resolved.toml", "journal.jsonl"])
@pytest.mark.parametrize("content", [b"\xff", b"a=" + b"[" * 50000, b"[" * 100000 + b"\n"])
def test_a_report_of_damaged_records_is_an_error_or_made(name, content, tmp_path):
    for one in ("resolved.toml", "journal.jsonl"):
        (tmp_path / one).write_text("")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name if name != "journal.jsonl" else "no run"):
        collect(tmp_path)
