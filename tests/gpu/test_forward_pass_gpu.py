"""Forward passes that a GPU is given without waiting for it, and those with nothing to supervise."""

import pytest
import torch
from gpu_marks import ON_A_GPU
from gpu_targets import FORMS, batch_of, config_of, pass_request
from gpu_waits import waiting_forbidden

from eagle_rpc.service.forward_pass import ForwardPass
from eagle_rpc.supervision import ENCODINGS, decode_supervision
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = ON_A_GPU


@pytest.fixture(scope="module", params=FORMS)
def forward(request, tmp_path_factory):
    config = config_of(request.param)
    target = HFEagle3TargetModel.load(config, "cuda", cache_dir=tmp_path_factory.mktemp("cache"))
    yield ForwardPass(target, config)
    torch.compiler.reset()


def decoded(encoded, tokens):
    return decode_supervision(encoded.map_tensors(lambda tensor: tensor.cuda()), tokens, None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_starting_a_pass_never_waits_for_the_gpu(forward, encoding, packed):
    request = pass_request(batch_of(4, 256, packed=packed), "cuda", encoding)
    # The first packed batch is preceded by a probe, which waits.
    forward.start(request).finish()
    torch.cuda.synchronize()
    with waiting_forbidden():
        started = forward.start(request)
    encoded = started.finish()
    assert encoded.supervised_rows.numel() > 300


@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_a_batch_with_nothing_to_supervise_leaves_by_the_host(forward, encoding):
    """TensorPipe aborts on a tensor without elements that lies on a GPU."""
    tokens = batch_of(4, 256)
    tokens.loss_mask.zero_()
    encoded = forward.start(pass_request(tokens, "cuda", encoding)).finish()
    assert not encoded.aux.is_cuda and encoded.supervised_rows.numel() == 0
    assert not decoded(encoded, tokens).position_mask.any()
