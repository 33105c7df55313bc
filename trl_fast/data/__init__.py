"""Dataset formats → token trees → packed batches."""

from .packing import LAYOUTS, TokenBatch, pack_trees
from .trees import TRUNCATION_MODES, Tree, truncate_tree

__all__ = ["LAYOUTS", "TRUNCATION_MODES", "TokenBatch", "Tree", "pack_trees", "truncate_tree"]
