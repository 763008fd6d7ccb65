"""Options are keys of the job file: same default, limits, choices and words, the same on every command that refines."""

from __future__ import annotations

import contextlib
import io
import json
import tomllib
from typing import Any

import pytest
from pipeline_helper import cryoiso_here
from typer.main import get_command

from cryoiso.cli import auxiliary_cmd, groups, realign_cmd
from cryoiso.cli.main import build_app
from cryoiso.cli.options import JobOptions, Keys, help_of, keys, with_keys
from cryoiso.core.config import Job, job_to_toml, parse_job
from cryoiso.core.errors import EXIT_USAGE
from cryoiso.core.sections.base import choices_of, limits_of, unit_of

COMMANDS: dict[str, Any] = dict(get_command(build_app()).commands)  # type: ignore[attr-defined]
GROUPS = {
    "refine": groups.REFINEMENT,
    "realign": (*groups.REFINEMENT, realign_cmd.CORRECTION, groups.NETWORK, realign_cmd.AUXILIARY),
}
REFINE_ONLY = {"particles", "ref", "out", "refine_keys", "relion", "command", "cryosparc", "go_on", "overwrite"}
COMMAND_ONLY = {"refine": REFINE_ONLY, "realign": REFINE_ONLY | {"auxiliary"}}
"""Parameters that are no key of a section: files, --refine, --relion, --command and --cryosparc KEY=VALUE, --resume,
--overwrite."""
NEEDED: dict[str, Any] = {"particles": {"file": "a.star"}, "reference": {"file": "a.mrc"}}


def names_of(groups: tuple[Keys, ...]) -> dict[str, tuple[str, str]]:
    """Name of a parameter -> section, key."""
    return {p.name: (group.section, key) for group in groups for key, p in group.parameters()}


def model(section: str) -> Any:
    return Job.model_fields[section].annotation


