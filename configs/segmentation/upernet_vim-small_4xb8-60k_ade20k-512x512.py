# UperNet with Vim-S over 60,000 steps of 4 GPUs x 8 images of ADE20K: the paper is said to state 44.9 mIoU (not checked
# here). Of the authors' layer decay of 0.95 only the first layer feels anything: the others have names that it does not
# know. The authors rotate positions and never released weights that were trained so; this starts from those without,
# and rotates nothing.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_vim.py',
          '../_base_/schedules/upernet_60k.py']

model = dict(
    backbone=dict(
        name='vim_small',
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vim_small.in1k'),
        pyramid=dict(type='plain', residual_features=True),
        img_size=512,
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
embedding = dict(lr_mult=0.95**25)
optim_wrapper = dict(
    optimizer=dict(lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(
        force_decay=['*pos_embed', '*.A_log'],
        custom_keys={'backbone.patch_embed*': embedding, 'backbone.pos_embed': embedding}))
