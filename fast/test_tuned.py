"""Files of tuned memory layers: over their base they are the tuned model, and over nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fast.files import as_weights, find_weights, write_safetensors
from fast.test_model import small_model
from fast.tuned import fingerprint, laid_over, write_tuned


@pytest.fixture
def tuned(tmp_path):
    """A base in float32, and the file of a model whose memory layers differ from it."""
    base, model = small_model(), small_model()
    write_safetensors(tmp_path / "model.safetensors", as_weights(base.hf_tensors()), {})
    for i in model.config.mem_layers:
        torch.nn.init.normal_(model.layers[i].qkv_proj.weight)
    path = tmp_path / "tuned.safetensors"
    write_tuned(path, model, fingerprint(as_weights(base.hf_tensors())))
    return path, model


def test_laid_over_their_base_they_are_the_tuned_model(tuned, tmp_path):
    path, model = tuned
    config, weights = laid_over(path, find_weights(tmp_path), tmp_path)
    assert config == model.config
    assert set(load_file(path)) < weights.keys()
    assert all(torch.equal(read(), model.hf_tensors()[name]) for name, (_, _, read) in weights.items())


def test_a_base_in_which_any_weight_differs_is_refused(tuned, tmp_path):
    base = load_file(tmp_path / "model.safetensors")
    names = ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"]
    for changed in ({name: base[name] + 0.1} for name in names):
        with pytest.raises(ValueError, match="was tuned from other weights than those in there"):
            laid_over(tuned[0], as_weights(base | changed), "there")
    with pytest.raises(ValueError, match="was tuned from other weights"):
        laid_over(tuned[0], as_weights(dict([*base.items()][:1])), "there")
    swapped = {"model.layers.0.self_attn.q_proj.weight": base["model.layers.0.self_attn.q_proj.weight"].flip(0)}
    with pytest.raises(ValueError, match="was tuned from other weights"):  # the same numbers in another order
        laid_over(tuned[0], as_weights(base | swapped), "there")
    rounded = {name: x.to(torch.bfloat16) for name, x in base.items()}  # the same, stored in fewer bits
    assert laid_over(tuned[0], as_weights(rounded), "there")[0] == tuned[1].config


def changed_file(path, to, metadata=None, tensors=None):
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, to, metadata=metadata)
    return to


def test_what_is_no_such_file_is_refused(tuned, tmp_path):
    path, base = tuned[0], find_weights(tmp_path)
    said = {"base": fingerprint(base)}
    config = vars(tuned[1].config) | {"num_hidden_layers": 9}
    for metadata, named in [
        (None, "holds no tuned memory layers"), ({"format": "pt"}, "holds no tuned memory layers"),
        (said | {"config": "{"}, "config"), (said | {"config": "[" * 100_000}, "config"), (said | {"config": "[1]"}, "config"),
        (said | {"config": '{"hidden_sizee": 1}'}, "no config has"), (said | {"config": '{"hidden_size": "x"}'}, "hidden_size"),
        (said | {"config": json.dumps(config)}, "num_hidden_layers|9 layers|differ"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            laid_over(changed_file(path, tmp_path / "changed", metadata), base, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        laid_over(tmp_path / "nowhere", base, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="broken or cut short"):
        laid_over(path, base, tmp_path)
