"""Speed, memory and share of the ceiling of a target that makes supervision.

    python benchmarks/target.py --out DIR [--shapes llama qwen3] [--sizes 4x2048 ...] [--systems plain ...]
    python benchmarks/target.py --out DIR --device cpu --shapes small --sizes 1x64 2x64 --chats 20      a try on a CPU

Weights and tokens are random. `plain` is the reference (`compute_supervision`: full logits, shift, argmax,
gather, fp32 softmax); the others are `supervise` with eager or compiled layers; `fused_rows` reads logits
with a kernel, `fused` also applies the gates of MLPs with one. `served` is the rate of a server in this
process whose queue is never empty: with --devices N as many passes are under way as there are devices, where
`tokens_per_second` is one pass at a time. One process gives the systems and ceilings of one table. With --chats the
same lognormal chats are padded to buckets and packed into rows. With --deliver a trainer process on the same
device takes a target process's supervision over RPC. Figures go to the screen and to DIR/target.json.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Results, arguments_of, matrix_ceiling, measure, median_seconds, size_of
from shapes import SHAPES
from target_lab.delivery import deliver
from target_lab.serving import served_rate
from target_lab.stages import stage_milliseconds
from target_lab.work import (
    chat_lengths,
    devices_of,
    flops_per_token,
    full_batch,
    fused_kernels,
    make_mapping,
    make_model,
    packed,
    padded,
    shape_ceiling,
)

from eagle_rpc.config.choices import CompileMode, Quantization
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftVocabOnDevice,
    TokenBatch,
    VocabMapping,
    compute_supervision,
    supervise,
)
from eagle_rpc.target.model import HFEagle3TargetModel

SYSTEMS = "plain eager eager_fused_rows eager_fused compiled compiled_fused_rows compiled_fused".split()


def bucket_shapes(longest: int) -> list[tuple[int, int]]:
    """As many tokens in each shape: rows of a quarter, half and the whole of the longest."""
    return [(16, longest // 4), (8, longest // 2), (4, longest)]


class Bench:
    """One model and its targets, which share the weights."""

    def __init__(
        self, shape: str, attention: str, options: argparse.Namespace, results: Results, ceiling: float
    ) -> None:
        self.name = {"shape": shape, "attention": attention, "quantization": options.quantization}
        self.name |= {"devices": options.devices}
        self.options, self.results, self.ceiling = options, results, ceiling
        devices = devices_of(options.device, options.devices)
        self.device = devices[-1]
        if self.device.type == "cuda":
            # Events are recorded where supervision is made.
            torch.cuda.set_device(self.device)
        self.model, self.spread = make_model(SHAPES[shape], attention, devices, options.quantization)
        self.mapping: VocabMapping = make_mapping(self.model.config)
        self.vocab = DraftVocabOnDevice.of(self.mapping, self.device)
        self._targets: dict[str, HFEagle3TargetModel] = {}

    def target(self, system: str) -> HFEagle3TargetModel:
        """Made, and compiled for every shape of this run, when it is first asked for."""
        if system not in self._targets:
            target = HFEagle3TargetModel(self.model, spread=self.spread, **fused_kernels([system]))
            if system.startswith("compiled"):
                self._compile(system, target)
            self._targets[system] = target
        return self._targets[system]

    def _compile(self, system: str, target: HFEagle3TargetModel) -> None:
        """For every shape of this run."""
        shapes = bucket_shapes(self.options.longest) if self.options.chats else []
        names = [*self.options.sizes, *(f"{batch}x{length}" for batch, length in shapes)]
        packed, mode = bool(self.options.chats), CompileMode[self.options.compile_mode]
        started = time.perf_counter()
        target.compile(names, packed=packed, mode=mode)
        seconds = time.perf_counter() - started
        self.results.add(**self.name, system=system, compile_seconds=seconds, shapes=len(set(names)))

    def run_of(self, system: str, tokens: TokenBatch, encoding: str, chunk_rows: int) -> Callable[[], Any]:
        target = self.target(system)
        if system == "plain":
            vocab = (self.vocab.selected_token_ids, self.mapping.t2d.to(self.device))
            masks = (tokens.attention_mask, tokens.loss_mask)
            return torch.no_grad()(lambda: compute_supervision(target, *vocab, tokens.input_ids, *masks))
        return lambda: supervise(
            target, tokens, self.vocab, encoding=encoding, rows="loss_mask", chunk_rows=chunk_rows
        )

    def measure_size(self, size: str, share: float, encoding: str, chunk_rows: int, system: str) -> None:
        batch, length = size_of(size)
        num_tokens = batch * length
        first = self.model.get_input_embeddings().weight.device
        tokens = full_batch(batch, length, self.model.config.vocab_size, share, first)
        plain, settings = system == "plain", {"encoding": encoding, "chunk_rows": chunk_rows}
        run = self.run_of(system, tokens, encoding, chunk_rows)
        run()
        flops = flops_per_token(self.model, length, 1.0 if plain else share)
        figures = measure(run, num_tokens, flops, self.ceiling, slow=num_tokens > 4096, device=self.device)
        devices = [weight.device for weight in self.model.parameters()]
        of_shapes = shape_ceiling(self.model, num_tokens, share, chunk_rows, devices)
        figures["shape_ceiling_tokens_per_second"] = of_shapes
        if not plain:
            target = self.target(system)
            spent = stage_milliseconds(target, tokens, self.vocab, **settings)
            figures |= {f"{stage}_ms": milliseconds for stage, milliseconds in spent.items()}
            requests = max(4, 2**17 // num_tokens) if self.device.type == "cuda" else 4
            served = served_rate(
                target, tokens, self.mapping, **settings, requests=requests, device=self.device
            )
            figures["served_tokens_per_second"] = served
            figures["served_share_of_shape_ceiling"] = served / of_shapes
            figures["served_teraflops_a_device"] = served * flops / self.options.devices / 1e12
            figures["served_of_one_pass_at_a_time"] = served / figures["tokens_per_second"]
        name = {**self.name, "size": size, "system": system, "supervised_share": share}
        self.results.add(**name, **({"encoding": "probs"} if plain else settings), **figures)

    def measure_mix(self, system: str) -> None:
        """Real tokens per second of the same chats, padded and packed."""
        longest, vocab_size = self.options.longest, self.model.config.vocab_size
        lengths = chat_lengths(self.options.chats, longest)
        mixes = {
            "padded": padded(lengths, bucket_shapes(longest), vocab_size, self.device),
            "packed": packed(lengths, 4, longest, vocab_size, self.device),
        }
        for kind, batches in mixes.items():
            chunk_rows = self.options.chunk_rows[0]
            runs = [self.run_of(system, tokens, "hidden", chunk_rows) for tokens in batches]
            seconds = median_seconds(
                lambda runs=runs: [run() for run in runs], repeats=3, warmups=1, device=self.device
            )
            slots = sum(tokens.input_ids.numel() for tokens in batches)
            self.results.add(
                **self.name,
                mix=kind,
                system=system,
                chats=len(lengths),
                batches=len(batches),
                real_share=sum(lengths) / slots,
                real_tokens_per_second=sum(lengths) / seconds,
            )


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    results = Results(options.out / "target.json", device)
    ceiling = matrix_ceiling(device, size=8192 if device.type == "cuda" else 512)
    results.add(ceiling_teraflops=ceiling)
    for shape, attention in itertools.product(options.shapes, options.attention):
        measure_model(shape, attention, options, results, ceiling)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for shape, encoding in itertools.product(options.shapes, options.deliver):
        results.add(**deliver(shape, encoding, options))


def measure_model(
    shape: str, attention: str, options: argparse.Namespace, results: Results, ceiling: float
) -> None:
    bench = Bench(shape, attention, options, results, ceiling)
    variants = list(itertools.product(options.supervised, options.encodings, options.chunk_rows))
    for size, variant, system in itertools.product(options.sizes, variants, options.systems):
        # The reference knows one form, probabilities of all rows.
        if system == "plain" and variant != variants[0]:
            continue
        try:
            bench.measure_size(size, *variant, system)
        except (torch.cuda.OutOfMemoryError, EagleRpcError) as error:
            failure = f"{type(error).__name__}: {error}"[:300]
            results.add(**bench.name, size=size, system=system, variant=variant, failed=failure)
    for system in options.systems if options.chats else []:
        if system != "plain":
            bench.measure_mix(system)


def parse_options() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--devices", type=int, default=1, help="over which the layers are spread")
    parser.add_argument("--shapes", nargs="+", default=["llama"], choices=SHAPES)
    parser.add_argument("--sizes", nargs="+", default=["1x2048", "4x2048", "8x2048"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--encodings", nargs="+", default=["hidden"], choices=ENCODINGS)
    parser.add_argument("--supervised", nargs="+", type=float, default=[1.0], help="shares of the rows")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="implementations of transformers")
    quantizations = [Quantization.fp8.name, Quantization.int8_weights.name]
    parser.add_argument("--quantization", choices=quantizations, help="not with --deliver")
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[2048])
    parser.add_argument("--compile-mode", default="default", choices=[mode.name for mode in CompileMode])
    parser.add_argument("--chats", type=int, default=0, help="of the mix of lengths; 0: none")
    parser.add_argument("--deliver", nargs="+", choices=ENCODINGS, default=[], help="encodings over RPC")
    parser.add_argument("--deliver-size", default="4x2048")
    parser.add_argument("--requests", type=int, default=30, help="that are delivered")
    parser.add_argument("--prefetch", type=int, default=4, help="requests under way")
    options = parser.parse_args()
    if options.deliver and options.quantization:
        parser.error("--deliver must come without --quantization")
    if options.devices > 1:
        # The reference holds tokens and logits on one device.
        options.systems = [system for system in options.systems if system != "plain"]
    options.longest = max(size_of(size)[1] for size in options.sizes)
    return options


if __name__ == "__main__":
    main()
