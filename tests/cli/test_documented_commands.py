"""Every command line that is printed in the documentation, the scripts and the program's own words must parse."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cryoiso.cli.main import build_app

ROOT = Path(__file__).parents[2]
MADE = ("commands.md", "job-file.md")
"""Pages that docs/conf.py makes from the program itself when the documentation is built."""
PAGES = [
    ROOT / "README.md", ROOT / "launch" / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in MADE),
]  # fmt: skip
SCRIPTS = [
    ROOT / "launch" / "demo.sh", ROOT / "launch" / "test.sh", ROOT / "apptainer.def",
    *sorted((ROOT / "launch" / "templates").glob("*.sh")), *sorted((ROOT / "containers").glob("*.sh")),
]  # fmt: skip
SOURCES = sorted((ROOT / "cryoiso").rglob("*.py"))

APP = get_command(build_app())
COMMANDS: dict[str, Any] = dict(APP.commands)  # type: ignore[attr-defined]
for group in ("auxiliary", "hook"):
    COMMANDS |= {f"{group} {name}": one for name, one in COMMANDS.pop(group).commands.items()}  # type: ignore[attr-defined]

OPTIONS_OF = {name: {o for p in one.params for o in (*p.opts, *p.secondary_opts)} for name, one in COMMANDS.items()}
OPTIONS = set().union(*OPTIONS_OF.values(), {"--help", "--version"})

OTHER_PROGRAMS = {
    "RELION": "--continue --gpu --j --pool --o --i --blush --ios --model --sym --iter --verb --som --helix --grad "
    "--sgd --norm --scale --ctf --pad --oversampling --tomograms --trajectories",  # and all with an underscore
    "Slurm": "--batch --dependency --exclude --gpus-per-node --gpus-per-task --gres --mpi --signal --qos --ntasks "
    "--ntasks-per-node --overlap --open-mode --tmp --cpus-per-task",
    "mpirun": "--bind-to --map-by",
    "Apptainer": "--bind --cleanenv --containall --no-home --env --nv --pid --rocm --userns --shared --file --tag",
    "containers/build.sh": "--base --bootstrap --builder --cpu --mirror --no-relion --torch --torch-index --rocm",
    "rattler-build, Spack, EasyBuild": "--recipe --channel --path --robot --sourcepath",
    "cryoDRGN": "--poses --ctf --zdim --uninvert-data",
    "benchmarks, pytest": "--published --netns --sizes --ranks --slow --tables --tree",
}
FOREIGN = set(" ".join(OTHER_PROGRAMS.values()).split())
WORD = re.compile(r"(?<![\w\-/{(])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![_a-z0-9])")
"""An option; what has an underscore is one of RELION's."""

FOREIGN_LINE = re.compile(r"\b(?:relion_\w+|rsync|git|sbatch|srun|mpirun|apptainer)\b(?:(?! cryoiso\b)[^.,;()'])*")
"""The command line of another program, up to the name of ours."""


def options_in(text: str) -> list[str]:
    return [o for o in WORD.findall(FOREIGN_LINE.sub("", text)) if o not in FOREIGN | {"--help", "--version"}]


def code_of(page: Path) -> Iterator[tuple[int, str, bool]]:
    """Line number and text of each line of code of a page, continued lines joined, and of each piece of inline code
    (True)."""
    fenced, kept, start = False, "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            start = start if kept else number
            kept += line.rstrip()
            if kept.endswith("\\"):
                kept = kept[:-1] + " "
                continue
            yield start, kept, False
            kept = ""
    text = re.sub(r"```.*?```", lambda m: "\n" * m.group().count("\n"), page.read_text(encoding="utf-8"), flags=re.S)
    for found in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, found.start()) + 1, " ".join(found.group(1).split()), True


def lines_of(script: Path) -> Iterator[tuple[int, str]]:
    """Lines of a script; in a comment a command stands by itself or in quotes."""
    for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1):
        line = line.replace('"$venv/bin/python" -m cryoiso.cli.main', "cryoiso")
        yield from ((number, found) for found in re.findall(r"'(cryoiso [^']+)'", line))
        line = re.sub(r"'cryoiso [^']+'", "", line)
        shown = re.match(r'echo "[^:"]*: (.*)"', line)
        if shown or re.match(r"\s*(mpirun|srun|apptainer|cryoiso|exec cryoiso) ", line):
            yield number, shown.group(1) if shown else line.strip()


