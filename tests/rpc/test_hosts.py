"""Training over several hosts, each a network of its own, on a wire that delays and loses packets."""

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.checks import Check, same_training
from faults.spread import SpreadService
from faults.workspace import Workspace
from faults.zygote import Zygote
from support.hosts import INTERFACE, Host, Wire, joined_hosts, missing
from support.processes import Command, descendants, ended_at_last
from support.tunnel import TUNNEL, Tunnel, missing_wireguard, tunnel_between
from support.waiting import pause

pytestmark = [
    pytest.mark.rpc,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

STEPS = 40
CUT_SECONDS = 20.0
REFERENCE = "one_host"
NAMES = ("north", "south", "west")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("hosts")).prepare()


@pytest.fixture(scope="module")
def zygote(workspace: Workspace) -> Iterator[Zygote]:
    others = {process.pid for process in descendants(without=set())}
    with Zygote(workspace.path, workspace.environment) as zygote:
        log = workspace.logs / "model.log"
        maker = zygote.fork("faults.workspace:make_model", [str(workspace.model)], log=log)
        with ended_at_last(lambda: [maker]):
            assert maker.ends(within=60) and maker.poll() == 0, maker.end_of_log()
        yield zygote
        for process in descendants(without={zygote.pid, *others}):
            process.kill()


def training(workspace: Workspace) -> list[str]:
    return [*workspace.training_settings(steps=STEPS, seed=1), "train.validate_every=0"]


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, workspace: Workspace) -> None:
    """A run of two trainers with everything on one host."""
    with joined_hosts(["alone"], workspace.path) as wire:
        places = dict.fromkeys(("registry", "target0", "trainer0", "trainer1"), wire.hosts[0])
        service = SpreadService(zygote, workspace, places, REFERENCE)
        with ended_at_last(lambda: service.processes):
            service.start(training(workspace))
            service.reach(STEPS)
            assert set(service.finish().values()) == {0}, service.ends_of_logs()


@pytest.fixture
def wire(workspace: Workspace, request: pytest.FixtureRequest) -> Iterator[Wire]:
    with joined_hosts(NAMES[: request.param], workspace.path) as joined:
        yield joined


def require_same(workspace: Workspace, run: str) -> None:
    checks = same_training(workspace, run, REFERENCE, STEPS, trainers=2)
    assert [check for check in checks if not check.holds] == list[Check]()


def placed(hosts: list[Host], **workers: int) -> dict[str, Host]:
    return {name: hosts[number] for name, number in workers.items()}


OVER_TWO = {"registry": 0, "target0": 0, "target1": 0, "trainer0": 1, "trainer1": 1}
OVER_THREE = {"registry": 0, "target0": 0, "target1": 1, "trainer0": 2, "trainer1": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("wire", "places"), [(2, OVER_TWO), (3, OVER_THREE)], indirect=["wire"])
@pytest.mark.usefixtures("undisturbed")
def test_a_service_over_hosts_trains_the_bits_of_one_host(
    zygote: Zygote, workspace: Workspace, wire: Wire, places: dict[str, int]
):
    run = f"over_{len(wire.hosts)}"
    service = SpreadService(zygote, workspace, placed(wire.hosts, **places), run)
    with ended_at_last(lambda: service.processes):
        service.start(training(workspace))
        service.reach(STEPS)
        assert set(service.finish().values()) == {0}, service.ends_of_logs()
    require_same(workspace, run)
    # A host's own name is 127.0.1.1 there, the address that torch would take.
    for name in ("target0", "trainer0"):
        assert f" listens on uv://{service.places[name].address}:" in service.running[name].log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("wire", [3], indirect=True)
