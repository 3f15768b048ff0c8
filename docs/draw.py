"""Draws windows.svg, cross_batch.svg and positions.svg beside this file: python docs/draw.py

An SVG is text: every function returns a piece of it. Colours are classes of STYLE, in a light and a dark set; a card behind
each drawing makes it legible on any page. Blue is memory, or the true past, and orange the local context, in all three.
"""

from html import escape
from itertools import pairwise
from pathlib import Path

WIDTH = 760
STYLE = """
text { font: 13px sans-serif; fill: #1f2328 } .small { font-size: 12px } .bold { font-weight: bold }
.head { font: bold 15px sans-serif } .muted { fill: #57606a } .over { paint-order: stroke; stroke: #ffffff; stroke-width: 5px }
.card { fill: #ffffff; stroke: #d0d7de } .line { fill: none; stroke: #57606a; stroke-width: 1.5 } .tip { fill: #57606a }
.guide { stroke: #d0d7de; stroke-dasharray: 2 4 } .grid { fill: none; stroke: #d0d7de }
.blank { fill: none; stroke: #848d97; stroke-dasharray: 4 3 } .memory { fill: #cfe3ff; stroke: #2563eb }
.local { fill: #ffdcb8; stroke: #c2570c } .other { fill: #ecdcfb; stroke: #8b3fd1 } .query { fill: #1f2328 }
.seen { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
text, .query { fill: #e6edf3 } .muted, .tip { fill: #a5afba } .over { stroke: #161b22 } .card { fill: #161b22; stroke: #3d444d }
.line { stroke: #a5afba } .guide, .grid { stroke: #3d444d } .memory { fill: #173f75; stroke: #6cb0ff }
.local { fill: #713a0b; stroke: #ff9f4a } .other { fill: #4c2a72; stroke: #c99aff } .seen { fill: #4cc264 } }
"""

# ------------------------------------------------------------------------------------------------- Pieces of a drawing


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words with the baseline at y; x is their start, middle or end, as anchor says."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, w: float, h: float, kind: str) -> str:
    return f'<rect x="{x:.4g}" y="{y:g}" width="{w:.4g}" height="{h:g}" rx="2" class="{kind}"/>'


def path(d: str, kind: str = "line", more: str = "") -> str:
    return f'<path d="{d}" class="{kind}" {more}/>'


def arrow(d: str) -> str:
    return path(d, more='marker-end="url(#tip)"')


def legend(x: float, y: float, kind: str, words: str) -> str:
    return box(x, y - 12, 14, 14, kind) + text(x + 21, y, words)


def page(height: int, title: str, about: str, pieces: list[str]) -> str:
    """The whole SVG: what it is called and shows, for those who cannot see it, then a card with the pieces on it."""
    tip = '<marker id="tip" refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
            ' role="img" aria-labelledby="title about">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="about">{escape(about)}</desc>',
            f"<style>{STYLE}</style>",
            f'<defs>{tip}<path d="M0 0 8 4 0 8z" class="tip"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" class="card"/>',
            *pieces,
            "</svg>\n",
        ]
    )


# ------------------------------------------------------------------------------------------- A long prompt, in windows

LEFT, SCALE, TOP, PITCH, TALL = 184, 0.48, 100, 64, 28  # of windows.svg: the bars' left end, pixels per token, rows


def reading_steps(T: int, last: int, window: int) -> list[tuple[str, int, int]]:
    """(what is done, start, stop): then tokens start to stop - 1 are the local context, and all before them are memory."""
    prefix, full = T - last, T - last + window
    steps = [("Read a window", *ends) for ends in pairwise([*range(0, prefix, window), prefix])]
    steps += [(f"Read the last {last}", prefix, T), (f"Generate {full - T} tokens", prefix, full)]
    return [*steps, ("Generate the next", full, full + 1)]


def token_x(token: float) -> float:
    return LEFT + SCALE * token


