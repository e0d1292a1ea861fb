"""The data island. Read: loader.py -> sampling.py -> classification.py -> detection.py -> voc.py.

A dataset gives `image(index)`, uint8 RGB (3, H, W), and `target(index)`; the loader turns it into
batches whose samples, order and random numbers depend on the seed and the iteration alone.
"""
