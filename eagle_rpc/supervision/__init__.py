"""The contract between target and trainer: requests, supervision, encodings, sessions."""

from eagle_rpc.supervision.backend import Eagle3TargetBackend
from eagle_rpc.supervision.batch import (
    DraftTargets,
    Eagle3TargetBatch,
    ProjectedTargets,
    StoredLogits,
    StoredProbs,
)
from eagle_rpc.supervision.draft_head import DraftHead
from eagle_rpc.supervision.encoding import (
    ENCODINGS,
    DraftVocabOnDevice,
    EncodedSupervision,
    ReadSupervision,
    bytes_per_token,
    decode_supervision,
    encode_supervision,
    read_supervision,
)
from eagle_rpc.supervision.fingerprint import tokenizer_fingerprint, weights_fingerprint
from eagle_rpc.supervision.output import Eagle3Target, TargetOutput
from eagle_rpc.supervision.plain import compute_supervision
from eagle_rpc.supervision.rows import RowsRead, fused_rows_run, read_rows, read_rows_fused
from eagle_rpc.supervision.session import (
    GenerateRequest,
    ModelInfo,
    OpenedSession,
    Pulse,
    SessionSpec,
    TargetExpectation,
)
from eagle_rpc.supervision.shift import shift_left
from eagle_rpc.supervision.storage import own_storage, to_device, to_host
from eagle_rpc.supervision.tokens import BatchRows, TokenBatch, shifted_loss_mask
from eagle_rpc.supervision.vocab import VocabMapping

__all__ = [
    "ENCODINGS",
    "BatchRows",
    "DraftHead",
    "DraftTargets",
    "DraftVocabOnDevice",
    "Eagle3Target",
    "Eagle3TargetBackend",
    "Eagle3TargetBatch",
    "EncodedSupervision",
    "GenerateRequest",
    "ModelInfo",
    "OpenedSession",
    "ProjectedTargets",
    "Pulse",
    "ReadSupervision",
    "RowsRead",
    "SessionSpec",
    "StoredLogits",
    "StoredProbs",
    "TargetExpectation",
    "TargetOutput",
    "TokenBatch",
    "VocabMapping",
    "bytes_per_token",
    "compute_supervision",
    "decode_supervision",
    "encode_supervision",
    "fused_rows_run",
    "own_storage",
    "read_rows",
    "read_rows_fused",
    "read_supervision",
    "shift_left",
    "shifted_loss_mask",
    "to_device",
    "to_host",
    "tokenizer_fingerprint",
    "weights_fingerprint",
]
