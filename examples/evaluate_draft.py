"""Counts what decoding of random prompts accepts of a draft, as train_on_own_batches.py exports it."""

import argparse

import eagle_rpc
import torch

TINY = {
    **{"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 8},
    **{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("draft", help="directory of an exported draft")
    parser.add_argument("--model", help="the draft's target; default: a tiny model with random weights")
    parser.add_argument("--prompts", type=int, default=4, help="number of prompts")
    given = parser.parse_args()

    draft = eagle_rpc.load_draft(given.draft)
    target = eagle_rpc.TargetConfig(model=given.model) if given.model else eagle_rpc.TargetConfig(random=TINY)
    prompts = torch.randint(draft.config.vocab_size, (given.prompts, 8)).tolist()  # or of your tokenizer
    result = eagle_rpc.evaluate_draft(
        target, draft, prompts, settings=eagle_rpc.EvaluateConfig(max_new_tokens=24)
    )
    print(result.summary(), end="")


if __name__ == "__main__":
    main()
