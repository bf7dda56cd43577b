"""The table of a plan: folded by layer range, totals that are right, a width that is kept."""

from __future__ import annotations

import torch

from paramkit import Rule
from paramkit.explain import bytes_text, explain
from paramkit.resolve import Resolved, resolve


def example(layers: int = 6) -> Resolved:
    model: dict[str, torch.Tensor] = {}
    source: dict[str, torch.Tensor] = {}
    for i in range(layers):
        for part in ("query", "key", "value"):
            source[f"encoder.layer.{i}.attention.self.{part}.weight"] = torch.zeros(4, 3)
        for e in range(8):
            source[f"encoder.layer.{i}.mlp.experts.{e}.w1"] = torch.zeros(3, 2)
        source[f"layers.{i}.norm"] = torch.zeros(3, dtype=torch.float16)
        model[f"layers.{i}.self_attn.in_proj_weight"] = torch.zeros(12, 3)
        model[f"layers.{i}.experts.w1"] = torch.zeros(8, 2, 3)
        model[f"layers.{i}.norm"] = torch.zeros(3)
    model["head.weight"] = source["pooler.weight"] = source["ids"] = torch.zeros(3)
    rules = [
        Rule(
            f"encoder.layer.{{i}}.attention.self.{part}.weight",
            "layers.{i}.self_attn.in_proj_weight",
            "h e -> (s h) e",
            at={"s": s},
        )
        for s, part in enumerate(("query", "key", "value"))
    ]
    rules.append(
        Rule("encoder.layer.{i}.mlp.experts.{e}.w1", "layers.{i}.experts.w1", "o i -> e i o")
    )
    rules.append(Rule("pooler.*", None))
    return resolve(model, source, rules, allow_missing=["head.*"], allow_unexpected=["ids"])


def test_rows_are_folded_by_layer_and_by_expert() -> None:
    text = explain(example(), width=200)
    lines = text.splitlines()
    assert lines[0].split() == ["destination", "source", "shape", "dtype", "how"]
    rows = lines[1 : lines.index("")]
    assert [row.split("  ")[0] for row in rows] == [
        "layers.{0..5}.self_attn.in_proj_weight",
        "layers.{0..5}.self_attn.in_proj_weight",
        "layers.{0..5}.self_attn.in_proj_weight",
        "layers.{0..5}.experts.w1",
        "layers.{0..5}.norm",
    ]
    assert "encoder.layer.{0..5}.attention.self.key.weight    (4, 3)" in rows[1]
    assert rows[1].endswith("h e -> (s h) e, s=1")
    assert "encoder.layer.{0..5}.mlp.experts.{0..7}.w1" in rows[3]
    assert rows[3].endswith("o i -> e i o, e={e}")
    assert "the same" in rows[4]
    assert "float16 -> float32" in rows[4]
    # Columns stand below their heads.
    assert all(row[lines[0].index("dtype") - 1] == " " for row in rows)
    assert all(row[lines[0].index("how") :].strip() for row in rows)


def test_totals() -> None:
    text = explain(example())
    elements = 6 * (3 * 12 + 8 * 6 + 3)
    assert (
        f"72 writes into 18 of 19 tensors, {elements} elements, {bytes_text(4 * elements)}" in text
    )
    assert "casts: float16 -> float32 (6)" in text
    assert "kept as they are (1): head.weight" in text
    assert "dropped from the source (2): pooler.weight, ids" in text


def test_lines_keep_within_the_width() -> None:
    resolved = example(layers=12)
    for width in (120, 110):
        assert max(map(len, explain(resolved, width=width).splitlines())) <= width
    # The layer range and the end of a name survive the shortening.
    assert "{0..11}" in explain(resolved, width=110).splitlines()[1]
    assert "query.weight" in explain(resolved, width=110).splitlines()[1]


def test_names_that_would_become_equal_get_two_lines() -> None:
    sources = [
        "encoder.layer.0.cross_attention.output.weight",
        "encoder.layer.0.other_attention.output.weight",
    ]
    rules = [Rule(name, f"encoder.layers.0.linear{k}.weight") for k, name in enumerate(sources)]
    model = {rule.dst: torch.zeros(2, 3) for rule in rules}
    resolved = resolve(model, dict.fromkeys(sources, torch.zeros(2, 3)), rules)
    assert explain(resolved, width=80).splitlines() == [
        "destination <- source            shape   dtype    how",
        "encoder.layers.0.linear0.weight  (2, 3)  float32  whole",
        "  <- encoder.layer.0.cross_attention.output.weight",
        "encoder.layers.0.linear1.weight  (2, 3)  float32  whole",
        "  <- encoder.layer.0.other_attention.output.weight",
        "",
        "2 writes into 2 of 2 tensors, 12 elements, 48 bytes",
    ]


def test_routes_are_shown_and_split_rows() -> None:
    resolved = example()
    routes = {k: "native" if k == 0 else "contiguous" for k in range(len(resolved.writes))}
    text = explain(resolved, routes)
    assert text.count("[native]") == 1
    assert "[contiguous]" in text
    assert "kernels: 71 contiguous, 1 native" in text


def test_a_single_route_is_said_once() -> None:
    resolved = example()
    text = explain(resolved, dict.fromkeys(range(len(resolved.writes)), "copy"))
    assert "[copy]" not in text
    assert "kernels: 72 copy" in text


def test_a_number_in_source_and_destination_that_is_not_the_same() -> None:
    model = {f"b.{i}.w": torch.zeros(1) for i in range(3)}
    source = {f"a.{i + 1}.w": torch.zeros(1) for i in range(3)}
    rules = [Rule(f"a.{i + 1}.w", f"b.{i}.w") for i in range(3)]
    rows = explain(resolve(model, source, rules)).splitlines()[1:4]
    assert [row.split()[:2] for row in rows] == [[f"b.{i}.w", f"a.{i + 1}.w"] for i in range(3)]


def test_ties_are_shown_under_the_name_that_the_source_has() -> None:
    tied = torch.nn.ModuleDict(
        {"tok": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)}
    )
    tied["head"].weight = tied["tok"].weight
    text = explain(resolve(tied, {"head.weight": torch.zeros(4, 3)}))
    assert text.splitlines()[1].startswith("head.weight  the same")


def test_nothing_to_write() -> None:
    assert explain(resolve({}, {})) == "0 writes into 0 of 0 tensors, 0 elements, 0 bytes"


def test_bytes_text() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1024, 1 << 20, 3 << 29, 1 << 50)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "1.0 MiB", "1.5 GiB", "1024.0 TiB",
    ]  # fmt: skip
