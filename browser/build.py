"""Write `samplebrowser.html`, one file, from the files of this folder: `python browser/build.py`.

`page.html` has places for the style and the script, and for their hashes in its content policy. The script is all
modules, imports first, in one scope: no two modules may define the same name.
"""

import base64
import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "samplebrowser.html"
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_DEFINITION = re.compile(r"^(?:async )?(?:function\*?|const|let|class) (\w+)", re.MULTILINE)


def build() -> str:
    """Return the page as one file."""
    style = "\n" + (FOLDER / "style.css").read_text(encoding="utf-8")
    script = '\n"use strict";\n(() => {\n' + "\n".join(_collect("main.js", [])) + "})();\n"
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    values = {"style": style, "script": script, "style-hash": _hash(style), "script-hash": _hash(script)}
    return re.sub(r"\{([a-z-]+)\}", lambda match: values.get(match[1], match[0]), page)


def _collect(name: str, seen: list[str]) -> list[str]:
    """Return a module and those that it imports and that are not seen yet, without import and export."""
    seen.append(name)
    text = (FOLDER / name).read_text(encoding="utf-8")
    found = [part for needed in _IMPORT.findall(text) if needed not in seen for part in _collect(needed, seen)]
    body = re.sub(r"^export ", "", _IMPORT.sub("", text), flags=re.MULTILINE).strip("\n")
    found.append(f"// ======== {name} ========\n\n{body}\n")
    if name == "main.js":
        names = [match for part in found for match in _DEFINITION.findall(part)]
        twice = sorted({one for one in names if names.count(one) > 1})
        if twice:
            raise ValueError(f"defined in two modules: {', '.join(twice)}; rename one of each")
    return found


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8", newline="\n")
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes")
