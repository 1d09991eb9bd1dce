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


@functools.cache
def _called(cls: type, method: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of what a method calls on `self`, in the order the calls are evaluated; its own methods are followed.

    `above` are the methods that lead here: one that calls itself, or its caller, is not entered again.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, method))))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):  # compiled, typed at a prompt, or not Python
        return ()
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        called = node.func if isinstance(node, ast.Call) else None
        for child in ast.iter_child_nodes(node):
            if child is not called or not isinstance(child, ast.Attribute):
                visit(child)
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            name = called.attr
            if not inspect.isfunction(getattr(cls, name, None)):
                names.append(name)
            elif name not in (method, *above):
                names.extend(_called(cls, name, (method, *above)))
        elif isinstance(called, ast.Attribute):
            visit(called.value)

    visit(tree)
    return tuple(names)
