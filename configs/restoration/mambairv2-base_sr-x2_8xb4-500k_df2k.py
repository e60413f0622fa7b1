# MambaIRv2-Base for super-resolution, 2 times, from DF2K; stated: Urban100 34.49 dB.
# The official file has a rate of 1e-3, five times that of MambaIR, with 2e-4 commented out beside it; which of them
# made the published weights is not known.
_base_ = ['mambair_sr-x2_8xb4-500k_df2k.py']

model = dict(model=dict(name='mambairv2_base_sr_x2'))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
