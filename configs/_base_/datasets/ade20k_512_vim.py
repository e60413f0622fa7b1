# ADE20K as Vim's recipe has it: 8 images a GPU, and six ratios of 2048 x 512 pixels over scales.
_base_ = 'ade20k_512.py'

train_dataloader = dict(batch_size=8, num_workers=8)
tta_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
         for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)],
        [dict(type='RandomFlip', prob=0.0, direction='horizontal'),
         dict(type='RandomFlip', prob=1.0, direction='horizontal')],
        [dict(type='visionssm.LoadSegAnnotations')],
        [dict(type='PackSegInputs')],
    ]),
]
