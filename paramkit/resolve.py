"""Resolving: from a model, a source and rules to the complete, checked set of writes.

No data is touched and no tensor is created: only names, shapes, strides and addresses are read. All
that is wrong is collected and raised together. Costs are linear in the number of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations, product
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from .destinations import Destination, destinations_of, layout_finding, memory_key
from .errors import Finding, PlanError, Suggester
from .patterns import Mismatch, parse
from .patterns import compile as compile_pattern
from .rules import Bindings, NameFilter, Rule, RuleIndex, Template, bound_index, one_sided
from .sources import open_source

__all__ = ["Resolved", "Write", "resolve"]

Strided = tuple[tuple[int, ...], int]  # strides and offset
Layout = tuple[tuple[int, ...], Strided, Strided]  # sizes, destination, source


@dataclass(frozen=True, slots=True)
class Write:
    """One write: a view of a destination from a view of a source, of the same sizes.

    Attributes:
        dst: index into `Resolved.destinations`.
        src: index into `Resolved.source_names` and `Resolved.source_tensors`.
        sizes: sizes of both views.
        dst_strides, dst_offset: in elements, relative to the destination's `data_ptr()`.
        src_strides, src_offset: in elements, relative to the source's `data_ptr()`.
        text: the rule's pattern and pins, "" for a whole tensor.
    """

    dst: int
    src: int
    sizes: tuple[int, ...]
    dst_strides: tuple[int, ...]
    dst_offset: int
    src_strides: tuple[int, ...]
    src_offset: int
    text: str = ""


@dataclass
class Resolved:
    """Everything that a plan writes, and everything that it leaves alone on purpose.

    Attributes:
        destinations: all tensors of the model, aliases collapsed.
        source_names, source_tensors: the source's tensors that some write reads.
        writes: the writes, in the order of the source.
        kept: destination names that nothing writes, allowed by `allow_missing`.
        dropped: source names that nothing reads, dropped by a rule or by `allow_unexpected`.
        partial: destination names written only in part, allowed by `allow_missing`.
    """

    destinations: list[Destination] = field(default_factory=list)
    source_names: list[str] = field(default_factory=list)
    source_tensors: list[Tensor] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)


def resolve(
    model: nn.Module | Mapping[str, Tensor],
    source: object,
    rules: Iterable[Rule] = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Resolved:
    """Work out every write of a transplant and check all of it.

    Args:
        model: a module (its parameters and persistent buffers) or a mapping from names to tensors.
        source: whatever `open_source` takes.
        rules: how source names and axes map to destination names and axes.
        identity: names that no rule touches map to themselves.
        allow_missing: destination names that may stay unwritten; exact, with `{i}`, or with `*`.
        allow_unexpected: source names that may stay unread; the same.

    Returns:
        The writes. Every destination is covered, but for the allowed ones; that no two writes overlap
        is checked for equal regions only, and proved later, from addresses.

    Raises:
        PlanError: with every problem in the names, rules, shapes and layouts.
        SourceError: the source cannot be read.
        TypeError: an argument of the wrong type.

    Example:
        >>> import torch
        >>> fused = torch.nn.MultiheadAttention(4, 1, bias=False)
        >>> source = {n: torch.ones(4, 4) for n in ("q", "k", "v", "out_proj.weight")}
        >>> rules = [Rule(n, "in_proj_weight", "h e -> (s h) e", at={"s": k}) for k, n in enumerate("qkv")]
        >>> [w.dst_offset for w in resolve(fused, source, rules).writes]
        [0, 16, 32, 0]
    """
    return _Resolver(model, source, rules, identity, allow_missing, allow_unexpected).run()


# ---- resolving -----------------------------------------------------------------------------------


class _Job(NamedTuple):
    """One rule applied to one pair of names; rule -1 is the identity."""

    src: int
    dst: int
    rule: int
    dst_name: str
    pins: tuple[tuple[str, int], ...]


class _Resolver:
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        source: object,
        rules: Iterable[Rule],
        identity: bool,
        allow_missing: Iterable[str],
        allow_unexpected: Iterable[str],
    ) -> None:
        self.rules = _rule_list(rules)
        self.identity = identity
        self.may_miss = NameFilter(allow_missing, "allow_missing")
        self.may_remain = NameFilter(allow_unexpected, "allow_unexpected")
        self.destinations = destinations_of(model)
        self.dst_index = {
            name: k for k, d in enumerate(self.destinations) for name in (d.name, *d.aliases)
        }
        tensors = open_source(source)
        self.src_names = list(tensors)
        self.src_tensors = list(tensors.values())
        self.src_index = {name: k for k, name in enumerate(self.src_names)}
        self.findings: list[Finding] = []
        self.jobs: list[_Job] = []
        self.writes: list[Write] = []
        self.dropped: dict[int, int] = {}  # source index -> the rule that drops it
        self.consumed: set[int] = set()  # sources that some rule or the identity reads, or tries to
        self.reached: set[int] = (
            set()
        )  # destinations that some rule or the identity writes, or tries to
        self.failed: set[int] = (
            set()
        )  # destinations with a finding of their own: coverage says nothing new
        self.dst_templates = [None if r.dst is None else Template(r.dst) for r in self.rules]
        self._layouts: dict[tuple[object, ...], Layout | Mismatch] = {}
        self._usable: dict[tuple[str, int], bool] = {}

    def run(self) -> Resolved:
        self._apply_rules()
        if self.identity:
            self._apply_identity()
        for job in self.jobs:
            self._write(job)
        self._find_conflicts()
        kept, partial = self._coverage()
        dropped = self._leftovers()
        if self.findings:
            n = len(self.findings)
            raise PlanError(
                f"the plan has {n} {'problem' if n == 1 else 'problems'}; nothing was written.",
                self.findings,
            )
        return self._result(kept, partial, dropped)

    # -- names --

    def _apply_rules(self) -> None:
        index = RuleIndex(self.rules)
        hits = [0] * len(self.rules)
        lone_src, lone_dst = [], []
        for template, target in zip(index.templates, self.dst_templates, strict=True):
            lone_src.append([] if target is None else one_sided(template, target))
            lone_dst.append([] if target is None else one_sided(target, template))
        for s, name in enumerate(self.src_names):
            for k, bindings in index.match(name):
                hits[k] += 1
                if self.rules[k].dst is None:
                    self.dropped.setdefault(s, k)
                else:
                    self._apply_rule(s, k, bindings, lone_src[k], lone_dst[k])
        for s, k in list(self.dropped.items()):
            if s in self.consumed:
                self.findings.append(
                    Finding(
                        self.src_names[s],
                        "rule",
                        f"dropped by {self.rules[k]} and read by another rule",
                    )
                )
        # A wildcard drops what nothing else reads: `Rule("*", None)` means "and nothing more".
        drops = NameFilter([self.rules[k].src for k in index.wildcards], "rules")
        chosen, silent = drops.select(self.src_names)
        for name, number in chosen.items():
            k = index.wildcards[number]
            if self.src_index[name] not in self.consumed:
                self.dropped.setdefault(self.src_index[name], k)
        idle = {k for k in range(len(self.rules)) if not hits[k]} - set(index.wildcards)
        idle |= {k for k in index.wildcards if self.rules[k].src in silent}
        if idle:
            near = Suggester(self.src_names)
            for k in sorted(idle):
                self.findings.append(
                    Finding(
                        str(self.rules[k]),
                        "rule",
                        "no match",
                        "at least one source name",
                        _did_you_mean(_nearest_template(self.rules[k].src, near)),
                    )
                )

    def _apply_rule(
        self, s: int, k: int, bindings: Bindings, lone_src: list[str], lone_dst: list[str]
    ) -> None:
        rule, target = self.rules[k], self.dst_templates[k]
        assert target is not None
        self.consumed.add(s)
        pins: list[tuple[str, int]] = []
        for placeholder in lone_src:
            number = bound_index(bindings[placeholder])
            if number is None:
                self.findings.append(
                    Finding(
                        self.src_names[s],
                        "rule",
                        f'{{{placeholder}}} = "{bindings[placeholder]}" in {rule}',
                        f"an integer, the index on axis {placeholder}",
                    )
                )
                return
            pins.append((placeholder, number))
        for extra in self._unstacked(s, rule, lone_dst):
            name = target.format({**bindings, **{p: str(n) for p, n in extra}})
            d = self.dst_index.get(name)
            if d is None:
                self._unknown(name, s, rule)
                continue
            self.reached.add(d)
            self.jobs.append(_Job(s, d, k, name, (*pins, *extra)))

    def _unstacked(
        self, s: int, rule: Rule, lone_dst: list[str]
    ) -> Iterable[tuple[tuple[str, int], ...]]:
        """The index tuples of placeholders that the destination alone has: every index of their axes."""
        if not lone_dst:
            return [()]
        assert rule.pattern is not None
        pattern, sizes = parse(rule.pattern), dict(rule.axis_sizes)
        shape = tuple(self.src_tensors[s].shape)
        counts = []
        for placeholder in lone_dst:
            size = sizes.get(placeholder)
            if size is None and len(shape) == len(pattern.src):
                # Alone in its dimension, the axis has the dimension's size.
                size = next(
                    (n for n, g in zip(shape, pattern.src, strict=True) if g == (placeholder,)),
                    None,
                )
            if size is None:
                self.findings.append(
                    Finding(
                        self.src_names[s],
                        "shape",
                        f"{shape}: the size of axis {placeholder} in {rule} cannot be worked out",
                        "",
                        f"give it in the rule: {placeholder}=...",
                    )
                )
                return []
            counts.append(range(size))
        return [tuple(zip(lone_dst, found, strict=True)) for found in product(*counts)]

    def _unknown(self, name: str, s: int, rule: Rule) -> None:
        self.findings.append(
            Finding(
                name,
                "unknown",
                expected="a destination name",
                hint=_joined(
                    _did_you_mean(self._destinations_near(name)),
                    f"made from {self.src_names[s]} by {rule}",
                ),
            )
        )

    @cached_property
    def _destinations_near(self) -> Suggester:
        return Suggester(self.dst_index)

    def _apply_identity(self) -> None:
        touched = {job.dst for job in self.jobs}
        for s, name in enumerate(self.src_names):
            d = self.dst_index.get(name)
            if d is None or d in touched or s in self.consumed or s in self.dropped:
                continue
            self.consumed.add(s)
            self.reached.add(d)
            self.jobs.append(_Job(s, d, -1, name, ()))

    # -- shapes and layouts --

    def _write(self, job: _Job) -> None:
        d, s = self.destinations[job.dst], self.src_tensors[job.src]
        usable_dst = self._can_use("dst", job.dst, job.dst_name, d.tensor)
        usable_src = self._can_use("src", job.src, self.src_names[job.src], s)
        if not (usable_dst and usable_src):
            self.failed.add(job.dst)
            return
        rule = self.rules[job.rule] if job.rule >= 0 else None
        dst_shape, src_shape = tuple(d.tensor.shape), tuple(s.shape)
        if rule is None or rule.pattern is None:
            if dst_shape != src_shape:
                self.failed.add(job.dst)
                self.findings.append(
                    Finding(
                        job.dst_name,
                        "shape",
                        str(src_shape),
                        str(dst_shape),
                        self._shape_hint(job, src_shape, dst_shape),
                    )
                )
                return
            self.writes.append(
                Write(job.dst, job.src, dst_shape, d.tensor.stride(), 0, s.stride(), 0)
            )
            return
        layout = self._layout(job, rule, src_shape, s.stride(), dst_shape, d.tensor.stride())
        if isinstance(layout, Mismatch):
            self.failed.add(job.dst)
            self.findings.append(
                Finding(
                    job.dst_name,
                    "shape",
                    layout.got,
                    layout.expected,
                    _joined(
                        layout.hint,
                        f"source {src_shape}, destination {dst_shape}",
                        f"from {self.src_names[job.src]} by {rule}",
                    ),
                )
            )
            return
        sizes, (dst_strides, dst_offset), (src_strides, src_offset) = layout
        self.writes.append(
            Write(
                job.dst,
                job.src,
                sizes,
                dst_strides,
                dst_offset,
                src_strides,
                src_offset,
                _write_text(rule, job.pins),
            )
        )

    def _layout(
        self,
        job: _Job,
        rule: Rule,
        src_shape: tuple[int, ...],
        src_strides: tuple[int, ...],
        dst_shape: tuple[int, ...],
        dst_strides: tuple[int, ...],
    ) -> Layout | Mismatch:
        # Layers repeat the same shapes, so nearly every compilation is a repetition.
        key = (job.rule, job.pins, src_shape, src_strides, dst_shape, dst_strides)
        found: Layout | Mismatch | None = self._layouts.get(key)
        if found is None:
            try:
                sizes, dst, src = compile_pattern(
                    rule.pattern or "",
                    (*rule.at, *job.pins),
                    dict(rule.axis_sizes),
                    src_shape,
                    src_strides,
                    dst_shape,
                    dst_strides,
                )
                found = (sizes, (dst.strides, dst.offset), (src.strides, src.offset))
            except Mismatch as error:
                found = error
            self._layouts[key] = found
        return found

    def _can_use(self, side: str, k: int, name: str, tensor: Tensor) -> bool:
        """Whether a tensor has strides and memory to speak of; a finding the first time it has not."""
        known = self._usable.get((side, k))
        if known is None:
            finding = layout_finding(name, tensor, side == "dst")
            if finding is not None:
                self.findings.append(finding)
            known = self._usable[side, k] = finding is None
        return known

    def _shape_hint(self, job: _Job, src_shape: tuple[int, ...], dst_shape: tuple[int, ...]) -> str:
        name = self.src_names[job.src]
        return _joined(
            _pattern_guess(src_shape, dst_shape), f"from {name}" if name != job.dst_name else ""
        )

    # -- completeness --

    def _find_conflicts(self) -> None:
        """Writes of one and the same region: once from one memory (ties), a conflict from two."""
        seen: dict[tuple[object, ...], Write] = {}
        kept: list[Write] = []
        for write in self.writes:
            region = (write.dst, write.sizes, write.dst_strides, write.dst_offset)
            first = seen.setdefault(region, write)
            if first is write or 0 in write.sizes:
                kept.append(write)
                continue
            if self._same_values(first, write):
                continue
            self.failed.add(write.dst)
            d = self.destinations[write.dst]
            ties = f", tied to {', '.join(d.aliases)}" if d.aliases else ""
            self.findings.append(
                Finding(
                    d.name,
                    "conflict",
                    f"two writes of the same elements, from {self.src_names[first.src]} "
                    f"and from {self.src_names[write.src]}",
                    f"one source for each element{ties}",
                    "drop one of them with a rule: Rule(name, None)",
                )
            )
        self.writes = kept

    def _same_values(self, a: Write, b: Write) -> bool:
        return (a.src_strides, a.src_offset) == (b.src_strides, b.src_offset) and memory_key(
            self.src_tensors[a.src]
        ) == memory_key(self.src_tensors[b.src])

    def _coverage(self) -> tuple[list[str], list[str]]:
        allowed, idle = self.may_miss.select(self.dst_index)
        self._report_idle(idle, "allow_missing", "destination", self.dst_index)
        written: dict[int, int] = {}
        for write in self.writes:
            written[write.dst] = written.get(write.dst, 0) + prod(write.sizes)
        kept: list[str] = []
        partial: list[str] = []
        missing: list[str] = []
        for k, d in enumerate(self.destinations):
            if k in self.failed:
                continue
            may = any(name in allowed for name in (d.name, *d.aliases))
            if k not in written:
                if k in self.reached:
                    continue  # it has a finding already
                (kept if may else missing).append(d.name)
                continue
            numel = d.tensor.numel()
            if written[k] > numel:
                self.findings.append(
                    Finding(
                        d.name, "conflict", f"{written[k]} elements written", f"{numel}, each once"
                    )
                )
            elif written[k] < numel and not may:
                self.findings.append(
                    Finding(
                        d.name,
                        "kept",
                        f"{written[k]} of {numel} elements written",
                        "all of them",
                        "write the rest, or name it in allow_missing",
                    )
                )
            elif written[k] < numel:
                partial.append(d.name)
        self._report_missing(missing)
        return kept, partial

    def _report_missing(self, missing: Sequence[str]) -> None:
        if not missing:
            return
        unread = [
            n
            for s, n in enumerate(self.src_names)
            if s not in self.consumed and s not in self.dropped
        ]
        near = Suggester(unread)
        for name in missing:
            hint = _did_you_mean(near(name)) or "give it a source, or name it in allow_missing"
            self.findings.append(Finding(name, "missing", hint=hint))

    def _leftovers(self) -> list[str]:
        allowed, idle = self.may_remain.select(self.src_names)
        self._report_idle(idle, "allow_unexpected", "source", self.src_names)
        dropped: list[str] = []
        unexpected: list[str] = []
        for s, name in enumerate(self.src_names):
            if s in self.consumed:
                continue
            (dropped if s in self.dropped or name in allowed else unexpected).append(name)
        if unexpected:
            unwritten = [
                n
                for k, d in enumerate(self.destinations)
                if k not in self.reached
                for n in (d.name, *d.aliases)
            ]
            near = Suggester(unwritten)
            for name in unexpected:
                self.findings.append(
                    Finding(
                        name,
                        "unexpected",
                        hint=_did_you_mean(near(name))
                        or "drop it with Rule(name, None), or name it in allow_unexpected",
                    )
                )
        return dropped

    def _report_idle(
        self, idle: Sequence[str], argument: str, what: str, names: Iterable[str]
    ) -> None:
        if not idle:
            return
        near = Suggester(names)
        for text in idle:
            self.findings.append(
                Finding(
                    f'{argument} "{text}"',
                    "rule",
                    "no match",
                    f"at least one {what} name",
                    _did_you_mean(_nearest_template(text, near)),
                )
            )

    def _result(self, kept: list[str], partial: list[str], dropped: list[str]) -> Resolved:
        # Only the sources that are read: a plan holds and rebinds these and no others.
        used = sorted({write.src for write in self.writes})
        number = {s: k for k, s in enumerate(used)}
        writes = [
            Write(
                w.dst,
                number[w.src],
                w.sizes,
                w.dst_strides,
                w.dst_offset,
                w.src_strides,
                w.src_offset,
                w.text,
            )
            for w in self.writes
        ]
        return Resolved(
            self.destinations,
            [self.src_names[s] for s in used],
            [self.src_tensors[s] for s in used],
            writes,
            kept,
            dropped,
            partial,
        )


# ---- texts ---------------------------------------------------------------------------------------


def _rule_list(rules: Iterable[Rule]) -> list[Rule]:
    if isinstance(rules, Rule):
        raise TypeError(f"rules must be a list of rules, got one Rule; write [{rules}]")
    out = list(rules)
    for k, rule in enumerate(out):
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{k}] must be a paramkit.Rule, got {type(rule).__name__}")
    return out


def _did_you_mean(name: str | None) -> str:
    return "" if name is None else f"did you mean {name}?"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _nearest_template(template: str, near: Suggester) -> str | None:
    """A near miss of a template: with `{i}` as layer 0, and without the wildcards."""
    plain = Template(template, wildcards=True)
    probe = plain.format(dict.fromkeys(plain.placeholders, "0")).replace("*", "").strip(".")
    return near(probe) if probe else None


def _write_text(rule: Rule, pins: tuple[tuple[str, int], ...]) -> str:
    # A bound index is shown as its placeholder: the text is then the same for every name.
    at = [f"{axis}={value}" for axis, value in rule.at]
    bound = [f"{axis}={{{axis}}}" for axis, _ in pins]
    return ", ".join([parse(rule.pattern or "").text, *at, *bound])


def _pattern_guess(src: tuple[int, ...], dst: tuple[int, ...]) -> str:
    """What a pattern could do about two different shapes."""
    if len(src) == len(dst) == 2 and src == dst[::-1]:
        return 'did you mean "i o -> o i"?'
    if len(src) == len(dst) <= 4 and sorted(src) == sorted(dst):
        names = "abcd"[: len(src)]
        for order in permutations(range(len(src))):
            if tuple(src[k] for k in order) == dst:
                return f'did you mean "{" ".join(names)} -> {" ".join(names[k] for k in order)}"?'
    if prod(src) == prod(dst):
        return "as many elements: an axis pattern may fit"
    if len(src) == len(dst):
        different = [k for k in range(len(src)) if src[k] != dst[k]]
        if len(different) == 1 and src[different[0]] and dst[different[0]]:
            k = different[0]
            axes = list("abcd"[: len(src)]) if len(src) <= 4 else []
            fused = " ".join(f"(s {a})" if j == k else a for j, a in enumerate(axes))
            plain = " ".join(axes)
            if axes and dst[k] % src[k] == 0:
                return f'to fuse {dst[k] // src[k]} of them: "{plain} -> {fused}", at={{"s": ...}}'
            if axes and src[k] % dst[k] == 0:
                return (
                    f'to take one part of {src[k] // dst[k]}: "{fused} -> {plain}", at={{"s": ...}}'
                )
    return ""
