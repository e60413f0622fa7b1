# Photographs that come with packages, made into train/ and val/ by tools/make_photo_data.py; a config adds scale and
# fault. Each held-out photograph has a row of its own; those of packages that are not installed are left out.
data_root = 'data/photos'
photographs = ['chelsea', 'china', 'dune', 'eveningglow', 'friends_by_aitzol_berasategi', 'grey', 'ladybird',
               'life_by_aitzol_berasategi', 'picosdeeuropa_by_aitzol_berasategi', 'picture_1a_by_freespace']

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='SeededSampler', shuffle=True, infinite=True),
    collate_fn=dict(type='collate_pairs'),
    dataset=dict(type='PairedImages', data_root=data_root, gt='train', augment=True, cache=True))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_pairs'),
    dataset=dict(
        type='TestSets', data_root=data_root, skip_missing=True,
        sets=[dict(gt=f'val/{name}.png', name=name.partition('_by_')[0]) for name in photographs]))
test_dataloader = val_dataloader
