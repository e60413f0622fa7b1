# ADE20K with the three ratios of the published multi-scale mIoU of VSSD and Spatial-Mamba.
_base_ = 'ade20k_512.py'

tta_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in (0.75, 1.0, 1.25)],
        [dict(type='RandomFlip', prob=0.0, direction='horizontal'),
         dict(type='RandomFlip', prob=1.0, direction='horizontal')],
        [dict(type='visionssm.LoadSegAnnotations')],
        [dict(type='PackSegInputs')],
    ]),
]
