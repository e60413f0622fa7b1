"""Samplers on diffusers against single steps and whole loops of the official code, and the pipeline around them."""
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip('diffusers')

from diffusers import AutoencoderKL
from diffusers.schedulers import scheduling_ddpm
from safetensors import safe_open

from visionssm.diffusion import DiS, DiSPipeline, GaussianDiffusion, image_generators, make_scheduler

OUTER = Path(__file__).resolve().parent.parent.parent.parent / 'shared' / 'golden' / 'dis'
CASES = ['diffusion_default', 'diffusion_respaced250_cosine_rescaled']
outer = pytest.mark.skipif(not OUTER.is_dir(), reason=f'no outer fixtures at {OUTER}')


def read(case: str) -> tuple[dict, dict, GaussianDiffusion]:
    with safe_open(OUTER / f'{case}.safetensors', 'pt') as file:
        meta, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
    config = json.loads(meta['config'])
    return tensors, {**meta, **config}, GaussianDiffusion(schedule=config.get('noise_schedule', 'linear'))


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 2e-5) -> None:
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def toy(x: torch.Tensor, t: int) -> torch.Tensor:
    noise = 0.8 * torch.sin(1.3 * x) + 0.3 * torch.cos(torch.tensor(3 * t / 1000)) * x - 0.1 * t / 1000
    return torch.cat([noise, torch.tanh(0.7 * x - t / 1000)], dim=1)


def feed(monkeypatch: pytest.MonkeyPatch, noises: list[torch.Tensor]) -> None:
    """Hand out recorded noise where diffusers would draw it."""
    monkeypatch.setattr(scheduling_ddpm, 'randn_tensor', lambda *_, **__: noises.pop(0))


@outer
@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_ddpm_steps(case, clip, monkeypatch):
    tensors, meta, process = read(case)
    scheduler = make_scheduler('ddpm', process, meta['timestep_respacing'] or 1000, clip)
    steps = scheduler.timesteps.flip(0)
    for i, t in enumerate(tensors['t']):
        feed(monkeypatch, [tensors['step_noise'][i:i + 1]])
        got = scheduler.step(tensors['model_output'][i:i + 1], int(steps[t]), tensors['q_sample'][i:i + 1]).prev_sample
        close(got[0], tensors[f'p_sample.clip{int(clip)}.sample'][i])


@outer
@pytest.mark.parametrize('case', CASES)
def test_ddim_steps(case):
    tensors, meta, process = read(case)
    scheduler = make_scheduler('ddim', process, meta['timestep_respacing'] or 1000, clip=False)
    steps = scheduler.timesteps.flip(0)
    for eta in (0.0, float(meta['eta'])):
        for i, t in enumerate(tensors['t']):
            noise = tensors['step_noise'][i:i + 1] if t else torch.zeros(1)
            got = scheduler.step(tensors['model_output'][i:i + 1], int(steps[t]), tensors['q_sample'][i:i + 1],
                                 eta=eta, variance_noise=noise).prev_sample
            close(got[0], tensors[f'ddim_sample.eta{eta}.sample'][i])


