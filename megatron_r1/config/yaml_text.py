"""YAML as people write it, and nothing that a machine could not hold: settings from a file or from the command line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

from megatron_r1.errors import ConfigError, one_line

MOST_CHARACTERS = 1 << 19  #: of a text: seconds of work
_MOST_NODES = 1_000_000  # with every alias counted as all that it stands for
_DEEPEST = 100
_MERGE = "tag:yaml.org,2002:merge"


class _YamlLoader(yaml.SafeLoader):
    """`1e-4` is a number (YAML 1.1 reads a string), a key given twice is an error, and so is what is nested too deeply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._flat: set[int] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Looked at while the text is read: the time to read a level grows with the number of those around it.
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names before a mapping's own keys, which win; of several mappings the first wins, as YAML says.

        PyYAML's own compares keys by identity, so there the last one wins most of the time.
        """
        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        counts = Counter(self._key_of(key_node) for key_node, _ in own)
        repeated = {str(key) for key, count in counts.items() if count > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"key '{min(repeated)}' is given twice", node.start_mark)
        known, merged = set(counts), []
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                continue
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(None, None, "<< takes a mapping or a list of them", source.start_mark)
                self.flatten_mapping(source)
                for pair in source.value:
                    if (key := self._key_of(pair[0])) not in known:
                        known.add(key)
                        merged.append(pair)
        node.value = merged + own

    def _key_of(self, key_node: yaml.Node) -> Any:
        if key_node.tag == "tag:yaml.org,2002:value":  # the key `=`
            key_node.tag = "tag:yaml.org,2002:str"
        key = self.construct_object(key_node, deep=True)
        return key if isinstance(key, Hashable) else id(key_node)  # such a key is an error where the mapping is made


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Args:
        what: is read, for messages: "config file run.yaml".

    Raises:
        ConfigError: it is no YAML, holds a value that Python does not, or is too large or too deep, aliases counted as what they
            stand for.
    """
    try:
        if len(text) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"it has more than {MOST_CHARACTERS} characters")
        loader = _YamlLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _expanded_size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{what} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - dates, numbers and keys that do not exist raise whatever they like
        raise ConfigError(f"{what} is not valid YAML: {one_line(error)}") from None


def _expanded_size(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Nodes and levels of a node, aliases counted as what they stand for."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.YAMLError("an alias stands for something that holds it")
        return size
    known[id(node)] = None
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    sizes = [_expanded_size(part, known) for part in parts]
    nodes, levels = 1 + sum(nodes for nodes, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
    if nodes > _MOST_NODES or levels > _DEEPEST:
        raise yaml.YAMLError(f"its aliases make more than {_MOST_NODES} values or {_DEEPEST} levels of it")
    known[id(node)] = nodes, levels
    return nodes, levels
