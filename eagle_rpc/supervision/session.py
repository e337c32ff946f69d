"""What a trainer registers at a target, and what a target says of itself."""

from dataclasses import asdict, dataclass

from torch import Tensor

from eagle_rpc.errors import InvalidRequest, TargetMismatch
from eagle_rpc.supervision.encoding import ENCODINGS, ROW_RULES
from eagle_rpc.supervision.tokens import TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A target's identity and limits, the answer of `model_info`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    aux_layer_ids: tuple[int, ...]
    dtype: str  # torch name without "torch."
    max_length: int  # tokens
    max_batch_tokens: int
    tokenizer_fingerprint: str | None  # null for targets without a tokenizer
    weights_fingerprint: str
    incarnation: str  # random id of this server process
    form: str = (
        ""  # what decides a forward pass's bits beside weights and dtype; empty where the target does not say
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetExpectation:
    """What a draft requires of its target; null fields accept anything."""

    vocab_size: int | None = None
    hidden_size: int | None = None
    aux_layer_ids: tuple[int, ...] | None = None
    dtype: str | None = None
    tokenizer_fingerprint: str | None = None
    weights_fingerprint: str | None = None
    form: str | None = None

    def check(self, info: ModelInfo) -> None:
        """Raises `TargetMismatch` with every field that differs."""
        differences = [
            f"{name} must be {wanted}, the target has {getattr(info, name)}"
            for name, wanted in asdict(self).items()
            if wanted is not None and getattr(info, name) != wanted
        ]
        if differences:
            raise TargetMismatch("; ".join(differences))


@dataclass(kw_only=True, slots=True)
class SessionSpec:
    """One trainer's registration. Settings are fixed for the session's life."""

    selected_token_ids: Tensor  # [K] int64
    encoding: str = "hidden"
    rows: str = "position_mask"
    expected: TargetExpectation = TargetExpectation()
    job: str = ""  # trainers of one job share it
    trainer: str = ""  # worker name, for logs
    through_host: bool = (
        False  # supervision leaves the target's GPU first: RPC has no way between the two devices
    )

    def check(self) -> None:
        """Raises `InvalidRequest`; the mapping itself is checked by `VocabMapping`."""
        for name, allowed in (("encoding", ENCODINGS), ("rows", ROW_RULES)):
            if getattr(self, name) not in allowed:
                raise InvalidRequest(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSession:
    """The answer of `open_session`."""

    id: str
    credits: int  # requests that may be under way at a time
    lease: float  # seconds of silence after which the session ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """The answer to a heartbeat."""

    incarnation: str
    draining: bool


@dataclass(kw_only=True, slots=True)
class GenerateRequest:
    """One batch to supervise. Asking twice is harmless: the answer is a function of the tokens and the session."""

    session: str
    incarnation: str  # of the server that is meant
    request_id: (
        str  # unique in the session; a second request with it takes the place of a first that still waits
    )
    tokens: TokenBatch
    seconds_left: float  # until the sender gives up; clocks of hosts differ, so never a point in time
