"""Faster R-CNN: detectors built from a backbone, region proposals and box heads."""
