# Super-resolution, 2 times. Good pictures of DF2K (DIV2K and Flickr2K) and small ones that MATLAB's bicubic made:
#   data/DIV2K/{DIV2K_train_HR,DIV2K_train_LR_bicubic/X2}/, data/Flickr2K/{Flickr2K_HR,Flickr2K_LR_bicubic/X2}/
#   data/benchmark/{Set5,Set14,B100,Urban100,Manga109}/{HR,LR_bicubic/X2}/
# where a small picture is called like the good one with x2 or _LRBI_x2 behind the name. Reading whole PNG files is
# slow: tools/make_lmdb.py packs pieces of them, for gt='DF2K/HR.lmdb' and lq='DF2K/X2.lmdb'.
_base_ = ['pairs.py']

train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root='data',
        gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR'],
        lq=['DIV2K/DIV2K_train_LR_bicubic/X{scale}', 'Flickr2K/Flickr2K_LR_bicubic/X{scale}'],
        lq_name=['{}x{scale}', '{}'],
        scale=2,
        patch=128))

test_sets = [
    dict(gt='Set5/HR', lq='Set5/LR_bicubic/X{scale}'),
    dict(gt='Set14/HR', lq='Set14/LR_bicubic/X{scale}'),
    dict(gt='B100/HR', lq='B100/LR_bicubic/X{scale}'),
    dict(gt='Urban100/HR', lq='Urban100/LR_bicubic/X{scale}'),
    dict(gt='Manga109/HR', lq='Manga109/LR_bicubic/X{scale}'),
]
common = dict(scale=2, lq_name=['{}x{scale}', '{}_LRBI_x{scale}', '{}'])
# the small sets during a training, all of them in tools/test.py, which leaves out those that are not there
val_dataloader = dict(
    dataset=dict(type='TestSets', data_root='data/benchmark', sets=test_sets[:2], common=common))
test_dataloader = dict(
    dataset=dict(
        type='TestSets', data_root='data/benchmark', sets=test_sets, common=common, skip_missing=True))

# as all papers do: luma, without as many pixels at the border as the scale
val_evaluator = dict(type='RestorationMetric', border=2, y_channel=True)
test_evaluator = val_evaluator
