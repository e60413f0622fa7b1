# A recipe for ViM2-S (83.7 % top-1 claimed, no code and no weights released), untried.
_base_ = 'vim2-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vim2_small', drop_path_rate=0.3))
