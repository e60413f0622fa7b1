"""DiSPipeline by the conventions of diffusers: saving, loading, output types, generators, progress, calls in a row."""
import json

import numpy as np
import pytest
import torch

pytest.importorskip('diffusers')

from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline

from visionssm.diffusion import DiS, DiSModel, DiSPipeline, GaussianDiffusion, image_generators, make_scheduler


def pipeline(sampler: str = 'ddim', num_classes: int = 3, **kwargs: object) -> DiSPipeline:
    torch.manual_seed(0)
    model = DiS(8, 4, 4, num_classes, embed_dim=16, depth=2).eval()
    pipe = DiSPipeline(model, make_scheduler(sampler, GaussianDiffusion()), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
                         latent_channels=4, norm_num_groups=4, scaling_factor=0.5, sample_size=16,
                         down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2).eval()


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpmsolver++'])
def test_all_parts_are_saved_and_loaded(tmp_path, sampler):
    pipe = pipeline(sampler, vae=autoencoder())
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'model_index.json', 'scheduler', 'transformer', 'vae'}
    again = DiSPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.components.keys() == pipe.components.keys() and type(again.scheduler) is type(pipe.scheduler)
    assert isinstance(again.transformer, DiSModel) and again.vae.config.scaling_factor == 0.5
    first, second = (each([2, 0], 3, generator=image_generators(0, [0, 1]), output_type='pt').images
                     for each in (pipe, again))
    assert torch.equal(first, second) and first.shape == (2, 3, 16, 16)


def test_the_general_loader_of_diffusers_takes_the_parts_of_a_pipeline(tmp_path):
    pipe = pipeline(vae=autoencoder())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / 'model_index.json').read_text())
    assert index['_class_name'] == 'DiSPipeline'
    with pytest.raises(AttributeError, match='DiSPipeline'):
        DiffusionPipeline.from_pretrained(tmp_path)
    model = DiSModel.from_pretrained(tmp_path / 'transformer')
    rebuilt = DiSPipeline(model, DDIMScheduler.from_pretrained(tmp_path / 'scheduler'))
    assert rebuilt.transformer is model and rebuilt.vae is None


def test_output_types_hold_the_same_images():
    pipe = pipeline(vae=autoencoder())

    def draw(kind: str, **kwargs: bool):
        return pipe([1, 2], 2, generator=image_generators(0, [0, 1]), output_type=kind, **kwargs)

    tensor, array, pictures = (draw(kind).images for kind in ('pt', 'np', 'pil'))
    assert tensor.shape == (2, 3, 16, 16) and 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype(np.uint8))
    assert torch.equal(draw('pt', return_dict=False)[0], tensor)


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpmsolver++'])
def test_calls_in_a_row_that_keep_the_steps_do_not_depend_on_each_other(sampler):
    pipe = pipeline(sampler)
    pipe.scheduler.set_timesteps(4)
    first, second = (pipe([1], None, generator=image_generators(3, [0]), output_type='pt').images for _ in range(2))
    assert torch.equal(first, second)


def test_labels_may_be_numbers_tensors_or_arrays():
    pipe = pipeline()
    first, *others = (pipe(labels, 2, generator=image_generators(0, [0, 1]), output_type='pt', **more).images
                      for labels, more in (([1, 1], {}), (torch.tensor([1, 1]), {}), (np.array([1, 1]), {}),
                                           (1, {'batch_size': 2})))
    assert all(torch.equal(first, other) for other in others)


def test_one_generator_serves_all_images_and_progress_is_shown(capsys):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    images = [pipe([0, 1], 3, generator=torch.Generator().manual_seed(1), output_type='pt').images for _ in range(2)]
    assert torch.equal(*images) and not torch.equal(images[0][0], images[0][1])
    assert '3/3' in capsys.readouterr().err


def test_weights_may_be_of_lower_precision():
    pipe = pipeline(vae=autoencoder()).to(torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16 and pipe.device == torch.device('cpu')
    images = pipe([0], 2, generator=torch.Generator().manual_seed(0), output_type='pt').images
    assert images.dtype == torch.float32 and images.isfinite().all()


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'class_labels': [3]}, r'holds \[3\]; the model has the classes 0 to 2'),
    ({'class_labels': -1}, r'holds \[-1\]'),
    ({'class_labels': [0.5]}, r'holds \[0.5\]'),
    ({'class_labels': ['cat']}, r"holds \['cat'\]"),
    ({'class_labels': []}, 'holds nothing'),
    ({'class_labels': [0, 1], 'batch_size': 3}, 'batch_size is 3 and class_labels has 2'),
    ({'class_labels': [0, 1], 'generator': image_generators(0, [0])}, '1 generators were given for 2 images'),
    ({'class_labels': [0], 'num_inference_steps': 0}, 'steps is 0'),
    ({'class_labels': [0], 'num_inference_steps': -1}, 'steps is -1'),
    ({'class_labels': [0], 'num_inference_steps': 1001}, '1 to 1000'),
    ({'class_labels': [0], 'eta': 2.0}, 'eta is 2.0'),
    ({'class_labels': [0], 'guidance_scale': float('inf')}, 'guidance_scale is inf'),
    ({'class_labels': [0], 'output_type': 'jpg'}, 'output_type'),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{'num_inference_steps': 2, **arguments})


def test_an_unconditional_model_refuses_classes_guidance_and_empty_batches():
    pipe = pipeline(num_classes=0)
    for arguments, message in (({'class_labels': 0}, 'takes no class_labels'), ({'guidance_scale': 2.0}, 'cannot be'),
                               ({'guidance_scale': 1.0, 'batch_size': 0}, 'batch_size is 0')):
        with pytest.raises(ValueError, match=message):
            pipe(num_inference_steps=2, **arguments)
