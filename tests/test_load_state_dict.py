"""``load_state_dict``: what ``Module.load_state_dict`` does, but nothing is written on an error."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramkit
from tests import cases
from tests.guards import assert_same_bits, bits, nothing_written, outcome

pytestmark = pytest.mark.usefixtures("backend")


def tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]


def random_state(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        name: torch.rand_like(t) if t.is_floating_point() else torch.randint_like(t, 1, 9)
        for name, t in model.state_dict().items()
    }


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    for name, tensor in mine.items():
        if isinstance(tensor, Tensor):
            assert_same_bits(tensor, reference[name], what=name)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3, bias=False)})
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_parameter("absent", None)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight


MODELS = {
    "linear": lambda: nn.Linear(3, 2),
    "encoder": lambda: cases.encoder(3),
    "norms": Norms,
    "tied": Tied,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16),
    "empty": lambda: nn.Sequential(),
    "bf16": lambda: cases.encoder(1).to(torch.bfloat16),
    "parameter list": lambda: nn.ParameterList([nn.Parameter(torch.zeros(i)) for i in range(4)]),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_as_torch(name: str) -> None:
    ours = MODELS[name]()
    theirs = copy.deepcopy(ours)
    state = random_state(ours)
    identity = [(id(t), t.data_ptr(), t.requires_grad) for t in tensors(ours)]
    versions = [t._version for t in tensors(ours)]

    expected = theirs.load_state_dict(state)
    result = paramkit.load_state_dict(ours, state)

    assert_same_model(ours, theirs)
    assert result.missing_keys == expected.missing_keys == []
    assert result.unexpected_keys == expected.unexpected_keys == []
    missing, unexpected = result
    assert (missing, unexpected) == ([], [])
    assert [(id(t), t.data_ptr(), t.requires_grad) for t in tensors(ours)] == identity
    for tensor, before in zip(tensors(ours), versions, strict=True):
        if tensor.numel() and any(tensor is t for t in ours.state_dict(keep_vars=True).values()):
            assert tensor._version > before


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_kinds_of_state_dict(kind: Any) -> None:
    model = Norms()
    other = Norms()
    paramkit.load_state_dict(model, kind(other.state_dict()))
    assert_same_model(model, other)
    state = other.state_dict()  # with _metadata
    keys = list(state)
    paramkit.load_state_dict(model, state)
    assert list(state) == keys  # the caller's dict is left alone


def test_casts_and_strides_in_the_state() -> None:
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    state = {
        "weight": torch.rand(4, 3, dtype=torch.float64).t(),
        "bias": torch.rand(6).to(torch.bfloat16)[::2],
    }
    paramkit.load_state_dict(ours, state)
    theirs.load_state_dict(state)
    assert_same_model(ours, theirs)
    assert ours.weight.dtype == torch.float32


def test_one_element_into_zero_dim_as_torch() -> None:
    """Checkpoints from before torch 0.4 hold shape ``[1]`` where ``[]`` is meant."""
    ours, theirs = Norms(), Norms()
    state = random_state(ours)
    state["scale"] = torch.full((1,), 6.0)
    theirs.load_state_dict(state)
    paramkit.load_state_dict(ours, state)
    assert ours.scale.item() == theirs.scale.item() == 6.0


def test_parameters_as_values() -> None:
    source = Norms()
    model = Norms()
    paramkit.load_state_dict(model, source.state_dict(keep_vars=True))
    assert_same_model(model, source)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_own_state_dict_is_a_no_op() -> None:
    model = Norms()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    paramkit.load_state_dict(model, model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_autograd_notices() -> None:
    model = nn.Linear(3, 3)
    loss = model(torch.ones(1, 3, requires_grad=True)).sum()
    paramkit.load_state_dict(model, random_state(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# strict and what it reports.


def test_not_strict_as_torch() -> None:
    ours = Norms()
    theirs = copy.deepcopy(ours)
    state = random_state(ours)
    del state["head.a.weight"], state["body.1.running_var"]
    state["extra.weight"] = torch.zeros(1)
    state["head.c"] = torch.zeros(1)
    expected = theirs.load_state_dict(state, strict=False)
    result = paramkit.load_state_dict(ours, state, strict=False)
    assert sorted(result.missing_keys) == sorted(expected.missing_keys)
    assert sorted(result.unexpected_keys) == sorted(expected.unexpected_keys)
    assert_same_model(ours, theirs)


def bad_states(model: nn.Module) -> dict[str, dict[str, Any]]:
    def changed(**changes: Any) -> dict[str, Any]:
        state: dict[str, Any] = random_state(model)
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value
        return state

    return {
        "missing": changed(head__a__weight=None),
        "unexpected": changed(head__a__wieght=torch.zeros(1)),
        "both": changed(head__a__weight=None, head__a__wieght=torch.zeros(2, 4)),
        "shape": changed(head__a__weight=torch.zeros(4, 2)),
        "last shape": changed(scale=torch.zeros(2)),
        "rank": changed(head__a__bias=torch.zeros(1, 2)),
        "no tensor": changed(head__a__weight="text"),
        "meta": changed(head__a__weight=torch.zeros(2, 4, device="meta")),
        "renamed prefix": {f"module.{k}": v for k, v in random_state(model).items()},
        "nothing": {},
    }


@pytest.mark.parametrize("name", sorted(bad_states(Norms())))
def test_errors_as_torch_and_nothing_written(name: str) -> None:
    """torch writes what fits before it raises; here the model is as it was, byte for byte."""
    model, twin = Norms(), Norms()
    state = bad_states(model)[name]
    error = outcome(lambda: twin.load_state_dict(state))
    assert error is RuntimeError
    with nothing_written(*tensors(model)), pytest.raises(RuntimeError):
        paramkit.load_state_dict(model, state)


def test_errors_in_shapes_are_errors_without_strict_too() -> None:
    model, twin = Norms(), Norms()
    for name in ("shape", "rank", "no tensor"):
        state = bad_states(model)[name]
        assert outcome(lambda s=state: twin.load_state_dict(s, strict=False)) is RuntimeError
        with nothing_written(*tensors(model)), pytest.raises(RuntimeError):
            paramkit.load_state_dict(model, state, strict=False)


def test_all_problems_in_one_message() -> None:
    model = Norms()
    state = random_state(model)
    del state["body.0.bias"]
    state["head.a.weight"] = torch.zeros(9, 9)
    state["head.d"] = torch.zeros(1)
    with nothing_written(*tensors(model)), pytest.raises(RuntimeError) as caught:
        paramkit.load_state_dict(model, state)
    text = str(caught.value)
    for part in ("body.0.bias", "head.a.weight", "head.d", "9", "Norms"):
        assert part in text


def test_same_words_as_torch() -> None:
    """Tools that read the message find torch's words in it."""
    model, twin = Norms(), Norms()
    for name in ("missing", "unexpected", "shape"):
        state = bad_states(model)[name]
        with pytest.raises(RuntimeError) as theirs:
            twin.load_state_dict(state)
        with pytest.raises(RuntimeError) as ours:
            paramkit.load_state_dict(model, state)
        for words in ("Missing key(s)", "Unexpected key(s)", "size mismatch for"):
            assert (words in str(ours.value)) == (words in str(theirs.value)), name


