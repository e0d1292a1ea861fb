"""Configs of the three tasks, as users write them."""

CLASSIFICATION = """\
task: classification
output_dir: out
model: {backbone: {name: cifar/resnet18, args: {width: 16}}}
data:
  train: {source: digits, split: train}
  test: {source: digits, split: test}
  transforms: {size_px: 32}
  batch_size: 64
solver:
  optimizer: sgd
  lr: 1e-3
  max_epochs: 2
"""
DETECTION = """\
task: detection
output_dir: out
model: {weights: runs/a}
data:
  train: {source: voc, root: VOCdevkit, sets: [2007/trainval]}
  test: {source: voc, root: VOCdevkit, sets: [2007/test]}
  transforms: {short_sides_px: [600], max_side_px: 1000}
  batch_size: 2
solver: {optimizer: sgd, lr: 0.01, max_iters: 100, schedule: multistep, steps_iters: [80]}
"""
PROBE = """\
task: probe
output_dir: out
model: {backbone: {name: timm/resnet18}, weights: pretrained}
data:
  train: {source: digits, split: train}
  test: {source: digits, split: test}
  transforms: {size_px: 32}
  batch_size: 64
"""
# Several labels an image, which only an SVM takes.
VOC_PROBE = """\
task: probe
output_dir: out
model: {backbone: {name: timm/resnet18}}
data:
  train: {source: voc, root: here, sets: [2007/train]}
  test: {source: voc, root: here, sets: [2007/val]}
  transforms: {size_px: 32}
  batch_size: 64
evaluation: {knn: null, logistic_regression: null, svm: {}, metric: svm_map_11point}
"""
TEXTS = {
    "classification": CLASSIFICATION,
    "detection": DETECTION,
    "probe": PROBE,
    "voc probe": VOC_PROBE,
}
