# A small UperNet with the smallest VSSD, trained from nothing in minutes on two cores.
_base_ = '../_base_/upernet_pico_composed.py'

model = dict(backbone=dict(name='vssd_pico'))
