# MambaIRv2's light network, 2 times, from DIV2K alone; stated: Urban100 33.26 dB.
# The batch is that of the official file; a user needed four GPUs, so twice as many pictures, to reach the numbers.
_base_ = ['mambair-light_sr-x2_2xb16-500k_div2k.py']

model = dict(model=dict(name='mambairv2_light_sr_x2'))
