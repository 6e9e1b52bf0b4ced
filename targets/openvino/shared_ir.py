"""Several IRs whose constants lie in one ``.bin``: what tasks have in common is on the disk, and mapped, once.

An IR says of each constant where in the file of weights its bytes begin. That file lies beside it, of the same name, if
``read_model`` is given no other.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtu_compile.core.atomic import atomic_file
from mtu_compile.graph.weight_file import Weight, WeightFile, common_bytes

#: A constant's place in the file of weights: offset and size in bytes.
Place = tuple[int, int]

#: Bytes up to which a constant lies with others of its kind, before the larger ones. A CPU's kernels have copies of
#: what is large, and read biases and scales in the file as they run; scattered, each keeps the pages around it in
#: memory: 205 MB at Stable Diffusion 1.5's size in INT8, where all of them together are 3 MB.
SMALL = 1 << 16


def share_constants(irs: Sequence[Path], *, least_bytes: int = 1) -> tuple[int, ...] | None:
    """Move the constants of IRs into the ``.bin`` of the first, and remove those of the others.

    Given::

        a.xml, a.bin = [conv, ffn of a]      b.xml, b.bin = [conv, ffn of b]

    Result::

        a.xml, a.bin = [conv, ffn of a, ffn of b]      b.xml, whose constants are in a.bin

    The first is as it was, but for a longer ``.bin``: whoever opens it alone sees no difference.

    Args:
        irs: ``.xml`` files with their ``.bin`` beside them.
        least_bytes: what has to be saved at least.

    Returns:
        By IR, bytes of constants it reads; ``None``, and nothing is changed, if there is less to save.
    """
    digests = [{place: _weight(path, place).digest() for place in set(_places(path))} for path in irs]
    sizes = [{digest: size for (_, size), digest in one.items()} for one in digests]
    if common_bytes(sizes) < least_bytes:
        return None
    host = irs[0].with_suffix(".bin")
    with host.open("ab") as file:
        merged = WeightFile(file, host.stat().st_size, {one: place[0] for place, one in digests[0].items()})
        for path, known in zip(irs[1:], digests[1:], strict=True):
            moved = {place: merged.put(_weight(path, place), known[place]) for place in _in_order(known)}
            file.flush()
            _rewrite(path, moved, path)
            path.with_suffix(".bin").unlink()
    return tuple(sum(one.values()) for one in sizes)


def own_constants(path: Path, weights: Path, out: Path) -> Path:
    """Write an IR whose constants are in ``weights`` to ``out``, with a ``.bin`` of its own, small ones first."""
    with out.with_suffix(".bin").open("wb") as file:
        own, moved = WeightFile(file), {}
        for place in _in_order(_places(path)):
            weight = Weight(weights, *place)
            moved[place] = own.put(weight, weight.digest())
    _rewrite(path, moved, out)
    return out


def _in_order(places: Iterable[Place]) -> list[Place]:
    """Each place once: of small constants, then of the others."""
    return sorted(set(places), key=lambda place: (place[1] > SMALL, place))


def _weight(path: Path, place: Place) -> Weight:
    return Weight(path.with_suffix(".bin"), *place)


def _rewrite(path: Path, moved: dict[Place, int], out: Path) -> None:
    """Write an IR to ``out``, its constants beginning at other offsets."""
    tree = ElementTree.parse(path)
    for data in _constants(tree):
        data.set("offset", str(moved[_place(data)]))
    with atomic_file(out) as temporary:
        tree.write(temporary, encoding="utf-8", xml_declaration=True)


def _places(path: Path) -> list[Place]:
    return [_place(data) for data in _constants(ElementTree.parse(path))]


def _place(data: ElementTree.Element) -> Place:
    return int(data.attrib["offset"]), int(data.attrib["size"])


def _constants(tree: ElementTree.ElementTree[ElementTree.Element]) -> Iterator[ElementTree.Element]:
    """What an IR says of each constant, those in the bodies of loops and branches included."""
    for layer in tree.getroot().iter("layer"):
        if layer.get("type") == "Const" and (data := layer.find("data")) is not None:
            yield data
