"""The methods section of a run, from its files alone: what was done, with the numbers really used, and no more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.report.citations import Citations
from cryoiso.report.quoted import WITHOUT_A_MASK, mask_warning, quoted_resolution
from cryoiso.report.records import ReportData
from cryoiso.report.text import number, percent, section

NO_GOLD = "so the two half-maps are not independent and their FSC is no gold standard: it may be too good"
MISSING = (
    "Specimen, microscope, exposure, motion correction, CTF estimation, picking and classification are not known to "
    "cryoiso; add them."
)


def methods(data: ReportData) -> str:
    """METHODS.md: paragraphs, what must be said with the resolution, a table of numbers, and references.

    Args:
        data: from `cryoiso.report.collect.collect`.
    """
    cite = Citations()
    makers = (_particles, _reference, _refinement, _auxiliary, _realign, _maps, _resolution, _directions, _corrected)
    paragraphs = [text for make in makers if (text := make(data, cite))]
    said = warnings(data)
    parts = ["# Methods", f"Written by cryoiso {__version__} from the files of the run. {MISSING}", *paragraphs]
    if said:
        parts += ["## To be said with the resolution", "\n".join(f"- {text}" for text in said)]
    rows = [f"| {label} | {value} |" for label, value in parameters(data)]
    parts += ["## Parameters", "\n".join(["| | |", "|---|---|", *rows])]
    parts += ["## References", "\n".join(cite.listed())]
    return "\n\n".join(parts) + "\n"


def workflow(data: ReportData) -> str:
    return str(section(data["job"], "run").get("workflow") or "refine")


def final_counts(data: ReportData) -> list[int]:
    """Particles in each of the final half-maps."""
    counts = data["reconstruct"].get("half_counts") or data["diagnose"].get("half_counts") or []
    return [int(n) for n in counts]


def warnings(data: ReportData) -> list[str]:
    """What ends or weakens the independence of the half-maps, and what the diagnosis noted."""
    job, said = data["job"], []
    notes = [str(note) for note in data["diagnose"].get("notes") or []]
    realign, auxiliary = section(job, "realign"), section(job, "auxiliary")
    if _has_loop(data) and realign.get("correct", True) and realign.get("mode") == "paired":
        said.append(
            f"One network saw the maps of both half-sets during the refinement (realign.mode = paired), {NO_GOLD}."
        )
        notes = [note for note in notes if "gold standard" not in note]
    if _has_auxiliary(data) and auxiliary.get("generators") == "shared":
        said.append(f"One generator was trained on both half-sets (auxiliary.generators = shared), {NO_GOLD}.")
    if _has_auxiliary(data) and auxiliary.get("post_command"):
        said.append("An outside program changed the references between rounds (auxiliary.post_command); the "
                    "half-sets are "
                    "independent only if it brought nothing into both.")  # fmt: skip
    if data["refine"].get("engine") == "given":
        said.append("The first poses were taken from the particle file. If the two half-sets were not refined "
                    "independently there, the half-map FSC is no gold standard.")  # fmt: skip
    if number(section(job, "refine"), "local_deg") is not None:
        said.append("Poses were refined locally, around those of the particle file; if the half-sets were not "
                    "independent "
                    "there, they are not now.")  # fmt: skip
    if _at_end(data):
        said.append("The FSC curve does not come down to 0.143 before it ends at the pixel size: the resolution is "
                    "limited "
                    "by the pixel size, or the half-maps share something.")  # fmt: skip
    return said + mask_warning(data["diagnose"]) + notes


def _has_loop(data: ReportData) -> bool:
    return workflow(data) in ("realign", "both")


def _has_auxiliary(data: ReportData) -> bool:
    return workflow(data) in ("auxiliary", "both")


def _at_end(data: ReportData) -> bool:
    d = data["diagnose"]
    resolution, frequency = number(d, "resolution_0143_A"), d.get("frequency_invA") or [0]
    return resolution is not None and resolution * frequency[-1] < 1.001


# --- paragraphs


def _particles(data: ReportData, cite: Citations) -> str:
    ingest, job = data["ingest"], data["job"]
    if not ingest:
        return ""
    halves = ingest.get("half_counts") or []
    text = f"{ingest['particles']:,} particle images of {ingest['box_px']} x {ingest['box_px']} pixels "
    text += f"({ingest['pixel_size_A']:.4g} Å per pixel"
    text += f", {ingest['optics_groups']} optics groups)" if ingest.get("optics_groups", 1) > 1 else ")"
    text += f" were processed with cryoiso {__version__}"
    text += f", in two half-sets of {halves[0]:,} and {halves[1]:,}." if len(halves) == 2 else "."
    if section(job, "particles").get("normalise", True):
        text += " Every image was scaled to mean 0 and standard deviation 1 in its background"
        text += ", and inverted, so that protein is bright." if ingest.get("inverted") else "."
    return text


def _reference(data: ReportData, cite: Citations) -> str:
    reference = data["reference"]
    if not reference:
        return ""
    kind, _, file = str(reference.get("source") or "").partition(" ")
    what = {"map": "a density map", "model": "an atomic model"}.get(kind, kind or "a reference")
    text = f"The first reference was made from {what}" + (f" ({Path(file).name})" if file else "")
    if reference.get("fit"):
        text += ", turned and shifted into the frame of another map,"
    return f"{text} and low-passed at {reference['lowpass_A']:g} Å."


def _refinement(data: ReportData, cite: Citations) -> str:
    refine, settings = data["refine"], section(data["job"], "refine")
    engine, symmetry = refine.get("engine"), section(data["job"], "sample").get("symmetry", "C1")
    if engine == "given":
        which = "The first poses" if _has_auxiliary(data) else "Poses"
        return f"{which} were taken from the particle file as they were."
    if not engine:
        return ""
    count, local = len(data["iterations"]), number(settings, "local_deg")
    first = "First, poses" if _has_auxiliary(data) else "Poses"
    where = "over all views" if local is None else f"within {local:g}° of the poses of the particle file"
    if engine == "relion":
        program = section(refine, "relion")
        text = f"{first} were refined with RELION {program.get('version') or '(version unknown)'} {cite('relion')}, "
        text += f"auto-refinement of independent half-sets {cite('gold')}, {where}, {count} iterations"
    elif engine == "cryosparc":
        program = section(refine, "cryosparc")
        version = program.get("version") or "(version unknown)"
        text = f"{first} were refined with cryoSPARC {version}, {program.get('job')} refinement (job "
        text += f"{program.get('project')}-{program.get('uid')}), {where}; half-maps: {program.get('half_maps')}"
    elif engine in ("command", "files"):
        program = section(refine, "command")
        text = f"{first} were refined with {program.get('name') or 'an outside program (command.run)'}, {where}, in "
        text += f"{count} {'round' if count == 1 else 'rounds'}; half-maps: {program.get('half_maps')}"
    else:
        text = f"{first} were refined by maximum likelihood with the program's own engine, {where}"
        if local is None:
            text += f", from a HEALPix {cite('healpix')} grid of order {settings.get('healpix_order')}"
        text += f", {count} iterations. Each half-set had a reference of its own {cite('gold')}"
        if joined := number(settings, "join_halves_A"):
            text += f"; only signal coarser than {joined:g} Å was shared, to keep both in one frame"
        text += _uneven(settings)
    return text + (f". {symmetry} symmetry was imposed." if symmetry != "C1" else ". No symmetry was imposed.")


def _uneven(settings: dict[str, Any]) -> str:
    """How unevenly distributed views were treated; empty for a job of a version that had no settings for it."""
    text = ""
    if settings.get("regularisation") == "uneven":
        text += ". The signal power that regularises the references follows from the half-map FSC and the noise of "
        text += "coefficients that were measured unevenly often"
    elif settings.get("regularisation") == "mean-weight":
        text += ". The signal power that regularises the references follows from the half-map FSC and the mean weight "
        text += "of a shell"
    if settings.get("weighted_fsc"):
        text += "; search radius and convergence follow an FSC that counts coefficients as they were measured"
    axis, end = (number(settings, key) for key in ("view_axis_odds", "view_polarity_floor"))
    if settings.get("view_density") and axis is not None and end is not None and (axis > 1 or end < 1):
        text += ". The density of views was learned in each half-set from the posteriors, and its logarithm was part "
        text += (
            f"of every score (one axis favoured over another {axis:g} times at most, and {percent(end, 0)} even views "
        )
        text += "mixed into from which end it is seen)"
    if settings.get("scale") in ("group", "particle"):
        each = "image, near that of its micrograph," if settings["scale"] == "particle" else "micrograph"
        text += f". A scale of the signal and a noise level were estimated for each {each} in every iteration"
    return text


def _auxiliary(data: ReportData, cite: Citations) -> str:
    parts, settings = data.get("auxiliary") or {}, section(data["job"], "auxiliary")
    rounds = [r for r in parts.get("rounds") or [] if r["corefine"] and not r["corefine"].get("skipped")]
    if not rounds:
        return ""
    with_images = [r for r in rounds if not section(r, "generate").get("skipped")]
    if not with_images:
        text = f"Auxiliary particles {cite('auxiliary')} against preferred orientation were not made: beyond the "
        text += "resolution of the first reference the particles alone confirmed nothing of the homologue."
        return text + _balanced(section(parts, "local"), settings)
    first, last = with_images[0], with_images[-1]
    text = f"Against preferred orientation, auxiliary particles {cite('auxiliary')} were used in "
    text += "one round: " if len(with_images) == 1 else f"{len(with_images)} rounds: "
    text += _generator(settings, section(first["train"], "settings"), section(data["job"], "micelle"))
    text += f" {first['corefine'].get('auxiliary', 0):,} auxiliary particles with evenly distributed views "
    text += f"({settings.get('ratio'):g} per particle, noise multiplied by {settings.get('temperature'):g}) were "
    text += "refined "
    text += "together with the particles" + (", each round anew" if len(with_images) > 1 else "")
    text += ", and then discarded: no auxiliary image entered any of the maps."
    share = number(last["corefine"], "auxiliary_weight_share")
    homologue = section(last["corefine"], "homologue")
    if homologue:
        text += (
            " Their weight was measured: by shell, at most what the particles alone confirmed of the homologue beyond "
        )
        text += "the resolution of the first reference"
        text += "." if homologue.get("confirmed") else ", which was nothing, so they were left out of the references."
    if share:
        text += (
            f" They held {percent(share)} of the weight in the references at the end; half-maps, FSC, signal power and "
        )
        text += "convergence of these refinements were those of the particles alone."
    moved = section(last["corefine"], "moved")
    if number(moved, "median_deg") is not None:
        text += f" In the last round particles turned by {moved['median_deg']:.2g}° (median)"
        text += f", {percent(moved.get('over_20', 0))} of them by more than 20°."
    if settings.get("post_command"):
        text += " Between rounds an outside program was run on each half-set's reference."
    return text + _balanced(section(parts, "local"), settings)


def _balanced(local: dict[str, Any], settings: dict[str, Any]) -> str:
    """The local refinement at the end, if there was one."""
    if not local:
        return ""
    text = f" Finally {local['kept']:,} particles with balanced views (at most {local.get('cap', 0):g} of a "
    text += f"direction in each half-set) were refined locally, within {settings.get('local_deg'):g}°, "
    text += "without auxiliary ones; the "
    return text + f"other {local['dropped']:,} particles are not in the final maps."


def _generator(settings: dict[str, Any], trained: dict[str, Any], micelle: dict[str, Any]) -> str:
    kind = settings.get("generators")
    reference = " and the micelle reconstructed around it" if micelle.get("enable") else ""
    if kind in ("white-noise", "coloured-noise"):
        noise = "white noise" if kind == "white-noise" else "Gaussian noise of the particles' spectrum"
        text = f"projections of the reference{reference} with the particles' CTFs and {noise}; "
        return text + "no generator was trained."
    who = (
        "a conditional hierarchical variational autoencoder for each half-set, trained on its particles alone"
        if kind == "per-half"
        else "one conditional hierarchical variational autoencoder, trained on both half-sets"
    )
    course = ""
    if number(trained, "steps") is not None:
        course = f" ({trained['steps']:,} steps of {trained.get('batch')} images, preset '{trained.get('preset')}')"
    return f"{who}{course}, made images like the particles from projections of the reference{reference}."


def _realign(data: ReportData, cite: Citations) -> str:
    settings = section(data["job"], "realign")
    if not (_has_loop(data) and data.get("realign")):
        return ""
    count = sum(bool(row.get("applied")) for part in data["realign"] for row in part["iterations"])
    times = "one iteration" if count == 1 else f"{count} iterations"
    if not count:
        text = "The references were to be corrected for anisotropy between iterations, but in no iteration the "
        return text + "conditions for it were met."
    if not settings.get("correct", True):
        text = f"After {times} the references were whitened and weighted by the FSC before the next one; no network "
        return text + "was used."
    alone = settings.get("mode") == "independent"
    network = "a network for each half-set, trained on its map alone" if alone else "one network for both half-sets"
    text = f"After {times} the references were corrected for anisotropy {cite('correction')} by {network}, and the "
    text += "next iteration searched with them. Networks made references only; no half-map contains their output."
    kept = number(settings, "keep_lowres_A")
    if kept:
        text += f" Density coarser than {kept:g} Å was kept from the first reference."
    return text


def _maps(data: ReportData, cite: Citations) -> str:
    counts, reconstruction = final_counts(data), data["reconstruct"]
    if len(counts) != 2:
        return ""
    padding = reconstruction.get("padding")
    text = f"The half-maps were reconstructed by back-projection in Fourier space (padding {padding}) "
    text += f"from {counts[0]:,} and {counts[1]:,} particles ({sum(counts):,} together). They were neither masked nor "
    text += "filtered nor sharpened, and no network has touched them. map.mrc is their mean; map_weighted.mrc is the "
    text += "Wiener-filtered map of all particles: the numerators of both half-sets together, divided by the sum of "
    text += "their weights and of 1/tau^2, where the signal's power tau^2 of a shell follows from the half-map FSC and "
    text += "the noise of the unevenly measured directions. It is zero from the first shell on in which the filtered "
    return text + "half-maps do not correlate."


def _resolution(data: ReportData, cite: Citations) -> str:
    d = data["diagnose"]
    resolution = number(d, "resolution_0143_A")
    if resolution is None:
        return ""
    mask_file = section(data["job"], "sample").get("mask")
    mask = {
        "given": f"a mask given by the user ({Path(str(mask_file)).name})",
        "sphere": "a sphere, since the map did not stand out from its solvent",
        "map": "a soft mask made from the mean of the Wiener-filtered half-maps (low-passed at 15 Å, thresholded, "
        "extended by 3 Å, with an edge of 9 Å)",
    }.get(str(data["reconstruct"].get("mask")), f"that of result/{products.MASK}")
    text = f"The resolution is {resolution:.2f} Å, where the Fourier shell correlation of the two half-maps, "
    text += f"corrected for the mask by randomising phases {cite('phases')}"
    start = number(d, "randomise_from_shell")
    if start and d.get("frequency_invA"):
        text += f" beyond {1 / d['frequency_invA'][int(start)]:.1f} Å"
    text += f", falls below 0.143 {cite('threshold')}; the mask was {mask}. "
    unmasked = number(d, "resolution_0143_unmasked_A")
    text += f"Without a mask it is {unmasked:.2f} Å." if unmasked is not None else ""
    if quoted_resolution(d)[1] == WITHOUT_A_MASK:
        text += " Since the mask makes much of the agreement, the number without a mask is the one to quote."
    if _at_end(data):
        text = text.replace("The resolution is", "The resolution is at least", 1)
    return text.strip()


def _directions(data: ReportData, cite: Citations) -> str:
    d = data["diagnose"]
    part, verdict = section(d, "directional"), section(d, "verdict")
    if number(part, "cfar") is None:
        return ""
    text = "By direction"
    spread = [number(part, f"resolution_{key}_A") for key in ("min", "max")]
    if spread[0] is not None and spread[1] is not None:
        text += f", the resolution of the masked half-maps (FSC 0.143 in cones of 20°) lies between {spread[0]:.2f} "
        text += "and "
        text += f"{spread[1]:.2f} Å; the"
    text += f" least over the largest area under these curves (cFAR, open definition) is {part['cfar']:.2f}"
    if number(part, "sphericity") is not None:
        text += f", the sphericity of the 3DFSC {cite('fsc3d')} at 0.5 is {part['sphericity']:.2f}"
    sampled = section(section(d, "sampling"), "estimated")
    if number(sampled, "scf_star") is not None:
        text += f", and the views sample Fourier space with SCF* = {sampled['scf_star']:.2f} {cite('scf')}"
    text += "."
    if verdict.get("verdict"):
        text += f" Diagnosis: {verdict['verdict']}. {verdict.get('sentence', '')}"
    return text.strip()


def _corrected(data: ReportData, cite: Citations) -> str:
    facts = data.get("correct") or {}
    if not facts:
        return ""
    settings, epochs = section(facts, "settings"), number(section(facts, "settings"), "epochs")
    how = {"paired": "one network that saw both half-maps", "independent": "a network for each half-map"}
    who = how.get(str(facts.get("mode")), "a network")
    text = f"As an additional map, the final half-maps were corrected for anisotropy {cite('correction')} with "
    if epochs == 0:
        text += "the solvent constraint alone, without a network"
    else:
        text += f"{who} (method '{settings.get('method')}', preset '{settings.get('preset')}', {epochs} epochs of "
        text += f"{settings.get('sub_maps')} sub-maps of {settings.get('cube_px')} px)"
    limit_A, mean = number(facts, "resolution_A"), number(facts, "filter_mean")
    text += f", up to {limit_A:.2f} Å. " if limit_A is not None else ". "
    if facts.get("keep_measured") is not False:
        text += "What was measured was kept, and the rest filled in"
    else:
        text += "The whole map is what was inferred"
    if mean is not None:
        text += f"; {percent(mean)} of Fourier space up to there was measured (mean of the 3DFSC filter)"
    return text + ". No resolution is read from this map, and it is no half-map."


# --- numbers


def parameters(data: ReportData) -> list[tuple[str, str]]:
    """Rows of the table: label and value."""
    d, job, counts = data["diagnose"], data["job"], final_counts(data)
    settings, sample = section(job, "refine"), section(job, "sample")
    of_first = " of the first refinement" if _has_auxiliary(data) else ""
    rows: list[tuple[str, Any, str]] = [
        ("workflow", workflow(data), ""),
        ("engine", data["refine"].get("engine"), ""),
        ("particles given", data["ingest"].get("particles"), ""),
        ("particles in the final maps", sum(counts) or None, ""),
        ("box", d.get("box_px"), " px"),
        ("pixel size", d.get("pixel_size_A"), " Å"),
        ("symmetry imposed", sample.get("symmetry"), ""),
        ("particle diameter", data["refine"].get("diameter_A") or sample.get("diameter_A"), " Å"),
        ("resolution, FSC 0.143, corrected for the mask", d.get("resolution_0143_A"), " Å"),
        ("resolution, FSC 0.5, corrected for the mask", d.get("resolution_05_A"), " Å"),
        ("resolution, FSC 0.143, unmasked", d.get("resolution_0143_unmasked_A"), " Å"),
        (f"iterations{of_first}", len(data["iterations"]) or None, ""),
        (f"finest search step{of_first}", _last_step(data), "°"),
        ("lowest resolution shared by the half-sets", settings.get("join_halves_A"), " Å"),
        ("seed", section(job, "run").get("seed"), ""),
    ]
    return [(label, _written(value) + unit) for label, value, unit in rows if value not in (None, "")]


def _last_step(data: ReportData) -> float | None:
    steps = [step for row in data["iterations"] if (step := number(row, "step_deg")) is not None]
    return steps[-1] if steps else None


def _written(value: Any) -> str:
    """A number as people write it.

    >>> _written(12345), _written(3.14159), _written(7.0)
    ('12,345', '3.142', '7')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if math.isfinite(value) else "-"
