"""Networks and their losses: pure torch, no files and no ranks."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.nets.hvae import ConditionalHvae, pose_vector
    from cryoiso.nets.hvae_parts import HvaeConfig, HvaeOutput
    from cryoiso.nets.losses import ElboTerms, negative_elbo
    from cryoiso.nets.unet import Unet3d, UnetConfig

__all__ = [
    "ConditionalHvae",
    "ElboTerms",
    "HvaeConfig",
    "HvaeOutput",
    "Unet3d",
    "UnetConfig",
    "negative_elbo",
    "pose_vector",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "hvae": ["ConditionalHvae", "pose_vector"],
            "hvae_parts": ["HvaeConfig", "HvaeOutput"],
            "losses": ["ElboTerms", "negative_elbo"],
            "unet": ["Unet3d", "UnetConfig"],
        },
    )