def help_text(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        get_command(build_app()).main([*command.split(), "--help"], standalone_mode=False)
    return " ".join(said.getvalue().split())


@pytest.mark.parametrize("command", sorted(GROUPS))
def test_every_option_of_a_refinement_is_a_key_or_known_to_be_none(command):
    present = {p.name for p in COMMANDS[command].params}
    assert present == set(names_of(GROUPS[command])) | COMMAND_ONLY[command]


@pytest.mark.parametrize("command", sorted(GROUPS))
def test_every_key_of_the_sections_that_a_refinement_reads_is_an_option(command):
    """But for keys of whole runs."""
    there = set(names_of(GROUPS[command]).values())
    sections = ["sample", "refine", "particles", "reference"] + ["realign"] * (command == "realign")
    missing = {(name, key) for name in sections for key in model(name).model_fields} - there
    assert missing == {("particles", "file"), ("reference", "file")}


def test_realign_has_every_option_of_refine_with_the_same_default_and_help():
    own = {p.name: p for p in COMMANDS["realign"].params}
    for parameter in COMMANDS["refine"].params:
        other = own[parameter.name]
        for fact in ("opts", "secondary_opts", "default", "metavar", "help", "rich_help_panel", "required"):
            assert getattr(other, fact, None) == getattr(parameter, fact, None), (parameter.name, fact)


@pytest.mark.parametrize(("command", "groups"), GROUPS.items())
def test_defaults_are_those_of_the_job_file(command, groups, monkeypatch, tmp_path):
    """A command without options makes the job of a job file with nothing but the two files."""
    seen = given_to(command, monkeypatch, tmp_path)
    expected = parse_job(NEEDED | ({"run": {"workflow": "realign"}} if command == "realign" else {}))
    assert seen == expected
    by_name = {p.name: p.default for p in COMMANDS[command].params}
    for name, (section, key) in names_of(groups).items():
        assert (by_name[name] or None) == (getattr(getattr(expected, section), key) or None), name


def given_to(command: str, monkeypatch, tmp_path, *words: object) -> Job:
    """The job that a command makes of its options."""
    from cryoiso.pipeline.commands import realign, refine

    seen: list[Job] = []
    module = {"refine": refine, "realign": realign}[command]
    monkeypatch.setattr(module, f"{command}_files", lambda job, *a, **k: seen.append(job))
    done = cryoiso_here(command, "a.star", "--ref", "a.mrc", "--out", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    return seen[0]


OTHER = {
    "symmetry": "D2", "relax_symmetry": "C4", "mask": "m.mrc", "project": "p", "scratch": "auto", "fit": "f.mrc",
    "cube_px": 32, "passthrough": ["a.cs", "b.cs"], "fit_resolution_A": 8.0, "view_axis_odds": 5.5,
    "view_kernel_deg": 5.5, "chains": ["A", "B,C"], "assembly": "2",
}  # fmt: skip


def another_value(section: str, key: str) -> Any:
    """A value that the key accepts and that is not its default."""
    field = model(section).model_fields[key]
    choices = choices_of(model(section), key)
    if choices:
        return next(one for one in choices if one != field.default)
    if isinstance(field.default, bool):
        return not field.default
    return OTHER.get(key, 3 if "int" in str(field.annotation) else 0.7 if limits_of(model(section), key) else 3.5)


@pytest.mark.parametrize("command", sorted(GROUPS))
def test_every_option_arrives_at_its_key(command, monkeypatch, tmp_path):
    words: list[object] = []
    expected: dict[str, dict[str, Any]] = {}
    for group in GROUPS[command]:
        for key, names in group.names.items():
            value = another_value(group.section, key)
            on, _, off = names[0].partition("/")
            if isinstance(value, bool):
                words.append(on if value else off)
            else:
                words += [w for one in (value if isinstance(value, list) else [value]) for w in (on, one)]
            expected.setdefault(group.section, {})[key] = value
    job = given_to(command, monkeypatch, tmp_path, *words)
    for section, values in expected.items():
        assert {key: getattr(getattr(job, section), key) for key in values} == values


@pytest.mark.parametrize(
    ("command", "section", "key"),
    [
        ("refine", "refine", "engine"), ("realign", "refine", "regularisation"), ("realign", "realign", "retrain"),
        ("correct", "correct", "rotations"), ("auxiliary train", "auxiliary", "generators"),
        ("auxiliary generate", "auxiliary", "noise_group"), ("ingest", "particles", "storage"),
        ("launch", "launch", "scheduler"), ("hook relion", "relion", "tau2"), ("micelle", "particles", "invert"),
        ("reconstruct", "run", "device"),
    ],
)  # fmt: skip
def test_help_shows_the_choices(command, section, key):
    choices = choices_of(model(section), key)
    assert len(choices) > 1 and f"[{'|'.join(choices)}]" in help_text(command)


def test_help_shows_units_limits_and_defaults_under_headings():
    text = help_text("refine")
    assert "--padding <int>" in text or "--padding INTEGER" in text
    assert "[1 to 4; default: 2]" in text and "[Å, > 0; default: 30]" in text and "[degrees, > 0, ≤ 90]" in text
    lines = cryoiso_here("refine", "--help").stdout.splitlines()
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Arguments", "Options", *dict.fromkeys(group.panel for group in groups.REFINEMENT)]
    assert not any("\xa0" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (["refine", "--padding", 9], "refine", "padding", 9),
        (["realign", "--padding", 0], "refine", "padding", 0),
        (["refine", "--lowpass", -3.0], "reference", "lowpass_A", -3.0),
        (["realign", "--local", 91.0], "refine", "local_deg", 91.0),
        (["refine", "--engine", "cisTEM"], "refine", "engine", "cisTEM"),
        (["refine", "--seed", -1], "run", "seed", -1),
    ],
)
def test_a_bad_value_is_the_same_error_from_option_and_job_file(words, section, key, value, tmp_path):
    """Exit 2 and the same sentence, which names the option there and the key here."""
    command, *rest = words
    done = cryoiso_here(command, "a.star", "--ref", "a.mrc", "--out", tmp_path / "out", *rest)
    job = tmp_path / "job.toml"
    lines = {name: f'file = "{values["file"]}"' for name, values in NEEDED.items()}
    lines[section] = f"{lines.get(section, '')}\n{key} = {json.dumps(value)}"
    job.write_text("\n".join(f"[{name}]\n{line}" for name, line in lines.items()))
    from_file = cryoiso_here("run", job)
    assert done.returncode == from_file.returncode == EXIT_USAGE
    by_option, by_key = (one.stderr.partition("error: ")[2] for one in (done, from_file))
    said = by_option.removeprefix(f"{rest[0]}: ")
    assert said != by_option and by_key == f"{job}: '{section}.{key}': {said}" and "(found" in said
    assert not (tmp_path / "out").exists()


def test_a_bad_value_by_refine_key_names_the_key(tmp_path):
    done = cryoiso_here("refine", "a", "--ref", "b", "--out", tmp_path, "--padding", 2, "--refine", "padding=9")
    assert done.returncode == EXIT_USAGE and "'refine.padding'" in done.stderr


def test_a_bad_setting_of_a_batch_job_names_its_option(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('[particles]\nfile = "a.star"\n[reference]\nfile = "b.mrc"\n')
    done = cryoiso_here("launch", job, "--nodes", 0)
    assert done.returncode == EXIT_USAGE and "--nodes: Input should be greater than or equal to 1" in done.stderr


def test_a_refine_key_goes_before_its_option(monkeypatch, tmp_path):
    job = given_to("refine", monkeypatch, tmp_path, "--padding", 2, "--refine", "padding=3")
    assert job.refine.padding == 3


def test_options_of_one_name_are_refused():
    with pytest.raises(ValueError, match="duplicate"):

        @with_keys(keys("refine", "A", "padding"), keys("reconstruct", "B", "padding"))
        def twice(job_options: JobOptions) -> None: ...


def test_the_job_file_explains_every_key_in_the_words_of_the_help():
    text = job_to_toml(parse_job(NEEDED))
    assert tomllib.loads(text)["refine"]["padding"] == 2
    flat = " ".join(line.lstrip("# ") for line in text.splitlines())
    for section in Job.model_fields:
        for key, field in model(section).model_fields.items():
            notes = " | ".join(choices_of(model(section), key)) or limits_of(model(section), key)
            assert field.description and " ".join(field.description.split()) in flat, (section, key)
            assert notes in flat and unit_of(key) in flat
            assert field.description.rstrip(".").lower() in help_of(section, key).lower()
    assert max(map(len, text.splitlines())) <= 120


def test_groups_of_single_commands_are_keys():
    for group in (auxiliary_cmd.GENERATOR, auxiliary_cmd.MADE, groups.GRID, groups.SHARDS):
        assert set(group.names) <= set(model(group.section).model_fields)
