"""In what RELION 3.1 to 5.0 differ as far as this program meets it, for the stand-in (relion_standin.py).

Read in the sources of 3.1.3, 4.0.0, 4.0.1, 4.0.2, 5.0.0 and 5.0.1; 3.1.3 and 5.0.1 were run as well. In all of them
``--continue`` reads the optimiser file and then the command line; output goes where ``--o`` says, and to ``run`` in the
working folder without it. Options that are not known are warned of and ignored; a few that are not listed
(--sequential_halves_recons among them) are warned of and obeyed.

| | |
|---|---|
| 3.1.3 | divides by iterated weights unless --skip_gridding; --external_reconstruct is kept by a continued run; no run_optimiser.star at the end |
| 4.0.0 | divides directly, does not know --skip_gridding any more (--dont_skip_gridding); run_optimiser.star at the end, from which nothing can be continued |
| 4.0.2 | a continued run takes --external_reconstruct from the command line alone; of a reference named ``half1`` each half reads its own |
| 5.0.0 | --blush, likewise from the command line alone; pixel size and diameter in the file for the external program; STAR version 50001 |
"""  # noqa: E501

from __future__ import annotations

import re
from dataclasses import dataclass

FLAGS = set(
    """--auto_refine --split_random_halves --external_reconstruct --force_converge --ctf
    --firstiter_cc --flatten_solvent --norm --scale --zero_mask --dont_combine_weights_via_disc --preread_images
    --ctf_corrected_ref --dont_check_norm --ctf_phase_flipped""".split()  # noqa: SIM905
)
VALUES = set(
    """--o --i --ref --continue --ini_high --particle_diameter --sym --low_resol_join_halves --auto_iter_max --iter --K
    --oversampling --random_seed --pad --healpix_order --auto_local_healpix_order --offset_range --offset_step
    --sigma_ang --solvent_mask --strict_highres_exp --j --pool --gpu""".split()  # noqa: SIM905
)
FIRST_ONLY = set(
    """--i --ref --K --ini_high --sym --low_resol_join_halves --random_seed --sigma_ang --auto_refine --ctf
    --split_random_halves --firstiter_cc --zero_mask --ctf_corrected_ref --dont_check_norm --ctf_phase_flipped
    """.split()  # noqa: SIM905
)
"""Options that a continued run does not know."""
NOT_LISTED = {"--sequential_halves_recons"}


@dataclass(frozen=True)
class Rules:
    """Of one version, e.g. "5.0.1-commit-d476e6" or "4.0-beta-2"."""

    version: str

    @property
    def number(self) -> tuple[int, int, int]:
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", self.version)
        assert found is not None, self.version
        return int(found[1]), int(found[2]), int(found[3] or 0)

    def flags(self, continued: bool) -> set[str]:
        """Options without a value that it knows."""
        known = FLAGS - (FIRST_ONLY if continued else {"--force_converge"})
        if continued and not self.forgets:
            known -= {"--external_reconstruct"}
        known |= {"--skip_gridding"} if self.number < (4,) else {"--dont_skip_gridding"}
        return known | ({"--blush", "--blush_skip_spectral_trailing"} if self.has_blush else set())

    def values(self, continued: bool) -> set[str]:
        """Options with a value that it knows."""
        return VALUES - (FIRST_ONLY if continued else {"--continue"})

    @property
    def forgets(self) -> bool:
        """A continued run takes --external_reconstruct from its command line alone."""
        return self.number >= (4, 0, 2)

    @property
    def has_blush(self) -> bool:
        return self.number >= (5,)

    @property
    def tells_pixel_size(self) -> bool:
        """In the file for the external program, with the diameter."""
        return self.number >= (5,)

    @property
    def ends_with_optimiser(self) -> bool:
        """Whether there is a run_optimiser.star."""
        return self.number >= (4,)

    @property
    def reads_reference_of_half(self) -> bool:
        """Each half-set reads its own of references with half1 and half2 in their names."""
        return self.number >= (4, 0, 2)

    @property
    def star_version(self) -> int:
        return 50001 if self.number >= (5,) else 30001
