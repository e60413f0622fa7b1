# Mamba-YOLO; a config adds model.model.name and, for other data than COCO, model.model.num_classes.
model = dict(
    type='visionssm.MambaYOLODetector',
    model=dict(num_classes=80),
    # RGB in 0..1; padding comes after the division by 255
    data_preprocessor=dict(
        mean=[0, 0, 0], std=[255, 255, 255], bgr_to_rgb=True, pad_size_divisor=32, pad_value=114 / 255),
    train_cfg=dict(box=7.5, cls=0.5, dfl=1.5),
    # COCO AP counts the surest 300 boxes of all classes; to look at pictures, score_thr=0.25 and multi_label=False
    test_cfg=dict(score_thr=0.001, iou_thr=0.7, multi_label=True, max_per_img=300, nms_pre=30000))
