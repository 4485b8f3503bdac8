"""The encoders of images and sounds beside a target: llama.cpp's libmtmd, which llama-server reads them with."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from gemma_mtp.runtime.context import Context
from gemma_mtp.runtime.media import Medium
from llama_cpp import llama_cpp as lib
from llama_cpp import mtmd_cpp as mtmd

# What the encoders of a type of part read, by llama.cpp's decoders of files (mtmd-helper.h).
FORMATS = {"image_url": "image (PNG, JPEG, BMP, GIF)", "input_audio": "sound (WAV, MP3, FLAC)"}


_SILENT: Any = lib.llama_log_callback(lambda level, text, data: None)


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """A block in which libmtmd does not tell stderr what becomes of each image, which is for the whole process."""
    if not verbose:
        mtmd.mtmd_helper_log_set(_SILENT, None)
    try:
        yield
    finally:
        if not verbose:
            mtmd.mtmd_helper_log_set(lib.llama_log_callback(), None)


class Projector:
    """Reads images and sounds for a target.

    Args:
        path: mmproj file of the target.
        llm: the target.

    Attributes:
        verbose: whether llama.cpp may say what it says.
        marker: what stands for each of them in a prompt; drawn, so that no text holds it.

    Raises:
        RuntimeError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, llm: Context) -> None:
        self.path, self.verbose, self._llm = path, llm.verbose, weakref.proxy(llm)
        self.marker = f"<__media_{secrets.token_hex(16)}__>"
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = llm.model_params.n_gpu_layers != 0
        params.n_threads, params.flash_attn_type = llm.n_threads, llm.context_params.flash_attn_type
        params.print_timings, params.media_marker = llm.verbose, self.marker.encode()
        params.warmup = False  # which is for memory: the first image or sound gets what it needs
        with _quiet(self.verbose):
            self.ctx = mtmd.mtmd_init_from_file(os.fsencode(path), llm.model, params)
        if not self.ctx:
            raise RuntimeError(
                f"llama.cpp could not load the projector {path}: it is damaged, of another kind, or memory is short; "
                "verbose=True shows which."
            )

    def close(self) -> None:
        """Free it."""
        with _quiet(self.verbose):
            mtmd.mtmd_free(self.ctx)

    def read(self, prompt: str, media: Sequence[Medium]) -> tuple[list[int], dict[int, Piece]]:
        """The tokens of a prompt, and what stands between them.

        Args:
            prompt: with a marker for each of the media.
            media: images and sounds.

        Returns:
            Token ids, those below zero for the positions of an image or a sound; and these, by the first position.
            The same image in the same place has the same ids, and 31 bits of each are of its hash.

        Raises:
            ValueError: one of them is no image or sound, or not of those that this projector reads, or too long for a
                batch.
            RuntimeError: llama.cpp cannot read the prompt.
        """
        with self._llm.guard.call(), _quiet(self.verbose):  # or it could be freed meanwhile
            self._llm.check_open()
            return self._read(self._cut(prompt, media))

    def _read(self, chunks: Chunks) -> tuple[list[int], dict[int, Piece]]:
        """The tokens of pieces."""
        tokens: list[int] = []
        seen = dict[int, Piece]()
        for number in range(mtmd.mtmd_input_chunks_size(chunks.handle)):
            chunk = mtmd.mtmd_input_chunks_get(chunks.handle, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                ids: Any = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                tokens += ids[: count.value]
                continue
            length = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            self._check_batch(chunk, length)
            seen[len(tokens)] = Piece(self, chunks, chunk, length)
            tokens += islice(_ids(mtmd.mtmd_input_chunk_get_id(chunk) or b"", len(tokens)), length)
        return tokens, seen

    def _decoded(self, medium: Medium) -> Any:
        """A medium's pixels or samples: a mtmd_bitmap, which the caller frees."""
        reads = mtmd.mtmd_support_vision if medium.kind == "image_url" else mtmd.mtmd_support_audio
        what = FORMATS[medium.kind]
        if not reads(self.ctx):
            raise ValueError(
                f"{medium.where} is a {what.split()[0]}, for which the projector {self.path} has no encoder; leave it "
                "out, or take a model that has one."
            )
        data = (ctypes.c_uint8 * len(medium.data)).from_buffer_copy(medium.data)
        made = mtmd.mtmd_helper_bitmap_init_from_buf_wrapper(
            self.ctx, data, len(data), False, mtmd.mtmd_helper_init_opt_default()
        )
        if made.bitmap and not made.video_ctx:
            return made.bitmap
        if made.video_ctx:  # where ffmpeg takes it for a film
            mtmd.mtmd_bitmap_free(made.bitmap)
            mtmd.mtmd_helper_video_free(made.video_ctx)
        raise ValueError(f"{medium.where} is no {what}, is damaged, or too large; give another file.")

    def _cut(self, prompt: str, media: Sequence[Medium]) -> Chunks:
        """A prompt cut at its markers."""
        if (shown := prompt.count(self.marker)) != len(media):
            raise ValueError(
                f"the chat template shows {shown} of {len(media)} images and sounds; leave the others out."
            )
        raw, chunks = prompt.encode(), Chunks()
        text = mtmd.mtmd_input_text(raw, len(raw), True, True)
        with ExitStack() as stack:
            bitmaps = []
            for each in media:
                bitmaps.append(self._decoded(each))
                stack.callback(mtmd.mtmd_bitmap_free, bitmaps[-1])
            array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            if mtmd.mtmd_tokenize(self.ctx, chunks.handle, ctypes.byref(text), array, len(bitmaps)):
                raise RuntimeError("llama.cpp could not read the chat's images or sounds; verbose=True shows why.")
        return chunks

    def _check_batch(self, chunk: Any, length: int) -> None:
        """Refuse what llama.cpp would split, and the attention within it with it, or end the process for."""
        if mtmd.mtmd_decode_use_mrope(self.ctx):
            raise ValueError(
                "this model's images have positions of several dimensions (M-RoPE); load it with a chat_handler of "
                "llama_cpp.llama_chat_format."
            )
        room = min(self._llm.n_batch, lib.llama_n_ubatch(self._llm.ctx))
        if length > room and mtmd.mtmd_decode_use_non_causal(self.ctx, chunk):
            raise ValueError(f"an image takes {length} tokens, a batch {room}; raise n_batch and n_ubatch.")


class Chunks:
    """A prompt in pieces: mtmd_input_chunks."""

    def __init__(self) -> None:
        self.handle = mtmd.mtmd_input_chunks_init()
        weakref.finalize(self, mtmd.mtmd_input_chunks_free, self.handle)


@dataclass(frozen=True)
class Piece:
    """An image or a sound within a prompt: a `context.Seen`.

    Attributes:
        length: positions it takes.
    """

    _projector: Projector
    _chunks: Chunks  # whose chunk it is
    _chunk: Any
    length: int

    def decode(self, ctx: Any, past: int, n_batch: int) -> None:
        """Encode it, and put it into a KV cache.

        Args:
            ctx: the target's llama_context.
            past: positions there are.
            n_batch: most of one batch.

        Raises:
            RuntimeError: llama.cpp could not.
        """
        with _quiet(self._projector.verbose):
            self._decode(ctx, past, n_batch)

    def _decode(self, ctx: Any, past: int, n_batch: int) -> None:
        projector, end = self._projector, lib.llama_pos()
        if mtmd.mtmd_encode_chunk(projector.ctx, self._chunk):
            raise RuntimeError(f"{projector.path} could not encode an image or a sound; verbose=True shows why.")
        rows = mtmd.mtmd_get_output_embd(projector.ctx)
        status = mtmd.mtmd_helper_decode_image_chunk(
            projector.ctx, ctx, self._chunk, rows, past, 0, n_batch, ctypes.byref(end),
            mtmd.mtmd_helper_post_decode_callback(), None,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def _ids(name: bytes, place: int) -> Iterator[int]:
    """Ids below zero for what has this hash and begins at this place, without end."""
    words = memoryview(hashlib.sha256(b"%s %d" % (name, place)).digest()).cast("i")
    return cycle([-1 - (word & 0x7FFFFFFF) for word in words])
