"""The command line: quick, helpful, the right exit codes, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forks_helper import python
from mpi_helper import run_mpi

from cryoiso import __version__
from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE
from cryoiso.io.mrc import read_map, write_map

COMMANDS = (
    "init", "doctor", "plan", "benchmark", "launch", "simulate", "ingest", "reference", "refine", "realign",
    "reconstruct", "classify", "ctf-refine", "correct", "micelle", "auxiliary", "hook", "diagnose",
    "rebalance", "audit", "convert", "symmetry", "report", "run", "resume", "verify", "replay",
    "relion-external",
)  # fmt: skip
HEAVY = "torch numba mpi4py pandas matplotlib scipy h5py gemmi"


def cryoiso(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [python(), "-m", "cryoiso.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env})


def test_version():
    done = cryoiso("--version")
    assert done.returncode == 0 and done.stdout.strip() == f"cryoiso {__version__}"


@pytest.mark.parametrize("words", [["--help"], ["refine", "--help"], ["run", "--help"]])
def test_help_loads_nothing_heavy(words):
    code = f"""
import sys
sys.argv = ["cryoiso", *{words}]
from cryoiso.cli.main import main
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
print("HEAVY", sorted(set(sys.modules) & set("{HEAVY}".split())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "HEAVY []", done.stdout + done.stderr


def test_importing_the_package_loads_nothing():
    code = f"import sys, cryoiso; print(sorted(set(sys.modules) & set('{HEAVY} numpy typer'.split())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command():
    words = cryoiso("--help").stdout.split()
    assert [name for name in COMMANDS if name not in words] == []


def test_every_option_of_every_command_has_help():
    from typer.main import get_command

    from cryoiso.cli.main import build_app

    commands = dict(get_command(build_app()).commands)  # type: ignore[attr-defined]
    assert set(commands) == set(COMMANDS)
    for group in ("auxiliary", "hook"):
        commands |= {f"{group} {name}": inner for name, inner in commands.pop(group).commands.items()}
    assert {"auxiliary train", "auxiliary generate", "hook relion"} <= set(commands)
    for name, command in commands.items():
        assert command.help, f"{name} has no help"
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["refine", "a.star"], ["run"], ["run", "a.toml", "--nonsense"], ["refine", "a", "--padding", "x"]],
)
def test_wrong_usage_exits_2_without_a_traceback(words):
    done = cryoiso(*words)
    assert done.returncode == EXIT_USAGE and "Traceback" not in done.stderr and done.stderr.strip()


@pytest.mark.parametrize("command", ["refine", "realign"])
def test_any_key_of_the_refinement_is_an_option(command, monkeypatch, tmp_path):
    """--refine KEY=VALUE is parsed as the job file's key is, and a wrong one is named."""
    from typer.main import get_command

    from cryoiso.cli.main import build_app
    from cryoiso.pipeline.commands import realign, refine

    seen = []
    monkeypatch.setattr("cryoiso.cli.refine_cmd.echo", lambda text: None)
    monkeypatch.setattr("cryoiso.cli.realign_cmd.echo", lambda text: None)
    for module, name in ((refine, "refine_files"), (realign, "realign_files")):
        monkeypatch.setattr(module, name, lambda job, *a, **k: seen.append(job.refine))
    words = [command, "a.star", "--ref", "a.mrc", "--out", str(tmp_path), "--refine", "view_density=false"]
    app = get_command(build_app())
    app.main([*words, "--refine", "view_axis_odds=2"], standalone_mode=False)
    assert seen[0].view_density is False and seen[0].view_axis_odds == 2 and seen[0].weighted_fsc is True
    done = cryoiso(*words, "--refine", "no_such_key=1")
    assert done.returncode == EXIT_USAGE and "unknown key 'refine.no_such_key'" in done.stderr


@pytest.mark.mpi
def test_wrong_usage_is_said_by_one_rank():
    done = run_mpi(3, ["-m", "cryoiso.cli.main", "run", "--nonsense"], check=False)
    assert done.returncode == EXIT_USAGE and done.stderr.count("nonsense") == 1
    assert run_mpi(3, ["-m", "cryoiso.cli.main", "--version"]).stdout.count("cryoiso") == 1


