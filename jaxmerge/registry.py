"""The merge methods by name, and what the command line, recipes and tests ask of them.

A method registers once, by decorator; parameters, defaults and descriptions are read
off its signature and docstring, so there is nothing to keep in step.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


class Parameter(NamedTuple):
    """One option of a method; `default` is `inspect.Parameter.empty` if required."""

    name: str
    default: Any
    description: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


class Method(NamedTuple):
    """A registered merge method.

    Attributes:
        name: the public name.
        function: `function([base,] models, [statistics,] *, ...) -> params`.
        paper: authors, title, venue.
        link: where to read it.
        identity: the options at which a single model comes back as it is; None if
            it never does.
        symmetric: whether the order of the models is without effect.
        max_models: the largest number of models, None for any number.
        gathers: whether entries that are sharded must come together for it: rows that
            are sorted, or whole matrices.
        two_phases: whether, to rank the entries of a whole model, it first looks at
            leaf after leaf for a few numbers; if not, it holds the model.
    """

    name: str
    function: Callable[..., Any]
    paper: str
    link: str
    identity: Mapping[str, Any] | None
    symmetric: bool
    max_models: int | None
    gathers: bool
    two_phases: bool

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def needs_base(self) -> bool:
        """Whether it measures models from a common start."""
        return self._takes("base")

    def uses_base(self, options: Mapping[str, Any]) -> bool:
        """Whether it measures models from a base: always, or with `origin="base"`."""
        return self.needs_base or options.get("origin") is not None

    @property
    def needs_key(self) -> bool:
        """Whether it draws at random."""
        return self._takes("key")

    @property
    def needs_statistics(self) -> bool:
        """Whether it needs to know something of the data."""
        return self._takes("statistics")

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(self.function).parameters

    @property
    def scopes(self) -> tuple[str, ...]:
        """What it can rank entries or measure angles within, the default first."""
        scope = self.parameters.get("scope")
        if scope is None:
            return ()
        known = get_args(get_type_hints(self.function)["scope"])
        return tuple(sorted(known, key=lambda name: name != scope.default))

    @property
    def file(self) -> str:
        """The source file, relative to the repository."""
        return self.function.__module__.replace(".", "/") + ".py"

    @property
    def options(self) -> dict[str, Parameter]:
        """The parameters that a recipe sets.

        The others hold no plain values: `bind` fills in what a recipe has another key
        for, and trees of arrays come from Python only.
        """
        filled_in = (
            "key",
            "names",
            "info",
            "base_statistics",
            "masks",
            "sensitivity",
        )
        return {n: p for n, p in self.parameters.items() if n not in filled_in}

    def bind(
        self,
        options: Mapping[str, Any],
        seed: int,
        names: Sequence[str],
        statistics: Sequence[Any] = (),
    ) -> Any:
        """The method as `function(base, models)`, whatever parameters it has.

        Args:
            options: keyword parameters, those that `options` lists; `origin="base"`
                makes the base the origin of a method that has one.
            seed: for methods that draw at random.
            names: what such methods know the models by.
            statistics: of each model, for methods that need them.
        """
        drawn = {"key": seed, "names": list(names)} if self.needs_key else {}
        known = (statistics,) if self.needs_statistics else ()

        def call(base: Any, models: Sequence[Any]) -> Any:
            trees = (base, models) if self.needs_base else (models,)
            origin = {"origin": base} if options.get("origin") == "base" else {}
            return self.function(*trees, *known, **{**options, **drawn, **origin})

        return call

    def spans_model(self, options: Mapping[str, Any]) -> bool:
        """Whether a leaf depends on all others."""
        default = next(iter(self.scopes), None)
        return options.get("scope", default) == "model"

    def holds_model(self, options: Mapping[str, Any]) -> bool:
        """Whether all leaves of all models must be in memory at once."""
        return self.spans_model(options) and not self.two_phases

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All keyword parameters, in the order of the signature."""
        described = _described_arguments(inspect.getdoc(self.function) or "")
        return {
            name: Parameter(name, parameter.default, described.get(name, ""))
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }


_METHODS: dict[str, Method] = {}


def register(
    *,
    paper: str,
    link: str,
    identity: Mapping[str, Any] | None = MappingProxyType({}),
    symmetric: bool = True,
    max_models: int | None = None,
    gathers: bool = False,
    two_phases: bool = True,
) -> Callable[[F], F]:
    """Registers the decorated function as a merge method under its own name."""

    def add(function: F) -> F:
        name = function.__name__
        _METHODS[name] = Method(
            name,
            function,
            paper,
            link,
            identity,
            symmetric,
            max_models,
            gathers,
            two_phases,
        )
        return function

    return add


def methods() -> Mapping[str, Method]:
    """All merge methods by name, in alphabetical order."""
    package = importlib.import_module("jaxmerge.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"jaxmerge.methods.{module.name}")
    return MappingProxyType(dict(sorted(_METHODS.items())))


def _described_arguments(docstring: str) -> dict[str, str]:
    """The entries of the "Args:" section of a docstring, by name, each on one line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(
        r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section[1], re.DOTALL | re.MULTILINE
    )
    return {name: _plain(" ".join(text.split())) for name, text in entries}


_SYMBOLS = {
    "lambda": "λ",
    "tau": "τ",
    "theta": "θ",
    "rho": "ρ",
    "epsilon": "ε",
    "sum": "Σ",
    "le": "≤",
}


def _plain(text: str) -> str:
    """Formulas as a terminal can show them."""
    text = re.sub(r"\\hat\\?", r"\\", text)
    for name, symbol in _SYMBOLS.items():
        text = re.sub(rf"\\{name}(?![a-z])", symbol, text)
    text = text.replace(r"\|", "‖").replace("$", "")
    return re.sub(r"\\(?=[a-z])", "", text)  # Names of functions.


def markdown_table() -> str:
    """The methods as a Markdown table, as in the README."""
    rows = [
        f"| `{m.name}` | {m.summary} | [{m.paper}]({m.link}) | [{m.file}]({m.file}) |"
        for m in methods().values()
    ]
    header = "| method | what it does | paper | file |"
    return "\n".join([header, "|---|---|---|---|", *rows])
