"""The YAML of mergekit's recipes, checked as a whole before anything is loaded.

mergekit ignores what it does not know; here a key or parameter that is misspelt, or
that is not supported, is an error that names the line and what to write instead. All
such errors come at once.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge.checkpoints import is_adapter
from jaxmerge.mergekit.checking import problems_of
from jaxmerge.mergekit.conventions import CONVENTIONS
from jaxmerge.mergekit.recipe import (
    MergekitRecipe,
    ModelRef,
    Slice,
    SliceSource,
    TokenizerSpec,
    TokenSource,
)
from jaxmerge.mergekit.settings import Level, setting_problem
from jaxmerge.mergekit.templates import TEMPLATES
from jaxmerge.recipe_syntax import (
    Document,
    Place,
    Problem,
    RecipeError,
    raise_problems,
    read_yaml,
    unknown,
)
from jaxmerge.recipes import DTYPES

_KEYS = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters"),
    *("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name"),
)
_MIXTURE_KEYS = ("experts", "shared_experts", "gate_mode")
_TOKEN_KINDS = ("model_token", "zero")


def is_mergekit(document: Any) -> bool:
    """Whether a YAML document is a recipe for one of mergekit's tools."""
    keys = {"merge_method", *_MIXTURE_KEYS}
    return isinstance(document, dict) and not keys.isdisjoint(document)


def parse_mergekit(
    text: str, *, source: str = "recipe", directory: str | os.PathLike[str] = "."
) -> MergekitRecipe:
    """Checks the text of a recipe of mergekit.

    Args:
        text: YAML.
        source: how messages call it.
        directory: where relative paths start; as in mergekit, that is by default where
            the process is, not where the recipe is.

    Raises:
        RecipeError: lists everything that is wrong, with line numbers.

    Example:
        >>> text = "merge_method: passthrough\\nmodels: [{model: ., layers: 3}]"
        >>> parse_mergekit(text)
        Traceback (most recent call last):
        jaxmerge.recipe_syntax.RecipeError: recipe:2: unknown key 'layers'; ...
    """
    document = read_yaml(text, source)
    if not isinstance(document.value, dict):
        raise RecipeError(
            f"{source}:1: a recipe is a mapping, `merge_method: ties` ..."
        )
    reader = _Reader(document, Path(directory), [])
    fields = reader.recipe()
    raise_problems([*document.problems, *reader.problems], source)
    recipe = MergekitRecipe(**fields, text=text, source=source)
    for slice_number, message in problems_of(recipe):
        reader.wrong(reader.place_of(slice_number), message)
    raise_problems(reader.problems, source)
    return recipe


