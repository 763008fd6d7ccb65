"""ChimeraX's script names files that are there, levels that are stated, and a palette for what colours mean."""

from __future__ import annotations

import re

from cryoiso.core import products
from cryoiso.report.view_script import OPENED, view_script

LEVELS = {name: 0.1 * i for i, name in enumerate(OPENED[:4], 1)}


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_everything_is_opened_once_and_half_maps_are_hidden():
    text = view_script(OPENED, LEVELS, (3.0, 6.0))
    opened = [re.fullmatch(r"open (\S+) id (\d)", line) for line in commands(text)]
    number = {m[1]: m[2] for m in opened if m}
    assert set(number) == set(OPENED) and len(set(number.values())) == len(OPENED)
    hidden = re.search(r"^hide #([\d,]+) models$", text, re.M)[1].split(",")
    assert {number[name] for name in products.HALF_MAPS} <= set(hidden)
    assert number[products.RESULT_CORRECTED_MAP] not in hidden
    for name, level in LEVELS.items():
        assert f"volume #{number[name]} style surface step 1 level {level:.4g} " in text
    share = f"color sample #{number[products.RESULT_CORRECTED_MAP]} map #{number[products.RESULT_MEASURED]} palette 0,#"
    assert share in text and "palette 3,#" in text


def test_without_a_correction_the_weighted_map_is_shown():
    here = (products.WEIGHTED_MAP, *products.HALF_MAPS)
    text = view_script(here, {name: 0.2 for name in here})
    assert "color sample" not in text and "hide #2,3 models" in text and "/" not in "".join(commands(text))
