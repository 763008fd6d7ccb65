"""What the anisotropy correction of the half-maps left: its facts, slices of its volumes, and words for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.types import DensityMap
from cryoiso.report.records import ReportData
from cryoiso.report.run_reader import read_json, stage_folder
from cryoiso.report.text import Entry, Text, number, numbers_of, percent, section

AGREEMENT = "agreement_of_network_outputs_not_a_resolution"
VOLUMES = {
    "after": products.CORRECTED_MAP,
    "share": products.MEASURED,
    "mask": products.MASK,
    "filter": products.FILTER,
    "fourier": products.MEASURED_FOURIER,
}
Slices = dict[str, list[np.ndarray]]
"""Name of a volume -> its planes XY, XZ, YZ through the centre."""

MAPS = (
    "Slices through the centre on one grey scale. {before}After: the corrected map. {share}"
    "Look for density that stands in the corrected map alone, and do not build into it without other evidence."
)
BEFORE = "Before: {what}, cut off at the resolution up to which was corrected, as the corrected map is. "
SHARE = (
    "Last row: the share of the local power that came from data, 1 (bright) measured, 0 (dark) filled in by the "
    "network; lines surround the density of the corrected map; light grey is outside the mask, where it says nothing. "
)
FOURIER = (
    "Planes through the origin of Fourier space, up to the resolution of the correction (circle): how well each "
    "direction was measured (the filter A), and how much of the corrected map's power at each place came from data. "
    "Dark wedges are directions that no view measured: what the map shows there is the network's guess."
)
CURVES = (
    "Left: FSC of the half-maps that went in, inside the mask (not corrected for it); they alone tell a resolution. "
    "Right: how alike the networks made both halves. Networks agree wherever they learnt "
    "alike, right or wrong: this curve is not a resolution, and is not to be read at any threshold."
)
TRAINING = (
    "The loss, its terms and the length of its gradient by step, each record the mean over the steps before it; a "
    "curve for each network. The loss should fall and settle; one term may rise for another. That it falls does not "
    "say that what was filled in is true."
)


def collect_correct(folder: Path) -> dict[str, Any]:
    """correct.json of a run's stage or of the command's folder; empty where nothing was corrected."""
    return read_json(stage_folder(folder, "correct") / products.facts("correct"))


def collect_slices(folder: Path, data: ReportData) -> Slices:
    """Central planes of the volumes that are there: ``before`` and the keys of VOLUMES.

    Raises:
        InputError: a volume cannot be read.
    """
    from cryoiso.io.mrc import read_map

    facts, correct_folder = data.get("correct") or {}, stage_folder(folder, "correct")
    if not facts:
        return {}
    slices: Slices = {}
    box_px = None
    for key, name in VOLUMES.items():
        if (correct_folder / name).exists():
            density = read_map(correct_folder / name)
            box_px = box_px or density.box_px
            if density.box_px == box_px:
                slices[key] = planes(density.data)
    before = _before(folder, facts)
    if before is not None and before.box_px == (box_px or before.box_px):
        slices["before"] = planes(before.data)
    return slices


def planes(volume: np.ndarray) -> list[np.ndarray]:
    """XY, XZ and YZ through the centre, the axis that is named first to the right."""
    return [np.array(volume.take(len(volume) // 2, axis), np.float32) for axis in range(3)]


def _before(folder: Path, facts: dict[str, Any]) -> DensityMap | None:
    """The mean of what was corrected, without what is finer than the correction went; None if not all is there."""
    from cryoiso.io.mrc import read_map
    from cryoiso.physics.filters import lowpass

    paths = [_given(folder, half, str(path)) for half, path in section(facts, "maps").items()]
    if not paths or any(path is None for path in paths):
        return None
    pixel = number(facts, "pixel_size_A")
    maps = [read_map(path, pixel) for path in paths]
    if len({density.box_px for density in maps}) > 1:
        return None
    pixel = maps[0].pixel_size_A
    mean = np.asarray(np.mean([density.data for density in maps], axis=0, dtype=np.float64), np.float32)
    limit_A = number(facts, "resolution_A")
    return DensityMap(lowpass(mean, pixel, limit_A) if limit_A else mean, pixel)


def _given(folder: Path, half: str, path: str) -> Path | None:
    """Where a map that was corrected lies now: in this run, which may have been moved, or where it was."""
    own = stage_folder(folder, "reconstruct") / products.half_map(half)
    return next((p for p in (own, Path(path), folder.parent / path) if p.is_file()), None)


def sentences(data: ReportData) -> list[str]:
    """For the summary at the top."""
    facts = data.get("correct") or {}
    if not facts:
        return []
    measured = _filter_words(facts)
    part = f" ({measured})" if measured else ""
    return [f"corrected_map.mrc: a network filled in what was not measured{part}. No resolution is read from that map."]


def entries(data: ReportData, slices: Slices) -> list[Entry]:
    """Figures, as `cryoiso.report.figure_list` wants them."""
    from cryoiso.report.sections import correct_figures as draw

    facts = data.get("correct") or {}
    curves = numbers_of(facts, "frequency_invA") and (
        numbers_of(facts, "fsc_half_maps") or numbers_of(facts, AGREEMENT)
    )
    fourier = "filter" in slices or "fourier" in slices
    return [
        ("correct", "Anisotropy correction", facts, _caption(facts, slices), lambda: draw.maps(slices, facts)),
        ("correct-fourier", "Measured directions", fourier, FOURIER, lambda: draw.fourier(slices, facts)),
        ("correct-curves", "Before and after the networks", curves, CURVES, lambda: draw.curves(facts, AGREEMENT)),
        ("correct-training", "Training of the correction", draw.courses(facts), TRAINING, lambda: draw.training(facts)),
    ]


def _caption(facts: dict[str, Any], slices: Slices) -> str:
    if "after" not in slices:
        return ""
    what = "the mean of the half-maps" if len(section(facts, "maps")) > 1 else "the map that went in"
    before = BEFORE.format(what=what) if "before" in slices else ""
    return MAPS.format(before=before, share=SHARE if "share" in slices else "")


def texts(data: ReportData) -> dict[str, Text]:
    """Words and table of the section."""
    facts = data.get("correct") or {}
    if not facts:
        return {}
    return {"correct": Text(tuple(_words(facts)), (), tuple(_rows(facts)))}


def _words(facts: dict[str, Any]) -> list[str]:
    single = facts.get("mode") == "single"
    share, measured = number(facts, "measured_share_mean"), _filter_words(facts)
    said = []
    if measured:
        said.append(
            f"{measured[0].upper()}{measured[1:]}: the mean of the filter A, 100 % if all was measured perfectly."
        )
    if facts.get("keep_measured") is not False:
        text = "What was measured is kept, weighted by A. The rest is inferred: filled in by the solvent constraint "
        text += f"and a network from {'this map' if single else 'these half-maps'} alone; nothing in it was measured."
    else:
        text = "The whole corrected map is the network's (keep_measured was off); the share below says how much of it "
        text += "lies where something was measured."
    said.append(text)
    if share is not None:
        said.append(
            f"Inside the mask {share_words(share)} of the local power came from data (mean over the voxels). Power is "
            "mostly that of coarse features, which nearly all views show; for fine ones see 'Measured directions'."
        )
    what = "map that went in, which no network has" if single else "half-maps that went in, which no network has"
    said.append(
        f"Deposit the {what} touched, and judge the resolution by {'it' if single else 'them'}. Corrected maps are for "
        "looking at and for building."
    )
    if facts.get("mode") == "paired":
        said.append(
            "One network saw both half-maps (mode 'paired'): the corrected half-maps are not independent of each "
            "other, and their agreement is no resolution."
        )
    return said


def _filter_words(facts: dict[str, Any]) -> str:
    """How much was measured, as far as it is known."""
    limit_A, mean = number(facts, "resolution_A"), number(facts, "filter_mean")
    up_to = "" if limit_A is None else f" up to {limit_A:.1f} Å"
    return "" if mean is None else f"{share_words(mean)} of Fourier space{up_to} was measured"


def share_words(share: float) -> str:
    """A share that is not all of it is not written as all of it."""
    return "more than 99.9 %" if 0.9995 <= share < 1 else percent(share)


_MODES = {
    "paired": "paired: one network saw both half-maps",
    "independent": "independent: a network for each half-map, which never saw the other one",
    "single": "single: one map",
}


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    limit_A, mean = number(facts, "resolution_A"), number(facts, "filter_mean")
    share, mode = number(facts, "measured_share_mean"), facts.get("mode")
    rows = [
        ("mode", _MODES.get(str(mode), str(mode or ""))),
        ("went in", ", ".join(Path(str(path)).name for path in section(facts, "maps").values())),
        ("corrected up to", "" if limit_A is None else f"{limit_A:.2f} Å"),
        ("mean of the filter A up to there", "" if mean is None else share_words(mean)),
        (
            "share of the local power that was measured, mean inside the mask",
            "" if share is None else share_words(share),
        ),
        ("network", _network(section(facts, "settings"))),
        ("training", _course(section(facts, "settings"))),
        *((f"trained: {_label(label)}", _trained(part)) for label, part in section(facts, "networks").items()),
    ]
    notes = facts.get("notes")
    rows += [("note", str(note)) for note in (notes if isinstance(notes, list) else [])]
    return [row for row in rows if row[1]]


def _label(label: str) -> str:
    return "one network" if label == "both" else f"network of half {label}"


def _network(settings: dict[str, Any]) -> str:
    part = section(settings, "network")
    widths = [str(w) for w in numbers_of(part, "widths") if w is not None]
    said = [f"3D U-Net with {', '.join(widths)} channels"] if widths else []
    if number(part, "convolutions") is not None:
        said.append(f"{part['convolutions']} convolutions a block")
    if settings.get("preset"):
        said.append(f"preset '{settings['preset']}'")
    return ", ".join(said)


def _course(settings: dict[str, Any]) -> str:
    known = (
        ("epochs", "{:g} epochs"),
        ("sub_maps", "{:,g} sub-maps each"),
        ("cube_px", "of {:g} px"),
        ("batch", "{:g} per step"),
    )
    return ", ".join(text.format(value) for key, text in known if (value := number(settings, key)) is not None)


def _trained(part: Any) -> str:
    steps, loss = number(part, "steps"), number(part, "loss")
    said = [] if steps is None else [f"{steps:,g} steps"]
    return ", ".join(said + ([] if loss is None else [f"last loss {loss:.4g}"]))
