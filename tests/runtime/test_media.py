"""Images and sounds in chats of `Llama`: what stands after them is drafted and the same, what stands before is kept."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from chats import NAMED, PLACE, TOOLS, by_schema, is_place
from children import post, serving
from click.testing import CliRunner
from encoders import make, png, wav
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.runtime import Llama, chat_native, media
from gemma_mtp.runtime.cli.main import main
from llama_cpp import mtmd_cpp
from llamas import OPTIONS, drafting

pytestmark = pytest.mark.skipif(chat_native.functions() is None, reason="needs libllama-common with our series")
SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"
SETTINGS = OPTIONS | {"n_ctx": 1024}
LONG = "The quick brown fox jumps over the lazy dog. " * 20


def image(seed: int = 1) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(seed)}"}}


def sound(seed: int = 1) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": wav(seed), "format": "wav"}}


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    made = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": made}


def ask(llm: Llama, *messages: dict[str, Any], **more: Any) -> Any:
    given = {"max_tokens": 24, "min_tokens": 24, "temperature": 0.0, "logprobs": True} | more
    return llm.create_chat_completion(list(messages), **given)


def said(answer: Any) -> tuple[str, list[float]]:
    """The text, and how likely each of its tokens was, which depends on what was seen."""
    (choice,) = answer["choices"]
    return choice["message"]["content"], [each["logprob"] for each in choice["logprobs"]["content"]]


@pytest.fixture(scope="module")
def pairs(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Random targets with projectors and a drafter: with vision alone, with sound, unified. But for E2B's and E4B's
    widths llama.cpp reads an image at once."""
    root = tmp_path_factory.mktemp("pairs")
    return {
        kind: convert_pair(make(kind, root / kind), tiny["ordered"], root / f"{kind}-files", "F32", "F32", mmproj="F32")
        for kind in ("26B", "E2B", "12B")
    }


@contextmanager
def opened(pair: Pair, **options: Any) -> Iterator[Llama]:
    with closing(Llama(pair.target, **(SETTINGS | options))) as llm:
        yield llm


