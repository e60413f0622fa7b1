# UperNet with Vim-Ti over 60,000 steps of 4 GPUs x 8 images of ADE20K: the paper is said to state 41.0 mIoU (not
# checked here). Of the authors' layer decay of 0.92 only the first layer feels anything: the others have names that it
# does not know.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_vim.py',
          '../_base_/schedules/upernet_60k.py']

model = dict(
    backbone=dict(
        name='vim_tiny',
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vim_tiny.in1k'),
        pyramid=dict(type='plain', residual_features=False),
        img_size=512,
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
embedding = dict(lr_mult=0.92**25)
optim_wrapper = dict(
    optimizer=dict(lr=0.0002, weight_decay=0.1),
    paramwise_cfg=dict(
        force_decay=['*pos_embed', '*.A_log'],
        custom_keys={'backbone.patch_embed*': embedding, 'backbone.pos_embed': embedding}))
