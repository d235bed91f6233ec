"""Hooks of mkdocs.yml: every page has its repository path on the site too, so that a link works here and on the code host.

The pages are README.md and all that its links lead to, inside docs/ or not; nothing is copied within the repository. The
navigation is docs/README.md: its headings are the sections, its links the pages. A notebook becomes a page of its cells, a
script or configuration a page with its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
FIRST, INDEX = "README.md", "docs/README.md"
#: Files that are shown as text, and the language that colours it.
SOURCES = {".py": "python", ".yaml": "yaml"}
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


def links_in(text: str, path: str) -> list[str]:
    """The repository paths that a document at `path` links to, in its order."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)]


def linked_files() -> list[str]:
    """README.md and the files that links lead to from it on, from page to page."""
    found = [FIRST]
    for path in found:
        if path.endswith(".md") and (ROOT / path).is_file():
            links = links_in((ROOT / path).read_text(encoding="utf-8"), path)
            found += [link for link in dict.fromkeys(links) if link not in found]
    return [path for path in found if (ROOT / path).is_file()]


def as_page(name: str) -> str:
    """The Markdown file that shows a file; for any other file its own name."""
    return f"{name}.md" if posixpath.splitext(name)[1] in SOURCES else re.sub(r"\.ipynb$", ".md", name)


def on_config(config: Any) -> Any:
    """Sets the navigation."""
    text = (ROOT / INDEX).read_text(encoding="utf-8")
    sections = [part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]
    pages = [{title: [as_page(path) for path in links_in(body, INDEX)]} for title, body in sections]
    config.nav = [{"Home": FIRST}, {"All pages": INDEX}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Gives every file its path in the repository, and adds those outside docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:  # not the theme's own
            files.remove(file)
            files.append(File.generated(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path))
    for path in linked_files():
        folder, name = posixpath.split(path)
        language = SOURCES.get(posixpath.splitext(name)[1])
        if language is not None:
            text = f"# {name}\n\n```{language}\n{(ROOT / path).read_text(encoding='utf-8')}```\n"
            files.append(File.generated(config, as_page(path), content=text))
        elif name.endswith(".ipynb"):
            body, resources = MarkdownExporter().from_filename(str(ROOT / path))
            files.append(File.generated(config, as_page(path), content=body))
            for picture, data in resources["outputs"].items():
                files.append(File.generated(config, posixpath.join(folder, picture), content=data))
        elif files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lets links to a file lead to the page that shows it."""
    return LINK.sub(lambda link: link.group().replace(link[1], as_page(link[1]), 1), markdown)
