"""What a folder's files say of the ids that end a text, held against the tokenizer beside them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cli.loading import TINY, load
from cli.test_tokenizer import special_tokenizer
from tokenizer import Tokenizer

CPU = torch.device("cpu")


def folder_with(folder: Path, tokenizer: Path | None = None, **files) -> Path:
    """The tiny model with other settings: files are config, generation_config, ..., as far as they are given."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("book.txt"))
    config = json.loads((TINY / "config.json").read_text()) | files.pop("config", {})
    for name, raw in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(raw))
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


ADDED = {"added_tokens_decoder": {
    "0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True},
    "700": {"content": "x", "special": False}, "900": {"content": "<|im_end|>", "special": True},
}}  # fmt: skip


@pytest.mark.parametrize(
    "files, ends",
    [
        ({"config": {"eos_token_id": 2}}, 2),
        ({"config": {"eos_token_id": None}}, 2),
        ({"config": {"eos_token_id": [2]}}, 2),
        ({"config": {"eos_token_id": 9}, "generation_config": {"eos_token_id": 2}}, 2),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": None}}, 2),
        ({"config": {"eos_token_id": 2}, "generation_config": {}}, 2),
        (
            {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [2, 900]}, "tokenizer_config": ADDED},
            (2, 900),
        ),
        ({"config": {"eos_token_id": [900, 2]}, "added_tokens": {"<|im_end|>": 900}}, (900, 2)),
    ],
)
def test_generation_config_says_what_ends_a_text_or_else_config(files, ends, tmp_path, capsys):
    model, _ = load(folder_with(tmp_path / "m", **files), CPU)
    assert model.config.eos_token_id == ends and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "files, said, ends",
    [
        ({"config": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}}, "1", 2),  # early conversions of LLaMA
        ({"config": {"eos_token_id": 700}}, "700", 2),
        ({"config": {"eos_token_id": [2, 2048]}}, "2, 2048", 2),
        ({"config": {"eos_token_id": -1}}, "-1", 2),
        ({"generation_config": {"eos_token_id": [32000, 2]}}, "32000, 2", 2),
        ({"config": {"eos_token_id": 700}, "tokenizer_config": 7}, "700", 2),
        ({"config": {"eos_token_id": 700}, "tokenizer_config": {"added_tokens_decoder": 700}}, "700", 2),
        ({"config": {"eos_token_id": 700}, "tokenizer_config": {"added_tokens_decoder": {"700": True}}}, "700", 2),
        ({"config": {"eos_token_id": 700}, "added_tokens": {"x": [700], "y": "7e2"}}, "700", 2),
        ({"config": {"eos_token_id": [700, 1]}}, "700, 1", 2),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 0}}, "0", 2),
        ({"generation_config": {"eos_token_id": [2, 700]}, "tokenizer_config": ADDED}, "2, 700", 2),
    ],
)  # fmt: skip
def test_ids_that_end_no_text_of_the_tokenizer_give_way_to_those_that_do_with_a_warning(
    files, said, ends, tmp_path, capsys
):
    model, _ = load(folder_with(tmp_path / "m", **files), CPU)
    err = capsys.readouterr().err
    assert model.config.eos_token_id == ends and model.config.bos_token_id == 1
    assert (
        f"eos_token_id {said} ends no text of tokenizer.model: it ends at {ends} instead" in err
        and err.count("\n") == 1
    )


def test_ids_of_another_tokenizer_are_its_own(tmp_path, capsys):
    path = special_tokenizer(
        tmp_path / "t", bos_id=4, eos_id=5, unk_id=0, control_symbols=["<a>", "<b>"], vocab_size=12
    )
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (4, 5)
    model, _ = load(folder_with(tmp_path / "m", path, config={"eos_token_id": 7}), CPU)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (4, 5)
    assert "7 ends no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, named",
    [
        ({"config": {"eos_token_id": []}}, "config.json: eos_token_id"),
        ({"config": {"eos_token_id": [2, "3"]}}, "config.json: eos_token_id"),
        ({"generation_config": {"eos_token_id": 2.0}}, "generation_config.json: eos_token_id"),
        ({"generation_config": [2]}, "generation_config.json is broken: it is no JSON object"),
    ],
)
def test_ids_that_are_none_of_the_model_are_refused_by_the_file_that_has_them(files, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        load(folder_with(tmp_path / "m", **files), CPU)


def test_a_window_and_layers_with_a_memory_may_be_named_and_what_was_not_trained_is_warned_of(capsys):
    model, _ = load(TINY, CPU, mem_layers=[1, 3], max_position_embeddings=64)
    config = model.config
    assert (config.mem_layers, config.max_position_embeddings, config.last_context_length) == ((1, 3), 64, 32)
    assert "warning: layer 1 was not trained with a memory" in capsys.readouterr().err
    model, _ = load(TINY, CPU, mem_layers=[3], max_position_embeddings=64, last_context_length=50, keep_local=None)
    assert model.config.last_context_length == 50 and capsys.readouterr().err == ""
    model, _ = load(TINY, CPU, max_position_embeddings=256)
    assert model.config == load(TINY, CPU)[0].config
    with pytest.raises(ValueError, match="--window 257 is larger than the model's own, 256"):
        load(TINY, CPU, max_position_embeddings=257)
