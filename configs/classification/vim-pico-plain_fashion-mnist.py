# Vim in the comparison of the families, in the sizes that vim_pico has by itself; the demo has a model of its own.
_base_ = '../_base_/pico_fashion-mnist.py'

model = dict(model=dict(name='vim_pico', img_size=28))
