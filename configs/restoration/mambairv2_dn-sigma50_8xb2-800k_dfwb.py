# MambaIRv2 against Gaussian noise of deviation 50 / 255, colour; no weights of it are published.
# The training starts from the network for noise of 15: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['mambair_dn-sigma50_8xb2-800k_dfwb.py']

model = dict(
    model=dict(name='mambairv2_dn_color'),
    init_from='work_dirs/mambairv2_dn-sigma15_8xb2-1600k_dfwb/best/model.safetensors')
