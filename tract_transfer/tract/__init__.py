"""TrAct: the first layer's gradient, taken on its pre-activations."""

from tract_transfer.tract.find import find_first_layers
from tract_transfer.tract.gram import gram_matrix
from tract_transfer.tract.update import TrAct

__all__ = ["TrAct", "find_first_layers", "gram_matrix"]
