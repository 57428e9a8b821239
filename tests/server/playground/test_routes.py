"""The playground's page and files, as they come over HTTP."""

import re

import pytest

from tests.server.fakes import ScriptedEngine
from tests.server.harness import RunningServer, running

FILES = ["app.js", "convergence.js", "examples.js", "icon.svg", "lane.js", "requests.js", "stream.js", "style.css"]


def test_the_page_and_all_it_names_are_served(server: RunningServer) -> None:
    page = server.shared_http.get("/")
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(/playground/[^"]+)"', page.text)
    assert named
    for path in [*named, *(f"/playground/{name}" for name in FILES)]:
        answered = server.shared_http.get(path)
        assert answered.status_code == 200, path
        for imported in re.findall(r'from "\./([^"]+)"', answered.text):
            assert imported in FILES


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in FILES)])
def test_nothing_comes_from_other_hosts(server: RunningServer, path: str) -> None:
    answered = server.shared_http.get(path)
    policy = answered.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[^\s\"'`/]+", answered.text)) <= {"http://www.w3.org"}
    assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=", answered.text)


def test_other_paths_are_no_files(server: RunningServer) -> None:
    for path in ("/playground/", "/playground/nothing.js", "/playground/..%2Froutes.py", "/playground/__init__.py"):
        answered = server.shared_http.get(path)
        assert (answered.status_code, answered.json()["error"]["code"]) == (404, "unknown_url")


def test_the_page_needs_no_key_and_the_api_does() -> None:
    with running(ScriptedEngine(), api_keys=["secret"]) as server:
        assert server.shared_http.get("/").status_code == 200
        assert server.shared_http.get("/playground/app.js").status_code == 200
        assert server.shared_http.get("/v1/models").status_code == 401


def test_it_can_be_turned_off() -> None:
    with running(ScriptedEngine(), playground=False) as server:
        assert server.shared_http.get("/").status_code == 404
        assert server.shared_http.get("/playground/app.js").status_code == 404
