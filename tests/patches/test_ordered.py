"""The ordered-embedding head and the native round of drafting, against numpy, the Python loop and llama-server."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from children import ended, post, serving, started
from gemma_mtp.convert import Pair, convert_pair, link
from gemma_mtp.patches import source
from gemma_mtp.runtime import Llama, native
from gemma_mtp.runtime.draft.drafter import DraftSettings
from gemma_mtp.runtime.sampling import gumbel
from gguf_files import copy_metadata, copy_tensors, finish
from llama_cpp import llama_cpp as lib
from llama_cpp import llama_cpp_ext as ext
from mtp_library import candidates, round_with_chances
from prompts import PROMPT
from tiny import PAIR

OPTIONS: dict[str, Any] = {"n_ctx": 512, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
SAMPLED = DraftSettings(temp=1.0, top_k=64, top_p=0.95, min_p=0.02, seed=11)
# Of the largest logit. The products round the hidden state to what the type is multiplied with: 16 bits, or 8.
TOLERANCE = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2, "Q8_0": 2e-2, "Q4_0": 2e-2, "Q4_K_M": 2e-2}


class Captured:
    """Keeps the drafter's last hidden states, the tensor result_norm, of every decode: [n_outputs, n_embd]."""

    def __init__(self, width: int) -> None:
        get = lib._lib
        get.ggml_get_name.restype, get.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        get.ggml_get_data.restype, get.ggml_get_data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        get.ggml_nbytes.restype, get.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]

        def seen(tensor: int, ask: bool, _: Any) -> bool:
            wanted = get.ggml_get_name(tensor) == b"result_norm"
            if wanted and not ask:
                raw = ctypes.string_at(get.ggml_get_data(tensor), get.ggml_nbytes(tensor))
                self.rows = np.frombuffer(raw, np.float32).reshape(-1, width)
            return wanted if ask else True

        self.callback = lib.ggml_backend_sched_eval_callback(seen)


def batch_of(tokens: list[list[int]], hidden: Any = None) -> Any:
    """A llama_batch of sequences one after another, logits for the last token of each; its arrays hang on to it."""
    flat = [(token, place, s, place == len(ids) - 1) for s, ids in enumerate(tokens) for place, token in enumerate(ids)]
    n = len(flat)
    sequences = [(ctypes.c_int32 * 1)(s) for _, _, s, _ in flat]
    batch = lib.llama_batch(
        n_tokens=n,
        token=(ctypes.c_int32 * n)(*(token for token, *_ in flat)),
        embd=None if hidden is None else hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=(ctypes.c_int32 * n)(*(place for _, place, *_ in flat)),
        n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
        seq_id=(ctypes.POINTER(ctypes.c_int32) * n)(
            *(ctypes.cast(s, ctypes.POINTER(ctypes.c_int32)) for s in sequences)
        ),
        logits=(ctypes.c_int8 * n)(*(last for *_, last in flat)),
    )
    batch.kept = (sequences, hidden)
    return batch


def several(
    pair: Pair, texts: list[list[int]], legal: Mapping[int, Any] | None = None
) -> Iterator[tuple[Any, Any, Any]]:
    """Hidden state, candidate ids and candidate logits of one draft step for several sequences in one batch.

    Args:
        pair: target and drafter.
        texts: of the sequences.
        legal: of some of them, whether each token may come next.
    """
    drafter = link.read_header(pair.drafter)
    capture = Captured(drafter.of_arch("embedding_length"))
    width = drafter.of_arch("embedding_length_out")
    files = (pair.target, pair.drafter)
    models = [lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params()) for path in files]
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.swa_full, params.kv_unified = 1024, len(texts), True, True
    params.n_threads = params.n_threads_batch = 1
    target = lib.llama_init_from_model(models[0], params)
    params.ctx_type, params.ctx_other, params.cb_eval = lib.LLAMA_CONTEXT_TYPE_MTP, target, capture.callback
    ctx = lib.llama_init_from_model(models[1], params)
    ext.llama_set_embeddings_nextn(target, True, False)
    assert lib.llama_decode(target, batch_of(texts)) == 0
    ends = np.cumsum([len(ids) for ids in texts]) - 1
    hidden = np.stack([native.hidden_row(target, int(end), width) for end in ends])
    step = batch_of([[ids[-1]] for ids in texts], hidden)
    for i, ids in enumerate(texts):
        step.pos[i] = len(ids)
    for sequence, each in (legal or {}).items():
        native.allow_drafts(ctx, sequence, each)
    assert lib.llama_decode(ctx, step) == 0
    for i in range(len(texts)):
        found = candidates(ctx, i)
        assert found is not None
        tokens, logits = found[0].copy(), found[1].copy()
        full = native.logits_row(ctx, i, len(drafter.vocabulary))
        assert np.array_equal(full[tokens], logits)
        assert np.isneginf(np.delete(full, tokens)).all()
        yield capture.rows[i], tokens, logits
    for opened in (ctx, target):
        lib.llama_free(opened)
    for model in models:
        lib.llama_model_free(model)