def bar(y: float, start: int, stop: int, kind: str, words: str) -> str:
    """Tokens start to stop - 1, with words in the middle; one token alone is drawn wider than it is, and has them below."""
    alone = stop - start == 1
    label = text(token_x((start + stop) / 2), y + 18, words, "small", "middle")
    if alone:
        label = text(token_x(start) + 9, y + TALL + 17, words, "small over", "end")
    return box(token_x(start), y, 9 if alone else SCALE * (stop - start), TALL, kind) + label


def local_words(n: int) -> str:
    if n == 1:
        return "position 0"
    return f"positions 0–{n - 1}" if n > 200 else f"0–{n - 1}"


def step_row(y: float, did: str, first: int, start: int, stop: int, T: int) -> list[str]:
    """One step: tokens first to stop - 1 are new in it."""
    ids = f"tokens {first}–{stop - 1}" if stop - first > 1 else f"token {first}"
    pieces = [text(20, y + 12, did, "bold"), text(20, y + 28, ids, "small muted")]
    if start:
        pieces.append(bar(y, 0, start, "memory", f"memory: {start} tokens"))
    else:
        pieces.append(text(20, y + 43, "memory is empty", "small muted"))
    if stop < T:
        pieces.append(bar(y, stop, T, "blank", ""))
    return [*pieces, bar(y, start, stop, "local", local_words(stop - start))]


def step_arrow(y: float, start: int, stop: int, moves: bool) -> str:
    """From a local context to its place in the next row, with words on the side where there is room."""
    x = token_x((start + stop) / 2)
    words = "moves into memory, whole" if moves else "stays local, and grows until the window is full"
    side, anchor = (8, "start") if x < LEFT + 370 else (-8, "end")
    return arrow(f"M{x:g} {y + TALL + 3}V{y + PITCH - 2}") + text(x + side, y + TALL + 22, words, "small over", anchor)


def windows(T: int = 1000, last: int = 128, window: int = 256) -> str:
    steps = reading_steps(T, last, window)
    bottom = TOP + PITCH * (len(steps) - 1) + TALL
    pieces = [
        text(20, 30, f"{T} tokens, last_context_length {last}, windows of {window}", "head"),
        legend(20, 56, "memory", "memory (memory layers only)"),
        legend(244, 56, "local", "local context, with its positions"),
        legend(492, 56, "blank", "not read yet"),
        text(20, TOP - 15, "token", "small muted"),
    ]
    for start in sorted({start for _, start, _ in steps} | {T}):
        x = token_x(start)
        pieces += [path(f"M{x:g} {TOP - 10}V{bottom}", "guide"), text(x, TOP - 15, str(start), "small muted", "middle")]
    for i, (did, start, stop) in enumerate(steps):
        first = steps[i - 1][2] if i else 0
        pieces += step_row(TOP + PITCH * i, did, first, start, stop, T)
        if i + 1 < len(steps):
            pieces.append(step_arrow(TOP + PITCH * i, start, stop, moves=steps[i + 1][1] == stop))
    about = (
        f"The first {T - last} of {T} tokens are read in windows of {window}. Each is a local context of its own, sees the memory"
        f" of all before it, and then moves into memory whole. The last {last} tokens stay local. When generation has filled"
        " the window, the whole local context moves into memory, and the next token starts a new one at position 0."
    )
    return page(bottom + 36, "How a long prompt moves into memory, window by window", about, pieces)


# ------------------------------------------------------------------------------------------------ Cross-batch training

