"""Ways to go wrong, one for each place in csrc/torch where an error leaves: for what is kept or lost on the way.

All but those in EXTENSION fail on the fallback, too.

A case makes what it needs once, and then fails again and again, in the same way, with the same objects.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramkit
from tests.threads import LIMIT, Work

__all__ = ["CASES", "EXTENSION", "Case", "Stop", "fails"]


class Stop(Exception):
    """What callbacks, hooks and subclasses raise."""


@dataclass
class Case:
    """A call that fails.

    Attributes:
        call: to be repeated.
        error: what it raises; None: it returns without having done anything.
        watched: objects whose references must be the same afterwards.
    """

    call: Callable[[], object]
    error: type[BaseException] | None
    watched: list[Any] = field(default_factory=list)


def fails(case: Case) -> None:
    """Call it, and let go of the error with all that it holds."""
    if case.error is None:
        case.call()
        return
    try:
        case.call()
    except case.error as error:
        # The frames of the traceback hold the arguments.
        error.__traceback__ = error.__context__ = error.__cause__ = None
    else:
        raise AssertionError(f"no {case.error.__name__}")


CASES: dict[str, Callable[[], Case]] = {}


def _case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__.strip("_").replace("_", " ")] = make
    return make


# Cases with arguments that only the extension has, or refuses in this way.
EXTENSION: set[str] = set()


def _of_extension(make: Callable[[], Case]) -> Callable[[], Case]:
    EXTENSION.add(make.__name__.replace("_", " "))
    return _case(make)


def _extension() -> Any:
    return paramkit.backend.active()


class Raising(Tensor):
    """A subclass whose writes raise."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.copy_, Tensor.fill_):
            raise Stop
        return super().__torch_function__(func, types, args, kwargs)


class Untrue:
    def __bool__(self) -> bool:
        raise Stop


class Unindexed:
    def __index__(self) -> int:
        raise Stop


