"""What a model looked back at: the remembered passages that took most attention, for each generated token and memory layer.

    python examples/look_at_memory.py                                                                # a pass key in a book
    python examples/look_at_memory.py --prompt-file tiny/book.txt --html look.html                   # a page to explore

A token is chosen by the query of the last position before it. In a memory layer that query attends with one softmax to memory
and to the local context, so the two shares sum to 1, and the share of memory is what FoT trains. `RecordingContext` keeps the
query; `recall` computes its weights over every token, a block of memory at a time, from the keys as they are stored.

Shares are averaged over heads. A passage's share is the sum of the weights from its first heavy token to its last; the text
on either side is context. Where no passage stands out, `spread` says over how many tokens memory's share is spread. Positions
count tokens from the start of the text (0 is <s>), generated ones included.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, printable, tell, warn

import torch
import torch.nn.functional as F
from torch import Tensor

from cli.flags import (
    MEMORY_FLAGS,
    add_memory_flags,
    add_model_flags,
    add_prompt_flags,
    check_new_file,
    demonstration,
    given,
    new_path,
    number,
    parse_temperature,
    parser_for,
)
from cli.loading import encode_prompt, load, pick_device, warnings
from cli.progress import Progress
from cli.texts import read_prompt
from fast import FastConfig, FastContext, FastLlama, FastMemory
from fast.attention import fold, score
from fast.files import replacing
from longllama import Cache, Memory, require
from tokenizer import StreamDecoder, Tokenizer

HEAVY = 64  # this many of the heaviest tokens are grouped into passages
GAP = 16  # heavy tokens at most so far apart are one passage ...
LONGEST = 64  # ... unless it gets longer than this many tokens
SHOWN = 0.0005  # a passage stands out with at least this share of all attention, less would show as 0.0%, ...
STANDS_OUT = 0.01  # ... and at least this share of the attention to memory
CONTEXT = 12  # tokens of text shown on either side of a passage
WORD = 8  # tokens that a word is taken to have at most
TAIL = 24  # last tokens of the prompt, shown before the generated ones
BINS = 320  # of the strip: about three pixels each on a screen, one on a phone

# --------------------------------------------------------------------------------------------------------- Weights


class RecordingContext(FastContext):
    """A local context that keeps the last query of the last tokens that joined it."""

    query: Tensor | None = None  # (1, H, 1, D)

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, real: Tensor | None) -> Tensor:
        self.query = q[:, :, -1:].clone()  # a clone, so that the other queries are freed
        return super().append_and_attend(q, k, v, unrotated, real)


def recording(kind: type[Memory]) -> type[Memory]:
    """A memory that keeps the log-sum-exp that attention computed for its last query."""

    class RecordingMemory(kind):
        lse: Tensor | None = None  # (1, H, 1)

        def attend(self, q: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
            out, lse = super().attend(q, real)
            self.lse = lse[:, :, -1:].clone()
            return out, lse

    return RecordingMemory


@dataclass(frozen=True)
class Recall:
    """What the last query of one memory layer attended to, of a text whose first M tokens are remembered and next L local."""

    weights: Tensor  # (2, M + L), averaged over heads: of memory, 0 behind it; of the local context, 0 before it
    heads: Tensor  # (H,): each head's share of memory
    difference: float  # from the log-sum-exp over memory that the model itself computed, at the most


@torch.no_grad()
def recall(context: RecordingContext) -> Recall:
    """The weights of the query that ended the last step, over memory's keys and the local keys, as stored; in float32."""
    q, memory, M = context.query.float(), context.memory, context.memory.length
    scores, difference = [key_scores(q, context.filled()[0])], 0.0
    if M:
        scores.insert(0, memory_scores(q, memory))
        difference = (scores[0].logsumexp(dim=-1) - memory.lse.float().flatten()).abs().max().item()
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).cpu()  # (H, M + L)
    mean = torch.zeros(2, weights.shape[1])
    mean[0, :M], mean[1, M:] = weights[:, :M].mean(dim=0), weights[:, M:].mean(dim=0)
    return Recall(mean, weights[:, :M].sum(dim=-1), difference)


