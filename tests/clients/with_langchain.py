"""langchain-openai: invoke, stream, batch, a tool and its answer, structured output."""

import sys

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]


class Verdict(BaseModel):
    """A verdict."""

    good: bool


@tool
def look(deep: bool) -> str:
    """Look around."""
    return "nothing"


chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=16, max_retries=0)
assert chat.invoke("import os").usage_metadata["output_tokens"] <= 16
chunks = list(chat.stream("import os", stream_usage=True))
assert "".join(chunk.content for chunk in chunks) == chat.invoke("import os").content
assert len(chat.batch(["import os"] * 6)) == 6
long = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=200, max_retries=0)
asked = HumanMessage("import os")
# The bundled pair would go on calling to its last token, were it allowed more than one call.
called = long.bind_tools([look], tool_choice="any", parallel_tool_calls=False).invoke([asked])
assert called.tool_calls[0]["name"] == "look"
chat.bind_tools([look]).invoke([asked, called, look.invoke(called.tool_calls[0])])
assert long.with_structured_output(Verdict).invoke("import os").good in (True, False)
