"""From YAML and dotted overrides to a `Recipe`, and back: every key and every type is checked on the way.

The shape of a recipe is read off the dataclasses of `schema.py`; a new knob there needs no line here. What a single
field cannot tell (contradictions, files, divisibility) is `validate.py`'s.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

import yaml

from megavlm.config.not_offered import NOT_OFFERED
from megavlm.config.schema import Recipe
from megavlm.errors import UseError, use_error

# YAML 1.1 reads `1e-4` (no dot) as text; people write it all the time.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, then change it by dotted overrides.

    Paths inside the recipe stay as typed: relative ones are relative to the working directory.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each, applied in order (the last one wins). Values are YAML scalars or flow
            lists; for a text field the text is taken as typed.

    Returns:
        The recipe; fields that nobody set keep their defaults. Not yet validated across fields.

    Raises:
        UseError: a missing or empty file, a YAML mistake, an unknown or repeated key, a value of the wrong type.
    """
    tree = _read_yaml(Path(path))
    places: dict[str, str] = {}
    for override in overrides:
        _apply_override(tree, override, places)
    return _build(Recipe, tree, "", str(path), places)


def recipe_from_dict(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from nested mappings, as checked as a file is; `where` names the source in errors."""
    return _build(Recipe, tree, "", where, {})


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the whole recipe, defaults included, as nested dicts of plain YAML and JSON types."""
    return _to_plain(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """Return the whole recipe as YAML; `load_recipe` reads back an equal recipe."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True)


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _to_plain(vars(value)[item.name]) for item in fields(value)}
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise use_error(
                    f"{self.name} line {line}",
                    f"the key `{key_node.value}` again (first on line {seen[key_node.value]})",
                    "each key once",
                    "remove one of the two",
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    where = str(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise use_error(where, found, "a recipe in YAML", "give the path of a recipe file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise use_error(
            where, f"bytes that are not text at offset {error.start}", "UTF-8 text", "save the recipe as UTF-8"
        ) from error
    tree = _parse_yaml(text, where)
    if tree is None:
        raise use_error(where, "an empty file", "a recipe in YAML", "set at least model.hf_dir and data.train")
    if not isinstance(tree, dict):
        raise use_error(
            where, _describe(tree), "sections with keys (`train:` and below it `  lr: ...`)", "write a mapping"
        )
    return tree


def _parse_yaml(text: str, where: str) -> Any:
    """Return what one YAML document says; `where` names it in errors."""
    try:
        loader = _StrictLoader(text)
        loader.name = where
        return loader.get_single_data()
    except UseError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2026-02-31
        raise _yaml_error(where, error) from error


def _yaml_error(where: str, error: Exception) -> UseError:
    """Say in one line what is wrong with the YAML, and on which line."""
    problem = " ".join(str(error).split())
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or problem
        if mark is not None:
            where = f"{where} line {mark.line + 1} column {mark.column + 1}"
    return use_error(where, f"a YAML mistake ({problem})", "valid YAML", "check indentation, colons, quotes, brackets")


def _field_types(section: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name, in order."""
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in fields(section)}


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


def _all_keys(section: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of a recipe with its type; sections are not among them."""
    keys: dict[str, Any] = {}
    for name, hint in _field_types(section).items():
        if _is_section(hint):
            keys.update(_all_keys(hint, f"{prefix}{name}."))
        else:
            keys[prefix + name] = hint
    return keys


def _unknown_key(place: str, key: str, names: Sequence[str]) -> UseError:
    """Say why there is no such key, or name those that were probably meant: that name elsewhere, or alike ones."""
    every_key = list(_all_keys())
    leaf = key.rsplit(".", 1)[-1].replace("-", "_")
    prefix = key[: len(key) - len(leaf)]
    if leaf in NOT_OFFERED:
        return use_error(f"{place}: {key}", "a knob that is not offered", NOT_OFFERED[leaf], "remove it")
    leaves = [known.rsplit(".", 1)[-1] for known in every_key]
    nearest = [known for known in every_key if known.rsplit(".", 1)[-1] == leaf]
    if not nearest:
        nearest = [prefix + name for name in difflib.get_close_matches(leaf, names)]
    if not nearest:
        close = difflib.get_close_matches(leaf, leaves)
        nearest = [known for known in every_key if known.rsplit(".", 1)[-1] in close]
    fix = f"did you mean {' or '.join(nearest)}?" if nearest else "remove it, or use one of these"
    return use_error(f"{place}: {key}", "an unknown key", f"one of {', '.join(names)}", fix)


def _apply_override(tree: dict[str, Any], override: str, places: dict[str, str]) -> None:
    """Put `section.key=value` into the tree, and note in `places` that the key's value came from it."""
    key, equals, text = override.partition("=")
    key = key.strip()
    place = f"override `{override}`"
    if not equals or not key:
        raise use_error(place, "no `key=value`", "section.key=value", "write e.g. train.train_iters=100")
    *sections, leaf = key.split(".")
    section: type = Recipe
    branch = tree
    for name in sections:
        hint = _field_types(section).get(name)
        if not _is_section(hint):
            raise _unknown_key(place, key, list(_field_types(section)))
        branch.setdefault(name, {})
        if not isinstance(branch[name], dict):  # the file has something else there: `_build` reports it
            return
        section, branch = hint, branch[name]
    types = _field_types(section)
    if leaf not in types:
        raise _unknown_key(place, key, list(types))
    if _is_section(types[leaf]):
        raise use_error(f"{place}: {key}", "a section", "a key in it", f"write {key}.<key>=value")
    branch[leaf] = _parse_text(types[leaf], text.strip(), f"{place}: {key}")
    places[key] = place


def _parse_text(hint: Any, text: str, where: str) -> Any:
    """Read the text of an override as YAML, except that text fields take it as typed (unless quoted)."""
    takes_text = hint is str or get_origin(hint) is Literal
    is_list = get_origin(hint) is tuple and text.startswith("[")
    is_quoted = text[:1] in ("'", '"')
    if (takes_text or get_origin(hint) is tuple) and not is_list and not is_quoted:
        return [] if get_origin(hint) is tuple and not text else text
    return _parse_yaml(text, where)


def _build(section: type, tree: Any, prefix: str, source: str, places: Mapping[str, str]) -> Any:
    """Build one dataclass from a mapping; `prefix` is its dotted path with the dot, or empty."""
    types = _field_types(section)
    if not isinstance(tree, Mapping):
        raise use_error(
            f"{source}: {prefix.rstrip('.') or 'recipe'}",
            _describe(tree),
            f"a section with keys out of {', '.join(types)}",
            "indent its keys below it, or remove the line",
        )
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise _unknown_key(source, key, list(types))
        hint = types[name]
        if _is_section(hint):
            values[name] = _build(hint, value, f"{key}.", source, places)
        elif _is_table_list(hint):
            values[name] = _build_tables(hint, value, key, places.get(key, source))
        else:
            values[name] = _convert(hint, value, key, f"{places.get(key, source)}: {key}")
    return section(**values)


def _is_table_list(hint: Any) -> bool:
    return get_origin(hint) is tuple and _is_section(get_args(hint)[0])


def _build_tables(hint: Any, value: Any, key: str, source: str) -> tuple[Any, ...]:
    """Build the dataclasses of a list of mappings."""
    if not isinstance(value, list | tuple):
        keys = ", ".join(_field_types(get_args(hint)[0]))
        raise use_error(
            f"{source}: {key}",
            _describe(value),
            f"a list of mappings with keys out of {keys}",
            f"write {key}: [{{...}}]",
        )
    return tuple(_build(get_args(hint)[0], item, f"{key}[{i}].", source, {}) for i, item in enumerate(value))


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Check one value against its field's type, and return it as that type."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices or isinstance(value, bool):
            raise use_error(where, _describe(value), f"one of {', '.join(map(str, choices))}", "use one of these")
        return value
    if get_origin(hint) is tuple:
        (item_hint, _) = get_args(hint)
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise use_error(where, _describe(value), "a list", f"write {key}: [a, b]")
        return tuple(_convert(item_hint, item, key, f"{where}[{i}]") for i, item in enumerate(items))
    return _SCALARS[hint](value, key, where)


def _to_bool(value: Any, key: str, where: str) -> bool:
    if isinstance(value, bool):
        return value
    raise use_error(where, _describe(value), "true or false", f"write {key}: true (or false), without quotes")


def _to_int(value: Any, key: str, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _as_float(value)
    example = int(number) if number is not None and number.is_integer() else 1
    raise use_error(where, _describe(value), "a whole number", f"write {key}: {example}")


def _to_float(value: Any, key: str, where: str) -> float:
    number = _as_float(value)
    if number is None:
        raise use_error(where, _describe(value), "a number", f"write e.g. {key}: 1.0e-5")
    return number


def _to_str(value: Any, key: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise use_error(where, _describe(value), "text", f'quote it: {key}: "{"" if value is None else value}"')


_SCALARS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}


def _as_float(value: Any) -> float | None:
    """Return a number, or a text like `1e-4` that YAML 1.1 did not take for one, as float; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:  # a whole number beyond every float
            return None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    return None


def _describe(value: Any) -> str:
    """Say what a value is, for an error message."""
    if value is None:
        return "nothing"
    kinds = {bool: "bool", int: "int", float: "float", str: "text", list: "list", dict: "mapping"}
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"
