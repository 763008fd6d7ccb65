"""The four jobs of the CCP-EM Pipeliner: measure half-maps, correct them, balance views, and the whole workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeliner.data_structure import (
    NODE_DENSITYMAP,
    NODE_EVALUATIONMETRIC,
    NODE_IMAGE3D,
    NODE_MASK3D,
    NODE_PARTICLEGROUPMETADATA,
)
from pipeliner.display_tools import create_results_display_object, make_map_model_thumb_and_display
from pipeliner.job_options import (
    ExternalFileJobOption,
    FileDescription,
    FloatJobOption,
    IntJobOption,
    JobOptionValidationResult,
    StringJobOption,
)

from cryoiso.ccpem.common import ANISOTROPY, AUXILIARY, CryoisoJob, curves, number, table
from cryoiso.core import products

KEPT, DISCARDED, VIEWS, REBALANCED = "particles_kept.star", "particles_discarded.star", "views.png", "rebalance.json"
RUN = "run"
RESULT = f"{RUN}/result"
ADVISORY = "Map of a neural network: for viewing and model building, not for estimating resolution."


class Diagnose(CryoisoJob):
    """``cryoiso diagnose``."""

    PROCESS_NAME = "cryoiso.map_analysis.anisotropy"
    OUT_DIR = "Diagnose"
    TITLE = "Directional resolution and view distribution"
    SHORT = "Measure preferred orientation and its effect on the map"
    LONG = (
        "Measures two half-maps: resolution by FSC and by direction (3DFSC, cFAR, FSO), and with particles the "
        "distribution of views and the sampling of Fourier space (SCF). Gives a verdict and advice."
    )

    def add_options(self) -> None:
        """Half-maps, mask, particles and symmetry."""
        self.add_half_maps()
        self.add_particles(required=False)
        self.add_symmetry()

    def create_output_nodes(self) -> None:
        """The numbers."""
        self.add_output_node(products.facts("diagnose"), NODE_EVALUATIONMETRIC, ["cryoiso", "anisotropy"])

    def words(self) -> list[str]:
        """The command line."""
        maps = [self.joboptions[name].get_string() for name in ("half1", "half2")]
        files = [*self.given("mask", "--mask"), *self.given("particles", "--particles")]
        out = ["--out", self.inside(products.facts("diagnose"))]
        return ["diagnose", *maps, *out, *files, *self.given("symmetry", "--symmetry")]

    def create_results_display(self) -> list[Any]:
        """Verdict, main numbers and FSC curves."""
        source = self.inside(products.facts("diagnose"))
        return measured(self.facts(products.facts("diagnose")), source)


class Correct(CryoisoJob):
    """``cryoiso correct``."""

    PROCESS_NAME = "cryoiso.postprocess.anisotropy_correction"
    OUT_DIR = "AnisotropyCorrection"
    TITLE = "Anisotropy correction of half-maps"
    SHORT = "Fill poorly sampled directions of a map with a self-supervised network"
    LONG = (
        "Trains a 3D U-Net on the two half-maps alone and restores directions that were sampled poorly. The corrected "
        "map is for viewing and model building; resolution is measured from the uncorrected half-maps."
    )
    REFERENCES = (ANISOTROPY,)
    PARALLEL = CONTINUES = True

    def add_options(self) -> None:
        """Half-maps, mask, resolution and length of the training."""
        self.add_half_maps()
        self.joboptions["resolution"] = FloatJobOption(
            label="Resolution limit (Å):", default_value=None, hard_min=0.5, suggested_max=20, step_value=0.1,
            help_text="Correct up to this resolution. If empty: where the FSC falls to 0.143.",
        )  # fmt: skip
        self.joboptions["epochs"] = IntJobOption(
            label="Epochs:", default_value=30, hard_min=1, suggested_max=100, step_value=1,
            help_text="Length of the training.", in_continue=True,
        )  # fmt: skip

    def create_output_nodes(self) -> None:
        """The corrected map, its measured share and the mask; no half-map that a network has changed."""
        self.add_output_node(products.CORRECTED_MAP, NODE_DENSITYMAP, ["cryoiso", "anisotropycorrected"])
        self.add_output_node(products.MEASURED, NODE_IMAGE3D, ["cryoiso", "measuredshare"])
        self.add_output_node(products.MASK, NODE_MASK3D, ["cryoiso"])

    def words(self) -> list[str]:
        """The command line; with --resume, which does nothing at the first start."""
        maps = [self.joboptions[name].get_string() for name in ("half1", "half2")]
        settings = [*self.given("resolution", "--resolution"), *self.given("epochs", "--epochs")]
        return ["correct", *maps, "--out", self.output_dir, *self.given("mask", "--mask"), *settings, "--resume"]

    def create_results_display(self) -> list[Any]:
        """The corrected map, and what of it was measured."""
        source = self.inside(products.facts("correct"))
        facts = self.facts(products.facts("correct"))
        rows = [
            ["Corrected up to", number(facts.get("resolution_A"), " Å")],
            ["Share of the power that was measured", number(facts.get("measured_share_mean"))],
            ["Mean of the filter", number(facts.get("filter_mean"))],
        ]
        return [
            table("Correction", ["Quantity", "Value"], rows, source),
            corrected_map(self.output_dir, self.inside(products.CORRECTED_MAP)),
        ]


class Rebalance(CryoisoJob):
    """``cryoiso rebalance``."""

    PROCESS_NAME = "cryoiso.select.particles"
    OUT_DIR = "Rebalance"
    TITLE = "Balance the viewing directions"
    SHORT = "Cap the number of particles per viewing direction"
    LONG = (
        "Keeps the best particles of every cone of viewing directions, as many as the cap says; cones below the cap "
        "lose none. Give either the cap or the fraction of the particles to keep."
    )

    def add_options(self) -> None:
        """Particles, symmetry, and cap or fraction."""
        self.add_particles(required=True)
        self.add_symmetry()
        self.joboptions["keep"] = FloatJobOption(
            label="Fraction to keep:", default_value=0.5, hard_min=0.0, hard_max=1.0, step_value=0.05,
            help_text="Fraction of the particles to keep at least; the cap follows from it. Empty: the cap counts.",
        )  # fmt: skip
        self.joboptions["cap"] = IntJobOption(
            label="Cap per direction:", default_value=None, hard_min=1, step_value=1,
            help_text="Most particles of a cone of 10 degrees. Empty: the fraction counts.",
        )  # fmt: skip
        self.joboptions["quality"] = StringJobOption(
            label="Ranked by:", default_value="auto",
            help_text="A column of the STAR file; auto: rlnMaxValueProbDistribution or the like; random: none.",
        )  # fmt: skip

    def additional_joboption_validation(self) -> list[JobOptionValidationResult]:
        """Cap and fraction exclude each other."""
        exclusive = [self.joboptions[name] for name in ("keep", "cap")]
        if sum(not option.is_blank for option in exclusive) == 1:
            return []
        return [JobOptionValidationResult("error", exclusive, "Give either the fraction to keep or the cap")]

    def create_output_nodes(self) -> None:
        """Kept and discarded particles."""
        self.add_output_node(KEPT, NODE_PARTICLEGROUPMETADATA, ["relion", "cryoiso", "balanced"])

    def create_post_run_output_nodes(self) -> None:
        """A set in which no cone is above the cap loses no particle."""
        if Path(self.inside(DISCARDED)).exists():
            self.add_output_node(DISCARDED, NODE_PARTICLEGROUPMETADATA, ["relion", "cryoiso", "discarded"])

    def words(self) -> list[str]:
        """The command line."""
        settings = [word for name in ("keep", "cap", "quality", "symmetry") for word in self.given(name, f"--{name}")]
        files = [self.joboptions["particles"].get_string(), "--out", self.output_dir]
        return ["rebalance", *files, *settings, "--overwrite"]

    def create_results_display(self) -> list[Any]:
        """Counts, sampling before and after, and the views."""
        source, facts = self.inside(REBALANCED), self.facts(REBALANCED)
        rows = [["Particles", str(facts["particles"]), str(facts["kept"])]]
        for label, part, key in (
            ("SCF* of the views", "sampling", "scf_star"),
            ("Entropy of the views over that of even ones", "views", "entropy"),
            ("Fullest direction over the mean", "views", "peak_over_mean"),
        ):
            rows.append([label, *(number(facts[when][part][key], digits=3) for when in ("before", "after"))])
        views = create_results_display_object(
            "image", title="Viewing directions", image_path=self.inside(VIEWS),
            image_desc="Particles per direction, before and after", associated_data=[source],
        )  # fmt: skip
        return [table("Balance", ["Quantity", "Before", "After"], rows, source), views]


class Run(CryoisoJob):
    """``cryoiso run``."""

    PROCESS_NAME = "cryoiso.refine3d.preferred_orientation"
    OUT_DIR = "Cryoiso"
    TITLE = "Refinement for preferred orientation"
    SHORT = "Correct poses, half-maps and an isotropic map from particles with preferred orientation"
    LONG = (
        "Runs a job file of cryoiso ('cryoiso init' writes one): refinement, auxiliary particles or misalignment "
        "correction, anisotropy correction, diagnosis and report. A continued job goes on from its checkpoint."
    )
    REFERENCES = (AUXILIARY, ANISOTROPY)
    PARALLEL = CONTINUES = True

    def add_options(self) -> None:
        """The job file, which names all inputs."""
        self.joboptions["job_file"] = ExternalFileJobOption(
            label="Job file:", pattern=FileDescription("cryoiso job", [".toml"]), is_required=True,
            help_text="Names particles, reference, symmetry and workflow; written by 'cryoiso init'.",
        )  # fmt: skip

    def create_output_nodes(self) -> None:
        """The result folder; the corrected map is added where there is one."""
        self.add_output_node(
            f"{RESULT}/{products.PARTICLES}", NODE_PARTICLEGROUPMETADATA, ["relion", "cryoiso", "refined"]
        )
        for name in products.HALF_MAPS:
            self.add_output_node(f"{RESULT}/{name}", NODE_DENSITYMAP, ["cryoiso", "halfmap"])
        self.add_output_node(f"{RESULT}/{products.MAP}", NODE_DENSITYMAP, ["cryoiso"])
        self.add_output_node(f"{RESULT}/{products.MASK}", NODE_MASK3D, ["cryoiso"])

    def create_post_run_output_nodes(self) -> None:
        """The corrected map of workflows that end with one."""
        name = f"{RESULT}/{products.RESULT_CORRECTED_MAP}"
        if Path(self.inside(name)).exists():
            self.add_output_node(name, NODE_DENSITYMAP, ["cryoiso", "anisotropycorrected"])

    def words(self) -> list[str]:
        """The command line; --continue serves first and later starts."""
        return ["run", self.joboptions["job_file"].get_string(), "--out", self.inside(RUN), "--continue"]

    def create_results_display(self) -> list[Any]:
        """What was measured last, the map, and the report."""
        shown: list[Any] = []
        stages = sorted(Path(self.inside(RUN)).glob(f"*_diagnose/{products.facts('diagnose')}"))
        if stages:
            name = str(stages[-1].relative_to(self.output_dir))
            shown = measured(self.facts(name), str(stages[-1]))
        final = self.inside(f"{RESULT}/{products.MAP}")
        shown.append(make_map_model_thumb_and_display(self.output_dir, maps=[final], title="Map"))
        additional = self.inside(f"{RESULT}/{products.RESULT_CORRECTED_MAP}")
        if Path(additional).exists():
            shown.append(corrected_map(self.output_dir, additional))
        report = self.inside(f"{RUN}/{products.REPORT_PAGE}")
        page = create_results_display_object(
            "html", title="Report", html_file=report, associated_data=[report], start_collapsed=True
        )
        return [*shown, page]


def corrected_map(folder: str, file: str) -> Any:
    """A corrected map, with the word of caution."""
    return make_map_model_thumb_and_display(folder, maps=[file], title="Corrected map", maps_data=ADVISORY)


def measured(facts: dict[str, Any], source: str) -> list[Any]:
    """Verdict, numbers and curves of ``diagnose.json``."""
    by_direction = facts.get("directional") or {}
    sampling = (facts.get("sampling") or {}).get("estimated") or {}
    rows = [
        ["Resolution (FSC 0.143, corrected for the mask)", number(facts.get("resolution_0143_A"), " Å")],
        ["Resolution by direction, finest", number(by_direction.get("resolution_min_A"), " Å")],
        ["Resolution by direction, coarsest", number(by_direction.get("resolution_max_A"), " Å")],
        ["cFAR (open definition)", number(by_direction.get("cfar"))],
        ["3DFSC sphericity", number(by_direction.get("sphericity"))],
        ["SCF* of the views", number(sampling.get("scf_star"))],
    ]
    shown = [table("Resolution and anisotropy", ["Quantity", "Value"], rows, source)]
    if verdict := facts.get("verdict"):
        text = f"{verdict['verdict']}. {verdict['sentence']} {verdict['advice']}"
        shown.insert(
            0, create_results_display_object("text", title="Verdict", display_data=text, associated_data=[source])
        )
    named = {"unmasked": "fsc_unmasked", "masked": "fsc_masked", "corrected for the mask": "fsc_corrected"}
    there = {label: facts[key] for label, key in named.items() if facts.get(key)}
    if there:
        shown.append(curves("FSC of the half-maps", facts["frequency_invA"], there, source))
    return shown
