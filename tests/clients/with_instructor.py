"""instructor: an object by a schema, and by a tool."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]


class Verdict(BaseModel):
    good: bool


for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
    found = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "import os"}], response_model=Verdict, max_tokens=200,
        temperature=0, max_retries=0,
    )  # fmt: skip
    assert found.good in (True, False)
