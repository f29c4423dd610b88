"""Promise: reading any study or schedule file ends soon, with clear messages when it is wrong."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunesearch.errors import FileError
from prunesearch.files import load_schedule, load_study, write_yaml
from prunesearch.yaml_text import DEEPEST, LONGEST, MOST_BYTES, MOST_VALUES, read_yaml_text

STUDY = """
version: 1
name: x
model: {name: vit_digits_patch1_8}
space: {blocks: [1], keep: [0.5, 1.0]}
"""
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a: &a0 1\n" + "".join(f"a{index}: &a{index} [[*a{index - 1}]]\n" for index in range(1, 200))

# value in the place of any field -> expected message
VALUES: dict[str, tuple[str, str]] = {
    "number beyond a float": ("1" + "0" * 350, "a number of more than 300 digits"),
    "number beyond what Python reads": ("9" * 5000, "cannot be read as a whole number"),
    "hexadecimal beyond what Python prints": ("0x" + "f" * 4000, "is a text of|cannot be read|a number of more than"),
    "infinity": (".inf", "is inf; possible: a number"),
    "minus infinity": ("-.inf", "is -inf; possible: a number"),
    "exponent beyond a float": ("1e999", "is inf; possible: a number"),
    "not a number": (".nan", "is nan; possible: a number"),
    "date": ("2024-13-45", "is '2024-13-45'; possible: a number"),
    "binary number without digits": ("0b", "is '0b'; possible: a number"),
    "sexagesimal": ("1:30:00", "is '1:30:00'; possible: a number"),
    "value token": ("=", "is '='; possible: a number"),
    "merge token": ("<<", "is '<<'; possible: a number"),
    "tag of Python": ("!!python/object/apply:os.system ['true']", "the tag '.*python.*' is not known here"),
    "tag of bytes": ("!!binary =", "the tag '!!binary' is not known here"),
    "tag of a date": ("!!timestamp soon", "the tag '!!timestamp' is not known here"),
    "tag of a set": ("!!set {a}", "the tag '!!set' is not known here"),
    "tag of a number before text": ("!!int abc", "is 'abc', which cannot be read as a whole number"),
    "tag of an own": ("!mine 3", "the tag '!mine' is not known here"),
    "list in itself": ("&a [*a]", "contains itself"),
    "mapping in itself": ("&a {a: *a}", "contains itself"),
    "lists in lists": ("[" * 3000 + "]" * 3000, f"more than {DEEPEST} lists or mappings within each other"),
    "list as a name": ("{[1, 2]: 3}", "a name is a list; possible: text"),
    "mapping as a name": ("{{a: b}: 3}", "a name is a mapping; possible: text"),
    "number as a name": ("{1: 2}", "unknown field|is a mapping; possible"),
    "alias of nothing": ("*nobody", "found undefined alias"),
    "NUL, escaped": ('"a\\0b"', "holds the character U\\+0000"),
    "escape of a terminal": ('"\\e[31m"', "holds the character U\\+001B"),
    "half of a character": ('"\\ud800"', "holds the character U\\+D800"),
    "long text": ("x" * (LONGEST + 1), f"possible: up to {LONGEST:,}"),
    "long list": (f"[{', '.join(['1'] * (MOST_VALUES + 1))}]", f"more than {MOST_VALUES:,} values"),
    "nothing": ("", "is empty; possible: a number"),
}
FILES: dict[str, tuple[bytes, str]] = {
    "character that does not exist": (b'name: "\\UFFFFFFFF"', "this is not YAML"),
    "tab": (b"a:\n\t- b: c: d\n", "this is not YAML"),
    "NUL": (b"name: a\0b\n", "line 1: holds the character U\\+0000"),
    "escape of a terminal": (b"version: 1\nname: \x1b[31mred\n", "line 2: holds the character U\\+001B"),
    "other encoding": ("version: 1".encode("utf-16"), "cannot be read as text"),
    "no text": (bytes(range(256)), "cannot be read as text"),
    "alias bomb": (BOMB.encode(), f"more than {MOST_VALUES:,} values"),
    "chain of aliases": (CHAIN.encode(), "within each other"),
    "nested mappings": (b"{a: " * 3000, "within each other"),
    "nested blocks": (b"- " * 3000 + b"a", "within each other"),
    "many names": (b"".join(b"k%d: 1\n" % index for index in range(2000)), "more unknown fields"),
    "one name often": (b"a: 1\n" * 2000, "which are not listed"),
    "large": (b"# " + b"x" * MOST_BYTES, "is larger than 1 MB"),
    "two documents": (b"a: 1\n---\nb: 1\n", "this is not YAML"),
    "version of YAML": (b"%YAML " + b"1" * 5000 + b".1\n---\na: 1\n", "this is not YAML"),
    "comment alone": (b"# nothing\n", "is empty; possible: a mapping"),
    "nothing": (b"", "is empty; possible: a mapping"),
}


def refusal(read: Callable[..., Any], *arguments: Any) -> str:
    """The error message. Asserts that reading was quick."""
    begin = time.process_time()
    with pytest.raises(FileError) as caught:
        read(*arguments)
    assert time.process_time() - begin < 4
    text = str(caught.value)
    assert len(text) < 20_000 and text.replace("\n", "").isprintable()  # no control characters
    return text


@pytest.mark.parametrize(("value", "says"), VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("how", ["in a file", "by --set"])
def test_a_crooked_value_is_a_sentence(tmp_path: Path, value: str, says: str, how: str) -> None:
    path = tmp_path / "study.yaml"
    if how == "in a file":
        path.write_text(STUDY + f"finetune:\n  clip_grad: 1.0\n  learning_rate: {value}\n")
        text = refusal(load_study, path)
        assert "line" in text
    else:
        path.write_text(STUDY)
        text = refusal(load_study, path, [f"finetune.learning_rate={value}"])
        assert "line " not in text or "up to here" in text or "within each other" in text
    assert re.search(says, text), text


@pytest.mark.parametrize(("content", "says"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("read", [load_study, load_schedule])
def test_a_crooked_file_is_a_sentence(tmp_path: Path, content: bytes, says: str, read: Callable[..., Any]) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    text = refusal(read, path)
    assert text.startswith(str(path)) and re.search(says, text), text


@pytest.mark.parametrize("path", ["a\0b.yaml", "x" * 5000, ".", "nowhere.yaml", "/dev/zero"])
def test_a_path_that_cannot_be_one_is_a_sentence(path: str) -> None:
    with pytest.raises(FileError, match=r"Check the path|Give a readable|Check whether it is the right file"):
        load_study(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stop.trials.more=1", "no such place: 'more' is looked for in a single value"),
        ("name.0=1", "no such place: '0' is looked for in a single value"),
        ("space.blocks.-1=1", "no such place: '-1' is looked for in a list of 1"),
        ("space.blocks.1=1", "no such place: '1' is looked for in a list of 1"),
        (f"space.blocks.{'9' * 5000}=1", "no such place"),
        ("space.blocks.²=1", "no such place"),
        ("space.blocks.=1", "no such place"),
        ("stop..trials=1", "unknown field"),
        ("stop", "not of the form field=value"),
        ("=3", "not of the form field=value"),
        ("stop={trials: [}", "this is not YAML"),
        ("stop={trials: 1, trials: 2}", "given twice"),
        ("name=a\tb: c: d", "this is not YAML"),
    ],
)
def test_a_crooked_override_is_a_sentence(tmp_path: Path, override: str, says: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY + "stop: {trials: 3}\n")
    assert says in refusal(load_study, path, [override])


def test_an_override_forgets_the_lines_of_what_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    text = refusal(load_study, path, ["space={blocks: [x], keep: [5]}", "version=7"])
    assert "line" not in text and "space.blocks[0]: is 'x'" in text and "version: is 7" in text


def test_an_override_reaches_what_the_file_leaves_empty(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY + "stop:\n")
    assert load_study(path, ["stop.trials=7"]).stop.trials == 7


def test_a_byte_order_mark_and_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (STUDY + "metrics: &m [top5, loss]\nplugins: *m\n").encode())
    study = load_study(path)
    assert study.metrics == study.plugins == ("top5", "loss")


SCALARS: list[Any] = [
    "", "text", "~", "null", "yes", "No", "on", "=", "<<", "1", "1_000", "0x1f", "0o17", "017", "0b1", "1.5", "1e5",
    "2e-5", ".5", "5.", "1:30", "2024-01-05", ".inf", ".nan", "-", "#", "a: b", "a\nb", " a ", "ä", "'", '"', "{a}",
    "*a", "&a", "!a", "%a", "@a", "`a", "e5", "1.2.3", "_1", "+1",
    True, False, None, 0, -3, 10**20, 0.1, 1e-7, 1e22, -0.0, 1e300,
]  # fmt: skip


def test_what_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    content = {"list": SCALARS, "names": {str(value): index for index, value in enumerate(SCALARS)}}
    write_yaml(content, path)
    read = read_yaml_text(path.read_text())
    assert read.problems == [] and read.content == content
    assert [type(value) for value in read.content["list"]] == [type(value) for value in SCALARS]


def test_numbers_are_those_of_yaml_1_2() -> None:
    read = read_yaml_text("[1_000, 0x1F, 0o17, 017, 2e-5, 1E3, .5, -.inf, 2024-01-05, 1:30, 0b1, +3]")
    assert read.content == [1000, 31, 15, 17, 2e-5, 1000.0, 0.5, -math.inf, "2024-01-05", "1:30", "0b1", 3]
