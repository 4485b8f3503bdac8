"""The schemas of llama.cpp's test-json-schema-to-grammar, from the pinned sdist, through what `Llama` makes of them."""

from __future__ import annotations

import json
import re
from contextlib import closing
from typing import NamedTuple

import pytest
from chats import USER, by_schema
from gemma_mtp.convert import Pair
from gemma_mtp.patches import source
from gemma_mtp.runtime import Llama, chat_native
from gemma_mtp.runtime.chat import format_grammar
from llamas import OPTIONS

pytestmark = pytest.mark.skipif(chat_native.functions() is None, reason="needs libllama-common with our series")
SUITE = f"{source.VENDORED}/tests/test-json-schema-to-grammar.cpp"

# What differs on purpose. llama.cpp gives a grammar that allows more than the schema does; ours is an error, with:
REFUSED = {
    "array with empty items and prefixItems": "#/prefixItems is not supported beside items",
    "unanchored regexp": "#/pattern is supported between ^ and $ alone",
    "unsupported regexp in a property": "#/properties/a/pattern is not supported: unsupported group syntax",
}
# What stands in a JSON string has its escapes, and in a grammar none that it does not need; \w is a class. Formats are
# patterns, and a date is a day that there is. No number begins with 0 and goes on.
OURS = {
    "max -5": """root ::= ("-" ([1-4] [0-9]{1,15} | [5-9] [0-9]{0,15}))""",
    "exotic formats": "tuple-1 ::= uuid-string",
    "regexp quote": r'''root ::= "\"" ("\\\"") "\""''',
    "regexp": r"""dot ::= ([^\n\r"\\\x7F\x00-\x1F] | [\\] [\"\\bft])""",
    "regexp with unsupported shorthand": r'''root ::= "\"" (root-1{3,3} [A-Za-z0-9_]) "\""''',
    "regexp with escaped hyphen outside a character class": r'''root ::= "\"" ("a-b") "\""''',
}
# And where llama.cpp has an error, so have we.
ERROR = "JSON schema"
# A response_format without a schema is json_object, as in llama-server.
ANY_OBJECT = "empty schema (any value)"


class Case(NamedTuple):
    """A test of the suite; `grammar` is None where the schema is an error."""

    name: str
    schema: str
    grammar: str | None


def lines(grammar: str) -> list[str]:
    return [line.strip() for line in grammar.strip().splitlines()]


def spelled(raw: str, plain: str) -> str:
    return raw or str(json.loads(f'"{plain}"'))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The tests by name, as the suite has them."""
    if not source.kept_sdist().exists():
        pytest.skip("the sdist with the suite is not in the cache; make native gets it, where it builds")
    tree = source.unpack(tmp_path_factory.mktemp("suite"), SUITE)
    text = (tree / SUITE).read_text().partition("int main()")[0]
    literal = r'(?:R"""\((.*?)\)"""|"((?:[^"\\]|\\.)*)")'
    case = rf'test\(\{{\s*(SUCCESS|FAILURE),\s*"(.*?)",\s*{literal},\s*{literal},?\s*\}}\)'
    made = {
        name: Case(name, spelled(*schema), spelled(*grammar) if status == "SUCCESS" else None)
        for status, name, *literals in re.findall(case, text, re.DOTALL)
        for schema, grammar in [(literals[:2], literals[2:])]
    }
    assert len(made) == text.count("test({") > 80
    return made


def made(case: Case) -> list[str] | str:
    """The lines of our grammar, or what our error says."""
    try:
        if case.name == ANY_OBJECT:
            return lines(chat_native.schema_grammar({}))
        grammar = format_grammar(by_schema(json.loads(case.schema)))
    except ValueError as problem:
        return str(problem)
    assert grammar is not None
    return lines(grammar._grammar)


def test_its_schemas_have_its_grammars(cases: dict[str, Case]) -> None:
    assert {ANY_OBJECT, *REFUSED, *OURS} <= cases.keys()
    for case in cases.values():
        found = made(case)
        if case.grammar is None or case.name in REFUSED:
            assert isinstance(found, str), case.name
            assert REFUSED.get(case.name, ERROR) in found
        elif case.name in OURS:
            assert OURS[case.name] in found
            assert OURS[case.name] not in lines(case.grammar)
        else:
            assert found == lines(case.grammar), case.name


def test_a_chat_takes_and_refuses_the_same(cases: dict[str, Case], demo: Pair) -> None:
    with closing(Llama(demo.target, **OPTIONS)) as llm:
        templates = llm._templates
        assert templates is not None
        for case in cases.values():
            body = {"messages": [USER], "response_format": by_schema(json.loads(case.schema))}
            if case.grammar is None or case.name in REFUSED:
                with pytest.raises(ValueError, match=re.escape(REFUSED.get(case.name, ERROR))):
                    templates.prepare(body)
            else:
                assert templates.prepare(body)["grammar"], case.name
