"""Small models in plain torch, under the names that the recipes lead to.

Each is written from what its layout means, not from the rules: fused rows are cut where the fused layer
is used, and rotary pairs are complex numbers where the layout has pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FusedDecoder",
    "Gpt2Linear",
    "Gpt2Split",
    "MegatronDecoder",
    "MetaDecoder",
    "Sizes",
    "TimmVit",
    "TorchvisionVit",
    "halves",
    "pairs",
]


class Sizes:
    """The sizes that all of these models go by; `bias` and `norms` are of query, key (and value)."""

    def __init__(self, config: object, *, bias: bool = False, norms: bool = False) -> None:
        self.hidden: int = config.hidden_size  # type: ignore[attr-defined]
        self.layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
        self.heads: int = config.num_attention_heads  # type: ignore[attr-defined]
        self.kv: int = getattr(config, "num_key_value_heads", self.heads)
        self.dim: int = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.inner: int = getattr(config, "intermediate_size", None) or 4 * self.hidden
        self.vocab: int = getattr(config, "vocab_size", 0)
        self.bias, self.norms = bias, norms


def parts(**modules: nn.Module) -> nn.Module:
    """A module that only holds others, for the dots in a name."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (b, t, h, d), k and v (b, t, g, d), each of the g for h // g heads in a row -> (b, t, h * d)."""
    b, t, h, d = q.shape
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / d**0.5
    scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(b, t, h * d)


def angles(length: int, dim: int) -> Tensor:
    """(length, dim / 2): how far each pair turns at each position."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.arange(length)[:, None] * frequency


def halves(x: Tensor) -> Tensor:
    """Rotary positions, number j of a head paired with number j + d / 2; x (b, t, h, d)."""
    turn = angles(x.shape[1], x.shape[3])[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * turn.cos() - b * turn.sin(), b * turn.cos() + a * turn.sin()), -1)


def pairs(x: Tensor) -> Tensor:
    """Rotary positions, number 2 j of a head paired with number 2 j + 1; x (b, t, h, d)."""
    turn = angles(x.shape[1], x.shape[3])[:, None]
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(turn), turn)).flatten(-2)


class RmsNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


class NormLinear(nn.Linear):
    """Transformer Engine's layer: the norm in front of a linear layer is a weight of that layer."""

    def __init__(self, size: int, out: int, bias: bool) -> None:
        super().__init__(size, out, bias)
        self.layer_norm_weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(normed(x, self.layer_norm_weight))


# Decoders of the Llama family.


class FusedDecoder(nn.Module):
    """Rows of query, key, value one after the other in `qkv_proj`, gate and up in `gate_up_proj`."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.model = parts(
            embed_tokens=nn.Embedding(s.vocab, s.hidden),
            layers=nn.ModuleList(self._layer(s) for _ in range(s.layers)),
            norm=RmsNorm(s.hidden),
        )
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        attention = parts(
            qkv_proj=nn.Linear(s.hidden, (s.heads + 2 * s.kv) * s.dim, s.bias),
            o_proj=nn.Linear(s.heads * s.dim, s.hidden, bias=False),
        )
        if s.norms:
            attention.q_norm, attention.k_norm = RmsNorm(s.dim), RmsNorm(s.dim)
        return parts(
            input_layernorm=RmsNorm(s.hidden),
            self_attn=attention,
            post_attention_layernorm=RmsNorm(s.hidden),
            mlp=parts(
                gate_up_proj=nn.Linear(s.hidden, 2 * s.inner, bias=False),
                down_proj=nn.Linear(s.inner, s.hidden, bias=False),
            ),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, t) -> logits (b, t, vocab)."""
        s, x = self.s, self.model.embed_tokens(ids)
        for layer in self.model.layers:
            a, mlp = layer.self_attn, layer.mlp
            rows = a.qkv_proj(layer.input_layernorm(x)).unflatten(-1, (-1, s.dim))
            q, k, v = rows.split((s.heads, s.kv, s.kv), 2)
            if s.norms:
                q, k = a.q_norm(q), a.k_norm(k)
            x = x + a.o_proj(causal(halves(q), halves(k), v))
            gate, up = mlp.gate_up_proj(layer.post_attention_layernorm(x)).chunk(2, -1)
            x = x + mlp.down_proj(F.silu(gate) * up)
        return self.lm_head(self.model.norm(x))


