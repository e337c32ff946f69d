"""nemo-automodel's remote EAGLE-3 target, server and client, through its public interface. Runs in its
environment.

python -m peers.nemo_remote server|client WORK.json PORT
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from nemo_automodel.components.speculative.eagle.remote import RemoteEagle3TargetModel
from peers.work import Side, Work, answer_commands
from torch import Tensor


def serve_target(work: Work, port: int) -> None:
    """Serves until a client disconnects."""
    from nemo_automodel.components.speculative.eagle.remote.server import TargetModelServer, serve
    from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(work.model_dir, dtype=getattr(torch, work.dtype))
        .eval()
        .requires_grad_(False)
    )
    target = HFEagle3TargetModel(model, aux_layer_ids=work.aux_layer_ids)
    serve(TargetModelServer(target, nccl_port=port + 100, host="127.0.0.1"), "127.0.0.1", port)


def use_target(work: Work, port: int) -> None:
    _, selected_token_ids = work.load_tokens()
    selected_token_mask = torch.zeros(work.vocab_size, dtype=torch.bool)
    selected_token_mask[selected_token_ids] = True
    target = RemoteEagle3TargetModel.from_urls([f"http://127.0.0.1:{port}"], device="cpu", max_retries=6)
    target.set_vocab_mapping(selected_token_ids, selected_token_mask)

    def stream(batches: Iterable[dict[str, Tensor]]) -> Iterator[Any]:
        source, under_way = iter(batches), deque()
        while True:
            while len(under_way) < work.prefetch and (batch := next(source, None)) is not None:
                under_way.append(target.generate_batch_async(**batch))
            if not under_way:
                return
            yield under_way.popleft().result()

    answer_commands(work, Side(stream, _use, _dense))
    target.close()


def _use(batch: Any) -> int:
    mask_BT = batch.position_mask.squeeze(-1)
    mass = float((batch.target_probs.sum(dim=-1) * mask_BT).sum())
    assert abs(mass - int(mask_BT.sum())) < 1, "the probabilities of each supervised row sum up to 1"
    return int(mask_BT.sum())


def _dense(batch: Any) -> dict[str, Tensor]:
    return {name: getattr(batch, name) for name in ("target_probs", "position_mask", "aux_hidden_states")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    role = {"server": serve_target, "client": use_target}[sys.argv[1]]
    role(Work.load(sys.argv[2]), int(sys.argv[3]))
