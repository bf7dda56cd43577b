"""Where Python refuses something: `raise`, and findings that become an error later.

Each such statement is made to ask first whether it is still there:

    raise ValueError(text)      ->  if keep("resolve.py:3"): raise ValueError(text)
    return Finding(name, ...)   ->  if keep("resolve.py:4"): return Finding(name, ...) ... return None
    findings.append(Finding())  ->  if keep("resolve.py:5"): findings.append(Finding())
    findings = [Finding(), ...] ->  ... if findings: if keep("resolve.py:6"): pass else: findings = []
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

__all__ = ["Site", "rewrite"]

# Calls that record what is wrong, for one error in the end.
RECORDERS = {"Finding", "_add", "_fail", "expanded_finding"}


@dataclass(frozen=True)
class Site:
    """One check: its key in this run, and what a reader finds it by."""

    key: str
    file: str
    function: str
    check: str


def _records(node: ast.AST) -> bool:
    """Whether a statement records a finding itself, not in a statement within it."""
    for child in ast.walk(node):
        if isinstance(child, ast.Call):
            called = child.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            # Without a finding, `_fail` only notes that there is one.
            if name in RECORDERS and (name != "_fail" or len(child.args) > 1):
                return True
    return False


def _empty(value: ast.expr | None) -> ast.expr:
    """What a function that found nothing returns in place of its findings."""
    is_list = isinstance(value, (ast.List, ast.ListComp))
    return ast.List([], ast.Load()) if is_list else ast.Constant(None)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, file: str) -> None:
        self.file = file
        self.sites: list[Site] = []
        self._names: list[str] = []

    def _in(self, node: ast.AST, name: str) -> ast.AST:
        self._names.append(name)
        self.generic_visit(node)
        self._names.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._in(node, node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._in(node, node.name)

    def _guarded(self, node: ast.stmt, otherwise: list[ast.stmt]) -> ast.stmt:
        key = f"{self.file}:{len(self.sites)}"
        text = " ".join(ast.unparse(node).split())
        self.sites.append(Site(key, self.file, ".".join(self._names), text[:100]))
        kept = ast.Call(ast.Name("_keep_check", ast.Load()), [ast.Constant(key)], [])
        return ast.copy_location(ast.If(kept, [node], otherwise), node)

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        if node.exc is None or isinstance(node.exc, ast.Name) or not self._names:
            return node  # raised again: whoever raised it first is the check
        return self._guarded(node, [])

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        if node.value is None or not self._names or not _records(node.value):
            return node
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") not in RECORDERS:
            return node
        return self._guarded(node, [ast.Return(_empty(node.value))])

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return self._guarded(node, []) if self._names and _records(node) else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | list[ast.stmt]:
        """Of a list that may be empty the question is asked only where it is not."""
        if not self._names or not _records(node.value):
            return node
        found = ast.Name("_found", ast.Load())
        before = ast.Assign([ast.Name("_found", ast.Store())], node.value)
        guarded = self._guarded(node, [])
        node.value = found
        return [ast.copy_location(before, node), _if_any(found, guarded)]

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.stmt]:
        if not self._names or not _records(node.value) or len(node.targets) != 1:
            return node
        target = node.targets[0]
        emptied = ast.Assign([target], _empty(node.value))
        guarded = self._guarded(node, [])
        assert isinstance(guarded, ast.If)
        guarded.body, guarded.orelse = [ast.Pass()], [emptied]
        found = ast.parse(ast.unparse(target), mode="eval").body
        return [node, _if_any(found, guarded)]


def _if_any(found: ast.expr, guarded: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.If(found, [guarded], []), guarded)


def rewrite(file: str, source: str) -> tuple[str, list[Site]]:
    """The source with every check behind a question, and the checks."""
    tree = ast.parse(source)
    rewriter = _Rewriter(file)
    tree = rewriter.visit(tree)
    first = 0
    while first < len(tree.body) and (
        (isinstance(tree.body[first], ast.Expr) and first == 0)
        or (
            isinstance(tree.body[first], ast.ImportFrom) and tree.body[first].module == "__future__"
        )
    ):
        first += 1
    asked = ast.ImportFrom("paramkit._kept", [ast.alias("keep", "_keep_check")], 0)
    tree.body.insert(first, asked)
    return ast.unparse(ast.fix_missing_locations(tree)), rewriter.sites
