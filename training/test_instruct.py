"""Instruction tuning, LoRA and gradient checkpointing, checked: python -m pytest training/test_instruct.py"""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.texts import ASSISTANT, OPENING, USER
from convert import save_pretrained
from examples.chat import FORMATS, Conversation
from fast import FastConfig, FastLlama
from tokenizer import Tokenizer
from training.data import Source
from training.instruct import IGNORED, InstructPhase, Rows, main, mean_loss
from training.lora import PRODUCTS, add_lora, merged
from training.recipe import Recipe
from training.recompute import recompute_layers
from training.test_training import one_thread  # noqa: F401  as there

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "testdata" / "prose.model"
ROW = {"system_prompt": "Be brief.", "question": "Where is the whale?", "response": "In the sea."}
TALK = {
    "conversations": [
        {"from": "human", "value": "Who is there?"},
        {"from": "gpt", "value": "The captain."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "On the deck."},
    ]
}
PHASE = {
    "steps": 4,
    "learning_rate": 1e-2,
    "warmup": 0,
    "groups": 2,
    "samples": 2,
    "length": 96,
    "last_context_length": 24,
}


def config(**changes) -> FastConfig:
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 32, "mem_layers": (1,), "mem_dtype": "float32"}
    return FastConfig(**sizes | heads | changes)


def model(**changes) -> FastLlama:
    torch.manual_seed(0)
    return FastLlama(config(**changes))


def phase(**changes) -> InstructPhase:
    return InstructPhase(**PHASE | changes)


def write(path: Path, raw) -> Path:
    """JSON lines of a list, or one JSON object."""
    text = "".join(json.dumps(row) + "\n" for row in raw) if isinstance(raw, list) else json.dumps(raw)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write(tmp_path / "recipe.json", {"seed": 0, "weight_decay": 0.0, "model": {}, "phases": [PHASE]})


def rows(recipe: Path, *sources: Source, **settings) -> Rows:
    write(recipe, json.loads(recipe.read_text()) | settings)
    return Rows(list(sources), Tokenizer(TOKENIZER), Recipe(recipe, InstructPhase, more=("fields", "prompts")))


@pytest.fixture
def one(recipe, tmp_path) -> Rows:
    return rows(recipe, Source(write(tmp_path / "one.jsonl", [ROW])))


# -------------------------------------------------------------------------------------------------- What a sample is


def test_an_instruction_is_prompt_and_answer_tokenised_apart_with_loss_on_the_answer(one):
    sp = SentencePieceProcessor(model_file=str(TOKENIZER))
    prompt, answer = [1, *sp.encode("Be brief.\nWhere is the whale?\n")], [*sp.encode("In the sea."), 2]
    sample = one.encode(ROW)
    assert sample.ids == prompt + answer and not any(sample.hidden)
    assert sample.answer == [False] * len(prompt) + [True] * len(answer)
    assert one.encode(ROW | {"system_prompt": ""}).ids == [1, *sp.encode("Where is the whale?\n"), *answer]
    short = one.encode(ROW, 4, 2)
    assert short.ids == prompt[:4] + answer[:2] and short.answer == [False] * 4 + [True] * 2


def test_what_is_tuned_is_what_the_chat_asks(one):
    """A conversation's ids, up to each answer, are those that chat.py --format instruct reads before it answers."""
    sample, tokenizer = one.encode(TALK), Tokenizer(TOKENIZER)
    chat = Conversation(model(), tokenizer, FORMATS["instruct"])
    chat.begin()
    texts = [turn["value"] for turn in TALK["conversations"]]
    asked = chat.next_ids(texts[0])
    assert sample.ids[: len(asked)] == asked and not any(sample.answer[: len(asked)])
    answered = [*chat.encode(texts[1]), 2]
    assert sample.ids[len(asked) :][: len(answered)] == answered
    later = [*chat.encode(FORMATS["instruct"].before, texts[2], FORMATS["instruct"].after), *chat.encode(texts[3]), 2]
    assert sample.ids[len(asked) + len(answered) :] == later
    assert [i for i, answer in zip(sample.ids, sample.answer) if answer] == answered + [*chat.encode(texts[3]), 2]
    assert [i for i, hidden in zip(sample.ids, sample.hidden) if hidden] == [2, 2]  # which chat.py never reads


