"""Views: what leaves become when they are read, whole and in part."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from counting import Counting, Memory

from jaxmerge.checkpoints import CheckpointError, LeafInfo
from jaxmerge.checkpoints.transforms import Cast, Layer, Rearrange
from jaxmerge.checkpoints.views import Source, Stack, View


def numbers(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


SLICES = (
    *(slice(None), slice(1, 3), slice(0, 0), slice(2, 100), slice(-2, None)),
    *(slice(None, None, 2), slice(None, None, -1), slice(3, 0, -2)),
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("o i -> i o", lambda a: a.reshape(12, 5).T),
        ("(h=3 d) i -> i h d", lambda a: a.reshape(3, 4, 5).transpose(2, 0, 1)),
        ("(h=3 d=4) i -> h (d i)", lambda a: a.reshape(3, 20)),
        ("(g=2 h=3 d) i -> i (h g) d", None),
        ("o h w -> h w o", lambda a: a.reshape(3, 4, 5).transpose(1, 2, 0)),
    ],
)
def test_rearranged_parts_are_parts_of_the_rearranged(pattern, expected):
    rearrange = Rearrange.parse(pattern)
    shape = (3, 4, 5) if len(rearrange.before) == 3 else (12, 5)
    memory = Memory({"w": numbers(*shape)})
    view = View(Path("view"), {"v": Source(memory, "w", rearrange)})
    whole = view.read("v")
    assert whole.shape == view.leaves["v"].shape
    if expected is not None:
        np.testing.assert_array_equal(whole, expected(memory.arrays["w"]))
    for index in itertools.product(SLICES, repeat=whole.ndim):
        np.testing.assert_array_equal(view.read("v", index), whole[index])
    back = View(Path("back"), {"w": Source(view, "v", rearrange.inverse)})
    np.testing.assert_array_equal(back.read("w"), memory.arrays["w"], strict=True)


def test_only_what_a_part_needs_is_read():
    arrays = {"w": numbers(12, 5), "l0": numbers(4), "l1": numbers(4)}
    counting = Counting(Memory(arrays))
    view = View(
        Path("view"),
        {
            "heads": Source(counting, "w", Rearrange.parse("(h=3 d) i -> i h d")),
            "layers": Stack([Source(counting, "l0"), Source(counting, "l1")]),
            "second": Source(counting, "w", Layer(2)),
        },
    )
    for name, index, entries in [
        ("heads", (slice(0, 2), slice(1, 2)), {"w": 2 * 4}),
        ("layers", (slice(1, 2), slice(0, 3)), {"l1": 3}),
        ("second", (slice(1, 4),), {"w": 3}),
    ]:
        counting.nbytes.clear()
        view.read(name, index)
        assert counting.nbytes == {name: 4 * count for name, count in entries.items()}


def test_stacking_and_taking_layers_apart():
    memory = Memory({f"l{i}": numbers(2, 3) + i for i in range(4)})
    stack = Stack([Source(memory, name) for name in memory.arrays])
    stacked = View(Path("stacked"), {"l": stack})
    whole = np.stack(list(memory.arrays.values()))
    for index in (..., (), (slice(1, 3), slice(1, 2)), (slice(None, None, -2),)):
        np.testing.assert_array_equal(
            stacked.read("l", index), whole[index], strict=True
        )
    apart = View(
        Path("apart"), {f"l{i}": Source(stacked, "l", Layer(i)) for i in range(4)}
    )
    for name, array in memory.arrays.items():
        np.testing.assert_array_equal(apart.read(name), array, strict=True)


def test_cast():
    memory = Memory({"w": np.array([1.0, np.inf, 70000.0], np.float32)})
    half, brain = np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
    view = View(
        Path("view"),
        {"h": Source(memory, "w", Cast(half)), "b": Source(memory, "w", Cast(brain))},
    )
    assert view.leaves["h"] == LeafInfo((3,), half)
    first = (slice(0, 2),)
    assert view.read("h", first).tolist() == [1.0, np.inf]
    assert view.read("b").dtype == brain
    with pytest.raises(
        CheckpointError, match="memory: leaf 'w': an entry is too large"
    ):
        view.read("h")


def test_files_and_digests():
    one, two = (
        Memory({"a": numbers(2)}, Path("one")),
        Memory({"b": numbers(2)}, Path("two")),
    )
    alone = View(Path("v"), {"a": Source(one, "a"), "b": Source(one, "a")})
    assert alone.digest() == {"model": "00"}
    both = View(Path("v"), {"a": Source(one, "a"), "b": Source(two, "b")})
    assert both.digest() == {"one/model": "00", "two/model": "00"}
    assert both.sidecars() == [Path("one/config.json")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda m: Source(m, "x"), "memory has no leaf 'x'"),
        (lambda m: Source(m, "a", Rearrange.parse("o i -> i o")), "for 2 axes; give a"),
        (
            lambda m: Source(m, "a", Rearrange.parse("(h=3 d) -> h d")),
            "does not fit an",
        ),
        (lambda m: Source(m, "a", Rearrange.parse("(h d) -> h d")), "write h=12, for"),
        (lambda m: Source(m, "a", Layer(4)), "there is no layer 4"),
        (
            lambda m: Stack([Source(m, "a"), Source(m, "b")]),
            "'b' is float32\\[2\\], but",
        ),
    ],
)
def test_what_does_not_fit_is_refused(source, message):
    memory = Memory({"a": numbers(4), "b": numbers(2)})
    with pytest.raises(CheckpointError, match=message):
        View(Path("view"), {"v": source(memory)})


@pytest.mark.parametrize(
    "pattern",
    ["o i", "o i -> i", "o o -> o o", "a=2 -> a=3", "(a -> a", "3 -> 3", "() -> ()"],
)
def test_patterns_that_say_nothing(pattern):
    with pytest.raises(ValueError, match=r"'.*' (is not of the form|must|gives)"):
        Rearrange.parse(pattern)


def test_unknown_leaf():
    view = View(Path("view"), {"layer": Source(Memory({"a": numbers(4)}), "a")})
    with pytest.raises(CheckpointError, match="Did you mean 'layer'"):
        view.read("layers")
