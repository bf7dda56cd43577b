"""What a source becomes by rules where there is no model to say so: names, shapes and dtypes.

For file to file: a fused parameter is as large as its parts together, a stack as long as its highest
index says. That nothing is missing is proved afterwards, as for every destination.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import torch

from .errors import Finding, dtype_text
from .hints import joined
from .patterns import Mismatch, infer, parse
from .resolve import plan_error
from .rules import Rule
from .stacking import axis_size, bound_pins, unknown_size
from .templates import TemplateIndex, one_sided

__all__ = ["infer_destinations"]

Group = tuple[str, ...]


@dataclass
class _Made:
    """What the sources of one destination say of it."""

    dtypes: dict[torch.dtype, str] = field(default_factory=dict)  # and the first source of each
    plain: dict[tuple[int, ...], str] = field(default_factory=dict)  # whole shapes, the same way
    sides: list[tuple[tuple[Group, ...], dict[str, int], dict[str, int], str]] = field(
        default_factory=list
    )


def infer_destinations(
    sources: Mapping[str, Any],
    rules: Iterable[Rule] = (),
    *,
    identity: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The destinations that rules make of a source, as tensors on the meta device.

    Args:
        sources: name -> tensor, of which only shape and dtype are looked at.
        rules: as for `paramkit.plan`.
        identity: names that no rule touches are taken over.
        dtype: of every destination; None takes the sources'.

    Returns:
        name -> meta tensor, contiguous, in the order of the sources.

    Raises:
        PlanError: shapes or dtypes that contradict each other, or cannot be worked out.

    Example:
        >>> parts = {k: torch.zeros(2, 4) for k in "qkv"}
        >>> rules = [Rule(k, "qkv", "h e -> (s h) e", at={"s": i}) for i, k in enumerate("qkv")]
        >>> infer_destinations(parts, rules)["qkv"].shape
        torch.Size([6, 4])
    """
    return _Shapes(sources, list(rules), identity, dtype).run()


