"""What to do next, by the figures of a run: for the end of a job on the terminal, and for the page of a run.

Each rule takes measured figures and gives a sentence or nothing. Figures are as in `metrics.jsonl`,
`training.json` and `evaluation.json`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]
Figures = Mapping[str, Any]
Interval = tuple[float, float] | None

# Thresholds above or below which there is advice.
LONG_WAIT = 0.15  # share of the training time
SHORT_WAIT, IDLE_TARGET = 0.02, 0.5  # of the training time, of the target's time that it computes
BUSY_TARGET = 0.8  # of the target's time that it computes
RISING = 0.01  # tokens a target call over the last third of the validations
NO_BETTER = 3  # validations after the best one
OVERFITTED = 1.02  # last validation loss over the smallest one
MANY_UNCOVERED = 0.05  # share of predicted tokens
WIDE_INTERVAL = 0.05  # half of it, over the accept length
WEAK_CATEGORY = 0.95  # accept length over the whole's, with intervals that do not overlap
STILL_ACCEPTED = 0.6  # of the last guesses, those before them accepted
SLOWER = 1.0  # tokens a second with the draft over those without

# What trainers wait for, in words.
_KINDS = {"queue": "for its turn", "compute": "for its computing", "transfer": "for its transfer"}


def advice_of(metrics: Lines, training: Figures | None, evaluation: Figures | None) -> list[str]:
    """The advice of all rules for whose figures there is a file."""
    return list(_advice(metrics, training or {}, evaluation or {}))


def _advice(metrics: Lines, training: Figures, evaluation: Figures) -> Iterator[str]:
    validations = [
        (line["step"], line["validation/accept_length"])
        for line in metrics
        if "validation/accept_length" in line
    ]
    losses = [(line["step"], line["validation/loss"]) for line in metrics if "validation/loss" in line]
    waits = {kind: mean_wait(metrics, f"wait_share_{kind}") or 0.0 for kind in _KINDS}
    yield from on_waiting(
        mean_wait(metrics), training.get("targets", ()), len(training.get("trainers", ())), waits
    )
    yield from on_validations(validations)
    yield from on_overfitting(losses)
    if "coverage" in training:
        yield from on_vocabulary(
            training["coverage"], training["draft_vocab_size"], covered=training["covered"]
        )
    if evaluation:
        yield from on_checks(evaluation["identical_texts"], evaluation["counts_agree"])
        yield from on_interval(
            evaluation["accept_length"], evaluation["accept_length_interval"], evaluation["num_prompts"]
        )
        yield from on_categories(evaluation["accept_length_interval"], evaluation["by_category"])
        yield from on_draft_tokens(evaluation["conditional_acceptance_per_position"])
        yield from on_speed(evaluation["tokens_per_second"], evaluation["tokens_per_second_without_draft"])


def mean_wait(metrics: Lines, name: str = "wait_share") -> float | None:
    """Share of waiting, or of the kind of it that `name` has, over the second half of the lines.

    The first ones wait for a target to warm up.
    """
    shares = [line[name] for line in metrics if name in line]
    late = shares[len(shares) // 2 :]
    return sum(late) / len(late) if late else None


def on_waiting(
    wait: float | None, targets: Sequence[Figures], num_trainers: int, waits: Mapping[str, float]
) -> Iterator[str]:
    """A target or a faster way where trainers wait, a trainer more where they do not and targets are idle.

    `waits`: `wait` by what was waited for, empty where that is unknown.
    """
    if wait is None:
        return
    if wait >= LONG_WAIT:
        split = ", ".join(f"{share:.0%} {_KINDS[kind]}" for kind, share in waits.items() if share >= 0.005)
        text = f"trainers waited {wait:.0%} of the time for supervision{f' ({split})' if split else ''}"
        number = f" (topology.targets={len(targets) + 1})" if targets else ""
        if 2 * waits.get("transfer", 0.0) > wait:
            yield f"{text}: a smaller encoding (supervision.encoding) or a faster network helps, a target more does not"
        else:
            yield f"{text}: add a target{number}"
    busy = [one["busy_share"] for one in targets if one.get("busy_share") is not None]
    if wait <= SHORT_WAIT and busy and max(busy) < IDLE_TARGET:
        number = f" (topology.trainers={num_trainers + 1})" if num_trainers else ""
        yield (
            f"targets computed {max(busy):.0%} of the time and trainers did not wait: "
            f"one more trainer fits{number}"
        )


def on_service(targets: Sequence[Figures], trainers: Sequence[Figures]) -> Iterator[str]:
    """What to add to a running service or to remove from it.

    Figures are the status of those that live: `busy_share` of targets over the last ten seconds, `wait_share` of
    trainers over their last steps. In a rate that targets bound, n targets give 1 - wait of what trainers could use.
    """
    waits, busy = _shares(trainers, "wait_share"), _shares(targets, "busy_share")
    if not waits or not busy:
        return
    wait, work, number = sum(waits) / len(waits), sum(busy) / len(busy), len(busy)
    found = f"trainers wait {wait:.0%} of the time and targets compute {work:.0%} of it"
    if wait >= LONG_WAIT and work >= BUSY_TARGET:
        more = max(1, math.ceil(number * wait / max(1 - wait, 0.1)))
        yield f"{found}: {number + more} targets instead of {number} would end the waiting (job=serve)"
    elif wait >= LONG_WAIT:
        yield (
            f"{found}: more targets would not help; raise supervision.prefetch, or make replies smaller "
            "(supervision.encoding) or the network faster"
        )
    elif wait <= SHORT_WAIT and work < IDLE_TARGET:
        enough = max(1, math.ceil(number * work / BUSY_TARGET))
        fit = math.floor(len(waits) * BUSY_TARGET / max(work, 0.01))
        fewer = f"{enough} of {number} targets are enough, or " if enough < number else ""
        yield f"{found}: {fewer}about {fit} trainers fit instead of {len(waits)}"


def _shares(workers: Sequence[Figures], name: str) -> list[float]:
    """The figures of those workers that have announced one: workers of other versions may announce anything."""
    found = [one.get(name) for one in workers]
    return [
        one for one in found if isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1
    ]


def on_validations(validations: Sequence[tuple[int, float]]) -> Iterator[str]:
    """`validations`: optimiser steps and accept length."""
    if len(validations) < 3:
        return
    step, last = validations[-1]
    best_step, best = max(validations, key=lambda pair: pair[1])
    earlier_step, earlier = validations[-1 - math.ceil(len(validations) / 3)]
    if best_step == step and last - earlier >= RISING:
        yield (
            f"accept length still rises (from {earlier:.2f} at step {earlier_step} to {last:.2f} at step "
            f"{step}): train longer, on more answers if these were read more than twice"
        )
    after = sum(one > best_step for one, _ in validations)
    if after >= NO_BETTER:
        yield (
            f"the {after} validations after step {best_step} (accept length {best:.2f}) are no better: "
            f"train.patience={NO_BETTER} would end there, more answers could raise it"
        )


def on_overfitting(losses: Sequence[tuple[int, float]]) -> Iterator[str]:
    """`losses`: optimiser steps and validation loss."""
    if not losses:
        return
    best_step, best = min(losses, key=lambda pair: pair[1])
    if losses[-1][1] > OVERFITTED * best:
        yield (
            f"the validation loss rises since step {best_step} (from {best:.2f} to {losses[-1][1]:.2f}): "
            "more answers help, more epochs do not"
        )


def on_vocabulary(
    coverage: Sequence[tuple[int, float]], draft_vocab_size: int, *, covered: float | None = None
) -> Iterator[str]:
    """`coverage`: share of the predicted tokens by size, ascending; `covered`: by this draft's vocabulary."""
    outside = 1 - (dict(coverage)[draft_vocab_size] if covered is None else covered)
    larger = [(size, 1 - share) for size, share in coverage if size > draft_vocab_size]
    if outside > MANY_UNCOVERED and larger:
        size, rest = larger[0]
        yield (
            f"{100 * outside:.0f} % of the predicted tokens are outside the draft vocabulary: "
            f"draft.vocab_size={size} would leave {100 * rest:.0f} %"
        )


