"""Streams in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import Any


async def as_async(stream: Generator[Any, Any, Any]) -> AsyncIterator[Any]:
    """The items of a stream for `async for`, each waited for in a thread; the stream is closed when the loop ends.

    A task that is cancelled lets the item that is being made come to its end first: one pass of the model.

    Args:
        stream: as `create_completion` and `create_chat_completion` give it with stream=True.
    """
    nothing = object()
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, stream, nothing))
            try:
                item = await asyncio.shield(step)
            finally:
                await asyncio.wait([step])
            if item is nothing:
                return
            yield item
    finally:
        stream.close()