class _Shapes:
    def __init__(
        self,
        sources: Mapping[str, Any],
        rules: list[Rule],
        identity: bool,
        dtype: torch.dtype | None,
    ) -> None:
        self.sources, self.rules, self.identity, self.dtype = sources, rules, identity, dtype
        self.made: dict[str, _Made] = {}
        self.findings: list[Finding] = []

    def run(self) -> dict[str, torch.Tensor]:
        templates = [rule.source_template() for rule in self.rules]
        targets = [rule.target_template() for rule in self.rules]
        index = TemplateIndex([None if t and t.crosses else t for t in templates])
        crossing = [t for t in templates if t and t.crosses]
        untouched: list[str] = []
        for name, tensor in self.sources.items():
            read = dropped = False
            for k, bindings in index.match(name):
                rule, source, target = self.rules[k], templates[k], targets[k]
                if target is None:
                    dropped = dropped or rule.pattern is None
                    continue
                assert source is not None
                read = True
                self._apply(name, tensor, rule, bindings, one_sided(source, target), target, source)
            if not read and not dropped and not any(t.match(name) is not None for t in crossing):
                untouched.append(name)
        if self.identity:
            for name in [n for n in untouched if n not in self.made]:
                self._whole(name, name, self.sources[name])
        for k, rule in enumerate(self.rules):
            if rule.src is None and targets[k] is not None:
                self._filled(rule, targets[k])
        out = {name: self._tensor(name, made) for name, made in self.made.items()}
        if self.findings:
            raise plan_error(self.findings)
        return out  # type: ignore[return-value]

    def _apply(
        self, name: str, tensor: Any, rule: Rule, bindings: Any, lone: Any, target: Any, source: Any
    ) -> None:
        if rule.pattern is None:
            if rule.rows is not None:
                hint = 'rows="overlap" needs a destination that says how many rows there are'
                self.findings.append(Finding(name, "shape", str(rule), "a target", hint))
                return
            self._whole(target.format(bindings), name, tensor)
            return
        pins = bound_pins(name, rule, bindings, lone)
        if isinstance(pins, Finding):
            self.findings.append(pins)
            return
        others, shape = one_sided(target, source), tuple(tensor.shape)
        counts = []
        for placeholder in others:
            size = axis_size(placeholder, rule, shape)
            if size is None:
                self.findings.append(unknown_size(name, shape, placeholder, rule))
                return
            counts.append(size)
        if prod(counts) > max(tensor.numel(), 1):
            text = f"{shape}: {tensor.numel()} elements for {prod(counts)} names"
            expected = "at least one element for each"
            self.findings.append(Finding(name, "shape", text, expected, f"correct {rule}"))
            return
        for chosen in product(*map(range, counts)):
            extra = dict(zip(others, chosen, strict=True))
            full = target.format({**bindings, **{p: str(n) for p, n in extra.items()}})
            self._part(full, name, tensor, rule, (*rule.at, *pins, *extra.items()))

    def _whole(self, dst: str, name: str, tensor: Any) -> None:
        made = self.made.setdefault(dst, _Made())
        made.plain.setdefault(tuple(tensor.shape), name)
        made.dtypes.setdefault(tensor.dtype, name)

    def _part(self, dst: str, name: str, tensor: Any, rule: Rule, at: Any) -> None:
        assert rule.pattern is not None
        try:
            sizes, least = infer(rule.pattern, at, dict(rule.axis_sizes), tuple(tensor.shape))
        except Mismatch as error:
            hint = joined(error.hint, f"from {name} by {rule}")
            self.findings.append(Finding(dst, "shape", error.got, error.expected, hint))
            return
        made = self.made.setdefault(dst, _Made())
        made.dtypes.setdefault(tensor.dtype, name)
        made.sides.append((parse(rule.pattern).dst, sizes, least, name))

    def _filled(self, rule: Rule, target: Any) -> None:
        """A filled part may be the last one of an axis."""
        for name, made in self.made.items():
            if rule.pattern is None or target.match(name) is None:
                continue
            try:
                sizes, least = infer(rule.pattern, rule.at, dict(rule.axis_sizes), ())
            except Mismatch:
                continue  # another part says it
            # An axis that the rule takes whole is as long as the sources make it.
            least = {axis: size for axis, size in least.items() if axis in dict(rule.at)}
            made.sides.append((parse(rule.pattern).dst, sizes, least, str(rule)))
        if target.literal and target.text not in self.made:
            self.findings.append(
                Finding(
                    target.text,
                    "shape",
                    f"no source, only {rule}",
                    "a source that says its shape",
                    "name a target file that has it",
                )
            )

    def _tensor(self, name: str, made: _Made) -> torch.Tensor | None:
        shapes = dict(made.plain)
        least: dict[str, int] = {}
        for _, _, minimum, _ in made.sides:
            for axis, size in minimum.items():
                least[axis] = max(least.get(axis, 0), size)
        for side, sizes, _, source in made.sides:
            known = {**least, **sizes}
            if all(axis in known for group in side for axis in group):
                shapes.setdefault(tuple(prod(known[a] for a in group) for group in side), source)
        if len(shapes) != 1:
            texts = [f"{shape} from {source}" for shape, source in shapes.items()] or ["no shape"]
            self.findings.append(
                Finding(name, "shape", ", ".join(texts), "one shape", "correct the rules")
            )
            return None
        if self.dtype is None and len(made.dtypes) > 1:
            texts = [f"{dtype_text(d)} from {s}" for d, s in made.dtypes.items()]
            self.findings.append(
                Finding(name, "dtype", ", ".join(texts), "one dtype", "say which: dtype")
            )
            return None
        dtype = self.dtype or next(iter(made.dtypes))
        return torch.empty(next(iter(shapes)), dtype=dtype, device="meta")
