# Class-conditional DiS-H/2 on latents of ImageNet at 512 x 512: 64 x 64 x 4.
_base_ = ['dis-huge-2_imagenet-256x256.py']

model = dict(model=dict(img_size=64))
test_evaluator = dict(reference='data/VIRTUAL_imagenet512.npz')
