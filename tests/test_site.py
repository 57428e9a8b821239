"""The documentation builds as a site in which no link is broken and nothing is loaded from another host."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOADING_ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class LoadedParts(HTMLParser):
    """Collects the addresses that a browser loads to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADING_ATTRIBUTES.get(tag, ""))
        self.addresses += [address] if address else []


def build_site(sources: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(sources / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(folder)], capture_output=True, text=True, env=environment, check=False
    )


def test_the_site_builds_strictly_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    built = build_site(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        parts = LoadedParts()
        parts.feed(page.read_text(encoding="utf-8"))
        assert parts.addresses
        assert [address for address in parts.addresses if "//" in address] == [], page.name


@pytest.mark.parametrize("target", ["missing.md", "settings.md#missing", "../../missing/"])
def test_a_broken_link_ends_the_build(tmp_path: Path, target: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    page = tmp_path / "docs" / "reference" / "metrics.md"
    page.write_text(f"{page.read_text(encoding='utf-8')}\n[broken]({target})\n", encoding="utf-8")
    built = build_site(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert target.removeprefix("../../").strip("/") in built.stderr
