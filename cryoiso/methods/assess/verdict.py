"""What is wrong with a map, if anything, in words: a verdict from directional numbers, with the evidence for it.

Three questions are asked in turn. Do the half-maps agree at all? Is their agreement less even over the directions than
noise alone would make it? If so, do the views explain it? The last is decided by comparison with random maps that have
the same spectrum, mask and FSC and were sampled by these very views (`cryoiso.metrics.expected`): where the poses
promise more than the half-maps show, views were put that do not belong there.

Where the mask makes half of the agreement or more (`cryoiso.metrics.mask_effect`), these questions are asked of the
half-maps without it, and the answer is never "fine": a tight mask makes any two maps agree in all directions.

cFAR below 0.5 as the mark of anisotropy and SCF* below 0.81 (pure side views, 8/pi^2) as that of uneven views are
cryoSPARC's thresholds; this cFAR is the open definition and need not give the same values, so noise and views of the
set at hand have a say beside them. The other thresholds were set on simulated sets (docs/diagnose.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cryoiso.core.records import VerdictRecord

Name = Literal["fine", "missing views", "misassigned views", "junk", "inconclusive"]

CFAR_LOW = 0.5
"""cFAR below this is anisotropy, unless noise explains it."""
SCF_STAR_LOW = 0.81
"""SCF* over that of as many even views; below, the views are uneven."""
NOT_NOISE = 0.6
"""Evenness of the directions over that which noise leaves to an isotropic map; below, it is not noise."""
SHORT = 0.17
"""Share of the directions that show less than half of what the views promise; above, the poses are not right."""
MASK_MADE = 0.5
"""Share of the masked half-maps' agreement that is left with random phases; above, the mask makes it."""
FEW_SHELLS = 4.0
"""Half-maps whose FSC falls below 0.143 before this shell agree on nothing."""


@dataclass(frozen=True)
class Evidence:
    """One number that the verdict used."""

    name: str
    value: float | None
    threshold: float | None
    says: str


