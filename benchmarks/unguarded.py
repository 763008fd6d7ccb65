"""cryoiso with its refusal of noise switched off, for the noise controls only; nothing of the program can do this.

Where images do not tell the grey scale of the reference it is 1.9, what the simulated sets of haemagglutinin have.

    python -m benchmarks.unguarded refine ...
"""

from __future__ import annotations

from typing import Any

GREY_SCALE = 1.9


def switch_off() -> None:
    """Replaces the refusal and the grey scale; before anything else of cryoiso is imported, since names are copied."""
    from cryoiso.refine import start

    measured = start.grey_scale

    def grey_scale(run: Any, reference: Any, sigma2: Any, state: Any) -> float:
        match = start.match(run, reference, sigma2, state)
        known = match.chance < start.CHANCE and not match.inverted
        return measured(run, reference, sigma2, state) if known else GREY_SCALE

    start.require_match = lambda found: None
    start.grey_scale = grey_scale


if __name__ == "__main__":
    from cryoiso.cli.main import main

    switch_off()
    main()
