# A small UperNet with the smallest VMamba, trained from nothing in minutes on two cores.
_base_ = '../_base_/upernet_pico_composed.py'

model = dict(backbone=dict(name='vmamba_pico'))
