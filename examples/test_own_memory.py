"""What examples/own_memory.py promises, checked: python -m pytest examples/test_own_memory.py

Truth is each rule in a few plain lines, for one head of one row, over the keys of all tokens that came and were not forgotten.
"""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import generate
from cli.loading import TINY, load, own_memory
from cli.texts import hide_key
from examples import chat, look_at_memory
from examples import own_memory as program
from examples.own_memory import Every, LargestNorm, Newest, Sample, Sinks, Unlike
from experiments import passkey, perplexity
from fast import MEM_DTYPES, FastConfig, FastLlama
from longllama import attend
from training.data import BOOK as HELD

ROOT = Path(__file__).resolve().parents[1]
RULES = (Newest, Sinks, Every, Sample, LargestNorm, Unlike)
B, G, D = 3, 2, 12  # heads of 12 numbers are stored as 16
PADDING = torch.tensor([0, 9, 50])  # tokens at the start of each row; the last one's are more than come first
PIECES = (40, 1, 40, 7, 40, 40)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are too small here to be shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(rule):
    """The rule, for few tokens."""
    return type(f"Small{rule.__name__}", (rule,), {"N": 30, "STEP": 3})


def kept_by(rule, tokens: list[int], k: torch.Tensor) -> list[int]:
    """Which of the tokens, none of them padding, to keep; k (tokens of all the text, D)."""
    if rule is Newest:
        return tokens[-30:]
    if rule is Sinks:
        return tokens if len(tokens) <= 30 else tokens[:4] + tokens[-26:]
    if rule is Every:
        return [i for i in tokens if i % 3 == 0]
    if rule is LargestNorm:
        return sorted(sorted(tokens, key=lambda i: -k[i].square().sum().sqrt().item())[:30])
    if rule is Unlike:
        mean = k[tokens].mean(dim=0)
        cosine = {i: (k[i] @ mean / k[i].norm() / mean.norm()).item() for i in tokens}
        return sorted(sorted(tokens, key=cosine.get)[:30])
    drawn = {i: (torch.tensor(float(i), dtype=torch.float64) * 78.233).sin().item() * 43758.5453 % 1 for i in tokens}
    return sorted(sorted(tokens, key=lambda i: -drawn[i])[:30])


def config(mem_dtype: str = "float32", **changes) -> FastConfig:
    sizes = {"num_attention_heads": 2 * G, "num_key_value_heads": G, "hidden_size": 2 * G * D, "num_hidden_layers": 4}
    sizes |= {"vocab_size": 61, "intermediate_size": 64, "mem_layers": (1, 2)}
    return FastConfig(**sizes, max_position_embeddings=16, last_context_length=8, mem_dtype=mem_dtype, **changes)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("mem_dtype", MEM_DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_keeps_what_it_says(rule, mem_dtype, padded):
    torch.manual_seed(0)
    memory, S = small(rule)(config(mem_dtype)), sum(PIECES)
    k, v = torch.randn(2, B, G, S, D)
    k[..., :3] += 1  # their mean is not 0
    real = torch.arange(S) >= PADDING[:, None] if padded else None
    scale = 1
    if mem_dtype == "float8_e4m3fn":
        scale = k[:, :, : PIECES[0]].abs().amax(dim=(2, 3), keepdim=True).log2().ceil().exp2()
    stored = (k / scale).to(getattr(torch, mem_dtype)).float()  # what `choose` is shown
    expected = [[[] for _ in range(G)] for _ in range(B)]
    start = 0
    with torch.no_grad():
        for n in PIECES:
            memory.append(k[:, :, start : start + n], v[:, :, start : start + n])
            seen = None if real is None else real[:, None, : start + n, None]
            memory.forget(seen)
            which = torch.cat([which for _, _, which in memory.blocks], dim=2)[..., 0]
            for b in range(B):
                for g in range(G):
                    new = [i for i in range(start, start + n) if real is None or real[b, i]]
                    expected[b][g] = kept_by(rule, expected[b][g] + new, stored[b, g])
                    kept = [i for i in which[b, g].tolist() if real is None or real[b, i]]
                    assert kept == expected[b][g], (b, g, start)
                    if rule is not Every:  # padding only where there is nothing else
                        assert which.shape[2] == min(30, start + n)
            start += n
        q = torch.randn(B, 2 * G, 5, D)
        found = memory.attend(q, seen)
        for b in range(B):  # of what is left, keys and values stand beside each other
            at = which[b, ..., None].expand(-1, -1, D)
            part = (
                None
                if real is None
                else real[b, None, None, :, None].expand(1, G, -1, -1).take_along_dim(which[b, None, ..., None], 2)
            )
            right = attend(
                q[b, None], k[b, None].take_along_dim(at[None], 2), v[b, None].take_along_dim(at[None], 2), part
            )
            for ours, theirs in zip(found, right):
                tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}.get(mem_dtype, 0.5)
                torch.testing.assert_close(ours[b, None], theirs, rtol=0, atol=tolerance)
    assert memory.length == S and memory.nbytes < S * B * G * 16 * 2 * memory.dtype.itemsize


