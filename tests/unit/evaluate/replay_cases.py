"""Tiny targets of several families, drafts that are sometimes right, and prompts."""

from collections import Counter

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.supervision import VocabMapping

VOCAB, CONTEXT = 12, 96
AUX_LAYERS = (1, 2, 3)
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "bloom": {"n_layer": 6, "n_head": 4},
}
FORMS = {
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "two_layers": {"num_layers": 2, "norm_output": True},
    "window": {"sliding_window": 6},
    "window_shorter_than_the_guesses": {"sliding_window": 3, "num_layers": 2},
}


def tiny_target(model_type, seed):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,
    }
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **{**sizes, **tokens, **FAMILIES[model_type]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def tiny_draft(model, seed, texts, **form):
    """A draft of the texts' three most frequent tokens, so that chance alone makes some guesses right."""
    frequent = Counter(token for text in texts for token in text.token_ids).most_common(3)
    mapping = VocabMapping.from_token_ids(torch.tensor([token for token, _ in frequent]), VOCAB)
    config = Eagle3DraftConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        draft_vocab_size=len(mapping),
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=CONTEXT,
        **form,
    )
    draft = Eagle3Draft(config, model.get_input_embeddings().weight)
    draft.initialise(seed)
    sharpen_attention(draft)
    return draft, mapping


def sharpen_attention(draft):
    """Guesses hang on what the draft attends to, so that a wrong slot in its cache changes them."""
    for name, weight in draft.named_parameters():
        if weight.requires_grad and "norm" not in name and name != "fc.weight":
            weight.data.mul_(60 if "o_proj" in name else 15)


def random_prompts(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
