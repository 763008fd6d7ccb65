"""Codes of errors: every error has one, every one is used and explained, and none is lost on the way to a reader."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from errors_helper import raises_code
from mpi_helper import run_mpi

from cryoiso.core import errors
from cryoiso.core.error_codes import CODES, GROUPS
from cryoiso.core.errors import EXIT_INPUT, CryoisoError, InputError, Interrupted, UsageError, code_of, with_code
from cryoiso.io.atomic import DiskFullError
from cryoiso.io.checkpoint import DamagedError
from cryoiso.io.staging import NotStaged
from cryoiso.parallel.context import Context
from cryoiso.pipeline import finding
from cryoiso.pipeline.stages.isolated_process import apart

ROOT = Path(__file__).resolve().parents[2]
FIXED = {"Interrupted", "DiskFullError", "DamagedError", "NotStaged"}
"""Classes of errors that have one code each."""
FAMILY = {"CryoisoError", "InputError", "UsageError", "MissingError", "HandoverError"}
CALLS = FAMILY | FIXED


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "cryoiso").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def name_of(call: ast.expr) -> str:
    if isinstance(call, ast.Call):
        return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    return ""


def literals(value: ast.expr) -> set[str]:
    """Codes that an expression may have; what it tests or looks up is not one."""
    if isinstance(value, ast.IfExp):
        return literals(value.body) | literals(value.orelse)
    if isinstance(value, ast.Constant):
        return {value.value} - {""}
    if name_of(value) in {"str", "get"}:  # _CODES.get(kind, default), str(found.get("code") or default)
        return set().union(*map(literals, value.args[0 if name_of(value) == "str" else 1 :]))
    if isinstance(value, ast.BoolOp):
        return set().union(*map(literals, value.values[1:]))
    return set()


def handed_on(value: ast.expr) -> bool:
    """Whether a code comes from another error or from an argument."""
    return (isinstance(value, ast.Attribute) and value.attr == "code") or ast.unparse(value) in {
        "code", "code_of(error)"
    }  # fmt: skip


def test_every_error_is_made_with_a_code_of_the_registry():
    wrong, seen = [], 0
    for path, tree in modules():
        for call in ast.walk(tree):
            if name_of(call) not in FAMILY:
                continue
            seen += 1
            given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
            codes = literals(given[0]) if given else set()
            if not given or not (codes or handed_on(given[0])) or codes - set(CODES):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}: {codes or 'no code'}")
    assert not wrong and seen > 400


def test_classes_with_a_code_of_their_own_are_all_known():
    """A new subclass that takes no code must be listed here, or its errors would not be looked at."""
    kinds = {"CryoisoError"}
    for _ in range(3):
        for _, tree in modules():
            kinds |= {
                node.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef) and kinds & {getattr(base, "id", "") for base in node.bases}
            }
    assert kinds == CALLS


def test_every_code_of_the_registry_is_used():
    used: set[str] = set()
    for path, tree in modules():
        if path.name != "error_codes.py":
            used |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in CODES}
    assert set(CODES) - used == set()


def test_codes_are_lower_case_words_and_stand_once():
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in CODES)
    assert len(CODES) == sum(map(len, GROUPS.values()))
    assert all(meaning and meaning[-1] not in ".:" for meaning in CODES.values())


def test_troubleshooting_has_every_code_under_its_heading():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        heading, _, body = section.partition("\n")
        entries = re.split(r"^### `([^`\n]+)`\n", body, flags=re.M)
        found[heading] = dict(zip(entries[1::2], entries[2::2], strict=True))
    assert {heading: list(entries) for heading, entries in found.items()} == {
        heading: list(codes) for heading, codes in GROUPS.items()
    }
    short = [code for entries in found.values() for code, entry in entries.items() if len(entry.split()) < 8]
    assert not short


def test_documentation_links_to_codes_that_exist():
    for page in (ROOT / "docs").rglob("*.md"):
        for anchor in re.findall(r"troubleshooting\.md#([\w-]+)", page.read_text(encoding="utf-8")):
            assert anchor in CODES, f"{page.name}: {anchor}"


@pytest.mark.parametrize(
    "error",
    [
        InputError("too short", file="a.mrcs", row=7, expected="10", found="6", hint="Copy.", code="stack-too-short"),
        UsageError("no", code="options-conflict"),
        Interrupted("stop"),
        DiskFullError("full"),
        DamagedError("damaged", file="a.npz"),
        NotStaged("why"),
    ],
)
def test_an_error_comes_back_from_another_process_whole(error):
    error.exit_code = 3
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and back.__dict__ == error.__dict__
    assert back.code in CODES and back.exit_code == 3


def _fails(code: str) -> None:
    raise InputError("no such row", file="a.star", row=3, code=code)


def _breaks() -> None:
    raise ZeroDivisionError("by zero")


def test_an_error_of_a_process_of_its_own_keeps_its_code():
    with raises_code("value-out-of-range", InputError, match=r"a\.star, row 3"):
        apart(_fails, "value-out-of-range")
    with raises_code("unexpected-error", match="ZeroDivisionError in '_breaks': by zero"):
        apart(_breaks)


@pytest.mark.mpi
def test_an_error_of_one_rank_has_its_code_on_all():
    script = """
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.parallel.abort import agree, guard, on_root
from cryoiso.parallel.context import get_context
ctx = get_context()
def fails():
    raise InputError("gone", file="a.star", code="file-not-found")
