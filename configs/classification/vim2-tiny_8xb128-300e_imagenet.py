# A recipe for ViM2-T (82.7 % top-1 claimed, no code and no weights released), untried: what the paper states (300
# epochs, 20 of warm-up, 1024 images, AdamW, rate 1e-3, weight decay 0.05), and Swin's augmentation and VMamba's drop
# path where it is silent.
_base_ = ['../_base_/models/imagenet_mixup.py', '../_base_/datasets/imagenet_swin.py',
          '../_base_/schedules/imagenet_swin_300e.py', '../_base_/default_runtime.py']

model = dict(model=dict(name='vim2_tiny', drop_path_rate=0.2))
