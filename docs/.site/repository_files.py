"""Hook of mkdocs: files outside docs/ that pages link to become part of the site, under repository/.

The links in a page are those that also work in a checkout, so a page may point at a recipe or at a result.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
COPIED = "repository"

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what is linked to from there."""
    pages = [file for file in files if file.is_documentation_page()]
    while pages:
        page = pages.pop()
        for target in _LINK.findall(page.content_string):
            path = _repository_path(page.src_uri, target)
            uri = _site_uri(path)
            if uri.startswith(COPIED) and uri not in files.src_uris and (ROOT / path).is_file():
                file = File.generated(config, uri, abs_src_path=str(ROOT / path))
                files.append(file)
                pages += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at what was added."""
    here = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(
        lambda link: posixpath.relpath(_site_uri(_repository_path(page.file.src_uri, link[1])), here), markdown
    )


def _repository_path(uri: str, target: str) -> str:
    """The file that a link of the page at this URI of the site points to, from the root of the repository."""
    source = uri.removeprefix(f"{COPIED}/") if uri.startswith(f"{COPIED}/") else f"docs/{uri}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    is_folder = (ROOT / path).is_dir()
    return f"{path}/README.md" if is_folder else path


def _site_uri(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIED}/{path}"
