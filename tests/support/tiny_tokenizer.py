"""A small tokenizer that encodes any text and has a chat template."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 300

# The form of SmolLM2's and Qwen's templates, without a default system prompt.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = [
    "what is the capital of France? the capital of France is Paris.",
    "tell me something about the sea. the sea is deep and blue, and there are fish in it.",
    "system user assistant system user assistant",
]


def make_tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens: `<|endoftext|>` (0, pad), `<|im_start|>` (1, bos), `<|im_end|>`
    (2, eos), then text.

    None as `chat_template` leaves it without one.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = chat_template
    return fast


def save_with_tokenizer(model: PreTrainedModel, directory: Path) -> Path:
    """Writes the model and a tiny tokenizer; returns the directory."""
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory
