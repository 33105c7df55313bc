"""Imports point one way: from the roof of the house down to its kernels."""

from __future__ import annotations

import sys

from support.source_tree import PACKAGE_FOLDERS, hold, layer_of, sources

# The roof may import everything.
ROOF = ["_C", "trl_fast", "rewards", "kernels", "ops", "parallel", "losses", "data", "modeling", "rollout"]
ROOF += ["trainers", "planning", "dropin", "cli"]
# A layer, and the layers it may import: rows stand from the bottom of the house to its top.
MAY_IMPORT = {
    "settings": ["lazy_imports"],
    "kernels": [],
    "ops": ["_C", "kernels"],
    "parallel": [],
    "losses": ["ops"],
    "data": ["parallel"],
    "modeling": ["ops", "parallel", "data"],
    "rollout": ["parallel", "data", "modeling"],
    "trainers": ["ops", "parallel", "losses", "data", "modeling", "rollout"],
    "planning": ["ops", "parallel", "losses", "data", "modeling", "rollout", "trainers"],
    "dropin": ROOF,
    "cli": ROOF,
}
# Modules beside the layers: every layer but the kernels may import them, and they import no layer.
SHARED = ["build_record", "console", "input_errors", "lazy_imports", "settings"]
# Modules for the users of the package: they import no layer either.
FOR_USERS = ["rewards"]
# Packages of others that a layer may import; the other layers import what pyproject.toml declares.
OUTSIDE = {"kernels": {"torch", "triton"}, "ops": {"torch", "triton"}, "losses": {"torch"}}


def test_every_package_and_module_has_a_layer():
    layers = {source.layer for source in sources(*PACKAGE_FOLDERS)}
    assert layers == {*MAY_IMPORT, *SHARED, *FOR_USERS, "trl_fast"}


def test_layers_import_only_what_stands_below_them():
    found = set()
    for source in sources(*PACKAGE_FOLDERS):
        if source.layer == "trl_fast":  # its __init__ names what users may import from everywhere
            continue
        allowed = [source.layer, *MAY_IMPORT.get(source.layer, [])]
        allowed += SHARED if source.layer not in (*SHARED, *FOR_USERS, "kernels") else []
        ours = {name for name in source.imports() if name.partition(".")[0] == "trl_fast"}
        found |= {f"{source.path} imports {layer_of(name)}" for name in ours if layer_of(name) not in allowed}
    hold("layer", found)


def test_the_lower_layers_need_little_from_outside():
    found = set()
    for source in sources(*PACKAGE_FOLDERS):
        names = {name.partition(".")[0] for name in source.imports()} - sys.stdlib_module_names - {"trl_fast"}
        found |= {f"{source.path} imports {name}" for name in names - OUTSIDE.get(source.layer, names)}
    hold("outside", found)


def test_modules_do_not_import_in_circles():
    """Also where an import stands in a function: it would only hide the circle."""
    modules = {source.module for source in sources(*PACKAGE_FOLDERS)}
    graph = {
        source.module: {name if name in modules else name.rpartition(".")[0] for name in source.imports()} & modules
        for source in sources(*PACKAGE_FOLDERS)
        if source.layer != "trl_fast"
    }
    graph = {module: targets - {module, "trl_fast"} for module, targets in graph.items()}
    while True:
        imported = set().union(*graph.values())
        inside = {module for module, targets in graph.items() if targets & graph.keys() and module in imported}
        if len(inside) == len(graph):
            break
        graph = {module: targets & inside for module, targets in graph.items() if module in inside}
    hold("circle", set(graph))