def test_known_errors_have_one_line_and_no_traceback(tmp_path):
    done = cryoiso("reconstruct", tmp_path / "none.star", "--out", tmp_path / "out")
    assert done.returncode == EXIT_INPUT and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "none.star" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unexpected_errors_exit_1_with_a_traceback():
    code = """
import sys
from cryoiso.cli import doctor_cmd, main
def broken():
    "Breaks."
    raise ZeroDivisionError("boom")
doctor_cmd.doctor = broken
sys.argv = ["cryoiso", "doctor"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: unexpected ZeroDivisionError" in done.stderr


def test_doctor_tells_what_is_there(tmp_path):
    found = json.loads(cryoiso("doctor", tmp_path, "--json").stdout)
    assert found["cryoiso"]["version"] == __version__ and found["mpi"]["ranks"] == 1
    assert found["cryoiso"]["packages"]["numpy"] and found["folders"]["run folder"]["free_bytes"] > 0
    text = cryoiso("doctor", tmp_path).stdout
    assert all(word in text for word in ("cryoiso", "MPI", "GPU", "RELION", "memory", "run folder"))


@pytest.mark.mpi
def test_doctor_under_mpirun_counts_the_ranks():
    done = run_mpi(2, ["-m", "cryoiso.cli.main", "doctor", "--json"])
    found = json.loads(done.stdout)
    assert found["mpi"]["ranks"] == 2 and len(found["ranks"]) == 2 and sum(found["mpi"]["hosts"].values()) == 2


@pytest.mark.mpi
def test_a_serial_command_is_done_once_under_mpirun(tmp_path):
    words = ["-m", "cryoiso.cli.main", "reference", "phantom", tmp_path / "a.mrc", "--box", "24", "--pixel-size", "7"]
    assert run_mpi(3, words).stdout.count("a.mrc") == 1


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Twelve simulated particles of 24 px."""
    done = cryoiso("simulate", "phantom", tmp_path / "set", "--n", 12, "--box", 24, "--pixel-size", 7)
    assert done.returncode == 0, done.stderr
    return tmp_path / "set"


def test_init_writes_a_job_file_that_parses(tiny):
    import tomllib

    from cryoiso.core.config import parse_job

    done = cryoiso("init", "particles.star", "--symmetry", "C3", "--reference", "truth_map.mrc", cwd=tiny)
    assert done.returncode == 0, done.stderr
    text = (tiny / "job.toml").read_text()
    job = parse_job(tomllib.loads(text))
    assert (job.particles.file, job.reference.file, job.sample.symmetry) == ("particles.star", "truth_map.mrc", "C3")
    assert "12 particles" in done.stdout and "# refinement engine" in text
    again = cryoiso("init", "particles.star", cwd=tiny)
    assert again.returncode == EXIT_USAGE and "--overwrite" in again.stderr
    assert (tiny / "job.toml").read_text() == text


def test_init_finds_bad_input_now(tiny):
    assert cryoiso("init", "nothing.star", cwd=tiny).returncode == EXIT_INPUT
    assert cryoiso("init", "particles.star", "--symmetry", "Q7", cwd=tiny).returncode == EXIT_INPUT
    assert not (tiny / "job.toml").exists()


@pytest.mark.mpi
def test_ingest_on_any_number_of_ranks_writes_the_same_bytes(tiny, tmp_path):
    folders = []
    for n in (1, 2, 3):
        words = ["-m", "cryoiso.cli.main", "ingest", tiny / "particles.star", tmp_path / f"shards{n}", "--shard-mib", 1]
        assert run_mpi(n, words).stdout.count("index.json") == 1
        folders.append({p.name: p.read_bytes() for p in (tmp_path / f"shards{n}").iterdir()})
    assert folders[0] == folders[1] == folders[2] and "shard-00000.h5" in folders[0]


def test_reference_of_a_map_is_brought_onto_another_grid(tiny, tmp_path):

    out = tmp_path / "small.mrc"
    done = cryoiso("reference", tiny / "truth_map.mrc", out, "--box", 18, "--pixel-size", 8, "--lowpass", 20)
    assert done.returncode == 0, done.stderr
    found = read_map(out)
    assert found.box_px == 18 and found.pixel_size_A == pytest.approx(8) and "diameter" in done.stdout


