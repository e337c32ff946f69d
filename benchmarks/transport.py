"""What does transport cost? Supervision of one small target over RPC in each encoding, and over a peer's HTTP.

Each side runs a service and a client, processes with one thread each on this host's loopback, and answers the same
requests: same weights, tokens and masks, several requests under way. Its client reads the target's probabilities of every
supervised row and does nothing else. One side runs at a time; the sides take turns, medians are reported.

    python benchmarks/transport.py --nemo-python NEMO_ENV/bin/python --output benchmarks/results/NAME.md

The peer, nemo-automodel, lives in an environment of its own that does not need this package:

    pip install torch==2.13.0 && pip install --no-deps nemo-automodel==0.7.0
    pip install transformers==5.18.0 requests datasets pillow

Without `--nemo-python` this package is measured alone. Bytes are those that the loopback device counts, headers included,
so nothing else should use it: `unshare --net sh -c "ip link set lo up && exec python benchmarks/transport.py ..."`.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from peers.measuring import Contestant, Measurement
from peers.ours import overrides
from peers.processes import Command, free_port, static_environment
from peers.reporting import report
from peers.work import Work, random_batches

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.target.loading import load_model


def nemo(python: str, work: Path) -> Contestant:
    arguments = [str(work), str(free_port())]
    server = Command("server", [python, "-m", "peers.nemo_remote", "server", *arguments], {}, answers=False)
    client = Command("client", [python, "-m", "peers.nemo_remote", "client", *arguments], {}, answers=True)
    return Contestant("NeMo AutoModel", [server], client)


def static(encoding: str, work: Path) -> Contestant:
    """One target and one trainer of one job."""
    port = free_port()
    commands = []
    for rank, role in enumerate(("target", "trainer")):
        argv = [sys.executable, "-m", "peers.ours", role, str(work), "rpc=static", f"supervision={encoding}"]
        commands.append(Command(role, argv, static_environment(rank, 2, port), answers=role == "trainer"))
    return Contestant(f"static, {encoding}", commands[:1], commands[1])


def elastic(encoding: str, path: Path) -> Contestant:
    """A registry, a target and a trainer, each a job of its own."""
    work = Work.load(str(path))
    meeting = [
        "rpc=elastic",
        f"rpc.registry=127.0.0.1:{free_port()}",
        f"rpc.token_file={work.directory}/token",
    ]
    program = [sys.executable, "-m", "eagle_rpc"]
    registry = Command(
        "registry", [*program, "job=registry", *meeting, f"run.dir={work.directory}/run"], {}, answers=False
    )
    target = Command("target", [*program, "job=serve", *meeting, *overrides(work)], {}, answers=False)
    argv = [sys.executable, "-m", "peers.ours", "trainer", str(path), *meeting, f"supervision={encoding}"]
    return Contestant(f"elastic, {encoding}", [registry, target], Command("trainer", argv, {}, answers=True))


MEMBERSHIPS = {"static": static, "elastic": elastic}


def prepare(work: Work) -> Path:
    """Saves the target, the batches, and as draft vocabulary the K ids that the target itself predicts most often there."""
    config = TargetConfig(
        model="", random=work.architecture, dtype=DType[work.dtype], aux_layer_ids=list(work.aux_layer_ids)
    )
    model, _ = load_model(config, "cpu", cache_dir=work.directory, seed=work.seed)
    model.save_pretrained(work.model_dir)
    batches = random_batches(work)
    counts = torch.zeros(work.vocab_size, dtype=torch.int64)
    with torch.no_grad():
        for batch in batches:
            predicted_BT = (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits.float()
                .argmax(-1)
            )
            counts += predicted_BT[batch["loss_mask"].bool()].bincount(minlength=work.vocab_size)
    selected_token_ids = counts.topk(work.draft_vocab_size).indices.sort().values
    work.save_tokens(batches, selected_token_ids)
    return work.save()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nemo-python",
        help="python of an environment with nemo-automodel; without it this package is measured alone",
    )
    parser.add_argument("--memberships", nargs="+", choices=tuple(MEMBERSHIPS), default=list(MEMBERSHIPS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="of each repetition")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--real-share", type=float, default=0.9, help="of the tokens, the others are padding")
    parser.add_argument(
        "--answer-share",
        type=float,
        default=0.75,
        help="of the real tokens, those that the loss mask selects",
    )
    parser.add_argument("--dtype", choices=[one.name for one in DType], default="float32")
    parser.add_argument("--prefetch", type=int, default=4, help="requests under way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="transport-") as directory:
        work = Work(
            directory=directory,
            hidden_size=arguments.hidden_size,
            num_layers=arguments.layers,
            vocab_size=arguments.vocab_size,
            draft_vocab_size=arguments.draft_vocab_size,
            batch_size=arguments.batch_size,
            length=arguments.length,
            num_batches=8,
            real_share=arguments.real_share,
            answer_share=arguments.answer_share,
            dtype=arguments.dtype,
            prefetch=arguments.prefetch,
            seed=arguments.seed,
        )
        path = prepare(work)
        contestants = [nemo(arguments.nemo_python, path)] if arguments.nemo_python else []
        for membership in arguments.memberships:
            contestants += [MEMBERSHIPS[membership](encoding, path) for encoding in ENCODINGS]
        measurement = Measurement(contestants, work)
        measurement.run(
            repetitions=arguments.repetitions,
            num_requests=arguments.requests,
            idle_seconds=arguments.idle_seconds,
        )
        command = shlex.join(["python", "benchmarks/transport.py", *sys.argv[1:]])
        text = report(
            measurement,
            work,
            num_requests=arguments.requests,
            peer_python=arguments.nemo_python,
            command=command,
        )
    print(f"\n{text}")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
