"""What RELION starts in the place of relion_external_reconstruct: hands the iteration to the ranks that wait.

``python -m cryoiso.engines.relion.callback --desk FILE STAR``; the engine puts that into a small script, because
RELION takes the name of a program and nothing else. It must answer fast and in little memory, for every half and
iteration of a run: nothing but the standard library is loaded. Exit status 0: the result file is there; anything else
ends RELION.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from cryoiso.core.errors import EXIT_OTHER, EXIT_USAGE, CryoisoError
from cryoiso.parallel.task_socket import request

VARIABLE = "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE"
ADDRESS_FILE = "callback.json"


def hand_over(address_file: Path, star: str) -> None:
    """Asks the waiting ranks to reconstruct, and returns when the result is there.

    Args:
        address_file: file that says where they wait.
        star: RELION's ``..._external_reconstruct.star``.

    Raises:
        InputError: nobody waits.
        HandoverError: they could not, or are gone.
    """
    request(address_file, {"star": os.path.abspath(star), "host": socket.gethostname(), "process": os.getpid()})


def main(arguments: Sequence[str]) -> int:
    """The program."""
    if len(arguments) != 3 or arguments[0] != "--desk":
        sys.stderr.write("usage: python -m cryoiso.engines.relion.callback --desk FILE STAR\n")
        return EXIT_USAGE
    try:
        hand_over(Path(arguments[1]), arguments[2])
    except CryoisoError as error:
        sys.stderr.write(f"cryoiso: {error.line()}\n")
        return error.exit_code or EXIT_OTHER
    return 0


def write_script(script: Path, address_file: Path) -> str:
    """The script, and what RELION's variable must be set to. RELION hands it to a shell, so spaces do no harm."""
    package = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    script.write_text(
        "#!/bin/sh\n# RELION calls this after every iteration; see cryoiso's docs/relion.md\n"
        f"PYTHONPATH={shlex.quote(path)} exec {shlex.quote(sys.executable)} -m cryoiso.engines.relion.callback "
        f'--desk {shlex.quote(str(address_file.absolute()))} "$@"\n'
    )
    script.chmod(0o755)
    return f"/bin/sh {shlex.quote(str(script.absolute()))}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