def test_reference_of_chosen_chains_of_a_prediction(tmp_path):
    """Names with commas or several options; what was left out is printed, and in the JSON."""
    lines = ["TITLE     ALPHAFOLD MULTIMER PREDICTION"]
    for number in range(90):
        chain, i = "ABC"[number // 30], number % 30
        x, y, z = 4.0 * (i % 5), 4.0 * (i // 5), 12.0 * (number // 30)
        confidence = 95.0 - 2 * i
        lines.append(
            f"ATOM  {number + 1:5d}  CA  ALA {chain}{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00{confidence:6.2f}"
            "           C"
        )
    model = tmp_path / "model.pdb"
    model.write_text("\n".join([*lines, "END", ""]))
    words = ("reference", model, tmp_path / "a.mrc", "--box", 24, "--pixel-size", 5, "--chains", "A,C")
    done = cryoiso(*words, "--confidence", "yes", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["model"]
    assert found["chains"] == ["A", "C"] and found["residues"] == 60 and found["left_out"] == 14
    assert found["left_out_residues"] == "A 24-30; C 24-30"
    done = cryoiso(*words, "--confidence", "yes", "--min-confidence", 60)
    assert "left out (A 19-30; C 19-30)" in done.stdout and "chains A, C" in done.stdout
    done = cryoiso(*words, "--chains", "Q")
    assert done.returncode == EXIT_INPUT and "no such chain: Q" in done.stderr


def test_diagnose_prints_and_writes_numbers(tiny, tmp_path):
    truth, rng = read_map(tiny / "truth_map.mrc"), np.random.default_rng(1)
    for half in (1, 2):
        noise = 0.001 * truth.data.std() * rng.normal(size=truth.data.shape)
        write_map(tiny / f"half{half}.mrc", truth.data + noise.astype(np.float32), truth.pixel_size_A)
    words = ["--half1", tiny / "half1.mrc", "--half2", tiny / "half2.mrc", "--particles", tiny / "truth.star"]
    done = cryoiso("diagnose", *words, "--symmetry", "C3", "--out", tmp_path / "numbers.json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["resolution_0143_unmasked_A"] == pytest.approx(14.0, rel=0.1) and "resolution" in done.stdout
    assert cryoiso("diagnose", *words, "--symmetry", "Z").returncode == EXIT_INPUT


def test_diagnose_as_printed_in_the_readme(tiny, tmp_path):
    """Half-maps stand by themselves, numbers go to diagnose.json; the options of before do the same."""
    rng = np.random.default_rng(1)
    truth = read_map(tiny / "truth_map.mrc")
    for name in ("half1.mrc", "half2.mrc"):
        noise = 0.2 * truth.data.std() * rng.normal(size=truth.data.shape)
        write_map(tmp_path / name, truth.data + noise.astype(np.float32), truth.pixel_size_A)
    done = cryoiso("diagnose", "half1.mrc", "half2.mrc", cwd=tmp_path)
    assert done.returncode == 0 and "all numbers: diagnose.json" in done.stdout, done.stderr
    cryoiso("diagnose", "--half1", "half1.mrc", "--half2", "half2.mrc", "--out", "options.json", cwd=tmp_path)
    assert (tmp_path / "diagnose.json").read_bytes() == (tmp_path / "options.json").read_bytes()
    for words in (["half1.mrc"], ["half1.mrc", "half2.mrc", "--half2", "half2.mrc"], []):
        done = cryoiso("diagnose", *words, "--out", "none.json", cwd=tmp_path)
        assert done.returncode == EXIT_USAGE and "cryoiso diagnose HALF1 HALF2" in done.stderr
    assert not (tmp_path / "none.json").exists()


def test_nothing_is_called_a_leak_after_a_run_that_counted_operations():
    """Triton's bindings print over a hundred lines where the last collection is spared."""
    pytest.importorskip("triton", reason="LOUD: no Triton")
    script = "from cryoiso.cli import main; main._save_overheads(); import torch.utils.flop_counter"
    done = subprocess.run([python(), "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
