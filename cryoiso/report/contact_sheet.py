"""A contact sheet of particle images: a row for each set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.report.canvas import new_figure, picture, styled


def write_contact_sheet(path: Path, rows: dict[str, np.ndarray], dpi: int = 120) -> None:
    """Writes a PNG; each row has a grey scale of its own.

    Args:
        path: of the picture.
        rows: images (n, D, D) by label; n may differ.

    Raises:
        InputError: no images.
    """
    columns = max((len(images) for images in rows.values()), default=0)
    if not columns:
        raise InputError("no images for a contact sheet", file=path, code="particles-too-few")
    with styled():
        figure, axes = new_figure(1.2 * columns, 1.27 * len(rows), nrows=len(rows), ncols=columns)
        for line, (label, images) in zip(axes, rows.items(), strict=True):
            low, high = np.percentile(images, (0.5, 99.5))
            for ax, image in zip(line, images, strict=False):
                picture(ax, image, low, high)
            for ax in line[len(images) :]:
                ax.axis("off")
            line[0].set_ylabel(label, fontsize=7)
        figure.savefig(path, format="png", dpi=dpi)
