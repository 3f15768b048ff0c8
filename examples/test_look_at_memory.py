"""look_at_memory.py: its weights against the plain formula in float64, its positions against planted text, its page.

python -m pytest examples
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.loading import TINY, load
from cli.texts import hide_key
from examples import look_at_memory as look
from examples.look_at_memory import Recall, RecordingContext, Text, Views, find_passages, recording, watch
from fast import FastConfig, FastLlama, FastMemory
from longllama import Cache, Memory

HOSTILE = '</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & "'
WINDOW, LAST = 16, 8
BOOK = (TINY / "book.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are too small here to be shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Watched(FastLlama):
    """The cache that it made last is `cache`."""

    cache: Cache | None = None

    def new_cache(self, *args, **settings) -> Cache:
        self.cache = super().new_cache(*args, **settings)
        return self.cache


class SmallBlocks(FastMemory):
    BLOCK = 24


def small_model(**overrides) -> FastLlama:
    """Random weights; heads of 12 numbers, which are stored as 16, and two query heads to a key head."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "last_context_length": LAST,
        "mem_layers": (1, 3),
        "mem_dtype": "float32",
    }
    return Watched(FastConfig(**settings | overrides)).eval()


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, torch.device("cpu"))


# ------------------------------------------------------------------------------------------ the formula, in float64


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x (heads, S, D): pairs (x[i], x[i + D/2]) as complex numbers, turned."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def stored(k: torch.Tensor, dtype: str) -> torch.Tensor:
    """k (G, S, D), as it comes back from memory. Float8 has four binary digits, wherever a power of two puts the point."""
    scale = 2.0 ** (k.abs().amax(dim=(1, 2), keepdim=True) / 32).log2().ceil() if "float8" in dtype else 1.0
    return (k / scale).float().to(getattr(torch, dtype)).double() * scale


