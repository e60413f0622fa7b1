# The official recipe of Mamba2D-S (85.3 % top-1): 4096 images a step, in bfloat16 (--amp).
_base_ = 'mamba2d-tiny_8xb64-accum8-300e_imagenet.py'

model = dict(model=dict(name='mamba2d_small', drop_path_rate=0.4, drop_rate=0.4))