class MegatronDecoder(nn.Module):
    """`linear_qkv` holds, for each key and value head, its query heads, the key and the value."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.embedding = parts(word_embeddings=nn.Embedding(s.vocab, s.hidden))
        self.decoder = parts(
            layers=nn.ModuleList(self._layer(s) for _ in range(s.layers)),
            final_layernorm=RmsNorm(s.hidden),
        )
        self.output_layer = nn.Linear(s.hidden, s.vocab, bias=False)

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        attention = parts(
            linear_qkv=NormLinear(s.hidden, (s.heads + 2 * s.kv) * s.dim, s.bias),
            linear_proj=nn.Linear(s.heads * s.dim, s.hidden, bias=False),
        )
        if s.norms:
            attention.q_layernorm, attention.k_layernorm = RmsNorm(s.dim), RmsNorm(s.dim)
        return parts(
            self_attention=attention,
            mlp=parts(
                linear_fc1=NormLinear(s.hidden, 2 * s.inner, bias=False),
                linear_fc2=nn.Linear(s.inner, s.hidden, bias=False),
            ),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, t) -> logits (b, t, vocab)."""
        s, x = self.s, self.embedding.word_embeddings(ids)
        group = s.heads // s.kv
        for layer in self.decoder.layers:
            a, mlp = layer.self_attention, layer.mlp
            mixed = a.linear_qkv(x).unflatten(-1, (s.kv, group + 2, s.dim))
            q = mixed[..., :group, :].flatten(2, 3)
            k, v = mixed[..., group, :], mixed[..., group + 1, :]
            if s.norms:
                q, k = a.q_layernorm(q), a.k_layernorm(k)
            x = x + a.linear_proj(causal(halves(q), halves(k), v))
            gate, up = mlp.linear_fc1(x).chunk(2, -1)
            x = x + mlp.linear_fc2(F.silu(gate) * up)
        return self.output_layer(self.decoder.final_layernorm(x))


class MetaDecoder(nn.Module):
    """Llama as first published: rotary pairs side by side."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.tok_embeddings = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(self._layer(s) for _ in range(s.layers))
        self.norm = RmsNorm(s.hidden)
        self.output = nn.Linear(s.hidden, s.vocab, bias=False)

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        def linear(size: int, out: int) -> nn.Module:
            return nn.Linear(size, out, bias=False)

        return parts(
            attention=parts(
                wq=linear(s.hidden, s.heads * s.dim),
                wk=linear(s.hidden, s.kv * s.dim),
                wv=linear(s.hidden, s.kv * s.dim),
                wo=linear(s.heads * s.dim, s.hidden),
            ),
            feed_forward=parts(
                w1=linear(s.hidden, s.inner),
                w2=linear(s.inner, s.hidden),
                w3=linear(s.hidden, s.inner),
            ),
            attention_norm=RmsNorm(s.hidden),
            ffn_norm=RmsNorm(s.hidden),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, t) -> logits (b, t, vocab)."""
        s, x = self.s, self.tok_embeddings(ids)
        for layer in self.layers:
            a, mlp = layer.attention, layer.feed_forward
            seen = layer.attention_norm(x)
            q, k, v = (w(seen).unflatten(-1, (-1, s.dim)) for w in (a.wq, a.wk, a.wv))
            x = x + a.wo(causal(pairs(q), pairs(k), v))
            seen = layer.ffn_norm(x)
            x = x + mlp.w2(F.silu(mlp.w1(seen)) * mlp.w3(seen))
        return self.output(self.norm(x))


# GPT-2.


