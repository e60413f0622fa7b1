# The official recipe of Mamba2D-N (79.6 % top-1): 4096 images a step, in bfloat16 (--amp).
_base_ = 'mamba2d-tiny_8xb64-accum8-300e_imagenet.py'

model = dict(model=dict(name='mamba2d_nano', drop_path_rate=0.0, drop_rate=0.0))
optim_wrapper = dict(optimizer=dict(weight_decay=0.025))
