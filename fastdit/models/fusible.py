"""When a submodule may be passed over: a fused function may do its work, or it has to be called.

LoRA and quantisation replace `nn.Linear`, hooks observe it, accelerate patches its `forward`; all of them expect the
submodule to be called as the original calls it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def user_hooks(module: nn.Module) -> list[Any]:
    """The hooks that see calls of `module`: its own and those on all modules, as profilers register them.

    Without those of FSDP2, which do not change what passes through.
    """
    registered = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return [
        hook
        for hooks in registered
        for hook in hooks.values()
        if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
    ]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind`, its parameters are plain tensors, and nobody listens to its calls."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not user_hooks(module)
        and all(
            type(p) in (nn.Parameter, Tensor) for p in module._parameters.values() if p is not None
        )
    )
