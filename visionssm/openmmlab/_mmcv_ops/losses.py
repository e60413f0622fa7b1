"""Focal losses with closed forms of their gradients."""
import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import widened

__all__ = [
    'sigmoid_focal_loss_backward', 'sigmoid_focal_loss_forward', 'softmax_focal_loss_backward',
    'softmax_focal_loss_forward']


def _weighted(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Rows times the weight of their class; an empty `weight` stands for none."""
    if not weight.numel():
        return values
    factors = weight[target].to(values.dtype)
    return values * (factors[:, None] if values.dim() == 2 else factors)


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss of independent classes, -alpha (1 - p)^gamma log p of the target and its mirror image elsewhere.

    Args:
        input: Logits (N, C).
        target: Classes (N,); others than 0 to C - 1 stand for the background.
        weight: Weights (C,) of the classes, or empty.
        output: Receives the losses (N, C).
        gamma: Exponent that turns the loss towards hard examples.
        alpha: Weight of positive examples; negative ones weigh 1 - alpha.
    """
    logits, = widened(input)
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    # The logit's sign decides which of two mirror images a class sees.
    signed = torch.where(positive, logits, -logits)
    loss = -torch.where(positive, alpha, 1 - alpha) * signed.neg().sigmoid() ** gamma * F.logsigmoid(signed)
    output.copy_(_weighted(loss, target, weight))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Gradient of `sigmoid_focal_loss_forward` by the logits.

    Args:
        input: Logits (N, C).
        target: Classes (N,).
        weight: Weights (C,) of the classes, or empty.
        grad_input: Receives the gradient (N, C).
        gamma: Exponent.
        alpha: Weight of positive examples.
    """
    logits, = widened(input)
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    signed = torch.where(positive, logits, -logits)
    missed = signed.neg().sigmoid()
    slope = -missed ** gamma * (missed - gamma * signed.sigmoid() * F.logsigmoid(signed))
    grad = torch.where(positive, alpha * slope, (alpha - 1) * slope)
    grad_input.copy_(_weighted(grad, target, weight))


def _target_probability(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Softmax, probability of the target, whether there is a target, and the smallest number."""
    softmax, = widened(input)
    known = target >= 0
    return softmax, softmax.gather(1, target.clamp(min=0)[:, None])[:, 0], known, torch.finfo(softmax.dtype).tiny


def softmax_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss of exclusive classes, -alpha (1 - p)^gamma log p.

    Args:
        input: Softmax (N, C).
        target: Classes (N,); negative ones cost nothing.
        weight: Weights (C,) of the classes, or empty.
        output: Receives the losses (N,).
        gamma: Exponent that turns the loss towards hard examples.
        alpha: Factor.
    """
    _, probability, known, tiny = _target_probability(input, target)
    loss = -alpha * (1 - probability).clamp(min=0) ** gamma * probability.clamp(min=tiny).log() * known
    output.copy_(_weighted(loss, target, weight))


def softmax_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor,
                                gamma: float, alpha: float) -> None:
    """Gradient of `softmax_focal_loss_forward` by the logits under the softmax.

    Args:
        input: Softmax (N, C).
        target: Classes (N,).
        weight: Weights (C,) of the classes, or empty.
        buff: Buffer (N,); not used.
        grad_input: Receives the gradient (N, C).
        gamma: Exponent.
        alpha: Factor.
    """
    softmax, probability, known, tiny = _target_probability(input, target)
    # Away from 0, because 0 to a negative power is infinite where gamma < 1.
    missed = (1 - probability).clamp(min=tiny)
    slope = alpha * missed ** gamma * (gamma / missed * probability * probability.clamp(min=tiny).log() - 1)
    slope = _weighted(slope * known, target, weight)
    grad_input.copy_(slope[:, None] * (F.one_hot(target.clamp(min=0), softmax.shape[1]) - softmax))
