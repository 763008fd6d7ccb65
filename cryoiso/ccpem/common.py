"""What the jobs of the CCP-EM Pipeliner share: description, options and display of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeliner.data_structure import NODE_DENSITYMAP, NODE_MASK3D, NODE_PARTICLEGROUPMETADATA
from pipeliner.display_tools import create_results_display_object
from pipeliner.job_options import FileDescription, InputNodeJobOption, StringJobOption
from pipeliner.pipeliner_job import ExternalProgram, PipelinerCommand, PipelinerJob, Ref

from cryoiso import __version__

PROGRAM = "cryoiso"
MRC = FileDescription("MRC map", [".mrc"])
STAR = FileDescription("Particles", [".star"])
ANISOTROPY = Ref(
    authors=["Liu YT", "Fan H", "Hu JJ", "Zhou ZH"],
    title="Overcoming the preferred-orientation problem in cryo-EM with self-supervised deep learning",
    journal="Nat. Methods", year="2024", doi="10.1038/s41592-024-02505-1",
)  # fmt: skip
AUXILIARY = Ref(
    authors=["Zhang H", "Zheng D", "Wu Q", "Yan N", "Shi Z", "Hu M", "Bao C"],
    title="Addressing preferred orientation in single-particle cryo-EM through AI-generated auxiliary particles",
    journal="Nat. Commun.", year="2025", doi="10.1038/s41467-025-59797-w",
)  # fmt: skip


class CryoisoJob(PipelinerJob):
    """A command of cryoiso as a job."""

    PROCESS_NAME = "cryoiso"
    OUT_DIR = "Cryoiso"
    TITLE = SHORT = LONG = ""
    REFERENCES: tuple[Ref, ...] = ()
    PARALLEL = False
    """Whether ranks share the work."""
    CONTINUES = False
    """Whether the same command goes on from a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        info = self.jobinfo
        info.display_name, info.short_desc, info.long_desc = self.TITLE, self.SHORT, self.LONG
        info.version, info.job_author = __version__, "The cryoiso developers"
        info.programs = [ExternalProgram(command=PROGRAM, vers_com=[PROGRAM, "--version"])]
        info.references = list(self.REFERENCES)
        self.can_continue = self.CONTINUES
        self.add_options()
        self.get_runtab_options(mpi=self.PARALLEL, addtl_args=True)

    def add_options(self) -> None:
        """Adds the job's own options to ``joboptions``."""
        raise NotImplementedError

    def words(self) -> list[str]:
        """The command line after ``cryoiso``."""
        raise NotImplementedError

    def get_commands(self) -> list[PipelinerCommand]:
        """The one command, under mpirun if several ranks are asked for."""
        ranks = self.get_nr_mpi() if self.PARALLEL else 1
        start = list(map(str, self.get_mpi_command())) if ranks > 1 else []
        return [PipelinerCommand([*start, PROGRAM, *self.words(), *self.parse_additional_args()])]

    def inside(self, name: str) -> str:
        """A file in the job's folder."""
        return str(Path(self.output_dir) / name)

    def facts(self, name: str) -> dict[str, Any]:
        """Numbers that the command left."""
        record: dict[str, Any] = json.loads(Path(self.inside(name)).read_text())
        return record

    def given(self, option: str, flag: str) -> list[str]:
        """The option of the command line, where the job's is filled in."""
        value = self.joboptions[option]
        return [] if value.is_blank else [flag, value.get_string()]

    def add_half_maps(self) -> None:
        """The options of both half-maps and of the mask."""
        for half, name in ((1, "First"), (2, "Second")):
            self.joboptions[f"half{half}"] = InputNodeJobOption(
                label=f"{name} half-map:", node_type=NODE_DENSITYMAP, node_kwds=["halfmap"], pattern=MRC,
                help_text="Unmasked and unfiltered, e.g. run_half1_class001_unfil.mrc.", is_required=True,
            )  # fmt: skip
        self.joboptions["mask"] = InputNodeJobOption(
            label="Solvent mask:", node_type=NODE_MASK3D, pattern=MRC,
            help_text="If empty, a mask is computed from the half-maps.",
        )  # fmt: skip

    def add_particles(self, *, required: bool) -> None:
        """The options of particles with poses."""
        self.joboptions["particles"] = InputNodeJobOption(
            label="Particles:", node_type=NODE_PARTICLEGROUPMETADATA, node_kwds=["relion"], pattern=STAR,
            help_text="STAR file of a refinement, with poses.", is_required=required,
        )  # fmt: skip

    def add_symmetry(self) -> None:
        """The option of the point group."""
        self.joboptions["symmetry"] = StringJobOption(
            label="Symmetry:", default_value="C1", help_text="Point group: Cn, Dn, T, O or I.", is_required=True,
            validation_regex=r"(?i)([CD][1-9]\d*|T|O|I)", regex_error_message="A point group: Cn, Dn, T, O or I",
        )  # fmt: skip


def table(title: str, headers: list[str], rows: list[list[str]], source: str) -> Any:
    """A table of results."""
    return create_results_display_object(
        "table", title=title, headers=headers, table_data=rows, associated_data=[source]
    )


def curves(title: str, x: list[float], y: dict[str, list[float | None]], source: str) -> Any:
    """FSC curves over spatial frequency; shells without a value are left out."""
    points = [[(a, b) for a, b in zip(x, values, strict=True) if b is not None] for values in y.values()]
    return create_results_display_object(
        "graph", title=title, xvalues=[[a for a, _ in curve] for curve in points],
        yvalues=[[b for _, b in curve] for curve in points], data_series_labels=list(y),
        xaxis_label="Spatial frequency (1/Å)", yaxis_label="FSC", yrange=[-0.1, 1.05], associated_data=[source],
    )  # fmt: skip


def number(value: float | None, unit: str = "", digits: int = 2) -> str:
    """A number of a table.

    >>> number(3.4567, " Å"), number(None)
    ('3.46 Å', '-')
    """
    return "-" if value is None else f"{value:.{digits}f}{unit}"
