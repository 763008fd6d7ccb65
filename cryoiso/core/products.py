"""Names of the files that stages and engines leave in a run folder, for all that write, read, check or describe them.

A file that is read where it is written and nowhere else keeps its name there.
"""

from __future__ import annotations

# records of a run
RESOLVED = "resolved.toml"
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
LOCK = "lock.json"
SEAL = "seal.json"
REPORT_PAGE = "report.html"
REPORT_NUMBERS = "report.json"
SUMS = "SHA256SUMS"
"""Checksums of ``result/``, in the format of ``sha256sum``."""
TIMING = "timing.json"
"""How long the parts of a stage took: the one file of a stage that differs between two runs of the same job."""

AUDIT = "audit/audit.json"
"""Results of the controls, beside a folder for each of them."""

# particles
INDEX = "index.json"
"""Of a folder of shards."""
PARTICLES = "particles.star"
"""The source's particles with the poses of a stage."""
SELECTED = "selected.star"
"""The particles of the classes that a run goes on with."""
CS_PARTICLES = "particles.cs"
"""The same for cryoSPARC, in the result folder, on request."""
SAMPLES = "samples.npz"
"""Raw and auxiliary images that the report shows."""
SHARED_GENERATOR = "generator.npz"

# maps of a reconstruction, and what goes with them
MAP = "map.mrc"
"""The plain mean of the half-maps."""
WEIGHTED_MAP = "map_weighted.mrc"
"""Of all particles, Wiener-weighted."""
MASK = "mask.mrc"
INITIAL_POSES = "initial_poses"
"""Folder beside them: the same of the poses before the auxiliary particles."""
TRUE_POSES = "truth_poses"
"""Folder beside them: the same of the true poses."""

# references
REFERENCE = "reference.mrc"
LOWPASSED_REFERENCE = "initial.mrc"
COMPOSITE = "composite.mrc"
"""Homologue and micelle, the mean of both half-sets."""
RAW_MAP = "raw_map.mrc"
"""The mean of a round's references."""

# the correction
FILTER = "filter.mrc"
CORRECTED_MAP = "corrected_map.mrc"
MEASURED = "measured.mrc"
MEASURED_FOURIER = "measured_fourier.mrc"
RESULT_CORRECTED_MAP = "additional_corrected_map.mrc"
RESULT_MEASURED = "additional_measured.mrc"
RESULT_LOCAL_RESOLUTION = "additional_local_resolution.mrc"

# what is measured of the final maps
LOCAL_RESOLUTION = "local_resolution.mrc"
Q_TABLE = "q_scores.tsv"
"""Q-scores of an atomic model, by residue."""
VIEW_SCRIPT = "view.cxc"
"""ChimeraX commands that open the maps of ``result/``."""

# curves for EMDB
FSC_XML = "fsc.xml"
FSC_UNMASKED_XML = "fsc_unmasked.xml"


def facts(kind: str) -> str:
    """What a stage says of itself.

    Args:
        kind: of stage, without its round.

    >>> facts("corefine")
    'corefine.json'
    """
    return f"{kind}.json"


def half_map(half: int | str) -> str:
    """The reconstruction of a half-set, 1 or 2."""
    return f"half{half}.mrc"


HALF_MAPS = (half_map(1), half_map(2))


def half_reference(half: int) -> str:
    """What the next round of a co-refinement starts from."""
    return f"reference{half}.mrc"


def post_processed(half: int) -> str:
    """What the user's command made of ``half_reference``."""
    return f"post{half}.mrc"


def micelle_half(half: int) -> str:
    """The density around the protein."""
    return f"micelle_half{half}.mrc"


def composite_half(half: int) -> str:
    """Homologue and micelle of a half-set."""
    return f"composite_half{half}.mrc"


def corrected_half(half: int) -> str:
    """A half-map after the correction by a network."""
    return f"corrected_half{half}.mrc"


def class_map(number: int) -> str:
    """The map of a class, numbered from 1.

    >>> class_map(2)
    'class002.mrc'
    """
    return f"class{number:03d}.mrc"


def class_half_map(number: int, half: int) -> str:
    """The reconstruction of a half-set of a class."""
    return f"class{number:03d}_half{half}.mrc"


def generator(half: int) -> str:
    """The generator of a half-set's auxiliary images."""
    return f"generator{half}.npz"
