"""Files import from those above them alone, and private names of torch stay in one file."""

import ast
from functools import cache
from pathlib import Path

import pytest

import pyro_sinflow

PACKAGE = Path(pyro_sinflow.__file__).parent
ORDER = [
    *("_torch", "_validate", "arrays", "sinusoid", "solvers"),
    *("kernels.eager", "kernels.triton", "kernels", "kernels.substitution"),
    *("masks", "networks", "pixelcnn", "sequential", "bijection", "autoregressive", "nilpotent"),
    *("implicit", "element_wise", "linear", "transforms", "lazy", "block", "modules", "flows"),
    *("fast", "laplace", "guides", "sbi"),
]


def files():
    """The files by the name of their module."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(folders if name == "__init__" else [*folders, name])] = path
    for name in ("", "_version", "conftest"):  # what collects names, and what holds no code
        del found[name]
    return found


FILES = files()


@cache
def nodes(name):
    return [*ast.walk(ast.parse(FILES[name].read_text()))]


def imported(name):
    """The modules of the package that a module imports from, inside of functions too."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes(name):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyro_sinflow":
                    yield alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = package.split(".") if package else []
                base = parts[: len(parts) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            elif module.split(".")[0] == "pyro_sinflow":
                module = module.partition(".")[2]
            else:
                continue
            # 'from .kernels import chain' imports a module, and 'from .kernels import run' a name.
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                yield inner if inner in FILES else module


def test_every_file_has_a_place_in_the_order():
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_come_from_files_above(name):
    above = ORDER[: ORDER.index(name)]
    below = [module for module in imported(name) if module not in above]
    assert below == []


def test_some_imports_are_found():
    assert {"_torch", "arrays", "solvers", "kernels.eager"} <= {*imported("kernels")}


def names(node):
    """The names that a node reads or imports from something else: of attributes and of modules."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        return [c.value for c in node.args[1:2] if isinstance(c, ast.Constant)]
    return []


def defined(node):
    """The names that a node defines: of functions, classes and attributes of self."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr] if getattr(node.value, "id", "") == "self" else []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return []


NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
TRANSFORM = {"_cache_size"}  # what subclasses of torch's Transform use
# What subclasses of Pyro's AutoContinuous use.
AUTO_CONTINUOUS = {"_init_loc", "_pyro_get_fullname", "_setup_prototype", "_unpack_latent"}


@cache
def own():
    """The names that the package defines."""
    return (
        NAMED_TUPLE
        | TRANSFORM
        | AUTO_CONTINUOUS
        | {n for name in FILES for node in nodes(name) for n in defined(node)}
    )


def private(name):
    """Names with a leading underscore, other than those that the package defines itself."""
    for node in nodes(name):
        for n in names(node):
            if n.startswith("_") and not n.startswith("__") and n not in own():
                yield n


@pytest.mark.parametrize("name", [name for name in FILES if name != "_torch"])
def test_private_names_of_torch_are_not_used(name):
    assert [*private(name)] == []


def test_private_names_are_found():
    assert {"_C", "_version", "_forward_hooks", "_subclasses"} <= {*private("_torch")}
