"""How to say a number, a date or a time in English and in Japanese.

Tables and pure functions; `tilewise.data.dates` makes phrases of them. Arguments are on the 24-hour
clock and in Western years. Japanese is written with Arabic digits and without zero padding. A value
out of range raises ArgumentError.
"""

import re
from random import Random

from tilewise.errors import ArgumentError

ONES = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split()
)
TENS = ("", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split())
IRREGULAR_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
WEEKDAYS = dict(
    zip(
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
        (f"{sign}曜日" for sign in "月火水木金土日"),
        strict=True,
    )
)
# English unit, Japanese after a number, Japanese for a span of that length.
UNITS = (
    ("second", "秒", "秒"), ("minute", "分", "分"), ("hour", "時間", "時間"), ("day", "日", "日間"),
    ("week", "週間", "週間"), ("month", "か月", "か月間"), ("year", "年", "年間"),
)  # fmt: skip
# Larger unit, its largest count, smaller unit, its largest count, and what Japanese puts between.
COMPOUND_UNITS = (
    ("hour", "時間", 48, "minute", "分", 59, ""),
    ("minute", "分", 59, "second", "秒", 59, ""),
    ("year", "年", 30, "month", "か月", 11, ""),
    ("day", "日", 30, "hour", "時間", 23, "と"),
    ("week", "週間", 20, "day", "日", 6, "と"),
)
# English and Japanese currency, then their hundredth.
CURRENCIES = (
    ("dollar", "ドル", "cent", "セント"), ("euro", "ユーロ", "cent", "セント"),
    ("pound", "ポンド", "penny", "ペンス"), ("yen", "円", "", ""),
)  # fmt: skip
PLURALS = {"penny": "pence", "yen": "yen"}
PERIODS_OF_YEAR = {
    "spring of": "春", "summer of": "夏", "autumn of": "秋", "fall of": "秋", "winter of": "冬",
    "first half of": "前半", "second half of": "後半", "beginning of": "初め", "end of": "末",
    "first quarter of": "第1四半期", "second quarter of": "第2四半期",
    "third quarter of": "第3四半期", "fourth quarter of": "第4四半期",
}  # fmt: skip
THIRDS_OF_MONTH = {"early ": "上旬", "mid-": "中旬", "late ": "下旬"}
PARTS_OF_DECADE = {"": "", "early ": "前半", "mid-": "半ば", "late ": "後半"}
PARTS_OF_CENTURY = PARTS_OF_DECADE | {"early ": "初頭", "first half of the ": "前半"}
PARTS_OF_MONTH = {"beginning": "初め", "middle": "半ば", "end": "末"}
AROUND_WEEKDAY = {
    "{}": "{}", "last {}": "先週の{}", "this {}": "今週の{}", "next {}": "来週の{}",
    "every {}": "毎週{}", "{} morning": "{}の朝", "{} afternoon": "{}の午後",
    "{} evening": "{}の晩", "{} night": "{}の夜", "next {} morning": "来週の{}の朝",
}  # fmt: skip
RELATIVE_DAYS = {
    "today": "今日", "tomorrow": "明日", "yesterday": "昨日", "the day after tomorrow": "明後日",
    "the day before yesterday": "一昨日", "this morning": "今朝", "this afternoon": "今日の午後",
    "this evening": "今晩", "tonight": "今夜", "last night": "昨夜",
    "tomorrow morning": "明日の朝", "tomorrow afternoon": "明日の午後",
    "tomorrow evening": "明日の晩", "tomorrow night": "明日の夜",
    "yesterday morning": "昨日の朝", "yesterday afternoon": "昨日の午後",
    "yesterday evening": "昨日の晩", "this week": "今週", "next week": "来週", "last week": "先週",
    "the week after next": "再来週", "the week before last": "先々週", "this weekend": "今週末",
    "next weekend": "来週末", "last weekend": "先週末", "this month": "今月", "next month": "来月",
    "last month": "先月", "the month after next": "再来月", "the month before last": "先々月",
    "this year": "今年", "next year": "来年", "last year": "去年", "the year after next": "再来年",
    "the year before last": "一昨年", "every day": "毎日", "every week": "毎週",
    "every month": "毎月", "every year": "毎年", "every morning": "毎朝", "every night": "毎晩",
    "every other day": "1日おき", "every other week": "1週間おき", "every other month": "1か月おき",
    "every other year": "1年おき", "noon": "正午", "midday": "正午", "twelve noon": "正午",
    "midnight": "午前0時", "twelve midnight": "午前0時", "now": "今", "right now": "今",
    "the beginning of the month": "月初め", "the end of the month": "月末",
    "the beginning of the year": "年初め", "the end of the year": "年末",
}  # fmt: skip
DAY_STYLES = (
    "the {ordinal} of {month}", "the {nth} of {month}", "{month} {nth}", "{month} {day}",
    "{day} {month}", "{nth} {month}", "{month} the {ordinal}", "{month} {ordinal}",
    "{abbreviation} {day}", "{day} {abbreviation}",
)  # fmt: skip
PEOPLE = {"man": "男性", "woman": "女性", "boy": "男の子", "girl": "女の子"}


