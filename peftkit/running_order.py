"""In which order a module's children run, as its forward is written.

Registration tells less: Phi-3 registers `o_proj` before `qkv_proj`, XLNet its norm before the Linears that it follows.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

from peftkit.holder import Graft, original_class


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The module's own children by name, in the order of registration; adapters are left out."""
    return [(key, m) for key, m in module._modules.items() if m is not None and type(m) is not Graft]


def in_order(module: nn.Module) -> list[nn.Module]:
    """The children with parameters in the order their last calls end, as far as the source of `forward` tells.

    Where there is no source, or it does not call each by its name, in the order of registration.
    """
    own = [(key, m) for key, m in children(module) if next(m.parameters(), None) is not None]
    if len(own) > 1 and not isinstance(module, nn.Sequential):
        place = {name: i for i, name in enumerate(_called(original_class(module), "forward"))}
        if all(key in place for key, _ in own):
            own.sort(key=lambda pair: place[pair[0]])
    return [m for _, m in own]


def by_last_mention(module: nn.Module) -> list[nn.Module]:
    """All children, in the order in which the source of `forward` speaks of them for the last time.

    A stack is mentioned, not called: `for layer in self.layers`. A child that is not mentioned stays behind the one it was
    registered after.
    """
    own = children(module)
    place = {name: i for i, name in enumerate(_mentioned(original_class(module), "forward"))}  # the last one counts
    ordered = sorted((key for key, _ in own if key in place), key=place.__getitem__)
    before = None
    for key, _ in own:
        if key not in place:
            ordered.insert(0 if before is None else ordered.index(before) + 1, key)
        before = key
    return [module._modules[key] for key in ordered]  # type: ignore[misc]


def _tree(cls: type, method: str) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, method)))))
    except (OSError, TypeError, SyntaxError, AttributeError):  # compiled, typed at a prompt, or not Python
        return None


def _of_self(node: ast.AST | None) -> str | None:
    """The name in `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


@functools.cache
def _mentioned(cls: type, method: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Every `self.name` in a method, in the order of the source; its own methods are followed."""
    tree = _tree(cls, method)
    names: list[str] = []
    everywhere = list(ast.walk(tree)) if tree is not None else []
    nodes = [n for n in everywhere if _of_self(n) is not None]
    # `self.tower.patch_size` reads a setting of what runs elsewhere
    called = {id(n.func) for n in everywhere if isinstance(n, ast.Call)}
    reads = {id(n.value) for n in everywhere if isinstance(n, ast.Attribute) and id(n) not in called}
    run = {_of_self(n) for n in nodes if id(n) not in reads}
    nodes = [n for n in nodes if id(n) not in reads or _of_self(n) not in run]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):  # type: ignore[attr-defined]
        name = _of_self(node)
        assert name is not None
        if not inspect.isfunction(getattr(cls, name, None)):
            names.append(name)
        elif name not in (method, *above):
            names.extend(_mentioned(cls, name, (method, *above)))
    return tuple(names)


@functools.cache
def _called(cls: type, method: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of what a method calls on `self`, in the order the calls are evaluated; its own methods are followed.

    `above` are the methods that lead here: one that calls itself, or its caller, is not entered again.
    """
    tree = _tree(cls, method)
    if tree is None:
        return ()
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        called = node.func if isinstance(node, ast.Call) else None
        for child in ast.iter_child_nodes(node):
            if child is not called or not isinstance(child, ast.Attribute):
                visit(child)
        name = _of_self(called)
        if name is not None:
            if not inspect.isfunction(getattr(cls, name, None)):
                names.append(name)
            elif name not in (method, *above):
                names.extend(_called(cls, name, (method, *above)))
        elif isinstance(called, ast.Attribute):
            visit(called.value)

    visit(tree)
    return tuple(names)
