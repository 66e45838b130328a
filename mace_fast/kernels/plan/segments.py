"""Which paths of a channelwise tensor product share a kernel, so that its outputs fit the registers of a thread."""

from __future__ import annotations

from mace_fast.kernels.description.channelwise import FlatPath

Paths = list[tuple[int, FlatPath]]
"""Paths with their numbers in the description."""


def split(flat: tuple[FlatPath, ...], limit: int) -> tuple[list[Paths], bool]:
    """Paths grouped so that the output blocks of a group fit the limit, and whether groups share no block of x.

    Paths of one block of x, or of z, stay together where they fit. Where they do not, only those of one block of z do.
    """
    families = _families(flat)
    packed = _packed(families, limit)
    if all(_width(paths) <= limit for paths in packed):
        return _mirrored(families, limit, most=len(packed)) or packed, True
    blocks: dict[int, Paths] = {}
    for index, path in enumerate(flat):
        blocks.setdefault(path.z_offset, []).append((index, path))
    total = sum(_width(paths) for paths in blocks.values())
    count = -(-total // limit)
    # Even shares: a small last segment reads x and y for little work.
    return _packed(list(blocks.values()), min(limit, -(-total // count) + 6)), False


def _families(flat: tuple[FlatPath, ...]) -> list[Paths]:
    """Paths that share blocks of x or z, directly or through others."""
    families: list[tuple[set[int], set[int], Paths]] = []
    for index, path in enumerate(flat):
        x, z, paths = {path.x_offset}, {path.z_offset}, [(index, path)]
        for family in [f for f in families if f[0] & x or f[1] & z]:
            families.remove(family)
            x, z, paths = x | family[0], z | family[1], family[2] + paths
        families.append((x, z, paths))
    return [paths for _, _, paths in families]


def _mirrored(families: list[Paths], limit: int, *, most: int) -> list[Paths] | None:
    """Groups of families, mirror images next to each other; None where that takes more than ``most`` groups.

    With both parities of a degree two families of paths differ in nothing but where their blocks and weights are.
    Groups that are made alike from them share one code, which halves what has to be compiled.
    """
    kinds: dict[object, list[Paths]] = {}
    for paths in families:
        ordered = sorted(paths, key=lambda entry: _shape(entry[1]))
        x, z = ([getattr(path, name) for _, path in ordered] for name in ("x_offset", "z_offset"))
        kind = tuple((_shape(path), x.index(path.x_offset), z.index(path.z_offset)) for _, path in ordered)
        kinds.setdefault(kind, []).append(ordered)
    pairs = [members for members in kinds.values() if len(members) == 2]
    groups: list[Paths] = []
    for indices in _packed_indices([_width(first) for first, _ in pairs], limit):
        groups += [[entry for index in indices for entry in pairs[index][image]] for image in (0, 1)]
    groups += _packed([paths for members in kinds.values() if len(members) != 2 for paths in members], limit)
    return groups if pairs and len(groups) <= most and most > 1 else None


def _shape(path: FlatPath) -> tuple[float, ...]:
    """All of a path but its places in x, z and the weights."""
    return (
        *(path.l1, path.l2, path.l3, path.mul, path.y_offset, path.y_stride),
        *(path.w_stride, path.weighted, path.coefficient),
    )


def _width(paths: Paths) -> int:
    return sum({path.z_offset: 2 * path.l3 + 1 for _, path in paths}.values())


def _packed(parts: list[Paths], limit: int) -> list[Paths]:
    """Neighbouring parts joined while their outputs fit the limit."""
    return [
        [entry for index in indices for entry in parts[index]]
        for indices in _packed_indices([_width(paths) for paths in parts], limit)
    ]


def _packed_indices(widths: list[int], limit: int) -> list[list[int]]:
    """The numbers of neighbouring parts that together stay within the limit."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(widths):
        if not groups or room < size:
            groups.append([])
            room = limit
        groups[-1].append(index)
        room -= size
    return groups
