"""Chat templates in the forms that model families use, byte for byte as transformers renders them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer

from moec.runtime.tokenizer import Tokenizer

FORMS = {
    # Tokens around each turn, a system prompt before them all, thoughts cut from earlier answers (DeepSeek).
    "deepseek": """{%- set ns = namespace(system='', first=true) -%}
{%- for m in messages if m['role'] == 'system' -%}
  {%- set ns.system = ns.system + ('' if ns.first else '\n\n') + m['content'] -%}{%- set ns.first = false -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{ '<|User|>' + m.content }}
  {%- elif m.role == 'assistant' and m.tool_calls is not defined -%}
    {{ '<|Assistant|>' + (m.content.split('</think>')[-1] if '</think>' in m.content else m.content) + eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|>' + ('<think>' if thinking is defined and thinking else '</think>') }}
{%- endif -%}""",
    # ChatML with a look backwards for the last question, and an empty thought on request (Qwen).
    "qwen": """{%- if tools %}{{- '<|im_start|>system\n# Tools' + (tools | tojson) }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for m in messages[::-1] %}
  {%- set at = (messages | length - 1) - loop.index0 %}
  {%- if ns.looking and m.role == 'user' and m.content is string and not (m.content.startswith('<tool')) %}
    {%- set ns.looking = false %}{%- set ns.last = at %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
  {%- elif m.role == 'assistant' %}
    {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
    {%- if loop.index0 > ns.last and thought %}
      {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + m.content.lstrip('\n') }}
    {%- else %}{{- '<|im_start|>assistant\n' + m.content }}{%- endif %}
    {{- '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
""",
    # Headers, dates, a system turn even without a prompt, `tools` compared with none (Llama 3).
    "llama": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set opening = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\n\n' + opening + '<|eot_id|>' }}
{%- for m in messages %}
    {%- if not (m.role == 'ipython' or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""",
    # Turns must alternate; the system prompt stands within the last question (Mistral).
    "mistral": """{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for m in turns %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns: user, assistant, user, ...') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{% generation %}{{- ' ' + m.content | trim + eos_token }}{% endgeneration %}
    {%- else %}{% continue %}{%- endif %}
{%- endfor %}
""",
    # Channels, macros and settings of the reasoning (gpt-oss).
    "harmony": """{%- macro about(effort) -%}
Reasoning: {{ effort }}
{% for channel in ['analysis', 'final'] %}{{ loop.index }}. {{ channel | upper }}{{ ', ' if not loop.last }}{% endfor %}
{%- endmacro -%}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif -%}
<|start|>system<|message|>{{ about(reasoning_effort) }}<|end|>
{%- if messages[0].role in ['developer', 'system'] -%}
    <|start|>developer<|message|># Instructions\n\n{{ messages[0].content }}<|end|>
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
    {%- if m.role == 'assistant' -%}
        {%- if 'thinking' in m and not loop.last -%}
            <|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
        {%- endif -%}
        <|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
    {%- else -%}<|start|>{{ m.role }}<|message|>{{ m.content | tojson(indent=1, separators=(',', ':')) }}<|end|>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    # What sentence-pair models name, and fields that only some messages have.
    "named": """{{ sep_token }}{{ cls_token }}{{ pad_token }}{{ mask_token }}{{ unk_token is defined }}
{%- for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}]{{ m.content | tojson(sort_keys=true) }}
{% endfor %}{{ documents is none }}{{ dict(a=1).items() | list | length }}""",
}
USER = {"role": "user", "content": "  Grüße <b>& 世界</b> 🦜\n"}
SYSTEM = {"role": "system", "content": "Answer 'briefly'.\n"}
ANSWER = {
    "role": "assistant",
    "content": "<think>hm</think>\nYes. ",
    "reasoning_content": "\nbecause",
    "tool_calls": None,
}
TALKS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, {"role": "user", "content": "<eos> again <s>"}],
    [SYSTEM, USER, ANSWER, {"role": "user", "content": "", "name": "eva"}],
    [SYSTEM, USER, {"role": "assistant", "content": "a", "thinking": "t"}],
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "thinking": True, "reasoning_effort": "high", "date_string": "1 May 2026"},
]


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, toy: Path, tmp_path: Path) -> Path:
    """A tokenizer's folder with one of the forms."""
    shutil.copytree(toy / "tokenizer", tmp_path, dirs_exist_ok=True)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "<eos>", "special": True, "__type": "AddedToken"}}
    fast = Fast.from_file(str(tmp_path / "tokenizer.json"))
    fast.add_special_tokens(["<s>", "<|User|>", "<|im_start|>", "<|eot_id|>", "<|start|>", "[CLS]", "[SEP]"])
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "pad_token": "<eos>", "cls_token": "[CLS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": FORMS[request.param]}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"sep_token": "[SEP]", "bos_token": "<s>"}))
    return tmp_path


@pytest.mark.parametrize("settings", SETTINGS)
def test_conversations_equal_those_of_transformers(folder: Path, settings: dict[str, Any]) -> None:
    ours, theirs = Tokenizer(folder, "m.moec"), AutoTokenizer.from_pretrained(folder)
    for talk in TALKS:
        expected = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False, **settings)
        assert ours.render_chat(talk, **settings) == expected
        ids = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False, **settings)
        assert ours.encode_messages(talk, **settings) == ids


def test_prompts_with_special_tokens(folder: Path) -> None:
    ours, theirs = Tokenizer(folder, "m.moec"), AutoTokenizer.from_pretrained(folder)
    for text in ("a<eos>b", "<eos>", "<s> x <unknown|>", "", "  <eos>  <eos>"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_settings_of_a_batch_do_not_cut_a_prompt(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "a",
    }  # fmt: skip
    plain = Tokenizer(folder, "m.moec").encode("hello there")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer(folder, "m.moec").encode("hello there") == plain
