"""Cases that once went wrong: code that runs in the middle of a call, memory that went away."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import paramkit
from paramkit import PlanError
from tests.guards import assert_same_bits, nothing_written

pytestmark = pytest.mark.usefixtures("backend")


# load_state_dict: modules that do something of their own.


class Doubled(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.weight.mul_(2)


class Direct(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.weight.data.copy_(state_dict[prefix + "weight"])
        self.bias.data.copy_(state_dict[prefix + "bias"])


class Cached(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("transposed", torch.zeros(n_in, n_out), persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.transposed.copy_(self.weight.t())


@pytest.mark.parametrize("kind", [Doubled, Direct, Cached])
def test_modules_that_look_at_what_was_loaded(kind: type[nn.Linear]) -> None:
    state = kind(3, 2).state_dict()
    expected, model = kind(3, 2), kind(3, 2)
    expected.load_state_dict(state)
    paramkit.load_state_dict(model, state)
    for (name, want), got in zip(expected.named_buffers(), model.buffers(), strict=True):
        assert_same_bits(got, want, what=name)
    for want, got in zip(expected.parameters(), model.parameters(), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("kind", [Doubled, Direct, Cached])
def test_modules_of_their_own_beside_a_wrong_shape(kind: type[nn.Linear]) -> None:
    model = nn.Sequential(kind(3, 2), nn.Linear(2, 2))
    state = nn.Sequential(kind(3, 2), nn.Linear(2, 3)).state_dict()
    held = [*model.parameters(), *model.buffers()]
    with nothing_written(*held), pytest.raises(RuntimeError, match="size mismatch"):
        paramkit.load_state_dict(model, state)


def test_a_pre_hook_that_reads_a_loaded_sibling() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))

        def scale(state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            state[prefix + "weight"] = state[prefix + "weight"] * net[0].weight.item()

        net[1]._register_load_state_dict_pre_hook(scale)
        return net

    state = {"0.weight": torch.full((1, 1), 2.0), "1.weight": torch.full((1, 1), 5.0)}
    state |= {"0.bias": torch.zeros(1), "1.bias": torch.zeros(1)}
    net = model()
    paramkit.load_state_dict(net, state)
    assert net[1].weight.item() == 10


def test_a_post_hook_that_replaces_and_raises() -> None:
    model = nn.Linear(2, 2)
    before = model.weight

    def hook(module: nn.Module, keys: Any) -> None:
        module.weight = nn.Parameter(torch.zeros(2, 2))
        raise ValueError("no")

    model.register_load_state_dict_post_hook(hook)
    with nothing_written(before), pytest.raises(ValueError, match="no"):
        paramkit.load_state_dict(model, nn.Linear(2, 2).state_dict())
    assert model.weight is before


def test_a_loading_of_the_objects_own() -> None:
    model = nn.Linear(2, 2)
    calls = []
    model.load_state_dict = lambda *a, **k: calls.append(1)  # type: ignore[method-assign]
    paramkit.load_state_dict(model, nn.Linear(2, 2).state_dict())
    assert calls


def test_a_state_dict_with_a_lookup_of_its_own() -> None:
    class Twice(OrderedDict):  # type: ignore[type-arg]
        def __getitem__(self, key: str) -> Tensor:
            return super().__getitem__(key) * 2

    state = Twice(weight=torch.ones(1, 1), bias=torch.ones(1))
    expected, model = nn.Linear(1, 1), nn.Linear(1, 1)
    expected.load_state_dict(state)
    paramkit.load_state_dict(model, state)
    assert_same_bits(model.weight, expected.weight)
    plan = paramkit.plan({"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)})
    plan.apply(Twice(weight=torch.ones(1, 1)))
    assert plan.verify() == []


def test_a_module_that_contains_itself() -> None:
    model = nn.Module()
    model.me = model
    with pytest.raises(RecursionError):
        paramkit.load_state_dict(model, {})


# Memory that is not there, or is shared.


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize(
    "call",
    [
        lambda t: paramkit.copy_(t, torch.ones(5)),
        lambda t: paramkit.copy_(torch.ones(5), t),
        lambda t: paramkit.fill_(t, 1.0),
        lambda t: paramkit.foreach_copy_([torch.ones(5), t], [torch.zeros(5), torch.zeros(5)]),
        lambda t: paramkit.foreach_fill_([t], [torch.tensor(2.0)]),
        lambda t: paramkit.plan([t], [torch.ones(5)]),
        lambda t: paramkit.transplant({"a": t}, {"a": torch.ones(5)}),
        lambda t: paramkit.transplant({"a": torch.ones(5)}, {"a": t}),
    ],
)
def test_views_into_an_emptied_storage(call: Any, offset: int) -> None:
    base = torch.zeros(10)
    view = base[offset : offset + 5]
    base.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory"):
        call(view)


def test_a_destination_that_became_copy_on_write() -> None:
    weight = torch.zeros(4)
    plan = paramkit.plan([weight], [torch.ones(4)])
    clone = torch._lazy_clone(weight)
    try:
        plan.apply()
    except PlanError:
        assert weight.tolist() == [0] * 4
    assert clone.tolist() == [0] * 4
    plan.refresh()
    plan.apply()
    assert weight.tolist() == [1] * 4
    assert clone.tolist() == [0] * 4


# Python code that runs while a list is parsed.


def test_a_number_that_changes_the_list() -> None:
    dsts = [torch.zeros(2) for _ in range(50)]
    held = list(dsts)

    class Sly:
        def __index__(self) -> int:
            dsts.clear()
            return 3

    try:
        paramkit.foreach_fill_(dsts, [1.0, Sly(), *[2.0] * 48])
    except TypeError:
        assert all(d.tolist() == [0, 0] for d in held)  # the fallback takes no such numbers
    else:
        assert [d[0].item() for d in held] == [1, 3, *[2] * 48]


def test_a_flag_that_changes_the_list() -> None:
    dsts, srcs = [torch.zeros(2) for _ in range(50)], [torch.ones(2) for _ in range(50)]
    held = list(dsts)

    class Sly:
        def __bool__(self) -> bool:
            srcs.clear()
            return False

    try:
        paramkit.foreach_copy_(dsts, srcs, Sly())  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        assert all(d.tolist() == [0, 0] for d in held)


class Marked(Tensor):
    pass


@pytest.mark.parametrize(
    "bad",
    [
        lambda: (torch.zeros(2).as_subclass(Marked), torch.ones(3)),
        lambda: (torch.zeros(2, requires_grad=True), torch.tensor(1.0).as_subclass(Marked)),
        lambda: (torch.zeros(2), torch.ones((), device="meta").as_subclass(Marked)),
    ],
)
def test_bad_values_of_a_subclass_write_nothing(bad: Any) -> None:
    first = torch.zeros(2)
    dst, value = bad()
    with nothing_written(first), pytest.raises((RuntimeError, NotImplementedError)):
        paramkit.foreach_fill_([first, dst], [1.0, value])


def test_a_number_out_of_range_names_its_place() -> None:
    first = torch.zeros(2)
    with nothing_written(first), pytest.raises(RuntimeError, match=r"values\[1\]"):
        paramkit.foreach_fill_([first, torch.zeros(2, dtype=torch.int8)], [1.0, 300])


# Plans.


def test_bad_arguments_are_found_before_writing() -> None:
    dst = torch.zeros(2)
    plan = paramkit.plan([dst], [torch.ones(2)])
    with nothing_written(dst), pytest.raises(TypeError, match="progress"):
        plan.apply(progress=5)  # type: ignore[arg-type]
    model = nn.Linear(2, 2)
    with nothing_written(*model.parameters()), pytest.raises(TypeError, match="requires_grad"):
        paramkit.transplant(model, nn.Linear(2, 2), requires_grad="no")  # type: ignore[arg-type]
    inner = torch.zeros(2, requires_grad=True) * 1
    with nothing_written(inner), pytest.raises(PlanError, match="leaves"):
        paramkit.transplant({"a": inner}, {"a": torch.ones(2)}, requires_grad=False)


def test_the_callers_dict_is_not_the_plans() -> None:
    state = {"w": torch.ones(2)}
    plan = paramkit.plan({"w": torch.zeros(2)}, state)
    for _ in range(2):
        plan.apply(state)
        state["extra"] = torch.ones(1)
        with pytest.raises(PlanError, match="extra"):
            plan.apply(state)
        del state["extra"]
    state["extra"] = torch.ones(1)
    plan.refresh()
    plan.apply()


def test_a_refused_apply_takes_no_source() -> None:
    model = nn.Linear(2, 2)
    first, second = nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()
    plan = paramkit.plan(model, first)
    model.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(PlanError, match="bias"):
        plan.apply(second)
    plan.refresh()
    plan.apply()
    assert_same_bits(model.weight, first["weight"])


def test_a_source_that_was_resized_does_not_widen_what_fits() -> None:
    """A new source is compared with what was planned for, not with what the old one is now."""
    dst, src = torch.zeros(64), torch.ones(64)
    plan = paramkit.plan([dst], [src])
    src.resize_(1)
    with nothing_written(dst), pytest.raises(PlanError):
        plan.apply([torch.full((1,), 7.0)])
    plan.apply([torch.full((64,), 2.0)])
    assert dst.tolist() == [2] * 64


@pytest.mark.parametrize("offset", [0, 5])
def test_a_new_source_without_memory(offset: int) -> None:
    dst = torch.zeros(5)
    plan = paramkit.plan([dst], [torch.ones(5)])
    base = torch.zeros(10)
    view = base[offset : offset + 5]
    base.untyped_storage().resize_(0)
    with nothing_written(dst), pytest.raises(PlanError, match="memory"):
        plan.apply([view])


def test_a_refused_verify_takes_no_source() -> None:
    model = nn.Linear(2, 2)
    first, second = nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()
    plan = paramkit.plan(model, first)
    model.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(PlanError, match="bias"):
        plan.verify(second)
    plan.refresh()
    plan.apply()
    assert_same_bits(model.weight, first["weight"])


def test_a_plan_without_its_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    plan = paramkit.plan(model, nn.Linear(2, 2))
    del model
    with nothing_written(weight), pytest.raises(PlanError, match="no longer exists"):
        plan.apply()


def test_arguments_that_are_no_lists() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises((TypeError, PlanError), match="source"):
        paramkit.transplant(model, None)
    with pytest.raises(TypeError, match="allow_missing"):
        paramkit.transplant(model, {}, allow_missing="bias")
    with pytest.raises(TypeError, match="rules"):
        paramkit.transplant(model, {}, rules=paramkit.Rule("a", "b"))  # type: ignore[arg-type]


def test_a_dispatch_mode_sees_the_writes_of_a_plan() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    dst = torch.zeros(2)
    plan = paramkit.plan([dst], [torch.ones(2)])
    with Seen() as seen:
        plan.apply()
    assert any("copy_" in name for name in seen.names)
    assert dst.tolist() == [1, 1]


def test_a_tangent_goes_through_a_list_plan_under_no_grad() -> None:
    with forward_ad.dual_level(), torch.no_grad():
        dst = torch.zeros(2)
        src = forward_ad.make_dual(torch.ones(2), torch.full((2,), 3.0))
        paramkit.plan([dst], [src]).apply()
        assert forward_ad.unpack_dual(dst).tangent.tolist() == [3, 3]


# The command line.


def test_output_that_nobody_reads(backend: str) -> None:
    if backend != "native":
        pytest.skip("the command is the same")
    code = "import sys; from paramkit.cli import main; sys.exit(main(['status']))"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


def test_no_home_folder(backend: str) -> None:
    if backend != "native":
        pytest.skip("the loader is the same")
    code = (
        "from pathlib import Path\n"
        "def home(*a): raise RuntimeError('Could not determine home directory.')\n"
        "Path.home = classmethod(home)\n"
        "import torch, paramkit\n"
        "paramkit.copy_(torch.zeros(2), torch.ones(2)); print(paramkit.status().backend)\n"
        "try: paramkit.backend.build()\n"
        "except paramkit.backend.BuildError as error: print('TORCH_EXTENSIONS_DIR' in str(error))\n"
    )
    import os

    env = {
        k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
