"""Messages in a stream of bytes, however they were cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.rpc.messages import PREFIX_BYTES, MessageReader, prefix
from vllm_pd_scheduler.rpc.status import CallError, StatusCode


@given(
    st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(0, 400), max_size=10), st.booleans()
)
def test_cuts_change_nothing(messages: list[bytes], cuts: list[int], late: bool) -> None:
    """Nor does it matter whether each message is asked for as it comes, or all at the end."""
    stream = b"".join(prefix(len(message)) + message for message in messages)
    reader, found, fed = MessageReader(1000), [], 0
    at = [0, *sorted({min(cut, len(stream)) for cut in cuts}), len(stream)]
    for start, end in pairwise(at):
        reader.feed(stream[start:end])
        fed += end - start
        while not late and (message := reader.take()) is not None:
            found.append(message)
        assert reader.consumed <= fed
    while (message := reader.take()) is not None:
        found.append(message)
    assert found == messages
    assert reader.is_empty
    assert reader.consumed == len(stream)


def test_no_more_is_read_than_is_asked_for() -> None:
    reader = MessageReader(1000)
    reader.feed(prefix(1) + b"a" + prefix(2) + b"b")
    assert reader.take() == b"a"
    assert reader.consumed == PREFIX_BYTES + 1
    assert (reader.begun, reader.missing) == (0, 0)
    assert reader.take() is None
    assert (reader.begun, reader.missing, reader.consumed) == (2, 1, 2 * PREFIX_BYTES + 2)
    reader.feed(b"b" + prefix(0))
    assert reader.consumed == 2 * PREFIX_BYTES + 3
    assert reader.take() == b"bb"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\1\0\0\0\0", StatusCode.UNIMPLEMENTED),
        (b"\2\0\0\0\0", StatusCode.INTERNAL),
        (prefix(1001), StatusCode.RESOURCE_EXHAUSTED),
        (b"\0\xff\xff\xff\xff", StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_what_is_refused_before_it_comes(data: bytes, code: StatusCode) -> None:
    reader = MessageReader(1000)
    reader.feed(data)
    with pytest.raises(CallError) as caught:
        reader.take()
    assert caught.value.code is code
