# MambaIRv2-Large for super-resolution, 4 times, from DF2K; stated: Urban100 28.07 dB.
# The training starts from the network for 2 times: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['mambair_sr-x4_8xb4-250k_df2k.py']

model = dict(
    model=dict(name='mambairv2_large_sr_x4'),
    init_from='work_dirs/mambairv2-large_sr-x2_8xb4-500k_df2k/best/model.safetensors')
