"""The demo, step by step, on the console."""

from __future__ import annotations

import os
from collections.abc import Mapping
from shutil import get_terminal_size

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

import paramkit

from ..recipes import bert_to_transformer_encoder
from ..sources import open_source
from .assets import Assets
from .encoder import EncoderConfig, SentenceEncoder
from .timing import Timing, interleaved
from .usual import converted, transplant_by_hand

__all__ = ["Show", "differing", "embed"]

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun.",
    "Interest rates rose again this quarter.",
    "The central bank made borrowing more expensive.",
    "How do I copy weights between two models?",
)
MAX_TOKENS = 256


def embed(model: SentenceEncoder, tokenizer: Tokenizer, sentences: list[str]) -> Tensor:
    """Sentence vectors of unit length, (sentences, size)."""
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    with torch.no_grad():
        vectors: Tensor = model(ids, mask)
    return vectors


def differing(model: nn.Module, expected: Mapping[str, Tensor]) -> tuple[list[str], int]:
    """Names whose bits are not those of `expected`, and how many elements were compared."""
    state = model.state_dict()
    bad = sorted(state.keys() ^ expected.keys())
    count = 0
    for name in state.keys() & expected.keys():
        ours, theirs = state[name], expected[name]
        count += ours.numel()
        # As bytes: a float comparison takes -0.0 for 0.0, and no NaN for itself.
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not (same and torch.equal(_as_bytes(ours), _as_bytes(theirs))):
            bad.append(name)
    return bad, count


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


class Show:
    """One run of the demo.

    Args:
        assets: the model's files.
        repeats: rounds of the timing.
        color: whether to use colours; none are used where the output is no terminal.
        console: where to print; for tests.
    """

    def __init__(
        self, assets: Assets, *, repeats: int, color: bool = True, console: Console | None = None
    ) -> None:
        self.assets = assets
        self.repeats = repeats
        width = get_terminal_size((120, 24)).columns
        self.console = console or Console(no_color=not color, highlight=False, width=width)
        self.config = EncoderConfig.read(assets.config)

    def run(self) -> int:
        """All steps; 0 where every bit is right."""
        self._intro()
        source = open_source(self.assets.weights)
        model = SentenceEncoder(self.config).eval()
        rules = bert_to_transformer_encoder()

        self._title("The plan")
        plan = paramkit.plan(model, source, rules=rules)
        self._plain(plan.explain())

        self._title("Applying it: the file is memory-mapped, its bytes are read now")
        report = self._apply(plan)
        self._plain(str(report))

        self._title("Checking it")
        good = self._check(plan, model, source)

        self._title("Using it")
        self._similarities(model)

        self._title("Timing it")
        self._time(source, rules)
        return 0 if good else 1

    # -- steps --

    def _intro(self) -> None:
        c = self.config
        self._plain(
            f"paramkit demo: from BERT's layout to stock torch.nn.TransformerEncoder layers.\n\n"
            f"  from     {self.assets.weights}\n"
            f"           separate query, key and value; {c.num_hidden_layers} layers of size {c.hidden_size}\n"
            f"  to       SentenceEncoder, made of torch.nn.TransformerEncoderLayer with one fused in_proj_weight\n"
            f"  threads  {torch.get_num_threads()}\n"
        )
        self._plain(str(paramkit.status()))

    def _apply(self, plan: paramkit.Plan) -> paramkit.Report:
        columns = (
            TextColumn("writing"),
            BarColumn(40),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("writing", total=None)
            return plan.apply(
                progress=lambda done, total: bar.update(task, completed=done, total=total)
            )

    def _check(self, plan: paramkit.Plan, model: nn.Module, source: Mapping[str, Tensor]) -> bool:
        by_plan = plan.verify()
        by_hand, count = differing(model, converted(source, self.config.num_hidden_layers))
        for label, names, ok in (
            ("plan.verify()", by_plan, "bitwise equal: no name differs"),
            (
                "against torch.cat of the source",
                by_hand,
                f"bitwise equal: {count:,} of {count:,} elements",
            ),
        ):
            if names:
                self.console.print(
                    f"  [red]differs[/]  {label}: {', '.join(names)}", soft_wrap=True
                )
            else:
                self.console.print(f"  [green]ok[/]  {label}: {ok}", soft_wrap=True)
        return not (by_plan or by_hand)

    def _similarities(self, model: SentenceEncoder) -> None:
        vectors = embed(model, Tokenizer.from_file(str(self.assets.tokenizer)), list(SENTENCES))
        table = Table(title="cosine similarity of sentence vectors", title_justify="left", box=None)
        table.add_column("", justify="right")
        table.add_column("sentence")
        for k in range(len(SENTENCES)):
            table.add_column(str(k + 1), justify="right", no_wrap=True)
        for k, row in enumerate((vectors @ vectors.T).tolist()):
            cells = [f"[bold]{x:.2f}[/]" if 0.4 < x < 0.999 else f"{x:.2f}" for x in row]
            table.add_row(str(k + 1), SENTENCES[k], *cells)
        self.console.print(table)

    def _time(self, source: Mapping[str, Tensor], rules: list[paramkit.Rule]) -> None:
        # In memory, so that the disk plays no part, and twice, so that a new source can be new.
        sources = [{name: t.clone() for name, t in source.items()} for _ in range(2)]
        first, second = (SentenceEncoder(self.config).eval() for _ in range(2))
        ready = paramkit.plan(second, sources[0], rules=rules)
        rebound = paramkit.plan(second, sources[0], rules=rules)
        turn = [0]

        def new_source() -> None:
            turn[0] ^= 1
            rebound.apply(sources[turn[0]])

        layers = self.config.num_hidden_layers
        usual = "torch.cat + load_state_dict"
        ways = {
            usual: lambda: transplant_by_hand(first, sources[0], layers),
            "plan + apply, cold": lambda: paramkit.plan(second, sources[0], rules=rules).apply(),
            "plan.apply(new source)": new_source,
            "plan.apply(), replayed": lambda: ready.apply(),
        }
        with Progress(
            TextColumn("timing"), BarColumn(40), TextColumn("round {task.completed} of {task.total}"),
            console=self.console, transient=True, auto_refresh=False,
        ) as bar:  # fmt: skip
            task = bar.add_task("timing", total=self.repeats)

            def advance() -> None:  # drawn between the rounds, by no thread beside them
                bar.advance(task)
                bar.refresh()

            timings = interleaved(ways, self.repeats, advance)
        self.console.print(_timing_table(timings, usual, self.repeats))
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > 0.75 * cores:
            self._plain(
                f"The machine is busy (load {load:.1f} on {cores} cores): these times say little."
            )
        self._plain(
            "The sources are in memory; the ratio is the usual way's median over the row's."
        )

    # -- printing --

    def _title(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{text}[/]", align="left")

    def _plain(self, text: str) -> None:
        # Names hold brackets and numbers; nothing in them is markup.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _timing_table(timings: Mapping[str, Timing], usual: str, repeats: int) -> Table:
    table = Table(
        title=f"the same transplant, {repeats} interleaved rounds", title_justify="left", box=None
    )
    table.add_column("way")
    for head in ("median", "quartiles", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, timing in timings.items():
        table.add_row(
            name,
            f"{timing.median * 1e3:.2f} ms",
            f"{timing.low * 1e3:.2f} .. {timing.high * 1e3:.2f} ms",
            f"{timings[usual].median / timing.median:.2f}x",
        )
    return table
