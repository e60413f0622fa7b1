# JPEG's artefacts in gray pictures: good ones of DFWB (DIV2K, Flickr2K, 400 of BSD500, 4,744 of the Waterloo
# Exploration Database) below data/: DIV2K/DIV2K_train_HR/, Flickr2K/Flickr2K_HR/, BSD400/, WED/, and for the evaluation
# data/benchmark/{Classic5,LIVE1}/. The JPEG is made on the fly, of the gray picture. The authors read files that were
# compressed before; how is not published, so PSNR may differ a little. With such files, called like the good ones:
# degrade=None, lq=[FOLDER, ...] in the training set, and dict(gt=..., lq=..., degrade=None) in the test sets.
_base_ = ['pairs.py']

train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        data_root='data',
        gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR', 'BSD400', 'WED'],
        degrade=dict(type='JpegFault', quality=40),
        mode='L',
        patch=126))

test_sets = [dict(gt='Classic5'), dict(gt='LIVE1')]
common = dict(degrade=dict(type='JpegFault', quality=40), mode='L')
val_dataloader = dict(
    dataset=dict(type='TestSets', data_root='data/benchmark', sets=test_sets[:1], common=common))
test_dataloader = dict(
    dataset=dict(
        type='TestSets', data_root='data/benchmark', sets=test_sets, common=common, skip_missing=True))

val_evaluator = dict(type='RestorationMetric', y_channel=True)
test_evaluator = val_evaluator