# --- English, one way to say each thing ---------------------------------------------------------


def number_words(number: int, use_and: bool = True) -> str:
    """206 -> "two hundred and six", or without "and". 0 to 999,999,999."""
    _require("number", number, 0, 999_999_999)
    joiner = " and " if use_and else " "
    millions, thousands, rest = number // 10**6, number // 1000 % 1000, number % 1000
    words = [
        f"{_below_thousand(group, joiner)} {name}"
        for group, name in ((millions, "million"), (thousands, "thousand"))
        if group
    ]
    if not words:
        return _below_thousand(rest, joiner)
    tail = (joiner if rest < 100 else " ") + _below_thousand(rest, joiner) if rest else ""
    return " ".join(words) + tail


def _below_thousand(number: int, joiner: str) -> str:
    hundreds, rest = divmod(number, 100)
    if not hundreds:
        return _below_hundred(rest)
    return f"{ONES[hundreds]} hundred" + (joiner + _below_hundred(rest) if rest else "")


def _below_hundred(number: int) -> str:
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def ordinal_words(number: int) -> str:
    """23 -> "twenty-third". The range is that of `number_words`."""
    return re.sub("[a-z]+$", lambda last: _ordinal_word(last[0]), number_words(number))


def _ordinal_word(word: str) -> str:
    if word in IRREGULAR_ORDINALS:
        return IRREGULAR_ORDINALS[word]
    return f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th"


def ordinal_digits(number: int) -> str:
    """23 -> "23rd"."""
    teen = number // 10 % 10 == 1
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def year_words(year: int) -> str:
    """1905 -> "nineteen oh five", 2019 -> "twenty nineteen". 1000 to 2099."""
    _require("year", year, 1000, 2099)
    if year == 1000 or 2000 <= year < 2010:
        return number_words(year)
    century, rest = divmod(year, 100)
    if rest < 10:
        return f"{_below_hundred(century)} {f'oh {ONES[rest]}' if rest else 'hundred'}"
    return f"{_below_hundred(century)} {_below_hundred(rest)}"


def time_words(hour: int, minute: int) -> str:
    """(15, 30) -> "half past three"; which half of the day is for `parts_of_day` to say."""
    _require_time(hour, minute)
    if minute == 0:
        return f"{ONES[on_clock_face(hour)]} o'clock"
    side, distance = ("past", minute) if minute <= 30 else ("to", 60 - minute)
    named = {15: "quarter", 30: "half"}.get(distance) or _below_hundred(distance)
    unit = "" if distance % 5 == 0 else " minute" if distance == 1 else " minutes"
    return f"{named}{unit} {side} {ONES[on_clock_face(hour + (side == 'to'))]}"


def time_as_read(hour: int, minute: int) -> str:
    """(15, 45) -> "three forty-five", (15, 5) -> "three oh five", (15, 0) -> "three"."""
    _require_time(hour, minute)
    name = ONES[on_clock_face(hour)]
    if minute == 0:
        return name
    return f"{name} {'oh ' if minute < 10 else ''}{_below_hundred(minute)}"


def on_clock_face(hour: int) -> int:
    """15 -> 3, and 0 -> 12."""
    return (hour - 1) % 12 + 1


def parts_of_day(hour: int) -> tuple[str, ...]:
    """What may follow a time of that hour; together they leave no doubt which half of the day."""
    spans = {
        "in the morning": range(1, 12),
        "in the afternoon": range(12, 18),
        "in the evening": range(17, 22),
        "at night": (19, 20, 21, 22, 23, 0),
    }
    return tuple(phrase for phrase, hours in spans.items() if hour in hours)


# --- English as it varies -----------------------------------------------------------------------


def say_number(rng: Random, number: int) -> str:
    """ "one hundred and six", "a hundred and six", "one hundred six"."""
    words = number_words(number, use_and=rng.random() < 0.7)
    if rng.random() < 0.3:
        words = re.sub("^one (?=hundred|thousand|million)", "a ", words)
    return words


