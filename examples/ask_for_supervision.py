"""Asks the targets of a registry to supervise one batch of random tokens."""

import argparse

import eagle_rpc
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", default="127.0.0.1:29711", help="HOST:PORT as given to serve_target.py")
    parser.add_argument("--token-file", default="~/.eagle_rpc/token", help="a copy of the registry's")
    given = parser.parse_args()

    rpc = eagle_rpc.RpcConfig(registry=given.registry, token_file=given.token_file)
    with eagle_rpc.connect(eagle_rpc.RunConfig(name="example"), rpc=rpc) as target:
        info = target.model_info()
        print(f"{info.architecture}, {info.vocab_size} tokens, layers {info.aux_layer_ids} captured")
        # The draft can emit the first half of the vocabulary.
        target.open_session(
            eagle_rpc.VocabMapping.from_token_ids(torch.arange(info.vocab_size // 2), info.vocab_size)
        )
        ids_BT = torch.randint(info.vocab_size, (2, 16))
        mask_BT = torch.ones_like(ids_BT)
        batch = target.generate_batch(ids_BT, attention_mask=mask_BT, loss_mask=mask_BT)
        for name in ("aux_hidden_states", "target_probs", "position_mask"):
            tensor = getattr(batch, name)
            print(f"{name:<17} {list(tensor.shape)} {tensor.dtype}")


if __name__ == "__main__":
    main()
