"""What a RELION run is begun with: RELION's own files do not tell."""

from __future__ import annotations

import shlex

from cryoiso.core.config import RelionSection
from cryoiso.core.identity import Identity
from cryoiso.core.protocols import RefineRequest
from cryoiso.refine.identity import of_request

WITH_VALUE = ("--gpu", "--sycl", "--j", "--pool", "--scratch_dir", "--keep_free_scratch", "--verb")
ALONE = (
    "--preread_images", "--no_parallel_disc_io", "--dont_combine_weights_via_disc", "--free_gpu_memory",
    "--reuse_scratch", "--keep_scratch", "--fast_subsets_off", "--cpu",
)  # fmt: skip
"""Arguments of RELION that say where it computes, not what."""


def identity_of(request: RefineRequest, section: RelionSection, diameter_A: float) -> Identity:
    """Everything that decides what RELION finds. The order of the rows counts: exported stacks are in it."""
    program = {
        "auto_local_order": section.auto_local_order, "offset_range_px": section.offset_range_px,
        "offset_step_px": section.offset_step_px, "images": section.images,
        "extra": " ".join(deciding(section.extra)),
    }  # fmt: skip
    if section.tau2 != "relion":  # runs begun without it can go on
        program["tau2"] = section.tau2
    return {**of_request(request, diameter_A, ordered=True), "relion": program}


def deciding(extra: str) -> list[str]:
    """The words of ``relion.extra`` but for those that only say where RELION computes.

    >>> deciding("--gpu 0:1 --ini_high 20 --preread_images")
    ['--ini_high', '20']
    """
    words, kept = shlex.split(extra), []
    while words:
        word = words.pop(0)
        if word in WITH_VALUE:
            if words and not words[0].startswith("--"):
                words.pop(0)
        elif word not in ALONE:
            kept.append(word)
    return kept
