"""The Mamba-1 block under `mamba_ssm`'s parameter names, for checkpoints and code written for that package."""
import math

import torch
from torch import nn

from ..drop_in import mamba_inner_fn

__all__ = ['Mamba']


class Mamba(nn.Module):
    """Mamba-1 mixer: input projection, causal convolution, selective scan, gate, output projection.

    Parameter names, shapes and initial values are those of `mamba_ssm`'s block, so its state dicts load.

    Args:
        d_model: Channels C of input and output.
        d_state: State size N.
        d_conv: Filter width W.
        expand: The inner width is `D = expand * d_model`.
        dt_rank: Rank R of the step-size projection; 'auto' means `ceil(C / 16)`.
        dt_min: Least initial step size.
        dt_max: Largest initial step size.
        dt_init: 'random' (uniform) or 'constant' weights of the step-size projection.
        dt_scale: Scale of these weights.
        dt_init_floor: Lower clamp of the initial step sizes.
        conv_bias: Whether the convolution has a bias.
        bias: Whether the two outer projections have one.
        use_fast_path: Accepted for compatibility; there is one path.
        layer_idx: Number of the layer, kept as an attribute.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            d_model: int,
            d_state: int = 16,
            d_conv: int = 4,
            expand: int = 2,
            dt_rank: int | str = 'auto',
            dt_min: float = 0.001,
            dt_max: float = 0.1,
            dt_init: str = 'random',
            dt_scale: float = 1.0,
            dt_init_floor: float = 1e-4,
            conv_bias: bool = True,
            bias: bool = False,
            use_fast_path: bool = True,
            layer_idx: int | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if isinstance(dt_rank, str) and dt_rank != 'auto':
            raise ValueError(f"Mamba: dt_rank is {dt_rank!r}, expected 'auto' or a number")
        if dt_init not in ('random', 'constant'):
            raise ValueError(f"Mamba: dt_init is {dt_init!r}, expected 'random' or 'constant'")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **dd)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **dd)
        self._init_step_size(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        # A = -(1, ..., N) in every channel; kept as a logarithm and, like D, in float32 whatever the dtype.
        states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(states.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        for parameter in (self.dt_proj.bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        self.dt_proj.bias._no_reinit = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **dd)

    def _init_step_size(self, low: float, high: float, kind: str, scale: float, floor: float) -> None:
        """Draw step sizes log-uniformly between `low` and `high` into the bias, through softplus's inverse."""
        bound = self.dt_rank ** -0.5 * scale
        if kind == 'constant':
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        steps = torch.empty_like(self.dt_proj.bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, hidden_states: torch.Tensor, inference_params: object | None = None) -> torch.Tensor:
        """Mix along the sequence.

        Args:
            hidden_states: (B, L, C).
            inference_params: A cache for step-by-step decoding; not supported, pass None.

        Returns:
            (B, L, C).
        """
        if inference_params is not None:
            raise NotImplementedError('Mamba: inference_params (step-by-step decoding) is not supported; pass None')
        xz = self.in_proj(hidden_states).transpose(1, 2)  # (B, L, C) -> (B, 2 D, L)
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        return mamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, A, D=self.D, delta_bias=self.dt_proj.bias, delta_softplus=True)
