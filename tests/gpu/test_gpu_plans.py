"""Plans that write on a GPU: replays, rebinding, what moved, state dicts from the host, their own lifetime."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule
from tests import cases
from tests.gpu.needs import need_gpu
from tests.gpu.storages import assert_same_storage, counted, mixed, place, raw, twin
from tests.gpu.streams import churn, delay
from tests.guards import Layout

need_gpu()


class Net(nn.Module):
    """Matrices, a convolution, a norm with buffers of two dtypes, and where wanted a tied weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        width = 24
        self.embed = nn.Embedding(50, width)
        self.body = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Conv1d(2 * width, width, 3), nn.BatchNorm1d(width)
        )
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight


HOST = torch.device("cpu")


def net(
    seed: int, device: torch.device, dtype: torch.dtype = torch.float32, *, tied: bool = True
) -> Net:
    torch.manual_seed(seed)
    made = Net(tied)
    for buffer in made.buffers():
        buffer.copy_(torch.randint(1, 9, buffer.shape))
    return made.to(device, dtype)


def assert_holds(model: nn.Module, source: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name].to(tensor.device, tensor.dtype)), name


def assert_replays(plan: paramkit.Plan, dsts: list[Tensor], srcs: list[Tensor]) -> None:
    """What apply() writes is what torch writes into twins."""
    want = [twin(dst) for dst in dsts]
    for dst, src in zip(want, srcs, strict=True):
        dst.copy_(src)
    plan.apply()
    for index, (ours, theirs) in enumerate(zip(dsts, want, strict=True)):
        assert_same_storage(ours, theirs, f"pair {index}")


# Replays.


@pytest.mark.parametrize("count", [1, 7, 2000])
def test_a_replay_is_one_launch_and_no_upload(cuda: torch.device, count: int) -> None:
    dsts, srcs = mixed(count, cuda)
    plan = paramkit.plan(dsts, srcs)
    for _ in range(3):
        for src in srcs:
            src.add_(1)
        assert counted(plan.apply) == {"launches": 1, "uploads": 0, "staged_bytes": 0}
        assert_replays(plan, dsts, srcs)
    assert plan.verify() == []


def test_many_replays_without_a_pause(cuda: torch.device) -> None:
    """The source changes between them, in the order of the stream."""
    dsts, srcs = mixed(500, cuda)
    total = torch.zeros((), device=cuda)
    first = torch.zeros((), dtype=torch.float64, device=cuda)
    plan = paramkit.plan(dsts, srcs)
    delay(20)
    for _ in range(50):
        srcs[0].add_(1)
        plan.apply()
        total += (dsts[0] != srcs[0]).sum()
        first += dsts[0].double().sum()
    assert total.item() == 0
    assert first.item() > 0


def test_fills_on_replay(cuda: torch.device) -> None:
    """Numbers become elements on the device."""
    weights = [weight.to(cuda) for weight in cases.conv_weights(300)]
    plan = paramkit.plan(cases.centre_views(weights), 0.5)
    assert counted(plan.apply) == {"launches": 1, "uploads": 0, "staged_bytes": 0}
    want = torch.zeros(8, 8, 3, 3, device=cuda)
    want[:, :, 1, 1] = 0.5
    assert all(torch.equal(weight, want) for weight in weights)
    plan.apply(2.0)
    want[:, :, 1, 1] = 2.0
    assert all(torch.equal(weight, want) for weight in weights)


def test_all_kinds_of_writes_in_one_plan(cuda: torch.device) -> None:
    """Within the GPU, within the host, to the GPU, from it, and some for torch alone."""
    rng = torch.Generator().manual_seed(4)
    dsts, srcs = [], []
    for index in range(60):
        to = cuda if index % 2 else HOST
        at = cuda if index // 2 % 2 else HOST
        dtype = (torch.float32, torch.bfloat16, torch.int16)[index % 3]
        numbers = torch.randint(0, 9, (11 + index, 17), generator=rng)
        srcs.append(numbers.to(at, dtype).t() if index % 5 == 0 else numbers.to(at, torch.float32))
        shape = tuple(srcs[-1].shape)
        dsts.append(place(Layout.dense(shape, (shape[1] + index % 4, 1)), dtype, to))
    dsts.append(torch.zeros(4, dtype=torch.complex64, device=cuda))
    srcs.append(torch.randn(4, dtype=torch.complex64, device=cuda).conj())
    plan = paramkit.plan(dsts, srcs)
    assert_replays(plan, dsts, srcs)
    for src in srcs:
        src.add_(3)
    assert_replays(plan, dsts, srcs)
    assert plan.verify() == []
    assert isinstance(plan.explain(), str)
    told: list[tuple[int, int]] = []
    plan.apply(progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]


