"""Writes plug-ins for tests, and forgets them and what they registered."""

import contextlib
import sys
import textwrap

from tract_transfer import registry


@contextlib.contextmanager
def forgotten(folder):
    """Undo, at the end, what plug-ins in a folder registered and imported."""
    before = {one: set(one.modules) for one in registry._registries}
    paths = list(sys.path)
    try:
        yield
    finally:
        for one, names in before.items():
            for name in one.modules.keys() - names:
                del one.modules[name], one._obj_map[name]
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(folder)):
                del sys.modules[name]
        sys.path[:] = paths


def write(path, text):
    """Write a plug-in that may use the registries, torch and numpy; return its path."""
    start = """\
    import numpy as np
    import torch
    from torch import nn

    import tract_transfer
    from tract_transfer import BACKBONES, DETECTORS, EVALUATORS, HEADS, SOURCES, Backbone
    from tract_transfer.data.sources import box_dataset, image_dataset

    """
    path.write_text(textwrap.dedent(start) + textwrap.dedent(text))
    return path
