"""Failures that show only while writing: rolled back, or a model that is known to be torn."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, SourceError, TornError
from paramkit.sources.lazy import StoredFile
from tests.guards import Layout, assert_same_bits, nothing_written, place, watch

COUNT, NUMEL, STAGING = 12, 1500, 16384


class Failing:
    """From the given read on, the system reports an error."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.left = at
        before = StoredFile.read_many

        def read_many(file: StoredFile, ranges: Iterable[tuple[int, Tensor]]) -> None:
            if self.left == 0:
                raise error
            self.left -= 1
            before(file, ranges)

        patch.setattr(StoredFile, "read_many", read_many)


def broken_disk() -> SourceError:
    return SourceError("the source file cannot be read. Nothing was written.")


@pytest.fixture
def values() -> dict[str, Tensor]:
    return {f"{k}.w": torch.randn(NUMEL) for k in range(COUNT)}


@pytest.fixture
def path(tmp_path: Path, values: dict[str, Tensor]) -> Path:
    file = tmp_path / "m.safetensors"
    save_file(values, file)
    return file


def fresh() -> nn.Module:
    """A model whose tensors lie between guard bytes."""
    model = nn.ModuleList()
    for _ in range(COUNT):
        layer = nn.Module()
        layer.w = nn.Parameter(place(Layout.dense((NUMEL,)), torch.float32))
        model.append(layer)
    return model


def held(model: nn.Module, before: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, str]:
    """For each tensor: whether it holds the old values, the new ones, or some of each."""
    out = {}
    for name, tensor in model.state_dict().items():
        new, old = torch.equal(tensor, values[name]), torch.equal(tensor, before[name])
        out[name] = "new" if new else "old" if old else "both"
    return out


