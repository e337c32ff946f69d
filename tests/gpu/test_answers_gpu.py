"""Answers that a target on a GPU decodes while its passes run on another stream."""

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_targets import MAPPING, RANDOM, batch_of, config_of

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.config.choices import DType
from eagle_rpc.jobs.answering import EngineAnswering
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import AnswerPrompt, AnswerRequest, AnswerSettings, GenerateRequest, SessionSpec
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = ON_A_GPU

WAIT = 120.0
NUM_PROMPTS, NUM_BATCHES, NEW_TOKENS = 48, 12, 40
SETTINGS = AnswerSettings(max_new_tokens=NEW_TOKENS, max_length=200, stop_token_ids=())


@pytest.fixture(scope="module", params=[("eager", DType.float32), ("compiled", DType.float32)])
def served(request, tmp_path_factory):
    form, dtype = request.param
    config = config_of(form, dtype=dtype)
    target = HFEagle3TargetModel.load(config, "cuda", cache_dir=tmp_path_factory.mktemp("cache"))
    server = TargetModelServer(target, config, answering=EngineAnswering(target.model))
    yield server, target.model
    assert server.close()
    torch.compiler.reset()


def prompts():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 150, (NUM_PROMPTS,), generator=draw).tolist()
    return [torch.randint(RANDOM["vocab_size"], (length,), generator=draw) for length in lengths]


def supervision(server, session, number):
    tokens = batch_of(4, 256)
    incarnation = server.model_info().incarnation
    return server.generate(
        GenerateRequest(
            session=session,
            incarnation=incarnation,
            request_id=str(number),
            tokens=tokens,
            seconds_left=WAIT,
        )
    )


def tensors(encoded):
    torch.cuda.synchronize()
    return {name: getattr(encoded, name).cpu() for name in ("aux", "values", "log_normalizer", "argmax")}


def test_answers_and_supervision_are_the_same_beside_each_other(served):
    server, model = served
    engine = AnswerEngine(
        model, batch_size=NUM_PROMPTS, max_new_tokens=NEW_TOKENS, stop_token_ids=SETTINGS.stop_token_ids
    )
    for number, ids in enumerate(prompts()):
        engine.submit(str(number), ids.tolist())
    expected = {answer.key: answer.said_ids for answer in engine.answers()}
    spec = {"selected_token_ids": MAPPING.selected_token_ids}
    asking = server.open_session(SessionSpec(**spec, answers=True, encoding="logits")).result(WAIT).id
    training = server.open_session(SessionSpec(**spec, run="train")).result(WAIT).id
    alone = tensors(supervision(server, training, 0).result(WAIT))
    answers = [
        server.answer(
            AnswerRequest(
                session=asking,
                incarnation=server.model_info().incarnation,
                request_id=str(number),
                prompt=AnswerPrompt(key=str(number), token_ids=ids, settings=SETTINGS),
                seconds_left=WAIT,
            )
        )
        for number, ids in enumerate(prompts())
    ]
    order = []
    answers[-1].add_done_callback(lambda _: order.append("last answer"))
    for number in range(NUM_BATCHES):
        beside = supervision(server, training, number + 1)
        beside.add_done_callback(lambda _: order.append("pass"))
        for name, tensor in tensors(beside.result(WAIT)).items():
            assert tensor.equal(alone[name]), (number, name)
    said = {str(number): future.result(WAIT).token_ids.tolist() for number, future in enumerate(answers)}
    # Rows of other batches round differently, which may decide a near tie of a random model.
    assert sum(said[key] == expected[key] for key in expected) >= NUM_PROMPTS - 2
    assert order.index("pass") < order.index("last answer"), "passes do not wait for answers"
