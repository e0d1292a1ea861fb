"""Faster R-CNN: detectors made of a backbone, region proposals and box heads."""
