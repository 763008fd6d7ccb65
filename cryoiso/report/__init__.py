"""The report of a run, made from the files of its folder alone."""

from __future__ import annotations

from pathlib import Path

from cryoiso.core import products


def build(run_folder: Path | str, before: Path | str | None = None) -> Path:
    """Writes ``report.html`` (one self-contained file) and ``report.json`` (the same numbers) into a run folder.

    Whatever the run has not made (yet) is left out, so a report can be built of an unfinished run.

    Args:
        before: folder of another run of the same particles, which is shown beside this one as "before".

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: the folder is not a run folder, one of its files cannot be read, or the other run is not of the
            same particles.
    """
    import json

    from cryoiso.io.atomic import write_text
    from cryoiso.report.collect import collect, collect_maps
    from cryoiso.report.figure_list import figures
    from cryoiso.report.page import page
    from cryoiso.report.sections import map_quality
    from cryoiso.report.sections.auxiliary import collect_samples
    from cryoiso.report.sections.correct import collect_slices
    from cryoiso.report.sections.measured import collect_surface
    from cryoiso.report.sharing import figures_for_others, for_others

    folder, other = Path(run_folder), None if before is None else Path(before)
    data = collect(folder, other)
    pictures = figures(
        data, collect_maps(folder, data, other), collect_samples(folder, data), collect_slices(folder, data),
        collect_surface(folder), map_quality.collect_slices(folder),
    )  # fmt: skip
    html = page(for_others(data, folder), figures_for_others(pictures, data, folder))
    numbers = json.dumps(for_others(data, folder), indent=1, ensure_ascii=False)
    write_text(folder / products.REPORT_NUMBERS, numbers + "\n")
    write_text(folder / products.REPORT_PAGE, html)
    return folder / products.REPORT_PAGE


def publish(run_folder: Path | str) -> Path:
    """What a run does at its end: the report, and in ``result/`` picture, texts and numbers for a deposition.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: as ``build``.
    """
    from cryoiso.report.deposit import deposit

    deposit(Path(run_folder))
    return build(run_folder)
