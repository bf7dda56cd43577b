"""The way back: a transplant and its inverse give every bit again, and no rule materialises a tensor.

Random sources and random rules of every form. What a rule drops is not in the destination, so it is
taken from the original; everything else starts from zero.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import paramkit
from paramkit import PlanError, Rule, invert
from paramkit.shapes import infer_destinations
from tests.guards import assert_same_bits, bits, place, random_layout, watch

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int16,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


@dataclass
class Built:
    """Sources and rules that carry all of them over, but for what is dropped.

    Attributes:
        sources: guarded tensors of random bits, of random strides.
        dropped: for a source of which a part is dropped, where that is.
        extra: destinations that no source says anything of, by shape.
    """

    rng: random.Random
    sources: dict[str, Tensor] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    dropped: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def add(self, name: str, *shape: int) -> Tensor:
        layout = random_layout(self.rng, shape)
        self.sources[name] = place(layout, self.dtype, seed=self.rng.randrange(1 << 30))
        return self.sources[name]

    def drop(self, name: str, where: Callable[[Tensor], Tensor]) -> None:
        """Mark a part of a source, given as a view of a mask of its shape."""
        shape = self.sources[name].shape
        mask = self.dropped.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        where(mask).fill_(True)

    def size(self, most: int = 4) -> int:
        return self.rng.randint(1, most)


def grouped(rng: random.Random, axes: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Axes in a row, cut into dimensions at random."""
    out: list[list[str]] = []
    for axis in axes:
        if out and rng.random() < 0.4:
            out[-1].append(axis)
        else:
            out.append([axis])
    return tuple(tuple(group) for group in out)


def side(groups: Iterable[tuple[str, ...]]) -> str:
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


def shape_of(groups: Iterable[tuple[str, ...]], sizes: dict[str, int]) -> list[int]:
    out = []
    for group in groups:
        out.append(1)
        for axis in group:
            out[-1] *= sizes[axis]
    return out


def shuffled(rng: random.Random, axes: Iterable[str]) -> list[str]:
    out = list(axes)
    rng.shuffle(out)
    return out


# ---- forms: each adds sources and rules under a name of its own ----------------------------------


def rename(b: Built, name: str) -> None:
    shape = [b.size() for _ in range(b.rng.randint(0, 3))]
    for i in range(b.size(3)):
        for part in ("weight", "bias"):
            b.add(f"{name}.old.{i}.{part}", *shape)
    choice = b.rng.randrange(3)
    if choice == 0:
        b.rules.append(Rule(f"{name}.old.{{i}}.{{p}}", f"{name}.{{p}}_{{i}}.new"))
    elif choice == 1:
        b.rules.append(Rule(f"{name}.old.{{*p}}", f"{name}.new.{{*p}}"))
    else:
        b.rules += [
            Rule(f"{name}.old.{{i}}.{part}", f"{name}.new.{{i}}.{part}s")
            for part in ("weight", "bias")
        ]


def permute(b: Built, name: str) -> None:
    axes = "abcde"[: b.rng.randint(1, 5)]
    sizes = {axis: b.size(3) for axis in axes}
    src = grouped(b.rng, axes)
    dst = grouped(b.rng, shuffled(b.rng, axes))
    for i in range(b.size(2)):
        b.add(f"{name}.{i}.w", *shape_of(src, sizes))
    # All sizes are given: none of them can be told from both shapes alone in every case.
    b.rules.append(
        Rule(f"{name}.{{i}}.w", f"{name}.{{i}}.v", f"{side(src)} -> {side(dst)}", **sizes)
    )


def transpose(b: Built, name: str) -> None:
    b.add(f"{name}.w", b.size(), b.size())
    b.rules.append(Rule(f"{name}.w", f"{name}.w", "i o -> o i"))


def index(b: Built, k: int, n: int) -> int | str:
    """An index in one of the ways that it can be written."""
    return b.rng.choice((k, str(k), k - n, f"n-{n - k}"))