@pytest.fixture(scope="module")
def seeing(pairs: dict[str, Pair]) -> Iterator[Llama]:
    with opened(pairs["26B"]) as llm:
        yield llm


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each image or sound that is encoded."""
    calls: list[int] = []
    encode = mtmd_cpp.mtmd_encode_chunk

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", counted)
    return calls


REQUESTS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([user("Look: ", image(1), "What is", " this?")], {}),
    ([user(image(2))], {"temperature": 1.0, "seed": 7}),
    ([user(LONG, image(1), image(1), LONG)], {"temperature": 1.0, "seed": 7, "draft_length": "auto"}),
    ([user(image(1), "And?"), {"role": "assistant", "content": "So."}, user(sound(1), image(2), sound(2), "Or?")], {}),
]


@pytest.mark.parametrize("kind", ["26B", "E2B", "12B"])
def test_text_after_images_and_sounds_is_drafted_and_the_same(kind: str, pairs: dict[str, Pair]) -> None:
    """With MTP and without, in batches of another size, and where the KV cache forgets what is out of the window."""
    asked = REQUESTS[:-1] if kind == "26B" else REQUESTS
    plain: dict[str, Any] = {"drafter": None}
    for options, others in (({}, [plain, {"n_batch": 96}]), ({"swa_full": False}, [plain | {"swa_full": False}])):
        with opened(pairs[kind], **options) as llm, drafting(llm):
            drafted = [ask(llm, *messages, **more) for messages, more in asked]
        assert all(answer["timings"]["draft_n"] > 0 for answer in drafted)
        for other in others:
            with opened(pairs[kind], **other) as llm:
                alone = [said(ask(llm, *messages, **more)) for messages, more in asked]
            assert alone == [said(answer) for answer in drafted]


def test_it_is_what_llama_server_makes(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["E2B"]
    files = "-m", pair.target, "--mmproj", pair.projector, "--spec-draft-model", "none"
    with (
        serving(SERVER, tmp_path / "log", *files, "-c", 1024, "--reasoning", "off", "-fa", "on") as url,
        opened(pair) as llm,
    ):
        for messages, more in REQUESTS:
            theirs = {"messages": messages, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            for given in (theirs, {**theirs, "temperature": 1.0, "seed": 7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}):
                answer = post(f"{url}/v1/chat/completions", given)
                ours = ask(llm, *messages, **(more | {"temperature": given["temperature"], "seed": 7}))
                assert ours["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
                text = answer["choices"][0]["message"]["content"].replace("\ufffd", "")  # half of a character
                assert said(ours)[0].replace("\ufffd", "") == text


def test_what_was_seen_is_not_encoded_again(seeing: Llama, encoded: list[int]) -> None:
    """The text before an image, the image and the text behind it are kept, and no image passes for another."""
    seeing.reset()
    first = ask(seeing, user(LONG, image(1), LONG))
    whole = first["timings"]["prompt_n"]
    assert (len(encoded), first["timings"]["cache_n"]) == (1, 0)
    again = ask(seeing, user(LONG, image(1), LONG))
    assert (len(encoded), again["timings"]["prompt_n"]) == (1, 1)
    assert said(again) == said(first)
    further = ask(seeing, user(LONG, image(1), LONG + "Why?"))
    assert len(encoded) == 1
    assert 0 < further["timings"]["prompt_n"] < 20
    other = ask(seeing, user(LONG, image(2), LONG))
    assert len(encoded) == 2
    assert whole / 2 < other["timings"]["prompt_n"] < whole - 100  # the text before it is still there
    assert said(other)[1] != said(first)[1]
    two = ask(seeing, user(LONG, image(2), LONG), {"role": "assistant", "content": "So."}, user(image(1), "And?"))
    assert len(encoded) == 3
    assert two["timings"]["cache_n"] > whole - 20
    assert said(ask(seeing, user(LONG, image(1), LONG))) == said(first)
    assert len(encoded) == 4
    seeing.n_tokens = seeing.input_ids.tolist().index(min(seeing.input_ids[:whole])) + 1  # in the middle of it
    assert said(ask(seeing, user(LONG, image(1), LONG))) == said(first)
    assert len(encoded) == 5


def test_states_and_caches_hold_images(pairs: dict[str, Pair], encoded: list[int]) -> None:
    with opened(pairs["26B"]) as llm:
        llm.set_cache(llama_cpp.LlamaRAMCache())
        first = said(ask(llm, user(image(1), LONG)))
        ask(llm, user(image(2), LONG))
        assert said(ask(llm, user(image(1), LONG))) == first
        assert len(encoded) == 2
        llm.set_cache(None)
        state = llm.save_state()
        llm.reset()
        llm.load_state(state)
        assert said(ask(llm, user(image(1), LONG))) == first
        assert len(encoded) == 2


def test_tools_and_schemas_and_streams(pairs: dict[str, Pair]) -> None:
    """As with text: calls are what parameters allow, and the same in a stream, and without drafts."""
    asked: list[dict[str, Any]] = [
        {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 400},
        {"response_format": by_schema(PLACE), "max_tokens": 400},
        {"reasoning_effort": "high"},
    ]
    told = []
    for drafter in ("auto", None):
        with opened(pairs["26B"], drafter=drafter) as llm:
            for more in asked:
                given = {"min_tokens": None, "logprobs": None, "seed": 1, "temperature": 0.8, **more}
                answer = ask(llm, user(image(1), "Where is it?"), **given)
                (choice,) = answer["choices"]
                chunks = ask(llm, user(image(1), "Where is it?"), **given, stream=True)
                deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
                text = "".join(delta.get("content") or "" for delta in deltas)
                assert text == (choice["message"]["content"] or "")
                calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
                told.append((text, calls, choice["finish_reason"]))
    assert told[:3] == told[3:]
    (called, schema, _) = told[:3]
    assert is_place(json.loads(called[1][0]["arguments"]))
    assert is_place(json.loads(schema[0]))


def test_the_loop_of_stock_reads_images(seeing: Llama, encoded: list[int]) -> None:
    seeing.reset()
    given = {"mirostat_mode": 2, "temperature": 1.0, "seed": 3}
    answers = [ask(seeing, user("See ", image(1), "What?"), **given) for _ in range(2)]
    assert said(answers[0])[0] == said(answers[1])[0]
    assert len(encoded) == 1


def test_a_prompt_may_be_read_alone(seeing: Llama, encoded: list[int]) -> None:
    seeing.reset()
    assert ask(seeing, user(image(1), "What?"), max_tokens=0, min_tokens=0, logprobs=None)["timings"]["prompt_n"] > 60
    assert ask(seeing, user(image(1), "What?"))["timings"]["prompt_n"] == 1
    assert len(encoded) == 1


def test_a_failure_leaves_what_was_there(seeing: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    first = said(ask(seeing, user("See ", image(1), "What?")))
    monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", lambda *_: 1)
    with pytest.raises(RuntimeError, match="could not encode an image"):
        ask(seeing, user("See ", image(1), "What?"), user(image(2), "And?"))
    monkeypatch.undo()
    assert said(ask(seeing, user("See ", image(1), "What?"))) == first


def test_a_marker_in_a_text_is_text(seeing: Llama) -> None:
    words = mtmd_cpp.mtmd_default_marker().decode()
    assert ask(seeing, user(words, image(1), words))["usage"]["prompt_tokens"] > 70


def test_a_projector_is_loaded_when_it_is_needed(pairs: dict[str, Pair], tmp_path: Path) -> None:
    with opened(pairs["26B"]) as llm:
        ask(llm, user("What?"))
        assert vars(llm)["_projector"] is None
        seen = said(ask(llm, user(image(1), "What?")))
        assert vars(llm)["_projector"] is not None
    with pytest.raises(RuntimeError, match="closed"):
        ask(llm, user(image(1), "What?"))
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(pairs["26B"].target.read_bytes())
    with closing(Llama(alone, drafter=None, mmproj=pairs["26B"].projector, **SETTINGS)) as llm:
        assert said(ask(llm, user(image(1), "What?"))) == seen
        assert llm.__getstate__()["mmproj"] == pairs["26B"].projector


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, "there is no projector beside .+; put the model's mmproj file there"),
        ({"mmproj": None}, "loaded with mmproj=None; load it without"),
        ({"mmproj": False}, "loaded with mmproj=None; load it without"),
    ],
    ids=["none there", "None", "False"],
)
def test_without_a_projector_an_image_is_an_error(options: Any, wrong: str, demo: Pair) -> None:
    with closing(Llama(demo.target, **SETTINGS, **options)) as llm:
        with pytest.raises(link.MtpError, match=wrong):
            ask(llm, user(image(1), "What?"))
        assert said(ask(llm, user("import os")))[0]


@pytest.fixture(scope="module")
def narrow(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A target of another width."""
    return convert_pair(tiny["narrow"], tiny["narrow drafter"], tmp_path_factory.mktemp("narrow"), "F32", "F32")


