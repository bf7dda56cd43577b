"""Resolving: from a model, a source and rules to the complete, proven set of writes.

No data is touched and no tensor is created: only names, shapes, strides and addresses are read. All
that is wrong is collected and raised together. Costs are linear in the number of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .casting import hint as cast_hint
from .casting import refusal
from .destinations import Destination, destinations_of, layout_finding
from .errors import Finding, PlanError, Suggester, dtype_text
from .fills import Constant, Fill, Mean, Normal
from .hints import did_you_mean, joined, nearest_template, pattern_guess
from .hooks import HookCheck
from .patterns import Mismatch, View, Views, compile_side, parse
from .patterns import compile as compile_pattern
from .proof import Part, Proof
from .rules import Rule, rule_list
from .sharding import is_sharded, spread_of
from .sources import open_source
from .stacking import axis_size, bound_pins, unknown_size
from .templates import Bindings, NameFilter, Template, TemplateIndex, one_sided
from .typing import Source

__all__ = ["Resolved", "Resolver", "Tie", "Write", "resolve"]

Strided = tuple[tuple[int, ...], int]  # strides and offset


@dataclass(frozen=True, slots=True)
class Write:
    """One write: a view of a destination from a view of a source, of the same sizes.

    Attributes:
        dst: index into `Resolved.destinations`.
        src: index into `Resolved.source_names` and `Resolved.source_tensors`.
        sizes: sizes of both views.
        dst_strides, dst_offset: in elements, relative to the destination's first element.
        src_strides, src_offset: in elements, relative to the source's first element.
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

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], int]:
        """Sizes, and strides and offset of both views."""
        return (self.sizes, self.dst_strides, self.dst_offset, self.src_strides, self.src_offset)

    def plain(self, dst: int, src: int) -> tuple[Any, ...]:
        """As a backend's plan takes it, for the destination and source of these numbers."""
        return (dst, src, *self.geometry)


class Tie(NamedTuple):
    """What need not be written, because `write` fills the same elements; the values must agree.

    Attributes:
        write: what is written.
        other: what would be written to the same elements, from other memory.
    """

    write: Write
    other: Write


@dataclass
class Resolved:
    """Everything that a plan writes, and everything that it leaves alone on purpose.

    Attributes:
        destinations: all tensors of the model, aliases collapsed.
        source_names, source_tensors: the source's tensors that some write or tie reads. A tensor may be
            lazy: its bytes exist once they are read.
        writes: the writes, in the order of the source.
        ties: pairs of sources whose values must be equal, to be compared before anything is written.
        kept: destination names that nothing writes, on purpose.
        dropped: source names that nothing reads, on purpose.
        partial: destination names written only in part, on purpose.
        also: names of the source that are not read because they are the memory of one that is, and its name.
        made: how many of the last `source_tensors` are made by a rule's `fill` and are no part of the source.
    """

    destinations: list[Destination] = field(default_factory=list)
    source_names: list[str] = field(default_factory=list)
    source_tensors: list[Any] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    also: dict[str, str] = field(default_factory=dict)
    made: int = 0