def say_count(rng: Random, number: int) -> str:
    """ "three" or "3"."""
    return str(number) if rng.random() < 0.35 else say_number(rng, number)


def with_article(words: str) -> str:
    """ "an" before eight, eleven, eighteen and hour, "a" before everything else here."""
    article = "an" if re.match(r"e|hour|8|11\b|18\b", words) else "a"
    return f"{article} {words}"


def plural(number: int, noun: str) -> str:
    """The noun as it stands after that number."""
    return noun if number == 1 else PLURALS.get(noun, f"{noun}s")


def say_quantity(rng: Random, number: int, noun: str) -> str:
    """ "three days", "3 days", "a day"."""
    if number == 1 and rng.random() < 0.5:
        return with_article(noun)
    return f"{say_count(rng, number)} {plural(number, noun)}"


def say_decimal(rng: Random, text: str) -> str:
    """ "3.14" in words or as it stands; also "12"."""
    whole, _, fraction = text.partition(".")
    if rng.random() < 0.35:
        return text
    point = " ".join(["", "point", *(ONES[int(digit)] for digit in fraction)]) if fraction else ""
    return say_number(rng, int(whole)) + point


def say_year(rng: Random, year: int) -> str:
    """ "2019", "twenty nineteen", "two thousand and nineteen"."""
    roll = rng.random()
    if roll < 0.7:
        return str(year)
    if year >= 2001 and roll < 0.8:
        return number_words(year, use_and=roll < 0.76)
    return year_words(year)


def write_day(style: str, month: int, day: int) -> str:
    """The day of the month in one of DAY_STYLES."""
    name = MONTHS[month - 1]
    nth, ordinal = ordinal_digits(day), ordinal_words(day)
    return style.format(month=name, abbreviation=name[:3], day=day, nth=nth, ordinal=ordinal)


def say_day(rng: Random, month: int, day: int) -> str:
    """ "the third of May", "May 3rd", "3 May"."""
    return write_day(rng.choice(DAY_STYLES), month, day)


def say_time(rng: Random, hour: int, minute: int) -> str:
    """ "3:45 pm", "quarter to four in the afternoon", "three forty-five p.m.", "noon"."""
    if (hour, minute) == (12, 0):
        return rng.choice(("noon", "midday"))
    roll = rng.random()
    if roll < 0.4:
        return f"{_clock_digits(rng, hour, minute)} {_half_of_day(rng, hour)}"
    words = time_as_read(hour, minute) if roll < 0.6 else time_words(hour, minute)
    if words.startswith("quarter") and rng.random() < 0.3:
        words = f"a {words}"
    if roll < 0.48:
        return f"{words} {_half_of_day(rng, hour)}"
    return f"{words} {rng.choice(parts_of_day(hour))}"


def _clock_digits(rng: Random, hour: int, minute: int) -> str:
    bare = minute == 0 and rng.random() < 0.6
    return f"{on_clock_face(hour)}" + ("" if bare else f":{minute:02d}")


def _half_of_day(rng: Random, hour: int) -> str:
    return rng.choice(("am", "a.m.", "AM") if hour < 12 else ("pm", "p.m.", "PM"))


# --- Japanese -----------------------------------------------------------------------------------


def japanese_number(number: int) -> str:
    """Plain digits below a million, then units of 億 and 万: 206, 123456, "1億2050万"."""
    _require("number", number, 0, 999_999_999)
    if number < 10**6:
        return str(number)
    groups = ((number // 10**8, "億"), (number // 10**4 % 10**4, "万"), (number % 10**4, ""))
    return "".join(f"{group}{name}" for group, name in groups if group)


def japanese_date(month: int, day: int, year: int | None = None, weekday: str | None = None) -> str:
    """(3, 17, 2019) -> "2019年3月17日"; `weekday` is English and comes last."""
    _require("month", month, 1, 12)
    _require("day", day, 1, 31)
    start = "" if year is None else f"{year}年"
    return f"{start}{month}月{day}日{WEEKDAYS[weekday] if weekday else ''}"


def japanese_time(hour: int, minute: int) -> str:
    """(15, 30) -> "午後3時30分". Noon is 正午; the hour after it is 午後0時."""
    _require_time(hour, minute)
    if (hour, minute) == (12, 0):
        return "正午"
    half = "午前" if hour < 12 else "午後"
    return f"{half}{hour % 12}時" + (f"{minute}分" if minute else "")


def _require_time(hour: int, minute: int) -> None:
    _require("hour", hour, 0, 23)
    _require("minute", minute, 0, 59)


def _require(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ArgumentError(f"{name} is {value}; give one from {low} to {high}")
