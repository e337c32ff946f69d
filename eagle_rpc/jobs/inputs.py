"""The inputs of training: all that needs neither weights nor RPC, loaded and checked before anything heavy."""

import contextlib
import datetime
import functools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from eagle_rpc.config import Config
from eagle_rpc.config.checks import as_message
from eagle_rpc.config.choices import Resume
from eagle_rpc.data import ChatDataset, ChatTemplate, datasets_of
from eagle_rpc.data.sources import data_files, training_sources
from eagle_rpc.data.token_cache import TokenisedData, load_data
from eagle_rpc.errors import ConfigError, EagleRpcError
from eagle_rpc.jobs.assembly import chat_template, draft_config, require_room, stored_draft
from eagle_rpc.jobs.draft_form import draft_vocab_size
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.waiting import wait_until
from eagle_rpc.serving import ServedForm, check_form
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import plan_placement
from eagle_rpc.target.model_files import load_target_config, load_target_shape, load_tokenizer
from eagle_rpc.topology import Cast, resolve_device
from eagle_rpc.train import latest_whole_checkpoint

logger = logging.getLogger(__name__)

# Seconds that the other workers give the first trainer, which may have to tokenise a large corpus.
_LONGEST_CHECK = 12 * 3600.0
_LOOK_SECONDS = 0.2
# In the store of an attempt: the day that templates write, set when the check begins, and its result.
_DATE, _CHECKED, _GOOD, _BAD = "date", "inputs", "good", "bad"


@dataclass(frozen=True, slots=True)
class Inputs:
    """The data of a run in the tokens of its target."""

    shape: TargetShape
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    data: TokenisedData
    training: ChatDataset
    validation: ChatDataset


@dataclass(slots=True)
class _Mistakes:
    """Mistakes that do not depend on each other, for one message."""

    messages: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the error of the body instead of raising it."""
        try:
            yield
        except EagleRpcError as error:
            self.messages.append(str(error))

    def raise_if_any(self) -> None:
        if self.messages:
            raise ConfigError(as_message(list(dict.fromkeys(self.messages)), "in the inputs"))


def load_inputs(config: Config, *, show_progress: bool = True) -> Inputs:
    """Loads and checks the inputs. Raises one `ConfigError` with all mistakes that can be told apart."""
    mistakes, cache_dir = _Mistakes(), config.run.cache_dir
    shape = tokenizer = template = None
    with mistakes.noted():
        resolve_device(config.train.device, field="train.device")
    with mistakes.noted():
        shape = load_target_shape(config.target, cache_dir=cache_dir)
    with mistakes.noted():
        tokenizer = load_tokenizer(config.target, cache_dir=cache_dir)
        if tokenizer is None:
            raise ConfigError("target.random has no tokenizer to read data with: name a stored target.model")
    if shape is not None:
        with mistakes.noted():
            _check_placement(config)
        with mistakes.noted():
            _check_draft(config, shape)
        with mistakes.noted():
            require_room(config, shape.length(config.target.max_length))
    for path in _data_paths(config):
        with mistakes.noted():
            data_files(path)
    if tokenizer is not None:
        with mistakes.noted():
            template = chat_template(config, tokenizer)
    # Tokenising takes longest, so earlier mistakes are told first.
    mistakes.raise_if_any()
    assert shape is not None and tokenizer is not None and template is not None
    data = load_data(config.data, template, cache_dir=cache_dir, show_progress=show_progress)
    for source in data.sources:
        with mistakes.noted():
            source.require_ids_below(shape.vocab_size)
    mistakes.raise_if_any()
    training, validation = datasets_of(config.data, data)
    return Inputs(shape, tokenizer, template, data, training, validation)


def _check_placement(config: Config) -> None:
    topology = config.topology
    if topology.devices_per_target * topology.stages_per_target > 1:
        target = load_target_config(config.target, cache_dir=config.run.cache_dir)
        plan_placement(config.target, target, topology.devices_per_target, topology.stages_per_target)


def _check_draft(config: Config, shape: TargetShape) -> None:
    if draft_vocab_size(config, shape) > shape.vocab_size:
        raise ConfigError(
            f"draft.vocab_size must be at most the target's vocabulary {shape.vocab_size}, "
            f"got {config.draft.vocab_size}"
        )
    form = ServedForm(
        config=draft_config(config, shape),
        aux_layer_ids=aux_layers(shape.num_layers, config.target.aux_layer_ids),
        num_target_layers=shape.num_layers,
        target=shape.model_type,
        own_embedding=config.draft.train_embeddings,
    )
    check_form(form, config.serving.engines)
    stored_draft(config, shape)


def _data_paths(config: Config) -> list[str]:
    paths = [source.path for source in training_sources(config.data)]
    return paths + ([config.data.validation_path] if config.data.validation_path else [])


def load_inputs_once(
    config: Config, cast: Cast, store: dist.Store, stop: threading.Event
) -> tuple[Config, Inputs | None] | None:
    """The inputs of this trainer (null for a target), and the configuration with the day of the run.

    The first trainer checks them while the others wait, so that a mistake is told once and before any weight
    is loaded. Returns null if it found one, or once `stop` is set: then this worker ends, too. Raises
    `WaitTimeout` if the first trainer does not start within `rpc.start_timeout`, or if the check takes too
    long.
    """
    first = cast.me.name == cast.trainer_names[0]
    if not first and not _is_checked(cast, store, stop, start_timeout=config.rpc.start_timeout):
        return None
    date = _date_of_run(config, store) if first else store.get(_DATE).decode()
    config = replace(config, data=replace(config.data, date=date))
    if cast.me.name not in cast.trainer_names:
        return config, None
    try:
        inputs = load_inputs(config, show_progress=first)
    except BaseException:
        # Also after Ctrl-C: the others wait for the outcome.
        store.set(_CHECKED, _BAD)
        raise
    if first:
        for finding in inputs.template.findings.lines():
            logger.info("chat template: %s", finding)
        store.set(_CHECKED, _GOOD)
    return config, inputs


def _is_checked(cast: Cast, store: dist.Store, stop: threading.Event, *, start_timeout: float) -> bool:
    """Waits for the first trainer; whether it found the inputs to be good. False once `stop` is set."""
    name = cast.trainer_names[0]
    phases = (
        (_DATE, f"{name} to start", start_timeout),
        (_CHECKED, f"{name} to check the inputs", _LONGEST_CHECK),
    )
    for key, what, seconds in phases:
        is_set = functools.partial(store.check, [key])
        if not wait_until(is_set, what, seconds=seconds, stop=stop, pause=_LOOK_SECONDS):
            return False
    return bool(store.get(_CHECKED) == _GOOD.encode())


def _date_of_run(config: Config, store: dist.Store) -> str:
    """The day that templates write: of the first start of the run, the same for all of its trainers."""
    resumes = config.train.resume is Resume.auto
    newest = latest_whole_checkpoint(RunDirectory.of(config).checkpoints) if resumes else None
    saved = newest[1].record.config["data"].get("date") if newest else None
    date = config.data.date or saved or datetime.date.today().isoformat()
    store.set(_DATE, date)
    return str(date)
