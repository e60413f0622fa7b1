# A recipe for ViM2-B (83.9 % top-1 claimed, no code and no weights released), untried.
_base_ = 'vim2-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vim2_base', drop_path_rate=0.5))
