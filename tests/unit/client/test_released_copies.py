"""When a trainer gives up the copy of embedding and head rows that the trainers of its host share."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch
from fake_membership import SETTINGS, FakeMembership, FakeTarget
from support.tiny_target import tiny_mapping

from eagle_rpc.client import ClientSettings, RemoteEagle3TargetModel
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import TargetExpectation


# On the meta device, as on a GPU, tensors are copies.
@pytest.mark.parametrize(("device", "released"), [("meta", True), ("cpu", False)])
def test_only_a_trainer_that_has_its_tensors_on_another_device_gives_the_hosts_copy_up_early(
    server: TargetModelServer, tmp_path: Path, device: str, released: bool
):
    backend = RemoteEagle3TargetModel(
        FakeMembership(FakeTarget("target0", server)),
        settings=ClientSettings(**SETTINGS, shared_dir=tmp_path),
        expected=TargetExpectation(),
        device=torch.device(device),
        stop=threading.Event(),
    )
    with contextlib.closing(backend):
        backend.open_session(tiny_mapping())
        embedding = backend.input_embeddings()
        files = sorted(tmp_path.rglob("*.safetensors"))
        backend.release_host_copies()
        assert len(files) == 2 and [file.exists() for file in files] == [not released] * 2
        assert torch.equal(embedding, server.input_embeddings())
    assert list(tmp_path.rglob("*.safetensors")) == []
