"""Ties of the destination and of the source, for the first source of a plan and for every later one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paramkit
from paramkit import PlanError, Rule
from paramkit.resolve import resolve


class Tied(nn.Module):
    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.tok = nn.Embedding(rows, 3)
        self.head = nn.Linear(3, rows, bias=False)
        self.head.weight = self.tok.weight


def test_a_new_source_whose_ties_came_apart_is_refused_and_not_kept() -> None:
    model, first = Tied(), Tied().state_dict()
    plan = paramkit.plan(model, first)
    plan.apply()
    new = {n: t.clone() for n, t in first.items()}
    plan.apply(new)  # equal values
    apart = {n: t.clone() for n, t in new.items()}
    apart["head.weight"] += 5
    before = model.tok.weight.clone()
    with pytest.raises(PlanError, match="two different values"):
        plan.apply(apart)
    assert torch.equal(model.tok.weight, before)
    plan.apply()  # the one before is still in use
    assert torch.equal(model.tok.weight, new["tok.weight"])


def test_a_name_that_was_tied_in_the_source_may_not_come_apart_unseen() -> None:
    w = torch.rand(3)
    dst = {"a": torch.zeros(3)}
    plan = paramkit.plan(dst, {"a": w, "b": w})
    plan.apply()
    for b in (torch.rand(3), torch.rand(5)):
        with pytest.raises(PlanError):
            plan.apply({"a": w, "b": b})
    again = torch.rand(3)
    plan.apply({"a": again, "b": again})
    assert torch.equal(dst["a"], again)


@pytest.mark.parametrize("fill", [None, 0, "mean", {"normal": 1.0}])
def test_a_resized_vocabulary_with_tied_embeddings(fill: Any) -> None:
    model, source = Tied(9), Tied(6)
    paramkit.transplant(
        model, source, [Rule("{*p}.weight", "{*p}.weight", rows="overlap", fill=fill)]
    )
    assert torch.equal(model.tok.weight[:6], source.tok.weight)
    assert model.tok.weight is model.head.weight


def test_the_hooks_of_every_owner_count() -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise AssertionError

    model = Tied()
    model.head = Own(3, 6, bias=False)
    model.head.weight = model.tok.weight
    with pytest.raises(PlanError, match="its own _load_from_state_dict"):
        paramkit.transplant(model, {"tok.weight": torch.rand(6, 3)})
    with pytest.raises(PlanError, match="its own _load_from_state_dict"):
        paramkit.transplant(model, {}, [Rule(None, "tok.weight", fill=0)])
    paramkit.transplant(model, {"tok.weight": torch.rand(6, 3)}, hooks="ignore")


def test_large_stacks_cost_what_they_are_long() -> None:
    """By the number of comparisons, not by time: each write is looked up, not compared with all others."""
    from paramkit import proof

    made = 0

    class Counted(proof.Region):
        def __new__(cls, *args: Any) -> Any:
            nonlocal made
            made += 1
            return super().__new__(cls, *args)

    n = 3000
    source = {f"x.{e}.w": torch.zeros(2) for e in range(n)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "Region", Counted)
        resolve({"w": torch.zeros(n, 2)}, source, [Rule("x.{e}.w", "w", "i -> e i")])
    assert made < 5 * n


def test_a_wildcard_may_have_nothing_left_to_drop() -> None:
    rules = [Rule("a", "b"), Rule("*", None)]
    assert resolve({"b": torch.zeros(1)}, {"a": torch.zeros(1)}, rules).dropped == []


def test_sizes_that_cannot_be_are_one_finding() -> None:
    rule = Rule("w", "x.{e}", "(e o) -> o", e=10**12)
    with pytest.raises(PlanError) as caught:
        resolve({"x.0": torch.zeros(1)}, {"w": torch.zeros(2)}, [rule])
    assert [f.kind for f in caught.value.findings if f.name == "w"] == ["shape"]


def test_equal_indices_of_a_large_axis_are_one_comparison() -> None:
    source = torch.rand(4, 1, 3).expand(4, 1000, 3).reshape(4000, 3).clone()
    rule = Rule("k", "k", "(h r) e -> h e", at={"r": "*"}, r=1000)
    dst = {"k": torch.zeros(4, 3)}
    assert len(resolve(dst, {"k": source}, [rule]).ties) == 1
    paramkit.transplant(dst, {"k": source}, [rule])
    assert torch.equal(dst["k"], source[::1000])
    source[-1, -1] += 1
    with pytest.raises(PlanError, match="several indices"):
        paramkit.transplant(dst, {"k": source}, [rule])


def test_an_iterator_and_a_mapping_agree_on_names_that_rules_make() -> None:
    source = {"a": torch.ones(2), "w": torch.zeros(2)}
    for given in (source, iter(source.items()), iter(reversed(list(source.items())))):
        dst: dict[str, Tensor] = {"w": torch.full((2,), 7.0)}
        paramkit.transplant(dst, given, [Rule("a", "w")], allow_unexpected=["w"])
        assert dst["w"].tolist() == [1, 1]


def test_atomic_on_a_stale_plan_is_the_plain_refusal() -> None:
    model = nn.Linear(2, 2)
    plan = paramkit.plan(model, nn.Linear(2, 2))
    model.weight.data = torch.zeros(1)
    with pytest.raises(PlanError, match="no longer fits"):
        plan.apply(atomic=True)


def test_read_only_memory_is_never_exchanged() -> None:
    array = np.arange(4, dtype=np.float32)
    model = {"w": torch.zeros(4)}
    plan = paramkit.plan(model, {"w": torch.from_numpy(array)})
    with plan.swapped():
        assert model["w"].tolist() == [0, 1, 2, 3] and array.tolist() == [0, 1, 2, 3]
    assert model["w"].tolist() == [0] * 4


def test_what_was_swapped_in_is_put_back_beside_a_replaced_parameter() -> None:
    model, average = (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    )
    mine, theirs = model[0].weight.clone(), average[0].weight.clone()
    plan = paramkit.plan(model, average)
    with pytest.raises(PlanError, match="replaced or moved"), plan.swapped():
        model[1].bias = nn.Parameter(torch.zeros(2))
    assert torch.equal(model[0].weight, mine) and torch.equal(average[0].weight, theirs)
    plan.refresh()  # and the plan is usable again
    plan.apply()
