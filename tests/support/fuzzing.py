"""Shared by the fuzz tests: the number of inputs, damaged files, and the errors they may raise."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SHORT = 40
INPUTS = int(os.environ.get("FUZZ_INPUTS", SHORT))
fuzzed = settings(
    max_examples=INPUTS,
    derandomize=INPUTS == SHORT,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 60), st.integers(), st.floats(), st.text(max_size=4),
    st.sampled_from(["0.png", "../0.png", "dog"]),
)  # fmt: skip
tree = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def damaged(draw, whole):
    """The bytes of a file, a few of them changed, removed, doubled or inserted."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["put", "cut", "double", "end"]))
        if kind == "put":
            content[at : at + 1] = draw(st.binary(max_size=6))
        elif kind == "cut":
            del content[at:end]
        elif kind == "double":
            content[at:at] = content[at:end]
        else:
            del content[at:]
    return bytes(content)


def said_by(read, kinds=(ValueError, FileNotFoundError)):
    """Return the message of the user error that `read` raises, or None."""
    try:
        read()
    except kinds as error:
        return str(error)
    return None
