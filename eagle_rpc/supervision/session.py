"""What a trainer registers at a target and asks of it, and what a target tells of itself."""

from dataclasses import asdict, dataclass

from torch import Tensor

from eagle_rpc.errors import InvalidRequest, TargetMismatch
from eagle_rpc.supervision.encodings import ENCODINGS
from eagle_rpc.supervision.tokens import TokenBatch

ROW_RULES = ("position_mask", "loss_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A target's identity and limits, the answer of `model_info`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    aux_layer_ids: tuple[int, ...]
    dtype: str  # torch name without "torch."
    max_length: int  # tokens of a sequence
    max_batch_tokens: int
    tokenizer_fingerprint: str | None  # None for targets without a tokenizer
    weights_fingerprint: str
    incarnation: str  # random id of this server process
    form: str = ""  # decides the bits of a forward pass, beside weights and dtype; empty where unknown


def form_of_pass(layers: str, *, fused_rows: bool, fused_mlps: int) -> str:
    """`ModelInfo.form` of a target whose layers run in the form `layers`, with so many fused MLPs."""
    form = [layers, "fused rows" if fused_rows else "", f"{fused_mlps} fused MLPs" if fused_mlps else ""]
    return ", ".join(filter(None, form))


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetExpectation:
    """What a draft requires of its target; None accepts anything."""

    vocab_size: int | None = None
    hidden_size: int | None = None
    aux_layer_ids: tuple[int, ...] | None = None
    dtype: str | None = None
    tokenizer_fingerprint: str | None = None
    weights_fingerprint: str | None = None
    form: str | None = None

    def check(self, info: ModelInfo) -> None:
        """Raises `TargetMismatch` that names every field that differs."""
        differences = [
            f"{name} must be {wanted}, the target has {getattr(info, name)}"
            for name, wanted in asdict(self).items()
            if wanted is not None and getattr(info, name) != wanted
        ]
        if differences:
            raise TargetMismatch("; ".join(differences))


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSettings:
    """How one trainer wants its supervision. Fixed for the session's life."""

    encoding: str = "hidden"  # a name of `ENCODINGS`
    rows: str = "position_mask"  # one of `ROW_RULES`
    run: str = ""  # trainers of one run share it
    trainer: str = ""  # worker name, for logs
    through_host: bool = False  # replies go through CPU memory: RPC does not connect the two GPUs
    answers: bool = False  # the session asks for answers to prompts, not for supervision

    def check(self) -> None:
        """Raises `InvalidRequest` for an unknown encoding or row rule."""
        for name, value, allowed in (("encoding", self.encoding, ENCODINGS), ("rows", self.rows, ROW_RULES)):
            if value not in allowed:
                raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSpec(SessionSettings):
    """One trainer's registration: its settings, its draft vocabulary and its requirements."""

    selected_token_ids: Tensor  # [K] int64; `VocabMapping` checks them
    expected: TargetExpectation = TargetExpectation()

    @classmethod
    def of(cls, settings: SessionSettings, ids_K: Tensor, expected: TargetExpectation) -> "SessionSpec":
        return cls(selected_token_ids=ids_K, expected=expected, **asdict(settings))


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSession:
    """The answer of `open_session`."""

    id: str
    credits: int  # requests that may be under way at a time
    lease: float  # seconds without a heartbeat or request after which the session ends


@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatReply:
    """The answer of `heartbeat`."""

    incarnation: str
    draining: bool


@dataclass(kw_only=True, slots=True)
class GenerateRequest:
    """One batch to supervise. The answer depends on tokens and session only; sending it twice is harmless."""

    session: str
    incarnation: str  # of the server that is meant
    request_id: str  # unique in the session; a second request replaces a first one that still waits
    tokens: TokenBatch
    seconds_left: float  # until the sender gives up; a duration, since the clocks of hosts differ