def fuse(b: Built, name: str) -> None:
    n, sizes = b.size(), {"a": b.size(), "b": b.size()}
    src = grouped(b.rng, "ab")
    dst = grouped(b.rng, shuffled(b.rng, ("s", "a", "b")))
    for k in range(n):
        b.add(f"{name}.{k}.w", *shape_of(src, sizes))
        at = index(b, k, n)
        extra = {"n": n} if isinstance(at, str) and "n" in at else {}
        b.rules.append(
            Rule(
                f"{name}.{k}.w",
                f"{name}.w",
                f"{side(src)} -> {side(dst)}",
                at={"s": at},
                s=n,
                **sizes,
                **extra,
            )
        )


def split(b: Built, name: str) -> None:
    n, sizes = b.size(), {"a": b.size(), "b": b.size()}
    src = grouped(b.rng, shuffled(b.rng, ("s", "a", "b")))
    dst = grouped(b.rng, shuffled(b.rng, "ab"))
    b.add(f"{name}.w", *shape_of(src, {**sizes, "s": n}))
    b.rules += [
        Rule(
            f"{name}.w",
            f"{name}.{k}.w",
            f"{side(src)} -> {side(dst)}",
            at={"s": k},
            s=n,
            **sizes,
        )
        for k in range(n)
    ]


def concatenate(b: Built, name: str) -> None:
    """Parts of unequal lengths, one after the other on one axis."""
    lengths, rest, start = [b.size() for _ in range(b.size(3))], b.size(), 0
    side_by_side = b.rng.choice(("r e -> t e", "r e -> e t"))
    for k, n in enumerate(lengths):
        b.add(f"{name}.{k}", n, rest)
        ends = [f"{start}+r", str(start + n)]
        if k == len(lengths) - 1:
            ends.append("")
        at = f"{start}:{b.rng.choice(ends)}"
        b.rules.append(Rule(f"{name}.{k}", f"{name}.all", side_by_side, at={"t": at}, r=n))
        start += n


def stack(b: Built, name: str) -> None:
    n, sizes = b.rng.choice((1, 3, 12)), {"a": b.size(), "b": b.size()}
    src = grouped(b.rng, "ab")
    dst = grouped(b.rng, shuffled(b.rng, ("x", "a", "b")))
    for layer in range(b.size(2)):
        for k in range(n):
            b.add(f"{name}.{layer}.e{k}.w", *shape_of(src, sizes))
    b.rules.append(
        Rule(
            f"{name}.{{i}}.e{{x}}.w",
            f"{name}.{{i}}.all",
            f"{side(src)} -> {side(dst)}",
            x=n,
            **sizes,
        )
    )


def unstack(b: Built, name: str) -> None:
    sizes = {"x": b.rng.choice((1, 3, 12)), "a": b.size(), "b": b.size()}
    src = grouped(b.rng, shuffled(b.rng, ("x", "a", "b")))
    dst = grouped(b.rng, shuffled(b.rng, "ab"))
    for layer in range(b.size(2)):
        b.add(f"{name}.{layer}.all", *shape_of(src, sizes))
    b.rules.append(
        Rule(
            f"{name}.{{i}}.all",
            f"{name}.{{i}}.e.{{x}}.w",
            f"{side(src)} -> {side(dst)}",
            **sizes,
        )
    )


def interleave(b: Built, name: str) -> None:
    g, r, d, e = b.size(), b.size(), b.size(), b.size()
    sizes = {"g": g, "d": d, "s": r + 2}
    b.add(f"{name}.q", g * r * d, e)
    b.rules.append(
        Rule(
            f"{name}.q",
            f"{name}.qkv",
            "(g r d) e -> (g s d) e",
            at={"s": "0:r"},
            r=r,
            **sizes,
        )
    )
    for part, at in (("k", "r"), ("v", "r+1")):
        b.add(f"{name}.{part}", g * d, e)
        b.rules.append(
            Rule(
                f"{name}.{part}",
                f"{name}.qkv",
                "(g d) e -> (g s d) e",
                at={"s": at},
                r=r,
                **sizes,
            )
        )


