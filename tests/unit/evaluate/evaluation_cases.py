"""A tiny target, drafts for it, and prompts."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.serving.export import export_draft, load_export
from eagle_rpc.supervision import TargetShape, VocabMapping

AUX_LAYERS = (0, 2, 5)
PROMPTS = [[3, 7, 1], [2, 2, 5, 8], [6]]


def tiny_model(vocab_size=16):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_export(model, directory, seed=0):
    config = Eagle3DraftConfig.from_target(TargetShape.of(model.config), draft_vocab_size=8)
    embedding = model.get_input_embeddings().weight
    draft = Eagle3Draft(config, embedding)
    draft.initialise(seed=seed)
    export_draft(
        draft.state_dict(),
        config,
        VocabMapping.from_token_ids(torch.arange(0, 16, 2), 16),
        directory,
        dtype=torch.float32,
        aux_layer_ids=AUX_LAYERS,
        target_embedding=embedding,
        bos_token_id=None,
        eos_token_id=None,
    )
    return load_export(directory)
