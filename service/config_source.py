"""Where a configuration value came from, a line of the YAML file or an environment variable, so that errors say it."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

PREFIX = "PHALANX_"
# Kubernetes puts these into every container once a Service is called `phalanx`, or `phalanx-` and anything else;
# PHALANX_CONFIG names the file itself, PHALANX_TOKEN is for those who call.
FOREIGN = re.compile(r"^PHALANX_(CONFIG$|TOKEN$|([A-Z0-9]+_)*(SERVICE_(HOST|PORT)|PORT)(_[A-Z0-9]+)*$)")

DEEPEST = 16  # levels of keys; no section has as many

KeyPath: TypeAlias = tuple[str, ...]


class InvalidConfig(ValueError):
    """The configuration cannot be used; the message has one line per mistake."""

    file: Path | None = None  # in which they are, if it is known


@dataclass(frozen=True)
class ConfigSource:
    values: dict[str, Any]
    places: Mapping[KeyPath, str]  # "phalanx.yaml, line 3" or "PHALANX_LISTEN"

    @staticmethod
    def empty() -> ConfigSource:
        return ConfigSource({}, {})

    def place(self, path: KeyPath) -> str:
        """The place of the value, or of the nearest thing around it that was written down."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.places.get((), "configuration")

    def explain(self, error: ValidationError, model: type[BaseModel]) -> str:
        return "\n".join(self._sentence(detail, model) for detail in error.errors(include_url=False))

    def _sentence(self, detail: Any, model: type[BaseModel]) -> str:
        path = tuple(str(part) for part in detail["loc"] if part != "[key]")
        dotted = ".".join(path)
        if detail["type"] == "extra_forbidden":
            return f"{self.place(path)}: {unknown_key(path, model)}"
        message = detail["msg"].removeprefix("Value error, ")
        return f"{self.place(path)}: {dotted}: {message}" if dotted else f"{self.place(path)}: {message}"


def unknown_key(path: KeyPath, model: type[BaseModel]) -> str:
    valid = sorted(_valid_keys(model, path[:-1]) or ())
    nearest = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
    listed = f"valid keys here: {', '.join(valid)}" if valid else f"`{'.'.join(path[:-1])}` holds a value and no keys"
    advice = f"did you mean `{nearest[0]}`?" if nearest else listed
    return f"unknown key `{'.'.join(path)}`; {advice}"


