"""openai-agents: an agent with a tool, and one with an output type."""

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
forced = ModelSettings(max_tokens=200, temperature=0, tool_choice="required")
scout = Agent("scout", model=served, model_settings=forced, tools=[look], tool_use_behavior="stop_on_first_tool")
assert Runner.run_sync(scout, "import os").final_output == "nothing"
