"""How good models are: metrics on tasks, and tables of methods by tasks."""

from jaxmerge.evaluation.measuring import accuracy, cross_entropy, evaluate
from jaxmerge.evaluation.tables import ResultTable

__all__ = ["ResultTable", "accuracy", "cross_entropy", "evaluate"]
