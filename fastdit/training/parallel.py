"""A model in many processes: whole in each (DDP), or in shards (FSDP2)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..models import DiT


def replicate(model: DiT, device: torch.device) -> DistributedDataParallel:
    """The model with gradients that are means over all processes."""
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: DiT, device: torch.device, *, bf16: bool) -> None:
    """Leaves each process a shard of every weight, in place; a block's are gathered while it is at work.

    With `bf16` they travel in bfloat16, in which autocast computes with them anyway; gradients are summed in float32.
    What goes into a block is not cast: that would round the residual stream, and make timestep 999 to 1000.
    """
    # A block hands on its branch, a view of its product; nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    travelling = torch.bfloat16 if bf16 else None
    for block in model.blocks:
        policy = MixedPrecisionPolicy(
            param_dtype=travelling,
            reduce_dtype=torch.float32 if bf16 else None,
            cast_forward_inputs=False,
        )
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Embeddings and the final layer have parts that autocast leaves in float32. They are let go after the forward too:
    # a model that is only sampled from has no backward that would, and the average moves on in its shards.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=True)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of the whole gradient, of all shards."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