@dataclass(frozen=True)
class Verdict:
    """What the numbers allow to say, and what to do next."""

    verdict: Name
    sentence: str
    advice: str
    evidence: list[Evidence] = field(default_factory=list)

    def as_dict(self) -> VerdictRecord:
        """For a JSON file: verdict, sentence, advice, and evidence as a list of name, value, threshold, says."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "advice": self.advice,
            "evidence": [
                {"name": e.name, "value": e.value, "threshold": e.threshold, "says": e.says} for e in self.evidence
            ],
        }


def judge(numbers: dict[str, Any]) -> Verdict:
    """The verdict on what `cryoiso.methods.assess.measure` measured.

    Args:
        numbers: with ``directional`` and, where poses are known, ``sampling`` and ``views``.
    """
    facts = _Facts.of(numbers)
    evidence = facts.evidence()
    name, sentence, advice = _decide(facts)
    return Verdict(name, sentence, advice, evidence)


@dataclass(frozen=True)
class _Facts:
    """The numbers that count, None where unknown."""

    shells: float
    """Shell at which the FSC falls below 0.143, masked unless the mask makes it."""
    shells_corrected: float
    """The same of the FSC corrected for the mask."""
    resolution_A: float
    cfar: float
    evenness: float
    evenness_even: float
    cfar_even: float
    cfar_views: float | None
    short: float | None
    scf_ratio: float | None
    best_A: float
    worst_A: float
    mask_share: float
    """Share of the agreement that the mask makes, in all directions."""
    mask_share_worst: float
    """In those that agree least without it."""
    cfar_unmasked: float | None

    @classmethod
    def of(cls, numbers: dict[str, Any]) -> _Facts:
        mask = numbers["directional"].get("mask") or {}
        d = numbers["directional"].get("unmasked") or numbers["directional"]
        views = d["expected"].get("views") or {}
        sampled = (numbers.get("sampling") or {}).get("estimated") or {}
        even = sampled.get("scf_star_even")
        resolution_A = numbers[f"resolution_0143_{'masked' if d is numbers['directional'] else 'unmasked'}_A"]
        length_A = numbers["box_px"] * numbers["pixel_size_A"]
        return cls(
            shells=length_A / resolution_A,
            shells_corrected=length_A / numbers.get("resolution_0143_A", resolution_A),
            resolution_A=resolution_A,
            cfar=_number(d["cfar"]),
            evenness=_number(d["evenness"]),
            evenness_even=_number(d["expected"]["even"]["evenness"]),
            cfar_even=_number(d["expected"]["even"]["cfar"]),
            cfar_views=_number(views.get("cfar")) if views else None,
            short=views.get("short_fraction"),
            scf_ratio=sampled["scf_star"] / even if even else None,
            best_A=float(d["resolution_min_A"]),
            worst_A=float(d["resolution_max_A"]),
            mask_share=_number(mask.get("share")),
            mask_share_worst=_number(mask.get("share_worst")),
            cfar_unmasked=_number(mask.get("cfar_unmasked")) if mask else None,
        )

    @property
    def by_the_mask(self) -> bool:
        """The mask makes the agreement: all other numbers here are then of the half-maps without it."""
        return max(self.mask_share, self.mask_share_worst) > MASK_MADE

    @property
    def beyond_noise(self) -> bool:
        """The directions differ by more than noise makes them."""
        return self.evenness < NOT_NOISE * self.evenness_even

    @property
    def views_uneven(self) -> bool:
        return self.scf_ratio is not None and self.scf_ratio < SCF_STAR_LOW

    @property
    def poses_fall_short(self) -> bool:
        return self.short is not None and self.short > SHORT

    def evidence(self) -> list[Evidence]:
        masked = "without the mask" if self.by_the_mask else "masked"
        rows = [
            Evidence(f"shells of agreement (FSC 0.143, {masked})", self.shells, FEW_SHELLS, "fewer: nothing agrees"),
            Evidence("cFAR (open definition)", self.cfar, CFAR_LOW, "below: anisotropy, if noise does not explain it"),
            Evidence("cFAR of an isotropic map with this noise", self.cfar_even, None, "what noise leaves of 1"),
            Evidence(
                "evenness of directions over that of an isotropic map",
                self.evenness / self.evenness_even if self.evenness_even > 0 else None,
                NOT_NOISE,
                "below: not noise",
            ),
        ]
        if self.cfar_views is not None:
            rows.append(Evidence("cFAR that these views would give", self.cfar_views, None, "if every pose were right"))
        if self.short is not None:
            rows.append(
                Evidence("directions with less than half of that", self.short, SHORT, "above: poses are not right")
            )
        if self.scf_ratio is not None:
            rows.append(Evidence("SCF* over that of even views", self.scf_ratio, SCF_STAR_LOW, "below: uneven views"))
        if self.cfar_unmasked is not None:
            says = "above: the mask makes the agreement, and the half-maps are judged without it"
            rows += [
                Evidence("share of the agreement left with random phases", self.mask_share, MASK_MADE, says),
                Evidence("the same, directions that agree least", self.mask_share_worst, MASK_MADE, says),
                Evidence("cFAR without the mask", self.cfar_unmasked, None, "what no mask can have made"),
            ]
        return rows


def _number(value: float | None) -> float:
    """A number, with 0 for one that could not be had (no direction has any agreement)."""
    return 0.0 if value is None or value != value else float(value)


def _decide(f: _Facts) -> tuple[Name, str, str]:
    """Name, sentence and advice."""
    name, sentence, advice = _without_mask_effect(f)
    if not f.by_the_mask:
        return name, sentence, advice
    start = (
        f"The mask makes much of the agreement: with random phases {100 * f.mask_share:.0f} % of it is left, "
        f"{100 * f.mask_share_worst:.0f} % in the directions that agree least. The half-maps are therefore judged "
        "without the mask, and no number that was measured with it should be quoted. "
    )
    wider = "Use a wider mask with a softer edge (--mask, or sample.mask in a job file). "
    if name == "fine":
        sentence = sentence.replace("No anisotropy beyond noise:", "Without it there is no anisotropy beyond noise:")
        return "inconclusive", start + sentence, wider + advice
    if name == "junk" and f.shells_corrected >= FEW_SHELLS:
        return "inconclusive", f"{start}Without it they agree on nothing finer than {f.resolution_A:.0f} Å.", wider
    return name, start + sentence, wider + advice


def _without_mask_effect(f: _Facts) -> tuple[Name, str, str]:
    """By the numbers as they are."""
    span = f"{f.best_A:.1f} to {f.worst_A:.1f} Å by direction"
    if f.shells < FEW_SHELLS:
        return (
            "junk",
            f"The half-maps agree on nothing finer than {f.resolution_A:.0f} Å: either the images hold no such "
            "particle, or practically every pose is wrong.",
            "Look at 2D class averages, the pixel size and the reference before anything else.",
        )
    if f.cfar < CFAR_LOW and f.beyond_noise:
        return _anisotropic(f, f"The map is anisotropic: cFAR {f.cfar:.2f}, {span}. ")
    if f.cfar < CFAR_LOW:
        return (
            "inconclusive",
            f"cFAR is {f.cfar:.2f}, but an isotropic map with this much noise would show {f.cfar_even:.2f} or so: "
            "these numbers cannot tell whether the map is anisotropic.",
            "More particles, or more signal, would decide it; a control with pure noise tells whether there is any.",
        )
    if f.views_uneven:
        return (
            "inconclusive",
            f"The views are uneven (SCF* is {f.scf_ratio:.2f} of that of even views), yet the half-maps agree evenly "
            f"(cFAR {f.cfar:.2f}, {span}).",
            "Look at the directional curves at high resolution; imposed symmetry, for one, evens them out.",
        )
    return (
        "fine",
        f"No anisotropy beyond noise: cFAR {f.cfar:.2f}, {span}. This does not prove that the poses are right: errors "
        "that both halves share do not show here.",
        "Controls look for those: a part left out of the reference, pure noise, another reference.",
    )


def _anisotropic(f: _Facts, start: str) -> tuple[Name, str, str]:
    """What makes an anisotropic map so."""
    if f.short is None or f.cfar_views is None or f.scf_ratio is None:
        return (
            "inconclusive",
            start + "Without poses it cannot be told whether views are missing or misassigned.",
            "Give the particles with their poses.",
        )
    if f.poses_fall_short:
        also = " The views are uneven besides; right poses alone will not cure that." if f.views_uneven else ""
        return (
            "misassigned views",
            f"{start}{100 * f.short:.0f} % of the directions show less than half of the agreement that the assigned "
            "views would give if they were right: particles lie in views where they do not belong (wrong poses, or "
            f"images of something else).{also}",
            "Remove junk by classification, then run a workflow that corrects poses: auxiliary, realign or both.",
        )
    if f.views_uneven:
        return (
            "missing views",
            f"{start}The assigned views explain it: they are uneven (SCF* is {f.scf_ratio:.2f} of that of even views) "
            f"and would give cFAR {f.cfar_views:.2f} if every pose were right. That some are wrong is not ruled out.",
            "Measure other views: tilt the stage, change grid or detergent, pick rare views. Correcting the map fills "
            "directions in; it does not measure them.",
        )
    return (
        "inconclusive",
        f"{start}The views do not explain it (SCF* is {f.scf_ratio:.2f} of that of even views), but there is no range "
        "of directions that the poses promise and the half-maps lack.",
        "A flexible particle, or a mask that cuts into it, can do this; compare with a wider mask.",
    )
