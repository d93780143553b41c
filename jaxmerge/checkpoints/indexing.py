"""Which entries an index selects: what readers need that push slices further down."""

from collections.abc import Sequence

from jaxmerge.checkpoints.interface import Index


def ranges(index: Index, shape: Sequence[int]) -> list[range]:
    """The entries along each axis that an index selects.

    Example:
        >>> ranges((slice(1, 9),), (4, 3))
        [range(1, 4), range(0, 3)]
    """
    slices = () if index is ... else index
    slices = (*slices, *[slice(None)] * (len(shape) - len(slices)))
    return [range(size)[part] for size, part in zip(shape, slices, strict=True)]


def shifted(along: range, offset: int) -> slice:
    """Selects `along`, which is not empty, from an axis whose first entry is `offset`.

    Example:
        >>> list(range(10, 20)[shifted(range(13, 9, -2), 10)])
        [13, 11]
    """
    stop = along.stop - offset
    # Backwards to the first entry there is no number to stop at.
    return slice(along.start - offset, None if stop < 0 else stop, along.step)
