"""Whether a run folder is one of this user's own, and so may start the programs that its resolved.toml names.

Who owns the files says nothing: an archive belongs to whoever unpacks it. So a run is signed when it starts
(HMAC-SHA256 over its job) with a secret that each user has in the home folder, which all nodes of a cluster see. A
folder without such a signature is somebody else's.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryoiso.core.config import Job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.contained_path import links_out
from cryoiso.pipeline.records.manifest import job_key, manifest_record
from cryoiso.pipeline.records.run_folder import RunFolder

logger = logging.getLogger("cryoiso")
PROGRAMS = (
    ("relion", "program"), ("relion", "launcher"), ("relion", "extra"), ("command", "run"), ("command", "go_on"),
    ("auxiliary", "post_command"),
)  # fmt: skip
"""Settings that decide which programs are started, and with which arguments."""
FOLDER = "CRYOISO_STATE_DIR"
"""Where the secret lies; else $XDG_STATE_HOME/cryoiso, else ~/.local/state/cryoiso."""
SECRET = "run-key"
_BYTES = 32


def programs_of(job: Job) -> dict[str, str]:
    """What a job says about programs, where it is not the default: "section.key" -> value."""
    programs = {}
    for section, key in PROGRAMS:
        part = getattr(job, section)
        value = getattr(part, key)
        if value != type(part).model_fields[key].default:
            programs[f"{section}.{key}"] = str(value)
    return programs


def signature(job: Job) -> dict[str, Any]:
    """What the manifest of a run keeps so that its user's later starts know it; warns where it cannot be made."""
    facts = {"job_key": job_key(job), "programs": programs_of(job)}
    try:
        secret = _secret(make=True)
    except OSError as error:
        level = logging.WARNING if facts["programs"] else logging.DEBUG
        logger.log(level, "this run cannot be signed as yours (%s): 'cryoiso resume' will need --trust. Set %s to a "
                   "folder of yours that all nodes see.", error, FOLDER)  # fmt: skip
        return {**facts, "mac": ""}
    return {**facts, "mac": _mac(secret, facts)}


def require_trust(run: RunFolder, job: Job, trust: bool, named: dict[str, str] | None = None) -> None:
    """Stops before a folder that is not of this user's own run starts programs or is written to (rank 0).

    Args:
        job: of resolved.toml.
        trust: the user has said that the folder may do what it names.
        named: programs that a job file of the user's own names, as ``programs_of`` has them; a job that is requeued
            goes on with these where the secret is not to be had (a home that compute nodes do not see).

    Raises:
        UsageError: programs, or links that lead out of the folder, in a run that this user has not started; programs
            that were changed since the start of one that he has.
    """
    manifest = manifest_record(run.manifest)
    signed: Any = manifest.get("signature")
    now = programs_of(job)
    own = _is_own(signed)
    changed = own and signed["programs"] != now
    if not trust and now != named and (changed or (now and not own)):
        raise UsageError(_refusal(run, now, own), code="run-not-trusted")
    if not own and not trust and (links := links_out(run.path)):
        raise UsageError(
            f"{run.path} is not of a run that you have started, and {links[0]} leads out of it, to "
            f"{os.path.realpath(links[0])}: what is written there would go elsewhere. If this is intended: "
            "'cryoiso resume --trust'.",
            code="run-not-trusted",
        )
    if not own:
        programs = "the programs that it names are those of your job file" if now else "it names no programs"
        how = "it is trusted as you say" if trust else f"{programs}, and no link in it leads out"
        logger.warning("%s is not of a run that you have started; %s", run.path, how)
    if manifest.get("job_key") not in (None, job_key(job)):
        logger.warning("%s was changed since the last start (%s); what depends on it is done again", run.resolved,
                       _differences(manifest.get("config"), job))  # fmt: skip


def require_recorded_job(run: RunFolder, job: Job) -> None:
    """Stops if resolved.toml is not the job that the run was last started with.

    Raises:
        InputError: says which settings differ.
    """
    manifest = manifest_record(run.manifest)
    if manifest.get("job_key") not in (None, job_key(job)):
        raise InputError(
            f"was changed since the run: {_differences(manifest.get('config'), job)}", file=run.resolved,
            expected=f"the job that {run.manifest.name} records",
            hint="A replay would be of another job. Put the old file back, or 'cryoiso resume' first.",
            code="run-job-changed",
        )  # fmt: skip


def _refusal(run: RunFolder, now: dict[str, str], own: bool) -> str:
    named = ", ".join(f"{key} = {value!r}" for key, value in now.items()) or "the default programs"
    if own:
        return (
            f"{run.resolved}: the programs were changed since you started this run; now {named}. 'cryoiso resume "
            "--trust' goes on with them, if it was you who changed them."
        )
    return (
        f"{run.path} is not of a run that you have started, and its resolved.toml names programs: {named}. Look at "
        f"them; '--trust' of resume and replay starts them with your rights. If it is your own run (another home "
        f"folder, a container, an earlier version of cryoiso), 'cryoiso resume --trust' signs it as yours; set "
        f"{FOLDER} to a folder that both see."
    )


def _differences(config: Any, job: Job) -> str:
    """Which settings differ from those of the last start, old -> new."""
    now, changes = job.model_dump(), []
    for section, keys in (config if isinstance(config, dict) else {}).items():
        for key, value in (keys if isinstance(keys, dict) else {}).items():
            new = now.get(section, {}).get(key)
            if section != "launch" and new != value:
                changes.append(f"{section}.{key}: {value!r} -> {new!r}")
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    return ", ".join(changes[:4]) + more or "its settings"


# --- the signature


def _is_own(signed: Any) -> bool:
    if not isinstance(signed, dict) or not isinstance(signed.get("mac"), str) or not signed["mac"].isascii():
        return False
    if not isinstance(signed.get("programs"), dict) or not isinstance(signed.get("job_key"), str):
        return False
    try:
        secret = _secret(make=False)
    except OSError:
        return False
    return hmac.compare_digest(_mac(secret, signed), signed["mac"])


def _mac(secret: bytes, facts: dict[str, Any]) -> str:
    text = json.dumps(["cryoiso run", facts["job_key"], facts["programs"]], sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _secret(make: bool) -> bytes:
    """This user's secret.

    Raises:
        OSError: it is not there and cannot be made, or cannot be read.
    """
    folder = _folder()
    file = folder / SECRET
    with suppress(FileNotFoundError):
        return _read(file)
    if not make:
        raise FileNotFoundError(2, "no key of this user", str(file))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = folder / f".{SECRET}.{os.getpid()}.{secrets.token_hex(4)}"
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(secrets.token_hex(_BYTES).encode())
            os.fsync(stream.fileno())
        try:
            os.link(part, file)
        except FileExistsError:  # another process was quicker
            pass
        except OSError:  # a file system without hard links
            os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return _read(file)


def _read(file: Path) -> bytes:
    content = file.read_bytes()
    if len(content) < 2 * _BYTES:
        raise OSError(22, "is no key; remove it, and a new one is made", str(file))
    return content


def _folder() -> Path:
    """
    Raises:
        OSError: there is no home folder.
    """
    if folder := os.environ.get(FOLDER):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cryoiso"
    except RuntimeError as error:
        raise OSError(2, str(error)) from None
