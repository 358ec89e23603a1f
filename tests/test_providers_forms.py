"""Forms that ask for calls: what every reader takes for the same is read, and nothing else."""

from __future__ import annotations

import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from respan_guard.errors import BodyTooLarge, InvalidInput
from respan_guard.providers import form_call, is_form_path

EDITS = "/v1/images/edits"
FORM = "multipart/form-data; boundary=x"
CHEAP = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ncheap\r\n'
DEAR = CHEAP.replace(b"cheap", b"dear")
END = b"--x--\r\n"


def headed(head: bytes) -> bytes:
    """A form whose one part has these headers."""
    return b"--x\r\n" + head + b"\r\n\r\ndear\r\n" + END


@pytest.mark.parametrize(
    "content",
    [
        b"",
        CHEAP,
        CHEAP[2:] + END,
        CHEAP + END + DEAR + END,
        CHEAP + b"--x\n" + DEAR[5:] + END,
        CHEAP[:-2] + b"\n" + DEAR + END,
        CHEAP + b"--xy\r\n" + END,
        CHEAP + b"--x \r\n" + DEAR[5:] + END,
        b"before --x\r\n" + DEAR[5:] + CHEAP + END,
        b'{"model": "cheap"}\n' + DEAR + END,
        headed(b""),
        headed(b"Content-Type: text/plain"),
        headed(b'Content-Disposition: attachment; name="model"'),
        headed(b"Content-Disposition: form-data"),
        headed(b'Content-Disposition : form-data; name="model"'),
        headed(b'Content-Disposition: form-data;\r\n name="model"'),
        headed(b'Content-Disposition: form-data; name="x"\nContent-Disposition: form-data; name="model"'),
        headed(b'Content-Disposition: form-data; name="x"\r\nContent-Disposition: form-data; name="model"'),
        headed(b'Content-Disposition: form-data; name="x"; name="model"'),
        headed(b'Content-Disposition: form-data; name="x"; NAME="model"'),
        headed(b"Content-Disposition: form-data; name*=utf-8''model"),
        headed(b"Content-Disposition: form-data; name=\"x\"; name*=utf-8''model"),
        headed(b"Content-Disposition: form-data; name*0=mod; name*1=el"),
        headed(b'Content-Disposition: form-data; name="%6dodel"'),
        headed(b'Content-Disposition: form-data; name="mod\\el"'),
        headed(b'Content-Disposition: form-data; filename="\\"; name="x"; a="\\"; name="model"'),
        headed(b'Content-Disposition: form-data; name="model\x00"\x00'),
        headed(b'Content-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: base64'),
        headed(b'X: 1\r\nContent-Disposition: form-data; name="model"\r\n' + b"Y: " + b"y" * 4_096),
        headed(b"\r\n".join([b"X%d: 1" % number for number in range(17)])),
        b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n' + END,
        *(CHEAP + DEAR.replace(b"model", b"n").replace(b"dear", n) + END for n in (b"", b"two", b"1e1", b"2.0", b"+3")),
    ],
)
def test_what_readers_may_differ_about_is_not_read(content: bytes) -> None:
    """A form in which some reader could find another model, or more images, names no model and says why."""
    call, unclear = form_call(EDITS, FORM, content)
    assert call.model == ""
    assert isinstance(unclear, InvalidInput)


@pytest.mark.parametrize("name", ["model", "n"])
@pytest.mark.parametrize("file", [b"", b'; filename="a"'])
def test_a_field_that_decides_the_price_is_said_once(name: str, file: bytes) -> None:
    """Also where the second one is a file, or says the same."""
    one = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n1\r\n'
    call, unclear = form_call(EDITS, FORM, one % (name.encode(), b"") + one % (name.encode(), file) + END)
    assert call.model == ""
    assert f"names {name} twice" in str(unclear)


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "multipart/form-data",
        "multipart/mixed; boundary=x",
        "multipart/form-data; boundary=x; boundary=y",
        "multipart/form-data; boundary=y; Boundary=x",
        "multipart/form-data; boundary=x, multipart/form-data; boundary=y",
        "multipart/form-data; boundary*=utf-8''x",
        "multipart/form-data; boundary=x; boundary*0=y",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 71,
        'multipart/form-data; boundary="x',
        "multipart/form-data boundary=x",
        "multipart/form-data; boundary=\u212a",
        "application/x-www-form-urlencoded",
    ],
)
def test_the_boundary_is_said_once(kind: str) -> None:
    """Two boundaries would make two forms of one body."""
    call, unclear = form_call(EDITS, kind, CHEAP + END)
    assert (call.model, unclear is None) == ("", False)


