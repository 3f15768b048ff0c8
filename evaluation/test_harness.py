"""evaluation/harness.py scores texts as lm_eval's own adapter for transformers does, and reads long ones through memory.

Nothing here needs a network: a connection that is tried is an error.
"""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import convert
from cli.loading import TINY, load
from cli.test_ending import ROOT, one_line, run_main
from cli.test_json_tokenizer import write_tokenizer
from cli.test_tokenizer import PATHS as TOKENIZERS
from cli.test_tokenizer import TEXTS, special_tokenizer, streamed
from evaluation import harness
from fast import FastConfig, FastLlama
from fast.test_model import Watching
from tokenizer import Tokenizer

TASKS = ROOT / "evaluation" / "tasks"
NAMES = ["sea_endings", "sea_keys", "sea_prose"]
CPU = torch.device("cpu")
BOOK = (TINY / "book.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory) -> Iterator[None]:
    """No connection; caches in a folder of this test's; commands run from the root, where the tasks' files are found from."""
    tried, threads = [], torch.get_num_threads()

    def refuse(*address, **_):
        tried.append(address)
        raise OSError("this test tried to reach the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.chdir(ROOT)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
    assert tried == []


def random_llama(folder: Path, tokenizer: Path = ROOT / "testdata" / "prose.model") -> Path:
    """A LLaMA of ours with grouped queries and a window of 128. It never writes single bytes: where they are no character,
    tokenizers decode them differently."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = FastConfig(vocab_size=2048, num_key_value_heads=2, max_position_embeddings=128, **settings)
    model = FastLlama(config)
    model.lm_head.weight.data[3:259] = 0  # of <0x00> to <0xFF>: other logits are larger
    convert.save_pretrained(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module", params=["random", "tiny"])
def both(request, tmp_path_factory) -> tuple:
    """Our adapter, and two of lm_eval's on the same weights in transformers: as it comes, and one that adds no `<s>` of its own,
    for texts as a whole, where it would stand twice."""
    from lm_eval.models.huggingface import HFLM

    from evaluation.adapter import LongLlamaLM

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "json":
        source = random_llama(folder / "ours", write_tokenizer(folder / "from", "bytes", bos_token="<|begin_of_text|>"))
    else:
        source = TINY if request.param == "tiny" else random_llama(folder / "ours")
    assert run_main(convert.main, "--input", source, "--output", folder / "hf", "--to-hf") == 0
    theirs = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    hf = [HFLM(theirs, tokenizer=tokenizer, batch_size=4, add_bos_token=bos) for bos in (None, False)]
    return LongLlamaLM(*load(source, CPU, mem_layers=[]), 3), *hf


@pytest.fixture(scope="module")
def tiny() -> tuple[FastLlama, Tokenizer]:
    return load(TINY, CPU)


@pytest.fixture
def adapter(tiny):
    """adapter(batch_size, last_context_length): of the tiny model, with its memory."""
    from evaluation.adapter import LongLlamaLM

    return lambda *settings: LongLlamaLM(*tiny, *settings)


def ask(lm, kind: str, *arguments: tuple) -> list:
    """What an adapter answers to requests of a kind."""
    from lm_eval.api.instance import Instance

    return getattr(lm, kind)([Instance(kind, {}, x, i) for i, x in enumerate(arguments)], disable_tqdm=True)


def unlike(ours: list, theirs: list) -> list:
    """Pairs of answers whose log-probabilities differ by more than 1e-4, or of which one alone is greedy."""
    return [(x, y) for x, y in zip(ours, theirs, strict=True) if abs(x[0] - y[0]) > 1e-4 or x[1] != y[1]]


# -------------------------------------------------------------------------------- Against lm_eval's own, without memory

CONTEXTS = [
    "", "The sea", "The whale is ", "naïve café — “quotes”…\n\nQ: 2 + 2?\nA:", BOOK[:3000], BOOK[3000:3900], BOOK[5000:5300],
    "Call me",
]  # fmt: skip


def test_log_probabilities_and_greedy_flags_are_those_of_lm_evals_own_adapter(both):
    ours, theirs, _ = both
    requests = [(context, end) for context in CONTEXTS for end in (" was", " the white whale.", "ab\nc")]
    for new in (1, 6):
        said = ask(theirs, "generate_until", *((x, {"until": [], "max_gen_toks": new}) for x in CONTEXTS[1:]))
        requests += [(context, f" {text}") for context, text in zip(CONTEXTS[1:], said) if text]
    right = ask(theirs, "loglikelihood", *requests)
    assert unlike(ask(ours, "loglikelihood", *requests), right) == []
    assert {flag for _, flag in right} == {True, False}


def test_greedy_texts_are_those_of_lm_evals_own_adapter(both):
    ours, theirs, _ = both
    settings = [
        {"until": [".", ", "], "max_gen_toks": 12, "do_sample": False},
        {"until": "e", "max_gen_toks": 12, "temperature": 0.0},
        {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7},
    ]  # fmt: skip
    requests = [(context, x) for x in settings for context in CONTEXTS[1:]]
    right = ask(theirs, "generate_until", *requests)
    assert ask(ours, "generate_until", *requests) == right
    assert len(set(right)) > 15


@pytest.mark.parametrize("both", ["random", "tiny", "json"], indirect=True)
def test_whole_texts_are_scored_as_by_lm_evals_own_adapter_with_one_bos(both):
    ours, _, theirs = both
    texts = [(x,) for x in ("", "The sea", BOOK[:5000], BOOK[7000:7900])]
    right = ask(theirs, "loglikelihood_rolling", *texts)
    assert ask(ours, "loglikelihood_rolling", *texts) == pytest.approx(right, rel=1e-6, abs=1e-4)


def test_tasks_of_every_kind_get_the_same_answers_and_scores(both):
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    ours, theirs, without_bos = both
    kinds = {"multiple_choice", "generate_until", "loglikelihood_rolling"}
    for name in NAMES:
        kind = manager.load([name])["tasks"][name].OUTPUT_TYPE
        kinds.remove(kind)
        reference = without_bos if kind == "loglikelihood_rolling" else theirs
        a, b = (evaluate(lm=lm, task_dict=manager.load([name]), limit=4, bootstrap_iters=0) for lm in (ours, reference))
        for x, y in zip(a["samples"][name], b["samples"][name], strict=True):
            assert x["arguments"] == y["arguments"]
            if kind == "multiple_choice":
                assert unlike([answer[0] for answer in x["resps"]], [answer[0] for answer in y["resps"]]) == []
            elif kind == "generate_until":
                assert x["resps"] == y["resps"]
        scores, right = ({k: x for k, x in run["results"][name].items() if not isinstance(x, str)} for run in (a, b))
        assert scores == pytest.approx(right, rel=1e-5) and scores["sample_len"] == 4 and len(scores) > 1
    assert not kinds


# ------------------------------------------------------------------------------------------------------------ Memory


@pytest.mark.parametrize("last", [None, 100])
def test_a_context_longer_than_the_window_is_read_as_one_pass_with_memory_reads_it(last, tiny, adapter):
    model, tokenizer = tiny
    context, end = BOOK[: BOOK.index(" ", 3000)], BOOK[BOOK.index(" ", 3000) : BOOK.index(" ", 3060)]
    ids = tokenizer.encode(context + end)
    n = len(ids) - len(tokenizer.encode(context))
    assert len(ids) > 3 * model.config.max_position_embeddings
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[:-1]]), last_context_length=last or 256)
    right = logits[0, -n:].log_softmax(dim=-1).gather(1, torch.tensor(ids[-n:])[:, None]).sum()
    ((score, _),) = ask(adapter(1, last), "loglikelihood", (context, end))
    assert score == pytest.approx(right.item(), abs=1e-3)
    ((cut, _),) = ask(adapter(1, last), "loglikelihood", (tokenizer.decode(ids[-n - 100 : -n]), end))
    assert abs(cut - score) > 0.1


def test_a_whole_text_is_scored_with_all_that_came_before_in_memory(tiny, adapter):
    model, tokenizer = tiny
    ids = torch.tensor(tokenizer.encode(BOOK[:3000]))
    with torch.no_grad():
        logits, cache = model(ids[None, :-1], last_context_length=256)
    right = logits[0].log_softmax(dim=-1).gather(1, ids[1:, None]).double().sum().item()
    assert cache.memory_length > 512
    assert ask(adapter(1), "loglikelihood_rolling", (BOOK[:3000],)) == pytest.approx([right], abs=0.01)


def test_a_long_text_never_has_all_its_logits_at_once(tiny, adapter):
    model, tokenizer = tiny
    with Watching() as watched:
        ask(adapter(2), "loglikelihood_rolling", (BOOK[:10000],), (BOOK[:300],))
    assert len(tokenizer.encode(BOOK[:10000])) > 3 * 1024 and watched.numel <= 1024 * model.config.vocab_size


def test_a_batch_gets_what_each_gets_alone(adapter):
    contexts = ["The sea", BOOK[:2000], "", BOOK[100:160], BOOK[9000:9400], "Q:", BOOK[4000:4600]]
    requests = [
        (context, end) for context in contexts for end in (" was", " and the whale", " in the deep of the sea it was")
    ]
    assert unlike(*(ask(adapter(n), "loglikelihood", *requests) for n in (5, 1))) == []
    prompts = [(context, {"until": ["."], "max_gen_toks": 12}) for context in contexts]
    assert ask(adapter(5), "generate_until", *prompts) == ask(adapter(1), "generate_until", *prompts)
    texts = [(x,) for x in contexts]
    alone = ask(adapter(1), "loglikelihood_rolling", *texts)
    assert ask(adapter(5), "loglikelihood_rolling", *texts) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("new, last, local", [(56, None, 200), (140, None, 128), (56, 90, 90)])
def test_what_is_generated_finds_room_in_the_window(new, last, local, tiny, adapter):
    """So that layers without memory do not lose the question as they answer; half of the window is kept for it at least."""
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(BOOK[:1500])])
    right = [i.item() for i in model.generate(ids, new, temperature=0, last_context_length=local)]
    (text,) = ask(adapter(1, last), "generate_until", (BOOK[:1500], {"until": [], "max_gen_toks": new}))
    assert text == tokenizer.decode(right)


def test_what_is_generated_is_the_text_of_its_ids_alone(tiny, tmp_path):
    from evaluation.adapter import LongLlamaLM

    keeping = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    special = [special_tokenizer(tmp_path / "drops"), special_tokenizer(tmp_path / "keeps", **keeping)]
    for tokenizer in map(Tokenizer, (*TOKENIZERS, *special)):
        lm = LongLlamaLM(tiny[0], tokenizer, 1)
        for ids in (tokenizer.encode(text, bos=False) for text in (*TEXTS, "the sea", "  the sea")):
            assert lm.alone(streamed(tokenizer, ids, continues=True)) == tokenizer.decode(ids)


def test_texts_are_drawn_where_a_task_says_so(adapter):
    drawn = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    request, nearly = ("The sea", drawn), ("The sea", drawn | {"top_k": 1})
    torch.manual_seed(0)
    assert len({ask(adapter(1), "generate_until", request)[0] for _ in range(5)}) > 2
    greedy = ask(adapter(1), "generate_until", ("The sea", {"until": [], "max_gen_toks": 10}))
    assert ask(adapter(1), "generate_until", nearly) == greedy


# --------------------------------------------------------------------------------------------------------- Mistakes


def test_what_cannot_be_generated_or_read_is_refused(adapter, both):
    with pytest.raises(ValueError, match="generation_kwargs num_beams: only"):
        ask(adapter(1), "generate_until", ("The sea", {"until": [], "num_beams": 4}))
    ours, _, _ = both
    window = ours.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"no room for a context in a window of {window}"):
        ask(ours, "generate_until", ("The sea", {"until": [], "max_gen_toks": window}))
    with pytest.raises(ValueError, match=f"exceeds the window of {window}, without memory layers"):
        ask(ours, "loglikelihood", ("The sea", BOOK[:3000]))
    with pytest.raises(ValueError, match="a continuation adds no token to its context"):
        ask(ours, "loglikelihood", ("The sea", " was"), ("The sea", ""))


def run(*flags) -> int:
    return run_main(harness.main, "--device", "cpu", *flags)


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run("--tasks", "sea_keys") == 2
    assert one_line(capsys).endswith("needs lm-evaluation-harness 0.4.13 or newer: pip install -U lm-eval\n")


def test_mistakes_are_told_in_one_line_before_a_model_is_loaded(tmp_path, capsys):
    folder, none = (
        ["--include-path", TASKS],
        "--tasks sea_monsters: there is none of this name in lm-evaluation-harness",
    )
    for flags, said in (
        (["--tasks", "sea_keys,sea_monsters", *folder], f"{none}, nor in {TASKS}"),
        (["--tasks", "sea_keys", "--include-path", TASKS / "x"], f"--include-path {TASKS / 'x'} is no folder"),
        (["--tasks", "sea_keys", "--output", tmp_path], f"--output {tmp_path}: name a file"),
        (["--tasks", "sea_keys", "--limit", "0"], "--limit: 0 is not at least 1"),
        ([], "required: --tasks"),
    ):
        assert run("--model", tmp_path / "no model", *flags) == 2
        assert said in one_line(capsys)


# ------------------------------------------------------------------------------------------------------ The program


def test_the_program_prints_lm_evals_table_and_writes_its_results(tmp_path, capsys):
    asked = [row["after"] for row in json.loads((TASKS / "sea_keys.json").read_text(encoding="utf-8"))]
    assert min(len(Tokenizer(TINY / "tokenizer.model").encode(text)) for text in asked) > 256  # keys are in memory
    flags = ["--include-path", TASKS, "--limit", "4", "--num-fewshot", "2", "--mem-dtype", "float32"]
    assert run("--tasks", "sea_k*,sea_endings", *flags, "--output", tmp_path / "results.json") == 0
    table = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    (keys,) = (row for row in table if "sea_keys" in row)
    assert keys[5:7] == ["exact_match", "↑"] and float(keys[7]) == 1
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (
        results["results"]["sea_keys"]["exact_match,none"] == 1
        and results["n-samples"]["sea_endings"]["effective"] == 4
    )
    assert results["n-shot"] == {"sea_endings": 2, "sea_keys": 0}  # a task's own 0 stays
    assert results["config"]["model_args"]["mem_dtype"] == results["config"]["model_config"]["mem_dtype"] == "float32"
    assert results["config"]["model_config"]["last_context_length"] == 256
