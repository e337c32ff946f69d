"""`report.html`: one page about a run, or about several drafts, that needs no network."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eagle_rpc.report import charts, page
from eagle_rpc.report.advice import advice_of, mean_wait
from eagle_rpc.report.charts import Chart
from eagle_rpc.report.run_template import SHADES, STYLE, TEMPLATE
from eagle_rpc.report.sources import Sources

Tiles = Iterator[tuple[str, str, str]]

# Texts that are shown with their accepted tokens, and tokens of each.
_TEXTS, _TOKENS = 12, 400


def write_report(sources: Sources, output: Path) -> list[str]:
    """Writes the page; returns its advice, for the terminal."""
    from plotly.offline import get_plotlyjs  # half a second that only the end of a job should pay

    advice = advice_of(sources.metrics, sources.training, sources.evaluation)
    drawn = dict[str, Chart]()
    sections = []
    for title, text, found in _sections(sources):
        names = [(caption, f"chart{len(drawn) + number}") for number, caption in enumerate(found)]
        drawn |= {name: found[caption] for caption, name in names}
        sections.append((title, text, names))
    texts = list(_texts(sources.evaluation)) if sources.evaluation else []
    most = max((shade for one in texts for _, shade in one["pieces"]), default=0)
    page.write_page(
        output,
        f"Run {sources.name}",
        TEMPLATE,
        style=STYLE,
        tiles=list(_tiles(sources)),
        advice=advice,
        sections=sections,
        workers=list(_workers(sources.training or {})),
        rows=_rows(sources.comparison) if sources.comparison else [],
        texts=texts,
        shades=most,
        most=SHADES,
        conditions=list(_conditions(sources)),
        config=sources.config,
        charts=drawn,
        library=Markup(get_plotlyjs()),
    )
    return advice


def _tiles(sources: Sources) -> Tiles:
    """Label, figure and what it is of."""
    if one := sources.evaluation:
        interval = _between(one["accept_length_interval"])
        yield "accept length", f"{one['accept_length']:.2f}", f"{interval}{one['num_prompts']} prompts"
        if one["identical_texts"] is not None:
            same = "identical" if one["identical_texts"] else "different"
            yield "text with the draft", same, f"{one['num_decoded']} prompts decoded"
        if one["tokens_per_second"] and one["tokens_per_second_without_draft"]:
            gain = one["tokens_per_second"] / one["tokens_per_second_without_draft"]
            yield "decoding here", f"{gain:.2f} times", "against the target alone"
    trained = [line for line in sources.metrics if "loss" in line]
    if trained:
        last = trained[-1]
        yield "trained", f"{last['step']:,} steps", f"loss {last['loss']:.2f}"
        pace = [line["tokens_per_second"] for line in trained[len(trained) // 2 :]]
        yield "pace", f"{sum(pace) / len(pace):,.0f} tokens/s", "of training, second half"
    if (wait := mean_wait(sources.metrics)) is not None:
        yield "trainers waiting", f"{100 * wait:.1f} %", "of their time, for targets"
    if one := sources.training:
        yield "draft vocabulary", f"{one['draft_vocab_size']:,}", f"{100 * one['covered']:.1f} % covered"
    if (compared := sources.comparison) and not sources.metrics:
        yield "drafts", str(len(compared["drafts"])), f"{compared['num_prompts']} prompts"


def _sections(sources: Sources) -> Iterator[tuple[str, str, dict[str, Chart]]]:
    """Title, explanation and charts by caption."""
    if sources.comparison:
        yield (
            "Drafts beside each other",
            "Tokens a target call over the same texts of the target, with 95 % intervals over prompts.",
            _comparison_charts(sources.comparison, sources.compared),
        )
    if one := sources.evaluation:
        runs = {sources.name: one, **sources.earlier}
        earlier = " Beside it other runs with the same prompts." if sources.earlier else ""
        yield (
            "Acceptance",
            f"What decoding of held-out prompts accepts, with 95 % intervals over prompts.{earlier}",
            _acceptance_charts(runs),
        )
    if any("loss" in line for line in sources.metrics):
        yield (
            "Training",
            "Accept length of decoding is measured on validation chats; the simulated one counts every token "
            "as the start of a draft of all training steps.",
            _training_charts(sources.metrics),
        )
    found = dict(_time_and_vocabulary(sources.training or {}, sources.metrics))
    if found:
        yield (
            "Time and vocabulary",
            "A trainer waits where a reply is late, for what the request does meanwhile at the target or on its way.",
            found,
        )


def _acceptance_charts(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Chart]:
    found = {"By position of the guess": charts.positions(runs)}
    lengths = {
        run: [(str(k), value, None) for k, value in one["accept_length_by_draft_tokens"].items()]
        for run, one in runs.items()
    }
    found["By guesses a draft"] = charts.bars(lengths, x="guesses a draft", y="accept length")
    for caption, key, axis in (
        ("By category of the prompt", "by_category", "category"),
        ("By length of the context", "by_context", "tokens of context, at most"),
    ):
        groups = {run: one[key] for run, one in runs.items() if one.get(key)}
        if any(len(one) > 1 for one in groups.values()):
            found[caption] = charts.slices(groups, axis)
    return found


def _comparison_charts(
    comparison: Mapping[str, Any], metrics: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Chart]:
    drafts = {one["directory"]: one for one in comparison["drafts"]}
    overall = {name: {"all prompts": one["overall"]} for name, one in drafts.items()}
    found = {"Accept length": charts.slices(overall, "")} | _acceptance_charts(drafts)
    for caption, key in (
        ("Accept length of validations", "validation/accept_length"),
        ("Validation loss", "validation/loss"),
    ):
        runs = {name: lines for name, lines in metrics.items() if any(key in line for line in lines)}
        if runs:
            found[caption] = charts.runs_over_steps(runs, key, caption.lower())
    return found


def _training_charts(metrics: list[dict[str, Any]]) -> dict[str, Chart]:
    return {
        "Loss": charts.over_steps(
            metrics, {"training": "loss", "validation": "validation/loss"}, "nats a token"
        ),
        "Accept length": charts.over_steps(
            metrics,
            {
                "training, simulated": "simulated_accept_length",
                "validation, simulated": "validation/simulated_accept_length",
                "validation, decoding": "validation/accept_length",
            },
            "tokens a target call",
        ),
    }


def _time_and_vocabulary(
    training: Mapping[str, Any], metrics: list[dict[str, Any]]
) -> Iterator[tuple[str, Chart]]:
    workers = {
        one["name"]: {f"{role}: {kind}": value for kind, value in one["seconds"].items()}
        for role in ("target", "trainer")
        for one in training.get(f"{role}s", ())
    }
    if workers:
        yield "Where the time went", charts.shares_of_time(workers)
    if any("tokens_per_second" in line for line in metrics):
        yield "Pace", charts.over_steps(metrics, {"training": "tokens_per_second"}, "tokens/s")
    if any("wait_share" in line for line in metrics):
        waits = {"in all": "wait_share"}
        waits |= {f"for {kind}": f"wait_share_{kind}" for kind in ("queue", "compute", "transfer")}
        waiting = [
            {"step": line["step"], **{key: 100 * line[key] for key in waits.values() if key in line}}
            for line in metrics
        ]
        yield "Trainers waiting for targets", charts.over_steps(waiting, waits, "% of the time")
    if "coverage" in training:
        chart = charts.coverage(training["coverage"], training["draft_vocab_size"], training["covered"])
        yield "Coverage of draft vocabularies", chart


def _workers(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for one in training.get("targets", ()):
        yield (
            one["name"],
            f"{one['passes']:,} passes, {one['tokens']:,} tokens, {one['reply_bytes'] / 1e6:,.0f} MB of replies",
        )
    for one in training.get("trainers", ()):
        yield one["name"], ", ".join(f"{kind} {value:,.0f} s" for kind, value in one["seconds"].items())


def _rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """A head, then a row for each draft."""
    rows = [["draft", "parameters", "accept length", "gain over the first"]]
    for number, one in enumerate(comparison["drafts"]):
        gain = "" if number == 0 else f"{one['gain']:+.3f} {_between(one['gain_interval'])}"
        whole = one["overall"]
        length = f"{whole['accept_length']:.3f} {_between(whole['accept_length_interval'])}"
        rows.append([one["directory"], f"{one['parameters'] / 1e6:.1f} M", length, gain])
    return [rows[0][1:], *rows[1:]]


def _texts(evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    shown = [one for one in evaluation["prompts"] if one.get("pieces")][:_TEXTS]
    for one in shown:
        cut = "" if len(one["pieces"]) <= _TOKENS else f", the first {_TOKENS} of {len(one['pieces'])} tokens"
        category = f"{one['category']}: " if one["category"] else ""
        yield {
            "title": f"{category}accept length {one['accept_length']:.2f} in {one['num_drafts']} drafts{cut}",
            "prompt": one["prompt"],
            "pieces": [(words, min(position, SHADES)) for words, position in one["pieces"][:_TOKENS]],
        }


def _conditions(sources: Sources) -> Iterator[tuple[str, str]]:
    for line in (sources.training or {}).get("setup", ()):
        yield "training", line
    for kind, content in (("evaluation", sources.evaluation), ("comparison", sources.comparison)):
        for name, value in (content or {}).get("settings", {}).items():
            # A comparison has drafts of its own, and does not read `evaluate.draft`.
            if name != "versions" and (kind, name) != ("comparison", "draft"):
                yield f"{kind}, {name}", str(value)
    for kind, content in (
        ("training", sources.training),
        ("evaluation", (sources.evaluation or {}).get("settings")),
        ("comparison", (sources.comparison or {}).get("settings")),
    ):
        if found := (content or {}).get("versions"):
            yield f"{kind}, versions", ", ".join(f"{name} {number}" for name, number in found.items())


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}] "
