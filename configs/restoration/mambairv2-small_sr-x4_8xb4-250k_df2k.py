# MambaIRv2-Small for super-resolution, 4 times, from DF2K; stated: Urban100 27.73 dB.
# The training starts from the network for 2 times: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['mambair_sr-x4_8xb4-250k_df2k.py']

model = dict(
    model=dict(name='mambairv2_small_sr_x4'),
    init_from='work_dirs/mambairv2-small_sr-x2_8xb4-500k_df2k/best/model.safetensors')