for call in (lambda: on_root(ctx, fails),
             lambda: agree(ctx, InputError("odd", code="box-mismatch") if ctx.rank == 1 else None)):
    try:
        call()
    except CryoisoError as error:
        print(f"{ctx.rank} {error.code} {error.exit_code}")
with guard(ctx):
    on_root(ctx, fails)
"""
    done = run_mpi(3, script, check=False)
    assert sorted(done.stdout.split("\n")[:-1]) == sorted(
        f"{rank} {code} {EXIT_INPUT}" for rank in range(3) for code in ("file-not-found", "box-mismatch")
    )
    assert done.returncode == EXIT_INPUT
    assert [line for line in done.stderr.splitlines() if "error: " in line] == ["error: a.star: gone [file-not-found]"]


def test_the_line_on_stderr_ends_with_the_code_and_the_log_has_it(capsys, caplog):
    from cryoiso.parallel.abort import guard

    with caplog.at_level("DEBUG", logger="cryoiso"), pytest.raises(SystemExit), guard(Context()):
        _fails("value-out-of-range")
    assert capsys.readouterr().err == "error: a.star, row 3: no such row [value-out-of-range]\n"
    assert "a.star, row 3: no such row [value-out-of-range]" in caplog.text


@pytest.mark.parametrize(
    "error, code",
    [
        (CryoisoError("x", code="relion-failed"), "relion-failed"),
        (KeyboardInterrupt(), "interrupted-from-keyboard"),
        (PermissionError(13, "no"), "system-error"),
        (SystemExit(3), "unexpected-error"),
        (KeyError("x"), "unexpected-error"),
    ],
)
def test_any_exception_has_a_code(error, code):
    assert code_of(error) == code and code in CODES


def test_output_of_a_program_follows_the_code():
    assert with_code("it failed\nSegmentation fault", "post-command-failed").split("\n") == [
        "it failed [post-command-failed]", "Segmentation fault"
    ]  # fmt: skip


def test_findings_of_doctor_that_are_errors_have_codes():
    """In the source: each Finding with ERROR names a code."""
    wrong = []
    for path, tree in modules():
        for call in ast.walk(tree):
            if name_of(call) == "Finding" and "ERROR" in {ast.unparse(a) for a in call.args}:
                given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
                if not given or not literals(given[0]) <= set(CODES) or not literals(given[0]):
                    wrong.append(f"{path.name}:{call.lineno}")
    assert not wrong
    bad = finding.Finding("disk", finding.ERROR, "none is left", exit_code=1, code="disk-full")
    assert json.loads(json.dumps(finding.as_dicts([bad])))[0]["code"] == "disk-full"


def test_a_code_is_required():
    with pytest.raises(TypeError):
        errors.UsageError("no")  # type: ignore[call-arg]
