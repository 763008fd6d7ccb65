"""Quality measures: FSC, map against map, pose errors, views. numpy in, numpy out; no files, no ranks."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.metrics.anisotropy import ConicalFSC, conical_fsc, fourier_shell_occupancy, resolved_region, sphericity
    from cryoiso.metrics.directional_fsc import fsc3d
    from cryoiso.metrics.fsc_curve import fsc, fsc_corrected, resolution_at, shell_frequencies, transform
    from cryoiso.metrics.half_maps import check_half_maps
    from cryoiso.metrics.mapmodel import compare_maps, cone_fsc, correlation
    from cryoiso.metrics.model_comparison import ModelComparison, compare_models
    from cryoiso.metrics.orientation import ViewDistribution, view_distribution
    from cryoiso.metrics.pose_error import PoseErrors, pose_errors
    from cryoiso.metrics.qscore import q_scores
    from cryoiso.metrics.sampling import Sampling, fourier_sampling, view_efficiency
    from cryoiso.metrics.windowed_fsc import LocalResolution, local_resolution

__all__ = [
    "ConicalFSC",
    "LocalResolution",
    "ModelComparison",
    "PoseErrors",
    "Sampling",
    "ViewDistribution",
    "check_half_maps",
    "compare_maps",
    "compare_models",
    "cone_fsc",
    "conical_fsc",
    "correlation",
    "fourier_sampling",
    "fourier_shell_occupancy",
    "fsc",
    "fsc3d",
    "fsc_corrected",
    "local_resolution",
    "pose_errors",
    "q_scores",
    "resolution_at",
    "resolved_region",
    "shell_frequencies",
    "sphericity",
    "transform",
    "view_distribution",
    "view_efficiency",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "anisotropy": ["ConicalFSC", "conical_fsc", "fourier_shell_occupancy", "resolved_region", "sphericity"],
            "directional_fsc": ["fsc3d"],
            "fsc_curve": ["fsc", "fsc_corrected", "resolution_at", "shell_frequencies", "transform"],
            "half_maps": ["check_half_maps"],
            "mapmodel": ["compare_maps", "cone_fsc", "correlation"],
            "model_comparison": ["ModelComparison", "compare_models"],
            "orientation": ["ViewDistribution", "view_distribution"],
            "pose_error": ["PoseErrors", "pose_errors"],
            "qscore": ["q_scores"],
            "sampling": ["Sampling", "fourier_sampling", "view_efficiency"],
            "windowed_fsc": ["LocalResolution", "local_resolution"],
        },
    )
