# MambaIRv2 against artefacts of JPEG at quality 40, gray; stated: Classic5 34.64 dB, LIVE1 34.73 dB.
_base_ = ['mambair_car-q40_8xb2-1600k_dfwb.py']

model = dict(model=dict(name='mambairv2_car_gray'))
