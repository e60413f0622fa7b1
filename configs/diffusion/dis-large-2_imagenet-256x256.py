# Class-conditional DiS on latents of ImageNet at 256 x 256: 32 x 32 x 4. Which autoencoder the authors used is not
# published; this is the one of DiT.
_base_ = ['../_base_/datasets/imagenet_latents.py', '../_base_/schedules/dis_1000e.py',
          '../_base_/diffusion_runtime.py']

model = dict(
    type='DiffusionModel',
    model=dict(name='dis_large_patch2', img_size=32, in_chans=4, num_classes=1000),
    data_preprocessor=dict(type='LatentPreprocessor'),
    vae='stabilityai/sd-vae-ft-ema')

# what ADM's evaluation and, after it, that of DiT compare with; the authors' own reference is not published
test_evaluator = dict(reference='data/VIRTUAL_imagenet256_labeled.npz')
