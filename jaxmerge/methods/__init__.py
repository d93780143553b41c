"""The merge methods, one file per family.

Where implementations disagree, the docstring of a method says which option is whose
reading. Some readings are left out on purpose:

- Arithmetic in the dtype of the checkpoint (mergekit without `dtype`): float32 is exact
  where bfloat16 loses small updates.
- Trims that keep no entry of a leaf, or any of several equal ones as a sort happens to
  order them: at least one entry is kept, and all that tie with the last one.
- Breadcrumbs that lose a whole leaf because it is too small for one outlier, and DELLA
  probabilities that are NaN for rows of one entry (both mergekit).
- Rows as the last axis, whatever it means: an axis is an output because of its name or
  of a rule, so that copies of a model in several layouts merge alike.
- The trim that the authors of DARE apply after it when signs are elected.
- Leaves that are left out by name: drop them from the trees, or `take` them in a
  recipe.
"""
