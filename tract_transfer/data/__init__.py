"""Data sets, readers, transforms and loaders.

Start with loader.py, then sampling.py, classification.py, detection.py and voc.py. A data set has
`image(index)`, uint8 RGB (3, H, W), and `target(index)`. A loader makes batches whose samples,
order and random numbers depend only on the seed and the iteration.
"""
