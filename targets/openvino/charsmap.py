"""Character maps of SentencePiece, the form in which OpenVINO's tokenizers take a normalisation that they do not know.

A map is a little-endian u32, the size in bytes of a trie, then the trie, then what its keys become, each text ended by
a zero byte. The trie is a double array of darts-clone (github.com/s-yata/darts-clone): u32 units, where a key's bytes
lead from unit to unit by XOR, and a key's end holds an offset into the texts.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

#: Of a unit: a key ends here, this is the end's value, and where the offset of the children lies.
_ENDS, _VALUE, _OFFSET = 1 << 8, 1 << 31, 10

#: Units that one byte can reach.
_BLOCK = 256


def charsmap(table: Mapping[str, str]) -> bytes:
    """The map that replaces each key of ``table``, a letter or a few, by its value; other text stays as it is."""
    texts, places = bytearray(), dict[str, int]()
    for value in table.values():
        if value not in places:
            places[value] = len(texts)
            texts += value.encode() + b"\0"
    trie: dict[int | None, Any] = {}
    for key, value in table.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[None] = places[value]
    units = _double_array(trie)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + bytes(texts)


def _double_array(trie: Mapping[int | None, Any]) -> list[int]:
    """Units of a trie whose nodes map bytes to nodes, and ``None`` to the value of the key that ends there."""
    units, used, bases = [0] * _BLOCK, [True] + [False] * (_BLOCK - 1), set[int]()
    waiting: list[tuple[Mapping[int | None, Any], int]] = [(trie, 0)]
    while waiting:
        node, position = waiting.pop()
        # A key's end has the label 0, which no key has within.
        labels = [byte or 0 for byte in node]
        base = 1
        while base in bases or any(base ^ label < len(used) and used[base ^ label] for label in labels):
            base += 1
        while base | (_BLOCK - 1) >= len(units):
            units += [0] * _BLOCK
            used += [False] * _BLOCK
        bases.add(base)
        units[position] |= (position ^ base) << _OFFSET
        for byte, child in node.items():
            place = base ^ (byte or 0)
            used[place] = True
            if byte is None:
                units[position] |= _ENDS
                units[place] = child | _VALUE
            else:
                units[place] = byte
                waiting.append((child, place))
    return units