def test_version_counters_and_leaves(cuda: torch.device) -> None:
    leaf = torch.zeros(5, device=cuda, requires_grad=True)
    plan = paramkit.plan([leaf], [torch.ones(5, device=cuda)])
    with pytest.raises(RuntimeError, match="leaf Variable"):
        plan.apply()
    before = leaf._version
    with torch.no_grad():
        plan.apply()
    assert leaf._version > before
    assert leaf.tolist() == [1] * 5


# Models.


def test_a_model_from_a_model_and_from_another(cuda: torch.device) -> None:
    model = net(0, cuda)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    plan = paramkit.plan(model, net(1, cuda))
    assert counted(plan.apply) == {"launches": 1, "uploads": 0, "staged_bytes": 0}
    for seed in (2, 3):
        source = net(seed, cuda)
        assert counted(lambda source=source: plan.apply(source))["launches"] == 1
        assert_holds(model, source.state_dict())
        assert plan.verify() == []
    assert plan.verify(net(1, cuda)) != []
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == pointers
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_state_dict_of_the_host(cuda: torch.device, dtype: torch.dtype, pinned: bool) -> None:
    """Into a model on the GPU, cast on the way; then another one of the same names."""
    model = net(0, cuda, dtype, tied=False)
    states = [net(seed, HOST, tied=False).state_dict() for seed in (1, 2)]
    if pinned:
        states = [{name: t.pin_memory() for name, t in state.items()} for state in states]
    plan = paramkit.plan(model, states[0])
    plan.apply()
    assert_holds(model, states[0])
    plan.apply(states[1])
    assert_holds(model, states[1])
    for tensor in states[1].values():
        tensor.add_(1)  # the plan reads the host's memory anew
    plan.apply()
    assert_holds(model, states[1])
    assert plan.verify() == []


def test_a_source_that_changes_its_device(cuda: torch.device) -> None:
    """Planned for the host's, applied with the GPU's, and back."""
    model = net(0, cuda)
    plan = paramkit.plan(model, net(1, HOST))
    plan.apply()
    for seed, device in ((2, cuda), (3, HOST)):
        source = net(seed, device)
        plan.apply(source)
        assert_holds(model, source.state_dict())


def test_from_a_model_on_the_gpu_to_one_on_the_host(cuda: torch.device) -> None:
    model, source = net(0, HOST, torch.bfloat16), net(1, cuda)
    plan = paramkit.plan(model, source)
    plan.apply()
    assert_holds(model, source.state_dict())
    assert plan.verify() == []


@pytest.mark.parametrize("host", [False, True])
def test_load_state_dict(cuda: torch.device, host: bool) -> None:
    ours, theirs = net(0, cuda), net(0, cuda)
    state = net(1, HOST if host else cuda).state_dict()
    keys = paramkit.load_state_dict(ours, state)
    assert keys == theirs.load_state_dict(state)
    assert_holds(ours, theirs.state_dict())
    missing = dict(state)
    del missing["body.0.bias"]
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match=r"body\.0\.bias"):
        paramkit.load_state_dict(ours, {**missing, "body.0.weight": state["body.0.weight"] + 1})
    assert_holds(ours, before)
    assert paramkit.load_state_dict(ours, missing, strict=False).missing_keys == ["body.0.bias"]


