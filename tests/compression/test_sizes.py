"""The storage arithmetic of the TALL-masks paper: ViT-B/32 and its kin."""

import pytest

from jaxmerge.compression import predicted_bits

B32 = (113_448_705, 87_849_216)
B16 = (111_792_129, 86_192_640)
L14 = (342_562_049, 303_966_208)


@pytest.mark.parametrize(
    ("model", "tasks", "individual", "tall"),
    [
        (B32, 8, 23.31, 7.14),
        (B32, 14, 40.18, 7.67),
        (B32, 20, 57.04, 8.20),
        (B16, 8, 22.88, 7.03),
        (B16, 14, 39.43, 7.54),
        (B16, 20, 55.98, 8.06),
        (L14, 8, 79.1, 23.1),
        (L14, 14, 137.4, 24.9),
        (L14, 20, 195.8, 26.8),
    ],
)
def test_gigabits_of_vision_transformers(model, tasks, individual, tall):
    digits = 1 if model is L14 else 2
    assert (
        round(predicted_bits(*model, tasks, "individual") / 1e9, digits) == individual
    )
    assert round(predicted_bits(*model, tasks, "tall") / 1e9, digits) == tall


def test_twenty_tasks_to_the_bit():
    trained, frozen = 87_849_216, 25_599_489
    assert predicted_bits(*B32, 20, "individual") == 32 * (20 * trained + frozen)
    assert (
        predicted_bits(*B32, 20, "tall") == 32 * (2 * trained + frozen) + 20 * trained
    )
    assert predicted_bits(*B32, 20, "emr") == predicted_bits(*B32, 20, "tall") + 640
    assert round(predicted_bits(*B32, 20, "merged") / 1e9, 2) == 3.63


def test_a_store_pays_from_three_tasks_on():
    for tasks, pays in ((2, False), (3, True)):
        apart = predicted_bits(100, 100, tasks, "individual")
        assert (predicted_bits(100, 100, tasks, "tall") < apart) == pays


def test_quantised_task_vectors():
    assert predicted_bits(10, 8, 3, "bitdelta") == 320 + 24
    assert predicted_bits(10, 8, 3, "tvq", bits=2) == 320 + 48
    assert predicted_bits(10, 8, 3, "tvq") == 320 + 96


@pytest.mark.parametrize(("tasks", "per_task"), [(8, 2.375), (20, 2.15)])
def test_residual_quantisation_with_three_and_two_bits(tasks, per_task):
    trained = B32[1]
    bits = predicted_bits(*B32, tasks, "rtvq") - predicted_bits(*B32, tasks, "merged")
    assert bits == per_task * tasks * trained
    same = predicted_bits(*B32, tasks, "rtvq", bits=2, shared_bits=3)
    assert same == predicted_bits(*B32, tasks, "rtvq")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 1, "tall"), "11 parameters are trained, of 10"),
        ((10, 10, 0, "tall"), "tasks is 0"),
        ((10, 10, 1, "tsv"), "kind is 'tsv'"),
    ],
)
def test_what_cannot_be_predicted(arguments, message):
    with pytest.raises(ValueError, match=message):
        predicted_bits(*arguments)
