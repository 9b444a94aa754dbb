"""The English -> Japanese grammar: right, unambiguous, and split so that the test is a test.

The proof of the translations has two steps. `read` below translates by parsing and shares only a
list of fixed phrases with the grammar; translations written by hand check `read`, and `read` checks
thousands of drawn pairs.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from itertools import islice
from random import Random

import pytest

from tilewise.data import date_words, dates
from tilewise.data.dates import PATTERNS, held_out_pairs, is_held_out, sample_pair, training_pairs
from tilewise.errors import ArgumentError

CLOSED = [name for name, pattern in PATTERNS.items() if pattern.closed]
OPEN = [name for name, pattern in PATTERNS.items() if not pattern.closed]

# --- Every pattern, against translations written by hand ----------------------------------------

BY_HAND = {
    "full_date": {
        "the seventeenth of March, 2019": "2019年3月17日",
        "March 17th, 2019": "2019年3月17日",
        "2019-03-17": "2019年3月17日",
        "17 Mar 2019": "2019年3月17日",
    },
    "weekday_full_date": {
        "Sunday, March 17th, 2019": "2019年3月17日日曜日",
        "Wednesday, 19 Aug 2020": "2020年8月19日水曜日",
    },
    "month_day": {"the third of May": "5月3日", "Dec 25": "12月25日"},
    "weekday_month_day": {"Friday, May 3rd": "5月3日金曜日", "Monday 1 January": "1月1日月曜日"},
    "month_year": {"March 2019": "2019年3月", "October of nineteen oh five": "1905年10月"},
    "year": {
        "the year 1987": "1987年",
        "the year twenty nineteen": "2019年",
        "AD 1066": "西暦1066年",
    },
    "year_bc": {"44 BC": "紀元前44年", "the year 1200 BCE": "紀元前1200年"},
    "period_of_year": {
        "the summer of 1969": "1969年夏",
        "early March 2019": "2019年3月上旬",
        "the third quarter of 2019": "2019年第3四半期",
    },
    "part_of_month": {
        "late May": "5月下旬",
        "the end of May": "5月末",
        "the second week of May": "5月の第2週",
        "the last Monday in May": "5月の最終月曜日",
    },
    "decade": {"the 1980s": "1980年代", "the late nineteen eighties": "1980年代後半"},
    "century": {"the 21st century": "21世紀", "the fifth century BC": "紀元前5世紀"},
    "clock_time": {
        "half past three in the afternoon": "午後3時30分",
        "quarter to nine in the morning": "午前8時45分",
        "twenty past six in the evening": "午後6時20分",
        "half past twelve at night": "午前0時30分",
        "quarter to one in the afternoon": "午後0時45分",
        "quarter to twelve at night": "午後11時45分",
        "3:45 pm": "午後3時45分",
        "three o'clock in the afternoon": "午後3時",
    },
    "clock_24_hours": {"15:45": "15時45分", "09:05": "9時5分", "7:00": "7時"},
    "weekday": {"next Monday": "来週の月曜日", "from Monday to Friday": "月曜日から金曜日まで"},
    "relative": {"the day after tomorrow": "明後日", "noon": "正午", "midnight": "午前0時"},
    "from_now": {"three days ago": "3日前", "in two weeks": "2週間後", "an hour ago": "1時間前"},
    "duration": {
        "twenty minutes": "20分",
        "three days": "3日間",
        "an hour and a half": "1時間30分",
        "half an hour": "30分",
    },
    "compound_duration": {
        "three hours and twenty minutes": "3時間20分",
        "two days and five hours": "2日と5時間",
    },
    "frequency": {"every three days": "3日ごと", "twice a week": "1週間に2回"},
    "date_range": {
        "from the third to the ninth of May": "5月3日から9日まで",
        "between May 3rd and May 9th": "5月3日から9日の間",
        "from May 28th to June 2nd": "5月28日から6月2日まで",
    },
    "time_range": {
        "between 2 pm and 4 pm": "午後2時から午後4時の間",
        "from 9 am to noon": "午前9時から正午まで",
    },
    "year_range": {
        "from 1914 to 1918": "1914年から1918年まで",
        "between 1914 and 1918": "1914年から1918年の間",
    },
    "date_and_time": {"3 pm on March 17th": "3月17日午後3時", "4 May at noon": "5月4日正午"},
    "day_and_time": {
        "Tuesday at 3 pm": "火曜日の午後3時",
        "tomorrow at half past seven at night": "明日の午後7時30分",
    },
    "number": {
        "two hundred and six": "206",
        "two hundred six": "206",
        "a hundred and twenty-three thousand four hundred and fifty-six": "123456",
    },
    "large_number": {
        "three million four hundred thousand": "340万",
        "a hundred and twenty million five hundred thousand": "1億2050万",
    },
    "ordinal": {"the twenty-third": "23番目", "the 101st": "101番目", "twelfth": "12番目"},
    "decimal": {"three point one four": "3.14", "zero point zero five": "0.05"},
    "fraction": {"three quarters": "4分の3", "one half": "2分の1", "an eighth": "8分の1"},
    "percentage": {"twelve point five percent": "12.5%", "7%": "7%"},
    "money": {
        "five dollars and fifty cents": "5ドル50セント",
        "$1.05": "1ドル5セント",
        "two million yen": "200万円",
        "1,200 euros": "1200ユーロ",
    },
    "temperature": {
        "twenty-five degrees": "25度",
        "minus five degrees Celsius": "摂氏マイナス5度",
    },
    "age": {"thirty-two years old": "32歳", "an 8-year-old girl": "8歳の女の子"},
}


# --- A translator that parses -------------------------------------------------------------------

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
SMALL_TH = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
)
TY = "twenty thirty forty fifty sixty seventy eighty ninety"
TIETH = "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth"
VALUES = {word: value for value, word in enumerate(SMALL.split())}
VALUES |= {word: 10 * value for value, word in enumerate(TY.split(), 2)} | {"a": 1}
CARDINALS = dict(zip(SMALL_TH.split() + TIETH.split(), SMALL.split() + TY.split(), strict=True))
CARDINALS |= {"hundredth": "hundred", "thousandth": "thousand"}
YEAR_WORD = "|".join([*VALUES, "hundred", "thousand", "and", "oh"])
YEAR = rf"(\d{{4}}|(?:{YEAR_WORD})\b(?:[ -](?:{YEAR_WORD})\b)*)"
SHORT_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
MONTHS = dict.fromkeys(SHORT_MONTHS, 0) | {
    "january": 1, "february": 2, "march": 3, "april": 4, "may": 5, "june": 6, "july": 7,
    "august": 8, "september": 9, "october": 10, "november": 11, "december": 12,
}  # fmt: skip
MONTHS |= {name: number for number, name in enumerate(SHORT_MONTHS, 1)}
WEEKDAYS = {
    "monday": "月曜日", "tuesday": "火曜日", "wednesday": "水曜日", "thursday": "木曜日",
    "friday": "金曜日", "saturday": "土曜日", "sunday": "日曜日",
}  # fmt: skip
SPANS = {
    "second": "秒", "minute": "分", "hour": "時間", "day": "日", "week": "週間", "month": "か月",
    "year": "年",
}  # fmt: skip
PERIODS = {
    "spring": "春", "summer": "夏", "autumn": "秋", "fall": "秋", "winter": "冬",
    "beginning": "初め", "end": "末", "first half": "前半", "second half": "後半",
    "first quarter": "第1四半期", "second quarter": "第2四半期", "third quarter": "第3四半期",
    "fourth quarter": "第4四半期",
}  # fmt: skip


def match(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text)
    assert found, f"{text!r} is not of the form {pattern!r}"
    return tuple(group or "" for group in found.groups())


def number(text: str) -> int:
    text = text.replace(",", "")
    if text.isdigit():
        return int(text)
    total = group = 0
    for word in re.split("[ -]", text):
        if word == "hundred":
            group *= 100
        elif word in ("thousand", "million"):
            total, group = total + group * {"thousand": 1000, "million": 10**6}[word], 0
        elif word != "and":
            group += VALUES[word]
    return total + group


def ordinal(text: str) -> int:
    if text[0].isdigit():
        value, suffix = match(r"(\d+)(st|nd|rd|th)", text)
        expected = "th" if value[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(value[-1])
        assert suffix == (expected or "th")
        return int(value)
    head, last = match(r"(.*?)([a-z]+)", text)
    return number(head + CARDINALS[last])


def decimal(text: str) -> str:
    if " point " not in text:
        return text if text[0].isdigit() else str(number(text))
    whole, fraction = text.split(" point ")
    return f"{number(whole)}." + "".join(str(VALUES[word]) for word in fraction.split())


def year(text: str) -> int:
    if text.isdigit() or "thousand" in text:
        return number(text)
    century, _, rest = text.partition(" ")
    return 100 * VALUES[century] + (0 if rest == "hundred" else number(rest.removeprefix("oh ")))


def big(value: int) -> str:
    if value < 10**6:
        return str(value)
    hundred_millions, rest = divmod(value, 10**8)
    return (f"{hundred_millions}億" if hundred_millions else "") + (
        f"{rest // 10**4}万" if rest else ""
    )


def day(text: str) -> tuple[int, int]:
    words = [word for word in text.split() if word not in ("the", "of")]
    month = next(MONTHS[word] for word in words if word in MONTHS)
    (rest,) = (word for word in words if word not in MONTHS)
    return month, int(rest) if rest.isdigit() else ordinal(rest)


def month_day(text: str) -> str:
    return "{}月{}日".format(*day(text))


def full_date(text: str) -> str:
    if iso := re.fullmatch(r"(\d+)-(\d+)-(\d+)", text):
        return "{}年{}月{}日".format(*map(int, iso.groups()))
    when, year_said = match(rf"(.*?),? {YEAR}", text)
    return f"{year(year_said)}年{month_day(when)}"


def month_year(text: str) -> str:
    month, year_said = match(rf"([a-z]+)(?: of|,)? {YEAR}", text)
    return f"{year(year_said)}年{MONTHS[month]}月"


def year_alone(text: str) -> str:
    if "year" in text:
        return f"{year(match('(?:the )?year (.*)', text)[0])}年"
    return f"西暦{match('(?:ad )?([0-9]+)(?: ad| ce)?', text)[0]}年"


def with_weekday(rest: Callable[[str], str]) -> Callable[[str], str]:
    def read_both(text: str) -> str:
        weekday, when = match("([a-z]+),? (.*)", text)
        return rest(when) + WEEKDAYS[weekday]

    return read_both


def month_part(text: str) -> str:
    third, month = match("(early |mid-|late )([a-z]+)", text)
    return f"{MONTHS[month]}月" + {"early ": "上旬", "mid-": "中旬", "late ": "下旬"}[third]


def period_of_year(text: str) -> str:
    when, year_said = match(rf"(?:the )?(.*?)(?: of)? {YEAR}", text)
    return f"{year(year_said)}年" + (PERIODS.get(when) or month_part(when))


def part_of_month(text: str) -> str:
    if not text.startswith("the "):
        return month_part(text)
    what, month = match("the (.*) (?:of|in) ([a-z]+)", text)
    if what in ("beginning", "middle", "end"):
        return f"{MONTHS[month]}月" + {"beginning": "初め", "middle": "半ば", "end": "末"}[what]
    which, unit = what.split()
    nth = "最終" if which == "last" else f"第{ordinal(which)}"
    return f"{MONTHS[month]}月の{nth}{WEEKDAYS.get(unit, '週')}"


def decade(text: str) -> str:
    when, years = match("the (early |mid-|late |)(.*)", text)
    part = {"": "", "early ": "前半", "mid-": "半ば", "late ": "後半"}[when]
    if years[0].isdigit():
        return years[:-1] + "年代" + part
    *century, tens = years.replace("ies", "y").split()
    return f"{VALUES[century[0]] if century else ''}{VALUES[tens]}年代{part}"


def century(text: str) -> str:
    when, nth, era = match("the (early |mid-|late |first half of the |)(.*) century( bc)?", text)
    part = {"": "", "early ": "初頭", "mid-": "半ば", "late ": "後半"}.get(when, "前半")
    return f"{'紀元前' if era else ''}{ordinal(nth)}世紀{part}"


def on_the_face(text: str) -> tuple[int, int]:
    if found := re.fullmatch(r"(?:a )?(.*?)(?: minutes?)? (past|to) (.*)", text):
        distance, side, hour = found.groups()
        minutes = {"half": 30, "quarter": 15}.get(distance) or number(distance)
        return (VALUES[hour], minutes) if side == "past" else (VALUES[hour] - 1, 60 - minutes)
    hour, _, minute = text.replace(" o'clock", "").partition(" ")
    return VALUES[hour], number(minute.removeprefix("oh ")) if minute else 0


def clock(text: str) -> str:
    if text in ("noon", "midday"):
        return "正午"
    when, part = match("(.*?) (am|pm|in the .*|at night)", text)
    if when[0].isdigit():
        hour, _, minute_digits = when.partition(":")
        face, minute = int(hour) % 12, int(minute_digits or 0)
    else:
        face, minute = on_the_face(when)
        face %= 12
    evening = part in ("pm", "in the afternoon", "in the evening")
    evening |= part == "at night" and face > 0
    return f"{'午後' if evening else '午前'}{face}時" + (f"{minute}分" if minute else "")


def clock_24_hours(text: str) -> str:
    hour, minute = map(int, text.split(":"))
    return f"{hour}時" + (f"{minute}分" if minute else "")


def between(rest: Callable[[str], str], one: str = ".*") -> Callable[[str], str]:
    def read_both(text: str) -> str:
        before, first, _, last = match(f"(from|between) ({one}) (to|and) ({one})", text)
        return f"{rest(first)}から{rest(last)}{'まで' if before == 'from' else 'の間'}"

    return read_both


def date_range(text: str) -> str:
    first, last = match("(?:from|between) (.*) (?:to|and) (.*)", text)
    name = next(word for word in text.split() if word in MONTHS)
    start, end = (
        day(when if MONTHS.keys() & when.split() else f"{when} {name}") for when in (first, last)
    )
    until = "まで" if text.startswith("from") else "の間"
    month = "" if start[0] == end[0] else f"{end[0]}月"
    return f"{start[0]}月{start[1]}日から{month}{end[1]}日{until}"


def at_a_time(rest: Callable[[str], str], joiner: str = "") -> Callable[[str], str]:
    def read_both(text: str) -> str:
        if " on " in text:
            time, when = text.split(" on ")
        else:
            when, time = text.split(" at ", 1)
        return rest(when) + joiner + clock(time)

    return read_both


def weekday(text: str) -> str:
    if text.startswith(("from", "between")):
        return between(WEEKDAYS.__getitem__)(text)
    before, name, after = match("(last |this |next |every |)([a-z]+day)( [a-z]+|)", text)
    prefix = {"": "", "last ": "先週の", "this ": "今週の", "next ": "来週の", "every ": "毎週"}
    part = {"morning": "の朝", "afternoon": "の午後", "evening": "の晩", "night": "の夜", "": ""}
    return prefix[before] + WEEKDAYS[name] + part[after.strip()]


def quantity(text: str) -> tuple[int, str]:
    count, unit = match("(.*) ([a-z]+?)s?", text)
    assert text.endswith("s") == (count not in ("a", "an", "one", "1")), text
    return 1 if count == "an" else number(count), unit


def from_now(text: str) -> str:
    count, unit = quantity(re.sub("^in | ago$| from now$", "", text))
    return f"{count}{SPANS[unit]}{'前' if text.endswith(' ago') else '後'}"


def duration(text: str) -> str:
    if text == "half an hour":
        return "30分"
    if " and a half" in text:
        return f"{1 if text[0] == 'a' else VALUES[text.split()[0]]}時間30分"
    count, unit = quantity(text)
    return f"{count}{SPANS[unit]}{'間' if unit in ('day', 'month', 'year') else ''}"


def compound_duration(text: str) -> str:
    units = "|".join(SPANS)
    first, second = match(rf"(.*? (?:{units})s?)(?: and|,)? (.*)", text)
    (large, unit), (small, small_unit) = quantity(first), quantity(second)
    joiner = "と" if unit in ("day", "week") else ""
    return f"{large}{SPANS[unit]}{joiner}{small}{SPANS[small_unit]}"


def frequency(text: str) -> str:
    if text.startswith("every "):
        count, unit = quantity(text.removeprefix("every "))
        return f"{count}{SPANS[unit]}ごと"
    times, unit = match("(.*) an? ([a-z]+)", text)
    return f"1{SPANS[unit]}に{dict(once=1, twice=2).get(times) or number(times[:-6])}回"


def fraction(text: str) -> str:
    top, bottom = match("(a|an|[a-z]+(?:-[a-z]+)?) ([a-z-]+)", text)
    above = 1 if top in ("a", "an") else number(top)
    assert bottom == "half" or bottom.endswith("s") == (above > 1)
    below = {"half": 2, "quarter": 4}.get(bottom if above == 1 else bottom[:-1])
    return f"{below or ordinal(bottom if above == 1 else bottom[:-1])}分の{above}"


def percentage(text: str) -> str:
    return decimal(re.sub(" ?(per ?cent|%)$", "", text)) + "%"


def money(text: str) -> str:
    if text.startswith("$"):
        dollars, cents = match(r"\$([\d,]+)(?:\.(\d\d))?", text)
        return f"{number(dollars)}ドル" + (f"{int(cents)}セント" if cents else "")
    names = "(dollar|euro|pound|yen)s?"
    whole, name, part = match(f"(.*?) {names}(?: and (.*) (?:cents?|pence|penny))?", text)
    currency = {"dollar": "ドル", "euro": "ユーロ", "pound": "ポンド", "yen": "円"}[name]
    hundredth = "ペンス" if name == "pound" else "セント"
    return f"{big(number(whole))}{currency}" + (f"{number(part)}{hundredth}" if part else "")


def temperature(text: str) -> str:
    minus, value, scale = match("(minus )?(.*) degrees?( celsius| fahrenheit)?", text)
    prefix = {"": "", " celsius": "摂氏", " fahrenheit": "華氏"}[scale]
    return f"{prefix}{'マイナス' if minus else ''}{decimal(value)}度"


def age(text: str) -> str:
    if found := re.fullmatch("(?:aged (.*)|(.*?) years? (?:old|of age))", text):
        return f"{number(found[1] or found[2])}歳"
    article, years, person = match("(an?) (.*)-year-old ([a-z]+)", text)
    assert article == ("an" if re.match(r"e|8|1[18]$", years) else "a")
    people = {"man": "男性", "woman": "女性", "boy": "男の子", "girl": "女の子"}
    return f"{number(years)}歳の{people[person]}"


READERS: dict[str, Callable[[str], str]] = {
    "full_date": full_date,
    "weekday_full_date": with_weekday(full_date),
    "month_day": month_day,
    "weekday_month_day": with_weekday(month_day),
    "month_year": month_year,
    "year": year_alone,
    "year_bc": lambda text: f"紀元前{match('(?:the year )?([0-9]+) bce?', text)[0]}年",
    "period_of_year": period_of_year,
    "part_of_month": part_of_month,
    "decade": decade,
    "century": century,
    "clock_time": clock,
    "clock_24_hours": clock_24_hours,
    "weekday": weekday,
    "relative": {
        phrase.lower(): target for phrase, target in date_words.RELATIVE_DAYS.items()
    }.__getitem__,
    "from_now": from_now,
    "duration": duration,
    "compound_duration": compound_duration,
    "frequency": frequency,
    "date_range": date_range,
    "time_range": between(clock, ".*?(?:noon|midday|am|pm|morning|afternoon|evening|night)"),
    "year_range": between("{}年".format),
    "date_and_time": at_a_time(month_day),
    "day_and_time": at_a_time(
        (WEEKDAYS | {"today": "今日", "tomorrow": "明日", "yesterday": "昨日"}).__getitem__, "の"
    ),
    "number": lambda text: str(number(text)),
    "large_number": lambda text: big(number(text)),
    "ordinal": lambda text: f"{ordinal(text.removeprefix('the '))}番目",
    "decimal": decimal,
    "fraction": fraction,
    "percentage": percentage,
    "money": money,
    "temperature": temperature,
    "age": age,
}


def read(pattern: str, source: str) -> str:
    text = source.lower().replace("a.m.", "am").replace("p.m.", "pm").removesuffix(".")
    return READERS[pattern](text)


# --- Tests --------------------------------------------------------------------------------------


def test_there_are_as_many_patterns_as_promised_and_each_is_written_out_by_hand() -> None:
    assert len(PATTERNS) >= 12
    assert set(BY_HAND) == set(PATTERNS)
    assert all(len(examples) >= 2 for examples in BY_HAND.values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_drawn_pairs_agree_with_a_parser_that_agrees_with_the_hand(pattern: str) -> None:
    for source, target in BY_HAND[pattern].items():
        assert read(pattern, source) == target
    rng = Random(pattern)
    for _ in range(3000):
        example = sample_pair(rng, [pattern])
        assert example.pattern == pattern
        assert read(pattern, example.source) == example.target, example
    # The parser would agree with a grammar that says one thing only: the wording must vary.
    assert len({sample_pair(rng, [pattern]).source for _ in range(1000)}) > 100


def test_weekdays_are_those_of_the_calendar() -> None:
    rng = Random(0)
    names = list(WEEKDAYS.values())
    for _ in range(500):
        target = sample_pair(rng, ["weekday_full_date"]).target
        *numbers, weekday_name = match(r"(\d+)年(\d+)月(\d+)日(.曜日)", target)
        assert weekday_name == names[date(*map(int, numbers)).weekday()]


def test_one_phrase_has_one_translation_and_keeps_to_the_style() -> None:
    rng = Random(3)
    target_of: dict[str, str] = {}
    for _ in range(50_000):
        example = sample_pair(rng)
        typed = example.source.lower().removesuffix(".")
        assert target_of.setdefault(typed, example.target) == example.target, example
        assert example.source.isascii() and len(example.source) <= dates.MAX_SOURCE
        assert example.source == " ".join(example.source.split())
        assert len(example.target) <= 25
        assert not re.search(r"(?<![\d.])0\d", example.target), example
    assert len(set("".join(target_of))) <= 60
    assert len(set("".join(target_of.values()))) <= 120


@pytest.mark.parametrize("pattern", PATTERNS)
def test_closed_means_fewer_than_a_thousand_targets(pattern: str) -> None:
    rng = Random(pattern)
    targets = {sample_pair(rng, [pattern]).target for _ in range(10_000)}
    assert (len(targets) < 1000) == PATTERNS[pattern].closed


def test_training_and_test_share_no_target() -> None:
    test = held_out_pairs(1000, seed=0)
    held_out = {example.target for example in test}
    trained = {example.target for example in islice(training_pairs(seed=0), 20_000)}
    assert len(test) == len({example.source for example in test}) == 1000
    assert not held_out & trained
    assert {example.pattern for example in test} == set(OPEN)
    rng = Random(5)
    drawn = [sample_pair(rng, OPEN) for _ in range(20_000)]
    assert 0.04 < sum(map(is_held_out, drawn)) / len(drawn) < 0.06


def test_closed_patterns_are_trained_on_whole_and_never_in_the_test() -> None:
    rng = Random(6)
    known = [sample_pair(rng, CLOSED) for _ in range(20_000)]
    assert not any(map(is_held_out, known))
    assert not {e.target for e in known} & {e.target for e in held_out_pairs(2000, seed=1)}
    trained = {example.pattern for example in islice(training_pairs(seed=1), 5000)}
    assert trained == set(PATTERNS)


def test_a_seed_means_the_same_pairs_in_every_process() -> None:
    code = (
        "from itertools import islice\n"
        "from tilewise.data.dates import held_out_pairs, training_pairs\n"
        "print(ascii([*islice(training_pairs(7), 200), *held_out_pairs(50, 8)]))"
    )
    here = ascii([*islice(training_pairs(7), 200), *held_out_pairs(50, 8)])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here
    assert list(islice(training_pairs(7), 50)) != list(islice(training_pairs(8), 50))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: date_words.number_words(-1), "number is -1; give one from 0 to 999999999"),
        (lambda: date_words.year_words(2100), "year is 2100; give one from 1000 to 2099"),
        (lambda: date_words.time_words(24, 0), "hour is 24; give one from 0 to 23"),
        (lambda: date_words.japanese_time(1, 60), "minute is 60; give one from 0 to 59"),
        (lambda: date_words.japanese_date(13, 1), "month is 13; give one from 1 to 12"),
        (lambda: held_out_pairs(10_001, 0), "count is 10001; give one from 0 to 10000"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
