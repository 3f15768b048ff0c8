"""LongLLaMA as a model of transformers: its Auto classes load our folders, and its `generate` uses memory through the windows.

    pip install "transformers>=5"
    python examples/transformers_model.py                              # a pass key, 180 windows back
    python examples/transformers_model.py --prompt "The sea" --max-new-tokens 50 --seed 1

To import this file is enough for your own programs:

  import examples.transformers_model
  model = AutoModelForCausalLM.from_pretrained("tiny", mem_dtype="float32")
  ids = model.generate(input_ids, max_new_tokens=100, do_sample=True)

All that is computed is `FastLlama`'s; sampling, loading and saving are transformers'. Beams and assisted decoding are refused by
name: they take tokens back, and memory keeps what it has read.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli.ending import ending_well, say

import torch
from torch import Tensor

from cli.completions import Completion
from cli.flags import SAMPLING_FLAGS, add_prompt_flags, add_sampling_flags, demonstration, given, number, parser_for
from cli.loading import TINY, check_vocabulary, encode_prompt, read_tokenizer, tokenizer_in
from cli.texts import read_prompt
from fast import FastConfig, FastLlama
from fast.files import find_weights
from fast.folder import check_folder
from fast.model import check_weights, untied
from longllama import Cache, require

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, LlamaConfig, PreTrainedModel
    from transformers.cache_utils import Cache as CacheOfTransformers
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
    from transformers.generation import GenerationMode
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import logging
    from transformers.utils.generic import can_return_tuple
except ImportError:
    if __name__ == "__main__":
        parser_for(__doc__).error('this example needs transformers 5: pip install "transformers>=5"')
    raise


class LongLlamaConfig(LlamaConfig):
    """LLaMA's in transformers, and what `FastConfig` has for memory."""

    model_type = "longllama"

    last_context_length: int = FastConfig.last_context_length
    mem_layers: list[int] | tuple[int, ...] = FastConfig.mem_layers
    mem_positionals: bool = FastConfig.mem_positionals
    mem_dtype: str = FastConfig.mem_dtype
    mem_attention_grouping: list[int] | tuple[int, int] | None = FastConfig.mem_attention_grouping
    keep_local: int = FastConfig.keep_local
    mem_topk: int | None = FastConfig.mem_topk
    mem_device: str | None = FastConfig.mem_device

    def checked(self) -> FastConfig:
        """The same as ours, by way of a config.json: so all is checked, and what is not computed here is refused by name."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            self.to_json_file(path, use_diff=False)
            try:
                config = FastConfig.from_json(path)
            except ValueError as error:  # which begins with a file that nobody knows
                raise ValueError(str(error).removeprefix(f"{path}: ")) from None
        rounded = f"weight_dtype {config.weight_dtype!r} is not what transformers reads"
        require(
            config.weight_dtype is None, f"{rounded}: convert.py --dtype bfloat16 makes whole weights of rounded ones"
        )
        return config


class MemoryCache(CacheOfTransformers):
    """A cache of ours where transformers wants one of its own. copy.deepcopy makes a fork: what is remembered is shared."""

    is_linear, is_croppable = [False], False  # it counts tokens, and takes none back

    def __init__(self, cache: Cache):
        super().__init__(layers=[])
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.memory_length + self.cache.local_length

    def __deepcopy__(self, memo: dict) -> "MemoryCache":
        return MemoryCache(self.cache.fork())

    def refuse(self, *_):
        raise NotImplementedError("LongLLaMA's memory takes no token back, and no row in another's place")

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = refuse


class LongLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    """`FastLlama`, which is its `model`, where transformers wants one of its own."""

    config_class, base_model_prefix = LongLlamaConfig, "model"
    _tied_weights_keys = {"model.lm_head.weight": "model.embed_tokens.weight"}
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

    def __init__(self, config: LongLlamaConfig):
        super().__init__(config)
        config.model_type = LongLlamaConfig.model_type  # by which `NAMES` are found; a LLaMA's folder says llama
        self.model = FastLlama(config.checked())
        self.post_init()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.model.lm_head

    def set_output_embeddings(self, head: torch.nn.Linear):
        self.model.lm_head = head

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: MemoryCache | None = None,
        cache: MemoryCache | None = None, labels: Tensor | None = None, use_cache=True, logits_to_keep=0,
        last_context_length: int | None = None,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Reads input_ids (B, T) after what past_key_values holds, which is called cache since transformers 5.24, and changes it.

        attention_mask: of the new tokens, or of all; 0 is padding, on the left. labels: gives the loss, and no logits, of which
        few exist at a time then. The others are as in `FastLlama`."""
        past = past_key_values if cache is None else cache
        past = MemoryCache(self.model.new_cache()) if past is None else past
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        out, _ = self.model(input_ids, past.cache, mask, last_context_length, logits_to_keep, labels)
        loss, logits = (None, out) if labels is None else (out, None)
        return CausalLMOutputWithPast(loss, logits, past if use_cache else None)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # Early versions of transformers 5 say where the tokens stand, which the cache knows.
        return {name: x for name, x in inputs.items() if x is not None and name != "cache_position"}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # so that `generate` leaves it to `forward` to make one


