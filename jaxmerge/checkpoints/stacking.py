"""Layers as one leaf with a leading axis, as `nn.scan` has them, and apart again."""

import re
from typing import NamedTuple

from jaxmerge.checkpoints.interface import Checkpoint, CheckpointError
from jaxmerge.checkpoints.transforms import Layer
from jaxmerge.checkpoints.views import Source, Stack, View


def stack_layers(checkpoint: Checkpoint, layers: str) -> View:
    """Views leaves of single layers as leaves that stack them.

    Args:
        checkpoint: what to view.
        layers: what layers are called, with `{}` for their number, from 0:
            "layers_{}" makes of `decoder/layers_0/mlp/kernel`, ... one leaf
            `decoder/layers/mlp/kernel` with a leading axis. Other leaves stay.

    Returns:
        The view. A stacked leaf is read layer by layer.

    Raises:
        CheckpointError: no such layers; one that lacks a leaf that others have, or has
            it in another shape.
    """
    template = _template(layers)
    found = {name: template.single.fullmatch(name) for name in checkpoint.leaves}
    counts: dict[str, int] = {}
    for match in filter(None, found.values()):
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    if not counts:
        raise CheckpointError(f"{checkpoint.path} has no layers {layers!r} to stack.")

    sources: dict[str, Source | Stack] = {}
    for name, match in found.items():
        if match is None:
            sources[name] = Source(checkpoint, name)
            continue
        before, _, after = match.groups()
        names = [
            f"{before}{layers.format(number)}{after}"
            for number in range(counts[before])
        ]
        if missing := [each for each in names if each not in checkpoint.leaves]:
            raise CheckpointError(
                f"{checkpoint.path} has {name!r} but no {missing[0]!r}, so these "
                "layers cannot be stacked; leave them apart."
            )
        sources[f"{before}{template.stacked}{after}"] = Stack(
            [Source(checkpoint, each) for each in names]
        )
    return View(checkpoint.path, sources)


def unstack_layers(checkpoint: Checkpoint, layers: str) -> View:
    """Views leaves that stack layers as leaves of single layers, undoing the stack.

    Args:
        checkpoint: what to view.
        layers: what layers are to be called, as in `stack_layers`: "layers_{}" takes
            leaves below `layers` apart, into `layers_0`, `layers_1`, ...

    Raises:
        CheckpointError: no such leaves; one without a leading axis, or with another
            number of layers than those beside it.
    """
    template = _template(layers)
    counts: dict[str, tuple[int, str]] = {}
    sources = {}
    for name, info in checkpoint.leaves.items():
        match = template.whole.fullmatch(name)
        if match is None:
            sources[name] = Source(checkpoint, name)
            continue
        count = info.shape[0] if info.shape else 0
        expected, other = counts.setdefault(match[1], (count, name))
        if count != expected or count == 0:
            raise CheckpointError(
                f"{checkpoint.path}: {name!r} of shape {list(info.shape)} stacks "
                f"{count} layers, {other!r} stacks {expected}; only leaves that stack "
                "equally many layers can be taken apart."
            )
        for number in range(count):
            single = f"{match[1]}{layers.format(number)}{match[2]}"
            sources[single] = Source(checkpoint, name, Layer(number))
    if not counts:
        raise CheckpointError(
            f"{checkpoint.path} has no leaves below {template.stacked!r} to unstack."
        )
    return View(checkpoint.path, sources)


class _Template(NamedTuple):
    """How leaves of layers are named.

    Attributes:
        stacked: what all layers together are called.
        single: matches a leaf of one layer: before, number, after.
        whole: matches a leaf of all layers: before, after.
    """

    stacked: str
    single: re.Pattern[str]
    whole: re.Pattern[str]


def _template(layers: str) -> _Template:
    found = re.fullmatch(r"([^{}]*[^{}_./])([_./])\{\}", layers)
    if found is None:
        raise CheckpointError(
            f"{layers!r} does not say where the number of a layer is; write "
            "'layers_{}', for example."
        )
    before, after = r"((?:.*[/.])?)", r"((?:[/.].*)?)"
    stacked, separator = re.escape(found[1]), re.escape(found[2])
    return _Template(
        found[1],
        re.compile(rf"{before}{stacked}{separator}(0|[1-9]\d*){after}"),
        re.compile(rf"{before}{stacked}{after}"),
    )