BATCH, RANGE, PACKING = 8, 6, 4
STEP = -(-(RANGE + 1) // (PACKING - 1))  # rounded up
X, Y, CELL = 96, 116, 44  # of cross_batch.svg: the matrix's corner, and the size of a cell
RIGHT, BOTTOM = X + BATCH * CELL, Y + BATCH * CELL


def entries_seen(b: int) -> int:
    """How many of the entries before it entry b of the batch sees."""
    return min(b % PACKING * STEP, RANGE, b)


def kind_of_cell(b: int, key: int) -> str:
    """What the keys of entry `key` are to the queries of entry b."""
    if key == b:
        return "local"
    if not b - entries_seen(b) <= key < b:
        return ""
    return "memory" if key // PACKING == b // PACKING else "other"


def name(b: int) -> str:
    return f"{'AB'[b // PACKING]}{b % PACKING + 1}"


def half(x: float, y: float, size: float) -> str:
    """Causal: a query (down) sees the keys (to the right) up to its own."""
    return path(f"M{x} {y}v{size}h{size}z", "local")


def matrix_cell(b: int, key: int) -> str:
    x, y, size, kind = X + key * CELL + 3, Y + b * CELL + 3, CELL - 6, kind_of_cell(b, key)
    if not kind:
        return ""
    if kind == "local":
        return half(x, y, size)
    return box(x, y, size, size, kind) + text(x + size / 2, y + 24, "+" if kind == "memory" else "−", "", "middle")


def matrix_row(b: int) -> list[str]:
    y, kinds = Y + b * CELL + 27, [kind_of_cell(b, key) for key in range(BATCH)]
    return [
        text(X - 12, y, name(b), "bold", "end"),
        *(matrix_cell(b, key) for key in range(BATCH)),
        text(RIGHT + 24, y, f"min({b % PACKING} × {STEP}, {RANGE}, {b}) = {entries_seen(b)}"),
        text(RIGHT + 232, y, f"({kinds.count('memory')}, {kinds.count('other')})", "bold", "middle"),
    ]


def matrix_frame() -> list[str]:
    """Lines between entries, stronger ones between documents, and what stands above the columns."""
    pieces = [text(X + (b + 0.5) * CELL, Y - 12, name(b), "bold", "middle") for b in range(BATCH)]
    for every, kind in ((1, "grid"), (PACKING, "line")):
        for at in range(0, BATCH * CELL + 1, every * CELL):
            pieces.append(path(f"M{X} {Y + at}H{RIGHT}M{X + at} {Y}V{BOTTOM}", kind))
    return [
        *pieces,
        text(X - 12, Y - 28, "keys of →", "small muted", "end"),
        text(X - 12, Y - 12, "queries of ↓", "small muted", "end"),
        text(RIGHT + 24, Y - 28, "entries seen before it:", "small muted"),
        text(RIGHT + 24, Y - 12, f"min(i × ⌈{RANGE + 1} / {PACKING - 1}⌉, {RANGE}, b)", "small muted"),
        text(RIGHT + 232, Y - 12, "(positives, negatives)", "small muted", "middle"),
    ]


def cross_batch() -> str:
    y = BOTTOM + 32
    pieces = [
        text(20, 30, f"A batch of {BATCH} entries, packing {PACKING}, cross_batch_range {RANGE}", "head"),
        text(
            20,
            54,
            f"Two documents, A and B, of {PACKING} chunks each. Entry b, from 0, is chunk i = b % {PACKING} of its document.",
        ),
        *matrix_frame(),
        *(piece for b in range(BATCH) for piece in matrix_row(b)),
        half(20, y - 12, 14) + text(41, y, "itself, causally"),
        legend(170, y, "memory", "+ positives: its own past"),
        legend(370, y, "other", "− negatives: another document"),
        legend(606, y, "grid", "blank: not seen"),
    ]
    about = (
        "A matrix: a row shows the entries whose keys the queries of one entry see. Entry b sees itself, causally, and the"
        f" min(i * {STEP}, {RANGE}, b) entries before it, i = b % {PACKING}. Those of its own document are positives, the others"
        f" negatives. Entries seen, row by row: {', '.join(str(entries_seen(b)) for b in range(BATCH))}."
    )
    return page(BOTTOM + 52, "Which entries of a batch see which, in training", about, pieces)


# ----------------------------------------------------------------------------------------------------------- Positions

FIRST, LAST = 64, 690  # of positions.svg: where an axis begins and ends


def query(y: float, position: str, farthest: str, distance: str) -> list[str]:
    """A query over the last position of the axis at y, and how far it has to look: an arrow that ends like `farthest`."""
    return [
        f'<circle cx="{LAST}" cy="{y - 66}" r="6" class="query"/>',
        text(LAST + 12, y - 82, f"query, at position {position}", "", "end"),
        arrow(f"M{LAST - 12} {y - 66}{farthest}"),
        arrow(f"M{LAST} {y - 56}V{y - 29}"),
        text((FIRST + LAST) / 2, y - 73, distance, "small", "middle"),
    ]


def fot_positions(y: float) -> list[str]:
    """A memory layer's keys, on an axis at y: the whole of memory at position 0, the local context from there on."""
    pieces = [path(f"M{FIRST - 24} {y}H{LAST + 24}"), *query(y, "n", f"H{FIRST + 17}", "never more than n away")]
    slots = {"0": FIRST, "1": FIRST + 44, "2": FIRST + 88, "3": FIRST + 132, "n − 1": LAST - 44, "n": LAST}
    for label, x in slots.items():
        pieces += [box(x - 11, y - 25, 22, 22, "local"), text(x, y + 18, label, "small", "middle")]
    pieces += [box(FIRST - 11, y - 51 - 14 * i, 22, 11, "memory") for i in range(5)]
    return [
        *pieces,
        text(FIRST, y - 113, "⋮", "", "middle"),
        text(FIRST + 24, y - 114, "memory: the keys of all tokens before,"),
        text(FIRST + 24, y - 97, "not rotated, so all of them at position 0"),
        text((FIRST + LAST) / 2 + 44, y - 9, "local context: positions 0, 1, 2, … n", "", "middle"),
        arrow(f"M{LAST - 9} {y - 60}L{LAST - 36} {y - 29}"),
        box(FIRST - 11, y + 28, LAST - FIRST + 22, 6, "seen"),
        text(FIRST - 11, y + 52, "Seen in training: all of them. n stays below the window, whatever memory holds."),
    ]


def plain_positions(y: float, far: int = 200_000, trained: int = 2_048) -> list[str]:
    """The same for a plain LLaMA, to scale."""
    wide, seen = LAST - FIRST, (LAST - FIRST) * trained / far
    pieces = [
        path(f"M{FIRST - 24} {y}H{LAST + 24}"),
        *query(y, f"{far:,}", f"H{FIRST}V{y - 29}", f"up to {far:,} away"),
    ]
    for i in range(5):
        x = FIRST + wide * i / 4
        pieces += [path(f"M{x:g} {y}v5"), text(x, y + 20, f"{far * i // 4:,}", "small", "middle")]
    return [
        *pieces,
        box(FIRST, y - 25, wide, 22, "local"),
        text(FIRST + wide / 2, y - 9, f"keys: positions 0, 1, 2, … {far:,}", "", "middle"),
        box(FIRST, y + 28, seen, 6, "seen"),
        box(FIRST + seen, y + 28, wide - seen, 6, "blank"),
        text(
            FIRST - 11,
            y + 52,
            f"Seen in training: positions 0 to {trained - 1:,} (drawn to scale). The rest, dashed, never.",
        ),
    ]


def positions() -> str:
    pieces = [
        text(20, 30, "Focused Transformer, in a memory layer", "head"),
        *fot_positions(176),
        path(f"M20 250H{WIDTH - 20}", "grid"),
        text(20, 280, "A plain LLaMA, reading 200,000 tokens", "head"),
        *plain_positions(386),
    ]
    about = (
        "In a memory layer of the Focused Transformer all keys in memory stand at position 0, the start of the local context,"
        " whose own keys stand at positions 0 to n; the query stands at n. These positions were all seen in training. In a"
        " plain LLaMA positions grow with the text, to 200,000, of which training has seen the first 2,048."
    )
    return page(456, "Where the keys of memory and of the local context stand", about, pieces)


if __name__ == "__main__":
    for draw in (windows, cross_batch, positions):
        (Path(__file__).parent / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")