def memory_scores(q: Tensor, memory: Memory) -> Tensor:
    """The scores (H, M) of q (1, H, 1, D) over all tokens, of which M were appended; -inf where a head does not attend."""
    H, scales, topk = q.shape[1], getattr(memory, "scales", ()), getattr(memory, "topk", None)
    if scales:  # float8: as in FastMemory.attend, the query carries what the keys were divided by
        q = q * scales[0].repeat_interleave(H // scales[0].shape[1], dim=1).float()
    scores = torch.cat([key_scores(q, block[0].to(q.device)) for block in memory.blocks], dim=-1)
    if topk is not None and topk < scores.shape[1]:
        best, at = scores.topk(topk)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, at, best)
    if len(memory.blocks[0]) == 3:  # it may have forgotten some tokens
        which = torch.cat([which[0, :, :, 0] for _, _, which in memory.blocks], dim=-1).to(q.device)  # (G, S)
        nothing = scores.new_full((H, memory.length), -torch.inf)
        scores = nothing.scatter(-1, which.repeat_interleave(H // len(which), dim=0), scores)
    return scores


def key_scores(q: Tensor, k: Tensor) -> Tensor:
    """q (1, H, 1, D), k (1, G, S, D or padded by zeros) -> (H, S)."""
    return score(fold(q, k), k, None, q.shape[3] ** -0.5).flatten(0, 2)


def watched_cache(model: FastLlama) -> Cache:
    """A cache for `watch`, which can read a text first, and be forked."""
    kind = model.new_memory or FastMemory
    require(issubclass(kind, Memory), f"{kind.__name__} shows no keys: make it a subclass of fast.FastMemory")
    return model.new_cache(recording(kind), RecordingContext)


def watch(
    model: FastLlama, ids: list[int], max_new_tokens: int, cache: Cache | None = None, **sampling
) -> Iterator[tuple[int, dict[int, Recall]]]:
    """Generates, and yields each token with what the memory layers attended to when it was chosen: layer -> Recall. The ids are
    read after what the cache, a `watched_cache`, holds."""
    cache = watched_cache(model) if cache is None else cache
    prompt = torch.tensor([ids], device=model.norm.weight.device)
    for new in model.generate(prompt, max_new_tokens, cache=cache, **sampling):
        yield new.item(), {i: recall(cache.layers[i]) for i in model.config.mem_layers}


# -------------------------------------------------------------------------------------------------------- Passages


@dataclass(frozen=True)
class Passage:
    start: int  # the first heavy token
    stop: int  # just behind the last one
    share: float  # of attention, all tokens from start to stop together


def find_passages(weights: Tensor, top: int) -> list[Passage]:
    """The passages that stand out of weights (M,), at most `top`, the largest share first. Heavy neighbours are one passage."""
    heavy = weights.topk(min(HEAVY, len(weights)))
    groups: list[list[int]] = []
    for at in sorted(i for i, w in zip(heavy.indices.tolist(), heavy.values.tolist()) if w > 0):
        if groups and at - groups[-1][-1] <= GAP and at - groups[-1][0] < LONGEST:
            groups[-1].append(at)
        else:
            groups.append([at])
    spans = [(group[0], group[-1] + 1) for group in groups]
    passages = [Passage(start, stop, weights[start:stop].sum().item()) for start, stop in spans]
    passages.sort(key=lambda p: -p.share)
    least = max(SHOWN, STANDS_OUT * weights.sum().item())
    return [p for p in passages[:top] if p.share >= least]


def spread(weights: Tensor) -> float:
    """Over how many tokens weights (M,) are spread: exp of their entropy, the field's perplexity: N where N tokens share evenly.
    1 / sum of squares is that too, but of uneven weights it counts hardly more than the heavy ones. 0 where all are 0."""
    weights = weights.double()
    return torch.special.entr(weights / weights.sum()).sum().exp().item() if weights.any() else 0.0


class Text:
    """The prompt and what was generated after it: the text and the place of any token."""

    def __init__(self, ids: list[int], tokenizer: Tokenizer, config: FastConfig):
        self.ids, self.tokenizer, self.T, self.window = list(ids), tokenizer, len(ids), config.max_position_embeddings
        self.prefix = max(self.T - config.last_context_length, 0)  # was read in windows; the others were local first

    def pieces(self, start: int, stop: int) -> list[str]:
        """Each token's part of the text, spaces included. A character of several tokens stands at its last one."""
        decoder = StreamDecoder(self.tokenizer, continues=True)
        pieces = [decoder.feed(i) if self.tokenizer.is_text(i) else self.name(i) for i in self.ids[start:stop]]
        if pieces:
            pieces[-1] += decoder.flush()
        return [printable(piece.replace("\n", "⏎")) for piece in pieces]

    def name(self, i: int) -> str:
        return self.tokenizer.piece(i) if 0 <= i < self.tokenizer.vocab_size else f"<{i}>"

    def word(self, position: int) -> int:
        """Where the word of the token at `position` starts, at most a few tokens before it."""
        places = range(position, max(position - WORD, 0), -1)
        starts = (i for i in places if self.tokenizer.begins_word(self.ids[i]))
        return next(starts, position)

    def place(self, position: int) -> str:
        if position < self.prefix:
            return f"window {position // self.window + 1:,}"
        return "end of the prompt" if position < self.T else "generated"


# ------------------------------------------------------------------------------------------------------------ Views
#
# A view is what there is to show of a generated token, or of all of them together, in JSON's types.


def view_passage(passage: Passage, weights: Tensor, text: Text) -> dict:
    """weights (M,)."""
    start = text.word(max(passage.start - CONTEXT, 0))
    stop = max(text.word(min(passage.stop + CONTEXT, len(text.ids) - 1)), passage.stop)
    heaviest = passage.start + weights[passage.start : passage.stop].argmax().item()
    shown = [weights[i].item() if passage.start <= i < passage.stop else 0.0 for i in range(start, stop)]
    return {
        "start": passage.start,
        "stop": passage.stop,
        "share": passage.share,
        "heaviest": heaviest,
        "place": text.place(heaviest),
        "tokens": [[piece, round(w, 5)] for piece, w in zip(text.pieces(start, stop), shown)],
    }


class Views:
    """Looks at what was recalled, token by token, and at all tokens together."""

    def __init__(self, text: Text, room: int, top: int):
        """room: the most tokens that the text will have."""
        self.text, self.room, self.top = text, room, top
        self.bin = -(-room // BINS)  # tokens in one
        self.views: list[dict] = []
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> weights (2, room), heads (H,), of all tokens so far

    def add(self, token: int, recalls: dict[int, Recall]) -> dict:
        """The view of one more generated token, which joins the text."""
        self.text.ids.append(token)
        position = len(self.text.ids) - 1
        for i, found in recalls.items():
            weights, heads = self.sums.get(i, (0, 0))
            padded = F.pad(found.weights, (0, self.room - found.weights.shape[1]))
            self.sums[i] = weights + padded, heads + found.heads
        layers = [self.layer(i, found.weights, found.heads) for i, found in recalls.items()]
        self.views.append({"text": self.text.pieces(position, position + 1)[0], "position": position, "layers": layers})
        return self.views[-1]

    def overall(self) -> dict:
        n = len(self.views)
        return {"layers": [self.layer(i, weights / n, heads / n) for i, (weights, heads) in self.sums.items()]}

    def layer(self, layer: int, weights: Tensor, heads: Tensor) -> dict:
        """weights (2, up to room), see Recall; heads (H,)."""
        memory, local = weights.double().sum(dim=-1).tolist()
        passages = [view_passage(passage, weights[0], self.text) for passage in find_passages(weights[0], self.top)]
        return {
            "layer": layer,
            "memory": memory,
            "local": local,
            "heads": [round(share, 4) for share in heads.tolist()],
            "passages": passages,
            "spread": round(float(f"{spread(weights[0]):.2g}")),
            "bins": [self.bins(part) for part in weights],
        }

    def bins(self, weights: Tensor) -> list[float]:
        """weights (up to room,) -> [bin, share, bin, share, ...]: those that round to more than 0.00%."""
        padded = F.pad(weights, (0, self.bin * BINS - len(weights)))
        shares = [round(share, 4) for share in padded.view(BINS, self.bin).sum(dim=-1).tolist()]
        return [x for i, share in enumerate(shares) if share for x in (i, share)]


# --------------------------------------------------------------------------------------------------------- Showing


def lines(view: dict, colour: bool) -> Iterator[str]:
    """A token's view for the terminal. Of the heads, the one that memory has the largest share of is named."""
    for i, layer in enumerate(view["layers"]):
        name, memory, local = f'"{view["text"]}"' if i == 0 else "", layer["memory"], layer["local"]
        line = f"{name:<12} layer {layer['layer']:<2} memory {memory:.1%} + local {local:.1%} = {memory + local:.1%}"
        if not layer["spread"]:
            yield f"{line}   nothing is remembered yet"
            continue
        head, share = max(enumerate(layer["heads"]), key=lambda x: x[1])
        yield f"{line}   (memory in head {head}: {share:.1%})"
        if not layer["passages"]:
            yield f"            spread over about {layer['spread']:,} token{'s' * (layer['spread'] > 1)}"
        for passage in layer["passages"]:
            back = f"{view['position'] - passage['heaviest']:,} tokens back"
            where = f"token {passage['heaviest']:,}, {passage['place']}, {back}"
            yield f"    {passage['share']:6.1%}  {where}\n            …{marked(passage['tokens'], colour).strip()}…"


def marked(tokens: list[list], colour: bool) -> str:
    """A passage with its heavy tokens [in brackets], or on a terminal highlighted."""
    least = max(max(w for _, w in tokens) / 10, 1e-9)  # weights come rounded, and none that is 0 is heavy
    start, stop = ("\033[7m", "\033[0m") if colour else ("[", "]")
    line, inside = "", False
    for piece, w in tokens:
        if (w >= least) != inside:
            space = piece[: len(piece) - len(piece.lstrip(" "))] if not inside else ""
            line += space + start if not inside else stop
            piece, inside = piece[len(space) :], not inside
        line += piece
    return line + stop * inside


def page(views: Views, model: str, mem_layers: tuple[int, ...]) -> str:
    """One HTML page that needs nothing else. All text goes in as JSON, without any "<", and is shown as text only."""
    text = views.text
    data = {
        "model": model,
        "prompt": text.T,
        "total": len(text.ids),
        "windows": -(-text.prefix // text.window),
        "window": text.window,
        "layers": list(mem_layers),
        "bin": views.bin,
        "tail": "".join(text.pieces(max(text.T - TAIL, 0), text.T)),
        "views": [views.overall(), *views.views],
    }
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.replace("DATA", encoded, 1)


def write_page(path: Path, content: str):
    with replacing(path) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>What the model looked back at</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1a1d24; --soft: #5c6370; --line: #e3e6eb; --track: #eceef2;
  --memory: 79 70 229; --local: 13 148 136; --strong: .5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1115; --card: #181b21; --ink: #e8eaee; --soft: #9aa2b1; --line: #2a2f38; --track: #22262e;
    --memory: 139 146 255; --local: 45 212 191; --strong: .55;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 24px 40px; }
h1 { font-size: 24px; line-height: 1.25; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 13px; font-weight: 600; margin: 0; }
p { margin: 0; }
.soft, .facts, footer { color: var(--soft); }
.facts { margin: 4px 0 18px; }
section, .layer { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
section { margin-bottom: 14px; }
.head { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; justify-content: space-between;
  font-size: 13px; margin-bottom: 10px; }
button { font: inherit; color: inherit; }

.text { max-height: 32vh; overflow-y: auto; padding: 2px; font-size: 16px; line-height: 1.7; overflow-wrap: anywhere; }
.text .tail { color: var(--soft); white-space: pre-wrap; }
.token { display: inline-block; line-height: 1.5; border: 0; border-radius: 5px; margin: 2px 1px; padding: 2px 3px;
  cursor: pointer; white-space: pre-wrap; -webkit-tap-highlight-color: transparent;
  background: rgb(var(--memory) / calc(.06 + .3 * var(--share))); box-shadow: inset 0 -2px rgb(var(--memory) / var(--share)); }
.token.blank { padding-inline: 7px; }
.token:hover, .token.shown { box-shadow: 0 0 0 2px rgb(var(--memory)); }
.token[aria-pressed=true] { background: rgb(var(--memory)); color: var(--card); }
.all { border: 1px solid var(--line); background: none; border-radius: 99px; padding: 2px 12px; cursor: pointer; }
.all:hover, .all.shown { border-color: rgb(var(--memory)); }
.all[aria-pressed=true] { background: rgb(var(--memory)); border-color: transparent; color: var(--card); }
:focus-visible { outline: 2px solid rgb(var(--memory)); outline-offset: 2px; }

.strip { display: grid; }
.many .strip { grid-template-columns: 58px 1fr; align-items: end; }
.many .axis { margin-left: 58px; }
.strip .name { font-size: 12px; line-height: 28px; color: var(--soft); }
.pins { position: relative; height: 22px; }
.pin { position: absolute; bottom: 3px; transform: translateX(-50%); }
.badge { display: inline-block; min-width: 18px; height: 18px; border-radius: 9px; background: rgb(var(--memory));
  color: var(--card); font-size: 11px; font-weight: 700; line-height: 18px; text-align: center; }
.strip svg { display: block; width: 100%; height: 48px; border-radius: 4px; background: var(--track); }
.many .strip svg { height: 28px; }
.axis { position: relative; height: 22px; margin-top: 2px; font-size: 11px; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.axis span { position: absolute; top: 4px; transform: translateX(-50%); white-space: nowrap; }
.axis span::before { content: ""; position: absolute; left: 50%; top: -6px; height: 6px; border-left: 1px solid var(--soft); }
.axis span.first { transform: none; } .axis span.first::before { left: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; color: var(--soft); margin-top: 6px; }
.ramp, .dot { display: inline-block; vertical-align: -1px; margin: 0 5px 0 0; height: 10px; border-radius: 2px; }
.ramp { width: 72px; margin: 0 5px; background: linear-gradient(90deg, var(--track), rgb(var(--memory))); }
.dot { width: 10px; }
.memory { background: rgb(var(--memory)); } .local { background: rgb(var(--local)); }
.fill-memory { fill: rgb(var(--memory)); } .fill-local { fill: rgb(var(--local)); }

#layers { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.shares { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; font-variant-numeric: tabular-nums; }
.shares b { font-size: 20px; letter-spacing: -.01em; }
.shares .heads { margin-left: auto; }
.bar { display: flex; height: 8px; border-radius: 4px; overflow: hidden; margin: 6px 0 12px; background: var(--track); }
.heads { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 3px; font-size: 12px; color: var(--soft); }
.heads i { display: block; width: 8px; height: 18px; background: var(--track); border-radius: 2px; position: relative;
  overflow: hidden; }
.heads i::after { content: ""; position: absolute; inset: auto 0 0;
  height: calc(100% * var(--share)); background: rgb(var(--memory)); }
.heads span { margin-left: 5px; }
ol { list-style: none; margin: 0; padding: 0; }
li { padding: 10px 0; border-top: 1px solid var(--line); }
li .where { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; font-size: 13px; color: var(--soft);
  font-variant-numeric: tabular-nums; }
li .where b { font-size: 16px; color: var(--ink); }
li .badge { align-self: center; }
.passage { margin-top: 2px; overflow-wrap: anywhere; color: var(--soft); }
.passage span { white-space: pre-wrap; }
.passage .heavy { color: var(--ink); background: rgb(var(--memory) / calc(var(--strong) * var(--share)));
  border-radius: 3px; padding: 2px 0; }
.rest { padding: 10px 0 0; border-top: 1px solid var(--line); font-size: 13px; color: var(--soft); }
#layers .head { margin-bottom: 4px; }
footer { font-size: 13px; margin-top: 18px; max-width: 80ch; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 600px) {
  main { padding: 18px 12px 28px; }
  section, .layer { padding: 13px 13px; border-radius: 10px; }
  h1 { font-size: 20px; }
  .shares { gap: 4px 6px; font-size: 13px; }
  .shares b { font-size: 16px; }
  .shares .heads { margin: 2px 0 0; }
}
</style>
</head>
<body>
<main>
<header>
  <h1>What the model looked back at</h1>
  <p class="facts" id="facts"></p>
</header>
<noscript>This page needs JavaScript to show its data.</noscript>
<section aria-labelledby="generated">
  <div class="head">
    <h2 id="generated">Generated text</h2>
    <span class="soft">Hover, tap or focus a token. The stronger its colour, the more attention went to memory.</span>
    <button class="all" type="button" data-view="0">All tokens</button>
  </div>
  <div class="text" id="text"></div>
</section>
<section aria-labelledby="where" id="places">
  <div class="head"><h2 id="where">Where attention went</h2><span class="soft" id="who"></span></div>
  <div id="strips"></div>
  <div class="axis" id="axis" aria-hidden="true"></div>
  <div class="legend" id="legend"></div>
</section>
<p class="hidden" id="live" aria-live="polite"></p>
<div id="layers"></div>
<footer>Weights are those with which the query that chose a token attended, averaged over heads. One softmax goes over
  memory and local context, so both sum to 100%. A passage's share is that of all its tokens from the first heavy one to the
  last; the text around it is context. Positions count tokens from the start of the text, generated ones included.</footer>
</main>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const percent = x => (100 * x).toFixed(1) + "%";
const count = n => n.toLocaleString("en");
const plural = (n, word) => count(n) + " " + word + (n === 1 ? "" : "s");
const mean = xs => xs.reduce((a, b) => a + b, 0) / xs.length;

function element(tag, className, ...children) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  e.append(...children);
  return e;
}

function shaded(e, share) {
  e.style.setProperty("--share", share.toFixed(3));
  return e;
}

const name = view => view.text === undefined ? "All generated tokens" : "“" + (view.text.trim() || "␣") + "”";
const memoryShare = view => mean(view.layers.map(layer => layer.memory));

// ------------------------------------------------------------------ the strip

const span = data.bin * Math.ceil(data.total / data.bin);
const at = position => 100 * position / span;

const shares = pairs => pairs.filter((_, i) => i % 2);
const largestBin = view => Math.max(1e-4, ...view.layers.flatMap(layer => layer.bins.flatMap(shares)));

function drawStrip(layer, width, largest) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const bins = span / data.bin, least = bins * 2.5 / width;  // in bins: 2.5 pixels
  svg.setAttribute("viewBox", `0 0 ${bins} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Attention of layer ${layer.layer} by position in the text: memory ${percent(layer.memory)}`);
  const rects = layer.bins.flatMap((pairs, local) => {
    const found = [];
    for (let i = 0; i < pairs.length; i += 2) found.push({bin: pairs[i], share: pairs[i + 1], local});
    return found;
  }).sort((a, b) => a.share - b.share);  // the heaviest on top
  for (const {bin, share, local} of rects) {
    const rect = document.createElementNS(svg.namespaceURI, "rect"), w = share > largest / 10 ? Math.max(1, least) : 1;
    const values = {x: Math.min(bin + .5 - w / 2, bins - w), width: w, height: 1, opacity: Math.sqrt(share / largest).toFixed(3)};
    for (const key in values) rect.setAttribute(key, values[key]);
    rect.setAttribute("class", local ? "fill-local" : "fill-memory");
    svg.append(rect);
  }
  const strip = element("div", "strip");
  if (data.layers.length > 1) strip.append(element("div", "name", "layer " + layer.layer));
  strip.append(element("div", "", drawPins(layer, width), svg));
  return strip;
}

function drawPins(layer, width) {
  const pins = element("div", "pins"), apart = 2000 / width;
  let before = -Infinity;
  const places = layer.passages.map((p, i) => ({left: at(p.heaviest + .5), rank: i + 1})).sort((a, b) => a.left - b.left);
  places.forEach(({left, rank}) => {
    before = Math.max(left, before + apart, apart / 2);
    const pin = element("span", "pin badge", String(rank));
    pin.style.left = Math.min(before, 100 - apart / 2) + "%";
    pins.append(pin);
  });
  pins.setAttribute("aria-hidden", "true");
  return pins;
}

function drawAxis() {
  const most = byId("axis").clientWidth < 500 ? 4 : 9;
  const step = [1, 2, 5].flatMap((_, i, m) => [...Array(10).keys()].map(e => m[i] * 10 ** e)).sort((a, b) => a - b)
    .find(step => data.total / step <= most);
  const ticks = [];
  for (let t = 0; t < data.total && at(t) < 97; t += step) {
    const tick = element("span", t ? "" : "first", t ? count(t) : "token 0");
    tick.style.left = at(t) + "%";
    ticks.push(tick);
  }
  byId("axis").replaceChildren(...ticks);
}

function drawLegend(largest) {
  byId("legend").replaceChildren(
    element("span", "", "0%", element("span", "ramp"), percent(largest) + " of attention in " + plural(data.bin, "token") +
      " (square-root scale)"),
    element("span", "", element("span", "dot memory"), "memory"),
    element("span", "", element("span", "dot local"), "local context"),
    element("span", "", element("span", "badge", "n"), " passages below"));
}

// ------------------------------------------------------------------ the passages

function drawLayer(layer, view) {
  const card = element("div", "layer");
  card.append(
    element("div", "head", element("h2", "", "Memory layer " + layer.layer), element("span", "soft", name(view))),
    element("div", "shares",
      element("span", "", element("b", "", percent(layer.memory)), " memory"), element("span", "soft", "+"),
      element("span", "", element("b", "", percent(layer.local)), " local context"),
      element("span", "soft", "= " + percent(layer.memory + layer.local)), drawHeads(layer.heads)));
  const bar = element("div", "bar", element("div", "memory"), element("div", "local"));
  bar.firstChild.style.width = percent(layer.memory);
  bar.lastChild.style.width = percent(layer.local);
  card.append(bar);
  if (!layer.passages.length) {
    card.append(element("p", "rest", layer.spread
      ? "No passage stands out: spread over about " + plural(layer.spread, "token") + "."
      : "Nothing was remembered yet: the text so far fitted the local context."));
    return card;
  }
  card.append(element("ol", "", ...layer.passages.map((passage, i) => drawPassage(passage, i + 1, view))));
  const rest = layer.memory - layer.passages.reduce((sum, p) => sum + p.share, 0);
  card.append(element("p", "rest", percent(Math.max(rest, 0)) + " in all the rest of memory"));
  return card;
}

function drawHeads(heads) {
  const best = heads.indexOf(Math.max(...heads));
  return element("div", "heads", ...heads.map(share => shaded(element("i"), share)),
    element("span", "", `memory by head, most in head ${best}: ${percent(heads[best])}`));
}

function drawPassage(passage, rank, view) {
  const first = passage.start, last = passage.stop - 1, heaviest = Math.max(...passage.tokens.map(([, w]) => w), 1e-9);
  const where = [first === last ? "token " + count(last) : `tokens ${count(first)}–${count(last)}`, passage.place];
  if (view.position !== undefined) where.push(plural(view.position - passage.heaviest, "token") + " back");
  const text = element("div", "passage", "…", ...passage.tokens.flatMap(([piece, w], i) => {
    if (i === 0) piece = piece.trimStart();
    if (w <= heaviest / 100) return [element("span", "", piece)];
    const space = piece.length - piece.trimStart().length;  // before the word is not shaded
    const heavy = element("span", "heavy", piece.slice(space));
    return [element("span", "", piece.slice(0, space)), shaded(heavy, Math.sqrt(w / heaviest))];
  }), "…");
  return element("li", "",
    element("div", "where", element("span", "badge", String(rank)), element("b", "", percent(passage.share)),
      ...where.map(part => element("span", "", part))), text);
}

// ------------------------------------------------------------------ choosing a token

let chosen = 0, shown = -1;
const buttons = [document.querySelector(".all")];

function show(i) {
  if (shown === i) return;
  shown = i;
  const view = data.views[i];
  buttons.forEach((button, j) => {
    button.classList.toggle("shown", j === i);
    button.setAttribute("aria-pressed", String(j === chosen));
  });
  const largest = largestBin(view), width = byId("axis").clientWidth || 350;  // 0: not laid out yet
  byId("strips").replaceChildren(...view.layers.map(layer => drawStrip(layer, width, largest)));
  drawLegend(largest);
  byId("who").textContent = name(view) + ": " + percent(memoryShare(view)) + " memory";
  byId("layers").replaceChildren(...view.layers.map(layer => drawLayer(layer, view)));
  byId("live").textContent = name(view) + ". " + view.layers.map(summary).join(" ");
}

function summary(layer) {  // for those who hear the page
  const most = layer.passages.slice(0, 1).map(p =>
    ` Most, ${percent(p.share)}, at token ${count(p.heaviest)}: ${p.tokens.map(([piece]) => piece).join("")}`);
  return `Layer ${layer.layer}: ${percent(layer.memory)} memory, ${percent(layer.local)} local context.` + most;
}

function choose(i) {
  chosen = i;
  shown = -1;
  show(i);
}

function start() {
  const windows = plural(data.windows, "window") + " of " + count(data.window) + " read into memory";
  byId("facts").textContent = [data.model, plural(data.prompt, "prompt token"), ...(data.windows ? [windows] : []),
    plural(data.views.length - 1, "generated token")].join(" · ");
  byId("text").append(element("span", "tail", "…" + data.tail));
  data.views.slice(1).forEach((view, i) => {
    const blank = !view.text.trim(), button = element("button", "token" + (blank ? " blank" : ""), blank ? "␣" : view.text);
    button.type = "button";
    button.dataset.view = i + 1;
    button.setAttribute("aria-label", `${view.text.trim() || "space"}: ${percent(memoryShare(view))} memory`);
    buttons.push(shaded(button, memoryShare(view)));
    byId("text").append(button);
  });
  buttons.forEach((button, i) => {
    button.addEventListener("pointerenter", () => show(i));
    button.addEventListener("pointerleave", () => show(chosen));
    button.addEventListener("focus", () => show(i));
    button.addEventListener("blur", () => show(chosen));
    button.addEventListener("click", () => choose(i));
    button.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (step && buttons[i + step]) buttons[i + step].focus();
    });
  });
  byId("places").classList.toggle("many", data.layers.length > 1);
  drawAxis();
  show(0);
  addEventListener("resize", () => { drawAxis(); choose(chosen); });
}

start();
</script>
</body>
</html>
"""

# ---------------------------------------------------------------------------------------------------- Command line


def make_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add_prompt_flags(parser)
    add_model_flags(parser)
    add("--max-new-tokens", type=number(int, 1, 10**6), default=20, metavar="N", help="default 20")
    add("--temperature", type=parse_temperature, default=0, metavar="X", help="0: always the likeliest")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="draw the same tokens every time")
    add_memory_flags(parser)
    add("--top", type=number(int, 1), default=3, metavar="N", help="passages for each token and layer (default 3)")
    add("--html", type=new_path, metavar="FILE", help="write a page to explore, too")
    return parser


def check(args: argparse.Namespace, T: int, config: FastConfig):
    """Raises ValueError where nothing will be remembered, and so there is nothing to look at."""
    if not config.mem_layers:
        raise ValueError(f"{args.model} has no memory to look at: mem_layers in its config.json is empty")
    overflows = args.max_new_tokens > 1 and T + args.max_new_tokens - 1 > config.max_position_embeddings
    if config.last_context_length >= T and not overflows:
        raise ValueError(
            f"nothing to look at: {T} prompt tokens and {args.max_new_tokens} new ones fit the local context, and no memory is "
            "used; give a longer prompt, or a smaller --last-context-length"
        )


def run(args: argparse.Namespace):
    if args.html:
        check_new_file("--html", args.html)
    device, prompt = pick_device(args.device), read_prompt(args)
    model, tokenizer = load(args.model, device, args.dtype, args.memory, args.weights, **given(args, MEMORY_FLAGS))
    ids = encode_prompt(tokenizer, prompt)
    T = len(ids)
    check(args, T, model.config)
    for warning in warnings(prompt, ids, args.max_new_tokens, model, tokenizer, model.new_cache()):
        warn(warning)
    views = Views(Text(ids, tokenizer, model.config), T + args.max_new_tokens, args.top)
    progress, difference = Progress(model, T, shown=sys.stderr.isatty()), 0.0
    try:
        for token, recalls in watch(model, ids, args.max_new_tokens, temperature=args.temperature, seed=args.seed):
            progress.close()
            difference = max(difference, *(found.difference for found in recalls.values()))
            print(*lines(views.add(token, recalls), sys.stdout.isatty()), sep="\n", flush=True)
    finally:
        progress.close()
    tell(f"log-sum-exps over memory are within {difference:.0e} of those that the model computed")
    if args.html:
        write_page(args.html, page(views, args.model.resolve().name, model.config.mem_layers))
        tell(f"{args.html}: {args.html.stat().st_size / 1000:,.0f} kB")


def main():
    parser = make_parser()
    with ending_well(parser):
        run(parser.parse_args(sys.argv[1:] or demonstration()))


if __name__ == "__main__":
    main()
