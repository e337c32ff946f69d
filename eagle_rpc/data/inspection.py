"""The data of a run in figures: lengths, supervision, duplicates, coverage of draft vocabularies, samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from eagle_rpc.config.schema import DataConfig
from eagle_rpc.data.dataset import ChatDataset, Example
from eagle_rpc.data.template import ChatTemplate
from eagle_rpc.data.token_cache import TokenisedData
from eagle_rpc.data.tokenising import Counts
from eagle_rpc.data.vocab import coverage_by_size
from eagle_rpc.report.advice import on_vocabulary

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_BINS = 12
# Shares above which there is advice.
_MANY_CUT, _MANY_DUPLICATES = 0.02, 0.02


@dataclass(frozen=True, slots=True)
class Inspection:
    """What training would see."""

    sources: list[tuple[str, Counts]]
    template: list[str]  # a sentence for each finding
    num_samples: int
    num_tokens: int
    supervised_share: float  # of the tokens
    duplicates: int  # chats that an earlier chat equals
    lengths: list[tuple[float, int]]  # quantile, tokens
    histogram: list[tuple[int, int, int]]  # from, to (excluded), samples
    coverage: list[tuple[int, float]]  # draft vocabulary, share of the predicted tokens, ascending
    draft_vocab_size: int
    advice: list[str]
    samples: list[list[tuple[str, bool]]]  # stretches of text and whether they are supervised


def inspect_data(
    data: TokenisedData,
    training: ChatDataset,
    template: ChatTemplate,
    config: DataConfig,
    *,
    target_vocab_size: int,
    draft_vocab_size: int,
    num_samples: int,
) -> Inspection:
    """The figures of the training data, and `num_samples` samples evenly spread over them."""
    lengths = training.lengths
    shown = np.unique(np.linspace(0, len(training) - 1, num_samples).astype(int))
    counts, edges = np.histogram(lengths, bins=min(_BINS, max(1, int(np.ptp(lengths)))))
    coverage = coverage_by_size(training, target_vocab_size, draft_vocab_size)
    sources = [(source.path, source.counts) for source in data.sources]
    chats = sum(source.counts.chats for source in data.sources)
    duplicates = chats - len(np.unique(np.concatenate([source.store.chats_C for source in data.sources])))
    supervised = sum(source.counts.supervised for source in data.sources)
    tokens = sum(source.counts.tokens for source in data.sources)
    return Inspection(
        sources=sources,
        template=template.findings.lines(),
        num_samples=len(training),
        num_tokens=int(lengths.sum()),
        supervised_share=supervised / tokens,
        duplicates=duplicates,
        lengths=[(share, int(np.quantile(lengths, share, method="nearest"))) for share in _QUANTILES],
        histogram=[
            (int(np.ceil(low)), int(np.ceil(high)), int(count))
            for low, high, count in zip(edges, edges[1:], counts, strict=False)
        ],
        coverage=coverage,
        draft_vocab_size=draft_vocab_size,
        advice=[
            *_advice_on_lengths([counts for _, counts in sources], config),
            *on_vocabulary(coverage, draft_vocab_size),
            *_advice_on_duplicates(duplicates, chats),
        ],
        samples=[_stretches(training[int(index)], template) for index in shown],
    )


def _advice_on_lengths(sources: Sequence[Counts], config: DataConfig) -> list[str]:
    cut, all_samples = sum(one.truncated for one in sources), sum(one.samples for one in sources)
    dropped = sum(one.dropped for one in sources)
    advice = []
    if cut > _MANY_CUT * all_samples:
        share = 100 * cut / all_samples
        advice.append(f"{share:.0f} % of the samples are cut at data.max_length={config.max_length}")
    if dropped > _MANY_CUT * (all_samples + dropped):
        share = 100 * dropped / (all_samples + dropped)
        advice.append(
            f"{share:.0f} % of the samples are dropped, since data.max_length={config.max_length} leaves "
            "nothing to learn from or data.overlong=drop"
        )
    return advice


def _advice_on_duplicates(duplicates: int, chats: int) -> list[str]:
    if duplicates <= _MANY_DUPLICATES * chats:
        return []
    return [f"{100 * duplicates / chats:.0f} % of the chats equal another one"]


def _stretches(example: Example, template: ChatTemplate) -> list[tuple[str, bool]]:
    ids, mask = example.input_ids.tolist(), example.loss_mask.tolist()
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [(str(template.tokenizer.decode([token for token, _ in run])), said) for said, run in runs]