def naive(model: FastLlama, layer: int, normed: torch.Tensor, M: int) -> torch.Tensor:
    """One softmax over all keys, of the last of `normed` (S, C), the layer's inputs; M of them are in memory: (H, S)."""
    config, S = model.config, len(normed)
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, _ = (normed.double() @ model.layers[layer].qkv_proj.weight.double().T).split((H * D, G * D, G * D), -1)
    q, k = (x.unflatten(-1, (-1, D)).transpose(0, 1) for x in (q, k))  # (H, S, D), (G, S, D)
    q = rotated(q[:, -1:], torch.tensor([S - M - 1]))
    k = torch.cat((stored(k[:, :M], config.mem_dtype), rotated(k[:, M:], torch.arange(S - M))), dim=1)
    scores = (q @ k.repeat_interleave(H // G, dim=0).mT).squeeze(1) / D**0.5
    if config.mem_topk:
        worst = scores[:, :M].argsort(descending=True)[:, config.mem_topk :]
        scores = scores.scatter(1, worst, -torch.inf)
    return scores.softmax(dim=-1)


def inputs(model: FastLlama) -> dict[int, list[torch.Tensor]]:
    """What each memory layer's attention will be given, (tokens, C) each time, in the order of the text."""
    normed = {i: [] for i in model.config.mem_layers}
    for i, seen in normed.items():
        hook = lambda module, args, out, seen=seen: seen.append(out.flatten(0, 1))  # noqa: E731
        model.layers[i].input_layernorm.register_forward_hook(hook)
    return normed


@pytest.mark.parametrize("mem_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("setting", [{}, {"keep_local": 5}, {"mem_topk": 7}], ids=["all", "keep_local", "topk"])
@torch.no_grad()
def test_weights_are_those_of_one_softmax_over_all_keys(mem_dtype, setting):
    """Over many blocks, before and after generated tokens went into memory, twice."""
    model, T, M, local = small_model(mem_dtype=mem_dtype, **setting), 61, 61 - LAST, LAST
    model.use_memory(SmallBlocks)
    normed, ids = inputs(model), torch.randint(3, 100, (T,)).tolist()
    for n, (_, recalls) in enumerate(watch(model, ids, 30, temperature=0, eos_token_id=None)):
        if n and local == WINDOW:  # the window was full: all but keep_local moved into memory
            M, local = M + WINDOW - model.config.keep_local, model.config.keep_local
        local += n > 0
        assert recalls.keys() == {1, 3}
        for i, found in recalls.items():
            weights = naive(model, i, torch.cat(normed[i]), M)
            assert weights.shape[1] == T + n
            # what is stored in fewer digits may be rounded to the neighbour of what float64 rounds to
            tolerance = 1e-6 if mem_dtype == "float32" else 2e-3
            mean = torch.stack((weights.mean(0), weights.mean(0)))
            mean[0, M:], mean[1, :M] = 0, 0
            torch.testing.assert_close(found.weights.double(), mean, atol=tolerance, rtol=0)
            torch.testing.assert_close(found.heads.double(), weights[:, :M].sum(1), atol=10 * tolerance, rtol=0)
            assert abs(found.weights.sum().item() - 1) < 1e-6
            assert found.difference < 1e-5
    assert M > T  # generated tokens were remembered
    assert len(model.cache.layers[3].memory.blocks) > 2


def test_a_memory_of_another_make_is_refused_by_name():
    model = small_model()
    model.use_memory(type("Other", (), {}))
    with pytest.raises(ValueError, match="Other shows no keys: make it a subclass of fast.FastMemory"):
        next(watch(model, [5] * 40, 1))


@torch.no_grad()
def test_the_difference_tells_when_keys_are_not_those_attended_to():
    model = small_model()
    cache = model.new_cache(recording(FastMemory), RecordingContext)
    model(torch.arange(3, 50)[None], cache)
    assert look.recall(cache.layers[1]).difference < 1e-5
    cache.layers[1].memory.blocks[0][0][:, :, 3] += 10
    assert look.recall(cache.layers[1]).difference > 0.01


@torch.no_grad()
def test_before_anything_is_remembered_all_attention_is_local():
    model = small_model()
    normed = inputs(model)
    for n, (_, recalls) in enumerate(watch(model, [1, 5, 6, 7, 8], 20, temperature=0, eos_token_id=None)):
        M = WINDOW if 5 + n > WINDOW else 0
        assert (recalls[1].weights[0].sum() > 0) == (M > 0), n
        weights = naive(model, 1, torch.cat(normed[1]), M).mean(dim=0)
        torch.testing.assert_close(recalls[1].weights.sum(dim=0).double(), weights, atol=1e-6, rtol=0)


class Thirds(FastMemory):
    """Keeps every third token, and in the second key head the one after it."""

    def choose(self, k, real):
        token = self.blocks[0][2][0, 0, :, 0]
        starts = (token % 3 == 0).nonzero().flatten()
        return torch.stack((starts, (starts + 1).clamp(max=len(token) - 1))).expand(len(k), -1, -1)


class CoreThirds(Memory):
    choose = Thirds.choose


@pytest.mark.parametrize("kind", [Thirds, CoreThirds])
@torch.no_grad()
def test_of_a_memory_that_forgets_the_tokens_that_it_kept_have_weight(kind):
    model, T = small_model(), 61
    model.use_memory(kind)
    for _, recalls in watch(model, torch.randint(3, 100, (T,)).tolist(), 30, temperature=0, eos_token_id=None):
        for i, found in recalls.items():
            memory = model.cache.layers[i].memory
            kept = torch.cat([which for _, _, which in memory.blocks], dim=2).unique()
            assert found.weights[0].nonzero().flatten().tolist() == kept.tolist()
            assert len(kept) < memory.length and abs(found.weights.sum().item() - 1) < 1e-6
            assert found.difference < 1e-5
    assert memory.length > T


# -------------------------------------------------------------------------------------------------------- passages


def test_heavy_neighbours_are_one_passage_and_the_largest_share_comes_first():
    weights = torch.zeros(1000)
    weights[100], weights[110] = 0.1, 0.15
    weights[105] = 0.01
    weights[500] = 0.2
    weights[900] = 0.05
    found = find_passages(weights, 2)
    assert [(p.start, p.stop) for p in found] == [(100, 111), (500, 501)]
    assert [p.share for p in found] == pytest.approx([0.26, 0.2])
    assert find_passages(torch.zeros(10), 3) == []


def test_a_passage_has_an_end_where_attention_is_even():
    weights = torch.zeros(400)
    weights[10:310:10] = 1 / 30
    found = find_passages(weights, 30)
    assert len(found) > 1 and all(p.stop - p.start <= look.LONGEST + look.GAP for p in found)
    assert sum(p.share for p in found) == pytest.approx(1)


def test_the_spread_of_weights_is_exp_of_their_entropy():
    weights = torch.rand(300).square() * 0.001
    weights[5] = 0
    shares = [w / sum(weights.tolist()) for w in weights.tolist()]
    assert look.spread(weights) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p)))
    assert look.spread(torch.full((7,), 0.02)) == pytest.approx(7) and look.spread(torch.zeros(7)) == 0