class Unequal(str):
    """A name that can be hashed, and not compared."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise Stop


def _good(n: int) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.zeros(3) for _ in range(n)], [torch.ones(3) for _ in range(n)]


# ---- python_ops.cpp: one pair --------------------------------------------------------------------


def _copies(dst: Any, src: Any, error: type[BaseException], non_blocking: Any = False) -> Case:
    return Case(lambda: paramkit.copy_(dst, src, non_blocking), error, [dst, src, non_blocking])


def _fills(dst: Any, value: Any, error: type[BaseException]) -> Case:
    return Case(lambda: paramkit.fill_(dst, value), error, [dst, value])


@_of_extension
def copy_argument_count() -> Case:
    dst, src = torch.zeros(2), torch.ones(2)
    return Case(lambda: _extension().copy_(dst, src), TypeError, [dst, src])


@_case
def copy_into_no_tensor() -> Case:
    return _copies([1.5], torch.ones(2), TypeError)


@_case
def copy_from_no_tensor() -> Case:
    return _copies(torch.ones(2), [1.5], TypeError)


@_case
def copy_does_not_broadcast() -> Case:
    return _copies(torch.zeros(2), torch.ones(3), RuntimeError)


@_of_extension
def copy_untrue_flag() -> Case:
    return _copies(torch.zeros(2), torch.ones(2), Stop, Untrue())


@_case
def copy_leaf() -> Case:
    return _copies(nn.Parameter(torch.zeros(2)), torch.ones(2), RuntimeError)


@_case
def copy_expanded() -> Case:
    return _copies(torch.zeros(1).expand(3), torch.ones(3), RuntimeError)


@_case
def copy_partial_overlap() -> Case:
    whole = torch.zeros(9)
    return _copies(whole[:6], whole[3:], RuntimeError)


@_case
def copy_meta() -> Case:
    return _copies(torch.zeros(2), torch.ones(2, device="meta"), NotImplementedError)


@_case
def copy_inference() -> Case:
    with torch.inference_mode():
        dst = torch.zeros(2)
    return _copies(dst, torch.ones(2), RuntimeError)


@_case
def copy_without_memory() -> Case:
    dst = torch.zeros(2)
    dst.untyped_storage().resize_(0)
    return _copies(dst, torch.ones(2), RuntimeError)


@_case
def copy_into_a_subclass_that_raises() -> Case:
    return _copies(torch.zeros(3).as_subclass(Raising), torch.ones(3), Stop)


@_case
def copy_from_a_subclass_that_raises() -> Case:
    return _copies(torch.zeros(3), torch.ones(3).as_subclass(Raising), Stop)


@_case
def copy_subclass_does_not_broadcast() -> Case:
    return _copies(torch.zeros(2).as_subclass(Raising), torch.ones(3), RuntimeError)


@_case
def fill_argument_count() -> Case:
    dst = torch.zeros(2)
    return Case(lambda: _extension().fill_(dst), TypeError, [dst])


@_case
def fill_with_no_number() -> Case:
    return _fills(torch.zeros(2), "text of its own", TypeError)


@_case
def fill_too_negative() -> Case:
    return _fills(torch.zeros(2, dtype=torch.int64), -(1 << 70), OverflowError)


@_case
def fill_too_large() -> Case:
    return _fills(torch.zeros(2, dtype=torch.int64), 1 << 70, OverflowError)


@_case
def fill_out_of_range() -> Case:
    return _fills(torch.zeros(2, dtype=torch.uint8), 12_345.75, RuntimeError)


@_case
def fill_complex_number() -> Case:
    return _fills(torch.zeros(2), 1.5 + 2.5j, RuntimeError)


@_case
def fill_numpy_complex() -> Case:
    return _fills(torch.zeros(2), np.complex128(1.5 + 2.5j), RuntimeError)


@_case
def fill_numpy_text() -> Case:
    return _fills(torch.zeros(2), np.str_("text"), TypeError)


@_of_extension
def fill_index_raises() -> Case:
    return _fills(torch.zeros(2), Unindexed(), Stop)


@_case
def fill_vector() -> Case:
    return _fills(torch.zeros(2), torch.ones(2), RuntimeError)


@_case
def fill_meta() -> Case:
    return _fills(torch.zeros(2), torch.ones((), device="meta"), NotImplementedError)


@_case
def fill_leaf() -> Case:
    return _fills(nn.Parameter(torch.zeros(2)), 1234.5, RuntimeError)


@_case
def fill_subclass_that_raises() -> Case:
    return _fills(torch.zeros(3).as_subclass(Raising), 1234.5, Stop)


@_case
def fill_subclass_with_a_tensor() -> Case:
    return _fills(torch.zeros(3).as_subclass(Raising), torch.tensor(2.0), Stop)


@_case
def fill_subclass_out_of_range() -> Case:
    return _fills(torch.zeros(3, dtype=torch.uint8).as_subclass(Raising), 12_345.75, RuntimeError)


# ---- python_ops.cpp: lists -----------------------------------------------------------------------


def _lists(
    dsts: Any, srcs: Any, error: type[BaseException], call: Any = None, flag: Any = False
) -> Case:
    call = call or (lambda: paramkit.foreach_copy_(dsts, srcs, flag))
    inner = [x for both in (dsts, srcs) if isinstance(both, (list, tuple)) for x in both]
    return Case(call, error, [dsts, srcs, flag, *inner])


def _fill_lists(dsts: Any, values: Any, error: type[BaseException]) -> Case:
    return _lists(dsts, values, error, lambda: paramkit.foreach_fill_(dsts, values))


def _one_bad(dst: Any = None, src: Any = None, n: int = 5) -> tuple[list[Any], list[Any]]:
    """Good pairs, and a bad one among them."""
    dsts: list[Any]
    srcs: list[Any]
    dsts, srcs = _good(n)
    if dst is not None:
        dsts[n - 2] = dst
    if src is not None:
        srcs[n - 2] = src
    return dsts, srcs


@_case
def foreach_no_list() -> Case:
    dsts, srcs = _good(2)
    return _lists(iter(dsts), srcs, TypeError)


@_case
def foreach_second_no_list() -> Case:
    dsts, srcs = _good(2)
    return _lists(dsts, {0: srcs}, TypeError)


@_case
def foreach_empty() -> Case:
    return _lists([], [], RuntimeError)


@_case
def foreach_lengths() -> Case:
    dsts, srcs = _good(4)
    return _lists(dsts, srcs[1:], RuntimeError)


@_of_extension
def foreach_untrue_flag() -> Case:
    return _lists(*_good(3), Stop, flag=Untrue())


@_case
def foreach_bad_destination() -> Case:
    return _lists(*_one_bad(dst="text of its own"), TypeError)


@_case
def foreach_bad_source() -> Case:
    return _lists(*_one_bad(src=object()), TypeError)


@_case
def foreach_shape() -> Case:
    return _lists(*_one_bad(src=torch.ones(7)), RuntimeError)


@_case
def foreach_tuple_with_a_leaf() -> Case:
    dsts, srcs = _one_bad(dst=nn.Parameter(torch.zeros(3)))
    return _lists(tuple(dsts), tuple(srcs), RuntimeError)


@_case
def foreach_subclass_that_raises() -> Case:
    return _lists(*_one_bad(dst=torch.zeros(3).as_subclass(Raising)), Stop)


@_case
def foreach_subclass_then_a_bad_pair() -> Case:
    dsts, srcs = _one_bad(dst=torch.zeros(3).as_subclass(Raising), n=6)
    srcs[-1] = torch.ones(9)
    return _lists(dsts, srcs, RuntimeError)


@_case
def foreach_long_with_a_bad_pair() -> Case:
    return _lists(*_one_bad(src=torch.ones(7), n=5000), RuntimeError)


@_case
def foreach_native_that_raises() -> Case:
    """A complex destination is torch's; what it cannot take raises there."""
    return _lists(*_one_bad(dst=torch.zeros(3).to_sparse(), src=torch.ones(4)), RuntimeError)


