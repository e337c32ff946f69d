"""Trains a draft on batches that this program makes, with the target in the same process, and exports it."""

import argparse

import eagle_rpc
import torch

TINY = {
    **{"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 8},
    **{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="directory for the draft")
    parser.add_argument("--model", help="directory or hub name; default: a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps")
    given = parser.parse_args()

    config = eagle_rpc.TargetConfig(model=given.model) if given.model else eagle_rpc.TargetConfig(random=TINY)
    target = eagle_rpc.load_target(config)
    vocab_size = target.model_info().vocab_size
    ids_NBT = torch.randint(vocab_size, (given.steps, 4, 32))  # your token ids in place of these
    mask_BT = torch.ones(4, 32, dtype=torch.int64)
    masks = {"attention_mask": mask_BT, "loss_mask": mask_BT}
    batches = (eagle_rpc.TokenBatch(input_ids=ids_BT, **masks) for ids_BT in ids_NBT)
    most_frequent_K = ids_NBT.flatten().bincount(minlength=vocab_size).topk(vocab_size // 2).indices
    mapping = eagle_rpc.VocabMapping.from_token_ids(most_frequent_K, vocab_size)
    training = eagle_rpc.DraftTraining(
        target, mapping, target=config, train=eagle_rpc.TrainConfig(max_steps=given.steps)
    )
    for figures in training.steps(batches):
        print(f"{figures.step} loss {figures.loss:.3f} accept length {figures.simulated_accept_length:.2f}")
    print(*training.export(given.output), sep="\n")


if __name__ == "__main__":
    main()
