"""Small chat templates in the published forms of well-known models, and a tokenizer that knows their marks."""

import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_GENERATION = "{% if add_generation_prompt %}{{ GENERATION }}{% endif %}"


@dataclass(frozen=True)
class Family:
    """A template, and the texts that a model of it says after its prompt.

    `answer` and `thinking` have the places {A} and {T}; None: such a chat has to be refused, for `reason`.
    """

    source: str
    end: str  # the stop token
    answer: str | None = "{A}"
    thinking: str | None = None
    calls: str | None = None  # a call of `now`
    system: bool = True
    reason: str = "thought|tools|tool_calls"


def turns(turn: str, generation: str, before: str = "") -> str:
    """A template that renders all turns alike: `turn` is a Jinja expression of `m`."""
    prompt = _GENERATION.replace("GENERATION", repr(generation))
    return f"{before}{{% for m in messages %}}{{{{ {turn} }}}}{{% endfor %}}{prompt}"


_CHATML = turns(r"'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'", "<|im_start|>assistant\n")
_LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_THOUGHT = (
    "{% set c = m.content %}{% set t = m.reasoning_content | default('') %}"
    "{% if not t and '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
)
_CHATML_THINKING = (
    _LAST
    + "{% for m in messages %}{% if m.role == 'assistant' %}"
    + _THOUGHT
    + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last EXTRA %}"
    "{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ GENERATION }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
_GPT_OSS = (
    _LAST + "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.index0 > ns.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_CHATML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FAMILIES = {
    "SmolLM2": Family(_CHATML, "<|im_end|>"),
    "Qwen2.5": Family(
        _CHATML_TOOLS, "<|im_end|>", calls='<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>'
    ),
    "Qwen3": Family(
        _CHATML_THINKING.replace("EXTRA", "").replace("GENERATION", "''"),
        "<|im_end|>",
        thinking="<think>\n{T}\n</think>\n\n{A}",
    ),
    "Qwen3 without thinking": Family(
        _CHATML_THINKING.replace("EXTRA", "").replace("GENERATION", r"'<think>\n\n</think>\n\n'"),
        "<|im_end|>",
    ),
    "Qwen3-Thinking": Family(
        _CHATML_THINKING.replace("EXTRA", "").replace("GENERATION", r"'<think>\n'"),
        "<|im_end|>",
        answer=None,
        thinking="{T}\n</think>\n\n{A}",
    ),
    "StepFun": Family(
        _CHATML_THINKING.replace("EXTRA", "and t").replace("GENERATION", r"'<think>\n'"),
        "<|im_end|>",
        answer=None,
        thinking="{T}\n</think>\n\n{A}",
    ),
    "Llama-3": Family(
        turns(
            r"'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>'",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{{ bos_token }}",
        ),
        "<|eot_id|>",
    ),
    "Llama-3.2": Family(
        turns(
            r"'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>'",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{{ bos_token + 'Today Date: ' + strftime_now('%d %b %Y') + '\n' }}",
        ),
        "<|eot_id|>",
    ),
    "Llama-2": Family(
        "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>>' }}"
        "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<eos>",
        answer=" {A} ",
    ),
    "Mistral-Small": Family(_MISTRAL, "<eos>", calls="[TOOL_CALLS]now[ARGS]{}<eos>"),
    "Gemma-2": Family(_GEMMA, "<end_of_turn>", system=False, reason="System role|thought|tools|tool_calls"),
    "Gemma-4": Family(
        turns(
            r"'<|turn>' + m.role + '\n' + m.content + '<turn|>\n'",
            "<|turn>assistant\n<|channel>thought\n<channel|>",
        ),
        "<turn|>",
    ),
    "Phi-3": Family(turns(r"'<|' + m.role + '|>\n' + m.content + '<|end|>\n'", "<|assistant|>\n"), "<|end|>"),
    "Phi-4": Family(
        turns(
            "'<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>'",
            "<|im_start|>assistant<|im_sep|>",
        ),
        "<|im_end|>",
    ),
    "DeepSeek-R1": Family(_DEEPSEEK_R1, "<eos>", answer=None, thinking="{T}\n</think>\n\n{A}"),
    "DeepSeek-V3.1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% else %}{{ '<|Assistant|></think>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|></think>' }}{% endif %}",
        "<eos>",
    ),
    "gpt-oss": Family(
        _GPT_OSS,
        "<|return|>",
        answer="<|channel|>final<|message|>{A}",
        thinking="<|channel|>analysis<|message|>{T}<|end|><|start|>assistant<|channel|>final<|message|>{A}",
    ),
    "GLM-4": Family(turns(r"'<|' + m.role + '|>\n' + m.content", "<|assistant|>\n"), "<|user|>"),
    "Command-R": Family(
        turns(
            "'<|START_OF_TURN|><|' + m.role + '|>' + m.content + '<|END_OF_TURN|>'",
            "<|START_OF_TURN|><|assistant|>",
            "{{ bos_token }}",
        ),
        "<|END_OF_TURN|>",
    ),
    "Granite": Family(
        turns(
            r"'<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n'",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|end_of_text|>",
    ),
    "Kimi": Family(
        turns(
            "'<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>'",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        "<|im_end|>",
    ),
    "Zephyr": Family(
        turns(r"'<|' + m.role + '|>\n' + m.content + eos_token + '\n'", "<|assistant|>\n"), "<eos>"
    ),
    "OLMo-2": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role != 'assistant' %}{{ '\n' }}{% elif loop.last %}{{ eos_token }}"
        "{% else %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<eos>",
    ),
    "EXAONE": Family(
        turns(r"'[|' + m.role + '|]' + m.content + '[|endofturn|]\n'", "[|assistant|]"), "[|endofturn|]"
    ),
    "Seed-OSS": Family(
        "{% for m in messages %}{{ '<seed:bos>' + m.role + '\n' }}{% if m.reasoning_content %}"
        "{{ '<seed:think>' + m.reasoning_content + '</seed:think>\n' }}{% endif %}"
        "{{ m.content + '<seed:eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<seed:bos>assistant\n' }}{% endif %}",
        "<seed:eos>",
        thinking="<seed:think>{T}</seed:think>\n{A}",
    ),
    "Apriel": Family(
        "{% for m in messages %}{{ '<|begin_' + m.role + '|>\n' }}{% if m.reasoning_content %}"
        "{{ m.reasoning_content + '\n[BEGIN FINAL RESPONSE]\n' }}{% endif %}{{ m.content + '\n<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|begin_assistant|>\nHere are my reasoning steps:\n' }}{% endif %}",
        "<|end|>",
        answer=None,
        thinking="{T}\n[BEGIN FINAL RESPONSE]\n{A}\n",
    ),
    "two ends": Family(
        turns(r"'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|><eos>\n'", "<|im_start|>assistant\n"),
        "<|im_end|>",
    ),
    "markers around the end of a turn": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
}
_MARKS = re.compile(r"<\|?[\w:]+\|?>|\[\|?\w+\|?\]|\[/?[A-Z_]+\]|\]~\w")


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the marks of the template, apart from those of thoughts, are special tokens."""
    marks = {
        mark for mark in _MARKS.findall(family.source) if "think" not in mark and "tool_call" not in mark
    }
    special = ["<bos>", "<eos>", *sorted(marks | {family.end})]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is the capital of France? the sea is deep, and blue."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = family.source
    return fast