@_case
def foreach_fill_no_list() -> Case:
    return _fill_lists(torch.zeros(3), 1.25, TypeError)


@_case
def foreach_fill_empty() -> Case:
    return _fill_lists([], 1.25, RuntimeError)


@_case
def foreach_fill_lengths() -> Case:
    return _fill_lists(_good(3)[0], [1.25, 2.25], RuntimeError)


@_case
def foreach_fill_bad_value() -> Case:
    return _fill_lists(_good(4)[0], [1.25, 2.25, "text of its own", 3.25], TypeError)


@_case
def foreach_fill_one_bad_value() -> Case:
    return _fill_lists(_good(4)[0], "text of its own", TypeError)


@_of_extension
def foreach_fill_index_raises() -> Case:
    return _fill_lists(_good(4)[0], [1.25, 2.25, Unindexed(), 3.25], Stop)


@_case
def foreach_fill_bad_destination() -> Case:
    return _fill_lists([*_good(3)[0], "text of its own"], 1.25, TypeError)


@_case
def foreach_fill_subclass_that_raises() -> Case:
    dsts = [*_good(2)[0], torch.zeros(3).as_subclass(Raising)]
    return _fill_lists(dsts, [1.25, torch.tensor(2.0), 1.75], Stop)


# ---- load_state_dict.cpp -------------------------------------------------------------------------


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def _loads(state: Any, error: type[BaseException] | None, model: nn.Module | None = None) -> Case:
    model = _model() if model is None else model

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paramkit.load_state_dict(model, state)

    held = [model, *model.parameters(), *model.buffers(), state]
    return Case(call, error, [*held, *(state.values() if isinstance(state, dict) else ())])


def _state(**changes: Any) -> OrderedDict[str, Any]:
    state = OrderedDict(_model().state_dict())
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@_case
def load_argument_count() -> Case:
    model = _model()
    return Case(lambda: _extension().load_state_dict(model), TypeError, [model])


@_case
def load_no_mapping() -> Case:
    return _loads([1.5], TypeError)


@_case
def load_missing() -> Case:
    return _loads(_state(**{"1__weight": None}), RuntimeError)


@_case
def load_unexpected() -> Case:
    return _loads(_state(more=torch.ones(1)), RuntimeError)


@_case
def load_shape() -> Case:
    return _loads(_state(**{"0__bias": torch.ones(9)}), RuntimeError)


@_case
def load_no_tensor() -> Case:
    return _loads(_state(**{"0__bias": "text of its own"}), RuntimeError)


@_case
def load_hook_raises() -> Case:
    model = _model()

    def hook(*_: Any) -> None:
        raise Stop

    model.register_load_state_dict_post_hook(hook)
    case = _loads(_state(), Stop, model)
    case.watched.append(hook)
    return case