def test_state_that_is_no_mapping() -> None:
    model = nn.Linear(2, 2)
    for bad in (3, None, "path", [("weight", torch.zeros(2, 2))]):
        with nothing_written(*tensors(model)), pytest.raises(TypeError):
            paramkit.load_state_dict(model, bad)  # type: ignore[arg-type]


def test_model_that_is_no_module() -> None:
    for bad in (3, None, {}):
        with pytest.raises((TypeError, AttributeError)):
            paramkit.load_state_dict(bad, {})  # type: ignore[arg-type]


# Meta and assign.


def test_meta_model_raises() -> None:
    """torch warns and writes nothing here; silence would leave an unusable model behind."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    with pytest.raises(RuntimeError, match="assign=True"):
        paramkit.load_state_dict(model, state)


def test_partly_meta_model_writes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    state = {name: torch.ones(t.shape) for name, t in model.state_dict().items()}
    with nothing_written(*tensors(model)), pytest.raises(RuntimeError, match=r"1\.weight"):
        paramkit.load_state_dict(model, state)


def test_assign_as_torch() -> None:
    with torch.device("meta"):
        ours, theirs = Norms(), Norms()
    for parameter in (*ours.head["a"].parameters(), *theirs.head["a"].parameters()):
        parameter.requires_grad_(False)
    state = random_state(Norms())
    theirs.load_state_dict(state, assign=True)
    paramkit.load_state_dict(ours, state, assign=True)
    assert_same_model(ours, theirs)
    for (name, mine), (_, reference) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine.data_ptr() == state[name].data_ptr()
        assert mine.requires_grad == reference.requires_grad
        assert type(mine) is nn.Parameter


def test_assign_errors_replace_nothing() -> None:
    model = Norms()
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    for name in ("missing", "unexpected", "shape"):
        with nothing_written(*tensors(model)), pytest.raises(RuntimeError):
            paramkit.load_state_dict(model, bad_states(model)[name], assign=True)
        assert {key: id(t) for key, t in model.state_dict(keep_vars=True).items()} == before


# Hooks and overrides: all of torch's protocol is honoured.


def test_pre_hooks_see_and_change_the_state() -> None:
    def run(load: Any) -> tuple[dict[str, Tensor], list[str]]:
        torch.manual_seed(3)
        model, log = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []

        def rename(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            log.append(prefix)
            for old in ("w", "b"):
                if prefix + old in state:
                    new = {"w": "weight", "b": "bias"}[old]
                    state[prefix + new] = state.pop(prefix + old)

        for layer in model:
            layer.register_load_state_dict_pre_hook(rename)
        state = {
            f"{i}.{k}": torch.full((2, 2) if k == "w" else (2,), i + 5.0)
            for i in (0, 1)
            for k in "wb"
        }
        load(model, state)
        assert sorted(state) == ["0.b", "0.w", "1.b", "1.w"]
        return model.state_dict(), log

    expected, expected_log = run(lambda m, s: m.load_state_dict(s))
    got, log = run(paramkit.load_state_dict)
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor, what=name)
    assert log == expected_log


def test_pre_hook_written_in_the_old_way() -> None:
    model = nn.Linear(2, 2)
    seen: list[str] = []
    model._register_load_state_dict_pre_hook(lambda state, prefix, *rest: seen.extend(state))
    paramkit.load_state_dict(model, random_state(model))
    assert sorted(seen) == ["bias", "weight"]


def test_post_hooks_see_the_written_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen: list[tuple[str, list[float]]] = []
    model[1].register_load_state_dict_post_hook(
        lambda module, keys: seen.append(("inner", module.bias.tolist()))
    )
    model.register_load_state_dict_post_hook(
        lambda module, keys: seen.append(("outer", module[0].bias.tolist()))
    )
    paramkit.load_state_dict(
        model, {k: torch.full_like(v, 4.0) for k, v in model.state_dict().items()}
    )
    assert seen == [("inner", [4, 4]), ("outer", [4, 4])]


def test_post_hooks_may_forgive_missing_keys() -> None:
    model = nn.Linear(2, 2)
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    result = paramkit.load_state_dict(model, {"weight": torch.full((2, 2), 3.0)})
    assert result.missing_keys == []
    assert bool((model.weight == 3).all())


class Custom(nn.Module):
    """Reads its weight under another name, as old checkpoints ask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "old" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "old") * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_overridden_loading() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Custom(), nn.BatchNorm1d(3))
    twin = copy.deepcopy(model)
    state = random_state(model)
    state["1.old"] = state.pop("1.weight")
    twin.load_state_dict(state)
    paramkit.load_state_dict(model, state)
    assert_same_model(model, twin)
    assert torch.equal(model[1].weight, state["1.old"] * 2)


