# VSSD in the comparison of the families.
_base_ = '../_base_/pico_fashion-mnist.py'

model = dict(model=dict(name='vssd_pico'))
