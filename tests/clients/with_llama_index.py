"""llama-index-llms-openai-like: chat, stream, a tool, an object by a tool."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, model = sys.argv[1:3]


class Verdict(BaseModel):
    """A verdict."""

    good: bool


def look(deep: bool) -> str:
    """Look around."""
    return "nothing"


chat = OpenAILike(
    model=model, api_base=url, api_key="none", is_chat_model=True, is_function_calling_model=True, max_tokens=200,
    temperature=0, max_retries=0, context_window=2048,
)  # fmt: skip
asked = [ChatMessage(role="user", content="import os")]
whole = chat.chat(asked, max_tokens=16).message.content
assert whole
assert list(chat.stream_chat(asked, max_tokens=16))[-1].message.content == whole
assert chat.complete("import os", max_tokens=8).text
called = chat.chat_with_tools([FunctionTool.from_defaults(look)], user_msg="import os", tool_required=True)
assert chat.get_tool_calls_from_response(called)[0].tool_name == "look"
found = chat.structured_predict(Verdict, PromptTemplate("import os"))
assert found.good in (True, False)