def test_where_no_passage_stands_out_it_is_told_over_how_many_tokens_memory_is_spread(tiny):
    views = Views(Text([5] * 40000, tiny[1], small_model().config), 40010, top=3)
    shown, heads = [], torch.tensor([0.8])
    for heavy in (0.0, 0.004, 0.3):  # of attention, in one token
        weights = torch.zeros(2, len(views.text.ids))
        weights[0, :31234], weights[0, 77] = (0.8 - heavy) / 31234, heavy
        weights[1, -1] = 0.2
        shown.append([*look.lines(views.add(5, {3: Recall(weights, heads, 0.0)}), colour=False)])
    assert [re.sub(r"\d.*", "N tokens", line[-1].strip()) for line in shown[:2]] == ["spread over about N tokens"] * 2
    assert shown[0][1].endswith(" about 31,000 tokens") and "memory 80.0%" in shown[0][0]
    assert "  30.0%  token 77, " in shown[2][1] and not any("spread" in line for line in shown[2])
    (line,) = look.lines(views.add(5, {3: Recall(torch.zeros(2, 9), heads, 0.0)}), colour=False)
    assert line.endswith("nothing is remembered yet")


def test_text_shows_word_spaces_line_ends_and_no_control_characters(tiny):
    _, tokenizer = tiny
    text = "The whale,\nand \x1b[31m the sea 鯨."
    ids = tokenizer.encode(text)
    pieces = Text(ids, tokenizer, small_model().config).pieces(0, len(ids))
    assert pieces[0] == "<s>"
    assert "".join(pieces[1:]).lstrip() == text.replace("\n", "⏎").replace("\x1b", "\ufffd")
    middle = "".join(Text(ids, tokenizer, small_model().config).pieces(3, len(ids)))
    assert text.replace("\n", "⏎").replace("\x1b", "\ufffd").endswith(middle)


def test_places_name_the_window_that_was_read(tiny):
    text = Text([1] * 100, tiny[1], small_model().config)
    assert [text.place(i) for i in (0, 15, 16, 91)] == ["window 1", "window 1", "window 2", "window 6"]
    assert [text.place(i) for i in (92, 99, 100)] == ["end of the prompt", "end of the prompt", "generated"]


