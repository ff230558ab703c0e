"""Weights that a model uses past its linear layers: read by its code where the layer is not called, or held in modules
that are no linear layers.

An adapter acts when its layer is called. ``F.linear(x, self.fc.weight)`` in another module's forward passes it by; such
reads are found in the source, so a class without source is taken to have none.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from tokenize import TokenError
from types import CodeType, FunctionType

from torch import nn

from ..core.frozen import is_linear

Path = tuple[str, ...]  # attributes from self on, "*" for an index: self.layers[0].fc is ("layers", "*", "fc")

_VALUES = ("weight", "bias")
_LEVELS = 3  # how far above a layer its reader is looked for
# methods that set weights up, move or store them, and compute nothing from them
_SET_UP = re.compile(r"_*(init|post_init|reset|tie|set|load|save|resize|prune|extra_repr|reorder)(_.*)?(__)?$")
# what code asks a weight for without using its values
_ASKED = re.compile(
    r"dtype|device|shape|size|stride|dim|ndim|numel|nelement|element_size|layout|is_\w+|requires_grad_?|grad|get_device"
    r"|new_\w+|data_ptr|quant_\w+|ds_\w+|__class__"
)
_ASKING = re.compile(r"isinstance|hasattr|type|id|len|to|type_as|\w+_like|is_\w+")


def read_directly(model: nn.Module, layers: Iterable[str]) -> dict[str, list[str]]:
    """{"Class.method": ["child.weight", ...]}: what the code around these layers uses of them without calling them."""
    modules, found = dict(model.named_modules()), defaultdict(list)
    for name in layers:
        parts = name.split(".")
        for depth in range(1, min(len(parts), _LEVELS) + 1):
            owner = type(modules[".".join(parts[:-depth])])
            path = tuple("*" if part.isdigit() else part for part in parts[-depth:])
            for method in _methods_about(owner, path[0]):
                where = found[f"{owner.__name__}.{method.__name__}"]
                read = next((v for v in _VALUES if (*path, v) in _values_read(method)), None)
                if read and (shown := ".".join((*path, read))) not in where:
                    where.append(shown)
    return {method: reads for method, reads in found.items() if reads}


def experts(model: nn.Module) -> dict[str, list[str]]:
    """{module name: names of its weights} where a module holds stacks of weights, all experts' in one 3-D parameter."""
    found = {}
    for name, module in _own_modules(model):
        stacks = [n for n, p in module.named_parameters(recurse=False) if _is_stack(p)]
        if stacks and not isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase)):
            found[name] = stacks
    return found


def _is_stack(p: nn.Parameter) -> bool:
    return p.dim() == 3 and min(p.shape) > 1 and p.is_floating_point()


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that hold a weight matrix as a linear layer does and are none: routers, in the main."""
    return [
        name
        for name, module in _own_modules(model)
        if not is_linear(module)
        and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and "embed" not in type(module).__name__.lower()
        and (weight := module._parameters.get("weight")) is not None
        and weight.dim() == 2
        and weight.is_floating_point()
    ]


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of classes that are not torch's."""
    return ((n, m) for n, m in model.named_modules() if type(m).__module__.partition(".")[0] != "torch")


@lru_cache(maxsize=4096)
def _methods_about(kind: type, child: str) -> tuple[FunctionType, ...]:
    """The methods of a class in which a weight and this child are mentioned."""
    return tuple(f for f, names in _methods(kind) if child in names)


@lru_cache(maxsize=1024)
def _methods(kind: type) -> tuple[tuple[FunctionType, frozenset[str]], ...]:
    """(method, names in it) of a class outside torch, for those that mention a weight or a bias."""
    found, overridden = [], set()
    for base in kind.__mro__:
        if base is object or base.__module__.partition(".")[0] == "torch":
            continue
        for name, value in vars(base).items():
            function = _function(value)
            if function is None or name in overridden or _SET_UP.match(name):
                continue
            names = frozenset(_names(function.__code__))
            if "super" not in names:
                overridden.add(name)
            if names.intersection(_VALUES):
                found.append((function, names))
    return tuple(found)


