"""instructor: an object by a schema, and by a tool."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]


class Verdict(BaseModel):
    good: bool


# The bundled pair would go on calling to its last token, were it allowed more than one call.
for mode, more in ((instructor.Mode.JSON_SCHEMA, {}), (instructor.Mode.TOOLS, {"parallel_tool_calls": False})):
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
    found = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "import os"}], response_model=Verdict, max_tokens=200,
        temperature=0, max_retries=0, **more,
    )  # fmt: skip
    assert found.good in (True, False)
