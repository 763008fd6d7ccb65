"""The container image: its definitions, how it is built, and (slow, with an image) ranks that live in one each."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from mpi_helper import find_mpirun, mpi_environment

from cryoiso import __version__
from cryoiso.core.errors import EXIT_MISSING, EXIT_USAGE

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = (ROOT / "apptainer.def", ROOT / "containers" / "rocm.def")
DOCKERFILE = ROOT / "containers" / "Dockerfile"
BUILD = ROOT / "containers" / "build.sh"


# --- what is written


def sections(definition: Path) -> dict[str, list[str]]:
    """Lines by section, without comments; the header is section ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in definition.read_text().splitlines():
        if match := re.match(r"%(\w+)", line):
            name = match[1]
            found[name] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            found[name].append(line.strip())
    return found


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda path: path.name)
def test_arguments_of_a_definition_are_those_it_uses(definition):
    parts = sections(definition)
    declared = {line.split("=", 1)[0] for line in parts["arguments"]}
    assert set(re.findall(r"{{ (\w+) }}", definition.read_text())) == declared
    assert {"post", "environment", "runscript", "test", "help", "labels", "files"} <= parts.keys()


def copied(definition: Path) -> dict[str, str]:
    """What goes into the image -> where."""
    return {source: target for source, target in (line.split() for line in sections(definition)["files"])}


def test_all_images_are_made_of_the_same_files():
    files = copied(DEFINITIONS[0])
    assert copied(DEFINITIONS[1]) == files
    assert all((ROOT / source).exists() for source in files)
    assert all(target == f"/opt/cryoiso-source/{source}" for source, target in files.items())
    lines = re.findall(r"^COPY (.+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert {source for line in lines for source in line.split()[:-1]} == set(files)
    ignore = (ROOT / "containers" / "Dockerfile.dockerignore").read_text().split()
    assert {line[1:] for line in ignore if line.startswith("!")} == set(files)


def test_no_definition_has_a_version_of_its_own():
    for path in (*DEFINITIONS, DOCKERFILE):
        assert __version__ not in path.read_text()


def test_what_the_images_set_is_what_the_install_script_reads():
    script = (ROOT / "containers" / "install.sh").read_text()
    read = set(re.findall(r"\$\{(\w+):-", script))
    docker = set(re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.MULTILINE)) - {"FROM", "VERSION"}
    exported = {name for d in DEFINITIONS for name in re.findall(r"(\w+)=", " ".join(sections(d)["post"][:1]))}
    assert docker == exported == {"TORCH", "TORCH_INDEX", "RELION", "PYTHON"} <= read


def test_settings_of_the_docker_image_are_those_of_the_others():
    shell = dict(re.findall(r"export (\w+)=(?:\$\{\1:-)?([^}\s]*)", (ROOT / "containers" / "install.sh").read_text()))
    docker = dict(re.findall(r"(\w+)=(\S+)", DOCKERFILE.read_text().split("\nENV ", 1)[1].split("\n\n", 1)[0]))
    for_root = {name for name in docker if name.startswith("OMPI_ALLOW_RUN_AS_ROOT")}
    assert len(for_root) == 2
    assert {name: shell.get(name) for name in docker.keys() - for_root} == {
        name: value for name, value in docker.items() if name not in for_root
    }


