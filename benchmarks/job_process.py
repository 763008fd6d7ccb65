"""A job file refined in this process by one command of cryoiso: any key of it, also those that no option stands for.

With --unguarded the refusal of noise is switched off, for the noise controls only (nothing of the program can do that):
where images do not tell the grey scale of the reference it is 1.9, what the simulated sets of haemagglutinin have.

    python -m benchmarks.job_process refine|realign|run JOB OUT [--unguarded]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

GREY_SCALE = 1.9


def switch_refusal_off() -> None:
    """Replaces the refusal and the grey scale; before anything else of cryoiso is imported, since names are copied."""
    from cryoiso.refine import initial_model

    measured = initial_model.grey_scale

    def grey_scale(run: Any, reference: Any, sigma2: Any, state: Any, references: Any = None) -> float:
        match = initial_model.match(run, references or dict.fromkeys((1, 2), reference), sigma2, state)
        known = match.chance < initial_model.CHANCE and not match.inverted
        return measured(run, reference, sigma2, state, references) if known else GREY_SCALE

    initial_model.require_match = lambda *_args, **_keys: None
    initial_model.grey_scale = grey_scale


def refine(command: str, job_file: Path, out: Path) -> None:
    from cryoiso.core.config import parse_job
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.realign import realign_files
    from cryoiso.pipeline.commands.refine import refine_files

    logging_as_a_command()
    job = parse_job(tomllib.loads(job_file.read_text()), job_file)
    (refine_files if command == "refine" else realign_files)(job, out, get_context())


def logging_as_a_command() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cryoiso").setLevel(logging.INFO)


def main() -> None:
    command, job_file, out = sys.argv[1:4]
    if "--unguarded" in sys.argv[4:]:
        switch_refusal_off()
    if command == "run":
        from cryoiso.cli.main import main as cryoiso

        sys.argv[1:] = ["run", job_file, "--out", out]
        cryoiso()
    else:
        refine(command, Path(job_file), Path(out))


if __name__ == "__main__":
    main()
