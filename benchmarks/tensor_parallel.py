"""A target's forward pass by transformers' tensor parallelism: the peer of `target.py --devices N`.

    torchrun --nproc-per-node=2 benchmarks/tensor_parallel.py --out DIR --shape llama-70b --size 4x2048 [--compiled]
    torchrun --nproc-per-node=2 benchmarks/tensor_parallel.py --out DIR --device cpu --shape small --size 1x64     a try

Random weights in bf16. It runs the decoder and the head on all rows, a chunk at a time, and keeps nothing: no
layers are captured and no logits are read, so it does less than `target.py` does. Each process has one device.
Figures go to the screen and to DIR/tensor_parallel.json.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import Results, arguments_of, matrix_ceiling, measure, size_of
from shapes import SHAPES
from target_lab.work import flops_per_token, full_batch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging


def sharded_model(shape: str) -> PreTrainedModel:
    """Drawn on its devices, each weight in parts. Starts the process group."""
    logging.set_verbosity_error()
    config = AutoConfig.for_model(**{"bos_token_id": None, "eos_token_id": None, **SHAPES[shape]})
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    # A checkpoint without tensors: transformers draws each where it belongs.
    return kind.from_pretrained(
        None,
        config=config,
        state_dict={},
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        distributed_config=DistributedConfig(tp_plan="auto"),
    ).eval()


def main() -> None:
    options = parse_options()
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"]) if options.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = sharded_model(options.shape)
    if options.compiled:
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    batch, length = size_of(options.size)
    ids = full_batch(batch, length, model.config.vocab_size, 1.0, device).input_ids

    @torch.inference_mode()
    def run() -> None:
        hidden_NH = model.model(input_ids=ids, use_cache=False)[0].flatten(0, 1)
        for chunk in hidden_NH.split(options.chunk_rows):
            model.lm_head(chunk)

    run()
    first = dist.get_rank() == 0
    results = Results(options.out / "tensor_parallel.json" if first else None, device)
    ceiling = matrix_ceiling(device, size=8192 if device.type == "cuda" else 512)
    # DTensors count as whole weights.
    flops = flops_per_token(model, length, 1.0) / dist.get_world_size()
    figures = measure(run, batch * length, flops, ceiling, slow=True, device=device)
    if first:
        name = {"shape": options.shape, "size": options.size, "compiled": options.compiled}
        results.add(**name, system="tensor_parallel", devices=dist.get_world_size(), **figures)
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="llama-70b", choices=SHAPES)
    parser.add_argument("--size", default="4x2048")
    parser.add_argument("--chunk-rows", type=int, default=2048)
    parser.add_argument("--compiled", action="store_true", help="decoder layers through torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
