"""Models as other libraries leave them: accelerate, peft, transformers. Small ones, made here.

What the library itself reads afterwards, by running the model, is what was written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramkit
from paramkit import Rule
from tests.conftest import need_module
from tests.guards import assert_same_bits, nothing_written

accelerate = need_module("accelerate")
peft = need_module("peft")
transformers = need_module("transformers")

pytestmark = [
    pytest.mark.usefixtures("patched", "quiet"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def quiet() -> Iterator[None]:
    """No progress bars, and the shared state of accelerate as it was."""
    transformers.utils.logging.disable_progress_bar()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.k = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.q(x) * self.k(x)))


X = torch.linspace(-1, 1, 48).reshape(3, 16)


def trained() -> Net:
    """A model whose every tensor, buffers included, is unlike a fresh one's."""
    model = Net()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    return model.eval()


@contextmanager
def torchs_writes(patched: str) -> Iterator[None]:
    """A block in which a library writes by torch alone: on the kernels if, and only if, torch is patched."""
    with paramkit.backend.trace() as trace:
        yield
    assert bool(trace.routes) == (patched == "patched"), trace.routes


def assert_state(model: Any, expected: Any) -> None:
    got, wanted = model.state_dict(), expected.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same_bits(got[name], tensor, what=name)


# --- accelerate ----------------------------------------------------------------------------------


def test_prepared_models() -> None:
    """A plan goes on over optimizer steps; the optimizer has the same parameters."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, source = Net(), trained()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
    plan = paramkit.plan(model, source)
    for _ in range(2):
        accelerator.backward(model(X).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        assert plan.verify() != []
        plan.apply()
        assert_state(accelerator.unwrap_model(model), source)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert len(optimizer.state) == len(held)


def test_mixed_precision() -> None:
    """The forward is wrapped, the parameters are not."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    source = trained()
    model = accelerator.prepare(Net().eval())
    paramkit.transplant(model, source)
    assert_state(accelerator.unwrap_model(model), source)
    with torch.autocast("cpu", torch.bfloat16):
        expected = source(X)
        inside = Net().eval()
        paramkit.transplant(inside, source)
        assert_state(inside, source)
    assert_same_bits(model(X), expected.float())


def test_a_saved_model_is_a_source(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    source, model = trained(), Net().eval()
    accelerator.save_model(source, str(tmp_path), max_shard_size="0.2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    paramkit.transplant(model, tmp_path)
    assert_state(model, source)


@pytest.mark.parametrize("buffers", [False, True])
def test_empty_models(buffers: bool) -> None:
    source = trained()
    with accelerate.init_empty_weights(include_buffers=buffers):
        model = Net().eval()
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(paramkit.PlanError, match="meta"):
        paramkit.transplant(model, source)
    assert all(p.is_meta for p in model.parameters())
    paramkit.transplant(model, source, device="cpu")
    assert_state(model, source)
    assert_same_bits(model(X), source(X))


def test_dispatched_models() -> None:
    """A hook on every module moves what goes in; the parameters stay where they are."""
    source = trained()
    model = accelerate.dispatch_model(Net().eval(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    paramkit.transplant(model, source)
    assert_state(model, source)
    assert_same_bits(model(X), source(X))
    with paramkit.writes(model) as w:
        w["out.bias"][...] = 0.0
    paramkit.load_state_dict(model, source.state_dict())
    assert_same_bits(model(X), source(X))


def test_a_dispatched_model_read_from_a_file(tmp_path: Path, patched: str) -> None:
    first, source = trained(), Net().eval()
    accelerate.Accelerator(cpu=True).save_model(first, str(tmp_path))
    with accelerate.init_empty_weights():
        model = Net().eval()
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path), {"": "cpu"})
    assert_state(model, first)
    with torchs_writes(patched):
        model.load_state_dict(source.state_dict())
    assert_state(model, source)
    paramkit.transplant(model, source)
    assert_same_bits(model.eval()(X), source(X))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models(where: str, tmp_path: Path) -> None:
    """Each call brings the values from elsewhere: refused, also with a device to allocate on."""
    source, model = trained(), Net().eval()
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    before = model(X)
    for device in (None, "cpu"):
        with pytest.raises(paramkit.PlanError, match="offloads"):
            paramkit.transplant(model, source, device=device)
    with pytest.raises(RuntimeError, match="meta"):
        paramkit.load_state_dict(model, source.state_dict())
    assert all(p.is_meta for p in model.parameters())
    assert_same_bits(model(X), before)
    # Without the hooks the values are the model's own again.
    accelerate.hooks.remove_hook_from_submodules(model)
    rest = {"device": "cpu"} if any(p.is_meta for p in model.parameters()) else {}
    paramkit.transplant(model, source, **rest)
    assert_same_bits(model(X), source(X))


def test_the_values_of_an_offloaded_model() -> None:
    """In memory they are tensors of a mapping, and can be written there."""
    source, model = trained(), Net().eval()
    offloaded = {name: t.clone() for name, t in model.state_dict().items()}
    model = accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), state_dict=offloaded
    )
    paramkit.transplant(offloaded, source.state_dict())
    for name, buffer in model.named_buffers():
        buffer.copy_(source.get_buffer(name))
    assert_same_bits(model(X), source(X))


