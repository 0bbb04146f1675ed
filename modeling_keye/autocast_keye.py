"""The dtype of mixed precision for what autocast does not reach: kernels and losses of our own.

Under autocast linear layers give its dtype, while norms and rotations give float32. `scaled_dot_product_attention` is
handed its operands in autocast's dtype; kernels that are operators of their own would multiply in float32, without
tensor cores.
"""

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast would let a matrix product take `x`: its own where autocast is off."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def in_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor in its `autocast_dtype`; the same tensors where autocast is off."""
    return tuple(x.to(autocast_dtype(x)) for x in tensors)
