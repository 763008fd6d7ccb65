"""What RELION's ``--continue`` needs in its files and does not always find there."""

from __future__ import annotations

import re
from pathlib import Path

from cryoiso.core.types import HALVES
from cryoiso.engines.relion.files import Star
from cryoiso.io.atomic import write_text


def name_half_models(optimiser: Path) -> bool:
    """Names the models of both half-sets in an optimiser file that a last iteration has changed; True: it had.

    ``--force_converge`` writes the files of the iteration that it continues once more, as if the half-sets were joined
    already. If RELION is stopped then, before that long iteration is over, it refuses to continue from this file
    (seen with 3.1.3 and 5.0.1). The models themselves are still there.
    """
    star, block = Star.read(optimiser), "optimiser_general"
    if not star.has(block, "rlnModelStarFile2") or star.text(block, "rlnModelStarFile2"):
        return False
    stem = star.text(block, "rlnModelStarFile").removesuffix("_model.star")
    text = optimiser.read_text(encoding="utf-8")
    for half, label in zip(HALVES, ("rlnModelStarFile", "rlnModelStarFile2"), strict=True):
        model = f"{stem}_half{half}_model.star".replace("\\", r"\\")
        text = re.sub(rf"(?m)^(_{label}\s+)\S+", rf"\g<1>{model}", text)
    text = re.sub(r"(?m)^(_rlnHasConverged\s+)1\b", r"\g<1>0", text)
    write_text(optimiser, text)
    return True
