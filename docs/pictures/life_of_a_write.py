"""Draws life_of_a_write.svg: python docs/pictures/life_of_a_write.py

One write, of the key's weight into its third of a fused query, key and value, from the rule to the report.
The file is text that changes with this script alone, so that it can be kept beside it and compared.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

TARGET = Path(__file__).with_suffix(".svg")

WIDTH, HEIGHT = 920, 1010
INK, SOFT, LINE, PAPER = "#1d2733", "#5b6875", "#b8c2cc", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#d9822b", "#2a9d6f", "#c8423b"
PALE = {BLUE: "#e8f0fd", ORANGE: "#fcf1e4", GREEN: "#e5f5ee", RED: "#fbe9e8", LINE: "#f4f6f8"}
LEFT, MIDDLE = 40, 330  # where the words begin, and what they are about


class Drawing:
    """Lines of SVG, one element each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    def text(
        self, x: float, y: float, words: str, size: int = 14, color: str = INK, **style: str
    ) -> None:
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.add(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{extra}>{escape(words)}</text>'
        )

    def code(self, x: float, y: float, words: str, size: int = 13, **style: str) -> None:
        self.text(x, y, words, size, font_family="monospace", **style)

    def box(
        self, x: float, y: float, w: float, h: float, color: str = LINE, round_: int = 6
    ) -> None:
        self.add(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round_}" '
            f'fill="{PALE[color]}" stroke="{color}" stroke-width="1.5"/>'
        )

    def chip(self, x: float, y: float, w: float, words: str, color: str = LINE) -> None:
        self.box(x, y, w, 26, color, 13)
        ink = SOFT if color == LINE else color
        weight = "normal" if color == LINE else "bold"
        self.text(x + w / 2, y + 18, words, 13, ink, text_anchor="middle", font_weight=weight)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add(
            f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke="{SOFT}" stroke-width="2" fill="none" '
            'marker-end="url(#arrow)"/>'
        )

    def step(self, y: float, number: int, name: str, *words: str) -> None:
        self.add(f'<circle cx="{LEFT + 14}" cy="{y - 5:g}" r="14" fill="{INK}"/>')
        self.text(LEFT + 14, y, str(number), 14, PAPER, text_anchor="middle", font_weight="bold")
        self.text(LEFT + 38, y, name, 16, font_weight="bold")
        for k, line in enumerate(words):
            self.text(LEFT + 38, y + 22 + 18 * k, line, 13, SOFT)

    def grid(
        self, x: float, y: float, rows: int, columns: int, chosen: range, color: str, cell: int = 13
    ) -> None:
        for r in range(rows):
            for c in range(columns):
                fill = PALE[color] if r in chosen else PAPER
                stroke = color if r in chosen else LINE
                self.add(
                    f'<rect x="{x + c * cell:g}" y="{y + r * cell:g}" width="{cell}" height="{cell}" '
                    f'fill="{fill}" stroke="{stroke}"/>'
                )


