"""A docstring's first line is a verb phrase: it says what the thing does, in the field's words."""

from __future__ import annotations

import ast
import functools
import re

from support.source_tree import PACKAGE_FOLDERS, Source, hold, sources

FOLDERS = (*PACKAGE_FOLDERS, "benchmarks", "examples", ".")
# "Returns the ...", "Computes ...", "Holds ...": a verb in the third person.
VERB = re.compile(r"(?:(?:Also|Lazily|Only) [a-z]+s|[A-Z][a-z]*(?:-[a-z]+)*s)\b")
# Nouns that end as such verbs do.
NOUNS = re.compile(
    r"(?:Activations|Advantages|Arguments|As|Batches|Bars|Bytes|Callbacks|Coefficients|Columns|Completions"
    r"|Configurations|Constants|Contenders|Conversations|Cross-entropy|Datasets|Edges|Entries|Errors"
    r"|Examples|Facts|Findings|Flags|Formulas|Functions|Gradients|Headers|Hooks|Ids|Its|Kernels|Keys"
    r"|Keywords|Labels|Layers|Lengths|Lines|Loaders|Log-probabilities|Log-probs|Logits|Loss|Losses"
    r"|Messages|Metrics|Micro-batches|Milliseconds|Models|Numbers|Opcodes|Operations|Ops|Ours|Paragraphs"
    r"|Parameters|Points|Programs|Prompts|Queries|Ranges|Rates|Responses|Rewards|Rollouts|Rows|Scripts"
    r"|Seconds|Segments|Sequences|Settings|Setups|Sizes|Statistics|Steps|Streams|Tensors|Tests|This|Tokens"
    r"|Trees|Us|Values|Weights|Words)\b"
)
# Nouns and verbs: nouns where such a word follows.
EITHER = re.compile(
    r"(?:Answers|Checks|Copies|Counts|Estimates|Hashes|Lists|Means|Names|Pairs|Races|Results|Samples|Scores|Shapes|"
    r"Splits|States|Sums|Tiles|Times|Waits)(?:[,:]| \(| (?:and|between|of|over|per|which|with|whose)\b)"
)
# "(N, V)", "[N]", "(N,)", "a scalar", "of any shape".
SHAPE = re.compile(r"[(\[][\w .*+/×·−-]*,[\w .,*+/×·…−-]*[)\]]|[(\[][A-Z][)\]]|\bscalars?\b|\bshape")


def is_verb_phrase(docstring: str) -> bool:
    """Says whether a docstring begins with a verb in the third person."""
    line = docstring.strip().splitlines()[0]
    return bool(VERB.match(line)) and not NOUNS.match(line) and not EITHER.match(line)


@functools.cache
def docstrings(source: Source) -> dict[str, str]:
    """Returns the docstrings of a file's module, classes and functions by their names."""
    found = {"module": ast.get_docstring(source.tree)}
    found |= {name: ast.get_docstring(node) for name, node, _ in source.definitions()}
    return {name: text for name, text in found.items() if text}


def is_public(name: str) -> bool:
    """Says whether no part of a dotted name begins with an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


def takes_tensors(node: ast.AST) -> bool:
    """Says whether a function's annotations name tensors among its arguments."""
    if not isinstance(node, ast.FunctionDef):
        return False
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
    texts = [ast.unparse(a.annotation) for a in arguments if a is not None and a.annotation is not None]
    return any(re.search(r"\bTensor\b", text) for text in texts)


def test_first_lines_are_verb_phrases():
    found = {}
    for source in sources(*FOLDERS):
        lines = [f"{name}: {text}" for name, text in docstrings(source).items() if not is_verb_phrase(text)]
        found |= {source.path: "\n    ".join(line.partition("\n")[0] for line in lines)} if lines else {}
    hold("first_line", set(found), found)


def test_no_docstring_begins_with_what():
    found = {s.path for s in sources(*FOLDERS, "tests") for text in docstrings(s).values() if text.startswith("What ")}
    hold("what", found)


def test_what_is_public_has_a_docstring():
    """Methods only where they override nothing, which the syntax does not tell: they are not asked for one."""
    found = set()
    for source in sources(*PACKAGE_FOLDERS):
        texts = docstrings(source)
        names = ["module", *(name for name, _, parent in source.definitions() if parent is None and is_public(name))]
        found |= {f"{source.path} {name}" for name in names if name not in texts}
    hold("docstring", found)


def test_public_functions_of_tensors_say_their_shapes():
    found = set()
    for source in sources(*PACKAGE_FOLDERS):
        texts = docstrings(source)
        for name, node, parent in source.definitions():
            public = is_public(name) and not isinstance(parent, ast.FunctionDef)
            if public and takes_tensors(node) and not SHAPE.search(texts.get(name, "")):
                found.add(f"{source.path} {name}")
    hold("shapes", found)


def unknown_arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Returns what a docstring's list of arguments names and the function does not take; "low, high: …" names two."""
    _, _, listed = (ast.get_docstring(node) or "").partition("Args:\n")
    lines = re.findall(r"^    ([\w*, ]+?)(?: \([^)]*\))?: ", re.split(r"^\S", listed, maxsplit=1, flags=re.M)[0], re.M)
    taken = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
    return {name.lstrip("*") for line in lines for name in line.split(", ")} - taken


def test_what_a_docstring_describes_is_an_argument():
    found = set()
    for source in sources(*PACKAGE_FOLDERS):
        functions = [entry[:2] for entry in source.definitions() if not isinstance(entry[1], ast.ClassDef)]
        found |= {f"{source.path} {name}: {word}" for name, node in functions for word in unknown_arguments(node)}
    hold("arguments", found)
    text = "Adds.\n\n    Args:\n        low, high: bounds.\n        *rest (int): more.\n    "
    (node,) = ast.parse(f'def add(low, *rest):\n    """{text}"""').body
    assert unknown_arguments(node) == {"high"}
