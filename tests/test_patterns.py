"""Axis patterns against reshape, index and permute done by hand, on strided tensors with guards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramkit import patterns
from paramkit.patterns import Mismatch, View, compile, parse, parse_at


def write(dst: torch.Tensor, src: torch.Tensor, sizes: tuple[int, ...], d: View, s: View) -> None:
    """The write that a compiled pattern describes, by torch."""
    target = dst.as_strided(sizes, d.strides, dst.storage_offset() + d.offset)
    target.copy_(src.as_strided(sizes, s.strides, src.storage_offset() + s.offset))


@st.composite
def layouts(draw: st.DrawFn) -> dict:
    """Two sides that share some axes, each with pinned axes of its own, in any order and grouping."""
    axes = {
        name: draw(st.integers(1, 4))
        for name in draw(st.permutations("abcd"))[: draw(st.integers(0, 4))]
    }
    shared = list(axes)
    pins: dict[str, int | str] = {}
    renamed: dict[str, str] = {}  # destination axis -> source axis, of a pair made by a range
    sides = {"src": list(shared), "dst": list(shared)}
    for side, name in (("src", "p"), ("dst", "q")):
        if draw(st.booleans()):
            axes[name] = draw(st.integers(1, 4))
            pins[name] = draw(st.integers(-axes[name], axes[name] - 1))
            sides[side].append(name)
    if draw(st.booleans()):
        long, short = draw(st.sampled_from([("src", "dst"), ("dst", "src")]))
        axes["n"] = draw(st.integers(1, 3))
        start, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        axes["r"] = start + axes["n"] + after
        stop = start + axes["n"]
        forms = [
            f"{start}:{stop}",
            f"{start}:{start}+n",
            f"{start}:{-after}" if after else f"{start}:",
        ]
        pins["r"] = draw(st.sampled_from(forms))
        sides[long].append("r")
        sides[short].append("n")
        renamed = {"r": "n"} if long == "dst" else {"n": "r"}
        axes["_start"] = start
    grouped = {}
    for side, names in sides.items():
        order = draw(st.permutations(names))
        groups: list[list[str]] = []
        for axis in order:
            if groups and draw(st.booleans()):
                groups[-1].append(axis)
            else:
                groups.append([axis])
        for _ in range(draw(st.integers(0, 1))):
            groups.insert(draw(st.integers(0, len(groups))), [])
        grouped[side] = groups
    return {"axes": axes, "pins": pins, "renamed": renamed, **grouped}


def text(groups: list[list[str]]) -> str:
    return " ".join("1" if not g else g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


def shape(groups: list[list[str]], axes: dict[str, int]) -> tuple[int, ...]:
    out = []
    for group in groups:
        size = 1
        for axis in group:
            size *= axes[axis]
        out.append(size)
    return tuple(out)


def strided(
    sizes: tuple[int, ...], seed: int, fill: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(storage, tensor of these sizes in it): permuted, with gaps between elements, off the start."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=generator).tolist()
    steps = torch.randint(1, 3, (len(sizes),), generator=generator).tolist()
    room = [sizes[k] * steps[k] + 1 for k in order]
    count = 1
    for n in room:
        count *= n
    base = (
        torch.randn(count + 2, generator=generator)
        if fill is None
        else torch.full((count + 2,), fill)
    )
    view = base[1:-1].view(room)
    for dim, k in enumerate(order):
        view = view.narrow(dim, 0, sizes[k] * steps[k])
    view = view[tuple(slice(None, None, steps[k]) for k in order)]
    inverse = [order.index(k) for k in range(len(sizes))]
    return base, view.permute(inverse)


@settings(max_examples=400, deadline=None)
@given(layouts(), st.integers(0, 2**20))
def test_against_reshape_and_permute(layout: dict, seed: int) -> None:
    axes, pins, renamed = layout["axes"], layout["pins"], layout["renamed"]
    src_shape, dst_shape = shape(layout["src"], axes), shape(layout["dst"], axes)
    _, src = strided(src_shape, seed)
    base, dst = strided(dst_shape, seed + 1, fill=-7.0)
    assert src.shape == src_shape and dst.shape == dst_shape
    pattern = f"{text(layout['src'])} -> {text(layout['dst'])}"
    given_sizes = {k: v for k, v in axes.items() if len(k) == 1 and k not in "r"}
    if "r" in axes:
        given_sizes["r"] = axes["r"]
    sizes, d, s, _ = compile(
        pattern, pins, given_sizes, src_shape, src.stride(), dst_shape, dst.stride()
    )

    # By hand: split by reshape, pin by indexing, order by permute.
    src_axes = [a for g in layout["src"] for a in g]
    dst_axes = [a for g in layout["dst"] for a in g]
    value = src.reshape([axes[a] for a in src_axes])
    expected = torch.full(dst_shape, -7.0).reshape([axes[a] for a in dst_axes])
    start = axes.get("_start", 0)

    def index(names: list[str]) -> tuple:
        chosen = {
            a: slice(start, start + axes["n"]) if a == "r" else pins.get(a, slice(None))
            for a in names
        }
        return tuple(chosen[a] for a in names)

    left = [a for a in src_axes if not isinstance(pins.get(a), int)]
    wanted = [renamed.get(a, a) for a in dst_axes if not isinstance(pins.get(a), int)]
    part = value[index(src_axes)].permute([left.index(a) for a in wanted])
    expected[index(dst_axes)] = part
    before = base.clone()
    expected_base = base.clone()
    expected_base.as_strided(dst.shape, dst.stride(), dst.storage_offset()).copy_(
        expected.reshape(dst_shape)
    )

    write(dst, src, sizes, d, s)
    assert torch.equal(dst, expected.reshape(dst_shape))
    assert torch.equal(base, expected_base)  # nothing beside the view was touched
    assert d.sizes == s.sizes == sizes
    assert before.shape == base.shape


CASES = {
    "transpose": ("i o -> o i", {}, {}, (2, 3), (3, 2), lambda x: x.T),
    "rotary": (
        "(h two d) e -> (h d two) e",
        {},
        {"two": 2, "h": 3},
        (24, 5),
        (24, 5),
        lambda x: x.reshape(3, 2, 4, 5).transpose(1, 2).reshape(24, 5),
    ),
    "split": ("(s h) e -> h e", {"s": 2}, {"s": 3}, (6, 4), (2, 4), lambda x: x[4:6]),
    "to scalar": ("1 ->", {}, {}, (1,), (), lambda x: x[0]),
    "linear to conv": (
        "o i -> o i 1 1",
        {},
        {},
        (2, 3),
        (2, 3, 1, 1),
        lambda x: x[..., None, None],
    ),
    "drop a size one axis": ("a o -> o", {}, {}, (1, 3), (3,), lambda x: x[0]),
    "negative index": ("a o -> o", {"a": -1}, {}, (4, 3), (3,), lambda x: x[3]),
    "range of the source": ("v e -> w e", {"v": "2:5"}, {}, (7, 2), (3, 2), lambda x: x[2:5]),
    "open range": ("v e -> w e", {"v": "4:"}, {}, (7, 2), (3, 2), lambda x: x[4:]),
}


@pytest.mark.parametrize("name", CASES)
def test_named_cases(name: str) -> None:
    pattern, at, given_sizes, src_shape, dst_shape, by_hand = CASES[name]
    src, dst = torch.randn(src_shape), torch.zeros(dst_shape)
    write(
        dst,
        src,
        *compile(pattern, at, given_sizes, src_shape, src.stride(), dst_shape, dst.stride())[:3],
    )
    assert torch.equal(dst, by_hand(src))


def test_grouped_query_interleave() -> None:
    """q takes the first r of r + 2 heads of each group, k and v one each."""
    g, r, d, e = 2, 3, 4, 5
    q, k, v = torch.randn(g * r * d, e), torch.randn(g * d, e), torch.randn(g * d, e)
    dst = torch.zeros(g * (r + 2) * d, e)
    known = {"g": g, "d": d}
    one, many = "(g d) e -> (g s d) e", "(g r d) e -> (g s d) e"
    for src, pattern, at, sizes in (
        (q, many, {"s": "0:r"}, known),
        (k, one, {"s": "r"}, {**known, "r": r}),
        (v, one, {"s": "r+1"}, {**known, "r": r}),
    ):
        write(
            dst,
            src,
            *compile(pattern, at, sizes, src.shape, src.stride(), dst.shape, dst.stride())[:3],
        )
    q, k, v = q.view(g, r, d, e), k.view(g, 1, d, e), v.view(g, 1, d, e)
    assert torch.equal(dst, torch.cat([q, k, v], 1).reshape(-1, e))


MISMATCHES = {
    "rank": ("a b -> a b", {}, {}, (2, 3, 4), (2, 3), "source (2, 3, 4) with 3 axes", "2 axes"),
    "sizes differ": ("a b -> b a", {}, {}, (2, 3), (2, 3), "2 on dimension 0", "b=3"),
    "not divisible": ("h e -> (s h) e", {"s": 0}, {}, (4, 2), (9, 2), "size 9 for (s h)", "a multiple of h=4"),
    "given size wrong": ("(a b) -> a b", {}, {"a": 3}, (8,), (3, 2), "size 8", "a multiple of a=3"),
    "unknown": ("(a b) -> (b a)", {}, {}, (8,), (8,), "axis a cannot be worked out", "a=..."),
    "one side": ("h e -> (s h) e", {}, {}, (4, 2), (12, 2), "axis s of size 3", "at="),
    "index too large": ("h -> (s h)", {"s": 3}, {}, (4,), (12,), "index 3 for axis s", "size 3"),
    "index needs a size": ("h -> (s h)", {"s": "r"}, {}, (4,), (12,), "needs the size of r", "r=..."),
    "range too long": ("v -> w", {"v": "2:9"}, {}, (7,), (7,), "2:9", "within 0:7"),
    "range of another length": ("v -> w", {"v": "0:5"}, {}, (7,), (4,), "axis w of size 4", "5"),
    "range without a partner": ("v e -> e", {"v": "0:5"}, {}, (7, 2), (2,), "selects 5 of 7", ""),
    "range with two partners": (
        "v -> (w x)", {"v": "0:6"}, {"w": 2}, (7,), (6,), "any of w, x", "0:w",
    ),
    "literal one": ("a 1 -> a", {}, {}, (3, 2), (3,), "2 on dimension 1", "1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatches_name_the_axis(name: str) -> None:
    pattern, at, sizes, src, dst, got, other = MISMATCHES[name]
    ones = lambda n: (1,) * len(n)  # noqa: E731
    with pytest.raises(Mismatch) as caught:
        compile(pattern, at, sizes, src, ones(src), dst, ones(dst))
    assert got in caught.value.got
    assert other in f"{caught.value.expected} {caught.value.hint}"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a b", 'no "->"'),
        ("a -> b -> c", "out of place"),
        ("(a -> a", "out of place"),
        ("a -> (a", 'without ")"'),
        ("a) -> a", 'without "("'),
        ("((a) b) -> a b", "group within a group"),
        ("a a -> a", "axis a stands twice on the source side"),
        ("a -> (a a)", "twice on the destination side"),
        ("a 2 -> a", 'cannot read "2"'),
        ("a ... -> a", 'cannot read "."'),
        ("", 'no "->"'),
    ],
)
def test_unreadable_patterns(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"pattern") as caught:
        parse(pattern)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "a-", "r+", "1.5", "r/2", "(r)", "a:b:c", "r 2 !", "--1x"])
def test_unreadable_indices(text: str) -> None:
    with pytest.raises(ValueError, match="at "):
        parse_at(text)


def test_indices_are_sums_of_products() -> None:
    entry = parse_at("2*r + s - 1")
    assert entry.start is not None
    assert entry.start.value({"r": 4, "s": 3}) == 10
    assert entry.start.value({"r": 4}) is None


def test_pins_only_on_axes_of_one_side() -> None:
    with pytest.raises(ValueError, match="not an axis of one side alone"):
        compile("a -> a", {"a": 0}, {}, (2,), (1,), (2,), (1,))


def test_zero_sizes() -> None:
    sizes, *_ = compile("h e -> (s h) e", {"s": 1}, {"s": 3}, (0, 4), (4, 1), (0, 4), (4, 1))
    assert sizes == (0, 4)


def test_module_touches_no_torch() -> None:
    assert "torch" not in vars(patterns)
