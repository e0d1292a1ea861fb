"""Tiny configs: a ResNet-18 of width 8 on three digits, and a detector on small scenes."""

CLASSIFICATION = """\
task: classification
model:
  backbone: {name: cifar/resnet18, args: {width: 8}}
data:
  train: {source: digits, split: train, classes: [0, 1, 2]}
  test: {source: digits, split: test, classes: [0, 1, 2]}
  transforms: {size_px: 16, crop: pad, pad_px: 3, flip_prob: 0.5}
  batch_size: 32
  num_workers: 0
solver: {optimizer: sgd, momentum: 0.9, lr: 0.05, max_iters: 6}
engine: {device: cpu, log: {every_iters: 2, tensorboard: false}}
"""
PROBE = """\
task: probe
model:
  backbone: {name: cifar/resnet18, args: {width: 8}}
data:
  train: {source: digits, split: train, classes: [0, 1, 2]}
  test: {source: digits, split: test, classes: [0, 1, 2]}
  transforms: {size_px: 16}
  batch_size: 64
  num_workers: 0
evaluation: {knn: {ks: [1, 5]}, logistic_regression: {cs: [0.1, 1.0], max_iters: 200}}
engine: {device: cpu}
"""
DETECTION = """\
task: detection
model:
  backbone: {name: cifar/resnet18, args: {width: 8}}
  detector:
    name: torchvision_fpn
    args:
      {short_side_px: 64, max_side_px: 64, num_levels: 2, fpn_channels: 16, head_dim: 32,
       rpn: {anchor_scales: [4], pre_nms_train: 40, post_nms_train: 20, post_nms_test: 20},
       box: {rois_per_image: 16}}
data:
  train: {source: digit_scenes, split: train, num_train: 12, num_test: 6, size_px: 64}
  test: {source: digit_scenes, split: test, num_train: 12, num_test: 6, size_px: 64}
  transforms: {short_sides_px: [48, 64], max_side_px: 64}
  batch_size: 4
  num_workers: 0
solver: {optimizer: adamw, lr: 1e-3, max_iters: 4}
evaluation: {save_detections: 2}
engine: {device: cpu, log: {every_iters: 2, tensorboard: false}}
"""
SUITE = """\
output_dir: {output_dir}
baseline: vanilla
seeds: [0]
methods:
  vanilla: {{}}
  tract: {{pretrain: {{tract.enabled: true}}}}
pretrain: classification.yaml
tasks: {{probe: probe.yaml}}
"""
