"""Arrays come out of a pickle as they went in, and nothing that it names is called."""

import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict

import numpy as np
import pytest

from tract_transfer.models.weights_file import Refused, load_plain_pickle

ARRAYS = {
    "floats": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(4, dtype=">i4"),
    "halves": np.arange(3, dtype=np.float16),
    "bools": np.array([True, False]),
    "empty": np.zeros((0, 3), dtype=np.int64),
    "a number": np.float32(0.1),
    "text": np.array(["ab", "c"]),
    "scalar array": np.array(3.5),
    "part": np.arange(10)[::2],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_to_the_bit(name, protocol):
    array = ARRAYS[name]
    found = load_plain_pickle(pickle.dumps({"model": [array]}, protocol))["model"][0]
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert np.asarray(found).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read(protocol):
    plain = {"a": [1, 2.5, None, True], "b": {"c": "ü", "d": b"\x00\xff"}, "e": (1, 2)}
    content = OrderedDict(plain)
    assert load_plain_pickle(pickle.dumps(content, protocol)) == {**plain, "e": [1, 2]}


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def touches(path):
    return {
        "os.system": Calls(os.system, (f"touch {path}",)),
        "eval": Calls(eval, (f"open({str(path)!r}, 'w')",)),
        "open": Calls(open, (str(path), "w")),
        "getattr": Calls(getattr, ("text", "upper")),
        "a numpy function": Calls(np.fromfile, (str(path),)),
        "ndarray": Calls(np.ndarray, ((2,),)),
        "an array of objects": np.array([Calls(open, (str(path), "w"))], dtype=object),
        "a record of objects": np.zeros(2, dtype=[("a", "O"), ("b", "f4")]),
    }


@pytest.mark.parametrize("name", touches(""))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_is_called(tmp_path, name, protocol):
    content = pickle.dumps({"w": touches(tmp_path / "touched")[name]}, protocol)
    with pytest.raises(Refused):
        load_plain_pickle(content)
    assert not (tmp_path / "touched").exists()


def code(text):
    """Bytes of a pickle of protocol 2 from opcodes by hand."""
    return b"\x80\x02" + text + b"."


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\n"
HOSTILE = {
    # A type that says it holds numbers, and whose state makes its bytes addresses of objects.
    "a type turned into objects": DTYPE + b"(X\x02\0\0\0O8I0\nI1\ntR",
    "objects by a type's flags": RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntX\x01\0\0\0btR(I1\n(I1\nt"
    + DTYPE + b"(X\x02\0\0\0V8I0\nI1\ntRI0\nX\x08\0\0\0AAAAAAAAtb",
    "a class given another method": b"cnumpy\ndtype\n(N}X\x0c\0\0\0__setstate__cnumpy\ndtype\nstb",
    "a function given another code": b"c_codecs\nencode\n(N}X\x08\0\0\0__code__I1\nstb",
    "a dict given attributes": b"ccollections\nOrderedDict\n(tR(N}X\x05\0\0\0itemsI1\nstb",
    "a persistent reference": b"X\x01\0\0\0aQ",
    "an instance by name": b"(X\x02\0\0\0idios\nsystem\n",
    "another encoding": b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_pickle_can_say_beside_calls_is_refused(name):
    content = code(HOSTILE[name])
    pickletools.dis(content, io.StringIO())  # well-formed
    with pytest.raises(Refused):
        load_plain_pickle(content)
    assert load_plain_pickle(pickle.dumps(ARRAYS["floats"])).sum() == 15  # still at work


def deep(levels):
    content = []
    for _ in range(levels):
        content = [content]
    return code(b"]" * levels + b"a" * (levels - 1))


DAMAGED = {
    "nothing": b"",
    "text": b"not a pickle",
    "cut short": pickle.dumps(ARRAYS["floats"])[:-10],
    "a shape that its bytes do not fill": RECONSTRUCT
    + b"(cnumpy\nndarray\n(I0\ntX\x01\0\0\0btR(I1\n(I1000000000\nI1000\nt"
    + DTYPE + b"(X\x02\0\0\0f4I0\nI1\ntRI0\nX\x08\0\0\0AAAAAAAAtb.",
    "a length beyond the memory": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a dict that holds itself": b"\x80\x02}q\x00X\x01\0\0\0ah\x00s.",
    "a list nested too deeply": deep(1000),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_an_error_of_one_kind_and_takes_no_memory(name):
    with pytest.raises(ValueError) as caught:
        load_plain_pickle(DAMAGED[name])
    assert str(caught.value)


def test_a_place_far_away_takes_no_memory():
    assert load_plain_pickle(b"\x80\x02Nr\xff\xff\xff\xff.") is None  # pickle's own takes 64 GiB
