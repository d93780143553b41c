"""Recipes of mergekit, carried out by the methods and the engine of this library.

A recipe is read and checked as a whole (`reading`), and then resolved into parts that
each are a merge as any other (`resolving`). `conventions` says what mergekit's methods
and parameters are called here; where both tools mean different things:

- Arithmetic is in float32, and rounded once; mergekit computes in `dtype`.
- All of several entries that tie at a threshold are kept, and at least one entry of a
  leaf is; mergekit keeps any of them, and fails where none is left.
- Breadcrumbs of a leaf too small for one outlier keep its entries, and SCE leaves one
  that no model changed at the base; some versions of mergekit lose or reshape them.
- Of weights that cancel out the sum is not divided, opposite task vectors stay at the
  base in Model Stock, and a zero vector has no direction: no result is infinite.
- The order of models is that of the recipe, and config.json says what was written.
- Leaves that some models lack, or that differ in shape, are errors; mergekit skips
  models, or cuts. Heads of models that tie them are their embeddings, and embeddings of
  different length are cut to the rows of the base, or to those that all models have.
"""

from jaxmerge.mergekit.reading import (
    is_mergekit,
    parse_mergekit,
)
from jaxmerge.mergekit.recipe import MergekitRecipe

__all__ = ["MergekitRecipe", "is_mergekit", "parse_mergekit"]
