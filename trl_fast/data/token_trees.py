"""Holds token trees: a prompt and the branches that continue it."""

from dataclasses import dataclass

from trl_fast.settings.choices import TRUNCATION_MODES


@dataclass(frozen=True)
class Tree:
    """Holds one example: a prompt and its completions.

    `prompt_ids` are the token ids of the prompt (it may be empty); `branches` are the token ids of each completion,
    in the order in which a loss counts them (chosen, then rejected, for a preference pair).
    """

    prompt_ids: list[int]
    branches: list[list[int]]


def truncate_tree(tree: Tree, max_length: int | None, mode: str = "keep_start") -> list[Tree]:
    """Cuts every prompt + branch of `tree` to `max_length` tokens.

    `keep_start` keeps the first `max_length` tokens of prompt + branch, `keep_end` the last. With `keep_end` branches
    of different lengths keep different parts of the prompt, so the answer is a list of trees: the tree itself where
    its branches still share one prompt, else one tree a branch. Branches keep their order. `None` cuts nothing.

    Raises ValueError for an unknown mode and for a `max_length` below 1.
    """
    if mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode={mode!r} is unknown; expected one of {', '.join(TRUNCATION_MODES)}.")
    if max_length is None:
        return [tree]
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no token; expected a positive number or None.")
    if mode == "keep_start":
        room = max(max_length - len(tree.prompt_ids), 0)
        return [Tree(tree.prompt_ids[:max_length], [branch[:room] for branch in tree.branches])]
    cut = [_keep_end(tree.prompt_ids, branch, max_length) for branch in tree.branches]
    if all(part.prompt_ids == cut[0].prompt_ids for part in cut[1:]):
        return [Tree(cut[0].prompt_ids, [part.branches[0] for part in cut])] if cut else [tree]
    return cut


def _keep_end(prompt_ids: list[int], branch: list[int], max_length: int) -> Tree:
    excess = max(len(prompt_ids) + len(branch) - max_length, 0)
    return Tree(prompt_ids[excess:], [branch[max(excess - len(prompt_ids), 0) :]])
