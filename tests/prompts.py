"""Five hundred prompts such as people write, and such as nobody should: the same ones every time."""

from __future__ import annotations

import random

PHRASES = [
    "a photograph of an astronaut riding a horse on mars, 4k, trending",
    "Don't paint the cat's whiskers; they're fine, we'll see, I'd say I'm sure they've gone",
    "un château près de l'océan, style Hergé, été 1950 — crème brûlée",
    "ein Fußgänger überquert die Straße, größer als Übermut",
    "ΟΔΟΣ ΚΑΙ ΛΟΓΟΣ, ένας παλιός δρόμος της πόλης",
    "İstanbul'da ıssız bir IŞIK, ğüşöç, DİYARBAKIR",
    "красный дом у озера, зимний вечер, ЁЖ в тумане",
    "黄昏时分的古老寺庙，水墨画，细节丰富",
    "夕焼けの中を走る猫、ｱﾆﾒ風、ﾊﾝｶｸ",
    "해질녘의 오래된 사원, 수채화",
    "مسجد قديم عند الغروب، ألوان مائية",
    "בית ישן ליד הים, צבעי מים",
    "सूर्यास्त के समय पुराना मंदिर",
    "วัดเก่าแก่ยามพระอาทิตย์ตก",
    "phở bò Hà Nội, tranh sơn dầu, đẹp",
    "ძველი ტაძარი მზის ჩასვლისას",
    "hat, ﬁne ﬂoor, ǅungla, ŉ, ẞ, ſharp, ﬀ, Ⅷ, ½, x², H₂O, ㎏, Å, ℃",
    "a (masterpiece:1.3), [blurry], {best} <lora:x:0.8> BREAK 50mm f/1.8 @home #tag $5.00 100% a+b=c ~ ^ `code`",
    "1girl,2boys,3cats,1234567890,0x1F,3.14159,1/2,v1.5",
]
PICTURES = ["🐈", "👩‍🚀", "🏳️‍🌈", "👍🏽", "🇬🇪", "☃️", "✨", "❤", "👨‍👩‍👧‍👦", "🫠", "©", "™", "☕︎"]
LITERALS = [
    "<|endoftext|>",
    "<|startoftext|>",
    "<|ENDOFTEXT|>",
    "<|StartOfText|>",
    "<|endoftext",
    "|>",
    "</w>",
    "<unk>",
]
MARKS = [
    "!",
    "!!",
    "?!",
    "...",
    "--",
    "’s",
    "'S",
    '"',
    "“”",
    "!a",
    "a!",
    "!1!",
    " ! ",
    "¡!",
    "！",
    "'",
    "''s",
    "_",
    "\\n",
]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u2028",
    "\x0b",
    "\x1c",
    "\x85",
    "\ufeff",
]
CONTROLS = [
    "\x00",
    "\x01",
    "\x07",
    "\x1b[31m",
    "\x7f",
    "\x80",
    "\u200d",
    "\u202e",
    "\ufffd",
    "\ufffe",
    "\U000e0041",
    "\u0301",
]
LETTERS = [
    "İ",
    "ς",
    "Σ",
    "ΑΣ",
    "Σα",
    "ß",
    "ẞ",
    "ǅ",
    "K",
    "Å",
    "e\u0301",
    "É",
    "ﬃ",
    "ﷺ",
    "\u1e9b\u0323",
    "各",
    "\U00020000",
    "ⓐ",
    "Ａ",
]


def varied_prompts(count: int = 500) -> list[str]:
    """Languages, letters whose lower case is not one letter, signs, spaces, control characters, special tokens."""
    random_ = random.Random("prompts of all kinds")
    pieces = [*PHRASES, *PICTURES, *LITERALS, *MARKS, *SPACES, *CONTROLS, *LETTERS]
    words = [word for phrase in PHRASES for word in phrase.split()]
    known = ["", *pieces, *(f"a{one}b" for one in pieces), *(f"a {one} b" for one in pieces)]
    prompts = dict.fromkeys(known)  # each of them once
    while len(prompts) < count:
        kind = random_.randrange(4)
        if kind == 0:  # of any length, up to far too long
            prompts.setdefault(" ".join(random_.choices(words, k=random_.choice([1, 2, 5, 20, 75, 76, 77, 78, 300]))))
        elif kind == 1:  # anything beside anything
            prompts.setdefault("".join(random_.choices(pieces, k=random_.randint(2, 6))))
        elif kind == 2:
            prompts.setdefault("".join(chr(random_.choice(_SCRIPTS)) for _ in range(random_.randint(1, 40))))
        else:
            phrase = random_.choice(PHRASES)
            prompts.setdefault(random_.choice([phrase.upper(), phrase.title(), phrase.swapcase(), phrase[::-1]]))
    return list(prompts)[:count]


#: Letters of many scripts, half of them from the blocks with upper and lower case.
_SCRIPTS = [
    *(code for _ in range(3) for code in (*range(0x20, 0x250), *range(0x370, 0x530), *range(0x1E00, 0x2000))),
    *(
        code
        for start in (0x530, 0x5D0, 0x900, 0xE00, 0x2000, 0x3040, 0x4E00, 0xAC00, 0x1F300)
        for code in range(start, start + 0x80)
    ),
]
