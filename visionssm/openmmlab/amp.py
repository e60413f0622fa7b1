"""Mixed precision on every device: an optimizer wrapper with autocast, and a gradient scaler where it is needed."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.device import get_device
from mmengine.optim import OptimWrapper as _OptimWrapper

from ..registry import OPTIM_WRAPPERS

DTYPES = {'bf16': torch.bfloat16, 'bfloat16': torch.bfloat16, 'fp16': torch.float16, 'float16': torch.float16}


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(_OptimWrapper):
    """MMEngine's wrapper, which here also reads the norm of sharded gradients."""

    def _clip_grad(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not params:
            return
        norm = self.clip_func(params, **self.clip_grad_kwargs)
        if norm is not None:
            # a sharded model returns a distributed scalar whose local part is not the norm
            norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm
            self.message_hub.update_scalar(f'train/{self.grad_name}', float(norm))


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(OptimWrapper):
    """Autocast around the forward pass; float16 adds dynamic loss scaling.

    Replaces MMEngine's wrapper of the same name, which refuses to run without a GPU. State-space models prefer
    bfloat16: its range is float32's, so the recurrence does not overflow and no scaling is needed.

    Args:
        dtype: ``bfloat16`` (or ``bf16``) or ``float16`` (or ``fp16``); float16 needs a GPU.
        loss_scale: ``dynamic``, a fixed scale, or arguments of the gradient scaler; read with float16 only.
        **kwargs: What :class:`OptimWrapper` takes.
    """

    def __init__(self, dtype: str = 'bfloat16', loss_scale: str | float | dict = 'dynamic', **kwargs: object) -> None:
        super().__init__(**kwargs)
        if dtype not in DTYPES:
            raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}')
        self.cast_dtype = DTYPES[dtype]
        self.device_type = get_device()
        self.loss_scaler = None
        if self.cast_dtype is torch.float16:
            if self.device_type == 'cpu':
                raise ValueError('float16 training needs a GPU: its gradients underflow without loss scaling, which '
                                 'CPUs lack; use --amp bf16')
            options = {'dynamic': {}}.get(loss_scale) if isinstance(loss_scale, str) else loss_scale
            if options is None:
                raise ValueError(f"loss_scale must be 'dynamic', a number or a dict, got {loss_scale!r}")
            if not isinstance(options, dict):
                # an interval beyond any training keeps the scale where it was set
                options = {'init_scale': float(options), 'growth_interval': 2**31 - 1}
            self.loss_scaler = torch.amp.GradScaler(self.device_type, **options)

    def backward(self, loss: torch.Tensor, **kwargs: object) -> None:
        """Back-propagate the loss, scaled in float16.

        Args:
            loss: Scalar.
            **kwargs: What ``Tensor.backward`` takes.
        """
        super().backward(loss if self.loss_scaler is None else self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs: object) -> None:
        """Clip and update the parameters; in float16 a step with overflowed gradients is skipped.

        Args:
            **kwargs: What the optimizer's ``step`` takes.
        """
        if self.loss_scaler is None:
            super().step(**kwargs)
            return
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()

    def state_dict(self) -> dict:
        """State of the optimizer and of the scaler.

        Returns:
            A dictionary that :meth:`load_state_dict` takes.
        """
        state = super().state_dict()
        if self.loss_scaler is not None:
            state['loss_scaler'] = self.loss_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state, also one that was saved without mixed precision or with another dtype.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        scaler = state_dict.pop('loss_scaler', None)
        if scaler and self.loss_scaler is not None:
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no gradient synchronisation while gradients accumulate.

        Args:
            model: The model that trains.

        Yields:
            Nothing.
        """
        with super().optim_context(model), torch.autocast(self.device_type, dtype=self.cast_dtype):
            yield