def draw() -> str:
    """The picture, as the text of an SVG file."""
    d = Drawing()
    d.add(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" role="img" '
        'aria-label="The life of a write, from the call to the report">'
    )
    d.add("<defs>")
    d.add(
        '<marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker>'
    )
    d.add("</defs>")
    d.add(f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>')
    d.text(LEFT, 44, "The life of a write", 22, font_weight="bold")

    # What the user says.
    d.box(LEFT, 62, 806, 50)
    d.code(LEFT + 16, 82, 'Rule("k.weight", "qkv.weight", "h e -> (s h) e", at={"s": 1})')
    d.text(
        LEFT + 16,
        102,
        "or copy_, foreach_copy_, load_state_dict, writes(), patch_torch(), two lists: all make writes",
        13,
        SOFT,
    )

    d.arrow(LEFT + 14, 112, LEFT + 14, 138)
    d.step(
        162,
        1,
        "Make",
        "A view of the destination",
        "takes a view of the source.",
        "No data is touched.",
    )
    d.grid(MIDDLE, 146, 3, 8, range(3), ORANGE)
    d.code(MIDDLE, 204, "k.weight", 12)
    d.arrow(MIDDLE + 118, 166, MIDDLE + 182, 166)
    d.grid(MIDDLE + 196, 146, 9, 8, range(3, 6), BLUE)
    d.code(MIDDLE + 310, 158, "qkv.weight", 12)
    for k, line in enumerate(
        ("sizes        (3, 8)", "dst strides  (8, 1)", "dst offset   24", "src strides  (8, 1)")
    ):
        d.code(MIDDLE + 310, 182 + 19 * k, line, 12, style="white-space: pre")

    d.step(
        298,
        2,
        "Check",
        "Names, shapes, dtypes, memory;",
        "every element written once,",
        "every one read or dropped.",
    )
    d.chip(MIDDLE, 288, 260, "all of it is right: goes on", GREEN)
    d.box(MIDDLE + 300, 278, 216, 46, RED)
    d.text(MIDDLE + 314, 297, "wrong: one error, all problems", 13, RED)
    d.text(MIDDLE + 314, 315, "in it, and nothing was written", 13, RED)

    d.step(398, 3, "Normalize", "Drop loops of one, sort them,", "merge what lies in one run.")
    d.code(MIDDLE, 398, "3 rows of 8", 13)
    d.arrow(MIDDLE + 106, 393, MIDDLE + 182, 393)
    d.code(MIDDLE + 196, 398, "1 run of 24", 13)
    for k in range(24):
        d.add(
            f'<rect x="{MIDDLE + 196 + 13 * k}" y="410" width="13" height="13" fill="{PALE[BLUE]}" stroke="{BLUE}"/>'
        )

    d.step(482, 4, "Classify", "One kernel for each kind of", "write, with or without a cast.")
    for k, (name, width) in enumerate(
        (("copy", 70), ("rows", 70), ("transpose", 96), ("general", 84), ("fill", 60))
    ):
        x = MIDDLE + (0, 80, 160, 266, 360)[k]
        d.chip(x, 468, width, name, BLUE if name == "copy" else LINE)
    d.text(
        MIDDLE,
        516,
        "What the kernels do not take is left to torch's own copy_ and fill_, that pair alone.",
        12,
        SOFT,
    )

    # What a plan keeps.
    d.add(
        f'<path d="M{WIDTH - 54} 140 h14 V530 h-14" stroke="{GREEN}" stroke-width="2" fill="none"/>'
    )
    d.add(
        f'<path d="M{LEFT} 562 H{WIDTH - 40}" stroke="{GREEN}" stroke-width="2" stroke-dasharray="6 5"/>'
    )
    d.text(MIDDLE, 550, "A plan keeps what is above the line.", 13, GREEN, font_weight="bold")
    here = "apply() begins here: is everything still where it was?"
    d.text(MIDDLE, 586, here, 13, GREEN, font_weight="bold")
    again = "If not, it is refused by name, and refresh() goes back to step 1."
    d.text(MIDDLE, 604, again, 13, SOFT)

    d.step(
        642,
        5,
        "Share out",
        "Versions rise, so that autograd",
        "sees the write. Pieces of equal",
        "cost keep all threads busy, with",
        "many small tensors or one large.",
    )
    d.chip(MIDDLE, 630, 120, "version += 1", ORANGE)
    d.arrow(MIDDLE + 126, 643, MIDDLE + 160, 643)
    for k, color in enumerate((BLUE, GREEN, RED)):
        x = MIDDLE + 170 + 120 * k
        for piece in range(3):
            d.add(
                f'<rect x="{x + 36 * piece}" y="633" width="36" height="20" fill="{PALE[color]}" '
                f'stroke="{color}"/>'
            )
        d.text(x + 54, 671, f"thread {k + 1}", 12, color, text_anchor="middle")

    d.step(
        764,
        6,
        "Run",
        "In one native pass. Long ones",
        "give up the GIL. No byte outside",
        "of the views is touched.",
    )
    for k, words in enumerate(
        (
            "CPU: kernels for AVX-512, AVX2, or plain C++",
            "CUDA: the whole list in one launch",
            "no extension: torch's own copy_ and fill_, with the same results",
        )
    ):
        d.box(MIDDLE, 720 + 40 * k, 516, 32, LINE if k else BLUE)
        d.text(MIDDLE + 16, 741 + 40 * k, words, 13)

    d.step(882, 7, "Report", "What was written, converted,", "left alone and dropped.")
    d.box(MIDDLE, 856, 516, 126)
    report = (
        "1 tensor written by 3 writes: 72 elements, 288 bytes",
        "in ... us, ... GB/s read + write",
        "backend cpu: 3 copy",
    )
    for k, line in enumerate(report):
        d.code(MIDDLE + 16, 880 + 20 * k, line, 13)
    d.text(
        MIDDLE + 16, 950, "After an error half way: which tensors have the new values;", 13, SOFT
    )
    d.text(MIDDLE + 16, 968, "with atomic=True, what was there is put back.", 13, SOFT)
    for y1, y2 in ((220, 274), (356, 374), (442, 458), (526, 618), (722, 740), (826, 858)):
        d.arrow(LEFT + 14, y1, LEFT + 14, y2)

    d.add("</svg>")
    return "\n".join(d.lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
