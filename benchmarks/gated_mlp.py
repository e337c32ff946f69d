"""What does it gain to apply an MLP's gate inside its product, while a GPU that is out of power lowers its clock?

    python benchmarks/gated_mlp.py --out DIR [--rows 8192] [--hidden 4096] [--width 14336]

Gate and up of one layer with random weights in bf16: the product alone by cuBLAS, the two products and the gate as a compiled layer has
them, and the kernel of `target.fused_mlp`, each for some seconds, in turns. Says how far the kernel is from the modules' own results.
Figures go to the screen and to DIR/gated_mlp.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from device_measuring import Results, clock_and_power, median_seconds
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.target.gated_kernel import gated_product

_ROUNDS = 3


@torch.compile
def gate(gates: Tensor, ups: Tensor) -> Tensor:
    return F.silu(gates) * ups


def ways(hidden_NH: Tensor, weight_2IH: Tensor) -> dict[str, Callable[[], Tensor]]:
    both_IH = weight_2IH.flatten(0, 1)
    return {
        "one product without the gate": lambda: F.linear(hidden_NH, both_IH),
        "two products and a compiled gate": lambda: gate(
            *(F.linear(hidden_NH, weight) for weight in weight_2IH)
        ),
        "gate inside the product": lambda: gated_product(hidden_NH, weight_2IH),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument(
        "--repeats", type=int, default=500, help="of each way in a round: long enough to heat the GPU"
    )
    options = parser.parse_args()
    device = torch.device("cuda")
    results = Results(options.out / "gated_mlp.json", device)
    torch.manual_seed(0)
    hidden_NH = torch.randn(options.rows, options.hidden, device=device, dtype=torch.bfloat16)
    # The spread of transformers' random weights.
    weight_2IH = 0.02 * torch.randn(2, options.width, options.hidden, device=device, dtype=torch.bfloat16)
    flops = 4 * options.rows * options.hidden * options.width
    gates, ups = (F.linear(hidden_NH, weight) for weight in weight_2IH)
    differ = gated_product(hidden_NH, weight_2IH) != F.silu(gates) * ups
    results.add(
        shape=f"{options.rows}x{options.hidden}x{options.width}",
        share_of_elements_that_differ=float(differ.float().mean()),
    )
    del gates, ups, differ
    for number in range(_ROUNDS):
        for way, run in ways(hidden_NH, weight_2IH).items():
            seconds = median_seconds(
                run, repeats=options.repeats, warmups=options.repeats // 4, device=device
            )
            run()
            figures = clock_and_power(device)
            results.add(
                round=number + 1,
                way=way,
                milliseconds=1e3 * seconds,
                teraflops=flops / seconds / 1e12,
                **figures,
            )


if __name__ == "__main__":
    main()
