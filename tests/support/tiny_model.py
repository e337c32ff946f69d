"""A tiny chat model on disk, with weights, tokenizer and template, and prompts for it."""

import json
from pathlib import Path

import torch
from support.tiny_tokenizer import make_tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# Enough layers for the default captured ones, [1, 3, 4].
_LAYERS = 8


def save_tiny_model(directory: Path) -> Path:
    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_prompts(path: Path, count: int) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"What comes after {number}?"}]} for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
