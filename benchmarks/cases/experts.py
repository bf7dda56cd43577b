"""Tens of thousands of small tensors: what it costs to plan for them, to match their names, to write them."""

from __future__ import annotations

import itertools
import re
from functools import partial

import torch

from ..targets import GUARD, AtLeast, AtMost
from .models import experts, nested, small
from .registry import Work, case, moved, targets
from .transplants import TRANSPLANTS

__all__ = ["RULES", "rules"]

RULES = 400


def _plan(share: int, tiny: bool) -> Work:
    import paramkit

    state = small(experts(64 if tiny else share))
    model = nested({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    return Work(
        ours=lambda: paramkit.plan(model, state),
        proof=lambda: paramkit.plan(model, state).apply(),
        peer=lambda: model.load_state_dict(state),
        dsts=list(model.parameters()),
        bytes=0,  # a plan moves none
        facts={"tensors": len(state)},
    )


def _apply(share: int, tiny: bool) -> Work:
    import paramkit

    shapes = experts(64 if tiny else share)
    states = [small(shapes, seed=seed) for seed in (1, 2)]
    model = nested({name: torch.zeros_like(tensor) for name, tensor in states[0].items()})
    plan = paramkit.plan(model, states[1])
    ours, theirs = itertools.cycle(states), itertools.cycle(states)
    dsts = list(model.parameters())
    return Work(
        ours=lambda: plan.apply(next(ours)),
        peer=lambda: model.load_state_dict(next(theirs)),
        dsts=dsts,
        bytes=moved(dsts, dsts),
        facts={"tensors": len(dsts)},
    )


for label, share, quick in (("experts", 1, False), ("experts/8", 8, True)):
    case(
        f"{label} plan",
        TRANSPLANTS,
        "plan for small tensors of a module; torch's side is one load_state_dict",
        targets(1 / 3),
        quick=quick,
        seconds=8.0,
    )(partial(_plan, share))
    case(
        f"{label} apply(new)",
        TRANSPLANTS,
        "a plan's apply of two state dicts in turns, against load_state_dict",
        targets(30),
        quick=quick,
    )(partial(_apply, share))


def rules() -> list[tuple[str, str]]:
    """400 pairs of name templates for the mixture of experts, each of which some names need.

    Most begin with text that tells layers apart; a quarter begins with a placeholder, which an index
    over the first part of a name cannot use.
    """
    found = []
    for n in range(6, 86):
        root = "{root}" if n % 4 == 0 else "model"
        new = "{root}" if n % 4 == 0 else "decoder"
        at, to = f"{root}.layers.{n}.", f"{new}.blocks.{n}."
        found += [
            (f"{at}moe.experts.{{e}}.{part}.weight", f"{to}experts.{{e}}.{name}")
            for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        ]
        found.append((f"{at}moe.router.weight", f"{to}gate"))
        found.append((f"{at}attn.{{p}}.weight", f"{to}attention.{{p}}"))
    return found


def _renamed(names: list[str], pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Source name -> destination name, as a loop over regular expressions finds it: the first that fits."""
    compiled = []
    for src, dst in pairs:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(src))
        compiled.append((re.compile(pattern), re.sub(r"\{(\w+)\}", r"\\g<\1>", dst)))
    found = {}
    for name in names:
        for pattern, target in compiled:
            if (match := pattern.fullmatch(name)) is not None:
                found[name] = match.expand(target)
                break
        else:
            found[name] = name
    return found


@case(
    f"match 31337 names x {RULES} rules",
    TRANSPLANTS,
    "transplant from mapping to mapping; torch's side tries regular expressions, and copies",
    (AtMost("seconds", 2.0), AtMost("growth", 2.5), AtLeast("ratio", GUARD)),
    seconds=12.0,
    quick=False,
)
def match(tiny: bool) -> Work:
    import paramkit

    pairs = rules()
    asked = [paramkit.Rule(src, dst) for src, dst in pairs]
    share = 64 if tiny else 1
    whole, half = small(experts(share)), small(experts(2 * share))
    target = _renamed(list(whole), pairs)
    model = {target[name]: torch.zeros_like(tensor) for name, tensor in whole.items()}
    part = {target[name]: model[target[name]] for name in half}

    def peer() -> None:
        for name, to in _renamed(list(whole), pairs).items():
            model[to].copy_(whole[name])

    return Work(
        ours=lambda: paramkit.transplant(model, whole, asked),
        half=lambda: paramkit.transplant(part, half, asked),
        peer=peer,
        dsts=list(model.values()),
        bytes=moved(list(model.values()), list(whole.values())),
        facts={"names": len(whole), "names_of_half": len(half), "rules": len(pairs)},
    )
