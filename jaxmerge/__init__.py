"""Merge fine-tuned models in JAX: pure functions over parameter pytrees."""

from jaxmerge.checkpoints import load, open_checkpoint, save
from jaxmerge.leafwise import task_vector
from jaxmerge.linalg import map_matrices
from jaxmerge.matrices import MatrixAxes, matrix_axes
from jaxmerge.methods.arithmetic import magmax, task_arithmetic
from jaxmerge.methods.averaging import average, model_stock
from jaxmerge.methods.dropping import dare, della
from jaxmerge.methods.spherical import slerp
from jaxmerge.methods.trimming import breadcrumbs, ties
from jaxmerge.registry import methods
from jaxmerge.sharding import place

__version__ = "0.1.0"

__all__ = [
    "MatrixAxes",
    "average",
    "breadcrumbs",
    "dare",
    "della",
    "load",
    "magmax",
    "map_matrices",
    "matrix_axes",
    "methods",
    "model_stock",
    "open_checkpoint",
    "place",
    "save",
    "slerp",
    "task_arithmetic",
    "task_vector",
    "ties",
]