def test_fields_and_prompts_are_those_of_the_recipe(recipe, tmp_path):
    source = Source(write(tmp_path / "a.jsonl", [{"ask": "Where?", "say": "Here."}]))
    fields = {"question": "ask", "response": "say", "model": ["bot"]}
    own = rows(recipe, source, fields=fields, prompts={"before_question": "Q: ", "after_question": " A:", "user": "U"})
    sp = SentencePieceProcessor(model_file=str(TOKENIZER))
    assert own.encode({"ask": "Where?", "say": "Here."}).ids == [1, *sp.encode("Q: Where? A:"), *sp.encode("Here."), 2]
    talk = {"conversations": [{"from": "human", "value": "Hm."}, {"from": "bot", "value": "Yes."}]}
    ids = own.encode(talk).ids
    assert ids[-len([*sp.encode("Yes."), 2]) :] == [*sp.encode("Yes."), 2] and sp.encode("U")[0] in ids


def test_padding_lies_on_both_sides_at_random_and_labels_are_answers_alone(one):
    rng, starts, p = np.random.default_rng(0), set(), phase()
    whole = one.encode(ROW)
    for _ in range(50):
        ids, labels, mask = one.batch([ROW], p, rng)
        start = int(mask[0].argmax())
        starts.add(start)
        assert ids[0, start : start + len(whole.ids)].tolist() == whole.ids and mask.sum() == len(whole.ids)
        wanted = [i if answer else IGNORED for i, answer in zip(whole.ids, whole.answer)]
        assert labels[0, start : start + len(wanted)].tolist() == wanted and (labels != IGNORED).sum() == sum(
            whole.answer
        )
    assert min(starts) < 15 and max(starts) > p.length - len(whole.ids) - 15 and len(starts) > 20
    _, _, mask = one.batch([ROW] * 9, phase(random_padding=False), rng)
    assert mask[:, : len(whole.ids)].all()


def test_a_sample_that_is_too_long_is_cut_to_the_length(one):
    ids, labels, mask = one.batch([ROW], phase(length=12), np.random.default_rng(0))
    whole = one.encode(ROW)
    first = whole.ids[whole.answer.index(True)]  # one id of the answer is left
    assert ids[0].tolist() == [*whole.ids[:11], first] and mask.all() and labels[0].tolist() == [IGNORED] * 11 + [first]


def test_sources_are_mixed_by_their_shares(recipe, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz"):
        write(folder / name, [ROW | {"question": f"{name} {i}?"} for i in range(40)])
    both = rows(recipe, Source(folder, 3.0), Source(write(tmp_path / "talk.jsonl", [TALK] * 5), 1.0))
    assert both.shares.tolist() == [0.75, 0.25] and len(both.sources[0]) + len(both.held) == 80
    drawn, net, p = Counter(), model(hidden_size=8, intermediate_size=8, mem_layers=()), phase(samples=8, length=32)
    net.embed_tokens.register_forward_hook(lambda module, args, x: drawn.update(args[0][:, 1].tolist()))
    for step in range(60):
        both.loss(net, replace(p, random_padding=False), step, (0, step, 0))
    talks = drawn[both.encode(TALK).ids[1]]  # the first id tells which it is
    assert drawn.total() == 480 and abs(talks / 480 - 0.25) < 0.06
    assert 0 < len(both.held) < 20 and not any(row in both.sources[0] for row in both.held)


def test_a_system_prompt_comes_first_and_conversations_without_an_answer_are_left_out(recipe, tmp_path):
    told = {"conversations": [{"from": "system", "value": "Be brief."}, *TALK["conversations"][:2]]}
    some = [told, {"conversations": TALK["conversations"][:1]}, {"conversations": []}]
    made, tokenizer = rows(recipe, Source(write(tmp_path / "a.jsonl", some))), Tokenizer(TOKENIZER)
    parts = [OPENING, "Be brief.\n", USER, "Who is there?", ASSISTANT, "The captain."]
    assert made.encode(told).ids == [1, *(i for part in parts for i in tokenizer.encode(part, bos=False)), 2]
    assert made.sources == [[told]] and made.lines(None)[0].endswith("2 conversations without an answer are left out")


# ---------------------------------------------------------------------------------------------------- What the loss is


def batch(one: Rows, *given: dict, **changes):
    return one.batch(list(given), phase(**changes), np.random.default_rng(3))


def exactly(net: FastLlama, made, last) -> torch.Tensor:
    ids, labels, mask = made
    return net(ids, None, mask, last, labels=labels)[0]


def test_the_loss_is_that_of_transformers_where_all_is_local(one):
    """Padding on both sides, and hidden ids in the middle."""
    net = model(mem_layers=(), max_position_embeddings=256)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, rms_norm_eps=1e-6, attn_implementation="eager",
    ))  # fmt: skip
    theirs.load_state_dict({name: x.clone() for name, x in net.hf_tensors().items()})
    ids, labels, mask = batch(one, ROW, TALK, length=160)
    wanted = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert torch.allclose(exactly(net, (ids, labels, mask), 160), wanted, atol=1e-5)


