"""The calls and values that RPC permits: at targets requests of trainers, at trainers answers of targets."""

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.rpc import WORLD_FUNCTIONS, Permissions
from eagle_rpc.rpc.elastic import introduce
from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.rpc.link import call_hosted, hosted_rref
from eagle_rpc.service.endpoint import CONTROL_METHODS, STAGE_METHODS, StageEndpoint, TargetEndpoint
from eagle_rpc.supervision import (
    AnswerPrompt,
    AnswerRequest,
    AnswerSettings,
    DraftHead,
    EncodedSupervision,
    GenerateRequest,
    HeartbeatReply,
    ModelInfo,
    OpenedSession,
    PromptAnswer,
    ServiceTimes,
    SessionSpec,
    StageBeat,
    StageInfo,
    StagePass,
    StageShare,
    TargetExpectation,
    TokenBatch,
    WeightSamples,
)
from eagle_rpc.topology import Role

_REQUESTS = {GenerateRequest, SessionSpec, TargetExpectation, TokenBatch}
_REQUESTS |= {AnswerPrompt, AnswerRequest, AnswerSettings}
_REPLIES = {
    Ok,
    Failure,
    DraftHead,
    EncodedSupervision,
    HeartbeatReply,
    ModelInfo,
    OpenedSession,
    PromptAnswer,
    ServiceTimes,
}
# Between the stages of a target.
_STAGE_REQUESTS = {StagePass, TokenBatch}
_STAGE_REPLIES = {Ok, Failure, DraftHead, StageBeat, StageInfo, StageShare, WeightSamples}


def permissions(config: RpcConfig, role: Role | None, *, hand_over_bytes: int = 0) -> Permissions:
    """Of an elastic worker of this role; None: of a worker of a static job, which may have every role.

    `hand_over_bytes`: of the largest message between two stages of a target; 0: it has one stage.
    """
    serves, asks = role in (None, Role.target), role in (None, Role.trainer)
    is_stage = role is Role.stage or (role is None and hand_over_bytes > 0)
    asks_stages = is_stage or (role is Role.target and hand_over_bytes > 0)
    functions = [hosted_rref, call_hosted, *([introduce] if role else WORLD_FUNCTIONS)]
    types: set[type] = set()
    proxied: set[type] = set()
    methods: dict[type, frozenset[str]] = {}
    if serves:
        types |= _REQUESTS
        methods[TargetEndpoint] = CONTROL_METHODS
    if asks:
        types |= _REPLIES
        proxied.add(TargetEndpoint)
    if is_stage:
        types |= _STAGE_REQUESTS
        methods[StageEndpoint] = STAGE_METHODS
    if asks_stages:
        types |= _STAGE_REPLIES
        proxied.add(StageEndpoint)
    return Permissions(
        functions=frozenset(functions if methods else ()),
        methods=methods,
        types=frozenset(types),
        proxied=frozenset(proxied),
        max_pickle_bytes=config.max_pickle_bytes,
        max_request_bytes=max(config.max_request_bytes, hand_over_bytes if is_stage else 0),
    )
