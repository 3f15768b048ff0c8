"""What `transformers_model.py` claims, checked: python -m pytest examples/test_transformers_model.py

Truth comes from the numbers recorded from the original code (testdata/), from transformers' LlamaForCausalLM, and from our own
model, which is tested by itself.
"""

import json
import runpy
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import generate
from cli.loading import TINY
from cli.texts import hide_key
from convert import save_pretrained
from examples import transformers_model as program
from examples.transformers_model import LongLlamaConfig, LongLlamaForCausalLM, MemoryCache
from fast import FastConfig, FastLlama

TESTDATA = Path(__file__).resolve().parents[1] / "testdata"
CASES, EXPECTED = json.loads((TESTDATA / "cases.json").read_text()), load_file(TESTDATA / "expected.safetensors")
SHAPES = {"heads": {}, "grouped": {"num_key_value_heads": 2}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(autouse=True)
def alike_each_time():
    """The same random numbers; one thread, since tensors are too small here to be shared between several."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_small(folder: Path, **changes) -> Path:
    """A small random model of ours: 4 layers, 2 of them with memory, a window of 16."""
    settings = {
        "vocab_size": 61, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mem_layers": (1, 2), "max_position_embeddings": 16, "last_context_length": 8, "mem_dtype": "float32",
        "eos_token_id": 60,
    }  # fmt: skip
    save_pretrained(FastLlama(FastConfig(**settings | changes)), folder)
    return folder


@pytest.fixture(params=SHAPES)
def each_folder(request, tmp_path) -> Path:
    return save_small(tmp_path / "ours", **SHAPES[request.param])


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_small(tmp_path / "ours", num_key_value_heads=2)


def both(folder: Path, **settings) -> tuple[LongLlamaForCausalLM, FastLlama]:
    """The model in a folder, by transformers and by us."""
    return AutoModelForCausalLM.from_pretrained(folder, **settings), FastLlama.from_pretrained(folder, **settings)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(3, 60, shape)


def padded(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Ids whose first row begins with n of padding, and their mask."""
    mask = torch.ones_like(ids)
    mask[0, :n] = 0
    return ids.masked_fill(mask == 0, 0), mask


def ours(model: FastLlama, ids: Tensor, n: int, **options) -> list[list[int]]:
    """What n greedy steps continue each row with."""
    return torch.stack(list(model.generate(ids, n, temperature=0, **options)), dim=1).tolist()


def theirs(model, ids: Tensor, n: int, **options) -> list[list[int]]:
    return model.generate(ids, max_new_tokens=n, do_sample=False, **options)[:, ids.shape[1] :].tolist()


def hf_llama(folder: Path, **changes) -> LlamaForCausalLM:
    """A small random LLaMA of transformers, as it saves it."""
    sizes = {"vocab_size": 61, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | {"pad_token_id": 0, "eos_token_id": 60} | changes)).eval()
    model.save_pretrained(folder)
    return model


# ------------------------------------------------------------------------------------------------- What it computes


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_its_logits_are_those_of_the_original_code(name):
    case, ids = CASES[name], EXPECTED[f"{name}.input_ids"]
    changes = dict(case["config"])
    if "rope_theta" in changes:  # as transformers 5 says it
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": changes.pop("rope_theta")}
    model = AutoModelForCausalLM.from_pretrained(TESTDATA, **changes)
    mask, logits, cache, start = EXPECTED.get(f"{name}.attention_mask", torch.ones_like(ids)), [], None, 0
    for n in case["segments"]:
        given = {"attention_mask": mask[:, : start + n], "last_context_length": case["last_context_length"]}
        out = model(ids[:, start : start + n], past_key_values=cache, **given)
        cache, start = out[1], start + n
        logits.append(out.logits)
    right, real = EXPECTED[f"{name}.logits"], mask[:, :start].bool()
    bound = 5e-4 if changes.get("mem_dtype") == "bfloat16" else 1e-4
    assert (torch.cat(logits, dim=1)[real] - right[real]).abs().max() < bound
    assert cache.get_seq_length() == start


def test_greedy_ids_are_those_of_the_original_code():
    ids, n = EXPECTED["greedy_generation.input_ids"], CASES["greedy_generation"]["generate"]
    assert (
        theirs(AutoModelForCausalLM.from_pretrained(TESTDATA), ids, n)
        == EXPECTED["greedy_generation.generated"].tolist()
    )


@pytest.mark.parametrize("T", [5, 16, 100])
def test_greedy_ids_are_ours_for_prompts_of_any_length_and_past_the_window(T, folder):
    hf, model = both(folder)
    ids = some_ids(2, T)
    assert theirs(hf, ids, 40) == ours(model, ids, 40)  # the window is 16
    assert theirs(hf, ids, 40, last_context_length=3) == ours(model, ids, 40, last_context_length=3)


