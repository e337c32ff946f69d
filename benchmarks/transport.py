"""The cost of transport: supervision of one small target over RPC in each encoding, and over a peer's HTTP.

Each side runs a service and a client, processes with one thread each on this host's loopback, and answers the
same requests: same weights, tokens and masks, several requests under way. Its client reads the target's
probabilities of every supervised row and does nothing else. One side runs at a time, in turns; the report
gives medians.

    python benchmarks/transport.py --nemo-python NEMO_ENV/bin/python --output benchmarks/results/NAME.md

The peer, nemo-automodel, lives in an environment of its own that does not need this package:

    pip install torch==2.13.0 && pip install --no-deps nemo-automodel==0.7.0
    pip install transformers==5.18.0 requests datasets pillow

Without `--nemo-python` this package is measured alone. The loopback device counts the bytes, headers
included, so no other process should use it:

    unshare --net sh -c "ip link set lo up && exec python benchmarks/transport.py ..."
"""

import argparse
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from measuring import arguments_of
from peers.comparison import Contestant, Measurement
from peers.ours import overrides
from peers.reporting import report
from peers.work import Work, random_batches
from processes import free_port, python_module, static_job

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.target.loading import load_model


def nemo(python: str, work: Path) -> Contestant:
    arguments = (str(work), str(free_port()))
    server, client = (
        python_module(role, "peers.nemo_remote", role, *arguments, python=python, answers=role == "client")
        for role in ("server", "client")
    )
    return Contestant("NeMo AutoModel", [server], client)


def static(encoding: str, work: Path) -> Contestant:
    """One target and one trainer of one job."""
    target, trainer = static_job("peers.ours", str(work), "rpc=static", f"supervision={encoding}")
    return Contestant(f"static, {encoding}", [target], trainer)


def elastic(encoding: str, path: Path) -> Contestant:
    """A registry, a target and a trainer, each a job of its own."""
    work = Work.load(str(path))
    address = f"rpc.registry=127.0.0.1:{free_port()}"
    meeting = ("rpc=elastic", address, f"rpc.token_file={work.directory}/token")
    run_dir = f"run.dir={work.directory}/run"
    registry = python_module("registry", "eagle_rpc", "job=registry", *meeting, run_dir)
    target = python_module("target", "eagle_rpc", "job=serve", *meeting, *overrides(work))
    arguments = ("peers.ours", "trainer", str(path), *meeting, f"supervision={encoding}")
    return Contestant(
        f"elastic, {encoding}", [registry, target], python_module("trainer", *arguments, answers=True)
    )


WORK_FIELDS = [one for one in fields(Work) if one.name != "directory"]
MEMBERSHIPS = {"static": static, "elastic": elastic}


def prepare(work: Work) -> Path:
    """Saves target and batches. The draft vocabulary is the K ids that the target predicts most often in them."""
    config = TargetConfig(
        model="", random=work.architecture, dtype=DType[work.dtype], aux_layer_ids=list(work.aux_layer_ids)
    )
    model, _ = load_model(config, "cpu", cache_dir=work.directory, seed=work.seed)
    model.save_pretrained(work.model_dir)
    batches = random_batches(work)
    counts = torch.zeros(work.vocab_size, dtype=torch.int64)
    with torch.no_grad():
        for batch in batches:
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            predicted_BT = output.logits.float().argmax(-1)
            counts += predicted_BT[batch["loss_mask"].bool()].bincount(minlength=work.vocab_size)
    selected_token_ids = counts.topk(work.draft_vocab_size).indices.sort().values
    work.save_tokens(batches, selected_token_ids)
    return work.save()


def parse_arguments() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--nemo-python", help="python of an environment with nemo-automodel (default: no peer)"
    )
    parser.add_argument("--memberships", nargs="+", choices=tuple(MEMBERSHIPS), default=list(MEMBERSHIPS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="of each repetition")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    for one in WORK_FIELDS:
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="transport-") as directory:
        settings = {one.name: getattr(arguments, one.name) for one in WORK_FIELDS}
        work = Work(directory=directory, **settings)
        path = prepare(work)
        contestants = [nemo(arguments.nemo_python, path)] if arguments.nemo_python else []
        for membership in arguments.memberships:
            contestants += [MEMBERSHIPS[membership](encoding, path) for encoding in ENCODINGS]
        measurement = Measurement(contestants, work)
        num_requests = arguments.requests
        measurement.run(
            repetitions=arguments.repetitions, num_requests=num_requests, idle_seconds=arguments.idle_seconds
        )
        text = report(measurement, work, num_requests=num_requests, peer_python=arguments.nemo_python)
    print(f"\n{text}")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
