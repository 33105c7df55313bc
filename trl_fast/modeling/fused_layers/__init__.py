"""Lets a model's norms, gated MLPs, rotary embeddings and what is made of them run in one pass each; see ops/layers.

What they compute is told by their code: the forward of a module's class has to be one that known_code.py has, whatever
its variables are called. Each class is tried on a few numbers first, results and gradients. A module gets a class of
its own, and the function that turns queries and keys is exchanged in its module of transformers, which all models of
the family share; all is undone by `changes_of(model).undo("fused layers")`. What a call brings that the kernels do not
take, such as numbers of two dtypes, runs as before.
"""

from .attach import FUSED_LAYERS, fuse_layers, restore_layers

__all__ = ["FUSED_LAYERS", "fuse_layers", "restore_layers"]
