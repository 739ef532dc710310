cfg = dict(
    seed=0,
    work_dir="./work_dir/exp",
    workflow=[{"phase": "train"}, {"phase": "val"}],
    total_epochs=3,
    data=dict(
        train=dict(type="Digits", split="train"),
        val=dict(type="Digits", split="val"),
        train_dataloader=dict(batch_size=64),
        val_dataloader=dict(batch_size=360),
    ),
    model=dict(type="ConvNet", in_channels=1, num_classes=10),
    loss=dict(type="CrossEntropyLoss"),
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05),
    hooks=dict(
        metrics=dict(type="MetricHook", top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"})),
        ema=dict(type="EMAHook", decay=0.99),
        lr_scheduler=dict(type="LrSchedulerHook", scheduler=dict(type="CosineAnnealingLR", T_max=3)),
        checkpoint=dict(type="CheckpointHook"),
        resume=dict(type="ResumeHook"),
        tensorboard=dict(type="TensorboardHook"),
    ),
)