def resolve(
    model: nn.Module | Mapping[str, Tensor],
    source: Source,
    rules: Iterable[Rule] = (),
    *,
    identity: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    casting: str = "same_kind",
    hooks: str = "refuse",
    device: torch.device | None = None,
    destinations: list[Destination] | None = None,
) -> Resolved:
    """Work out every write of a transplant and prove that the set is right.

    Args:
        model: a module (its parameters and buffers) or a mapping from names to tensors.
        source: whatever `open_source` takes.
        rules: how source names and axes map to destination names and axes.
        identity: names that no rule touches map to themselves.
        allow_missing: destination names that may stay unwritten; exact, with `{i}`, or with `*`.
        allow_unexpected: source names that may stay unread; the same.
        casting: which conversions are allowed, as in `paramkit.plan`.
        hooks: "refuse" or "ignore" modules with a way of their own to load a state dict.
        device: where destinations on the meta device will be allocated; None refuses them.
        destinations: those of the model, where they are known already.

    Returns:
        The writes. Each destination element is written once or kept on purpose, each source element is
        read or dropped on purpose; that two tensors do not share memory is proved later, from addresses.

    Raises:
        PlanError: with every problem in the names, rules, shapes, dtypes and layouts.
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
    resolver = Resolver(
        model,
        rules,
        identity,
        allow_missing,
        allow_unexpected,
        casting,
        hooks,
        device,
        destinations=destinations,
    )
    for name, tensor in open_source(source).items():
        resolver.add(name, tensor)
    return resolver.finish()


# ---- resolving -----------------------------------------------------------------------------------


class _Job(NamedTuple):
    """One rule applied to one pair of names; rule -1 is the identity."""

    src: int
    dst: int
    rule: int
    dst_name: str
    pins: tuple[tuple[str, int], ...]


class Resolver:
    """Takes the tensors of a source one by one, and makes the writes of each at once.

    See `resolve` for the arguments. `streaming` decides about the identity of a name when it comes,
    not when all names are known.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        rules: Iterable[Rule],
        identity: bool,
        allow_missing: Iterable[str],
        allow_unexpected: Iterable[str],
        casting: str,
        hooks: str = "refuse",
        device: torch.device | None = None,
        *,
        streaming: bool = False,
        destinations: list[Destination] | None = None,
    ) -> None:
        self.rules = rule_list(rules)
        self.identity, self.casting, self.streaming = identity, casting, streaming
        self.may_miss = NameFilter(allow_missing, "allow_missing")
        self.may_remain = NameFilter(allow_unexpected, "allow_unexpected")
        self.hooks = HookCheck(hooks)
        self.device = device
        if destinations is None:
            destinations = destinations_of(model, transient=True)
        self.destinations = destinations
        for d in self.destinations:
            if is_sharded(d.tensor):
                d.tensor = spread_of(d.tensor)
        self.dst_index = {
            name: k for k, d in enumerate(self.destinations) for name in (d.name, *d.aliases)
        }
        self.src_names: list[str] = []
        self.src_tensors: list[Any] = []
        # What rules fill with; the src of a write of it is -1 - its number.
        self.made: list[tuple[str, Any]] = []
        self.findings: list[Finding] = []
        self.writes: list[Write] = []
        self.proof = Proof(self)
        self._jobs: list[_Job] = []  # identities, decided at the end
        self._layouts: dict[tuple[object, ...], Views | Mismatch] = {}
        self._usable: dict[tuple[str, int], bool] = {}
        self._texts: dict[int, str] = {}
        self._casts: dict[tuple[torch.dtype, torch.dtype], str | None] = {}
        self._prepare_rules()

    def _prepare_rules(self) -> None:
        self._hits = [0] * len(self.rules)
        self._alone: set[tuple[int, int]] = set()  # rules without a source, and what they are about
        self._targets = [rule.target_template() for rule in self.rules]
        sources = [rule.source_template() for rule in self.rules]
        # Templates with a wildcard cross the components that the index goes by.
        self._crossing_src = [(k, t) for k, t in enumerate(sources) if t and t.crosses]
        self.crossing_dst = [(k, t) for k, t in enumerate(self._targets) if t and t.crosses]
        self._index = TemplateIndex([None if t and t.crosses else t for t in sources])
        self._lone = [
            ((), ()) if a is None or b is None else (one_sided(a, b), one_sided(b, a))
            for a, b in zip(sources, self._targets, strict=True)
        ]
        # What rules with a source may write: in a stream, no identity may come before them.
        self._made_by_rules = TemplateIndex(
            [
                t if a and self.streaming else None
                for a, t in zip(sources, self._targets, strict=True)
            ]
        )
        # Rules without a source: what is filled, and what is kept on purpose.
        alone = [
            t if rule.src is None and t and not t.crosses else None
            for rule, t in zip(self.rules, self._targets, strict=True)
        ]
        if any(alone):
            index = TemplateIndex(alone)
            for name, d in self.dst_index.items():
                for k, _ in index.match(name):
                    self._alone_dst(k, d, name)

    def _crossing_destinations(self) -> None:
        """A wildcard fills or keeps what no other rule writes."""
        if not self.crossing_dst:
            return
        reached = set(self.proof.reached)
        for name, d in self.dst_index.items():
            for k, template in self.crossing_dst:
                if not name.startswith(template.prefix) or template.match(name) is None:
                    continue
                if self.destinations[d].transient and template.text.endswith("*"):
                    continue  # no state dict has it: it takes more than "*" to name it
                if d in reached:
                    self._hits[k] += 1
                else:
                    self._alone_dst(k, d, name)

    def _idle_rules(self) -> list[Finding]:
        nears: dict[str, Suggester] = {}
        findings = []
        for k, rule in enumerate(self.rules):
            if self._hits[k]:
                continue
            names: Iterable[str] = self.dst_index if rule.src is None else self.src_names
            what = "destination" if rule.src is None else "source"
            near = nears.setdefault(what, Suggester(names))
            findings.append(
                Finding(
                    str(rule),
                    "rule",
                    "no match",
                    f"at least one {what} name",
                    did_you_mean(nearest_template(rule.src or rule.dst or "", near)),
                )
            )
        return findings

    def _alone_dst(self, k: int, d: int, name: str) -> None:
        self._hits[k] += 1
        if (k, d) in self._alone:
            return  # under another of its names
        self._alone.add((k, d))
        rule = self.rules[k]
        part = self._part(rule, name, self.destinations[d].tensor)
        if part is None:
            self.proof.failed.add(d)
            return
        if rule.fill is None:
            self.proof.keep(d, Part(part, str(rule), rule.pattern is None))
            return
        self.proof.reached.add(d)
        self._fill(d, name, rule.fill, part, rule.pattern or "")

    def _part(self, rule: Rule, name: str, tensor: Any) -> View | None:
        """The part of a tensor that a rule with one side is about; a finding where it does not fit."""
        shape = tuple(tensor.shape)
        if tensor.layout is not torch.strided:
            return View(shape, (0,) * len(shape), 0) if rule.pattern is None else None
        if rule.pattern is None:
            return View(shape, tensor.stride(), 0)
        try:
            return compile_side(
                rule.pattern, rule.at, dict(rule.axis_sizes), shape, tensor.stride()
            )
        except Mismatch as error:
            hint = joined(error.hint, f"tensor {shape}", f"by {rule}")
            self.findings.append(Finding(name, "shape", error.got, error.expected, hint))
            return None

    # -- names --

    def add(self, name: str, tensor: Any) -> None:
        """Take one tensor of the source: its writes are appended to `writes`, its problems to `findings`."""
        s = len(self.src_names)
        self.src_names.append(name)
        if is_sharded(tensor):
            tensor = spread_of(tensor)
        self.src_tensors.append(tensor)
        for k, bindings in self._index.match(name):
            self._hits[k] += 1
            if self.rules[k].dst is None:
                self._alone_src(k, s)
            else:
                self._apply_rule(s, k, bindings)
        consumed = s in self.proof.consumed
        # A wildcard drops what no other rule reads: `Rule("*", None)` means "and nothing more".
        for k, template in self._crossing_src:
            if name.startswith(template.prefix) and template.match(name) is not None:
                self._hits[k] += 1
                if not consumed:
                    self._alone_src(k, s)
        if consumed:
            return
        d = self.dst_index.get(name) if self.identity else None
        if d is None or s in self.proof.dropped:
            return
        job = _Job(s, d, -1, name, ())
        if not self.streaming:
            self._jobs.append(job)
        elif not self._made_by_rules.match(name):
            self._identity(job)

    def _alone_src(self, k: int, s: int) -> None:
        rule = self.rules[k]
        part = self._part(rule, self.src_names[s], self.src_tensors[s])
        if part is None:
            self.proof.unread_ok.add(s)  # it has a finding already
            return
        self.proof.drop(s, Part(part, str(rule), rule.pattern is None))

    def _apply_rule(self, s: int, k: int, bindings: Bindings) -> None:
        rule, target = self.rules[k], self._targets[k]
        lone_src, lone_dst = self._lone[k]
        assert target is not None
        self.proof.consumed.add(s)
        pins = bound_pins(self.src_names[s], rule, bindings, lone_src)
        if isinstance(pins, Finding):
            self.proof.unread_ok.add(s)
            self.findings.append(pins)
            return
        if not lone_dst:
            self._job(s, k, target.format(bindings), pins)
            return
        for extra in self._unstacked(s, rule, target, bindings, lone_dst):
            filled = {**bindings, **{p: str(n) for p, n in extra}}
            self._job(s, k, target.format(filled), (*pins, *extra))

    def _job(self, s: int, k: int, name: str, pins: tuple[tuple[str, int], ...]) -> None:
        d = self.dst_index.get(name)
        if d is None:
            self.proof.unread_ok.add(s)
            self._unknown(name, s, self.rules[k])
            return
        self.proof.reached.add(d)
        self._write(_Job(s, d, k, name, pins))

    def _unstacked(
        self, s: int, rule: Rule, target: Template, bindings: Bindings, lone_dst: Sequence[str]
    ) -> Iterable[tuple[tuple[str, int], ...]]:
        """The index tuples of placeholders that the destination alone has: every index of their axes."""
        shape = tuple(self.src_tensors[s].shape)
        counts = []
        for placeholder in lone_dst:
            size = axis_size(placeholder, rule, shape)
            if size is None and len(lone_dst) == 1:
                # As many as there are destinations; that they use up the source is proved at the end.
                size = 0
                while target.format({**bindings, placeholder: str(size)}) in self.dst_index:
                    size += 1
            if size is None:
                self.proof.unread_ok.add(s)
                self.findings.append(unknown_size(self.src_names[s], shape, placeholder, rule))
                return []
            counts.append(range(size))
        numel = self.src_tensors[s].numel()
        if prod(len(c) for c in counts) > max(numel, 1):
            self.proof.unread_ok.add(s)
            self.findings.append(
                Finding(
                    self.src_names[s],
                    "shape",
                    f"{shape}: {numel} elements for {prod(len(c) for c in counts)} destinations",
                    "at least one element for each",
                    f"correct the sizes in {rule}",
                )
            )
            return []
        return [tuple(zip(lone_dst, found, strict=True)) for found in product(*counts)]

    def _unknown(self, name: str, s: int, rule: Rule) -> None:
        self.findings.append(
            Finding(
                name,
                "unknown",
                expected="a destination name",
                hint=joined(
                    did_you_mean(self._destinations_near(name)),
                    f"made from {self.src_names[s]} by {rule}",
                ),
            )
        )

    @cached_property
    def _destinations_near(self) -> Suggester:
        return Suggester(self.dst_index)

    def _identity(self, job: _Job) -> None:
        self.proof.consumed.add(job.src)
        self.proof.reached.add(job.dst)
        self._write(job)

    # -- shapes and layouts --

    def _write(self, job: _Job) -> None:
        d, s = self.destinations[job.dst], self.src_tensors[job.src]
        if not self._fits(job, d, s):
            self._fail(job)
            return
        rule = self.rules[job.rule] if job.rule >= 0 else None
        dst_shape, src_shape = tuple(d.tensor.shape), tuple(s.shape)
        if rule is not None and rule.rows is not None:
            self._overlapping_rows(job, rule, d, s)
            return
        if rule is None or rule.pattern is None:
            if dst_shape != src_shape:
                name = self.src_names[job.src]
                hint = joined(
                    pattern_guess(src_shape, dst_shape),
                    f"from {name}" if name != job.dst_name else "",
                )
                self._fail(
                    job, Finding(job.dst_name, "shape", str(src_shape), str(dst_shape), hint)
                )
                return
            self._take(Write(job.dst, job.src, dst_shape, d.tensor.stride(), 0, s.stride(), 0))
            return
        layout = self._layout(job, rule, src_shape, s.stride(), dst_shape, d.tensor.stride())
        if isinstance(layout, Mismatch):
            hint = joined(
                layout.hint,
                f"source {src_shape}, destination {dst_shape}",
                f"from {self.src_names[job.src]} by {rule}",
            )
            self._fail(job, Finding(job.dst_name, "shape", layout.got, layout.expected, hint))
            return
        sizes, dst, src, same = layout
        text = self._texts.get(job.rule)
        if text is None:  # the same for every name: a bound index is shown as its placeholder
            text = self._texts[job.rule] = _write_text(rule, job.pins)
        write = Write(
            job.dst, job.src, sizes, dst.strides, dst.offset, src.strides, src.offset, text
        )
        self._take(write)
        if same and 0 not in (*sizes, *(n for n, _ in same)):
            # Source axes of equal values: their first index is written, all of them must agree with it.
            more = tuple(n for n, _ in same)
            steps = tuple(stride for _, stride in same)
            still = (0,) * len(same)

            def every(src_steps: tuple[int, ...]) -> Write:
                return Write(
                    job.dst,
                    job.src,
                    (*more, *sizes),
                    (*still, *dst.strides),
                    dst.offset,
                    (*src_steps, *src.strides),
                    src.offset,
                    text,
                )

            self.proof.tie(every(still), every(steps))

    def _take(self, write: Write) -> bool:
        new = self.proof.take(write)
        if new:
            self.writes.append(write)
        return new

    def _fail(self, job: _Job, finding: Finding | None = None) -> None:
        self.proof.failed.add(job.dst)
        self.proof.unread_ok.add(job.src)
        if finding is not None:
            self.findings.append(finding)

    def _fits(self, job: _Job, d: Destination, s: Any) -> bool:
        """Whether both tensors can be used and one converts to the other; findings where not."""
        usable_dst = self._can_use("dst", job.dst, job.dst_name, d.tensor)
        usable_src = self._can_use("src", job.src, self.src_names[job.src], s)
        if not (usable_dst and usable_src) or self._hooked(d):
            return False
        if s.dtype != d.tensor.dtype:
            kinds = (s.dtype, d.tensor.dtype)
            if kinds not in self._casts:
                self._casts[kinds] = refusal(*kinds, self.casting)
            refused = self._casts[kinds]
            if refused is not None:
                src, dst = map(dtype_text, kinds)
                self.findings.append(
                    Finding(
                        job.dst_name,
                        "dtype",
                        src,
                        f"what converts to {dst}",
                        joined(refused, cast_hint(*kinds)),
                    )
                )
                return False
        return True

    def _hooked(self, d: Destination) -> bool:
        """Whether a module would load it in a way of its own, which is then a finding."""
        finding = self.hooks.finding(d)
        if finding is not None:
            self.findings.append(finding)
        return finding is not None

    def _overlapping_rows(self, job: _Job, rule: Rule, d: Destination, s: Any) -> None:
        dst_shape, src_shape = tuple(d.tensor.shape), tuple(s.shape)
        if not dst_shape or len(dst_shape) != len(src_shape) or dst_shape[1:] != src_shape[1:]:
            hint = joined('rows="overlap" lets the first dimension differ, no other', f"by {rule}")
            self._fail(job, Finding(job.dst_name, "shape", str(src_shape), str(dst_shape), hint))
            return
        n, rest = min(dst_shape[0], src_shape[0]), dst_shape[1:]
        dst_strides, src_strides = d.tensor.stride(), s.stride()
        text = f"rows 0..{n - 1} of {src_shape[0]}"
        again = not self._take(
            Write(job.dst, job.src, (n, *rest), dst_strides, 0, src_strides, 0, text)
        )
        if src_shape[0] > n:
            part = View((src_shape[0] - n, *rest), src_strides, n * src_strides[0])
            self.proof.drop(job.src, Part(part, str(rule), False))
        if dst_shape[0] > n and not again:  # tied: under its other name
            part = View((dst_shape[0] - n, *rest), dst_strides, n * dst_strides[0])
            if rule.fill is None:
                self.proof.keep(job.dst, Part(part, str(rule), False))
            elif self._cannot_hold(job.dst, job.dst_name, rule.fill):
                pass
            elif rule.fill.kind == "mean":
                mean = Mean(s, n, d.tensor.dtype)
                name = f"{self.src_names[job.src]} (mean)"
                self._made(job.dst, name, mean, part, "fill mean", (0, *mean.strides))
            else:
                self._fill(job.dst, job.dst_name, rule.fill, part, "")

    def _fill(self, d: int, name: str, fill: Fill, part: View, text: str) -> None:
        destination = self.destinations[d]
        if not self._can_use("dst", d, name, destination.tensor):
            self.proof.failed.add(d)
            return
        if self._cannot_hold(d, name, fill):
            return
        if self._hooked(destination):
            self.proof.failed.add(d)
            return
        text = joined(text, str(fill))
        if fill.kind == "value":
            constant = Constant(fill.value, destination.tensor)
            self._made(d, str(fill), constant, part, text, (0,) * len(part.sizes))
            return
        made = Normal(fill, destination.name, part.sizes, destination.tensor.dtype)
        self._made(d, str(fill), made, part, text, made.strides)

    def _cannot_hold(self, d: int, name: str, fill: Fill) -> bool:
        """Whether a fill is of no use for a destination's dtype, which is then a finding."""
        dtype = self.destinations[d].tensor.dtype
        misfit = fill.misfit(dtype, self.casting)
        if not misfit:
            return False
        self.proof.failed.add(d)
        wanted = f"a value of {dtype_text(dtype)}"
        self.findings.append(Finding(name, "dtype", str(fill), wanted, misfit))
        return True

    def _made(
        self, d: int, name: str, made: Any, part: View, text: str, strides: tuple[int, ...]
    ) -> None:
        self.made.append((name, made))
        src = -len(self.made)
        self._take(Write(d, src, part.sizes, part.strides, part.offset, strides, 0, text))

    def _layout(
        self,
        job: _Job,
        rule: Rule,
        src_shape: tuple[int, ...],
        src_strides: tuple[int, ...],
        dst_shape: tuple[int, ...],
        dst_strides: tuple[int, ...],
    ) -> Views | Mismatch:
        # Layers repeat the same shapes, so nearly every compilation is a repetition.
        key = (job.rule, job.pins, src_shape, src_strides, dst_shape, dst_strides)
        found: Views | Mismatch | None = self._layouts.get(key)
        if found is None:
            try:
                found = compile_pattern(
                    rule.pattern or "",
                    (*rule.at, *job.pins),
                    dict(rule.axis_sizes),
                    src_shape,
                    src_strides,
                    dst_shape,
                    dst_strides,
                )
            except Mismatch as error:
                found = error
            self._layouts[key] = found
        return found

    def _can_use(self, side: str, k: int, name: str, tensor: Any) -> bool:
        """Whether a tensor has strides and memory to speak of; a finding the first time it has not."""
        known = self._usable.get((side, k))
        if known is None:
            finding = layout_finding(name, tensor, side == "dst", self.device)
            if finding is not None:
                self.findings.append(finding)
            known = self._usable[side, k] = finding is None
        return known

    # -- the end --

    def finish(self) -> Resolved:
        """All names are known: identities, wildcards, and the proof.

        Raises:
            PlanError: with every problem.
        """
        by_rules, place = set(self.proof.reached), len(self.findings)
        for job in self._jobs:
            if job.dst not in by_rules:
                self._identity(job)
        self._jobs = []
        self._crossing_destinations()
        self.findings[place:place] = self._idle_rules()
        kept, partial, dropped = self.proof.run()
        if self.findings:
            raise plan_error(self.findings)
        return self._result(kept, partial, dropped)

    def _result(self, kept: list[str], partial: list[str], dropped: list[str]) -> Resolved:
        # Only the sources that are read: a plan holds and rebinds these and no others.
        read = {w.src for w in self.writes}
        read.update(w.src for tie in self.proof.ties for w in tie)
        used = sorted(k for k in read if k >= 0)
        made = sorted((k for k in read if k < 0), reverse=True)
        number = {s: k for k, s in enumerate((*used, *made))}
        same = all(s == k for s, k in number.items())
        return Resolved(
            self.destinations,
            [self.src_names[s] for s in used] + [self.made[-1 - k][0] for k in made],
            [self.src_tensors[s] for s in used] + [self.made[-1 - k][1] for k in made],
            self.writes if same else [_renumbered(w, number) for w in self.writes],
            [Tie(_renumbered(a, number), _renumbered(b, number)) for a, b in self.proof.ties],
            kept,
            dropped,
            partial,
            self.proof.also,
            len(made),
        )


def plan_error(findings: Sequence[Finding]) -> PlanError:
    n = len(findings)
    return PlanError(
        f"the plan has {n} {'problem' if n == 1 else 'problems'}; nothing was written.", findings
    )


def _renumbered(w: Write, number: Mapping[int, int]) -> Write:
    return Write(
        w.dst,
        number[w.src],
        w.sizes,
        w.dst_strides,
        w.dst_offset,
        w.src_strides,
        w.src_offset,
        w.text,
    )


# ---- texts ---------------------------------------------------------------------------------------


def _write_text(rule: Rule, pins: tuple[tuple[str, int], ...]) -> str:
    # A bound index is shown as its placeholder: the text is then the same for every name.
    at = [f"{axis}={value}" for axis, value in rule.at]
    bound = [f"{axis}={{{axis}}}" for axis, _ in pins]
    return ", ".join([parse(rule.pattern or "").text, *at, *bound])
