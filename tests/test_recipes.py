"""Recipes: models of transformers and models in plain torch agree, and the way back gives every bit.

What transformers saves is the source, so that its own conversions between checkpoint and module are the
reference where it has any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule, RuleFileError, invert, recipes
from paramkit.shapes import infer_destinations
from tests import recipe_models as plain
from tests.conftest import need_module
from tests.guards import assert_same_bits

yaml = need_module("yaml")
transformers = need_module("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

MAJOR = int(transformers.__version__.split(".")[0])
SEEDS = (0, 1)


# ---- the models ----------------------------------------------------------------------------------


@dataclass
class Case:
    """A model of transformers, its counterpart, and how both are called.

    Attributes:
        config, kind: the model is `kind(config)`.
        target: makes the counterpart.
        run: the model's output, and `run_target` the counterpart's.
        options: for `recipes.load`, beside the config.
    """

    config: Any
    kind: Any
    target: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    run_target: Callable[[nn.Module], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def rules(self, name: str) -> list[Rule]:
        return recipes.load(name, config=self.config, **self.options)

    def model(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A model of random values, or of those of a checkpoint, loaded by transformers."""
        if tensors is None:
            return randomized(self.kind(self.config).eval())
        loaded = self.kind.from_pretrained(None, config=self.config, state_dict=dict(tensors))
        return loaded.eval()


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Values large enough that a row in the wrong place shows in the output."""
    for name, p in model.named_parameters():
        p.normal_(0, 0.5 if p.dim() > 1 else 0.2)
        if p.dim() == 1 and name.endswith("weight"):
            p.add_(1)  # a norm
    return model


def decoder_sizes(rng: random.Random) -> dict[str, int]:
    kv, dim = rng.choice((1, 2, 3)), rng.choice((4, 6, 8))
    heads = kv * rng.choice((2, 3))
    return {
        "num_key_value_heads": kv,
        "num_attention_heads": heads,
        "head_dim": dim,
        "hidden_size": heads * dim,
        "intermediate_size": rng.randint(5, 30),
        "num_hidden_layers": rng.choice((1, 2)),
        "vocab_size": rng.randint(20, 40),
        "max_position_embeddings": 32,
    }


def text(config: Any) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(5))


EAGER = {"attn_implementation": "eager"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **EAGER, **TOKENS}


def decoder(
    kind: str, target: Callable[[Any, dict[str, int]], nn.Module], rng: random.Random
) -> Case:
    sizes = decoder_sizes(rng)
    if kind == "Qwen3":
        sizes["head_dim"] = rng.choice((4, 10))  # not hidden_size / heads
    config = getattr(transformers, f"{kind}Config")(**sizes, **ROTARY)
    ids = text(config)
    return Case(
        config,
        getattr(transformers, f"{kind}ForCausalLM"),
        lambda: target(config, sizes),
        lambda model: model(ids).logits,
        lambda model: out.logits if hasattr(out := model(ids), "logits") else out,
    )


def phi3(config: Any, sizes: dict[str, int]) -> nn.Module:
    sizes = {k: v for k, v in sizes.items() if k != "head_dim"}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **ROTARY))


def gpt2(kind: Callable[..., nn.Module], rng: random.Random) -> Case:
    heads = rng.choice((1, 2, 3))
    config = transformers.GPT2Config(
        n_embd=heads * rng.choice((4, 5)),
        n_layer=rng.choice((1, 2)),
        n_head=heads,
        vocab_size=rng.randint(20, 40),
        n_positions=12,
        **EAGER,
        **TOKENS,
    )
    ids = text(config)
    target = "transformer." if kind is plain.Gpt2Linear else ""
    return Case(
        config,
        transformers.GPT2LMHeadModel,
        lambda: kind(plain.Sizes(config), 12),
        lambda model: model(ids).logits,
        lambda model: model(ids),
        {"source": "transformer.", "target": target},
    )


def bert(rng: random.Random) -> Case:
    from paramkit.demo.encoder import EncoderConfig, SentenceEncoder

    heads = rng.choice((1, 2, 3))
    config = transformers.BertConfig(
        hidden_size=heads * rng.choice((4, 6)),
        intermediate_size=rng.randint(5, 30),
        num_hidden_layers=rng.choice((1, 2)),
        num_attention_heads=heads,
        vocab_size=rng.randint(20, 40),
        max_position_embeddings=12,
        **EAGER,
    )
    ids = text(config)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    ours = EncoderConfig(**{n: getattr(config, n) for n in EncoderConfig.__dataclass_fields__})
    return Case(
        config,
        transformers.BertModel,
        lambda: SentenceEncoder(ours),
        lambda model: model(ids, attention_mask=mask).last_hidden_state * mask[..., None],
        lambda model: model.hidden(ids, mask) * mask[..., None],
    )


def vit(kind: Callable[..., nn.Module], rng: random.Random) -> Case:
    heads = rng.choice((1, 2, 3))
    config = transformers.ViTConfig(
        hidden_size=heads * rng.choice((4, 6)),
        intermediate_size=rng.randint(5, 30),
        num_hidden_layers=rng.choice((1, 2)),
        num_attention_heads=heads,
        image_size=8,
        patch_size=4,
        num_labels=rng.randint(2, 5),
        **EAGER,
    )
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return Case(
        config,
        transformers.ViTForImageClassification,
        lambda: kind(plain.Sizes(config), 4, 4, config.num_labels),
        lambda model: model(images).logits,
        lambda model: model(images),
    )


def mixtral(rng: random.Random) -> Case:
    sizes = decoder_sizes(rng)
    sizes["hidden_size"] *= 2  # experts are multiplied together, which wants rows of 16 bytes
    sizes["intermediate_size"] = rng.choice((8, 12, 20))
    config = transformers.MixtralConfig(
        **sizes,
        **ROTARY,
        num_local_experts=rng.choice((3, 11)),
        num_experts_per_tok=2,
        sliding_window=None,
    )
    ids = text(config)
    kind = transformers.MixtralForCausalLM
    return Case(
        config,
        kind,
        lambda: kind(config),
        lambda model: model(ids).logits,
        lambda model: model(ids).logits,
    )


CASES: dict[str, Callable[[random.Random], Case]] = {
    "bert_to_transformer_encoder": bert,
    "gpt2_to_linear": lambda rng: gpt2(plain.Gpt2Linear, rng),
    "gpt2_to_split": lambda rng: gpt2(plain.Gpt2Split, rng),
    "llama_to_fused": lambda rng: decoder("Llama", phi3, rng),
    "llama_to_megatron": lambda rng: decoder(
        "Llama", lambda c, _: plain.MegatronDecoder(plain.Sizes(c)), rng
    ),
    "llama_to_meta": lambda rng: decoder(
        "Llama", lambda c, _: plain.MetaDecoder(plain.Sizes(c)), rng
    ),
    "mixtral_to_stacked": mixtral,
    "qwen2_to_fused": lambda rng: decoder(
        "Qwen2", lambda c, _: plain.FusedDecoder(plain.Sizes(c, bias=True)), rng
    ),
    "qwen2_to_megatron": lambda rng: decoder(
        "Qwen2", lambda c, _: plain.MegatronDecoder(plain.Sizes(c, bias=True)), rng
    ),
    "qwen3_to_fused": lambda rng: decoder(
        "Qwen3", lambda c, _: plain.FusedDecoder(plain.Sizes(c, norms=True)), rng
    ),
    "qwen3_to_megatron": lambda rng: decoder(
        "Qwen3", lambda c, _: plain.MegatronDecoder(plain.Sizes(c, norms=True)), rng
    ),
    "vit_to_timm": lambda rng: vit(plain.TimmVit, rng),
    "vit_to_torchvision": lambda rng: vit(plain.TorchvisionVit, rng),
}

# Experts are stacked from transformers 5 on.
needs_stacked = pytest.mark.skipif(MAJOR < 5, reason="needs transformers 5")
BY_NAME = [
    pytest.param(name, marks=needs_stacked if name == "mixtral_to_stacked" else ())
    for name in CASES
]


@dataclass
class Prepared:
    case: Case
    path: Path
    tensors: dict[str, Tensor]
    output: Tensor


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Prepared]:
    """A model of random sizes and values, saved by transformers; made once."""

    @cache
    def make(name: str, seed: int) -> Prepared:
        torch.manual_seed(seed)
        case = CASES[name](random.Random(f"{name} {seed}"))
        model = case.model()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        path = folder / "model.safetensors"
        with torch.no_grad():
            return Prepared(case, path, load_file(path), case.run(model))

    return make


def zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


def kept_by(rules: list[Rule], names: Mapping[str, Tensor]) -> set[str]:
    """Names that rules without a source keep on purpose."""
    templates = [r.target_template() for r in rules if r.src is None]
    return {name for name in names if any(t and t.match(name) is not None for t in templates)}


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# ---- both ways -----------------------------------------------------------------------------------


def test_every_recipe_has_a_case() -> None:
    assert sorted([*CASES, "rotary_halves_to_pairs"]) == recipes.names()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_outputs_agree_and_the_way_back_gives_every_bit(
    prepared: Callable[[str, int], Prepared], name: str, seed: int
) -> None:
    given = prepared(name, seed)
    rules = given.case.rules(name)
    target = randomized(given.case.target().eval())
    assert not close(given.case.run_target(target), given.output)  # the comparison can fail
    paramkit.transplant(target, given.path, rules, identity=False)
    assert close(given.case.run_target(target), given.output)

    back = zeros(given.tensors)
    paramkit.transplant(back, target, invert(rules), identity=False)
    kept = kept_by(invert(rules), back)
    for key, tensor in given.tensors.items():
        expected = torch.zeros_like(tensor) if key in kept else tensor
        assert_same_bits(back[key], expected, what=key)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_the_other_way_outputs_agree_and_the_way_back_gives_every_bit(
    prepared: Callable[[str, int], Prepared], name: str, seed: int
) -> None:
    given = prepared(name, seed)
    rules = given.case.rules(name)
    target = randomized(given.case.target().eval())
    checkpoint = zeros(given.tensors)
    paramkit.transplant(checkpoint, target, invert(rules), identity=False)
    model = given.case.model(checkpoint)
    assert close(given.case.run(model), given.case.run_target(target))

    again = randomized(given.case.target())
    paramkit.transplant(again, checkpoint, rules, identity=False)
    for (key, got), expected in zip(again.named_parameters(), target.parameters(), strict=True):
        assert_same_bits(got, expected, what=key)


# A transpose that splits, an interleave, pairs, a stack: what the kernels see of recipes.
@pytest.mark.parametrize(
    "name",
    [
        "gpt2_to_split",
        "llama_to_megatron",
        "llama_to_meta",
        pytest.param("mixtral_to_stacked", marks=needs_stacked),
    ],
)
def test_on_every_backend(
    prepared: Callable[[str, int], Prepared], backend: str, name: str
) -> None:
    given = prepared(name, 0)
    rules = given.case.rules(name)
    target = given.case.target()
    report = paramkit.transplant(target, given.tensors, rules, identity=False)
    assert report.summary.bytes == sum(p.nbytes for p in target.parameters())
    back = zeros(given.tensors)
    paramkit.transplant(back, target, invert(rules), identity=False)
    for key in given.tensors.keys() - kept_by(invert(rules), back):
        assert_same_bits(back[key], given.tensors[key], what=key)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BY_NAME)
def test_shapes_follow_without_a_target(
    prepared: Callable[[str, int], Prepared], name: str, seed: int
) -> None:
    # From file to file there is no model to say the shapes, in either direction.
    given = prepared(name, seed)
    rules = given.case.rules(name)
    made = infer_destinations(given.tensors, rules, identity=False)
    expected = {n: p.shape for n, p in given.case.target().named_parameters()}
    assert {n: t.shape for n, t in made.items()} == expected
    back = infer_destinations(made, invert(rules), identity=False)
    kept = kept_by(invert(rules), given.tensors)
    assert {n: t.shape for n, t in back.items()} == {
        n: t.shape for n, t in given.tensors.items() if n not in kept
    }


@torch.no_grad()
def test_tied_modules_as_sources(prepared: Callable[[str, int], Prepared]) -> None:
    # As a module the head is there under its own name too; it is the embedding, which is read.
    given = prepared("gpt2_to_linear", 0)
    model, target = given.case.model(given.tensors), given.case.target().eval()
    rules = given.case.rules("gpt2_to_linear")
    for source in (model, model.state_dict()):
        paramkit.transplant(randomized(target), source, rules, identity=False)
        assert close(given.case.run_target(target), given.output)
    assert target.lm_head.weight is target.transformer.wte.weight
    untied = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()}
    with pytest.raises(PlanError, match=r"lm_head\.weight"):
        paramkit.transplant(target, untied, rules, identity=False)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_with_its_name(
    prepared: Callable[[str, int], Prepared],
) -> None:
    given = prepared("llama_to_megatron", 0)
    target = given.case.target()
    before = {n: p.clone() for n, p in target.named_parameters()}
    name = "model.layers.0.self_attn.k_proj.weight"
    lame = {n: t for n, t in given.tensors.items() if n != name}
    with pytest.raises(PlanError, match=r"decoder\.layers\.0\.self_attention\.linear_qkv\.weight"):
        paramkit.transplant(target, lame, given.case.rules("llama_to_megatron"), identity=False)
    for n, p in target.named_parameters():
        assert_same_bits(p, before[n], what=n)


# ---- rotary layouts ------------------------------------------------------------------------------


class Attention(nn.Module):
    """Rotary attention alone, with either layout of the pairs."""

    def __init__(self, s: plain.Sizes, rotate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.s, self.rotate = s, rotate
        self.q_proj = nn.Linear(s.hidden, s.heads * s.dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv * s.dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv * s.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.s.dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return plain.causal(self.rotate(q), self.rotate(k), v)


@torch.no_grad()
def test_rotary_halves_and_pairs(backend: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**decoder_sizes(random.Random(seed)))
        s = plain.Sizes(config)
        halves = nn.ModuleDict({"deep": nn.ModuleDict({"attn": Attention(s, plain.halves)})})
        pairs = nn.ModuleDict({"deep": nn.ModuleDict({"attn": Attention(s, plain.pairs)})})
        x = torch.randn(2, 6, s.hidden)
        rules = recipes.load("rotary_halves_to_pairs", config=config)

        randomized(halves)
        expected = halves["deep"]["attn"](x)
        paramkit.transplant(pairs, halves)  # the same names and shapes, the wrong order
        assert not close(pairs["deep"]["attn"](x), expected)
        paramkit.transplant(pairs, halves, rules)
        assert close(pairs["deep"]["attn"](x), expected)

        before = {n: p.clone() for n, p in halves.named_parameters()}
        for p in halves.parameters():
            p.zero_()
        paramkit.transplant(halves, pairs, invert(rules))
        for n, p in halves.named_parameters():
            assert_same_bits(p, before[n], what=n)

        randomized(pairs)
        paramkit.transplant(halves, pairs, invert(rules))
        assert close(halves["deep"]["attn"](x), pairs["deep"]["attn"](x))


# ---- the catalog ---------------------------------------------------------------------------------


def test_the_function_and_the_file_are_the_same_rules() -> None:
    def plainly(rules: list[Rule]) -> set[tuple[Any, ...]]:
        # The file says how many thirds there are, so that files can be made without a target.
        return {(r.src, r.dst, r.pattern, r.at) for r in rules}

    by_file = recipes.load("bert_to_transformer_encoder", source="bert.", target="model.")
    by_call = recipes.bert_to_transformer_encoder("bert.", "model.", drop=["pooler.*"])
    assert plainly(by_file) == plainly(by_call)


def test_names_and_descriptions() -> None:
    for name in recipes.names():
        recipe = recipes.describe(name)
        assert recipe.name == name
        assert len(recipe.about) > 20
        assert recipe.path.is_file()
        assert str(recipe).startswith(f"{name}: {recipe.about}")
    assert recipes.describe("llama_to_fused").needs == ("heads", "kv_heads", "head_dim")
    assert recipes.describe("gpt2_to_linear").needs == ()
    assert str(recipes.describe("llama_to_meta")).endswith("Sizes: heads, kv_heads.")


@pytest.mark.parametrize("call", [recipes.load, recipes.describe])
@pytest.mark.parametrize("name", ["llama_to_fuse", "../recipes/llama_to_fused", "", "/etc/passwd"])
def test_unknown_recipes(call: Callable[[str], object], name: str) -> None:
    with pytest.raises(ValueError, match="there is no recipe") as caught:
        call(name)
    assert ("did you mean llama_to_fused?" in str(caught.value)) == ("fuse" in name)


def test_sizes_that_are_missing_or_unknown() -> None:
    with pytest.raises(RuleFileError) as caught:
        recipes.load("llama_to_fused", heads=4)
    # What follows from them (q = heads*head_dim, a range "q:q+k") is not told again.
    assert [f.got for f in caught.value.findings] == [
        "no value for the size kv_heads",
        "no value for the size head_dim",
    ]
    with pytest.raises(RuleFileError, match="a value for the size haeds"):
        recipes.load("llama_to_meta", haeds=4, heads=4, kv_heads=2)
    with pytest.raises(RuleFileError, match="no value for the size heads"):
        recipes.load("llama_to_meta", config=object())


def test_sizes_from_configs() -> None:
    content = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
    by_hand = recipes.load("llama_to_fused", heads=6, kv_heads=2, head_dim=8)
    assert recipes.load("llama_to_fused", config=content) == by_hand
    assert recipes.load("llama_to_fused", config={**content, "head_dim": None}) == by_hand
    assert recipes.load("llama_to_fused", config=transformers.LlamaConfig(**content)) == by_hand
    # A size given by name wins over the config; without its own number, key heads are as many as heads.
    given = recipes.load("llama_to_fused", config=content, head_dim=16)
    assert given == recipes.load("llama_to_fused", heads=6, kv_heads=2, head_dim=16)
    content.pop("num_key_value_heads")
    assert recipes.load("llama_to_meta", config=content) == recipes.load(
        "llama_to_meta", heads=6, kv_heads=6
    )
    # Heads that do not divide are not rounded.
    with pytest.raises(RuleFileError, match="no value for the size group"):
        recipes.load("llama_to_megatron", config={**content, "num_key_value_heads": 4})


def test_prefixes_and_rules_left_out() -> None:
    rules = recipes.load("vit_to_timm", source="a.", target="b.c.")
    assert all(r.src and r.src.startswith("a.") for r in rules)
    assert all(r.dst and r.dst.startswith("b.c.") for r in rules)
    bert = recipes.load("bert_to_transformer_encoder", source="bert.", without=["pooler.*"])
    assert all(r.dst is not None for r in bert)
    assert len(bert) + 1 == len(recipes.load("bert_to_transformer_encoder"))
    with pytest.raises(ValueError, match=r"no rule for pooler\.dense"):
        recipes.load("bert_to_transformer_encoder", without=["pooler.dense"])
    for prefix in ("{x}.", "a*."):
        with pytest.raises(ValueError, match="plain text"):
            recipes.load("vit_to_timm", source=prefix)


@torch.no_grad()
def test_a_head_that_shares_the_embedding(tmp_path: Path) -> None:
    sizes = decoder_sizes(random.Random(3))
    options = {**ROTARY, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **options)
    model = randomized(transformers.LlamaForCausalLM(config).eval())
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    sizes.pop("head_dim")
    target = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **options)).eval()
    rules = recipes.load("llama_to_fused", config=config, without=["lm_head.weight"])
    paramkit.transplant(target, tmp_path / "model.safetensors", rules, identity=False)
    ids = text(config)
    assert close(target(ids).logits, model(ids).logits)
    assert target.lm_head.weight is target.model.embed_tokens.weight
    with pytest.raises(PlanError, match=r"lm_head\.weight"):
        paramkit.transplant(
            target,
            tmp_path / "model.safetensors",
            recipes.load("llama_to_fused", config=config),
            identity=False,
        )


def test_recipes_are_in_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from setuptools import Distribution

    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    project = Distribution()
    project.parse_config_files(["pyproject.toml"])
    shipped = [p for glob in project.package_data["paramkit"] for p in Path("paramkit").glob(glob)]
    included = (root / "MANIFEST.in").read_text().split()
    for name in recipes.names():
        path = recipes.describe(name).path.relative_to(root)
        assert path in shipped
        assert any(path.match(glob) for glob in included if "/" in glob)
