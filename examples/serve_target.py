"""Serves a target to the trainers that find it in the registry, which this process runs as well."""

import argparse
import logging

import eagle_rpc

TINY = {
    **{"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 8},
    **{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory or hub name; default: a tiny model with random weights")
    parser.add_argument("--registry", default="127.0.0.1:29711", help="HOST:PORT of this host")
    parser.add_argument("--token-file", default="~/.eagle_rpc/token", help="made if it is absent")
    given = parser.parse_args()

    logging.basicConfig(level=logging.INFO)
    target = eagle_rpc.TargetConfig(model=given.model) if given.model else eagle_rpc.TargetConfig(random=TINY)
    with eagle_rpc.serve(
        target, rpc=eagle_rpc.RpcConfig(registry=given.registry, token_file=given.token_file)
    ) as server:
        print("serving; Ctrl-C ends it", flush=True)
        server.wait()


if __name__ == "__main__":
    main()
