"""Contestants are measured in turns."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peers.work import Work
from processes import Command, Process, running
from safetensors.torch import load_file

# Requests that each contestant answers before anything is measured.
WARM_UP = 3


@dataclass(frozen=True)
class Contestant:
    """One way of transport: its servers and its client."""

    name: str
    servers: list[Command]
    client: Command


@dataclass(frozen=True)
class Outcome:
    """One repetition of one contestant, per request; processor times in seconds of a core."""

    seconds: float
    bytes: float
    supervised: float
    server_cpu: float
    client_cpu: float

    @property
    def tokens_per_second(self) -> float:
        return self.supervised / self.seconds


def measure(servers: list[Process], client: Process, num_requests: int) -> Outcome:
    def reading() -> tuple[float, float, float]:
        return loopback_bytes(), sum(server.cpu_seconds() for server in servers), client.cpu_seconds()

    before = reading()
    answer = client.ask(requests=num_requests)
    transferred, server_cpu, client_cpu = (now - then for now, then in zip(reading(), before, strict=True))
    totals = (answer["seconds"], transferred, answer["supervised"], server_cpu, client_cpu)
    return Outcome(*(total / num_requests for total in totals))


def loopback_bytes() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_recv


def idle_shares(processes: list[Process], seconds: float) -> dict[str, float]:
    """Each process's share of a core while there are no requests."""
    before = [process.cpu_seconds() for process in processes]
    time.sleep(seconds)
    pairs = zip(processes, before, strict=True)
    return {one.name: (one.cpu_seconds() - then) / seconds for one, then in pairs}


@dataclass(frozen=True)
class Difference:
    """Differences of a contestant's first answer from the first contestant's."""

    probs: float  # largest absolute difference over supervised rows
    aux: float  # the same over real tokens
    mask_entries: int  # of position_mask


def compare(answer: Path, reference: Path, work: Work) -> Difference:
    ours, theirs = load_file(answer), load_file(reference)
    real_BT = work.load_tokens()[0][0]["attention_mask"].bool()
    rows_BT = (ours["position_mask"].bool() & theirs["position_mask"].bool()).squeeze(-1)

    def largest(name: str, rows: torch.Tensor) -> float:
        return float((ours[name][rows].float() - theirs[name][rows].float()).abs().max())

    mask_entries = int((ours["position_mask"].bool() != theirs["position_mask"].bool()).sum())
    return Difference(largest("target_probs", rows_BT), largest("aux_hidden_states", real_BT), mask_entries)


class Measurement:
    """All repetitions of all contestants."""

    def __init__(self, contestants: list[Contestant], work: Work) -> None:
        self.outcomes: dict[str, list[Outcome]] = {one.name: [] for one in contestants}
        self.idle: dict[str, dict[str, float]] = {}
        self.differences: dict[str, Difference] = {}
        self._contestants = contestants
        self._work = work

    def run(self, *, repetitions: int, num_requests: int, idle_seconds: float) -> None:
        for repetition in range(repetitions):
            # Forwards, then backwards: a machine that becomes slower favours no contestant.
            for contestant in self._contestants if repetition % 2 == 0 else reversed(self._contestants):
                with running(contestant.servers, contestant.client, Path(self._work.directory)) as (
                    servers,
                    client,
                ):
                    client.ask(requests=WARM_UP)
                    outcome = measure(servers, client, num_requests)
                    self.outcomes[contestant.name].append(outcome)
                    print(
                        f"{repetition + 1}/{repetitions} {contestant.name}: {outcome.tokens_per_second:.0f} tokens/s",
                        flush=True,
                    )
                    if repetition == 0:
                        self._look_closely(contestant, servers, client, idle_seconds)

    def _look_closely(
        self, contestant: Contestant, servers: list[Process], client: Process, idle_seconds: float
    ) -> None:
        """Measured once: the answer itself, and the processes without requests."""
        directory, is_first = Path(self._work.directory), contestant is self._contestants[0]
        reference, answer = directory / "reference.safetensors", directory / "answer.safetensors"
        client.ask(save=str(reference if is_first else answer))
        if not is_first:
            self.differences[contestant.name] = compare(answer, reference, self._work)
        self.idle[contestant.name] = idle_shares([*servers, client], idle_seconds)

    def median(self, name: str, figure: str) -> float:
        return statistics.median(getattr(outcome, figure) for outcome in self.outcomes[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Tokens per second against the first contestant's, repetition by repetition: median, lowest, highest."""
        pairs = zip(self.outcomes[name], self.outcomes[self._contestants[0].name], strict=True)
        ratios = [mine.tokens_per_second / other.tokens_per_second for mine, other in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)