class _Reader(NamedTuple):
    """Reads a document piece by piece; `place` is always where a piece is in it."""

    document: Document
    directory: Path
    problems: list[Problem]

    def wrong(self, place: Place, message: str) -> None:
        self.problems.append(Problem(self.document.line_of(place), message))

    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe; worthless if there are problems."""
        value = self.document.value
        if "merge_method" not in value:
            for key in _MIXTURE_KEYS:
                if key in value:
                    self.wrong(
                        (key,),
                        f"{key!r} belongs to mergekit-moe, which makes a mixture of "
                        "experts; that is no merge, so make it there",
                    )
                    return {}
            self.wrong((), "the key 'merge_method' is missing")
        self.keys(value, (), _KEYS)
        method = self.text(value, "merge_method", ())
        if method and method not in CONVENTIONS:
            self.wrong(("merge_method",), unknown("method", method, list(CONVENTIONS)))
        base = self.optional_model(value, "base_model", ())
        names = self.dtype("dtype"), self.dtype("out_dtype")
        self.text(value, "name", ())
        return {
            "method": method,
            "slices": self.slices(method, base),
            "base": base,
            "dtype": names[1] or names[0],
            "tokenizer": self.tokenizer(),
            "chat_template": self.chat_template(),
        }

    # What the output is made of.

    def slices(self, method: str, base: ModelRef | None) -> tuple[Slice, ...]:
        value, place = self.document.value, ()
        levels = [self.parameters(value, place, method)]
        given = [key for key in ("models", "slices", "modules") if key in value]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            self.wrong((), f"a recipe has one of models, slices and modules; {found}")
            return ()
        if given == ["modules"]:
            modules = value["modules"]
            if not isinstance(modules, dict) or len(modules) != 1:
                self.wrong(
                    ("modules",),
                    "modules must be a mapping with one entry; parts of a model, as "
                    "of a vision model, are merged by name here: list `models`, and "
                    "tell parts apart by filters",
                )
                return ()
            ((name, value),) = modules.items()
            place = ("modules", name)
            if not isinstance(value, dict):
                self.wrong(place, f"modules: {name} must be a mapping, with models")
                return ()
            self.keys(value, place, ("models", "slices", "parameters"))
            levels.insert(0, self.parameters(value, place, method))
            given = [key for key in ("models", "slices") if key in value]
            if len(given) != 1:
                self.wrong(place, f"modules: {name} has one of models and slices")
                return ()
        entries, at = value[given[0]], (*place, given[0])
        if not isinstance(entries, list) or not entries:
            self.wrong(at, f"{given[0]} must be a list, found {entries!r}")
            return ()
        if given == ["models"]:
            sources = tuple(self.sources(entries, at, method, sliced=False))
            return (self.with_base(Slice(sources, base, tuple(levels)), method),)
        return tuple(
            self.slice(entry, (*at, i), method, base, levels)
            for i, entry in enumerate(entries)
        )

    def slice(
        self,
        entry: Any,
        place: Place,
        method: str,
        base: ModelRef | None,
        levels: list[Level],
    ) -> Slice:
        if not isinstance(entry, dict) or not isinstance(entry.get("sources"), list):
            self.wrong(place, "a slice is a mapping with a list of sources")
            return Slice((), base, ())
        known = ("sources", "base_model", "parameters")
        if "residual_weight" in entry:
            self.wrong(
                (*place, "residual_weight"),
                "residual_weight has no effect in mergekit either; leave it out",
            )
        self.keys(entry, place, (*known, "residual_weight"))
        at = (*place, "sources")
        sources = tuple(self.sources(entry["sources"], at, method, sliced=True))
        lengths = {len(source.span) for source in sources}
        if len(lengths) > 1:
            counts = " and ".join(map(str, sorted(lengths)))
            self.wrong(at, f"sources of a slice have {counts} layers; give all as many")
        own = self.optional_model(entry, "base_model", place)
        own_levels = (self.parameters(entry, place, method), *levels)
        return Slice(sources, own or base, own_levels)

    def sources(
        self, entries: list[Any], place: Place, method: str, sliced: bool
    ) -> Iterator[SliceSource]:
        known = ("model", "parameters", *(["layer_range"] if sliced else []))
        seen = set()
        for i, entry in enumerate(entries):
            at = (*place, i)
            if not isinstance(entry, dict):
                self.wrong(at, f"must be a mapping, `model: path`, found {entry!r}")
                continue
            self.keys(entry, at, known)
            if "model" not in entry:
                if entry.keys() <= set(known):
                    self.wrong(at, "the key 'model' is missing")
                continue
            model = self.model(entry["model"], (*at, "model"))
            if model in seen and model is not None:
                self.wrong(at, f"{model} is here twice; list it once, with one weight")
            seen.add(model)
            parameters = self.parameters(entry, at, method)
            layers = self.layer_range(entry, at) if sliced else None
            if model is not None:
                yield SliceSource(model, layers, parameters)

    def layer_range(self, entry: dict[str, Any], place: Place) -> tuple[int, int]:
        match entry.get("layer_range"):
            case [int(first), int(end)] if 0 <= first < end:
                return first, end
            case other:
                self.wrong(
                    (*place, "layer_range"),
                    "layer_range must be [first, end], the end not included, such as "
                    f"[0, 16], found {other!r}",
                )
                return 0, 1

    def with_base(self, slice_: Slice, method: str) -> Slice:
        """Adds the base to `models` that do not list it, as mergekit does."""
        listed = slice_.base in [source.model for source in slice_.sources]
        if slice_.base is None or listed or method not in CONVENTIONS:
            return slice_
        source = SliceSource(slice_.base, None, {})
        return slice_._replace(sources=(*slice_.sources, source))

    def parameters(self, value: dict[str, Any], place: Place, method: str) -> Level:
        settings = value.get("parameters")
        at = (*place, "parameters")
        if settings is None:
            return {}
        if not isinstance(settings, dict):
            self.wrong(at, f"parameters must be a mapping, found {settings!r}")
            return {}
        if method not in CONVENTIONS:
            return settings
        known = {p.name: p for p in CONVENTIONS[method].parameters}
        for name, setting in settings.items():
            if name not in known:
                message = unknown("parameter", name, list(known), of=method)
                self.wrong((*at, name), message)
            elif message := setting_problem(setting, known[name].kind):
                self.wrong((*at, name), f"parameter {name!r} {message}")
        return settings

    # Models.

    def optional_model(
        self, value: dict[str, Any], key: str, place: Place
    ) -> ModelRef | None:
        if value.get(key) is None:
            return None
        return self.model(value[key], (*place, key))

    def model(self, value: Any, place: Place) -> ModelRef | None:
        """A model by `path`, `path+lora`, or {model, lora} of paths or {path}."""
        if isinstance(value, str):
            path, *loras = value.split("+")
            if len(loras) > 1:
                self.wrong(
                    place,
                    f"{value!r} has several adapters; apply all but one beforehand, "
                    "each with a merge of `path+lora` by passthrough",
                )
                return None
            value = {"model": path, **({"lora": loras[0]} if loras else {})}
        if not isinstance(value, dict):
            self.wrong(place, f"a model is a path, found {value!r}")
            return None
        if "override_architecture" in value:
            self.wrong(
                (*place, "override_architecture"),
                "override_architecture has no use here, where leaves are merged by "
                "name whatever the architecture; leave it out",
            )
        self.keys(value, place, ("model", "lora", "override_architecture"))
        path = self.path(value.get("model"), place)
        if path is None:
            return None
        if value.get("lora") is None:
            if is_adapter(path):
                self.wrong(
                    place,
                    f"{path} is a LoRA adapter; write its base in front: base+{path}",
                )
            return ModelRef(path)
        lora = self.path(value["lora"], place)
        return None if lora is None else ModelRef(path, lora)

    def path(self, value: Any, place: Place) -> Path | None:
        if isinstance(value, dict) and value.keys() <= {"path", "revision"}:
            revision = value.get("revision")
            value = value.get("path")
            value = f"{value}@{revision}" if revision and value else value
        if not isinstance(value, str) or not value:
            self.wrong(place, f"a model is a path, found {value!r}")
            return None
        path = Path(os.path.normpath(self.directory / Path(value).expanduser()))
        if path.exists():
            return path
        remedy = "paths start where jaxmerge runs, as in mergekit"
        if not value.startswith((".", "/", "~")) and value.count("/") <= 1:
            repository = value.partition("@")[0]
            remedy += (
                "; for a repository of the Hugging Face hub, download it first "
                f"(`hf download {repository} --local-dir {Path(repository).name}`) and "
                "write that directory"
            )
        self.wrong(place, f"{value!r} does not exist; {remedy}")
        return None

    # Everything else.

    def keys(self, value: dict[str, Any], place: Place, known: tuple[str, ...]) -> None:
        for key in value:
            if key not in known:
                self.wrong((*place, key), unknown("key", key, known))

    def text(self, value: dict[str, Any], key: str, place: Place) -> str:
        text = value.get(key, "")
        if not isinstance(text, str):
            self.wrong((*place, key), f"{key} must be text, found {text!r}")
            return ""
        return text

    def dtype(self, key: str) -> str | None:
        value = self.document.value.get(key)
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in DTYPES:
            known = ", ".join(DTYPES)
            self.wrong(
                (key,), f"{key} is {name!r}; models are merged to one of {known}"
            )
        return name

    def tokenizer(self) -> TokenizerSpec | None:
        recipe = self.document.value
        legacy, value = recipe.get("tokenizer_source"), recipe.get("tokenizer")
        if value is None:
            if legacy is None:
                return None
            source = self.token_source(legacy, ("tokenizer_source",))
            return TokenizerSpec(source, {}, 1)
        place = ("tokenizer",)
        if legacy is not None:
            self.wrong(place, "give one of tokenizer and tokenizer_source")
        if not isinstance(value, dict):
            self.wrong(place, "tokenizer must be a mapping, such as {source: union}")
            return None
        self.keys(value, place, ("source", "tokens", "pad_to_multiple_of"))
        tokens = value.get("tokens") or {}
        if not isinstance(tokens, dict):
            self.wrong((*place, "tokens"), "tokens must map tokens to {source: ...}")
            tokens = {}
        multiple = value.get("pad_to_multiple_of") or 1
        if type(multiple) is not int or multiple < 1:
            at = (*place, "pad_to_multiple_of")
            self.wrong(at, f"must be a whole number of at least 1, found {multiple!r}")
        return TokenizerSpec(
            self.token_source(value.get("source", "union"), (*place, "source")),
            {
                token: self.token(spec, (*place, "tokens", token))
                for token, spec in tokens.items()
            },
            multiple,
        )

    def token_source(self, value: Any, place: Place) -> str | ModelRef:
        if value in ("union", "base"):
            return value
        return self.model(value, place) or "base"

    def token(self, spec: Any, place: Place) -> TokenSource:
        if not isinstance(spec, dict):
            self.wrong(place, f"must be a mapping, {{source: ...}}, found {spec!r}")
            return TokenSource()
        self.keys(spec, place, ("source", "force"))
        source, force = spec.get("source"), spec.get("force", False)
        at = (*place, "source")
        if type(force) is not bool:
            self.wrong((*place, "force"), f"must be true or false, found {force!r}")
        if source is None:
            if force:
                self.wrong(place, "force needs a source")
            return TokenSource()
        if not isinstance(source, dict) or "kind" not in source:
            return TokenSource(self.model(source, at), force=force)
        kind = source["kind"]
        if kind == "zero":
            self.keys(source, at, ("kind",))
            return TokenSource(zero=True, force=force)
        if kind != "model_token":
            self.wrong((*at, "kind"), unknown("kind", kind, _TOKEN_KINDS))
            return TokenSource()
        self.keys(source, at, ("kind", "model", "token", "token_id"))
        given = [source[key] for key in ("token", "token_id") if key in source]
        if len(given) != 1 or type(given[0]) is not (str if "token" in source else int):
            self.wrong(at, "give one of token (text) and token_id (a number)")
            return TokenSource()
        return TokenSource(self.model(source.get("model"), at), given[0], force=force)

    def chat_template(self) -> str | None:
        recipe = self.document.value
        if recipe.get("chat_template") is None:
            return None
        text = self.text(recipe, "chat_template", ())
        if text == "auto" or "{" in text:
            return text
        if text and text not in TEMPLATES:
            self.wrong(
                ("chat_template",),
                f"the chat template {text!r} is not known by name (auto and "
                f"{', '.join(TEMPLATES)} are); write its Jinja text",
            )
        return TEMPLATES.get(text)

    def place_of(self, slice_number: int | None) -> Place:
        """Where a slice is, or the models of a recipe without slices."""
        if slice_number is None:
            return ()
        places = (("slices", slice_number), ("models",), ("modules",))
        return next(place for place in places if place in self.document.lines)
