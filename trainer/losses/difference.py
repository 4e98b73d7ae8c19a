"""What all losses are made of: a squared difference in fp32, or a line where it is large."""

import torch
from torch.nn.functional import huber_loss, mse_loss


def difference(found: torch.Tensor, wanted: torch.Tensor, huber: float | None = None) -> torch.Tensor:
    """Mean squared difference in fp32; 2 huber |x| - huber^2 in place of x^2 where |x| is above `huber`."""
    return mse_loss(found.float(), wanted.float()) if huber is None else differences(found, wanted, huber).mean()


def differences(found: torch.Tensor, wanted: torch.Tensor, huber: float | None) -> torch.Tensor:
    """Of each element; see difference."""
    if huber is None:
        return mse_loss(found.float(), wanted.float(), reduction="none")
    # torch's has half a square: twice it equals the squared difference where the difference is small.
    return 2 * huber_loss(found.float(), wanted.float(), delta=huber, reduction="none")
