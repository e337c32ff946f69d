"""`job=drain`: takes targets, or all targets of a host, out of a running service, and waits until they have left.

The registry hands the request to each worker with the answer to its beat; a worker takes it as SIGTERM. Targets
leave before their further stages, so that what they hold is finished.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.config.schema import JobConfig
from eagle_rpc.errors import ConfigError, ConnectionLost, WaitTimeout
from eagle_rpc.process import stop_signals
from eagle_rpc.process.logs import setup_logging
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.registry import RegistryClient, load_token
from eagle_rpc.registry.record import Record, Sighting

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


def run(config: Config) -> int:
    """Returns 0 once all have left, 1 if it was told to stop before; those asked to drain go on draining.

    Raises `ConfigError` if no living target is meant, `WaitTimeout` after `job.drain_within`.
    """
    setup_logging("drain", log_format=config.run.log_format)
    client = RegistryClient(config.rpc.registry, load_token(Path(config.rpc.token_file)))
    with stop_signals() as stop:
        leaving = _meant(client.records(), config.job)
        wait = BoundedWait(f"{_names(leaving)} to leave", config.job.drain_within)
        for role in ("target", "stage"):
            if not _drained(client, [one for one in leaving if one.role == role], wait, stop):
                logger.warning("told to stop; workers that were asked to drain go on draining")
                return 1
    logger.info("all have left: %s", _names(leaving))
    return 0


def _meant(sightings: Sequence[Sighting], job: JobConfig) -> list[Record]:
    """The living targets and stages that `job` names. Raises `ConfigError` if there are none."""
    living = [one.record for one in sightings if one.living]
    workers = [one for one in living if one.role != "trainer"]
    if job.drain_host is not None:
        meant = [one for one in workers if one.host == job.drain_host]
        hosts = ", ".join(sorted({one.host for one in workers})) or "none"
        if not meant:
            raise ConfigError(
                f"job.drain_host must be a host with living targets ({hosts}), got {job.drain_host}"
            )
    else:
        meant = [one for one in workers if _target_of(one) in job.drain_targets]
        absent = sorted(set(job.drain_targets) - {_target_of(one) for one in meant})
        if absent:
            names = _names([one for one in workers if one.role == "target"]) or "none"
            raise ConfigError(
                f"job.drain_targets must name living targets ({names}), got {', '.join(absent)}"
            )
    _say_what_stays(living, meant)
    return meant


def _say_what_stays(living: Sequence[Record], meant: Sequence[Record]) -> None:
    hit = {_target_of(one) for one in meant}
    serving = [one for one in living if one.role == "target" and one.status.get("draining") is False]
    staying = [one for one in serving if one.name not in hit]
    trainers = [one for one in living if one.role == "trainer"]
    logger.info("draining %s; serving on: %s", _names(meant), _names(staying) or "none")
    if trainers and not staying:
        logger.warning(
            "no other target serves: %d trainers wait for one for their rpc.reconnect_deadline", len(trainers)
        )
    cut = [one for one in serving if one.name in hit and one not in meant]
    if cut:
        logger.warning("%s lose stages and take no requests until these are started elsewhere", _names(cut))
    beside = [one for one in trainers if one.host in {other.host for other in meant}]
    if beside:
        logger.info("trainers on the same host stay: %s", _names(beside))


def _drained(
    client: RegistryClient, leaving: Sequence[Record], wait: BoundedWait, stop: threading.Event
) -> bool:
    """Asks them to leave until they have; False if `stop` is set before. Raises `WaitTimeout`."""
    here = list(leaving)
    while here:
        if stop.is_set():
            return False
        try:
            client.drain([one.incarnation for one in here])
            known = {one.record.incarnation: one for one in client.records()}
        except (ConnectionLost, WaitTimeout) as error:
            state = str(error)
        else:
            here = [one for one in here if _is_here(one, known.get(one.incarnation))]
            state = "; ".join(_progress(known[one.incarnation].record) for one in here)
        if here and wait.over:
            raise wait.timeout(state)
        if here:
            wait.say(state)
            stop.wait(_LOOK_SECONDS)
    return True


def _is_here(worker: Record, found: Sighting | None) -> bool:
    if found is None:
        logger.info("%s has left", worker)
        return False
    if not found.living:
        logger.warning("%s has been silent for %.0f s: it was killed, or hangs", worker, found.seconds_silent)
    return found.living


def _progress(worker: Record) -> str:
    status = worker.status
    held = [f"{status[key]} {key}" for key in ("queued", "running", "prompts_running") if status.get(key)]
    state = "draining" if status.get("draining") else "asked to drain"
    return f"{worker.name} is {state}" + (f" with {', '.join(held)}" if held else "")


def _target_of(worker: Record) -> str:
    """The name of its target: of stage `target0.1` it is `target0`."""
    return worker.name.partition(".")[0]


def _names(workers: Sequence[Record]) -> str:
    return ", ".join(one.name for one in workers)
