"""The colours of outlines on grey images: the schema's, as far as they can be told from grey and from each other."""

from __future__ import annotations

from transforms.labels import PALETTE, LabelSchema

Colour = tuple[int, int, int]

LEAST_COLOUR = 40
"""What the largest and the smallest of red, green and blue differ by in a colour that is seen on grey."""


def outline_colours(schema: LabelSchema) -> tuple[Colour, ...]:
    """A colour a label, no two the same and none of them grey.

    A grey label takes its colour from the palette. Where two are the same, the later one changes by a step of 255 or
    a few, which is not seen, but tells them apart when the file is read back.
    """
    vivid = [colour for colour in PALETTE if _is_vivid(colour)]
    taken: dict[Colour, None] = {}
    for n, label in enumerate(schema.labels):
        colour = label.colour if _is_vivid(label.colour) else vivid[n % len(vivid)]
        taken[_free(colour, taken)] = None
    return tuple(taken)


def _is_vivid(colour: Colour) -> bool:
    return max(colour) - min(colour) >= LEAST_COLOUR


def _free(colour: Colour, taken: dict[Colour, None]) -> Colour:
    """The nearest colour, in steps towards the middle, that is not taken."""
    red, green, blue = (-1 if value > 127 else 1 for value in colour)
    for total in range(3 * LEAST_COLOUR):
        for r in range(total + 1):
            for g in range(total - r + 1):
                found = (colour[0] + red * r, colour[1] + green * g, colour[2] + blue * (total - r - g))
                if found not in taken and max(found) != min(found):
                    return found
    raise AssertionError("more labels of one colour than a label map can hold")
