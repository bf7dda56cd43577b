"""Models on the meta device: memory once, what the model was kept, and a whole model or none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramkit
from paramkit import PlanError, Rule, SourceError
from paramkit.sources.lazy import StoredFile
from tests.guards import assert_same_bits


class Special(nn.Parameter):
    """As quantizing and sharding libraries have them."""


class Net(nn.Module):
    def __init__(self, transient: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 16))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.body[0].bias.requires_grad_(False)
        self.scale = Special(torch.ones(5))
        self.scale.axis, self.scale.loader = 1, {"kind": "row"}
        self.register_buffer("table", torch.arange(6).reshape(2, 3))
        self.same = self.table
        if transient:
            self.register_buffer("angles", torch.ones(7), persistent=False)


def on_meta(transient: bool = False) -> Net:
    with torch.device("meta"):
        return Net(transient)


def values(seed: int = 0) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(seed)
    return {
        n: torch.randint(-99, 99, t.shape, generator=seeded).to(t.dtype)
        for n, t in Net().state_dict().items()
        if n not in ("head.weight", "same")
    }


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def assert_untouched(model: nn.Module, before: dict[str, int]) -> None:
    assert all(t.is_meta for t in tensors(model))
    assert identities(model) == before
    assert paramkit.torn(model) is None


def identities(model: nn.Module) -> dict[str, int]:
    return {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}


def stored(kind: str, tensors: dict[str, Tensor], folder: Path) -> Any:
    if kind == "mapping":
        return tensors
    path = folder / f"m.{kind}"
    (save_file if kind == "safetensors" else torch.save)(tensors, path)
    return path


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["mapping", "safetensors", "pt"])
def test_everything_is_there_and_as_it_was(kind: str, tmp_path: Path) -> None:
    model, source = on_meta(), values()
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    report = paramkit.transplant(model, stored(kind, source, tmp_path), device="cpu", staging=4096)
    assert not any(t.is_meta for t in tensors(model))
    for name, tensor in source.items():
        assert_same_bits(model.state_dict()[name], tensor, what=name)
    assert model.head.weight is model.embed.weight
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert grads["body.0.bias"] is False
    assert all(p.is_leaf for p in model.parameters())
    assert type(model.scale) is Special
    assert (model.scale.axis, model.scale.loader) == (1, {"kind": "row"})
    assert isinstance(model.embed.weight, nn.Parameter)
    assert dict(model.named_buffers()).keys() == dict(Net().named_buffers()).keys()
    assert report.summary.elements == sum(t.numel() for t in source.values())
    model.body(torch.ones(3, 16)).sum().backward()
    assert model.body[0].weight.grad is not None


def test_a_second_transplant_is_an_ordinary_one() -> None:
    model = on_meta()
    paramkit.transplant(model, values(), device="cpu")
    where = {n: t.data_ptr() for n, t in model.state_dict().items()}
    paramkit.transplant(model, values(1), device="cpu")
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == where
    assert torch.equal(model.scale, values(1)["scale"])


def test_only_what_is_on_meta_gets_memory() -> None:
    model = on_meta()
    model.body[0] = nn.Linear(16, 24)
    own = model.body[0].weight
    where = own.data_ptr()
    paramkit.transplant(model, values(), device="cpu")
    assert model.body[0].weight is own
    assert own.data_ptr() == where
    assert torch.equal(own, values()["body.0.weight"])


def test_a_mapping_of_meta_tensors() -> None:
    table = {"a": torch.empty(3, device="meta"), "b": torch.zeros(2)}
    table["c"] = table["a"]
    paramkit.transplant(table, {"a": torch.ones(3), "b": torch.ones(2)}, device="cpu")
    assert table["a"].tolist() == [1, 1, 1]
    assert table["c"] is table["a"]


class Allocations(TorchDispatchMode):
    """Bytes of new memory, by every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and not out.is_meta and out.numel():
            if out.untyped_storage().data_ptr() not in given:
                self.bytes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["mapping", "safetensors"])
def test_memory_is_taken_once(kind: str, tmp_path: Path) -> None:
    model = on_meta()
    source = stored(kind, values(), tmp_path)
    with Allocations() as seen:
        paramkit.transplant(model, source, device="cpu", staging=4096)
    staging = 4096 if kind == "safetensors" else 0
    assert sum(seen.bytes) <= sum(t.nbytes for t in values().values()) + staging
    assert len(seen.bytes) >= len(values())


def test_strides_of_the_meta_tensor_are_kept() -> None:
    """The writes were worked out for them, gaps between the elements included."""
    model = nn.Module()
    strided = torch.empty(3, 9, 2, device="meta")[:, ::2].transpose(0, 1)
    model.w = nn.Parameter(strided)
    model.c = nn.Parameter(
        torch.empty(2, 4, 3, 3, device="meta").to(memory_format=torch.channels_last)
    )
    source = {"w": torch.randn(5, 3, 2), "c": torch.randn(2, 4, 3, 3)}
    strides = {n: p.stride() for n, p in model.named_parameters()}
    paramkit.transplant(model, source, device="cpu")
    assert {n: p.stride() for n, p in model.named_parameters()} == strides
    for name, tensor in source.items():
        assert_same_bits(getattr(model, name).detach(), tensor, what=name)