def test_overridden_loading_that_writes_by_itself() -> None:
    """A module that copies in its own way is called, not bypassed."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            with torch.no_grad():
                self.weight.copy_(state_dict[prefix + "weight"] + 1)

    model = nn.Sequential(Own(), nn.Linear(3, 1))
    state = random_state(model)
    paramkit.load_state_dict(model, state)
    assert torch.equal(model[0].weight, state["0.weight"] + 1)
    assert torch.equal(model[1].weight, state["1.weight"])


def test_an_error_after_what_was_loaded_puts_sparse_tensors_back_too() -> None:
    """A copy gives them other tensors inside, so that a detached one would get them instead."""

    class Fails(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            raise OSError("the disk is gone")

    model = nn.Sequential(nn.Linear(2, 2), Fails(2, 2))
    model[0].register_buffer("coo", torch.eye(3).to_sparse())
    model[0].register_buffer("csr", torch.eye(3).to_sparse_csr())
    before = {name: t.to_dense().clone() for name, t in model.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        paramkit.load_state_dict(model, {n: (t * 2).clone() for n, t in model.state_dict().items()})
    for name, t in model.state_dict().items():
        assert torch.equal(t.to_dense(), before[name]), name


def test_overridden_load_state_dict() -> None:
    class Outer(nn.Linear):
        calls = 0

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            Outer.calls += 1
            return super().load_state_dict(state_dict, *args, **kwargs)

    model = Outer(2, 2)
    state = random_state(model)
    paramkit.load_state_dict(model, state)
    assert Outer.calls == 1
    assert torch.equal(model.weight, state["weight"])


def test_extra_state() -> None:
    class Extra(nn.Linear):
        extra: Any = None

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    source, model = nn.Sequential(Extra(2, 2)), nn.Sequential(Extra(2, 2))
    source[0].extra = {"step": 3}
    paramkit.load_state_dict(model, source.state_dict())
    assert model[0].extra == {"step": 3}
    with pytest.raises(RuntimeError):
        paramkit.load_state_dict(
            model, {k: v for k, v in source.state_dict().items() if "extra" not in k}
        )


def test_batch_norm_of_an_old_checkpoint() -> None:
    """Version 1 state dicts lack ``num_batches_tracked``; torch fills it in."""
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    state = random_state(ours)
    del state["num_batches_tracked"]
    assert outcome(lambda: theirs.load_state_dict(state)) is None
    paramkit.load_state_dict(ours, state)
    assert_same_model(ours, theirs)


def test_metadata_reaches_the_modules() -> None:
    versions: list[Any] = []

    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(
            self, state_dict: Any, prefix: str, metadata: Any, *rest: Any
        ) -> None:
            versions.append(metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    model = nn.Sequential(Versioned(2, 2))
    paramkit.load_state_dict(model, model.state_dict())
    assert versions == [2]


def test_lazy_modules() -> None:
    ours, theirs = nn.LazyLinear(2), nn.LazyLinear(2)
    state = {"weight": torch.ones(2, 5), "bias": torch.ones(2)}
    theirs.load_state_dict(state)
    paramkit.load_state_dict(ours, state)
    assert ours.weight.shape == (2, 5)
    assert_same_model(ours, theirs)


def test_parametrized_modules() -> None:
    ours = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    theirs = copy.deepcopy(ours)
    state = random_state(ours)
    theirs.load_state_dict(state)
    paramkit.load_state_dict(ours, state)
    assert_same_model(ours, theirs)


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    state = random_state(model)
    state["out.weight"] = state["embed.weight"]
    paramkit.load_state_dict(model, state)
    assert model.out.weight is model.embed.weight
    assert torch.equal(model.out.weight, state["embed.weight"])
    # Two different values for one memory: the later name wins, as in torch.
    twin = copy.deepcopy(model)
    state["out.weight"] = state["embed.weight"] + 1
    error = outcome(lambda: twin.load_state_dict(state))
    assert error is None
    paramkit.load_state_dict(model, state)
    assert_same_model(model, twin)


@pytest.mark.usefixtures("one_memory")
def test_state_that_aliases_the_model() -> None:
    """Values that are views of the model's own parameters behave as torch's loop."""
    ours = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    theirs = copy.deepcopy(ours)

    def crossed(model: nn.Sequential) -> dict[str, Tensor]:
        return {"0.weight": model[1].weight.detach(), "1.weight": model[0].weight.detach()}

    theirs.load_state_dict(crossed(theirs))
    paramkit.load_state_dict(ours, crossed(ours))
    assert_same_model(ours, theirs)


def test_nan_payloads_survive() -> None:
    model = nn.Linear(8, 8, bias=False)
    state = {"weight": cases.random_bits((8, 8), torch.float32, seed=2)}
    paramkit.load_state_dict(model, state)
    assert torch.equal(bits(model.weight), bits(state["weight"]))


def test_large_nested_model_as_torch() -> None:
    ours = cases.encoder(20)
    theirs = copy.deepcopy(ours)
    state = random_state(ours)
    paramkit.load_state_dict(ours, state)
    theirs.load_state_dict(state)
    assert_same_model(ours, theirs)
    state = {k: v * 2 for k, v in state.items()}
    paramkit.load_state_dict(ours, state)  # a second time: nothing cached from the first is stale
    theirs.load_state_dict(state)
    assert_same_model(ours, theirs)


def test_model_changed_between_loads() -> None:
    """Whatever is kept from one call to the next must notice a model that changed."""
    model = cases.encoder(2)
    paramkit.load_state_dict(model, random_state(model))
    model.layers[0].linear1.bias = nn.Parameter(torch.zeros(16))
    model.layers[1].norm1 = nn.LayerNorm(8, elementwise_affine=False)
    model.register_buffer("added", torch.zeros(2))
    state = random_state(model)
    paramkit.load_state_dict(model, state)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, state[name], what=name)
