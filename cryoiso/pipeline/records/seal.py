"""The seal of a finished run: the hash of every file that matters, and one over them all."""

from __future__ import annotations

import hashlib
import json
import logging
from datetime import UTC, datetime

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.io.atomic import write_text
from cryoiso.pipeline.records import manifest as provenance
from cryoiso.pipeline.records.checksums import sum_line
from cryoiso.pipeline.records.hashing import Outputs, sha256_of
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.manifest_record import Manifest
from cryoiso.pipeline.records.run_folder import RunFolder

logger = logging.getLogger("cryoiso")
REPORTS = (products.REPORT_PAGE, products.REPORT_NUMBERS)
"""Outputs that tell of times and machines, and so differ between two runs of one job."""


def write_seal(run: RunFolder, journal: Journal, manifest: Manifest, stages: list[str]) -> None:
    """Completes manifest.json with the finished stages and writes seal.json (rank 0 of a run, after its last line).

    Args:
        stages: names of all stages, in order.
    """
    provenance.note_stages(run, manifest, stages, journal.lines)
    outputs: Outputs = {}
    for stage in manifest["stages"]:
        outputs.update(stage["outputs"])
    if not run.job.exists():
        logger.warning("%s is gone, the run is sealed without it; %s has its settings", run.job, run.resolved.name)
    records = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in (run.job, run.resolved, run.manifest, run.journal)
        if path != run.job or path.exists()
    }
    results = {name: facts for name, facts in outputs.items() if name not in REPORTS}
    seal = {
        "schema": 1,
        "cryoiso": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": digest_of_files({**records, **outputs}),
        "digest_of_results": digest_of_files(results),
        "files": dict(sorted({**records, **outputs}.items())),
    }
    write_text(run.seal, json.dumps(seal, indent=1) + "\n")


def digest_of_files(files: Outputs) -> str:
    """One hash over many: SHA-256 of the lines that sha256sum would print for them, sorted by name."""
    return hashlib.sha256("".join(sum_line(name, files[name]["sha256"]) for name in sorted(files)).encode()).hexdigest()
