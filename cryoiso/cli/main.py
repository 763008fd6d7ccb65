"""The program ``cryoiso``.

Nothing heavy is imported here or by the command modules: ``cryoiso --help`` answers at once, and what a command needs
is imported when it runs.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from typing import Annotated

import typer

from cryoiso.cli.common import Voice, as_command
from cryoiso.cli.help import PanelledCommand
from cryoiso.core.errors import EXIT_KEYBOARD, EXIT_OTHER
from cryoiso.parallel.launcher import OVERRIDE, limit_threads_early, speaks

# name, module, function, works on all ranks together (the others run on rank 0 alone)
COMMANDS = (
    ("init", "init_cmd", "init", False),
    ("doctor", "doctor_cmd", "doctor", True),
    ("plan", "plan_cmd", "plan", False),
    ("benchmark", "benchmark_cmd", "benchmark", False),
    ("launch", "launch_cmd", "launch", False),
    ("simulate", "simulate_cmd", "simulate", False),
    ("ingest", "ingest_cmd", "ingest", True),
    ("reference", "reference_cmd", "reference", False),
    ("refine", "refine_cmd", "refine", True),
    ("classify", "classify_cmd", "classify", True),
    ("realign", "realign_cmd", "realign", True),
    ("reconstruct", "reconstruct_cmd", "reconstruct", True),
    ("ctf-refine", "ctf_refine_cmd", "ctf_refine", True),
    ("correct", "correct_cmd", "correct", True),
    ("micelle", "micelle_cmd", "micelle", True),
    ("diagnose", "diagnose_cmd", "diagnose", False),
    ("rebalance", "rebalance_cmd", "rebalance", False),
    ("audit", "audit_cmd", "audit", True),
    ("convert", "convert_cmd", "convert", False),
    ("symmetry", "symmetry_cmd", "symmetry", False),
    ("report", "report_cmd", "report", False),
    ("run", "run_cmd", "run", True),
    ("resume", "run_cmd", "resume", True),
    ("verify", "verify_cmd", "verify", True),
    ("replay", "replay_cmd", "replay", True),
    ("relion-external", "relion_external_cmd", "relion_external", False),
)
PASSED_ON = {"relion-external": {"allow_extra_args": True, "ignore_unknown_options": True}}
"""Commands that hand options which they do not know on to another command."""

GROUPS = {
    "hook": (
        "Entry points called by other programs (RELION).",
        (("relion", "hook_cmd", "relion", False),),
    ),
    "auxiliary": (
        "Train a generator of particle images; make auxiliary particles with it.",
        (("train", "auxiliary_cmd", "train", True), ("generate", "auxiliary_cmd", "generate", True)),
    ),
}


def _version(wanted: bool) -> None:
    if wanted:
        from cryoiso import __version__

        typer.echo(f"cryoiso {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Correct poses, independent half-maps and an isotropic map from cryo-EM particles with preferred orientation.

    Start with 'cryoiso init particles.star', then 'cryoiso run job.toml', alone or under mpirun or srun.
    """


def build_app() -> typer.Typer:
    """The typer application with all commands."""
    app = typer.Typer(
        name="cryoiso",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_top)
    _add(app, COMMANDS)
    for group, (about, commands) in GROUPS.items():
        inner = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None)
        _add(inner, commands)
        app.add_typer(inner, name=group)
    return app


def _add(app: typer.Typer, commands: tuple[tuple[str, str, str, bool], ...]) -> None:
    for name, module, function, collective in commands:
        body = getattr(importlib.import_module(f"cryoiso.cli.{module}"), function)
        app.command(name, cls=PanelledCommand, context_settings=PASSED_ON.get(name))(as_command(body, collective))


def _save_overheads() -> None:
    """Costs of every run that do nothing for it: together a third of a short one.

    Python's garbage collector walks over everything that torch's import made, again and again and at the end; torch's
    large arrays lie on huge pages only on request, and page faults are slow otherwise.
    """
    gc.set_threshold(200_000, 20, 20)
    atexit.register(_leave_without_collecting)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _leave_without_collecting() -> None:
    """Spare the last collection, unless Triton was loaded (torch does so to count operations): its bindings would call
    everything that is left a leak, over a hundred lines after the result of a run."""
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """Runs the command line of this process; exit codes as in ``core.errors``."""
    if sys.argv[1:2] == ["hook"]:
        os.environ[OVERRIDE] = "0"  # a rank of another program started it: that program's launcher is not ours
    limit_threads_early()
    _save_overheads()
    Voice.muted = not speaks()
    with Voice.while_parsing():
        app = build_app()
        try:
            app(prog_name="cryoiso")
        except KeyboardInterrupt:
            sys.exit(EXIT_KEYBOARD)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_OTHER)


if __name__ == "__main__":
    main()