@pytest.mark.parametrize("quant", TOLERANCE)
def test_candidates_are_those_of_numpy(quant: str, tmp_path: Path) -> None:
    pair = convert_pair(PAIR / "gemma-4-demo", PAIR / "gemma-4-demo-assistant", tmp_path, "Q8_0", quant)
    known = link.read_header(pair.drafter).metadata
    clusters, top_k = known[link.KEY_N_CENTROIDS], known[link.KEY_TOP_K]
    centroids = known[link.KEY_CENTROIDS].reshape(clusters, -1)
    ordering = known[link.KEY_ORDERING].reshape(clusters, -1)
    tensor = next(t for t in gguf.GGUFReader(pair.drafter).tensors if t.name == "token_embd.weight")
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    rng = np.random.default_rng(3)
    texts = [rng.integers(100, 3000, size=n).tolist() for n in (7, 40, 150)]
    chosen = []
    for cur, ids, logits in several(pair, texts):
        best = np.argsort(centroids @ cur)[-top_k:]
        assert sorted(ids) == sorted(ordering[best].ravel())
        wanted = rows[ids] @ cur
        assert np.abs(logits - wanted).max() <= TOLERANCE[quant] * np.abs(wanted).max()
        chosen.append(frozenset(best.tolist()))
    assert len(set(chosen)) == len(texts)


