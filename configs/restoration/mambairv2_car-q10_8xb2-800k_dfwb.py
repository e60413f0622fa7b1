# MambaIRv2 against artefacts of JPEG at quality 10, gray; stated: Classic5 30.37 dB, LIVE1 29.91 dB.
# The training starts from the network for quality 40: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['mambair_car-q10_8xb2-800k_dfwb.py']

model = dict(
    model=dict(name='mambairv2_car_gray'),
    init_from='work_dirs/mambairv2_car-q40_8xb2-1600k_dfwb/best/model.safetensors')
