"""One OpenAI-compatible server, asked through the official client.

Prompts are sent as token ids to `/completions`: `/chat/completions` would render them by the server's own
template. Of the fields beside OpenAI's, `return_token_ids` is vLLM's, and `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids` and `skip_special_tokens` are common to vLLM and SGLang
(https://docs.vllm.ai/en/stable/serving/openai_compatible_server.html, section Extra Parameters). They are
always given, because a server takes absent ones from the model's generation config.
"""

import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import openai
from openai.types import Completion, CompletionChoice, Model
from transformers import PreTrainedTokenizerBase

from eagle_rpc.answers.answerer import Answer
from eagle_rpc.config.schema import RegenerateConfig
from eagle_rpc.errors import (
    ConfigError,
    EagleRpcError,
    InvalidRequest,
    RequestExpired,
    TargetFailed,
    TargetUnavailable,
)

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
# The client retries after 0.5 s and 1 s, or when the server says. Longer outages are the caller's.
_RETRIES = 2
_NOT_NOW = (429, 502, 503, 504)
_PROBE, _PROBE_TOKENS = "The capital of France is", 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """All that requests have in common."""

    settings: RegenerateConfig
    target: str  # the name of the model, as in `target.model`
    context: int | None  # tokens of a prompt and its answer at most; null: no limit is known
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: Collection[int]
    end_of_turn: int | None  # ends complete answers of servers that do not say which tokens an answer has
    seed: int