def test_requires_grad() -> None:
    for wanted in (False, True):
        model = on_meta()
        paramkit.transplant(model, values(), device="cpu", requires_grad=wanted)
        assert all(p.requires_grad is wanted for p in model.parameters())
        assert not any(b.requires_grad for b in model.buffers())
        assert model.head.weight is model.embed.weight
    model, before = on_meta(), {}
    before = identities(model)
    with pytest.raises(TypeError, match="requires_grad"):
        paramkit.transplant(model, values(), device="cpu", requires_grad="no")  # type: ignore[arg-type]
    assert_untouched(model, before)


# Refused.


def refused(model: nn.Module, source: Any, rules: Iterable[Rule] = (), **options: Any) -> PlanError:
    before = identities(model)
    with pytest.raises(PlanError) as caught:
        paramkit.transplant(model, source, rules, **options)
    assert_untouched(model, before)
    return caught.value


def test_without_a_device() -> None:
    error = refused(on_meta(), values())
    assert {f.kind for f in error.findings} == {"meta"}
    assert len(error.findings) == len(values())
    assert all('device="cpu"' in f.hint for f in error.findings)
    assert "nothing was written" in str(error)


def test_what_no_source_reaches() -> None:
    source = values()
    del source["body.1.running_var"], source["body.2.weight"]
    error = refused(on_meta(), source, device="cpu")
    assert {(f.name, f.kind) for f in error.findings} == {
        ("body.1.running_var", "missing"),
        ("body.2.weight", "missing"),
    }


def test_a_buffer_that_no_state_dict_has() -> None:
    error = refused(on_meta(transient=True), values(), device="cpu")
    assert [(f.name, f.kind) for f in error.findings] == [("angles", "missing")]
    for rules, source in (
        ([], values() | {"angles": torch.full((7,), 3.0)}),
        ([Rule(None, "angles", fill=3)], values()),
    ):
        model = on_meta(transient=True)
        paramkit.transplant(model, source, rules, device="cpu")
        assert model.angles.tolist() == [3] * 7
        assert "angles" not in model.state_dict()


@pytest.mark.parametrize("how", ["part", "keep", "allow_missing", "rows"])
def test_a_part_is_not_enough(how: str) -> None:
    """The rest would be whatever was in the memory."""
    source = values()
    name, options = "embed.weight", {}
    if how == "rows":
        source[name] = source[name][:30]
        rules = [Rule(name, name, rows="overlap")]
    else:
        source[name] = source[name][:20]
        rules = [Rule(name, name, "o i -> (s o) i", at={"s": 0})]
        if how == "keep":
            rules += [Rule(None, name, "-> (s o) i", at={"s": 1}, s=2)]
        elif how == "allow_missing":
            options = {"allow_missing": [name]}
    error = refused(on_meta(), source, rules, device="cpu", **options)
    assert {f.name for f in error.findings} == {name}


def test_a_part_and_a_fill_are_all() -> None:
    source = values()
    source["embed.weight"] = source["embed.weight"][:30]
    model = on_meta()
    rules = [Rule("embed.weight", "embed.weight", rows="overlap", fill="zeros")]
    paramkit.transplant(model, source, rules, device="cpu")
    assert torch.equal(model.head.weight[:30], source["embed.weight"])
    assert not model.head.weight[30:].any()


def test_values_that_disagree(tmp_path: Path) -> None:
    source = values() | {"head.weight": torch.zeros(40, 16)}
    for kind in ("mapping", "safetensors"):
        error = refused(on_meta(), stored(kind, source, tmp_path), device="cpu")
        assert {f.kind for f in error.findings} == {"conflict"}


@pytest.mark.parametrize("atomic", [True, False])
def test_a_failure_while_writing(
    atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is not in the model, so that nothing is torn."""
    path = stored("safetensors", values(), tmp_path)
    before_read, left = StoredFile.read_many, [2]

    def read_many(file: StoredFile, ranges: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise SourceError("the source file cannot be read. Nothing was written.")
        before_read(file, ranges)

    model = on_meta()
    with monkeypatch.context() as patch:
        patch.setattr(StoredFile, "read_many", read_many)
        error = refused(model, path, device="cpu", staging=4096, atomic=atomic)
    assert type(error) is SourceError
    assert left[0] < 0
    for wrong in (KeyboardInterrupt(), ValueError("mine")):
        before = identities(model)

        def progress(written: int, total: int, wrong: BaseException = wrong) -> None:
            raise wrong

        with pytest.raises(type(wrong)):
            paramkit.transplant(
                model, path, device="cpu", staging=4096, atomic=atomic, progress=progress
            )
        assert_untouched(model, before)
    paramkit.transplant(model, path, device="cpu")
    assert torch.equal(model.scale, values()["scale"])


def test_partly_on_meta_is_torn_in_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored("safetensors", values(), tmp_path)
    model = on_meta()
    model.embed = nn.Embedding(40, 16)
    model.head.weight = model.embed.weight

    def stop(written: int, total: int) -> None:
        if written > total - 100:
            raise RuntimeError("stopped")

    def half(written: int, total: int) -> None:
        if model.embed.weight[0, 0] == values()["embed.weight"][0, 0]:
            raise RuntimeError("stopped")

    with pytest.raises(paramkit.TornError):
        paramkit.transplant(model, path, device="cpu", staging=4096, progress=half)
    state = paramkit.torn(model)
    assert state is not None
    assert {*state.written, *state.unwritten} == {"embed.weight"}
    assert model.body[0].weight.is_meta