def on_checks(identical_texts: bool | None, counts_agree: bool | None) -> Iterator[str]:
    """Null where nothing was decoded for real."""
    if identical_texts is False:
        yield "texts with the draft differ from the target's own: evaluate.dtype=float32 tells whether rounding does"
    if counts_agree is False:
        yield "real decoding accepts other guesses than counted: evaluate.dtype=float32 tells whether rounding does"


def on_interval(accept_length: float, interval: Interval, num_prompts: int) -> Iterator[str]:
    """The interval is 95 %; null for a single prompt."""
    half = math.inf if interval is None else (interval[1] - interval[0]) / 2
    if half / accept_length - WIDE_INTERVAL > 1e-6:
        width = "has no interval" if interval is None else f"is known within {half:.2f}"
        # Intervals shrink with the root of the number of prompts; a power of two is named.
        times = 16.0 if interval is None else (half / accept_length / WIDE_INTERVAL) ** 2
        rounded = 2 ** math.ceil(math.log2(num_prompts * times) - 0.01)
        yield f"the accept length {width} over {num_prompts} prompts: evaluate.num_prompts={rounded} tells more"


def on_categories(whole: Interval, categories: Mapping[Any, Figures]) -> Iterator[str]:
    """The weakest category of several, if it is clearly weaker than the whole (of this interval)."""
    known = [(name, one) for name, one in categories.items() if one["accept_length_interval"]]
    if whole is None or len(known) < 2:
        return
    name, weakest = min(known, key=lambda pair: float(pair[1]["accept_length"]))
    middle = sum(whole) / 2
    if weakest["accept_length"] < WEAK_CATEGORY * middle and weakest["accept_length_interval"][1] < whole[0]:
        yield (
            f"prompts of {name} accept {weakest['accept_length']:.2f} tokens a call, all prompts {middle:.2f}: "
            "train on more chats of that kind"
        )


def on_draft_tokens(conditional: Sequence[float]) -> Iterator[str]:
    """`conditional`: share of guesses accepted at each position, given that those before it were."""
    if conditional and conditional[-1] >= STILL_ACCEPTED:
        longer = len(conditional) + 2
        yield (
            f"guess {len(conditional)} is accepted in {conditional[-1]:.0%} of the drafts that reach it: "
            f"longer drafts may pay (evaluate.num_draft_tokens={longer})"
        )


def on_speed(with_draft: float | None, without: float | None) -> Iterator[str]:
    """Tokens a second of real decoding here, one prompt at a time."""
    if with_draft and without and with_draft < SLOWER * without:
        yield (
            f"here decoding is slower with the draft ({with_draft:.1f} against {without:.1f} tokens/s): "
            "judge speed on the hardware and engine that will serve; the accept length holds there as well"
        )
