"""Checks the links of a built site: that files and anchors are there, that addresses of other sites are well formed.

python .ci/check_links.py docs/_build/html
"""

import html.parser
import sys
import urllib.parse
from pathlib import Path

#: Attributes with an address, by tag.
ADDRESSES = {"a": "href", "img": "src", "link": "href", "script": "src", "source": "src"}


class Page(html.parser.HTMLParser):
    """The anchors of a page, and the addresses that it links to."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links = {"", "top"}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.update(attributes[name] for name in ("id", "name") if attributes.get(name))
        if attributes.get(ADDRESSES.get(tag)):
            self.links.append(attributes[ADDRESSES[tag]])


def well_formed(address: urllib.parse.SplitResult) -> bool:
    """Whether the address of another site could be one."""
    if address.scheme in ("mailto", "data", "javascript"):
        return True
    host = address.hostname or ""
    dotted = "." in host and not host.startswith(".") and not host.endswith(".")
    return address.scheme in ("http", "https") and dotted and " " not in address.geturl()


def broken_links(folder: Path) -> list[str]:
    """`page: link` of each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html") if "_static" not in path.parts}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                good = well_formed(address)
            else:
                target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
                good = target.is_file()
                if good and target in pages:
                    good = urllib.parse.unquote(address.fragment) in pages[target].anchors
            if not good:
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return sorted(set(broken))


def main(folder: str) -> None:
    broken = broken_links(Path(folder))
    if broken:
        sys.exit(f"{len(broken)} links that lead nowhere:\n" + "\n".join(broken[:50]))
    print(f"{folder}: every link leads somewhere")


if __name__ == "__main__":
    main(sys.argv[1])