def test_a_projector_of_another_model_is_an_error(
    pairs: dict[str, Pair], narrow: Pair, demo: Pair, tmp_path: Path
) -> None:
    with pytest.raises(link.MtpError, match=r"makes embeddings of 256 numbers, .+ reads 80; pass the mmproj"):
        Llama(narrow.target, mmproj=pairs["26B"].projector, **SETTINGS)
    with pytest.raises(link.MtpError, match="is no projector; pass the mmproj file"):
        Llama(demo.target, mmproj=demo.drafter, **SETTINGS)
    with pytest.raises(link.MtpError, match="name an existing GGUF file"):
        Llama(demo.target, mmproj=tmp_path / "none.gguf", **SETTINGS)
    with opened(pairs["26B"], mmproj=pairs["26B"].target) as llm, pytest.raises(RuntimeError, match="could not load"):
        ask(llm, user(image(1), "What?"))  # a target may hold encoders, and this one holds none


def url(kind: str, data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        (url("image/png", b"hello"), r"messages\[0\] part 1 \(data:.+\) is no image \(PNG"),
        (url("image/png", base64.b64decode(png(1))[:90]), "is no image"),
        (url("audio/wav", base64.b64decode(wav())), "is no image"),
        ({"type": "image_url", "image_url": {"url": "/none/such.png"}}, "such.png.+No such file.+give a file's path"),
        ({"type": "image_url", "image_url": "x" * 5000}, r"x\.\.\.\) cannot be read: .+give a file's path"),
        ({"type": "image_url", "image_url": {"url": "data:image/png"}}, "cannot be read"),
        ({"type": "image_url", "image_url": {}}, "part 1 has no image_url; give .+url"),
        ({"type": "image_url"}, "has no image_url"),
        ({"type": "input_audio", "input_audio": {"data": "%%%"}}, "cannot be read: .+give base64"),
        (sound(), "is a sound, for which the projector .+ has no encoder; leave it out"),
        ({"type": "video_url", "video_url": {}}, "'video_url', and this Llama reads the types text, image_url, input"),
        ({"type": "text"}, 'give its "text"'),
    ],
)  # fmt: skip
def test_what_is_none_is_refused(part: dict[str, Any], wrong: str, seeing: Llama) -> None:
    for stream in (False, True):
        with pytest.raises(ValueError, match=wrong) as told:
            ask(
                seeing,
                user("See ", image(1), "What?") | {"content": [{"type": "text", "text": "See"}, part]},
                stream=stream,
            )
        assert "\n" not in str(told.value)


def test_chats_of_stock_read_text_alone(demo: Pair) -> None:
    wrong = "text alone, as its chats are llama-cpp-python's own; load it without"
    with opened(demo, chat_format="chatml") as llm, pytest.raises(ValueError, match=wrong):
        ask(llm, user(image(1), "What?"))