class Endpoint:
    """A server that is asked for answers. `check` first, then `answer`; both raise errors in words."""

    model: str
    """Name of the served model."""
    context: int | None
    """Tokens of a prompt and its answer at most; null: no limit is known."""
    returns_ids: bool
    """Whether the server says which tokens an answer has; otherwise its text is tokenised."""

    def __init__(self, url: str, api_key: str | None, asking: Asking) -> None:
        self.url = url
        self._asking = asking
        self._client = openai.AsyncOpenAI(
            base_url=url,
            # The client insists on a key, and would take it from the environment.
            api_key=api_key or "none",
            max_retries=_RETRIES,
            timeout=openai.Timeout(asking.settings.answer_timeout, connect=_CONNECT_SECONDS),
        )

    async def close(self) -> None:
        await self._client.close()

    async def check(self) -> None:
        """Finds the served model, and whether the server takes token ids and has the target's tokenizer.

        Raises `ConfigError` for a server that cannot be used, `TargetUnavailable` if none answers.
        """
        asking, prompt = self._asking, self._tokenised(_PROBE)
        model = _served_model(self.url, await self._models(), asking.target)
        limits = (asking.context, _extra(model, "max_model_len"))
        self.model, self.context = model.id, min(filter(None, limits), default=None)
        try:
            # Without stop texts, before which a server cuts the text of an answer, but not its ids.
            completion = await self._complete("probe", prompt, _PROBE_TOKENS, stop_texts=[])
        except InvalidRequest as error:
            raise ConfigError(
                f"regenerate.endpoints must take prompts as token ids at /completions and the settings of "
                f"regenerate: {error}"
            ) from error
        choice = completion.choices[0]
        self.returns_ids = _extra(choice, "token_ids") is not None
        self._check_prompt(prompt, completion)
        self._check_tokenizer(choice.text, self._said(choice))
        if not self.returns_ids:
            if asking.settings.stop:
                raise ConfigError(
                    f"regenerate.stop must be empty for servers that do not return token ids, as {self.url}: "
                    "an end of turn and a stop text would look alike"
                )
            logger.warning("%s returns no token ids: the text of its answers is tokenised", self.url)
        logger.info("%s serves %s, context %s", self.url, self.model, self.context or "unknown")

    async def answer(self, key: str, prompt: Sequence[int], limit: int) -> Answer:
        """The answer to `prompt` of at most `limit` tokens, or the refusal of it.

        Raises `TargetUnavailable` if the server cannot answer now, `ConfigError` if it never will.
        """
        if self.context is not None:
            limit = min(limit, self.context - len(prompt))
        if limit < 1:
            return _refusal(
                key, f"the prompt has {len(prompt)} tokens, the context of {self.url} {self.context}"
            )
        try:
            completion = await self._complete(key, prompt, limit, stop_texts=self._asking.settings.stop)
        except (InvalidRequest, RequestExpired, TargetFailed) as error:
            return _refusal(key, str(error))
        choice = completion.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            return _refusal(key, f"{self.url} ended the answer because of {choice.finish_reason}")
        said, truncated = self._said(choice), choice.finish_reason == "length"
        if said and said[-1] in self._asking.stop_token_ids:
            return Answer.of_said(key, said, truncated=False)
        # Ended by the limit, or by a text of `regenerate.stop`, whose tokens are part of the answer.
        return Answer(key, said, truncated)

    async def _models(self) -> list[Model]:
        try:
            found = (await self._client.models.list()).data
        except openai.OpenAIError as error:
            raise self._in_words(error) from error
        except AttributeError:
            # The client takes any page for a list of models.
            found = None
        models = [one for one in found if isinstance(one, Model)] if isinstance(found, list) else []
        if not models:
            raise ConfigError(f"{_must_be_base_url(self.url)}, whose /models names no model")
        return models

    async def _complete(
        self, key: str, prompt: Sequence[int], limit: int, *, stop_texts: list[str]
    ) -> Completion:
        settings = self._asking.settings
        greedy = settings.temperature == 0
        draws = random.Random(f"{self._asking.seed}/{key}")
        try:
            completion = await self._client.completions.create(
                model=self.model,
                prompt=list(prompt),
                max_tokens=limit,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=openai.omit if greedy else draws.getrandbits(31),
                stop=stop_texts or openai.omit,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                extra_body={
                    "top_k": settings.top_k or -1,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "stop_token_ids": sorted(self._asking.stop_token_ids),
                    "skip_special_tokens": False,
                    "return_token_ids": True,
                },
            )
        except openai.OpenAIError as error:
            raise self._in_words(error) from error
        if not getattr(completion, "choices", None):
            raise TargetFailed(f"{self.url} sent a completion without choices: {completion!r:.200}")
        return completion

    def _said(self, choice: CompletionChoice) -> list[int]:
        """The ids of an answer, with the stop token if one ended it."""
        token_ids, end = _extra(choice, "token_ids"), self._asking.end_of_turn
        if token_ids is not None:
            return [int(one) for one in token_ids]
        said = self._tokenised(choice.text)
        ended = said and said[-1] in self._asking.stop_token_ids
        if choice.finish_reason == "stop" and not ended and end is not None:
            said.append(end)
        return said

    def _tokenised(self, text: str) -> list[int]:
        return list(self._asking.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_prompt(self, prompt: list[int], completion: Completion) -> None:
        """The server must see the ids that were sent, without a token of its own before them."""
        seen = _extra(completion.choices[0], "prompt_token_ids")
        counted = completion.usage.prompt_tokens if completion.usage else len(prompt)
        if (seen is not None and seen != prompt) or counted != len(prompt):
            found = f"{counted} tokens" if seen is None else f"the tokens {seen}"
            raise ConfigError(
                f"regenerate.endpoints must take token ids as they are, {self.url} makes {found} of {prompt}"
            )

    def _check_tokenizer(self, text: str, said: list[int]) -> None:
        """The server's text of an answer must be the text of the answer's ids."""
        special = set(self._asking.stop_token_ids)
        here = str(self._asking.tokenizer.decode([one for one in said if one not in special]))
        # White space at the edges of special tokens and a cut character depend on the decoder.
        if _bare(here) != _bare(text):
            raise ConfigError(
                f"regenerate.endpoints must serve target.model {self._asking.target}, {self.url} has another "
                f"tokenizer: the tokens {said} are {text!r} there and {here!r} here"
            )

    def _in_words(self, error: openai.OpenAIError) -> EagleRpcError:
        if isinstance(error, openai.APIStatusError):
            status, said = error.status_code, f"{self.url} answers {error.status_code}: {_message(error)}"
            if status in (401, 403):
                return ConfigError(
                    f"regenerate.api_key_file must hold a key that the endpoint accepts, {said}"
                )
            if status == 404:
                return ConfigError(f"{_must_be_base_url(self.url)}, which answers 404: {_message(error)}")
            if status in _NOT_NOW:
                return TargetUnavailable(said)
            return InvalidRequest(said) if status < 500 else TargetFailed(said)
        # The name of httpx's error: the client uses httpx or httpx2.
        no_connection = type(error.__cause__).__name__ == "ConnectTimeout"
        if isinstance(error, openai.APITimeoutError) and not no_connection:
            limit = f"regenerate.answer_timeout={self._asking.settings.answer_timeout:g} s"
            return RequestExpired(f"{self.url} gave no answer in {limit}, asked {1 + _RETRIES} times")
        if isinstance(error, openai.APIConnectionError):
            return TargetUnavailable(f"{self.url} cannot be reached: {error.__cause__ or error}")
        return TargetFailed(f"{self.url} sent no completion: {error}")


def _refusal(key: str, why: str) -> Answer:
    return Answer(key, [], truncated=False, refusal=why)


def _served_model(url: str, models: list[Model], target: str) -> Model:
    """The model to ask: the only one, or the one with the target's name."""
    if len(models) == 1:
        return models[0]
    for model in models:
        names = {model.id, str(_extra(model, "root"))}
        if target in names or PurePath(target).name in {PurePath(name).name for name in names}:
            return model
    served = ", ".join(model.id for model in models)
    raise ConfigError(f"regenerate.endpoints must serve target.model {target}, {url} serves {served}")


def _must_be_base_url(url: str) -> str:
    rule = "regenerate.endpoints must be base URLs of OpenAI-compatible servers, as http://127.0.0.1:8000/v1"
    return f"{rule}, got {url}"


def _extra(found: CompletionChoice | Model, name: str) -> Any:
    """A field beside OpenAI's; None if the server does not send it."""
    return (found.model_extra or {}).get(name)


def _message(error: openai.APIStatusError) -> str:
    """The server's own words, in one line."""
    body: Any = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail")
    return " ".join(str(body or error.message).split())[:300]


def _bare(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())