def read_source(path: Path) -> ConfigSource:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: cannot be read: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        places = {where: f"{path}, line {line}" for where, line in _lines(root, (), str(path))} if root else {}
        values = loader.construct_document(root) if root else {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidConfig(f"{path}{line}: not YAML: {error.problem or error.context}") from None
    except InvalidConfig:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a character that YAML forbids, the 45th of a month, ...
        raise InvalidConfig(f"{path}: not YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InvalidConfig(f"{path}: expected keys and values such as `listen: 127.0.0.1:50051`, got {values!r}")
    return ConfigSource(_relative_to(path.parent, values), {**places, (): str(path)})


def _lines(node: yaml.Node, path: KeyPath, file: str) -> Iterator[tuple[KeyPath, int]]:
    yield path, node.start_mark.line + 1
    if len(path) > DEEPEST:  # an alias may lead back to itself
        raise InvalidConfig(f"{file}, line {node.start_mark.line + 1}: expected at most {DEEPEST} levels of keys")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidConfig(f"{file}, line {line}: a key must be a plain word")
            if key.value in seen:  # YAML would silently let the last one win
                raise InvalidConfig(f"{file}, line {line}: `{key.value}` was already given on line {seen[key.value]}")
            seen[key.value] = line
            yield from _lines(value, (*path, key.value), file)
            yield (*path, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines(item, (*path, str(index)), file)


def _relative_to(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Paths in a file are relative to the file, so that it works whatever the working directory is."""
    anchored = dict(values)
    if isinstance(bundle := values.get("bundle"), str) and bundle:
        anchored["bundle"] = folder / bundle
    for section in ("tls", "signature"):
        if isinstance(files := values.get(section), dict):
            anchored[section] = {key: folder / value if isinstance(value, str) else value for key, value in files.items()}
    if isinstance(kept := values.get("quarantine"), dict) and isinstance(place := kept.get("folder"), str) and place.strip():
        anchored["quarantine"] = {**kept, "folder": folder / place}
    return anchored


def with_environment(source: ConfigSource, environment: Mapping[str, str], model: type[BaseModel]) -> ConfigSource:
    values, places = _copied(source.values), dict(source.places)
    mistakes = []
    for variable in sorted(environment):
        if not variable.startswith(PREFIX) or FOREIGN.match(variable):
            continue
        path = _spelled_as_in(values, tuple(variable.removeprefix(PREFIX).lower().split("__")))
        parent = _valid_keys(model, path[:-1])
        if parent is not None and path[-1] not in parent:
            mistakes.append(f"{variable}: {unknown_key(path, model)}")
            continue
        try:
            _put(values, path, _parsed(environment[variable], _type_at(model, path)))
        except InvalidConfig as error:
            mistakes.append(f"{variable}: {error}")
        except (yaml.YAMLError, ValueError, RecursionError):
            mistakes.append(f"{variable}: not YAML: {environment[variable]!r}")
        places = {where: place for where, place in places.items() if where[: len(path)] != path}
        places[path] = variable
    if mistakes:
        raise InvalidConfig("\n".join(mistakes))
    return ConfigSource(values, places)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in values.items()}


def _spelled_as_in(values: dict[str, Any], path: KeyPath) -> KeyPath:
    """NO_EDGE means the `no-edge` of the file: a variable's name can hold neither small letters nor hyphens."""
    spelled: list[str] = []
    here: Any = values
    for part in path:
        keys = {re.sub(r"[-.]", "_", str(key).lower()): key for key in here} if isinstance(here, dict) else {}
        spelled.append(keys.get(part, part))
        here = here.get(spelled[-1]) if isinstance(here, dict) else None
    return tuple(spelled)


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    here = values
    for part in path[:-1]:
        inner = here.get(part)
        here[part] = here = inner if isinstance(inner, dict) else {}
    here[path[-1]] = value


def _parsed(text: str, annotation: Any) -> Any:
    """Text for a plain value, YAML for a list, a mapping or a section: `[::1]:50051` is an address and not a list."""
    structured = any(
        get_origin(option) in (tuple, Mapping) or (isinstance(option, type) and issubclass(option, BaseModel))
        for option in _options(annotation)
    )
    return _loaded(text) if structured else text


def _loaded(text: str) -> Any:
    """A variable's YAML; raises InvalidConfig where a key is given twice."""
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    list(_lines(root, (), "value"))
    return loader.construct_document(root)


def _options(annotation: Any) -> tuple[Any, ...]:
    if hasattr(annotation, "__metadata__"):  # Annotated[X, ...]
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(option for option in get_args(annotation) if option is not type(None))
    # `collections.abc.Mapping` is the origin of every Mapping[...]
    return (annotation,)


def _type_at(model: type[BaseModel], path: KeyPath) -> Any:
    """The declared type of the value at a path; None where the path leads out of the model."""
    annotation: Any = model
    for part in path:
        option = next(iter(_options(annotation)), None)
        if isinstance(option, type) and issubclass(option, BaseModel) and part in option.model_fields:
            annotation = option.model_fields[part].annotation
        elif get_origin(option) is Mapping:
            annotation = get_args(option)[1]
        else:
            return None
    return annotation


def _valid_keys(model: type[BaseModel], path: KeyPath) -> tuple[str, ...] | None:
    """The keys a section has; None for a mapping whose keys the operator chooses."""
    for option in _options(_type_at(model, path)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return tuple(option.model_fields)
        if get_origin(option) is Mapping:
            return None
    return ()


def parsed(text: str, place: str) -> Any:
    """The value of a text in YAML; raises InvalidConfig, which names the place."""
    try:
        return _loaded(text)
    except InvalidConfig as error:
        raise InvalidConfig(f"{place}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InvalidConfig(f"{place}: not YAML: {text[:80]!r}") from None
