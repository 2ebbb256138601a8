"""Strings on which tokenizers part ways: the material of the parity gate. The same list every time.

What is in it was chosen by where the steps of a byte-level tokenizer differ between implementations: normalisation
(NFC), the split into words (letters, digits, white space, other), recognising special tokens in text, and merging.
Letters, marks and digits of recent Unicode versions are left out: libraries know them or not by the age of their
tables, and nobody could do anything about a difference.
"""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

_WORDS = {
    "Afrikaans": "Die ou man sê niks, hy't 'n groot huis naby die see.",
    "Amharic": "ሰላም ለዓለም ሁሉ፤ ዛሬ ቀኑ ጥሩ ነው።",
    "Arabic": "مرحبًا بالعالم، كيف حالُكَ اليَوْم؟ ١٢٣٤",
    "Armenian": "Բարեւ աշխարհ, ինչպե՞ս ես։",
    "Bengali": "ওহে বিশ্ব, আজ কেমন আছো? ১২৩",
    "Chinese": "你好，世界！今天天气很好。「引用」——完。",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Dutch": "IJsland ligt 's winters in 't donker.",
    "English": "I'm sure they're what we've said she'll'd; DON'T you'd think so?",
    "French": "L'œuvre où l’été naît « déjà » : ça va ?",
    "Georgian": "გამარჯობა მსოფლიო, როგორ ხარ?",
    "German": "Größe, Übermut und Straßenbahnen: ẞ gegen ß.",
    "Greek": "Γειά σου Κόσμε· τι κάνεις; ἀρχῇ ἦν ὁ λόγος",
    "Hebrew": "שָׁלוֹם עוֹלָם, מה שלומך?",
    "Hindi": "नमस्ते दुनिया, आप कैसे हैं? क़िला १२३",
    "Japanese": "こんにちは世界。カタカナ、ひらがな、漢字。ガギグゲゴ ﾊﾝｶｸ",
    "Khmer": "សួស្តី​ពិភពលោក ១២៣",
    "Korean": "안녕하세요 세계! 오늘은 좋은 날입니다.",
    "Lao": "ສະບາຍດີຊາວໂລກ ໑໒໓",
    "Malayalam": "നമസ്കാരം ലോകമേ, സുഖമാണോ? ൧൨൩",
    "Myanmar": "မင်္ဂလာပါ ကမ္ဘာလောက ၁၂၃",
    "Persian": "می‌خواهم بروم؛ ۱۲۳۴",
    "Polish": "Zażółć gęślą jaźń.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Sinhala": "ආයුබෝවන් ලෝකය ශ්‍රී",
    "Tamil": "வணக்கம் உலகமே, எப்படி இருக்கிறாய்? ௧௨௩",
    "Telugu": "హలో ప్రపంచం ౧౨౩",
    "Thai": "สวัสดีชาวโลก น้ำใจ ๑๒๓",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས། ༡༢༣",
    "Turkish": "İstanbul'da ılık bir gün; IĞDIR ığdır.",
    "Urdu": "ہیلو دنیا، آپ کیسے ہیں؟",
    "Vietnamese": "Tiếng Việt có nhiều dấu: ở đâu, đường phố, nghĩa.",
}
_CODE = (
    "def f(x: int = 0) -> int:\n\treturn x**2  # comment\n",
    'for (int i=0;i<10;++i){printf("%d\\n",i);}\n',
    "SELECT * FROM t WHERE a<>'b''c' AND d>=1e-5;--end",
    '<div class="a">\r\n  <b>x</b>&nbsp;&lt;\r\n</div>',
    '{"a": [1, 2.50, -3e+10, null, true], "b\\u00e9": "\\""}',
    "x = y if z else {**a, 'k': [*b]}\n\n\n    # four\n        # eight\n",
    "\\begin{align}\\frac{1}{2}\\\\x_{i}^{2}\\end{align}",
    "#!/bin/sh\nfor f in *; do echo \"$f\" | sed -e 's/[^a-z]//g'; done\n",
    "```python\nprint('hi')\n```\n\n- a\n- b\n\n| x | y |\n|---|---|\n",
    "https://example.org/a/b?c=d&e=%20f#g user.name+tag@example.co.uk",
    'fn main() -> Result<(), Box<dyn Error>> { let x: &\'static str = r#"a"#; }',
    "a\tb\tc\r\n1\t2\t3\r\n",
    "0x1F 0b1010 1_000_000 3.14159 1e10 .5 5. -0 +1 1,234.56 10% $5 €6",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE x1y2z3",
)
_DECOMPOSED = "éèêëāăąǎȁñçşţőűỗậễợựḗṩǖΐῇἆйїёक़ড়가각힣ガパ"
_SAME_LOOK = (
    "\u00c5 \u212b A\u030a \u2126 \u03a9 \u212a \u00b5 \u03bc \ufb01 \ufb03 \u017f \u01c4 \ufdfa \u337f \uf900 \u0340"
    " \u0341 \u0344 \u0374 \u037e \u0387 \u1fef ½ ² ① Ⅷ ㎏ ｆｕｌｌ ẞ 𝒳𝓎𝔷 а a ο o І l ； ;"
).split(" ")
_MARKS = "\u0300\u0301\u0323\u0328\u0308\u0334\u0345\u05b0\u0651\u093c\u3099\u20d7"
_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u202c\u2060\u2061\u2066\u2069\u2028\u2029"
    "\ufeff\ufe0f\ufe0e\ufff9\ufffc\ufffd\ufffe\uffff\ufdd0\ue000\uf8ff\U000f0000\U0010ffff\U000e0001\U000e0041"
)
_SPACES = "\u00a0\u1680\u2000\u2003\u2009\u200a\u202f\u205f\u3000\u0085\v\f\x1c\x1f"
_EMOJI = (
    "😀",
    "👍🏽",
    "👩‍💻",
    "👨‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇩🇪",
    "🇩🇪🇫🇷",
    "🇩",
    "1️⃣",
    "#️⃣",
    "❤️",
    "❤",
    "☺︎",
    "🧑🏿‍🚀",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "👁️‍🗨️",
    "🥹",
    "🫠",
)
_DIGITS = (
    "0123456789",
    "٠١٢٣٤٥٦٧٨٩",
    "۰۱۲۳۴۵۶۷۸۹",
    "०१२३४५६७८९",
    "๐๑๒๓๔๕๖๗๘๙",
    "０１２３４５６７８９",
    "〇一二三四五六七八九",
    "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗",
)
_NUMBERS = "½", "²³¹", "Ⅷⅸ", "①②", "㉑", "৴", "౸", "൰", "፼", "𐄇", "①1２2"
_LIKE_TAGS = (
    "<score>7</score>,</response>,<response>,<generated_rubrics>,<turn role=user>,<think>\n\n</think>,<tool_call>,"
    "<|im_start|>system\n,<|im_end|>,<|endoftext|>,<|unknown|>,<s>,</s>,[INST],<<SYS>>,[PAD151646],<unk>,<0x0A>,▁,Ġ,Ċ,"
    "‹score>,⁅PAD1]"
).split(",")
_RUN_LENGTHS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    63,
    64,
    65,
    80,
    100,
    127,
    128,
    129,
    200,
    256,
    300,
)


