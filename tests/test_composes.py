"""paramkit beside the rest of torch: transforms, inference mode, swapped tensors, parametrizations, averages.

What other parts of torch do is the reference: a function that writes with paramkit gives what it gives
when it writes with torch, under the same transform or context; what cannot be is refused by name, and
nothing is written. tests/test_compile.py has the compiler, tests/test_libraries.py what is built on torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize, stateless
from torch.optim import swa_utils

import paramkit
from paramkit import Rule
from tests.guards import assert_same_bits, nothing_written, outcome, watch
from tests.torch_ops import TorchOps

pytestmark = pytest.mark.usefixtures("patched")

WIDTH = 160  # floats: more than what `patch_torch` leaves to torch
OPERATORS = ("copy_", "fill_", "foreach_copy_", "foreach_fill_")


class Model(nn.Module):
    """Two parameters, and a buffer that `forward` writes with the function that it is given."""

    def __init__(self, write: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.seen, x.detach().mean(0))
        return self.layer(x) + self.seen.sum()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor, what=name)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    with nothing_written(*model.state_dict().values()):
        yield


def front_ends(model: nn.Module, source: nn.Module) -> dict[str, Callable[[], object]]:
    """Every way to write a whole model; each is worked out when it is called."""

    def recorded() -> None:
        with paramkit.writes(model) as w:
            for name, tensor in source.state_dict().items():
                w[name][...] = tensor

    return {
        "transplant": lambda: paramkit.transplant(model, source),
        "plan": lambda: paramkit.plan(model, source).apply(),
        "load_state_dict": lambda: paramkit.load_state_dict(model, source.state_dict()),
        "writes": recorded,
    }


FRONT_ENDS = ("transplant", "plan", "load_state_dict", "writes")


# --- torch.func ----------------------------------------------------------------------------------


def written(name: str, ops: Any) -> Callable[[Tensor], Tensor]:
    """A function of `x [n]` that writes into a buffer of its own with one operator."""

    def function(x: Tensor) -> Tensor:
        first, second = torch.zeros_like(x), x * x
        if name == "copy_":
            ops.copy_(first, x * x)
            ops.copy_(second[1:], x[:1])
        elif name == "fill_":
            ops.fill_(first, 2.0)
            ops.fill_(second[:1], 3)
        elif name == "foreach_copy_":
            ops.foreach_copy_([first, second[1:]], [x * x, x[:1]])
        else:
            ops.foreach_fill_([first, second[:1]], [2.0, 3])
        return (first.sin() * second + x).sum()

    return function


X = torch.linspace(1.0, 2.0, WIDTH)

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(X),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([X, X + 2])),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([X, X.flip(0)])),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(
        torch.stack([X, X.flip(0)])
    ),
    "vmap over columns": lambda f: torch.func.vmap(f, in_dims=1)(torch.rand(WIDTH, 3)),
    "jvp": lambda f: torch.stack(torch.func.jvp(f, (X,), (torch.ones(WIDTH),))),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "hessian": lambda f: torch.func.hessian(f)(X),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_of_the_operators(name: str, transform: str, patched: str) -> None:
    torch.manual_seed(1)
    with paramkit.backend.trace() as trace:
        expected = TRANSFORMS[transform](written(name, TorchOps))
    assert bool(trace.routes) == (patched == "patched"), trace.routes
    torch.manual_seed(1)
    assert_same_bits(TRANSFORMS[transform](written(name, paramkit)), expected)


@pytest.mark.parametrize("patched", ["cpu"], indirect=True)  # they come with the extension
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_of_the_dispatcher_operators(name: str, transform: str) -> None:
    call = TRANSFORMS[transform]
    function = written(name, torch.ops.paramkit)
    torch.manual_seed(1)
    expected = call(written(name, TorchOps))
    torch.manual_seed(1)
    assert_same_bits(call(function), expected)


@pytest.mark.parametrize("name", ["copy_", "foreach_copy_"])
def test_vmap_refuses_a_destination_that_is_not_batched(name: str, patched: str) -> None:
    """As torch: there is no place for several values in one."""
    dst, xs = torch.zeros(2), torch.ones(3, 2)

    def write(ops: Any) -> Callable[[], object]:
        call = (lambda x: ops.copy_(dst, x)) if name == "copy_" else _one_pair(ops, dst)
        return lambda: torch.func.vmap(call)(xs)

    with nothing_written(dst):
        expected = outcome(write(TorchOps))
        assert expected is RuntimeError
        assert outcome(write(paramkit)) is expected
        if patched != "native":
            assert outcome(write(torch.ops.paramkit)) is expected


def _one_pair(ops: Any, dst: Tensor) -> Callable[[Tensor], object]:
    return lambda x: ops.foreach_copy_([dst], [x])


def test_a_source_that_is_not_batched_goes_into_every_one() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        paramkit.foreach_copy_([y[:1]], [torch.tensor([7.0])])
        return y

    got = torch.func.vmap(function)(torch.ones(3, 2))
    assert got.tolist() == [[7.0, 2.0]] * 3


@pytest.mark.parametrize("kind", ["vmap", "grad", "jvp"])
def test_plans_refuse_what_a_transform_wraps(kind: str) -> None:
    """A plan knows addresses; inside a transform there are none."""
    model, keep = nn.Linear(2, 2), torch.zeros(2)
    found: list[paramkit.PlanError] = []

    def function(x: Tensor) -> Tensor:
        for make in (
            lambda: paramkit.plan([keep], [x]),
            lambda: paramkit.plan([x], [torch.zeros(2)]),
            lambda: paramkit.transplant(model, {"weight": torch.zeros(2, 2), "bias": x}),
            lambda: paramkit.transplant({"x": x}, {"x": torch.zeros(2)}),
        ):
            with pytest.raises(paramkit.PlanError) as error:
                make()
            found.append(error.value)
        with (
            pytest.raises(paramkit.PlanError) as error,
            paramkit.writes(model) as w,
        ):
            w["bias"][...] = x
        found.append(error.value)
        return (x * x).sum()

    with unchanged(model), nothing_written(keep):
        if kind == "vmap":
            torch.func.vmap(function)(torch.ones(3, 2))
        elif kind == "grad":
            torch.func.grad(function)(torch.ones(2))
        else:
            torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert len(found) == 5
    assert all("torch.func" in str(error) for error in found)


@pytest.mark.parametrize("how", FRONT_ENDS)
def test_a_model_is_written_under_vmap(how: str) -> None:
    """What vmap does not wrap is written as anywhere."""
    model, source = Model(), Model()

    def function(x: Tensor) -> Tensor:
        front_ends(model, source)[how]()
        return x * 2

    assert torch.func.vmap(function)(torch.ones(2)).tolist() == [2, 2]
    assert_state(model, state(source))


@pytest.mark.parametrize("how", FRONT_ENDS)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "grad of vmap"])
def test_a_model_is_not_written_under_grad(transform: str, how: str) -> None:
    """torch refuses to write what the function does not get as an argument; the model is not torn."""
    model, source = Model(), Model()

    def function(x: Tensor) -> Tensor:
        front_ends(model, source)[how]()
        return (x * 2).sum()

    with unchanged(model), pytest.raises(RuntimeError, match=r"torch\.func|captured Tensor"):
        TRANSFORMS[transform](function)
    assert paramkit.torn(model) is None


def test_functional_call_writes_what_was_put_in() -> None:
    model, twin = Model(paramkit.copy_), Model()
    twin.load_state_dict(model.state_dict())
    x = torch.arange(2.0 * WIDTH).reshape(2, WIDTH)
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    given["seen"] = torch.empty(WIDTH + 6)[3:-3]
    theirs = {name: tensor.clone() for name, tensor in given.items()}
    before, seen = state(model), watch(given["seen"])
    with unchanged(model):
        got = functional_call(model, given, (x,))
    seen.assert_only_inside()
    assert_same_bits(got, functional_call(twin, theirs, (x,)))
    assert_same_bits(given["seen"], theirs["seen"])
    assert_same_bits(given["seen"], torch.arange(WIDTH) + WIDTH / 2)
    assert_state(model, before)


def test_gradients_of_a_functional_call() -> None:
    """A forward that writes a buffer of its own, differentiated with respect to the parameters."""
    model, twin = Model(paramkit.copy_), Model()
    twin.load_state_dict(model.state_dict())

    def gradient(model: nn.Module) -> dict[str, Tensor]:
        params = {k: v.detach() for k, v in model.named_parameters()}

        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            given = {**params, "seen": torch.zeros(WIDTH)}
            return functional_call(model, given, (x,)).square().sum() + given["seen"].sum()

        return torch.func.grad(loss)(params, torch.ones(4, WIDTH))

    got, expected = gradient(model), gradient(twin)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same_bits(got[name], expected[name])
    with unchanged(model), pytest.raises(RuntimeError, match="captured Tensor"):
        torch.func.grad(lambda x: model(x).sum())(torch.ones(4, WIDTH))


def test_an_ensemble_of_transplanted_models() -> None:
    sources = [nn.Linear(3, 2) for _ in range(3)]
    models = [nn.Linear(3, 2) for _ in range(3)]
    for model, source in zip(models, sources, strict=True):
        paramkit.transplant(model, source)
    params, buffers = stack_module_state(models)
    x = torch.rand(5, 3)
    got = torch.func.vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(got, torch.stack([source(x) for source in sources]))
    # The stacked state is a mapping like any other, and its rows are views.
    rows = {f"{k}.weight": params["weight"].detach()[k] for k in range(3)}
    paramkit.transplant(rows, {f"{k}.weight": torch.full((2, 3), float(k)) for k in range(3)})
    assert params["weight"].detach()[:, 0, 0].tolist() == [0, 1, 2]


@contextmanager
def substituted(model: nn.Module, given: dict[str, Tensor]) -> Iterator[None]:
    with stateless._reparametrize_module(model, given):
        yield


def test_a_plan_refuses_parameters_that_were_put_in() -> None:
    model, source = Model(), Model()
    plan = paramkit.plan(model, source)
    given = state(model)
    with (
        unchanged(model),
        substituted(model, given),
        nothing_written(*given.values()),
        pytest.raises(paramkit.PlanError, match=r"layer\.weight.*replaced"),
    ):
        plan.apply()
    plan.apply()
    assert_state(model, state(source))


@pytest.mark.parametrize("how", FRONT_ENDS)
def test_what_was_put_in_is_what_is_written(how: str) -> None:
    model, source = Model(), Model()
    given = state(model)
    with unchanged(model), substituted(model, given):
        front_ends(model, source)[how]()
    for name, tensor in source.state_dict().items():
        assert_same_bits(given[name], tensor)


@pytest.mark.filterwarnings("ignore:This API is deprecated:FutureWarning")
def test_the_stateless_functional_call() -> None:
    model = Model(paramkit.copy_)
    given = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    x = torch.ones(2, WIDTH)
    with unchanged(model):
        got = stateless.functional_call(model, given, (x,))
    assert given["seen"].tolist() == [1] * WIDTH
    twin = Model()
    twin.load_state_dict(given)
    assert_same_bits(got, twin(x))


# --- inference mode ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", FRONT_ENDS)
def test_inference_mode_writes_normal_models(how: str) -> None:
    model, source = Model(), Model()
    versions = [p._version for p in model.parameters()]
    saved = model.layer(torch.ones(1, WIDTH, requires_grad=True)).sum()
    with torch.inference_mode():
        front_ends(model, source)[how]()
    assert_state(model, state(source))
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    assert not any(p.is_inference() for p in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("how", FRONT_ENDS)
def test_models_made_in_inference_mode(how: str) -> None:
    """Written inside it; outside they raise, as in torch, and nothing is written."""
    source = Model()
    with torch.inference_mode():
        model = Model()
        front_ends(model, source)[how]()
        assert_state(model, state(source))
        front_ends(model, Model())[how]()
    before = [t.tolist() for t in model.state_dict().values()]
    with pytest.raises(RuntimeError, match=r"(?i)inference"):
        front_ends(model, source)[how]()
    assert [t.tolist() for t in model.state_dict().values()] == before


@pytest.mark.parametrize("how", FRONT_ENDS)
def test_sources_made_in_inference_mode(how: str) -> None:
    model = Model()
    with torch.inference_mode():
        source = Model()
    front_ends(model, source)[how]()
    assert_state(model, source.state_dict())
    assert not any(p.is_inference() for p in model.parameters())
    model.layer(torch.ones(1, WIDTH)).sum().backward()


def test_a_plan_runs_in_and_out_of_inference_mode() -> None:
    model, sources = Model(), [Model(), Model()]
    plan = paramkit.plan(model, sources[0])
    with torch.inference_mode():
        plan.apply(sources[1])
        assert plan.verify() == []
    assert_state(model, state(sources[1]))
    plan.apply(sources[0])
    assert_state(model, state(sources[0]))


# --- swapped tensors -----------------------------------------------------------------------------


def new_parameter() -> nn.Parameter:
    return nn.Parameter(torch.full((2, WIDTH), 5.0))


def test_a_released_plan_lets_tensors_be_swapped() -> None:
    model, source = Model(), Model()
    plan = paramkit.plan(model, source)
    plan.apply()
    plan.release()
    weight = model.layer.weight
    torch.utils.swap_tensors(weight, new_parameter())
    assert model.layer.weight is weight
    assert weight[0, 0].item() == 5
    with pytest.raises(paramkit.PlanError, match="released"):
        plan.apply()
    plan.refresh(source)
    plan.apply()
    assert_state(model, state(source))


def test_a_plan_never_writes_what_was_swapped_away() -> None:
    """The extension holds the tensors, and torch refuses to swap; if it does swap, the plan refuses."""
    model, source = Model(), Model()
    plan = paramkit.plan(model, source)
    other = new_parameter()
    try:
        torch.utils.swap_tensors(model.layer.weight, other)
    except RuntimeError as error:
        assert "use_count" in str(error)
        plan.apply()
        assert_state(model, state(source))
        return
    with (
        unchanged(model),
        nothing_written(other),
        pytest.raises(paramkit.PlanError, match=r"layer\.weight.*moved"),
    ):
        plan.apply()
    plan.refresh()
    plan.apply()
    assert_state(model, state(source))


@pytest.mark.parametrize("how", [*FRONT_ENDS, "operators", "list plan", "swapped"])
def test_nothing_is_held_after_a_call(how: str) -> None:
    """torch swaps only tensors that nobody else holds."""
    model, source = Model(), Model()
    if how == "operators":
        with torch.no_grad():
            paramkit.copy_(model.layer.weight, source.layer.weight)
            paramkit.foreach_copy_(list(model.parameters()), list(source.parameters()))
            paramkit.foreach_fill_(list(model.parameters()), 0.0)
    elif how == "list plan":
        with torch.no_grad():
            plan = paramkit.plan(list(model.parameters()), list(source.parameters()))
            plan.apply()
            plan.release()
    elif how == "swapped":
        plan = paramkit.plan(model, source)
        with plan.swapped():
            pass
        plan.release()
    else:
        front_ends(model, source)[how]()
    torch.utils.swap_tensors(model.layer.weight, new_parameter())
    assert model.layer.weight[0, 0].item() == 5
    torch.utils.swap_tensors(source.layer.weight, new_parameter())


@pytest.fixture
def swapping() -> Iterator[None]:
    """`Module.to` and `load_state_dict` swap tensors instead of setting their data."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_conversions_that_swap() -> None:
    model, source = Model(), Model().double()
    plan = paramkit.plan(model, source)
    plan.apply()
    plan.release()
    weight = model.layer.weight
    model.to(torch.float64)
    assert model.layer.weight is weight
    plan.refresh(source)
    plan.apply()
    assert_state(model, state(source))
    plan.release()
    other = Model()
    paramkit.load_state_dict(model, other.state_dict())
    assert_state(model, {k: v.double() for k, v in other.state_dict().items()})