@pytest.mark.parametrize("T", [12, 50])
def test_a_batch_with_padding_on_the_left_is_continued_as_ours_is(T, folder):
    hf, model = both(folder, last_context_length=12)
    ids, mask = padded(some_ids(3, T), 4)
    found = theirs(hf, ids, 40, attention_mask=mask)
    assert found == ours(model, ids, 40, attention_mask=mask) != ours(model, ids, 40)
    assert found == theirs(hf, ids, 40)  # by the ids of padding, which are known
    assert found[1:] == theirs(hf, ids[1:], 40)


def test_without_memory_layers_it_generates_what_transformers_llama_does(tmp_path):
    reference, model = hf_llama(tmp_path), LongLlamaForCausalLM.from_pretrained(tmp_path)
    ids, mask = padded(some_ids(4, 20), 7)
    assert (model(ids[1:]).logits - reference(ids[1:]).logits).abs().max() < 1e-4
    for settings in (
        {"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 1.5}, {"do_sample": True, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.5}, {"do_sample": True, "num_return_sequences": 2},
    ):  # fmt: skip
        found = []
        for each in (model, reference):
            torch.manual_seed(1)
            found.append(each.generate(ids, attention_mask=mask, max_new_tokens=40, **settings).tolist())
        assert found[0] == found[1], settings
        assert len({tuple(row[20:]) for row in found[0]}) == len(found[0]) > 3


def test_reading_each_time_anew_without_a_cache_is_the_same_where_all_stays_local(folder):
    hf, _ = both(folder, last_context_length=16)
    ids = some_ids(2, 6)
    assert theirs(hf, ids, 10, use_cache=False) == theirs(hf, ids, 10)
    assert "logits" in hf(ids, use_cache=False) and len(hf(ids, use_cache=False)) == 1


def test_labels_give_the_loss_and_its_gradients_through_memory(folder):
    hf, model = both(folder)
    ids, mask = padded(some_ids(2, 60), 5)
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape) < 0.3), -100)
    out = hf(ids, attention_mask=mask, labels=labels)
    logits = hf(ids, attention_mask=mask).logits
    right = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss == model(ids, attention_mask=mask, labels=labels)[0] and abs(out.loss - right) < 1e-5
    assert out.logits is None and hf(ids, attention_mask=mask, labels=labels, return_dict=False)[0] == out.loss
    weights = list(hf.parameters())
    for found, expected in zip(*(torch.autograd.grad(loss, weights) for loss in (out.loss, right))):
        assert (found - expected).norm() < 1e-4 * expected.norm() != 0


# -------------------------------------------------------------------------------------------------------- The cache


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_a_cache_that_is_given_back_goes_on_and_its_copy_goes_on_by_itself(folder):
    hf, model = both(folder)
    ids, mask = padded(some_ids(2, 50), 3)
    first = hf.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    cache, seen = first[-1], first.sequences
    read = seen.shape[1] - 1  # all but the last one
    assert isinstance(cache, MemoryCache) and cache.get_seq_length() == read > 50
    longer = [torch.cat((seen, some_ids(2, 30)), dim=1) for _ in range(2)]
    kept = cache.cache.fork()
    for text in longer:
        mask = F.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        right = ours(model, text[:, read:], 30, cache=kept.fork())
        assert theirs(hf, text, 30, attention_mask=mask, past_key_values=deepcopy(cache)) == right
    assert cache.get_seq_length() == read
    assert theirs(hf, longer[1], 30, attention_mask=mask, past_key_values=cache) == right
    assert cache.get_seq_length() == read + 31 + 29


def test_a_copied_cache_shares_what_is_remembered(folder):
    hf, _ = both(folder)
    cache = hf(some_ids(1, 50), logits_to_keep=1)[1]
    blocks = [layer.memory.blocks for each in (cache, deepcopy(cache)) for layer in each.cache.layers if layer.memory]
    assert len(blocks) == 4 and all(a[0][0].data_ptr() == b[0][0].data_ptr() for a, b in zip(blocks, blocks[2:]))


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 2}]
)
def test_beams_and_assisted_decoding_are_refused_by_name(settings, folder):
    hf, _ = both(folder)
    with pytest.raises(
        ValueError, match="LongLlamaForCausalLM only supports .*GREEDY.*SAMPLE.*but got .*(BEAM|ASSISTED)"
    ):
        hf.generate(some_ids(1, 5), max_new_tokens=3, **settings)


def test_what_it_has_not_is_refused_by_name(folder):
    hf, _ = both(folder)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(TypeError, match=name):
            hf(some_ids(1, 5), **{name: True})
        with pytest.raises(TypeError, match=name):
            hf.generate(some_ids(1, 5), max_new_tokens=3, return_dict_in_generate=True, **{name: True})
    cache = hf(some_ids(1, 5))[1]
    for act in (lambda: cache.crop(2), lambda: cache.reorder_cache(torch.tensor([0])), cache.reset):
        with pytest.raises(NotImplementedError, match="takes no token back"):
            act()