def hard_strings(special: Sequence[str] = (), long: Sequence[str] = ()) -> list[str]:
    """At least 1,000 different strings.

    Args:
        special: control and user-defined tokens of the vocabulary, spelled out; each appears whole, broken, and in the
            middle of text.
        long: tokens of the vocabulary with more than 32 bytes; each appears alone, cut, doubled and in text.

    >>> found = hard_strings(["<|im_end|>"])
    >>> len(found) == len(set(found)) >= 1000
    True
    """
    makers = (_languages(), _forms(), _blanks(), _digits(), _tokens(special), _long(long), _bytes(), _mixtures())
    return list(dict.fromkeys(itertools.chain.from_iterable(makers)))


def _languages() -> Iterator[str]:
    for text in (*_WORDS.values(), *_CODE):
        yield from (text, text.upper(), text.title(), text.replace(" ", ""), text[::-1], " " + text + "\n")
        yield from (unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD"))


def _forms() -> Iterator[str]:
    """Characters that normalisation changes, look-alikes, marks out of order, invisible characters, emoji."""
    for letter in (*_DECOMPOSED, *_SAME_LOOK):
        yield from (letter, unicodedata.normalize("NFD", letter), f"x{letter}y {letter} ")
    for first, second in itertools.permutations(_MARKS, 2):
        yield f"a{first}{second}e"
    for count in (1, 10, 40):
        yield from ("o" + (_MARKS * count), _MARKS * count, "<" + "\u0338" * count)
    for mark in (*_INVISIBLE, *_SPACES):
        yield from (mark, f"a{mark}b", f" {mark} {mark}", f"1{mark}2\n{mark}")
    for emoji in _EMOJI:
        yield from (emoji, emoji * 3, f"ok{emoji}ok", f" {emoji}!\n", emoji[:-1] or emoji, emoji[::-1])


def _blanks() -> Iterator[str]:
    for space, length in itertools.product((" ", "\t", "\n", "\r\n", "\u00a0", "\u3000"), _RUN_LENGTHS):
        yield space * length
        if length < 35:
            yield f"a{space * length}b"
    mixed = (" \n", "\n ", "\t ", " \t", "\r", "\n\r", "\r\r\n", " \r\n ", "\n\n ", "  \n\t", " \u00a0 ", "\u3000 \n")
    for first, second in itertools.product(mixed, mixed):
        yield f"{first}{second}x{second}"


def _digits() -> Iterator[str]:
    for digits in _DIGITS:
        yield from (digits, digits * 12, digits[1], f"a{digits}b", f" {digits[:3]},{digits[3:6]}.{digits[6:]}")
    for number in _NUMBERS:
        yield from (number, f"x{number}", f" {number} {number}1")
    yield from (str(10**power - 1) for power in (1, 2, 3, 4, 5, 8, 16, 40, 300))


def _tokens(special: Iterable[str]) -> Iterator[str]:
    """Special-token text, whole and broken."""
    for token in (*special, *_LIKE_TAGS):
        yield from (token, token * 2, f"a{token}b", f" {token}\n", token[:-1], token[1:], token.upper())
        yield from (token[:2] + " " + token[2:], token[:3] + "\u200b" + token[3:], token + "\u0338", token[0] + token)


def _long(long: Iterable[str]) -> Iterator[str]:
    """Tokens longer than 32 bytes: those of the vocabulary, and what vocabularies usually have such tokens for."""
    for token in long:
        yield from (token, token[:-1], token * 2, f"a{token}b")
    for character, length in itertools.product("=-*_#/.~+ \t\n\\%", (33, 40, 64, 72, 80, 96, 128, 129, 300)):
        yield character * length


def _bytes() -> Iterator[str]:
    """Every ASCII control character and every Latin-1 character, alone and in text; NUL; lone surrogates."""
    for code in (*range(32), *range(127, 256)):
        yield from (chr(code), f"a{chr(code)}1 {chr(code)}")
    yield from ("", "\x00" * 5, "a\x00b\x00", "\ud800", "a\udfffb", "\ud83d\ude00", "\x1b[31mred\x1b[0m")


def _mixtures() -> Iterator[str]:
    """Random strings of all the above, from a fixed seed."""
    draw = random.Random(1)
    pieces = [*"abXY.,'\"-_=<>|[](){}?!ß", *_EMOJI, *_INVISIBLE, *_SPACES, *_LIKE_TAGS, *_SAME_LOOK, *_MARKS, *_NUMBERS]
    pieces += [" ", "\n", "\t", "  ", "'s", "'LL", " the", "12", "東京", "шт", *_DIGITS]
    for _ in range(400):
        yield "".join(draw.choices(pieces, k=draw.randint(2, 40)))