def test_sizes_are_those_of_their_names():
    for name, n in re.findall(r"^class (\w+?(\d+))\(", Path(program.__file__).read_text(), re.M):
        rule = own_memory(f"{program.__file__}:{name}")
        assert int(n) == rule.N
    assert {rule.N for rule in RULES if rule is not Every} == {2048}


def test_a_sample_is_of_all_the_text():
    memory = Sample(config())
    for _ in range(40):
        memory.append(*torch.zeros(2, 1, G, 500, D))
        memory.forget(None)
    token = memory.blocks[0][2][0, 0, :, 0]
    counts = torch.histc(token.float(), 10, 0, 20000)
    assert len(token) == 2048 and counts.min() > 150 and counts.max() < 260  # of 205 each
    gaps = token.diff()
    assert (gaps == 1).sum() > 100 and gaps.max() > 40  # not evenly spread: a lattice would have one or two gaps


@torch.no_grad()
@pytest.mark.parametrize("mem_dtype", MEM_DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_in_a_model_forks_and_a_row_beside_a_padded_one_are_as_alone(rule, mem_dtype):
    torch.manual_seed(1)
    model = FastLlama(config(mem_dtype)).eval()
    model.use_memory(small(rule))
    ids, pad = torch.randint(3, 61, (2, 90)), 6
    ids[1, :pad] = 0
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    _, cache = model(ids[:, :70], None, mask[:, :70])
    expected, _ = model(ids[:, 70:], cache.fork())
    logits, _ = model(ids[:, 70:], cache)
    assert torch.equal(logits, expected) and logits.isfinite().all()
    _, alone = model(ids[:1, :70])
    right, _ = model(ids[:1, 70:], alone)
    torch.testing.assert_close(logits[:1], right, rtol=0, atol=1e-4)
    whole = FastLlama(config(mem_dtype)).eval()
    whole.load_state_dict(model.state_dict())
    assert (whole(ids[:1, 70:], whole(ids[:1, :70])[1])[0] - right).abs().max() > 1e-3  # something was forgotten


# --------------------------------------------------------------------------------------------------------- Programs


@pytest.fixture
def run(monkeypatch, capsys):
    """run(program, *flags): the exit status of a program that reads `typed`, and what it wrote."""

    def run(program, *flags, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        status = 0
        try:
            program.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


FILE = ROOT / "examples" / "own_memory.py"
GREEDY = ("--max-new-tokens", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A pass key, 20 windows back."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(hide_key((TINY / "book.txt").read_text(encoding="utf-8")[:20000], at=3000), encoding="utf-8")
    return path


def test_generate_finds_what_was_kept_and_not_what_was_forgotten(book, run, tmp_path):
    flags = ("--prompt-file", book, *GREEDY, "--memory")
    for mem_dtype in MEM_DTYPES:
        status, out, err = run(generate, *flags, f"{FILE}:LargestNorm", "--mem-dtype", mem_dtype)
        assert (status, out.strip()) == (0, "71428"), err
    status, out, err = run(generate, *flags, f"{FILE}:Newest")
    assert status == 0 and "71428" not in out
    status, out, err = run(generate, *flags, f"{FILE}:Newest", "--save-memory", tmp_path / "saved")
    assert status == 2 and err.splitlines()[-1].endswith("only a memory that keeps all tokens is")
    assert "Newest is not saved" in err and not list(tmp_path.iterdir())


def test_chat_passkey_and_perplexity_take_it(book, run, tmp_path):
    question, read = "What is the pass key? The pass key is", tmp_path / "read"
    read.write_text(book.read_text(encoding="utf-8").removesuffix(question), encoding="utf-8")
    for rule, found in ("LargestNorm", True), ("Newest", False):
        memory = ("--memory", f"{FILE}:{rule}")
        status, out, err = run(chat, "--read", read, *GREEDY, *memory, typed=question)
        assert status == 0 and (out.strip() == "71428") == found, err
        status, out, err = run(passkey, "--lengths", "4k", "--trials", "2", "--filler", "text", "--seed", "1", *memory)
        assert status == 0 and ("100% (2)" in out) == found, err
    for name in HELD, *(f"{i:02}.txt" for i in range(15)):
        text = (TINY / "book.txt").read_text(encoding="utf-8")[: 12000 if name == HELD else 10]
        (tmp_path / name).write_text(text, encoding="utf-8")
    flags, values = ("--data", tmp_path, "--windows", "0", "8", "--stride", "1"), []
    for more in (), ("--memory", f"{FILE}:LargestNorm128"):
        status, out, err = run(perplexity, *flags, *more)
        assert status == 0, err
        values.append(out.splitlines()[2].split(" | ")[1:3])
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]


def test_look_at_memory_shows_the_places_of_what_was_kept(book, run, tmp_path):
    flags, shown = ("--prompt-file", book, *GREEDY, "--html", tmp_path / "look.html"), []
    passage = r'^"(\d)" .*\n +[\d.]+%  token ([\d,]+), window (\d+), ([\d,]+) tokens back\n +….*The pass key is'
    for more in (), ("--memory", f"{FILE}:LargestNorm"):
        status, out, err = run(look_at_memory, *flags, *more)
        assert status == 0, err
        assert re.findall(r'^"(\d)" ', out, re.M) == list("71428")
        shown.append(re.findall(passage, out, re.M))
    assert shown[0][:3] == shown[1][:3] and len(shown[1]) >= 3
    assert all(int(token.replace(",", "")) // 256 + 1 == int(window) for _, token, window, _ in shown[1])
    kept, total = kept_tokens(book, LargestNorm)
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "look.html").read_text(), re.S)[1])
    assert len(data["views"]) == 7 and data["prompt"] == total
    for passage in (passage for view in data["views"] for passage in view["layers"][0]["passages"]):
        shares = [share for _, share in passage["tokens"]]
        start = passage["heaviest"] - shares.index(max(shares))  # of what is shown
        assert {start + i for i, share in enumerate(shares) if share} <= kept
        assert {passage["start"], passage["heaviest"], passage["stop"] - 1} <= kept
    assert len(kept) < total


