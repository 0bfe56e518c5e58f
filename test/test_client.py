"""The client of `/generate`, without a server: prompt files, and answers that are none."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from margingate.harness.client import Client, Prompt, read_prompts

PAGE = b"<html>\n<body>\n<h1>502 Bad Gateway</h1>\n</body>\n</html>"


@pytest.mark.parametrize("inside", ["\u2028", "\u0085", "\u2029", "\x7f"])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(inside, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "a{inside}b"}}\r\n\n{{"prompt": "c"}}', encoding="utf-8")
    assert read_prompts(file) == [("p-1", f"a{inside}b"), ("p-3", "c")]


def test_a_form_feed_between_lines_ends_none(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\x0c\n{"id": 7, "prompt": "b"}\n')
    assert read_prompts(file) == [("p-1", "a"), ("7", "b")]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"id": null, "prompt": "é"}'.encode())
    assert read_prompts(file) == [("p-1", "é")]


def test_no_more_is_read_than_is_asked_for(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\nnot JSON\n')
    assert read_prompts(file, 1) == [("p-1", "a")]


@pytest.mark.parametrize("prompt", ["5", "null", '["a"]', '{"text": "a"}', "true"])
def test_a_prompt_that_is_no_text_is_refused_by_its_line(prompt, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{{"prompt": {prompt}}}\n')
    with pytest.raises(ValueError) as caught:
        read_prompts(file)
    assert str(caught.value) == f'{file}, line 2: "prompt" is {prompt}: give a text in quotes.'


@pytest.fixture
def broken() -> Iterator[str]:
    """The address of a server that answers with a proxy's page."""

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(502)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *_args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("way", ["alone", "together"])
def test_an_error_page_is_told_with_its_status(way, broken):
    with pytest.raises(RuntimeError, match=r"answered 502: <html> <body> <h1>502 Bad Gateway"):
        getattr(Client(broken, 1), way)([Prompt("a", (1,))])


def test_as_many_delays_as_prompts_are_taken(broken):
    with pytest.raises(ValueError):
        Client(broken, 1).together([Prompt("a", (1,))], delays_s=[0.0, 0.0])
