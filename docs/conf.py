"""How Sphinx builds these pages: `make docs`. Neither building nor reading them needs a network."""

import importlib
import re
import sys
from pathlib import Path

import commlib

project = "commlib"
release = version = commlib.__version__
copyright = "the authors of commlib"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "commlib"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_show_sourcelink = False
highlight_language = "text"  # of blocks that name no language

myst_heading_anchors = 4  # as GitHub names them, so that a link works in both places

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 90

nitpick_ignore_regex = [
    # Other libraries' types. Their own pages would have to be fetched to link to them.
    ("py:.*", r"(torch|numpy|nn|dist|transformers|torchtitan)\..*"),
    ("py:.*", r"Tensor|Parameter|ProcessGroup|DeviceMesh|Module|PreTrainedModel"),
    ("py:.*", r"(datasets\.)?(Iterable)?Dataset"),
    # The standard library's, for the same reason.
    ("py:.*", r"(typing|collections\.abc|pathlib|abc|types)\..*|Any|Path"),
    # What extension modules give, and what a class keeps for itself.
    ("py:.*", r"DeviceFacts|commlib\.nn\.shards\.Shard"),
    ("py:.*", r"commlib\.compat\.deep_ep\.communicators\.Communicators"),
    ("py:.*", r"commlib\.calls\.(Arrived|Rearrived)|commlib\.dispatched\.Owner"),
    # Type variables, and names for unions of types: signatures show them, and no page describes them.
    ("py:.*", r"(commlib\.[\w.]+\.)?(Array|SupportsDLPack|T|_Model|Layout|Overflow|RoutingMode|Steps)"),
]

# Each public name, under the package that exports it. A signature names the module in which it was written.
PACKAGES = ("commlib", "commlib.nn", "commlib.model", "commlib.compat.deep_ep")
PUBLIC = {
    f"{thing.__module__}.{thing.__qualname__}": f"{package}.{name}"
    for package in PACKAGES
    for name, thing in vars(importlib.import_module(package)).items()
    if name in sys.modules[package].__all__ and hasattr(thing, "__qualname__")
}


def resolve_public_name(app, env, node, content):
    """Link to the public name of a thing that was named by its own module, or by nothing but its name."""
    target = node.get("reftarget", "")
    ends = [public for public in PUBLIC.values() if public.endswith(f".{target}")]
    public = PUBLIC.get(target) or (ends[0] if len(ends) == 1 else None)
    if node.get("refdomain") != "py" or public is None:
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def describe_each(app, what, name, thing, options, lines):
    """Repeat what a docstring says of `a, b:` at once: Sphinx would take the first name for a type."""

    def repeat(found):
        return "".join(f":ivar {each}:{found[2]}" for each in found[1].split(", "))

    text = re.sub(r"^:ivar (\w+(?:, \w+)+):(.*\n(?: +.*\n)*)", repeat, "\n".join(lines), flags=re.MULTILINE)
    lines[:] = text.split("\n")


def link_to_files(app, docname, source):
    """Offer a Markdown file outside of docs/ as a file: by itself MyST would look for a page."""
    here = (Path(app.srcdir) / docname).parent

    def outside(link):
        there = (here / link[1]).resolve()
        return link[0] if there.is_relative_to(app.srcdir) else f"](path:{link[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#:]*\.md)\)", outside, source[0])


def setup(app):
    app.connect("missing-reference", resolve_public_name)
    app.connect("autodoc-process-docstring", describe_each, priority=600)  # after napoleon
    app.connect("source-read", link_to_files)
