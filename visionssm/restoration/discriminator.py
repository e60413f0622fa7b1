"""The discriminator that teaches a restoration network what photographs look like."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ['UNetDiscriminator']


class UNetDiscriminator(nn.Module):
    """A U-Net with spectral normalisation that says of every pixel whether it is real.

    Three halvings and three bilinear doublings with LeakyReLU; what comes up is added to what went down. From
    Real-ESRGAN, "Training real-world blind super-resolution with pure synthetic data",
    https://arxiv.org/abs/2107.10833; 4,376,897 parameters. Computes in float32 whatever autocast says: the largest
    singular values, by which the weights are divided, lose too much in 16 bits.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_feat: int = 64,
            skip: bool = True,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_chans: Channels of the pictures.
            num_feat: Channels at full resolution; they double with each halving.
            skip: Whether what went down is added on the way up.
            device: Where the parameters are.
            dtype: Type of the parameters.
        """
        super().__init__()
        if in_chans < 1 or num_feat < 1:
            raise ValueError(f'in_chans is {in_chans} and num_feat {num_feat}; both must be above 0.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        widths = [num_feat * 2 ** level for level in range(4)]
        self.skip = skip

        def normalised(before: int, after: int, kernel: int, stride: int = 1) -> nn.Module:
            return spectral_norm(nn.Conv2d(before, after, kernel, stride, 1, bias=False, **dd))

        self.conv_first = nn.Conv2d(in_chans, num_feat, 3, 1, 1, **dd)
        self.down = nn.ModuleList(normalised(widths[i], widths[i + 1], 4, 2) for i in range(3))
        self.up = nn.ModuleList(normalised(widths[i + 1], widths[i], 3) for i in reversed(range(3)))
        self.refine = nn.ModuleList(normalised(num_feat, num_feat, 3) for _ in range(2))
        self.conv_last = nn.Conv2d(num_feat, 1, 3, 1, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Judge pictures.

        Args:
            x: Pictures, (B, C, H, W), with sides that 8 divides.

        Returns:
            Logits, (B, 1, H, W), high where the picture looks real.
        """
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f'The pictures are {x.shape[-2]} x {x.shape[-1]}; the sides must be multiples of 8. Set '
                             'the patch of the training data to one.')
        with torch.autocast(x.device.type, enabled=False):
            x = F.leaky_relu(self.conv_first(x.to(self.conv_first.weight.dtype)), 0.2)
            before = []
            for conv in self.down:
                before.append(x)
                x = F.leaky_relu(conv(x), 0.2)
            for conv in self.up:
                x = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
                x = F.leaky_relu(conv(x), 0.2)
                # popped also where it is not added
                other = before.pop()
                x = x + other if self.skip else x
            for conv in self.refine:
                x = F.leaky_relu(conv(x), 0.2)
            return self.conv_last(x)