def test_padding_is_invisible(one):
    """Nothing is split: the loss is that of the sample alone. Else it is the same whatever ids padding has."""
    net, whole = model(max_position_embeddings=96), one.encode(ROW)
    ids = torch.tensor([whole.ids])
    labels = torch.where(torch.tensor([whole.answer]), ids, IGNORED)
    alone = exactly(net, (ids, labels, torch.ones_like(ids)), 96)
    for seed in range(5):
        made = one.batch([ROW], phase(), np.random.default_rng(seed))
        assert torch.allclose(exactly(net, made, 96), alone, atol=1e-5)
    net = model()
    for seed in range(5):
        ids, labels, mask = one.batch([ROW, TALK], phase(length=150), np.random.default_rng(seed))
        other = torch.where(mask.bool(), ids, torch.randint(3, 2048, ids.shape))
        grads = []
        for x in (ids, other):
            net.zero_grad()
            loss = exactly(net, (x, labels, mask), 24)
            loss.backward()
            grads.append(
                [loss.detach(), *(p.grad.clone() for name, p in net.named_parameters() if "embed" not in name)]
            )
        # `</s>` of a conversation is hidden, and is no padding: it has an id of its own
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_gradients_flow_through_memory(one):
    """An id that stands in what moved to memory alone, and has no loss, still learns."""
    net = model()
    ids, labels, mask = batch(one, ROW, random_padding=False)
    ids[0, 3], n = 2000, int(mask.sum())
    assert (ids == 2000).sum() == 1 and n - 8 > 3
    cut = ids[:, :n], labels[:, :n], mask[:, :n]
    exactly(net, cut, 8).backward()
    assert net.embed_tokens.weight.grad[2000].abs().max() > 0


# ------------------------------------------------------------------------- What keeps less, and what trains less


