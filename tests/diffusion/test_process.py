"""The diffusion process against tables and losses of the official code, and its options against their formulas."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributions import Normal, kl_divergence

from visionssm.diffusion.process import GaussianDiffusion, make_betas, respaced_timesteps

OUTER = Path(__file__).resolve().parent.parent.parent.parent / 'shared' / 'golden' / 'dis'
CASES = ['diffusion_default', 'diffusion_respaced250_cosine_rescaled']
outer = pytest.mark.skipif(not OUTER.is_dir(), reason=f'no outer fixtures at {OUTER}')


def read(case: str) -> tuple[dict, GaussianDiffusion]:
    with safe_open(OUTER / f'{case}.safetensors', 'pt') as file:
        config, tensors = json.loads(file.metadata()['config']), {key: file.get_tensor(key) for key in file.keys()}
    process = GaussianDiffusion(
        schedule=config.get('noise_schedule', 'linear'), respacing=config['timestep_respacing'],
        rescale_vlb=config.get('rescale_learned_sigmas', False))
    return tensors, process


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


@outer
@pytest.mark.parametrize('case', CASES)
def test_tables(case):
    tensors, process = read(case)
    ours = {'betas': process.betas, 'alphas_cumprod': process.alphas_cumprod,
            'posterior_log_variance_clipped': process.posterior_log_variance, 'timestep_map': process.timesteps}
    for name, table in ours.items():
        torch.testing.assert_close(table, tensors[f'table.{name}'], rtol=1e-10, atol=1e-12)
    for key in (key for key in tensors if key.startswith('respace.') and key.endswith('.betas')):
        name = key.split('.')[1]
        schedule = 'linear' if case == CASES[0] else 'squaredcos_cap_v2'
        short = GaussianDiffusion(schedule=schedule, respacing=json.loads(name) if name[0] == '[' else name)
        torch.testing.assert_close(short.betas, tensors[key], rtol=1e-10, atol=1e-12)
        assert torch.equal(short.timesteps, tensors[f'respace.{name}.timestep_map'])


@outer
@pytest.mark.parametrize('case', CASES)
def test_steps_and_losses(case):
    tensors, process = read(case)
    x, noise, t = tensors['x_start'], tensors['noise'], tensors['t']
    noisy = process.q_sample(x, t, noise)
    close(noisy, tensors['q_sample'])
    close(process.q_posterior(x, noisy, t).mean, tensors['posterior_mean'])
    for clip in (0, 1):
        posterior = process.p_posterior(tensors['model_output'], noisy, t, bool(clip))
        for ours, theirs in zip(posterior, ('mean', 'log_variance', 'pred_xstart'), strict=True):
            close(ours, tensors[f'p_mean_variance.clip{clip}.{theirs}'])
    torch.testing.assert_close(
        process.bound(x, tensors['model_output'], noisy, t, clip=True), tensors['vb_terms_bpd.clip1.output'],
        rtol=5e-4, atol=1e-5)
    output = tensors['model_output'].clone().requires_grad_()
    losses = process.losses(x, output, noise, t)
    for ours, theirs in (('loss', 'loss'), ('mse', 'mse'), ('vlb', 'vb')):
        torch.testing.assert_close(losses[ours], tensors[f'training_losses.{theirs}'], rtol=5e-4, atol=1e-6)
    losses['loss'].mean().backward()
    close(output.grad, tensors['training_losses.grad_model_output_of_mean_loss'], 5e-4)


def test_a_perfect_prediction_costs_nothing_whatever_is_predicted():
    torch.manual_seed(0)
    x, noise, t = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4), torch.tensor([1, 400, 999])
    for kind in ('epsilon', 'v_prediction', 'sample'):
        process = GaussianDiffusion(prediction_type=kind, learn_sigma=False)
        a = process.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        target = {'epsilon': noise, 'sample': x, 'v_prediction': a.sqrt() * noise - (1 - a).sqrt() * x}[kind]
        losses = process.losses(x, target, noise, t)
        assert losses.keys() == {'loss', 'mse'} and losses['loss'].max() < 1e-10
        close(process.p_posterior(target, process.q_sample(x, t, noise), t).sample, x, 2e-3)


def test_the_weights_by_signal_are_the_same_loss_of_the_clean_image():
    torch.manual_seed(0)
    x, noise, t = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([10, 300, 700])
    guess = torch.rand(3, 1, 4, 4)
    values = {}
    for kind in ('epsilon', 'v_prediction', 'sample'):
        process = GaussianDiffusion(prediction_type=kind, learn_sigma=False, snr_gamma=5.0)
        a = process.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        noisy = process.q_sample(x, t, noise)
        implied = (noisy - a.sqrt() * guess) / (1 - a).sqrt()
        output = {'epsilon': implied, 'sample': guess, 'v_prediction': a.sqrt() * implied - (1 - a).sqrt() * guess}
        values[kind] = process.losses(x, output[kind], noise, t)['mse']
    torch.testing.assert_close(values['epsilon'], values['sample'], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(values['v_prediction'], values['sample'], rtol=1e-3, atol=1e-5)


def test_the_bound_is_a_divergence_at_last_a_likelihood_and_teaches_the_variance_alone():
    torch.manual_seed(0)
    process = GaussianDiffusion(respacing='8', rescale_vlb=True)
    x, noise = (torch.randn(3, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    x, t = x.tanh() * 0.9, torch.tensor([0, 3, 7])
    output = torch.cat([noise + 0.1 * torch.randn_like(noise), torch.randn_like(noise).tanh()], 1).requires_grad_()
    noisy, a = process.q_sample(x, t, noise), process.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, a.sqrt() * x + (1 - a).sqrt() * noise, rtol=0, atol=1e-12)
    true, model = (Normal(found.mean, (found.log_variance / 2).exp().expand_as(x)) for found in (
        process.q_posterior(x, noisy, t), process.p_posterior(output, noisy, t)))
    likelihood = (model.cdf(x + 1 / 255) - model.cdf(x - 1 / 255)).log()
    bits = [value.flatten(1).mean(1) * process.num_steps / 1000 / math.log(2)
            for value in (-likelihood, kl_divergence(true, model))]
    vlb = process.losses(x, output, noise, t)['vlb']
    # the official code takes tanh for the error function
    torch.testing.assert_close(vlb[:1], bits[0][:1], rtol=1e-2, atol=0)
    torch.testing.assert_close(vlb[1:], bits[1][1:])
    vlb.sum().backward()
    assert not output.grad[:, :1].any() and output.grad[:, 1:].all()


def test_half_precision_outputs_have_float32_losses():
    process = GaussianDiffusion()
    x, noise, t = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0, 999])
    losses = process.losses(x, torch.randn(2, 2, 4, 4).half(), noise, t)
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in losses.values())


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: make_betas('cosine'), 'squaredcos_cap_v2'),
    (lambda: make_betas(steps=0), 'steps is 0'),
    (lambda: respaced_timesteps(1000, 'ddim999'), 'No integer stride'),
    (lambda: respaced_timesteps(1000, '0'), '1 to 1000'),
    (lambda: respaced_timesteps(10, [11]), '1 to 10'),
    (lambda: GaussianDiffusion(prediction_type='noise'), 'epsilon'),
    (lambda: GaussianDiffusion(snr_gamma=0), 'above 0'),
    (lambda: GaussianDiffusion().losses(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4),
                                        torch.tensor([0])), 'learn_sigma=True needs 6'),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
