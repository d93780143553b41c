"""Which leaves belong to which layer of a transformer, found from their names alone.

Layers are numbered: `model.layers.3.mlp.up_proj.weight`, `transformer.h.3.ln_1.bias`.
The first number in a path is that of the layer; later ones count experts and the like.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxmerge.checkpoints import CheckpointError

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configurations call the number of layers."""

_NUMBERED = re.compile(
    r"(?P<stack>(?:[^./0-9][^./]*[./])*)(?P<number>\d+)(?P<rest>[./].+)"
)
_INPUT = re.compile(r"(.*[./])?(wte|wpe|(?!embed_out)\w*emb\w*)([./].*)?")


class Layers(NamedTuple):
    """The numbered layers of a model.

    Attributes:
        stack: what their paths start with, such as "model.layers.".
        depth: how many there are.
    """

    stack: str
    depth: int

    def split(self, name: str) -> tuple[int, str] | None:
        """The layer that a leaf is in, and the rest of its path; None outside.

        Example:
            >>> Layers("h.", 4).split("h.3.mlp.bias"), Layers("h.", 4).split("wte")
            ((3, '.mlp.bias'), None)
        """
        found = _NUMBERED.fullmatch(name)
        if found is None or found["stack"] != self.stack:
            return None
        return int(found["number"]), found["rest"]

    def name(self, number: int, rest: str) -> str:
        """The path of a leaf, as `split` takes it apart."""
        return f"{self.stack}{number}{rest}"


def find_layers(names: Iterable[str], config: Mapping[str, Any], model: str) -> Layers:
    """The numbered layers of a model.

    Args:
        names: the paths of its leaves.
        config: its config.json; the number of layers there decides between several
            stacks, such as those of a vision and of a text part.
        model: what errors call it.

    Raises:
        CheckpointError: there are no layers, or several stacks that fit.

    Example:
        >>> find_layers(["wte", "h.0.mlp.up", "h.1.mlp.up"], {"n_layer": 2}, "gpt")
        Layers(stack='h.', depth=2)
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            numbers.setdefault(found["stack"], set()).add(int(found["number"]))
    stacks = {
        stack: len(found)
        for stack, found in numbers.items()
        if found == set(range(len(found)))
    }
    if not stacks:
        raise CheckpointError(
            f"{model} has no numbered layers such as 'model.layers.0.', which slices "
            "and gradients over layers need."
        )
    expected = {
        part[key]
        for part in (config, *parts_of(config))
        for key in LAYER_KEYS
        if key in part
    }
    fitting = {s: n for s, n in stacks.items() if not expected or n in expected}
    if len(fitting) == 1:
        return Layers(*next(iter(fitting.items())))
    found_stacks = ", ".join(f"{stack!r} ({n})" for stack, n in stacks.items())
    raise CheckpointError(
        f"{model} has the numbered layers {found_stacks}, and its config.json says "
        f"{' or '.join(map(str, sorted(expected))) or 'nothing about their number'}: "
        "which of them slices and gradients over layers count is not clear. Merge "
        "with plain values and filters instead."
    )


def parts_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configurations of the parts of a model, such as `text_config`."""
    return [part for part in config.values() if isinstance(part, dict)]


def is_input(name: str) -> bool:
    """Whether a leaf outside of the layers is in front of them, by its name.

    Embeddings are; norms and heads are behind.

    Example:
        >>> is_input("model.embed_tokens.weight"), is_input("model.norm.weight")
        (True, False)
        >>> is_input("transformer.wte.weight"), is_input("gpt_neox.embed_out.weight")
        (True, False)
    """
    return _INPUT.fullmatch(name) is not None
