"""The rule files of this folder, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..rulefile import load_rules, outline
from ..rules import Rule
from ..templates import Template

__all__ = ["Recipe", "describe", "load", "names"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What a recipe is for, and what it must be told.

    Attributes:
        name: for `load`.
        about: from what to what, and what it leaves out.
        needs: sizes that must be given, or are taken from a config.
        path: the rule file, which `paramkit.load_rules` and the command line read too.

    Example:
        >>> recipe = describe("gpt2_to_linear")
        >>> recipe.name, recipe.needs, recipe.path.name
        ('gpt2_to_linear', (), 'gpt2_to_linear.yaml')
    """

    name: str
    about: str
    needs: tuple[str, ...]
    path: Path

    def __str__(self) -> str:
        needs = f" Sizes: {', '.join(self.needs)}." if self.needs else ""
        return f"{self.name}: {self.about}{needs}"


def names() -> list[str]:
    """The recipes there are; never raises.

    Returns:
        Their names, sorted.

    Example:
        >>> "llama_to_fused" in names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def describe(name: str) -> Recipe:
    """What a recipe is for.

    Args:
        name: one of `names()`.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: there is no such recipe.
        ModuleNotFoundError: PyYAML is not installed.

    Example:
        >>> describe("rotary_halves_to_pairs").needs
        ('heads', 'kv_heads')
    """
    return _described(_known(name))


def load(
    name: str,
    *,
    config: object = None,
    source: str = "",
    target: str = "",
    without: Iterable[str] = (),
    **sizes: int,
) -> list[Rule]:
    """The rules of a recipe. `paramkit.invert` makes those of the way back.

    Args:
        name: one of `names()`.
        config: what says the sizes that the recipe needs: the config of a model of `transformers`, or a
            mapping with the content of its `config.json`.
        source: put before every source name, such as `"bert."`.
        target: put before every destination name.
        without: source names, as the recipe writes them, whose rules are left out: such as
            `["lm_head.weight"]` for a checkpoint whose head shares the embedding.
        sizes: sizes that the recipe needs, in place of those of the config.

    Returns:
        The rules, in order.

    Raises:
        ValueError: there is no such recipe, or `without` names what it does not have.
        RuleFileError: a size is missing, or is none that the recipe has; a ValueError too.
        ModuleNotFoundError: PyYAML is not installed.

    Example:
        >>> load("rotary_halves_to_pairs", heads=8, kv_heads=2)[1]
        Rule('{*p}.k_proj.weight', '{*p}.k_proj.weight', '(kv_heads two d) e -> (kv_heads d two) e', two=2, kv_heads=2)
    """
    recipe = _described(_known(name))
    if config is not None:
        found = _Config(config).sizes()
        sizes = {n: found[n] for n in recipe.needs if n in found} | sizes
    rules = load_rules(recipe.path, **sizes)
    left_out = [without] if isinstance(without, str) else list(without)
    unknown = [n for n in left_out if all(n != rule.src for rule in rules)]
    if unknown:
        raise ValueError(
            f"without: the recipe {name} has no rule for {', '.join(unknown)}; write the name as "
            f"{recipe.path.name} does"
        )
    rules = [rule for rule in rules if rule.src not in left_out]
    return [_prefixed(rule, source, target) for rule in rules] if source or target else rules


def _known(name: str) -> str:
    known = names()
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no recipe {name!r}; {hint}There are: {', '.join(known)}")


@cache
def _described(name: str) -> Recipe:
    path = _FOLDER / f"{name}.yaml"
    about, sizes = outline(path)
    return Recipe(name, about, tuple(n for n, value in sizes.items() if value is None), path)


def _prefixed(rule: Rule, source: str, target: str) -> Rule:
    # A literal brace or "*" in a prefix would change what the template means.
    for prefix in (source, target):
        if not Template(prefix, wildcards=True).literal:
            raise ValueError(f'a prefix must be plain text, got "{prefix}"')
    return Rule(
        None if rule.src is None else source + rule.src,
        None if rule.dst is None else target + rule.dst,
        rule.pattern,
        at=dict(rule.at),
        rows=rule.rows,
        fill=None if rule.fill is None else rule.fill.plain(),
        **dict(rule.axis_sizes),
    )


# What recipes call a size: the names that configs have for it.
_SPELLINGS = {
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "hidden": ("hidden_size", "n_embd", "dim"),
}


class _Config:
    """Sizes out of a config: an object with attributes, or a mapping."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def _read(self, size: str) -> int | None:
        for spelling in _SPELLINGS[size]:
            if isinstance(self.config, Mapping):
                value = self.config.get(spelling)
            else:
                value = getattr(self.config, spelling, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def sizes(self) -> dict[str, int]:
        """Those that can be told; what is missing is missed when the rules are made."""
        heads, hidden = self._read("heads"), self._read("hidden")
        # Configs leave out what follows from the rest.
        kv_heads = self._read("kv_heads") or heads
        head_dim = self._read("head_dim")
        if head_dim is None and heads and hidden and hidden % heads == 0:
            head_dim = hidden // heads
        group = heads // kv_heads if heads and kv_heads and heads % kv_heads == 0 else None
        found = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "group": group}
        return {name: value for name, value in found.items() if value is not None}
