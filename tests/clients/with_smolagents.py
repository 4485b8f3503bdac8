"""smolagents: a model, and an agent that calls tools until its steps are used up."""

import sys

from smolagents import OpenAIModel, Tool, ToolCallingAgent

url, model = sys.argv[1:3]


class Look(Tool):
    name = "look"
    description = "Looks around."
    inputs: dict[str, dict[str, str]] = {}  # noqa: RUF012 (as smolagents wants it)
    output_type = "string"

    def forward(self) -> str:
        return "nothing"


settings = {"api_base": url, "api_key": "none", "max_tokens": 200, "temperature": 0}
asked = [{"role": "user", "content": [{"type": "text", "text": "import os"}]}]
assert OpenAIModel(model, **settings)(asked).role == "assistant"
# The bundled pair would go on calling to its last token, were it allowed more than one call.
served = OpenAIModel(model, parallel_tool_calls=False, **settings)
agent = ToolCallingAgent(tools=[Look()], model=served, max_steps=2, verbosity_level=0)
agent.run("import os")
called = [call.name for step in agent.memory.steps for call in getattr(step, "tool_calls", None) or []]
assert called and set(called) <= {"look", "final_answer"}
