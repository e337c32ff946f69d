"""The batched engine of `answers/`, as a target's service uses it."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.service.answering import Decoded
from eagle_rpc.supervision import AnswerSettings


class EngineAnswering:
    """Decodes prompts by the model of a target, in the form in which the target runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._checked = False

    def check(self) -> None:
        """Raises `UnsupportedTarget` for a model on several devices, or one that the engine cannot decode."""
        if self._checked:
            return
        if len(devices := {str(weight.device) for weight in self._model.parameters()}) > 1:
            raise UnsupportedTarget(f"to answer prompts, a target must be on one device, got {len(devices)}")
        self._checked = True

    def decoder(self, settings: AnswerSettings, num_rows: int) -> "_EngineDecoder":
        self.check()
        engine = AnswerEngine(
            self._model,
            batch_size=num_rows,
            max_new_tokens=settings.max_new_tokens,
            stop_token_ids=settings.stop_token_ids,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        return _EngineDecoder(engine)


class _EngineDecoder:
    def __init__(self, engine: AnswerEngine) -> None:
        self._engine = engine
        self.drop = engine.drop

    def submit(self, key: str, token_ids: Sequence[int], *, draws: str) -> None:
        self._engine.submit(key, token_ids, draws=draws)

    def step(self) -> list[Decoded]:
        return [Decoded(one.key, one.said_ids, one.truncated) for one in self._engine.step()]
