"""Reads what the source of a dataclass says of its fields: texts, defaults and choices. Nothing is imported.

A field's text is the string literal below the field, which editors and the API reference show too. `--help` and
`trl-fast init` read it here: importing torch and transformers for a help text would take seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trl_fast.lazy_imports import import_place

# Stands for the default of a field that has none, and for what cannot be told without running code.
UNKNOWN = object()


@dataclass(frozen=True)
class FieldDoc:
    """Describes one field of a dataclass as its source does.

    Args:
        name: the field's name.
        owner: the class whose text, default and choices these are.
        annotation: the type, as it is written.
        default: the default's value; UNKNOWN if there is none, or if only running code would tell.
        choices: the values that the field takes, if they are listed.
        text: the string literal below the field, else the `help` in its metadata. Its first paragraph is a summary.
    """

    name: str
    owner: str
    annotation: str
    default: Any
    choices: tuple[Any, ...]
    text: str

    @property
    def summary(self) -> str:
        """Returns the first paragraph of the text, in one line."""
        return " ".join(self.text.partition("\n\n")[0].split())

    @property
    def is_older_name(self) -> bool:
        """Says whether the field is there for scripts of older versions only."""
        return self.text.startswith("Older name")


def read_fields(place: str) -> dict[str, FieldDoc]:
    """Returns the fields of a dataclass by name, in the order of `dataclasses.fields`.

    place: the class's place, "module:name". Classes above it are read too, wherever they are imported from.

    Raises:
        OSError: the source of a module is not there.
        KeyError: a module has no such class.
    """
    module_name, _, name = place.partition(":")
    module = _module(module_name)
    node = module.classes[name]
    found: dict[str, FieldDoc] = {}
    for base in reversed(node.bases):
        above = module.place_of(base.id) if isinstance(base, ast.Name) else None
        found |= read_fields(above) if above else {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
            doc = _field(field, node, module)
            found[doc.name] = doc
    return found


def _field(field: ast.AnnAssign, owner: ast.ClassDef, module: _Module) -> FieldDoc:
    assert isinstance(field.target, ast.Name)
    call = field.value if isinstance(field.value, ast.Call) else None
    maker = ast.unparse(call.func) if call else None
    given = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        given |= {
            str(key.value): value
            for key, value in zip(metadata.keys, metadata.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    local = _assignments(owner.body)
    default = field.value
    if maker == "field":
        default = given.get("default")
        if default is None and "default_factory" in given:
            factory = given["default_factory"]
            default = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
    elif maker == "one_of":
        assert call is not None
        default, given["choices"] = given["default"], call.args[0]
    elif maker == "older_name":
        default, given["help"] = ast.Constant(None), ast.Constant("Older name.")
    if default is not None:
        default = local.get(default.id, default) if isinstance(default, ast.Name) else default
    choices = _value(given["choices"], module) if "choices" in given else _listed_values(field.annotation, module)
    if isinstance(choices, str):
        table, _, name = choices.partition(":")
        choices = _named_value(name, _module(table))
    text = _text_below(field, owner)
    if not text and "help" in given:
        # argparse wants a percent sign twice.
        text = str(_value(given["help"], module)).replace("%%", "%")
    return FieldDoc(
        field.target.id,
        owner.name,
        ast.unparse(field.annotation),
        UNKNOWN if default is None else _value(default, module),
        () if choices is UNKNOWN else tuple(choices),
        text,
    )


def _text_below(field: ast.AnnAssign, owner: ast.ClassDef) -> str:
    """Returns the string literal that follows a field; an empty text if there is none."""
    at = owner.body.index(field) + 1
    below = owner.body[at] if at < len(owner.body) else None
    if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
        return inspect.cleandoc(below.value.value)
    return ""


class _Module:
    """Holds the classes, the assignments and the imports at the top level of a module's source."""

    def __init__(self, name: str, source: Path) -> None:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        self.name = name
        self._package = name if source.name == "__init__.py" else name.rpartition(".")[0]
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.values = _assignments(tree.body)
        self._imports = {
            alias.asname or alias.name: f"{self._absolute(node)}:{alias.name}"
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def _absolute(self, node: ast.ImportFrom) -> str:
        package = self._package.split(".")
        above = package[: len(package) - node.level + 1] if node.level else []
        return ".".join([*above, *filter(None, [node.module])])

    def place_of(self, name: str) -> str | None:
        """Returns the place "module:name" of a name that is a class here or imported; None for other names."""
        return f"{self.name}:{name}" if name in self.classes else self._imports.get(name)


@cache
def _module(name: str) -> _Module:
    return _Module(name, _source_file(name))


def _source_file(module: str) -> Path:
    """Returns the file of a module's source: that which is running, or the one that would be imported."""
    running = getattr(sys.modules.get(module), "__file__", None)
    if running is not None:
        return Path(running)
    top, *rest = module.split(".")
    # Looking for a module inside a package would import the package.
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no source of {module}")
    path = Path(spec.origin)
    if rest:
        path = path.parent.joinpath(*rest)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path


def _assignments(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """Returns the last value of each name that statements assign; those under an `if` are taken to be run."""
    found: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.If):
            found |= _assignments(node.body)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _listed_values(annotation: ast.expr, module: _Module) -> Any:
    """Returns the values of a Literal, or of an enum that an annotation names, alone or beside str and None."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return ast.literal_eval(annotation.slice)
    for part in _parts(annotation):
        place = module.place_of(part.id) if isinstance(part, ast.Name) else None
        if place is None:
            continue
        home, _, name = place.partition(":")
        try:
            enum = _module(home).classes[name]
        except (OSError, KeyError):
            continue
        if any(ast.unparse(base).endswith("Enum") for base in enum.bases):
            return tuple(_value(node, _module(home)) for node in _assignments(enum.body).values())
    return ()


def _parts(annotation: ast.expr) -> Iterator[ast.expr]:
    """Yields the alternatives of a union."""
    if isinstance(annotation, ast.BinOp):
        yield from _parts(annotation.left)
        yield from _parts(annotation.right)
    else:
        yield annotation


def _value(node: ast.expr, module: _Module) -> Any:
    """Returns the value of a literal, a name of one, or a sequence of them; of a map its keys; UNKNOWN of the rest."""
    if isinstance(node, ast.Name):
        return _named_value(node.id, module)
    if isinstance(node, (ast.Tuple, ast.List)):
        items: list[Any] = []
        for item in node.elts:
            value = _value(item.value if isinstance(item, ast.Starred) else item, module)
            if value is UNKNOWN:
                return UNKNOWN
            items += value if isinstance(item, ast.Starred) else [value]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Dict) and node.keys:
        return tuple(_value(key, module) for key in node.keys if key is not None)
    if isinstance(node, ast.Call):
        empty: dict[str, Any] = {"list": [], "dict": {}}
        return empty.get(ast.unparse(node.func), UNKNOWN) if not node.args else UNKNOWN
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _named_value(name: str, module: _Module) -> Any:
    if name in module.values:
        return _value(module.values[name], module)
    place = module.place_of(name)
    if place is None or place.startswith(f"{module.name}:"):
        return UNKNOWN
    if place.startswith(f"{__package__}."):
        # Settings import nothing heavy, and some of their tables are computed.
        return import_place(place)
    home, _, imported = place.partition(":")
    try:
        return _named_value(imported, _module(home))
    except OSError:
        return UNKNOWN
