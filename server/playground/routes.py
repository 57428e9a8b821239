"""GET / and the files of the page. They need no API key: the page asks for one where the server does."""

from importlib import resources

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..http.middleware import PLAYGROUND_PREFIX

router = APIRouter(include_in_schema=False)

# Nothing but what this server sends, and nothing within frames of other pages.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = {
    file.name: file.read_bytes() for file in resources.files(__package__).joinpath("static").iterdir() if file.is_file()
}


@router.get("/")
async def playground() -> Response:
    """The page."""
    return _file("index.html")


@router.get(PLAYGROUND_PREFIX + "{name}")
async def playground_file(name: str) -> Response:
    """What the page consists of."""
    return _file(name)


def _file(name: str) -> Response:
    content = _FILES.get(name)
    if content is None:
        raise HTTPException(404)
    return Response(content, media_type=_MEDIA_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