@pytest.mark.usefixtures("undisturbed")
def test_a_cut_of_20_s_between_halves_delays_training_and_changes_no_bit(
    zygote: Zygote, workspace: Workspace, wire: Wire
):
    service = SpreadService(zygote, workspace, placed(wire.hosts, **OVER_THREE), "cut")
    with ended_at_last(lambda: service.processes):
        service.start(training(workspace))
        service.reach(STEPS // 4)
        *half, lonely = wire.hosts
        wire.cut(half, [lonely])
        pause(CUT_SECONDS)
        service.progress.look()
        assert service.progress.step < STEPS, "the cut has to hit a run that goes on"
        wire.mend()
        service.reach(STEPS)
        assert set(service.finish().values()) == {0}, service.ends_of_logs()
    require_same(workspace, "cut")


@pytest.mark.slow
@pytest.mark.parametrize("wire", [3], indirect=True)
@pytest.mark.usefixtures("undisturbed")
def test_a_host_that_is_lost_with_several_targets_takes_no_bit_with_it(
    zygote: Zygote, workspace: Workspace, wire: Wire
):
    places = {"registry": 2, "target0": 0, "target1": 0, "target2": 1, "trainer0": 2, "trainer1": 2}
    service = SpreadService(zygote, workspace, placed(wire.hosts, **places), "lost")
    with ended_at_last(lambda: service.processes):
        service.start(training(workspace))
        service.reach(STEPS // 4)
        lost, *others = wire.hosts
        # Without power a host says nothing, so its connections end nowhere.
        wire.cut([lost], others)
        service.lose(lost)
        service.reach(STEPS)
        assert set(service.finish().values()) == {0}, service.ends_of_logs()
    require_same(workspace, "lost")


@pytest.mark.slow
@pytest.mark.parametrize("wire", [2], indirect=True)
@pytest.mark.usefixtures("undisturbed")
def test_a_static_job_of_two_torchrun_agents_trains_the_bits_of_one_host(workspace: Workspace, wire: Wire):
    agents = []
    for host, role, workers in zip(wire.hosts, ("target", "trainer"), (1, 2), strict=True):
        torchrun = [sys.executable, *"-m torch.distributed.run --nnodes=2 --rdzv-backend=c10d".split()]
        torchrun += [f"--rdzv-endpoint={wire.hosts[0].address}:29500", f"--local-addr={host.address}"]
        # Where its name is 127.0.1.1, torchrun does not know its own address as its own.
        torchrun += [f"--rdzv-conf=is_host={str(host is wire.hosts[0]).lower()}"]
        torchrun += [f"--role={role}", f"--nproc-per-node={workers}", "-m", "eagle_rpc"]
        job = ["job=train", "topology=1x2", f"rpc.interface={INTERFACE}", "run.name=static", "run.threads=1"]
        model = ["target=hf", "target.dtype=float32", "target.device=cpu", f"target.model={workspace.model}"]
        words = host.command(*torchrun, *job, *model, *training(workspace), directory=workspace.path)
        command = Command(role, words, workspace.environment)
        agents.append(command.start(log=workspace.logs / f"static.{role}.log", directory=workspace.path))
    with ended_at_last(lambda: agents):
        for agent in agents:
            assert agent.ends(within=300) and agent.poll() == 0, agent.end_of_log(40)
    require_same(workspace, "static")


@pytest.mark.parametrize("wire", [1], indirect=True)
def test_a_registry_by_a_name_that_is_loopback_on_its_own_host_is_refused(workspace: Workspace, wire: Wire):
    (host,) = wire.hosts
    words = ["job=registry", f"rpc.interface={INTERFACE}", f"rpc.registry={host.name}:29711"]
    with pytest.raises(RuntimeError) as refusal:
        host.run(sys.executable, "-m", "eagle_rpc", *words)
    rule = f"rpc.registry must be on rpc.interface {INTERFACE}, whose address is {host.address}"
    assert f"{rule}, got {host.name}:29711, which is 127.0.1.1 here" in str(refusal.value)


@pytest.fixture
def tunnel(wire: Wire, tmp_path: Path) -> Iterator[Tunnel]:
    """Between the first two hosts."""
    if missing_wireguard():
        pytest.skip(missing_wireguard())
    with tunnel_between(wire.hosts[:2], tmp_path) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("wire", [2], indirect=True)
@pytest.mark.usefixtures("undisturbed")
def test_a_service_in_a_wireguard_tunnel_trains_the_bits_of_one_host_and_sends_nothing_beside_it(
    zygote: Zygote, workspace: Workspace, wire: Wire, tunnel: Tunnel
):
    places = placed(wire.hosts, **OVER_TWO)
    service = SpreadService(zygote, workspace, places, "tunnel", TUNNEL, tunnel.address_of)
    with ended_at_last(lambda: service.processes):
        service.start(training(workspace))
        service.reach(STEPS)
        assert set(service.finish().values()) == {0}, service.ends_of_logs()
    require_same(workspace, "tunnel")
    assert socket.IPPROTO_UDP in wire.protocols and socket.IPPROTO_TCP not in wire.protocols


@pytest.mark.parametrize("wire", [3], indirect=True)
def test_neighbours_do_not_reach_an_address_of_the_tunnel_and_no_key_is_printed(wire: Wire, tunnel: Tunnel):
    host, peer, neighbour = wire.hosts
    address = tunnel.address_of(host)
    with host.within(lambda: socket.create_server((address, 0))) as server:
        where = server.getsockname()
        neighbour.run("ip", "route", "add", address, "dev", INTERFACE)
        wire.lead(address, host)
        peer.within(lambda: socket.create_connection(where, timeout=20)).close()
        if shutil.which("nft") is None:
            pytest.skip("needs nft (nftables) to keep neighbours off")
        with pytest.raises(TimeoutError):
            neighbour.within(lambda: socket.create_connection(where, timeout=2))
        host.run("nft", "delete", "table", "ip", f"eagle_rpc_{TUNNEL}")
        neighbour.within(lambda: socket.create_connection(where, timeout=20)).close()
    assert not [secret for secret in tunnel.secrets if secret in tunnel.said]
