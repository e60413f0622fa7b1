# The noise of telephones' cameras, as Restormer's users have SIDD: pieces of the training pictures, called alike, below
# data/SIDD/{train,val}/{input_crops,target_crops}/, or LMDBs: gt='train/gt_crops.lmdb', lq='train/input_crops.lmdb'.
# tools/test.py takes the 1,280 blocks of data/SIDD/Validation{Noisy,Gt}BlocksSrgb.mat. DND has no public truth: its
# server scores what is sent in.
_base_ = ['pairs.py']

train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_root='data/SIDD',
        gt='train/target_crops',
        lq='train/input_crops',
        patch=384,
        pad=True))
val_dataloader = dict(
    dataset=dict(
        type='PairedImages', data_root='data/SIDD', gt='val/target_crops', lq='val/input_crops', name='SIDD'))
test_dataloader = dict(
    # each process holds all blocks, half a gigabyte
    num_workers=1,
    dataset=dict(
        type='PairedImages', data_root='data/SIDD', gt='ValidationGtBlocksSrgb.mat',
        lq='ValidationNoisyBlocksSrgb.mat', name='SIDD'))

val_evaluator = dict(type='RestorationMetric', volume=True)
test_evaluator = val_evaluator