def test_a_state_dict_is_one_launch(cuda: torch.device) -> None:
    model, state = net(0, cuda, tied=False), net(1, cuda, tied=False).state_dict()
    assert counted(lambda: paramkit.load_state_dict(model, state))["launches"] == 1
    assert_holds(model, state)
    host = net(2, HOST, tied=False).state_dict()
    counts = counted(lambda: paramkit.load_state_dict(model, host))
    assert counts["launches"] == 1  # one slot holds it
    assert counts["staged_bytes"] >= sum(tensor.nbytes for tensor in model.parameters())
    assert_holds(model, host)


def test_recorded_writes(cuda: torch.device) -> None:
    """Numbers, tensors of the GPU and of the host, slices of all kinds; written once, and again."""
    model, want = net(0, cuda), net(0, cuda)
    ours, theirs = torch.rand(24, 47, device=cuda), torch.rand(50, 3)
    with paramkit.writes(model) as w:
        w["body.1.weight"][0, 0, 0] = 1.0
        w[model.body[1].weight][:, :, 1:2] = 0.5
        w["body.1.weight"][:, 1:, 2] = ours
        w["embed.weight"][:, 1:4] = theirs
        w["body.2.num_batches_tracked"][...] = 7
    assert w.plan is not None
    for again in (False, True):
        with torch.no_grad():
            if again:
                model.body[1].weight.zero_()
                want.body[1].weight.zero_()
                w.plan.apply()
            want.body[1].weight[0, 0, 0] = 1.0
            want.body[1].weight[:, :, 1:2] = 0.5
            want.body[1].weight[:, 1:, 2] = ours
            want.embed.weight[:, 1:4] = theirs
            want.body[2].num_batches_tracked[...] = 7
        assert_holds(model, want.state_dict())


def test_recorded_writes_in_order(cuda: torch.device) -> None:
    """`overlap="last"`: the later one wins, again at every replay."""
    model = nn.Linear(6, 5, device=cuda)
    with paramkit.writes(model, overlap="last") as w:
        w["weight"][...] = 1.0
        w["weight"][1:3] = torch.full((2, 6), 2.0, device=cuda)
        w["weight"][2:, 1] = torch.full((3,), 3.0)
    want = torch.ones(5, 6, device=cuda)
    want[1:3] = 2
    want[2:, 1] = 3
    assert torch.equal(model.weight, want)
    with torch.no_grad():
        model.weight.zero_()
    assert w.plan is not None
    w.plan.apply()
    assert torch.equal(model.weight, want)


