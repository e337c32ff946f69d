"""Targets and trainers of a static job: every worker of a torchrun comes here and plays its role."""

import contextlib

import torch

from eagle_rpc.config import Config
from eagle_rpc.config.compose import write_config
from eagle_rpc.jobs.setting import run_directory, start_worker
from eagle_rpc.jobs.target_worker import hosted_target, serve_until_done
from eagle_rpc.jobs.trainer_worker import train_until_done
from eagle_rpc.rpc import join
from eagle_rpc.topology import Role, assign_roles, plan_devices, read_world


def run(config: Config) -> int:
    """Returns 0 when training is done; errors are raised."""
    world = read_world()
    cast = assign_roles(config.topology, world)
    start_worker(config, cast.me.name, workers_on_host=world.local_size)
    setting = config.train.device if cast.me.has(Role.trainer) else config.target.device
    devices = plan_devices(cast, setting=setting, local_rank=world.local_rank, num_gpus=torch.cuda.device_count())
    device = torch.device(devices.device)
    with contextlib.ExitStack() as stack:
        if cast.me.name == cast.trainer_names[0]:
            directory = run_directory(config)
            stack.enter_context(directory.claimed(config.train.resume))
            write_config(config, directory.config)
        membership = stack.enter_context(join(cast, world, config.rpc, devices))
        if config.topology.single:
            stack.enter_context(hosted_target(config, device, membership))
            train_until_done(config, device, membership)
        elif cast.me.has(Role.target):
            serve_until_done(config, device, membership)
        else:
            train_until_done(config, device, membership)
    return 0
