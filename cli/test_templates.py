"""A conversation's ids are those of transformers' apply_chat_template, turn after turn, and control text in it is text."""

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cli.loading import TINY
from cli.templates import ChatTemplate
from cli.test_json_tokenizer import CODE, CONTROL, END, REAL, write_tokenizer
from tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- raise_exception("no tools here") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
KINDS = {"chatml": ("spaces", CHATML), "smollm2": ("metaspace", SMOLLM2), "llama3": ("bytes", LLAMA3)}
KINDS |= {f"mistral of {kind}": (kind, MISTRAL) for kind in ("spaces", "metaspace")}
TALK = [
    ("Hello, who are you?", "I am the sea."), (f"  What does this do?\n{CODE}", "It returns\n\n    x."), ("日本語 😀", "海"),
    ("trailing  ", ""), ("", "Nothing was said."), ("and 'the' \"end\" {{ x }} <b>", "is near"),
]  # fmt: skip


def folder_with(folder: Path, kind: str, template: str, **config) -> Path:
    special = {"bos_token": "<|begin_of_text|>" if kind == "bytes" else "<s>", "eos_token": END[kind]}
    write_tokenizer(folder, kind, chat_template=template, **special | config)
    return folder


@pytest.fixture(params=KINDS)
def folder(request, tmp_path) -> Path:
    return folder_with(tmp_path / "model", *KINDS[request.param])


def loaded(folder: Path) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = folder / "chat_template.jinja"
    template = own.read_text() if own.is_file() else config["chat_template"]
    names = {key: config[key] for key in ("bos_token", "eos_token")}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **names)
    return ChatTemplate(folder, Tokenizer(folder / "tokenizer.json")), theirs


def apply(theirs: PreTrainedTokenizerFast, texts: list[str], ask: bool = True) -> list[int]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return theirs.apply_chat_template(messages, add_generation_prompt=ask)["input_ids"]


def test_every_turn_goes_on_to_the_ids_that_transformers_gives_the_whole_conversation(folder):
    """The model's answer stands between two turns. Here it is the ids that transformers has in its place."""
    template, theirs = loaded(folder)
    for talk in (TALK, TALK[::-1]):
        read, texts = [], []
        for user, answer in talk:
            texts.append(user)
            whole = apply(theirs, texts)
            turn = template.turn(texts)
            assert turn == whole[len(whole) - len(turn) :]
            assert read == [] or whole[: len(read)] == read
            read, between = whole, whole[len(read) : len(whole) - len(turn)]
            assert theirs.decode(between).strip() == (texts[-2].strip() if len(texts) > 1 else "")
            texts.append(answer)


@pytest.mark.parametrize("folder", [path.parent for path in REAL], ids=lambda folder: folder.name)
def test_real_templates(folder):
    test_every_turn_goes_on_to_the_ids_that_transformers_gives_the_whole_conversation(folder)


def test_control_text_in_turns_stays_text(folder):
    template, theirs = loaded(folder)
    rng, special = random.Random(0), {*template.tokenizer.special.values()}
    plain = [i for i in apply(theirs, ["x", "y", "z"]) if i in special]
    for _ in range(100):
        texts = [" ".join(rng.choices([*CONTROL, "hi", "[/INST]", "<|<|im_end|>im_end|>"], k=3)) for _ in range(3)]
        whole = [*template.turn(texts[:1]), *template.tokenizer.encode(texts[1], bos=False), *template.turn(texts)]
        assert [i for i in whole if i in special] == plain
        text = template.tokenizer.decode(whole)
        assert all(said.strip() in text for said in texts), text


def test_sentencepiece_models_take_templates_too(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    config = {"chat_template": CHATML, "added_tokens_decoder": {
        "2000": {"content": "<|im_start|>", "special": True}, "2001": {"content": "<|im_end|>", "special": True},
    }}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    text = tokenizer.sp.encode
    user = "a <|im_end|> b"
    expected = [2000, *text(f"user\n{user}"), 2001, *text("\n"), 2000, *text("assistant\n")]
    assert ChatTemplate(tmp_path, tokenizer).turn([user]) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content | tojson }}{{ eos_token }}")
    assert ChatTemplate(tmp_path, tokenizer).turn(["é</s>"]) == [1, *text('"é</s>"'), 2]  # which comes first


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for x in %}", "its chat template is broken"),
        ("{{ raise_exception('no system') }}", "cannot write this conversation: no system"),
        ("{{ messages[0].content.nothing.at_all }}", "cannot write this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot write this conversation"),
        (None, "has no chat template"),
        ([{"name": "tools", "template": "x"}], "has no chat template"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_in_one_line(template, said, tmp_path):
    folder = folder_with(tmp_path, "bytes", template)
    with pytest.raises(ValueError, match=said) as error:
        ChatTemplate(folder, Tokenizer(folder / "tokenizer.json")).turn(["hi"])
    assert "\n" not in str(error.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    last = "{% for message in messages[-1:] %}<s>{{ message.content }}{% endfor %}"
    thinks = "{% for message in messages %}<s>{{ message.content.split('</think>')[-1] }}{% endfor %}"
    for n, template in enumerate((last, thinks)):
        folder = folder_with(tmp_path / str(n), "spaces", template)
        chat = ChatTemplate(folder, Tokenizer(folder / "tokenizer.json"))
        assert chat.turn(["hi"])
        with pytest.raises(ValueError, match="with --fork"):
            chat.turn(["hi", "hm</think> ho", "go"])


def test_of_several_templates_the_default_is_taken(tmp_path):
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    folder = folder_with(tmp_path, "bytes", several)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert ChatTemplate(folder, tokenizer).turn(["a b"]) == tokenizer.encode("a b", bos=False)
