"""The target's own texts, and the captured states of their tokens, both in batches.

Legend: B texts, T tokens, W width of all captured states side by side.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from eagle_rpc.answers.answerer import answers_under_way
from eagle_rpc.answers.own import own_answerer
from eagle_rpc.draft import TargetText
from eagle_rpc.report.progress import Progress
from eagle_rpc.target.capture import AuxStates, captured_layers, find_base, find_decoder_layers, run_base

# Tokens of one forward, padding included; a longer text runs alone.
_PASS_TOKENS = 4096


def own_texts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    tokens_after_end: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[TargetText]:
    """The text of each prompt, and `tokens_after_end` tokens that the target would say after it.

    At a temperature above 0 tokens are drawn, by `seed`.
    """
    answerer = own_answerer(
        model,
        batch_size=min(batch_size, len(prompts)),
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        tokens_after_end=tokens_after_end,
        temperature=temperature,
        seed=seed,
    )
    for number, prompt_ids in enumerate(prompts):
        answerer.submit(str(number), prompt_ids)
    texts, progress = dict[int, TargetText](), Progress("prompt", len(prompts), title="answering")
    for answer in answerer.answers():
        number = int(answer.key)
        texts[number] = TargetText(
            prompt_ids=prompts[number], token_ids=answer.said_ids, after_end=answer.after_end
        )
        said = sum(len(text.token_ids) + len(text.after_end) for text in texts.values())
        longest = max_new_tokens + tokens_after_end
        progress.advance(under_way=answers_under_way(answerer.num_generated, len(texts), said, longest))
    progress.close()
    return [texts[number] for number in range(len(prompts))]


@torch.no_grad()
def captured_states(
    model: PreTrainedModel, aux_layer_ids: Sequence[int], texts: Sequence[TargetText]
) -> Iterator[tuple[int, Tensor]]:
    """The index of each text, longest first, with its states [T, W] in the target's dtype."""
    base, layers = find_base(model), find_decoder_layers(model)
    waiting = sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))
    while waiting:
        count = max(1, _PASS_TOKENS // len(texts[waiting[0]].ids))
        group, waiting = waiting[:count], waiting[count:]
        rows = [torch.tensor(texts[index].ids) for index in group]
        ids_BT = pad_sequence(rows, batch_first=True).to(model.device)
        aux = AuxStates(ids_BT.shape, len(aux_layer_ids))
        with captured_layers(layers, aux_layer_ids, aux.write):
            run_base(base, ids_BT)
        yield from zip(group, aux.states, strict=True)


@torch.no_grad()
def log_probs(model: PreTrainedModel, text: TargetText, temperature: float) -> Tensor:
    """Of each token of `text` given those before it, [T] fp32; 0 for the prompt's."""
    ids_T = torch.tensor(text.ids, device=model.device)
    start = len(text.prompt_ids)
    logits_TV = model(ids_T[None], use_cache=False).logits[0]
    said = (logits_TV[start - 1 : -1].float() / temperature).log_softmax(dim=-1)
    probs_T = said.new_zeros(len(ids_T))
    probs_T[start:] = said.gather(1, ids_T[start:, None]).squeeze(1)
    return probs_T