def test_only_clusters_with_a_legal_token_are_read(demo: Pair) -> None:
    """A few tokens, nearly all, none, any: in one batch, where a sequence without a say goes by the scores alone."""
    known = link.read_header(demo.drafter).metadata
    clusters, top_k = known[link.KEY_N_CENTROIDS], known[link.KEY_TOP_K]
    centroids = known[link.KEY_CENTROIDS].reshape(clusters, -1)
    ordering = known[link.KEY_ORDERING].reshape(clusters, -1)
    rng = np.random.default_rng(4)
    texts = [rng.integers(100, 3000, size=n).tolist() for n in (7, 40, 150, 21, 64)]
    legal = {number: np.zeros(ordering.size, bool) for number in range(4)}
    legal[0][rng.choice(ordering.size, 40, replace=False)] = True  # of more clusters than are read
    legal[1][:] = True
    legal[1][ordering[rng.choice(clusters, clusters // 4, replace=False)]] = False
    legal[2][ordering[5, 3]] = True  # of fewer
    for number, (cur, ids, _) in enumerate(several(demo, texts, legal)):
        scores = centroids @ cur
        if number in legal:
            scores[~legal[number][ordering].any(axis=1)] -= 1e30
        read = {int(np.flatnonzero((ordering == token).any(axis=1))[0]) for token in ids}
        assert len(read) == top_k
        best = set(np.argsort(scores)[-top_k:].tolist())
        assert {each for each in best if scores[each] > -1e29} == {each for each in read if scores[each] > -1e29}
        if number in legal:
            assert (legal[number][ids]).any() == legal[number].any()


@pytest.fixture(scope="module")
def llm(demo: Pair) -> Iterator[Llama]:
    with closing(Llama(demo.target, **OPTIONS)) as opened:
        yield opened


def rounds(llm: Llama, draft: Callable[..., Any]) -> list[Any]:
    """What a way to draft makes after prefixes of a text."""
    assert llm.drafter is not None
    prompts = [prompt["text"] for prompt in json.loads((PAIR / "prompts.json").read_text())["prompts"]]
    ids, made = llm.tokenize("\n\n".join(prompts[:5]).encode()), []
    for n in range(5, 200, 24):
        llm.reset()
        hidden = llm.hidden(llm.decode(ids[:n], []))
        made.append(draft(llm.drafter, ids[n], hidden, n))
    return made


def drafting(choose: Any, length: int = 5) -> Callable[..., list[int]]:
    return lambda drafter, token, hidden, position: drafter.draft(token, hidden, position, length, choose)


@pytest.mark.parametrize("settings", [DraftSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_a_native_round_is_the_python_loop(
    settings: DraftSettings, llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.drafts_rounds()
    ours = rounds(llm, drafting(settings))
    assert rounds(llm, drafting(lambda logits, position: settings(logits, position))) == ours
    monkeypatch.setattr(native, "drafts_rounds", lambda: False)
    assert rounds(llm, drafting(settings)) == ours


@pytest.mark.parametrize("settings", [DraftSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_a_native_round_tells_and_minds_its_chances(settings: DraftSettings, llm: Llama) -> None:
    """They are of all candidates, at temperature 1; a round may end before one that is too small."""
    seen: list[float] = []

    def noted(logits: Any, position: int) -> int:
        token = settings(logits, position)
        seen.append(float(1 / np.exp(logits - logits[token], dtype=np.float64).sum()))
        return token

    ours = rounds(llm, partial(round_with_chances, length=5, settings=settings))
    assert [tokens for tokens, _ in ours] == rounds(llm, drafting(noted))
    assert np.allclose([chance for _, chances in ours for chance in chances], seen, rtol=1e-4)
    cut = rounds(llm, partial(round_with_chances, length=5, settings=settings, p_min=0.5))
    for (tokens, chances), found in zip(ours, cut, strict=True):
        kept = next((i for i, chance in enumerate(chances) if chance < 0.5), 5)
        assert found == (tokens[:kept], chances[:kept])
    assert len({len(tokens) for tokens, _ in cut}) > 2


def test_noise_is_that_of_the_python_side() -> None:
    """To the last bits: numpy and the C library may round a logarithm otherwise."""
    function = lib._lib.llama_mtp_gumbel
    function.restype = None
    function.argtypes = [ctypes.c_uint64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    ids = np.arange(4096, dtype=np.int32) * 63
    noise = np.empty(len(ids))
    for seed, position in ((0, 0), (7, 131071), (2**64 - 1, 5)):
        function(seed, position, ids.ctypes.data, len(ids), noise.ctypes.data)
        np.testing.assert_allclose(noise, gumbel(seed, position, ids), rtol=1e-13, atol=1e-15)


def with_tensors(drafter: Path, path: Path, ordering: Any) -> Path:
    """The drafter with its ordered head in tensors, as upstream's names have it."""
    reader, known = gguf.GGUFReader(drafter), link.read_header(drafter).metadata
    writer = gguf.GGUFWriter(path, link.DRAFTER_ARCH)
    copy_metadata(reader, writer, leaving=(link.KEY_CENTROIDS, link.KEY_ORDERING))
    copy_tensors(reader, writer)
    writer.add_tensor(
        "masked_embd_centroids.weight", known[link.KEY_CENTROIDS].reshape(known[link.KEY_N_CENTROIDS], -1)
    )
    writer.add_tensor("masked_embd_ordering", known[link.KEY_ORDERING].astype(ordering))
    finish(writer)
    return path


@pytest.mark.parametrize("ordering", [np.int32, np.int64, np.float32])
def test_tables_in_tensors_are_read_too(ordering: Any, demo: Pair, llm: Llama, tmp_path: Path) -> None:
    path = with_tensors(demo.drafter, tmp_path / "drafter.gguf", ordering)
    with closing(Llama(demo.target, drafter=path, **OPTIONS)) as other:
        assert rounds(other, drafting(DraftSettings(), 3)) == rounds(llm, drafting(DraftSettings(), 3))


SERVER = Path(llama_cpp.__file__).parent / "lib" / "llama-server"


def refused(*arguments: Any) -> str:
    """What llama-server says when it does not start."""
    command = [SERVER, *arguments, "-c", "512", "-np", "1", "-t", "1", "--port", "0"]
    with started(command, stdout=PIPE, stderr=STDOUT) as process:
        status, told, _ = ended(process)
    assert status > 0
    return told


def test_a_drafter_alone_says_what_it_is(demo: Pair) -> None:
    told = refused("-m", demo.drafter)
    assert "is an MTP drafter (gemma4-assistant)" in told
    assert "cannot run alone" in told
    assert "--spec-draft-model" in told


def test_a_drafter_of_another_target_is_refused(demo: Pair, tiny: dict[str, Path], tmp_path: Path) -> None:
    narrow = convert_pair(tiny["narrow"], tiny["narrow drafter"], tmp_path, "F32", "F32")
    told = refused("-m", narrow.target, "--spec-draft-model", demo.drafter, "--spec-type", "draft-mtp")
    assert f"{demo.drafter.name} was made for the target with fingerprint" in told


@pytest.mark.parametrize("backend", [True, False], ids=["backend sampling", "server's sampler"])
def test_llama_server_drafts_with_it(backend: bool, demo: Pair, tmp_path: Path) -> None:
    sampling = "--spec-draft-backend-sampling" if backend else "--no-spec-draft-backend-sampling"
    options = "--spec-draft-model", demo.drafter, "--spec-draft-adaptive", "off", sampling, "-c", 512
    with serving(SERVER, tmp_path / "log", "-m", demo.target, *options) as url:
        timings = post(f"{url}/completion", {"prompt": PROMPT, "n_predict": 64, "temperature": 0.0})["timings"]
    assert timings["draft_n_accepted"] > timings["draft_n"] / 3 > 0


def test_metal_supports_every_operation_of_the_head(tmp_path: Path) -> None:
    """Read in the pinned source: Metal itself has not been run."""
    file = "ggml/src/ggml-metal/ggml-metal-device.m"
    text = (source.unpack(tmp_path, f"{source.VENDORED}/{file}") / source.VENDORED / file).read_text()
    supports = text[text.index("bool ggml_metal_device_supports_op") :]
    for operation in ("MUL_MAT", "MUL_MAT_ID", "TOP_K", "GET_ROWS", "CONT"):
        assert f"case GGML_OP_{operation}:" in supports, operation
