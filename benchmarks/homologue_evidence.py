"""How far the first iteration confirms the homologue in the sets of views.py: the measure behind `auxiliary.weight`.

No auxiliary particles are made; one iteration of the raw particles is enough. With the refusal of noise switched off,
since noise is what the measure must not be taken in by.

    python benchmarks/homologue_evidence.py --work sets --sets noise_white,noise_background,one_pole_-15 --seeds 3,4
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, views
from benchmarks.job_process import switch_refusal_off
from benchmarks.views_rows import ROWS, job_text

DEFAULT_SETS = ("noise_white", "noise_coloured", "noise_background", "one_pole_-13", "one_pole_-15", "two_poles_-15",
                "side_views_-15", "uniform_-15", "C1", "D2")  # fmt: skip


def evidence(name: str, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """The record of the homologue after one iteration, and its CPU time."""
    import tomllib

    from cryoiso.core.config import parse_job
    from cryoiso.methods.auxiliary.reference_check import homologue_evidence
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.refine import begin_refinement
    from cryoiso.pipeline.job_inputs import using_scratch
    from cryoiso.pipeline.stages.refine import refine_request

    folder = views.prepare(name, seed, data, work)
    job = parse_job(tomllib.loads(job_text(ROWS["refine"], views.KINDS[name], folder)), folder / "job.toml")
    started = time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as out:
        run, inputs = begin_refinement(job, Path(out), get_context(), resume=False)
        with using_scratch(inputs):
            found = homologue_evidence(refine_request(run, inputs, resume=False), run.comm)["homologue"]
    return {"set": name, "seed": seed, **found, "cpu_s": round(time.process_time() - started, 1),
            "version": views.version()}  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    head = ("set", "seed", "above noise, sd", "confirmed", "rho inside", "rho beyond, first to last", "to Å")
    lines = []
    for r in records:
        beyond = [value for value in r["rho"][r["first_shell"] :] if value]
        last = r["first_shell"] + len(beyond) - 1
        lines.append((
            r["set"], r["seed"], f"{r['deviation']:.1f}", "yes" if r["confirmed"] else "no", f"{r['rho'][1]:.2f}",
            f"{beyond[0]:.2f} to {beyond[-1]:.2f}" if beyond else "-",
            f"{r['first_A'] * r['first_shell'] / last:.1f}" if beyond else "-",
        ))  # fmt: skip
    return harness.markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/ (default ../shared)")
    parser.add_argument("--sets", default=",".join(DEFAULT_SETS), help=f"of {', '.join(views.KINDS)}")
    parser.add_argument("--seeds", default="3", help="with commas")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "homologue_evidence.json")
    parser.add_argument("--work", type=Path, help="keep the sets here; those of views.py are taken")
    parser.add_argument("--tables", action="store_true", help="only print the table of what is there")
    a = parser.parse_args()
    if not a.tables:
        switch_refusal_off()
        with harness.work_folder(a.work) as work:
            for seed in map(int, a.seeds.split(",")):
                for name in views.chosen(a.sets, views.KINDS, "set"):
                    record = evidence(name, seed, (a.shared / "data").resolve(), work.absolute())
                    views.add_record(a.out, {"row": "first iteration", **record})
                    print(table([record]).splitlines()[-1], flush=True)
    print(table(json.loads(a.out.read_text())["records"]))


if __name__ == "__main__":
    main()
