"""openai-agents: an agent with an output type, and one with a tool, whose answer it sends back."""

import sys

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]
set_tracing_disabled(True)
served = OpenAIChatCompletionsModel(model, AsyncOpenAI(base_url=url, api_key="none", max_retries=0))


class Verdict(BaseModel):
    good: bool


@function_tool
def look() -> str:
    """Look around."""
    return "nothing"


short, long = (ModelSettings(max_tokens=most, temperature=0) for most in (16, 200))
assert Runner.run_sync(Agent("plain", model=served, model_settings=short), "import os").final_output
judge = Agent("judge", model=served, model_settings=long, output_type=Verdict)
assert Runner.run_sync(judge, "import os").final_output.good in (True, False)
# The bundled pair would go on calling to its last token, were it allowed more than one call.
forced = ModelSettings(max_tokens=60, temperature=0, tool_choice="required", parallel_tool_calls=False)
scout = Agent("scout", model=served, model_settings=forced, tools=[look])
done = Runner.run_sync(scout, "import os")
assert [each.type for each in done.new_items] == ["tool_call_item", "tool_call_output_item", "message_output_item"]