# --- peft ----------------------------------------------------------------------------------------


def lora(model: nn.Module, name: str = "default") -> Any:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name).eval()


BASE = [
    *(Rule(f"{m}.{{p}}", f"base_model.model.{m}.base_layer.{{p}}") for m in ("q", "k")),
    *(Rule(f"{m}.{{p}}", f"base_model.model.{m}.{{p}}") for m in ("norm", "out")),
]


def test_base_weights_under_adapters(patched: str) -> None:
    start, source = trained(), Net().eval()
    with torchs_writes(patched):
        model = lora(start)
    adapters = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    paramkit.transplant(model, source, BASE, allow_missing=["*.lora_*"])
    assert adapters
    for name, tensor in adapters.items():
        assert_same_bits(model.state_dict()[name], tensor)
    with model.disable_adapter():
        assert_same_bits(model(X), source(X))
    assert_same_bits(model(X), lora_by_hand(model, source))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def lora_by_hand(model: Any, source: Net) -> Tensor:
    """The same model made by peft from the source, with the adapters of `model`."""
    made = lora(source)
    made.load_state_dict(
        {n: t for n, t in model.state_dict().items() if "lora_" in n}, strict=False
    )
    return made(X)


def test_and_back_from_under_the_adapters() -> None:
    source, model = lora(trained()), Net().eval()
    rules = [*paramkit.invert(BASE), Rule("base_model.model.{m}.lora_{ab}.{name}.weight", None)]
    paramkit.transplant(model, source, rules)
    with source.disable_adapter():
        assert_same_bits(model(X), source(X))


def test_adapters_from_a_folder(tmp_path: Path) -> None:
    """A saved adapter has no adapter's name in its names; a model has one for each."""
    base = trained()
    model, saved = lora(base), lora(base)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    saved.save_pretrained(tmp_path)
    expected = saved(X)
    rules = [Rule("{*p}.lora_{ab}.weight", "{*p}.lora_{ab}.default.weight")]
    keep = ["*.base_layer.*", "*.out.*", "*.norm.*"]
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    report = paramkit.transplant(model, tmp_path, rules, allow_missing=keep)
    assert len(report.summary.names) == 4
    assert_same_bits(model(X), expected)
    for name, tensor in before.items():
        assert_same_bits(model.state_dict()[name], tensor)


def test_one_adapter_into_another() -> None:
    model = lora(trained())
    config = peft.LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    model.add_adapter("other", config)
    rules = [Rule("{*p}.lora_{ab}.default.weight", "{*p}.lora_{ab}.other.weight")]
    source = {n: t for n, t in model.state_dict().items() if ".default." in n}
    targets = {n: t for n, t in model.state_dict().items() if ".other." in n}
    expected = model(X)
    paramkit.transplant(targets, source, rules)
    model.set_adapter("other")
    assert_same_bits(model(X), expected)


def test_swapping_adapters() -> None:
    """Two sets of adapter weights, exchanged in place for an evaluation and back."""
    base = trained()
    model, other = lora(base), lora(base)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    names = [n for n in model.state_dict() if "lora_" in n]
    plan = paramkit.plan(
        {n: model.state_dict()[n] for n in names}, {n: other.state_dict()[n] for n in names}
    )
    mine, theirs = model(X), other(X)
    assert not torch.equal(mine, theirs)
    with plan.swapped():
        assert_same_bits(model(X), theirs)
    assert_same_bits(model(X), mine)
    assert_same_bits(other(X), theirs)


