"""pydantic-ai: text with usage, a stream, an object by a schema and by a tool."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, model = sys.argv[1:3]
served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))


class Verdict(BaseModel):
    good: bool


async def main() -> None:
    plain = Agent(served, instructions="Be good", model_settings={"max_tokens": 16, "temperature": 0})
    answer = await plain.run("import os")
    assert 0 < answer.usage.output_tokens <= 16
    async with plain.run_stream("import os") as stream:
        assert await stream.get_output() == answer.output
    # The bundled pair would go on calling to its last token, were it allowed more than one call.
    settings = {"max_tokens": 200, "temperature": 0, "parallel_tool_calls": False}
    for kind in (NativeOutput(Verdict), Verdict):
        judge = Agent(served, output_type=kind, model_settings=settings)
        assert (await judge.run("import os")).output.good in (True, False)


asyncio.run(main())
