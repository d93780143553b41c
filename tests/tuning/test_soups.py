"""Greedy soups: scores made by hand, ties, and never worse than the best model."""

import numpy as np
import pytest

import jaxmerge


def models_of(*values):
    return [{"w": np.float32(value)} for value in values]


def test_models_that_do_harm_stay_out():
    asked = []

    def score(params):
        asked.append(float(params["w"]))
        return -abs(params["w"] - 3)

    soup = jaxmerge.greedy_soup(models_of(1, 9, 4), score)
    # Alone; then the best with the second, which stays, and with the third.
    assert asked == pytest.approx([1, 9, 4, 2.5, 14 / 3])
    assert soup.ingredients == [2, 0]
    assert soup.params["w"] == 2.5
    assert soup.score == -0.5
    assert soup.scores.tolist() == [-2, -6, -1]


def test_a_score_may_be_several_numbers_of_which_the_mean_counts():
    models = models_of(1, 9, 4)
    goals = {"a": 2.0, "b": 5.0}
    by_task = lambda params: {t: -abs(params["w"] - x) for t, x in goals.items()}  # noqa: E731
    row = lambda params: list(by_task(params).values())  # noqa: E731
    mean = lambda params: sum(row(params)) / 2  # noqa: E731
    want = jaxmerge.greedy_soup(models, mean)
    for score in (by_task, row):
        soup = jaxmerge.greedy_soup(models, score)
        assert soup.ingredients == want.ingredients
        assert soup.scores.tolist() == want.scores.tolist()


def test_equals_come_in_order_and_stay():
    soup = jaxmerge.greedy_soup(models_of(5, 6, 7), lambda params: 1.0)
    assert soup.ingredients == [0, 1, 2]
    assert soup.params["w"] == 6


def test_a_soup_that_is_worse_by_anything_stays_out():
    best = {2.0: 1.0, 3.0: 0.5, 2.5: 1.0 - 1e-12}
    soup = jaxmerge.greedy_soup(models_of(3, 2), lambda p: best[float(p["w"])])
    assert soup.ingredients == [1]
    assert soup.params["w"] == 2


def test_never_worse_than_the_best_model():
    rng = np.random.default_rng(0)
    models = [{"w": np.float32(rng.normal(size=6))} for _ in range(8)]
    score = lambda params: -float(np.square(params["w"] - 0.2).sum())  # noqa: E731
    soup = jaxmerge.greedy_soup(models, score)
    assert soup.score == score(soup.params) > soup.scores.max()
    mean = {"w": np.mean([models[i]["w"] for i in soup.ingredients], axis=0)}
    np.testing.assert_allclose(soup.params["w"], mean["w"], rtol=1e-6)


def test_useless_models_may_score_minus_infinity():
    score = lambda params: -np.inf if params["w"] > 2 else float(params["w"])  # noqa: E731
    assert jaxmerge.greedy_soup(models_of(9, 1), score).ingredients == [1]


def test_errors():
    with pytest.raises(ValueError, match="greedy_soup: needs at least one model"):
        jaxmerge.greedy_soup([], lambda params: 1.0)
    other = {"w": np.ones(2)}
    with pytest.raises(ValueError, match=r"greedy_soup: .*models\[1\] leaf 'w'"):
        jaxmerge.greedy_soup([*models_of(1), other], lambda params: 1.0)
    with pytest.raises(ValueError, match=r"score of models\[0\] is NaN"):
        jaxmerge.greedy_soup(models_of(1), lambda params: np.nan)
    with pytest.raises(ValueError, match=r"score of models \[1, 0\] together is NaN"):
        jaxmerge.greedy_soup(
            models_of(1, 2), lambda p: np.nan if p["w"] == 1.5 else float(p["w"])
        )