class Fuse(Concatenate):
    """q, k and v become one matrix."""

    @property
    def reverse_op(self) -> ConversionOps:
        return Unfuse()


class Unfuse(ConversionOps):
    """And three again, of which two are smaller where query heads share key heads."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], config, **_) -> dict:
        [[fused]] = input_dict.values()
        kv = config.num_key_value_heads * config.head_dim
        return dict(zip(target_patterns, fused.split((len(fused) - 2 * kv, kv, kv))))


NAMES = [  # of weights, in files and here
    WeightRenaming("^lm_head", "model.lm_head"),
    WeightRenaming("self_attn.o_proj", "o_proj"),
    WeightRenaming("mlp.down_proj", "down_proj"),
    WeightConverter(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "qkv_proj", operations=[Fuse()]),
    WeightConverter(["mlp.gate_proj", "mlp.up_proj"], "gate_up_proj", operations=[Concatenate()]),
]
AutoConfig.register(LongLlamaConfig.model_type, LongLlamaConfig)
AutoModelForCausalLM.register(LongLlamaConfig, LongLlamaForCausalLM)
register_checkpoint_conversion_mapping(LongLlamaConfig.model_type, NAMES)


# ---------------------------------------------------------------------------------------------------------- Program


def run(args: argparse.Namespace):
    check_folder(args.model)
    prompt, tokenizer = read_prompt(args), read_tokenizer(tokenizer_in(args.model))
    config, weights = FastConfig.from_json(args.model / "config.json"), find_weights(args.model)
    check_vocabulary(args.model, tokenizer, config)
    check_weights(untied(config, weights), weights, args.model)  # transformers takes many lines to say what is wrong
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    settings = {name: value for name, value in given(args, SAMPLING_FLAGS).items() if value is not None}
    if "seed" in settings:
        torch.manual_seed(settings.pop("seed"))
    settings = {"do_sample": args.temperature > 0, "top_k": 0} | settings  # 0: all, where transformers would take 50
    made = model.generate(ids, max_new_tokens=args.max_new_tokens, **settings)
    text = Completion(tokenizer, ids[0].tolist(), config.eos_token_id, args.stop)
    say("".join(map(text.feed, made[0, ids.shape[1] :].tolist())) + text.flush() + "\n")


def main():
    parser = parser_for(__doc__)
    add = parser.add_argument
    add_prompt_flags(parser)
    add("--model", type=Path, default=TINY, metavar="DIR", help="default: the tiny model that comes along")
    add("--max-new-tokens", type=number(int, 1), default=100, metavar="N", help="default 100")
    add_sampling_flags(parser)
    with ending_well(parser):
        run(parser.parse_args(sys.argv[1:] or demonstration()))


if __name__ == "__main__":
    main()
