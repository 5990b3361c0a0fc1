"""Figures that every notebook draws: pictures in rows, with titles. What a lesson is about is drawn
in its own cells."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from realsr_r1.images import to_image

DPI = 120
STYLE = {"figure.dpi": DPI, "axes.spines.top": False, "axes.spines.right": False}


def rows(
    pictures: Sequence[Sequence[Tensor | Image.Image]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    side: float = 1.7,
) -> Figure:
    """Pictures in rows, as a figure.

    Args:
        pictures: rows of tensors (3, h, w) in [0, 1] or PIL images; small ones keep their pixels.
        columns: titles of the columns.
        names: what stands at the left of each row.
        side: of a picture, in inches.
    """
    n, m = len(pictures), max(map(len, pictures))
    fig, axes = plt.subplots(n, m, figsize=(side * m, side * n + 0.25), squeeze=False, dpi=DPI)
    for i, row in enumerate(pictures):
        for j, ax in enumerate(axes[i]):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if j < len(row):
                image = to_image(row[j]) if isinstance(row[j], Tensor) else row[j]
                ax.imshow(image, interpolation="nearest")
            if i == 0 and j < len(columns):
                ax.set_title(columns[j], fontsize=8)
            if j == 0 and i < len(names):
                ax.set_ylabel(names[i], fontsize=8)
    fig.tight_layout(pad=0.3)
    return fig


def row(pictures: Sequence[Tensor | Image.Image], titles: Sequence[str] = (), **how) -> Figure:
    """One row of pictures with a title above each; see `rows`."""
    return rows([pictures], titles, **how)
