"""Settings of chats, prompts and answers."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from eagle_rpc.config import rules
from eagle_rpc.config.choices import (
    AnswerBackend,
    DType,
    OnError,
    Overlong,
    PromptSource,
)
from eagle_rpc.config.rules import FilePath, NotNegative, Positive


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several sources of chats."""

    path: FilePath = ""
    """Chats in any form that `data.train_path` takes."""
    weight: Positive[float] = 1.0
    """How often an epoch has each chat; of 0.5 a fixed half of the chats, of 2.5 two or three times each."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Chats, and the rows that they fill."""

    train_path: FilePath | None = None
    """Chats: a file (JSON lines, JSON, parquet, Arrow; also in gzip or zstd), a directory, a pattern of files
    or a dataset of the Hugging Face hub as `owner/name:config@split`; null: `data.sources` alone."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Further chats to train on, each with a weight, as `[{path: chats.jsonl, weight: 2}]`."""
    validation_path: FilePath | None = None
    """Chats of the same forms; null: `data.validation_share` of the chats to train on."""
    validation_share: Annotated[float, rules.SHARE_BELOW_1] = 0.02
    """Share of the chats that validate instead of train, chosen by a hash of their content."""
    max_length: Annotated[int, rules.AT_LEAST_3] = 2048
    """Longest chat in tokens."""
    overlong: Overlong = Overlong.truncate
    """Whether a longer chat is cut or left out."""
    on_error: OnError = OnError.fail
    """Whether a broken record ends the job or is counted and skipped."""
    bucket_lengths: Annotated[list[int], rules.ASCENDING] = field(default_factory=list)
    """Lengths that batches are padded to, up to `data.max_length` or more; empty: multiples of 64."""
    packing: bool = False
    """Fills each row with whole chats that do not see each other, instead of one chat and padding."""
    row_length: Positive[int] | None = None
    """Tokens of a packed row, at least `data.max_length`; null: the last bucket, or `data.max_length`."""
    chat_template: FilePath | None = None
    """Path of a Jinja template that replaces the tokenizer's."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template for every rendering, such as `{enable_thinking: false}`."""
    date: Annotated[str, rules.DATE] | None = None
    """Day that templates write, as 2026-01-31; null: the day on which the run started."""
    workers: NotNegative[int] = 0
    """Processes that tokenise large data; 0: one for each core."""
    prompt_source: PromptSource = PromptSource.files
    """Origin of the two prompt files."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest possible row, padding included."""
        return self.row_length or (self.bucket_lengths or [self.max_length])[-1]


@dataclass(kw_only=True, slots=True)
class RegenerateConfig:
    """Answers of the target to prompts, which a draft then learns from."""

    prompts: FilePath = "${run.cache_dir}/chitchat/train.jsonl"
    """Chats in any form that `data.train_path` takes; the target answers their user turns."""
    output: FilePath = "${run.dir}/answers.jsonl"
    """JSONL file that answers are appended to; a chat that is already in it is not asked again."""
    num_prompts: Positive[int] | None = None
    """Prompts to answer; null: all."""
    backend: AnswerBackend = AnswerBackend.engine
    """What answers: a model in this process, endpoints, or the targets of a service."""
    endpoints: Annotated[list[str], rules.URLS] = field(default_factory=list)
    """Base URLs of OpenAI-compatible servers, as http://127.0.0.1:8000/v1, for `regenerate.backend=openai`."""
    api_key_file: FilePath | None = None
    """File with the key that the endpoints ask for; null: no key."""
    concurrency: Positive[int] = 64
    """Requests under way at a time at each endpoint, or prompts at each target of a service."""
    answer_timeout: Positive[float] = 1800.0
    """Seconds for one answer of an endpoint or a target, its wait there included; then it is asked again."""
    batch_size: Positive[int] = 128
    """Answers that the engine decodes at a time; a finished one makes room for the next prompt."""
    max_new_tokens: Positive[int] = 2048
    """Tokens of one answer, the end of turn included."""
    max_prompt_tokens: Positive[int] = 2048
    """Longer prompts are skipped and counted."""
    answers_per_prompt: Positive[int] = 1
    """Answers to each prompt; more than one needs a temperature above 0."""
    temperature: NotNegative[float] = 0.0
    """Sampling temperature; 0: greedy."""
    top_p: Annotated[float, rules.DECAY] = 1.0
    """Smallest set of tokens of at least this probability that sampling chooses from; 1: all tokens."""
    top_k: NotNegative[int] = 0
    """Number of most probable tokens that sampling chooses from; 0: all tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, beside the target's own end of turn."""
    dtype: DType = DType.bfloat16
    """Format of the target while it answers."""


@dataclass(kw_only=True, slots=True)
class PromptsConfig:
    """Prompts that the target writes itself, for `data.prompt_source=self`."""

    num_train: Positive[int] = 2000
    """Prompts to train on that are kept after filtering."""
    num_heldout: Positive[int] = 200
    """Prompts for evaluation, none of which is among those to train on."""
    system: str = ""
    """System prompt before the user's turn; empty: none beside the template's own."""
    temperature: Positive[float] = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, rules.DECAY] = 0.99
    """Smallest set of tokens of at least this probability that sampling chooses from."""
    max_tokens: Positive[int] = 256
    """Longest prompt; longer ones are left out."""
    min_chars: Positive[int] = 12
    """Shorter prompts are left out."""
    scripts: list[str] = field(default_factory=list)
    """Scripts by their Unicode names, as LATIN, that a prompt's letters must have; empty: any."""
    max_attempts_per_prompt: Positive[int] = 10
    """The job ends with an error once it needs more attempts than this for each prompt that it keeps."""
