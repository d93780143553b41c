"""Choosing coefficients: by sweeps, by gradient, by evolution, and greedy soups.

Every choice is made on data that the caller gives: validation data, never test data.
"""

from jaxmerge.tuning.candidates import grid, random_set
from jaxmerge.tuning.descending import Learned, adamerging, few_shot_coefficients
from jaxmerge.tuning.evolving import Evolution, evolve
from jaxmerge.tuning.soups import Soup, greedy_soup
from jaxmerge.tuning.sweeping import Sweep, sweep

__all__ = [
    "Evolution",
    "Learned",
    "Soup",
    "Sweep",
    "adamerging",
    "evolve",
    "few_shot_coefficients",
    "greedy_soup",
    "grid",
    "random_set",
    "sweep",
]