def test_merged_adapters_move_as_plain_weights() -> None:
    model = lora(trained())
    expected = model(X)
    merged = model.merge_and_unload()
    plain = Net().eval()
    paramkit.transplant(plain, merged)
    assert_same_bits(plain(X), merged(X))
    torch.testing.assert_close(plain(X), expected)


def test_a_plan_notices_that_adapters_came() -> None:
    """peft puts other modules in: the plan of the bare model is refused by name."""
    model, source = Net(), trained()
    plan = paramkit.plan(model, source)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))
    with (
        nothing_written(*model.state_dict().values()),
        pytest.raises(paramkit.PlanError, match=r"q\.weight.*replaced"),
    ):
        plan.apply()


# --- transformers --------------------------------------------------------------------------------


def llama(**options: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **options,
    )


TOKENS = torch.arange(8)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model of tiny size, in several files."""
    torch.manual_seed(11)
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    return tmp_path


def pretrained(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_a_transplant_after_from_pretrained(folder: Path) -> None:
    model, source = pretrained(folder), transformers.LlamaForCausalLM(llama()).eval()
    first = model(TOKENS).logits
    pointers = [p.data_ptr() for p in model.parameters()]
    paramkit.transplant(model, source)
    assert_state(model, source)
    assert_same_bits(model(TOKENS).logits, source(TOKENS).logits)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    # And back from the folder, without transformers.
    paramkit.transplant(model, folder)
    assert_same_bits(model(TOKENS).logits, first)
    paramkit.load_state_dict(model, source.state_dict())
    assert_same_bits(model(TOKENS).logits, source(TOKENS).logits)


def test_another_dtype(folder: Path, patched: str) -> None:
    model = pretrained(folder, dtype=torch.bfloat16)
    expected = pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = paramkit.transplant(model, folder)
    assert report.summary.casts
    assert_state(model, expected)
    with torchs_writes(patched):
        model.float()
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert_same_bits(model.lm_head.weight, expected.lm_head.weight.float())


def test_a_model_on_the_meta_device(folder: Path) -> None:
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(llama()).eval()
    paramkit.transplant(model, folder, device="cpu")
    expected = pretrained(folder)
    assert_state(model, expected)
    assert_same_bits(model(TOKENS).logits, expected(TOKENS).logits)


def test_tied_embeddings(tmp_path: Path) -> None:
    """One memory under two names: saved once, written once, still tied."""
    config = llama(tie_word_embeddings=True)
    source = transformers.LlamaForCausalLM(config).eval()
    source.save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM(config).eval()
    for each in (source, tmp_path):
        with torch.no_grad():
            model.lm_head.weight.zero_()
        paramkit.transplant(model, each)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_same_bits(model(TOKENS).logits, source(TOKENS).logits)


def test_adapters_on_a_pretrained_model(folder: Path) -> None:
    """The recipe in docs/composing.md: new base weights under adapters that stay."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(pretrained(folder), config).eval()
    source = transformers.LlamaForCausalLM(llama()).eval()
    adapted = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): name
        for name in model.state_dict()
        if "lora_" not in name
    }
    rules = [Rule(mine, theirs) for mine, theirs in adapted.items()]
    paramkit.transplant(model, source, rules, allow_missing=["*.lora_*"])
    with model.disable_adapter():
        assert_same_bits(model(TOKENS).logits, source(TOKENS).logits)


def test_a_model_that_is_read_while_it_trains(folder: Path) -> None:
    """The weight sync of a trainer and a model that generates, both of one process."""
    trainer, replica = pretrained(folder).train(), pretrained(folder)
    plan = paramkit.plan(replica, trainer)
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    for _ in range(2):
        trainer(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plan.apply()
        assert_state(replica, trainer)
    with torch.no_grad():
        assert_same_bits(replica(TOKENS).logits, trainer.eval()(TOKENS).logits)
    tokens = replica.generate(TOKENS, max_new_tokens=2, do_sample=False)
    assert tokens.shape == (1, 10)
