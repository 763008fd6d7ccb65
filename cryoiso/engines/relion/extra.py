"""Arguments of relion_refine that the user adds (``relion.extra``): which of them would break the refinement.

Refused are those that this program sets and relies on, those that make RELION do something else than refine one
reference in two independent half-sets, and with a correction those that keep RELION from calling for it.
"""

from __future__ import annotations

import shlex

from cryoiso.core.errors import UsageError

OWN = {
    "--o": "",
    "--i": "particles.file",
    "--ios": "particles.file",
    "--ref": "reference.file",
    "--model": "reference.file",
    "--sym": "sample.symmetry",
    "--auto_iter_max": "refine.max_iterations",
    "--iter": "refine.max_iterations",
    "--auto_refine": "",
    "--split_random_halves": "",
    "--external_reconstruct": "the workflow, or 'cryoiso realign'",
    "--continue": "'--resume'",
    "--force_converge": "refine.max_iterations",
    "--verb": "",
}
"""Option -> where else it is set."""

_ONE_REFERENCE = "a single reference is refined"
_BOTH_HALVES = "the half-sets must stay independent"
_REFINES = "RELION would not refine poses and maps"
UNFIT = {
    "--K": _ONE_REFERENCE,
    "--multibody_masks": _ONE_REFERENCE,
    "--reconstruct_subtracted_bodies": _ONE_REFERENCE,
    "--som": _ONE_REFERENCE,
    "--helix": "helical symmetry is not supported",
    "--tomograms": "tilt images as 2D stacks are not supported",
    "--trajectories": "tilt images as 2D stacks are not supported",
    "--join_random_halves": _BOTH_HALVES,
    "--always_join_random_halves": _BOTH_HALVES,
    "--use_all_data": _BOTH_HALVES,
    "--debug_split_random_half": _BOTH_HALVES,
    "--skip_align": _REFINES,
    "--skip_rotate": _REFINES,
    "--skip_maximize": _REFINES,
    "--only_sample_tilt": _REFINES,
    "--print_metadata_labels": _REFINES,
    "--print_symmetry_ops": _REFINES,
    "--version": _REFINES,
    "--help": _REFINES,
    "--abort_at_resolution": "RELION would end without a result",
    "--grad": "gradient refinement has no gold-standard half-maps",
    "--denovo_3dref": "gradient refinement has no gold-standard half-maps",
    "--sgd": "gradient refinement has no gold-standard half-maps",
    "--stochastic_em": "gradient refinement has no gold-standard half-maps",
}
"""Option -> why it cannot be used."""

UNFIT_WITH_CORRECTION = {
    "--blush": "RELION then reconstructs with Blush and never calls the correction",
    "--sequential_halves_recons": "RELION then reconstructs half 2 after half 1, and the callback needs both at the "
    "same time: each would wait for the other",
}


def extra_words(extra: str, *, correction: bool) -> list[str]:
    """The arguments of ``relion.extra``.

    Args:
        extra: as on a command line.
        correction: whether references are corrected between the iterations, or regularised in another way.

    Raises:
        UsageError: no list of arguments, or an option that cannot be used here.
    """
    try:
        words = shlex.split(extra)
    except ValueError as error:
        raise UsageError(f"relion.extra: not a list of arguments: {error}", code="command-malformed") from None
    for word in words:
        option = word.partition("=")[0]
        if option in OWN:
            other = f": use {OWN[option]}" if OWN[option] else ""
            raise UsageError(f"relion.extra: {option} is set by this program{other}", code="relion-option-refused")
        if option in UNFIT:
            raise UsageError(f"relion.extra: {option} cannot be used: {UNFIT[option]}", code="relion-option-refused")
        if correction and option in UNFIT_WITH_CORRECTION:
            raise UsageError(
                f"relion.extra: {option} cannot be used together with a correction of the references, or with "
                f"relion.tau2 = uneven: {UNFIT_WITH_CORRECTION[option]}. Remove it, or refine without these.",
                code="relion-option-refused",
            )
    return words
