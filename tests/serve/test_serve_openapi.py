"""Requests made up from the server's description of itself: never a 5xx, always as described."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("mode", GenerationMode)
def test_requests_made_up_from_the_description(serve, mode):
    # A server that never says much.
    with serve(max_new_tokens=4, max_n=2, max_prompts=2) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

        @given(case=schema.as_strategy(generation_mode=mode))
        @settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            case.call_and_validate(checks=CHECKS)

        ask()


def test_the_description_has_the_limits(http):
    document = http.get("/openapi.json").json()
    request = document["components"]["schemas"]["ChatRequest"]
    limits = http.get("/v1/models").json()["data"][0]["limits"]
    assert request["required"] == ["messages"]
    for parameter, limit in (("max_tokens", "max_new_tokens"), ("temperature", "max_temperature")):
        assert request["properties"][parameter]["anyOf"][0]["maximum"] == limits[limit]
    assert "422" not in str(document)
