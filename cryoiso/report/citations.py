"""Papers that the methods text refers to, and the list of those that a text really cites."""

from __future__ import annotations

PAPERS = {
    "auxiliary": "Zhang, H. et al. Addressing preferred orientation in single-particle cryo-EM through AI-generated "
    "auxiliary particles. Nat. Commun. (2025). doi:10.1038/s41467-025-59797-w",
    "correction": "Liu, Y.-T. et al. Overcoming the preferred-orientation problem in cryo-EM with self-supervised deep "
    "learning. Nat. Methods (2024). doi:10.1038/s41592-024-02505-1",
    "relion": "Scheres, S. H. W. RELION: implementation of a Bayesian approach to cryo-EM structure determination. "
    "J. Struct. Biol. 180, 519-530 (2012). doi:10.1016/j.jsb.2012.09.006",
    "gold": "Scheres, S. H. W. & Chen, S. Prevention of overfitting in cryo-EM structure determination. Nat. Methods "
    "9, 853-854 (2012). doi:10.1038/nmeth.2115",
    "healpix": "Gorski, K. M. et al. HEALPix: a framework for high-resolution discretization and fast analysis of data "
    "distributed on the sphere. Astrophys. J. 622, 759-771 (2005). doi:10.1086/427976",
    "threshold": "Rosenthal, P. B. & Henderson, R. Optimal determination of particle orientation, absolute hand, and "
    "contrast loss in single-particle electron cryomicroscopy. J. Mol. Biol. 333, 721-745 (2003). "
    "doi:10.1016/j.jmb.2003.07.013",
    "phases": "Chen, S. et al. High-resolution noise substitution to measure overfitting and validate resolution in 3D "
    "structure determination by single particle electron cryomicroscopy. Ultramicroscopy 135, 24-35 (2013). "
    "doi:10.1016/j.ultramic.2013.06.004",
    "fsc3d": "Tan, Y. Z. et al. Addressing preferred specimen orientation in single-particle cryo-EM through tilting. "
    "Nat. Methods 14, 793-796 (2017). doi:10.1038/nmeth.4347",
    "scf": "Baldwin, P. R. & Lyumkis, D. Non-uniformity of projection distributions attenuates resolution in cryo-EM. "
    "Prog. Biophys. Mol. Biol. 150, 160-183 (2020). doi:10.1016/j.pbiomolbio.2019.09.002",
}


class Citations:
    """Numbers papers in the order in which a text names them."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def __call__(self, *names: str) -> str:
        """The mark for the text, e.g. [1, 3].

        >>> Citations()("gold", "relion")
        '[1, 2]'
        """
        self.keys += [name for name in dict.fromkeys(names) if name not in self.keys]
        return f"[{', '.join(str(self.keys.index(name) + 1) for name in names)}]"

    def listed(self) -> list[str]:
        """The papers that were named, with their numbers."""
        return [f"{number}. {PAPERS[key]}" for number, key in enumerate(self.keys, start=1)]
