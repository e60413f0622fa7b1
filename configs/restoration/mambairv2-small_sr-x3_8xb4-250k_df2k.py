# MambaIRv2-Small for super-resolution, 3 times, from DF2K; stated: Urban100 30.08 dB.
# The training starts from the network for 2 times: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['mambair_sr-x3_8xb8-250k_df2k.py']

model = dict(
    model=dict(name='mambairv2_small_sr_x3'),
    init_from='work_dirs/mambairv2-small_sr-x2_8xb4-500k_df2k/best/model.safetensors')

train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=32)
