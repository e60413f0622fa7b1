# What all data sets of pairs of pictures share: shuffled without an end in training, picture by picture in evaluation.
train_dataloader = dict(
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='SeededSampler', shuffle=True, infinite=True),
    collate_fn=dict(type='collate_pairs'),
    dataset=dict(type='PairedImages', augment=True))
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_pairs'))
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_pairs'))