def saved_bytes(work) -> int:
    """Of tensors that are kept for the backward pass of work()."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = work()
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["rows", "packed"])
def test_layers_computed_again_give_the_same_gradients_and_keep_less(kind, one):
    made, nets = batch(one, ROW, TALK, length=150), [model(num_hidden_layers=4, mem_layers=(1, 2)) for _ in range(2)]
    recompute_layers(nets[1])
    chunks, kept = torch.arange(6 * 32).view(6, 32), []
    for net in nets:
        if kind == "rows":
            kept.append(saved_bytes(lambda net=net: mean_loss(net, made, 24)))
        else:
            kept.append(
                saved_bytes(lambda net=net: net.forward_cross_batch(chunks, [0, 1, 2, 0, 3, 5]).logsumexp(-1).mean())
            )
    grads = [{name: p.grad for name, p in net.named_parameters()} for net in nets]
    assert all(torch.equal(x, grads[1][name]) for name, x in grads[0].items())
    assert kept[1] < 0.6 * kept[0]


def test_lora_changes_nothing_at_first_then_its_products_alone_and_is_merged_into_them():
    net, ids = model().to(torch.bfloat16), torch.arange(20)[None]
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, _ = net(ids)
        add_lora(net, 3, ["qkv_proj", "down_proj"])
        assert torch.equal(net(ids)[0], plain)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"qkv_proj", "down_proj"} and len(trained) == 2 * 2 * 2
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    whole = merged(net.state_dict())
    changed = {name for name, x in whole.items() if not torch.equal(x.float(), before[name].float())}
    assert {name.split(".")[2] for name in changed} == {"qkv_proj", "down_proj"} and whole.keys() == before.keys()
    alone = model()
    alone.load_state_dict(whole)
    with torch.no_grad():
        assert torch.allclose(alone(ids)[0], net.float()(ids)[0], atol=1e-4)
    with pytest.raises(ValueError, match="--lora 32"):
        add_lora(model(), 32, [*PRODUCTS])


# ------------------------------------------------------------------------------------------------------- The program


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    save_pretrained(model(), folder, TOKENIZER)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    words = ["sea", "whale", "ship", "captain", "boat", "wind"]
    listed = [{"question": f"Say {word} {i}.", "response": word} for i in range(12) for word in words]
    return write(tmp_path / "data.jsonl", listed)


def tune(recipe: Path, data: Path, init: Path, output: Path, *flags, processes: int = 1) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    call = [sys.executable, *launch, HERE / "instruct.py", "--recipe", recipe, "--init", init, "--data", data]
    call = [*call, "--output", output, "--device", "cpu", *flags]
    return subprocess.run([*map(str, call)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(recipe, data, init, output, *flags, monkeypatch) -> list[dict]:
    """Of a run in this process: its log."""
    call = ["instruct.py", "--recipe", recipe, "--init", init, "--data", data, "--output", output, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, [*call, *flags])])
    main()
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


WAYS = [
    (),
    ("--lora", "2", "--checkpoint-layers"),
    ("--tune", "memory", "--checkpoint-layers", "--dtype", "float32"),
]


@pytest.mark.parametrize("flags", WAYS, ids=["all", "lora", "memory"])
def test_a_run_that_was_interrupted_goes_on_as_if_it_was_not(flags, recipe, data, init, tmp_path, monkeypatch, capsys):
    whole = run(recipe, data, init, tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    run(recipe, data, init, tmp_path / "parts", *flags, "--stop-after", "2", monkeypatch=monkeypatch)
    parts = run(recipe, data, init, tmp_path / "parts", *flags, "--resume", monkeypatch=monkeypatch)
    assert parts == whole and len(whole) == 4 and set(whole[-1]["held_out"]) == {"through memory"}
    assert "resumed at step 2" in capsys.readouterr().out
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(x, models[1][name]) for name, x in models[0].items())
    before = load_file(init / "model.safetensors")
    same = {name for name, x in models[0].items() if torch.equal(x, before[name].to(torch.bfloat16))}
    trained = {"--lora": ".self_attn.", "--tune": ".layers.1.self_attn."}.get(flags[0]) if flags else ""
    assert same == {name for name in before if trained not in name}
    for other in ([], ["--lora", "3"]) if flags else ():
        with pytest.raises(SystemExit):
            run(recipe, data, init, tmp_path / "parts", "--resume", *other, monkeypatch=monkeypatch)
        assert "made with another --" in capsys.readouterr().err


@pytest.mark.parametrize("flags", WAYS, ids=["all", "lora", "memory"])
def test_two_processes_tune_as_one(flags, recipe, data, init, tmp_path, monkeypatch):
    write(recipe, json.loads(recipe.read_text()) | {"phases": [PHASE | {"learning_rate": 1e-3}]})
    done = tune(recipe, data, init, tmp_path / "two", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    one = run(recipe, data, init, tmp_path / "one", *flags, monkeypatch=monkeypatch)
    two = [json.loads(line) for line in (tmp_path / "two" / "losses.jsonl").read_text().splitlines()]
    assert np.allclose([x["loss"] for x in one], [x["loss"] for x in two], atol=2e-3)
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    before = load_file(init / "model.safetensors")
    for name, x in models[0].items():  # a step moves a weight by the learning rate, whichever way its gradient points
        moved, apart = ((x.float() - y.float()).abs().mean() for y in (before[name], models[1][name]))
        assert apart <= 0.3 * moved, name


@pytest.mark.parametrize(
    "changed, flags, named",
    [
        ([{"question": "Where?"}], [], "line 1 has no conversations, and no text under response"),
        ([ROW, ROW | {"question": 5}], [], "line 2 has"), ([ROW, 5], [], "line 2 is no JSON object"),
        ([{"conversations": [{"from": "cat", "value": "x"}]}], [], "a turn of 'cat', who is none of system, human, user, gpt"),
        ([{"conversations": [{"from": "user", "value": "x"}]}], [], "no rows to train on"),
        ([ROW | {"question": "\ud83d"}], [], "line 1 has half a character"),
        ({}, ["--lora-products", "o_proj"], "--lora RANK"), ({}, ["--dtype", "float16"], "float16"),
        ({}, ["--tune", "memory", "--lora", "2"], "exclude each other"),
        ({"model": {"mem_layers": [], "max_position_embeddings": 96}}, ["--tune", "memory"], "mem_layers"),
        ([{"conversations": [{"from": "user"}]}], [], "a turn without text under value"),
        ([{"conversations": 5}], [], "no list of turns"), ([], [], "no rows to train on"),
        ({"phases": [PHASE | {"length": 0}]}, [], "length"), ({"phases": [PHASE | {"input": 96}]}, [], "input 96"),
        ({"phases": [PHASE | {"window": 5}]}, [], "window"), ({"prompts": {"befor": "x"}}, [], "befor"),
        ({"fields": {"user": "x"}}, [], "user must be like"), ({"feilds": {}}, [], "feilds"),
        ({"phases": [PHASE | {"random_padding": 1}]}, [], "random_padding"),
        ({}, ["--lora", "500"], "--lora 500"), ({}, ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ({"model": {"mem_layers": []}}, [], "a length of 96, but max_position_embeddings is 32"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_get_one_line_and_status_2(changed, flags, named, recipe, data, init, tmp_path, capsys, monkeypatch):
    if isinstance(changed, dict):
        write(recipe, json.loads(recipe.read_text()) | changed)
    else:
        write(data, changed)
    with pytest.raises(SystemExit) as stop:
        run(recipe, data, init, tmp_path / "run", *flags, monkeypatch=monkeypatch)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and named in err
    assert not (tmp_path / "run").exists()