@pytest.mark.parametrize("mem_dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_passage_that_the_first_digit_recalls_is_the_planted_key(mem_dtype):
    model, tokenizer = load(TINY, torch.device("cpu"), mem_dtype=mem_dtype)
    book = tokenizer.encode(BOOK)[:5000]
    needle = tokenizer.encode("The pass key is 71428. Remember it. 71428 is the pass key.", bos=False)
    question = tokenizer.encode("What is the pass key? The pass key is", bos=False)
    ids = book[:1500] + needle + book[1500:] + question
    views = Views(Text(ids, tokenizer, model.config), len(ids) + 7, top=3)
    shown = [views.add(*step) for step in watch(model, ids, 7, temperature=0)]
    assert "".join(view["text"] for view in shown).strip().startswith("71428")
    digit = next(view for view in shown if view["text"].strip())
    (layer,) = digit["layers"]
    passage = layer["passages"][0]
    assert 1500 <= passage["start"] <= passage["heaviest"] < passage["stop"] <= 1500 + len(needle)
    assert passage["place"] == "window 6"
    assert passage["share"] > 0.5 and passage["share"] <= layer["memory"]
    assert "71428" in "".join(piece for piece, _ in passage["tokens"])
    heaviest, _ = max(passage["tokens"], key=lambda token: token[1])
    assert heaviest == views.text.pieces(passage["heaviest"], passage["heaviest"] + 1)[0]


# ------------------------------------------------------------------------------------------------------------ page


def hostile_page(tokenizer) -> tuple[str, Views]:
    ids = tokenizer.encode("The whale. " * 20 + HOSTILE)
    config = small_model().config
    views = Views(Text(ids, tokenizer, config), len(ids) + 2, top=3)
    weights = torch.zeros(2, len(ids))
    weights[0, -20:-LAST], weights[1, -1] = 0.05, 0.4
    for token in ids[-12:-10]:
        views.add(token, {3: Recall(weights, torch.tensor([0.5, 0.7]), 0.0)})
    return look.page(views, HOSTILE, (3,)), views


def test_the_page_shows_text_as_text(tiny):
    page, views = hostile_page(tiny[1])
    assert page.lower().count("<script") == 2 == page.lower().count("</script")
    assert "<!--" not in page and "<img" not in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["model"] == HOSTILE and data["tail"].endswith('& "') and "<img" in data["tail"]
    assert data["views"][1:] == views.views
    assert data["total"] == data["prompt"] + 2 == len(views.text.ids)


def test_the_page_needs_no_network(tiny):
    page = look.page(hostile_page(tiny[1])[1], "tiny", (3,)).replace("http://www.w3.org/2000/svg", "")
    page = re.sub(r'(id="data">).*?(</script>)', r"\1\2", page, flags=re.S)
    assert not re.search(r"https?:|src=|url\(|@import|fetch\(|XMLHttp|WebSocket", page)
    assert "default-src 'none'" in page


def test_bins_hold_all_attention(tiny):
    views = Views(Text([1] * 5000, tiny[1], small_model().config), 5020, top=1)
    weights = torch.zeros(4900)
    weights[3000], weights[10], weights[4899] = 0.5, 0.3, 0.1
    found = views.bins(weights)
    assert views.bin == 16
    assert dict(zip(found[::2], found[1::2])) == pytest.approx({0: 0.3, 187: 0.5, 306: 0.1})


def test_all_tokens_together_are_their_mean(tiny):
    views = Views(Text([1] * 50, tiny[1], small_model().config), 60, top=3)
    for share in (0.2, 0.6):
        weights = torch.zeros(2, len(views.text.ids))
        weights[0, 7], weights[1, -1] = share, 1 - share
        views.add(5, {3: Recall(weights, torch.tensor([share]), 0.0)})
    (layer,) = views.overall()["layers"]
    assert (layer["memory"], layer["local"]) == pytest.approx((0.4, 0.6))
    assert [(p["start"], p["share"]) for p in layer["passages"]] == [(7, pytest.approx(0.4))]


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "look.html"
    look.write_page(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        look.write_page(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------- command line


def run_main(monkeypatch, *flags: str):
    monkeypatch.setattr(sys, "argv", ["look_at_memory.py", *flags])
    look.main()


LONG = "It was the whale that Ahab sought. " * 30


def test_the_command_prints_passages_and_writes_the_page(monkeypatch, capsys, tmp_path):
    path = tmp_path / "look.html"
    run_main(monkeypatch, "--prompt", LONG, "--max-new-tokens", "3", "--top", "2", "--html", str(path))
    out = capsys.readouterr().out
    shares = re.findall(r"layer 3\s+memory ([\d.]+)% \+ local ([\d.]+)% = 100\.0%", out)
    assert len(shares) == 3
    assert all(abs(float(memory) + float(local) - 100) < 0.11 for memory, local in shares)
    assert re.search(r"token \d+, window \d, \d+ tokens back\n +….*\[.+\]", out)
    assert list(tmp_path.iterdir()) == [path]
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])
    assert len(data["views"]) == 4 and data["model"] == "tiny"
    assert all(len(layer["passages"]) <= 2 for view in data["views"] for layer in view["layers"])


def test_without_flags_it_shows_the_pass_key_in_the_book(tiny, monkeypatch, capsys):
    run_main(monkeypatch)
    out, err = capsys.readouterr()
    assert re.findall(r'^"(\d)" ', out, re.M) == list("71428")
    text = hide_key(BOOK, at=9000)
    total, stated = (len(tiny[1].encode(part)) for part in (text, text[:9000]))
    found = re.findall(r"[\d.]+%  token ([\d,]+), window (\d+), ([\d,]+) tokens back\n +….*The pass key is", out)
    places = [[int(number.replace(",", "")) for number in place] for place in found]
    assert len(places) >= 3 and "Traceback" not in err
    for token, window, back in places:
        assert stated <= token < stated + 30 and window == token // 256 + 1 and abs(token + back - total) < 7


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top", "2"], "--prompt"),
        (["--prompt", "Call me Ishmael."], "nothing to look at"),
        (["--prompt", LONG, "--top", "0"], "--top"),
        (["--prompt", LONG, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", LONG, "--html", "/nowhere/look.html"], "--html /nowhere/look.html"),
        (["--prompt", LONG, "--html", "/"], "--html /"),
        (["--prompt", LONG, "--model", "/nowhere"], "/nowhere"),
        (["--prompt", LONG, "--mem-dtype", "int4"], "--mem-dtype"),
        (["--prompt", LONG, "--keep-local", "256"], "keep_local"),
        (["--prompt-file", "/nowhere"], "--prompt-file /nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.endswith("\n")


def test_a_model_without_memory_layers_is_refused(monkeypatch, capsys, tmp_path):
    for path in TINY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((TINY / "config.json").read_text()) | {"mem_layers": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--prompt", LONG, "--model", str(tmp_path))
    assert stopped.value.code == 2 and "mem_layers" in capsys.readouterr().err


@pytest.mark.parametrize("T, new, used", [(LAST, 9, False), (LAST, 10, True), (LAST + 1, 1, True)])
def test_a_text_that_never_reaches_memory_is_refused_beforehand(T, new, used):
    model = small_model()
    cache = model.new_cache(recording(FastMemory), RecordingContext)
    for _ in model.generate(torch.full((1, T), 5), new, temperature=0, eos_token_id=None, cache=cache):
        pass
    assert (cache.memory_length > 0) == used
    args = argparse.Namespace(max_new_tokens=new, model=TINY)
    if used:
        look.check(args, T, model.config)
    else:
        with pytest.raises(ValueError, match="nothing to look at"):
            look.check(args, T, model.config)


def test_brackets_stand_around_heavy_words_and_not_their_spaces():
    tokens = [["The", 0.0], [" pass", 0.5], [" key", 0.4], [" is", 0.01], [" 7", 0.2]]
    assert look.marked(tokens, colour=False) == "The [pass key] is [7]"
    assert look.marked([["The", 0.0], [" key", 0.0]], colour=False) == "The key"  # rounded to nothing
    assert look.marked(tokens, colour=True) == "The \033[7mpass key\033[0m is \033[7m7\033[0m"


def test_ctrl_c_ends_quietly(monkeypatch, capsys, tmp_path):
    file = tmp_path / "interrupted.py"
    file.write_text("from fast import FastMemory\n\nclass Interrupted(FastMemory):\n    def append(self, k, v):\n"
                    "        raise KeyboardInterrupt\n")  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--prompt", LONG, "--memory", f"{file}:Interrupted")
    assert stopped.value.code == 130 and "Traceback" not in capsys.readouterr().err