def narrow_source(b: Built, name: str) -> None:
    before, n, behind = b.rng.randint(0, 2), b.size(), b.rng.randint(0, 2)
    source, rows, e = f"{name}.w", before + n + behind, b.size()
    b.add(source, rows, e)
    b.rules.append(
        Rule(source, f"{name}.v", "n e -> m e", at={"n": f"{before}:{before + n}"}, n=rows, m=n)
    )
    if before:
        b.rules.append(Rule(source, None, "n e ->", at={"n": f"0:{before}"}))
        b.drop(source, lambda mask: mask[:before])
    if behind:
        b.rules.append(Rule(source, None, "n e ->", at={"n": f"{before + n}:"}))
        b.drop(source, lambda mask: mask[before + n :])


def narrow_destination(b: Built, name: str) -> None:
    before, n, behind = b.rng.randint(0, 2), b.size(), b.rng.randint(1, 2)
    rows = before + n + behind
    b.add(f"{name}.w", n, b.size())
    b.rules.append(
        Rule(f"{name}.w", f"{name}.v", "m e -> n e", at={"n": f"{before}:{before + n}"}, n=rows)
    )
    for first, last in ((0, before), (before + n, rows)):
        if first < last:
            value = b.rng.choice((None, 0, {"normal": 1.0}))
            if not b.dtype.is_floating_point or b.dtype.itemsize == 1:
                value = None
            b.rules.append(
                Rule(None, f"{name}.v", "-> n e", at={"n": f"{first}:{last}"}, fill=value, n=rows)
            )


def pick(b: Built, name: str) -> None:
    """One index of an axis, the others dropped."""
    n, e = b.rng.randint(2, 4), b.size()
    k = b.rng.randrange(n)
    b.add(f"{name}.w", n * e, 2)
    b.rules.append(Rule(f"{name}.w", f"{name}.v", "(s e) t -> t e", at={"s": k}, s=n))
    for other in range(n):
        if other != k:
            b.rules.append(Rule(f"{name}.w", None, "(s e) t ->", at={"s": other}, s=n))
            b.drop(f"{name}.w", lambda mask, other=other: mask[other * e : (other + 1) * e])


def repeat(b: Built, name: str) -> None:
    h, r, d, e = b.size(), b.size(), b.size(), b.size()
    b.add(f"{name}.k", h * d, e)
    b.rules.append(
        Rule(
            f"{name}.k",
            f"{name}.k",
            b.rng.choice(("(h d) e -> (h r d) e", "(h d) e -> r e (d h)")),
            at={"r": "*"},
            h=h,
            r=r,
        )
    )


def twice(b: Built, name: str) -> None:
    """One source to two destinations, which agree on the way back."""
    b.add(f"{name}.w", b.size(), b.size())
    b.rules += [Rule(f"{name}.w", f"{name}.a"), Rule(f"{name}.w", f"{name}.b", "i o -> o i")]


def drop(b: Built, name: str) -> None:
    for part in ("a.b", "c"):
        b.add(f"{name}.{part}", b.size(), b.size())
        b.drop(f"{name}.{part}", lambda mask: mask)
    b.rules.append(Rule(f"{name}.*", None))


def keep(b: Built, name: str) -> None:
    b.extra[f"{name}.kept.x"] = (b.size(), b.size())
    b.rules.append(Rule(None, f"{name}.*"))


def overlap(b: Built, name: str) -> None:
    """Rows that both have; those beyond are dropped, or kept in the destination, or filled."""
    rows, target, e = b.size(), b.size(), b.size()
    source = b.add(f"{name}.tok", rows, e)
    b.extra[f"{name}.tok"] = (target, e)
    fills: tuple[Any, ...] = (None,)
    if source.dtype.is_floating_point and source.dtype.itemsize > 1:
        fills = (None, "zeros", "mean", {"normal": 0.5, "seed": 3})
    b.rules.append(Rule(f"{name}.tok", f"{name}.tok", rows="overlap", fill=b.rng.choice(fills)))
    if rows > target:
        b.drop(f"{name}.tok", lambda mask: mask[target:])


