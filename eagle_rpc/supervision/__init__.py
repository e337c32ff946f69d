"""The contract between target and trainer."""

from eagle_rpc.sizes.target import TargetShape
from eagle_rpc.supervision.answers import AnswerPrompt, AnswerRequest, AnswerSettings, PromptAnswer
from eagle_rpc.supervision.backend import Eagle3TargetBackend
from eagle_rpc.supervision.batch import Eagle3TargetBatch
from eagle_rpc.supervision.encoded import (
    EncodedSupervision,
    ReadSupervision,
    decode_supervision,
    encode_supervision,
    read_supervision,
)
from eagle_rpc.supervision.encodings import (
    ENCODINGS,
    DraftHead,
    DraftTargets,
    LogitEncoding,
    ProjectedTargets,
    StoredLogits,
    StoredProbs,
)
from eagle_rpc.supervision.fingerprint import (
    WeightSamples,
    combined_fingerprint,
    tensors_digest,
    tokenizer_fingerprint,
    weight_samples,
    weights_fingerprint,
)
from eagle_rpc.supervision.output import TargetOutput
from eagle_rpc.supervision.request_times import (
    RequestTimes,
    RequestTotals,
    ServiceTimes,
    Waits,
    times_of,
    waits_of,
)
from eagle_rpc.supervision.rows import fused_rows_run, read_rows, read_rows_fused
from eagle_rpc.supervision.session import (
    GenerateRequest,
    HeartbeatReply,
    ModelInfo,
    OpenedSession,
    SessionSettings,
    SessionSpec,
    TargetExpectation,
    form_of_pass,
)
from eagle_rpc.supervision.stages import (
    FirstStageTarget,
    StageBeat,
    StageInfo,
    StageOutput,
    StagePass,
    StageShare,
    StageTarget,
)
from eagle_rpc.supervision.target import (
    Eagle3Target,
    PlainTarget,
    as_target,
    check_encoding,
    compute_supervision,
    describe_target,
    device_of,
    run_target,
    supervise,
)
from eagle_rpc.supervision.tensors import own_storage, shift_left, to_device, to_host
from eagle_rpc.supervision.tokens import BatchRows, TokenBatch, shifted_loss_mask
from eagle_rpc.supervision.vocab import DraftVocabOnDevice, VocabMapping

# Requests and sessions.
__all__ = ["AnswerPrompt", "AnswerRequest", "AnswerSettings", "PromptAnswer"]
__all__ += ["BatchRows", "GenerateRequest", "HeartbeatReply", "ModelInfo", "OpenedSession", "SessionSettings"]
__all__ += [
    "SessionSpec",
    "TargetExpectation",
    "TargetShape",
    "TokenBatch",
    "VocabMapping",
    "shifted_loss_mask",
]
# The target's side.
__all__ += [
    "DraftVocabOnDevice",
    "Eagle3Target",
    "PlainTarget",
    "ReadSupervision",
    "TargetOutput",
    "as_target",
]
__all__ += ["check_encoding", "compute_supervision", "describe_target", "device_of", "encode_supervision"]
__all__ += ["fused_rows_run", "read_rows", "read_rows_fused", "read_supervision", "run_target", "supervise"]
__all__ += [
    "WeightSamples",
    "combined_fingerprint",
    "form_of_pass",
    "tensors_digest",
    "tokenizer_fingerprint",
]
__all__ += ["weight_samples", "weights_fingerprint"]
# Between the stages of a target.
__all__ += [
    "FirstStageTarget",
    "StageBeat",
    "StageInfo",
    "StageOutput",
    "StagePass",
    "StageShare",
    "StageTarget",
]
# Replies, and the trainer's side.
__all__ += ["ENCODINGS", "EncodedSupervision", "decode_supervision"]
__all__ += ["RequestTimes", "RequestTotals", "ServiceTimes", "Waits", "times_of", "waits_of"]
__all__ += ["DraftHead", "DraftTargets", "Eagle3TargetBackend", "Eagle3TargetBatch"]
__all__ += ["LogitEncoding", "ProjectedTargets", "StoredLogits", "StoredProbs"]
# Tensors.
__all__ += ["own_storage", "shift_left", "to_device", "to_host"]