def _function(value) -> FunctionType | None:
    """The function behind a class attribute: below decorators, or a property's getter."""
    if isinstance(value, (property, cached_property)):
        value = value.fget if isinstance(value, property) else value.func
    value = inspect.unwrap(value) if callable(value) else value
    return value if inspect.isfunction(value) else None


def _names(code: CodeType) -> Iterator[str]:
    """The names and strings of a function and of those inside it."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, str):
            yield const
        elif isinstance(const, CodeType):
            yield from _names(const)


@lru_cache(maxsize=4096)
def _values_read(function: FunctionType) -> frozenset[Path]:
    """The paths from self that end in weight or bias and whose values the function uses."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse(f"if 1:\n{source}" if source[0].isspace() else source)
    except (
        OSError,
        TypeError,
        ValueError,
        SyntaxError,
        TokenError,
    ):  # no source, or a part (a lambda in an expression)
        return frozenset()
    own = function.__code__.co_varnames[:1]
    return _Reads(own[0] if own else "self").of(tree)


class _Reads:
    """One function's reads: names stand for the paths that were assigned to them anywhere in it."""

    def __init__(self, own: str):
        self.aliases: dict[str, set[Path]] = defaultdict(set, {own: {()}})

    def of(self, tree: ast.AST) -> frozenset[Path]:
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            for target, value in _bindings(node):
                self.aliases[target] |= self.paths(value)
        return frozenset(
            path
            for node in parents
            if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
            for path in self.paths(node)
            if len(path) > 1 and path[-1] in _VALUES and _uses_value(node, parents)
        )

    def paths(self, node: ast.AST) -> set[Path]:
        """The paths from self that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return self._below(node.value, node.attr)
        if isinstance(node, ast.Subscript):
            key = getattr(node.slice, "value", None)
            return self._below(node.value, key if isinstance(key, str) else "*")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            return self._below(node.args[0], getattr(node.args[1], "value", "*"))
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        return self.paths(node.value) if isinstance(node, ast.NamedExpr) else set()

    def _below(self, node: ast.AST, name: str) -> set[Path]:
        paths = self.paths(node)
        if name == "data":  # the same values
            return paths
        return {(*path, name) for path in paths if path[-1:] not in {("weight",), ("bias",)}}


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, what it stands for) of an assignment or a loop; an element of a sequence counts as self.seq[i]."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _pairs(target, node.value)
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield from _pairs(node.target, node.value)
    elif isinstance(node, (ast.For, ast.comprehension)):
        yield from _pairs(node.target, ast.Subscript(node.iter, ast.Constant(0), ast.Load()))


def _pairs(target: ast.AST, value: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for t, v in zip(target.elts, value.elts, strict=True):
            yield from _pairs(t, v)


def _uses_value(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the code uses the values of the tensor that a node stands for, not its shape, type or presence."""
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.Tuple) and isinstance(parents[parent], ast.Assign):
        return not isinstance(parents[parent].targets[0], ast.Tuple)  # else it has a name now, whose uses count
    if isinstance(parent, ast.Attribute):  # .data is the same tensor, and looked at itself
        return parent.attr != "data" and not _ASKED.fullmatch(parent.attr)
    if isinstance(parent, ast.Compare):
        return not all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    if isinstance(parent, ast.Call) and node is not parent.func:
        name = getattr(parent.func, "attr", getattr(parent.func, "id", ""))
        return name != "getattr" and not _ASKING.fullmatch(name)
    if isinstance(parent, (ast.Assign, ast.AnnAssign)):
        targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
        return not all(isinstance(t, ast.Name) for t in targets)
    return not isinstance(parent, (ast.IfExp, ast.NamedExpr, ast.If, ast.While, ast.Assert, ast.Expr, ast.UnaryOp))
