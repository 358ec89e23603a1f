"""The OpenAPI 3.1 document, made from the table of operations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from respan_guard.api.operation import Operation
from respan_guard.api.schemas import Error

__all__ = ["document"]

_REF: Final = "#/components/schemas/{model}"
_WORDS: Final = {
    400: "Something in the request can't be meant; `field` says what.",
    401: "No key, or one that is not known.",
    403: "A key that may only read.",
    404: "There is none.",
    405: "Not with this method.",
    409: "Changed by others all the time; try again.",
    413: "The body is too large.",
    415: "The body is not plain JSON.",
    503: "Storage gives no answer; try again shortly.",
}


def document(operations: Iterable[Operation], server: str) -> dict[str, Any]:
    """The document.

    Args:
        operations: What to describe.
        server: Where the API is mounted.
    """
    operations = list(operations)
    paths: dict[str, dict[str, Any]] = {}
    used: dict[type[BaseModel], Any] = {Error: "serialization"}
    for operation in operations:
        if operation.takes is not None:
            used[operation.takes] = "validation"
        used |= {model: "serialization" for model in operation.answers.values() if model is not None}
    names, definitions = models_json_schema(list(used.items()), ref_template=_REF)
    refs = {model: names[model, mode] for model, mode in used.items()}
    for operation in operations:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "respan_guard",
            "version": "1",
            "description": "Respan's API for request logs, users and dashboard, answered by respan_guard.",
        },
        "servers": [{"url": server}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": definitions.get("$defs", {}),
        },
    }


def _operation(operation: Operation, refs: dict[type[BaseModel], Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for status, model in operation.answers.items():
        answers[str(status)] = {"description": "Done."}
        if model is not None:
            answers[str(status)]["content"] = _json(refs[model])
    errors = {400, 401, 503, *operation.errors, *((403,) if operation.writes else ())}
    for status in sorted(errors - set(operation.answers)):
        answers[str(status)] = {"description": _WORDS[status], "content": _json(refs[Error])}
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation.query)],
        "responses": answers,
    }
    if operation.takes is not None:
        found["requestBody"] = {"required": not operation.optional, "content": _json(refs[operation.takes])}
    return found


def _json(ref: Any) -> dict[str, Any]:
    return {"application/json": {"schema": ref}}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)(?::path)?\}", path)
    ]


def _query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    schema = model.model_json_schema()
    found = []
    for name, about in schema.get("properties", {}).items():
        about = dict(about)
        kind = about.get("type")
        if isinstance(kind, list):  # null is how the model says "absent"
            about["type"] = next(one for one in kind if one != "null")
        if about.get("default", 0) is None:
            del about["default"]
        about.pop("title", None)
        parameter = {"name": name, "in": "query", "required": False, "schema": about}
        if "description" in about:
            parameter["description"] = about.pop("description")
        found.append(parameter)
    return found
