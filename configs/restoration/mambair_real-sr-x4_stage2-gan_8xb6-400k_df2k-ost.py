# MambaIR for photographs with unknown faults, 4 times, second of two stages: from the network of the first one, on the
# same data, against a discriminator. The numbers are those of Real-ESRGAN, as in the first stage.
# Needs two networks of torchvision, trained on ImageNet, which are fetched unless files are named: VGG19 for the
# perceptual loss (model.perceptual.weights=FILE), and AlexNet for LPIPS, by which the best checkpoint is chosen
# (val_evaluator.lpips_weights=FILE and test_evaluator.lpips_weights=FILE).
_base_ = ['mambair_real-sr-x4_stage1_8xb6-1000k_df2k-ost.py']

model = dict(
    type='GANRestorer',
    # before activation; the truth is sharpened for these two losses, and as it is for the discriminator
    perceptual=dict(
        type='PerceptualLoss',
        weights='imagenet',
        layers=dict(conv1_2=0.1, conv2_2=0.1, conv3_4=1.0, conv4_4=1.0, conv5_4=1.0),
        sharpen=True),
    gan=dict(type='GANLoss', kind='vanilla', weight=0.1),
    discriminator=dict(type='UNetDiscriminator', num_feat=64),
    net_d_iters=1,
    net_d_init_iters=0,
    init_from='work_dirs/mambair_real-sr-x4_stage1_8xb6-1000k_df2k-ost/best/model.safetensors')

val_evaluator = dict(lpips='alex')
test_evaluator = val_evaluator

optimizer = dict(type='Adam', lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
optim_wrapper = dict(
    _delete_=True,
    constructor='GANOptimConstructor',
    generator=dict(type='OptimWrapper', optimizer=optimizer),
    discriminator=dict(type='OptimWrapper', optimizer=optimizer))
train_cfg = dict(max_iters=400000)
default_hooks = dict(checkpoint=dict(save_best='LPIPS', rule='less'))
