"""Which of many models to average: those that help.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022, arXiv:2203.05482.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.leafwise import ABSENT, check_models
from jaxmerge.methods.averaging import average
from jaxmerge.tree import Params
from jaxmerge.tuning.scoring import Score, mean_score


class Soup(NamedTuple):
    """A greedy soup.

    Attributes:
        params: the average of its ingredients.
        ingredients: the numbers of the models in it, in the order in which they came.
        score: of the soup; the mean, if a score is several numbers.
        scores: so of every model alone, (models,), in float64.
    """

    params: Params
    ingredients: list[int]
    score: float
    scores: np.ndarray


def greedy_soup(models: Sequence[Params], score: Score) -> Soup:
    """Averages models one after the other, as long as that does no harm (Algorithm 1).

    The models come in the order of their scores, the best first and of equals the
    earlier one. A model stays in the soup if the score with it is at least that of the
    soup without it, so that equals stay, as in the paper (its code wants a better one).
    The soup is never worse than the best model on the data of `score`.

    Args:
        models: one or more pytrees of arrays with the same structure and shapes: the
            same task from one start, with different settings or seeds, say.
        score: `score(params)`, a number, or several of which the mean counts, as in
            `sweep`; on validation data, higher is better. It gets concrete parameters,
            so that it may be any function.

    Returns:
        The soup, and what went into it. 2 * models - 1 calls of `score`.

    Raises:
        ValueError: no models, trees that are not alike, or a score that is NaN or no
            number.

    Example:
        >>> models = [{"w": np.float32(x)} for x in (1.0, 9.0, 4.0)]
        >>> soup = greedy_soup(models, lambda params: -abs(params["w"] - 3))
        >>> soup.ingredients, soup.params["w"].item()
        ([2, 0], 2.5)
    """
    check_models("greedy_soup", ABSENT, models)

    def scored(params: Params, what: str) -> float:
        value = mean_score("greedy_soup", score(params))
        if np.isnan(value):
            raise ValueError(
                f"greedy_soup: the score of {what} is NaN; give a number for every "
                "model, -inf for useless ones."
            )
        return value

    scores = np.array([scored(m, f"models[{i}]") for i, m in enumerate(models)])
    first, *others = map(int, np.argsort(-scores, kind="stable"))
    ingredients, soup, best = [first], average([models[first]]), scores[first]
    for i in others:
        tried = average([models[j] for j in [*ingredients, i]])
        value = scored(tried, f"models {[*ingredients, i]} together")
        if value >= best:
            ingredients, soup, best = [*ingredients, i], tried, value
    return Soup(soup, ingredients, float(best), scores)