@outer
@pytest.mark.parametrize('loop', ['ddpm', 'ddim', 'ddim_eta'])
@pytest.mark.parametrize('case', CASES)
def test_whole_loops(case, loop, monkeypatch):
    tensors, meta, process = read(case)
    name = loop.partition('_')[0]
    scheduler = make_scheduler(name, process, json.loads(meta['loop'])[f'{name}_respacing'], clip=False)
    assert scheduler.timesteps.tolist() == tensors[f'loop.{loop}.timesteps_seen'].tolist()
    x, noises = tensors[f'loop.{loop}.z'], list(tensors[f'loop.{loop}.noises'])
    for i, t in enumerate(scheduler.timesteps.tolist()):
        feed(monkeypatch, [noises[i]])
        extra = {}
        if name == 'ddim':
            extra = {'eta': float(meta['eta']) if 'eta' in loop else 0.0, 'variance_noise': noises[i] * (t > 0)}
        x = scheduler.step(toy(x, t), t, x, **extra).prev_sample
    close(x, tensors[f'loop.{loop}.sample'])


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('name', ['ddpm', 'ddim', 'dpmsolver++'])
def test_a_perfect_network_finds_the_image(name, kind):
    process = GaussianDiffusion(prediction_type=kind)
    image = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    scheduler = make_scheduler(name, process, 7)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps.tolist():
        a = process.alphas_cumprod[t].float()
        noise = (x - a.sqrt() * image) / (1 - a).sqrt()
        output = {'epsilon': noise, 'sample': image, 'v_prediction': a.sqrt() * noise - (1 - a).sqrt() * image}[kind]
        x = scheduler.step(torch.cat([output, -torch.ones_like(output)], dim=1), t, x).prev_sample
    assert (x - image).abs().max() < 0.05


def pico(num_classes: int = 3, **kwargs: int) -> DiS:
    torch.manual_seed(0)
    return DiS(**{'img_size': 8, 'patch_size': 4, 'in_chans': 1, 'embed_dim': 16, 'depth': 2, **kwargs},
               num_classes=num_classes).eval()


def pipeline(model: DiS, sampler: str = 'ddpm', **kwargs: object) -> DiSPipeline:
    pipe = DiSPipeline(model, make_scheduler(sampler, GaussianDiffusion()), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpmsolver++'])
def test_images_do_not_depend_on_the_batch(sampler):
    pipe = pipeline(pico(), sampler)
    options = {'num_inference_steps': 4, 'output_type': 'pt', 'guidance_scale': 2.0}
    together = pipe([0, 1, 2], generator=image_generators(5, range(3)), **options).images
    for i in range(3):
        alone = pipe([i], generator=image_generators(5, [i]), **options).images
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    other = pipe([0, 1, 2], generator=image_generators(6, range(3)), **options).images
    assert (other - together).abs().max() > 0.01


def test_the_pipeline_saves_and_loads_itself(tmp_path):
    pipe = pipeline(pico(), 'ddim')
    pipe.save_pretrained(tmp_path)
    assert list(tmp_path.glob('transformer/*.safetensors'))
    again = DiSPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    pictures = [p([2], 3, generator=image_generators(0, [0]), output_type='np').images for p in (pipe, again)]
    assert (pictures[0] == pictures[1]).all() and pictures[0].shape == (1, 8, 8, 1)
    image = pipe([1], 2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (8, 8) and image.mode == 'L'


def test_latents_are_decoded():
    vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
                        latent_channels=4, norm_num_groups=4, scaling_factor=0.18215, sample_size=16,
                        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2).eval()
    pipe = pipeline(pico(in_chans=4), vae=vae)
    generator = [torch.Generator().manual_seed(0)]
    latent = pipe([1], 2, generator=generator, output_type='latent').images
    image = pipe([1], 2, generator=[torch.Generator().manual_seed(0)], output_type='pt').images
    expected = (vae.decode(latent / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(image, expected)


def test_a_model_without_classes_draws():
    images = pipeline(pico(0))(batch_size=2, num_inference_steps=2, guidance_scale=1.0, output_type='np').images
    assert images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: make_scheduler('ddmp', GaussianDiffusion()), 'ddpm'),
    (lambda: make_scheduler('ddim', GaussianDiffusion(), 0), 'steps is 0'),
    (lambda: make_scheduler('dpmsolver++', GaussianDiffusion(), '250'), 'its own steps'),
    (lambda: pipeline(pico())([0], 0), 'steps is 0'),
    (lambda: pipeline(pico())([3], 2), 'classes 0 to 2'),
    (lambda: pipeline(pico())(None, 2), 'needs class_labels'),
    (lambda: pipeline(pico(0))([1], 2), 'unconditional'),
    (lambda: pipeline(pico(0))(None, 2, guidance_scale=2.0), 'cannot be guided'),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