FORMS = {
    form.__name__: form
    for form in (
        rename,
        permute,
        transpose,
        fuse,
        split,
        concatenate,
        stack,
        unstack,
        interleave,
        narrow_source,
        narrow_destination,
        pick,
        repeat,
        twice,
        drop,
        keep,
        overlap,
    )
}


def build(seed: int, forms: Iterable[str]) -> Built:
    rng = random.Random(seed)
    b = Built(rng)
    for k, form in enumerate(forms):
        b.dtype = rng.choice(DTYPES)
        FORMS[form](b, f"g{k}")
    rng.shuffle(b.rules)
    return b


def destinations(b: Built, guarded: bool = True) -> dict[str, Tensor]:
    """What the rules make of the sources, as guarded tensors of random bits and strides."""
    inferable = [rule for rule in b.rules if rule.rows is None]
    resized = [rule.src for rule in b.rules if rule.rows is not None]
    sources = {n: t for n, t in b.sources.items() if n not in resized}
    shapes = {n: (t.shape, t.dtype) for n, t in infer_destinations(sources, inferable).items()}
    for name, shape in b.extra.items():
        shapes[name] = (torch.Size(shape), b.sources[name].dtype if name in resized else torch.int8)
    return {
        name: place(random_layout(b.rng, shape), dtype, seed=b.rng.randrange(1 << 30))
        if guarded
        else torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }


def emptied(b: Built) -> dict[str, Tensor]:
    """The sources' places on the way back: zero, but for what was dropped."""
    out = {}
    for name, tensor in b.sources.items():
        back = place(random_layout(b.rng, tensor.shape), tensor.dtype, seed=1)
        kept = b.dropped.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
        raw = bits(tensor) * kept.reshape(-1, 1)
        # Whole bytes, so that no conversion touches a NaN.
        flat = raw.reshape(-1).view(tensor.dtype) if raw.numel() else raw.view(tensor.dtype)
        back.copy_(flat.reshape(tensor.shape))
        out[name] = back
    return out


def there_and_back(b: Built) -> None:
    target = destinations(b)
    before = watch(*target.values())
    paramkit.transplant(target, b.sources, b.rules, identity=False)
    before.assert_only_inside()
    back = emptied(b)
    after = watch(*back.values())
    paramkit.transplant(back, target, invert(b.rules), identity=False)
    after.assert_only_inside()
    for name, tensor in b.sources.items():
        assert_same_bits(back[name], tensor, what=f"{name} by {b.rules}")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_there_and_back(backend: str, form: str) -> None:
    for seed in range(5):
        there_and_back(build(seed, [form]))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=6))
def test_random_rules_there_and_back(seed: int, forms: list[str]) -> None:
    there_and_back(build(seed, forms))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=6))
def test_the_inverse_of_the_inverse(seed: int, forms: list[str]) -> None:
    rules = build(seed, forms).rules
    once = invert(rules)
    assert invert(invert(once)) == once
    # Patterns may be spaced otherwise, and fills are not carried back.
    for there, again in zip(rules, invert(once), strict=True):
        assert (there.src, there.dst, there.at, there.rows) == (
            again.src,
            again.dst,
            again.at,
            again.rows,
        )


def test_a_dropped_source_is_left_as_it_is(backend: str) -> None:
    rules = [Rule("a", "b"), Rule("pooler.*", None)]
    source = {"a": torch.randn(3), "pooler.w": torch.randn(2)}
    target = {"b": torch.zeros(3)}
    paramkit.transplant(target, source, rules)
    back = {"a": torch.zeros(3), "pooler.w": torch.full((2,), 7.0)}
    report = paramkit.transplant(back, target, invert(rules))
    assert_same_bits(back["a"], source["a"])
    assert back["pooler.w"].tolist() == [7.0, 7.0]
    assert report.summary.kept == ("pooler.w",)


