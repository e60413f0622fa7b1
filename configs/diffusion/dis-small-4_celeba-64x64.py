# As DiS-S/2 with patches of 4 x 4.
_base_ = ['dis-small-2_celeba-64x64.py']

model = dict(model=dict(name='dis_small_patch4'))