@pytest.mark.parametrize("host", [False, True])
def test_a_transplant_with_rules(cuda: torch.device, host: bool) -> None:
    """Fused, transposed, interleaved and split; from the GPU and from the host, with a cast."""
    heads, width, d = 4, 32, 8
    device = HOST if host else cuda
    target = nn.ModuleDict(
        {
            "qkv": nn.Linear(width, 3 * width),
            "up": nn.Linear(width, 2 * width, bias=False),
            "rotary": nn.Linear(width, heads * d, bias=False),
            "gate": nn.Linear(width, width, bias=False),
        }
    ).to(cuda, torch.bfloat16)
    source = {f"{n}.weight": torch.rand(width, width, device=device) for n in "qkv"}
    source |= {f"{n}.bias": torch.rand(width, device=device) for n in "qkv"}
    source["up"] = torch.rand(width, 2 * width, device=device)
    source["rotary"] = torch.rand(heads * d, width, device=device)
    source["both"] = torch.rand(2 * width, width, device=device)
    rules = [
        *(Rule(f"{n}.weight", "qkv.weight", "h e -> (s h) e", at={"s": k}) for k, n in enumerate("qkv")),
        *(Rule(f"{n}.bias", "qkv.bias", "h -> (s h)", at={"s": k}) for k, n in enumerate("qkv")),
        Rule("up", "up.weight", "i o -> o i"),
        Rule("rotary", "rotary.weight", "(h d two) e -> (h two d) e", two=2, h=heads),
        Rule("both", "gate.weight", "(s o) i -> o i", at={"s": 1}),
    ]  # fmt: skip
    paramkit.transplant(target, source, rules)
    rotary = source["rotary"].view(heads, d // 2, 2, width).transpose(1, 2).reshape(-1, width)
    want = {
        "qkv.weight": torch.cat([source[f"{n}.weight"] for n in "qkv"]),
        "qkv.bias": torch.cat([source[f"{n}.bias"] for n in "qkv"]),
        "up.weight": source["up"].t(),
        "rotary.weight": rotary,
        "gate.weight": source["both"][width:],
    }
    assert_holds(target, want)


# What moved.


def test_a_parameter_that_moved(cuda: torch.device) -> None:
    model, source = net(0, cuda), net(1, cuda)
    plan = paramkit.plan(model, source)
    plan.apply()
    model.body[0].weight.data = torch.zeros_like(model.body[0].weight)
    for again in (plan.apply, plan.verify):
        with pytest.raises(PlanError, match=r"body\.0\.weight"):
            again()
    assert not model.body[0].weight.any()
    plan.refresh()
    assert counted(plan.apply)["launches"] == 1
    assert_holds(model, source.state_dict())


def test_a_model_that_went_to_the_host_and_back(cuda: torch.device) -> None:
    model, source = net(0, cuda), net(1, cuda)
    plan = paramkit.plan(model, source)
    for device in (HOST, cuda):
        model.to(device)
        with pytest.raises(PlanError):
            plan.apply()
        plan.refresh()
        plan.apply()
        assert_holds(model, source.state_dict())


def test_a_storage_that_was_freed(cuda: torch.device) -> None:
    """As FSDP does with what it has sharded: refused, then written where it lies by then."""
    model, source = net(0, cuda), net(1, cuda)
    plan = paramkit.plan(model, source)
    storage = model.body[0].weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(PlanError, match=r"body\.0\.weight"):
        plan.apply()
    storage.resize_(size)
    plan.refresh()
    plan.apply()
    assert_holds(model, source.state_dict())


@pytest.mark.parametrize("name", ["embed.weight", "body.1.weight", "body.2.num_batches_tracked"])
def test_verify_names_a_single_flipped_bit(cuda: torch.device, name: str) -> None:
    model = net(0, cuda)
    for source in (net(1, cuda), net(2, HOST)):
        plan = paramkit.plan(model, source)
        plan.apply()
        memory = raw(model.state_dict()[name])
        for byte in (0, memory.numel() - 1):
            memory[byte] ^= 16
            assert plan.verify() == [name]
            memory[byte] ^= 16
        assert plan.verify() == []


# Lifetime.


def test_a_plan_that_is_gone_before_its_launch_has_run(cuda: torch.device) -> None:
    """Made on one stream, run on another that is busy: its descriptors must stay as long as that needs them."""
    side = torch.cuda.Stream()
    for _ in range(5):
        dsts, srcs = mixed(1000, cuda)
        want = [twin(dst) for dst in dsts]
        for dst, src in zip(want, srcs, strict=True):
            dst.copy_(src)
        plan = paramkit.plan(dsts, srcs)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            delay(100)
            plan.apply()
        gone = weakref.ref(plan)
        del plan
        assert gone() is None
        churn(cuda)
        torch.cuda.synchronize()
        for index, (ours, theirs) in enumerate(zip(dsts, want, strict=True)):
            assert_same_storage(ours, theirs, f"pair {index}")


def test_plans_free_their_memory(cuda: torch.device) -> None:
    dsts, srcs = mixed(500, cuda)
    paramkit.plan(dsts, srcs).apply()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        paramkit.plan(dsts, srcs).apply()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_a_released_plan(cuda: torch.device) -> None:
    model, source = net(0, cuda), net(1, cuda)
    plan = paramkit.plan(model, source)
    plan.release()
    with pytest.raises(PlanError, match="released"):
        plan.apply()
    plan.refresh(source)
    plan.apply()
    assert_holds(model, source.state_dict())


def test_a_list_whose_destination_nobody_else_holds(cuda: torch.device) -> None:
    kept, gone = torch.zeros(3, device=cuda), torch.zeros(3, device=cuda)
    plan = paramkit.plan([kept, gone], [torch.ones(3, device=cuda)] * 2)
    plan.apply()
    del gone
    with pytest.raises(PlanError):
        plan.apply()