@pytest.mark.parametrize("script", sorted((ROOT / "containers").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_good_shell(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# --- how it is built


def build(*arguments: object, path: Path, **options) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": str(path)}
    bash = shutil.which("bash") or "bash"
    return subprocess.run([bash, BUILD, *map(str, arguments)], env=env, capture_output=True, text=True, **options)


@pytest.fixture
def builders(tmp_path):
    """A PATH on which apptainer and docker write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("dirname", "realpath", "sed", "cut", "du", "id"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name in ("apptainer", "docker"):
        note = f'printf "%s\\n" "{name} $*" >> {tmp_path}/calls'
        (folder / name).write_text(f"#!/bin/sh\n{note}\n: > {tmp_path}/cryoiso.sif\n")
        (folder / name).chmod(0o755)
    return folder


def calls(builders: Path) -> list[str]:
    return (builders.parent / "calls").read_text().splitlines()


def test_build_without_a_builder_says_what_is_missing(tmp_path):
    done = build(path=tmp_path)
    assert done.returncode == EXIT_MISSING and "none of apptainer, singularity, docker and podman" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--bootstrp"], "unknown option --bootstrp"),
        (["--base"], "--base wants a value"),
        (["--builder", "make"], "unknown builder make"),
        (["--bootstrap", "yum"], "unknown bootstrap yum"),
        (["--bootstrap", "localimage", "--base", "nothing.sif"], "that exists"),
        (["--rocm", "--cpu"], "--rocm takes torch from its base image"),
        (["--builder", "docker", "--bootstrap", "docker"], "--bootstrap is for apptainer"),
    ],
)
def test_build_refuses_what_it_cannot_do(builders, arguments, words):
    done = build(*arguments, path=builders)
    assert done.returncode == EXIT_USAGE and words in done.stderr
    assert not (builders.parent / "calls").exists()


def test_build_passes_its_options_on_and_tries_the_image(builders, tmp_path):
    out = tmp_path / "cryoiso.sif"
    options = ("--cpu", "--no-relion", "--base", "debian:trixie-slim", "--out", out.name, "--", "--bind", "/etc/site")
    done = build(*options, path=builders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    built, tried = calls(builders)
    assert built == (
        "apptainer build --notest --build-arg FROM=debian:trixie-slim --build-arg RELION=no "
        f"--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu --bind /etc/site {out} apptainer.def"
    )
    assert tried == f"apptainer test {out}"
    assert "exists; --force replaces it" in build(*options, path=builders, cwd=tmp_path).stderr


def test_build_with_docker_names_the_version_of_the_package(builders, tmp_path):
    assert build("--builder", "docker", "--rocm", path=builders, cwd=tmp_path).returncode == 0
    built, tried = calls(builders)
    base = next(line for line in sections(DEFINITIONS[1])["arguments"] if line.startswith("FROM="))
    assert f"--build-arg {base}" in built and "--build-arg TORCH=present" in built
    assert f"--build-arg VERSION={__version__}" in built and built.endswith("--file containers/Dockerfile .")
    assert tried == "docker run --rm --entrypoint cryoiso-selftest cryoiso"


# --- a real image

image = pytest.mark.apptainer
NO_RESOURCE = not int(re.search(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16) >> 24 & 1


def environment(**extra: str) -> dict[str, str]:
    env = mpi_environment(extra)
    if os.getuid() == 0 and NO_RESOURCE:  # apptainer asks for every capability of root, and not every root has them all
        env.setdefault("APPTAINER_DROP_CAPS", "CAP_SYS_RESOURCE")
    return env


def apptainer(folder: Path, *options: str) -> list[str]:
    """Command that starts a program in the image, where ``folder`` can be written to."""
    return ["apptainer", "exec", *options, "--bind", str(folder), os.environ["CRYOISO_IMAGE"]]


def call(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=600)


@functools.cache
def open_mpi_4() -> str | None:
    """The host's mpirun of the same series as the image's."""
    for name in ("mpirun.openmpi", "mpirun"):
        path = shutil.which(name)
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout if path else ""
        if re.search(r"\((Open MPI|OpenRTE)\) 4\.1\.", said):
            return path
    return None


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A job file with its particles, simulated in the image."""
    folder = tmp_path_factory.mktemp("container")
    options = ["--n", "120", "--box", "24", "--pixel-size", "8", "--snr-db", "-3"]
    done = call([*apptainer(folder), "cryoiso", "simulate", "phantom", str(folder), *options])
    assert done.returncode == 0, done.stderr
    (folder / "job.toml").write_text(
        '[particles]\nfile = "particles.star"\n[reference]\nfile = "truth_map.mrc"\nlowpass_A = 50.0\n'
        '[sample]\nsymmetry = "C3"\n[refine]\nmax_iterations = 2\n'
    )
    return folder / "job.toml"


@image
@pytest.mark.slow
def test_the_image_is_of_this_version_and_passes_its_own_test():
    done = call(["apptainer", "inspect", "--json", os.environ["CRYOISO_IMAGE"]])
    labels = json.loads(done.stdout)["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    done = call(["apptainer", "test", os.environ["CRYOISO_IMAGE"]])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, poses wrong by" in done.stdout


@image
@pytest.mark.slow
@pytest.mark.parametrize("option", [(), ("--userns",)], ids=["as it comes", "unprivileged"])
def test_ranks_in_an_image_each_make_one_run(job, option):
    """The hybrid model: the host's mpirun, the image's library of the same series.

    Unprivileged containers may not read each other's memory, which Open MPI must be told.
    """
    if (mpirun := open_mpi_4()) is None:
        pytest.skip("LOUD: the host has no mpirun of Open MPI 4.1, which the image has inside")
    run = job.parent / f"hybrid{len(option)}"
    inside = [*apptainer(job.parent, *option), "cryoiso", "run", str(job), "--out", str(run)]
    done = call([mpirun, "-n", "2", *inside])
    assert done.returncode == 0, done.stderr
    start = json.loads((run / "manifest.json").read_text())["starts"][-1]
    assert start["ranks"] == 2 and (run / "result" / "half1.mrc").is_file()


@image
@pytest.mark.slow
@pytest.mark.parametrize("hide", [(), ("--cleanenv",)], ids=["wrong mpirun", "--cleanenv"])
def test_ranks_that_do_not_see_each_other_make_no_run(job, hide):
    """MPICH's mpirun with the image's Open MPI, and ranks that hear nothing of their launcher."""
    mpirun = open_mpi_4() if hide else find_mpirun()
    if mpirun is None or (not hide and mpirun == open_mpi_4()):
        pytest.skip(f"LOUD: no mpirun of {'Open MPI 4.1' if hide else 'MPICH'} on the host")
    run = job.parent / f"refused{len(hide)}"
    inside = [*apptainer(job.parent, *hide), "cryoiso", "run", str(job), "--out", str(run)]
    done = call([mpirun, "-n", "2", *inside])
    assert done.returncode == EXIT_MISSING, done.stderr
    assert ("(--cleanenv of apptainer" if hide else "belong to different MPIs") in done.stderr
    assert not run.exists()
