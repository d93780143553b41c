"""The k-th largest of many integers, against a sort."""

import numpy as np
import pytest

from jaxmerge import selecting
from jaxmerge.selecting import kth_largest_integer

RNG = np.random.default_rng(0)


def integers(high, size=3000, dtype=np.uint32):
    return RNG.integers(0, high, size, dtype=dtype)


@pytest.mark.parametrize(
    "given",
    [
        integers(2**32),
        integers(2**16, dtype=np.uint16),
        integers(2**63, dtype=np.uint64),
        integers(3),
        np.sort(integers(50)),
        np.full(3000, 7, np.uint32),
        np.where(RNG.random(3000) < 0.01, 7, 0).astype(np.uint32),
        # A sample sees none of these: the answer is outside of where it has it.
        np.where(np.arange(3000) % 47, integers(2**15) + 1, 0).astype(np.uint32),
        np.where(np.arange(3000) % 47, integers(2**15), 2**16).astype(np.uint32),
        integers(9, size=5),
        integers(2**32).reshape(30, 10, 10),
    ],
)
def test_equals_a_sort(given, monkeypatch):
    monkeypatch.setattr(selecting, "_FEW", 64)
    monkeypatch.setattr(selecting, "_BLOCK", 1000)
    ordered, before = np.sort(given, axis=None)[::-1], given.copy()
    for k in {1, 2, 3, given.size // 2, given.size - 1, given.size}:
        found = kth_largest_integer(given, k)
        assert found == ordered[k - 1]
        assert found.dtype == given.dtype
    np.testing.assert_array_equal(given, before)


def test_most_are_looked_at_once(monkeypatch):
    sizes = []
    narrow = selecting._narrow
    monkeypatch.setattr(
        selecting, "_narrow", lambda x, k: sizes.append(x.size) or narrow(x, k)
    )
    given = integers(2**32, size=1 << 20)
    kth_largest_integer(given, given.size // 2)
    assert sizes[0] == given.size
    assert sum(sizes[1:]) < given.size / 20