@torch.no_grad()
def kept_tokens(text: Path, rule) -> tuple[set[int], int]:
    """Which tokens of a text the rule keeps in any head of the tiny model's memory layer; and how many there are."""
    model, tokenizer = load(TINY, torch.device("cpu"))
    model.use_memory(rule)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    _, cache = model(torch.tensor([ids]), logits_to_keep=1)
    [memory] = [layer.memory for layer in cache.layers if layer.memory is not None]
    return set(memory.blocks[0][2].flatten().tolist()), len(ids)


def test_the_program_prints_a_row_for_each_rule(run):
    status, out, err = run(program, "--length", "4k", "--trials", "1")
    assert status == 0, err
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert rows[0] == ["rule", "tokens kept", "pass keys in 4k"]
    kept = {rule: int(kept.replace(",", "")) for rule, kept, _ in rows[2:]}
    assert kept["all"] == 4096 - 128 and kept["Every"] == kept["all"] // 8 and kept["LargestNorm128"] == 128
    found = {rule: share for rule, _, share in rows[2:]}
    assert found["all"] == found["LargestNorm"] == "100%" and found["Every"] == "0%"


@pytest.mark.parametrize(
    "flags, named",
    [(["--trials", "0"], "--trials"), (["--length", "10"], "at least"), (["--model", "nowhere"], "nowhere")],
)
def test_mistakes_in_flags_are_one_line_and_exit_status_2(flags, named, run):
    status, out, err = run(program, *flags)
    assert status == 2 and out == "" and err.count("\n") == 1 and named in err