# ---------------------------------------------------------------------------------------------------------- Folders


def test_what_it_saves_is_what_it_read(each_folder, tmp_path):
    hf, model = both(each_folder)
    hf.save_pretrained(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (each_folder, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, read = both(tmp_path / "saved")
    assert FastConfig.from_json(tmp_path / "saved" / "config.json") == model.config == again.model.config
    ids = some_ids(1, 50)
    assert theirs(again, ids, 40) == ours(read, ids, 40)
    for each in (hf, again):
        assert torch.equal(each(ids).logits, model(ids)[0]) and torch.equal(each(ids).logits, read(ids)[0])


def test_a_new_model_in_shards_and_in_half_precision_is_saved_and_read_too(folder, tmp_path):
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again, model = both(tmp_path / "saved", dtype=torch.bfloat16)
    ids = some_ids(1, 50)
    assert hf.dtype == torch.bfloat16 and torch.equal(hf(ids).logits, again(ids).logits)
    assert torch.equal(hf(ids).logits, model(ids)[0])


def test_two_different_matrices_that_a_config_ties_are_both_used(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.randn(61, 40)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    hf, model = both(folder)
    ids = some_ids(1, 50)
    assert torch.equal(hf(ids).logits, model(ids)[0])


def test_the_auto_classes_know_it_and_settings_of_memory_can_be_given(folder):
    assert type(AutoConfig.from_pretrained(folder)) is LongLlamaConfig
    given = {"mem_layers": [3], "mem_dtype": "float8_e4m3fn", "mem_topk": 5, "keep_local": 4, "last_context_length": 6}
    hf, model = both(folder, **given)
    ids = some_ids(1, 50)
    assert type(hf) is LongLlamaForCausalLM and hf.model.config == model.config
    assert theirs(hf, ids, 40) == ours(model, ids, 40)


def test_tokens_can_be_added(folder, tmp_path):
    hf, model = both(folder)
    hf.resize_token_embeddings(70)
    hf.save_pretrained(tmp_path / "larger")
    again, read = both(tmp_path / "larger")
    ids = some_ids(1, 50)
    assert torch.equal(again(ids).logits, read(ids)[0]) and again(ids).logits.shape == (1, 50, 70)
    assert torch.equal(hf(ids).logits[..., :61], again(ids).logits[..., :61])
    assert (again(ids).logits[..., :61] - model(ids)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "wrong, named",
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "^rope_scaling's rope_type 'dynamic'",
        ),
        ({"mem_layers": [7]}, "^mem_layers"),
        ({"mem_dtype": "int8"}, "^mem_dtype"),
        ({"attention_bias": True}, "^attention_bias True"),
        ({"weight_dtype": "int8"}, "^weight_dtype 'int8'"),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        LongLlamaForCausalLM(LongLlamaConfig(num_hidden_layers=2, **wrong))


# ---------------------------------------------------------------------------------------------------------- Program


@pytest.fixture
def run(monkeypatch, capsys):
    """run(program, *flags): the exit status of a program, and what it wrote."""

    def run(program, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        status = 0
        try:
            program.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_the_program_writes_what_generate_writes_and_finds_a_key_in_memory(run, tmp_path):
    book = hide_key((TINY / "book.txt").read_text(encoding="utf-8")[:12000], at=3000)
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    flags = ("--prompt-file", tmp_path / "book.txt", "--max-new-tokens", "12", "--temperature", "0")
    status, out, err = run(program, *flags)
    assert (status, out) == run(generate, *flags)[:2] and "71428" in out and err == ""


def test_a_seed_draws_the_same_text_every_time(run):
    flags = ("--prompt", "The sea", "--max-new-tokens", "20", "--seed")
    texts = [run(program, *flags, seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_missing_transformers_is_one_line_that_names_the_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(program.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and 'pip install "transformers>=5"' in err
    with pytest.raises(ImportError):
        runpy.run_path(program.__file__)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--model", "nowhere"], "nowhere"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--seed", "1"], "--prompt"),
    ],
)
def test_mistakes_in_flags_are_one_line_and_exit_status_2(flags, named, run):
    status, out, err = run(program, *flags)
    assert status == 2 and out == "" and err.count("\n") == 1 and named in err


def test_a_folder_whose_weights_do_not_fit_is_one_line(folder, run, tmp_path):
    (folder / "tokenizer.model").write_bytes((TESTDATA / "prose.model").read_bytes())
    status, out, err = run(program, "--model", folder, "--prompt", "x")
    assert status == 2 and out == "" and err.count("\n") == 1 and "do not belong together" in err
    (tmp_path / "cut").mkdir()
    for path in TINY.iterdir():
        data = path.read_bytes()
        (tmp_path / "cut" / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    status, out, err = run(program, "--model", tmp_path / "cut", "--prompt", "x")
    assert status == 2 and out == "" and err.count("\n") == 1 and "broken or cut short" in err