class Gpt2Linear(nn.Module):
    """GPT-2 with linear layers, under its own names, as in nanoGPT. The head shares the embedding."""

    def __init__(self, s: Sizes, positions: int) -> None:
        super().__init__()
        self.s = s
        self.transformer = parts(
            wte=nn.Embedding(s.vocab, s.hidden),
            wpe=nn.Embedding(positions, s.hidden),
            h=nn.ModuleList(self._layer(s) for _ in range(s.layers)),
            ln_f=nn.LayerNorm(s.hidden),
        )
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        return parts(
            ln_1=nn.LayerNorm(s.hidden),
            attn=parts(
                c_attn=nn.Linear(s.hidden, 3 * s.hidden), c_proj=nn.Linear(s.hidden, s.hidden)
            ),
            ln_2=nn.LayerNorm(s.hidden),
            mlp=parts(c_fc=nn.Linear(s.hidden, s.inner), c_proj=nn.Linear(s.inner, s.hidden)),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, t) -> logits (b, t, vocab)."""
        s, t = self.s, self.transformer
        x = t.wte(ids) + t.wpe.weight[: ids.shape[1]]
        for layer in t.h:
            rows = layer.attn.c_attn(layer.ln_1(x)).unflatten(-1, (3, s.heads, s.dim))
            x = x + layer.attn.c_proj(causal(*rows.unbind(2)))
            inner = F.gelu(layer.mlp.c_fc(layer.ln_2(x)), approximate="tanh")
            x = x + layer.mlp.c_proj(inner)
        return self.lm_head(t.ln_f(x))


class Gpt2Split(nn.Module):
    """GPT-2 with a linear layer each for query, key and value. The head shares the embedding."""

    def __init__(self, s: Sizes, positions: int) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.embed_positions = nn.Embedding(positions, s.hidden)
        self.layers = nn.ModuleList(self._layer(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.hidden)

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        square = {f"{p}_proj": nn.Linear(s.hidden, s.hidden) for p in "qkvo"}
        return parts(
            input_layernorm=nn.LayerNorm(s.hidden),
            self_attn=parts(**square),
            post_attention_layernorm=nn.LayerNorm(s.hidden),
            mlp=parts(up_proj=nn.Linear(s.hidden, s.inner), down_proj=nn.Linear(s.inner, s.hidden)),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, t) -> logits (b, t, vocab)."""
        s = self.s
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]
        for layer in self.layers:
            a, seen = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (p(seen).unflatten(-1, (-1, s.dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
            x = x + a.o_proj(causal(q, k, v))
            inner = F.gelu(layer.mlp.up_proj(layer.post_attention_layernorm(x)), approximate="tanh")
            x = x + layer.mlp.down_proj(inner)
        return F.linear(self.norm(x), self.embed_tokens.weight)


# Vision transformers.


class TimmVit(nn.Module):
    """timm's names: `blocks.{i}.attn.qkv` is one linear layer."""

    def __init__(self, s: Sizes, patch: int, patches: int, classes: int) -> None:
        super().__init__()
        self.s = s
        self.cls_token = nn.Parameter(torch.zeros(1, 1, s.hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, s.hidden))
        self.patch_embed = parts(proj=nn.Conv2d(3, s.hidden, patch, patch))
        self.blocks = nn.ModuleList(self._layer(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.hidden, eps=1e-12)
        self.head = nn.Linear(s.hidden, classes)

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        return parts(
            norm1=nn.LayerNorm(s.hidden, eps=1e-12),
            attn=parts(qkv=nn.Linear(s.hidden, 3 * s.hidden), proj=nn.Linear(s.hidden, s.hidden)),
            norm2=nn.LayerNorm(s.hidden, eps=1e-12),
            mlp=parts(fc1=nn.Linear(s.hidden, s.inner), fc2=nn.Linear(s.inner, s.hidden)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, height, width) -> logits (b, classes)."""
        s, b = self.s, len(images)
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(b, -1, -1), x), 1) + self.pos_embed
        for block in self.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, s.heads, s.dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(seen)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return self.head(self.norm(x)[:, 0])


class TorchvisionVit(nn.Module):
    """torchvision's names: stock `nn.MultiheadAttention` and an `nn.Sequential` of five modules."""

    def __init__(self, s: Sizes, patch: int, patches: int, classes: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, s.hidden))
        self.conv_proj = nn.Conv2d(3, s.hidden, patch, patch)
        layers = nn.ModuleDict({f"encoder_layer_{i}": self._layer(s) for i in range(s.layers)})
        self.encoder = parts(layers=layers, ln=nn.LayerNorm(s.hidden, eps=1e-12))
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, patches + 1, s.hidden))
        self.heads = parts(head=nn.Linear(s.hidden, classes))

    @staticmethod
    def _layer(s: Sizes) -> nn.Module:
        return parts(
            ln_1=nn.LayerNorm(s.hidden, eps=1e-12),
            self_attention=nn.MultiheadAttention(s.hidden, s.heads, batch_first=True),
            ln_2=nn.LayerNorm(s.hidden, eps=1e-12),
            mlp=nn.Sequential(
                nn.Linear(s.hidden, s.inner),
                nn.GELU(),
                nn.Dropout(0.0),
                nn.Linear(s.inner, s.hidden),
                nn.Dropout(0.0),
            ),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, height, width) -> logits (b, classes)."""
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(images), -1, -1), x), 1)
        x = x + self.encoder.pos_embedding
        for layer in self.encoder.layers.values():
            seen = layer.ln_1(x)
            x = x + layer.self_attention(seen, seen, seen, need_weights=False)[0]
            x = x + layer.mlp(layer.ln_2(x))
        return self.heads.head(self.encoder.ln(x)[:, 0])