def test_what_no_batch_can_hold_is_refused(pairs: dict[str, Pair]) -> None:
    with opened(pairs["26B"], n_batch=64) as llm, pytest.raises(ValueError, match="raise n_batch and n_ubatch"):
        ask(llm, user(image(1), "What?"))
    with opened(pairs["26B"], n_ctx=256) as llm, pytest.raises(ValueError, match="raise n_ctx"):
        ask(llm, user(*[image(1)] * 4, "What?"))


def test_images_are_for_one_prompt_at_a_time(seeing: Llama) -> None:
    (answer,) = seeing.create_chat_completions([[user(image(1), "What?")]])
    assert "one prompt at a time; use create_chat_completion" in str(answer)


@pytest.fixture
def web() -> Iterator[Callable[[bytes], str]]:
    """Serves a file, and gives its address."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: Any) -> None:
            pass

    def put(data: bytes) -> str:
        files["/it.png"] = data
        return f"http://127.0.0.1:{server.server_port}/it.png"

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield put
        server.shutdown()
        thread.join()


def test_where_images_may_be(
    seeing: Llama, web: Callable[[bytes], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = base64.b64decode(png(1))
    file = tmp_path / "it.png"
    file.write_bytes(data)
    wanted = said(ask(seeing, user(image(1), "What?")))
    monkeypatch.chdir(tmp_path)
    for where in (str(file), "it.png", file.as_uri(), web(data)):
        for given in (where, {"url": where}):
            assert said(ask(seeing, user({"type": "image_url", "image_url": given}, "What?"))) == wanted
            assert seeing.stats.prompt_tokens == 1
    with pytest.raises(ValueError, match="404"):
        ask(seeing, user({"type": "image_url", "image_url": web(data) + "x"}))
    monkeypatch.setattr(media, "MOST_BYTES", len(data) - 1)
    with pytest.raises(ValueError, match="download it, and give its path"):
        ask(seeing, user({"type": "image_url", "image_url": web(data)}))


def test_commands(pairs: dict[str, Pair], seeing: Llama, narrow: Pair, demo: Pair, tmp_path: Path) -> None:
    """--image and --audio in run and chat, /image in chat."""
    picture, tone = tmp_path / "it.png", tmp_path / "it.wav"
    picture.write_bytes(base64.b64decode(png(1)))
    tone.write_bytes(base64.b64decode(wav()))
    target, options = str(pairs["26B"].target), ["--temp", "0", "-n", "8", "-t", "1", "-c", "1024"]
    given = {"max_tokens": 8, "min_tokens": None, "top_k": 64, "min_p": 0.0}
    wanted = said(ask(seeing, user(image(1), image(1), "What?"), **given))[0]

    def done(*command: object, typed: str | None = None) -> Any:
        return CliRunner().invoke(main, [*map(str, command), *options], input=typed)

    ran = done("run", target, "--image", picture, "--image", picture, "-p", "What?")
    assert (ran.exit_code, ran.stdout) == (0, wanted + "\n"), ran.output
    talk = done("chat", target, "--image", picture, typed=f"/image {picture}\n/image none\nWhat?\n/new\nWhat?\n")
    text = said(ask(seeing, user("What?"), **given))[0]
    assert (talk.exit_code, talk.stdout) == (0, f"{wanted}\n{text}\n"), talk.output
    assert "there is no file 'none'" in talk.stderr
    assert "is a sound, for which" in done("run", target, "--audio", tone, "-p", "What?").stderr
    assert done("run", pairs["E2B"].target, "--audio", tone, "-p", "What?").exit_code == 0
    assert "no projector beside" in done("run", demo.target, "--image", picture, "-p", "What?").stderr
    assert "reads 80" in done("run", narrow.target, "--mmproj", pairs["26B"].projector, "-p", "What?").stderr
    lines = tmp_path / "lines.jsonl"
    lines.write_text("{}")
    many = done("run", target, "--image", picture, "--jsonl", lines, "--out", tmp_path / "out")
    assert "for a single prompt" in many.stderr


def test_libmtmd_is_quiet_but_where_it_is_asked(pairs: dict[str, Pair], capfd: pytest.CaptureFixture[str]) -> None:
    """And it is as before for others in the process."""
    with opened(pairs["26B"]) as llm:
        ask(llm, user(image(1), "What?"))
    assert capfd.readouterr().err == ""
    with opened(pairs["26B"], verbose=True) as llm:
        ask(llm, user(image(1), "What?"))
    assert "image decoded" in capfd.readouterr().err
