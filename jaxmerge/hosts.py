"""What processes on several hosts have to tell each other, beside computing together.

Every function must be called by all processes, in the same order. With one process they
do next to nothing.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class OtherHostError(RuntimeError):
    """Something failed in another process, which says what."""


def gather(values: Any) -> list[Any]:
    """What all processes give, in their order, in every process.

    Args:
        values: anything that JSON can say.
    """
    if jax.process_count() == 1:
        return [values]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    # Spaces after it are of no meaning in JSON, zeros are not allowed.
    texts = multihost_utils.process_allgather(np.where(padded == 0, 32, padded))
    return [json.loads(bytes(text)) for text in np.atleast_2d(texts)]


def agree(error: BaseException | None = None) -> None:
    """Waits for all processes, and raises in all of them if one has an error.

    Raises:
        OtherHostError: only other processes have one.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    failed = [i for i, ok in enumerate(gather(error is None)) if not ok]
    if error is not None:
        raise error
    if failed:
        raise OtherHostError(f"process {failed[0]} failed, and says why.")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block of code that, if it fails in one process, fails in all.

    There is none in another one: a process that failed between them would wait at the
    end of the outer one while the others wait at the inner one.
    """
    try:
        yield
    except Exception as error:
        agree(error)
    else:
        agree()
