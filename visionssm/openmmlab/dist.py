"""Distributed training with and without GPUs: process groups, and fully sharded models."""
import gc
import os
import subprocess
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from mmengine.utils import apply_to
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..utils.suggest import did_you_mean

SHARD_KEYS = ('type', 'min_params', 'param_dtype', 'reduce_dtype', 'reshard_after_forward')


def init_cpu_group(launcher: str, backend: str = 'gloo', **kwargs: Any) -> None:
    """Join the process group of a launcher without touching any GPU, which MMEngine's own function does.

    Args:
        launcher: ``pytorch``, ``slurm`` or ``mpi``.
        backend: ``gloo`` or ``mpi``; ``nccl``, the default of many configs, is read as ``gloo``.
        **kwargs: What ``torch.distributed.init_process_group`` takes.
    """
    env = os.environ
    env.setdefault('MASTER_PORT', '29500')
    if launcher == 'slurm':
        env.update(RANK=env['SLURM_PROCID'], WORLD_SIZE=env['SLURM_NTASKS'], LOCAL_RANK=env.get('SLURM_LOCALID', '0'))
        if 'MASTER_ADDR' not in env:
            hosts = subprocess.run(['scontrol', 'show', 'hostnames', env['SLURM_NODELIST']], capture_output=True,
                                   text=True, check=True)
            env['MASTER_ADDR'] = hosts.stdout.split()[0]
    elif launcher == 'mpi':
        env.update(RANK=env['OMPI_COMM_WORLD_RANK'], WORLD_SIZE=env['OMPI_COMM_WORLD_SIZE'],
                   LOCAL_RANK=env['OMPI_COMM_WORLD_LOCAL_RANK'])
    elif launcher != 'pytorch':
        raise ValueError(f"launcher must be 'none', 'pytorch', 'slurm' or 'mpi', got {launcher!r}")
    if 'RANK' not in env:
        raise ValueError(f'--launcher {launcher} needs the variables of its launcher; start the tool with '
                         'tools/dist_train.sh or torchrun --nproc_per_node=N tools/train.py ... --launcher pytorch')
    dist.init_process_group('gloo' if backend == 'nccl' else backend, **kwargs)


def leave_group() -> None:
    """Close the process group, if there is one, before the interpreter ends.

    Its threads release tensors, for which they need the interpreter: one that is late aborts the process.
    """
    if dist.is_initialized():
        # a wrapped model keeps the group alive, and what trained it holds the model in a cycle
        gc.collect()
        dist.destroy_process_group()


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` split the parameters of a model over the processes."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, cfg: dict, device_type: str) -> nn.Module:
    """Split parameters, gradients and optimizer state over all processes (PyTorch's ``fully_shard``).

    Blocks are sharded one by one, so that only one of them is whole in memory at a time.

    Args:
        model: The model, equal on all processes.
        cfg: ``min_params``: smallest element of a ``ModuleList`` or ``Sequential`` that is sharded for itself
            (100,000). ``param_dtype``, ``reduce_dtype``: as in torch's ``MixedPrecisionPolicy``, by name.
            ``reshard_after_forward`` (True): whether parameters are freed between forward and backward.
        device_type: The device of the process group.

    Returns:
        The same module, sharded.
    """
    unknown = sorted(set(cfg) - set(SHARD_KEYS))
    if unknown:
        raise ValueError(f'model_wrapper_cfg of FullyShard has no key {unknown[0]!r}. '
                         f'{did_you_mean(unknown[0], SHARD_KEYS)} It takes {", ".join(SHARD_KEYS)}.')
    mesh = torch.distributed.init_device_mesh(device_type, (dist.get_world_size(),))
    dtypes = {key: getattr(torch, cfg[key]) for key in ('param_dtype', 'reduce_dtype') if cfg.get(key)}
    options = {'mesh': mesh, 'mp_policy': MixedPrecisionPolicy(**dtypes),
               'reshard_after_forward': cfg.get('reshard_after_forward', True)}
    smallest = cfg.get('min_params', 100_000)
    blocks = [block for holder in model.modules() if isinstance(holder, nn.ModuleList | nn.Sequential)
              for block in holder if sum(p.numel() for p in block.parameters()) >= smallest]
    # inner blocks come first, as fully_shard asks; shared or nested holders name a block once
    for block in reversed(list(dict.fromkeys(blocks))):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """Cut the parameters of a sharded model again after a forward pass that no backward pass follows.

    PyTorch keeps the outermost parameters whole for a backward pass, and so would miss what an average writes into
    the parts. A model that is not sharded is left alone.

    Args:
        model: The model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(state: Any) -> Any:
    """Make every sharded tensor of a nested state whole, on the CPU; all processes must call it.

    Args:
        state: Nested dictionaries, lists and tensors.

    Returns:
        The same structure with plain tensors.
    """
    return apply_to(state, lambda x: isinstance(x, torch.Tensor),
                    lambda x: (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu())


def scatter_like(full: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Cut whole tensors the way a sharded model keeps them.

    Args:
        full: A state dict of whole tensors, the same on all processes.
        model: The sharded model.

    Returns:
        The state dict that the model loads.
    """
    own = model.state_dict()
    return {key: cut_like(value, own[key]) if key in own else value for key, value in full.items()}


def cut_like(full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cut one whole tensor the way ``target`` is cut; tensors of other shapes, such as step counters, stay whole."""
    if not isinstance(target, DTensor) or full.shape != target.shape:
        return full
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)


def scatter_optimizer(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Cut the state dict of an optimizer the way its parameters are cut.

    Args:
        state: A state dict of whole tensors.
        optimizer: The optimizer of the sharded model.

    Returns:
        The state dict that the optimizer loads.
    """
    params = [param for group in optimizer.param_groups for param in group['params']]
    slots = {index: {name: cut_like(value, params[index]) if isinstance(value, torch.Tensor) else value
                     for name, value in slot.items()} for index, slot in state['state'].items()}
    return {**state, 'state': slots}
