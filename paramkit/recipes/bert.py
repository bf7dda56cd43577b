"""BERT's layout to stock `torch.nn.TransformerEncoder` layers."""

from __future__ import annotations

from collections.abc import Sequence

from ..rules import Rule

__all__ = ["bert_to_transformer_encoder"]


def bert_to_transformer_encoder(
    source: str = "",
    target: str = "",
    *,
    drop: Sequence[str] = ("pooler.*", "embeddings.position_ids"),
) -> list[Rule]:
    """Rules from a BERT checkpoint to embeddings and an `nn.TransformerEncoder`.

    BERT keeps query, key and value apart; `nn.MultiheadAttention` has them in one `in_proj_weight` of
    shape (3 * e, e) and one `in_proj_bias` of shape (3 * e,). Each goes into its third.

    Args:
        source: prefix of the source names, such as `"bert."`.
        target: prefix of the destination names. Below it are expected `embeddings.tokens`,
            `embeddings.positions`, `embeddings.segments` (each an `nn.Embedding`),
            `embeddings.norm` (an `nn.LayerNorm`), and `encoder` (an `nn.TransformerEncoder` with
            `norm_first=False`).
        drop: source names, without the prefix, that are left out on purpose; `*` stands for any run
            of characters. Each must exist, as for every rule.

    Returns:
        The rules; they cover every parameter of such a model.

    Raises:
        ValueError: a prefix or a name that cannot be read as a template.

    Example:
        >>> rules = bert_to_transformer_encoder("bert.", drop=["pooler.*"])
        >>> print(rules[-1])
        Rule('bert.pooler.*', None)
    """
    layer, stock = f"{source}encoder.layer.{{i}}", f"{target}encoder.layers.{{i}}"
    rules = [
        Rule(f"{source}embeddings.word_embeddings.weight", f"{target}embeddings.tokens.weight"),
        Rule(
            f"{source}embeddings.position_embeddings.weight", f"{target}embeddings.positions.weight"
        ),
        Rule(
            f"{source}embeddings.token_type_embeddings.weight",
            f"{target}embeddings.segments.weight",
        ),
        Rule(f"{source}embeddings.LayerNorm.{{p}}", f"{target}embeddings.norm.{{p}}"),
    ]
    for third, part in enumerate(("query", "key", "value")):
        name, fused = f"{layer}.attention.self.{part}", f"{stock}.self_attn.in_proj"
        rules += [
            Rule(f"{name}.weight", f"{fused}_weight", "h e -> (s h) e", at={"s": third}),
            Rule(f"{name}.bias", f"{fused}_bias", "h -> (s h)", at={"s": third}),
        ]
    # {p} is weight or bias: the same module under another name.
    rules += [
        Rule(f"{layer}.attention.output.dense.{{p}}", f"{stock}.self_attn.out_proj.{{p}}"),
        Rule(f"{layer}.attention.output.LayerNorm.{{p}}", f"{stock}.norm1.{{p}}"),
        Rule(f"{layer}.intermediate.dense.{{p}}", f"{stock}.linear1.{{p}}"),
        Rule(f"{layer}.output.dense.{{p}}", f"{stock}.linear2.{{p}}"),
        Rule(f"{layer}.output.LayerNorm.{{p}}", f"{stock}.norm2.{{p}}"),
    ]
    return rules + [Rule(source + name, None) for name in drop]