@pytest.mark.usefixtures("backend")
def test_a_read_error_half_way_marks_the_model(
    path: Path, values: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    seen = watch(*model.parameters())
    plan = paramkit.plan(model, path, staging=STAGING)
    assert paramkit.torn(model) is None
    with monkeypatch.context() as patch:
        Failing(patch, 3, broken_disk())
        with pytest.raises(TornError, match="the model is torn") as caught:
            plan.apply()
    state = paramkit.torn(model)
    assert state is not None
    assert state == caught.value.state
    assert "othing was written" not in str(caught.value)
    assert isinstance(caught.value.__cause__, SourceError)
    now = held(model, before, values)
    assert state.written
    assert all(now[name] == "new" for name in state.written)
    assert {n for n, h in now.items() if h != "new"} <= set(state.unwritten)
    assert sorted(state.written + state.unwritten) == sorted(values)
    assert "the source file cannot be read" in state.reason

    # Part of the tensors is not enough, all of them are.
    paramkit.transplant(model, {"0.w": values["0.w"]}, allow_missing=["*"])
    left = paramkit.torn(model)
    assert left is not None
    assert left.unwritten == state.unwritten
    plan.apply()
    assert paramkit.torn(model) is None
    assert set(held(model, before, values).values()) == {"new"}
    seen.assert_only_inside()


@pytest.mark.parametrize("failing_read", range(4))
def test_atomic_puts_every_bit_back(
    path: Path, failing_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    plan = paramkit.plan(model, path, staging=STAGING)
    with monkeypatch.context() as patch:
        Failing(patch, failing_read, broken_disk())
        with nothing_written(*model.parameters()), pytest.raises(SourceError) as caught:
            plan.apply(atomic=True)
    assert not isinstance(caught.value, TornError)
    assert paramkit.torn(model) is None
    plan.apply(atomic=True)
    assert plan.verify() == []


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no more"), ValueError("mine")])
def test_an_error_from_progress(
    path: Path, values: dict[str, Tensor], error: BaseException, atomic: bool
) -> None:
    """An interrupt stays what it is; the model is marked all the same."""
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    calls: list[tuple[int, int]] = []

    def progress(written: int, total: int) -> None:
        calls.append((written, total))
        if len(calls) == 2:
            raise error

    def call() -> None:
        paramkit.transplant(model, path, staging=STAGING, progress=progress, atomic=atomic)

    if atomic:
        with nothing_written(*model.parameters()), pytest.raises(type(error)) as kept:
            call()
        assert kept.value is error
        assert paramkit.torn(model) is None
        return
    wanted = TornError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(wanted) as caught:
        call()
    state = paramkit.torn(model)
    assert state is not None
    if isinstance(caught.value, TornError):
        assert caught.value.__cause__ is error
        assert type(error).__name__ in state.reason
    now = held(model, before, values)
    # The step before the call is known to be done.
    assert {n for n, h in now.items() if h == "new"} == set(state.written)
    assert {"old"} <= set(now.values())
    assert sum(values[n].nbytes for n in state.written) <= calls[-1][0]


def test_an_error_after_the_last_byte_tears_nothing(path: Path, values: dict[str, Tensor]) -> None:
    for source in (path, values):
        model = fresh()

        def progress(written: int, total: int) -> None:
            if written == total:
                raise ValueError("too late")

        with pytest.raises(ValueError, match="too late"):
            paramkit.transplant(model, source, staging=STAGING, progress=progress)
        assert paramkit.torn(model) is None
        for name, tensor in model.state_dict().items():
            assert_same_bits(tensor, values[name])


def test_a_failure_before_the_first_write_is_the_plain_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    plan = paramkit.plan(model, path, staging=STAGING)
    with monkeypatch.context() as patch:
        Failing(patch, 0, broken_disk())
        with nothing_written(*model.parameters()), pytest.raises(SourceError) as caught:
            plan.apply()
    assert type(caught.value) is SourceError
    assert paramkit.torn(model) is None


@pytest.fixture
def large() -> dict[str, Tensor]:
    """More than the bytes between two reports of a plan in memory."""
    return {name: torch.ones(10 << 20) for name in ("0.w", "1.w")}


def stop(written: int, total: int) -> None:
    if written < total:
        raise RuntimeError("stopped")


@pytest.mark.usefixtures("compiled")
def test_from_memory(large: dict[str, Tensor]) -> None:
    model = nn.ModuleList(nn.Module() for _ in large)
    for layer in model:
        layer.w = nn.Parameter(torch.zeros(10 << 20))
    plan = paramkit.plan(model, large)
    with pytest.raises(RuntimeError, match="stopped") as kept:
        plan.apply(progress=stop, atomic=True)
    assert not isinstance(kept.value, PlanError)
    assert not any(bool(p.any()) for p in model.parameters())
    assert paramkit.torn(model) is None

    with pytest.raises(TornError, match="stopped"):
        plan.apply(progress=stop)
    state = paramkit.torn(model)
    assert state is not None
    for name, tensor in model.named_parameters():
        assert (name in state.written) == bool(tensor.all())
    assert state.unwritten
    plan.apply()
    assert paramkit.torn(model) is None


def test_a_mapping_has_no_mark_but_the_error_says_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {f"{k}.w": torch.zeros(NUMEL) for k in range(COUNT)}
    with monkeypatch.context() as patch:
        Failing(patch, 3, broken_disk())
        with pytest.raises(TornError) as caught:
            paramkit.transplant(table, path, staging=STAGING)
    assert caught.value.state is not None
    assert caught.value.state.written
    assert all(table[n].any() for n in caught.value.state.written)


@pytest.mark.parametrize("carry", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy])
def test_the_error_survives_a_pickle(
    carry: Callable[[TornError], TornError], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    with monkeypatch.context() as patch:
        Failing(patch, 3, SourceError("gone", [paramkit.Finding("x", "file", "a", "b")]))
        with pytest.raises(TornError) as caught:
            paramkit.transplant(model, path, staging=STAGING)
    again = carry(caught.value)
    assert type(again) is TornError
    assert again.state == caught.value.state
    assert again.findings == caught.value.findings
    assert str(again) == str(caught.value)


def test_the_mark_goes_with_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is another model; marks keep no model alive."""
    from paramkit.torn import _torn

    gc.collect()
    model = fresh()
    before = len(_torn)
    with monkeypatch.context() as patch:
        Failing(patch, 3, broken_disk())
        with pytest.raises(TornError):
            paramkit.transplant(model, path, staging=STAGING)
    assert paramkit.torn(model) is not None
    assert paramkit.torn(copy.deepcopy(model)) is None
    assert len(_torn) == before + 1
    del model
    gc.collect()  # the error's traceback
    assert len(_torn) == before


def test_swapped_from_a_file_that_breaks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap is undone, whatever happens, and marks nothing."""
    model = fresh()
    plan = paramkit.plan(model, path, staging=STAGING)
    with monkeypatch.context() as patch:
        Failing(patch, 3, broken_disk())
        with (
            nothing_written(*model.parameters()),
            pytest.raises(SourceError),
            plan.swapped(),
        ):
            pytest.fail("the source was not put in")
    assert paramkit.torn(model) is None


def test_a_state_dict_makes_it_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    with monkeypatch.context() as patch:
        Failing(patch, 2, broken_disk())
        with pytest.raises(TornError):
            paramkit.transplant(model, path, staging=STAGING)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    first = dict(list(state.items())[:1])
    paramkit.load_state_dict(model, first, strict=False)
    left = paramkit.torn(model)
    assert left is not None and not set(first) & {*left.written, *left.unwritten}
    paramkit.load_state_dict(model, state)
    assert paramkit.torn(model) is None