def test_copies_that_no_longer_agree_do_not_come_back(backend: str) -> None:
    rules = [Rule("k", "k", "(h d) e -> (h r d) e", at={"r": "*"}, h=2, r=3)]
    target = {"k": torch.zeros(12, 5)}
    paramkit.transplant(target, {"k": torch.randn(4, 5)}, rules)
    target["k"][7, 2] += 1
    back = {"k": torch.zeros(4, 5)}
    with pytest.raises(PlanError):
        paramkit.transplant(back, target, invert(rules))
    assert not back["k"].any()


def test_only_rules_can_be_inverted() -> None:
    with pytest.raises(TypeError, match=r"rules\[1\]"):
        invert([Rule("a", "b"), "no rule"])  # type: ignore[list-item]


# ---- nothing is materialised ---------------------------------------------------------------------


STAGING = 1 << 12


class NoNewTensors(TorchDispatchMode):
    """Fails on an operator that returns a tensor of more than one element in memory of its own.

    Args:
        staging: bytes that may be had for the buffer that lazy sources are read through.
    """

    def __init__(self, staging: int = 0) -> None:
        super().__init__()
        self.left = staging

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor) or leaf.numel() <= 1:
                continue
            if leaf.untyped_storage()._cdata in given:
                continue
            if leaf.dtype == torch.uint8 and leaf.dim() == 1 and leaf.numel() <= self.left:
                self.left -= leaf.numel()
                continue
            raise AssertionError(f"{func} made {leaf.dtype} {tuple(leaf.shape)}")
        return out


def test_the_mode_sees_what_is_made() -> None:
    a = torch.zeros(3, 4)
    makers: list[Callable[[], object]] = [
        lambda: torch.zeros(2),
        lambda: torch.empty(2, 2),
        lambda: a.t().contiguous(),
        lambda: torch.cat((a, a)),
        lambda: a.t().reshape(-1),
        lambda: a.float().double(),
        lambda: torch.arange(4),
    ]
    for make in makers:
        for staging in (0, STAGING):
            with NoNewTensors(staging), pytest.raises(AssertionError, match="made"):
                make()
    with NoNewTensors(8), pytest.raises(AssertionError, match="made"):
        torch.empty(9, dtype=torch.uint8)
    with NoNewTensors():
        a.t().unflatten(0, (2, 2)).select(0, 1).copy_(a[:, 1:3].t())
        a.detach().view(-1).narrow(0, 2, 5)
        torch.empty(())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["there", "back"])
def test_no_rule_materialises_a_tensor(backend: str, form: str, way: str) -> None:
    if backend == "cuda:kernels":
        pytest.skip("the list of writes itself is kept on the device, as a tensor")
    for seed in range(4):
        b = build(seed, [form])
        target = destinations(b)
        rules, source = b.rules, b.sources
        if way == "back":
            paramkit.transplant(target, b.sources, b.rules, identity=False)
            rules, source, target = invert(b.rules), target, emptied(b)
        # Normal values and means are made in pieces, in the buffer through which files are read.
        staging = STAGING if any(r.fill and r.fill.kind != "value" for r in rules) else 0
        with NoNewTensors(staging):
            plan = paramkit.plan(target, source, rules, identity=False, staging=staging or None)
        plan.apply()
        for name in b.sources if way == "back" else ():
            assert_same_bits(target[name], b.sources[name], what=name)


@pytest.mark.parametrize("form", sorted({*FORMS} - {"keep"}))
def test_no_rule_materialises_a_tensor_of_a_file(tmp_path: Path, form: str) -> None:
    for seed in range(3):
        b = build(seed, [form])
        path = tmp_path / f"{seed}.safetensors"
        save_file({n: t.contiguous() for n, t in b.sources.items()}, path)
        target = destinations(b)
        with NoNewTensors(STAGING):
            plan = paramkit.plan(target, path, b.rules, identity=False, staging=STAGING)
        plan.apply()
        back = emptied(b)
        paramkit.transplant(back, target, invert(b.rules), identity=False)
        for name, tensor in b.sources.items():
            assert_same_bits(back[name], tensor, what=name)