@_case
def load_pre_hook_raises() -> Case:
    model = _model()

    def hook(*_: Any) -> None:
        raise Stop

    model[0].register_load_state_dict_pre_hook(hook)
    case = _loads(_state(), Stop, model)
    case.watched.append(hook)
    return case


@_of_extension
def load_buffer_set_raises() -> Case:
    model = _model()
    odd = Unequal("running_mean")
    model[1]._non_persistent_buffers_set = {odd}
    state = _state()
    return Case(
        lambda: _extension().load_state_dict(model, state, True),
        Stop,
        [model, odd, *state.values()],
    )


@_of_extension
def load_names_raise() -> Case:
    model, state = _model(), _state()
    odd = {Unequal(name): value for name, value in state.items()}
    return Case(
        lambda: _extension().load_state_dict(model, odd, True),
        Stop,
        [model, odd, *odd, *odd.values()],
    )


# ---- plan.cpp, module.cpp ------------------------------------------------------------------------


def _compiled(write: Any = None, slots: Any = ()) -> Case:
    dsts, srcs = _good(2)
    write = [0, 0, (3,), (1,), 0, (1,), 0] if write is None else write
    call = lambda: _extension().Plan(dsts, srcs, [write], slots, False, False)  # noqa: E731
    return Case(call, None, [*dsts, *srcs, write, *write, slots])


@_of_extension
def plan_short_write() -> Case:
    case = _compiled([0, 0, (3,)])
    case.error = IndexError
    return case


@_of_extension
def plan_bad_write() -> Case:
    case = _compiled([0, 0, (3,), ("text of its own",), 0, (1,), 0])
    case.error = RuntimeError  # of pybind11
    return case


@_of_extension
def plan_bad_number() -> Case:
    case = _compiled([0, 99, (3,), (1,), 0, (1,), 0])
    case.error = IndexError
    return case


@_of_extension
def plan_bad_slot() -> Case:
    case = _compiled(slots=[({}, "key of its own")])
    case.error = IndexError
    return case


@_of_extension
def plan_arguments() -> Case:
    dsts, srcs = _good(2)
    return Case(
        lambda: _extension().Plan(dsts, "text of its own", [], [], False, False),
        TypeError,
        [*dsts, *srcs],
    )


@_of_extension
def plan_rebind_names() -> Case:
    dsts, srcs = _good(2)
    plan = _extension().Plan(dsts, srcs, [], [], False, False)
    names, tensors = ["only one"], {"only one": srcs[0]}
    return Case(
        lambda: plan.rebind(tensors, names), RuntimeError, [names, tensors, plan, *dsts, *srcs]
    )


@_case
def plan_rebind_refused() -> Case:
    model, source = _model(), _state()
    plan = paramkit.plan(model, source)
    other = _state(**{"0__bias": torch.ones(9)})
    held = [model, *model.parameters(), plan, other, *other.values(), *source.values()]
    return Case(lambda: plan.apply(other), paramkit.PlanError, held)


@_case
def plan_resolve() -> Case:
    model, source = _model(), _state(**{"0__bias": torch.ones(9), "1__weight": None})
    return Case(
        lambda: paramkit.plan(model, source),
        paramkit.PlanError,
        [model, *model.parameters(), source, *source.values()],
    )


@_case
def plan_conflict() -> Case:
    whole = torch.arange(4.0)
    dsts, srcs = [whole[:2], whole[2:]], [whole[2:], torch.zeros(2)]
    return Case(lambda: paramkit.plan(dsts, srcs), paramkit.PlanError, [whole, *dsts, *srcs])


def _raises(done: int, total: int) -> None:
    raise Stop


@_case
def plan_progress_raises() -> Case:
    model, source = _model(), _state()
    plan = paramkit.plan(model, source)
    held = [model, *model.parameters(), plan, *source.values(), _raises]
    return Case(lambda: plan.apply(progress=_raises), Stop, held)


@_case
def plan_progress_raises_atomic() -> Case:
    model, source = _model(), _state()
    plan = paramkit.plan(model, source)
    held = [model, *model.parameters(), plan, *source.values(), _raises]
    return Case(lambda: plan.apply(progress=_raises, atomic=True), Stop, held)


@_case
def plan_progress_of_a_list_raises() -> Case:
    dsts, srcs = _good(3)
    plan = paramkit.plan(dsts, srcs)
    return Case(lambda: plan.apply(progress=_raises), Stop, [*dsts, *srcs, plan, _raises])


