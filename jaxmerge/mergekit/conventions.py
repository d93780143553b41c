"""mergekit's merge methods: their parameters, and what each means in our options.

Options are made leaf by leaf: numbers become rules on leaf paths, and leaves that
differ in anything else (text, booleans) are merged apart. What mergekit does by row, it
does along the last axis of a tensor, whatever that means; so do the rows here.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Role = Literal["start", "first", "origin", "member"]


class Parameter(NamedTuple):
    """A parameter of a method of mergekit.

    Attributes:
        name: as recipes have it.
        default: None if the recipe has to give a value.
        kind: float, int or bool.
        of: "merge", or "model": each model but the base has a value of its own.
    """

    name: str
    default: Any
    kind: type = float
    of: Literal["merge", "model"] = "merge"


class Values(NamedTuple):
    """The values of all parameters for one leaf.

    Attributes:
        merge: of the merge.
        models: of each model that has a weight, in order.
        rank: how many axes the leaf has.
    """

    merge: Mapping[str, Any]
    models: list[Mapping[str, Any]]
    rank: int

    def each(self, name: str) -> list[Any]:
        """The values of one parameter, by model."""
        return [model[name] for model in self.models]


class Convention(NamedTuple):
    """How a method of mergekit is carried out.

    Attributes:
        method: the name of ours.
        base: what the `base_model` is: "start", from which task vectors are measured;
            "first", the first of the models; "origin", of a sphere, if there is one;
            "member", one more of the models, if there is one.
        models: the least and the largest number of models besides a base that is a
            start or an origin, None for any.
        parameters: all that mergekit knows for this method. Those without an effect on
            the numbers there (`int8_mask`, and two of task_arithmetic) have none here.
        options: from the values for one leaf to ours; none for a leaf that passes
            through as it is.
    """

    method: str
    base: Role
    models: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    options: Callable[[Values], dict[str, Any]]

    @property
    def needs_base(self) -> bool:
        return self.base in ("start", "first")


_SIGNS = {"tie": "positive", "divisor": "signed_weights"}
_WEIGHT = Parameter("weight", None, of="model")
_ROWS = {".*": "o*i"}
_COLUMNS = {".*": "io*"}


def _rows(rank: int, matrices: Mapping[str, str]) -> dict[str, Any]:
    """Rows of a tensor; one of fewer than two axes is a single row."""
    if rank < 2:
        return {"scope": "leaf"}
    return {"scope": "row", "matrices": matrices}


def _average(values: Values) -> dict[str, Any]:
    return {
        "weights": values.each("weight"),
        "normalize": values.merge["normalize"],
    }


def _copy(values: Values) -> dict[str, Any]:
    (scale,) = values.each("scale")
    return {} if scale == 1 else {"weights": [scale], "normalize": False}


def _task_arithmetic(values: Values) -> dict[str, Any]:
    return {
        "weights": values.each("weight"),
        "scale": values.merge["lambda"],
        "normalize": values.merge["normalize"],
    }


def _sparse(values: Values, elect: bool) -> dict[str, Any]:
    """What all methods share that thin out task vectors before they add them."""
    densities, weights = values.each("density"), values.each("weight")
    normalize = values.merge["normalize"]
    if normalize and not elect and 0 in densities:
        raise ValueError(
            "density is 0, so that a model takes part in normalize only; leave the "
            "model out, or set normalize to false"
        )
    return {
        # What a model without any entries left adds is what one of weight 0 adds.
        "density": [density or 1.0 for density in densities],
        "weights": [
            weight if density else 0.0
            for density, weight in zip(densities, weights, strict=True)
        ],
        "scale": values.merge["lambda"],
        "rescale": "l1" if values.merge["rescale"] else None,
        "aggregate": "mean" if normalize else "sum",
        **(_SIGNS if elect else {"divisor": "signed_weights"}),
    }


def _ties(values: Values) -> dict[str, Any]:
    return _sparse(values, elect=True)


def _dare(elect: bool) -> Callable[[Values], dict[str, Any]]:
    return lambda values: {"elect": elect, **_sparse(values, elect)}


def _breadcrumbs(elect: bool) -> Callable[[Values], dict[str, Any]]:
    def options(values: Values) -> dict[str, Any]:
        return {
            "elect": elect,
            "gamma": values.each("gamma"),
            **_sparse(values, elect),
        }

    return options


def _della(elect: bool) -> Callable[[Values], dict[str, Any]]:
    def options(values: Values) -> dict[str, Any]:
        pairs = zip(values.each("density"), values.each("epsilon"), strict=True)
        for density, epsilon in pairs:
            if 0 < density < 1 and not epsilon < density <= 1 - epsilon:
                raise ValueError(
                    f"density {density} -/+ epsilon {epsilon} must lie in (0, 1]; "
                    "lower epsilon"
                )
        return {
            "elect": elect,
            "half_width": values.each("epsilon"),
            **_rows(values.rank, _ROWS),
            **_sparse(values, elect),
        }

    return options


def _slerp(values: Values) -> dict[str, Any]:
    return {"t": values.merge["t"]}


def _nuslerp(values: Values) -> dict[str, Any]:
    options: dict[str, Any] = {"weights": values.each("weight")}
    if values.merge["nuslerp_flatten"]:
        return options
    by_column = values.merge["nuslerp_row_wise"]
    return options | _rows(values.rank, _COLUMNS if by_column else _ROWS)


def _multislerp(values: Values) -> dict[str, Any]:
    return {
        "weights": values.each("weight"),
        "normalize": values.merge["normalize_weights"],
    }


def _karcher(values: Values) -> dict[str, Any]:
    return {"max_steps": values.merge["max_iter"], "tolerance": values.merge["tol"]}


def _model_stock(values: Values) -> dict[str, Any]:
    by_row = _rows(values.rank, _ROWS) if values.merge["filter_wise"] else {}
    return {"clip": False, **by_row}


def _sce(values: Values) -> dict[str, Any]:
    if values.merge["select_topk"] <= 0:
        raise ValueError(
            "select_topk is 0, which selects nothing; leave it out for all"
        )
    return {"density": values.merge["select_topk"], "mask_values": True}


def _ram(values: Values) -> dict[str, Any]:
    return {"epsilon": values.merge["epsilon"]}


def _ram_plus(values: Values) -> dict[str, Any]:
    return {
        "epsilon": values.merge["epsilon"],
        "boost": values.merge["r"],
        "limit": values.merge["alpha"],
    }


def _nearswap(values: Values) -> dict[str, Any]:
    return {"t": values.merge["t"]}


def _arcee_fusion(values: Values) -> dict[str, Any]:
    return _rows(values.rank, _ROWS)


def _generalized(
    method: str,
    options: Callable[[Values], dict[str, Any]],
    *own: Parameter,
    normalize: bool = False,
    rescale: bool = False,
) -> Convention:
    """A method of the family of task arithmetic."""
    parameters = (
        _WEIGHT,
        Parameter("density", 1.0, of="model"),
        *own,
        Parameter("lambda", 1.0),
        Parameter("normalize", normalize, bool),
        Parameter("rescale", rescale, bool),
        Parameter("int8_mask", False, bool),
    )
    return Convention(method, "start", (1, None), parameters, options)


_GAMMA = Parameter("gamma", 0.01, of="model")
_EPSILON = Parameter("epsilon", 0.15, of="model")
_OVERLAP = Parameter("epsilon", 1e-5)

CONVENTIONS: Mapping[str, Convention] = {
    "passthrough": Convention(
        "average", "member", (1, 1), (Parameter("scale", 1.0, of="model"),), _copy
    ),
    "linear": Convention(
        "average",
        "member",
        (1, None),
        (_WEIGHT, Parameter("normalize", True, bool)),
        _average,
    ),
    "task_arithmetic": _generalized("task_arithmetic", _task_arithmetic),
    "ties": _generalized("ties", _ties, normalize=True),
    "dare_linear": _generalized("dare", _dare(elect=False), rescale=True),
    "dare_ties": _generalized("dare", _dare(elect=True), rescale=True),
    "della": _generalized(
        "della", _della(elect=True), _EPSILON, normalize=True, rescale=True
    ),
    "della_linear": _generalized("della", _della(elect=False), _EPSILON, rescale=True),
    "breadcrumbs": _generalized("breadcrumbs", _breadcrumbs(elect=False), _GAMMA),
    "breadcrumbs_ties": _generalized("breadcrumbs", _breadcrumbs(elect=True), _GAMMA),
    "slerp": Convention("slerp", "first", (2, 2), (Parameter("t", None),), _slerp),
    "nuslerp": Convention(
        "nuslerp",
        "origin",
        (2, 2),
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", True, bool),
            Parameter("nuslerp_row_wise", False, bool),
        ),
        _nuslerp,
    ),
    "multislerp": Convention(
        "multislerp",
        "origin",
        (1, None),
        (
            _WEIGHT,
            Parameter("normalize_weights", True, bool),
            Parameter("eps", 1e-8),
        ),
        _multislerp,
    ),
    "karcher": Convention(
        "karcher",
        "member",
        (1, None),
        (Parameter("max_iter", 10, int), Parameter("tol", 1e-5)),
        _karcher,
    ),
    "model_stock": Convention(
        "model_stock",
        "start",
        (2, None),
        (Parameter("filter_wise", False, bool),),
        _model_stock,
    ),
    "sce": Convention(
        "sce",
        "start",
        (1, None),
        (Parameter("select_topk", 1.0), Parameter("int8_mask", False, bool)),
        _sce,
    ),
    "ram": Convention("ram", "start", (1, None), (_OVERLAP,), _ram),
    "ramplus_tl": Convention(
        "ram",
        "start",
        (1, None),
        (_OVERLAP, Parameter("r", 0.1), Parameter("alpha", 0.2)),
        _ram_plus,
    ),
    "nearswap": Convention(
        "nearswap", "start", (1, 1), (Parameter("t", None),), _nearswap
    ),
    "arcee_fusion": Convention("arcee_fusion", "start", (1, 1), (), _arcee_fusion),
}
"""By mergekit's names."""
