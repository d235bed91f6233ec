"""The documentation site builds without a warning, asks for nothing beyond itself, and fits a phone."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import npt
from npt import data
from scripts.marked import ROOT

PAGES = ("", "docs/api/", "docs/ecosystem/", "examples/first_look/")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build --strict` builds it: a link that leads nowhere or a docstring's fault is an error."""
    config = pytest.importorskip("mkdocs.config")
    build = pytest.importorskip("mkdocs.commands.build")
    pytest.importorskip("nbconvert")
    folder = tmp_path_factory.mktemp("site")
    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    loaded.plugins.on_startup(command="build", dirty=False)
    build.build(loaded)
    return folder


def test_every_document_is_a_page_and_every_page_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
    for path in [*documents, ROOT / "examples" / "first_look.md"]:
        name = path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("README").strip("/")
        assert (site / name / "index.html").is_file(), path
        assert not name or f'href="{name}/"' in home, path
    assert 'href="config.yaml/"' in home and (site / "config.yaml" / "index.html").is_file()
    for section in re.findall(r"^## (.*)$", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf">\s*{section}\s*<", home), section


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in npt.__all__ if f'id="npt.{name}"' not in text] == []
    assert "<i>" not in text and "admonition" not in text, "a docstring was read as something else"


@pytest.mark.parametrize("name", [*npt.__all__, "data.pack", "data.sample_blocks"])
def test_a_docstring_names_each_argument_on_a_line_of_its_own(name: str) -> None:
    """Else the reference takes the second for a part of the first."""
    value = getattr(data, name.removeprefix("data.")) if "." in name else getattr(npt, name)
    arguments = re.split(r"^\w+:$", inspect.getdoc(value) or "", flags=re.MULTILINE)
    for argument in inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters:
        for section in arguments[1:]:
            assert not re.search(rf"\S[ ,]+{argument}(, \w+)*: ", section), argument


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site behind a server of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(address: str, browser: Any, width: int) -> None:
    """No page is wider than the screen, none has an error in its console or fetches from elsewhere."""
    page, said, asked = browser.new_page(viewport={"width": width, "height": 900}), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for name in PAGES:
        page.goto(address + name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
