"""Pictures of merges: accuracies, task vectors, coefficients.

Every function returns a matplotlib figure, which a notebook shows and `savefig` writes;
none touches pyplot or any global setting. Needs the extra `jaxmerge[plots]`. What the
pictures show is computed elsewhere, without matplotlib: `jaxmerge.analysis`, `overlap`,
`spectra`, `landscape` and `evaluation`.
"""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError(
        "jaxmerge.plots needs matplotlib; install it with: "
        "pip install 'jaxmerge[plots]'"
    )

from jaxmerge.plots.accuracies import (
    accuracy_against_bytes,
    accuracy_against_tasks,
    heat_map,
    radar,
)
from jaxmerge.plots.coefficients import (
    coefficients_per_layer,
    draw_landscape,
    landscape,
    sweep_curves,
)
from jaxmerge.plots.vectors import (
    cosine_matrix,
    mask_overlap,
    sign_conflict,
    singular_spectra,
)

__all__ = [
    "accuracy_against_bytes",
    "accuracy_against_tasks",
    "coefficients_per_layer",
    "cosine_matrix",
    "draw_landscape",
    "heat_map",
    "landscape",
    "mask_overlap",
    "radar",
    "sign_conflict",
    "singular_spectra",
    "sweep_curves",
]
