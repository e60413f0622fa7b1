# MambaIRv2 against Gaussian noise of deviation 15 / 255, colour; stated: Urban100 35.42 dB.
_base_ = ['mambair_dn-sigma15_8xb2-1600k_dfwb.py']

model = dict(model=dict(name='mambairv2_dn_color'))
