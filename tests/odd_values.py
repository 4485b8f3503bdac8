"""Values for the bodies of requests: sound, odd, of the wrong kind, huge, nested, looped. All of a random source."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

Rng = random.Random


@dataclass(frozen=True)
class Written:
    """JSON, or what is nearly so, that json.dumps would not write."""

    text: str


def written(value: Any) -> str:
    """A value as JSON, with what is written already as it is."""
    if isinstance(value, Written):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


EDGES = (0, 1, -1, 2, 3, 7, 100, 255, 2000, 2001, 65536, 10**6, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**53,
         2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1)  # fmt: skip
NUMBERS = (*map(Written, ("1e400", "-1e400", "1e-400", "-0", "-0.0", "NaN", "Infinity", "1" + "0" * 400)), 0.5, 1.5,
           -0.5,
           1e-9, 1e30, -1e30, 3.4e38, 1e308, 0.999999999, 1.0)  # fmt: skip
TEXTS = ("", " ", "\n", "\0", "\ud800", "\udfff\ud800", "a", "é", "😀", "\u2028", "import os\n", "<|turn>user\n",
         "<turn|>",
         "<|tool_call>call:look{deep:true}<tool_call|>", "<|channel>thought\n", "<bos>", "<__media__>", "<image>",
         "{{ 1/0 }}",
         "{% for i in range(10**9) %}x{% endfor %}", "%s%n%n", "../../etc/passwd", "file:///etc/passwd", "none", "high",
         "auto", "deepseek", "http://127.0.0.1:1/", "data:image/png;base64,AAAA", "(a*)*b", "[", "\\", '"',
         "null")  # fmt: skip
LENGTHS = (10, 1000, 10_000, 300_000)
DEPTHS = (20, 100, 126, 130, 1000, 10_000, 200_000)


def deep(rng: Rng, depth: int = 0) -> str:
    """JSON that nests."""
    depth = depth or rng.choice(DEPTHS)
    begin, end, inner = rng.choice((("[", "]", ""), ('{"a":', "}", "1"), ('[{"a":', "}]", "[]"), ("[", "", "")))
    return begin * depth + inner + end * depth


def number(rng: Rng) -> Any:
    return rng.choice((*NUMBERS, *EDGES)) if rng.random() < 0.9 else anything(rng)


def whole(rng: Rng) -> Any:
    return rng.choice(EDGES) if rng.random() < 0.8 else number(rng)


def truth(rng: Rng) -> Any:
    return rng.random() < 0.6 if rng.random() < 0.8 else anything(rng)


def text(rng: Rng) -> str:
    chance = rng.random()
    if chance < 0.6:
        return rng.choice(TEXTS)
    if chance < 0.9:
        return rng.choice(TEXTS) * rng.choice(LENGTHS[:3])
    return rng.choice('a é😀"\\\n([{') * rng.choice(LENGTHS)


def texts(rng: Rng) -> Any:
    chance = rng.random()
    if chance < 0.2:
        return text(rng)
    if chance < 0.3:
        return [rng.choice(TEXTS) for _ in range(5000)]
    return [text(rng) if rng.random() < 0.9 else anything(rng) for _ in range(rng.randrange(5))]


def anything(rng: Rng) -> Any:
    """A value of any kind."""
    kind = rng.randrange(12)
    if kind < 2:
        return rng.choice((None, True, False))
    if kind < 4:
        return rng.choice((*NUMBERS, *EDGES))
    if kind < 6:
        return text(rng)
    if kind < 8:
        return rng.choice(([], {}, [[]], [{}], [None], {"": None}, [1], ["a"], {"a": 1}, {"type": 5}, {"content": []}))
    if kind == 8:
        return Written(deep(rng))
    if kind == 9:
        return [rng.choice(EDGES) for _ in range(rng.choice((3, 20_000)))]
    if kind == 10:
        return {f"{rng.choice(TEXTS)}{i}": i for i in range(rng.choice((3, 2000)))}
    return [anything(rng) for _ in range(rng.randrange(4))]


def ids(rng: Rng) -> Any:
    return [
        rng.choice((5, 6, *EDGES)) if rng.random() < 0.98 else anything(rng) for _ in range(rng.choice((1, 3, 3000)))
    ]


def prompt(rng: Rng) -> Any:
    return rng.choice((text, texts, ids, lambda rng: [text(rng), 5, rng.choice(EDGES)], lambda rng: [ids(rng),
                       text(rng)],
                       lambda rng: {"prompt_string": text(rng), "multimodal_data": texts(rng)},
                       anything))(rng)  # fmt: skip


def samplers(rng: Rng) -> Any:
    names = ["dry", "top_k", "typ_p", "top_p", "top_n_sigma", "min_p", "xtc", "temperature", "penalties", "infill",
             "adaptive_p", "nothing"]  # fmt: skip
    return rng.choice(
        (text(rng), "kfypmt" * 200, [rng.choice(names) for _ in range(rng.choice((0, 3, 500)))], texts(rng))
    )


def logit_bias(rng: Rng) -> Any:
    pairs = [[rng.choice((5, text(rng), rng.choice(EDGES))), rng.choice((False, number(rng)))] for _ in range(9)]
    return rng.choice((pairs, {str(each[0]): each[1] for each in pairs}, [[i, 1e38] for i in range(5000)],
                       [[i, False] for i in range(5000)], anything(rng)))  # fmt: skip


def lora(rng: Rng) -> Any:
    return [{"id": whole(rng), "scale": number(rng)} for _ in range(rng.randrange(3))]


def triggers(rng: Rng) -> Any:
    pattern = rng.choice(("(a*)*b", "[", "(" * 5000, "a" * 100_000, "(.|\n)*x", "((((((a+)+)+)+)+)+)+$", text(rng)))
    return [{"type": rng.choice((0, 1, 2, 3, -1, 9, text(rng))), "value": pattern, "token": rng.choice(EDGES)}]


def parser(rng: Rng) -> Any:
    """The parser of a chat as the server writes it: an arena of rules that name each other by their places."""
    kinds = ["epsilon", "start", "end", "literal", "sequence", "choice", "repetition", "and", "not", "any", "space",
             "chars", "json_string", "until", "schema", "rule", "ref", "atomic", "tag", "gbnf", "nothing"]  # fmt: skip
    made: list[Any] = [
        {"type": rng.choice(kinds), "literal": "a", "children": [rng.choice((0, 1, 99))], "child": rng.choice((0, 1,
        -1)),
         "min_count": rng.choice(EDGES), "max_count": rng.choice(EDGES), "name": "r", "rule": 0, "tag": "t",
         "pattern": text(rng)[:99], "ranges": [], "negated": False, "delimiters": ["x"], "grammar": "x", "schema": {},
         "raw": False, "trigger": False}
        for _ in range(3)
    ]  # fmt: skip
    arena = {"parsers": made, "rules": {"r": rng.choice((0, 1, 99))}, "root": rng.choice((0, 1, 2, 99, -1))}
    return rng.choice((json.dumps(arena), deep(rng), text(rng)))


def grammar(rng: Rng) -> Any:
    """GBNF."""
    n = rng.choice((10, 40, 2000, 100_000))
    few = min(n, 40)
    return rng.choice((
        "root ::= root", 'root ::= root "a" | "a"', 'root ::= a\na ::= b\nb ::= a "x"', 'root ::= ""*',
        'root ::= (("a"*)*)*',
        'root ::= ("a"?)*', 'root ::= ("")+', "root ::= nothing", "root ::=", "", "\0", 'root ::= "', "root ::= [",
        "root ::= [^]",
        "root ::= [z-a]", r"root ::= [\x00-\U0010FFFF]+", r"root ::= [^\x00-\U0010FFFF]", 'root ::= "\\U99999999"',
        f'root ::= "a"{{{n}}}', f'root ::= ("a"{{0,{n}}}){{0,{n}}}', 'root ::= "a"{5,2}', 'root ::= "a"{-1}',
        'root ::= "a"{99999999999999999999}', 'root ::= "a"{0}', "root ::= " + "(" * n + '"a"' + ")" * n,
        "root ::= " + "(" * n, "root ::= " + '"a" | ' * n + '"b"', "root ::= (" + '"a" | ' * few + '"a")*',
        "root ::= " + '"a"? ' * n, "root ::= " + "[a-z]? " * few + '"b"', 'root ::= "' + "a" * n + '"',
        "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(few)).replace("r0", "root", 1) + f'\nr{few} ::= "a"?',
        "\n".join(f"r{i} ::= r{i + 1} | r{i + 1}" for i in range(few)).replace("r0", "root", 1) + f'\nr{few} ::= "a"',
        "\n".join(f"r{i} ::= r{i + 1}" for i in range(n)).replace("r0", "root", 1) + f'\nr{n} ::= "a"',
        'root ::= ("a" root "b")?', 'root ::= "a" root | "a" root "b" | ""', "root ::= <[5]>", "root ::= <[99999999]>",
        "root ::= !<[5]>*", "root ::= <nothing>", "root ::= .", "root ::= .*", "root ::= (.)*" * 20, text(rng),
        "root ::= ((((.{0,9}){0,9}){0,9}){0,9}){0,9}", anything(rng),
    ))  # fmt: skip


PATTERNS = ("a", "^a", "a$", "^$", "^a*$", "^(a*)*$", "^(((a+)+)+)+$", "^(a|b){0,1000}$",
            "^((a{1000}){1000}){1000}$", "^[", "^[z-a]$",
            "^a{99999999999999999999}$", "^.{0,5000}$", "^a{5,2}$", "^\\", "^\\d+$", "^(", "^)$", "^(?=a)$",
            "^(?:a)$", "^[^]$",
            "^(" + "a?" * 1000 + ")$", "^" + "(" * 99 + "a" + ")" * 99 + "$", "^" + "(" * 5000 + "a" + ")" * 5000 + "$",
            "^" + "a|" * 5000 + "b$", "^" + "a" * 50_000 + "$", "^" + "[ab]" * 20_000 + "$", "^\\u{0}$",
            "^(a{0,2000}){0,2000}$")  # fmt: skip


def schema(rng: Rng, levels: int = 3) -> Any:
    """A JSON schema, or what somebody may take for one."""
    bound = rng.choice(EDGES)
    if rng.random() < 0.1 or levels == 0:
        return anything(rng)

    def inner() -> Any:
        return schema(rng, levels - 1)

    makers: tuple[Any, ...] = (
        lambda: {"type": "string", "maxLength": bound}, lambda: {"type": "string", "minLength": bound},
        lambda: {"type": "string", "minLength": bound, "maxLength": rng.choice(EDGES)},
        lambda: {"type": "array", "items": inner(), "minItems": bound},
        lambda: {"type": "array", "items": inner(), "maxItems": bound, "minItems": rng.choice(EDGES)},
        lambda: {"type": "array", "prefixItems": [inner() for _ in range(rng.choice((1, 3, 500)))]},
        lambda: {"type": "integer", "minimum": bound}, lambda: {"type": "integer", "maximum": bound},
        lambda: {"type": "integer", "exclusiveMinimum": bound, "exclusiveMaximum": rng.choice((*EDGES, number(rng)))},
        lambda: {"type": "string", "pattern": rng.choice(PATTERNS)}, lambda: {"type": "string", "pattern": text(rng)},
        lambda: {"type": "string", "format": rng.choice(("date", "time", "uuid", "date-time", "x"))},
        lambda: {"enum": [text(rng) for _ in range(rng.choice((0, 1, 9)))]}, lambda: {"enum": [*range(20_000)]},
        lambda: {"const": anything(rng)}, lambda: {"$ref": "#"}, lambda: {"$ref": "#/$defs/a"},
        lambda: {"$ref": rng.choice(("", "#/", "#/a/b/c", "#/properties/0", "https://127.0.0.1:1/x", "x" * 9999))},
        lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        lambda: {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        lambda: {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "allOf": [{"$ref": "#/$defs/a"}]},
        lambda: chained(rng), lambda: {"type": [rng.choice(("string", "null", "x")) for _ in range(rng.choice((1,
        500)))]},
        lambda: {rng.choice(("anyOf", "oneOf", "allOf")): [inner() for _ in range(rng.choice((0, 1, 4)))]},
        lambda: {"anyOf": [{"type": "string"}] * 3000}, lambda: {"not": inner()}, lambda: {"items": inner()},
        lambda: {"type": "object", "properties": {text(rng): inner() for _ in range(rng.choice((1, 3)))}},
        lambda: {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(rng.choice((20, 300)))}},
        lambda: {"type": "object", "properties": {"a": inner()}, "required": ["a"], "additionalProperties": inner()},
        lambda: {"type": "object", "additionalProperties": inner(), "required": texts(rng)},
        lambda: {"type": "object", "properties": anything(rng)},
        lambda: {"properties": {"é" * rng.choice(LENGTHS): {}}},
        lambda: {"type": "object", "minProperties": bound, "patternProperties": {"^a$": inner()}},
        lambda: nested(rng),
    )  # fmt: skip
    return rng.choice(makers)()


def chained(rng: Rng) -> Any:
    """Definitions of which each names the next, twice."""
    n = rng.choice((20, 60, 3000))
    key = rng.choice(("anyOf", "allOf", "oneOf"))
    made: dict[str, Any] = {f"d{i}": {key: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return {"$defs": made | {f"d{n}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def nested(rng: Rng) -> Any:
    """Schemas in schemas."""
    depth = rng.choice((10, 25, 40, 120, 5000))
    begin, end = rng.choice((
        ('{"items":', "}"), ('{"type":"array","minItems":9,"items":', "}"), ('{"anyOf":[', "]}"), ('{"allOf":[', "]}"),
        ('{"type":"object","required":["a"],"properties":{"a":', "}}"), ('{"additionalProperties":', "}"),
    ))  # fmt: skip
    return Written(begin * depth + "{}" + end * depth)


def response_format(rng: Rng) -> Any:
    return rng.choice((
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema(rng)}}, {"type": "json_object"},
        {"type": "json_object", "schema": schema(rng)}, {"type": "json_schema", "json_schema": {"schema": schema(rng)}},
        {"type": rng.choice(("text", "grammar", "regex", 5))}, anything(rng),
    ))  # fmt: skip


def tool(rng: Rng) -> Any:
    name = rng.choice(("look", "a b", "", "é" * 100, 'x"y', "a" * 100_000, text(rng)))
    given = {"name": name, "description": text(rng), "parameters": schema(rng), "strict": truth(rng)}
    if rng.random() < 0.3:
        given[rng.choice([*given])] = anything(rng)
    return rng.choice((
        {"type": "function", "function": given}, {"type": "function", "function": {"name": "look",
        "parameters": schema(rng)}},
        {"type": "function", **given}, {"name": name, "input_schema": schema(rng)}, {"type": "custom", "custom": given},
        anything(rng),
    ))  # fmt: skip


def tools(rng: Rng) -> Any:
    if rng.random() < 0.1:
        return [{"type": "function", "function": {"name": f"t{i}", "parameters": {}}} for i in range(300)]
    return [tool(rng) for _ in range(rng.choice((1, 1, 2, 5)))] if rng.random() < 0.9 else anything(rng)


def tool_choice(rng: Rng) -> Any:
    return rng.choice(("auto", "required", "none", {"type": "function", "function": {"name": "look"}}, anything(rng),
                       {"type": "allowed_tools", "allowed_tools": {"mode": "required",
                       "tools": anything(rng)}}))  # fmt: skip


def content(rng: Rng) -> Any:
    """What stands in a message."""
    url = rng.choice(("data:image/png;base64,AAAA", "data:image/png;base64,", "http://127.0.0.1:1/x.png",
                      "file:///etc/passwd",
                      "data:image/png;base64," + "A" * 100_000, "AAAA", text(rng)))  # fmt: skip
    part = rng.choice((
        {"type": "text", "text": text(rng)}, {"type": "image_url", "image_url": {"url": url}}, {"type": "input_text",
        "text": "a"},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}, {"type": "video_url",
        "video_url": {"url": url}},
        {"type": "image", "source": {"type": "base64", "data": url}}, {"type": "tool_use", "id": "1", "name": "x",
        "input": anything(rng)},
        {"type": "tool_result", "tool_use_id": "1", "content": anything(rng)}, {"type": "image_url",
        "image_url": anything(rng)},
        {"type": anything(rng)}, anything(rng),
    ))  # fmt: skip
    return rng.choice((text(rng), [part], [part, {"type": "text", "text": "a"}], [part] * 30, anything(rng)))


def message(rng: Rng) -> Any:
    role = rng.choice(("user", "user", "assistant", "system", "tool", "developer", "model", "", text(rng)))
    made: dict[str, Any] = {"role": role, "content": content(rng)}
    if rng.random() < 0.3:
        arguments = rng.choice((deep(rng), "{}", '{"deep": true}', text(rng), anything(rng)))
        call = {"id": "1", "type": "function", "function": {"name": text(rng), "arguments": arguments}}
        made |= {"role": "assistant", "tool_calls": rng.choice(([call], [call] * 20, anything(rng)))}
    if rng.random() < 0.2:
        made[rng.choice((*made, "reasoning_content", "tool_call_id", "name", "refusal"))] = anything(rng)
    return made if rng.random() < 0.95 else anything(rng)


def messages(rng: Rng) -> Any:
    if rng.random() < 0.05:
        return [{"role": rng.choice(("user", "assistant")), "content": "a"} for _ in range(3000)]
    return [message(rng) for _ in range(rng.choice((0, 1, 1, 2, 4)))] if rng.random() < 0.9 else anything(rng)


def template_values(rng: Rng) -> Any:
    names = ("enable_thinking", "messages", "tools", "bos_token", "add_generation_prompt", "x", "reasoning_effort")
    return {rng.choice(names): anything(rng) for _ in range(2)} if rng.random() < 0.9 else anything(rng)


def http(rng: Rng) -> bytes:
    """Bytes over a connection."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = b'{"messages":[{"role":"user","content":"a"}],"max_tokens":4}'
    form = head + b"Content-Type: multipart/form-data"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    return rng.choice((
        b"", b"\r\n", b"\0" * 1000, b"GET", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n" + body, head + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
        head + b"Content-Length: 9999\r\n\r\n" + body, head + b"Content-Length: x\r\n\r\n" + body,
        head + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n" + body, head + b"\r\n" + body, head, head + b"\r\n",
        head + b"Content-Length: 1\r\n\r\n" + body * 3, chunked + b"5\r\nhello\r\n0\r\n\r\n", chunked + b"zz\r\n",
        chunked,
        chunked + b"ffffffffffffffff\r\na", chunked + b"5;x=" + b"y" * 100_000 + b"\r\n", chunked + b"-1\r\n\r\n",
        chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), chunked + b"%x\r\n%s" % (len(body) + 5, body),
        head + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n", head + b"X: a\r\n" * 10_000 + b"\r\n",
        head + b"no header\r\n\r\n",
        form + b"\r\nContent-Length: 9\r\n\r\n--x\r\n\r\n--",
        form + b"; boundary=x\r\nContent-Length: 60\r\n\r\n--x\r\nContent-Disposition: form-data",
        head + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\naaaaa",
        head + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nRange: bytes=" + b"0-1," * 5000 + b"\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 300, b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        rng.randbytes(2000),
    ))  # fmt: skip