@pytest.mark.parametrize(
    "filename", ["a.png", "b\u00e4r.png", 'a"quoted".png', "C:\\a\\b.png", "; name=x", "a;b=c.png", "\u4e2d.png"]
)
def test_forms_of_real_clients_are_read(filename: str) -> None:
    """Of two HTTP libraries, whatever the file is called."""
    files = {"image": (filename, b"\x89PNG\r\n\r\n--" + bytes(range(256)), "image/png")}
    fields = {"model": "gpt-image-1", "prompt": 'say "hi"\r\n--model', "n": "2"}
    sent = httpx.Request("POST", "http://x", data=fields, files=files)
    other = requests.Request("POST", "http://x", data=fields, files=files).prepare()
    assert isinstance(other.body, bytes)
    for kind, content in ((sent.headers["content-type"], sent.read()), (other.headers["content-type"], other.body)):
        call, unclear = form_call(EDITS, str(kind), content)
        assert (unclear, call.model, call.choices) == (None, "gpt-image-1", 2)


@given(
    st.lists(st.sampled_from([b"--", b"x", b"\r\n", b"\n", CHEAP, DEAR, END, b"model", b'"', b";", b": "]), max_size=12)
)
def test_no_bytes_are_an_error_of_ours(pieces: list[bytes]) -> None:
    """Whatever comes, a form is read or it is not."""
    call, unclear = form_call(EDITS, FORM, b"".join(pieces))
    assert unclear is None or call.model == ""


def test_a_form_has_so_many_parts() -> None:
    """A megabyte of tiny parts is not looked at to its end."""
    part = CHEAP.replace(b"model", b"a")
    assert form_call(EDITS, FORM, part * 999 + CHEAP + END)[0].model == "cheap"
    call, unclear = form_call(EDITS, FORM, part * 1_000 + CHEAP + END)
    assert call.model == ""
    assert isinstance(unclear, BodyTooLarge)


def test_a_value_that_is_too_long_names_nothing() -> None:
    """What is cut off could be another model's name."""
    call, unclear = form_call(EDITS, FORM, CHEAP.replace(b"cheap", b"cheap" + b" " * 300 + b"x") + END)
    assert (call.model, unclear) == ("", None)


def test_each_image_that_goes_in_is_held() -> None:
    """Sixteen images are held as sixteen, sent as files or named in JSON: a small file may be a large image."""
    image = b'--x\r\nContent-Disposition: form-data; name="image[]"; filename="a"\r\n\r\n\x89PNG\r\n'
    one, _ = form_call(EDITS, FORM, CHEAP + image + END)
    many, _ = form_call(EDITS, FORM, CHEAP + image * 16 + END)
    named, _ = form_call(EDITS, "application/json", b'{"model": "m", "images": [%s{}]}' % (b"{}," * 15))
    assert many.input_tokens_bound > 15 * one.input_tokens_bound
    assert named.input_tokens_bound > 15 * one.input_tokens_bound


@pytest.mark.parametrize(
    "path", [EDITS + "/", "/v1//images/edits", EDITS + "\n", EDITS + ";a", "/V1/Images/Edits", EDITS + "?a"]
)
def test_paths_of_forms_go_by_what_routers_read(path: str) -> None:
    """No spelling of a path makes a form of a call none."""
    assert is_form_path(path)
    assert form_call(path, FORM, CHEAP + END)[0].model == "cheap"