def strings_of(source: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module, documentation included; what an f-string fills in is X."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values]
            yield node.lineno, " ".join("".join(parts).split())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


def command_lines() -> list[tuple[str, str, bool]]:
    found = [(page, *at) for page in PAGES for at in code_of(page)]
    found += [(script, *at, False) for script in SCRIPTS for at in lines_of(script)]
    for source in SOURCES:
        for number, text in strings_of(source):
            found += [(source, number, words, True) for words in re.findall(r"['`](cryoiso [a-z][^'`]*)['`]", text)]
    result = {}
    for path, number, text, inline in found:
        for words in commands_in(text):
            result[f"{path.relative_to(ROOT)}:{number}: {words}"] = (words, inline)
    return [(at, *one) for at, one in result.items()]


def commands_in(text: str) -> Iterator[str]:
    """What stands behind the program's name in a line, without comments, redirections and other commands behind it."""
    for found in re.finditer(r"(?:^|[\s|;&(])cryoiso (?=[a-z])((?:\[[^\]]*\]|[^|;&>#`)]|(?<! )#)*)", text):
        words = re.split(r" {3,}", found.group(1).strip())[0].rstrip(".,:")
        if words and "/" not in words.split()[0]:
            yield words


def variants(words: str) -> list[list[str]]:
    """The words of a synopsis, all optional ones given; of '[--a | --b]' each in turn."""
    choices = re.findall(r"\[([^\]]*\|[^\]]*)\]", words)
    texts = [words]
    for choice in choices:
        texts = [text.replace(f"[{choice}]", one, 1) for text in texts for one in choice.split("|")]
    return [shlex.split(text.replace("[", " ").replace("]", " ").replace("$", "")) for text in texts]


def parse(words: list[str], mentioned: bool = False) -> None:
    """Parses a command line as the program does, without running it; placeholders in capitals stand for numbers where
    a number is expected, and '...' at the end for arguments that were left out.

    Raises:
        AssertionError: there is no such command, or it does not take these words.
    """
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert name in COMMANDS, f"no such command: {name}"
    rest = words[len(name.split()) :]
    if not rest or rest[-1] == "...":
        return
    if mentioned and rest[0].startswith("--"):  # 'plan --measure' names an option, it is no line to be typed
        assert {word for word in rest if word.startswith("--")} <= OPTIONS_OF[name], f"{name}: {rest}"
        return
    try:
        with COMMANDS[name].make_context(name, list(rest), resilient_parsing=False):
            return
    except Exception as error:
        said = error.format_message() if hasattr(error, "format_message") else ""
        option = re.search(r"Invalid value for '(--[^']*)': Input should be a valid (number|integer)", said)
        place = rest.index(option.group(1)) + 1 if option else 0
        if not option or not rest[place].isupper():
            raise AssertionError(f"{name}: {said or repr(error)}") from None
    parse([name, *rest[:place], "16", *rest[place + 1 :]])


def test_the_collection_finds_what_it_should():
    found = [at for at, _, _ in command_lines()]
    for expected in ("README.md", "docs/correct.md", "docs/plan.md", "launch/demo.sh", "containers/selftest.sh"):
        assert any(at.startswith(f"{expected}:") for at in found), expected
    assert sum(at.startswith("cryoiso/") for at in found) > 30 and len(found) > 120


def test_every_command_line_parses():
    wrong = []
    for at, words, inline in command_lines():
        for one in variants(words):
            try:
                parse(one, inline)
            except AssertionError as error:
                wrong.append(f"{at}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("nonsense a", "no such command"),
        ("run --nonsense a", "No such option"),
        ("refine a.star", "Missing option"),
        ("replay reconstruct", "Missing argument"),
        ("correct a b --epochs x", "should be a valid integer"),
    ],
)
def test_a_wrong_line_is_noticed(words, why):
    with pytest.raises(AssertionError, match=why):
        parse(words.split())


def test_options_named_in_prose_exist():
    wrong = []
    for page in PAGES:
        for number, text, _ in code_of(page):
            first = (text.split() or [""])[0]
            if first == "cryoiso" or first in COMMANDS or first.startswith("--"):  # else of another program
                wrong += [f"{page.name}:{number}: {o}" for o in options_in(text) if o not in OPTIONS]
    assert wrong == []


OF_PAGE = {"relion": ["refine", "hook relion"], "validate": ["audit", "verify", "replay"]}
OF_PAGE |= {name: [name] for name in ("correct", "diagnose", "doctor", "plan", "realign")}
OF_PAGE["auxiliary"] = ["auxiliary train", "auxiliary generate"]


@pytest.mark.parametrize("page", sorted(OF_PAGE))
def test_options_on_the_page_of_a_command_are_that_commands(page):
    """Its own options, and those of commands that are named in the same piece of code."""
    own = set().union(*(OPTIONS_OF[one] for one in OF_PAGE[page]))
    wrong = []
    for number, text, _ in code_of(ROOT / "docs" / f"{page}.md"):
        named = [OPTIONS_OF[one] for one in COMMANDS if re.search(rf"\b{one}\b", text)]
        wrong += [f"{page}.md:{number}: {o}" for o in options_in(text) if o not in own.union(*named)]
    assert wrong == []


def test_options_named_in_messages_exist():
    """Hints and help texts name no option that no command has."""
    wrong = []
    for source in SOURCES:
        if source.name == "page.py":  # style sheets
            continue
        for number, text in ((n, t) for n, t in strings_of(source) if " " in t):  # by itself it is for another program
            wrong += [f"{source.name}:{number}: {o}" for o in options_in(text) if o not in OPTIONS]
    assert wrong == []


def test_the_message_about_a_missing_pixel_size_names_the_option_of_each_command():
    from cryoiso.io.mrc import PIXEL_SIZE_HINT

    for option, output in (
        ("--pixel-size", {"simulate", "reference", "benchmark"}),
        ("--map-pixel-size", ()),
        ("--ref-pixel-size", ()),
    ):
        listed = re.search(rf"{option} \(([^)]*)\)", PIXEL_SIZE_HINT)
        having = {command.split()[0] for command in COMMANDS if option in OPTIONS_OF[command]} - set(output)
        assert listed and set(listed.group(1).split(", ")) == having, option
