"""A tiny random target and random drafts of every form, whose guesses depend on all that they read.

The draft's few tokens are the target's most frequent ones, so that chance alone makes some guesses right.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.evaluate.decoding.greedy import GreedyTarget
from eagle_rpc.evaluate.decoding.speculative import decode_greedily
from eagle_rpc.serving import export_draft
from eagle_rpc.serving.speculators_config import Speculators
from eagle_rpc.supervision import TargetShape, VocabMapping

VOCAB, NUM_PROMPTS, NEW_TOKENS = 16, 16, 96
LIKELY_TOKENS = 4
# Fields of the draft's configuration, and the captured layers.
FORMS = {
    "eagle3": ({}, (1, 2, 4)),
    "eagle3.1": ({"fc_norm": True, "norm_output": True}, (1, 2, 4)),
    "norm_before_fc": ({"norm_before_fc": True, "norm_before_residual": True}, (1, 2, 4)),
    "all_norms": ({"norm_before_fc": True, "fc_norm": True, "norm_output": True}, (1, 2, 4)),
    "one_layer_captured": ({"fc_norm": True}, (3,)),
    "five_layers_captured": ({"fc_norm": True, "norm_output": True}, (0, 1, 2, 3, 4)),
    "three_layers": ({"num_layers": 3, "norm_output": True}, (1, 2, 4)),
    "window": ({"sliding_window": 12}, (1, 2, 4)),
    "two_layers_with_a_window": ({"num_layers": 2, "sliding_window": 16}, (1, 2, 4)),
    "whole_vocabulary": ({"draft_vocab_size": VOCAB}, (1, 2, 4)),
}


def random_target() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 40, (NUM_PROMPTS,), generator=generator).tolist()
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def likely_tokens(model: LlamaForCausalLM) -> VocabMapping:
    target, counts = GreedyTarget(model, (1, 2, 4)), Counter[int]()
    for prompt_ids in random_prompts():
        counts.update(decode_greedily(target, prompt_ids, max_new_tokens=NEW_TOKENS, stop_token_ids=())[0])
    ids = [token for token, _ in counts.most_common(LIKELY_TOKENS)]
    return VocabMapping.from_token_ids(torch.tensor(ids), VOCAB)


def export_random_draft(
    model: LlamaForCausalLM,
    mapping: VocabMapping,
    form: str,
    directory: Path,
    speculators: Speculators | None = None,
) -> None:
    """A draft whose guesses depend on all that it attends to."""
    changes, aux_layer_ids = FORMS[form]
    if changes.get("draft_vocab_size") == VOCAB:
        mapping = VocabMapping.from_token_ids(torch.arange(VOCAB), VOCAB)
    base = Eagle3DraftConfig.from_target(TargetShape.of(model.config), draft_vocab_size=len(mapping))
    config = replace(base, num_aux_layers=len(aux_layer_ids), **changes)
    embedding = model.get_input_embeddings().weight
    draft = Eagle3Draft(config, embedding)
    draft.initialise(2)
    generator = torch.Generator().manual_seed(3)
    for name, weight in draft.named_parameters():
        if weight.requires_grad and weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        elif weight.requires_grad and not name.startswith("fc"):
            weight.data *= 20 if "o_proj" in name else 8
    export_draft(
        {name: weight.detach() for name, weight in draft.state_dict().items()},
        config,
        mapping,
        directory,
        dtype=torch.float32,
        aux_layer_ids=aux_layer_ids,
        target_embedding=embedding,
        bos_token_id=None,
        eos_token_id=None,
        speculators=speculators,
    )
