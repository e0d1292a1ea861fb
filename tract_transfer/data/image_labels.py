"""Labels of whole images from the objects in them, by PASCAL VOC's classification rule."""

# N images, K classes

import numpy as np
from torch import Tensor

from tract_transfer.data.detection import DetectionDataset


class ImageLabels:
    """The images of a detection set, each with a mark for every class.

    `marks` int64 (N, K): 1 where an object of the class is in the image; 0, not counted, where all
    of them are difficult; -1 where there is none. So VOC's own files of a class have it.
    """

    def __init__(self, objects: DetectionDataset) -> None:
        self._objects = objects
        self.name = objects.name
        self.class_names = objects.class_names
        self.origin = objects.origin
        self.marks = _marks(objects)

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def labels(self) -> np.ndarray:
        """The class of every positive, int64, image by image."""
        return np.nonzero(self.marks == 1)[1]

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W). Raises as `DetectionDataset.image`."""
        return self._objects.image(index)

    def target(self, index: int) -> list[int]:
        """Return an image's K marks."""
        marks: list[int] = self.marks[index].tolist()
        return marks

    def item(self, index: int) -> str:
        """Return what an error message calls an image."""
        return self._objects.item(index)

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return self._objects.encoded(index)

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the detection set's length, classes, objects and images."""
        return self._objects.fingerprint()

    def cache_images(self) -> None:
        """Decode every image once into RAM; one that cannot be decoded raises at its access."""
        self._objects.cache_images()


def _marks(dataset: DetectionDataset) -> np.ndarray:
    objects = dataset.objects
    marks = np.full((len(dataset), len(dataset.class_names)), -1, np.int64)
    image = np.repeat(np.arange(len(dataset)), np.diff(objects.first))
    for is_counted, mark in ((objects.difficult, 0), (~objects.difficult, 1)):
        marks[image[is_counted], objects.labels[is_counted]] = mark
    return marks
