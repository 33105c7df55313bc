"""Counts the norms, MLPs, attentions and rotary functions of transformers that are known, and so run in one pass.

`python -m benchmarks.known_layers` prints the table of docs/models.md, `--families` which families have what, and
`--unknown` the classes that are not known. Nothing is built: the code of all `modeling_*.py` is read.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import transformers

from trl_fast.modeling.fused_layers.code_meaning import meaning_of_source
from trl_fast.modeling.fused_layers.joint_projections import join_projections
from trl_fast.modeling.fused_layers.known_code import GATED_MLP, KNOWN_CLASSES, NORM
from trl_fast.modeling.fused_layers.known_rotaries import KNOWN_ROTARIES
from trl_fast.modeling.fused_layers.residual_sums import norms_after_sums
from trl_fast.modeling.fused_layers.turned_norms import norms_before_turn

ROTARY, LAYER, ATTENTION = "rotary function", "decoder layer", "normalising attention"
# With projections of the hidden states to queries, keys and values.
JOINT = "projecting attention"
_PROJECTIONS = re.compile(r"self\.(\w+) = nn\.Linear\(")
# How the names of what may be known end or, of functions, begin.
_ENDINGS = {NORM: "RMSNorm", GATED_MLP: "MLP", LAYER: "DecoderLayer", ATTENTION: "Attention"}
_BEGINNING = "apply_rotary_pos_emb"


class Place(NamedTuple):
    """Names a class or function of transformers, what kind it is of, and whether it is known."""

    kind: str
    family: str
    name: str
    is_known: bool


def places() -> Iterator[Place]:
    """Yields what is looked for in transformers' models, family by family."""
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        yield from _places_of(path.parent.name, ast.parse(path.read_text(encoding="utf-8")).body)


def _places_of(family: str, body: list[ast.stmt]) -> Iterator[Place]:
    functions = {node.name: meaning_of_source(ast.unparse(node)) for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(_BEGINNING):
            yield Place(ROTARY, family, node.name, _is_known_rotary(node.name, functions))
        elif isinstance(node, ast.ClassDef):
            methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
            kind = next((kind for kind, ending in _ENDINGS.items() if node.name.endswith(ending)), None)
            forward = methods.get("forward")
            if kind is None or forward is None:
                continue
            if kind == ATTENTION and len(linears := _linears(methods)) > 2:
                yield Place(JOINT, family, node.name, _joins(forward, linears))
            if _counts(kind, ast.unparse(forward)):
                yield Place(kind, family, node.name, _is_known(kind, methods))


def _linears(methods: dict[str, ast.FunctionDef]) -> set[str]:
    """Returns the names of the linear layers that a class makes."""
    return set(_PROJECTIONS.findall(ast.unparse(methods["__init__"]))) if "__init__" in methods else set()


def _joins(forward: ast.FunctionDef, linears: set[str]) -> bool:
    """Tells whether projections of one input are joint; a forward with a decorator is not rewritten."""
    return not forward.decorator_list and bool(join_projections(copy.deepcopy(forward), linears))


def _counts(kind: str, forward: str) -> bool:
    """Tells whether a class with such a forward is one of a kind: by its name it may be something simpler."""
    if kind == ATTENTION:
        # With norms of queries and keys, and turned by positions.
        return re.search(r"self\.(q|qk|query)_(layer)?norm\(", forward) is not None and _BEGINNING in forward
    return kind != GATED_MLP or "gate" in forward


def _is_known(kind: str, methods: dict[str, ast.FunctionDef]) -> bool:
    if kind == LAYER:
        return bool(norms_after_sums(methods["forward"]))
    if kind == ATTENTION:
        return bool(norms_before_turn(methods["forward"]))
    meanings = {name: meaning_of_source(ast.unparse(method)) for name, method in methods.items()}
    return any(
        all(meanings.get(name) == meaning_of_source(source) for name, source in known.methods.items())
        for known in KNOWN_CLASSES
        if known.kind == kind
    )


def _is_known_rotary(name: str, functions: dict[str, str]) -> bool:
    return any(
        all(functions.get(part) == meaning_of_source(source) for part, source in known.functions.items())
        for known in KNOWN_ROTARIES
        if known.name == name
    )


def table() -> str:
    """Returns how many of each kind there are and are known, as a table in Markdown."""
    found = list(places())
    lines = [f"| of transformers {transformers.__version__} | known | families |", "|---|---|---|"]
    for kind in (NORM, GATED_MLP, ROTARY, LAYER, ATTENTION, JOINT):
        of_kind = [place for place in found if place.kind == kind]
        known = [place for place in of_kind if place.is_known]
        lines.append(f"| {kind}s | {len(known)} of {len(of_kind)} | {len({place.family for place in known})} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or the names behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", action="store_true", help="print what each family has that is known")
    parser.add_argument("--unknown", action="store_true", help="print what is not known")
    arguments = parser.parse_args()
    if not (arguments.families or arguments.unknown):
        print(table())
    for place in places():
        if (arguments.unknown and not place.is_known) or (arguments.families and place.is_known):
            print(f"{place.family:28} {place.kind:16} {place.name}")


if __name__ == "__main__":
    main()