@_case
def plan_of_a_leaf() -> Case:
    dsts: list[Tensor] = [torch.zeros(3), nn.Parameter(torch.zeros(3))]
    srcs = _good(2)[1]
    plan = paramkit.plan(dsts, srcs)
    return Case(plan.apply, RuntimeError, [*dsts, *srcs, plan])


class Refusing(TorchDispatchMode):
    """Under which no copy can be done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            raise Stop
        return func(*args, **(kwargs or {}))


@_case
def plan_under_a_mode_that_raises() -> Case:
    dsts, srcs = _good(3)
    plan = paramkit.plan(dsts, srcs)

    def call() -> None:
        with Refusing():
            plan.apply()

    return Case(call, Stop, [*dsts, *srcs, plan])


@_case
def foreach_under_a_mode_that_raises() -> Case:
    dsts, srcs = _good(3)

    def call() -> None:
        with Refusing():
            paramkit.foreach_copy_(dsts, srcs)

    return Case(call, Stop, [*dsts, *srcs, dsts, srcs])


@_case
def plan_moved() -> Case:
    model, source = _model(), _state()
    plan = paramkit.plan(model, source)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    held = [model, *model.parameters(), plan, *source.values()]
    return Case(plan.apply, paramkit.PlanError, held)


@_case
def plan_exchange_converts() -> Case:
    dsts, srcs = [torch.zeros(3)], [torch.ones(3).half()]
    write = (0, 0, (3,), (1,), 0, (1,), 0)
    plan = _extension().Plan(dsts, srcs, [write], [], False, False)
    return Case(plan.exchange, ValueError, [*dsts, *srcs, plan])


@_case
def plan_exchange_repeats() -> Case:
    dsts, srcs = [torch.zeros(3)], [torch.ones(1)]
    write = (0, 0, (3,), (1,), 0, (0,), 0)
    plan = _extension().Plan(dsts, srcs, [write], [], False, False)
    return Case(plan.exchange, ValueError, [*dsts, *srcs, plan])


@_case
def plan_swapped_block_raises() -> Case:
    model, source = _model(), _state()
    plan = paramkit.plan(model, source)

    def call() -> None:
        with plan.swapped():
            raise Stop

    return Case(call, Stop, [model, *model.parameters(), plan, *source.values()])


# ---- recorder.cpp, names.cpp, basic_index.cpp ----------------------------------------------------


def _block(
    record: Callable[[Any, nn.Module], object], error: type[BaseException], *watched: Any
) -> Case:
    model = _model()

    def call() -> None:
        with paramkit.writes(model) as w:
            w["0.weight"][0] = 0.25
            w[model[0].bias][...] = model[1].bias.detach()
            record(w, model)

    return Case(call, error, [model, *model.parameters(), *model.buffers(), *watched])


@_case
def writes_block_raises() -> Case:
    def record(w: Any, model: nn.Module) -> None:
        raise Stop

    return _block(record, Stop)


@_case
def writes_unknown_name() -> Case:
    name = "0.weigth" + "_of_its_own"
    return _block(lambda w, m: w[name], KeyError, name)


@_case
def writes_unknown_tensor() -> Case:
    other = torch.zeros(3)
    return _block(lambda w, m: w[other], KeyError, other)


@_case
def writes_odd_key() -> Case:
    key = [1.5]
    return _block(lambda w, m: w[key], TypeError, key)


@_case
def writes_deletion() -> Case:
    def record(w: Any, model: nn.Module) -> None:
        del w["0.bias"][0]

    return _block(record, TypeError)


@_case
def writes_read() -> Case:
    return _block(lambda w, m: w["0.bias"][0], TypeError)


def _assigned(index: Any, value: Any, error: type[BaseException]) -> Case:
    def record(w: Any, model: nn.Module) -> None:
        w["0.weight"][index] = value

    return _block(record, error, index, value)


@_case
def writes_mask() -> Case:
    return _assigned(torch.tensor([True, False, True]), 1.25, TypeError)


@_case
def writes_long_index() -> Case:
    return _assigned((0,) * 200, 1.25, paramkit.PlanError)


@_case
def writes_index_out_of_range() -> Case:
    return _assigned((12_345, slice(0, 54_321)), 1.25, paramkit.PlanError)


@_case
def writes_negative_step() -> Case:
    return _assigned(slice(None, None, -12_345), 1.25, paramkit.PlanError)


@_case
def writes_huge_integer() -> Case:
    return _assigned(1 << 80, 1.25, paramkit.PlanError)


@_case
def writes_value_shape() -> Case:
    return _assigned(slice(1, 3), torch.ones(5), paramkit.PlanError)


@_case
def writes_no_value() -> Case:
    return _assigned(slice(1, 3), "text of its own", TypeError)


@_case
def writes_huge_value() -> Case:
    return _assigned(slice(1, 3), 1 << 80, Exception)


@_case
def writes_overlap() -> Case:
    return _assigned((slice(0, 2), 1), 1.25, paramkit.PlanError)


@_case
def writes_changed_value() -> Case:
    value = torch.ones(2)

    def record(w: Any, model: nn.Module) -> None:
        w["0.weight"][1] = value
        value.add_(1)

    return _block(record, paramkit.PlanError, value)


@_case
def writes_subclass_value() -> Case:
    return _assigned(slice(1, 2), torch.ones(7).as_subclass(Raising), paramkit.PlanError)


@_case
def writes_name_that_raises() -> Case:
    tensors = {Unequal("a"): torch.zeros(3), "b": torch.zeros(2)}

    def call() -> None:
        with paramkit.writes(tensors) as w:
            w["a"][0] = 1.25

    return Case(call, Stop, [*tensors, *tensors.values()])


@_case
def writes_open_arguments() -> Case:
    model = _model()
    recorder = paramkit.writes(model)
    return Case(lambda: recorder._open(model), TypeError, [model, recorder])


# ---- patch.cpp, dropin.py ------------------------------------------------------------------------

ENOUGH = 100_000
"""Elements of a write that the patch takes."""


def _patched(call: Callable[[], object], error: type[BaseException], *watched: Any) -> Case:
    def patched() -> None:
        with paramkit.patch_torch():
            call()

    return Case(patched, error, list(watched))


@_case
def patched_copy_does_not_broadcast() -> Case:
    dst, src = torch.zeros(ENOUGH), torch.ones(ENOUGH + 1)
    return _patched(lambda: dst.copy_(src), RuntimeError, dst, src)


@_case
def patched_copy_leaf() -> Case:
    dst, src = nn.Parameter(torch.zeros(ENOUGH)), torch.ones(ENOUGH)
    return _patched(lambda: dst.copy_(src), RuntimeError, dst, src)


@_case
def patched_copy_partial_overlap() -> Case:
    whole = torch.zeros(ENOUGH)
    dst, src = whole[1:], whole[:-1]
    return _patched(lambda: dst.copy_(src), RuntimeError, whole, dst, src)


@_case
def patched_copy_into_a_subclass_that_raises() -> Case:
    dst, src = torch.zeros(ENOUGH).as_subclass(Raising), torch.ones(ENOUGH)
    return _patched(lambda: dst.copy_(src), Stop, dst, src)


@_case
def patched_fill_out_of_range() -> Case:
    dst = torch.zeros(ENOUGH, dtype=torch.uint8)
    return _patched(lambda: dst.fill_(12_345.75), RuntimeError, dst)


@_case
def patched_fill_leaf() -> Case:
    dst = nn.Parameter(torch.zeros(ENOUGH))
    return _patched(lambda: dst.fill_(1234.5), RuntimeError, dst)


def _patched_lists(dsts: list[Any], srcs: list[Any], error: type[BaseException]) -> Case:
    return _patched(
        lambda: torch._foreach_copy_(dsts, srcs), error, dsts, srcs, *dsts, *srcs
    )  # fmt: skip


@_case
def patched_foreach_does_not_broadcast() -> Case:
    dsts, srcs = _good(5)
    dsts[3] = torch.zeros(7)
    return _patched_lists(dsts, srcs, RuntimeError)


@_case
def patched_foreach_leaf() -> Case:
    dsts, srcs = _good(5)
    dsts[3] = nn.Parameter(torch.zeros(3))
    return _patched_lists(dsts, srcs, RuntimeError)


@_case
def patched_foreach_lengths() -> Case:
    dsts, srcs = _good(5)
    return _patched_lists(dsts, srcs[1:], RuntimeError)


@_case
def patched_foreach_no_tensor() -> Case:
    dsts, srcs = _good(5)
    return _patched_lists(dsts, [*srcs[:4], "text of its own"], TypeError)


@_case
def patched_foreach_under_a_mode_that_raises() -> Case:
    dsts, srcs = _good(5)

    def call() -> None:
        with Refusing():
            torch._foreach_copy_(dsts, srcs)
            dsts[0].copy_(srcs[0])

    return _patched(call, Stop, dsts, srcs, *dsts, *srcs)


@_case
def patched_load_shape() -> Case:
    model, state = _model(), _state(**{"0__bias": torch.ones(9)})
    held = [model, *model.parameters(), state, *state.values()]
    return _patched(lambda: model.load_state_dict(state), RuntimeError, *held)


@_case
def patch_used_again() -> Case:
    patch = paramkit.patch_torch()
    patch.remove()
    return Case(patch.__enter__, RuntimeError, [patch])


# ---- claims.cpp, held_claim.cpp ------------------------------------------------------------------


def _while_held(tensor: Tensor, call: Callable[[Callable[[], None]], object]) -> None:
    """Call something while another thread is at a tensor; what it gets starts a signal that raises Stop here."""
    there, over, wanted = threading.Event(), threading.Event(), threading.Event()
    here = threading.get_ident()

    def other() -> None:
        with _extension().Claim([tensor], []):
            there.set()
            while not over.wait(0.02):
                if wanted.is_set():
                    wanted.clear()
                    signal.pthread_kill(here, signal.SIGUSR1)

    def stop(*_: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    work = Work(other)
    try:
        assert there.wait(LIMIT)
        call(wanted.set)
    finally:
        over.set()
        work.result()
        signal.signal(signal.SIGUSR1, before)


def _deadlock(inner: Callable[[], object], outer: Tensor, held: Tensor) -> None:
    def call(_: object) -> None:
        with _extension().Claim([outer], []):
            inner()

    _while_held(held, call)


@_case
def claim_deadlock() -> Case:
    own, held = torch.zeros(3), torch.zeros(3)

    def inner() -> None:
        with _extension().Claim([held], []):
            raise AssertionError("not reached")

    return Case(lambda: _deadlock(inner, own, held), paramkit.PlanError, [own, held])


@_case
def claim_deadlock_of_a_plan() -> Case:
    model, source = _model(), _state()
    plan, own, held = paramkit.plan(model, source), torch.zeros(3), model[0].weight
    watched = [model, *model.parameters(), plan, *source.values(), own]
    return Case(lambda: _deadlock(plan.apply, own, held), paramkit.PlanError, watched)


@_case
def claim_interrupted_while_it_waits() -> Case:
    held = torch.zeros(3)

    def call(interrupt: Callable[[], None]) -> None:
        interrupt()
        with _extension().Claim([held], []):
            raise AssertionError("not reached")

    return Case(lambda: _while_held(held, call), Stop, [held])


@_case
def plan_interrupted_while_it_waits() -> Case:
    model = nn.Linear(2, 3)
    source = {name: value + 1 for name, value in model.state_dict().items()}
    plan = paramkit.plan(model, source)

    def call(interrupt: Callable[[], None]) -> None:
        interrupt()
        plan.apply()

    watched = [model, *model.parameters(), plan, *source.values()]
    return Case(lambda: _while_held(model.bias, call), Stop, watched)


@_of_extension
def claim_no_list() -> Case:
    dsts, src = torch.zeros(3), "text of its own"
    return Case(lambda: _extension().Claim([dsts], src), TypeError, [dsts, src])


@_of_extension
def claim_no_tensors() -> Case:
    dst, srcs = torch.zeros(3), ["text of its own"]
    return Case(lambda: _extension().Claim([dst], srcs), TypeError, [dst, srcs])


@_of_extension
def claim_unknown_purpose() -> Case:
    dst, doing = torch.zeros(3), "text of its own"
    return Case(lambda: _extension().Claim([dst], [], doing), ValueError, [dst, doing])


@_case
def claim_argument_count() -> Case:
    dst = torch.zeros(3)
    return Case(lambda: _extension().Claim([dst]), TypeError, [dst])
