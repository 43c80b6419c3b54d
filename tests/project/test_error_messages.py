"""docs/errors.md: the messages that it quotes are those of the code, and it explains each class."""

import ast
import builtins
import re
from pathlib import Path

import pytest

import commlib.errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/errors.md").read_text()
BLOCKS = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
MESSAGES = [message.strip() for block in BLOCKS for message in block.split("\n\n")]
LITERAL = r'"((?:[^"\\\n]|\\.)*)"'  # of C++


def text_of(node):
    """The constant parts of a string, which Python has joined where literals stand side by side."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@pytest.fixture(scope="module")
def literals():
    """All text that the library can print, as one string."""
    said = []
    for source in (ROOT / "commlib").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                said += text_of(node)
    for source in (ROOT / "csrc").rglob("*"):
        if source.suffix in (".cc", ".h", ".cu", ".cuh"):
            for side_by_side in re.finditer(rf"{LITERAL}(?:\s*{LITERAL})*", source.read_text()):
                said.append("".join(re.findall(LITERAL, side_by_side[0])).replace('\\"', '"'))
    return "\n".join(said)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:60])
def test_a_quoted_message_is_one_of_the_codes(message, literals):
    """`…` stands for what the code puts in between; what is left must be in its text, word for word."""
    name, colon, rest = message.partition(": ")
    kind = getattr(commlib.errors, name, None) or getattr(builtins, name, None)
    if kind is not None:
        assert issubclass(kind, Exception)
    text = rest if kind is not None and colon else message
    parts = [part.strip(" .,;:()") for part in text.split("…")]
    assert any(len(part.split()) > 1 for part in parts), "nothing to tell it by"
    assert [part for part in parts if part not in literals] == []


def test_every_class_of_error_is_explained():
    names = [name for name, thing in vars(commlib.errors).items() if isinstance(thing, type)]
    assert len(names) == 6
    assert [name for name in names if f"| `{name}` |" not in PAGE] == []
