"""Merge fine-tuned models in JAX: pure functions over parameter pytrees."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmerge.adapters import core_space, tsv_compress
    from jaxmerge.analysis import compare
    from jaxmerge.calibration import calibrate, subspace_boost
    from jaxmerge.checkpoints import load, load_adapter, open_checkpoint, save
    from jaxmerge.conversion import convert
    from jaxmerge.depth import lines
    from jaxmerge.evaluation import ResultTable, evaluate
    from jaxmerge.forecast import plan_merge
    from jaxmerge.leafwise import task_vector
    from jaxmerge.linalg import map_matrices
    from jaxmerge.loading import load_sharded
    from jaxmerge.lowrank import LowRank, apply_adapter
    from jaxmerge.matrices import MatrixAxes, matrix_axes
    from jaxmerge.merging import merge_checkpoints
    from jaxmerge.methods.alignment import knots
    from jaxmerge.methods.arithmetic import magmax, task_arithmetic
    from jaxmerge.methods.averaging import average, model_stock
    from jaxmerge.methods.competing import pcb, sce
    from jaxmerge.methods.drift import lot_merge
    from jaxmerge.methods.dropping import dare, della
    from jaxmerge.methods.factors import lorm
    from jaxmerge.methods.fisher import fisher_average, gradient_matching
    from jaxmerge.methods.frank_wolfe import fw_merge
    from jaxmerge.methods.interference import wudi
    from jaxmerge.methods.masking import (
        apply_mask,
        choose_thresholds,
        consensus,
        tall_masks,
    )
    from jaxmerge.methods.matching import matching_objective, mats, regmean
    from jaxmerge.methods.pairs import arcee_fusion, nearswap
    from jaxmerge.methods.regions import localize_and_stitch, ram, tatr
    from jaxmerge.methods.spherical import karcher, multislerp, nuslerp, slerp
    from jaxmerge.methods.subspaces import iso_c, iso_cts, sftm, tsv_merge
    from jaxmerge.methods.trimming import breadcrumbs, ties
    from jaxmerge.methods.truncating import cart, dc_merge, star
    from jaxmerge.methods.unified import emr
    from jaxmerge.overlap import mask_statistics
    from jaxmerge.recipe_files import load_recipe
    from jaxmerge.recipes import Recipe
    from jaxmerge.sharding import place
    from jaxmerge.statistics import Statistics, collect
    from jaxmerge.submodules.coefficients import (
        submodule_coefficients,
        submodule_merge,
    )
    from jaxmerge.submodules.interception import submodule
    from jaxmerge.submodules.linearity import nonlinearity
    from jaxmerge.submodules.progressive import regmean_plus_plus
    from jaxmerge.tuning import (
        adamerging,
        evolve,
        few_shot_coefficients,
        greedy_soup,
        sweep,
    )

__version__ = "0.1.0"

__all__ = [
    "LowRank",
    "MatrixAxes",
    "Recipe",
    "ResultTable",
    "Statistics",
    "adamerging",
    "apply_adapter",
    "apply_mask",
    "arcee_fusion",
    "average",
    "breadcrumbs",
    "calibrate",
    "cart",
    "choose_thresholds",
    "collect",
    "compare",
    "consensus",
    "convert",
    "core_space",
    "dare",
    "dc_merge",
    "della",
    "emr",
    "evaluate",
    "evolve",
    "few_shot_coefficients",
    "fisher_average",
    "fw_merge",
    "gradient_matching",
    "greedy_soup",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "lines",
    "load",
    "load_adapter",
    "load_recipe",
    "load_sharded",
    "localize_and_stitch",
    "lorm",
    "lot_merge",
    "magmax",
    "map_matrices",
    "mask_statistics",
    "matching_objective",
    "matrix_axes",
    "mats",
    "merge_checkpoints",
    "model_stock",
    "multislerp",
    "nearswap",
    "nonlinearity",
    "nuslerp",
    "open_checkpoint",
    "pcb",
    "place",
    "plan_merge",
    "ram",
    "regmean",
    "regmean_plus_plus",
    "save",
    "sce",
    "sftm",
    "slerp",
    "star",
    "submodule",
    "submodule_coefficients",
    "submodule_merge",
    "subspace_boost",
    "sweep",
    "tall_masks",
    "task_arithmetic",
    "task_vector",
    "tatr",
    "ties",
    "tsv_compress",
    "tsv_merge",
    "wudi",
]

# Where the names above are at home. They are imported on first use, so that the command
# line answers before JAX is loaded.
_HOMES = {
    "adapters": ["core_space", "tsv_compress"],
    "analysis": ["compare"],
    "calibration": ["calibrate", "subspace_boost"],
    "checkpoints": ["load", "load_adapter", "open_checkpoint", "save"],
    "loading": ["load_sharded"],
    "conversion": ["convert"],
    "depth": ["lines"],
    "leafwise": ["task_vector"],
    "linalg": ["map_matrices"],
    "lowrank": ["LowRank", "apply_adapter"],
    "matrices": ["MatrixAxes", "matrix_axes"],
    "evaluation": ["ResultTable", "evaluate"],
    "forecast": ["plan_merge"],
    "merging": ["merge_checkpoints"],
    "methods.alignment": ["knots"],
    "methods.arithmetic": ["magmax", "task_arithmetic"],
    "methods.averaging": ["average", "model_stock"],
    "methods.competing": ["pcb", "sce"],
    "methods.drift": ["lot_merge"],
    "methods.dropping": ["dare", "della"],
    "methods.factors": ["lorm"],
    "methods.fisher": ["fisher_average", "gradient_matching"],
    "methods.frank_wolfe": ["fw_merge"],
    "methods.interference": ["wudi"],
    "methods.masking": [
        "apply_mask",
        "choose_thresholds",
        "consensus",
        "tall_masks",
    ],
    "methods.matching": ["matching_objective", "mats", "regmean"],
    "methods.pairs": ["arcee_fusion", "nearswap"],
    "methods.regions": ["localize_and_stitch", "ram", "tatr"],
    "methods.spherical": ["karcher", "multislerp", "nuslerp", "slerp"],
    "methods.subspaces": ["iso_c", "iso_cts", "sftm", "tsv_merge"],
    "methods.trimming": ["breadcrumbs", "ties"],
    "methods.truncating": ["cart", "dc_merge", "star"],
    "methods.unified": ["emr"],
    "overlap": ["mask_statistics"],
    "recipe_files": ["load_recipe"],
    "recipes": ["Recipe"],
    "sharding": ["place"],
    "statistics": ["Statistics", "collect"],
    "submodules.coefficients": ["submodule_coefficients", "submodule_merge"],
    "submodules.interception": ["submodule"],
    "submodules.linearity": ["nonlinearity"],
    "submodules.progressive": ["regmean_plus_plus"],
    "tuning": [
        "adamerging",
        "evolve",
        "few_shot_coefficients",
        "greedy_soup",
        "sweep",
    ],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Modules that are public as a whole, imported on first use like the names.
_MODULES = (
    "analysis",
    "checkpoints",
    "compression",
    "evaluation",
    "landscape",
    "plots",
    "spectra",
    "statistics",
    "tuning",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