# --- parametrizations ----------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


def symmetric(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "symmetric": symmetric,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("how", FRONT_ENDS)
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_models(kind: str, how: str) -> None:
    make = PARAMETRIZED[kind]
    model, source = make(nn.Linear(3, 3)).eval(), make(nn.Linear(3, 3)).eval()
    weight = source.weight.detach().clone()
    front_ends(model, source)[how]()
    assert_state(model, state(source))
    assert_same_bits(model.weight.detach(), weight)


def test_a_plain_weight_by_a_rule() -> None:
    model, source = symmetric(nn.Linear(3, 3)), nn.Linear(3, 3)
    with unchanged(model), pytest.raises(paramkit.PlanError) as error:
        paramkit.transplant(model, source)
    kinds = {finding.kind for finding in error.value.findings}
    assert kinds == {"missing", "unexpected"}
    paramkit.transplant(model, source, [Rule("weight", "parametrizations.weight.original")])
    assert_same_bits(model.weight, source.weight.triu() + source.weight.triu(1).mT)


def test_a_computed_weight_cannot_be_recorded() -> None:
    model = symmetric(nn.Linear(3, 3))
    with unchanged(model), paramkit.writes(model) as w:
        with pytest.raises(paramkit.UnknownNameError):
            w["weight"]
        with pytest.raises(paramkit.UnknownNameError):
            w[model.weight]
    with paramkit.writes(model) as w:
        w["parametrizations.weight.original"][0, 1] = 9.0
    assert model.weight[1, 0].item() == 9


def test_a_parametrization_that_comes_and_goes() -> None:
    model, source = nn.Linear(3, 3), nn.Linear(3, 3)
    plan = paramkit.plan(model, source)
    symmetric(model)
    with unchanged(model), pytest.raises(paramkit.PlanError, match="replaced"):
        plan.apply()
    parametrize.remove_parametrizations(model, "weight", leave_parametrized=False)
    with unchanged(model):
        try:
            plan.apply(source)
            outcome = "applied"
        except paramkit.PlanError:
            outcome = "refused"
    assert outcome == "refused"
    plan.refresh()
    plan.apply()
    assert_state(model, state(source))


def test_cached_parametrizations_are_as_torchs() -> None:
    """Within `cached()` a computed weight stays what it was, whoever writes."""
    model, twin = symmetric(nn.Linear(3, 3)), symmetric(nn.Linear(3, 3))
    twin.load_state_dict(model.state_dict())
    values = torch.rand(3, 3)
    with parametrize.cached(), torch.no_grad():
        for each in (model, twin):
            _ = each.weight
        paramkit.copy_(model.parametrizations.weight.original, values)
        twin.parametrizations.weight.original.copy_(values)
        assert_same_bits(model.weight, twin.weight)
    assert_same_bits(model.weight, twin.weight)
    assert_same_bits(model.weight.triu(), values.triu())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_norms_by_hooks(make: Callable[[nn.Module], nn.Module]) -> None:
    model, source = make(nn.Linear(3, 3)).eval(), make(nn.Linear(3, 3)).eval()
    x = torch.rand(2, 3)
    paramkit.transplant(model, source)
    assert_state(model, state(source))
    assert_same_bits(model(x), source(x))


# --- averages ------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def steps(model: nn.Module, update: Callable[[], object], count: int = 4) -> None:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        model(torch.rand(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()


def averaged(model: nn.Module, **options: Any) -> swa_utils.AveragedModel:
    return swa_utils.AveragedModel(model, **options)


def multi_average(averages: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
    """An average of 0.9 that is worked out beside, and put in with paramkit."""
    mixed = torch._foreach_lerp(averages, current, 0.1)
    paramkit.foreach_copy_(averages, list(mixed))


AVERAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "mean": dict,
    "mean with buffers": lambda: {"use_buffers": True},
    "ema": lambda: {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "ema, one by one": lambda: {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_models(kind: str) -> None:
    """Averages go on as they would after torch's own loading, from the same start."""
    torch.manual_seed(5)
    source = Normed()
    results = []
    for load in (paramkit.transplant, lambda m, s: m.load_state_dict(s.state_dict())):
        model = Normed()
        load(model, source)
        average = averaged(model, **AVERAGES[kind]())
        steps(model, lambda m=model, a=average: a.update_parameters(m))
        evaluated = Normed()
        load(evaluated, average.module)
        swa_utils.update_bn([torch.rand(8, 3) for _ in range(2)], average)
        results.append((state(model), state(evaluated), state(average)))
    for got, expected in zip(*results, strict=True):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_same_bits(got[name], expected[name], what=name)


def test_an_average_put_in_by_paramkit() -> None:
    results = []
    for function in (multi_average, swa_utils.get_ema_multi_avg_fn(0.9)):
        torch.manual_seed(5)
        model = Normed()
        average = averaged(model, multi_avg_fn=function)
        steps(model, lambda m=model, a=average: a.update_parameters(m))
        results.append(state(average))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_evaluating_an_average() -> None:
    """`swapped` puts the average in for an evaluation, and training goes on from every bit."""
    model = Normed()
    average = averaged(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    plan = paramkit.plan(model, average.module)
    x = torch.rand(4, 3)
    for _ in range(2):
        steps(model, lambda: average.update_parameters(model), 2)
        before, averages = state(model), state(average.module)
        expected = copy.deepcopy(average.module).eval()(x)
        with plan.swapped():
            model.eval()
            assert_same_bits(model(x), expected)
            model.train()
        assert_state(model, before)
        assert_state(average.module, averages)


def test_names_of_an_averaged_model() -> None:
    """Its own state dict has `module.` before the names, and a counter."""
    model = Normed()
    average = averaged(model)
    average.update_parameters(model)
    rules = [Rule("{*p}", "module.{*p}")]
    paramkit.transplant(average, model, rules, allow_missing=["n_averaged"])
    assert_state(average.module, state(model))
    assert average.n_averaged.item() == 1
    back = Normed()
    paramkit.transplant(back, average, [*paramkit.invert(rules), Rule("n_averaged", None)])
    assert_state(back, state(model))


class ModelEma(nn.Module):
    """An exponential moving average as timm's: a copy in eval mode, buffers copied, weights mixed."""

    def __init__(self, model: nn.Module, decay: float, copies: Callable[..., object]) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay = decay
        self.copies = copies
        for parameter in self.module.parameters():
            parameter.requires_grad = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        mine, theirs = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1.0 - self.decay)
        self.copies(list(self.module.buffers()), list(model.buffers()))

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        self.copies(list(self.module.state_dict().values()), list(model.state_dict().values()))

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def test_a_moving_average_as_timms(patched: str) -> None:
    results = []
    for copies in (paramkit.foreach_copy_, TorchOps.foreach_copy_):
        torch.manual_seed(5)
        model = Normed()
        ema = ModelEma(model, 0.9, copies)
        steps(model, lambda m=model, e=ema: e.update(m))
        mixed = state(ema)
        with paramkit.backend.trace() as t:
            ema.set(model)
        if copies is paramkit.foreach_copy_:
            assert t.routes == {"native" if patched == "native" else "copy": 9}
        assert_state(ema.module, state(model))
        results.append(mixed)
    for name in results[1]:
        assert_same_bits(results[0][name], results[1][name], what=name)


# --- TorchScript ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models() -> None:
    """TorchScript hides what its modules hold: refused before anything is written, but for loading."""
    scripted, source = torch.jit.script(Normed()), Normed()
    holder = nn.ModuleDict({"inner": scripted})
    for how in ("transplant", "plan", "writes"):
        with unchanged(scripted), pytest.raises(paramkit.PlanError, match="ScriptModule"):
            front_ends(scripted, source)[how]()
    with unchanged(scripted), pytest.raises(paramkit.PlanError, match="ScriptModule"):
        paramkit.transplant(holder, source, [Rule("{*p}", "inner.{*p}")])
    paramkit.load_state_dict(scripted, source.state_dict())
    assert_state(scripted, state(source))
    model = Normed()
    paramkit.transplant(model, scripted)
    assert_state(model, state(source))
