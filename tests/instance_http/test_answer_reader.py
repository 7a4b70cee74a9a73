"""One answer, as bytes: what is read of it, however they are cut, and what is refused."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.instance_http.answer_reader import MAX_HEAD_BYTES, AnswerReader
from vllm_pd_scheduler.instance_http.errors import AnswerRefused, NotHttp, RequestFailed

LIMIT = 64
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
LINES = b"content-type: text/plain\r\nX-Many: a\r\nx-many: b\r\n"

Result = tuple[object, ...]

WHOLE: dict[str, tuple[bytes, int, bytes, bool]] = {
    "a length": (OK + b"content-length: 3\r\n\r\nabc", 200, b"abc", True),
    "no body": (OK + b"content-length: 0\r\n\r\n", 200, b"", True),
    "chunks": (CHUNKED + b"1\r\na\r\n2;more=x\r\nbc\r\n0\r\n\r\n", 200, b"abc", True),
    "trailers": (CHUNKED + b"3\r\nabc\r\n0\r\nx-t: 1\r\ny-t: 2\r\n\r\n", 200, b"abc", True),
    "only trailers": (CHUNKED + b"0\r\nx-t: 1\r\n\r\n", 200, b"", True),
    "CHUNKED": (OK + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n", 200, b"a", True),
    "no body by its status": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    "a length that means nothing": (
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n",
        304,
        b"",
        True,
    ),
    "an interim answer": (
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 1\r\n\r\na",
        200,
        b"a",
        True,
    ),
    "several of them": (
        b"HTTP/1.1 103 Early Hints\r\ncontent-encoding: gzip\r\n\r\n" * 3
        + OK
        + b"content-length: 1\r\n\r\na",
        200,
        b"a",
        True,
    ),
    "one for one connection": (OK + b"connection: close\r\ncontent-length: 1\r\n\r\na", 200, b"a", False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na", 200, b"a", False),
    "an error": (b"HTTP/1.1 500 \r\ncontent-length: 1\r\n\r\na", 500, b"a", True),
    "no encoding": (OK + b"content-encoding: identity\r\ncontent-length: 1\r\n\r\na", 200, b"a", True),
    "all that it may have": (OK + b"content-length: 64\r\n\r\n" + b"x" * 64, 200, b"x" * 64, True),
}
"""What comes, and status, body and whether the connection can be used again."""

OTHERS: dict[str, tuple[bytes, type[RequestFailed]]] = {
    "a length beyond the limit": (OK + b"content-length: 65\r\n\r\n" + b"x" * 65, AnswerRefused),
    "chunks beyond the limit": (CHUNKED + b"41\r\n" + b"x" * 65 + b"\r\n0\r\n\r\n", AnswerRefused),
    "a body without end": (OK + b"\r\n" + b"x" * 65, AnswerRefused),
    "a compressed one": (OK + b"content-encoding: gzip\r\ncontent-length: 1\r\n\r\na", AnswerRefused),
    "another protocol": (b"HTTP/1.1 101 S\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", NotHttp),
    "another protocol, tacitly": (b"HTTP/1.1 101 S\r\n\r\n", NotHttp),
    "two lengths": (OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab", NotHttp),
    "one length twice": (OK + b"content-length: 1\r\ncontent-length: 1\r\n\r\na", NotHttp),
    "a list of lengths": (OK + b"content-length: 1, 1\r\n\r\na", NotHttp),
    "a length and chunks": (
        OK + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        NotHttp,
    ),
    "chunks and a length": (
        OK + b"transfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n0\r\n\r\n",
        NotHttp,
    ),
    "a negative length": (OK + b"content-length: -1\r\n\r\n", NotHttp),
    "a length with a sign": (OK + b"content-length: +1\r\n\r\na", NotHttp),
    "a length of nothing": (OK + b"content-length:\r\n\r\n", NotHttp),
    "a length beyond all numbers": (OK + b"content-length: " + b"9" * 40 + b"\r\n\r\n", NotHttp),
    "compressed chunks": (OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", NotHttp),
    "a size beyond all numbers": (CHUNKED + b"9" * 40 + b"\r\n", NotHttp),
    "no size": (CHUNKED + b"x\r\n", NotHttp),
    "a folded header": (OK + b"x: a\r\n b\r\ncontent-length: 0\r\n\r\n", NotHttp),
    "a header with NUL": (OK + b"x: a\0b\r\ncontent-length: 0\r\n\r\n", NotHttp),
    "a space before the colon": (OK + b"content-length : 0\r\n\r\n", NotHttp),
    "TLS": (b"\x16\x03\x01\x02\x00", NotHttp),
    "HTTP/2": (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", NotHttp),
    "a request": (b"GET / HTTP/1.1\r\n\r\n", NotHttp),
    "no status": (b"HTTP/1.1 OK\r\n\r\n", NotHttp),
    "many headers": (OK + b"a: b\r\n" * 2000 + b"content-length: 0\r\n\r\n", NotHttp),
    "a long header": (OK + b"a: " + b"b" * (1 << 16) + b"\r\ncontent-length: 0\r\n\r\n", NotHttp),
    "interim answers without end": (b"HTTP/1.1 100 C\r\na: b\r\n\r\n" * 3000, NotHttp),
    "headers without end": (OK + b"a" * (1 << 17), NotHttp),
    "a trailer without end": (CHUNKED + b"1\r\na\r\n0\r\nx: " + b"a" * (1 << 17), NotHttp),
    "many trailers": (CHUNKED + b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 2000 + b"\r\n", NotHttp),
    "a size without end": (CHUNKED + b"1;" + b"a" * (1 << 17), NotHttp),
}


def read(*pieces: bytes, ended: bool = False) -> Result:
    """What becomes of an answer that comes in these pieces."""
    reader = AnswerReader(LIMIT)
    try:
        for piece in pieces:
            if reader.complete:
                return (*_result(reader)[:-1], False)  # the connection ends when more comes
            reader.feed(piece)
        if not reader.complete and not (ended and reader.ends_with_connection):
            return ("more",)
        return _result(reader)
    except RequestFailed as error:
        return (type(error),)
    finally:
        reader.close()


def _result(reader: AnswerReader) -> Result:
    answer = reader.answer()
    return answer.status, answer.headers, answer.body, reader.reusable


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize(("wire", "status", "body", "reusable"), WHOLE.values(), ids=WHOLE)
def test_it_is_read(wire: bytes, status: int, body: bytes, reusable: bool) -> None:
    found = read(wire)
    assert (found[0], found[2], found[3]) == (status, body, reusable)
    assert read(*bytewise(wire)) == found
    for at in range(len(wire)):
        assert read(wire[:at]) == ("more",), "what is cut is not whole"
        assert read(wire[:at], wire[at:]) == found


@pytest.mark.parametrize(("wire", "error"), OTHERS.values(), ids=OTHERS)
def test_it_is_refused(wire: bytes, error: type[RequestFailed]) -> None:
    assert read(wire) == (error,)
    if len(wire) > 1000:  # of these each piece is the same
        assert read(*(wire[at : at + 1000] for at in range(0, len(wire), 1000))) == (error,)
        return
    assert read(*bytewise(wire)) == (error,)
    for at in range(len(wire)):
        assert read(wire[:at], wire[at:]) == (error,)


@pytest.mark.parametrize(("wire", "status", "body", "reusable"), WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize(
    "more", [b"x", b"\r\n\r\nx", OK + b"content-length: 1\r\nx-other: 1\r\n\r\nb", b"\x16\x03\x01"], ids=repr
)
def test_what_comes_after_it_is_no_part_of_it(
    wire: bytes, status: int, body: bytes, reusable: bool, more: bytes
) -> None:
    assert read(wire + more) == read(wire, more) == (*read(wire)[:-1], False)


def test_it_can_end_with_the_connection() -> None:
    wire = OK + b"\r\nabc"
    assert read(wire) == ("more",)
    assert read(wire, ended=True) == read(*bytewise(wire), ended=True) == (200, {}, b"abc", False)
    for other in (OK, OK + b"content-length: 9\r\n\r\nabc", CHUNKED + b"3\r\nabc\r\n"):
        assert read(other, ended=True) == ("more",)


def test_headers_have_one_spelling_and_the_first_counts() -> None:
    reader = AnswerReader(LIMIT)
    reader.feed(OK + LINES + b"content-length: 0\r\n\r\n")
    answer = reader.answer()
    reader.close()
    assert (answer.header("content-type"), answer.header("x-many")) == ("text/plain", "a")
    assert answer.header("x-other") == ""


def test_a_trailer_is_no_header() -> None:
    found = read(WHOLE["trailers"][0])
    assert found[1] == {b"transfer-encoding": b"chunked"}


def test_headers_up_to_the_limit() -> None:
    room = MAX_HEAD_BYTES - (len("content-length") + 1 + 32) - (1 + 32)
    for size, expected in ((room, 200), (room + 1, NotHttp)):
        wire = OK + b"a: " + b"b" * size + b"\r\ncontent-length: 0\r\n\r\n"
        assert read(wire)[0] == expected


def test_nothing_of_a_body_beyond_the_limit_is_kept() -> None:
    reader = AnswerReader(LIMIT)
    with pytest.raises(AnswerRefused):
        reader.feed(CHUNKED + b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
    assert len(reader.answer().body) <= LIMIT
    reader.close()


def test_it_leaves_no_work_for_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        for wire, *_ in WHOLE.values():
            read(wire)
        assert gc.collect() == 0
    finally:
        gc.enable()


PIECES = st.lists(st.integers(0, 200), max_size=20)


@settings(max_examples=300)
@given(
    st.sampled_from([wire for wire, *_ in (*WHOLE.values(), *OTHERS.values()) if len(wire) < 1000]), PIECES
)
def test_however_it_is_cut_the_result_is_the_same(wire: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(wire), *(cut % len(wire) for cut in cuts)})
    assert read(*(wire[a:b] for a, b in pairwise(places))) == read(wire)


@settings(max_examples=300)
@given(st.data())
def test_what_is_spoilt_is_refused_or_read_the_same_way_however_it_is_cut(data: st.DataObject) -> None:
    wire = bytearray(data.draw(st.sampled_from([wire for wire, *_ in WHOLE.values()])))
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    assert read(bytes(wire)) == read(*bytewise(bytes(wire)))


@given(st.binary(max_size=200), PIECES)
def test_no_bytes_make_it_fail_in_another_way(noise: bytes, cuts: list[int]) -> None:
    for wire in (noise, OK + noise, CHUNKED + noise):
        places = sorted({0, len(wire), *(cut % (len(wire) or 1) for cut in cuts)})
        read(*(wire[a:b] for a, b in pairwise(places)))
