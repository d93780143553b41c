"""How many bits a store takes, from the number of parameters alone."""

from typing import Literal, get_args

from jaxmerge.options import choice, whole_number

Stored = Literal["individual", "merged", "tall", "emr", "tvq", "rtvq", "bitdelta"]


def predicted_bits(
    parameters: int,
    trained: int,
    tasks: int,
    kind: Stored,
    *,
    bits: int | None = None,
    shared_bits: int = 3,
) -> int:
    r"""Predicts the bits that models take in float32, by what is stored of them.

    With $P$ parameters, of which $P'$ are trained and $F$ frozen, and $T$ tasks:
    individual models take $32 (T P' + F)$, a merged one $32 P$, TALL-masks
    $32 (2 P' + F) + T P'$ (base, multi-task vector and masks), EMR $32 T$ more, and
    task vectors of $b$ bits $32 P + b\,T P'$; RTVQ $b_0 P'$ more, for the mean in $b_0$
    bits, which is $b + b_0 / T$ bits per task. What files say about themselves comes on
    top, as do the few numbers per leaf of quantised task vectors. What low-rank task
    vectors take depends on the shapes of matrices, so `"tsv"` is not among them.

    Args:
        parameters: $P$.
        trained: $P'$, at most `parameters`.
        tasks: $T$.
        kind: `"individual"`, `"merged"`, or a kind of store.
        bits: $b$; by default that of the store, 4 for `"tvq"` and 2 for `"rtvq"`.
        shared_bits: $b_0$ of `"rtvq"`.

    Raises:
        ValueError: an unknown kind, or a number out of range.

    Example:
        >>> twenty = predicted_bits(113_448_705, 87_849_216, 20, "tall")
        >>> f"{twenty / 1e9:.2f} Gb"
        '8.20 Gb'
    """
    choice("predicted_bits", "kind", kind, get_args(Stored))
    whole_number("predicted_bits", "trained", trained, least=0)
    whole_number("predicted_bits", "tasks", tasks, least=1)
    if bits is not None:
        whole_number("predicted_bits", "bits", bits, least=1)
    whole_number("predicted_bits", "shared_bits", shared_bits, least=1)
    if parameters < trained:
        raise ValueError(
            f"predicted_bits: {trained} parameters are trained, of {parameters}; give "
            "the number of all parameters first."
        )
    frozen = parameters - trained
    masks = tasks * trained
    return {
        "individual": 32 * (tasks * trained + frozen),
        "merged": 32 * parameters,
        "tall": 32 * (2 * trained + frozen) + masks,
        "emr": 32 * (2 * trained + frozen) + masks + 32 * tasks,
        "tvq": 32 * parameters + (bits or 4) * masks,
        "rtvq": 32 * parameters + (bits or 2) * masks + shared_bits * trained,
        "bitdelta": 32 * parameters + masks,
    }[kind]
