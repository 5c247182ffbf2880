"""The documentation site: `python -m sphinx -W --keep-going -b html docs build/docs`.

Pages are plain Markdown that reads as well in the repository. What they name in
backticks, `atebm_jax.energy.joint` or `atebm_jax/energy.py`, becomes a link to the API
reference here. Formulas are drawn by MathJax, which the reader's browser fetches.
"""

import importlib
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import atebm_jax

logger = logging.getLogger(__name__)

project = "atebm_jax"
author = "The atebm_jax authors"
release = atebm_jax.__version__
html_title = f"atebm_jax {release}"
html_theme = "furo"
html_show_copyright = False
templates_path = ["_templates"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# One file with its fonts inside, of the version that its hash names.
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@3.2.2/es5/tex-svg.js"
mathjax_options = {
    "integrity": "sha384-KKWa9jJ1MZvssLeOoXG6FiOA"
    "ZfAgmzsIIfw8BXwI9+kYm0lPCbC6yTQPBC00F1/L",
    "crossorigin": "anonymous",
}

# Every name of this project must exist; those of other libraries are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!atebm_jax).*")]
# In docstrings `x` is code.
default_role = "code"
# The page's packages come with another extra.
autodoc_mock_imports = ["gradio", "starlette"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "no-value": True}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    _prefer_modules()
    app.add_post_transform(LinkCode)
    app.connect("source-read", _list_other_pages)
    app.connect("doctree-read", _check_formulas)
    app.connect("doctree-read", _link_files_outside)
    # Before napoleon, which has priority 500.
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
    app.connect("autodoc-process-signature", _clear_tuple_fields)
    app.connect("autodoc-process-signature", _hide_flax_arguments)


def _prefer_modules() -> None:
    """Names a module where its package has a function of that name too."""
    for module in pkgutil.walk_packages(atebm_jax.__path__, "atebm_jax."):
        package, _, name = module.name.rpartition(".")
        if module.name in sys.modules:
            setattr(sys.modules[package], name, sys.modules[module.name])


def _check_formulas(app: Sphinx, document: nodes.document) -> None:
    """Warns of a formula that is no TeX, which a reader's browser would only show."""
    for node in document.findall(
        lambda n: isinstance(n, nodes.math | nodes.math_block)
    ):
        try:
            latex2mathml.tex2mathml(node.astext())
        except MathError as error:
            logger.warning("formula %r: %s", node.astext(), error, location=node)


class LinkCode(SphinxPostTransform):
    """Code that names a part of the package links to the API reference."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        domain = self.env.domains.python_domain
        page = self.env.current_document.docname
        inside = page.removeprefix("api/") if page.startswith("api/") else None
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, nodes.title | nodes.reference):
                continue
            name = next(
                (n for n in _meanings(node.astext(), inside) if n in domain.objects),
                None,
            )
            if name is None:
                continue
            entry = domain.objects[name]
            link = make_refnode(
                self.app.builder,
                page,
                entry.docname,
                entry.node_id,
                node.deepcopy(),
                name,
            )
            node.replace_self(link)


def _meanings(text: str, module: str | None) -> list[str]:
    """The dotted names that a piece of code may stand for, the likeliest first."""
    if match := re.fullmatch(r"(atebm_jax(?:/\w+)+)(?:\.py|/)", text):
        return [match[1].replace("/", ".")]
    if not (match := re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", text)):
        return []
    named = match[1]
    if named.startswith("atebm_jax."):
        return [_defined_as(named)]
    if module is None:
        return []
    return [f"{module}.{named}"] + [f"atebm_jax.{named}"] * ("." in named)


def _defined_as(name: str) -> str:
    """Where a name that may be passed on by a package is defined."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        rest = parts[length:]
        for part in rest:
            found = getattr(found, part, None)
        home, inner = (
            getattr(found, key, None) for key in ("__module__", "__qualname__")
        )
        own = isinstance(home, str) and home.startswith("atebm_jax") and inner
        return f"{home}.{inner}" if rest and own else name
    return name


def _list_other_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the pages that the index does not name at its mark, so that none is lost."""
    if page == "index":
        named = {line.strip() for line in source[0].splitlines()}
        pages = {path.stem for path in Path(app.srcdir).glob("*.md")}
        others = "\n".join(sorted(pages - named - {"index"}))
        source[0] = source[0].replace("OTHER_PAGES", others)


def _link_files_outside(app: Sphinx, document: nodes.document) -> None:
    """Markdown outside of this folder is downloaded, as other files there are."""
    for node in list(document.findall(addnodes.pending_xref)):
        path = Path(f"{node['reftarget']}.md")
        if node.get("refdomain") == "doc" and path.is_file():
            page = Path(app.env.doc2path(node["refdoc"]))
            link = addnodes.download_reference(
                reftarget=os.path.relpath(path, page.parent), refdoc=node["refdoc"]
            )
            link += node.children
            node.replace_self(link)


def _plain_text(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are written for people: formulas, and results without a type."""
    for index, line in enumerate(lines):
        bullet = re.match(r"(\s*\* )?", line)[0]
        # Outside of backticks: 2 * B, ||g||, x_ mean themselves.
        parts = line.removeprefix(bullet).split("`")
        parts[::2] = [
            re.sub(r"[*|]|_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]
        ]
        # A letter with a full stop alone would begin a list.
        lines[index] = bullet + re.sub(r"(: [A-Z])\.$", r"\1", "`".join(parts))
    if "Attributes:" in lines:
        # "a, b: ..." would be taken for a field b of the type a.
        for index in range(lines.index("Attributes:"), len(lines)):
            lines[index] = re.sub(r"^(\s+\w+), (\w+:)", r"\1/\2", lines[index])
    if what in ("attribute", "data") and lines:
        lines[0] = f":{lines[0]}"  # as below
    for index, line in enumerate(lines[:-1]):
        if line in ("Returns:", "Yields:"):
            text = lines[index + 1].lstrip()
            indent = len(lines[index + 1]) - len(text)
            # What is before a colon would be taken for a type.
            lines[index + 1] = f"{' ' * indent}:{text}"


def _clear_tuple_fields(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> None:
    """Comments document the fields of named tuples, not Python's "Alias for ..."."""
    for field in getattr(obj, "_fields", ()) if what == "class" else ():
        vars(obj)[field].__doc__ = None


def _hide_flax_arguments(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: Any,
    result: Any,
) -> tuple[str, Any] | None:
    """Every Flax module takes `parent` and `name`: nothing to tell."""
    if what == "class" and signature and ", parent: " in signature:
        return re.sub(r", parent: .*\)$", ")", signature, flags=re.DOTALL), result
    return None
