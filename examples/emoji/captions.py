"""What people call a picture, and how they ask for a change of one: several forms of each caption and instruction.

A model that has only read "SMILING FACE WITH SUNGLASSES" does not know what "a happy face with sunglasses" is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from examples.emoji import data

#: Everyday words for those of Unicode's names.
SYNONYMS = {
    "smiling face": "happy face",
    "grinning face": "laughing face",
    "crying face": "sad face",
    "pouting face": "angry red face",
    "frowning face": "unhappy face",
    "stuck out tongue": "tongue out",
    "heart shaped eyes": "heart eyes",
    "medical mask": "mask",
    "extraterrestrial alien": "alien",
    "pile of poo": "poo",
    "white smiling face": "smiling face",
    "aubergine": "eggplant",
    "doughnut": "donut",
    "ear of maize": "corn",
    "slice of pizza": "pizza",
    "soft ice cream": "ice cream cone",
    "clinking beer mugs": "two beers",
    "hot beverage": "cup of coffee",
    "steaming bowl": "bowl of noodles",
    "heavy black heart": "red heart",
    "lady beetle": "ladybug",
    "honeybee": "bee",
    "automobile": "car",
    "waving hand": "hand waving",
    "raised back of hand": "back of a hand",
    "reversed hand with middle finger extended": "middle finger",
}

HAIR = {"red hair": "red", "curly hair": "curly", "white hair": "white", "blond hair": "blond"}


def forms(emoji: data.Emoji, *, toned: bool) -> list[str]:
    """Captions of one picture, the plain one first.

    Args:
        toned: whether the base has skin tones, so that a picture without one may be called yellow.
    """
    names = [emoji.base]
    for word, plain in SYNONYMS.items():
        if re.search(rf"\b{word}\b", emoji.base):
            names.append(re.sub(rf"\b{word}\b", plain, emoji.base))
    names += [alias for alias in emoji.aliases if alias not in names]
    if ": " in emoji.base:  # "man: red hair"
        names.append(emoji.base.replace(": ", " with ") if "hair" in emoji.base else emoji.base.replace(": ", " "))
    if emoji.tone is None:
        captions = [*names, *(_with_article(name) for name in names[:2])]
        if toned:
            captions += [f"{emoji.base}, {data.YELLOW}"]
    else:
        captions = [emoji.caption, f"{emoji.tone}, {emoji.base}", f"{emoji.base} with {emoji.tone}"]
        captions += [f"{_with_article(emoji.base)} with {emoji.tone}"]
        captions += [f"{name}, {emoji.tone}" for name in names[1:]]
    return list(dict.fromkeys(captions))


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Edit:
    """An edit: indices of the source and the wanted picture, and the ways to ask for it, the plain one first."""

    source: int
    target: int
    prompts: tuple[str, ...]
    in_domain: bool


def tone_prompts(tone: str) -> tuple[str, ...]:
    colour = tone.removesuffix(" skin tone")
    return (
        f"make it {tone}",
        f"change it to {tone}",
        f"give it {tone}",
        f"with {tone}",
        f"make the skin {colour}",
        f"{colour} skin",
    )


def hair_prompts(hair: str) -> tuple[str, ...]:
    if hair == "bald":
        return ("make it bald", "make the head bald", "remove the hair", "without hair")
    if hair == "beard":
        return ("add a beard", "give it a beard", "with a beard")
    colour = HAIR[hair]
    return (f"make the hair {colour}", f"change the hair to {colour}", f"give it {hair}", f"with {hair}", hair)


def edits(emoji: Sequence[data.Emoji]) -> list[Edit]:
    """Every ordered pair of skin tones of one emoji, and of hair of one person, with the instructions between them."""
    index = {(e.base, e.tone): i for i, e in enumerate(emoji)}
    found = []
    toned = {e.base for e in emoji if e.tone}
    for (base, tone), source in index.items():
        if base in toned:
            for other in (None, *data.TONES.values()):
                target = index.get((base, other))
                if target is not None and other != tone:
                    found.append(
                        Edit(source, target, tone_prompts(other or data.YELLOW), emoji[source].in_domain),
                    )
        person, _, own = base.partition(": ")
        if person in ("man", "woman", "person"):
            for hair in (*HAIR, "bald", "beard"):
                target = index.get((f"{person}: {hair}", tone))
                if target is not None and hair != own:
                    found.append(Edit(source, target, hair_prompts(hair), True))
    return found
